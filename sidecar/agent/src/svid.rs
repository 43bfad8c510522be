//! The workload's certificate: asked for, kept, renewed.
//!
//! The first certificate is proved by a bearer token, later ones by the certificate itself or, if
//! that has expired, the token again. Renewal happens at half of the lifetime with jitter, so that
//! the proxies of a cluster do not come back together; connections are not touched.

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::{
    IdentityError, PendingSvid, SecretStore, WORKLOAD_SVID, certificate_info, pem_certificates,
};
use mesh_model::SpiffeId;
use mesh_runtime::files::write_private;
use mesh_xds::{Endpoint, client::channel};
use rand::RngExt;
use tokio::sync::watch;
use tonic::{Request, metadata::MetadataValue};

use crate::pb::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient};

/// One signing request.
const SIGN_TIMEOUT: Duration = Duration::from_secs(10);
/// First pause after a failure; doubles up to [`MAX_PAUSE`].
const MIN_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(15);

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
        }
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

    fn publish(&self, chain: &[u8], key: &[u8], roots: &[u8]) {
        // Fails without a receiver, which is what is wanted then.
        let _ = self.pem.send(Some(Arc::new(SvidPem {
            chain: chain.to_vec(),
            key: key.to_vec(),
            roots: roots.to_vec(),
        })));
    }

    /// Runs until dropped.
    pub async fn run(self) {
        let mut expiry = self.load();
        let mut pause = MIN_PAUSE;
        loop {
            if let Some(at) = expiry {
                self.status.send_replace(String::new());
                // Between 40 and 60 percent of what is left: half, with jitter.
                let left = at.duration_since(SystemTime::now()).unwrap_or_default();
                let share = rand::rng().random_range(0.4..0.6);
                tokio::time::sleep(left.mul_f64(share)).await;
            }
            match self.renew().await {
                Ok(at) => {
                    tracing::info!(identity = %self.options.identity, "certificate issued");
                    expiry = Some(at);
                    pause = MIN_PAUSE;
                }
                Err(error) => {
                    tracing::warn!(%error, "no new certificate");
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
    fn load(&self) -> Option<SystemTime> {
        let dir = self.options.state_dir.as_ref()?;
        let read = |name: &str| std::fs::read(dir.join(name)).ok();
        let (chain, key, root) = (read("svid-chain.pem")?, read("svid-key.pem")?, read("root-cert.pem")?);
        let info = certificate_info(&chain).ok()?;
        if info.spiffe.as_ref() != Some(&self.options.identity) || info.not_after <= SystemTime::now() {
            return None;
        }
        self.store.set_identity(WORKLOAD_SVID, &chain, &key).ok()?;
        self.store.set_mesh_trust(&self.options.identity.domain(), &root).ok()?;
        self.publish(&chain, &key, &root);
        Some(info.not_after)
    }

    async fn renew(&self) -> Result<SystemTime, SvidError> {
        let pending = PendingSvid::generate(&self.options.identity)?;
        let token = match std::fs::read_to_string(&self.options.token_file) {
            Ok(t) => Some(t),
            // With a certificate the token may be gone.
            Err(_) if self.store.has_identity(WORKLOAD_SVID) => None,
            Err(source) => {
                return Err(SvidError::File { path: self.options.token_file.display().to_string(), source });
            }
        };
        let channel = channel(&self.options.endpoint).await.map_err(|e| SvidError::Connect(chain_of(&e)))?;
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
            .map_err(|s| SvidError::Refused(s.message().to_owned()))?
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
        self.store.set_identity(WORKLOAD_SVID, chain_pem.as_bytes(), pending.key_pem.as_bytes())?;
        self.store.set_mesh_trust(&self.options.identity.domain(), root.as_bytes())?;
        self.publish(chain_pem.as_bytes(), pending.key_pem.as_bytes(), root.as_bytes());
        if let Some(dir) = &self.options.state_dir {
            for (name, content) in [
                ("svid-key.pem", pending.key_pem.as_str()),
                ("svid-chain.pem", chain_pem.as_str()),
                ("root-cert.pem", root.as_str()),
            ] {
                if let Err(error) = write_private(&dir.join(name), content.as_bytes()) {
                    tracing::warn!(%error, name, "not kept; a restart will need the control plane");
                }
            }
        }
        Ok(info.not_after)
    }
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
