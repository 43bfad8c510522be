//! What of these documents does nothing.

use std::collections::HashSet;

use mesh_model::authored::{AuthorizationAction, AuthorizationPolicy};

use crate::{
    config::{Config, Doc, Problem, selects},
    generate,
    index::{Index, Origin},
};

fn problem(kind: &str, d: (&str, &str), message: String) -> Problem {
    Problem { object: format!("{kind} {}/{}", d.0, d.1), message }
}

/// Targets that are no service, bindings of roles that are not there, and roles that newer policies make void.
pub(crate) fn problems(config: &Config, index: &Index) -> Vec<Problem> {
    let docs = &config.v1alpha1;
    let mut out = Vec::new();
    let targets = docs.policies.iter().any(|p| !p.spec.targets.is_empty());
    if targets {
        let known: HashSet<(&str, &str)> = index
            .services
            .values()
            .map(|e| (e.service.namespace.as_str(), e.service.name.as_str()))
            .collect();
        for p in &docs.policies {
            for t in
                p.spec.targets.iter().filter(|t| !known.contains(&(p.namespace.as_str(), t.name.as_str())))
            {
                let says = format!("there is no service {:?} in namespace {}", t.name, p.namespace);
                out.push(problem("Policy", (&p.namespace, &p.name), says));
            }
        }
    }
    for b in &docs.bindings {
        let Some(r) = &b.spec.role_ref else { continue };
        if !docs.roles.iter().any(|d| d.namespace == b.namespace && d.name == r.name) {
            let says =
                format!("there is no ServiceRole {:?} in namespace {}: nobody has it", r.name, b.namespace);
            out.push(problem("ServiceRoleBinding", (&b.namespace, &b.name), says));
        }
    }
    if docs.rbac_configs.is_empty() && docs.cluster_rbac_configs.is_empty() {
        return out;
    }
    let deciding: Vec<_> = config.authorization_policies.iter().filter(|p| decides(p)).collect();
    if deciding.is_empty() {
        return out;
    }
    for e in index.services.values().filter(|e| e.origin != Origin::Member) {
        if generate::by_role(config, e).is_none() {
            continue;
        }
        let void = deciding.iter().find(|p| {
            let here = p.namespace == e.service.namespace || p.namespace == config.root_namespace();
            // Those of references are for gateways.
            let refs = p.spec.target_ref.is_some() || !p.spec.target_refs.is_empty();
            let selected = |labels| p.spec.selector.as_ref().is_none_or(|s| selects(&s.match_labels, labels));
            here && !refs && e.endpoints.iter().any(|e| selected(&e.labels))
        });
        if let Some(p) = void {
            let says = format!(
                "it is for workloads of {}, so that roles of rbac.istio.io do not count there: write them as \
                 AuthorizationPolicies",
                e.service.host
            );
            out.push(problem("AuthorizationPolicy", (&p.namespace, &p.name), says));
        }
    }
    out
}

/// Whether a policy decides anything.
pub(crate) fn decides(p: &Doc<AuthorizationPolicy>) -> bool {
    p.spec.action != AuthorizationAction::Audit && !generate::is_dry_run(p)
}
