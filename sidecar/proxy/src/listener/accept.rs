//! From an accepted socket to the code that serves it.

use std::{future::Future, io, net::SocketAddr, pin::Pin, rc::Rc, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use mesh_model::proxy as model;
use tokio::{io::AsyncReadExt, net::TcpStream, time::Instant};

use super::{
    inspect::{self, ClientHello, Seen},
    proxy_protocol,
};
use crate::{
    config::listener::{
        Chain, ConnectionFacts, Guard, HttpManager, Listener, ListenerPlace, ListenerSlot, Terminal,
    },
    http::{
        h1, h2,
        metadata::{AUDIT, CONNECTION_RBAC, Metadata},
        record::TcpRecord,
    },
    io::{BoxedIo, Io, Transport},
    refusal::Refusal,
    tcp, tunnel,
    upstream::connect::negotiated_tunnels,
    worker::{
        Worker,
        connection::{Connection, SourceLabels},
    },
};

/// Time for a PROXY protocol header; a load balancer sends it at once.
const PROXY_HEADER: Duration = Duration::from_secs(5);

/// What serves a connection until it ends. Boxed by kind: a TCP connection, of which there may be thousands that
/// are idle, should not have the size of an HTTP one, nor any of them that of its handshake.
pub(crate) type Serving = Pin<Box<dyn Future<Output = ()>>>;

/// Finds out what an accepted connection is and who serves it; `None` ends it.
pub(crate) async fn accepted(
    worker: &Rc<Worker>,
    slot: &Arc<ListenerSlot>,
    mut stream: TcpStream,
    direct_peer: SocketAddr,
) -> Option<Serving> {
    let _ = stream.set_nodelay(true);
    let bound = slot.current.load_full();
    let mut buf = BytesMut::new();
    // A dual-stack socket shows IPv4 as mapped addresses, which no rule over IPv4 prefixes would match.
    let direct_peer = canonical(direct_peer);
    let (mut peer, mut local) = (direct_peer, canonical(stream.local_addr().unwrap_or(bound.model.address)));
    let mut redirected = false;
    if bound.model.proxy_protocol {
        match proxy_header(&mut stream, &mut buf).await {
            Ok(Some((source, destination))) => {
                peer = canonical(source);
                local = canonical(destination);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(%error, %direct_peer, "PROXY protocol");
                return None;
            }
        }
    }
    let mut listener = bound;
    if listener.model.use_original_dst {
        if let Some(original) = original_destination(&stream, listener.model.transparent) {
            redirected = if listener.model.transparent {
                original.port() != listener.model.address.port()
            } else {
                stream.local_addr().is_ok_and(|l| canonical(l) != original)
            };
            local = original;
        }
        // Its own port may be the key of a listener for outbound traffic to a service with that port.
        let keeps = listener.model.direction == model::Direction::Inbound;
        if let Some(other) = if keeps { None } else { hand_over(worker, local, slot) } {
            listener = other;
        }
    }
    let arrival = Arrival { peer, direct_peer, local, redirected };
    choose(worker, listener, Transport::tcp(stream, Bytes::new()), buf, arrival).await
}

/// The same for a stream that came by another way than a socket of the listener; `local` is the listener's address.
pub(crate) async fn delivered(
    worker: &Rc<Worker>,
    slot: &Arc<ListenerSlot>,
    stream: BoxedIo,
    peer: SocketAddr,
    local: SocketAddr,
) -> Option<Serving> {
    let peer = canonical(peer);
    let arrival = Arrival { peer, direct_peer: peer, local: canonical(local), redirected: false };
    choose(worker, slot.current.load_full(), Transport::boxed(stream), BytesMut::new(), arrival).await
}

/// Where a connection came from, and what it was meant for.
struct Arrival {
    peer: SocketAddr,
    direct_peer: SocketAddr,
    local: SocketAddr,
    redirected: bool,
}

/// Chooses the chain by what the connection says first, of which `buf` is read already.
async fn choose(
    worker: &Rc<Worker>,
    listener: Arc<Listener>,
    mut stream: Transport,
    mut buf: BytesMut,
    arrival: Arrival,
) -> Option<Serving> {
    let Arrival { peer, direct_peer, local, redirected } = arrival;
    let Some(place) = listener.place() else {
        tracing::debug!(listener = %listener.model.name, %peer, "more connections than the listener may have");
        let mut record = TcpRecord::refused(peer, local, None, "-");
        record.details = "over_connection_limit".to_owned();
        record.log(worker, &listener.logs);
        return None;
    };
    let (hello, http) = inspect(&listener, local, &mut stream, &mut buf).await;
    let tls = hello.is_some();
    let hello = hello.unwrap_or_default();
    let mut alpn = hello.alpn;
    alpn.extend(http.map(str::to_owned));
    let facts = ConnectionFacts {
        destination: local,
        source: peer.ip(),
        tls,
        sni: hello.sni.as_deref(),
        alpn: &alpn,
    };
    let Some(chain) = listener.chain(&facts).cloned() else {
        tracing::debug!(listener = %listener.model.name, %peer, %local, "no filter chain");
        TcpRecord::refused(peer, local, hello.sni.as_deref(), "NR").log(worker, &listener.logs);
        if tls {
            Refusal::UnknownName.send(&mut stream).await;
        }
        return None;
    };
    let accepted = Accepted { peer, direct_peer, local, redirected, sni: hello.sni, place };
    serve(worker, listener, chain, stream.prefixed(buf.freeze()), accepted).await
}

struct Accepted {
    peer: SocketAddr,
    direct_peer: SocketAddr,
    local: SocketAddr,
    redirected: bool,
    sni: Option<String>,
    place: ListenerPlace,
}

async fn serve(
    worker: &Rc<Worker>,
    listener: Arc<Listener>,
    chain: Arc<Chain>,
    transport: Transport,
    a: Accepted,
) -> Option<Serving> {
    let mut sni = a.sni;
    let mut client_chain = Box::default();
    let (io, identity, tls) = match chain.server_config(&worker.secrets) {
        None => (Io::Plain(transport), None, false),
        Some(Err(error)) => {
            tracing::warn!(%error, listener = %listener.model.name, "no TLS configuration");
            return None;
        }
        Some(Ok(config)) => {
            let handshake = tokio_rustls::TlsAcceptor::from(config).accept(transport.below_tls());
            match tokio::time::timeout(worker.options.handshake_timeout, handshake).await {
                Ok(Ok(mut s)) => {
                    s.get_mut().1.set_buffer_limit(Some(tcp::BUFFER));
                    let session = s.get_ref().1;
                    let identity =
                        session.peer_certificates().and_then(mesh_identity::peer_identity).map(Arc::new);
                    if chain.shows_certificates() {
                        client_chain = session.peer_certificates().unwrap_or_default().into();
                    }
                    if sni.is_none() {
                        sni = session.server_name().map(str::to_owned);
                    }
                    (Io::Server(Box::new(s)), identity, true)
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, peer = %a.peer, "TLS handshake");
                    TcpRecord::refused(a.peer, a.local, sni.as_deref(), "-").log(worker, &listener.logs);
                    return None;
                }
                Err(_) => return None,
            }
        }
    };
    let signals = match listener.model.direction {
        model::Direction::Inbound => worker.signals_from(&chain, a.direct_peer.ip()),
        _ => worker.signals(&chain),
    };
    let conn = Rc::new(Connection {
        source: SourceLabels::new(worker, identity.as_deref()),
        worker: Rc::clone(worker),
        signals,
        listener,
        peer: a.peer,
        direct_peer: a.direct_peer,
        local: a.local,
        redirected: a.redirected,
        sni,
        tls,
        identity,
        client_chain,
        started: std::time::Instant::now(),
        started_at: std::time::SystemTime::now(),
        series: Default::default(),
        peer_text: Default::default(),
        client_cert: Default::default(),
        found: Default::default(),
        chain,
        _place: Some(a.place),
    });
    let session = tls && matches!(conn.chain.terminal, Terminal::Tcp(_)) && negotiated_tunnels(&io);
    if !(if session { admitted(&conn).await } else { authorized(&conn).await }) {
        return None;
    }
    let serving: Serving = match &conn.chain.terminal {
        Terminal::Tcp(_) if session => Box::pin(tunnel::server::session(io, Rc::clone(&conn))),
        Terminal::Tcp(_) => Box::pin(tcp::serve(io, Rc::clone(&conn))),
        Terminal::Http(manager) => http_serving(io, Rc::clone(&conn), Arc::clone(manager)).await?,
        // Refused where chains are compiled.
        Terminal::Udp(_) => return None,
    };
    if conn.identity.is_none() {
        return Some(serving);
    }
    Some(Box::pin(async move {
        tokio::select! {
            () = serving => {}
            () = conn.revoked() => {
                tracing::warn!(peer = %conn.peer, principal = conn.principal(), "closed: the certificate was revoked");
            }
        }
    }))
}

