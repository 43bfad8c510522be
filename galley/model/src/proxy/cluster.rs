//! Clusters: how upstreams are found, chosen and spoken to.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{HealthCheck, LoadAssignment, SecretRef, Validation};

/// `envoy.config.cluster.v3.Cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Such as `outbound|9080|v1|reviews.books.svc.cluster.local`.
    pub name: String,
    /// Namespace of its service, of those whose host does not say it (`namespace` of `services` in Istio's metadata).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Where endpoints come from.
    pub discovery: Discovery,
    /// Load balancing.
    pub lb: LbPolicy,
    /// TCP (and TLS) connect.
    pub connect_timeout: Duration,
    /// HTTP version spoken upstream.
    pub http: UpstreamHttp,
    /// TLS to every endpoint that no entry of `tls_matches` takes.
    pub tls: Option<Box<UpstreamTls>>,
    /// `transport_socket_matches`: the first whose labels all equal the endpoint's
    /// `transport_labels` decides.
    pub tls_matches: Vec<TransportSocketMatch>,
    /// Limits.
    pub limits: CircuitBreakers,
    /// Passive health.
    pub outlier: Option<Box<OutlierDetection>>,
    /// Active health.
    pub health: Option<Box<HealthCheck>>,
    /// `close_connections_on_host_health_failure`: TCP connections through a host end when it becomes unhealthy.
    pub close_on_health_failure: bool,
    /// Of [`LbPolicy::Utilization`].
    pub utilization: Option<Box<UtilizationLb>>,
    /// Hosts that are new take their share step by step; round robin and least request only.
    pub slow_start: Option<SlowStart>,
    /// Requests per upstream connection; 0 is no limit.
    pub max_requests_per_connection: u32,
    /// Idle upstream HTTP connection.
    pub idle_timeout: Option<Duration>,
    /// Below this share of healthy hosts (percent) health is ignored.
    pub panic_threshold: u32,
    /// Whether locality weights are used.
    pub locality_weighted: bool,
    /// Age at which an upstream connection takes no more requests, and ends with those that it has.
    pub max_connection_duration: Option<Duration>,
    /// Of upstream connections that speak HTTP/2.
    pub http2: UpstreamHttp2,
    /// TCP keep-alive of upstream connections.
    pub keepalive: Option<TcpKeepalive>,
    /// Source addresses of upstream connections, the first of the endpoint's family; without one the kernel chooses.
    pub source: Vec<IpAddr>,
    /// Upstream connections begin with the client's addresses (`envoy.transport_sockets.upstream_proxy_protocol`),
    /// so each carries what one downstream connection sends.
    pub proxy_protocol: Option<ProxyProtocolVersion>,
    /// Name in Envoy's statistics (`alt_stat_name`); empty is the cluster's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stat_name: String,
    /// Time between two resolutions of its hosts (`dns_refresh_rate`); `None` is Envoy's 5 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_refresh: Option<Duration>,
    /// Bytes that may be buffered for an upstream connection in each direction; `None` is the proxy's own choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buffer_limit: Option<u32>,
    /// Names of HTTP/1 headers keep their case. Our own proxies always do so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub preserve_case: bool,
}

/// Before the path of an endpoint that is a Unix socket; `@` stands before an abstract name. Its port is 0.
pub const UNIX: &str = "unix://";

/// `envoy.config.core.v3.Http2ProtocolOptions` of a cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamHttp2 {
    /// Streams of a connection at a time, if its server allows as many; 0 is no limit of ours.
    pub max_concurrent_streams: u32,
    /// `connection_keepalive`: whether the server is there is asked from time to time.
    pub keepalive: Option<Http2Keepalive>,
}

/// `envoy.config.core.v3.KeepaliveSettings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Http2Keepalive {
    /// Between PING frames.
    pub interval: Duration,
    /// A connection on which nothing comes for so long after a PING ends.
    pub timeout: Duration,
}

/// `envoy.config.core.v3.TcpKeepalive`. What is absent is as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpKeepalive {
    /// Idle time before the first probe.
    pub time: Duration,
    /// Time between probes.
    pub interval: Option<Duration>,
    /// Unanswered probes after which the connection is dead.
    pub probes: Option<u32>,
}

/// Version of the PROXY protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ProxyProtocolVersion {
    /// A line of text.
    V1,
    /// Binary.
    V2,
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
    /// What the name resolves to that a request or connection asks for (`envoy.clusters.dynamic_forward_proxy`).
    ByName(NamedHosts),
}

