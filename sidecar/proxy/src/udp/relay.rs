//! Passing connections of QUIC on by the server name of their ClientHello, without ending them: what the listener for TLS
//! is for TCP. Clients are sockets of proxies in this cluster, or flows of a trunk.
//!
//! 1. A client's connection is known by the address that it comes from: our proxies have a socket for each. The name is
//!    read from its first packets ([`initial`]), and chooses the chain, the cluster and, by its slot, the host as for TCP.
//! 2. From then on every datagram goes there, and those from there go back. A first packet of another connection from the
//!    same address begins anew, but not while the one before is alive: the address may be pretended. Anything else that is not of a known connection is dropped and counted.
//! 3. A connection that is not passed on hears why, in the place of the server's first packet.
//! 4. Connections whose name is not complete are few and short-lived: [`OPENINGS`] in a worker, [`PACKETS`] datagrams of
//!    each, [`PATIENCE`]. Those that are passed on are bounded as sessions are.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_telemetry::metrics::{UdpDrop, UdpEnd, UdpSeries};
use tokio_util::sync::CancellationToken;

use super::{
    BATCH, SWEEP,
    carrier::{Carrier, Trunked},
    initial::{self, Id, Opening},
    session::{Client, Key, Session},
    socket::Downstream,
};
use crate::{
    config::listener::{ConnectionFacts, ListenerSlot, Terminal},
    listener::inspect::{ClientHello, Seen},
    options::DatagramFlow,
    refusal::Refusal,
    tcp::PEER,
    upstream::host::{HostAddr, unique_id},
    worker::Worker,
};

/// Connections of a worker whose name is not complete.
const OPENINGS: usize = 256;
/// What is kept of each: a ClientHello takes two.
const PACKETS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(3);
/// A client's connection that is silent for so long has ended: it pings every second. Only then may another one come from
/// its address.
const SILENCE: Duration = Duration::from_secs(2);
/// A trunk's flow in which nothing came for so long has ended: connections ping every second.
const FLOW_IDLE: Duration = Duration::from_secs(30);

/// A listener's part of one worker.
pub(crate) struct Relay {
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    down: Rc<Downstream>,
    /// With the name that the client gave the server at first.
    sessions: RefCell<HashMap<Key, (Rc<Session>, Id)>>,
    openings: RefCell<HashMap<Key, Waiting>>,
    /// Counts what has no cluster.
    series: UdpSeries,
}

struct Waiting {
    opening: Opening,
    packets: Vec<Vec<u8>>,
    since: Instant,
}

/// Serves a listener until `stop`.
pub(crate) async fn serve(
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    socket: std::net::UdpSocket,
    stop: CancellationToken,
) {
    let down = match Downstream::new(socket, false) {
        Ok(d) => Rc::new(d),
        Err(error) => {
            tracing::error!(%error, listener = %slot.name, "cannot take datagrams");
            return;
        }
    };
    let series = worker.shared.metrics.udp_series(&slot.name, "");
    let relay = Rc::new(Relay {
        worker,
        slot,
        down,
        sessions: RefCell::default(),
        openings: RefCell::default(),
        series,
    });
    *relay.worker.relay.borrow_mut() = Rc::downgrade(&relay);
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            r = relay.down.readable() => {
                if let Err(error) = r {
                    tracing::error!(%error, listener = %relay.slot.name, "cannot take datagrams");
                    break;
                }
                relay.receive();
                tokio::task::yield_now().await;
            }
            _ = sweep.tick() => relay.sweep(),
            () = stop.cancelled() => break,
        }
    }
    for (_, (s, _)) in relay.sessions.take() {
        s.end(UdpEnd::Reconfigured);
    }
}

impl Relay {
    fn receive(&self) {
        let scratch = &mut *self.worker.scratch.borrow_mut();
        let now = Instant::now();
        for _ in 0..BATCH {
            match self.down.receive(scratch) {
                Ok(d) => {
                    let data = scratch.get(..d.len).unwrap_or_default();
                    let key = Key { peer: d.peer, local: d.local, host: 0 };
                    let client = || Ok(Client::Socket(Rc::clone(&self.down), self.down.reply(d.local)?));
                    self.take(key, data, now, &client);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::debug!(%error, listener = %self.slot.name, "datagram");
                    self.series.dropped(UdpDrop::ReceiveError);
                }
            }
        }
    }

