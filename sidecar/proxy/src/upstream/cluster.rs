//! A cluster: its configuration, hosts, limits and passive health, shared by all workers.

use std::{
    collections::HashMap,
    sync::{
        Arc, LazyLock, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_model::proxy as model;
use tokio::runtime::Handle;

use super::{
    connect::TlsTransport,
    health::Counts,
    host::{CHECKS, Check, Host, HostStats, now_ms, unique_id},
    lb::{LbConfig, LbTables, stable_hash},
    names::Names,
    outlier,
    recent::Recent,
    silence::is_far,
};
use crate::{http::headers::Headers, refusal::Refusal};

/// The place of a cluster by name: routes keep it, so an update of the cluster needs no recompiled route.
#[derive(Debug)]
pub(crate) struct ClusterSlot {
    pub(crate) id: u64,
    pub(crate) name: Arc<str>,
    pub(crate) service: ServiceName,
    /// Traffic that may ask for clusters has used it.
    pub(crate) used: AtomicBool,
    current: ArcSwapOption<Cluster>,
}

/// The service that a cluster name such as `outbound|9080|v1|reviews.books.svc.cluster.local` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceName {
    /// Whole host; empty for names of another form and for inbound clusters without host.
    pub(crate) host: Arc<str>,
    pub(crate) name: Arc<str>,
    pub(crate) namespace: Arc<str>,
}

impl Default for ServiceName {
    /// No service: clusters that are named in another way are many in some meshes, so they share it.
    fn default() -> Self {
        static NONE: LazyLock<Arc<str>> = LazyLock::new(|| Arc::from(""));
        Self { host: Arc::clone(&NONE), name: Arc::clone(&NONE), namespace: Arc::clone(&NONE) }
    }
}

impl ServiceName {
    pub(crate) fn of_cluster(cluster: &str) -> Self {
        let mut parts = cluster.splitn(4, '|');
        let host = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("outbound" | "inbound"), Some(_), Some(_), Some(host)) => host,
            _ => "",
        };
        if host.is_empty() {
            return Self::default();
        }
        Self::of_host(host)
    }

    pub(crate) fn of_host(host: &str) -> Self {
        let mut labels = host.splitn(4, '.');
        let (name, namespace) = match (labels.next(), labels.next(), labels.next()) {
            (Some(name), Some(ns), Some("svc")) => (name, ns),
            _ => (host, ""),
        };
        Self { host: Arc::from(host), name: Arc::from(name), namespace: Arc::from(namespace) }
    }
}

impl ClusterSlot {
    pub(crate) fn new(name: &str) -> Arc<Self> {
        Arc::new(Self {
            id: unique_id(),
            name: Arc::from(name),
            service: ServiceName::of_cluster(name),
            used: AtomicBool::new(false),
            current: ArcSwapOption::empty(),
        })
    }

    pub(crate) fn load(&self) -> Option<Arc<Cluster>> {
        self.current.load_full()
    }

    /// Calls with the namespace of its service, as far as its configuration says it and its name does not.
    pub(crate) fn with_namespace<T>(&self, f: impl FnOnce(&str) -> T) -> T {
        if !self.service.namespace.is_empty() {
            return f("");
        }
        f(self.current.load().as_ref().map_or("", |c| &c.config.namespace))
    }

    /// Takes note of its use by traffic that may ask for clusters.
    pub(crate) fn touch(&self) {
        touch(&self.used);
    }

    pub(crate) fn store(&self, cluster: Option<Arc<Cluster>>) {
        self.current.store(cluster);
    }
}

/// Sets a flag that many workers set; mostly they find it set.
pub(crate) fn touch(flag: &AtomicBool) {
    if !flag.load(Relaxed) {
        flag.store(true, Relaxed);
    }
}

/// How connections to an endpoint are made.
#[derive(Debug)]
pub(crate) struct TransportSocket {
    labels: Vec<(String, String)>,
    pub(crate) tls: Option<TlsTransport>,
    /// The endpoint's proxy takes CONNECT streams; a number for the TLS settings, by which endpoints of one address
    /// share connections.
    pub(crate) hbone: Option<u64>,
}

