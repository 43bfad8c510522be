//! What a proxy executes, kept complete: listeners and clusters by wildcard, routes and endpoints
//! by reference.
//!
//! Updates arrive piecemeal; a proxy that swapped them in one by one would route to clusters
//! without endpoints. So a new [`ProxyState`] is published only when everything that its listeners
//! and clusters refer to has arrived, or has been reported as not existing, or did not arrive for
//! [`HOLD`]. What was accepted last is kept in a file, from which a proxy starts when no control
//! plane answers.

mod cache;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_model::proxy::{
    Cluster, Discovery, FilterChain, Listener, LoadAssignment, NetworkFilter, RouteConfiguration, RouteSource,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{AdsClient, ClientOptions, Handler, Names, Rejection, Subscriptions, Update};
use crate::{
    codec::{self, DecodeError},
    nds::NameTable,
    pb,
    type_url::{CDS, EDS, LDS, NDS, RDS},
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
}

/// How the client is doing, for readiness and the admin interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientHealth {
    /// Connected to a control plane now.
    pub connected: bool,
    /// A control plane has answered at least once since the start.
    pub synced: bool,
    /// The state came from the file and no control plane has confirmed it yet.
    pub from_cache: bool,
    /// Resources refused, by type and name, with the reason; gone when a good version arrives.
    pub rejected: BTreeMap<(String, String), String>,
}

/// Follows a control plane. Dropping it ends the connection; the last state remains readable.
pub struct ProxyClient {
    _client: AdsClient,
    _stop: DropGuard,
    state: watch::Receiver<Arc<ProxyState>>,
    names: watch::Receiver<Arc<NameTable>>,
    health: watch::Receiver<ClientHealth>,
}

impl ProxyClient {
    /// Starts on the current runtime, from the file if there is a usable one.
    #[must_use]
    pub fn start(options: ProxyClientOptions) -> Self {
        let (state_tx, state) = watch::channel(Arc::default());
        let (names_tx, names) = watch::channel(Arc::default());
        let (health_tx, health) = watch::channel(ClientHealth::default());
        let work = Arc::new(Work { inner: Mutex::default(), dirty: watch::Sender::new(0) });

        let mut known = BTreeMap::new();
        if let Some(path) = &options.cache {
            match cache::load(path) {
                Ok(Some(types)) => {
                    let mut inner = work.lock();
                    for (type_url, resources) in types {
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
        let cached_names = work.lock().names.clone();
        if let Some(t) = cached_names {
            names_tx.send_replace(t);
        }

        let mut initial = vec![(CDS, Names::All), (LDS, Names::All)];
        if options.name_table {
            initial.push((NDS, Names::All));
        }
        let token = CancellationToken::new();
        let publisher = publish(work.clone(), state_tx, options.cache);
        let stop = token.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = publisher => {}
            }
        });
        let client = AdsClient::start_from(options.client, &initial, known, |subscriptions| {
            let follow = Follow { work, subscriptions, names: names_tx, health: health_tx };
            follow.subscribe();
            follow
        });
        Self { _client: client, _stop: token.drop_guard(), state, names, health }
    }

    /// The state as it changes; starts empty.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<Arc<ProxyState>> {
        self.state.clone()
    }

