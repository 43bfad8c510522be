//! Routes: which request goes where, and what is done to it on the way.

use std::{sync::LazyLock, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    AuthzOverride, BufferOverride, HostRateLimits, JwtOverride, LocalRateLimit, MetadataMatch,
    OnDemandCluster, OnDemandHosts, ProcOverride, RateLimit, SessionOverride,
};
use crate::rare::{Nothing, Rare};

/// `envoy.config.route.v3.RouteConfiguration`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteConfiguration {
    /// Name that RDS subscribes to.
    pub name: String,
    /// Hosts.
    pub virtual_hosts: Vec<VirtualHost>,
    /// Further hosts come on demand (`vhds`); `None` are all there are.
    pub on_demand: Option<OnDemandHosts>,
}

/// `envoy.config.route.v3.VirtualHost`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualHost {
    /// Unique in the configuration.
    pub name: String,
    /// `host`, `host:port`, `*.suffix`, `prefix.*` or `*`; exact before longest suffix before
    /// longest prefix before `*`. Case-insensitive.
    pub domains: Vec<String>,
    /// Redirect plain HTTP to HTTPS with 301.
    pub require_tls: bool,
    /// Requests say in `x-envoy-attempt-count` which try they are.
    pub attempt_count: bool,
    /// First match wins.
    pub routes: Vec<Route>,
    /// Applied after the route's.
    pub request_headers: Rare<HeaderOps>,
    /// Applied after the route's.
    pub response_headers: Rare<HeaderOps>,
    /// Settings of HTTP filters for its routes.
    pub filters: Rare<RouteFilters>,
}

/// `envoy.config.route.v3.Route`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Logged as the route's name.
    pub name: String,
    /// When it applies.
    pub matches: RouteMatch,
    /// What it does.
    pub action: RouteAction,
    /// Request header changes.
    pub request_headers: Rare<HeaderOps>,
    /// Response header changes.
    pub response_headers: Rare<HeaderOps>,
    /// Injected faults.
    pub fault: Option<Box<Fault>>,
    /// Cross-origin policy.
    pub cors: Option<Box<Cors>>,
    /// Trace operation.
    pub operation: String,
    /// Settings of HTTP filters for this route (`typed_per_filter_config`).
    pub filters: Rare<RouteFilters>,
}

/// Settings of HTTP filters for a virtual host or route; those of a route replace those of its host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RouteFilters {
    /// Token authentication.
    pub jwt: Option<JwtOverride>,
    /// External authorization.
    pub ext_authz: Option<AuthzOverride>,
    /// Names of authorisers that this asks and others do not ([`ExtAuthz::on_routes`](super::ExtAuthz::on_routes)).
    pub authorizers: Vec<String>,
    /// External processing.
    pub ext_proc: Option<ProcOverride>,
    /// A local rate limit instead of the filter's.
    pub local_rate_limit: Option<Box<LocalRateLimit>>,
    /// Rules by which rate limits count (`rate_limits`).
    pub rate_limits: Vec<RateLimit>,
    /// For routes: they have statistics of their own, under this name.
    pub stat_prefix: String,
    /// For routes: which rules of the virtual host count as well (`include_vh_rate_limits`).
    pub host_rate_limits: HostRateLimits,
    /// The same for the global rate limit alone.
    pub rate_limit: HostRateLimits,
    /// Bytes of a request that are kept for another try (`request_body_buffer_limit`).
    pub buffer_limit: Option<u64>,
    /// The buffer filter.
    pub buffer: Option<BufferOverride>,
    /// Answers are not compressed.
    pub no_compression: bool,
    /// Sessions that stay on a host.
    pub session: Option<SessionOverride>,
    /// Clusters on demand, instead of what the filter says; `Some(None)` is none (`on_demand.v3.PerRouteConfig`).
    pub on_demand: Option<Option<OnDemandCluster>>,
}

impl Nothing for RouteFilters {
    fn nothing() -> &'static Self {
        static NOTHING: LazyLock<RouteFilters> = LazyLock::new(RouteFilters::default);
        &NOTHING
    }
}

