//! `istio.mesh.v1alpha1.ProxyConfig`: settings of proxies, mesh-wide.
//!
//! Most of them are of the process, which is started before it knows any configuration: our own proxies have flags for these.

use std::collections::BTreeMap;

use super::{Duration, ProxyImage, ReadinessProbe};

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
        pub envoy_access_log_service: Option<serde_json::Value>,
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
        pub proxy_headers: Option<serde_json::Value>,
    }

    /// `Tracing`.
    pub struct TracingSettings {
        /// Share of requests traced, in percent; 1 unless set.
        pub sampling: Option<f64>,
        /// Tags of spans.
        pub custom_tags: BTreeMap<String, serde_json::Value>,
        /// Longest path in a span.
        pub max_path_tag_length: u32,
        /// Spans to Zipkin.
        pub zipkin: Option<serde_json::Value>,
        /// Spans to Lightstep.
        pub lightstep: Option<serde_json::Value>,
        /// Spans to Datadog.
        pub datadog: Option<serde_json::Value>,
        /// Spans to Stackdriver.
        pub stackdriver: Option<serde_json::Value>,
        /// Spans to an OpenCensus agent.
        pub open_census_agent: Option<serde_json::Value>,
        /// TLS to whoever takes the spans.
        pub tls_settings: Option<serde_json::Value>,
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
