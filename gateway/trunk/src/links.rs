//! What is connected to whom: every QUIC connection, the addresses where TCP stands in, and their figures.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use mesh_model::ClusterId;
use quinn::Connection;
use serde::Serialize;
use tokio::sync::Notify;

use crate::{congestion::Chosen, flows::Flows};

/// Addresses whose TCP figures are kept; more than a federation has, less than a mistake could make.
const ADDRESSES: usize = 65_536;

/// What carries sessions over a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Carrier {
    /// A QUIC connection.
    Quic,
    /// TCP connections, one for each session.
    Tcp,
}

/// Who opened a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Opener {
    /// This gateway dialled.
    Us,
    /// The peer's gateway dialled.
    Peer,
}

/// A link as it is now. Figures of the path are of the direction from this gateway.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkStatus {
    /// The peer's cluster, from its certificate; unknown over TCP, which says nothing before the inner session.
    pub cluster: Option<ClusterId>,
    /// The peer's gateway.
    pub address: SocketAddr,
    /// What carries it.
    pub transport: Carrier,
    /// Who dialled.
    pub opener: Opener,
    /// Seconds since the epoch.
    pub since: u64,
    /// Sessions that are open now.
    pub sessions: u64,
    /// Sessions of its whole life.
    pub sessions_total: u64,
    /// The peer's gateway ends soon: no new session goes there.
    pub draining: bool,
    /// Nothing was heard for a second: no new session goes there if there is another way.
    pub silent: bool,
    /// Smoothed round trip, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    /// Least round trip, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_rtt_ms: Option<f64>,
    /// Packets sent, and those given up as lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets_sent: Option<u64>,
    /// Of those, given up as lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets_lost: Option<u64>,
    /// Largest UDP payload of the path, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Congestion window, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub congestion_window: Option<u64>,
    /// Bytes sent; over QUIC UDP payload, over TCP of sessions.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Congestion control in the direction from this gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub congestion: Option<String>,
    /// Why TCP carries it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_tcp: Option<String>,
    /// What carries new sessions, of a connection of QUIC: TCP may be cheaper, see [`crate::Transport`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_sessions: Option<Carrier>,
    /// And why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choice: Option<String>,
    /// TCP was chosen here, and does not stand in.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub chosen: bool,
}

/// Counters of sessions that share a link.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    pub(crate) open: AtomicU64,
    pub(crate) total: AtomicU64,
    /// Of TCP only; QUIC counts for itself.
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
}

impl Sessions {
    /// Counts a session until the answer is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Session {
        self.open.fetch_add(1, Relaxed);
        self.total.fetch_add(1, Relaxed);
        Session(self.clone())
    }
}

/// A session in the counts.
#[derive(Debug)]
pub(crate) struct Session(Arc<Sessions>);

impl Session {
    pub(crate) fn sent(&self, bytes: usize) {
        self.0.sent.fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.0.received.fetch_add(bytes as u64, Relaxed);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// A QUIC connection to a gateway of a member.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) connection: Connection,
    pub(crate) cluster: ClusterId,
    /// Where it was dialled, if by us; the peer may move, this names the entry.
    pub(crate) dialled: Option<SocketAddr>,
    draining: AtomicBool,
    drained: Notify,
    pub(crate) silent: AtomicBool,
    /// It ends soon, since the peer is no member any more.
    leaving: AtomicBool,
    /// Whether the peer takes sessions on a connection that it dialled, and notices.
    pub(crate) both_ways: bool,
    /// Whether the peer takes flows of datagrams.
    pub(crate) datagrams: bool,
    pub(crate) flows: Flows,
    pub(crate) sessions: Arc<Sessions>,
    congestion: Arc<Chosen>,
    /// TCP carries new sessions to the address that was dialled.
    tcp: AtomicBool,
    choice: Mutex<String>,
    since: SystemTime,
}

impl Link {
    pub(crate) fn new(
        connection: Connection,
        cluster: ClusterId,
        dialled: Option<SocketAddr>,
        both_ways: bool,
        datagrams: bool,
        congestion: Arc<Chosen>,
    ) -> Self {
        Self {
            connection,
            cluster,
            dialled,
            draining: AtomicBool::new(false),
            drained: Notify::new(),
            silent: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            both_ways,
            datagrams,
            flows: Flows::default(),
            sessions: Arc::default(),
            congestion,
            tcp: AtomicBool::new(false),
            choice: Mutex::default(),
            since: SystemTime::now(),
        }
    }

    /// Chooses what carries new sessions.
    pub(crate) fn choose(&self, carrier: Carrier, why: String) {
        *self.choice.lock().unwrap_or_else(PoisonError::into_inner) = why;
        self.tcp.store(carrier == Carrier::Tcp, Relaxed);
    }

