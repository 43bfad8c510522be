//! Settings of the mesh for those who say nothing themselves, as far as they take more than one proxy's configuration.

use serde_json::json;

use super::*;

const REMOTE: &str = "10.1.0.100";

fn addresses(docs: &Docs) -> Vec<String> {
    let g = docs.generate(&productpage());
    let all = g.endpoints[REVIEWS].localities.iter().flat_map(|l| &l.endpoints);
    all.map(|e| e.address.clone()).collect()
}

fn with(spec: Value) -> Docs {
    bookstore().add("MeshConfig", "mesh", spec)
}

#[test]
fn services_of_their_cluster_alone() {
    let local = |hosts: Value| json!({"settings": {"clusterLocal": true}, "hosts": hosts});
    assert!(addresses(&bookstore()).iter().any(|a| a == REMOTE));
    for hosts in [json!(["*.books.svc.cluster.local"]), json!(["reviews.books.svc.cluster.local"])] {
        let docs = with(json!({"serviceSettings": [local(hosts)]}));
        assert_eq!(addresses(&docs), ["10.1.0.5"]);
        // Nor is there anybody behind gateways to be known.
        assert!(
            docs.generate(&productpage()).clusters[REVIEWS]
                .tls_matches
                .iter()
                .all(|m| m.name != "cluster-east")
        );
    }
    // Of several the most specific host decides, wherever it stands.
    let exception =
        json!({"settings": {"clusterLocal": false}, "hosts": ["reviews.books.svc.cluster.local"]});
    for order in [[exception.clone(), local(json!(["*"]))], [local(json!(["*"])), exception]] {
        assert!(addresses(&with(json!({"serviceSettings": order}))).iter().any(|a| a == REMOTE));
    }
    let others = with(json!({"serviceSettings": [local(json!(["*.other.svc.cluster.local"]))]}));
    assert!(addresses(&others).iter().any(|a| a == REMOTE));
}

#[test]
fn workloads_under_other_names_of_the_trust_domain() {
    let g = with(json!({"trustDomainAliases": ["old.example"]})).generate(&productpage());
    let own = g.clusters[REVIEWS].tls_matches.iter().find(|m| m.name == "tlsMode-istio").unwrap();
    let want = [
        "mesh.local/ns/books/sa/reviews",
        "old.example/ns/books/sa/reviews",
        "mesh.local/ns/books/sa/reviews-east",
        "old.example/ns/books/sa/reviews-east",
    ];
    let sans = &own.tls.as_ref().unwrap().validation.sans;
    assert_eq!(*sans, want.map(|id| StringMatch::exact(format!("spiffe://{id}"))));
}

/// A policy of one of the names is for all of them; of another domain's it is not.
#[test]
fn principals_under_other_names_of_the_trust_domain() {
    let rules = |principal: &str, aliases: Value| {
        let source = json!({"source": {"principals": [principal]}});
        let docs = with(json!({"trustDomainAliases": aliases})).add(
            "AuthorizationPolicy",
            "books/a",
            json!({"action": "DENY", "rules": [{"from": [source]}]}),
        );
        let g = docs.generate(&productpage());
        format!("{:?}", g.listeners["virtualInbound"].filter_chains[0].filters)
    };
    let all = |text: &str| {
        ["mesh.local", "old.example", "far.example"]
            .map(|d| text.contains(&format!("spiffe://{d}/ns/films/sa/a")))
    };
    let aliases = json!(["old.example"]);
    assert_eq!(all(&rules("mesh.local/ns/films/sa/a", json!([]))), [true, false, false]);
    assert_eq!(all(&rules("mesh.local/ns/films/sa/a", aliases.clone())), [true, true, false]);
    assert_eq!(all(&rules("old.example/ns/films/sa/a", aliases.clone())), [true, true, false]);
    assert_eq!(all(&rules("far.example/ns/films/sa/a", aliases)), [false, false, true]);
}

