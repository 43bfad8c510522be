//! Route configurations of sidecars: one per HTTP port, and one for the HTTP proxy listener.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
};

use mesh_model::{
    Rare,
    authored::VirtualService,
    proxy::{
        DirectResponse, Forward, OnDemandHosts, Route, RouteAction, RouteConfiguration, RouteMatch,
        VirtualHost, WeightedCluster,
    },
    registry::Protocol,
};

use super::{
    Ctx, Generated,
    common::{BY_NAME, PASSTHROUGH},
    find,
    http::{self, Scope},
};
use crate::{
    config::Doc,
    index::{Entry, Origin},
    proxy::Interception,
    world::{Egress, Rerouted},
};

/// RDS name of the HTTP proxy listener.
pub(super) const HTTP_PROXY: &str = "http_proxy";

/// The virtual host of requests to hosts that nobody declared and that are found by name, and its route (Istio's name).
pub(super) const ANY_BY_NAME: &str = "allow_any_dynamic_dns";

/// Domains are unique in a route configuration; the first virtual host that claims one keeps it.
#[derive(Default)]
pub(super) struct Domains(HashSet<String>);

impl Domains {
    pub(super) fn claim(&mut self, wanted: Vec<String>) -> Vec<String> {
        wanted.into_iter().filter(|d| self.0.insert(d.clone())).collect()
    }
}

/// A virtual host of requests that leave a workload or a gateway.
pub(super) fn virtual_host(
    ctx: &Ctx<'_>,
    name: String,
    domains: Vec<String>,
    routes: Vec<Route>,
) -> VirtualHost {
    VirtualHost { attempt_count: ctx.headers().attempt_count, ..own_host(name, domains, routes) }
}

/// A virtual host of requests that have come to where they go.
pub(super) fn own_host(name: String, domains: Vec<String>, routes: Vec<Route>) -> VirtualHost {
    VirtualHost {
        name,
        domains,
        require_tls: false,
        attempt_count: false,
        routes,
        request_headers: Rare::default(),
        response_headers: Rare::default(),
        filters: Rare::default(),
    }
}

/// `host:port`, with brackets around IPv6 addresses.
pub(super) fn with_port(name: &str, port: u16) -> String {
    if name.contains(':') { format!("[{name}]:{port}") } else { format!("{name}:{port}") }
}

/// Names that a caller in this proxy's namespace may use for a service.
pub(super) fn names(ctx: &Ctx<'_>, entry: &Entry) -> Vec<String> {
    let s = &entry.service;
    let mut out = vec![s.host.clone()];
    if matches!(entry.origin, Origin::Platform | Origin::Imported) {
        if s.namespace == ctx.proxy.namespace {
            out.push(s.name.clone());
        }
        out.push(format!("{}.{}", s.name, s.namespace));
        out.push(format!("{}.{}.svc", s.name, s.namespace));
    }
    out.extend(entry.aliases.iter().cloned());
    out.extend(s.addresses.iter().map(ToString::to_string));
    out
}

fn domains(names: &[String], port: u16, bare: bool) -> Vec<String> {
    let mut out = Vec::new();
    for n in names {
        if bare {
            out.push(if n.contains(':') { format!("[{n}]") } else { n.clone() });
        }
        out.push(with_port(n, port));
    }
    out
}

/// Routes of a service: its document's, or the default.
fn service_routes(ctx: &Ctx<'_>, entry: &Entry, port: u16) -> Vec<Route> {
    let routes = ctx
        .routes_of(entry)
        .filter(|d| !d.spec.http.is_empty())
        .map(|d| http::routes(ctx, d, port, Scope::Mesh))
        .unwrap_or_default();
    // A document whose rules are all for other ports or callers leaves the service as it is.
    if routes.is_empty() { vec![http::default_route(ctx, entry, port)] } else { routes }
}

