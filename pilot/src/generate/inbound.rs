//! Inbound listeners of a sidecar: what the workload serves, behind mTLS and authorisation.
//!
//! - `STRICT`: mesh mTLS only; anything else finds no chain and is closed.
//! - `PERMISSIVE`: mesh mTLS (recognised by the ALPN `istio`), the application's own TLS untouched,
//!   and plaintext. A plaintext client of a server-first protocol waits for the inspection timeout.
//! - `DISABLE`: bytes as they come.
//!
//! Ports without a declared protocol are HTTP or bytes by inspection in plaintext, bytes inside mTLS
//! (nothing outside the session tells what is in it); declare the protocol to get HTTP policies.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_model::{
    authored::{
        CaptureMode, ConnectionPoolSettings, InboundTrafficMode, IstioIngressListener, MutualTlsMode,
        ServerTlsSettings,
    },
    proxy::{
        ClientCertificate, Cluster, Direction, Discovery, DownstreamTls, EndpointHealth, FilterChain,
        FilterChainMatch, Forward, LbEndpoint, LbPolicy, LoadAssignment, LocalityEndpoints, NetworkFilter,
        RouteAction, RouteConfiguration, RouteMatch, RouteSource, TLS_CURVES, TUNNEL_ALPN, TlsServerOptions,
        TlsVersion, TransportProtocol, UNIX, UpstreamHttp, Validation, WeightedCluster,
    },
    registry::Protocol,
};

use super::{
    Ctx, Generated, clusters,
    common::{INBOUND_PASSTHROUGH, Side, chain, http_protocols, listener},
    gateway,
    hbone::{self, Target},
    http, rbac, routes,
};
use crate::{index::Entry, proxy::Interception, world::effective_policy};

/// Source of connections to undeclared ports of the workload (Istio's).
const PASSED_V4: [u8; 4] = [127, 0, 0, 6];
/// The same, IPv6.
const PASSED_V6: [u16; 8] = [0, 0, 0, 0, 0, 0, 0, 6];
const VIRTUAL_INBOUND: &str = "virtualInbound";
/// ALPN by which a mesh client makes itself known.
const MESH_ALPN: [&str; 5] = ["istio-peer-exchange", "istio", "istio-http/1.0", "istio-http/1.1", "istio-h2"];

/// A port of the workload.
struct Port<'a> {
    number: u16,
    protocol: Protocol,
    /// The service that the port is of; a `Sidecar` may declare others.
    entry: Option<&'a Entry>,
    service_port: u16,
    /// Address and port of the application.
    to: (String, u16),
    /// Nobody said that address.
    own: bool,
    /// Limits that a `Sidecar` sets, instead of those of the service's rule.
    pool: Option<&'a ConnectionPoolSettings>,
    /// As a `Sidecar` declares it.
    listener: Option<&'a IstioIngressListener>,
}

impl Port<'_> {
    /// The address of a listener of its own, where connections are not captured or a `Sidecar` says that those of this
    /// port are not.
    fn own_address(&self, ctx: &Ctx<'_>) -> Option<SocketAddr> {
        let apart = self.listener.is_some_and(|l| l.capture_mode == CaptureMode::None);
        if ctx.proxy.interception != Interception::None && !apart {
            return None;
        }
        let bind = self.listener.and_then(|l| l.bind.parse().ok());
        let ip = bind.or(ctx.proxy.addresses.first().copied()).unwrap_or(ctx.proxy.bind());
        Some(SocketAddr::new(ip, self.number))
    }
}

