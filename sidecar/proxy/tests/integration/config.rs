//! Configuration updates, hooks, logs.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use mesh_model::proxy::*;
use mesh_proxy::{
    BoxedIo, Dialer, EngineOptions, HookFuture, Hooks, PolicyDecision, PolicyHook, RequestAttributes,
    RequestRecord,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

#[tokio::test]
async fn updates_keep_connections_and_pools() {
    let up = Upstream::new("up").await;
    let mut p = Proxy::new()
        .cluster(Cluster { discovery: Discovery::Eds("e".into()), ..cluster("up", &[]) })
        .routes(table(vec![vhost(&["*"], vec![route(forward("up"))])]))
        .listener(listener(Direction::Outbound, vec![http_chain(manager(RouteSource::Rds("r".into())))]));
    p.snap.endpoints.insert("e".into(), Arc::new(assignment(&[up.address])));
    let mut p = p.run();
    let mut s = p.connect("l").await;
    let mut ask = async |want: u16| {
        s.write_all(b"GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let r = read_until(&mut s, "\r\n\r\n").await;
        assert!(r.starts_with(&format!("HTTP/1.1 {want}")), "{r}");
        if want == 200 && !r.ends_with("up") {
            read_until(&mut s, "up").await;
        }
    };
    ask(200).await;
    let port = p.address("l").port();
    // New endpoints, a new route table, a changed listener: same downstream and upstream connection.
    p.snap
        .endpoints
        .insert("e".into(), Arc::new(LoadAssignment { overprovisioning: 120, ..assignment(&[up.address]) }));
    let p2 = p.routes(table(vec![vhost(&["a", "b"], vec![route(forward("up"))])]));
    let p = p2.run();
    ask(200).await;
    let mut l = listener(Direction::Outbound, vec![http_chain(manager(RouteSource::Rds("r".into())))]);
    l.inspect_timeout = Duration::from_secs(1);
    let p = p.listener(l).run();
    assert_eq!(p.address("l").port(), port);
    ask(200).await;
    assert_eq!(up.connections(), 1);
    // No routes for the host any more: seen by the next request on the same connection.
    let p = p.routes(table(vec![vhost(&["other"], vec![route(forward("up"))])])).run();
    ask(404).await;
    drop(p);
}

#[tokio::test]
async fn a_bad_resource_is_rejected_alone() {
    let up = Upstream::new("up").await;
    let mut bad_route = route(forward("up"));
    bad_route.matches.path = PathMatch::Regex("(".into());
    let mut broken = listener(Direction::Outbound, vec![]);
    broken.name = "broken".into();
    broken.filter_chains = vec![FilterChain { filters: vec![], ..chain(vec![]) }];
    let mut taken = listener(Direction::Outbound, vec![chain(vec![tcp_filter("up")])]);
    taken.name = "taken".into();
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    taken.address = busy.local_addr().unwrap();
    let mut p = simple(up.address).listener(broken).listener(taken);
    p.snap.routes.insert(
        "bad".into(),
        Arc::new(RouteConfiguration { name: "bad".into(), ..table(vec![vhost(&["*"], vec![bad_route])]) }),
    );
    let report = p.apply();
    let mut names: Vec<_> = report.rejected.iter().map(|r| (r.0, r.1.as_str())).collect();
    names.sort_unstable();
    assert_eq!(names, [("listener", "broken"), ("listener", "taken"), ("route", "bad")], "{report:?}");
    assert_eq!(p.get("a", "/name").await.status, 200);
    // Once the address is free the same configuration binds it.
    drop(busy);
    assert!(p.apply().rejected.iter().all(|r| r.1 != "taken"));
}

#[tokio::test]
async fn removed_listeners_and_chains_drain() {
    let up = Upstream::new("up").await;
    let options = EngineOptions { drain_time: Duration::from_millis(200), ..EngineOptions::default() };
    let tcp = listener(Direction::Outbound, vec![chain(vec![tcp_filter("up")])]);
    let mut p =
        Proxy::with(options, Hooks::default()).cluster(cluster("up", &[up.address])).listener(tcp).run();
    let address = p.address("l");
    let mut s = p.connect("l").await;
    s.write_all(b"GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    read_until(&mut s, "up").await;
    p.snap.listeners.clear();
    p.apply();
    // Still served for the drain time, then closed; nothing new is accepted.
    s.write_all(b"GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    read_until(&mut s, "up").await;
    assert_eq!(read_all(&mut s).await, "");
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn several_workers_share_the_port() {
    let up = Upstream::new("up").await;
    let options = EngineOptions { workers: 3, ..EngineOptions::default() };
    let p = Proxy::with(options, Hooks::default())
        .cluster(cluster("up", &[up.address]))
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
        ))
        .run();
    for r in futures::future::join_all((0..60).map(|_| p.get("a", "/name"))).await {
        assert_eq!(r.status, 200);
    }
    p.metric(&["istio_requests_total", "} 60"]).await;
}

#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl PolicyHook for Recorder {
    fn check<'a>(&'a self, r: &'a RequestAttributes<'a>) -> HookFuture<'a, PolicyDecision> {
        Box::pin(async move {
            if r.headers.get("X-Deny").is_some() {
                return PolicyDecision::Deny {
                    status: 429,
                    body: format!("no {} {}", r.method, r.path),
                    grpc: Some(8),
                };
            }
            PolicyDecision::Allow
        })
    }
    fn report(&self, r: &RequestRecord<'_>) {
        self.0.lock().unwrap().push(format!("{} {} {}", r.status, r.flags, r.destination_service));
    }
}

