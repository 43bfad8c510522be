//! East-west gateways: one listener that forwards by server name and terminates nothing.
//!
//! | server name | goes to |
//! |---|---|
//! | `outbound_.<port>_.<subset>_.<svc>.<ns>.svc.<self>.clusterset.local` | own healthy workloads, if the service is exported |
//! | `outbound_.<port>_.<subset>_.<svc>.<ns>.svc.cluster.local` | the same, as Istio's gateways write it |
//! | `*.svc.<peer>.clusterset.local`, `federation.<peer>…`, `join.<peer>…` | that peer's gateways |
//! | `federation.<self>.clusterset.local`, `join.<self>…` | this cluster's control plane |
//! | `<slot>.outbound_.…`, for the two first | the workload of that slot (see [`crate::slots`]), or another |
//! | anything else | closed |
//!
//! Names of ports of UDP are the same and mean the same, in connections of QUIC to port 15444.
//!
//! A service that is not exported has no chain, so its name is as unknown as any other. One listener
//! serves both directions: a peer that dials it with another peer's name is forwarded there, where the
//! inner session is verified like any other; such transit shows in the peer's cluster metrics.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    time::Duration,
};

use mesh_model::{
    federation::{LeaseState, PeerCluster, Transport},
    proxy::{
        Cluster, Direction, Discovery, EndpointHealth, FilterChain, FilterChainMatch, LbEndpoint,
        LoadAssignment, LocalityEndpoints, OutlierDetection, Slots, TransportProtocol,
    },
    registry::{Health, Labels, ServicePort, TlsMode},
};

use super::{
    Ctx, Generated,
    common::{chain, listener, member_sni, sni_name},
    gateway::Served,
    tcp, udp,
};
use crate::{
    hosts,
    index::{Entry, Origin},
    slots,
};

/// Cluster of this cluster's control plane.
const CONTROL_PLANE: &str = "control-plane";
/// Port of east-west gateways; the endpoint of a peer that dials has none of its own.
const EAST_WEST: u16 = 15443;

/// A workload that cannot be reached is left alone for some seconds, so that callers are told at once when there is
/// no other.
const WORKLOAD_OUTLIER: OutlierDetection = OutlierDetection {
    consecutive_5xx: 0,
    enforcing_5xx: 100,
    consecutive_gateway: 1,
    enforcing_gateway: 100,
    success_rate: None,
    failure_percentage: None,
    local_origin: None,
    interval: Duration::from_secs(1),
    base_ejection: Duration::from_secs(2),
    max_ejection: Duration::from_secs(10),
    max_percent: 100,
    error_codes: Vec::new(),
};

pub(super) fn generate(ctx: &Ctx<'_>, out: &mut Generated) {
    let own = ctx.world.settings.cluster.as_str();
    let ip = ctx.proxy.bind();
    let port = mesh_runtime::ports::EAST_WEST;
    let mut l = listener(format!("{ip}_{port}"), SocketAddr::new(ip, port), Direction::Unspecified);
    l.inspect_tls = true;
    // A client that sends nothing has no server name and no chain; a slow one gets a fair time.
    l.inspect_timeout = Duration::from_secs(5);
    let exported: Vec<&Entry> = ctx
        .world
        .index
        .services
        .values()
        .map(|e| &**e)
        .filter(|e| e.exported && e.origin == Origin::Platform)
        .collect();
    for e in exported {
        service_chains(ctx, out, e, &mut l.filter_chains, |port, subset| {
            let s = &e.service;
            vec![member_sni(port, subset, &s.name, &s.namespace, own), sni_name(port, subset, &s.host)]
        });
    }
    let federation = ctx.proxy.federation.or(ctx.world.settings.federation_address);
    if let Some(address) = federation {
        out.cluster(fixed(ctx, CONTROL_PLANE, &address.ip().to_string(), address.port()));
        let names = [format!("federation.{own}.clusterset.local"), format!("join.{own}.clusterset.local")];
        tcp::push(&mut l.filter_chains, to(ctx, CONTROL_PLANE, names.to_vec()));
    }
    for peer in ctx.world.config.peers.iter().filter(|p| p.id != ctx.world.settings.cluster) {
        let name = format!("peer|{}", peer.id);
        peer_cluster(ctx, out, &name, peer);
        let names = vec![
            format!("*.svc.{}.clusterset.local", peer.id),
            format!("federation.{}.clusterset.local", peer.id),
            format!("join.{}.clusterset.local", peer.id),
        ];
        tcp::push(&mut l.filter_chains, to(ctx, &name, names));
    }
    // Envoy refuses a listener without chains; there is nothing to forward then.
    if !l.filter_chains.is_empty() {
        out.listener(l);
    }
    if ctx.proxy.flotilla {
        datagrams(ctx, out);
    }
}

