//! Bytes between a connection and a tunnel, or two of either, without copying them on the way.

use std::{
    future::{Future as _, poll_fn},
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{io::AsyncWrite, time::Instant};

use crate::{
    io::Io,
    tcp::{Failure, Moved},
};

/// First read of a connection: most are small.
const FIRST_READ: usize = 4 * 1024;
/// Reads of a connection that filled the one before.
const LARGE_READ: usize = 64 * 1024;

/// One direction.
struct Half {
    /// What was read and not yet written.
    pending: Bytes,
    /// Room for reads; there is none while the connection is silent.
    buf: BytesMut,
    read_size: usize,
    eof: bool,
    /// Something may be waiting inside of TLS.
    dirty: bool,
    done: bool,
}

impl Half {
    fn new() -> Self {
        Self {
            pending: Bytes::new(),
            buf: BytesMut::new(),
            read_size: FIRST_READ,
            eof: false,
            dirty: false,
            done: false,
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, from: &mut Io) -> Poll<io::Result<Option<Bytes>>> {
        if let Io::Tunnel(t) = from {
            return t.poll_recv(cx);
        }
        // An idle connection should not hold a buffer for what may come.
        if !from.may_read(cx) {
            self.buf = BytesMut::new();
            return Poll::Pending;
        }
        if self.buf.capacity() < self.read_size / 4 {
            self.buf.reserve(self.read_size);
        }
        let room = self.buf.capacity();
        let n = match tokio_util::io::poll_read_buf(Pin::new(from), cx, &mut self.buf) {
            Poll::Ready(r) => r?,
            Poll::Pending => {
                self.buf = BytesMut::new();
                return Poll::Pending;
            }
        };
        if n == room {
            self.read_size = LARGE_READ;
        }
        Poll::Ready(Ok((n > 0).then(|| self.buf.split().freeze())))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, to: &mut Io) -> Poll<io::Result<usize>> {
        if let Io::Tunnel(t) = to {
            return t.poll_send(cx, &mut self.pending);
        }
        let n = ready!(Pin::new(to).poll_write(cx, &self.pending))?;
        if n == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        bytes::Buf::advance(&mut self.pending, n);
        self.dirty = true;
        Poll::Ready(Ok(n))
    }

    /// Moves bytes until one side must wait; `Ready` when the reader has ended and the writer was told.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Io,
        to: &mut Io,
        moved: &Moved,
    ) -> Poll<Result<(), Side>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        loop {
            while !self.pending.is_empty() {
                let n = ready!(self.poll_write(cx, to)).map_err(|_| Side::Writer)?;
                moved.add(n as u64);
            }
            if self.eof {
                ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(|_| Side::Writer)?;
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(|_| Side::Writer)?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            match self.poll_read(cx, from) {
                Poll::Ready(Ok(Some(b))) => self.pending = b,
                Poll::Ready(Ok(None)) => self.eof = true,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Side::Reader)),
                Poll::Pending => {
                    if self.dirty && Pin::new(&mut *to).poll_flush(cx).map_err(|_| Side::Writer)?.is_ready() {
                        self.dirty = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

/// Which side of a direction broke.
enum Side {
    Reader,
    Writer,
}

/// Moves bytes both ways until both directions have ended, one side breaks, or nothing moved for `idle`.
pub(crate) async fn relay(
    down: &mut Io,
    up: &mut Io,
    received: &Moved,
    sent: &Moved,
    idle: Option<Duration>,
) -> Result<(), Failure> {
    let (mut request, mut response) = (Half::new(), Half::new());
    let mut timer = idle.map(|t| Box::pin(tokio::time::sleep(t)));
    let mut seen = 0;
    let result = poll_fn(|cx| {
        let a = request.poll(cx, down, up, received);
        let b = response.poll(cx, up, down, sent);
        let down_broke = || Poll::Ready(Err(("DC", "downstream_remote_disconnect".to_owned())));
        let up_broke = || Poll::Ready(Err(("UC", "upstream_reset".to_owned())));
        match (a, b) {
            (Poll::Ready(Err(Side::Reader)), _) | (_, Poll::Ready(Err(Side::Writer))) => return down_broke(),
            (_, Poll::Ready(Err(Side::Reader))) | (Poll::Ready(Err(Side::Writer)), _) => return up_broke(),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Ok(())),
            _ => {}
        }
        if let (Some(t), Some(limit)) = (timer.as_mut(), idle) {
            // Activity is noticed when the timer fires rather than by moving the timer at each byte.
            while t.as_mut().poll(cx).is_ready() {
                let now = received.total() + sent.total();
                if now == seen {
                    return Poll::Ready(Err(("SI", "idle_timeout".to_owned())));
                }
                seen = now;
                t.as_mut().reset(Instant::now() + limit);
            }
        }
        Poll::Pending
    })
    .await;
    if result.is_err() {
        for io in [down, up] {
            if let Io::Tunnel(t) = io {
                t.reset();
            }
        }
    }
    result
}
