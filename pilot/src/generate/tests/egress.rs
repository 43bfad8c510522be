//! Listeners that a `Sidecar` declares, and what its hosts import.

use super::*;

fn port(number: u16, protocol: &str) -> Value {
    json!({"number": number, "name": "p", "protocol": protocol})
}

fn sidecar(egress: Value) -> Docs {
    bookstore()
        .add("Service", "shop/cart", service(9080, "http", "cart"))
        .add(
            "Service",
            "shop/store",
            json!({"clusterIP": "10.96.0.50", "ports": [{"name": "tcp-db", "port": 3306}]}),
        )
        .add("Sidecar", "books/default", json!({"egress": egress}))
}

fn domains(r: &RouteConfiguration) -> Vec<&str> {
    r.virtual_hosts.iter().flat_map(|v| &v.domains).map(String::as_str).collect()
}

#[test]
fn a_port_has_the_services_of_its_own_hosts() {
    let docs = sidecar(json!([
        {"port": port(9080, "HTTP"), "hosts": ["shop/*"]},
        {"hosts": ["./*", "shop/*"]}
    ]));
    let g = docs.generate(&productpage());
    // The listener without port does not add to one that is declared.
    assert!(domains(&g.routes["9080"]).contains(&"cart.shop"));
    assert!(!domains(&g.routes["9080"]).contains(&"reviews"));
    assert!(!g.listeners["0.0.0.0_9080"].bind_to_port);
    // It has the other ports of its hosts, and everything may be reached.
    assert!(g.listeners.contains_key("10.96.0.50_3306"));
    assert!(g.clusters.contains_key(REVIEWS));
    let only = sidecar(json!([{"port": port(9080, "HTTP"), "hosts": ["shop/*"]}])).generate(&productpage());
    assert!(!only.listeners.contains_key("10.96.0.50_3306"));
    assert!(!only.clusters.contains_key("outbound|3306||store.shop.svc.cluster.local"));
    assert!(!only.clusters.contains_key(REVIEWS));
}

#[test]
fn the_workload_connects_to_what_is_not_captured() {
    let docs = sidecar(json!([
        {"port": port(3306, "MYSQL"), "bind": "127.0.0.1", "captureMode": "NONE", "hosts": ["shop/store.shop.svc.cluster.local"]},
        {"port": port(9080, "HTTP"), "captureMode": "NONE", "hosts": ["./*"]}
    ]));
    let g = docs.generate(&productpage());
    let db = &g.listeners["127.0.0.1_3306"];
    assert!(db.bind_to_port);
    assert_eq!(db.address, "127.0.0.1:3306".parse().unwrap());
    assert_eq!(tcp_cluster(&db.filter_chains[0]), "outbound|3306||store.shop.svc.cluster.local");
    let web = &g.listeners["127.0.0.1_9080"];
    assert!(web.bind_to_port);
    assert!(web.default_filter_chain.is_none());
    // Whoever is not known is not passed through: it would come back.
    assert_eq!(vhost(&g.routes["9080"], "*").name, "block_all");
    assert!(domains(&g.routes["9080"]).contains(&"reviews:9080"));
    // Nothing of them is at the addresses of the services.
    assert!(!g.listeners.contains_key("10.96.0.50_3306"));
    // Nor need there be interception.
    let mut bare = productpage();
    bare.metadata.insert("INTERCEPTION_MODE".into(), "NONE".into());
    let g = docs.generate(&bare);
    assert!(g.listeners["127.0.0.1_3306"].bind_to_port && g.listeners["127.0.0.1_9080"].bind_to_port);
    assert!(!g.listeners.contains_key("virtualOutbound"));
}

