//! Kubernetes' own objects as plain documents.

mod support;

use serde_json::{Value, json};
use support::{Mesh, bookinfo};

fn service(name: &str, target: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": "10.96.1.1", "selector": {"app": name},
                 "ports": [{"name": "http", "port": 80, "targetPort": target}]}
    })
}

fn pod(name: &str, app: &str, ip: &str, node: &str, ready: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": app, "version": "v1"}},
        "spec": {"serviceAccountName": format!("{app}-sa"), "nodeName": node,
                 "containers": [{"name": "app", "image": "x", "ports": [{"name": "web", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": ready}]}
    })
}

fn node(name: &str, zone: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {
            "topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": zone}},
        "status": {"capacity": {"cpu": "4"}}
    })
}

fn slice(service: &str, endpoints: Value) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{service}-x"), "namespace": "shop",
                     "labels": {"kubernetes.io/service-name": service}},
        "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]
    })
}

#[test]
fn pods_are_workloads() {
    let mesh = Mesh::default()
        .with(node("n1", "z1"))
        .with(node("n2", "z2"))
        .with(service("cart", json!("web")))
        .with(pod("cart-1", "cart", "10.1.0.1", "n1", "True"))
        .with(pod("cart-2", "cart", "10.1.0.2", "n2", "False"))
        .with(pod("front-7f-x", "front", "10.1.0.3", "n2", "True"))
        .with(json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "cart", "namespace": "shop"},
                     "spec": {"replicas": 2}}));
    mesh.asks("shop/front", "GET http://cart/", &[], &json!({
        "caller": {"principal": "spiffe://mesh.local/ns/shop/sa/front-sa", "assumed": null},
        "action": "forward",
        "endpoints": [
            {"address": "10.1.0.1:8080", "workload": "shop/cart-1", "locality": "r1/z1", "health": "healthy",
             "active": true, "tls": "mutual"},
            {"address": "10.1.0.2:8080", "workload": "shop/cart-2", "locality": "r1/z2", "health": "unhealthy",
             "active": false, "tls": "mutual"}],
    }));
}

#[test]
fn locality_decides_with_outlier_detection() {
    let mesh = Mesh::default()
        .with(node("n1", "z1"))
        .with(node("n2", "z2"))
        .with(service("cart", json!(8080)))
        .with(pod("cart-1", "cart", "10.1.0.1", "n1", "True"))
        .with(pod("cart-2", "cart", "10.1.0.2", "n2", "True"))
        .with(pod("front-x", "front", "10.1.0.3", "n2", "True"))
        .with(json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
                     "metadata": {"name": "cart", "namespace": "shop"},
                     "spec": {"host": "cart", "trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 3}}}}));
    let a = mesh.asks(
        "shop/front",
        "GET http://cart/",
        &[],
        &json!({
            "trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 3}}
        }),
    );
    let mut active: Vec<_> =
        a["endpoints"].as_array().unwrap().iter().map(|e| (&e["workload"], &e["active"])).collect();
    active.sort_by_key(|(w, _)| w.to_string());
    assert_eq!(
        json!(active),
        json!([["shop/cart-1", false], ["shop/cart-2", true]]),
        "the caller's own zone"
    );
}

#[test]
fn slices_say_what_is_behind_a_service() {
    let endpoints = json!([
        {"addresses": ["10.1.0.1"], "targetRef": {"kind": "Pod", "name": "cart-1"}, "conditions": {"ready": true}},
        {"addresses": ["10.1.0.2"], "targetRef": {"kind": "Pod", "name": "cart-2"},
         "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["10.1.0.9"], "conditions": {"ready": false}},
    ]);
    let mesh = Mesh::default()
        .with(service("cart", json!("web")))
        .with(pod("cart-1", "cart", "10.1.0.1", "", "False"))
        .with(slice("cart", endpoints))
        // Selected, and yet not in the slice: the controller knows better.
        .with(pod("cart-8", "cart", "10.1.0.8", "", "True"));
    mesh.asks(
        "shop/x",
        "GET http://cart/",
        &[],
        &json!({"endpoints": [
            {"address": "10.1.0.1:8080", "workload": "shop/cart-1", "health": "healthy", "active": true},
            {"address": "10.1.0.2:8080", "workload": "shop/cart-2", "health": "draining", "active": false},
            {"address": "10.1.0.9:8080", "health": "unhealthy", "active": false},
        ]}),
    );
    // Without selector it is something outside: no proxy, hence no TLS.
    let outside = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "db", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.1.2", "ports": [{"name": "http", "port": 80}]}});
    let mesh = Mesh::default().with(outside).with(slice("db", json!([{"addresses": ["192.0.2.5"]}])));
    mesh.asks(
        "shop/x",
        "GET http://db/",
        &[],
        &json!({"endpoints": [
        {"address": "192.0.2.5:8080", "workload": null, "tls": "none", "active": true}]}),
    );
}

#[test]
fn who_has_no_proxy_asks_no_policy() {
    let deny = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "none", "namespace": "shop"}, "spec": {}});
    let mut bare = pod("cart-1", "cart", "10.1.0.1", "", "True");
    let mesh =
        |p: &Value| Mesh::default().with(service("cart", json!("web"))).with(p.clone()).with(deny.clone());
    let ask = |p: &Value, want: Value| mesh(p).asks("shop/x", "GET http://cart/", &[], &want);
    ask(&bare, json!({"action": "deny", "status": 403, "endpoints": [{"tls": "mutual"}]}));
    bare["metadata"]["annotations"] = json!({"sidecar.istio.io/inject": "false"});
    ask(&bare, json!({"action": "forward", "endpoints": [{"tls": "none"}]}));
}

