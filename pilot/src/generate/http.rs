//! HTTP routes from a `VirtualService`, and the route of a service without one.

use std::{collections::BTreeSet, time::Duration};

use base64::Engine as _;
use mesh_model::{
    Rare,
    authored::{
        CorsPolicy, Destination, HeaderKey, HeaderOperations, Headers, HttpFaultInjection, HttpMatchRequest,
        HttpRedirect, HttpRetry, HttpRoute, HttpRouteDestination, Percent, RedirectPortSelection,
        StringMatch as Authored, UnmatchedPreflights, VirtualService,
    },
    proxy::{
        AbortKind, Cors, DirectResponse, Fault, Forward, HashPolicy, HeaderMatch, HeaderOps,
        HeaderValueMatch, Mirror, PathMatch, QueryMatch, Redirect, RetryOn, RetryPolicy, Route, RouteAction,
        RouteMatch, SessionOverride, StringMatch, WeightedCluster,
    },
};

use super::{Ctx, common::cluster_name, jwt, session};
use crate::{
    config::{Doc, selects},
    gateway_api, hosts,
    index::Entry,
    ingress,
    world::effective_policy,
};

const MILLION: u32 = 1_000_000;

/// Whose routes are generated.
#[derive(Clone, Copy)]
pub(super) enum Scope<'s> {
    /// Sidecars.
    Mesh,
    /// A gateway proxy that implements these `namespace/name` gateways.
    Gateways(&'s BTreeSet<String>),
}

/// A gateway reference as `namespace/name`; `mesh` stays.
fn gateway_key(reference: &str, namespace: &str) -> String {
    if reference == "mesh" || reference.contains('/') {
        return reference.to_owned();
    }
    // The form of release 1.0: `name.namespace.svc.cluster.local`.
    let mut parts = reference.split('.');
    match (parts.next(), parts.next()) {
        (Some(name), Some(ns)) => format!("{ns}/{name}"),
        _ => format!("{namespace}/{reference}"),
    }
}

impl Scope<'_> {
    fn accepts(self, gateways: &[String], namespace: &str) -> bool {
        match self {
            Self::Mesh => gateways.iter().any(|g| g == "mesh"),
            Self::Gateways(own) => gateways.iter().any(|g| own.contains(&gateway_key(g, namespace))),
        }
    }

    /// Whether a document applies here.
    pub(super) fn bound(self, doc: &Doc<VirtualService>) -> bool {
        if doc.spec.gateways.is_empty() {
            return matches!(self, Self::Mesh);
        }
        self.accepts(&doc.spec.gateways, &doc.namespace)
    }

    /// Whether conditions on the caller that are known now hold.
    pub(super) fn source_matches(
        self,
        ctx: &Ctx<'_>,
        doc_namespace: &str,
        gateways: &[String],
        labels: &std::collections::BTreeMap<String, String>,
        namespace: &str,
    ) -> bool {
        (gateways.is_empty() || self.accepts(gateways, doc_namespace))
            && selects(labels, &ctx.proxy.labels)
            && (namespace.is_empty() || namespace == ctx.proxy.namespace)
    }
}

/// The cluster of a destination, and its service if the proxy knows it.
pub(super) fn destination<'a>(
    ctx: &Ctx<'a>,
    namespace: &str,
    d: &Destination,
    listener_port: u16,
) -> (String, Option<&'a Entry>, u16) {
    let host = hosts::resolve(&d.host, namespace);
    let entry = ctx.service(&host).map(|e| &**e);
    let host = ctx.world.index.canonical(&host);
    let number = d.port.as_ref().and_then(|p| u16::try_from(p.number).ok()).filter(|n| *n > 0);
    let port = number.unwrap_or_else(|| match entry.map(|e| e.service.ports.as_slice()) {
        Some([only]) => only.port,
        _ => listener_port,
    });
    (cluster_name(port, &d.subset, host), entry, port)
}

/// Istio's default: two more tries where the request has not been processed.
pub(super) fn default_retry() -> RetryPolicy {
    RetryPolicy {
        on: vec![
            RetryOn::ConnectFailure,
            RetryOn::RefusedStream,
            RetryOn::Unavailable,
            RetryOn::Cancelled,
            RetryOn::ResetBeforeRequest,
        ],
        status_codes: vec![],
        attempts: 2,
        per_try_timeout: None,
        base_interval: Duration::from_millis(25),
        max_interval: Duration::from_millis(250),
        host_selection_attempts: 5,
        ..RetryPolicy::default()
    }
}

