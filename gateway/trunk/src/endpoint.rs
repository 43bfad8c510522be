//! The endpoint: binding, accepting, keeping connections up, draining.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use mesh_identity::{Revocations, SecretStore, TRUST_BUNDLE, WORKLOAD_SVID, peer_identity};
use mesh_model::{
    ClusterId,
    proxy::{
        ClientCertificate, DownstreamTls, SecretRef, TlsServerOptions, TlsVersion, UpstreamTls, Validation,
    },
};
use quinn::{
    ClientConfig, ConnectError, Connecting, Connection, Endpoint, Incoming, ServerConfig, VarInt,
    crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
};
use rustls::pki_types::CertificateDer;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    ALPN, ALPN_BOTH_WAYS, ALPN_DATAGRAMS, LinkStatus, SocketStatus, TrunkError, TrunkMetrics, TrunkOptions,
    congestion::Chosen,
    dial,
    ends::{self, Ends},
    links::{Link, Links},
    port, serve, transport,
    workers::Workers,
};

/// TCP takes over for this long before QUIC is tried again.
pub(crate) const TCP_HOLD: Duration = Duration::from_secs(10);
/// TCP connect, and opening a stream.
pub(crate) const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// Sessions being connected to the local listener at once, over all peers.
const DELIVERIES: usize = 4096;
/// Handshakes of peers at once; who comes in vain tries again.
const HANDSHAKES: usize = 256;
/// Connections that the gateways of one cluster may have dialled; one of each gateway is usual.
const CONNECTIONS: usize = 256;
/// A member that is so new that this gateway has not heard of it is waited for.
const MEMBER_PATIENCE: Duration = Duration::from_secs(3);
/// Between the end of a membership and that of its connections.
const FAREWELL: Duration = Duration::from_secs(2);
/// For peers to hear that this gateway ends.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// Gateways of the members of the federation, as the control plane names them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peers(pub BTreeMap<ClusterId, Vec<PeerGateway>>);

/// A gateway of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerGateway {
    /// Where it is dialled.
    pub address: SocketAddr,
    /// Whether a connection is kept up even if nothing is sent: nobody can dial this cluster, and sessions towards
    /// it come on the connections that it dialled.
    pub keep: bool,
}

/// A gateway's end of all trunks.
pub struct Trunk {
    pub(crate) inner: Arc<Inner>,
    socket: SocketStatus,
    stop: CancellationToken,
    /// After everything that runs there.
    _workers: Workers,
}

pub(crate) struct Inner {
    /// Those of each runtime.
    endpoints: Vec<Ends>,
    /// Whose turn it is to dial.
    turn: AtomicUsize,
    client: Arc<QuicClientConfig>,
    server: Arc<QuicServerConfig>,
    revocations: Arc<Revocations>,
    pub(crate) options: TrunkOptions,
    pub(crate) metrics: TrunkMetrics,
    pub(crate) links: Arc<Links>,
    /// One dial per address at a time; the others wait for its connection.
    pub(crate) dialling: Mutex<HashMap<SocketAddr, Arc<tokio::sync::Mutex<()>>>>,
    /// Unknown before the first configuration.
    pub(crate) peers: watch::Sender<Option<Peers>>,
    pub(crate) deliveries: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    draining: AtomicBool,
}

impl Drop for Trunk {
    fn drop(&mut self) {
        self.stop.cancel();
        self.inner.close();
    }
}

