//! Rules of the Gateway API: those that its schemas declare, so that what a cluster would refuse is refused here.

mod filters;
mod unenforced;

use mesh_model::authored::gateway_api::{
    BackendRef, BackendTlsPolicy, Gateway, GatewayClass, GrpcRoute, HttpMatch, HttpRoute, L4Route, Listener,
    ListenerTlsMode, ObjectReference, ParentReference, PathMatchType, ReferenceGrant, SessionPersistence,
    SubjectAltNameType, Timeouts, ValueMatchType,
};

use super::common::{self, Findings};
use crate::path::Path;

const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

pub(super) fn check_class(c: &GatewayClass, p: &Path<'_>, out: &mut Findings) {
    unenforced::class(c, p, out);
    let fine = |(domain, path): (&str, &str)| common::is_object_name(domain) && !path.is_empty();
    if !c.controller_name.split_once('/').is_some_and(fine) {
        out.error(&p.key("controllerName"), format!("{:?} is not domain/path", c.controller_name));
    }
    if c.description.as_ref().is_some_and(|d| d.len() > 64) {
        out.error(&p.key("description"), "longer than 64 characters");
    }
    if let Some(r) = &c.parameters_ref {
        full_reference(r, &p.key("parametersRef"), out);
    }
}

pub(super) fn check_gateway(g: &Gateway, p: &Path<'_>, out: &mut Findings) {
    unenforced::gateway(g, p, out);
    name(&g.gateway_class_name, &p.key("gatewayClassName"), out);
    let listeners = p.key("listeners");
    count(g.listeners.len(), 1, 64, &listeners, out);
    for (i, l) in g.listeners.iter().enumerate() {
        let at = listeners.index(i);
        listener(l, &at, out);
        let before = &g.listeners[..i];
        if before.iter().any(|o| o.name == l.name) {
            out.error(&at.key("name"), format!("listener {:?} is there twice", l.name));
        }
        if before.iter().any(|o| (o.port, &o.protocol, &o.hostname) == (l.port, &l.protocol, &l.hostname)) {
            out.error(&at, "another listener has the same port, protocol and hostname");
        }
    }
    let addresses = p.key("addresses");
    count(g.addresses.len(), 0, 16, &addresses, out);
    for (i, a) in g.addresses.iter().enumerate() {
        let at = addresses.index(i);
        let value = a.value.as_deref().unwrap_or_default();
        match a.address_type.as_deref().unwrap_or("IPAddress") {
            "IPAddress" if !value.is_empty() && value.parse::<std::net::IpAddr>().is_err() => {
                out.error(&at.key("value"), format!("{value:?} is not an IP address"));
            }
            "Hostname" if !value.is_empty() => hostname(value, true, &at.key("value"), out),
            _ => {}
        }
        if !value.is_empty() && g.addresses[..i].contains(a) {
            out.error(&at, format!("{value:?} is there twice"));
        }
    }
    if let Some(x) = &g.infrastructure {
        common::labels(&x.labels, &p.key("infrastructure").key("labels"), out);
    }
}

fn listener(l: &Listener, p: &Path<'_>, out: &mut Findings) {
    name(&l.name, &p.key("name"), out);
    common::port(l.port, &p.key("port"), out);
    if l.protocol.is_empty() {
        out.error(&p.key("protocol"), "a protocol is required, such as HTTP, HTTPS, TLS or TCP");
    }
    let hostnames = !matches!(l.protocol.as_str(), "TCP" | "UDP");
    if let Some(h) = l.hostname.as_deref().filter(|h| !h.is_empty()) {
        if hostnames {
            hostname(h, true, &p.key("hostname"), out);
        } else {
            out.error(&p.key("hostname"), format!("protocol {} has no host names", l.protocol));
        }
    }
    let mode = l.tls.as_ref().and_then(|t| t.mode);
    match l.protocol.as_str() {
        "HTTP" | "TCP" | "UDP" if l.tls.is_some() => {
            out.error(&p.key("tls"), format!("protocol {} cannot have tls", l.protocol));
        }
        "HTTPS" if mode == Some(ListenerTlsMode::Passthrough) => {
            out.error(&p.key("tls").key("mode"), "protocol HTTPS ends TLS: use protocol TLS to pass it on");
        }
        "TLS" if mode.is_none() => {
            out.error(&p.key("tls").key("mode"), "protocol TLS needs a mode: Terminate or Passthrough");
        }
        _ => {}
    }
    if let Some(t) = &l.tls {
        let at = p.key("tls");
        let ends = t.mode.is_none_or(|m| m == ListenerTlsMode::Terminate);
        if ends && t.certificate_refs.is_empty() && t.options.is_empty() {
            out.error(&at.key("certificateRefs"), "mode Terminate needs a certificate");
        }
        let refs = at.key("certificateRefs");
        for (i, r) in t.certificate_refs.iter().enumerate() {
            reference(r, &refs.index(i), out);
        }
    }
    if let Some(a) = &l.allowed_routes {
        let at = p.key("allowedRoutes");
        let kinds = at.key("kinds");
        for (i, k) in a.kinds.iter().enumerate() {
            name(&k.kind, &kinds.index(i).key("kind"), out);
        }
    }
}

