//! What the ADS server serves: the configuration of each connected proxy, made once per change, and what many proxies
//! have in common once for all of them. What a change does not touch is not made again; see [`classes`].

mod asked;
mod classes;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use mesh_identity::peer_identity;
use mesh_xds::{
    NodeInfo, NodeKind, PeerInfo, ResourceSource, TypeSnapshot, process,
    server::{Layer, Transport},
    type_url::PROXY_CONFIG,
};
use tokio::sync::watch;
use tonic::Status;

use self::classes::{Class, Classes, Common, Layers};
use crate::{
    config::Problem,
    draining::Draining,
    envoy_filter::{self, Refused, Selected},
    generate::{self, Generated},
    index::Entry,
    proxy::{ProxyError, ProxyNode, Situation},
    world::{self, World},
};

/// Configuration of proxies as an ADS source.
pub struct PilotSource {
    world: RwLock<(u64, Option<Arc<World>>)>,
    changes: watch::Sender<u64>,
    proxies: Mutex<HashMap<String, Cached>>,
    classes: Classes,
    empty: Arc<TypeSnapshot>,
    draining: Draining,
}

struct Cached {
    node: NodeInfo,
    clients: usize,
    /// Locked while it is generated, so that the types of one proxy come from one generation.
    slot: Arc<Mutex<Slot>>,
}

/// A proxy's configuration.
#[derive(Default)]
struct Slot {
    generation: u64,
    proxy: Option<ProxyNode>,
    /// What it has in common with others, and what this was decided by: labels, patches, what is known of its workload, and
    /// whether it asks.
    class: Option<(Arc<BTreeSet<String>>, Selected, Situation, bool, Arc<Mutex<Class>>)>,
    /// Its own part, and what it was made of.
    own: Layers,
    basis: Option<Basis>,
    snapshots: BTreeMap<&'static str, Arc<TypeSnapshot>>,
    /// Patches that were left out, of its own part and of all.
    refused_own: Refused,
    refused: Refused,
}

/// What a sidecar's own part depends on.
struct Basis {
    /// See [`crate::world::Lineage`].
    shape: u64,
    /// Services of its workload.
    instances: Vec<Arc<Entry>>,
    /// Patches.
    filters: Selected,
    on_demand: bool,
    /// Routes of a listener that is an HTTP proxy: which filters it has depends on them.
    routing: Option<u64>,
}

impl Basis {
    /// `None` for gateways: theirs depends on everything.
    fn of(proxy: &ProxyNode, world: &World) -> Option<Self> {
        let instances = || world.index.instances(&proxy.addresses).into_iter();
        (!proxy.router).then(|| Self {
            shape: world.lineage().shape,
            instances: instances().map(|(e, _)| Arc::clone(e)).collect(),
            filters: proxy.filters.clone(),
            on_demand: proxy.on_demand,
            routing: proxy.http_proxy_port.map(|_| world.lineage().routing),
        })
    }

