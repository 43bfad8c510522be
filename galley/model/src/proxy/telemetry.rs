//! What a proxy tells about requests and connections, and to whom.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::GrpcService;

/// Traces of an HTTP connection manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracing {
    /// Share of requests without a sampling decision that are sampled, in 1/10,000.
    pub sampling: u32,
    /// Longest path in a span's URL, bytes; what is longer is cut.
    pub max_path: u32,
    /// Tags of spans besides those that each has.
    pub tags: BTreeMap<String, TagValue>,
    /// Each try has a span of its own (Envoys; ours have one for each request that they forward).
    pub upstream_spans: bool,
    /// Where spans go; `None` is where the process was told at its start.
    pub provider: Option<TraceProvider>,
}

impl Tracing {
    /// Envoy's limit of paths.
    pub const MAX_PATH: u32 = 256;
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            sampling: 0,
            max_path: Self::MAX_PATH,
            tags: BTreeMap::new(),
            upstream_spans: false,
            provider: None,
        }
    }
}

/// The value of a tag (`envoy.type.tracing.v3.CustomTag`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TagValue {
    /// This text.
    Literal(String),
    /// A variable of the proxy's environment; without it, and without a default, there is no tag.
    Environment {
        /// Its name.
        name: String,
        /// Value without it.
        default: String,
    },
    /// A header of the request; without it, and without a default, there is no tag.
    Header {
        /// Its name.
        name: String,
        /// Value without it.
        default: String,
    },
    /// What the proxy knows of itself (our own alone; Envoys are told a text).
    Node(NodeText),
}

/// What a proxy knows of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeText {
    /// Label `service.istio.io/canonical-name`.
    CanonicalService,
    /// Label `service.istio.io/canonical-revision`.
    CanonicalRevision,
    /// The mesh: its trust domain.
    Mesh,
    /// Namespace.
    Namespace,
    /// Cluster.
    Cluster,
}

impl NodeText {
    /// All of them with the tag that Istio has for each.
    pub const ISTIO: [(&'static str, Self); 5] = [
        ("istio.canonical_revision", Self::CanonicalRevision),
        ("istio.canonical_service", Self::CanonicalService),
        ("istio.cluster_id", Self::Cluster),
        ("istio.mesh_id", Self::Mesh),
        ("istio.namespace", Self::Namespace),
    ];
}

/// Who takes spans.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TraceProvider {
    /// OTLP.
    OpenTelemetry(OtlpTraces),
    /// Zipkin's API version 2, as JSON.
    Zipkin(ZipkinTraces),
    /// Datadog's agent (Envoys alone).
    Datadog {
        /// Upstream cluster.
        cluster: String,
        /// `Host` of the calls.
        host: String,
        /// Name of the service.
        service_name: String,
    },
    /// SkyWalking's collector (Envoys alone).
    SkyWalking(GrpcService),
}

/// `envoy.config.trace.v3.OpenTelemetryConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OtlpTraces {
    /// Where.
    pub to: Collector,
    /// `service.name` of the proxy; empty is what our own proxies make of their labels.
    pub service_name: String,
    /// What `OTEL_RESOURCE_ATTRIBUTES` of the proxy's environment says describes it, too.
    pub environment: bool,
}

/// How a collector is called.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Collector {
    /// Over gRPC.
    Grpc(GrpcService),
    /// By POST.
    Http(HttpCollector),
}

/// `envoy.config.core.v3.HttpService` of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HttpCollector {
    /// Upstream cluster.
    pub cluster: String,
    /// `:authority`.
    pub authority: String,
    /// Path.
    pub path: String,
    /// Limit of a call.
    pub timeout: Duration,
    /// Headers of every call.
    pub headers: Vec<(String, String)>,
}

/// `envoy.config.trace.v3.ZipkinConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ZipkinTraces {
    /// Where.
    pub to: HttpCollector,
    /// IDs of new traces have 128 bits instead of 64.
    pub long_ids: bool,
    /// Traces go on by W3C's headers, too.
    pub w3c: bool,
}

/// Where and how access is logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AccessLog {
    /// In a file.
    File(FileLog),
    /// By entries of `envoy.data.accesslog.v3` to `envoy.service.accesslog.v3.AccessLogService`.
    Grpc(Box<GrpcLog>),
    /// As records of OTLP.
    Otlp(Box<OtlpLog>),
}

/// An access log in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLog {
    /// File, `/dev/stdout` or `/dev/stderr`.
    pub path: String,
    /// Format.
    pub format: AccessLogFormat,
    /// A value that is not there is left out: of a line it is nothing instead of `-`, of an object it has no key.
    pub omit_empty: bool,
}

/// An access log as a stream of entries.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GrpcLog {
    /// Where.
    pub service: GrpcService,
    /// Name of the log.
    pub log_name: String,
    /// Entries are of requests, else of connections.
    pub requests: bool,
    /// Filter state in entries (Envoys; ours has none).
    pub filter_state: Vec<String>,
    /// Request headers in entries.
    pub request_headers: Vec<String>,
    /// Response headers in entries.
    pub response_headers: Vec<String>,
    /// Trailers in entries.
    pub response_trailers: Vec<String>,
}

/// An access log as records of OTLP.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OtlpLog {
    /// Where.
    pub service: GrpcService,
    /// Name of the log.
    pub log_name: String,
    /// Format of a record's body, as of a line.
    pub body: String,
    /// Formats of its attributes.
    pub attributes: BTreeMap<String, String>,
}

/// Format of an access log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessLogFormat {
    /// One line; Envoy's `%COMMAND(arg):len%` operators. Empty means [`AccessLogFormat::LINE`].
    Text(String),
    /// One JSON object per line, values with the same operators.
    Json(BTreeMap<String, String>),
}

impl AccessLogFormat {
    /// Istio's default line.
    pub const LINE: &'static str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
\"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% \
%DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";
}
