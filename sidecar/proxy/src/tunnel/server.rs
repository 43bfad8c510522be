//! Ends CONNECT streams that clients open: what a stream carries goes to a cluster as a TCP connection, or is served
//! by another listener of this proxy as if it had been accepted there. The second is HBONE: authorization, routing,
//! metrics and logs of the workload's port are those of its inbound listener, and the peer is who the outer session
//! says.

use std::{cell::Cell, future::poll_fn, net::SocketAddr, rc::Rc, sync::Arc, task::Poll};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{Method, Request, Response, StatusCode};
use mesh_model::proxy::ClientCertificate;
use tokio::time::Instant;

use super::TunnelStream;
use crate::{
    config::{
        listener::{AccessLog, Chain, ConnectionFacts, HttpManager, Terminal},
        route::{Action, Forward, Found, Route},
    },
    http::{
        edge,
        filtered::HeadOnly,
        filters, h2 as http2,
        message::RequestHead,
        record::{Record, TcpRecord},
        service,
    },
    io::Io,
    listener::accept,
    tcp::{self, Times},
    upstream::{
        cluster::Cluster,
        host::{Host, HostAddr},
    },
    worker::{Gauge, connection::Connection},
};

/// Whether a request may be a tunnel's.
pub(crate) fn concerns(manager: &HttpManager, request: &Request<RecvStream>) -> bool {
    manager.config.connect
        && request.method() == Method::CONNECT
        && request.extensions().get::<h2::ext::Protocol>().is_none()
}

/// ALPN by which a mesh client makes itself known where there is a TLS session of its own.
const MESH: &str = "istio";

/// The stream of a tunnel that is not accepted yet.
struct Offer {
    recv: RecvStream,
    respond: SendResponse<Bytes>,
}

impl Offer {
    fn accept(mut self) -> Option<Io> {
        let send = self.respond.send_response(Response::new(()), false).ok()?;
        Some(Io::Tunnel(Box::new(TunnelStream::new(send, self.recv, None))))
    }

    fn refuse(mut self, status: u16) {
        let mut r = Response::new(());
        *r.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        let _ = self.respond.send_response(r, true);
    }
}

/// Serves a CONNECT stream; one whose route does not end it here is served like any other request.
pub(crate) async fn stream(
    conn: Rc<Connection>,
    manager: Arc<HttpManager>,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let (parts, recv) = request.into_parts();
    let offer = Offer { recv, respond };
    let mut head = match http2::server::head(&conn, &parts, &offer.recv) {
        Ok(head) => head,
        Err(status) => return offer.refuse(status),
    };
    drop(parts);
    let table = manager.routes();
    let found = table.as_ref().map_or(Found::NoHost, |t| t.find(&head, None));
    let route = match found {
        Found::Route(_, r) if terminates(r).is_some() => Arc::clone(r),
        _ => {
            Box::pin(http2::server::request(&conn, &manager, head, offer.recv, offer.respond)).await;
            return;
        }
    };
    drop(table);
    if (!manager.filters.is_empty() || conn.worker.shared.hooks.policy.as_ref().is_some_and(|p| p.checks()))
        && let Err((status, details)) = Box::pin(admit(&conn, &manager, &mut head, &route)).await
    {
        let mut record = TcpRecord::new(&conn);
        record.refuse(status, "UAEX", details);
        record.request = Some(Box::new(head));
        record.log(&conn.worker, &manager.logs);
        return offer.refuse(status);
    }
    let Some(forward) = terminates(&route) else { return offer.refuse(500) };
    let slot = Arc::clone(&forward.destination(conn.worker.rng.next()).cluster);
    let mut record = TcpRecord::new(&conn);
    let picked = match slot.load() {
        Some(cluster) => tcp::pick(&conn, &cluster, &[]).map(|host| (cluster, host)),
        None => Err(("NC", "cluster_not_found".to_owned())),
    };
    record.cluster = Some(slot);
    let failure = match picked {
        Ok((_, host)) if matches!(host.addr, HostAddr::Internal(_)) => {
            return internal(&conn, &head.authority, &host, offer).await;
        }
        Ok((cluster, _)) => {
            if !manager.logs.is_empty() {
                record.request = Some(Box::new(head));
            }
            let idle = forward.idle_timeout.or(manager.config.stream_idle_timeout);
            let times = Times { idle, end: None };
            return proxy(&conn, &cluster, offer, record, times, &manager.logs).await;
        }
        Err(failure) => failure,
    };
    record.refuse(503, failure.0, failure.1);
    record.request = Some(Box::new(head));
    record.log(&conn.worker, &manager.logs);
    offer.refuse(503);
}

