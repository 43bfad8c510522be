//! MeshConfig.

use serde_json::{Value, json};

use crate::{Base, Row, View, get, row, support::bookinfo, unenforced, warned};

fn document(spec: Value) -> Value {
    json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"}, "spec": spec})
}

pub(crate) fn rows() -> Vec<Row> {
    let b = Base::new(bookinfo().with(document(json!({}))));
    let deny = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "none", "namespace": "roots"}, "spec": {}});
    let rooted = Base::new(bookinfo().with(deny).with(document(json!({}))));
    let place = |d: &mut Value, at: &str| d["spec"]["locality"] = json!(at);
    let mut placed = bookinfo();
    for d in placed.0.iter_mut().filter(|d| d["kind"] == "WorkloadEntry") {
        match d["metadata"]["name"].as_str() {
            Some("reviews-v1" | "productpage-v1") => place(d, "r1/z1"),
            Some("reviews-v2") => place(d, "r1/z2"),
            _ => place(d, "r2/z1"),
        }
    }
    placed.0.retain(|d| d["kind"] != "DestinationRule");
    let near = Base::new(
        placed
            .with(json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
                "metadata": {"name": "dr", "namespace": "default"},
                "spec": {"host": "reviews", "trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 5}}}}))
            .with(document(json!({}))),
    );
    let config = || View::Config { from: "default/productpage-v1" };
    let log = |l: Value| json!({"listeners": {"virtualInbound": {"access_log": [l]}}});
    let logging = b.and("/spec/accessLogFile", json!("/dev/stdout"));
    let secure = Base::new(
        bookinfo()
            .with(json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "g", "namespace": "default"},
                "spec": {"selector": {"istio": "ingressgateway"}, "servers": [{"port": {"number": 443, "name": "https", "protocol": "HTTPS"},
                    "hosts": ["*"], "tls": {"mode": "SIMPLE", "credentialName": "c"}}]}}))
            .with(document(json!({}))),
    );
    vec![
        row(
            "MeshConfig.trustDomain",
            &b,
            "/spec/trustDomain",
            json!("td.example"),
            get("GET http://ratings:9080/"),
            json!({"caller": {"principal": "spiffe://td.example/ns/default/sa/productpage"}}),
        ),
        row(
            "MeshConfig.rootNamespace",
            &rooted,
            "/spec/rootNamespace",
            json!("roots"),
            get("GET http://ratings:9080/"),
            json!({"action": "deny"}),
        ),
        row(
            "MeshConfig.outboundTrafficPolicy",
            &b,
            "/spec/outboundTrafficPolicy/mode",
            json!("REGISTRY_ONLY"),
            get("GET http://nobody.example:9080/"),
            json!({"status": 502}),
        ),
        unenforced(
            "MeshConfig.outboundTrafficPolicy",
            &b,
            "/spec/outboundTrafficPolicy",
            json!({"egressProxy": {"host": "e.example.com"}}),
        ),
        row(
            "MeshConfig.accessLogFile",
            &b,
            "/spec/accessLogFile",
            json!("/dev/stdout"),
            config(),
            log(json!({"path": "/dev/stdout"})),
        ),
        row(
            "MeshConfig.accessLogFormat",
            &logging,
            "/spec/accessLogFormat",
            json!("%PROTOCOL%\n"),
            config(),
            log(json!({"format": {"Text": "%PROTOCOL%\n"}})),
        ),
        row(
            "MeshConfig.accessLogEncoding",
            &logging,
            "/spec/accessLogEncoding",
            json!("JSON"),
            config(),
            log(json!({"format": {"Json": {"protocol": "%PROTOCOL%"}}})),
        ),
        row(
            "MeshConfig.defaultConnectTimeout",
            &b,
            "/spec/defaultConnectTimeout",
            json!("3s"),
            get("GET http://ratings:9080/"),
            json!({"trafficPolicy": {"connectTimeout": "3s"}}),
        ),
        row(
            "MeshConfig.localityLbSetting",
            &near,
            "/spec/localityLbSetting",
            json!({"enabled": false}),
            get("GET http://reviews:9080/"),
            json!({"endpoints": [{"priority": 0}, {"priority": 0}, {"priority": 0}]}),
        ),
        row(
            "MeshConfig.traceSampling",
            &b,
            "/spec/traceSampling",
            json!(50),
            config(),
            json!({"listeners": {"0.0.0.0_9080": {"filter_chains": [{"filters": [{"Http": {"tracing": {"sampling": 5000}}}]}]}}}),
        ),
        row(
            "MeshConfig.enableQuicListeners",
            &secure,
            "/spec/enableQuicListeners",
            json!(true),
            View::Config { from: "istio-system/istio-ingressgateway" },
            json!({"listeners": {"udp_0.0.0.0_443": {"name": "udp_0.0.0.0_443"}}}),
        ),
        warned(
            "MeshConfig.mixerCheckServer",
            &b,
            "/spec/mixerCheckServer",
            json!("m:9091"),
            "proxies do not read mixerCheckServer",
        ),
        warned(
            "MeshConfig.mixerReportServer",
            &b,
            "/spec/mixerReportServer",
            json!("m:9091"),
            "proxies do not read mixerReportServer",
        ),
        warned(
            "MeshConfig.policyCheckFailOpen",
            &b,
            "/spec/policyCheckFailOpen",
            json!(true),
            "proxies do not read policyCheckFailOpen",
        ),
    ]
}
