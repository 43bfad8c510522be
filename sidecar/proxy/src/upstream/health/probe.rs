//! One check: a question to a host and what its answer means. Whoever calls bounds the time.

use std::{future::poll_fn, rc::Rc, sync::Arc};

use bytes::{Bytes, BytesMut};
use http::Method;
use mesh_model::proxy::{GrpcHealthCheck, HealthCheck, HealthCheckKind, HttpHealthCheck, TcpHealthCheck};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Found, IMMEDIATE_FAIL};
use crate::{
    http::{
        client::head,
        exchange::Upstream,
        h1::{
            client::{H1Conn, H1Exchange},
            parse::is_authority,
        },
        h2::client::H2Exchange,
        headers::{HeaderId, Headers},
        message::{BodyKind, Frame, ResponseHead},
    },
    io::Io,
    matcher::StringMatcher,
    upstream::{
        cluster::{Cluster, Permit},
        connect::{Want, connect_check},
        host::Host,
        pool::{self, H2Conn},
    },
    wire,
    worker::Worker,
};

/// Of an answer, so much is kept: a gRPC answer has ten bytes.
const MAX_BODY: usize = 4096;
/// A TCP server that sends more than this in answer to a check does not send what is expected.
const MAX_RECEIVED: usize = 256 * 1024;
/// What Envoy's checks call themselves: servers and log pipelines know checks by it.
const USER_AGENT: &[u8] = b"Envoy/HC";
const DEGRADED: &[u8] = b"x-envoy-degraded";
/// The service that answers.
const CHECKED_CLUSTER: &[u8] = b"x-envoy-upstream-healthchecked-cluster";
const SERVING: u64 = 1;

/// A host's connection between two checks.
#[derive(Default)]
pub(super) enum Kept {
    #[default]
    None,
    H1(Box<H1Conn>),
    H2(Rc<H2Conn>),
    Tcp(Io),
}

/// An answer as far as it is needed.
struct Answer {
    head: ResponseHead,
    body: Vec<u8>,
    trailers: Option<Headers>,
}

/// Asks a host.
pub(super) async fn ask(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    check: &HealthCheck,
    kept: &mut Kept,
) -> Found {
    let found = match &check.kind {
        HealthCheckKind::Http(h) => http(worker, cluster, host, h, kept).await,
        HealthCheckKind::Grpc(g) => grpc(worker, cluster, host, g, kept).await,
        HealthCheckKind::Tcp(t) => tcp(worker, cluster, host, t, kept).await,
    };
    if !check.reuse_connection {
        *kept = Kept::None;
    }
    found.unwrap_or(Found::Unreachable)
}

fn authority(cluster: &Cluster, host: &Host, configured: &str) -> String {
    let own = host.check.as_ref().map_or("", |c| c.hostname.as_str());
    let names = [own, configured, cluster.config.name.as_str()];
    // The names of the mesh's clusters are no hosts.
    let name = names.into_iter().find(|n| !n.is_empty()).filter(|n| is_authority(n));
    name.unwrap_or(&host.display).to_owned()
}

fn headers(configured: &[(String, String)]) -> Headers {
    let mut out = Headers::default();
    out.push(b"user-agent", USER_AGENT);
    for (name, value) in configured {
        out.set(name.as_bytes(), value.as_bytes());
    }
    out
}

async fn http(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    check: &HttpHealthCheck,
    kept: &mut Kept,
) -> Option<Found> {
    let method = Method::from_bytes(check.method.as_bytes()).ok()?;
    let name = authority(cluster, host, &check.host);
    let request = head(method, &name, &check.path, headers(&check.headers), 0);
    let want = if check.http2 { Want::Http2 } else { Want::Http1 };
    let a = exchange(worker, cluster, host, want, request, Bytes::new(), kept).await?;
    let within = |ranges: &[(u16, u16)]| ranges.iter().any(|r| (r.0..r.1).contains(&a.head.status));
    let excluded = a.head.headers.get(IMMEDIATE_FAIL).is_some();
    if !within(&check.expected) {
        return Some(Found::Fails { retriable: within(&check.retriable) });
    }
    if let Some(wanted) = &check.service_name {
        let service = a.head.headers.get(CHECKED_CLUSTER).unwrap_or_default();
        let is = StringMatcher::new(wanted).is_ok_and(|m| m.matches(service));
        if !is {
            cluster.checks.verify_cluster.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            return Some(Found::Fails { retriable: false });
        }
    }
    Some(Found::Works { degraded: a.head.headers.get(DEGRADED).is_some(), excluded })
}

