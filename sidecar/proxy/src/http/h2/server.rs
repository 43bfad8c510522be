//! The downstream side of HTTP/2: one task for the connection, one for each stream.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderMap, Method, Response, StatusCode};
use tokio::time::Instant;

use super::{
    client::{are_named, poll_recv},
    send::SendBody,
};
use crate::{
    config::listener::HttpManager,
    http::{
        downstream::Downstream,
        h1::server::GRACE,
        headers::{HeaderId, Headers},
        message::{Frame, MAX_FIELDS, MAX_HEAD, RequestHead, ResponseHead, StreamError, Version},
        mux::{self, Streams},
        record::{Flag, Record},
        service,
    },
    io::Io,
    tunnel,
    worker::connection::Connection,
};

/// Largest window (RFC 9113 section 6.9.1).
pub(crate) const MAX_WINDOW: u32 = (1 << 31) - 1;
/// Streams that a client reset before they were looked at (rapid reset).
pub(crate) const MAX_PENDING_RESETS: usize = 100;
/// Settings and preface of a new connection.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(10);

/// Serves a connection until it ends or drains.
pub(crate) async fn serve(io: Io, conn: Rc<Connection>, manager: Arc<HttpManager>) {
    let own = conn.worker.options.buffer_limit.min(MAX_WINDOW);
    let limit = conn.buffer_limit().min(MAX_WINDOW);
    let said = &manager.config.limits;
    // What the proxy allows anyway is not exceeded.
    let window = said.stream_window.map_or(limit, |w| w.min(own));
    let all = own.saturating_mul(16).min(MAX_WINDOW);
    let shared = said.connection_window.map_or(window.saturating_mul(16).min(all), |w| w.min(all));
    let streams = conn.worker.options.max_concurrent_streams;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(window)
        .initial_connection_window_size(shared)
        .max_concurrent_streams(said.max_concurrent_streams.map_or(streams, |s| s.min(streams)))
        .max_header_list_size(MAX_HEAD as u32)
        .max_send_buffer_size(limit as usize)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS);
    if manager.config.websocket {
        builder.enable_connect_protocol();
    }
    let mut h2 = match tokio::time::timeout(HANDSHAKE, builder.handshake::<_, Bytes>(io)).await {
        Ok(Ok(h2)) => h2,
        Ok(Err(error)) => {
            tracing::debug!(%error, peer = %conn.peer, "HTTP/2 handshake");
            return;
        }
        Err(_) => return,
    };
    let streams = Rc::new(Streams::new());
    let mut draining = false;
    let signals = conn.signals.subscribe();
    let mut leave = std::pin::pin!(async {
        loop {
            tokio::select! {
                () = signals.drained() => {}
                () = conn.aged(&manager) => return,
            }
            if conn.signals.are_of_gateway() {
                // Whoever has just connected through a gateway that drains is about to ask, and would connect again.
                tokio::time::sleep_until(Instant::from_std(conn.started + GRACE)).await;
            }
            // The gateway may be back by now.
            if signals.is_draining() {
                return;
            }
        }
    });
    // Streams come and go without touching this timer; what they did is looked at when it fires.
    let idle = manager.config.idle_timeout.filter(|t| !t.is_zero());
    let mut idle_timer = std::pin::pin!(tokio::time::sleep(idle.unwrap_or_default()));
    loop {
        tokio::select! {
            // `accept` also drives the connection; dropping its future loses nothing.
            next = h2.accept() => match next {
                Some(Ok((request, respond))) => {
                    streams.begin();
                    if streams.are_abandoned() {
                        tracing::debug!(peer = %conn.peer, "too many streams reset");
                        h2.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                        continue;
                    }
                    let (conn, manager) = (Rc::clone(&conn), Arc::clone(&manager));
                    let streams = Rc::clone(&streams);
                    if tunnel::server::concerns(&manager, &request) {
                        tokio::task::spawn_local(async move {
                            tunnel::server::stream(conn, manager, request, respond).await;
                            streams.end(true);
                        });
                        continue;
                    }
                    let arrival = conn.worker.arrival();
                    // Translated here, so that the stream's task does not carry the larger form.
                    let (parts, recv) = request.into_parts();
                    match head(&conn, &parts, &recv) {
                        Ok(head) => {
                            tokio::task::spawn_local(Box::pin(async move {
                                if conn.worker.is_stale(arrival) {
                                    overloaded(&conn, &manager, respond);
                                    return streams.end(true);
                                }
                                let answered = self::request(&conn, &manager, head, recv, respond).await;
                                streams.end(answered);
                            }));
                        }
                        Err(status) => streams.end(refuse(respond, status)),
                    }
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, peer = %conn.peer, "HTTP/2 connection ended");
                    return;
                }
                None => return,
            },
            () = leave.as_mut(), if !draining => {
                draining = true;
                h2.graceful_shutdown();
            }
            () = signals.killed() => return,
            () = idle_timer.as_mut(), if idle.is_some() && !draining => {
                let next = streams.idle_until(idle.unwrap_or_default());
                if next <= Instant::now() {
                    draining = true;
                    h2.graceful_shutdown();
                } else {
                    idle_timer.as_mut().reset(next);
                }
            }
        }
    }
}

