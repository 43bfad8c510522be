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
