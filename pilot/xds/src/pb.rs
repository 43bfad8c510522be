//! Wire messages of `envoy.service.discovery.v3`, declared by hand.
//!
//! They differ from generated ones in one respect: the payload of an [`Any`] is [`Bytes`], so a
//! resource that is encoded once is shared by every response that carries it. Fields that Flotilla
//! neither sets nor reads are left out; protobuf skips them.

use std::collections::HashMap;

use bytes::Bytes;

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// Type of the value.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded value.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Status {
    /// gRPC code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// Text for operators.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `envoy.config.core.v3.Node`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Node {
    /// `kind~ip~name.namespace~domain`.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Service cluster, for statistics.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// What the proxy says about itself.
    #[prost(message, optional, tag = "3")]
    pub metadata: Option<prost_types::Struct>,
    /// Where it runs.
    #[prost(message, optional, tag = "4")]
    pub locality: Option<Locality>,
    /// Implementation, such as `flotilla` or `envoy`.
    #[prost(string, tag = "6")]
    pub user_agent_name: String,
}

/// `envoy.config.core.v3.Locality`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Locality {
    /// Region.
    #[prost(string, tag = "1")]
    pub region: String,
    /// Zone.
    #[prost(string, tag = "2")]
    pub zone: String,
    /// Sub-zone.
    #[prost(string, tag = "3")]
    pub sub_zone: String,
}

/// State-of-the-world request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DiscoveryRequest {
    /// Last version accepted.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// Who asks; on the first request of a stream.
    #[prost(message, optional, tag = "2")]
    pub node: Option<Node>,
    /// Whole subscription of this type.
    #[prost(string, repeated, tag = "3")]
    pub resource_names: Vec<String>,
    /// Type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Response that this answers.
    #[prost(string, tag = "5")]
    pub response_nonce: String,
    /// Set if that response was rejected.
    #[prost(message, optional, tag = "6")]
    pub error_detail: Option<Status>,
}

/// State-of-the-world response.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DiscoveryResponse {
    /// Version of the whole.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// Resources.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Any>,
    /// Type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Identifies this response on its stream.
    #[prost(string, tag = "5")]
    pub nonce: String,
}

/// Incremental request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaDiscoveryRequest {
    /// Who asks; on the first request of a stream.
    #[prost(message, optional, tag = "1")]
    pub node: Option<Node>,
    /// Type.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// Names to add; `*` is everything.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// Names to drop.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// What the client already has, on the first request of a type.
    #[prost(map = "string, string", tag = "5")]
    pub initial_resource_versions: HashMap<String, String>,
    /// Response that this answers.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// Set if that response was rejected.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<Status>,
}

/// Incremental response.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaDiscoveryResponse {
    /// Version of the whole, for operators.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// What changed.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    /// Type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Identifies this response on its stream.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// What is gone.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

/// A named, versioned resource.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Resource {
    /// Version of this resource.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The resource.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<Any>,
    /// Its name.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Names by which clients may have asked for it (VHDS). With aliases and without `resource` it says that they
    /// name nothing.
    #[prost(string, repeated, tag = "4")]
    pub aliases: Vec<String>,
    /// How long it holds without being sent again. A resource without `resource` renews this.
    #[prost(message, optional, tag = "6")]
    pub ttl: Option<prost_types::Duration>,
}

/// JSON and `google.protobuf.Struct`.
pub mod json {
    use prost_types::{ListValue, Struct, Value, value::Kind};
    use serde_json::{Map, Number, Value as Json};

    /// How deep a document may nest when it is read from the wire.
    const MAX_DEPTH: usize = 64;

    /// Encodes an object.
    #[must_use]
    pub fn to_struct(map: &Map<String, Json>) -> Struct {
        Struct { fields: map.iter().map(|(k, v)| (k.clone(), to_value(v))).collect() }
    }

    /// Encodes any JSON value. Numbers become doubles, as the type demands: integers above 2^53
    /// lose precision.
    #[must_use]
    pub fn to_value(v: &Json) -> Value {
        let kind = match v {
            Json::Null => Kind::NullValue(0),
            Json::Bool(b) => Kind::BoolValue(*b),
            Json::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
            Json::String(s) => Kind::StringValue(s.clone()),
            Json::Array(a) => Kind::ListValue(ListValue { values: a.iter().map(to_value).collect() }),
            Json::Object(o) => Kind::StructValue(to_struct(o)),
        };
        Value { kind: Some(kind) }
    }

    /// Decodes an object; deeper than 64 levels is cut to `null`.
    #[must_use]
    pub fn from_struct(s: &Struct) -> Map<String, Json> {
        object(s, 0)
    }

    fn object(s: &Struct, depth: usize) -> Map<String, Json> {
        s.fields.iter().map(|(k, v)| (k.clone(), from_value(v, depth + 1))).collect()
    }

    fn from_value(v: &Value, depth: usize) -> Json {
        if depth > MAX_DEPTH {
            return Json::Null;
        }
        match &v.kind {
            None | Some(Kind::NullValue(_)) => Json::Null,
            Some(Kind::BoolValue(b)) => Json::Bool(*b),
            Some(Kind::NumberValue(n)) => number(*n),
            Some(Kind::StringValue(s)) => Json::String(s.clone()),
            Some(Kind::ListValue(l)) => {
                Json::Array(l.values.iter().map(|v| from_value(v, depth + 1)).collect())
            }
            Some(Kind::StructValue(s)) => Json::Object(object(s, depth)),
        }
    }

    /// A double that holds an integer reads as one, so that it fits integer fields again.
    fn number(n: f64) -> Json {
        const EXACT: f64 = 9_007_199_254_740_992.0;
        if n.fract() == 0.0 && n.abs() <= EXACT {
            // In range by the test above.
            #[allow(clippy::cast_possible_truncation)]
            let i = n as i64;
            return Json::Number(Number::from(i));
        }
        Number::from_f64(n).map_or(Json::Null, Json::Number)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn json_survives() {
            let v = serde_json::json!({
                "a": 1, "b": -2.5, "c": [true, null, "x"], "d": {"e": {"f": []}}, "g": 4_000_000_000u64
            });
            let Json::Object(o) = &v else { unreachable!() };
            assert_eq!(Json::Object(from_struct(&to_struct(o))), v);
        }

        #[test]
        fn deep_nesting_is_cut() {
            let mut v = Json::Bool(true);
            for _ in 0..200 {
                v = Json::Array(vec![v]);
            }
            let Json::Object(o) = serde_json::json!({ "a": v }) else { unreachable!() };
            assert!(!from_struct(&to_struct(&o)).is_empty());
        }
    }
}
