//! Exports of one service that contradict each other.
//!
//! As the MCS API says: the oldest export defines ports and headlessness for all, of two of the same second the one
//! whose cluster is first by name. A port that only one of them has contradicts nobody.

use std::collections::BTreeMap;

use mesh_model::{
    ClusterId,
    federation::{Conflict, ConflictReason},
    registry::ServicePort,
};
use mesh_xds::mcp::Document;

use crate::{
    index::{Entry, Origin},
    world::World,
};

/// One cluster's definition of a service.
#[derive(Debug, Clone)]
struct Definition<'a> {
    created: u64,
    cluster: &'a ClusterId,
    ports: Vec<&'a ServicePort>,
    headless: bool,
}

/// Records of exports that lose against an older one, by document name. What no ImportPolicy lets in takes no part.
#[must_use]
pub fn conflicts(world: &World) -> BTreeMap<String, Document> {
    let created: BTreeMap<(&str, &str), u64> = world
        .config
        .service_exports
        .iter()
        .map(|e| ((e.namespace.as_str(), e.name.as_str()), e.created))
        .collect();
    let mut out = BTreeMap::new();
    for entry in world.index.services.values().filter(|e| e.origin != Origin::Member) {
        let s = &entry.service;
        let own = created.get(&(s.namespace.as_str(), s.name.as_str())).filter(|_| entry.exported);
        for c in of(entry, own.map(|created| (&world.settings.cluster, *created))) {
            let name = format!("{}/{}.{}", c.namespace, c.name, c.loser);
            if let Ok(d) = Document::new(&name, &c) {
                out.insert(name, d);
            }
        }
    }
    out
}

/// Conflicts of a service's exports: the peers' and, if there is one, this cluster's own.
fn of(entry: &Entry, own: Option<(&ClusterId, u64)>) -> Vec<Conflict> {
    if entry.imports.len() + usize::from(own.is_some()) < 2 {
        return vec![];
    }
    let mut all: Vec<Definition<'_>> = entry
        .imports
        .iter()
        .map(|i| Definition {
            created: i.service.exported_at,
            cluster: &i.cluster,
            ports: i.service.ports.iter().collect(),
            headless: i.service.headless,
        })
        .collect();
    all.extend(own.map(|(cluster, created)| Definition {
        created,
        cluster,
        ports: entry.service.ports.iter().chain(&entry.udp_ports).collect(),
        headless: entry.service.headless,
    }));
    all.sort_by_key(|d| (d.created, d.cluster));
    let Some((winner, others)) = all.split_first() else { return vec![] };
    others
        .iter()
        .filter_map(|loser| {
            let (reason, message) = contradiction(winner, loser)?;
            Some(Conflict {
                namespace: entry.service.namespace.clone(),
                name: entry.service.name.clone(),
                loser: loser.cluster.clone(),
                winner: winner.cluster.clone(),
                reason,
                message,
            })
        })
        .collect()
}

/// The first property in which a definition contradicts the older one.
fn contradiction(winner: &Definition<'_>, loser: &Definition<'_>) -> Option<(ConflictReason, String)> {
    if winner.headless != loser.headless {
        let is = |headless| if headless { "headless" } else { "not headless" };
        let message = format!(
            "it is {} here and {} in {}, whose export is older",
            is(loser.headless),
            is(winner.headless),
            winner.cluster
        );
        return Some((ConflictReason::Type, message));
    }
    loser.ports.iter().find_map(|p| {
        let other = winner.ports.iter().find(|w| (w.is_same(p) || w.name == p.name) && !same(w, p))?;
        let message = format!(
            "port {} here is {}, in {}, whose export is older, it is {}",
            p.name,
            shown(p),
            winner.cluster,
            shown(other)
        );
        Some((ConflictReason::Port, message))
    })
}

/// The same number under another name is the same port to callers.
fn same(a: &ServicePort, b: &ServicePort) -> bool {
    a.port == b.port && a.protocol == b.protocol
}

fn shown(p: &ServicePort) -> String {
    format!("{} ({:?})", p.port, p.protocol).to_lowercase()
}
