//! BackendTLSPolicies as TLS of DestinationRules. As in Istio they hold for all callers, sidecars among them.

use std::collections::HashSet;
use std::sync::Arc;

use mesh_model::authored::{
    ClientTlsMode, ClientTlsSettings, DestinationRule, PortSelector, PortTrafficPolicy, TrafficPolicy,
    gateway_api::{BackendTlsPolicy, PolicyTarget},
};

use super::{backends, known::Known, made, service_host};
use crate::{
    config::{Doc, by_age},
    hosts,
};

/// TLS of a service, or of one of its ports.
pub(super) struct Rule {
    namespace: String,
    host: String,
    port: Option<u32>,
    created: u64,
    tls: ClientTlsSettings,
}

/// What applies: of policies with one target the oldest, those with a `sectionName` first.
pub(super) fn rules(known: &Known<'_>) -> Vec<Rule> {
    let mut taken = HashSet::new();
    let mut out = Vec::new();
    for p in &known.docs.backend_tls {
        let tls = settings(known, p);
        for t in &p.spec.target_refs {
            let Ok(port) = target(known, p, t) else { continue };
            let host = service_host(&t.name, &p.namespace);
            if taken.insert((host.clone(), port)) {
                let namespace = p.namespace.clone();
                out.push(Rule { namespace, host, port, created: p.created, tls: tls.clone() });
            }
        }
    }
    // Ports take over what the whole service has.
    out.sort_by_key(|r| r.port.is_some());
    out
}

/// The port that a target names; why it is none.
pub(super) fn target(
    known: &Known<'_>,
    p: &Doc<BackendTlsPolicy>,
    t: &PolicyTarget,
) -> Result<Option<u32>, String> {
    if !matches!(t.group.as_str(), "" | "core") || t.kind != "Service" {
        return Err(format!("target {} is a {}/{}, not a Service", t.name, t.group, t.kind));
    }
    let Some(service) = known.service(&p.namespace, &t.name) else {
        return Err(format!("there is no Service {}/{}", p.namespace, t.name));
    };
    let Some(section) = &t.section_name else { return Ok(None) };
    let ports = service.map(|s| s.ports.as_slice()).unwrap_or_default();
    let found = ports.iter().find(|p| p.name == *section).map(|p| p.port);
    found.map(Some).ok_or_else(|| format!("Service {}/{} has no port called {section}", p.namespace, t.name))
}

/// A reference to roots that is none.
pub(super) fn unresolved(known: &Known<'_>, p: &Doc<BackendTlsPolicy>) -> Option<String> {
    let refs = p.spec.validation.iter().flat_map(|v| &v.ca_certificate_refs);
    refs.filter_map(|r| backends::credential(known, &p.namespace, r, &["ConfigMap", "Secret"]).err())
        .map(|e| e.message)
        .next()
}

fn settings(known: &Known<'_>, p: &Doc<BackendTlsPolicy>) -> ClientTlsSettings {
    let mut out = ClientTlsSettings { mode: ClientTlsMode::Simple, ..ClientTlsSettings::default() };
    let Some(v) = &p.spec.validation else { return out };
    out.sni.clone_from(&v.hostname);
    let names = v.subject_alt_names.iter().filter_map(|n| n.hostname.clone().or_else(|| n.uri.clone()));
    out.subject_alt_names = names.collect();
    if out.subject_alt_names.is_empty() {
        out.subject_alt_names.push(v.hostname.clone());
    }
    // Without it the roots of the system count. Roots that cannot be had are never those.
    if let Some(r) = v.ca_certificate_refs.first() {
        let name = backends::credential(known, &p.namespace, r, &["ConfigMap", "Secret"]);
        out.credential_name = name.unwrap_or_else(|_| format!("invalid_{}", r.name));
    } else if v.well_known_ca_certificates.as_deref().is_some_and(|w| w != "System") {
        out.credential_name = "invalid_well-known".to_owned();
    }
    out
}

/// Adds TLS to the rules of its services, authored ones among them: of two rules only one would count.
pub(super) fn merge(all: &mut Vec<Doc<DestinationRule>>, rules: Vec<Rule>) {
    for r in rules {
        let mut found = false;
        for d in all.iter_mut() {
            if d.namespace == r.namespace && hosts::resolve(&d.spec.host, &d.namespace) == r.host {
                let mut spec = (*d.spec).clone();
                set(spec.traffic_policy.get_or_insert_with(TrafficPolicy::default), &r);
                for p in spec.subsets.iter_mut().filter_map(|s| s.traffic_policy.as_mut()) {
                    set(p, &r);
                }
                d.spec = Arc::new(spec);
                found = true;
            }
        }
        if !found {
            let mut policy = TrafficPolicy::default();
            set(&mut policy, &r);
            let spec = DestinationRule {
                host: r.host.clone(),
                traffic_policy: Some(policy),
                ..DestinationRule::default()
            };
            let name = format!("{}~tls", r.host);
            all.push(made(&r.namespace, name, r.created, [], spec));
        }
    }
    by_age(all);
}

/// Sets TLS where the policy has none.
fn set(policy: &mut TrafficPolicy, r: &Rule) {
    let Some(port) = r.port else {
        policy.tls.get_or_insert_with(|| r.tls.clone());
        for p in &mut policy.port_level_settings {
            p.tls.get_or_insert_with(|| r.tls.clone());
        }
        return;
    };
    let same = |p: &&mut PortTrafficPolicy| p.port.as_ref().is_some_and(|s| s.number == port);
    match policy.port_level_settings.iter_mut().find(same) {
        Some(p) => p.tls = Some(r.tls.clone()),
        // Settings of a port replace all blocks of the rule.
        None => policy.port_level_settings.push(PortTrafficPolicy {
            port: Some(PortSelector { number: port, ..PortSelector::default() }),
            load_balancer: policy.load_balancer.clone(),
            connection_pool: policy.connection_pool.clone(),
            outlier_detection: policy.outlier_detection.clone(),
            tls: Some(r.tls.clone()),
        }),
    }
}
