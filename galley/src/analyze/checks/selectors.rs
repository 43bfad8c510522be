//! Sidecars, Telemetries and policies, and the workloads that they select.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::authored::{AuthorizationPolicy, LabelSelector, Spec};

use super::{Findings, Resource, World, named};
use crate::{
    analyze::world::{Labels, Workload, shown},
    path::FieldPath,
};

/// Label of workloads that the Gateway API made.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let empty = |l: &&Labels| !l.is_empty();
    let sidecars = world.resources.iter().filter_map(|r| match r.spec()? {
        Spec::Sidecar(s) => Some((r, s.workload_selector.as_ref().map(|w| &w.labels).filter(empty))),
        _ => None,
    });
    let codes = Codes { same: "IST0110", several: "IST0111", path: "spec.workloadSelector" };
    exclusive(world, "Sidecar", sidecars, &codes, out);
    let telemetries = world.resources.iter().filter_map(|r| match r.spec()? {
        Spec::Telemetry(t) if t.target_ref.is_none() && t.target_refs.is_empty() => {
            Some((r, t.selector.as_ref().map(|s| &s.match_labels).filter(empty)))
        }
        _ => None,
    });
    let codes = Codes { same: "IST0159", several: "IST0160", path: "spec.selector" };
    exclusive(world, "Telemetry", telemetries, &codes, out);
    for r in &world.resources {
        match r.spec() {
            Some(Spec::AuthorizationPolicy(a)) => {
                authorization(world, r, a, out);
                on_gateway_api(
                    world,
                    r,
                    a.selector.as_ref(),
                    a.target_ref.is_some() || !a.target_refs.is_empty(),
                    out,
                );
            }
            Some(Spec::RequestAuthentication(a)) => {
                on_gateway_api(
                    world,
                    r,
                    a.selector.as_ref(),
                    a.target_ref.is_some() || !a.target_refs.is_empty(),
                    out,
                );
            }
            Some(Spec::WasmPlugin(a)) => {
                on_gateway_api(
                    world,
                    r,
                    a.selector.as_ref(),
                    a.target_ref.is_some() || !a.target_refs.is_empty(),
                    out,
                );
            }
            Some(Spec::Telemetry(t)) => {
                on_gateway_api(
                    world,
                    r,
                    t.selector.as_ref(),
                    t.target_ref.is_some() || !t.target_refs.is_empty(),
                    out,
                );
                for (i, l) in t.access_logging.iter().enumerate() {
                    if l.providers.is_empty() && l.disabled != Some(true) {
                        let path = FieldPath::of(&format!("spec.accessLogging[{i}]"));
                        let message = "the access log has no providers, so that it goes nowhere: name one, or set disabled";
                        out.add("IST0157", r, path, message);
                    }
                }
            }
            _ => {}
        }
    }
}

/// How conflicts of a kind are told.
struct Codes {
    same: &'static str,
    several: &'static str,
    path: &'static str,
}