/// Tries after which priorities are left, as in Istio.
const LEAVE_PRIORITIES: u32 = 2;

pub(super) fn retry(r: &HttpRetry) -> Option<RetryPolicy> {
    let attempts = u32::try_from(r.attempts).unwrap_or(0);
    if attempts == 0 {
        return None;
    }
    let mut p = RetryPolicy { attempts, ..default_retry() };
    p.per_try_timeout = r.per_try_timeout.map(Duration::from).filter(|d| !d.is_zero());
    if let Some(b) = r.backoff.map(Duration::from).filter(|b| !b.is_zero()) {
        p.base_interval = b;
        p.max_interval = b * 10;
    }
    if r.retry_ignore_previous_hosts == Some(false) {
        p.host_selection_attempts = 0;
    }
    if r.retry_remote_localities == Some(true) {
        p.leave_priorities = LEAVE_PRIORITIES;
    }
    if !r.retry_on.is_empty() {
        p.on.clear();
        for word in r.retry_on.split(',').map(str::trim) {
            if let Ok(code) = word.parse::<u16>() {
                p.status_codes.push(code);
                continue;
            }
            let on = match word {
                "5xx" => RetryOn::ServerError,
                "gateway-error" => RetryOn::GatewayError,
                "connect-failure" => RetryOn::ConnectFailure,
                "refused-stream" => RetryOn::RefusedStream,
                "reset" => RetryOn::Reset,
                "reset-before-request" => RetryOn::ResetBeforeRequest,
                "retriable-4xx" => RetryOn::Retriable4xx,
                "retriable-status-codes" => RetryOn::RetriableStatusCodes,
                "retriable-headers" => RetryOn::RetriableHeaders,
                "envoy-ratelimited" => RetryOn::EnvoyRateLimited,
                "cancelled" => RetryOn::Cancelled,
                "deadline-exceeded" => RetryOn::DeadlineExceeded,
                "resource-exhausted" => RetryOn::ResourceExhausted,
                "internal" => RetryOn::Internal,
                "unavailable" => RetryOn::Unavailable,
                // Validation has warned about it.
                _ => continue,
            };
            if !p.on.contains(&on) {
                p.on.push(on);
            }
        }
        if !p.status_codes.is_empty() && !p.on.contains(&RetryOn::RetriableStatusCodes) {
            p.on.push(RetryOn::RetriableStatusCodes);
        }
    }
    Some(p)
}

/// The route of a service for which no document says anything.
pub(super) fn default_route(ctx: &Ctx<'_>, entry: &Entry, port: u16) -> Route {
    let cluster = cluster_name(port, "", &entry.service.host);
    let forward = Forward {
        clusters: vec![WeightedCluster::only(cluster)],
        retry: ctx.retry().map(Box::new),
        hash: hash_policy(ctx, entry, port, ""),
        ..Forward::default()
    };
    let mut out = Route {
        name: "default".to_owned(),
        operation: format!("{}:{port}/*", entry.service.host),
        ..route(RouteMatch::any(), RouteAction::Forward(Box::new(forward)))
    };
    if let Some(s) = session::of_service(entry) {
        out.filters.session = Some(SessionOverride::Set(s));
    }
    out
}

pub(super) fn route(matches: RouteMatch, action: RouteAction) -> Route {
    Route {
        name: String::new(),
        matches,
        action,
        request_headers: Rare::default(),
        response_headers: Rare::default(),
        fault: None,
        cors: None,
        operation: String::new(),
        filters: Rare::default(),
    }
}

/// Routes of a document for one port. Stops after a route that matches everything.
pub(super) fn routes(ctx: &Ctx<'_>, doc: &Doc<VirtualService>, port: u16, scope: Scope<'_>) -> Vec<Route> {
    let mut out = Vec::new();
    let semantics = [gateway_api::SEMANTICS, ingress::SEMANTICS];
    let segments = semantics.iter().any(|a| doc.annotations.contains_key(*a));
    for r in &doc.spec.http {
        if let Some(d) = &r.delegate {
            let ns = if d.namespace.is_empty() { &doc.namespace } else { &d.namespace };
            let child = ctx
                .world
                .config
                .virtual_services
                .iter()
                .find(|v| v.name == d.name && v.namespace == *ns && v.spec.hosts.is_empty());
            for inner in child.iter().flat_map(|c| &c.spec.http) {
                let merged = delegated(r, inner);
                if one(ctx, ns, &merged, port, scope, segments, &mut out) {
                    return out;
                }
            }
            continue;
        }
        if one(ctx, &doc.namespace, r, port, scope, segments, &mut out) {
            return out;
        }
    }
    out
}

