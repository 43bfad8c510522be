//! Turns snapshots into compiled configuration, step by step so that traffic never sees half of one: clusters
//! and endpoints first, then routes, then listeners; removals last.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use mesh_model::proxy as model;
use mesh_telemetry::access_log::LogSink;
use prometheus_client::metrics::counter::Counter;
use tokio::runtime::Handle;

use super::{
    ApplyReport, CompileError, Compiled, ConfigSnapshot, RouteSlot,
    listener::{Listener, ListenerSlot, Names},
    route::{RouteTable, SlotOf},
};
use crate::{
    export::{Exporter, To},
    listener::bind,
    upstream::{
        cluster::{Cluster, ClusterSlot},
        dns,
    },
    worker::{Command, Commands, signals::Sources},
};

/// How long sockets that were just closed may keep their address.
const FREEING: Duration = Duration::from_millis(500);

/// The state behind [`crate::Engine::apply`]; one caller at a time.
pub(crate) struct Applier {
    pub(crate) workers: Vec<Commands>,
    pub(crate) control: Handle,
    pub(crate) drain_time: Duration,
    pub(crate) dropped_lines: Counter,
    previous: ConfigSnapshot,
    clusters: HashMap<Arc<str>, Arc<ClusterSlot>>,
    routes: HashMap<String, Arc<RouteSlot>>,
    listeners: HashMap<String, Arc<ListenerSlot>>,
    bound: HashMap<String, SocketAddr>,
    /// Sockets of a predecessor that no listener has taken yet.
    inherited: Vec<std::net::TcpListener>,
    /// The engine ends: nothing is bound again.
    stopped: bool,
    /// A listener moved in this update and its old sockets are about to close.
    freed: bool,
    logs: HashMap<String, Weak<LogSink>>,
    exporters: HashMap<To, Weak<Exporter>>,
}

impl Applier {
    pub(crate) fn new(
        workers: Vec<Commands>,
        control: Handle,
        drain_time: Duration,
        dropped_lines: Counter,
    ) -> Self {
        Self {
            workers,
            control,
            drain_time,
            dropped_lines,
            previous: ConfigSnapshot::default(),
            clusters: HashMap::new(),
            routes: HashMap::new(),
            listeners: HashMap::new(),
            bound: HashMap::new(),
            inherited: vec![],
            stopped: false,
            freed: false,
            logs: HashMap::new(),
            exporters: HashMap::new(),
        }
    }

    /// Sockets that listeners at their addresses take instead of binding.
    pub(crate) fn inherit(&mut self, sockets: Vec<std::net::TcpListener>) {
        self.inherited = sockets;
    }

    /// Closes what no listener took.
    pub(crate) fn inherited_all(&mut self) {
        if !self.inherited.is_empty() {
            tracing::info!(
                sockets = self.inherited.len(),
                "sockets of listeners that are no longer configured"
            );
            self.inherited.clear();
        }
    }

    /// Applies a snapshot; `publish` makes the lookups visible to workers.
    pub(crate) fn apply(&mut self, snap: ConfigSnapshot, publish: &dyn Fn(Compiled)) -> ApplyReport {
        let mut report = ApplyReport::default();
        if self.stopped {
            return report;
        }
        self.apply_clusters(&snap, &mut report);
        self.apply_routes(&snap, &mut report);
        let (retired, bind) = self.apply_listeners(&snap, &mut report);
        publish(self.compiled());
        // Sockets of removed listeners close before new ones bind: a renamed listener keeps its address.
        let freed = self.unbind_removed(&snap) || self.freed;
        self.bind(bind, freed, &mut report);
        self.retire_listeners(&snap, retired);
        self.retire_names(&snap);
        self.previous = snap;
        report
    }

    fn compiled(&self) -> Compiled {
        // What was captured on its way to an address is handed to the listener of that address. One that is bound as well
        // takes it, as in Envoy, but not for all addresses of its port: those it has are the capturing listener's.
        let handed = |udp: bool| {
            self.listeners
                .values()
                .filter(|l| {
                    let l = &l.current.load().model;
                    let own = !udp && !l.use_original_dst && !l.address.ip().is_unspecified();
                    (!l.bind_to_port || own) && l.udp.is_some() == udp
                })
                .map(|l| (l.current.load().model.address, Arc::clone(l)))
                .collect()
        };
        let (by_address, udp_by_address) = (handed(false), handed(true));
        Compiled {
            by_address,
            udp_by_address,
            by_name: self.listeners.clone(),
            clusters: self.clusters.clone(),
            routes: self.routes.clone(),
        }
    }

