//! Configuration of one proxy: pure functions of the proxy's node and the world.
//!
//! Sidecars get outbound listeners for what they may call and inbound listeners for what they serve;
//! gateways get listeners from `Gateway` documents; east-west gateways forward by SNI without
//! terminating anything; gRPC libraries without a proxy get the narrower form that they know.

mod authorizers;
mod clusters;
mod common;
mod endpoints;
pub mod explain;
mod gateway;
mod gateway_routes;
mod grpc;
mod hbone;
mod http;
mod inbound;
mod jwt;
mod names;
mod outbound;
mod patches;
mod rbac;
mod routes;
mod session;
mod sni;
mod tcp;
pub(crate) mod telemetry;
mod udp;

pub(crate) use self::{
    clusters::SYSTEM_ROOTS,
    rbac::{by_role, is_dry_run},
};
pub use self::{grpc::problems as grpc_problems, rbac::AuthzRule};

use std::{cell::OnceCell, collections::BTreeMap, sync::Arc};

use mesh_model::{
    authored::{DestinationRule, OutboundTrafficMode, VirtualService},
    proxy::{Cluster, HttpFilter, Listener, LoadAssignment, RouteAction, RouteConfiguration, VirtualHost},
};
use mesh_xds::{codec, nds::NameTable, pb, type_url};

use crate::{
    config::Doc,
    envoy_filter::Refused,
    index::Entry,
    proxy::{ConnectionLimits, HeaderSettings, ProxyNode},
    world::{Egress, Rerouted, Undeclared, World},
};

/// Everything a proxy is served, by name.
#[derive(Debug, Clone, Default)]
pub struct Generated {
    /// LDS.
    pub listeners: BTreeMap<String, Listener>,
    /// RDS.
    pub routes: BTreeMap<String, RouteConfiguration>,
    /// VHDS, of proxies that take virtual hosts apart from their route configurations.
    pub hosts: BTreeMap<String, VirtualHost>,
    /// Names of such hosts that are what they were, where only what differs was asked for.
    pub(crate) kept: Vec<String>,
    /// CDS.
    pub clusters: BTreeMap<String, Cluster>,
    /// EDS.
    pub endpoints: BTreeMap<String, LoadAssignment>,
    /// What patches made for Envoy, by type and name, with versions: instead of what is above, or besides.
    pub(crate) wire: BTreeMap<(&'static str, String), (pb::Any, String)>,
    /// Patches that were left out.
    pub(crate) refused: Refused,
}

impl Generated {
    fn append(&mut self, other: Self) {
        // `append` of a map would build it anew each time.
        self.listeners.extend(other.listeners);
        self.routes.extend(other.routes);
        self.hosts.extend(other.hosts);
        self.clusters.extend(other.clusters);
        self.endpoints.extend(other.endpoints);
        self.wire.extend(other.wire);
        for (k, v) in other.refused {
            self.refused.entry(k).or_insert(v);
        }
    }

    /// What patches made for Envoy as values, as far as they can be shown so. Returns short names of all.
    pub(crate) fn show_patched(&mut self) -> Vec<String> {
        for ((t, name), (any, _)) in &self.wire {
            match *t {
                type_url::CDS => self.clusters.extend(codec::decode_cluster(any).map(|c| (name.clone(), c))),
                type_url::LDS => {
                    self.listeners.extend(codec::decode_listener(any).map(|l| (name.clone(), l)))
                }
                type_url::RDS => self.routes.extend(codec::decode_route(any).map(|r| (name.clone(), r))),
                _ => {}
            }
        }
        self.wire.keys().map(|(t, name)| format!("{} {name}", type_url::short(t))).collect()
    }

    /// Puts virtual hosts that are resources of their own into their route configurations.
    pub(crate) fn join_hosts(&mut self) {
        for (name, host) in std::mem::take(&mut self.hosts) {
            let config = name.rsplit_once('/').and_then(|(config, _)| self.routes.get_mut(config));
            if let Some(config) = config {
                config.virtual_hosts.push(host);
            }
        }
    }

