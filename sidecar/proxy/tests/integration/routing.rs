//! Routes, and what they do to requests and responses.

use std::{net::SocketAddr, time::Duration};

use mesh_model::proxy::*;

use crate::support::*;

fn with_routes(up: &[(&str, SocketAddr)], hosts: Vec<VirtualHost>) -> Proxy {
    let mut p = Proxy::new();
    for (name, a) in up {
        p = p.cluster(cluster(name, &[*a]));
    }
    p.routes(table(hosts))
        .listener(listener(Direction::Outbound, vec![http_chain(manager(RouteSource::Rds("r".into())))]))
}

fn on_path(path: PathMatch, mut r: Route) -> Route {
    r.matches.path = path;
    r
}

#[tokio::test]
async fn hosts_paths_headers_and_rewrites() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let mut canary = route(forward("b"));
    canary.matches.headers = vec![HeaderMatch {
        name: "x-user".into(),
        value: HeaderValueMatch::Value(StringMatch::exact("jason")),
        invert: false,
        missing_is_empty: false,
    }];
    let rewritten = route(Forward {
        prefix_rewrite: Some("/v1".into()),
        host_rewrite: Some("internal".into()),
        ..forward("a")
    });
    let mut edited = on_path(PathMatch::Prefix("/edited".into()), route(forward("a")));
    edited.request_headers = HeaderOps {
        remove: vec!["x-gone".into()],
        set: vec![("x-set".into(), "route".into())],
        add: vec![("x-add".into(), "1".into())],
    }
    .into();
    edited.response_headers = HeaderOps {
        remove: vec!["x-upstream".into()],
        set: vec![("x-answer".into(), "42".into())],
        add: vec![],
    }
    .into();
    let mut host = vhost(
        &["reviews", "reviews:9080"],
        vec![
            canary,
            on_path(PathMatch::SegmentPrefix("/api".into()), rewritten),
            edited,
            route(forward("a")),
        ],
    );
    host.request_headers.set = vec![("x-set".into(), "host".into())];
    let p = with_routes(&[("a", a.address), ("b", b.address)], vec![host]).run();
    assert!(p.get("reviews", "/x").await.body.contains("a GET /x"));
    assert!(p.send("reviews:9080", "/x", "X-User: jason\r\n").await.body.contains("b GET /x"));
    let r = p.get("reviews", "/api/books?q=1").await;
    assert!(r.body.contains("a GET /v1/books?q=1") && r.body.contains("host: internal\n"), "{r:?}");
    assert!(r.body.contains("x-envoy-original-path: /api/books?q=1\n"), "{r:?}");
    let r = p.send("reviews", "/edited", "X-Gone: 1\r\nX-Add: 0\r\n").await;
    // The virtual host's edits come after the route's, so they win (Envoy's order).
    assert!(r.body.contains("x-set: host\n") && !r.body.contains("x-gone"), "{r:?}");
    assert!(r.body.contains("x-add: 0\n") && r.body.contains("x-add: 1\n"), "{r:?}");
    assert_eq!((r.header("x-answer"), r.header("x-upstream")), (Some("42"), None));
    let r = p.get("nobody", "/").await;
    assert_eq!((r.status, r.body.as_str()), (404, ""));
}

#[tokio::test]
async fn answers_without_upstream() {
    let redirect = Route {
        action: RouteAction::Redirect(Redirect {
            scheme: Some("https".into()),
            host: Some("new.example".into()),
            prefix_rewrite: Some("/moved".into()),
            status: 308,
            ..Redirect::default()
        }),
        ..on_path(PathMatch::Prefix("/old".into()), route(forward("x")))
    };
    let direct = Route {
        action: RouteAction::Direct(DirectResponse { status: 418, body: b"teapot".to_vec() }),
        ..on_path(PathMatch::Exact("/tea".into()), route(forward("x")))
    };
    let mut secure = vhost(&["secure", "secure:80"], vec![route(forward("x"))]);
    secure.require_tls = true;
    let p = with_routes(&[], vec![secure, vhost(&["*"], vec![redirect, direct, route(forward("missing"))])])
        .run();
    let r = p.get("h", "/old/a?b=c").await;
    assert_eq!((r.status, r.header("location")), (308, Some("https://new.example/moved/a?b=c")));
    let r = p.get("h", "/tea").await;
    assert_eq!((r.status, r.body.as_str(), r.header("content-type")), (418, "teapot", Some("text/plain")));
    assert_eq!(p.get("h", "/").await.status, 503, "a route to a cluster that does not exist");
    let r = p.get("secure:80", "/a").await;
    assert_eq!((r.status, r.header("location")), (301, Some("https://secure/a")));
}

#[tokio::test]
async fn weights_split_in_proportion() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let mut f = forward("a");
    f.clusters = vec![
        WeightedCluster { weight: 80, ..WeightedCluster::only("a") },
        WeightedCluster { weight: 20, ..WeightedCluster::only("b") },
    ];
    let p = with_routes(&[("a", a.address), ("b", b.address)], vec![vhost(&["*"], vec![route(f)])]).run();
    for _ in 0..300 {
        assert_eq!(p.get("h", "/name").await.status, 200);
    }
    let share = b.requests() as f64 / 300.0;
    assert!((share - 0.2).abs() < 0.1, "{share}");
}

