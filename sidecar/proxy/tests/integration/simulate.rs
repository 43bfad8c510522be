//! A simulation says what the engine does: the same configuration and requests, by both.

use std::collections::BTreeMap;

use mesh_model::proxy::*;
use mesh_proxy::simulate::{Action, Arrival, Passage, Request, simulate};

use crate::support::*;

fn on(path: PathMatch, action: RouteAction) -> Route {
    let mut r = route(forward("a"));
    (r.matches.path, r.action) = (path, action);
    r
}

fn hosts() -> Vec<VirtualHost> {
    let header = |name: &str, value, invert| HeaderMatch {
        name: name.into(),
        value,
        invert,
        missing_is_empty: invert,
    };
    let mut canary = route(forward("b"));
    canary.matches.headers = vec![
        header("x-user", HeaderValueMatch::Value(StringMatch::regex("j.*n")), false),
        header("x-robot", HeaderValueMatch::Present(true), true),
    ];
    let mut query = route(forward("b"));
    query.matches.query = vec![QueryMatch { name: "v".into(), value: Some(StringMatch::exact("2")) }];
    let mut folded = on(PathMatch::Exact("/Folded".into()), RouteAction::Forward(Box::new(forward("b"))));
    folded.matches.case_sensitive = false;
    let mut edited = on(
        PathMatch::SegmentPrefix("/api".into()),
        RouteAction::Forward(Box::new(Forward {
            prefix_rewrite: Some("/v1".into()),
            host_rewrite: Some("internal".into()),
            timeout: Some(std::time::Duration::from_secs(3)),
            ..forward("a")
        })),
    );
    edited.request_headers = HeaderOps {
        remove: vec!["x-gone".into()],
        set: vec![("x-set".into(), "route".into())],
        add: vec![("x-add".into(), "1".into())],
    }
    .into();
    edited.response_headers =
        HeaderOps { remove: vec![], set: vec![("x-answer".into(), "42".into())], add: vec![] }.into();
    let regex = on(
        PathMatch::Regex("/r/[0-9]+".into()),
        RouteAction::Forward(Box::new(Forward {
            regex_rewrite: Some(("^/r/([0-9]+)".into(), r"/n/\1".into())),
            ..forward("b")
        })),
    );
    let redirect = on(
        PathMatch::Prefix("/old".into()),
        RouteAction::Redirect(Redirect {
            scheme: Some("https".into()),
            prefix_rewrite: Some("/new".into()),
            status: 307,
            ..Redirect::default()
        }),
    );
    let direct = on(
        PathMatch::Exact("/tea".into()),
        RouteAction::Direct(DirectResponse { status: 418, body: b"teapot".to_vec() }),
    );
    let mut aborted = on(PathMatch::Exact("/fault".into()), RouteAction::Forward(Box::new(forward("a"))));
    aborted.fault = Some(Box::new(Fault { delay: None, abort: Some((AbortKind::Http(555), 1_000_000)) }));
    let mut cors = on(PathMatch::Exact("/cors".into()), RouteAction::Forward(Box::new(forward("a"))));
    cors.cors = Some(Box::new(Cors {
        allow_origins: vec![StringMatch::exact("https://friend.example")],
        allow_methods: "GET".into(),
        allow_headers: String::new(),
        expose_headers: "x-y".into(),
        max_age: "60".into(),
        allow_credentials: true,
        ignore_unmatched: false,
    }));
    let missing = on(PathMatch::Exact("/missing".into()), RouteAction::Forward(Box::new(forward("nowhere"))));
    let mut secure = vhost(&["secure"], vec![route(forward("a"))]);
    secure.require_tls = true;
    let mut all = vec![canary, query, folded, edited, regex, redirect, direct, aborted, cors, missing];
    all.push(on(PathMatch::Prefix("/rest".into()), RouteAction::Forward(Box::new(forward("a")))));
    let mut main = vhost(&["reviews", "*.wild.example"], all);
    main.request_headers.set = vec![("x-set".into(), "host".into())];
    vec![secure, main]
}

fn rules() -> Rbac {
    let header = |value: &str| {
        Permission::Header(HeaderMatch {
            name: "x-role".into(),
            value: HeaderValueMatch::Value(StringMatch::exact(value)),
            invert: false,
            missing_is_empty: false,
        })
    };
    let policy = |p| RbacPolicy { permissions: vec![p], principals: vec![Principal::Any] };
    let policies = BTreeMap::from([
        ("guests".to_owned(), policy(header("guest"))),
        ("path".to_owned(), policy(Permission::Path(StringMatch::suffix("/secret")))),
    ]);
    Rbac { rules: Some(RbacRules { action: RbacAction::Deny, policies }), ..Rbac::default() }
}

/// Headers of the request that both can tell.
fn comparable(all: impl Iterator<Item = (String, String)>) -> BTreeMap<String, Vec<String>> {
    let mut out = BTreeMap::<String, Vec<String>>::new();
    for (n, v) in all {
        if !matches!(n.as_str(), "x-request-id" | "host" | "connection" | "traceparent")
            && !n.starts_with("x-b3")
        {
            out.entry(n).or_default().push(v);
        }
    }
    out
}

