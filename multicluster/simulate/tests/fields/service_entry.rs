//! ServiceEntry, WorkloadEntry and WorkloadGroup.

use serde_json::{Value, json};

use crate::{
    Base, Row, from, get, row,
    support::{Mesh, bookinfo},
};

fn document(spec: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
           "metadata": {"name": "se", "namespace": "default"}, "spec": spec})
}

fn workload(spec: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
           "metadata": {"name": "vm", "namespace": "default"}, "spec": spec})
}

fn port(number: u32, name: &str, protocol: &str) -> Value {
    json!({"number": number, "name": name, "protocol": protocol})
}

/// A service of one workload with an address.
fn entry() -> Base {
    Base::new(bookinfo().with(document(json!({
        "hosts": ["a.example"], "addresses": ["10.97.0.1"], "location": "MESH_INTERNAL", "resolution": "STATIC",
        "ports": [port(80, "http", "HTTP")], "endpoints": [{"address": "10.2.0.1"}]
    }))))
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all = entries();
    all.extend(workloads());
    all
}

fn entries() -> Vec<Row> {
    let b = entry();
    let ask = || get("GET http://a.example/");
    let endpoint = |e: Value| json!({"endpoints": [e]});
    let e = "/spec/endpoints/0";
    let placed = b
        .and("/spec/endpoints", json!([{"address": "10.2.0.1"}, {"address": "10.2.0.2"}]))
        .and("/spec/location", json!("MESH_INTERNAL"));
    let selected = Base::new(
        bookinfo()
            .with(workload(
                json!({"address": "10.2.0.9", "labels": {"app": "legacy"}, "ports": {"web": 8000}}),
            ))
            .with(document(json!({
                "hosts": ["a.example"], "location": "MESH_INTERNAL", "resolution": "STATIC",
                "ports": [port(80, "http", "HTTP")], "workloadSelector": {"labels": {"app": "legacy"}}
            }))),
    );
    let dns = Base::new(bookinfo().with(document(json!({
        "hosts": ["a.example"], "location": "MESH_EXTERNAL", "resolution": "DNS", "ports": [port(443, "https", "HTTPS")]
    }))));
    let tls_origination = Base::new(
        bookinfo()
            .with(json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
                "metadata": {"name": "dr", "namespace": "default"},
                "spec": {"host": "a.example", "trafficPolicy": {"tls": {"mode": "SIMPLE"}}}}))
            .with(document(json!({
                "hosts": ["a.example"], "location": "MESH_EXTERNAL", "resolution": "DNS", "ports": [port(80, "http", "HTTP")]
            }))),
    );
    vec![
        row(
            "ServiceEntry.hosts",
            &b,
            "/spec/hosts",
            json!(["b.example"]),
            get("GET http://b.example/"),
            json!({"host": "b.example", "virtualHost": "b.example:80"}),
        )
        .instead_of(json!(["a.example"])),
        row(
            "ServiceEntry.addresses",
            &b,
            "/spec/addresses",
            json!(["10.97.0.9"]),
            ask(),
            json!({"destination": "10.97.0.9:80"}),
        )
        .instead_of(json!(["10.97.0.1"])),
        row(
            "ServiceEntry.ports[]",
            &b,
            "/spec/ports/0/number",
            json!(8080),
            get("GET http://a.example:8080/"),
            json!({"virtualHost": "a.example:8080"}),
        )
        .instead_of(json!(80)),
        row(
            "ServiceEntry.ports[]",
            &b,
            "/spec/ports/0/protocol",
            json!("HTTP2"),
            ask(),
            json!({"trafficPolicy": {"protocol": "http2"}}),
        )
        .instead_of(json!("HTTP")),
        row(
            "ServiceEntry.ports[]",
            &selected,
            "/spec/ports/0/name",
            json!("web"),
            ask(),
            endpoint(json!({"address": "10.2.0.9:8000"})),
        )
        .instead_of(json!("http")),
        row(
            "ServiceEntry.ports[]",
            &b,
            "/spec/ports/0/targetPort",
            json!(8080),
            ask(),
            endpoint(json!({"address": "10.2.0.1:8080"})),
        ),
        row(
            "ServiceEntry.location",
            &b.and("/spec/endpoints/0/labels", json!({"security.istio.io/tlsMode": "istio"})),
            "/spec/location",
            json!("MESH_EXTERNAL"),
            ask(),
            endpoint(json!({"tls": "none"})),
        )
        .instead_of(json!("MESH_INTERNAL")),
        row(
            "ServiceEntry.resolution",
            &dns,
            "/spec/resolution",
            json!("NONE"),
            get("GET https://a.example/"),
            json!({"endpoints": [{"address": "240.240.65.177:443"}]}),
        )
        .instead_of(json!("DNS")),
        row(
            "ServiceEntry.exportTo",
            &b,
            "/spec/exportTo",
            json!(["."]),
            from("other/app", "GET http://a.example/"),
            json!({"cluster": "PassthroughCluster"}),
        ),
        row(
            "ServiceEntry.subjectAltNames",
            &tls_origination,
            "/spec/subjectAltNames",
            json!(["san.example"]),
            crate::View::Config { from: "default/productpage-v1" },
            json!({"clusters": {"outbound|80||a.example": {"tls": {"validation": {"sans": [{"kind": {"Exact": "san.example"}}]}}}}}),
        ),
        row(
            "ServiceEntry.workloadSelector.labels",
            &selected,
            "/spec/workloadSelector/labels",
            json!({"app": "legacy"}),
            ask(),
            endpoint(json!({"address": "10.2.0.9:80", "workload": "default/vm"})),
        )
        .instead_of(json!({"app": "other"})),
        row(
            "ServiceEntry.endpoints[].address",
            &b,
            e,
            json!({"address": "10.2.0.7"}),
            ask(),
            endpoint(json!({"address": "10.2.0.7:80"})),
        )
        .instead_of(json!({"address": "10.2.0.1"})),
        row(
            "ServiceEntry.endpoints[].ports",
            &b,
            "/spec/endpoints/0/ports",
            json!({"http": 8000}),
            ask(),
            endpoint(json!({"address": "10.2.0.1:8000"})),
        ),
        row(
            "ServiceEntry.endpoints[].labels",
            &b,
            "/spec/endpoints/0/labels",
            json!({"security.istio.io/tlsMode": "istio"}),
            ask(),
            endpoint(json!({"tls": "mutual"})),
        ),
        row(
            "ServiceEntry.endpoints[].network",
            &b,
            "/spec/endpoints/0/network",
            json!("elsewhere"),
            ask(),
            json!({"endpoints": [], "status": 503}),
        ),
        row(
            "ServiceEntry.endpoints[].locality",
            &b,
            "/spec/endpoints/0/locality",
            json!("r/z/s"),
            ask(),
            endpoint(json!({"locality": "r/z/s"})),
        ),
        row(
            "ServiceEntry.endpoints[].weight",
            &placed,
            "/spec/endpoints/1/weight",
            json!(5),
            ask(),
            json!({"endpoints": [{"weight": 1}, {"weight": 5}]}),
        ),
        row(
            "ServiceEntry.endpoints[].serviceAccount",
            &b.and("/spec/endpoints/0/labels", json!({"security.istio.io/tlsMode": "istio"})),
            "/spec/endpoints/0/serviceAccount",
            json!("robot"),
            crate::View::Config { from: "default/productpage-v1" },
            json!({"clusters": {"outbound|80||a.example": {"tls_matches": [
                {"tls": {"validation": {"sans": [{"kind": {"Exact": "spiffe://mesh.local/ns/default/sa/robot"}}]}}}, {}]}}}),
        ),
    ]
}