fn service_host(ctx: &Ctx<'_>, entry: &Entry, port: u16, bare: bool, taken: &mut Domains) -> Option<Host> {
    let domains = taken.claim(domains(&names(ctx, entry), port, bare));
    if domains.is_empty() {
        return None;
    }
    let name = format!("{}:{port}", entry.service.host);
    let kept = ctx.proxy.hosts_apart() && ctx.rerouted.is_some_and(|r| !r.concerns(&entry.service.host));
    Some(if kept {
        Host::Kept(name)
    } else {
        Host::Made(virtual_host(ctx, name, domains, service_routes(ctx, entry, port)))
    })
}

/// A virtual host, or the name of one that is what it was.
enum Host {
    Made(VirtualHost),
    Kept(String),
}

/// Where hosts of documents that no service has are reachable, unless a `Sidecar` gives their listener another port.
pub(super) const UNOWNED: u16 = 80;

/// Hosts of documents that count on one of these listeners and that no service there has, each with its document.
pub(super) fn unowned<'a>(ctx: &Ctx<'a>, ways: &[Egress<'_>]) -> Vec<(&'a Doc<VirtualService>, &'a String)> {
    let documents = ctx.world.virtual_services().filter(|(doc, hosts)| {
        !doc.spec.http.is_empty()
            && !hosts.is_empty()
            && Scope::Mesh.bound(doc)
            && ctx.world.shows(ctx.proxy, doc)
            && ways.iter().any(|w| w.imports_routes(ctx.proxy, &doc.namespace, hosts))
    });
    let hosts = documents.flat_map(|(doc, hosts)| hosts.iter().map(move |h| (doc, h)));
    let owned = |h: &str| ways.iter().any(|w| find(&w.services, h).is_some());
    // `*` for the whole mesh is refused by validation.
    hosts.filter(|(_, h)| *h != "*" && h.parse::<IpAddr>().is_err() && !owned(h)).collect()
}

fn other_hosts(ctx: &Ctx<'_>, way: &Egress<'_>, port: u16, taken: &mut Domains, out: &mut Vec<Host>) {
    for (doc, host) in unowned(ctx, std::slice::from_ref(way)) {
        let routes = http::routes(ctx, doc, port, Scope::Mesh);
        let domains = taken.claim(domains(std::slice::from_ref(host), port, true));
        if !routes.is_empty() && !domains.is_empty() {
            out.push(Host::Made(virtual_host(ctx, format!("{host}:{port}"), domains, routes)));
        }
    }
}

/// Where requests go whose host nobody declared.
pub(super) fn catch_all(ctx: &Ctx<'_>, passthrough: bool) -> VirtualHost {
    let rest = |name: &str, to: String| {
        let forward = Forward { clusters: vec![WeightedCluster::only(to)], ..Forward::default() };
        let mut r = http::route(RouteMatch::any(), RouteAction::Forward(Box::new(forward)));
        r.name = name.to_owned();
        virtual_host(ctx, name.to_owned(), vec!["*".to_owned()], vec![r])
    };
    if ctx.names_undeclared() {
        return rest(ANY_BY_NAME, BY_NAME.to_owned());
    }
    // A proxied request has no original destination to pass through to, but another proxy may take it.
    if let Some(to) = ctx.undeclared().filter(|to| passthrough || to != PASSTHROUGH) {
        return rest("allow_any", to);
    }
    let direct = DirectResponse { status: 502, body: vec![] };
    let mut r = http::route(RouteMatch::any(), RouteAction::Direct(direct));
    r.name = "block_all".to_owned();
    virtual_host(ctx, "block_all".to_owned(), vec!["*".to_owned()], vec![r])
}

/// Adds a route configuration. A proxy that takes virtual hosts apart gets them so: of a port that thousands of services
/// have, what changes is sent and no more. What a request falls through to stays, unless hosts are asked for.
fn whole(ctx: &Ctx<'_>, out: &mut Generated, name: String, hosts: Vec<Host>, rest: VirtualHost) {
    let mut config = RouteConfiguration { name, virtual_hosts: vec![], on_demand: None };
    if ctx.proxy.hosts_apart() {
        for h in hosts {
            match h {
                Host::Made(h) => out.host(format!("{}/{}", config.name, h.name), h),
                Host::Kept(name) => out.kept.push(format!("{}/{name}", config.name)),
            }
        }
        if ctx.proxy.on_demand {
            // It would take requests for hosts that have not been asked for.
            out.host(format!("{}/{}", config.name, rest.name), rest);
        } else {
            config.virtual_hosts.push(rest);
        }
        config.on_demand = Some(OnDemandHosts::default());
    } else {
        let made = hosts.into_iter().filter_map(|h| match h {
            Host::Made(h) => Some(h),
            Host::Kept(_) => None,
        });
        config.virtual_hosts = made.chain([rest]).collect();
    }
    out.route(config);
}

