//! What gRPC libraries without a proxy get.

use serde_json::json;

use super::*;

const HOST: &str = "greeter.books.svc.cluster.local";

fn library(labels: Value) -> NodeInfo {
    let mut n = node(
        NodeKind::Sidecar,
        "10.1.0.7",
        "greeter-v1",
        json!({"GENERATOR": "grpc", "LABELS": labels, "SERVICE_ACCOUNT": "greeter"}),
    );
    n.user_agent = "gRPC C-core linux".into();
    n
}

fn greeter() -> Docs {
    Docs::default()
        .add("Service", "books/greeter", service(7070, "grpc", "greeter"))
        .add("WorkloadEntry", "books/greeter-v1", workload("10.1.0.7", "greeter", "v1"))
        .add("WorkloadEntry", "books/greeter-v2", workload("10.1.0.8", "greeter", "v2"))
}

fn made(docs: &Docs, labels: Value) -> Generated {
    generate(&ProxyNode::new(&library(labels)).unwrap(), &docs.world())
}

fn problems(docs: &Docs) -> Vec<String> {
    let proxy = ProxyNode::new(&library(json!({"app": "greeter"}))).unwrap();
    grpc_problems(&proxy, &docs.world()).into_iter().map(|p| format!("{}: {}", p.object, p.message)).collect()
}

fn name(subset: &str) -> String {
    format!("outbound|7070|{subset}|{HOST}")
}

#[test]
fn a_client_asks_for_its_target() {
    let docs = greeter().add("Service", "books/ledger", service(9000, "tcp", "ledger"));
    let g = made(&docs, json!({}));
    let clients: Vec<&String> =
        g.listeners.values().filter(|l| l.direction == Direction::Outbound).map(|l| &l.name).collect();
    let vip = &docs.world().index.services[HOST].service.addresses[0];
    assert_eq!(
        clients,
        [
            &format!("{vip}:7070"),
            "greeter.books.svc.cluster.local:7070",
            "greeter.books.svc:7070",
            "greeter.books:7070",
            "greeter:7070"
        ]
    );
    for l in clients {
        let manager = http(&g.listeners[l].filter_chains[0]);
        assert_eq!(manager.filters, [HttpFilter::Fault], "others are refused");
        assert_eq!(manager.routes, RouteSource::Rds(format!("{HOST}:7070")));
    }
    let route = &g.routes[&format!("{HOST}:7070")].virtual_hosts[0].routes[0];
    assert_eq!(forward(route).clusters, [WeightedCluster::only(name(""))]);
    let retry = forward(route).retry.as_ref().unwrap();
    assert_eq!(retry.on, [RetryOn::Unavailable, RetryOn::Cancelled]);
    // Nothing of a sidecar, and nothing that is no call.
    assert_eq!(g.clusters.keys().collect::<Vec<_>>(), [&name("")]);
    let c = &g.clusters[&name("")];
    assert!(c.tls.is_none() && c.tls_matches.is_empty() && c.outlier.is_none());
    assert_eq!(c.lb, LbPolicy::RoundRobin);
    let l = &g.endpoints[&name("")].localities;
    assert_eq!((l.len(), l[0].weight, l[0].endpoints.len()), (1, 2, 2), "one without weight is skipped");
    assert!(problems(&docs).is_empty(), "{:?}", problems(&docs));
}

#[test]
fn a_document_s_host_needs_no_service() {
    let to = |subset: &str| json!([{"destination": {"host": "greeter", "subset": subset, "port": {"number": 7070}}}]);
    let vs = |hosts: Value, subset: &str| json!({"hosts": hosts, "http": [{"route": to(subset)}]});
    let docs = greeter()
        .add(
            "VirtualService",
            "books/all",
            vs(json!(["hello.example", "*.wide.example", "greeter.books", "10.1.1.1"]), "v1"),
        )
        .add("VirtualService", "books/later", vs(json!(["hello.example"]), "v2"));
    let g = made(&docs, json!({}));
    let of_docs: Vec<&String> = g.listeners.keys().filter(|n| n.ends_with(":80")).collect();
    assert_eq!(of_docs, ["greeter.books:80", "hello.example:80"]);
    let manager = http(&g.listeners["hello.example:80"].filter_chains[0]);
    assert_eq!(manager.routes, RouteSource::Rds("hello.example:80".to_owned()));
    let route = &g.routes["hello.example:80"].virtual_hosts[0].routes[0];
    assert_eq!(forward(route).clusters, [WeightedCluster::only(name("v1"))], "the oldest document has it");
    assert_eq!(
        problems(&docs),
        ["VirtualService books/all: not for gRPC without a proxy: hosts with a wildcard that no service has"]
    );
    let hidden = docs.add(
        "VirtualService",
        "films/other",
        json!({"hosts": ["other.example"], "exportTo": ["."], "http": [{"route": to("v1")}]}),
    );
    assert!(!made(&hidden, json!({})).listeners.contains_key("other.example:80"));
}

