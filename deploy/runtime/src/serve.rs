//! Sockets for gRPC servers and clients: TLS from a secret store, unix sockets of mode 0600.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::Stream;
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::{Channel, Endpoint, Uri};

/// A handshake that takes longer is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes under way at once; more wait in the kernel's queue.
const HANDSHAKES: usize = 256;

/// Accepts TLS connections; a failed handshake is logged and costs nobody else anything.
///
/// # Errors
/// If the address cannot be bound.
pub async fn tls_incoming(
    address: SocketAddr,
    config: Arc<ServerConfig>,
) -> io::Result<(SocketAddr, impl Stream<Item = io::Result<TlsStream<TcpStream>>>)> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let acceptor = TlsAcceptor::from(config);
    // One place per handshake: the server takes connections as fast as they arrive.
    let (tx, rx) = mpsc::channel(HANDSHAKES);
    tokio::spawn(async move {
        let permits = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let (stream, peer) = tokio::select! {
                () = tx.closed() => return,
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, %bound, "accept failed");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let (acceptor, tx) = (acceptor.clone(), tx.clone());
            tokio::spawn(async move {
                let _permit = permit;
                let _ = stream.set_nodelay(true);
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                    Ok(Ok(tls)) => {
                        let _ = tx.send(Ok(tls)).await;
                    }
                    Ok(Err(error)) => tracing::info!(%peer, %bound, %error, "TLS handshake failed"),
                    Err(_) => tracing::info!(%peer, %bound, "TLS handshake timed out"),
                }
            });
        }
    });
    Ok((bound, ReceiverStream::new(rx)))
}

/// Accepts on a unix socket that only the owner can open; an old socket file is replaced.
///
/// # Errors
/// If the socket cannot be bound.
pub fn unix_incoming(path: &Path) -> io::Result<UnixListenerStream> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(dir) = path.parent() {
        crate::files::private_dir(dir)?;
    }
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    // The directory is private, so nobody can connect before the mode is set.
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(UnixListenerStream::new(listener))
}

/// A gRPC channel to a unix socket; it connects on first use and reconnects by itself.
#[must_use]
pub fn unix_channel(path: PathBuf) -> Channel {
    // The URI is required by HTTP and never resolved.
    Endpoint::from_static("http://localhost")
        .connect_timeout(Duration::from_secs(5))
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(hyper_util::rt::TokioIo::new(UnixStream::connect(path).await?)) }
        }))
}
