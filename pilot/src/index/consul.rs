//! Services of Consul in the index.
//!
//! What several registries call by one host is one service: the first of them defines it, and ports and instances of the
//! others come on top, as in Istio's aggregate registry. Agents come in the order in which they are given, then
//! `ServiceEntry` documents.

use std::{collections::HashSet, sync::Arc};

use mesh_model::registry::{Labels, Resolution, Service, ServicePort};

use super::{Entry, Origin, build::Builder};
use crate::{consul::Registered, hosts};

impl Builder<'_> {
    pub(super) fn consul(&mut self) {
        let config = self.config;
        for s in config.registered.iter().filter(|s| !s.ports.is_empty()) {
            let (udp, tcp) = s.ports.iter().cloned().partition(ServicePort::is_udp);
            let service = Service {
                host: s.host.clone(),
                name: s.name.clone(),
                namespace: s.namespace.clone(),
                addresses: vec![],
                ports: tcp,
                resolution: s.resolution,
                mesh_external: s.external,
                headless: false,
                export_to: vec![],
                labels: Labels::new(),
                created: 0,
            };
            let mut entry = self.entry(service, Origin::Consul);
            entry.udp_ports = udp;
            for (port, workload) in &s.instances {
                match self.workload_endpoint(workload, port, port.port) {
                    Ok(e) => entry.endpoints.push(e),
                    Err(message) => self.problem(format!("Consul service {}", s.name), message),
                }
                entry.identities.extend(self.identity(&s.namespace, &workload.spec.service_account));
            }
            if self.entries.contains_key(&s.host) {
                self.join_consul(entry);
            } else {
                self.entries.insert(s.host.clone(), Arc::new(entry));
            }
        }
    }

    /// Gives what is exported of Consul the name that it has in other clusters, `NAME.NAMESPACE.svc.cluster.local`: as a
    /// `Service` would that selects the instances. So it is one service with those of the same name there.
    pub(super) fn exported_of_consul(&mut self) {
        let config = self.config;
        for s in &config.registered {
            let host = hosts::service_host(&s.name, &s.namespace);
            let exported = self.exports.contains(&(s.namespace.as_str(), s.name.as_str()));
            if !exported || self.entries.contains_key(&host) || not_exported(s).is_some() {
                continue;
            }
            let Some(of_consul) = self.entries.get(&s.host).filter(|e| e.origin == Origin::Consul) else {
                continue;
            };
            // Of a host that several registries have, what others than Consul know may be anywhere.
            if of_consul.service.resolution != Resolution::Static
                || of_consul.service.namespace != s.namespace
            {
                continue;
            }
            let service = Service { host: host.clone(), addresses: vec![], ..of_consul.service.clone() };
            let (udp_ports, endpoints) = (of_consul.udp_ports.clone(), of_consul.endpoints.clone());
            let identities = of_consul.identities.clone();
            let mut entry =
                Entry { udp_ports, endpoints, identities, ..self.entry(service, Origin::Platform) };
            self.merge_imports(&mut entry);
            self.entries.insert(host, Arc::new(entry));
        }
    }

    /// Adds to a service of Consul what another registry has under the same host.
    pub(super) fn join_consul(&mut self, other: Entry) {
        let Some(entry) = self.entries.get_mut(&other.service.host).map(Arc::make_mut) else { return };
        let known = &mut entry.service;
        let mut renamed = Vec::new();
        join_ports(&mut known.ports, other.service.ports, &mut renamed);
        join_ports(&mut entry.udp_ports, other.udp_ports, &mut renamed);
        if known.addresses.is_empty() {
            known.addresses = other.service.addresses;
        }
        if known.export_to.is_empty() {
            known.export_to = other.service.export_to;
        }
        if other.service.resolution == Resolution::Dns {
            known.resolution = Resolution::Dns;
        }
        entry.identities.extend(other.identities);
        entry.subject_alt_names.extend(other.subject_alt_names);
        let mut seen: HashSet<(String, u16, String)> =
            entry.endpoints.iter().map(|e| (e.address.clone(), e.port, e.service_port.clone())).collect();
        for mut e in other.endpoints {
            if let Some((_, name)) = renamed.iter().find(|(old, _)| *old == e.service_port) {
                e.service_port.clone_from(name);
            }
            if seen.insert((e.address.clone(), e.port, e.service_port.clone())) {
                entry.endpoints.push(e);
            }
        }
    }
}

/// Why a service of Consul cannot be exported, if so.
pub(crate) fn not_exported(s: &Registered) -> Option<&'static str> {
    if s.external {
        Some("it is outside the mesh (external)")
    } else if s.ports.is_empty() {
        Some("it has no port")
    } else if s.resolution != Resolution::Static {
        Some("its instances are registered with names instead of addresses")
    } else if s.name.contains('_') {
        Some("its name has an underscore, which no name in other clusters may have")
    } else {
        None
    }
}

/// Adds the ports that are not there, and tells under which name each is now: names are unique in a service.
fn join_ports(known: &mut Vec<ServicePort>, other: Vec<ServicePort>, renamed: &mut Vec<(String, String)>) {
    for p in other {
        if let Some(k) = known.iter().find(|k| k.port == p.port) {
            renamed.push((p.name, k.name.clone()));
            continue;
        }
        let taken = known.iter().any(|k| k.name == p.name);
        let name = if taken { format!("{}-{}", p.name, p.port) } else { p.name.clone() };
        renamed.push((p.name, name.clone()));
        known.push(ServicePort { name, ..p });
    }
}
