//! Route tables: which virtual host and route take a request.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, OnceLock, atomic::AtomicBool},
    time::Duration,
};

use http::Method;
use mesh_model::{Nothing, Rare, proxy as model};
use mesh_telemetry::metrics::{MeshMetrics, RouteSeries};
use regex::bytes::Regex;

use self::index::{DomainIndex, Key, PathIndex};
use super::CompileError;
use crate::{
    http::metadata::{Metadata, MetadataMatcher},
    http::{
        filters::{
            ext_proc::ProcOverride,
            rate_limit::{Rules, local::LocalRateLimit},
        },
        headers::{HeaderId, Headers},
        message::RequestHead,
    },
    matcher::{HeaderMatcher, QueryMatcher, StringMatcher, header_value, partial_regex, whole_regex},
    upstream::cluster::{ClusterSlot, touch},
};

mod index;

/// Finds or makes the slot of a cluster by name.
pub(crate) type SlotOf<'a> = &'a mut dyn FnMut(&str) -> Arc<ClusterSlot>;

/// A compiled [`model::RouteConfiguration`].
#[derive(Debug)]
pub(crate) struct RouteTable {
    domains: DomainIndex,
    hosts: Vec<Arc<VirtualHost>>,
    /// Its name, if further hosts come on demand.
    pub(crate) on_demand: Option<Box<str>>,
}

#[derive(Debug)]
pub(crate) struct VirtualHost {
    /// For statistics and debugging output.
    pub(crate) name: Arc<str>,
    /// First domain without wildcard or port: the service, for metrics and policies. Where every host is
    /// taken, as inbound, what the control plane calls the operation (`host:port/*`) names it: what the
    /// client wrote must not decide which rules apply.
    pub(crate) service: Option<Arc<str>>,
    require_tls: bool,
    /// Requests say which try they are.
    pub(crate) attempt_count: bool,
    routes: Vec<Arc<Route>>,
    index: PathIndex,
    /// What it was made of, if it came on demand.
    source: Option<Arc<model::VirtualHost>>,
    /// Traffic has used it; of no interest if it did not come on demand.
    pub(crate) used: AtomicBool,
    pub(crate) request_headers: HeaderEdits,
    pub(crate) response_headers: HeaderEdits,
}

#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) name: Arc<str>,
    path: PathMatcher,
    case_sensitive: bool,
    headers: Vec<HeaderMatcher>,
    query: Vec<QueryMatcher>,
    metadata: Vec<MetadataMatcher>,
    pub(crate) action: Action,
    pub(crate) request_headers: HeaderEdits,
    pub(crate) response_headers: HeaderEdits,
    pub(crate) fault: Option<Box<model::Fault>>,
    pub(crate) cors: Option<Box<Cors>>,
    pub(crate) operation: Arc<str>,
    /// Of the route, else of its virtual host.
    pub(crate) filters: Rare<RouteFilters>,
}

/// Compiled [`model::RouteFilters`].
#[derive(Debug, Default)]
pub(crate) struct RouteFilters {
    pub(crate) jwt: Option<model::JwtOverride>,
    pub(crate) ext_authz: Option<model::AuthzOverride>,
    pub(crate) authorizers: Vec<String>,
    pub(crate) ext_proc: Option<ProcOverride>,
    pub(crate) local_rate_limit: Option<Box<LocalRateLimit>>,
    pub(crate) rate_limits: Rules,
    pub(crate) rate_limit: model::HostRateLimits,
    pub(crate) buffer_limit: Option<usize>,
    pub(crate) buffer: Option<model::BufferOverride>,
    pub(crate) no_compression: bool,
    pub(crate) session: Option<model::SessionOverride>,
    pub(crate) stats: Option<RouteStats>,
    pub(crate) on_demand: Option<Option<model::OnDemandCluster>>,
}

/// Statistics of a route's own.
#[derive(Debug)]
pub(crate) struct RouteStats {
    prefix: String,
    series: OnceLock<Arc<RouteSeries>>,
}

impl RouteStats {
    fn new(prefix: &str) -> Option<Self> {
        (!prefix.is_empty()).then(|| Self { prefix: prefix.to_owned(), series: OnceLock::new() })
    }

