//! One session on the trunk, whatever carries it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use quinn::{RecvStream, SendStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A byte stream to a peer's gateway.
#[derive(Debug)]
pub enum TrunkStream {
    /// A stream of a QUIC connection.
    Quic(SendStream, RecvStream),
    /// A TCP connection, where UDP does not pass.
    Tcp(TcpStream),
}

impl AsyncRead for TrunkStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Quic(_, r) => AsyncRead::poll_read(Pin::new(r), cx, buf),
            Self::Tcp(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for TrunkStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Quic(s, _) => AsyncWrite::poll_write(Pin::new(s), cx, buf),
            Self::Tcp(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Quic(s, _) => AsyncWrite::poll_flush(Pin::new(s), cx),
            Self::Tcp(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Quic(s, _) => AsyncWrite::poll_shutdown(Pin::new(s), cx),
            Self::Tcp(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
