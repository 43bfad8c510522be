//! The engine: worker threads, a control thread for what is not on a request's path, and the configuration.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Relaxed},
        },
    },
    thread::JoinHandle,
    time::Duration,
};

use arc_swap::ArcSwap;
use mesh_identity::SecretStore;
use mesh_telemetry::metrics::MeshMetrics;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{ApplyReport, Compiled, ConfigSnapshot, apply::Applier},
    options::{EngineOptions, Hooks},
    upstream::{
        health::{Checkers, metrics::HealthMetrics},
        host::{Check, Health, Host},
    },
    worker::{self, Command, NodeLabels, Shared, Totals, delivery::Deliveries},
};

/// How often ejected hosts are looked at; their own interval is longer.
const SWEEP: Duration = Duration::from_millis(50);

/// For what is said when connections are ended.
const PARTING: Duration = Duration::from_millis(20);

/// The engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A thread or its runtime could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// `workers` is 0.
    #[error("an engine needs at least one worker")]
    NoWorkers,
}

/// A running data plane. Dropping it ends every connection; [`Engine::drain`] lets them finish.
pub struct Engine {
    shared: Arc<Shared>,
    applier: Arc<Mutex<Applier>>,
    deliveries: Deliveries,
    threads: std::sync::Mutex<Vec<JoinHandle<()>>>,
}

/// State of an engine, for admin pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineStatus {
    /// Downstream connections now.
    pub connections: u64,
    /// Downstream connections since the start.
    pub connections_total: u64,
    /// Requests in flight.
    pub requests: u64,
    /// Requests since the start.
    pub requests_total: u64,
    /// Connections closed since the start as there were [`EngineOptions::max_total_connections`].
    pub connections_refused: u64,
    /// Requests refused for overload since the start.
    pub requests_refused: u64,
    /// Listeners with sockets.
    pub listeners: Vec<ListenerStatus>,
    /// Clusters by name.
    pub clusters: BTreeMap<String, ClusterStatus>,
}

/// A bound listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListenerStatus {
    /// Name.
    pub name: String,
    /// Address, with the port that was chosen if 0 was asked for.
    pub address: SocketAddr,
}

/// A cluster's hosts and use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClusterStatus {
    /// Upstream connections.
    pub connections: u32,
    /// Requests in flight.
    pub requests: u32,
    /// Requests waiting for a connection.
    pub pending: u32,
    /// Hosts.
    pub hosts: Vec<HostStatus>,
}

/// A host of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostStatus {
    /// `address:port`.
    pub address: String,
    /// Priority.
    pub priority: u32,
    /// Weight.
    pub weight: u32,
    /// Requests in flight.
    pub active: u32,
    /// Takes traffic of the first choice.
    pub healthy: bool,
    /// Ejected by outlier detection.
    pub ejected: bool,
    /// Why it is not healthy, in Envoy's words, such as `/failed_active_hc`; `healthy` if it is.
    pub health_flags: String,
}

impl Engine {
    /// Starts workers without configuration. Mesh metrics are registered in `registry` unless `hooks` brings some.
    ///
    /// # Errors
    /// Threads cannot be started.
    pub fn start(
        options: EngineOptions,
        secrets: Arc<SecretStore>,
        registry: &mut Registry,
        hooks: Hooks,
    ) -> Result<Self, EngineError> {
        if options.workers == 0 {
            return Err(EngineError::NoWorkers);
        }
        let metrics = hooks.metrics.clone().unwrap_or_else(|| MeshMetrics::register(registry));
        let dropped = metrics.log_lines_dropped().clone();
        let shared = Arc::new(Shared {
            labels: NodeLabels::new(&options.node),
            options,
            secrets,
            hooks,
            metrics,
            compiled: ArcSwap::from_pointee(Compiled::default()),
            totals: Arc::new(Totals::default()),
            stop: CancellationToken::new(),
            over_memory: AtomicBool::new(false),
            sources: tokio::sync::watch::Sender::default(),
            open: tokio::sync::watch::Sender::new(true),
        });
        let mut threads = Vec::new();
        let (mut commands, mut deliveries) = (Vec::new(), Vec::new());
        for i in 0..shared.options.workers {
            let (c, d, t) = worker::spawn(i, Arc::clone(&shared)).map_err(EngineError::Thread)?;
            commands.push(c);
            deliveries.push(d);
            threads.push(t);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(EngineError::Thread)?;
        let drain = shared.options.drain_time;
        let applier = Arc::new(Mutex::new(Applier::new(commands, runtime.handle().clone(), drain, dropped)));
        registry.register_collector(Box::new(HealthMetrics(Arc::downgrade(&applier))));
        let (clusters, watched) = (Arc::downgrade(&applier), Arc::clone(&shared));
        let control = std::thread::Builder::new().name("engine-control".into()).spawn(move || {
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async move {
                let mut checkers = Checkers::new(Arc::clone(&watched));
                let mut tick = tokio::time::interval(SWEEP);
                loop {
                    tokio::select! {
                        _ = tick.tick() => {}
                        () = watched.stop.cancelled() => return,
                    }
                    if watched.options.max_memory > 0 {
                        let over = resident().is_some_and(|r| r > watched.options.max_memory);
                        watched.over_memory.store(over, Relaxed);
                    }
                    let Some(applier) = clusters.upgrade() else { return };
                    // An apply in progress is not waited for: the next tick will do.
                    let all: Vec<_> = match applier.try_lock() {
                        Ok(a) => a.all_clusters().collect(),
                        Err(_) => continue,
                    };
                    for c in &all {
                        c.sweep();
                    }
                    checkers.follow(&all);
                }
            });
        });
        threads.push(control.map_err(EngineError::Thread)?);
        Ok(Self { shared, applier, deliveries: Deliveries::new(deliveries), threads: threads.into() })
    }

