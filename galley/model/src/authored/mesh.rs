//! `flotilla.dev/v1alpha1` MeshConfig: settings of one cluster's part of the mesh.
//!
//! One document, named `mesh`. What Istio's mesh configuration also has keeps its name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    ConnectionPoolSettings, Duration, H2UpgradePolicy, HttpRetry, LocalityLbSetting, OutboundTrafficPolicy,
    OutlierDetection, ProxyDefaults, TcpKeepalive, TlsProtocol, ZoneAwareLbSetting,
    gateway_api::KubernetesSelector,
};
use crate::federation::{OnLapse, Transport};

message! {
    /// Settings of the mesh.
    pub struct MeshConfig {
        /// Trust domain; `mesh.local` unless set.
        pub trust_domain: Option<String>,
        /// Namespace whose policies apply to the whole mesh; `istio-system` unless set.
        pub root_namespace: Option<String>,
        /// Destinations that nobody declared; `ALLOW_ANY` unless set.
        pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
        /// Path of the proxies' access log; empty is off.
        pub access_log_file: Option<String>,
        /// Line format of the access log; the standard one unless set.
        pub access_log_format: Option<String>,
        /// `TEXT` or `JSON`.
        pub access_log_encoding: AccessLogEncoding,
        /// How gateways of this cluster reach those of others; `tcp` unless set.
        pub transport: Option<Transport>,
        /// TCP connect of upstream connections; 10 s unless set.
        pub connect_timeout: Option<Duration>,
        /// Keep-alive probes of upstream connections, where no rule says otherwise.
        pub tcp_keepalive: Option<TcpKeepalive>,
        /// How long a connection's first bytes are waited for, to tell its protocol by them; 500 ms unless set, 0 is no limit.
        pub protocol_detection_timeout: Option<Duration>,
        /// Port that outbound connections are captured to; 15001 unless set.
        pub proxy_listen_port: Option<u32>,
        /// Port that inbound connections are captured to; 15006 unless set.
        pub proxy_inbound_listen_port: Option<u32>,
        /// Port of the workload's own address at which the proxy is an HTTP proxy to it; 0 is none.
        pub proxy_http_port: u32,
        /// Where inbound connections go.
        pub inbound_traffic_policy: Option<InboundTrafficPolicy>,
        /// Mesh mTLS to workloads that have a proxy, where no rule says otherwise; on unless set.
        #[serde(rename = "enableAutoMtls")]
        pub enable_auto_mtls: Option<bool>,
        /// Other names of the trust domain, which identities may have as well.
        pub trust_domain_aliases: Vec<String>,
        /// `exportTo` of services and ServiceEntries that have none.
        pub default_service_export_to: Vec<String>,
        /// `exportTo` of VirtualServices that have none.
        pub default_virtual_service_export_to: Vec<String>,
        /// `exportTo` of DestinationRules that have none.
        pub default_destination_rule_export_to: Vec<String>,
        /// Time between two resolutions of hosts with `resolution: DNS`; 60 s unless set.
        pub dns_refresh_rate: Option<Duration>,
        /// Whether HTTP/1.1 becomes HTTP/2 between proxies, where no rule says otherwise.
        pub h2_upgrade_policy: H2UpgradePolicy,
        /// Retries of routes that have none of their own.
        pub default_http_retry_policy: Option<HttpRetry>,
        /// TLS with those outside of the mesh.
        pub tls_defaults: Option<TlsSettings>,
        /// TLS inside of the mesh.
        #[serde(rename = "meshMTLS")]
        pub mesh_mtls: Option<TlsSettings>,
        /// Settings of some services.
        pub service_settings: Vec<ServiceSettings>,
        /// Namespaces that are looked at, by their labels; none is all.
        pub discovery_selectors: Vec<KubernetesSelector>,
        /// Providers of those who name none.
        pub default_providers: Option<DefaultProviders>,
        /// Pattern of the name of an inbound cluster's statistics.
        pub inbound_cluster_stat_name: String,
        /// The same, outbound.
        pub outbound_cluster_stat_name: String,
        /// Spans and their sampling; on unless set.
        pub enable_tracing: Option<bool>,
        /// No access log of connections that no chain took.
        pub disable_envoy_listener_log: bool,
        /// Access logs by gRPC.
        pub enable_envoy_access_log_service: bool,
        /// Metrics of the application beside those of its proxy.
        pub enable_prometheus_merge: Option<bool>,
        /// Whether servers of `SIMPLE` and `MUTUAL` TLS are verified without `caCertificates`; on unless set.
        pub verify_certificate_at_client: Option<bool>,
        /// Class of Kubernetes Ingresses.
        pub ingress_class: String,
        /// Service of the Ingress controller.
        pub ingress_service: String,
        /// Which Ingresses are read.
        pub ingress_controller_mode: String,
        /// Label of the Ingress controller.
        pub ingress_selector: String,
        /// Where configuration comes from.
        pub config_sources: Vec<serde_json::Value>,
        /// DNS certificates.
        pub certificates: Vec<serde_json::Value>,
        /// A CA elsewhere.
        pub ca: Option<serde_json::Value>,
        /// Of 1.0: `NONE` or `MUTUAL_TLS`.
        pub auth_policy: String,
        /// Of 1.0: between two polls for routes.
        pub rds_refresh_delay: Option<Duration>,
        /// Of 1.0: between two polls for secrets.
        pub sds_refresh_delay: Option<Duration>,
        /// Of 1.0: socket of the node's agent.
        pub sds_uds_path: String,
        /// Preference of near endpoints, where a DestinationRule with outlier detection says nothing of its own; on
        /// unless set.
        pub locality_lb_setting: Option<LocalityLbSetting>,
        /// `host:port` of Mixer's Check; empty is off.
        pub mixer_check_server: String,
        /// `host:port` of Mixer's Report; empty is off.
        pub mixer_report_server: String,
        /// Let requests pass when Mixer does not answer.
        pub policy_check_fail_open: bool,
        /// Ask Mixer about no request.
        pub disable_policy_checks: bool,
        /// Ask it where requests leave, too.
        pub enable_client_side_policy_check: bool,
        /// Share of requests traced, in percent; 1 unless set.
        pub trace_sampling: Option<f64>,
        /// HTTPS servers of gateways also take HTTP/3 on the same port of UDP, and say so (`alt-svc`). Istio has a
        /// variable of its control plane for it, `PILOT_ENABLE_QUIC_LISTENERS`.
        pub enable_quic_listeners: bool,
        /// How paths are normalised before routes and policies look at them.
        pub path_normalization: Option<ProxyPathNormalization>,
        /// Who may be asked about requests (`AuthorizationPolicy` with action `CUSTOM`), by name.
        pub extension_providers: Vec<ProviderDefinition>,
        /// Roots of other trust domains.
        pub ca_certificates: Vec<CertificateData>,
        /// Settings of proxies for which no `ProxyConfig` says otherwise.
        pub default_config: Option<ProxyDefaults>,
        /// Blocks of a DestinationRule, where a service's rule has none of its own.
        pub default_traffic_policy: Option<DefaultTrafficPolicy>,
        /// Bounds of the `exportTo` of ServiceEntries.
        pub service_entry_visibility: Option<ServiceEntryVisibility>,
        /// Preference of the own zone, where a DestinationRule says nothing of localities or zones.
        pub zone_aware_lb_setting: Option<ZoneAwareLbSetting>,
        /// How long an unused connection to a ztunnel is kept.
        pub hbone_idle_timeout: Option<Duration>,
        /// Which services ambient clusters offer to others.
        pub service_scope_configs: Vec<ServiceScopeConfig>,
    }

    /// `ServiceEntryVisibility`: the first policy whose rules all match says who sees the ServiceEntries of a namespace.
    pub struct ServiceEntryVisibility {
        /// Without a policy that matches.
        pub default_visibility: Visibility,
        /// Whether it holds for sidecars and gateways, not only for ambient proxies.
        pub apply_to_sidecars: bool,
        /// In order.
        pub policies: Vec<VisibilityPolicy>,
    }

    /// `ServiceEntryVisibility.Policy`.
    pub struct VisibilityPolicy {
        /// What holds where all rules match.
        pub visibility: Visibility,
        /// Which entries; none is all.
        pub matching_rules: Vec<VisibilityRule>,
    }

    /// `ServiceEntryVisibility.MatchRule`.
    pub struct VisibilityRule {
        /// Labels of the entry's namespace; without it nothing matches.
        pub namespace_selector: Option<KubernetesSelector>,
    }

    /// `MeshConfig.ServiceScopeConfigs`.
    pub struct ServiceScopeConfig {
        /// Namespaces.
        pub namespace_selector: Option<KubernetesSelector>,
        /// Services in them.
        pub services_selector: Option<KubernetesSelector>,
        /// Where they may be called from.
        pub scope: ServiceScope,
    }

    /// `MeshConfig.DefaultTrafficPolicy`.
    pub struct DefaultTrafficPolicy {
        /// Limits.
        pub connection_pool: Option<ConnectionPoolSettings>,
        /// Passive health.
        pub outlier_detection: Option<OutlierDetection>,
    }

    /// `MeshConfig.InboundTrafficPolicy`.
    pub struct InboundTrafficPolicy {
        /// Which.
        pub mode: InboundTrafficMode,
    }

    /// `MeshConfig.TLSConfig`.
    pub struct TlsSettings {
        /// Lowest version.
        pub min_protocol_version: TlsProtocol,
        /// Groups of the key exchange; the proxy's choice unless set.
        pub ecdh_curves: Vec<String>,
        /// Suites of TLS 1.2; the proxy's choice unless set.
        pub cipher_suites: Vec<String>,
    }

    /// `MeshConfig.ServiceSettings`.
    pub struct ServiceSettings {
        /// What holds for them.
        pub settings: Option<ServiceSetting>,
        /// Hosts, which may be wildcards.
        pub hosts: Vec<String>,
    }

    /// `MeshConfig.ServiceSettings.Settings`.
    pub struct ServiceSetting {
        /// Callers get endpoints of their own cluster alone.
        pub cluster_local: bool,
    }

    /// `MeshConfig.DefaultProviders`: names of providers.
    pub struct DefaultProviders {
        /// Where spans go.
        pub tracing: Vec<String>,
        /// Where metrics go.
        pub metrics: Vec<String>,
        /// Where access logs go.
        pub access_logging: Vec<String>,
    }

    /// `MeshConfig.CertificateData`: roots of the trust domains that it names, as they are or from where they are served.
    pub struct CertificateData {
        /// The roots, PEM.
        pub pem: String,
        /// SPIFFE bundle endpoint of profile `https_web`.
        pub spiffe_bundle_url: String,
        /// Signers of Kubernetes that these roots are of.
        pub cert_signers: Vec<String>,
        /// Whose roots these are.
        pub trust_domains: Vec<String>,
    }

    /// `MeshConfig.ProxyPathNormalization`.
    pub struct ProxyPathNormalization {
        /// Which.
        pub normalization: PathNormalization,
    }

    /// Istio's `MeshConfig.ExtensionProvider`: exactly one kind of provider under a name.
    pub struct ProviderDefinition {
        /// Name in policies.
        pub name: String,
        /// An authoriser that speaks plain HTTP.
        pub envoy_ext_authz_http: Option<HttpAuthzProvider>,
        /// An authoriser that speaks `envoy.service.auth.v3.Authorization`.
        pub envoy_ext_authz_grpc: Option<GrpcAuthzProvider>,
        /// An access log in a file.
        pub envoy_file_access_log: Option<FileLogProvider>,
        /// Metrics for Prometheus, which every proxy has.
        pub prometheus: Option<serde_json::Value>,
        /// Spans to Zipkin.
        pub zipkin: Option<ZipkinProvider>,
        /// Spans to Lightstep.
        pub lightstep: Option<serde_json::Value>,
        /// Spans to Datadog.
        pub datadog: Option<DatadogProvider>,
        /// Telemetry to Stackdriver.
        pub stackdriver: Option<serde_json::Value>,
        /// Spans to an OpenCensus agent.
        pub opencensus: Option<serde_json::Value>,
        /// Spans to SkyWalking.
        pub skywalking: Option<SkyWalkingProvider>,
        /// Spans over OTLP.
        pub opentelemetry: Option<OpenTelemetryProvider>,
        /// Access logs of requests over gRPC.
        pub envoy_http_als: Option<GrpcLogProvider>,
        /// Access logs of connections over gRPC.
        pub envoy_tcp_als: Option<GrpcLogProvider>,
        /// Access logs over OTLP.
        pub envoy_otel_als: Option<OtlpLogProvider>,
    }

    /// `EnvoyExternalAuthorizationHttpProvider`.
    pub struct HttpAuthzProvider {
        /// `[<namespace>/]<host>` of a service of the registry.
        pub service: String,
        /// Port of the service.
        pub port: u32,
        /// Limit of one question; 600 s unless set.
        pub timeout: Option<Duration>,
        /// Text before the request's path.
        pub path_prefix: String,
        /// Without an answer the request passes.
        pub fail_open: bool,
        /// Status without an answer, as a number; 403 unless set.
        pub status_on_error: String,
        /// Older name of `includeRequestHeadersInCheck`.
        pub include_headers_in_check: Vec<String>,
        /// Headers that the authoriser is shown: exact, `prefix*` or `*suffix`.
        pub include_request_headers_in_check: Vec<String>,
        /// Headers that are added for the authoriser.
        pub include_additional_headers_in_check: BTreeMap<String, String>,
        /// Show the body as well.
        pub include_request_body_in_check: Option<AuthzRequestBody>,
        /// Headers of a yes that replace those of the request.
        pub headers_to_upstream_on_allow: Vec<String>,
        /// Headers of a no that the client gets; none is all.
        pub headers_to_downstream_on_deny: Vec<String>,
        /// Headers of a yes that the client gets with the answer.
        pub headers_to_downstream_on_allow: Vec<String>,
        /// A yes that changes the request has its route looked for again.
        pub clear_route_cache: bool,
    }

    /// `EnvoyExternalAuthorizationGrpcProvider`.
    pub struct GrpcAuthzProvider {
        /// `[<namespace>/]<host>` of a service of the registry.
        pub service: String,
        /// Port of the service; it must be one of HTTP/2.
        pub port: u32,
        /// Limit of one question; 600 s unless set.
        pub timeout: Option<Duration>,
        /// Without an answer the request passes.
        pub fail_open: bool,
        /// Status without an answer, as a number; 403 unless set.
        pub status_on_error: String,
        /// Show the body as well.
        pub include_request_body_in_check: Option<AuthzRequestBody>,
        /// A yes that changes the request has its route looked for again.
        pub clear_route_cache: bool,
    }

    /// `ZipkinTracingProvider`.
    pub struct ZipkinProvider {
        /// `[<namespace>/]<host>` of a service of the registry.
        pub service: String,
        /// Port of the service.
        pub port: u32,
        /// Longest path in a span, bytes; 256 unless set.
        pub max_tag_length: u32,
        /// IDs of traces have 64 bits instead of 128.
        #[serde(rename = "enable64bitTraceId", alias = "enable_64bit_trace_id")]
        pub enable_64bit_trace_id: bool,
        /// Path of the collector; `/api/v2/spans` unless set.
        pub path: String,
        /// Headers by which traces go on.
        pub trace_context_option: TraceContextOption,
        /// Limit of a call; 5 s unless set.
        pub timeout: Option<Duration>,
        /// Headers of every call.
        pub headers: Vec<ProviderHeader>,
    }

    /// `DatadogTracingProvider`.
    pub struct DatadogProvider {
        /// `[<namespace>/]<host>` of a service of the registry.
        pub service: String,
        /// Port of the service.
        pub port: u32,
        /// Longest path in a span, bytes; 256 unless set.
        pub max_tag_length: u32,
    }

    /// `SkyWalkingTracingProvider`.
    pub struct SkyWalkingProvider {
        /// `[<namespace>/]<host>` of a service of the registry.
        pub service: String,
        /// Port of the service.
        pub port: u32,
        /// Not used by Istio either.
        pub access_token: String,
    }

    /// `OpenTelemetryTracingProvider`: OTLP over gRPC, or over HTTP if `http` is there.
    pub struct OpenTelemetryProvider {
        /// `[<namespace>/]<host>` of a service of the registry.
        pub service: String,
        /// Port of the service.
        pub port: u32,
        /// Longest path in a span, bytes; 256 unless set.
        pub max_tag_length: u32,
        /// Over HTTP.
        pub http: Option<ProviderHttp>,
        /// Over gRPC.
        pub grpc: Option<ProviderGrpc>,
        /// What else describes the proxy.
        pub resource_detectors: Option<ResourceDetectors>,
        /// How the proxy's service is named.
        pub service_attribute_enrichment: ServiceAttributeEnrichment,
        /// Dynatrace decides about sampling.
        pub dynatrace_sampler: Option<serde_json::Value>,
    }

    /// `HttpService` of a provider.
    pub struct ProviderHttp {
        /// Path of the calls.
        pub path: String,
        /// Limit of a call.
        pub timeout: Option<Duration>,
        /// Headers of every call.
        pub headers: Vec<ProviderHeader>,
    }

    /// `GrpcService` of a provider.
    pub struct ProviderGrpc {
        /// Limit of a call.
        pub timeout: Option<Duration>,
        /// Metadata of every call.
        pub initial_metadata: Vec<ProviderHeader>,
    }

    /// `HttpHeader`: one of the two values.
    pub struct ProviderHeader {
        /// Name.
        pub name: String,
        /// Value.
        pub value: Option<String>,
        /// Variable of the control plane's environment that has the value.
        pub env_name: Option<String>,
    }

    /// `ResourceDetectors`.
    pub struct ResourceDetectors {
        /// `OTEL_RESOURCE_ATTRIBUTES` of the proxy.
        pub environment: Option<serde_json::Value>,
        /// Files of Dynatrace's agent.
        pub dynatrace: Option<serde_json::Value>,
    }

    /// `EnvoyHttpGrpcV3LogProvider` and `EnvoyTcpGrpcV3LogProvider`.
    pub struct GrpcLogProvider {
        /// `[<namespace>/]<host>` of a service of the registry.
        pub service: String,
        /// Port of the service; it must be one of HTTP/2.
        pub port: u32,
        /// Name of the log; `http_envoy_accesslog` or `tcp_envoy_accesslog` unless set.
        pub log_name: String,
        /// Filter state of Envoys.
        pub filter_state_objects_to_log: Vec<String>,
        /// Request headers in entries.
        pub additional_request_headers_to_log: Vec<String>,
        /// Response headers in entries.
        pub additional_response_headers_to_log: Vec<String>,
        /// Trailers in entries.
        pub additional_response_trailers_to_log: Vec<String>,
    }

    /// `EnvoyOpenTelemetryLogProvider`.
    pub struct OtlpLogProvider {
        /// `[<namespace>/]<host>` of a service of the registry.
        pub service: String,
        /// Port of the service; it must be one of HTTP/2.
        pub port: u32,
        /// Name of the log; `otel_envoy_accesslog` unless set.
        pub log_name: String,
        /// Body and attributes.
        pub log_format: Option<FileLogFormat>,
    }

    /// `EnvoyFileAccessLogProvider`.
    pub struct FileLogProvider {
        /// File, `/dev/stdout` or `/dev/stderr`.
        pub path: String,
        /// Format; the standard one unless set.
        pub log_format: Option<FileLogFormat>,
        /// Leave a value out that is not there.
        pub omit_empty_values: bool,
    }

    /// Format of a log: one of the two.
    pub struct FileLogFormat {
        /// A line of text.
        pub text: String,
        /// An object of JSON; the standard one if it is empty.
        pub labels: Option<BTreeMap<String, serde_json::Value>>,
    }

    /// How much of a body an authoriser is shown.
    pub struct AuthzRequestBody {
        /// Bytes, at least 1.
        pub max_request_bytes: u32,
        /// A longer body is shown in part; otherwise it is answered with 413.
        pub allow_partial_message: bool,
        /// As bytes rather than as text (gRPC only).
        pub pack_as_bytes: bool,
    }
}