#[test]
fn pods_that_do_not_run_are_none() {
    let mut done = pod("cart-1", "cart", "10.1.0.1", "", "True");
    done["status"]["phase"] = json!("Succeeded");
    let mut pending = pod("cart-2", "cart", "", "", "True");
    pending["status"] = json!({"phase": "Pending"});
    let mesh = Mesh::default().with(service("cart", json!("web"))).with(done).with(pending);
    mesh.asks("shop/x", "GET http://cart/", &[], &json!({"endpoints": [], "status": 503}));
}

#[test]
fn service_entries_select_pods() {
    let mesh = Mesh::default().with(pod("cart-1", "cart", "10.1.0.1", "", "True")).with(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"hosts": ["cart.example"], "location": "MESH_INTERNAL", "resolution": "STATIC",
                 "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080}],
                 "workloadSelector": {"labels": {"app": "cart"}}}
    }));
    mesh.asks(
        "shop/x",
        "GET http://cart.example/",
        &[],
        &json!({
        "endpoints": [{"address": "10.1.0.1:8080", "workload": "shop/cart-1", "tls": "mutual"}]}),
    );
}

#[test]
fn a_service_whose_workloads_are_not_written_down() {
    let only = |d: &Value| matches!(d["kind"].as_str(), Some("Service" | "DestinationRule"));
    let mesh = Mesh(bookinfo().0.into_iter().filter(only).collect())
        .with(json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "reviews", "namespace": "default"},
            "spec": {"hosts": ["reviews"], "http": [{"route": [{"destination": {"host": "reviews", "subset": "v3"}}]}]}}))
        .with(json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "v3", "namespace": "default"},
            "spec": {"selector": {"matchLabels": {"app": "reviews", "version": "v3"}}, "action": "DENY",
                     "rules": [{"to": [{"operation": {"methods": ["POST"]}}]}]}}));
    mesh.asks("default/productpage", "GET http://reviews:9080/", &[], &json!({
        "action": "forward", "status": null, "subset": "v3", "endpoints": [], "caller": {"labels": {"app": "productpage"}},
    }));
    mesh.asks(
        "default/productpage",
        "POST http://reviews:9080/",
        &[],
        &json!({
            "action": "deny", "status": 403,
            "detail": "default/(app=reviews,version=v3): denied by AuthorizationPolicy default/v3, rule 0",
        }),
    );
}

#[test]
fn what_makes_pods_says_which_workloads_there_will_be() {
    let deployment = |name: &str, app: &str, version: &str| {
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": "shop"},
            "spec": {"template": {"metadata": {"labels": {"app": app, "version": version}}, "spec": {
                "serviceAccountName": format!("{app}-sa"),
                "containers": [{"name": "a", "ports": [{"name": "web", "containerPort": 8080}]}]}}}})
    };
    let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "front", "namespace": "shop"}, "spec": {"selector": {"matchLabels": {"app": "cart"}}, "rules": [
            {"from": [{"source": {"principals": ["mesh.local/ns/shop/sa/front-sa"]}}]}]}});
    let mesh = Mesh::default()
        .with(service("cart", json!("web")))
        .with(deployment("cart-v1", "cart", "v1"))
        .with(deployment("front", "front", "v1"))
        .with(deployment("other", "other", "v1"))
        .with(policy);
    mesh.asks(
        "shop/front",
        "GET http://cart/",
        &[],
        &json!({"action": "forward", "endpoints": [], "caller": {
            "principal": "spiffe://mesh.local/ns/shop/sa/front-sa",
            "assumed": "no pod of front is written down: taken as what makes them says"}}),
    );
    mesh.asks(
        "shop/other",
        "GET http://cart/",
        &[],
        &json!({"action": "deny", "detail": "shop/cart-v1: no ALLOW policy lets it in"}),
    );
}
