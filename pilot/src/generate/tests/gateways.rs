//! Gateways and exports.

use mesh_model::{
    federation::{Conflict, ConflictReason},
    registry::Protocol,
};
use serde_json::json;

use super::*;
use crate::exports;

fn gateway_node(labels: Value, mode: &str) -> NodeInfo {
    node(NodeKind::Router, "10.1.0.100", "gw", json!({"LABELS": labels, "ROUTER_MODE": mode}))
}

/// A client of one server cannot ask for a host of another on the same connection: what a browser does with connections
/// whose certificate covers both, and what a stranger does to pass by a server that asks for certificates.
#[test]
fn a_server_of_tls_has_routes_of_its_own_hosts_alone() {
    let to = json!([{"destination": {"host": "reviews", "port": {"number": 9080}}}]);
    let docs = bookstore()
        .add("Gateway", "books/edge", json!({"selector": {"istio": "ingressgateway"}, "servers": [
            {"port": {"number": 443, "name": "open", "protocol": "HTTPS"}, "hosts": ["open.example.com"], "tls": {"mode": "SIMPLE", "credentialName": "c"}},
            {"port": {"number": 443, "name": "closed", "protocol": "HTTPS"}, "hosts": ["closed.example.com"], "tls": {"mode": "MUTUAL", "credentialName": "d"}}]}))
        .add("VirtualService", "books/all", json!({"hosts": ["open.example.com", "closed.example.com"], "gateways": ["edge"],
            "http": [{"route": to}]}));
    let g = docs.generate(&gateway_node(json!({"istio": "ingressgateway"}), ""));
    let mut seen = vec![];
    for c in &g.listeners["0.0.0.0_443"].filter_chains {
        let RouteSource::Rds(name) = &http(c).routes else { panic!() };
        let domains: Vec<_> = g.routes[name].virtual_hosts.iter().flat_map(|v| v.domains.clone()).collect();
        for d in &domains {
            assert_eq!(
                d.split(':').next(),
                c.matches.server_names.first().map(String::as_str),
                "{name}: {domains:?}"
            );
        }
        seen.extend(domains);
    }
    assert!(
        seen.contains(&"open.example.com".to_owned()) && seen.contains(&"closed.example.com".to_owned()),
        "{seen:?}"
    );
}

#[test]
fn policies_hold_for_bytes_at_gateways() {
    let deny = json!({"action": "DENY", "selector": {"matchLabels": {"istio": "ingressgateway"}},
        "rules": [{"from": [{"source": {"notIpBlocks": ["10.0.0.0/8"]}}]}]});
    let to = json!([{"destination": {"host": "reviews", "port": {"number": 9080}}}]);
    let docs = bookstore()
        .add("Gateway", "books/edge", json!({"selector": {"istio": "ingressgateway"}, "servers": [
            {"port": {"number": 443, "name": "pass", "protocol": "TLS"}, "hosts": ["raw.example.com"], "tls": {"mode": "PASSTHROUGH"}},
            {"port": {"number": 444, "name": "tls", "protocol": "TLS"}, "hosts": ["end.example.com"], "tls": {"mode": "SIMPLE", "credentialName": "c"}},
            {"port": {"number": 445, "name": "auto", "protocol": "TLS"}, "hosts": ["*.local"], "tls": {"mode": "AUTO_PASSTHROUGH"}},
            {"port": {"number": 9000, "name": "tcp", "protocol": "TCP"}, "hosts": ["*"]}]}))
        .add("VirtualService", "books/raw", json!({"hosts": ["raw.example.com", "end.example.com"], "gateways": ["edge"],
            "tls": [{"match": [{"port": 443, "sniHosts": ["raw.example.com"]}], "route": to}],
            "tcp": [{"match": [{"port": 9000}], "route": to}, {"match": [{"port": 444}], "route": to}]}))
        .add("AuthorizationPolicy", "books/deny", deny);
    let g = docs.generate(&gateway_node(json!({"istio": "ingressgateway"}), ""));
    for port in [443, 444, 445, 9000] {
        let l = &g.listeners[&format!("0.0.0.0_{port}")];
        assert!(!l.filter_chains.is_empty());
        for c in &l.filter_chains {
            let NetworkFilter::Rbac(r) = &c.filters[0] else { panic!("{port}: {:?}", c.filters) };
            assert!(
                r.rules.as_ref().unwrap().policies.contains_key("ns[books]-policy[deny]-rule[0]"),
                "{port}"
            );
        }
    }
}