    /// Clusters that nothing asks for: those of copies of requests.
    pub(crate) fn mirrors(&self) -> BTreeMap<&str, Vec<&str>> {
        fn of(h: &VirtualHost) -> Vec<&str> {
            let forwards = h.routes.iter().filter_map(|r| match &r.action {
                RouteAction::Forward(f) => Some(f),
                _ => None,
            });
            forwards.flat_map(|f| &f.mirrors).map(|m| m.cluster.as_str()).collect()
        }
        let inline = self.routes.iter().flat_map(|(n, r)| r.virtual_hosts.iter().map(move |h| (n, h)));
        let all = self.hosts.iter().chain(inline).map(|(n, h)| (n.as_str(), of(h)));
        all.filter(|(_, m)| !m.is_empty()).collect()
    }

    fn listener(&mut self, l: Listener) {
        self.listeners.insert(l.name.clone(), l);
    }

    fn route(&mut self, r: RouteConfiguration) {
        self.routes.insert(r.name.clone(), r);
    }

    fn host(&mut self, name: String, h: VirtualHost) {
        self.hosts.insert(name, h);
    }

    fn cluster(&mut self, c: Cluster) {
        self.clusters.insert(c.name.clone(), c);
    }

    fn assignment(&mut self, a: LoadAssignment) {
        self.endpoints.insert(a.name.clone(), a);
    }
}

/// What the generators of one proxy share.
struct Ctx<'a> {
    proxy: &'a ProxyNode,
    world: &'a World,
    egress: OnceCell<Vec<Egress<'a>>>,
    visible: OnceCell<Vec<&'a Arc<Entry>>>,
    reached: OnceCell<Vec<&'a Arc<Entry>>>,
    /// Whether sessions of what it calls may stay on a host.
    sessions: OnceCell<bool>,
    /// Headers that it adds, and limits that it keeps.
    headers: OnceCell<Arc<HeaderSettings>>,
    connections: OnceCell<Arc<ConnectionLimits>>,
    /// Filters of authorisers that single routes ask.
    authorizers: OnceCell<BTreeMap<String, HttpFilter>>,
    /// Only the routes of these are asked for.
    rerouted: Option<&'a Rerouted>,
}

impl<'a> Ctx<'a> {
    fn new(proxy: &'a ProxyNode, world: &'a World) -> Self {
        Self {
            proxy,
            world,
            egress: OnceCell::new(),
            visible: OnceCell::new(),
            reached: OnceCell::new(),
            sessions: OnceCell::new(),
            headers: OnceCell::new(),
            connections: OnceCell::new(),
            authorizers: OnceCell::new(),
            rerouted: None,
        }
    }

    /// The ways out of the workload.
    fn egress(&self) -> &[Egress<'a>] {
        self.egress.get_or_init(|| self.world.egress(self.proxy))
    }

    /// Services it may call on any of them, by host.
    fn visible(&self) -> &[&'a Arc<Entry>] {
        self.visible.get_or_init(|| {
            let egress = self.egress();
            if let [only] = egress {
                return only.services.clone();
            }
            let all = egress.iter().flat_map(|l| &l.services);
            all.map(|e| (e.service.host.as_str(), *e)).collect::<BTreeMap<_, _>>().into_values().collect()
        })
    }

    /// Services that it has clusters of, by host: those, and what only routes lead to.
    fn reached(&self) -> &[&'a Arc<Entry>] {
        self.reached.get_or_init(|| self.world.reached(self.proxy, self.egress()))
    }

