//! The caller's end.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_model::flow::{self, Frame};
use mesh_telemetry::metrics::UdpDrop;
use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, crypto::rustls::QuicClientConfig,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{DENIED, LEAVING, UNUSED};
use crate::{
    refusal::Refusal,
    udp::session::Session,
    upstream::{
        cluster::{Cluster, Outcome},
        connect::Want,
        host::{Host, HostAddr},
    },
    worker::Worker,
};

/// A handshake takes no longer; a shorter `connect_timeout` of the cluster holds.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// A host whose connection failed or broke is left alone for so long.
const HOLD: Duration = Duration::from_secs(1);
/// Without a session for so long a connection is closed.
const IDLE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_secs(1);
/// What may wait for a handshake.
const WAITING: usize = 64;
const WAITING_BYTES: usize = 64 * 1024;
/// Hosts that a datagram is offered to after the first.
const TRIES: u8 = 2;
/// Bytes that may wait in a connection's socket, each way.
const SOCKET: usize = 1 << 20;

/// The connections of a worker, by the number of the host.
#[derive(Default)]
pub(crate) struct Links(RefCell<HashMap<u64, Rc<Link>>>);

/// One connection.
pub(super) struct Link {
    host: Arc<Host>,
    state: RefCell<State>,
    flows: RefCell<HashMap<u64, Rc<Session>>>,
    next: Cell<u64>,
    /// When the last session ended.
    used: Cell<Instant>,
}

enum State {
    Connecting(Waiting),
    Open(Connection),
    /// Since when and why.
    Ended(Instant, UdpDrop),
}

#[derive(Default)]
struct Waiting {
    /// With the number of hosts that did not take it before.
    datagrams: Vec<(u64, Bytes, u8)>,
    bytes: usize,
}

impl Waiting {
    fn push(&mut self, id: u64, data: &[u8], tries: u8) -> Result<(), UdpDrop> {
        if self.datagrams.len() >= WAITING || self.bytes + data.len() > WAITING_BYTES {
            return Err(UdpDrop::QueueFull);
        }
        self.bytes += data.len();
        self.datagrams.push((id, Bytes::copy_from_slice(data), tries));
        Ok(())
    }
}

/// A session's part of a connection.
pub(in crate::udp) struct Flow {
    link: Rc<Link>,
    id: u64,
}

/// A flow on the connection to a host, which is made if there is none.
pub(in crate::udp) fn flow(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
) -> Result<Flow, UdpDrop> {
    let mut links = worker.links.0.borrow_mut();
    let known = links.get(&host.stats.id).cloned();
    let usable = match &known {
        None => None,
        Some(l) => match &*l.state.borrow() {
            State::Ended(since, why) if since.elapsed() < HOLD => return Err(*why),
            State::Ended(..) => None,
            _ if l.next.get() >= flow::LIMIT => return Err(UdpDrop::SessionLimit),
            _ => known.clone(),
        },
    };
    let link = match usable {
        Some(l) => l,
        None => {
            let l = Rc::new(Link {
                host: Arc::clone(host),
                state: RefCell::new(State::Connecting(Waiting::default())),
                flows: RefCell::default(),
                next: Cell::new(0),
                used: Cell::new(Instant::now()),
            });
            links.insert(host.stats.id, Rc::clone(&l));
            tokio::task::spawn_local(Rc::clone(&l).run(Rc::clone(worker), Arc::clone(cluster)));
            l
        }
    };
    let id = link.next.get();
    link.next.set(id + 1);
    Ok(Flow { link, id })
}

impl Flow {
    pub(in crate::udp) fn attach(&self, session: Rc<Session>) {
        self.link.flows.borrow_mut().insert(self.id, session);
    }

    pub(in crate::udp) fn send(&self, data: &[u8], tries: u8) -> Result<(), UdpDrop> {
        match &mut *self.link.state.borrow_mut() {
            State::Connecting(waiting) => waiting.push(self.id, data, tries),
            State::Open(c) => super::transmit(c, self.id, data),
            State::Ended(_, why) => Err(*why),
        }
    }

