//! Settings of QUIC: what a connection may hold, how often it acknowledges, and how large its packets are.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use quinn::{MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::{
    congestion::{self, Chosen},
    watch::KEEP_ALIVE,
};

/// A connection without a packet from the peer for this long is dead.
const IDLE: Duration = Duration::from_secs(20);
/// Sessions that a peer may have open at once on one connection.
const STREAMS: u32 = 8192;
/// Notices that a peer may have under way at once.
const NOTICES: u32 = 4;
/// Bytes of datagrams that wait in each direction; the oldest make room, so that what is late is lost rather than later.
const DATAGRAMS: usize = 1 << 20;
/// The largest payload of a UDP datagram over IPv4 (RFC 768, RFC 791).
pub(crate) const LARGEST: u16 = 65_507;
/// Of a packet in a network that says nothing about itself: Ethernet.
const USUAL_MTU: u32 = 1500;
const UDP_HEADER: u32 = 8;

/// Settings of the connections to one address.
pub(crate) fn transport(congestion: Arc<Chosen>, peer: SocketAddr) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(largest_payload(peer));
    let mut t = TransportConfig::default();
    t.max_concurrent_bidi_streams(VarInt::from_u32(STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(NOTICES))
        .keep_alive_interval(Some(KEEP_ALIVE))
        // Both constants are far below QUIC's limit of 2^62 ms.
        .max_idle_timeout(quinn::IdleTimeout::try_from(IDLE).ok())
        // One session may not starve the others: 1 MiB each, 16 MiB together.
        .stream_receive_window(VarInt::from_u32(1 << 20))
        .receive_window(VarInt::from_u32(16 << 20))
        .send_window(16 << 20)
        .datagram_receive_buffer_size(Some(DATAGRAMS))
        .datagram_send_buffer_size(DATAGRAMS)
        .ack_frequency_config(Some(congestion::acks()))
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(congestion);
    Arc::new(t)
}

/// The largest UDP payload that the way to `peer` may carry, for all that the kernel knows: the device's MTU, or what
/// it has learned of the path. Discovery looks no further, since a probe that the device refuses is lost for nothing;
/// whether the path carries it, discovery finds out.
fn largest_payload(peer: SocketAddr) -> u16 {
    let header = UDP_HEADER + if peer.is_ipv4() { 20 } else { 40 };
    let mtu = path_mtu(peer).unwrap_or(USUAL_MTU);
    u16::try_from(mtu.saturating_sub(header)).unwrap_or(LARGEST).clamp(1200, LARGEST)
}

fn path_mtu(peer: SocketAddr) -> Option<u32> {
    let any = match peer {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    // Connecting sends nothing; it looks the route up.
    let probe = UdpSocket::bind((any, 0)).ok()?;
    probe.connect(peer).ok()?;
    let mtu = match peer {
        SocketAddr::V4(_) => rustix::net::sockopt::ip_mtu(&probe),
        SocketAddr::V6(_) => rustix::net::sockopt::ipv6_mtu(&probe),
    };
    mtu.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_as_large_as_the_device_allows() {
        let device: u32 = std::fs::read_to_string("/sys/class/net/lo/mtu").unwrap().trim().parse().unwrap();
        let expected = u16::try_from(device - 28).unwrap_or(LARGEST).min(LARGEST);
        assert_eq!(largest_payload("127.0.0.1:15443".parse().unwrap()), expected);
    }
}