/// A child's route under a parent's conditions.
fn delegated(parent: &HttpRoute, child: &HttpRoute) -> HttpRoute {
    let none = [HttpMatchRequest::default()];
    let parents: &[HttpMatchRequest] = if parent.matches.is_empty() { &none } else { &parent.matches };
    let children: &[HttpMatchRequest] = if child.matches.is_empty() { &none } else { &child.matches };
    let mut matches = Vec::new();
    for p in parents {
        for c in children {
            let mut m = c.clone();
            m.uri = m.uri.or_else(|| p.uri.clone());
            m.scheme = m.scheme.or_else(|| p.scheme.clone());
            m.method = m.method.or_else(|| p.method.clone());
            m.authority = m.authority.or_else(|| p.authority.clone());
            for (k, v) in &p.headers {
                m.headers.entry(k.clone()).or_insert_with(|| v.clone());
            }
            for (k, v) in &p.query_params {
                m.query_params.entry(k.clone()).or_insert_with(|| v.clone());
            }
            for (k, v) in &p.without_headers {
                m.without_headers.entry(k.clone()).or_insert_with(|| v.clone());
            }
            for (k, v) in &p.source_labels {
                m.source_labels.entry(k.clone()).or_insert_with(|| v.clone());
            }
            if m.port == 0 {
                m.port = p.port;
            }
            m.ignore_uri_case |= p.ignore_uri_case;
            if m.stat_prefix.is_empty() {
                m.stat_prefix.clone_from(&p.stat_prefix);
            }
            matches.push(m);
        }
    }
    HttpRoute { matches, ..child.clone() }
}

/// Adds the routes of one rule; true if one of them matches everything.
fn one(
    ctx: &Ctx<'_>,
    namespace: &str,
    r: &HttpRoute,
    port: u16,
    scope: Scope<'_>,
    segments: bool,
    out: &mut Vec<Route>,
) -> bool {
    if r.matches.is_empty() {
        if let Some(mut made) = build(ctx, namespace, r, RouteMatch::any(), port) {
            made.name.clone_from(&r.name);
            out.push(made);
            return true;
        }
        return false;
    }
    for m in &r.matches {
        if m.port != 0 && m.port != u32::from(port) {
            continue;
        }
        if !scope.source_matches(ctx, namespace, &m.gateways, &m.source_labels, &m.source_namespace) {
            continue;
        }
        let matches = route_match(m, segments);
        let all = matches == RouteMatch::any();
        if let Some(mut made) = build(ctx, namespace, r, matches, port) {
            made.name = match (r.name.as_str(), m.name.as_str()) {
                (r, "") => r.to_owned(),
                ("", m) => m.to_owned(),
                (r, m) => format!("{r}.{m}"),
            };
            if !m.stat_prefix.is_empty() {
                made.filters.stat_prefix.clone_from(&m.stat_prefix);
            }
            out.push(made);
            if all {
                return true;
            }
        }
    }
    false
}

fn string_match(m: &Authored) -> Option<StringMatch> {
    match m {
        Authored::Present => None,
        Authored::Exact(s) => Some(StringMatch::exact(s)),
        Authored::Prefix(s) if s.is_empty() => None,
        Authored::Prefix(s) => Some(StringMatch::prefix(s)),
        Authored::Regex(s) => Some(StringMatch::regex(s)),
    }
}

fn header(name: &str, m: &Authored, invert: bool) -> HeaderMatch {
    let value = string_match(m).map_or(HeaderValueMatch::Present(true), HeaderValueMatch::Value);
    // What has no such header is not of the value either.
    let missing_is_empty = invert && matches!(value, HeaderValueMatch::Value(_));
    HeaderMatch { name: name.to_ascii_lowercase(), value, invert, missing_is_empty }
}

