//! Operations of EnvoyFilters that have no effect, or one that depends on the order of others.

use std::collections::BTreeSet;

use mesh_model::authored::{ApplyTo, EnvoyConfigObjectPatch, EnvoyFilter, PatchOperation, Spec};

use super::{Findings, Resource, World};
use crate::path::FieldPath;

pub(super) fn check<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    let filters: Vec<(&'w Resource<'a>, &'a EnvoyFilter)> = world
        .each(|s| match s {
            Spec::EnvoyFilter(f) => Some(&**f),
            _ => None,
        })
        .collect();
    // Names of filters that are patched for some versions of the proxy, seen so far.
    let mut versioned: BTreeSet<&str> = BTreeSet::new();
    for (r, f) in filters {
        for (i, c) in f.config_patches.iter().enumerate() {
            let Some(patch) = &c.patch else { break };
            let name = filter_name(c);
            let path = FieldPath::of(&format!("spec.configPatches[{i}]"));
            let routes = matches!(c.apply_to, ApplyTo::RouteConfiguration | ApplyTo::HttpRoute);
            let replaceable =
                matches!(c.apply_to, ApplyTo::NetworkFilter | ApplyTo::HttpFilter | ApplyTo::VirtualHost);
            let relative = match patch.operation {
                PatchOperation::Add if routes => {
                    out.add("IST0153", r, path.clone(), "operation ADD has no effect on ROUTE_CONFIGURATION and HTTP_ROUTE: use MERGE, or VIRTUAL_HOST");
                    false
                }
                PatchOperation::Remove if routes => {
                    out.add("IST0154", r, path.clone(), "operation REMOVE has no effect on ROUTE_CONFIGURATION and HTTP_ROUTE: remove the VIRTUAL_HOST instead");
                    false
                }
                PatchOperation::Replace if !replaceable => {
                    out.add(
                        "IST0152",
                        r,
                        path.clone(),
                        "operation REPLACE is for HTTP_FILTER, NETWORK_FILTER and VIRTUAL_HOST: use MERGE",
                    );
                    false
                }
                PatchOperation::Remove
                | PatchOperation::Replace
                | PatchOperation::InsertBefore
                | PatchOperation::InsertAfter => true,
                _ => false,
            };
            if relative && f.priority == 0 {
                let (code, more) = if versioned.contains(name) {
                    ("IST0155", ", and another filter of the name is for some versions of the proxy only")
                } else {
                    ("IST0151", "")
                };
                let message = format!(
                    "the operation needs what it refers to in place, and without a priority nothing says in which order EnvoyFilters apply{more}: set priority, or use INSERT_FIRST or ADD"
                );
                out.add(code, r, path, message);
            }
            let proxy = c.matches.as_ref().and_then(|m| m.proxy.as_ref());
            if proxy.is_some_and(|p| !p.proxy_version.is_empty()) {
                versioned.insert(name);
            }
        }
    }
}

/// The name of the filter that a patch adds, or else of the one that it matches.
fn filter_name(c: &EnvoyConfigObjectPatch) -> &str {
    let value = c.patch.as_ref().and_then(|p| p.value.as_ref());
    let given = value.and_then(|v| v.get("name")).and_then(|n| n.as_str());
    let chain = c.matches.as_ref().and_then(|m| m.listener.as_ref()).and_then(|l| l.filter_chain.as_ref());
    let matched = chain.and_then(|f| f.filter.as_ref()).map(|f| f.name.as_str());
    given.or(matched).unwrap_or_default()
}
