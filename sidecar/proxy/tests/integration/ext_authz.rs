//! External authorization over HTTP and gRPC.

use std::{collections::BTreeMap, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{Request, Response, body::Incoming};
use mesh_model::proxy::*;
use tokio::net::TcpListener;

use crate::support::{Response as Answer, *};

/// An HTTP/1 and HTTP/2 server.
pub(crate) async fn server<F>(f: F) -> SocketAddr
where
    F: Fn(Request<Bytes>) -> Response<Vec<u8>> + Clone + Send + Sync + 'static,
{
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let a = l.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (s, _) = l.accept().await.unwrap();
            let f = f.clone();
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |r: Request<Incoming>| {
                    let f = f.clone();
                    async move {
                        let (parts, body) = r.into_parts();
                        let body = body.collect().await.unwrap().to_bytes();
                        let r = f(Request::from_parts(parts, body));
                        let (mut parts, body) = r.into_parts();
                        let trailers = parts.headers.remove("x-trailer-grpc-status");
                        let frames = std::iter::once(hyper::body::Frame::data(Bytes::from(body))).chain(
                            trailers.map(|v| {
                                let mut t = hyper::HeaderMap::new();
                                t.insert("grpc-status", v);
                                hyper::body::Frame::trailers(t)
                            }),
                        );
                        let frames: Vec<_> = frames.map(Ok::<_, Infallible>).collect();
                        let body = http_body_util::StreamBody::new(futures::stream::iter(frames));
                        Ok::<_, Infallible>(Response::from_parts(parts, body))
                    }
                });
                let _ = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new())
                    .serve_connection(hyper_util::rt::TokioIo::new(s), service)
                    .await;
            });
        }
    });
    a
}

fn proxy(up: &Upstream, authz: SocketAddr, http: UpstreamHttp, f: ExtAuthz, routes: Vec<Route>) -> Proxy {
    let mut m = inline(vec![vhost(&["*"], routes)]);
    m.filters = vec![HttpFilter::ExtAuthz(Arc::new(f))];
    Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .cluster(Cluster { http, ..cluster("authz", &[authz]) })
        .listener(listener(Direction::Inbound, vec![http_chain(m)]))
        .run()
}

fn over_http() -> ExtAuthz {
    let one = |s: &str| vec![StringMatch::exact(s)];
    let http = HttpAuthz {
        uri: "http://authz/".into(),
        cluster: "authz".into(),
        timeout: Duration::from_secs(2),
        path_prefix: "/check".into(),
        headers_to_add: vec![("x-from".into(), "proxy".into())],
        allowed_upstream_headers: one("x-user"),
        allowed_upstream_headers_to_append: one("x-role"),
        allowed_client_headers: vec![],
        allowed_client_headers_on_success: one("set-cookie"),
        dynamic_metadata_from_headers: vec![],
    };
    ExtAuthz {
        service: AuthzService::Http(Box::new(http)),
        allowed_headers: vec![StringMatch::prefix("x-a")],
        ..ExtAuthz::default()
    }
}

fn plain() -> Vec<Route> {
    vec![route(forward("up"))]
}

