//! `gateway.networking.k8s.io`: the Gateway API, as documents.
//!
//! Whatever this API has kept one meaning for, both channels of its releases taken together. A module
//! of its own, since its `Gateway` is not Istio's.

use std::collections::BTreeMap;

/// Declares enums whose values are written as they are named.
macro_rules! named {
    ($($(#[$m:meta])* pub enum $name:ident { $($(#[$vm:meta])* $v:ident,)* })*) => { $(
        $(#[$m])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name { $($(#[$vm])* $v,)* }
    )* };
}

message! {
    /// Which implementation serves Gateways.
    pub struct GatewayClass {
        /// `domain/path` of the implementation.
        pub controller_name: String,
        /// For people.
        pub description: Option<String>,
        /// Further settings.
        pub parameters_ref: Option<ObjectReference>,
    }

    /// A reference to any object; which fields are needed depends on who refers.
    pub struct ObjectReference {
        /// API group; empty is Kubernetes' own.
        pub group: Option<String>,
        /// Kind.
        pub kind: Option<String>,
        /// Namespace; the document's own unless set.
        pub namespace: Option<String>,
        /// Name.
        pub name: String,
    }

    /// A listening edge of the cluster.
    pub struct Gateway {
        /// Its class.
        pub gateway_class_name: String,
        /// What it listens to.
        pub listeners: Vec<Listener>,
        /// Addresses it asks for.
        pub addresses: Vec<GatewayAddress>,
        /// What its workloads get.
        pub infrastructure: Option<Infrastructure>,
        /// Who may add listeners.
        pub allowed_listeners: Option<AllowedListeners>,
        /// TLS of all listeners and towards backends.
        pub tls: Option<GatewayTls>,
        /// TLS towards backends (old form).
        #[serde(rename = "backendTLS")]
        pub backend_tls: Option<GatewayBackendTls>,
        /// Whether routes without parents use it.
        pub default_scope: Option<DefaultScope>,
    }

    /// One port with one name.
    pub struct Listener {
        /// Unique in the Gateway.
        pub name: String,
        /// SNI or Host; none is all.
        pub hostname: Option<String>,
        /// 1 to 65535.
        pub port: u32,
        /// `HTTP`, `HTTPS`, `TLS`, `TCP`, `UDP` or an implementation's own.
        pub protocol: String,
        /// TLS.
        pub tls: Option<ListenerTls>,
        /// Which routes may attach.
        pub allowed_routes: Option<AllowedRoutes>,
    }

    /// TLS of a listener.
    pub struct ListenerTls {
        /// `Terminate` unless set.
        pub mode: Option<ListenerTlsMode>,
        /// Certificates.
        pub certificate_refs: Vec<ObjectReference>,
        /// Verification of clients (old form).
        pub frontend_validation: Option<FrontendValidation>,
        /// Settings of the implementation.
        pub options: BTreeMap<String, String>,
    }

    /// Which routes may attach.
    pub struct AllowedRoutes {
        /// Their namespaces; the Gateway's own unless set.
        pub namespaces: Option<RouteNamespaces>,
        /// Their kinds.
        pub kinds: Vec<RouteKind>,
    }

    /// Namespaces of routes or listeners.
    pub struct RouteNamespaces {
        /// Which.
        pub from: Option<FromNamespaces>,
        /// Labels of namespaces.
        pub selector: Option<KubernetesSelector>,
    }

    /// A selector in Kubernetes' form.
    pub struct KubernetesSelector {
        /// All must be equal.
        pub match_labels: BTreeMap<String, String>,
        /// All must hold.
        pub match_expressions: Vec<SelectorExpression>,
    }

    /// A condition on a label.
    pub struct SelectorExpression {
        /// Label.
        pub key: String,
        /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
        pub operator: String,
        /// Values.
        pub values: Vec<String>,
    }

    /// A kind of routes.
    pub struct RouteKind {
        /// This API's group unless set.
        pub group: Option<String>,
        /// Kind.
        pub kind: String,
    }

    /// An address.
    pub struct GatewayAddress {
        /// `IPAddress` unless set.
        #[serde(rename = "type")]
        pub address_type: Option<String>,
        /// Value.
        pub value: Option<String>,
    }

    /// What a Gateway's workloads get.
    pub struct Infrastructure {
        /// Labels.
        pub labels: BTreeMap<String, String>,
        /// Annotations.
        pub annotations: BTreeMap<String, String>,
        /// Further settings.
        pub parameters_ref: Option<ObjectReference>,
    }

    /// Who may add listeners.
    pub struct AllowedListeners {
        /// Their namespaces.
        pub namespaces: Option<RouteNamespaces>,
    }

    /// TLS of a Gateway as a whole.
    pub struct GatewayTls {
        /// Towards backends.
        pub backend: Option<GatewayBackendTls>,
        /// Towards clients.
        pub frontend: Option<FrontendTls>,
    }

    /// TLS towards backends.
    pub struct GatewayBackendTls {
        /// Certificate to show.
        pub client_certificate_ref: Option<ObjectReference>,
    }

    /// TLS towards clients.
    pub struct FrontendTls {
        /// Of all ports.
        pub default: Option<FrontendTlsConfig>,
        /// Of single ones.
        pub per_port: Vec<FrontendTlsPort>,
    }

    /// TLS of a port.
    pub struct FrontendTlsPort {
        /// Port.
        pub port: u32,
        /// TLS.
        pub tls: Option<FrontendTlsConfig>,
    }

    /// TLS of ports.
    pub struct FrontendTlsConfig {
        /// Verification of clients.
        pub validation: Option<FrontendValidation>,
    }

    /// Verification of clients.
    pub struct FrontendValidation {
        /// Roots.
        pub ca_certificate_refs: Vec<ObjectReference>,
        /// What happens without a valid certificate.
        pub mode: Option<FrontendValidationMode>,
    }

    /// What a route is attached to.
    pub struct ParentReference {
        /// This API's group unless set.
        pub group: Option<String>,
        /// `Gateway` unless set.
        pub kind: Option<String>,
        /// The route's own unless set.
        pub namespace: Option<String>,
        /// Name.
        pub name: String,
        /// One listener.
        pub section_name: Option<String>,
        /// One port.
        pub port: Option<u32>,
    }

    /// Routes of HTTP.
    pub struct HttpRoute {
        /// What it is attached to.
        pub parent_refs: Vec<ParentReference>,
        /// Whether it attaches to default Gateways.
        pub use_default_gateways: Option<DefaultScope>,
        /// Host names; none is all of the parent's.
        pub hostnames: Vec<String>,
        /// Rules; one that matches everything unless set.
        pub rules: Vec<HttpRule>,
    }

    /// A rule of an [`HttpRoute`].
    pub struct HttpRule {
        /// Name.
        pub name: Option<String>,
        /// Any of these must hold; none is everything.
        pub matches: Vec<HttpMatch>,
        /// Changes.
        pub filters: Vec<RouteFilter>,
        /// Where to, by weight.
        pub backend_refs: Vec<BackendRef>,
        /// Limits of time.
        pub timeouts: Option<Timeouts>,
        /// Retries.
        pub retry: Option<Retry>,
        /// Affinity.
        pub session_persistence: Option<SessionPersistence>,
    }

    /// Conditions that must all hold.
    pub struct HttpMatch {
        /// Path.
        pub path: Option<PathMatch>,
        /// Headers.
        pub headers: Vec<NamedMatch>,
        /// Query parameters.
        pub query_params: Vec<NamedMatch>,
        /// Method.
        pub method: Option<String>,
    }

    /// A condition on the path.
    pub struct PathMatch {
        /// `PathPrefix` unless set.
        #[serde(rename = "type")]
        pub match_type: Option<PathMatchType>,
        /// `/` unless set.
        pub value: Option<String>,
    }

    /// A condition on a header or parameter.
    pub struct NamedMatch {
        /// `Exact` unless set.
        #[serde(rename = "type")]
        pub match_type: Option<ValueMatchType>,
        /// Name.
        pub name: String,
        /// Value or pattern.
        pub value: String,
    }

    /// A change: the member that its type names.
    pub struct RouteFilter {
        /// Which.
        #[serde(rename = "type")]
        pub filter_type: Option<FilterType>,
        /// Request headers.
        pub request_header_modifier: Option<HeaderModifier>,
        /// Response headers.
        pub response_header_modifier: Option<HeaderModifier>,
        /// A shadow.
        pub request_mirror: Option<RequestMirror>,
        /// A redirect.
        pub request_redirect: Option<RequestRedirect>,
        /// Path and host.
        pub url_rewrite: Option<UrlRewrite>,
        /// Cross-origin policy.
        pub cors: Option<Cors>,
        /// An authoriser.
        pub external_auth: Option<ExternalAuth>,
        /// The implementation's own.
        pub extension_ref: Option<ObjectReference>,
    }

    /// Changes of headers.
    pub struct HeaderModifier {
        /// Replace or create.
        pub set: Vec<HeaderValue>,
        /// Append.
        pub add: Vec<HeaderValue>,
        /// Remove.
        pub remove: Vec<String>,
    }

    /// A header.
    pub struct HeaderValue {
        /// Name.
        pub name: String,
        /// Value.
        pub value: String,
    }

    /// A shadow.
    pub struct RequestMirror {
        /// Where to.
        pub backend_ref: Option<BackendRef>,
        /// Share in percent.
        pub percent: Option<i32>,
        /// Share as a fraction.
        pub fraction: Option<Fraction>,
    }

    /// A fraction.
    pub struct Fraction {
        /// Above.
        pub numerator: i32,
        /// Below; 100 unless set.
        pub denominator: Option<i32>,
    }

    /// A redirect.
    pub struct RequestRedirect {
        /// `http` or `https`.
        pub scheme: Option<String>,
        /// Host.
        pub hostname: Option<String>,
        /// Path.
        pub path: Option<PathModifier>,
        /// Port.
        pub port: Option<u32>,
        /// 302 unless set.
        pub status_code: Option<u32>,
    }

    /// A rewrite.
    pub struct UrlRewrite {
        /// Host.
        pub hostname: Option<String>,
        /// Path.
        pub path: Option<PathModifier>,
    }

    /// A change of the path: the member that its type names.
    pub struct PathModifier {
        /// Which.
        #[serde(rename = "type")]
        pub modifier_type: Option<PathModifierType>,
        /// Replaces the path.
        pub replace_full_path: Option<String>,
        /// Replaces the matched prefix.
        pub replace_prefix_match: Option<String>,
    }

    /// Cross-origin policy.
    pub struct Cors {
        /// Origins.
        pub allow_origins: Vec<String>,
        /// Whether credentials are allowed.
        pub allow_credentials: Option<bool>,
        /// Methods.
        pub allow_methods: Vec<String>,
        /// Request headers.
        pub allow_headers: Vec<String>,
        /// Response headers.
        pub expose_headers: Vec<String>,
        /// Seconds that a preflight may be cached; 5 unless set.
        pub max_age: Option<i32>,
    }

    /// An authoriser.
    pub struct ExternalAuth {
        /// `GRPC` or `HTTP`.
        pub protocol: String,
        /// Where it is.
        pub backend_ref: Option<BackendRef>,
        /// Of gRPC.
        pub grpc: Option<GrpcAuth>,
        /// Of HTTP.
        pub http: Option<HttpAuth>,
        /// How much of the body it gets.
        pub forward_body: Option<ForwardBody>,
    }

    /// What an authoriser over gRPC gets.
    pub struct GrpcAuth {
        /// Request headers.
        pub allowed_headers: Vec<String>,
    }

    /// What an authoriser over HTTP gets.
    pub struct HttpAuth {
        /// Prefix of the path.
        pub path: String,
        /// Request headers.
        pub allowed_headers: Vec<String>,
        /// Headers of its answer that go on.
        pub allowed_response_headers: Vec<String>,
    }

    /// How much of the body an authoriser gets.
    pub struct ForwardBody {
        /// Bytes.
        pub max_size: u32,
    }

    /// A destination and its share.
    pub struct BackendRef {
        /// API group; empty is Kubernetes' own.
        pub group: Option<String>,
        /// `Service` unless set.
        pub kind: Option<String>,
        /// The route's own unless set.
        pub namespace: Option<String>,
        /// Name.
        pub name: String,
        /// Port of the service.
        pub port: Option<u32>,
        /// Share; 1 unless set.
        pub weight: Option<i32>,
        /// Changes for this destination.
        pub filters: Vec<RouteFilter>,
    }

    /// Limits of time.
    pub struct Timeouts {
        /// Of the request.
        pub request: Option<String>,
        /// Of each try.
        pub backend_request: Option<String>,
    }

    /// Retries.
    pub struct Retry {
        /// Status codes.
        pub codes: Vec<u32>,
        /// Tries beyond the first.
        pub attempts: Option<i32>,
        /// Pause between tries.
        pub backoff: Option<String>,
    }

    /// Affinity.
    pub struct SessionPersistence {
        /// Name of cookie or header (old form).
        pub session_name: Option<String>,
        /// Longest session.
        pub absolute_timeout: Option<String>,
        /// Longest pause (old form).
        pub idle_timeout: Option<String>,
        /// `Cookie` unless set.
        #[serde(rename = "type")]
        pub persistence_type: Option<PersistenceType>,
        /// Of a cookie (old form).
        pub cookie_config: Option<PersistenceCookie>,
        /// Of a cookie.
        pub cookie: Option<PersistenceCookie>,
        /// Of a header.
        pub header: Option<PersistenceHeader>,
    }

    /// A cookie for affinity.
    pub struct PersistenceCookie {
        /// `Session` unless set.
        pub lifetime_type: Option<CookieLifetime>,
        /// Name.
        pub name: Option<String>,
        /// Path.
        pub path: Option<String>,
    }

    /// A header for affinity.
    pub struct PersistenceHeader {
        /// Name.
        pub name: String,
    }

    /// Routes of gRPC.
    pub struct GrpcRoute {
        /// What it is attached to.
        pub parent_refs: Vec<ParentReference>,
        /// Whether it attaches to default Gateways.
        pub use_default_gateways: Option<DefaultScope>,
        /// Host names; none is all of the parent's.
        pub hostnames: Vec<String>,
        /// Rules.
        pub rules: Vec<GrpcRule>,
    }

    /// A rule of a [`GrpcRoute`].
    pub struct GrpcRule {
        /// Name.
        pub name: Option<String>,
        /// Any of these must hold; none is everything.
        pub matches: Vec<GrpcMatch>,
        /// Changes.
        pub filters: Vec<RouteFilter>,
        /// Where to, by weight.
        pub backend_refs: Vec<BackendRef>,
        /// Affinity.
        pub session_persistence: Option<SessionPersistence>,
    }

    /// Conditions that must all hold.
    pub struct GrpcMatch {
        /// Service and method.
        pub method: Option<GrpcMethodMatch>,
        /// Metadata.
        pub headers: Vec<NamedMatch>,
    }

    /// A condition on service and method.
    pub struct GrpcMethodMatch {
        /// `Exact` unless set.
        #[serde(rename = "type")]
        pub match_type: Option<ValueMatchType>,
        /// Service.
        pub service: Option<String>,
        /// Method.
        pub method: Option<String>,
    }

    /// Routes of TLS, TCP or UDP.
    pub struct L4Route {
        /// What it is attached to.
        pub parent_refs: Vec<ParentReference>,
        /// Whether it attaches to default Gateways.
        pub use_default_gateways: Option<DefaultScope>,
        /// SNI; TLS only.
        pub hostnames: Vec<String>,
        /// Rules.
        pub rules: Vec<L4Rule>,
    }

    /// A rule of an [`L4Route`].
    pub struct L4Rule {
        /// Name.
        pub name: Option<String>,
        /// Where to, by weight.
        pub backend_refs: Vec<BackendRef>,
    }

    /// Who may refer to objects of this namespace.
    pub struct ReferenceGrant {
        /// Who.
        pub from: Vec<GrantFrom>,
        /// To what.
        pub to: Vec<GrantTo>,
    }

    /// Who may refer.
    pub struct GrantFrom {
        /// API group.
        pub group: String,
        /// Kind.
        pub kind: String,
        /// Namespace.
        pub namespace: String,
    }

    /// To what.
    pub struct GrantTo {
        /// API group.
        pub group: String,
        /// Kind.
        pub kind: String,
        /// Name; none is all.
        pub name: Option<String>,
    }

    /// TLS from a Gateway to backends.
    pub struct BackendTlsPolicy {
        /// Which backends.
        pub target_refs: Vec<PolicyTarget>,
        /// How they are verified.
        pub validation: Option<BackendValidation>,
        /// Settings of the implementation.
        pub options: BTreeMap<String, String>,
    }

    /// A backend.
    pub struct PolicyTarget {
        /// API group; empty is Kubernetes' own.
        pub group: String,
        /// Kind.
        pub kind: String,
        /// Name.
        pub name: String,
        /// One port.
        pub section_name: Option<String>,
    }

    /// How backends are verified: one of the first two.
    pub struct BackendValidation {
        /// Roots.
        pub ca_certificate_refs: Vec<ObjectReference>,
        /// `System`.
        #[serde(rename = "wellKnownCACertificates")]
        pub well_known_ca_certificates: Option<String>,
        /// SNI, and name of the certificate.
        pub hostname: String,
        /// Names that the certificate may carry instead.
        pub subject_alt_names: Vec<SubjectAltName>,
    }

    /// A name of a certificate: the member that its type names.
    pub struct SubjectAltName {
        /// Which.
        #[serde(rename = "type")]
        pub name_type: Option<SubjectAltNameType>,
        /// DNS name.
        pub hostname: Option<String>,
        /// URI.
        pub uri: Option<String>,
    }
}

named! {
    /// Whether something is a default.
    pub enum DefaultScope {
        /// For all routes.
        All,
        /// For none.
        None,
    }

    /// What a listener does with TLS.
    pub enum ListenerTlsMode {
        /// Ends it.
        Terminate,
        /// Routes it by SNI.
        Passthrough,
    }

    /// Namespaces.
    pub enum FromNamespaces {
        /// All.
        All,
        /// Those that a selector selects.
        Selector,
        /// The document's own.
        Same,
        /// None.
        None,
    }

    /// What happens without a valid client certificate.
    pub enum FrontendValidationMode {
        /// Refused.
        AllowValidOnly,
        /// Passed on.
        AllowInsecureFallback,
    }

    /// How a path is compared.
    pub enum PathMatchType {
        /// Equal.
        Exact,
        /// By whole segments.
        PathPrefix,
        /// By a pattern.
        RegularExpression,
    }

    /// How a value is compared.
    pub enum ValueMatchType {
        /// Equal.
        Exact,
        /// By a pattern.
        RegularExpression,
    }

    /// Kinds of changes.
    pub enum FilterType {
        /// Request headers.
        RequestHeaderModifier,
        /// Response headers.
        ResponseHeaderModifier,
        /// A shadow.
        RequestMirror,
        /// A redirect.
        RequestRedirect,
        /// Path and host.
        #[serde(rename = "URLRewrite")]
        UrlRewrite,
        /// The implementation's own.
        ExtensionRef,
        /// Cross-origin policy.
        #[serde(rename = "CORS")]
        Cors,
        /// An authoriser.
        ExternalAuth,
    }

    /// Changes of the path.
    pub enum PathModifierType {
        /// All of it.
        ReplaceFullPath,
        /// The matched prefix.
        ReplacePrefixMatch,
    }

    /// Where affinity is kept.
    pub enum PersistenceType {
        /// In a cookie.
        Cookie,
        /// In a header.
        Header,
    }

    /// How long a cookie lasts.
    pub enum CookieLifetime {
        /// As long as the session may.
        Permanent,
        /// As long as the browser runs.
        Session,
    }

    /// Names of a certificate.
    pub enum SubjectAltNameType {
        /// DNS.
        Hostname,
        /// URI.
        #[serde(rename = "URI")]
        Uri,
    }
}