    /// The service behind a host or alias, if this proxy has clusters of it.
    fn service(&self, host: &str) -> Option<&'a Arc<Entry>> {
        find(self.reached(), self.world.index.canonical(host))
    }

    fn authorizers(&self) -> &BTreeMap<String, HttpFilter> {
        self.authorizers.get_or_init(|| authorizers::all(self))
    }

    /// The document with routes of a service.
    fn routes_of(&self, e: &Entry) -> Option<&'a Doc<VirtualService>> {
        self.world.routes_of(self.proxy, self.egress(), e)
    }

    /// Whether requests to hosts that nobody declared go where their name leads.
    fn names_undeclared(&self) -> bool {
        let mesh = self.world.config.mesh.outbound_traffic_policy.as_ref();
        // Only the mesh has this mode, and looking for a `Sidecar` costs more.
        mesh.is_some_and(|p| p.mode == OutboundTrafficMode::AllowAnyDynamicDns)
            && self.world.undeclared(self.proxy) == Undeclared::Named
    }

    /// The cluster of destinations that nobody declared; `None` if they are refused. Requests may have one of their own
    /// ([`Ctx::names_undeclared`]).
    fn undeclared(&self) -> Option<String> {
        match self.world.undeclared(self.proxy) {
            Undeclared::Refused => None,
            Undeclared::Passed | Undeclared::Named => Some(common::PASSTHROUGH.to_owned()),
            Undeclared::Proxied(d, namespace) => Some(http::destination(self, namespace, d, 0).0),
        }
    }
}

/// The service of a host in a list that is sorted by host.
fn find<'a>(sorted: &[&'a Arc<Entry>], host: &str) -> Option<&'a Arc<Entry>> {
    let at = sorted.binary_search_by(|e| e.service.host.as_str().cmp(host)).ok()?;
    sorted.get(at).copied()
}

/// Generates the configuration of a proxy.
#[must_use]
pub fn generate(proxy: &ProxyNode, world: &World) -> Generated {
    let proxy = world.patched(proxy);
    let mut out = shared(&proxy.class(world.telling_labels()), world);
    out.append(own(&proxy, world));
    out
}

/// The part that all proxies of a [`ProxyNode::class`] have in common: what they may call.
#[must_use]
pub fn shared(class: &ProxyNode, world: &World) -> Generated {
    let mut out = base(class, world);
    out.append(routing(class, world, None));
    for r in reached(class, world) {
        out.append(reach(class, world, &r));
    }
    out
}

// The shared part is made in three parts that change at different times. None has a name of another.

/// What concerns all of a part: limits of its listeners, and patches.
fn finish(ctx: &Ctx<'_>, out: &mut Generated) {
    if let Some(limit) = ctx.connections().listener_buffer {
        for l in out.listeners.values_mut().filter(|l| !l.is_udp()) {
            l.buffer_limit = Some(limit);
        }
    }
    if let Some(n) = ctx.connections().listener_connections {
        for l in out.listeners.values_mut().filter(|l| !l.is_udp()) {
            l.max_connections = Some(n);
        }
    }
    patches::apply(ctx, out);
}

/// The part of a class that is no service of its own: where undeclared destinations go, datagrams, own gateways.
#[must_use]
pub(crate) fn base(class: &ProxyNode, world: &World) -> Generated {
    let mut out = Generated::default();
    // A gRPC library asks for what it calls, and calls nothing that nobody declared.
    if class.east_west || class.grpc {
        return out;
    }
    let ctx = Ctx::new(class, world);
    clusters::base(&ctx, &mut out);
    if !class.router {
        udp::shared(&ctx, &mut out);
        endpoints::own_gateways(&ctx, &mut out);
    }
    finish(&ctx, &mut out);
    out
}

/// The listeners and routes of a class. They do not depend on endpoints, but for those of headless services and of
/// services that are names to be resolved. With `rerouted`, virtual hosts that differ in nothing from those of the world
/// before are only named.
#[must_use]
pub(crate) fn routing(class: &ProxyNode, world: &World, rerouted: Option<&Rerouted>) -> Generated {
    let mut out = Generated::default();
    if class.grpc {
        grpc::routing(&Ctx::new(class, world), &mut out);
    } else if !class.east_west && !class.router {
        let ctx = Ctx { rerouted, ..Ctx::new(class, world) };
        outbound::shared(&ctx, &mut out);
        finish(&ctx, &mut out);
    }
    out
}