/// The client takes an inverted condition on a missing header for none that holds.
#[test]
fn routes_without_headers_are_for_calls_that_have_none() {
    let without = |n: usize| {
        let all: serde_json::Map<String, Value> = (0..n)
            .map(|n| (format!("x-{n}"), json!({"exact": "1"})))
            .chain([("x-any".into(), json!({}))])
            .collect();
        let to = json!([{"destination": {"host": "greeter"}}]);
        let rule = json!({"match": [{"withoutHeaders": all}], "route": to});
        greeter().add("VirtualService", "books/greeter", json!({"hosts": ["greeter"], "http": [rule]}))
    };
    let docs = without(2);
    let routes = &made(&docs, json!({})).routes[&format!("{HOST}:7070")].virtual_hosts[0].routes;
    let conditions = |r: &Route| -> Vec<(String, bool, bool)> {
        let of = |h: &HeaderMatch| (h.name.clone(), matches!(h.value, HeaderValueMatch::Value(_)), h.invert);
        r.matches.headers.iter().map(of).collect()
    };
    let all: Vec<_> = routes.iter().map(conditions).collect();
    assert_eq!(all.len(), 4, "{all:?}");
    for (a, b) in [(false, false), (false, true), (true, false), (true, true)] {
        let wanted =
            [("x-0", a, a), ("x-1", b, b), ("x-any", false, true)].map(|(n, v, i)| (n.to_owned(), v, i));
        assert!(all.contains(&wanted.to_vec()), "{all:?}");
    }
    let docs = without(5);
    let routes = &made(&docs, json!({})).routes[&format!("{HOST}:7070")].virtual_hosts[0].routes;
    assert!(routes.is_empty(), "{routes:?}");
    let [told] = &problems(&docs)[..] else { panic!("{:?}", problems(&docs)) };
    assert!(told.contains("more than four headers"), "{told}");
}

#[test]
fn routes_are_what_a_call_can_match() {
    let to = json!([{"destination": {"host": "greeter"}}]);
    let on = |matches: Value| json!({"match": [matches], "route": to});
    let docs = greeter().add(
        "VirtualService",
        "books/greeter",
        json!({"hosts": ["greeter"], "http": [
            on(json!({"method": {"exact": "GET"}})),
            on(json!({"method": {"regex": "P.*T"}, "headers": {"x-a": {"exact": "1"}}})),
            on(json!({"queryParams": {"q": {"exact": "1"}}})),
            on(json!({"scheme": {"exact": "https"}})),
            {"match": [{"uri": {"prefix": "/a.B/"}}], "timeout": "3s", "rewrite": {"uri": "/c.D/"},
             "mirror": {"host": "greeter"}, "headers": {"request": {"set": {"x": "y"}}},
             "corsPolicy": {"allowMethods": ["GET"]},
             "retries": {"attempts": 9, "retryOn": "5xx,internal", "perTryTimeout": "1s"}, "route": to},
            {"match": [{"uri": {"exact": "/a.B/C"}}], "retries": {"attempts": 1, "retryOn": "5xx"}, "route": to},
            {"directResponse": {"status": 200}}]}),
    );
    let g = made(&docs, json!({}));
    let routes = &g.routes[&format!("{HOST}:7070")].virtual_hosts[0].routes;
    assert_eq!(routes.len(), 4, "{routes:#?}");
    assert_eq!(routes[0].matches.headers.iter().map(|h| h.name.as_str()).collect::<Vec<_>>(), ["x-a"]);
    let f = forward(&routes[1]);
    assert_eq!((f.timeout, f.max_stream.unwrap().max), (None, Some(std::time::Duration::from_secs(3))));
    let retry = f.retry.as_ref().unwrap();
    assert_eq!(
        (retry.on.as_slice(), retry.attempts, retry.per_try_timeout),
        (&[RetryOn::Internal][..], 4, None)
    );
    assert!(f.prefix_rewrite.is_none() && f.mirrors.is_empty() && routes[1].cors.is_none());
    assert_eq!(routes[1].request_headers, Default::default());
    assert!(forward(&routes[2]).retry.is_none());
    assert!(matches!(routes[3].action, RouteAction::Direct(_)), "it fails there, and goes nowhere else");
    assert_eq!(
        problems(&docs),
        [
            "VirtualService books/greeter: not for gRPC without a proxy: direct responses: such calls fail; header \
          changes; mirroring; more than four retries; perTryTimeout; retries on anything but statuses of gRPC; \
          rewrites; routes by scheme or authority"
        ]
    );
}