/// `envoy.config.route.v3.RouteMatch`: all parts must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteMatch {
    /// Path without query.
    pub path: PathMatch,
    /// False compares exact and prefix paths without case.
    pub case_sensitive: bool,
    /// Header conditions; `:method`, `:authority`, `:scheme` work as names.
    pub headers: Vec<HeaderMatch>,
    /// Query parameter conditions.
    pub query: Vec<QueryMatch>,
    /// Conditions on what filters found out, such as a verified token's claims. Before they have run there is nothing.
    pub metadata: Vec<MetadataMatch>,
}

impl RouteMatch {
    /// Matches every request.
    #[must_use]
    pub fn any() -> Self {
        Self {
            path: PathMatch::Prefix("/".into()),
            case_sensitive: true,
            headers: vec![],
            query: vec![],
            metadata: vec![],
        }
    }
}

/// Condition on the path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathMatch {
    /// Starts with these bytes.
    Prefix(String),
    /// Starts with these segments.
    SegmentPrefix(String),
    /// Equals.
    Exact(String),
    /// RE2 syntax, whole path.
    Regex(String),
    /// CONNECT requests, which have no path (`connect_matcher`).
    Connect,
}

/// Condition on a header (`envoy.config.route.v3.HeaderMatcher`). One that is there several times has several values, one of
/// which is enough.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HeaderMatch {
    /// Lower-case name.
    pub name: String,
    /// Condition.
    pub value: HeaderValueMatch,
    /// Negates the condition.
    pub invert: bool,
    /// Of a condition on a value: a missing header has an empty one. Without it the condition does not hold for a missing
    /// header, inverted or not (`treat_missing_header_as_empty`).
    #[serde(default)]
    pub missing_is_empty: bool,
}

/// Condition on a header's value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HeaderValueMatch {
    /// True: it is there; false: it is not.
    Present(bool),
    /// It is there and matches.
    Value(StringMatch),
}

/// Condition on a query parameter.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct QueryMatch {
    /// Name, case-sensitive.
    pub name: String,
    /// Condition; `None` means presence.
    pub value: Option<StringMatch>,
}

/// `envoy.type.matcher.v3.StringMatcher`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StringMatch {
    /// Condition.
    pub kind: StringMatchKind,
    /// Compare without case (not for regex).
    pub ignore_case: bool,
}

impl StringMatch {
    /// Equals `s`, with case.
    #[must_use]
    pub fn exact(s: impl Into<String>) -> Self {
        Self { kind: StringMatchKind::Exact(s.into()), ignore_case: false }
    }
    /// Starts with `s`, with case.
    #[must_use]
    pub fn prefix(s: impl Into<String>) -> Self {
        Self { kind: StringMatchKind::Prefix(s.into()), ignore_case: false }
    }
    /// Ends with `s`, with case.
    #[must_use]
    pub fn suffix(s: impl Into<String>) -> Self {
        Self { kind: StringMatchKind::Suffix(s.into()), ignore_case: false }
    }
    /// RE2 syntax over the whole value.
    #[must_use]
    pub fn regex(s: impl Into<String>) -> Self {
        Self { kind: StringMatchKind::Regex(s.into()), ignore_case: false }
    }
}

/// Condition on a string.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StringMatchKind {
    /// Equals.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// Contains.
    Contains(String),
    /// RE2 syntax, whole value.
    Regex(String),
}

/// What a route does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouteAction {
    /// Forward upstream.
    Forward(Box<Forward>),
    /// Redirect.
    Redirect(Redirect),
    /// Answer here.
    Direct(DirectResponse),
}

