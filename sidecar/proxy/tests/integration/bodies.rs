//! Filters that look at bodies: compression, buffering, gRPC-Web; sessions that stay on a host; the case of names.

use std::{io::Read as _, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_model::proxy::*;
use tokio::io::AsyncWriteExt;

use crate::support::*;

fn proxy(
    hosts: &[std::net::SocketAddr],
    http: UpstreamHttp,
    filters: Vec<HttpFilter>,
    f: RouteFilters,
) -> Proxy {
    let mut r = route(forward("up"));
    r.filters = f.into();
    let mut m = inline(vec![vhost(&["*"], vec![r])]);
    m.filters = filters;
    Proxy::new()
        .cluster(Cluster { http, ..cluster("up", hosts) })
        .listener(listener(Direction::Outbound, vec![http_chain(m)]))
        .run()
}

/// Sends and returns the head as text and the body, with chunks put together.
async fn send(p: &Proxy, request: &str) -> (Response, Vec<u8>) {
    let mut s = p.connect("l").await;
    s.write_all(request.as_bytes()).await.unwrap();
    let mut raw = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut s, &mut raw);
    tokio::time::timeout(WAIT, read).await.unwrap().unwrap();
    let at = raw.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("{raw:?}"));
    let head = Response::parse(&String::from_utf8_lossy(&raw[..at + 4]));
    let mut body = &raw[at + 4..];
    if head.header("transfer-encoding") != Some("chunked") {
        return (head, body.to_vec());
    }
    let mut out = Vec::new();
    loop {
        let end = body.windows(2).position(|w| w == b"\r\n").unwrap();
        let n = usize::from_str_radix(std::str::from_utf8(&body[..end]).unwrap(), 16).unwrap();
        if n == 0 {
            return (head, out);
        }
        out.extend_from_slice(&body[end + 2..end + 2 + n]);
        body = &body[end + 4 + n..];
    }
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{headers}\r\n")
}

/// Answers with these header lines and this body.
async fn fixed(headers: &'static str, body: &'static str) -> std::net::SocketAddr {
    raw_server(move |mut s, _| async move {
        while !read_until(&mut s, "\r\n\r\n").await.is_empty() {
            let r = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len());
            if s.write_all(r.as_bytes()).await.is_err() {
                return;
            }
        }
    })
    .await
}

const TEXT: &str = "a text that is long enough to be compressed, a text that is long enough to be compressed";

#[tokio::test]
async fn answers_are_compressed() {
    let gzip = |c: Compressor| vec![HttpFilter::Compressor(Arc::new(c))];
    let up = fixed("content-type: text/plain; charset=utf-8\r\netag: \"x\"\r\nvary: Origin\r\n", TEXT).await;
    let p = proxy(&[up], UpstreamHttp::Http1, gzip(Compressor::default()), RouteFilters::default());
    for _ in 0..2 {
        let (r, body) = send(&p, &get("/", "accept-encoding: br, gzip\r\n")).await;
        assert_eq!((r.header("content-encoding"), r.header("content-length")), (Some("gzip"), None));
        assert_eq!(r.header("etag"), None, "a strong tag is for other bytes");
        assert!(r.head.contains("Accept-Encoding") && r.head.contains("vary: Origin"), "{r:?}");
        assert!(body.len() < TEXT.len());
        let mut out = String::new();
        flate2::read::GzDecoder::new(&body[..]).read_to_string(&mut out).unwrap();
        assert_eq!(out, TEXT);
    }
    let (r, body) = send(&p, &get("/", "")).await;
    assert_eq!((r.header("content-encoding"), body.as_slice()), (None, TEXT.as_bytes()));
    assert!(r.head.contains("Accept-Encoding"), "caches are told even so");
    let (r, _) =
        send(&p, "HEAD / HTTP/1.1\r\nHost: h\r\nConnection: close\r\naccept-encoding: gzip\r\n\r\n").await;
    assert_eq!((r.status, r.header("content-encoding")), (200, None));
    let weak = Compressor { weaken_etag: true, ..Compressor::default() };
    let p = proxy(&[up], UpstreamHttp::Http1, gzip(weak), RouteFilters::default());
    assert_eq!(send(&p, &get("/", "accept-encoding: gzip\r\n")).await.0.header("etag"), Some("W/\"x\""));
    // What is left alone.
    let off = RouteFilters { no_compression: true, ..RouteFilters::default() };
    let tagged = Compressor { disable_on_etag: true, ..Compressor::default() };
    let long = Compressor { min_content_length: 1000, ..Compressor::default() };
    let image = fixed("content-type: image/png\r\n", TEXT).await;
    let done = fixed("content-type: text/plain\r\ncontent-encoding: br\r\n", TEXT).await;
    let fix = fixed("content-type: text/plain\r\ncache-control: public, no-transform\r\n", TEXT).await;
    for (address, c, f) in [
        (up, Compressor::default(), off),
        (up, tagged, RouteFilters::default()),
        (up, long, RouteFilters::default()),
        (image, Compressor::default(), RouteFilters::default()),
        (done, Compressor::default(), RouteFilters::default()),
        (fix, Compressor::default(), RouteFilters::default()),
    ] {
        let p = proxy(&[address], UpstreamHttp::Http1, gzip(c), f);
        let (r, body) = send(&p, &get("/", "accept-encoding: gzip\r\n")).await;
        assert_ne!(r.header("content-encoding"), Some("gzip"), "{r:?}");
        assert_eq!(body, TEXT.as_bytes());
    }
}

