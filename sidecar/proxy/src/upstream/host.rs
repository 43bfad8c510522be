//! One endpoint and what every worker knows about it.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use mesh_model::proxy as model;
use tokio::sync::Notify;

use super::load::Load;

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
    /// `unix://<path>`, or `unix://@<name>` of an abstract one.
    Unix(String),
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
    /// The control plane says that it drains: nothing new begins, and pools close as what runs in them ends.
    pub(crate) draining: AtomicBool,
    pub(super) ejected: AtomicBool,
    pub(super) ejected_until: AtomicU64,
    /// Somebody finds out in the background whether it answers again.
    pub(super) dialled_behind: AtomicBool,
    pub(super) ejections: AtomicU32,
    pub(super) consecutive_5xx: AtomicU32,
    pub(super) consecutive_gateway: AtomicU32,
    pub(super) consecutive_local: AtomicU32,
    /// Answers since the last sweep and how many of them were good; counted only where a rate is judged.
    pub(super) answers: AtomicU32,
    pub(super) successes: AtomicU32,
    /// The same for connections, where those are judged on their own.
    pub(super) tries: AtomicU32,
    pub(super) reached: AtomicU32,
    /// What active checks found: bits of [`Check`].
    check: AtomicU8,
    /// Whoever must know when the host becomes unhealthy waits here; made for the first one.
    failed: OnceLock<Box<Notify>>,
    /// When the host began to take traffic, for slow start; milliseconds.
    pub(super) healthy_since: AtomicU64,
    pub(super) ewma: Ewma,
    /// What it says of its load, where that decides.
    pub(super) load: Load,
}

/// What active checks found about a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Check {
    /// It failed, or was not checked yet.
    Failed = 1,
    /// It works, and asks for less.
    Degraded = 2,
    /// It was not checked yet, and does not count for what its cluster can take.
    Pending = 4,
    /// It said itself that it fails, and does not count for what its cluster can take.
    Excluded = 8,
    /// It was not checked yet.
    Unknown = 16,
}

/// Everything that checks may have found.
pub(crate) const CHECKS: [Check; 5] =
    [Check::Failed, Check::Degraded, Check::Pending, Check::Excluded, Check::Unknown];

/// Whether a host takes traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    Healthy,
    /// Takes what healthy hosts cannot.
    Degraded,
    Unhealthy,
}

/// Peak-sensitive moving average of response times: a slower answer counts at once, faster ones by and by.
///
/// Microseconds as an `f32` above the milliseconds of the last sample, in one word so that both fit together. Of two
/// workers that write at once one sample is lost, which an average bears.
#[derive(Debug, Default)]
pub(crate) struct Ewma(AtomicU64);

/// Time after which a sample has lost all but 1/e of its weight.
const EWMA_DECAY_MS: f32 = 10_000.0;
/// What a failure, and a host that has not answered yet, count as: a second.
const EWMA_PENALTY_US: f32 = 1_000_000.0;

impl Ewma {
    /// The average as it has decayed at `now`; `None` without samples.
    fn get(&self, now: u64) -> Option<f32> {
        let v = self.0.load(Relaxed);
        // The clock of 32 bits wraps after 49 days; the difference survives that.
        let age = (now as u32).wrapping_sub(v as u32);
        (v != 0).then(|| f32::from_bits((v >> 32) as u32) * (-(age as f32) / EWMA_DECAY_MS).exp())
    }

    /// Adds a response time; `None` is a failure.
    pub(crate) fn add(&self, now: u64, time: Option<std::time::Duration>) {
        // Never zero, which stands for "no sample".
        let sample = time.map_or(EWMA_PENALTY_US, |t| (t.as_secs_f32() * 1e6).max(1.0));
        let v = self.0.load(Relaxed);
        let old = f32::from_bits((v >> 32) as u32);
        let new = if v == 0 || sample > old {
            sample
        } else {
            let age = (now as u32).wrapping_sub(v as u32);
            let kept = (-(age as f32) / EWMA_DECAY_MS).exp();
            // Samples in quick succession weigh little each, or a burst of fast answers would hide a slow one.
            old * kept + sample * (1.0 - kept)
        };
        self.0.store(u64::from(new.to_bits()) << 32 | u64::from(now as u32), Relaxed);
    }

    /// What one more request would cost with `active` in flight. A host without samples is tried at once, and then
    /// left alone until it has answered.
    pub(super) fn cost(&self, now: u64, active: u32) -> f32 {
        match self.get(now) {
            Some(us) => us * (active as f32 + 1.0),
            None => EWMA_PENALTY_US * active as f32,
        }
    }
}

