//! Preference of the own zone (`zoneAwareLbSetting`).
//!
//! The shares are those of Envoy's zone-aware routing, which wants every zone to carry as much as it can: a zone that has
//! at least the share of servers that it has of callers keeps all its traffic, and of one that has less the rest goes
//! where more servers than callers are. Envoy counts callers in a cluster of its own that it has to be told of; here the
//! control plane counts, since it knows both, and proxies of either kind get weights.

use std::collections::BTreeMap;

use mesh_model::{
    authored::{LocalityLbSetting, TrafficPolicy, ZoneAwareLbSetting},
    proxy::{EndpointHealth, LocalityEndpoints},
};

use super::{Ctx, Group, collect, rank};

/// Sum of the shares. The zones without one have a millionth, for when the others are sick.
const WHOLE: u64 = 1_000_000;
/// Envoy's.
const MIN_CLUSTER_SIZE: u32 = 6;

/// What a policy says, else the mesh, if it says something, and whether zones are preferred. A policy that says something
/// of localities says so of zones, too.
pub(in crate::generate) fn setting<'a>(
    ctx: &'a Ctx<'_>,
    policy: &'a TrafficPolicy,
) -> Option<(&'a ZoneAwareLbSetting, bool)> {
    let own = policy.load_balancer.as_ref();
    let mesh = ctx.world.config.mesh.zone_aware_lb_setting.as_ref();
    let mesh = mesh.filter(|_| own.is_none_or(|l| l.locality_lb_setting.is_none()));
    let z = own.and_then(|l| l.zone_aware_lb_setting.as_ref()).or(mesh)?;
    Some((z, z.enabled != Some(false)))
}

/// Priorities by region, and weights by zone in the caller's.
pub(super) fn balance(ctx: &Ctx<'_>, groups: Vec<Group>, z: &ZoneAwareLbSetting) -> Vec<LocalityEndpoints> {
    let here = &ctx.proxy.locality;
    let labels =
        LocalityLbSetting { failover_priority: z.failover_priority.clone(), ..LocalityLbSetting::default() };
    let next = z.failover.iter().find(|f| f.from == here.region).map(|f| f.to.as_str());
    let mut ranked: Vec<(u32, Group)> = groups
        .into_iter()
        .map(|g| {
            let by_labels = if labels.failover_priority.is_empty() { 0 } else { rank(ctx, &g, &labels) };
            let by_region = match g.locality.region.as_str() {
                r if r == here.region => 0,
                r if Some(r) == next => 1,
                _ => 2,
            };
            let rank = by_labels * 3 + by_region;
            // Behind every rank that a live endpoint can have.
            (if g.lapsed { rank.saturating_add(1000) } else { rank }, g)
        })
        .collect();
    ranked.sort_by_key(|(r, _)| *r);
    let first = ranked.first().map_or(0, |(r, _)| *r);
    let near = |r: u32, g: &Group| r == first && g.locality.region == here.region && !here.region.is_empty();
    let mut servers: BTreeMap<String, u64> = BTreeMap::new();
    let mut size = 0;
    for (_, g) in ranked.iter().filter(|(r, g)| near(*r, g)) {
        *servers.entry(g.locality.zone.clone()).or_default() += weight(g);
        size += g.endpoints.iter().filter(|e| e.health == EndpointHealth::Healthy).count();
    }
    let enough = size >= z.min_cluster_size.unwrap_or(MIN_CLUSTER_SIZE) as usize && servers.len() > 1;
    let callers = ctx.proxy.situation.neighbours.as_deref().filter(|_| enough);
    let shares = callers.map_or_else(BTreeMap::new, |c| shares(c, &servers, &here.zone));
    // Priorities must not have gaps.
    let (mut priority, mut last) = (0, first);
    let placed = ranked.into_iter().map(|(r, g)| {
        if r != last {
            priority += 1;
            last = r;
        }
        let share = Some(&shares).filter(|_| near(r, &g)).and_then(|s| s.get(&g.locality.zone));
        let of_group = match (share, servers.get(&g.locality.zone)) {
            (Some(share), Some(zone)) => share * weight(&g) / (*zone).max(1),
            _ => weight(&g),
        };
        (priority, u32::try_from(of_group).unwrap_or(u32::MAX).max(1), g)
    });
    collect(placed.collect::<Vec<_>>())
}

fn weight(g: &Group) -> u64 {
    let healthy = g.endpoints.iter().filter(|e| e.health == EndpointHealth::Healthy);
    healthy.map(|e| u64::from(e.weight)).sum()
}

/// Shares of a caller's traffic by zone; none if nobody knows where callers are.
fn shares(
    callers: &BTreeMap<String, u64>,
    servers: &BTreeMap<String, u64>,
    here: &str,
) -> BTreeMap<String, u64> {
    let part = |of: &BTreeMap<String, u64>, zone: &str| {
        let all: u64 = of.values().sum();
        (of.get(zone).copied().unwrap_or(0) * WHOLE).checked_div(all).unwrap_or(0)
    };
    let (calling, serving) = (part(callers, here), part(servers, here));
    if calling == 0 {
        return BTreeMap::new();
    }
    let stays = (serving * WHOLE / calling).min(WHOLE);
    let spare = |zone: &String| part(servers, zone).saturating_sub(part(callers, zone));
    let others = || servers.keys().filter(|z| *z != here);
    let total: u64 = others().map(spare).sum();
    let mut out: BTreeMap<String, u64> = others()
        .map(|z| {
            let leaves = WHOLE - stays;
            // Where no zone has anything to spare, all of them have to.
            let share = (leaves * spare(z)).checked_div(total);
            (z.clone(), share.unwrap_or_else(|| leaves * part(servers, z) / (WHOLE - serving).max(1)))
        })
        .collect();
    if servers.contains_key(here) {
        out.insert(here.to_owned(), stays);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zones(list: &[(&str, u64)]) -> BTreeMap<String, u64> {
        list.iter().map(|(z, n)| ((*z).to_owned(), *n)).collect()
    }

    #[test]
    fn a_zone_keeps_what_it_can_serve() {
        let even = zones(&[("a", 2), ("b", 2)]);
        assert_eq!(shares(&even, &even, "a"), zones(&[("a", WHOLE), ("b", 0)]));
        // Half of the callers and a quarter of the servers: half of the traffic stays.
        let servers = zones(&[("a", 1), ("b", 1), ("c", 2)]);
        let callers = zones(&[("a", 2), ("b", 1), ("c", 1)]);
        assert_eq!(shares(&callers, &servers, "a"), zones(&[("a", 500_000), ("b", 0), ("c", 500_000)]));
        assert_eq!(shares(&callers, &servers, "c"), zones(&[("a", 0), ("b", 0), ("c", WHOLE)]));
        // No server here: the rest is spread.
        let far = zones(&[("b", 1), ("c", 3)]);
        assert_eq!(shares(&zones(&[("a", 1)]), &far, "a"), zones(&[("b", 250_000), ("c", 750_000)]));
        assert_eq!(shares(&zones(&[]), &servers, "a"), zones(&[]));
    }
}
