//! Datagrams that a workload sends to services.
//!
//! Only for our own proxy with `INTERCEPTION_MODE=TPROXY`, since the destination of a datagram is known only where
//! capture left it as it was. One listener takes them all and hands each to the unbound listener of its destination,
//! as for connections; what nobody declared is passed on, or not with `REGISTRY_ONLY`.
//!
//! To workloads with a proxy, here and in other clusters, they travel in connections of QUIC between the two proxies, under
//! the server names that TCP has: to workloads' proxies at port 15006 of UDP, to other clusters through this cluster's
//! gateways at port 15444. A `DestinationRule` with TLS mode `DISABLE`, and a `PeerAuthentication` with `DISABLE`, leave
//! them in clear inside of the cluster. Only our own proxies are told of any of this.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use mesh_model::{
    authored::{ClientTlsMode, MutualTlsMode, TrafficPolicy},
    proxy::{
        ClientCertificate, Cluster, Direction, Discovery, DownstreamTls, EndpointHealth, FilterChain,
        FilterChainMatch, LbEndpoint, LbPolicy, Listener, LoadAssignment, LocalityEndpoints, NetworkFilter,
        OutlierDetection, QuicOptions, Slots, TlsServerOptions, TlsVersion, TransportSocketMatch, UDP_ALPN,
        UdpHash, UdpProxy, UpstreamTls, Validation,
    },
    registry::{Labels, Resolution, ServicePort},
};

use super::{
    Ctx, Generated, clusters,
    common::{BLACK_HOLE, PASSTHROUGH, chain, listener, member_sni, sni_name},
    endpoints::{self, CLUSTER_LABEL, TLS_LABEL},
    rbac, telemetry,
};
use crate::{
    hosts,
    index::{Entry, Origin},
    proxy::Interception,
    world::{Undeclared, effective_policy},
};

const VIRTUAL_OUTBOUND: &str = "virtualOutboundUdp";
const VIRTUAL_INBOUND: &str = "virtualInboundUdp";

/// A handshake that fails stands for all sessions that would have shared it, so one is enough; what is behind it is tried
/// again soon.
const OUTLIER: OutlierDetection = OutlierDetection {
    consecutive_5xx: 0,
    enforcing_5xx: 100,
    consecutive_gateway: 1,
    enforcing_gateway: 100,
    success_rate: None,
    failure_percentage: None,
    local_origin: None,
    interval: Duration::from_secs(1),
    base_ejection: Duration::from_secs(5),
    max_ejection: Duration::from_secs(60),
    max_percent: 100,
    error_codes: Vec::new(),
};

/// Connections that gateways pass on ping every second.
const PASSING_IDLE: Duration = Duration::from_secs(15);

/// Name of the cluster of a UDP port: the number may be one of TCP as well.
pub(super) fn cluster_name(port: u16, host: &str) -> String {
    format!("outbound|{port}/udp||{host}")
}

pub(super) fn shared(ctx: &Ctx<'_>, out: &mut Generated) {
    if !ctx.proxy.flotilla || ctx.proxy.interception != Interception::Tproxy {
        return;
    }
    for entry in ctx.visible().iter().filter(|e| !e.udp_ports.is_empty()) {
        let rule = ctx.world.destination_rule(ctx.proxy, entry);
        for port in &entry.udp_ports {
            let policy = effective_policy(rule.as_deref(), None, port.port);
            cluster(ctx, out, entry, port, &policy);
            for ip in addresses(entry) {
                let l = service_port(ctx, entry, port, &policy, ip);
                // Services of one address must differ in ports: the first has it.
                out.listeners.entry(l.name.clone()).or_insert(l);
            }
        }
    }
    let any = ctx.proxy.any();
    // A proxy for streams is none for datagrams.
    let passed = ctx.world.undeclared(ctx.proxy) != Undeclared::Refused;
    let to = if passed { PASSTHROUGH } else { BLACK_HOLE };
    let mut l =
        listener(VIRTUAL_OUTBOUND.to_owned(), SocketAddr::new(any, ctx.outbound_port()), Direction::Outbound);
    l.use_original_dst = true;
    l.transparent = true;
    l.udp = Some(Box::new(proxy(ctx, to)));
    out.listener(l);
}

/// Where callers send to: the service's addresses, or its endpoints' if it is headless.
fn addresses(e: &Entry) -> Vec<IpAddr> {
    if !e.service.headless {
        return e.service.addresses.clone();
    }
    let mut own: Vec<IpAddr> = e.endpoints.iter().filter_map(|e| e.address.parse().ok()).collect();
    own.sort_unstable();
    own.dedup();
    own
}

