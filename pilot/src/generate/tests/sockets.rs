//! Unix sockets: of a workload's host, behind a ServiceEntry or an inbound listener of a Sidecar.

use super::*;

fn entry() -> Docs {
    bookstore().add(
        "ServiceEntry",
        "books/local",
        json!({
            "hosts": ["local.example"],
            "resolution": "STATIC",
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}, {"number": 53, "name": "dns", "protocol": "UDP"}],
            "endpoints": [
                {"address": "unix:///run/app.sock", "labels": {"security.istio.io/tlsMode": "istio"}},
                {"address": "unix://@app"},
                {"address": "10.9.0.1"},
            ],
        }),
    )
}

/// Addresses of a cluster's endpoints, and whether they have a proxy.
fn endpoints(g: &Generated, cluster: &str) -> Vec<(String, u16, bool)> {
    let Some(a) = g.endpoints.get(cluster) else { return vec![] };
    let all = a.localities.iter().flat_map(|l| &l.endpoints);
    all.map(|e| (e.address.clone(), e.port, e.transport_labels.contains_key("tlsMode"))).collect()
}

#[test]
fn a_sidecar_connects_to_sockets_of_its_host() {
    let g = entry().generate(&productpage());
    let found = endpoints(&g, "outbound|80||local.example");
    let at = |address: &str, port| (address.to_owned(), port, false);
    assert_eq!(found, [at("unix:///run/app.sock", 0), at("unix://@app", 0), at("10.9.0.1", 80)]);
    // Nobody takes datagrams there.
    assert!(
        endpoints(&g, "outbound|53||local.example").iter().all(|(a, ..)| a == "10.9.0.1"),
        "{:?}",
        g.endpoints.keys()
    );
}

/// Whoever else is sent to a socket opens it with the rights of its proxy: that of its agent, with its key, among them.
#[test]
fn only_our_sidecars_have_sockets() {
    let docs = entry()
        .add(
            "Gateway",
            "books/edge",
            json!({"selector": {"app": "gw"}, "servers": [
                {"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}),
        )
        .add(
            "VirtualService",
            "books/local",
            json!({"hosts": ["local.example"], "gateways": ["edge", "mesh"], "http": [{"route": [{"destination": {"host": "local.example"}}]}]}),
        )
        .add("Sidecar", "books/pp", at_a_socket());
    let gateway = node(NodeKind::Router, "10.1.0.100", "gw", json!({"LABELS": {"app": "gw"}}));
    let mut envoy = productpage();
    envoy.metadata.remove("GENERATOR");
    envoy.user_agent = "envoy".into();
    for other in [&gateway, &envoy] {
        let found = endpoints(&docs.generate(other), "outbound|80||local.example");
        assert_eq!(found, [("10.9.0.1".to_owned(), 80, false)]);
    }
    let Discovery::Static(a) = &docs.generate(&envoy).clusters["inbound|9080||"].discovery.clone() else {
        panic!()
    };
    assert_eq!(a.localities, []);
}

fn at_a_socket() -> Value {
    json!({"workloadSelector": {"labels": {"app": "productpage"}}, "ingress": [
        {"port": {"number": 9080, "name": "http", "protocol": "HTTP"}, "defaultEndpoint": "unix:///run/app.sock"}]})
}

#[test]
fn the_application_of_a_workload_may_be_at_a_socket() {
    let docs = bookstore().add("Sidecar", "books/pp", at_a_socket());
    let g = docs.generate(&productpage());
    let Discovery::Static(a) = &g.clusters["inbound|9080||"].discovery else { panic!() };
    let e = &a.localities[0].endpoints[0];
    assert_eq!((e.address.as_str(), e.port), ("unix:///run/app.sock", 0));
}
