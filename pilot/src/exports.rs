//! What this cluster offers to its peers: one record per exported service.

use std::collections::BTreeMap;

use mesh_model::{
    Locality,
    federation::{EndpointGroup, ExportedService},
    registry::{Health, Labels, TlsMode},
};
use mesh_xds::mcp::Document;

use crate::{config::Problem, index::Origin, world::World};

/// Sessions that a caller keeps to one service at most; more would not spread load better, and each
/// costs a handshake across the WAN.
const MAX_SLOTS: usize = 8;
/// Labels that differ between replicas of one workload and that no subset selects on. Left in, they
/// would tell peers about every rollout.
const NOISE: [&str; 4] = [
    "pod-template-hash",
    "controller-revision-hash",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
];

/// Export records by document name, and exports that cannot be served.
#[must_use]
pub fn exports(world: &World) -> (BTreeMap<String, Document>, Vec<Problem>) {
    let mut out = BTreeMap::new();
    let mut problems = Vec::new();
    for export in &world.config.service_exports {
        let object = format!("ServiceExport {}/{}", export.namespace, export.name);
        let host = crate::hosts::service_host(&export.name, &export.namespace);
        let entry = world.index.services.get(&host).filter(|e| e.origin == Origin::Platform);
        let Some(entry) = entry else {
            let message = "no Service of this name; nothing is exported".to_owned();
            problems.push(Problem { object, message });
            continue;
        };
        let mut groups: BTreeMap<(Labels, Locality), u32> = BTreeMap::new();
        let mut healthy = std::collections::BTreeSet::new();
        let mut bare = 0;
        // A workload counts once, whatever number of ports it serves.
        let mut seen = std::collections::BTreeSet::new();
        for e in &entry.endpoints {
            if !seen.insert(&e.address) {
                continue;
            }
            if e.tls != TlsMode::Mutual {
                bare += 1;
                continue;
            }
            let mut labels = e.labels.clone();
            labels.retain(|k, _| !NOISE.contains(&k.as_str()));
            let weight = groups.entry((labels, e.locality.clone())).or_default();
            if e.health == Health::Healthy {
                *weight = weight.saturating_add(e.weight);
                healthy.insert(&e.address);
            }
        }
        if bare > 0 {
            problems.push(Problem {
                object,
                message: format!("{bare} of its endpoints have no proxy and cannot be reached by peers"),
            });
        }
        let service = ExportedService {
            name: export.name.clone(),
            namespace: export.namespace.clone(),
            host,
            ports: entry.service.ports.clone(),
            headless: entry.service.headless,
            groups: groups
                .into_iter()
                .map(|((labels, locality), healthy_weight)| EndpointGroup {
                    labels,
                    locality,
                    healthy_weight,
                })
                .collect(),
            service_accounts: own_identities(world, entry),
            exported_at: export.created,
            slots: u32::try_from(healthy.len().clamp(1, MAX_SLOTS)).unwrap_or(1),
        };
        let name = format!("{}/{}", export.namespace, export.name);
        match Document::new(&name, &service) {
            Ok(mut d) => {
                d.created = export.created;
                out.insert(name, d);
            }
            Err(e) => problems.push(Problem { object: name, message: e.to_string() }),
        }
    }
    (out, problems)
}

/// Identities of this cluster's own workloads of a service: peers vouch for theirs themselves.
fn own_identities(world: &World, entry: &crate::index::Entry) -> Vec<String> {
    let td = &world.settings.trust_domain;
    let ids: std::collections::BTreeSet<String> = entry
        .endpoints
        .iter()
        .filter(|e| e.tls == TlsMode::Mutual)
        .filter_map(|e| {
            let sa = if e.service_account.is_empty() { "default" } else { &e.service_account };
            mesh_model::SpiffeId::workload(td, &entry.service.namespace, sa).ok()
        })
        .map(|id| id.as_str().to_owned())
        .collect();
    ids.into_iter().collect()
}