    /// Its counters.
    pub(crate) fn series(&self, metrics: &MeshMetrics, virtual_host: &str) -> Arc<RouteSeries> {
        let made = || Arc::new(metrics.route_series(virtual_host, &self.prefix));
        Arc::clone(self.series.get_or_init(made))
    }
}

impl Nothing for RouteFilters {
    fn nothing() -> &'static Self {
        static NOTHING: LazyLock<RouteFilters> = LazyLock::new(RouteFilters::default);
        &NOTHING
    }
}

impl RouteFilters {
    fn new(
        route: &model::RouteFilters,
        host: &model::RouteFilters,
        slot: SlotOf<'_>,
    ) -> Result<Rare<Self>, CompileError> {
        if [route, host].into_iter().all(|f| f == model::RouteFilters::nothing()) {
            return Ok(Rare::default());
        }
        let local = route.local_rate_limit.as_ref().or(host.local_rate_limit.as_ref());
        let local = local.map(|l| LocalRateLimit::new(l, true).map(Box::new)).transpose()?;
        Ok(Rare::some(Self {
            jwt: route.jwt.as_ref().or(host.jwt.as_ref()).cloned(),
            ext_authz: route.ext_authz.as_ref().or(host.ext_authz.as_ref()).cloned(),
            authorizers: route.authorizers.iter().chain(&host.authorizers).cloned().collect(),
            ext_proc: route.ext_proc.as_ref().or(host.ext_proc.as_ref()).map(|o| ProcOverride::new(o, slot)),
            local_rate_limit: local,
            rate_limits: Rules::new(route, host)?,
            rate_limit: route.rate_limit,
            buffer: route.buffer.or(host.buffer),
            no_compression: route.no_compression || host.no_compression,
            stats: RouteStats::new(&route.stat_prefix),
            session: route.session.as_ref().or(host.session.as_ref()).cloned(),
            on_demand: route.on_demand.or(host.on_demand),
            buffer_limit: route
                .buffer_limit
                .or(host.buffer_limit)
                .map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
        }))
    }
}

#[derive(Debug)]
enum PathMatcher {
    Prefix(String),
    Segments(String),
    Exact(String),
    Regex(Regex),
    Connect,
}

#[derive(Debug)]
pub(crate) enum Action {
    Forward(Box<Forward>),
    Redirect(model::Redirect),
    Direct(model::DirectResponse),
}

#[derive(Debug)]
pub(crate) struct Forward {
    clusters: Vec<Destination>,
    total_weight: u64,
    /// Header that names the cluster; the one destination is then nowhere.
    cluster_header: Option<Box<[u8]>>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) retry: Option<Box<Retry>>,
    pub(crate) hedge: bool,
    pub(crate) max_stream: Option<model::StreamLimit>,
    prefix_rewrite: Option<String>,
    regex_rewrite: Option<Box<(Regex, Vec<u8>)>>,
    pub(crate) host_rewrite: Option<String>,
    /// What was rewritten is appended to `x-forwarded-host`.
    pub(crate) forwarded_host: bool,
    pub(crate) mirrors: Vec<(Arc<ClusterSlot>, u32)>,
    pub(crate) hash: Vec<model::HashPolicy>,
    pub(crate) connect: bool,
}

/// A compiled [`model::RetryPolicy`].
#[derive(Debug)]
pub(crate) struct Retry {
    pub(crate) config: model::RetryPolicy,
    pub(crate) response_headers: Vec<HeaderMatcher>,
    pub(crate) request_headers: Vec<HeaderMatcher>,
}

impl Retry {
    fn new(r: &model::RetryPolicy) -> Result<Self, CompileError> {
        let all = |l: &[model::HeaderMatch]| l.iter().map(HeaderMatcher::new).collect::<Result<_, _>>();
        Ok(Self {
            config: r.clone(),
            response_headers: all(&r.retriable_headers)?,
            request_headers: all(&r.retriable_request_headers)?,
        })
    }
}

#[derive(Debug)]
pub(crate) struct Destination {
    pub(crate) cluster: Arc<ClusterSlot>,
    weight: u64,
    pub(crate) request_headers: HeaderEdits,
    pub(crate) response_headers: HeaderEdits,
}

