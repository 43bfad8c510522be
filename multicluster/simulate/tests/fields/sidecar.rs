//! Sidecar and ProxyConfig.

use serde_json::{Value, json};

use crate::{
    Base, Row, View, get, refused, row,
    support::{Mesh, bookinfo},
    warned,
};

const X: &str = "GET http://ratings:9080/x";

fn document(spec: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "Sidecar", "metadata": {"name": "s", "namespace": "default"}, "spec": spec})
}

pub(crate) fn rows() -> Vec<Row> {
    let b = Base::new(bookinfo().with(document(json!({"egress": [{"hosts": ["./*"]}]}))));
    let selected = Base::new(bookinfo().with(document(json!({
        "workloadSelector": {"labels": {"app": "productpage"}}, "egress": [{"hosts": ["other/*"]}]
    }))));
    let policy = Base::new(bookinfo().with(document(
        json!({"egress": [{"hosts": ["./*"]}], "outboundTrafficPolicy": {"mode": "ALLOW_ANY"}}),
    )));
    // Ratings, told by its Sidecar what it serves.
    let serving = Base::new(bookinfo().with(document(json!({
        "workloadSelector": {"labels": {"app": "ratings"}},
        "ingress": [{"port": {"number": 9080, "name": "http", "protocol": "HTTP"}, "defaultEndpoint": "127.0.0.1:8000"}]
    }))));
    // The same port with TLS of its own, where the mesh's is off.
    let off = json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "off", "namespace": "default"}, "spec": {"mtls": {"mode": "DISABLE"}}});
    let plain = Base::new(bookinfo().with(off).with(document(json!({
        "workloadSelector": {"labels": {"app": "ratings"}},
        "ingress": [{"port": {"number": 9080, "name": "https", "protocol": "HTTPS"}, "defaultEndpoint": "127.0.0.1:8000"}]
    }))));
    let config = || View::Config { from: "default/ratings-v1" };
    let caller = || View::Config { from: "default/productpage-v1" };
    let http = json!({"number": 9080, "name": "http", "protocol": "HTTP"});
    let cluster = |c: Value| json!({"clusters": {"inbound|9080||": c}});
    let endpoint = |address: &str, port: u16| {
        cluster(
            json!({"discovery": {"Static": {"localities": [{"endpoints": [{"address": address, "port": port}]}]}}}),
        )
    };
    let ingress = "/spec/ingress/0/port/number";
    let pool = |n: u32| json!({"http": {"http1MaxPendingRequests": n}});
    let proxy = Base::new(
        Mesh::default().with(json!({"apiVersion": "networking.istio.io/v1beta1", "kind": "ProxyConfig",
        "metadata": {"name": "p", "namespace": "default"}, "spec": {"concurrency": 0}})),
    );
    let asking = Base::new(
        bookinfo().with(json!({"apiVersion": "networking.istio.io/v1beta1", "kind": "ProxyConfig",
        "metadata": {"name": "p", "namespace": "default"}, "spec": {}})),
    );
    vec![
        row(
            "Sidecar.workloadSelector",
            &selected,
            "/spec/workloadSelector",
            json!({"labels": {"app": "productpage"}}),
            get(X),
            json!({"cluster": "PassthroughCluster"}),
        )
        .instead_of(json!({"labels": {"app": "x"}})),
        row(
            "Sidecar.egress[].hosts",
            &b,
            "/spec/egress/0/hosts",
            json!(["other/*"]),
            get(X),
            json!({"cluster": "PassthroughCluster"}),
        )
        .instead_of(json!(["./*"])),
        row(
            "Sidecar.egress[].port",
            &b,
            "/spec/egress/0/port",
            json!({"number": 9999, "name": "http", "protocol": "HTTP"}),
            get(X),
            json!({"cluster": "PassthroughCluster"}),
        ),
        row(
            "Sidecar.egress[].bind",
            &b.and("/spec/egress/0/port", http.clone()),
            "/spec/egress/0/bind",
            json!("127.0.0.9"),
            caller(),
            json!({"listeners": {"127.0.0.9_9080": {"bind_to_port": false}}}),
        ),
        row(
            "Sidecar.egress[].captureMode",
            &b.and("/spec/egress/0/port", http.clone()),
            "/spec/egress/0/captureMode",
            json!("NONE"),
            caller(),
            json!({"listeners": {"127.0.0.1_9080": {"bind_to_port": true}}}),
        ),
        row(
            "Sidecar.outboundTrafficPolicy.mode",
            &policy,
            "/spec/outboundTrafficPolicy/mode",
            json!("REGISTRY_ONLY"),
            get("GET http://nobody.example:9080/"),
            json!({"action": "refuse", "status": 502}),
        )
        .instead_of(json!("ALLOW_ANY")),
        row(
            "Sidecar.outboundTrafficPolicy.egressProxy",
            &policy,
            "/spec/outboundTrafficPolicy/egressProxy",
            json!({"host": "details.default.svc.cluster.local", "port": {"number": 9080}}),
            get("GET http://nobody.example:9080/"),
            json!({"cluster": "outbound|9080||details.default.svc.cluster.local"}),
        ),
        refused(
            "Sidecar.outboundTrafficPolicy.mode",
            &policy,
            "/spec/outboundTrafficPolicy/mode",
            json!("ALLOW_ANY_DYNAMIC_DNS"),
            "set it in MeshConfig",
        ),
        refused(
            "Sidecar.outboundTrafficPolicy.tls",
            &policy,
            "/spec/outboundTrafficPolicy/tls",
            json!({"mode": "SIMPLE"}),
            "set it in MeshConfig",
        ),
        row(
            "Sidecar.ingress[].port",
            &serving,
            ingress,
            json!(9081),
            config(),
            json!({"clusters": {"inbound|9080||": null, "inbound|9081||": {"name": "inbound|9081||"}}}),
        )
        .instead_of(json!(9080)),
        row(
            "Sidecar.ingress[].defaultEndpoint",
            &serving,
            "/spec/ingress/0/defaultEndpoint",
            json!("0.0.0.0:8001"),
            config(),
            endpoint("10.1.0.21", 8001),
        )
        .instead_of(json!("127.0.0.1:8000")),
        row(
            "Sidecar.ingress[].connectionPool",
            &serving,
            "/spec/ingress/0/connectionPool",
            pool(3),
            config(),
            cluster(json!({"limits": {"max_pending": 3}})),
        ),
        row(
            "Sidecar.inboundConnectionPool",
            &serving,
            "/spec/inboundConnectionPool",
            pool(4),
            config(),
            cluster(json!({"limits": {"max_pending": 4}})),
        ),
        row(
            "Sidecar.ingress[].bind",
            &serving.and("/spec/ingress/0/captureMode", json!("NONE")),
            "/spec/ingress/0/bind",
            json!("10.1.0.99"),
            config(),
            json!({"listeners": {"10.1.0.99_9080": {"bind_to_port": true}}}),
        ),
        row(
            "Sidecar.ingress[].captureMode",
            &serving,
            "/spec/ingress/0/captureMode",
            json!("NONE"),
            config(),
            json!({"listeners": {"10.1.0.21_9080": {"bind_to_port": true}}}),
        ),
        row(
            "Sidecar.ingress[].tls",
            &plain,
            "/spec/ingress/0/tls",
            json!({"mode": "SIMPLE", "serverCertificate": "/c", "privateKey": "/k"}),
            config(),
            json!({"listeners": {"virtualInbound": {"filter_chains": [
                {"name": "virtualInbound-9080-tls", "tls": {"certificate": {"Files": {"chain": "/c", "key": "/k"}}}}, {}
            ]}}}),
        ),
        row(
            "ProxyConfig.environmentVariables",
            &asking,
            "/spec/environmentVariables",
            json!({"FLOTILLA_ON_DEMAND": "true"}),
            get(X),
            json!({"caller": {"onDemand": true}}),
        ),
        warned(
            "ProxyConfig.environmentVariables",
            &proxy,
            "/spec/environmentVariables",
            json!({"A": "b"}),
            "not enforced yet",
        ),
        warned(
            "ProxyConfig.image.imageType",
            &proxy,
            "/spec/image/imageType",
            json!("distroless"),
            "nobody injects proxies",
        ),
        row(
            "ProxyConfig.selector",
            &asking.and("/spec/environmentVariables", json!({"FLOTILLA_ON_DEMAND": "true"})),
            "/spec/selector/matchLabels",
            json!({"app": "ratings"}),
            get(X),
            json!({"caller": {"onDemand": false}}),
        ),
    ]
}