#[test]
fn one_transport_for_all_endpoints() {
    let strict = |mode: &str| json!({"mtls": {"mode": mode}});
    let tls = |docs: &Docs| made(docs, json!({})).clusters[&name("")].tls.clone();
    // A sidecar that takes both would not know a session of gRPC as one of the mesh.
    assert!(tls(&greeter()).is_none());
    let all = greeter().add("PeerAuthentication", "books/default", strict("STRICT"));
    let sans = tls(&all).unwrap().validation.sans;
    assert_eq!(sans, [StringMatch::exact("spiffe://mesh.local/ns/books/sa/greeter")]);
    let part = all.clone().add(
        "WorkloadEntry",
        "books/greeter-v3",
        json!({"address": "10.1.0.9", "labels": {"app": "greeter"}}),
    );
    assert!(tls(&part).is_none());
    assert!(problems(&part)[0].contains("STRICT mTLS of a part"), "{:?}", problems(&part));
    let rule = |mode: &str| {
        greeter().add(
            "DestinationRule",
            "books/greeter",
            json!({"host": "greeter", "trafficPolicy": {"tls": {"mode": mode}}}),
        )
    };
    assert!(tls(&rule("ISTIO_MUTUAL")).is_some());
    // Never in clear instead.
    let simple = rule("SIMPLE");
    assert!(!made(&simple, json!({})).clusters.contains_key(&name("")));
    assert!(problems(&simple)[0].contains("TLS other than ISTIO_MUTUAL"), "{:?}", problems(&simple));
}

#[test]
fn what_is_elsewhere_or_unknown_is_left_out() {
    let policy = json!({"loadBalancer": {"simple": "RANDOM"}, "connectionPool": {"tcp": {"maxConnections": 3},
        "http": {"http2MaxRequests": 7}}, "outlierDetection": {"consecutiveGatewayErrors": 3, "interval": "2s"}});
    let docs = bookstore()
        .add("DestinationRule", "books/reviews2", json!({"host": "reviews", "trafficPolicy": policy}))
        .add(
            "ServiceEntry",
            "books/names",
            json!({"hosts": ["two.example"], "resolution": "DNS",
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
            "endpoints": [{"address": "a.example"}, {"address": "b.example"}]}),
        )
        .add(
            "ServiceEntry",
            "books/name",
            json!({"hosts": ["one.example"], "resolution": "DNS",
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]}),
        );
    let g = made(&docs, json!({}));
    let addresses: Vec<&str> = g.endpoints[REVIEWS]
        .localities
        .iter()
        .flat_map(|l| &l.endpoints)
        .map(|e| e.address.as_str())
        .collect();
    assert_eq!(addresses, ["10.1.0.5"], "gateways are reached by a server name");
    let c = &g.clusters[REVIEWS];
    assert_eq!((c.limits.max_requests, c.limits.max_connections), (7, u32::MAX));
    let outlier = c.outlier.as_ref().unwrap();
    let failure = outlier.failure_percentage.unwrap();
    assert_eq!((failure.threshold, failure.request_volume, failure.minimum_hosts), (99, 3, 1));
    assert_eq!((outlier.consecutive_5xx, outlier.consecutive_gateway), (0, 0));
    assert!(matches!(&g.clusters["outbound|80||one.example"].discovery, Discovery::LogicalDns(_)));
    assert!(!g.clusters.contains_key("outbound|80||two.example"));
    let said = problems(&docs);
    let of = |object: &str| said.iter().find(|p| p.starts_with(object)).cloned().unwrap_or_default();
    let reviews = of("service reviews.books.svc.cluster.local");
    for word in ["endpoints in other clusters", "load balancers other than", "limits other than"] {
        assert!(reviews.contains(word), "{word}: {reviews}");
    }
    assert!(of("service two.example").contains("several names"));
    assert!(of("service one.example").is_empty(), "{said:?}");
}

