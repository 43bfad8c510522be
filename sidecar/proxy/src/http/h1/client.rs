//! The upstream side of HTTP/1.x.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll, ready},
};

use http::Method;
use tokio::time::Instant;

use super::{
    body::{Decoded, Decoder, Encoder},
    parse,
};
use crate::{
    http::{
        headers::{HeaderId, Headers},
        message::{BodyKind, Frame, RequestHead, ResponseHead, StreamError},
    },
    io::{Io, ReadBuffer, WriteBuf},
    upstream::{cluster::Permit, silence::Link},
    worker::Worker,
};

/// Interim answers to one request; a server that sends more is not going to answer.
const MAX_INTERIM: u32 = 16;

/// A connection that may serve requests one after the other.
pub(crate) struct H1Conn {
    io: Io,
    read: ReadBuffer,
    write: WriteBuf,
    /// Of one client only: not for others when its request is done.
    pub(crate) alone: bool,
    /// Requests served before.
    pub(crate) served: u64,
    pub(crate) opened: Instant,
    pub(crate) idle_since: Instant,
    /// What was heard from there, where that is watched.
    pub(crate) link: Option<Rc<Link>>,
    /// SPIFFE ID of the server.
    peer: Option<std::sync::Arc<str>>,
    shown: Option<mesh_identity::CertificateIds>,
    _permit: Permit,
}

impl H1Conn {
    /// Boxed: it moves between its pool and requests.
    pub(crate) fn new(io: Io, permit: Permit) -> Box<Self> {
        let now = Instant::now();
        Box::new(Self {
            peer: io.peer_principal(),
            shown: io.shown(),
            io,
            read: ReadBuffer::default(),
            write: WriteBuf::default(),
            alone: false,
            served: 0,
            opened: now,
            idle_since: now,
            link: None,
            _permit: permit,
        })
    }

    /// Whether the server's certificate was revoked.
    pub(crate) fn is_revoked(&self, worker: &Worker) -> bool {
        self.shown.as_ref().is_some_and(|ids| worker.secrets.revocations().revoked(ids))
    }

    /// Whether an idle connection can still be used: open, and silent.
    pub(crate) fn is_open(&mut self) -> bool {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        self.read.is_empty() && self.read.poll_fill(&mut self.io, &mut cx).is_pending()
    }
}

/// Writes the head of a request as a server is to read it; what follows is written with the encoder.
pub(super) fn write_head(head: &RequestHead, out: &mut Vec<u8>) -> Encoder {
    let upgrade = head.upgrade.is_some();
    let connect = head.method == Method::CONNECT && !upgrade;
    // An extended CONNECT of HTTP/2 is a GET with Upgrade here (RFC 8441 section 5).
    let method = if upgrade && head.method == Method::CONNECT { "GET" } else { head.method.as_str() };
    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    out.extend_from_slice(if connect { head.authority.as_bytes() } else { head.path.as_bytes() });
    out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
    out.extend_from_slice(head.authority.as_bytes());
    out.extend_from_slice(b"\r\n");
    head.headers.write_h1(out);
    if let Some(u) = &head.upgrade {
        out.extend_from_slice(b"connection: Upgrade\r\nupgrade: ");
        out.extend_from_slice(u.as_bytes());
        out.extend_from_slice(b"\r\n");
        if !head.headers.has(HeaderId::SecWebSocketKey) && u == "websocket" {
            // HTTP/2 has no key; any sixteen bytes will do (RFC 6455 section 4.1), the peer's answer is not passed back to a client that
            // could check it.
            out.extend_from_slice(b"sec-websocket-key: RmxvdGlsbGEgV2ViU29jaw==\r\n");
        }
    }
    let encoder = match head.body {
        BodyKind::Stream if upgrade || connect => Encoder::Raw,
        BodyKind::Empty => {
            if !head.headers.has(HeaderId::ContentLength)
                && matches!(head.method, Method::POST | Method::PUT | Method::PATCH)
            {
                out.extend_from_slice(b"content-length: 0\r\n");
            }
            Encoder::Empty
        }
        BodyKind::Length(n) => {
            if !head.headers.has(HeaderId::ContentLength) {
                out.extend_from_slice(format!("content-length: {n}\r\n").as_bytes());
            }
            Encoder::Length(n)
        }
        BodyKind::Stream => {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            Encoder::Chunked
        }
    };
    out.extend_from_slice(b"\r\n");
    encoder
}

