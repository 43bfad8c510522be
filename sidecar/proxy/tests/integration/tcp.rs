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
    let p = proxy(&[closed_port(), server], NetworkFilter::Tcp(t)).run();
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

/// What a server receives on its `n`th connection.
async fn recorder() -> (std::net::SocketAddr, tokio::sync::mpsc::UnboundedReceiver<Vec<u8>>) {
    let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
    let a = raw_server(move |mut s, _| {
        let tx = tx.clone();
        async move {
            let mut got = vec![0; 4096];
            let mut n = 0;
            // The header and the rest may come apart. One of version 2 begins with what ends a request.
            let is_end = |w: &[u8], v2: bool| w == b"done" || (w == b"\r\n\r\n" && !v2);
            while !got[..n].windows(4).any(|w| is_end(w, got[0] == b'\r')) {
                match s.read(&mut got[n..]).await {
                    Ok(m) if m > 0 => n += m,
                    _ => break,
                }
            }
            got.truncate(n);
            let _ = tx.send(got);
            let _ = s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            let _ = read_all(&mut s).await;
        }
    })
    .await;
    (a, rx)
}

#[tokio::test]
async fn an_endpoint_is_told_who_the_client_is() {
    let (server, mut seen) = recorder().await;
    for version in [ProxyProtocolVersion::V1, ProxyProtocolVersion::V2] {
        let mut c = cluster(DB, &[server]);
        c.proxy_protocol = Some(version);
        let p = Proxy::new()
            .cluster(c)
            .listener(listener(Direction::Outbound, vec![chain(vec![tcp_filter(DB)])]))
            .run();
        let mut s = p.connect("l").await;
        s.write_all(b"done").await.unwrap();
        let got = seen.recv().await.unwrap();
        let (client, at) = (s.local_addr().unwrap(), p.address("l"));
        let want = match version {
            ProxyProtocolVersion::V1 => {
                format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\ndone", client.port(), at.port()).into_bytes()
            }
            ProxyProtocolVersion::V2 => [
                &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01"[..],
                &client.port().to_be_bytes(),
                &at.port().to_be_bytes(),
                b"done",
            ]
            .concat(),
        };
        assert_eq!(got, want);
    }
}

#[tokio::test]
async fn a_connection_that_names_its_client_serves_no_other() {
    let (server, mut seen) = recorder().await;
    let mut c = cluster("up", &[server]);
    c.proxy_protocol = Some(ProxyProtocolVersion::V1);
    let p = Proxy::new()
        .cluster(c)
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
        ))
        .run();
    for _ in 0..2 {
        let mut s = p.connect("l").await;
        s.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert!(read_until(&mut s, "ok").await.starts_with("HTTP/1.1 200"));
        let got = String::from_utf8(seen.recv().await.unwrap()).unwrap();
        let line = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} ", s.local_addr().unwrap().port());
        assert!(got.starts_with(&line) && got.contains("\r\nGET / HTTP/1.1\r\n"), "{got}");
    }
    // What cannot be is refused by name.
    let mut c = cluster("up", &[server]);
    c.proxy_protocol = Some(ProxyProtocolVersion::V2);
    c.http = UpstreamHttp::Http2;
    let report = Proxy::new().cluster(c).apply();
    assert!(report.rejected[0].2.contains("PROXY protocol"), "{report:?}");
}
