//! The CA proper: what it holds, founding and joining. What it signs is in `sign`.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use mesh_identity::{IdentityError, TrustBundle, pem_certificates, root_pin};
use mesh_model::{ClusterId, SpiffeId, TrustDomain, federation::RevocationList};
use rcgen::{CertificateParams, DistinguishedName, DnType, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    announcement::Announcement,
    audit::AuditLog,
    revocation::{Records, Revoked},
    rotation::Phase,
    store::{CaDir, CaFiles, JOIN, Secret},
    token::{self, TokenIssuer},
};

mod noted;
mod renew;
mod revoke;
mod rotate;
mod sign;

use revoke::Revocation;
pub use rotate::Rotated;
use sign::{new_intermediate, new_root};

/// Why the CA did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The cluster is in no mesh yet.
    #[error("this cluster is in no mesh: found one, or join one with a token")]
    Empty,
    /// The cluster is in a mesh already.
    #[error("this cluster is already in mesh {0}: leave it first")]
    Active(TrustDomain),
    /// The root key is elsewhere.
    #[error("the root key is not here: ask the cluster that founded the mesh")]
    NoRootKey,
    /// The request cannot be understood.
    #[error("{0}")]
    BadRequest(String),
    /// The caller did not prove who it is.
    #[error("{0}")]
    Unauthenticated(String),
    /// Who vouches for the caller cannot be asked: it may try again.
    #[error("{0}")]
    Unavailable(String),
    /// The caller proved something else than it asks for.
    #[error("{0}")]
    Refused(String),
    /// Stored files that cannot be used.
    #[error("stored CA: {0}")]
    Stored(String),
    /// The state directory cannot be read or written.
    #[error("state directory: {0}")]
    Io(#[from] std::io::Error),
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Signing failed.
    #[error("signing: {0}")]
    Sign(#[from] rcgen::Error),
}

/// A signed certificate.
#[derive(Debug, Clone)]
pub struct Issued {
    /// PEM, leaf first, root last.
    pub chain: Vec<String>,
    /// End of validity.
    pub not_after: SystemTime,
    /// Serial number, hexadecimal.
    pub serial: String,
}

impl Issued {
    /// What a TLS peer sends: everything but the root.
    #[must_use]
    pub fn chain_without_root(&self) -> String {
        self.chain[..self.chain.len().saturating_sub(1)].concat()
    }
}

/// Public facts about an active CA.
#[derive(Debug, Clone)]
pub struct AuthorityStatus {
    /// The mesh.
    pub trust_domain: TrustDomain,
    /// Trusted roots, PEM.
    pub bundle_pem: String,
    /// The intermediate and what lies between it and the root, PEM.
    pub chain_pem: String,
    /// End of the intermediate's validity.
    pub not_after: SystemTime,
    /// Whether this cluster can sign intermediates.
    pub holds_root_key: bool,
    /// SHA-256 of the root, hexadecimal.
    pub root_pin: String,
    /// Number of the bundle; it rises whenever the roots are others than before, as after `root-cert.pem` was changed and
    /// the control plane started again.
    pub bundle_sequence: u64,
    /// How far the rotation of the root is, as its holder announced.
    pub phase: Phase,
    /// The bundle as the holder of the root key announced it; empty if it has not yet.
    pub announcement: String,
    /// SHA-256 of the root above the intermediate.
    pub issuer_pin: String,
    /// SHA-256 of the intermediate.
    pub intermediate: String,
    /// Start of the intermediate's validity.
    pub not_before: SystemTime,
    /// Revocation lists of each authority whose key is or was here.
    pub lists: Vec<RevocationList>,
    /// What is on them.
    pub revoked: Vec<Revoked>,
}

/// The CA of one cluster.
pub struct Authority {
    cluster: ClusterId,
    dir: CaDir,
    workload_ttl: Duration,
    tokens: TokenIssuer,
    audit: AuditLog,
    active: Mutex<Option<Arc<Active>>>,
    revocation: Mutex<Revocation>,
    /// When it was last written that a probe went well.
    probed: Mutex<Option<Instant>>,
    /// Held while the stored CA is replaced: one change after the other.
    changing: Mutex<()>,
    changes: watch::Sender<u64>,
}

struct Active {
    status: AuthorityStatus,
    files: CaFiles,
    roots: Vec<CertificateDer<'static>>,
    announcement: Option<Announcement>,
    issuer: Issuer<'static, KeyPair>,
    root: Option<RootKey>,
}

/// The first root and its key.
struct RootKey {
    issuer: Issuer<'static, KeyPair>,
    /// Nothing that it signs is valid for longer.
    not_after: SystemTime,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

impl Authority {
    /// Loads what the state directory holds.
    ///
    /// # Errors
    /// If it holds something that is not a usable CA of this cluster.
    pub fn load(
        cluster: ClusterId,
        state_dir: PathBuf,
        workload_ttl: Duration,
    ) -> Result<Self, AuthorityError> {
        let dir = CaDir::new(&state_dir);
        let key = match dir.token_key()? {
            Some(k) => k,
            None => {
                let k = Secret::from(token::generate_key()?);
                dir.save_token_key(&k)?;
                k
            }
        };
        let tokens = TokenIssuer::new(cluster.as_str(), &key)?;
        let active = match dir.load()? {
            None => None,
            Some(files) => Some(Arc::new(Active::check(&files, &cluster)?.numbered(&dir)?)),
        };
        let records = dir.revoked()?;
        let ca = Self {
            cluster,
            dir,
            workload_ttl,
            tokens,
            audit: AuditLog::open(&state_dir)?,
            revocation: Mutex::new(Revocation::new(records)),
            probed: Mutex::default(),
            active: Mutex::new(active),
            changing: Mutex::default(),
            changes: watch::Sender::new(0),
        };
        match ca.refresh_lists() {
            Ok(_) | Err(AuthorityError::Empty) => Ok(ca),
            Err(e) => Err(e),
        }
    }

    /// Wakes when the CA becomes active, is replaced or reset.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The cluster it signs for.
    #[must_use]
    pub fn cluster(&self) -> &ClusterId {
        &self.cluster
    }

    /// For how long certificates of workloads are valid.
    pub(crate) fn workload_ttl(&self) -> Duration {
        self.workload_ttl
    }

    /// Workload tokens of this cluster.
    #[must_use]
    pub fn tokens(&self) -> &TokenIssuer {
        &self.tokens
    }

    /// Public facts, if the cluster is in a mesh.
    #[must_use]
    pub fn status(&self) -> Option<AuthorityStatus> {
        let mut status = self.lock().as_ref().map(|a| a.status.clone())?;
        let revocation = self.revocation();
        status.lists.clone_from(&revocation.lists);
        status.revoked.clone_from(&revocation.records.revoked);
        Some(status)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Active>>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn active(&self) -> Result<Arc<Active>, AuthorityError> {
        self.lock().clone().ok_or(AuthorityError::Empty)
    }

    fn alone(&self) -> std::sync::MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `own` says why, if this cluster has signed its own intermediate, which has to be in the audit log first.
    fn install(&self, files: &CaFiles, own: Option<&str>) -> Result<AuthorityStatus, AuthorityError> {
        let active = Active::check(files, &self.cluster)?;
        if let Some(why) = own {
            self.own_intermediate(&active, why)?;
        }
        let before = self.lock().clone();
        let records = match before.filter(|b| b.status.intermediate != active.status.intermediate) {
            Some(old) => self.succeed(&old)?,
            None => self.revocation().records.clone(),
        };
        self.dir.save(files)?;
        let active = Arc::new(active.numbered(&self.dir)?);
        let status = active.status.clone();
        *self.lock() = Some(active.clone());
        if let Err(error) = self.sign_lists(&active, &mut self.revocation(), records) {
            // What it has is in use; the lists are tried again.
            tracing::error!(%error, "no revocation lists under the new intermediate yet");
        }
        self.changes.send_modify(|n| *n += 1);
        Ok(status)
    }

    /// Founds a mesh: a root and this cluster's intermediate.
    ///
    /// # Errors
    /// [`AuthorityError::Active`] if the cluster is in a mesh.
    pub fn found(&self, trust_domain: &TrustDomain) -> Result<AuthorityStatus, AuthorityError> {
        let _alone = self.alone();
        if let Some(a) = self.lock().as_ref() {
            return Err(AuthorityError::Active(a.status.trust_domain.clone()));
        }
        let (root_cert, root_key) = new_root(trust_domain)?;
        let root = RootKey::new(&root_cert, &root_key)?;
        let (cert, key) = new_intermediate(trust_domain, &self.cluster, &root)?;
        let files = CaFiles {
            root_cert,
            root_key: Some(root_key),
            cert_chain: cert.clone(),
            ca_cert: cert,
            ca_key: key,
            ..CaFiles::default()
        };
        let status = self.install(&files, Some("found"))?;
        tracing::info!(%trust_domain, cluster = %self.cluster, pin = %status.root_pin, "founded a mesh");
        Ok(status)
    }

    /// The request for this cluster's intermediate; the same one until it is installed, so that a
    /// join can be repeated.
    ///
    /// # Errors
    /// [`AuthorityError::Active`] if the cluster is in a mesh.
    pub fn request_intermediate(&self) -> Result<String, AuthorityError> {
        if let Some(a) = self.lock().as_ref() {
            return Err(AuthorityError::Active(a.status.trust_domain.clone()));
        }
        self.request(JOIN)
    }

    /// Makes or repeats a request with a key of its own.
    fn request(&self, what: &str) -> Result<String, AuthorityError> {
        if let Some((_, csr)) = self.dir.pending(what)? {
            return Ok(csr);
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, self.cluster.as_str());
        let csr = params.serialize_request(&key)?.pem()?;
        self.dir.save_pending(what, &Secret::from(key.serialize_pem()), &csr)?;
        Ok(csr)
    }

    /// Installs what the mesh's root signed for [`Self::request_intermediate`].
    ///
    /// # Errors
    /// If chain, key and bundle do not belong together or are for another cluster; nothing is
    /// changed then.
    pub fn install_intermediate(
        &self,
        trust_domain: &TrustDomain,
        chain: &str,
        bundle: &str,
    ) -> Result<AuthorityStatus, AuthorityError> {
        let _alone = self.alone();
        if let Some(a) = self.lock().as_ref() {
            return Err(AuthorityError::Active(a.status.trust_domain.clone()));
        }
        let (key, _) = self
            .dir
            .pending(JOIN)?
            .ok_or_else(|| AuthorityError::BadRequest("no intermediate was requested".into()))?;
        let first = first_pem(chain)?;
        let files = CaFiles {
            root_cert: bundle.to_owned(),
            ca_cert: first,
            ca_key: key,
            cert_chain: chain.to_owned(),
            ..CaFiles::default()
        };
        let status = self.install(&files, None)?;
        if &status.trust_domain != trust_domain {
            self.forget()?;
            return Err(AuthorityError::BadRequest(format!(
                "the intermediate is of trust domain {}, not {trust_domain}",
                status.trust_domain
            )));
        }
        self.dir.drop_pending(JOIN);
        Ok(status)
    }

    /// Forgets the mesh after leaving it. The token key stays: it is the cluster's own.
    ///
    /// # Errors
    /// Those of the file system; the files may then be partly removed, and a repeat completes it.
    pub fn reset(&self) -> Result<(), AuthorityError> {
        let _alone = self.alone();
        self.forget()
    }

    fn forget(&self) -> Result<(), AuthorityError> {
        self.dir.clear()?;
        *self.lock() = None;
        *self.revocation() = Revocation::new(Records::default());
        self.changes.send_modify(|n| *n += 1);
        Ok(())
    }
}

impl Active {
    /// Gives the bundle its number: that of its announcement, if there is one of these very roots. Where the root key is,
    /// there is always one.
    fn numbered(mut self, dir: &CaDir) -> Result<Self, AuthorityError> {
        if let Some(a) = &self.announcement
            && a.bundle.roots == self.roots
        {
            self.status.bundle_sequence = a.bundle.sequence;
            dir.set_bundle_sequence(a.bundle.sequence, &self.roots)?;
            return Ok(self.told());
        }
        // The roots were changed by hand.
        self.status.bundle_sequence = dir.bundle_sequence(&self.roots)?;
        self.announcement = None;
        if let Some(key) = &self.files.root_key {
            let key = KeyPair::from_pem(key)?;
            let (bundle, phase) = (self.bundle(self.status.bundle_sequence)?, self.status.phase);
            let a = Announcement::sign(bundle, phase, &[(self.status.root_pin.clone(), &key)])?;
            dir.save_announcement(&a.text())?;
            self.announcement = Some(a);
        }
        Ok(self.told())
    }

    fn told(mut self) -> Self {
        let text = self.announcement.as_ref().map(Announcement::text);
        self.status.phase = self.announcement.as_ref().map_or(Phase::Steady, |a| a.phase);
        self.status.announcement = text.clone().unwrap_or_default();
        self.files.announcement = text;
        self
    }

    fn bundle(&self, sequence: u64) -> Result<TrustBundle, AuthorityError> {
        let domain = self.status.trust_domain.clone();
        Ok(TrustBundle::from_pem(domain, self.status.bundle_pem.as_bytes(), sequence, None)?)
    }

    /// Everything that must hold of a CA before it signs anything.
    fn check(files: &CaFiles, cluster: &ClusterId) -> Result<Self, AuthorityError> {
        let stored = |s: String| AuthorityError::Stored(s);
        let roots = pem_certificates("root-cert.pem", files.root_cert.as_bytes())?;
        let chain = pem_certificates("cert-chain.pem", files.cert_chain.as_bytes())?;
        let ca = pem_certificates("ca-cert.pem", files.ca_cert.as_bytes())?;
        let (ca_der, root_der) = match (ca.first(), roots.first()) {
            (Some(c), Some(r)) => (c, r),
            _ => return Err(stored("empty certificate file".into())),
        };
        if chain.first() != Some(ca_der) {
            return Err(stored("cert-chain.pem does not start with ca-cert.pem".into()));
        }
        let (_, ca_x509) =
            X509Certificate::from_der(ca_der).map_err(|e| stored(format!("ca-cert.pem: {e}")))?;
        if !ca_x509.is_ca() {
            return Err(stored("ca-cert.pem is not a CA certificate".into()));
        }
        let above = verify_chain(&chain, &roots)?;
        let id = single_uri(&ca_x509).and_then(|u| SpiffeId::parse(u).ok()).ok_or_else(|| {
            stored("ca-cert.pem names no cluster (URI SAN spiffe://<domain>/cluster/<id>)".into())
        })?;
        let owner = id
            .cluster_id()
            .ok_or_else(|| stored(format!("ca-cert.pem is for {id}, which is not a cluster")))?;
        if &owner != cluster {
            return Err(stored(format!("ca-cert.pem is of cluster {owner}, but this is cluster {cluster}")));
        }
        let trust_domain =
            TrustDomain::new(id.trust_domain()).map_err(|e| stored(format!("ca-cert.pem: {e}")))?;
        let key = KeyPair::from_pem(&files.ca_key).map_err(|e| stored(format!("ca-key.pem: {e}")))?;
        if key.public_key_raw() != ca_x509.public_key().subject_public_key.data.as_ref() {
            return Err(stored("ca-key.pem does not belong to ca-cert.pem".into()));
        }
        let at = |t: x509_parser::time::ASN1Time| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(t.timestamp().max(0).unsigned_abs())
        };
        let (not_before, not_after) = (at(ca_x509.validity().not_before), at(ca_x509.validity().not_after));
        let issuer = Issuer::from_ca_cert_der(ca_der, key)?;
        let root = match &files.root_key {
            None => None,
            Some(pem) => {
                let key = KeyPair::from_pem(pem).map_err(|e| stored(format!("root-key.pem: {e}")))?;
                if !rotate::belongs(&key, root_der) {
                    return Err(stored("root-key.pem does not belong to root-cert.pem".into()));
                }
                let (_, x) = X509Certificate::from_der(root_der).map_err(|e| stored(e.to_string()))?;
                let not_after = at(x.validity().not_after);
                Some(RootKey { issuer: Issuer::from_ca_cert_der(root_der, key)?, not_after })
            }
        };
        let announcement = match &files.announcement {
            None => None,
            Some(text) => Some(Announcement::parse(text).map_err(|e| stored(format!("roots.json: {e}")))?),
        };
        if files.other_key.is_some() && announcement.as_ref().is_none_or(|a| a.bundle.roots != roots) {
            return Err(stored(
                "root-cert.pem was changed while a rotation is under way: put back the roots that roots.json holds"
                    .into(),
            ));
        }
        Ok(Self {
            status: AuthorityStatus {
                trust_domain,
                bundle_pem: files.root_cert.clone(),
                chain_pem: files.cert_chain.clone(),
                not_after,
                holds_root_key: root.is_some(),
                root_pin: root_pin(root_der),
                bundle_sequence: 0,
                phase: Phase::Steady,
                announcement: String::new(),
                issuer_pin: root_pin(&roots[above]),
                intermediate: root_pin(ca_der),
                not_before,
                lists: vec![],
                revoked: vec![],
            },
            files: files.clone(),
            roots,
            announcement,
            issuer,
            root,
        })
    }
}

/// Each certificate is signed by the next, the last one by a root. Answers with the place of that root.
pub(crate) fn verify_chain(
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
) -> Result<usize, AuthorityError> {
    let stored = |s: String| AuthorityError::Stored(s);
    let parse = |der| X509Certificate::from_der(der).map(|(_, c)| c).map_err(|e| stored(e.to_string()));
    let mut above = 0;
    for (i, der) in chain.iter().enumerate() {
        let cert = parse(der)?;
        if !cert.validity().is_valid() {
            return Err(stored(format!("certificate {i} of cert-chain.pem is expired or not valid yet")));
        }
        let issuers = match chain.get(i + 1) {
            Some(next) => std::slice::from_ref(next),
            None => roots,
        };
        let mut found = None;
        for (n, issuer) in issuers.iter().enumerate() {
            let issuer = parse(issuer)?;
            let ok = issuer.subject() == cert.issuer()
                && issuer.is_ca()
                && cert.verify_signature(Some(issuer.public_key())).is_ok();
            found = found.or(ok.then_some(n));
        }
        above = found.ok_or_else(|| {
            stored(format!("certificate {i} of cert-chain.pem is not signed by its successor or a root"))
        })?;
    }
    Ok(above)
}

fn single_uri<'a>(cert: &'a X509Certificate<'_>) -> Option<&'a str> {
    let ext = cert.subject_alternative_name().ok()??;
    let mut uris = ext.value.general_names.iter().filter_map(|n| match n {
        x509_parser::extensions::GeneralName::URI(u) => Some(*u),
        _ => None,
    });
    let one = uris.next()?;
    uris.next().is_none().then_some(one)
}

/// The certificates of a PEM text, each as PEM.
fn split_pem(pem: &str) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----";
    pem.split_inclusive(END).filter(|p| p.contains(END)).map(|p| format!("{}\n", p.trim())).collect()
}

fn first_pem(pem: &str) -> Result<String, AuthorityError> {
    split_pem(pem)
        .into_iter()
        .next()
        .ok_or_else(|| AuthorityError::BadRequest("empty certificate chain".into()))
}

#[cfg(test)]
mod tests;
