//! Rules of HTTPRoutes and GRPCRoutes.

use std::collections::BTreeMap;

use mesh_model::authored::{
    self, Authorizer, HttpDirectResponse, HttpMatchRequest, StringMatch,
    gateway_api::{
        BackendRef, GrpcMatch, GrpcRule, HttpMatch, HttpRule, NamedMatch, PathMatchType, RouteFilter,
        SessionPersistence, ValueMatchType,
    },
};

use super::{
    attach::Route,
    authorizers::{self, AUTHORIZER},
    backends::{Referrer, split},
    known::Known,
    listeners::{Serves, Speaks},
    order::{self, Candidate, Order},
    rule, session,
};

/// Where rules apply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Port and scheme that clients used, where it is a listener.
    pub(super) listener: Option<(u32, &'static str)>,
    /// Port of the service, where it is the mesh; 0 is every.
    pub(super) port: u32,
}

impl Place {
    pub(super) fn listener(l: &Serves<'_>) -> Self {
        let scheme = if l.speaks == Some(Speaks::Https) { "https" } else { "http" };
        Self { listener: Some((l.listener.port, scheme)), port: 0 }
    }

    pub(super) fn mesh(port: u32) -> Self {
        Self { listener: None, port }
    }
}

/// A path as a condition, and how specific it is.
struct Path {
    uri: Option<StringMatch>,
    rank: (u8, usize),
    /// Without a slash at the end; empty for every path.
    prefix: Option<String>,
}

impl Path {
    fn new(kind: PathMatchType, value: &str) -> Self {
        let rank = order::path(kind, value);
        match kind {
            PathMatchType::Exact => {
                Self { uri: Some(StringMatch::Exact(value.to_owned())), rank, prefix: None }
            }
            PathMatchType::RegularExpression => {
                Self { uri: Some(StringMatch::Regex(value.to_owned())), rank, prefix: None }
            }
            PathMatchType::PathPrefix => {
                let prefix = value.trim_end_matches('/').to_owned();
                let uri = (!prefix.is_empty()).then(|| StringMatch::Prefix(prefix.clone()));
                Self { uri, rank, prefix: Some(prefix) }
            }
        }
    }

    fn grpc(m: &GrpcMatch) -> Self {
        let Some(method) = &m.method else { return Self::new(PathMatchType::PathPrefix, "/") };
        let exact = method.match_type != Some(ValueMatchType::RegularExpression);
        let service = method.service.as_deref().unwrap_or_default();
        let name = method.method.as_deref().unwrap_or_default();
        let any = |s: &str| if s.is_empty() { "[^/]+".to_owned() } else { s.to_owned() };
        let uri = match (exact, service, name) {
            (_, "", "") => None,
            (true, s, "") => Some(StringMatch::Prefix(format!("/{s}/"))),
            (true, s, m) if !s.is_empty() => Some(StringMatch::Exact(format!("/{s}/{m}"))),
            (_, s, m) => Some(StringMatch::Regex(format!("/{}/{}", any(s), any(m)))),
        };
        Self { uri, rank: order::grpc(exact, service, name), prefix: None }
    }
}

/// Every rule of a route with each of its matches; nothing for routes of connections.
pub(super) fn candidates(known: &Known<'_>, r: &Route<'_>, place: &Place) -> Vec<Candidate> {
    let mut out = Vec::new();
    match r {
        Route::Http(d) => {
            let everything = [HttpRule::default()];
            let rules = if d.spec.rules.is_empty() { everything.as_slice() } else { d.spec.rules.as_slice() };
            for (i, x) in rules.iter().enumerate() {
                let mut made = Rule::new(known, r, i, &Written::http(x), place);
                rule::timing(&mut made.route, x.timeouts.as_ref(), x.retry.as_ref());
                let any = [HttpMatch::default()];
                let matches = if x.matches.is_empty() { any.as_slice() } else { x.matches.as_slice() };
                for (j, m) in matches.iter().enumerate() {
                    let path = m.path.as_ref();
                    let kind = path.and_then(|p| p.match_type).unwrap_or(PathMatchType::PathPrefix);
                    let value = path.and_then(|p| p.value.as_deref()).unwrap_or("/");
                    let conditions = HttpMatchRequest {
                        method: m.method.clone().map(StringMatch::Exact),
                        headers: values(&m.headers, true),
                        query_params: values(&m.query_params, false),
                        ..HttpMatchRequest::default()
                    };
                    made.push(r, Path::new(kind, value), conditions, (i, j), place, &mut out);
                }
            }
        }
        Route::Grpc(d) => {
            for (i, x) in d.spec.rules.iter().enumerate() {
                let made = Rule::new(known, r, i, &Written::grpc(x), place);
                let any = [GrpcMatch::default()];
                let matches = if x.matches.is_empty() { any.as_slice() } else { x.matches.as_slice() };
                for (j, m) in matches.iter().enumerate() {
                    let headers = values(&m.headers, true);
                    let conditions = HttpMatchRequest { headers, ..HttpMatchRequest::default() };
                    made.push(r, Path::grpc(m), conditions, (i, j), place, &mut out);
                }
            }
        }
        Route::Tls(_) | Route::Tcp(_) => {}
    }
    out
}

