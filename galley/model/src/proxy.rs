//! What a proxy executes: listeners, routes, clusters, endpoints, policies.
//!
//! The shape is Envoy's (`envoy.config.*.v3`), reduced to what Flotilla serves and free of
//! protobuf: pilot's generators produce these values, `mesh-xds` encodes them for any xDS client and
//! decodes what any xDS server sends, and the engine compiles them into its lookup tables. A field
//! that is here is honoured by the engine; what the wire can say and this model cannot is rejected
//! by name when it is decoded.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::Locality;

// ---------------------------------------------------------------- listeners

/// `envoy.config.listener.v3.Listener`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// Unique name.
    pub name: String,
    /// Address to bind; with `bind_to_port: false` only a key for original destinations.
    pub address: SocketAddr,
    /// False: connections arrive only from a listener with `use_original_dst`.
    pub bind_to_port: bool,
    /// Recover where a redirected connection was going, and hand it to the listener that matches
    /// (exact address, then the wildcard address with that port), else keep it. An inbound listener
    /// always keeps it: the same port may be the key of a listener for outbound traffic.
    pub use_original_dst: bool,
    /// Bind with `IP_TRANSPARENT` (TPROXY).
    pub transparent: bool,
    /// Which side of the workload.
    pub direction: Direction,
    /// Peek for a TLS ClientHello (SNI, ALPN) before choosing a chain.
    pub inspect_tls: bool,
    /// Peek for HTTP/1 or HTTP/2 before choosing a chain.
    pub inspect_http: bool,
    /// Expect a PROXY protocol header (v1 or v2).
    pub proxy_protocol: bool,
    /// How long inspection may wait for bytes; then the connection is matched with what is known.
    pub inspect_timeout: Duration,
    /// Chains, chosen by the most specific match.
    pub filter_chains: Vec<FilterChain>,
    /// Used when none matches; without it the connection is closed.
    pub default_filter_chain: Option<FilterChain>,
    /// Log of connections that no chain took.
    pub access_log: Vec<AccessLog>,
}

/// `envoy.config.core.v3.TrafficDirection`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Direction {
    /// Not a sidecar, such as a gateway.
    #[default]
    Unspecified,
    /// Towards the workload.
    Inbound,
    /// From the workload.
    Outbound,
}

/// `envoy.config.listener.v3.FilterChain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterChain {
    /// Name, for logs and updates.
    pub name: String,
    /// When it applies.
    pub matches: FilterChainMatch,
    /// TLS termination.
    pub tls: Option<DownstreamTls>,
    /// Filters; the last one is terminal ([`NetworkFilter::Http`] or [`NetworkFilter::Tcp`]).
    pub filters: Vec<NetworkFilter>,
}

/// `envoy.config.listener.v3.FilterChainMatch`; empty criteria match everything. Envoy's order:
/// destination port, destination prefix (longest), server name (exact, then longest wildcard
/// suffix), transport protocol, application protocols, source prefix.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FilterChainMatch {
    /// Original destination port.
    pub destination_port: Option<u16>,
    /// Original destination address.
    pub destination_prefixes: Vec<IpNet>,
    /// SNI: exact, or `*.suffix`.
    pub server_names: Vec<String>,
    /// `tls` or `raw_buffer`, as detected.
    pub transport_protocol: Option<TransportProtocol>,
    /// ALPN of the ClientHello, or `http/1.1` / `h2c` as detected by the HTTP inspector.
    pub application_protocols: Vec<String>,
    /// Source address.
    pub source_prefixes: Vec<IpNet>,
}

/// Detected transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TransportProtocol {
    /// A TLS ClientHello was seen.
    Tls,
    /// Anything else.
    RawBuffer,
}

/// `envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownstreamTls {
    /// Certificate and key.
    pub certificate: SecretRef,
    /// Whether a client certificate is asked for.
    pub client_certificate: ClientCertificate,
    /// ALPN, preferred first.
    pub alpn: Vec<String>,
    /// Lowest version accepted.
    pub min_version: TlsVersion,
}