/// Routes of the listener of one port. A `Sidecar` may give the port a listener of its own, with hosts of documents.
pub(super) fn port(ctx: &Ctx<'_>, way: &Egress<'_>, number: u16, out: &mut Generated) {
    let mut taken = Domains::default();
    let mut hosts = Vec::new();
    for e in &way.services {
        let http = e.port(number).is_some_and(|p| p.protocol.is_http() || p.protocol == Protocol::Auto);
        if http {
            hosts.extend(service_host(ctx, e, number, true, &mut taken));
        }
    }
    if number == UNOWNED || way.declared().is_some() {
        other_hosts(ctx, way, number, &mut taken, &mut hosts);
    }
    // What the workload connects to itself was meant for no other address.
    let captured =
        ctx.proxy.interception != Interception::None && way.declared().is_none_or(|d| !d.connected);
    whole(ctx, out, number.to_string(), hosts, catch_all(ctx, captured));
}

/// The virtual hosts of services whose documents changed, of a proxy that everything is said of by the port of its service.
pub(super) fn again(
    ctx: &Ctx<'_>,
    rerouted: &Rerouted,
    domains: impl Fn(&str) -> Option<Vec<String>>,
) -> Option<BTreeMap<String, VirtualHost>> {
    let (proxy, world) = (ctx.proxy, ctx.world);
    let others = proxy.http_proxy_port.is_some() || proxy.interception == Interception::None;
    if others || !proxy.hosts_apart() || world.sidecar(proxy).is_some() {
        return None;
    }
    let mut out = BTreeMap::new();
    for host in rerouted.hosts()? {
        // A host that no service has, or none that this proxy sees, has a virtual host of its own.
        let e = world.index.services.get(host)?;
        if !world.offers(proxy, e) {
            return None;
        }
        let mut seen = BTreeSet::new();
        for p in &e.service.ports {
            if !p.protocol.is_http() {
                return None;
            }
            let name = format!("{host}:{}", p.port);
            let resource = format!("{}/{name}", p.port);
            if seen.insert(p.port)
                && let Some(domains) = domains(&resource)
            {
                out.insert(resource, virtual_host(ctx, name, domains, service_routes(ctx, e, p.port)));
            }
        }
    }
    Some(out)
}

/// Routes of one service's own listener: whatever the host header says, it is this service.
pub(super) fn single(ctx: &Ctx<'_>, entry: &Entry, port: u16) -> RouteConfiguration {
    let name = single_name(entry, port);
    let host = virtual_host(ctx, name.clone(), vec!["*".to_owned()], service_routes(ctx, entry, port));
    RouteConfiguration { name, virtual_hosts: vec![host], on_demand: None }
}

/// RDS name of [`single`].
pub(super) fn single_name(entry: &Entry, port: u16) -> String {
    format!("{}:{port}", entry.service.host)
}

/// Routes of a listener that is an HTTP proxy: every HTTP port of every service. A host without a port means port 80.
pub(super) fn http_proxy(ctx: &Ctx<'_>, way: &Egress<'_>, name: String, out: &mut Generated) {
    let mut taken = Domains::default();
    let mut hosts = Vec::new();
    for e in &way.services {
        let mut seen = BTreeSet::new();
        for p in &e.service.ports {
            let http = p.protocol.is_http() || p.protocol == Protocol::Auto;
            if http && seen.insert(p.port) {
                hosts.extend(service_host(ctx, e, p.port, p.port == 80, &mut taken));
            }
        }
    }
    other_hosts(ctx, way, 80, &mut taken, &mut hosts);
    whole(ctx, out, name, hosts, catch_all(ctx, false));
}