    /// Whether TCP carries new sessions.
    pub(crate) fn prefers_tcp(&self) -> bool {
        self.tcp.load(Relaxed)
    }

    /// How long it has been there.
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed().unwrap_or_default()
    }

    pub(crate) fn is_open(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    /// Whether sessions may be opened towards the peer at all.
    pub(crate) fn takes_sessions(&self) -> bool {
        self.is_open() && (self.dialled.is_some() || self.both_ways)
    }

    pub(crate) fn draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Notes that the peer's gateway drains; answers whether that is news.
    pub(crate) fn drain(&self) -> bool {
        let news = !self.draining.swap(true, Relaxed);
        self.drained.notify_waiters();
        news
    }

    /// Returns when the peer's gateway has said that it drains.
    pub(crate) async fn until_draining(&self) {
        let told = self.drained.notified();
        if !self.draining() {
            told.await;
        }
    }

    /// Notes that the peer is no member any more; answers whether that is news.
    pub(crate) fn leave(&self) -> bool {
        !self.leaving.swap(true, Relaxed)
    }

    /// It is a member again.
    pub(crate) fn stay(&self) {
        self.leaving.store(false, Relaxed);
    }

    /// Whether a new session is well there.
    pub(crate) fn is_usable(&self) -> bool {
        self.takes_sessions() && !self.draining() && !self.silent.load(Relaxed)
    }

    fn status(&self) -> LinkStatus {
        let s = self.connection.stats();
        let ms = |d: Duration| Some((d.as_secs_f64() * 1e6).round() / 1e3);
        LinkStatus {
            cluster: Some(self.cluster.clone()),
            address: self.dialled.unwrap_or_else(|| self.connection.remote_address()),
            transport: Carrier::Quic,
            opener: if self.dialled.is_some() { Opener::Us } else { Opener::Peer },
            since: unix(self.since),
            sessions: self.sessions.open.load(Relaxed),
            sessions_total: self.sessions.total.load(Relaxed),
            draining: self.draining(),
            silent: self.silent.load(Relaxed),
            rtt_ms: ms(s.path.rtt),
            min_rtt_ms: ms(s.path.min_rtt),
            packets_sent: Some(s.path.sent_packets),
            packets_lost: Some(s.path.lost_packets),
            mtu: Some(s.path.current_mtu),
            congestion_window: Some(s.path.cwnd),
            bytes_sent: s.udp_tx.bytes,
            bytes_received: s.udp_rx.bytes,
            congestion: Some(self.congestion.get().to_string()),
            why_tcp: None,
            new_sessions: Some(if self.prefers_tcp() { Carrier::Tcp } else { Carrier::Quic }),
            choice: Some(self.choice.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            chosen: false,
        }
    }
}

fn unix(t: SystemTime) -> u64 {
    t.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Why TCP is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// QUIC does not get through.
    StandsIn,
    /// It is cheaper, or set so.
    Chosen,
    /// It was chosen; what is open stays.
    Left,
}

/// TCP in place of QUIC towards an address.
#[derive(Debug)]
struct Tcp {
    role: Role,
    /// QUIC is not tried before.
    until: Instant,
    since: SystemTime,
    why: String,
    sessions: Arc<Sessions>,
}

/// Sums over closed connections of a peer, so that counters never fall.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) packets: u64,
    pub(crate) lost: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, c: &Connection) {
        let s = c.stats();
        self.sent += s.udp_tx.bytes;
        self.received += s.udp_rx.bytes;
        self.packets += s.path.sent_packets;
        self.lost += s.path.lost_packets;
    }
}

#[derive(Debug, Default)]
struct State {
    links: Vec<Arc<Link>>,
    tcp: HashMap<SocketAddr, Tcp>,
    closed: BTreeMap<ClusterId, Totals>,
}

impl State {
    fn insert_tcp(&mut self, address: SocketAddr, role: Role, until: Instant, why: String) {
        if self.tcp.len() >= ADDRESSES {
            self.tcp.retain(|_, t| t.until > Instant::now() || t.sessions.open.load(Relaxed) > 0);
        }
        let new = Tcp { role, until, since: SystemTime::now(), why, sessions: Arc::default() };
        self.tcp.insert(address, new);
    }
}

/// All links of a gateway.
#[derive(Debug, Default)]
pub(crate) struct Links(Mutex<State>);

