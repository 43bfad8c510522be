//! Dialling and accepting.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mesh_identity::{SecretStore, TRUST_BUNDLE, WORKLOAD_SVID, peer_identity};
use mesh_model::{
    ClusterId,
    proxy::{ClientCertificate, DownstreamTls, SecretRef, TlsVersion, UpstreamTls, Validation},
};
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use quinn::{
    ClientConfig, Connection, Endpoint, ServerConfig, TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::pki_types::CertificateDer;
use tokio::{net::TcpStream, sync::Semaphore, task::JoinHandle};

use crate::{
    ALPN, TrunkStream,
    congestion::Congestion,
    watch::{self, KEEP_ALIVE, Lost},
};

/// A QUIC handshake that takes longer is taken for blocked UDP; TCP then has half a second left of
/// the two in which a session must be under way.
pub const QUIC_PATIENCE: Duration = Duration::from_millis(1500);
/// TCP takes over for this long before QUIC is tried again.
const TCP_HOLD: Duration = Duration::from_secs(10);
/// The same, when the peer answered and refused.
const REFUSED_HOLD: Duration = Duration::from_secs(1);
/// TCP connect.
const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection without a packet from the peer for this long is dead.
const IDLE: Duration = Duration::from_secs(20);
/// Sessions that a peer may have open at once on one connection.
const STREAMS: u32 = 8192;
/// Sessions being connected to the local listener at once, over all peers.
const DELIVERIES: usize = 4096;

/// How a trunk is started.
#[derive(Debug, Clone)]
pub struct TrunkOptions {
    /// UDP address for peers.
    pub listen: SocketAddr,
    /// The gateway's own east-west listener, to which accepted sessions are handed.
    pub deliver_to: SocketAddr,
    /// Congestion control of every connection, in the direction from this gateway.
    pub congestion: Congestion,
}

/// Why it could not start.
#[derive(Debug, thiserror::Error)]
pub enum TrunkError {
    /// TLS settings.
    #[error(transparent)]
    Identity(#[from] mesh_identity::IdentityError),
    /// TLS settings that QUIC cannot use.
    #[error("QUIC cannot use the TLS configuration: {0}")]
    Tls(String),
    /// The address cannot be bound.
    #[error("trunk address {0}")]
    Bind(SocketAddr, #[source] io::Error),
}

/// What carries sessions to an address now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// QUIC.
    Quic,
    /// TCP, since QUIC failed recently.
    Tcp,
    /// Nothing was dialled yet.
    Unused,
}

/// Counters of a trunk.
#[derive(Debug, Clone, Default)]
pub struct TrunkMetrics {
    /// Sessions opened over QUIC.
    pub quic_sessions: Counter,
    /// Sessions opened over TCP because QUIC did not get through.
    pub tcp_sessions: Counter,
    /// Sessions accepted from peers.
    pub accepted_sessions: Counter,
    /// QUIC handshakes that failed, and connections that stopped reaching their peer.
    pub quic_failures: Counter,
}

impl TrunkMetrics {
    /// Registers the counters as `flotilla_trunk_*`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        let r = registry.sub_registry_with_prefix("flotilla_trunk");
        r.register("quic_sessions", "Sessions opened over QUIC", m.quic_sessions.clone());
        r.register("tcp_sessions", "Sessions opened over TCP for want of QUIC", m.tcp_sessions.clone());
        r.register("accepted_sessions", "Sessions accepted from peers", m.accepted_sessions.clone());
        r.register("quic_failures", "QUIC handshakes that failed", m.quic_failures.clone());
        m
    }
}

/// A gateway's end of all trunks.
pub struct Trunk {
    endpoint: Endpoint,
    metrics: TrunkMetrics,
    peers: Arc<Peers>,
    /// One dial per address at a time; the others wait for its connection.
    dialling: Mutex<HashMap<SocketAddr, Arc<tokio::sync::Mutex<()>>>>,
    accept: JoinHandle<()>,
}

type Peers = Mutex<HashMap<SocketAddr, Peer>>;

enum Peer {
    Quic(Connection),
    TcpUntil(Instant),
}

impl Drop for Trunk {
    fn drop(&mut self) {
        self.accept.abort();
        self.endpoint.close(VarInt::from_u32(0), b"gateway stopped");
    }
}

fn transport(congestion: Congestion) -> Arc<TransportConfig> {
    let mut t = TransportConfig::default();
    t.max_concurrent_bidi_streams(VarInt::from_u32(STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .keep_alive_interval(Some(KEEP_ALIVE))
        // Both constants are far below QUIC's limit of 2^62 ms.
        .max_idle_timeout(quinn::IdleTimeout::try_from(IDLE).ok())
        // One session may not starve the others: 1 MiB each, 16 MiB together.
        .stream_receive_window(VarInt::from_u32(1 << 20))
        .receive_window(VarInt::from_u32(16 << 20))
        .send_window(16 << 20)
        .congestion_controller_factory(congestion.factory());
    Arc::new(t)
}

impl Trunk {
    /// Binds the endpoint and starts accepting. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// [`TrunkError`].
    pub fn start(
        options: TrunkOptions,
        secrets: &SecretStore,
        metrics: TrunkMetrics,
    ) -> Result<Self, TrunkError> {
        let trust = || Validation { trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())), sans: vec![] };
        let server = secrets.server_config(&DownstreamTls {
            certificate: SecretRef::Sds(WORKLOAD_SVID.into()),
            client_certificate: ClientCertificate::Required(trust()),
            alpn: vec![ALPN.into()],
            min_version: TlsVersion::V1_3,
        })?;
        let client = secrets.client_config(&UpstreamTls {
            certificate: Some(SecretRef::Sds(WORKLOAD_SVID.into())),
            validation: trust(),
            sni: "trunk.flotilla.internal".into(),
            alpn: vec![ALPN.into()],
        })?;
        let tls = |e: quinn::crypto::rustls::NoInitialCipherSuite| TrunkError::Tls(e.to_string());
        let server = QuicServerConfig::try_from(server).map_err(tls)?;
        let mut server = ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport(options.congestion));
        let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).map_err(tls)?));
        client.transport_config(transport(options.congestion));
        let mut endpoint =
            Endpoint::server(server, options.listen).map_err(|e| TrunkError::Bind(options.listen, e))?;
        endpoint.set_default_client_config(client);
        let accept = tokio::spawn(accept(endpoint.clone(), options.deliver_to, metrics.clone()));
        Ok(Self { endpoint, metrics, peers: Arc::default(), dialling: Mutex::default(), accept })
    }

    /// Where peers reach it.
    ///
    /// # Errors
    /// If the socket is gone.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<SocketAddr, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What carries sessions to `address` now.
    #[must_use]
    pub fn path(&self, address: SocketAddr) -> Path {
        match self.peers().get(&address) {
            Some(Peer::Quic(c)) if c.close_reason().is_none() => Path::Quic,
            Some(Peer::TcpUntil(t)) if *t > Instant::now() => Path::Tcp,
            _ => Path::Unused,
        }
    }

    /// Opens a session to the gateway at `address`, which must be of cluster `expect`.
    ///
    /// # Errors
    /// If neither QUIC nor TCP gets through, or the gateway is of another cluster.
    pub async fn dial(&self, address: SocketAddr, expect: Option<&ClusterId>) -> io::Result<TrunkStream> {
        if let Some(connection) = self.connection(address).await {
            check_cluster(&connection, expect)?;
            match connection.open_bi().await {
                Ok((send, recv)) => {
                    self.metrics.quic_sessions.inc();
                    return Ok(TrunkStream::Quic(send, recv));
                }
                Err(error) => {
                    tracing::info!(%address, %error, "a trunk broke");
                    self.peers().remove(&address);
                }
            }
        }
        // The inner session authenticates the workload; plain TCP to a gateway is what Istio has too.
        let tcp = tokio::time::timeout(TCP_TIMEOUT, TcpStream::connect(address))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        tcp.set_nodelay(true)?;
        self.metrics.tcp_sessions.inc();
        Ok(TrunkStream::Tcp(tcp))
    }

    /// A live connection, or `None` while TCP has taken over.
    async fn connection(&self, address: SocketAddr) -> Option<Connection> {
        let known = |peers: &HashMap<SocketAddr, Peer>| match peers.get(&address) {
            Some(Peer::Quic(c)) if c.close_reason().is_none() => Some(Some(c.clone())),
            Some(Peer::TcpUntil(t)) if *t > Instant::now() => Some(None),
            _ => None,
        };
        if let Some(k) = known(&self.peers()) {
            return k;
        }
        let guard = {
            let mut d = self.dialling.lock().unwrap_or_else(PoisonError::into_inner);
            d.entry(address).or_default().clone()
        };
        let _one = guard.lock().await;
        if let Some(k) = known(&self.peers()) {
            return k;
        }
        let dial = async {
            // The name only has to be one: whom the certificate may name is checked afterwards.
            let connecting =
                self.endpoint.connect(address, "trunk.flotilla.internal").map_err(|e| e.to_string())?;
            connecting.await.map_err(|e| e.to_string())
        };
        // A peer that answers and refuses may only be starting; silence is a network that eats UDP.
        let (result, hold) = match tokio::time::timeout(QUIC_PATIENCE, dial).await {
            Ok(r) => (r, REFUSED_HOLD),
            Err(_) => (Err(format!("no answer within {} ms", QUIC_PATIENCE.as_millis())), TCP_HOLD),
        };
        match result {
            Ok(connection) => {
                tracing::info!(%address, "trunk is up");
                self.peers().insert(address, Peer::Quic(connection.clone()));
                tokio::spawn(watch(connection.clone(), address, self.peers.clone(), self.metrics.clone()));
                Some(connection)
            }
            Err(error) => {
                tracing::warn!(%address, %error, "QUIC does not get through: TCP takes over");
                self.metrics.quic_failures.inc();
                self.peers().insert(address, Peer::TcpUntil(Instant::now() + hold));
                None
            }
        }
    }
}

