//! `networking.istio.io` VirtualService.

use std::collections::BTreeMap;

use super::{Duration, Percent, PortSelector, RouteExtras, StringMatch};

message! {
    /// How requests to hosts are routed.
    pub struct VirtualService {
        /// Names that callers use: DNS, short or with a wildcard first label.
        pub hosts: Vec<String>,
        /// Gateways it is bound to; `mesh` (the default) means every sidecar.
        pub gateways: Vec<String>,
        /// Routes of HTTP traffic; the first match wins.
        pub http: Vec<HttpRoute>,
        /// Routes of TLS traffic that is not terminated here.
        pub tls: Vec<TlsRoute>,
        /// Routes of everything else.
        pub tcp: Vec<TcpRoute>,
        /// Namespaces it is visible in; none means all.
        pub export_to: Vec<String>,
    }

    /// One HTTP route.
    pub struct HttpRoute {
        /// Logged as the route's name.
        pub name: String,
        /// Any of these must hold; none matches everything.
        #[serde(rename = "match")]
        pub matches: Vec<HttpMatchRequest>,
        /// Destinations by weight.
        pub route: Vec<HttpRouteDestination>,
        /// Answer with a redirect instead.
        pub redirect: Option<HttpRedirect>,
        /// Answer here instead.
        pub direct_response: Option<HttpDirectResponse>,
        /// Continue in another VirtualService.
        pub delegate: Option<Delegate>,
        /// Change path or authority before forwarding.
        pub rewrite: Option<HttpRewrite>,
        /// Whole request; absent or zero is no limit.
        pub timeout: Option<Duration>,
        /// Retries.
        pub retries: Option<HttpRetry>,
        /// Injected faults.
        pub fault: Option<HttpFaultInjection>,
        /// One shadow.
        pub mirror: Option<Destination>,
        /// Several shadows.
        pub mirrors: Vec<HttpMirrorPolicy>,
        /// Share of mirrored requests, whole percent (old form).
        #[serde(alias = "mirror_percent")]
        pub mirror_percent: Option<u32>,
        /// Share of mirrored requests.
        pub mirror_percentage: Option<Percent>,
        /// Cross-origin policy.
        pub cors_policy: Option<CorsPolicy>,
        /// Header changes.
        pub headers: Option<Headers>,
        /// Request headers to add (1.0 form).
        pub append_headers: BTreeMap<String, String>,
        /// Response headers to remove (1.0 form).
        pub remove_response_headers: BTreeMap<String, String>,
        /// 1.0: without effect, upgrades are automatic.
        pub websocket_upgrade: bool,
        /// What the Gateway API says beyond this; it is never authored.
        #[serde(skip)]
        pub extras: Option<Box<RouteExtras>>,
    }

    /// Conditions that must all hold.
    pub struct HttpMatchRequest {
        /// For logs.
        pub name: String,
        /// Path without query.
        pub uri: Option<StringMatch>,
        /// `http` or `https`.
        pub scheme: Option<StringMatch>,
        /// Method.
        pub method: Option<StringMatch>,
        /// Host and port.
        pub authority: Option<StringMatch>,
        /// Lower-case names; `{}` is presence.
        pub headers: BTreeMap<String, StringMatch>,
        /// Service or gateway port; 0 is any.
        pub port: u32,
        /// The caller's workload carries all of these.
        pub source_labels: BTreeMap<String, String>,
        /// Overrides the gateways of the VirtualService.
        pub gateways: Vec<String>,
        /// Query parameters.
        pub query_params: BTreeMap<String, StringMatch>,
        /// Compare exact and prefix paths without case.
        pub ignore_uri_case: bool,
        /// Headers that must not match.
        pub without_headers: BTreeMap<String, StringMatch>,
        /// The caller's namespace.
        pub source_namespace: String,
        /// Prefix of statistics.
        pub stat_prefix: String,
    }

    /// A destination and its share.
    pub struct HttpRouteDestination {
        /// Where to.
        pub destination: Option<Destination>,
        /// Share; a single destination gets everything.
        pub weight: i32,
        /// Header changes for this destination.
        pub headers: Option<Headers>,
    }

    /// A service, a subset of it, and a port.
    pub struct Destination {
        /// Name of the service; short names are of the document's namespace.
        pub host: String,
        /// Subset that a DestinationRule declares.
        pub subset: String,
        /// Needed when the service has several ports.
        pub port: Option<PortSelector>,
    }

    /// A redirect.
    pub struct HttpRedirect {
        /// Replaces the whole path.
        pub uri: String,
        /// Replaces the host.
        pub authority: String,
        /// Replaces the port.
        pub port: Option<u32>,
        /// Takes the port from elsewhere.
        pub derive_port: Option<RedirectPortSelection>,
        /// `http` or `https`.
        pub scheme: String,
        /// 301 unless set; 301, 302, 303, 307 or 308.
        pub redirect_code: u32,
        /// Replaces the matched prefix.
        pub prefix_rewrite: String,
    }

    /// A fixed answer.
    pub struct HttpDirectResponse {
        /// 200 to 599.
        pub status: u32,
        /// Body.
        pub body: Option<HttpBody>,
    }

    /// Body of a fixed answer.
    pub struct HttpBody {
        /// Text.
        pub string: Option<String>,
        /// Base64.
        pub bytes: Option<String>,
    }

    /// Another VirtualService.
    pub struct Delegate {
        /// Its name.
        pub name: String,
        /// Its namespace; the root's unless set.
        pub namespace: String,
    }

    /// Changes to path and authority.
    pub struct HttpRewrite {
        /// Replaces the matched prefix, or the whole path.
        pub uri: String,
        /// Replaces the authority.
        pub authority: String,
        /// Substitution in the path.
        pub uri_regex_rewrite: Option<RegexRewrite>,
    }

    /// A substitution.
    pub struct RegexRewrite {
        /// RE2 pattern.
        #[serde(rename = "match")]
        pub pattern: String,
        /// Substitution with `\1` groups.
        pub rewrite: String,
    }

    /// Retries of a request.
    pub struct HttpRetry {
        /// Retries beyond the first try; 0 turns them off.
        pub attempts: i32,
        /// Limit of each try.
        pub per_try_timeout: Option<Duration>,
        /// Comma-separated conditions and status codes.
        pub retry_on: String,
        /// Whether retries may leave the locality.
        pub retry_remote_localities: Option<bool>,
        /// Whether retries avoid hosts already tried; true unless set.
        pub retry_ignore_previous_hosts: Option<bool>,
        /// First back-off; 25 ms unless set.
        pub backoff: Option<Duration>,
    }

    /// Injected faults; delay and abort are independent.
    pub struct HttpFaultInjection {
        /// Delay before forwarding.
        pub delay: Option<FaultDelay>,
        /// Answer instead of forwarding.
        pub abort: Option<FaultAbort>,
    }

    /// An injected delay.
    pub struct FaultDelay {
        /// Whole percent (old form).
        pub percent: i32,
        /// How long.
        pub fixed_delay: Option<Duration>,
        /// Never implemented by anyone; refused.
        pub exponential_delay: Option<Duration>,
        /// Share of requests; absent together with `percent` is none.
        pub percentage: Option<Percent>,
    }

    /// An injected answer.
    pub struct FaultAbort {
        /// Whole percent (old form).
        pub percent: i32,
        /// HTTP status.
        pub http_status: Option<i32>,
        /// gRPC status, by name or number.
        pub grpc_status: Option<String>,
        /// Never implemented by anyone; refused.
        pub http2_error: Option<String>,
        /// Share of requests; absent together with `percent` is none.
        pub percentage: Option<Percent>,
    }

    /// A shadow and its share.
    pub struct HttpMirrorPolicy {
        /// Where to.
        pub destination: Option<Destination>,
        /// Share of requests; all unless set.
        pub percentage: Option<Percent>,
    }

    /// Cross-origin resource sharing.
    pub struct CorsPolicy {
        /// Origins, exact or `*` (old form).
        pub allow_origin: Vec<String>,
        /// Origins.
        pub allow_origins: Vec<StringMatch>,
        /// Methods.
        pub allow_methods: Vec<String>,
        /// Request headers.
        pub allow_headers: Vec<String>,
        /// Response headers that scripts may read.
        pub expose_headers: Vec<String>,
        /// How long a preflight may be cached; whole seconds.
        pub max_age: Option<Duration>,
        /// Whether credentials are allowed.
        pub allow_credentials: Option<bool>,
        /// What happens to preflights of other origins.
        pub unmatched_preflights: UnmatchedPreflights,
    }

    /// Header changes in both directions.
    pub struct Headers {
        /// Before forwarding.
        pub request: Option<HeaderOperations>,
        /// Before answering.
        pub response: Option<HeaderOperations>,
    }

    /// Header changes.
    pub struct HeaderOperations {
        /// Replace or create.
        pub set: BTreeMap<String, String>,
        /// Append another value.
        pub add: BTreeMap<String, String>,
        /// Remove.
        pub remove: Vec<String>,
    }

    /// One TLS route.
    pub struct TlsRoute {
        /// Any of these must hold; at least one.
        #[serde(rename = "match")]
        pub matches: Vec<TlsMatchAttributes>,
        /// Destinations by weight.
        pub route: Vec<RouteDestination>,
    }

    /// Conditions of a TLS route.
    pub struct TlsMatchAttributes {
        /// SNI: exact or with a wildcard first label.
        pub sni_hosts: Vec<String>,
        /// Original destination.
        pub destination_subnets: Vec<String>,
        /// Service or gateway port; 0 is any.
        pub port: u32,
        /// Address of the caller.
        pub source_subnet: String,
        /// The caller's workload carries all of these.
        pub source_labels: BTreeMap<String, String>,
        /// Overrides the gateways of the VirtualService.
        pub gateways: Vec<String>,
        /// The caller's namespace.
        pub source_namespace: String,
    }

    /// One TCP route.
    pub struct TcpRoute {
        /// Any of these must hold; none matches everything.
        #[serde(rename = "match")]
        pub matches: Vec<L4MatchAttributes>,
        /// Destinations by weight.
        pub route: Vec<RouteDestination>,
    }

    /// Conditions of a TCP route.
    pub struct L4MatchAttributes {
        /// Original destination.
        pub destination_subnets: Vec<String>,
        /// Service or gateway port; 0 is any.
        pub port: u32,
        /// Address of the caller.
        pub source_subnet: String,
        /// The caller's workload carries all of these.
        pub source_labels: BTreeMap<String, String>,
        /// Overrides the gateways of the VirtualService.
        pub gateways: Vec<String>,
        /// The caller's namespace.
        pub source_namespace: String,
    }

    /// A destination of TCP or TLS and its share.
    pub struct RouteDestination {
        /// Where to.
        pub destination: Option<Destination>,
        /// Share; a single destination gets everything.
        pub weight: i32,
    }
}

choice! {
    /// Where a redirect's port comes from.
    pub enum RedirectPortSelection {
        /// 80 for `http`, 443 for `https`.
        #[default]
        FromProtocolDefault,
        /// The request's.
        FromRequestPort,
    }

    /// What happens to preflights whose origin does not match.
    pub enum UnmatchedPreflights {
        /// Forwarded, as by `FORWARD`.
        #[default]
        Unspecified,
        /// Forwarded upstream.
        Forward,
        /// Answered here without the allow headers.
        Ignore,
    }
}
