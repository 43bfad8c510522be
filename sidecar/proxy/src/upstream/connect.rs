//! Opens connections to hosts: TCP or a trunk, with or without TLS.

use std::{
    borrow::Cow,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use mesh_identity::SecretStore;
use mesh_model::proxy as model;
use rustls::pki_types::ServerName;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, UnixStream},
};

use super::{
    cluster::Cluster,
    host::{Host, HostAddr},
};
use crate::{
    io::{Io, Transport},
    listener::proxy_protocol,
    refusal::Refusal,
    tunnel,
    worker::Worker,
};

/// Unacknowledged data for this long means that the peer is gone: without it a black hole between gateways
/// would hold requests until their own timeout, and shared HTTP/2 connections for good.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("connect timeout")]
    Timeout,
    #[error("{0}")]
    Tcp(String),
    #[error("TLS: {0}")]
    Tls(String),
    /// A gateway on the way does not pass the session on.
    #[error("{0}")]
    Refusal(Refusal),
    #[error("no dialer for {0}")]
    NoDialer(String),
    #[error("{0} is not resolved")]
    Unresolved(String),
    /// The other end of a tunnel does not connect it.
    #[error("tunnel refused with status {0}")]
    Refused(u16),
    /// A limit of the cluster.
    #[error("overflow")]
    Overflow,
}

/// Which application protocol a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Want {
    /// What TLS negotiates, or no HTTP at all.
    Any,
    Http1,
    Http2,
    /// HTTP/2 for CONNECT streams.
    Tunnel,
}

/// TLS towards upstream; the rustls configuration is made once for each protocol, and reads certificates
/// and roots at each handshake.
#[derive(Debug)]
pub(crate) struct TlsTransport {
    spec: model::UpstreamTls,
    configs: [ArcSwapOption<rustls::ClientConfig>; 4],
}

impl TlsTransport {
    /// Whether the session may carry tunnels, which the handshake tells.
    pub(crate) fn offers_tunnels(&self) -> bool {
        offers_tunnels(&self.spec.alpn)
    }

    /// Whether the session is one of QUIC that carries datagrams.
    pub(crate) fn carries_datagrams(&self) -> bool {
        self.spec.carries_datagrams()
    }

    /// The server name that this host is asked for.
    pub(crate) fn server_name(&self, host: &Host) -> String {
        server_name(&asked(&self.spec, host), host).to_str().into_owned()
    }

    pub(crate) fn new(spec: model::UpstreamTls) -> Self {
        Self { spec, configs: Default::default() }
    }

    pub(crate) fn config(
        &self,
        secrets: &SecretStore,
        want: Want,
    ) -> Result<Arc<rustls::ClientConfig>, ConnectError> {
        let slot = &self.configs[want as usize];
        if let Some(c) = slot.load_full() {
            return Ok(c);
        }
        let spec = model::UpstreamTls { alpn: alpn(&self.spec.alpn, want), ..self.spec.clone() };
        // A secret that is not there yet is an error of this attempt only.
        let c = secrets.client_config(&spec).map_err(|e| ConnectError::Tls(e.to_string()))?;
        slot.store(Some(Arc::clone(&c)));
        Ok(c)
    }
}

fn is_h2(p: &str) -> bool {
    p == "h2" || p.ends_with("-h2")
}

fn alpn(offered: &[String], want: Want) -> Vec<String> {
    if want == Want::Tunnel && offers_tunnels(offered) {
        return offered.to_vec();
    }
    // Who does not ask for a tunnel would not understand one.
    let mut out: Vec<String> = offered.iter().filter(|p| *p != model::TUNNEL_ALPN).cloned().collect();
    match want {
        Want::Any => return out,
        Want::Http1 => out.retain(|p| !is_h2(p)),
        Want::Http2 | Want::Tunnel => out.retain(|p| !p.contains("http/1.")),
    }
    match want {
        Want::Http1 if out.is_empty() && !offered.is_empty() => out.push("http/1.1".into()),
        Want::Http2 | Want::Tunnel if !out.iter().any(|p| is_h2(p)) => out.push("h2".into()),
        _ => {}
    }
    out
}

fn offers_tunnels(alpn: &[String]) -> bool {
    alpn.iter().any(|p| p == model::TUNNEL_ALPN)
}

/// Whether TLS agreed that the session carries tunnels.
pub(crate) fn negotiated_tunnels(io: &Io) -> bool {
    io.alpn() == Some(model::TUNNEL_ALPN.as_bytes())
}

/// Whether TLS agreed on HTTP/2.
pub(crate) fn negotiated_h2(io: &Io) -> bool {
    io.alpn().is_some_and(|p| std::str::from_utf8(p).is_ok_and(is_h2))
}

/// Connects within the cluster's connect timeout.
pub(crate) async fn connect(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
) -> Result<Io, ConnectError> {
    connect_for(worker, cluster, host, want, None).await
}

