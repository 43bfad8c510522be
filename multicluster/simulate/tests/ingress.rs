//! What Ingresses make of requests at a gateway.

mod support;

use serde_json::{Value, json};
use support::{Mesh, bookinfo};

const EDGE: &str = "istio-system/istio-ingressgateway";

fn document(api: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": api, "kind": kind, "spec": spec,
           "metadata": {"name": name, "namespace": "default", "annotations": {"kubernetes.io/ingress.class": "istio"}}})
}

fn ingress(name: &str, spec: Value) -> Value {
    document("networking.k8s.io/v1", "Ingress", name, spec)
}

fn path(kind: &str, path: &str, service: &str) -> Value {
    json!({"path": path, "pathType": kind, "backend": {"service": {"name": service, "port": {"name": "http"}}}})
}

fn rule(host: &str, paths: &[Value]) -> Value {
    json!({"host": host, "http": {"paths": paths}})
}

/// Where a request goes: a service, or the status of an answer.
#[track_caller]
fn goes(mesh: &Mesh, request: &str, to: &str) {
    let want = match to.parse::<u16>() {
        Ok(status) => json!({"action": "not-found", "status": status}),
        Err(_) => {
            json!({"action": "forward", "cluster": format!("outbound|9080||{to}.default.svc.cluster.local")})
        }
    };
    mesh.asks(EDGE, request, &[], &want);
}

#[test]
fn paths_of_a_host() {
    let rules = json!([
        rule(
            "a.example",
            &[
                path("Prefix", "/", "productpage"),
                path("Prefix", "/reviews/", "reviews"),
                path("Exact", "/reviews/one", "ratings"),
                path("ImplementationSpecific", "/old/*", "reviews"),
                path("ImplementationSpecific", "/new.*", "reviews"),
                path("ImplementationSpecific", "/exactly", "ratings"),
            ]
        ),
        rule("*.b.example", &[path("Prefix", "/", "ratings")]),
    ]);
    let mesh = bookinfo().with(ingress("web", json!({"rules": rules})));
    for (request, to) in [
        ("GET http://a.example/", "productpage"),
        ("GET http://a.example/reviews", "reviews"),
        ("GET http://a.example/reviews/", "reviews"),
        ("GET http://a.example/reviews/two", "reviews"),
        ("GET http://a.example/reviews/one", "ratings"),
        ("GET http://a.example/reviews/one/", "reviews"),
        // Of whole segments.
        ("GET http://a.example/reviewsandmore", "productpage"),
        ("GET http://a.example/old", "reviews"),
        ("GET http://a.example/old/x", "reviews"),
        ("GET http://a.example/older", "productpage"),
        ("GET http://a.example/new/x", "reviews"),
        ("GET http://a.example/newer", "productpage"),
        ("GET http://a.example/exactly", "ratings"),
        ("GET http://a.example/exactly/x", "productpage"),
        ("GET http://x.b.example/", "ratings"),
        ("GET http://b.example/", "404"),
        ("GET http://c.example/", "404"),
    ] {
        goes(&mesh, request, to);
    }
}

#[test]
fn several_with_one_host() {
    let of = |name: &str, paths: &[Value]| ingress(name, json!({"rules": [rule("a.example", paths)]}));
    let mesh = bookinfo()
        .with(of("b", &[path("Prefix", "/", "reviews"), path("Prefix", "/b", "reviews")]))
        .with(of("a", &[path("Prefix", "/", "ratings")]));
    goes(&mesh, "GET http://a.example/b/x", "reviews");
    // Of equal paths the first counts.
    goes(&mesh, "GET http://a.example/x", "ratings");
    // Routes of a VirtualService for the host come after those of Ingresses, which have no time of creation in Istio.
    let authored = |mut d: Value| {
        d["metadata"]["creationTimestamp"] = json!("2020-01-01T00:00:00Z");
        d
    };
    let gateway = document(
        "networking.istio.io/v1",
        "Gateway",
        "edge",
        json!({"selector": {"istio": "ingressgateway"}, "servers": [{"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}),
    );
    let to = |prefix: &str, host: &str| json!({"match": [{"uri": {"prefix": prefix}}], "route": [{"destination": {"host": host}}]});
    let routes = document(
        "networking.istio.io/v1",
        "VirtualService",
        "authored",
        json!({"hosts": ["a.example"], "gateways": ["edge"], "http": [to("/b", "productpage"), to("/c", "productpage")]}),
    );
    let both = mesh.with(authored(gateway)).with(authored(routes));
    goes(&both, "GET http://a.example/b/x", "reviews");
    goes(&both, "GET http://a.example/c", "productpage");
    goes(&both, "GET http://a.example/x", "ratings");
}

#[test]
fn a_rule_without_host_is_for_all() {
    let all = json!({"http": {"paths": [path("Prefix", "/", "reviews")]}});
    let rules = json!([all, rule("a.example", &[path("Prefix", "/x", "ratings")])]);
    let mesh = bookinfo().with(ingress("web", json!({"rules": rules})));
    goes(&mesh, "GET http://b.example/x", "reviews");
    goes(&mesh, "GET http://a.example/x", "ratings");
    // A host that has rules has those alone.
    goes(&mesh, "GET http://a.example/", "404");
}

#[test]
fn tls_by_host() {
    let rules = json!([rule("a.example", &[path("Prefix", "/", "reviews")])]);
    let tls = json!([{"hosts": ["a.example"], "secretName": "a-cert"}]);
    let mesh = bookinfo().with(ingress("web", json!({"rules": rules, "tls": tls})));
    goes(&mesh, "GET https://a.example/", "reviews");
    goes(&mesh, "GET http://a.example/", "reviews");
    let config = mesh.load().configuration(EDGE).unwrap();
    let text = config["listeners"]["0.0.0.0_443"].to_string();
    assert!(text.contains("a-cert") && text.contains("a.example"), "{text}");
}

/// Sidecars know nothing of them.
#[test]
fn the_mesh_inside_is_not_concerned() {
    let rules = json!([rule("ratings.default.svc.cluster.local", &[path("Prefix", "/", "reviews")])]);
    let mesh = bookinfo().with(ingress("web", json!({"rules": rules})));
    let want = json!({"cluster": "outbound|9080||ratings.default.svc.cluster.local"});
    mesh.asks("default/productpage-v1", "GET http://ratings:9080/", &[], &want);
}

#[test]
fn status_and_problems() {
    let rules = json!([rule("a.example", &[path("Prefix", "/", "nobody")])]);
    let edge = json!({"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": {"name": "edge", "namespace": "istio-system"},
        "spec": {"address": "10.1.0.99", "labels": {"istio": "ingressgateway"}}});
    let mesh = bookinfo().with(edge).with(ingress("web", json!({"rules": rules}))).load();
    let status = serde_json::to_value(mesh.ingress_status()).unwrap();
    assert_eq!(
        status,
        json!([{"namespace": "default", "name": "web", "status": {"loadBalancer": {"ingress": [{"ip": "10.1.0.99"}]}}}])
    );
    let [p] = mesh.problems() else { panic!("{:?}", mesh.problems()) };
    assert!(p.object == "Ingress default/web" && p.message.contains("there is no Service nobody"), "{p:?}");
}