/// Asks the chain's network filters; HTTP filters see requests, these only the connection.
pub(crate) async fn authorized(conn: &Rc<Connection>) -> bool {
    within_rate(conn) && guarded(conn, |_| true).await
}

/// The same about a session whose streams are connections: what is so for all of them. An authoriser is asked about each.
async fn admitted(conn: &Rc<Connection>) -> bool {
    within_rate(conn) && guarded(conn, |g| matches!(g, Guard::Rbac(_))).await
}

/// The rest, about a stream of such a session: an authoriser may think of the next connection otherwise.
pub(crate) async fn connected(conn: &Rc<Connection>) -> bool {
    !conn.chain.guards.iter().any(|g| matches!(g, Guard::Authz(_))) || guarded(conn, |_| true).await
}

fn refused(conn: &Rc<Connection>, flags: &'static str, details: String) {
    let mut record = TcpRecord::new(conn);
    record.flags = flags;
    record.details = details;
    record.log(&conn.worker, conn.chain.terminal.logs());
}

fn within_rate(conn: &Rc<Connection>) -> bool {
    let within = conn.chain.limits.iter().all(|l| l.take());
    if !within {
        tracing::debug!(peer = %conn.peer, "connection beyond the rate");
        refused(conn, "RL", "local_rate_limited".to_owned());
    }
    within
}

