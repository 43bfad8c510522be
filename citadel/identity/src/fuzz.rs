//! What the fuzz targets of `e2e/fuzz` run. It is not part of the product.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_model::{TrustDomain, federation::RevocationList};
use rustls_pki_types::CertificateDer;

use crate::{
    TrustBundle, certificate_info, not_after, peer_identity, pem_certificates, revocation::SignedList,
};

/// A SPIFFE bundle: any text is refused, or is read as what it says.
pub fn bundle(data: &[u8]) {
    let (Ok(text), Ok(domain)) = (std::str::from_utf8(data), TrustDomain::new("b.example")) else { return };
    if let Ok(b) = TrustBundle::parse(domain.clone(), text) {
        let again = TrustBundle::parse(domain, &b.document());
        assert!(again.is_ok_and(|again| again == b));
        let _ = (b.pem(), b.ends(), b.shares_root(&b));
    }
}

fn pem(kind: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|l| std::str::from_utf8(l).ok()).collect();
    format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
}

/// A chain: each certificate behind two bytes of its length. Who shows it is who its leaf names, in the cluster that its
/// second names, and both libraries that read certificates here read the same.
pub fn certificates(data: &[u8]) {
    let (mut chain, mut rest) = (Vec::new(), data);
    while let Some((length, next)) = rest.split_first_chunk::<2>() {
        let (der, next) = next.split_at(usize::from(u16::from_be_bytes(*length)).min(next.len()));
        chain.push(CertificateDer::from(der.to_vec()));
        rest = next;
    }
    let text: String = chain.iter().map(|c| pem("CERTIFICATE", c)).collect();
    let info = certificate_info(text.as_bytes());
    let identity = peer_identity(&chain);
    assert_eq!(info.is_ok(), identity.is_some());
    if let (Ok(info), Some(identity)) = (info, identity) {
        assert_eq!(info.spiffe, identity.spiffe);
        assert_eq!(info.dns_sans, identity.dns_sans);
        assert_eq!(not_after(&chain[0]), Some(info.not_after));
        if let Some(id) = &identity.spiffe {
            assert_eq!(identity.uri_sans, [id.as_str()]);
            if let Ok(end) = webpki::EndEntityCert::try_from(&chain[0]) {
                // webpki knows no lists of URIs; that it reads the certificate at all must not depend on us.
                let _ = end.valid_dns_names().count();
            }
        }
        assert!(identity.cluster.is_none() || chain.len() > 1);
    }
    assert_eq!(pem_certificates("chain", text.as_bytes()).map_or(0, |c| c.len()), chain.len());
    let _ = pem_certificates("chain", data);
}

/// A revocation list in DER behind its issuer, each behind two bytes of length: nobody's list counts, but for those of
/// the root that is trusted.
pub fn revocation(data: &[u8]) {
    let part = |data: &[u8]| -> Option<(Vec<u8>, Vec<u8>)> {
        let (length, rest) = data.split_first_chunk::<2>()?;
        let (a, b) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        Some((a.to_vec(), b.to_vec()))
    };
    let Some((issuer, list)) = part(data) else { return };
    let domain = TrustDomain::new("mesh.local").expect("a domain");
    let told = RevocationList { issuer: pem("CERTIFICATE", &issuer), list: pem("X509 CRL", &list) };
    assert!(SignedList::read(&told, &[], &domain).is_err(), "nobody is trusted");
    // With its own issuer as the root it is as good as its signature.
    let root = CertificateDer::from(issuer);
    if let Ok(read) = SignedList::read(&told, std::slice::from_ref(&root), &domain) {
        assert!(read.revoked() <= list.len());
        let mut damaged = told.clone();
        let mut der = list.clone();
        if let Some(last) = der.last_mut() {
            *last ^= 1;
        }
        damaged.list = pem("X509 CRL", &der);
        assert!(SignedList::read(&damaged, &[root], &domain).is_err(), "its signature is another");
    }
}

#[cfg(test)]
#[path = "../../../e2e/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::{replay::corpus, *};

    #[test]
    fn corpora() {
        corpus("bundle", bundle);
        corpus("certificates", certificates);
        corpus("revocation", revocation);
    }
}
