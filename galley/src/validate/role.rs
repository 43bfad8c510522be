//! Rules of the kinds of `rbac.istio.io`.
//!
//! Stricter than release 1.0, which logged keys that it did not know and let the rest of a rule speak: a condition that
//! nobody looks at opens more than its author wrote, so such a document is refused.

use mesh_model::authored::{
    AccessConstraint, AccessRule, Metadata, RbacConfig, RbacMode, RbacTarget, ServiceRole,
    ServiceRoleBinding, Subject,
};

use super::common::{self, Findings};
use crate::path::Path;

/// What analysis says of all of these kinds.
fn deprecated(kind: &str, p: &Path<'_>, out: &mut Findings) {
    out.coded(
        "IST0002",
        p,
        format!("{kind} is deprecated: write an AuthorizationPolicy of security.istio.io"),
    );
}

pub(super) fn check_config(c: &RbacConfig, meta: &Metadata, kind: &str, p: &Path<'_>, out: &mut Findings) {
    if meta.name != "default" {
        let root = Path::root();
        out.error(&root.key("metadata").key("name"), format!("a {kind} is called default: no other counts"));
    }
    for (mode, given, field) in [
        (RbacMode::OnWithInclusion, &c.inclusion, "inclusion"),
        (RbacMode::OnWithExclusion, &c.exclusion, "exclusion"),
    ] {
        let at = p.key(field);
        match given {
            Some(t) => target(t, &at, out),
            None if c.mode == mode => {
                out.error(&at, format!("required for this mode: which services are the {field}"))
            }
            None => {}
        }
        if given.is_some() && c.mode != mode {
            out.warning(&at, format!("{field} does nothing in this mode"));
        }
    }
    deprecated(kind, p, out);
}

fn target(t: &RbacTarget, p: &Path<'_>, out: &mut Findings) {
    for (list, field) in [(&t.services, "services"), (&t.namespaces, "namespaces")] {
        let at = p.key(field);
        for (i, s) in list.iter().enumerate() {
            if s.is_empty() {
                out.error(&at.index(i), "must not be empty");
            } else if field == "services" && !s.contains(['.', '*']) {
                out.warning(
                    &at.index(i),
                    format!("{s:?} is no service's full host, such as \"{s}.NAMESPACE.svc.cluster.local\""),
                );
            }
        }
    }
}

pub(super) fn check_role(r: &ServiceRole, p: &Path<'_>, out: &mut Findings) {
    let rules = p.key("rules");
    if r.rules.is_empty() {
        out.error(&rules, "at least one rule is required");
    }
    for (i, r) in r.rules.iter().enumerate() {
        rule(r, &rules.index(i), out);
    }
    deprecated("ServiceRole", p, out);
}

fn rule(r: &AccessRule, p: &Path<'_>, out: &mut Findings) {
    if r.services.is_empty() {
        out.error(&p.key("services"), "at least one service is required; \"*\" is all of the namespace");
    }
    if r.methods.is_empty() {
        out.error(&p.key("methods"), "at least one method is required; \"*\" is any");
    }
    for (list, field) in [
        (&r.services, "services"),
        (&r.hosts, "hosts"),
        (&r.not_hosts, "notHosts"),
        (&r.paths, "paths"),
        (&r.not_paths, "notPaths"),
        (&r.methods, "methods"),
        (&r.not_methods, "notMethods"),
    ] {
        texts(list, &p.key(field), out);
    }
    for (list, field) in [(&r.ports, "ports"), (&r.not_ports, "notPorts")] {
        let at = p.key(field);
        for (i, n) in list.iter().enumerate().filter(|(_, n)| !(1..=65535).contains(*n)) {
            out.error(&at.index(i), format!("{n} is not a port within 1..65535"));
        }
    }
    let constraints = p.key("constraints");
    for (i, c) in r.constraints.iter().enumerate() {
        constraint(c, &constraints.index(i), out);
    }
}

fn texts(list: &[String], p: &Path<'_>, out: &mut Findings) {
    for (i, s) in list.iter().enumerate() {
        text(s, &p.index(i), out);
    }
}

/// `a`, `a*`, `*a` or `*`.
fn text(s: &str, p: &Path<'_>, out: &mut Findings) {
    if s.is_empty() {
        out.error(p, "must not be empty");
    } else {
        super::security::pattern(s, p, out);
    }
}

