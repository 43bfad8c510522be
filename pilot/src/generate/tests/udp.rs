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
        .add("WorkloadEntry", "books/dns-2", json!({"address": "10.1.0.8", "labels": {"app": "dns"}}))
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

/// The same service in east, which has a port of UDP more and that of TCP not.
fn imported() -> Docs {
    docs()
        .add(
            "ImportedService",
            "east/books/dns",
            json!({"cluster": "east", "lease": "live", "service": {
                "name": "dns", "namespace": "books", "host": "dns.books.svc.cluster.local",
                "ports": [{"name": "dns", "port": 53, "protocol": "udp"}],
                "groups": [{"labels": {"app": "dns"}, "locality": "r2/z1", "healthyWeight": 1, "slots": [48879]}],
                "serviceAccounts": ["spiffe://mesh.local/ns/books/sa/dns-east"], "exportedAt": 5}}),
        )
        .add(
            "ImportedService",
            "east/books/syslog",
            json!({"cluster": "east", "lease": "live", "service": {
                "name": "syslog", "namespace": "books", "host": "syslog.books.svc.cluster.local",
                "ports": [{"name": "log", "port": 514, "protocol": "udp"}, {"name": "log-tcp", "port": 514, "protocol": "tcp"}],
                "groups": [{"labels": {}, "locality": "", "healthyWeight": 1}],
                "serviceAccounts": ["spiffe://mesh.local/ns/books/sa/syslog"], "exportedAt": 5}}),
        )
        .add("PeerCluster", "east", peer("east", "203.0.113.2"))
}

const DNS: &str = "outbound|53/udp||dns.books.svc.cluster.local";

fn ours(meta: Value) -> NodeInfo {
    node(NodeKind::Sidecar, "10.1.0.1", "client-v1", meta)
}

fn tproxy() -> NodeInfo {
    ours(json!({"INTERCEPTION_MODE": "TPROXY"}))
}

/// Address, port, and the server name that is asked for there; none in clear.
fn ways(g: &Generated, cluster: &str) -> Vec<(String, u16, Option<String>)> {
    let c = &g.clusters[cluster];
    let all = g.endpoints[cluster].localities.iter().flat_map(|l| &l.endpoints);
    let mut out: Vec<_> = all
        .map(|e| {
            let fits = c
                .tls_matches
                .iter()
                .find(|m| m.labels.iter().all(|(k, v)| e.transport_labels.get(k) == Some(v)));
            let tls = fits.and_then(|m| m.tls.as_ref());
            assert!(tls.is_none_or(UpstreamTls::carries_datagrams));
            (e.address.clone(), e.port, tls.map(|t| t.sni.clone()))
        })
        .collect();
    out.sort();
    out
}

#[test]
fn services_have_listeners_where_capture_keeps_destinations() {
    let docs = docs();
    let g = docs.generate(&tproxy());
    let l = &g.listeners["10.96.0.10_53_udp"];
    assert!(!l.bind_to_port && l.address == "10.96.0.10:53".parse().unwrap());
    let u = l.udp.as_ref().unwrap();
    assert_eq!(u.cluster, DNS);
    assert_eq!(u.hash, Some(UdpHash::SourceIp));
    let c = &g.clusters[&u.cluster];
    assert_eq!((c.limits.max_connections, matches!(c.lb, LbPolicy::RingHash(_))), (7, true));
    // The TCP port of the same number is what it was.
    assert!(g.listeners["10.96.0.10_53"].udp.is_none());
    assert!(g.clusters.contains_key("outbound|53||dns.books.svc.cluster.local"));
    let ntp = &g.listeners["10.97.0.1_123_udp"];
    let c = &g.clusters[&ntp.udp.as_ref().unwrap().cluster];
    assert!(matches!(c.discovery, Discovery::StrictDns(_)) && c.tls_matches.is_empty());
    let all = &g.listeners["virtualOutboundUdp"];
    assert!(all.bind_to_port && all.transparent && all.use_original_dst);
    assert_eq!(all.udp.as_ref().unwrap().cluster, "PassthroughCluster");
    let closed =
        docs.clone().add("MeshConfig", "mesh", json!({"outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"}}));
    let g = closed.generate(&tproxy());
    assert_eq!(g.listeners["virtualOutboundUdp"].udp.as_ref().unwrap().cluster, "BlackHoleCluster");
}

