//! Noticing that a network stopped passing UDP, or that the peer died without a word.
//!
//! QUIC itself gives up after its idle timeout, far too late. A shorter one would end every session in
//! an outage of a second, which TCP survives. So silence alone is only a suspicion, and TCP says what it
//! means. If TCP reaches the peer while QUIC is silent, UDP is what is blocked, and the connection is
//! closed so that its sessions start again over TCP. If the peer's host refuses TCP, nobody is there
//! any more: sessions end now, as those over TCP do when a process dies.

use std::{
    io,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
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

/// Why a silent connection is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// TCP reaches the peer, UDP does not.
    Blocked,
    /// The host answers, the gateway does not exist any more.
    Gone,
}

/// Answers when the connection should be given up; `None` if it ended otherwise. While nothing is heard `silent` is
/// set. Only where the peer has an `address` that can be
/// dialled: elsewhere nothing tells an outage from its end.
pub(crate) async fn lost(
    connection: &Connection,
    address: impl Fn() -> Option<SocketAddr>,
    silent: &AtomicBool,
) -> Option<Lost> {
    let mut seen = connection.stats().udp_rx.datagrams;
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            _ = connection.closed() => return None,
            () = tokio::time::sleep(TICK) => {}
        }
        let now = connection.stats().udp_rx.datagrams;
        if now != seen {
            (seen, heard) = (now, Instant::now());
            silent.store(false, Relaxed);
            continue;
        }
        if heard.elapsed() < SILENCE {
            continue;
        }
        silent.store(true, Relaxed);
        let Some(address) = address() else { continue };
        let reached = tokio::time::timeout(PROBE, TcpStream::connect(address)).await;
        if connection.stats().udp_rx.datagrams == seen {
            match reached {
                Ok(Ok(_)) => return Some(Lost::Blocked),
                Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => return Some(Lost::Gone),
                _ => {}
            }
        }
        // An outage of everything, or over: look again after as long a silence.
        heard = Instant::now();
    }
}
