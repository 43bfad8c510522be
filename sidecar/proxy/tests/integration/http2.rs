//! HTTP/2 through the proxy: gRPC, flow control, resets, WebSocket.

use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use mesh_model::proxy::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

async fn client(p: &Proxy) -> SendRequest<Bytes> {
    let s = TcpStream::connect(p.address("l")).await.unwrap();
    let (send, conn) =
        h2::client::Builder::new().initial_connection_window_size(1 << 22).handshake(s).await.unwrap();
    tokio::spawn(async move {
        let _ = conn.await;
    });
    send.ready().await.unwrap()
}

fn request(method: &str, path: &str) -> http::Request<()> {
    http::Request::builder().method(method).uri(format!("http://reviews:9080{path}")).body(()).unwrap()
}

fn grpc(path: &str) -> http::Request<()> {
    let mut r = request("POST", path);
    r.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    r.headers_mut().insert("te", "trailers".parse().unwrap());
    r
}

async fn body(mut r: h2::RecvStream) -> (Vec<u8>, Option<http::HeaderMap>) {
    let mut out = Vec::new();
    while let Some(b) = r.data().await {
        let b = b.unwrap();
        let _ = r.flow_control().release_capacity(b.len());
        out.extend_from_slice(&b);
    }
    (out, r.trailers().await.unwrap())
}

fn proxy(up: std::net::SocketAddr, http: UpstreamHttp) -> Proxy {
    let mut c = cluster("up", &[up]);
    c.http = http;
    Proxy::new().cluster(c).listener(listener(
        Direction::Outbound,
        vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
    ))
}

#[tokio::test]
async fn idle_connections_are_closed_but_not_under_a_stream() {
    let up = raw_server(|mut s, _| async move {
        let _ = read_until(&mut s, "\r\n\r\n").await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let _ = s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    })
    .await;
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
    m.idle_timeout = Some(Duration::from_millis(100));
    let p = Proxy::new()
        .cluster(cluster("up", &[up]))
        .listener(listener(Direction::Outbound, vec![http_chain(m)]))
        .run();
    let s = TcpStream::connect(p.address("l")).await.unwrap();
    let (mut send, conn) = h2::client::handshake(s).await.unwrap();
    let conn = tokio::spawn(conn);
    // Longer than a connection may be idle.
    let (r, _) = send.send_request(request("GET", "/"), true).unwrap();
    assert_eq!(r.await.unwrap().status(), 200);
    assert!(!conn.is_finished());
    drop(send);
    let gone = tokio::time::timeout(Duration::from_secs(5), conn).await;
    gone.expect("the connection is closed").unwrap().unwrap();
}

#[tokio::test]
async fn grpc_end_to_end_over_one_connection() {
    let up = Upstream::new("up").await;
    let p = proxy(up.address, UpstreamHttp::Http2).run();
    let mut send = client(&p).await;
    for _ in 0..10 {
        let (r, mut s) = send.send_request(grpc("/trailers"), false).unwrap();
        s.send_data(Bytes::from_static(b"hello"), true).unwrap();
        let r = r.await.unwrap();
        assert_eq!(r.status(), 200);
        let (data, trailers) = body(r.into_body()).await;
        assert_eq!(data, b"data");
        assert_eq!(trailers.unwrap()["grpc-status"], "0");
    }
    assert_eq!(up.connections(), 1);
    p.metric(&["istio_requests_total", "request_protocol=\"grpc\"", "grpc_response_status=\"0\"", "} 10"])
        .await;
}

#[tokio::test]
async fn one_dial_for_many_waiters() {
    let up = Upstream::new("up").await;
    let p = proxy(up.address, UpstreamHttp::Http2).run();
    let gets = (0..50).map(|_| p.get("a", "/name"));
    for r in futures::future::join_all(gets).await {
        assert_eq!((r.status, r.body.as_str()), (200, "up"), "{r:?}");
    }
    assert_eq!(up.connections(), 1);
}