#[derive(Debug)]
pub(crate) struct Cors {
    pub(crate) origins: Vec<StringMatcher>,
    pub(crate) config: model::Cors,
}

/// Compiled [`model::HeaderOps`].
#[derive(Debug, Default)]
pub(crate) struct HeaderEdits(Rare<model::HeaderOps>);

impl HeaderEdits {
    pub(crate) fn new(ops: &model::HeaderOps) -> Result<Self, CompileError> {
        let valid = |n: &str, v: &str| {
            (n.eq_ignore_ascii_case(":authority") || http::HeaderName::from_bytes(n.as_bytes()).is_ok())
                && http::HeaderValue::from_str(v).is_ok()
                && !matches!(
                    HeaderId::of(n.as_bytes()),
                    HeaderId::ContentLength | HeaderId::TransferEncoding | HeaderId::Connection
                )
        };
        for (n, v) in ops.set.iter().chain(&ops.add) {
            if !valid(n, v) {
                return Err(CompileError::Header(n.clone()));
            }
        }
        if let Some(n) = ops.remove.iter().find(|n| !valid(n, "")) {
            return Err(CompileError::Header(n.clone()));
        }
        Ok(Self(ops.clone().into()))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Applies to a request; `host` and `:authority` change the authority.
    pub(crate) fn request(&self, req: &mut RequestHead, expand: &dyn Fn(&str) -> String) {
        for n in &self.0.remove {
            req.headers.remove(n.as_bytes());
        }
        for (n, v) in &self.0.set {
            if is_authority(n) {
                req.authority = expand(v);
            } else {
                req.headers.set(n.as_bytes(), expand(v).as_bytes());
            }
        }
        for (n, v) in &self.0.add {
            if !is_authority(n) {
                req.headers.push(n.as_bytes(), expand(v).as_bytes());
            }
        }
    }

    /// Applies to a response.
    pub(crate) fn response(&self, headers: &mut Headers, expand: &dyn Fn(&str) -> String) {
        for n in &self.0.remove {
            headers.remove(n.as_bytes());
        }
        for (n, v) in &self.0.set {
            headers.set(n.as_bytes(), expand(v).as_bytes());
        }
        for (n, v) in &self.0.add {
            headers.push(n.as_bytes(), expand(v).as_bytes());
        }
    }
}

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority")
}

/// Result of [`RouteTable::find`].
pub(crate) enum Found<'a> {
    Route(&'a Arc<VirtualHost>, &'a Arc<Route>),
    NeedsTls(&'a Arc<VirtualHost>),
    NoRoute(&'a Arc<VirtualHost>),
    NoHost,
}

impl RouteTable {
    /// Compiles; hosts that came on demand and are the same as in `before` stay.
    pub(crate) fn new(
        c: &model::RouteConfiguration,
        before: Option<&Self>,
        slot: SlotOf<'_>,
    ) -> Result<Self, CompileError> {
        let mut t = Self {
            domains: DomainIndex::default(),
            hosts: Vec::with_capacity(c.virtual_hosts.len()),
            on_demand: c.on_demand.as_ref().map(|_| Box::from(c.name.as_str())),
        };
        for vh in &c.virtual_hosts {
            t.add(&vh.domains, Arc::new(VirtualHost::new(vh, slot)?))?;
        }
        let Some(on_demand) = &c.on_demand else { return Ok(t) };
        let before: HashMap<_, _> = before
            .iter()
            .flat_map(|t| &t.hosts)
            .filter_map(|h| h.source.as_ref().map(|s| (Arc::as_ptr(s), h)))
            .collect();
        for vh in on_demand.hosts.values() {
            let host = match before.get(&Arc::as_ptr(vh)) {
                Some(same) => Arc::clone(same),
                None => {
                    let new = VirtualHost::new(vh, slot)?;
                    Arc::new(VirtualHost { source: Some(Arc::clone(vh)), ..new })
                }
            };
            t.add(&vh.domains, host)?;
        }
        Ok(t)
    }

    fn add(&mut self, domains: &[String], host: Arc<VirtualHost>) -> Result<(), CompileError> {
        for d in domains {
            let d = d.to_ascii_lowercase();
            if !self.domains.insert(&d, self.hosts.len()) {
                return Err(CompileError::DuplicateDomain(d));
            }
        }
        self.hosts.push(host);
        Ok(())
    }

    /// The virtual host of an authority.
    pub(crate) fn host(&self, authority: &str) -> Option<&Arc<VirtualHost>> {
        let lower;
        let a = if authority.bytes().any(|b| b.is_ascii_uppercase()) {
            lower = authority.to_ascii_lowercase();
            lower.as_str()
        } else {
            authority
        };
        let at = self.domains.find(a)?;
        self.hosts.get(at)
    }

    /// Which of the configuration's virtual hosts that is, where none came on demand.
    pub(crate) fn position(&self, authority: &str) -> Option<usize> {
        let host = self.host(authority)?;
        self.hosts.iter().position(|h| Arc::ptr_eq(h, host))
    }

    /// The virtual host and route of a request.
    pub(crate) fn find(&self, req: &RequestHead, metadata: Option<&Metadata>) -> Found<'_> {
        let Some(host) = self.host(&req.authority) else { return Found::NoHost };
        if host.require_tls && !req.https {
            return Found::NeedsTls(host);
        }
        match host.route(req, metadata) {
            Some(r) => Found::Route(host, r),
            None => Found::NoRoute(host),
        }
    }
}