pub(super) fn generate(ctx: &Ctx<'_>, out: &mut Generated) {
    let ports = ports(ctx);
    for p in ports.values() {
        out.cluster(cluster(ctx, p));
    }
    let mut targets = Vec::new();
    for p in ports.values() {
        let Some(at) = p.own_address(ctx) else { continue };
        let mut l = listener(format!("{}_{}", at.ip(), at.port()), at, Direction::Inbound);
        l.filter_chains = port_chains(ctx, p, FilterChainMatch::default());
        l.inspect_timeout = ctx.inspect_timeout();
        l.mixer = ctx.mixer();
        inspect(&mut l);
        // In clear there is no other way in, so nothing may share the HTTP proxy's address.
        if !out.listeners.contains_key(&l.name) {
            targets.push(Target::one(l.address, &l.name));
            out.listener(l);
        }
    }
    if ctx.proxy.interception == Interception::None {
        hbone::inbound(ctx, &targets, out);
        return;
    }
    out.cluster(Cluster { source: passed(ctx), ..ctx.passthrough(INBOUND_PASSTHROUGH) });
    let any = ctx.proxy.any();
    let mut l =
        listener(VIRTUAL_INBOUND.to_owned(), SocketAddr::new(any, ctx.inbound_port()), Direction::Inbound);
    l.use_original_dst = true;
    l.mixer = ctx.mixer();
    l.inspect_timeout = ctx.inspect_timeout();
    l.transparent = ctx.proxy.interception == Interception::Tproxy;
    for p in ports.values() {
        let at = FilterChainMatch { destination_port: Some(p.number), ..FilterChainMatch::default() };
        l.filter_chains.extend(port_chains(ctx, p, at));
    }
    l.filter_chains.extend(passthrough_chains(ctx));
    inspect(&mut l);
    hbone::inbound(ctx, &[Target::whole(ctx, VIRTUAL_INBOUND)], out);
    out.listener(l);
}

/// Where connections to the workload's own address come from. They are told from its connections to itself by that: capture
/// leaves these alone, which would otherwise come back for ever.
fn passed(ctx: &Ctx<'_>) -> Vec<IpAddr> {
    let mut source = vec![IpAddr::from(PASSED_V4)];
    if ctx.proxy.flotilla {
        // Only where capture gave it to the loopback interface, without which Envoy would not connect.
        source.push(IpAddr::from(PASSED_V6));
    }
    source
}

/// Whether applications listen at the workload's own address (`MeshConfig.inboundTrafficPolicy`). Who says nothing gets
/// loopback, as in release 1.0: what listens there alone is reached, and what listens everywhere is too.
fn passes_through(ctx: &Ctx<'_>) -> bool {
    let policy = ctx.world.config.mesh.inbound_traffic_policy.as_ref();
    policy.is_some_and(|p| p.mode == InboundTrafficMode::Passthrough)
        && ctx.proxy.interception != Interception::None
}

/// Turns on the inspection that the chains need and no more, since it costs a peek per connection.
fn inspect(l: &mut mesh_model::proxy::Listener) {
    let tls = |m: &FilterChainMatch| m.transport_protocol.is_some() || !m.server_names.is_empty();
    l.inspect_tls = l.filter_chains.iter().any(|c| tls(&c.matches));
    l.inspect_http =
        l.filter_chains.iter().any(|c| c.matches.application_protocols.iter().any(|p| p == "http/1.1"));
}

/// Ports that a `Sidecar` declares, else those that services say the workload has. If several services share one, the
/// oldest decides.
fn ports<'a>(ctx: &Ctx<'a>) -> BTreeMap<u16, Port<'a>> {
    let mut found = ctx.world.index.instances(&ctx.proxy.addresses);
    found.retain(|(e, _)| e.service.namespace == ctx.proxy.namespace);
    found.sort_by_key(|(e, _)| (e.service.created, e.service.host.clone()));
    let sidecar = ctx.world.sidecar(ctx.proxy).map(|d| &*d.spec);
    let pool = sidecar.and_then(|s| s.inbound_connection_pool.as_ref());
    let mut out = BTreeMap::new();
    for (entry, endpoint) in found {
        let Some(p) = entry.service.ports.iter().find(|p| p.name == endpoint.service_port) else { continue };
        let said = ctx.proxy.inbound.get(&endpoint.port).copied();
        let to = said.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], endpoint.port)));
        out.entry(endpoint.port).or_insert(Port {
            number: endpoint.port,
            protocol: p.protocol,
            entry: Some(entry),
            service_port: p.port,
            to: parts(to),
            own: said.is_none(),
            pool,
            listener: None,
        });
    }
    let Some(sidecar) = sidecar.filter(|s| !s.ingress.is_empty()) else { return out };
    let mut of_services = out;
    let mut out = BTreeMap::new();
    for l in &sidecar.ingress {
        let Some(port) = &l.port else { continue };
        let Some(number) = u16::try_from(port.number).ok().filter(|n| *n > 0) else { continue };
        let known = of_services.remove(&number);
        let to = endpoint(ctx, &l.default_endpoint, number);
        let own = to.is_none() && known.as_ref().is_none_or(|k| k.own);
        out.entry(number).or_insert(Port {
            number,
            protocol: Protocol::parse(&port.protocol).unwrap_or(Protocol::Auto),
            entry: known.as_ref().and_then(|k| k.entry),
            service_port: known.as_ref().map_or(number, |k| k.service_port),
            to: to
                .or(known.map(|k| k.to))
                .unwrap_or_else(|| parts(SocketAddr::from(([127, 0, 0, 1], number)))),
            own,
            pool: l.connection_pool.as_ref().or(pool),
            listener: Some(l),
        });
    }
    out
}