#[tokio::test]
async fn trailers_and_bodies_cross_versions() {
    let up = Upstream::new("up").await;
    // h2 down, h1 up.
    let p = proxy(up.address, UpstreamHttp::Http1).run();
    let mut send = client(&p).await;
    let (r, mut s) = send.send_request(request("POST", "/echo"), false).unwrap();
    s.send_data(Bytes::from_static(b"hello"), false).unwrap();
    let mut t = http::HeaderMap::new();
    t.insert("x-t", "end".parse().unwrap());
    s.send_trailers(t).unwrap();
    let r = r.await.unwrap();
    assert!(r.headers().get("transfer-encoding").is_none() && r.headers().get("connection").is_none());
    let (data, trailers) = body(r.into_body()).await;
    assert_eq!(data, b"hello");
    // The upstream only sends trailers to a client that takes them, and says so with TE.
    drop(trailers);
    let (r, _) = send.send_request(request("GET", "/see"), true).unwrap();
    let (data, _) = body(r.await.unwrap().into_body()).await;
    let seen = String::from_utf8(data).unwrap();
    assert!(seen.contains("HTTP/1.1") && seen.contains("host: reviews:9080"), "{seen}");
    // h1 down, h2 up.
    let p = proxy(up.address, UpstreamHttp::Http2).run();
    let r = p.raw("l", "POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-T: end\r\n\r\n").await;
    assert!(r.contains("hello") && r.contains("x-t: end"), "{r}");
    assert!(p.get("a", "/see").await.body.contains("HTTP/2.0"));
}

#[tokio::test]
async fn large_bodies_obey_windows_both_ways() {
    let up = Upstream::new("up").await;
    let p = proxy(up.address, UpstreamHttp::Http2).run();
    let mut send = client(&p).await;
    let (r, mut s) = send.send_request(request("POST", "/stream"), false).unwrap();
    let total = 4 << 20;
    let writer = tokio::spawn(async move {
        let mut left = total;
        while left > 0 {
            s.reserve_capacity(left.min(65_536));
            let n = std::future::poll_fn(|cx| s.poll_capacity(cx)).await.unwrap().unwrap().min(left);
            left -= n;
            s.send_data(Bytes::from(vec![b'x'; n]), left == 0).unwrap();
        }
    });
    let (data, _) = body(r.await.unwrap().into_body()).await;
    assert_eq!(data.len(), total);
    writer.await.unwrap();
}

#[tokio::test]
async fn a_reader_that_never_reads_stops_only_its_own_stream() {
    let up = Upstream::new("up").await;
    let p = proxy(up.address, UpstreamHttp::Http2).run();
    let mut send = client(&p).await;
    let (stuck, _) = send.send_request(request("GET", "/big"), true).unwrap();
    let stuck = stuck.await.unwrap();
    for _ in 0..5 {
        let (r, _) = send.send_request(request("GET", "/name"), true).unwrap();
        assert_eq!(body(r.await.unwrap().into_body()).await.0, b"up");
    }
    assert_eq!(body(stuck.into_body()).await.0.len(), 1 << 20);
}

#[tokio::test]
async fn local_replies_to_grpc_are_trailers_only() {
    let p = proxy(closed_port(), UpstreamHttp::Http2).run();
    let mut send = client(&p).await;
    let (r, _) = send.send_request(grpc("/x"), true).unwrap();
    let r = r.await.unwrap();
    assert_eq!((r.status().as_u16(), &r.headers()["grpc-status"]), (200, &"14".parse().unwrap()));
    assert!(r.headers()["grpc-message"].to_str().unwrap().contains("remote connection failure"));
    assert!(r.body().is_end_stream());
}

#[tokio::test]
async fn a_reset_reaches_the_other_side() {
    let (tx, mut rx) = tokio::sync::mpsc::channel(1);
    let server = raw_server(move |s, _| {
        let tx = tx.clone();
        async move {
            let mut c = h2::server::handshake(s).await.unwrap();
            let (_req, mut respond) = c.accept().await.unwrap().unwrap();
            tokio::spawn(async move {
                let reason = std::future::poll_fn(|cx| respond.poll_reset(cx)).await.unwrap();
                tx.send(reason).await.unwrap();
            });
            while c.accept().await.is_some() {}
        }
    })
    .await;
    let p = proxy(server, UpstreamHttp::Http2).run();
    let mut send = client(&p).await;
    let (r, mut s) = send.send_request(request("GET", "/"), false).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    s.send_reset(h2::Reason::CANCEL);
    drop(r);
    let reason = tokio::time::timeout(WAIT, rx.recv()).await.unwrap().unwrap();
    assert_eq!(reason, h2::Reason::CANCEL);
}

