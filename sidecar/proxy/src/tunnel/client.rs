//! Opens tunnels.

use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::Poll,
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use mesh_model::proxy as model;
use tokio::time::Instant;

use super::{TunnelStream, post::PostStream};
use crate::{
    config::CompileError,
    http::{
        h1::client::{H1Conn, H1Exchange},
        headers::Headers,
        message::{self as http1, BodyKind, RequestHead, StreamError},
    },
    io::Io,
    upstream::{
        cluster::{Cluster, Permit},
        connect::{ConnectError, Want, connect_for},
        host::Host,
        pool::{self, Carrier, StreamGuard},
        silence,
    },
    worker::Worker,
};

/// Connections that close between being found and being used; that many in a row is no accident.
const ATTEMPTS: usize = 3;

/// A request that opens a tunnel, made once.
#[derive(Debug)]
pub(crate) struct ConnectRequest {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    /// The same for HTTP/1.
    head: RequestHead,
}

impl ConnectRequest {
    pub(crate) fn new(t: &model::Tunneling) -> Result<Self, CompileError> {
        let bad = |what: &str| CompileError::Tunnel(what.to_owned());
        let authority = authority(&t.hostname).ok_or_else(|| bad(&t.hostname))?;
        let (method, uri) = if t.post {
            let uri =
                Uri::builder().scheme("http").authority(t.hostname.as_str()).path_and_query("/").build();
            (Method::POST, uri.map_err(|_| bad(&t.hostname))?)
        } else {
            (Method::CONNECT, authority)
        };
        let mut headers = HeaderMap::with_capacity(t.headers.len());
        for (n, v) in &t.headers {
            let name = HeaderName::from_bytes(n.as_bytes()).map_err(|_| bad(n))?;
            headers.append(name, HeaderValue::from_str(v).map_err(|_| bad(n))?);
        }
        let head = RequestHead {
            method: method.clone(),
            version: http1::Version::Http11,
            https: false,
            authority: t.hostname.clone(),
            path: "/".to_owned(),
            headers: Headers::from_map(&headers),
            body: BodyKind::Stream,
            upgrade: None,
            expect_continue: false,
        };
        Ok(Self { method, uri, headers, head })
    }

    fn request(&self) -> Request<()> {
        let mut r = connect_request(self.uri.clone());
        r.method_mut().clone_from(&self.method);
        if !self.headers.is_empty() {
            r.headers_mut().clone_from(&self.headers);
        }
        r
    }
}

fn authority(host: &str) -> Option<Uri> {
    let authority: http::uri::Authority = host.parse().ok()?;
    Uri::builder().authority(authority).build().ok()
}

fn connect_request(authority: Uri) -> Request<()> {
    let mut r = Request::new(());
    *r.method_mut() = Method::CONNECT;
    *r.uri_mut() = authority;
    *r.version_mut() = Version::HTTP_2;
    r
}

/// Whether tunnels to a cluster are streams of a shared connection.
pub(crate) fn are_streams(cluster: &Cluster) -> bool {
    cluster.config.http == model::UpstreamHttp::Http2
}

/// A tunnel to where `tunneling_config` says, through a host of the cluster, within its connect timeout. A cluster that
/// wants to know the `client` is told.
pub(crate) async fn open(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    to: &ConnectRequest,
    client: Option<(SocketAddr, SocketAddr)>,
) -> Result<Io, ConnectError> {
    if are_streams(cluster) {
        let request = || to.request();
        return within(worker, cluster, stream(worker, cluster, host, &request)).await;
    }
    within(worker, cluster, Box::pin(alone(worker, cluster, host, to, client))).await
}

