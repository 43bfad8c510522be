//! Sessions between clusters: slots behind a gateway, and what a gateway that cannot pass them on says.

use std::{collections::BTreeMap, net::SocketAddr};

use mesh_model::proxy::*;
use mesh_proxy::Deliveries;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    support::*,
    tls::{REVIEWS, SNI, client_side, server_side},
};

/// A gateway that leads sessions to workloads by slot.
fn gateway(workloads: &[(SocketAddr, u32)]) -> Proxy {
    configured(workloads, None).run()
}

/// The same before it has its configuration; `at` is where it will listen.
fn configured(workloads: &[(SocketAddr, u32)], at: Option<SocketAddr>) -> Proxy {
    let name = "outbound_.9080_._.reviews.books.svc.cluster.local";
    let mut c = cluster(name, &workloads.iter().map(|w| w.0).collect::<Vec<_>>());
    c.panic_threshold = 1;
    c.outlier = Some(Box::new(OutlierDetection { consecutive_gateway: 1, max_percent: 100, ..ejecting() }));
    if let Discovery::Static(a) = &mut c.discovery {
        for (e, (_, slot)) in a.localities[0].endpoints.iter_mut().zip(workloads) {
            e.slots = Slots::Serves([*slot].into());
        }
    }
    let mut chain = chain(vec![tcp_filter(name)]);
    chain.matches = FilterChainMatch {
        transport_protocol: Some(TransportProtocol::Tls),
        server_names: vec![SNI.into(), format!("*.{SNI}")],
        ..FilterChainMatch::default()
    };
    let mut l = listener(Direction::Unspecified, vec![chain]);
    l.inspect_tls = true;
    l.address = at.unwrap_or(l.address);
    Proxy::new().cluster(c).listener(l)
}

fn ejecting() -> OutlierDetection {
    OutlierDetection {
        consecutive_5xx: 0,
        consecutive_gateway: 5,
        max_percent: 100,
        ..OutlierDetection::default()
    }
}

/// A caller with endpoints behind gateways: gateway, member and slot.
fn caller(ca: &Ca, to: &[(SocketAddr, &str, u32)]) -> Proxy {
    let p = client_side(ca, to[0].0, UpstreamHttp::Auto, &["h2"], REVIEWS);
    let mut c = cluster(
        "outbound|9080||reviews.books.svc.cluster.local",
        &to.iter().map(|t| t.0).collect::<Vec<_>>(),
    );
    c.lb = LbPolicy::RoundRobin;
    c.http = UpstreamHttp::Auto;
    c.panic_threshold = 1;
    c.outlier = Some(Box::new(ejecting()));
    c.tls_matches = vec![TransportSocketMatch {
        name: "mtls".into(),
        labels: BTreeMap::new(),
        tls: Some(upstream_mtls(SNI, REVIEWS, &["h2"])),
        hbone: false,
    }];
    if let Discovery::Static(a) = &mut c.discovery {
        for (e, (_, member, slot)) in a.localities[0].endpoints.iter_mut().zip(to) {
            e.workload = format!("reviews;books;reviews;;{member}");
            e.slots = Slots::Asks(*slot);
        }
    }
    p.cluster(c)
}

fn retrying(mut p: Proxy) -> Proxy {
    let mut f = forward("outbound|9080||reviews.books.svc.cluster.local");
    f.retry = Some(Box::new(RetryPolicy {
        on: vec![RetryOn::ConnectFailure],
        attempts: 2,
        ..RetryPolicy::default()
    }));
    p = p.listener(listener(
        Direction::Outbound,
        vec![http_chain(inline(vec![vhost(&["*"], vec![route(f)])]))],
    ));
    p.run()
}

#[tokio::test]
async fn requests_spread_over_the_workloads_behind_a_gateway() {
    let ca = Ca::new();
    let mut apps = Vec::new();
    let mut sidecars = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let app = Upstream::new(name).await;
        sidecars.push(server_side(&ca, app.address, vec![], false).run());
        apps.push(app);
    }
    let workloads: Vec<_> = sidecars.iter().zip(1u32..).map(|(s, slot)| (s.address("l"), slot)).collect();
    let gateway = gateway(&workloads);
    let to: Vec<_> = (1..=4).map(|slot| (gateway.address("l"), "east", slot)).collect();
    let client = caller(&ca, &to).run();
    for _ in 0..200 {
        assert_eq!(client.get("reviews.books:9080", "/a").await.status, 200);
    }
    let counts: Vec<_> = apps.iter().map(Upstream::requests).collect();
    assert!(counts.iter().all(|n| *n == 50), "{counts:?}");
    let sessions = gateway.engine.status().connections_total;
    assert!(sessions <= 8, "{sessions} sessions for 200 requests");
}

