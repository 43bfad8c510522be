//! Rate limits, counted here and elsewhere.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use hyper::Response as Raw;
use mesh_model::proxy::*;
use tokio::io::AsyncReadExt as _;

use crate::{
    ext_authz::{field, grpc, server},
    support::*,
};

fn bucket(max_tokens: u32) -> TokenBucket {
    // An hour: no token comes while a test runs.
    TokenBucket { max_tokens, tokens_per_fill: max_tokens.max(1), fill_interval: Duration::from_secs(3600) }
}

fn local(max_tokens: u32) -> LocalRateLimit {
    LocalRateLimit { bucket: Some(bucket(max_tokens)), ..LocalRateLimit::default() }
}

fn proxy(up: &Upstream, f: HttpFilter, routes: Vec<Route>) -> Proxy {
    let mut m = inline(vec![vhost(&["*"], routes)]);
    m.filters = vec![f];
    Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(Direction::Inbound, vec![http_chain(m)]))
}

fn at(path: &str, filters: RouteFilters) -> Route {
    let mut r = route(forward("up"));
    r.matches.path = PathMatch::Prefix(path.into());
    r.filters = filters.into();
    r
}

async fn passed(p: &Proxy, n: usize, path: &str, headers: &str) -> usize {
    let mut ok = 0;
    for _ in 0..n {
        ok += usize::from(p.send("h", path, headers).await.status == 200);
    }
    ok
}

#[tokio::test]
async fn local_limits_of_filter_and_route() {
    let up = Upstream::new("up").await;
    let f = LocalRateLimit {
        x_ratelimit_headers: true,
        retry_after: true,
        response_headers: HeaderOps { add: vec![("x-why".into(), "rate".into())], ..HeaderOps::default() },
        ..local(3)
    };
    let own = RouteFilters { local_rate_limit: Some(Box::new(local(1))), ..RouteFilters::default() };
    let off = LocalRateLimit { enabled: 0, ..local(0) };
    let off = RouteFilters { local_rate_limit: Some(Box::new(off)), ..RouteFilters::default() };
    let routes = vec![at("/own", own), at("/off", off), at("/", RouteFilters::default())];
    let p = proxy(&up, HttpFilter::LocalRateLimit(Arc::new(f)), routes).run();
    let r = p.get("h", "/").await;
    assert_eq!((r.header("x-ratelimit-limit"), r.header("x-ratelimit-remaining")), (Some("3"), Some("2")));
    assert_eq!(passed(&p, 4, "/", "").await, 2);
    let r = p.get("h", "/").await;
    assert_eq!((r.status, r.body.as_str()), (429, "local_rate_limited"));
    assert_eq!(r.header("x-envoy-ratelimited"), Some("true"));
    assert_eq!((r.header("x-why"), r.header("x-ratelimit-remaining")), (Some("rate"), Some("0")));
    assert!(r.header("retry-after").unwrap().parse::<u64>().unwrap() > 1000);
    let grpc = p.send("h", "/", "content-type: application/grpc\r\n").await;
    assert_eq!((grpc.status, grpc.header("grpc-status")), (200, Some("14")));
    assert_eq!(passed(&p, 3, "/own", "").await, 1);
    assert_eq!(passed(&p, 3, "/off", "").await, 3);
    p.metric(&["istio_requests_total", "response_code=\"429\"", "response_flags=\"RL\""]).await;
    // Counted and let pass, with a mark for who comes next.
    let lenient = LocalRateLimit {
        enforced: 0,
        request_headers: HeaderOps { set: vec![("x-over".into(), "1".into())], ..HeaderOps::default() },
        ..local(1)
    };
    let p = proxy(&up, HttpFilter::LocalRateLimit(Arc::new(lenient)), vec![at("/", RouteFilters::default())])
        .run();
    assert!(!p.get("h", "/").await.body.contains("x-over"));
    assert!(p.get("h", "/").await.body.contains("x-over: 1"));
    // Settings that cannot be are refused.
    let fast = TokenBucket { fill_interval: Duration::from_millis(1), ..bucket(1) };
    let bad = LocalRateLimit { bucket: Some(fast), ..local(1) };
    let p = proxy(&up, HttpFilter::LocalRateLimit(Arc::new(bad)), vec![]);
    assert!(p.apply().rejected[0].2.contains("50ms"));
}

#[tokio::test]
async fn descriptors_have_buckets_of_their_own() {
    use RateLimitAction as A;
    let up = Upstream::new("up").await;
    let header = |n: &str| A::Header { name: n.into(), key: n.into(), skip_if_absent: false };
    let f = LocalRateLimit {
        descriptors: vec![
            LocalDescriptor { entries: vec![("x-user".into(), "alice".into())], bucket: bucket(2) },
            LocalDescriptor {
                entries: vec![
                    ("generic_key".into(), "slow".into()),
                    ("remote_address".into(), "127.0.0.1".into()),
                ],
                bucket: bucket(1),
            },
        ],
        always_consume_default: false,
        ..local(5)
    };
    let host = vec![RateLimit { stage: 0, actions: vec![header("x-user")] }];
    let slow = RouteFilters {
        rate_limits: vec![RateLimit {
            stage: 0,
            actions: vec![A::Generic { key: "generic_key".into(), value: "slow".into() }, A::RemoteAddress],
        }],
        ..RouteFilters::default()
    };
    let mut m = inline(vec![vhost(&["*"], vec![at("/slow", slow), at("/", RouteFilters::default())])]);
    if let RouteSource::Inline(r) = &mut m.routes {
        Arc::make_mut(r).virtual_hosts[0].filters.rate_limits = host;
    }
    m.filters = vec![HttpFilter::LocalRateLimit(Arc::new(f))];
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(Direction::Inbound, vec![http_chain(m)]))
        .run();
    assert_eq!(passed(&p, 4, "/", "x-user: alice\r\n").await, 2);
    assert_eq!(passed(&p, 4, "/slow", "x-user: alice\r\n").await, 1, "the route's rules replace the host's");
    assert_eq!(passed(&p, 8, "/", "x-user: bob\r\n").await, 5, "the general bucket for everybody else");
}

