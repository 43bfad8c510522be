//! What Kubernetes knows of running workloads: pods, nodes and endpoint slices, as plain documents.
//!
//! As in [`super::core`], only the fields that the mesh uses are typed and the rest is ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A core/v1 Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// What was asked for.
    pub spec: PodSpec,
    /// What is.
    pub status: PodStatus,
}

/// `spec` of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// Account it runs as; empty is `default`.
    pub service_account_name: String,
    /// Node it runs on.
    pub node_name: String,
    /// It uses its node's addresses, so nothing of it is captured.
    pub host_network: bool,
    /// Its containers.
    pub containers: Vec<Container>,
    /// Containers that start before; one that restarts always is a sidecar.
    pub init_containers: Vec<Container>,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Container {
    /// Name.
    pub name: String,
    /// Ports.
    pub ports: Vec<ContainerPort>,
}

/// A port of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// Name that a service's `targetPort` may use.
    pub name: String,
    /// Number.
    pub container_port: u32,
}

/// `status` of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    pub phase: String,
    /// Address.
    #[serde(rename = "podIP")]
    pub pod_ip: String,
    /// Addresses of all families.
    #[serde(rename = "podIPs")]
    pub pod_ips: Vec<PodIp>,
    /// Conditions.
    pub conditions: Vec<PodCondition>,
}

/// An address of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// Address.
    pub ip: String,
}

/// A condition of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PodCondition {
    /// Such as `Ready`.
    #[serde(rename = "type")]
    pub condition: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

/// A core/v1 Node: its labels say where it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterNode {}

/// A discovery.k8s.io/v1 EndpointSlice: endpoints of the service that its label `kubernetes.io/service-name` names.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// `IPv4`, `IPv6` or `FQDN`.
    pub address_type: String,
    /// The endpoints.
    pub endpoints: Vec<SliceEndpoint>,
    /// Ports that all of them have.
    pub ports: Vec<SlicePort>,
}

/// An endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceEndpoint {
    /// Addresses, of which the first counts.
    pub addresses: Vec<String>,
    /// Whether it is ready.
    pub conditions: SliceConditions,
    /// Pod behind it.
    pub target_ref: Option<TargetRef>,
    /// Node it runs on.
    pub node_name: String,
    /// Zone it runs in.
    pub zone: String,
}

/// Conditions of an endpoint; what is not said counts as fine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SliceConditions {
    /// It takes traffic.
    pub ready: Option<bool>,
    /// It would, were it not terminating.
    pub serving: Option<bool>,
    /// It is about to stop.
    pub terminating: Option<bool>,
}

/// Reference to an object.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// Such as `Pod`.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
}

/// A port of a slice.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SlicePort {
    /// Name of the service port.
    pub name: String,
    /// Number at the endpoints.
    pub port: u32,
    /// `TCP` (default), `UDP` or `SCTP`.
    pub protocol: String,
    /// Application protocol.
    pub app_protocol: Option<String>,
}

/// Labels by which a node says where it is.
pub mod topology {
    /// Region.
    pub const REGION: &str = "topology.kubernetes.io/region";
    /// Zone.
    pub const ZONE: &str = "topology.kubernetes.io/zone";
    /// Part of a zone.
    pub const SUBZONE: &str = "topology.istio.io/subzone";
    /// Label of a slice that names its service.
    pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
}

/// What a pod's metadata says of its proxy.
#[must_use]
pub fn has_sidecar(
    pod: &Pod,
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) -> bool {
    if pod.spec.host_network {
        return false;
    }
    match labels.get("security.istio.io/tlsMode").map(String::as_str) {
        Some("istio") => return true,
        Some(_) => return false,
        None => {}
    }
    let proxy = |c: &Container| matches!(c.name.as_str(), "istio-proxy" | "flotilla-proxy");
    annotations.contains_key("sidecar.istio.io/status")
        || pod.spec.containers.iter().chain(&pod.spec.init_containers).any(proxy)
}
