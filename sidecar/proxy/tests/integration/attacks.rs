//! Attacks on what policies look at: the policy and the server must see the same thing.
//!
//! Attacks on framing are the table of refusals, those on resources are floods.

use std::{sync::Arc, time::Duration};

use mesh_model::proxy::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    refusals::raw_h2::{self as h2, Outcome, RawH2},
    support::*,
};

fn deny(permission: Permission) -> HttpFilter {
    let policy = RbacPolicy { permissions: vec![permission], principals: vec![Principal::Any] };
    HttpFilter::Rbac(Rbac {
        rules: Some(RbacRules { action: RbacAction::Deny, policies: [("p".to_owned(), policy)].into() }),
        ..Rbac::default()
    })
}

/// A path as a server reads it that decodes everything, turns backslashes, merges slashes and resolves dots.
fn leniently(path: &str) -> String {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let mut text = path.to_owned();
    // Twice encoded is twice decoded by the most careless of all.
    for _ in 0..2 {
        for (from, to) in [
            ("%2f", "/"),
            ("%5c", "\\"),
            ("%2e", "."),
            ("%61", "a"),
            ("%64", "d"),
            ("%00", ""),
            ("%3b", ";"),
            ("%25", "%"),
        ] {
            text = text.replace(from, to).replace(&from.to_uppercase(), to);
        }
    }
    let mut out: Vec<&str> = Vec::new();
    let text = text.replace('\\', "/");
    for s in text.split('/') {
        match s.split(';').next().unwrap_or_default() {
            "" | "." => {}
            ".." => {
                out.pop();
            }
            s => out.push(s),
        }
    }
    format!("/{}", out.join("/"))
}

/// Spellings of `/admin`.
const SPELLINGS: [&str; 27] = [
    "/admin",
    "/admin/",
    "/admin?x",
    "/admin/x",
    "/admin;x",
    "/admin;a=b/x",
    "/./admin",
    "/a/../admin",
    "/a/./../admin",
    "/%61dmin",
    "/%61%64min",
    "//admin",
    "/a//../admin",
    "/%2e/admin",
    "/a/%2e%2e/admin",
    "/a/%2E./admin",
    "/a\\..\\admin",
    "/%2fadmin",
    "/%2Fadmin",
    "/a%2f..%2fadmin",
    "/a%5c..%5cadmin",
    "/admin%00",
    "/adm%69n%2f",
    "/..;/admin",
    "/admin%2fx",
    "http://h/admin",
    "HTTP://h/a/../admin",
];

#[tokio::test]
async fn a_policy_and_the_server_see_one_path() {
    let up = Upstream::new("up").await;
    for (merge, escaped, what) in [
        (false, EscapedSlashes::Reject, "unset"),
        (true, EscapedSlashes::Reject, "merging"),
        (true, EscapedSlashes::UnescapeAndForward, "decoding and merging"),
    ] {
        let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
        (m.merge_slashes, m.escaped_slashes) = (merge, escaped);
        m.filters = vec![deny(Permission::Path(StringMatch::prefix("/admin")))];
        let p = Proxy::new()
            .cluster(cluster("up", &[up.address]))
            .listener(listener(Direction::Inbound, vec![http_chain(m)]))
            .run();
        let (mut denied, mut refused, mut served) = (0, 0, vec![]);
        for path in SPELLINGS {
            let raw = format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
            let r = Response::parse(&p.raw("l", &raw).await);
            match r.status {
                403 => denied += 1,
                400 => refused += 1,
                200 => {
                    let seen = r.body.split(' ').nth(2).unwrap_or_default().to_owned();
                    // What only a server can know: parameters of segments, and, unless they are merged, slashes.
                    let excused =
                        seen.contains("..;") || (!merge && seen.contains("//")) || seen.contains("%69");
                    assert!(
                        excused || !leniently(&seen).starts_with("/admin"),
                        "{what}: {path} got through as {seen}"
                    );
                    served.push(seen);
                }
                other => panic!("{what}: {path}: {other}"),
            }
        }
        println!("  {what}: {denied} denied, {refused} refused, served: {served:?}");
        assert!(denied >= 14 && served.len() <= 3, "{what}: {denied} denied, served: {served:?}");
    }
}

