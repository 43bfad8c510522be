//! What a listener does with datagrams.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::AccessLog;

/// ALPN of a QUIC connection between two proxies of the mesh that carries datagrams of applications: each as a DATAGRAM
/// frame (RFC 9221) with the number of its flow in front (see [`crate::flow`]), or on a unidirectional stream of its own
/// in the same form where it is longer than a frame may be.
pub const UDP_ALPN: &str = "flotilla-udp";

/// `envoy.extensions.filters.udp.udp_proxy.v3.UdpProxyConfig`, with the size of datagrams that its listener takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpProxy {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// Where sessions go.
    pub cluster: String,
    /// A session ends when no datagram passed in either direction for this long. Never zero.
    pub idle_timeout: Duration,
    /// What chooses a host where the cluster's load balancing goes by a hash.
    pub hash: Option<UdpHash>,
    /// Every datagram is balanced on its own, instead of all of a session going to one host.
    pub per_packet: bool,
    /// Longest datagram taken from clients, in bytes; longer ones are dropped and counted.
    /// `udp_listener_config.downstream_socket_config.max_rx_datagram_size`.
    pub max_downstream: u16,
    /// The same for hosts: `upstream_socket_config.max_rx_datagram_size`. All of them unless set: Envoy's default is
    /// smaller but not kept to where it reads with GRO.
    pub max_upstream: u16,
    /// Log of sessions, written when they end.
    pub access_log: Vec<AccessLog>,
}

impl UdpProxy {
    /// Envoy's limit of a client's datagram, unless set.
    pub const MAX_DATAGRAM: u16 = 1500;
    /// Envoy's idle timeout, unless set.
    pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

    /// Sessions to a cluster, the rest as by default.
    #[must_use]
    pub fn to(cluster: impl Into<String>) -> Self {
        let cluster = cluster.into();
        Self {
            stat_prefix: cluster.clone(),
            cluster,
            idle_timeout: Self::IDLE_TIMEOUT,
            hash: None,
            per_packet: false,
            max_downstream: Self::MAX_DATAGRAM,
            max_upstream: u16::MAX,
            access_log: vec![],
        }
    }
}

/// `UdpProxyConfig.HashPolicy`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum UdpHash {
    /// The client's address without its port.
    SourceIp,
    /// This text: all sessions go to one host.
    Key(String),
}
