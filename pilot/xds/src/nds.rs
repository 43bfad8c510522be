//! The name table (`istio.networking.nds.v1.NameTable`): what a workload's resolver answers.

use std::collections::BTreeMap;

use prost::Message as _;

use crate::{pb, type_url};

/// Addresses by host name.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NameTable {
    /// Fully qualified host (or wildcard) to its addresses.
    #[prost(btree_map = "string, message", tag = "1")]
    pub table: BTreeMap<String, NameInfo>,
}

/// One name.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NameInfo {
    /// Addresses.
    #[prost(string, repeated, tag = "1")]
    pub ips: Vec<String>,
    /// Where the name comes from: `Kubernetes`, `External`, `Federation`.
    #[prost(string, tag = "2")]
    pub registry: String,
    /// Short name within its namespace.
    #[prost(string, tag = "3")]
    pub shortname: String,
    /// Namespace.
    #[prost(string, tag = "4")]
    pub namespace: String,
    /// Other names for the same addresses.
    #[prost(string, repeated, tag = "5")]
    pub alt_hosts: Vec<String>,
    /// Named ports, which SRV records tell; a field of Flotilla's own.
    #[prost(message, repeated, tag = "1000")]
    pub ports: Vec<NamePort>,
    /// Its addresses are those of its pods; a field of Flotilla's own.
    #[prost(bool, tag = "1001")]
    pub headless: bool,
    /// Pods of a headless service that have names of their own; a field of Flotilla's own.
    #[prost(message, repeated, tag = "1002")]
    pub pods: Vec<NamePod>,
}

/// A pod of a headless service.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NamePod {
    /// Host name, a DNS label.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Cluster that it runs in.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// Addresses.
    #[prost(string, repeated, tag = "3")]
    pub ips: Vec<String>,
    /// The service's named ports that it serves, with the numbers that it serves them at.
    #[prost(message, repeated, tag = "4")]
    pub ports: Vec<NamePort>,
}

/// A named port of a name.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NamePort {
    /// Name of the service port.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Number that callers connect to.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// UDP rather than TCP.
    #[prost(bool, tag = "3")]
    pub udp: bool,
}

impl NameTable {
    /// Encodes the table.
    #[must_use]
    pub fn to_any(&self) -> pb::Any {
        pb::Any { type_url: type_url::NDS.to_owned(), value: self.encode_to_vec().into() }
    }

    /// Decodes a table.
    ///
    /// # Errors
    /// If the type is another one or the bytes are not a name table.
    pub fn from_any(any: &pb::Any) -> Result<Self, prost::DecodeError> {
        Self::decode(any.value.clone())
    }
}
