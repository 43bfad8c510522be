//! A connection's bytes: plain, TLS, or from a trunk, without dynamic dispatch on the common paths.

use std::{
    cell::RefCell,
    io,
    ops::{Deref, DerefMut},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use mesh_identity::CertificateIds;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A byte stream from elsewhere, such as a stream of a trunk.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// A boxed [`ByteStream`].
pub type BoxedIo = Box<dyn ByteStream>;

/// A transport below TLS. Bytes that were read for inspection are handed out first.
pub(crate) struct Transport {
    stream: Stream,
    prefix: Bytes,
    /// Read from the socket at once, handed to TLS in the small pieces that it asks for.
    ahead: BytesMut,
    /// The last read was as large as it could be: there is probably more.
    busy: bool,
    below_tls: bool,
}

/// Bytes read ahead of TLS, which itself reads 4 KiB at a time: a system call for each of these is most of what a
/// busy connection costs.
const READ_AHEAD: usize = 128 * 1024;

enum Stream {
    Tcp(TcpStream),
    Boxed(BoxedIo),
}

/// Bytes that were already read, then the rest of the stream.
pub(crate) struct Prefixed {
    prefix: Bytes,
    inner: Io,
}

impl AsyncRead for Prefixed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            let n = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..n]);
            self.prefix.advance(n);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Transport {
    pub(crate) fn tcp(stream: TcpStream, prefix: Bytes) -> Self {
        Self { stream: Stream::Tcp(stream), prefix, ahead: BytesMut::new(), busy: false, below_tls: false }
    }

    /// The transport with bytes that were read of it back in front.
    pub(crate) fn prefixed(self, prefix: Bytes) -> Self {
        Self { prefix, ..self }
    }

    /// The transport for TLS to read from.
    pub(crate) fn below_tls(self) -> Self {
        Self { below_tls: true, ..self }
    }

    pub(crate) fn boxed(io: BoxedIo) -> Self {
        Self {
            stream: Stream::Boxed(io),
            prefix: Bytes::new(),
            ahead: BytesMut::new(),
            busy: false,
            below_tls: false,
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.prefix.is_empty() {
            let n = this.prefix.len().min(buf.remaining());
            buf.put_slice(&this.prefix[..n]);
            this.prefix.advance(n);
            return Poll::Ready(Ok(()));
        }
        if this.busy && this.below_tls && this.ahead.is_empty() {
            this.ahead.reserve(READ_AHEAD);
            let n = match ready!(this.stream.poll_read_ahead(cx, &mut this.ahead)) {
                Ok(n) => n,
                Err(e) => return Poll::Ready(Err(e)),
            };
            this.busy = n > buf.remaining();
        }
        if !this.ahead.is_empty() {
            let n = this.ahead.len().min(buf.remaining());
            buf.put_slice(&this.ahead[..n]);
            this.ahead.advance(n);
            if this.ahead.is_empty() && !this.busy {
                this.ahead = BytesMut::new();
            }
            return Poll::Ready(Ok(()));
        }
        let (before, room) = (buf.filled().len(), buf.remaining());
        match &mut this.stream {
            Stream::Tcp(s) => ready!(Pin::new(s).poll_read(cx, buf))?,
            Stream::Boxed(s) => ready!(Pin::new(s).poll_read(cx, buf))?,
        }
        this.busy = buf.filled().len() - before == room;
        Poll::Ready(Ok(()))
    }
}

impl Stream {
    fn poll_read_ahead(&mut self, cx: &mut Context<'_>, into: &mut BytesMut) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(s) => tokio_util::io::poll_read_buf(Pin::new(s), cx, into),
            Self::Boxed(s) => tokio_util::io::poll_read_buf(Pin::new(s), cx, into),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(s) => Pin::new(s).poll_write(cx, data),
            Stream::Boxed(s) => Pin::new(s).poll_write(cx, data),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(s) => Pin::new(s).poll_flush(cx),
            Stream::Boxed(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Stream::Boxed(s) => Pin::new(s).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Stream::Boxed(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self.stream, Stream::Tcp(_))
    }
}

/// A connection as the codecs see it.
pub(crate) enum Io {
    Plain(Transport),
    Server(Box<tokio_rustls::server::TlsStream<Transport>>),
    Client(Box<tokio_rustls::client::TlsStream<Transport>>),
    /// A TLS stream of which some plaintext was read to tell its protocol.
    Prefixed(Box<Prefixed>),
    /// A CONNECT stream.
    Tunnel(Box<crate::tunnel::TunnelStream>),
    /// A POST request and its answer.
    Post(Box<crate::tunnel::post::PostStream>),
}

macro_rules! each {
    ($self:ident, $s:ident => $e:expr) => {
        match $self.get_mut() {
            Io::Plain($s) => $e,
            Io::Server($s) => $e,
            Io::Client($s) => $e,
            Io::Prefixed($s) => $e,
            Io::Tunnel($s) => $e,
            Io::Post($s) => $e,
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Server(s) => {
                let read = Pin::new(&mut **s).poll_read(cx, buf);
                // What TLS answers by itself (a renegotiation with an alert, RFC 5246 section 7.2.2) waits for the next
                // write otherwise, and the peer with it.
                if read.is_pending() && s.get_ref().1.wants_write() {
                    let _ = Pin::new(&mut **s).poll_flush(cx)?;
                }
                read
            }
            Io::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Io::Client(s) => Pin::new(s).poll_read(cx, buf),
            Io::Prefixed(s) => Pin::new(s).poll_read(cx, buf),
            Io::Tunnel(s) => Pin::new(s).poll_read(cx, buf),
            Io::Post(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, s => Pin::new(s).poll_write(cx, data))
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_shutdown(cx))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, s => Pin::new(s).poll_write_vectored(cx, bufs))
    }
    fn is_write_vectored(&self) -> bool {
        match self {
            Io::Plain(s) => s.is_write_vectored(),
            Io::Server(s) => s.is_write_vectored(),
            Io::Client(s) => s.is_write_vectored(),
            Io::Prefixed(_) | Io::Tunnel(_) | Io::Post(_) => false,
        }
    }
}

impl Io {
    /// ALPN that was negotiated.
    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        match self {
            Io::Plain(_) | Io::Tunnel(_) | Io::Post(_) => None,
            Io::Server(s) => s.get_ref().1.alpn_protocol(),
            Io::Client(s) => s.get_ref().1.alpn_protocol(),
            Io::Prefixed(p) => p.inner.alpn(),
        }
    }

    /// By what revocation lists tell the certificates of the server at the other end.
    pub(crate) fn shown(&self) -> Option<CertificateIds> {
        let Io::Client(s) = self else { return None };
        Some(CertificateIds::of(s.get_ref().1.peer_certificates()?))
    }

    /// SPIFFE ID of the server at the other end.
    pub(crate) fn peer_principal(&self) -> Option<Arc<str>> {
        let s = match self {
            Io::Client(s) => s,
            Io::Tunnel(t) => return t.peer(),
            _ => return None,
        };
        let identity = mesh_identity::peer_identity(s.get_ref().1.peer_certificates()?)?;
        identity.spiffe.map(|id| Arc::from(id.as_str()))
    }

    /// Ready when a read may find something, or fail.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Io::Plain(Transport { stream: Stream::Tcp(s), prefix, .. }) if prefix.is_empty() => {
                s.poll_read_ready(cx).map(|_| ())
            }
            _ => Poll::Ready(()),
        }
    }

    /// The socket, if its bytes are those of the connection and none of them was read ahead.
    pub(crate) fn plain_tcp(&self) -> Option<&TcpStream> {
        match self {
            Io::Plain(Transport { stream: Stream::Tcp(s), prefix, ahead, .. })
                if prefix.is_empty() && ahead.is_empty() =>
            {
                Some(s)
            }
            _ => None,
        }
    }

    /// Gives bytes that were read back to the reader.
    pub(crate) fn with_prefix(self, prefix: Bytes) -> Self {
        match self {
            Io::Plain(mut t) if t.prefix.is_empty() => {
                t.prefix = prefix;
                Io::Plain(t)
            }
            inner => Io::Prefixed(Box::new(Prefixed { prefix, inner })),
        }
    }
}

