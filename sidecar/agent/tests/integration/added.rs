//! Headers that a proxy adds, and limits of its connections and requests: as Envoy has them.

use std::time::Duration;

use mesh_model::proxy::*;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::side_by_side::{Pair, cluster, complete, manager, route, server, to_up};

/// What is looked at, of all that reaches the server.
const SEEN: [&str; 9] = [
    "x-envoy-attempt-count",
    "x-envoy-original-path",
    "x-envoy-expected-rq-timeout-ms",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-request-id",
    "host",
    "a_b",
    "a-b",
];

async fn pair(change: impl Fn(&mut HttpConnectionManager, &mut VirtualHost)) -> Pair {
    let up = server(|r| {
        let mut all: Vec<String> = r
            .lines()
            .filter_map(|l| l.split_once(':'))
            .map(|(n, v)| (n.to_ascii_lowercase(), v.trim()))
            .filter(|(n, _)| SEEN.contains(&n.as_str()))
            .map(|(n, v)| match n.as_str() {
                // Of a proxy's own it is another one each time.
                "x-request-id" if v != "own" => format!("{n}=made"),
                _ => format!("{n}={v}"),
            })
            .collect();
        all.sort();
        (200, String::new(), all.join("; "))
    })
    .await;
    let rewriting = Forward {
        prefix_rewrite: Some("/new".into()),
        host_rewrite: Some("other".into()),
        timeout: Some(Duration::from_secs(15)),
        ..to_up()
    };
    let mut m = manager(vec![], vec![route(rewriting, RouteFilters::default())]);
    let RouteSource::Inline(r) = &m.routes else { panic!() };
    let mut routes = (**r).clone();
    change(&mut m, &mut routes.virtual_hosts[0]);
    m.routes = RouteSource::Inline(routes.into());
    Pair::new(m, vec![cluster("up", up, UpstreamHttp::Http1)]).await
}

fn forward(v: &mut VirtualHost) -> &mut Forward {
    let RouteAction::Forward(f) = &mut v.routes[0].action else { panic!() };
    f
}

