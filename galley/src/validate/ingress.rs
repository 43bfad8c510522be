//! Rules of Kubernetes' Ingress and IngressClass: what its API server accepts or refuses, since nothing else asks it here, and
//! what Istio leaves out without a word.

use std::net::IpAddr;

use mesh_model::authored::{
    Metadata,
    ingress::{
        INGRESS_CLASS, Ingress, IngressBackend, IngressClass, IngressClassParameters, IngressPath,
        IngressResource, IngressServiceBackend, PathType, ServiceBackendPort,
    },
};

use super::common::{self, Findings};
use crate::path::Path;

/// Parts of a path that proxies would read in different ways.
const AMBIGUOUS: [&str; 5] = ["//", "/./", "/../", "%2f", "%2F"];
const AMBIGUOUS_ENDS: [&str; 2] = ["/..", "/."];
/// Bytes of a controller's name.
const CONTROLLER_LIMIT: usize = 250;

pub(super) fn check(i: &Ingress, meta: &Metadata, p: &Path<'_>, out: &mut Findings) {
    let annotated = meta.annotations.get(INGRESS_CLASS);
    if let Some(class) = &i.ingress_class_name {
        let at = p.key("ingressClassName");
        if !common::is_object_name(class) {
            out.error(&at, format!("{class:?} is not the name of an IngressClass"));
        }
        if let Some(other) = annotated.filter(|a| *a != class) {
            let root = Path::root();
            let (metadata, at) = (root.key("metadata"), "annotations");
            out.error(
                &metadata.key(at).key(INGRESS_CLASS),
                format!("{other:?} is not ingressClassName, which is {class:?}: leave one of them out"),
            );
        }
    }
    if i.rules.is_empty() && i.default_backend.is_none() {
        out.error(&p.key("rules"), "rules or a defaultBackend are required");
    }
    let tls = p.key("tls");
    for (n, t) in i.tls.iter().enumerate() {
        let at = tls.index(n);
        let hosts = at.key("hosts");
        for (n, h) in t.hosts.iter().enumerate() {
            host(h, &hosts.index(n), out);
        }
        if t.secret_name.is_empty() {
            let message =
                "not served over TLS: name the Secret of the certificate, in the gateway's namespace";
            out.warning(&at.key("secretName"), message);
        } else if !common::is_object_name(&t.secret_name) {
            out.error(&at.key("secretName"), format!("{:?} is not the name of a Secret", t.secret_name));
        }
    }
    let rules = p.key("rules");
    for (n, r) in i.rules.iter().enumerate() {
        let at = rules.index(n);
        if !r.host.is_empty() {
            named(&r.host, &at.key("host"), &meta.namespace, out);
        }
        let http = at.key("http");
        let Some(h) = &r.http else {
            out.warning(
                &http,
                "without paths nothing is served for this host: add one, such as / of type Prefix",
            );
            continue;
        };
        let paths = http.key("paths");
        if h.paths.is_empty() {
            out.error(&paths, "at least one path is required");
        }
        for (n, path) in h.paths.iter().enumerate() {
            let at = paths.index(n);
            match path.path_type {
                None => {
                    let message = "is required: Exact, Prefix or ImplementationSpecific";
                    out.error(&at.key("pathType"), message);
                    continue;
                }
                Some(t) => path_of(t, &path.path, &at.key("path"), out),
            }
            if let IngressPath::Exact(e) = path.condition()
                && path.path_type == Some(PathType::ImplementationSpecific)
                && e.contains('*')
            {
                let message = format!(
                    "{e:?} is compared by the letter: a wildcard is \"/*\" or \".*\" at the end, or use pathType Prefix"
                );
                out.warning(&at.key("path"), message);
            }
            backend(&path.backend, &at.key("backend"), out);
        }
    }
    if let Some(b) = &i.default_backend {
        let at = p.key("defaultBackend");
        backend(b, &at, out);
        let message =
            "not served, as in Istio: add a rule without host, with the path / of type Prefix, instead";
        out.warning(&at, message);
    }
}

/// The host of a rule.
fn named(h: &str, p: &Path<'_>, namespace: &str, out: &mut Findings) {
    if h.parse::<IpAddr>().is_ok() {
        out.error(p, format!("{h:?} is an IP address: a host is a DNS name"));
        return;
    }
    host(h, p, out);
    if !h.contains('.') {
        let message = format!(
            "a name without a dot is short for the Service's: {h}.{namespace}.svc.cluster.local is served, and not {h:?}"
        );
        out.warning(p, message);
    }
}

fn host(h: &str, p: &Path<'_>, out: &mut Findings) {
    if h.contains('*') {
        if !h.strip_prefix("*.").is_some_and(common::is_object_name) || h.len() > 253 {
            out.error(
                p,
                format!("{h:?}: a wildcard is the first label of a name, such as \"*.example.com\""),
            );
        }
    } else if !common::is_object_name(h) {
        out.error(p, format!("{h:?} is not a DNS name in lower case, without scheme and port"));
    }
}

