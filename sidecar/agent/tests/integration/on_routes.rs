//! What single routes ask for: what Envoy does, the engine does.

use std::{sync::Arc, time::Duration};

use mesh_model::proxy::*;

use crate::side_by_side::{Pair, cluster, manager, route, send, server, to_up};

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{headers}\r\n")
}

/// A route for a prefix.
fn under(path: &str, f: Forward, filters: RouteFilters) -> Route {
    let mut r = route(f, filters);
    r.matches = RouteMatch { path: PathMatch::Prefix(path.into()), ..RouteMatch::any() };
    r
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn sessions_of_routes() {
    let say = |name: &'static str| server(move |_| (200, String::new(), name.into()));
    let (a, b) = (say("a").await, say("b").await);
    let mut up = cluster("up", a, UpstreamHttp::Http1);
    let Discovery::Static(all) = &mut up.discovery else { panic!() };
    let mut second = all.localities[0].endpoints[0].clone();
    second.port = b.port();
    all.localities[0].endpoints.push(second);
    let session = |state, absolute| RouteFilters {
        session: Some(SessionOverride::Set(StatefulSession {
            state: Some(state),
            absolute: Duration::from_secs(absolute),
            ..StatefulSession::default()
        })),
        ..RouteFilters::default()
    };
    let cookie =
        |ttl| SessionState::Cookie { name: "stay".into(), path: "/".into(), ttl: Duration::from_secs(ttl) };
    let routes = vec![
        under("/forgotten", to_up(), session(cookie(0), 0)),
        under("/lasting", to_up(), session(cookie(60), 0)),
        // Envoy knows no end of these, and takes them as they are.
        under("/ended", to_up(), session(cookie(0), 60)),
        under("/header", to_up(), session(SessionState::Header("x-stay".into()), 0)),
        under("/none", to_up(), RouteFilters::default()),
    ];
    let m = manager(vec![HttpFilter::StatefulSession(Arc::default())], routes);
    let p = Pair::new(m, vec![up]).await;
    for (from, to) in [(p.engine, p.envoy), (p.envoy, p.engine), (p.engine, p.engine), (p.envoy, p.envoy)] {
        for path in ["/forgotten", "/lasting", "/ended", "/header"] {
            let first = send(from, &get(path, "")).await;
            let told = match first.headers.get("set-cookie") {
                Some(set) => {
                    assert_eq!(set.contains("Max-Age=60"), path == "/lasting", "{set}");
                    format!("cookie: {}\r\n", set.split(';').next().unwrap())
                }
                None => format!("x-stay: {}\r\n", first.headers["x-stay"]),
            };
            for _ in 0..6 {
                let next = send(to, &get(path, &told)).await;
                assert_eq!(next.body, first.body, "{path} by {from}, on with {to}");
                assert_eq!((next.headers.get("set-cookie"), next.headers.get("x-stay")), (None, None));
            }
        }
        assert_eq!(send(from, &get("/none", "")).await.headers.get("set-cookie"), None);
    }
    // A host that is none of the cluster's is nobody's.
    for host in ["127.0.0.1:1", "x", "10.0.0.1:80/0000beef"] {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let (ours, theirs) = p.ask(&get("/header", &format!("x-stay: {}\r\n", STANDARD.encode(host)))).await;
        for answer in [ours, theirs] {
            assert_eq!(answer.status, 200);
            assert!(answer.headers.contains_key("x-stay"), "{host}: {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn authorisers_of_routes() {
    let up = server(|r| {
        let lower = r.to_ascii_lowercase();
        let kept = |l: &&str| ["x-", "content-", "host"].iter().any(|p| l.starts_with(p));
        let mut lines: Vec<&str> =
            lower.lines().filter(kept).filter(|l| !l.starts_with("x-request-id")).collect();
        lines.retain(|l| !l.starts_with("x-envoy") && !l.starts_with("x-forwarded"));
        lines.sort_unstable();
        (200, String::new(), lines.join("\n"))
    })
    .await;
    // Says yes to who knows its name, and shows what it saw.
    let authority = |name: &'static str| {
        server(move |r| {
            let lower = r.to_ascii_lowercase();
            let path = r.split(' ').nth(1).unwrap_or_default();
            let saw = format!(
                "x-saw: {path}\r\nx-by: {name}\r\ncontent-type: text/html\r\nx-a-seen: {}\r\n",
                lower.contains("\r\nx-a:")
            );
            if lower.contains(&format!("authorization: {name}")) {
                (200, saw, String::new())
            } else {
                (403, saw, "no".into())
            }
        })
    };
    let (one, two) = (authority("one").await, authority("two").await);
    let filter = |name: &str, upstream, allowed: &[&str]| {
        let exact = |l: &[&str]| -> Vec<StringMatch> {
            l.iter().map(|n| StringMatch { ignore_case: true, ..StringMatch::exact(*n) }).collect()
        };
        HttpFilter::ExtAuthz(Arc::new(ExtAuthz {
            service: AuthzService::Http(Box::new(HttpAuthz {
                uri: "http://authz".into(),
                cluster: name.into(),
                timeout: Duration::from_secs(2),
                path_prefix: format!("/{name}"),
                allowed_upstream_headers: upstream,
                ..HttpAuthz::default()
            })),
            allowed_headers: exact(allowed),
            on_routes: format!("envoy.filters.http.ext_authz/{name}"),
            ..ExtAuthz::default()
        }))
    };
    let on = |names: &[&str]| RouteFilters {
        authorizers: names.iter().map(|n| format!("envoy.filters.http.ext_authz/{n}")).collect(),
        ..RouteFilters::default()
    };
    let routes = vec![
        under("/one", to_up(), on(&["one"])),
        under("/two", to_up(), on(&["two"])),
        under("/both", to_up(), on(&["one", "two"])),
        under("/", to_up(), RouteFilters::default()),
    ];
    // As pilot has it where a rule names none.
    let not_framing = other_than(&[
        "connection",
        "content-*",
        "date",
        "host",
        "keep-alive",
        "proxy-*",
        "server",
        "te",
        "trailer",
        "transfer-*",
        "upgrade",
        "x-envoy-*",
    ]);
    let filters =
        vec![filter("one", not_framing, &["x-a"]), filter("two", vec![StringMatch::exact("x-by")], &[])];
    let clusters = vec![
        cluster("up", up, UpstreamHttp::Http1),
        cluster("one", one, UpstreamHttp::Http1),
        cluster("two", two, UpstreamHttp::Http1),
    ];
    let p = Pair::new(manager(filters, routes), clusters).await;
    for path in ["/one/a?q=1", "/two", "/both", "/other"] {
        for who in [
            "",
            "authorization: one\r\n",
            "authorization: two\r\n",
            "authorization: one\r\nx-a: 1\r\nx-by: me\r\n",
        ] {
            let answer = p.alike(&get(path, who), &["x-saw", "x-by"]).await;
            let asked = ["/one", "/two"].iter().any(|n| path.starts_with(n)) || path == "/both";
            let right = who.starts_with("authorization: one") && path.starts_with("/one")
                || who.contains("two") && path == "/two";
            assert_eq!(answer.status == 200, !asked || right, "{path} {who}: {answer:?}");
        }
    }
}