pub(super) fn check_http(r: &HttpRoute, p: &Path<'_>, out: &mut Findings) {
    unenforced::http(r, p, out);
    parents(&r.parent_refs, p, out);
    hostnames(&r.hostnames, 16, p, out);
    let rules = p.key("rules");
    count(r.rules.len(), 0, 16, &rules, out);
    if r.rules.iter().map(|x| x.matches.len()).sum::<usize>() > 128 {
        out.error(&rules, "more than 128 matches in all rules");
    }
    for (i, x) in r.rules.iter().enumerate() {
        let at = rules.index(i);
        rule_name(x.name.as_deref(), r.rules[..i].iter().any(|o| o.name == x.name), &at, out);
        let matches = at.key("matches");
        count(x.matches.len(), 0, 64, &matches, out);
        for (j, m) in x.matches.iter().enumerate() {
            http_match(m, &matches.index(j), out);
        }
        filters::check(&x.filters, filters::HTTP, &at.key("filters"), out);
        filters::prefixes(x, &at, out);
        if !x.backend_refs.is_empty() && x.filters.iter().any(|f| f.request_redirect.is_some()) {
            out.error(&at.key("backendRefs"), "a rule that redirects has no backends");
        }
        backends(&x.backend_refs, filters::HTTP, &at, out);
        if let Some(t) = &x.timeouts {
            timeouts(t, &at.key("timeouts"), out);
        }
        if let Some(s) = &x.session_persistence {
            persistence(s, &at.key("sessionPersistence"), out);
        }
        if let Some(retry) = &x.retry {
            let at = at.key("retry");
            for c in retry.codes.iter().filter(|c| !(400..=599).contains(*c)) {
                out.error(&at.key("codes"), format!("{c} is outside of 400..599"));
            }
            span(retry.backoff.as_deref(), &at.key("backoff"), out);
        }
    }
}

fn http_match(m: &HttpMatch, p: &Path<'_>, out: &mut Findings) {
    if let Some(path) = &m.path {
        let at = p.key("path");
        let at = at.key("value");
        let value = path.value.as_deref().unwrap_or("/");
        if path.match_type == Some(PathMatchType::RegularExpression) {
            common::regex(value, &at, out);
        } else {
            absolute_path(value, &at, out);
        }
    }
    for (list, field) in [(&m.headers, "headers"), (&m.query_params, "queryParams")] {
        let at = p.key(field);
        count(list.len(), 0, 16, &at, out);
        for (i, h) in list.iter().enumerate() {
            let at = at.index(i);
            common::header_name(&h.name, &at.key("name"), out);
            if h.value.is_empty() {
                out.error(&at.key("value"), "a value is required");
            } else if h.match_type == Some(ValueMatchType::RegularExpression) {
                common::regex(&h.value, &at.key("value"), out);
            }
        }
    }
    if let Some(method) = &m.method
        && !METHODS.contains(&method.as_str())
    {
        out.error(&p.key("method"), format!("{method:?} is none of {}", METHODS.join(", ")));
    }
}