#[test]
fn an_address_may_be_captured() {
    let docs = sidecar(json!([{"port": port(443, "TLS"), "bind": "192.0.2.7", "hosts": ["shop/*", "./ext.example.com"]}]))
        .add("ServiceEntry", "books/ext", json!({"hosts": ["ext.example.com"], "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}], "resolution": "DNS"}));
    let l = &docs.generate(&productpage()).listeners["192.0.2.7_443"];
    assert!(!l.bind_to_port && l.inspect_tls);
    assert_eq!(l.filter_chains[0].matches.server_names, ["ext.example.com"]);
    assert_eq!(tcp_cluster(&l.filter_chains[0]), "outbound|443||ext.example.com");
    // Other server names go where they were meant to.
    assert_eq!(tcp_cluster(l.default_filter_chain.as_ref().unwrap()), "PassthroughCluster");
}

#[test]
fn one_listener_may_be_a_proxy_for_all() {
    let docs = sidecar(json!([{"port": port(3128, "HTTP_PROXY"), "captureMode": "NONE", "hosts": ["*/*"]}]));
    let g = docs.generate(&productpage());
    assert!(g.listeners["127.0.0.1_3128"].bind_to_port);
    assert!(domains(&g.routes["3128"]).contains(&"cart.shop:9080"));
    assert!(domains(&g.routes["3128"]).contains(&"reviews:9080"));
}

#[test]
fn documents_have_hosts_on_a_declared_port() {
    let to_cart = json!({"hosts": ["basket.example"], "http": [{"route": [{"destination": {"host": "cart.shop.svc.cluster.local"}}]}]});
    let docs = sidecar(json!([{"port": port(7000, "HTTP"), "hosts": ["./*"]}])).add(
        "VirtualService",
        "books/basket",
        to_cart.clone(),
    );
    let g = docs.generate(&productpage());
    let r = &vhost(&g.routes["7000"], "basket.example:7000").routes[0];
    assert_eq!(forward(r).clusters[0].cluster, "outbound|9080||cart.shop.svc.cluster.local");
    // What the route leads to is reached, though nobody may call it by its name.
    assert!(g.clusters.contains_key("outbound|9080||cart.shop.svc.cluster.local"));
    assert!(!domains(&g.routes["7000"]).iter().any(|d| d.starts_with("cart")));
    // A document of a namespace that is not imported does not count.
    let elsewhere = sidecar(json!([{"port": port(7000, "HTTP"), "hosts": ["./*"]}])).add(
        "VirtualService",
        "shop/basket",
        to_cart,
    );
    let g = elsewhere.generate(&productpage());
    assert!(!g.routes.contains_key("7000") || !domains(&g.routes["7000"]).contains(&"basket.example:7000"));
    assert!(!g.clusters.contains_key("outbound|9080||cart.shop.svc.cluster.local"));
}

#[test]
fn routes_of_namespaces_that_are_not_imported_do_not_count() {
    let away = json!({"hosts": ["reviews.books.svc.cluster.local"], "http": [{"fault": {"abort": {"httpStatus": 418, "percentage": {"value": 100}}}, "route": [{"destination": {"host": "reviews.books.svc.cluster.local"}}]}]});
    let fault = |hosts: Value| {
        let docs = sidecar(json!([{ "hosts": hosts }])).add("VirtualService", "shop/away", away.clone());
        let g = docs.generate(&productpage());
        vhost(&g.routes["9080"], "reviews").routes[0].fault.is_some()
    };
    assert!(!fault(json!(["./*"])));
    assert!(fault(json!(["./*", "shop/reviews.books.svc.cluster.local"])));
    assert!(fault(json!(["*/*"])));
}

#[test]
fn a_proxy_for_what_nobody_declared() {
    let docs = bookstore()
        .add("ServiceEntry", "egress/out", json!({"hosts": ["proxy.example.com"], "ports": [{"number": 3128, "name": "tcp", "protocol": "TCP"}], "resolution": "DNS"}))
        .add("Sidecar", "books/default", json!({
            "egress": [{"hosts": ["./*"]}],
            "outboundTrafficPolicy": {"mode": "ALLOW_ANY", "egressProxy": {"host": "proxy.example.com", "port": {"number": 3128}}}}));
    let g = docs.generate(&productpage());
    let to = "outbound|3128||proxy.example.com";
    // It need not be imported to be reached.
    assert!(g.clusters.contains_key(to));
    assert!(!g.listeners.values().any(|l| l.name.ends_with("_3128")));
    assert_eq!(forward(&vhost(&g.routes["9080"], "*").routes[0]).clusters[0].cluster, to);
    assert_eq!(tcp_cluster(&g.listeners["virtualOutbound"].filter_chains[0]), to);
}

#[test]
fn ports_that_a_sidecar_serves_apart() {
    let tls = json!({"mode": "SIMPLE", "serverCertificate": "/c", "privateKey": "/k"});
    let docs = |mode: &str, tls: Value| {
        bookstore()
            .add("PeerAuthentication", "books/mode", json!({"mtls": {"mode": mode}}))
            .add("Sidecar", "books/default", json!({"ingress": [
                {"port": port(9443, "HTTPS"), "captureMode": "NONE", "bind": "10.1.0.200", "defaultEndpoint": "127.0.0.1:9080", "tls": tls}]}))
    };
    let g = docs("DISABLE", tls.clone()).generate(&productpage());
    let l = &g.listeners["10.1.0.200_9443"];
    assert!(l.bind_to_port && l.inspect_tls);
    let [c] = l.filter_chains.as_slice() else { panic!("{:?}", l.filter_chains) };
    // The certificate is the document's, and what is in the session are requests.
    assert_eq!(
        c.tls.as_ref().unwrap().certificate,
        SecretRef::Files { chain: "/c".into(), key: "/k".into() }
    );
    assert_eq!(http(c).stat_prefix, "inbound_0.0.0.0_9443");
    // Where the mesh's TLS is on, it is the one.
    let g = docs("STRICT", tls).generate(&productpage());
    let [c] = g.listeners["10.1.0.200_9443"].filter_chains.as_slice() else { panic!() };
    assert_eq!(c.tls.as_ref().unwrap().certificate, SecretRef::Sds("default".into()));
    // Settings that cannot be used let nobody in.
    let g = docs("DISABLE", json!({"mode": "MUTUAL", "serverCertificate": "/c", "privateKey": "/k"}))
        .generate(&productpage());
    assert!(g.listeners["10.1.0.200_9443"].filter_chains.is_empty());
}

/// Where a connection to `ip` goes that was captured on its way to `port`: what the narrowest range has, else the listener's
/// default.
fn chains<'a>(g: &'a Generated, port: u16, ip: &str) -> Vec<&'a FilterChain> {
    let l = &g.listeners[&format!("0.0.0.0_{port}")];
    let ip: std::net::IpAddr = ip.parse().unwrap();
    let reach = |c: &FilterChain| {
        let of = &c.matches.destination_prefixes;
        of.iter()
            .filter(|n| n.contains(&ip))
            .map(|n| i32::from(n.prefix_len()))
            .max()
            .unwrap_or(if of.is_empty() { -1 } else { -2 })
    };
    let best = l.filter_chains.iter().map(reach).max().unwrap_or(-2);
    let found: Vec<_> = l.filter_chains.iter().filter(|c| best > -2 && reach(c) == best).collect();
    if found.is_empty() { l.default_filter_chain.iter().collect() } else { found }
}

#[test]
fn ranges_of_addresses_are_a_service_entry() {
    let entry = |name: &str, addresses: Value, ports: Value| json!({"hosts": [format!("{name}.example")], "resolution": "NONE", "addresses": addresses, "ports": ports});
    let docs = bookstore()
        .add("ServiceEntry", "books/wide", entry("wide", json!(["10.50.0.0/16", "10.60.0.1"]), json!([port(3306, "TCP"), {"number": 7000, "name": "any"}])))
        .add("ServiceEntry", "books/narrow", entry("narrow", json!(["10.50.7.9/24"]), json!([port(3306, "TCP"), port(9443, "TLS")])))
        .add("ServiceEntry", "books/web", entry("web", json!(["10.50.0.0/16"]), json!([port(9080, "HTTP")])))
        .add("VirtualService", "books/wide", json!({"hosts": ["wide.example"], "tcp": [
            {"match": [{"port": 3306, "destinationSubnets": ["10.50.9.0/24", "10.99.0.0/16"]}], "route": [{"destination": {"host": "narrow.example"}}]},
            {"route": [{"destination": {"host": "wide.example"}}]}]}));
    let g = docs.generate(&productpage());
    let bytes = |port, ip| chains(&g, port, ip).into_iter().map(tcp_cluster).collect::<Vec<_>>();
    let (wide, narrow) = ("outbound|3306||wide.example", "outbound|3306||narrow.example");
    assert_eq!(bytes(3306, "10.50.1.1"), [wide]);
    assert_eq!(bytes(3306, "10.50.7.1"), [narrow], "the narrowest");
    assert_eq!(bytes(3306, "10.50.9.1"), [narrow], "as its VirtualService says of a part");
    assert_eq!(bytes(3306, "10.99.0.1"), ["PassthroughCluster"], "which is no address of the service");
    assert_eq!(bytes(3306, "10.51.0.1"), ["PassthroughCluster"]);
    // One address has a listener of its own, as ever.
    assert_eq!(tcp_cluster(g.listeners["10.60.0.1_3306"].filter_chains.last().unwrap()), wide);
    assert!(matches!(g.clusters[wide].discovery, Discovery::OriginalDst));
    // TLS, and what is told apart by what it says.
    assert_eq!(bytes(9443, "10.50.7.1"), ["outbound|9443||narrow.example"]);
    let both = chains(&g, 7000, "10.50.1.1");
    assert!(both.len() == 2 && g.listeners["0.0.0.0_7000"].inspect_http, "{both:?}");
    assert_eq!(tcp_cluster(both[1]), "outbound|7000||wide.example");
    assert_eq!(bytes(7000, "10.51.0.1"), ["PassthroughCluster"]);
    // Requests go by their host, wherever they were sent.
    assert!(domains(&g.routes["9080"]).contains(&"web.example"));
    assert!(chains(&g, 9080, "10.51.0.1")[0].matches.destination_prefixes.is_empty());
    // Such a service has no address that the mesh would answer for its name.
    assert!(
        !g.listeners.keys().any(|l| l.starts_with("240.") && l.ends_with("_9443")),
        "{:?}",
        g.listeners.keys()
    );
}
