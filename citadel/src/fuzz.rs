//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use std::sync::LazyLock;

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use rcgen::PublicKeyData as _;

use crate::{
    announcement::Announcement,
    csr, kubernetes,
    token::{TokenIssuer, generate_key},
};

/// A signing request, in DER and as PEM: what is taken of it is a key whose holder has signed it.
pub fn csr(data: &[u8]) {
    let text = STANDARD.encode(data);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|l| std::str::from_utf8(l).ok()).collect();
    let kind = "CERTIFICATE REQUEST";
    let pem = format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"));
    if let Ok(read) = csr::parse(&pem) {
        assert!(!read.public_key.der_bytes().is_empty());
        // A request whose signature is another is none.
        let mut other = data.to_vec();
        if let Some(last) = other.last_mut() {
            *last ^= 1;
        }
        let text = STANDARD.encode(other);
        let pem = format!("-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n");
        assert!(csr::parse(&pem).is_err());
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = csr::parse(text);
    }
}

static ISSUER: LazyLock<TokenIssuer> =
    LazyLock::new(|| TokenIssuer::new("west", &generate_key().expect("a key")).expect("an issuer"));

/// Tokens of workloads, answers of API servers and of issuers, and announcements of roots: none of a stranger's proves
/// anything.
pub fn proofs(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (header, claims) = text.split_once('\n').unwrap_or((text, text));
    let built = format!("{}.{}.AAAA", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    for token in [text, built.as_str()] {
        assert!(ISSUER.verify(token).is_err());
        let _ = kubernetes::claimed_issuer(token);
    }
    if let Ok((namespace, name)) = kubernetes::account(text) {
        assert_eq!(format!("system:serviceaccount:{namespace}:{name}"), text);
    }
    kubernetes::fuzz_review(data);
    if let Ok(url) = kubernetes::Url::parse(text) {
        assert_eq!(url.to_string(), text);
    }
    if let Ok(a) = Announcement::parse(text) {
        assert_eq!(Announcement::parse(&a.text()).expect("what we write"), a);
    }
}

#[cfg(test)]
#[path = "../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("csr", csr);
        corpus("proofs", proofs);
    }
}
