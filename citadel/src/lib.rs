//! The certificate authority of a cluster.
//!
//! Every cluster signs its workloads with its own intermediate; the founding cluster (or the
//! operator who plugged a CA in) holds the root that signed the intermediates. What a certificate
//! says is decided by what the caller proved, never by what its request asks for.
//!
//! Invariants: private keys are in memory or in files of mode 0600 below the state directory, and
//! never in a message or a log line; an issued identity is always of this mesh's trust domain; an
//! intermediate has path length 0 and names its cluster.

mod announcement;
pub mod audit;
pub mod authority;
mod csr;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod kubernetes;
mod legacy;
pub mod probe;
pub mod revocation;
pub mod rotation;
pub mod secrets;
mod service;
mod store;
pub mod token;

/// gRPC services, generated.
pub mod pb {
    /// `istio.v1.auth`.
    pub mod istio {
        #![allow(missing_docs, unreachable_pub, clippy::all)]
        tonic::include_proto!("istio.v1.auth");
    }
    /// `flotilla.citadel.v1`.
    pub mod authority {
        #![allow(missing_docs, unreachable_pub, clippy::all)]
        tonic::include_proto!("flotilla.citadel.v1");
    }
}

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::{FEDERATION_SVID, PendingSvid, SecretStore, WORKLOAD_SVID};
use mesh_model::{ClusterId, SpiffeId, TrustDomain};
use mesh_xds::server::conn;
use tokio::{sync::watch, task::JoinHandle};

pub use authority::{Authority, AuthorityError, Issued};
use kubernetes::{Kubernetes, KubernetesOptions};
use secrets::SecretsOptions;

use pb::{
    authority::authority_server::AuthorityServer,
    istio::{
        istio_ca_service_server::IstioCaServiceServer,
        istio_certificate_service_server::IstioCertificateServiceServer,
    },
};

/// Namespace of control planes in their own identities.
pub const SYSTEM_NAMESPACE: &str = "flotilla-system";
/// Account that the audit log is signed as.
pub const AUDIT_ACCOUNT: &str = "ca-audit";
/// Account that a control plane runs as.
pub const CONTROL_PLANE_ACCOUNT: &str = "control-plane";

/// How a citadel is started.
#[derive(Debug, Clone)]
pub struct CitadelOptions {
    /// The cluster it signs for.
    pub cluster: ClusterId,
    /// Of a mesh that is founded here.
    pub trust_domain: TrustDomain,
    /// Where keys and certificates are kept; created with mode 0700.
    pub state_dir: PathBuf,
    /// Unix socket of the authority service.
    pub socket: PathBuf,
    /// Lifetime of workload certificates, also the longest one that may be asked for.
    pub workload_ttl: Duration,
    /// Whose service-account tokens prove an identity besides the own ones.
    pub kubernetes: KubernetesOptions,
    /// Certificates that are kept in files.
    pub secrets: Option<SecretsOptions>,
    /// Files of the audit log that stay when they are full.
    pub audit_keep: usize,
}

/// A running citadel.
pub struct Citadel {
    authority: Arc<Authority>,
    kubernetes: Option<Arc<Kubernetes>>,
    _tasks: Tasks,
}

struct Tasks(Vec<JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for t in &self.0 {
            t.abort();
        }
    }
}

