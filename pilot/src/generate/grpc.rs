//! Proxyless gRPC: what a gRPC library gets that executes xDS itself (`GENERATOR: grpc` in its node metadata).
//!
//! - A client asks for the listener `host:port` of its target `xds:///host:port`, where `host` is any name that a caller
//!   in its namespace may use, and by it for the routes of that port, their clusters and endpoints.
//! - A server asks for the listener of the address that it listens on.
//!
//! Routes and clusters are those of a sidecar of the same workload, so a `VirtualService` or `DestinationRule`
//! means the same. A library refuses a resource with a part that it does not know, and ignores others silently. So
//! what it cannot do is left out here, in a way that no call goes where it should not, and [`problems`] says it.

mod clusters;
mod routes;
mod server;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use mesh_model::{
    authored::DestinationRule,
    proxy::{Direction, FilterChainMatch, HttpFilter, Listener, RouteConfiguration, RouteSource},
    registry::{Protocol, ServicePort},
};

use super::{
    Ctx, Generated,
    common::{Side, chain, listener},
    http::{self, Scope},
    routes as outbound,
};
use crate::{
    config::Problem,
    index::Entry,
    proxy::ProxyNode,
    world::{World, effective_policy},
};

/// What of a document or a service was left out.
type Left = BTreeSet<&'static str>;

fn is_called(p: &ServicePort) -> bool {
    p.protocol.is_http() || p.protocol == Protocol::Auto
}

/// Ports that a client may call, each number once.
fn ports(e: &Entry) -> impl Iterator<Item = &ServicePort> {
    let mut seen = BTreeSet::new();
    e.service.ports.iter().filter(move |p| is_called(p) && seen.insert(p.port))
}

/// Listeners and routes of what a client may call.
pub(super) fn routing(ctx: &Ctx<'_>, out: &mut Generated) {
    for e in ctx.visible() {
        for p in ports(e) {
            let mut config = outbound::single(ctx, e, p.port);
            let mut left = Left::new();
            for host in &mut config.virtual_hosts {
                host.routes = routes::adapted(std::mem::take(&mut host.routes), &mut left);
            }
            for name in outbound::names(ctx, e) {
                let l = api(ctx, outbound::with_port(&name, p.port), p.port, &config.name);
                // A short name may be that of another service as well: the first has it, as in a sidecar.
                out.listeners.entry(l.name.clone()).or_insert(l);
            }
            out.route(config);
        }
    }
    // A library asks for names, so there is none for a pattern.
    for (doc, host) in outbound::unowned(ctx, ctx.egress()).into_iter().filter(|(_, h)| !h.contains('*')) {
        let name = outbound::with_port(host, outbound::UNOWNED);
        let routes = http::routes(ctx, doc, outbound::UNOWNED, Scope::Mesh);
        let routes = routes::adapted(routes, &mut Left::new());
        // The oldest document with a host has it, and a service's name is the service's.
        if routes.is_empty() || out.listeners.contains_key(&name) {
            continue;
        }
        out.listener(api(ctx, name.clone(), outbound::UNOWNED, &name));
        let host = outbound::virtual_host(ctx, name.clone(), vec!["*".to_owned()], routes);
        out.route(RouteConfiguration { name, virtual_hosts: vec![host], on_demand: None });
    }
}

/// A listener that is bound nowhere: the target of a client.
fn api(ctx: &Ctx<'_>, name: String, port: u16, routes: &str) -> Listener {
    let mut l = listener(name, SocketAddr::new(ctx.proxy.any(), port), Direction::Outbound);
    l.bind_to_port = false;
    let mut manager = ctx.hcm(routes, RouteSource::Rds(routes.to_owned()), Side::Outbound);
    // Of those of a sidecar it knows this one.
    manager.filters = vec![HttpFilter::Fault];
    manager.access_log = vec![];
    let filter = mesh_model::proxy::NetworkFilter::Http(Box::new(manager));
    l.filter_chains = vec![chain(routes, FilterChainMatch::default(), vec![filter])];
    l
}

/// Clusters and endpoints of a service.
pub(super) fn reach(ctx: &Ctx<'_>, out: &mut Generated, entry: &Entry, rule: Option<&DestinationRule>) {
    clusters::outbound(ctx, out, entry, rule, &mut Left::new());
}

/// What a server serves.
pub(super) fn own(ctx: &Ctx<'_>, out: &mut Generated) {
    server::listeners(ctx, out);
}

/// What of the configuration a gRPC library at this node cannot do.
#[must_use]
pub fn problems(proxy: &ProxyNode, world: &World) -> Vec<Problem> {
    let ctx = Ctx::new(proxy, world);
    let mut found: BTreeMap<String, Left> = BTreeMap::new();
    for e in ctx.visible() {
        let host = &e.service.host;
        let document = ctx.routes_of(e);
        if let Some(d) = document {
            let left = found.entry(format!("VirtualService {}/{}", d.namespace, d.name)).or_default();
            for p in ports(e) {
                let config = outbound::single(&ctx, e, p.port);
                routes::adapted(config.virtual_hosts.into_iter().flat_map(|h| h.routes).collect(), left);
            }
        }
        let rule = world.destination_rule(proxy, e);
        let left = found.entry(format!("service {host}")).or_default();
        clusters::outbound(&ctx, &mut Generated::default(), e, rule.as_deref(), left);
    }
    for (d, host) in outbound::unowned(&ctx, ctx.egress()) {
        let left = found.entry(format!("VirtualService {}/{}", d.namespace, d.name)).or_default();
        if host.contains('*') {
            left.insert("hosts with a wildcard that no service has");
        } else {
            routes::adapted(http::routes(&ctx, d, outbound::UNOWNED, Scope::Mesh), left);
        }
    }
    let of_server =
        format!("workload {}/{}", proxy.namespace, proxy.id.split('~').nth(2).unwrap_or_default());
    server::left(&ctx, found.entry(of_server).or_default());
    let said = found.into_iter().filter(|(_, left)| !left.is_empty()).map(|(object, left)| {
        let all: Vec<&str> = left.into_iter().collect();
        Problem { object, message: format!("not for gRPC without a proxy: {}", all.join("; ")) }
    });
    said.collect()
}