/// Counts of a cluster, over all workers; they outlive configuration changes.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    pub(crate) connections: AtomicU32,
    pub(crate) pending: AtomicU32,
    pub(crate) requests: AtomicU32,
    pub(crate) retries: AtomicU32,
    /// Shared sessions that limits do not see: what they carry is counted.
    pub(crate) sessions: AtomicU32,
    /// Requests of late, where a retry budget looks at them.
    pub(crate) recent: Recent,
    /// There was a connection for traffic, and so hosts are checked as often as is configured.
    pub(crate) used: AtomicBool,
}

/// One use of a limited resource.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Usage>, fn(&Usage) -> &AtomicU32);

impl Permit {
    /// `None`: the limit is reached.
    pub(crate) fn take(usage: &Arc<Usage>, which: fn(&Usage) -> &AtomicU32, limit: u32) -> Option<Self> {
        let before = which(usage).fetch_add(1, Relaxed);
        let permit = Self(Arc::clone(usage), which);
        (before < limit).then_some(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Relaxed);
    }
}

/// What a request or connection showed about its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// HTTP status.
    Status(u16),
    /// Connect failed, or the connection broke before an answer.
    Failed,
    /// The answer did not come in time.
    Timeout,
    /// A TCP connection was established.
    Connected,
    /// A gateway on the way refused to pass it on.
    Refused(Refusal),
}

/// A running cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) config: Arc<model::Cluster>,
    pub(crate) sockets: Vec<TransportSocket>,
    pub(crate) usage: Arc<Usage>,
    /// Counts of active checks; they outlive configuration changes like `usage`.
    pub(crate) checks: Arc<Counts>,
    /// Its names were resolved, or need not be.
    pub(crate) resolved: AtomicBool,
    tables: ArcSwap<LbTables>,
    /// Guards rebuilding, never held while a request picks.
    members: Mutex<Members>,
    /// Hosts that requests name, instead of members.
    names: OnceLock<Arc<Names>>,
}

#[derive(Debug, Default)]
struct Members {
    assignment: Arc<model::LoadAssignment>,
    hosts: Vec<Arc<Host>>,
    last_sweep: u64,
    /// When hosts that a gateway spoke for return; 0 if there are none.
    refused_until: u64,
    /// Slow start held hosts back when the tables were built.
    slow: bool,
    last_built: u64,
}

/// How long endpoints are left alone that a gateway refused, in milliseconds.
const REFUSED_MS: u64 = 2_000;

/// How long endpoints from which nothing is heard are left alone before traffic asks again, in milliseconds, unless
/// they answer sooner.
const SUSPECTED_MS: u64 = 10_000;

/// Identity of a host over updates: same place reached the same way.
type HostKey = (String, u16, usize, Option<u32>, u32);

fn key(e: &model::LbEndpoint, socket: usize, nth: u32) -> HostKey {
    (e.address.clone(), e.port, socket, asked(&e.slots), nth)
}

/// The slot behind a gateway; a workload is the same whichever slots it serves.
fn asked(s: &model::Slots) -> Option<u32> {
    match s {
        model::Slots::Asks(slot) => Some(*slot),
        _ => None,
    }
}

