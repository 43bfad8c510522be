//! One endpoint and what every worker knows about it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use mesh_model::proxy as model;

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Milliseconds on a monotonic clock of this process.
pub(crate) fn now_ms() -> u64 {
    u64::try_from(EPOCH.elapsed().as_millis()).unwrap_or(u64::MAX)
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A number that no other call returns.
pub(crate) fn unique_id() -> u64 {
    NEXT_ID.fetch_add(1, Relaxed)
}

/// Where a host is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum HostAddr {
    Socket(SocketAddr),
    /// `trunk:<name>` and a port, for the dialer hook.
    Trunk(String, u16),
    /// `internal:<name>`: a listener of this proxy.
    Internal(String),
    /// A name that resolution has not answered yet, or that only resolution may answer.
    Unresolved(String, u16),
}

/// State of a host that outlives updates of its weight, health or metadata.
#[derive(Debug)]
pub(crate) struct HostStats {
    /// Key of the connection pools.
    pub(crate) id: u64,
    /// Requests and TCP connections in flight.
    pub(crate) active: AtomicU32,
    /// No longer part of its cluster: pools close.
    pub(crate) gone: AtomicBool,
    pub(super) ejected: AtomicBool,
    pub(super) ejected_until: AtomicU64,
    pub(super) ejections: AtomicU32,
    pub(super) consecutive_5xx: AtomicU32,
    pub(super) consecutive_gateway: AtomicU32,
}

impl HostStats {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            id: unique_id(),
            active: AtomicU32::new(0),
            gone: AtomicBool::new(false),
            ejected: AtomicBool::new(false),
            ejected_until: AtomicU64::new(0),
            ejections: AtomicU32::new(0),
            consecutive_5xx: AtomicU32::new(0),
            consecutive_gateway: AtomicU32::new(0),
        })
    }

    pub(crate) fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }
}

/// The workload behind an endpoint, from `name;namespace;canonical name;revision;cluster`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WorkloadMeta {
    pub(crate) name: Arc<str>,
    pub(crate) namespace: Arc<str>,
    pub(crate) cluster: Arc<str>,
}

impl WorkloadMeta {
    fn parse(s: &str) -> Self {
        let mut it = s.split(';');
        let mut next = || Arc::from(it.next().unwrap_or_default());
        let (name, namespace) = (next(), next());
        let _canonical: Arc<str> = next();
        let _revision: Arc<str> = next();
        Self { name, namespace, cluster: next() }
    }
}

/// An endpoint of a cluster.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) addr: HostAddr,
    /// `address:port`, for logs.
    pub(crate) display: Arc<str>,
    pub(crate) weight: u32,
    pub(crate) health: model::EndpointHealth,
    pub(crate) priority: u32,
    /// Index of its locality in the assignment.
    pub(crate) locality: usize,
    /// Index of its transport socket.
    pub(crate) transport: usize,
    pub(crate) workload: WorkloadMeta,
    pub(crate) stats: Arc<HostStats>,
}

impl Host {
    pub(crate) fn new(
        e: &model::LbEndpoint,
        locality: usize,
        priority: u32,
        transport: usize,
        stats: Option<Arc<HostStats>>,
    ) -> Self {
        let addr = if e.address.starts_with("trunk:") {
            HostAddr::Trunk(e.address.clone(), e.port)
        } else if let Some(name) = e.address.strip_prefix("internal:") {
            HostAddr::Internal(name.to_owned())
        } else {
            match e.address.parse::<IpAddr>() {
                Ok(ip) => HostAddr::Socket(SocketAddr::new(ip, e.port)),
                Err(_) => HostAddr::Unresolved(e.address.clone(), e.port),
            }
        };
        let display = match &addr {
            HostAddr::Socket(a) => a.to_string(),
            HostAddr::Trunk(n, p) | HostAddr::Unresolved(n, p) => format!("{n}:{p}"),
            HostAddr::Internal(n) => format!("internal:{n}"),
        };
        Self {
            addr,
            display: Arc::from(display),
            weight: e.weight.max(1),
            health: e.health,
            priority,
            locality,
            transport,
            workload: WorkloadMeta::parse(&e.workload),
            stats: stats.unwrap_or_else(HostStats::new),
        }
    }

    /// A host outside of any assignment: the original destination of a connection.
    pub(crate) fn original(addr: SocketAddr) -> Self {
        Self {
            addr: HostAddr::Socket(addr),
            display: Arc::from(addr.to_string()),
            weight: 1,
            health: model::EndpointHealth::Healthy,
            priority: 0,
            locality: 0,
            transport: 0,
            workload: WorkloadMeta::default(),
            stats: HostStats::new(),
        }
    }

    pub(crate) fn is_healthy(&self) -> bool {
        self.health == model::EndpointHealth::Healthy && !self.stats.is_ejected()
    }
}

/// Counts something in flight for as long as it lives.
#[derive(Debug)]
pub(crate) struct ActiveGuard(Arc<HostStats>);

impl ActiveGuard {
    pub(crate) fn new(stats: &Arc<HostStats>) -> Self {
        stats.active.fetch_add(1, Relaxed);
        Self(Arc::clone(stats))
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}
