//! Rules of VirtualService.

mod actions;

pub(super) use self::actions::retries;
mod unreachable;

use mesh_model::authored::{
    Destination, HeaderKey, HttpMatchRequest, HttpRoute, L4MatchAttributes, RouteDestination, StringMatch,
    TlsMatchAttributes, VirtualService,
};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check(vs: &VirtualService, namespace: &str, p: &Path<'_>, out: &mut Findings) {
    common::gateway_names(&vs.gateways, &p.key("gateways"), out);
    common::export_to(&vs.export_to, false, namespace, p, out);
    let on_mesh = vs.gateways.is_empty() || vs.gateways.iter().any(|g| g == "mesh");
    let hosts = p.key("hosts");
    if vs.hosts.is_empty() {
        delegate(vs, &hosts, out);
    }
    let by_sni = vs.tls.iter().any(|t| t.matches.iter().any(|m| !m.sni_hosts.is_empty()));
    for (i, h) in vs.hosts.iter().enumerate() {
        let at = hosts.index(i);
        if h.parse::<std::net::IpAddr>().is_err() && !(by_sni && !on_mesh && is_sni_of_a_cluster(h)) {
            common::host(h, &at, out);
        }
        if h == "*" && on_mesh {
            out.error(&at, "host '*' is only allowed at a gateway, not for the mesh");
        }
        if let Some(other) = vs.hosts[..i].iter().find(|o| overlap(o, h)) {
            out.error(&at, format!("{h:?} overlaps with {other:?}"));
        }
    }
    if vs.http.is_empty() && vs.tls.is_empty() && vs.tcp.is_empty() {
        out.error(p, "at least one of http, tls and tcp is required");
    }
    let http = p.key("http");
    for (i, r) in vs.http.iter().enumerate() {
        http_route(r, &http.index(i), out);
    }
    let tls = p.key("tls");
    for (i, r) in vs.tls.iter().enumerate() {
        let at = tls.index(i);
        let m = at.key("match");
        if r.matches.is_empty() {
            out.error(&m, "a TLS route needs a match with sniHosts");
        }
        for (j, t) in r.matches.iter().enumerate() {
            tls_match(t, &vs.hosts, on_mesh, &m.index(j), out);
        }
        destinations(&r.route, &at.key("route"), out);
    }
    let tcp = p.key("tcp");
    for (i, r) in vs.tcp.iter().enumerate() {
        let at = tcp.index(i);
        let m = at.key("match");
        for (j, t) in r.matches.iter().enumerate() {
            l4_match(t, &m.index(j), out);
        }
        destinations(&r.route, &at.key("route"), out);
    }
    unreachable::check(vs, p, out);
}

/// `outbound_.80_.v1_.host`: the SNI by which a gateway passes sessions of the mesh on.
fn is_sni_of_a_cluster(host: &str) -> bool {
    let parts: Vec<&str> = host.split('_').collect();
    parts[0] == "outbound"
        && parts.len() >= 4
        && parts[1].contains(|c: char| c.is_ascii_digit())
        && parts[3].contains(|c: char| c.is_ascii_alphabetic())
}

/// A VirtualService without hosts is the part of another that delegates to it.
fn delegate(vs: &VirtualService, hosts: &Path<'_>, out: &mut Findings) {
    if vs.http.is_empty() || !vs.tls.is_empty() || !vs.tcp.is_empty() || !vs.gateways.is_empty() {
        out.error(
            hosts,
            "at least one host is required (only a delegate has none, and then only http routes)",
        );
    } else if vs.http.iter().any(|r| r.delegate.is_some()) {
        out.error(hosts, "a VirtualService without hosts is a delegate, and delegates cannot delegate again");
    }
}

/// Whether one name matches some host of the other.
fn overlap(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (None, None) => a.eq_ignore_ascii_case(b),
        (Some(s), None) => b.ends_with(s),
        (None, Some(s)) => a.ends_with(s),
        (Some(x), Some(y)) => x.ends_with(y) || y.ends_with(x),
    }
}