impl Cluster {
    /// Builds a cluster; hosts of `previous` that are reached the same way keep their state and pools.
    pub(crate) fn new(config: Arc<model::Cluster>, previous: Option<&Cluster>) -> Self {
        let mut sockets = vec![TransportSocket {
            labels: vec![],
            tls: config.tls.as_deref().cloned().map(TlsTransport::new),
            hbone: None,
        }];
        sockets.extend(config.tls_matches.iter().map(|m| TransportSocket {
            labels: m.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            tls: m.tls.clone().map(TlsTransport::new),
            hbone: m.hbone.then(|| stable_hash(format!("{:?}", m.tls).as_bytes())),
        }));
        let names =
            matches!(config.discovery, model::Discovery::StrictDns(_) | model::Discovery::LogicalDns(_));
        let this = Self {
            config,
            sockets,
            usage: previous.map(|p| Arc::clone(&p.usage)).unwrap_or_default(),
            checks: previous.map(|p| Arc::clone(&p.checks)).unwrap_or_default(),
            resolved: AtomicBool::new(!names),
            tables: ArcSwap::from_pointee(LbTables::default()),
            members: Mutex::new(Members::default()),
            names: OnceLock::new(),
        };
        if let Some(p) = previous {
            let old = p.members.lock().unwrap_or_else(PoisonError::into_inner);
            if same_transport(&p.config, &this.config) {
                let mut m = this.members.lock().unwrap_or_else(PoisonError::into_inner);
                m.hosts.clone_from(&old.hosts);
                m.refused_until = old.refused_until;
            } else {
                for h in &old.hosts {
                    h.stats.gone.store(true, Relaxed);
                }
            }
        }
        this
    }

    /// Hosts are what names resolve to from here on. Those that are known stay, if they are reached the same way.
    pub(crate) fn find_by_name(&self, hosts: &model::NamedHosts, control: &Handle, before: Option<&Cluster>) {
        let known = before
            .filter(|b| same_transport(&b.config, &self.config))
            .and_then(Self::names)
            .filter(|n| n.config() == hosts)
            .cloned();
        let tls = self.config.tls.is_some();
        let names = known.unwrap_or_else(|| Names::new(control.clone(), hosts.clone(), tls));
        let _ = self.names.set(names);
    }

    /// Where to find hosts by name, if that is how they are found.
    pub(crate) fn names(&self) -> Option<&Arc<Names>> {
        self.names.get()
    }

    /// How long a connection may take to be made.
    pub(crate) fn connect_limit(&self) -> Duration {
        self.config.connect_timeout.max(Duration::from_millis(1))
    }

    /// Whether connections to a host may be streams of a session that TLS agrees on.
    pub(crate) fn may_tunnel(&self, host: &Host) -> bool {
        let tls = self.sockets.get(host.transport).and_then(|s| s.tls.as_ref());
        self.config.proxy_protocol.is_none() && tls.is_some_and(TlsTransport::offers_tunnels)
    }

    /// Whether a host is reached through the proxy at its address.
    pub(crate) fn is_hbone(&self, host: &Host) -> bool {
        self.sockets.get(host.transport).is_some_and(|s| s.hbone.is_some())
    }

    /// The number of a host's tunnels: endpoints at one address with the same identity share them.
    pub(crate) fn tunnels_of(&self, host: &Host) -> u64 {
        match (self.sockets.get(host.transport).and_then(|s| s.hbone), &host.addr) {
            (Some(tls), super::host::HostAddr::Socket(a)) => {
                let mut key = [0; 24];
                key[..8].copy_from_slice(&tls.to_ne_bytes());
                match a.ip() {
                    std::net::IpAddr::V4(ip) => key[8..12].copy_from_slice(&ip.octets()),
                    std::net::IpAddr::V6(ip) => key[8..].copy_from_slice(&ip.octets()),
                }
                // Numbers of hosts count from one and never get here.
                stable_hash(&key) | 1 << 63
            }
            _ => host.stats.id,
        }
    }

    fn socket_of(&self, e: &model::LbEndpoint) -> usize {
        let fits = |s: &TransportSocket| s.labels.iter().all(|(k, v)| e.transport_labels.get(k) == Some(v));
        self.sockets.iter().skip(1).position(fits).map_or(0, |i| i + 1)
    }

