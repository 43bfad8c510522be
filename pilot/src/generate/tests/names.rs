//! Services whose hosts are found by the name that a request asks for (`DYNAMIC_DNS`).

use super::*;

fn wildcard() -> Docs {
    bookstore().add(
        "ServiceEntry",
        "books/wild",
        json!({
            "hosts": ["*.example.com"],
            "location": "MESH_EXTERNAL",
            "resolution": "DYNAMIC_DNS",
            "ports": [
                {"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080},
                {"number": 443, "name": "tls", "protocol": "TLS"},
            ],
        }),
    )
}

fn named(c: &Cluster) -> &NamedHosts {
    match &c.discovery {
        Discovery::ByName(n) => n,
        other => panic!("{other:?}"),
    }
}

fn filters(g: &Generated, listener: &str) -> Vec<HttpFilter> {
    let l = &g.listeners[listener];
    let all = l.filter_chains.iter().chain(&l.default_filter_chain).flat_map(|c| &c.filters);
    all.filter_map(|f| if let NetworkFilter::Http(h) = f { Some(h.filters.clone()) } else { None })
        .next()
        .unwrap()
}

#[test]
fn the_name_of_a_request_leads_to_its_host() {
    let g = wildcard().generate(&productpage());
    let web = &g.clusters["outbound|80||*.example.com"];
    assert_eq!(named(web).port, 8080, "the port that is meant");
    assert_eq!(web.namespace, "books", "which the host does not say");
    let reviews = g.clusters.iter().find(|(name, _)| name.ends_with("||reviews.books.svc.cluster.local"));
    assert_eq!(reviews.unwrap().1.namespace, "");
    assert!(vhost(&g.routes["80"], "*.example.com").domains.contains(&"*.example.com".to_owned()));
    let tls = &g.clusters["outbound|443||*.example.com"];
    assert_eq!(named(tls).port, 443);
    let chain = g.listeners["0.0.0.0_443"]
        .filter_chains
        .iter()
        .find(|c| c.matches.server_names == ["*.example.com"])
        .unwrap();
    let Some(NetworkFilter::Tcp(t)) = chain.filters.last() else { panic!() };
    assert_eq!(t.names, Some((named(tls).cache.clone(), 443)));
    // Strangers choose what the names resolve to: never the proxy's own host, nor a cloud's metadata.
    for inward in
        ["127.0.0.1", "169.254.169.254", "0.0.0.0", "::1", "::ffff:127.0.0.1", "fe80::1", "224.0.0.1"]
    {
        let ip: std::net::IpAddr = inward.parse().unwrap();
        assert!(named(web).cache.refused.iter().any(|n| n.contains(&ip)), "{inward}");
    }
    assert!(!named(web).cache.refused.iter().any(|n| n.contains(&std::net::IpAddr::from([10, 0, 0, 1]))));
}

#[test]
fn envoy_needs_a_filter_for_it() {
    let ours = filters(&wildcard().generate(&productpage()), "0.0.0.0_80");
    assert!(!ours.iter().any(|f| matches!(f, HttpFilter::Names(_))));
    let mut envoy = productpage();
    envoy.user_agent = "envoy".into();
    let g = wildcard().generate(&envoy);
    let Some(HttpFilter::Names(c)) =
        filters(&g, "0.0.0.0_80").into_iter().find(|f| matches!(f, HttpFilter::Names(_)))
    else {
        panic!("no filter")
    };
    assert_eq!(c, named(&g.clusters["outbound|80||*.example.com"]).cache, "caches of one name are alike");
    let without = filters(&bookstore().generate(&envoy), "0.0.0.0_9080");
    assert!(!without.iter().any(|f| matches!(f, HttpFilter::Names(_))));
}

#[test]
fn tls_asks_for_the_name_and_wants_it_shown() {
    let tls = |settings: Value| {
        let policy = json!({"host": "*.example.com", "trafficPolicy": {"tls": settings}});
        let g = wildcard().add("DestinationRule", "books/wild", policy).generate(&productpage());
        g.clusters["outbound|80||*.example.com"].tls.clone().unwrap()
    };
    let simple = tls(json!({"mode": "SIMPLE"}));
    assert!(simple.sni.is_empty() && simple.is_proven_by_name());
    let sans = tls(json!({"mode": "SIMPLE", "subjectAltNames": ["a.example.com"]}));
    assert!(sans.by_name && !sans.is_proven_by_name(), "whoever names names means those");
    assert!(!tls(json!({"mode": "SIMPLE", "sni": "x.example.com"})).by_name);
    assert!(!tls(json!({"mode": "ISTIO_MUTUAL"})).by_name, "identities of the mesh are no names of hosts");
}

fn undeclared(policy: Value) -> Docs {
    bookstore().add("Service", "books/db", service(3306, "mysql", "db")).add(
        "MeshConfig",
        "mesh",
        json!({"outboundTrafficPolicy": policy, "proxyHttpPort": 3128}),
    )
}

/// `ALLOW_ANY_DYNAMIC_DNS`: requests go where their host leads, bytes where they were sent.
#[test]
fn hosts_that_nobody_declared_are_found_by_name() {
    const ANY: &str = "AllowAnyDynamicDNSCluster";
    let g = undeclared(json!({"mode": "ALLOW_ANY_DYNAMIC_DNS"})).generate(&productpage());
    let c = &g.clusters[ANY];
    assert_eq!((named(c).port, c.http, c.tls.is_none()), (0, UpstreamHttp::Downstream, true));
    // Also where a request is proxied, and there is no other address that it was sent to.
    for routes in ["9080", "http_proxy"] {
        let host = vhost(&g.routes[routes], "*");
        assert_eq!(host.name, "allow_any_dynamic_dns");
        assert_eq!(forward(&host.routes[0]).clusters[0].cluster, ANY);
    }
    let v = &g.listeners["virtualOutbound"];
    assert!(v.inspect_http && !v.inspect_tls);
    assert!(v.filter_chains[0].matches.application_protocols.contains(&"http/1.1".to_owned()));
    let RouteSource::Inline(r) = &http(&v.filter_chains[0]).routes else { panic!() };
    assert_eq!(forward(&vhost(r, "*").routes[0]).clusters[0].cluster, ANY);
    assert_eq!(tcp_cluster(v.default_filter_chain.as_ref().unwrap()), "PassthroughCluster");
    assert!(!g.listeners["10.96.0.2_3306"].inspect_http, "servers that speak first do not wait");
    check(&g);

    let others = undeclared(json!({"mode": "ALLOW_ANY"})).generate(&productpage());
    assert!(!others.clusters.contains_key(ANY));
    // A Sidecar may say otherwise.
    let refused = undeclared(json!({"mode": "ALLOW_ANY_DYNAMIC_DNS"})).add(
        "Sidecar",
        "books/s",
        json!({"outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"}}),
    );
    let g = refused.generate(&productpage());
    assert!(!g.clusters.contains_key(ANY));
    assert_eq!(vhost(&g.routes["9080"], "*").name, "block_all");

    let mut envoy = productpage();
    envoy.user_agent = "envoy".into();
    let g = undeclared(json!({"mode": "ALLOW_ANY_DYNAMIC_DNS"})).generate(&envoy);
    for l in ["virtualOutbound", "0.0.0.0_9080"] {
        let found = filters(&g, l).into_iter().find(|f| matches!(f, HttpFilter::Names(_)));
        assert_eq!(found, Some(HttpFilter::Names(named(&g.clusters[ANY]).cache.clone())), "{l}");
    }
}

#[test]
fn tls_with_hosts_that_nobody_declared() {
    let tls = |v: Value| {
        let docs = undeclared(json!({"mode": "ALLOW_ANY_DYNAMIC_DNS", "tls": v}));
        docs.generate(&productpage()).clusters["AllowAnyDynamicDNSCluster"].tls.clone()
    };
    let simple = tls(json!({"mode": "SIMPLE"})).unwrap();
    assert!(simple.sni.is_empty() && simple.is_proven_by_name());
    assert_eq!(tls(json!({"mode": "SIMPLE", "sni": "a.example"})).unwrap().sni, "a.example");
    assert_eq!(tls(json!({"mode": "DISABLE"})), None);
}
