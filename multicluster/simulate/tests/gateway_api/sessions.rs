//! Sessions that stay on a host.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{EDGE, ask, backend, bookinfo, edge, gateway, plain, route, rule, service};

fn kept(by: &str) -> Value {
    rule(json!({"sessionPersistence": {"type": by, "sessionName": "stay"}}))
}

/// Headers of a client that was at an endpoint.
fn was_at(by: &str, endpoint: &str) -> String {
    let token = STANDARD.encode(endpoint);
    if by == "Cookie" { format!("cookie: a=b; stay={token}") } else { format!("stay: {token}") }
}

#[test]
fn a_client_stays_where_it_was() {
    for by in ["Cookie", "Header"] {
        let m = edge(kept(by));
        ask(&m, "GET http://x/", &[], json!({"session": {"name": "stay", "endpoint": null}}));
        let told = was_at(by, "10.1.0.12:9080");
        ask(&m, "GET http://x/", &[&told], json!({"session": {"endpoint": "10.1.0.12:9080"}}));
        // An endpoint of another service, none at all, and no address.
        for no in ["10.1.0.21:9080", "169.254.169.254:80", "10.1.0.12:22", "x", "10.1.0.12:9080/0000beef"] {
            let told = was_at(by, no);
            ask(&m, "GET http://x/", &[&told], json!({"action": "forward", "session": {"endpoint": null}}));
        }
    }
    let without = edge(rule(json!({})));
    ask(&without, "GET http://x/", &[&was_at("Cookie", "10.1.0.12:9080")], json!({"session": null}));
}

#[test]
fn a_session_outlives_weights() {
    let rules = |reviews: i32| {
        let mut heavy = backend("ratings");
        heavy["weight"] = json!(9);
        let mut light = backend("reviews");
        light["weight"] = json!(reviews);
        json!([{"backendRefs": [heavy, light], "sessionPersistence": {"sessionName": "stay"}}])
    };
    for weight in [1, 0] {
        let m = edge(rules(weight));
        ask(&m, "GET http://x/", &[], json!({"cluster": service("ratings")}));
        let told = was_at("Cookie", "10.1.0.12:9080");
        let want = json!({"cluster": service("reviews"), "session": {"endpoint": "10.1.0.12:9080"}});
        ask(&m, "GET http://x/", &[&told], want);
    }
    // Without any weight nothing comes to anybody.
    let mut none = backend("reviews");
    none["weight"] = json!(0);
    let m = edge(json!([{"backendRefs": [none], "sessionPersistence": {}}]));
    ask(&m, "GET http://x/", &[&was_at("Cookie", "10.1.0.12:9080")], json!({"status": 500}));
}

#[test]
fn rules_do_not_share_sessions() {
    let of = |path: &str| {
        let mut r = rule(json!({"matches": [{"path": {"value": path}}], "sessionPersistence": {}}));
        r[0].take()
    };
    let m = edge(json!([of("/a"), of("/b")]));
    let name = |path: &str| {
        let answer = m.asks(EDGE, &format!("GET http://x{path}"), &[], &json!({"session": {"path": "/"}}));
        answer["session"]["name"].as_str().unwrap().to_owned()
    };
    assert_ne!(name("/a"), name("/b"));
    assert_eq!(name("/a"), name("/a/c"));
}

#[test]
fn what_cannot_be_kept_is_said() {
    let m = edge(rule(json!({"sessionPersistence": {"idleTimeout": "5m"}})));
    ask(&m, "GET http://x/", &[], json!({"status": 500}));
    let says = m.load().problems().iter().any(|p| p.message.contains("idleTimeout"));
    assert!(says, "{:?}", m.load().problems());
}

#[test]
fn services_have_istios_labels() {
    let labelled = |label: &str, value: &str| {
        let mut m = bookinfo();
        m.0[0]["metadata"]["labels"] = json!({label: value});
        m
    };
    let caller = "default/productpage-v1";
    let by_cookie = labelled("istio.io/persistent-session", "stay");
    let want = json!({"session": {"by": "cookie", "name": "stay", "path": "/", "maxAge": null}});
    by_cookie.asks(caller, "GET http://reviews:9080/", &[], &want);
    by_cookie.asks(caller, "GET http://ratings:9080/", &[], &json!({"session": null}));
    let told = was_at("Cookie", "10.1.0.13:9080");
    let want = json!({"session": {"endpoint": "10.1.0.13:9080"}});
    by_cookie.asks(caller, "GET http://reviews:9080/", &[&told], &want);
    let by_header = labelled("istio.io/persistent-session-header", "Stay");
    let want = json!({"session": {"by": "header", "name": "stay"}});
    by_header.asks(caller, "GET http://reviews:9080/", &[], &want);
    // What a route says comes first, and one that says nothing has what its service has.
    let shop = |rules| by_header.clone().with(gateway(json!([plain()]))).with(route("r", rules));
    ask(&shop(kept("Cookie")), "GET http://x/", &[], json!({"session": {"by": "cookie"}}));
    ask(&shop(rule(json!({}))), "GET http://x/", &[], want);
}

#[test]
fn nothing_looks_for_sessions_where_there_are_none() {
    let filters = |m: &super::Mesh, from: &str| {
        let c = m.load().configuration(from).unwrap();
        c["filters"].to_string().contains("StatefulSession")
    };
    let m = edge(rule(json!({})));
    assert!(!filters(&m, EDGE) && !filters(&m, "default/productpage-v1"));
    let m = edge(kept("Cookie"));
    assert!(filters(&m, EDGE) && !filters(&m, "default/productpage-v1"));
}