/// Client authentication of a TLS server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientCertificate {
    /// Not asked for.
    None,
    /// Asked for; verified if given.
    Optional(Validation),
    /// Handshake fails without one.
    Required(Validation),
}

/// TLS protocol version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TlsVersion {
    /// TLS 1.2.
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// Where a secret comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SecretRef {
    /// SDS by name. `default` is the workload's SVID, `ROOTCA` the trust bundle,
    /// `kubernetes://<name>` a gateway credential.
    Sds(String),
    /// PEM files read at start and on change.
    Files {
        /// Certificate chain (or CA bundle when used for validation).
        chain: String,
        /// Private key; empty when used for validation.
        key: String,
    },
}

/// Verification of a peer's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Validation {
    /// Trusted roots; `None` skips verification (only where a user asked for that).
    pub trusted: Option<SecretRef>,
    /// Any of these must match a URI or DNS SAN; empty accepts any.
    pub sans: Vec<StringMatch>,
}

/// `envoy.config.listener.v3.Filter`, those the engine has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkFilter {
    /// `envoy.filters.network.rbac`: closes the connection when denied.
    Rbac(Rbac),
    /// `envoy.filters.network.sni_cluster`: the SNI names the cluster of the following TCP proxy.
    SniCluster,
    /// `envoy.filters.network.tcp_proxy`.
    Tcp(TcpProxy),
    /// `envoy.filters.network.http_connection_manager`.
    Http(Box<HttpConnectionManager>),
}

/// `envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpProxy {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// Destinations by weight, at least one.
    pub clusters: Vec<WeightedCluster>,
    /// Closes when no byte passed for this long; `None` never.
    pub idle_timeout: Option<Duration>,
    /// Log of connections.
    pub access_log: Vec<AccessLog>,
}

/// `envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpConnectionManager {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// Codec of the downstream connection.
    pub codec: HttpCodec,
    /// Routes.
    pub routes: RouteSource,
    /// HTTP filters in order; the router is implied at the end.
    pub filters: Vec<HttpFilter>,
    /// The connection's peer is the client: append it to `x-forwarded-for`.
    pub use_remote_address: bool,
    /// Trusted proxies in front, for `x-forwarded-for`.
    pub trusted_hops: u32,
    /// What happens to `x-forwarded-client-cert`.
    pub forward_client_cert: ForwardClientCert,
    /// Whether `Upgrade: websocket` (and its HTTP/2 form) is accepted.
    pub websocket: bool,
    /// Value of the `server` response header; empty leaves the upstream's.
    pub server_name: String,
    /// Resolve dot segments before routing (RFC 3986 section 6.2.2.3).
    pub normalize_path: bool,
    /// Collapse `//` before routing.
    pub merge_slashes: bool,
    /// Log of requests.
    pub access_log: Vec<AccessLog>,
    /// Tracing; `None` only forwards headers.
    pub tracing: Option<Tracing>,
    /// Time without a stream after which the connection is drained; `None` never.
    pub idle_timeout: Option<Duration>,
    /// Time in which the request head must arrive; `None` never.
    pub request_headers_timeout: Option<Duration>,
    /// Time without activity on a stream; `None` never.
    pub stream_idle_timeout: Option<Duration>,
    /// Keep `x-request-id` of the client if there is one.
    pub preserve_request_id: bool,
}

/// Codec of a downstream HTTP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HttpCodec {
    /// By ALPN, else by the first bytes.
    Auto,
    /// HTTP/1.x.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Where an HTTP connection manager's routes come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouteSource {
    /// RDS by name.
    Rds(String),
    /// In the listener.
    Inline(Arc<RouteConfiguration>),
}

