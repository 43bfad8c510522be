//! EnvoyFilter: which proxies are patched, and what they are then given.

use mesh_xds::type_url::{CDS, ECDS, LDS, RDS};

use super::*;
use crate::envoy_filter::Selected;

fn patch(to: &str, matches: Value, operation: &str, value: Value) -> Value {
    json!({"applyTo": to, "match": matches, "patch": {"operation": operation, "value": value}})
}

fn filter(patches: Vec<Value>) -> Value {
    json!({"configPatches": patches})
}

fn timeout(seconds: u32) -> Value {
    patch("CLUSTER", json!({}), "MERGE", json!({"connect_timeout": format!("{seconds}s")}))
}

fn lua(matches: Value) -> Value {
    let lua = json!({"name": "lua", "typed_config":
        {"@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"}});
    patch("HTTP_FILTER", matches, "ADD", lua)
}

fn envoy() -> NodeInfo {
    let mut n = productpage();
    n.user_agent = "envoy".into();
    n.metadata.remove("GENERATOR");
    n.metadata.insert("ISTIO_VERSION".into(), json!("1.27.3"));
    n
}

const REVIEWS: &str = "outbound|9080||reviews.books.svc.cluster.local";

fn seconds(docs: &Docs, node: &NodeInfo) -> u64 {
    docs.generate(node).clusters[REVIEWS].connect_timeout.as_secs()
}

/// Selectors, references, matches of proxies: one row a case.
#[test]
fn who_is_patched() {
    let proxy = |m: Value| {
        let mut p = timeout(3);
        p["match"] = json!({"proxy": m});
        filter(vec![p])
    };
    let with = |key: &str, v: Value| {
        let mut f = filter(vec![timeout(3)]);
        f[key] = v;
        f
    };
    let rows = [
        ("books/f", filter(vec![timeout(3)]), true),
        ("istio-system/f", filter(vec![timeout(3)]), true),
        ("films/f", filter(vec![timeout(3)]), false),
        ("books/f", with("workloadSelector", json!({"labels": {"app": "productpage"}})), true),
        ("books/f", with("workloadSelector", json!({"labels": {"app": "reviews"}})), false),
        ("istio-system/f", with("workloadSelector", json!({"labels": {"app": "reviews"}})), false),
        ("books/f", with("targetRefs", json!([{"kind": "Gateway", "name": "gw"}])), true),
        ("books/f", with("targetRefs", json!([{"kind": "Gateway", "name": "other"}])), false),
        ("books/f", with("targetRefs", json!([{"kind": "Service", "name": "gw"}])), false),
        ("istio-system/f", with("targetRefs", json!([{"kind": "Gateway", "name": "gw"}])), false),
        ("books/f", proxy(json!({"proxyVersion": "^1\\.27"})), true),
        ("books/f", proxy(json!({"proxyVersion": "^1\\.26"})), false),
        ("books/f", proxy(json!({"metadata": {"TEAM": "red"}})), true),
        ("books/f", proxy(json!({"metadata": {"TEAM": "blue"}})), false),
        ("books/f", proxy(json!({"metadata": {"TEAM": "red", "OTHER": "x"}})), false),
    ];
    for (name, spec, hit) in rows {
        let mut node = productpage();
        node.metadata.insert("ISTIO_VERSION".into(), json!("1.27.3"));
        node.metadata.insert("TEAM".into(), json!("red"));
        let labels = json!({"app": "productpage", "gateway.networking.k8s.io/gateway-name": "gw"});
        node.metadata.insert("LABELS".into(), labels);
        let docs = bookstore().add("EnvoyFilter", name, spec.clone());
        assert_eq!(seconds(&docs, &node), if hit { 3 } else { 10 }, "{name} {spec}");
        // A class apart from those that are not patched, and the same one for its like.
        let w = docs.world();
        let class = |n: &NodeInfo| {
            let p = w.patched(&ProxyNode::new(n).unwrap());
            p.class(w.telling_labels())
        };
        let plain = ProxyNode::new(&node).unwrap().class(w.telling_labels());
        assert_eq!(class(&node) != plain, hit, "{name} {spec}");
        let mut like = node.clone();
        like.ip = Some("10.1.0.77".parse().unwrap());
        assert_eq!(class(&like), class(&node));
    }
    // Without a version a proxy is none of a version.
    let docs = bookstore().add("EnvoyFilter", "books/f", proxy(json!({"proxyVersion": ".*"})));
    assert_eq!(seconds(&docs, &productpage()), 10);
}

#[test]
fn order_of_documents() {
    let at = |priority: i32, n: u32| json!({"priority": priority, "configPatches": [timeout(n)]});
    let two = |a: (&str, Value), b: (&str, Value)| {
        let docs = bookstore().add("EnvoyFilter", a.0, a.1).add("EnvoyFilter", b.0, b.1);
        seconds(&docs, &productpage())
    };
    // The last one counts: the own namespace's, the higher priority, the younger.
    assert_eq!(two(("books/a", at(0, 1)), ("istio-system/b", at(9, 2))), 1);
    assert_eq!(two(("books/a", at(5, 1)), ("books/b", at(-5, 2))), 1);
    assert_eq!(two(("books/b", at(0, 1)), ("books/a", at(0, 2))), 2);
}