#[tokio::test]
async fn a_path_with_escaped_slashes_may_be_sent_back() {
    let up = Upstream::new("up").await;
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
    m.escaped_slashes = EscapedSlashes::UnescapeAndRedirect;
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(Direction::Inbound, vec![http_chain(m)]))
        .run();
    let r = p.get("h", "/a%2Fb?x=%2F").await;
    assert_eq!((r.status, r.header("location")), (307, Some("/a/b?x=%2F")));
    assert_eq!((p.get("h", "/a/b").await.status, up.requests()), (200, 1));
}

#[tokio::test]
async fn hosts_in_other_spellings_meet_the_policy_or_no_route() {
    let up = Upstream::new("up").await;
    let mut m = inline(vec![vhost(&["admin.example"], vec![route(forward("up"))])]);
    let host = HeaderMatch {
        name: ":authority".into(),
        value: HeaderValueMatch::Value(StringMatch {
            ignore_case: true,
            ..StringMatch::exact("admin.example")
        }),
        invert: false,
        missing_is_empty: false,
    };
    m.filters = vec![deny(Permission::Header(host))];
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(Direction::Inbound, vec![http_chain(m)]))
        .run();
    for (host, want) in [
        ("admin.example", 403),
        ("ADMIN.example", 403),
        ("admin.example.", 404),
        ("admin.example:80", 404),
        ("x.admin.example", 404),
        ("admin.example%2e", 404),
    ] {
        assert_eq!(p.get(host, "/").await.status, want, "{host}");
    }
    // The authority of the target wins over a Host that says something else.
    let raw = "GET http://admin.example/ HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n";
    assert_eq!(Response::parse(&p.raw("l", raw).await).status, 403);
    assert_eq!(up.requests(), 0);
}

#[tokio::test]
async fn what_strangers_claim_is_not_passed_on() {
    let up = Upstream::new("up").await;
    let forged = "X-Envoy-Internal: true\r\nX-Envoy-Original-Path: /x\r\nX-Envoy-Retry-On: 5xx\r\nX-Forwarded-Proto: https\r\n\
                  X-Forwarded-Client-Cert: URI=spiffe://evil\r\nX-Request-Id: forged\r\nX_Forwarded_Client_Cert: \
                  URI=spiffe://evil\r\nx_envoy_internal: true\r\nX-Forwarded_For: 9.9.9.9\r\nx_custom: stays\r\n";
    let run = |edge: bool| {
        let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
        m.use_remote_address = edge;
        m.forward_client_cert = ForwardClientCert::SanitizeSet;
        let d = if edge { Direction::Unspecified } else { Direction::Inbound };
        Proxy::new().cluster(cluster("up", &[up.address])).listener(listener(d, vec![http_chain(m)])).run()
    };
    for edge in [true, false] {
        let body = run(edge).send("h", "/", forged).await.body.to_ascii_lowercase();
        assert!(body.contains("x_custom: stays\n"), "{body}");
        for (claim, inside_too) in [
            ("spiffe://evil", true),
            ("x_envoy", true),
            ("9.9.9.9", true),
            ("x-envoy-internal", false),
            ("x-envoy-original-path", false),
            ("x-forwarded-proto: https", false),
            ("x-request-id: forged", false),
        ] {
            if edge || inside_too {
                assert!(!body.contains(claim), "{claim} (edge: {edge}): {body}");
            }
        }
    }
}

#[tokio::test]
async fn absurd_timeouts_of_a_client_are_no_ones_problem() {
    let up = Upstream::new("up").await;
    let limit = StreamLimit { grpc_timeout_max: Some(Duration::from_secs(30)), ..StreamLimit::default() };
    let f = Forward { max_stream: Some(limit), ..forward("up") };
    let p = Proxy::new()
        .cluster(Cluster { http: UpstreamHttp::Http2, ..cluster("up", &[up.address]) })
        .listener(listener(Direction::Inbound, vec![http_chain(inline(vec![vhost(&["*"], vec![route(f)])]))]))
        .run();
    for value in ["99999999H", "0n", "-1S", "18446744073709551616S", "1", "S", "1X", ""] {
        let headers = format!("te: trailers\r\ncontent-type: application/grpc\r\ngrpc-timeout: {value}\r\n");
        let r = p.send("h", "/a", &headers).await;
        assert_eq!(r.status, 200, "{value}: {r:?}");
        let r = p.send("h", "/a", &format!("x-envoy-upstream-rq-timeout-ms: {value}\r\n")).await;
        assert!([200, 504].contains(&r.status), "{value}: {r:?}");
    }
}