/// A tunnel that has its connection for itself, as HTTP/1 knows them (RFC 9110 section 9.3.6).
async fn alone(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    to: &ConnectRequest,
    client: Option<(SocketAddr, SocketAddr)>,
) -> Result<Io, ConnectError> {
    let io = connect_for(worker, cluster, host, Want::Http1, client).await?;
    // Whoever asked for the tunnel counts the connection.
    let permit = Permit::take(&cluster.usage, |u| &u.sessions, u32::MAX).ok_or(ConnectError::Overflow)?;
    let x = H1Exchange::start(H1Conn::new(io, permit), &to.head);
    let broken = |e: StreamError| ConnectError::Tcp(format!("the proxy gave no answer: {e:?}"));
    poll_fn(|cx| x.poll_flush(cx)).await.map_err(broken)?;
    let status = poll_fn(|cx| x.poll_head(cx)).await.map_err(broken)?.status;
    if !(200..300).contains(&status) {
        return Err(ConnectError::Refused(status));
    }
    Ok(if to.method == Method::CONNECT { x.into_io() } else { Io::Post(Box::new(PostStream::new(x))) })
}

/// A connection to a host: a tunnel if its proxy says in the handshake that it takes them, else one of its own.
pub(crate) async fn negotiate(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
) -> Result<Io, ConnectError> {
    let to = authority_of(host)?;
    let request = || connect_request(to.clone());
    within(worker, cluster, stream(worker, cluster, host, &request)).await
}

async fn within(
    worker: &Rc<Worker>,
    cluster: &Cluster,
    opening: impl Future<Output = Result<Io, ConnectError>>,
) -> Result<Io, ConnectError> {
    let at = Instant::now() + cluster.connect_limit();
    let mut alarm = worker.alarms.alarm();
    let mut opening = pin!(opening);
    poll_fn(|cx| match opening.as_mut().poll(cx) {
        Poll::Pending => alarm.poll(at, cx).map(|()| Err(ConnectError::Timeout)),
        done => done,
    })
    .await
}

fn authority_of(host: &Host) -> Result<Uri, ConnectError> {
    authority(&host.display).ok_or_else(|| ConnectError::Unresolved(host.display.to_string()))
}

/// A tunnel to the host itself, through the proxy at its address.
pub(crate) async fn hbone(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
) -> Result<Io, ConnectError> {
    let to = authority_of(host)?;
    stream(worker, cluster, host, &|| connect_request(to.clone())).await
}

async fn stream(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    request: &dyn Fn() -> Request<()>,
) -> Result<Io, ConnectError> {
    let pool = pool::pool_of(worker, cluster, host, Want::Tunnel);
    let mut last = ConnectError::Overflow;
    for _ in 0..ATTEMPTS {
        let conn = match pool::acquire_carrier(worker, cluster, host, &pool).await? {
            Carrier::Tunnels(conn) => conn,
            Carrier::Plain(io) => return Ok(io),
        };
        let guard = StreamGuard::new(&conn);
        let (response, send) = match conn.send.clone().send_request(request(), false) {
            Ok(stream) => stream,
            Err(e) => {
                conn.retire();
                last = ConnectError::Tcp(e.to_string());
                continue;
            }
        };
        conn.said();
        let response = tokio::select! {
            biased;
            r = response => r,
            () = silence::of_dial(worker, cluster, host, Want::Tunnel) => return Err(ConnectError::Timeout),
        };
        let response = match response {
            Ok(r) => {
                conn.heard();
                r
            }
            // Not processed (RFC 9113 section 8.7): the peer is going away or is full.
            Err(e) if e.is_go_away() || e.reason() == Some(h2::Reason::REFUSED_STREAM) => {
                conn.retire();
                last = ConnectError::Tcp(e.to_string());
                continue;
            }
            Err(e) => {
                if e.is_io() {
                    conn.retire();
                }
                return Err(ConnectError::Tcp(e.to_string()));
            }
        };
        if !response.status().is_success() {
            return Err(ConnectError::Refused(response.status().as_u16()));
        }
        let tunnel = TunnelStream::new(send, response.into_body(), Some(guard));
        return Ok(Io::Tunnel(Box::new(tunnel)));
    }
    Err(last)
}
