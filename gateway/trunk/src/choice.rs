//! What carries new sessions to a peer's gateway: QUIC, or TCP where QUIC buys nothing.
//!
//! On a short path that loses nothing TCP costs a fraction of what QUIC costs (`e2e/bench/RESULTS.md`), and there is no
//! loss that sessions could suffer from together. The connection of QUIC stays up beside it: it measures the path, carries
//! datagrams, tells that a gateway drains, and notices silence. Open sessions stay on what they began on.
//!
//! Loss is taken from quiet seconds alone. In busy ones it may be of our own making, a full queue, and says nothing about
//! the path; so a link that is busy from its first second on stays with QUIC. While sessions come, probes (datagrams without a
//! byte) make quiet seconds tell something.

use std::{
    collections::VecDeque,
    fmt,
    net::SocketAddr,
    str::FromStr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::net::TcpStream;

use crate::{Carrier, endpoint::Inner, links::Link};

/// The choice is made anew this often.
const LOOK: Duration = Duration::from_secs(1);
/// Looks that are remembered.
const WINDOW: usize = 20;
/// From one probe to the next.
const PROBE: Duration = Duration::from_millis(50);
/// A link without a new session for as long is not probed.
const USED: Duration = Duration::from_secs(600);
/// Packets in a second above which the link is busy: 6 Mbit/s of full ones.
const BUSY: u64 = 500;
/// Packets of quiet seconds without which nothing is known: most of a window of probes.
const ENOUGH: u64 = 300;
/// A round trip up to this is short: zones of a region, and its neighbours.
const SHORT: Duration = Duration::from_millis(10);
/// Loss up to one packet in as many is none; TCP is left at one in [`LOSSY`].
const CLEAN: u64 = 1000;
const LOSSY: u64 = 200;
/// Fewer than these are chance.
const LOST: u64 = 3;
/// Looks in a row with a round trip of more than twice [`SHORT`] after which TCP is left.
const LONG: usize = 5;
/// After TCP was left it is not chosen again for as long, twice as long each time, up to [`LONGEST_HOLD`].
const HOLD: Duration = Duration::from_secs(60);
const LONGEST_HOLD: Duration = Duration::from_secs(960);
/// TCP that was well for as long makes up for what was before.
const FORGIVEN: Duration = Duration::from_secs(1800);
/// A connection that takes longer on a short path does not get through.
pub(crate) const PATIENCE: Duration = Duration::from_millis(500);

/// Why what was asked for is done.
pub(crate) const SET: &str = "set by --trunk-transport";

/// What carries new sessions to a peer's gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// TCP where the path was measured to be short and to lose nothing, else QUIC.
    #[default]
    Auto,
    /// QUIC; TCP only where UDP does not pass.
    Quic,
    /// TCP; QUIC only for UDP services, and where the peer cannot be dialled.
    Tcp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        })
    }
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "quic" => Ok(Self::Quic),
            "tcp" => Ok(Self::Tcp),
            _ => Err(format!("unsupported transport {s:?}: auto, quic or tcp")),
        }
    }
}

/// What a connection of QUIC has counted since it began.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    pub(crate) sent: u64,
    pub(crate) lost: u64,
    /// Smoothed.
    pub(crate) rtt: Duration,
}

/// Decides for one link.
#[derive(Debug)]
pub(crate) struct Judge {
    carrier: Carrier,
    since: Instant,
    last: Seen,
    /// Packets of a look and those lost, both 0 if it was busy; and its round trip.
    looks: VecDeque<(u64, u64, Duration)>,
    not_before: Instant,
    returns: u32,
}