/// Bytes a connection may hold unsent before its producer is paused.
pub(crate) const HIGH_WATER: usize = 64 * 1024;

/// A write buffer in front of an [`Io`].
#[derive(Default)]
pub(crate) struct WriteBuf {
    pub(crate) buf: Vec<u8>,
    sent: usize,
    needs_flush: bool,
}

impl WriteBuf {
    pub(crate) fn len(&self) -> usize {
        self.buf.len() - self.sent
    }

    /// Writes and flushes everything; TLS may hold ciphertext that a write left behind.
    pub(crate) fn poll_flush(&mut self, io: &mut Io, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.buf.len() {
            let n = ready!(Pin::new(&mut *io).poll_write(cx, &self.buf[self.sent..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += n;
            self.needs_flush = true;
        }
        self.buf.clear();
        self.sent = 0;
        if self.buf.capacity() > 4 * HIGH_WATER {
            self.buf.shrink_to(HIGH_WATER);
        }
        if self.needs_flush {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.needs_flush = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Gives back the room that a large message needed.
    pub(crate) fn rest(&mut self) {
        if self.buf.is_empty() && self.buf.capacity() > 4096 {
            self.buf = Vec::new();
        }
    }

    /// Ready when more may be appended.
    pub(crate) fn poll_room(&mut self, io: &mut Io, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.len() < HIGH_WATER { Poll::Ready(Ok(())) } else { self.poll_flush(io, cx) }
    }
}

/// What was read from a connection and not yet used. It holds no more room than its bytes need, so that a
/// connection without a request in flight, of which there may be thousands, costs next to nothing.
#[derive(Default)]
pub(crate) struct ReadBuffer {
    bytes: BytesMut,
    /// The last read was as large as it could be: the next one gets room of its own.
    bulk: bool,
}

impl Deref for ReadBuffer {
    type Target = BytesMut;
    fn deref(&self) -> &BytesMut {
        &self.bytes
    }
}

impl DerefMut for ReadBuffer {
    fn deref_mut(&mut self) -> &mut BytesMut {
        &mut self.bytes
    }
}

impl ReadBuffer {
    /// Reads once; `Ok(0)` is the end of the stream.
    pub(crate) fn poll_fill(&mut self, io: &mut Io, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if !self.bulk {
            return self.poll_small(io, cx);
        }
        if self.bytes.capacity() - self.bytes.len() < READ_CHUNK / 8 {
            self.bytes.reserve(READ_CHUNK);
        }
        let room = self.bytes.capacity() - self.bytes.len();
        let n = ready!(tokio_util::io::poll_read_buf(Pin::new(io), cx, &mut self.bytes))?;
        self.bulk = n == room;
        Poll::Ready(Ok(n))
    }

    fn poll_small(&mut self, io: &mut Io, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        thread_local!(static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_CHUNK].into()));
        SCRATCH.with_borrow_mut(|scratch| {
            let mut read = ReadBuf::new(scratch);
            ready!(Pin::new(io).poll_read(cx, &mut read))?;
            let filled = read.filled();
            self.bytes.extend_from_slice(filled);
            self.bulk = filled.len() == READ_CHUNK;
            Poll::Ready(Ok(filled.len()))
        })
    }

    /// Gives back the room that a large message needed.
    pub(crate) fn rest(&mut self) {
        if self.bytes.is_empty() && self.bytes.capacity() > READ_CHUNK / 4 {
            self.bytes = BytesMut::new();
        }
    }
}

/// Spare room made for a read.
const READ_CHUNK: usize = 16 * 1024;
