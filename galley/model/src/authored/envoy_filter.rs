//! `networking.istio.io` EnvoyFilter and ProxyConfig.
//!
//! What an EnvoyFilter patches in is Envoy's own configuration and stays JSON here; whoever applies
//! it has Envoy's messages.

use std::collections::BTreeMap;

use super::{LabelSelector, PolicyTargetReference, WorkloadSelector};

message! {
    /// Changes to generated configuration.
    pub struct EnvoyFilter {
        /// Workloads of its namespace, in the root namespace of the mesh; none selects all.
        pub workload_selector: Option<WorkloadSelector>,
        /// Resources, instead of a selector.
        pub target_refs: Vec<PolicyTargetReference>,
        /// Changes in order.
        pub config_patches: Vec<EnvoyConfigObjectPatch>,
        /// Order among filters of one scope, lower first.
        pub priority: i32,
    }

    /// One change.
    pub struct EnvoyConfigObjectPatch {
        /// Kind of object.
        pub apply_to: ApplyTo,
        /// Which objects; none matches all of the kind.
        #[serde(rename = "match")]
        pub matches: Option<EnvoyConfigObjectMatch>,
        /// What happens to them.
        pub patch: Option<EnvoyPatch>,
    }

    /// Which objects; at most one of the last four.
    pub struct EnvoyConfigObjectMatch {
        /// Which side of a proxy.
        pub context: PatchContext,
        /// Which proxies.
        pub proxy: Option<ProxyMatch>,
        /// Listeners and what is in them.
        pub listener: Option<ListenerMatch>,
        /// Route configurations and what is in them.
        pub route_configuration: Option<RouteConfigurationMatch>,
        /// Clusters.
        pub cluster: Option<ClusterMatch>,
        /// Waypoints.
        pub waypoint: Option<WaypointMatch>,
    }

    /// Which proxies.
    pub struct ProxyMatch {
        /// Regular expression on the proxy's version.
        pub proxy_version: String,
        /// Metadata of the proxy's node; all must be equal.
        pub metadata: BTreeMap<String, String>,
    }

    /// Which listeners.
    pub struct ListenerMatch {
        /// Port of the service or gateway; 0 is any.
        pub port_number: u32,
        /// Name of the port.
        pub port_name: String,
        /// Which filter chains.
        pub filter_chain: Option<FilterChainMatch>,
        /// Name of a listener filter.
        pub listener_filter: String,
        /// Name of the listener.
        pub name: String,
    }

    /// Which filter chains.
    pub struct FilterChainMatch {
        /// Name.
        pub name: String,
        /// SNI of its match.
        pub sni: String,
        /// `raw_buffer` or `tls`.
        pub transport_protocol: String,
        /// ALPN values, comma-separated.
        pub application_protocols: String,
        /// Which network filter.
        pub filter: Option<FilterMatch>,
        /// Name of its transport socket.
        pub transport_socket: String,
        /// Destination port of its match; 0 is any.
        pub destination_port: u32,
    }

    /// Which filter.
    pub struct FilterMatch {
        /// Name of the network filter.
        pub name: String,
        /// Filter inside of it.
        pub sub_filter: Option<SubFilterMatch>,
    }

    /// Which HTTP filter.
    pub struct SubFilterMatch {
        /// Name.
        pub name: String,
    }

    /// Which route configurations.
    pub struct RouteConfigurationMatch {
        /// Port; 0 is any.
        pub port_number: u32,
        /// Name of a gateway's port.
        pub port_name: String,
        /// `namespace/name` of a gateway.
        pub gateway: String,
        /// Which virtual hosts.
        pub vhost: Option<VirtualHostMatch>,
        /// Name of the route configuration.
        pub name: String,
    }

    /// Which virtual hosts.
    pub struct VirtualHostMatch {
        /// Name, `host:port`.
        pub name: String,
        /// One of its domains.
        pub domain_name: String,
        /// Which routes.
        pub route: Option<RouteMatch>,
    }

    /// Which routes.
    pub struct RouteMatch {
        /// Name.
        pub name: String,
        /// What they do.
        pub action: RouteMatchAction,
    }

    /// Which clusters.
    pub struct ClusterMatch {
        /// Port of the service; 0 is any.
        pub port_number: u32,
        /// FQDN of the service.
        pub service: String,
        /// Subset.
        pub subset: String,
        /// Name of the cluster.
        pub name: String,
    }

    /// Which part of a waypoint.
    pub struct WaypointMatch {
        /// Port; 0 is any.
        pub port_number: u32,
        /// Which routes.
        pub route: Option<WaypointRouteMatch>,
        /// Which filter.
        pub filter: Option<FilterMatch>,
    }

    /// Which routes of a waypoint.
    pub struct WaypointRouteMatch {
        /// Name.
        pub name: String,
    }

    /// What happens.
    pub struct EnvoyPatch {
        /// How.
        pub operation: PatchOperation,
        /// Envoy's message, as JSON.
        pub value: Option<serde_json::Value>,
        /// Where among the filters of its kind.
        pub filter_class: FilterClass,
    }

    /// Settings of proxies.
    pub struct ProxyConfig {
        /// Workloads of its namespace, in the root namespace of the mesh; none selects all.
        pub selector: Option<LabelSelector>,
        /// Worker threads; 0 is one per core.
        pub concurrency: Option<i32>,
        /// Environment of the proxy.
        pub environment_variables: BTreeMap<String, String>,
        /// Image of the proxy.
        pub image: Option<ProxyImage>,
    }

    /// Image of the proxy.
    pub struct ProxyImage {
        /// `default`, `debug` or `distroless`.
        pub image_type: String,
    }
}