#[tokio::test]
async fn what_http1_would_read_differently_is_refused() {
    let up = Upstream::new("up").await;
    let p = proxy(up.address, UpstreamHttp::Http1).run();
    let mut send = client(&p).await;
    for (name, value) in [
        ("host", "other"),
        ("content-length", "x"),
        ("transfer-encoding", "chunked"),
        ("connection", "close"),
    ] {
        let mut r = request("POST", "/");
        r.headers_mut().insert(name, value.parse().unwrap());
        let outcome = match send.send_request(r, true) {
            Ok((r, _)) => r.await.map(|r| r.status().as_u16()),
            Err(e) => Err(e),
        };
        assert!(matches!(outcome, Ok(400) | Err(_)), "{name}: {outcome:?}");
        send = client(&p).await;
    }
    assert_eq!(up.requests(), 0);
    let mut r = request("GET", "/see");
    r.headers_mut().append("cookie", "a=1".parse().unwrap());
    r.headers_mut().append("cookie", "b=2".parse().unwrap());
    let (r, _) = send.send_request(r, true).unwrap();
    let (data, _) = body(r.await.unwrap().into_body()).await;
    assert!(String::from_utf8(data).unwrap().contains("cookie: a=1; b=2\n"));
}

/// In HTTP/2 the `http` crate takes names with a quotation mark, which are tokens in no version.
#[tokio::test]
async fn names_that_no_version_has_go_neither_way() {
    fn name() -> http::HeaderName {
        http::HeaderName::from_lowercase(b"\"x").unwrap()
    }
    let up = Upstream::new("up").await;
    let p = proxy(up.address, UpstreamHttp::Http1).run();
    let mut r = request("GET", "/");
    r.headers_mut().insert(name(), "1".parse().unwrap());
    let (r, _) = client(&p).await.send_request(r, true).unwrap();
    assert_eq!((r.await.unwrap().status().as_u16(), up.requests()), (400, 0));
    // And at the end of a body.
    let (r, mut s) = client(&p).await.send_request(request("POST", "/"), false).unwrap();
    s.send_data(Bytes::from_static(b"a"), false).unwrap();
    s.send_trailers([(name(), "1".parse().unwrap())].into_iter().collect()).unwrap();
    assert!(!matches!(r.await, Ok(r) if r.status() == 200));

    let server = raw_server(|s, _| async move {
        let mut c = h2::server::handshake(s).await.unwrap();
        while let Some(Ok((r, mut respond))) = c.accept().await {
            let mut head = http::Response::new(());
            if r.uri().path() == "/head" {
                head.headers_mut().insert(name(), "1".parse().unwrap());
            }
            let mut s = respond.send_response(head, false).unwrap();
            s.send_data(Bytes::from_static(b"a"), false).unwrap();
            s.send_trailers([(name(), "1".parse().unwrap())].into_iter().collect()).unwrap();
        }
    })
    .await;
    let p = proxy(server, UpstreamHttp::Http2).run();
    assert_eq!(p.get("reviews", "/head").await.status, 502);
    let (r, _) = client(&p).await.send_request(request("GET", "/trailers"), true).unwrap();
    // The stream is reset, which may overtake its head.
    if let Ok(r) = r.await {
        let mut b = r.into_body();
        while let Some(Ok(_)) = b.data().await {}
        assert!(b.trailers().await.is_err(), "the stream is reset");
    }
}

