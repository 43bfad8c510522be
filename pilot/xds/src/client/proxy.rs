//! What a proxy executes, kept complete: listeners and clusters by wildcard, routes and endpoints
//! by reference.
//!
//! Updates arrive piecemeal; a proxy that swapped them in one by one would route to clusters
//! without endpoints. So a new [`ProxyState`] is published only when everything that its listeners
//! and clusters refer to has arrived, or has been reported as not existing, or did not arrive for
//! [`HOLD`]. What was accepted last is kept in a file, from which a proxy starts when no control
//! plane answers.

mod cache;
mod hosts;
pub mod on_demand;
mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_model::{
    federation::ForeignBundle,
    proxy::{Cluster, Listener, LoadAssignment, RouteConfiguration},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) use self::state::{asks, eds_name, routes_of};
use self::{
    on_demand::{Kind, OnDemandNames},
    state::{Inner, type_of},
};
use super::{AdsClient, ClientOptions, Connection, Handler, Mode, Names, Rejection, Subscriptions, Update};
use crate::{
    codec::Secret,
    nds::NameTable,
    node::NodeInfo,
    pb,
    process::{self, ProcessSettings},
    type_url::{BUNDLES, CDS, ECDS, LDS, NDS, PROXY_CONFIG, RDS, VHDS},
};

/// How long a state with dangling references is withheld. The server answers for names that do not
/// exist, so this only bounds the damage of one that does not.
pub const HOLD: Duration = Duration::from_secs(5);
/// The file is written at most this often.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// What a proxy executes. Everything that is referred to is there, unless the server has said that
/// it does not exist.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ProxyState {
    /// By name.
    pub listeners: BTreeMap<String, Arc<Listener>>,
    /// By name.
    pub routes: BTreeMap<String, Arc<RouteConfiguration>>,
    /// By name.
    pub clusters: BTreeMap<String, Arc<Cluster>>,
    /// By EDS service name.
    pub endpoints: BTreeMap<String, Arc<LoadAssignment>>,
    /// Counts the states of one client, for [`OnDemandNames::applied`].
    pub revision: u64,
}

/// What a [`ProxyClient`] needs to know.
#[derive(Debug, Clone)]
pub struct ProxyClientOptions {
    /// The connection.
    pub client: ClientOptions,
    /// Where the last accepted configuration is kept; `None` keeps none.
    pub cache: Option<PathBuf>,
    /// Also fetch the name table.
    pub name_table: bool,
    /// What a bootstrap file says; `None` for a member of the mesh, who gets everything but its secrets from the
    /// control plane.
    pub fixed: Option<Fixed>,
    /// Names that traffic asks for.
    pub on_demand: OnDemandNames,
}

/// What a bootstrap file gives a client, and leaves to the server.
#[derive(Clone)]
pub struct Fixed {
    /// Static resources; the server cannot replace them.
    pub resources: Arc<ProxyState>,
    /// Whether clusters are asked for.
    pub clusters: bool,
    /// Whether listeners are asked for.
    pub listeners: bool,
    /// Names that are not asked for, since their secrets are there.
    pub secret_names: BTreeSet<String>,
    /// Takes secrets.
    pub secrets: Arc<dyn SecretSink>,
}

impl std::fmt::Debug for Fixed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fixed")
            .field("clusters", &self.clusters)
            .field("listeners", &self.listeners)
            .finish_non_exhaustive()
    }
}

/// Where secrets from a server go.
pub trait SecretSink: Send + Sync {
    /// Takes a secret.
    ///
    /// # Errors
    /// Why it cannot be used; the one before stays.
    fn take(&self, secret: &Secret) -> Result<(), String>;
    /// Whether there is one of this name.
    fn has(&self, name: &str) -> bool;
}

/// How the client is doing, for readiness and the admin interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientHealth {
    /// Connected to a control plane now.
    pub connected: bool,
    /// Streams on which a control plane has answered.
    pub streams: u64,
    /// A control plane has answered at least once since the start.
    pub synced: bool,
    /// The state came from the file and no control plane has confirmed it yet.
    pub from_cache: bool,
    /// Resources refused, by type and name, with the reason; gone when a good version arrives.
    pub rejected: BTreeMap<(String, String), String>,
}

/// Follows a control plane. Dropping it ends the connection; the last state remains readable.
pub struct ProxyClient {
    client: AdsClient,
    /// It follows a control plane of the mesh, not one that a bootstrap file names.
    own: bool,
    _stop: DropGuard,
    state: watch::Receiver<Arc<ProxyState>>,
    names: watch::Receiver<Arc<NameTable>>,
    bundles: watch::Receiver<Vec<ForeignBundle>>,
    process: watch::Receiver<Option<ProcessSettings>>,
    health: watch::Receiver<ClientHealth>,
}

