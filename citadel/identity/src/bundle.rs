//! Trust bundles in the form that SPIFFE gives them (SPIFFE Trust Domain and Bundle, sections 4 and 5).
//!
//! A bundle is a JWK set; each root is a key of `use: x509-svid` with the certificate, alone, in `x5c`. The document does
//! not say of which trust domain it is: that comes from whoever was asked for it.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use mesh_model::{SpiffeId, TrustDomain};
use rustls_pki_types::CertificateDer;
use serde_json::{Map, Value, json};
use x509_parser::{
    prelude::{FromDer, X509Certificate},
    public_key::PublicKey,
};

use crate::{IdentityError, peer::sans, pem_certificates, root_pin};

/// Longest document that is read, bytes.
pub const MAX_DOCUMENT: usize = 64 * 1024;
/// Roots of one trust domain.
const MAX_ROOTS: usize = 16;
const X509: &str = "x509-svid";

/// The roots of one trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    /// Whose roots these are.
    pub trust_domain: TrustDomain,
    /// At least one.
    pub roots: Vec<CertificateDer<'static>>,
    /// `spiffe_sequence`: rises with every change; 0 is not told.
    pub sequence: u64,
    /// `spiffe_refresh_hint`: how often whoever relies on it should ask again.
    pub refresh_hint: Option<Duration>,
}

impl TrustBundle {
    /// From roots in PEM.
    ///
    /// # Errors
    /// If they cannot be read, or are no roots.
    pub fn from_pem(
        trust_domain: TrustDomain,
        pem: &[u8],
        sequence: u64,
        refresh_hint: Option<Duration>,
    ) -> Result<Self, IdentityError> {
        let roots = pem_certificates(&what(&trust_domain), pem)?;
        Self::checked(trust_domain, roots, sequence, refresh_hint)
    }

    fn checked(
        trust_domain: TrustDomain,
        roots: Vec<CertificateDer<'static>>,
        sequence: u64,
        refresh_hint: Option<Duration>,
    ) -> Result<Self, IdentityError> {
        let bad = |reason: String| IdentityError::Certificate { what: what(&trust_domain), reason };
        let mut seen = BTreeSet::new();
        let roots: Vec<_> = roots.into_iter().filter(|r| seen.insert(r.to_vec())).collect();
        if roots.is_empty() || roots.len() > MAX_ROOTS {
            return Err(bad(format!("holds {} roots (1 to {MAX_ROOTS})", roots.len())));
        }
        for der in &roots {
            let (rest, cert) =
                X509Certificate::from_der(der).map_err(|e| bad(format!("a root is unreadable: {e}")))?;
            if !rest.is_empty() || !cert.is_ca() {
                return Err(bad("a certificate in it is no CA".into()));
            }
            // X509-SVID section 3.1: a signing certificate may name its trust domain, and then that one.
            for uri in sans(&cert).0 {
                if SpiffeId::parse(&uri).is_ok_and(|id| id.trust_domain() != trust_domain.as_str()) {
                    return Err(bad(format!("a root in it says that it is of {uri}")));
                }
            }
            webpki::anchor_from_trusted_cert(der).map_err(|e| bad(format!("a root cannot be used: {e}")))?;
        }
        Ok(Self { trust_domain, roots, sequence, refresh_hint })
    }

    /// Reads a document that was told to be of `trust_domain`. Keys of other uses are left alone, as the specification
    /// asks for; a key of ours that is wrong is an error, since a bundle that lacks a root is another bundle.
    ///
    /// # Errors
    /// [`IdentityError`] says what is wrong.
    pub fn parse(trust_domain: TrustDomain, document: &str) -> Result<Self, IdentityError> {
        let bad = |reason: String| IdentityError::Pem { what: what(&trust_domain), reason };
        if document.len() > MAX_DOCUMENT {
            return Err(bad(format!("is longer than {MAX_DOCUMENT} bytes")));
        }
        let document: Value = serde_json::from_str(document).map_err(|e| bad(format!("is no JSON: {e}")))?;
        let keys = document.get("keys").and_then(Value::as_array).ok_or_else(|| bad("has no keys".into()))?;
        let mut roots = Vec::new();
        for key in keys.iter().filter(|k| k.get("use").and_then(Value::as_str) == Some(X509)) {
            if key.get("kty").and_then(Value::as_str).is_none() {
                return Err(bad("has a key without kty".into()));
            }
            let chain = key.get("x5c").and_then(Value::as_array).map(Vec::as_slice);
            let Some([Value::String(one)]) = chain else {
                return Err(bad("has a root whose x5c is not exactly one certificate".into()));
            };
            let der = STANDARD.decode(one).map_err(|_| bad("has a root that is not base64".into()))?;
            roots.push(CertificateDer::from(der));
        }
        let number = |name: &str| match document.get(name) {
            None => Ok(None),
            Some(v) => v.as_u64().map(Some).ok_or_else(|| bad(format!("{name} is not a number"))),
        };
        let sequence = number("spiffe_sequence")?.unwrap_or(0);
        let hint = number("spiffe_refresh_hint")?.map(Duration::from_secs);
        Self::checked(trust_domain, roots, sequence, hint)
    }