/// Envoy is given messages; what our own proxy cannot do is left out for it alone and named.
#[test]
fn envoy_and_our_own_proxies() {
    let host = json!({"name": "h", "domains": ["added.example"], "routes": [
        {"match": {"prefix": "/"}, "direct_response": {"status": 418}}]});
    let docs = bookstore().add(
        "EnvoyFilter",
        "books/f",
        filter(vec![
            lua(json!({"context": "SIDECAR_OUTBOUND"})),
            timeout(3),
            patch(
                "CLUSTER",
                json!({"cluster": {"service": "reviews.books.svc.cluster.local"}}),
                "MERGE",
                json!({"alt_stat_name": "other", "respect_dns_ttl": true}),
            ),
            patch("VIRTUAL_HOST", json!({"routeConfiguration": {"name": "9080"}}), "ADD", host),
            patch("CLUSTER", json!({}), "ADD", json!({"name": "mine", "type": "STATIC"})),
            patch("CLUSTER", json!({}), "ADD", json!({"name": REVIEWS, "type": "STATIC"})),
            patch(
                "EXTENSION_CONFIG",
                json!({}),
                "ADD",
                json!({"name": "e", "typed_config":
                {"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"}}),
            ),
        ]),
    );
    let refused = |g: &Generated| -> Vec<usize> { g.refused.keys().map(|(_, i)| *i).collect() };
    let g = generate(&ProxyNode::new(&envoy()).unwrap(), &docs.world());
    let has = |t: &'static str, name: &str| g.wire.contains_key(&(t, name.to_owned()));
    assert!(
        has(CDS, REVIEWS)
            && has(CDS, "mine")
            && has(RDS, "9080")
            && has(LDS, "0.0.0.0_9080")
            && has(ECDS, "e")
    );
    assert!(!has(LDS, "virtualInbound"));
    assert_eq!(refused(&g), [5]);
    let mut shown = g.clone();
    assert!(shown.show_patched().contains(&format!("CDS {REVIEWS}")));
    assert_eq!(shown.clusters[REVIEWS].connect_timeout.as_secs(), 3);

    let g = docs.generate(&productpage());
    assert!(g.wire.is_empty());
    assert_eq!(g.clusters[REVIEWS].connect_timeout.as_secs(), 3);
    assert!(g.clusters.contains_key("mine"));
    assert!(g.routes["9080"].virtual_hosts.iter().any(|h| h.name == "h"));
    assert_eq!(refused(&g), [0, 2, 5]);
    let why: Vec<&String> = g.refused.values().collect();
    assert!(why[0].contains("lua") && why[1].contains("respect_dns_ttl"), "{why:?}");
    let problem = crate::envoy_filter::problems(&g.refused).next().unwrap();
    assert_eq!(problem.object, "EnvoyFilter books/f");
    assert!(problem.message.starts_with("configPatches[0]: "), "{}", problem.message);
}

/// Virtual hosts that our sidecars get apart are patched where they are, and keep their domains to themselves.
#[test]
fn hosts_apart() {
    let node = productpage().taking_hosts();
    let header = json!({"request_headers_to_add": [{"header": {"key": "x-a", "value": "1"}}]});
    let taken = json!({"name": "h", "domains": ["REVIEWS"], "routes": [
        {"match": {"prefix": "/"}, "direct_response": {"status": 418}}]});
    let of = |v: &str| json!({"routeConfiguration": {"vhost": {"name": v}}});
    let docs = bookstore().add(
        "EnvoyFilter",
        "books/f",
        filter(vec![
            patch("VIRTUAL_HOST", of("reviews.books.svc.cluster.local:9080"), "MERGE", header.clone()),
            patch("HTTP_ROUTE", of("productpage.books.svc.cluster.local:9080"), "MERGE", header),
            patch("VIRTUAL_HOST", json!({"routeConfiguration": {"name": "9080"}}), "ADD", taken),
        ]),
    );
    let g = docs.generate(&node);
    let host = |h: &str| &g.hosts[&format!("9080/{h}.books.svc.cluster.local:9080")];
    let added = vec![("x-a".to_owned(), "1".to_owned())];
    assert_eq!(host("reviews").request_headers.add, added);
    assert!(host("reviews").routes.iter().all(|r| r.request_headers.add.is_empty()));
    assert!(host("productpage").routes.iter().all(|r| r.request_headers.add == added));
    let (key, why) = g.refused.iter().next().unwrap();
    assert!(
        key.1 == 2 && why.contains("\"REVIEWS\" is one of \"reviews.books.svc.cluster.local:9080\""),
        "{why}"
    );
}

#[test]
fn what_is_for_nobody_is_a_problem() {
    let bad = patch("CLUSTER", json!({}), "MERGE", json!({"conect_timeout": "3s"}));
    let docs = bookstore().add("EnvoyFilter", "books/f", filter(vec![bad, timeout(4)]));
    let (galley, federation) = docs.states();
    let config = Reader::default().read(&galley, &federation);
    let [p] = &config.problems[..] else { panic!("{:?}", config.problems) };
    assert_eq!(p.object, "EnvoyFilter books/f");
    assert!(
        p.message.starts_with("configPatches[0].patch.value: ") && p.message.contains("conect_timeout"),
        "{}",
        p.message
    );
    let w = World::new(settings(), config);
    let g = generate(&ProxyNode::new(&productpage()).unwrap(), &w);
    assert_eq!(g.clusters[REVIEWS].connect_timeout.as_secs(), 4);
}

/// A document that was not changed is the same reading, and its proxies are of the class they were of.
#[test]
fn an_unchanged_document_changes_no_class() {
    let docs = bookstore().add("EnvoyFilter", "books/f", filter(vec![timeout(3)]));
    let (galley, federation) = docs.states();
    let mut reader = Reader::default();
    let of = |c: &crate::config::Config| Selected::of(c, &ProxyNode::new(&productpage()).unwrap());
    let (first, second) = (reader.read(&galley, &federation), reader.read(&galley, &federation));
    assert_eq!(of(&first), of(&second));
    assert!(!of(&first).is_empty());
    let other = Reader::default().read(&galley, &federation);
    assert_ne!(of(&first), of(&other));
}
