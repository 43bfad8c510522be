//! hyper as the oracle: whatever we take for a request, another server must take for the very same one. Where the
//! two disagree, something can be smuggled.

use std::{convert::Infallible, sync::Mutex};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use tokio::io::AsyncWriteExt as _;

use super::{
    body::{Decoded, Decoder},
    parse,
};
use crate::http::message::{BodyKind, Frame, RequestHead};

/// What a server understands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Understood {
    method: String,
    authority: String,
    path: String,
    pub(super) body: Vec<u8>,
}

/// The requests that we read, up to the first that we refuse or that is not whole.
pub(super) fn ours(raw: &[u8]) -> Vec<(RequestHead, Understood)> {
    let (mut rest, mut out) = (raw, Vec::new());
    loop {
        let Ok(Some(end)) = parse::find_end(rest, &mut 0) else { return out };
        let Ok(p) = parse::request(&rest[..end], false) else { return out };
        let mut decoder = match p.head.body {
            BodyKind::Empty => Decoder::Done,
            BodyKind::Length(n) => Decoder::Length(n),
            BodyKind::Stream => Decoder::ChunkSize,
        };
        let mut buf = BytesMut::from(&rest[end..]);
        let mut body = Vec::new();
        loop {
            match decoder.decode(&mut buf) {
                Ok(Decoded::Frame(Frame::Data(d))) => body.extend_from_slice(&d),
                Ok(Decoded::Frame(Frame::Trailers(_))) => {}
                Ok(Decoded::End) => break,
                Ok(Decoded::More) | Err(_) => return out,
            }
        }
        rest = &rest[rest.len() - buf.len()..];
        let understood = Understood {
            method: p.head.method.to_string(),
            authority: p.head.authority.clone(),
            path: p.head.path.clone(),
            body,
        };
        out.push((p.head, understood));
        if !p.keep_alive {
            return out;
        }
    }
}

/// Those that hyper's server reads.
pub(super) fn hypers(raw: Vec<u8>) -> Vec<Understood> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(serve(raw))
}

async fn serve(raw: Vec<u8>) -> Vec<Understood> {
    let (mut client, server) = tokio::io::duplex(1 << 20);
    client.write_all(&raw).await.unwrap();
    client.shutdown().await.unwrap();
    let seen = Mutex::new(Vec::new());
    let service = hyper::service::service_fn(|r: hyper::Request<hyper::body::Incoming>| {
        let seen = &seen;
        async move {
            let (parts, body) = r.into_parts();
            let host = parts.headers.get("host").and_then(|h| h.to_str().ok()).unwrap_or_default();
            let authority = parts.uri.authority().map_or(host, |a| a.as_str()).to_owned();
            let path = parts.uri.path_and_query().map_or("", |p| p.as_str()).to_owned();
            // An empty path is `/` (RFC 9112 section 3.2.1).
            let path = if path.starts_with('?') { format!("/{path}") } else { path };
            if let Ok(b) = body.collect().await {
                let (method, body) = (parts.method.to_string(), b.to_bytes().to_vec());
                seen.lock().unwrap().push(Understood { method, authority, path, body });
            }
            Ok::<_, Infallible>(hyper::Response::new(Full::new(Bytes::new())))
        }
    });
    let _ = hyper::server::conn::http1::Builder::new()
        .half_close(true)
        .serve_connection(hyper_util::rt::TokioIo::new(server), service)
        .await;
    seen.into_inner().unwrap()
}

#[cfg(test)]
mod tests;