/// The same for connections of QUIC that carry datagrams, at a port of their own: that of the listener above is the
/// trunk's on UDP, and open to other clusters.
fn datagrams(ctx: &Ctx<'_>, out: &mut Generated) {
    let own = ctx.world.settings.cluster.as_str();
    let ip = ctx.proxy.bind();
    let at = SocketAddr::new(ip, mesh_runtime::ports::EAST_WEST_UDP);
    let mut l = listener(format!("udp_{ip}_{}", at.port()), at, Direction::Unspecified);
    l.inspect_quic = true;
    let to = |cluster: &str, server_names| {
        let m = FilterChainMatch { server_names, ..FilterChainMatch::default() };
        chain(cluster, m, vec![udp::passing(ctx, cluster)])
    };
    let exported = ctx.world.index.services.values();
    for e in exported.filter(|e| e.exported && e.origin == Origin::Platform) {
        let s = &e.service;
        let serves = slots::shape(e).serves;
        for p in &e.udp_ports {
            let name = format!("udp|{}", sni_name(p.port, "", &s.host));
            let mut a = local_endpoints(e, p, &Labels::new(), &name, &serves);
            for x in a.localities.iter_mut().flat_map(|l| &mut l.endpoints) {
                x.port = ctx.inbound_port();
            }
            out.assignment(a);
            out.cluster(ctx.base_cluster(&name, Discovery::Eds(name.clone())));
            let mut names =
                vec![member_sni(p.port, "", &s.name, &s.namespace, own), sni_name(p.port, "", &s.host)];
            names.extend(names.iter().map(|n| format!("*.{n}")).collect::<Vec<_>>());
            l.filter_chains.push(to(&name, names));
        }
    }
    for peer in ctx.world.config.peers.iter().filter(|p| p.id != ctx.world.settings.cluster) {
        l.filter_chains
            .push(to(&format!("peer|{}", peer.id), vec![format!("*.svc.{}.clusterset.local", peer.id)]));
    }
    if !l.filter_chains.is_empty() {
        out.listener(l);
    }
}

fn to(ctx: &Ctx<'_>, cluster: &str, server_names: Vec<String>) -> FilterChain {
    let m = FilterChainMatch {
        server_names,
        transport_protocol: Some(TransportProtocol::Tls),
        ..FilterChainMatch::default()
    };
    chain(cluster, m, vec![ctx.tcp_to(cluster)])
}

/// Chains and clusters of a service's ports and subsets.
fn service_chains(
    ctx: &Ctx<'_>,
    out: &mut Generated,
    e: &Entry,
    chains: &mut Vec<FilterChain>,
    names: impl Fn(u16, &str) -> Vec<String>,
) {
    let rule = ctx.world.destination_rule(ctx.proxy, e);
    let none = Labels::new();
    // Only our own gateways read them.
    let mut serves = HashMap::new();
    if ctx.proxy.flotilla {
        serves = slots::shape(e).serves;
    }
    let mut seen = BTreeSet::new();
    for p in e.service.ports.iter().filter(|p| seen.insert(p.port)) {
        let subsets = rule.iter().flat_map(|r| &r.subsets).map(|s| (s.name.as_str(), &s.labels));
        for (subset, labels) in std::iter::once(("", &none)).chain(subsets) {
            let name = sni_name(p.port, subset, &e.service.host);
            out.assignment(local_endpoints(e, p, labels, &name, &serves));
            out.cluster(Cluster {
                outlier: Some(Box::new(WORKLOAD_OUTLIER)),
                // When all are out all are tried: they may be back.
                panic_threshold: 1,
                ..ctx.base_cluster(&name, Discovery::Eds(name.clone()))
            });
            // Names are unique by construction; comparing each with all others would be quadratic.
            // Callers that keep a session to each slot put its name before the service's.
            let mut names = names(p.port, subset);
            names.extend(names.iter().map(|n| format!("*.{n}")).collect::<Vec<_>>());
            chains.push(to(ctx, &name, names));
        }
    }
}

/// Workloads of this cluster that can end an inner session.
fn local_endpoints(
    e: &Entry,
    p: &ServicePort,
    labels: &Labels,
    name: &str,
    serves: &HashMap<&str, Box<[u32]>>,
) -> LoadAssignment {
    let mut by_locality: BTreeMap<_, Vec<LbEndpoint>> = BTreeMap::new();
    for x in e.endpoints_of(p, labels).filter(|x| x.tls == TlsMode::Mutual) {
        by_locality.entry(x.locality.clone()).or_default().push(LbEndpoint {
            address: x.address.clone(),
            port: x.port,
            weight: x.weight,
            health: match x.health {
                Health::Healthy => EndpointHealth::Healthy,
                Health::Unhealthy => EndpointHealth::Unhealthy,
                Health::Draining => EndpointHealth::Draining,
            },
            transport_labels: BTreeMap::new(),
            workload: String::new(),
            check: None,
            slots: serves.get(x.address.as_str()).cloned().map_or(Slots::None, Slots::Serves),
        });
    }
    LoadAssignment {
        name: name.to_owned(),
        localities: by_locality
            .into_iter()
            .map(|(locality, endpoints)| LocalityEndpoints { locality, priority: 0, weight: 0, endpoints })
            .collect(),
        overprovisioning: 140,
    }
}

