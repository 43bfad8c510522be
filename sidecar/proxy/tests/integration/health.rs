//! Active health checks of servers that turn bad and good again.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use http_body_util::BodyExt as _;
use mesh_model::proxy::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::support::*;

fn check(kind: HealthCheckKind) -> Box<HealthCheck> {
    let ms = Duration::from_millis;
    Box::new(HealthCheck {
        kind,
        timeout: ms(500),
        intervals: HealthIntervals {
            healthy: ms(20),
            unhealthy: ms(20),
            failing: ms(20),
            recovering: ms(20),
            no_traffic: ms(20),
            no_traffic_healthy: ms(20),
        },
        initial_jitter: ms(0),
        interval_jitter: ms(0),
        interval_jitter_percent: 0,
        unhealthy_threshold: 2,
        healthy_threshold: 2,
        reuse_connection: true,
        alt_port: 0,
        ignore_new_hosts: false,
    })
}

fn http_check() -> HttpHealthCheck {
    HttpHealthCheck {
        host: "check.example".into(),
        path: "/live".into(),
        method: "GET".into(),
        http2: false,
        headers: vec![("x-check".into(), "1".into())],
        expected: vec![(200, 201)],
        retriable: vec![],
        service_name: None,
    }
}

fn proxy(c: Cluster) -> Proxy {
    Proxy::new()
        .cluster(c)
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("c"))])]))],
        ))
        .run()
}

fn flags(p: &Proxy, host: usize) -> String {
    p.engine.status().clusters["c"].hosts[host].health_flags.clone()
}

async fn until_flags(p: &Proxy, host: usize, want: &str) {
    let end = Instant::now() + WAIT;
    while flags(p, host) != want {
        assert!(Instant::now() < end, "{} instead of {want}", flags(p, host));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A server whose `/live` answers with a status that tests change, and notes what it was asked; with `grpc` it is
/// `grpc.health.v1.Health` in which the number is the state.
struct Server {
    address: SocketAddr,
    state: Arc<AtomicU16>,
    extra: Arc<Mutex<Option<&'static str>>>,
    asked: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicU16>,
}

impl Server {
    async fn new(name: &'static str, state: u16) -> Self {
        let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self {
            address: l.local_addr().unwrap(),
            state: Arc::new(AtomicU16::new(state)),
            extra: Arc::default(),
            asked: Arc::default(),
            connections: Arc::default(),
        };
        let (state, extra, asked) = (this.state.clone(), this.extra.clone(), this.asked.clone());
        let connections = this.connections.clone();
        tokio::spawn(async move {
            loop {
                let (s, _) = l.accept().await.unwrap();
                connections.fetch_add(1, Ordering::SeqCst);
                let (state, extra, asked) = (state.clone(), extra.clone(), asked.clone());
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |req| {
                        answer(name, req, state.clone(), extra.clone(), asked.clone())
                    });
                    let _ =
                        hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new())
                            .serve_connection(hyper_util::rt::TokioIo::new(s), service)
                            .await;
                });
            }
        });
        this
    }

    fn set(&self, state: u16) {
        self.state.store(state, Ordering::SeqCst);
    }
}

type Body = http_body_util::combinators::BoxBody<bytes::Bytes, Infallible>;

async fn answer(
    name: &'static str,
    req: hyper::Request<hyper::body::Incoming>,
    state: Arc<AtomicU16>,
    extra: Arc<Mutex<Option<&'static str>>>,
    asked: Arc<Mutex<Vec<String>>>,
) -> Result<hyper::Response<Body>, Infallible> {
    let path = req.uri().path().to_owned();
    let state = state.load(Ordering::SeqCst);
    let mut r = hyper::Response::builder();
    if let Some(name) = *extra.lock().unwrap() {
        r = r.header(name, "true");
    }
    if path == "/grpc.health.v1.Health/Check" {
        let text = format!("{:?} {:?}", req.uri().authority(), req.headers());
        let body = req.into_body().collect().await.unwrap().to_bytes();
        asked.lock().unwrap().push(format!("{text} {body:?}"));
        let mut t = hyper::HeaderMap::new();
        t.insert("grpc-status", if state == 99 { "12" } else { "0" }.parse().unwrap());
        let message = bytes::Bytes::from(vec![0, 0, 0, 0, 2, 8, state as u8]);
        let frames = [Ok(hyper::body::Frame::data(message)), Ok(hyper::body::Frame::trailers(t))];
        let body = http_body_util::StreamBody::new(futures::stream::iter(frames)).boxed();
        return Ok(r.header("content-type", "application/grpc").body(body).unwrap());
    }
    if path == "/live" {
        asked.lock().unwrap().push(format!("{} {:?}", req.method(), req.headers()));
        return Ok(r.status(state).body(full("live")).unwrap());
    }
    Ok(r.body(full(name)).unwrap())
}