impl Judge {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            carrier: Carrier::Quic,
            since: now,
            last: Seen::default(),
            looks: VecDeque::new(),
            not_before: now,
            returns: 0,
        }
    }

    /// Decides by what was counted since the last time.
    pub(crate) fn look(&mut self, now: Instant, seen: Seen) -> Carrier {
        let sent = seen.sent.saturating_sub(self.last.sent);
        let lost = seen.lost.saturating_sub(self.last.lost);
        self.last = seen;
        self.looks.push_back(if sent > BUSY { (0, 0, seen.rtt) } else { (sent, lost, seen.rtt) });
        if self.looks.len() > WINDOW {
            self.looks.pop_front();
        }
        let (sent, lost) = self.counted();
        match self.carrier {
            Carrier::Quic => {
                let clean = sent >= ENOUGH && lost * CLEAN <= sent;
                if clean && self.is_short() && now >= self.not_before {
                    (self.carrier, self.since) = (Carrier::Tcp, now);
                }
            }
            Carrier::Tcp => {
                let lossy = lost >= LOST && lost * LOSSY > sent;
                let long = self.looks.len() >= LONG
                    && self.looks.iter().rev().take(LONG).all(|(_, _, rtt)| *rtt > SHORT * 2);
                if lossy || long {
                    self.leave_tcp(now);
                }
            }
        }
        self.carrier
    }

    /// TCP is left, by what was measured or since it does not get through.
    pub(crate) fn leave_tcp(&mut self, now: Instant) {
        if now.saturating_duration_since(self.since) > FORGIVEN {
            self.returns = 0;
        }
        let hold = HOLD.saturating_mul(1 << self.returns.min(8)).min(LONGEST_HOLD);
        self.returns = self.returns.saturating_add(1);
        (self.carrier, self.since, self.not_before) = (Carrier::Quic, now, now + hold);
    }

    /// Why, in words for people.
    pub(crate) fn why(&self, now: Instant) -> String {
        let (sent, lost) = self.counted();
        let ms = self.rtt().as_secs_f64() * 1e3;
        match self.carrier {
            Carrier::Tcp => format!("short and clean ({ms:.1} ms, {lost} of {sent} packets lost)"),
            Carrier::Quic if !self.is_short() => format!("{ms:.1} ms away"),
            Carrier::Quic if lost > 0 => format!("{lost} of {sent} packets lost"),
            Carrier::Quic if now < self.not_before => {
                let left = self.not_before.saturating_duration_since(now).as_secs();
                format!("TCP had to be left, and is not tried again for {left} s")
            }
            Carrier::Quic => format!("not measured enough: {sent} of {ENOUGH} packets in quiet seconds"),
        }
    }

    /// What was sent and lost in quiet seconds of the window.
    fn counted(&self) -> (u64, u64) {
        self.looks.iter().fold((0, 0), |(sent, lost), l| (sent + l.0, lost + l.1))
    }

    /// The least smoothed round trip of the window: the path's, not the queue's.
    fn rtt(&self) -> Duration {
        self.looks.iter().map(|l| l.2).min().unwrap_or_default()
    }

    fn is_short(&self) -> bool {
        self.rtt() <= SHORT
    }
}

/// Measures a link and chooses for it, for as long as it is polled.
pub(crate) async fn measure(inner: &Arc<Inner>, link: &Arc<Link>) {
    let address = match (link.dialled, inner.options.transport.of(Some(&link.cluster))) {
        (Some(address), Transport::Auto) => address,
        (None, _) => {
            link.choose(Carrier::Quic, "the peer dialled".to_owned());
            return std::future::pending().await;
        }
        (Some(_), _) => {
            link.choose(Carrier::Quic, SET.to_owned());
            return std::future::pending().await;
        }
    };
    let mut judge = Judge::new(Instant::now());
    let (mut used, mut total, mut next) = (Instant::now(), 0, Instant::now() + LOOK);
    loop {
        let probing = link.datagrams && used.elapsed() < USED;
        tokio::time::sleep(if probing { PROBE } else { LOOK }).await;
        if probing {
            // What is lost of them is the figure.
            let _ = link.connection.send_datagram(Bytes::new());
        }
        let now = Instant::now();
        if now < next {
            continue;
        }
        next = now + LOOK;
        let sessions = link.sessions.total.load(Relaxed) + inner.links.tcp(address).total.load(Relaxed);
        if sessions != total {
            (used, total) = (now, sessions);
        }
        let before = judge.carrier;
        if before == Carrier::Tcp && !link.prefers_tcp() {
            // A session found it closed.
            judge.leave_tcp(now);
            continue;
        }
        let s = link.connection.stats().path;
        let after = judge.look(now, Seen { sent: s.sent_packets, lost: s.lost_packets, rtt: s.rtt });
        if (before, after) == (Carrier::Quic, Carrier::Tcp) && !reached(address).await {
            judge.leave_tcp(now);
            link.choose(Carrier::Quic, "TCP does not get through".to_owned());
            continue;
        }
        let why = judge.why(now);
        if before != after {
            tracing::info!(%address, cluster = %link.cluster, carrier = ?after, why, "new sessions change carrier");
        }
        if after == Carrier::Tcp {
            inner.links.choose_tcp(address, &why);
        } else if before == Carrier::Tcp {
            inner.links.leave_tcp(address);
        }
        link.choose(after, why);
    }
}