choice! {
    /// `MeshConfig.ProxyPathNormalization.NormalizationType`.
    pub enum PathNormalization {
        /// As `BASE`, and a path with an escaped slash or backslash is refused.
        #[default]
        Default,
        /// Paths stay as they are.
        None,
        /// RFC 3986 section 6.2.2: dot segments, percent-encoding, backslashes.
        Base,
        /// And `//` is `/`.
        MergeSlashes,
        /// And an escaped slash is a slash.
        DecodeAndMergeSlashes,
    }
}

choice! {
    /// `ServiceEntryVisibility.Visibility`.
    pub enum Visibility {
        /// As `PUBLIC`.
        #[default]
        VisibilityUnspecified,
        /// Nobody sees it.
        None,
        /// Its own namespace.
        Namespace,
        /// Those of its `exportTo`.
        Public,
    }

    /// `MeshConfig.ServiceScopeConfigs.Scope`.
    pub enum ServiceScope {
        /// The own cluster.
        #[default]
        Local,
        /// All clusters.
        Global,
    }
}

choice! {
    /// `ZipkinTracingProvider.TraceContextOption`.
    pub enum TraceContextOption {
        /// B3 alone.
        #[default]
        UseB3,
        /// B3 and W3C.
        UseB3WithW3cPropagation,
    }

    /// `ServiceAttributeEnrichment`.
    pub enum ServiceAttributeEnrichment {
        /// By labels of Istio.
        #[default]
        IstioCanonical,
        /// By OpenTelemetry's conventions for Kubernetes.
        OtelSemanticConventions,
    }
}

