//! Ingresses that the mesh serves: where their paths lead, their secrets, and each other.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::authored::{
    MeshConfig, Service, Spec,
    ingress::{Ingress, IngressPath, IngressServiceBackend, IngressStanding, NamedClass, ServiceBackendPort},
};

use super::{Findings, Resource, World, gateway};
use crate::{analysis::qualify, analyze::hosts::Found, path::FieldPath};

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let unset = MeshConfig::default();
    let mesh = world.mesh.unwrap_or(&unset);
    let all = served(world, mesh);
    if all.is_empty() {
        return;
    }
    let services: BTreeMap<String, &Service> = world
        .each(|s| match s {
            Spec::Service(x) => Some(&**x),
            _ => None,
        })
        .map(|(r, s)| (r.full_name(), s))
        .collect();
    for (r, i) in &all {
        for (n, _, http) in i.hosts() {
            for (m, path) in http.paths.iter().enumerate() {
                if let Some(s) = &path.backend.service {
                    let at = format!("spec.rules[{n}].http.paths[{m}].backend.service");
                    backend(world, &services, r, s, &at, out);
                }
            }
        }
    }
    certificates(world, mesh, &all, out);
    paths(&all, out);
}

/// Those that the mesh serves, in the order that conflicts are resolved in.
fn served<'w, 'a>(world: &'w World<'a>, mesh: &MeshConfig) -> Vec<(&'w Resource<'a>, &'a Ingress)> {
    let created = |r: &Resource<'_>| r.parsed.typed.as_ref().map_or(0, |d| d.metadata.creation_timestamp);
    let classes: Vec<NamedClass<'_>> = world
        .each(|s| match s {
            Spec::IngressClass(c) => Some(&**c),
            _ => None,
        })
        .map(|(r, class)| NamedClass {
            name: r.name,
            created: created(r),
            annotations: &r.annotations,
            class,
        })
        .collect();
    let mut all: Vec<_> = world
        .each(|s| match s {
            Spec::Ingress(i) => Some(&**i),
            _ => None,
        })
        .filter(|(r, i)| i.standing(&r.annotations, mesh, classes.iter().copied()) == IngressStanding::Served)
        .collect();
    all.sort_by_key(|(r, _)| (created(r), r.name, r.namespace.clone()));
    all
}

fn backend<'w, 'a>(
    world: &World<'a>,
    services: &BTreeMap<String, &Service>,
    r: &'w Resource<'a>,
    s: &IngressServiceBackend,
    at: &str,
    out: &mut Findings<'w, 'a>,
) {
    let host = match world.hosts.find(&s.name, &r.namespace, &[]) {
        Found::Elsewhere => return,
        Found::Nowhere => {
            let hint = match world.hosts.elsewhere(&s.name, &r.namespace) {
                Some(other) => format!("{other} is of another namespace: move the Ingress there"),
                None => "create it in the Ingress's namespace".to_owned(),
            };
            let full = qualify(&s.name, &r.namespace);
            let message = format!("Service {:?} ({full}) does not exist: {hint}", s.name);
            out.add("IST0101", r, FieldPath::of(&format!("{at}.name")), message);
            return;
        }
        Found::Here(host) => host,
    };
    let path = FieldPath::of(&format!("{at}.port"));
    match &s.port {
        ServiceBackendPort { name, number: 0 } => {
            let known = services.get(&format!("{}/{}", r.namespace, s.name));
            let names: Vec<&str> = known.iter().flat_map(|s| &s.ports).map(|p| p.name.as_str()).collect();
            if !names.contains(&name.as_str()) {
                let message = format!("Service {:?} has no port {name:?}, but {}", s.name, names.join(", "));
                out.add("IST0101", r, path, message);
            }
        }
        port if !host.ports.contains(&port.number) => {
            let list = host.ports.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            let message = format!("Service {:?} has no port {}, but {list}", s.name, port.number);
            out.add("IST0101", r, path, message);
        }
        _ => {}
    }
}