/// The same for a client, of which a cluster that wants to know it is told: its address and where it connected.
pub(crate) async fn connect_for(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
    client: Option<(SocketAddr, SocketAddr)>,
) -> Result<Io, ConnectError> {
    if cluster.config.health.is_some() {
        cluster.usage.used.store(true, Relaxed);
    }
    let connecting = connect_now(worker, cluster, host, want, client);
    match tokio::time::timeout(cluster.connect_limit(), connecting).await {
        Ok(r) => r,
        Err(_) => Err(ConnectError::Timeout),
    }
}

/// Connects for a health check, which has its own time and is no traffic.
pub(super) async fn connect_check(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
) -> Result<Io, ConnectError> {
    connect_now(worker, cluster, host, want, None).await
}

async fn connect_now(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
    client: Option<(SocketAddr, SocketAddr)>,
) -> Result<Io, ConnectError> {
    let socket = cluster.sockets.get(host.transport);
    let tls = socket.and_then(|s| s.tls.as_ref());
    let hbone = socket.is_some_and(|s| s.hbone.is_some());
    if hbone && want != Want::Tunnel {
        // Boxed: making a tunnel's connection comes back here.
        return Box::pin(tunnel::client::hbone(worker, cluster, host)).await;
    }
    let tcp = |e: io::Error| ConnectError::Tcp(e.to_string());
    let transport = match &host.addr {
        HostAddr::Socket(addr) => {
            let mut addr = *addr;
            if hbone {
                addr.set_port(model::HBONE_PORT);
            }
            let socket =
                if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(tcp)?;
            let s = socket2::SockRef::from(&socket);
            if let Some(k) = cluster.config.keepalive {
                let _ = s.set_tcp_keepalive(&keepalive(k));
            }
            let _ = s.set_tcp_user_timeout(Some(USER_TIMEOUT));
            if let Some(ip) = cluster.config.source.iter().find(|ip| ip.is_ipv4() == addr.is_ipv4()) {
                // Where this host has no such address, nothing depends on it.
                let _ = socket.bind(SocketAddr::new(*ip, 0));
            }
            let mut stream = socket.connect(addr).await.map_err(tcp)?;
            let _ = stream.set_nodelay(true);
            // A session of many clients cannot begin with the addresses of one.
            if let Some(v) = cluster.config.proxy_protocol.filter(|_| !hbone) {
                stream.write_all(&proxy_protocol::encode(v, client)).await.map_err(tcp)?;
            }
            Transport::tcp(stream, Bytes::new())
        }
        HostAddr::Unix(path) if !hbone => {
            let mut stream = unix(path).await.map_err(tcp)?;
            if let Some(v) = cluster.config.proxy_protocol {
                stream.write_all(&proxy_protocol::encode(v, client)).await.map_err(tcp)?;
            }
            Transport::boxed(Box::new(stream))
        }
        HostAddr::Trunk(name, port) => {
            let dialer = worker.dialer().ok_or_else(|| ConnectError::NoDialer(name.clone()))?;
            let sni = tls.map(|t| slotted(&t.spec.sni, host)).unwrap_or_default();
            Transport::boxed(dialer.dial(name, *port, &sni).await.map_err(tcp)?)
        }
        HostAddr::Internal(name) | HostAddr::Unresolved(name, _) | HostAddr::Unix(name) => {
            return Err(ConnectError::Unresolved(name.clone()));
        }
    };
    let Some(tls) = tls else { return Ok(Io::Plain(transport)) };
    let config = tls.config(&worker.secrets, want)?;
    let name = server_name(&asked(&tls.spec, host), host);
    let mut stream = tokio_rustls::TlsConnector::from(config)
        .connect(name, transport.below_tls())
        .await
        .map_err(|e| match Refusal::of(&e) {
            Some(r) => ConnectError::Refusal(r),
            None => ConnectError::Tls(e.to_string()),
        })?;
    // As much as is read at once also goes into one write.
    stream.get_mut().1.set_buffer_limit(Some(crate::tcp::BUFFER));
    Ok(Io::Client(Box::new(stream)))
}