choice! {
    /// `MeshConfig.InboundTrafficPolicy.Mode`.
    pub enum InboundTrafficMode {
        /// To the workload's own address.
        #[default]
        Passthrough,
        /// To loopback.
        Localhost,
    }
}

choice! {
    /// Form of the access log.
    pub enum AccessLogEncoding {
        /// One line of text.
        #[default]
        Text,
        /// One JSON object per line.
        Json,
    }
}

choice! {
    /// What a rule of an [`ExportPolicy`] or [`ImportPolicy`] does.
    pub enum PeerAction {
        /// Lets pass.
        #[default]
        Allow,
        /// Keeps back.
        Deny,
    }
}

message! {
    /// Membership of this cluster in a mesh, as it is declared. One document, named `mesh`; without it membership is what
    /// operators' commands made it.
    pub struct MeshMembership {
        /// What is wanted.
        pub state: MembershipState,
        /// File of the control plane's machine that holds a join token; it is read while the cluster is in no mesh.
        pub token_file: String,
        /// Leave although members do not confirm it.
        pub force: bool,
    }

    /// A trust domain that is no Flotilla mesh, whose certificates are accepted by its bundle (SPIFFE Federation). The fields
    /// are those of SPIRE's `ClusterFederatedTrustDomain`.
    pub struct FederatedTrustDomain {
        /// The domain, without `spiffe://`.
        pub trust_domain: String,
        /// `https` URL of its bundle endpoint; without one `trustDomainBundle` is all there is.
        #[serde(rename = "bundleEndpointURL")]
        pub bundle_endpoint_url: String,
        /// How the endpoint proves itself; `https_web` unless set.
        pub bundle_endpoint_profile: Option<BundleEndpointProfile>,
        /// Its bundle as a SPIFFE document, or its roots in PEM; with `https_spiffe` what the first answer is verified by.
        pub trust_domain_bundle: String,
    }

    /// `ClusterFederatedTrustDomain.BundleEndpointProfile`.
    pub struct BundleEndpointProfile {
        /// Which.
        #[serde(rename = "type")]
        pub kind: EndpointProfile,
        /// Whom the certificate of a `https_spiffe` endpoint names.
        #[serde(rename = "endpointSPIFFEID")]
        pub endpoint_spiffe_id: String,
    }

    /// A cluster that is declared gone; the document has its name.
    pub struct ClusterEviction {
        /// Why, for people.
        pub reason: String,
    }
}

