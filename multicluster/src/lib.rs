//! Federation: membership, registry exchange, leases.
//!
//! Entry point: [`Federation::start`]. It serves three things: peers and newcomers over TLS
//! ([`pb`], port 15016), operators over a private unix socket ([`admin_pb`]), and pilot over the
//! same socket (imports and peers as configuration documents).
//!
//! Invariants: nothing a peer sends reaches a table unchecked ([`wire`]); no lock is held across an
//! await; what was imported is kept on disk, so a restart serves before any peer answers; one task
//! per peer, and none of them can hold up another.

mod admin;
pub mod bundle;
mod declared;
mod dial;
pub mod exchange;
mod federate;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod join;
mod link;
pub mod membership;
mod revocation;
mod roots;
mod service;
mod state;
mod store;
pub mod token;
mod trace;
pub mod wire;

mod generated {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    pub mod federation {
        pub mod v1 {
            tonic::include_proto!("flotilla.federation.v1");
        }
        pub mod admin {
            pub mod v1 {
                tonic::include_proto!("flotilla.federation.admin.v1");
            }
        }
    }
    pub mod citadel {
        pub mod v1 {
            tonic::include_proto!("flotilla.citadel.v1");
        }
    }
}

/// `flotilla.citadel.v1`, generated: the CA that this component and the CLI ask.
pub use generated::citadel::v1 as authority_pb;
/// `flotilla.federation.admin.v1`, generated.
pub use generated::federation::admin::v1 as admin_pb;
/// `flotilla.federation.v1`, generated.
pub use generated::federation::v1 as pb;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use mesh_identity::{FEDERATION_SVID, SecretStore, TRUST_BUNDLE};
use mesh_model::{
    ClusterId, NetworkId,
    federation::{Conflict, GatewayAddress, Offer, Transport, type_url},
    proxy::{ClientCertificate, DownstreamTls, SecretRef, TlsServerOptions, TlsVersion, Validation},
};
use mesh_xds::{
    Endpoint, NodeInfo,
    mcp::{ConfigClient, Document},
    server::conn,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use exchange::ServiceKey;
use state::Shared;

/// How the federation component is started.
#[derive(Debug, Clone)]
pub struct FederationOptions {
    /// This cluster.
    pub cluster: ClusterId,
    /// Its network.
    pub network: NetworkId,
    /// Addresses of its east-west gateways as peers reach them.
    pub gateways: Vec<GatewayAddress>,
    /// Transports its gateways accept, preferred first.
    pub transports: Vec<Transport>,
    /// Where peers and newcomers are served.
    pub listen: SocketAddr,
    /// Dial peers through this gateway of its own; `None` dials theirs directly.
    pub via: Option<SocketAddr>,
    /// Parent of the `federation` directory.
    pub state_dir: PathBuf,
    /// Unix socket for operators and pilot.
    pub socket: PathBuf,
    /// Citadel's authority socket.
    pub authority_socket: PathBuf,
    /// Where pilot serves what this cluster exports.
    pub exports: Endpoint,
    /// Unix socket of pilot's debug pages, which are asked on behalf of peers; `None` tells them nothing.
    pub debug_socket: Option<PathBuf>,
    /// Where galley serves what the configuration declares of membership; `None` leaves it to operators.
    pub declarations: Option<Endpoint>,
    /// Where the bundle of this trust domain is served, and how the endpoints of others are verified.
    pub endpoints: bundle::BundleEndpoints,
    /// How often other trust domains are to ask for the roots of this one.
    pub refresh_hint: Duration,
    /// Over how long proxies spread their renewal when the cluster's intermediate is another one.
    pub renew_within: Duration,
}

/// Why it could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// State that cannot be read, or an address that cannot be bound.
    #[error("{what}: {source}")]
    Io {
        /// Which.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// TLS settings.
    #[error(transparent)]
    Identity(#[from] mesh_identity::IdentityError),
}

/// A running federation component; dropping it stops everything it runs.
pub struct Federation {
    address: SocketAddr,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Federation {
    fn drop(&mut self) {
        self.stop.cancel();
        for t in &self.tasks {
            t.abort();
        }
    }
}

impl Federation {
    /// Loads what was kept and starts serving; no peer is waited for.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(options: FederationOptions, secrets: Arc<SecretStore>) -> Result<Self, StartError> {
        let io = |what: String| move |source| StartError::Io { what, source };
        let shared =
            Arc::new(Shared::load(options.clone(), secrets.clone()).map_err(io("federation state".into()))?);
        let stop = shared.stop.clone();
        let mut tasks = Vec::new();

        let listener = TcpListener::bind(options.listen)
            .await
            .map_err(io(format!("federation address {}", options.listen)))?;
        let address = listener.local_addr().map_err(io("federation address".into()))?;
        let tls = secrets.server_config(&DownstreamTls {
            certificate: SecretRef::Sds(FEDERATION_SVID.into()),
            client_certificate: ClientCertificate::Optional(Validation {
                trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
                sans: vec![],
                crl: None,
            }),
            alpn: vec!["h2".into()],
            min_version: TlsVersion::V1_3,
            options: TlsServerOptions::default(),
        })?;
        let federation =
            pb::federation_server::FederationServer::new(service::FederationService(shared.clone()))
                .max_decoding_message_size(256 * 1024);
        let ends = shared.secrets.revocations().ends();
        tasks.push(spawn("federation", async move {
            tonic::transport::Server::builder()
                .http2_keepalive_interval(Some(Duration::from_secs(5)))
                .http2_keepalive_timeout(Some(Duration::from_secs(5)))
                .max_concurrent_streams(64)
                .add_service(federation)
                .serve_with_incoming(conn::tls(listener, tls, Some(ends)))
                .await
        }));

        let socket = conn::bind_unix(&options.socket)
            .map_err(io(format!("federation socket {}", options.socket.display())))?;
        let admin = admin_pb::admin_server::AdminServer::new(admin::AdminService(shared.clone()));
        let publisher = shared.publisher.service_until(stop.clone());
        tasks.push(spawn("federation socket", async move {
            tonic::transport::Server::builder()
                .add_service(admin)
                .add_service(publisher)
                .serve_with_incoming(conn::unix(socket))
                .await
        }));

        tasks.extend(bundle::serve(&options.endpoints, &shared).await?);
        tasks.push(tokio::spawn(follow_authority(shared.clone())));
        tasks.push(tokio::spawn(follow_exports(shared.clone())));
        tasks.push(tokio::spawn(follow_conflicts(shared.clone())));
        tasks.push(tokio::spawn(follow_members(shared.clone())));
        if let Some(galley) = options.declarations {
            tasks.push(tokio::spawn(declared::follow(shared.clone(), galley.clone())));
            tasks.push(tokio::spawn(bundle::follow::follow(shared.clone(), galley)));
        }
        tasks.push(tokio::spawn(save_imports(shared.clone())));
        tasks.push(tokio::spawn(async move {
            // What lapsing may add to a lease, and what changes wait for others to be published with them.
            let mut clock = tokio::time::interval(Duration::from_millis(50));
            loop {
                clock.tick().await;
                shared.tick();
            }
        }));
        Ok(Self { address, stop, tasks })
    }

    /// Where peers and newcomers are served.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn spawn<F>(what: &'static str, serve: F) -> JoinHandle<()>
where
    F: Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
{
    tokio::spawn(async move {
        if let Err(error) = serve.await {
            tracing::error!(%error, what, "server ended");
        }
    })
}

/// Learns whether the cluster is in a mesh: at start, and whenever its secrets change.
async fn follow_authority(shared: Arc<Shared>) {
    let mut secrets = shared.secrets.subscribe();
    loop {
        let known = async {
            let channel = shared.authority().await?;
            let mut client = authority_pb::authority_client::AuthorityClient::new(channel);
            client.status(authority_pb::StatusRequest {}).await
        };
        match known.await {
            Ok(status) => {
                let s = status.into_inner();
                let active = s.state == "active";
                shared.enter(active.then(|| s.trust_domain.clone()));
                shared.set_roots(active.then_some(s));
                if secrets.changed().await.is_err() {
                    return;
                }
            }
            Err(status) => {
                tracing::warn!(error = %status.message(), "citadel does not answer");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Keeps imports, of which many may change at once.
async fn save_imports(shared: Arc<Shared>) {
    let mut clock = tokio::time::interval(Duration::from_secs(1));
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        clock.tick().await;
        let shared = shared.clone();
        // Hundreds of files after a start; nobody waits for them.
        if tokio::task::spawn_blocking(move || shared.save_imports()).await.is_err() {
            return;
        }
    }
}

/// Takes this cluster's exports from pilot into the log.
async fn follow_exports(shared: Arc<Shared>) {
    let client = ConfigClient::start(
        shared.options.exports.clone(),
        NodeInfo::component("federation"),
        &[type_url::EXPORTED_SERVICE],
    );
    let mut state = client.watch();
    // Documents are shared between states: one that is the same needs no reading.
    let mut known: BTreeMap<String, (Arc<Document>, ServiceKey)> = BTreeMap::new();
    let mut told = false;
    loop {
        let now = state.borrow_and_update().clone();
        // Before pilot has answered, an empty table would withdraw everything from every peer.
        if now.synced {
            let mut next = BTreeMap::new();
            let mut changes = BTreeMap::new();
            for (name, doc) in now.of(type_url::EXPORTED_SERVICE) {
                if let Some(k) = known.get(name).filter(|(d, _)| Arc::ptr_eq(d, doc)) {
                    next.insert(name.clone(), k.clone());
                    continue;
                }
                match doc.spec::<Offer>() {
                    Ok(o) => {
                        let key = (o.service.namespace.clone(), o.service.name.clone());
                        next.insert(name.clone(), (doc.clone(), key.clone()));
                        changes.insert(key, Some(o));
                    }
                    Err(error) => tracing::error!(%name, %error, "an export record is unreadable"),
                }
            }
            for (name, (_, key)) in known {
                if !next.contains_key(&name) {
                    changes.entry(key).or_insert(None);
                }
            }
            known = next;
            // The first time even if there is nothing: that is news.
            if !changes.is_empty() || !told {
                told = true;
                shared.lock().node.offer(changes);
            }
        }
        let due = {
            let mut t = shared.lock();
            if t.node.flush(shared.now()) {
                shared.exports_changed.send_modify(|n| *n += 1);
            }
            t.node.flush_due()
        };
        let due = async {
            match due {
                Some(at) => tokio::time::sleep(Duration::from_millis(at.saturating_sub(shared.now()))).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            r = state.changed() => if r.is_err() { return },
        }
    }
}

/// Takes what pilot finds of exports that contradict each other, to tell their exporters.
async fn follow_conflicts(shared: Arc<Shared>) {
    let client = ConfigClient::start(
        shared.options.exports.clone(),
        NodeInfo::component("federation"),
        &[type_url::CONFLICT],
    );
    let mut state = client.watch();
    let mut own: Vec<Conflict> = Vec::new();
    loop {
        let now = state.borrow_and_update().clone();
        if now.synced {
            let found: Vec<Conflict> = now
                .of(type_url::CONFLICT)
                .filter_map(|(name, doc)| {
                    doc.spec()
                        .inspect_err(
                            |error| tracing::error!(%name, %error, "a conflict record is unreadable"),
                        )
                        .ok()
                })
                .collect();
            let me = &shared.options.cluster;
            let lost: Vec<_> = found.iter().filter(|c| c.loser == *me).cloned().collect();
            for c in lost.iter().filter(|c| !own.contains(c)) {
                service::conflict(c, me);
            }
            own = lost;
            shared.lock().node.set_conflicts(found);
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps one link per member.
async fn follow_members(shared: Arc<Shared>) {
    struct Link(JoinHandle<()>);
    impl Drop for Link {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let mut changed = shared.members_changed.subscribe();
    let mut links: BTreeMap<ClusterId, Link> = BTreeMap::new();
    loop {
        let wanted: Vec<ClusterId> = {
            let t = shared.lock();
            t.node.members.peers().map(|m| m.cluster.clone()).collect()
        };
        links.retain(|peer, _| wanted.contains(peer));
        for peer in wanted {
            let shared = shared.clone();
            links.entry(peer.clone()).or_insert_with(|| Link(tokio::spawn(link::follow(shared, peer))));
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}