/// Gives a connection up that leads nowhere: TCP takes over, or says at once that nobody is there. Ends
/// with the connection.
async fn watch(connection: Connection, address: SocketAddr, peers: Arc<Peers>, metrics: TrunkMetrics) {
    let Some(lost) = watch::lost(&connection, address).await else { return };
    let reason: &[u8] = match lost {
        Lost::Blocked => {
            tracing::warn!(%address, "UDP no longer gets through: TCP takes over");
            b"UDP is blocked"
        }
        Lost::Gone => {
            tracing::warn!(%address, "the gateway is gone: its sessions end");
            b"no answer"
        }
    };
    metrics.quic_failures.inc();
    let over = Peer::TcpUntil(Instant::now() + TCP_HOLD);
    peers.lock().unwrap_or_else(PoisonError::into_inner).insert(address, over);
    connection.close(VarInt::from_u32(2), reason);
}

fn cluster_of(connection: &Connection) -> Option<ClusterId> {
    let certs = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    peer_identity(&certs)?.cluster
}

fn check_cluster(connection: &Connection, expect: Option<&ClusterId>) -> io::Result<()> {
    let Some(expect) = expect else { return Ok(()) };
    let seen = cluster_of(connection);
    if seen.as_ref() == Some(expect) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("the gateway is of cluster {seen:?}, not of {expect}"),
    ))
}