fn http_route(r: &HttpRoute, p: &Path<'_>, out: &mut Findings) {
    let m = p.key("match");
    for (i, x) in r.matches.iter().enumerate() {
        http_match(x, &m.index(i), out);
    }
    if let Some(d) = &r.delegate {
        let at = p.key("delegate");
        if !common::is_fqdn(&d.name) {
            out.error(&at.key("name"), format!("{:?} is not the name of a VirtualService", d.name));
        }
        if !d.namespace.is_empty() && !common::is_dns1123_label(&d.namespace) {
            out.error(&at.key("namespace"), format!("{:?} is not a namespace", d.namespace));
        }
    }
    let actions = usize::from(!r.route.is_empty())
        + usize::from(r.redirect.is_some())
        + usize::from(r.direct_response.is_some())
        + usize::from(r.delegate.is_some());
    if actions == 0 {
        out.error(p, "one of route, redirect, directResponse and delegate is required");
    } else if actions > 1 {
        out.error(p, "only one of route, redirect, directResponse and delegate is allowed");
    }
    for (answers, what) in
        [(r.redirect.is_some(), "redirect"), (r.direct_response.is_some(), "directResponse")]
    {
        for (set, field) in [(r.fault.is_some(), "fault"), (r.rewrite.is_some(), "rewrite")] {
            if set && answers {
                out.error(&p.key(field), format!("{field} cannot be combined with {what}"));
            }
        }
    }
    let route = p.key("route");
    for (i, d) in r.route.iter().enumerate() {
        let at = route.index(i);
        destination(d.destination.as_ref(), &at.key("destination"), out);
        actions::headers(d.headers.as_ref(), &at.key("headers"), out);
    }
    let weights: Vec<i32> = r.route.iter().map(|d| d.weight).collect();
    common::weights(&weights, &route, out);
    if let Some(x) = &r.redirect {
        actions::redirect(x, &r.matches, &p.key("redirect"), out);
    }
    if let Some(d) = &r.direct_response {
        let at = p.key("directResponse");
        if !(200..=599).contains(&d.status) {
            out.error(&at.key("status"), format!("status {} is outside of 200..599", d.status));
        }
        if let Some(b) = &d.body {
            let at = at.key("body");
            if b.string.is_some() == b.bytes.is_some() {
                out.error(&at, "exactly one of string and bytes is required");
            }
            let size = b.string.as_ref().map_or(0, String::len) + b.bytes.as_ref().map_or(0, String::len);
            if size > 1 << 20 {
                out.error(&at, "a body of more than 1 MiB is not accepted");
            } else if size > 100 << 10 {
                out.warning(&at, "a body of more than 100 kB is sent to every proxy that has the route");
            }
        }
    }
    if let Some(x) = &r.rewrite {
        let at = p.key("rewrite");
        if x.uri.is_empty() && x.authority.is_empty() && x.uri_regex_rewrite.is_none() {
            out.error(&at, "one of uri, authority and uriRegexRewrite is required");
        }
        if let Some(rx) = &x.uri_regex_rewrite {
            if !x.uri.is_empty() {
                out.error(&at, "only one of uri and uriRegexRewrite is allowed");
            }
            let at = at.key("uriRegexRewrite");
            common::regex(&rx.pattern, &at.key("match"), out);
            if rx.rewrite.is_empty() {
                out.error(&at.key("rewrite"), "a substitution is required");
            }
        }
        common::header_value(&x.authority, &at.key("authority"), out);
    }
    common::duration(r.timeout, &p.key("timeout"), out);
    if let Some(x) = &r.retries {
        actions::retries(x, &p.key("retries"), out);
    }
    if let Some(x) = &r.fault {
        actions::fault(x, &p.key("fault"), out);
    }
    actions::mirrors(r, p, out);
    if let Some(c) = &r.cors_policy {
        actions::cors(c, &p.key("corsPolicy"), out);
    }
    actions::headers(r.headers.as_ref(), &p.key("headers"), out);
    actions::one_authority(r, p, out);
    for (map, field) in
        [(&r.append_headers, "appendHeaders"), (&r.remove_response_headers, "removeResponseHeaders")]
    {
        let at = p.key(field);
        for (name, value) in map {
            common::header_name(name, &at.key(name), out);
            common::header_value(value, &at.key(name), out);
        }
    }
    if r.websocket_upgrade {
        out.warning(&p.key("websocketUpgrade"), "without effect: upgrades are always accepted");
    }
}

