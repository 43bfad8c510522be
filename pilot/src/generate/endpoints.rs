//! Load assignments: local endpoints, and peers' services behind this cluster's own gateways.
//!
//! A remote endpoint is one of this cluster's east-west gateways with the peer's name in its
//! transport labels, which chooses the server name that the gateway routes by, and a slot (see
//! [`crate::slots`]) that stands before it. Weights keep the peers' shares whatever the number of
//! gateways and slots.
//!
//! Without outlier detection, or for a caller without a locality, everything that is live is one
//! priority. Peers whose lease has lapsed come last: used when nothing else is left, unless a service or an
//! ImportPolicy says to keep or to refuse them.

use std::{collections::BTreeMap, net::SocketAddr, sync::LazyLock};

use mesh_model::{
    Locality,
    authored::{LocalityLbSetting, MutualTlsMode, TrafficPolicy},
    federation::{ImportedService, LeaseState, OnLapse},
    proxy::{
        Discovery, EndpointHealth, LbEndpoint, LoadAssignment, LocalityEndpoints, OWN_GATEWAYS, Slots, UNIX,
    },
    registry::{Health, Labels, ServicePort, TlsMode},
};
use mesh_runtime::ports;

use super::{Ctx, Generated, hbone, udp};
use crate::{config::selects, index::Entry, slots::Scale};

pub(super) mod zones;

/// Transport label with the peer whose gateway a remote endpoint stands for.
pub(super) const CLUSTER_LABEL: &str = "flotilla.dev/cluster";
/// Transport label of endpoints that accept mesh mTLS.
pub(super) const TLS_LABEL: &str = "tlsMode";

/// Endpoints that share everything that decides their priority.
struct Group {
    locality: Locality,
    lapsed: bool,
    /// Labels that `failoverPriority` may compare.
    labels: Labels,
    endpoints: Vec<LbEndpoint>,
}

/// How this policy balances by locality, if it does: as its rule says, else as the mesh does. The mesh prefers what is
/// near to the caller unless it says otherwise.
pub(super) fn locality_setting<'a>(
    ctx: &'a Ctx<'_>,
    policy: &'a TrafficPolicy,
) -> Option<&'a LocalityLbSetting> {
    static NEAR: LazyLock<LocalityLbSetting> = LazyLock::new(LocalityLbSetting::default);
    // Failover without outlier detection would have nothing to fail over on.
    policy.outlier_detection.as_ref()?;
    let own = policy.load_balancer.as_ref().and_then(|l| l.locality_lb_setting.as_ref());
    let setting =
        own.or(ctx.world.config.mesh.locality_lb_setting.as_ref()).unwrap_or_else(|| LazyLock::force(&NEAR));
    // Nothing is near to a caller of whom nobody knows where it is; labels may still compare.
    let placed = !ctx.proxy.locality.region.is_empty() || !setting.failover_priority.is_empty();
    (setting.enabled != Some(false) && (placed || own.is_some())).then_some(setting)
}

pub(super) fn assignment(
    ctx: &Ctx<'_>,
    entry: &Entry,
    port: &ServicePort,
    subset: &Labels,
    name: &str,
    policy: &TrafficPolicy,
) -> LoadAssignment {
    let zones = zones::setting(ctx, policy);
    let setting = locality_setting(ctx, policy).filter(|_| zones.is_none());
    let compared = match zones {
        Some((z, true)) => z.failover_priority.as_slice(),
        _ => setting.map_or(&[][..], |s| s.failover_priority.as_slice()),
    };
    let secure = port.is_udp() && udp::is_secure(ctx, entry, policy);
    let groups = groups(ctx, entry, port, subset, compared, secure);
    let localities = match (zones, setting) {
        (Some((z, true)), _) => zones::balance(ctx, groups, z),
        (_, Some(s)) if !s.distribute.is_empty() => distribute(ctx, groups, s),
        (_, setting) => prioritise(ctx, groups, setting),
    };
    LoadAssignment { name: name.to_owned(), localities, overprovisioning: 140 }
}

