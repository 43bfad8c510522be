//! `istio.mesh.v1alpha1.ProxyConfig`: settings of proxies, mesh-wide.
//!
//! Many are of the process, which is started before it knows any configuration. Our own proxies are told some of these, which
//! stand behind their flags, and have flags alone for others.

use std::collections::BTreeMap;

use super::{CustomTag, Duration, ProxyImage, ReadinessProbe};

message! {
    /// `istio.mesh.v1alpha1.ProxyConfig`.
    pub struct ProxyDefaults {
        /// Environment of proxies.
        pub proxy_metadata: BTreeMap<String, String>,
        /// Spans.
        pub tracing: Option<TracingSettings>,
        /// What is in front of gateways.
        pub gateway_topology: Option<GatewayTopology>,
        /// Worker threads; 0 is one per core.
        pub concurrency: Option<i32>,
        /// Address of the control plane.
        pub discovery_address: String,
        /// How the control plane is spoken to.
        pub control_plane_auth_policy: String,
        /// Time for connections at the end of a process that another one replaces.
        pub drain_duration: Option<Duration>,
        /// Life of a process that another one has replaced.
        pub parent_shutdown_duration: Option<Duration>,
        /// Time for connections at the end.
        pub termination_drain_duration: Option<Duration>,
        /// Port of the admin interface.
        pub proxy_admin_port: Option<i32>,
        /// Port of readiness.
        pub status_port: Option<i32>,
        /// `REDIRECT`, `TPROXY` or `NONE`.
        pub interception_mode: String,
        /// Name of the proxy's service.
        pub service_cluster: String,
        /// How that name is made.
        pub tracing_service_name: String,
        /// Directory of generated files.
        pub config_path: String,
        /// The proxy's program.
        pub binary_path: String,
        /// A bootstrap.
        pub custom_config_file: String,
        /// Template of bootstraps.
        pub proxy_bootstrap_template_path: String,
        /// Envoy's runtime.
        pub runtime_values: BTreeMap<String, String>,
        /// Longest name of a statistic.
        pub stat_name_length: Option<i32>,
        /// Which of Envoy's statistics there are.
        pub proxy_stats_matcher: Option<serde_json::Value>,
        /// Tags of Istio's metrics.
        pub extra_stat_tags: Vec<String>,
        /// Metrics to statsd.
        pub statsd_udp_address: String,
        /// Access logs over gRPC.
        pub envoy_access_log_service: Option<RemoteService>,
        /// Metrics over gRPC.
        pub envoy_metrics_service: Option<serde_json::Value>,
        /// The same, an older name.
        pub envoy_metrics_service_address: String,
        /// Address of Zipkin, an older name.
        pub zipkin_address: String,
        /// Of 1.0: between two polls.
        pub discovery_refresh_delay: Option<Duration>,
        /// Of 1.0: the connect timeout of the proxy's own connections.
        pub connect_timeout: Option<Duration>,
        /// Of 1.0: where the proxy runs.
        pub availability_zone: String,
        /// Of 1.0: the node's agent.
        pub sds: Option<serde_json::Value>,
        /// Name of the mesh in telemetry.
        pub mesh_id: String,
        /// Health of a machine's workload.
        pub readiness_probe: Option<ReadinessProbe>,
        /// Start of applications after their proxies.
        pub hold_application_until_proxy_starts: Option<bool>,
        /// Further roots.
        pub ca_certificates_pem: Vec<String>,
        /// Image of the proxy.
        pub image: Option<ProxyImage>,
        /// Where private keys are used.
        pub private_key_provider: Option<serde_json::Value>,
        /// Headers that proxies add.
        pub proxy_headers: Option<ProxyHeaders>,
        /// Limits of connections and requests.
        pub connection_settings: Option<ConnectionSettings>,
        /// Time after which Envoy writes its logs.
        pub file_flush_interval: Option<Duration>,
        /// Size after which it does.
        #[serde(rename = "fileFlushMinSizeKb")]
        pub file_flush_min_size_kb: Option<u32>,
        /// Statistics may be compressed.
        pub stats_compression: Option<bool>,
    }

    /// `ProxyConfig.ProxyHeaders`.
    pub struct ProxyHeaders {
        /// What becomes of `x-forwarded-client-cert` inbound.
        pub forwarded_client_cert: ClientCertDetails,
        /// What that header tells of a client's certificate.
        pub set_current_client_cert_details: Option<CurrentClientCert>,
        /// `x-request-id`.
        pub request_id: Option<HeaderOff>,
        /// `server` of answers.
        pub server: Option<ServerHeader>,
        /// `x-envoy-attempt-count`.
        pub attempt_count: Option<HeaderOff>,
        /// The other headers of Envoy's router.
        pub envoy_debug_headers: Option<HeaderOff>,
        /// What proxies of Istio tell each other of themselves.
        pub metadata_exchange_headers: Option<MetadataExchange>,
        /// Names of HTTP/1 keep their case.
        pub preserve_http1_header_case: Option<bool>,
        /// `x-forwarded-host` where the host is rewritten.
        pub x_forwarded_host: Option<HeaderOn>,
        /// `x-forwarded-port`.
        pub x_forwarded_port: Option<HeaderOn>,
    }

    /// `ProxyHeaders.SetCurrentClientCertDetails`.
    pub struct CurrentClientCert {
        /// Its subject; on unless set.
        pub subject: Option<bool>,
        /// Itself.
        pub cert: Option<bool>,
        /// Itself and what came with it.
        pub chain: Option<bool>,
        /// Its names of type DNS; on unless set.
        pub dns: Option<bool>,
        /// Its names of type URI; on unless set.
        pub uri: Option<bool>,
    }

    /// A header that is on unless it is disabled.
    pub struct HeaderOff {
        /// It is not added.
        pub disabled: Option<bool>,
    }

    /// A header that is off unless it is enabled.
    pub struct HeaderOn {
        /// It is added.
        pub enabled: Option<bool>,
    }

    /// `ProxyHeaders.Server`.
    pub struct ServerHeader {
        /// Answers keep the server's own.
        pub disabled: Option<bool>,
        /// Its value; `istio-envoy` unless set.
        pub value: String,
    }

    /// `ProxyHeaders.MetadataExchangeHeaders`.
    pub struct MetadataExchange {
        /// Who is told.
        pub mode: MetadataExchangeMode,
    }

    /// `ProxyConfig.ConnectionSettings`.
    pub struct ConnectionSettings {
        /// What is meant where a field is not set.
        pub profile: ConnectionProfile,
        /// Bytes that a listener buffers for a connection.
        pub listener_per_connection_buffer_limit_bytes: Option<i32>,
        /// Bytes that a cluster buffers for a connection.
        pub cluster_per_connection_buffer_limit_bytes: Option<i32>,
        /// Time without a request after which a connection ends.
        pub http_idle_timeout: Option<Duration>,
        /// Age at which a connection is drained.
        pub http_max_connection_duration: Option<Duration>,
        /// Between the first and the last GOAWAY.
        pub http_drain_timeout: Option<Duration>,
        /// Time in which all of a request must arrive.
        pub http_request_timeout: Option<Duration>,
        /// Time in which the head of a request must arrive.
        pub http_request_headers_timeout: Option<Duration>,
        /// Time without activity on a stream.
        pub http_stream_idle_timeout: Option<Duration>,
        /// Longest stream.
        pub http_max_stream_duration: Option<Duration>,
        /// Streams of HTTP/2 at a time.
        pub http_max_concurrent_streams: Option<i32>,
        /// Window of a stream of HTTP/2.
        pub http2_initial_stream_window_size: Option<i32>,
        /// Window of a connection of HTTP/2.
        pub http2_initial_connection_window_size: Option<i32>,
        /// What becomes of headers with `_` in their names.
        pub http_headers_with_underscores_action: UnderscoresAction,
        /// `//` becomes `/`.
        pub http_merge_slashes: Option<bool>,
        /// What becomes of escaped slashes.
        pub http_path_with_escaped_slashes_action: EscapedSlashesAction,
        /// Connections of a listener.
        pub listener_connection_limit: Option<i32>,
        /// Connections of all listeners.
        pub global_downstream_connection_limit: Option<i32>,
    }

    /// `Tracing`.
    pub struct TracingSettings {
        /// Share of requests traced, in percent; 1 unless set.
        pub sampling: Option<f64>,
        /// Tags of spans.
        pub custom_tags: BTreeMap<String, CustomTag>,
        /// Longest path in a span.
        pub max_path_tag_length: u32,
        /// Whether spans have Istio's tags; they do unless set.
        pub enable_istio_tags: Option<bool>,
        /// Spans to Zipkin.
        pub zipkin: Option<TracerAddress>,
        /// Spans to Lightstep.
        pub lightstep: Option<serde_json::Value>,
        /// Spans to Datadog.
        pub datadog: Option<TracerAddress>,
        /// Spans to Stackdriver.
        pub stackdriver: Option<serde_json::Value>,
        /// Spans to an OpenCensus agent.
        pub open_census_agent: Option<serde_json::Value>,
        /// TLS to whoever takes the spans.
        pub tls_settings: Option<serde_json::Value>,
    }

    /// `RemoteService`.
    pub struct RemoteService {
        /// `host:port`.
        pub address: String,
        /// TLS to it.
        pub tls_settings: Option<serde_json::Value>,
        /// Probes of connections to it.
        pub tcp_keepalive: Option<serde_json::Value>,
    }

    /// `Tracing.Zipkin` and `Tracing.Datadog`.
    pub struct TracerAddress {
        /// `host:port`.
        pub address: String,
    }

    /// `Topology`: what is in front of gateways.
    pub struct GatewayTopology {
        /// Trusted proxies: the address so many from the right in `x-forwarded-for` is the client's.
        pub num_trusted_proxies: u32,
        /// What becomes of `x-forwarded-client-cert`.
        pub forward_client_cert_details: ClientCertDetails,
        /// Connections begin with a PROXY header.
        pub proxy_protocol: Option<serde_json::Value>,
    }
}

