//! Figures of trunks for a scrape, made when it comes.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        gauge::ConstGauge,
    },
    registry::Registry,
};

use crate::{
    links::{Carrier, LinkStatus, Links, Totals},
    socket::SocketStatus,
};

/// Counters of a trunk, and what its links are read from.
#[derive(Debug, Clone, Default)]
pub struct TrunkMetrics {
    /// Sessions opened over QUIC.
    pub quic_sessions: Counter,
    /// Sessions opened over TCP because QUIC did not get through.
    pub tcp_sessions: Counter,
    /// Sessions accepted from peers.
    pub accepted_sessions: Counter,
    /// QUIC handshakes that failed, and connections that stopped reaching their peer.
    pub quic_failures: Counter,
    /// Flows of datagrams opened.
    pub flows: Counter,
    /// Flows of datagrams that peers opened.
    pub accepted_flows: Counter,
    /// Datagrams that were not sent, not taken or of no flow.
    pub dropped_datagrams: Counter,
    pub(crate) links: Arc<Links>,
    pub(crate) socket: Arc<OnceLock<SocketStatus>>,
}

impl TrunkMetrics {
    /// Registers everything as `flotilla_trunk_*`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        let r = registry.sub_registry_with_prefix("flotilla_trunk");
        r.register("quic_sessions", "Sessions opened over QUIC", m.quic_sessions.clone());
        r.register("tcp_sessions", "Sessions opened over TCP for want of QUIC", m.tcp_sessions.clone());
        r.register("accepted_sessions", "Sessions accepted from peers", m.accepted_sessions.clone());
        r.register("quic_failures", "QUIC handshakes that failed", m.quic_failures.clone());
        r.register("flows", "Flows of datagrams opened", m.flows.clone());
        r.register("accepted_flows", "Flows of datagrams accepted from peers", m.accepted_flows.clone());
        r.register(
            "dropped_datagrams",
            "Datagrams that were not sent, not taken or of no flow",
            m.dropped_datagrams.clone(),
        );
        r.register_collector(Box::new(Scrape { links: m.links.clone(), socket: m.socket.clone() }));
        m
    }
}

#[derive(Debug)]
struct Scrape {
    links: Arc<Links>,
    socket: Arc<OnceLock<SocketStatus>>,
}

/// Connections of one peer together.
#[derive(Debug, Default)]
struct Peer {
    connections: u64,
    sessions: u64,
    worst_rtt: f64,
    least_mtu: Option<u16>,
    window: u64,
}

impl Scrape {
    fn peers(&self) -> (std::collections::BTreeMap<String, Peer>, u64) {
        let (mut peers, mut tcp) = (std::collections::BTreeMap::<String, Peer>::new(), 0);
        for l in self.links.status() {
            let LinkStatus { cluster: Some(cluster), transport: Carrier::Quic, .. } = &l else {
                tcp += l.sessions;
                continue;
            };
            let p = peers.entry(cluster.to_string()).or_default();
            p.connections += 1;
            p.sessions += l.sessions;
            p.worst_rtt = p.worst_rtt.max(l.rtt_ms.unwrap_or_default() / 1e3);
            p.least_mtu = p.least_mtu.into_iter().chain(l.mtu).min();
            p.window += l.congestion_window.unwrap_or_default();
        }
        (peers, tcp)
    }
}

fn family<V: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    kind: MetricType,
    values: impl Iterator<Item = (String, V)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
    for (cluster, value) in values {
        value.encode(metric.encode_family(&[("cluster", cluster)])?)?;
    }
    Ok(())
}

impl Collector for Scrape {
    fn encode(&self, mut e: DescriptorEncoder<'_>) -> fmt::Result {
        let (peers, tcp) = self.peers();
        let gauges: [(&str, &str, fn(&Peer) -> f64); 5] = [
            ("connections", "Open QUIC connections with a peer cluster", |p| p.connections as f64),
            ("sessions", "Sessions open over QUIC", |p| p.sessions as f64),
            ("rtt_seconds", "Smoothed round trip of the slowest connection", |p| p.worst_rtt),
            ("mtu_bytes", "Least path MTU of the connections", |p| f64::from(p.least_mtu.unwrap_or(0))),
            ("congestion_window_bytes", "Congestion windows together", |p| p.window as f64),
        ];
        for (name, help, value) in gauges {
            let values = peers.iter().map(|(c, p)| (c.clone(), ConstGauge::new(value(p))));
            family(&mut e, name, help, MetricType::Gauge, values)?;
        }
        let totals = self.links.totals();
        let counters: [(&str, &str, fn(&Totals) -> u64); 4] = [
            ("sent_bytes", "UDP payload sent to a peer cluster", |t| t.sent),
            ("received_bytes", "UDP payload received from a peer cluster", |t| t.received),
            ("sent_packets", "Packets sent to a peer cluster", |t| t.packets),
            ("lost_packets", "Packets to a peer cluster that were given up", |t| t.lost),
        ];
        for (name, help, value) in counters {
            let values = totals.iter().map(|(c, t)| (c.to_string(), ConstCounter::new(value(t))));
            family(&mut e, name, help, MetricType::Counter, values)?;
        }
        let tcp = i64::try_from(tcp).unwrap_or(i64::MAX);
        let mut own = vec![("tcp_open_sessions", "Sessions open over TCP", tcp)];
        if let Some(s) = self.socket.get() {
            let n = |v: usize| i64::try_from(v).unwrap_or(i64::MAX);
            own.extend([
                ("udp_segments", "Datagrams that one system call sends; 1: no offload", n(s.segments)),
                ("receive_buffer_bytes", "SO_RCVBUF that the kernel granted", n(s.receive_buffer)),
                ("send_buffer_bytes", "SO_SNDBUF that the kernel granted", n(s.send_buffer)),
                ("wanted_buffer_bytes", "Buffers that were asked for", n(s.wanted_buffer)),
            ]);
        }
        for (name, help, value) in own {
            ConstGauge::new(value).encode(e.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}