fn plain(address: String, port: u16, weight: u32) -> LbEndpoint {
    LbEndpoint {
        address,
        port,
        weight,
        health: EndpointHealth::Healthy,
        transport_labels: BTreeMap::new(),
        workload: String::new(),
        check: None,
        slots: Slots::None,
    }
}

fn group(name: &str, endpoints: Vec<LbEndpoint>) -> LoadAssignment {
    LoadAssignment {
        name: name.to_owned(),
        localities: vec![LocalityEndpoints { endpoints, ..LocalityEndpoints::default() }],
        overprovisioning: 140,
    }
}

fn fixed(ctx: &Ctx<'_>, name: &str, address: &str, port: u16) -> Cluster {
    let a = group(name, vec![plain(address.to_owned(), port, 1)]);
    ctx.base_cluster(name, Discovery::Static(a))
}

/// The way to a peer. Our own gateways have trunks, so they get addresses of these forms (see `mesh_trunk`):
///
/// | address | how |
/// |---|---|
/// | `10.0.0.2` | TCP |
/// | `trunk:east@10.0.0.2` | the trunk, or TCP where UDP does not pass; the certificate must be of `east` |
/// | `trunk:east@10.0.0.2+keep` | the same, kept up while idle, since `east` cannot dial this cluster |
/// | `trunk:east@` | a connection that `east` dialled, since nobody can dial `east` |
///
/// Where neither of two can be dialled, each sends through third members. Whoever can be dialled never does, so a
/// session goes through one at most.
fn peer_cluster(ctx: &Ctx<'_>, out: &mut Generated, name: &str, peer: &PeerCluster) {
    let dialled = peer.gateways.iter().any(|g| g.weight > 0);
    let endpoints = if dialled {
        gateways_of(ctx, peer)
    } else if ctx.world.settings.reachable {
        // Only a trunk has streams in both directions.
        let trunk = ctx.proxy.flotilla && peer.transports.contains(&Transport::Quic);
        trunk.then(|| plain(format!("trunk:{}@", peer.id), EAST_WEST, 1)).into_iter().collect()
    } else {
        let thirds = |live: bool| {
            let peers = ctx.world.config.peers.iter();
            let thirds = peers.filter(|p| p.id != peer.id && (!live || p.lease == LeaseState::Live));
            thirds.flat_map(|p| gateways_of(ctx, p)).collect::<Vec<_>>()
        };
        let live = thirds(true);
        if live.is_empty() { thirds(false) } else { live }
    };
    out.assignment(group(name, endpoints));
    out.cluster(ctx.base_cluster(name, Discovery::Eds(name.to_owned())));
}

/// Gateways of a member that can be dialled.
fn gateways_of(ctx: &Ctx<'_>, member: &PeerCluster) -> Vec<LbEndpoint> {
    let wanted = ctx.world.config.mesh.transport.unwrap_or(ctx.world.settings.transport);
    let quic =
        wanted == Transport::Quic && member.transports.contains(&Transport::Quic) && ctx.proxy.flotilla;
    let keep = if ctx.world.settings.reachable { "" } else { "+keep" };
    let address = |ip: std::net::IpAddr| {
        if quic { format!("trunk:{}@{ip}{keep}", member.id) } else { ip.to_string() }
    };
    let gateways = member.gateways.iter().filter(|g| g.weight > 0);
    gateways.map(|g| plain(address(g.address.ip()), g.address.port(), g.weight)).collect()
}

/// Chains of a `Gateway` server in mode `AUTO_PASSTHROUGH`: services whose server name is one of the
/// server's hosts. As in Istio every service of the cluster qualifies; the choice is the operator's.
pub(super) fn auto_passthrough(ctx: &Ctx<'_>, out: &mut Generated, s: &Served<'_>) -> Vec<FilterChain> {
    let mut chains = Vec::new();
    for e in ctx.visible().iter().filter(|e| e.origin == Origin::Platform) {
        if s.hosts().any(|(_, own)| hosts::covers(own, &e.service.host)) {
            service_chains(ctx, out, e, &mut chains, |port, subset| {
                vec![sni_name(port, subset, &e.service.host)]
            });
        }
    }
    chains
}