choice! {
    /// `Topology.ForwardClientCertDetails`.
    pub enum ClientCertDetails {
        /// The proxy's choice: `SANITIZE_SET`.
        #[default]
        Undefined,
        /// Take it away.
        Sanitize,
        /// Let it through where the client has shown a certificate, and take it away elsewhere.
        ForwardOnly,
        /// Add the client's certificate to it.
        AppendForward,
        /// Replace it by the client's certificate.
        SanitizeSet,
        /// Let it through.
        AlwaysForwardOnly,
    }
}

choice! {
    /// `MetadataExchangeMode`.
    pub enum MetadataExchangeMode {
        /// Everybody.
        #[default]
        Undefined,
        /// Whoever is in the mesh.
        InMesh,
    }
}

choice! {
    /// `ConnectionSettings.Profile`.
    pub enum ConnectionProfile {
        /// As if nothing was said.
        #[default]
        Sidecar,
        /// What Envoy recommends for edges, at gateways.
        Edge,
    }
}

choice! {
    /// `ConnectionSettings.HeadersWithUnderscoresAction`.
    pub enum UnderscoresAction {
        /// The profile's.
        #[default]
        HeadersWithUnderscoresUnspecified,
        /// They pass.
        HeadersWithUnderscoresAllow,
        /// The request is refused.
        HeadersWithUnderscoresRejectRequest,
        /// They are left out.
        HeadersWithUnderscoresDropHeader,
    }
}

choice! {
    /// `ConnectionSettings.PathWithEscapedSlashesAction`.
    pub enum EscapedSlashesAction {
        /// The profile's.
        #[default]
        PathWithEscapedSlashesUnspecified,
        /// They pass.
        KeepUnchanged,
        /// The request is refused.
        RejectRequest,
        /// The client is sent to the path without them.
        UnescapeAndRedirect,
        /// They are unescaped.
        UnescapeAndForward,
    }
}
