//! TCP through the proxy.

use std::time::Duration;

use mesh_model::proxy::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

fn proxy(up: &[std::net::SocketAddr], filter: NetworkFilter) -> Proxy {
    Proxy::new()
        .cluster(cluster("outbound|3306||db.books.svc.cluster.local", up))
        .listener(listener(Direction::Outbound, vec![chain(vec![filter])]))
}

const DB: &str = "outbound|3306||db.books.svc.cluster.local";

#[tokio::test]
async fn bytes_half_close_and_metrics() {
    let server = raw_server(|mut s, _| async move {
        let got = read_all(&mut s).await;
        s.write_all(format!("got {}", got.len()).as_bytes()).await.unwrap();
    })
    .await;
    let p = proxy(&[server], tcp_filter(DB)).run();
    let r = p.raw_half("x".repeat(100_000)).await;
    assert_eq!(r, "got 100000");
    p.metric(&[
        "istio_tcp_received_bytes_total",
        "db.books.svc.cluster.local",
        "reporter=\"source\"",
        "} 100000",
    ])
    .await;
    p.metric(&[
        "istio_tcp_connections_closed_total",
        "destination_workload=\"ratings-v1\"",
        "destination_cluster=\"east\"",
    ])
    .await;
}

impl Proxy {
    /// Sends, half-closes, reads all.
    pub(crate) async fn raw_half(&self, data: String) -> String {
        let mut s = self.connect("l").await;
        s.write_all(data.as_bytes()).await.unwrap();
        s.shutdown().await.unwrap();
        read_all(&mut s).await
    }
}

#[tokio::test]
async fn a_server_that_speaks_first_is_not_kept_waiting() {
    let server = raw_server(|mut s, _| async move {
        s.write_all(b"220 ready\r\n").await.unwrap();
        let _ = read_all(&mut s).await;
    })
    .await;
    let p = proxy(&[server], tcp_filter(DB)).run();
    let mut s = p.connect("l").await;
    let started = std::time::Instant::now();
    assert_eq!(read_until(&mut s, "\n").await, "220 ready\r\n");
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn refused_hosts_are_passed_over_and_idle_connections_closed() {
    let server = raw_server(|mut s, _| async move {
        s.write_all(b"hi").await.unwrap();
        let _ = read_all(&mut s).await;
    })
    .await;
    let NetworkFilter::Tcp(mut t) = tcp_filter(DB) else { unreachable!() };
    t.idle_timeout = Some(Duration::from_millis(100));
    let p = proxy(&[closed_port().await, server], NetworkFilter::Tcp(t)).run();
    for _ in 0..3 {
        assert_eq!(p.raw("l", "").await, "hi");
    }
}

#[tokio::test]
async fn a_slow_reader_slows_the_writer() {
    let server = raw_server(|mut s, _| async move {
        let chunk = vec![b'x'; 1 << 16];
        let mut sent = 0usize;
        while let Ok(Ok(())) = tokio::time::timeout(Duration::from_millis(300), s.write_all(&chunk)).await {
            sent += chunk.len();
            assert!(sent < 64 << 20, "nothing held the writer back");
        }
    })
    .await;
    let p = proxy(&[server], tcp_filter(DB)).run();
    let mut s = p.connect("l").await;
    let mut b = [0; 16];
    s.read_exact(&mut b).await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let rest = read_all(&mut s).await;
    assert!(!rest.is_empty());
}

#[tokio::test]
async fn network_rbac_closes() {
    let server = raw_server(|mut s, _| async move {
        let _ = s.write_all(b"secret").await;
    })
    .await;
    let deny = Rbac {
        rules: Some(RbacRules {
            action: RbacAction::Deny,
            policies: [(
                "p".to_owned(),
                RbacPolicy {
                    permissions: vec![Permission::Any],
                    principals: vec![Principal::DirectRemoteIp("127.0.0.0/8".parse().unwrap())],
                },
            )]
            .into(),
        }),
        ..Rbac::default()
    };
    let p = Proxy::new()
        .cluster(cluster(DB, &[server]))
        .listener(listener(Direction::Inbound, vec![chain(vec![NetworkFilter::Rbac(deny), tcp_filter(DB)])]))
        .run();
    assert_eq!(p.raw("l", "").await, "");
}

#[tokio::test]
async fn proxy_protocol_gives_the_clients_address() {
    let up = Upstream::new("up").await;
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
    m.use_remote_address = true;
    let mut l = listener(Direction::Unspecified, vec![http_chain(m)]);
    l.proxy_protocol = true;
    let p = Proxy::new().cluster(cluster("up", &[up.address])).listener(l).run();
    let r = p.raw("l", "PROXY TCP4 1.2.3.4 5.6.7.8 1000 80\r\nGET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Envoy-Internal: true\r\nX-Forwarded-Proto: https\r\n\r\n").await;
    assert!(r.contains("x-forwarded-for: 1.2.3.4\n"), "{r}");
    assert!(r.contains("x-forwarded-proto: http\n") && !r.contains("x-envoy-internal"), "{r}");
    assert_eq!(p.raw("l", "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await, "");
}