fn http_match(m: &HttpMatchRequest, p: &Path<'_>, out: &mut Findings) {
    if let Some(x) = &m.uri {
        common::path_match(x, &p.key("uri"), out);
    }
    for (x, field) in [(&m.scheme, "scheme"), (&m.method, "method"), (&m.authority, "authority")] {
        if let Some(x) = x {
            common::string_match(x, &p.key(field), out);
        }
    }
    for (map, field) in [(&m.headers, "headers"), (&m.without_headers, "withoutHeaders")] {
        for (name, x) in map {
            let at = p.key(field);
            let at = at.key(name);
            match HeaderKey::of(name) {
                HeaderKey::Header => common::header_name(name, &at, out),
                HeaderKey::Claim(_) => {}
                // As a header it would never match, and as a missing header always.
                HeaderKey::Malformed => out.error(
                    &at,
                    format!(
                        "{name:?} names no claim: write @request.auth.claims.NAME, or @request.auth.claims[NAME] where the \
                         name has dots, and [NAME] again for what is inside of it"
                    ),
                ),
            }
            if HeaderKey::of(name) == HeaderKey::Header && name.bytes().any(|c| c.is_ascii_uppercase()) {
                out.warning(&at, "header names are compared in lower case");
            }
            // `*` is no regular expression; Istio takes it here for "has any value".
            if field == "withoutHeaders" && matches!(x, StringMatch::Regex(r) if r == "*") {
                continue;
            }
            common::string_match(x, &at, out);
        }
    }
    for (name, x) in &m.query_params {
        let at = p.key("queryParams");
        common::string_match(x, &at.key(name), out);
    }
    if m.ignore_uri_case && matches!(m.uri, Some(StringMatch::Regex(_))) {
        out.warning(&p.key("ignoreUriCase"), "without effect on a regular expression");
    }
    if m.port != 0 {
        common::port(m.port, &p.key("port"), out);
    }
    common::labels(&m.source_labels, &p.key("sourceLabels"), out);
    common::gateway_names(&m.gateways, &p.key("gateways"), out);
    if !m.source_namespace.is_empty() && !common::is_dns_label(&m.source_namespace) {
        out.error(&p.key("sourceNamespace"), format!("{:?} is not a namespace", m.source_namespace));
    }
}

fn destination(d: Option<&Destination>, p: &Path<'_>, out: &mut Findings) {
    let Some(d) = d else {
        out.error(p, "a destination is required");
        return;
    };
    common::host(&d.host, &p.key("host"), out);
    if d.host == "*" {
        out.error(&p.key("host"), "'*' is not a destination: name a service");
    }
    if !d.subset.is_empty() && !common::is_dns_label(&d.subset) {
        out.error(&p.key("subset"), format!("{:?} is not the name of a subset", d.subset));
    }
    if let Some(port) = &d.port {
        let at = p.key("port");
        if !port.name.is_empty() {
            out.error(&at.key("name"), "a destination's port is selected by number, not by name");
        } else {
            common::port(port.number, &at.key("number"), out);
        }
    }
}

fn destinations(route: &[RouteDestination], p: &Path<'_>, out: &mut Findings) {
    if route.is_empty() {
        out.error(p, "at least one destination is required");
    }
    for (i, d) in route.iter().enumerate() {
        destination(d.destination.as_ref(), &p.index(i).key("destination"), out);
    }
    let weights: Vec<i32> = route.iter().map(|d| d.weight).collect();
    common::weights(&weights, p, out);
}

fn tls_match(m: &TlsMatchAttributes, hosts: &[String], on_mesh: bool, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("sniHosts");
    if m.sni_hosts.is_empty() {
        out.error(&at, "at least one SNI host is required");
    }
    for (i, s) in m.sni_hosts.iter().enumerate() {
        let at = at.index(i);
        if s.parse::<std::net::IpAddr>().is_ok() {
            out.warning(&at, format!("{s:?} is an IP address, which clients do not send as SNI"));
            continue;
        }
        if on_mesh || !is_sni_of_a_cluster(s) {
            common::host(s, &at, out);
        }
        let covered = hosts.iter().any(|h| h == s || h.strip_prefix('*').is_some_and(|suf| s.ends_with(suf)));
        if !covered {
            out.error(&at, format!("{s:?} is not covered by any host of the VirtualService"));
        }
    }
    l4(&m.destination_subnets, m.port, &m.source_subnet, &m.source_labels, &m.gateways, p, out);
}

fn l4_match(m: &L4MatchAttributes, p: &Path<'_>, out: &mut Findings) {
    l4(&m.destination_subnets, m.port, &m.source_subnet, &m.source_labels, &m.gateways, p, out);
}

fn l4(
    destination_subnets: &[String],
    port: u32,
    source_subnet: &str,
    source_labels: &std::collections::BTreeMap<String, String>,
    gateways: &[String],
    p: &Path<'_>,
    out: &mut Findings,
) {
    let at = p.key("destinationSubnets");
    for (i, s) in destination_subnets.iter().enumerate() {
        common::subnet(s, &at.index(i), out);
    }
    if port != 0 {
        common::port(port, &p.key("port"), out);
    }
    if !source_subnet.is_empty() {
        common::subnet(source_subnet, &p.key("sourceSubnet"), out);
    }
    common::labels(source_labels, &p.key("sourceLabels"), out);
    common::gateway_names(gateways, &p.key("gateways"), out);
}