#[tokio::test]
async fn policy_hooks_decide_and_hear() {
    let up = Upstream::new("up").await;
    let hook = Arc::new(Recorder::default());
    let p = Proxy::with(EngineOptions::default(), Hooks { policy: Some(hook.clone()), ..Hooks::default() })
        .cluster(cluster("inbound|9080||", &[up.address]))
        .listener(listener(
            Direction::Inbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("inbound|9080||"))])]))],
        ))
        .run();
    assert_eq!(p.get("reviews.books.svc.cluster.local:9080", "/name").await.status, 200);
    let r = p.send("reviews", "/a", "X-Deny: 1\r\n").await;
    assert_eq!((r.status, r.body.as_str()), (429, "no GET /a"));
    assert_eq!(up.requests(), 1);
    let end = tokio::time::Instant::now() + WAIT;
    loop {
        let seen = hook.0.lock().unwrap().clone();
        if seen.len() == 2 {
            assert_eq!(seen, ["200 - reviews.books.svc.cluster.local", "429 UAEX reviews"]);
            return;
        }
        assert!(tokio::time::Instant::now() < end, "{seen:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

struct Pipe(std::net::SocketAddr);

impl Dialer for Pipe {
    fn dial<'a>(
        &'a self,
        addr: &'a str,
        port: u16,
        _sni: &'a str,
    ) -> HookFuture<'a, std::io::Result<BoxedIo>> {
        Box::pin(async move {
            assert_eq!((addr, port), ("trunk:east", 15443));
            Ok(Box::new(tokio::net::TcpStream::connect(self.0).await?) as BoxedIo)
        })
    }
}

#[tokio::test]
async fn trunk_addresses_go_through_the_dialer() {
    let up = Upstream::new("up").await;
    let hooks = Hooks { dialer: Some(Arc::new(Pipe(up.address))), ..Hooks::default() };
    let mut c = cluster("up", &[up.address]);
    if let Discovery::Static(a) = &mut c.discovery {
        a.localities[0].endpoints[0].address = "trunk:east".into();
        a.localities[0].endpoints[0].port = 15443;
    }
    let http = listener(
        Direction::Outbound,
        vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
    );
    let p = Proxy::with(EngineOptions::default(), hooks).cluster(c.clone()).listener(http).run();
    assert_eq!(p.get("a", "/name").await.body, "up");
    let none = Proxy::new()
        .cluster(c)
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
        ))
        .run();
    assert_eq!(none.get("a", "/name").await.status, 503);
}

