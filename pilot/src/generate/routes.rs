//! Route configurations of sidecars: one per HTTP port, and one for the HTTP proxy listener.

use std::{
    collections::{BTreeSet, HashSet},
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
    common::PASSTHROUGH,
    http::{self, Scope},
};
use crate::{
    config::Doc,
    index::{Entry, Origin},
};

/// RDS name of the HTTP proxy listener.
pub(super) const HTTP_PROXY: &str = "http_proxy";

/// Domains are unique in a route configuration; the first virtual host that claims one keeps it.
#[derive(Default)]
pub(super) struct Domains(HashSet<String>);

impl Domains {
    pub(super) fn claim(&mut self, wanted: Vec<String>) -> Vec<String> {
        wanted.into_iter().filter(|d| self.0.insert(d.clone())).collect()
    }
}

pub(super) fn virtual_host(name: String, domains: Vec<String>, routes: Vec<Route>) -> VirtualHost {
    VirtualHost {
        name,
        domains,
        require_tls: false,
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
        .world
        .virtual_service(ctx.proxy, &entry.service.host, |d| Scope::Mesh.bound(d))
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
        Host::Made(virtual_host(name, domains, service_routes(ctx, entry, port)))
    })
}

/// A virtual host, or the name of one that is what it was.
enum Host {
    Made(VirtualHost),
    Kept(String),
}

/// Where hosts of documents that no service has are reachable.
pub(super) const UNOWNED: u16 = 80;

/// Hosts of documents that no service has, each with its document.
pub(super) fn unowned<'a>(ctx: &Ctx<'a>) -> Vec<(&'a Doc<VirtualService>, &'a String)> {
    let documents = ctx.world.virtual_services().filter(|(doc, _)| {
        !doc.spec.http.is_empty()
            && Scope::Mesh.bound(doc)
            && ctx.proxy.sees(&doc.namespace, &doc.spec.export_to)
    });
    let hosts = documents.flat_map(|(doc, hosts)| hosts.iter().map(move |h| (doc, h)));
    // `*` for the whole mesh is refused by validation.
    hosts.filter(|(_, h)| *h != "*" && h.parse::<IpAddr>().is_err() && ctx.service(h).is_none()).collect()
}

fn other_hosts(ctx: &Ctx<'_>, taken: &mut Domains, out: &mut Vec<Host>) {
    for (doc, host) in unowned(ctx) {
        let routes = http::routes(ctx, doc, UNOWNED, Scope::Mesh);
        let domains = taken.claim(domains(std::slice::from_ref(host), UNOWNED, true));
        if !routes.is_empty() && !domains.is_empty() {
            out.push(Host::Made(virtual_host(format!("{host}:{UNOWNED}"), domains, routes)));
        }
    }
}

/// Where requests go whose host nobody declared.
fn catch_all(ctx: &Ctx<'_>, passthrough: bool) -> VirtualHost {
    if passthrough && ctx.world.allow_any(ctx.proxy) {
        let forward = Forward { clusters: vec![WeightedCluster::only(PASSTHROUGH)], ..Forward::default() };
        let mut r = http::route(RouteMatch::any(), RouteAction::Forward(Box::new(forward)));
        r.name = "allow_any".to_owned();
        return virtual_host("allow_any".to_owned(), vec!["*".to_owned()], vec![r]);
    }
    let direct = DirectResponse { status: 502, body: vec![] };
    let mut r = http::route(RouteMatch::any(), RouteAction::Direct(direct));
    r.name = "block_all".to_owned();
    virtual_host("block_all".to_owned(), vec!["*".to_owned()], vec![r])
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

/// Routes of the listener of one port.
pub(super) fn port(ctx: &Ctx<'_>, number: u16, out: &mut Generated) {
    let mut taken = Domains::default();
    let mut hosts = Vec::new();
    for e in ctx.visible() {
        let http = e.port(number).is_some_and(|p| p.protocol.is_http() || p.protocol == Protocol::Auto);
        if http {
            hosts.extend(service_host(ctx, e, number, true, &mut taken));
        }
    }
    if number == UNOWNED {
        other_hosts(ctx, &mut taken, &mut hosts);
    }
    whole(ctx, out, number.to_string(), hosts, catch_all(ctx, true));
}

/// Routes of one service's own listener: whatever the host header says, it is this service.
pub(super) fn single(ctx: &Ctx<'_>, entry: &Entry, port: u16) -> RouteConfiguration {
    let name = single_name(entry, port);
    let host = virtual_host(name.clone(), vec!["*".to_owned()], service_routes(ctx, entry, port));
    RouteConfiguration { name, virtual_hosts: vec![host], on_demand: None }
}

/// RDS name of [`single`].
pub(super) fn single_name(entry: &Entry, port: u16) -> String {
    format!("{}:{port}", entry.service.host)
}

/// Routes of the HTTP proxy listener: every HTTP port of every service. A host without a port means
/// port 80.
pub(super) fn http_proxy(ctx: &Ctx<'_>, out: &mut Generated) {
    let mut taken = Domains::default();
    let mut hosts = Vec::new();
    for e in ctx.visible() {
        let mut seen = BTreeSet::new();
        for p in &e.service.ports {
            let http = p.protocol.is_http() || p.protocol == Protocol::Auto;
            if http && seen.insert(p.port) {
                hosts.extend(service_host(ctx, e, p.port, p.port == 80, &mut taken));
            }
        }
    }
    other_hosts(ctx, &mut taken, &mut hosts);
    // A proxied request has no original destination to pass through to.
    whole(ctx, out, HTTP_PROXY.to_owned(), hosts, catch_all(ctx, false));
}
