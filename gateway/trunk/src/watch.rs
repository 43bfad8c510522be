//! Noticing that a network stopped passing UDP.
//!
//! QUIC itself gives up after its idle timeout, far too late. A shorter one would end every session in
//! an outage of a second, which TCP survives. So silence alone is only a suspicion; if TCP reaches the
//! peer while QUIC is silent, UDP is what is blocked, and the connection is closed so that its
//! sessions start again over TCP.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use quinn::Connection;
use tokio::net::TcpStream;

/// Pings while there is nothing else to send; far below what NAT bindings need, too.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_millis(400);
/// Two lost pings and a late answer to the third.
const SILENCE: Duration = Duration::from_millis(1000);
const TICK: Duration = Duration::from_millis(100);
/// With silence and tick it stays below the two seconds in which TCP must have taken over.
const PROBE: Duration = Duration::from_millis(700);

/// Answers when UDP to the peer is blocked; `false` if the connection ended otherwise.
pub(crate) async fn blocked(connection: &Connection, address: SocketAddr) -> bool {
    let mut seen = connection.stats().udp_rx.datagrams;
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            _ = connection.closed() => return false,
            () = tokio::time::sleep(TICK) => {}
        }
        let now = connection.stats().udp_rx.datagrams;
        if now != seen {
            (seen, heard) = (now, Instant::now());
            continue;
        }
        if heard.elapsed() < SILENCE {
            continue;
        }
        let reached = tokio::time::timeout(PROBE, TcpStream::connect(address)).await;
        if matches!(reached, Ok(Ok(_))) && connection.stats().udp_rx.datagrams == seen {
            return true;
        }
        // An outage of everything, or over: look again after as long a silence.
        heard = Instant::now();
    }
}
