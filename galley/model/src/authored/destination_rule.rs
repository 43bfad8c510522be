//! `networking.istio.io` DestinationRule.

use std::collections::BTreeMap;

use super::{Duration, LabelSelector, PortSelector};

message! {
    /// Policy that applies after routing to a host.
    pub struct DestinationRule {
        /// Service it is for: FQDN, short name or with a wildcard first label.
        pub host: String,
        /// Policy of all its endpoints.
        pub traffic_policy: Option<TrafficPolicy>,
        /// Named parts of its endpoints.
        pub subsets: Vec<Subset>,
        /// Namespaces it is visible in; none means all.
        pub export_to: Vec<String>,
        /// Callers it applies to, in its own namespace.
        pub workload_selector: Option<LabelSelector>,
    }

    /// Endpoints that carry labels.
    pub struct Subset {
        /// DNS label.
        pub name: String,
        /// All must be carried.
        pub labels: BTreeMap<String, String>,
        /// Replaces blocks of the rule's policy.
        pub traffic_policy: Option<TrafficPolicy>,
    }

    /// Policy of connections to a destination.
    pub struct TrafficPolicy {
        /// Load balancing.
        pub load_balancer: Option<LoadBalancerSettings>,
        /// Limits.
        pub connection_pool: Option<ConnectionPoolSettings>,
        /// Passive health.
        pub outlier_detection: Option<OutlierDetection>,
        /// TLS to the destination.
        pub tls: Option<ClientTlsSettings>,
        /// Per port, replacing all four blocks above.
        pub port_level_settings: Vec<PortTrafficPolicy>,
        /// Tunnel to a proxy in front of the destination.
        pub tunnel: Option<TunnelSettings>,
        /// PROXY protocol header to the destination.
        pub proxy_protocol: Option<ProxyProtocol>,
        /// Limit of concurrent retries relative to requests.
        pub retry_budget: Option<RetryBudget>,
    }

    /// Policy of one port.
    pub struct PortTrafficPolicy {
        /// Which.
        pub port: Option<PortSelector>,
        /// Load balancing.
        pub load_balancer: Option<LoadBalancerSettings>,
        /// Limits.
        pub connection_pool: Option<ConnectionPoolSettings>,
        /// Passive health.
        pub outlier_detection: Option<OutlierDetection>,
        /// TLS to the destination.
        pub tls: Option<ClientTlsSettings>,
    }

    /// Load balancing: one of the first three.
    pub struct LoadBalancerSettings {
        /// Without affinity.
        pub simple: Option<SimpleLb>,
        /// With affinity.
        pub consistent_hash: Option<ConsistentHashLb>,
        /// By what endpoints say of their load.
        pub backend_utilization: Option<BackendUtilizationLb>,
        /// Preference of near endpoints.
        pub locality_lb_setting: Option<LocalityLbSetting>,
        /// Preference of the own zone.
        pub zone_aware_lb_setting: Option<ZoneAwareLbSetting>,
        /// Slow start of new endpoints (old form).
        pub warmup_duration_secs: Option<Duration>,
        /// Slow start of new endpoints.
        pub warmup: Option<Warmup>,
    }

    /// Weights by what endpoints say of their load (ORCA).
    pub struct BackendUtilizationLb {
        /// How much failed requests count, in percent of the load.
        pub error_utilization_penalty_percent: u32,
        /// Metrics that say the load.
        pub metric_names_for_computing_utilization: Vec<String>,
        /// Silence after which a weight is forgotten.
        pub weight_expiration_period: Option<Duration>,
        /// Time after which a weight counts.
        pub weight_stabilization_period: Option<Duration>,
        /// Between updates.
        pub weight_update_period: Option<Duration>,
    }

    /// Consistent hashing: one of the first four.
    pub struct ConsistentHashLb {
        /// Hash of a request header.
        pub http_header_name: Option<String>,
        /// Hash of a cookie.
        pub http_cookie: Option<HttpCookie>,
        /// Hash of the source address.
        pub use_source_ip: Option<bool>,
        /// Hash of a query parameter.
        pub http_query_parameter_name: Option<String>,
        /// Ketama ring.
        pub ring_hash: Option<RingHash>,
        /// Maglev table.
        pub maglev: Option<Maglev>,
        /// Size of the ring (old form).
        pub minimum_ring_size: Option<u64>,
    }

    /// A cookie to hash.
    pub struct HttpCookie {
        /// Name.
        pub name: String,
        /// Path attribute of a generated cookie.
        pub path: String,
        /// Lifetime of a generated cookie: absent generates none, zero makes a session cookie.
        pub ttl: Option<Duration>,
        /// Further attributes of a generated cookie.
        pub attributes: Vec<HttpCookieAttribute>,
    }

    /// An attribute of a generated cookie.
    pub struct HttpCookieAttribute {
        /// Name, such as `SameSite`.
        pub name: String,
        /// Value.
        pub value: String,
    }

    /// Ketama ring.
    pub struct RingHash {
        /// 1024 unless set.
        pub minimum_ring_size: Option<u64>,
    }

    /// Maglev table.
    pub struct Maglev {
        /// Prime below 5000011; 65537 unless set.
        pub table_size: Option<u64>,
    }

    /// Slow start.
    pub struct Warmup {
        /// How long a new endpoint takes to its full share.
        pub duration: Option<Duration>,
        /// Share at the start; 10 unless set.
        pub minimum_percent: Option<f64>,
        /// Shape of the curve; 1 is linear.
        pub aggression: Option<f64>,
    }

    /// Preference of near endpoints.
    pub struct LocalityLbSetting {
        /// Fixed shares by origin.
        pub distribute: Vec<LocalityDistribute>,
        /// Where a region's traffic goes when it fails.
        pub failover: Vec<LocalityFailover>,
        /// Labels in order of preference.
        pub failover_priority: Vec<String>,
        /// On unless set.
        pub enabled: Option<bool>,
    }

    /// Preference of the own zone.
    pub struct ZoneAwareLbSetting {
        /// On unless set.
        pub enabled: Option<bool>,
        /// Where a region's traffic goes when it fails.
        pub failover: Vec<LocalityFailover>,
        /// Labels in order of preference.
        pub failover_priority: Vec<String>,
        /// Endpoints below which zones are not told apart.
        pub min_cluster_size: Option<u32>,
    }

    /// Shares of traffic that comes from a locality.
    pub struct LocalityDistribute {
        /// Origin, `region/zone/*`.
        pub from: String,
        /// Percent by destination; 100 in all.
        pub to: BTreeMap<String, u32>,
    }

    /// Failover between regions.
    pub struct LocalityFailover {
        /// Region that fails.
        pub from: String,
        /// Region that takes over.
        pub to: String,
    }

    /// Limits of a destination.
    pub struct ConnectionPoolSettings {
        /// Connections.
        pub tcp: Option<TcpSettings>,
        /// Requests.
        pub http: Option<HttpSettings>,
    }

    /// Limits of connections.
    pub struct TcpSettings {
        /// Connections.
        pub max_connections: i32,
        /// Connect timeout; 10 s unless set.
        pub connect_timeout: Option<Duration>,
        /// Keep-alive probes.
        pub tcp_keepalive: Option<TcpKeepalive>,
        /// Age after which a connection is drained.
        pub max_connection_duration: Option<Duration>,
        /// Idle TCP connection.
        pub idle_timeout: Option<Duration>,
    }

    /// Keep-alive probes.
    pub struct TcpKeepalive {
        /// Unanswered probes before the connection is dead.
        pub probes: u32,
        /// Idle time before the first.
        pub time: Option<Duration>,
        /// Time between probes.
        pub interval: Option<Duration>,
    }

    /// Limits of requests.
    pub struct HttpSettings {
        /// Requests waiting for a connection.
        pub http1_max_pending_requests: i32,
        /// Requests in flight.
        pub http2_max_requests: i32,
        /// 0 is no limit; 1 turns keep-alive off.
        pub max_requests_per_connection: i32,
        /// Retries in flight.
        pub max_retries: i32,
        /// Idle HTTP connection.
        pub idle_timeout: Option<Duration>,
        /// Whether HTTP/1.1 is upgraded to HTTP/2.
        pub h2_upgrade_policy: H2UpgradePolicy,
        /// Speak the caller's protocol.
        pub use_client_protocol: bool,
        /// Streams per connection.
        pub max_concurrent_streams: i32,
        /// PING frames on idle connections.
        #[serde(rename = "http2KeepAlive", alias = "http2Keepalive")]
        pub http2_keepalive: Option<Http2Keepalive>,
    }

    /// PING frames.
    pub struct Http2Keepalive {
        /// Between pings.
        pub interval: Option<Duration>,
        /// Until the connection is dead.
        pub timeout: Option<Duration>,
    }

    /// Ejection of failing endpoints.
    pub struct OutlierDetection {
        /// 1.0 form: consecutive gateway errors.
        pub consecutive_errors: i32,
        /// Keep connect failures apart from answers.
        pub split_external_local_origin_errors: bool,
        /// Consecutive connect failures.
        pub consecutive_local_origin_failures: Option<u32>,
        /// Consecutive 502, 503, 504; 0 is off.
        pub consecutive_gateway_errors: Option<u32>,
        /// Consecutive 5xx; 5 unless set, 0 is off.
        #[serde(rename = "consecutive5xxErrors")]
        pub consecutive_5xx_errors: Option<u32>,
        /// Between sweeps; 10 s unless set.
        pub interval: Option<Duration>,
        /// Ejection, multiplied by the number of ejections; 30 s unless set.
        pub base_ejection_time: Option<Duration>,
        /// Share of hosts that may be ejected; 10 unless set.
        pub max_ejection_percent: i32,
        /// Share of healthy hosts below which nothing is ejected.
        pub min_health_percent: i32,
        /// Status codes that count as errors.
        pub outlier_detection_http_error_codes: Vec<u32>,
    }

    /// TLS towards a destination.
    pub struct ClientTlsSettings {
        /// How.
        pub mode: ClientTlsMode,
        /// Path of the certificate chain.
        pub client_certificate: String,
        /// Path of the key.
        pub private_key: String,
        /// Path of the trusted roots.
        pub ca_certificates: String,
        /// Secret with certificate and key.
        pub credential_name: String,
        /// Names that the server's certificate may carry.
        pub subject_alt_names: Vec<String>,
        /// SNI to send.
        pub sni: String,
        /// Do not verify the server.
        pub insecure_skip_verify: Option<bool>,
        /// Path of a revocation list.
        pub ca_crl: String,
    }

    /// Tunnel through a proxy.
    pub struct TunnelSettings {
        /// `CONNECT` or `POST`.
        pub protocol: String,
        /// Host behind the proxy.
        pub target_host: String,
        /// Port behind the proxy.
        pub target_port: u32,
    }

    /// PROXY protocol header.
    pub struct ProxyProtocol {
        /// `V1` or `V2`.
        pub version: ProxyProtocolVersion,
    }

    /// Limit of concurrent retries.
    pub struct RetryBudget {
        /// Percent of active requests; 20 unless set.
        pub percent: Option<f64>,
        /// Always allowed; 3 unless set.
        pub min_retry_concurrency: Option<u32>,
        /// Window.
        pub budget_interval: Option<Duration>,
    }
}

choice! {
    /// Load balancing without affinity.
    pub enum SimpleLb {
        /// Least request.
        #[default]
        Unspecified,
        /// Old name of `LEAST_REQUEST`.
        LeastConn,
        /// Random.
        Random,
        /// The caller's original destination.
        Passthrough,
        /// Round robin.
        RoundRobin,
        /// The less loaded of two.
        LeastRequest,
        /// The cheaper of two by response time and load. Not Istio's: other proxies than ours get `LEAST_REQUEST`.
        PeakEwma,
    }

    /// Upgrade of HTTP/1.1 to HTTP/2.
    pub enum H2UpgradePolicy {
        /// The mesh's.
        #[default]
        Default,
        /// Never.
        DoNotUpgrade,
        /// Always.
        Upgrade,
    }

    /// TLS towards a destination.
    pub enum ClientTlsMode {
        /// None.
        #[default]
        Disable,
        /// Server authentication.
        Simple,
        /// Both, with given certificates.
        Mutual,
        /// Both, with mesh identities.
        IstioMutual,
    }

    /// Version of the PROXY protocol.
    pub enum ProxyProtocolVersion {
        /// Text.
        #[default]
        V1,
        /// Binary.
        V2,
    }
}