/// How a SPIFFE bundle endpoint proves itself (SPIFFE Federation, section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointProfile {
    /// With a certificate of a public authority for the host in its URL.
    #[default]
    HttpsWeb,
    /// With an X509-SVID of a given SPIFFE ID.
    HttpsSpiffe,
}

/// What a [`MeshMembership`] wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MembershipState {
    /// To be a member: one that is in no mesh joins with the token.
    #[default]
    Joined,
    /// To be in no mesh.
    Left,
}

message! {
    /// Which peers may know of what is exported. The first rule that matches decides; without one it is allowed.
    pub struct ExportPolicy {
        /// In order.
        pub rules: Vec<ExportRule>,
    }

    /// A rule of an [`ExportPolicy`].
    pub struct ExportRule {
        /// Clusters; none is all.
        pub peers: Vec<String>,
        /// Namespaces of the service; none is all.
        pub namespaces: Vec<String>,
        /// What happens.
        pub action: PeerAction,
    }

    /// Which peers are believed about what. The first rule that matches decides; without one it is allowed.
    pub struct ImportPolicy {
        /// In order.
        pub rules: Vec<ImportRule>,
    }

    /// A rule of an [`ImportPolicy`].
    pub struct ImportRule {
        /// Clusters; none is all.
        pub peers: Vec<String>,
        /// Namespaces of the service; none is all.
        pub namespaces: Vec<String>,
        /// What happens.
        pub action: PeerAction,
        /// What becomes of the endpoints when the peer's lease lapses; `demote` unless set here or by the Service.
        pub on_lapse: Option<OnLapse>,
    }
}