    fn apply_clusters(&mut self, snap: &ConfigSnapshot, report: &mut ApplyReport) {
        for (name, c) in &snap.clusters {
            let slot = slot_of(&mut self.clusters, name);
            let old = slot.load();
            let unchanged = self.previous.clusters.get(name).is_some_and(|p| Arc::ptr_eq(p, c) || p == c);
            let cluster = match old {
                Some(old) if unchanged => old,
                old => {
                    if let Some(o) = &c.outlier
                        && o.max_percent > 100
                    {
                        report.rejected.push(("cluster", name.clone(), "max_percent is above 100".into()));
                        continue;
                    }
                    if c.proxy_protocol.is_some() && c.http == model::UpstreamHttp::Http2 {
                        let reason = "the PROXY protocol is not supported with HTTP/2 to the endpoints";
                        report.rejected.push(("cluster", name.clone(), reason.into()));
                        continue;
                    }
                    let grpc =
                        c.health.as_ref().is_some_and(|h| matches!(h.kind, model::HealthCheckKind::Grpc(_)));
                    if grpc && c.http != model::UpstreamHttp::Http2 {
                        let reason = "a gRPC health check needs a cluster with HTTP/2 to the endpoints";
                        report.rejected.push(("cluster", name.clone(), reason.into()));
                        continue;
                    }
                    let new = Arc::new(Cluster::new(Arc::clone(c), old.as_deref()));
                    match &c.discovery {
                        model::Discovery::Static(a) => new.set_assignment(Arc::new(a.clone())),
                        model::Discovery::StrictDns(a) | model::Discovery::LogicalDns(a) => {
                            // Hosts of the version before stay until the first answer.
                            if let Some(o) = &old {
                                new.set_assignment(o.assignment());
                            }
                            let one = matches!(c.discovery, model::Discovery::LogicalDns(_));
                            self.control.spawn(dns::refresh(Arc::downgrade(&new), a.clone(), one));
                        }
                        model::Discovery::Eds(_) => {
                            if let Some(o) = &old {
                                new.set_assignment(o.assignment());
                            }
                        }
                        model::Discovery::OriginalDst => {}
                        model::Discovery::ByName(hosts) => {
                            new.find_by_name(hosts, &self.control, old.as_deref());
                        }
                    }
                    slot.store(Some(Arc::clone(&new)));
                    new
                }
            };
            if let model::Discovery::Eds(service) = &c.discovery {
                let service = if service.is_empty() { name } else { service };
                if let Some(e) = snap.endpoints.get(service) {
                    let current = cluster.assignment();
                    if !Arc::ptr_eq(&current, e) && current != *e {
                        cluster.set_assignment(Arc::clone(e));
                    }
                }
            }
        }
    }

    fn apply_routes(&mut self, snap: &ConfigSnapshot, report: &mut ApplyReport) {
        for (name, r) in &snap.routes {
            let slot = route_slot(&mut self.routes, name);
            let unchanged = self.previous.routes.get(name).is_some_and(|p| Arc::ptr_eq(p, r) || p == r);
            if unchanged && slot.current.load().is_some() {
                continue;
            }
            let before = slot.current.load_full();
            match RouteTable::new(r, before.as_deref(), &mut |n| slot_of(&mut self.clusters, n)) {
                Ok(t) => slot.current.store(Some(Arc::new(t))),
                Err(e) => report.rejected.push(("route", name.clone(), e.to_string())),
            }
        }
    }