/// `segments`: prefixes are of whole segments. One that ends with a slash is in any case.
fn route_match(m: &HttpMatchRequest, segments: bool) -> RouteMatch {
    let path = match &m.uri {
        None | Some(Authored::Present) => PathMatch::Prefix("/".to_owned()),
        Some(Authored::Exact(s)) => PathMatch::Exact(s.clone()),
        Some(Authored::Prefix(s)) if segments && !s.ends_with('/') => PathMatch::SegmentPrefix(s.clone()),
        Some(Authored::Prefix(s)) => PathMatch::Prefix(s.clone()),
        Some(Authored::Regex(s)) => PathMatch::Regex(s.clone()),
    };
    let mut headers = Vec::new();
    for (name, m) in [(":scheme", &m.scheme), (":method", &m.method), (":authority", &m.authority)] {
        if let Some(m) = m {
            headers.push(header(name, m, false));
        }
    }
    // These keys have fields of their own and are ignored as headers.
    let own = ["uri", "scheme", "method", "authority"];
    let mut metadata = Vec::new();
    let named = m.headers.iter().filter(|(k, _)| !own.contains(&k.as_str())).map(|kv| (kv, false));
    for ((name, value), invert) in named.chain(m.without_headers.iter().map(|kv| (kv, true))) {
        match HeaderKey::of(name) {
            // Where nothing verifies tokens, as at sidecars for what their workloads send, there are no claims.
            HeaderKey::Claim(path) => metadata.push(jwt::route_claim(path, string_match(value), invert)),
            HeaderKey::Header | HeaderKey::Malformed => headers.push(header(name, value, invert)),
        }
    }
    let query =
        m.query_params.iter().map(|(k, v)| QueryMatch { name: k.clone(), value: string_match(v) }).collect();
    let regex = matches!(m.uri, Some(Authored::Regex(_)));
    RouteMatch { path, case_sensitive: regex || !m.ignore_uri_case, headers, query, metadata }
}

fn build(ctx: &Ctx<'_>, namespace: &str, r: &HttpRoute, matches: RouteMatch, port: u16) -> Option<Route> {
    let asked = r.extras.as_ref().map_or(&[][..], |e| &e.authorizers);
    let action = if asked.iter().any(|a| !ctx.authorizers().contains_key(&a.name)) {
        // Nobody can say yes.
        RouteAction::Direct(DirectResponse { status: 500, body: vec![] })
    } else if let Some(d) = &r.redirect {
        RouteAction::Redirect(redirect(d, port))
    } else if let Some(d) = &r.direct_response {
        let body = match &d.body {
            None => vec![],
            Some(b) => match (&b.string, &b.bytes) {
                (Some(s), _) => s.clone().into_bytes(),
                (None, Some(b)) => base64::engine::general_purpose::STANDARD.decode(b).unwrap_or_default(),
                (None, None) => vec![],
            },
        };
        RouteAction::Direct(DirectResponse { status: u16::try_from(d.status).unwrap_or(500), body })
    } else {
        RouteAction::Forward(Box::new(forward(ctx, namespace, r, &matches, port)?))
    };
    let mut out = route(matches, action);
    let (mut request, mut response) = header_ops(r.headers.as_ref());
    // The fields of release 1.0.
    request.add.extend(r.append_headers.iter().map(|(k, v)| (k.clone(), v.clone())));
    response.remove.extend(r.remove_response_headers.keys().cloned());
    (out.request_headers, out.response_headers) = (request.into(), response.into());
    out.fault = r.fault.as_ref().and_then(fault).map(Box::new);
    out.cors = r.cors_policy.as_ref().map(|c| Box::new(cors(c)));
    if let Some(d) = r.route.first().and_then(|d| d.destination.as_ref()) {
        out.operation = format!("{}:{port}/*", hosts::resolve(&d.host, namespace));
    }
    if !asked.is_empty() {
        out.filters.authorizers = asked.iter().map(|a| a.name.clone()).collect();
        out.filters.authorizers.sort();
    }
    if matches!(out.action, RouteAction::Forward(_))
        && let Some(s) = session::of_route(ctx, namespace, r)
    {
        out.filters.session = Some(SessionOverride::Set(s));
    }
    Some(out)
}

