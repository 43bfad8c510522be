//! A revocation list as it is told, checked: who signed it, and what it says.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_model::{ClusterId, SpiffeId, TrustDomain, federation::RevocationList};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{
    extensions::ParsedExtension,
    prelude::{CertificateRevocationList, FromDer, X509Certificate},
};

use super::{Hash, hash, serial};
use crate::{IdentityError, peer::sans, pem_certificates, root_pin};

/// Longest list, and longest chain of its issuer, bytes of PEM.
pub const MAX_LIST: usize = 256 * 1024;

/// A list whose signature, and whose issuer's, were verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedList {
    pub(super) name: Hash,
    pub(super) key: Hash,
    pub(super) root: bool,
    pub(super) serials: BTreeSet<Box<[u8]>>,
    /// SHA-256 of the issuer's certificate.
    pub issuer: String,
    /// The cluster whose intermediate signed it; `None` for a root.
    pub cluster: Option<ClusterId>,
    /// Orders the lists of an issuer (RFC 5280 section 5.2.3).
    pub number: u64,
    /// By when there should be a newer one.
    pub next_update: SystemTime,
    /// When the issuer ends, and whatever it has signed.
    pub ends: SystemTime,
}

impl SignedList {
    /// Reads a list that was told of a trust domain with these roots.
    ///
    /// # Errors
    /// [`IdentityError`] says what is wrong.
    pub fn read(
        told: &RevocationList,
        roots: &[CertificateDer<'_>],
        domain: &TrustDomain,
    ) -> Result<Self, IdentityError> {
        let bad = |reason: String| IdentityError::Certificate {
            what: format!("revocation list of {domain}"),
            reason,
        };
        if told.list.len() > MAX_LIST || told.issuer.len() > MAX_LIST {
            return Err(bad(format!("is longer than {MAX_LIST} bytes")));
        }
        let chain = pem_certificates("issuer of a revocation list", told.issuer.as_bytes())?;
        let certs = chain
            .iter()
            .map(|der| X509Certificate::from_der(der).map(|(_, c)| c))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| bad(format!("its issuer: {e}")))?;
        let Some(issuer) = certs.first() else { return Err(bad("has no issuer".into())) };
        if !issuer.is_ca() || issuer.key_usage().ok().flatten().is_some_and(|u| !u.value.crl_sign()) {
            return Err(bad("its issuer may not sign one".into()));
        }
        let root = chain.len() == 1 && chain.first().is_some_and(|c| roots.contains(c));
        let mut cluster = None;
        if !root {
            under(&certs, roots).map_err(bad)?;
            let named = match sans(issuer).0.as_slice() {
                [one] => SpiffeId::parse(one).ok(),
                _ => None,
            };
            let named = named.filter(|id| id.trust_domain() == domain.as_str());
            cluster = named.and_then(|id| id.cluster_id());
            if cluster.is_none() {
                return Err(bad("its issuer is neither a root of the domain nor a cluster of it".into()));
            }
        }
        let der = CertificateRevocationListDer::from_pem_slice(told.list.as_bytes())
            .map_err(|_| bad("is no PEM of one".into()))?;
        let (rest, list) =
            CertificateRevocationList::from_der(&der).map_err(|e| bad(format!("cannot be read: {e}")))?;
        if !rest.is_empty() {
            return Err(bad("is followed by something else".into()));
        }
        if list.issuer().as_raw() != issuer.subject().as_raw() {
            return Err(bad("names another issuer".into()));
        }
        list.verify_signature(issuer.public_key()).map_err(|_| bad("its signature is wrong".into()))?;
        // A list of a part of the certificates, or of changes to another list, says so in one that is critical.
        let mut number = None;
        for e in list.extensions() {
            match e.parsed_extension() {
                ParsedExtension::CRLNumber(n) => number = n.to_u64_digits().first().copied().or(Some(0)),
                _ if e.critical => return Err(bad(format!("has a critical extension {}", e.oid))),
                _ => {}
            }
        }
        let number = number.ok_or_else(|| bad("has no number".into()))?;
        let next = list.next_update().ok_or_else(|| bad("does not say when the next one is due".into()))?;
        let at = |t: x509_parser::time::ASN1Time| {
            UNIX_EPOCH + Duration::from_secs(t.timestamp().max(0).unsigned_abs())
        };
        Ok(Self {
            name: hash(issuer.subject().as_raw()),
            key: hash(issuer.public_key().subject_public_key.data.as_ref()),
            root,
            serials: list.iter_revoked_certificates().map(|r| serial(r.raw_serial())).collect(),
            issuer: chain.first().map(|c| root_pin(c)).unwrap_or_default(),
            cluster,
            number,
            next_update: at(next),
            ends: at(issuer.validity().not_after),
        })
    }

    /// How many certificates it names.
    #[must_use]
    pub fn revoked(&self) -> usize {
        self.serials.len()
    }
}

/// Each is signed by the next, the last one by a root.
fn under(chain: &[X509Certificate<'_>], roots: &[CertificateDer<'_>]) -> Result<(), String> {
    let signed = |cert: &X509Certificate<'_>, by: &X509Certificate<'_>| {
        by.is_ca()
            && by.subject().as_raw() == cert.issuer().as_raw()
            && cert.verify_signature(Some(by.public_key())).is_ok()
    };
    let last = chain.len() - 1;
    let whole = chain.windows(2).all(|w| signed(&w[0], &w[1]));
    let rooted =
        roots.iter().any(|r| X509Certificate::from_der(r).is_ok_and(|(_, root)| signed(&chain[last], &root)));
    if whole && rooted { Ok(()) } else { Err("its issuer is not under a root of the domain".into()) }
}