impl HostStats {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            id: unique_id(),
            active: AtomicU32::new(0),
            gone: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            ejected: AtomicBool::new(false),
            ejected_until: AtomicU64::new(0),
            dialled_behind: AtomicBool::new(false),
            ejections: AtomicU32::new(0),
            consecutive_5xx: AtomicU32::new(0),
            consecutive_gateway: AtomicU32::new(0),
            consecutive_local: AtomicU32::new(0),
            answers: AtomicU32::new(0),
            successes: AtomicU32::new(0),
            tries: AtomicU32::new(0),
            reached: AtomicU32::new(0),
            check: AtomicU8::new(0),
            failed: OnceLock::new(),
            healthy_since: AtomicU64::new(0),
            ewma: Ewma::default(),
            load: Load::default(),
        })
    }

    /// Nothing new begins at it.
    pub(crate) fn is_leaving(&self) -> bool {
        self.gone.load(Relaxed) || self.draining.load(Relaxed)
    }

    pub(crate) fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }

    pub(crate) fn has(&self, c: Check) -> bool {
        self.check.load(Relaxed) & c as u8 != 0
    }

    /// Sets or clears; whether that changed anything.
    pub(crate) fn mark(&self, c: Check, on: bool) -> bool {
        let bit = c as u8;
        let before = if on { self.check.fetch_or(bit, Relaxed) } else { self.check.fetch_and(!bit, Relaxed) };
        (before & bit != 0) != on
    }

    /// Waits until the host becomes unhealthy.
    pub(crate) fn failure(&self) -> &Notify {
        self.failed.get_or_init(Box::default)
    }

    /// Wakes those who wait.
    pub(crate) fn tell_failure(&self) {
        if let Some(n) = self.failed.get() {
            n.notify_waiters();
        }
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
    pub(crate) check: Option<Box<model::EndpointCheck>>,
    pub(crate) slots: model::Slots,
    /// The name by which it was found.
    pub(crate) name: Option<Arc<str>>,
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
        } else if let Some(path) = e.address.strip_prefix(model::UNIX) {
            HostAddr::Unix(path.to_owned())
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
            HostAddr::Unix(path) => path.clone(),
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
            check: e.check.clone(),
            slots: e.slots.clone(),
            name: None,
            stats: stats.unwrap_or_else(|| {
                let new = HostStats::new();
                new.healthy_since.store(now_ms(), Relaxed);
                new
            }),
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
            check: None,
            slots: model::Slots::None,
            name: None,
            stats: HostStats::new(),
        }
    }

    /// A host outside of any assignment that a name resolved to.
    pub(crate) fn named(addr: SocketAddr, name: &Arc<str>) -> Self {
        Self { name: Some(Arc::clone(name)), ..Self::original(addr) }
    }

    /// Whether it is there.
    pub(crate) fn is_at(&self, addr: SocketAddr) -> bool {
        self.addr == HostAddr::Socket(addr)
    }

    /// The host as its checks see it, which may be another port or address.
    pub(crate) fn for_checks(&self, port: u16) -> Self {
        let mut addr = self.addr.clone();
        if let HostAddr::Socket(a) = &mut addr {
            if port != 0 {
                a.set_port(port);
            }
            if let Some(c) = &self.check {
                if c.port != 0 {
                    a.set_port(c.port);
                }
                if let Ok(ip) = c.address.parse() {
                    a.set_ip(ip);
                }
            }
        }
        Self {
            addr,
            display: Arc::clone(&self.display),
            workload: self.workload.clone(),
            check: self.check.clone(),
            slots: self.slots.clone(),
            stats: Arc::clone(&self.stats),
            name: self.name.clone(),
            ..*self
        }
    }

    /// Its name in a ring: endpoints behind one gateway differ by the slot that they stand for.
    pub(crate) fn hash_name(&self) -> Cow<'_, str> {
        match self.slots {
            model::Slots::Asks(slot) => Cow::Owned(format!("{}/{slot:08x}", self.display)),
            _ => Cow::Borrowed(&self.display),
        }
    }

    /// What the control plane, passive detection and active checks say together: the worst counts.
    pub(crate) fn health(&self) -> Health {
        use model::EndpointHealth as E;
        let bad = matches!(self.health, E::Unhealthy | E::Draining);
        if bad || self.stats.is_ejected() || self.stats.has(Check::Failed) {
            Health::Unhealthy
        } else if self.health == E::Degraded || self.stats.has(Check::Degraded) {
            Health::Degraded
        } else {
            Health::Healthy
        }
    }

    /// Takes traffic, be it as one of the second choice.
    pub(crate) fn is_usable(&self) -> bool {
        self.health() != Health::Unhealthy
    }

    /// Why it is not healthy, in Envoy's words: `/failed_active_hc/failed_eds_health`, or `healthy`.
    pub(crate) fn flags(&self) -> String {
        use model::EndpointHealth as E;
        let s = &self.stats;
        let all = [
            ("/failed_active_hc", s.has(Check::Failed)),
            ("/failed_outlier_check", s.is_ejected()),
            ("/failed_eds_health", self.health == E::Unhealthy),
            ("/degraded_active_hc", s.has(Check::Degraded)),
            ("/degraded_eds_health", self.health == E::Degraded),
            ("/pending_active_hc", s.has(Check::Pending)),
            ("/excluded_via_immediate_hc_fail", s.has(Check::Excluded)),
            ("/eds_status_draining", self.health == E::Draining),
        ];
        let flags: String = all.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
        if flags.is_empty() { "healthy".to_owned() } else { flags }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn averages_peak_at_once_and_decay() {
        let e = Ewma::default();
        let ms = Duration::from_millis;
        assert_eq!(e.cost(5, 0), 0.0, "an unknown host is tried");
        assert!(e.cost(5, 1) >= 1e6, "but not twice");
        e.add(1000, Some(ms(10)));
        assert!((e.cost(1000, 0) - 10_000.0).abs() < 1.0);
        assert!((e.cost(1000, 2) - 30_000.0).abs() < 1.0);
        e.add(1001, Some(ms(50)));
        assert!((e.cost(1001, 0) - 50_000.0).abs() < 1.0, "a peak counts at once");
        for t in 0..100 {
            e.add(1002 + t, Some(ms(1)));
        }
        let cost = e.cost(1101, 0);
        assert!((45_000.0..50_000.0).contains(&cost), "fast answers within 100 ms hide nothing: {cost}");
        assert!((e.cost(1101 + 10_000, 0) / cost - 0.368).abs() < 0.01);
        e.add(12_000, None);
        assert!(e.cost(12_000, 0) >= 1e6);
    }
}