/// Endpoints that are alike in everything that decides their priority, labels that are `compared` among it. With
/// `secure`, datagrams go to workloads' proxies rather than to workloads, where they have one.
fn groups(
    ctx: &Ctx<'_>,
    entry: &Entry,
    port: &ServicePort,
    subset: &Labels,
    compared: &[String],
    secure: bool,
) -> Vec<Group> {
    let remote = remote(ctx, entry, port, subset);
    let scale = Scale::new(remote.iter().map(|r| (r.weight, r.parts)));
    let own = ctx.world.settings.cluster.as_str();
    let network = ctx.proxy.network.as_ref().unwrap_or(&ctx.world.settings.network);
    let mut groups: BTreeMap<(bool, Locality, String), Group> = BTreeMap::new();
    for e in entry.endpoints_of(port, subset) {
        // Of a network that this proxy cannot reach.
        if e.network.as_ref().is_some_and(|n| n != network) {
            continue;
        }
        if e.address.starts_with(UNIX) && (port.is_udp() || !ctx.proxy.opens_sockets()) {
            continue;
        }
        let mtls = e.tls == TlsMode::Mutual
            && ctx.world.mtls_mode_of(&entry.service.namespace, e) != MutualTlsMode::Disable;
        let mut transport_labels =
            if mtls { BTreeMap::from([(TLS_LABEL.to_owned(), "istio".to_owned())]) } else { BTreeMap::new() };
        if hbone::is_reached(&e.labels) {
            transport_labels.insert(hbone::TUNNEL_LABEL.to_owned(), "http".to_owned());
        }
        let (namespace, name) = e.workload.as_deref().and_then(|w| w.split_once('/')).unwrap_or_default();
        let workload = if name.is_empty() {
            String::new()
        } else {
            let canonical = ["service.istio.io/canonical-name", "app"]
                .iter()
                .find_map(|k| e.labels.get(*k))
                .map_or(name, String::as_str);
            let revision = ["service.istio.io/canonical-revision", "version"]
                .iter()
                .find_map(|k| e.labels.get(*k))
                .map_or("latest", String::as_str);
            format!("{name};{namespace};{canonical};{revision};{own}")
        };
        // A label that says where it is, is not its workload's to choose.
        let own_labels: Labels = compared
            .iter()
            .map(|p| p.split_once('=').map_or(p.as_str(), |(key, _)| key))
            .filter_map(|k| Some((k.to_owned(), e.labels.get(k)?.clone())))
            .collect();
        // No cluster has a slash in its name.
        let alike = own_labels.iter().map(|(k, v)| format!("/{k}={v}")).collect();
        let g = groups.entry((false, e.locality.clone(), alike)).or_insert_with(|| {
            let mut labels = own_labels;
            labels.extend(failover_labels(&e.locality, own, network.as_str()));
            Group { locality: e.locality.clone(), lapsed: false, labels, endpoints: vec![] }
        });
        g.endpoints.push(LbEndpoint {
            address: e.address.clone(),
            port: if mtls && secure { ports::INBOUND } else { e.port },
            weight: scale.of(e.weight, 1),
            health: match e.health {
                Health::Healthy => EndpointHealth::Healthy,
                Health::Unhealthy => EndpointHealth::Unhealthy,
                Health::Draining => EndpointHealth::Draining,
            },
            transport_labels,
            workload,
            check: None,
            slots: Slots::None,
        });
    }
    for r in remote {
        let (i, locality) = (r.import, r.locality);
        let key = (r.lapsed, locality.clone(), i.cluster.to_string());
        let g = groups.entry(key).or_insert_with(|| Group {
            locality: locality.clone(),
            lapsed: r.lapsed,
            labels: failover_labels(locality, i.cluster.as_str(), r.network),
            endpoints: vec![],
        });
        g.endpoints.push(LbEndpoint {
            address: r.gateway.ip().to_string(),
            port: if port.is_udp() { ports::EAST_WEST_UDP } else { r.gateway.port() },
            weight: scale.of(r.weight, r.parts),
            health: if r.draining { EndpointHealth::Draining } else { EndpointHealth::Healthy },
            transport_labels: BTreeMap::from([
                (CLUSTER_LABEL.to_owned(), i.cluster.to_string()),
                (TLS_LABEL.to_owned(), "istio".to_owned()),
            ]),
            workload: format!("{};{};{};;{}", i.service.name, i.service.namespace, i.service.name, i.cluster),
            check: None,
            slots: r.slot.map_or(Slots::None, Slots::Asks),
        });
    }
    groups.into_values().filter(|g| !g.endpoints.is_empty()).collect()
}

/// A slot of a peer's service behind one of this cluster's gateways.
struct Remote<'a> {
    import: &'a ImportedService,
    lapsed: bool,
    network: &'a str,
    locality: &'a Locality,
    gateway: SocketAddr,
    draining: bool,
    slot: Option<u32>,
    /// It has this weight divided by `parts`.
    weight: u32,
    parts: usize,
}

