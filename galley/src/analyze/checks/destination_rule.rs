//! Hosts and subsets of DestinationRules, and roots of their TLS.

use mesh_model::authored::{ClientTlsMode, ClientTlsSettings, DestinationRule, Spec};

use super::{Findings, Resource, World};
use crate::{
    analyze::{
        hosts::{Found, Host},
        world::{Labels, shown},
    },
    path::FieldPath,
};

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let rules = world.each(|s| match s {
        Spec::DestinationRule(d) => Some(&**d),
        _ => None,
    });
    for (r, dr) in rules {
        roots(r, dr, out);
        match world.hosts.find(&dr.host, &r.namespace, world.applied(dr)) {
            Found::Here(host) => subsets(world, r, dr, host, out),
            Found::Elsewhere => {}
            // A rule for many hosts is for those that there are.
            Found::Nowhere if dr.host.starts_with('*') => {}
            Found::Nowhere => {
                let message = format!("host {:?} does not exist: the rule is for no service", dr.host);
                out.add("IST0174", r, FieldPath::of("spec.host"), message);
            }
        }
    }
}

fn roots<'w, 'a>(r: &'w Resource<'a>, dr: &DestinationRule, out: &mut Findings<'w, 'a>) {
    let Some(policy) = &dr.traffic_policy else { return };
    let open = |t: Option<&ClientTlsSettings>| {
        t.is_some_and(|t| {
            let own = matches!(t.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual);
            let secret = !t.credential_name.is_empty() && dr.workload_selector.is_some();
            own && t.ca_certificates.is_empty() && !secret
        })
    };
    let message = |of: &str| {
        format!(
            "TLS to {:?}{of} names no caCertificates, so that nothing says which roots the server's certificate must come from: set them",
            dr.host
        )
    };
    if open(policy.tls.as_ref()) {
        out.add("IST0128", r, FieldPath::of("spec.trafficPolicy.tls"), message(""));
    }
    for (i, s) in policy.port_level_settings.iter().enumerate().filter(|(_, s)| open(s.tls.as_ref())) {
        let port = s.port.as_ref().map_or(0, |p| p.number);
        let path = FieldPath::of(&format!("spec.trafficPolicy.portLevelSettings[{i}].tls"));
        out.add("IST0129", r, path, message(&format!(", port {port},")));
    }
}

/// Labels that endpoints get from where they are, which documents do not tell.
fn of_place(label: &str) -> bool {
    label.starts_with("topology.") || label == "kubernetes.io/hostname" || label.ends_with("istio-locality")
}

fn subsets<'w, 'a>(
    world: &World<'a>,
    r: &'w Resource<'a>,
    dr: &DestinationRule,
    host: &Host<'_>,
    out: &mut Findings<'w, 'a>,
) {
    let own: Vec<&Labels> = match host.selector {
        Some((ns, labels)) => world
            .workloads
            .iter()
            .filter(|w| w.namespace == ns && w.carries(labels))
            .map(|w| &w.labels)
            .collect(),
        None => host.endpoints.clone(),
    };
    // Nothing is known of the service's workloads: they may be in another cluster.
    if world.hosts.shared(&dr.host, &r.namespace) {
        return;
    }
    if own.is_empty() && !(world.all_workloads && host.selector.is_some()) {
        return;
    }
    for (i, s) in dr.subsets.iter().enumerate() {
        let wanted: Labels = s
            .labels
            .iter()
            .filter(|(k, v)| !of_place(k) || v.is_empty())
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        let some = own.iter().any(|l| wanted.iter().all(|(k, v)| l.get(k) == Some(v)));
        if !some {
            let message = format!(
                "subset {:?} ({}) selects no workload of {:?}: its requests get 503. Correct the labels, or remove it",
                s.name,
                shown(&wanted),
                dr.host
            );
            out.add("IST0173", r, FieldPath::of(&format!("spec.subsets[{i}]")), message);
        }
    }
}
