//! Token authentication and policies over claims.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as B64};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mesh_model::proxy::*;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::support::*;

/// An issuer with one key.
struct Issuer {
    name: &'static str,
    key: EncodingKey,
    jwk: Value,
}

impl Issuer {
    fn new(name: &'static str) -> Self {
        let k = rcgen::KeyPair::generate().unwrap();
        let (x, y) = k.public_key_raw()[1..].split_at(32);
        let jwk = json!({"kty": "EC", "crv": "P-256", "kid": name, "alg": "ES256", "x": B64.encode(x), "y": B64.encode(y)});
        Self { name, key: EncodingKey::from_ec_der(k.serialized_der()), jwk }
    }

    fn jwks(&self) -> String {
        json!({ "keys": [self.jwk] }).to_string()
    }

    fn token(&self, claims: Value) -> String {
        let mut all = json!({"iss": self.name, "sub": "alice", "exp": now() + 3600});
        all.as_object_mut().unwrap().extend(claims.as_object().unwrap().clone());
        let header = Header { kid: Some(self.name.into()), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, &all, &self.key).unwrap()
    }

    fn provider(&self) -> JwtProvider {
        JwtProvider {
            issuer: self.name.into(),
            jwks: JwksSource::Inline(self.jwks()),
            payload_in_metadata: "payload".into(),
            ..JwtProvider::default()
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

fn rule(requirement: JwtRequirement) -> JwtRule {
    JwtRule { matches: RouteMatch::any(), requires: JwtRequires::Inline(requirement) }
}

fn authn(providers: &[(&str, JwtProvider)], rules: Vec<JwtRule>) -> JwtAuthn {
    JwtAuthn {
        providers: providers.iter().map(|(n, p)| ((*n).to_owned(), p.clone())).collect(),
        rules,
        requirements: providers
            .iter()
            .filter(|(n, _)| *n == "b")
            .map(|(n, _)| ((*n).to_owned(), JwtRequirement::Provider((*n).to_owned())))
            .collect(),
        bypass_cors_preflight: true,
    }
}

fn proxy(up: &Upstream, filters: Vec<HttpFilter>, routes: Vec<Route>) -> Proxy {
    let mut m = inline(vec![vhost(&["*"], routes)]);
    m.filters = filters;
    Proxy::new()
        .cluster(cluster("up", &[up.address]))
        .listener(listener(Direction::Inbound, vec![http_chain(m)]))
}

fn plain() -> Vec<Route> {
    vec![route(forward("up"))]
}

#[tokio::test]
async fn tokens_are_verified_and_their_claims_passed_on() {
    let (up, a, b) = (Upstream::new("up").await, Issuer::new("a"), Issuer::new("b"));
    let provider = JwtProvider {
        audiences: vec!["https://books.example/".into()],
        forward_payload_header: "x-payload".into(),
        claim_to_headers: vec![
            JwtClaimToHeader { header: "x-user".into(), claim: "sub".into() },
            JwtClaimToHeader { header: "x-level".into(), claim: "deep.level".into() },
            JwtClaimToHeader { header: "x-evil".into(), claim: "evil".into() },
        ],
        ..a.provider()
    };
    let rules = vec![rule(JwtRequirement::Provider("a".into()))];
    let p = proxy(&up, vec![HttpFilter::Jwt(Arc::new(authn(&[("a", provider)], rules)))], plain()).run();
    let claims = json!({"aud": ["x", "books.example"], "deep": {"level": 7}, "evil": "a\r\nx-admin: 1"});
    let good = a.token(claims.clone());
    for _ in 0..3 {
        let r = p.send("h", "/", &format!("{}x-user: mallory\r\nx-payload: e30\r\n", bearer(&good))).await;
        assert_eq!(r.status, 200, "{r:?}");
        assert!(r.body.contains("x-user: alice\n") && r.body.contains("x-level: 7\n"), "{r:?}");
        assert!(
            !r.body.contains("mallory") && !r.body.contains("authorization") && !r.body.contains("x-admin")
        );
        let payload = r.body.lines().find_map(|l| l.strip_prefix("x-payload: ")).unwrap();
        let payload: Value = serde_json::from_slice(&B64.decode(payload).unwrap()).unwrap();
        assert_eq!(payload["sub"], "alice");
    }
    assert_eq!(
        p.get("h", &format!("/?x=1&access_token={good}&y=2")).await.body.lines().next(),
        Some("up GET /?x=1&y=2 HTTP/1.1")
    );
    let denied = async |headers: &str, status: u16, body: &str| {
        let r = p.send("h", "/p?q", headers).await;
        assert_eq!((r.status, r.body.as_str()), (status, body));
        r.header("www-authenticate").unwrap_or_default().to_owned()
    };
    assert_eq!(denied("", 401, "Jwt is missing").await, "Bearer realm=\"http://h/p?q\"");
    assert_eq!(
        denied(
            &bearer("x.y"),
            401,
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
        )
        .await,
        "Bearer realm=\"http://h/p?q\", error=\"invalid_token\""
    );
    denied(&bearer(&a.token(json!({"aud": "other"}))), 403, "Audiences in Jwt are not allowed").await;
    denied(&bearer(&a.token(json!({"exp": now() - 61, "aud": "books.example"}))), 401, "Jwt is expired")
        .await;
    denied(&bearer(&a.token(json!({"nbf": now() + 120}))), 401, "Jwt not yet valid").await;
    denied(&bearer(&b.token(claims.clone())), 401, "Jwt issuer is not configured").await;
    let forged = Issuer { name: "a", ..Issuer::new("c") };
    denied(&bearer(&forged.token(claims)), 401, "Jwt verification fails").await;
    denied(
        &format!("{}{}", bearer(&good), bearer("x.y.z")),
        401,
        "Jwt header is an invalid Base64url encoded",
    )
    .await;
    // Within the tolerance of clocks.
    let late = a.token(json!({"exp": now() - 30, "aud": "books.example"}));
    assert_eq!(p.send("h", "/", &bearer(&late)).await.status, 200);
    p.metric(&["istio_requests_total", "response_code=\"401\"", "response_flags=\"UAEX\""]).await;
}

#[tokio::test]
async fn requirements() {
    use JwtRequirement as R;
    let (up, a, b) = (Upstream::new("up").await, Issuer::new("a"), Issuer::new("b"));
    let pa = || R::Provider("a".into());
    let pb = || R::Provider("b".into());
    let from_b = JwtProvider {
        from_headers: vec![JwtHeader { name: "x-b".into(), value_prefix: String::new() }],
        from_cookies: vec!["tb".into()],
        ..b.provider()
    };
    let run = |r: R| {
        let providers = [("a", a.provider()), ("b", from_b.clone())];
        proxy(&up, vec![HttpFilter::Jwt(Arc::new(authn(&providers, vec![rule(r)])))], plain()).run()
    };
    let (ta, tb) = (a.token(json!({})), b.token(json!({})));
    let (ha, hb, cb) = (bearer(&ta), format!("x-b: {tb}\r\n"), format!("cookie: z=1; tb={tb}\r\n"));
    let (bad_a, foreign) = (bearer(&a.token(json!({"exp": 1}))), bearer(&tb));
    let both = format!("{ha}{cb}");
    let cases: [(R, &[(&str, u16)]); 6] = [
        (
            R::Any(vec![pa(), pb()]),
            &[("", 401), (&ha, 200), (&hb, 200), (&cb, 200), (&bad_a, 401), (&foreign, 401)],
        ),
        (R::All(vec![pa(), pb()]), &[("", 401), (&ha, 401), (&both, 200)]),
        (R::Any(vec![pa(), R::AllowMissing]), &[("", 200), (&ha, 200), (&bad_a, 401), (&foreign, 401)]),
        (R::AllowMissing, &[("", 200), (&both, 200), (&bad_a, 401), (&foreign, 401)]),
        (R::AllowMissingOrFailed, &[("", 200), (&ha, 200), (&bad_a, 200), (&foreign, 200)]),
        (R::ProviderWithAudiences("a".into(), vec!["z".into()]), &[(&ha, 403)]),
    ];
    for (requirement, requests) in cases {
        let p = run(requirement.clone());
        for (headers, status) in requests {
            assert_eq!(p.send("h", "/", headers).await.status, *status, "{requirement:?} {headers}");
        }
    }
}

#[tokio::test]
async fn rules_routes_and_preflights() {
    let (up, a, b) = (Upstream::new("up").await, Issuer::new("a"), Issuer::new("b"));
    let at = |path: &str, requires| JwtRule {
        matches: RouteMatch { path: PathMatch::Prefix(path.into()), ..RouteMatch::any() },
        requires,
    };
    let rules = vec![
        at("/health", JwtRequires::Nothing),
        at("/b", JwtRequires::Named("b".into())),
        at("/a", JwtRequires::Inline(JwtRequirement::Provider("a".into()))),
    ];
    let on = |path: &str, jwt| {
        let mut r = route(forward("up"));
        r.matches.path = PathMatch::Prefix(path.into());
        r.filters.jwt = jwt;
        r
    };
    let routes = vec![
        on("/a/open", Some(JwtOverride::Disabled)),
        on("/a/b", Some(JwtOverride::Named("b".into()))),
        on("/a/wrong", Some(JwtOverride::Named("nobody".into()))),
        on("/", None),
    ];
    let providers = [("a", a.provider()), ("b", b.provider())];
    let p = proxy(&up, vec![HttpFilter::Jwt(Arc::new(authn(&providers, rules)))], routes).run();
    let (ta, tb) = (bearer(&a.token(json!({}))), bearer(&b.token(json!({}))));
    for (path, headers, status) in [
        ("/health", "", 200),
        ("/other", "", 200),
        ("/a", "", 401),
        ("/a", &ta, 200),
        ("/a", &tb, 401),
        ("/b", &tb, 200),
        ("/a/open", "", 200),
        ("/a/b", &ta, 401),
        ("/a/b", &tb, 200),
        ("/a/wrong", &ta, 401),
    ] {
        assert_eq!(p.send("h", path, headers).await.status, status, "{path}");
    }
    let preflight = "OPTIONS /a HTTP/1.1\r\nHost: h\r\nConnection: close\r\nOrigin: http://x\r\nAccess-Control-Request-Method: GET\r\n\r\n";
    assert!(p.raw("l", preflight).await.starts_with("HTTP/1.1 200"));
    // A name that nobody defined is refused before it is in force; a key set without keys knows no token.
    let bad = authn(&[("a", a.provider())], vec![at("/", JwtRequires::Named("none".into()))]);
    assert!(proxy(&up, vec![HttpFilter::Jwt(Arc::new(bad))], plain()).apply().rejected[0].2.contains("none"));
    let empty = JwtProvider { jwks: JwksSource::Inline("{}".into()), ..a.provider() };
    let rules = vec![at("/", JwtRequires::Inline(JwtRequirement::Provider("a".into())))];
    let none = authn(&[("a", empty), ("b", b.provider())], rules);
    let r = proxy(&up, vec![HttpFilter::Jwt(Arc::new(none))], plain()).run().send("h", "/", &ta).await;
    assert_eq!((r.status, r.body.as_str()), (401, "Jwks doesn't have any valid public key"));
}

/// A valid token lets the route be looked for again; filters behind have the new route's settings. Nothing else does.
#[tokio::test]
async fn routes_by_claims() {
    let (up, a, b) = (Upstream::new("up").await, Issuer::new("a"), Issuer::new("b"));
    let by = |claim: &str, value: ValueMatch, invert, answer: &str| {
        let mut r = route(forward("up"));
        let path = vec!["payload".to_owned(), claim.to_owned()];
        let m = MetadataMatch { filter: "envoy.filters.http.jwt_authn".into(), path, value, invert };
        r.matches.metadata = vec![m];
        r.action = RouteAction::Direct(DirectResponse { status: 200, body: answer.as_bytes().to_vec() });
        r
    };
    let text = |s: &str| ValueMatch::String(StringMatch::exact(s));
    let mut faulty = by("sub", text("bob"), false, "bob");
    faulty.fault = Some(Box::new(Fault { delay: None, abort: Some((AbortKind::Http(418), 1_000_000)) }));
    let routes = vec![
        by("groups", ValueMatch::OneOf(Box::new(text("admin"))), false, "admin"),
        faulty,
        by("sub", ValueMatch::Present(true), false, "anybody"),
        by("sub", ValueMatch::Present(true), true, "nobody"),
    ];
    let run = |clear_route_cache| {
        let provider =
            JwtProvider { payload_in_metadata: "payload".into(), clear_route_cache, ..a.provider() };
        let requires =
            JwtRequirement::Any(vec![JwtRequirement::Provider("a".into()), JwtRequirement::AllowMissing]);
        let rules = vec![JwtRule { matches: RouteMatch::any(), requires: JwtRequires::Inline(requires) }];
        let jwt = HttpFilter::Jwt(Arc::new(authn(&[("a", provider)], rules)));
        proxy(&up, vec![jwt, HttpFilter::Fault], routes.clone()).run()
    };
    let (on, off) = (run(true), run(false));
    for (claims, status, body) in [
        (json!({"sub": "alice"}), 200, "anybody"),
        (json!({"sub": "bob"}), 418, "fault filter abort"),
        (json!({"sub": "bob", "groups": ["x", "admin"]}), 200, "admin"),
    ] {
        let r = on.send("h", "/", &bearer(&a.token(claims.clone()))).await;
        assert_eq!((r.status, r.body.as_str()), (status, body), "{claims}");
        let r = off.send("h", "/", &bearer(&a.token(claims.clone()))).await;
        assert_eq!((r.status, r.body.as_str()), (200, "nobody"), "{claims}");
        // Signed by somebody else.
        assert_eq!(on.send("h", "/", &bearer(&b.token(claims))).await.status, 401);
    }
    assert_eq!(on.send("h", "/", "sub: bob\r\n").await.body, "nobody");
}

/// Publishes a key set that changes; counts fetches.
async fn publisher(sets: Vec<String>, status: u16) -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let seen = count.clone();
    let a = raw_server(move |mut s, _| {
        let (seen, sets) = (seen.clone(), sets.clone());
        async move {
            loop {
                let head = read_until(&mut s, "\r\n\r\n").await;
                if head.is_empty() {
                    return;
                }
                assert!(head.starts_with("GET /keys HTTP/1.1\r\nhost: issuer.example\r\n"), "{head}");
                let n = seen.fetch_add(1, Ordering::SeqCst);
                let body = &sets[n.min(sets.len() - 1)];
                let r = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                if s.write_all(r.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    (a, count)
}

fn remote(i: &Issuer, cache: Duration, async_fetch: bool) -> JwtProvider {
    JwtProvider {
        jwks: JwksSource::Remote(RemoteJwks {
            uri: "https://issuer.example/keys".into(),
            cluster: "issuer".into(),
            timeout: Duration::from_secs(2),
            cache_duration: cache,
            async_fetch,
        }),
        ..i.provider()
    }
}

#[tokio::test]
async fn keys_are_fetched_once_and_renewed() {
    let (up, old, new) = (Upstream::new("up").await, Issuer::new("a"), Issuer::new("a"));
    let run = |address, cache, async_fetch| {
        let rules = vec![rule(JwtRequirement::Provider("a".into()))];
        let f = authn(&[("a", remote(&old, cache, async_fetch)), ("b", old.provider())], rules);
        proxy(&up, vec![HttpFilter::Jwt(Arc::new(f))], plain()).cluster(cluster("issuer", &[address])).run()
    };
    let (address, fetches) = publisher(vec![old.jwks(), new.jwks()], 200).await;
    let p = run(address, Duration::from_secs(600), true);
    let token = bearer(&old.token(json!({})));
    let all = futures::future::join_all((0..20).map(|_| p.send("h", "/", &token))).await;
    assert!(all.iter().all(|r| r.status == 200), "{all:?}");
    assert_eq!(fetches.load(Ordering::SeqCst), 1, "one fetch serves all");
    // Expired keys are fetched again, and tokens under the old ones are not remembered.
    let (address, fetches) = publisher(vec![old.jwks(), new.jwks()], 200).await;
    let p = run(address, Duration::from_millis(300), false);
    assert_eq!(p.send("h", "/", &token).await.status, 200);
    let end = std::time::Instant::now() + WAIT;
    while p.send("h", "/", &token).await.status == 200 {
        assert!(std::time::Instant::now() < end, "the old key lives on");
    }
    assert!(fetches.load(Ordering::SeqCst) >= 2);
    assert_eq!(p.send("h", "/", &bearer(&new.token(json!({})))).await.status, 200);
    // Renewed ahead: requests go on under the old keys meanwhile.
    let (address, fetches) = publisher(vec![old.jwks()], 200).await;
    let p = run(address, Duration::from_millis(400), true);
    let end = std::time::Instant::now() + WAIT;
    while fetches.load(Ordering::SeqCst) < 3 {
        assert!(std::time::Instant::now() < end, "not renewed");
        assert_eq!(p.send("h", "/", &token).await.status, 200);
    }
    for address in
        [publisher(vec![old.jwks()], 500).await.0, publisher(vec!["{".into()], 200).await.0, closed_port()]
    {
        let r = run(address, Duration::from_secs(1), false).send("h", "/", &token).await;
        assert_eq!((r.status, r.body.as_str()), (401, "Jwks remote fetch is failed"));
    }
}

#[tokio::test]
async fn policies_over_claims() {
    let (up, a) = (Upstream::new("up").await, Issuer::new("https://a.example/x"));
    let claim = |path: &[&str], value| {
        Principal::Metadata(MetadataMatch {
            filter: "envoy.filters.http.jwt_authn".into(),
            path: std::iter::once(&"payload").chain(path).map(|s| (*s).to_owned()).collect(),
            value,
            invert: false,
        })
    };
    let exact = |s: &str| ValueMatch::String(StringMatch::exact(s));
    let policy = RbacPolicy {
        permissions: vec![Permission::Any],
        principals: vec![Principal::And(vec![
            claim(&["iss"], exact(a.name)),
            claim(&["scope"], ValueMatch::OneOf(Box::new(exact("write")))),
        ])],
    };
    let rbac = Rbac {
        rules: Some(RbacRules {
            action: RbacAction::Allow,
            policies: BTreeMap::from([("p".into(), policy)]),
        }),
        ..Rbac::default()
    };
    let provider = JwtProvider { space_delimited_claims: vec!["scope".into()], ..a.provider() };
    let rules = vec![rule(JwtRequirement::Any(vec![
        JwtRequirement::Provider("a".into()),
        JwtRequirement::AllowMissing,
    ]))];
    let filters = vec![
        HttpFilter::Jwt(Arc::new(authn(&[("a", provider), ("b", a.provider())], rules))),
        HttpFilter::Rbac(rbac),
    ];
    let p = proxy(&up, filters, plain()).run();
    let r = p.get("h", "/").await;
    assert_eq!((r.status, r.body.as_str()), (403, "RBAC: access denied"));
    assert_eq!(p.send("h", "/", &bearer(&a.token(json!({"scope": "read"})))).await.status, 403);
    assert_eq!(p.send("h", "/", &bearer(&a.token(json!({"scope": "read write"})))).await.status, 200);
    assert_eq!(p.send("h", "/", &bearer("x")).await.status, 401);
}
