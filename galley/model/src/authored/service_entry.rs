//! `networking.istio.io` ServiceEntry, WorkloadEntry and WorkloadGroup.

use std::collections::BTreeMap;

use super::{Duration, Port, WorkloadSelector};

message! {
    /// A service that no registry knows, inside or outside the mesh.
    pub struct ServiceEntry {
        /// Names, at least one; a wildcard first label is allowed.
        pub hosts: Vec<String>,
        /// Addresses or CIDR ranges that callers connect to.
        pub addresses: Vec<String>,
        /// Ports.
        pub ports: Vec<Port>,
        /// Inside or outside the mesh.
        pub location: Location,
        /// How endpoints are found.
        pub resolution: Resolution,
        /// Endpoints.
        pub endpoints: Vec<WorkloadEntry>,
        /// Workloads of the same namespace that are its endpoints.
        pub workload_selector: Option<WorkloadSelector>,
        /// Namespaces it is visible in; none means all.
        pub export_to: Vec<String>,
        /// Names that its certificates may carry.
        pub subject_alt_names: Vec<String>,
    }

    /// One workload, or one endpoint of a service entry.
    pub struct WorkloadEntry {
        /// IP address, name (with DNS resolution) or `unix:///path`.
        pub address: String,
        /// Port by name of the service port, where it differs.
        pub ports: BTreeMap<String, u32>,
        /// Labels that services and subsets select on.
        pub labels: BTreeMap<String, String>,
        /// Network it is reachable in; empty is the local one.
        pub network: String,
        /// `region/zone/subzone`.
        pub locality: String,
        /// Relative weight; 0 means 1.
        pub weight: u32,
        /// Account it runs as.
        pub service_account: String,
    }

    /// Workloads that register themselves.
    pub struct WorkloadGroup {
        /// Metadata of the entries.
        pub metadata: Option<WorkloadGroupMetadata>,
        /// What all of them share.
        pub template: Option<WorkloadEntry>,
        /// Health check.
        pub probe: Option<ReadinessProbe>,
    }

    /// Metadata of generated entries.
    pub struct WorkloadGroupMetadata {
        /// Labels.
        pub labels: BTreeMap<String, String>,
        /// Annotations.
        pub annotations: BTreeMap<String, String>,
    }

    /// Health check of a registered workload: one of the four methods.
    pub struct ReadinessProbe {
        /// Before the first.
        pub initial_delay_seconds: i32,
        /// 1 unless set.
        pub timeout_seconds: i32,
        /// 10 unless set.
        pub period_seconds: i32,
        /// 1 unless set.
        pub success_threshold: i32,
        /// 3 unless set.
        pub failure_threshold: i32,
        /// An HTTP request.
        pub http_get: Option<HttpHealthCheck>,
        /// A TCP connection.
        pub tcp_socket: Option<TcpHealthCheck>,
        /// A command.
        pub exec: Option<ExecHealthCheck>,
        /// gRPC health protocol.
        pub grpc: Option<GrpcHealthCheck>,
    }

    /// An HTTP health check.
    pub struct HttpHealthCheck {
        /// Path.
        pub path: String,
        /// Port.
        pub port: u32,
        /// Host to connect to.
        pub host: String,
        /// `http` or `https`.
        pub scheme: String,
        /// Headers to send.
        pub http_headers: Vec<HttpHeader>,
    }

    /// A header of a health check.
    pub struct HttpHeader {
        /// Name.
        pub name: String,
        /// Value.
        pub value: String,
    }

    /// A TCP health check.
    pub struct TcpHealthCheck {
        /// Host to connect to.
        pub host: String,
        /// Port.
        pub port: u32,
    }

    /// A command as health check.
    pub struct ExecHealthCheck {
        /// Arguments.
        pub command: Vec<String>,
    }

    /// A gRPC health check.
    pub struct GrpcHealthCheck {
        /// Port.
        pub port: u32,
        /// Service name to ask for.
        pub service: String,
    }
}

impl ReadinessProbe {
    /// The period as a duration, with its default.
    #[must_use]
    pub fn period(&self) -> Duration {
        let seconds = if self.period_seconds > 0 { self.period_seconds } else { 10 };
        Duration(std::time::Duration::from_secs(seconds.unsigned_abs().into()))
    }
}

choice! {
    /// Where a service is.
    pub enum Location {
        /// Outside the mesh: no automatic mTLS.
        #[default]
        MeshExternal,
        /// Part of the mesh.
        MeshInternal,
    }

    /// How a service entry's endpoints are found.
    pub enum Resolution {
        /// The connection's original destination.
        #[default]
        None,
        /// Those listed or selected.
        Static,
        /// All addresses that names resolve to.
        Dns,
        /// One address that the name resolves to.
        DnsRoundRobin,
        /// Resolved per request.
        DynamicDns,
    }
}