fn server<'a>(g: &'a Generated, address: &str) -> &'a FilterChain {
    let l = &g.listeners[&format!("xds.istio.io/grpc/lds/inbound/{address}")];
    let other = &g.listeners[&format!("grpc/server?xds.resource.listening_address={address}")];
    assert_eq!((l.address, &l.filter_chains), (other.address, &other.filter_chains));
    assert_eq!(l.address.to_string(), address, "gRPC compares it with its own");
    &l.filter_chains[0]
}

#[test]
fn a_server_asks_by_its_address() {
    let in_mesh = json!({"app": "greeter", "security.istio.io/tlsMode": "istio"});
    let g = made(&greeter(), in_mesh.clone());
    for address in ["10.1.0.7:7070", "0.0.0.0:7070", "[::]:7070"] {
        let tls = server(&g, address).tls.as_ref().expect("sidecars call it so");
        assert!(matches!(tls.client_certificate, ClientCertificate::Required(_)));
    }
    assert!(server(&made(&greeter(), json!({"app": "greeter"})), "0.0.0.0:7070").tls.is_none());
    let off = greeter().add("PeerAuthentication", "books/default", json!({"mtls": {"mode": "DISABLE"}}));
    assert!(server(&made(&off, in_mesh), "0.0.0.0:7070").tls.is_none());
    let on = greeter().add("PeerAuthentication", "books/default", json!({"mtls": {"mode": "STRICT"}}));
    assert!(server(&made(&on, json!({})), "0.0.0.0:7070").tls.is_some());
}

#[test]
fn policies_about_tokens_open_no_door() {
    let docs = greeter()
        .add("RequestAuthentication", "books/jwt", json!({"jwtRules": [{"issuer": "i", "jwks": "{\"keys\":[]}"}]}))
        .add("AuthorizationPolicy", "books/allow", json!({"rules": [
            {"from": [{"source": {"requestPrincipals": ["*"]}}]},
            {"when": [{"key": "request.auth.claims[a]", "values": ["b"]}]},
            {"when": [{"key": "request.headers[grpc-timeout]", "values": ["1S"]}]},
            {"from": [{"source": {"principals": ["mesh.local/ns/books/sa/web"]}}]}]}))
        .add("AuthorizationPolicy", "books/deny", json!({"action": "DENY", "rules": [
            {"from": [{"source": {"notRequestPrincipals": ["*"]}}], "to": [{"operation": {"paths": ["/a.B/C"]}}]}]}));
    let g = made(&docs, json!({"app": "greeter"}));
    let chain = server(&g, "0.0.0.0:7070");
    let rules: Vec<&RbacRules> = http(chain)
        .filters
        .iter()
        .map(|f| match f {
            HttpFilter::Rbac(r) => r.rules.as_ref().unwrap(),
            other => panic!("{other:?} is refused"),
        })
        .collect();
    assert_eq!(rules.iter().map(|r| r.action).collect::<Vec<_>>(), [RbacAction::Deny, RbacAction::Allow]);
    // Whoever it is about, it is denied; whom a token would let in is not let in.
    assert_eq!(rules[0].policies["ns[books]-policy[deny]-rule[0]"].principals, [Principal::Any]);
    assert_eq!(rules[1].policies.keys().collect::<Vec<_>>(), ["ns[books]-policy[allow]-rule[3]"]);
    assert!(problems(&docs).iter().any(|p| p.contains("RequestAuthentication")), "{:?}", problems(&docs));
}

#[test]
fn a_policy_that_asks_somebody_denies() {
    let docs = greeter()
        .add("Service", "books/authz", json!({"selector": {"app": "a"}, "ports": [{"name": "http", "port": 80}]}))
        .add(
            "MeshConfig",
            "mesh",
            json!({"extensionProviders": [{"name": "h", "envoyExtAuthzHttp": {"service": "authz.books.svc.cluster.local", "port": 80}}]}),
        )
        .add("AuthorizationPolicy", "books/ask", json!({"action": "CUSTOM", "provider": {"name": "h"}, "rules": [{}]}));
    let g = made(&docs, json!({"app": "greeter"}));
    let denied = http(server(&g, "10.1.0.7:7070")).filters.iter().any(|f| {
        matches!(f, HttpFilter::Rbac(r) if r.rules.as_ref().is_some_and(|r| {
            r.action == RbacAction::Deny && r.policies.keys().any(|n| n.contains("policy[ask]"))
        }))
    });
    assert!(denied, "{g:?}");
    assert!(problems(&docs).iter().any(|p| p.contains("CUSTOM")), "{:?}", problems(&docs));
}
