//! Slots: how requests of other clusters spread over the workloads of an exported service.
//!
//! An inner session between clusters ends at one workload, and gateways see sessions, not requests. So an export
//! names slots, callers keep a session to each and balance requests over them, and gateways lead each slot to its
//! workload. A slot's name is a hash of the workload's address: whoever computes it, and after whatever restart,
//! agrees, and a workload that stays keeps its slot while others come and go. A service of more workloads than
//! [`MAX_SLOTS`] has slots that any workload of the same labels and place serves; its exports do not change when one
//! of them is replaced.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use mesh_model::{
    Locality,
    registry::{Health, Labels, TlsMode},
};

use crate::index::Entry;

/// Sessions that a caller keeps to one service in one cluster, about: each costs a handshake across the WAN. Every
/// group of workloads has at least one.
pub(crate) const MAX_SLOTS: usize = 16;
/// Labels that differ between replicas of one workload and that no subset selects on. Left in, they
/// would tell peers about every rollout.
const NOISE: [&str; 4] = [
    "pod-template-hash",
    "controller-revision-hash",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
];

/// What a service looks like from other clusters.
#[derive(Debug, Default)]
pub(crate) struct Shape<'a> {
    /// Healthy weight and slots of workloads that look the same.
    pub(crate) groups: BTreeMap<(Labels, Locality), Group>,
    /// Slots by the address of the workload.
    pub(crate) serves: HashMap<&'a str, Box<[u32]>>,
    /// Workloads that have no proxy and cannot be reached.
    pub(crate) bare: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Group {
    pub(crate) weight: u32,
    pub(crate) slots: Vec<u32>,
}

pub(crate) fn hash(parts: &[&str]) -> u32 {
    // FNV-1a of 64 bits, folded; not for secrets.
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    for b in parts.iter().flat_map(|p| p.bytes().chain([0])) {
        h = (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    }
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    // Both halves: the upper bits of short inputs are alike.
    #[allow(clippy::cast_possible_truncation)]
    {
        (h >> 32) as u32 ^ h as u32
    }
}

/// Groups and slots of a service's own workloads.
pub(crate) fn shape(entry: &Entry) -> Shape<'_> {
    let mut out = Shape::default();
    let mut members: BTreeMap<(Labels, Locality), BTreeSet<&str>> = BTreeMap::new();
    // A workload counts once, whatever number of ports it serves.
    let mut seen = BTreeSet::new();
    for e in &entry.endpoints {
        if !seen.insert(&e.address) {
            continue;
        }
        if e.tls != TlsMode::Mutual {
            out.bare += 1;
            continue;
        }
        let mut labels = e.labels.clone();
        labels.retain(|k, _| !NOISE.contains(&k.as_str()));
        let key = (labels, e.locality.clone());
        let group = out.groups.entry(key.clone()).or_default();
        if e.health == Health::Healthy {
            group.weight = group.weight.saturating_add(e.weight);
            members.entry(key).or_default().insert(&e.address);
        }
    }
    let host = entry.service.host.as_str();
    let total: usize = members.values().map(BTreeSet::len).sum();
    for (key, members) in members {
        let share =
            if total <= MAX_SLOTS { members.len() } else { (MAX_SLOTS * members.len() / total).max(1) };
        let mut slots = BTreeSet::new();
        if members.len() <= share {
            for m in members {
                let slot = hash(&[host, m]);
                slots.insert(slot);
                out.serves.insert(m, Box::new([slot]));
            }
        } else {
            let place = key.1.to_string();
            let labels: Vec<&str> = key.0.iter().flat_map(|(k, v)| [k.as_str(), v.as_str()]).collect();
            slots.extend((0..share).map(|n| {
                let n = n.to_string();
                hash(&[[host, &place, &n].as_slice(), &labels].concat())
            }));
            let all: Box<[u32]> = slots.iter().copied().collect();
            out.serves.extend(members.into_iter().map(|m| (m, all.clone())));
        }
        if let Some(g) = out.groups.get_mut(&key) {
            g.slots = slots.into_iter().collect();
        }
    }
    out
}

/// Scale of weights, and the sum of fractions `weight / parts` in whole numbers: a service has local endpoints of
/// whole weights beside the parts of remote ones.
#[derive(Debug)]
pub(crate) struct Scale(u64);

/// Weights are exact up to this scale; beyond it they are rounded by less than a tenth of a percent.
const MAX_SCALE: u64 = 5040;

impl Scale {
    pub(crate) fn new(fractions: impl IntoIterator<Item = (u32, usize)>) -> Self {
        let mut scale = 1u64;
        for (weight, parts) in fractions {
            let parts = parts.max(1) as u64;
            let need = parts / gcd(u64::from(weight), parts);
            scale = scale / gcd(scale, need) * need;
            if scale > MAX_SCALE {
                return Self(MAX_SCALE);
            }
        }
        Self(scale)
    }

    /// `weight / parts` in this scale; at least 1.
    pub(crate) fn of(&self, weight: u32, parts: usize) -> u32 {
        let parts = parts.max(1) as u64;
        let scaled = (u64::from(weight).saturating_mul(self.0) + parts / 2) / parts;
        u32::try_from(scaled).unwrap_or(u32::MAX).max(1)
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_exact_where_they_can_be() {
        let s = Scale::new([(3, 3), (2, 2)]);
        assert_eq!((s.of(1, 1), s.of(3, 3)), (1, 1));
        let s = Scale::new([(5, 2), (7, 3)]);
        assert_eq!((s.of(1, 1), s.of(5, 2), s.of(7, 3)), (6, 15, 14));
        let s = Scale::new([(1, 97), (1, 89)]);
        assert!((f64::from(s.of(1, 97)) - f64::from(s.of(1, 1)) / 97.0).abs() < 1.0);
        assert_eq!(Scale::new([]).of(4, 1), 4);
        assert_eq!(Scale::new([(0, 4)]).of(0, 4), 1);
    }
}