fn forward(
    ctx: &Ctx<'_>,
    namespace: &str,
    r: &HttpRoute,
    matches: &RouteMatch,
    port: u16,
) -> Option<Forward> {
    let mut clusters = Vec::new();
    let mut hash = Vec::new();
    let single = r.route.len() == 1;
    let all_zero = r.route.iter().all(|d| d.weight <= 0);
    // A session stays where it is, whatever becomes of weights.
    let stays = r.extras.as_ref().is_some_and(|e| e.session.is_some());
    for d in &r.route {
        let Some(dest) = &d.destination else { continue };
        let weight = u32::try_from(d.weight).unwrap_or(0);
        // One destination gets everything, whatever it says; of several, those without weight nothing.
        if weight == 0 && !single && !all_zero && !stays {
            continue;
        }
        let (cluster, entry, dest_port) = destination(ctx, namespace, dest, port);
        if hash.is_empty()
            && let Some(e) = entry
        {
            hash = hash_policy(ctx, e, dest_port, &dest.subset);
        }
        let weight = if single || all_zero { 1 } else { weight };
        clusters.push(weighted(d, cluster, weight));
    }
    if clusters.is_empty() {
        return None;
    }
    let (prefix_rewrite, regex_rewrite) = match &r.rewrite {
        None => (None, None),
        Some(w) => match (&w.uri_regex_rewrite, w.uri.is_empty()) {
            (Some(x), _) => (None, Some((x.pattern.clone(), x.rewrite.clone()))),
            (None, true) => (None, None),
            (None, false) => match &matches.path {
                // There is no prefix to replace: the whole path.
                PathMatch::Regex(p) => (None, Some((p.clone(), w.uri.replace('\\', "\\\\")))),
                _ => (Some(w.uri.clone()), None),
            },
        },
    };
    Some(Forward {
        clusters,
        timeout: r.timeout.map(Duration::from).filter(|d| !d.is_zero()),
        idle_timeout: None,
        retry: r.retries.as_ref().map_or_else(|| ctx.retry(), retry).map(Box::new),
        prefix_rewrite,
        regex_rewrite,
        forwarded_host: r.rewrite.is_some() && ctx.headers().forwarded_host,
        host_rewrite: r.rewrite.as_ref().map(|w| w.authority.clone()).filter(|a| !a.is_empty()),
        mirrors: mirrors(ctx, namespace, r, port),
        hash,
        ..Forward::default()
    })
}

fn weighted(d: &HttpRouteDestination, cluster: String, weight: u32) -> WeightedCluster {
    let (request_headers, response_headers) = header_ops(d.headers.as_ref());
    WeightedCluster {
        cluster,
        weight,
        request_headers: request_headers.into(),
        response_headers: response_headers.into(),
    }
}

fn header_ops(h: Option<&Headers>) -> (HeaderOps, HeaderOps) {
    let one = |o: Option<&HeaderOperations>| {
        o.map_or_else(HeaderOps::default, |o| HeaderOps {
            remove: o.remove.clone(),
            set: o.set.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            add: o.add.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        })
    };
    (one(h.and_then(|h| h.request.as_ref())), one(h.and_then(|h| h.response.as_ref())))
}

// A share between 0 and 1 by the clamp, so at most a million.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn ppm(p: &Percent) -> u32 {
    (p.value.clamp(0.0, 100.0) * f64::from(MILLION) / 100.0).round() as u32
}

fn whole_percent(p: i32) -> u32 {
    u32::try_from(p.clamp(0, 100)).unwrap_or(0) * (MILLION / 100)
}

fn mirrors(ctx: &Ctx<'_>, namespace: &str, r: &HttpRoute, port: u16) -> Vec<Mirror> {
    let mut out = Vec::new();
    if let Some(d) = &r.mirror {
        let fraction = match (&r.mirror_percentage, r.mirror_percent) {
            (Some(p), _) => ppm(p),
            (None, Some(p)) => p.min(100) * (MILLION / 100),
            (None, None) => MILLION,
        };
        out.push(Mirror { cluster: destination(ctx, namespace, d, port).0, fraction });
    }
    for m in &r.mirrors {
        if let Some(d) = &m.destination {
            let fraction = m.percentage.as_ref().map_or(MILLION, ppm);
            out.push(Mirror { cluster: destination(ctx, namespace, d, port).0, fraction });
        }
    }
    out.retain(|m| m.fraction > 0);
    out
}

