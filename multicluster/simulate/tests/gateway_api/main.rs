//! The Gateway API, by requests to meshes on paper.

mod attach;
mod authorizers;
mod connections;
mod rules;
mod sessions;
#[path = "../support/mod.rs"]
mod support;

use serde_json::{Value, json};
use support::{Mesh, bookinfo};

/// The proxy of a Gateway called `shop`.
const EDGE: &str = "default/shop";

fn object(kind: &str, name: &str, spec: Value) -> Value {
    in_namespace("default", kind, name, spec)
}

fn in_namespace(namespace: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": kind,
        "metadata": {"name": name, "namespace": namespace}, "spec": spec
    })
}

fn gateway(listeners: Value) -> Value {
    object("Gateway", "shop", json!({"gatewayClassName": "istio", "listeners": listeners}))
}

fn plain() -> Value {
    json!({"name": "http", "port": 80, "protocol": "HTTP"})
}

fn secure(extra: Value) -> Value {
    let mut l = json!({"name": "https", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "cert"}]}});
    l.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    l
}

fn backend(name: &str) -> Value {
    json!({"name": name, "port": 9080})
}

fn service(name: &str) -> String {
    format!("outbound|9080||{name}.default.svc.cluster.local")
}

/// A route at the Gateway `shop`.
fn route(name: &str, rules: Value) -> Value {
    object("HTTPRoute", name, json!({"parentRefs": [{"name": "shop"}], "rules": rules}))
}

/// One rule to reviews with `extra` in it.
fn rule(extra: Value) -> Value {
    let mut r = json!({"backendRefs": [backend("reviews")]});
    r.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    json!([r])
}

fn edge(rules: Value) -> Mesh {
    bookinfo().with(gateway(json!([plain()]))).with(route("r", rules))
}

/// Asks the Gateway's proxy.
#[track_caller]
fn ask(m: &Mesh, request: &str, headers: &[&str], want: Value) -> Value {
    m.asks(EDGE, request, headers, &want)
}

#[track_caller]
fn goes(m: &Mesh, request: &str, to: &str) {
    ask(m, request, &[], json!({"action": "forward", "cluster": service(to)}));
}

#[track_caller]
fn lost(m: &Mesh, request: &str) {
    ask(m, request, &[], json!({"action": "not-found", "status": 404}));
}

fn database() -> Mesh {
    bookinfo().with(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "db", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "tcp-db", "port": 5432}], "selector": {"app": "ratings"}}
    }))
}
