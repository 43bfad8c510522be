//! Running pilot: follow the inputs, rebuild the world, publish.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_model::{authored::Kind, federation::type_url};
use mesh_xds::{
    AdsService, Endpoint, NodeInfo,
    links::LinkService,
    mcp::{ConfigClient, ConfigServer, ConfigState},
    registration::RegistrationService,
    server::StatusBoard,
    trust::TrustService,
};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    config::{Config, FEDERATION_TYPES, GALLEY_KINDS, Problem, Reader},
    conflicts,
    consul::{Consul, Services},
    exports,
    generate::SYSTEM_ROOTS,
    issuers::{self, Discovered, Issuers},
    links::Links,
    metrics,
    source::PilotSource,
    trust::Trust,
    workloads::{Joined, Workloads},
    world::{Settings, World},
};

/// Changes are collected until nothing changed for this long ...
const QUIET: Duration = Duration::from_millis(100);
/// ... or the oldest of them has waited for this long.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Endpoints, leases and exports: where traffic goes matters more than the number of pushes.
const QUIET_ENDPOINTS: Duration = Duration::from_millis(20);
/// The longest wait of such a change, where others never pause.
const MAX_WAIT_ENDPOINTS: Duration = Duration::from_millis(250);
/// How long the start waits for the federation component. Peers are not needed to serve what is
/// local.
const FEDERATION_GRACE: Duration = Duration::from_secs(3);

/// What a pilot needs to know.
#[derive(Debug, Clone)]
pub struct PilotOptions {
    /// Cluster, network, trust domain and addresses.
    pub settings: Settings,
    /// Where galley serves configuration.
    pub galley: Endpoint,
    /// Where the federation component serves imports and peers; `None` for a cluster alone.
    pub federation: Option<Endpoint>,
    /// Services of Consul as they change; `None` without Consul.
    pub consul: Option<Arc<Consul>>,
    /// Unix socket on which exports are published for the federation component.
    pub export_socket: Option<PathBuf>,
    /// Directory in which workloads that registered themselves are kept; without one a restart knows nobody until they
    /// report again.
    pub state_dir: Option<PathBuf>,
}

/// The service discovery and configuration component.
pub struct Pilot;

/// A running pilot. Dropping it stops everything it started.
pub struct PilotHandle {
    service: AdsService<PilotSource>,
    exports: ConfigServer,
    ready: watch::Receiver<bool>,
    shared: Arc<Shared>,
    links: Arc<Links>,
    trust: Arc<Trust>,
    workloads: Arc<Workloads>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    stop: CancellationToken,
    _guard: DropGuard,
}

/// Counters and findings for operators.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) rebuilds: AtomicU64,
    pub(crate) last_rebuild_micros: AtomicU64,
    pub(crate) problems: Mutex<Vec<Problem>>,
    pub(crate) consul: Option<Arc<Consul>>,
}

impl Pilot {
    /// Starts on the current runtime.
    ///
    /// # Errors
    /// If the export socket cannot be bound.
    pub fn start(options: PilotOptions) -> io::Result<PilotHandle> {
        let stop = CancellationToken::new();
        let source = Arc::new(PilotSource::new());
        let service = AdsService::new(source.clone()).until(stop.clone());
        let exports = ConfigServer::new();
        let shared = Arc::new(Shared { consul: options.consul, ..Shared::default() });
        let links = Arc::new(Links::new(source.clone()));
        let trust = Arc::new(Trust::new(source.clone()));
        let issuers = Issuers::new(options.state_dir.clone(), SYSTEM_ROOTS.into());
        let workloads = Arc::new(Workloads::new(source.clone(), options.state_dir));
        let mut tasks = Vec::new();
        if let Some(path) = &options.export_socket {
            let listener = mesh_xds::server::conn::bind_unix(path)?;
            let (server, stop) = (exports.clone(), stop.clone());
            tasks.push(tokio::spawn(async move {
                if let Err(e) = server.serve(mesh_xds::server::conn::unix(listener), stop).await {
                    tracing::error!(error = %e, "the export server failed");
                }
            }));
        }
        let (ready_tx, ready) = watch::channel(false);
        let follow = Follow {
            galley: follow_galley(options.galley, &options.settings),
            federation: options.federation.map(|e| follow_federation(e, &options.settings)),
            settings: options.settings,
            source,
            workloads: workloads.clone(),
            issuers,
            exports: exports.clone(),
            shared: shared.clone(),
            ready: ready_tx,
        };
        let (token, kept) = (stop.clone(), workloads.clone());
        tasks.push(tokio::spawn(async move {
            tokio::select! {
                () = token.cancelled() => {}
                () = kept.keep() => {}
                () = follow.run() => tracing::error!("configuration is no longer followed"),
            }
        }));
        let guard = stop.clone().drop_guard();
        Ok(PilotHandle {
            service,
            exports,
            ready,
            shared,
            links,
            trust,
            workloads,
            tasks: Mutex::new(tasks),
            stop,
            _guard: guard,
        })
    }
}