#[tokio::test]
async fn requests_wait_until_they_are_whole() {
    let up = Upstream::new("up").await;
    let run = |f| proxy(&[up.address], UpstreamHttp::Http1, vec![HttpFilter::Buffer(8)], f);
    let p = run(RouteFilters::default());
    let chunked = |path: &str, chunks: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n"
        )
    };
    let (r, body) = send(&p, &chunked("/echo", "3\r\nabc\r\n5\r\ndefgh\r\n")).await;
    assert_eq!((r.status, body.as_slice()), (200, &b"abcdefgh"[..]));
    let (_, seen) = send(&p, &chunked("/seen", "3\r\nabc\r\n")).await;
    let seen = String::from_utf8(seen).unwrap();
    assert!(seen.contains("content-length: 3\n") && !seen.contains("transfer-encoding"), "{seen}");
    assert_eq!(send(&p, &chunked("/echo", "9\r\nabcdefghi\r\n")).await.0.status, 413);
    let more = RouteFilters { buffer: Some(BufferOverride::Limit(9)), ..RouteFilters::default() };
    assert_eq!(send(&run(more), &chunked("/echo", "9\r\nabcdefghi\r\n")).await.0.status, 200);
    let off = RouteFilters { buffer: Some(BufferOverride::Disabled), ..RouteFilters::default() };
    assert_eq!(send(&run(off), &chunked("/echo", "9\r\nabcdefghi\r\n")).await.0.status, 200);
    // Nothing reaches the server before the end.
    let before = up.requests();
    let mut s = p.connect("l").await;
    s.write_all(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab").await.unwrap();
    assert_eq!(p.get("h", "/name").await.status, 200);
    assert_eq!(up.requests() - before, 1);
    s.write_all(b"cde").await.unwrap();
    assert!(read_until(&mut s, "abcde").await.contains(" 200 "));
}

