//! Rules of preferences by locality.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::authored::{LocalityFailover, LocalityLbSetting, ZoneAwareLbSetting};

use crate::{path::Path, validate::common::Findings};

/// Labels that say where a workload is.
const TOPOLOGY: [&str; 3] =
    ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"];

pub(in crate::validate) fn check(l: &LocalityLbSetting, p: &Path<'_>, out: &mut Findings) {
    if !l.distribute.is_empty() && !l.failover.is_empty() {
        out.error(p, "only one of distribute and failover is allowed");
    }
    let topology = l.failover_priority.iter().position(|s| TOPOLOGY.contains(&s.as_str()));
    if let Some(i) = topology.filter(|_| !l.failover.is_empty()) {
        out.error(
            &p.key("failoverPriority").index(i),
            "failover decides about regions: a label of the topology cannot be here as well",
        );
    }
    let distribute = p.key("distribute");
    let mut origins = Localities::default();
    for (i, d) in l.distribute.iter().enumerate() {
        let at = distribute.index(i);
        origins.add(&d.from, &at.key("from"), out);
        let to = at.key("to");
        let sum: u64 = d.to.values().map(|w| u64::from(*w)).sum();
        if let Some((name, w)) = d.to.iter().find(|(_, w)| **w == 0 || **w > 100) {
            out.error(&to.key(name), format!("weight {w} is outside of 1..100"));
        } else if sum != 100 {
            out.error(&to, format!("the weights add up to {sum}, not 100"));
        }
        let mut targets = Localities::default();
        for name in d.to.keys() {
            targets.add(name, &to.key(name), out);
        }
    }
    failover(&l.failover, &p.key("failover"), out);
}

pub(in crate::validate) fn check_zone_aware(z: &ZoneAwareLbSetting, p: &Path<'_>, out: &mut Findings) {
    if let Some(i) = z.failover_priority.iter().position(|s| TOPOLOGY.contains(&s.as_str())) {
        out.error(
            &p.key("failoverPriority").index(i),
            "regions and zones are looked after already: a label of the topology cannot be here",
        );
    }
    failover(&z.failover, &p.key("failover"), out);
}

fn failover(list: &[LocalityFailover], p: &Path<'_>, out: &mut Findings) {
    for (i, f) in list.iter().enumerate() {
        let at = p.index(i);
        if f.from == f.to {
            out.error(&at, "two different regions are required");
        }
        if f.from.contains(['/', '*']) || f.to.contains(['/', '*']) {
            out.error(&at, "failover is between regions: no zones, no wildcards");
        }
    }
}

/// Localities that must not overlap.
#[derive(Default)]
struct Localities {
    /// By region; `None` is all of it. Then by zone.
    regions: BTreeMap<String, Option<BTreeMap<String, Option<BTreeSet<String>>>>>,
}

impl Localities {
    fn add(&mut self, locality: &str, p: &Path<'_>, out: &mut Findings) {
        let stars = locality.matches('*').count();
        if stars > 1 || stars == 1 && !locality.ends_with('*') {
            out.error(p, format!("{locality:?}: '*' may only be the last part"));
            return;
        }
        let parts: Vec<&str> = locality.splitn(3, '/').collect();
        if parts.iter().any(|s| s.is_empty()) {
            out.error(p, format!("{locality:?} is not region, region/zone or region/zone/subzone"));
            return;
        }
        if !self.insert(&parts) {
            out.error(p, format!("{locality:?} overlaps with another locality of the list"));
        }
    }

    /// False if it overlaps with one that is there.
    fn insert(&mut self, parts: &[&str]) -> bool {
        if self.regions.contains_key("*") {
            return false;
        }
        let Some((region, rest)) = parts.split_first() else { return true };
        let Some((zone, rest)) = rest.split_first().filter(|(z, _)| **z != "*") else {
            return self.regions.insert((*region).into(), None).is_none();
        };
        let zones = self.regions.entry((*region).into()).or_insert_with(|| Some(BTreeMap::new()));
        let Some(zones) = zones else { return false };
        let Some(subzone) = rest.first().filter(|s| **s != "*") else {
            return zones.insert((*zone).into(), None).is_none();
        };
        match zones.entry((*zone).into()).or_insert_with(|| Some(BTreeSet::new())) {
            Some(subzones) => subzones.insert((*subzone).into()),
            None => false,
        }
    }
}