    /// The session is over.
    pub(in crate::udp) fn end(&self) {
        let there = self.link.flows.borrow_mut().remove(&self.id).is_some();
        self.link.used.set(Instant::now());
        if let (true, State::Open(c)) = (there, &*self.link.state.borrow()) {
            // If it gets lost, the other end finds out by itself.
            let _ = c.send_datagram(flow::end(self.id).into());
        }
    }
}

/// Why there is no connection.
enum Failure {
    Refused(Refusal),
    Other(String),
}

impl Link {
    async fn run(self: Rc<Self>, worker: Rc<Worker>, cluster: Arc<Cluster>) {
        let limit = cluster.connect_limit().min(HANDSHAKE);
        let made = match tokio::time::timeout(limit, connect(&worker, &cluster, &self.host)).await {
            Ok(made) => made,
            Err(_) => Err(Failure::Other("no answer".to_owned())),
        };
        match made {
            Ok((connection, endpoint)) => {
                cluster.observe(&self.host, Outcome::Connected);
                self.opened(&connection);
                let (why, hold) = self.serve(&connection).await;
                if why == UdpDrop::Denied && worker.said.is_news(&cluster.config.name) {
                    tracing::warn!(
                        cluster = %cluster.config.name, host = %self.host.display,
                        "UDP: the rules of the host's proxy deny this workload"
                    );
                }
                self.ended(why);
                if !hold {
                    worker.links.forget(&self);
                }
                // What is said last is sent by the endpoint's own task.
                let _ = tokio::time::timeout(TICK, endpoint.wait_idle()).await;
            }
            Err(failure) => {
                let (outcome, why) = match failure {
                    Failure::Refused(r) => (Outcome::Refused(r), r.to_string()),
                    Failure::Other(why) => (Outcome::Failed, why),
                };
                if worker.said.is_news(&cluster.config.name) {
                    tracing::warn!(
                        cluster = %cluster.config.name, host = %self.host.display, %why,
                        "UDP: no connection with the host's proxy"
                    );
                }
                cluster.observe(&self.host, outcome);
                self.failed();
            }
        }
        tokio::time::sleep(HOLD).await;
        worker.links.forget(&self);
    }

    /// Sends what waited.
    fn opened(&self, c: &Connection) {
        let before = self.state.replace(State::Open(c.clone()));
        let State::Connecting(waiting) = before else { return };
        for (id, data, _) in waiting.datagrams {
            let session = self.flows.borrow().get(&id).cloned();
            if let (Err(why), Some(s)) = (super::transmit(c, id, &data), session) {
                s.dropped(why);
            }
        }
    }

    /// Offers what waited to other hosts.
    fn failed(&self) {
        let before = self.state.replace(State::Ended(Instant::now(), UdpDrop::Unreachable));
        let flows = self.flows.take();
        for s in flows.values() {
            s.lost.set(true);
        }
        let State::Connecting(waiting) = before else { return };
        for (id, data, tries) in waiting.datagrams {
            match flows.get(&id) {
                Some(s) if tries < TRIES => s.try_elsewhere(&data, tries + 1),
                Some(s) => s.dropped(UdpDrop::Unreachable),
                None => {}
            }
        }
    }

    fn ended(&self, why: UdpDrop) {
        self.state.replace(State::Ended(Instant::now(), why));
        for s in self.flows.take().into_values() {
            s.lost.set(true);
        }
    }

