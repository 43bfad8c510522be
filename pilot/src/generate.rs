//! Configuration of one proxy: pure functions of the proxy's node and the world.
//!
//! Sidecars get outbound listeners for what they may call and inbound listeners for what they serve;
//! gateways get listeners from `Gateway` documents; east-west gateways forward by SNI without
//! terminating anything.

mod clusters;
mod common;
mod endpoints;
pub mod explain;
mod gateway;
mod gateway_routes;
mod hbone;
mod http;
mod inbound;
mod jwt;
mod names;
mod outbound;
mod rbac;
mod routes;
mod sni;
mod tcp;
mod udp;

pub use self::rbac::AuthzRule;

use std::{collections::BTreeMap, sync::Arc};

use mesh_model::{
    authored::VirtualService,
    proxy::{Cluster, Listener, LoadAssignment, RouteConfiguration},
};
use mesh_xds::nds::NameTable;

use crate::{config::Doc, index::Entry, proxy::ProxyNode, world::World};

/// Everything a proxy is served, by name.
#[derive(Debug, Clone, Default)]
pub struct Generated {
    /// LDS.
    pub listeners: BTreeMap<String, Listener>,
    /// RDS.
    pub routes: BTreeMap<String, RouteConfiguration>,
    /// CDS.
    pub clusters: BTreeMap<String, Cluster>,
    /// EDS.
    pub endpoints: BTreeMap<String, LoadAssignment>,
}

impl Generated {
    fn listener(&mut self, l: Listener) {
        self.listeners.insert(l.name.clone(), l);
    }

    fn route(&mut self, r: RouteConfiguration) {
        self.routes.insert(r.name.clone(), r);
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
    /// Services it may call, by host.
    visible: Vec<&'a Arc<Entry>>,
}

impl<'a> Ctx<'a> {
    fn new(proxy: &'a ProxyNode, world: &'a World) -> Self {
        Self { proxy, world, visible: world.visible(proxy) }
    }

    /// The service behind a host or alias, if this proxy may call it.
    fn service(&self, host: &str) -> Option<&'a Arc<Entry>> {
        let host = self.world.index.canonical(host);
        // Sorted by host, since the index is.
        self.visible
            .binary_search_by(|e| e.service.host.as_str().cmp(host))
            .ok()
            .and_then(|i| self.visible.get(i))
            .copied()
    }
}

/// Generates the configuration of a proxy.
#[must_use]
pub fn generate(proxy: &ProxyNode, world: &World) -> Generated {
    let mut out = shared(&proxy.class(world.telling_labels()), world);
    let mut own = own(proxy, world);
    out.listeners.append(&mut own.listeners);
    out.routes.append(&mut own.routes);
    out.clusters.append(&mut own.clusters);
    out.endpoints.append(&mut own.endpoints);
    out
}

/// The part that all proxies of a [`ProxyNode::class`] have in common: what they may call.
#[must_use]
pub fn shared(class: &ProxyNode, world: &World) -> Generated {
    let mut out = Generated::default();
    if class.east_west {
        return out;
    }
    let ctx = Ctx::new(class, world);
    clusters::outbound(&ctx, &mut out);
    if !class.router {
        outbound::shared(&ctx, &mut out);
        udp::shared(&ctx, &mut out);
        endpoints::own_gateways(&ctx, &mut out);
    }
    out
}

/// The part that depends on the proxy's own addresses: what it serves. Its names are not those of
/// the [`shared`] part.
#[must_use]
pub fn own(proxy: &ProxyNode, world: &World) -> Generated {
    let ctx = Ctx::new(proxy, world);
    let mut out = Generated::default();
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
    for l in out.listeners.values_mut() {
        l.access_log = ctx.access_log();
    }
    out
}

/// The authorization rules that a workload's proxy asks about a request (`http`) or a connection.
#[must_use]
pub fn authorization(proxy: &ProxyNode, world: &World, http: bool) -> Vec<AuthzRule> {
    rbac::each(&Ctx { proxy, world, visible: vec![] }, http)
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
