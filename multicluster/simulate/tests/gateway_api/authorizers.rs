//! Authorisers that rules ask.

use serde_json::{Value, json};

use super::{EDGE, Mesh, ask, backend, bookinfo, edge, gateway, plain, route, rule, service};

fn filter(protocol: &str, name: &str) -> Value {
    let asks = json!({"protocol": protocol, "backendRef": backend(name)});
    json!({"type": "ExternalAuth", "externalAuth": asks})
}

fn rules(filters: &Value) -> Value {
    json!([
        {"matches": [{"path": {"value": "/asked"}}], "filters": filters, "backendRefs": [backend("reviews")]},
        {"backendRefs": [backend("reviews")]},
    ])
}

/// Who is asked about a request.
fn asked(m: &Mesh, from: &str, request: &str) -> Vec<String> {
    let answer = m.asks(from, request, &[], &json!({"action": "forward"}));
    answer["asks"].as_array().unwrap().iter().map(|a| a["who"].as_str().unwrap().to_owned()).collect()
}

fn speaks_grpc(mut m: Mesh, position: usize) -> Mesh {
    m.0[position]["spec"]["ports"][0]["name"] = json!("grpc");
    m
}

#[test]
fn only_requests_of_the_rule_are_asked_about() {
    let by_ratings = vec![format!("external authorization by {}", service("ratings"))];
    let m = edge(rules(&json!([filter("HTTP", "ratings")])));
    assert_eq!(asked(&m, EDGE, "GET http://x/asked"), by_ratings);
    assert!(asked(&m, EDGE, "GET http://x/").is_empty());
    assert!(asked(&m, "default/productpage-v1", "GET http://reviews:9080/asked").is_empty());
    // Callers of a service, and several who are asked.
    let mut of_service =
        route("r", rules(&json!([filter("HTTP", "ratings"), filter("HTTP", "productpage")])));
    of_service["spec"]["parentRefs"] = json!([{"group": "", "kind": "Service", "name": "reviews"}]);
    let m = bookinfo().with(of_service);
    assert_eq!(asked(&m, "default/productpage-v1", "GET http://reviews:9080/asked").len(), 2);
    assert!(asked(&m, "default/productpage-v1", "GET http://reviews:9080/").is_empty());
}

#[test]
fn who_cannot_be_asked_cannot_say_yes() {
    let fails = |m: &Mesh, reason: &str| {
        ask(m, "GET http://x/asked", &[], json!({"action": "direct-response", "status": 500}));
        ask(m, "GET http://x/", &[], json!({"action": "forward"}));
        let problems = m.load().problems().to_vec();
        assert!(problems.iter().any(|p| p.message.contains(reason)), "{reason}: {problems:?}");
    };
    fails(&edge(rules(&json!([filter("HTTP", "nobody")]))), "BackendNotFound");
    let mut elsewhere = filter("HTTP", "auth");
    elsewhere["externalAuth"]["backendRef"]["namespace"] = json!("bank");
    fails(&edge(rules(&json!([elsewhere]))), "RefNotPermitted");
    let grpc = edge(rules(&json!([filter("GRPC", "ratings")])));
    fails(&grpc, "UnsupportedProtocol");
    assert_eq!(asked(&speaks_grpc(grpc, 1), EDGE, "GET http://x/asked").len(), 1);
}

#[test]
fn a_preflight_is_answered_before() {
    let cors = json!({"type": "CORS", "cors": {"allowOrigins": ["https://a.example"]}});
    let m = edge(rule(json!({"filters": [cors, filter("HTTP", "ratings")]})));
    let headers = ["origin: https://a.example", "access-control-request-method: GET"];
    ask(&m, "OPTIONS http://x/", &headers, json!({"action": "direct-response", "status": 200, "asks": []}));
    let m = bookinfo().with(gateway(json!([plain()]))).with(route("r", rule(json!({}))));
    assert!(asked(&m, EDGE, "GET http://x/").is_empty());
}
