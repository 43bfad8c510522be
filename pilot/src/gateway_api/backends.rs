//! What rules refer to: destinations, and why some are none.

use mesh_model::authored::{
    Destination, PortSelector,
    gateway_api::{BackendRef, ObjectReference},
};

use super::{attach::RouteKind, known::Known, service_host};
use crate::hosts::CLUSTERSET_DOMAIN;

/// A reference that leads nowhere, in the API's word and in a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unresolved {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// Who refers to a backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Referrer<'a> {
    pub(super) kind: RouteKind,
    pub(super) namespace: &'a str,
    /// Whether another namespace must have granted it. Callers in the mesh reach its services in any case, so that for
    /// them, as in Istio, it need not.
    pub(super) grants: bool,
}

/// The destination of a backend.
pub(super) fn destination(
    known: &Known<'_>,
    from: Referrer<'_>,
    b: &BackendRef,
) -> Result<Destination, Unresolved> {
    let group = match b.group.as_deref().unwrap_or_default() {
        "core" => "",
        g => g,
    };
    let kind = b.kind.as_deref().unwrap_or("Service");
    let namespace = b.namespace.as_deref().unwrap_or(from.namespace);
    let unresolved = |reason, message| Err(Unresolved { reason, message });
    let host = match (group, kind) {
        ("", "Service") => service_host(&b.name, namespace),
        ("multicluster.x-k8s.io", "ServiceImport") => format!("{}.{namespace}.{CLUSTERSET_DOMAIN}", b.name),
        // Istio's way to name any host that the mesh knows.
        ("networking.istio.io", "Hostname") => b.name.clone(),
        _ => {
            return unresolved(
                "InvalidKind",
                format!("backend {} is a {group}/{kind}, not a Service", b.name),
            );
        }
    };
    if kind == "Hostname" {
        return Ok(to(host, b.port));
    }
    if from.grants
        && namespace != from.namespace
        && !known.granted((from.kind.name(), from.namespace), (group, kind, namespace, &b.name))
    {
        let says = format!(
            "no ReferenceGrant in {namespace} lets a {} of {} refer to {kind} {}",
            from.kind.name(),
            from.namespace,
            b.name
        );
        return unresolved("RefNotPermitted", says);
    }
    match known.service(namespace, &b.name) {
        None => unresolved("BackendNotFound", format!("there is no {kind} {namespace}/{}", b.name)),
        Some(Some(s)) if b.port.is_some_and(|n| !s.ports.iter().any(|p| p.port == n)) => {
            let port = b.port.unwrap_or_default();
            unresolved("BackendNotFound", format!("{kind} {namespace}/{} has no port {port}", b.name))
        }
        Some(_) => Ok(to(host, b.port)),
    }
}

fn to(host: String, port: Option<u32>) -> Destination {
    let port = port.map(|number| PortSelector { number, ..PortSelector::default() });
    Destination { host, port, ..Destination::default() }
}

/// Backends that get a share.
pub(super) struct Split<'a> {
    pub(super) valid: Vec<(Destination, i32, &'a BackendRef)>,
    /// Weight of those that are none.
    pub(super) lost: i64,
}

/// Divides backends by whether they are any. Without weight nothing comes to one, but what `stays` where it is.
pub(super) fn split<'a>(
    known: &Known<'_>,
    from: Referrer<'_>,
    list: &'a [BackendRef],
    stays: bool,
) -> Split<'a> {
    let mut out = Split { valid: vec![], lost: 0 };
    let some = list.iter().any(|b| b.weight.unwrap_or(1) > 0);
    for b in list {
        let weight = b.weight.unwrap_or(1);
        if weight <= 0 && !(stays && some) {
            continue;
        }
        match destination(known, from, b) {
            Ok(d) => out.valid.push((d, weight, b)),
            Err(_) => out.lost += i64::from(weight),
        }
    }
    out
}

impl Split<'_> {
    /// Percent of what comes that has no backend.
    #[allow(clippy::cast_precision_loss, reason = "weights are at most a million each")]
    pub(super) fn lost_percent(&self) -> f64 {
        let valid: i64 = self.valid.iter().map(|(_, w, _)| i64::from(*w)).sum();
        if self.lost == 0 { 0.0 } else { self.lost as f64 * 100.0 / (self.lost + valid) as f64 }
    }
}

/// The name under which a gateway proxy has the content of a Secret or ConfigMap: the object's, with the namespace in
/// front if that is not the Gateway's own. (No name of either has a `_`.)
pub(super) fn credential(
    known: &Known<'_>,
    gateway: &str,
    r: &ObjectReference,
    kinds: &[&str],
) -> Result<String, Unresolved> {
    let unresolved = |reason, message| Err(Unresolved { reason, message });
    let group = match r.group.as_deref().unwrap_or_default() {
        "core" => "",
        g => g,
    };
    let kind = r.kind.as_deref().unwrap_or("Secret");
    if !group.is_empty() || !kinds.contains(&kind) {
        let says = format!("{group}/{kind} {} is none of {}", r.name, kinds.join(", "));
        return unresolved("InvalidCertificateRef", says);
    }
    let namespace = r.namespace.as_deref().unwrap_or(gateway);
    if namespace == gateway {
        return Ok(r.name.clone());
    }
    if !known.granted(("Gateway", gateway), (group, kind, namespace, &r.name)) {
        let says = format!(
            "no ReferenceGrant in {namespace} lets a Gateway of {gateway} refer to {kind} {}",
            r.name
        );
        return unresolved("RefNotPermitted", says);
    }
    Ok(format!("{namespace}_{}", r.name))
}