/// The virtual hosts that may differ from those of the world before, by the name of their resource. `domains` tells those
/// of such a host before, which routes do not change. `None` if that is not all that may differ, or is not known.
#[must_use]
pub(crate) fn rehosted(
    class: &ProxyNode,
    world: &World,
    rerouted: &Rerouted,
    domains: impl Fn(&str) -> Option<Vec<String>>,
) -> Option<BTreeMap<String, VirtualHost>> {
    if class.grpc || class.east_west || class.router || class.on_demand || !class.filters.is_empty() {
        return None;
    }
    routes::again(&Ctx::new(class, world), rerouted, domains)
}

/// A service that proxies of a class reach, and the rule by which they do.
pub(crate) struct Reached {
    pub(crate) entry: Arc<Entry>,
    pub(crate) rule: Option<Arc<DestinationRule>>,
}

/// What proxies of a class have clusters of.
#[must_use]
pub(crate) fn reached(class: &ProxyNode, world: &World) -> Vec<Reached> {
    if class.east_west {
        return vec![];
    }
    let all = world.reached(class, &world.egress(class)).into_iter();
    all.map(|e| Reached { entry: Arc::clone(e), rule: world.destination_rule(class, e) }).collect()
}

/// The clusters and endpoints of one service. They depend on the service and its rule, on the world's
/// [`World::environment`] and on the class without its namespace ([`ProxyNode::reach`]), and on nothing else.
#[must_use]
pub(crate) fn reach(class: &ProxyNode, world: &World, reached: &Reached) -> Generated {
    let mut out = Generated::default();
    let ctx = Ctx::new(class, world);
    if class.grpc {
        grpc::reach(&ctx, &mut out, &reached.entry, reached.rule.as_deref());
        return out;
    }
    clusters::outbound(&ctx, &mut out, &reached.entry, reached.rule.as_deref());
    finish(&ctx, &mut out);
    out
}

/// The part that depends on the proxy's own addresses: what it serves. Its names are not those of
/// the [`shared`] part.
#[must_use]
pub fn own(proxy: &ProxyNode, world: &World) -> Generated {
    let ctx = Ctx::new(proxy, world);
    let mut out = Generated::default();
    if proxy.grpc {
        grpc::own(&ctx, &mut out);
        return out;
    }
    if proxy.east_west {
        sni::generate(&ctx, &mut out);
    } else if proxy.router {
        gateway::generate(&ctx, &mut out);
        jwt::clusters(&ctx, &mut out);
    } else {
        outbound::own(&ctx, &mut out);
        inbound::generate(&ctx, &mut out);
        udp::inbound(&ctx, &mut out);
        jwt::clusters(&ctx, &mut out);
    }
    // Connections that are refused before a chain could log them.
    if !world.config.mesh.disable_envoy_listener_log {
        for l in out.listeners.values_mut() {
            l.access_log = ctx.access_log(telemetry::Logged::Connections);
        }
    }
    finish(&ctx, &mut out);
    patches::add(&ctx, &mut out);
    out
}

/// Clusters of services that filters use, so that no request would ask for them: who is asked about requests
/// (`MeshConfig.extensionProviders`), and who has the keys of tokens.
#[must_use]
pub(crate) fn unasked(class: &ProxyNode, world: &World) -> Vec<String> {
    let ctx = Ctx::new(class, world);
    let mut out = rbac::authorizers(&ctx);
    out.extend(authorizers::clusters(&ctx));
    out.extend(telemetry::clusters(&ctx));
    out.extend(jwt::services(&ctx));
    out
}

/// The authorization rules that a workload's proxy asks about a request (`http`) or a connection.
#[must_use]
pub fn authorization(proxy: &ProxyNode, world: &World, http: bool) -> Vec<AuthzRule> {
    rbac::each(&Ctx::new(proxy, world), http)
}

/// Whether a virtual service is for sidecars.
pub(crate) fn bound_to_mesh(d: &Doc<VirtualService>) -> bool {
    http::Scope::Mesh.bound(d)
}

/// Generates the name table of a proxy.
#[must_use]
pub fn name_table(proxy: &ProxyNode, world: &World) -> NameTable {
    names::generate(&Ctx::new(proxy, world))
}

#[cfg(test)]
pub(crate) mod tests;
