//! Policies of destinations: what Envoy does with its connections and answers, the engine does.

use std::time::Duration;

use mesh_model::proxy::*;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::side_by_side::{Pair, cluster, manager, route, server, to_up};

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: books.example\r\nConnection: close\r\n{headers}\r\n")
}

/// Answers `/N` with status N.
async fn statuses() -> std::net::SocketAddr {
    server(|r| {
        let status = r.split(' ').nth(1).unwrap().trim_start_matches('/').parse().unwrap();
        (status, String::new(), "x".into())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn named_statuses_eject() {
    let mut c = cluster("up", statuses().await, UpstreamHttp::Http1);
    c.outlier = Some(Box::new(OutlierDetection {
        consecutive_5xx: 2,
        base_ejection: Duration::from_secs(60),
        max_percent: 100,
        error_codes: vec![429, 418],
        ..OutlierDetection::default()
    }));
    c.panic_threshold = 0;
    let p = Pair::new(manager(vec![], vec![route(to_up(), RouteFilters::default())]), vec![c]).await;
    // A success in between begins anew, and so does a 500, which is no error here.
    for path in ["/500", "/500", "/429", "/500", "/429", "/200", "/418"] {
        assert_ne!(p.alike(&get(path, ""), &[]).await.body, b"no healthy upstream");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    p.alike(&get("/429", ""), &[]).await;
    // Envoy ejects on another thread.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let gone = p.alike(&get("/200", ""), &[]).await;
    assert_eq!(gone.status, 503, "ejected by both");
}

/// What policies of action LOG, and shadow rules, say of connections is for their logs.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn connections_are_noted_for_loggers() {
    let up = statuses().await;
    let rules = |action, port: u16| RbacRules {
        action,
        policies: [(
            "p".to_owned(),
            RbacPolicy {
                permissions: vec![Permission::Not(Box::new(Permission::DestinationPort(port)))],
                principals: vec![Principal::Any],
            },
        )]
        .into(),
    };
    let any_port = 1;
    let dir = tempfile::tempdir().unwrap();
    for (n, (audited, shadow, wanted)) in [
        (true, None, "true - - -"),
        (false, None, "false - - -"),
        (true, Some(RbacAction::Deny), "true - denied p"),
        (false, Some(RbacAction::Allow), "false - allowed p"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("{n}.log")).display().to_string();
        let operators = "%DYNAMIC_METADATA(envoy.common:access_log_hint)% %RESPONSE_FLAGS% \
            %DYNAMIC_METADATA(envoy.filters.network.rbac:shadow_engine_result)% \
            %DYNAMIC_METADATA(envoy.filters.network.rbac:shadow_effective_policy_id)% %DOWNSTREAM_LOCAL_ADDRESS%\n";
        let log = AccessLog::File(FileLog {
            path: path.clone(),
            format: AccessLogFormat::Text(operators.into()),
            omit_empty: false,
        });
        let mut log_rules = rules(RbacAction::Log, any_port);
        if !audited {
            // Nobody has this address.
            let none = vec![Principal::DirectRemoteIp("192.0.2.1/32".parse().unwrap())];
            log_rules.policies.get_mut("p").unwrap().principals = none;
        }
        let rbac = Rbac {
            rules: Some(log_rules),
            shadow: shadow.map(|a| rules(a, any_port)),
            stat_prefix: "tcp.".into(),
            ..Rbac::default()
        };
        let tcp = TcpProxy {
            stat_prefix: "t".into(),
            clusters: vec![WeightedCluster::only("up")],
            idle_timeout: None,
            max_duration: None,
            access_log: vec![log],
            tunnel: None,
            on_demand: None,
            names: None,
        };
        let filters = vec![NetworkFilter::Rbac(rbac), NetworkFilter::Tcp(tcp)];
        let p = Pair::filtered(filters, vec![cluster("up", up, UpstreamHttp::Http1)]).await;
        // Both write to the file, and say who they are.
        p.ask(&get("/200", "")).await;
        let lines = async |of: std::net::SocketAddr| loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            if let Some(l) = text.lines().find_map(|l| l.strip_suffix(&format!(" {of}"))) {
                return l.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let both = async { (lines(p.engine).await, lines(p.envoy).await) };
        let both = tokio::time::timeout(Duration::from_secs(20), both).await;
        let (ours, theirs) = both.unwrap_or_else(|_| panic!("{:?}", std::fs::read_to_string(&path)));
        assert_eq!((ours.as_str(), theirs.as_str()), (wanted, wanted));
    }
}

/// What is beyond a listener's limit is closed, and has its place when another has gone.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn connections_beyond_a_listeners_limit() {
    let up = crate::process::echo().await;
    let tcp = TcpProxy {
        stat_prefix: "t".into(),
        clusters: vec![WeightedCluster::only("up")],
        idle_timeout: None,
        max_duration: None,
        access_log: vec![],
        tunnel: None,
        on_demand: None,
        names: None,
    };
    let p = Pair::limited(tcp, 2, vec![cluster("up", up, UpstreamHttp::Http1)]).await;
    // `None` is one that was closed.
    let ask = async |s: &mut TcpStream| {
        let mut b = [0];
        s.write_all(b"x").await.ok()?;
        s.read_exact(&mut b).await.ok().map(|_| b)
    };
    for to in [p.engine, p.envoy] {
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        let placed = async || loop {
            let mut s = TcpStream::connect(to).await.unwrap();
            if ask(&mut s).await.is_some() {
                break s;
            }
            assert!(tokio::time::Instant::now() < end, "{to}: a place is free");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let (first, _second) = (placed().await, placed().await);
        for _ in 0..3 {
            assert_eq!(ask(&mut TcpStream::connect(to).await.unwrap()).await, None, "{to}");
        }
        drop(first);
        placed().await;
    }
}

/// A header that is not there, is there once, and is there twice.
const HEADERS: [&str; 7] = [
    "",
    "x-v: 1\r\n",
    "x-v: 2\r\n",
    "x-v: 1\r\nX-V: 2\r\n",
    "x-v: 2\r\nx-v: 1\r\n",
    "x-v: 1,2\r\n",
    "x-v: a\r\n",
];

/// Conditions on it, inverted or not, with a missing header empty or not. Each holds for some and not for others.
fn conditions() -> Vec<HeaderMatch> {
    let value = HeaderValueMatch::Value;
    let mut out = Vec::new();
    for m in [
        StringMatch::exact("2"),
        StringMatch::exact("1,2"),
        StringMatch::prefix("1"),
        StringMatch::regex("[0-9]*"),
    ] {
        for (invert, missing_is_empty) in [(false, false), (false, true), (true, false), (true, true)] {
            out.push(HeaderMatch { name: "x-v".into(), value: value(m.clone()), invert, missing_is_empty });
        }
    }
    for (there, invert) in [(true, false), (true, true), (false, false), (false, true)] {
        let value = HeaderValueMatch::Present(there);
        out.push(HeaderMatch { name: "x-v".into(), value, invert, missing_is_empty: false });
    }
    out
}

/// Asks for each of the headers, and says how many different answers there were.
async fn answers(p: &Pair) -> usize {
    let mut seen = std::collections::BTreeSet::new();
    for headers in HEADERS {
        seen.insert(p.alike(&get("/200", headers), &[]).await.status);
    }
    seen.len()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn repeated_headers_and_rules() {
    let up = statuses().await;
    for rule in conditions() {
        let policy = |p| RbacPolicy { permissions: vec![p], principals: vec![Principal::Any] };
        let plain = policy(Permission::Header(rule.clone()));
        let not = policy(Permission::Not(Box::new(Permission::Header(rule.clone()))));
        for (action, policy) in [(RbacAction::Deny, plain), (RbacAction::Allow, not)] {
            let rules = RbacRules { action, policies: [("p".into(), policy)].into() };
            let rbac = HttpFilter::Rbac(Rbac { rules: Some(rules), ..Rbac::default() });
            let m = manager(vec![rbac], vec![route(to_up(), RouteFilters::default())]);
            let p = Pair::new(m, vec![cluster("up", up, UpstreamHttp::Http1)]).await;
            assert_eq!(answers(&p).await, 2, "{action:?} {rule:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn repeated_headers_and_routes() {
    let up = statuses().await;
    for condition in conditions() {
        let mut first = route(Forward::default(), RouteFilters::default());
        first.matches.headers = vec![condition.clone()];
        first.action = RouteAction::Direct(DirectResponse { status: 207, body: vec![] });
        let routes = vec![first, route(to_up(), RouteFilters::default())];
        let p = Pair::new(manager(vec![], routes), vec![cluster("up", up, UpstreamHttp::Http1)]).await;
        assert_eq!(answers(&p).await, 2, "{condition:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn cookies_and_preflights() {
    let up = statuses().await;
    let mut c = cluster("up", up, UpstreamHttp::Http1);
    c.lb = LbPolicy::RingHash(1024);
    let attributes = vec![("SameSite".into(), "Lax".into()), ("Secure".into(), String::new())];
    let hash = |ttl| {
        vec![HashPolicy::Cookie { name: "s".into(), path: "/p".into(), ttl, attributes: attributes.clone() }]
    };
    let cors = |ignore_unmatched| {
        Some(Box::new(Cors {
            allow_origins: vec![StringMatch::exact("https://a.example")],
            allow_methods: "GET".into(),
            allow_headers: "x-a".into(),
            max_age: "60".into(),
            allow_credentials: true,
            ignore_unmatched,
            ..Cors::default()
        }))
    };
    for (ttl, ignore) in [(Duration::from_secs(60), true), (Duration::ZERO, false)] {
        let mut r = route(Forward { hash: hash(Some(ttl)), ..to_up() }, RouteFilters::default());
        r.cors = cors(ignore);
        let p = Pair::new(manager(vec![HttpFilter::Cors], vec![r]), vec![c.clone()]).await;
        let (ours, theirs) = p.ask(&get("/200", "")).await;
        let attributes = |a: &crate::side_by_side::Answer| {
            let cookie = a.headers.get("set-cookie").cloned().unwrap();
            cookie.split_once(';').unwrap().1.to_owned()
        };
        assert_eq!(attributes(&ours), attributes(&theirs));
        assert!(attributes(&ours).contains("SameSite=Lax"), "{ours:?}");
        let preflight = |origin: &str| {
            format!(
                "OPTIONS /202 HTTP/1.1\r\nHost: h\r\nConnection: close\r\nOrigin: {origin}\r\n\
                 Access-Control-Request-Method: GET\r\n\r\n"
            )
        };
        let headers =
            ["origin", "methods", "headers", "credentials"].map(|h| format!("access-control-allow-{h}"));
        let mut headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        headers.push("access-control-max-age");
        assert_eq!(p.alike(&preflight("https://a.example"), &headers).await.status, 200);
        let other = p.alike(&preflight("https://b.example"), &headers).await;
        assert_eq!(other.status, if ignore { 200 } else { 202 });
    }
}

/// A forward proxy that connects nowhere: it tells how it was asked, and then echoes in the framing that was asked for.
async fn forward_proxy() -> std::net::SocketAddr {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let a = l.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut s, _) = l.accept().await.unwrap();
            tokio::spawn(async move {
                let mut seen = Vec::new();
                while !seen.windows(4).any(|w| w == b"\r\n\r\n") {
                    if s.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let text = String::from_utf8_lossy(&seen).into_owned();
                let (head, rest) = text.split_once("\r\n\r\n").unwrap();
                let mut asked: Vec<&str> = head
                    .lines()
                    .filter(|l| {
                        let l = l.to_ascii_lowercase();
                        l.ends_with(" http/1.1")
                            || ["host:", "x-a:", "transfer-encoding:"].iter().any(|p| l.starts_with(p))
                    })
                    .collect();
                asked[1..].sort_unstable();
                let asked = asked.join("|").to_ascii_lowercase();
                let post = head.starts_with("POST");
                let body = if post {
                    let chunked = format!("{:x}\r\n{asked}\r\n", asked.len());
                    format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunked}")
                } else {
                    format!("HTTP/1.1 200 OK\r\n\r\n{asked}")
                };
                s.write_all(body.as_bytes()).await.unwrap();
                // What follows comes back as it came, chunks and all.
                s.write_all(rest.as_bytes()).await.unwrap();
                let mut buf = [0; 4096];
                while let Ok(n) = s.read(&mut buf).await {
                    if n == 0 || s.write_all(&buf[..n]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    a
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn tunnels_through_a_forward_proxy() {
    let proxy = forward_proxy().await;
    for (post, wanted) in [
        (false, "connect db.example:3306 http/1.1|host: db.example:3306|x-a: b"),
        (true, "post / http/1.1|host: db.example:3306|transfer-encoding: chunked|x-a: b"),
    ] {
        let tunnel = Some(Tunneling {
            hostname: "db.example:3306".into(),
            headers: vec![("x-a".into(), "b".into())],
            post,
        });
        let p = Pair::tcp(
            TcpProxy {
                stat_prefix: "t".into(),
                clusters: vec![WeightedCluster::only("up")],
                idle_timeout: None,
                max_duration: Some(Duration::from_secs(3)),
                access_log: vec![],
                tunnel,
                on_demand: None,
                names: None,
            },
            vec![cluster("up", proxy, UpstreamHttp::Http1)],
        )
        .await;
        let talk = async |to| {
            let mut s = TcpStream::connect(to).await.unwrap();
            s.write_all(b"ping").await.unwrap();
            let mut got = Vec::new();
            let begun = std::time::Instant::now();
            // Nobody ends it but the proxy, at the age that is configured.
            tokio::time::timeout(Duration::from_secs(15), s.read_to_end(&mut got)).await.unwrap().unwrap();
            (String::from_utf8_lossy(&got).into_owned(), begun.elapsed())
        };
        let (ours, theirs) = tokio::join!(talk(p.engine), talk(p.envoy));
        assert_eq!(ours.0, format!("{wanted}ping"));
        assert_eq!(ours.0, theirs.0);
        for took in [ours.1, theirs.1] {
            assert!((Duration::from_secs(2)..Duration::from_secs(8)).contains(&took), "{took:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn connections_of_an_age_serve_no_more() {
    // Each connection has a number.
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let up = l.local_addr().unwrap();
    tokio::spawn(async move {
        for n in 0u32.. {
            let (mut s, _) = l.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut seen, body) = (Vec::new(), n.to_string());
                while s.read_buf(&mut seen).await.unwrap_or(0) > 0 {
                    if seen.ends_with(b"\r\n\r\n") {
                        seen.clear();
                        let r = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                        let _ = s.write_all(r.as_bytes()).await;
                    }
                }
            });
        }
    });
    let mut c = cluster("up", up, UpstreamHttp::Http1);
    c.max_connection_duration = Some(Duration::from_secs(1));
    c.keepalive = Some(TcpKeepalive {
        time: Duration::from_secs(9),
        interval: Some(Duration::from_secs(3)),
        probes: Some(2),
    });
    let p = Pair::new(manager(vec![], vec![route(to_up(), RouteFilters::default())]), vec![c]).await;
    let (ours, theirs) = p.ask(&get("/", "")).await;
    assert_ne!(ours.body, theirs.body);
    let again = p.ask(&get("/", "")).await;
    assert_eq!((&again.0.body, &again.1.body), (&ours.body, &theirs.body), "the connection is kept");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let late = p.ask(&get("/", "")).await;
    assert_ne!(late.0.body, ours.body);
    assert_ne!(late.1.body, theirs.body);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn weights_follow_reports() {
    let up = |name: &'static str, utilization: &'static str| {
        server(move |_| {
            let report = format!(
                "endpoint-load-metrics: TEXT rps_fractional=1000,named_metrics.gpu={utilization}\r\n"
            );
            (200, report, name.into())
        })
    };
    let (a, b) = (up("a", "0.1").await, up("b", "0.4").await);
    let mut c = cluster("up", a, UpstreamHttp::Http1);
    let Discovery::Static(all) = &mut c.discovery else { unreachable!() };
    let mut second = all.localities[0].endpoints[0].clone();
    second.port = b.port();
    all.localities[0].endpoints.push(second);
    c.lb = LbPolicy::Utilization;
    c.utilization = Some(Box::new(UtilizationLb {
        metrics: vec!["named_metrics.gpu".into()],
        blackout: Duration::ZERO,
        update: Duration::from_millis(100),
        ..UtilizationLb::default()
    }));
    let p = Pair::new(manager(vec![], vec![route(to_up(), RouteFilters::default())]), vec![c]).await;
    for _ in 0..10 {
        p.ask(&get("/", "")).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (mut ours, mut theirs) = (0, 0);
    for _ in 0..200 {
        let (o, t) = p.ask(&get("/", "")).await;
        ours += usize::from(o.body == b"a");
        theirs += usize::from(t.body == b"a");
    }
    // Four of five.
    for first in [ours, theirs] {
        assert!((140..=180).contains(&first), "ours {ours}, Envoy's {theirs}");
    }
}
