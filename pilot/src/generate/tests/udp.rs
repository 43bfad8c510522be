//! Datagrams.

use super::*;

fn docs() -> Docs {
    Docs::default()
        .add(
            "Service",
            "books/dns",
            json!({"selector": {"app": "dns"}, "clusterIP": "10.96.0.10", "ports": [
                {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                {"name": "dns", "port": 53, "targetPort": 5353, "protocol": "UDP"}]}),
        )
        .add(
            "WorkloadEntry",
            "books/dns-1",
            json!({"address": "10.1.0.7", "labels": {"app": "dns", "security.istio.io/tlsMode": "istio"}}),
        )
        .add(
            "DestinationRule",
            "books/dns",
            json!({"host": "dns", "trafficPolicy": {
                "loadBalancer": {"consistentHash": {"useSourceIp": true}},
                "connectionPool": {"tcp": {"maxConnections": 7}}}}),
        )
        .add(
            "ServiceEntry",
            "books/ntp",
            json!({"hosts": ["ntp.example.com"], "addresses": ["10.97.0.1"], "resolution": "DNS",
                "ports": [{"number": 123, "name": "ntp", "protocol": "UDP"}]}),
        )
        .add("ServiceExport", "books/dns", json!({}))
}

fn ours(meta: Value) -> NodeInfo {
    node(NodeKind::Sidecar, "10.1.0.1", "client-v1", meta)
}

#[test]
fn services_have_listeners_where_capture_keeps_destinations() {
    let docs = docs();
    let g = docs.generate(&ours(json!({"INTERCEPTION_MODE": "TPROXY"})));
    let l = &g.listeners["10.96.0.10_53_udp"];
    assert!(!l.bind_to_port && l.address == "10.96.0.10:53".parse().unwrap());
    let u = l.udp.as_ref().unwrap();
    assert_eq!(u.cluster, "outbound|53/udp||dns.books.svc.cluster.local");
    assert_eq!(u.hash, Some(UdpHash::SourceIp));
    let c = &g.clusters[&u.cluster];
    assert!(c.tls.is_none() && c.tls_matches.is_empty(), "datagrams are in clear");
    assert_eq!((c.limits.max_connections, matches!(c.lb, LbPolicy::RingHash(_))), (7, true));
    let e = &g.endpoints[&u.cluster].localities[0].endpoints;
    assert_eq!((e.len(), e[0].port), (1, 5353));
    // The TCP port of the same number is what it was.
    assert!(g.listeners["10.96.0.10_53"].udp.is_none());
    assert!(g.clusters.contains_key("outbound|53||dns.books.svc.cluster.local"));
    let ntp = &g.listeners["10.97.0.1_123_udp"];
    let c = &g.clusters[&ntp.udp.as_ref().unwrap().cluster];
    assert!(matches!(c.discovery, Discovery::StrictDns(_)));
    let all = &g.listeners["virtualOutboundUdp"];
    assert!(all.bind_to_port && all.transparent && all.use_original_dst);
    assert_eq!(all.udp.as_ref().unwrap().cluster, "PassthroughCluster");
    let closed =
        docs.clone().add("MeshConfig", "mesh", json!({"outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"}}));
    let g = closed.generate(&ours(json!({"INTERCEPTION_MODE": "TPROXY"})));
    assert_eq!(g.listeners["virtualOutboundUdp"].udp.as_ref().unwrap().cluster, "BlackHoleCluster");
}

#[test]
fn and_none_elsewhere() {
    let docs = docs();
    let mut envoy = ours(json!({"INTERCEPTION_MODE": "TPROXY"}));
    envoy.user_agent = "envoy".into();
    for n in [ours(json!({})), ours(json!({"INTERCEPTION_MODE": "NONE"})), envoy] {
        let g = docs.generate(&n);
        assert!(g.listeners.values().all(|l| l.udp.is_none()), "{}", n.id);
        assert!(g.clusters.keys().all(|c| !c.contains("/udp")), "{}", n.id);
    }
    // Neither does the server's side have any, nor do peers hear of it.
    let g = docs.generate(&node(NodeKind::Sidecar, "10.1.0.7", "dns-1", json!({})));
    assert!(!g.clusters.contains_key("inbound|5353||") && g.clusters.contains_key("inbound|53||"));
    let (exports, _) = crate::exports::exports(&docs.world());
    let text = serde_json::to_string(&exports.values().map(|d| &d.body).collect::<Vec<_>>()).unwrap();
    assert!(text.contains("dns-tcp") && !text.contains("\"udp\""), "{text}");
}