/// A kind of which one document applies to a workload: one without selector per namespace, and one that selects it.
fn exclusive<'w, 'a>(
    world: &'w World<'a>,
    kind: &str,
    documents: impl Iterator<Item = (&'w Resource<'a>, Option<&'a Labels>)>,
    codes: &Codes,
    out: &mut Findings<'w, 'a>,
) {
    let mut defaults: BTreeMap<&str, Vec<&'w Resource<'a>>> = BTreeMap::new();
    let mut selected: BTreeMap<usize, Vec<&'w Resource<'a>>> = BTreeMap::new();
    for (r, selector) in documents {
        let Some(labels) = selector else {
            defaults.entry(&r.namespace).or_default().push(r);
            continue;
        };
        let mut some = false;
        for (i, _) in world
            .workloads
            .iter()
            .enumerate()
            .filter(|(_, w)| w.namespace == r.namespace && w.carries(labels))
        {
            some = true;
            selected.entry(i).or_default().push(r);
        }
        if !some && world.all_workloads {
            let message = format!(
                "no workload of namespace {} carries the labels {}: correct the selector, or remove the {kind}",
                r.namespace,
                shown(labels)
            );
            out.add("IST0101", r, FieldPath::of(codes.path), message);
        }
    }
    let names = |list: &[&Resource<'a>]| {
        list.iter().map(|r| r.name).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
    };
    let mut told: BTreeSet<(String, String)> = BTreeSet::new();
    for (i, list) in selected.iter().filter(|(_, l)| l.len() > 1) {
        let all = names(list);
        for r in list {
            // Once per set of documents, by the first workload.
            if told.insert((r.full_name(), all.clone())) {
                let w = &world.workloads[*i];
                let message = format!(
                    "{kind} documents {all} select the same workload {}/{}, and only one applies: make their selectors different, or merge them",
                    w.namespace, w.name
                );
                out.add(codes.same, r, named(), message);
            }
        }
    }
    for (ns, list) in defaults.iter().filter(|(_, l)| l.len() > 1) {
        for r in list {
            let message = format!(
                "{kind} documents {} are all for the whole of namespace {ns}, and only one applies: merge them, or give them selectors",
                names(list)
            );
            out.add(codes.several, r, named(), message);
        }
    }
}

fn authorization<'w, 'a>(
    world: &World<'a>,
    r: &'w Resource<'a>,
    a: &AuthorizationPolicy,
    out: &mut Findings<'w, 'a>,
) {
    let attached = a.target_ref.is_some() || !a.target_refs.is_empty();
    if world.all_workloads && !attached {
        let mesh = r.namespace == world.root_namespace;
        let labels = a.selector.as_ref().map(|s| &s.match_labels);
        let fits = |w: &Workload<'_>| {
            (mesh || w.namespace == r.namespace)
                && labels.is_none_or(|l| w.carries(l))
                && (w.has_proxy() || world.injected(w) != Some(false))
        };
        let everywhere = mesh && labels.is_none();
        if !everywhere && !world.workloads.iter().any(fits) {
            let of = match labels {
                Some(l) => format!(" with the labels {}", shown(l)),
                None => String::new(),
            };
            let message = format!(
                "there is no workload of the mesh{of} that the policy is for: correct the selector, or remove it"
            );
            let path = if labels.is_some() { FieldPath::of("spec.selector") } else { named() };
            out.add("IST0127", r, path, message);
        }
    }
    // Without a single Namespace document nothing is known of them.
    if world.namespaces.is_empty() {
        return;
    }
    for (i, rule) in a.rules.iter().enumerate() {
        for (j, s) in
            rule.from.iter().flatten().enumerate().filter_map(|(j, f)| Some((j, f.source.as_ref()?)))
        {
            for (list, field) in [(&s.namespaces, "namespaces"), (&s.not_namespaces, "notNamespaces")] {
                for (k, ns) in list.iter().enumerate().filter(|(_, ns)| !exists(world, ns)) {
                    let path = FieldPath::of(&format!("spec.rules[{i}].from[{j}].source.{field}[{k}]"));
                    out.add(
                        "IST0101",
                        r,
                        path,
                        format!("namespace {ns:?} does not exist: correct it, or create it"),
                    );
                }
            }
        }
    }
}

fn exists(world: &World<'_>, pattern: &str) -> bool {
    let fits = |ns: &str| match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(suffix), _) => ns.ends_with(suffix),
        (None, Some(prefix)) => ns.starts_with(prefix),
        (None, None) => ns == pattern,
    };
    pattern == "*" || world.namespaces.keys().any(|ns| fits(ns)) || world.inhabited.iter().any(|ns| fits(ns))
}

/// A selector does not reach what the Gateway API made.
fn on_gateway_api<'w, 'a>(
    world: &World<'a>,
    r: &'w Resource<'a>,
    selector: Option<&LabelSelector>,
    attached: bool,
    out: &mut Findings<'w, 'a>,
) {
    let Some(selector) = selector.filter(|_| !attached) else { return };
    let gateways: BTreeSet<&str> = (world.workloads.iter())
        .filter(|w| w.namespace == r.namespace && w.carries(&selector.match_labels))
        .filter_map(|w| w.labels.get(GATEWAY_NAME).map(String::as_str))
        .collect();
    for g in gateways {
        let message = format!("the selector has no effect on Gateway {g} of the Gateway API: use targetRefs");
        out.add("IST0166", r, FieldPath::of("spec.selector"), message);
    }
}