    /// Replaces the hosts. Hosts that stay keep their pools, counters and ejection.
    pub(crate) fn set_assignment(&self, assignment: Arc<model::LoadAssignment>) {
        let mut m = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let mut old: HashMap<HostKey, Arc<HostStats>> = HashMap::with_capacity(m.hosts.len());
        for h in &m.hosts {
            let (address, port) = match &h.addr {
                super::host::HostAddr::Socket(a) => (a.ip().to_string(), a.port()),
                super::host::HostAddr::Internal(n) => (format!("internal:{n}"), 0),
                super::host::HostAddr::Unix(path) => (format!("{}{path}", model::UNIX), 0),
                super::host::HostAddr::Trunk(n, p) | super::host::HostAddr::Unresolved(n, p) => {
                    (n.clone(), *p)
                }
            };
            let mut k = (address, port, h.transport, asked(&h.slots), 0);
            while old.contains_key(&k) {
                k.4 += 1;
            }
            old.insert(k, Arc::clone(&h.stats));
        }
        let sick: Vec<u64> = m
            .hosts
            .iter()
            .filter(|h| !matches!(h.health, model::EndpointHealth::Healthy | model::EndpointHealth::Degraded))
            .map(|h| h.stats.id)
            .collect();
        let ranks: HashMap<u64, u32> =
            m.hosts.iter().filter(|h| h.stats.is_ejected()).map(|h| (h.stats.id, h.priority)).collect();
        let mut hosts = Vec::new();
        for (i, l) in assignment.localities.iter().enumerate() {
            for e in &l.endpoints {
                let socket = self.socket_of(e);
                let stats = (0..4).find_map(|nth| old.remove(&key(e, socket, nth)));
                let known = stats.is_some();
                let host = Host::new(e, i, l.priority, socket, stats);
                self.expect_check(&host, known);
                host.stats.draining.store(host.health == model::EndpointHealth::Draining, Relaxed);
                // The control plane ranks it higher than when it failed, for instance since a lease is live again:
                // what is held against it is of the time before.
                if ranks.get(&host.stats.id).is_some_and(|before| host.priority < *before) {
                    host.stats.ejected.store(false, Relaxed);
                }
                // Whoever was sick when the cluster was last built and is well again starts slowly, too.
                if sick.contains(&host.stats.id) && host.health == model::EndpointHealth::Healthy {
                    host.stats.healthy_since.store(now_ms(), Relaxed);
                }
                hosts.push(Arc::new(host));
            }
        }
        for stats in old.into_values() {
            stats.gone.store(true, Relaxed);
        }
        m.hosts = hosts;
        m.assignment = assignment;
        self.rebuild(&mut m);
    }

    /// A host that is to be checked is unhealthy until it was, unless it served before anybody asked for checks.
    fn expect_check(&self, host: &Host, known: bool) {
        let off = host.check.as_ref().is_some_and(|c| c.disabled);
        match &self.config.health {
            Some(h) if !off && !known => {
                host.stats.mark(Check::Failed, true);
                host.stats.mark(Check::Unknown, true);
                host.stats.mark(Check::Pending, h.ignore_new_hosts);
            }
            Some(_) if !off => {}
            _ => CHECKS.iter().for_each(|c| {
                host.stats.mark(*c, false);
            }),
        }
    }

