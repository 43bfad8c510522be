//! Outbound listeners of a sidecar.
//!
//! With interception: one listener takes every redirected connection and hands it to the unbound
//! listener of its original destination: `<vip>_<port>` for a service with an address, else
//! `0.0.0.0_<port>`. A `Sidecar` may declare listeners of its own, for captured connections or for the workload to
//! connect to. Without interception only these and the HTTP proxy listener are bound.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_model::{
    proxy::{
        Direction, FilterChain, FilterChainMatch, Listener, NetworkFilter, RouteConfiguration, RouteSource,
        TransportProtocol,
    },
    registry::{Protocol, Resolution},
};

use super::{
    Ctx, Generated,
    common::{BLACK_HOLE, PASSTHROUGH, Side, chain, cluster_name, http_protocols, listener},
    routes, tcp,
};
use crate::{
    index::{Entry, Origin},
    proxy::Interception,
    world::{Carries, Declared, Egress},
};

const VIRTUAL_OUTBOUND: &str = "virtualOutbound";

/// What shares the wildcard address of one port.
#[derive(Default)]
struct Plan {
    http: bool,
    sni: Vec<FilterChain>,
    tcp: Option<Vec<FilterChain>>,
    /// Of services that have ranges of addresses.
    ranged: Vec<FilterChain>,
}

/// The HTTP proxy listener, on the workload's own address.
pub(super) fn own(ctx: &Ctx<'_>, out: &mut Generated) {
    if let Some(port) = ctx.proxy.http_proxy_port {
        let address = SocketAddr::new(ctx.proxy.addresses.first().copied().unwrap_or(ctx.proxy.bind()), port);
        let mut l = listener(format!("{}_{port}", address.ip()), address, Direction::Outbound);
        let routes = RouteSource::Rds(routes::HTTP_PROXY.to_owned());
        l.filter_chains = vec![chain(
            routes::HTTP_PROXY,
            FilterChainMatch::default(),
            vec![ctx.http_filter("outbound_http_proxy", routes, Side::Outbound)],
        )];
        out.listener(l);
    }
}

/// Listeners of what the workload calls, and all outbound routes.
pub(super) fn shared(ctx: &Ctx<'_>, out: &mut Generated) {
    let egress = ctx.egress();
    // The one that has all ports of its services comes last.
    let rest = egress.last().filter(|w| w.declared().is_none());
    if ctx.proxy.http_proxy_port.is_some()
        && let Some(way) = rest.or(egress.last())
    {
        routes::http_proxy(ctx, way, routes::HTTP_PROXY.to_owned(), out);
    }
    let captures = ctx.proxy.interception != Interception::None;
    // Ports whose wildcard listener, and whose routes, a document has declared.
    let mut taken = BTreeSet::new();
    for way in egress {
        if let Some(d) = way.declared().filter(|d| d.port != 0)
            && (captures || d.connected || d.bind.is_some())
            && taken.insert(d.port)
        {
            declared(ctx, out, way, d);
        }
    }
    if !captures {
        return;
    }
    if let Some(way) = rest {
        let mut plans: BTreeMap<u16, Plan> = BTreeMap::new();
        for e in &way.services {
            let mut seen = BTreeSet::new();
            for p in &e.service.ports {
                if seen.insert(p.port) {
                    service_port(ctx, out, &mut plans, e, p.port, p.protocol);
                }
            }
        }
        plans.retain(|port, _| !taken.contains(port));
        wildcards(ctx, out, way, plans);
    }
    out.listener(catch_all(ctx));
}

fn wildcards(ctx: &Ctx<'_>, out: &mut Generated, way: &Egress<'_>, plans: BTreeMap<u16, Plan>) {
    for (port, plan) in plans {
        if plan.http {
            routes::port(ctx, way, port, out);
        }
        out.listener(wildcard(ctx, ctx.proxy.any(), port, plan));
    }
}

