//! Time limits, retries, ejection, limits, draining.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_model::proxy::*;
use tokio::io::AsyncWriteExt;

use crate::support::*;

fn retry(on: &[RetryOn], attempts: u32) -> Option<Box<RetryPolicy>> {
    Some(Box::new(RetryPolicy {
        on: on.to_vec(),
        status_codes: vec![],
        attempts,
        per_try_timeout: None,
        base_interval: Duration::from_millis(5),
        max_interval: Duration::from_millis(20),
        host_selection_attempts: 5,
        ..RetryPolicy::default()
    }))
}

fn proxy(c: Cluster, f: Forward) -> Proxy {
    Proxy::new().cluster(c).listener(listener(
        Direction::Outbound,
        vec![http_chain(inline(vec![vhost(&["*"], vec![route(f)])]))],
    ))
}

/// Answers its first `bad` requests with `status`, then 200 with the body of the request.
async fn flaky(bad: usize, status: u16) -> (SocketAddr, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let a = raw_server(move |mut s, _| {
        let seen = seen.clone();
        async move {
            loop {
                let head = read_until(&mut s, "\r\n\r\n").await;
                if head.is_empty() {
                    return;
                }
                let n = seen.fetch_add(1, Ordering::SeqCst);
                let body = head.split_once("\r\n\r\n").map_or("", |h| h.1).to_owned();
                let r = if n < bad {
                    format!("HTTP/1.1 {status} x\r\ncontent-length: 3\r\n\r\nbad")
                } else {
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
                };
                if s.write_all(r.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    (a, count)
}

#[tokio::test]
async fn retries_on_status_with_the_body() {
    let (a, seen) = flaky(2, 503).await;
    let p =
        proxy(cluster("c", &[a]), Forward { retry: retry(&[RetryOn::ServerError], 2), ..forward("c") }).run();
    let r =
        p.raw("l", "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello").await;
    assert!(r.starts_with("HTTP/1.1 200") && r.ends_with("hello"), "{r}");
    assert_eq!(seen.load(Ordering::SeqCst), 3);
    let (a, seen) = flaky(9, 503).await;
    let p = proxy(cluster("c", &[a]), Forward { retry: retry(&[RetryOn::GatewayError], 2), ..forward("c") })
        .run();
    let r = p.get("a", "/").await;
    assert_eq!((r.status, r.body.as_str()), (503, "bad"), "the last answer is passed on");
    assert_eq!(seen.load(Ordering::SeqCst), 3);
    let (a, seen) = flaky(9, 500).await;
    let p =
        proxy(cluster("c", &[a]), Forward { retry: retry(&[RetryOn::ConnectFailure], 2), ..forward("c") })
            .run();
    assert_eq!(p.get("a", "/").await.status, 500);
    assert_eq!(seen.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_body_too_large_to_keep_is_not_retried() {
    let (a, seen) = flaky(9, 503).await;
    let p =
        proxy(cluster("c", &[a]), Forward { retry: retry(&[RetryOn::ServerError], 3), ..forward("c") }).run();
    let big = "x".repeat(200 * 1024);
    let r = p
        .raw(
            "l",
            &format!(
                "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{big}",
                big.len()
            ),
        )
        .await;
    assert!(r.starts_with("HTTP/1.1 503"), "{r}");
    let _ = seen;
}

#[tokio::test]
async fn connect_failures_go_to_another_host() {
    let up = Upstream::new("up").await;
    let c = cluster("c", &[closed_port(), up.address]);
    let p = proxy(c, Forward { retry: retry(&[RetryOn::ConnectFailure], 2), ..forward("c") }).run();
    for _ in 0..10 {
        assert_eq!(p.get("a", "/name").await.status, 200);
    }
    assert_eq!(up.requests(), 10);
    let p = proxy(cluster("c", &[closed_port()]), forward("c")).run();
    let r = p.get("a", "/").await;
    assert_eq!(r.status, 503);
    assert!(r.body.starts_with("upstream connect error or disconnect/reset before headers"), "{r:?}");
    p.metric(&["istio_requests_total", "response_flags=\"UF\""]).await;
    let p = proxy(cluster("c", &[]), forward("c")).run();
    let r = p.get("a", "/").await;
    assert_eq!((r.status, r.body.as_str()), (503, "no healthy upstream"));
    p.metric(&["istio_requests_total", "response_flags=\"UH\""]).await;
}

#[tokio::test]
async fn timeouts() {
    let up = Upstream::new("up").await;
    let f = Forward { timeout: Some(Duration::from_millis(100)), ..forward("c") };
    let p = proxy(cluster("c", &[up.address]), f).run();
    let started = Instant::now();
    let r = p.get("a", "/slow").await;
    assert_eq!((r.status, r.body.as_str()), (504, "upstream request timeout"));
    assert!(started.elapsed() < Duration::from_secs(2));
    p.metric(&["istio_requests_total", "response_flags=\"UT\"", "response_code=\"504\""]).await;
    // The caller's own limit.
    let p = proxy(cluster("c", &[up.address]), forward("c")).run();
    assert_eq!(p.send("a", "/slow", "x-envoy-upstream-rq-timeout-ms: 50\r\n").await.status, 504);
    // A try's limit, with tries.
    let mut r = retry(&[RetryOn::GatewayError], 2);
    if let Some(r) = r.as_mut() {
        r.per_try_timeout = Some(Duration::from_millis(50));
    }
    let before = up.requests();
    let p = proxy(cluster("c", &[up.address]), Forward { retry: r, ..forward("c") }).run();
    assert_eq!(p.get("a", "/slow").await.status, 504);
    assert_eq!(up.requests() - before, 3);
}

#[tokio::test]
async fn bad_hosts_are_ejected_and_return() {
    let good = Upstream::new("good").await;
    let (bad, seen) = flaky(usize::MAX, 500).await;
    let mut c = cluster("c", &[good.address, bad]);
    c.outlier = Some(Box::new(OutlierDetection {
        consecutive_5xx: 3,
        consecutive_gateway: 0,
        interval: Duration::from_millis(50),
        base_ejection: Duration::from_millis(400),
        max_ejection: Duration::from_secs(5),
        max_percent: 50,
        ..OutlierDetection::default()
    }));
    let p = proxy(c, forward("c")).run();
    let mut failures = 0;
    for _ in 0..40 {
        failures += usize::from(p.get("a", "/name").await.status == 500);
    }
    assert_eq!(failures, 3);
    let hosts = &p.engine.status().clusters["c"].hosts;
    assert_eq!(hosts.iter().filter(|h| h.ejected).count(), 1, "{hosts:?}");
    let before = seen.load(Ordering::SeqCst);
    let end = Instant::now() + WAIT;
    while seen.load(Ordering::SeqCst) == before {
        assert!(Instant::now() < end, "the host never returned");
        p.get("a", "/name").await;
    }
}

#[tokio::test]
async fn circuit_breakers_shed() {
    let up = Upstream::new("up").await;
    let mut c = cluster("c", &[up.address]);
    c.limits.max_requests = 2;
    let p = proxy(c, Forward { timeout: Some(Duration::from_millis(300)), ..forward("c") }).run();
    let all = futures::future::join_all((0..10).map(|_| p.get("a", "/slow"))).await;
    let shed: Vec<_> = all.iter().filter(|r| r.status == 503).collect();
    assert_eq!(shed.len(), 8);
    assert_eq!(shed[0].header("x-envoy-overloaded"), Some("true"));
    p.metric(&["istio_requests_total", "response_flags=\"UO\"", "} 8"]).await;
    let mut c = cluster("c", &[up.address]);
    c.limits.max_connections = 1;
    c.limits.max_pending = 1;
    let p = proxy(c, Forward { timeout: Some(Duration::from_millis(300)), ..forward("c") }).run();
    let all = futures::future::join_all((0..10).map(|_| p.get("a", "/slow"))).await;
    assert!(all.iter().filter(|r| r.status == 503).count() >= 8, "{all:?}");
    assert!(all.iter().any(|r| r.status == 504), "{all:?}");
}

#[tokio::test]
async fn priorities_take_over_when_the_first_is_gone() {
    let (local, remote) = (Upstream::new("local").await, Upstream::new("remote").await);
    let mut c = cluster("c", &[local.address]);
    let set = |health| {
        let mut a = assignment(&[local.address]);
        a.localities[0].endpoints[0].health = health;
        let mut second = assignment(&[remote.address]).localities.remove(0);
        second.priority = 1;
        a.localities.push(second);
        a
    };
    c.discovery = Discovery::Eds("e".into());
    let mut p = proxy(c, forward("c"));
    p.snap.endpoints.insert("e".into(), Arc::new(set(EndpointHealth::Healthy)));
    let mut p = p.run();
    let body = |r: Response| r.body;
    assert_eq!(body(p.get("a", "/name").await), "local");
    p.snap.endpoints.insert("e".into(), Arc::new(set(EndpointHealth::Unhealthy)));
    let p = p.run();
    assert_eq!(body(p.get("a", "/name").await), "remote");
}

#[tokio::test]
async fn draining_finishes_what_is_running() {
    let slow = raw_server(|mut s, _| async move {
        let _ = read_until(&mut s, "\r\n\r\n").await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let _ = s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await;
    })
    .await;
    let p = proxy(cluster("c", &[slow]), forward("c")).run();
    let address = p.address("l");
    let mut busy = p.connect("l").await;
    busy.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut idle = p.connect("l").await;
    idle.write_all(b"").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let started = Instant::now();
    p.engine.drain(Duration::from_secs(5)).await;
    assert!(started.elapsed() < Duration::from_secs(3), "did not wait for the deadline");
    let r = read_all(&mut busy).await;
    assert!(r.ends_with("done"), "{r}");
    assert_eq!(read_all(&mut idle).await, "");
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

/// Answers the nth request with the nth text, the last one again and again; counts requests.
async fn scripted(answers: Vec<(Duration, String)>) -> (SocketAddr, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let a = raw_server(move |mut s, _| {
        let (seen, answers) = (seen.clone(), answers.clone());
        async move {
            while !read_until(&mut s, "\r\n\r\n").await.is_empty() {
                let n = seen.fetch_add(1, Ordering::SeqCst);
                let (wait, text) = &answers[n.min(answers.len() - 1)];
                tokio::time::sleep(*wait).await;
                if s.write_all(text.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    (a, count)
}

fn answer(status: u16, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len())
}

fn at_once(list: &[String]) -> Vec<(Duration, String)> {
    list.iter().map(|s| (Duration::ZERO, s.clone())).collect()
}

fn with(on: &[RetryOn], change: impl FnOnce(&mut RetryPolicy)) -> Option<Box<RetryPolicy>> {
    let mut r = retry(on, 2);
    change(r.as_mut().unwrap());
    r
}

#[tokio::test]
async fn retries_by_headers_and_rate_limits() {
    let present = |name: &str| HeaderMatch {
        name: name.into(),
        value: HeaderValueMatch::Present(true),
        invert: false,
        missing_is_empty: false,
    };
    let (a, seen) = scripted(at_once(&[answer(200, "x-again: 1\r\n", "no"), answer(200, "", "yes")])).await;
    let r = with(&[RetryOn::RetriableHeaders], |r| r.retriable_headers = vec![present("x-again")]);
    let p = proxy(cluster("c", &[a]), Forward { retry: r, ..forward("c") }).run();
    assert_eq!(p.get("a", "/").await.body, "yes");
    assert_eq!(seen.load(Ordering::SeqCst), 2);
    // Only requests that ask for it.
    let (a, seen) = scripted(at_once(&[answer(503, "", "no")])).await;
    let r = with(&[RetryOn::ServerError], |r| r.retriable_request_headers = vec![present("x-safe")]);
    let p = proxy(cluster("c", &[a]), Forward { retry: r, ..forward("c") }).run();
    p.get("a", "/").await;
    assert_eq!(seen.swap(0, Ordering::SeqCst), 1);
    p.send("a", "/", "x-safe: 1\r\n").await;
    assert_eq!(seen.load(Ordering::SeqCst), 3);
    // Whoever is limited is not asked again, unless told so, and then when it says.
    let limited = || {
        at_once(&[
            answer(429, "x-envoy-ratelimited: true\r\nretry-after: 1\r\n", "slow"),
            answer(200, "", "ok"),
        ])
    };
    let codes = |on: &[RetryOn]| {
        with(on, |r| {
            r.status_codes = vec![429];
            r.rate_limited = Some(RateLimitedBackOff {
                headers: vec![ResetHeader { name: "retry-after".into(), unix_time: false }],
                max_interval: Duration::from_secs(5),
            });
        })
    };
    let (a, _) = scripted(limited()).await;
    let f = Forward { retry: codes(&[RetryOn::RetriableStatusCodes]), ..forward("c") };
    assert_eq!(proxy(cluster("c", &[a]), f).run().get("a", "/").await.status, 429);
    let (a, _) = scripted(limited()).await;
    let f = Forward { retry: codes(&[RetryOn::EnvoyRateLimited]), ..forward("c") };
    let started = Instant::now();
    assert_eq!(proxy(cluster("c", &[a]), f).run().get("a", "/").await.body, "ok");
    let took = started.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_millis(2500)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn retries_have_a_budget() {
    let (a, seen) = scripted(at_once(&[answer(503, "", "no")])).await;
    let mut c = cluster("c", &[a]);
    c.limits.max_retries = u32::MAX;
    c.limits.retry_budget = Some(RetryBudget { share: 0, min_concurrency: 0, interval: Duration::ZERO });
    let p = proxy(c.clone(), Forward { retry: retry(&[RetryOn::ServerError], 2), ..forward("c") }).run();
    assert_eq!(p.get("a", "/").await.status, 503);
    assert_eq!(seen.swap(0, Ordering::SeqCst), 1);
    p.metric(&["istio_requests_total", "response_flags=\"UO\""]).await;
    c.limits.max_retries = 0;
    c.limits.retry_budget = Some(RetryBudget { share: 10_000, min_concurrency: 0, interval: Duration::ZERO });
    let p = proxy(c, Forward { retry: retry(&[RetryOn::ServerError], 2), ..forward("c") }).run();
    assert_eq!(p.get("a", "/").await.status, 503);
    assert_eq!(seen.load(Ordering::SeqCst), 3, "as many retries as requests");
}

#[tokio::test]
async fn a_budget_may_look_at_an_interval() {
    // A tenth of ten requests is one retry, of one request none.
    for (interval, tries) in [(Duration::ZERO, 1), (Duration::from_secs(60), 2)] {
        let (a, seen) = scripted(at_once(&[answer(200, "", "ok")])).await;
        let (bad, bad_seen) = scripted(at_once(&[answer(503, "", "no")])).await;
        let mut c = cluster("c", &[a]);
        c.limits.retry_budget = Some(RetryBudget { share: 1000, min_concurrency: 0, interval });
        let f = || Forward { retry: retry(&[RetryOn::ServerError], 1), ..forward("c") };
        let p = proxy(c.clone(), f()).run();
        for _ in 0..10 {
            assert_eq!(p.get("a", "/").await.status, 200);
        }
        assert_eq!(seen.load(Ordering::SeqCst), 10);
        // Counts of a cluster outlive its configuration.
        c.discovery = Discovery::Static(assignment(&[bad]));
        let mut snap = p.snap.clone();
        snap.clusters.insert("c".into(), Arc::new(c));
        p.engine.apply(snap);
        assert_eq!(p.get("a", "/").await.status, 503);
        assert_eq!(bad_seen.load(Ordering::SeqCst), tries, "{interval:?}");
    }
}

#[tokio::test]
async fn retries_may_leave_priorities() {
    let (near, seen) = scripted(at_once(&[answer(503, "", "no")])).await;
    let (far, far_seen) = scripted(at_once(&[answer(200, "", "far")])).await;
    let mut places = assignment(&[near]);
    let mut second = assignment(&[far]).localities.remove(0);
    second.priority = 1;
    places.localities.push(second);
    let run = |leave| {
        let mut c = cluster("c", &[]);
        c.discovery = Discovery::Static(places.clone());
        let r = with(&[RetryOn::ServerError], |r| {
            r.attempts = 3;
            r.leave_priorities = leave;
        });
        proxy(c, Forward { retry: r, ..forward("c") }).run()
    };
    let p = run(0);
    assert_eq!(p.get("a", "/").await.status, 503);
    assert_eq!((seen.swap(0, Ordering::SeqCst), far_seen.load(Ordering::SeqCst)), (4, 0));
    let p = run(2);
    assert_eq!(p.get("a", "/").await.body, "far");
    assert_eq!((seen.load(Ordering::SeqCst), far_seen.load(Ordering::SeqCst)), (2, 1));
}

#[tokio::test]
async fn slow_tries_are_hedged() {
    let slow = |ms| (Duration::from_millis(ms), answer(200, "", "slow"));
    let fast = (Duration::ZERO, answer(200, "", "fast"));
    let r = |ms| with(&[], |r| r.per_try_timeout = Some(Duration::from_millis(ms)));
    let run = |hosts: Vec<SocketAddr>, ms, timeout| {
        let f = Forward {
            retry: r(ms),
            hedge: true,
            timeout: Some(Duration::from_millis(timeout)),
            ..forward("c")
        };
        proxy(cluster("c", &hosts), f).run()
    };
    // The second try overtakes the first.
    let (a, seen) = scripted(vec![slow(3000), fast.clone()]).await;
    let started = Instant::now();
    let post = "POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello";
    assert!(run(vec![a], 100, 5000).raw("l", post).await.ends_with("fast"));
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!(seen.load(Ordering::SeqCst), 2);
    // The first is still heard when its successors are slower, or bad.
    let (a, _) = scripted(vec![slow(400), slow(3000)]).await;
    let started = Instant::now();
    assert_eq!(run(vec![a], 150, 5000).get("a", "/").await.body, "slow");
    assert!(started.elapsed() < Duration::from_secs(2));
    let broken = (Duration::ZERO, "nonsense\r\n\r\n".to_owned());
    let (a, _) = scripted(vec![slow(400), broken]).await;
    assert_eq!(run(vec![a], 100, 5000).get("a", "/").await.body, "slow");
    // The request's time is over for all of them.
    let (a, _) = scripted(vec![slow(3000)]).await;
    let r = run(vec![a], 50, 300).get("a", "/").await;
    assert_eq!((r.status, r.body.as_str()), (504, "upstream request timeout"));
}

#[tokio::test]
async fn streams_end_in_time() {
    let up = Upstream::new("up").await;
    let limited = |max_stream| {
        let f = Forward { max_stream: Some(max_stream), ..forward("c") };
        proxy(cluster("c", &[up.address]), f).run()
    };
    let ms = Duration::from_millis;
    let p = limited(StreamLimit { max: Some(ms(100)), ..StreamLimit::default() });
    let r = p.get("a", "/slow").await;
    assert_eq!((r.status, r.body.as_str()), (504, "downstream duration timeout"));
    p.metric(&["istio_requests_total", "response_flags=\"DT\""]).await;
    let unfinished = "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe";
    assert!(p.raw("l", unfinished).await.starts_with("HTTP/1.1 408"), "the client was too slow itself");
    // The client's own deadline, as far as the route believes it.
    let p = limited(StreamLimit { grpc_timeout_max: Some(Duration::ZERO), ..StreamLimit::default() });
    let grpc = "content-type: application/grpc\r\ngrpc-timeout: 100m\r\n";
    let started = Instant::now();
    let r = p.send("a", "/slow", grpc).await;
    assert_eq!((r.status, r.header("grpc-status")), (200, Some("4")), "{r:?}");
    assert!(started.elapsed() < Duration::from_secs(2));
    let p = limited(StreamLimit { grpc_timeout_max: Some(ms(100)), ..StreamLimit::default() });
    assert_eq!(p.send("a", "/slow", "grpc-timeout: 1H\r\n").await.status, 504);
    assert_eq!(p.get("a", "/name").await.status, 200);
    // The connection manager's limit, and a try in which nothing moves.
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("c"))])]);
    m.max_stream_duration = Some(ms(100));
    let p = Proxy::new()
        .cluster(cluster("c", &[up.address]))
        .listener(listener(Direction::Outbound, vec![http_chain(m)]))
        .run();
    assert_eq!(p.get("a", "/slow").await.status, 504);
    let r = with(&[RetryOn::GatewayError], |r| r.per_try_idle_timeout = Some(ms(60)));
    let before = up.requests();
    let p = proxy(cluster("c", &[up.address]), Forward { retry: r, ..forward("c") }).run();
    assert_eq!(p.get("a", "/slow").await.status, 504);
    assert_eq!(up.requests() - before, 3);
}

#[tokio::test]
async fn more_of_a_body_is_kept_where_a_route_says_so() {
    let (a, seen) = flaky(1, 503).await;
    let mut r = route(Forward { retry: retry(&[RetryOn::ServerError], 1), ..forward("c") });
    r.filters.buffer_limit = Some(1 << 20);
    let m = inline(vec![vhost(&["*"], vec![r])]);
    let p = Proxy::new()
        .cluster(cluster("c", &[a]))
        .listener(listener(Direction::Outbound, vec![http_chain(m)]))
        .run();
    let big = "x".repeat(200 * 1024);
    let head =
        format!("POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", big.len());
    let r = p.raw("l", &format!("{head}{big}")).await;
    assert!(seen.load(Ordering::SeqCst) >= 2, "{r}");
}

#[tokio::test]
async fn old_clients_are_served_only_if_wanted() {
    let up = Upstream::new("up").await;
    let run = |accept| {
        let mut m = inline(vec![vhost(&["*"], vec![route(forward("c"))])]);
        m.accept_http_10 = accept;
        Proxy::new()
            .cluster(cluster("c", &[up.address]))
            .listener(listener(Direction::Outbound, vec![http_chain(m)]))
            .run()
    };
    let old = "GET /name HTTP/1.0\r\nHost: a\r\n\r\n";
    assert!(run(true).raw("l", old).await.contains(" 200 "));
    assert!(run(false).raw("l", old).await.contains(" 426 "));
}
