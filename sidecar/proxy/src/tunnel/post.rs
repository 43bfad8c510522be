//! A tunnel that is the body of a POST request and the body of its answer, over HTTP/1.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::http::{
    h1::client::H1Exchange,
    message::{Frame, StreamError},
};

/// An exchange whose answer has begun, as bytes both ways.
pub(crate) struct PostStream {
    exchange: H1Exchange,
    /// Rest of a piece that a reader took in parts.
    rest: Bytes,
    read_ended: bool,
    write_ended: bool,
}

fn broken(e: StreamError) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, format!("{e:?}"))
}

impl PostStream {
    pub(crate) fn new(exchange: H1Exchange) -> Self {
        Self { exchange, rest: Bytes::new(), read_ended: false, write_ended: false }
    }
}

impl AsyncRead for PostStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() && !self.read_ended {
            match ready!(self.exchange.poll_frame(cx)) {
                Some(Ok(Frame::Data(d))) => self.rest = d,
                Some(Ok(Frame::Trailers(_))) => {}
                Some(Err(e)) => return Poll::Ready(Err(broken(e))),
                None => self.read_ended = true,
            }
        }
        let n = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest[..n]);
        self.rest.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PostStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.write_ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        // An empty chunk would end the body.
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.exchange.poll_room(cx)).map_err(broken)?;
        self.exchange.data(data).map_err(broken)?;
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.exchange.poll_flush(cx).map_err(broken)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.write_ended {
            self.write_ended = true;
            self.exchange.finish(None).map_err(broken)?;
        }
        self.exchange.poll_flush(cx).map_err(broken)
    }
}
