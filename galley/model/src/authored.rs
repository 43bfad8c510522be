//! What users author: Istio's, Kubernetes' and our own kinds as typed documents.
//!
//! One struct per kind with the field names of its JSON form. A missing field and a `null` are the
//! default, as in proto JSON; an unknown field is an error. Every field of the published schema is
//! here even where Flotilla does not enforce it yet, so that "unknown" always means a mistake;
//! galley's validation warns about fields that are accepted but not enforced.
//!
//! A [`Document`] carries the normalised type ([`Kind`]): all versions of a group share one schema,
//! so `networking.istio.io/v1alpha3` and `v1` are the same [`Kind`].

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize};

/// Declares proto-like messages: every field optional, unknown fields refused.
macro_rules! message {
    ($($(#[$m:meta])* pub struct $name:ident { $($(#[$fm:meta])* pub $f:ident : $t:ty,)* })*) => { $(
        $(#[$m])*
        #[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
        pub struct $name { $($(#[$fm])* pub $f: $t,)* }
    )* };
}

/// Declares proto-like enums whose values are written in capitals.
macro_rules! choice {
    ($($(#[$m:meta])* pub enum $name:ident { $($(#[$vm:meta])* $v:ident,)* })*) => { $(
        $(#[$m])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
        pub enum $name { $($(#[$vm])* $v,)* }
    )* };
}

mod authentication;
mod claims;
mod core;
mod destination_rule;
mod envoy_filter;
mod extension;
mod extras;
mod gateway;
pub mod gateway_api;
pub mod ingress;
pub mod kubernetes;
mod mesh;
mod mesh_proxy;
mod mixer;
mod role;
mod security;
mod service_entry;
mod sidecar;
mod telemetry;
mod types;
mod virtual_service;

pub use self::{
    authentication::*,
    core::*,
    destination_rule::*,
    envoy_filter::*,
    extension::*,
    extras::{Authorizer, RouteExtras},
    gateway::*,
    ingress::{Ingress, IngressClass},
    kubernetes::{ClusterNode, EndpointSlice, Pod},
    mesh::*,
    mesh_proxy::*,
    mixer::*,
    role::*,
    security::*,
    service_entry::*,
    sidecar::*,
    telemetry::*,
    types::*,
    virtual_service::*,
};
pub use claims::HeaderKey;

macro_rules! kinds {
    ($($(#[$m:meta])* $v:ident($t:ty) = $group:literal [$canon:literal $(, $alias:literal)*] $name:literal, $scope:ident;)*) => {
        /// A kind of document that Flotilla reads.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind { $($(#[$m])* $v,)* }

        /// The specification of a document, typed by its kind.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Spec { $($(#[$m])* $v(Arc<$t>),)* }

        impl Kind {
            /// All of them.
            pub const ALL: &'static [Kind] = &[$(Kind::$v,)*];

            /// The kind of a document with this `apiVersion` and `kind`; `None` if unsupported.
            #[must_use]
            pub fn resolve(api_version: &str, kind: &str) -> Option<Self> {
                let (group, version) = api_version.split_once('/').unwrap_or(("core", api_version));
                $(if group == $group && kind == $name && [$canon $(, $alias)*].contains(&version) {
                    return Some(Kind::$v);
                })*
                None
            }

            /// The normalised `<group>/<version>/<Kind>` under which documents travel between
            /// components, such as `networking.istio.io/v1/VirtualService`; `core` is the group of
            /// Kubernetes' own objects.
            #[must_use]
            pub fn type_url(self) -> &'static str {
                match self { $(Kind::$v => concat!($group, "/", $canon, "/", $name),)* }
            }

            /// The inverse of [`Kind::type_url`].
            #[must_use]
            pub fn from_type_url(url: &str) -> Option<Self> {
                $(if url == concat!($group, "/", $canon, "/", $name) { return Some(Kind::$v); })*
                None
            }

            /// The `kind` of its documents.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Kind::$v => $name,)* }
            }

            /// The API group; `core` for Kubernetes' own objects.
            #[must_use]
            pub fn group(self) -> &'static str {
                match self { $(Kind::$v => $group,)* }
            }

            /// Versions that are accepted, the normalised one first.
            #[must_use]
            pub fn versions(self) -> &'static [&'static str] {
                match self { $(Kind::$v => &[$canon $(, $alias)*],)* }
            }

            /// Whether its documents live in a namespace.
            #[must_use]
            pub fn namespaced(self) -> bool {
                match self { $(Kind::$v => kinds!(@scope $scope),)* }
            }
        }

        impl Spec {
            /// Which kind this is.
            #[must_use]
            pub fn kind(&self) -> Kind {
                match self { $(Spec::$v(_) => Kind::$v,)* }
            }

            /// Reads the specification of a document of this kind with any serde format.
            ///
            /// # Errors
            /// The format's error for a wrong type, a malformed value or an unknown field.
            pub fn deserialize<'de, D: Deserializer<'de>>(kind: Kind, d: D) -> Result<Self, D::Error> {
                Ok(match kind { $(Kind::$v => Spec::$v(Arc::new(<$t>::deserialize(d)?)),)* })
            }

            /// The specification as JSON, without fields that are not set.
            ///
            /// A [`Secret`]'s values are in it: it is for the wire between components, not for a
            /// log or a dump.
            #[must_use]
            pub fn to_json(&self) -> serde_json::Value {
                let mut v = match self { $(Spec::$v(s) => serde_json::to_value(&**s),)* }
                    .unwrap_or(serde_json::Value::Null);
                strip_nulls(&mut v);
                v
            }
        }
    };
    (@scope namespaced) => { true };
    (@scope cluster) => { false };
}

kinds! {
    /// Traffic routing.
    VirtualService(VirtualService) = "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "VirtualService", namespaced;
    /// Policy of a destination and its subsets.
    DestinationRule(DestinationRule) = "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "DestinationRule", namespaced;
    /// Edge of the mesh.
    Gateway(Gateway) = "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "Gateway", namespaced;
    /// A service that no registry knows.
    ServiceEntry(ServiceEntry) = "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "ServiceEntry", namespaced;
    /// One workload.
    WorkloadEntry(WorkloadEntry) = "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "WorkloadEntry", namespaced;
    /// Workloads that register themselves.
    WorkloadGroup(WorkloadGroup) = "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "WorkloadGroup", namespaced;
    /// What a sidecar sees.
    Sidecar(Sidecar) = "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "Sidecar", namespaced;
    /// Changes to generated configuration.
    EnvoyFilter(EnvoyFilter) = "networking.istio.io" ["v1alpha3"] "EnvoyFilter", namespaced;
    /// Settings of proxies.
    ProxyConfig(ProxyConfig) = "networking.istio.io" ["v1beta1"] "ProxyConfig", namespaced;
    /// What workloads tell about their traffic.
    Telemetry(Telemetry) = "telemetry.istio.io" ["v1", "v1alpha1"] "Telemetry", namespaced;
    /// A WebAssembly filter.
    WasmPlugin(WasmPlugin) = "extensions.istio.io" ["v1alpha1"] "WasmPlugin", namespaced;
    /// A filter of WebAssembly or Lua.
    TrafficExtension(TrafficExtension) = "extensions.istio.io" ["v1alpha1"] "TrafficExtension", namespaced;
    /// Gateway API: which implementation serves Gateways.
    GatewayClass(gateway_api::GatewayClass) = "gateway.networking.k8s.io" ["v1", "v1beta1"] "GatewayClass", cluster;
    /// Gateway API: a listening edge.
    KubernetesGateway(gateway_api::Gateway) = "gateway.networking.k8s.io" ["v1", "v1beta1"] "Gateway", namespaced;
    /// Gateway API: routes of HTTP.
    HttpRoute(gateway_api::HttpRoute) = "gateway.networking.k8s.io" ["v1", "v1beta1"] "HTTPRoute", namespaced;
    /// Gateway API: routes of gRPC.
    GrpcRoute(gateway_api::GrpcRoute) = "gateway.networking.k8s.io" ["v1"] "GRPCRoute", namespaced;
    /// Gateway API: routes of TLS.
    TlsRoute(gateway_api::L4Route) = "gateway.networking.k8s.io" ["v1", "v1alpha3", "v1alpha2"] "TLSRoute", namespaced;
    /// Gateway API: routes of TCP.
    TcpRoute(gateway_api::L4Route) = "gateway.networking.k8s.io" ["v1", "v1alpha2"] "TCPRoute", namespaced;
    /// Gateway API: routes of UDP.
    UdpRoute(gateway_api::L4Route) = "gateway.networking.k8s.io" ["v1", "v1alpha2"] "UDPRoute", namespaced;
    /// Gateway API: who may refer to a namespace.
    ReferenceGrant(gateway_api::ReferenceGrant) = "gateway.networking.k8s.io" ["v1", "v1beta1"] "ReferenceGrant", namespaced;
    /// Gateway API: TLS from a Gateway to backends.
    BackendTlsPolicy(gateway_api::BackendTlsPolicy) = "gateway.networking.k8s.io" ["v1", "v1alpha3"] "BackendTLSPolicy", namespaced;
    /// Kubernetes: hosts and paths that lead from the edge to services.
    Ingress(Ingress) = "networking.k8s.io" ["v1"] "Ingress", namespaced;
    /// Kubernetes: which controller serves Ingresses.
    IngressClass(IngressClass) = "networking.k8s.io" ["v1"] "IngressClass", cluster;
    /// mTLS that a workload accepts.
    PeerAuthentication(PeerAuthentication) = "security.istio.io" ["v1", "v1beta1"] "PeerAuthentication", namespaced;
    /// End-user tokens.
    RequestAuthentication(RequestAuthentication) = "security.istio.io" ["v1", "v1beta1"] "RequestAuthentication", namespaced;
    /// Who may do what.
    AuthorizationPolicy(AuthorizationPolicy) = "security.istio.io" ["v1", "v1beta1"] "AuthorizationPolicy", namespaced;
    /// 1.0: how callers of services prove who they are.
    AuthnPolicy(AuthenticationPolicy) = "authentication.istio.io" ["v1alpha1"] "Policy", namespaced;
    /// 1.0: the same for the mesh.
    MeshPolicy(AuthenticationPolicy) = "authentication.istio.io" ["v1alpha1"] "MeshPolicy", cluster;
    /// 1.0: for which services access is by role.
    RbacConfig(RbacConfig) = "rbac.istio.io" ["v1alpha1"] "RbacConfig", namespaced;
    /// 1.1: the same for the cluster.
    ClusterRbacConfig(RbacConfig) = "rbac.istio.io" ["v1alpha1"] "ClusterRbacConfig", cluster;
    /// 1.0: what may be done at services.
    ServiceRole(ServiceRole) = "rbac.istio.io" ["v1alpha1"] "ServiceRole", namespaced;
    /// 1.0: who has a role.
    ServiceRoleBinding(ServiceRoleBinding) = "rbac.istio.io" ["v1alpha1"] "ServiceRoleBinding", namespaced;
    /// A Kubernetes service.
    Service(Service) = "core" ["v1"] "Service", namespaced;
    /// A Kubernetes namespace.
    Namespace(Namespace) = "core" ["v1"] "Namespace", cluster;
    /// A Kubernetes secret: certificates of gateways.
    Secret(Secret) = "core" ["v1"] "Secret", namespaced;
    /// A Kubernetes pod: a workload.
    Pod(Pod) = "core" ["v1"] "Pod", namespaced;
    /// A Kubernetes node: where its pods are.
    Node(ClusterNode) = "core" ["v1"] "Node", cluster;
    /// Endpoints of a Kubernetes service.
    EndpointSlice(EndpointSlice) = "discovery.k8s.io" ["v1"] "EndpointSlice", namespaced;
    /// Offer a service to other clusters (MCS API, KEP-1645).
    ServiceExport(ServiceExport) = "multicluster.x-k8s.io" ["v1alpha1", "v1beta1"] "ServiceExport", namespaced;
    /// Settings of the mesh.
    MeshConfig(MeshConfig) = "flotilla.dev" ["v1alpha1"] "MeshConfig", cluster;
    /// Which peers may know of exports.
    ExportPolicy(ExportPolicy) = "flotilla.dev" ["v1alpha1"] "ExportPolicy", cluster;
    /// Whether this cluster is to be a member of a mesh.
    MeshMembership(MeshMembership) = "flotilla.dev" ["v1alpha1"] "MeshMembership", cluster;
    /// A cluster that is declared gone.
    ClusterEviction(ClusterEviction) = "flotilla.dev" ["v1alpha1"] "ClusterEviction", cluster;
    /// Another trust domain, by its bundle.
    FederatedTrustDomain(FederatedTrustDomain) = "flotilla.dev" ["v1alpha1"] "FederatedTrustDomain", cluster;
    /// Which peers are believed.
    ImportPolicy(ImportPolicy) = "flotilla.dev" ["v1alpha1"] "ImportPolicy", cluster;
    /// Mixer: when which handler gets which instances.
    Rule(Rule) = "config.istio.io" ["v1alpha2"] "rule", namespaced;
    /// Mixer: a configured adapter.
    Handler(Handler) = "config.istio.io" ["v1alpha2"] "handler", namespaced;
    /// Mixer: attributes mapped to an adapter's input.
    Instance(Instance) = "config.istio.io" ["v1alpha2"] "instance", namespaced;
    /// Mixer handler in the form of its own kind.
    Denier(DenierParams) = "config.istio.io" ["v1alpha2"] "denier", namespaced;
    /// Mixer handler in the form of its own kind.
    ListChecker(ListCheckerParams) = "config.istio.io" ["v1alpha2"] "listchecker", namespaced;
    /// Mixer handler in the form of its own kind.
    MemQuota(MemQuotaParams) = "config.istio.io" ["v1alpha2"] "memquota", namespaced;
    /// Mixer handler in the form of its own kind.
    Stdio(StdioParams) = "config.istio.io" ["v1alpha2"] "stdio", namespaced;
    /// Mixer handler in the form of its own kind.
    Prometheus(PrometheusParams) = "config.istio.io" ["v1alpha2"] "prometheus", namespaced;
    /// Mixer instance in the form of its own kind.
    CheckNothing(CheckNothingParams) = "config.istio.io" ["v1alpha2"] "checknothing", namespaced;
    /// Mixer instance in the form of its own kind.
    ReportNothing(ReportNothingParams) = "config.istio.io" ["v1alpha2"] "reportnothing", namespaced;
    /// Mixer instance in the form of its own kind.
    ListEntry(ListEntryParams) = "config.istio.io" ["v1alpha2"] "listentry", namespaced;
    /// Mixer instance in the form of its own kind.
    Quota(QuotaParams) = "config.istio.io" ["v1alpha2"] "quota", namespaced;
    /// Mixer instance in the form of its own kind.
    LogEntry(LogEntryParams) = "config.istio.io" ["v1alpha2"] "logentry", namespaced;
    /// Mixer instance in the form of its own kind.
    Metric(MetricParams) = "config.istio.io" ["v1alpha2"] "metric", namespaced;
    /// Mixer: which requests charge which quotas.
    QuotaSpec(QuotaSpec) = "config.istio.io" ["v1alpha2"] "QuotaSpec", namespaced;
    /// Mixer: which services a [`QuotaSpec`] applies to.
    QuotaSpecBinding(QuotaSpecBinding) = "config.istio.io" ["v1alpha2"] "QuotaSpecBinding", namespaced;
}

impl Kind {
    /// The normalised `apiVersion`, such as `networking.istio.io/v1`, or `v1` for Kubernetes' own.
    #[must_use]
    pub fn api_version(self) -> String {
        let version = self.versions().first().copied().unwrap_or_default();
        if self.group() == "core" { version.to_owned() } else { format!("{}/{version}", self.group()) }
    }

    /// Kinds of which `status` is read: what others found out, and not what they wish.
    #[must_use]
    pub fn has_status(self) -> bool {
        matches!(self, Kind::Pod)
    }

    /// Kinds whose fields are not under `spec` but beside `metadata`.
    #[must_use]
    pub fn spec_at_top_level(self) -> bool {
        matches!(self, Kind::Secret | Kind::Pod | Kind::EndpointSlice)
    }
}

impl Spec {
    /// Reads a specification from JSON, as components receive it from galley.
    ///
    /// # Errors
    /// A wrong type, a malformed value or an unknown field.
    pub fn from_json(kind: Kind, mut spec: serde_json::Value) -> Result<Self, serde_json::Error> {
        strip_nulls(&mut spec);
        if spec.is_null() {
            spec = serde_json::Value::Object(serde_json::Map::new());
        }
        Self::deserialize(kind, spec)
    }
}

/// Removes members that are null at any depth: in proto JSON they mean "not set".
fn strip_nulls(v: &mut serde_json::Value) {
    match v {
        serde_json::Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// Name, namespace and annotations of a document: what Flotilla uses of Kubernetes' `ObjectMeta`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    /// Unique among documents of its kind and namespace.
    pub name: String,
    /// Empty for kinds that live in no namespace.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Seconds since the epoch at which the object came to be; orders conflicts, oldest first.
    pub creation_timestamp: u64,
}

/// One authored document, typed.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// As the author wrote it, such as `networking.istio.io/v1alpha3`.
    pub api_version: String,
    /// What it is.
    pub kind: Kind,
    /// Name, namespace, labels, annotations.
    pub metadata: Metadata,
    /// What it says.
    pub spec: Spec,
}

impl Document {
    /// `namespace/name`, or the bare name of a kind without namespace: the name under which the
    /// document travels between components.
    #[must_use]
    pub fn key(&self) -> String {
        resource_name(&self.metadata.namespace, &self.metadata.name)
    }
}

/// `namespace/name`, or the bare name when there is no namespace.
#[must_use]
pub fn resource_name(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}

#[cfg(test)]
mod tests;