/// Answers a stream that comes in an overload. What is done for one that is refused is lost for those that are
/// served, so nothing is done with it; the log has a line for it all the same.
fn overloaded(conn: &Connection, manager: &HttpManager, mut respond: SendResponse<Bytes>) {
    conn.worker.shared.totals.refused.fetch_add(1, Relaxed);
    let mut r = Response::new(());
    *r.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    let overloaded = http::HeaderName::from_static(HeaderId::XEnvoyOverloaded.name());
    r.headers_mut().insert(overloaded, http::HeaderValue::from_static("true"));
    let _ = respond.send_response(r, true);
    if !manager.logs.is_empty() {
        let mut rec = Record::new(conn, None);
        rec.status = 503;
        rec.flag(Flag::Om);
        rec.details = "overload".into();
        rec.finish_unread(conn, manager);
    }
}

/// Answers a request that cannot be one of HTTP/1; whether that was possible.
fn refuse(mut respond: SendResponse<Bytes>, status: u16) -> bool {
    let mut r = Response::new(());
    *r.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
    respond.send_response(r, true).is_ok()
}

/// Serves a request of which the head was read; whether an answer began.
pub(crate) async fn request(
    conn: &Rc<Connection>,
    manager: &Arc<HttpManager>,
    head: RequestHead,
    recv: RecvStream,
    respond: SendResponse<Bytes>,
) -> bool {
    let down = H2Down { inner: RefCell::new(Inner { recv, respond, send: None, data_done: false }) };
    let signals = conn.signals.subscribe();
    tokio::select! {
        () = service::handle(conn, manager, head, &down) => {}
        () = signals.killed() => down.abort(),
    }
    down.inner.borrow().send.is_some()
}

/// Translates a head; `Err` is the status of a refusal.
pub(crate) fn head(
    conn: &Connection,
    parts: &http::request::Parts,
    recv: &RecvStream,
) -> Result<RequestHead, u16> {
    translate(parts, conn.tls, recv.is_end_stream())
}

pub(super) fn translate(parts: &http::request::Parts, https: bool, ended: bool) -> Result<RequestHead, u16> {
    if parts.headers.len() > MAX_FIELDS {
        return Err(431);
    }
    if !are_named(&parts.headers) {
        return Err(400);
    }
    let protocol = parts.extensions.get::<h2::ext::Protocol>().map(|p| p.as_str().to_ascii_lowercase());
    let mut hosts = parts.headers.get_all(http::header::HOST).iter();
    let host = hosts.next().map(http::HeaderValue::to_str).transpose().map_err(|_| 400u16)?;
    if hosts.next().is_some() {
        return Err(400);
    }
    let path = if parts.method == Method::CONNECT && protocol.is_none() {
        // It names no resource (RFC 9113 section 8.5).
        if parts.uri.path_and_query().is_some() {
            return Err(400);
        }
        ""
    } else {
        parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str)
    };
    let mut headers = Headers::with_capacity(parts.headers.len() * 40 + 512, parts.headers.len() + 12);
    for (name, value) in &parts.headers {
        mux::push(&mut headers, name.as_str().as_bytes(), value.as_bytes())?;
    }
    let target = mux::Target {
        method: parts.method.clone(),
        authority: parts.uri.authority().map(http::uri::Authority::as_str),
        host,
        path,
        protocol,
    };
    mux::head(Version::Http2, https, target, headers, ended)
}

struct H2Down {
    inner: RefCell<Inner>,
}

struct Inner {
    recv: RecvStream,
    respond: SendResponse<Bytes>,
    send: Option<SendBody>,
    data_done: bool,
}

impl Downstream for H2Down {
    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        let Inner { recv, data_done, .. } = &mut *self.inner.borrow_mut();
        poll_recv(recv, data_done, cx)
    }

    fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        let inner = &mut *self.inner.borrow_mut();
        match &mut inner.send {
            Some(s) => s.poll_reset(cx),
            None => inner.respond.poll_reset(cx).map(|_| ()),
        }
    }

    fn start(&self, head: &ResponseHead, end: bool) -> Result<(), StreamError> {
        let inner = &mut *self.inner.borrow_mut();
        let mut response = Response::new(());
        // An accepted upgrade is 200 in HTTP/2 (RFC 8441 section 5).
        let status = if head.status == 101 { 200 } else { head.status };
        *response.status_mut() = StatusCode::from_u16(status).map_err(|_| StreamError::Protocol)?;
        let mut map: HeaderMap = head.headers.to_map();
        if head.status == 101 {
            map.remove("sec-websocket-accept");
        }
        *response.headers_mut() = map;
        let stream = inner.respond.send_response(response, end).map_err(|e| super::send::stream_error(&e))?;
        inner.send = Some(SendBody::new(stream, end));
        Ok(())
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        match &mut self.inner.borrow_mut().send {
            Some(s) => s.poll_drain(cx),
            None => Poll::Ready(Err(StreamError::Protocol)),
        }
    }

    fn data(&self, data: Bytes) -> Result<(), StreamError> {
        match &mut self.inner.borrow_mut().send {
            Some(s) => {
                s.data(data);
                Ok(())
            }
            None => Err(StreamError::Protocol),
        }
    }

    fn finish(&self, trailers: Option<&Headers>) -> Result<(), StreamError> {
        if let Some(s) = &mut self.inner.borrow_mut().send {
            s.finish(trailers);
        }
        Ok(())
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        match &mut self.inner.borrow_mut().send {
            Some(s) => s.poll_drain(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn abort(&self) {
        let inner = &mut *self.inner.borrow_mut();
        match &mut inner.send {
            Some(s) => s.reset(Reason::INTERNAL_ERROR),
            None => inner.respond.send_reset(Reason::INTERNAL_ERROR),
        }
    }

    fn is_multiplexed(&self) -> bool {
        true
    }
}