/// Hosts that are found by the name of each request: its authority, or the SNI of a connection of bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedHosts {
    /// Where what was resolved is kept.
    pub cache: NameCache,
    /// Port of the hosts; 0 is the one that the authority names, and else 443 with TLS and 80 without. Envoy has no such
    /// field: it is metadata of the cluster, which Envoy leaves alone.
    pub port: u16,
}

/// `envoy.extensions.common.dynamic_forward_proxy.v3.DnsCacheConfig`. Caches of one name must be alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NameCache {
    /// Name of the cache.
    pub name: String,
    /// Names that are kept at a time.
    pub max_hosts: u32,
    /// A name that was not asked for in so long is forgotten.
    pub ttl: Duration,
    /// Between resolutions of a name that is kept.
    pub refresh: Duration,
    /// Addresses that are no answer, whoever gives it: names that strangers choose must not lead to the proxy's own host
    /// (`resolved_address_filter`).
    pub refused: Vec<IpNet>,
}

impl Default for NameCache {
    /// Envoy's defaults.
    fn default() -> Self {
        Self {
            name: "default".to_owned(),
            max_hosts: 1024,
            ttl: Duration::from_secs(300),
            refresh: Duration::from_secs(60),
            refused: Vec::new(),
        }
    }
}

/// `Cluster.LbPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LbPolicy {
    /// Weighted round robin.
    RoundRobin,
    /// The least loaded of some random hosts or, where weights differ, hosts by their weight less what is in flight.
    LeastRequest(LeastRequest),
    /// Weighted random.
    Random,
    /// Ketama ring of at least this size.
    RingHash(u64),
    /// Maglev table of this prime size.
    Maglev(u64),
    /// The cheaper of two random hosts by their response time times what is in flight. Envoy has no such policy: it is
    /// the extension `flotilla.peak_ewma` of `load_balancing_policy`.
    PeakEwma,
    /// Weighted round robin, by weights that follow from what hosts say of their load ([`Cluster::utilization`]).
    Utilization,
}

/// `ClientSideWeightedRoundRobin`: a host's weight is its requests in a second by its utilisation, both as it reports
/// them (ORCA). One without a weight has the median of the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UtilizationLb {
    /// Share of failed requests times this, in percent, is added to the utilisation.
    pub error_penalty: u32,
    /// Metrics of the report of which the largest is the utilisation; without one above zero it is
    /// `application_utilization`, and then `cpu_utilization`.
    pub metrics: Vec<String>,
    /// A host has reported for so long before its weight counts.
    pub blackout: Duration,
    /// A weight counts for so long after a report.
    pub expiration: Duration,
    /// Between computations.
    pub update: Duration,
}

impl Default for UtilizationLb {
    /// As Envoy's.
    fn default() -> Self {
        Self {
            error_penalty: 100,
            metrics: vec![],
            blackout: Duration::from_secs(10),
            expiration: Duration::from_secs(180),
            update: Duration::from_secs(1),
        }
    }
}

/// `Cluster.LeastRequestLbConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeastRequest {
    /// Random hosts of which the least loaded is taken while all weigh the same, at least 2.
    pub choices: u32,
    /// Where weights differ, a host's is divided by (requests in flight + 1) to this power, in 1/1000.
    pub bias: u32,
}

impl Default for LeastRequest {
    /// As Envoy's.
    fn default() -> Self {
        Self { choices: 2, bias: 1000 }
    }
}

/// `Cluster.SlowStartConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SlowStart {
    /// How long a host is new.
    pub window: Duration,
    /// Shape of the growth in 1/1000: the weight is multiplied by (age / window) ^ (1000 / aggression).
    pub aggression: u32,
    /// Least share of its weight that a host has, in 1/100 percent.
    pub min_weight: u32,
}

/// HTTP version spoken upstream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum UpstreamHttp {
    /// HTTP/1.1.
    #[default]
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
    /// Without an `sni`, it is the name by which the host was found ([`Discovery::ByName`]), and the certificate must be
    /// for that name (`auto_sni` and `auto_san_validation`).
    pub by_name: bool,
    /// ALPN, preferred first.
    pub alpn: Vec<String>,
}

impl UpstreamTls {
    /// Whether the certificate must be for the name by which the host was found: nothing else says whose it has to be.
    #[must_use]
    pub fn is_proven_by_name(&self) -> bool {
        let unnamed = self.sni.is_empty() && self.validation.sans.is_empty();
        self.by_name && unnamed && self.validation.trusted.is_some()
    }