/// Secrets, which are beside the gateways, and hosts that have several.
fn certificates<'w, 'a>(
    world: &'w World<'a>,
    mesh: &MeshConfig,
    all: &[(&'w Resource<'a>, &'a Ingress)],
    out: &mut Findings<'w, 'a>,
) {
    let secrets = gateway::secrets(world);
    let labels = mesh.ingress_labels();
    let proxies = world.workloads.iter().find(|w| w.carries(&labels));
    let namespace = proxies.map_or(world.root_namespace.as_str(), |w| w.namespace.as_str());
    let complete = world.all_workloads && proxies.is_some();
    let mut by_host: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (r, i) in all {
        for (n, t) in i.tls.iter().enumerate().filter(|(_, t)| !t.secret_name.is_empty()) {
            let path = FieldPath::of(&format!("spec.tls[{n}].secretName"));
            gateway::credential(r, path, &t.secret_name, &[namespace], &secrets, complete, out);
            for h in hosts(&t.hosts) {
                by_host.entry(h).or_default().insert(r.full_name());
            }
        }
    }
    // Whose Gateway the rules of a host are at.
    let mut holders: BTreeMap<&str, String> = BTreeMap::new();
    for (r, i) in all {
        for (_, host, _) in i.hosts() {
            holders.entry(host).or_insert_with(|| r.full_name());
        }
    }
    for (r, i) in all {
        for (n, t) in i.tls.iter().enumerate().filter(|(_, t)| !t.secret_name.is_empty()) {
            let path = || FieldPath::of(&format!("spec.tls[{n}].hosts"));
            let twice = hosts(&t.hosts).find_map(|h| Some((h, by_host.get(h).filter(|l| l.len() > 1)?)));
            if let Some((host, list)) = twice {
                let names = list.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                let message = format!(
                    "Ingresses {names} have TLS for the same host {host:?}: only one of them is served at port 443. Put tls and rules of a host into one Ingress"
                );
                out.add("IST0145", r, path(), message);
                continue;
            }
            let elsewhere =
                hosts(&t.hosts).find_map(|h| Some((h, holders.get(h).filter(|o| **o != r.full_name())?)));
            if let Some((host, other)) = elsewhere {
                let message = format!(
                    "rules of host {host:?} are those of Ingress {other}, which has no tls for it: nothing is found at port 443. Put tls and rules of a host into one Ingress"
                );
                out.add("IST0132", r, path(), message);
            }
        }
    }
}

/// Hosts with one certificate; none is all.
fn hosts(list: &[String]) -> impl Iterator<Item = &str> {
    let all = list.is_empty().then_some("*");
    list.iter().map(String::as_str).chain(all)
}

/// Paths that somebody before has, too.
fn paths<'w, 'a>(all: &[(&'w Resource<'a>, &'a Ingress)], out: &mut Findings<'w, 'a>) {
    let mut first: BTreeMap<(&str, IngressPath<'_>), &Resource<'_>> = BTreeMap::new();
    for (r, i) in all {
        for (n, host, http) in i.hosts() {
            for (m, path) in http.paths.iter().enumerate() {
                let condition = match path.condition() {
                    IngressPath::Prefix("/") => IngressPath::Any,
                    IngressPath::Prefix(p) => IngressPath::Prefix(p.strip_suffix('/').unwrap_or(p)),
                    other => other,
                };
                if let Some(other) = first.get(&(host, condition)) {
                    let message = format!(
                        "Ingress {} leads path {:?} of host {host:?} elsewhere before: remove one of them",
                        other.full_name(),
                        path.path
                    );
                    let at = format!("spec.rules[{n}].http.paths[{m}].path");
                    out.add("IST0130", r, FieldPath::of(&at), message);
                } else {
                    first.insert((host, condition), r);
                }
            }
        }
    }
}