#[tokio::test]
async fn a_server_that_allows_no_streams_costs_its_own_requests_alone() {
    // Settings that allow none, then silence.
    let stingy = raw_server(|mut s, _| async move {
        let mut settings = h2::frame(h2::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 0]);
        settings.extend(h2::frame(h2::SETTINGS, 1, 0, &[]));
        let _ = s.write_all(&settings).await;
        let mut buf = [0; 1024];
        while s.read(&mut buf).await.is_ok_and(|n| n > 0) {}
    })
    .await;
    let up = Upstream::new("up").await;
    let mut limited = route(Forward { timeout: Some(Duration::from_millis(500)), ..forward("stingy") });
    limited.matches.path = PathMatch::Prefix("/stingy".into());
    let p = Proxy::new()
        .cluster(Cluster { http: UpstreamHttp::Http2, ..cluster("stingy", &[stingy]) })
        .cluster(cluster("up", &[up.address]))
        .listener(listener(
            Direction::Inbound,
            vec![http_chain(inline(vec![vhost(&["*"], vec![limited, route(forward("up"))])]))],
        ))
        .run();
    let all = (0..20).map(|_| p.get("h", "/stingy"));
    let (answers, other) = tokio::join!(futures::future::join_all(all), p.get("h", "/name"));
    assert!(answers.iter().all(|r| [503, 504].contains(&r.status)), "{answers:?}");
    assert_eq!((other.status, other.body.as_str()), (200, "up"));
    // Nothing is left behind.
    let end = tokio::time::Instant::now() + Duration::from_secs(5);
    while p.engine.status().requests > 0 {
        assert!(tokio::time::Instant::now() < end, "{:?}", p.engine.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn bytes_that_are_no_text_reach_an_authoriser_as_what_they_are() {
    let up = Upstream::new("up").await;
    let authz = crate::ext_authz::server(|r| {
        // A message that is not UTF-8 where it must be is no message to most readers.
        let text = String::from_utf8_lossy(r.body()).into_owned();
        let denied = text.contains("evil") || !text.contains("x-raw");
        crate::ext_authz::grpc(&crate::ext_authz::field(1, if denied { &[8, 7] } else { &[] }))
    })
    .await;
    let mut m = inline(vec![vhost(&["*"], vec![route(forward("up"))])]);
    m.filters = vec![HttpFilter::ExtAuthz(Arc::new(ExtAuthz {
        service: AuthzService::Grpc(GrpcService {
            cluster: "authz".into(),
            timeout: Some(Duration::from_secs(2)),
            ..GrpcService::default()
        }),
        ..ExtAuthz::default()
    }))];
    let p = Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .cluster(Cluster { http: UpstreamHttp::Http2, ..cluster("authz", &[authz]) })
        .listener(listener(Direction::Inbound, vec![http_chain(m)]))
        .run();
    let mut c = RawH2::open(p.address("l")).await;
    for (stream, value, want) in [(1u32, &b"\xff\xfeevil"[..], 403), (3, &b"\xff\xfe"[..], 200)] {
        let head = h2::block(&[
            (b":method", b"GET"),
            (b":scheme", b"http"),
            (b":path", b"/"),
            (b":authority", b"h"),
            (b"x-raw", value),
        ]);
        c.send(&h2::frame(h2::HEADERS, h2::END_HEADERS | h2::END_STREAM, stream, &head)).await;
        let got = c.outcome(stream, WAIT).await;
        assert!(matches!(got, Outcome::Status(s, _) if s == want), "{value:?}: {}", got.name());
    }
}