/// One request on a connection.
pub(crate) struct H1Exchange {
    inner: RefCell<Inner>,
    /// The response began to arrive.
    pub(crate) answered: Cell<bool>,
}

struct Inner {
    conn: Box<H1Conn>,
    method: Method,
    upgrade: bool,
    encoder: Encoder,
    request_done: bool,
    decoder: Decoder,
    scanned: usize,
    keep_alive: bool,
    have_head: bool,
    /// Interim answers so far.
    interim: u32,
    ended: bool,
}

impl H1Exchange {
    /// Writes the head into the connection's buffer; [`Self::poll_flush`] sends it.
    pub(crate) fn start(mut conn: Box<H1Conn>, head: &RequestHead) -> Self {
        let encoder = write_head(head, &mut conn.write.buf);
        if let Some(l) = &conn.link {
            l.said();
        }
        Self {
            answered: Cell::new(false),
            inner: RefCell::new(Inner {
                conn,
                method: head.method.clone(),
                upgrade: head.upgrade.is_some(),
                request_done: encoder == Encoder::Empty,
                encoder,
                decoder: Decoder::Raw,
                scanned: 0,
                keep_alive: false,
                have_head: false,
                interim: 0,
                ended: false,
            }),
        }
    }

    /// A tunnel: no request is written, and the answer is made up (CONNECT to a TCP service).
    pub(crate) fn tunnel(conn: Box<H1Conn>) -> Self {
        Self {
            answered: Cell::new(true),
            inner: RefCell::new(Inner {
                conn,
                method: Method::CONNECT,
                upgrade: false,
                encoder: Encoder::Raw,
                request_done: false,
                decoder: Decoder::Raw,
                scanned: 0,
                keep_alive: false,
                have_head: true,
                interim: 0,
                ended: false,
            }),
        }
    }

    /// SPIFFE ID of the server.
    pub(crate) fn peer(&self) -> Option<std::sync::Arc<str>> {
        self.inner.borrow().conn.peer.clone()
    }

