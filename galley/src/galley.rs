//! The running component: reads when something may have changed, publishes what applies.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use mesh_collections::{Publisher, Snapshot};
use mesh_model::authored::{Document, Kind, resource_name};
use mesh_xds::{mcp, server::conn};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    document::Key,
    metrics::Metrics,
    report::DocumentReport,
    source::{DirectorySource, Notifications},
    store::{Change, Hosts, ParsedFiles, Store},
};

/// Where documents are served.
#[derive(Debug, Clone)]
pub enum Listen {
    /// A unix socket, mode 0600.
    Unix(PathBuf),
    /// TCP in clear text; refused unless the address is loopback.
    Tcp(SocketAddr),
}

/// What a galley needs to know.
#[derive(Debug, Clone)]
pub struct GalleyOptions {
    /// Directories of documents, read recursively.
    pub config_dirs: Vec<PathBuf>,
    /// Where documents are served; `None` serves nothing, for one that is embedded.
    pub listen: Option<Listen>,
    /// Fully qualified hosts that peer clusters provide, as they come and go. Without it, only hosts
    /// of the configuration itself are known.
    pub extra_hosts: Option<watch::Receiver<Arc<BTreeSet<String>>>>,
    /// Namespace of documents that name none.
    pub default_namespace: String,
    /// Quiet time after a change before the directories are read.
    pub debounce: Duration,
    /// Longest wait of a change for quiet.
    pub debounce_max: Duration,
    /// Time between readings without notification.
    pub poll: Duration,
}

impl GalleyOptions {
    /// Options with the usual times for these directories.
    #[must_use]
    pub fn new(config_dirs: Vec<PathBuf>, listen: Option<Listen>) -> Self {
        Self {
            config_dirs,
            listen,
            extra_hosts: None,
            default_namespace: crate::DEFAULT_NAMESPACE.to_owned(),
            debounce: Duration::from_millis(100),
            debounce_max: Duration::from_secs(1),
            poll: Duration::from_secs(2),
        }
    }
}

/// Why a galley could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No directory to read.
    #[error("no configuration directory is given")]
    NoDirectory,
    /// Documents are not for the network.
    #[error("configuration is served in clear text, so {0} must be a loopback address")]
    NotLoopback(SocketAddr),
    /// The socket cannot be bound.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What applies and what does not, after one reading.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Number of the reading; 1 is the first.
    pub generation: u64,
    /// How many documents apply.
    pub applied: usize,
    /// Documents that apply in an earlier version than their file has.
    pub stale: BTreeSet<Key>,
    /// The verdict on every document.
    pub reports: Vec<Arc<DocumentReport>>,
}

impl Status {
    /// Documents that are rejected.
    pub fn rejected(&self) -> impl Iterator<Item = &DocumentReport> {
        self.reports.iter().map(|r| &**r).filter(|r| !r.valid)
    }
}

/// The configuration that applies.
pub type Configuration = Snapshot<Key, Document>;

/// A galley.
#[derive(Debug)]
pub struct Galley;

/// A running galley. Dropping it stops it.
pub struct GalleyHandle {
    pub(crate) shared: Arc<Shared>,
    server: mcp::ConfigServer,
    address: Option<SocketAddr>,
    tasks: Vec<JoinHandle<()>>,
    stop: CancellationToken,
    _guard: DropGuard,
}

/// What the reading task writes and others read.
pub(crate) struct Shared {
    pub(crate) status: watch::Sender<Arc<Status>>,
    pub(crate) documents: Publisher<Key, Document>,
    pub(crate) metrics: Metrics,
    /// What was read last, and hosts that peers provide: what the analysis works on when somebody asks for it.
    pub(crate) read: watch::Sender<Arc<LastRead>>,
}

/// Input of the analysis.
#[derive(Debug, Default)]
pub(crate) struct LastRead {
    pub(crate) parsed: ParsedFiles,
    pub(crate) hosts: Arc<BTreeSet<String>>,
}

impl Galley {
    /// Reads the directories for the first time and then serves. A directory that does not exist
    /// yet is an error in [`GalleyHandle::status`], not here: it may be mounted later.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(options: GalleyOptions) -> Result<GalleyHandle, StartError> {
        if options.config_dirs.is_empty() {
            return Err(StartError::NoDirectory);
        }
        let shared = Arc::new(Shared {
            status: watch::Sender::new(Arc::default()),
            documents: Publisher::default(),
            metrics: Metrics::default(),
            read: watch::Sender::new(Arc::default()),
        });
        let server = mcp::ConfigServer::new();
        // Watch first: what changes while it is read is read again.
        let notifications = Notifications::watch(&options.config_dirs);
        let mut reader = Reader {
            source: Some(DirectorySource::new(options.config_dirs.clone())),
            store: Some(Store::new(&options.default_namespace)),
            shared: shared.clone(),
            server: server.clone(),
            hosts: options.extra_hosts.clone(),
        };
        reader.read().await;

