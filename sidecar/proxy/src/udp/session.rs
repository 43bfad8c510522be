//! A session: one client, one destination, one host.
//!
//! Either side may be a socket or something that carries datagrams of many: a connection of QUIC between two proxies, or
//! a trunk between two gateways.

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::{self, Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use mesh_model::proxy::{Discovery, LbPolicy, UdpHash};
use mesh_telemetry::{
    access_log::{Field, LogRecord},
    metrics::{UdpDrop, UdpEnd, UdpHop, UdpSeries},
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{net::UdpSocket, task::AbortHandle};

use super::inner;
use super::{
    BATCH, Server,
    carrier::{Carrier, Way},
    socket::{Datagram, Downstream, Reply},
};
use crate::{
    config::listener::UdpProxy,
    upstream::{
        cluster::{Cluster, Permit},
        connect::TlsTransport,
        host::{ActiveGuard, Host, HostAddr},
        lb::{LbTables, stable_hash},
    },
    worker::Worker,
};

/// Errors in a row after which a session's socket is of no use.
const MAX_ERRORS: u32 = 16;

/// What tells sessions apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    /// Zero, unless every datagram is balanced on its own, or the client is one of many that share a connection.
    pub(super) host: u64,
}

/// Who is answered.
pub(super) enum Client {
    /// Somebody who sent to a socket here.
    Socket(Rc<Downstream>, Reply),
    /// Somebody whose datagrams are carried.
    Carried(Rc<dyn Carrier>),
}

impl Client {
    pub(super) fn send(&self, data: &[u8], peer: SocketAddr) -> Result<(), UdpDrop> {
        match self {
            Self::Socket(down, reply) => down.send(data, peer, reply).map_err(|_| UdpDrop::SendError),
            Self::Carried(c) => c.send(data),
        }
    }
}

/// How the host is reached.
enum Up {
    Socket(UdpSocket),
    Trunk(Way),
    Inner(inner::client::Flow),
}

pub(super) struct Session {
    pub(super) key: Key,
    pub(super) proxy: Arc<UdpProxy>,
    series: Arc<UdpSeries>,
    host: Arc<Host>,
    /// The hosts among which this one was last seen healthy; weak, so that nothing old is kept.
    tables: RefCell<sync::Weak<LbTables>>,
    up: Up,
    client: Client,
    /// Who takes a datagram again whose host turned out not to answer.
    home: Weak<Server>,
    /// What carried it has ended.
    pub(super) lost: Cell<bool>,
    /// What the client is told if there is no way to the host.
    pub(super) refusal: RefCell<Option<Vec<u8>>>,
    /// When a datagram last passed.
    last: Cell<Instant>,
    started: Instant,
    started_at: SystemTime,
    received: Cell<u64>,
    sent: Cell<u64>,
    reader: RefCell<Option<AbortHandle>>,
    _permit: Permit,
    _active: ActiveGuard,
    place: Place,
}

/// A session's place in a worker.
struct Place(Rc<Worker>);

impl Place {
    fn take(worker: &Rc<Worker>) -> Option<Self> {
        let n = worker.udp_sessions.get();
        if n >= worker.options.max_udp_sessions || worker.shared.over_memory.load(Relaxed) {
            return None;
        }
        worker.udp_sessions.set(n + 1);
        Some(Self(Rc::clone(worker)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.udp_sessions.set(self.0.udp_sessions.get() - 1);
    }
}

/// A cluster and a host of it for a datagram.
pub(super) fn choose(
    worker: &Worker,
    proxy: &UdpProxy,
    down: &Downstream,
    d: &Datagram,
) -> Result<(Arc<Cluster>, Arc<Host>), UdpDrop> {
    if d.len > usize::from(proxy.config.max_downstream) {
        return Err(UdpDrop::Truncated);
    }
    let cluster = proxy.cluster.load().ok_or(UdpDrop::NoCluster)?;
    if cluster.config.discovery == Discovery::OriginalDst {
        // Sending what came here on purpose to where it came from would loop.
        let host = down.was_redirected(d.local).then(|| Arc::new(Host::original(d.local)));
        return Ok((cluster, host.ok_or(UdpDrop::NoHost)?));
    }
    let hash = match &proxy.config.hash {
        _ if !matches!(cluster.config.lb, LbPolicy::RingHash(_) | LbPolicy::Maglev(_)) => None,
        None => None,
        Some(UdpHash::SourceIp) => Some(stable_hash(d.peer.ip().to_string().as_bytes())),
        Some(UdpHash::Key(k)) => Some(stable_hash(k.as_bytes())),
    };
    let host = cluster.tables().pick(&worker.rng, hash).cloned().ok_or(UdpDrop::NoHost)?;
    Ok((cluster, host))
}

impl Session {
    pub(super) fn open(
        worker: &Rc<Worker>,
        proxy: &Arc<UdpProxy>,
        client: Client,
        home: Weak<Server>,
        key: Key,
        cluster: &Arc<Cluster>,
        host: Arc<Host>,
        now: Instant,
    ) -> Result<Rc<Self>, UdpDrop> {
        let transport = cluster.sockets.get(host.transport);
        let tls = transport.and_then(|s| s.tls.as_ref());
        let secure = tls.is_some_and(TlsTransport::carries_datagrams);
        if transport.is_some_and(|s| s.hbone.is_some()) || (tls.is_some() && !secure) {
            return Err(UdpDrop::NoHost);
        }
        let place = Place::take(worker).ok_or(UdpDrop::SessionLimit)?;
        let limit = cluster.config.limits.max_connections;
        let permit = Permit::take(&cluster.usage, |u| &u.connections, limit).ok_or(UdpDrop::ClusterLimit)?;
        let up = match &host.addr {
            HostAddr::Socket(_) if secure => Up::Inner(inner::client::flow(worker, cluster, &host)?),
            HostAddr::Socket(to) if !secure => Up::Socket(connected(cluster, *to).map_err(|error| {
                tracing::debug!(%error, host = %host.display, client = %key.peer, "UDP session");
                UdpDrop::SendError
            })?),
            HostAddr::Trunk(..) if !secure => Up::Trunk(Way::default()),
            _ => return Err(UdpDrop::NoHost),
        };
        let series = Arc::clone(proxy.series(&worker.shared.metrics));
        series.opened.inc();
        let session = Rc::new(Self {
            key,
            proxy: Arc::clone(proxy),
            series,
            tables: RefCell::new(Arc::downgrade(&cluster.tables())),
            up,
            client,
            home,
            lost: Cell::new(false),
            refusal: RefCell::default(),
            last: Cell::new(now),
            started: now,
            started_at: SystemTime::now(),
            received: Cell::new(0),
            sent: Cell::new(0),
            reader: RefCell::default(),
            _permit: permit,
            _active: ActiveGuard::new(&host.stats),
            place,
            host,
        });
        let me = Rc::clone(&session);
        let reader = match &session.up {
            Up::Socket(_) => tokio::task::spawn_local(me.answer(Rc::clone(worker))),
            Up::Trunk(_) => tokio::task::spawn_local(me.through(Rc::clone(worker))),
            Up::Inner(flow) => {
                flow.attach(me);
                return Ok(session);
            }
        };
        *session.reader.borrow_mut() = Some(reader.abort_handle());
        Ok(session)
    }

    /// Whether the session may go on with its host.
    pub(super) fn check(&self) -> Result<(), UdpEnd> {
        let cluster = self.proxy.cluster.load().ok_or(UdpEnd::Reconfigured)?;
        if self.lost.get() {
            return Err(UdpEnd::ConnectionLost);
        }
        if self.lost_host() {
            return Err(UdpEnd::HostGone);
        }
        if cluster.config.discovery == Discovery::OriginalDst {
            return Ok(());
        }
        let tables = cluster.tables();
        if self.tables.borrow().as_ptr() == Arc::as_ptr(&tables) {
            return Ok(());
        }
        let me = |h: &&Arc<Host>| h.stats.id == self.host.stats.id;
        match tables.hosts.iter().find(me) {
            None => return Err(UdpEnd::HostGone),
            // A bad host is better than none.
            Some(h) if !h.is_usable() && tables.hosts.iter().any(|h| h.is_usable()) => {
                return Err(UdpEnd::HostGone);
            }
            // It came after others since, for instance as its cluster's lease lapsed.
            Some(h)
                if h.priority > self.host.priority
                    && tables.hosts.iter().any(|o| o.priority < h.priority && o.is_usable()) =>
            {
                return Err(UdpEnd::HostGone);
            }
            Some(_) => {}
        }
        *self.tables.borrow_mut() = Arc::downgrade(&tables);
        Ok(())
    }

    pub(super) fn lost_host(&self) -> bool {
        self.host.stats.gone.load(Relaxed)
    }

    pub(super) fn is_idle(&self, now: Instant) -> bool {
        self.is_silent_for(self.proxy.config.idle_timeout, now)
    }

    /// Whether nothing passed for so long, in either direction.
    pub(super) fn is_silent_for(&self, time: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.last.get()) >= time
    }

    /// A datagram of the client.
    pub(super) fn forward(&self, data: &[u8], now: Instant) {
        self.last.set(now);
        self.series.passed(UdpHop::DownstreamRx, data.len());
        if data.len() > usize::from(self.proxy.config.max_downstream) {
            return self.series.dropped(UdpDrop::Truncated);
        }
        self.received.set(self.received.get() + data.len() as u64);
        self.send(data, 0);
    }

    /// Sends to the host, which this datagram's `tries` others before did not take.
    pub(super) fn send(&self, data: &[u8], tries: u8) {
        let sent = match &self.up {
            Up::Socket(s) => self.to_socket(s, data),
            Up::Trunk(way) => way.send(data),
            Up::Inner(flow) => flow.send(data, tries),
        };
        match sent {
            Ok(()) => self.series.passed(UdpHop::UpstreamTx, data.len()),
            Err(why) => self.series.dropped(why),
        }
    }

    fn to_socket(&self, socket: &UdpSocket, data: &[u8]) -> Result<(), UdpDrop> {
        let mut sent = SockRef::from(socket).send(data);
        // This error is that of a datagram before this one, which ICMP told of.
        if sent.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
            self.series.dropped(UdpDrop::ReceiveError);
            sent = SockRef::from(socket).send(data);
        }
        sent.map(drop).map_err(|_| UdpDrop::SendError)
    }

    /// Lets another host have a datagram that this one's proxy did not take.
    pub(super) fn try_elsewhere(self: &Rc<Self>, data: &[u8], tries: u8) {
        match self.home.upgrade() {
            Some(home) => home.again(self, data, tries),
            None => self.series.dropped(UdpDrop::Unreachable),
        }
    }

    pub(super) fn dropped(&self, why: UdpDrop) {
        self.series.dropped(why);
    }

    /// Carries the session through a trunk until it ends.
    async fn through(self: Rc<Self>, worker: Rc<Worker>) {
        let (Up::Trunk(way), HostAddr::Trunk(name, port)) = (&self.up, &self.host.addr) else { return };
        let opened = match worker.dialer() {
            Some(d) => d.dial_flow(name, *port).await,
            None => Err(io::ErrorKind::Unsupported.into()),
        };
        match opened {
            Ok(flow) => {
                let mut from = flow.from;
                way.open(flow.to).into_iter().for_each(|why| self.series.dropped(why));
                while let Some(data) = from.recv().await {
                    self.pass(&data, Instant::now());
                }
            }
            Err(error) => {
                if worker.said.is_news(&self.host.display) {
                    tracing::warn!(
                        to = %self.host.display, %error,
                        "UDP is not carried to this peer: it needs the QUIC trunk"
                    );
                }
                self.series.dropped(UdpDrop::NoTrunk);
                if let Some(r) = self.refusal.take() {
                    let _ = self.client.send(&r, self.key.peer);
                }
            }
        }
        self.lost.set(true);
    }

    /// Passes datagrams of the host to the client, until the session ends.
    async fn answer(self: Rc<Self>, worker: Rc<Worker>) {
        let Up::Socket(socket) = &self.up else { return };
        let mut errors = 0;
        while errors < MAX_ERRORS && socket.readable().await.is_ok() {
            let now = Instant::now();
            {
                let scratch = &mut *worker.scratch.borrow_mut();
                for _ in 0..BATCH {
                    match socket.try_recv(scratch) {
                        Ok(n) => {
                            errors = 0;
                            self.pass(scratch.get(..n).unwrap_or_default(), now);
                        }
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                        Err(_) => {
                            errors += 1;
                            self.series.dropped(UdpDrop::ReceiveError);
                        }
                    }
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// A datagram of the host.
    pub(super) fn pass(&self, data: &[u8], now: Instant) {
        self.last.set(now);
        self.series.passed(UdpHop::UpstreamRx, data.len());
        if data.len() > usize::from(self.proxy.config.max_upstream) {
            return self.series.dropped(UdpDrop::Truncated);
        }
        match self.client.send(data, self.key.peer) {
            Ok(()) => {
                self.sent.set(self.sent.get() + data.len() as u64);
                self.series.passed(UdpHop::DownstreamTx, data.len());
            }
            Err(why) => self.series.dropped(why),
        }
    }

    /// Ends, counts and logs the session.
    pub(super) fn end(&self, why: UdpEnd) {
        if let Some(reader) = self.reader.take() {
            reader.abort();
        }
        if let Up::Inner(flow) = &self.up {
            flow.end();
        }
        self.series.closed(why);
        for log in &self.proxy.logs {
            log.write(&self.place.0, &Record { session: self, why });
        }
    }
}

/// A socket that sends to a host only and hears from it only.
fn connected(cluster: &Cluster, to: SocketAddr) -> io::Result<UdpSocket> {
    let s = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    s.set_nonblocking(true)?;
    if let Some(ip) = cluster.config.source.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()) {
        // Where this host has no such address, nothing depends on it.
        let _ = s.bind(&SocketAddr::new(*ip, 0).into());
    }
    s.connect(&to.into())?;
    UdpSocket::from_std(s.into())
}

struct Record<'a> {
    session: &'a Session,
    why: UdpEnd,
}

impl LogRecord for Record<'_> {
    fn start(&self) -> SystemTime {
        self.session.started_at
    }

    fn field(&self, field: Field, out: &mut String) -> bool {
        let s = self.session;
        let mut put = |v: &dyn std::fmt::Display| {
            use std::fmt::Write as _;
            write!(out, "{v}").is_ok()
        };
        match field {
            Field::Protocol => put(&"UDP"),
            Field::ConnectionTerminationDetails => put(&match self.why {
                UdpEnd::Idle => "idle_timeout",
                UdpEnd::HostGone => "upstream_host_gone",
                UdpEnd::Reconfigured => "listener_or_cluster_changed",
                UdpEnd::ConnectionLost => "connection_lost",
            }),
            Field::BytesReceived => put(&s.received.get()),
            Field::BytesSent => put(&s.sent.get()),
            Field::Duration => put(&millis(s.started.elapsed())),
            Field::UpstreamHost => put(&s.host.display),
            Field::UpstreamCluster => put(&s.proxy.config.cluster),
            Field::UpstreamLocalAddress => match &s.up {
                Up::Socket(socket) => socket.local_addr().is_ok_and(|a| put(&a)),
                _ => false,
            },
            Field::DownstreamRemoteAddress | Field::DownstreamDirectRemoteAddress => put(&s.key.peer),
            Field::DownstreamRemoteAddressWithoutPort => put(&s.key.peer.ip()),
            Field::DownstreamLocalAddress => put(&s.key.local),
            Field::DownstreamLocalPort => put(&s.key.local.port()),
            _ => false,
        }
    }

    fn request_header(&self, _: &str, _: &mut String) -> bool {
        false
    }
    fn response_header(&self, _: &str, _: &mut String) -> bool {
        false
    }
    fn response_trailer(&self, _: &str, _: &mut String) -> bool {
        false
    }
}

fn millis(d: Duration) -> u128 {
    d.as_millis()
}
