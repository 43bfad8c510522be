//! Endpoints of a cluster by locality and priority.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::EndpointCheck;
use crate::Locality;

/// `envoy.config.endpoint.v3.ClusterLoadAssignment`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadAssignment {
    /// EDS service name.
    pub name: String,
    /// Endpoints by locality and priority.
    pub localities: Vec<LocalityEndpoints>,
    /// Percent; Envoy's default is 140.
    pub overprovisioning: u32,
}

/// `envoy.config.endpoint.v3.LocalityLbEndpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LocalityEndpoints {
    /// Where they are.
    pub locality: Locality,
    /// 0 is used first.
    pub priority: u32,
    /// Share among localities of the same priority, if the cluster is locality weighted.
    pub weight: u32,
    /// The endpoints.
    pub endpoints: Vec<LbEndpoint>,
}

/// `envoy.config.endpoint.v3.LbEndpoint`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LbEndpoint {
    /// IP address; with DNS discovery a name; `internal:<name>` is a listener of the same proxy, which serves
    /// what a CONNECT stream carries.
    pub address: String,
    /// Port.
    pub port: u16,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// Health known to the control plane.
    pub health: EndpointHealth,
    /// Filter metadata `envoy.transport_socket_match`.
    pub transport_labels: BTreeMap<String, String>,
    /// Filter metadata `istio`: `workload` is `name;namespace;canonical name;revision;cluster`.
    pub workload: String,
    /// How it is checked, if otherwise than the cluster says.
    pub check: Option<Box<EndpointCheck>>,
    /// Its part in spreading sessions over the workloads of another cluster.
    pub slots: Slots,
}

/// Slots of a service: names for its workloads that tell nothing about them. A session between clusters ends at one
/// workload, so a caller keeps sessions to several slots, and the gateway at the other end leads each to a workload
/// of that slot. In a server name it stands as eight hexadecimal digits before the service's own. Filter metadata
/// `flotilla`: `slot` is a name, `serves` a list of them divided by commas.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Slots {
    /// None.
    #[default]
    None,
    /// The endpoint stands for this slot behind a gateway.
    Asks(u32),
    /// The endpoint is a workload of these slots.
    Serves(Box<[u32]>),
}

/// Cluster whose endpoints are the east-west gateways of a proxy's own cluster, by which inbound connections from them
/// are known. Those from one that is [`EndpointHealth::Draining`] are told to leave: only who ends the inner session can
/// say that inside of it.
pub const OWN_GATEWAYS: &str = "east-west-gateways";

/// `envoy.config.core.v3.HealthStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum EndpointHealth {
    /// Usable.
    #[default]
    Healthy,
    /// Used for what healthy ones cannot take.
    Degraded,
    /// Used only in panic.
    Unhealthy,
    /// No new streams.
    Draining,
}