    fn same(&self, other: &Self) -> bool {
        self.shape == other.shape
            && self.filters == other.filters
            && self.on_demand == other.on_demand
            && self.routing == other.routing
            && self.instances.len() == other.instances.len()
            && self.instances.iter().zip(&other.instances).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // Everything behind these locks is replaced whole, so a poisoned one is still good.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    /// Brings it up to date.
    fn refresh(&mut self, node: &NodeInfo, world: &World, generation: u64, classes: &Classes) {
        if self.proxy.is_none() {
            match ProxyNode::new(node) {
                Ok(p) => self.proxy = Some(p),
                Err(e) => {
                    tracing::warn!(node = %node.id, error = %e, "no configuration");
                    self.snapshots.clear();
                    return;
                }
            }
        }
        let Some(proxy) = &mut self.proxy else { return };
        if world.completed(proxy) {
            (self.class, self.basis) = (None, None);
        }
        *proxy = world.patched(proxy);
        let telling = world.telling_labels();
        let class = match &self.class {
            Some((labels, filters, situation, asks, class))
                if Arc::ptr_eq(labels, telling)
                    && *filters == proxy.filters
                    && *situation == proxy.situation
                    && *asks == proxy.on_demand =>
            {
                Arc::clone(class)
            }
            _ => {
                let class = classes.get(proxy.class(telling));
                let (filters, situation) = (proxy.filters.clone(), proxy.situation.clone());
                let asks = proxy.on_demand;
                self.class = Some((Arc::clone(telling), filters, situation, asks, Arc::clone(&class)));
                class
            }
        };
        let Common { layers: shared, on_demand, refused } = classes.layers(&class, world, generation);
        let basis = Basis::of(proxy, world);
        let kept = matches!((&basis, &self.basis), (Some(a), Some(b)) if a.same(b));
        if !kept {
            let made = generate::own(proxy, world);
            self.own = classes::own(&made, &self.own, proxy.grpc);
            self.refused_own = made.refused;
            self.basis = basis;
        }
        self.refused.clone_from(&refused);
        for (k, v) in &self.refused_own {
            self.refused.entry(k.clone()).or_insert_with(|| v.clone());
        }
        let mut snapshots = BTreeMap::new();
        for (t, common) in &shared {
            let layers: Vec<Arc<Layer>> = self.own.get(t).into_iter().chain([common]).cloned().collect();
            // Nothing about it changed: the same, whose version need not be found again.
            let asked = on_demand.get(t);
            let before = self.snapshots.get(t).filter(|s| {
                let same = match (s.on_demand(), asked) {
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                    (a, b) => a.is_none() && b.is_none(),
                };
                same && s.layers().len() == layers.len()
                    && s.layers().iter().zip(&layers).all(|(a, b)| Arc::ptr_eq(a, b))
            });
            let made = || Arc::new(TypeSnapshot::of(layers).with_on_demand(asked.cloned()));
            let snapshot = before.cloned().unwrap_or_else(made);
            snapshots.insert(*t, snapshot);
        }
        let settings = process::encode(&world::process::settings(&world.config, proxy));
        let message = classes::message(process::NAME, settings);
        let before = self.snapshots.get(PROXY_CONFIG);
        let same = before.filter(|s| s.get(process::NAME).is_some_and(|r| r.version == message.version));
        let snapshot = same.cloned().unwrap_or_else(|| {
            let layer = before.and_then(|s| s.layers().first()).map(|l| l.next(vec![message.clone()]));
            Arc::new(TypeSnapshot::of(vec![layer.unwrap_or_else(|| Layer::new(vec![message]))]))
        });
        snapshots.insert(PROXY_CONFIG, snapshot);
        self.snapshots = snapshots;
    }
}

impl Default for PilotSource {
    fn default() -> Self {
        Self::new()
    }
}

impl PilotSource {
    /// A source without a world: it serves nothing and proxies wait.
    #[must_use]
    pub fn new() -> Self {
        Self {
            world: RwLock::new((0, None)),
            changes: watch::Sender::new(0),
            proxies: Mutex::default(),
            classes: Classes::default(),
            empty: Arc::default(),
            draining: Draining::default(),
        }
    }

    /// East-west gateways that drain.
    pub(crate) fn draining(&self) -> &Draining {
        &self.draining
    }

    /// Replaces the world; every connected proxy is looked at again.
    pub fn update(&self, world: Arc<World>) {
        let generation = {
            let mut w = self.world.write().unwrap_or_else(PoisonError::into_inner);
            w.0 += 1;
            w.1 = Some(world);
            w.0
        };
        self.classes.turn(generation);
        self.changes.send_replace(generation);
    }

    /// The world now.
    #[must_use]
    pub fn world(&self) -> Option<Arc<World>> {
        self.world.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// The generation of the world; 0 before the first.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.world.read().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Nodes of connected proxies.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeInfo> {
        lock(&self.proxies).values().map(|c| c.node.clone()).collect()
    }