impl PilotHandle {
    /// The ADS service, to be added to a gRPC server whose connections are
    /// [`mesh_xds::server::conn::Conn`]s.
    #[must_use]
    pub fn ads_service(&self) -> AdsService<PilotSource> {
        self.service.clone()
    }

    /// The service to which gateways tell what they see of other clusters, for the same server.
    #[must_use]
    pub fn link_service(&self) -> LinkService<Links> {
        LinkService::new(self.links.clone())
    }

    /// The service to which proxies tell what they trust and show, for the same server.
    #[must_use]
    pub fn trust_service(&self) -> TrustService<Trust> {
        TrustService::new(self.trust.clone())
    }

    /// The service in which workloads register themselves, for the same server.
    #[must_use]
    pub fn registration_service(&self) -> RegistrationService<Workloads> {
        RegistrationService::new(self.workloads.clone())
    }

    /// The server of exports, for a process that reads them without a socket.
    #[must_use]
    pub fn export_server(&self) -> ConfigServer {
        self.exports.clone()
    }

    /// Clients and what they have acknowledged.
    #[must_use]
    pub fn status(&self) -> Arc<StatusBoard> {
        self.service.status()
    }

    /// True once configuration has been read and proxies can be served.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.clone()
    }

    /// Pages for operators; see [`crate::debug`].
    pub fn debug_router(&self) -> axum::Router {
        crate::debug::router(
            self.service.clone(),
            self.ready.clone(),
            self.shared.clone(),
            self.links.clone(),
            self.trust.clone(),
            self.workloads.clone(),
        )
    }

    /// Adds pilot's metrics to a registry.
    pub fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        registry.register_collector(Box::new(metrics::Metrics::new(&self.service, self.shared.clone())));
    }

    /// What in the configuration cannot be done as written.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut all = self.shared.problems.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.extend(self.service.source().problems());
        all
    }

    /// Ends all streams and waits for the tasks.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for t in tasks {
            if let Err(e) = t.await
                && e.is_panic()
            {
                tracing::error!(error = %e, "a task of pilot failed");
            }
        }
    }
}

fn follow_galley(endpoint: Endpoint, settings: &Settings) -> ConfigClient {
    let types: Vec<&str> = GALLEY_KINDS.iter().map(|k| k.type_url()).collect();
    ConfigClient::start(endpoint, NodeInfo::component(&format!("pilot.{}", settings.cluster)), &types)
}

fn follow_federation(endpoint: Endpoint, settings: &Settings) -> ConfigClient {
    let node = NodeInfo::component(&format!("pilot.{}", settings.cluster));
    ConfigClient::start(endpoint, node, FEDERATION_TYPES)
}

struct Follow {
    galley: ConfigClient,
    federation: Option<ConfigClient>,
    settings: Settings,
    source: Arc<PilotSource>,
    workloads: Arc<Workloads>,
    issuers: Issuers,
    exports: ConfigServer,
    shared: Arc<Shared>,
    ready: watch::Sender<bool>,
}

impl Follow {
    async fn run(self) {
        let mut galley = self.galley.watch();
        // Without a federation component: a channel that never changes, kept open.
        let (idle, never) = watch::channel(Arc::<ConfigState>::default());
        let _idle = idle;
        let mut federation = self.federation.as_ref().map_or(never, ConfigClient::watch);
        let (nobody, none) = watch::channel(Arc::<Services>::default());
        let _nobody = nobody;
        let consul = self.shared.consul.as_ref().map_or(none, |c| c.watch());

        // A pilot that served before it has read everything would tell proxies to drop what is missing.
        if galley.wait_for(|s| s.synced).await.is_err() {
            return;
        }
        if self.federation.is_some() {
            let synced = federation.wait_for(|s| s.synced);
            if tokio::time::timeout(FEDERATION_GRACE, synced).await.is_err() {
                tracing::warn!("the federation component does not answer; starting without peers");
            }
        }
        if let Some(c) = &self.shared.consul
            && !c.first().await
        {
            tracing::warn!("Consul does not answer; starting with what it told before");
        }
        let mut reader = Reader::default();
        let mut others = Others {
            consul,
            draining: self.source.draining().watch(),
            workloads: self.workloads.watch(),
            issuers: self.issuers.watch(),
        };
        loop {
            others.draining.mark_unchanged();
            others.issuers.mark_unchanged();
            let (g, f) = (galley.borrow_and_update().clone(), federation.borrow_and_update().clone());
            let mut config = reader.read(&g, &f);
            config.keep_trust_domain(&self.settings.trust_domain);
            if self.shared.consul.is_some() {
                config.register(&others.consul.borrow_and_update());
            }
            config.discovered = self.issuers.of(&config);
            config.problems.extend(issuers::problem(&config));
            let joined = others.workloads.borrow_and_update().clone();
            if !joined.is_empty() {
                config.join(&joined);
            }
            self.rebuild(config);
            if !*self.ready.borrow() {
                tracing::info!("configuration has been read");
                self.ready.send_replace(true);
            }
            if settle(&mut galley, &mut federation, &mut others, &g, &f).await.is_err() {
                return;
            }
        }
    }

