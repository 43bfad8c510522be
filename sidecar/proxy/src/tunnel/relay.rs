//! Bytes between a connection and a tunnel, or two of either, without copying them on the way.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    time::Instant,
};

use crate::{
    io::Io,
    tcp::{BUFFER, Failure, Moved},
    worker::Worker,
};

/// Reads at least this large have a buffer of their own to be sent from; smaller ones are copied out of the worker's,
/// so that what waits to be sent takes no more room than its size.
const LARGE: usize = 16 * 1024;

/// One direction.
#[derive(Default)]
struct Half {
    /// What was read and not yet written.
    pending: Bytes,
    /// The last read was large: there is probably more.
    large: bool,
    eof: bool,
    /// Something may be waiting inside of TLS.
    dirty: bool,
    done: bool,
}

impl Half {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        worker: &Worker,
        from: &mut Io,
    ) -> Poll<io::Result<Option<Bytes>>> {
        if let Io::Tunnel(t) = from {
            return t.poll_recv(cx);
        }
        if self.large {
            // The buffer is not kept while there is nothing to read into it.
            ready!(from.poll_readable(cx));
            let mut buf = BytesMut::with_capacity(BUFFER);
            let n = ready!(tokio_util::io::poll_read_buf(Pin::new(from), cx, &mut buf))?;
            self.large = n >= LARGE;
            return Poll::Ready(Ok((n > 0).then(|| buf.freeze())));
        }
        let scratch = &mut *worker.scratch.borrow_mut();
        let mut buf = ReadBuf::new(scratch);
        ready!(Pin::new(from).poll_read(cx, &mut buf))?;
        let read = buf.filled();
        self.large = read.len() >= LARGE;
        Poll::Ready(Ok((!read.is_empty()).then(|| Bytes::copy_from_slice(read))))
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
        worker: &Worker,
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
            match self.poll_read(cx, worker, from) {
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
    worker: &Worker,
    down: &mut Io,
    up: &mut Io,
    received: &Moved,
    sent: &Moved,
    idle: Option<Duration>,
) -> Result<(), Failure> {
    let (mut request, mut response) = (Half::default(), Half::default());
    let mut alarm = worker.alarms.alarm();
    let mut idle = idle.map(|limit| (limit, Instant::now() + limit));
    let mut seen = 0;
    let result = poll_fn(|cx| {
        let a = request.poll(cx, worker, down, up, received);
        let b = response.poll(cx, worker, up, down, sent);
        let down_broke = || Poll::Ready(Err(("DC", "downstream_remote_disconnect".to_owned())));
        let up_broke = || Poll::Ready(Err(("UC", "upstream_reset".to_owned())));
        match (a, b) {
            (Poll::Ready(Err(Side::Reader)), _) | (_, Poll::Ready(Err(Side::Writer))) => return down_broke(),
            (_, Poll::Ready(Err(Side::Reader))) | (Poll::Ready(Err(Side::Writer)), _) => return up_broke(),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Ok(())),
            _ => {}
        }
        if let Some((limit, at)) = idle.as_mut() {
            // Activity is noticed when the timer fires rather than by moving the timer at each byte.
            while alarm.poll(*at, cx).is_ready() {
                let now = received.total() + sent.total();
                if now == seen {
                    return Poll::Ready(Err(("SI", "idle_timeout".to_owned())));
                }
                seen = now;
                *at = Instant::now() + *limit;
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
