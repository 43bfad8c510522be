//! What proxies have in common, kept from one change to the next.
//!
//! A mesh has thousands of proxies, tens of classes of them ([`ProxyNode::class`]), and most of its changes are about
//! one service. So
//!
//! - a class's listeners, routes, virtual hosts and names are made again only if something changed that they depend on
//!   ([`crate::world::Lineage`]), which the coming and going of endpoints is not;
//! - a service's clusters and endpoints are made once for all classes that reach it in the same way
//!   ([`ProxyNode::reach`]), and again only if the service, its rule or the environment changed;
//! - what is made again and has not changed is the same resource, so that nobody need look at it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, Weak},
};

use mesh_model::{
    authored::DestinationRule,
    proxy::{Cluster, Listener},
};
use mesh_xds::{
    bundles, codec,
    patch::Scope,
    pb,
    server::{Layer, OnDemand, content_version},
    type_url::{BUNDLES, CDS, ECDS, EDS, LDS, NDS, RDS, VHDS},
};
use serde::Serialize;

use super::{asked::Hosts as HostIndex, lock};
use crate::{
    envoy_filter::Refused,
    generate::{self, Generated, Reached},
    index::Entry,
    proxy::ProxyNode,
    world::{Lineage, Rerouted, World},
};

/// Layers by type.
pub(super) type Layers = BTreeMap<&'static str, Arc<Layer>>;

type Resources = Vec<Arc<pb::Resource>>;

/// What proxies of a class have in common.
pub(super) struct Common {
    pub(super) layers: Layers,
    /// What they get besides, if they ask.
    pub(super) on_demand: BTreeMap<&'static str, Arc<dyn OnDemand>>,
    /// Patches that were left out.
    pub(super) refused: Arc<Refused>,
}

/// Changes of the world after which what nobody used is dropped. Proxies ask after each, but not before they have
/// acknowledged what they were sent last.
const KEPT: u64 = 4;

#[derive(Default)]
pub(super) struct Classes {
    all: Mutex<HashMap<ProxyNode, Arc<Mutex<Class>>>>,
    reaches: Mutex<HashMap<ProxyNode, Weak<ProxyNode>>>,
    parts: Mutex<HashMap<Key, Part>>,
    hosts: Hosts,
}

/// Virtual hosts by version: nearly all are the same for every class, as only those of a namespace have short names in it.
type Hosts = Mutex<HashMap<String, Weak<pb::Resource>>>;

/// A class of connected proxies.
pub(super) struct Class {
    node: ProxyNode,
    reach: Arc<ProxyNode>,
    generation: u64,
    lineage: Option<Lineage>,
    /// What its routing part added to each type.
    routing: BTreeMap<&'static str, Resources>,
    layers: Layers,
    /// Of a class that asks: virtual hosts and services' clusters, which are not among the others.
    hidden: Layers,
    hosts: Option<Arc<HostIndex>>,
    /// Clusters that such a class has unasked, by what refers to them.
    mirrors: BTreeMap<String, Vec<String>>,
    /// Patches that were left out, of the routing part and of all.
    refused_routing: Refused,
    refused: Arc<Refused>,
}

/// Addresses of what a service's part was made of; the part keeps them alive, so that they stay its own.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    environment: u64,
    reach: usize,
    entry: usize,
    rule: Option<usize>,
}

struct Part {
    used: u64,
    clusters: Resources,
    endpoints: Resources,
    refused: Refused,
    _of: (Arc<ProxyNode>, Arc<Entry>, Option<Arc<DestinationRule>>),
}

impl Classes {
    /// The class that is described so.
    pub(super) fn get(&self, node: ProxyNode) -> Arc<Mutex<Class>> {
        let mut all = lock(&self.all);
        if let Some(class) = all.get(&node) {
            return Arc::clone(class);
        }
        let reach = {
            let mut reaches = lock(&self.reaches);
            let of = node.reach();
            reaches.get(&of).and_then(Weak::upgrade).unwrap_or_else(|| {
                let reach = Arc::new(of.clone());
                reaches.insert(of, Arc::downgrade(&reach));
                reach
            })
        };
        let class = Arc::new(Mutex::new(Class {
            node: node.clone(),
            reach,
            generation: 0,
            lineage: None,
            routing: BTreeMap::new(),
            layers: Layers::new(),
            hidden: Layers::new(),
            hosts: None,
            mirrors: BTreeMap::new(),
            refused_routing: Refused::new(),
            refused: Arc::default(),
        }));
        all.insert(node, Arc::clone(&class));
        class
    }

