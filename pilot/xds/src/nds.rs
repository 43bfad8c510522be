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