choice! {
    /// Kind of object that a patch is for.
    pub enum ApplyTo {
        /// Not set.
        #[default]
        Invalid,
        /// Listeners.
        Listener,
        /// Filter chains of listeners.
        FilterChain,
        /// Network filters of filter chains.
        NetworkFilter,
        /// HTTP filters of connection managers.
        HttpFilter,
        /// Route configurations.
        RouteConfiguration,
        /// Virtual hosts of route configurations.
        VirtualHost,
        /// Routes of virtual hosts.
        HttpRoute,
        /// Clusters.
        Cluster,
        /// Extension configurations.
        ExtensionConfig,
        /// The bootstrap.
        Bootstrap,
        /// Listener filters.
        ListenerFilter,
    }

    /// Which side of a proxy.
    pub enum PatchContext {
        /// All.
        #[default]
        Any,
        /// Inbound of sidecars.
        SidecarInbound,
        /// Outbound of sidecars.
        SidecarOutbound,
        /// Gateways.
        Gateway,
        /// Waypoints.
        Waypoint,
    }

    /// What a matched route does.
    pub enum RouteMatchAction {
        /// Anything.
        #[default]
        Any,
        /// Forwards.
        Route,
        /// Redirects.
        Redirect,
        /// Answers.
        DirectResponse,
    }

    /// What happens to a matched object.
    pub enum PatchOperation {
        /// Not set.
        #[default]
        Invalid,
        /// Merged with the value.
        Merge,
        /// The value is added.
        Add,
        /// Removed.
        Remove,
        /// The value is put before it.
        InsertBefore,
        /// The value is put after it.
        InsertAfter,
        /// The value is put first.
        InsertFirst,
        /// Replaced by the value.
        Replace,
        /// Merged with the value, lists replaced.
        MergeAndReplaceList,
    }

    /// Where a filter goes among those of its kind.
    pub enum FilterClass {
        /// Where the operation says.
        #[default]
        Unspecified,
        /// After authentication.
        Authn,
        /// After authorization.
        Authz,
        /// Before statistics.
        Stats,
    }
}