fn path_of(kind: PathType, path: &str, p: &Path<'_>, out: &mut Findings) {
    let exactly = kind != PathType::ImplementationSpecific;
    if !path.starts_with('/') && (exactly || !path.is_empty()) {
        out.error(p, format!("{path:?} is not absolute: it begins with a slash"));
    }
    if !exactly {
        return;
    }
    for part in AMBIGUOUS.iter().filter(|s| path.contains(**s)) {
        out.error(p, format!("{path:?} contains {part:?}: write the path as clients normalise it"));
    }
    for end in AMBIGUOUS_ENDS.iter().filter(|s| path.ends_with(**s)) {
        out.error(p, format!("{path:?} ends with {end:?}: write the path as clients normalise it"));
    }
}

fn backend(b: &IngressBackend, p: &Path<'_>, out: &mut Findings) {
    match (&b.service, &b.resource) {
        (Some(_), Some(_)) => out.error(p, "service and resource stand for each other: leave one out"),
        (None, None) => out.error(&p.key("service"), "a backend is required: a service with a port"),
        (Some(s), None) => service(s, &p.key("service"), out),
        (None, Some(r)) => {
            let at = p.key("resource");
            resource(r, &at, out);
            out.warning(&at, "not supported, and its path is not served: name a service");
        }
    }
}

fn service(s: &IngressServiceBackend, p: &Path<'_>, out: &mut Findings) {
    if s.name.is_empty() {
        out.error(&p.key("name"), "the name of a Service is required");
    } else if !common::is_dns1123_label(&s.name) {
        let message = format!("{:?} is not the name of a Service of the Ingress's namespace", s.name);
        out.error(&p.key("name"), message);
    }
    let at = p.key("port");
    match &s.port {
        ServiceBackendPort { name, number: 0 } if name.is_empty() => {
            out.error(&at, "a port is required, by name or number");
        }
        ServiceBackendPort { name, number: 0 } => {
            if !is_port_name(name) {
                let message = format!(
                    "{name:?} is not the name of a port: up to 15 of a-z, 0-9 and '-', one of them a letter"
                );
                out.error(&at.key("name"), message);
            }
        }
        ServiceBackendPort { name, number } if name.is_empty() => {
            common::port(*number, &at.key("number"), out);
        }
        _ => out.error(&at, "name and number stand for each other: leave one out"),
    }
}

/// RFC 6335, section 5.1.
fn is_port_name(s: &str) -> bool {
    s.len() <= 15
        && common::is_dns1123_label(s)
        && !s.contains("--")
        && s.bytes().any(|c| c.is_ascii_lowercase())
}

fn resource(r: &IngressResource, p: &Path<'_>, out: &mut Findings) {
    reference(r.api_group.as_deref(), &r.kind, &r.name, p, out);
}

fn reference(group: Option<&str>, kind: &str, name: &str, p: &Path<'_>, out: &mut Findings) {
    if let Some(g) = group.filter(|g| !common::is_object_name(g)) {
        out.error(&p.key("apiGroup"), format!("{g:?} is not an API group"));
    }
    for (field, value) in [("kind", kind), ("name", name)] {
        let at = p.key(field);
        if value.is_empty() {
            out.error(&at, "is required");
        } else if matches!(value, "." | "..") || value.contains(['/', '%']) {
            out.error(&at, format!("{value:?} cannot be part of a path: no '/' or '%', and not only dots"));
        }
    }
}

pub(super) fn check_class(c: &IngressClass, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("controller");
    let segment = |s: &str| {
        !s.is_empty() && s.bytes().all(|c| c.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@%".contains(&c))
    };
    let fits = |(domain, path): (&str, &str)| {
        common::is_object_name(domain) && path.split('/').all(segment) && !path.is_empty()
    };
    if c.controller.len() > CONTROLLER_LIMIT {
        out.error(&at, format!("longer than {CONTROLLER_LIMIT} bytes"));
    } else if !c.controller.split_once('/').is_some_and(fits) {
        let message =
            format!("{:?} is not domain/path; that of the mesh is istio.io/ingress-controller", c.controller);
        out.error(&at, message);
    }
    if let Some(r) = &c.parameters {
        let at = p.key("parameters");
        parameters(r, &at, out);
        out.warning(&at, "without effect: settings are those of MeshConfig and of the gateway's workload");
    }
}

fn parameters(r: &IngressClassParameters, p: &Path<'_>, out: &mut Findings) {
    reference(r.api_group.as_deref(), &r.kind, &r.name, p, out);
    let at = p.key("namespace");
    match (r.scope.as_str(), &r.namespace) {
        ("Cluster", Some(_)) => out.error(&at, "an object of scope Cluster has no namespace"),
        ("Namespace", None) => out.error(&at, "is required with scope Namespace"),
        ("Namespace", Some(n)) if !common::is_dns1123_label(n) => {
            out.error(&at, format!("{n:?} is not a namespace"));
        }
        ("Cluster" | "Namespace", _) => {}
        (other, _) => {
            out.error(&p.key("scope"), format!("{other:?} is neither Cluster nor Namespace"));
        }
    }
}