impl Trunk {
    /// Binds the endpoints and starts accepting. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// [`TrunkError`].
    pub fn start(
        options: TrunkOptions,
        secrets: &SecretStore,
        metrics: TrunkMetrics,
    ) -> Result<Self, TrunkError> {
        let trust =
            || Validation { trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())), sans: vec![], crl: None };
        let alpn = || vec![ALPN_DATAGRAMS.into(), ALPN_BOTH_WAYS.into(), ALPN.into()];
        let server = secrets.server_config(&DownstreamTls {
            certificate: SecretRef::Sds(WORKLOAD_SVID.into()),
            client_certificate: ClientCertificate::Required(trust()),
            alpn: alpn(),
            min_version: TlsVersion::V1_3,
            options: TlsServerOptions::default(),
        })?;
        let client = secrets.client_config(&UpstreamTls {
            certificate: Some(SecretRef::Sds(WORKLOAD_SVID.into())),
            validation: trust(),
            sni: dial::NAME.into(),
            by_name: false,
            alpn: alpn(),
        })?;
        let tls = |e: quinn::crypto::rustls::NoInitialCipherSuite| TrunkError::Tls(e.to_string());
        let server = Arc::new(QuicServerConfig::try_from(server).map_err(tls)?);
        let client = Arc::new(QuicClientConfig::try_from(client).map_err(tls)?);
        let workers = Workers::start(options.workers.min(port::MOST)).map_err(TrunkError::Thread)?;
        let bound = |e| TrunkError::Bind(options.listen, e);
        let (endpoints, status) = ends::bind(options.listen, &workers.runtimes, &server).map_err(bound)?;
        // Only the first trunk of a process is in its metrics; there is one.
        let _ = metrics.socket.set(status);
        let inner = Arc::new(Inner {
            endpoints,
            turn: AtomicUsize::new(0),
            client,
            server,
            revocations: secrets.revocations(),
            links: metrics.links.clone(),
            metrics,
            options,
            dialling: Mutex::default(),
            peers: watch::Sender::new(None),
            deliveries: Arc::new(Semaphore::new(DELIVERIES)),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
            draining: AtomicBool::new(false),
        });
        let stop = CancellationToken::new();
        // They end with the trunk.
        for e in &inner.endpoints {
            let accept = accept(inner.clone(), e.accepts.clone(), e.runtime.clone());
            e.runtime.spawn(stop.clone().run_until_cancelled_owned(accept));
        }
        tokio::spawn(stop.clone().run_until_cancelled_owned(keep(inner.clone())));
        Ok(Self { inner, socket: status, stop, _workers: workers })
    }

    /// Where peers reach it.
    ///
    /// # Errors
    /// If the socket is gone.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.inner.endpoints.first().ok_or(io::ErrorKind::NotConnected)?.accepts.local_addr()
    }

    /// Every link as it is now, by peer cluster and address.
    #[must_use]
    pub fn links(&self) -> Vec<LinkStatus> {
        self.inner.links.status()
    }

    /// Packets sent to each peer, and those of them given up as lost, over open and closed connections.
    #[must_use]
    pub fn packets(&self) -> BTreeMap<ClusterId, (u64, u64)> {
        self.inner.links.totals().into_iter().map(|(c, t)| (c, (t.packets, t.lost))).collect()
    }

    /// What the kernel granted to the UDP socket.
    #[must_use]
    pub fn socket(&self) -> SocketStatus {
        self.socket
    }

    /// Sets the members of the federation and their gateways. Whoever is no member any more is cut off two seconds
    /// later: what confirms that it left passes here, too. Must run inside a tokio runtime.
    pub fn set_peers(&self, peers: Peers) {
        for link in self.inner.links.all() {
            if !peers.0.contains_key(&link.cluster) && link.leave() {
                let inner = self.inner.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(FAREWELL).await;
                    if inner.peers.borrow().as_ref().is_some_and(|p| p.0.contains_key(&link.cluster)) {
                        link.stay();
                        return;
                    }
                    tracing::info!(cluster = %link.cluster, "no member any more: its trunk is closed");
                    link.connection.close(VarInt::from_u32(3), b"not a member");
                });
            }
        }
        self.inner.peers.send_if_modified(|p| {
            let changed = p.as_ref() != Some(&peers);
            *p = Some(peers);
            changed
        });
    }

    /// Accepts no connection any more and tells every peer, so that new sessions go to other gateways; open ones go
    /// on. Returns when the peers have heard it, or after a second.
    pub async fn drain(&self) {
        self.inner.draining.store(true, Relaxed);
        let mut told: JoinSet<()> = self.inner.links.all().into_iter().map(serve::say_draining).collect();
        let all = async { while told.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN_PATIENCE, all).await.is_err() {
            tracing::info!("not every peer has heard that this gateway drains");
        }
    }

    /// Ends all connections, so that peers know it at once.
    pub async fn close(&self) {
        self.stop.cancel();
        self.inner.close();
        let idle = async {
            for endpoint in self.inner.endpoints.iter().flat_map(Ends::all) {
                endpoint.wait_idle().await;
            }
        };
        // A peer that does not answer is not worth more.
        let _ = tokio::time::timeout(Duration::from_millis(300), idle).await;
    }
}

impl Inner {
    fn close(&self) {
        for endpoint in self.endpoints.iter().flat_map(Ends::all) {
            endpoint.close(VarInt::from_u32(0), b"gateway stopped");
        }
    }

    /// Dials a connection, on the runtime whose turn it is.
    pub(crate) fn dial(
        &self,
        address: SocketAddr,
        congestion: Arc<Chosen>,
    ) -> Result<(Connecting, Handle), ConnectError> {
        let turn = self.turn.fetch_add(1, Relaxed) % self.endpoints.len().max(1);
        let ends = self.endpoints.get(turn).ok_or(ConnectError::EndpointStopping)?;
        let mut config = ClientConfig::new(self.client.clone());
        config.transport_config(transport::transport(congestion, address));
        Ok((ends.dials.connect_with(config, address, dial::NAME)?, ends.runtime.clone()))
    }

    /// The controller of a connection whose peer is not known yet.
    pub(crate) fn congestion(&self) -> Arc<Chosen> {
        Chosen::new(self.options.congestion.of(None))
    }

