//! Injection, pods, Deployments and the Services in front of them.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::{
    authored::{IntOrString, Service, Spec},
    registry::Protocol,
};

use super::{Findings, Resource, World, named};
use crate::{analyze::world::Workload, path::FieldPath};

/// User that the proxy runs as.
const PROXY_USER: i64 = 1337;
/// Ports whose protocol is known although nobody says it: SMTP, DNS, MySQL, MongoDB.
const WELL_KNOWN: [u32; 4] = [25, 53, 3306, 27017];
/// Label of what Istio's own installation brings.
const CONTROL_PLANE: &str = "operator.istio.io/component";

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let services: BTreeSet<String> = (world.resources.iter())
        .filter(|r| matches!(r.spec(), Some(Spec::Service(_))))
        .map(Resource::full_name)
        .collect();
    for r in &world.resources {
        match r.spec() {
            Some(Spec::Namespace(_)) => namespace(world, r, out),
            Some(Spec::Service(s)) => port_names(r, s, out),
            Some(Spec::ServiceExport(_)) if !services.contains(&r.full_name()) => {
                let message = format!(
                    "there is no Service {}: nothing is exported. Create it, or remove the export",
                    r.full_name()
                );
                out.add("IST0101", r, named(), message);
            }
            _ => {}
        }
    }
    for w in &world.workloads {
        let r = &world.resources[w.resource];
        if r.kind != "WorkloadEntry" {
            pod(world, r, w, out);
        }
        if r.kind == "Deployment" && (w.has_proxy() || world.injected(w) == Some(true)) {
            contradictions(world, r, w, out);
        }
    }
}

fn namespace<'w, 'a>(world: &World<'a>, r: &'w Resource<'a>, out: &mut Findings<'w, 'a>) {
    if r.name == world.root_namespace || r.name == "flotilla-system" {
        return;
    }
    let legacy = r.labels.get("istio-injection").map(String::as_str);
    let mut said: Vec<String> = legacy.iter().map(|v| format!("istio-injection={v}")).collect();
    for label in ["istio.io/rev", "istio.io/dataplane-mode"] {
        if let Some(v) = r.labels.get(label).filter(|_| legacy.is_none_or(|l| l == "enabled")) {
            said.push(format!("{label}={v}"));
        }
    }
    if said.len() > 1 {
        let message = format!("labels {} contradict each other: keep one", said.join(" and "));
        out.add("IST0123", r, FieldPath::of("metadata.labels"), message);
    }
    if legacy.unwrap_or_default().is_empty() && said.iter().all(|s| s == "istio-injection=") {
        let message = format!(
            "namespace {} does not say whether its pods get a sidecar: label it istio-injection=enabled or istio-injection=disabled",
            r.name
        );
        out.add("IST0102", r, named(), message);
    }
}

fn pod<'w, 'a>(world: &World<'a>, r: &'w Resource<'a>, w: &Workload<'a>, out: &mut Findings<'w, 'a>) {
    let is_pod = r.kind == "Pod";
    let enabled = world
        .namespaces
        .get(w.namespace.as_str())
        .and_then(|i| world.resources.get(*i))
        .is_some_and(|n| n.labels.get("istio-injection").is_some_and(|v| v == "enabled"));
    if is_pod && enabled && world.injected(w) != Some(false) && !w.host_network && !w.has_proxy() {
        let message = "the namespace is enabled for injection, and this pod has no proxy: create it anew";
        out.add("IST0103", r, named(), message);
    }
    if r.labels.contains_key(CONTROL_PLANE) {
        return;
    }
    let theirs =
        w.containers.iter().filter(|c| !c.init && c.name != "istio-proxy" && c.name != "istio-operator");
    if w.user == Some(PROXY_USER) || theirs.into_iter().any(|c| c.user == Some(PROXY_USER)) {
        let message = format!(
            "user {PROXY_USER} is the proxy's: traffic of others who run as it is not captured. Choose another runAsUser"
        );
        out.add("IST0144", r, w.at.clone(), message);
    }
    let auto = w.containers.iter().any(|c| !c.init && c.name == "istio-proxy" && c.image == "auto");
    if auto && is_pod {
        let message =
            "image auto is replaced by injection, which did not happen: enable it and create the pod anew";
        out.add("IST0147", r, w.at.clone(), message);
    } else if auto && r.kind == "Deployment" && world.injected(w) != Some(true) {
        let message = "image auto is replaced by injection, which is not enabled: label the namespace istio-injection=enabled, or the pods sidecar.istio.io/inject=true";
        out.add("IST0146", r, w.at.clone(), message);
    }
}

