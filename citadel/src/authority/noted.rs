//! What the CA writes to its audit log, and whose key signs that.

use std::{
    sync::PoisonError,
    time::{Duration, Instant, SystemTime},
};

use mesh_identity::{pem_certificates, root_pin};
use mesh_model::SpiffeId;
use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    Active, Authority, AuthorityError,
    sign::{BACKDATE, serial},
    split_pem,
};
use crate::audit::{self, Event, Proof, Signer};

/// A probe that works is written this often.
const PROBED_EVERY: Duration = Duration::from_secs(86_400);

impl Authority {
    /// Writes to the audit log that somebody was refused, if there were not too many of late.
    pub fn refused(&self, identity: &str, proof: Proof, reason: &str) {
        // Without a CA there is nobody to sign it, and nothing to be refused.
        let Ok(active) = self.active() else { return };
        match self.vouch(&active) {
            Ok(()) => self.audit.refused(identity, proof, reason),
            Err(error) => tracing::error!(%error, "a refusal was not written to the audit log"),
        }
    }

    /// How many full files of the audit log stay.
    pub fn keep_audit(&self, files: usize) {
        self.audit.keep(files, self.workload_ttl);
    }

    /// Writes that the CA signs, if it did not before, or a day ago; sees else whether anything can be written.
    pub(super) fn probed(&self, active: &Active, event: Event) -> Result<(), AuthorityError> {
        let now = Instant::now();
        let mut last = self.probed.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|at| now.duration_since(at) < PROBED_EVERY) {
            return Ok(self.audit.writable()?);
        }
        self.audited(active, event)?;
        *last = Some(now);
        Ok(())
    }

    /// The next probe that does not fail is news.
    pub(crate) fn probe_failed(&self) {
        *self.probed.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    #[cfg(test)]
    pub(crate) fn audit(&self) -> &audit::AuditLog {
        &self.audit
    }

    /// Writes what is about to be handed out.
    pub(super) fn audited(&self, active: &Active, event: Event) -> Result<(), AuthorityError> {
        self.vouch(active)?;
        Ok(self.audit.append(event)?)
    }

    /// Certifies a key for the audit log, if the one that it has is not of this intermediate or will not do much longer.
    fn vouch(&self, active: &Active) -> Result<(), AuthorityError> {
        let issuer = &active.status.intermediate;
        if !self.audit.needs_signer(issuer) {
            return Ok(());
        }
        let td = &active.status.trust_domain;
        let id = SpiffeId::workload(td, crate::SYSTEM_NAMESPACE, crate::AUDIT_ACCOUNT)
            .map_err(|e| AuthorityError::Refused(e.to_string()))?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let now = SystemTime::now();
        let not_after = (now + self.workload_ttl).min(active.status.not_after);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = (now - BACKDATE).into();
        params.not_after = not_after.into();
        params.serial_number = Some(serial());
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        // It is nobody's at the other end of a connection.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&key, &active.issuer)?.pem();
        let mut chain = vec![leaf];
        chain.extend(split_pem(&active.status.chain_pem));
        let above = active.roots.iter().position(|r| root_pin(r) == active.status.issuer_pin).unwrap_or(0);
        chain.extend(split_pem(&active.status.bundle_pem).into_iter().nth(above));
        let until = audit::until(not_after.duration_since(now).unwrap_or_default());
        Ok(self.audit.set_signer(Signer { key, chain, issuer: issuer.clone(), until })?)
    }

    /// Writes that this cluster is about to have another intermediate, which it signed itself.
    pub(super) fn own_intermediate(&self, next: &Active, why: &str) -> Result<(), AuthorityError> {
        let chain = pem_certificates("the intermediate", next.status.chain_pem.as_bytes())?;
        let first = chain.first().ok_or(AuthorityError::Empty)?;
        let (_, cert) =
            X509Certificate::from_der(first).map_err(|e| AuthorityError::Stored(e.to_string()))?;
        let event = Event::Intermediate {
            serial: mesh_identity::certificate_info(next.status.chain_pem.as_bytes())?.serial,
            cluster: self.cluster.to_string(),
            proof: Proof::of(why),
            key: audit::sha256(cert.public_key().subject_public_key.data.as_ref()),
            not_after: audit::seconds(next.status.not_after),
        };
        self.audited(next, event)
    }
}