    /// Whether the session is one of QUIC that carries datagrams ([`super::UDP_ALPN`]).
    #[must_use]
    pub fn carries_datagrams(&self) -> bool {
        self.alpn.iter().any(|p| p == super::UDP_ALPN)
    }
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
    /// HBONE: the TLS session goes to [`HBONE_PORT`] of the endpoint's address, is shared, and carries each
    /// connection as a CONNECT stream for `address:port` of the endpoint.
    pub hbone: bool,
}

/// Port at which proxies take CONNECT streams over mutual TLS for their workload.
pub const HBONE_PORT: u16 = 15008;

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
    /// Retries in flight by the number of requests; then `max_retries` means nothing.
    pub retry_budget: Option<RetryBudget>,
}

/// `Thresholds.RetryBudget`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryBudget {
    /// Share of active and waiting requests that may be retries, in 1/100 percent.
    pub share: u32,
    /// This many always may.
    pub min_concurrency: u32,
    /// Requests count for so long from their start, also if they have ended; zero counts those that are there.
    pub interval: Duration,
}

impl Default for CircuitBreakers {
    fn default() -> Self {
        Self {
            max_connections: u32::MAX,
            max_pending: u32::MAX,
            max_requests: u32::MAX,
            max_retries: u32::MAX,
            retry_budget: None,
        }
    }
}

/// `envoy.config.cluster.v3.OutlierDetection`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutlierDetection {
    /// Consecutive 5xx (and connect failures); 0 is off.
    pub consecutive_5xx: u32,
    /// Percent of the ejections for consecutive 5xx that take place.
    pub enforcing_5xx: u32,
    /// Consecutive 502, 503, 504 and connect failures; 0 is off.
    pub consecutive_gateway: u32,
    /// Percent of the ejections for consecutive gateway failures that take place.
    pub enforcing_gateway: u32,
    /// Ejects hosts that succeed less often than the others.
    pub success_rate: Option<SuccessRate>,
    /// Ejects hosts that fail more often than a limit.
    pub failure_percentage: Option<FailurePercentage>,
    /// `split_external_local_origin_errors`: connect failures, resets and timeouts are judged on their own, and count
    /// for none of the above.
    pub local_origin: Option<LocalOrigin>,
    /// Sweep for returning hosts, and period of the two rates.
    pub interval: Duration,
    /// Ejection time, multiplied by the number of ejections.
    pub base_ejection: Duration,
    /// Upper end of the ejection time.
    pub max_ejection: Duration,
    /// Share of hosts that may be ejected, percent; one always may.
    pub max_percent: u32,
    /// Statuses that are errors, in the place of 5xx; empty leaves it at those. Envoy has a matcher of answers for it, in
    /// the protocol options.
    pub error_codes: Vec<u16>,
}

impl Default for OutlierDetection {
    /// Nothing is detected; times as Envoy's.
    fn default() -> Self {
        Self {
            consecutive_5xx: 0,
            enforcing_5xx: 100,
            consecutive_gateway: 0,
            enforcing_gateway: 100,
            success_rate: None,
            failure_percentage: None,
            local_origin: None,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_secs(300),
            max_percent: 10,
            error_codes: vec![],
        }
    }
}

/// `OutlierDetection.success_rate_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuccessRate {
    /// Hosts with enough requests, below which nothing is done.
    pub minimum_hosts: u32,
    /// Requests in an interval for a host to be judged.
    pub request_volume: u32,
    /// A host is bad below the mean less this many standard deviations, in 1/1000.
    pub stdev_factor: u32,
    /// Percent of the ejections that take place.
    pub enforcing: u32,
}

/// `OutlierDetection.failure_percentage_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailurePercentage {
    /// A host is bad from this percentage of failures.
    pub threshold: u32,
    /// Hosts with enough requests, below which nothing is done.
    pub minimum_hosts: u32,
    /// Requests in an interval for a host to be judged.
    pub request_volume: u32,
    /// Percent of the ejections that take place.
    pub enforcing: u32,
}

/// `OutlierDetection.*_local_origin*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalOrigin {
    /// Consecutive failures; 0 is off.
    pub consecutive: u32,
    /// Percent of the ejections for consecutive failures that take place.
    pub enforcing: u32,
    /// Ejects hosts that are reached less often than the others. Envoy has one set of numbers for answers and for
    /// this, and an enforcement for each.
    pub success_rate: Option<SuccessRate>,
    /// Ejects hosts that are not reached more often than a limit; again with the numbers for answers.
    pub failure_percentage: Option<FailurePercentage>,
}