#[tokio::test]
async fn access_logs_have_istios_line() {
    let up = Upstream::new("up").await;
    let dir = tempfile::tempdir().unwrap();
    let (text, json) = (dir.path().join("text.log"), dir.path().join("json.log"));
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
    m.access_log = vec![
        AccessLog::File(FileLog {
            path: text.to_str().unwrap().into(),
            format: AccessLogFormat::Text(String::new()),
            omit_empty: false,
        }),
        AccessLog::File(FileLog {
            path: json.to_str().unwrap().into(),
            format: AccessLogFormat::Json(
                [
                    ("code".to_owned(), "%RESPONSE_CODE%".to_owned()),
                    ("path".to_owned(), "%REQ(:PATH)%".to_owned()),
                ]
                .into(),
            ),
            omit_empty: false,
        }),
    ];
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(Direction::Outbound, vec![http_chain(m)]))
        .run();
    p.send("reviews", "/a?b", "User-Agent: test \"quoted\"\r\n").await;
    let end = tokio::time::Instant::now() + WAIT;
    loop {
        let t = std::fs::read_to_string(&text).unwrap_or_default();
        let line = std::fs::read_to_string(&json).unwrap_or_default();
        if t.ends_with('\n') && line.ends_with('\n') {
            assert!(t.contains("\"GET /a?b HTTP/1.1\" 200 - via_upstream - \"-\" 0 "), "{t}");
            assert!(
                t.contains("\"test \\\"quoted\\\"\"") && t.contains(&format!("\"{}\" up", up.address)),
                "{t}"
            );
            assert!(t.trim_end().ends_with(" default"), "{t}");
            let j: serde_json::Value = serde_json::from_str(line.trim()).unwrap();
            assert_eq!((&j["code"], &j["path"]), (&200.into(), &"/a?b".into()));
            return;
        }
        assert!(tokio::time::Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn names_are_resolved() {
    let up = Upstream::new("up").await;
    let mut a = assignment(&[up.address]);
    a.localities[0].endpoints[0].address = "localhost".into();
    let c = Cluster { discovery: Discovery::StrictDns(a), ..cluster("up", &[]) };
    let p = Proxy::new()
        .cluster(c)
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
        ))
        .run();
    let end = tokio::time::Instant::now() + WAIT;
    while p.get("a", "/name").await.status != 200 {
        assert!(tokio::time::Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let up = Upstream::new("up").await;
    let options = EngineOptions { max_connections: 1, ..EngineOptions::default() };
    let p = Proxy::with(options, Hooks::default())
        .cluster(cluster("up", &[up.address]))
        .listener(listener(
            Direction::Outbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
        ))
        .run();
    let mut first = p.connect("l").await;
    first.write_all(b"GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    read_until(&mut first, "up").await;
    let mut second = p.connect("l").await;
    second.write_all(b"GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut b = [0; 1];
    assert!(tokio::time::timeout(Duration::from_millis(100), second.read(&mut b)).await.is_err());
    drop(first);
    read_until(&mut second, "up").await;
}

/// Whether a connection was closed instead of served.
async fn is_closed(s: &mut tokio::net::TcpStream) -> bool {
    // It may be closed before all of it is written.
    let _ = s.write_all(b"GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut b = [0; 1];
    !matches!(tokio::time::timeout(WAIT, s.read(&mut b)).await.expect("an end or an answer"), Ok(1))
}

#[tokio::test]
async fn connections_beyond_the_limit_of_all_workers_are_closed() {
    let up = Upstream::new("up").await;
    let options = EngineOptions { workers: 3, max_total_connections: Some(2), ..EngineOptions::default() };
    let l = |name: &str| {
        let chain = http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]));
        Listener { name: name.into(), ..listener(Direction::Outbound, vec![chain]) }
    };
    let p = Proxy::with(options, Hooks::default())
        .cluster(cluster("up", &[up.address]))
        .listener(l("l"))
        .listener(l("m"))
        .run();
    let (mut first, mut second) = (p.connect("l").await, p.connect("m").await);
    assert!(!is_closed(&mut first).await && !is_closed(&mut second).await);
    for name in ["l", "m", "l", "m"] {
        assert!(is_closed(&mut p.connect(name).await).await);
    }
    assert_eq!(p.engine.status().connections_refused, 4);
    drop(first);
    let end = tokio::time::Instant::now() + WAIT;
    while is_closed(&mut p.connect("m").await).await {
        assert!(tokio::time::Instant::now() < end, "a place is free again");
    }
}

#[tokio::test]
async fn a_listener_has_as_many_connections_as_it_may() {
    let up = Upstream::new("up").await;
    let chain = |port| {
        let mut c = http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]));
        c.matches.source_prefixes = if port { vec!["192.0.2.0/24".parse().unwrap()] } else { vec![] };
        c
    };
    let with = |limit| Listener {
        max_connections: limit,
        ..listener(Direction::Outbound, vec![chain(false), chain(true)])
    };
    let mut p = Proxy::with(EngineOptions { workers: 2, ..EngineOptions::default() }, Hooks::default())
        .cluster(cluster("up", &[up.address]))
        .listener(with(None))
        .listener(Listener { name: "other".into(), ..with(Some(1)) })
        .run();
    let mut first = p.connect("l").await;
    assert!(!is_closed(&mut first).await);
    // Those from before count.
    let mut limit = |n| {
        p.snap.listeners.insert("l".into(), with(n).into());
        assert_eq!(p.apply().rejected, []);
        p.address("l")
    };
    let at = limit(Some(2));
    let mut second = tokio::net::TcpStream::connect(at).await.unwrap();
    assert!(!is_closed(&mut second).await);
    assert!(is_closed(&mut tokio::net::TcpStream::connect(at).await.unwrap()).await);
    // Each listener has its own.
    let at = limit(None);
    assert!(!is_closed(&mut tokio::net::TcpStream::connect(at).await.unwrap()).await);
    let mut other = p.connect("other").await;
    assert!(!is_closed(&mut other).await);
    assert!(is_closed(&mut p.connect("other").await).await);
    drop(other);
    let end = tokio::time::Instant::now() + WAIT;
    while is_closed(&mut p.connect("other").await).await {
        assert!(tokio::time::Instant::now() < end, "a place is free again");
    }
}

