use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as B64};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use super::{
    cache::TokenCache,
    keys::KeySet,
    token::{self, Status},
};

fn sign(alg: Algorithm, kid: Option<&str>, key: &EncodingKey, claims: &Value) -> String {
    let header = Header { kid: kid.map(str::to_owned), ..Header::new(alg) };
    jsonwebtoken::encode(&header, claims, key).unwrap()
}

fn verify(keys: &KeySet, raw: &str) -> Status {
    match token::parse(raw) {
        Err(s) => s,
        Ok(p) => keys.verify(&p).err().unwrap_or(Status::Ok),
    }
}

fn set(keys: &[Value]) -> KeySet {
    KeySet::parse(&json!({ "keys": keys }).to_string()).unwrap()
}

/// A key pair and its JWK.
fn pair(alg: &'static rcgen::SignatureAlgorithm, kid: &str) -> (EncodingKey, Value) {
    let k = rcgen::KeyPair::generate_for(alg).unwrap();
    let public = k.public_key_raw();
    if alg == &rcgen::PKCS_ED25519 {
        let jwk = json!({"kty": "OKP", "crv": "Ed25519", "kid": kid, "x": B64.encode(public)});
        return (EncodingKey::from_ed_der(k.serialized_der()), jwk);
    }
    let half = (public.len() - 1) / 2;
    let (x, y) = public[1..].split_at(half);
    let crv = if half == 32 { "P-256" } else { "P-384" };
    let jwk = json!({"kty": "EC", "crv": crv, "kid": kid, "x": B64.encode(x), "y": B64.encode(y)});
    (EncodingKey::from_ec_der(k.serialized_der()), jwk)
}

#[test]
fn signatures_of_every_kind() {
    let claims = json!({"iss": "a", "exp": 9_999_999_999u64});
    let (es256, j256) = pair(&rcgen::PKCS_ECDSA_P256_SHA256, "p256");
    let (es384, j384) = pair(&rcgen::PKCS_ECDSA_P384_SHA384, "p384");
    let (ed, jed) = pair(&rcgen::PKCS_ED25519, "ed");
    let secret = EncodingKey::from_secret(b"0123456789abcdef0123456789abcdef");
    let oct = json!({"kty": "oct", "kid": "s", "k": B64.encode(b"0123456789abcdef0123456789abcdef")});
    let all = set(&[j256.clone(), j384, jed, oct]);
    for (alg, kid, key) in [
        (Algorithm::ES256, "p256", &es256),
        (Algorithm::ES384, "p384", &es384),
        (Algorithm::EdDSA, "ed", &ed),
        (Algorithm::HS256, "s", &secret),
    ] {
        let good = sign(alg, Some(kid), key, &claims);
        assert_eq!(verify(&all, &good), Status::Ok, "{alg:?}");
        assert_eq!(verify(&all, &sign(alg, None, key, &claims)), Status::Ok, "{alg:?} without kid");
        assert_eq!(verify(&all, &sign(alg, Some("x"), key, &claims)), Status::NoKeyMatches);
        let (head, signature) = good.rsplit_once('.').unwrap();
        let flipped: String = signature.chars().rev().collect();
        assert!(matches!(
            verify(&all, &format!("{head}.{flipped}")),
            Status::Verification | Status::SignatureBase64
        ));
        let other = B64.encode(json!({"iss": "b"}).to_string());
        let (header, _) = head.split_once('.').unwrap();
        assert_eq!(verify(&all, &format!("{header}.{other}.{signature}")), Status::Verification);
    }
    // A public key is no shared secret, whatever the token's header says.
    let public = B64.decode(j256["x"].as_str().unwrap()).unwrap();
    let confused = sign(Algorithm::HS256, Some("p256"), &EncodingKey::from_secret(&public), &claims);
    assert_eq!(verify(&set(&[j256]), &confused), Status::NoKeyMatches);
}