    /// The way to its listeners for connections that came by other ways than their sockets.
    #[must_use]
    pub fn deliveries(&self) -> Deliveries {
        self.deliveries.clone()
    }

    fn applier(&self) -> std::sync::MutexGuard<'_, Applier> {
        self.applier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a configuration into force. What is unchanged keeps its state; a resource that cannot be used is
    /// reported, keeps its previous version, and the rest applies. Blocks for compiling and binding: call it off
    /// any runtime's workers, or with `spawn_blocking`, when configurations are large.
    pub fn apply(&self, snapshot: ConfigSnapshot) -> ApplyReport {
        let shared = &self.shared;
        let mut applier = self.applier();
        let report = applier.apply(snapshot, &|c| shared.compiled.store(Arc::new(c)));
        let sources = applier.own_gateways();
        shared.sources.send_if_modified(|s| {
            let changed = **s != sources;
            if changed {
                *s = Arc::new(sources);
            }
            changed
        });
        report
    }

    /// Changes [`EngineOptions::drain_time`] for what is removed from now on.
    pub fn set_drain_time(&self, time: Duration) {
        self.applier().drain_time = time;
    }

    /// Begins as the successor of another process: listeners at the addresses of `sockets` take these instead of
    /// binding, and no connection is accepted before [`Engine::accept`]. To be called before the first [`Engine::apply`].
    pub fn inherit(&self, sockets: Vec<std::net::TcpListener>) {
        self.shared.open.send_replace(false);
        self.applier().inherit(sockets);
    }

    /// Ends what [`Engine::inherit`] began: connections are accepted, and sockets without a listener closed.
    pub fn accept(&self) {
        self.applier().inherited_all();
        self.shared.open.send_replace(true);
    }

    /// Duplicates of all listening sockets, for a successor. Blocks until the workers have answered.
    ///
    /// # Errors
    /// A worker does not answer, or there are too many open files.
    pub fn sockets(&self) -> std::io::Result<Vec<std::net::TcpListener>> {
        let workers = self.applier().workers.clone();
        let (to, from) = std::sync::mpsc::channel();
        workers.iter().for_each(|w| w.send(Command::Share(to.clone())));
        let mut out = Vec::new();
        for _ in &workers {
            let answer = from.recv_timeout(Duration::from_secs(5));
            out.extend(answer.map_err(|_| std::io::Error::other("a worker does not answer"))??);
        }
        Ok(out)
    }

    /// Stops accepting; what is accepted goes on, and clients are told to leave.
    pub fn leave(&self) {
        self.applier().stop();
    }

    /// State for admin pages.
    #[must_use]
    pub fn status(&self) -> EngineStatus {
        let t = &self.shared.totals;
        let a = self.applier();
        let mut listeners: Vec<_> = a
            .bound()
            .iter()
            .map(|(n, address)| ListenerStatus { name: n.clone(), address: *address })
            .collect();
        listeners.sort_by(|a, b| a.name.cmp(&b.name));
        let clusters = a
            .all_clusters()
            .map(|c| {
                let hosts = c
                    .tables()
                    .hosts
                    .iter()
                    .map(|h| HostStatus {
                        address: h.display.to_string(),
                        priority: h.priority,
                        weight: h.weight,
                        active: h.stats.active.load(Relaxed),
                        healthy: h.health() == Health::Healthy,
                        ejected: h.stats.is_ejected(),
                        health_flags: h.flags(),
                    })
                    .collect();
                let status = ClusterStatus {
                    connections: c.usage.connections.load(Relaxed),
                    requests: c.usage.requests.load(Relaxed),
                    pending: c.usage.pending.load(Relaxed),
                    hosts,
                };
                (c.config.name.clone(), status)
            })
            .collect();
        EngineStatus {
            connections: t.connections.load(Relaxed),
            connections_total: t.connections_total.load(Relaxed),
            connections_refused: t.connections_refused.load(Relaxed),
            requests: t.requests.load(Relaxed),
            requests_total: t.requests_total.load(Relaxed),
            requests_refused: t.refused.load(Relaxed),
            listeners,
            clusters,
        }
    }

    /// Waits until names were resolved and hosts checked for the first time, at most for `limit`: traffic that comes
    /// before finds clusters without a usable host.
    pub async fn warmed(&self, limit: Duration) {
        let end = tokio::time::Instant::now() + limit;
        while tokio::time::Instant::now() < end {
            let cold = self.applier().all_clusters().any(|c| {
                let unknown = |h: &Arc<Host>| h.stats.has(Check::Unknown);
                !c.resolved.load(Relaxed) || c.tables().hosts.iter().any(unknown)
            });
            if !cold {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Stops accepting, lets streams finish until `deadline`, then ends what is left.
    pub async fn drain(&self, deadline: Duration) {
        self.applier().stop();
        let end = tokio::time::Instant::now() + deadline;
        let totals = &self.shared.totals;
        // Who still listens may have connections in its queue; what they were may be on its way to a collector.
        let busy = || {
            totals.listening.load(Acquire) > 0
                || totals.connections.load(Acquire) > 0
                || totals.exporting.load(Relaxed) > 0
        };
        while busy() && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.applier().kill();
        if totals.connections.load(Relaxed) > 0 {
            // The kernel ends connections of TCP; those of QUIC end with a datagram, which a worker has to send.
            tokio::time::sleep(PARTING).await;
        }
        self.shared.stop.cancel();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        let _ = tokio::task::spawn_blocking(move || {
            for t in threads {
                let _ = t.join();
            }
        })
        .await;
    }
}

/// Resident memory of this process, in bytes.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|k| k * 1024)
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.applier().kill();
        self.shared.stop.cancel();
    }
}
