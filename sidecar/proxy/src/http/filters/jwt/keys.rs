//! Key sets (RFC 7517) and signatures (RFC 7518, 8037).

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde_json::Value;

use super::token::{Parsed, Status};

/// Public keys of an issuer.
pub(super) struct KeySet(Vec<Key>);

struct Key {
    id: String,
    /// `alg`, if the key is for one only.
    alg: String,
    kind: Kind,
    key: DecodingKey,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rsa,
    P256,
    P384,
    Ed25519,
    Secret,
}

impl std::fmt::Debug for KeySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Symmetric keys are secrets.
        write!(f, "KeySet({} keys)", self.0.len())
    }
}

/// The kind of key that an algorithm takes: a token may choose its algorithm, and must not turn a public key
/// into a shared secret by doing so.
fn kind(alg: Algorithm) -> Kind {
    match alg {
        Algorithm::HS256 | Algorithm::HS384 | Algorithm::HS512 => Kind::Secret,
        Algorithm::ES256 => Kind::P256,
        Algorithm::ES384 => Kind::P384,
        Algorithm::EdDSA => Kind::Ed25519,
        _ => Kind::Rsa,
    }
}

impl KeySet {
    /// Reads a set; keys of unknown kinds are left out, and a set without any key is an error.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|e| format!("the key set is not JSON: {e}"))?;
        let keys = json.get("keys").and_then(Value::as_array).ok_or("the key set has no list of keys")?;
        let keys: Vec<Key> = keys.iter().filter_map(key).collect();
        if keys.is_empty() {
            return Err("the key set has no key that can be used".into());
        }
        Ok(Self(keys))
    }

    pub(super) fn verify(&self, t: &Parsed<'_>) -> Result<(), Status> {
        let kind = kind(t.alg);
        let mut tried = false;
        for k in &self.0 {
            let id_fits = t.kid.is_empty() || k.id.is_empty() || k.id == t.kid;
            let alg_fits = k.alg.is_empty() || k.alg == t.alg_name;
            if !id_fits || !alg_fits || k.kind != kind {
                continue;
            }
            tried = true;
            if jsonwebtoken::crypto::verify(t.signature, t.signed.as_bytes(), &k.key, t.alg)
                .is_ok_and(|good| good)
            {
                return Ok(());
            }
        }
        Err(if tried { Status::Verification } else { Status::NoKeyMatches })
    }
}

fn key(v: &Value) -> Option<Key> {
    let text = |name: &str| v.get(name).and_then(Value::as_str).unwrap_or_default();
    if !matches!(text("use"), "" | "sig") {
        return None;
    }
    let (kind, key) = match (text("kty"), text("crv")) {
        ("RSA", _) => (Kind::Rsa, DecodingKey::from_rsa_components(text("n"), text("e")).ok()?),
        ("EC", crv @ ("P-256" | "P-384")) => {
            let (kind, length) = if crv == "P-256" { (Kind::P256, 32) } else { (Kind::P384, 48) };
            let whole = |n| URL_SAFE_NO_PAD.decode(text(n)).is_ok_and(|b| b.len() == length);
            if !whole("x") || !whole("y") {
                return None;
            }
            (kind, DecodingKey::from_ec_components(text("x"), text("y")).ok()?)
        }
        ("OKP", "Ed25519") => (Kind::Ed25519, DecodingKey::from_ed_components(text("x")).ok()?),
        ("oct", _) => {
            let secret =
                URL_SAFE_NO_PAD.decode(text("k").trim_end_matches('=')).ok().filter(|s| !s.is_empty())?;
            (Kind::Secret, DecodingKey::from_secret(&secret))
        }
        _ => return None,
    };
    Some(Key { id: text("kid").to_owned(), alg: text("alg").to_owned(), kind, key })
}