    /// Takes a trunk's flow as a client, until it ends.
    pub(crate) async fn carry(self: Rc<Self>, peer: SocketAddr, flow: DatagramFlow) {
        let local = self.slot.current.load().model.address;
        let key = Key { peer, local, host: unique_id() };
        let DatagramFlow { to, mut from } = flow;
        let client = || Ok(Client::Carried(Rc::new(Trunked(Arc::clone(&to))) as Rc<dyn Carrier>));
        while let Ok(Some(data)) = tokio::time::timeout(FLOW_IDLE, from.recv()).await {
            self.take(key, &data, Instant::now(), &client);
        }
        self.openings.borrow_mut().remove(&key);
        self.end(&key, UdpEnd::ConnectionLost);
    }

    fn take(&self, key: Key, data: &[u8], now: Instant, client: &dyn Fn() -> io::Result<Client>) {
        let known = self.sessions.borrow().get(&key).map(|(s, first)| (Rc::clone(s), *first));
        let another = known.as_ref().is_some_and(|(_, first)| is_another(data, first));
        if let Some((session, _)) = known.filter(|(s, _)| !another || !s.is_silent_for(SILENCE, now)) {
            if another {
                // Of somebody who pretends to be the client: one that lives pings, and one that is new has a new socket.
                return self.series.dropped(UdpDrop::NotQuic);
            }
            if session.lost.get() || session.lost_host() {
                self.end(&key, UdpEnd::HostGone);
                return self.series.dropped(UdpDrop::NotQuic);
            }
            return session.forward(data, now);
        }
        if !initial::is_initial(data) {
            return self.series.dropped(UdpDrop::NotQuic);
        }
        match self.read(key, data, now) {
            Ok(None) => {}
            Ok(Some((hello, waiting))) => self.begin(key, &hello, waiting, now, client),
            Err(why) => self.series.dropped(why),
        }
    }

    /// Adds a packet to what is known of a new connection; answers with all of it when its name is.
    fn read(&self, key: Key, data: &[u8], now: Instant) -> Result<Option<(ClientHello, Waiting)>, UdpDrop> {
        let mut openings = self.openings.borrow_mut();
        let to = initial::header(data).ok_or(UdpDrop::NotQuic)?.to;
        let mut waiting = match openings.remove(&key).filter(|w| w.opening.to == to) {
            Some(w) => w,
            None => {
                if openings.len() >= OPENINGS
                    && let Some(oldest) = openings.iter().min_by_key(|(_, w)| w.since).map(|(k, _)| *k)
                {
                    // Who is slow may be nobody.
                    openings.remove(&oldest);
                    self.series.dropped(UdpDrop::QueueFull);
                }
                let opening = Opening::new(data).ok_or(UdpDrop::NotQuic)?;
                Waiting { opening, packets: Vec::with_capacity(2), since: now }
            }
        };
        let seen = waiting.opening.add(data);
        waiting.packets.push(data.to_vec());
        match seen {
            Seen::Yes(hello) => Ok(Some((hello, waiting))),
            Seen::More if waiting.packets.len() < PACKETS => {
                openings.insert(key, waiting);
                Ok(None)
            }
            _ => Err(UdpDrop::NotQuic),
        }
    }

