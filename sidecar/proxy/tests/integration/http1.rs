//! HTTP/1.x through the proxy.

use std::time::Duration;

use mesh_model::proxy::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

#[tokio::test]
async fn a_request_goes_through_and_connections_are_reused() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let mut s = p.connect("l").await;
    for i in 0..5 {
        s.write_all(format!("GET /x{i}?q=1 HTTP/1.1\r\nHost: Reviews\r\nX-Own: Value\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let r = read_until(&mut s, "x-own: Value\n").await;
        assert!(r.starts_with("HTTP/1.1 200 OK\r\n"), "{r}");
        assert!(r.contains(&format!("up GET /x{i}?q=1")), "{r}");
        assert!(r.contains("host: Reviews\n"), "{r}");
        assert!(r.contains("x-forwarded-proto: http\n"), "{r}");
        assert!(r.contains("x-request-id: "), "{r}");
        assert!(r.contains("\r\nserver: flotilla\r\n"), "{r}");
        assert!(r.contains("\r\nx-envoy-upstream-service-time: "), "{r}");
        assert_eq!(r.matches("\r\ndate: ").count(), 1, "{r}");
    }
    assert_eq!((up.connections(), up.requests()), (1, 5));
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let mut raw = String::new();
    for i in 0..20 {
        raw.push_str(&format!("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n{i:03}"));
    }
    raw.push_str("GET /name HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    let r = p.raw("l", &raw).await;
    let at: Vec<_> = (0..20)
        .map(|i| r.find(&format!("\r\n{i:03}")).unwrap_or_else(|| panic!("{i} missing in {r}")))
        .collect();
    assert!(at.is_sorted(), "{r}");
    assert!(r.ends_with("up"), "{r}");
}

#[tokio::test]
async fn bodies_of_every_form() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let chunked = "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x-t\r\nTE: trailers\r\nConnection: close, TE\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\nX-T: end\r\n\r\n";
    let r = p.raw("l", chunked).await;
    assert!(r.contains("hello") && r.contains("x-t: end"), "{r}");
    let big = "x".repeat(3 << 20);
    let r = p
        .raw(
            "l",
            &format!(
                "POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{big}",
                big.len()
            ),
        )
        .await;
    assert!(r.len() > big.len() && r.matches('x').count() >= big.len(), "{}", r.len());
    let r = p
        .raw("l", "GET /trailers HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: close, TE\r\n\r\n")
        .await;
    assert!(r.contains("x-t: 1"), "{r}");
    let r = Response::parse(&p.raw("l", "HEAD /name HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await);
    assert_eq!((r.status, r.body.as_str(), r.header("content-length")), (200, "", Some("2")));
    let r = p.get("a", "/empty").await;
    assert_eq!((r.status, r.header("content-length"), r.header("transfer-encoding")), (204, None, None));
}

#[tokio::test]
async fn http10_and_close() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let r = Response::parse(&p.raw("l", "GET /name HTTP/1.0\r\n\r\n").await);
    assert_eq!((r.status, r.body.as_str(), r.header("connection")), (200, "up", Some("close")));
    // Chunked from the server becomes bytes until close.
    let r = Response::parse(&p.raw("l", "GET /trailers HTTP/1.0\r\nHost: a\r\n\r\n").await);
    assert_eq!((r.body.as_str(), r.header("transfer-encoding")), ("data", None));
    let server = raw_server(|mut s, _| async move {
        let mut b = [0; 1024];
        let _ = s.read(&mut b).await;
        let _ = s.write_all(b"HTTP/1.0 200 OK\r\n\r\nuntil close").await;
    })
    .await;
    let p = simple(server).run();
    let r = p.get("a", "/").await;
    assert!(r.body.contains("until close") && r.header("transfer-encoding") == Some("chunked"), "{r:?}");
}

#[tokio::test]
async fn expect_continue() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let mut s = p.connect("l").await;
    s.write_all(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        .await
        .unwrap();
    let r = read_until(&mut s, "\r\n\r\n").await;
    assert_eq!(r, "HTTP/1.1 100 Continue\r\n\r\n");
    s.write_all(b"hello").await.unwrap();
    let r = read_until(&mut s, "hello").await;
    assert!(r.starts_with("HTTP/1.1 200"), "{r}");
}

#[tokio::test]
async fn malformed_requests_get_an_answer_and_reach_nobody() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    for (raw, status) in [
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\nHost: a\n\n", 400),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
            400,
        ),
        ("GET /%2e%2e%2fadmin HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nExpect: coffee\r\n\r\n", 417),
        (&format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "a".repeat(70_000)), 431),
    ] {
        let r = Response::parse(&p.raw("l", raw).await);
        assert_eq!(r.status, status, "{r:?}");
        assert_eq!(r.header("connection"), Some("close"));
    }
    assert_eq!(up.requests(), 0);
    let r = p.raw("l", "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n").await;
    assert!(r.starts_with("HTTP/1.1 400"), "{r}");
}

