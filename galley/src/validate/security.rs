//! Rules of PeerAuthentication, RequestAuthentication and AuthorizationPolicy.

use mesh_model::authored::{
    AuthorizationAction, AuthorizationPolicy, AuthorizationRule, Condition, LabelSelector, Metadata,
    Operation, PeerAuthentication, PolicyTargetReference, RequestAuthentication, Source, TokenPresence,
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

pub(super) fn selector(s: Option<&LabelSelector>, p: &Path<'_>, out: &mut Findings) {
    if let Some(s) = s {
        common::selector(&s.match_labels, &p.key("selector"), "matchLabels", out);
    }
}

/// What a policy is attached to: at most one of selector, targetRef and targetRefs, and each of the references
/// complete.
pub(super) fn targets(
    target_ref: Option<&PolicyTargetReference>,
    target_refs: &[PolicyTargetReference],
    selector: bool,
    p: &Path<'_>,
    out: &mut Findings,
) {
    let set =
        usize::from(selector) + usize::from(target_ref.is_some()) + usize::from(!target_refs.is_empty());
    if set > 1 {
        out.error(p, "only one of selector and targetRefs is allowed");
    }
    let list = p.key("targetRefs");
    let all = target_refs.iter().enumerate().map(|(i, r)| (list.index(i), r));
    for (at, r) in all.chain(target_ref.map(|r| (p.key("targetRef"), r))) {
        if r.name.is_empty() {
            out.error(&at.key("name"), "a name is required");
        }
        if !r.namespace.is_empty() {
            out.error(&at.key("namespace"), "a policy is for resources of its own namespace: remove it");
        }
        let known = matches!(
            (r.group.as_str(), r.kind.as_str()),
            ("" | "core", "Service")
                | ("networking.istio.io", "ServiceEntry")
                | ("gateway.networking.k8s.io", "Gateway" | "GatewayClass")
        );
        if !known {
            let given = format!("{}/{}", r.group, r.kind);
            out.error(
                &at.key("kind"),
                format!(
                    "{given:?} is none of Service, networking.istio.io/ServiceEntry, gateway.networking.k8s.io/Gateway, gateway.networking.k8s.io/GatewayClass"
                ),
            );
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
    targets(target_ref, target_refs, selector, p, out);
    let list = p.key("targetRefs");
    let all = target_refs.iter().enumerate().map(|(i, r)| (list.index(i), r));
    for (at, r) in all.chain(target_ref.map(|r| (p.key("targetRef"), r))) {
        if matches!(r.kind.as_str(), "GatewayClass" | "Service" | "ServiceEntry") {
            // Neglecting it would leave open what its author believes closed.
            out.error(
                &at.key("kind"),
                format!(
                    "a {} is served by waypoints, of which there are none: name a Gateway, or use a selector",
                    r.kind
                ),
            );
        }
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
        if r.jwks.is_empty() && r.jwks_uri.is_empty() && !is_url(&r.issuer) {
            let message = "no token is valid: without jwks and jwksUri the issuer is asked for its keys, and this one is no http or https URL";
            out.warning(&at, message);
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
        for (list, field, what) in
            [(&r.from_params, "fromParams", "a parameter"), (&r.from_cookies, "fromCookies", "a cookie")]
        {
            if let Some(j) = list.iter().position(String::is_empty) {
                out.error(&at.key(field).index(j), format!("{what} needs a name"));
            }
        }
        let claims = at.key("outputClaimToHeaders");
        for (j, h) in r.output_claim_to_headers.iter().enumerate() {
            let at = claims.index(j);
            let fine = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_');
            if h.header.is_empty() || !h.header.bytes().all(fine) {
                out.error(
                    &at.key("header"),
                    format!("{:?} is not a header name of letters, digits, '-' and '_'", h.header),
                );
            }
            if h.claim.is_empty() {
                out.error(&at.key("claim"), "a claim is required");
            }
        }
        common::duration(r.timeout, &at.key("timeout"), out);
        if r.presence == TokenPresence::Required {
            // Ignoring it would let requests without a token pass.
            let instead = "add an AuthorizationPolicy that denies notRequestPrincipals: ['*']";
            out.error(&at.key("presence"), format!("presence REQUIRED is not supported yet; {instead}"));
        }
        for j in private_keys(&r.jwks) {
            out.warning(
                &at.key("jwks"),
                format!("key {j} is a private key: only public ones belong into configuration"),
            );
        }
    }
}

/// Keys of a set that hold what only their owner should.
/// Whether an issuer can be asked where its keys are.
pub(super) fn is_url(issuer: &str) -> bool {
    issuer.starts_with("https://") || issuer.starts_with("http://")
}

fn private_keys(jwks: &str) -> Vec<usize> {
    let Ok(v) = serde_json::from_str::<serde_json::Value>(jwks) else { return vec![] };
    let keys = v.get("keys").and_then(|k| k.as_array()).cloned().unwrap_or_default();
    let private = |k: &serde_json::Value| k.get("d").is_some() || k.get("kty").is_some_and(|t| t == "oct");
    keys.iter().enumerate().filter(|(_, k)| private(k)).map(|(i, _)| i).collect()
}

pub(super) fn is_key_set(text: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(text)
        .is_ok_and(|v| v.get("keys").and_then(|k| k.as_array()).is_some_and(|k| !k.is_empty()))
}

pub(super) fn check_authorization(
    a: &AuthorizationPolicy,
    meta: &Metadata,
    p: &Path<'_>,
    out: &mut Findings,
) {
    dry_run(a.action, meta, out);
    selector(a.selector.as_ref(), p, out);
    target_refs(a.target_ref.as_ref(), &a.target_refs, a.selector.is_some(), p, out);
    let rules = p.key("rules");
    match a.action {
        AuthorizationAction::Custom => {
            if a.provider.as_ref().is_none_or(|x| x.name.is_empty()) {
                out.error(&p.key("provider"), "action CUSTOM needs the name of a provider");
            }
        }
        AuthorizationAction::Audit | AuthorizationAction::Allow | AuthorizationAction::Deny => {}
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
        if a.action == AuthorizationAction::Custom {
            known_later(r, &at, out);
        }
        if a.action == AuthorizationAction::Deny && http_only(r) {
            out.warning(
                &at,
                "on TCP ports this denies everything, since it has only conditions on HTTP: name the ports in to.operation.ports",
            );
        }
        let when = at.key("when");
        for (j, c) in r.when.iter().enumerate() {
            condition(c, &when.index(j), out);
        }
    }
}

/// `istio.io/dry-run` is for ALLOW and DENY, with a boolean.
fn dry_run(action: AuthorizationAction, meta: &Metadata, out: &mut Findings) {
    let Some(v) = meta.annotations.get("istio.io/dry-run") else { return };
    let root = Path::root();
    let meta = root.key("metadata");
    let annotations = meta.key("annotations");
    let at = annotations.key("istio.io/dry-run");
    if !matches!(action, AuthorizationAction::Allow | AuthorizationAction::Deny) {
        out.error(&at, "a dry run is for action ALLOW or DENY: remove the annotation");
    } else if !is_bool(v) {
        out.error(&at, format!("{v:?} is neither \"true\" nor \"false\""));
    }
}

/// What Go reads as a boolean.
pub(crate) fn is_bool(s: &str) -> bool {
    matches!(s, "1" | "t" | "T" | "TRUE" | "true" | "True" | "0" | "f" | "F" | "FALSE" | "false" | "False")
}

/// A provider is asked before identities are known.
fn known_later(r: &AuthorizationRule, p: &Path<'_>, out: &mut Findings) {
    let from = p.key("from");
    for (i, f) in r.from.iter().flatten().enumerate() {
        let Some(s) = &f.source else { continue };
        let at = from.index(i);
        let at = at.key("source");
        for (list, field) in [
            (&s.principals, "principals"),
            (&s.not_principals, "notPrincipals"),
            (&s.request_principals, "requestPrincipals"),
            (&s.not_request_principals, "notRequestPrincipals"),
            (&s.namespaces, "namespaces"),
            (&s.not_namespaces, "notNamespaces"),
            (&s.service_accounts, "serviceAccounts"),
            (&s.not_service_accounts, "notServiceAccounts"),
            (&s.trust_domains, "trustDomains"),
            (&s.not_trust_domains, "notTrustDomains"),
        ] {
            if !list.is_empty() {
                out.error(&at.key(field), format!("{field} cannot be used with action CUSTOM"));
            }
        }
    }
    let when = p.key("when");
    for (i, c) in r.when.iter().enumerate() {
        let identity = matches!(
            c.key.as_str(),
            "source.namespace" | "source.serviceAccount" | "source.trustDomain" | "source.principal"
        );
        if identity || c.key.starts_with("request.auth.") {
            let at = when.index(i);
            out.error(&at.key("key"), format!("{:?} cannot be used with action CUSTOM", c.key));
        }
    }
}

/// Whether a rule has sources or operations, and none that a TCP connection has.
fn http_only(r: &AuthorizationRule) -> bool {
    let sources: Vec<&Source> = r.from.iter().flatten().filter_map(|f| f.source.as_ref()).collect();
    let operations: Vec<&Operation> = r.to.iter().flatten().filter_map(|t| t.operation.as_ref()).collect();
    let tcp = |s: &&Source| {
        let http = Source {
            request_principals: s.request_principals.clone(),
            not_request_principals: s.not_request_principals.clone(),
            trust_domains: s.trust_domains.clone(),
            not_trust_domains: s.not_trust_domains.clone(),
            ..Source::default()
        };
        **s != http
    };
    let tcp_from = sources.iter().any(tcp);
    let tcp_to = operations.iter().any(|o| !o.ports.is_empty() || !o.not_ports.is_empty());
    let (from, to) = (!sources.is_empty(), !operations.is_empty());
    (from && !to && !tcp_from) || (to && !tcp_to)
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
pub(super) fn pattern(s: &str, p: &Path<'_>, out: &mut Findings) {
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
            } else if v.contains('/') && field.ends_with("rustDomains") {
                out.error(at, format!("{v:?} is not a trust domain: it has no '/'"));
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
        if list.len() > 16 {
            out.error(&p.key(field), format!("{} accounts; 16 is the limit", list.len()));
        }
        each(list, &p.key(field), out, service_account);
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

fn service_account(v: &str, p: &Path<'_>, out: &mut Findings) {
    let parts: Vec<&str> = v.split('/').collect();
    if v.contains('*') || parts.len() > 2 || parts.iter().any(|s| s.is_empty()) || v.len() > 320 {
        out.error(p, format!("{v:?} is not namespace/account or account; wildcards are not allowed"));
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
    let mut rest = false;
    for seg in s.trim_matches('/').split('/') {
        match seg {
            "{*}" | "{**}" if rest => out.error(p, format!("{s:?}: no other wildcard may follow {{**}}")),
            "{*}" => {}
            "{**}" => rest = true,
            _ if seg.contains(['{', '}', '*']) => {
                out.error(p, format!("{s:?}: a template's wildcards are whole segments {{*}} or {{**}}"));
            }
            _ if seg.is_empty()
                || !seg.bytes().all(|c| c.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&c)) =>
            {
                out.error(p, format!("{s:?}: {seg:?} has characters that a path has only percent-encoded"));
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
            "source.serviceAccount" => service_account(v, at, out),
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
        "source.trustDomain" => {
            out.error(&key, "\"source.trustDomain\" is not supported yet; use from.source.trustDomains");
        }
        "destination.namespace" | "destination.name" | "destination.user" => {
            out.error(&key, format!("{k:?} was removed: use the policy's namespace and a selector"));
        }
        _ if k.starts_with("destination.labels") => {
            out.error(&key, format!("{k:?} was removed: use a selector"));
        }
        _ => out.error(&key, format!("unknown key {k:?}")),
    }
}