fn remote<'a>(ctx: &'a Ctx<'_>, entry: &'a Entry, port: &ServicePort, subset: &Labels) -> Vec<Remote<'a>> {
    let gateways = ctx.world.gateways();
    let staying: Vec<SocketAddr> = gateways.iter().filter(|g| !g.1).map(|g| g.0).collect();
    let mut out = Vec::new();
    for i in entry.imports.iter().filter(|_| !gateways.is_empty()) {
        // The peer may not have this port; the oldest export defined ours.
        if !i.service.ports.iter().any(|p| p.is_same(port)) {
            continue;
        }
        let peer = ctx.world.config.peers.iter().find(|p| p.id == i.cluster);
        let lapsed = i.lease == LeaseState::Lapsed || peer.is_some_and(|p| p.lease == LeaseState::Lapsed);
        let lapsed = match i.on_lapse {
            OnLapse::Keep => false,
            OnLapse::Demote => lapsed,
            OnLapse::Refuse if lapsed => continue,
            OnLapse::Refuse => false,
        };
        // A peer without a healthy endpoint would only answer that it has none.
        let groups = i.service.groups.iter().filter(|g| g.healthy_weight > 0 && selects(subset, &g.labels));
        // Envoy has one server name for all endpoints of a peer, and takes an address once.
        let (slotted, whole): (Vec<_>, Vec<_>) =
            groups.partition(|g| ctx.proxy.flotilla && !g.slots.is_empty());
        let mut by_locality: BTreeMap<&Locality, u32> = BTreeMap::new();
        for g in whole {
            let w = by_locality.entry(&g.locality).or_default();
            *w = w.saturating_add(g.healthy_weight);
        }
        let slotted = slotted.into_iter().map(|g| {
            let slots: Vec<_> = g.slots.iter().copied().map(Some).collect();
            (&g.locality, g.healthy_weight, slots)
        });
        let parts = by_locality.into_iter().map(|(locality, weight)| (locality, weight, vec![None]));
        let mut turn = 0;
        for (locality, weight, slots) in slotted.chain(parts) {
            // Each gateway has a part in each group; a slot is behind more than one only if gateways are more than slots.
            let paths = gateways.len().div_ceil(slots.len());
            for slot in &slots {
                let of = |gateway, draining, paths| Remote {
                    import: i,
                    lapsed,
                    network: peer.map_or("", |p| p.network.as_str()),
                    locality,
                    gateway,
                    draining,
                    slot: *slot,
                    weight,
                    parts: slots.len() * paths,
                };
                // What is behind a gateway that drains moves to the others in turn, and nothing else moves.
                let mut through: Vec<SocketAddr> = Vec::with_capacity(paths);
                for _ in 0..paths {
                    let (mut gateway, draining) = gateways[turn % gateways.len()];
                    if draining {
                        // Who knows slots keeps what runs; to others the endpoint is gone, and Envoy then lets what
                        // runs finish as well, where it would count one that drains as sick.
                        if ctx.proxy.flotilla {
                            out.push(of(gateway, true, paths));
                        }
                        gateway = staying[turn / gateways.len() % staying.len()];
                    }
                    if !through.contains(&gateway) {
                        through.push(gateway);
                    }
                    turn += 1;
                }
                out.extend(through.iter().map(|g| of(*g, false, through.len())));
            }
        }
    }
    out
}

/// This cluster's own gateways, for proxies that tell inbound sessions to leave one that drains.
pub(super) fn own_gateways(ctx: &Ctx<'_>, out: &mut Generated) {
    let gateways = ctx.world.gateways();
    if gateways.is_empty() || !ctx.proxy.flotilla {
        return;
    }
    let endpoints = gateways.into_iter().map(|(g, draining)| LbEndpoint {
        address: g.ip().to_string(),
        port: g.port(),
        weight: 1,
        health: if draining { EndpointHealth::Draining } else { EndpointHealth::Healthy },
        transport_labels: BTreeMap::new(),
        workload: String::new(),
        check: None,
        slots: Slots::None,
    });
    let all = LocalityEndpoints { endpoints: endpoints.collect(), ..LocalityEndpoints::default() };
    let name = OWN_GATEWAYS.to_owned();
    out.assignment(LoadAssignment { name: name.clone(), localities: vec![all], overprovisioning: 140 });
    out.cluster(ctx.base_cluster(OWN_GATEWAYS, Discovery::Eds(name)));
}

