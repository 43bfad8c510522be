//! Rules that a single document must obey on its own.
//!
//! Errors reject the document. Warnings are for what is accepted but surprising, above all for
//! fields that parse and are **not enforced yet**: a user must never believe in a policy that
//! nobody applies.
//!
//! Weights (`http`, `tls` and `tcp` routes with more than one destination):
//! - never negative, and not all zero;
//! - in `v1alpha3` they must add up to 100, as Istio 1.0 demanded of documents of that version;
//! - in `v1beta1` and `v1` they are proportions, as Istio has it today; another sum than 100 is a
//!   warning, since it is more often a mistake than a choice.

mod common;
mod core;
mod destination_rule;
mod federation;
mod gateway;
mod mixer;
mod security;
mod service_entry;
mod sidecar;
mod virtual_service;

use mesh_model::authored::{Document, Spec};

pub(crate) use self::common::{Findings, is_dns1123_label, is_object_name};
use crate::path::Path;

/// Validates a typed document.
pub(crate) fn document(d: &Document, out: &mut Findings) {
    let root = Path::root();
    let meta = root.key("metadata");
    common::labels(&d.metadata.labels, &meta.key("labels"), out);
    let p = if d.kind.spec_at_top_level() { root } else { root.key("spec") };
    let p = &p;
    match &d.spec {
        Spec::VirtualService(s) => virtual_service::check(s, &d.api_version, p, out),
        Spec::DestinationRule(s) => destination_rule::check(s, p, out),
        Spec::Gateway(s) => gateway::check(s, p, out),
        Spec::ServiceEntry(s) => service_entry::check(s, p, out),
        Spec::WorkloadEntry(s) => service_entry::check_workload(s, p, out),
        Spec::WorkloadGroup(s) => service_entry::check_group(s, p, out),
        Spec::Sidecar(s) => sidecar::check(s, p, out),
        Spec::PeerAuthentication(s) => security::check_peer(s, p, out),
        Spec::RequestAuthentication(s) => security::check_request(s, p, out),
        Spec::AuthorizationPolicy(s) => security::check_authorization(s, p, out),
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
        Spec::ImportPolicy(s) => federation::check_imports(s, p, out),
        Spec::MeshConfig(s) => core::check_mesh(s, &d.metadata, p, out),
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
