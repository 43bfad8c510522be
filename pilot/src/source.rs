//! What the ADS server serves: the configuration of each connected proxy, generated once per change
//! and encoded once for all proxies that share a resource.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
};

use mesh_identity::peer_identity;
use mesh_xds::{
    NodeInfo, NodeKind, PeerInfo, ResourceSource, TypeSnapshot, bundles, codec, pb,
    server::Transport,
    type_url::{BUNDLES, CDS, EDS, LDS, NDS, RDS},
};
use serde::Serialize;
use tokio::sync::watch;
use tonic::Status;

use crate::{
    draining::Draining,
    generate::{self, Generated},
    proxy::{ProxyError, ProxyNode},
    world::World,
};

/// Generated snapshots by type.
type Snapshots = BTreeMap<&'static str, Arc<TypeSnapshot>>;

/// Configuration of proxies as an ADS source.
pub struct PilotSource {
    world: RwLock<(u64, Option<Arc<World>>)>,
    changes: watch::Sender<u64>,
    proxies: Mutex<HashMap<String, Cached>>,
    classes: Mutex<Classes>,
    encoded: EncodeCache,
    empty: Arc<TypeSnapshot>,
    draining: Draining,
}

/// What proxies of a class have in common, for one generation of the world.
#[derive(Default)]
struct Classes {
    generation: u64,
    /// Empty while it is made; others of the class wait for it instead of making it again.
    parts: HashMap<ProxyNode, Arc<OnceLock<Snapshots>>>,
}

struct Cached {
    node: NodeInfo,
    clients: usize,
    /// Locked while it is generated, so that the types of one proxy come from one generation.
    slot: Arc<Mutex<Slot>>,
}

#[derive(Default)]
struct Slot {
    generation: u64,
    snapshots: Snapshots,
}

/// Encoded resources by type and version. Entries that one generation of the world no longer uses
/// are dropped with the next but one.
#[derive(Default)]
struct EncodeCache {
    current: Mutex<HashMap<(&'static str, String), pb::Any>>,
    previous: Mutex<HashMap<(&'static str, String), pb::Any>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // Everything behind these locks is replaced whole, so a poisoned one is still good.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EncodeCache {
    fn get(&self, t: &'static str, version: &str, encode: impl FnOnce() -> pb::Any) -> pb::Any {
        let key = (t, version.to_owned());
        if let Some(a) = lock(&self.current).get(&key) {
            return a.clone();
        }
        let old = lock(&self.previous).get(&key).cloned();
        let any = old.unwrap_or_else(encode);
        lock(&self.current).insert(key, any.clone());
        any
    }

    fn turn(&self) {
        let current = std::mem::take(&mut *lock(&self.current));
        *lock(&self.previous) = current;
    }

    fn snapshot<T: Serialize>(
        &self,
        t: &'static str,
        items: &BTreeMap<String, T>,
        encode: fn(&T) -> pb::Any,
    ) -> Arc<TypeSnapshot> {
        let resources = items.iter().map(|(name, value)| {
            let version = codec::version(value);
            let any = self.get(t, &version, || encode(value));
            pb::Resource { version, resource: Some(any), name: name.clone(), ..Default::default() }
        });
        Arc::new(TypeSnapshot::from_versions(resources))
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
            classes: Mutex::default(),
            encoded: EncodeCache::default(),
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
        self.encoded.turn();
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

    /// The configuration of a node as values, for operators.
    ///
    /// # Errors
    /// [`ProxyError`] if the node is not a proxy.
    pub fn configuration(&self, node: &NodeInfo) -> Result<Generated, ProxyError> {
        let proxy = ProxyNode::new(node)?;
        Ok(self.world().map(|w| generate::generate(&proxy, &w)).unwrap_or_default())
    }

    fn generate(&self, node: &NodeInfo, world: &World, generation: u64) -> Snapshots {
        let proxy = match ProxyNode::new(node) {
            Ok(p) => p,
            Err(e) => {
                tracing::warn!(node = %node.id, error = %e, "no configuration");
                return Snapshots::new();
            }
        };
        let started = std::time::Instant::now();
        let class = proxy.class(world.telling_labels());
        let slot = {
            let mut classes = lock(&self.classes);
            // An older world than the newest is still in somebody's hands: not kept.
            if generation > classes.generation {
                classes.generation = generation;
                classes.parts.clear();
            }
            if generation == classes.generation {
                classes.parts.entry(class.clone()).or_default().clone()
            } else {
                Arc::default()
            }
        };
        let shared = slot.get_or_init(|| {
            let mut part = self.encode(&generate::shared(&class, world));
            let names = generate::name_table(&class, world).to_any();
            let nds = TypeSnapshot::build([("name-table".to_owned(), names)]);
            part.insert(NDS, Arc::new(nds));
            let bundles = world.config.bundles.iter().map(|(n, b)| (n.clone(), bundles::encode(b)));
            part.insert(BUNDLES, Arc::new(TypeSnapshot::build(bundles)));
            part
        });
        let mut out = self.encode(&generate::own(&proxy, world));
        for (t, part) in shared {
            let merged = match out.get(t) {
                Some(own) if !own.resources.is_empty() => {
                    let all = part.resources.values().chain(own.resources.values());
                    Arc::new(TypeSnapshot::from_versions(all.cloned()))
                }
                _ => part.clone(),
            };
            out.insert(t, merged);
        }
        tracing::debug!(node = %node.id, elapsed = ?started.elapsed(), "generated");
        out
    }

    fn encode(&self, g: &Generated) -> Snapshots {
        let e = &self.encoded;
        Snapshots::from([
            (LDS, e.snapshot(LDS, &g.listeners, codec::encode_listener)),
            (RDS, e.snapshot(RDS, &g.routes, codec::encode_route)),
            (CDS, e.snapshot(CDS, &g.clusters, codec::encode_cluster)),
            (EDS, e.snapshot(EDS, &g.endpoints, codec::encode_endpoints)),
        ])
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
            slot.snapshots = self.generate(node, &world, generation);
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
