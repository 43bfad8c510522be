//! TCP and TLS routes of a service: filter chains from a `VirtualService`, else one to the service.

use std::time::Duration;

use ipnet::IpNet;
use mesh_model::{
    authored::{DestinationRule, RouteDestination, VirtualService},
    proxy::{FilterChain, FilterChainMatch, NetworkFilter, TransportProtocol, Tunneling, WeightedCluster},
    registry::Resolution,
};

use super::{
    Ctx, clusters,
    common::{chain, cluster_name},
    http::{self, Scope},
};
use crate::{config::Doc, index::Entry, world::effective_policy};

/// Weighted destinations as a TCP filter; `None` without a destination.
pub(super) fn filter(
    ctx: &Ctx<'_>,
    namespace: &str,
    port: u16,
    routes: &[RouteDestination],
    stat_prefix: &str,
) -> Option<NetworkFilter> {
    let single = routes.len() == 1;
    let all_zero = routes.iter().all(|r| r.weight <= 0);
    let first = routes.iter().find_map(|r| r.destination.as_ref());
    let clusters: Vec<WeightedCluster> = routes
        .iter()
        .filter_map(|r| {
            let d = r.destination.as_ref()?;
            let weight = u32::try_from(r.weight).unwrap_or(0);
            if weight == 0 && !single && !all_zero {
                return None;
            }
            let cluster = http::destination(ctx, namespace, d, port).0;
            Some(WeightedCluster { cluster, weight: weight.max(1), ..WeightedCluster::default() })
        })
        .collect();
    let clusters = match clusters.as_slice() {
        [] => return None,
        [one] => vec![WeightedCluster::only(one.cluster.clone())],
        _ => clusters,
    };
    let mut f = ctx.tcp_filter(stat_prefix, clusters);
    // Of several destinations the first one's rule is theirs, as in Istio.
    if let Some(d) = first
        && let (_, Some(entry), port) = http::destination(ctx, namespace, d, port)
    {
        // Weights may lead to several subsets; then what is said of all of the service counts.
        settle(ctx, entry, port, if routes.len() == 1 { &d.subset } else { "" }, &mut f);
    }
    Some(f)
}

/// A filter to the service itself.
fn to_service(ctx: &Ctx<'_>, entry: &Entry, port: u16, cluster: &str) -> NetworkFilter {
    let mut f = ctx.tcp_to(cluster);
    settle(ctx, entry, port, "", &mut f);
    f
}

/// Gives connections the times and the tunnel of the service's rule.
fn settle(ctx: &Ctx<'_>, entry: &Entry, port: u16, subset: &str, filter: &mut NetworkFilter) {
    let NetworkFilter::Tcp(t) = filter else { return };
    if entry.service.resolution == Resolution::ByName {
        t.names = Some((clusters::name_cache(), port));
    }
    let rule = ctx.world.destination_rule(ctx.proxy, entry);
    t.tunnel = rule.as_ref().and_then(|r| tunnel(r, subset));
    let said = effective_policy(rule.as_deref(), None, port);
    let policy = ctx.world.defaulted(&said);
    let Some(tcp) = policy.connection_pool.as_ref().and_then(|p| p.tcp.as_ref()) else { return };
    if let Some(idle) = tcp.idle_timeout {
        // Zero is no limit.
        t.idle_timeout = Some(Duration::from(idle)).filter(|d| !d.is_zero());
    }
    t.max_duration = tcp.max_connection_duration.map(Duration::from);
}

/// How connections to a proxy are led on, which the rule says of all of it or of a subset; a subset inherits nothing.
fn tunnel(rule: &DestinationRule, subset: &str) -> Option<Tunneling> {
    let policy = match subset {
        "" => rule.traffic_policy.as_ref(),
        name => rule.subsets.iter().find(|s| s.name == name)?.traffic_policy.as_ref(),
    };
    let t = policy?.tunnel.as_ref()?;
    let hostname = match t.target_host.parse::<std::net::Ipv6Addr>() {
        Ok(ip) => format!("[{ip}]:{}", t.target_port),
        Err(_) => format!("{}:{}", t.target_host, t.target_port),
    };
    Some(Tunneling { hostname, headers: vec![], post: t.protocol == "POST" })
}