async fn guarded(conn: &Rc<Connection>, asked: impl Fn(&Guard) -> bool) -> bool {
    let mut found = Metadata::default();
    for guard in conn.chain.guards.iter().filter(|g| asked(g)) {
        let decided = match guard {
            Guard::Rbac(rbac) => {
                let facts = conn.facts(conn.peer.ip(), None);
                if let Some(said) = rbac.shadow(&facts) {
                    rbac.note(said, CONNECTION_RBAC, &mut found);
                }
                if let Some(matched) = rbac.audits(&facts) {
                    found.set(AUDIT.0, AUDIT.1, Arc::new(matched.into()));
                }
                rbac.check(&facts)
            }
            // Boxed, so that connections without it do not carry its state.
            Guard::Authz(a) => Box::pin(a.check(conn, &found)).await.map_err(str::to_owned),
        };
        if let Err(why) = decided {
            tracing::debug!(%why, peer = %conn.peer, "connection denied");
            note(conn, found);
            refused(conn, "UAEX", why);
            return false;
        }
    }
    note(conn, found);
    true
}

/// Keeps what was found out, for the log. Streams of a session are asked about again, and nothing else is found.
fn note(conn: &Connection, found: Metadata) {
    if found.iter().next().is_some() {
        let _ = conn.found.set(Box::new(found));
    }
}

/// Serves a connection that carries HTTP.
pub(crate) async fn http(io: Io, conn: Rc<Connection>, manager: Arc<HttpManager>) {
    if let Some(serving) = http_serving(io, conn, manager).await {
        serving.await;
    }
}

async fn http_serving(mut io: Io, conn: Rc<Connection>, manager: Arc<HttpManager>) -> Option<Serving> {
    let h2 = match manager.config.codec {
        model::HttpCodec::Http1 => false,
        model::HttpCodec::Http2 => true,
        // Refused where chains are compiled.
        model::HttpCodec::Http3 => return None,
        model::HttpCodec::Auto => match io.alpn() {
            Some(p) if p == b"h2" || p.ends_with(b"-h2") => true,
            Some(p) if p.starts_with(b"http/1") => false,
            // No ALPN says which: the first bytes do, whether they are inside of TLS or not.
            _ => match sniff(&mut io, &conn, &manager).await {
                Some((read, h2)) => {
                    io = io.with_prefix(read);
                    h2
                }
                None => return None,
            },
        },
    };
    Some(if h2 {
        Box::pin(h2::server::serve(io, conn, manager))
    } else {
        Box::pin(h1::server::serve(io, conn, manager))
    })
}