/// Settings of the process that are kept in a file, if there is a usable one: for what is to be known before there can be
/// a client.
#[must_use]
pub fn kept_process(cache: &Path) -> Option<ProcessSettings> {
    let types = cache::load(cache).ok()??;
    let kept = types.get(PROXY_CONFIG)?.first()?;
    process::decode(kept.resource.as_ref()?).ok()
}

impl ProxyClient {
    /// Starts on the current runtime, from the file if there is a usable one.
    #[must_use]
    pub fn start(mut options: ProxyClientOptions) -> Self {
        let (state_tx, state) = watch::channel(Arc::default());
        let (names_tx, table) = watch::channel(Arc::default());
        let (bundles_tx, bundles) = watch::channel(vec![]);
        let (process_tx, process) = watch::channel(None);
        let (health_tx, health) = watch::channel(ClientHealth::default());
        let mut inner = Inner::new(options.fixed.clone());
        let delta = options.client.mode == Mode::Delta;
        let own = delta && options.fixed.is_none();
        if own {
            options.client.node = options.client.node.taking_hosts();
        }
        inner.without_on_demand = (!delta).then_some("needs an ads_config of api_type DELTA_GRPC");
        let work = Arc::new(Work { inner: Mutex::new(inner), dirty: watch::Sender::new(0) });

        let mut known = BTreeMap::new();
        if let Some(path) = &options.cache {
            match cache::load(path) {
                Ok(Some(types)) => {
                    let mut inner = work.lock();
                    for (type_url, resources) in types {
                        if type_url == ON_DEMAND {
                            if delta {
                                restore(&mut inner, &options.on_demand, &resources);
                            }
                            continue;
                        }
                        let versions: BTreeMap<String, String> =
                            resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
                        let bad = inner.apply(&type_url, Update { changed: resources, removed: vec![] });
                        let versions =
                            versions.into_iter().filter(|(n, _)| !bad.iter().any(|b| b.name == *n)).collect();
                        known.insert(type_url, versions);
                    }
                    drop(inner);
                    health_tx.send_modify(|h| h.from_cache = true);
                }
                Ok(None) => {}
                Err(e) => {
                    tracing::warn!(path = %path.display(), error = %e, "kept configuration is not usable");
                }
            }
        }
        bundles_tx.send_replace(work.lock().bundles.values().cloned().collect());
        process_tx.send_replace(work.lock().process);
        let cached_names = work.lock().names.clone();
        if let Some(t) = cached_names {
            names_tx.send_replace(t);
        }

        let asked = |of: fn(&Fixed) -> bool| options.fixed.as_ref().is_none_or(of);
        let mut initial = Vec::new();
        let all_clusters = asked(|f| f.clusters);
        if all_clusters {
            initial.push((CDS, Names::All));
        }
        if asked(|f| f.listeners) {
            initial.push((LDS, Names::All));
        }
        if options.name_table {
            initial.push((NDS, Names::All));
        }
        // A resolver takes names alone, and verifies the control plane all the same.
        if options.fixed.is_none() || options.name_table {
            initial.push((BUNDLES, Names::All));
        }
        // A process that has a file for everything has flags for itself.
        if options.fixed.is_none() {
            initial.push((PROXY_CONFIG, Names::All));
        }
        let token = CancellationToken::new();
        let on_demand = options.on_demand;
        let publisher = publish(work.clone(), state_tx, options.cache, on_demand.clone());
        let asking = work.clone();
        let stop = token.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = publisher => {}
            }
        });
        let client = AdsClient::start_from(options.client, &initial, known, |subscriptions| {
            let follow = Follow {
                work,
                subscriptions,
                all_clusters,
                names: names_tx,
                bundles: bundles_tx,
                process: process_tx,
                health: health_tx,
            };
            follow.subscribe();
            follow
        });
        let (stop, subscriptions) = (token.clone(), client.subscriptions());
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = ask(&asking, &subscriptions, all_clusters, &on_demand) => {}
            }
        });
        Self { client, own, _stop: token.drop_guard(), state, names: table, bundles, process, health }
    }

    /// The state as it changes; starts empty.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<Arc<ProxyState>> {
        self.state.clone()
    }

    /// Says who we are from now on, and waits until a control plane has taken it or `limit` is over; whether one has.
    pub async fn set_node(&self, node: NodeInfo, limit: Duration) -> bool {
        let node = if self.own { node.taking_hosts() } else { node };
        let mut health = self.health.clone();
        let (connected, before) = {
            let h = health.borrow_and_update();
            (h.connected, h.streams)
        };
        self.client.subscriptions().set_node(node);
        if !connected {
            // Nobody is there to take it; whoever comes gets it.
            return false;
        }
        // The first answer on a stream comes after its node was read.
        let taken = health.wait_for(|h| h.connected && h.streams > before);
        matches!(tokio::time::timeout(limit, taken).await, Ok(Ok(_)))
    }

    /// The name table as it changes.
    #[must_use]
    pub fn names(&self) -> watch::Receiver<Arc<NameTable>> {
        self.names.clone()
    }

    /// The connection to the control plane.
    #[must_use]
    pub fn connection(&self) -> Connection {
        self.client.connection()
    }

    /// Roots of other trust domains as they change; those that were kept are there from the start.
    #[must_use]
    pub fn bundles(&self) -> watch::Receiver<Vec<ForeignBundle>> {
        self.bundles.clone()
    }

    /// Settings of the process as they change; those that were kept are there from the start, and `None` is that nobody has
    /// said anything yet.
    #[must_use]
    pub fn process(&self) -> watch::Receiver<Option<ProcessSettings>> {
        self.process.clone()
    }

    /// How the client is doing.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<ClientHealth> {
        self.health.clone()
    }
}