#[tokio::test]
async fn cross_origin_requests() {
    let up = Upstream::new("up").await;
    let mut r = route(forward("a"));
    r.cors = Some(Box::new(Cors {
        allow_origins: vec![StringMatch::exact("https://ok.example")],
        allow_methods: "GET,POST".into(),
        allow_headers: "x-a".into(),
        expose_headers: "x-b".into(),
        max_age: "60".into(),
        allow_credentials: true,
        ignore_unmatched: false,
    }));
    let p = with_routes(&[("a", up.address)], vec![vhost(&["*"], vec![r])]).run();
    let pre = p
        .raw("l", "OPTIONS / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nOrigin: https://ok.example\r\nAccess-Control-Request-Method: POST\r\n\r\n")
        .await;
    let pre = Response::parse(&pre);
    assert_eq!((pre.status, pre.header("access-control-allow-methods")), (200, Some("GET,POST")), "{pre:?}");
    assert_eq!(up.requests(), 0);
    let r = p.send("a", "/", "Origin: https://ok.example\r\n").await;
    assert_eq!(r.header("access-control-allow-origin"), Some("https://ok.example"));
    assert_eq!(r.header("access-control-allow-credentials"), Some("true"));
    let r = p.send("a", "/", "Origin: https://evil.example\r\n").await;
    assert_eq!((r.status, r.header("access-control-allow-origin")), (200, None));
}

#[tokio::test]
async fn faults_delay_and_abort() {
    let up = Upstream::new("up").await;
    let mut aborted = on_path(PathMatch::Prefix("/abort".into()), route(forward("a")));
    aborted.fault = Some(Box::new(Fault { abort: Some((AbortKind::Http(555), 1_000_000)), delay: None }));
    let mut delayed = route(forward("a"));
    delayed.fault =
        Some(Box::new(Fault { delay: Some((Duration::from_millis(150), 1_000_000)), abort: None }));
    let p = with_routes(&[("a", up.address)], vec![vhost(&["*"], vec![aborted, delayed])]).run();
    let r = p.get("a", "/abort").await;
    assert_eq!((r.status, r.body.as_str()), (555, "fault filter abort"));
    let started = std::time::Instant::now();
    assert_eq!(p.get("a", "/").await.status, 200);
    assert!(started.elapsed() >= Duration::from_millis(150));
    p.metric(&["istio_requests_total", "response_flags=\"FI\""]).await;
    p.metric(&["istio_requests_total", "response_flags=\"DI\""]).await;
}

#[tokio::test]
async fn mirrors_get_a_copy_and_change_nothing() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let mut f = forward("a");
    f.mirrors = vec![
        Mirror { cluster: "b".into(), fraction: 1_000_000 },
        Mirror { cluster: "gone".into(), fraction: 1_000_000 },
    ];
    let p = with_routes(&[("a", a.address), ("b", b.address)], vec![vhost(&["*"], vec![route(f)])]).run();
    assert!(p.get("h:80", "/name").await.body.contains('a'));
    let r = p
        .raw("l", "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")
        .await;
    assert!(r.contains("hello"));
    let end = tokio::time::Instant::now() + WAIT;
    while b.requests() < 2 {
        assert!(tokio::time::Instant::now() < end, "the mirror got {}", b.requests());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(a.requests(), 2);
}

#[tokio::test]
async fn hashing_keeps_a_client_on_its_host() {
    let ups = [Upstream::new("a").await, Upstream::new("b").await, Upstream::new("c").await];
    let mut c = cluster("ring", &ups.iter().map(|u| u.address).collect::<Vec<_>>());
    c.lb = LbPolicy::RingHash(1024);
    let mut f = forward("ring");
    f.hash = vec![
        HashPolicy::Header("x-user".into()),
        HashPolicy::Cookie {
            name: "session".into(),
            path: "/".into(),
            ttl: Some(Duration::ZERO),
            attributes: vec![("SameSite".into(), "Lax".into()), ("Secure".into(), String::new())],
        },
    ];
    let p = with_routes(&[], vec![vhost(&["*"], vec![route(f)])]).cluster(c).run();
    let mut seen = std::collections::HashSet::new();
    for user in 0..20 {
        let first = p.send("h", "/name", &format!("X-User: u{user}\r\n")).await.body;
        for _ in 0..3 {
            assert_eq!(p.send("h", "/name", &format!("X-User: u{user}\r\n")).await.body, first);
        }
        seen.insert(first);
    }
    assert_eq!(seen.len(), 3);
    let r = p.get("h", "/name").await;
    let set = r.header("set-cookie").unwrap();
    let cookie = set.split(';').next().unwrap();
    assert!(cookie.starts_with("session=\""), "{r:?}");
    assert!(set.ends_with("; Path=/; SameSite=Lax; Secure; HttpOnly"), "{set}");
    let again = p.send("h", "/name", &format!("Cookie: {cookie}\r\n")).await;
    assert_eq!(
        (again.body.as_str(), again.header("set-cookie")),
        (r.body.as_str(), None),
        "the cookie leads back to its host"
    );
}

