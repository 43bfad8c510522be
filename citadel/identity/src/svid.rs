//! Keys, signing requests, and facts about certificates.

use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::{IdentityError, peer::sans};

/// A key whose certificate is still to be signed.
///
/// The names in the request are a courtesy to readers: the CA issues what the caller proved, not
/// what it asked for.
pub struct PendingSvid {
    /// PKCS #10 request, PEM.
    pub csr_pem: String,
    /// PKCS #8 key, PEM, overwritten when it is dropped. Write it nowhere but to a file of mode 0600.
    pub key_pem: Zeroizing<String>,
}

impl std::fmt::Debug for PendingSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PendingSvid")
    }
}

impl PendingSvid {
    /// Makes an ECDSA P-256 key and a request for `id`.
    ///
    /// # Errors
    /// [`IdentityError::Generate`] if the provider fails.
    pub fn generate(id: &SpiffeId) -> Result<Self, IdentityError> {
        let fail = |e: rcgen::Error| IdentityError::Generate(e.to_string());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(fail)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(fail)?)];
        let csr_pem = params.serialize_request(&key).and_then(|r| r.pem()).map_err(fail)?;
        Ok(Self { csr_pem, key_pem: key.serialize_pem().into() })
    }
}

/// What renewal and status pages need to know of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Its SPIFFE ID, if it has exactly one URI SAN that is one.
    pub spiffe: Option<SpiffeId>,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// DNS SANs.
    pub dns_sans: Vec<String>,
}

/// Reads the first certificate of `pem`.
///
/// # Errors
/// [`IdentityError::Pem`] or [`IdentityError::Certificate`].
pub fn certificate_info(pem: &[u8]) -> Result<CertificateInfo, IdentityError> {
    let certs = pem_certificates("certificate", pem)?;
    let bad = |reason: String| IdentityError::Certificate { what: "certificate".into(), reason };
    // pem_certificates never answers with an empty list.
    let der = certs.first().ok_or_else(|| bad("empty".into()))?;
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| bad(e.to_string()))?;
    let at = |t: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(t.max(0).unsigned_abs());
    let (uris, dns_sans) = sans(&cert);
    let spiffe = match uris.as_slice() {
        [one] => SpiffeId::parse(one).ok(),
        _ => None,
    };
    Ok(CertificateInfo {
        spiffe,
        not_before: at(cert.validity().not_before.timestamp()),
        not_after: at(cert.validity().not_after.timestamp()),
        serial: cert.raw_serial_as_string(),
        dns_sans,
    })
}

/// When a certificate ends; `None` if it cannot be read.
#[must_use]
pub fn not_after(der: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    let seconds = cert.validity().not_after.timestamp();
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs()))
}

/// All certificates of a PEM text, at least one.
///
/// # Errors
/// [`IdentityError::Pem`] naming `what`.
pub fn pem_certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let certs = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| IdentityError::Pem { what: what.to_owned(), reason: e.to_string() })?;
    if certs.is_empty() {
        return Err(IdentityError::Pem { what: what.to_owned(), reason: "holds no certificate".into() });
    }
    Ok(certs)
}

/// SHA-256 of a root certificate's DER, hexadecimal: what join tokens pin.
#[must_use]
pub fn root_pin(root: &CertificateDer<'_>) -> String {
    use std::fmt::Write;
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, root.as_ref()).as_ref().iter().fold(
        String::with_capacity(64),
        |mut s, b| {
            // Writing to a String cannot fail.
            let _ = write!(s, "{b:02x}");
            s
        },
    )
}