fn terminates(route: &Route) -> Option<&Forward> {
    match &route.action {
        Action::Forward(f) if f.connect => Some(f),
        _ => None,
    }
}

/// Serves a session of which each stream is a connection to this chain, which has let the peer in.
pub(crate) async fn session(io: Io, conn: Rc<Connection>) {
    let Terminal::Tcp(proxy) = &conn.chain.terminal else { return };
    let limit = conn.worker.options.buffer_limit.min(http2::server::MAX_WINDOW);
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(limit)
        .initial_connection_window_size(limit.saturating_mul(16).min(http2::server::MAX_WINDOW))
        .max_frame_size(super::MAX_FRAME)
        .max_send_buffer_size(limit as usize)
        .max_concurrent_streams(conn.worker.options.max_concurrent_streams)
        .max_pending_accept_reset_streams(http2::server::MAX_PENDING_RESETS);
    let mut h2 = match tokio::time::timeout(http2::server::HANDSHAKE, builder.handshake::<_, Bytes>(io)).await
    {
        Ok(Ok(h2)) => h2,
        _ => return,
    };
    let active = Rc::new(Cell::new(0usize));
    let last = Rc::new(Cell::new(Instant::now()));
    let mut alarm = conn.worker.alarms.alarm();
    let signals = conn.signals.subscribe();
    let mut draining = false;
    let idle = proxy.config.idle_timeout.filter(|t| !t.is_zero());
    loop {
        // Looked at again whenever the connection moves, so also when its last stream has ended.
        let expired = poll_fn(|cx| match idle {
            Some(limit) if !draining && active.get() == 0 => alarm.poll(last.get() + limit, cx),
            _ => Poll::Pending,
        });
        tokio::select! {
            // `accept` also drives the connection; dropping its future loses nothing.
            next = h2.accept() => {
                let Some(Ok((request, respond))) = next else { return };
                active.set(active.get() + 1);
                let (conn, active, last) = (Rc::clone(&conn), Rc::clone(&active), Rc::clone(&last));
                tokio::task::spawn_local(async move {
                    let connect = request.method() == Method::CONNECT;
                    let offer = Offer { recv: request.into_body(), respond };
                    match connect {
                        true if accept::connected(&conn).await => inner(&conn, offer).await,
                        true => offer.refuse(403),
                        false => offer.refuse(405),
                    }
                    active.set(active.get() - 1);
                    last.set(Instant::now());
                });
            }
            () = signals.drained(), if !draining => {
                draining = true;
                h2.graceful_shutdown();
            }
            () = signals.killed() => return,
            () = expired => {
                draining = true;
                h2.graceful_shutdown();
            }
        }
    }
}

/// A stream of a [`session`].
async fn inner(conn: &Rc<Connection>, offer: Offer) {
    let Terminal::Tcp(t) = &conn.chain.terminal else { return };
    let _gauge = Gauge::new(&conn.worker.shared.totals, |t| &t.connections, |t| &t.connections_total);
    let mut record = TcpRecord::new(conn);
    record.starts_now();
    match tcp::cluster(conn, t, &mut record).await {
        Ok(cluster) => proxy(conn, &cluster, offer, record, Times::of(t), &t.logs).await,
        Err((flags, details)) => {
            record.refuse(503, flags, details);
            record.log(&conn.worker, &t.logs);
            offer.refuse(503);
        }
    }
}