async fn grpc(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    check: &GrpcHealthCheck,
    kept: &mut Kept,
) -> Option<Found> {
    let mut w = wire::Writer::default();
    w.text(1, check.service_name.as_bytes());
    let body = w.framed();
    let mut headers = headers(&check.headers);
    headers.set(b"content-type", b"application/grpc");
    headers.set(b"te", b"trailers");
    let name = authority(cluster, host, &check.authority);
    let path = "/grpc.health.v1.Health/Check";
    let request = head(Method::POST, &name, path, headers, body.len());
    let a = exchange(worker, cluster, host, Want::Http2, request, Bytes::from(body), kept).await?;
    let status = |h: &Headers| h.str_id(HeaderId::GrpcStatus).map(str::to_owned);
    let status = a.trailers.as_ref().and_then(status).or_else(|| status(&a.head.headers));
    let serving = || {
        let mut serving = 0;
        let read = wire::read(wire::unframe(&a.body)?, |field, value| {
            if field == 1 {
                serving = value.number();
            }
            Ok(())
        });
        read.map(|()| serving == SERVING)
    };
    let works = a.head.status == 200 && status.as_deref() == Some("0") && serving().unwrap_or(false);
    Some(if works {
        Found::Works { degraded: a.head.headers.get(DEGRADED).is_some(), excluded: false }
    } else {
        Found::Fails { retriable: false }
    })
}

/// Sends a request on the connection that is kept, or a new one, and reads the answer to its end.
async fn exchange(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
    mut request: crate::http::message::RequestHead,
    body: Bytes,
    kept: &mut Kept,
) -> Option<Answer> {
    let tls = cluster.sockets.get(host.transport).is_some_and(|s| s.tls.is_some());
    request.https = tls;
    let open = match std::mem::take(kept) {
        Kept::H1(mut c) => {
            // Its server may have closed it since.
            if c.is_open() { Kept::H1(c) } else { Kept::None }
        }
        k => k,
    };
    let up = match open {
        Kept::H1(c) => Upstream::H1(H1Exchange::start(c, &request)),
        Kept::H2(c) => match H2Exchange::start(&c, &request) {
            Ok(x) => {
                *kept = Kept::H2(c);
                Upstream::H2(x)
            }
            Err(_) => dial(worker, cluster, host, want, &request, kept).await?,
        },
        _ => dial(worker, cluster, host, want, &request, kept).await?,
    };
    let answer = read(&up, body, request.body).await;
    match (up, &answer) {
        (Upstream::H1(x), Some(_)) => *kept = x.into_reusable().map_or(Kept::None, Kept::H1),
        (Upstream::H2(_), Some(_)) => {}
        (_, None) => *kept = Kept::None,
    }
    answer
}

async fn dial(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    want: Want,
    request: &crate::http::message::RequestHead,
    kept: &mut Kept,
) -> Option<Upstream> {
    let io = connect_check(worker, cluster, host, want).await.ok()?;
    // Checks are not what limits are for.
    let permit = Permit::take(&cluster.usage, |u| &u.sessions, u32::MAX)?;
    if want != Want::Http2 {
        return Some(Upstream::H1(H1Exchange::start(H1Conn::new(io, permit), request)));
    }
    let (conn, _) = pool::start_h2(worker, io, permit, None, None).await.ok()?;
    let conn = Rc::new(conn);
    let x = H2Exchange::start(&conn, request).ok()?;
    *kept = Kept::H2(conn);
    Some(Upstream::H2(x))
}

async fn read(up: &Upstream, body: Bytes, kind: BodyKind) -> Option<Answer> {
    if !body.is_empty() {
        poll_fn(|cx| up.poll_room(cx)).await.ok()?;
        up.data(body).ok()?;
    }
    if kind != BodyKind::Empty {
        poll_fn(|cx| up.poll_room(cx)).await.ok()?;
        up.finish(None).ok()?;
    }
    poll_fn(|cx| up.poll_end(cx)).await.ok()?;
    let head = poll_fn(|cx| up.poll_head(cx)).await.ok()?;
    let (mut kept, mut trailers) = (Vec::new(), None);
    while let Some(frame) = poll_fn(|cx| up.poll_frame(cx)).await {
        match frame.ok()? {
            Frame::Data(d) => {
                let room = MAX_BODY - kept.len();
                kept.extend_from_slice(&d[..d.len().min(room)]);
            }
            Frame::Trailers(t) => trailers = Some(t),
        }
    }
    Some(Answer { head, body: kept, trailers })
}

async fn tcp(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    check: &TcpHealthCheck,
    kept: &mut Kept,
) -> Option<Found> {
    let mut io = match std::mem::take(kept) {
        Kept::Tcp(io) => io,
        _ => connect_check(worker, cluster, host, Want::Any).await.ok()?,
    };
    let works = Some(Found::Works { degraded: false, excluded: false });
    if !check.send.is_empty() {
        io.write_all(&check.send).await.ok()?;
        io.flush().await.ok()?;
    }
    if check.receive.is_empty() {
        return works;
    }
    let mut received = BytesMut::new();
    while !holds(&received, &check.receive) {
        if received.len() > MAX_RECEIVED || io.read_buf(&mut received).await.ok()? == 0 {
            return None;
        }
    }
    *kept = Kept::Tcp(io);
    works
}

/// Whether the pieces follow each other, with anything between them.
pub(super) fn holds(mut received: &[u8], pieces: &[Vec<u8>]) -> bool {
    pieces.iter().all(|p| {
        let at = received.windows(p.len().max(1)).position(|w| w == p.as_slice());
        at.is_some_and(|at| {
            received = &received[at + p.len()..];
            true
        })
    })
}
