//! Endpoints of services that a controller has written down as `EndpointSlice`s.

use std::collections::{HashMap, HashSet};

use mesh_model::{
    Locality,
    authored::{EndpointSlice, IntOrString, WorkloadEntry, kubernetes::SliceEndpoint},
    registry::{Endpoint, Health, Labels, TlsMode},
};

use super::{Entry, build::Builder};
use crate::{config::Doc, kubernetes::IS_POD};

/// Slices by namespace and service.
pub(super) type Slices<'a> = HashMap<(&'a str, &'a str), Vec<&'a Doc<EndpointSlice>>>;

/// Pods by namespace and what endpoints may know of them.
#[derive(Default)]
pub(super) struct PodIndex<'a> {
    by_name: HashMap<(&'a str, &'a str), &'a Doc<WorkloadEntry>>,
    by_address: HashMap<(&'a str, &'a str), &'a Doc<WorkloadEntry>>,
}

impl<'a> PodIndex<'a> {
    pub(super) fn new(workloads: &'a [Doc<WorkloadEntry>]) -> Self {
        let mut out = Self::default();
        for w in workloads.iter().filter(|w| w.annotations.contains_key(IS_POD)) {
            out.by_name.entry((&w.namespace, &w.name)).or_insert(w);
            out.by_address.entry((&w.namespace, &w.spec.address)).or_insert(w);
        }
        out
    }
}

impl<'a> Builder<'a> {
    /// Adds what slices say of a service; false if there are none. Workloads that are no pods and that the service
    /// selects come on top, since no controller writes slices for them.
    pub(super) fn slices(
        &mut self,
        entry: &mut Entry,
        selector: &Labels,
        targets: &[Option<IntOrString>],
        object: &str,
    ) -> bool {
        let key = (entry.service.namespace.as_str(), entry.service.name.as_str());
        let Some(slices) = self.slices.get(&key).cloned() else { return false };
        let namespace = entry.service.namespace.clone();
        // A slice may repeat what another one has while endpoints move between them.
        let mut seen = HashSet::new();
        for slice in slices {
            for e in &slice.spec.endpoints {
                let Some(address) = e.addresses.first() else { continue };
                let workload = self.pod(&namespace, e, address).cloned();
                for port in entry.service.ports.iter().chain(&entry.udp_ports) {
                    let of = |p: &&mesh_model::authored::kubernetes::SlicePort| p.name == port.name;
                    let Some(found) = slice.spec.ports.iter().find(of) else { continue };
                    let Ok(number) = u16::try_from(found.port) else { continue };
                    let made = match &workload {
                        Some(w) => self.workload_endpoint(w, port, number).ok(),
                        None => Some(self.plain(e, address, &port.name, number)),
                    };
                    if let Some(mut made) = made {
                        made.health = health(e);
                        if seen.insert((address, &found.name, number)) {
                            entry.endpoints.push(made);
                        }
                    }
                }
                let account = workload.as_ref().map(|w| w.spec.service_account.clone());
                if let Some(id) = account.and_then(|a| self.identity(&namespace, &a)) {
                    entry.identities.insert(id);
                }
            }
        }
        if !selector.is_empty() {
            let wanted = |w: &Doc<WorkloadEntry>| !w.annotations.contains_key(IS_POD);
            self.select_where(entry, targets, object, selector, wanted);
        }
        true
    }

    /// The pod behind an endpoint.
    pub(super) fn pod(
        &self,
        namespace: &str,
        e: &SliceEndpoint,
        address: &str,
    ) -> Option<&'a Doc<WorkloadEntry>> {
        match e.target_ref.as_ref().filter(|t| t.kind == "Pod") {
            Some(t) => self.pods.by_name.get(&(namespace, t.name.as_str())).copied(),
            None => self.pods.by_address.get(&(namespace, address)).copied(),
        }
    }

    /// An endpoint of which nothing but its address is known: a host outside, or a pod without a document.
    fn plain(&self, e: &SliceEndpoint, address: &str, service_port: &str, port: u16) -> Endpoint {
        let zone = Locality { zone: e.zone.clone(), ..Locality::default() };
        Endpoint {
            address: address.to_owned(),
            port,
            service_port: service_port.to_owned(),
            labels: Labels::new(),
            service_account: String::new(),
            locality: if e.zone.is_empty() { Locality::default() } else { zone },
            network: None,
            cluster: Some(self.local.cluster.clone()),
            weight: 1,
            health: Health::Healthy,
            tls: TlsMode::Disabled,
            workload: None,
        }
    }
}

/// What is not said is ready (discovery.k8s.io/v1).
fn health(e: &SliceEndpoint) -> Health {
    let c = &e.conditions;
    match (c.ready.unwrap_or(true), c.terminating.unwrap_or(false), c.serving.unwrap_or(true)) {
        (true, _, _) => Health::Healthy,
        (false, true, true) => Health::Draining,
        _ => Health::Unhealthy,
    }
}
