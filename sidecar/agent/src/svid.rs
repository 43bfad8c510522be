//! The workload's certificate: asked for, kept, renewed.
//!
//! The first certificate is proved by a bearer token, later ones by the certificate itself or, if
//! that has expired, the token again. Renewal happens at half of the lifetime with jitter, so that
//! the proxies of a cluster do not come back together, and soon when the cluster's intermediate is another one than the
//! certificate's; connections are not touched.
//!
//! A certificate that was revoked is shown no more: the next one is asked for at once, with the token alone, which the CA may
//! refuse as well.
//!
//! Roots come with each certificate, and from the xDS stream as soon as that tells any: it is the one that is told of
//! changes, so what it told last stays.

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::{
    CertificateIds, IdentityError, PendingSvid, SecretStore, WORKLOAD_SVID, certificate_info,
    pem_certificates, root_pin, told_revoked,
};
use mesh_model::{SpiffeId, federation::ForeignBundle};
use mesh_runtime::files::write_private;
use mesh_xds::{Endpoint, client::channel, trust::Trusting};
use rand::RngExt;
use tokio::{sync::watch, time::Instant};
use tonic::{Request, metadata::MetadataValue};

use crate::{
    Roots,
    pb::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
};

/// One signing request.
const SIGN_TIMEOUT: Duration = Duration::from_secs(10);
/// First pause after a failure; doubles up to [`MAX_PAUSE`].
const MIN_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(15);
/// A control plane that tells of an intermediate before it signs with it is not asked more often.
const MIN_SPREAD: Duration = Duration::from_millis(500);

/// Why there is no (new) certificate.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// A file that is needed.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control plane is not reachable.
    #[error("cannot reach the certificate service: {0}")]
    Connect(String),
    /// It does not accept the certificate that was shown.
    #[error("the certificate service says that the certificate was revoked")]
    Revoked,
    /// It refused.
    #[error("the certificate service refused: {0}")]
    Refused(String),
    /// It answered with something that cannot be used.
    #[error("the certificate service's answer cannot be used: {0}")]
    Answer(String),
    /// Local certificate handling.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// What renewal needs to know.
#[derive(Clone)]
pub struct SvidOptions {
    /// The control plane, with a client configuration that follows the store.
    pub endpoint: Endpoint,
    /// Identity expected in the certificate.
    pub identity: SpiffeId,
    /// The workload's token.
    pub token_file: PathBuf,
    /// Roots of the mesh as they were when the process started, PEM.
    pub root: Vec<u8>,
    /// Where key and certificate are kept across restarts; `None` keeps them in memory only.
    pub state_dir: Option<PathBuf>,
}

/// The workload's secrets in PEM, for a proxy that is a process of its own.
#[derive(Clone, PartialEq, Eq)]
pub struct SvidPem {
    /// Certificates, leaf first, without the root.
    pub chain: Vec<u8>,
    /// Private key, PKCS #8.
    pub key: Vec<u8>,
    /// Roots of the mesh.
    pub roots: Vec<u8>,
}

impl std::fmt::Debug for SvidPem {
    /// Never the content.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SvidPem")
    }
}

/// Keeps the store's certificate fresh.
pub struct Renewal {
    options: SvidOptions,
    store: Arc<SecretStore>,
    /// Why the last attempt failed; empty when it did not.
    status: watch::Sender<String>,
    pem: watch::Sender<Option<Arc<SvidPem>>>,
    roots: Roots,
    /// What is shown and trusted now.
    now: Option<SvidPem>,
}

/// When to renew.
struct Due {
    /// By the certificate's age.
    at: Instant,
    /// Because of another intermediate: that one, and when.
    other: Option<(String, Instant)>,
}

impl Renewal {
    /// Prepares renewal; [`Self::run`] does it.
    #[must_use]
    pub fn new(options: SvidOptions, store: Arc<SecretStore>) -> Self {
        Self {
            options,
            store,
            status: watch::Sender::new("no certificate yet".into()),
            pem: watch::Sender::new(None),
            roots: Roots::default(),
            now: None,
        }
    }

    /// To tell it the own roots, and to report what it does with them.
    #[must_use]
    pub fn roots(&self) -> Roots {
        self.roots.clone()
    }