impl Links {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete in itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, link: Arc<Link>) {
        let mut s = self.lock();
        if let Some(a) = link.dialled {
            s.tcp.remove(&a);
        }
        s.links.push(link);
    }

    /// Takes a closed link out; its figures stay in the peer's sums.
    pub(crate) fn remove(&self, link: &Arc<Link>) {
        let mut s = self.lock();
        s.links.retain(|l| !Arc::ptr_eq(l, link));
        s.closed.entry(link.cluster.clone()).or_default().add(&link.connection);
    }

    /// The open connection that was dialled at `address`.
    pub(crate) fn dialled(&self, address: SocketAddr) -> Option<Arc<Link>> {
        let s = self.lock();
        let there = s.links.iter().filter(|l| l.dialled == Some(address) && l.is_open());
        // A gateway that started again has a new one while the old one drains.
        there.min_by_key(|l| l.draining()).cloned()
    }

    /// Open connections that gateways of a cluster dialled.
    pub(crate) fn accepted(&self, cluster: &ClusterId) -> usize {
        let s = self.lock();
        s.links.iter().filter(|l| l.cluster == *cluster && l.dialled.is_none() && l.is_open()).count()
    }

    /// The usable link to a cluster with the fewest sessions.
    pub(crate) fn to_cluster(&self, cluster: &ClusterId) -> Option<Arc<Link>> {
        self.least(|l| l.cluster == *cluster && l.is_usable())
    }

    /// A link to a cluster that is better than none.
    pub(crate) fn last_resort(&self, cluster: &ClusterId) -> Option<Arc<Link>> {
        self.least(|l| l.cluster == *cluster && l.takes_sessions())
    }

    fn least(&self, which: impl Fn(&Link) -> bool) -> Option<Arc<Link>> {
        let s = self.lock();
        s.links.iter().filter(|l| which(l)).min_by_key(|l| l.sessions.open.load(Relaxed)).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Link>> {
        self.lock().links.clone()
    }

    /// Whether QUIC to `address` failed so recently that it is not tried.
    pub(crate) fn on_hold(&self, address: SocketAddr) -> bool {
        self.lock().tcp.get(&address).is_some_and(|t| t.until > Instant::now())
    }

    /// Lets TCP stand in for `hold`.
    pub(crate) fn hold(&self, address: SocketAddr, hold: Duration, why: String) {
        let mut s = self.lock();
        let until = Instant::now() + hold;
        if let Some(t) = s.tcp.get_mut(&address) {
            (t.role, t.until, t.why) = (Role::StandsIn, until, why);
            return;
        }
        s.insert_tcp(address, Role::StandsIn, until, why);
    }

    /// TCP is chosen, though QUIC gets through or was not asked.
    pub(crate) fn choose_tcp(&self, address: SocketAddr, why: &str) {
        let mut s = self.lock();
        match s.tcp.get_mut(&address) {
            Some(t) if t.role == Role::Chosen && t.why == why => {}
            Some(t) => (t.role, t.why) = (Role::Chosen, why.to_owned()),
            None => s.insert_tcp(address, Role::Chosen, Instant::now(), why.to_owned()),
        }
    }

    /// It is not chosen any more.
    pub(crate) fn leave_tcp(&self, address: SocketAddr) {
        if let Some(t) = self.lock().tcp.get_mut(&address).filter(|t| t.role == Role::Chosen) {
            (t.role, t.why) = (Role::Left, "begun when TCP was chosen".to_owned());
        }
    }

    /// Counts of TCP sessions to `address`.
    pub(crate) fn tcp(&self, address: SocketAddr) -> Arc<Sessions> {
        self.lock().tcp.get(&address).map_or_else(Arc::default, |t| t.sessions.clone())
    }

    pub(crate) fn status(&self) -> Vec<LinkStatus> {
        let s = self.lock();
        let quic = s.links.iter().filter(|l| l.is_open()).map(|l| l.status());
        let shown = s.tcp.iter().filter(|(_, t)| t.role != Role::Left || t.sessions.open.load(Relaxed) > 0);
        let tcp = shown.map(|(address, t)| LinkStatus {
            cluster: None,
            address: *address,
            transport: Carrier::Tcp,
            opener: Opener::Us,
            since: unix(t.since),
            sessions: t.sessions.open.load(Relaxed),
            sessions_total: t.sessions.total.load(Relaxed),
            draining: false,
            silent: false,
            rtt_ms: None,
            min_rtt_ms: None,
            packets_sent: None,
            packets_lost: None,
            mtu: None,
            congestion_window: None,
            bytes_sent: t.sessions.sent.load(Relaxed),
            bytes_received: t.sessions.received.load(Relaxed),
            congestion: None,
            why_tcp: Some(t.why.clone()),
            new_sessions: None,
            choice: None,
            chosen: t.role != Role::StandsIn,
        });
        let mut all: Vec<_> = quic.chain(tcp).collect();
        all.sort_by(|a, b| (&a.cluster, a.address).cmp(&(&b.cluster, b.address)));
        all
    }

    /// Sums of each peer over open and closed connections.
    pub(crate) fn totals(&self) -> BTreeMap<ClusterId, Totals> {
        let s = self.lock();
        let mut all = s.closed.clone();
        for l in &s.links {
            all.entry(l.cluster.clone()).or_default().add(&l.connection);
        }
        all
    }
}