/// Asks filters and policy about the request that opens a tunnel.
async fn admit(
    conn: &Rc<Connection>,
    manager: &HttpManager,
    head: &mut RequestHead,
    route: &Route,
) -> Result<(), (u16, String)> {
    let mut rec = Record::new(conn, Some(head));
    edge::prepare(conn, manager, head, &mut rec);
    let mut passed = filters::Passed::default();
    let mut at = 0;
    let refused = loop {
        // The route ends the tunnel here, whatever is known of the request by now.
        match filters::run(conn, manager, head, Some(route), &HeadOnly, &mut passed, &mut rec, at).await {
            Err(reply) => break reply,
            Ok(Some(next)) => at = next,
            Ok(None) => match service::policy(conn, head, &mut rec, route).await {
                Ok(()) => return Ok(()),
                Err(reply) => break reply,
            },
        }
    };
    Err((refused.status, rec.details.into_owned()))
}

/// Connects a tunnel to a host of a cluster and moves bytes until both directions have ended.
async fn proxy(
    conn: &Rc<Connection>,
    cluster: &Arc<Cluster>,
    offer: Offer,
    mut record: TcpRecord,
    times: Times,
    logs: &[AccessLog],
) {
    let result = match tcp::connect(conn, cluster, None, None, &mut record).await {
        Err(failure) => {
            record.status = 503;
            offer.refuse(503);
            Err(failure)
        }
        Ok((mut up, holds)) => match offer.accept() {
            None => Err(("DC", "downstream_remote_disconnect".to_owned())),
            Some(mut down) => {
                record.status = 200;
                tcp::carry(conn, &mut down, &mut up, times, &holds, &mut record).await
            }
        },
    };
    if let Err((flags, details)) = result {
        record.flags = flags;
        record.details = details;
    }
    record.finish(logs);
}

/// Serves a tunnel as a connection to `authority` that a listener of this proxy accepted.
async fn internal(outer: &Rc<Connection>, authority: &str, host: &Host, offer: Offer) {
    let HostAddr::Internal(name) = &host.addr else { return offer.refuse(500) };
    let worker = &outer.worker;
    let listener = worker.shared.compiled.load().by_name.get(name).map(|l| l.current.load_full());
    let Some(listener) = listener else {
        tracing::debug!(listener = %name, "a tunnel leads to a listener that is not there");
        return offer.refuse(503);
    };
    // What a listener takes is addresses; a name would have to be resolved by somebody.
    let Ok(destination) = authority.parse::<SocketAddr>() else { return offer.refuse(400) };
    let alpn = [MESH.to_owned()];
    let facts = ConnectionFacts {
        destination,
        source: outer.peer.ip(),
        tls: outer.tls,
        sni: None,
        alpn: if outer.mtls() { &alpn } else { &[] },
    };
    let Some(chain) = listener.chain(&facts).filter(|c| is_satisfied(c, outer)).cloned() else {
        TcpRecord::refused(outer.peer, destination, None, "NR").log(worker, &listener.logs);
        return offer.refuse(404);
    };
    let conn = Rc::new(Connection {
        worker: Rc::clone(worker),
        signals: worker.signals(&chain),
        source: outer.source.clone(),
        listener,
        peer: outer.peer,
        direct_peer: outer.direct_peer,
        local: destination,
        redirected: true,
        sni: None,
        tls: outer.tls,
        identity: outer.identity.clone(),
        client_chain: outer.client_chain.clone(),
        // The session has one.
        _place: None,
        started: std::time::Instant::now(),
        started_at: std::time::SystemTime::now(),
        series: Default::default(),
        peer_text: Default::default(),
        client_cert: Default::default(),
        found: Default::default(),
        chain,
    });
    if !accept::authorized(&conn).await {
        return offer.refuse(403);
    }
    match &conn.chain.terminal {
        Terminal::Tcp(_) => inner(&conn, offer).await,
        Terminal::Udp(_) => offer.refuse(500),
        Terminal::Http(manager) => {
            let manager = Arc::clone(manager);
            if let Some(io) = offer.accept() {
                Box::pin(accept::http(io, conn, manager)).await;
            }
        }
    }
}

/// Whether the outer session is what the chain asks of a session of its own.
fn is_satisfied(chain: &Chain, outer: &Connection) -> bool {
    match &chain.model.tls {
        None => true,
        Some(t) => match t.client_certificate {
            ClientCertificate::Required(_) => outer.mtls(),
            _ => outer.tls,
        },
    }
}