#[test]
fn and_none_elsewhere() {
    let docs = imported();
    let mut envoy = tproxy();
    envoy.user_agent = "envoy".into();
    for n in [ours(json!({})), ours(json!({"INTERCEPTION_MODE": "NONE"})), envoy] {
        let g = docs.generate(&n);
        assert!(g.listeners.values().all(|l| !l.is_udp()), "{}", n.id);
        assert!(g.clusters.keys().all(|c| !c.contains("/udp")), "{}", n.id);
    }
    // Nor does a foreign proxy hear of them where it serves or passes on.
    for (kind, ip, meta) in [
        (NodeKind::Sidecar, "10.1.0.7", json!({})),
        (NodeKind::Router, "10.1.0.100", json!({"ROUTER_MODE": "sni-dnat"})),
    ] {
        let mut n = node(kind, ip, "x", meta);
        n.user_agent = "envoy".into();
        let g = docs.generate(&n);
        assert!(g.listeners.values().all(|l| !l.is_udp()), "{ip}");
        assert!(g.clusters.keys().all(|c| !c.contains("udp")), "{ip}");
    }
}

#[test]
fn datagrams_go_to_proxies_where_there_are_some() {
    let docs = docs();
    let name = Some("outbound_.53_._.dns.books.svc.cluster.local".to_owned());
    let secure = ("10.1.0.7".to_owned(), 15006, name);
    let clear = ("10.1.0.8".to_owned(), 5353, None);
    let g = docs.generate(&tproxy());
    assert_eq!(ways(&g, DNS), [secure.clone(), clear.clone()]);
    let c = &g.clusters[DNS];
    let tls = c.tls_matches[0].tls.as_ref().unwrap();
    assert_eq!(tls.validation.sans, [StringMatch::exact("spiffe://mesh.local/ns/books/sa/default")]);
    assert!(c.outlier.is_some() && c.panic_threshold == 1);
    // As for TCP, a rule of the client and one of the server leave them in clear.
    let off = json!({"host": "dns", "trafficPolicy": {"tls": {"mode": "DISABLE"}}});
    let server = json!({"mtls": {"mode": "DISABLE"}});
    let everything_clear = [("10.1.0.7".to_owned(), 5353, None), clear];
    for off in [
        docs.clone().add("DestinationRule", "books/dns", off),
        docs.add("PeerAuthentication", "books/d", server),
    ] {
        assert_eq!(ways(&off.generate(&tproxy()), DNS), everything_clear);
    }
}

