//! Spans and log entries for collectors that are slow, away or gone. What they say is compared with Envoy's in
//! `sidecar/agent/tests/integration/collected.rs`.

use std::{net::SocketAddr, time::Duration};

use mesh_model::proxy::*;
use mesh_proxy::{EngineOptions, Hooks};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
};

use crate::support::*;

/// A collector that answers each POST, and what it got.
async fn collector() -> (SocketAddr, UnboundedReceiver<String>) {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (send, got) = unbounded_channel();
    let address = l.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (s, _) = l.accept().await.unwrap();
            tokio::spawn(answer(s, send.clone()));
        }
    });
    (address, got)
}

async fn answer(mut s: TcpStream, got: tokio::sync::mpsc::UnboundedSender<String>) {
    use tokio::io::AsyncWriteExt as _;
    let mut raw = String::new();
    let mut buf = vec![0; 65536];
    loop {
        let n = s.read(&mut buf).await.unwrap_or(0);
        if n == 0 {
            return;
        }
        raw.push_str(&String::from_utf8_lossy(&buf[..n]));
        let whole = raw.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            let length = head
                .lines()
                .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            body.len() >= length.unwrap_or(0)
        });
        if whole {
            let _ = got.send(std::mem::take(&mut raw));
            s.write_all(b"HTTP/1.1 202 ok\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        }
    }
}

fn traced(cluster: &str, timeout: Duration) -> HttpConnectionManager {
    let to = HttpCollector {
        cluster: cluster.into(),
        authority: "zipkin".into(),
        path: "/api/v2/spans".into(),
        timeout,
        headers: vec![],
    };
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("a"))])]);
    let provider = TraceProvider::Zipkin(ZipkinTraces { to, long_ids: true, w3c: false });
    m.tracing = Some(Box::new(Tracing { sampling: 10_000, provider: Some(provider), ..Tracing::default() }));
    m
}

async fn proxy(m: HttpConnectionManager, to: SocketAddr) -> (Proxy, Upstream) {
    let up = Upstream::new("up").await;
    let options = EngineOptions { workers: 1, ..EngineOptions::default() };
    let p = Proxy::with(options, Hooks::default())
        .cluster(cluster("a", &[up.address]))
        .cluster(cluster("zipkin", &[to]))
        .listener(listener(Direction::Outbound, vec![http_chain(m)]))
        .run();
    (p, up)
}

fn spans(posts: &mut UnboundedReceiver<String>) -> (usize, usize) {
    let mut all = (0, 0);
    while let Ok(p) = posts.try_recv() {
        let body: serde_json::Value = serde_json::from_str(p.split_once("\r\n\r\n").unwrap().1).unwrap();
        all = (all.0 + 1, all.1 + body.as_array().unwrap().len());
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_drains_sends_what_it_has() {
    let (to, mut got) = collector().await;
    // A limit of zero is none.
    let (p, _up) = proxy(traced("zipkin", Duration::ZERO), to).await;
    for _ in 0..7 {
        assert_eq!(p.get("h", "/").await.status, 200);
    }
    // Sooner than it would be sent.
    p.engine.drain(Duration::from_secs(5)).await;
    let (posts, spans) = spans(&mut got);
    assert!((1..=2).contains(&posts) && spans == 7, "{spans} spans in {posts} calls");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_waits_for_a_collector() {
    // It accepts, reads nothing and never answers.
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let m = traced("zipkin", Duration::from_millis(300));
    let (p, _up) = proxy(m, l.local_addr().unwrap()).await;
    for _ in 0..5 {
        assert_eq!(p.get("h", "/").await.status, 200);
    }
    p.metric(&["flotilla_exports_dropped_total 5"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_collector_does_not_take_is_bounded() {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let m = traced("zipkin", Duration::from_secs(600));
    let (p, _up) = proxy(m, l.local_addr().unwrap()).await;
    // Each span has a long header in it: 64 KiB are under way and hang, and there is room for a mebibyte more.
    let agent = format!("user-agent: {}\r\n", "x".repeat(8_000));
    for _ in 0..200 {
        assert_eq!(p.send("h", "/", &agent).await.status, 200);
    }
    p.metric(&["flotilla_exports_dropped_total"]).await;
    let metrics = p.metrics();
    let line = metrics.lines().find(|l| l.starts_with("flotilla_exports_dropped_total")).unwrap();
    let dropped: u32 = line.split(' ').next_back().unwrap().parse().unwrap();
    assert!((20..120).contains(&dropped), "{dropped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_of_unknown_protocol_is_refused_by_name() {
    let mut m = traced("zipkin", Duration::from_secs(5));
    let provider =
        TraceProvider::SkyWalking(GrpcService { cluster: "zipkin".into(), ..GrpcService::default() });
    m.tracing.as_mut().unwrap().provider = Some(provider);
    let p = Proxy::new().listener(listener(Direction::Outbound, vec![http_chain(m)]));
    let report = p.apply();
    assert!(report.rejected[0].2.contains("SkyWalking"), "{:?}", report.rejected);
}