#[tokio::test]
async fn says_what_the_engine_does() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let mut m = manager(RouteSource::Rds("r".into()));
    m.filters = vec![HttpFilter::Rbac(rules()), HttpFilter::Cors, HttpFilter::Fault];
    m.normalize_path = true;
    let p = Proxy::new()
        .cluster(cluster("a", &[a.address]))
        .cluster(cluster("b", &[b.address]))
        .routes(table(hosts()))
        .listener(listener(Direction::Outbound, vec![http_chain(m)]))
        .run();
    let destination = p.address("l");
    let mut config = p.snap.clone();
    // It was bound to a port that the kernel chose.
    let mut l = (**config.listeners.get("l").unwrap()).clone();
    l.address = destination;
    config.listeners.insert("l".into(), std::sync::Arc::new(l));

    let none: &[(&str, &str)] = &[];
    let friend = [("origin", "https://friend.example")];
    let preflight = [("origin", "https://friend.example"), ("access-control-request-method", "GET")];
    let mut kinds = std::collections::BTreeSet::new();
    for (method, host, path, headers) in [
        ("GET", "reviews", "/rest/x", none),
        ("GET", "REVIEWS", "/rest", none),
        ("GET", "a.wild.example", "/rest?x=1", none),
        ("GET", "wild.example", "/rest", none),
        ("GET", "reviews:80", "/rest", none),
        ("GET", "reviews", "/nothing", none),
        ("GET", "reviews", "/x", &[("x-user", "jason")]),
        ("GET", "reviews", "/x", &[("x-user", "jason"), ("x-robot", "1")]),
        ("GET", "reviews", "/x?v=2", none),
        ("GET", "reviews", "/x?v=3", none),
        ("GET", "reviews", "/fOLDED", none),
        ("GET", "reviews", "/api/books?q=1", &[("x-gone", "1"), ("x-add", "0")]),
        ("GET", "reviews", "/apix", none),
        ("GET", "reviews", "/r/12?a", none),
        ("GET", "reviews", "/r/x", none),
        ("GET", "reviews", "/old/a?b=c", none),
        ("GET", "reviews", "/rest/../old/x", none),
        ("GET", "reviews", "/rest/%2fx", none),
        ("GET", "reviews", "/tea", none),
        ("GET", "reviews", "/fault", none),
        ("GET", "reviews", "/missing", none),
        ("GET", "secure", "/x", none),
        ("GET", "reviews", "/rest/secret", none),
        ("GET", "reviews", "/rest", &[("x-role", "guest")]),
        ("GET", "reviews", "/cors", &friend),
        ("GET", "reviews", "/cors", &[("origin", "https://foe.example")]),
        ("OPTIONS", "reviews", "/cors", &preflight),
        ("OPTIONS", "reviews", "/cors", none),
        ("GET", "reviews", "/rest", &[("x-envoy-upstream-rq-timeout-ms", "1500")]),
    ] {
        let lines: String = headers.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect();
        let raw = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{lines}\r\n");
        let real = Response::parse(&p.raw("l", &raw).await);
        let arrival = Arrival {
            direction: Direction::Outbound,
            destination,
            source: "127.0.0.1".parse().unwrap(),
            hello: None,
            peer: None,
            request: Some(Request {
                method: method.into(),
                authority: host.into(),
                path: path.into(),
                headers: headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
                http2: false,
            }),
        };
        let said = simulate(&config, &arrival).unwrap();
        let what = format!("{method} {host}{path} {headers:?}\nreal: {real:?}\nsaid: {said:?}");
        compare(&real, &said, &what);
        kinds.insert(said.action.as_str());
    }
    let all = ["deny", "direct-response", "forward", "not-found", "redirect", "refuse"];
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), all, "every kind of answer was compared");
}

fn compare(real: &Response, said: &Passage, what: &str) {
    if let Some(status) = said.status {
        assert_eq!(real.status, status, "{what}");
        assert_eq!(real.header("location"), said.location.as_deref(), "{what}");
    } else {
        assert_eq!((said.action, real.status), (Action::Forward, 200), "{what}");
    }
    for (n, v) in &said.response_headers {
        assert_eq!(real.header(n), Some(v.as_str()), "{what}");
    }
    let (Some(cluster), Some(up), None) = (&said.cluster, &said.upstream, said.status) else { return };
    let mut lines = real.body.lines();
    let first = lines.next().unwrap_or_default();
    assert_eq!(first, format!("{cluster} {} {} HTTP/1.1", up.method, up.path), "{what}");
    let all: Vec<(String, String)> =
        lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
    let host = all.iter().find(|(n, _)| n == "host").map(|(_, v)| v.as_str());
    assert_eq!(host, Some(up.authority.as_str()), "{what}");
    assert_eq!(comparable(all.into_iter()), comparable(up.headers.iter().cloned()), "{what}");
}