async fn reached(address: SocketAddr) -> bool {
    matches!(tokio::time::timeout(PATIENCE, TcpStream::connect(address)).await, Ok(Ok(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link that is looked at, second by second.
    struct World {
        judge: Judge,
        now: Instant,
        seen: Seen,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            Self { judge: Judge::new(now), now, seen: Seen::default() }
        }

        /// So many seconds, each with packets and losses; answers how many passed until the carrier was `until`.
        fn pass(&mut self, seconds: u64, each: (u64, u64), rtt_ms: f64, until: Carrier) -> Option<u64> {
            for s in 1..=seconds {
                self.now += LOOK;
                self.seen.sent += each.0;
                self.seen.lost += each.1;
                self.seen.rtt = Duration::from_secs_f64(rtt_ms / 1e3);
                if self.judge.look(self.now, self.seen) == until {
                    return Some(s);
                }
            }
            None
        }

        fn why(&self) -> String {
            self.judge.why(self.now)
        }
    }

    #[test]
    fn a_short_clean_path_takes_tcp_when_enough_is_known() {
        let mut w = World::new();
        assert_eq!(w.pass(60, (22, 0), 0.4, Carrier::Tcp), Some(14));
        assert_eq!(w.why(), "short and clean (0.4 ms, 0 of 308 packets lost)");
        // Without probes too little is ever known.
        let mut w = World::new();
        assert_eq!(w.pass(600, (3, 0), 0.4, Carrier::Tcp), None);
        assert_eq!(w.why(), "not measured enough: 60 of 300 packets in quiet seconds");
    }

    #[test]
    fn a_long_or_lossy_path_keeps_quic() {
        let mut w = World::new();
        assert_eq!(w.pass(600, (22, 0), 20.0, Carrier::Tcp), None);
        assert_eq!(w.why(), "20.0 ms away");
        let mut w = World::new();
        for _ in 0..100 {
            assert_eq!(w.pass(4, (22, 0), 0.4, Carrier::Tcp), None);
            assert_eq!(w.pass(1, (22, 1), 0.4, Carrier::Tcp), None);
        }
        assert_eq!(w.why(), "4 of 440 packets lost");
    }

    #[test]
    fn loss_of_our_own_making_is_no_loss_of_the_path() {
        let mut w = World::new();
        // Busy from the start: nothing is known, and QUIC stays.
        assert_eq!(w.pass(100, (5000, 50), 0.4, Carrier::Tcp), None);
        assert_eq!(w.pass(40, (22, 0), 0.4, Carrier::Tcp), Some(14));
        assert_eq!(w.pass(100, (5000, 50), 0.4, Carrier::Quic), None);
    }

    #[test]
    fn loss_or_delay_brings_quic_back_and_a_flapping_path_keeps_it() {
        let mut w = World::new();
        w.pass(60, (22, 0), 0.4, Carrier::Tcp).unwrap();
        // Two packets are chance.
        assert_eq!(w.pass(2, (22, 1), 0.4, Carrier::Quic), None);
        assert_eq!(w.pass(1, (22, 1), 0.4, Carrier::Quic), Some(1));
        assert_eq!(w.pass(60, (22, 0), 0.4, Carrier::Tcp), Some(60));
        assert_eq!(w.pass(10, (22, 0), 40.0, Carrier::Quic), Some(LONG as u64));
        assert_eq!(w.pass(60, (22, 0), 0.4, Carrier::Tcp), None);
        assert!(w.why().starts_with("TCP had to be left"), "{}", w.why());
        assert_eq!(w.pass(100, (22, 0), 0.4, Carrier::Tcp), Some(60));
        for _ in 0..20 {
            w.judge.leave_tcp(w.now);
        }
        assert_eq!(w.judge.not_before - w.now, LONGEST_HOLD);
        // Half an hour without a fault is forgiven.
        w.pass(2000, (22, 0), 0.4, Carrier::Tcp).unwrap();
        assert_eq!(w.pass(1900, (22, 0), 0.4, Carrier::Quic), None);
        w.judge.leave_tcp(w.now);
        assert_eq!(w.judge.not_before - w.now, HOLD);
    }
}