/// `HttpConnectionManager.ForwardClientCertDetails`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ForwardClientCert {
    /// Remove it.
    Sanitize,
    /// Forward what came over mTLS.
    ForwardOnly,
    /// Append this hop's client.
    AppendForward,
    /// Replace it by this hop's client.
    SanitizeSet,
}

/// HTTP filters before the router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HttpFilter {
    /// `envoy.filters.http.rbac`: 403 `RBAC: access denied`.
    Rbac(Rbac),
    /// `envoy.filters.http.cors`; the policy is on the route.
    Cors,
    /// `envoy.filters.http.fault`; the fault is on the route.
    Fault,
    /// `envoy.filters.http.grpc_stats`.
    GrpcStats,
}

/// Trace sampling of an HTTP connection manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracing {
    /// Share of requests without a sampling decision that are sampled, in 1/10,000.
    pub sampling: u32,
}

/// Where and how access is logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessLog {
    /// File, `/dev/stdout` or `/dev/stderr`.
    pub path: String,
    /// Format.
    pub format: AccessLogFormat,
}

/// Format of an access log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessLogFormat {
    /// One line; Envoy's `%COMMAND(arg):len%` operators. Empty means Istio's default line.
    Text(String),
    /// One JSON object per line, values with the same operators.
    Json(BTreeMap<String, String>),
}

// ------------------------------------------------------------------- routes

/// `envoy.config.route.v3.RouteConfiguration`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteConfiguration {
    /// Name that RDS subscribes to.
    pub name: String,
    /// Hosts.
    pub virtual_hosts: Vec<VirtualHost>,
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
    /// First match wins.
    pub routes: Vec<Route>,
    /// Applied after the route's.
    pub request_headers: HeaderOps,
    /// Applied after the route's.
    pub response_headers: HeaderOps,
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
    pub request_headers: HeaderOps,
    /// Response header changes.
    pub response_headers: HeaderOps,
    /// Injected faults.
    pub fault: Option<Fault>,
    /// Cross-origin policy.
    pub cors: Option<Cors>,
    /// Trace operation.
    pub operation: String,
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
}

impl RouteMatch {
    /// Matches every request.
    #[must_use]
    pub fn any() -> Self {
        Self { path: PathMatch::Prefix("/".into()), case_sensitive: true, headers: vec![], query: vec![] }
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
}

/// Condition on a header. Several values are joined by `,` first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HeaderMatch {
    /// Lower-case name.
    pub name: String,
    /// Condition.
    pub value: HeaderValueMatch,
    /// Negates the condition.
    pub invert: bool,
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
    /// Destinations, at least one; picked in proportion to their weights.
    pub clusters: Vec<WeightedCluster>,
    /// Whole request; `None` is no limit.
    pub timeout: Option<Duration>,
    /// Overrides the connection manager's stream idle timeout.
    pub idle_timeout: Option<Duration>,
    /// Retries; `None` is none.
    pub retry: Option<RetryPolicy>,
    /// Replaces the matched prefix (or the whole exact path).
    pub prefix_rewrite: Option<String>,
    /// `(pattern, substitution)` over the path.
    pub regex_rewrite: Option<(String, String)>,
    /// Replaces the authority.
    pub host_rewrite: Option<String>,
    /// Shadows.
    pub mirrors: Vec<Mirror>,
    /// Inputs of consistent hashing, in order.
    pub hash: Vec<HashPolicy>,
}

/// A destination and its share.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WeightedCluster {
    /// Upstream cluster.
    pub cluster: String,
    /// Relative weight.
    pub weight: u32,
    /// Request header changes for this destination.
    pub request_headers: HeaderOps,
    /// Response header changes for this destination.
    pub response_headers: HeaderOps,
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
}

// ----------------------------------------------------------------- clusters