        let stop = CancellationToken::new();
        let mut tasks = Vec::new();
        let mut address = None;
        if let Some(listen) = &options.listen {
            let (task, bound) = serve(&server, listen, stop.clone()).await?;
            address = bound;
            tasks.push(task);
        }
        let run = reader.run(options, notifications, stop.clone());
        tasks.push(tokio::spawn(run));
        let guard = stop.clone().drop_guard();
        Ok(GalleyHandle { shared, server, address, tasks, stop, _guard: guard })
    }
}

async fn serve(
    server: &mcp::ConfigServer,
    listen: &Listen,
    stop: CancellationToken,
) -> Result<(JoinHandle<()>, Option<SocketAddr>), StartError> {
    let failed = |address: String| move |source| StartError::Listen { address, source };
    let server = server.clone();
    match listen {
        Listen::Unix(path) => {
            let shown = path.display().to_string();
            let listener = conn::bind_unix(path).map_err(failed(shown))?;
            let task = tokio::spawn(async move {
                report(server.serve(conn::unix(listener), stop).await);
            });
            Ok((task, None))
        }
        Listen::Tcp(address) => {
            if !address.ip().is_loopback() {
                return Err(StartError::NotLoopback(*address));
            }
            let listener =
                tokio::net::TcpListener::bind(address).await.map_err(failed(address.to_string()))?;
            let bound = listener.local_addr().map_err(failed(address.to_string()))?;
            let task = tokio::spawn(async move {
                report(server.serve(conn::tcp(listener), stop).await);
            });
            Ok((task, Some(bound)))
        }
    }
}

fn report(served: io::Result<()>) {
    if let Err(e) = served {
        tracing::error!(error = %e, "configuration is no longer served");
    }
}

impl GalleyHandle {
    /// Verdicts of the latest reading.
    #[must_use]
    pub fn status(&self) -> Arc<Status> {
        self.shared.status.borrow().clone()
    }

    /// Verdicts as they change.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<Arc<Status>> {
        self.shared.status.subscribe()
    }

    /// What applies now.
    #[must_use]
    pub fn documents(&self) -> Configuration {
        self.shared.documents.snapshot()
    }

    /// What applies, as it changes.
    #[must_use]
    pub fn watch_documents(&self) -> watch::Receiver<Configuration> {
        self.shared.documents.subscribe()
    }

    /// The server of documents, to add its gRPC service elsewhere.
    #[must_use]
    pub fn server(&self) -> &mcp::ConfigServer {
        &self.server
    }

    /// Address of a TCP listener.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// `/debug/config_errors` and `/debug/configz`; see [`crate::debug`].
    pub fn debug_router(&self) -> axum::Router {
        crate::debug::router(self.shared.clone())
    }

    /// Adds galley's metrics to a registry.
    pub fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        self.shared.metrics.register(registry);
    }

    /// Resolves when a task ended, which happens only after [`GalleyHandle::stop`] or by a fault.
    pub async fn stopped(&mut self) {
        if let Some(task) = self.tasks.last_mut() {
            let _ = task.await;
        }
    }

    /// Stops serving and reading.
    pub async fn stop(mut self) {
        self.stop.cancel();
        for task in self.tasks.drain(..) {
            let _ = task.await;
        }
    }
}

/// Owns the sources and the store; one task.
struct Reader {
    /// `None` only while a reading is in progress on the blocking pool.
    source: Option<DirectorySource>,
    store: Option<Store>,
    shared: Arc<Shared>,
    server: mcp::ConfigServer,
    hosts: Option<watch::Receiver<Arc<BTreeSet<String>>>>,
}

impl Reader {
    async fn run(
        mut self,
        options: GalleyOptions,
        mut notifications: Notifications,
        stop: CancellationToken,
    ) {
        let mut poll = tokio::time::interval_at(Instant::now() + options.poll, options.poll);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut hosts = self.hosts.clone();
        let mut watching = true;
        loop {
            // All three arms only say "read again"; losing one to another loses nothing.
            let debounce = tokio::select! {
                () = stop.cancelled() => return,
                e = notifications.events.recv(), if watching => {
                    watching = e.is_some();
                    e.is_some()
                }
                () = changed(&mut hosts) => false,
                _ = poll.tick() => false,
            };
            if debounce {
                quiet(&mut notifications, options.debounce, options.debounce_max).await;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                ok = self.read() => if !ok { return },
            }
        }
    }