    /// The name table as it changes.
    #[must_use]
    pub fn names(&self) -> watch::Receiver<Arc<NameTable>> {
        self.names.clone()
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

#[derive(Default)]
struct Inner {
    state: ProxyState,
    /// Routes and endpoints that the server has said do not exist.
    absent: BTreeSet<(&'static str, String)>,
    received: BTreeSet<&'static str>,
    names: Option<Arc<NameTable>>,
    /// What was accepted, as it came, for the file.
    raw: BTreeMap<&'static str, BTreeMap<String, pb::Resource>>,
}

fn put<T>(
    map: &mut BTreeMap<String, Arc<T>>,
    r: &pb::Resource,
    any: &pb::Any,
    decode: fn(&pb::Any) -> Result<T, DecodeError>,
) -> Result<(), String> {
    match decode(any) {
        Ok(v) => {
            map.insert(r.name.clone(), Arc::new(v));
            Ok(())
        }
        Err(e) => Err(format!("{}: {}", e.field, e.reason)),
    }
}

impl Inner {
    fn apply(&mut self, type_url: &str, update: Update) -> Vec<Rejection> {
        let Some(t) = [CDS, EDS, LDS, RDS, NDS].into_iter().find(|t| *t == type_url) else {
            return update
                .changed
                .into_iter()
                .map(|r| Rejection { name: r.name, reason: format!("type {type_url} is not known") })
                .collect();
        };
        let mut bad = Vec::new();
        for r in update.changed {
            let applied = match &r.resource {
                None => Err("no resource".to_owned()),
                Some(any) => match t {
                    CDS => put(&mut self.state.clusters, &r, any, codec::decode_cluster),
                    EDS => put(&mut self.state.endpoints, &r, any, codec::decode_endpoints),
                    LDS => put(&mut self.state.listeners, &r, any, codec::decode_listener),
                    RDS => put(&mut self.state.routes, &r, any, codec::decode_route),
                    _ => NameTable::from_any(any)
                        .map(|n| self.names = Some(Arc::new(n)))
                        .map_err(|e| e.to_string()),
                },
            };
            match applied {
                Ok(()) => {
                    self.absent.remove(&(t, r.name.clone()));
                    self.raw.entry(t).or_default().insert(r.name.clone(), r);
                }
                Err(reason) => {
                    // Without an older version there is nothing to wait for.
                    self.absent.insert((t, r.name.clone()));
                    bad.push(Rejection { name: r.name, reason });
                }
            }
        }
        for n in update.removed {
            match t {
                CDS => drop(self.state.clusters.remove(&n)),
                EDS => drop(self.state.endpoints.remove(&n)),
                LDS => drop(self.state.listeners.remove(&n)),
                RDS => drop(self.state.routes.remove(&n)),
                _ => self.names = None,
            }
            if let Some(raw) = self.raw.get_mut(t) {
                raw.remove(&n);
            }
            self.absent.insert((t, n));
        }
        self.received.insert(t);
        bad
    }

    /// Names of routes and endpoints that listeners and clusters refer to.
    fn references(&self) -> (BTreeSet<String>, BTreeSet<String>) {
        let routes = self.state.listeners.values().flat_map(|l| routes_of(l)).map(str::to_owned).collect();
        let endpoints = self.state.clusters.values().filter_map(|c| eds_name(c)).map(str::to_owned).collect();
        (routes, endpoints)
    }

    fn complete(&self) -> bool {
        if !(self.received.contains(CDS) && self.received.contains(LDS)) {
            return false;
        }
        let (routes, endpoints) = self.references();
        routes.into_iter().all(|n| self.state.routes.contains_key(&n) || self.absent.contains(&(RDS, n)))
            && endpoints
                .into_iter()
                .all(|n| self.state.endpoints.contains_key(&n) || self.absent.contains(&(EDS, n)))
    }

    /// Drops what nothing refers to any more.
    fn prune(&mut self) {
        let (routes, endpoints) = self.references();
        self.state.routes.retain(|n, _| routes.contains(n));
        self.state.endpoints.retain(|n, _| endpoints.contains(n));
        self.absent.retain(|(t, n)| match *t {
            RDS => routes.contains(n),
            EDS => endpoints.contains(n),
            _ => false,
        });
        if let Some(raw) = self.raw.get_mut(RDS) {
            raw.retain(|n, _| routes.contains(n));
        }
        if let Some(raw) = self.raw.get_mut(EDS) {
            raw.retain(|n, _| endpoints.contains(n));
        }
    }
}

/// RDS names of a listener.
fn routes_of(l: &Listener) -> impl Iterator<Item = &str> {
    let chains: Vec<&FilterChain> = l.filter_chains.iter().chain(&l.default_filter_chain).collect();
    chains.into_iter().flat_map(|c| &c.filters).filter_map(|f| match f {
        NetworkFilter::Http(h) => match &h.routes {
            RouteSource::Rds(name) => Some(name.as_str()),
            RouteSource::Inline(_) => None,
        },
        _ => None,
    })
}

/// EDS name of a cluster: its own unless it says another.
fn eds_name(c: &Cluster) -> Option<&str> {
    match &c.discovery {
        Discovery::Eds(s) if s.is_empty() => Some(&c.name),
        Discovery::Eds(s) => Some(s),
        _ => None,
    }
}

struct Follow {
    work: Arc<Work>,
    subscriptions: Subscriptions,
    names: watch::Sender<Arc<NameTable>>,
    health: watch::Sender<ClientHealth>,
}

impl Follow {
    fn subscribe(&self) {
        let (routes, endpoints) = self.work.lock().references();
        self.subscriptions.subscribe(EDS, Names::Some(endpoints));
        self.subscriptions.subscribe(RDS, Names::Some(routes));
    }
}

impl Handler for Follow {
    fn on_update(&mut self, type_url: &str, update: Update) -> Result<(), Vec<Rejection>> {
        let names: Vec<String> =
            update.changed.iter().map(|r| r.name.clone()).chain(update.removed.iter().cloned()).collect();
        let bad = self.work.lock().apply(type_url, update);
        if matches!(type_url, CDS | LDS) {
            self.subscribe();
        }
        if type_url == NDS {
            let table = self.work.lock().names.clone().unwrap_or_default();
            self.names.send_replace(table);
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
        self.health.send_modify(|h| h.connected = up);
    }
}

/// Publishes consistent states and writes the file.
async fn publish(work: Arc<Work>, out: watch::Sender<Arc<ProxyState>>, file: Option<PathBuf>) {
    let mut dirty = work.dirty.subscribe();
    // What came from the file was there before this task first ran.
    dirty.mark_changed();
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
                    let raw = work.lock().raw.clone();
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
            let started = inner.received.contains(CDS) && inner.received.contains(LDS);
            let overdue = started && held_since.is_some_and(|t| t.elapsed() >= HOLD);
            if inner.complete() || overdue {
                if overdue {
                    tracing::warn!("some routes or endpoints have not arrived; going on without them");
                }
                inner.prune();
                held_since = None;
                Some(Arc::new(inner.state.clone()))
            } else {
                if started && held_since.is_none() {
                    held_since = Some(Instant::now());
                }
                None
            }
        };
        if let Some(next) = next {
            let changed = out.send_if_modified(|s| {
                let differs = **s != *next;
                if differs {
                    *s = next;
                }
                differs
            });
            if changed && file.is_some() && save_at.is_none() {
                save_at = Some(Instant::now() + SAVE_EVERY);
            }
        }
    }
}

#[cfg(test)]
mod tests;
