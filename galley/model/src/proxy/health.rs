//! Active health checks: how a proxy asks a cluster's hosts whether they work.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::StringMatch;

/// `envoy.config.core.v3.HealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is asked.
    pub kind: HealthCheckKind,
    /// Time for an answer, connecting included.
    pub timeout: Duration,
    /// When the next check of a host follows the last.
    pub intervals: HealthIntervals,
    /// Upper end of a random delay before a host's first check.
    pub initial_jitter: Duration,
    /// Upper end of a random time that each interval is longer.
    pub interval_jitter: Duration,
    /// The same in percent of the interval.
    pub interval_jitter_percent: u32,
    /// Failures in a row until a host is unhealthy. Answers that say so make it unhealthy at once: this counts
    /// connections that fail, and answers that do not come.
    pub unhealthy_threshold: u32,
    /// Successes in a row until a host is healthy again; a new host needs one.
    pub healthy_threshold: u32,
    /// Whether checks of a host share a connection.
    pub reuse_connection: bool,
    /// Port to check instead of the endpoint's; 0 is the endpoint's.
    pub alt_port: u16,
    /// `common_lb_config.ignore_new_hosts_until_first_hc`: hosts that were never checked do not count, neither for the
    /// panic threshold nor for what a priority can take.
    pub ignore_new_hosts: bool,
}

/// Times between two checks of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthIntervals {
    /// A host that is healthy and stays so.
    pub healthy: Duration,
    /// A host that is unhealthy and stays so.
    pub unhealthy: Duration,
    /// A healthy host that has begun to fail (`unhealthy_edge_interval`).
    pub failing: Duration,
    /// An unhealthy host that has begun to succeed (`healthy_edge_interval`).
    pub recovering: Duration,
    /// Any host of a cluster that never had a connection for traffic, while it is unhealthy.
    pub no_traffic: Duration,
    /// The same while it is healthy.
    pub no_traffic_healthy: Duration,
}

/// What a health check asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthCheckKind {
    /// A request whose status tells.
    Http(HttpHealthCheck),
    /// `grpc.health.v1.Health/Check`.
    Grpc(GrpcHealthCheck),
    /// A connection, and bytes that are exchanged on it.
    Tcp(TcpHealthCheck),
}

/// `HealthCheck.HttpHealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpHealthCheck {
    /// Host of the request, unless the endpoint says another; empty is the cluster's name.
    pub host: String,
    /// Path and query.
    pub path: String,
    /// Method.
    pub method: String,
    /// HTTP/2 instead of HTTP/1.1.
    pub http2: bool,
    /// Headers of the request, beside `host` and `user-agent`.
    pub headers: Vec<(String, String)>,
    /// Ranges of statuses that mean healthy, their ends not included.
    pub expected: Vec<(u16, u16)>,
    /// Ranges of statuses that count as one failure towards the threshold rather than make unhealthy at once.
    pub retriable: Vec<(u16, u16)>,
    /// What the answer's header `x-envoy-upstream-healthchecked-cluster` must be.
    pub service_name: Option<StringMatch>,
}

/// `HealthCheck.GrpcHealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrpcHealthCheck {
    /// Service that is asked about; empty is the server as a whole.
    pub service_name: String,
    /// Authority of the request, unless the endpoint says another; empty is the cluster's name.
    pub authority: String,
    /// Headers of the request.
    pub headers: Vec<(String, String)>,
}

/// `HealthCheck.TcpHealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpHealthCheck {
    /// Bytes to send; none sends nothing.
    pub send: Vec<u8>,
    /// Pieces that must come back in this order, with anything between them; none is satisfied by a connection.
    pub receive: Vec<Vec<u8>>,
}

/// `envoy.config.endpoint.v3.Endpoint.HealthCheckConfig`: what differs for one endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EndpointCheck {
    /// Port to check; 0 is the cluster's choice.
    pub port: u16,
    /// Host of requests; empty is the cluster's choice.
    pub hostname: String,
    /// IP address to check; empty is the endpoint's.
    pub address: String,
    /// It is not checked, and healthy as far as checks go.
    pub disabled: bool,
}
