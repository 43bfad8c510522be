//! What this cluster offers to its peers: one record per exported service.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::{
    ClusterId,
    authored::{PeerAction, ServiceExport},
    federation::{Audience, EXPORT_TO, EndpointGroup, ExportedService, Offer},
    registry::TlsMode,
};
use mesh_xds::mcp::Document;

use crate::{
    config::{Doc, Problem},
    index::{Origin, not_exported},
    slots,
    world::World,
};

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
            let mut registered = world.config.registered.iter();
            let of_consul = registered.find(|s| s.name == export.name && s.namespace == export.namespace);
            let message = match of_consul {
                Some(s) => format!(
                    "the service of Consul is not exported: {}; export a Service that selects its instances",
                    not_exported(s).unwrap_or("another registry has its host too")
                ),
                None => "no Service of this name; nothing is exported".to_owned(),
            };
            problems.push(Problem { object, message });
            continue;
        };
        let shape = slots::shape(entry);
        if shape.bare > 0 {
            problems.push(Problem {
                object,
                message: format!(
                    "{} of its endpoints have no proxy and cannot be reached by peers",
                    shape.bare
                ),
            });
        }
        let service = ExportedService {
            name: export.name.clone(),
            namespace: export.namespace.clone(),
            host,
            ports: entry.service.ports.iter().chain(&entry.udp_ports).cloned().collect(),
            headless: entry.service.headless,
            groups: shape
                .groups
                .into_iter()
                .map(|((labels, locality), g)| EndpointGroup {
                    labels,
                    locality,
                    healthy_weight: g.weight,
                    slots: g.slots,
                })
                .collect(),
            service_accounts: own_identities(world, entry),
            exported_at: export.created,
        };
        let name = format!("{}/{}", export.namespace, export.name);
        let audience = audience(world, export);
        match Document::new(&name, &Offer { service, audience }) {
            Ok(mut d) => {
                d.created = export.created;
                out.insert(name, d);
            }
            Err(e) => problems.push(Problem { object: name, message: e.to_string() }),
        }
    }
    (out, problems)
}

/// Peers that may know of an export: those that its annotation names and the mesh's policies allow.
#[must_use]
pub fn audience(world: &World, export: &Doc<ServiceExport>) -> Audience {
    let chosen = match export.annotations.get(EXPORT_TO).map(|v| v.split(',').map(str::trim)) {
        None => Audience::All,
        Some(names) if names.clone().any(|n| n == "*") => Audience::All,
        // A name that no cluster can have is of none. Galley refuses it.
        Some(names) => Audience::Only(names.filter_map(|n| ClusterId::new(n).ok()).collect()),
    };
    let rules = || {
        let all = world.config.export_policies.iter().flat_map(|p| &p.spec.rules);
        all.filter(|r| r.namespaces.is_empty() || r.namespaces.contains(&export.namespace))
    };
    // What the first rule says to each cluster that any rule names, and to all the others.
    let others = rules().find(|r| r.peers.is_empty()).is_none_or(|r| r.action == PeerAction::Allow);
    let named: BTreeSet<ClusterId> = rules()
        .flat_map(|r| &r.peers)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .filter(|c| {
            let first = rules().find(|r| r.peers.is_empty() || r.peers.contains(c));
            first.is_none_or(|r| r.action == PeerAction::Allow) != others
        })
        .filter_map(|c| ClusterId::new(c).ok())
        .collect();
    let allowed = match (others, named.is_empty()) {
        (true, true) => Audience::All,
        (true, false) => Audience::Except(named),
        (false, _) => Audience::Only(named),
    };
    chosen.and(allowed)
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
