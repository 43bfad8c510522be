//! Rules of Policy and MeshPolicy of `authentication.istio.io`.

use std::collections::HashSet;

use mesh_model::authored::{AuthenticationPolicy, Jwt, Metadata, TargetSelector, TriggerPath, TriggerRule};

use super::{
    common::{self, Findings},
    security,
};
use crate::path::Path;

/// Name of the policy of a whole namespace, or of the mesh.
const DEFAULT: &str = "default";
/// Combinations of trigger rules that are told apart.
const MAX_SETS: usize = 64;

pub(super) fn check_policy(a: &AuthenticationPolicy, meta: &Metadata, p: &Path<'_>, out: &mut Findings) {
    let targets = p.key("targets");
    match (meta.name == DEFAULT, a.targets.is_empty()) {
        (true, false) => out.error(
            &targets,
            "the policy called default is for the whole namespace: remove targets, or give it another name",
        ),
        (false, true) => out.error(
            &targets,
            "at least one service is required; a policy of the whole namespace is called default",
        ),
        _ => {}
    }
    for (i, t) in a.targets.iter().enumerate() {
        target(t, &targets.index(i), out);
    }
    methods(a, p, out);
    out.coded(
        "IST0120",
        p,
        "Policy is deprecated: write PeerAuthentication and RequestAuthentication".into(),
    );
}

pub(super) fn check_mesh(a: &AuthenticationPolicy, meta: &Metadata, p: &Path<'_>, out: &mut Findings) {
    if meta.name != DEFAULT {
        let root = Path::root();
        out.error(
            &root.key("metadata").key("name"),
            "the policy of the mesh is called default: no other counts",
        );
    }
    if !a.targets.is_empty() {
        out.error(&p.key("targets"), "the policy of the mesh is for all services: remove targets");
    }
    methods(a, p, out);
    out.coded(
        "IST0121",
        p,
        "MeshPolicy is deprecated: write PeerAuthentication and RequestAuthentication of the root namespace"
            .into(),
    );
}

fn target(t: &TargetSelector, p: &Path<'_>, out: &mut Findings) {
    if !common::is_dns_label(&t.name) {
        out.error(
            &p.key("name"),
            format!("{:?} is not the short name of a service of the policy's namespace", t.name),
        );
    }
    let ports = p.key("ports");
    for (i, port) in t.ports.iter().enumerate() {
        let at = ports.index(i);
        match (port.number, port.name.as_deref()) {
            (Some(n), None) if (1..=65535).contains(&n) => {}
            (Some(n), None) => out.error(&at.key("number"), format!("{n} is not a port within 1..65535")),
            (None, Some(n)) if common::is_dns_label(n) => {}
            (None, Some(n)) => out.error(&at.key("name"), format!("{n:?} is not the name of a port")),
            _ => out.error(&at, "one of number and name is required"),
        }
    }
}

fn methods(a: &AuthenticationPolicy, p: &Path<'_>, out: &mut Findings) {
    let peers = p.key("peers");
    for (i, m) in a.peers.iter().enumerate() {
        let at = peers.index(i);
        if m.jwt.is_some() {
            // Without it whoever has only a certificate, or only a token, would be let in or kept out wrongly.
            out.error(&at.key("jwt"), "a token of a peer is not supported: name its issuer in origins");
        }
    }
    let origins = p.key("origins");
    let mut issuers = HashSet::new();
    for (i, o) in a.origins.iter().enumerate() {
        let at = origins.index(i);
        let Some(j) = &o.jwt else {
            out.error(&at.key("jwt"), "a method is required");
            continue;
        };
        let at = at.key("jwt");
        if !j.issuer.is_empty() && !issuers.insert(&j.issuer) {
            out.error(&at.key("issuer"), format!("issuer {:?} is there twice: remove one", j.issuer));
        }
        jwt(j, &at, out);
    }
    triggers(a, &origins, out);
}

/// Paths are told apart by a list of matches. What it cannot say exactly would ask for too little somewhere.
fn triggers(a: &AuthenticationPolicy, p: &Path<'_>, out: &mut Findings) {
    let lists: Vec<&[TriggerRule]> =
        a.origins.iter().filter_map(|o| o.jwt.as_ref()).map(|j| j.trigger_rules.as_slice()).collect();
    let same = lists.windows(2).all(|w| w[0] == w[1]);
    if same && lists.first().is_none_or(|l| l.len() <= 1) {
        return;
    }
    let mut paths =
        lists.iter().copied().flatten().flat_map(|r| r.excluded_paths.iter().chain(&r.included_paths));
    if paths.any(|t| t.regex.is_some()) {
        out.error(
            p,
            "a regex in triggerRules is supported where all origins have one and the same trigger rule: use exact, prefix \
             and suffix, or one rule",
        );
    }
    let sets = lists.iter().filter(|l| !l.is_empty()).fold(1usize, |n, l| n.saturating_mul(l.len() + 1));
    if sets > MAX_SETS {
        out.error(
            p,
            format!("triggerRules of these origins make {sets} cases together; {MAX_SETS} is the limit"),
        );
    }
}

fn jwt(j: &Jwt, p: &Path<'_>, out: &mut Findings) {
    if j.issuer.is_empty() {
        out.error(&p.key("issuer"), "an issuer is required");
    }
    for (list, field) in
        [(&j.audiences, "audiences"), (&j.jwt_headers, "jwtHeaders"), (&j.jwt_params, "jwtParams")]
    {
        let at = p.key(field);
        for (i, s) in list.iter().enumerate() {
            if s.is_empty() {
                out.error(&at.index(i), "must not be empty");
            } else if field == "jwtHeaders" {
                common::header_name(s, &at.index(i), out);
            }
        }
    }
    match (j.jwks_uri.is_empty(), j.jwks.is_empty()) {
        (true, true) if security::is_url(&j.issuer) => {}
        (true, true) => {
            let message = "no token is valid: without jwks and jwksUri the issuer is asked for its keys, and this one is no http or https URL";
            out.warning(p, message);
        }
        (false, false) => out.error(p, "only one of jwks and jwksUri is allowed"),
        (false, true) => uri(&j.jwks_uri, &p.key("jwksUri"), out),
        (true, false) if !security::is_key_set(&j.jwks) => {
            out.error(&p.key("jwks"), "not a JSON Web Key Set (RFC 7517) with at least one key");
        }
        (true, false) => {}
    }
    let rules = p.key("triggerRules");
    for (i, r) in j.trigger_rules.iter().enumerate() {
        let at = rules.index(i);
        for (list, field) in [(&r.excluded_paths, "excludedPaths"), (&r.included_paths, "includedPaths")] {
            let at = at.key(field);
            for (i, path) in list.iter().enumerate() {
                trigger(path, &at.index(i), out);
            }
        }
    }
}

/// `http` or `https`, and a host.
fn uri(s: &str, p: &Path<'_>, out: &mut Findings) {
    let rest = s.strip_prefix("https://").or_else(|| s.strip_prefix("http://"));
    let host = rest.and_then(|r| r.split(['/', '?', ':']).next());
    if host.is_none_or(str::is_empty) {
        out.error(p, format!("{s:?}: expected an http or https URI with a host"));
    }
}

fn trigger(t: &TriggerPath, p: &Path<'_>, out: &mut Findings) {
    let set = [&t.exact, &t.prefix, &t.suffix, &t.regex].into_iter().filter(|v| v.is_some()).count();
    if set != 1 {
        out.error(p, "one of exact, prefix, suffix and regex is required");
    }
    if let Some(r) = &t.regex {
        common::regex(r, &p.key("regex"), out);
    }
}
