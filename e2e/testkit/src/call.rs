//! The clients: one call of one protocol on a connection of its own, everything timed.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{HeaderMap, Request, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::{
    GRPC_PATH,
    echo::{Answer, frame, unframe},
    ports, websocket,
};

/// A protocol of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    Http1,
    Http2,
    Grpc,
    WebSocket,
    Tcp,
    TcpFirst,
}

impl Protocol {
    /// All of them, in the order of the matrix.
    pub const ALL: [Self; 6] =
        [Self::Http1, Self::Http2, Self::Grpc, Self::WebSocket, Self::Tcp, Self::TcpFirst];

    /// Port of the echo workload.
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Self::Http1 | Self::WebSocket => ports::HTTP,
            Self::Http2 => ports::HTTP2,
            Self::Grpc => ports::GRPC,
            Self::Tcp => ports::TCP,
            Self::TcpFirst => ports::TCP_FIRST,
        }
    }

    /// Name for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
            Self::Grpc => "gRPC",
            Self::WebSocket => "WebSocket",
            Self::Tcp => "TCP",
            Self::TcpFirst => "server-first TCP",
        }
    }

    /// Whether proxies see requests, and so can tell the server who called.
    #[must_use]
    pub fn is_http(self) -> bool {
        !matches!(self, Self::Tcp | Self::TcpFirst)
    }
}

/// What to call, how often and how fast.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Calls {
    pub protocol: Protocol,
    /// Name (or address) to resolve and connect to.
    pub host: String,
    /// Port; the protocol's own by default.
    #[serde(default)]
    pub port: Option<u16>,
    /// Calls in all; ignored when `duration_ms` is set.
    #[serde(default)]
    pub count: u32,
    /// Clients that call side by side; at least one.
    #[serde(default)]
    pub concurrency: u32,
    /// Longest time of one call, milliseconds.
    pub timeout_ms: u64,
    /// Call for this long instead of a number of times, milliseconds.
    #[serde(default)]
    pub duration_ms: u64,
    /// Pause of a client between calls, milliseconds.
    #[serde(default)]
    pub pause_ms: u64,
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    #[serde(default)]
    pub path: String,
    #[serde(default)]
    pub payload: String,
    /// Each client makes its HTTP/2, gRPC and TCP calls on one connection, until that breaks.
    #[serde(default)]
    pub keep: bool,
    /// WebSocket and TCP: send again after this time on the same connection, milliseconds.
    #[serde(default)]
    pub hold_ms: u64,
}

impl Calls {
    /// `count` calls, one after the other, 10 s at most each.
    #[must_use]
    pub fn new(protocol: Protocol, host: &str, count: u32) -> Self {
        Self {
            protocol,
            host: host.to_owned(),
            port: None,
            count,
            concurrency: 1,
            timeout_ms: 10_000,
            duration_ms: 0,
            pause_ms: 0,
            headers: BTreeMap::new(),
            path: String::new(),
            payload: String::new(),
            keep: false,
            hold_ms: 0,
        }
    }
}

/// What became of a call.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Answered by an echo workload with its payload intact.
    pub ok: bool,
    /// HTTP status, 0 without one.
    pub status: u16,
    pub workload: String,
    pub version: String,
    pub cluster: String,
    /// Caller that the server's sidecar verified, where the protocol can carry it.
    pub caller: String,
    /// What went wrong; the body of a refusal.
    pub error: String,
    /// When it ended, milliseconds since 1970.
    pub at: u64,
    /// How long it took, milliseconds.
    pub ms: f64,
}

/// A client's connection, if it keeps one.
#[derive(Default)]
pub struct Kept(Option<Connected>);

enum Connected {
    Http2(Http2),
    Line(Lines),
}

type Lines = (tokio::io::Lines<BufReader<OwnedReadHalf>>, OwnedWriteHalf);

type Http2 = (hyper::client::conn::http2::SendRequest<Full<Bytes>>, Driver);

/// Makes one call.
pub async fn call(c: &Calls) -> Outcome {
    call_on(c, &mut Kept::default()).await
}

/// The same on the connection of the call before, if [`Calls::keep`] says so.
pub async fn call_on(c: &Calls, kept: &mut Kept) -> Outcome {
    let begun = Instant::now();
    let limit = Duration::from_millis(c.timeout_ms);
    let mut out = Outcome::default();
    let result = match tokio::time::timeout(limit, exchange(c, &mut out.status, kept)).await {
        Ok(r) => r,
        Err(_) => Err(anyhow::anyhow!("no answer within {limit:?}")),
    };
    out.ms = begun.elapsed().as_secs_f64() * 1000.0;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    out.at = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    match result {
        Err(e) => out.error = format!("{e:#}"),
        Ok(a) => {
            out.ok = a.payload == c.payload;
            if !out.ok {
                out.error = format!("sent {:?}, came back {:?}", c.payload, a.payload);
            }
            out.caller = a.headers.get("x-forwarded-client-cert").map(|x| uri(x)).unwrap_or_default();
            out.workload = a.identity.workload;
            out.version = a.identity.version;
            out.cluster = a.identity.cluster;
        }
    }
    out
}

