//! Every service that proxies may call, from all registries merged.
//!
//! Sources: `Service` and `WorkloadEntry` documents (the file registry), Consul, `ServiceEntry` documents,
//! and what peers export. A service of the same name and namespace is the same service in every
//! cluster (MCS "namespace sameness"): an import adds remote endpoints to the local one, or makes
//! one of its own. Imports and exports are also reachable as `svc.ns.svc.clusterset.local` and
//! `svc.ns.global`, and per member as `svc.ns.svc.<member>.clusterset.local`.

mod build;
mod consul;
mod made;
mod slices;
mod vips;

use ipnet::IpNet;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

pub(crate) use build::{HEALTH, TLS_MODE, workload_labels};
pub use build::{build, build_after};
pub(crate) use consul::not_exported;
use mesh_model::{
    ClusterId,
    federation::ImportedService,
    registry::{Endpoint, Labels, Resolution, Service, ServicePort},
};

/// Where a service comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// The platform's registry.
    Platform,
    /// A `ServiceEntry`.
    Entry,
    /// Consul; a `ServiceEntry` of the same host may have been added to it.
    Consul,
    /// Only peers have it.
    Imported,
    /// The part of a service that one member runs.
    Member,
}

/// A service with everything that generators need of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The service. `addresses` is never empty unless it is headless, or has ranges of them.
    pub service: Service,
    /// Ranges of addresses that a `ServiceEntry` says are the service's, apart from single ones.
    pub ranges: Vec<IpNet>,
    /// Where it comes from.
    pub origin: Origin,
    /// Other hosts that mean the same service.
    pub aliases: Vec<String>,
    /// Its addresses were assigned by the mesh, not by a registry: without the mesh's DNS callers
    /// connect to something else.
    pub assigned_vip: bool,
    /// Ports of UDP, apart from the service's others: the same number may be a port of TCP.
    pub udp_ports: Vec<ServicePort>,
    /// Endpoints in this cluster, of ports of both kinds.
    pub endpoints: Vec<Endpoint>,
    /// What peers run of it.
    pub imports: Vec<Arc<ImportedService>>,
    /// SPIFFE IDs of its workloads in all clusters.
    pub identities: BTreeSet<String>,
    /// SANs that a `ServiceEntry` wants verified.
    pub subject_alt_names: Vec<String>,
    /// Peers may call it here.
    pub exported: bool,
    /// Workloads have names before they are ready (`publishNotReadyAddresses`).
    pub names_of_unready: bool,
}

impl Entry {
    /// Whether listeners, routes and names are the same for both, whatever endpoints they have: those count where they are
    /// addresses that callers connect to.
    #[must_use]
    pub fn same_shape(&self, other: &Self) -> bool {
        let addressed = |e: &Self| {
            e.service.headless || matches!(e.service.resolution, Resolution::Dns | Resolution::ByName)
        };
        self.service == other.service
            && self.ranges == other.ranges
            && self.origin == other.origin
            && self.aliases == other.aliases
            && self.assigned_vip == other.assigned_vip
            && self.udp_ports == other.udp_ports
            && self.exported == other.exported
            && self.names_of_unready == other.names_of_unready
            && (!addressed(self) || self.endpoints == other.endpoints)
    }

    /// The port with this number.
    #[must_use]
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.service.ports.iter().find(|p| p.port == number)
    }

    /// The port of UDP with this number.
    #[must_use]
    pub fn udp_port(&self, number: u16) -> Option<&ServicePort> {
        self.udp_ports.iter().find(|p| p.port == number)
    }

    /// Endpoints of a port that carry all of `labels`.
    pub fn endpoints_of<'a>(
        &'a self,
        port: &'a ServicePort,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Endpoint> {
        self.endpoints
            .iter()
            .filter(move |e| e.service_port == port.name && crate::config::selects(labels, &e.labels))
    }
}

/// All services of a cluster's view of the mesh.
#[derive(Debug, Clone, Default)]
pub struct Index {
    /// By host.
    pub services: BTreeMap<String, Arc<Entry>>,
    /// Aliases to hosts.
    pub aliases: HashMap<String, String>,
    /// Workload address to the `(host, position of the endpoint)` that it serves.
    pub by_address: HashMap<IpAddr, Vec<(Arc<str>, usize)>>,
    /// This cluster's own east-west gateways.
    pub east_west: Vec<SocketAddr>,
    kept: made::Kept,
}

impl Index {
    /// Whether there is a service whose hosts are found by the name that a request asks for.
    #[must_use]
    pub fn resolves_by_name(&self) -> bool {
        // Such hosts are wildcards, and those sort before all names.
        let wildcards = self.services.iter().take_while(|(host, _)| host.starts_with('*'));
        wildcards.map(|(_, e)| e).any(|e| e.service.resolution == Resolution::ByName)
    }

    /// The service behind a host or alias.
    #[must_use]
    pub fn get(&self, host: &str) -> Option<&Arc<Entry>> {
        self.services.get(host).or_else(|| self.services.get(self.aliases.get(host)?))
    }

    /// The host that `host` is an alias of, or itself.
    #[must_use]
    pub fn canonical<'a>(&'a self, host: &'a str) -> &'a str {
        self.aliases.get(host).map_or(host, String::as_str)
    }

    /// Endpoints that live at one of `addresses`, with their service.
    #[must_use]
    pub fn instances(&self, addresses: &[IpAddr]) -> Vec<(&Arc<Entry>, &Endpoint)> {
        let mut out = Vec::new();
        for a in addresses {
            for (host, i) in self.by_address.get(a).into_iter().flatten() {
                if let Some(entry) = self.services.get(&**host)
                    && let Some(endpoint) = entry.endpoints.get(*i)
                {
                    out.push((entry, endpoint));
                }
            }
        }
        out
    }
}

/// Hosts of services of the platform that were made for the second of two indices, and not for the first.
#[cfg(test)]
pub(crate) fn made_again(before: &Index, after: &Index) -> Vec<String> {
    let was = |host: &String| before.kept.made.get(host);
    let fresh = after.kept.made.iter().filter(|(h, m)| was(h).is_none_or(|w| !Arc::ptr_eq(w, m)));
    fresh.map(|(host, _)| host.clone()).collect()
}

/// What an index is built for.
#[derive(Debug, Clone, PartialEq)]
pub struct Local {
    /// This cluster.
    pub cluster: ClusterId,
    /// Its trust domain.
    pub trust_domain: mesh_model::TrustDomain,
    /// East-west gateways from settings; empty means those the registry knows.
    pub east_west: Vec<SocketAddr>,
}

#[cfg(test)]
mod tests;