async fn sniff(io: &mut Io, conn: &Connection, manager: &HttpManager) -> Option<(Bytes, bool)> {
    let mut buf = BytesMut::with_capacity(4096);
    let limit = manager
        .config
        .request_headers_timeout
        .or(manager.config.idle_timeout)
        .unwrap_or(Duration::from_secs(3600));
    let mut deadline = Instant::now() + limit;
    // As one that drains: what is on its way is served.
    if let Some(at) = conn.ends(manager) {
        deadline = deadline.min(Instant::from_std(at) + h1::server::GRACE);
    }
    let mut draining = false;
    let signals = conn.signals.subscribe();
    let h2 = loop {
        match inspect::preface(&buf) {
            Seen::Yes(()) => break true,
            Seen::No => break false,
            Seen::More => {}
        }
        tokio::select! {
            n = io.read_buf(&mut buf) => match n {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            },
            // A client that has just been accepted is about to speak, and gets its answer.
            () = signals.drained(), if !draining => {
                draining = true;
                deadline = deadline.min(Instant::now() + h1::server::GRACE);
            }
            () = signals.killed() => return None,
            () = tokio::time::sleep_until(deadline) => return None,
        }
    };
    Some((buf.freeze(), h2))
}

/// Reads what the choice of a chain depends on.
async fn inspect(
    listener: &Listener,
    destination: SocketAddr,
    stream: &mut Transport,
    buf: &mut BytesMut,
) -> (Option<ClientHello>, Option<&'static str>) {
    let (want_tls, want_http) = listener.inspection(destination);
    if !want_tls && !want_http {
        return (None, None);
    }
    let limit = listener.model.inspect_timeout;
    let deadline = Instant::now() + if limit.is_zero() { Duration::from_secs(15) } else { limit };
    loop {
        let tls = if want_tls { inspect::client_hello(buf) } else { Seen::No };
        let http = if want_http { inspect::http(buf) } else { Seen::No };
        match (tls, http) {
            (Seen::Yes(h), _) => return (Some(h), None),
            (Seen::No, Seen::Yes(v)) => return (None, Some(v)),
            (Seen::No, Seen::No) => return (None, None),
            _ => {}
        }
        if buf.len() > inspect::MAX_HELLO * 2 {
            return (None, None);
        }
        buf.reserve(4096);
        match tokio::time::timeout_at(deadline, stream.read_buf(buf)).await {
            Ok(Ok(n)) if n > 0 => {}
            // Silent or gone: go on with what is known.
            _ => return (None, None),
        }
    }
}

async fn proxy_header(
    stream: &mut TcpStream,
    buf: &mut BytesMut,
) -> io::Result<Option<(SocketAddr, SocketAddr)>> {
    let read = async {
        loop {
            match proxy_protocol::decode(buf) {
                Ok(Some(h)) => {
                    let _ = buf.split_to(h.len);
                    return Ok(h.addresses);
                }
                Ok(None) => {}
                Err(e) => return Err(io::Error::new(io::ErrorKind::InvalidData, e)),
            }
            buf.reserve(1024);
            if stream.read_buf(buf).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    };
    tokio::time::timeout(PROXY_HEADER, read).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

pub(super) fn canonical(a: SocketAddr) -> SocketAddr {
    SocketAddr::new(a.ip().to_canonical(), a.port())
}

/// Where a redirected connection was going: the local address under TPROXY, else what netfilter remembers.
fn original_destination(stream: &TcpStream, transparent: bool) -> Option<SocketAddr> {
    let local = canonical(stream.local_addr().ok()?);
    if transparent {
        return Some(local);
    }
    let s = socket2::SockRef::from(stream);
    let original = if local.is_ipv4() { s.original_dst_v4() } else { s.original_dst_v6() };
    original.ok().and_then(|a| a.as_socket()).map(canonical)
}

/// The listener for an original destination: that exact address, then any address with its port.
fn hand_over(worker: &Worker, original: SocketAddr, from: &Arc<ListenerSlot>) -> Option<Arc<Listener>> {
    let compiled = worker.shared.compiled.load();
    let any: std::net::IpAddr = if original.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let dual = SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), original.port());
    let found = compiled
        .by_address
        .get(&original)
        .or_else(|| compiled.by_address.get(&SocketAddr::new(any, original.port())))
        .or_else(|| compiled.by_address.get(&dual))
        .filter(|l| !Arc::ptr_eq(l, from))?;
    Some(found.current.load_full())
}
