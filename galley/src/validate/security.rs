//! Rules of PeerAuthentication, RequestAuthentication and AuthorizationPolicy.

use mesh_model::authored::{
    AuthorizationAction, AuthorizationPolicy, Condition, LabelSelector, Operation, PeerAuthentication,
    PolicyTargetReference, RequestAuthentication, Source,
};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check_peer(a: &PeerAuthentication, p: &Path<'_>, out: &mut Findings) {
    selector(a.selector.as_ref(), p, out);
    let Some(ports) = &a.port_level_mtls else { return };
    let at = p.key("portLevelMtls");
    if ports.is_empty() {
        out.error(&at, "at least one port is required");
    }
    if a.selector.as_ref().is_none_or(|s| s.match_labels.is_empty()) {
        out.error(&at, "needs a selector: ports are those of workloads");
    }
    for port in ports.keys() {
        if !port.parse::<u32>().is_ok_and(|n| (1..=65535).contains(&n)) {
            out.error(&at.key(port), format!("{port:?} is not a port within 1..65535"));
        }
    }
}

fn selector(s: Option<&LabelSelector>, p: &Path<'_>, out: &mut Findings) {
    let Some(s) = s else { return };
    let p = p.key("selector");
    let at = p.key("matchLabels");
    common::labels(&s.match_labels, &at, out);
    for (k, v) in &s.match_labels {
        if k.contains('*') || v.contains('*') {
            out.error(&at.key(k), "a selector knows no wildcards");
        }
    }
}

fn target_refs(
    target_ref: Option<&PolicyTargetReference>,
    target_refs: &[PolicyTargetReference],
    selector: bool,
    p: &Path<'_>,
    out: &mut Findings,
) {
    let set = target_ref.is_some() || !target_refs.is_empty();
    if set && selector {
        out.error(p, "only one of selector and targetRefs is allowed");
    }
    if set {
        // Ignoring it would widen the policy to the whole namespace.
        out.error(&p.key("targetRefs"), "targetRefs are not supported yet; use a selector");
    }
}

pub(super) fn check_request(a: &RequestAuthentication, p: &Path<'_>, out: &mut Findings) {
    selector(a.selector.as_ref(), p, out);
    target_refs(a.target_ref.as_ref(), &a.target_refs, a.selector.is_some(), p, out);
    let rules = p.key("jwtRules");
    for (i, r) in a.jwt_rules.iter().enumerate() {
        let at = rules.index(i);
        if r.issuer.is_empty() && r.jwks_uri.is_empty() {
            out.error(&at, "one of issuer and jwksUri is required");
        }
        if r.jwks.is_empty() && r.jwks_uri.is_empty() {
            out.error(&at, "one of jwks and jwksUri is required: keys are not discovered from the issuer");
        }
        if !r.jwks.is_empty() && !r.jwks_uri.is_empty() {
            out.error(&at, "only one of jwks and jwksUri is allowed");
        }
        let uri = r.jwks_uri.as_str();
        if !["http://", "https://"].iter().any(|scheme| uri.is_empty() || uri.starts_with(scheme)) {
            out.error(&at.key("jwksUri"), "expected an http or https URI");
        }
        if !r.jwks.is_empty() && !is_key_set(&r.jwks) {
            out.error(
                &at.key("jwks"),
                "not a JSON Web Key Set: expected {\"keys\": [...]} with at least one key",
            );
        }
        if let Some(j) = r.audiences.iter().position(String::is_empty) {
            out.error(&at.key("audiences").index(j), "an audience must not be empty");
        }
        for (j, h) in r.from_headers.iter().enumerate() {
            common::header_name(&h.name, &at.key("fromHeaders").index(j).key("name"), out);
        }
        for (j, h) in r.output_claim_to_headers.iter().enumerate() {
            common::header_name(&h.header, &at.key("outputClaimToHeaders").index(j).key("header"), out);
        }
    }
}

fn is_key_set(text: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(text)
        .is_ok_and(|v| v.get("keys").and_then(|k| k.as_array()).is_some_and(|k| !k.is_empty()))
}