#[tokio::test]
async fn rapid_reset_ends_the_connection_not_the_proxy() {
    let up = Upstream::new("up").await;
    let p = proxy(up.address, UpstreamHttp::Http1).run();
    let mut send = client(&p).await;
    let mut failed = false;
    for _ in 0..5000 {
        let Ok(mut ready) = send.clone().ready().await else {
            failed = true;
            break;
        };
        match ready.send_request(request("GET", "/slow"), false) {
            Ok((_, mut s)) => s.send_reset(h2::Reason::CANCEL),
            Err(_) => {
                failed = true;
                break;
            }
        }
    }
    let _ = &mut send;
    let mut fresh = client(&p).await;
    // On a busy machine the worker may be so far behind that it refuses for a moment.
    let end = tokio::time::Instant::now() + WAIT;
    loop {
        let (r, _) = fresh.send_request(request("GET", "/name"), true).unwrap();
        let status = r.await.unwrap().status().as_u16();
        if status == 200 {
            break;
        }
        assert!(status == 503 && tokio::time::Instant::now() < end, "{status}");
    }
    // Either the connection was closed for it, or the resets were absorbed; requests must not pile up.
    let end = tokio::time::Instant::now() + WAIT;
    while p.engine.status().requests > 0 {
        assert!(tokio::time::Instant::now() < end, "{:?} failed={failed}", p.engine.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn websocket_over_http2() {
    let server = raw_server(|mut s, _| async move {
        let head = read_until(&mut s, "\r\n\r\n").await;
        assert!(head.starts_with("GET /chat HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("upgrade: websocket"), "{head}");
        s.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            .await
            .unwrap();
        let mut b = [0; 64];
        let n = s.read(&mut b).await.unwrap();
        s.write_all(&b[..n]).await.unwrap();
    })
    .await;
    let p = proxy(server, UpstreamHttp::Http2).run();
    let s = TcpStream::connect(p.address("l")).await.unwrap();
    let (mut send, conn) = h2::client::handshake(s).await.unwrap();
    tokio::spawn(async move {
        let _ = conn.await;
    });
    // The setting arrives with the server's first frames.
    let end = tokio::time::Instant::now() + WAIT;
    while !send.is_extended_connect_protocol_enabled() {
        assert!(tokio::time::Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut r = request("CONNECT", "/chat");
    r.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (r, mut s) = send.send_request(r, false).unwrap();
    let r = r.await.unwrap();
    assert_eq!(r.status(), 200);
    s.send_data(Bytes::from_static(b"ping"), false).unwrap();
    let mut recv = r.into_body();
    assert_eq!(recv.data().await.unwrap().unwrap(), "ping");
}

#[tokio::test]
async fn goaway_upstream_loses_no_request() {
    // Each connection serves three requests, then says GOAWAY.
    let server = raw_server(|s, n| async move {
        let mut c = h2::server::handshake(s).await.unwrap();
        let mut served = 0;
        while let Some(Ok((_, mut respond))) = c.accept().await {
            let r = http::Response::builder().header("x-conn", n).body(()).unwrap();
            respond.send_response(r, true).unwrap();
            served += 1;
            if served == 3 {
                c.graceful_shutdown();
            }
        }
    })
    .await;
    let p = proxy(server, UpstreamHttp::Http2).run();
    for i in 0..20 {
        let r = p.get("a", "/").await;
        assert_eq!(r.status, 200, "request {i}: {r:?}");
    }
}

#[tokio::test]
async fn draining_says_goaway_and_finishes_streams() {
    let up = Upstream::new("up").await;
    let options = mesh_proxy::EngineOptions { drain_time: Duration::from_secs(5), ..Default::default() };
    let mut p = Proxy::with(options, mesh_proxy::Hooks::default())
        .cluster(cluster("up", &[up.address]))
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
        ))
        .run();
    let mut send = client(&p).await;
    let (r, mut s) = send.send_request(request("POST", "/stream"), false).unwrap();
    s.send_data(Bytes::from_static(b"one"), false).unwrap();
    let mut r = r.await.unwrap().into_body();
    assert_eq!(r.data().await.unwrap().unwrap(), "one");
    p.snap.listeners.clear();
    p.apply();
    let end = tokio::time::Instant::now() + WAIT;
    while send.clone().ready().await.is_ok_and(|mut s| s.send_request(request("GET", "/name"), true).is_ok())
    {
        assert!(tokio::time::Instant::now() < end, "no GOAWAY");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    s.send_data(Bytes::from_static(b"two"), true).unwrap();
    assert_eq!(r.data().await.unwrap().unwrap(), "two");
}

#[tokio::test]
async fn head_has_the_length_of_what_it_leaves_out() {
    let up = Upstream::new("up").await;
    for http in [UpstreamHttp::Http1, UpstreamHttp::Http2] {
        let p = proxy(up.address, http).run();
        let mut send = client(&p).await;
        let (r, _) = send.send_request(request("HEAD", "/name"), true).unwrap();
        let r = r.await.unwrap_or_else(|e| panic!("{http:?}: {e:?}"));
        assert_eq!((r.status().as_u16(), &r.headers()["content-length"]), (200, &"2".parse().unwrap()));
        assert_eq!(body(r.into_body()).await.0, b"");
    }
}
