//! ServiceEntries that need an address, and ones that contradict each other.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::authored::{ServiceEntry, Spec};

use super::{Findings, Resource, World, named};
use crate::{analyze::hosts::scopes, path::FieldPath};

fn pick(s: &Spec) -> Option<&ServiceEntry> {
    match s {
        Spec::ServiceEntry(e) => Some(e),
        _ => None,
    }
}

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let mut by_port: BTreeMap<(String, &'a str, u32), Vec<(&'w Resource<'a>, String)>> = BTreeMap::new();
    for (r, se) in world.each(pick) {
        // Names get an address by themselves; a wildcard cannot.
        let wildcard = se.addresses.is_empty() && se.hosts.iter().any(|h| h.starts_with('*'));
        for (i, p) in se.ports.iter().enumerate() {
            if wildcard && (p.protocol.is_empty() || p.protocol.eq_ignore_ascii_case("TCP")) {
                let message = format!(
                    "port {} is plain TCP, which is told apart by its address alone, and a wildcard has none: set addresses, or protocol TLS if that is what it speaks",
                    p.number
                );
                out.add("IST0134", r, FieldPath::of(&format!("spec.ports[{i}]")), message);
            }
            for scope in scopes(world.offered(se), &r.namespace) {
                for h in &se.hosts {
                    let key = (scope.clone(), h.as_str(), p.number);
                    by_port.entry(key).or_default().push((r, p.protocol.to_ascii_uppercase()));
                }
            }
        }
    }
    let mut told = BTreeSet::new();
    for ((scope, host, port), list) in &by_port {
        let mut all = list.clone();
        if scope != "*"
            && let Some(public) = by_port.get(&("*".to_owned(), *host, *port))
        {
            all.extend(public.iter().cloned());
        }
        let protocols: BTreeSet<&str> = all.iter().map(|(_, p)| p.as_str()).collect();
        if protocols.len() < 2 {
            continue;
        }
        let names: BTreeSet<String> = all.iter().map(|(r, _)| r.full_name()).collect();
        let message = format!(
            "ServiceEntries {} have port {port} of {host:?} with different protocols ({}): use one",
            names.iter().cloned().collect::<Vec<_>>().join(", "),
            protocols.into_iter().collect::<Vec<_>>().join(", ")
        );
        for (r, _) in all {
            if told.insert(r.full_name()) {
                out.add("IST0177", r, named(), message.clone());
            }
        }
    }
}