#[tokio::test]
async fn a_gateway_without_a_backend_says_so_and_its_cluster_is_left_alone() {
    let ca = Ca::new();
    let app = Upstream::new("north").await;
    let north = server_side(&ca, app.address, vec![], false).run();
    let north = gateway(&[(north.address("l"), 9)]);
    let mut dead = Vec::new();
    for slot in 1..=6 {
        dead.push((closed_port(), slot));
    }
    let east = gateway(&dead);
    let mut to: Vec<_> = (1..=6).map(|slot| (east.address("l"), "east", slot)).collect();
    to.push((north.address("l"), "north", 9));
    let client = retrying(caller(&ca, &to));
    for n in 0..60 {
        let r = client.get("reviews.books:9080", "/a").await;
        assert_eq!(r.status, 200, "request {n}: {r:?}");
    }
    assert_eq!(app.requests(), 60);
    let asked = east.engine.status().connections_total;
    assert!(asked <= 2, "the gateway spoke for all of its slots, and was asked {asked} times");
}

#[tokio::test]
async fn an_unknown_name_is_told_to_the_caller() {
    let ca = Ca::new();
    let mut l = listener(Direction::Unspecified, vec![chain(vec![tcp_filter("other")])]);
    l.filter_chains[0].matches.server_names = vec!["other.example".into()];
    l.inspect_tls = true;
    let gateway = Proxy::new().cluster(cluster("other", &[closed_port()])).listener(l).run();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut m =
        inline(vec![vhost(&["*"], vec![route(forward("outbound|9080||reviews.books.svc.cluster.local"))])]);
    m.access_log = vec![AccessLog::File(FileLog {
        path: log.display().to_string(),
        format: AccessLogFormat::Text("%RESPONSE_FLAGS% %UPSTREAM_TRANSPORT_FAILURE_REASON%\n".into()),
        omit_empty: false,
    })];
    let p = caller(&ca, &[(gateway.address("l"), "east", 1)]);
    let p = p
        .listener(Listener { name: "logged".into(), ..listener(Direction::Outbound, vec![http_chain(m)]) })
        .run();
    let answer = p.raw("logged", "GET / HTTP/1.1\r\nHost: reviews\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    let end = tokio::time::Instant::now() + WAIT;
    loop {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        if text.contains("UF the gateway knows no such service: it is not exported there") {
            break;
        }
        assert!(tokio::time::Instant::now() < end, "{text:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// The first flight of a client that asks for `name`.
fn hello(name: &str) -> Vec<u8> {
    let config = rustls::ClientConfig::builder_with_provider(mesh_identity::crypto_provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = name.to_owned().try_into().unwrap();
    let mut client = rustls::ClientConnection::new(config.into(), name).unwrap();
    let mut out = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut out).unwrap();
    }
    out
}

/// A workload that sends back what it was sent.
async fn mirror() -> SocketAddr {
    raw_server(|mut s, _| async move {
        let mut seen = vec![];
        s.read_to_end(&mut seen).await.unwrap();
        s.write_all(&seen).await.unwrap();
    })
    .await
}

/// What is heard on a session that says something.
async fn deliver(to: Deliveries, at: SocketAddr, said: &[u8]) -> Vec<u8> {
    let (mut own, other) = tokio::io::duplex(64 * 1024);
    let peer = "203.0.113.9:15443".parse().unwrap();
    to.deliver(at, peer, Box::new(other)).await.unwrap();
    // Where nothing listens the stream is closed already.
    let _ = own.write_all(said).await;
    let _ = own.shutdown().await;
    let mut heard = vec![];
    own.read_to_end(&mut heard).await.unwrap();
    heard
}

/// Whoever knows the address may come before the configuration does.
#[tokio::test]
async fn a_session_waits_for_the_listener_of_an_engine_that_starts() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let g = configured(&[(mirror().await, 7)], Some(free));
    let known = hello(SNI);
    let (early, said) = (g.engine.deliveries(), known.clone());
    let session = tokio::spawn(async move { deliver(early, free, &said).await });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!session.is_finished(), "it was dropped");
    let _g = g.run();
    assert_eq!(session.await.unwrap(), known);
}

#[tokio::test]
async fn a_session_that_came_by_another_way_meets_the_same_chains() {
    let g = gateway(&[(mirror().await, 7)]);
    let at = g.address("l");
    let deliver = async |at, said: &[u8]| deliver(g.engine.deliveries(), at, said).await;
    let known = hello(SNI);
    assert_eq!(deliver(at, &known).await, known);
    let alert = [21, 3, 3, 0, 2, 2, 112];
    assert_eq!(deliver(at, &hello("unknown.test")).await, alert);
    let elsewhere = SocketAddr::new(at.ip(), at.port() ^ 1);
    assert!(deliver(elsewhere, &known).await.is_empty());
    assert_eq!(g.engine.status().connections_total, 2);
}