    /// The world changed.
    pub(super) fn turn(&self, generation: u64) {
        lock(&self.parts).retain(|_, p| p.used + KEPT >= generation);
        // A second client of a proxy's ID has no place of its own, and should not make all anew each time it asks.
        lock(&self.all).retain(|_, c| Arc::strong_count(c) > 1 || lock(c).generation + KEPT >= generation);
        lock(&self.reaches).retain(|_, r| r.strong_count() > 0);
        lock(&self.hosts).retain(|_, h| h.strong_count() > 0);
    }

    /// What a class has in this generation of the world, or in a later one.
    pub(super) fn layers(&self, class: &Mutex<Class>, world: &World, generation: u64) -> Common {
        let mut class = lock(class);
        if class.generation < generation {
            self.refresh(&mut class, world, generation);
            class.generation = generation;
        }
        let clusters = class.hidden.get(CDS).map(|l| (CDS, Arc::clone(l) as Arc<dyn OnDemand>));
        let hosts = class.hosts.as_ref().map(|h| (VHDS, Arc::clone(h) as Arc<dyn OnDemand>));
        Common {
            layers: class.layers.clone(),
            on_demand: clusters.into_iter().chain(hosts).collect(),
            refused: Arc::clone(&class.refused),
        }
    }

    fn refresh(&self, class: &mut Class, world: &World, generation: u64) {
        let started = std::time::Instant::now();
        let (now, before) = (world.lineage(), class.lineage);
        let changed = |of: fn(&Lineage) -> u64| before.is_none_or(|b| of(&b) != of(&now));
        if changed(|l| l.routing) {
            let rerouted = world.rerouted().filter(|r| before.is_some_and(|b| b.routing == r.since));
            if !rerouted.is_some_and(|r| self.reroute_some(class, world, r)) {
                self.reroute(class, world, rerouted);
            }
        }
        if changed(|l| l.shape) {
            let names = generate::name_table(&class.node, world).to_any();
            class.routing.insert(NDS, vec![message("name-table", names)]);
        }
        if changed(|l| l.environment) {
            let all = world.config.bundles.values().chain(&world.config.roots);
            let bundles = all.map(|b| message(b.trust_domain.as_str(), bundles::encode(b))).collect();
            class.routing.insert(BUNDLES, bundles);
        }
        let mut all = class.routing.clone();
        let base = generate::base(&class.node, world);
        for (t, resources) in encode(&base, &class.layers, class.node.grpc) {
            all.entry(t).or_default().extend(resources);
        }
        let mut refused = class.refused_routing.clone();
        refused.extend(base.refused);
        if class.node.on_demand {
            let mut services = BTreeMap::new();
            for reached in generate::reached(&class.node, world) {
                self.part(class, world, &reached, generation, &mut services, &mut refused);
            }
            let clusters = services.remove(CDS).unwrap_or_default();
            let mirrors = class.mirrors.values().flatten().cloned();
            let unasked: BTreeSet<String> =
                generate::unasked(&class.node, world).into_iter().chain(mirrors).collect();
            let (listed, hidden): (Resources, _) =
                clusters.into_iter().partition(|c| unasked.contains(&c.name));
            all.entry(CDS).or_default().extend(listed);
            class.hidden.insert(CDS, follow(&class.hidden, CDS, hidden));
            for (t, resources) in services {
                all.entry(t).or_default().extend(resources);
            }
        } else {
            for reached in generate::reached(&class.node, world) {
                self.part(class, world, &reached, generation, &mut all, &mut refused);
            }
        }
        class.refused = Arc::new(refused);
        class.layers =
            all.into_iter().map(|(t, resources)| (t, follow(&class.layers, t, resources))).collect();
        class.lineage = Some(now);
        tracing::debug!(
            namespace = %class.node.namespace, generation, elapsed = ?started.elapsed(), "generated a class"
        );
    }