fn absolute_path(value: &str, p: &Path<'_>, out: &mut Findings) {
    let wrong = [
        (!value.starts_with('/'), "must begin with '/'"),
        (value.contains("//"), "must not contain '//'"),
        (value.contains("/./") || value.ends_with("/."), "must not contain '/./'"),
        (value.contains("/../") || value.ends_with("/.."), "must not contain '/../'"),
        (value.to_ascii_lowercase().contains("%2f"), "must not contain '%2F'"),
        (value.contains(['#', '?', ' ']), "must not contain '#', '?' or spaces"),
        (value.len() > 1024, "is longer than 1024 bytes"),
    ];
    if let Some((_, why)) = wrong.iter().find(|(w, _)| *w) {
        out.error(p, format!("{value:?} {why}"));
    }
}

pub(super) fn check_grpc(r: &GrpcRoute, p: &Path<'_>, out: &mut Findings) {
    unenforced::grpc(r, p, out);
    parents(&r.parent_refs, p, out);
    hostnames(&r.hostnames, 16, p, out);
    let rules = p.key("rules");
    count(r.rules.len(), 0, 16, &rules, out);
    for (i, x) in r.rules.iter().enumerate() {
        let at = rules.index(i);
        rule_name(x.name.as_deref(), r.rules[..i].iter().any(|o| o.name == x.name), &at, out);
        let matches = at.key("matches");
        for (j, m) in x.matches.iter().enumerate() {
            let at = matches.index(j);
            if let Some(method) = &m.method {
                let at = at.key("method");
                if method.service.is_none() && method.method.is_none() {
                    out.error(&at, "one of service and method is required");
                }
                let exact = method.match_type != Some(ValueMatchType::RegularExpression);
                for (v, field) in [(&method.service, "service"), (&method.method, "method")] {
                    let Some(v) = v else { continue };
                    let word =
                        |c: u8| c.is_ascii_alphanumeric() || c == b'_' || (c == b'.' && field == "service");
                    if !exact {
                        common::regex(v, &at.key(field), out);
                    } else if v.is_empty() || !v.bytes().all(word) {
                        out.error(&at.key(field), format!("{v:?} is not the name of a gRPC {field}"));
                    }
                }
            }
            let headers = at.key("headers");
            for (k, h) in m.headers.iter().enumerate() {
                common::header_name(&h.name, &headers.index(k).key("name"), out);
            }
        }
        filters::check(&x.filters, filters::GRPC, &at.key("filters"), out);
        backends(&x.backend_refs, filters::GRPC, &at, out);
        if let Some(s) = &x.session_persistence {
            persistence(s, &at.key("sessionPersistence"), out);
        }
    }
}

pub(super) fn check_l4(r: &L4Route, kind: &str, p: &Path<'_>, out: &mut Findings) {
    unenforced::l4(r, kind, p, out);
    parents(&r.parent_refs, p, out);
    if kind == "TLSRoute" {
        count(r.hostnames.len(), 1, 1024, &p.key("hostnames"), out);
        hostnames(&r.hostnames, 1024, p, out);
    } else if !r.hostnames.is_empty() {
        out.error(&p.key("hostnames"), format!("{kind} has no host names"));
    }
    let rules = p.key("rules");
    count(r.rules.len(), 1, 16, &rules, out);
    for (i, x) in r.rules.iter().enumerate() {
        let at = rules.index(i);
        count(x.backend_refs.len(), 1, 16, &at.key("backendRefs"), out);
        backends(&x.backend_refs, filters::NONE, &at, out);
    }
}

pub(super) fn check_grant(g: &ReferenceGrant, p: &Path<'_>, out: &mut Findings) {
    let from = p.key("from");
    count(g.from.len(), 1, 16, &from, out);
    for (i, f) in g.from.iter().enumerate() {
        let at = from.index(i);
        name(&f.kind, &at.key("kind"), out);
        if !common::is_dns1123_label(&f.namespace) {
            out.error(&at.key("namespace"), format!("{:?} is not a namespace", f.namespace));
        }
    }
    let to = p.key("to");
    count(g.to.len(), 1, 16, &to, out);
    for (i, t) in g.to.iter().enumerate() {
        name(&t.kind, &to.index(i).key("kind"), out);
    }
}

