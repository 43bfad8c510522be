//! A connection that ends when its peer is not accepted any more.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Ready when who it is about is accepted no more.
pub type End = Pin<Box<dyn Future<Output = ()> + Send>>;
/// Says of the certificates that a peer has shown when they are accepted no more.
pub type Ends = Arc<dyn Fn(&[CertificateDer<'static>]) -> End + Send + Sync>;

/// Fails its reads from then on; whoever serves it always reads.
pub struct Until<S> {
    inner: S,
    end: Option<End>,
    ended: bool,
}

impl<S: fmt::Debug> fmt::Debug for Until<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Until").field(&self.inner).finish()
    }
}

impl<S> Until<S> {
    /// Without an end it goes on for as long as the connection.
    pub fn new(inner: S, end: Option<End>) -> Self {
        Self { inner, end, ended: false }
    }

    /// The connection.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    fn poll_ended(&mut self, cx: &mut Context<'_>) -> bool {
        if let Some(end) = &mut self.end
            && end.as_mut().poll(cx).is_ready()
        {
            self.end = None;
            self.ended = true;
        }
        self.ended
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the peer's certificate was revoked")
}

impl<S: AsyncRead + Unpin> AsyncRead for Until<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.poll_ended(cx) {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Until<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_waiting_reader_is_told() {
        let (mut near, far) = tokio::io::duplex(64);
        let (tell, told) = tokio::sync::oneshot::channel::<()>();
        let end: End = Box::pin(async move { drop(told.await) });
        let mut until = Until::new(far, Some(end));
        near.write_all(b"a").await.unwrap();
        assert_eq!(until.read_u8().await.unwrap(), b'a');
        let reading = tokio::spawn(async move {
            let error = until.read_u8().await.unwrap_err();
            (error.kind(), until.write_all(b"b").await.is_err(), until.read_u8().await.is_err())
        });
        tokio::task::yield_now().await;
        tell.send(()).unwrap();
        let limit = std::time::Duration::from_secs(5);
        let told = tokio::time::timeout(limit, reading).await.unwrap().unwrap();
        assert_eq!(told, (io::ErrorKind::ConnectionAborted, true, true));
    }
}