fn post(kind: &str, accept: &str, path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\ncontent-type: {kind}\r\n{accept}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn grpc_web_in_both_forms() {
    let up = Upstream::new("up").await;
    let filters = vec![HttpFilter::GrpcWeb, HttpFilter::Cors];
    let p = proxy(&[up.address], UpstreamHttp::Http2, filters, RouteFilters::default());
    let trailers = "grpc-status: 0\r\nx-t: 1\r\n";
    let frame = [&[0x80, 0, 0, 0, trailers.len() as u8][..], trailers.as_bytes()].concat();
    let (r, body) = send(&p, &post("application/grpc-web+proto", "", "/trailers", "x")).await;
    assert_eq!((r.status, r.header("content-type")), (200, Some("application/grpc-web+proto")));
    assert_eq!(body, [b"data", frame.as_slice()].concat());
    let text = "accept: application/grpc-web-text\r\n";
    let (r, body) =
        send(&p, &post("application/grpc-web-text", text, "/trailers", &STANDARD.encode("x"))).await;
    assert_eq!(r.header("content-type"), Some("application/grpc-web-text+proto"));
    let mut plain = Vec::new();
    body.chunks(4).for_each(|four| STANDARD.decode_vec(four, &mut plain).unwrap());
    assert_eq!(plain, [b"data", frame.as_slice()].concat());
    // The server sees gRPC, and the text as bytes.
    let (_, seen) =
        send(&p, &post("application/grpc-web-text", "", "/seen", &STANDARD.encode("hello"))).await;
    assert!(seen.is_empty(), "an answer that is no gRPC is none for the client either");
    let grpc = "content-type: application/grpc\r\n";
    let echo = raw_grpc(grpc).await;
    let q = proxy(&[echo], UpstreamHttp::Http1, vec![HttpFilter::GrpcWeb], RouteFilters::default());
    let (_, body) = send(&q, &post("application/grpc-web-text", "", "/", &STANDARD.encode("hello"))).await;
    let seen = String::from_utf8_lossy(&body).into_owned();
    for part in ["content-type: application/grpc\r\n", "te: trailers\r\n", "hello"] {
        assert!(seen.contains(part), "{part} in {seen}");
    }
    // Errors of the server and our own.
    let (r, body) = send(&p, &post("application/grpc-web", "", "/status/503", "x")).await;
    assert_eq!((r.status, r.header("grpc-status"), body.len()), (200, Some("14"), 0));
    let down =
        proxy(&[closed_port()], UpstreamHttp::Http2, vec![HttpFilter::GrpcWeb], RouteFilters::default());
    let (r, _) = send(&down, &post("application/grpc-web", "", "/", "x")).await;
    assert_eq!((r.status, r.header("grpc-status")), (200, Some("14")));
    assert_eq!(r.header("content-type"), Some("application/grpc-web+proto"));
    let (r, _) = send(&p, &post("application/grpc-web-text", "", "/trailers", "!!!!")).await;
    assert_eq!(r.header("grpc-status"), Some("13"), "{r:?}");
    // Others pass as they are.
    let (r, body) = send(&p, &post("text/plain", "", "/echo", "x")).await;
    assert_eq!((r.status, body.as_slice()), (200, &b"x"[..]));
    p.metric(&["istio_requests_total", "request_protocol=\"grpc\"", "grpc_response_status=\"0\""]).await;
}

/// Answers with the request it saw, as if that were gRPC.
async fn raw_grpc(kind: &'static str) -> std::net::SocketAddr {
    raw_server(move |mut s, _| async move {
        let seen = read_until(&mut s, "0\r\n\r\n").await;
        let r = format!("HTTP/1.1 200 OK\r\n{kind}content-length: {}\r\n\r\n{seen}", seen.len());
        let _ = s.write_all(r.as_bytes()).await;
    })
    .await
}

#[tokio::test]
async fn sessions_stay_on_their_host() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let hosts = [a.address, b.address];
    let state = SessionState::Cookie { name: "host".into(), path: "/".into(), ttl: Duration::from_secs(60) };
    let cookie =
        |strict| StatefulSession { state: Some(state.clone()), strict, ..StatefulSession::default() };
    let run = |s: StatefulSession, hosts: &[std::net::SocketAddr], f| {
        proxy(hosts, UpstreamHttp::Http1, vec![HttpFilter::StatefulSession(Arc::new(s))], f)
    };
    let p = run(cookie(false), &hosts, RouteFilters::default());
    let first = p.get("h", "/name").await;
    let set = first.header("set-cookie").unwrap().to_owned();
    assert!(set.contains("Max-Age=60; Path=/; HttpOnly"), "{set}");
    let pair = set.split(';').next().unwrap().to_owned();
    for _ in 0..6 {
        let r = p.send("h", "/name", &format!("cookie: x=1; {pair}\r\n")).await;
        assert_eq!(r.body, first.body);
        assert_eq!(r.header("set-cookie"), None, "nothing new to say");
    }
    // The host is gone, or never was one of the cluster's.
    let other = if first.body == "a" { &hosts[1..] } else { &hosts[..1] };
    let r = run(cookie(false), other, RouteFilters::default())
        .send("h", "/name", &format!("cookie: {pair}\r\n"))
        .await;
    assert!(r.status == 200 && r.body != first.body && r.header("set-cookie").is_some(), "{r:?}");
    let r = run(cookie(true), other, RouteFilters::default())
        .send("h", "/name", &format!("cookie: {pair}\r\n"))
        .await;
    assert_eq!(r.status, 503);
    let header =
        StatefulSession { state: Some(SessionState::Header("x-host".into())), ..StatefulSession::default() };
    let p = run(header, &hosts, RouteFilters::default());
    let first = p.get("h", "/name").await;
    let host = first.header("x-host").unwrap().to_owned();
    for _ in 0..4 {
        assert_eq!(p.send("h", "/name", &format!("x-host: {host}\r\n")).await.body, first.body);
    }
    let off = RouteFilters { session: Some(SessionOverride::Disabled), ..RouteFilters::default() };
    assert_eq!(run(cookie(false), &hosts, off).get("h", "/name").await.header("set-cookie"), None);
}

#[tokio::test]
async fn names_keep_their_case_between_http1_peers() {
    let up = raw_server(|mut s, _| async move {
        let seen = read_until(&mut s, "\r\n\r\n").await;
        let r = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX-MiXed: 1\r\n\r\n{seen}", seen.len());
        let _ = s.write_all(r.as_bytes()).await;
    })
    .await;
    let p = proxy(&[up], UpstreamHttp::Http1, vec![], RouteFilters::default());
    let r = p.send("h", "/", "X-CuStOm: a\r\n").await;
    assert!(r.body.contains("X-CuStOm: a\r\n") && r.head.contains("X-MiXed: 1"), "{r:?}");
}