/// `envoy.config.route.v3.RouteAction`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Forward {
    /// Destinations, at least one unless a header names it; picked in proportion to their weights.
    pub clusters: Vec<WeightedCluster>,
    /// Header of the request that names the destination; there are no `clusters` then.
    pub cluster_header: Option<String>,
    /// Whole request; `None` is no limit.
    pub timeout: Option<Duration>,
    /// Overrides the connection manager's stream idle timeout.
    pub idle_timeout: Option<Duration>,
    /// Retries; `None` is none.
    pub retry: Option<Box<RetryPolicy>>,
    /// Replaces the matched prefix (or the whole exact path).
    pub prefix_rewrite: Option<String>,
    /// `(pattern, substitution)` over the path.
    pub regex_rewrite: Option<(String, String)>,
    /// Replaces the authority.
    pub host_rewrite: Option<String>,
    /// What was replaced is appended to `x-forwarded-host`.
    pub forwarded_host: bool,
    /// Shadows.
    pub mirrors: Vec<Mirror>,
    /// Inputs of consistent hashing, in order.
    pub hash: Vec<HashPolicy>,
    /// A try that is too slow goes on while the next one is made, and the first good answer counts
    /// (`hedge_policy.hedge_on_per_try_timeout`).
    pub hedge: bool,
    /// Limits of the whole stream.
    pub max_stream: Option<StreamLimit>,
    /// A CONNECT request ends here: what its stream carries goes to the destination as a TCP connection, or to
    /// the listener that the destination names (`upgrade_configs` with a `connect_config`).
    pub connect: bool,
}

/// `RouteAction.MaxStreamDuration`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StreamLimit {
    /// Longest stream; zero is no limit, `None` the connection manager's.
    pub max: Option<Duration>,
    /// A request's `grpc-timeout` limits it instead, up to this; zero is up to anything, `None` does not look.
    pub grpc_timeout_max: Option<Duration>,
    /// What is taken off that header.
    pub grpc_timeout_offset: Option<Duration>,
}

/// A destination and its share.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WeightedCluster {
    /// Upstream cluster.
    pub cluster: String,
    /// Relative weight.
    pub weight: u32,
    /// Request header changes for this destination.
    pub request_headers: Rare<HeaderOps>,
    /// Response header changes for this destination.
    pub response_headers: Rare<HeaderOps>,
}

impl WeightedCluster {
    /// The only destination.
    #[must_use]
    pub fn only(cluster: impl Into<String>) -> Self {
        Self { cluster: cluster.into(), weight: 1, ..Self::default() }
    }
}

/// `envoy.config.route.v3.RetryPolicy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryPolicy {
    /// Conditions.
    pub on: Vec<RetryOn>,
    /// Status codes for [`RetryOn::RetriableStatusCodes`].
    pub status_codes: Vec<u16>,
    /// Retries beyond the first try.
    pub attempts: u32,
    /// Limit of each try.
    pub per_try_timeout: Option<Duration>,
    /// First back-off; doubles with full jitter.
    pub base_interval: Duration,
    /// Upper end of the back-off.
    pub max_interval: Duration,
    /// Pick hosts again up to this often to avoid ones already tried; 0 does not avoid.
    pub host_selection_attempts: u32,
    /// Longest time without a byte in either direction of a try.
    pub per_try_idle_timeout: Option<Duration>,
    /// Waits as long as an answer says.
    pub rate_limited: Option<RateLimitedBackOff>,
    /// Answers with any of these are retried with [`RetryOn::RetriableHeaders`].
    pub retriable_headers: Vec<HeaderMatch>,
    /// Unless empty, only requests with any of these are retried.
    pub retriable_request_headers: Vec<HeaderMatch>,
    /// After each so many tries the priorities of the hosts that were tried are left out, unless that leaves nobody
    /// (`envoy.retry_priorities.previous_priorities`); 0 is never.
    pub leave_priorities: u32,
}

impl Default for RetryPolicy {
    /// Envoy's values for what is not set; no condition, so nothing is retried.
    fn default() -> Self {
        Self {
            on: vec![],
            status_codes: vec![],
            attempts: 1,
            per_try_timeout: None,
            base_interval: Duration::from_millis(25),
            max_interval: Duration::from_millis(250),
            host_selection_attempts: 0,
            per_try_idle_timeout: None,
            rate_limited: None,
            retriable_headers: vec![],
            retriable_request_headers: vec![],
            leave_priorities: 0,
        }
    }
}

/// `RetryPolicy.RateLimitedRetryBackOff`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimitedBackOff {
    /// Headers that say when to come back; the first that can be used decides.
    pub headers: Vec<ResetHeader>,
    /// A later time is not believed.
    pub max_interval: Duration,
}