    fn rebuild(&self, config: Config) {
        let started = std::time::Instant::now();
        let (settings, draining) = (self.settings.clone(), self.source.draining().addresses());
        let world = Arc::new(match self.source.world() {
            Some(before) => before.next(settings, config, draining),
            None => World::new(settings, config).with_draining(draining),
        });
        let (documents, found) = exports::exports(&world);
        self.exports.publish_type(type_url::EXPORTED_SERVICE, documents);
        self.exports.publish_type(type_url::CONFLICT, conflicts::conflicts(&world));
        let mut problems = world.problems.clone();
        problems.extend(found);
        *self.shared.problems.lock().unwrap_or_else(PoisonError::into_inner) = problems;
        self.source.update(world);
        let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.shared.last_rebuild_micros.store(micros, Ordering::Relaxed);
        self.shared.rebuilds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Inputs that are no documents, and are only sent when they changed.
struct Others {
    consul: watch::Receiver<Arc<Services>>,
    draining: watch::Receiver<BTreeMap<IpAddr, u64>>,
    workloads: watch::Receiver<Arc<Joined>>,
    issuers: watch::Receiver<Discovered>,
}

impl Others {
    async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        tokio::select! {
            r = self.consul.changed() => r,
            r = self.draining.changed() => r,
            r = self.workloads.changed() => r,
            r = self.issuers.changed() => r,
        }
    }
}

/// Waits for a change, then until changes pause.
async fn settle(
    galley: &mut watch::Receiver<Arc<ConfigState>>,
    federation: &mut watch::Receiver<Arc<ConfigState>>,
    others: &mut Others,
    old_galley: &ConfigState,
    old_federation: &ConfigState,
) -> Result<(), watch::error::RecvError> {
    let mut quiet_until: Option<Instant> = None;
    let (mut first, mut latest) = (Instant::now(), Instant::now());
    let mut news = false;
    loop {
        let deadline = quiet_until.map(|q| q.min(latest));
        tokio::select! {
            r = galley.changed() => r?,
            r = federation.changed() => r?,
            r = others.changed() => {
                r?;
                news = true;
            }
            () = tokio::time::sleep_until(deadline.unwrap_or(latest)), if deadline.is_some() => return Ok(()),
        }
        // `changed` marks as seen; the caller reads the latest again.
        let only_endpoints = {
            let (g, f) = (galley.borrow(), federation.borrow());
            let same = same_documents(&g, old_galley, false) && same_documents(&f, old_federation, false);
            if same && !news {
                // Only the connection came or went.
                quiet_until = None;
                continue;
            }
            same_documents(&g, old_galley, true)
        };
        let now = Instant::now();
        if quiet_until.is_none() {
            first = now;
        }
        latest = first + if only_endpoints { MAX_WAIT_ENDPOINTS } else { MAX_WAIT };
        quiet_until = Some(now + if only_endpoints { QUIET_ENDPOINTS } else { QUIET });
    }
}

/// Whether two states hold the same documents, optionally apart from workloads and endpoints.
fn same_documents(a: &ConfigState, b: &ConfigState, but_workloads: bool) -> bool {
    let skip = [Kind::WorkloadEntry, Kind::EndpointSlice, Kind::Pod].map(Kind::type_url);
    let relevant = |s: &ConfigState| s.documents.len();
    if relevant(a) != relevant(b) {
        return false;
    }
    a.documents.iter().all(|(t, docs)| {
        (but_workloads && skip.contains(&t.as_str()))
            || b.documents.get(t).is_some_and(|other| {
                docs.len() == other.len()
                    && docs.iter().zip(other).all(|((n, d), (m, e))| n == m && Arc::ptr_eq(d, e))
            })
    })
}