#[tokio::test]
async fn a_switch_to_strict_ends_plain_text() {
    let up = Upstream::new("up").await;
    let http = |transport| {
        let mut c = http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]));
        c.matches.transport_protocol = transport;
        c
    };
    let mut tls = http(Some(TransportProtocol::Tls));
    tls.tls = Some(downstream_mtls());
    let plain = http(Some(TransportProtocol::RawBuffer));
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(Direction::Inbound, vec![tls.clone(), plain]))
        .run();
    let mut s = p.connect("l").await;
    s.write_all(b"GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    read_until(&mut s, "up").await;
    let mut l = listener(Direction::Inbound, vec![tls]);
    l.address = p.address("l");
    let p = p.listener(l).run();
    assert_eq!(read_all(&mut s).await, "", "the open connection ends");
    assert_eq!(p.raw("l", "GET /name HTTP/1.1\r\nHost: a\r\n\r\n").await, "");
}

#[tokio::test]
async fn redirected_connections_go_to_the_listener_of_their_destination() {
    let (own, exact) = (Upstream::new("own").await, Upstream::new("other").await);
    let to = |name: &str| vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward(name))])]))];
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut main = listener(Direction::Outbound, to("own"));
    main.use_original_dst = true;
    main.address = free;
    let p = Proxy::new()
        .cluster(cluster("own", &[own.address]))
        .cluster(cluster("other", &[exact.address]))
        .listener(main)
        .run();
    assert_eq!(p.get("a", "/name").await.body, "own");
    // Without redirection the original destination is the address itself; any address with that port takes it.
    let mut any = listener(Direction::Outbound, to("other"));
    any.name = "any".into();
    any.bind_to_port = false;
    any.address = std::net::SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), free.port());
    let p = p.listener(any).run();
    assert_eq!(p.get("a", "/name").await.body, "other");
}