/// `envoy.config.cluster.v3.Cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Such as `outbound|9080|v1|reviews.books.svc.cluster.local`.
    pub name: String,
    /// Where endpoints come from.
    pub discovery: Discovery,
    /// Load balancing.
    pub lb: LbPolicy,
    /// TCP (and TLS) connect.
    pub connect_timeout: Duration,
    /// HTTP version spoken upstream.
    pub http: UpstreamHttp,
    /// TLS to every endpoint that no entry of `tls_matches` takes.
    pub tls: Option<UpstreamTls>,
    /// `transport_socket_matches`: the first whose labels all equal the endpoint's
    /// `transport_labels` decides.
    pub tls_matches: Vec<TransportSocketMatch>,
    /// Limits.
    pub limits: CircuitBreakers,
    /// Passive health.
    pub outlier: Option<OutlierDetection>,
    /// Requests per upstream connection; 0 is no limit.
    pub max_requests_per_connection: u32,
    /// Idle upstream HTTP connection.
    pub idle_timeout: Option<Duration>,
    /// Below this share of healthy hosts (percent) health is ignored.
    pub panic_threshold: u32,
    /// Whether locality weights are used.
    pub locality_weighted: bool,
    /// TCP keep-alive of upstream connections.
    pub keepalive: Option<Duration>,
}

/// `Cluster.DiscoveryType`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Discovery {
    /// EDS under this service name.
    Eds(String),
    /// In the cluster.
    Static(LoadAssignment),
    /// All addresses that the names resolve to.
    StrictDns(LoadAssignment),
    /// One address that the name resolves to.
    LogicalDns(LoadAssignment),
    /// The connection's original destination.
    OriginalDst,
}

/// `Cluster.LbPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LbPolicy {
    /// Weighted round robin.
    RoundRobin,
    /// The less loaded of two random hosts.
    LeastRequest,
    /// Weighted random.
    Random,
    /// Ketama ring of at least this size.
    RingHash(u64),
    /// Maglev table of this prime size.
    Maglev(u64),
}

/// HTTP version spoken upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum UpstreamHttp {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// The downstream's.
    Downstream,
    /// By ALPN of the upstream TLS session: HTTP/2 when the peer's proxy accepts it.
    Auto,
}

/// `envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct UpstreamTls {
    /// Client certificate.
    pub certificate: Option<SecretRef>,
    /// Server verification.
    pub validation: Validation,
    /// SNI; empty sends none.
    pub sni: String,
    /// ALPN, preferred first.
    pub alpn: Vec<String>,
}

/// `Cluster.TransportSocketMatch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportSocketMatch {
    /// For statistics.
    pub name: String,
    /// All must equal the endpoint's `transport_labels`; empty matches every endpoint.
    pub labels: BTreeMap<String, String>,
    /// `None` is plaintext.
    pub tls: Option<UpstreamTls>,
}

/// `envoy.config.cluster.v3.CircuitBreakers.Thresholds`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CircuitBreakers {
    /// Connections.
    pub max_connections: u32,
    /// Requests waiting for a connection.
    pub max_pending: u32,
    /// Requests in flight.
    pub max_requests: u32,
    /// Retries in flight.
    pub max_retries: u32,
}

impl Default for CircuitBreakers {
    fn default() -> Self {
        Self {
            max_connections: u32::MAX,
            max_pending: u32::MAX,
            max_requests: u32::MAX,
            max_retries: u32::MAX,
        }
    }
}

/// `envoy.config.cluster.v3.OutlierDetection`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutlierDetection {
    /// Consecutive 5xx (and connect failures); 0 is off.
    pub consecutive_5xx: u32,
    /// Consecutive 502, 503, 504 and connect failures; 0 is off.
    pub consecutive_gateway: u32,
    /// Sweep for returning hosts.
    pub interval: Duration,
    /// Ejection time, multiplied by the number of ejections.
    pub base_ejection: Duration,
    /// Upper end of the ejection time.
    pub max_ejection: Duration,
    /// Share of hosts that may be ejected, percent; one always may.
    pub max_percent: u32,
}

// ---------------------------------------------------------------- endpoints