    /// Takes a connection in whose handshake is over; `None` if its certificate names no cluster.
    pub(crate) fn admit(
        self: &Arc<Self>,
        connection: Connection,
        dialled: Option<SocketAddr>,
        congestion: Arc<Chosen>,
        runtime: &Handle,
    ) -> Option<Arc<Link>> {
        let Some(cluster) = cluster_of(&connection) else {
            connection.close(VarInt::from_u32(1), b"the certificate names no cluster");
            return None;
        };
        let protocol = connection
            .handshake_data()
            .and_then(|d| d.downcast::<HandshakeData>().ok())
            .and_then(|d| d.protocol);
        let is = |alpn: &str| protocol.as_deref() == Some(alpn.as_bytes());
        let datagrams = is(ALPN_DATAGRAMS);
        let both_ways = datagrams || is(ALPN_BOTH_WAYS);
        congestion.set(self.options.congestion.of(Some(&cluster)));
        if let Some(certs) = certificates(&connection) {
            let (revocations, connection) = (self.revocations.clone(), connection.clone());
            runtime.spawn(async move {
                tokio::select! {
                    _ = connection.closed() => {}
                    () = revocations.ends()(&certs) => connection.close(VarInt::from_u32(5), b"revoked"),
                }
            });
        }
        let link = Arc::new(Link::new(connection, cluster, dialled, both_ways, datagrams, congestion));
        serve::start(self, link.clone(), runtime);
        Some(link)
    }

    /// Whether a cluster is a member; one that is not known yet is waited for.
    async fn is_member(&self, cluster: &ClusterId) -> bool {
        let mut peers = self.peers.subscribe();
        let known = peers.wait_for(|p| p.as_ref().is_none_or(|p| p.0.contains_key(cluster)));
        matches!(tokio::time::timeout(MEMBER_PATIENCE, known).await, Ok(Ok(_)))
    }

    async fn handshake(self: Arc<Self>, incoming: Incoming, runtime: Handle) {
        let from = incoming.remote_address();
        let mut config = ServerConfig::with_crypto(self.server.clone());
        let congestion = self.congestion();
        config.transport_config(transport::transport(congestion.clone(), from));
        let shaken = async { incoming.accept_with(Arc::new(config))?.await };
        let connection = match shaken.await {
            Ok(c) => c,
            Err(error) => {
                tracing::info!(%from, %error, "a trunk was refused");
                return;
            }
        };
        if let Some(cluster) = cluster_of(&connection)
            && !self.is_member(&cluster).await
        {
            tracing::warn!(%from, %cluster, "a trunk was refused: the cluster is no member");
            connection.close(VarInt::from_u32(3), b"not a member");
            return;
        }
        if cluster_of(&connection).is_some_and(|c| self.links.accepted(&c) >= CONNECTIONS) {
            tracing::warn!(%from, "a trunk was refused: its cluster has {CONNECTIONS} connections");
            connection.close(VarInt::from_u32(4), b"too many connections");
            return;
        }
        if let Some(link) = self.admit(connection, None, congestion, &runtime) {
            // Its membership may have ended after it was asked for and before the connection was in the list.
            if self.peers.borrow().as_ref().is_some_and(|p| !p.0.contains_key(&link.cluster)) {
                link.connection.close(VarInt::from_u32(3), b"not a member");
                return;
            }
            tracing::info!(%from, cluster = %link.cluster, "a trunk was accepted");
        }
    }
}

pub(crate) fn cluster_of(connection: &Connection) -> Option<ClusterId> {
    peer_identity(&certificates(connection)?)?.cluster
}

fn certificates(connection: &Connection) -> Option<Vec<CertificateDer<'static>>> {
    Some(*connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?)
}

async fn accept(inner: Arc<Inner>, endpoint: Endpoint, runtime: Handle) {
    while let Some(incoming) = endpoint.accept().await {
        if inner.draining.load(Relaxed) {
            incoming.refuse();
            continue;
        }
        let Ok(permit) = inner.handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let (inner, here) = (inner.clone(), runtime.clone());
        runtime.spawn(async move {
            inner.handshake(incoming, here).await;
            drop(permit);
        });
    }
}

/// Keeps up the connections that are to be kept: a task for each.
async fn keep(inner: Arc<Inner>) {
    let mut peers = inner.peers.subscribe();
    let mut kept: HashMap<(ClusterId, SocketAddr), tokio::task::AbortHandle> = HashMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let wanted: Vec<(ClusterId, SocketAddr)> = {
            let p = peers.borrow_and_update();
            let all = p.iter().flat_map(|p| &p.0);
            all.flat_map(|(c, g)| g.iter().filter(|g| g.keep).map(|g| (c.clone(), g.address))).collect()
        };
        kept.retain(|k, task| {
            let stays = wanted.contains(k);
            if !stays {
                task.abort();
            }
            stays
        });
        for k in wanted {
            let (cluster, address) = k.clone();
            kept.entry(k).or_insert_with(|| tasks.spawn(dial::keep_up(inner.clone(), cluster, address)));
        }
        while tasks.try_join_next().is_some() {}
        if peers.changed().await.is_err() {
            return;
        }
    }
}

impl Inner {
    pub(crate) fn dial_lock(&self, address: SocketAddr) -> Arc<tokio::sync::Mutex<()>> {
        let mut d = self.dialling.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody waits for what only the table holds.
        if d.len() > 1024 {
            d.retain(|_, m| Arc::strong_count(m) > 1);
        }
        d.entry(address).or_default().clone()
    }
}