fn proxy(ctx: &Ctx<'_>, cluster: &str) -> UdpProxy {
    UdpProxy {
        // Fragments were put together before they came here.
        max_downstream: u16::MAX,
        access_log: ctx.access_log(telemetry::Logged::Connections),
        ..UdpProxy::to(cluster)
    }
}

fn service_port(
    ctx: &Ctx<'_>,
    e: &Entry,
    port: &ServicePort,
    policy: &TrafficPolicy,
    ip: IpAddr,
) -> Listener {
    let at = SocketAddr::new(ip, port.port);
    let mut l = listener(format!("{ip}_{}_udp", port.port), at, Direction::Outbound);
    l.bind_to_port = false;
    let mut p = proxy(ctx, &cluster_name(port.port, &e.service.host));
    // The only thing to hash by that a datagram has.
    let lb = policy.load_balancer.as_ref().and_then(|l| l.consistent_hash.as_ref());
    p.hash = lb.and_then(|h| h.use_source_ip).filter(|on| *on).map(|_| UdpHash::SourceIp);
    l.udp = Some(Box::new(p));
    l
}

fn cluster(ctx: &Ctx<'_>, out: &mut Generated, e: &Entry, port: &ServicePort, policy: &TrafficPolicy) {
    let name = cluster_name(port.port, &e.service.host);
    let none = Labels::new();
    let assignment = || endpoints::assignment(ctx, e, port, &none, &name, policy);
    let discovery = match e.service.resolution {
        // A datagram names nobody, and galley refuses such ports.
        Resolution::Passthrough | Resolution::ByName => Discovery::OriginalDst,
        Resolution::Static => {
            out.assignment(assignment());
            Discovery::Eds(name.clone())
        }
        Resolution::Dns => Discovery::StrictDns(assignment()),
    };
    let mut c: Cluster = ctx.base_cluster(&name, discovery);
    clusters::balance(&mut c, policy.load_balancer.as_ref(), ctx.proxy.flotilla);
    if matches!(c.lb, LbPolicy::LeastRequest(_) | LbPolicy::PeakEwma) {
        // Sessions last for a minute whatever they do, and nothing answers: how many a host has says little.
        c.lb = LbPolicy::RoundRobin;
    }
    let defaulted = ctx.world.defaulted(policy);
    clusters::pool(&mut c, defaulted.connection_pool.as_ref(), port.protocol);
    c.locality_weighted = endpoints::locality_setting(ctx, policy).is_some_and(|s| !s.distribute.is_empty());
    transport(ctx, &mut c, e, port, policy);
    if !c.tls_matches.is_empty() {
        c.outlier = Some(Box::new(defaulted.outlier_detection.as_ref().map_or(OUTLIER, clusters::outlier)));
        // When all are out all are tried: they may be back.
        c.panic_threshold = 1;
    }
    out.cluster(c);
}

/// Whether datagrams to workloads of this cluster that have a proxy go through it. To other clusters they always do.
pub(super) fn is_secure(ctx: &Ctx<'_>, e: &Entry, policy: &TrafficPolicy) -> bool {
    let wanted = policy.tls.as_ref().is_none_or(|t| t.mode == ClientTlsMode::IstioMutual);
    ctx.proxy.flotilla && wanted && !e.service.mesh_external && e.service.resolution == Resolution::Static
}

fn transport(ctx: &Ctx<'_>, c: &mut Cluster, e: &Entry, port: &ServicePort, policy: &TrafficPolicy) {
    let s = &e.service;
    let quic = |sni: String| UpstreamTls {
        alpn: vec![UDP_ALPN.to_owned()],
        ..ctx.mesh_tls(&e.identities, sni, false)
    };
    for i in &e.imports {
        c.tls_matches.push(TransportSocketMatch {
            name: format!("cluster-{}", i.cluster),
            labels: BTreeMap::from([(CLUSTER_LABEL.to_owned(), i.cluster.to_string())]),
            tls: Some(quic(member_sni(port.port, "", &s.name, &s.namespace, i.cluster.as_str()))),
            hbone: false,
        });
    }
    if is_secure(ctx, e, policy) && e.endpoints.iter().any(|x| x.service_port == port.name) {
        // A member's part of a service is the service to its workloads.
        let host = match e.origin {
            Origin::Member => hosts::service_host(&s.name, &s.namespace),
            _ => s.host.clone(),
        };
        c.tls_matches.push(TransportSocketMatch {
            name: "tlsMode-istio".to_owned(),
            labels: BTreeMap::from([(TLS_LABEL.to_owned(), "istio".to_owned())]),
            tls: Some(quic(sni_name(port.port, "", &host))),
            hbone: false,
        });
    }
}