    /// The last failure, empty if there is none.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<String> {
        self.status.subscribe()
    }

    /// The secrets in PEM whenever they change. Subscribe before [`Self::run`]: without a subscriber
    /// no copy of the key is kept.
    #[must_use]
    pub fn pem(&self) -> watch::Receiver<Option<Arc<SvidPem>>> {
        self.pem.subscribe()
    }

    fn publish(&mut self, chain: &[u8], key: &[u8], roots: &[u8]) {
        // Nobody who would be given the key, no copy of it.
        let key = if self.pem.receiver_count() > 0 { key.to_vec() } else { vec![] };
        let now = SvidPem { chain: chain.to_vec(), key, roots: roots.to_vec() };
        // Fails without a receiver, which is what is wanted then.
        let _ = self.pem.send(Some(Arc::new(now.clone())));
        self.now = Some(now);
        self.say();
    }

    /// Says what is trusted and shown, for reports.
    fn say(&self) {
        let told = self.roots.told.borrow();
        let told = told.as_ref().filter(|t| self.now.as_ref().is_some_and(|n| n.roots == t.roots.as_bytes()));
        let sequence = told.and_then(|t| Some(t.own.as_ref()?.sequence)).unwrap_or(0);
        let intermediate = self.intermediate().unwrap_or_default();
        self.roots.trusting.send_replace(Trusting { sequence, intermediate });
    }

    /// SHA-256 of the intermediate that is shown.
    fn intermediate(&self) -> Option<String> {
        let chain = pem_certificates("chain", &self.now.as_ref()?.chain).ok()?;
        chain.get(1).map(|i| root_pin(i))
    }

    /// Trusts what the control plane told last, if that is news.
    fn trust(&mut self) {
        let told = self.roots.told.borrow().clone();
        let (Some(told), Some(now)) = (told, self.now.clone()) else { return };
        if let Err(error) = self.store.set_revoked(&told.trust_domain, &told.roots, &told.revoked) {
            tracing::error!(%error, "a revocation list cannot be used");
        }
        if told.roots.as_bytes() == now.roots {
            return self.say();
        }
        if let Err(error) = self.store.set_mesh_trust(&self.options.identity.domain(), told.roots.as_bytes())
        {
            tracing::error!(%error, "the roots that the control plane told cannot be used; the old ones stay");
            return;
        }
        tracing::info!(sequence = told.own.as_ref().map(|o| o.sequence), "other roots are trusted");
        self.keep(&[("root-cert.pem", told.roots.as_bytes())]);
        self.publish(&now.chain, &now.key, told.roots.as_bytes());
    }

    fn keep(&self, files: &[(&str, &[u8])]) {
        let Some(dir) = &self.options.state_dir else { return };
        for (name, content) in files {
            if let Err(error) = write_private(&dir.join(name), content) {
                tracing::warn!(%error, name, "not kept; a restart will need the control plane");
            }
        }
    }

    /// Whether the control plane signs with another intermediate than it did; when to ask, spread so that the proxies of a
    /// cluster do not come together.
    fn look(&self, due: &mut Due) {
        let told = self.roots.told.borrow();
        let own = told.as_ref().and_then(|t| t.own.as_ref()).filter(|o| !o.intermediate.is_empty());
        let Some(own) = own.filter(|o| self.intermediate().as_ref() != Some(&o.intermediate)) else {
            due.other = None;
            return;
        };
        if due.other.as_ref().is_none_or(|(of, _)| *of != own.intermediate) {
            let spread = Duration::from_millis(own.renew_within_ms.into()).max(MIN_SPREAD);
            let wait = spread.mul_f64(rand::rng().random_range(0.0..1.0));
            due.other = Some((own.intermediate.clone(), Instant::now() + wait));
        }
    }

    /// Waits until it is time to renew.
    async fn wait(&mut self, told: &mut watch::Receiver<Option<ForeignBundle>>, at: Instant) {
        let mut due = Due { at, other: None };
        loop {
            told.mark_unchanged();
            self.trust();
            if self.is_revoked() {
                return self.revoked();
            }
            self.look(&mut due);
            let at = due.other.as_ref().map_or(due.at, |(_, soon)| due.at.min(*soon));
            tokio::select! {
                () = tokio::time::sleep_until(at) => return,
                // The sender is this one's own.
                _ = told.changed() => {}
            }
        }
    }

    /// Whether what is shown was revoked.
    fn is_revoked(&self) -> bool {
        let Some(now) = &self.now else { return false };
        let chain = pem_certificates("chain", &now.chain).unwrap_or_default();
        self.store.revocations().revoked(&CertificateIds::of(&chain))
    }

    /// Nobody accepts it any more.
    fn revoked(&self) {
        tracing::error!(identity = %self.options.identity, "the certificate was revoked; asking for another with the token");
        self.status.send_replace("the certificate was revoked".into());
        self.store.remove_identity(WORKLOAD_SVID);
    }

    /// Runs until dropped.
    pub async fn run(mut self) {
        let mut told = self.roots.told.subscribe();
        let mut expiry = self.load();
        let mut pause = MIN_PAUSE;
        loop {
            if let Some(at) = expiry {
                self.status.send_replace(String::new());
                // Between 40 and 60 percent of what is left: half, with jitter.
                let left = at.duration_since(SystemTime::now()).unwrap_or_default();
                let share = rand::rng().random_range(0.4..0.6);
                self.wait(&mut told, Instant::now() + left.mul_f64(share)).await;
            }
            match self.renew().await {
                Ok(at) => {
                    tracing::info!(identity = %self.options.identity, "certificate issued");
                    expiry = Some(at);
                    pause = MIN_PAUSE;
                }
                Err(error) => {
                    tracing::warn!(%error, "no new certificate");
                    if self.store.has_identity(WORKLOAD_SVID) && matches!(error, SvidError::Revoked) {
                        self.revoked();
                    }
                    self.status.send_replace(error.to_string());
                    expiry = None;
                    let jitter = rand::rng().random_range(0.5..1.0);
                    tokio::time::sleep(pause.mul_f64(jitter)).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }

    /// What an earlier run kept, if it is still good.
    fn load(&mut self) -> Option<SystemTime> {
        let dir = self.options.state_dir.clone()?;
        let read = |name: &str| std::fs::read(dir.join(name)).ok();
        let (chain, key, mut root) = (read("svid-chain.pem")?, read("svid-key.pem")?, read("root-cert.pem")?);
        let info = certificate_info(&chain).ok()?;
        if info.spiffe.as_ref() != Some(&self.options.identity) || info.not_after <= SystemTime::now() {
            return None;
        }
        // Another root may sign by now than when this was kept, and whoever started the process knows. Until the control
        // plane tells which there are, it is believed as well.
        let kept = pem_certificates("root-cert.pem", &root).ok()?;
        let given = pem_certificates("--root-cert", &self.options.root).unwrap_or_default();
        if given.iter().any(|g| !kept.contains(g)) {
            root.push(b'\n');
            root.extend_from_slice(&self.options.root);
        }
        self.store.set_identity(WORKLOAD_SVID, &chain, &key).ok()?;
        self.store.set_mesh_trust(&self.options.identity.domain(), &root).ok()?;
        self.publish(&chain, &key, &root);
        Some(info.not_after)
    }

    async fn renew(&mut self) -> Result<SystemTime, SvidError> {
        let pending = PendingSvid::generate(&self.options.identity)?;
        let token = match std::fs::read_to_string(&self.options.token_file) {
            Ok(t) => Some(t),
            // With a certificate the token may be gone.
            Err(_) if self.store.has_identity(WORKLOAD_SVID) => None,
            Err(source) => {
                return Err(SvidError::File { path: self.options.token_file.display().to_string(), source });
            }
        };
        let channel = channel(&self.options.endpoint).await.map_err(unreachable)?;
        let mut request =
            Request::new(IstioCertificateRequest { csr: pending.csr_pem.clone(), ..Default::default() });
        request.set_timeout(SIGN_TIMEOUT);
        if let Some(token) = token {
            let bearer = MetadataValue::try_from(format!("Bearer {}", token.trim()))
                .map_err(|_| SvidError::Answer("the token file holds no token".into()))?;
            request.metadata_mut().insert("authorization", bearer);
        }
        let mut client = IstioCertificateServiceClient::new(channel);
        let chain = tokio::time::timeout(SIGN_TIMEOUT, client.create_certificate(request))
            .await
            .map_err(|_| SvidError::Connect("no answer".into()))?
            .map_err(|s| match told_revoked(&s) {
                true => SvidError::Revoked,
                false => SvidError::Refused(s.message().to_owned()),
            })?
            .into_inner()
            .cert_chain;
        let [leaf_and_intermediates @ .., root] = chain.as_slice() else {
            return Err(SvidError::Answer("an empty chain".into()));
        };
        let chain_pem = leaf_and_intermediates.concat();
        let info = certificate_info(chain_pem.as_bytes())?;
        if info.spiffe.as_ref() != Some(&self.options.identity) {
            return Err(SvidError::Answer(format!(
                "it is for {}, this workload is {}",
                info.spiffe.map_or_else(|| "nobody".into(), |s| s.to_string()),
                self.options.identity
            )));
        }
        pem_certificates("root", root.as_bytes())?;
        let told = self.roots.told.borrow().as_ref().map(|t| t.roots.clone());
        let root = &told.unwrap_or_else(|| root.clone());
        self.store.set_identity(WORKLOAD_SVID, chain_pem.as_bytes(), pending.key_pem.as_bytes())?;
        self.store.set_mesh_trust(&self.options.identity.domain(), root.as_bytes())?;
        self.publish(chain_pem.as_bytes(), pending.key_pem.as_bytes(), root.as_bytes());
        self.keep(&[
            ("svid-key.pem", pending.key_pem.as_bytes()),
            ("svid-chain.pem", chain_pem.as_bytes()),
            ("root-cert.pem", root.as_bytes()),
        ]);
        Ok(info.not_after)
    }
}

fn unreachable(e: impl std::error::Error + 'static) -> SvidError {
    if told_revoked(&e) { SvidError::Revoked } else { SvidError::Connect(chain_of(&e)) }
}

/// An error with its causes in one line.
fn chain_of(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        text = format!("{text}: {s}");
        source = s.source();
    }
    text
}

#[cfg(test)]
mod tests;
