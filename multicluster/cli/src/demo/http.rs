//! A small HTTP client: one request, one connection, everything timed.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// An answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Bytes,
    pub(crate) took: Duration,
}

impl Answer {
    pub(crate) fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_slice(&self.body)
            .with_context(|| format!("status {}: {:?}", self.status, String::from_utf8_lossy(&self.body)))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim().to_owned()
    }
}

/// GETs `uri` from `address`; an absolute URI makes it a request to a proxy.
pub(crate) async fn get(
    address: SocketAddr,
    uri: &str,
    host: &str,
    headers: &[(&str, &str)],
    limit: Duration,
) -> anyhow::Result<Answer> {
    let begun = Instant::now();
    let exchange = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let mut request = hyper::Request::get(uri).header("host", host).header("connection", "close");
        for (k, v) in headers {
            request = request.header(*k, *v);
        }
        let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        driver.abort();
        anyhow::Ok((status, body))
    };
    let (status, body) = tokio::time::timeout(limit, exchange)
        .await
        .with_context(|| format!("no answer from {address} within {} s", limit.as_secs_f64()))??;
    Ok(Answer { status, body, took: begun.elapsed() })
}
