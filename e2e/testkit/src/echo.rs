//! The servers of the echo workload. Every answer is a JSON object ([`Answer`]).

use std::{collections::BTreeMap, convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use anyhow::Context;
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{ports, websocket};

/// Request header: wait for so many milliseconds before answering.
pub const DELAY_MS: &str = "x-echo-delay-ms";
/// How long a connection may be idle.
const IDLE: Duration = Duration::from_secs(120);
/// Largest request body and TCP line, bytes.
const LIMIT: usize = 1 << 20;

/// Who a workload is.
#[derive(Debug, Clone, Serialize, Deserialize, clap::Args)]
pub struct Identity {
    /// Name of the service
    #[arg(long)]
    pub workload: String,
    /// Version of the service
    #[arg(long, default_value = "v1")]
    pub version: String,
    /// Cluster it runs in
    #[arg(long)]
    pub cluster: String,
}

/// What a server says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// Who answers.
    #[serde(flatten)]
    pub identity: Identity,
    /// `http1`, `websocket`, `http2`, `grpc`, `tcp` or `tcp-first`.
    pub protocol: String,
    /// Headers of the request, names in lower case; empty for TCP.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// What the client sent.
    #[serde(default)]
    pub payload: String,
}

impl Answer {
    fn new(identity: &Identity, protocol: &str) -> Self {
        Self {
            identity: identity.clone(),
            protocol: protocol.to_owned(),
            headers: BTreeMap::new(),
            payload: String::new(),
        }
    }

    fn with(mut self, headers: &HeaderMap, payload: &[u8]) -> Self {
        self.headers = headers
            .iter()
            .map(|(k, v)| (k.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned()))
            .collect();
        self.payload = String::from_utf8_lossy(payload).into_owned();
        self
    }