/// Of conditions on one name the first counts; names of headers have no case.
fn values(list: &[NamedMatch], header: bool) -> BTreeMap<String, StringMatch> {
    let mut out = BTreeMap::new();
    for m in list {
        let name = if header { m.name.to_ascii_lowercase() } else { m.name.clone() };
        out.entry(name).or_insert_with(|| match m.match_type {
            Some(ValueMatchType::RegularExpression) => StringMatch::Regex(m.value.clone()),
            _ => StringMatch::Exact(m.value.clone()),
        });
    }
    out
}

/// The answer where no rule is.
pub(super) fn not_found() -> authored::HttpRoute {
    answer("no-route", 404)
}

fn answer(name: &str, status: u32) -> authored::HttpRoute {
    let direct_response = Some(HttpDirectResponse { status, body: None });
    authored::HttpRoute { name: name.to_owned(), direct_response, ..authored::HttpRoute::default() }
}

/// What rules of both kinds of routes have.
pub(super) struct Written<'a> {
    name: Option<&'a str>,
    pub(super) filters: &'a [RouteFilter],
    pub(super) backends: &'a [BackendRef],
    session: Option<&'a SessionPersistence>,
}

impl<'a> Written<'a> {
    pub(super) fn http(x: &'a HttpRule) -> Self {
        Self {
            name: x.name.as_deref(),
            filters: &x.filters,
            backends: &x.backend_refs,
            session: x.session_persistence.as_ref(),
        }
    }

    pub(super) fn grpc(x: &'a GrpcRule) -> Self {
        Self {
            name: x.name.as_deref(),
            filters: &x.filters,
            backends: &x.backend_refs,
            session: x.session_persistence.as_ref(),
        }
    }

    /// What of it cannot be done, for which requests are answered with 500.
    pub(super) fn unsupported(&self) -> Option<String> {
        let filter = self.filters.iter().find(|f| rule::is_unsupported(f)).and_then(|f| f.filter_type);
        let filter = filter.map(|t| format!("a filter of type {t:?}"));
        filter.or_else(|| self.session.and_then(session::unsupported).map(str::to_owned))
    }
}

/// A rule without its conditions.
struct Rule {
    route: authored::HttpRoute,
    change: rule::PathChange,
}

impl Rule {
    fn new(known: &Known<'_>, r: &Route<'_>, position: usize, written: &Written<'_>, place: &Place) -> Self {
        let last = written.name.map_or_else(|| position.to_string(), str::to_owned);
        let name = format!("{}/{}/{last}", r.namespace(), r.name());
        let grants = place.listener.is_some();
        let from = Referrer { kind: r.kind(), namespace: r.namespace(), grants };
        let mut out = authored::HttpRoute { name, ..authored::HttpRoute::default() };
        let failed = |name: &str| Self { route: answer(name, 500), change: rule::PathChange::None };
        // What such a filter would have done is not known, and it may have been to refuse.
        if written.unsupported().is_some() {
            return failed(&out.name);
        }
        let change = rule::filters(known, from, written.filters, place, &mut out);
        for (j, f) in written.filters.iter().enumerate() {
            let Some(asks) = &f.external_auth else { continue };
            // By number: a rule's name may be another one's number.
            let name = format!("{AUTHORIZER}/{}/{}/{position}/{j}", r.namespace(), r.name());
            let found = asks.backend_ref.as_ref().map(|b| authorizers::destination(known, from, asks, b));
            let Some(Ok(destination)) = found else { return failed(&out.name) };
            let asked = Authorizer { name, destination, asks: asks.clone() };
            out.extras.get_or_insert_default().authorizers.push(asked);
        }
        if let Some(Ok(s)) = written.session.map(|s| session::kept(r, &last, s)) {
            out.extras.get_or_insert_default().session = Some(s);
        }
        if out.redirect.is_none() {
            let stays = written.session.is_some();
            let shares = split(known, from, written.backends, stays);
            if shares.valid.iter().all(|(_, weight, _)| *weight <= 0) {
                return failed(&out.name);
            }
            rule::destinations(&shares, &mut out);
        }
        Self { route: out, change }
    }

    /// Adds the rule with one of its matches.
    fn push(
        &self,
        r: &Route<'_>,
        path: Path,
        mut conditions: HttpMatchRequest,
        (i, j): (usize, usize),
        place: &Place,
        out: &mut Vec<Candidate>,
    ) {
        conditions.port = place.port;
        let parts = self.change.parts(path.prefix.as_deref(), path.uri.as_ref());
        for (k, (uri, with)) in parts.into_iter().enumerate() {
            let mut route = self.route.clone();
            self.change.set(&mut route, path.prefix.is_some(), with);
            conditions.uri = uri;
            let order = Order::new(r, path.rank, &conditions, (i, j, k));
            let any = HttpMatchRequest::default();
            route.matches = if conditions == any { vec![] } else { vec![conditions.clone()] };
            out.push(Candidate { order, route });
        }
    }
}