    /// Compiles listeners; returns the versions that were replaced, and those that need sockets.
    fn apply_listeners(
        &mut self,
        snap: &ConfigSnapshot,
        report: &mut ApplyReport,
    ) -> (Vec<Arc<Listener>>, Vec<Arc<ListenerSlot>>) {
        let mut replaced = vec![];
        let mut bind = vec![];
        let mut addresses: HashMap<(SocketAddr, bool), &str> = HashMap::new();
        for (name, l) in &snap.listeners {
            if l.address.port() != 0
                && let Some(other) = addresses.insert((l.address, l.is_udp()), name)
            {
                let e = CompileError::SameAddress(other.to_owned(), name.clone());
                report.rejected.push(("listener", name.clone(), e.to_string()));
                continue;
            }
            let old = self.listeners.get(name).cloned();
            let unchanged = self.previous.listeners.get(name).is_some_and(|p| Arc::ptr_eq(p, l) || p == l);
            if let (true, Some(slot)) = (unchanged, &old) {
                if l.bind_to_port && !self.bound.contains_key(name) {
                    bind.push(Arc::clone(slot));
                }
                continue;
            }
            let previous = old.as_ref().map(|s| s.current.load_full());
            let (clusters, routes, logs, dropped) =
                (&mut self.clusters, &mut self.routes, &mut self.logs, &self.dropped_lines);
            let exporters = &mut self.exporters;
            let mut names = Names {
                cluster: &mut |n| slot_of(clusters, n),
                route: &mut |n| route_slot(routes, n),
                log: &mut |p| log_sink(logs, p, dropped),
                export: &mut |to, slot| exporter(exporters, to, slot),
            };
            let new = match Listener::new(Arc::clone(l), previous.as_deref(), &mut names) {
                Ok(new) => Arc::new(new),
                Err(e) => {
                    report.rejected.push(("listener", name.clone(), e.to_string()));
                    continue;
                }
            };
            let slot = match old {
                Some(slot) => {
                    if let Some(p) = previous {
                        let moved = p.model.address != l.address
                            || p.model.bind_to_port != l.bind_to_port
                            || p.model.transparent != l.transparent
                            || p.model.udp.is_some() != l.udp.is_some()
                            || p.model.quic.is_some() != l.quic.is_some()
                            || p.model.inspect_quic != l.inspect_quic;
                        if moved && self.bound.remove(name).is_some() {
                            self.unbind(name);
                            self.freed = true;
                        }
                        replaced.push(p);
                    }
                    slot.current.store(new);
                    slot
                }
                None => {
                    let slot =
                        Arc::new(ListenerSlot { name: name.clone(), current: arc_swap::ArcSwap::new(new) });
                    self.listeners.insert(name.clone(), Arc::clone(&slot));
                    slot
                }
            };
            if l.bind_to_port && !self.bound.contains_key(name) {
                bind.push(slot);
            }
        }
        (replaced, bind)
    }

    /// True if there was one.
    fn unbind_removed(&mut self, snap: &ConfigSnapshot) -> bool {
        let gone: Vec<String> =
            self.bound.keys().filter(|n| !snap.listeners.contains_key(*n)).cloned().collect();
        for name in &gone {
            self.bound.remove(name);
            self.unbind(name);
        }
        !gone.is_empty()
    }

