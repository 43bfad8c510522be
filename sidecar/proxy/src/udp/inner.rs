//! Datagrams between two proxies of the mesh: a connection of QUIC, whose ends are the caller's proxy and the workload's,
//! carries those of many sessions.
//!
//! 1. It is mutual TLS 1.3 with the workloads' certificates, under the server name and the rules that a TCP connection
//!    would have. What is in between, gateways and trunks, passes packets on that it cannot read.
//! 2. A datagram is a DATAGRAM frame (RFC 9221), so none waits for another one that was lost, and none is sent twice. The
//!    number of its session stands in front ([`mesh_model::flow`]).
//! 3. One that is longer than such a frame may be goes on a unidirectional stream of its own, on which lost packets are
//!    repeated; at most [`STREAMS`] at once, the rest is dropped and counted.
//! 4. A worker has one connection to a host. It is made for the first session and closed when there was none for a while.
//! 5. A handshake that fails says something about the host: what waited for it goes to another one, twice at most. A
//!    connection that breaks ends its sessions; the clients' next datagrams begin new ones, with a host that is there.

pub(crate) mod client;
pub(crate) mod server;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::FutureExt as _;
use mesh_model::flow;
use mesh_telemetry::metrics::UdpDrop;
use quinn::{Connection, IdleTimeout, RecvStream, SendStream, TransportConfig, VarInt};

/// Datagrams on streams of their own, in each direction.
const STREAMS: u32 = 64;
/// What a stream may carry: the longest datagram that UDP has.
const LONGEST: usize = flow::HEADER + 65_507;
/// A stream that takes longer is of no use to anybody any more.
const STREAM_PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of datagrams that wait in each direction; the oldest make room.
const BUFFER: usize = 512 * 1024;
/// Pings while nothing else is sent, and the silence after which the peer is gone: sessions begin anew elsewhere, which
/// costs UDP little, so that they need not wait for long.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(4);
/// First guess of a round trip; QUIC's own third of a second would let a lost first packet wait for a second.
const FIRST_RTT: Duration = Duration::from_millis(100);

/// Reasons of a close.
const UNUSED: VarInt = VarInt::from_u32(0);
/// The workload's rules do not let this caller in.
const DENIED: VarInt = VarInt::from_u32(1);
/// The proxy's configuration changed, or it ends: come again.
const LEAVING: VarInt = VarInt::from_u32(2);

/// Settings of both ends.
pub(crate) fn transport() -> TransportConfig {
    let mut t = TransportConfig::default();
    t.max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(STREAMS))
        .stream_receive_window(VarInt::from_u32(128 * 1024))
        .receive_window(VarInt::from_u32(1 << 20))
        .send_window(1 << 20)
        .datagram_receive_buffer_size(Some(BUFFER))
        .datagram_send_buffer_size(BUFFER)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(IdleTimeout::try_from(SILENCE).ok())
        .initial_rtt(FIRST_RTT)
        // Applications' datagrams cannot be slowed down, only dropped: a window that halves at each loss would.
        .congestion_controller_factory(Arc::new(quinn::congestion::BbrConfig::default()));
    t
}

/// Sends a datagram of a session, now or never.
fn transmit(c: &Connection, id: u64, data: &[u8]) -> Result<(), UdpDrop> {
    let frame = Bytes::from(flow::data(id, data));
    if c.max_datagram_size().is_some_and(|most| frame.len() <= most) {
        let crowded = c.datagram_send_buffer_space() < frame.len();
        c.send_datagram(frame).map_err(|_| UdpDrop::SendError)?;
        // Older ones went for it.
        return if crowded { Err(UdpDrop::QueueFull) } else { Ok(()) };
    }
    match c.open_uni().now_or_never() {
        Some(Ok(stream)) => {
            // As many as there may be streams.
            tokio::task::spawn_local(tokio::time::timeout(STREAM_PATIENCE, write(stream, frame)));
            Ok(())
        }
        Some(Err(_)) => Err(UdpDrop::SendError),
        None => Err(UdpDrop::QueueFull),
    }
}

async fn write(mut stream: SendStream, frame: Bytes) {
    if stream.write_all(&frame).await.is_ok() && stream.finish().is_ok() {
        // Dropping it before would reset it; what the peer says does not matter.
        let _ = stream.stopped().await;
    }
}

/// The datagram that a stream carries.
async fn read(mut stream: RecvStream) -> Option<Vec<u8>> {
    tokio::time::timeout(STREAM_PATIENCE, stream.read_to_end(LONGEST)).await.ok()?.ok()
}