    /// Makes listeners, routes and virtual hosts.
    fn reroute(&self, class: &mut Class, world: &World, rerouted: Option<&Rerouted>) {
        // Patches of routes must know whose the domains are.
        let whole = class.node.filters.concerns(Scope::Routes);
        let mut routing = generate::routing(&class.node, world, rerouted.filter(|_| !whole));
        let asks = class.node.on_demand;
        let was = if asks { class.hidden.get(VHDS) } else { class.layers.get(VHDS) };
        let find = |n: &String| was.and_then(|l| l.get(n)).cloned();
        let kept = routing.kept.iter().map(find).collect::<Option<Resources>>().unwrap_or_else(|| {
            // One that was not there before: a defect, but no reason to serve a part.
            routing = generate::routing(&class.node, world, None);
            vec![]
        });
        let before = if asks { with(&class.layers, &class.hidden) } else { class.layers.clone() };
        for (t, mut resources) in encode(&routing, &before, class.node.grpc) {
            if t == VHDS {
                self.share(&mut resources);
            }
            class.routing.insert(t, resources);
        }
        class.routing.entry(VHDS).or_default().extend(kept);
        if asks {
            class.hide_hosts(&routing);
        }
        class.refused_routing = routing.refused;
    }

    /// Makes the virtual hosts of some services, if nothing else may differ.
    fn reroute_some(&self, class: &mut Class, world: &World, rerouted: &Rerouted) -> bool {
        let before = class.layers.get(VHDS);
        let domains = |name: &str| {
            let any = before?.get(name)?.resource.as_ref()?;
            Some(codec::decode_virtual_host(any).ok()?.domains)
        };
        let Some(hosts) = generate::rehosted(&class.node, world, rerouted, domains) else { return false };
        let mut made = encode_each(&hosts, codec::encode_virtual_host, before);
        self.share(&mut made);
        // Few of many; those that are there are in no order.
        for r in class.routing.entry(VHDS).or_default() {
            if let Some(at) = made.iter().position(|m| m.name == r.name) {
                *r = made.swap_remove(at);
            }
        }
        debug_assert!(made.is_empty(), "virtual hosts that were not there before");
        true
    }

    /// Replaces virtual hosts by those of other classes that are the same.
    fn share(&self, all: &mut Resources) {
        let mut known = lock(&self.hosts);
        for r in all {
            match known.get(&r.version).and_then(Weak::upgrade).filter(|k| k.name == r.name) {
                Some(k) => *r = k,
                None => drop(known.insert(r.version.clone(), Arc::downgrade(r))),
            }
        }
    }

    /// Adds a service's clusters and endpoints.
    fn part(
        &self,
        class: &Class,
        world: &World,
        reached: &Reached,
        generation: u64,
        out: &mut BTreeMap<&'static str, Resources>,
        refused: &mut Refused,
    ) {
        let mut add = |p: &Part| {
            for (k, v) in &p.refused {
                refused.entry(k.clone()).or_insert_with(|| v.clone());
            }
            out.entry(CDS).or_default().extend(p.clusters.iter().cloned());
            out.entry(EDS).or_default().extend(p.endpoints.iter().cloned());
        };
        let key = Key {
            environment: world.lineage().environment,
            reach: Arc::as_ptr(&class.reach).addr(),
            entry: Arc::as_ptr(&reached.entry).addr(),
            rule: reached.rule.as_ref().map(|r| Arc::as_ptr(r).addr()),
        };
        if let Some(p) = lock(&self.parts).get_mut(&key) {
            p.used = generation;
            add(p);
            return;
        }
        let made = generate::reach(&class.reach, world, reached);
        let mut encoded = encode(&made, &class.layers, class.node.grpc);
        let part = Part {
            used: generation,
            clusters: encoded.remove(CDS).unwrap_or_default(),
            endpoints: encoded.remove(EDS).unwrap_or_default(),
            refused: made.refused,
            _of: (Arc::clone(&class.reach), Arc::clone(&reached.entry), reached.rule.clone()),
        };
        add(&part);
        lock(&self.parts).insert(key, part);
    }
}

