//! Tokens verified by their issuer's keys (OpenID Connect Discovery 1.0, section 4).
//!
//! The issuer's document names where its keys are, and must name the issuer itself. Keys are fetched when the first token comes,
//! again every twenty minutes, and for a key that is not known, at most every ten seconds: whoever sends tokens with made-up
//! keys makes nobody ask more often. While the issuer cannot be asked, the keys from before count.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jsonwebtoken::{Algorithm, DecodingKey, Validation, jwk::JwkSet};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::{
    Account, IssuerUrl, PATIENCE, account,
    https::{Client, Failure, Url},
    refused, unavailable,
};
use crate::{AuthorityError, token::AUDIENCE};

/// Keys are asked for again.
const REFRESH: Duration = Duration::from_secs(1200);
/// But not more often.
const PAUSE: Duration = Duration::from_secs(10);
/// Longest document, and longest set of keys, bytes.
const MAX_DOCUMENT: usize = 256 * 1024;
/// Tolerated difference between clocks, seconds.
const SKEW: u64 = 60;
/// Signatures that are made with a key of the issuer's alone.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// An issuer and its keys.
pub(super) struct Issuer {
    url: Url,
    name: String,
    client: Arc<Client>,
    keys: Mutex<Keys>,
}

#[derive(Default)]
struct Keys {
    set: Option<Arc<JwkSet>>,
    /// When they were asked for last, and last told.
    asked: Option<Instant>,
    told: Option<Instant>,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    #[serde(default)]
    iat: u64,
}

impl Issuer {
    pub(super) fn new(issuer: IssuerUrl, client: Arc<Client>) -> Self {
        Self { url: issuer.at, name: issuer.name.to_string(), client, keys: Mutex::default() }
    }

    /// Names are compared as they are written; only what URLs make of an empty path is the same.
    pub(super) fn is(&self, issuer: &str) -> bool {
        !issuer.is_empty() && issuer.trim_end_matches('/') == self.name.trim_end_matches('/')
    }

    pub(super) async fn prove(&self, token: &str) -> Result<Account, AuthorityError> {
        let header = jsonwebtoken::decode_header(token).map_err(refused)?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(refused("it is signed in a way that proves nothing here"));
        }
        let kid = header.kid.ok_or_else(|| refused("it does not name its key"))?;
        let mut set = self.keys(false).await?;
        if set.find(&kid).is_none() {
            set = self.keys(true).await?;
        }
        let key = set.find(&kid).ok_or_else(|| refused("its issuer has no such key"))?;
        let key = DecodingKey::from_jwk(key).map_err(|e| refused(format!("the key of its issuer: {e}")))?;
        let mut v = Validation::new(header.alg);
        v.set_audience(&[AUDIENCE]);
        v.set_issuer(&[self.name.trim_end_matches('/'), &format!("{}/", self.name.trim_end_matches('/'))]);
        v.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
        v.validate_nbf = true;
        v.leeway = SKEW;
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &v).map_err(refused)?.claims;
        let (namespace, name) = account(&claims.sub)?;
        Ok(Account { namespace, name, issued_at: claims.iat, by: "token of an issuer" })
    }

    /// The keys; anew if they are old, or if one is `missing`.
    async fn keys(&self, missing: bool) -> Result<Arc<JwkSet>, AuthorityError> {
        // Everybody waits for the one who asks.
        let mut keys = self.keys.lock().await;
        let now = Instant::now();
        let within = |at: Option<Instant>, limit| at.is_some_and(|at| now.duration_since(at) < limit);
        let fresh = !missing && within(keys.told, REFRESH);
        if !fresh && !within(keys.asked, PAUSE) {
            keys.asked = Some(now);
            let asked = tokio::time::timeout(PATIENCE, self.fetch()).await;
            match asked.unwrap_or_else(|_| Err(Failure::new("no answer"))) {
                Ok(set) => {
                    keys.set = Some(Arc::new(set));
                    keys.told = Some(now);
                }
                Err(why) => {
                    tracing::warn!(issuer = %self.name, %why, said = why.said, "the keys of an issuer of tokens were not told");
                }
            }
        }
        keys.set.clone().ok_or_else(|| unavailable("the keys of its issuer are not known yet"))
    }

    async fn fetch(&self) -> Result<JwkSet, Failure> {
        let url = self.url.join("/.well-known/openid-configuration");
        let document = self.client.get(&url, &self.url, MAX_DOCUMENT).await.map_err(hinted)?;
        let issuer = document["issuer"].as_str().unwrap_or_default();
        if !self.is(issuer) {
            return Err(Failure::new(format!("{url} is about another issuer")));
        }
        let uri = document["jwks_uri"].as_str().unwrap_or_default();
        let uri = Url::parse(uri).map_err(|why| Failure::new(format!("{url}: jwks_uri {why}")))?;
        // An API server names the address at which it thinks that it is reached. It is not always, and our credential is
        // not for whoever is there: so the one that was asked for the document is asked for them first.
        if let Some(own) = self.url.with_path_of(&uri).filter(|_| !uri.is_server_of(&self.url))
            && let Ok(keys) = self.client.get(&own, &self.url, MAX_DOCUMENT).await
            && let Ok(set) = serde_json::from_value(keys)
        {
            return Ok(set);
        }
        let keys = self.client.get(&uri, &self.url, MAX_DOCUMENT).await.map_err(hinted)?;
        serde_json::from_value(keys).map_err(|e| Failure::new(format!("{uri}: {e}")))
    }
}

/// What to do about it.
fn hinted(e: Failure) -> Failure {
    let why = match e.status.map(|s| s.as_u16()) {
        Some(401 | 403) => format!(
            "{e} (an API server tells its keys to accounts with the role system:service-account-issuer-discovery: \
             --token-credential names a token of one)"
        ),
        _ => return e,
    };
    Failure { why, ..e }
}
