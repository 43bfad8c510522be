//! TLS, and routes of connections.

use serde_json::{Value, json};

use crate::{
    EDGE, ask, backend, database, edge, gateway, goes, in_namespace, object, plain, route, rule, secure,
    service,
    support::{self, Mesh, bookinfo},
};

#[test]
fn tls_that_ends_here() {
    let with = |listener: Value| {
        bookinfo().with(gateway(json!([plain(), listener]))).with(route("r", rule(json!({}))))
    };
    let m = with(secure(json!({"hostname": "a.example"})));
    goes(&m, "GET https://a.example/", "reviews");
    ask(&m, "GET https://b.example/", &[], json!({"action": "close"}));
    let chain = |m: &Mesh, want: Value| {
        let c = m.load().configuration(EDGE).unwrap();
        let want = json!({"listeners": {"0.0.0.0_443": {"filter_chains": [{"tls": want}]}}});
        if let Err(e) = support::contains(&c, &want, "") {
            panic!("{e}\n{:#}", c["listeners"]);
        }
    };
    chain(&m, json!({"certificate": {"Sds": "kubernetes://cert"}}));
    // Another namespace's certificate.
    let foreign = secure(json!({"tls": {"certificateRefs": [{"name": "cert", "namespace": "certs"}]}}));
    let m = with(foreign);
    ask(&m, "GET https://a.example/", &[], json!({"action": "close", "listener": null}));
    let grant = in_namespace(
        "certs",
        "ReferenceGrant",
        "g",
        json!({
        "from": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": "default"}],
        "to": [{"group": "", "kind": "Secret"}]}),
    );
    chain(&m.with(grant), json!({"certificate": {"Sds": "kubernetes://certs_cert"}}));
    // Clients with certificates.
    let roots = json!({"caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "clients"}]});
    let m = bookinfo()
        .with(object(
            "Gateway",
            "shop",
            json!({"gatewayClassName": "istio", "listeners": [secure(json!({}))], "tls": {"frontend": {"default": {"validation": roots}}}}),
        ))
        .with(route("r", rule(json!({}))));
    chain(
        &m,
        json!({"client_certificate": {"Required": {"trusted": {"Sds": "kubernetes://clients-cacert"}}}}),
    );
    let options = json!({"gateway.istio.io/tls-terminate-mode": "MUTUAL"});
    let m = with(secure(json!({"tls": {"certificateRefs": [{"name": "cert"}], "options": options}})));
    chain(&m, json!({"client_certificate": {"Required": {"trusted": {"Sds": "kubernetes://cert-cacert"}}}}));
}

#[test]
fn connections() {
    let l4 = |kind: &str, hosts: Value, backends: Value| {
        let mut spec = json!({"parentRefs": [{"name": "shop"}], "rules": [{"backendRefs": backends}]});
        if !hosts.is_null() {
            spec["hostnames"] = hosts;
        }
        object(kind, "r", spec)
    };
    let tcp = database().with(gateway(json!([{"name": "tcp", "port": 5000, "protocol": "TCP"}]))).with(l4(
        "TCPRoute",
        Value::Null,
        json!([{"name": "db", "port": 5432}]),
    ));
    ask(
        &tcp,
        "tcp://x:5000",
        &[],
        json!({"action": "forward-tcp", "cluster": "outbound|5432||db.default.svc.cluster.local"}),
    );
    let tls = |mode: &str, hosts: Value| {
        database()
            .with(gateway(json!([{"name": "tls", "port": 443, "protocol": "TLS", "hostname": "*.example",
                                  "tls": {"mode": mode, "certificateRefs": [{"name": "cert"}]}}])))
            .with(l4("TLSRoute", hosts, json!([{"name": "db", "port": 5432}])))
    };
    for mode in ["Passthrough", "Terminate"] {
        let m = tls(mode, json!(["a.example"]));
        let want = json!({"action": "forward-tcp", "cluster": "outbound|5432||db.default.svc.cluster.local"});
        ask(&m, "GET https://a.example/", &[], want);
        ask(&m, "GET https://b.example/", &[], json!({"action": "close"}));
    }
    // TCP inside of TLS.
    let m = database()
        .with(gateway(json!([{"name": "tls", "port": 443, "protocol": "TLS", "tls": {"mode": "Terminate", "certificateRefs": [{"name": "cert"}]}}])))
        .with(l4("TCPRoute", Value::Null, json!([{"name": "db", "port": 5432}])));
    ask(
        &m,
        "GET https://a.example/",
        &[],
        json!({"action": "forward-tcp", "cluster": "outbound|5432||db.default.svc.cluster.local"}),
    );
    // Nothing behind it.
    let m = database().with(gateway(json!([{"name": "tcp", "port": 5000, "protocol": "TCP"}]))).with(l4(
        "TCPRoute",
        Value::Null,
        json!([backend("nobody")]),
    ));
    let a = m.try_ask(EDGE, "tcp://x:5000", &[]).unwrap();
    assert_eq!(a["endpoints"], json!([]), "{a:#}");
}

#[test]
fn tls_to_backends() {
    let policy = |target: Value, validation: Value| {
        object("BackendTLSPolicy", "p", json!({"targetRefs": [target], "validation": validation}))
    };
    let reviews = json!({"group": "", "kind": "Service", "name": "reviews"});
    let system = json!({"hostname": "inner.example", "wellKnownCACertificates": "System"});
    let tls = |m: &Mesh, name: &str| m.load().configuration(EDGE).unwrap()["clusters"][name]["tls"].clone();
    let m = edge(rule(json!({}))).with(policy(reviews.clone(), system.clone()));
    let want = json!({"sni": "inner.example", "validation": {"sans": [{"kind": {"Exact": "inner.example"}}],
        "trusted": {"Files": {"chain": "/etc/ssl/certs/ca-certificates.crt"}}}});
    support::contains(&tls(&m, &service("reviews")), &want, "").unwrap();
    // An authored rule keeps its subsets, which have it as well.
    support::contains(&tls(&m, "outbound|9080|v1|reviews.default.svc.cluster.local"), &want, "").unwrap();
    assert!(tls(&m, &service("ratings")).is_null());
    // Roots in a ConfigMap, names in a certificate, one port.
    let mut port = reviews;
    port["sectionName"] = json!("http");
    let roots = json!({"hostname": "inner.example", "caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "ca"}],
        "subjectAltNames": [{"type": "URI", "uri": "spiffe://a/b"}]});
    let m = edge(rule(json!({}))).with(policy(port, roots));
    let want = json!({"sni": "inner.example", "validation": {"sans": [{"kind": {"Exact": "spiffe://a/b"}}],
        "trusted": {"Sds": "kubernetes://ca-cacert"}}});
    support::contains(&tls(&m, &service("reviews")), &want, "").unwrap();
}
