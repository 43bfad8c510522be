//! Join tokens: one string that carries a newcomer's whole first contact.
//!
//! `flt1.` + base64url(JSON payload) + `.` + the first 8 bytes of the payload's SHA-256, so that a
//! token damaged by copying is refused before anything is dialled. The checksum is no signature and
//! need not be: a token changed on purpose fails at the pinned root or at the issuer, which keeps
//! the hash of the secret, the expiry and the use of every token it made.

use std::{
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use mesh_model::{ClusterId, TrustDomain};
use serde::{Deserialize, Serialize};

/// Prefix of the only format so far.
const PREFIX: &str = "flt1";
/// Longest token accepted, bytes.
const MAX_LEN: usize = 8192;

/// What a join token says.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinToken {
    /// Public name of the token, for logs.
    pub id: String,
    /// The member that issued it.
    pub cluster: ClusterId,
    /// Its mesh.
    pub trust_domain: TrustDomain,
    /// That member's east-west gateways.
    pub gateways: Vec<SocketAddr>,
    /// SHA-256 of the mesh's root certificate, hexadecimal.
    pub pin: String,
    /// The one-time secret.
    secret: String,
    /// Seconds since the epoch after which it is void.
    pub expires: u64,
    /// The member dials the newcomer, which waits for it, and not the other way round.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dials: bool,
    /// The newcomer keeps its own root, and this is its trust domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub federate: Option<TrustDomain>,
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinToken")
            .field("id", &self.id)
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

/// Why a string is no usable join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not a token at all.
    #[error(
        "this is not a join token (one starts with \"flt1.\"): create one with `flotilla token create` in a member cluster"
    )]
    NotAToken,
    /// Its checksum does not fit its content.
    #[error("the join token is damaged (its checksum does not fit): copy it again, whole")]
    Damaged,
    /// Its content cannot be read.
    #[error("the join token cannot be read: {0}")]
    Content(String),
    /// Its time has passed.
    #[error("the join token expired {0} s ago: create a new one with `flotilla token create`")]
    Expired(u64),
}

/// Seconds since the epoch.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What the issuer keeps instead of the secret.
pub(crate) fn secret_hash(secret: &[u8]) -> String {
    hex(digest(&SHA256, secret).as_ref())
}

impl JoinToken {
    /// A token with a fresh id and secret.
    #[must_use]
    pub fn generate(
        cluster: ClusterId,
        trust_domain: TrustDomain,
        gateways: Vec<SocketAddr>,
        pin: String,
        expires: u64,
    ) -> Self {
        let id: [u8; 6] = rand::random();
        let secret: [u8; 32] = rand::random();
        Self {
            id: hex(&id),
            cluster,
            trust_domain,
            gateways,
            pin,
            secret: URL_SAFE_NO_PAD.encode(secret),
            expires,
            dials: false,
            federate: None,
        }
    }

    /// The same for a newcomer that waits to be dialled.
    #[must_use]
    pub fn of_dialler(self) -> Self {
        Self { dials: true, ..self }
    }

    /// The same for a newcomer of another trust domain.
    #[must_use]
    pub fn for_domain(self, federate: Option<TrustDomain>) -> Self {
        Self { federate, ..self }
    }

    /// The secret's bytes, to be shown only to the peer that proved the pinned root.
    #[must_use]
    pub fn secret(&self) -> Vec<u8> {
        // Checked when the token was parsed; generated tokens are valid by construction.
        URL_SAFE_NO_PAD.decode(&self.secret).unwrap_or_default()
    }

    /// The one string that a person copies.
    #[must_use]
    pub fn encode(&self) -> String {
        // Strings, numbers and socket addresses always serialise.
        let payload = URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default());
        let sum = checksum(&payload);
        format!("{PREFIX}.{payload}.{sum}")
    }

    /// Reads and checks a token; `now` is in seconds since the epoch.
    ///
    /// # Errors
    /// [`TokenError`], each with what to do about it.
    pub fn parse(text: &str, now: u64) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > MAX_LEN {
            return Err(TokenError::NotAToken);
        }
        let mut parts = text.split('.');
        let (Some(PREFIX), Some(payload), Some(sum), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::NotAToken);
        };
        if checksum(payload) != sum {
            return Err(TokenError::Damaged);
        }
        let json = URL_SAFE_NO_PAD.decode(payload).map_err(|_| TokenError::Damaged)?;
        let token: Self = serde_json::from_slice(&json).map_err(|e| TokenError::Content(e.to_string()))?;
        if URL_SAFE_NO_PAD.decode(&token.secret).map_or(true, |s| s.len() != 32) {
            return Err(TokenError::Content("its secret is not 32 bytes".into()));
        }
        if token.pin.len() != 64 || !token.pin.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(TokenError::Content("its pin is not a SHA-256".into()));
        }
        if token.gateways.is_empty() && !token.dials {
            return Err(TokenError::Content("it names no gateway".into()));
        }
        if now >= token.expires {
            return Err(TokenError::Expired(now - token.expires));
        }
        Ok(token)
    }
}

fn checksum(payload: &str) -> String {
    hex(&digest(&SHA256, payload.as_bytes()).as_ref()[..8])
}

/// A token of any payload, with the checksum that fits.
#[cfg(any(test, fuzzing))]
pub(crate) fn frame(json: &str) -> String {
    let payload = URL_SAFE_NO_PAD.encode(json);
    format!("{PREFIX}.{payload}.{}", checksum(&payload))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> JoinToken {
        JoinToken::generate(
            ClusterId::new("west").unwrap(),
            TrustDomain::default(),
            vec!["192.0.2.1:15443".parse().unwrap()],
            "ab".repeat(32),
            1000,
        )
    }

    #[test]
    fn round_trip() {
        let t = token();
        assert_eq!(JoinToken::parse(&t.encode(), 999).unwrap(), t);
        assert_eq!(JoinToken::parse(&format!(" {}\n", t.encode()), 0).unwrap(), t);
        assert_eq!(t.secret().len(), 32);
        assert!(!format!("{t:?}").contains(&t.secret), "the secret is not printed");
        // Whoever waits to be dialled needs no address.
        let waits = JoinToken { gateways: vec![], ..t }.of_dialler();
        assert_eq!(JoinToken::parse(&waits.encode(), 0).unwrap(), waits);
        let nowhere = JoinToken { dials: false, ..waits };
        assert!(matches!(JoinToken::parse(&nowhere.encode(), 0), Err(TokenError::Content(_))));
    }

    #[test]
    fn refusals_say_why() {
        let t = token();
        assert_eq!(JoinToken::parse(&t.encode(), 1010), Err(TokenError::Expired(10)));
        assert_eq!(JoinToken::parse("hello", 0), Err(TokenError::NotAToken));
        let text = t.encode();
        for i in [6, text.len() / 2, text.len() - 1] {
            let mut bytes = text.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let err = JoinToken::parse(std::str::from_utf8(&bytes).unwrap(), 0).unwrap_err();
            assert_eq!(err, TokenError::Damaged, "byte {i}");
        }
        assert_eq!(JoinToken::parse(&text[..text.len() - 3], 0), Err(TokenError::Damaged));
    }

    proptest! {
        #[test]
        fn any_text_is_refused_without_panic(s in "\\PC*") {
            prop_assert!(JoinToken::parse(&s, 0).is_err());
            let framed = format!("flt1.{s}.{}", checksum(&s));
            prop_assert!(JoinToken::parse(&framed, 0).is_err());
        }
    }
}