/// What the workload's proxy takes for ports of UDP: connections of QUIC, each for the port that its server name says,
/// behind mutual TLS and the rules for that port.
pub(super) fn inbound(ctx: &Ctx<'_>, out: &mut Generated) {
    if !ctx.proxy.flotilla {
        return;
    }
    let mut chains: BTreeMap<u16, FilterChain> = BTreeMap::new();
    let mut found = ctx.world.index.instances(&ctx.proxy.addresses);
    found.retain(|(e, _)| e.service.namespace == ctx.proxy.namespace);
    found.sort_by_key(|(e, _)| (e.service.created, e.service.host.clone()));
    let mut taken = std::collections::BTreeSet::new();
    for (e, endpoint) in found {
        let Some(p) = e.udp_ports.iter().find(|p| p.name == endpoint.service_port) else { continue };
        let number = endpoint.port;
        if ctx.world.mtls_mode(ctx.proxy, number) == MutualTlsMode::Disable {
            continue;
        }
        // Two services may not have one name, and do not; a name in two chains would be refused with all of them.
        let names: Vec<_> = server_names(ctx, e, p).into_iter().filter(|n| taken.insert(n.clone())).collect();
        if names.is_empty() {
            continue;
        }
        let c = chains.entry(number).or_insert_with(|| inbound_chain(ctx, out, number));
        c.matches.server_names.extend(names);
    }
    if chains.is_empty() {
        return;
    }
    // With capture the workload's address need not be the proxy's to bind.
    let ip = if ctx.proxy.interception == Interception::None { ctx.proxy.bind() } else { ctx.proxy.any() };
    let mut l =
        listener(VIRTUAL_INBOUND.to_owned(), SocketAddr::new(ip, ctx.inbound_port()), Direction::Inbound);
    l.quic = Some(QuicOptions::default());
    l.filter_chains = chains.into_values().collect();
    out.listener(l);
}

/// Names by which a port is asked for: here, from other clusters, and with a slot in front.
fn server_names(ctx: &Ctx<'_>, e: &Entry, port: &ServicePort) -> Vec<String> {
    let s = &e.service;
    let own = ctx.world.settings.cluster.as_str();
    let mut names = vec![sni_name(port.port, "", &s.host)];
    if e.origin == Origin::Platform {
        names.push(member_sni(port.port, "", &s.name, &s.namespace, own));
    }
    names.extend(names.iter().map(|n| format!("*.{n}")).collect::<Vec<_>>());
    names
}

fn inbound_chain(ctx: &Ctx<'_>, out: &mut Generated, number: u16) -> FilterChain {
    let name = format!("inbound|{number}/udp||");
    let to = ctx.proxy.inbound.get(&number).copied();
    let to = to.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], number)));
    out.cluster(ctx.base_cluster(&name, Discovery::Static(one(&name, to))));
    let mut filters: Vec<NetworkFilter> = rbac::udp(ctx).into_iter().map(NetworkFilter::Rbac).collect();
    filters.push(NetworkFilter::Udp(Box::new(proxy(ctx, &name))));
    FilterChain {
        tls: Some(DownstreamTls {
            certificate: ctx.own_certificate(),
            client_certificate: ClientCertificate::Required(Validation {
                trusted: Some(ctx.mesh_roots()),
                sans: vec![],
                crl: None,
            }),
            alpn: vec![UDP_ALPN.to_owned()],
            min_version: TlsVersion::V1_3,
            options: TlsServerOptions::default(),
        }),
        ..chain(format!("{VIRTUAL_INBOUND}-{number}"), FilterChainMatch::default(), filters)
    }
}

fn one(name: &str, to: SocketAddr) -> LoadAssignment {
    let endpoint = LbEndpoint {
        address: to.ip().to_string(),
        port: to.port(),
        weight: 1,
        health: EndpointHealth::Healthy,
        transport_labels: BTreeMap::new(),
        workload: String::new(),
        check: None,
        slots: Slots::None,
    };
    LoadAssignment {
        name: name.to_owned(),
        localities: vec![LocalityEndpoints { endpoints: vec![endpoint], ..LocalityEndpoints::default() }],
        overprovisioning: 140,
    }
}

/// A UDP proxy of a gateway that passes connections of QUIC on.
pub(super) fn passing(ctx: &Ctx<'_>, cluster: &str) -> NetworkFilter {
    NetworkFilter::Udp(Box::new(UdpProxy { idle_timeout: PASSING_IDLE, ..proxy(ctx, cluster) }))
}