/// Connects to a server of this host by its socket's path, or `@` and an abstract name. What the proxy's own user serves, such
/// as this process its administration, is not for those who may say where requests go.
async fn unix(path: &str) -> io::Result<UnixStream> {
    let at = path.strip_prefix('@').map(|name| format!("\0{name}"));
    let stream = UnixStream::connect(at.as_deref().unwrap_or(path)).await?;
    if stream.peer_cred()?.uid() == rustix::process::geteuid().as_raw() {
        let why = "its server runs as the proxy's own user";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(stream)
}

fn keepalive(k: model::TcpKeepalive) -> socket2::TcpKeepalive {
    let mut out = socket2::TcpKeepalive::new().with_time(k.time);
    if let Some(interval) = k.interval {
        out = out.with_interval(interval);
    }
    if let Some(probes) = k.probes {
        out = out.with_retries(probes);
    }
    out
}

/// Longest DNS name in a server name.
const MAX_NAME: usize = 253;

/// The server name that a host is asked for.
fn asked<'a>(tls: &'a model::UpstreamTls, host: &'a Host) -> Cow<'a, str> {
    match &host.name {
        Some(name) if tls.by_name && tls.sni.is_empty() => Cow::Borrowed(name),
        _ => slotted(&tls.sni, host),
    }
}

/// The server name of an endpoint: its slot goes before what is the same for all, where there is room.
fn slotted<'a>(sni: &'a str, host: &Host) -> Cow<'a, str> {
    match host.slots {
        model::Slots::Asks(slot) if !sni.is_empty() && sni.len() + 9 <= MAX_NAME => {
            Cow::Owned(format!("{slot:08x}.{sni}"))
        }
        _ => Cow::Borrowed(sni),
    }
}

/// The SNI as rustls wants it. Istio's `outbound_.9080_.v1_.host` is accepted as a DNS name; without one an
/// address is given, which sends no SNI.
fn server_name(sni: &str, host: &Host) -> ServerName<'static> {
    if let Ok(n @ ServerName::DnsName(_)) = ServerName::try_from(sni.to_owned()) {
        return n;
    }
    let ip = match &host.addr {
        HostAddr::Socket(a) => a.ip(),
        _ => std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
    };
    ServerName::from(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mesh_sni_is_a_valid_server_name() {
        let host = Host::original("10.0.0.1:80".parse().unwrap());
        for sni in [
            "outbound_.9080_._.reviews.books.svc.cluster.local",
            "outbound_.9080_.v1_.reviews.books.svc.east.clusterset.local",
            "federation.east.clusterset.local",
        ] {
            assert!(matches!(server_name(sni, &host), ServerName::DnsName(n) if n.as_ref() == sni));
        }
        assert!(matches!(server_name("", &host), ServerName::IpAddress(_)));
    }

    #[test]
    fn probes_of_the_kernel_are_as_configured() {
        let secs = Duration::from_secs;
        let l = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let set = |k| {
            let s = std::net::TcpStream::connect(l.local_addr().unwrap()).unwrap();
            let s = socket2::SockRef::from(&s);
            s.set_tcp_keepalive(&keepalive(k)).unwrap();
            (
                s.tcp_keepalive_time().unwrap(),
                s.tcp_keepalive_interval().unwrap(),
                s.tcp_keepalive_retries().unwrap(),
            )
        };
        let all = model::TcpKeepalive { time: secs(33), interval: Some(secs(7)), probes: Some(4) };
        assert_eq!(set(all), (secs(33), secs(7), 4));
        let (time, interval, probes) = set(model::TcpKeepalive { interval: None, probes: None, ..all });
        assert_eq!(time, secs(33));
        assert!(interval != secs(7) && probes != 4, "the kernel's: {interval:?} {probes}");
    }

    #[test]
    fn a_slot_stands_before_the_server_name() {
        let mut host = Host::original("10.0.0.1:80".parse().unwrap());
        let sni = "outbound_.9080_._.reviews.books.svc.east.clusterset.local";
        assert_eq!(slotted(sni, &host), sni);
        host.slots = model::Slots::Asks(0xbeef);
        assert_eq!(slotted(sni, &host), format!("0000beef.{sni}"));
        assert!(
            matches!(server_name(&slotted(sni, &host), &host), ServerName::DnsName(n) if n.as_ref().starts_with("0000beef."))
        );
        let long =
            format!("outbound_.9080_._.{}.svc.east.clusterset.local", ["a".repeat(50).as_str(); 4].join("."));
        assert_eq!(slotted(&long, &host), long, "a name that would be too long is used without");
        assert_eq!(slotted("", &host), "");
    }

    #[test]
    fn alpn_follows_the_protocol() {
        let offered = ["istio-h2".to_owned(), "h2".into(), "http/1.1".into(), "istio".into()];
        assert_eq!(alpn(&offered, Want::Http1), ["http/1.1", "istio"]);
        assert_eq!(alpn(&offered, Want::Http2), ["istio-h2", "h2", "istio"]);
        assert_eq!(alpn(&["h2".to_owned()], Want::Http1), ["http/1.1"]);
        assert_eq!(alpn(&[], Want::Http1), [""; 0]);
        assert_eq!(alpn(&[], Want::Http2), ["h2"]);
        assert_eq!(alpn(&[], Want::Tunnel), ["h2"]);
        let tunnels = [model::TUNNEL_ALPN.to_owned(), "istio".into()];
        assert_eq!(alpn(&tunnels, Want::Tunnel), tunnels);
        for other in [Want::Any, Want::Http1] {
            assert_eq!(alpn(&tunnels, other), ["istio"]);
        }
        assert_eq!(alpn(&tunnels, Want::Http2), ["istio", "h2"]);
    }
}