    /// What of the configuration those of these nodes that are gRPC libraries cannot do.
    #[must_use]
    pub fn grpc_problems<'n>(&self, nodes: impl Iterator<Item = &'n NodeInfo>) -> Vec<Problem> {
        let Some(world) = self.world() else { return vec![] };
        let libraries = nodes.filter_map(|n| ProxyNode::new(n).ok()).filter(|p| p.grpc);
        libraries.flat_map(|p| generate::grpc_problems(&p, &world)).collect()
    }

    /// Patches of `EnvoyFilter` documents that connected proxies could not be given.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let slots: Vec<_> = lock(&self.proxies).values().map(|c| Arc::clone(&c.slot)).collect();
        let mut all = Refused::new();
        for s in slots {
            for (k, v) in &lock(&s).refused {
                all.entry(k.clone()).or_insert_with(|| v.clone());
            }
        }
        envoy_filter::problems(&all).collect()
    }

    /// The configuration of a node as values, for operators: virtual hosts stand in their route configurations. Of a proxy
    /// that asks it is all that it may ask for.
    ///
    /// # Errors
    /// [`ProxyError`] if the node is not a proxy.
    pub fn configuration(&self, node: &NodeInfo) -> Result<Generated, ProxyError> {
        let mut proxy = ProxyNode { takes_hosts: false, ..ProxyNode::new(node)? };
        let Some(w) = self.world() else { return Ok(Generated::default()) };
        w.completed(&mut proxy);
        let mut made = generate::generate(&proxy, &w);
        made.join_hosts();
        Ok(made)
    }

    /// Whether a node gets virtual hosts and clusters only if it asks for them.
    #[must_use]
    pub fn is_on_demand(&self, node: &NodeInfo) -> bool {
        let proxy = ProxyNode::new(node).ok();
        self.world().zip(proxy).is_some_and(|(w, p)| w.patched(&p).on_demand)
    }

    /// Which of these nodes ask no Mixer although the mesh's settings say so: only our own proxies do.
    #[must_use]
    pub fn mixer_problems<'n>(&self, nodes: impl Iterator<Item = &'n NodeInfo>) -> Vec<Problem> {
        let Some(world) = self.world() else { return vec![] };
        let mesh = &world.config.mesh;
        if mesh.disable_policy_checks || mesh.mixer_check_server.is_empty() {
            return vec![];
        }
        let problem = |n: &NodeInfo| {
            let proxy = ProxyNode::new(n).ok().filter(|p| !p.flotilla)?;
            let what = if proxy.grpc { "a gRPC library" } else { "an Envoy" };
            Some(Problem {
                object: format!("proxy {}.{}", n.name, n.namespace),
                message: format!("mixerCheckServer: {what} asks no Mixer, so its requests are not checked"),
            })
        };
        nodes.filter_map(problem).collect()
    }

    /// What of the settings of processes those of these nodes go without that are Envoys.
    #[must_use]
    pub fn process_problems<'n>(&self, nodes: impl Iterator<Item = &'n NodeInfo>) -> Vec<Problem> {
        let Some(world) = self.world() else { return vec![] };
        let problem = |n: &NodeInfo| {
            let proxy = ProxyNode::new(n).ok()?;
            world::process::problem(&world.config, &proxy, &format!("{}.{}", n.name, n.namespace))
        };
        nodes.filter_map(problem).collect()
    }

    /// Which of these nodes should ask, and get everything all the same.
    #[must_use]
    pub fn on_demand_problems<'n>(&self, nodes: impl Iterator<Item = &'n NodeInfo>) -> Vec<Problem> {
        let Some(world) = self.world() else { return vec![] };
        let problem = |n: &NodeInfo| {
            let proxy = world.patched(&ProxyNode::new(n).ok()?);
            world::on_demand::problem(&world.config, &proxy, &format!("{}.{}", n.name, n.namespace))
        };
        nodes.filter_map(problem).collect()
    }
}