    /// The document.
    #[must_use]
    pub fn document(&self) -> String {
        let mut out = Map::new();
        out.insert("keys".into(), self.roots.iter().map(|r| jwk(r)).collect());
        if self.sequence > 0 {
            out.insert("spiffe_sequence".into(), self.sequence.into());
        }
        if let Some(hint) = self.refresh_hint {
            out.insert("spiffe_refresh_hint".into(), hint.as_secs().into());
        }
        Value::Object(out).to_string()
    }

    /// The roots in PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.roots.iter().map(|r| certificate_pem(r)).collect()
    }

    /// Whether a root has this SHA-256.
    #[must_use]
    pub fn has_pin(&self, pin: &str) -> bool {
        self.roots.iter().any(|r| root_pin(r).eq_ignore_ascii_case(pin))
    }

    /// Whether both have a root, by its key: a certificate can be made anew for one that somebody else holds.
    #[must_use]
    pub fn shares_root(&self, other: &Self) -> bool {
        let keys: BTreeSet<_> = self.roots.iter().filter_map(|r| public_key(r)).collect();
        other.roots.iter().filter_map(|r| public_key(r)).any(|k| keys.contains(&k))
    }

    /// When the last root ends, seconds since the epoch.
    #[must_use]
    pub fn ends(&self) -> u64 {
        self.roots.iter().filter_map(|r| ends(r)).max().unwrap_or(0)
    }
}

fn what(trust_domain: &TrustDomain) -> String {
    format!("the trust bundle of {trust_domain}")
}

fn public_key(der: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    Some(cert.public_key().raw.to_vec())
}

/// End of a certificate's validity, seconds since the epoch.
pub(crate) fn ends(der: &CertificateDer<'_>) -> Option<u64> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    Some(cert.validity().not_after.timestamp().max(0).unsigned_abs())
}

/// A root as a key. RFC 7517 wants its type, and its parameters besides (RFC 7518 section 6); whoever reads a bundle
/// takes the certificate.
fn jwk(root: &CertificateDer<'_>) -> Value {
    let mut key = json!({"use": X509, "kty": "OKP", "x5c": [STANDARD.encode(root)]});
    // Every root was read when the bundle was made.
    let Ok((_, cert)) = X509Certificate::from_der(root) else { return key };
    let b64 = |bytes: &[u8]| Value::String(URL_SAFE_NO_PAD.encode(bytes));
    match cert.public_key().parsed() {
        Ok(PublicKey::EC(point)) => {
            let (data, half) = (point.data(), point.data().len() / 2);
            // Uncompressed: 4, x, y.
            if data.first() == Some(&4) && data.len() % 2 == 1 {
                key["kty"] = "EC".into();
                key["crv"] = match half {
                    32 => "P-256",
                    48 => "P-384",
                    _ => "P-521",
                }
                .into();
                key["x"] = b64(&data[1..=half]);
                key["y"] = b64(&data[half + 1..]);
            }
        }
        Ok(PublicKey::RSA(rsa)) => {
            let number = |n: &[u8]| b64(&n[n.iter().take_while(|b| **b == 0).count()..]);
            key["kty"] = "RSA".into();
            key["n"] = number(rsa.modulus);
            key["e"] = number(rsa.exponent);
        }
        _ => {
            key["crv"] = "Ed25519".into();
            key["x"] = b64(&cert.public_key().subject_public_key.data);
        }
    }
    key
}

