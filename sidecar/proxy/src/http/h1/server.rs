//! The downstream side of HTTP/1.x: one task owns the connection and serves its requests in order.

use std::{
    cell::RefCell,
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::Method;
use mesh_model::proxy::HttpCodec;
use tokio::{io::AsyncWrite, time::Instant};

use super::{
    body::{Decoded, Decoder, Encoder},
    parse::{self, HeadError},
};
use crate::{
    config::listener::HttpManager,
    http::{
        downstream::Downstream,
        headers::{HeaderId, Headers},
        message::{BodyKind, Frame, RequestHead, ResponseHead, StreamError, Version},
        service,
    },
    io::{HIGH_WATER, Io, ReadBuffer, WriteBuf},
    worker::{alarm::Alarm, connection::Connection, signals::Subscription},
};

/// A client that sent a request which was answered without reading it may send this much more before the
/// connection is closed under it.
const LINGER_BYTES: usize = 256 * 1024;
const LINGER: Duration = Duration::from_millis(500);
/// How long a connection that drains waits for a request that may be on its way.
pub(crate) const GRACE: Duration = Duration::from_secs(1);
/// Unread bytes of pipelined requests.
const MAX_PIPELINED: usize = 64 * 1024;
/// A client that takes nothing for this long while being answered is gone.
const WRITE_STALL: Duration = Duration::from_secs(60);

struct Inner {
    io: Io,
    read: ReadBuffer,
    write: WriteBuf,
    eof: bool,
    decoder: Decoder,
    encoder: Encoder,
    /// `100 Continue` is owed when the body is asked for.
    owes_continue: bool,
    keep_alive: bool,
    broken: bool,
    version: Version,
    head_method: bool,
    tunnel: bool,
    started: bool,
    finished: bool,
    draining: bool,
}

/// Serves a connection until it ends.
pub(crate) async fn serve(io: Io, conn: Rc<Connection>, manager: Arc<HttpManager>) {
    let down = H1Down {
        inner: RefCell::new(Inner {
            io,
            read: ReadBuffer::default(),
            write: WriteBuf::default(),
            eof: false,
            decoder: Decoder::Done,
            encoder: Encoder::Empty,
            owes_continue: false,
            keep_alive: true,
            broken: false,
            version: Version::Http11,
            head_method: false,
            tunnel: false,
            started: false,
            finished: false,
            draining: false,
        }),
        alarm: RefCell::new(conn.worker.alarms.alarm()),
    };
    let signals = conn.signals.subscribe();
    tokio::select! {
        () = requests(&down, &conn, &manager, &signals) => {}
        () = signals.killed() => {}
    }
}

enum Next {
    Request(RequestHead),
    Refused(HeadError),
    Timeout,
    Closed,
}

async fn requests(down: &H1Down, conn: &Rc<Connection>, manager: &Arc<HttpManager>, signals: &Subscription) {
    let mut first = true;
    loop {
        match next_head(down, conn, manager, signals).await {
            // Where the protocol was guessed from the first bytes and these are none that we know, the peer could
            // not read an answer in HTTP/1 either: it may have meant a preface of HTTP/2 (RFC 9113 section 3.4).
            Next::Refused(HeadError::NotHttp) if first && manager.config.codec == HttpCodec::Auto => return,
            Next::Request(head) => {
                let old = conn.ends(manager).is_some_and(|at| at <= std::time::Instant::now());
                down.inner.borrow_mut().draining = old || signals.is_draining();
                // Boxed: most connections are idle most of the time, and then should not have a request's size.
                Box::pin(service::handle(conn, manager, head, down)).await;
            }
            Next::Refused(e) => {
                tracing::debug!(error = %e, peer = %conn.peer, "request refused");
                down.inner.borrow_mut().begin_refusal();
                Box::pin(service::refuse(conn, manager, down, e.status(), Version::Http11)).await;
            }
            Next::Timeout => {
                down.inner.borrow_mut().begin_refusal();
                Box::pin(service::refuse(conn, manager, down, 408, Version::Http11)).await;
            }
            Next::Closed => return,
        }
        if !after(down).await {
            return;
        }
        first = false;
    }
}

/// Finishes a response; true if another request may follow.
async fn after(down: &H1Down) -> bool {
    let flushed = tokio::time::timeout(WRITE_STALL, poll_fn(|cx| down.poll_flush(cx))).await;
    let reuse = {
        let i = down.inner.borrow();
        matches!(flushed, Ok(Ok(())))
            && i.keep_alive
            && i.finished
            && !i.broken
            && !i.tunnel
            && i.decoder.is_done()
            && !i.eof
    };
    if reuse {
        return true;
    }
    // Closing with unread bytes would reset the connection and could destroy the answer on its way.
    let _ = tokio::time::timeout(LINGER, async {
        poll_fn(|cx| Pin::new(&mut down.inner.borrow_mut().io).poll_shutdown(cx)).await?;
        let mut left = LINGER_BYTES;
        while left > 0 && !down.inner.borrow().eof && !down.inner.borrow().broken {
            let n = poll_fn(|cx| {
                let Inner { io, read, .. } = &mut *down.inner.borrow_mut();
                read.clear();
                read.poll_fill(io, cx)
            })
            .await?;
            if n == 0 {
                break;
            }
            left = left.saturating_sub(n);
        }
        Ok::<_, std::io::Error>(())
    })
    .await;
    false
}

async fn next_head(down: &H1Down, conn: &Connection, manager: &HttpManager, signals: &Subscription) -> Next {
    let mut scanned = 0;
    let mut skipped = 0;
    let mut deadline = None;
    loop {
        // A few empty lines before a request are tolerated (RFC 9112 section 2.2).
        {
            let i = &mut *down.inner.borrow_mut();
            while scanned == 0 && skipped < 4 && i.read.starts_with(b"\r\n") {
                let _ = i.read.split_to(2);
                skipped += 1;
            }
            if !i.read.is_empty() {
                match parse::find_end(&i.read, &mut scanned) {
                    Err(e) => return Next::Refused(e),
                    Ok(Some(end)) => {
                        let block = i.read.split_to(end);
                        return match parse::request(&block, conn.tls) {
                            Ok(p) => {
                                i.begin(&p.head, p.keep_alive);
                                Next::Request(p.head)
                            }
                            Err(e) => Next::Refused(e),
                        };
                    }
                    Ok(None) => {}
                }
            }
            if i.eof {
                return Next::Closed;
            }
        }
        let begun = {
            let i = &mut *down.inner.borrow_mut();
            i.read.rest();
            i.write.rest();
            !i.read.is_empty()
        };
        let limit = if begun { manager.config.request_headers_timeout } else { manager.config.idle_timeout };
        // A head has one deadline: a byte now and then must not move it.
        let mut until: Option<Instant> = deadline.filter(|_| begun);
        // One that is too old waits for a request that may be on its way, as one that drains.
        let old = conn.ends(manager).filter(|_| !begun).map(|at| Instant::from_std(at) + GRACE);
        let mut drained = false;
        let n = poll_fn(|cx| {
            let Inner { io, read, .. } = &mut *down.inner.borrow_mut();
            if let Poll::Ready(n) = read.poll_fill(io, cx) {
                return Poll::Ready(Some(n));
            }
            // A request may be on its way already, the first one of a new connection in particular: it is served,
            // and its answer ends the connection.
            if !begun && !drained && signals.poll_drained(cx).is_ready() {
                drained = true;
                until = Some(Instant::now() + GRACE);
            }
            // Bytes that are there already need no timer.
            let at = match (until, limit) {
                (Some(at), _) => at,
                (None, None) => match old {
                    Some(at) => *until.insert(at),
                    None => return Poll::Pending,
                },
                (None, Some(limit)) => {
                    let idle = Instant::now() + limit;
                    *until.insert(old.map_or(idle, |at| at.min(idle)))
                }
            };
            down.alarm.borrow_mut().poll(at, cx).map(|()| None)
        })
        .await;
        deadline = until.filter(|_| begun);
        let Some(n) = n else {
            return if begun { Next::Timeout } else { Next::Closed };
        };
        match n {
            Ok(0) | Err(_) => {
                let mut i = down.inner.borrow_mut();
                i.eof = true;
                return Next::Closed;
            }
            Ok(_) => {}
        }
    }
}

impl Inner {
    fn begin(&mut self, head: &RequestHead, keep_alive: bool) {
        self.decoder = match head.body {
            BodyKind::Empty => Decoder::Done,
            BodyKind::Length(n) => Decoder::Length(n),
            BodyKind::Stream => Decoder::ChunkSize,
        };
        self.encoder = Encoder::Empty;
        self.owes_continue = head.expect_continue;
        self.keep_alive = keep_alive;
        self.version = head.version;
        self.head_method = head.method == Method::HEAD;
        self.tunnel = head.method == Method::CONNECT;
        self.started = false;
        self.finished = false;
    }

    /// What follows an unreadable request cannot be told apart from it: answer and close.
    fn begin_refusal(&mut self) {
        self.decoder = Decoder::Done;
        self.owes_continue = false;
        self.keep_alive = false;
        self.version = Version::Http11;
        self.head_method = false;
        self.tunnel = false;
        self.started = false;
        self.finished = false;
    }

    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, StreamError>> {
        match ready!(self.read.poll_fill(&mut self.io, cx)) {
            Ok(0) => {
                self.eof = true;
                Poll::Ready(Ok(0))
            }
            Ok(n) => Poll::Ready(Ok(n)),
            Err(_) => {
                self.eof = true;
                self.broken = true;
                Poll::Ready(Err(StreamError::Reset))
            }
        }
    }
}

/// A connection as the request that it currently serves.
pub(crate) struct H1Down {
    inner: RefCell<Inner>,
    /// Limits the waits for heads.
    alarm: RefCell<Alarm>,
}

impl Downstream for H1Down {
    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, StreamError>>> {
        let i = &mut *self.inner.borrow_mut();
        if i.owes_continue && !i.started {
            i.owes_continue = false;
            i.write.buf.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        if i.write.len() > 0 && !i.started {
            // Only `100 Continue` can be waiting here; the client will not send before it has it.
            match i.write.poll_flush(&mut i.io, cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(Some(Err(StreamError::Reset))),
                Poll::Pending => return Poll::Pending,
            }
        }
        loop {
            match i.decoder.decode(&mut i.read) {
                Ok(Decoded::Frame(f)) => return Poll::Ready(Some(Ok(f))),
                Ok(Decoded::End) => return Poll::Ready(None),
                Ok(Decoded::More) => {}
                Err(e) => {
                    i.keep_alive = false;
                    return Poll::Ready(Some(Err(e)));
                }
            }
            if i.eof {
                return Poll::Ready(i.decoder.eof().err().map(Err));
            }
            if let Err(e) = ready!(i.fill(cx)) {
                return Poll::Ready(Some(Err(e)));
            }
        }
    }

    fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        let i = &mut *self.inner.borrow_mut();
        if i.broken {
            return Poll::Ready(());
        }
        // While a body is still expected its reader finds the end; reading here would take its bytes.
        if !i.decoder.is_done() {
            return Poll::Pending;
        }
        loop {
            if i.eof {
                return Poll::Ready(());
            }
            if i.read.len() >= MAX_PIPELINED {
                return Poll::Pending;
            }
            if ready!(i.fill(cx)).is_err() {
                return Poll::Ready(());
            }
        }
    }

    fn start(&self, head: &ResponseHead, end: bool) -> Result<(), StreamError> {
        // An answer that is for the log alone, to a client that left, has no status.
        let code = http::StatusCode::from_u16(head.status).map_err(|_| StreamError::Protocol)?;
        let i = &mut *self.inner.borrow_mut();
        i.started = true;
        i.owes_continue = false;
        let upgraded = head.status == 101;
        let tunnel = upgraded || (i.tunnel && (200..300).contains(&head.status));
        i.tunnel = tunnel;
        // An answer before the end of the request leaves the connection in doubt.
        if i.draining || (end && !i.decoder.is_done()) {
            i.keep_alive = false;
        }
        let no_body = i.head_method || head.status == 204 || head.status == 304;
        let mut chunked = false;
        i.encoder = if tunnel {
            i.decoder = Decoder::Raw;
            Encoder::Raw
        } else if no_body {
            Encoder::Empty
        } else {
            match head.body {
                BodyKind::Length(n) => Encoder::Length(n),
                BodyKind::Empty => Encoder::Empty,
                BodyKind::Stream if i.version == Version::Http10 => {
                    i.keep_alive = false;
                    Encoder::Raw
                }
                BodyKind::Stream => {
                    chunked = true;
                    Encoder::Chunked
                }
            }
        };
        let out = &mut i.write.buf;
        out.extend_from_slice(b"HTTP/1.1 ");
        out.extend_from_slice(code.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(code.canonical_reason().unwrap_or("").as_bytes());
        out.extend_from_slice(b"\r\n");
        head.headers.write_h1(out);
        if chunked {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        } else if !no_body
            && !tunnel
            && head.body == BodyKind::Empty
            && !head.headers.has(HeaderId::ContentLength)
        {
            out.extend_from_slice(b"content-length: 0\r\n");
        }
        if upgraded {
            out.extend_from_slice(b"connection: Upgrade\r\n");
        } else if !i.keep_alive && !tunnel {
            out.extend_from_slice(b"connection: close\r\n");
        } else if i.version == Version::Http10 && !tunnel {
            out.extend_from_slice(b"connection: keep-alive\r\n");
        }
        out.extend_from_slice(b"\r\n");
        i.finished = end;
        Ok(())
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let i = &mut *self.inner.borrow_mut();
        if i.write.len() < HIGH_WATER {
            return Poll::Ready(Ok(()));
        }
        self::flush(i, cx)
    }

    fn data(&self, data: Bytes) -> Result<(), StreamError> {
        let Inner { encoder, write, .. } = &mut *self.inner.borrow_mut();
        encoder.data(&data, &mut write.buf)
    }

    fn finish(&self, trailers: Option<&Headers>) -> Result<(), StreamError> {
        let i = &mut *self.inner.borrow_mut();
        i.finished = true;
        i.encoder.finish(trailers, &mut i.write.buf)
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let i = &mut *self.inner.borrow_mut();
        ready!(self::flush(i, cx))?;
        if i.tunnel && i.finished && !i.broken {
            // The end of a tunnel's stream is the half-close of its connection.
            return Pin::new(&mut i.io).poll_shutdown(cx).map_err(|_| StreamError::Reset);
        }
        Poll::Ready(Ok(()))
    }

    fn abort(&self) {
        let i = &mut *self.inner.borrow_mut();
        i.keep_alive = false;
        i.broken = true;
    }

    fn is_multiplexed(&self) -> bool {
        false
    }
}

fn flush(i: &mut Inner, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
    i.write.poll_flush(&mut i.io, cx).map_err(|_| {
        i.broken = true;
        StreamError::Reset
    })
}
