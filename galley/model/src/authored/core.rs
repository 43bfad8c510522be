//! Kubernetes' own kinds, and the MCS API.
//!
//! Only the fields that the mesh uses are typed; a [`Service`] has many more, which the platform
//! has already checked, so they are ignored here.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// `spec` of a core/v1 Service; other fields are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Service {
    /// Labels of the workloads behind it; none means that its endpoints are made by others.
    pub selector: BTreeMap<String, String>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// An address, `None` for a headless service, empty for one that the mesh assigns.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// Addresses of all families.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// `ClusterIP` (default), `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub service_type: String,
    /// Name that an `ExternalName` service stands for.
    pub external_name: String,
    /// Further addresses.
    #[serde(rename = "externalIPs")]
    pub external_ips: Vec<String>,
    /// `None` (default) or `ClientIP`.
    pub session_affinity: String,
    /// Names of endpoints that are not ready are published.
    pub publish_not_ready_addresses: bool,
}

impl Service {
    /// `clusterIP: None`: callers connect to its workloads by name.
    #[must_use]
    pub fn headless(&self) -> bool {
        self.cluster_ip == "None"
    }
}

/// A port of a core/v1 Service; other fields are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Required when there are several.
    pub name: String,
    /// 1 to 65535.
    pub port: u32,
    /// Port of the workloads: a number, or a port's name; the service port unless set.
    pub target_port: Option<IntOrString>,
    /// `TCP` (default), `UDP` or `SCTP`.
    pub protocol: String,
    /// Application protocol; overrides the name's prefix.
    pub app_protocol: Option<String>,
    /// Port on every node.
    pub node_port: u32,
}

/// A number or a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum IntOrString {
    /// A number.
    Int(u32),
    /// A name.
    String(String),
}

/// A core/v1 Namespace; its labels and annotations are in the metadata.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Namespace {
    /// Kubernetes' finalizers.
    pub finalizers: Vec<String>,
}

/// A core/v1 Secret. Its values are never part of `Debug` output; serialising it is for the wire
/// between components of one control plane.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Secret {
    /// `kubernetes.io/tls`, `Opaque`, ...
    #[serde(rename = "type")]
    pub secret_type: String,
    /// Values in base64.
    pub data: BTreeMap<String, String>,
    /// Values in clear.
    pub string_data: BTreeMap<String, String>,
    /// Whether the platform refuses changes.
    pub immutable: Option<bool>,
}

impl Secret {
    /// The same secret with every value replaced, fit for a dump.
    #[must_use]
    pub fn redacted(&self) -> Self {
        let hide =
            |m: &BTreeMap<String, String>| m.keys().map(|k| (k.clone(), "[redacted]".into())).collect();
        Self { data: hide(&self.data), string_data: hide(&self.string_data), ..self.clone() }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret")
            .field("type", &self.secret_type)
            .field("keys", &self.data.keys().chain(self.string_data.keys()).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

message! {
    /// Offers the service of the same name and namespace to the other clusters (KEP-1645).
    pub struct ServiceExport {
        /// Labels that importers see.
        pub exported_labels: BTreeMap<String, String>,
        /// Annotations that importers see.
        pub exported_annotations: BTreeMap<String, String>,
    }
}