/// Where the application listens, as an ingress listener says: a loopback address as it is, an address of all
/// interfaces stands for the workload's own.
fn endpoint(ctx: &Ctx<'_>, text: &str, number: u16) -> Option<(String, u16)> {
    if text.starts_with(UNIX) {
        return Some((text.to_owned(), 0));
    }
    let to: SocketAddr = match text.strip_prefix(':') {
        Some(port) => SocketAddr::from(([127, 0, 0, 1], port.parse().ok()?)),
        None => text.parse().ok()?,
    };
    let port = if to.port() == 0 { number } else { to.port() };
    if to.ip().is_unspecified() {
        let own = ctx.proxy.addresses.iter().find(|a| a.is_ipv4() == to.is_ipv4());
        return Some(parts(SocketAddr::new(own.copied().unwrap_or(to.ip()), port)));
    }
    Some(parts(SocketAddr::new(to.ip(), port)))
}

fn parts(to: SocketAddr) -> (String, u16) {
    (to.ip().to_string(), to.port())
}

/// Numbers of the workload's ports.
pub(super) fn served(ctx: &Ctx<'_>) -> Vec<u16> {
    ports(ctx).into_keys().collect()
}

fn cluster_name(port: u16) -> String {
    format!("inbound|{port}||")
}

fn cluster(ctx: &Ctx<'_>, p: &Port<'_>) -> Cluster {
    let name = cluster_name(p.number);
    let endpoint = LbEndpoint {
        address: p.to.0.clone(),
        port: p.to.1,
        weight: 1,
        health: EndpointHealth::Healthy,
        transport_labels: BTreeMap::new(),
        workload: String::new(),
        check: None,
        slots: mesh_model::proxy::Slots::None,
    };
    let assignment = LoadAssignment {
        name: name.clone(),
        localities: if endpoint.address.starts_with(UNIX) && !ctx.proxy.opens_sockets() {
            vec![]
        } else {
            vec![LocalityEndpoints { endpoints: vec![endpoint], ..LocalityEndpoints::default() }]
        },
        overprovisioning: 140,
    };
    let mut c = if p.own && passes_through(ctx) {
        Cluster {
            lb: LbPolicy::RoundRobin,
            source: passed(ctx),
            ..ctx.base_cluster(&name, Discovery::OriginalDst)
        }
    } else {
        ctx.base_cluster(&name, Discovery::Static(assignment))
    };
    if let Some(e) = p.entry
        && let Some(port) = e.service.ports.iter().find(|x| x.port == p.service_port)
    {
        let pattern = &ctx.world.config.mesh.inbound_cluster_stat_name;
        c.stat_name = clusters::stat_name(pattern, e, port, ("TARGET_PORT", &p.number.to_string()));
    }
    // The pool settings of the service's own rule, or the mesh's, apply here as well, unless a Sidecar has others.
    let rule = p.entry.and_then(|e| ctx.world.destination_rule(ctx.proxy, e));
    let said = effective_policy(rule.as_deref(), None, p.service_port);
    let policy = ctx.world.defaulted(&said);
    clusters::pool(&mut c, p.pool.or(policy.connection_pool.as_ref()), Protocol::Tcp);
    c.http = match p.protocol {
        x if x.is_http2() => UpstreamHttp::Http2,
        Protocol::Auto => UpstreamHttp::Downstream,
        _ => UpstreamHttp::Http1,
    };
    c
}