#[tokio::test]
async fn websocket_tunnels_and_a_refused_upgrade_does_not() {
    let server = raw_server(|mut s, _| async move {
        let head = read_until(&mut s, "\r\n\r\n").await;
        if head.contains("/refuse") {
            let _ = s.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await;
            let rest = read_all(&mut s).await;
            assert_eq!(rest, "", "bytes behind a refused upgrade");
            return;
        }
        assert!(head.to_lowercase().contains("connection: upgrade"), "{head}");
        s.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\nhi").await.unwrap();
        let mut b = [0; 64];
        loop {
            let n = s.read(&mut b).await.unwrap();
            if n == 0 {
                s.write_all(b"bye").await.unwrap();
                return;
            }
            s.write_all(&b[..n]).await.unwrap();
        }
    })
    .await;
    let p = simple(server).run();
    let mut s = p.connect("l").await;
    s.write_all(b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\nearly").await.unwrap();
    let r = read_until(&mut s, "early").await;
    assert!(r.starts_with("HTTP/1.1 101"), "{r}");
    assert!(r.to_lowercase().contains("upgrade: websocket") && r.contains("hi"), "{r}");
    s.write_all(b"ping").await.unwrap();
    assert_eq!(read_until(&mut s, "ping").await, "ping");
    s.shutdown().await.unwrap();
    assert_eq!(read_all(&mut s).await, "bye");
    let r = p.raw("l", "GET /refuse HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n").await;
    assert!(r.starts_with("HTTP/1.1 403"), "{r}");
}

#[tokio::test]
async fn an_explicit_proxy_takes_absolute_form_and_connect() {
    let up = Upstream::new("up").await;
    let p = simple(up.address).run();
    let r = p
        .raw("l", "GET http://reviews.books:9080/a HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n")
        .await;
    assert!(r.contains("up GET /a") && r.contains("host: reviews.books:9080"), "{r}");
    let mut s = p.connect("l").await;
    s.write_all(b"CONNECT reviews:80 HTTP/1.1\r\nHost: reviews:80\r\n\r\n").await.unwrap();
    let r = read_until(&mut s, "\r\n\r\n").await;
    assert!(r.starts_with("HTTP/1.1 200"), "{r}");
    s.write_all(b"GET /inside HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n").await.unwrap();
    let r = read_all(&mut s).await;
    assert!(r.contains("up GET /inside"), "{r}");
}

#[tokio::test]
async fn slow_heads_time_out_and_idle_connections_close() {
    let up = Upstream::new("up").await;
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
    m.request_headers_timeout = Some(Duration::from_millis(50));
    m.idle_timeout = Some(Duration::from_millis(50));
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(HttpConnectionManager { codec: HttpCodec::Http1, ..m })],
        ))
        .run();
    let r = p.raw("l", "GET / HT").await;
    assert!(r.starts_with("HTTP/1.1 408"), "{r}");
    assert_eq!(p.raw("l", "").await, "");
}

#[tokio::test]
async fn a_stale_connection_is_replaced_without_a_word() {
    // Serves one request on each connection and closes after a moment, without saying so.
    let server = raw_server(|mut s, n| async move {
        let _ = read_until(&mut s, "\r\n\r\n").await;
        let _ = s.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{n}").as_bytes()).await;
        let mut b = [0; 1];
        let _ = s.read(&mut b).await;
    })
    .await;
    let p = simple(server).run();
    for i in 0..3 {
        let r = p.get("a", "/").await;
        assert_eq!((r.status, r.body.as_str()), (200, i.to_string().as_str()));
    }
    // Not so for a request that may have an effect.
    let r = p.raw("l", "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx").await;
    assert!(r.starts_with("HTTP/1.1 503"), "{r}");
}