    fn json(&self) -> Vec<u8> {
        // Strings and maps of strings have a JSON form.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// Serves on every port of [`ports`] until an error.
///
/// # Errors
/// A port cannot be bound.
pub async fn serve(ip: IpAddr, identity: Identity) -> anyhow::Result<()> {
    let who = Arc::new(identity);
    let mut tasks = tokio::task::JoinSet::new();
    for port in [ports::HTTP, ports::HTTP2, ports::GRPC, ports::TCP, ports::TCP_FIRST] {
        let listener = TcpListener::bind((ip, port)).await.with_context(|| format!("{ip}:{port}"))?;
        let who = who.clone();
        tasks.spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        tokio::spawn(connection(port, stream, who.clone()));
                    }
                    // Out of descriptors, most likely; they come back as connections end.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

/// Serves one connection as the port of [`ports`] says. How it ends is the client's business.
pub async fn connection(port: u16, stream: TcpStream, who: Arc<Identity>) {
    let _ = stream.set_nodelay(true);
    let _ = match port {
        ports::HTTP => http1(stream, who).await,
        ports::TCP => lines(stream, &who, "tcp", false).await,
        ports::TCP_FIRST => lines(stream, &who, "tcp-first", true).await,
        _ => http2(stream, who, port == ports::GRPC).await,
    };
}

type Body = BoxBody<Bytes, Infallible>;

fn full(b: impl Into<Bytes>) -> Body {
    Full::new(b.into()).boxed()
}

async fn read(body: Incoming) -> Result<Bytes, StatusCode> {
    match timeout(IDLE, Limited::new(body, LIMIT).collect()).await {
        Ok(Ok(c)) => Ok(c.to_bytes()),
        Ok(Err(_)) => Err(StatusCode::PAYLOAD_TOO_LARGE),
        Err(_) => Err(StatusCode::REQUEST_TIMEOUT),
    }
}

fn refuse(status: StatusCode) -> Response<Body> {
    let mut r = Response::new(full(Bytes::new()));
    *r.status_mut() = status;
    r
}

async fn http1(stream: TcpStream, who: Arc<Identity>) -> anyhow::Result<()> {
    let service = service_fn(move |mut request: Request<Incoming>| {
        let who = who.clone();
        async move {
            let upgrade = request.headers().get("sec-websocket-key").cloned();
            if let Some(key) = upgrade {
                let answer = Answer::new(&who, "websocket").with(request.headers(), &[]);
                let upgraded = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    if let Ok(u) = upgraded.await {
                        let _ = messages(TokioIo::new(u), answer).await;
                    }
                });
                let accept = websocket::accept(key.to_str().unwrap_or_default());
                let mut r = refuse(StatusCode::SWITCHING_PROTOCOLS);
                r.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                r.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
                if let Ok(v) = HeaderValue::from_str(&accept) {
                    r.headers_mut().insert("sec-websocket-accept", v);
                }
                return Ok::<_, Infallible>(r);
            }
            Ok(plain(request, &who, "http1").await)
        }
    });
    hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await?;
    Ok(())
}

async fn plain(request: Request<Incoming>, who: &Identity, protocol: &str) -> Response<Body> {
    let (head, body) = request.into_parts();
    // A slow workload, for those who ask for one.
    let asked = head.headers.get(DELAY_MS).and_then(|v| v.to_str().ok()?.parse().ok());
    if let Some(ms) = asked {
        tokio::time::sleep(Duration::from_millis(ms).min(IDLE)).await;
    }
    match read(body).await {
        Ok(payload) => {
            let answer = Answer::new(who, protocol).with(&head.headers, &payload);
            let mut r = Response::new(full(answer.json()));
            r.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            r
        }
        Err(status) => refuse(status),
    }
}

async fn messages(mut io: impl AsyncRead + AsyncWrite + Unpin, answer: Answer) -> anyhow::Result<()> {
    while let Some(text) = timeout(IDLE, websocket::read_text(&mut io)).await?? {
        let mut a = answer.clone();
        a.payload = String::from_utf8_lossy(&text).into_owned();
        websocket::write_text(&mut io, &a.json(), false).await?;
    }
    Ok(())
}

async fn http2(stream: TcpStream, who: Arc<Identity>, grpc: bool) -> anyhow::Result<()> {
    let service = service_fn(move |request: Request<Incoming>| {
        let who = who.clone();
        async move {
            let response =
                if grpc { unary(request, &who).await } else { plain(request, &who, "http2").await };
            Ok::<_, Infallible>(response)
        }
    });
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .await?;
    Ok(())
}

/// One length-prefixed message in, one out, status in the trailers.
async fn unary(request: Request<Incoming>, who: &Identity) -> Response<Body> {
    let (head, body) = request.into_parts();
    let message = match read(body).await {
        Ok(b) => b,
        Err(s) => return refuse(s),
    };
    let Some(payload) = unframe(&message) else { return refuse(StatusCode::BAD_REQUEST) };
    let answer = Answer::new(who, "grpc").with(&head.headers, payload);
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let body = Full::new(frame(&answer.json())).with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut r = Response::new(body.boxed());
    r.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    r
}

/// A gRPC message: not compressed, its length, its bytes.
pub(crate) fn frame(message: &[u8]) -> Bytes {
    let mut b = BytesMut::with_capacity(message.len() + 5);
    b.put_u8(0);
    b.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    b.put_slice(message);
    b.freeze()
}

pub(crate) fn unframe(b: &[u8]) -> Option<&[u8]> {
    let length = u32::from_be_bytes(b.get(1..5)?.try_into().ok()?);
    b.get(5..5 + usize::try_from(length).ok()?)
}

async fn lines(stream: TcpStream, who: &Identity, protocol: &str, greet: bool) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read.take(LIMIT as u64)).lines();
    let mut say = async |payload: &str| {
        let mut line = Answer::new(who, protocol).with(&HeaderMap::new(), payload.as_bytes()).json();
        line.push(b'\n');
        write.write_all(&line).await
    };
    if greet {
        say("").await?;
    }
    while let Some(line) = timeout(IDLE, lines.next_line()).await?? {
        say(&line).await?;
    }
    Ok(())
}