impl VirtualHost {
    fn new(vh: &model::VirtualHost, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        let routes: Vec<Arc<Route>> = vh
            .routes
            .iter()
            .map(|r| Route::new(r, &vh.filters, slot).map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            name: Arc::from(vh.name.as_str()),
            index: PathIndex::new(routes.iter().map(|r| r.key())),
            service: vh
                .domains
                .iter()
                .map(|d| d.rsplit_once(':').map_or(d.as_str(), |(h, _)| h))
                .find(|d| !d.contains('*') && d.parse::<std::net::IpAddr>().is_err())
                .or_else(|| {
                    let mut hosts =
                        vh.routes.iter().filter_map(|r| r.operation.split_once(':').map(|(h, _)| h));
                    hosts.find(|h| !h.is_empty() && !h.contains('*'))
                })
                .map(Arc::from),
            require_tls: vh.require_tls,
            attempt_count: vh.attempt_count,
            routes,
            source: None,
            used: AtomicBool::new(false),
            request_headers: HeaderEdits::new(&vh.request_headers)?,
            response_headers: HeaderEdits::new(&vh.response_headers)?,
        })
    }

    /// Takes note of its use, if it came on demand.
    pub(crate) fn touch(&self) {
        if self.source.is_some() {
            touch(&self.used);
        }
    }

    /// The first route that takes a request.
    fn route(&self, req: &RequestHead, metadata: Option<&Metadata>) -> Option<&Arc<Route>> {
        let takes = |at| self.routes.get(at).is_some_and(|r: &Arc<Route>| r.matches(req, metadata));
        let at = self.index.find(path_of(req), takes)?;
        self.routes.get(at)
    }
}

/// The path that routes match. CONNECT has none; only a route for every path takes it.
fn path_of(req: &RequestHead) -> &str {
    if req.method == Method::CONNECT && req.path.is_empty() { "/" } else { req.path_only() }
}