/// `envoy.config.endpoint.v3.ClusterLoadAssignment`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadAssignment {
    /// EDS service name.
    pub name: String,
    /// Endpoints by locality and priority.
    pub localities: Vec<LocalityEndpoints>,
    /// Percent; Envoy's default is 140.
    pub overprovisioning: u32,
}

/// `envoy.config.endpoint.v3.LocalityLbEndpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LocalityEndpoints {
    /// Where they are.
    pub locality: Locality,
    /// 0 is used first.
    pub priority: u32,
    /// Share among localities of the same priority, if the cluster is locality weighted.
    pub weight: u32,
    /// The endpoints.
    pub endpoints: Vec<LbEndpoint>,
}

/// `envoy.config.endpoint.v3.LbEndpoint`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LbEndpoint {
    /// IP address or, with DNS discovery, a name.
    pub address: String,
    /// Port.
    pub port: u16,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// Health known to the control plane.
    pub health: EndpointHealth,
    /// Filter metadata `envoy.transport_socket_match`.
    pub transport_labels: BTreeMap<String, String>,
    /// Filter metadata `istio`: `workload` is `name;namespace;canonical name;revision;cluster`.
    pub workload: String,
}

/// `envoy.config.core.v3.HealthStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum EndpointHealth {
    /// Usable.
    #[default]
    Healthy,
    /// Used only in panic.
    Unhealthy,
    /// No new streams.
    Draining,
}

// -------------------------------------------------------------------- policy

/// `envoy.extensions.filters.{http,network}.rbac.v3.RBAC`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rbac {
    /// Enforced rules; `None` enforces nothing.
    pub rules: Option<RbacRules>,
    /// Rules that are only evaluated and logged (dry run).
    pub shadow: Option<RbacRules>,
    /// Prefix of statistics.
    pub stat_prefix: String,
}

/// `envoy.config.rbac.v3.RBAC`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RbacRules {
    /// What a match means. With `Allow` and no match the request is denied.
    pub action: RbacAction,
    /// By name; a policy matches if any permission and any principal does.
    pub policies: BTreeMap<String, RbacPolicy>,
}

/// `RBAC.Action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RbacAction {
    /// Allow what matches.
    Allow,
    /// Deny what matches.
    Deny,
    /// Only log what matches.
    Log,
}

/// `envoy.config.rbac.v3.Policy`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RbacPolicy {
    /// Any must match.
    pub permissions: Vec<Permission>,
    /// Any must match.
    pub principals: Vec<Principal>,
}

/// `envoy.config.rbac.v3.Permission`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Permission {
    /// Always.
    Any,
    /// All of them.
    And(Vec<Permission>),
    /// Any of them.
    Or(Vec<Permission>),
    /// Not it.
    Not(Box<Permission>),
    /// Request header (HTTP only).
    Header(HeaderMatch),
    /// Path without query (HTTP only).
    Path(StringMatch),
    /// Local address.
    DestinationIp(IpNet),
    /// Local port.
    DestinationPort(u16),
    /// SNI.
    ServerName(StringMatch),
}

/// `envoy.config.rbac.v3.Principal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Principal {
    /// Always.
    Any,
    /// All of them.
    And(Vec<Principal>),
    /// Any of them.
    Or(Vec<Principal>),
    /// Not it.
    Not(Box<Principal>),
    /// mTLS peer: a URI SAN, with its `spiffe://`; `None` is any authenticated peer.
    Authenticated(Option<StringMatch>),
    /// Peer address of the connection.
    DirectRemoteIp(IpNet),
    /// Client address, from `x-forwarded-for` where hops are trusted.
    RemoteIp(IpNet),
    /// Request header (HTTP only).
    Header(HeaderMatch),
    /// Path without query (HTTP only).
    Path(StringMatch),
    /// Cluster whose intermediate signed the peer's certificate (Flotilla's own; foreign proxies do
    /// not get policies that use it).
    SourceCluster(StringMatch),
}