fn failover_labels(l: &Locality, cluster: &str, network: &str) -> Labels {
    [
        ("topology.kubernetes.io/region", l.region.as_str()),
        ("topology.kubernetes.io/zone", l.zone.as_str()),
        ("topology.istio.io/subzone", l.sub_zone.as_str()),
        ("topology.istio.io/cluster", cluster),
        ("topology.istio.io/network", network),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .collect()
}

/// Puts groups of one priority and locality together, as clients expect localities to be unique.
fn collect(groups: impl IntoIterator<Item = (u32, u32, Group)>) -> Vec<LocalityEndpoints> {
    let mut out: BTreeMap<(u32, Locality), LocalityEndpoints> = BTreeMap::new();
    for (priority, weight, g) in groups {
        let slot = out.entry((priority, g.locality.clone())).or_insert_with(|| LocalityEndpoints {
            locality: g.locality.clone(),
            priority,
            weight: 0,
            endpoints: vec![],
        });
        slot.weight = slot.weight.saturating_add(weight);
        slot.endpoints.extend(g.endpoints);
    }
    out.into_values().collect()
}

fn prioritise(
    ctx: &Ctx<'_>,
    groups: Vec<Group>,
    setting: Option<&LocalityLbSetting>,
) -> Vec<LocalityEndpoints> {
    let mut ranked: Vec<(u32, Group)> = groups
        .into_iter()
        .map(|g| {
            let rank = setting.map_or(0, |s| rank(ctx, &g, s));
            // Behind every rank that a live endpoint can have.
            (if g.lapsed { rank.saturating_add(1000) } else { rank }, g)
        })
        .collect();
    ranked.sort_by_key(|(r, _)| *r);
    // Priorities must not have gaps.
    let mut priority = 0;
    let mut last = ranked.first().map_or(0, |(r, _)| *r);
    let compact = ranked.into_iter().map(|(r, g)| {
        if r != last {
            priority += 1;
            last = r;
        }
        (priority, 0, g)
    });
    collect(compact.collect::<Vec<_>>())
}

/// 0 is the caller's own place.
fn rank(ctx: &Ctx<'_>, g: &Group, s: &LocalityLbSetting) -> u32 {
    let here = &ctx.proxy.locality;
    if !s.failover_priority.is_empty() {
        let own = failover_labels(
            here,
            ctx.world.settings.cluster.as_str(),
            ctx.proxy.network.as_ref().unwrap_or(&ctx.world.settings.network).as_str(),
        );
        let total = s.failover_priority.len();
        let matched = s
            .failover_priority
            .iter()
            .take_while(|p| {
                let (key, wanted) = match p.split_once('=') {
                    Some((k, v)) => (k, Some(v)),
                    None => (
                        p.as_str(),
                        own.get(p.as_str()).or(ctx.proxy.labels.get(p.as_str())).map(String::as_str),
                    ),
                };
                wanted.is_some() && g.labels.get(key).map(String::as_str) == wanted
            })
            .count();
        return u32::try_from(total - matched).unwrap_or(u32::MAX / 2);
    }
    let there = &g.locality;
    if here.region != there.region {
        let preferred = s.failover.iter().any(|f| f.from == here.region && f.to == there.region);
        let ruled = s.failover.iter().any(|f| f.from == here.region);
        return if ruled && !preferred { 4 } else { 3 };
    }
    if here.zone != there.zone {
        2
    } else if here.sub_zone != there.sub_zone {
        1
    } else {
        0
    }
}

/// Fixed shares by the caller's locality; localities without one get nothing.
fn distribute(ctx: &Ctx<'_>, groups: Vec<Group>, s: &LocalityLbSetting) -> Vec<LocalityEndpoints> {
    let here = ctx.proxy.locality.to_string();
    let Some(rule) = s.distribute.iter().find(|d| locality_matches(&d.from, &here)) else {
        return prioritise(ctx, groups, None);
    };
    let mut out = Vec::new();
    let (live, lapsed): (Vec<Group>, Vec<Group>) = groups.into_iter().partition(|g| !g.lapsed);
    let mut shares: BTreeMap<&str, Vec<Group>> = BTreeMap::new();
    for g in live {
        let there = g.locality.to_string();
        // The most specific pattern.
        let to = rule.to.keys().filter(|p| locality_matches(p, &there)).max_by_key(|p| p.len());
        if let Some(to) = to {
            shares.entry(to).or_default().push(g);
        }
    }
    for (to, groups) in shares {
        let share = rule.to.get(to).copied().unwrap_or_default();
        let takes = |e: &&LbEndpoint| e.health != EndpointHealth::Draining;
        let weight = |g: &Group| g.endpoints.iter().filter(takes).map(|e| u64::from(e.weight)).sum::<u64>();
        let total: u64 = groups.iter().map(weight).sum::<u64>().max(1);
        for g in groups {
            // Scaled so that small parts of a share do not vanish.
            let part = u64::from(share) * 1000 * weight(&g) / total;
            out.push((0, u32::try_from(part).unwrap_or(u32::MAX).max(1), g));
        }
    }
    let last = u32::from(!out.is_empty());
    out.extend(lapsed.into_iter().map(|g| (last, 1, g)));
    collect(out)
}

/// `region/zone/*` and the like.
fn locality_matches(pattern: &str, locality: &str) -> bool {
    let mut there = locality.split('/');
    for part in pattern.split('/') {
        if part == "*" {
            return true;
        }
        if there.next().unwrap_or_default() != part {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locality_patterns() {
        for (p, l, yes) in [
            ("*", "", true),
            ("r", "r/z", true),
            ("r/*", "r/z/s", true),
            ("r/z", "r/y", false),
            ("r/z/s", "r/z/s", true),
        ] {
            assert_eq!(locality_matches(p, l), yes, "{p} {l}");
        }
    }
}