fn mutual_tls(ctx: &Ctx<'_>, http: bool) -> DownstreamTls {
    // `istio` comes last: it is what a client offers that wants neither HTTP version by ALPN.
    let alpn: &[&str] = match (http, ctx.proxy.tunnels) {
        (true, _) => &["h2", "http/1.1", "istio"],
        (false, true) => &[TUNNEL_ALPN, "istio"],
        (false, false) => &["istio"],
    };
    DownstreamTls {
        certificate: ctx.own_certificate(),
        client_certificate: ClientCertificate::Required(Validation {
            trusted: Some(ctx.mesh_roots()),
            sans: vec![],
            crl: None,
        }),
        alpn: alpn.iter().map(|s| (*s).to_owned()).collect(),
        // Whoever has a certificate of the mesh speaks it; older versions would show certificates and names in clear.
        min_version: TlsVersion::V1_3,
        options: TlsServerOptions {
            curves: ctx
                .world
                .config
                .mesh
                .mesh_mtls
                .as_ref()
                .map_or_else(Vec::new, |t| gateway::known_names(&t.ecdh_curves, |c| TLS_CURVES.contains(&c))),
            ..TlsServerOptions::default()
        },
    }
}

fn port_chains(ctx: &Ctx<'_>, p: &Port<'_>, at: FilterChainMatch) -> Vec<FilterChain> {
    let mode = ctx.world.mtls_mode(ctx.proxy, p.number);
    let http = p.protocol.is_http();
    let name = format!("{VIRTUAL_INBOUND}-{}", p.number);
    let filters =
        |http: bool| if http { http_filters(ctx, p) } else { tcp_filters(ctx, &cluster_name(p.number)) };
    let tls = tls_of(at.clone());
    let mut out = Vec::new();
    if mode != MutualTlsMode::Disable {
        let mut m = tls.clone();
        if mode == MutualTlsMode::Permissive {
            m.application_protocols = MESH_ALPN.map(str::to_owned).to_vec();
        }
        out.extend(mesh_chains(ctx, p.number, http, &name, m, || filters(http)));
    }
    match mode {
        MutualTlsMode::Strict => return out,
        MutualTlsMode::Disable => match p.listener.and_then(|l| l.tls.as_ref()) {
            // A Sidecar's own TLS is for those who come from outside of the mesh; it takes the place of the mesh's.
            Some(settings) => out.extend(terminating(ctx, p, settings, at)),
            None => plain(&mut out, ctx, p, &name, at),
        },
        _ => {
            // The application's own TLS, for it alone to read.
            out.push(chain(format!("{name}-tls"), tls, filters(false)));
            let raw = FilterChainMatch { transport_protocol: Some(TransportProtocol::RawBuffer), ..at };
            plain(&mut out, ctx, p, &name, raw);
        }
    }
    out
}

/// Chains that end the mesh's TLS. Where a Policy lets callers in without a certificate, those that come through this
/// cluster's east-west gateways still need one: a gateway passes on whatever reaches it from outside.
fn mesh_chains(
    ctx: &Ctx<'_>,
    port: u16,
    http: bool,
    name: &str,
    at: FilterChainMatch,
    filters: impl Fn() -> Vec<NetworkFilter>,
) -> Vec<FilterChain> {
    let mutual = mutual_tls(ctx, http);
    if !ctx.world.allows_tls(ctx.proxy, port) {
        return vec![FilterChain { tls: Some(mutual), ..chain(name, at, filters()) }];
    }
    let mut out = Vec::new();
    let gateways: BTreeSet<IpAddr> =
        ctx.world.index.east_west.iter().map(|a| a.ip().to_canonical()).collect();
    if !gateways.is_empty() {
        let from = FilterChainMatch {
            source_prefixes: gateways.into_iter().map(Into::into).collect(),
            ..at.clone()
        };
        let tls = Some(mutual.clone());
        out.push(FilterChain { tls, ..chain(format!("{name}-gateways"), from, filters()) });
    }
    let optional = DownstreamTls {
        client_certificate: match mutual.client_certificate {
            ClientCertificate::Required(v) => ClientCertificate::Optional(v),
            other => other,
        },
        // Who is no proxy of the mesh may offer whatever it speaks, and a server that knows none of it would refuse. Without
        // these no connections share a session, whose peer would be nobody's.
        alpn: if http { mutual.alpn } else { vec![] },
        min_version: TlsVersion::V1_2,
        options: mutual.options,
        certificate: mutual.certificate,
    };
    out.push(FilterChain { tls: Some(optional), ..chain(name, at, filters()) });
    out
}