pub(super) fn check_backend_tls(b: &BackendTlsPolicy, p: &Path<'_>, out: &mut Findings) {
    unenforced::backend_tls(b, p, out);
    let targets = p.key("targetRefs");
    count(b.target_refs.len(), 1, 16, &targets, out);
    for (i, t) in b.target_refs.iter().enumerate() {
        let at = targets.index(i);
        name(&t.kind, &at.key("kind"), out);
        name(&t.name, &at.key("name"), out);
        let same = |o: &mesh_model::authored::gateway_api::PolicyTarget| {
            (&o.group, &o.kind, &o.name) == (&t.group, &t.kind, &t.name)
                && (o.section_name == t.section_name || o.section_name.is_none() || t.section_name.is_none())
        };
        if b.target_refs[..i].iter().any(same) {
            out.error(
                &at.key("sectionName"),
                "the same target is there twice: name different sections of it",
            );
        }
    }
    let at = p.key("validation");
    let Some(v) = &b.validation else {
        out.error(&at, "validation is required");
        return;
    };
    hostname(&v.hostname, false, &at.key("hostname"), out);
    let well_known = v.well_known_ca_certificates.as_deref().unwrap_or_default();
    if v.ca_certificate_refs.is_empty() == well_known.is_empty() {
        out.error(&at, "exactly one of caCertificateRefs and wellKnownCACertificates is required");
    }
    if !well_known.is_empty() && well_known != "System" && !well_known.contains('/') {
        out.error(&at.key("wellKnownCACertificates"), format!("{well_known:?} is not System"));
    }
    let refs = at.key("caCertificateRefs");
    for (i, r) in v.ca_certificate_refs.iter().enumerate() {
        full_reference(r, &refs.index(i), out);
    }
    let names = at.key("subjectAltNames");
    count(v.subject_alt_names.len(), 0, 5, &names, out);
    for (i, n) in v.subject_alt_names.iter().enumerate() {
        let (host, uri) = (n.hostname.is_some(), n.uri.is_some());
        let fits = match n.name_type {
            Some(SubjectAltNameType::Hostname) => host && !uri,
            Some(SubjectAltNameType::Uri) => uri && !host,
            None => false,
        };
        if !fits {
            out.error(&names.index(i), "type Hostname needs hostname alone, type URI needs uri alone");
        }
    }
}

fn parents(list: &[ParentReference], p: &Path<'_>, out: &mut Findings) {
    let at = p.key("parentRefs");
    count(list.len(), 0, 32, &at, out);
    for (i, r) in list.iter().enumerate() {
        let at = at.index(i);
        name(&r.name, &at.key("name"), out);
        if let Some(n) = r.port {
            common::port(n, &at.key("port"), out);
        }
        let same = |o: &&ParentReference| {
            (&o.group, &o.kind, &o.namespace, &o.name) == (&r.group, &r.kind, &r.namespace, &r.name)
        };
        let section = |x: &ParentReference| (x.section_name.clone(), x.port);
        let whole = |x: &ParentReference| section(x) == (None, None);
        if list[..i].iter().filter(same).any(|o| section(o) == section(r) || whole(o) || whole(r)) {
            out.error(&at, "the same parent is there twice: name different sectionName or port");
        }
    }
}

fn backends(list: &[BackendRef], allowed: &[filters::Type], p: &Path<'_>, out: &mut Findings) {
    let at = p.key("backendRefs");
    count(list.len(), 0, 16, &at, out);
    for (i, b) in list.iter().enumerate() {
        let at = at.index(i);
        backend(b, &at, out);
        if let Some(w) = b.weight
            && !(0..=1_000_000).contains(&w)
        {
            out.error(&at.key("weight"), format!("weight {w} is outside of 0..1000000"));
        }
        filters::check(&b.filters, allowed, &at.key("filters"), out);
    }
}

fn backend(b: &BackendRef, p: &Path<'_>, out: &mut Findings) {
    name(&b.name, &p.key("name"), out);
    let group = b.group.as_deref().unwrap_or_default();
    let service = group.is_empty() && b.kind.as_deref().unwrap_or("Service") == "Service";
    match b.port {
        Some(n) => common::port(n, &p.key("port"), out),
        None if service => out.error(&p.key("port"), "a Service needs a port"),
        None => {}
    }
}

fn timeouts(t: &Timeouts, p: &Path<'_>, out: &mut Findings) {
    let request = span(t.request.as_deref(), &p.key("request"), out);
    let backend = span(t.backend_request.as_deref(), &p.key("backendRequest"), out);
    if let (Some(r), Some(b)) = (request, backend)
        && !r.is_zero()
        && b > r
    {
        out.error(&p.key("backendRequest"), "longer than the timeout of the whole request");
    }
}