/// A header that says when to come back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetHeader {
    /// Lower-case name.
    pub name: String,
    /// Its value is a time (seconds since 1970) rather than a number of seconds.
    pub unix_time: bool,
}

/// `x-envoy-retry-on` and `x-envoy-retry-grpc-on` conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RetryOn {
    /// Any 5xx, or no answer.
    ServerError,
    /// 502, 503, 504.
    GatewayError,
    /// No connection.
    ConnectFailure,
    /// `REFUSED_STREAM`.
    RefusedStream,
    /// Disconnect or reset before an answer.
    Reset,
    /// Reset before the request was sent upstream.
    ResetBeforeRequest,
    /// 409.
    Retriable4xx,
    /// Those in `status_codes`.
    RetriableStatusCodes,
    /// Those with `retriable_headers`.
    RetriableHeaders,
    /// Even those that a rate limit refused (`x-envoy-ratelimited`).
    EnvoyRateLimited,
    /// gRPC status 1.
    Cancelled,
    /// gRPC status 4.
    DeadlineExceeded,
    /// gRPC status 8.
    ResourceExhausted,
    /// gRPC status 13.
    Internal,
    /// gRPC status 14.
    Unavailable,
}

/// A shadow of requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// Destination; answers are dropped.
    pub cluster: String,
    /// Share of requests in 1/1,000,000.
    pub fraction: u32,
}

/// Input of consistent hashing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HashPolicy {
    /// A request header.
    Header(String),
    /// A cookie; made with this path and time to live if missing.
    Cookie {
        /// Name.
        name: String,
        /// Path attribute.
        path: String,
        /// `None`: not made if missing; zero: session cookie.
        ttl: Option<Duration>,
        /// Further attributes; one without a value is its name alone.
        attributes: Vec<(String, String)>,
    },
    /// Source address.
    SourceIp,
    /// A query parameter.
    Query(String),
}

/// `envoy.config.route.v3.RedirectAction`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Redirect {
    /// New scheme.
    pub scheme: Option<String>,
    /// New host.
    pub host: Option<String>,
    /// New port.
    pub port: Option<u16>,
    /// New path and query.
    pub path: Option<String>,
    /// Replaces the matched prefix.
    pub prefix_rewrite: Option<String>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// `envoy.config.route.v3.DirectResponseAction`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DirectResponse {
    /// Status.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

/// Changes to headers: removals first, then sets, then additions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HeaderOps {
    /// Names to remove.
    pub remove: Vec<String>,
    /// Replace or create.
    pub set: Vec<(String, String)>,
    /// Append another value.
    pub add: Vec<(String, String)>,
}

impl Nothing for HeaderOps {
    fn nothing() -> &'static Self {
        static NOTHING: HeaderOps = HeaderOps { remove: vec![], set: vec![], add: vec![] };
        &NOTHING
    }
}

impl HeaderOps {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }
}

/// `envoy.extensions.filters.http.fault.v3.HTTPFault`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Fault {
    /// Delay, and its share of requests in 1/1,000,000.
    pub delay: Option<(Duration, u32)>,
    /// Abort, and its share of requests in 1/1,000,000.
    pub abort: Option<(AbortKind, u32)>,
}

/// What an injected abort answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AbortKind {
    /// HTTP status, body `fault filter abort`.
    Http(u16),
    /// gRPC status.
    Grpc(u32),
}

/// `envoy.extensions.filters.http.cors.v3.CorsPolicy`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cors {
    /// Origins allowed.
    pub allow_origins: Vec<StringMatch>,
    /// `access-control-allow-methods`.
    pub allow_methods: String,
    /// `access-control-allow-headers`.
    pub allow_headers: String,
    /// `access-control-expose-headers`.
    pub expose_headers: String,
    /// `access-control-max-age`, seconds.
    pub max_age: String,
    /// `access-control-allow-credentials`.
    pub allow_credentials: bool,
    /// Preflights of other origins are answered here, with nothing, instead of forwarded.
    pub ignore_unmatched: bool,
}