#[test]
fn ingress() {
    let docs = bookstore()
        .add("Gateway", "books/edge", json!({"selector": {"istio": "ingressgateway"}, "servers": [
            {"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["shop.example.com", "*.other.com"]},
            {"port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["shop.example.com"], "tls": {"mode": "MUTUAL", "credentialName": "shop"}},
            {"port": {"number": 443, "name": "pass", "protocol": "TLS"}, "hosts": ["raw.example.com"], "tls": {"mode": "PASSTHROUGH"}},
            {"port": {"number": 9000, "name": "tcp", "protocol": "TCP"}, "hosts": ["*"]}]}))
        .add("Gateway", "books/old", json!({"selector": {"istio": "ingressgateway"}, "servers": [
            {"port": {"number": 81, "name": "http", "protocol": "HTTP"}, "hosts": ["secure.example.com"], "tls": {"httpsRedirect": true}}]}))
        .add("VirtualService", "books/shop", json!({"hosts": ["shop.example.com"], "gateways": ["edge"], "http": [
            {"route": [{"destination": {"host": "reviews", "port": {"number": 9080}}}]}]}))
        .add("VirtualService", "books/shop-admin", json!({"hosts": ["shop.example.com"], "gateways": ["books/edge"], "http": [
            {"match": [{"uri": {"prefix": "/admin"}}], "route": [{"destination": {"host": "productpage"}}]}]}))
        .add("VirtualService", "books/raw", json!({"hosts": ["raw.example.com"], "gateways": ["edge"],
            "tls": [{"match": [{"port": 443, "sniHosts": ["raw.example.com"]}], "route": [{"destination": {"host": "reviews", "port": {"number": 9080}}}]}],
            "tcp": [{"match": [{"port": 9000}], "route": [{"destination": {"host": "reviews", "port": {"number": 9080}}}]}]}));
    let g = docs.generate(&gateway_node(json!({"istio": "ingressgateway"}), ""));
    assert!(!g.listeners.contains_key("virtualInbound"));
    let l = &g.listeners["0.0.0.0_80"];
    assert!(http(&l.filter_chains[0]).use_remote_address);
    let v = vhost(&g.routes["http.80"], "shop.example.com");
    assert_eq!(v.routes.len(), 2);
    assert_eq!(v.routes[0].matches.path, PathMatch::Prefix("/admin".into()), "catch-all routes come last");
    let s = &g.listeners["0.0.0.0_443"];
    assert!(s.inspect_tls);
    let mutual = s.filter_chains[0].tls.as_ref().unwrap();
    assert_eq!(mutual.certificate, SecretRef::Sds("kubernetes://shop".into()));
    assert!(
        matches!(&mutual.client_certificate, ClientCertificate::Required(v) if v.trusted == Some(SecretRef::Sds("kubernetes://shop-cacert".into())))
    );
    assert_eq!(http(&s.filter_chains[0]).routes, RouteSource::Rds("https.443.https.edge.books".into()));
    assert_eq!(s.filter_chains[1].matches.server_names, ["raw.example.com"]);
    assert!(s.filter_chains[1].tls.is_none());
    assert_eq!(tcp_cluster(&g.listeners["0.0.0.0_9000"].filter_chains[0]), REVIEWS);
    assert!(vhost(&g.routes["http.81"], "secure.example.com").require_tls);
    // Another gateway has none of it.
    assert!(docs.generate(&gateway_node(json!({"istio": "egressgateway"}), "")).listeners.is_empty());
}

#[test]
fn https_servers_have_a_listener_of_quic_if_the_mesh_says_so() {
    let docs = bookstore()
        .add("Gateway", "books/edge", json!({"selector": {"istio": "ingressgateway"}, "servers": [
            {"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["shop.example.com"]},
            {"port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["shop.example.com"], "tls": {"mode": "MUTUAL", "credentialName": "shop"}},
            {"port": {"number": 443, "name": "mesh", "protocol": "HTTPS"}, "hosts": ["mesh.example.com"], "tls": {"mode": "ISTIO_MUTUAL"}},
            {"port": {"number": 443, "name": "pass", "protocol": "TLS"}, "hosts": ["raw.example.com"], "tls": {"mode": "PASSTHROUGH"}}]}))
        .add("VirtualService", "books/shop", json!({"hosts": ["shop.example.com", "mesh.example.com"], "gateways": ["edge"], "http": [
            {"route": [{"destination": {"host": "reviews", "port": {"number": 9080}}}]}]}));
    let node = gateway_node(json!({"istio": "ingressgateway"}), "");
    let off = docs.generate(&node);
    assert_eq!(off.listeners.keys().collect::<Vec<_>>(), ["0.0.0.0_443", "0.0.0.0_80"]);
    let shop = "https.443.https.edge.books";
    assert!(vhost(&off.routes[shop], "shop.example.com").response_headers.set.is_empty());

    let docs = docs.add("MeshConfig", "mesh", json!({"enableQuicListeners": true}));
    let on = docs.generate(&node);
    assert_eq!(on.listeners.keys().collect::<Vec<_>>(), ["0.0.0.0_443", "0.0.0.0_80", "udp_0.0.0.0_443"]);
    assert_eq!(on.listeners["0.0.0.0_443"], off.listeners["0.0.0.0_443"]);
    let (tcp, quic) = (&on.listeners["0.0.0.0_443"], &on.listeners["udp_0.0.0.0_443"]);
    assert!(quic.quic.is_some() && !quic.inspect_tls && quic.address == tcp.address);
    let [c] = quic.filter_chains.as_slice() else { panic!("{:?}", quic.filter_chains) };
    assert_eq!(
        (c.matches.server_names.as_slice(), c.matches.transport_protocol),
        (&["shop.example.com".to_owned()][..], None)
    );
    let tls = c.tls.as_ref().unwrap();
    assert_eq!((tls.alpn.join(","), tls.min_version), ("h3".to_owned(), TlsVersion::V1_3));
    assert_eq!(tls.client_certificate, tcp.filter_chains[0].tls.as_ref().unwrap().client_certificate);
    assert_eq!(http(c).codec, HttpCodec::Http3);
    assert_eq!(http(c).routes, RouteSource::Rds(shop.into()));
    let told = |route: &str, host: &str| vhost(&on.routes[route], host).response_headers.set.clone();
    assert_eq!(told(shop, "shop.example.com"), [("alt-svc".to_owned(), "h3=\":443\"; ma=86400".to_owned())]);
    assert_eq!(told("https.443.mesh.edge.books", "mesh.example.com"), []);
    assert_eq!(told("http.80", "shop.example.com"), []);
    // What is served must be what proxies take.
    let any = mesh_xds::codec::encode_listener(quic);
    assert_eq!(&mesh_xds::codec::decode_listener(&any).unwrap(), quic);
}

#[test]
fn egress_through_a_gateway() {
    let docs = bookstore()
        .add("Service", "books/egress", service(80, "http", "egress"))
        .add("WorkloadEntry", "books/egress", json!({"address": "10.1.0.100", "labels": {"app": "egress", "security.istio.io/tlsMode": "istio"}, "ports": {"http": 8080}}))
        .add("ServiceEntry", "books/ext", json!({"hosts": ["ext.example.com"], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "resolution": "DNS"}))
        .add("Gateway", "books/out", json!({"selector": {"app": "egress"}, "servers": [{"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["ext.example.com"]}]}))
        .add("VirtualService", "books/ext", json!({"hosts": ["ext.example.com"], "gateways": ["mesh", "out"], "http": [
            {"match": [{"gateways": ["mesh"], "port": 80}], "route": [{"destination": {"host": "egress", "port": {"number": 80}}}]},
            {"match": [{"gateways": ["out"], "port": 80}], "route": [{"destination": {"host": "ext.example.com", "port": {"number": 80}}}]}]}));
    let side = docs.generate(&productpage());
    let r = vhost(&side.routes["80"], "ext.example.com");
    assert_eq!(forward(&r.routes[0]).clusters[0].cluster, "outbound|80||egress.books.svc.cluster.local");
    let gw = docs.generate(&gateway_node(json!({"app": "egress"}), ""));
    assert_eq!(gw.listeners.keys().collect::<Vec<_>>(), ["0.0.0.0_8080"], "the service maps 80 to 8080");
    let r = vhost(&gw.routes["http.80"], "ext.example.com");
    assert_eq!(forward(&r.routes[0]).clusters[0].cluster, "outbound|80||ext.example.com");
}

#[test]
fn a_gateway_that_ends_mesh_sessions_speaks_their_protocol() {
    let offered = |protocol: &str, mode: &str| {
        let server = json!({"port": {"number": 443, "name": "x", "protocol": protocol}, "hosts": ["*"],
            "tls": {"mode": mode, "credentialName": "own"}});
        let docs = bookstore()
            .add("Gateway", "books/out", json!({"selector": {"app": "egress"}, "servers": [server]}))
            .add(
                "VirtualService",
                "books/out",
                json!({"hosts": ["ext.example.com"], "gateways": ["out"],
                "tcp": [{"route": [{"destination": {"host": "reviews", "port": {"number": 9080}}}]}]}),
            );
        let g = docs.generate(&gateway_node(json!({"app": "egress"}), ""));
        g.listeners["0.0.0.0_443"].filter_chains[0].tls.as_ref().unwrap().alpn.join(",")
    };
    assert_eq!(offered("HTTPS", "ISTIO_MUTUAL"), "h2,http/1.1,istio");
    assert_eq!(offered("TLS", "ISTIO_MUTUAL"), "istio");
    assert_eq!(offered("HTTPS", "SIMPLE"), "h2,http/1.1");
    assert_eq!(offered("TLS", "SIMPLE"), "", "anything is taken");
}

fn sni_target<'a>(l: &'a Listener, name: &str) -> Option<&'a str> {
    let exact = l.filter_chains.iter().find(|c| c.matches.server_names.iter().any(|n| n == name));
    exact
        .or_else(|| {
            l.filter_chains.iter().find(|c| {
                c.matches.server_names.iter().any(|n| n.starts_with('*') && name.ends_with(&n[1..]))
            })
        })
        .map(tcp_cluster)
}

#[test]
fn east_west_forwards_only_what_is_exported() {
    let docs = bookstore().add("ServiceExport", "books/reviews", json!({}));
    let g = docs.generate(&gateway_node(json!({"istio": "eastwestgateway"}), "sni-dnat"));
    let l = &g.listeners["0.0.0.0_15443"];
    assert!(l.inspect_tls && l.default_filter_chain.is_none());
    assert!(l.filter_chains.iter().all(|c| c.tls.is_none()), "nothing is terminated");
    let name = "outbound_.9080_._.reviews.books.svc.cluster.local";
    let own = Some(name);
    assert_eq!(sni_target(l, "outbound_.9080_._.reviews.books.svc.west.clusterset.local"), own);
    assert_eq!(sni_target(l, "outbound_.9080_._.reviews.books.svc.cluster.local"), own);
    assert_eq!(
        sni_target(l, "outbound_.9080_.v1_.reviews.books.svc.west.clusterset.local"),
        Some("outbound_.9080_.v1_.reviews.books.svc.cluster.local")
    );
    assert_eq!(sni_target(l, "0000beef.outbound_.9080_._.reviews.books.svc.west.clusterset.local"), own);
    assert_eq!(sni_target(l, "outbound_.9080_._.productpage.books.svc.west.clusterset.local"), None);
    assert_eq!(sni_target(l, "outbound_.9080_._.productpage.books.svc.cluster.local"), None);
    assert_eq!(sni_target(l, "outbound_.9080_._.reviews.books.svc.east.clusterset.local"), Some("peer|east"));
    assert_eq!(sni_target(l, "federation.east.clusterset.local"), Some("peer|east"));
    assert_eq!(sni_target(l, "federation.west.clusterset.local"), Some("control-plane"));
    assert_eq!(sni_target(l, "join.west.clusterset.local"), Some("control-plane"));
    assert_eq!(sni_target(l, "evil.example.com"), None);
    assert!(l.access_log.is_empty());
    let logging = docs.clone().add("MeshConfig", "mesh", json!({"accessLogFile": "/dev/stdout"}));
    let logged =
        &logging.generate(&gateway_node(json!({}), "sni-dnat")).listeners["0.0.0.0_15443"].access_log;
    assert!(matches!(&logged[0], AccessLog::File(f) if f.path == "/dev/stdout"), "what is refused is logged");
    // Only own workloads: forwarding back out would loop.
    let e: Vec<&str> =
        g.endpoints[name].localities.iter().flat_map(|l| &l.endpoints).map(|e| e.address.as_str()).collect();
    assert_eq!(e, ["10.1.0.5"]);
    let peer = |g: &Generated| g.endpoints["peer|east"].localities[0].endpoints[0].address.clone();
    assert_eq!(peer(&g), "203.0.113.2");
    let quic = docs.add("MeshConfig", "mesh", json!({"transport": "quic"}));
    let g = quic.generate(&gateway_node(json!({}), "sni-dnat"));
    assert_eq!(peer(&g), "trunk:east@203.0.113.2");
}

/// Addresses of the ways to east and north, where some clusters have no gateway that can be dialled.
fn ways(own: bool, east: bool, north: bool) -> [Vec<String>; 2] {
    let hide = |announced: bool, mut p: Value| {
        if !announced {
            p["gateways"] = json!([]);
        }
        p
    };
    let docs = Docs::default()
        .add("MeshConfig", "mesh", json!({"transport": "quic"}))
        .add("PeerCluster", "east", hide(east, peer("east", "203.0.113.2")))
        .add("PeerCluster", "north", hide(north, peer("north", "203.0.113.3")));
    let (galley, federation) = docs.states();
    let s = Settings { reachable: own, ..settings() };
    let w = World::new(s, Reader::default().read(&galley, &federation));
    let g = generate(&ProxyNode::new(&gateway_node(json!({}), "sni-dnat")).unwrap(), &w);
    ["peer|east", "peer|north"].map(|name| {
        let localities = &g.endpoints[name].localities;
        localities.iter().flat_map(|l| &l.endpoints).map(|e| e.address.clone()).collect()
    })
}

#[test]
fn whoever_can_be_dialled_is_dialled() {
    let dial =
        |keep: &str| [format!("trunk:east@203.0.113.2{keep}"), format!("trunk:north@203.0.113.3{keep}")];
    let [east, north] = dial("");
    assert_eq!(ways(true, true, true), [vec![east], vec![north.clone()]]);
    // East dials us.
    assert_eq!(ways(true, false, true), [vec!["trunk:east@".to_owned()], vec![north]]);
    assert_eq!(ways(true, false, false), [vec!["trunk:east@".to_owned()], vec!["trunk:north@".to_owned()]]);
    // We dial north, and east does; nobody sends through a third who could do without.
    let [east, north] = dial("+keep");
    assert_eq!(ways(false, true, true), [vec![east], vec![north.clone()]]);
    assert_eq!(ways(false, false, true), [vec![north.clone()], vec![north]]);
    // Nobody is there to meet at: the chain stays, so that the refusal says so.
    assert_eq!(ways(false, false, false), [Vec::<String>::new(), vec![]]);
}

#[test]
fn exports_are_groups_not_pods() {
    let docs = bookstore()
        .add("WorkloadEntry", "books/reviews-v1b", workload("10.1.0.7", "reviews", "v1"))
        .add("WorkloadEntry", "books/reviews-v1c", workload("10.1.0.8", "reviews", "v1"))
        .annotate("flotilla.dev/health", "unhealthy")
        .add("ServiceExport", "books/reviews", json!({}))
        .add("ServiceExport", "books/missing", json!({}));
    let (out, problems) = exports::exports(&docs.world());
    assert_eq!(out.len(), 1);
    let e: mesh_model::federation::ExportedService = out["books/reviews"].spec().unwrap();
    assert_eq!(e.groups.len(), 1);
    assert_eq!(e.groups[0].healthy_weight, 2);
    assert_eq!(e.service_accounts, ["spiffe://mesh.local/ns/books/sa/reviews"]);
    assert_eq!((e.groups[0].slots.len(), e.ports[0].port), (2, 9080));
    assert!(problems.iter().any(|p| p.object == "ServiceExport books/missing"), "{problems:?}");
}

/// A service of `n` workloads, as the gateway and peers get it.
fn of_size(n: usize, skip: usize) -> (Vec<(String, Vec<u32>)>, mesh_model::federation::ExportedService) {
    let mut docs = Docs::default().add("Service", "books/reviews", service(9080, "http", "reviews")).add(
        "ServiceExport",
        "books/reviews",
        json!({}),
    );
    for i in (0..n).filter(|i| *i != skip) {
        docs = docs.add(
            "WorkloadEntry",
            &format!("books/r{i}"),
            workload(&format!("10.1.{}.{}", i / 200, i % 200 + 1), "reviews", "v1"),
        );
    }
    let g = docs.generate(&gateway_node(json!({}), "sni-dnat"));
    let name = "outbound_.9080_._.reviews.books.svc.cluster.local";
    let serves = g.endpoints[name]
        .localities
        .iter()
        .flat_map(|l| &l.endpoints)
        .map(|e| match &e.slots {
            Slots::Serves(s) => (e.address.clone(), s.to_vec()),
            other => panic!("{}: {other:?}", e.address),
        })
        .collect();
    let (out, _) = exports::exports(&docs.world());
    (serves, out["books/reviews"].spec().unwrap())
}

#[test]
fn each_workload_has_a_slot_that_it_keeps() {
    let (serves, export) = of_size(11, usize::MAX);
    assert_eq!(serves.len(), 11);
    let mut of_gateway: Vec<u32> = serves.iter().flat_map(|(_, s)| s.clone()).collect();
    of_gateway.sort_unstable();
    assert_eq!(of_gateway, export.groups[0].slots, "the gateway serves what was announced");
    of_gateway.dedup();
    assert_eq!(of_gateway.len(), 11);
    // One goes: the others keep theirs.
    let (fewer, export) = of_size(11, 4);
    assert!(fewer.iter().all(|e| serves.contains(e)));
    assert_eq!(export.groups[0].slots.len(), 10);
}

#[test]
fn a_large_service_has_few_slots_that_do_not_follow_its_workloads() {
    let (serves, export) = of_size(40, usize::MAX);
    assert_eq!(export.groups[0].slots.len(), 16);
    assert!(serves.iter().all(|(_, s)| *s == export.groups[0].slots));
    let (_, again) = of_size(41, 7);
    assert_eq!(again, export, "one of forty was replaced and nobody is told");
}

/// `(loser, winner, reason, message)` of each conflict.
fn found(docs: &Docs) -> Vec<(String, String, ConflictReason, String)> {
    let all = crate::conflicts::conflicts(&docs.world());
    all.values()
        .map(|d| d.spec::<Conflict>().unwrap())
        .map(|c| (c.loser.to_string(), c.winner.to_string(), c.reason, c.message))
        .collect()
}

fn exported(cluster: &str, at: u64, ports: Value, headless: bool) -> Value {
    json!({"cluster": cluster, "lease": "live", "service": {
        "name": "stock", "namespace": "books", "host": "stock.books.svc.cluster.local", "ports": ports,
        "headless": headless, "groups": [], "serviceAccounts": [], "exportedAt": at}})
}

#[test]
fn the_oldest_export_wins_and_the_others_are_named() {
    let http = json!([{"name": "http", "port": 80, "protocol": "http"}]);
    let more = json!([{"name": "http", "port": 80, "protocol": "http"}, {"name": "x", "port": 81, "protocol": "tcp"}]);
    let moved = json!([{"name": "http", "port": 8080, "protocol": "http"}]);
    let grpc = json!([{"name": "http", "port": 80, "protocol": "grpc"}]);
    let peers = |list: &[(&str, u64, &Value, bool)]| {
        list.iter().fold(bookstore(), |docs, (c, at, ports, headless)| {
            docs.add(
                "ImportedService",
                &format!("books/stock.{c}"),
                exported(c, *at, (*ports).clone(), *headless),
            )
        })
    };
    let port = |docs: &Docs| {
        let world = docs.world();
        let s = &world.index.services["stock.books.svc.cluster.local"].service;
        (s.ports[0].port, s.ports[0].protocol)
    };
    let agree = peers(&[("a", 5, &http, false), ("b", 6, &more, false)]);
    assert_eq!(found(&agree), [], "a port that only one has contradicts nobody");

    let docs = peers(&[
        ("a", 9, &moved, false),
        ("b", 7, &http, false),
        ("c", 8, &grpc, false),
        ("d", 9, &http, true),
    ]);
    let says =
        |is: &str, other: &str| format!("port http here is {is}, in b, whose export is older, it is {other}");
    let (a, c) = (says("8080 (http)", "80 (http)"), says("80 (grpc)", "80 (http)"));
    let d = "it is headless here and not headless in b, whose export is older".to_owned();
    assert_eq!(
        found(&docs),
        [
            ("a".into(), "b".into(), ConflictReason::Port, a),
            ("c".into(), "b".into(), ConflictReason::Port, c),
            ("d".into(), "b".into(), ConflictReason::Type, d),
        ]
    );
    assert_eq!(port(&docs), (80, Protocol::Http), "and what the oldest says holds for all");
    // Of the same age the first by name.
    let docs = peers(&[("b", 7, &http, false), ("a", 7, &moved, false)]);
    assert_eq!(found(&docs)[0].0, "b");
    assert_eq!(port(&docs).0, 8080);
    // Whoever is not believed takes no part.
    let rule = json!({"rules": [{"peers": ["a"], "action": "DENY"}]});
    assert_eq!(found(&docs.add("ImportPolicy", "mesh", rule)), []);
}

#[test]
fn an_own_export_takes_part() {
    let reviews = |at: u64, port: u16| {
        let mut i = import("east", "live", json!([]));
        i["service"]["exportedAt"] = at.into();
        i["service"]["ports"][0]["port"] = port.into();
        bookstore().add("ImportedService", "east/books/reviews", i)
    };
    assert_eq!(found(&reviews(5, 1)), [], "what is not exported is no conflict");
    let export = |docs: Docs| docs.add("ServiceExport", "books/reviews", json!({}));
    // Documents of tests are of second 1000 and later.
    assert_eq!(found(&export(reviews(5, 1)))[0].0, "west");
    assert_eq!(found(&export(reviews(5000, 1)))[0].0, "east");
    assert_eq!(found(&export(reviews(5, 9080))), []);
}