async fn post(p: &Proxy, headers: &str, body: &str) -> Answer {
    let raw = format!(
        "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    Answer::parse(&p.raw("l", &raw).await)
}

#[tokio::test]
async fn an_http_server_decides() {
    let up = Upstream::new("up").await;
    let authz = server(|r| {
        let h = |n: &str| r.headers().get(n).map_or("", |v| v.to_str().unwrap()).to_owned();
        assert_eq!((h("x-from"), h("x-secret")), ("proxy".into(), String::new()));
        assert_eq!(h("host"), "h");
        let b = Response::builder();
        match (r.uri().to_string().as_str(), h("authorization").as_str()) {
            ("/check/broken", _) => b.status(500).body(vec![]),
            (_, "good") => b
                .header("x-user", "alice")
                .header("x-role", "b")
                .header("x-other", "no")
                .header("set-cookie", "s=1")
                .header("x-envoy-auth-headers-to-remove", "x-gone, host")
                .body(vec![]),
            (path, _) => b
                .status(401)
                .header("www-authenticate", "Basic")
                .header("x-why", format!("{path} {}", h("x-a1")))
                .body(b"not you".to_vec()),
        }
        .unwrap()
    })
    .await;
    let mut open = route(forward("up"));
    open.matches.path = PathMatch::Prefix("/open".into());
    open.filters.ext_authz = Some(AuthzOverride::Disabled);
    let routes = || vec![open.clone(), route(forward("up"))];
    let p = proxy(&up, authz, UpstreamHttp::Http1, over_http(), routes());
    let ok = "authorization: good\r\nx-user: mallory\r\nx-role: a\r\nx-gone: 1\r\nx-secret: s\r\n";
    for _ in 0..2 {
        let r = p.send("h", "/a?q", ok).await;
        assert_eq!((r.status, r.header("set-cookie")), (200, Some("s=1")), "{r:?}");
        assert!(r.body.contains("x-user: alice\n") && !r.body.contains("mallory"), "{r:?}");
        assert!(r.body.contains("x-role: a\nx-role: b\n") || r.body.contains("x-role: a\n"), "{r:?}");
        assert!(!r.body.contains("x-gone") && !r.body.contains("x-other") && r.body.contains("host: h\n"));
    }
    let r = p.send("h", "/a?q", "x-a1: seen\r\n").await;
    assert_eq!((r.status, r.body.as_str()), (401, "not you"));
    assert_eq!(r.header("x-why"), Some("/check/a?q seen"));
    assert_eq!(r.header("www-authenticate"), Some("Basic"));
    assert_eq!(p.get("h", "/broken").await.status, 403);
    assert_eq!(p.get("h", "/open").await.status, 200);
    p.metric(&["istio_requests_total", "response_code=\"401\"", "response_flags=\"UAEX\""]).await;
    // Without an answer.
    let down = closed_port();
    let p = proxy(&up, down, UpstreamHttp::Http1, ExtAuthz { status_on_error: 503, ..over_http() }, plain());
    assert_eq!(p.get("h", "/").await.status, 503);
    let lenient = ExtAuthz { failure_mode_allow: true, failure_mode_allow_header_add: true, ..over_http() };
    let r = proxy(&up, down, UpstreamHttp::Http1, lenient, plain()).get("h", "/").await;
    assert!(r.status == 200 && r.body.contains("x-envoy-auth-failure-mode-allowed: true"), "{r:?}");
    let off = ExtAuthz { enabled: 0, ..over_http() };
    assert_eq!(proxy(&up, down, UpstreamHttp::Http1, off, plain()).get("h", "/").await.status, 200);
}

#[tokio::test]
async fn bodies_are_shown_up_to_a_bound() {
    let up = Upstream::new("up").await;
    let authz = server(|r| {
        let partial = r.headers().get("x-envoy-auth-partial-body").map(|v| v.to_str().unwrap().to_owned());
        let text = format!("{} {partial:?}", String::from_utf8_lossy(r.body()));
        Response::builder().header("x-user", text).body(vec![]).unwrap()
    })
    .await;
    let with = |allow_partial| {
        let s = BodySettings { max_bytes: 8, allow_partial, pack_as_bytes: false };
        let f = ExtAuthz { with_request_body: Some(s), ..over_http() };
        proxy(&up, authz, UpstreamHttp::Http1, f, plain())
    };
    let p = with(false);
    let r = post(&p, "", "12345678").await;
    assert_eq!((r.status, r.body.as_str()), (200, "12345678"), "the body still reaches the server");
    assert_eq!(post(&p, "", "123456789").await.status, 413);
    let chunked = "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nx-t: 1\r\n\r\n";
    assert!(p.raw("l", chunked).await.contains("abcde"));
    let big = "x".repeat(100_000);
    let p = with(true);
    let r = post(&p, "", &big).await;
    assert_eq!((r.status, r.body.len()), (200, big.len()));
    let seen = Answer::parse(
        &p.raw(
            "l",
            "POST /seen HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 10\r\n\r\n0123456789",
        )
        .await,
    );
    assert!(seen.body.contains("x-user: 01234567 Some(\"true\")"), "{seen:?}");
}

/// `CheckResponse` by hand: tag, length, value.
pub(crate) fn field(n: u8, value: &[u8]) -> Vec<u8> {
    let mut out = vec![n << 3 | 2];
    let mut len = value.len();
    while len >= 128 {
        out.push((len & 127) as u8 | 128);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend_from_slice(value);
    out
}

fn option(name: &str, value: &str, append: bool) -> Vec<u8> {
    let header = field(1, &[field(1, name.as_bytes()), field(2, value.as_bytes())].concat());
    let append = if append { field(2, &[8, 1]) } else { vec![] };
    [header, append].concat()
}

pub(crate) fn grpc(message: &[u8]) -> Response<Vec<u8>> {
    let mut body = vec![0];
    body.extend_from_slice(&(message.len() as u32).to_be_bytes());
    body.extend_from_slice(message);
    Response::builder()
        .header("content-type", "application/grpc")
        .header("x-trailer-grpc-status", "0")
        .body(body)
        .unwrap()
}

#[tokio::test]
async fn a_grpc_server_decides() {
    let up = Upstream::new("up").await;
    let authz = server(|r| {
        assert_eq!(r.uri().path(), "/envoy.service.auth.v3.Authorization/Check");
        assert_eq!(r.headers()["content-type"], "application/grpc");
        assert_eq!(r.headers()["te"], "trailers");
        let text = String::from_utf8_lossy(r.body()).into_owned();
        for part in ["127.0.0.1", "POST", "/echo", "x-kind", "ctx", "value", "hello"] {
            assert!(text.contains(part), "{part} in {text:?}");
        }
        if text.contains("bad-grpc") {
            return Response::builder().header("grpc-status", "13").body(vec![]).unwrap();
        }
        if text.contains("deny-me") {
            let denied = [
                field(1, &[8, 0xa2, 3]),
                field(2, &option("x-reason", "because", false)),
                field(3, b"no entry"),
            ]
            .concat();
            return grpc(&[field(1, &[8, 7]), field(2, &denied)].concat());
        }
        let ok = [
            field(2, &option("x-user", "alice", false)),
            field(2, &option("x-role", "b", true)),
            field(5, b"x-gone"),
            field(6, &option("x-served-by", "authz", false)),
        ]
        .concat();
        grpc(&[field(1, &[]), field(3, &ok)].concat())
    })
    .await;
    let f = ExtAuthz {
        service: AuthzService::Grpc(GrpcService {
            cluster: "authz".into(),
            timeout: Some(Duration::from_secs(2)),
            ..GrpcService::default()
        }),
        with_request_body: Some(BodySettings { max_bytes: 100, allow_partial: false, pack_as_bytes: true }),
        disallowed_headers: vec![StringMatch::exact("authorization")],
        ..ExtAuthz::default()
    };
    let mut r = route(forward("up"));
    r.filters.ext_authz = Some(AuthzOverride::Check {
        context_extensions: BTreeMap::from([("ctx".into(), "value".into())]),
        no_body: false,
        with_request_body: None,
    });
    let p = proxy(&up, authz, UpstreamHttp::Http2, f, vec![r]);
    for _ in 0..2 {
        let r = post(&p, "x-kind: fine\r\nx-gone: 1\r\nx-role: a\r\n", "hello").await;
        assert_eq!((r.status, r.body.as_str()), (200, "hello"), "{r:?}");
        assert_eq!(r.header("x-served-by"), Some("authz"));
    }
    let r = post(&p, "x-kind: deny-me\r\n", "hello").await;
    assert_eq!((r.status, r.body.as_str(), r.header("x-reason")), (418, "no entry", Some("because")));
    assert_eq!(post(&p, "x-kind: bad-grpc\r\n", "hello").await.status, 403);
}

/// Rules that decide nothing and mark what matches.
fn marks(permission: Permission) -> Rbac {
    let policy = RbacPolicy { permissions: vec![permission], principals: vec![Principal::Any] };
    Rbac {
        shadow: Some(RbacRules {
            action: RbacAction::Deny,
            policies: [("ask-me".to_owned(), policy)].into(),
        }),
        shadow_stat_prefix: "p_".into(),
        ..Rbac::default()
    }
}

fn marked(filter: &str) -> Option<MetadataMatch> {
    Some(MetadataMatch {
        filter: filter.into(),
        path: vec!["p_shadow_effective_policy_id".into()],
        value: ValueMatch::String(StringMatch::prefix("ask-")),
        invert: false,
    })
}

#[tokio::test]
async fn only_what_shadow_rules_match_is_asked_about() {
    let up = Upstream::new("up").await;
    let other = Upstream::new("other").await;
    let authz = server(|r| match r.uri().path() {
        "/check/private/yes" => Response::builder().header("x-user", "alice").body(vec![]).unwrap(),
        _ => Response::builder().status(401).body(vec![]).unwrap(),
    })
    .await;
    let mut m = inline(vec![vhost(
        &["*"],
        vec![
            Route {
                matches: RouteMatch {
                    headers: vec![HeaderMatch {
                        name: "x-user".into(),
                        value: HeaderValueMatch::Present(true),
                        invert: false,
                        missing_is_empty: false,
                    }],
                    ..RouteMatch::any()
                },
                ..route(forward("other"))
            },
            route(forward("up")),
        ],
    )]);
    let run = |m: &HttpConnectionManager, clear_route_cache| {
        let mut m = m.clone();
        let f = ExtAuthz {
            enabled_metadata: marked("envoy.filters.http.rbac"),
            clear_route_cache,
            ..over_http()
        };
        let rules = marks(Permission::Path(StringMatch::prefix("/private")));
        m.filters = vec![HttpFilter::Rbac(rules), HttpFilter::ExtAuthz(Arc::new(f))];
        Proxy::new()
            .cluster(cluster("up", &[up.address]))
            .cluster(cluster("other", &[other.address]))
            .cluster(cluster("authz", &[authz]))
            .listener(listener(Direction::Inbound, vec![http_chain(m)]))
            .run()
    };
    m.websocket = false;
    let p = run(&m, false);
    assert_eq!(p.get("h", "/public").await.status, 200, "nobody is asked");
    assert_eq!(p.get("h", "/private/no").await.status, 401);
    let r = p.get("h", "/private/yes").await;
    assert!(r.status == 200 && r.body.contains("x-user: alice"), "{r:?}");
    assert!(r.body.starts_with("up"), "the route stays: {r:?}");
    let r = run(&m, true).get("h", "/private/yes").await;
    assert!(r.status == 200 && r.body.starts_with("other"), "the route is looked for again: {r:?}");
}

#[tokio::test]
async fn connections_are_asked_about_before_their_first_byte() {
    let bytes = raw_server(|mut s, _| async move {
        use tokio::io::AsyncWriteExt as _;
        let _ = s.write_all(b"secret").await;
    })
    .await;
    let authz = server(|r| {
        let text = String::from_utf8_lossy(r.body()).into_owned();
        assert!(r.uri().path() == "/envoy.service.auth.v3.Authorization/Check" && text.contains("127.0.0.1"));
        grpc(&field(1, if r.headers()["x-say"] == "yes" { &[] } else { &[8, 7] }))
    })
    .await;
    let down = closed_port();
    let run = |authz, say: &str, asked: Permission, failure_mode_allow| {
        let ask = NetworkFilter::Authz(ConnectionAuthz {
            stat_prefix: "a".into(),
            service: GrpcService {
                cluster: "authz".into(),
                timeout: Some(Duration::from_secs(2)),
                metadata: vec![("x-say".into(), say.into())],
                ..GrpcService::default()
            },
            failure_mode_allow,
            include_tls_session: true,
            enabled_metadata: marked("envoy.filters.network.rbac"),
        });
        Proxy::new()
            .cluster(cluster("db", &[bytes]))
            .cluster(Cluster { http: UpstreamHttp::Http2, ..cluster("authz", &[authz]) })
            .listener(listener(
                Direction::Inbound,
                vec![chain(vec![NetworkFilter::Rbac(marks(asked)), ask, tcp_filter("db")])],
            ))
            .run()
    };
    let all = || Permission::Any;
    let nothing = || Permission::Not(Box::new(Permission::Any));
    assert_eq!(run(authz, "yes", all(), false).raw("l", "").await, "secret");
    assert_eq!(run(authz, "no", all(), true).raw("l", "").await, "", "a no is a no");
    assert_eq!(run(authz, "no", nothing(), false).raw("l", "").await, "secret", "nobody is asked");
    assert_eq!(run(down, "yes", all(), false).raw("l", "").await, "", "no answer");
    assert_eq!(run(down, "yes", all(), true).raw("l", "").await, "secret", "no answer, and yet");
}
