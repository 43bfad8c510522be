//! [`mesh_model::proxy`] to Envoy v3 protobuf and back.
//!
//! `decode(encode(m)) == m` for every model value with a canonical form (no zero weights, no empty
//! statistics prefix). Whatever the wire says that the model cannot express is refused by field
//! name, with these exceptions, which are ignored because they do not change where traffic goes or
//! who may send it: buffer and window sizes, statistics names, access-log filters' runtime keys,
//! drain and flush timing, DNS refresh timing, `reuse_port`, metadata other than the two keys the
//! mesh uses, HTTP codec tuning, request-id generation, the transport of
//! `config_source` (everything comes over the aggregated stream or from the proxy's own store), and
//! `continue_on_listener_filters_timeout` (inspection always continues).
//!
//! `Principal::SourceCluster` has no counterpart in Envoy. It is written as a matcher on dynamic
//! metadata `flotilla.dev`, which our proxy reads back and any other never matches; pilot does not
//! give such policies to other proxies.

mod body;
mod cluster;
pub(crate) mod common;
mod endpoint;
mod ext_authz;
mod ext_proc;
pub(crate) mod extension;
pub mod grpc;
mod http;
mod jwt;
mod listener;
mod names;
mod on_demand;
mod on_route;
mod quic;
mod rate_limit;
mod rbac;
mod route;
mod secret;
mod split;
mod telemetry;
#[cfg(test)]
pub(crate) mod tests;
mod tls;
mod udp;

use std::{fmt, io};

use mesh_model::proxy as model;
pub use on_demand::virtual_host_for;
use prost::Name;
pub use secret::{Secret, SecretKind};
use serde::Serialize;

use crate::{pb, server::VersionHasher};

/// Name of the static cluster from which a proxy that is not ours fetches secrets.
pub const AGENT_CLUSTER: &str = tls::AGENT_CLUSTER;