/// Address prefixes of a match; what cannot be parsed never matches and is left out.
pub(super) fn prefixes(list: &[String]) -> Vec<IpNet> {
    list.iter()
        .filter_map(|s| {
            s.parse::<IpNet>().ok().or_else(|| s.parse::<std::net::IpAddr>().ok().map(IpNet::from))
        })
        .collect()
}

fn document<'a>(ctx: &Ctx<'a>, entry: &Entry) -> Option<&'a Doc<VirtualService>> {
    ctx.routes_of(entry)
}

/// Chains of a TCP port, most specific first; the last one matches everything.
pub(super) fn tcp_chains(ctx: &Ctx<'_>, entry: &Entry, port: u16) -> Vec<FilterChain> {
    let cluster = cluster_name(port, "", &entry.service.host);
    let mut chains: Vec<FilterChain> = Vec::new();
    if let Some(doc) = document(ctx, entry) {
        for r in &doc.spec.tcp {
            let Some(f) = filter(ctx, &doc.namespace, port, &r.route, &cluster) else { continue };
            if r.matches.is_empty() {
                push(&mut chains, chain(cluster.clone(), FilterChainMatch::default(), vec![f]));
                return chains;
            }
            for m in &r.matches {
                let here = (m.port == 0 || m.port == u32::from(port))
                    && Scope::Mesh.source_matches(
                        ctx,
                        &doc.namespace,
                        &m.gateways,
                        &m.source_labels,
                        &m.source_namespace,
                    );
                if !here {
                    continue;
                }
                let matches = FilterChainMatch {
                    destination_prefixes: prefixes(&m.destination_subnets),
                    source_prefixes: prefixes(std::slice::from_ref(&m.source_subnet)),
                    ..FilterChainMatch::default()
                };
                let all = matches == FilterChainMatch::default();
                push(&mut chains, chain(cluster.clone(), matches, vec![f.clone()]));
                if all {
                    return chains;
                }
            }
        }
    }
    let own = to_service(ctx, entry, port, &cluster);
    push(&mut chains, chain(cluster, FilterChainMatch::default(), vec![own]));
    chains
}

/// Chains of a TLS port by server name, from the document, then the service's own host.
pub(super) fn tls_chains(ctx: &Ctx<'_>, entry: &Entry, port: u16) -> Vec<FilterChain> {
    let cluster = cluster_name(port, "", &entry.service.host);
    let mut chains = Vec::new();
    let sni = |names: &[String]| FilterChainMatch {
        server_names: names.iter().map(|n| n.to_ascii_lowercase()).collect(),
        transport_protocol: Some(TransportProtocol::Tls),
        ..FilterChainMatch::default()
    };
    if let Some(doc) = document(ctx, entry) {
        for r in &doc.spec.tls {
            let Some(f) = filter(ctx, &doc.namespace, port, &r.route, &cluster) else { continue };
            for m in &r.matches {
                let here = (m.port == 0 || m.port == u32::from(port))
                    && Scope::Mesh.source_matches(
                        ctx,
                        &doc.namespace,
                        &m.gateways,
                        &m.source_labels,
                        &m.source_namespace,
                    );
                if here && !m.sni_hosts.is_empty() {
                    let mut matches = sni(&m.sni_hosts);
                    matches.destination_prefixes = prefixes(&m.destination_subnets);
                    matches.source_prefixes = prefixes(std::slice::from_ref(&m.source_subnet));
                    push(&mut chains, chain(cluster.clone(), matches, vec![f.clone()]));
                }
            }
        }
    }
    let mut names = vec![entry.service.host.clone()];
    names.extend(entry.aliases.iter().cloned());
    let own = to_service(ctx, entry, port, &cluster);
    push(&mut chains, chain(cluster, sni(&names), vec![own]));
    chains
}

/// Adds a chain unless its match, or all of its server names, are taken: a proxy refuses a listener
/// with two chains for the same connection.
pub(super) fn push(chains: &mut Vec<FilterChain>, mut c: FilterChain) {
    let bare = |m: &FilterChainMatch| FilterChainMatch { server_names: vec![], ..m.clone() };
    let mine = bare(&c.matches);
    let had_names = !c.matches.server_names.is_empty();
    for other in chains.iter().filter(|o| bare(&o.matches) == mine) {
        if had_names {
            c.matches.server_names.retain(|n| !other.matches.server_names.contains(n));
        } else if other.matches.server_names.is_empty() {
            return;
        }
    }
    if had_names && c.matches.server_names.is_empty() {
        return;
    }
    chains.push(c);
}