#[test]
fn rsa_and_key_restrictions() {
    let k = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
    // The public key is SEQUENCE { INTEGER n, INTEGER e }: 2048 bits and 65537.
    let der = k.public_key_raw();
    let at = der.windows(4).position(|w| w == [0x02, 0x82, 0x01, 0x01]).unwrap();
    let n = &der[at + 5..at + 5 + 256];
    let jwk = |extra: Value| {
        let mut j = json!({"kty": "RSA", "n": B64.encode(n), "e": "AQAB"});
        j.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        j
    };
    let pem = k.serialize_pem();
    let key = EncodingKey::from_rsa_pem(pem.as_bytes()).unwrap();
    let claims = json!({"iss": "a"});
    for alg in [Algorithm::RS256, Algorithm::RS512, Algorithm::PS256] {
        assert_eq!(verify(&set(&[jwk(json!({}))]), &sign(alg, None, &key, &claims)), Status::Ok, "{alg:?}");
    }
    let only = set(&[jwk(json!({"alg": "RS384"}))]);
    assert_eq!(verify(&only, &sign(Algorithm::RS256, None, &key, &claims)), Status::NoKeyMatches);
    assert_eq!(verify(&only, &sign(Algorithm::RS384, None, &key, &claims)), Status::Ok);
    assert!(KeySet::parse(&json!({"keys": [jwk(json!({"use": "enc"}))]}).to_string()).is_err());
    for bad in [
        "",
        "[]",
        "{}",
        r#"{"keys": []}"#,
        r#"{"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}]}"#,
    ] {
        assert!(KeySet::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn malformed_tokens() {
    let b = |s: &str| B64.encode(s);
    let (h, p) = (b(r#"{"alg":"HS256"}"#), b("{}"));
    for (raw, want) in [
        (String::new(), Status::Format),
        ("a.b".into(), Status::Format),
        (format!("{h}.{p}.AA.AA"), Status::Format),
        (format!("!.{p}.AA"), Status::HeaderBase64),
        (format!("{}.{p}.AA", b("x")), Status::HeaderJson),
        (format!("{}.{p}.AA", b("{}")), Status::HeaderAlg),
        (format!("{}.{p}.", b(r#"{"alg":"none"}"#)), Status::AlgUnsupported),
        (format!("{}.{p}.AA", b(r#"{"alg":"HS256","kid":1}"#)), Status::HeaderKid),
        (format!("{h}.!.AA"), Status::PayloadBase64),
        (format!("{h}.{}.AA", b("[]")), Status::PayloadJson),
        (format!("{h}.{}.AA", b(r#"{"iss":1}"#)), Status::Claim),
        (format!("{h}.{}.AA", b(r#"{"exp":"1"}"#)), Status::Claim),
        (format!("{h}.{}.AA", b(r#"{"exp":-1}"#)), Status::Claim),
        (format!("{h}.{}.AA", b(r#"{"aud":[1]}"#)), Status::Claim),
        (format!("{h}.{p}.!"), Status::SignatureBase64),
    ] {
        assert_eq!(token::parse(&raw).map(|_| ()).unwrap_err(), want, "{raw}");
    }
    let ok = format!("{h}.{}.AA", b(r#"{"aud":"x","exp":1.5}"#));
    let c = token::parse(&ok).unwrap().claims;
    assert_eq!((c.audiences, c.expires), (vec!["x".to_owned()], Some(1)));
    assert_eq!(token::audience("https://a.b/"), "a.b");
}

#[test]
fn the_cache_is_bounded_and_forgets() {
    let raw = |n: u64| {
        format!("{}.{}.AA", B64.encode(r#"{"alg":"HS256"}"#), B64.encode(format!(r#"{{"exp":{n}}}"#)))
    };
    let mut c = TokenCache::default();
    for n in 1..5000 {
        let raw = raw(n);
        let v = Arc::new(token::parse(&raw).unwrap().into_verified(&[]));
        c.put(1, 7, &raw, &v, 0);
    }
    assert!(c.len() <= 1024, "{}", c.len());
    assert!(c.get(1, 7, &raw(4999)).is_some());
    assert!(c.get(1, 8, &raw(4999)).is_none(), "other keys");
    assert!(c.get(2, 7, &raw(4999)).is_none(), "another provider");
    c.sweep(4998);
    assert_eq!(c.len(), 1);
}

proptest::proptest! {
    #[test]
    fn any_text_is_handled(raw in "[A-Za-z0-9_.=-]{0,60}") {
        let _ = token::parse(&raw);
        let _ = KeySet::parse(&raw);
    }
}