fn persistence(s: &SessionPersistence, p: &Path<'_>, out: &mut Findings) {
    use mesh_model::authored::gateway_api::{CookieLifetime, PersistenceType};
    let header = s.persistence_type == Some(PersistenceType::Header);
    if s.header.is_some() && !header {
        out.error(&p.key("header"), "a header is for type Header");
    }
    if s.cookie.is_some() && header {
        out.error(&p.key("cookie"), "a cookie is for type Cookie");
    }
    if let Some(h) = &s.header {
        common::header_name(&h.name, &p.key("header").key("name"), out);
    }
    for (c, field) in [(&s.cookie, "cookie"), (&s.cookie_config, "cookieConfig")] {
        let Some(c) = c else { continue };
        let at = p.key(field);
        if let Some(n) = &c.name {
            common::header_name(n, &at.key("name"), out);
        }
        if c.path.as_ref().is_some_and(|p| p.bytes().any(|b| b == b';' || b.is_ascii_control())) {
            out.error(&at.key("path"), "must not contain ';' or control characters");
        }
    }
    if let Some(n) = &s.session_name {
        common::header_name(n, &p.key("sessionName"), out);
    }
    let lasting =
        s.cookie.iter().chain(&s.cookie_config).any(|c| c.lifetime_type == Some(CookieLifetime::Permanent));
    let absolute = span(s.absolute_timeout.as_deref(), &p.key("absoluteTimeout"), out);
    if lasting && (s.absolute_timeout.is_none() || absolute.is_some_and(|d| d.is_zero())) {
        out.error(&p.key("absoluteTimeout"), "a permanent cookie needs an absoluteTimeout that is not zero");
    }
    span(s.idle_timeout.as_deref(), &p.key("idleTimeout"), out);
}

/// A duration as this API has it: up to four of `1h`, `2m`, `3s`, `4ms`, with up to five digits each.
fn span(text: Option<&str>, p: &Path<'_>, out: &mut Findings) -> Option<std::time::Duration> {
    let text = text?;
    let parsed = (!text.contains(['.', '-', '+']) && text != "0")
        .then(|| text.parse::<mesh_model::authored::Duration>().ok())
        .flatten();
    if parsed.is_none() {
        out.error(p, format!("{text:?} is not a duration such as 1h30m or 500ms"));
    }
    parsed.map(std::time::Duration::from)
}

fn hostnames(list: &[String], max: usize, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("hostnames");
    count(list.len(), 0, max, &at, out);
    for (i, h) in list.iter().enumerate() {
        hostname(h, true, &at.index(i), out);
    }
}

fn hostname(h: &str, wildcard: bool, p: &Path<'_>, out: &mut Findings) {
    let name = h.strip_prefix("*.").filter(|_| wildcard).unwrap_or(h);
    if h.parse::<std::net::IpAddr>().is_ok() || !common::is_object_name(name) {
        out.error(
            p,
            format!("{h:?} is not a DNS name in lower case (a wildcard may only be its whole first label)"),
        );
    }
}

fn rule_name(name: Option<&str>, twice: bool, p: &Path<'_>, out: &mut Findings) {
    let Some(n) = name else { return };
    if !common::is_object_name(n) {
        out.error(&p.key("name"), format!("{n:?} is not the name of a rule"));
    } else if twice {
        out.error(&p.key("name"), format!("rule {n:?} is there twice"));
    }
}

fn name(s: &str, p: &Path<'_>, out: &mut Findings) {
    if s.is_empty() || s.len() > 253 {
        out.error(p, "a name of up to 253 characters is required");
    }
}

fn reference(r: &ObjectReference, p: &Path<'_>, out: &mut Findings) {
    name(&r.name, &p.key("name"), out);
}

fn full_reference(r: &ObjectReference, p: &Path<'_>, out: &mut Findings) {
    reference(r, p, out);
    if r.group.is_none() {
        out.error(&p.key("group"), "a group is required; \"\" is Kubernetes' own");
    }
    if r.kind.is_none() {
        out.error(&p.key("kind"), "a kind is required");
    }
}

fn count(n: usize, min: usize, max: usize, p: &Path<'_>, out: &mut Findings) {
    if n < min {
        out.error(p, format!("at least {min} is required"));
    } else if n > max {
        out.error(p, format!("{n} are too many: {max} is the limit"));
    }
}
