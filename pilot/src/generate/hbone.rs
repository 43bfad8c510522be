//! HBONE: connections for the workload that come as CONNECT streams over mutual TLS, as ambient meshes send them.
//!
//! One listener takes the sessions. A stream's authority must be an address of this workload; what it carries is then
//! a connection to the inbound listener, with the session's peer, so every rule about the port holds as it does for
//! connections that come directly. Only our own proxy gets it: in Envoy it takes a chain of internal listeners.

use std::{net::SocketAddr, sync::Arc};

use mesh_model::proxy::{
    ClientCertificate, Direction, Discovery, DownstreamTls, EndpointHealth, FilterChain, FilterChainMatch,
    Forward, HBONE_PORT, HttpCodec, HttpConnectionManager, LbEndpoint, LoadAssignment, LocalityEndpoints,
    NetworkFilter, PathMatch, RouteAction, RouteConfiguration, RouteMatch, RouteSource, TlsServerOptions,
    TlsVersion, UpstreamTls, Validation, WeightedCluster,
};

use mesh_model::registry::Labels;

use super::{
    Ctx, Generated,
    common::{Side, chain, listener},
    http, routes,
};

/// Name of the listener and of its routes (Istio's).
const CONNECT_TERMINATE: &str = "connect_terminate";
/// Transport label of endpoints that take tunnels (Istio's).
pub(super) const TUNNEL_LABEL: &str = "tunnel";
/// Workload label that says so, with the value `http`.
const WORKLOAD_LABEL: &str = "networking.istio.io/tunnel";

/// A listener that tunnels lead to, and the authorities that it takes.
pub(super) struct Target {
    pub(super) listener: String,
    pub(super) authorities: Vec<String>,
}

impl Target {
    /// Every port of the workload's addresses.
    pub(super) fn whole(ctx: &Ctx<'_>, listener: &str) -> Self {
        // The form of an authority: IPv6 in brackets.
        let any_port = |ip: &std::net::IpAddr| {
            let zero = SocketAddr::new(*ip, 0).to_string();
            format!("{}*", zero.trim_end_matches('0'))
        };
        let authorities = ctx.proxy.addresses.iter().map(any_port).collect();
        Self { listener: listener.to_owned(), authorities }
    }

    /// One address.
    pub(super) fn one(at: SocketAddr, listener: &str) -> Self {
        Self { listener: listener.to_owned(), authorities: vec![at.to_string()] }
    }
}

/// Adds the listener of tunnels; each target is a listener that is generated elsewhere.
pub(super) fn inbound(ctx: &Ctx<'_>, targets: &[Target], out: &mut Generated) {
    if !ctx.proxy.tunnels || targets.is_empty() {
        return;
    }
    let mut hosts = Vec::with_capacity(targets.len());
    for t in targets {
        let cluster = format!("{CONNECT_TERMINATE}|{}", t.listener);
        let endpoint = LbEndpoint {
            address: format!("internal:{}", t.listener),
            port: 0,
            weight: 1,
            health: EndpointHealth::Healthy,
            transport_labels: Default::default(),
            workload: String::new(),
            check: None,
            slots: mesh_model::proxy::Slots::None,
        };
        let assignment = LoadAssignment {
            name: cluster.clone(),
            localities: vec![LocalityEndpoints { endpoints: vec![endpoint], ..Default::default() }],
            overprovisioning: 140,
        };
        out.cluster(ctx.base_cluster(&cluster, Discovery::Static(assignment)));
        let end =
            Forward { clusters: vec![WeightedCluster::only(&cluster)], connect: true, ..Forward::default() };
        let matches = RouteMatch { path: PathMatch::Connect, ..RouteMatch::any() };
        let route = http::route(matches, RouteAction::Forward(Box::new(end)));
        hosts.push(routes::own_host(cluster, t.authorities.clone(), vec![route]));
    }
    let config =
        RouteConfiguration { name: CONNECT_TERMINATE.to_owned(), virtual_hosts: hosts, on_demand: None };
    // What the tunnels carry is logged, authorized and traced where it is served.
    let manager = HttpConnectionManager {
        codec: HttpCodec::Http2,
        filters: vec![],
        websocket: false,
        connect: true,
        access_log: vec![],
        tracing: None,
        ..ctx.hcm(CONNECT_TERMINATE, RouteSource::Inline(Arc::new(config)), Side::Inbound)
    };
    let tls = DownstreamTls {
        certificate: ctx.own_certificate(),
        client_certificate: ClientCertificate::Required(Validation {
            trusted: Some(ctx.mesh_roots()),
            sans: vec![],
            crl: None,
        }),
        alpn: vec!["h2".to_owned()],
        min_version: TlsVersion::V1_3,
        options: TlsServerOptions::default(),
    };
    let at = SocketAddr::new(ctx.proxy.bind(), HBONE_PORT);
    let mut l = listener(CONNECT_TERMINATE.to_owned(), at, Direction::Inbound);
    let filters = vec![NetworkFilter::Http(Box::new(manager))];
    l.filter_chains = vec![FilterChain {
        tls: Some(tls),
        ..chain(CONNECT_TERMINATE, FilterChainMatch::default(), filters)
    }];
    out.listener(l);
}

/// Whether a workload with these labels is reached through tunnels.
pub(super) fn is_reached(labels: &Labels) -> bool {
    labels.get(WORKLOAD_LABEL).is_some_and(|v| v == "http")
}

/// TLS to the proxy of an endpoint that takes tunnels: no server name, HTTP/2.
pub(super) fn upstream_tls<'s>(
    ctx: &Ctx<'_>,
    identities: impl IntoIterator<Item = &'s String>,
) -> UpstreamTls {
    UpstreamTls { alpn: vec!["h2".to_owned()], ..ctx.mesh_tls(identities, String::new(), false) }
}
