//! Connections as CONNECT streams of a shared HTTP/2 connection (RFC 9113 section 8.5).
//!
//! A handshake costs a millisecond of CPU on both sides together, a stream costs some tens of microseconds, so a
//! connection between two proxies is made once for each worker and destination and carries every TCP connection
//! between them. HBONE is the same with mutual TLS on a well-known port, where the request names the address that
//! the connection is for.
//!
//! Proxies that are no part of a mesh may speak HTTP/1 only: there a tunnel has a connection for itself, by CONNECT or as
//! the bodies of a POST request and its answer.
//!
//! Half-closes become END_STREAM and back; what a slow reader does not take fills its stream's window and then
//! stops whoever sends; a connection that breaks off is a reset.

pub(crate) mod client;
pub(crate) mod post;
pub(crate) mod relay;
pub(crate) mod server;

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::upstream::pool::StreamGuard;

/// Largest DATA frame that we take. A frame is handed to TLS at once, so with frames of the default 16 KiB, which
/// do not even fit one record with their header, each record would be written on its own.
pub(crate) const MAX_FRAME: u32 = 64 * 1024;

/// What a CONNECT stream carries, as bytes.
pub(crate) struct TunnelStream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Rest of a frame that a reader took in parts.
    rest: Bytes,
    read_ended: bool,
    write_ended: bool,
    /// The stream's share of a pooled connection; `None` where the peer opened it.
    guard: Option<StreamGuard>,
}

fn broken(e: h2::Error) -> io::Error {
    match e.reason() {
        Some(Reason::CANCEL | Reason::CONNECT_ERROR | Reason::NO_ERROR) | None => {
            io::Error::new(io::ErrorKind::ConnectionReset, e)
        }
        Some(_) => io::Error::other(e),
    }
}

impl TunnelStream {
    pub(crate) fn new(send: SendStream<Bytes>, recv: RecvStream, guard: Option<StreamGuard>) -> Self {
        Self { send, recv, rest: Bytes::new(), read_ended: false, write_ended: false, guard }
    }

    /// SPIFFE ID of the server at the other end of a pooled connection.
    pub(crate) fn peer(&self) -> Option<Arc<str>> {
        self.guard.as_ref()?.conn().peer.clone()
    }

    /// The next bytes as they came; `None` at the end. A piece is asked for when the one before it was taken, so
    /// its window is given back at once.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.rest))));
        }
        loop {
            if self.read_ended {
                return Poll::Ready(Ok(None));
            }
            match ready!(self.recv.poll_data(cx)) {
                Some(Ok(b)) => {
                    let _ = self.recv.flow_control().release_capacity(b.len());
                    if let Some(g) = &self.guard {
                        g.conn().heard();
                    }
                    if !b.is_empty() {
                        return Poll::Ready(Ok(Some(b)));
                    }
                }
                Some(Err(e)) => return Poll::Ready(Err(broken(e))),
                None => self.read_ended = true,
            }
        }
    }

    /// Sends what the stream's window takes of `data`. Window is asked for only by who has data: what an idle
    /// stream reserves, the others of its connection lack.
    pub(crate) fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<usize>> {
        if self.write_ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let mut room = self.send.capacity();
        if room < data.len() {
            self.send.reserve_capacity(data.len());
            room = self.send.capacity();
        }
        while room == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(n)) => room = n,
                Some(Err(e)) => return Poll::Ready(Err(broken(e))),
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            }
        }
        let n = room.min(data.len());
        self.send.send_data(data.split_to(n), false).map_err(broken)?;
        if let Some(g) = &self.guard {
            g.conn().said();
        }
        Poll::Ready(Ok(n))
    }

    /// Ends our direction.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        if !self.write_ended {
            self.write_ended = true;
            self.send.send_data(Bytes::new(), true).map_err(broken)?;
        }
        Ok(())
    }

    /// Breaks off both directions, as a TCP reset would.
    pub(crate) fn reset(&mut self) {
        self.send.send_reset(Reason::CONNECT_ERROR);
        self.write_ended = true;
        self.read_ended = true;
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(mut b) = ready!(self.poll_recv(cx))? {
            let n = b.len().min(buf.remaining());
            buf.put_slice(&b[..n]);
            b.advance(n);
            self.rest = b;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let piece = &data[..data.len().min(MAX_FRAME as usize)];
        let mut room = self.send.capacity();
        if room == 0 {
            self.send.reserve_capacity(piece.len());
            room = self.send.capacity();
        }
        if room == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(n)) => room = n,
                Some(Err(e)) => return Poll::Ready(Err(broken(e))),
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            }
        }
        let mut piece = Bytes::copy_from_slice(&piece[..piece.len().min(room)]);
        self.poll_send(cx, &mut piece)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.end())
    }
}