    /// Reads and publishes; false if that is no longer possible. File access and parsing run on the
    /// blocking pool.
    async fn read(&mut self) -> bool {
        let (Some(mut source), Some(mut store)) = (self.source.take(), self.store.take()) else {
            return false;
        };
        let extra = self.hosts.as_mut().map(|h| h.borrow_and_update().clone()).unwrap_or_default();
        let hosts = extra.clone();
        let read = tokio::task::spawn_blocking(move || {
            let files = source.read();
            let change = store.update(&files, Hosts::Known(&extra));
            (source, store, change)
        });
        match read.await {
            Ok((source, store, change)) => {
                self.publish(&store, change, hosts);
                self.source = Some(source);
                self.store = Some(store);
                true
            }
            Err(e) => {
                // A defect of ours. What was published stays; say so loudly and do not go on
                // with state of which nobody knows what it is.
                tracing::error!(error = %e, "reading the configuration failed; it is no longer reloaded");
                false
            }
        }
    }

    fn publish(&self, store: &Store, change: Change, hosts: Arc<BTreeSet<String>>) {
        let first = self.shared.status.borrow().generation == 0;
        let diff = match change {
            Change::Nothing if first => self.shared.documents.publish([]),
            Change::Nothing => return,
            Change::Some(documents) => self.shared.documents.update(documents),
            Change::All => {
                let all = store.documents().map(|(k, d)| (k.clone(), Arc::clone(d)));
                self.shared.documents.publish(all)
            }
        };
        self.shared.read.send_replace(Arc::new(LastRead { parsed: store.parsed(), hosts }));
        let applied = store.documents().len();
        if first || !diff.is_empty() {
            let snapshot = self.shared.documents.snapshot();
            if first {
                self.server.publish(by_type(snapshot.iter().map(|(k, d)| (k, &**d))));
            } else {
                // What did not change is not encoded again.
                let mut types: BTreeMap<&str, BTreeMap<String, Option<mcp::Document>>> = BTreeMap::new();
                let changed = diff.changed.iter().map(|k| (k, snapshot.get(k)));
                for (k, d) in changed.chain(diff.removed.iter().map(|k| (k, None))) {
                    let name = resource_name(&k.namespace, &k.name);
                    types.entry(k.kind.type_url()).or_default().insert(name, d.map(|d| travelling(d)));
                }
                for (t, documents) in types {
                    self.server.update(t, documents);
                }
            }
            tracing::info!(
                applied,
                changed = diff.changed.len(),
                removed = diff.removed.len(),
                "configuration applied"
            );
        }
        let old = self.shared.status.borrow().clone();
        let (reports, stale): (Vec<Arc<DocumentReport>>, _) =
            (store.reports().map(Arc::clone).collect(), store.stale().clone());
        if first || old.reports != reports || old.stale != stale || !diff.is_empty() {
            let known: HashSet<&DocumentReport> = old.rejected().collect();
            for r in reports.iter().filter(|r| !r.valid && !known.contains(&***r)) {
                for e in &r.errors {
                    tracing::warn!(
                        file = %r.file, line = e.line, document = %r.subject(), path = %e.path,
                        "configuration rejected: {}", e.message
                    );
                }
            }
            self.shared.metrics.record(&reports, applied, stale.len());
            let generation = old.generation + 1;
            self.shared.status.send_replace(Arc::new(Status { generation, applied, stale, reports }));
        }
    }
}

/// Waits for a time without changes.
async fn quiet(notifications: &mut Notifications, quiet: Duration, max: Duration) {
    let deadline = Instant::now() + max;
    loop {
        let until = (Instant::now() + quiet).min(deadline);
        match tokio::time::timeout_at(until, notifications.events.recv()).await {
            Ok(Some(())) if Instant::now() < deadline => {}
            _ => return,
        }
    }
}

async fn changed<T>(rx: &mut Option<watch::Receiver<T>>) {
    if let Some(r) = rx {
        if r.changed().await.is_ok() {
            return;
        }
        *rx = None;
    }
    std::future::pending().await
}

/// Documents as they travel. Every type is there, so that a reader knows which ones are empty.
pub(crate) fn by_type<'a>(
    all: impl Iterator<Item = (&'a Key, &'a Document)>,
) -> BTreeMap<String, BTreeMap<String, mcp::Document>> {
    let mut types: BTreeMap<String, BTreeMap<String, mcp::Document>> =
        Kind::ALL.iter().map(|k| (k.type_url().to_owned(), BTreeMap::new())).collect();
    for (key, d) in all {
        types.entry(key.kind.type_url().to_owned()).or_default().insert(d.key(), travelling(d));
    }
    types
}

/// A document as it travels.
fn travelling(d: &Document) -> mcp::Document {
    mcp::Document {
        name: d.key(),
        version: d.api_version.clone(),
        created: d.metadata.creation_timestamp,
        labels: d.metadata.labels.clone(),
        annotations: d.metadata.annotations.clone(),
        body: d.spec.to_json(),
    }
}