/// A certificate as PEM.
#[must_use]
pub fn certificate_pem(der: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(der);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        // Base64 is ASCII, and writing to a String cannot fail.
        let _ = writeln!(out, "{}", String::from_utf8_lossy(line));
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType};

    use super::*;

    fn domain(s: &str) -> TrustDomain {
        TrustDomain::new(s).unwrap()
    }

    fn root(uri: Option<&str>, ca: bool) -> String {
        let mut p = CertificateParams::default();
        if ca {
            p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        p.subject_alt_names = uri.into_iter().map(|u| SanType::URI(u.try_into().unwrap())).collect();
        p.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
    }

    fn bundle(pem: &str) -> Result<TrustBundle, IdentityError> {
        TrustBundle::from_pem(domain("b.example"), pem.as_bytes(), 7, Some(Duration::from_secs(300)))
    }

    /// The form of the specification's section 4.2, field by field.
    #[test]
    fn the_document_is_that_of_spiffe() {
        let b = bundle(&(root(None, true) + &root(Some("spiffe://b.example"), true))).unwrap();
        let v: Value = serde_json::from_str(&b.document()).unwrap();
        assert_eq!((&v["spiffe_sequence"], &v["spiffe_refresh_hint"]), (&json!(7), &json!(300)));
        let keys = v["keys"].as_array().unwrap();
        assert_eq!(keys.len(), 2);
        for (key, root) in keys.iter().zip(&b.roots) {
            assert_eq!(
                (&key["use"], &key["kty"], &key["crv"]),
                (&json!("x509-svid"), &json!("EC"), &json!("P-256"))
            );
            assert_eq!(key["x5c"], json!([STANDARD.encode(root)]));
            // The point is that of the certificate (RFC 7518 section 6.2.1).
            let mut point = vec![4];
            point.extend(URL_SAFE_NO_PAD.decode(key["x"].as_str().unwrap()).unwrap());
            point.extend(URL_SAFE_NO_PAD.decode(key["y"].as_str().unwrap()).unwrap());
            let (_, cert) = X509Certificate::from_der(root).unwrap();
            assert_eq!(point, cert.public_key().subject_public_key.data.as_ref());
            assert!(key.get("kid").is_none(), "a kid is for keys of tokens");
        }
        assert_eq!(TrustBundle::parse(domain("b.example"), &b.document()).unwrap(), b);
        assert_eq!(bundle(&b.pem()).unwrap(), b);
        assert!(b.has_pin(&root_pin(&b.roots[1])) && !b.has_pin(&"0".repeat(64)));
    }

    #[test]
    fn keys_of_other_uses_are_left_alone_and_fields_may_be_absent() {
        let b = bundle(&root(None, true)).unwrap();
        let mut v: Value = serde_json::from_str(&b.document()).unwrap();
        let jwt = json!({"use": "jwt-svid", "kty": "EC", "crv": "P-256", "kid": "x", "x": "AA", "y": "AA"});
        v["keys"].as_array_mut().unwrap().push(jwt);
        v["keys"].as_array_mut().unwrap().push(json!({"use": "of-tomorrow"}));
        v.as_object_mut().unwrap().remove("spiffe_sequence");
        v.as_object_mut().unwrap().remove("spiffe_refresh_hint");
        let read = TrustBundle::parse(domain("b.example"), &v.to_string()).unwrap();
        assert_eq!((&read.roots, read.sequence, read.refresh_hint), (&b.roots, 0, None));
    }

    #[test]
    fn what_is_no_bundle_is_refused() {
        let b = bundle(&root(None, true)).unwrap();
        let with = |f: fn(&mut Value)| {
            let mut v: Value = serde_json::from_str(&b.document()).unwrap();
            f(&mut v);
            TrustBundle::parse(domain("b.example"), &v.to_string())
        };
        assert!(with(|_| {}).is_ok());
        assert!(with(|v| v["keys"] = json!([])).is_err(), "no root");
        assert!(with(|v| v["keys"][0]["use"] = json!("jwt-svid")).is_err(), "no root of this use");
        assert!(with(|v| v["keys"] = json!({})).is_err());
        assert!(with(|v| v["spiffe_sequence"] = json!(-1)).is_err());
        assert!(with(|v| v["spiffe_refresh_hint"] = json!("soon")).is_err());
        assert!(with(|v| drop(v["keys"][0].as_object_mut().unwrap().remove("kty"))).is_err());
        assert!(with(|v| v["keys"][0]["x5c"] = json!(["!"])).is_err());
        assert!(with(|v| v["keys"][0]["x5c"] = json!([])).is_err());
        assert!(
            with(|v| {
                let c = v["keys"][0]["x5c"][0].clone();
                v["keys"][0]["x5c"].as_array_mut().unwrap().push(c);
            })
            .is_err(),
            "a chain instead of a root"
        );
        assert!(TrustBundle::parse(domain("b.example"), &" ".repeat(MAX_DOCUMENT + 1)).is_err());
        assert!(TrustBundle::parse(domain("b.example"), "[]").is_err());
        assert!(bundle(&root(None, false)).is_err(), "a leaf is no root");
        let other = bundle(&root(Some("spiffe://a.example"), true)).unwrap_err();
        assert!(other.to_string().contains("spiffe://a.example"), "{other}");
        let many: String = (0..=MAX_ROOTS).map(|_| root(None, true)).collect();
        assert!(bundle(&many).is_err());
    }

    #[test]
    fn a_root_is_shared_by_its_key() {
        let key = KeyPair::generate().unwrap();
        let made = |name: &str| {
            let mut p = CertificateParams::default();
            p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            p.distinguished_name.push(rcgen::DnType::CommonName, name);
            bundle(&p.self_signed(&key).unwrap().pem()).unwrap()
        };
        assert!(made("one").shares_root(&made("two")));
        assert!(!made("one").shares_root(&bundle(&root(None, true)).unwrap()));
    }

    /// The corpus of the fuzz target; the name says whether it is a bundle.
    #[test]
    fn the_corpus_is_what_it_is_called() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../e2e/fuzz/corpus/bundle");
        let (mut good, mut bad) = (0, 0);
        for file in std::fs::read_dir(dir).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            let text = std::fs::read(file.path()).unwrap();
            let read = match std::str::from_utf8(&text) {
                Ok(text) => TrustBundle::parse(domain("b.example"), text).ok(),
                Err(_) => None,
            };
            if name.starts_with("ok-") {
                let b = read.unwrap_or_else(|| panic!("{name} is refused"));
                assert_eq!(TrustBundle::parse(domain("b.example"), &b.document()).unwrap(), b, "{name}");
                good += 1;
            } else if name.starts_with("bad-") {
                assert!(read.is_none(), "{name} is read");
                bad += 1;
            } else if let Some(b) = read {
                // What the fuzzer found.
                assert_eq!(TrustBundle::parse(domain("b.example"), &b.document()).unwrap(), b, "{name}");
            }
        }
        assert!(good >= 6 && bad >= 20, "{good} and {bad}");
    }

    /// What is read is another's: no change of it does more than be refused, or be read as what it says.
    #[test]
    fn any_bytes_are_handled() {
        let good = bundle(&root(Some("spiffe://b.example"), true)).unwrap();
        let document = good.document();
        let holds = |text: &str| {
            if let Ok(b) = TrustBundle::parse(domain("b.example"), text) {
                assert_eq!(TrustBundle::parse(domain("b.example"), &b.document()).unwrap(), b, "{text}");
                let _ = (b.pem(), b.ends(), b.shares_root(&good));
            }
        };
        for at in 0..document.len() {
            holds(&document[..at]);
            for with in ["\"", "}", "9", "\u{0}", "\u{20ac}"] {
                holds(&format!("{}{with}{}", &document[..at], &document[at + 1..]));
            }
        }
        // And of the certificate itself, which is base64 in it.
        let der = good.roots[0].to_vec();
        let before = STANDARD.encode(&der);
        for at in 0..der.len() {
            for with in [0, 0x7f, 0x80, 0xff, der[at] ^ 1] {
                let mut other = der.clone();
                other[at] = with;
                holds(&document.replace(&before, &STANDARD.encode(&other)));
            }
            holds(&document.replace(&before, &STANDARD.encode(&der[..at])));
        }
    }
}
