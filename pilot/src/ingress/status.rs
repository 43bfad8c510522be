//! `status` of Ingresses, as data: this mesh has no API server to write it to.

use std::net::IpAddr;

use mesh_model::registry::Labels;
use serde::Serialize;

use crate::{
    config::{Config, selects},
    gateway_api::status::GatewayProxy,
    index::workload_labels,
};

/// Status of an Ingress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Object {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Status.
    pub status: Status,
}

/// Where clients reach it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Addresses of what is in front of the gateways.
    pub load_balancer: LoadBalancer,
}

/// Addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LoadBalancer {
    /// In the order of Istio: addresses, then names.
    pub ingress: Vec<Address>,
}

/// An address or a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Address {
    /// An address.
    Ip(String),
    /// A name.
    Hostname(String),
}

impl Address {
    fn new(s: &str) -> Self {
        if s.parse::<IpAddr>().is_ok() { Self::Ip(s.to_owned()) } else { Self::Hostname(s.to_owned()) }
    }
}

/// Status of all Ingresses that this mesh serves. `connected` are gateway proxies that this control plane serves.
#[must_use]
pub fn status(config: &Config, connected: &[GatewayProxy]) -> Vec<Object> {
    let mut ingress: Vec<Address> = addresses(config, connected).iter().map(|a| Address::new(a)).collect();
    ingress.sort();
    ingress.dedup();
    let status = Status { load_balancer: LoadBalancer { ingress } };
    super::served(config)
        .map(|d| Object { namespace: d.namespace.clone(), name: d.name.clone(), status: status.clone() })
        .collect()
}

/// Those of `MeshConfig.ingressService`, else those of the gateways themselves. Which addresses a load balancer has is in the
/// `status` of the Service, which nobody reads.
fn addresses(config: &Config, connected: &[GatewayProxy]) -> Vec<String> {
    let (namespace, name) = (config.root_namespace(), config.mesh.ingress_service());
    let service = config.services.iter().find(|s| s.namespace == namespace && s.name == name);
    if let Some(s) = service {
        if s.spec.service_type == "ExternalName" {
            return vec![s.spec.external_name.clone()];
        }
        if !s.spec.external_ips.is_empty() {
            return s.spec.external_ips.clone();
        }
    }
    let wanted = config.mesh.ingress_labels();
    let serves = |labels: &Labels| selects(&wanted, labels);
    let connected = connected.iter().filter(|p| serves(&p.labels)).flat_map(|p| p.addresses.iter().cloned());
    let written = config.workload_entries.iter().filter(|w| serves(&workload_labels(w)));
    connected.chain(written.map(|w| w.spec.address.clone())).collect()
}