/// `name` of `<prefix>[name]`.
fn inner<'k>(key: &'k str, prefix: &str) -> Option<&'k str> {
    let name = key.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']')?;
    (!name.is_empty() && !name.contains(['[', ']'])).then_some(name)
}

fn constraint(c: &AccessConstraint, p: &Path<'_>, out: &mut Findings) {
    let key = p.key("key");
    let values = p.key("values");
    if c.key.is_empty() {
        out.error(&key, "a key is required");
        return;
    }
    if c.values.is_empty() {
        out.error(&values, "at least one value is required");
    }
    for (i, v) in c.values.iter().enumerate() {
        let at = values.index(i);
        match c.key.as_str() {
            "destination.ip" => common::subnet(v, &at, out),
            "destination.port" => {
                if v.parse::<u16>().is_err() {
                    out.error(&at, format!("{v:?} is not a port within 0..65535"));
                }
            }
            _ => text(v, &at, out),
        }
    }
    match c.key.as_str() {
        "destination.ip" | "destination.port" | "destination.name" | "destination.namespace"
        | "destination.user" => {}
        k if inner(k, "destination.labels").is_some() => {}
        k => match inner(k, "request.headers") {
            Some(name) => common::header_name(name, &key, out),
            None => out.error(
                &key,
                format!(
                    "{k:?} is not supported, and ignoring it would allow more than is written: known are destination.ip, \
                     destination.port, destination.labels[x], destination.name, destination.namespace, destination.user \
                     and request.headers[x]"
                ),
            ),
        },
    }
}

pub(super) fn check_binding(b: &ServiceRoleBinding, p: &Path<'_>, out: &mut Findings) {
    let subjects = p.key("subjects");
    if b.subjects.is_empty() {
        out.error(&subjects, "at least one subject is required; user: \"*\" is anybody");
    }
    for (i, s) in b.subjects.iter().enumerate() {
        subject(s, &subjects.index(i), out);
    }
    let at = p.key("roleRef");
    match &b.role_ref {
        None => out.error(&at, "a role is required: {kind: ServiceRole, name: ...}"),
        Some(r) => {
            if r.kind != "ServiceRole" {
                out.error(&at.key("kind"), format!("{:?} is not ServiceRole", r.kind));
            }
            if r.name.is_empty() {
                out.error(&at.key("name"), "a name is required");
            }
        }
    }
    deprecated("ServiceRoleBinding", p, out);
}

fn subject(s: &Subject, p: &Path<'_>, out: &mut Findings) {
    if *s == Subject::default() {
        out.error(p, "one of user, group and properties is required; user: \"*\" is anybody");
    }
    for (value, field) in [(&s.user, "user"), (&s.group, "group")] {
        if !value.is_empty() {
            text(value, &p.key(field), out);
        }
    }
    for (list, field) in [
        (&s.names, "names"),
        (&s.not_names, "notNames"),
        (&s.groups, "groups"),
        (&s.not_groups, "notGroups"),
        (&s.namespaces, "namespaces"),
        (&s.not_namespaces, "notNamespaces"),
    ] {
        texts(list, &p.key(field), out);
    }
    for (list, field) in [(&s.ips, "ips"), (&s.not_ips, "notIps")] {
        let at = p.key(field);
        for (i, v) in list.iter().enumerate() {
            common::subnet(v, &at.index(i), out);
        }
    }
    let properties = p.key("properties");
    for (k, v) in &s.properties {
        let at = properties.key(k);
        match k.as_str() {
            "source.ip" => common::subnet(v, &at, out),
            "source.namespace" | "source.user" | "source.principal" | "request.auth.principal"
            | "request.auth.audiences" | "request.auth.presenter" => text(v, &at, out),
            k if inner(k, "request.auth.claims").is_some() => text(v, &at, out),
            k => match inner(k, "request.headers") {
                Some(name) => {
                    common::header_name(name, &at, out);
                    text(v, &at, out);
                }
                None => out.error(
                    &at,
                    format!(
                        "{k:?} is not supported, and ignoring it would allow more than is written: known are source.ip, \
                         source.namespace, source.principal, request.headers[x], request.auth.principal, \
                         request.auth.audiences, request.auth.presenter and request.auth.claims[x]"
                    ),
                ),
            },
        }
    }
}
