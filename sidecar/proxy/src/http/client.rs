//! Requests of the proxy's own, to clusters of its configuration: keys, authorisers, rate limits.
//!
//! They use the worker's pools like any request, and are bounded in time and size: whoever answers is
//! not the client's choice, yet must not be able to hold one either.

use std::{future::poll_fn, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use http::Method;
use mesh_model::proxy as model;

use super::{
    exchange::Upstream,
    h1::parse::{is_authority, is_path},
    headers::{HeaderId, Headers},
    message::{BodyKind, Frame, RequestHead, StreamError, Version},
    router,
};
use crate::{
    upstream::{
        cluster::{ClusterSlot, Outcome, Permit},
        host::ActiveGuard,
    },
    wire,
    worker::Worker,
};

/// An answer, whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<Headers>,
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    #[error("no such cluster")]
    NoCluster,
    #[error("no healthy host")]
    NoHost,
    #[error("no connection, or a limit of the cluster")]
    Connect,
    #[error("timeout")]
    Timeout,
    #[error("the answer broke off or is too large")]
    Broken,
}

/// A request head for a call.
pub(crate) fn head(
    method: Method,
    authority: &str,
    path: &str,
    headers: Headers,
    length: usize,
) -> RequestHead {
    let mut headers = headers;
    headers.remove_id(HeaderId::ContentLength);
    if length > 0 {
        headers.push_id(HeaderId::ContentLength, length.to_string().as_bytes());
    }
    RequestHead {
        method,
        version: Version::Http11,
        https: false,
        authority: authority.to_owned(),
        path: path.to_owned(),
        headers,
        body: if length == 0 { BodyKind::Empty } else { BodyKind::Length(length as u64) },
        upgrade: None,
        expect_continue: false,
    }
}

/// Sends a request and reads the answer, of which at most `limit` bytes.
pub(crate) async fn call(
    worker: &Rc<Worker>,
    slot: &Arc<ClusterSlot>,
    head: &RequestHead,
    body: Bytes,
    timeout: Duration,
    limit: usize,
) -> Result<Answer, CallError> {
    match tokio::time::timeout(timeout, exchange(worker, slot, head, &body, limit)).await {
        Ok(r) => r,
        Err(_) => Err(CallError::Timeout),
    }
}

/// A call over gRPC with one message, and one in its answer; `Err` says why there is none.
pub(crate) async fn grpc(
    worker: &Rc<Worker>,
    slot: &Arc<ClusterSlot>,
    service: &model::GrpcService,
    method: &str,
    message: &Bytes,
    timeout: Duration,
    limit: usize,
) -> Result<Bytes, String> {
    let mut h = Headers::default();
    h.push_id(HeaderId::Te, b"trailers");
    h.push_id(HeaderId::ContentType, b"application/grpc");
    h.push_id(HeaderId::GrpcTimeout, format!("{}m", timeout.as_millis()).as_bytes());
    for (n, v) in &service.metadata {
        h.push(n.as_bytes(), v.as_bytes());
    }
    let authority = if service.authority.is_empty() { &service.cluster } else { &service.authority };
    let mut request = head(Method::POST, authority, method, h, message.len());
    // gRPC has no content length.
    request.headers.remove_id(HeaderId::ContentLength);
    let a = call(worker, slot, &request, message.clone(), timeout, limit).await.map_err(|e| e.to_string())?;
    let status = |h: &Headers| h.str_id(HeaderId::GrpcStatus).map(str::to_owned);
    let status = a.trailers.as_ref().and_then(status).or_else(|| status(&a.headers));
    match (a.status, status.as_deref()) {
        (200, Some("0")) => {
            let message = wire::unframe(&a.body).map_err(|e| e.to_string())?;
            Ok(a.body.slice_ref(message))
        }
        (200, Some(s)) => Err(format!("gRPC status {s}")),
        (s, _) => Err(format!("HTTP status {s}")),
    }
}

async fn exchange(
    worker: &Rc<Worker>,
    slot: &Arc<ClusterSlot>,
    head: &RequestHead,
    body: &Bytes,
    limit: usize,
) -> Result<Answer, CallError> {
    let cluster = slot.load().ok_or(CallError::NoCluster)?;
    let _permit = Permit::take(&cluster.usage, |u| &u.requests, cluster.config.limits.max_requests)
        .ok_or(CallError::Connect)?;
    // A kept connection may turn out to be dead; the next one is fresh.
    for _ in 0..2 {
        let host = cluster.tables().pick(&worker.rng, None).cloned().ok_or(CallError::NoHost)?;
        let active = ActiveGuard::new(&host.stats);
        let Ok((up, pool)) = router::stream(worker, &cluster, &host, head, true, None).await else {
            cluster.observe(&host, Outcome::Failed);
            return Err(CallError::Connect);
        };
        match collect(&up, body, head.body, limit).await {
            Ok(a) => {
                cluster.observe(&host, Outcome::Status(a.status));
                router::give_back(router::Open::complete(up, pool, active));
                return Ok(a);
            }
            Err(StreamError::Reset) if matches!(&up, Upstream::H1(x) if x.reused() && !x.answered.get()) => {}
            Err(_) => {
                cluster.observe(&host, Outcome::Failed);
                return Err(CallError::Broken);
            }
        }
    }
    Err(CallError::Connect)
}

async fn collect(up: &Upstream, body: &Bytes, kind: BodyKind, limit: usize) -> Result<Answer, StreamError> {
    if !body.is_empty() {
        poll_fn(|cx| up.poll_room(cx)).await?;
        up.data(body.clone())?;
    }
    if kind != BodyKind::Empty {
        poll_fn(|cx| up.poll_room(cx)).await?;
        up.finish(None)?;
    }
    poll_fn(|cx| up.poll_end(cx)).await?;
    let head = poll_fn(|cx| up.poll_head(cx)).await?;
    let (mut out, mut trailers) = (Vec::new(), None);
    while let Some(frame) = poll_fn(|cx| up.poll_frame(cx)).await {
        match frame? {
            Frame::Data(d) if out.len() + d.len() > limit => return Err(StreamError::TooLarge),
            Frame::Data(d) => out.extend_from_slice(&d),
            Frame::Trailers(t) => trailers = Some(t),
        }
    }
    Ok(Answer { status: head.status, headers: head.headers, body: Bytes::from(out), trailers })
}

/// Authority and path of an `http` or `https` URI.
pub(crate) fn split_uri(uri: &str) -> Option<(&str, &str)> {
    let rest = uri.strip_prefix("https://").or_else(|| uri.strip_prefix("http://"))?;
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, "/"),
    };
    (is_authority(authority) && is_path(path)).then_some((authority, path))
}

#[cfg(test)]
mod tests {
    use super::split_uri;

    #[test]
    fn uris() {
        assert_eq!(split_uri("https://a.example/keys?x=1"), Some(("a.example", "/keys?x=1")));
        assert_eq!(split_uri("http://a:8080"), Some(("a:8080", "/")));
        for bad in ["", "a/b", "ftp://a/", "https:///keys", "http://a/ b", "http://a/\r\nx: 1"] {
            assert_eq!(split_uri(bad), None, "{bad:?}");
        }
    }
}