    /// Hands datagrams to sessions until the connection ends; answers with what those after it are told, and whether
    /// the host is to be left alone for a moment.
    async fn serve(self: &Rc<Self>, c: &Connection) -> (UdpDrop, bool) {
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                d = c.read_datagram() => match d {
                    Ok(d) => self.dispatch(&d),
                    Err(e) => return self.over(&e),
                },
                s = c.accept_uni() => match s {
                    Ok(stream) => {
                        let me = Rc::clone(self);
                        tokio::task::spawn_local(async move {
                            if let Some(d) = super::read(stream).await {
                                me.dispatch(&d);
                            }
                        });
                    }
                    Err(e) => return self.over(&e),
                },
                _ = tick.tick() => {
                    let unused = self.flows.borrow().is_empty() && self.used.get().elapsed() > IDLE;
                    if unused {
                        c.close(UNUSED, b"unused");
                        return (UdpDrop::Unreachable, false);
                    }
                }
            }
        }
    }

    fn over(&self, e: &ConnectionError) -> (UdpDrop, bool) {
        tracing::debug!(host = %self.host.display, error = %e, "UDP: the connection with the host's proxy ended");
        match e {
            ConnectionError::ApplicationClosed(a) if a.error_code == DENIED => (UdpDrop::Denied, true),
            ConnectionError::ApplicationClosed(a) if a.error_code == LEAVING => (UdpDrop::Unreachable, false),
            _ => (UdpDrop::Unreachable, true),
        }
    }

    fn dispatch(&self, frame: &[u8]) {
        let (id, data) = match flow::read(frame) {
            Some(Frame::Data(id, data)) => (id, Some(data)),
            Some(Frame::End(id)) => (id, None),
            None => return,
        };
        // One that is not known any more has ended here.
        let Some(session) = self.flows.borrow().get(&id).cloned() else { return };
        match data {
            Some(data) => session.pass(data, Instant::now()),
            None => session.lost.set(true),
        }
    }
}

impl Links {
    fn forget(&self, link: &Rc<Link>) {
        let mut all = self.0.borrow_mut();
        if all.get(&link.host.stats.id).is_some_and(|l| Rc::ptr_eq(l, link)) {
            all.remove(&link.host.stats.id);
        }
    }
}

async fn connect(worker: &Worker, cluster: &Cluster, host: &Host) -> Result<(Connection, Endpoint), Failure> {
    let other = |e: &dyn std::fmt::Display| Failure::Other(e.to_string());
    let HostAddr::Socket(to) = host.addr else { return Err(Failure::Other("it has no address".to_owned())) };
    let tls = cluster.sockets.get(host.transport).and_then(|s| s.tls.as_ref());
    let tls = tls.ok_or_else(|| Failure::Other("no TLS".to_owned()))?;
    let crypto = tls.config(&worker.secrets, Want::Any).map_err(|e| other(&e))?;
    let crypto = QuicClientConfig::try_from(crypto).map_err(|e| other(&e))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(super::transport()));
    let socket = socket(cluster, to).map_err(|e| other(&e))?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint = Endpoint::new(EndpointConfig::default(), None, socket, runtime).map_err(|e| other(&e))?;
    let connecting = endpoint.connect_with(config, to, &tls.server_name(host)).map_err(|e| other(&e))?;
    match connecting.await {
        Ok(c) if c.max_datagram_size().is_some() => Ok((c, endpoint)),
        Ok(_) => Err(Failure::Other("the host's proxy takes no datagrams".to_owned())),
        Err(e) => Err(match refusal(&e) {
            Some(r) => Failure::Refused(r),
            None => other(&e),
        }),
    }
}

/// What a gateway on the way says in a server's place.
fn refusal(e: &ConnectionError) -> Option<Refusal> {
    let ConnectionError::ConnectionClosed(close) = e else { return None };
    let code = u64::from(close.error_code).checked_sub(0x100)?;
    Refusal::of_alert(u8::try_from(code).ok()?)
}

/// A socket of its own, so that whoever passes packets on knows the connection by its address alone.
fn socket(cluster: &Cluster, to: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let s = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    s.set_nonblocking(true)?;
    let _ = s.set_recv_buffer_size(SOCKET);
    let _ = s.set_send_buffer_size(SOCKET);
    let source = cluster.config.source.iter().find(|ip| ip.is_ipv4() == to.is_ipv4());
    let any = match to {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    // Where this host has no such address, nothing depends on it.
    if source.is_none_or(|ip| s.bind(&SocketAddr::new(*ip, 0).into()).is_err()) {
        s.bind(&SocketAddr::new(any, 0).into())?;
    }
    Ok(s.into())
}
