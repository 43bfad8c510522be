//! A control plane whose clusters change while a proxy serves: what an update costs, and whom it disturbs.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use envoy_types::pb::{
    envoy::config::{cluster::v3 as c, core::v3 as core, endpoint::v3 as e},
    google::protobuf,
};
use mesh_xds::{
    AdsService, NodeInfo, PeerInfo, ResourceSource, TypeSnapshot, pb,
    server::{conn, content_version},
    type_url,
};
use prost::Message as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Between two updates.
const PERIOD: Duration = Duration::from_millis(100);

/// `svc-N`, of which `turn` is the only thing that changes.
fn cluster(name: &str, backend: SocketAddr, turn: u64) -> pb::Resource {
    let address = core::SocketAddress {
        address: backend.ip().to_string(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(backend.port().into())),
        ..Default::default()
    };
    let endpoint = e::Endpoint {
        address: Some(core::Address { address: Some(core::address::Address::SocketAddress(address)) }),
        ..Default::default()
    };
    let endpoint = e::LbEndpoint {
        host_identifier: Some(e::lb_endpoint::HostIdentifier::Endpoint(endpoint)),
        ..Default::default()
    };
    let all = e::LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..Default::default() };
    let m = c::Cluster {
        name: name.to_owned(),
        connect_timeout: Some(protobuf::Duration { seconds: 5, nanos: (turn % 1_000_000) as i32 * 1000 }),
        load_assignment: Some(e::ClusterLoadAssignment {
            cluster_name: name.to_owned(),
            endpoints: vec![all],
            ..Default::default()
        }),
        ..Default::default()
    };
    let value = m.encode_to_vec();
    pb::Resource {
        name: name.to_owned(),
        version: content_version(&value),
        resource: Some(pb::Any { type_url: type_url::CDS.to_owned(), value: value.into() }),
        ..pb::Resource::default()
    }
}

struct Clusters {
    now: RwLock<Arc<TypeSnapshot>>,
    changes: watch::Sender<u64>,
}

impl ResourceSource for Clusters {
    fn snapshot(&self, _: &NodeInfo, t: &str) -> Arc<TypeSnapshot> {
        if t != type_url::CDS {
            return Arc::default();
        }
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn authorize(&self, _: &PeerInfo, _: &NodeInfo) -> Result<(), tonic::Status> {
        Ok(())
    }
}

/// An ADS server on loopback.
pub(crate) struct Feed {
    pub(crate) address: SocketAddr,
    changing: Arc<AtomicBool>,
    made: Arc<AtomicU64>,
    stop: CancellationToken,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Feed {
    /// Serves `n` clusters from a thread on this core.
    pub(crate) fn start(n: usize, backend: SocketAddr, cpu: usize) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let all = (0..n).map(|i| cluster(&format!("svc-{i}"), backend, 0));
        let source = Arc::new(Clusters {
            now: RwLock::new(Arc::new(TypeSnapshot::from_versions(all))),
            changes: watch::Sender::new(0),
        });
        let (changing, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let stop = CancellationToken::new();
        let (on, count, end) = (Arc::clone(&changing), Arc::clone(&made), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut set = rustix::thread::CpuSet::new();
            set.set(cpu);
            rustix::thread::sched_setaffinity(None, &set)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                let serving = tonic::transport::Server::builder()
                    .add_service(AdsService::new(Arc::clone(&source)).until(end.clone()))
                    .serve_with_incoming_shutdown(Box::pin(conn::tcp(listener)), end.cancelled_owned());
                let changing = async {
                    let mut tick = tokio::time::interval(PERIOD);
                    loop {
                        tick.tick().await;
                        if !on.load(Relaxed) {
                            continue;
                        }
                        let turn = count.fetch_add(1, Relaxed) + 1;
                        let name = format!("svc-{}", turn.wrapping_mul(7919) % n as u64);
                        let mut now = source.now.write().unwrap_or_else(PoisonError::into_inner);
                        let mut all: Vec<_> = now.resources().cloned().collect();
                        all.push(Arc::new(cluster(&name, backend, turn)));
                        let layers = now.layers().iter().map(|l| l.next(all.clone()));
                        let next = TypeSnapshot::of(layers.collect());
                        *now = Arc::new(next);
                        drop(now);
                        source.changes.send_modify(|v| *v += 1);
                    }
                };
                tokio::select! {
                    r = serving => r?,
                    () = changing => {}
                }
                Ok(())
            })
        });
        Ok(Self { address, changing, made, stop, thread: Some(thread) })
    }

    /// Begins or ends changing a cluster every tenth of a second.
    pub(crate) fn change(&self, on: bool) {
        self.changing.store(on, Relaxed);
    }

    /// Changes made so far.
    pub(crate) fn made(&self) -> u64 {
        self.made.load(Relaxed)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("the control plane of the benchmark failed: {error:#}");
        }
    }
}