/// A listener that a `Sidecar` declares. Without an address, captured connections come to the addresses of the services,
/// and the workload connects to the loopback interface.
fn declared(ctx: &Ctx<'_>, out: &mut Generated, way: &Egress<'_>, d: Declared) {
    let connected = d.connected || ctx.proxy.interception == Interception::None;
    let at = d.bind.or(connected.then_some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    let mut plans = BTreeMap::from([(d.port, Plan::default())]);
    let Carries::Protocol(protocol) = d.carries else {
        let ip = at.unwrap_or(ctx.proxy.any());
        routes::http_proxy(ctx, way, d.port.to_string(), out);
        out.listener(at_own(wildcard(ctx, ip, d.port, Plan { http: true, ..Plan::default() }), connected));
        return;
    };
    for e in &way.services {
        // Of an undeclared protocol the service knows more.
        let of_service = e.port(d.port).map_or(Protocol::Auto, |p| p.protocol);
        let protocol = if protocol == Protocol::Auto { of_service } else { protocol };
        if at.is_none() {
            service_port(ctx, out, &mut plans, e, d.port, protocol);
        } else if let Some(plan) = plans.get_mut(&d.port) {
            at_address(ctx, plan, e, d.port, protocol);
        }
    }
    // Documents alone may have routes of requests.
    if let Some(plan) = plans.get_mut(&d.port) {
        plan.http |= protocol.is_http();
    }
    plans.retain(|_, p| p.http || p.tcp.is_some() || !p.sni.is_empty() || !p.ranged.is_empty());
    match at {
        None => wildcards(ctx, out, way, plans),
        Some(ip) => {
            for (port, plan) in plans {
                if plan.http {
                    routes::port(ctx, way, port, out);
                }
                out.listener(at_own(wildcard(ctx, ip, port, plan), connected));
            }
        }
    }
}

/// A listener that the workload connects to itself. What comes to it was meant for no other address, so nothing can be
/// passed through to one: it would come back.
fn at_own(mut l: Listener, connected: bool) -> Listener {
    l.bind_to_port = connected;
    if connected {
        let passes = |f: &NetworkFilter| match f {
            NetworkFilter::Tcp(t) => t.clusters.iter().any(|c| c.cluster == PASSTHROUGH),
            _ => false,
        };
        l.default_filter_chain = l.default_filter_chain.filter(|c| !c.filters.iter().any(passes));
    }
    l
}

/// Adds what an address that is no service's has of a service.
fn at_address(ctx: &Ctx<'_>, plan: &mut Plan, e: &Entry, port: u16, protocol: Protocol) {
    match protocol {
        Protocol::Udp => {}
        p if p.is_http() => plan.http = true,
        p if p.is_tls() => {
            for c in tcp::tls_chains(ctx, e, port) {
                tcp::push(&mut plan.sni, c);
            }
        }
        // Nothing tells bytes of one service from those of another: the first has them.
        p => {
            plan.http |= p == Protocol::Auto;
            plan.tcp.get_or_insert_with(|| tcp::tcp_chains(ctx, e, port));
        }
    }
}

fn unbound(ip: IpAddr, port: u16) -> Listener {
    let mut l = listener(format!("{ip}_{port}"), SocketAddr::new(ip, port), Direction::Outbound);
    l.bind_to_port = false;
    l
}

/// Adds a listener for an address unless another service has it: services of one address must differ
/// in ports.
fn add(out: &mut Generated, l: Listener) {
    out.listeners.entry(l.name.clone()).or_insert(l);
}

fn service_port(
    ctx: &Ctx<'_>,
    out: &mut Generated,
    plans: &mut BTreeMap<u16, Plan>,
    e: &Entry,
    port: u16,
    protocol: Protocol,
) {
    let s = &e.service;
    // Addresses that callers connect to: the service's, or for headless ones their endpoints'.
    let addresses: Vec<IpAddr> = if s.headless {
        let mut own: Vec<IpAddr> = e.endpoints.iter().filter_map(|e| e.address.parse().ok()).collect();
        own.sort_unstable();
        own.dedup();
        own
    } else {
        s.addresses.clone()
    };
    // Callers that do not use the mesh's DNS connect to an address that we do not know.
    let unknown_address = (matches!(e.origin, Origin::Entry | Origin::Consul) && e.assigned_vip)
        || (addresses.is_empty() && e.ranges.is_empty());
    match protocol {
        p if p.is_http() => plans.entry(port).or_default().http = true,
        Protocol::Udp => {}
        Protocol::Auto => {
            if unknown_address {
                plans.entry(port).or_default().http = true;
            }
            if addresses.is_empty() && e.ranges.is_empty() {
                return;
            }
            let name = routes::single_name(e, port);
            out.route(routes::single(ctx, e, port));
            let http =
                FilterChainMatch { application_protocols: http_protocols(), ..FilterChainMatch::default() };
            let requests = || {
                let routes = RouteSource::Rds(name.clone());
                let filter = ctx.http_filter(&format!("outbound_{name}"), routes, Side::Outbound);
                chain(name.clone(), http.clone(), vec![filter])
            };
            let bytes = tcp::tcp_chains(ctx, e, port).pop();
            within(plans, e, port, || [requests()].into_iter().chain(bytes.clone()).collect());
            for ip in addresses {
                let mut l = unbound(ip, port);
                l.inspect_http = true;
                l.inspect_timeout = ctx.inspect_timeout();
                l.filter_chains = vec![requests()];
                l.default_filter_chain.clone_from(&bytes);
                add(out, l);
            }
        }
        p if p.is_tls() => {
            let chains = tcp::tls_chains(ctx, e, port);
            if unknown_address {
                let plan = plans.entry(port).or_default();
                for c in chains.clone() {
                    tcp::push(&mut plan.sni, c);
                }
            }
            // By server name only if a document asks for it; else everything at this address is this service.
            let own = cluster_name(port, "", &s.host);
            let elsewhere = |f: &NetworkFilter| match f {
                NetworkFilter::Tcp(t) => t.clusters.iter().any(|c| c.cluster != own),
                _ => false,
            };
            let named = chains.iter().any(|c| c.filters.iter().any(elsewhere));
            let chains = if named { chains } else { vec![] };
            let bytes = tcp::tcp_chains(ctx, e, port).pop();
            within(plans, e, port, || chains.iter().cloned().chain(bytes.clone()).collect());
            for ip in addresses {
                let mut l = unbound(ip, port);
                l.inspect_tls = named;
                l.filter_chains.clone_from(&chains);
                l.default_filter_chain.clone_from(&bytes);
                add(out, l);
            }
        }
        _ => {
            let chains = tcp::tcp_chains(ctx, e, port);
            if unknown_address && s.resolution != Resolution::Static {
                // Without an address a TCP port is told apart by its number alone: the first has it.
                plans.entry(port).or_default().tcp.get_or_insert_with(|| chains.clone());
            }
            within(plans, e, port, || chains.clone());
            for ip in addresses {
                let mut l = unbound(ip, port);
                l.filter_chains.clone_from(&chains);
                add(out, l);
            }
        }
    }
}

/// Adds what a service has for the ranges of its addresses. A proxy looks for the narrowest range that has the destination
/// and then at nothing else, so that all of the service's chains are in each of them.
fn within(plans: &mut BTreeMap<u16, Plan>, e: &Entry, port: u16, chains: impl FnOnce() -> Vec<FilterChain>) {
    if e.ranges.is_empty() {
        return;
    }
    let ranged = &mut plans.entry(port).or_default().ranged;
    let chains = chains();
    for range in &e.ranges {
        for c in &chains {
            // A document may ask for a part of them.
            let of = &c.matches.destination_prefixes;
            let parts: Vec<IpNet> = match of.as_slice() {
                [] => vec![*range],
                of => of.iter().filter_map(|n| common_part(range, n)).collect(),
            };
            for part in parts {
                let mut c = c.clone();
                c.matches.destination_prefixes = vec![part];
                tcp::push(ranged, c);
            }
        }
    }
}

fn common_part(a: &IpNet, b: &IpNet) -> Option<IpNet> {
    if a.contains(b) { Some(*b) } else { b.contains(a).then_some(*a) }
}

/// The listener of everything on one port that has no address of its own.
fn wildcard(ctx: &Ctx<'_>, ip: IpAddr, port: u16, plan: Plan) -> Listener {
    let mut l = unbound(ip, port);
    let name = port.to_string();
    let http = |matches| {
        chain(
            name.clone(),
            matches,
            vec![ctx.http_filter(
                &format!("outbound_{ip}_{name}"),
                RouteSource::Rds(name.clone()),
                Side::Outbound,
            )],
        )
    };
    let Plan { http: has_http, sni, tcp, ranged } = plan;
    let mut fallback = undeclared(ctx);
    if let Some(chains) = &tcp
        && let Some(last) = chains.last()
    {
        fallback = last.clone();
    }
    if !sni.is_empty() {
        l.inspect_tls = true;
        l.filter_chains = sni;
        if has_http {
            l.filter_chains.push(http(FilterChainMatch {
                transport_protocol: Some(TransportProtocol::RawBuffer),
                ..FilterChainMatch::default()
            }));
        }
        l.default_filter_chain = Some(fallback);
    } else if has_http && tcp.is_some() {
        l.inspect_http = true;
        l.filter_chains = vec![http(FilterChainMatch {
            application_protocols: http_protocols(),
            ..FilterChainMatch::default()
        })];
        l.default_filter_chain = Some(fallback);
    } else if has_http {
        l.filter_chains = vec![http(FilterChainMatch::default())];
    } else {
        l.filter_chains = tcp.unwrap_or_default();
        if l.filter_chains.is_empty() {
            l.default_filter_chain = Some(fallback);
        }
    }
    l.inspect_timeout = ctx.inspect_timeout();
    for c in ranged {
        l.inspect_http |= !c.matches.application_protocols.is_empty();
        l.inspect_tls |= !c.matches.server_names.is_empty();
        tcp::push(&mut l.filter_chains, c);
    }
    l
}

/// Connections to destinations that nobody declared.
fn undeclared(ctx: &Ctx<'_>) -> FilterChain {
    let to = ctx.undeclared().unwrap_or_else(|| BLACK_HOLE.to_owned());
    chain(format!("{VIRTUAL_OUTBOUND}-{to}"), FilterChainMatch::default(), vec![ctx.tcp_to(&to)])
}

fn catch_all(ctx: &Ctx<'_>) -> Listener {
    let any = ctx.proxy.any();
    let mut l =
        listener(VIRTUAL_OUTBOUND.to_owned(), SocketAddr::new(any, ctx.outbound_port()), Direction::Outbound);
    l.use_original_dst = true;
    l.transparent = ctx.proxy.interception == Interception::Tproxy;
    let rest = undeclared(ctx);
    if ctx.names_undeclared() {
        // On a port that no service has, requests have to be told from bytes.
        l.inspect_http = true;
        l.inspect_timeout = ctx.inspect_timeout();
        let name = format!("{VIRTUAL_OUTBOUND}-{}", routes::ANY_BY_NAME);
        let config = RouteConfiguration {
            name: routes::ANY_BY_NAME.to_owned(),
            virtual_hosts: vec![routes::catch_all(ctx, true)],
            on_demand: None,
        };
        let filter = ctx.http_filter(
            &format!("outbound_{VIRTUAL_OUTBOUND}_{}", routes::ANY_BY_NAME),
            RouteSource::Inline(Arc::new(config)),
            Side::Outbound,
        );
        let requests =
            FilterChainMatch { application_protocols: http_protocols(), ..FilterChainMatch::default() };
        l.filter_chains = vec![chain(name, requests, vec![filter])];
        l.default_filter_chain = Some(rest);
    } else {
        l.filter_chains = vec![rest];
    }
    l
}
