//! What validation says of each document on its own, documents that are there twice, deprecated fields, and
//! conditions that somebody wrote into a document's status.

use std::collections::BTreeMap;

use mesh_model::authored::Spec;

use super::{Findings, World, named};
use crate::{
    node::{Node, Value},
    path::FieldPath,
};

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let mut seen = BTreeMap::new();
    for r in &world.resources {
        let p = r.parsed;
        for e in &p.report.errors {
            out.at_line("IST0106", r, e.line, located(&e.path, &e.message));
        }
        if !p.ignored {
            let plain = p.report.warnings.iter().filter(|w| !p.coded.iter().any(|(_, f)| f == *w));
            for w in plain {
                out.at_line("IST0133", r, w.line, located(&w.path, &w.message));
            }
        }
        for (code, f) in &p.coded {
            out.at_line(code, r, f.line, located(&f.path, &f.message));
        }
        if let Some(key) = &p.key
            && let Some(first) = seen.insert(key, &p.report.file)
        {
            out.add(
                "IST0106",
                r,
                named(),
                format!("duplicate of {key}, which {first} has as well: remove one"),
            );
        }
        deprecated(r, out);
        conditions(r, out);
    }
}

fn located(path: &str, message: &str) -> String {
    if path.is_empty() { message.to_owned() } else { format!("{path}: {message}") }
}

fn deprecated<'w, 'a>(r: &'w super::Resource<'a>, out: &mut Findings<'w, 'a>) {
    match r.spec() {
        Some(Spec::VirtualService(vs)) => {
            for (i, http) in vs.http.iter().enumerate() {
                if http.fault.as_ref().and_then(|f| f.delay.as_ref()).is_some_and(|d| d.percent > 0) {
                    let path = FieldPath::of(&format!("spec.http[{i}].fault.delay.percent"));
                    out.add(
                        "IST0002",
                        r,
                        path,
                        "fault.delay.percent is deprecated: use fault.delay.percentage",
                    );
                }
            }
        }
        Some(Spec::Sidecar(s))
            if s.outbound_traffic_policy.as_ref().is_some_and(|o| o.egress_proxy.is_some()) =>
        {
            let path = FieldPath::of("spec.outboundTrafficPolicy.egressProxy");
            out.add("IST0002", r, path, "egressProxy is without effect: remove it");
        }
        None if r.kind == "CustomResourceDefinition" => {
            let spec = r.tree().and_then(|t| t.get("spec"));
            let text = |n: Option<&'w Node>| n.and_then(Node::as_str).unwrap_or_default();
            let kind = text(spec.and_then(|s| s.get("names")).and_then(|n| n.get("kind")));
            if text(spec.and_then(|s| s.get("group"))) == "rbac.istio.io" {
                out.add(
                    "IST0002",
                    r,
                    named(),
                    format!("kind {kind} of rbac.istio.io is deprecated: use AuthorizationPolicy"),
                );
            }
        }
        _ => {}
    }
}

/// Conditions whose being false is a failure.
fn conditions<'w, 'a>(r: &'w super::Resource<'a>, out: &mut Findings<'w, 'a>) {
    let bad: &[&str] = match r.spec() {
        Some(Spec::Service(_) | Spec::ServiceEntry(_) | Spec::WorkloadEntry(_)) => {
            &["istio.io/WaypointBound"]
        }
        Some(Spec::AuthorizationPolicy(_)) => &["ZtunnelAccepted", "WaypointAccepted"],
        Some(Spec::KubernetesGateway(_) | Spec::HttpRoute(_) | Spec::GrpcRoute(_)) => {
            &["Accepted", "Programmed", "ResolvedRefs"]
        }
        _ => return,
    };
    let Some(status) = r.tree().and_then(|t| t.get("status")) else { return };
    let items = |n: &'w Node, field: &str| match n.get(field).map(|l| &l.value) {
        Some(Value::Seq(items)) => items.as_slice(),
        _ => &[],
    };
    let all = items(status, "conditions").iter().map(|c| (c, "status.conditions"));
    let of_parents =
        items(status, "parents").iter().flat_map(|p| items(p, "conditions")).map(|c| (c, "status.parents"));
    for (c, path) in all.chain(of_parents) {
        let text = |field: &str| c.get(field).and_then(Node::as_str).unwrap_or_default();
        // The only one that is true and still a failure.
        let partly = text("type") == "WaypointAccepted" && text("reason") == "PartiallyInvalid";
        if bad.contains(&text("type")) && (text("status") == "False" || partly) {
            let message = format!(
                "condition {} is {}, reason {}: {}",
                text("type"),
                text("status"),
                text("reason"),
                text("message")
            );
            out.add("IST0171", r, FieldPath::of(path), message);
        }
    }
}