async fn accept(endpoint: Endpoint, deliver_to: SocketAddr, metrics: TrunkMetrics) {
    let permits = Arc::new(Semaphore::new(DELIVERIES));
    while let Some(incoming) = endpoint.accept().await {
        let (metrics, permits) = (metrics.clone(), permits.clone());
        tokio::spawn(async move {
            let from = incoming.remote_address();
            let connection = match incoming.await {
                Ok(c) => c,
                Err(error) => {
                    tracing::info!(%from, %error, "a trunk was refused");
                    return;
                }
            };
            let cluster = cluster_of(&connection);
            tracing::info!(%from, ?cluster, "a trunk was accepted");
            if cluster.is_none() {
                connection.close(VarInt::from_u32(1), b"the certificate names no cluster");
                return;
            }
            while let Ok((send, recv)) = connection.accept_bi().await {
                let Ok(permit) = permits.clone().acquire_owned().await else { return };
                metrics.accepted_sessions.inc();
                tokio::spawn(async move {
                    let mut session = TrunkStream::Quic(send, recv);
                    match tokio::time::timeout(TCP_TIMEOUT, TcpStream::connect(deliver_to)).await {
                        Ok(Ok(mut local)) => {
                            drop(permit);
                            let _ = local.set_nodelay(true);
                            // Whoever breaks first ends the session; both ends see it.
                            let _ = tokio::io::copy_bidirectional(&mut session, &mut local).await;
                        }
                        Ok(Err(error)) => {
                            tracing::warn!(%error, %deliver_to, "the east-west listener is away")
                        }
                        Err(_) => tracing::warn!(%deliver_to, "the east-west listener does not answer"),
                    }
                });
            }
        });
    }
}