struct Work {
    inner: Mutex<Inner>,
    dirty: watch::Sender<u64>,
}

impl Work {
    // Critical sections replace whole entries, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Follow {
    work: Arc<Work>,
    subscriptions: Subscriptions,
    /// Whether all clusters are asked for.
    all_clusters: bool,
    names: watch::Sender<Arc<NameTable>>,
    bundles: watch::Sender<Vec<ForeignBundle>>,
    process: watch::Sender<Option<ProcessSettings>>,
    health: watch::Sender<ClientHealth>,
}

impl Follow {
    fn subscribe(&self) {
        subscribe(&self.work, &self.subscriptions, self.all_clusters);
    }
}

/// Asks for everything that is referred to, and for what traffic wants.
fn subscribe(work: &Work, subscriptions: &Subscriptions, all_clusters: bool) {
    let (references, mut on_demand, hosts) = {
        let inner = work.lock();
        (inner.references(), inner.on_demand.clone(), inner.has_hosts_on_demand())
    };
    for (type_url, names) in references {
        subscriptions.subscribe(type_url, Names::Some(names));
    }
    let names = on_demand.remove(&Kind::VirtualHost).unwrap_or_default();
    // Envoy begins without a name as well: a server may have hosts for everybody.
    let names = if hosts { Names::AllAnd(names) } else { Names::Some(names) };
    subscriptions.subscribe(VHDS, names);
    match on_demand.remove(&Kind::Cluster) {
        Some(names) if !all_clusters => subscriptions.subscribe(CDS, Names::Some(names)),
        Some(names) if !names.is_empty() => subscriptions.subscribe(CDS, Names::AllAnd(names)),
        Some(_) => subscriptions.subscribe(CDS, Names::All),
        None => {}
    }
}

/// Asks for what traffic asks for.
async fn ask(work: &Work, subscriptions: &Subscriptions, all_clusters: bool, names: &OnDemandNames) {
    loop {
        let asked = names.asked().await;
        let again = work.lock().ask(asked);
        subscribe(work, subscriptions, all_clusters);
        for (kind, names) in again {
            subscriptions.again(type_of(kind), names);
        }
        // It may be there already, or no longer wanted.
        work.dirty.send_modify(|v| *v += 1);
    }
}

/// Names that traffic had asked for, among the types of the file.
const ON_DEMAND: &str = "flotilla.dev/on-demand";

fn restore(inner: &mut Inner, names: &OnDemandNames, kept: &[pb::Resource]) {
    for r in kept {
        let Some((kind, name)) = r.name.split_once(' ') else { continue };
        let kind = if kind == "cluster" { Kind::Cluster } else { Kind::VirtualHost };
        if names.restore((kind, name.to_owned())) {
            inner.on_demand.entry(kind).or_default().insert(name.to_owned());
        }
    }
}

/// What the file holds.
fn kept(inner: &Inner) -> BTreeMap<&'static str, BTreeMap<String, pb::Resource>> {
    let mut out = inner.raw.clone();
    let mut names = BTreeMap::new();
    for (kind, of_kind) in &inner.on_demand {
        let word = if *kind == Kind::Cluster { "cluster" } else { "host" };
        for n in of_kind.iter().filter(|n| inner.holds(*kind, n)) {
            let name = format!("{word} {n}");
            names.insert(name.clone(), pb::Resource { name, ..pb::Resource::default() });
        }
    }
    if !names.is_empty() {
        out.insert(ON_DEMAND, names);
    }
    out
}