    /// What active checks found is to be seen by those who pick.
    pub(crate) fn health_changed(&self) {
        self.rebuild(&mut self.members.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A host said in an answer to traffic that it is to be taken out at once.
    pub(crate) fn fail_at_once(&self, host: &Host) {
        if self.config.health.is_none() {
            return;
        }
        let failed = host.stats.mark(Check::Failed, true);
        let excluded = host.stats.mark(Check::Excluded, true);
        if failed || excluded {
            tracing::info!(cluster = %self.config.name, host = %host.display, "host took itself out");
            self.checks.passive_failure.fetch_add(1, Relaxed);
            host.stats.tell_failure();
            self.health_changed();
        }
    }

    fn rebuild(&self, m: &mut Members) {
        let weights: Vec<u32> = m.assignment.localities.iter().map(|l| l.weight).collect();
        let c = LbConfig {
            policy: self.config.lb,
            panic_threshold: self.config.panic_threshold,
            locality_weighted: self.config.locality_weighted,
            overprovisioning: m.assignment.overprovisioning,
            slow_start: self.config.slow_start,
            reports: self
                .config
                .utilization
                .as_ref()
                .filter(|_| self.config.lb == model::LbPolicy::Utilization)
                .map(|u| (millis(u.blackout), millis(u.expiration))),
            now: now_ms(),
        };
        m.slow = c.slow_start.is_some() && m.hosts.iter().any(|h| c.is_new(h));
        m.last_built = c.now;
        // Where turns begin is random: tables that are rebuilt often would else favour whoever comes first in them.
        let seed = stable_hash(&unique_id().to_ne_bytes());
        self.tables.store(Arc::new(LbTables::new(m.hosts.clone(), &weights, c, seed)));
    }

    pub(crate) fn tables(&self) -> arc_swap::Guard<Arc<LbTables>> {
        self.tables.load()
    }

    pub(crate) fn assignment(&self) -> Arc<model::LoadAssignment> {
        Arc::clone(&self.members.lock().unwrap_or_else(PoisonError::into_inner).assignment)
    }

    /// The cluster is removed: its pools close as they become idle.
    pub(crate) fn retire(&self) {
        for h in &self.members.lock().unwrap_or_else(PoisonError::into_inner).hosts {
            h.stats.gone.store(true, Relaxed);
        }
    }

    /// Whether response times are of use.
    pub(crate) fn wants_times(&self) -> bool {
        self.config.lb == model::LbPolicy::PeakEwma
    }

    /// Takes what an answer's headers, or trailers, say of its host's load, where that decides.
    pub(crate) fn note_load(&self, host: &Host, headers: &Headers) {
        if let Some(u) = &self.config.utilization {
            host.stats.load.note(now_ms(), headers, u);
        }
    }

    /// Notes a response time, or a failure.
    pub(crate) fn observe_time(&self, host: &Host, time: Option<Duration>) {
        host.stats.ewma.add(now_ms(), time);
    }

    /// Notes what a host did; may eject it.
    pub(crate) fn observe(&self, host: &Host, outcome: Outcome) {
        if let Outcome::Refused(r) = outcome {
            return self.refused(host, r);
        }
        if let Some(o) = &self.config.outlier
            && let Some(share) = outlier::note(&host.stats, outcome, o)
            && !host.stats.is_ejected()
            && outlier::enforced(share)
        {
            let mut m = self.members.lock().unwrap_or_else(PoisonError::into_inner);
            if outlier::eject(&m.hosts, &host.stats, o) {
                tracing::debug!(cluster = %self.config.name, host = %host.display, "host ejected");
                self.rebuild(&mut m);
            }
        }
    }

    /// A gateway spoke for all that is behind it: its cluster's part of the service, or the way there. Each of these
    /// endpoints would answer the same, so they leave together, and not for long, since asking again is cheap.
    fn refused(&self, host: &Host, why: Refusal) {
        if self.config.outlier.is_none() {
            return;
        }
        let mut m = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let until = now_ms().saturating_add(REFUSED_MS);
        let mut any = false;
        for h in &m.hosts {
            let same = h.workload.cluster == host.workload.cluster
                && (why != Refusal::NoWay || h.addr == host.addr)
                && matches!(h.slots, model::Slots::Asks(_)) == matches!(host.slots, model::Slots::Asks(_));
            // Without the name of a cluster it speaks for itself only.
            let spoken_for =
                if host.workload.cluster.is_empty() { h.stats.id == host.stats.id } else { same };
            if spoken_for && !h.stats.is_ejected() {
                h.stats.ejected_until.store(until, Relaxed);
                h.stats.ejected.store(true, Relaxed);
                h.stats.tell_failure();
                any = true;
            }
        }
        if any {
            tracing::info!(cluster = %self.config.name, member = %host.workload.cluster, %why, "not used for now");
            m.refused_until = until;
            self.rebuild(&mut m);
        }
    }

    /// Nothing is heard from a host of another cluster: all of that cluster's part of the service is left alone, if
    /// other hosts can take its traffic. Answers with it, or with nothing if it stays.
    pub(crate) fn suspect(&self, host: &Host) -> Option<Vec<Arc<Host>>> {
        // Whoever switched ejection off means it.
        self.config.outlier.as_ref()?;
        let mut m = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let behind = |h: &Host| is_far(h) && is_far(host) && h.workload.cluster == host.workload.cluster;
        if !m.hosts.iter().any(|h| !behind(h) && h.is_usable()) {
            return None;
        }
        let all: Vec<_> = m.hosts.iter().filter(|h| behind(h)).cloned().collect();
        let until = now_ms().saturating_add(SUSPECTED_MS);
        let mut any = false;
        for h in &all {
            h.stats.ejected_until.store(until, Relaxed);
            if !h.stats.ejected.swap(true, Relaxed) {
                h.stats.tell_failure();
                any = true;
            }
        }
        if any {
            tracing::info!(cluster = %self.config.name, member = %host.workload.cluster, "silent: not used for now");
            m.refused_until = until;
            self.rebuild(&mut m);
        }
        Some(all)
    }

    /// Whether a host is left alone; if so, for longer.
    pub(crate) fn still_suspected(&self, host: &Host) -> bool {
        let mut m = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        if !host.stats.is_ejected() {
            return false;
        }
        let until = now_ms().saturating_add(SUSPECTED_MS);
        host.stats.ejected_until.store(until, Relaxed);
        m.refused_until = m.refused_until.max(until);
        true
    }

    /// These answered: they are used again.
    pub(crate) fn trust(&self, hosts: &[&Host]) {
        let mut m = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let mut any = false;
        for h in hosts {
            any |= h.stats.ejected.swap(false, Relaxed);
        }
        if any {
            let member = hosts.first().map(|h| &*h.workload.cluster);
            tracing::info!(cluster = %self.config.name, member, "answers again");
            self.rebuild(&mut m);
        }
    }

    /// Lets ejected hosts return when their time is over, judges rates once an interval, and lets new hosts grow.
    /// Called often.
    pub(crate) fn sweep(&self) {
        let c = &self.config;
        if c.outlier.is_none() && c.slow_start.is_none() && c.utilization.is_none() {
            return;
        }
        let now = now_ms();
        let mut m = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = false;
        if let Some(s) = &self.config.slow_start {
            // Forty steps are a smooth ramp; more would only cost.
            let step = millis(s.window / 40).clamp(50, 1000);
            changed |= m.slow && now.saturating_sub(m.last_built) >= step;
        }
        if let Some(u) = &self.config.utilization {
            changed |= now.saturating_sub(m.last_built) >= millis(u.update).max(100);
        }
        if m.refused_until != 0 && now >= m.refused_until {
            m.refused_until = 0;
            changed |= outlier::readmit(&m.hosts, now);
        }
        if let Some(o) = &self.config.outlier
            && now.saturating_sub(m.last_sweep) >= millis(o.interval).max(10)
        {
            m.last_sweep = now;
            changed |= outlier::sweep(&m.hosts, o, now);
        }
        if changed {
            self.rebuild(&mut m);
        }
    }
}

/// Whether connections to hosts are made the same way.
fn same_transport(a: &model::Cluster, b: &model::Cluster) -> bool {
    a.tls == b.tls
        && a.tls_matches == b.tls_matches
        && a.http == b.http
        && a.http2 == b.http2
        && a.keepalive == b.keepalive
}

pub(super) fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn cluster(hosts: u32, outlier: Option<model::OutlierDetection>) -> Cluster {
        let c = model::Cluster {
            name: "outbound|80||a.b.svc.cluster.local".into(),
            namespace: String::new(),
            discovery: model::Discovery::Eds("x".into()),
            lb: model::LbPolicy::RoundRobin,
            connect_timeout: Duration::from_secs(1),
            http: model::UpstreamHttp::Http1,
            tls: None,
            tls_matches: vec![],
            limits: model::CircuitBreakers::default(),
            outlier: outlier.map(Box::new),
            health: None,
            close_on_health_failure: false,
            utilization: None,
            slow_start: None,
            max_requests_per_connection: 0,
            idle_timeout: None,
            panic_threshold: 0,
            locality_weighted: false,
            max_connection_duration: None,
            http2: model::UpstreamHttp2::default(),
            keepalive: None,
            source: vec![],
            proxy_protocol: None,
            stat_name: String::new(),
            dns_refresh: None,
            buffer_limit: None,
            preserve_case: false,
        };
        let c = Cluster::new(Arc::new(c), None);
        c.set_assignment(Arc::new(assignment(hosts)));
        c
    }

    fn assignment(hosts: u32) -> model::LoadAssignment {
        let endpoints = (1..=hosts)
            .map(|n| model::LbEndpoint {
                address: format!("10.0.0.{n}"),
                port: 80,
                weight: 1,
                health: model::EndpointHealth::Healthy,
                transport_labels: Default::default(),
                workload: String::new(),
                check: None,
                slots: model::Slots::None,
            })
            .collect();
        let l = model::LocalityEndpoints { endpoints, ..model::LocalityEndpoints::default() };
        model::LoadAssignment { name: "x".into(), localities: vec![l], overprovisioning: 140 }
    }

    #[test]
    fn ejection_is_limited_and_grows() {
        let o = model::OutlierDetection {
            consecutive_5xx: 3,
            consecutive_gateway: 0,
            interval: Duration::from_millis(10),
            base_ejection: Duration::from_millis(30),
            max_ejection: Duration::from_secs(1),
            max_percent: 50,
            ..model::OutlierDetection::default()
        };
        let c = cluster(4, Some(o));
        let hosts = c.tables().hosts.clone();
        for h in &hosts {
            c.observe(h, Outcome::Status(500));
            c.observe(h, Outcome::Failed);
            c.observe(h, Outcome::Status(200));
            c.observe(h, Outcome::Status(500));
            c.observe(h, Outcome::Status(503));
            assert!(!h.stats.is_ejected(), "a success starts the count again");
        }
        for h in &hosts {
            c.observe(h, Outcome::Failed);
        }
        assert_eq!(hosts.iter().filter(|h| h.stats.is_ejected()).count(), 2, "half may be ejected");
        std::thread::sleep(Duration::from_millis(50));
        c.sweep();
        assert!(hosts.iter().all(|h| !h.stats.is_ejected()));
        let first = &hosts[0];
        let before = now_ms();
        for _ in 0..3 {
            c.observe(first, Outcome::Failed);
        }
        let until = first.stats.ejected_until.load(Relaxed);
        assert!(until >= before + 60, "the second ejection is twice as long");
    }

    #[test]
    fn hosts_keep_their_state_over_updates() {
        let c = cluster(3, None);
        let ids: Vec<_> = c.tables().hosts.iter().map(|h| h.stats.id).collect();
        let gone = Arc::clone(&c.tables().hosts[2].stats);
        c.set_assignment(Arc::new(assignment(2)));
        let now: Vec<_> = c.tables().hosts.iter().map(|h| h.stats.id).collect();
        assert_eq!(now, ids[..2]);
        assert!(gone.gone.load(Relaxed));
        let again = Cluster::new(Arc::clone(&c.config), Some(&c));
        again.set_assignment(Arc::new(assignment(2)));
        assert_eq!(again.tables().hosts.iter().map(|h| h.stats.id).collect::<Vec<_>>(), ids[..2]);
        let mut other = (*c.config).clone();
        other.http = model::UpstreamHttp::Http2;
        let other = Cluster::new(Arc::new(other), Some(&again));
        other.set_assignment(Arc::new(assignment(2)));
        assert!(other.tables().hosts.iter().all(|h| !ids.contains(&h.stats.id)));
    }

    #[test]
    fn service_names() {
        let s = ServiceName::of_cluster("outbound|9080|v1|reviews.books.svc.cluster.local");
        assert_eq!(
            (&*s.host, &*s.name, &*s.namespace),
            ("reviews.books.svc.cluster.local", "reviews", "books")
        );
        let s = ServiceName::of_cluster("outbound|443||www.example.com");
        assert_eq!((&*s.name, &*s.namespace), ("www.example.com", ""));
        assert_eq!(&*ServiceName::of_cluster("PassthroughCluster").host, "");
    }
}