    /// Whether the connection had served others before: then a silent close means that it was stale.
    pub(crate) fn reused(&self) -> bool {
        self.inner.borrow().conn.served > 0
    }

    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let Inner { conn, .. } = &mut *self.inner.borrow_mut();
        conn.write.poll_room(&mut conn.io, cx).map_err(|_| StreamError::Reset)
    }

    pub(crate) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let Inner { conn, .. } = &mut *self.inner.borrow_mut();
        conn.write.poll_flush(&mut conn.io, cx).map_err(|_| StreamError::Reset)
    }

    pub(crate) fn data(&self, data: &[u8]) -> Result<(), StreamError> {
        let Inner { conn, encoder, .. } = &mut *self.inner.borrow_mut();
        encoder.data(data, &mut conn.write.buf)
    }

    pub(crate) fn finish(&self, trailers: Option<&Headers>) -> Result<(), StreamError> {
        let Inner { conn, encoder, request_done, .. } = &mut *self.inner.borrow_mut();
        *request_done = true;
        encoder.finish(trailers, &mut conn.write.buf)
    }

    /// Half-closes a tunnel after its last byte.
    pub(crate) fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let Inner { conn, encoder, .. } = &mut *self.inner.borrow_mut();
        if *encoder != Encoder::Raw {
            return Poll::Ready(Ok(()));
        }
        ready!(conn.write.poll_flush(&mut conn.io, cx)).map_err(|_| StreamError::Reset)?;
        use tokio::io::AsyncWrite;
        std::pin::Pin::new(&mut conn.io).poll_shutdown(cx).map_err(|_| StreamError::Reset)
    }

    pub(crate) fn poll_head(&self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, StreamError>> {
        let inner = &mut *self.inner.borrow_mut();
        if inner.have_head {
            return Poll::Ready(Ok(ResponseHead {
                status: 200,
                headers: Headers::default(),
                body: BodyKind::Stream,
            }));
        }
        loop {
            if !inner.conn.read.is_empty()
                && !self.answered.replace(true)
                && let Some(l) = &inner.conn.link
            {
                l.heard();
            }
            let end = parse::find_end(&inner.conn.read, &mut inner.scanned).map_err(head_error)?;
            let Some(end) = end else {
                let n = ready!(inner.conn.read.poll_fill(&mut inner.conn.io, cx))
                    .map_err(|_| StreamError::Reset)?;
                if n == 0 {
                    return Poll::Ready(Err(StreamError::Reset));
                }
                continue;
            };
            let block = inner.conn.read.split_to(end);
            inner.scanned = 0;
            let parsed = parse::response(&block, &inner.method).map_err(head_error)?;
            match parsed.head.status {
                101 if inner.upgrade => {}
                // Interim answers end here: `100 Continue` was given by this proxy already.
                100..=199 => {
                    inner.interim += 1;
                    if parsed.head.status == 101 || inner.interim > MAX_INTERIM {
                        return Poll::Ready(Err(StreamError::Protocol));
                    }
                    continue;
                }
                _ => {}
            }
            inner.have_head = true;
            inner.keep_alive = parsed.keep_alive;
            inner.decoder = match parsed.head.body {
                BodyKind::Empty => Decoder::Done,
                BodyKind::Length(n) => Decoder::Length(n),
                BodyKind::Stream if parsed.chunked => Decoder::ChunkSize,
                BodyKind::Stream => Decoder::Raw,
            };
            if parsed.head.status != 101 && inner.upgrade {
                // A refused upgrade: nothing may follow the request, and the connection is not reused.
                inner.keep_alive = false;
                inner.encoder = Encoder::Empty;
            }
            return Poll::Ready(Ok(parsed.head));
        }
    }

    pub(crate) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        let inner = &mut *self.inner.borrow_mut();
        loop {
            match inner.decoder.decode(&mut inner.conn.read) {
                Err(e) => {
                    inner.keep_alive = false;
                    return Poll::Ready(Some(Err(e)));
                }
                Ok(Decoded::Frame(f)) => return Poll::Ready(Some(Ok(f))),
                Ok(Decoded::End) => return Poll::Ready(None),
                Ok(Decoded::More) => {}
            }
            if inner.ended {
                return Poll::Ready(inner.decoder.eof().err().map(Err));
            }
            let n = ready!(inner.conn.read.poll_fill(&mut inner.conn.io, cx)).map_err(|_| StreamError::Reset);
            match n {
                Ok(0) => {
                    inner.ended = true;
                    inner.keep_alive = false;
                }
                Ok(_) => {}
                Err(e) => {
                    inner.keep_alive = false;
                    return Poll::Ready(Some(Err(e)));
                }
            }
        }
    }

    /// What follows the answer to CONNECT.
    pub(crate) fn into_io(self) -> Io {
        let H1Conn { io, mut read, .. } = *self.inner.into_inner().conn;
        let rest = read.split().freeze();
        if rest.is_empty() { io } else { io.with_prefix(rest) }
    }

    /// The connection, if it can serve another request.
    pub(crate) fn into_reusable(self) -> Option<Box<H1Conn>> {
        let i = self.inner.into_inner();
        (i.have_head
            && i.keep_alive
            && i.request_done
            && i.decoder.is_done()
            && i.conn.read.is_empty()
            && i.conn.write.len() == 0)
            .then_some(i.conn)
    }
}

fn head_error(e: parse::HeadError) -> StreamError {
    tracing::debug!(error = %e, "upstream response head");
    match e {
        parse::HeadError::TooLarge | parse::HeadError::TooManyFields => StreamError::TooLarge,
        _ => StreamError::Protocol,
    }
}