/// The URI of the last element of an `x-forwarded-client-cert`, which is the nearest hop's.
fn uri(xfcc: &str) -> String {
    let last = xfcc.rsplit(',').next().unwrap_or_default();
    let uri = last.split(';').find_map(|kv| kv.trim().strip_prefix("URI="));
    uri.unwrap_or_default().trim_matches('"').to_owned()
}

async fn exchange(c: &Calls, status: &mut u16, kept: &mut Kept) -> anyhow::Result<Answer> {
    // Put back only by a call that ended well.
    match kept.0.take() {
        Some(Connected::Http2(on)) if !on.0.is_closed() => return http2(c, on, status, kept).await,
        Some(Connected::Line(on)) => return line(c, on, kept).await,
        _ => {}
    }
    let port = c.port.unwrap_or(c.protocol.port());
    let addresses = tokio::net::lookup_host((c.host.as_str(), port)).await.context("resolve")?;
    let address = addresses.into_iter().next().context("the name has no address")?;
    let stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    match c.protocol {
        Protocol::Http1 => http1(c, stream, status).await,
        Protocol::Http2 | Protocol::Grpc => {
            let io = TokioIo::new(stream);
            let (sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
            let driver = Driver(tokio::spawn(async move { drop(connection.await) }));
            http2(c, (sender, driver), status, kept).await
        }
        Protocol::WebSocket => upgrade(c, stream, status).await,
        Protocol::Tcp | Protocol::TcpFirst => {
            let (read, write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            if c.protocol == Protocol::TcpFirst {
                let greeting = lines.next_line().await?.context("closed before the greeting")?;
                let _: Answer = serde_json::from_str(&greeting).context("greeting")?;
            }
            line(c, (lines, write), kept).await
        }
    }
}

fn request(c: &Calls, uri: String, body: Bytes) -> anyhow::Result<Request<Full<Bytes>>> {
    let method = if body.is_empty() { "GET" } else { "POST" };
    let mut r = Request::builder().method(method).uri(uri);
    for (k, v) in &c.headers {
        r = r.header(k, v);
    }
    Ok(r.body(Full::new(body))?)
}

fn path(c: &Calls) -> &str {
    if c.path.is_empty() { "/" } else { &c.path }
}

fn answer(status: u16, body: &[u8]) -> anyhow::Result<Answer> {
    if status != 200 {
        bail!("status {status}: {}", String::from_utf8_lossy(body).trim());
    }
    serde_json::from_slice(body).with_context(|| format!("body {:?}", String::from_utf8_lossy(body)))
}

async fn http1(c: &Calls, stream: TcpStream, status: &mut u16) -> anyhow::Result<Answer> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = Driver(tokio::spawn(async move { drop(connection.await) }));
    let mut r = request(c, path(c).to_owned(), Bytes::copy_from_slice(c.payload.as_bytes()))?;
    r.headers_mut().insert(header::HOST, c.host.parse()?);
    let response = sender.send_request(r).await?;
    *status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    drop(driver);
    answer(*status, &body)
}

/// A connection's task, ended with the call.
struct Driver(tokio::task::JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn http2(c: &Calls, mut on: Http2, status: &mut u16, kept: &mut Kept) -> anyhow::Result<Answer> {
    let grpc = c.protocol == Protocol::Grpc;
    let port = c.port.unwrap_or(c.protocol.port());
    let payload = c.payload.as_bytes();
    let (p, body) =
        if grpc { (GRPC_PATH, frame(payload)) } else { (path(c), Bytes::copy_from_slice(payload)) };
    let mut r = request(c, format!("http://{}:{port}{p}", c.host), body)?;
    if grpc {
        r.headers_mut().insert(header::CONTENT_TYPE, "application/grpc".parse()?);
        r.headers_mut().insert(header::TE, "trailers".parse()?);
    }
    let response = on.0.send_request(r).await?;
    *status = response.status().as_u16();
    let head = response.headers().clone();
    let collected = response.into_body().collect().await?;
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let body = collected.to_bytes();
    if c.keep {
        kept.0 = Some(Connected::Http2(on));
    }
    if !grpc {
        return answer(*status, &body);
    }
    let of = |h: &HeaderMap, k: &str| h.get(k).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    let code = of(&trailers, "grpc-status").or_else(|| of(&head, "grpc-status"));
    if code.as_deref() != Some("0") {
        let message = of(&trailers, "grpc-message").or_else(|| of(&head, "grpc-message"));
        bail!("status {status}, grpc-status {code:?}: {}", message.unwrap_or_default());
    }
    answer(*status, unframe(&body).context("no message")?)
}

async fn upgrade(c: &Calls, stream: TcpStream, status: &mut u16) -> anyhow::Result<Answer> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let _driver = Driver(tokio::spawn(async move { drop(connection.with_upgrades().await) }));
    let key = "dGhlIHNhbXBsZSBub25jZQ==";
    let mut r = request(c, path(c).to_owned(), Bytes::new())?;
    for (k, v) in [
        ("host", c.host.as_str()),
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", key),
    ] {
        r.headers_mut().insert(k, v.parse()?);
    }
    let response = sender.send_request(r).await?;
    *status = response.status().as_u16();
    if *status != 101 {
        let body = response.into_body().collect().await?.to_bytes();
        bail!("status {status}: {}", String::from_utf8_lossy(&body).trim());
    }
    let accepted = response.headers().get("sec-websocket-accept").cloned();
    if accepted.as_ref().map(|v| v.as_bytes()) != Some(websocket::accept(key).as_bytes()) {
        bail!("wrong sec-websocket-accept: {accepted:?}");
    }
    let mut io = TokioIo::new(hyper::upgrade::on(response).await?);
    websocket::write_text(&mut io, c.payload.as_bytes(), true).await?;
    let mut text = websocket::read_text(&mut io).await?.context("closed")?;
    if c.hold_ms > 0 {
        tokio::time::sleep(Duration::from_millis(c.hold_ms)).await;
        websocket::write_text(&mut io, c.payload.as_bytes(), true).await.context("after the hold")?;
        text = websocket::read_text(&mut io).await.context("after the hold")?.context("cut")?;
    }
    Ok(serde_json::from_slice(&text)?)
}

async fn line(c: &Calls, mut on: Lines, kept: &mut Kept) -> anyhow::Result<Answer> {
    on.1.write_all(format!("{}\n", c.payload).as_bytes()).await?;
    let mut line = on.0.next_line().await?.context("closed without an answer")?;
    if c.hold_ms > 0 {
        tokio::time::sleep(Duration::from_millis(c.hold_ms)).await;
        on.1.write_all(format!("{}\n", c.payload).as_bytes()).await.context("after the hold")?;
        line = on.0.next_line().await.context("after the hold")?.context("cut")?;
    }
    if c.keep {
        kept.0 = Some(Connected::Line(on));
    }
    Ok(serde_json::from_str(&line)?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::net::TcpListener;

    use super::*;
    use crate::echo::{self, Identity};

    #[test]
    fn the_nearest_hop_is_the_caller() {
        assert_eq!(uri("By=spiffe://a;Hash=0;Subject=\"\";URI=spiffe://b"), "spiffe://b");
        assert_eq!(uri("URI=spiffe://far,By=spiffe://x;URI=spiffe://near"), "spiffe://near");
        assert_eq!(uri("Hash=0"), "");
    }

    #[tokio::test]
    async fn every_protocol_echoes() {
        for protocol in Protocol::ALL {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let who = Identity { workload: "w".into(), version: "v2".into(), cluster: "east".into() };
            tokio::spawn(async move {
                let (stream, _) = listener.accept().await.unwrap();
                echo::connection(protocol.port(), stream, Arc::new(who)).await;
            });
            let mut c = Calls::new(protocol, "127.0.0.1", 1);
            c.port = Some(port);
            c.payload = "hello".into();
            c.hold_ms = 10;
            let xfcc = "URI=spiffe://mesh.local/ns/n/sa/s";
            c.headers.insert("x-forwarded-client-cert".into(), xfcc.into());
            let o = call(&c).await;
            assert!(o.ok, "{protocol:?}: {o:?}");
            assert_eq!((o.cluster.as_str(), o.version.as_str()), ("east", "v2"));
            assert_eq!(o.caller == "spiffe://mesh.local/ns/n/sa/s", protocol.is_http(), "{o:?}");
        }
    }

    #[tokio::test]
    async fn a_server_that_is_silent_is_an_error_with_a_reason() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut c = Calls::new(Protocol::TcpFirst, "127.0.0.1", 1);
        c.port = Some(listener.local_addr().unwrap().port());
        c.timeout_ms = 50;
        let o = call(&c).await;
        assert!(!o.ok && o.error.contains("no answer"), "{o:?}");
    }
}