#[test]
fn other_clusters_are_reached_through_the_own_gateways() {
    let g = imported().generate(&tproxy());
    let far = |name: &str| Some(format!("outbound_.{name}.books.svc.east.clusterset.local"));
    let here = Some("outbound_.53_._.dns.books.svc.cluster.local".to_owned());
    assert_eq!(
        ways(&g, DNS),
        [
            ("10.1.0.100".to_owned(), 15444, far("53_._.dns")),
            ("10.1.0.7".to_owned(), 15006, here),
            ("10.1.0.8".to_owned(), 5353, None)
        ]
    );
    let slot =
        g.endpoints[DNS].localities.iter().flat_map(|l| &l.endpoints).find(|e| e.port == 15444).unwrap();
    assert_eq!(slot.slots, Slots::Asks(48879));
    // What only they have has both ports of its number, each of its kind.
    let (udp, tcp) =
        ("outbound|514/udp||syslog.books.svc.cluster.local", "outbound|514||syslog.books.svc.cluster.local");
    assert_eq!(ways(&g, udp), [("10.1.0.100".to_owned(), 15444, far("514_._.syslog"))]);
    let e = &g.endpoints[tcp].localities[0].endpoints[0];
    assert_eq!((e.address.as_str(), e.port), ("10.1.0.100", 15443));
    // East has no TCP at port 53.
    let local =
        g.endpoints["outbound|53||dns.books.svc.cluster.local"].localities.iter().flat_map(|l| &l.endpoints);
    assert!(local.clone().count() == 2 && local.clone().all(|e| e.port == 53));
    let vip = g.listeners.values().find(|l| l.udp.as_ref().is_some_and(|u| u.cluster == udp)).unwrap();
    assert!(vip.address.to_string().starts_with("240.240."));
    // The part of one member.
    let member = "outbound|53/udp||dns.books.svc.east.clusterset.local";
    assert_eq!(ways(&g, member), [("10.1.0.100".to_owned(), 15444, far("53_._.dns"))]);
}

#[test]
fn the_workloads_proxy_takes_connections_by_their_names() {
    let docs = imported().add(
        "AuthorizationPolicy",
        "books/d",
        json!({"action": "ALLOW", "rules": [{"from": [{"source": {"principals": ["mesh.local/ns/books/sa/a"]}}]}]}),
    );
    for (mode, ip) in [("TPROXY", "0.0.0.0"), ("REDIRECT", "0.0.0.0"), ("NONE", "10.1.0.7")] {
        let g =
            docs.generate(&node(NodeKind::Sidecar, "10.1.0.7", "dns-1", json!({"INTERCEPTION_MODE": mode})));
        let l = &g.listeners["virtualInboundUdp"];
        assert_eq!((l.address, l.quic.is_some()), (format!("{ip}:15006").parse().unwrap(), true));
        let [c] = &l.filter_chains[..] else { panic!() };
        let names = [
            "outbound_.53_._.dns.books.svc.cluster.local",
            "outbound_.53_._.dns.books.svc.west.clusterset.local",
        ];
        let slots = names.map(|n| format!("*.{n}"));
        assert_eq!(c.matches.server_names, [names.map(str::to_owned), slots].concat());
        assert!(matches!(c.tls.as_ref().unwrap().client_certificate, ClientCertificate::Required(_)));
        let [NetworkFilter::Rbac(_), NetworkFilter::Rbac(_), NetworkFilter::Udp(u)] = &c.filters[..] else {
            panic!("{:?}", c.filters)
        };
        assert_eq!((u.cluster.as_str(), u.max_downstream), ("inbound|5353/udp||", u16::MAX));
        let Discovery::Static(a) = &g.clusters[&u.cluster].discovery else { panic!() };
        let e = &a.localities[0].endpoints[0];
        assert_eq!((e.address.as_str(), e.port), ("127.0.0.1", 5353));
        // The TCP port is what it was.
        assert!(g.clusters.contains_key("inbound|53||"));
    }
    let off = docs.add("PeerAuthentication", "books/d", json!({"mtls": {"mode": "DISABLE"}}));
    let g = off.generate(&node(NodeKind::Sidecar, "10.1.0.7", "dns-1", json!({})));
    assert!(!g.listeners.contains_key("virtualInboundUdp"));
}