impl Route {
    /// What the index may rely on.
    fn key(&self) -> Key<'_> {
        match &self.path {
            // Folded paths are compared in another form than the index has.
            _ if !self.case_sensitive => Key::Any,
            PathMatcher::Exact(p) => Key::Exact(p),
            PathMatcher::Prefix(p) | PathMatcher::Segments(p) => Key::Prefix(p),
            PathMatcher::Regex(_) | PathMatcher::Connect => Key::Any,
        }
    }

    /// A route that is nothing but its condition.
    pub(crate) fn condition(m: &model::RouteMatch) -> Result<Self, CompileError> {
        let route = model::Route {
            name: String::new(),
            matches: m.clone(),
            action: model::RouteAction::Direct(model::DirectResponse { status: 200, body: vec![] }),
            request_headers: Rare::default(),
            response_headers: Rare::default(),
            fault: None,
            cors: None,
            operation: String::new(),
            filters: Rare::default(),
        };
        Self::new(&route, &route.filters, &mut ClusterSlot::new)
    }

    fn new(r: &model::Route, host: &model::RouteFilters, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        let m = &r.matches;
        let fold = |s: &str| if m.case_sensitive { s.to_owned() } else { s.to_ascii_lowercase() };
        let path = match &m.path {
            model::PathMatch::Prefix(s) => PathMatcher::Prefix(fold(s)),
            model::PathMatch::SegmentPrefix(s) => PathMatcher::Segments(fold(s.trim_end_matches('/'))),
            model::PathMatch::Exact(s) => PathMatcher::Exact(fold(s)),
            model::PathMatch::Regex(s) => PathMatcher::Regex(whole_regex(s)?),
            model::PathMatch::Connect => PathMatcher::Connect,
        };
        let action = match &r.action {
            model::RouteAction::Forward(f) => Action::Forward(Box::new(Forward::new(f, slot)?)),
            model::RouteAction::Redirect(d) => {
                if !matches!(d.status, 301 | 302 | 303 | 307 | 308) {
                    return Err(CompileError::Status(d.status));
                }
                Action::Redirect(d.clone())
            }
            model::RouteAction::Direct(d) => {
                if !(200..=599).contains(&d.status) {
                    return Err(CompileError::Status(d.status));
                }
                Action::Direct(d.clone())
            }
        };
        let cors = match &r.cors {
            Some(c) => {
                Some(Box::new(Cors { origins: StringMatcher::all(&c.allow_origins)?, config: (**c).clone() }))
            }
            None => None,
        };
        Ok(Self {
            name: Arc::from(r.name.as_str()),
            path,
            case_sensitive: m.case_sensitive,
            headers: m.headers.iter().map(HeaderMatcher::new).collect::<Result<_, _>>()?,
            query: m.query.iter().map(QueryMatcher::new).collect::<Result<_, _>>()?,
            metadata: m.metadata.iter().map(MetadataMatcher::new).collect::<Result<_, _>>()?,
            action,
            request_headers: HeaderEdits::new(&r.request_headers)?,
            response_headers: HeaderEdits::new(&r.response_headers)?,
            fault: r.fault.clone(),
            cors,
            operation: Arc::from(r.operation.as_str()),
            filters: RouteFilters::new(&r.filters, host, slot)?,
        })
    }

    /// Whether a request is one of this route's.
    pub(crate) fn matches(&self, req: &RequestHead, metadata: Option<&Metadata>) -> bool {
        let raw = path_of(req);
        let lower;
        let path = if self.case_sensitive {
            raw
        } else {
            lower = raw.to_ascii_lowercase();
            lower.as_str()
        };
        let path_ok = match &self.path {
            PathMatcher::Prefix(p) => path.starts_with(p.as_str()),
            PathMatcher::Segments(p) => {
                path.strip_prefix(p.as_str()).is_some_and(|r| r.is_empty() || r.starts_with('/'))
            }
            PathMatcher::Exact(p) => path == p,
            PathMatcher::Regex(r) => r.is_match(raw.as_bytes()),
            PathMatcher::Connect => req.method == Method::CONNECT && req.path.is_empty(),
        };
        path_ok
            && self.headers.iter().all(|h| h.matches(req))
            && self.query.iter().all(|q| q.matches(req))
            && self.metadata.iter().all(|m| m.matches(metadata))
    }

    /// The path with the matched part replaced.
    pub(crate) fn replace_matched(&self, path: &str, with: &str) -> String {
        let (p, query) = match path.split_once('?') {
            Some((p, q)) => (p, Some(q)),
            None => (path, None),
        };
        let mut out = match &self.path {
            PathMatcher::Prefix(m) | PathMatcher::Segments(m) => {
                format!("{with}{}", p.get(m.len()..).unwrap_or_default())
            }
            PathMatcher::Exact(_) | PathMatcher::Regex(_) | PathMatcher::Connect => with.to_owned(),
        };
        if let Some(q) = query {
            out.push('?');
            out.push_str(q);
        }
        if !out.starts_with('/') {
            out.insert(0, '/');
        }
        out
    }
}

