//! Counters of the UDP proxy. Istio has none; Envoy's `udp.<stat_prefix>.*` are the model.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// Where a datagram was seen, as the label `kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpHop {
    /// From a client.
    DownstreamRx,
    /// To a client.
    DownstreamTx,
    /// From a host.
    UpstreamRx,
    /// To a host.
    UpstreamTx,
}

/// Why a datagram went nowhere, as the label `kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpDrop {
    /// The cluster is not there.
    NoCluster,
    /// The cluster has no host that takes datagrams.
    NoHost,
    /// The cluster has as many sessions as `max_connections` allows.
    ClusterLimit,
    /// The worker has as many sessions as it may have, or the process no memory for more.
    SessionLimit,
    /// It was longer than `max_rx_datagram_size`.
    Truncated,
    /// It could not be received: mostly a host that answers with ICMP instead.
    ReceiveError,
    /// It could not be sent.
    SendError,
    /// No service has the name that its connection asks for, or none that is exported.
    NoRoute,
    /// It is not of a connection that is known, nor the first of one.
    NotQuic,
    /// The host's proxy does not answer, or what it says is not what the mesh expects of it.
    Unreachable,
    /// The host's proxy refuses this caller.
    Denied,
    /// It is longer than the path carries.
    TooLarge,
    /// More waited already than may wait.
    QueueFull,
    /// The way to another cluster is not a QUIC trunk, which alone carries datagrams.
    NoTrunk,
}

/// Why a session ended, as the label `kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpEnd {
    /// No datagram for the idle timeout.
    Idle,
    /// Its host left the cluster, or is not healthy while another is.
    HostGone,
    /// Its listener or cluster changed or is gone.
    Reconfigured,
    /// What carried it ended.
    ConnectionLost,
}

const HOPS: [&str; 4] = ["downstream_rx", "downstream_tx", "upstream_rx", "upstream_tx"];
const DROPS: [&str; 14] = [
    "no_cluster",
    "no_host",
    "cluster_limit",
    "session_limit",
    "truncated",
    "receive_error",
    "send_error",
    "no_route",
    "not_quic",
    "unreachable",
    "denied",
    "too_large",
    "queue_full",
    "no_trunk",
];
const ENDS: [&str; 4] = ["idle", "host_gone", "reconfigured", "connection_lost"];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    stat_prefix: Arc<str>,
    cluster: Arc<str>,
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Plain {
    stat_prefix: Arc<str>,
    cluster: Arc<str>,
}

/// The families. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct UdpMetrics {
    opened: Family<Plain, Counter>,
    closed: Family<Labels, Counter>,
    datagrams: Family<Labels, Counter>,
    bytes: Family<Labels, Counter>,
    dropped: Family<Labels, Counter>,
}

/// One listener's counters to one cluster.
#[derive(Debug, Clone)]
pub struct UdpSeries {
    /// `flotilla_udp_sessions_opened_total`.
    pub opened: Counter,
    closed: [Counter; ENDS.len()],
    datagrams: [Counter; HOPS.len()],
    bytes: [Counter; HOPS.len()],
    dropped: [Counter; DROPS.len()],
}

impl UdpSeries {
    /// A datagram passed.
    pub fn passed(&self, hop: UdpHop, bytes: usize) {
        self.datagrams[hop as usize].inc();
        self.bytes[hop as usize].inc_by(bytes as u64);
    }

    /// A datagram went nowhere.
    pub fn dropped(&self, why: UdpDrop) {
        self.dropped[why as usize].inc();
    }

    /// A session ended.
    pub fn closed(&self, why: UdpEnd) {
        self.closed[why as usize].inc();
    }
}

impl UdpMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("flotilla_udp_sessions_opened", "UDP sessions opened", self.opened.clone());
        registry.register("flotilla_udp_sessions_closed", "UDP sessions ended, by why", self.closed.clone());
        registry.register(
            "flotilla_udp_datagrams",
            "Datagrams, by where they were seen",
            self.datagrams.clone(),
        );
        registry.register(
            "flotilla_udp_bytes",
            "Bytes of datagrams, by where they were seen",
            self.bytes.clone(),
        );
        registry.register(
            "flotilla_udp_dropped",
            "Datagrams that went nowhere, by why",
            self.dropped.clone(),
        );
    }

    pub(super) fn series(&self, stat_prefix: &str, cluster: &str) -> UdpSeries {
        let (stat_prefix, cluster): (Arc<str>, Arc<str>) = (Arc::from(stat_prefix), Arc::from(cluster));
        let of = |f: &Family<Labels, Counter>, kind| {
            let labels =
                Labels { stat_prefix: Arc::clone(&stat_prefix), cluster: Arc::clone(&cluster), kind };
            f.get_or_create_owned(&labels)
        };
        UdpSeries {
            closed: ENDS.map(|k| of(&self.closed, k)),
            datagrams: HOPS.map(|k| of(&self.datagrams, k)),
            bytes: HOPS.map(|k| of(&self.bytes, k)),
            dropped: DROPS.map(|k| of(&self.dropped, k)),
            opened: self.opened.get_or_create_owned(&Plain { stat_prefix, cluster }),
        }
    }
}
