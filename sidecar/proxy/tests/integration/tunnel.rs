//! Connections as streams of a shared one, between two of our proxies.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_model::proxy::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

const DB: &str = "outbound|3306||db.books.svc.cluster.local";
const SERVER: &str = "spiffe://mesh.local/ns/books/sa/ratings";
const CLIENT: &str = "spiffe://mesh.local/ns/books/sa/reviews";

/// A connection manager that ends CONNECT streams and sends them to `cluster`.
fn terminating(cluster: &str) -> HttpConnectionManager {
    let mut r = route(Forward { connect: true, ..forward(cluster) });
    r.matches.path = PathMatch::Connect;
    HttpConnectionManager { filters: vec![], ..inline(vec![vhost(&["*"], vec![r])]) }
}

/// A proxy that ends tunnels of mutual TLS; `filters` of the connection manager.
fn server(ca: &Ca, upstream: SocketAddr, filters: Vec<HttpFilter>) -> Proxy {
    let m = HttpConnectionManager { filters, ..terminating("db") };
    let mut c = http_chain(m);
    c.tls = Some(downstream_mtls());
    let p = Proxy::new().cluster(cluster("db", &[upstream])).listener(listener(Direction::Inbound, vec![c]));
    ca.enroll(&p.secrets, "west", SERVER);
    p.run()
}

fn client(ca: &Ca, to: SocketAddr, idle: Option<Duration>) -> Proxy {
    let mut c = cluster(DB, &[to]);
    c.tls = Some(Box::new(upstream_mtls("", SERVER, &["h2"])));
    c.http = UpstreamHttp::Http2;
    let tunnel = Some(Tunneling {
        hostname: "db.local:3306".into(),
        headers: vec![("x-a".into(), "b".into())],
        post: false,
    });
    let NetworkFilter::Tcp(t) = tcp_filter(DB) else { unreachable!() };
    let t = NetworkFilter::Tcp(TcpProxy { tunnel, idle_timeout: idle, ..t });
    let p = Proxy::new().cluster(c).listener(listener(Direction::Outbound, vec![chain(vec![t])]));
    ca.enroll(&p.secrets, "west", CLIENT);
    p.run()
}

fn rbac(action: RbacAction, principal: &str) -> HttpFilter {
    let policy = RbacPolicy {
        permissions: vec![Permission::Any],
        principals: vec![Principal::Authenticated(Some(StringMatch::exact(principal)))],
    };
    let rules = RbacRules { action, policies: [("p".to_owned(), policy)].into() };
    HttpFilter::Rbac(Rbac { rules: Some(rules), ..Rbac::default() })
}

async fn counting() -> SocketAddr {
    raw_server(|mut s, _| async move {
        let got = read_all(&mut s).await;
        let _ = s.write_all(format!("got {}", got.len()).as_bytes()).await;
    })
    .await
}

#[tokio::test]
async fn many_connections_share_one_with_half_close_and_metrics() {
    let ca = Ca::new();
    let s = server(&ca, counting().await, vec![rbac(RbacAction::Allow, CLIENT)]);
    let c = client(&ca, s.address("l"), None);
    let all = (0..50).map(|n| c.raw_half("x".repeat(n * 5000)));
    for (n, r) in futures::future::join_all(all).await.into_iter().enumerate() {
        assert_eq!(r, format!("got {}", n * 5000));
    }
    assert_eq!(s.engine.status().connections_total, 1, "one connection carries them all");
    let end = tokio::time::Instant::now() + WAIT;
    while c.engine.status().clusters[DB].requests > 0 {
        assert!(tokio::time::Instant::now() < end, "limits count what is open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    c.metric(&["istio_tcp_connections_closed_total", "reporter=\"source\"", "} 50"]).await;
    s.metric(&[
        "istio_tcp_connections_closed_total",
        "source_principal=\"spiffe://mesh.local/ns/books/sa/reviews\"",
        "} 50",
    ])
    .await;
    s.metric(&["istio_tcp_received_bytes_total", "reporter=\"destination\"", "} 6125000"]).await;
    c.metric(&[
        "istio_tcp_received_bytes_total",
        &format!("destination_principal=\"{SERVER}\""),
        "} 6125000",
    ])
    .await;
}

#[tokio::test]
async fn the_peers_identity_is_asked_for() {
    let ca = Ca::new();
    let s = server(&ca, counting().await, vec![rbac(RbacAction::Deny, CLIENT)]);
    let c = client(&ca, s.address("l"), None);
    assert_eq!(c.raw_half("x".into()).await, "");
}