impl Forward {
    fn new(f: &model::Forward, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        if f.clusters.is_empty() != f.cluster_header.is_some() {
            return Err(CompileError::NoCluster);
        }
        // No cluster has this name: where a request's header names none, it goes nowhere.
        let nowhere = [model::WeightedCluster::only("")];
        let to = if f.clusters.is_empty() { &nowhere[..] } else { &f.clusters };
        let only = to.len() == 1;
        let mut clusters = Vec::with_capacity(to.len());
        for c in to {
            clusters.push(Destination {
                cluster: slot(&c.cluster),
                weight: if only { 1 } else { u64::from(c.weight) },
                request_headers: HeaderEdits::new(&c.request_headers)?,
                response_headers: HeaderEdits::new(&c.response_headers)?,
            });
        }
        let total_weight = clusters.iter().map(|c| c.weight).sum();
        if total_weight == 0 {
            return Err(CompileError::NoWeight);
        }
        let regex_rewrite = match &f.regex_rewrite {
            Some((pattern, with)) => Some(Box::new((partial_regex(pattern)?, substitution(with)))),
            None => None,
        };
        Ok(Self {
            clusters,
            total_weight,
            cluster_header: f.cluster_header.as_ref().map(|h| h.to_ascii_lowercase().into_bytes().into()),
            timeout: f.timeout.filter(|t| !t.is_zero()),
            idle_timeout: f.idle_timeout,
            retry: f
                .retry
                .as_ref()
                .filter(|r| r.attempts > 0)
                .map(|r| Retry::new(r).map(Box::new))
                .transpose()?,
            hedge: f.hedge,
            max_stream: f.max_stream,
            prefix_rewrite: f.prefix_rewrite.clone(),
            regex_rewrite,
            host_rewrite: f.host_rewrite.clone(),
            forwarded_host: f.forwarded_host,
            mirrors: f.mirrors.iter().map(|m| (slot(&m.cluster), m.fraction)).collect(),
            hash: f.hash.clone(),
            connect: f.connect,
        })
    }

    /// Picks a destination by weight; `random` is uniform.
    pub(crate) fn destination(&self, random: u64) -> &Destination {
        if self.clusters.len() > 1 {
            let mut at = random % self.total_weight;
            for c in &self.clusters {
                if at < c.weight {
                    return c;
                }
                at -= c.weight;
            }
        }
        // A route without destinations is refused when it is compiled.
        &self.clusters[0]
    }

    /// Destinations, those without weight among them.
    pub(crate) fn destinations(&self) -> &[Destination] {
        &self.clusters
    }

    /// The cluster that a request names, if that is how this route finds one.
    pub(crate) fn named_cluster(&self, req: &RequestHead) -> Option<String> {
        let header = self.cluster_header.as_ref()?;
        let value = header_value(req, header).and_then(|v| String::from_utf8(v.into_owned()).ok());
        Some(value.unwrap_or_default())
    }

    /// The path that goes upstream, if it is another one.
    pub(crate) fn rewritten_path(&self, route: &Route, path: &str) -> Option<String> {
        if let Some(with) = &self.prefix_rewrite {
            return Some(route.replace_matched(path, with));
        }
        let (regex, with) = self.regex_rewrite.as_deref()?;
        let (p, q) = match path.split_once('?') {
            Some((p, q)) => (p, Some(q)),
            None => (path, None),
        };
        let new = regex.replace_all(p.as_bytes(), with.as_slice()).into_owned();
        // Substitution over ASCII yields ASCII unless the pattern splits a character; then keep the path.
        let mut new = String::from_utf8(new).ok()?;
        if !new.starts_with('/') {
            new.insert(0, '/');
        }
        if let Some(q) = q {
            new.push('?');
            new.push_str(q);
        }
        Some(new)
    }
}

/// RE2's `\1` as the `regex` crate's `${1}`.
fn substitution(s: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(s.len());
    let mut it = s.bytes();
    while let Some(b) = it.next() {
        match b {
            b'$' => out.extend_from_slice(b"$$"),
            b'\\' => match it.next() {
                Some(d) if d.is_ascii_digit() => out.extend_from_slice(&[b'$', b'{', d, b'}']),
                Some(other) => out.push(other),
                None => out.push(b'\\'),
            },
            _ => out.push(b),
        }
    }
    out
}

#[cfg(test)]
mod tests;