pub(super) fn check_authorization(a: &AuthorizationPolicy, p: &Path<'_>, out: &mut Findings) {
    selector(a.selector.as_ref(), p, out);
    target_refs(a.target_ref.as_ref(), &a.target_refs, a.selector.is_some(), p, out);
    let rules = p.key("rules");
    match a.action {
        AuthorizationAction::Custom => {
            if a.provider.as_ref().is_none_or(|x| x.name.is_empty()) {
                out.error(&p.key("provider"), "action CUSTOM needs the name of a provider");
            }
            out.error(&p.key("action"), "action CUSTOM is not supported yet");
        }
        AuthorizationAction::Audit => {
            out.warning(
                &p.key("action"),
                "action AUDIT never changes an outcome, and nothing collects its marks yet",
            );
        }
        AuthorizationAction::Allow | AuthorizationAction::Deny => {}
    }
    if a.action != AuthorizationAction::Custom && a.provider.is_some() {
        out.error(&p.key("provider"), "a provider is only for action CUSTOM");
    }
    if a.rules.is_empty() && matches!(a.action, AuthorizationAction::Deny | AuthorizationAction::Custom) {
        out.error(&rules, "at least one rule is required: without any, nothing would ever match");
    }
    for (i, r) in a.rules.iter().enumerate() {
        let at = rules.index(i);
        if let Some(from) = &r.from {
            let at = at.key("from");
            if from.is_empty() {
                out.error(&at, "an empty list; leave it out to match every source");
            }
            for (j, f) in from.iter().enumerate() {
                let at = at.index(j);
                match &f.source {
                    Some(s) if *s != Source::default() => source(s, &at.key("source"), out),
                    _ => out.error(&at.key("source"), "a source needs at least one field"),
                }
            }
        }
        if let Some(to) = &r.to {
            let at = at.key("to");
            if to.is_empty() {
                out.error(&at, "an empty list; leave it out to match every operation");
            }
            for (j, t) in to.iter().enumerate() {
                let at = at.index(j);
                match &t.operation {
                    Some(o) if *o != Operation::default() => operation(o, &at.key("operation"), out),
                    _ => out.error(&at.key("operation"), "an operation needs at least one field"),
                }
            }
        }
        let when = at.key("when");
        for (j, c) in r.when.iter().enumerate() {
            condition(c, &when.index(j), out);
        }
    }
}

