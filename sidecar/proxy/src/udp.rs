//! The UDP proxy: datagrams of one client to one address are a session, which has a host and a socket of its own to it.
//!
//! 1. Each worker has its own socket (`SO_REUSEPORT`); the kernel gives a client's datagrams to the same worker always,
//!    so sessions belong to workers like connections do, and nothing is shared.
//! 2. A session keeps its host while that is in the cluster and healthy; else the next datagram opens another.
//! 3. Datagrams are never queued here: what cannot be sent at once is dropped and counted, as networks do.
//! 4. Sessions are bounded by the worker (`max_udp_sessions`) and by the cluster (`max_connections`), and end when idle.
//!    One timer of the listener looks at all of them, for they have nothing else to wait for.
//! 5. A listener that takes redirected datagrams finds the listener of their original destination as TCP does, and the
//!    client is answered from there.
//!
//! 6. A host whose transport socket is one of QUIC gets datagrams through its proxy, encrypted ([`inner`]); one that is
//!    reached with any other TLS gets none, rather than getting them in clear.
//!
//! A gateway passes such connections on without ending them ([`relay`]).

pub(crate) mod carrier;
pub(crate) mod initial;
pub(crate) mod inner;
pub(crate) mod relay;
mod session;
mod socket;

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_telemetry::metrics::{UdpDrop, UdpEnd, UdpHop};
use tokio_util::sync::CancellationToken;

use self::{
    session::{Client, Key, Session},
    socket::{Datagram, Downstream},
};
use crate::{
    config::listener::{Listener, ListenerSlot, UdpProxy},
    worker::Worker,
};

/// How often sessions are looked at: as precise as idle timeouts are.
const SWEEP: Duration = Duration::from_millis(250);
/// Datagrams taken before others have a turn.
const BATCH: usize = 64;
/// Hosts that a datagram is offered to, if those before are known not to answer.
const PICKS: usize = 4;

/// A listener's part of one worker.
struct Server {
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    down: Rc<Downstream>,
    sessions: RefCell<HashMap<Key, Rc<Session>>>,
}

/// Serves a listener until `stop`.
pub(crate) async fn serve(
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    socket: std::net::UdpSocket,
    stop: CancellationToken,
) {
    let transparent = slot.current.load().model.transparent;
    let down = match Downstream::new(socket, transparent) {
        Ok(d) => Rc::new(d),
        Err(error) => {
            tracing::error!(%error, listener = %slot.name, "cannot take datagrams");
            return;
        }
    };
    let server = Rc::new(Server { worker, slot, down, sessions: RefCell::default() });
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let idle = server.sessions.borrow().is_empty();
        tokio::select! {
            r = server.down.readable() => {
                if let Err(error) = r {
                    tracing::error!(%error, listener = %server.slot.name, "cannot take datagrams");
                    break;
                }
                server.receive();
                tokio::task::yield_now().await;
            }
            _ = sweep.tick(), if !idle => server.sweep(),
            () = stop.cancelled() => break,
        }
    }
    for (_, s) in server.sessions.take() {
        s.end(UdpEnd::Reconfigured);
    }
}

impl Server {
    fn receive(self: &Rc<Self>) {
        let scratch = &mut *self.worker.scratch.borrow_mut();
        let now = Instant::now();
        for _ in 0..BATCH {
            match self.down.receive(scratch) {
                Ok(d) => {
                    let data = scratch.get(..d.len).unwrap_or_default();
                    self.take(&d, data, now);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::debug!(%error, listener = %self.slot.name, "datagram");
                    if let Some(p) = &self.slot.current.load().udp {
                        p.series(&self.worker.shared.metrics).dropped(UdpDrop::ReceiveError);
                    }
                }
            }
        }
    }

    fn take(self: &Rc<Self>, d: &Datagram, data: &[u8], now: Instant) {
        let key = Key { peer: d.peer, local: d.local, host: 0 };
        let known = self.sessions.borrow().get(&key).cloned();
        if let Some(s) = known {
            match s.check() {
                Ok(()) => return s.forward(data, now),
                Err(why) => self.end(&s, why),
            }
        }
        let Some(proxy) = self.proxy(d.local) else { return };
        let series = proxy.series(&self.worker.shared.metrics);
        match self.session(d, key, &proxy, now) {
            Ok(s) => s.forward(data, now),
            Err(why) => {
                series.passed(UdpHop::DownstreamRx, data.len());
                series.dropped(why);
            }
        }
    }