#[tokio::test]
async fn a_route_may_have_statistics_of_its_own() {
    let up = Upstream::new("up").await;
    let with = |prefix: &str, path: &str| {
        let mut r = route(forward("a"));
        r.matches.path = PathMatch::Prefix(path.into());
        r.filters = RouteFilters { stat_prefix: prefix.into(), ..RouteFilters::default() }.into();
        r
    };
    let p = with_routes(&[], vec![vhost(&["*"], vec![with("checkout", "/status"), with("", "/")])])
        .cluster(cluster("a", &[up.address]))
        .run();
    for path in ["/status/200", "/status/404", "/status/200", "/name"] {
        p.get("h", path).await;
    }
    let ok = "envoy_response_code_class=\"2\"";
    p.metric(&["envoy_vhost_route_upstream_rq_total", "envoy_route=\"checkout\"", ok, "} 2"]).await;
    p.metric(&["envoy_vhost_route_upstream_rq_total", "envoy_response_code_class=\"4\"", "} 1"]).await;
    assert!(!p.metrics().contains("envoy_route=\"\""));
}

#[tokio::test]
async fn trace_context_is_continued() {
    let up = Upstream::new("up").await;
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("a"))])]);
    m.tracing = Some(Box::new(Tracing { sampling: 10_000, ..Tracing::default() }));
    let p = Proxy::new()
        .cluster(cluster("a", &[up.address]))
        .listener(listener(Direction::Outbound, vec![http_chain(m)]))
        .run();
    let r =
        p.send("h", "/", "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n").await;
    assert!(r.body.contains("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-"), "{r:?}");
    assert!(!r.body.contains("00f067aa0ba902b7-01"), "a span of its own: {r:?}");
    let r = p
        .send(
            "h",
            "/",
            "X-B3-TraceId: 463ac35c9f6413ad\r\nX-B3-SpanId: a2fb4a1d1a96d312\r\nX-B3-Sampled: 0\r\n",
        )
        .await;
    assert!(
        r.body.contains("x-b3-traceid: 0000000000000000463ac35c9f6413ad\n")
            && r.body.contains("x-b3-parentspanid: a2fb4a1d1a96d312\n"),
        "{r:?}"
    );
    assert!(r.body.contains("x-b3-sampled: 0\n"), "{r:?}");
    let r = p.get("h", "/").await;
    assert!(r.body.contains("traceparent: 00-") && r.body.contains("x-b3-sampled: 1\n"), "{r:?}");
}

/// Who may say where requests go must not reach what the proxy, or another process of its user, serves to its own host.
#[tokio::test]
async fn sockets_of_the_proxys_user_are_not_reached() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let l = tokio::net::UnixListener::bind(&path).unwrap();
    let mut c = cluster("up", &[([127, 0, 0, 1], 1).into()]);
    let Discovery::Static(a) = &mut c.discovery else { panic!() };
    let e = &mut a.localities[0].endpoints[0];
    (e.address, e.port) = (format!("unix://{}", path.display()), 0);
    let p = with_routes(&[], vec![vhost(&["*"], vec![route(forward("up"))])]);
    let p = p.cluster(c).run();
    let r = p.get("a", "/").await;
    assert!(r.status == 503 && r.body.contains("remote connection failure"), "{r:?}");
    // It was connected to, and nothing was said.
    let (mut s, _) = l.accept().await.unwrap();
    assert_eq!(read_all(&mut s).await, "");
}

/// Of hosts that do not say their namespace the configuration does, and it may change; inbound it is the workload's.
#[tokio::test]
async fn namespaces_of_services_are_counted() {
    let up = Upstream::new("a").await;
    let named = |namespace: &str| Cluster {
        namespace: namespace.into(),
        ..cluster("outbound|80||api.example", &[up.address])
    };
    let routes = || inline(vec![vhost(&["*"], vec![route(forward("outbound|80||api.example"))])]);
    let mut p = Proxy::new().cluster(named("shop"));
    p = p.listener(listener(Direction::Outbound, vec![http_chain(routes())])).run();
    for (namespace, config) in [("shop", None), ("depot", Some(named("depot")))] {
        if let Some(c) = config {
            p = p.cluster(c);
            p.apply();
        }
        for _ in 0..2 {
            assert_eq!(p.get("api.example", "/").await.status, 200);
        }
        let of = format!("destination_service_namespace=\"{namespace}\"");
        p.metric(&["istio_requests_total", "destination_service_name=\"api.example\"", &of, "} 2"]).await;
    }
    let here = Proxy::new()
        .cluster(cluster("inbound|80||", &[up.address]))
        .listener(listener(
            Direction::Inbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("inbound|80||"))])]))],
        ))
        .run();
    assert_eq!(here.get("api.example", "/").await.status, 200);
    let of = here.metric(&["istio_requests_total", "destination_service=\"api.example\""]).await;
    let own = of.split("destination_workload_namespace=").nth(1).unwrap().split(',').next().unwrap();
    assert!(of.contains(&format!("destination_service_namespace={own}")), "{of}");
}
