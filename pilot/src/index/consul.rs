//! Services of Consul in the index.
//!
//! What several registries call by one host is one service: the first of them defines it, and ports and instances of the
//! others come on top, as in Istio's aggregate registry. Agents come in the order in which they are given, then
//! `ServiceEntry` documents.

use std::collections::HashSet;

use mesh_model::registry::{Labels, Resolution, Service, ServicePort};

use super::{Entry, Origin, build::Builder};

impl Builder<'_> {
    pub(super) fn consul(&mut self) {
        let config = self.config;
        for s in config.registered.iter().filter(|s| !s.ports.is_empty()) {
            let service = Service {
                host: s.host.clone(),
                name: s.name.clone(),
                namespace: s.namespace.clone(),
                addresses: vec![],
                ports: s.ports.clone(),
                resolution: s.resolution,
                mesh_external: s.external,
                headless: false,
                export_to: vec![],
                labels: Labels::new(),
                created: 0,
            };
            let mut entry = self.entry(service, Origin::Consul);
            for (port, workload) in &s.instances {
                let Some(of) = s.ports.iter().find(|p| p.port == *port) else { continue };
                match self.workload_endpoint(workload, of, *port) {
                    Ok(e) => entry.endpoints.push(e),
                    Err(message) => self.problem(format!("Consul service {}", s.name), message),
                }
                entry.identities.extend(self.identity(&s.namespace, &workload.spec.service_account));
            }
            if self.entries.contains_key(&s.host) {
                self.join_consul(entry);
            } else {
                self.entries.insert(s.host.clone(), entry);
            }
        }
    }

    /// Adds to a service of Consul what another registry has under the same host.
    pub(super) fn join_consul(&mut self, other: Entry) {
        let Some(entry) = self.entries.get_mut(&other.service.host) else { return };
        let known = &mut entry.service;
        let mut renamed = Vec::new();
        for p in other.service.ports {
            match known.ports.iter().find(|k| k.port == p.port) {
                Some(k) => renamed.push((p.name, k.name.clone())),
                None => {
                    // Names are unique in a service; that of a Consul port has its number in it.
                    let taken = known.ports.iter().any(|k| k.name == p.name);
                    let name = if taken { format!("{}-{}", p.name, p.port) } else { p.name.clone() };
                    renamed.push((p.name, name.clone()));
                    known.ports.push(ServicePort { name, ..p });
                }
            }
        }
        if known.addresses.is_empty() {
            known.addresses = other.service.addresses;
        }
        if known.export_to.is_empty() {
            known.export_to = other.service.export_to;
        }
        if other.service.resolution == Resolution::Dns {
            known.resolution = Resolution::Dns;
        }
        entry.udp_ports.extend(other.udp_ports);
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