    fn bind(&mut self, slots: Vec<Arc<ListenerSlot>>, freed: bool, report: &mut ApplyReport) {
        self.freed = false;
        let patience = std::time::Instant::now() + if freed { FREEING } else { Duration::ZERO };
        for slot in slots {
            let model = Arc::clone(&slot.current.load().model);
            let sockets = loop {
                match bind::sockets(&model, self.workers.len(), &mut self.inherited) {
                    // Workers close their sockets a moment after they are told.
                    Err(e)
                        if e.kind() == std::io::ErrorKind::AddrInUse
                            && std::time::Instant::now() < patience =>
                    {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    done => break done,
                }
            };
            match sockets {
                Ok((address, sockets)) => {
                    for (worker, sockets) in self.workers.iter().zip(sockets) {
                        worker.listen(Arc::clone(&slot), sockets);
                    }
                    self.bound.insert(slot.name.clone(), address);
                }
                Err(source) => {
                    let e = CompileError::Bind { address: model.address, source };
                    report.rejected.push(("listener", slot.name.clone(), e.to_string()));
                }
            }
        }
    }

    fn unbind(&self, name: &str) {
        for w in &self.workers {
            w.send(Command::Unlisten(name.to_owned()));
        }
    }

    /// Drains chains that are no longer part of any listener.
    fn retire_listeners(&mut self, snap: &ConfigSnapshot, mut replaced: Vec<Arc<Listener>>) {
        let gone: Vec<String> =
            self.listeners.keys().filter(|n| !snap.listeners.contains_key(*n)).cloned().collect();
        for name in gone {
            if let Some(slot) = self.listeners.remove(&name) {
                replaced.push(slot.current.load_full());
            }
        }
        for old in replaced {
            let current = self.listeners.get(&old.model.name).map(|s| s.current.load_full());
            for chain in old.all_chains() {
                let kept = current.as_ref().is_some_and(|c| c.all_chains().any(|n| Arc::ptr_eq(n, chain)));
                if !kept {
                    chain.drain.cancel();
                    let (kill, after) = (chain.kill.clone(), self.drain_time);
                    self.control.spawn(async move {
                        tokio::time::sleep(after).await;
                        kill.cancel();
                    });
                }
            }
        }
    }

    /// Empties and forgets the slots of resources that are gone.
    fn retire_names(&mut self, snap: &ConfigSnapshot) {
        for (name, slot) in &self.routes {
            if !snap.routes.contains_key(name) {
                slot.current.store(None);
            }
        }
        // The published lookups hold one more reference, here and below.
        self.routes.retain(|name, slot| snap.routes.contains_key(name) || Arc::strong_count(slot) > 2);
        for (name, slot) in &self.clusters {
            if !snap.clusters.contains_key(&**name)
                && let Some(c) = slot.load()
            {
                c.retire();
                slot.store(None);
            }
        }
        self.clusters.retain(|name, slot| snap.clusters.contains_key(&**name) || Arc::strong_count(slot) > 2);
        self.logs.retain(|_, l| l.strong_count() > 0);
        self.exporters.retain(|_, e| e.strong_count() > 0);
    }

    /// The cluster's own gateways, and whether they drain.
    pub(crate) fn own_gateways(&self) -> Sources {
        let Some(cluster) = self.clusters.get(model::OWN_GATEWAYS).and_then(|s| s.load()) else {
            return Sources::new();
        };
        let assignment = cluster.assignment();
        let endpoints = assignment.localities.iter().flat_map(|l| &l.endpoints);
        let drains = |e: &model::LbEndpoint| e.health == model::EndpointHealth::Draining;
        endpoints.filter_map(|e| Some((e.address.parse().ok()?, drains(e)))).collect()
    }

    /// Addresses bound, by listener.
    pub(crate) fn bound(&self) -> &HashMap<String, SocketAddr> {
        &self.bound
    }

    pub(crate) fn all_clusters(&self) -> impl Iterator<Item = Arc<Cluster>> {
        self.clusters.values().filter_map(|s| s.load())
    }

    /// Drains everything: the engine stops.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
        self.inherited.clear();
        let names: Vec<String> = self.bound.drain().map(|b| b.0).collect();
        for n in names {
            self.unbind(&n);
        }
        for l in self.listeners.values() {
            for c in l.current.load().all_chains() {
                c.drain.cancel();
            }
        }
    }

    /// Ends what is still open.
    pub(crate) fn kill(&self) {
        for l in self.listeners.values() {
            for c in l.current.load().all_chains() {
                c.kill.cancel();
            }
        }
    }
}

fn slot_of(clusters: &mut HashMap<Arc<str>, Arc<ClusterSlot>>, name: &str) -> Arc<ClusterSlot> {
    if let Some(s) = clusters.get(name) {
        return Arc::clone(s);
    }
    let slot = ClusterSlot::new(name);
    clusters.insert(Arc::clone(&slot.name), Arc::clone(&slot));
    slot
}

fn route_slot(routes: &mut HashMap<String, Arc<RouteSlot>>, name: &str) -> Arc<RouteSlot> {
    let new = || Arc::new(RouteSlot { current: arc_swap::ArcSwapOption::empty() });
    Arc::clone(routes.entry(name.to_owned()).or_insert_with(new))
}

fn log_sink(
    logs: &mut HashMap<String, Weak<LogSink>>,
    path: &str,
    dropped: &Counter,
) -> Result<Arc<LogSink>, CompileError> {
    if let Some(l) = logs.get(path).and_then(Weak::upgrade) {
        return Ok(l);
    }
    let sink = LogSink::open(path, dropped.clone())
        .map_err(|source| CompileError::LogFile { path: path.to_owned(), source })?;
    let sink = Arc::new(sink);
    logs.insert(path.to_owned(), Arc::downgrade(&sink));
    Ok(sink)
}

fn exporter(
    exporters: &mut HashMap<To, Weak<Exporter>>,
    to: &To,
    slot: SlotOf<'_>,
) -> Result<Arc<Exporter>, CompileError> {
    if let Some(e) = exporters.get(to).and_then(Weak::upgrade) {
        return Ok(e);
    }
    let new = Arc::new(Exporter::new(to, slot)?);
    exporters.insert(to.clone(), Arc::downgrade(&new));
    Ok(new)
}
