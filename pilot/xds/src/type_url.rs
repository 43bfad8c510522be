//! Type names that the protocol uses.

/// Clusters.
pub const CDS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// Endpoints.
pub const EDS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
/// Listeners.
pub const LDS: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// Routes.
pub const RDS: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
/// Virtual hosts of route configurations, on demand.
pub const VHDS: &str = "type.googleapis.com/envoy.config.route.v3.VirtualHost";
/// Secrets.
pub const SDS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// Configurations of single HTTP filters.
pub const ECDS: &str = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
/// A resource with its name, version and time to live, where the protocol has no room for them.
pub const RESOURCE: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";
/// Names that the workload's resolver answers.
pub const NDS: &str = "type.googleapis.com/istio.networking.nds.v1.NameTable";

/// Roots of trust domains: of those that the mesh is federated with, and of its own.
pub const BUNDLES: &str = "type.googleapis.com/flotilla.identity.v1.TrustBundle";

/// Settings of a proxy's process.
pub const PROXY_CONFIG: &str = "type.googleapis.com/istio.mesh.v1alpha1.ProxyConfig";

/// Position of a type in a push, so that what is referenced arrives before what refers to it
/// (xDS protocol, "Eventual consistency considerations").
#[must_use]
pub fn push_order(type_url: &str) -> u8 {
    match type_url {
        CDS => 0,
        EDS => 1,
        LDS => 2,
        VHDS => 3,
        RDS => 4,
        SDS => 5,
        ECDS => 6,
        _ => 7,
    }
}

/// Whether a state-of-the-world response of this type holds everything there is, so that absence
/// means removal. Routes, endpoints, secrets and extensions are only ever updated.
#[must_use]
pub fn full_state(type_url: &str) -> bool {
    !matches!(type_url, RDS | VHDS | EDS | SDS | ECDS)
}

/// A short name for logs and metrics.
#[must_use]
pub fn short(type_url: &str) -> &str {
    match type_url {
        CDS => "CDS",
        EDS => "EDS",
        LDS => "LDS",
        RDS => "RDS",
        VHDS => "VHDS",
        SDS => "SDS",
        ECDS => "ECDS",
        NDS => "NDS",
        BUNDLES => "BUNDLES",
        PROXY_CONFIG => "PROXY_CONFIG",
        other => other.strip_prefix("type.googleapis.com/").unwrap_or(other),
    }
}
