//! Who is at the other end of a connection.

use mesh_model::{ClusterId, SpiffeId};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::CertificateIds;

/// Identity of a TLS peer, read from a chain that the handshake has verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Its SPIFFE ID, if the leaf has exactly one URI SAN and that is one (X509-SVID section 2).
    pub spiffe: Option<SpiffeId>,
    /// Its cluster: the SPIFFE ID of the intermediate that signed the leaf.
    pub cluster: Option<ClusterId>,
    /// URI SANs of the leaf.
    pub uri_sans: Vec<String>,
    /// DNS SANs of the leaf.
    pub dns_sans: Vec<String>,
    /// Subject of the leaf, RFC 4514 form.
    pub subject: String,
    /// SHA-256 of the leaf's DER.
    pub leaf_sha256: [u8; 32],
    /// By what revocation lists tell its certificates.
    pub ids: CertificateIds,
}

/// Reads the identity from a verified chain, leaf first.
///
/// The cluster is taken from the second certificate only. For chains under the mesh's trust bundle
/// the verifier of this crate has made sure that this is the leaf's issuer, so a peer cannot claim
/// another cluster by appending its intermediate.
#[must_use]
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Option<PeerIdentity> {
    let leaf_der = certs.first()?;
    let (_, leaf) = X509Certificate::from_der(leaf_der).ok()?;
    let (uri_sans, dns_sans) = sans(&leaf);
    let spiffe = match uri_sans.as_slice() {
        [one] => SpiffeId::parse(one).ok(),
        _ => None,
    };
    let cluster = certs.get(1).and_then(|der| cluster_of_issuer(der));
    let mut leaf_sha256 = [0; 32];
    leaf_sha256
        .copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, leaf_der.as_ref()).as_ref());
    Some(PeerIdentity {
        spiffe,
        cluster,
        uri_sans,
        dns_sans,
        subject: leaf.subject().to_string(),
        leaf_sha256,
        ids: CertificateIds::of(certs),
    })
}

/// `(URI SANs, DNS SANs)` of a certificate.
pub(crate) fn sans(cert: &X509Certificate<'_>) -> (Vec<String>, Vec<String>) {
    let (mut uris, mut names) = (Vec::new(), Vec::new());
    if let Ok(Some(ext)) = cert.subject_alternative_name() {
        for name in &ext.value.general_names {
            match name {
                GeneralName::URI(u) => uris.push((*u).to_owned()),
                GeneralName::DNSName(d) => names.push((*d).to_owned()),
                _ => {}
            }
        }
    }
    (uris, names)
}

/// The cluster that an intermediate certificate speaks for.
pub(crate) fn cluster_of_issuer(der: &CertificateDer<'_>) -> Option<ClusterId> {
    issuer_spiffe(der)?.cluster_id()
}

/// The SPIFFE ID of an intermediate certificate.
pub(crate) fn issuer_spiffe(der: &CertificateDer<'_>) -> Option<SpiffeId> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    match sans(&cert).0.as_slice() {
        [one] => SpiffeId::parse(one).ok(),
        _ => None,
    }
}
