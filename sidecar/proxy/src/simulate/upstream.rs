//! Where a connection or request goes.

use std::{collections::BTreeMap, sync::Arc};

use mesh_model::proxy as model;

use super::Simulation;
use crate::http::filters::session::Session;

/// A destination and its share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    /// Cluster.
    pub cluster: String,
    /// Share, relative to the sum of all.
    pub weight: u32,
}

/// An endpoint of the chosen cluster.
#[derive(Debug, Clone)]
pub struct EndpointSeen {
    /// Address and port, or name and port.
    pub address: String,
    /// Where it is, as `region/zone/subzone`.
    pub locality: String,
    /// 0 is used first.
    pub priority: u32,
    /// Relative weight.
    pub weight: u32,
    /// Health that the control plane knows of.
    pub health: model::EndpointHealth,
    /// Takes traffic as things are: healthy, and of a priority that those before it leave something to.
    pub active: bool,
    /// TLS that the proxy would use to it; `None` is clear text.
    pub tls: Option<model::UpstreamTls>,
    /// `name;namespace;canonical name;revision;cluster` of its workload.
    pub workload: String,
}

impl Simulation<'_> {
    /// The position of the destination with the host that a session asks for, if that takes traffic.
    pub(super) fn kept(&self, s: &Session, to: &[model::WeightedCluster]) -> Option<usize> {
        let wanted = s.host?;
        to.iter().position(|c| {
            let assignment = self.config.clusters.get(&c.cluster).and_then(|c| self.assignment(c));
            assignment.iter().flat_map(|a| &a.localities).flat_map(|l| &l.endpoints).any(|e| {
                wanted.is(e)
                    && matches!(e.health, model::EndpointHealth::Healthy | model::EndpointHealth::Degraded)
            })
        })
    }

    /// Notes destinations; the endpoints of the one that is kept to, or else of the heaviest, are listed. Returns the
    /// position of that one.
    pub(super) fn destinations(&mut self, to: &[model::WeightedCluster], kept: Option<usize>) -> usize {
        let only = to.len() == 1;
        let weight = |c: &model::WeightedCluster| if only { c.weight.max(1) } else { c.weight };
        self.out.weights =
            to.iter().map(|c| Weight { cluster: c.cluster.clone(), weight: weight(c) }).collect();
        // The first of the heaviest: `max_by_key` would take the last.
        let heaviest = to.iter().map(weight).max().unwrap_or(0);
        let at = kept.or_else(|| to.iter().position(|c| weight(c) == heaviest)).unwrap_or(0);
        if let Some(c) = to.get(at) {
            self.out.cluster = Some(c.cluster.clone());
            match self.config.clusters.get(&c.cluster).cloned() {
                None => self.out.detail = format!("no cluster is called {} (cluster_not_found)", c.cluster),
                Some(cluster) => {
                    self.endpoints(&cluster);
                    if self.out.endpoints.is_empty() {
                        self.out.detail = "the cluster has no endpoints (no healthy upstream)".into();
                    } else if !self.out.endpoints.iter().any(|e| e.active) {
                        self.out.detail = "no endpoint is healthy (no healthy upstream)".into();
                    }
                }
            }
        }
        at
    }

    /// Whether the destination cannot take anything; why is in the detail.
    pub(super) fn nowhere(&self) -> bool {
        !self.out.endpoints.iter().any(|e| e.active)
    }

    /// Endpoints of a cluster; `None` for the original destination, and before there are any.
    fn assignment(&self, cluster: &model::Cluster) -> Option<Arc<model::LoadAssignment>> {
        match &cluster.discovery {
            model::Discovery::Eds(service) => {
                let name = if service.is_empty() { &cluster.name } else { service };
                self.config.endpoints.get(name).cloned()
            }
            model::Discovery::Static(a)
            | model::Discovery::StrictDns(a)
            | model::Discovery::LogicalDns(a) => Some(Arc::new(a.clone())),
            model::Discovery::OriginalDst | model::Discovery::ByName(_) => None,
        }
    }

    fn endpoints(&mut self, cluster: &model::Cluster) {
        let told = match &cluster.discovery {
            model::Discovery::ByName(n) => Some(self.named(n, cluster.tls.is_some())),
            model::Discovery::OriginalDst => Some(self.arrival.destination.to_string()),
            _ => None,
        };
        if let Some(address) = told {
            self.out.endpoints.push(EndpointSeen {
                address,
                locality: String::new(),
                priority: 0,
                weight: 1,
                health: model::EndpointHealth::Healthy,
                active: true,
                tls: cluster.tls.as_deref().cloned(),
                workload: String::new(),
            });
            return;
        }
        let Some(a) = self.assignment(cluster) else { return };
        let loads = loads(&a);
        for l in &a.localities {
            let whole = loads.get(&l.priority).copied().unwrap_or(0) > 0;
            for e in &l.endpoints {
                let labelled = cluster
                    .tls_matches
                    .iter()
                    .find(|m| m.labels.iter().all(|(k, v)| e.transport_labels.get(k) == Some(v)));
                let tls = match labelled {
                    Some(m) => m.tls.clone(),
                    None => cluster.tls.as_deref().cloned(),
                };
                self.out.endpoints.push(EndpointSeen {
                    address: authority(&e.address, e.port),
                    locality: l.locality.to_string(),
                    priority: l.priority,
                    weight: e.weight,
                    health: e.health,
                    active: whole && e.health == model::EndpointHealth::Healthy,
                    tls,
                    workload: e.workload.clone(),
                });
            }
        }
    }
}

impl Simulation<'_> {
    /// The host that the request, or else the SNI, asks for by name.
    fn named(&self, hosts: &model::NamedHosts, tls: bool) -> String {
        let hello = self.arrival.hello.as_ref();
        let asked = match &self.arrival.request {
            Some(r) => r.authority.as_str(),
            None => hello.and_then(|h| h.sni.as_deref()).unwrap_or_default(),
        };
        let (name, port) = crate::upstream::names::split(asked);
        let port = match (hosts.port, port) {
            (0, Some(port)) => port,
            (0, None) if tls => 443,
            (0, None) => 80,
            (own, _) => own,
        };
        authority(name, port)
    }
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Load of each priority in percent, by the health that the control plane knows: a priority takes its healthy share
/// times the overprovisioning factor of what those before it left.
fn loads(a: &model::LoadAssignment) -> BTreeMap<u32, u32> {
    let mut counts: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
    for l in &a.localities {
        let (healthy, all) = counts.entry(l.priority).or_default();
        for e in l.endpoints.iter().filter(|e| e.health != model::EndpointHealth::Draining) {
            *all += 1;
            *healthy += u32::from(e.health == model::EndpointHealth::Healthy);
        }
    }
    let factor = if a.overprovisioning == 0 { 140 } else { a.overprovisioning };
    let mut left = 100u32;
    counts
        .into_iter()
        .map(|(p, (healthy, all))| {
            let able = (factor.saturating_mul(healthy)).checked_div(all).unwrap_or(0).min(100);
            let load = able.min(left);
            left -= load;
            (p, load)
        })
        .collect()
}