#[test]
fn gateways_pass_on_what_is_exported_and_what_is_of_peers() {
    let docs = imported().add(
        "Service",
        "books/hidden",
        json!({"selector": {"app": "dns"}, "ports": [{"name": "h", "port": 99, "targetPort": 5353, "protocol": "UDP"}]}),
    );
    let g = docs.generate(&node(NodeKind::Router, "10.1.0.100", "gw", json!({"ROUTER_MODE": "sni-dnat"})));
    let l = &g.listeners["udp_0.0.0.0_15444"];
    assert!(l.inspect_quic && l.address.port() == 15444);
    let chains: Vec<_> =
        l.filter_chains.iter().map(|c| (c.name.as_str(), c.matches.server_names[0].as_str())).collect();
    let own = "udp|outbound_.53_._.dns.books.svc.cluster.local";
    assert_eq!(
        chains,
        [
            (own, "outbound_.53_._.dns.books.svc.west.clusterset.local"),
            ("peer|east", "*.svc.east.clusterset.local")
        ]
    );
    // Only a workload with a proxy, at its proxy.
    let e = &g.endpoints[own].localities[0].endpoints;
    assert_eq!((e.len(), e[0].address.as_str(), e[0].port), (1, "10.1.0.7", 15006));
    assert!(matches!(e[0].slots, Slots::Serves(_)));
    // Those for TCP lead to the workload's own port.
    assert_eq!(g.endpoints[&own[4..]].localities[0].endpoints[0].port, 53);
}

#[test]
fn explaining_tells_what_carries_them() {
    let way = |docs: &Docs, n: &NodeInfo, to: &str| {
        let w = crate::generate::explain::outbound(
            &ProxyNode::new(n).unwrap(),
            &docs.world(),
            to,
            &Default::default(),
        );
        let last = w.steps.last().unwrap().clone();
        (last.is_broken().then_some(last.step), w.targets)
    };
    let (imported, quic) = (imported(), json!({"transport": "quic"}));
    let trunk = imported.clone().add("MeshConfig", "mesh", quic);
    // The number is one of both kinds: what is asked for is TCP unless it says otherwise.
    let (broken, targets) = way(&trunk, &tproxy(), "syslog.books:514");
    assert!(broken.is_none() && !targets[0].udp);
    let (broken, targets) = way(&trunk, &tproxy(), "syslog.books:514/udp");
    assert_eq!((broken, targets.len()), (None, 1));
    assert!(targets[0].udp && targets[0].sni == "outbound_.514_._.syslog.books.svc.east.clusterset.local");
    // Without a trunk, without capture, and without such a port.
    let broken = |docs: &Docs, n: &NodeInfo, to: &str| way(docs, n, to).0.unwrap_or_default();
    assert_eq!(broken(&imported, &tproxy(), "syslog.books:514/udp"), "transport");
    assert_eq!(broken(&trunk, &ours(json!({})), "syslog.books:514/udp"), "capture");
    assert_eq!(broken(&trunk, &tproxy(), "syslog.books:515/udp"), "port");
    // One of several ways is enough.
    let (none, targets) = way(&imported, &tproxy(), "dns.books:53/udp");
    assert_eq!((none, targets.len()), (None, 0));
    let ask = |port, udp| crate::generate::explain::Ask {
        name: "dns".into(),
        namespace: "books".into(),
        port,
        udp,
        cluster: "east".into(),
        ..Default::default()
    };
    let there = |a| crate::generate::explain::inbound(&docs().world(), &a, &Default::default());
    assert!(there(ask(53, true)).iter().all(|s| !s.is_broken()));
    assert!(there(ask(54, true)).iter().any(|s| s.step == "port" && s.is_broken()));
}

#[test]
fn peers_hear_of_ports_of_both_kinds() {
    let (exports, problems) = crate::exports::exports(&docs().world());
    let text = serde_json::to_string(&exports.values().map(|d| &d.body).collect::<Vec<_>>()).unwrap();
    for port in
        [r#""name":"dns","port":53,"protocol":"udp""#, r#""name":"dns-tcp","port":53,"protocol":"auto""#]
    {
        assert!(text.contains(port), "{text}");
    }
    assert_eq!(problems.len(), 1, "one workload has no proxy: {problems:?}");
    // A number that is TCP in one cluster and UDP in another is two ports.
    let conflicts = crate::conflicts::conflicts(&imported().world());
    assert!(conflicts.is_empty(), "{conflicts:?}");
}
