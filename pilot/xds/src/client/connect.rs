//! Reaching an xDS server: plaintext on loopback, TLS with a rustls configuration, or a unix socket.

use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tonic::transport::{Channel, Uri};

/// TCP connect and TLS handshake together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 PING interval: a server that vanished without a FIN is noticed within this plus the next.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How long a PING may go unanswered.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a server is.
#[derive(Clone)]
pub enum Endpoint {
    /// `host:port` in clear text. Only for loopback.
    Plain(String),
    /// TLS. The configuration may resolve its certificate anew on every handshake, so rotation
    /// needs no reconnect.
    Tls {
        /// `host:port`.
        address: String,
        /// Name that the server's certificate is verified against, and SNI.
        server_name: String,
        /// Client configuration.
        config: Arc<rustls::ClientConfig>,
    },
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(a) => write!(f, "tcp://{a}"),
            Self::Tls { address, .. } => write!(f, "tls://{address}"),
            Self::Unix(p) => write!(f, "unix://{}", p.display()),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a server could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name to verify is not a DNS name or IP address.
    #[error("{0:?} is not a server name")]
    ServerName(String),
    /// Connecting failed or took longer than five seconds.
    #[error("cannot connect to {endpoint}")]
    Transport {
        /// Where.
        endpoint: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

/// Connects.
///
/// # Errors
/// [`ConnectError`]; worth retrying unless it is [`ConnectError::ServerName`].
pub async fn channel(endpoint: &Endpoint) -> Result<Channel, ConnectError> {
    let (endpoint, name) = checked(endpoint)?;
    let shown = endpoint.to_string();
    let connector = tower::service_fn(move |_: Uri| open(endpoint.clone(), name.clone()));
    let connected = builder().connect_with_connector(connector).await;
    connected.map_err(|source| ConnectError::Transport { endpoint: shown, source })
}

/// A channel that connects with its first call, and again whenever the connection is gone: for
/// servers that nothing should wait for.
///
/// # Errors
/// [`ConnectError::ServerName`].
pub fn lazy_channel(endpoint: &Endpoint) -> Result<Channel, ConnectError> {
    let (endpoint, name) = checked(endpoint)?;
    let connector = tower::service_fn(move |_: Uri| open(endpoint.clone(), name.clone()));
    Ok(builder().connect_with_connector_lazy(connector))
}

/// The endpoint with the name to verify, if it is one with TLS.
fn checked(endpoint: &Endpoint) -> Result<(Endpoint, Option<ServerName<'static>>), ConnectError> {
    let name = match endpoint {
        Endpoint::Tls { server_name, .. } => Some(
            ServerName::try_from(server_name.clone())
                .map_err(|_| ConnectError::ServerName(server_name.clone()))?,
        ),
        Endpoint::Plain(_) | Endpoint::Unix(_) => None,
    };
    Ok((endpoint.clone(), name))
}

fn builder() -> tonic::transport::Endpoint {
    Channel::from_static("http://xds.flotilla.local")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(4 * 1024 * 1024)
        .initial_connection_window_size(8 * 1024 * 1024)
}

/// One connection, of any transport.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Opens a connection to the endpoint.
async fn open(endpoint: Endpoint, name: Option<ServerName<'static>>) -> io::Result<TokioIo<Box<dyn Io>>> {
    let io: Box<dyn Io> = match endpoint {
        Endpoint::Plain(address) => Box::new(tcp(&address).await?),
        Endpoint::Tls { address, config, .. } => {
            let name = name.ok_or(io::ErrorKind::InvalidInput)?;
            let handshake = async {
                let tcp = tcp(&address).await?;
                tokio_rustls::TlsConnector::from(config).connect(name, tcp).await
            };
            match tokio::time::timeout(CONNECT_TIMEOUT, handshake).await {
                Ok(r) => Box::new(r?),
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        Endpoint::Unix(path) => Box::new(UnixStream::connect(path).await?),
    };
    Ok(TokioIo::new(io))
}

async fn tcp(address: &str) -> io::Result<TcpStream> {
    match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(s)) => {
            s.set_nodelay(true)?;
            Ok(s)
        }
        Ok(Err(e)) => Err(e),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}