/// Why a citadel could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The stored CA cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The authority's socket cannot be served.
    #[error("authority socket {path}: {source}")]
    Socket {
        /// Where.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Citadel {
    /// Loads (or creates) the state and serves the authority socket.
    ///
    /// # Errors
    /// [`StartError`]; a damaged or foreign CA in the state directory is fatal, never replaced.
    pub fn start(options: CitadelOptions) -> Result<Self, StartError> {
        let authority = Arc::new(Authority::load(options.cluster, options.state_dir, options.workload_ttl)?);
        authority.keep_audit(options.audit_keep);
        let kubernetes = Kubernetes::new(options.kubernetes)?.map(Arc::new);
        let incoming =
            conn::unix(conn::bind_unix(&options.socket).map_err(|source| StartError::Socket {
                path: options.socket.display().to_string(),
                source,
            })?);
        let server = AuthorityServer::new(service::AuthorityService(authority.clone(), options.trust_domain));
        let task = tokio::spawn(async move {
            let served =
                tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming);
            if let Err(error) = served.await {
                tracing::error!(%error, "authority socket ended");
            }
        });
        let renewing = tokio::spawn(renew_intermediate(authority.clone()));
        let mut tasks = vec![task, renewing];
        tasks.extend(options.secrets.map(|o| tokio::spawn(secrets::keep(authority.clone(), o))));
        Ok(Self { authority, kubernetes, _tasks: Tasks(tasks) })
    }

    /// The CA itself, for roles that run in the same process.
    #[must_use]
    pub fn authority(&self) -> Arc<Authority> {
        self.authority.clone()
    }

    /// `istio.v1.auth.IstioCertificateService`, to be served with TLS and optional client
    /// certificates.
    #[must_use]
    pub fn certificate_service(
        &self,
    ) -> IstioCertificateServiceServer<
        impl pb::istio::istio_certificate_service_server::IstioCertificateService,
    > {
        IstioCertificateServiceServer::new(service::CertificateService(
            self.authority.clone(),
            self.kubernetes.clone(),
        ))
        .max_decoding_message_size(64 * 1024)
    }

    /// `istio.v1.auth.IstioCAService` of release 1.0, to be served beside it.
    #[must_use]
    pub fn legacy_certificate_service(
        &self,
    ) -> IstioCaServiceServer<impl pb::istio::istio_ca_service_server::IstioCaService> {
        IstioCaServiceServer::new(service::CertificateService(
            self.authority.clone(),
            self.kubernetes.clone(),
        ))
        .max_decoding_message_size(64 * 1024)
    }

    /// Secrets of the control plane itself, kept fresh: its SVID as `default`, the bundle as
    /// `ROOTCA`. Empty until the cluster is in a mesh.
    #[must_use]
    pub fn control_plane_secrets(&self, dns_names: Vec<String>) -> (Arc<SecretStore>, JoinHandle<()>) {
        let store = SecretStore::new();
        let (authority, secrets) = (self.authority.clone(), store.clone());
        let mut changes = authority.subscribe();
        let task = tokio::spawn(async move {
            loop {
                let wait = match renew(&authority, &secrets, &dns_names) {
                    Ok(wait) => wait,
                    Err(AuthorityError::Empty) => {
                        secrets.remove_identity(WORKLOAD_SVID);
                        secrets.remove_identity(FEDERATION_SVID);
                        Duration::from_secs(3600)
                    }
                    Err(error) => {
                        tracing::error!(%error, "the control plane's own certificate was not renewed");
                        Duration::from_secs(10)
                    }
                };
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
        });
        (store, task)
    }

    /// Asks the CA for a certificate as often as this, and at each change of it; tells how that went.
    #[must_use]
    pub fn probing(&self, every: Duration) -> (watch::Receiver<probe::Health>, JoinHandle<()>) {
        probe::follow(self.authority.clone(), every)
    }

    /// Wakes when the cluster joins or leaves a mesh or its intermediate changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.authority.subscribe()
    }
}

/// Keeps the intermediate of the cluster with the root key fresh, and the revocation lists; the intermediates of others are asked for
/// over the federation.
async fn renew_intermediate(authority: Arc<Authority>) {
    let mut changes = authority.subscribe();
    loop {
        let wait = match authority.renew_own() {
            Ok(true) => continue,
            Ok(false) | Err(AuthorityError::Empty) => Duration::from_secs(600),
            Err(error) => {
                tracing::error!(%error, "the intermediate was not renewed");
                Duration::from_secs(60)
            }
        };
        if let Err(error) = authority.refresh_lists()
            && !matches!(error, AuthorityError::Empty)
        {
            tracing::error!(%error, "the revocation lists were not signed anew");
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// Issues the control plane's certificate; answers when to do it again.
fn renew(authority: &Authority, store: &SecretStore, dns: &[String]) -> Result<Duration, AuthorityError> {
    let status = authority.status().ok_or(AuthorityError::Empty)?;
    let id = SpiffeId::workload(&status.trust_domain, SYSTEM_NAMESPACE, CONTROL_PLANE_ACCOUNT)
        .map_err(|e| AuthorityError::Refused(e.to_string()))?;
    let pending = PendingSvid::generate(&id)?;
    let issued = authority.issue_control_plane(&pending.csr_pem, &id, dns)?;
    store.set_identity(WORKLOAD_SVID, issued.chain_without_root().as_bytes(), pending.key_pem.as_bytes())?;
    store.set_identity(FEDERATION_SVID, issued.chain.concat().as_bytes(), pending.key_pem.as_bytes())?;
    store.set_mesh_trust(&status.trust_domain, status.bundle_pem.as_bytes())?;
    let left = issued.not_after.duration_since(SystemTime::now()).unwrap_or_default();
    Ok((left / 2).max(Duration::from_secs(1)))
}
