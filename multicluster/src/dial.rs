//! Reaching a peer's control plane through gateways.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper_util::rt::TokioIo;
use mesh_identity::{SecretStore, TRUST_BUNDLE, WORKLOAD_SVID, not_after, peer_identity};
use mesh_model::{
    ClusterId,
    proxy::{SecretRef, StringMatch, UpstreamTls, Validation},
};
use mesh_xds::until::Until;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};

/// TCP connect and TLS handshake each.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 PING interval and patience: a peer that vanished without a FIN is noticed within both.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// Namespace and account of every control plane.
pub(crate) const CONTROL_PLANE: (&str, &str) = ("flotilla-system", "control-plane");

/// SNI under which a cluster's gateways hand a connection to its control plane.
pub(crate) fn federation_sni(cluster: &ClusterId) -> String {
    format!("federation.{cluster}.clusterset.local")
}

/// SNI for newcomers without a certificate.
pub(crate) fn join_sni(cluster: &ClusterId) -> String {
    format!("join.{cluster}.clusterset.local")
}

/// URI SAN of control planes in a trust domain.
pub(crate) fn control_plane_san(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{}/sa/{}", CONTROL_PLANE.0, CONTROL_PLANE.1)
}

/// A TLS session to the first of `addresses` that completes one.
pub(crate) async fn tls(
    addresses: &[SocketAddr],
    sni: &str,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the cluster announces no gateway address");
    for address in addresses {
        let attempt = async { over(TcpStream::connect(address).await?, sni, config.clone()).await };
        match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
            Ok(Ok(s)) => return Ok(s),
            Ok(Err(e)) => last = io::Error::new(e.kind(), format!("gateway {address}: {e}")),
            Err(_) => {
                last = io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("gateway {address}: no answer within {} s", CONNECT_TIMEOUT.as_secs()),
                );
            }
        }
    }
    Err(last)
}

/// A TLS session over a connection, whoever made that.
pub(crate) async fn over(
    tcp: TcpStream,
    sni: &str,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(sni.to_owned())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{sni:?} is no server name")))?;
    tcp.set_nodelay(true)?;
    TlsConnector::from(config).connect(name, tcp).await
}

/// A gRPC channel over one session; it does not reconnect, so that every connection is checked.
pub(crate) async fn channel<S>(stream: S) -> io::Result<Channel>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut once = Some(stream);
    Endpoint::from_static("http://federation.flotilla.local")
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let stream =
                once.take().map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
            async move { stream }
        }))
        .await
        .map_err(io::Error::other)
}

/// A channel to a member's control plane, as this control plane; its cluster is verified. And when its intermediate
/// ends.
pub(crate) async fn member(
    secrets: &SecretStore,
    trust_domain: &str,
    cluster: &ClusterId,
    addresses: &[SocketAddr],
) -> io::Result<(Channel, Option<SystemTime>)> {
    if addresses.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            format!(
                "cluster {cluster} announces no gateway address (--gateway-address there): it is only reached through a \
                 gateway of this cluster (--gateway-via here)"
            ),
        ));
    }
    let sni = federation_sni(cluster);
    let config = secrets
        .client_config(&UpstreamTls {
            certificate: Some(SecretRef::Sds(WORKLOAD_SVID.into())),
            validation: Validation {
                trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
                sans: vec![StringMatch::exact(control_plane_san(trust_domain))],
                crl: None,
            },
            sni: sni.clone(),
            by_name: false,
            alpn: vec!["h2".into()],
        })
        .map_err(io::Error::other)?;
    let stream = tls(addresses, &sni, config).await?;
    let chain = stream.get_ref().1.peer_certificates();
    let peer = chain.and_then(peer_identity).and_then(|p| p.cluster);
    let ends = chain.and_then(|c| c.get(1)).and_then(not_after);
    if peer.as_ref() != Some(cluster) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the gateway leads to {peer:?}, not to cluster {cluster}"),
        ));
    }
    // What was accepted may be revoked while it is open.
    let end = stream.get_ref().1.peer_certificates().map(|c| secrets.revocations().ends()(c));
    Ok((channel(Until::new(stream, end)).await?, ends))
}
