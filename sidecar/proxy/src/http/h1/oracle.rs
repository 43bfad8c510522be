//! hyper as the oracle: whatever we take for a request, another server must take for the very same one. Where the
//! two disagree, something can be smuggled.

use std::{convert::Infallible, sync::Mutex};

use bytes::{Bytes, BytesMut};
use http::Method;
use http_body_util::{BodyExt as _, Full};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt as _;

use super::{
    body::{Decoded, Decoder},
    parse,
};
use crate::http::message::{BodyKind, Frame};

/// What a server understands.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Understood {
    method: String,
    authority: String,
    path: String,
    body: Vec<u8>,
}

fn ours(raw: &[u8]) -> Vec<Understood> {
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
        out.push(Understood {
            method: p.head.method.to_string(),
            authority: p.head.authority,
            path: p.head.path,
            body,
        });
        if !p.keep_alive {
            return out;
        }
    }
}

async fn hypers(raw: Vec<u8>) -> Vec<Understood> {
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

/// Pieces of requests, good and bad, in any combination.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let pick = |of: &'static [&'static str]| prop::sample::select(of);
    let first = (
        pick(&["GET", "POST", "PUT", "OPTIONS", "HEAD", "get", "X-Y"]),
        pick(&["/", "/a?b=c", "http://b/x", "http://b?q", "*", "/a;b", "//a", "/%2e%2e/a", "a"]),
        pick(&["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.2"]),
        pick(&["\r\n", "\r\n", "\r\n", "\n", "\r\r\n"]),
    )
        .prop_map(|(m, t, v, e)| format!("{m} {t} {v}{e}"));
    let field = pick(&[
        "Host: a\r\n",
        "host:b\r\n",
        "Host: a:80 \r\n",
        "Content-Length: 4\r\n",
        "content-length:4\r\n",
        "Content-Length: 04\r\n",
        "Content-Length: 4,4\r\n",
        "Content-Length: 0\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: +4\r\n",
        "Content-Length:\t4\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: Chunked\r\n",
        "transfer-encoding:\tchunked \r\n",
        "Transfer-Encoding: identity, chunked\r\n",
        "Transfer-Encoding: x\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Connection: close\r\n",
        "Connection: keep-alive\r\n",
        "X: 1\r\n",
        "X: 1\n",
        "X: 1\r\n 2\r\n",
        "X:\r\n",
        "X : 1\r\n",
        ": 1\r\n",
        "X: \u{e4}\r\n",
    ]);
    let body = pick(&[
        "",
        "abcd",
        "abcde",
        "0\r\n\r\n",
        "4\r\nabcd\r\n0\r\n\r\n",
        "4;a=b\r\nabcd\r\n0\r\nX: 1\r\n\r\n",
        "04\r\nabcd\r\n000\r\n\r\n",
        "4\nabcd\n0\n\n",
        "4 \r\nabcd\r\n0\r\n\r\n",
        "4\r\nabcde\r\n0\r\n\r\n",
        "ffffffffffffffff4\r\nabcd\r\n0\r\n\r\n",
        "GET /smuggled HTTP/1.1\r\nHost: s\r\n\r\n",
    ]);
    let one = (
        first,
        prop::collection::vec(field, 0..5),
        pick(&["\r\n", "\r\n", "\r\n", "\n"]),
        body,
        any::<bool>(),
    );
    let one = one.prop_map(|(f, h, e, b, host)| {
        // Most combinations lack a Host; half of them get one, or hardly any would be accepted.
        let host = if host && !h.iter().any(|h| h.to_ascii_lowercase().starts_with("host")) {
            "Host: c\r\n"
        } else {
            ""
        };
        format!("{f}{host}{}{e}{b}", h.concat())
    });
    prop::collection::vec(one, 1..4).prop_map(|r| r.concat().into_bytes())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn what_we_accept_hyper_understands_alike(raw in request(), flip in any::<Option<(u16, u8)>>()) {
        let mut raw = raw;
        // Now and then a byte is another.
        if let Some((at, with)) = flip.filter(|(at, _)| at % 4 == 0) {
            let n = raw.len();
            raw[usize::from(at) % n] = with;
        }
        let ours = ours(&raw);
        // Methods with a form of target of their own are ours alone to understand.
        prop_assume!(!ours.iter().any(|u| u.method == Method::CONNECT.as_str()));
        // hyper refuses characters that RFC 3986 excludes and clients send all the same, such as `>`. To be stricter is
        // not to understand something else.
        prop_assume!(ours.iter().all(|u| u.path.parse::<http::uri::PathAndQuery>().is_ok()));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let theirs = runtime.block_on(hypers(raw.clone()));
        prop_assert!(
            theirs.len() >= ours.len() && theirs[..ours.len()] == ours[..],
            "{:?}\nours: {ours:?}\nhyper: {theirs:?}", String::from_utf8_lossy(&raw)
        );
    }
}