#[tokio::test]
async fn http_checks_take_hosts_out_and_back() {
    let (a, b) = (Server::new("a", 200).await, Server::new("b", 200).await);
    let mut c = cluster("c", &[a.address, b.address]);
    c.health = Some(check(HealthCheckKind::Http(http_check())));
    let p = proxy(c);
    until_flags(&p, 0, "healthy").await;
    until_flags(&p, 1, "healthy").await;
    {
        let asked = b.asked.lock().unwrap();
        let first = &asked[0];
        for part in ["GET", "\"host\": \"check.example\"", "Envoy/HC", "\"x-check\": \"1\""] {
            assert!(first.contains(part), "{first}");
        }
    }
    b.set(503);
    until_flags(&p, 1, "/failed_active_hc").await;
    for _ in 0..10 {
        assert_eq!(p.get("x", "/").await.body, "a");
    }
    assert!(b.connections.load(Ordering::SeqCst) < 5, "checks share a connection");
    b.set(200);
    until_flags(&p, 1, "healthy").await;
    let bodies: Vec<_> = futures::future::join_all((0..10).map(|_| p.get("x", "/"))).await;
    assert!(bodies.iter().any(|r| r.body == "b"));
    // Degraded: used for what is left.
    *b.extra.lock().unwrap() = Some("x-envoy-degraded");
    until_flags(&p, 1, "/degraded_active_hc").await;
    for name in ["attempt", "success", "failure"] {
        let line = p.metric(&[&format!("envoy_cluster_health_check_{name}_total"), "\"c\""]).await;
        assert!(!line.ends_with(" 0"), "{line}");
    }
    p.metric(&["envoy_cluster_health_check_healthy{envoy_cluster_name=\"c\"} 1"]).await;
    p.metric(&["envoy_cluster_health_check_degraded{envoy_cluster_name=\"c\"} 1"]).await;
}

#[tokio::test]
async fn an_answer_to_traffic_takes_its_host_out() {
    let (a, b) = (Server::new("a", 200).await, Server::new("b", 200).await);
    let mut c = cluster("c", &[a.address, b.address]);
    let mut h = check(HealthCheckKind::Http(http_check()));
    // No check comes between.
    h.intervals.healthy = Duration::from_secs(60);
    h.intervals.no_traffic_healthy = Duration::from_secs(60);
    c.health = Some(h);
    let p = proxy(c);
    until_flags(&p, 0, "healthy").await;
    until_flags(&p, 1, "healthy").await;
    *b.extra.lock().unwrap() = Some("x-envoy-immediate-health-check-fail");
    let end = Instant::now() + WAIT;
    while flags(&p, 1) == "healthy" {
        assert!(Instant::now() < end);
        p.get("x", "/").await;
    }
    assert_eq!(flags(&p, 1), "/failed_active_hc/excluded_via_immediate_hc_fail");
    for _ in 0..6 {
        assert_eq!(p.get("x", "/").await.body, "a");
    }
    p.metric(&["envoy_cluster_health_check_passive_failure_total{", "} 1"]).await;
}

#[tokio::test]
async fn new_hosts_wait_for_their_first_check() {
    let bad = Server::new("bad", 500).await;
    let mut c = cluster("c", &[bad.address]);
    c.health = Some(check(HealthCheckKind::Http(http_check())));
    let p = proxy(c.clone());
    assert_eq!(flags(&p, 0), "/failed_active_hc");
    p.engine.warmed(WAIT).await;
    assert_eq!(p.get("x", "/").await.status, 503, "no healthy upstream");
    bad.set(200);
    until_flags(&p, 0, "healthy").await;
    assert_eq!(p.get("x", "/").await.body, "bad");
    // Hosts that stay keep what was found, whatever else changes; what is no longer checked is healthy.
    let mut p = p;
    c.connect_timeout = Duration::from_secs(3);
    p.snap.clusters.insert("c".into(), Arc::new(c.clone()));
    assert_eq!(p.apply().rejected, []);
    assert_eq!(flags(&p, 0), "healthy");
    bad.set(500);
    until_flags(&p, 0, "/failed_active_hc").await;
    c.health = None;
    p.snap.clusters.insert("c".into(), Arc::new(c));
    assert_eq!(p.apply().rejected, []);
    assert_eq!(flags(&p, 0), "healthy");
}

