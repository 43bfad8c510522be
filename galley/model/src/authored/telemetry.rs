//! `telemetry.istio.io` Telemetry.

use std::collections::BTreeMap;

use super::{Duration, LabelSelector, PolicyTargetReference};

message! {
    /// What workloads tell about their traffic.
    pub struct Telemetry {
        /// Workloads of its namespace; none is the namespace, in the root namespace the mesh.
        pub selector: Option<LabelSelector>,
        /// One resource, instead of a selector (old form).
        pub target_ref: Option<PolicyTargetReference>,
        /// Resources, instead of a selector.
        pub target_refs: Vec<PolicyTargetReference>,
        /// Traces.
        pub tracing: Vec<Tracing>,
        /// Metrics.
        pub metrics: Vec<TelemetryMetrics>,
        /// Access log.
        pub access_logging: Vec<AccessLogging>,
    }

    /// An extension provider by its name in the mesh's settings.
    pub struct ProviderRef {
        /// Name.
        pub name: String,
    }

    /// Side of the traffic.
    pub struct ModeSelector {
        /// Which.
        pub mode: WorkloadMode,
    }

    /// Traces.
    pub struct Tracing {
        /// Side of the traffic.
        #[serde(rename = "match")]
        pub matches: Option<ModeSelector>,
        /// Where they go.
        pub providers: Vec<ProviderRef>,
        /// Share of requests, 0.0 to 100.0.
        pub random_sampling_percentage: Option<f64>,
        /// Send none.
        pub disable_span_reporting: Option<bool>,
        /// Tags of spans.
        pub custom_tags: BTreeMap<String, CustomTag>,
        /// Whether the request's ID decides about sampling.
        pub use_request_id_for_trace_sampling: Option<bool>,
        /// Whether spans have Istio's tags.
        pub enable_istio_tags: Option<bool>,
        /// Whether trace headers are left alone.
        pub disable_context_propagation: Option<bool>,
    }

    /// A tag: one of the four.
    pub struct CustomTag {
        /// A fixed value.
        pub literal: Option<LiteralTag>,
        /// From the proxy's environment.
        pub environment: Option<NamedTag>,
        /// From a request header.
        pub header: Option<NamedTag>,
        /// From an access-log format.
        pub formatter: Option<LiteralTag>,
    }

    /// A tag's text.
    pub struct LiteralTag {
        /// Text.
        pub value: String,
    }

    /// A tag's source.
    pub struct NamedTag {
        /// Name of the variable or header.
        pub name: String,
        /// Value where it is absent.
        pub default_value: String,
    }

    /// Metrics.
    pub struct TelemetryMetrics {
        /// Where they go.
        pub providers: Vec<ProviderRef>,
        /// Changes, in order.
        pub overrides: Vec<MetricsOverrides>,
        /// Between reports, for TCP.
        pub reporting_interval: Option<Duration>,
    }

    /// A change of metrics.
    pub struct MetricsOverrides {
        /// Which metrics; none is all.
        #[serde(rename = "match")]
        pub matches: Option<MetricSelector>,
        /// Turned off.
        pub disabled: Option<bool>,
        /// Changes of labels.
        pub tag_overrides: BTreeMap<String, TagOverride>,
    }

    /// Which metrics: at most one of the first two.
    pub struct MetricSelector {
        /// A standard metric.
        pub metric: Option<IstioMetric>,
        /// Any other, by its name.
        pub custom_metric: Option<String>,
        /// Side of the traffic.
        pub mode: WorkloadMode,
    }

    /// A change of a label.
    pub struct TagOverride {
        /// What happens.
        pub operation: TagOperation,
        /// Expression of its value.
        pub value: String,
    }

    /// Access log.
    pub struct AccessLogging {
        /// Side of the traffic.
        #[serde(rename = "match")]
        pub matches: Option<ModeSelector>,
        /// Where it goes.
        pub providers: Vec<ProviderRef>,
        /// Turned off.
        pub disabled: Option<bool>,
        /// Which requests.
        pub filter: Option<AccessLogFilter>,
    }

    /// Which requests are logged.
    pub struct AccessLogFilter {
        /// CEL expression.
        pub expression: String,
    }
}

choice! {
    /// Side of the traffic.
    pub enum WorkloadMode {
        /// Both.
        #[default]
        ClientAndServer,
        /// Outbound.
        Client,
        /// Inbound.
        Server,
        /// Not set: both.
        Undefined,
    }

    /// Standard metrics.
    pub enum IstioMetric {
        /// All of them.
        #[default]
        AllMetrics,
        /// Requests.
        RequestCount,
        /// Duration of requests.
        RequestDuration,
        /// Size of requests.
        RequestSize,
        /// Size of responses.
        ResponseSize,
        /// TCP connections opened.
        TcpOpenedConnections,
        /// TCP connections closed.
        TcpClosedConnections,
        /// TCP bytes sent.
        TcpSentBytes,
        /// TCP bytes received.
        TcpReceivedBytes,
        /// gRPC messages to servers.
        GrpcRequestMessages,
        /// gRPC messages from servers.
        GrpcResponseMessages,
    }

    /// Change of a label.
    pub enum TagOperation {
        /// Set.
        #[default]
        Upsert,
        /// Removed.
        Remove,
    }
}
