//! Rules of VirtualService.

use mesh_model::authored::{
    CorsPolicy, Destination, HeaderOperations, Headers, HttpFaultInjection, HttpMatchRequest, HttpRetry,
    HttpRoute, L4MatchAttributes, RouteDestination, StringMatch, TlsMatchAttributes, UnmatchedPreflights,
    VirtualService,
};

use super::common::{self, Findings};
use crate::path::Path;

pub(super) fn check(vs: &VirtualService, api_version: &str, p: &Path<'_>, out: &mut Findings) {
    common::gateway_names(&vs.gateways, &p.key("gateways"), out);
    common::export_to(&vs.export_to, false, p, out);
    let on_mesh = vs.gateways.is_empty() || vs.gateways.iter().any(|g| g == "mesh");
    let hosts = p.key("hosts");
    if vs.hosts.is_empty() {
        delegate(vs, &hosts, out);
    }
    for (i, h) in vs.hosts.iter().enumerate() {
        let at = hosts.index(i);
        if h.parse::<std::net::IpAddr>().is_ok() {
            if on_mesh {
                out.error(&at, "an IP address can only be a host at a gateway");
            }
        } else {
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
        http_route(r, api_version, &http.index(i), out);
        if i + 1 < vs.http.len() && (r.matches.is_empty() || r.matches.iter().any(matches_everything)) {
            out.warning(&http.index(i + 1), "never reached: an earlier route matches every request");
            break;
        }
    }
    let tls = p.key("tls");
    for (i, r) in vs.tls.iter().enumerate() {
        let at = tls.index(i);
        let m = at.key("match");
        if r.matches.is_empty() {
            out.error(&m, "a TLS route needs a match with sniHosts");
        }
        for (j, t) in r.matches.iter().enumerate() {
            tls_match(t, &vs.hosts, &m.index(j), out);
        }
        destinations(&r.route, api_version, &at.key("route"), out);
    }
    let tcp = p.key("tcp");
    for (i, r) in vs.tcp.iter().enumerate() {
        let at = tcp.index(i);
        let m = at.key("match");
        for (j, t) in r.matches.iter().enumerate() {
            l4_match(t, &m.index(j), out);
        }
        destinations(&r.route, api_version, &at.key("route"), out);
    }
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
    } else {
        out.warning(
            hosts,
            "without hosts it has no effect of its own, only as a delegate of another VirtualService",
        );
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

fn matches_everything(m: &HttpMatchRequest) -> bool {
    let all = HttpMatchRequest { uri: m.uri.clone(), name: m.name.clone(), ..HttpMatchRequest::default() };
    let any_path = match &m.uri {
        None | Some(StringMatch::Present) => true,
        Some(StringMatch::Prefix(prefix)) => prefix == "/",
        Some(_) => false,
    };
    *m == all && any_path
}

fn http_route(r: &HttpRoute, api_version: &str, p: &Path<'_>, out: &mut Findings) {
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
    if r.route.is_empty() {
        for (set, field) in [(r.fault.is_some(), "fault"), (r.rewrite.is_some(), "rewrite")] {
            if set && r.redirect.is_some() {
                out.error(&p.key(field), format!("{field} cannot be combined with redirect"));
            }
        }
    }
    let route = p.key("route");
    for (i, d) in r.route.iter().enumerate() {
        let at = route.index(i);
        destination(d.destination.as_ref(), &at.key("destination"), out);
        headers(d.headers.as_ref(), &at.key("headers"), out);
    }
    let weights: Vec<i32> = r.route.iter().map(|d| d.weight).collect();
    common::weights(&weights, api_version, &route, out);
    if let Some(x) = &r.redirect {
        redirect(x, &p.key("redirect"), out);
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
            common::regex(&rx.pattern, &at.key("uriRegexRewrite").key("match"), out);
        }
        common::header_value(&x.authority, &at.key("authority"), out);
    }
    common::duration_or_zero(r.timeout, &p.key("timeout"), out);
    if let Some(x) = &r.retries {
        retries(x, &p.key("retries"), out);
    }
    if let Some(x) = &r.fault {
        fault(x, &p.key("fault"), out);
    }
    mirrors(r, p, out);
    if let Some(c) = &r.cors_policy {
        cors(c, &p.key("corsPolicy"), out);
    }
    headers(r.headers.as_ref(), &p.key("headers"), out);
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
    for (x, field) in
        [(&m.uri, "uri"), (&m.scheme, "scheme"), (&m.method, "method"), (&m.authority, "authority")]
    {
        if let Some(x) = x {
            common::string_match(x, &p.key(field), out);
        }
    }
    for (map, field) in [(&m.headers, "headers"), (&m.without_headers, "withoutHeaders")] {
        for (name, x) in map {
            let at = p.key(field);
            let at = at.key(name);
            common::header_name(name, &at, out);
            if name.bytes().any(|c| c.is_ascii_uppercase()) {
                out.warning(&at, "header names are compared in lower case");
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
    out.unenforced(!m.stat_prefix.is_empty(), p, "statPrefix");
}

fn destination(d: Option<&Destination>, p: &Path<'_>, out: &mut Findings) {
    let Some(d) = d else {
        out.error(p, "a destination is required");
        return;
    };
    common::host(&d.host, &p.key("host"), out);
    if d.host.starts_with('*') {
        out.error(&p.key("host"), "a destination cannot be a wildcard");
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

fn destinations(route: &[RouteDestination], api_version: &str, p: &Path<'_>, out: &mut Findings) {
    if route.is_empty() {
        out.error(p, "at least one destination is required");
    }
    for (i, d) in route.iter().enumerate() {
        destination(d.destination.as_ref(), &p.index(i).key("destination"), out);
    }
    let weights: Vec<i32> = route.iter().map(|d| d.weight).collect();
    common::weights(&weights, api_version, p, out);
}

fn redirect(x: &mesh_model::authored::HttpRedirect, p: &Path<'_>, out: &mut Findings) {
    if x.uri.is_empty()
        && x.authority.is_empty()
        && x.prefix_rewrite.is_empty()
        && x.scheme.is_empty()
        && x.port.is_none()
        && x.derive_port.is_none()
    {
        out.error(p, "one of uri, authority, port, scheme and prefixRewrite is required");
    }
    if !x.uri.is_empty() && !x.prefix_rewrite.is_empty() {
        out.error(p, "only one of uri and prefixRewrite is allowed");
    }
    if x.port.is_some() && x.derive_port.is_some() {
        out.error(p, "only one of port and derivePort is allowed");
    }
    if let Some(n) = x.port {
        common::port(n, &p.key("port"), out);
    }
    if !matches!(x.redirect_code, 0 | 301 | 302 | 303 | 307 | 308) {
        out.error(
            &p.key("redirectCode"),
            format!("{} is not one of 301, 302, 303, 307, 308", x.redirect_code),
        );
    }
    if !matches!(x.scheme.as_str(), "" | "http" | "https") {
        out.error(&p.key("scheme"), format!("scheme {:?} is neither http nor https", x.scheme));
    }
    common::header_value(&x.authority, &p.key("authority"), out);
    common::header_value(&x.uri, &p.key("uri"), out);
}

/// Conditions of `retryOn` that the proxy has.
const RETRY_ON: &[&str] = &[
    "5xx",
    "gateway-error",
    "connect-failure",
    "refused-stream",
    "reset",
    "reset-before-request",
    "retriable-4xx",
    "retriable-status-codes",
    "cancelled",
    "deadline-exceeded",
    "resource-exhausted",
    "internal",
    "unavailable",
];

fn retries(x: &HttpRetry, p: &Path<'_>, out: &mut Findings) {
    common::not_negative(x.attempts.into(), &p.key("attempts"), out);
    if x.attempts == 0 && (x.per_try_timeout.is_some() || !x.retry_on.is_empty()) {
        out.error(p, "perTryTimeout and retryOn make no sense with attempts 0, which turns retries off");
    }
    common::duration_or_zero(x.per_try_timeout, &p.key("perTryTimeout"), out);
    common::duration(x.backoff, &p.key("backoff"), out);
    for on in x.retry_on.split(',').map(str::trim).filter(|s| !s.is_empty()) {
        let is_code = on.parse::<u16>().is_ok_and(|c| (100..600).contains(&c));
        if !is_code && !RETRY_ON.contains(&on) {
            out.error(
                &p.key("retryOn"),
                format!("unknown condition {on:?}, known are {}", RETRY_ON.join(", ")),
            );
        }
    }
    out.unenforced(x.retry_remote_localities.is_some(), p, "retryRemoteLocalities");
}

fn fault(x: &HttpFaultInjection, p: &Path<'_>, out: &mut Findings) {
    if x.delay.is_none() && x.abort.is_none() {
        out.error(p, "one of delay and abort is required");
    }
    if let Some(d) = &x.delay {
        let at = p.key("delay");
        common::percent(d.percent.into(), &at.key("percent"), out);
        common::percentage(d.percentage.as_ref(), &at.key("percentage"), out);
        if d.exponential_delay.is_some() {
            out.error(&at.key("exponentialDelay"), "exponentialDelay is not supported");
        } else if d.fixed_delay.is_none() {
            out.error(&at, "fixedDelay is required");
        }
        common::duration(d.fixed_delay, &at.key("fixedDelay"), out);
        if d.percent == 0 && d.percentage.is_none() {
            out.warning(&at, "without percentage no request is delayed");
        }
    }
    if let Some(a) = &x.abort {
        let at = p.key("abort");
        common::percent(a.percent.into(), &at.key("percent"), out);
        common::percentage(a.percentage.as_ref(), &at.key("percentage"), out);
        if a.http2_error.is_some() {
            out.error(&at.key("http2Error"), "http2Error is not supported");
        }
        match (a.http_status, &a.grpc_status) {
            (None, None) => out.error(&at, "one of httpStatus and grpcStatus is required"),
            (Some(_), Some(_)) => out.error(&at, "only one of httpStatus and grpcStatus is allowed"),
            (Some(s), None) if !(200..=599).contains(&s) => {
                out.error(&at.key("httpStatus"), format!("status {s} is outside of 200..599"));
            }
            (None, Some(s)) if !is_grpc_status(s) => {
                out.error(&at.key("grpcStatus"), format!("{s:?} is not a gRPC status"));
            }
            _ => {}
        }
        if a.percent == 0 && a.percentage.is_none() {
            out.warning(&at, "without percentage no request is aborted");
        }
    }
}

fn is_grpc_status(s: &str) -> bool {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    NAMES.contains(&s.to_ascii_uppercase().as_str()) || s.parse::<u8>().is_ok_and(|n| n <= 16)
}

fn mirrors(r: &HttpRoute, p: &Path<'_>, out: &mut Findings) {
    if r.mirror.is_some() && !r.mirrors.is_empty() {
        out.error(&p.key("mirrors"), "only one of mirror and mirrors is allowed");
    }
    if let Some(m) = &r.mirror {
        destination(Some(m), &p.key("mirror"), out);
    }
    let at = p.key("mirrors");
    for (i, m) in r.mirrors.iter().enumerate() {
        destination(m.destination.as_ref(), &at.index(i).key("destination"), out);
        common::percentage(m.percentage.as_ref(), &at.index(i).key("percentage"), out);
    }
    if let Some(n) = r.mirror_percent {
        common::percent(n.into(), &p.key("mirrorPercent"), out);
    }
    common::percentage(r.mirror_percentage.as_ref(), &p.key("mirrorPercentage"), out);
}

fn cors(c: &CorsPolicy, p: &Path<'_>, out: &mut Findings) {
    const METHODS: [&str; 10] =
        ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"];
    if !c.allow_origin.is_empty() && !c.allow_origins.is_empty() {
        out.error(&p.key("allowOrigin"), "only one of allowOrigin and allowOrigins is allowed");
    }
    let origins = p.key("allowOrigins");
    for (i, o) in c.allow_origins.iter().enumerate() {
        common::string_match(o, &origins.index(i), out);
    }
    let methods = p.key("allowMethods");
    for (i, m) in c.allow_methods.iter().enumerate() {
        if !METHODS.contains(&m.as_str()) {
            out.error(&methods.index(i), format!("{m:?} is not an HTTP method"));
        }
    }
    for (list, field) in [(&c.allow_headers, "allowHeaders"), (&c.expose_headers, "exposeHeaders")] {
        let at = p.key(field);
        for (i, h) in list.iter().enumerate() {
            if h != "*" {
                common::header_name(h, &at.index(i), out);
            }
        }
    }
    if let Some(age) = c.max_age
        && age.0.subsec_nanos() != 0
    {
        out.error(&p.key("maxAge"), "a whole number of seconds is required");
    }
    out.unenforced(c.unmatched_preflights == UnmatchedPreflights::Ignore, p, "unmatchedPreflights");
}

fn headers(h: Option<&Headers>, p: &Path<'_>, out: &mut Findings) {
    let Some(h) = h else { return };
    operations(h.request.as_ref(), &p.key("request"), out);
    operations(h.response.as_ref(), &p.key("response"), out);
}

fn operations(ops: Option<&HeaderOperations>, p: &Path<'_>, out: &mut Findings) {
    let Some(ops) = ops else { return };
    for (map, field) in [(&ops.set, "set"), (&ops.add, "add")] {
        let at = p.key(field);
        for (name, value) in map {
            let at = at.key(name);
            common::header_name(name, &at, out);
            common::header_value(value, &at, out);
            if name.starts_with(':') && name != ":authority" {
                out.error(&at, format!("pseudo-header {name:?} cannot be changed"));
            }
        }
    }
    let at = p.key("remove");
    for (i, name) in ops.remove.iter().enumerate() {
        common::header_name(name, &at.index(i), out);
        if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
            out.error(&at.index(i), format!("{name:?} cannot be removed"));
        }
    }
}

fn tls_match(m: &TlsMatchAttributes, hosts: &[String], p: &Path<'_>, out: &mut Findings) {
    let at = p.key("sniHosts");
    if m.sni_hosts.is_empty() {
        out.error(&at, "at least one SNI host is required");
    }
    for (i, s) in m.sni_hosts.iter().enumerate() {
        let at = at.index(i);
        common::host(s, &at, out);
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
    out.unenforced(!source_subnet.is_empty(), p, "sourceSubnet");
    common::labels(source_labels, &p.key("sourceLabels"), out);
    common::gateway_names(gateways, &p.key("gateways"), out);
}