impl ResourceSource for PilotSource {
    fn snapshot(&self, node: &NodeInfo, type_url: &str) -> Arc<TypeSnapshot> {
        let (generation, world) = {
            let w = self.world.read().unwrap_or_else(PoisonError::into_inner);
            (w.0, w.1.clone())
        };
        let Some(world) = world else { return self.empty.clone() };
        let slot = lock(&self.proxies).get(&node.id).filter(|c| c.node == *node).map(|c| c.slot.clone());
        // A second client with the same ID and another node gets what its own node says.
        let slot = slot.unwrap_or_default();
        let mut slot = lock(&slot);
        if slot.generation != generation {
            slot.refresh(node, &world, generation, &self.classes);
            slot.generation = generation;
        }
        slot.snapshots.get(type_url).cloned().unwrap_or_else(|| self.empty.clone())
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Over TLS a proxy may only ask for its own workload's configuration: namespace and service
    /// account of the node must be those of its certificate, which this cluster must have issued.
    /// Without TLS only loopback and the control plane's own sockets get through.
    fn authorize(&self, peer: &PeerInfo, node: &NodeInfo) -> Result<(), Status> {
        if node.kind == NodeKind::Component {
            return Err(Status::invalid_argument(format!("node ID {:?} is not that of a proxy", node.id)));
        }
        let proxy = ProxyNode::new(node).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if self.generation() == 0 {
            // An empty answer would make a proxy drop what it has.
            return Err(Status::unavailable("configuration has not been read yet"));
        }
        match peer.transport {
            Transport::Unix => return Ok(()),
            Transport::Plaintext => {
                return match peer.address {
                    Some(a) if a.ip().is_loopback() => Ok(()),
                    _ => Err(Status::permission_denied("plaintext xDS is for this host only")),
                };
            }
            Transport::Tls => {}
        }
        let identity = peer_identity(&peer.certificates)
            .ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        let spiffe =
            identity.spiffe.ok_or_else(|| Status::unauthenticated("the certificate has no SPIFFE ID"))?;
        let claimed = (proxy.namespace.as_str(), proxy.service_account.as_str());
        if spiffe.namespace_and_account() != Some(claimed) {
            return Err(Status::permission_denied(format!(
                "{spiffe} may not ask for the configuration of namespace {} and account {}",
                claimed.0, claimed.1
            )));
        }
        let Some(world) = self.world() else {
            return Err(Status::unavailable("configuration has not been read yet"));
        };
        if spiffe.trust_domain() != world.settings.trust_domain.as_str() {
            return Err(Status::permission_denied(format!("{spiffe} is of another trust domain")));
        }
        if let Some(c) = identity.cluster.filter(|c| *c != world.settings.cluster) {
            return Err(Status::permission_denied(format!("{spiffe} is a workload of cluster {c}")));
        }
        // A certificate does not tell an address, and whoever drains takes traffic away from one.
        if node.is_draining() && peer.address.map(|a| a.ip().to_canonical()) != node.ip {
            return Err(Status::permission_denied("a gateway may drain its own address only"));
        }
        Ok(())
    }

    fn connected(&self, node: &NodeInfo) {
        self.draining.connected(node);
        let mut proxies = lock(&self.proxies);
        let c = proxies.entry(node.id.clone()).or_insert_with(|| Cached {
            node: node.clone(),
            clients: 0,
            slot: Arc::default(),
        });
        c.clients += 1;
        if c.node != *node {
            // The proxy came back with other metadata.
            c.node = node.clone();
            c.slot = Arc::default();
        }
    }

    fn disconnected(&self, node: &NodeInfo) {
        let mut proxies = lock(&self.proxies);
        if let Some(c) = proxies.get_mut(&node.id) {
            c.clients = c.clients.saturating_sub(1);
            if c.clients == 0 {
                proxies.remove(&node.id);
            }
        }
    }
}

#[cfg(test)]
mod tests;
