//! Calls to the other services.

use std::time::Duration;

use anyhow::{Context, anyhow};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use crate::Served;

/// A page that waits longer tells its reader nothing; the mesh's own timeouts are shorter.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Answers are a few kilobytes.
const MAX_ANSWER: usize = 1 << 20;

/// Headers that an application must pass on, for traces and for routes by user.
const FORWARDED: [HeaderName; 8] = [
    HeaderName::from_static("x-request-id"),
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("b3"),
    HeaderName::from_static("x-b3-traceid"),
    HeaderName::from_static("x-b3-spanid"),
    HeaderName::from_static("x-b3-sampled"),
    HeaderName::from_static("end-user"),
];

/// What became of a call.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// Service asked.
    pub service: String,
    /// HTTP status; 0 if there was no answer.
    pub status: u16,
    /// The answer, if it is one of this application.
    pub served: Option<Box<Served>>,
    /// What came instead.
    pub error: String,
}

/// Calls services by name, through the HTTP proxy if there is one.
#[derive(Debug)]
pub(crate) struct Client {
    proxy: Option<String>,
    namespace: String,
    port: u16,
}

impl Client {
    pub(crate) fn new(proxy: Option<&str>, namespace: &str, port: u16) -> anyhow::Result<Self> {
        let proxy = match proxy.filter(|p| !p.is_empty()) {
            None => None,
            Some(p) => {
                let text = if p.contains("://") { p.to_owned() } else { format!("http://{p}") };
                let uri: Uri = text.parse().with_context(|| format!("HTTP proxy {p:?}"))?;
                let host = uri.host().ok_or_else(|| anyhow!("HTTP proxy {p:?} has no host"))?;
                Some(format!("{host}:{}", uri.port_u16().unwrap_or(80)))
            }
        };
        Ok(Self { proxy, namespace: namespace.to_owned(), port })
    }

    pub(crate) async fn get(&self, service: &str, path: &str, from: &HeaderMap) -> Outcome {
        let failed = |error: String| Outcome { service: service.into(), status: 0, served: None, error };
        match tokio::time::timeout(TIMEOUT, self.try_get(service, path, from)).await {
            Err(_) => failed(format!("no answer within {} s", TIMEOUT.as_secs())),
            Ok(Err(e)) => failed(format!("{e:#}")),
            Ok(Ok((status, body))) => {
                let served = serde_json::from_slice(&body).ok().map(Box::new);
                let error = match &served {
                    Some(_) => String::new(),
                    None => String::from_utf8_lossy(&body).trim().chars().take(200).collect(),
                };
                Outcome { service: service.into(), status, served, error }
            }
        }
    }

    async fn try_get(&self, service: &str, path: &str, from: &HeaderMap) -> anyhow::Result<(u16, Bytes)> {
        let authority = format!("{service}.{}:{}", self.namespace, self.port);
        let (address, uri) = match &self.proxy {
            Some(p) => (p.clone(), format!("http://{authority}{path}")),
            None => (authority.clone(), path.to_owned()),
        };
        let stream = TcpStream::connect(&address).await.with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
            .preserve_header_case(true)
            .handshake(TokioIo::new(stream))
            .await?;
        let driver = tokio::spawn(connection);
        let mut request = Request::get(uri).header("host", authority).header("connection", "close");
        for name in FORWARDED {
            if let Some(v) = from.get(&name) {
                request = request.header(name, v);
            }
        }
        let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| anyhow!(e))?;
        driver.abort();
        Ok((status, body.to_bytes()))
    }
}