/// A fault without a percentage happens to nobody.
fn fault(f: &HttpFaultInjection) -> Option<Fault> {
    let delay = f.delay.as_ref().and_then(|d| {
        let share = d.percentage.as_ref().map_or_else(|| whole_percent(d.percent), ppm);
        d.fixed_delay.filter(|_| share > 0).map(|t| (Duration::from(t), share))
    });
    let abort = f.abort.as_ref().and_then(|a| {
        let share = a.percentage.as_ref().map_or_else(|| whole_percent(a.percent), ppm);
        let kind = match (a.http_status, &a.grpc_status) {
            (Some(s), _) => AbortKind::Http(u16::try_from(s).ok()?),
            (None, Some(s)) => AbortKind::Grpc(grpc_status(s)?),
            (None, None) => return None,
        };
        (share > 0).then_some((kind, share))
    });
    (delay.is_some() || abort.is_some()).then_some(Fault { delay, abort })
}

fn grpc_status(s: &str) -> Option<u32> {
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
    let by_name = NAMES.iter().position(|n| n.eq_ignore_ascii_case(s)).and_then(|i| u32::try_from(i).ok());
    by_name.or_else(|| s.parse().ok().filter(|n| *n <= 16))
}

fn cors(c: &CorsPolicy) -> Cors {
    let mut allow_origins: Vec<StringMatch> = c
        .allow_origin
        .iter()
        .map(|o| if o == "*" { StringMatch::regex(".*") } else { StringMatch::exact(o) })
        .collect();
    allow_origins.extend(c.allow_origins.iter().map(|o| match o {
        Authored::Exact(s) if s == "*" => StringMatch::regex(".*"),
        o => string_match(o).unwrap_or_else(|| StringMatch::regex(".*")),
    }));
    Cors {
        allow_origins,
        allow_methods: c.allow_methods.join(","),
        allow_headers: c.allow_headers.join(","),
        expose_headers: c.expose_headers.join(","),
        max_age: c.max_age.map(|d| d.0.as_secs().to_string()).unwrap_or_default(),
        allow_credentials: c.allow_credentials.unwrap_or(false),
        ignore_unmatched: c.unmatched_preflights == UnmatchedPreflights::Ignore,
    }
}

fn redirect(d: &HttpRedirect, listener_port: u16) -> Redirect {
    let some = |s: &String| (!s.is_empty()).then(|| s.clone());
    let port = match (d.port, d.derive_port) {
        (Some(p), _) => u16::try_from(p).ok(),
        (None, Some(RedirectPortSelection::FromRequestPort)) => Some(listener_port),
        (None, Some(RedirectPortSelection::FromProtocolDefault)) => match d.scheme.as_str() {
            "https" => Some(443),
            "http" => Some(80),
            _ => None,
        },
        (None, None) => None,
    };
    Redirect {
        scheme: some(&d.scheme),
        host: some(&d.authority),
        port,
        path: some(&d.uri),
        prefix_rewrite: some(&d.prefix_rewrite),
        status: match u16::try_from(d.redirect_code) {
            Ok(s) if [301, 302, 303, 307, 308].contains(&s) => s,
            _ => 301,
        },
    }
}

/// Inputs of consistent hashing that the destination's rule names.
fn hash_policy(ctx: &Ctx<'_>, entry: &Entry, port: u16, subset: &str) -> Vec<HashPolicy> {
    let Some(rule) = ctx.world.destination_rule(ctx.proxy, entry) else { return vec![] };
    let subset = rule.subsets.iter().find(|s| s.name == subset);
    let policy = effective_policy(Some(&rule), subset, port);
    let Some(h) = policy.load_balancer.and_then(|l| l.consistent_hash) else { return vec![] };
    let mut out = Vec::new();
    if let Some(n) = h.http_header_name {
        out.push(HashPolicy::Header(n));
    }
    if let Some(c) = h.http_cookie {
        let attributes = c.attributes.into_iter().map(|a| (a.name, a.value)).collect();
        let ttl = c.ttl.map(Duration::from);
        out.push(HashPolicy::Cookie { name: c.name, path: c.path, ttl, attributes });
    }
    if h.use_source_ip == Some(true) {
        out.push(HashPolicy::SourceIp);
    }
    if let Some(q) = h.http_query_parameter_name {
        out.push(HashPolicy::Query(q));
    }
    out
}