/// Asks both; ports of their own are none that can be compared.
async fn alike(p: &Pair, what: &str, headers: &str) -> (String, bool) {
    let request = format!("GET /a HTTP/1.1\r\nHost: first\r\nConnection: close\r\n{headers}\r\n");
    let (ours, theirs) = p.ask(&request).await;
    let seen = |a: &crate::side_by_side::Answer, port: u16| {
        let body = String::from_utf8_lossy(&a.body).replace(&format!("port={port}"), "port=own");
        (a.status, body, a.headers.contains_key("x-envoy-upstream-service-time"))
    };
    let (ours, theirs) = (seen(&ours, p.engine.port()), seen(&theirs, p.envoy.port()));
    assert_eq!(ours, theirs, "{what}, {headers:?}: ours, then Envoy's");
    (ours.1, ours.2)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn headers_that_proxies_add() {
    for edge in [false, true] {
        for hops in [0, 1] {
            let p = pair(|m, v| {
                (m.use_remote_address, m.trusted_hops) = (edge, hops);
                m.headers.forwarded_port = true;
                v.attempt_count = true;
                forward(v).forwarded_host = true;
            })
            .await;
            for said in [
                "",
                "x-forwarded-port: 4\r\n",
                "x-forwarded-host: first\r\n",
                "x-forwarded-host: a, first\r\n",
                "x-forwarded-host: first, b\r\nx-envoy-attempt-count: 7\r\n",
                "x-request-id: own\r\n",
            ] {
                let (seen, timed) = alike(&p, &format!("edge {edge}, {hops} hops"), said).await;
                assert!(timed && seen.contains("x-envoy-attempt-count=1"), "{seen}");
                assert!(seen.contains("host=") && seen.contains("x-envoy-original-path=/a"), "{seen}");
                let theirs = said.contains("x-forwarded-port") && (!edge || hops > 0);
                assert_eq!(seen.contains("x-forwarded-port=own"), !theirs, "{seen}");
            }
        }
        let p = pair(|m, _| {
            m.use_remote_address = edge;
            (m.headers.request_id, m.headers.suppress_envoy) = (false, true);
        })
        .await;
        // At an edge ours believes no stranger's `x-envoy-`; Envoy passes some of them on.
        let counted = if edge { "" } else { "x-envoy-attempt-count: 7\r\n" };
        for said in ["", "x-request-id: own\r\n", counted] {
            let (seen, timed) = alike(&p, &format!("nothing added, edge {edge}"), said).await;
            assert!(!timed && !seen.contains("original-path") && !seen.contains("timeout"), "{seen}");
            assert!(!seen.contains("x-request-id=made"), "{seen}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn names_with_underscores() {
    for (what, status, seen) in [
        (Underscores::Allow, 200, "a-b=2; a_b=1"),
        (Underscores::Drop, 200, "a-b=2"),
        (Underscores::Reject, 400, ""),
    ] {
        let p = pair(|m, _| m.limits.underscores = what).await;
        let request = "GET /a HTTP/1.1\r\nHost: first\r\nConnection: close\r\na_b: 1\r\na-b: 2\r\n\r\n";
        let (ours, theirs) = p.ask(request).await;
        for a in [&ours, &theirs] {
            let body = String::from_utf8_lossy(&a.body);
            assert!(
                a.status == status && (seen.is_empty() || body.starts_with(&format!("{seen}; host"))),
                "{what:?}: {a:?}"
            );
        }
    }
}

/// Bytes that have come; none when the connection has ended.
async fn read(s: &mut TcpStream, got: &mut Vec<u8>) -> usize {
    tokio::time::timeout(Duration::from_secs(20), s.read_buf(got)).await.expect("it ends").unwrap_or(0)
}

/// What a proxy answers to the first half of a request, and after how long the connection has ended.
async fn half(to: std::net::SocketAddr, first: &str) -> (String, Duration) {
    let begun = tokio::time::Instant::now();
    let mut s = TcpStream::connect(to).await.unwrap();
    s.write_all(first.as_bytes()).await.unwrap();
    let mut got = Vec::new();
    let mut answered = None;
    // Envoy keeps the connection open for a moment.
    while tokio::time::timeout(Duration::from_secs(20), s.read_buf(&mut got)).await.unwrap().unwrap_or(0) > 0
    {
        answered.get_or_insert(begun.elapsed());
    }
    (String::from_utf8_lossy(&got).into_owned(), answered.unwrap_or(begun.elapsed()))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn requests_that_do_not_arrive_whole() {
    let p = pair(|m, _| m.limits.request_timeout = Some(Duration::from_millis(400))).await;
    for to in [p.engine, p.envoy] {
        let (got, after) = half(to, "POST /a HTTP/1.1\r\nHost: first\r\nContent-Length: 9\r\n\r\nabc").await;
        assert!(got.starts_with("HTTP/1.1 408 ") && got.ends_with("request timeout"), "{got:?}");
        // Envoy's clock of timers is a coarse one.
        assert!(after >= Duration::from_millis(350), "{after:?}");
    }
    // Who has sent all of it may wait.
    let slow = pair(|m, _| m.limits.request_timeout = Some(Duration::from_millis(1))).await;
    let whole = "POST /a HTTP/1.1\r\nHost: first\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc";
    assert_eq!(slow.alike(whole, &[]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn connections_that_are_too_old() {
    // Envoy's clock of timers is a coarse one.
    const EARLIEST: Duration = Duration::from_millis(450);
    let p = pair(|m, _| {
        m.limits.max_connection_duration = Some(Duration::from_millis(500));
    })
    .await;
    for to in [p.engine, p.envoy] {
        let begun = tokio::time::Instant::now();
        let mut s = TcpStream::connect(to).await.unwrap();
        let (mut answers, mut got) = (0, Vec::new());
        loop {
            if s.write_all(b"GET /a HTTP/1.1\r\nHost: first\r\n\r\n").await.is_err() {
                break;
            }
            got.clear();
            while !complete(&got) && read(&mut s, &mut got).await > 0 {}
            if got.is_empty() {
                break;
            }
            answers += 1;
            let closes = String::from_utf8_lossy(&got).to_ascii_lowercase().contains("connection: close");
            assert!(!closes || begun.elapsed() >= EARLIEST, "{:?}", begun.elapsed());
            if closes {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(answers > 3 && begun.elapsed() >= EARLIEST, "{answers}");
        assert!(begun.elapsed() < Duration::from_secs(10));
        // And one on which nothing comes.
        let mut s = TcpStream::connect(to).await.unwrap();
        let idle = tokio::time::Instant::now();
        assert_eq!(read(&mut s, &mut got).await, 0);
        let lived = idle.elapsed();
        assert!(lived >= EARLIEST && lived < Duration::from_secs(10), "{lived:?}");
    }
}
