//! One session on the trunk, whatever carries it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use quinn::{RecvStream, SendStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::links::Session;

/// A byte stream to or from a peer's gateway; it is in the counts of its link until it is dropped.
#[derive(Debug)]
pub struct TrunkStream {
    io: Carried,
    session: Session,
}

#[derive(Debug)]
enum Carried {
    Quic(SendStream, RecvStream),
    Tcp(TcpStream),
}

impl TrunkStream {
    /// A stream of a QUIC connection.
    pub(crate) fn quic(send: SendStream, receive: RecvStream, session: Session) -> Self {
        Self { io: Carried::Quic(send, receive), session }
    }

    /// A TCP connection, where UDP does not pass.
    pub(crate) fn tcp(stream: TcpStream, session: Session) -> Self {
        Self { io: Carried::Tcp(stream), session }
    }
}

impl AsyncRead for TrunkStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match &mut this.io {
            Carried::Quic(_, r) => AsyncRead::poll_read(Pin::new(r), cx, buf),
            Carried::Tcp(s) => {
                let before = buf.filled().len();
                ready!(Pin::new(s).poll_read(cx, buf))?;
                this.session.received(buf.filled().len() - before);
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for TrunkStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match &mut this.io {
            Carried::Quic(s, _) => AsyncWrite::poll_write(Pin::new(s), cx, buf),
            Carried::Tcp(s) => {
                let n = ready!(Pin::new(s).poll_write(cx, buf))?;
                this.session.sent(n);
                Poll::Ready(Ok(n))
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Carried::Quic(s, _) => AsyncWrite::poll_flush(Pin::new(s), cx),
            Carried::Tcp(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Carried::Quic(s, _) => AsyncWrite::poll_shutdown(Pin::new(s), cx),
            Carried::Tcp(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
