//! The servers: UDP and TCP, the mesh's names from the table, the rest from resolvers behind.
//!
//! A sidecar has one socket of each kind, which may be its predecessor's, served by tasks of the runtime. A cluster's
//! resolver has threads of its own, each with a socket that the kernel gives its share of clients (`SO_REUSEPORT`), and
//! takes and sends datagrams in batches.

mod batch;
mod tcp;
mod udp;
mod worker;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::watch,
    task::JoinHandle,
};

use self::worker::Worker;
use crate::{forward, forward::Upstreams, metrics::Metrics, names::Names};

/// Why it could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken or not ours.
    #[error("cannot listen on {0}")]
    Bind(SocketAddr, #[source] io::Error),
    /// The resolver behind cannot be set up.
    #[error("resolver: {0}")]
    Upstream(String),
    /// It would ask itself.
    #[error("upstream {0} is this resolver itself")]
    Itself(SocketAddr),
    /// No thread for it.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// A running server for one workload; dropping it stops it.
pub struct Server {
    address: SocketAddr,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Server {
    fn drop(&mut self) {
        for t in &self.tasks {
            t.abort();
        }
    }
}

impl Server {
    /// Serves `names` on `address`, UDP and TCP. Foreign names go to `upstream`; `None` uses the
    /// system's resolvers, which must not lead back here (the capture rules exempt the proxy's user).
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(
        address: SocketAddr,
        upstream: Option<SocketAddr>,
        names: watch::Receiver<Arc<Names>>,
    ) -> Result<Self, StartError> {
        let bind = |e| StartError::Bind(address, e);
        let udp = UdpSocket::bind(address).await.map_err(bind)?;
        let address = udp.local_addr().map_err(bind)?;
        let tcp = TcpListener::bind(address).await.map_err(bind)?;
        Self::start_on(udp, tcp, upstream, names)
    }

    /// The same at sockets that are bound already.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_on(
        udp: UdpSocket,
        tcp: TcpListener,
        upstream: Option<SocketAddr>,
        names: watch::Receiver<Arc<Names>>,
    ) -> Result<Self, StartError> {
        let address = udp.local_addr().map_err(|e| StartError::Upstream(e.to_string()))?;
        let metrics = Metrics::new();
        let upstreams = upstream.map_or_else(forward::of_system, |a| vec![a]);
        let upstreams = Arc::new(Upstreams::new(&upstreams, metrics.clone())?);
        let worker = Worker::new(names, upstreams, metrics.worker());
        let tasks =
            [tokio::spawn(udp::serve(Arc::new(udp), worker.clone())), tokio::spawn(tcp::serve(tcp, worker))];
        Ok(Self { address, tasks })
    }

    /// Where it serves.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// What a cluster's resolver needs to know.
pub struct ClusterOptions {
    /// Where it serves, UDP and TCP.
    pub listen: Vec<SocketAddr>,
    /// Threads for datagrams of each address, at least one.
    pub workers: usize,
    /// Resolvers for foreign names, in order; none uses the system's.
    pub upstreams: Vec<SocketAddr>,
    /// The table.
    pub names: watch::Receiver<Arc<Names>>,
    /// Where it counts.
    pub metrics: Metrics,
}

/// A running resolver for a cluster; dropping it stops it at once.
pub struct ClusterServer {
    addresses: Vec<SocketAddr>,
    upstreams: Arc<Upstreams>,
    asked: Vec<SocketAddr>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for ClusterServer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for t in &self.tasks {
            t.abort();
        }
    }
}

impl ClusterServer {
    /// Starts on the current runtime.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(options: ClusterOptions) -> Result<Self, StartError> {
        let ClusterOptions { listen, workers, upstreams, names, metrics } = options;
        let mut bound = Vec::new();
        for address in listen {
            let bind = |e| StartError::Bind(address, e);
            // First, since unlike the others it does not share its address with another process.
            let tcp = TcpListener::bind(address).await.map_err(bind)?;
            let address = tcp.local_addr().map_err(bind)?;
            let sockets: Result<Vec<_>, _> = (0..workers.max(1)).map(|_| datagrams(address)).collect();
            bound.push((address, tcp, sockets.map_err(bind)?));
        }
        let addresses: Vec<_> = bound.iter().map(|(a, ..)| *a).collect();
        let asked = if upstreams.is_empty() {
            let mut all = forward::of_system();
            all.retain(|a| !is_any_of(*a, &addresses));
            all
        } else if let Some(a) = upstreams.iter().find(|a| is_any_of(**a, &addresses)) {
            return Err(StartError::Itself(*a));
        } else {
            upstreams
        };
        let upstreams = Arc::new(Upstreams::new(&asked, metrics.clone())?);
        let stop = Arc::new(AtomicBool::new(false));
        let mut server = Self { addresses, upstreams, asked, stop, threads: Vec::new(), tasks: Vec::new() };
        for (_, tcp, sockets) in bound {
            let worker = || Worker::new(names.clone(), server.upstreams.clone(), metrics.worker());
            server.tasks.push(tokio::spawn(tcp::serve(tcp, worker())));
            for (i, socket) in sockets.into_iter().enumerate() {
                let (worker, stop) = (worker(), server.stop.clone());
                let runtime = tokio::runtime::Handle::current();
                let thread = std::thread::Builder::new()
                    .name(format!("dns-{i}"))
                    .spawn(move || batch::serve(socket, worker, &runtime, &stop))
                    .map_err(StartError::Thread)?;
                server.threads.push(thread);
            }
        }
        Ok(server)
    }

    /// Where it serves.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Whom it asks for foreign names.
    #[must_use]
    pub fn upstreams(&self) -> &[SocketAddr] {
        &self.asked
    }

    /// Takes no more questions, and waits for those that upstreams are being asked, at most for `limit`.
    pub async fn stop(mut self, limit: Duration) {
        self.stop.store(true, Relaxed);
        let threads = std::mem::take(&mut self.threads);
        // They look up once in a while.
        let joined = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|t| drop(t.join())));
        let upstreams = self.upstreams.clone();
        let _ = tokio::time::timeout(limit, async {
            let _ = joined.await;
            upstreams.idle().await;
        })
        .await;
    }
}

/// A socket that shares its address.
fn datagrams(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(true)?;
    // Room for a burst while the worker is not scheduled; as much as the host allows.
    let _ = socket.set_recv_buffer_size(4 << 20);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn is_any_of(upstream: SocketAddr, own: &[SocketAddr]) -> bool {
    let here = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified();
    own.iter().any(|a| {
        a.port() == upstream.port()
            && (a.ip() == upstream.ip() || (a.ip().is_unspecified() && here(upstream.ip())))
    })
}
