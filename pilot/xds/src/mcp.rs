//! Configuration documents between components: MCP resources over ADS.
//!
//! A type is `<group>/<version>/<Kind>`, a name `<namespace>/<name>`, a body JSON. Galley,
//! federation and pilot publish with [`ConfigServer`]; whoever needs documents reads them with
//! [`ConfigClient`], which holds the last complete state while its server is away.

mod client;
mod server;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

pub use client::{ConfigClient, ConfigState};
use prost::Message as _;
use serde_json::{Map, Value};
pub use server::ConfigServer;

use crate::pb;

/// Type URL of the envelope.
pub const RESOURCE_TYPE_URL: &str = "type.googleapis.com/istio.mcp.v1alpha1.Resource";
const STRUCT_TYPE_URL: &str = "type.googleapis.com/google.protobuf.Struct";

/// `istio.mcp.v1alpha1.Metadata`.
#[derive(Clone, PartialEq, prost::Message)]
struct MetadataPb {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    create_time: Option<prost_types::Timestamp>,
    #[prost(string, tag = "3")]
    version: String,
    #[prost(btree_map = "string, string", tag = "4")]
    labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "5")]
    annotations: BTreeMap<String, String>,
}

/// `istio.mcp.v1alpha1.Resource`.
#[derive(Clone, PartialEq, prost::Message)]
struct ResourcePb {
    #[prost(message, optional, tag = "1")]
    metadata: Option<MetadataPb>,
    #[prost(message, optional, tag = "2")]
    body: Option<pb::Any>,
}

/// A configuration document.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Document {
    /// `<namespace>/<name>`; cluster-scoped documents have no slash.
    pub name: String,
    /// Version that its source gave it; free text.
    pub version: String,
    /// Seconds since the epoch at which it came to be; orders conflicts.
    pub created: u64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// The spec, an object.
    pub body: Value,
}

/// Why bytes are not a document.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not protobuf of the expected shape.
    #[error("malformed resource")]
    Decode(#[from] prost::DecodeError),
    /// An envelope of another type.
    #[error("resource has type {0:?}, expected {RESOURCE_TYPE_URL:?}")]
    Type(String),
    /// A body of another type.
    #[error("body has type {0:?}, expected {STRUCT_TYPE_URL:?}")]
    BodyType(String),
    /// A part that must be there.
    #[error("resource has no {0}")]
    Missing(&'static str),
}

impl Document {
    /// A document with a body that is made from `spec`.
    ///
    /// # Errors
    /// If `spec` does not serialise to a JSON object.
    pub fn new<T: serde::Serialize>(name: impl Into<String>, spec: &T) -> Result<Self, serde_json::Error> {
        let body = serde_json::to_value(spec)?;
        if !body.is_object() {
            return Err(serde::ser::Error::custom("a document's body must be an object"));
        }
        Ok(Self { name: name.into(), body, ..Self::default() })
    }

    /// Namespace and name; the namespace is empty for cluster-scoped documents.
    #[must_use]
    pub fn namespaced_name(&self) -> (&str, &str) {
        self.name.split_once('/').unwrap_or(("", &self.name))
    }

    /// Reads the body as `T`.
    ///
    /// # Errors
    /// If the body does not have `T`'s shape.
    pub fn spec<T: serde::de::DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        T::deserialize(&self.body)
    }

    /// When it came to be.
    #[must_use]
    pub fn created_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.created)
    }

    /// Encodes the document.
    #[must_use]
    pub fn to_any(&self) -> pb::Any {
        let empty = Map::new();
        let body = pb::json::to_struct(self.body.as_object().unwrap_or(&empty));
        // prost's Struct is an ordered map: equal documents have equal bytes, hence equal versions.
        let value = body.encode_to_vec();
        let metadata = MetadataPb {
            name: self.name.clone(),
            create_time: Some(prost_types::Timestamp {
                seconds: i64::try_from(self.created).unwrap_or(i64::MAX),
                nanos: 0,
            }),
            version: self.version.clone(),
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
        };
        let body = pb::Any { type_url: STRUCT_TYPE_URL.to_owned(), value: value.into() };
        let resource = ResourcePb { metadata: Some(metadata), body: Some(body) };
        pb::Any { type_url: RESOURCE_TYPE_URL.to_owned(), value: resource.encode_to_vec().into() }
    }

    /// Decodes a document.
    ///
    /// # Errors
    /// [`DocumentError`].
    pub fn from_any(any: &pb::Any) -> Result<Self, DocumentError> {
        if any.type_url != RESOURCE_TYPE_URL {
            return Err(DocumentError::Type(any.type_url.clone()));
        }
        let r = ResourcePb::decode(any.value.clone())?;
        let m = r.metadata.ok_or(DocumentError::Missing("metadata"))?;
        let body = r.body.ok_or(DocumentError::Missing("body"))?;
        if body.type_url != STRUCT_TYPE_URL {
            return Err(DocumentError::BodyType(body.type_url));
        }
        let body = prost_types::Struct::decode(body.value)?;
        Ok(Self {
            name: m.name,
            version: m.version,
            created: m.create_time.map_or(0, |t| u64::try_from(t.seconds).unwrap_or(0)),
            labels: m.labels,
            annotations: m.annotations,
            body: Value::Object(pb::json::from_struct(&body)),
        })
    }
}

#[cfg(test)]
mod tests;