fn tls_of(at: FilterChainMatch) -> FilterChainMatch {
    FilterChainMatch { transport_protocol: Some(TransportProtocol::Tls), ..at }
}

/// The chain of a port that ends TLS with certificates of its own, with HTTP in it if the port's protocol is HTTPS. With
/// settings that cannot be used there is none, and nobody gets in.
fn terminating(
    ctx: &Ctx<'_>,
    p: &Port<'_>,
    settings: &ServerTlsSettings,
    at: FilterChainMatch,
) -> Option<FilterChain> {
    let http = p.protocol == Protocol::Https;
    let tls = gateway::termination(ctx, settings, http)?;
    let filters = if http { http_filters(ctx, p) } else { tcp_filters(ctx, &cluster_name(p.number)) };
    let name = format!("{VIRTUAL_INBOUND}-{}-tls", p.number);
    Some(FilterChain { tls: Some(tls), ..chain(name, tls_of(at), filters) })
}

/// Plaintext chains of a port.
fn plain(out: &mut Vec<FilterChain>, ctx: &Ctx<'_>, p: &Port<'_>, name: &str, at: FilterChainMatch) {
    if p.protocol == Protocol::Auto {
        let m = FilterChainMatch { application_protocols: http_protocols(), ..at.clone() };
        out.push(chain(format!("{name}-http"), m, http_filters(ctx, p)));
    }
    let filters =
        if p.protocol.is_http() { http_filters(ctx, p) } else { tcp_filters(ctx, &cluster_name(p.number)) };
    out.push(chain(format!("{name}-plain"), at, filters));
}

fn http_filters(ctx: &Ctx<'_>, p: &Port<'_>) -> Vec<NetworkFilter> {
    let cluster = cluster_name(p.number);
    let forward = Forward { clusters: vec![WeightedCluster::only(&cluster)], ..Forward::default() };
    let mut route = http::route(RouteMatch::any(), RouteAction::Forward(Box::new(forward)));
    route.name = "default".to_owned();
    let host = p.entry.map_or("*", |e| e.service.host.as_str());
    route.operation = format!("{host}:{}/*", p.service_port);
    let config = RouteConfiguration {
        name: cluster,
        virtual_hosts: vec![routes::own_host(
            format!("inbound|http|{}", p.service_port),
            vec!["*".to_owned()],
            vec![route],
        )],
        on_demand: None,
    };
    let source = RouteSource::Inline(Arc::new(config));
    let hcm = ctx.hcm_at(&format!("inbound_0.0.0.0_{}", p.number), source, Side::Inbound, Some(p.number));
    vec![NetworkFilter::Http(Box::new(hcm))]
}

fn tcp_filters(ctx: &Ctx<'_>, cluster: &str) -> Vec<NetworkFilter> {
    let mut out = rbac::guards(ctx);
    out.push(ctx.tcp_to(cluster));
    out
}

/// Chains of ports that no service declares: to the same port of the workload, under the same rules.
fn passthrough_chains(ctx: &Ctx<'_>) -> Vec<FilterChain> {
    let mode = ctx.world.mtls_mode(ctx.proxy, 0);
    let filters = || tcp_filters(ctx, INBOUND_PASSTHROUGH);
    let tls =
        FilterChainMatch { transport_protocol: Some(TransportProtocol::Tls), ..FilterChainMatch::default() };
    let mtls = |m: FilterChainMatch| mesh_chains(ctx, 0, false, VIRTUAL_INBOUND, m, filters);
    match mode {
        MutualTlsMode::Disable => {
            vec![chain(format!("{VIRTUAL_INBOUND}-plain"), FilterChainMatch::default(), filters())]
        }
        MutualTlsMode::Strict => mtls(tls),
        _ => {
            let mut mesh = tls.clone();
            mesh.application_protocols = MESH_ALPN.map(str::to_owned).to_vec();
            let raw = FilterChainMatch {
                transport_protocol: Some(TransportProtocol::RawBuffer),
                ..FilterChainMatch::default()
            };
            let mut out = mtls(mesh);
            out.push(chain(format!("{VIRTUAL_INBOUND}-tls"), tls, filters()));
            out.push(chain(format!("{VIRTUAL_INBOUND}-plain"), raw, filters()));
            out
        }
    }
}