fn each(
    list: &[String],
    p: &Path<'_>,
    out: &mut Findings,
    mut check: impl FnMut(&str, &Path<'_>, &mut Findings),
) {
    for (i, s) in list.iter().enumerate() {
        let at = p.index(i);
        if s.is_empty() {
            out.error(&at, "must not be empty");
        } else {
            check(s, &at, out);
        }
    }
}

/// `a`, `a*`, `*a` or `*`: nothing else.
fn pattern(s: &str, p: &Path<'_>, out: &mut Findings) {
    let stars = s.matches('*').count();
    if stars > 1 || stars == 1 && !s.starts_with('*') && !s.ends_with('*') {
        out.error(p, format!("{s:?}: a '*' may only be the first or the last character"));
    }
}

fn source(s: &Source, p: &Path<'_>, out: &mut Findings) {
    for (list, field) in [
        (&s.principals, "principals"),
        (&s.not_principals, "notPrincipals"),
        (&s.namespaces, "namespaces"),
        (&s.not_namespaces, "notNamespaces"),
        (&s.trust_domains, "trustDomains"),
        (&s.not_trust_domains, "notTrustDomains"),
    ] {
        each(list, &p.key(field), out, |v, at, out| {
            pattern(v, at, out);
            if v.starts_with("spiffe://") {
                out.error(at, "a principal is written without spiffe://");
            }
        });
    }
    for (list, field) in
        [(&s.request_principals, "requestPrincipals"), (&s.not_request_principals, "notRequestPrincipals")]
    {
        each(list, &p.key(field), out, pattern);
    }
    for (list, field) in
        [(&s.service_accounts, "serviceAccounts"), (&s.not_service_accounts, "notServiceAccounts")]
    {
        each(list, &p.key(field), out, |v, at, out| {
            if v.contains('*') || v.matches('/').count() > 1 {
                out.error(
                    at,
                    format!("{v:?} is not namespace/account or account; wildcards are not allowed"),
                );
            }
        });
    }
    let accounts = !s.service_accounts.is_empty() || !s.not_service_accounts.is_empty();
    let others = !s.principals.is_empty()
        || !s.not_principals.is_empty()
        || !s.namespaces.is_empty()
        || !s.not_namespaces.is_empty();
    if accounts && others {
        out.error(p, "serviceAccounts cannot be combined with principals or namespaces");
    }
    for (list, field) in [
        (&s.ip_blocks, "ipBlocks"),
        (&s.not_ip_blocks, "notIpBlocks"),
        (&s.remote_ip_blocks, "remoteIpBlocks"),
        (&s.not_remote_ip_blocks, "notRemoteIpBlocks"),
    ] {
        each(list, &p.key(field), out, common::subnet);
    }
}

fn operation(o: &Operation, p: &Path<'_>, out: &mut Findings) {
    for (list, field) in [
        (&o.hosts, "hosts"),
        (&o.not_hosts, "notHosts"),
        (&o.methods, "methods"),
        (&o.not_methods, "notMethods"),
    ] {
        each(list, &p.key(field), out, pattern);
    }
    for (list, field) in [(&o.ports, "ports"), (&o.not_ports, "notPorts")] {
        each(list, &p.key(field), out, |v, at, out| {
            if !v.parse::<u32>().is_ok_and(|n| (1..=65535).contains(&n)) {
                out.error(at, format!("{v:?} is not a port within 1..65535"));
            }
        });
    }
    for (list, field) in [(&o.paths, "paths"), (&o.not_paths, "notPaths")] {
        each(list, &p.key(field), out, path);
    }
}

/// A path: exact, prefix, suffix, `*`, or a template.
fn path(s: &str, p: &Path<'_>, out: &mut Findings) {
    if !s.contains(['{', '}']) {
        pattern(s, p, out);
        return;
    }
    let mut segments = s.split('/').peekable();
    while let Some(seg) = segments.next() {
        match seg {
            "{*}" => {}
            "{**}" if segments.peek().is_none() => {}
            "{**}" => out.error(p, format!("{s:?}: {{**}} may only be the last segment")),
            _ if seg.contains(['{', '}', '*']) => {
                out.error(p, format!("{s:?}: a template's wildcards are whole segments {{*}} or {{**}}"));
            }
            _ => {}
        }
    }
}

fn condition(c: &Condition, p: &Path<'_>, out: &mut Findings) {
    let key = p.key("key");
    if c.key.is_empty() {
        out.error(&key, "a key is required");
    }
    if c.values.is_empty() && c.not_values.is_empty() {
        out.error(p, "one of values and notValues is required");
    }
    let k = c.key.as_str();
    for (list, field) in [(&c.values, "values"), (&c.not_values, "notValues")] {
        each(list, &p.key(field), out, |v, at, out| match k {
            "source.ip" | "remote.ip" | "destination.ip" => common::subnet(v, at, out),
            "destination.port" if !v.parse::<u32>().is_ok_and(|n| (1..=65535).contains(&n)) => {
                out.error(at, format!("{v:?} is not a port within 1..65535"));
            }
            "destination.port" => {}
            "source.serviceAccount" => {}
            _ => pattern(v, at, out),
        });
    }
    match k {
        ""
        | "source.ip"
        | "remote.ip"
        | "source.namespace"
        | "source.serviceAccount"
        | "source.principal"
        | "source.cluster"
        | "destination.ip"
        | "destination.port"
        | "connection.sni" => {}
        _ if k.starts_with("request.headers[") => {
            match k.strip_prefix("request.headers[").and_then(|r| r.strip_suffix(']')) {
                Some(name) => common::header_name(name, &key, out),
                None => out.error(&key, format!("{k:?}: expected request.headers[name]")),
            }
        }
        "request.auth.principal" | "request.auth.audiences" | "request.auth.presenter" => {}
        _ if k.starts_with("request.auth.claims[") => {
            let names = k.strip_prefix("request.auth.claims[").and_then(|r| r.strip_suffix(']'));
            let fine = |n: &str| !n.is_empty() && !n.contains(['[', ']']);
            if !names.is_some_and(|n| n.split("][").all(fine)) {
                out.error(&key, format!("{k:?}: expected request.auth.claims[name] or claims[name][name]"));
            }
        }
        _ if k.starts_with("experimental.envoy.filters.") => {
            out.error(&key, format!("{k:?} is not supported"));
        }
        "destination.labels" | "destination.namespace" | "destination.name" | "destination.user" => {
            out.error(&key, format!("{k:?} was removed: use a selector"));
        }
        _ => out.error(&key, format!("unknown key {k:?}")),
    }
}
