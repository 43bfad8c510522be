//! What a route does with a request besides forwarding it.

use mesh_model::authored::{
    CorsPolicy, HeaderOperations, Headers, HttpFaultInjection, HttpMatchRequest, HttpRedirect, HttpRetry,
    HttpRoute, StringMatch,
};

use super::destination;
use crate::{
    path::Path,
    validate::common::{self, Findings},
};

pub(super) fn redirect(x: &HttpRedirect, matches: &[HttpMatchRequest], p: &Path<'_>, out: &mut Findings) {
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
    let prefix = |m: &HttpMatchRequest| m.uri.as_ref().is_none_or(|u| matches!(u, StringMatch::Prefix(_)));
    if !x.prefix_rewrite.is_empty() && !matches.iter().all(prefix) {
        out.error(&p.key("prefixRewrite"), "every match on the path must be a prefix");
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
    "retriable-headers",
    "envoy-ratelimited",
    "cancelled",
    "deadline-exceeded",
    "resource-exhausted",
    "internal",
    "unavailable",
];
/// A condition that Envoy has besides, of servers that it asks in HTTP/3.
const HTTP3: &str = "http3-post-connect-failure";

pub(in crate::validate) fn retries(x: &HttpRetry, p: &Path<'_>, out: &mut Findings) {
    common::not_negative(x.attempts.into(), &p.key("attempts"), out);
    if x.attempts == 0
        && (x.per_try_timeout.is_some() || !x.retry_on.is_empty() || x.retry_remote_localities.is_some())
    {
        out.error(p, "attempts 0 turns retries off: the other fields make no sense");
    }
    common::duration(x.per_try_timeout, &p.key("perTryTimeout"), out);
    common::duration(x.backoff, &p.key("backoff"), out);
    let words = x.retry_on.split(',').filter(|_| !x.retry_on.is_empty());
    for on in words {
        let at = p.key("retryOn");
        if on.trim() != on {
            out.error(&at, format!("{on:?}: conditions are separated by commas alone, remove the space"));
        } else if on == HTTP3 {
            out.warning(&at, format!("condition {on:?} never holds: no server is asked in HTTP/3"));
        } else if !on.parse().is_ok_and(is_status) && !RETRY_ON.contains(&on) {
            out.error(
                &at,
                format!("unknown condition {on:?}, known are status codes, {}", RETRY_ON.join(", ")),
            );
        }
    }
}

/// Status codes that have a registered meaning.
fn is_status(code: u16) -> bool {
    matches!(code, 100..=103 | 200..=208 | 226 | 300..=305 | 307 | 308 | 400..=418 | 421..=426 | 428 | 429 | 431 | 451 | 500..=508 | 510 | 511)
}

pub(super) fn fault(x: &HttpFaultInjection, p: &Path<'_>, out: &mut Findings) {
    if x.delay.is_none() && x.abort.is_none() {
        out.error(p, "one of delay and abort is required");
    }
    if let Some(d) = &x.delay {
        let at = p.key("delay");
        common::percent(d.percent.into(), &at.key("percent"), out);
        common::fault_percentage(d.percentage.as_ref(), &at.key("percentage"), out);
        if d.exponential_delay.is_some() {
            out.error(&at.key("exponentialDelay"), "exponentialDelay is not supported");
        } else if d.fixed_delay.is_none() {
            out.warning(&at, "without fixedDelay nothing is delayed");
        }
        common::duration(d.fixed_delay, &at.key("fixedDelay"), out);
        if d.percent == 0 && d.percentage.is_none() {
            out.warning(&at, "without percentage no request is delayed");
        }
    }
    if let Some(a) = &x.abort {
        let at = p.key("abort");
        common::percent(a.percent.into(), &at.key("percent"), out);
        common::fault_percentage(a.percentage.as_ref(), &at.key("percentage"), out);
        if a.http2_error.is_some() {
            out.error(&at.key("http2Error"), "http2Error is not supported");
        }
        match (a.http_status, &a.grpc_status) {
            (None, None) => out.warning(&at, "without httpStatus or grpcStatus no request is aborted"),
            (Some(_), Some(_)) => out.error(&at, "only one of httpStatus and grpcStatus is allowed"),
            (Some(s), None) if !(200..=599).contains(&s) => {
                out.error(&at.key("httpStatus"), format!("status {s} is outside of 200..599"));
            }
            (None, Some(s)) if !is_grpc_status(s) => {
                out.error(&at.key("grpcStatus"), format!("{s:?} is not a gRPC status such as UNAVAILABLE"));
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
    NAMES.contains(&s)
}

pub(super) fn mirrors(r: &HttpRoute, p: &Path<'_>, out: &mut Findings) {
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
        out.warning(&p.key("mirrorPercent"), "mirrorPercent is deprecated; use mirrorPercentage");
    }
    common::percentage(r.mirror_percentage.as_ref(), &p.key("mirrorPercentage"), out);
}

pub(super) fn cors(c: &CorsPolicy, p: &Path<'_>, out: &mut Findings) {
    const METHODS: [&str; 10] =
        ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"];
    if !c.allow_origin.is_empty() && !c.allow_origins.is_empty() {
        out.warning(&p.key("allowOrigin"), "allowOrigin is deprecated; use allowOrigins alone");
    }
    let origins = p.key("allowOrigins");
    for (i, o) in c.allow_origins.iter().enumerate() {
        let at = origins.index(i);
        if matches!(o, StringMatch::Present) || matches!(o, StringMatch::Exact(s) if s.is_empty()) {
            out.error(&at, "one of exact, prefix and regex is required, and not empty");
        }
        common::string_match(o, &at, out);
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
    common::duration(c.max_age, &p.key("maxAge"), out);
    if let Some(age) = c.max_age
        && age.0.subsec_nanos() != 0
    {
        out.error(&p.key("maxAge"), "a whole number of seconds is required");
    }
}

pub(super) fn headers(h: Option<&Headers>, p: &Path<'_>, out: &mut Findings) {
    let Some(h) = h else { return };
    operations(h.request.as_ref(), true, &p.key("request"), out);
    operations(h.response.as_ref(), false, &p.key("response"), out);
}

fn operations(ops: Option<&HeaderOperations>, of_request: bool, p: &Path<'_>, out: &mut Findings) {
    let Some(ops) = ops else { return };
    for (map, field) in [(&ops.set, "set"), (&ops.add, "add")] {
        let at = p.key(field);
        for (name, value) in map {
            let at = at.key(name);
            common::header_name(name, &at, out);
            common::header_value(value, &at, out);
            let authority = is_authority(name);
            if (name.starts_with(':') && !authority) || (authority && !of_request) {
                out.error(&at, format!("{name:?} cannot be changed"));
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

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case(":authority") || name.eq_ignore_ascii_case("host")
}

/// A rewrite of the authority and a change of that header would contradict each other.
pub(super) fn one_authority(r: &HttpRoute, p: &Path<'_>, out: &mut Findings) {
    let rewritten = r.rewrite.as_ref().is_some_and(|x| !x.authority.is_empty());
    let request = r.headers.as_ref().and_then(|h| h.request.as_ref());
    let names = request.into_iter().flat_map(|o| o.set.keys().chain(o.add.keys()));
    let changes = names.filter(|n| is_authority(n)).count() + usize::from(rewritten);
    if changes > 1 {
        out.error(
            &p.key("headers").key("request"),
            "the authority is set more than once: keep one of rewrite.authority and headers.request",
        );
    }
}