#[tokio::test]
async fn panic_ignores_checks_and_endpoints_may_opt_out() {
    let (a, b) = (Server::new("a", 500).await, Server::new("b", 500).await);
    let mut c = cluster("c", &[a.address, b.address]);
    c.panic_threshold = 50;
    c.health = Some(check(HealthCheckKind::Http(http_check())));
    let p = proxy(c.clone());
    p.engine.warmed(WAIT).await;
    let seen = futures::future::join_all((0..20).map(|_| p.get("x", "/"))).await;
    assert!(["a", "b"].iter().all(|n| seen.iter().any(|r| r.body == *n)), "both are used: {seen:?}");
    // A check at another port, and one not at all.
    let good = Server::new("good", 200).await;
    let Discovery::Static(mut l) = c.discovery else { panic!() };
    let nothing = EndpointCheck { port: 0, hostname: String::new(), address: String::new(), disabled: false };
    l.localities[0].endpoints[0].check = Some(Box::new(EndpointCheck {
        port: good.address.port(),
        hostname: "own.example".into(),
        ..nothing.clone()
    }));
    l.localities[0].endpoints[1].check = Some(Box::new(EndpointCheck { disabled: true, ..nothing }));
    c.discovery = Discovery::Static(l);
    let p = proxy(c);
    until_flags(&p, 0, "healthy").await;
    assert_eq!(flags(&p, 1), "healthy");
    assert!(good.asked.lock().unwrap()[0].contains("own.example"));
}

#[tokio::test]
async fn grpc_checks() {
    const SERVING: u16 = 1;
    let (a, b) = (Server::new("a", SERVING).await, Server::new("b", SERVING).await);
    let mut c = cluster("c", &[a.address, b.address]);
    c.http = UpstreamHttp::Http2;
    c.health = Some(check(HealthCheckKind::Grpc(GrpcHealthCheck {
        service_name: "books.Reviews".into(),
        authority: "check.example".into(),
        headers: vec![],
    })));
    let p = proxy(c.clone());
    until_flags(&p, 0, "healthy").await;
    until_flags(&p, 1, "healthy").await;
    let first = a.asked.lock().unwrap()[0].clone();
    for part in ["check.example", "application/grpc", "trailers", "\\0\\0\\0\\0\\x0f\\n\\rbooks.Reviews"] {
        assert!(first.contains(part), "{part} in {first}");
    }
    // NOT_SERVING, and a server that does not know the service.
    for bad in [2, 99] {
        b.set(bad);
        until_flags(&p, 1, "/failed_active_hc").await;
        assert_eq!(p.get("x", "/").await.body, "a");
        b.set(SERVING);
        until_flags(&p, 1, "healthy").await;
    }
    assert!(b.connections.load(Ordering::SeqCst) < 5, "checks share a connection");
    c.http = UpstreamHttp::Http1;
    let p = Proxy::new().cluster(c);
    assert!(p.apply().rejected[0].2.contains("gRPC health check needs"), "{:?}", p.apply());
}

#[tokio::test]
async fn tcp_checks_and_connections_that_end_with_their_host() {
    let good = Arc::new(AtomicU16::new(1));
    let state = good.clone();
    let a = raw_server(move |mut s, _| {
        let state = state.clone();
        async move {
            let mut buf = [0; 64];
            while let Ok(n @ 1..) = s.read(&mut buf).await {
                let pong = state.load(Ordering::SeqCst) == 1;
                let text: &[u8] = match &buf[..n] {
                    b"PING" if pong => b"+PO-NG\r\n",
                    b"PING" => b"-ERR\r\n",
                    other => other,
                };
                if s.write_all(text).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    let mut c = cluster("c", &[a]);
    c.close_on_health_failure = true;
    let mut h = check(HealthCheckKind::Tcp(TcpHealthCheck {
        send: b"PING".to_vec(),
        receive: vec![b"PO".to_vec(), b"NG".to_vec()],
    }));
    h.timeout = Duration::from_millis(100);
    c.health = Some(h);
    let p = Proxy::new()
        .cluster(c)
        .listener(listener(Direction::Outbound, vec![chain(vec![tcp_filter("c")])]))
        .run();
    until_flags(&p, 0, "healthy").await;
    let mut long = p.connect("l").await;
    long.write_all(b"hello").await.unwrap();
    assert_eq!(read_until(&mut long, "hello").await, "hello");
    good.store(0, Ordering::SeqCst);
    until_flags(&p, 0, "/failed_active_hc").await;
    assert_eq!(read_all(&mut long).await, "", "the connection ends with its host");
    good.store(1, Ordering::SeqCst);
    until_flags(&p, 0, "healthy").await;

    // Connect only: a port that nobody listens at.
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut c = cluster("c", &[l.local_addr().unwrap()]);
    c.health = Some(check(HealthCheckKind::Tcp(TcpHealthCheck { send: vec![], receive: vec![] })));
    let p = proxy(c);
    until_flags(&p, 0, "healthy").await;
    drop(l);
    until_flags(&p, 0, "/failed_active_hc").await;
    p.metric(&["envoy_cluster_health_check_network_failure_total"]).await;
}
