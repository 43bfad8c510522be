//! What a proxy's process is told of itself.

use std::time::Duration;

use mesh_xds::process::{self, ProcessSettings};

use super::*;

fn node(id: &str, metadata: Value) -> NodeInfo {
    let Value::Object(mut metadata) = metadata else { panic!("an object") };
    metadata.insert("NAMESPACE".into(), json!("books"));
    let ip = "10.0.1.9".parse().unwrap();
    let domain = "books.svc.cluster.local";
    let mut n = NodeInfo::proxy(NodeKind::Sidecar, ip, id, "books", domain, metadata, Locality::default());
    n.user_agent = "envoy".into();
    n
}

fn told(source: &PilotSource, node: &NodeInfo) -> ProcessSettings {
    let snapshot = source.snapshot(node, PROXY_CONFIG);
    let all: Vec<_> = snapshot.resources().cloned().collect();
    assert_eq!(all.len(), 1, "one, be it empty");
    assert_eq!(all[0].name, process::NAME);
    process::decode(all[0].resource.as_ref().unwrap()).unwrap()
}

fn source(docs: &Docs, nodes: &[&NodeInfo]) -> PilotSource {
    let source = PilotSource::new();
    source.update(Arc::new(docs.world()));
    nodes.iter().for_each(|n| source.connected(n));
    source
}

fn defaults(d: Value) -> Docs {
    Docs::default().add("MeshConfig", "mesh", json!({"defaultConfig": d}))
}

#[test]
fn all_that_the_mesh_says_is_told() {
    let ours = node("ours", json!({"GENERATOR": "flotilla"}));
    let all = json!({"concurrency": 0, "drainDuration": "45s", "parentShutdownDuration": "60s",
        "terminationDrainDuration": "7s", "statusPort": 15020, "proxyAdminPort": 15099,
        "connectionSettings": {"globalDownstreamConnectionLimit": 9}});
    let seconds = |n| Some(Duration::from_secs(n));
    let wanted = ProcessSettings {
        concurrency: Some(0),
        drain: seconds(45),
        parent_shutdown: seconds(60),
        termination_drain: seconds(7),
        admin_port: Some(15099),
        status_port: Some(15020),
        max_connections: Some(9),
    };
    assert_eq!(told(&source(&defaults(all), &[&ours]), &ours), wanted);
    assert_eq!(told(&source(&Docs::default(), &[&ours]), &ours), ProcessSettings::default());
}

#[test]
fn the_nearest_who_says_something_counts() {
    let plain = node("plain", json!({"GENERATOR": "flotilla", "LABELS": {"app": "b"}}));
    let chosen = node("chosen", json!({"GENERATOR": "flotilla", "LABELS": {"app": "a"}}));
    let own = node(
        "own",
        json!({"GENERATOR": "flotilla", "LABELS": {"app": "a"}, "PROXY_CONFIG": {"concurrency": 5}}),
    );
    let nodes = [&plain, &chosen, &own];
    let seen = |docs: &Docs| {
        let s = source(docs, &nodes);
        nodes.map(|n| told(&s, n).concurrency)
    };
    let docs = defaults(json!({"concurrency": 1, "statusPort": 15020}));
    assert_eq!(seen(&docs), [Some(1), Some(1), Some(5)]);
    let docs = docs.add("ProxyConfig", "istio-system/p", json!({"concurrency": 2}));
    assert_eq!(seen(&docs), [Some(2), Some(2), Some(5)]);
    let docs = docs.add("ProxyConfig", "books/p", json!({"concurrency": 3}));
    assert_eq!(seen(&docs), [Some(3), Some(3), Some(5)]);
    let selecting = json!({"selector": {"matchLabels": {"app": "a"}}, "concurrency": 4});
    let docs = docs.add("ProxyConfig", "books/q", selecting);
    assert_eq!(seen(&docs), [Some(3), Some(4), Some(5)]);
    // What a nearer one is silent about is as before.
    let docs = docs.add("ProxyConfig", "films/p", json!({"concurrency": 9}));
    let s = source(&docs, &nodes);
    assert_eq!(nodes.map(|n| told(&s, n).status_port), [Some(15020); 3]);
}

#[test]
fn a_change_of_it_changes_nothing_else() {
    let ours = node("ours", json!({"GENERATOR": "flotilla", "FLOTILLA_VHDS": true}));
    let docs = |n: u32| {
        Docs::default()
            .add(
                "Service",
                "books/a",
                json!({"clusterIP": "10.9.0.1", "ports": [{"name": "http", "port": 80}]}),
            )
            .add("ProxyConfig", "books/p", json!({"concurrency": n}))
    };
    let source = source(&docs(1), &[&ours]);
    let version = |t| {
        let snapshot = source.snapshot(&ours, t);
        snapshot.resources().map(|r| (r.name.clone(), r.version.clone())).collect::<Vec<_>>()
    };
    let all = || [CDS, LDS, RDS].map(version);
    let (before, settings) = (all(), version(PROXY_CONFIG));
    source.update(Arc::new(docs(2).world()));
    assert_eq!(all(), before);
    assert_ne!(version(PROXY_CONFIG), settings);
    let settings = version(PROXY_CONFIG);
    source.update(Arc::new(docs(2).world()));
    assert_eq!(version(PROXY_CONFIG), settings);
}

/// An Envoy never asks, and operators hear what it goes without.
#[test]
fn envoys_are_told_apart() {
    let problems = |mesh: Value, node: &NodeInfo| {
        let s = source(&defaults(mesh), &[node]);
        s.process_problems([node].into_iter()).into_iter().map(|p| p.message).collect::<String>()
    };
    let limit = || json!({"concurrency": 2, "connectionSettings": {"globalDownstreamConnectionLimit": 9}});
    let (ours, library) =
        (node("a", json!({"GENERATOR": "flotilla"})), node("b", json!({"GENERATOR": "grpc"})));
    let envoy = node("c", json!({}));
    let found = problems(limit(), &envoy);
    assert!(found.contains("concurrency, connectionSettings.globalDownstreamConnectionLimit"), "{found}");
    assert_eq!(problems(limit(), &ours) + &problems(limit(), &library), "");
    assert_eq!(problems(json!({}), &envoy), "");
    // What it says itself it was started with.
    assert_eq!(problems(json!({"concurrency": 3}), &node("d", json!({"PROXY_CONFIG": limit()}))), "");
}
