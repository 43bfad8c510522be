//! What a service registry knows: services and the endpoints behind them.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{ClusterId, Locality, NetworkId};

/// Labels of a workload or service.
pub type Labels = BTreeMap<String, String>;

/// The application protocol of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// HTTP/1.x in clear.
    Http,
    /// HTTP/2 in clear with prior knowledge.
    Http2,
    /// gRPC, which is HTTP/2 with its own status mapping.
    Grpc,
    /// gRPC-Web over HTTP/1.1.
    GrpcWeb,
    /// TLS that carries HTTP; opaque to the mesh.
    Https,
    /// TLS; routed by SNI, opaque otherwise.
    Tls,
    /// Bytes.
    Tcp,
    /// MongoDB wire protocol; bytes to the mesh.
    Mongo,
    /// MySQL wire protocol (server speaks first); bytes to the mesh.
    Mysql,
    /// Redis protocol; bytes to the mesh.
    Redis,
    /// Datagrams.
    Udp,
    /// Not declared: detected from the first bytes.
    Auto,
}

impl Protocol {
    /// Chooses by `appProtocol` first, then by the port name's prefix before `-`; an unnamed or
    /// unknown name means [`Protocol::Auto`].
    #[must_use]
    pub fn select(app_protocol: Option<&str>, port_name: &str) -> Self {
        if let Some(p) = app_protocol {
            return match p.to_ascii_lowercase().as_str() {
                "kubernetes.io/h2c" | "http2" => Self::Http2,
                "kubernetes.io/ws" | "kubernetes.io/wss" => Self::Http,
                other => Self::parse(other).unwrap_or(Self::Auto),
            };
        }
        let prefix = port_name.split('-').next().unwrap_or_default();
        if port_name.to_ascii_lowercase().starts_with("grpc-web") {
            return Self::GrpcWeb;
        }
        Self::parse(prefix).unwrap_or(Self::Auto)
    }

    /// Parses a protocol name, case-insensitively.
    #[must_use]
    pub fn parse(s: &str) -> Option<Self> {
        Some(match s.to_ascii_lowercase().as_str() {
            "http" => Self::Http,
            "http2" => Self::Http2,
            "grpc" => Self::Grpc,
            "grpc-web" => Self::GrpcWeb,
            "https" => Self::Https,
            "tls" => Self::Tls,
            "tcp" => Self::Tcp,
            "mongo" => Self::Mongo,
            "mysql" => Self::Mysql,
            "redis" => Self::Redis,
            "udp" => Self::Udp,
            _ => return None,
        })
    }

    /// Whether HTTP routes apply.
    #[must_use]
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// Whether the upstream is spoken to in HTTP/2.
    #[must_use]
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc)
    }

    /// Whether the first bytes are a TLS ClientHello of the application.
    #[must_use]
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }
}

/// One port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Unique in the service; may be empty for a single port.
    #[serde(default)]
    pub name: String,
    /// What callers use, 1 to 65535.
    pub port: u16,
    /// How it is spoken.
    pub protocol: Protocol,
}

impl ServicePort {
    /// Whether it takes datagrams: the same number may be a port of TCP as well.
    #[must_use]
    pub fn is_udp(&self) -> bool {
        self.protocol == Protocol::Udp
    }

    /// Whether both are the same port to callers, whatever their names.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.port == other.port && self.is_udp() == other.is_udp()
    }
}

/// How endpoints of a service are found by a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolution {
    /// Endpoints are pushed.
    Static,
    /// The proxy resolves the names.
    Dns,
    /// The connection's original destination.
    Passthrough,
    /// The proxy resolves the name that each request, or TLS connection, asks for.
    ByName,
}

/// A service as one cluster sees it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Fully qualified, such as `ratings.books.svc.cluster.local`.
    pub host: String,
    /// Short name within its namespace.
    pub name: String,
    /// Namespace it belongs to.
    pub namespace: String,
    /// Addresses that callers connect to; the mesh assigns one where a registry has none.
    pub addresses: Vec<IpAddr>,
    /// Ports, in declared order.
    pub ports: Vec<ServicePort>,
    /// Endpoint discovery.
    pub resolution: Resolution,
    /// Outside the mesh: no automatic mTLS.
    pub mesh_external: bool,
    /// `clusterIP: None`.
    pub headless: bool,
    /// Namespaces it is visible in; empty means all.
    pub export_to: Vec<String>,
    /// Labels of the service object.
    pub labels: Labels,
    /// Seconds since the epoch at which the object came to be; orders conflicts.
    pub created: u64,
}

/// Health of an endpoint as the registry knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Serves.
    #[default]
    Healthy,
    /// Known but not to be picked unless nothing else is left.
    Unhealthy,
    /// Going away: existing streams finish, no new ones.
    Draining,
}

/// Whether an endpoint's sidecar accepts mesh mTLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// It has a sidecar.
    Mutual,
    /// It has none.
    #[default]
    Disabled,
}

/// One address that serves one service port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// IP address or, with [`Resolution::Dns`], a name.
    pub address: String,
    /// Port at that address.
    pub port: u16,
    /// Name of the service port it serves.
    pub service_port: String,
    /// Labels that subsets select on.
    pub labels: Labels,
    /// Account it runs as; part of its SPIFFE ID.
    pub service_account: String,
    /// Where it runs.
    pub locality: Locality,
    /// Network it is reachable in; `None` means the local one.
    pub network: Option<NetworkId>,
    /// Cluster it runs in.
    pub cluster: Option<ClusterId>,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// Health known to the registry.
    pub health: Health,
    /// Whether mTLS is possible.
    pub tls: TlsMode,
    /// Workload that owns the address.
    pub workload: Option<Arc<str>>,
}
