//! Connections that carry xDS: TCP, TLS and unix sockets, with what is known of the peer.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use crate::until::{Ends, Until};

/// A TLS handshake that takes longer is abandoned.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes in progress; beyond it new connections wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 256;

/// How a peer is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A socket in the control plane's own state directory: the file mode is the authentication.
    Unix,
    /// Plaintext TCP, which is only ever bound to loopback.
    Plaintext,
    /// TLS; the certificates tell who it is.
    Tls,
}

/// What a server knows of a peer.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// Transport.
    pub transport: Transport,
    /// Remote address; `None` for unix sockets.
    pub address: Option<SocketAddr>,
    /// Verified certificate chain, leaf first; empty without a client certificate.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

impl PeerInfo {
    /// A peer without certificates.
    #[must_use]
    pub fn plain(transport: Transport, address: Option<SocketAddr>) -> Self {
        Self { transport, address, certificates: Arc::from([]) }
    }
}

/// An accepted connection.
#[derive(Debug)]
pub enum Conn {
    /// Plaintext TCP.
    Tcp(TcpStream),
    /// TLS.
    Tls(Box<Until<TlsStream<TcpStream>>>),
    /// Unix socket.
    Unix(UnixStream),
}

impl Connected for Conn {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        match self {
            Self::Tcp(s) => PeerInfo::plain(Transport::Plaintext, s.peer_addr().ok()),
            Self::Unix(_) => PeerInfo::plain(Transport::Unix, None),
            Self::Tls(s) => {
                let (tcp, session) = s.get_ref().get_ref();
                let certificates =
                    session.peer_certificates().map(|c| c.iter().cloned().collect()).unwrap_or_default();
                PeerInfo { transport: Transport::Tls, address: tcp.peer_addr().ok(), certificates }
            }
        }
    }
}

macro_rules! delegate {
    ($self:ident, $s:ident => $e:expr) => {
        match $self.get_mut() {
            Conn::Tcp($s) => $e,
            Conn::Tls($s) => $e,
            Conn::Unix($s) => $e,
        }
    };
}

impl AsyncRead for Conn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        delegate!(self, s => Pin::new(s).poll_read(cx, buf))
    }
}

impl AsyncWrite for Conn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, s => Pin::new(s).poll_write(cx, buf))
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, s => Pin::new(s).poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, s => Pin::new(s).poll_shutdown(cx))
    }
}

/// Backs off after an accept error such as a full file table, which would otherwise spin.
async fn accept_pause(what: &'static str, e: &io::Error) {
    tracing::warn!(error = %e, what, "accept failed");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Connections of a plaintext listener. Bind it to loopback only.
pub fn tcp(listener: TcpListener) -> impl Stream<Item = io::Result<Conn>> + Send {
    futures::stream::unfold(listener, |l| async move {
        loop {
            match l.accept().await {
                Ok((s, _)) => {
                    let _ = s.set_nodelay(true);
                    return Some((Ok(Conn::Tcp(s)), l));
                }
                Err(e) => accept_pause("tcp", &e).await,
            }
        }
    })
}

/// Connections of a TLS listener after their handshake. Failed and slow handshakes are dropped;
/// none of them holds up another. A session ends when `ends` says so of the certificates that its peer has shown.
pub fn tls(
    listener: TcpListener,
    config: Arc<rustls::ServerConfig>,
    ends: Option<Ends>,
) -> impl Stream<Item = io::Result<Conn>> + Send {
    let acceptor = TlsAcceptor::from(config);
    let raw = futures::stream::unfold(listener, |l| async move {
        loop {
            match l.accept().await {
                Ok((s, peer)) => {
                    let _ = s.set_nodelay(true);
                    return Some(((s, peer), l));
                }
                Err(e) => accept_pause("tls", &e).await,
            }
        }
    });
    raw.map(move |(s, peer)| {
        let (acceptor, ends) = (acceptor.clone(), ends.clone());
        async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(s)).await {
                Ok(Ok(s)) => {
                    let shown = s.get_ref().1.peer_certificates();
                    let end = ends.as_ref().zip(shown).map(|(ends, shown)| ends(shown));
                    Some(Ok(Conn::Tls(Box::new(Until::new(s, end)))))
                }
                Ok(Err(e)) => {
                    tracing::info!(%peer, error = %e, "TLS handshake failed");
                    None
                }
                Err(_) => None,
            }
        }
    })
    .buffer_unordered(MAX_HANDSHAKES)
    .filter_map(|c| async { c })
}

/// Connections of a unix listener.
pub fn unix(listener: UnixListener) -> impl Stream<Item = io::Result<Conn>> + Send {
    futures::stream::unfold(listener, |l| async move {
        loop {
            match l.accept().await {
                Ok((s, _)) => return Some((Ok(Conn::Unix(s)), l)),
                Err(e) => accept_pause("unix", &e).await,
            }
        }
    })
}

/// Binds a unix socket that only this user may connect to, in place of a stale one.
///
/// # Errors
/// If the path cannot be replaced or bound.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // Bound under another name and moved into place with its final mode, so that nobody can
    // connect in between.
    let hidden = path.with_extension(format!("{}.new", std::process::id()));
    match std::fs::remove_file(&hidden) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&hidden)?;
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&hidden, path)?;
    Ok(listener)
}