/// A resource that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {field}: {reason}")]
pub struct DecodeError {
    /// Name of the resource; empty if it could not be read.
    pub resource: String,
    /// Path of the field, such as `filter_chains[0].filters[1]`.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

/// An error below the resource: the path grows on the way up.
#[derive(Debug)]
struct Bad {
    field: String,
    reason: String,
}

type Res<T> = Result<T, Bad>;

impl Bad {
    fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    fn unsupported(field: impl Into<String>, what: impl fmt::Display) -> Self {
        Self::new(field, format!("{what} is not supported"))
    }
}

/// Prefixes the path of an error.
trait At {
    fn at(self, field: impl fmt::Display) -> Self;
}

impl<T> At for Res<T> {
    fn at(self, field: impl fmt::Display) -> Self {
        self.map_err(|b| {
            let field = if b.field.is_empty() { field.to_string() } else { format!("{field}.{}", b.field) };
            Bad { field, reason: b.reason }
        })
    }
}

/// Refuses fields of a message that are set and have no counterpart in the model.
macro_rules! refuse {
    ($m:expr; $($f:ident),+ $(,)?) => {
        $(
            if !$crate::codec::is_default(&$m.$f) {
                return Err($crate::codec::Bad::new(stringify!($f), "is set, which is not supported"));
            }
        )+
    };
}
use refuse;

fn is_default<T: Default + PartialEq>(v: &T) -> bool {
    *v == T::default()
}

/// Decodes every element, with its index in the path of an error.
fn each<A, B>(field: &str, items: Vec<A>, f: impl Fn(A) -> Res<B>) -> Res<Vec<B>> {
    // Collected, the result would stay in the memory of the wire messages, which are up to ten times as large.
    let mut out = Vec::with_capacity(items.len());
    for (i, item) in items.into_iter().enumerate() {
        out.push(f(item).at(format_args!("{field}[{i}]"))?);
    }
    Ok(out)
}

pub(crate) fn pack<T: Name>(m: &T) -> pb::Any {
    pb::Any { type_url: format!("type.googleapis.com/{}", T::full_name()), value: m.encode_to_vec().into() }
}

/// Host and port of an address in a bootstrap.
pub(crate) fn socket_address(
    a: envoy_types::pb::envoy::config::core::v3::Address,
) -> Result<(String, u16), String> {
    common::to_socket_address(Some(a)).map_err(|b| format!("{}: {}", b.field, b.reason))
}

fn is_type<T: Name>(any: &pb::Any) -> Result<(), DecodeError> {
    if any.type_url.rsplit('/').next() == Some(T::full_name().as_str()) {
        return Ok(());
    }
    let reason = format!("{:?} is not {}", any.type_url, T::full_name());
    Err(DecodeError { resource: String::new(), field: "type_url".into(), reason })
}

pub(crate) fn unpack<T: Name + Default>(any: &pb::Any) -> Result<T, DecodeError> {
    is_type::<T>(any)?;
    T::decode(any.value.clone()).map_err(|e| DecodeError {
        resource: String::new(),
        field: "value".into(),
        reason: e.to_string(),
    })
}

fn named<T>(resource: &str, r: Res<T>) -> Result<T, DecodeError> {
    r.map_err(|b| DecodeError { resource: resource.to_owned(), field: b.field, reason: b.reason })
}

/// Version of a model value: a hash over its content, equal in every process. The encoding itself
/// would not do, since protobuf maps have no order.
#[must_use]
pub fn version<T: Serialize>(value: &T) -> String {
    struct W(VersionHasher);
    impl io::Write for W {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.write(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut w = W(VersionHasher::default());
    // Writing to a hasher cannot fail, and model values serialise: their map keys are strings.
    if serde_json::to_writer(&mut w, value).is_err() {
        w.0.write(b"unserialisable");
    }
    w.0.finish()
}

/// Encodes a listener (LDS).
#[must_use]
pub fn encode_listener(l: &model::Listener) -> pb::Any {
    pack(&listener::encode(l))
}

/// Decodes a listener (LDS).
///
/// # Errors
/// [`DecodeError`] naming the first field that cannot be honoured.
pub fn decode_listener(any: &pb::Any) -> Result<model::Listener, DecodeError> {
    let m: listener::pb::Listener = unpack(any)?;
    let name = m.name.clone();
    named(&name, listener::decode(m))
}

/// Encodes a route configuration (RDS).
#[must_use]
pub fn encode_route(r: &model::RouteConfiguration) -> pb::Any {
    pack(&route::encode(r))
}

/// Decodes a route configuration (RDS).
///
/// # Errors
/// [`DecodeError`] naming the first field that cannot be honoured.
pub fn decode_route(any: &pb::Any) -> Result<model::RouteConfiguration, DecodeError> {
    is_type::<route::pb::RouteConfiguration>(any)?;
    route::from_wire(&any.value).map_err(|(name, b)| DecodeError {
        resource: name,
        field: b.field,
        reason: b.reason,
    })
}

/// Encodes a virtual host (VHDS).
#[must_use]
pub fn encode_virtual_host(v: &model::VirtualHost) -> pb::Any {
    pack(&route::virtual_host(v))
}

/// Decodes a virtual host (VHDS).
///
/// # Errors
/// [`DecodeError`] naming the first field that cannot be honoured.
pub fn decode_virtual_host(any: &pb::Any) -> Result<model::VirtualHost, DecodeError> {
    let m: route::pb::VirtualHost = unpack(any)?;
    let name = m.name.clone();
    named(&name, route::to_virtual_host(m))
}

/// Encodes a cluster (CDS).
#[must_use]
pub fn encode_cluster(c: &model::Cluster) -> pb::Any {
    pack(&cluster::encode(c))
}

/// Decodes a cluster (CDS).
///
/// # Errors
/// [`DecodeError`] naming the first field that cannot be honoured.
pub fn decode_cluster(any: &pb::Any) -> Result<model::Cluster, DecodeError> {
    let m: cluster::pb::Cluster = unpack(any)?;
    let name = m.name.clone();
    named(&name, cluster::decode(m))
}

/// Encodes a load assignment (EDS).
#[must_use]
pub fn encode_endpoints(e: &model::LoadAssignment) -> pb::Any {
    pack(&endpoint::encode(e))
}

/// Decodes a load assignment (EDS).
///
/// # Errors
/// [`DecodeError`] naming the first field that cannot be honoured.
pub fn decode_endpoints(any: &pb::Any) -> Result<model::LoadAssignment, DecodeError> {
    let m: endpoint::pb::ClusterLoadAssignment = unpack(any)?;
    let name = m.cluster_name.clone();
    named(&name, endpoint::decode(m))
}

/// Encodes a secret (SDS).
#[must_use]
pub fn encode_secret(s: &Secret) -> pb::Any {
    pack(&secret::encode(s))
}

/// Decodes a secret (SDS).
///
/// # Errors
/// [`DecodeError`] naming the first field that cannot be honoured. No part of a secret appears in it.
pub fn decode_secret(any: &pb::Any) -> Result<Secret, DecodeError> {
    let m: tls::pb::Secret = unpack(any)?;
    let name = m.name.clone();
    named(&name, secret::decode(m))
}
