//! How long upstream connections last, and how much they carry: ages, keep-alive, streams at a time.

use std::time::{Duration, Instant};

use mesh_model::proxy::*;
use tokio::io::AsyncWriteExt;

use crate::support::*;

fn to(c: Cluster) -> Proxy {
    let name = c.name.clone();
    Proxy::new().cluster(c).listener(listener(
        Direction::Outbound,
        vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward(&name))])]))],
    ))
}

/// Says which of its connections a request came on.
async fn numbered() -> std::net::SocketAddr {
    raw_server(|mut s, n| async move {
        while read_until(&mut s, "\r\n\r\n").await.ends_with("\r\n\r\n") {
            let body = n.to_string();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            if s.write_all(head.as_bytes()).await.is_err() {
                return;
            }
        }
    })
    .await
}

#[tokio::test]
async fn connections_of_an_age_take_no_more_requests() {
    for max in [None, Some(Duration::from_millis(300))] {
        let mut c = cluster("up", &[numbered().await]);
        c.max_connection_duration = max;
        let p = to(c).run();
        let begun = Instant::now();
        assert_eq!(p.get("a", "/").await.body, "0");
        // Not for being idle: it is used all the time.
        let mut last = String::new();
        while begun.elapsed() < Duration::from_millis(700) {
            last = p.get("a", "/").await.body;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(last == "0", max.is_none(), "{max:?}: {last}");
    }
}

#[tokio::test]
async fn idle_connections_of_an_age_are_closed() {
    let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel();
    let server = raw_server(move |mut s, _| {
        let tx = tx.clone();
        async move {
            read_until(&mut s, "\r\n\r\n").await;
            s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            let begun = Instant::now();
            read_all(&mut s).await;
            let _ = tx.send(begun.elapsed());
        }
    })
    .await;
    let mut c = cluster("up", &[server]);
    c.max_connection_duration = Some(Duration::from_millis(300));
    let p = to(c).run();
    assert_eq!(p.get("a", "/").await.status, 200);
    let lasted = tokio::time::timeout(WAIT, rx.recv()).await.unwrap().unwrap();
    assert!(lasted > Duration::from_millis(100), "{lasted:?}");
}

#[tokio::test]
async fn an_http2_connection_of_an_age_finishes_its_streams() {
    // Answers `/slow` after a second, and says on which connection.
    let server = raw_server(|s, n| async move {
        let mut c = h2::server::handshake(s).await.unwrap();
        while let Some(Ok((r, mut respond))) = c.accept().await {
            tokio::spawn(async move {
                if r.uri().path() == "/slow" {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                let r = http::Response::builder().header("x-conn", n).body(()).unwrap();
                let _ = respond.send_response(r, true);
            });
        }
    })
    .await;
    let mut c = cluster("up", &[server]);
    c.http = UpstreamHttp::Http2;
    c.max_connection_duration = Some(Duration::from_millis(300));
    let p = to(c).run();
    let slow = p.get("a", "/slow");
    let late = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        p.get("a", "/").await
    };
    let (slow, late) = tokio::join!(slow, late);
    assert_eq!((slow.status, slow.header("x-conn")), (200, Some("0")), "{slow:?}");
    assert_eq!((late.status, late.header("x-conn")), (200, Some("1")), "{late:?}");
}

#[tokio::test]
async fn streams_of_a_connection_are_limited() {
    let in_parallel = |max, connections| async move {
        let up = Upstream::new("up").await;
        let mut c = cluster("up", &[up.address]);
        c.http = UpstreamHttp::Http2;
        c.http2.max_concurrent_streams = max;
        c.limits.max_connections = connections;
        let p = to(c).run();
        let gets: Vec<_> = (0..6).map(|_| p.get("a", "/name")).collect();
        for r in futures::future::join_all(gets).await {
            assert_eq!(r.status, 200, "{r:?}");
        }
        up.connections()
    };
    assert_eq!(in_parallel(0, u32::MAX).await, 1);
    let many = in_parallel(1, u32::MAX).await;
    assert!(many > 1, "{many}");
    // Where there may be no further connection, requests wait for a stream.
    assert_eq!(in_parallel(1, 1).await, 1);
}

/// A server that takes HTTP/2 connections and answers nothing, PINGs neither; with `alive` it answers them. Tells how
/// long each lasted.
async fn mute(alive: bool) -> (std::net::SocketAddr, tokio::sync::mpsc::UnboundedReceiver<Duration>) {
    let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
    let server = raw_server(move |mut s, _| {
        let tx = tx.clone();
        async move {
            let begun = Instant::now();
            if alive {
                let mut c = h2::server::handshake(s).await.unwrap();
                let mut held = Vec::new();
                while let Some(Ok(r)) = c.accept().await {
                    held.push(r);
                }
            } else {
                // An empty SETTINGS frame is all it says.
                s.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
                read_all(&mut s).await;
            }
            let _ = tx.send(begun.elapsed());
        }
    })
    .await;
    (server, rx)
}

#[tokio::test]
async fn a_connection_that_answers_no_ping_ends() {
    let run = |alive, keep: bool| async move {
        let (server, mut closed) = mute(alive).await;
        let mut c = cluster("up", &[server]);
        c.http = UpstreamHttp::Http2;
        // A busy machine may take its time to answer.
        let (interval, timeout) = (Duration::from_millis(200), Duration::from_secs(1));
        c.http2.keepalive = keep.then_some(Http2Keepalive { interval, timeout });
        let p = to(c).run();
        let answer = tokio::time::timeout(Duration::from_secs(4), p.get("a", "/")).await;
        let closed = tokio::time::timeout(Duration::from_secs(2), closed.recv()).await;
        (answer.ok().map(|r| r.status), closed.is_ok())
    };
    let (gone, kept, unasked) = tokio::join!(run(false, true), run(true, true), run(false, false));
    assert_eq!(gone, (Some(503), true));
    assert_eq!(kept, (None, false), "who answers PINGs may take its time");
    assert_eq!(unasked, (None, false), "nobody asked");
}

#[tokio::test]
async fn tcp_connections_end_at_an_age() {
    let server = raw_server(|mut s, _| async move {
        // Something passes all the time, so the connection is not idle.
        while s.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let NetworkFilter::Tcp(t) = tcp_filter("db") else { unreachable!() };
    let filter = NetworkFilter::Tcp(TcpProxy { max_duration: Some(Duration::from_millis(400)), ..t });
    let p = Proxy::new()
        .cluster(cluster("db", &[server]))
        .listener(listener(Direction::Outbound, vec![chain(vec![filter])]))
        .run();
    let begun = Instant::now();
    let mut s = p.connect("l").await;
    tokio::time::timeout(WAIT, read_all(&mut s)).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(390), "{:?}", begun.elapsed());
    p.metric(&["istio_tcp_connections_closed_total"]).await;
}