#[test]
fn namespaces_that_nobody_looks_at() {
    let deny = json!({"action": "DENY", "rules": [{}]});
    let docs = |selectors: Value| {
        with(json!({"discoverySelectors": selectors}))
            .add("Namespace", "books", json!({}))
            .add("AuthorizationPolicy", "istio-system/all", deny.clone())
            .add(
                "ServiceEntry",
                "films/out",
                json!({"hosts": ["out.example"], "resolution": "DNS",
                "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]}),
            )
    };
    let seen = |selectors: Value| {
        let g = docs(selectors).generate(&productpage());
        let has = |c: &str| g.clusters.contains_key(c);
        let denied = format!("{:?}", g.listeners["virtualInbound"]).contains("ns[istio-system]-policy[all]");
        (has(REVIEWS), has("outbound|80||out.example"), denied)
    };
    let name = |n: &str| json!({"matchLabels": {"kubernetes.io/metadata.name": n}});
    assert_eq!(seen(json!([])), (true, true, true));
    assert_eq!(seen(json!([name("books")])), (true, false, true));
    assert_eq!(seen(json!([name("films")])), (false, true, true));
    // One of several is enough, and the mesh's own namespace is always looked at.
    assert_eq!(seen(json!([name("books"), name("films")])), (true, true, true));
    assert_eq!(seen(json!([{"matchLabels": {"mesh": "yes"}}])), (false, false, true));
}

/// A limit of connections is every listener's of TCP, of the mesh's settings or the proxy's own.
#[test]
fn listeners_have_limits_of_connections() {
    let docs = with(json!({"defaultConfig": {"connectionSettings": {"listenerConnectionLimit": 9}}}));
    let limits = |node: &NodeInfo| {
        let g = docs.generate(node);
        assert!(g.listeners.values().any(|l| l.max_connections.is_some()));
        let all = g.listeners.values().filter(|l| !l.is_udp()).map(|l| l.max_connections);
        all.collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(limits(&productpage()), [Some(9)].into());
    let own = json!({"PROXY_CONFIG": {"connectionSettings": {"listenerConnectionLimit": 7}}});
    let own = node(NodeKind::Sidecar, "10.1.0.1", "productpage-v1", own);
    assert_eq!(limits(&own), [Some(7)].into());
    let none = with(json!({})).generate(&productpage());
    assert!(none.listeners.values().all(|l| l.max_connections.is_none()));
}

/// What is in front of gateways is not in front of sidecars, nor of those that clusters talk through.
#[test]
fn only_gateways_have_proxies_in_front_of_them() {
    let docs = with(json!({"defaultConfig": {"gatewayTopology": {"numTrustedProxies": 2,
        "forwardClientCertDetails": "ALWAYS_FORWARD_ONLY", "proxyProtocol": {}}}}))
    .add(
        "Gateway",
        "books/edge",
        json!({"selector": {"istio": "ingressgateway"}, "servers": [
            {"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}),
    );
    let edge = node(NodeKind::Router, "10.1.0.100", "gw", json!({"LABELS": {"istio": "ingressgateway"}}));
    let l = &docs.generate(&edge).listeners["0.0.0.0_80"];
    assert!(l.proxy_protocol);
    let h = http(&l.filter_chains[0]);
    assert_eq!((h.trusted_hops, h.forward_client_cert), (2, ForwardClientCert::AlwaysForwardOnly));

    // One that says itself what is in front of it, as an object or as text; whole, not added to the mesh's.
    let own = |config: Value| {
        node(
            NodeKind::Router,
            "10.1.0.100",
            "gw",
            json!({"LABELS": {"istio": "ingressgateway"}, "PROXY_CONFIG": config}),
        )
    };
    let says = json!({"concurrency": 2, "gatewayTopology": {"numTrustedProxies": 1}});
    for config in [says.clone(), json!(says.to_string())] {
        let l = &docs.generate(&own(config)).listeners["0.0.0.0_80"];
        let h = http(&l.filter_chains[0]);
        assert_eq!(
            (h.trusted_hops, h.forward_client_cert, l.proxy_protocol),
            (1, ForwardClientCert::SanitizeSet, false)
        );
    }
    let silent = docs.generate(&own(json!({"concurrency": 2})));
    assert_eq!(http(&silent.listeners["0.0.0.0_80"].filter_chains[0]).trusted_hops, 2);
    for bad in [
        json!("{"),
        json!([]),
        json!({"gatewayTopology": {"numTrustedProxies": 101}}),
        json!({"gatewayTopology": {"a": 1}}),
    ] {
        let e = crate::proxy::ProxyNode::new(&own(bad)).unwrap_err().to_string();
        assert!(e.contains("PROXY_CONFIG"), "{e}");
    }

    let g = docs.generate(&productpage());
    assert!(g.listeners.values().all(|l| !l.proxy_protocol));
    let managers = g.listeners.values().flat_map(|l| &l.filter_chains).flat_map(|c| &c.filters);
    for f in managers {
        if let NetworkFilter::Http(h) = f {
            assert_eq!(h.trusted_hops, 0);
            assert_ne!(h.forward_client_cert, ForwardClientCert::AlwaysForwardOnly);
        }
    }
    let between = node(
        NodeKind::Router,
        "10.1.0.100",
        "gw",
        json!({"LABELS": {"istio": "ingressgateway"}, "ROUTER_MODE": "sni-dnat"}),
    );
    assert!(docs.generate(&between).listeners.values().all(|l| !l.proxy_protocol));
}

/// HTTP/2 by the mesh's default is for services of the mesh, and gives way to a rule.
#[test]
fn upgrades_to_http2() {
    let external = json!({"hosts": ["out.example"], "location": "MESH_EXTERNAL", "resolution": "DNS",
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]});
    let docs = with(json!({"h2UpgradePolicy": "UPGRADE"})).add("ServiceEntry", "books/out", external);
    let g = docs.generate(&productpage());
    assert_eq!(g.clusters[REVIEWS].http, UpstreamHttp::Http2);
    assert_eq!(g.clusters["outbound|80||out.example"].http, UpstreamHttp::Http1);
    let rule = |v: Value| json!({"host": "reviews", "trafficPolicy": {"connectionPool": {"http": v}}});
    for (v, want) in [
        (json!({"h2UpgradePolicy": "DO_NOT_UPGRADE"}), UpstreamHttp::Http1),
        (json!({"useClientProtocol": true}), UpstreamHttp::Downstream),
        (json!({"maxRetries": 5}), UpstreamHttp::Http2),
    ] {
        let docs =
            with(json!({"h2UpgradePolicy": "UPGRADE"})).add("DestinationRule", "books/reviews", rule(v));
        assert_eq!(docs.generate(&productpage()).clusters[REVIEWS].http, want);
    }
}

/// Istio's settings, taken over as they are, say `cluster.local`: identities stay what the certificates have.
#[test]
fn a_mesh_that_runs_keeps_its_trust_domain() {
    let (galley, federation) = with(json!({"trustDomain": "cluster.local", "connectTimeout": "3s"})).states();
    let mut config = Reader::default().read(&galley, &federation);
    config.keep_trust_domain(&settings().trust_domain);
    assert!(
        config
            .problems
            .iter()
            .any(|p| p.message.contains("cluster.local") && p.message.contains("mesh.local"))
    );
    let w = World::new(settings(), config);
    let g = generate(&ProxyNode::new(&productpage()).unwrap(), &w);
    let own = g.clusters[REVIEWS].tls_matches.iter().find(|m| m.name == "tlsMode-istio").unwrap();
    let sans = &own.tls.as_ref().unwrap().validation.sans;
    assert_eq!(sans[0], StringMatch::exact("spiffe://mesh.local/ns/books/sa/reviews"));
    // The rest of the settings holds.
    assert_eq!(g.clusters[REVIEWS].connect_timeout, std::time::Duration::from_secs(3));

    let (galley, federation) = with(json!({"trustDomain": "mesh.local"})).states();
    let mut config = Reader::default().read(&galley, &federation);
    config.keep_trust_domain(&settings().trust_domain);
    assert!(config.problems.is_empty());
}

/// A rule replaces a block as a whole, and inherits the other.
#[test]
fn limits_and_passive_health_of_those_who_say_nothing() {
    let defaults = json!({"defaultTrafficPolicy": {
        "connectionPool": {"tcp": {"maxConnections": 7, "idleTimeout": "9s"}, "http": {"maxRetries": 8}},
        "outlierDetection": {"consecutive5xxErrors": 3, "minHealthPercent": 40}}});
    let g = with(defaults.clone()).generate(&productpage());
    let seen = |g: &Generated, name: &str| {
        let c = &g.clusters[name];
        let errors = c.outlier.as_ref().map(|o| o.consecutive_5xx);
        (c.limits.max_connections, c.limits.max_retries, errors)
    };
    let none = CircuitBreakers::default();
    assert_eq!(seen(&g, REVIEWS), (7, 8, Some(3)));
    assert_eq!(g.clusters[REVIEWS].panic_threshold, 40);
    assert_eq!(seen(&g, "outbound|9080|v1|reviews.books.svc.cluster.local"), (7, 8, Some(3)));
    // All that nobody declared shares its limit, and there is nothing to eject.
    assert_eq!(seen(&g, "PassthroughCluster"), (7, 8, None));
    assert_eq!(g.clusters["PassthroughCluster"].http, UpstreamHttp::Downstream);
    assert_eq!(seen(&g, "inbound|9080||"), (7, 8, None), "what callers may send has to be taken");
    assert_eq!(seen(&g, "InboundPassthroughCluster"), (none.max_connections, none.max_retries, None));

    let rule = |v: Value| json!({"host": "reviews", "trafficPolicy": v});
    for (v, want) in [
        (json!({"connectionPool": {"tcp": {"maxConnections": 5}}}), (5, none.max_retries, Some(3))),
        (json!({"outlierDetection": {"consecutive5xxErrors": 6}}), (7, 8, Some(6))),
        (
            json!({"portLevelSettings": [{"port": {"number": 9080}, "loadBalancer": {"simple": "RANDOM"}}]}),
            (7, 8, Some(3)),
        ),
    ] {
        let g =
            with(defaults.clone()).add("DestinationRule", "books/reviews", rule(v)).generate(&productpage());
        assert_eq!(seen(&g, REVIEWS), want);
    }

    // Connections of bytes have their times.
    let db = with(defaults.clone()).add("Service", "books/db", service(3306, "mysql", "db"));
    let g = db.generate(&productpage());
    let Some(NetworkFilter::Tcp(t)) = g.listeners["10.96.0.2_3306"].filter_chains[0].filters.last() else {
        panic!()
    };
    assert_eq!(t.idle_timeout, Some(std::time::Duration::from_secs(9)));
}

/// As in Istio: it is a rule's own outlier detection that brings failover.
#[test]
fn passive_health_of_the_mesh_prefers_no_locality() {
    let zones = |docs: Docs| {
        let docs = docs.add("WorkloadEntry", "books/reviews-far", {
            let mut w = workload("10.1.0.6", "reviews", "v1");
            w["locality"] = json!("r9/z1");
            w
        });
        let mut node = productpage();
        node.locality = Locality { region: "r1".into(), ..Locality::default() };
        let g = docs.generate(&node);
        let all = g.endpoints[REVIEWS].localities.iter().map(|l| l.priority);
        all.collect::<std::collections::BTreeSet<_>>().len()
    };
    let detection = json!({"consecutive5xxErrors": 3});
    let mesh = with(json!({"defaultTrafficPolicy": {"outlierDetection": detection}}));
    let rule = json!({"host": "reviews", "trafficPolicy": {"outlierDetection": detection}});
    assert_eq!(zones(bookstore()), zones(mesh));
    assert!(zones(bookstore().add("DestinationRule", "books/reviews", rule)) > zones(bookstore()));
}

#[test]
fn zones_are_preferred_unless_a_rule_says_otherwise() {
    let zones = |v: Value| {
        let rule = json!({"host": "reviews", "trafficPolicy": {"loadBalancer": v}});
        let docs = with(json!({"zoneAwareLbSetting": {}})).add("DestinationRule", "books/reviews", rule);
        docs.generate(&productpage()).clusters[REVIEWS].locality_weighted
    };
    assert!(
        with(json!({"zoneAwareLbSetting": {}})).generate(&productpage()).clusters[REVIEWS].locality_weighted
    );
    assert!(zones(json!({"simple": "RANDOM"})));
    assert!(!zones(json!({"zoneAwareLbSetting": {"enabled": false}})));
    assert!(!zones(json!({"localityLbSetting": {"enabled": false}})));
    let off = with(json!({"zoneAwareLbSetting": {"enabled": false}}));
    assert!(!off.generate(&productpage()).clusters[REVIEWS].locality_weighted);
}

fn from_namespace(namespace: &str) -> NodeInfo {
    let mut n = node(NodeKind::Sidecar, "10.1.0.9", "caller", json!({}));
    n.namespace = namespace.to_owned();
    n
}

/// What has no `exportTo`, whoever has it.
#[test]
fn services_are_seen_where_the_mesh_says() {
    let reviews = import("east", "live", json!([{"labels": {}, "locality": "", "healthyWeight": 2}]));
    let docs = |mesh: Value| {
        Docs::default()
            .add("MeshConfig", "mesh", mesh)
            .add("ImportedService", "east/books/reviews", reviews.clone())
            .add("PeerCluster", "east", peer("east", "203.0.113.2"))
            .add("Service", "books/details", service(9080, "http", "details"))
            .add("Service", "books/open", service(9080, "http", "open"))
            .annotate("networking.istio.io/exportTo", "*")
            .add("Service", "books/empty", service(9080, "http", "empty"))
            .annotate("networking.istio.io/exportTo", "")
    };
    let seen = |mesh: Value, namespace: &str| {
        let g = docs(mesh).generate(&from_namespace(namespace));
        let has = |n: &str| g.clusters.contains_key(&format!("outbound|9080||{n}.books.svc.cluster.local"));
        ["reviews", "details", "open", "empty"].map(has)
    };
    let own = || json!({"defaultServiceExportTo": ["."]});
    assert_eq!(seen(own(), "books"), [true; 4]);
    assert_eq!(seen(own(), "films"), [false, false, true, false]);
    assert_eq!(seen(json!({"defaultServiceExportTo": ["films"]}), "films"), [true; 4]);
    assert_eq!(seen(json!({}), "films"), [true; 4]);
}

#[test]
fn service_entries_are_seen_within_bounds() {
    let entry = |host: &str, export_to: Value| {
        json!({"hosts": [host], "resolution": "DNS", "exportTo": export_to,
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]})
    };
    let docs = |visibility: Value, team: &str| {
        with(json!({"serviceEntryVisibility": visibility}))
            .add("Namespace", "books", json!({}))
            .label("team", team)
            .add("ServiceEntry", "books/all", entry("all.example", json!([])))
            .add("ServiceEntry", "books/films", entry("films.example", json!(["films"])))
            .add("ServiceEntry", "books/own", entry("own.example", json!(["."])))
    };
    let seen = |visibility: &Value, namespace: &str| {
        let g = docs(visibility.clone(), "a").generate(&from_namespace(namespace));
        assert!(g.clusters.contains_key(REVIEWS), "it is about ServiceEntries");
        ["all", "films", "own"].map(|h| g.clusters.contains_key(&format!("outbound|80||{h}.example")))
    };
    let by_team = |operator: &str, visibility: &str| {
        let selector = json!({"matchExpressions": [{"key": "team", "operator": operator, "values": ["a"]}]});
        json!({"applyToSidecars": true, "policies": [
            {"visibility": visibility, "matchingRules": [{"namespaceSelector": selector}]},
            {"visibility": "NAMESPACE"}]})
    };
    // Of the mesh's bounds and `exportTo` the narrower holds.
    let (unbounded, within, nobody) = (
        ([true, false, true], [true, true, false]),
        ([true, false, true], [false; 3]),
        ([false; 3], [false; 3]),
    );
    for (visibility, want) in [
        (json!({"defaultVisibility": "NONE"}), unbounded),
        (json!({"applyToSidecars": true}), unbounded),
        (json!({"applyToSidecars": true, "defaultVisibility": "NAMESPACE"}), within),
        (json!({"applyToSidecars": true, "defaultVisibility": "NONE"}), nobody),
        (by_team("In", "PUBLIC"), unbounded),
        (by_team("In", "NONE"), nobody),
        (by_team("NotIn", "NONE"), within),
        // A rule that nobody can judge matches nothing.
        (
            json!({"applyToSidecars": true, "policies": [{"visibility": "NONE", "matchingRules": [{}]}]}),
            unbounded,
        ),
    ] {
        assert_eq!((seen(&visibility, "books"), seen(&visibility, "films")), want, "{visibility}");
    }
    // Nothing is kept of what was made for a namespace with other labels.
    let before = docs(by_team("In", "NONE"), "a").world();
    let kept = |team: &str| {
        let now = docs(by_team("In", "NONE"), team).world();
        let now = before.next(settings(), now.config, std::collections::BTreeSet::new());
        now.lineage().environment == before.lineage().environment
    };
    assert!(kept("a") && !kept("b"));
}

#[test]
fn a_log_without_what_is_not_there() {
    let docs = with(json!({"defaultProviders": {"accessLogging": ["a"]}, "extensionProviders": [
        {"name": "a", "envoyFileAccessLog": {"path": "/a", "omitEmptyValues": true}}]}));
    let g = docs.generate(&productpage());
    let want = AccessLog::File(FileLog {
        path: "/a".to_owned(),
        format: AccessLogFormat::Text(String::new()),
        omit_empty: true,
    });
    assert_eq!(g.listeners["virtualInbound"].access_log, [want]);
}