impl Handler for Follow {
    fn on_update(&mut self, type_url: &str, update: Update) -> Result<(), Vec<Rejection>> {
        let names: Vec<String> =
            update.changed.iter().map(|r| r.name.clone()).chain(update.removed.iter().cloned()).collect();
        let bad = self.work.lock().apply(type_url, update);
        // A filter's configuration may complete a listener, which then refers to routes.
        if matches!(type_url, CDS | LDS | RDS | ECDS) {
            self.subscribe();
        }
        if type_url == NDS {
            let table = self.work.lock().names.clone().unwrap_or_default();
            self.names.send_replace(table);
        }
        if type_url == BUNDLES {
            self.bundles.send_replace(self.work.lock().bundles.values().cloned().collect());
        }
        if type_url == PROXY_CONFIG {
            let now = self.work.lock().process;
            self.process.send_if_modified(|p| {
                let changed = *p != now;
                *p = now;
                changed
            });
        }
        self.health.send_modify(|h| {
            h.synced = true;
            h.from_cache = false;
            for n in names {
                h.rejected.remove(&(type_url.to_owned(), n));
            }
            for r in &bad {
                h.rejected.insert((type_url.to_owned(), r.name.clone()), r.reason.clone());
            }
        });
        self.work.dirty.send_modify(|v| *v += 1);
        for r in &bad {
            tracing::warn!(type_url, name = %r.name, reason = %r.reason, "resource rejected");
        }
        if bad.is_empty() { Ok(()) } else { Err(bad) }
    }

    fn on_connection(&mut self, up: bool) {
        self.health.send_modify(|h| {
            h.connected = up;
            h.streams += u64::from(up);
        });
    }
}

/// Publishes consistent states and writes the file.
async fn publish(
    work: Arc<Work>,
    out: watch::Sender<Arc<ProxyState>>,
    file: Option<PathBuf>,
    names: OnDemandNames,
) {
    let mut dirty = work.dirty.subscribe();
    // What came from the file was there before this task first ran.
    dirty.mark_changed();
    // Names are no part of the state, and may be all that there is.
    let (mut table, mut bundles, mut process) = {
        let inner = work.lock();
        (inner.names.clone(), inner.bundles.clone(), inner.process)
    };
    let mut held_since: Option<Instant> = None;
    let mut save_at: Option<Instant> = None;
    loop {
        let far = Instant::now() + Duration::from_secs(3600);
        let hold = held_since.map_or(far, |t| t + HOLD);
        tokio::select! {
            c = dirty.changed() => {
                if c.is_err() {
                    return;
                }
            }
            () = tokio::time::sleep_until(hold) => {}
            () = tokio::time::sleep_until(save_at.unwrap_or(far)) => {
                save_at = None;
                if let Some(path) = file.clone() {
                    let raw = kept(&work.lock());
                    let saved = tokio::task::spawn_blocking(move || cache::save(&path, &raw)).await;
                    if let Ok(Err(e)) = saved {
                        tracing::warn!(error = %e, "cannot keep the configuration in a file");
                    }
                }
                continue;
            }
        }
        let next = {
            let mut inner = work.lock();
            let started = inner.started();
            let overdue = started && held_since.is_some_and(|t| t.elapsed() >= HOLD);
            if inner.complete() || overdue {
                if overdue {
                    tracing::warn!("not everything that is referred to has arrived; going on without it");
                }
                inner.prune();
                held_since = None;
                Some(inner.view())
            } else {
                if started && held_since.is_none() {
                    held_since = Some(Instant::now());
                }
                None
            }
        };
        let mut changed = false;
        if let Some(mut next) = next {
            changed = out.send_if_modified(|s| {
                next.revision = s.revision;
                let differs = **s != next;
                if differs {
                    next.revision += 1;
                    *s = Arc::new(next);
                }
                differs
            });
        }
        {
            let inner = work.lock();
            let view = out.borrow();
            names.answer(inner.round, view.revision, |(kind, name)| inner.find(&view, *kind, name));
            names.retain(|(kind, name)| inner.keeps(*kind, name));
        }
        let newest = work.lock().names.clone();
        if newest.as_ref().map(Arc::as_ptr) != table.as_ref().map(Arc::as_ptr) {
            table = newest;
            changed = true;
        }
        {
            let inner = work.lock();
            if inner.bundles != bundles {
                bundles.clone_from(&inner.bundles);
                changed = true;
            }
            if inner.process != process {
                process = inner.process;
                changed = true;
            }
        }
        if changed && file.is_some() && save_at.is_none() {
            save_at = Some(Instant::now() + SAVE_EVERY);
        }
    }
}

#[cfg(test)]
mod tests;
