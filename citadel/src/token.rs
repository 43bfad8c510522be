//! Bearer tokens with which a workload asks for its first certificate.
//!
//! They have the claims of a projected Kubernetes service-account token with audience `istio-ca`,
//! signed (ES256) by the cluster's own token key, so the same agent works on every platform. They
//! prove a namespace and a service account, in this cluster, for a short time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use serde::{Deserialize, Serialize};

use crate::AuthorityError;

/// Audience of workload tokens.
pub const AUDIENCE: &str = "istio-ca";
/// Lifetime unless asked otherwise, that of Istio's projected tokens.
pub const DEFAULT_TTL: Duration = Duration::from_secs(43_200);
/// Longest lifetime.
pub const MAX_TTL: Duration = Duration::from_secs(7 * 86_400);
/// Tolerated difference between clocks.
const SKEW: u64 = 60;

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: Vec<String>,
    sub: String,
    iat: u64,
    exp: u64,
}

/// Signs and verifies the workload tokens of one cluster.
pub struct TokenIssuer {
    issuer: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
}

impl std::fmt::Debug for TokenIssuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenIssuer").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

/// A fresh signing key, PKCS #8 PEM.
pub(crate) fn generate_key() -> Result<String, AuthorityError> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem())
}

impl TokenIssuer {
    pub(crate) fn new(cluster: &str, key_pem: &str) -> Result<Self, AuthorityError> {
        let bad = |e: String| AuthorityError::Stored(format!("token-key.pem: {e}"));
        let key = KeyPair::from_pem(key_pem).map_err(|e| bad(e.to_string()))?;
        Ok(Self {
            issuer: format!("flotilla/{cluster}"),
            encoding: EncodingKey::from_ec_pem(key_pem.as_bytes()).map_err(|e| bad(e.to_string()))?,
            decoding: DecodingKey::from_ec_pem(key.public_key_pem().as_bytes())
                .map_err(|e| bad(e.to_string()))?,
        })
    }

    /// What tokens of this cluster name as their issuer.
    pub(crate) fn name(&self) -> &str {
        &self.issuer
    }

    /// A token for one service account.
    ///
    /// # Errors
    /// [`AuthorityError::BadRequest`] for names that cannot be part of a SPIFFE ID or a lifetime over
    /// seven days.
    pub fn issue(
        &self,
        namespace: &str,
        service_account: &str,
        ttl: Duration,
    ) -> Result<String, AuthorityError> {
        for (what, v) in [("namespace", namespace), ("service account", service_account)] {
            if v.is_empty() || v.contains(':') || v.len() > 253 {
                return Err(AuthorityError::BadRequest(format!("{what} {v:?} is not valid")));
            }
        }
        if ttl > MAX_TTL {
            return Err(AuthorityError::BadRequest("a workload token lives seven days at most".into()));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let claims = Claims {
            iss: self.issuer.clone(),
            aud: vec![AUDIENCE.into()],
            sub: format!("system:serviceaccount:{namespace}:{service_account}"),
            iat: now,
            exp: now + ttl.as_secs(),
        };
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &self.encoding)
            .map_err(|e| AuthorityError::Refused(e.to_string()))
    }

    /// `(namespace, service account)` that a token proves.
    ///
    /// # Errors
    /// [`AuthorityError::Unauthenticated`] saying what is wrong with it.
    pub fn verify(&self, token: &str) -> Result<(String, String), AuthorityError> {
        self.verify_dated(token).map(|(ns, sa, _)| (ns, sa))
    }

    /// The same, and when it was issued, seconds since the epoch.
    pub(crate) fn verify_dated(&self, token: &str) -> Result<(String, String, u64), AuthorityError> {
        let mut v = Validation::new(Algorithm::ES256);
        v.set_audience(&[AUDIENCE]);
        v.set_issuer(&[&self.issuer]);
        v.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
        v.leeway = SKEW;
        let refused = |e: String| AuthorityError::Unauthenticated(format!("workload token: {e}"));
        let data =
            jsonwebtoken::decode::<Claims>(token, &self.decoding, &v).map_err(|e| refused(e.to_string()))?;
        let mut it = data.claims.sub.splitn(4, ':');
        match (it.next(), it.next(), it.next(), it.next()) {
            (Some("system"), Some("serviceaccount"), Some(ns), Some(sa)) => {
                Ok((ns.into(), sa.into(), data.claims.iat))
            }
            _ => Err(refused("its subject is not a service account".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issuer(cluster: &str) -> TokenIssuer {
        TokenIssuer::new(cluster, &generate_key().unwrap()).unwrap()
    }

    #[test]
    fn tokens_prove_what_they_were_issued_for() {
        let west = issuer("west");
        let t = west.issue("books", "reviews", DEFAULT_TTL).unwrap();
        assert_eq!(west.verify(&t).unwrap(), ("books".into(), "reviews".into()));
    }

    #[test]
    fn foreign_expired_and_tampered_tokens_are_refused() {
        let key = generate_key().unwrap();
        let west = TokenIssuer::new("west", &key).unwrap();
        let t = west.issue("books", "reviews", DEFAULT_TTL).unwrap();
        assert!(issuer("west").verify(&t).is_err(), "another key");
        assert!(TokenIssuer::new("east", &key).unwrap().verify(&t).is_err(), "another issuer");
        let mut parts: Vec<_> = t.split('.').map(str::to_owned).collect();
        parts[1] = parts[1].replace('e', "f");
        assert!(west.verify(&parts.join(".")).is_err(), "another payload");
        assert!(west.verify("").is_err() && west.verify("a.b.c").is_err());
        let expired = Claims {
            iss: "flotilla/west".into(),
            aud: vec![AUDIENCE.into()],
            sub: "system:serviceaccount:books:reviews".into(),
            iat: 1,
            exp: 2,
        };
        let t = jsonwebtoken::encode(&Header::new(Algorithm::ES256), &expired, &west.encoding).unwrap();
        assert!(west.verify(&t).is_err(), "expired");
        assert!(west.issue("a:b", "c", DEFAULT_TTL).is_err());
        assert!(west.issue("a", "c", MAX_TTL * 2).is_err());
    }
}