    /// Begins to pass a connection on, or says why not.
    fn begin(
        &self,
        key: Key,
        hello: &ClientHello,
        waiting: Waiting,
        now: Instant,
        client: &dyn Fn() -> io::Result<Client>,
    ) {
        self.end(&key, UdpEnd::Reconfigured);
        let refusal = match self.open(key, hello, &waiting, now, client) {
            Ok(session) => {
                for p in &waiting.packets {
                    session.forward(p, now);
                }
                self.sessions.borrow_mut().insert(key, (session, waiting.opening.to));
                return;
            }
            Err((why, refusal)) => {
                self.series.dropped(why);
                refusal
            }
        };
        tracing::debug!(
            listener = %self.slot.name, peer = %key.peer, sni = hello.sni, why = ?refusal,
            "a connection of QUIC is not passed on"
        );
        if let (Some(r), Ok(client)) = (refusal.and_then(|r| waiting.opening.refuse(r)), client()) {
            let _ = client.send(&r, key.peer);
        }
    }

    fn open(
        &self,
        key: Key,
        hello: &ClientHello,
        waiting: &Waiting,
        now: Instant,
        client: &dyn Fn() -> io::Result<Client>,
    ) -> Result<Rc<Session>, (UdpDrop, Option<Refusal>)> {
        let listener = self.slot.current.load();
        let facts = ConnectionFacts {
            destination: key.local,
            source: key.peer.ip(),
            tls: true,
            sni: hello.sni.as_deref(),
            alpn: &hello.alpn,
        };
        let chain = listener.chain(&facts).ok_or((UdpDrop::NoRoute, Some(Refusal::UnknownName)))?;
        let Terminal::Udp(proxy) = &chain.terminal else { return Err((UdpDrop::NoRoute, None)) };
        let cluster = proxy.cluster.load().ok_or((UdpDrop::NoCluster, Some(Refusal::NoBackend)))?;
        let to_peer = cluster.config.name.starts_with(PEER);
        let none = if to_peer { Refusal::NoWay } else { Refusal::NoBackend };
        let tables = cluster.tables();
        let rng = &self.worker.rng;
        let host = tables.pick_slot(rng, hello.sni.as_deref(), &[]).or_else(|| tables.pick(rng, None));
        let host = host.cloned().ok_or((UdpDrop::NoHost, Some(none)))?;
        if to_peer && !matches!(host.addr, HostAddr::Trunk(..)) {
            if self.worker.said.is_news(&cluster.config.name) {
                tracing::warn!(
                    cluster = %cluster.config.name, to = %host.display,
                    "UDP is not carried to this peer: it needs the QUIC trunk (`--transport quic,tcp` in both clusters, \
                     and gateways with `--trunk`)"
                );
            }
            return Err((UdpDrop::NoTrunk, Some(Refusal::NoWay)));
        }
        let client = client().map_err(|_| (UdpDrop::SendError, None))?;
        let opened = Session::open(&self.worker, proxy, client, Weak::new(), key, &cluster, host, now);
        let session = opened.map_err(|why| (why, Some(none)))?;
        *session.refusal.borrow_mut() = waiting.opening.refuse(Refusal::NoWay);
        Ok(session)
    }

    fn end(&self, key: &Key, why: UdpEnd) {
        let ended = self.sessions.borrow_mut().remove(key);
        if let Some((s, _)) = ended {
            s.end(why);
        }
    }

    fn sweep(&self) {
        let now = Instant::now();
        self.openings.borrow_mut().retain(|_, w| now.saturating_duration_since(w.since) < PATIENCE);
        let mut ended = Vec::new();
        self.sessions.borrow_mut().retain(|_, (s, _)| {
            let why = if s.is_idle(now) {
                UdpEnd::Idle
            } else if s.lost.get() {
                UdpEnd::ConnectionLost
            } else if s.lost_host() {
                UdpEnd::HostGone
            } else {
                return true;
            };
            ended.push((Rc::clone(s), why));
            false
        });
        for (s, why) in ended {
            s.end(why);
        }
    }
}

/// Whether a datagram of a known client begins another connection than the one that began with `first`. One with a token
/// answers a Retry of the server, and one that the first keys do not open uses the server's own ID.
fn is_another(data: &[u8], first: &Id) -> bool {
    initial::header(data).is_some_and(|h| h.to != *first && !h.has_token)
        && Opening::new(data).is_some_and(|mut o| !matches!(o.add(data), Seen::No) && o.has_some())
}
