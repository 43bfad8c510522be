//! Whether the CA does what it is there for: it signs a request like a workload's, and what it signed can be verified.
//!
//! A CA whose process answers may yet be of no use, as with an intermediate that has expired. So it is asked for a
//! certificate again and again, by the same code that workloads ask by, and the answer is looked at as a peer would.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_identity::{PendingSvid, SecretStore, WORKLOAD_SVID, certificate_info, pem_certificates};
use mesh_model::SpiffeId;
use tokio::{sync::watch, task::JoinHandle};

use crate::{Authority, AuthorityError, SYSTEM_NAMESPACE, authority::verify_chain};

/// Account in whose name it is asked; nobody has its key for longer than the question takes.
const ACCOUNT: &str = "ca-probe";
/// What is signed is of no use to anybody.
const TTL: Duration = Duration::from_secs(60);

/// A CA that did what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// Whom the certificate was for.
    pub identity: SpiffeId,
    /// Its serial number, hexadecimal.
    pub serial: String,
    /// Certificates from it to the root, both counted.
    pub certificates: usize,
    /// How long it took.
    pub took: Duration,
}

/// How the last question went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Health {
    /// None was asked yet, or the cluster is in no mesh: there is nothing to sign with, which is no failure.
    #[default]
    Idle,
    /// It signs.
    Signs,
    /// It does not, and why.
    Fails(String),
}

impl Authority {
    /// Asks for a certificate and verifies it.
    ///
    /// # Errors
    /// [`AuthorityError::Empty`] if the cluster is in no mesh; else what the CA cannot do.
    pub fn probe(&self) -> Result<Probed, AuthorityError> {
        let done = self.ask();
        if done.is_err() {
            self.probe_failed();
        }
        done
    }

    fn ask(&self) -> Result<Probed, AuthorityError> {
        let began = Instant::now();
        let status = self.status().ok_or(AuthorityError::Empty)?;
        let identity = SpiffeId::workload(&status.trust_domain, SYSTEM_NAMESPACE, ACCOUNT)
            .map_err(|e| AuthorityError::Refused(e.to_string()))?;
        let pending = PendingSvid::generate(&identity)?;
        let issued = self.issue_probe(&pending.csr_pem, &identity, TTL)?;
        let chain = issued.chain_without_root();
        // Key and certificate belong together.
        SecretStore::new().set_identity(WORKLOAD_SVID, chain.as_bytes(), pending.key_pem.as_bytes())?;
        let certificates = pem_certificates("what was signed", chain.as_bytes())?;
        let roots = pem_certificates("the bundle", status.bundle_pem.as_bytes())?;
        verify_chain(&certificates, &roots)?;
        let info = certificate_info(chain.as_bytes())?;
        // It ends with its intermediate, which may have been while this ran.
        if info.not_after <= SystemTime::now() {
            return Err(AuthorityError::Stored("what was signed is expired".into()));
        }
        if info.spiffe.as_ref() != Some(&identity) {
            return Err(AuthorityError::Stored("what was signed is not what was asked for".into()));
        }
        Ok(Probed {
            identity,
            serial: issued.serial,
            certificates: certificates.len() + 1,
            took: began.elapsed(),
        })
    }
}

/// Asks again and again; the task ends with the authority's last subscriber.
pub(crate) fn follow(
    authority: Arc<Authority>,
    every: Duration,
) -> (watch::Receiver<Health>, JoinHandle<()>) {
    let (tx, rx) = watch::channel(Health::Idle);
    let mut changes = authority.subscribe();
    let task = tokio::spawn(async move {
        loop {
            let asked = Arc::clone(&authority);
            // Signing takes a fraction of a millisecond, verifying as long: not on the threads that serve.
            let health = match tokio::task::spawn_blocking(move || asked.probe()).await {
                Ok(Ok(p)) => {
                    tracing::debug!(serial = %p.serial, took_us = p.took.as_micros(), "the CA signs");
                    Health::Signs
                }
                Ok(Err(AuthorityError::Empty)) => Health::Idle,
                Ok(Err(e)) => Health::Fails(e.to_string()),
                Err(e) => Health::Fails(e.to_string()),
            };
            let before = tx.send_replace(health.clone());
            match (&before, &health) {
                (_, Health::Fails(why)) => tracing::error!(%why, "the CA cannot sign"),
                (Health::Fails(_), _) => tracing::info!("the CA signs again"),
                _ => {}
            }
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    });
    (rx, task)
}

#[cfg(test)]
mod tests {
    use mesh_model::{ClusterId, TrustDomain};

    use super::*;

    fn authority(dir: &tempfile::TempDir) -> Authority {
        Authority::load(ClusterId::new("west").unwrap(), dir.path().into(), Duration::from_secs(3600))
            .unwrap()
    }

    #[test]
    fn what_it_signs_is_verified() {
        let dir = tempfile::tempdir().unwrap();
        let ca = authority(&dir);
        assert!(matches!(ca.probe(), Err(AuthorityError::Empty)));
        ca.found(&TrustDomain::default()).unwrap();
        let p = ca.probe().unwrap();
        assert_eq!(
            (p.identity.as_str(), p.certificates),
            ("spiffe://mesh.local/ns/flotilla-system/sa/ca-probe", 3)
        );
        assert_ne!(ca.probe().unwrap().serial, p.serial);
    }

    /// An intermediate that ends while the process lives.
    #[tokio::test]
    async fn an_expired_intermediate_is_noticed() {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        std::fs::create_dir_all(&ca).unwrap();
        let params = |name: &str, length| {
            let mut p = CertificateParams::default();
            p.distinguished_name.push(rcgen::DnType::CommonName, name);
            p.is_ca = IsCa::Ca(BasicConstraints::Constrained(length));
            p
        };
        let root_key = KeyPair::generate().unwrap();
        let root = params("root", 1).self_signed(&root_key).unwrap().pem();
        let issuer = Issuer::from_ca_cert_pem(&root, root_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut p = params("west", 0);
        p.subject_alt_names = vec![SanType::URI("spiffe://mesh.local/cluster/west".try_into().unwrap())];
        p.not_after = (SystemTime::now() + Duration::from_secs(3)).into();
        let cert = p.signed_by(&key, &issuer).unwrap().pem();
        for (file, content) in [
            ("root-cert.pem", root),
            ("ca-cert.pem", cert.clone()),
            ("cert-chain.pem", cert),
            ("ca-key.pem", key.serialize_pem()),
        ] {
            std::fs::write(ca.join(file), content).unwrap();
        }
        let (mut health, task) = follow(Arc::new(authority(&dir)), Duration::from_millis(100));
        health.wait_for(|h| *h == Health::Signs).await.unwrap();
        let wait = health.wait_for(|h| matches!(h, Health::Fails(_)));
        let failed = tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap().unwrap().clone();
        assert!(matches!(&failed, Health::Fails(why) if why.contains("expired")), "{failed:?}");
        task.abort();
    }
}