    /// The session of a datagram, which is new unless each is balanced on its own.
    fn session(
        self: &Rc<Self>,
        d: &Datagram,
        mut key: Key,
        proxy: &Arc<UdpProxy>,
        now: Instant,
    ) -> Result<Rc<Session>, UdpDrop> {
        let mut left = PICKS;
        loop {
            left -= 1;
            let (cluster, host) = session::choose(&self.worker, proxy, &self.down, d)?;
            if proxy.config.per_packet {
                key.host = host.stats.id;
                let known = self.sessions.borrow().get(&key).cloned();
                if let Some(s) = known {
                    match s.check() {
                        Ok(()) => return Ok(s),
                        Err(why) => self.end(&s, why),
                    }
                }
            }
            let reply = self.down.reply(key.local).map_err(|_| UdpDrop::SendError)?;
            let (client, home) = (Client::Socket(Rc::clone(&self.down), reply), Rc::downgrade(self));
            match Session::open(&self.worker, proxy, client, home, key, &cluster, host, now) {
                // Another one may answer.
                Err(UdpDrop::Unreachable) if left > 0 => {}
                opened => {
                    if let Ok(s) = &opened {
                        self.sessions.borrow_mut().insert(key, Rc::clone(s));
                    }
                    return opened;
                }
            }
        }
    }

    /// Offers a datagram to another host than that of its session, which it ends.
    fn again(self: &Rc<Self>, old: &Rc<Session>, data: &[u8], tries: u8) {
        let key = old.key;
        let current = self.sessions.borrow().get(&key).cloned();
        let session = match current {
            // Another datagram was faster.
            Some(s) if !Rc::ptr_eq(&s, old) => Ok(s),
            _ => {
                self.end(old, UdpEnd::HostGone);
                let d = Datagram { len: data.len(), peer: key.peer, local: key.local };
                let key = Key { host: 0, ..key };
                self.proxy(key.local)
                    .ok_or(UdpDrop::NoCluster)
                    .and_then(|proxy| self.session(&d, key, &proxy, Instant::now()))
            }
        };
        match session {
            Ok(s) => s.send(data, tries),
            Err(why) => old.dropped(why),
        }
    }

    fn end(&self, s: &Rc<Session>, why: UdpEnd) {
        self.sessions.borrow_mut().remove(&s.key);
        s.end(why);
    }

    /// What is done with datagrams to this address.
    fn proxy(&self, local: SocketAddr) -> Option<Arc<UdpProxy>> {
        let bound = self.slot.current.load();
        let other = if bound.model.use_original_dst { self.hand_over(local) } else { None };
        match other {
            Some(l) => l.udp.clone(),
            None => bound.udp.clone(),
        }
    }

    /// The listener for an original destination: that exact address, then any address with its port.
    fn hand_over(&self, local: SocketAddr) -> Option<Arc<Listener>> {
        let compiled = self.worker.shared.compiled.load();
        let at = |ip: IpAddr| compiled.udp_by_address.get(&SocketAddr::new(ip, local.port()));
        let any4 = || local.is_ipv4().then(|| at(Ipv4Addr::UNSPECIFIED.into())).flatten();
        let found = at(local.ip()).or_else(any4).or_else(|| at(Ipv6Addr::UNSPECIFIED.into()))?;
        Some(found.current.load_full())
    }

    /// Ends sessions that are idle, lost their host, or belong to a configuration that is no more.
    fn sweep(&self) {
        let now = Instant::now();
        let mut ended = Vec::new();
        self.sessions.borrow_mut().retain(|key, s| {
            let why = if s.is_idle(now) {
                UdpEnd::Idle
            } else if s.lost.get() {
                UdpEnd::ConnectionLost
            } else if s.lost_host() {
                UdpEnd::HostGone
            } else if !self.proxy(key.local).is_some_and(|p| Arc::ptr_eq(&p, &s.proxy)) {
                UdpEnd::Reconfigured
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
