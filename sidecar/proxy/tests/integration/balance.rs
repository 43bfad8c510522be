//! Balancing over real sockets: who gets how much, and who is taken out.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_model::proxy::*;
use tokio::io::AsyncWriteExt;

use crate::support::*;

fn proxy(c: Cluster) -> Proxy {
    Proxy::new()
        .cluster(c)
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("c"))])]))],
        ))
        .run()
}

fn least(choices: u32, bias: u32) -> LbPolicy {
    LbPolicy::LeastRequest(LeastRequest { choices, bias })
}

/// Answers every request with its name after `delay`, of a hundred `bad` with 500.
async fn server(name: &'static str, delay: Duration, bad: usize) -> SocketAddr {
    let seen = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    raw_server(move |mut s, _| {
        let seen = seen.clone();
        async move {
            loop {
                if read_until(&mut s, "\r\n\r\n").await.is_empty() {
                    return;
                }
                let n = seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                tokio::time::sleep(delay).await;
                let status = if n % 100 < bad { 500 } else { 200 };
                let r = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{name}", name.len());
                if s.write_all(r.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await
}

/// Requests answered by each server.
async fn counts(p: &Proxy, n: usize) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for _ in 0..n {
        *out.entry(p.get("x", "/name").await.body).or_default() += 1;
    }
    out
}

fn set_weights(c: &mut Cluster, weights: &[u32]) {
    let Discovery::Static(a) = &mut c.discovery else { panic!() };
    for (e, w) in a.localities[0].endpoints.iter_mut().zip(weights) {
        e.weight = *w;
    }
}

#[tokio::test]
async fn least_request_goes_by_weight_and_by_what_is_in_flight() {
    let none = Duration::ZERO;
    let (a, b) = (server("a", none, 0).await, server("b", none, 0).await);
    let mut c = cluster("c", &[a, b]);
    c.lb = least(2, 1000);
    set_weights(&mut c, &[1, 3]);
    let got = counts(&proxy(c.clone()), 80).await;
    assert!((18..=22).contains(&got["a"]), "{got:?}");
    // The heavy one is slow: with eight at a time it gets less than its weight, and with no bias all of it.
    let slow = server("b", Duration::from_millis(100), 0).await;
    let Discovery::Static(l) = &mut c.discovery else { panic!() };
    l.localities[0].endpoints[1].port = slow.port();
    let mut shares = vec![];
    for bias in [0, 1000] {
        c.lb = least(2, bias);
        let p = proxy(c.clone());
        let p = &p;
        let batches = (0..8).map(|_| async move { counts(p, 10).await.get("b").copied().unwrap_or(0) });
        shares.push(futures::future::join_all(batches).await.into_iter().sum::<usize>());
    }
    assert!((57..=63).contains(&shares[0]), "three quarters of 80: {shares:?}");
    assert!(shares[1] + 10 < shares[0], "{shares:?}");
}

#[tokio::test]
async fn peak_ewma_leaves_slow_hosts_alone() {
    let (fast, slow) =
        (server("fast", Duration::ZERO, 0).await, server("slow", Duration::from_millis(60), 0).await);
    let mut c = cluster("c", &[fast, slow]);
    c.lb = LbPolicy::PeakEwma;
    let got = counts(&proxy(c), 60).await;
    // Half of them, if it made no difference; a busy machine may make the other look slow for a while.
    assert!(got.get("slow").copied().unwrap_or(0) <= 15, "{got:?}");
}

#[tokio::test]
async fn new_hosts_start_slowly() {
    let none = Duration::ZERO;
    let (a, b) = (server("a", none, 0).await, server("b", none, 0).await);
    let mut c = cluster("c", &[a]);
    c.slow_start =
        Some(SlowStart { window: Duration::from_millis(1500), aggression: 1000, min_weight: 1000 });
    let mut p = proxy(c.clone());
    // The first host is old by the time the second comes.
    tokio::time::sleep(Duration::from_millis(1600)).await;
    c.discovery = Discovery::Static(assignment(&[a, b]));
    p.snap.clusters.insert("c".into(), Arc::new(c));
    let p = p.run();
    let begun = Instant::now();
    let early = counts(&p, 60).await;
    let took = begun.elapsed();
    tokio::time::sleep(Duration::from_millis(1600)).await;
    let late = counts(&p, 60).await;
    assert!((28..=32).contains(&late["b"]), "{late:?}");
    // A machine that is too slow for the ramp proves nothing about it.
    if took < Duration::from_millis(500) {
        let b = early.get("b").copied().unwrap_or(0);
        assert!((1..=20).contains(&b), "{early:?} within {took:?}");
    }
}

fn detection() -> OutlierDetection {
    OutlierDetection {
        interval: Duration::from_millis(300),
        base_ejection: Duration::from_secs(30),
        max_percent: 50,
        ..OutlierDetection::default()
    }
}

/// Sends until `host` alone is ejected.
async fn until_ejected(p: &Proxy, host: SocketAddr) {
    let end = Instant::now() + WAIT;
    loop {
        counts(p, 10).await;
        let hosts = &p.engine.status().clusters["c"].hosts;
        let out: Vec<_> = hosts.iter().filter(|h| h.ejected).map(|h| h.address.clone()).collect();
        if !out.is_empty() {
            assert_eq!(out, [host.to_string()]);
            let h = hosts.iter().find(|h| h.ejected).unwrap();
            assert_eq!(h.health_flags, "/failed_outlier_check");
            return;
        }
        assert!(Instant::now() < end, "{hosts:?}");
    }
}

#[tokio::test]
async fn hosts_are_ejected_for_their_success_rate_and_their_failures() {
    let none = Duration::ZERO;
    let bad = server("bad", none, 40).await;
    let mut hosts = vec![bad];
    for _ in 0..4 {
        hosts.push(server("good", none, 0).await);
    }
    let mut c = cluster("c", &hosts);
    c.outlier = Some(Box::new(OutlierDetection {
        success_rate: Some(SuccessRate {
            minimum_hosts: 5,
            request_volume: 5,
            stdev_factor: 1500,
            enforcing: 100,
        }),
        ..detection()
    }));
    let p = proxy(c.clone());
    until_ejected(&p, bad).await;
    let got = counts(&p, 40).await;
    assert_eq!(got["good"], 40);
    c.outlier = Some(Box::new(OutlierDetection {
        failure_percentage: Some(FailurePercentage {
            threshold: 30,
            minimum_hosts: 2,
            request_volume: 5,
            enforcing: 100,
        }),
        ..detection()
    }));
    until_ejected(&proxy(c), bad).await;
}

#[tokio::test]
async fn hosts_that_are_not_reached_are_ejected_for_their_rate() {
    // A server that ends every third connection before it answers.
    let flaky = raw_server(|mut s, n| async move {
        if n % 3 != 0 && !read_until(&mut s, "\r\n\r\n").await.is_empty() {
            let _ = s.write_all(b"HTTP/1.1 200 x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
        }
    })
    .await;
    let mut hosts = vec![flaky];
    for _ in 0..4 {
        // Bad answers say nothing about being reached.
        hosts.push(server("good", Duration::ZERO, 50).await);
    }
    let mut c = cluster("c", &hosts);
    let rate = SuccessRate { minimum_hosts: 5, request_volume: 5, stdev_factor: 1500, enforcing: 100 };
    c.outlier = Some(Box::new(OutlierDetection {
        local_origin: Some(LocalOrigin {
            consecutive: 0,
            enforcing: 100,
            success_rate: Some(rate),
            failure_percentage: None,
        }),
        ..detection()
    }));
    until_ejected(&proxy(c), flaky).await;
}

#[tokio::test]
async fn priorities_overflow_and_panic() {
    let none = Duration::ZERO;
    let first = [server("p0", none, 0).await, server("p0", none, 0).await, server("p0-sick", none, 0).await];
    let second = server("p1", none, 0).await;
    let mut c = cluster("c", &[]);
    let set = |sick: usize, panic: u32| {
        let mut a = assignment(&first);
        for e in a.localities[0].endpoints.iter_mut().rev().take(sick) {
            e.health = EndpointHealth::Unhealthy;
        }
        let mut l = assignment(&[second]).localities.remove(0);
        l.priority = 1;
        a.localities.push(l);
        (Discovery::Static(a), panic)
    };
    // Two of three times 1.4: 93 percent stay.
    (c.discovery, c.panic_threshold) = set(1, 50);
    let got = counts(&proxy(c.clone()), 300).await;
    assert!(!got.contains_key("p0-sick"), "{got:?}");
    assert!((5..=40).contains(&got.get("p1").copied().unwrap_or(0)), "7 percent of 300: {got:?}");
    // One of three: 46 percent stay, and since both together can take everything nobody panics.
    (c.discovery, c.panic_threshold) = set(2, 50);
    let got = counts(&proxy(c.clone()), 300).await;
    assert!((120..=200).contains(&got["p1"]), "54 percent of 300: {got:?}");
    // Nothing is healthy: all hosts of all priorities are used, or none without a panic.
    let (Discovery::Static(mut a), _) = set(3, 50) else { panic!() };
    a.localities[1].endpoints[0].health = EndpointHealth::Unhealthy;
    c.discovery = Discovery::Static(a);
    let got = counts(&proxy(c.clone()), 100).await;
    assert_eq!(got.len(), 3, "{got:?}");
    c.panic_threshold = 0;
    assert_eq!(proxy(c).get("x", "/").await.status, 503);
}

#[tokio::test]
async fn weights_follow_what_hosts_report() {
    // One host is used at a tenth, the other at four tenths: four of five requests go to the first.
    let reporting = |name: &'static str, utilization: &'static str| async move {
        raw_server(move |mut s, _| async move {
            while !read_until(&mut s, "\r\n\r\n").await.is_empty() {
                let r = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nendpoint-load-metrics: TEXT rps_fractional=10,\
                     named_metrics.gpu={utilization}\r\n\r\n{name}",
                    name.len()
                );
                if s.write_all(r.as_bytes()).await.is_err() {
                    return;
                }
            }
        })
        .await
    };
    for (policy, expected) in [(LbPolicy::Utilization, 70..=90), (LbPolicy::RoundRobin, 45..=55)] {
        let mut c = cluster("c", &[reporting("a", "0.1").await, reporting("b", "0.4").await]);
        c.lb = policy;
        c.utilization = Some(Box::new(UtilizationLb {
            metrics: vec!["named_metrics.gpu".into()],
            blackout: Duration::ZERO,
            update: Duration::from_millis(100),
            ..UtilizationLb::default()
        }));
        let p = proxy(c);
        for _ in 0..4 {
            p.get("a", "/").await;
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
        let mut first = 0;
        for _ in 0..100 {
            first += usize::from(p.get("a", "/").await.body == "a");
        }
        assert!(expected.contains(&first), "{policy:?}: {first}");
    }
}