#[tokio::test]
async fn a_server_that_refuses_ends_the_connection() {
    let ca = Ca::new();
    let s = server(&ca, closed_port(), vec![]);
    let c = client(&ca, s.address("l"), None);
    assert_eq!(c.raw_half("x".into()).await, "");
    let gone = client(&ca, closed_port(), None);
    assert_eq!(gone.raw_half("x".into()).await, "");
}

#[tokio::test]
async fn a_server_that_speaks_first_and_a_reset_from_it() {
    let ca = Ca::new();
    let up = raw_server(|mut s, _| async move {
        s.write_all(b"220 ready\r\n").await.unwrap();
        let mut b = [0; 4];
        let _ = s.read_exact(&mut b).await;
        let _ = socket2::SockRef::from(&s).set_linger(Some(Duration::ZERO));
    })
    .await;
    let s = server(&ca, up, vec![]);
    let c = client(&ca, s.address("l"), None);
    let mut conn = c.connect("l").await;
    assert_eq!(read_until(&mut conn, "\n").await, "220 ready\r\n");
    conn.write_all(b"quit").await.unwrap();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(WAIT, conn.read_to_end(&mut rest)).await.expect("it ends");
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_slow_reader_slows_the_writer_and_nobody_else() {
    let ca = Ca::new();
    let up = raw_server(|mut s, n| async move {
        if n > 0 {
            let got = read_all(&mut s).await;
            let _ = s.write_all(got.as_bytes()).await;
            return;
        }
        let chunk = vec![b'x'; 1 << 16];
        let mut sent = 0usize;
        while let Ok(Ok(())) = tokio::time::timeout(Duration::from_millis(300), s.write_all(&chunk)).await {
            sent += chunk.len();
            assert!(sent < 64 << 20, "nothing held the writer back");
        }
    })
    .await;
    let s = server(&ca, up, vec![]);
    let c = client(&ca, s.address("l"), None);
    let mut slow = c.connect("l").await;
    let mut b = [0; 16];
    slow.read_exact(&mut b).await.unwrap();
    let data = "y".repeat(3 << 20);
    assert!(c.raw_half(data.clone()).await == data, "another stream of the connection");
    let rest = read_all(&mut slow).await;
    assert!(rest.len() > 100_000);
}

#[tokio::test]
async fn idle_tunnels_are_closed() {
    let ca = Ca::new();
    let up = raw_server(|mut s, _| async move {
        s.write_all(b"hi").await.unwrap();
        let _ = read_all(&mut s).await;
    })
    .await;
    let s = server(&ca, up, vec![]);
    let c = client(&ca, s.address("l"), Some(Duration::from_millis(100)));
    assert_eq!(c.raw("l", "").await, "hi");
}

/// A proxy whose inbound listener is reached through a tunnel only, as pilot makes it for HBONE; the port of the
/// tunnels is not the well-known one.
fn hbone(ca: &Ca, chains: Vec<FilterChain>, clusters: Vec<Cluster>, own: &str) -> Proxy {
    let mut inner = listener(Direction::Inbound, chains);
    inner.name = "virtualInbound".into();
    inner.bind_to_port = false;
    inner.address = "0.0.0.0:15006".parse().unwrap();
    let mut to = cluster("hbone", &["127.0.0.1:1".parse().unwrap()]);
    if let Discovery::Static(a) = &mut to.discovery {
        a.localities[0].endpoints[0].address = "internal:virtualInbound".into();
    }
    let mut m = terminating("hbone");
    if let RouteSource::Inline(r) = &m.routes {
        let mut r = RouteConfiguration::clone(r);
        r.virtual_hosts[0].domains = vec![own.into()];
        m.routes = RouteSource::Inline(Arc::new(r));
    }
    let mut outer = http_chain(m);
    outer.tls = Some(downstream_mtls());
    let mut p = Proxy::new().cluster(to).listener(inner).listener(listener(Direction::Inbound, vec![outer]));
    for c in clusters {
        p = p.cluster(c);
    }
    ca.enroll(&p.secrets, "west", SERVER);
    p.run()
}

/// Makes the client's tunnels lead to `authority`.
fn lead(c: &Proxy, authority: &str) {
    let mut snap = c.snap.clone();
    let NetworkFilter::Tcp(t) = tcp_filter(DB) else { unreachable!() };
    let tunnel = Some(Tunneling { hostname: authority.into(), headers: vec![], post: false });
    let l = listener(Direction::Outbound, vec![chain(vec![NetworkFilter::Tcp(TcpProxy { tunnel, ..t })])]);
    snap.listeners.insert("l".into(), Arc::new(l));
    assert_eq!(c.engine.apply(snap).rejected, []);
}

#[tokio::test]
async fn a_tunnel_is_served_by_the_listener_that_it_leads_to() {
    let ca = Ca::new();
    let web = Upstream::new("web").await;
    let at = |port, filters| FilterChain {
        matches: FilterChainMatch { destination_port: Some(port), ..FilterChainMatch::default() },
        tls: Some(downstream_mtls()),
        ..chain(filters)
    };
    let HttpFilter::Rbac(deny) = rbac(RbacAction::Deny, CLIENT) else { unreachable!() };
    let mut http = inline(vec![vhost(&["*"], vec![route(forward("web"))])]);
    http.filters = vec![rbac(RbacAction::Allow, CLIENT)];
    let s = hbone(
        &ca,
        vec![
            at(3306, vec![tcp_filter("db")]),
            at(3307, vec![NetworkFilter::Rbac(deny), tcp_filter("db")]),
            at(8080, vec![NetworkFilter::Http(Box::new(http))]),
        ],
        vec![cluster("db", &[counting().await]), cluster("web", &[web.address])],
        "10.0.0.1:*",
    );
    let c = client(&ca, s.address("l"), None);
    for (authority, answer) in [
        ("10.0.0.1:3306", "got 3"),
        // Denied by the port's own rules.
        ("10.0.0.1:3307", ""),
        // Not an address of this workload.
        ("10.0.0.2:3306", ""),
        ("localhost:3306", ""),
        // No chain.
        ("10.0.0.1:99", ""),
    ] {
        lead(&c, authority);
        assert_eq!(c.raw_half("abc".into()).await, answer, "{authority}");
    }
    lead(&c, "10.0.0.1:8080");
    let r = c.raw("l", "GET /a HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await;
    let r = Response::parse(&r);
    assert_eq!(r.status, 200, "{}", r.head);
    assert!(r.body.contains("x-forwarded-client-cert") && r.body.contains(CLIENT), "{}", r.body);
    s.metric(&[
        "istio_requests_total",
        "reporter=\"destination\"",
        "source_workload=\"reviews\"",
        "mutual_tls",
    ])
    .await;
}

/// A server whose chain says in the handshake that it takes tunnels, or not, and a client that offers them.
fn agreeing(ca: &Ca, alpn: &[&str], upstream: SocketAddr, rules: Vec<NetworkFilter>) -> (Proxy, Proxy) {
    let mut c = chain([rules, vec![tcp_filter("db")]].concat());
    let alpn = alpn.iter().map(|s| (*s).to_owned()).collect();
    c.tls = Some(DownstreamTls { alpn, ..downstream_mtls() });
    let s = Proxy::new().cluster(cluster("db", &[upstream])).listener(listener(Direction::Inbound, vec![c]));
    ca.enroll(&s.secrets, "west", SERVER);
    let s = s.run();
    let mut c = cluster(DB, &[s.address("l")]);
    c.tls = Some(Box::new(upstream_mtls("", SERVER, &[TUNNEL_ALPN, "istio"])));
    c.limits.max_connections = 20;
    let p =
        Proxy::new().cluster(c).listener(listener(Direction::Outbound, vec![chain(vec![tcp_filter(DB)])]));
    ca.enroll(&p.secrets, "west", CLIENT);
    (s, p.run())
}

#[tokio::test]
async fn a_session_is_shared_if_both_sides_know_how() {
    let ca = Ca::new();
    for (alpn, connections) in [(&[TUNNEL_ALPN, "istio"][..], 1 + 20), (&["istio"], 20), (&[], 20)] {
        let (s, c) = agreeing(&ca, alpn, counting().await, vec![]);
        // As many as the limit allows: what carries them does not count.
        let all = (0..20).map(|n| c.raw_half("x".repeat(n * 100)));
        for (n, r) in futures::future::join_all(all).await.into_iter().enumerate() {
            assert_eq!(r, format!("got {}", n * 100), "{alpn:?}");
        }
        assert_eq!(s.engine.status().connections_total, connections, "{alpn:?}");
        s.metric(&["istio_tcp_connections_closed_total", "source_workload=\"reviews\"", "} 20"]).await;
        c.metric(&["istio_tcp_connections_closed_total", "reporter=\"source\"", "} 20"]).await;
    }
    let HttpFilter::Rbac(deny) = rbac(RbacAction::Deny, CLIENT) else { unreachable!() };
    let (_s, c) = agreeing(&ca, &[TUNNEL_ALPN], counting().await, vec![NetworkFilter::Rbac(deny)]);
    assert_eq!(c.raw_half("x".into()).await, "");
}

/// An authoriser that changes its mind is heard at the next connection, whatever carries that.
#[tokio::test]
async fn each_connection_of_a_session_is_asked_about() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let ca = Ca::new();
    let asked = std::sync::Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let authz = crate::ext_authz::server(move |_| {
        let yes = count.fetch_add(1, Ordering::SeqCst) < 2;
        crate::ext_authz::grpc(&crate::ext_authz::field(1, if yes { &[] } else { &[8, 7] }))
    })
    .await;
    let ask = NetworkFilter::Authz(ConnectionAuthz {
        stat_prefix: "a".into(),
        service: GrpcService {
            cluster: "authz".into(),
            timeout: Some(std::time::Duration::from_secs(2)),
            ..GrpcService::default()
        },
        failure_mode_allow: false,
        include_tls_session: false,
        enabled_metadata: None,
    });
    let mut c = chain(vec![ask, tcp_filter("db")]);
    c.tls =
        Some(DownstreamTls { alpn: vec![TUNNEL_ALPN.to_owned(), "istio".to_owned()], ..downstream_mtls() });
    let s = Proxy::new()
        .cluster(cluster("db", &[counting().await]))
        .cluster(Cluster { http: UpstreamHttp::Http2, ..cluster("authz", &[authz]) })
        .listener(listener(Direction::Inbound, vec![c]));
    ca.enroll(&s.secrets, "west", SERVER);
    let s = s.run();
    let mut c = cluster(DB, &[s.address("l")]);
    c.tls = Some(Box::new(upstream_mtls("", SERVER, &[TUNNEL_ALPN, "istio"])));
    let p =
        Proxy::new().cluster(c).listener(listener(Direction::Outbound, vec![chain(vec![tcp_filter(DB)])]));
    ca.enroll(&p.secrets, "west", CLIENT);
    let p = p.run();
    for answer in ["got 1", "got 1", "", ""] {
        assert_eq!(p.raw_half("x".into()).await, answer);
    }
    assert!(asked.load(Ordering::SeqCst) >= 4);
    s.metric(&["istio_tcp_connections_closed_total", "source_workload=\"reviews\"", "} 2"]).await;
}

/// A proxy of the engine whose connections go through the forward proxy at `to`.
fn through(to: SocketAddr, post: bool) -> Proxy {
    let NetworkFilter::Tcp(t) = tcp_filter("proxy") else { unreachable!() };
    let tunnel = Some(Tunneling {
        hostname: "db.example:3306".into(),
        headers: vec![("x-a".into(), "b".into())],
        post,
    });
    Proxy::new()
        .cluster(cluster("proxy", &[to]))
        .listener(listener(
            Direction::Outbound,
            vec![chain(vec![NetworkFilter::Tcp(TcpProxy { tunnel, ..t })])],
        ))
        .run()
}

#[tokio::test]
async fn a_forward_proxy_of_http1_is_asked_to_connect() {
    let forward_proxy = raw_server(|mut s, n| async move {
        let head = read_until(&mut s, "\r\n\r\n").await;
        assert!(head.starts_with("CONNECT db.example:3306 HTTP/1.1\r\nhost: db.example:3306\r\n"), "{head}");
        assert!(head.contains("x-a: b\r\n"), "{head}");
        if n > 0 {
            let _ = s.write_all(b"HTTP/1.1 403 no\r\ncontent-length: 2\r\n\r\nno").await;
            return;
        }
        // The database speaks first, in the same segment as the proxy.
        s.write_all(b"HTTP/1.1 200 Connection established\r\n\r\nhello ").await.unwrap();
        let got = read_all(&mut s).await;
        s.write_all(format!("got {got}").as_bytes()).await.unwrap();
    })
    .await;
    let p = through(forward_proxy, false);
    assert_eq!(p.raw_half("abc".into()).await, "hello got abc");
    assert_eq!(p.raw_half("abc".into()).await, "", "refused");
}

#[tokio::test]
async fn a_tunnel_may_be_the_bodies_of_a_post() {
    let forward_proxy = raw_server(|mut s, _| async move {
        let head = read_until(&mut s, "\r\n\r\n").await;
        assert!(head.starts_with("POST / HTTP/1.1\r\nhost: db.example:3306\r\n"), "{head}");
        assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
        s.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\nhello \r\n").await.unwrap();
        let (_, body) = head.split_once("\r\n\r\n").unwrap();
        let mut got = body.to_owned();
        while !got.ends_with("0\r\n\r\n") {
            got += &read_until(&mut s, "\r\n").await;
        }
        assert_eq!(got, "3\r\nabc\r\n0\r\n\r\n");
        s.write_all(b"3\r\nbye\r\n0\r\n\r\n").await.unwrap();
    })
    .await;
    assert_eq!(through(forward_proxy, true).raw_half("abc".into()).await, "hello bye");
}
