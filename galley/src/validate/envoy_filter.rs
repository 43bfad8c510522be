//! Rules of EnvoyFilter and ProxyConfig. The values that an EnvoyFilter patches in are Envoy's messages, which are
//! not known here: only their place is checked. Pilot, which applies them, reports those that cannot be.

use std::collections::BTreeMap;

use mesh_model::authored::{
    ApplyTo, EnvoyConfigObjectMatch, EnvoyConfigObjectPatch, EnvoyFilter, FilterMatch, PatchContext,
    PatchOperation, ProxyConfig,
};

use super::{
    common::{self, Findings},
    security,
};
use crate::path::Path;

/// Names by which Envoy once called its filters.
const OLD_NAMES: [(&str, &str); 4] = [
    ("envoy.http_connection_manager", "envoy.filters.network.http_connection_manager"),
    ("envoy.tcp_proxy", "envoy.filters.network.tcp_proxy"),
    ("envoy.router", "envoy.filters.http.router"),
    ("envoy.lua", "envoy.filters.http.lua"),
];
const CONNECTION_MANAGER: [&str; 2] =
    ["envoy.filters.network.http_connection_manager", "envoy.http_connection_manager"];

pub(super) fn check(f: &EnvoyFilter, p: &Path<'_>, out: &mut Findings) {
    if let Some(s) = &f.workload_selector {
        common::selector(&s.labels, &p.key("workloadSelector"), "labels", out);
    }
    security::targets(None, &f.target_refs, f.workload_selector.is_some(), p, out);
    let patches = p.key("configPatches");
    for (i, c) in f.config_patches.iter().enumerate() {
        patch(c, &patches.index(i), out);
    }
}

fn patch(c: &EnvoyConfigObjectPatch, p: &Path<'_>, out: &mut Findings) {
    if let Some(m) = &c.matches {
        let waypoint = m.context == PatchContext::Waypoint;
        if waypoint != m.waypoint.is_some() {
            out.error(&p.key("match"), "waypoint is matched in context WAYPOINT, and nothing else is there");
        }
        if waypoint {
            out.warning(&p.key("match"), "there are no waypoints: accepted but not enforced yet");
            return;
        }
    }
    match c.apply_to {
        ApplyTo::Invalid => out.error(&p.key("applyTo"), "applyTo is required, such as HTTP_FILTER"),
        ApplyTo::Bootstrap => out.warning(
            &p.key("applyTo"),
            "without effect: a proxy's bootstrap is a file of its own, which the control plane does not make",
        ),
        _ => {}
    }
    match &c.patch {
        None => out.error(&p.key("patch"), "a patch is required"),
        Some(x) => {
            let at = p.key("patch");
            if x.operation == PatchOperation::Invalid {
                out.error(&at.key("operation"), "an operation is required, such as MERGE");
            } else if x.operation != PatchOperation::Remove && x.value.is_none() {
                out.error(&at.key("value"), "a value is required for every operation but REMOVE");
            }
        }
    }
    let Some(m) = &c.matches else { return };
    let p = p.key("match");
    if let Some(proxy) = &m.proxy {
        let at = p.key("proxy");
        let at = at.key("proxyVersion");
        if proxy.proxy_version.len() > 1024 {
            out.warning(&at, "longer than 1024 bytes: ignored");
        } else if !proxy.proxy_version.is_empty() {
            common::regex(&proxy.proxy_version, &at, out);
        }
    }
    objects(c.apply_to, m, &p, out);
    if m.listener.as_ref().is_some_and(|l| !l.port_name.is_empty()) {
        out.warning(
            &p.key("listener").key("portName"),
            "without effect, as in Istio: match by portNumber or name",
        );
    }
    if let Some(f) = m.listener.as_ref().and_then(|l| l.filter_chain.as_ref()).and_then(|f| f.filter.as_ref())
    {
        let at = p.key("listener");
        let at = at.key("filterChain");
        filter(c.apply_to, f, &at.key("filter"), out);
    }
}