/// The protocol that a port of a Service names; `None` if it names none.
fn named_protocol(name: &str, app: Option<&str>) -> Option<Protocol> {
    let name = match app {
        Some("kubernetes.io/h2c") => return Some(Protocol::Http2),
        Some("kubernetes.io/ws") => return Some(Protocol::Http),
        Some("kubernetes.io/wss") => return Some(Protocol::Https),
        Some(app) => app,
        None => name,
    };
    if name.to_ascii_lowercase().starts_with("grpc-web") {
        return Some(Protocol::GrpcWeb);
    }
    Protocol::parse(name.split('-').next().unwrap_or_default())
}

fn port_names<'w, 'a>(r: &'w Resource<'a>, s: &Service, out: &mut Findings<'w, 'a>) {
    let managed = r.labels.contains_key("gateway.istio.io/managed");
    if managed || r.labels.contains_key(CONTROL_PLANE) {
        return;
    }
    let external = s.service_type == "ExternalName";
    for (i, p) in s.ports.iter().enumerate() {
        let known = p.protocol == "UDP"
            || named_protocol(&p.name, p.app_protocol.as_deref()).is_some()
            || WELL_KNOWN.contains(&p.port);
        let path = FieldPath::of(&format!("spec.ports[{i}]"));
        if external && (!known || p.name == "tcp") {
            let message = format!(
                "port {} of an ExternalName service must say a protocol that proxies can route by: name it http-..., tls-... or the like",
                p.port
            );
            out.add("IST0150", r, path, message);
        } else if !known {
            let message = format!(
                "port {} ({:?}) says no protocol, so that it is guessed from the first bytes: name it PROTOCOL or PROTOCOL-..., or set appProtocol",
                p.port, p.name
            );
            out.add("IST0118", r, path, message);
        }
    }
}

/// Services in front of one Deployment that contradict each other.
fn contradictions<'w, 'a>(
    world: &World<'a>,
    r: &'w Resource<'a>,
    w: &Workload<'a>,
    out: &mut Findings<'w, 'a>,
) {
    let all = world.each(|s| match s {
        Spec::Service(x) => Some(&**x),
        _ => None,
    });
    let own: Vec<(&Resource<'a>, &Service)> = all
        .filter(|(s, svc)| s.namespace == w.namespace && !svc.selector.is_empty() && w.carries(&svc.selector))
        .collect();
    let mut protocols: BTreeMap<u32, BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
    let mut targets: BTreeMap<String, BTreeMap<u32, &str>> = BTreeMap::new();
    for (s, svc) in &own {
        for p in &svc.ports {
            let protocol = if p.protocol.is_empty() { "TCP" } else { p.protocol.as_str() };
            protocols.entry(p.port).or_default().entry(protocol).or_default().insert(s.name);
            let target = match &p.target_port {
                Some(IntOrString::Int(n)) if *n != 0 => n.to_string(),
                Some(IntOrString::String(s)) if !s.is_empty() => s.clone(),
                _ => p.port.to_string(),
            };
            targets.entry(target).or_default().insert(p.port, s.name);
        }
    }
    for (port, by_protocol) in protocols.iter().filter(|(_, p)| p.len() > 1) {
        let names: BTreeSet<&str> = by_protocol.values().flatten().copied().collect();
        let message = format!(
            "Services {} have port {port} with different protocols ({}): give one of them another port",
            list(names.into_iter()),
            list(by_protocol.keys().copied())
        );
        out.add("IST0116", r, named(), message);
    }
    for (target, ports) in targets.iter().filter(|(_, p)| p.len() > 1) {
        let message = format!(
            "Services {} lead ports {} to the same targetPort {target}: use one port in all of them",
            list(ports.values().copied().collect::<BTreeSet<_>>().into_iter()),
            ports.keys().map(u32::to_string).collect::<Vec<_>>().join(", ")
        );
        out.add("IST0137", r, named(), message);
    }
}

fn list<'s>(names: impl Iterator<Item = &'s str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}