fn workloads() -> Vec<Row> {
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "vm", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.30", "selector": {"app": "vm"}, "ports": [{"name": "http", "port": 80}]}});
    let mesh = Mesh(vec![service]);
    let b = Base::new(mesh.with(workload(json!({"address": "10.3.0.1", "labels": {"app": "vm"}}))));
    let ask = || get("GET http://vm/");
    let endpoint = |e: Value| json!({"endpoints": [e]});
    vec![
        row(
            "WorkloadEntry.address",
            &b,
            "/spec/address",
            json!("10.3.0.2"),
            ask(),
            endpoint(json!({"address": "10.3.0.2:80"})),
        )
        .instead_of(json!("10.3.0.1")),
        row(
            "WorkloadEntry.ports",
            &b,
            "/spec/ports",
            json!({"http": 8000}),
            ask(),
            endpoint(json!({"address": "10.3.0.1:8000"})),
        ),
        row(
            "WorkloadEntry.labels",
            &b,
            "/spec/labels",
            json!({"app": "vm"}),
            ask(),
            endpoint(json!({"workload": "default/vm"})),
        )
        .instead_of(json!({"app": "x"})),
        row(
            "WorkloadEntry.network",
            &b,
            "/spec/network",
            json!("elsewhere"),
            ask(),
            json!({"endpoints": []}),
        ),
        row(
            "WorkloadEntry.locality",
            &b,
            "/spec/locality",
            json!("r/z"),
            ask(),
            endpoint(json!({"locality": "r/z"})),
        ),
        row("WorkloadEntry.weight", &b, "/spec/weight", json!(7), ask(), endpoint(json!({"weight": 7}))),
        row(
            "WorkloadEntry.serviceAccount",
            &b,
            "/spec/serviceAccount",
            json!("robot"),
            from("default/vm", "GET http://vm/"),
            json!({"caller": {"principal": "spiffe://mesh.local/ns/default/sa/robot"}}),
        ),
    ]
}
