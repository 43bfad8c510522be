//! Signing requests: what is taken from them is a public key, nothing else.

use rcgen::{CertificateSigningRequestParams, PublicKeyData};
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use x509_parser::prelude::{FromDer as _, X509CertificationRequest};

use crate::AuthorityError;

/// Larger requests are refused unread.
const MAX_CSR: usize = 16 * 1024;

/// Parses a PEM request and checks its signature (proof of possession).
pub(crate) fn parse(pem: &str) -> Result<CertificateSigningRequestParams, AuthorityError> {
    let bad = |reason: &str| AuthorityError::BadRequest(format!("signing request: {reason}"));
    if pem.len() > MAX_CSR {
        return Err(bad("larger than 16 KiB"));
    }
    let der =
        CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|e| bad(&e.to_string()))?;
    // Nobody has signed what is behind it.
    if X509CertificationRequest::from_der(&der).is_ok_and(|(rest, _)| !rest.is_empty()) {
        return Err(bad("more than one, or something behind it"));
    }
    let csr = CertificateSigningRequestParams::from_der(&der).map_err(|e| bad(&e.to_string()))?;
    // An RSA modulus under 2048 bits shows in the size of the encoded key: 270 bytes is a
    // SubjectPublicKey of RSA 2048, and rcgen accepts nothing but RSA, ECDSA and Ed25519.
    let rsa = csr.public_key.der_bytes().len() > 140 || csr.public_key.algorithm() == &rcgen::PKCS_RSA_SHA256;
    if rsa && csr.public_key.der_bytes().len() < 268 {
        return Err(bad("an RSA key of less than 2048 bits"));
    }
    Ok(csr)
}