#[tokio::test]
async fn connections_are_limited() {
    let up = Upstream::new("up").await;
    let limit = NetworkFilter::Limit(ConnectionLimit { stat_prefix: String::new(), bucket: bucket(2) });
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(Direction::Inbound, vec![chain(vec![limit, tcp_filter("up")])]))
        .run();
    for n in 0..4 {
        let mut s = p.connect("l").await;
        let _ = tokio::io::AsyncWriteExt::write_all(&mut s, b"GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let mut buf = [0; 4];
        let got = tokio::time::timeout(WAIT, s.read(&mut buf)).await.unwrap().unwrap_or(0);
        assert_eq!(got > 0, n < 2, "connection {n}");
    }
}

async fn service(seen: Arc<Mutex<Vec<String>>>) -> SocketAddr {
    server(move |r| {
        assert_eq!(r.uri().path(), "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit");
        let text = String::from_utf8_lossy(r.body()).into_owned();
        seen.lock().unwrap().push(text.clone());
        if text.contains("broken") {
            return Raw::builder().status(503).body(vec![]).unwrap();
        }
        let over = text.contains("mallory");
        let header = |n: u8, k: &[u8], v: &[u8]| field(n, &[field(1, k), field(2, v)].concat());
        // 10 a minute, of which 3 (or none) are left for 7 seconds.
        let limit = [8, 10, 16, 2];
        let status = [
            &[8, if over { 2 } else { 1 }][..],
            &field(2, &limit),
            &[24, if over { 0 } else { 3 }],
            &field(4, &[8, 7]),
        ]
        .concat();
        let message = [
            vec![8, if over { 2 } else { 1 }],
            field(2, &status),
            header(3, b"x-answer", b"1"),
            header(4, b"x-request", b"1"),
            field(5, if over { b"slow down" } else { b"" }),
        ]
        .concat();
        grpc(&message)
    })
    .await
}

#[tokio::test]
async fn a_service_counts_for_everybody() {
    use RateLimitAction as A;
    let up = Upstream::new("up").await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let rls = service(seen.clone()).await;
    let limits = RouteFilters {
        rate_limits: vec![RateLimit {
            stage: 0,
            actions: vec![
                A::DestinationCluster,
                A::Header { name: "x-user".into(), key: "user".into(), skip_if_absent: false },
            ],
        }],
        ..RouteFilters::default()
    };
    let run = |f: GlobalRateLimit, address| {
        let f = GlobalRateLimit {
            domain: "books".into(),
            service: GrpcService {
                cluster: "rls".into(),
                timeout: Some(Duration::from_secs(2)),
                ..GrpcService::default()
            },
            x_ratelimit_headers: true,
            ..f
        };
        proxy(&up, HttpFilter::RateLimit(Arc::new(f)), vec![at("/", limits.clone())])
            .cluster(Cluster { http: UpstreamHttp::Http2, ..cluster("rls", &[address]) })
            .run()
    };
    let p = run(GlobalRateLimit::default(), rls);
    let r = p.send("h", "/", "x-user: alice\r\n").await;
    assert_eq!((r.status, r.header("x-answer")), (200, Some("1")));
    assert!(r.body.contains("x-request: 1"), "{r:?}");
    assert_eq!(r.header("x-ratelimit-limit"), Some("10, 10;w=60"));
    assert_eq!((r.header("x-ratelimit-remaining"), r.header("x-ratelimit-reset")), (Some("3"), Some("7")));
    let said = seen.lock().unwrap()[0].clone();
    for part in ["books", "destination_cluster", "up", "user", "alice"] {
        assert!(said.contains(part), "{part} in {said:?}");
    }
    let r = p.send("h", "/", "x-user: mallory\r\n").await;
    assert_eq!(
        (r.status, r.body.as_str(), r.header("x-envoy-ratelimited")),
        (429, "slow down", Some("true"))
    );
    // Nothing to say about a request, nobody asked.
    let before = seen.lock().unwrap().len();
    assert_eq!(p.get("h", "/").await.status, 200);
    assert_eq!(seen.lock().unwrap().len(), before);
    assert_eq!(p.send("h", "/", "x-user: broken\r\n").await.status, 200, "no answer lets pass");
    let strict = GlobalRateLimit { failure_mode_deny: true, ..GlobalRateLimit::default() };
    let p = run(strict, closed_port());
    assert_eq!(p.send("h", "/", "x-user: alice\r\n").await.status, 500);
    p.metric(&["istio_requests_total", "response_code=\"500\"", "response_flags=\"RLSE\""]).await;
}
