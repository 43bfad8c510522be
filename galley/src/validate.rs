//! Rules that a single document must obey on its own.
//!
//! Errors reject the document. Warnings are for what is accepted but surprising, above all for
//! fields that parse and are **not enforced yet**: a user must never believe in a policy that
//! nobody applies.
//!
//! What Istio's webhook of today accepts is accepted, in all versions of a group, and what it refuses is
//! refused, with these exceptions: what Flotilla cannot do is an error where neglecting it would open what its
//! author believes closed (see the part's README), and a few values that Istio lets pass and then ignores are
//! errors here, since their author means something by them.
//!
//! Weights (`http`, `tls` and `tcp` routes with more than one destination) are proportions: never negative, and
//! not all zero. Another sum than 100 is a warning, since it is more often a mistake than a choice.

mod authentication;
mod common;
mod core;
mod destination_rule;
mod envoy_filter;
mod federation;
mod gateway;
mod gateway_api;
mod ingress;
mod mesh;
mod mixer;
mod role;
mod security;
mod service_entry;
mod sidecar;
mod telemetry;
mod trust_domains;
mod virtual_service;

use mesh_model::authored::{Document, Spec};

pub(crate) use self::{
    common::{Findings, is_dns1123_label, is_object_name},
    security::is_bool,
};
use crate::path::Path;

/// Validates a typed document.
pub(crate) fn document(d: &Document, out: &mut Findings) {
    let root = Path::root();
    let meta = root.key("metadata");
    common::labels(&d.metadata.labels, &meta.key("labels"), out);
    let p = if d.kind.spec_at_top_level() { root } else { root.key("spec") };
    let p = &p;
    let namespace = d.metadata.namespace.as_str();
    let kind = d.kind.name();
    match &d.spec {
        Spec::VirtualService(s) => virtual_service::check(s, namespace, p, out),
        Spec::DestinationRule(s) => destination_rule::check(s, namespace, p, out),
        Spec::Gateway(s) => gateway::check(s, &d.metadata.name, p, out),
        Spec::ServiceEntry(s) => service_entry::check(s, namespace, p, out),
        Spec::WorkloadEntry(s) => service_entry::check_workload(s, p, out),
        Spec::WorkloadGroup(s) => service_entry::check_group(s, p, out),
        Spec::Sidecar(s) => sidecar::check(s, namespace, p, out),
        Spec::EnvoyFilter(s) => envoy_filter::check(s, p, out),
        Spec::ProxyConfig(s) => envoy_filter::check_proxy(s, p, out),
        Spec::Telemetry(s) => telemetry::check(s, p, out),
        Spec::WasmPlugin(s) => telemetry::check_wasm(s, p, out),
        Spec::TrafficExtension(s) => telemetry::check_extension(s, p, out),
        Spec::GatewayClass(s) => gateway_api::check_class(s, p, out),
        Spec::KubernetesGateway(s) => gateway_api::check_gateway(s, p, out),
        Spec::HttpRoute(s) => gateway_api::check_http(s, p, out),
        Spec::GrpcRoute(s) => gateway_api::check_grpc(s, p, out),
        Spec::TlsRoute(s) | Spec::TcpRoute(s) | Spec::UdpRoute(s) => gateway_api::check_l4(s, kind, p, out),
        Spec::ReferenceGrant(s) => gateway_api::check_grant(s, p, out),
        Spec::BackendTlsPolicy(s) => gateway_api::check_backend_tls(s, p, out),
        Spec::Ingress(s) => ingress::check(s, &d.metadata, p, out),
        Spec::IngressClass(s) => ingress::check_class(s, p, out),
        Spec::PeerAuthentication(s) => security::check_peer(s, p, out),
        Spec::RequestAuthentication(s) => security::check_request(s, p, out),
        Spec::AuthorizationPolicy(s) => security::check_authorization(s, &d.metadata, p, out),
        Spec::AuthnPolicy(s) => authentication::check_policy(s, &d.metadata, p, out),
        Spec::MeshPolicy(s) => authentication::check_mesh(s, &d.metadata, p, out),
        Spec::RbacConfig(s) | Spec::ClusterRbacConfig(s) => role::check_config(s, &d.metadata, kind, p, out),
        Spec::ServiceRole(s) => role::check_role(s, p, out),
        Spec::ServiceRoleBinding(s) => role::check_binding(s, p, out),
        Spec::Service(s) => {
            federation::check_on_lapse(&d.metadata, out);
            core::check_service(s, p, out);
        }
        Spec::Secret(s) => core::check_secret(s, p, out),
        Spec::ServiceExport(s) => {
            federation::check_export_to(&d.metadata, out);
            core::check_export(s, p, out);
        }
        Spec::ExportPolicy(s) => federation::check_exports(s, p, out),
        Spec::MeshMembership(s) => federation::check_membership(s, &d.metadata, p, out),
        Spec::ClusterEviction(s) => federation::check_eviction(s, &d.metadata, p, out),
        Spec::FederatedTrustDomain(s) => trust_domains::check(s, p, out),
        Spec::ImportPolicy(s) => federation::check_imports(s, p, out),
        Spec::MeshConfig(s) => mesh::check(s, &d.metadata, p, out),
        Spec::Namespace(_) | Spec::Node(_) => {}
        Spec::Pod(s) => core::check_pod(s, p, out),
        Spec::EndpointSlice(s) => core::check_slice(s, &d.metadata, p, out),
        Spec::Rule(_)
        | Spec::Handler(_)
        | Spec::Instance(_)
        | Spec::Denier(_)
        | Spec::ListChecker(_)
        | Spec::MemQuota(_)
        | Spec::Stdio(_)
        | Spec::Prometheus(_)
        | Spec::CheckNothing(_)
        | Spec::ReportNothing(_)
        | Spec::ListEntry(_)
        | Spec::Quota(_)
        | Spec::LogEntry(_)
        | Spec::Metric(_)
        | Spec::QuotaSpec(_)
        | Spec::QuotaSpecBinding(_) => mixer::check(&d.spec, p, out),
    }
}

#[cfg(test)]
mod tests;
