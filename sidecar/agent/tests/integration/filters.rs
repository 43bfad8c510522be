//! Filters: what Envoy does, the engine does.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as B64};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mesh_model::proxy::*;
use serde_json::{Value, json};

use crate::side_by_side::{Pair, cluster, manager, route, send, server, to_up};

/// Answers with those lines of what it saw that a test may look at, in order.
async fn echo() -> std::net::SocketAddr {
    server(|r| {
        let (head, body) = r.split_once("\r\n\r\n").unwrap();
        let mut lines: Vec<String> = head
            .lines()
            .skip(1)
            .map(|l| {
                let (n, v) = l.split_once(':').unwrap();
                format!("{}:{v}", n.to_ascii_lowercase())
            })
            .filter(|l| ["x-t-", "authorization", "content-type", "te:"].iter().any(|p| l.starts_with(p)))
            .collect();
        lines.sort();
        let line = head.lines().next().unwrap();
        (200, "x-server: echo\r\n".into(), format!("{line}\n{}\n{body}", lines.join("\n")))
    })
    .await
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: books.example\r\nConnection: close\r\n{headers}\r\n")
}

struct Issuer(&'static str, EncodingKey, Value);

impl Issuer {
    fn new(name: &'static str) -> Self {
        let k = rcgen::KeyPair::generate().unwrap();
        let (x, y) = k.public_key_raw()[1..].split_at(32);
        let jwk = json!({"kty": "EC", "crv": "P-256", "kid": "k", "x": B64.encode(x), "y": B64.encode(y)});
        Self(name, EncodingKey::from_ec_der(k.serialized_der()), json!({ "keys": [jwk] }))
    }

    fn token(&self, kid: &str, claims: Value) -> String {
        let mut all = json!({"iss": self.0, "sub": "alice", "aud": "books", "exp": now() + 3600});
        all.as_object_mut().unwrap().extend(claims.as_object().unwrap().clone());
        let header = Header { kid: Some(kid.into()), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, &all, &self.1).unwrap()
    }
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn tokens_and_claims() {
    let (up, a, b) = (echo().await, Issuer::new("https://a.example"), Issuer::new("b"));
    let provider = JwtProvider {
        issuer: a.0.into(),
        audiences: vec!["books".into(), "https://other.example/".into()],
        jwks: JwksSource::Inline(a.2.to_string()),
        forward_payload_header: "x-t-payload".into(),
        claim_to_headers: vec![
            JwtClaimToHeader { header: "x-t-sub".into(), claim: "sub".into() },
            JwtClaimToHeader { header: "x-t-n".into(), claim: "deep.n".into() },
        ],
        payload_in_metadata: "payload".into(),
        space_delimited_claims: vec!["scope".into()],
        ..JwtProvider::default()
    };
    let other = JwtProvider {
        issuer: b.0.into(),
        jwks: JwksSource::Inline(b.2.to_string()),
        forward: true,
        from_headers: vec![JwtHeader { name: "x-t-b".into(), value_prefix: "T ".into() }],
        from_cookies: vec!["tb".into()],
        ..JwtProvider::default()
    };
    use JwtRequirement as R;
    let (pa, pb) = (|| R::Provider("a".into()), || R::Provider("b".into()));
    let rule = |path: &str, requires| JwtRule {
        matches: RouteMatch { path: PathMatch::Prefix(path.into()), ..RouteMatch::any() },
        requires: JwtRequires::Inline(requires),
    };
    let jwt = JwtAuthn {
        providers: [("a".to_owned(), provider), ("b".to_owned(), other)].into(),
        rules: vec![
            rule("/any", R::Any(vec![pa(), pb()])),
            rule("/all", R::All(vec![pa(), pb()])),
            rule("/maybe", R::Any(vec![pa(), R::AllowMissing])),
            rule("/missing", R::AllowMissing),
            rule("/failed", R::AllowMissingOrFailed),
            rule("/aud", R::ProviderWithAudiences("a".into(), vec!["z".into()])),
            rule("/policy", R::Any(vec![pa(), R::AllowMissing])),
            rule("/a", pa()),
        ],
        requirements: Default::default(),
        bypass_cors_preflight: true,
    };
    let claim = |name: &str, value| {
        Principal::Metadata(MetadataMatch {
            filter: "envoy.filters.http.jwt_authn".into(),
            path: vec!["payload".into(), name.into()],
            value,
            invert: false,
        })
    };
    let exact = |s: &str| ValueMatch::String(StringMatch::exact(s));
    let policy = |permissions, principals| RbacPolicy { permissions, principals };
    let prefix = |p: &str| Permission::Path(StringMatch::prefix(p));
    let rules = RbacRules {
        action: RbacAction::Allow,
        policies: [
            (
                "claims".to_owned(),
                policy(
                    vec![prefix("/policy")],
                    vec![Principal::And(vec![
                        claim("iss", exact(a.0)),
                        claim("scope", ValueMatch::OneOf(Box::new(exact("write")))),
                    ])],
                ),
            ),
            (
                "others".to_owned(),
                policy(vec![Permission::Not(Box::new(prefix("/policy")))], vec![Principal::Any]),
            ),
        ]
        .into(),
    };
    let rbac = Rbac { rules: Some(rules), ..Rbac::default() };
    let filters = vec![HttpFilter::Jwt(Arc::new(jwt)), HttpFilter::Rbac(rbac)];
    let m = manager(filters, vec![route(to_up(), RouteFilters::default())]);
    let p = Pair::new(m, vec![cluster("up", up, UpstreamHttp::Http1)]).await;

    let bearer = |t: &str| format!("authorization: Bearer {t}\r\n");
    let good = a.token("k", json!({"deep": {"n": 7}}));
    let theirs = b.token("k", json!({}));
    let forged = Issuer(a.0, Issuer::new("x").1, json!({}));
    let headers = [
        String::new(),
        bearer(&good),
        format!("{}x-t-sub: mallory\r\nx-t-payload: e30\r\n", bearer(&good)),
        format!("x-t-b: T {theirs}\r\n"),
        format!("cookie: z=1; tb={theirs}\r\n"),
        format!("{}x-t-b: T {theirs}\r\n", bearer(&good)),
        bearer(&theirs),
        bearer(&a.token("k", json!({"exp": now() - 3600}))),
        bearer(&a.token("k", json!({"exp": now() - 30}))),
        bearer(&a.token("k", json!({"nbf": now() + 3600}))),
        bearer(&a.token("k", json!({"aud": ["x", "other.example"]}))),
        bearer(&a.token("k", json!({"aud": "nobody"}))),
        bearer(&a.token("k", json!({"aud": "z"}))),
        bearer(&a.token("unknown", json!({}))),
        bearer(&forged.token("k", json!({}))),
        bearer(&a.token("k", json!({"scope": "read write"}))),
        bearer("a.b"),
        bearer("a.b.c"),
        bearer(&format!("{}.{}.AA", B64.encode(r#"{"alg":"none"}"#), B64.encode("{}"))),
        bearer(&format!("{}.{}.AA", B64.encode("{}"), B64.encode("{}"))),
        "authorization: Basic abc\r\n".to_owned(),
    ];
    let seen = ["www-authenticate", "content-type"];
    for path in ["/a", "/any", "/all", "/maybe", "/missing", "/failed", "/aud", "/policy", "/open"] {
        for h in &headers {
            p.alike(&get(path, h), &seen).await;
        }
    }
    p.alike(&get(&format!("/a?x=1&access_token={good}"), ""), &seen).await;
    // Envoy joins the two values and finds no token in that; both refuse.
    let (ours, theirs) = p.ask(&get("/a", &format!("{}{}", bearer(&good), bearer("x.y.z")))).await;
    assert_eq!((ours.status, theirs.status), (401, 401));
    let preflight = "OPTIONS /a HTTP/1.1\r\nHost: h\r\nConnection: close\r\nOrigin: http://x\r\nAccess-Control-Request-Method: GET\r\n\r\n";
    p.alike(preflight, &seen).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn routes_by_claims() {
    let (up, a) = (echo().await, Issuer::new("https://a.example"));
    let claim = |path: &[&str], value, invert| MetadataMatch {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: std::iter::once(&"payload").chain(path).map(|p| (*p).to_owned()).collect(),
        value,
        invert,
    };
    let text = |s: &str| ValueMatch::String(StringMatch::exact(s));
    let to = |path: &str, body: &str, metadata: Vec<MetadataMatch>| {
        let mut r = route(to_up(), RouteFilters::default());
        r.matches = RouteMatch { path: PathMatch::Prefix(path.into()), metadata, ..RouteMatch::any() };
        r.action = RouteAction::Direct(DirectResponse { status: 200, body: body.as_bytes().to_vec() });
        r
    };
    let mut faulty = to("/", "bob", vec![claim(&["sub"], text("bob"), false)]);
    faulty.fault = Some(Box::new(Fault { delay: None, abort: Some((AbortKind::Http(418), 1_000_000)) }));
    let routes = vec![
        to("/", "admin", vec![claim(&["groups"], ValueMatch::OneOf(Box::new(text("admin"))), false)]),
        faulty,
        to("/not", "not alice", vec![claim(&["sub"], text("alice"), true)]),
        to("/deep", "deep", vec![claim(&["deep", "n"], ValueMatch::Present(true), false)]),
        to(
            "/both",
            "both",
            vec![
                claim(&["sub"], text("alice"), false),
                claim(&["scope"], ValueMatch::OneOf(Box::new(text("write"))), false),
            ],
        ),
        route(to_up(), RouteFilters::default()),
    ];
    for clear_route_cache in [true, false] {
        let provider = JwtProvider {
            issuer: a.0.into(),
            jwks: JwksSource::Inline(a.2.to_string()),
            payload_in_metadata: "payload".into(),
            space_delimited_claims: vec!["scope".into()],
            clear_route_cache,
            ..JwtProvider::default()
        };
        let rule = |path: &str, requires| JwtRule {
            matches: RouteMatch { path: PathMatch::Prefix(path.into()), ..RouteMatch::any() },
            requires: JwtRequires::Inline(requires),
        };
        let maybe =
            JwtRequirement::Any(vec![JwtRequirement::Provider("a".into()), JwtRequirement::AllowMissing]);
        let jwt = JwtAuthn {
            providers: [("a".to_owned(), provider)].into(),
            rules: vec![rule("/not/failed", JwtRequirement::AllowMissingOrFailed), rule("/", maybe)],
            requirements: Default::default(),
            bypass_cors_preflight: true,
        };
        let m = manager(vec![HttpFilter::Jwt(Arc::new(jwt)), HttpFilter::Fault], routes.clone());
        let p = Pair::new(m, vec![cluster("up", up, UpstreamHttp::Http1)]).await;
        let forged = Issuer(a.0, Issuer::new("x").1, json!({}));
        for claims in [
            None,
            Some(json!({})),
            Some(json!({"sub": "bob"})),
            Some(json!({"groups": ["users", "admin"]})),
            Some(json!({"groups": "admin"})),
            Some(json!({"deep": {"n": [1]}})),
            Some(json!({"deep": 7})),
            Some(json!({"scope": "read write"})),
        ] {
            for path in ["/", "/not", "/not/failed", "/deep", "/both"] {
                let bearer = |t: &str| format!("authorization: Bearer {t}\r\n");
                let h = claims.clone().map_or_else(String::new, |c| bearer(&a.token("k", c)));
                p.alike(&get(path, &h), &[]).await;
                // What nobody has verified is no claim, under whatever name it comes.
                let h = claims.clone().map_or_else(String::new, |c| bearer(&forged.token("k", c)));
                p.alike(&get(path, &format!("{h}sub: bob\r\n")), &[]).await;
            }
        }
        let seen = p
            .ask(&get("/", &format!("authorization: Bearer {}\r\n", a.token("k", json!({"sub": "bob"})))))
            .await;
        assert_eq!(
            seen.0.status,
            if clear_route_cache { 418 } else { 200 },
            "the fault of the route by claims"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn authorisers_and_limits() {
    let up = echo().await;
    let authz = server(|r| {
        let lower = r.to_ascii_lowercase();
        if lower.contains("authorization: good") {
            let h = "x-t-user: alice\r\nx-t-add: 2\r\nx-t-no: 1\r\nset-cookie: s=1\r\n";
            return (200, h.into(), String::new());
        }
        if lower.contains("authorization: broken") {
            return (500, String::new(), String::new());
        }
        let path = r.split(' ').nth(1).unwrap_or_default();
        (401, format!("www-authenticate: Basic\r\nx-path: {path}\r\n"), "not you".into())
    })
    .await;
    let one = |s: &str| vec![StringMatch::exact(s)];
    let http = HttpAuthz {
        uri: "http://authz/".into(),
        cluster: "authz".into(),
        timeout: Duration::from_secs(2),
        path_prefix: "/check".into(),
        headers_to_add: vec![("x-from".into(), "proxy".into())],
        allowed_upstream_headers: one("x-t-user"),
        allowed_upstream_headers_to_append: one("x-t-add"),
        allowed_client_headers: vec![],
        allowed_client_headers_on_success: one("set-cookie"),
        dynamic_metadata_from_headers: vec![],
    };
    let authz_filter = ExtAuthz {
        service: AuthzService::Http(Box::new(http)),
        with_request_body: Some(BodySettings { max_bytes: 8, allow_partial: false, pack_as_bytes: false }),
        ..ExtAuthz::default()
    };
    let bucket =
        |max_tokens| TokenBucket { max_tokens, tokens_per_fill: 1, fill_interval: Duration::from_secs(3600) };
    let limit = LocalRateLimit {
        stat_prefix: "limit".into(),
        bucket: Some(bucket(100)),
        descriptors: vec![LocalDescriptor {
            entries: vec![("user".into(), "bob".into())],
            bucket: bucket(2),
        }],
        x_ratelimit_headers: true,
        response_headers: HeaderOps { add: vec![("x-why".into(), "rate".into())], ..HeaderOps::default() },
        ..LocalRateLimit::default()
    };
    let rules = vec![RateLimit {
        stage: 0,
        actions: vec![RateLimitAction::Header {
            name: "x-t-name".into(),
            key: "user".into(),
            skip_if_absent: false,
        }],
    }];
    let filters = vec![
        HttpFilter::LocalRateLimit(Arc::new(limit)),
        HttpFilter::ExtAuthz(Arc::new(authz_filter)),
        HttpFilter::Buffer(6),
    ];
    let r = route(to_up(), RouteFilters { rate_limits: rules, ..RouteFilters::default() });
    let clusters = vec![cluster("up", up, UpstreamHttp::Http1), cluster("authz", authz, UpstreamHttp::Http1)];
    let p = Pair::new(manager(filters, vec![r]), clusters).await;
    let seen =
        ["www-authenticate", "x-path", "set-cookie", "x-why", "x-ratelimit-limit", "x-ratelimit-remaining"];
    for h in ["authorization: good\r\nx-t-user: mallory\r\nx-t-add: 1\r\n", "authorization: broken\r\n", ""] {
        p.alike(&get("/a?q", h), &seen).await;
    }
    let post = |h: &str, body: &str| {
        format!(
            "POST /p HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {}\r\n{h}\r\n{body}",
            body.len()
        )
    };
    for body in ["", "123456", "1234567", "123456789"] {
        p.alike(&post("authorization: good\r\n", body), &[]).await;
    }
    for _ in 0..4 {
        p.alike(&get("/", "authorization: good\r\nx-t-name: bob\r\n"), &seen).await;
    }
    let grpc = "authorization: good\r\nx-t-name: bob\r\ncontent-type: application/grpc\r\n";
    p.alike(&get("/", grpc), &["grpc-status", "grpc-message", "content-type"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn bodies_sessions_and_limits_of_time() {
    let up = server(|r| {
        let path = r.split(' ').nth(1).unwrap_or_default();
        let text =
            "text that is long enough to be worth it, text that is long enough to be worth it".to_owned();
        let head = match path {
            "/tag" => "content-type: text/plain\r\netag: \"x\"\r\n",
            "/weak" => "content-type: text/html; charset=utf-8\r\netag: W/\"x\"\r\nvary: Origin\r\n",
            "/image" => "content-type: image/png\r\n",
            "/fixed" => "content-type: text/plain\r\ncache-control: no-transform\r\n",
            "/done" => "content-type: text/plain\r\ncontent-encoding: br\r\n",
            "/short" => return (200, "content-type: text/plain\r\n".into(), "short".into()),
            "/grpc" => {
                return (200, "content-type: application/grpc\r\ngrpc-status: 0\r\n".into(), "data".into());
            }
            "/limited" => return (429, "x-envoy-ratelimited: true\r\n".into(), "slow".into()),
            "/503" => return (503, String::new(), "down".into()),
            _ => "content-type: text/plain\r\n",
        };
        (200, head.into(), text)
    })
    .await;
    let state = SessionState::Cookie { name: "host".into(), path: "/".into(), ttl: Duration::from_secs(60) };
    let filters = vec![
        HttpFilter::GrpcWeb,
        HttpFilter::Compressor(Arc::new(Compressor { weaken_etag: true, ..Compressor::default() })),
        HttpFilter::StatefulSession(Arc::new(StatefulSession {
            state: Some(state),
            ..StatefulSession::default()
        })),
    ];
    let f = Forward {
        max_stream: Some(StreamLimit {
            max: Some(Duration::from_millis(300)),
            grpc_timeout_max: Some(Duration::from_millis(200)),
            grpc_timeout_offset: None,
        }),
        retry: Some(Box::new(RetryPolicy {
            on: vec![RetryOn::RetriableStatusCodes],
            status_codes: vec![429],
            ..RetryPolicy::default()
        })),
        ..to_up()
    };
    let mut m = manager(filters, vec![route(f, RouteFilters::default())]);
    m.accept_http_10 = false;
    let p = Pair::new(m, vec![cluster("up", up, UpstreamHttp::Http1)]).await;
    let seen = ["content-encoding", "etag", "vary", "content-type"];
    for path in ["/", "/tag", "/weak", "/image", "/fixed", "/done", "/short"] {
        for accept in
            ["", "accept-encoding: gzip\r\n", "accept-encoding: br, gzip;q=0\r\n", "accept-encoding: *\r\n"]
        {
            let (ours, theirs) = p.ask(&get(path, accept)).await;
            let of = |a: &crate::side_by_side::Answer| {
                let h: Vec<_> = seen.iter().map(|n| a.headers.get(*n).cloned()).collect();
                let text = if a.headers.get("content-encoding").is_some_and(|e| e == "gzip") {
                    let mut out = String::new();
                    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&a.body[..]), &mut out)
                        .unwrap();
                    out
                } else {
                    String::from_utf8_lossy(&a.body).into_owned()
                };
                (a.status, h, text)
            };
            assert_eq!(of(&ours), of(&theirs), "{path} {accept}");
        }
    }
    p.alike(&get("/limited", ""), &[]).await;
    p.alike(&get("/slow", ""), &[]).await;
    p.alike(
        &get("/slow", "content-type: application/grpc\r\ngrpc-timeout: 100m\r\n"),
        &["grpc-status", "grpc-message"],
    )
    .await;
    p.alike("GET / HTTP/1.0\r\nHost: h\r\n\r\n", &[]).await;
    let web = |path: &str, kind: &str, body: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\ncontent-type: {kind}\r\naccept: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    p.alike(&web("/grpc", "application/grpc-web", "x"), &["content-type", "grpc-status"]).await;
    // A session begun with one proxy goes on with the other.
    for (from, to) in [(p.engine, p.envoy), (p.envoy, p.engine)] {
        let first = send(from, &get("/short", "")).await;
        let set = &first.headers["set-cookie"];
        assert!(set.contains("Max-Age=60") && set.contains("Path=/") && set.contains("HttpOnly"), "{set}");
        let pair = set.split(';').next().unwrap();
        let next = send(to, &get("/short", &format!("cookie: {pair}\r\n"))).await;
        assert_eq!(next.headers.get("set-cookie"), None, "{set} is understood by the other");
    }
}