impl Class {
    /// Takes the virtual hosts of the routing part to those that are asked for.
    fn hide_hosts(&mut self, routing: &Generated) {
        let hosts = self.routing.insert(VHDS, vec![]).unwrap_or_default();
        let layer = follow(&self.hidden, VHDS, hosts);
        self.hidden.insert(VHDS, Arc::clone(&layer));
        let (kept, before) = (&routing.kept, self.hosts.as_deref());
        self.hosts = Some(Arc::new(HostIndex::new(routing.hosts.iter(), kept, before, layer)));
        let still: BTreeSet<&String> = kept.iter().collect();
        self.mirrors.retain(|n, _| still.contains(n));
        let owned = |of: Vec<&str>| of.into_iter().map(str::to_owned).collect();
        self.mirrors.extend(routing.mirrors().into_iter().map(|(n, m)| (n.to_owned(), owned(m))));
    }
}

/// Layers, some of them instead of others.
fn with(layers: &Layers, instead: &Layers) -> Layers {
    let mut out = layers.clone();
    out.extend(instead.iter().map(|(t, l)| (*t, Arc::clone(l))));
    out
}

/// A proxy's own part, after another state of it.
pub(super) fn own(made: &Generated, before: &Layers, grpc: bool) -> Layers {
    encode(made, before, grpc).into_iter().map(|(t, resources)| (t, follow(before, t, resources))).collect()
}

fn follow(before: &Layers, t: &str, resources: Resources) -> Arc<Layer> {
    match before.get(t) {
        Some(layer) => layer.next(resources),
        None => Layer::new(resources),
    }
}

/// How a cluster is written, for a proxy or for a gRPC library.
fn cluster(grpc: bool) -> fn(&Cluster) -> pb::Any {
    if grpc { codec::grpc::encode_cluster } else { codec::encode_cluster }
}

/// Every type has an entry, be it empty.
fn encode(g: &Generated, before: &Layers, grpc: bool) -> BTreeMap<&'static str, Resources> {
    let listener: fn(&Listener) -> pb::Any =
        if grpc { codec::grpc::encode_listener } else { codec::encode_listener };
    let mut all = BTreeMap::from([
        (CDS, encode_each(&g.clusters, cluster(grpc), before.get(CDS))),
        (EDS, encode_each(&g.endpoints, codec::encode_endpoints, before.get(EDS))),
        (LDS, encode_each(&g.listeners, listener, before.get(LDS))),
        (RDS, encode_each(&g.routes, codec::encode_route, before.get(RDS))),
        (VHDS, encode_each(&g.hosts, codec::encode_virtual_host, before.get(VHDS))),
        (ECDS, vec![]),
    ]);
    for ((t, name), (any, version)) in &g.wire {
        let list = all.entry(*t).or_default();
        list.retain(|r| r.name != *name);
        let known = before.get(t).and_then(|l| l.get(name)).filter(|r| r.version == *version);
        list.push(known.cloned().unwrap_or_else(|| {
            let (resource, version) = (Some(any.clone()), version.clone());
            Arc::new(pb::Resource { version, resource, name: name.clone(), ..Default::default() })
        }));
    }
    all
}

fn encode_each<T: Serialize>(
    items: &BTreeMap<String, T>,
    encode: fn(&T) -> pb::Any,
    before: Option<&Arc<Layer>>,
) -> Resources {
    items
        .iter()
        .map(|(name, value)| {
            let version = codec::version(value);
            if let Some(r) = before.and_then(|l| l.get(name)).filter(|r| r.version == version) {
                return Arc::clone(r);
            }
            let resource = Some(encode(value));
            Arc::new(pb::Resource { version, resource, name: name.clone(), ..Default::default() })
        })
        .collect()
}

pub(super) fn message(name: &str, any: pb::Any) -> Arc<pb::Resource> {
    let version = content_version(&any.value);
    Arc::new(pb::Resource { version, resource: Some(any), name: name.to_owned(), ..Default::default() })
}
