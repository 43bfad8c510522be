//! A signed token and the key set that proves it, for the cost of JWT validation.

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::json;

pub(crate) const ISSUER: &str = "https://issuer.bench.local";
pub(crate) const AUDIENCE: &str = "bench";

/// An ES256 token good for a day, and its JWKS.
pub(crate) fn token() -> anyhow::Result<(String, String)> {
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)?;
    // An uncompressed point: 4, then x and y of 32 bytes each.
    let point = key.public_key().as_ref();
    let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..65]));
    let jwks = json!({"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "bench", "x": x, "y": y}]});
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let part = |v: serde_json::Value| URL_SAFE_NO_PAD.encode(v.to_string());
    let head = part(json!({"alg": "ES256", "typ": "JWT", "kid": "bench"}));
    let claims =
        part(json!({"iss": ISSUER, "aud": AUDIENCE, "sub": "bench", "iat": now, "exp": now + 86_400}));
    let signed = format!("{head}.{claims}");
    let signature = key.sign(&SystemRandom::new(), signed.as_bytes())?;
    Ok((format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref())), jwks.to_string()))
}