/// The match must be on the kind of object that the patch is for.
fn objects(to: ApplyTo, m: &EnvoyConfigObjectMatch, p: &Path<'_>, out: &mut Findings) {
    let given = [
        (m.listener.is_some(), "listener"),
        (m.route_configuration.is_some(), "routeConfiguration"),
        (m.cluster.is_some(), "cluster"),
        (m.waypoint.is_some(), "waypoint"),
    ];
    let given: Vec<&str> = given.iter().filter(|(set, _)| *set).map(|(_, field)| *field).collect();
    if given.len() > 1 {
        out.error(p, format!("only one of {} is allowed", given.join(", ")));
    }
    let wanted = match to {
        ApplyTo::Listener | ApplyTo::FilterChain | ApplyTo::NetworkFilter | ApplyTo::HttpFilter => "listener",
        ApplyTo::RouteConfiguration | ApplyTo::VirtualHost | ApplyTo::HttpRoute => "routeConfiguration",
        ApplyTo::Cluster => "cluster",
        ApplyTo::Invalid | ApplyTo::ExtensionConfig | ApplyTo::Bootstrap | ApplyTo::ListenerFilter => return,
    };
    if let Some(other) = given.iter().find(|g| **g != wanted) {
        out.error(&p.key(other), format!("applyTo is matched by {wanted}, not by {other}"));
    }
}

fn filter(to: ApplyTo, f: &FilterMatch, p: &Path<'_>, out: &mut Findings) {
    if matches!(to, ApplyTo::Listener | ApplyTo::FilterChain) {
        out.warning(p, "without effect: a filter is only matched for filters");
    }
    if f.name.is_empty() {
        out.error(&p.key("name"), "the filter's name is required");
    }
    let mut names = vec![(p.key("name"), f.name.as_str())];
    let sub_path = p.key("subFilter");
    if let Some(sub) = &f.sub_filter {
        if to != ApplyTo::HttpFilter {
            out.error(&sub_path, "a subFilter is only for applyTo HTTP_FILTER");
        }
        if !CONNECTION_MANAGER.contains(&f.name.as_str()) {
            out.error(&sub_path, format!("a subFilter needs filter {}", CONNECTION_MANAGER[0]));
        }
        if sub.name.is_empty() {
            out.error(&sub_path.key("name"), "the filter's name is required");
        }
        names.push((sub_path.key("name"), &sub.name));
    }
    for (at, name) in names {
        if let Some((_, new)) = OLD_NAMES.iter().find(|(old, _)| *old == name) {
            out.warning(&at, format!("{name:?} is an old name; use {new:?}"));
        }
    }
}

pub(super) fn check_proxy(c: &ProxyConfig, p: &Path<'_>, out: &mut Findings) {
    security::selector(c.selector.as_ref(), p, out);
    if let Some(n) = c.concurrency {
        common::not_negative(n.into(), &p.key("concurrency"), out);
    }
    on_demand(&c.environment_variables, &p.key("environmentVariables"), out);
    if c.image.is_some() {
        out.warning(&p.key("image"), "without effect: nobody injects proxies");
    }
    if c.environment_variables.keys().any(|k| k != ON_DEMAND) {
        out.warning(
            &p.key("environmentVariables"),
            format!("accepted but not enforced yet, apart from {ON_DEMAND}"),
        );
    }
}

/// Variable by which proxies get only what they ask for.
pub(super) const ON_DEMAND: &str = "FLOTILLA_ON_DEMAND";

/// What an environment says of [`ON_DEMAND`].
pub(super) fn on_demand(environment: &BTreeMap<String, String>, p: &Path<'_>, out: &mut Findings) {
    if let Some(v) = environment.get(ON_DEMAND).filter(|v| !["true", "false"].contains(&v.as_str())) {
        out.error(&p.key(ON_DEMAND), format!("{v:?} is neither \"true\" nor \"false\""));
    }
}
