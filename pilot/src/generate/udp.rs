//! Datagrams that a workload sends to services.
//!
//! Only for our own proxy with `INTERCEPTION_MODE=TPROXY`, since the destination of a datagram is known only where
//! capture left it as it was. One listener takes them all and hands each to the unbound listener of its destination,
//! as for connections; what nobody declared is passed on, or not with `REGISTRY_ONLY`. They travel in clear and stay in
//! the cluster: neither mutual TLS nor the gateways carry datagrams.

use std::net::{IpAddr, SocketAddr};

use mesh_model::{
    authored::TrafficPolicy,
    proxy::{Cluster, Direction, Discovery, LbPolicy, Listener, UdpHash, UdpProxy},
    registry::{Labels, Resolution, ServicePort},
};

use super::{
    Ctx, Generated, clusters,
    common::{BLACK_HOLE, PASSTHROUGH, listener},
    endpoints,
};
use crate::{index::Entry, proxy::Interception, world::effective_policy};

const VIRTUAL_OUTBOUND: &str = "virtualOutboundUdp";

/// Name of the cluster of a UDP port: the number may be one of TCP as well.
pub(super) fn cluster_name(port: u16, host: &str) -> String {
    format!("outbound|{port}/udp||{host}")
}

pub(super) fn shared(ctx: &Ctx<'_>, out: &mut Generated) {
    if !ctx.proxy.flotilla || ctx.proxy.interception != Interception::Tproxy {
        return;
    }
    for entry in &ctx.visible {
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
    let to = if ctx.world.allow_any(ctx.proxy) { PASSTHROUGH } else { BLACK_HOLE };
    let mut l = listener(
        VIRTUAL_OUTBOUND.to_owned(),
        SocketAddr::new(any, mesh_runtime::ports::OUTBOUND),
        Direction::Outbound,
    );
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
        access_log: ctx.access_log(),
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
        Resolution::Passthrough => Discovery::OriginalDst,
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
    clusters::pool(&mut c, policy.connection_pool.as_ref(), port.protocol);
    c.locality_weighted = endpoints::locality_setting(ctx, policy).is_some_and(|s| !s.distribute.is_empty());
    out.cluster(c);
}
