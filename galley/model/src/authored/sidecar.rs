//! `networking.istio.io` Sidecar.

use super::{
    ClientTlsSettings, ConnectionPoolSettings, Destination, Port, ServerTlsSettings, WorkloadSelector,
};

message! {
    /// What a sidecar listens to and what it can see.
    pub struct Sidecar {
        /// Workloads of its namespace; none makes it the namespace's default.
        pub workload_selector: Option<WorkloadSelector>,
        /// Inbound listeners.
        pub ingress: Vec<IstioIngressListener>,
        /// Outbound listeners.
        pub egress: Vec<IstioEgressListener>,
        /// Limits of inbound connections.
        pub inbound_connection_pool: Option<ConnectionPoolSettings>,
        /// Destinations that nobody declared.
        pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
    }

    /// An inbound listener.
    pub struct IstioIngressListener {
        /// Port.
        pub port: Option<Port>,
        /// Address to bind.
        pub bind: String,
        /// How traffic gets there.
        pub capture_mode: CaptureMode,
        /// `127.0.0.1:port`, `0.0.0.0:port`, their IPv6 forms, or `unix:///path`.
        pub default_endpoint: String,
        /// TLS termination.
        pub tls: Option<ServerTlsSettings>,
        /// Limits.
        pub connection_pool: Option<ConnectionPoolSettings>,
    }

    /// An outbound listener.
    pub struct IstioEgressListener {
        /// Port; none takes those of the imported services.
        pub port: Option<Port>,
        /// Address to bind.
        pub bind: String,
        /// How traffic gets there.
        pub capture_mode: CaptureMode,
        /// `namespace/host`.
        pub hosts: Vec<String>,
    }

    /// Destinations that nobody declared.
    pub struct OutboundTrafficPolicy {
        /// What happens to them.
        pub mode: OutboundTrafficMode,
        /// Proxy that they are sent to.
        pub egress_proxy: Option<Destination>,
        /// TLS with hosts that are found by name; of the mesh's policy alone.
        pub tls: Option<ClientTlsSettings>,
    }
}

choice! {
    /// How traffic reaches a listener.
    pub enum CaptureMode {
        /// The environment's.
        #[default]
        Default,
        /// By redirection.
        Iptables,
        /// By connecting to it.
        None,
    }

    /// What happens to destinations that nobody declared.
    pub enum OutboundTrafficMode {
        /// Refused.
        RegistryOnly,
        /// Passed through.
        #[default]
        AllowAny,
        /// Requests go where their host's name leads, all else is passed through; of the mesh's policy alone.
        AllowAnyDynamicDns,
    }
}
