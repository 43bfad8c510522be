//! Proxies that ask for hosts and clusters.

use mesh_xds::{node::ON_DEMAND, server::Resolved};

use super::*;

/// Services books/a (with a VIP), films/b, films/secret for films alone, a wildcard, an exact host below it, bytes, and a
/// copy of requests.
fn docs() -> Docs {
    let http = json!([{"name": "http", "port": 80}]);
    let out = |host: &str| json!({"hosts": [host], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "resolution": "NONE"});
    Docs::default()
        .add("Service", "books/a", json!({"clusterIP": "10.9.0.1", "selector": {"app": "a"}, "ports": http}))
        .add("Service", "films/b", json!({"clusterIP": "10.9.0.2", "selector": {"app": "b"}, "ports": http}))
        .add(
            "Service",
            "films/secret",
            json!({"clusterIP": "10.9.0.3", "selector": {"app": "s"}, "ports": http}),
        )
        .annotate("networking.istio.io/exportTo", ".")
        .add(
            "Service",
            "films/bytes",
            json!({"clusterIP": "10.9.0.4", "ports": [{"name": "tcp", "port": 9000}]}),
        )
        .add("Service", "films/copied", json!({"clusterIP": "10.9.0.5", "ports": http}))
        .add("ServiceEntry", "books/wide", out("*.wide.example"))
        .add("ServiceEntry", "books/narrow", out("a.wide.example"))
        .add(
            "VirtualService",
            "books/a",
            json!({"hosts": ["a"], "http": [{"route": [{"destination": {"host": "a"}}],
                "mirror": {"host": "copied.films.svc.cluster.local"}}]}),
        )
}

fn asking(more: Value) -> NodeInfo {
    let Value::Object(mut metadata) = more else { panic!("an object") };
    metadata.insert("NAMESPACE".into(), json!("books"));
    let ip = "10.0.1.9".parse().unwrap();
    let mut n = NodeInfo::proxy(
        NodeKind::Sidecar,
        ip,
        "asking",
        "books",
        "books.svc.cluster.local",
        metadata,
        Locality::default(),
    );
    n.user_agent = "envoy".into();
    n.incremental = true;
    n
}

fn source(docs: &Docs, node: &NodeInfo) -> PilotSource {
    let source = PilotSource::new();
    source.update(Arc::new(docs.world()));
    source.connected(node);
    source
}

fn names(s: &TypeSnapshot) -> Vec<String> {
    s.resources().map(|r| r.name.clone()).collect()
}

fn resolve(source: &PilotSource, node: &NodeInfo, t: &str, name: &str) -> Option<Resolved> {
    source.snapshot(node, t).on_demand().and_then(|o| o.resolve(name))
}

#[test]
fn nothing_comes_unasked_that_can_be_asked_for() {
    let node = asking(json!({"FLOTILLA_ON_DEMAND": "true"}));
    let s = source(&docs(), &node);
    assert!(source_is_whole(&s, &node));
    let listed = names(&s.snapshot(&node, CDS));
    // A copy of requests waits for nobody, and nothing asks for it.
    assert_eq!(
        listed,
        [
            "InboundPassthroughCluster",
            "BlackHoleCluster",
            "PassthroughCluster",
            "outbound|80||copied.films.svc.cluster.local"
        ]
        .map(str::to_owned)
    );
    assert!(names(&s.snapshot(&node, VHDS)).is_empty());
    assert!(resolve(&s, &node, CDS, "outbound|80||a.books.svc.cluster.local").is_some());
    assert!(resolve(&s, &node, CDS, "outbound|80||copied.films.svc.cluster.local").is_none(), "listed");
    // Listeners of bytes stay, and ask for where they lead.
    let listener = |n: &str| {
        let r = s.snapshot(&node, LDS).get(n).cloned().unwrap();
        codec::decode_listener(r.resource.as_ref().unwrap()).unwrap()
    };
    let bytes = format!("{:?}", listener("10.9.0.4_9000"));
    assert!(bytes.contains("on_demand: Some(OnDemandCluster { timeout: 5s })"), "{bytes}");
    let http = format!("{:?}", listener("0.0.0.0_80"));
    assert!(http.contains("filters: [OnDemand(Some("), "it stands first: {http}");
    let routes = s.snapshot(&node, RDS).get("80").cloned().unwrap();
    let routes = codec::decode_route(routes.resource.as_ref().unwrap()).unwrap();
    assert!(routes.virtual_hosts.is_empty() && routes.on_demand.is_some());
    // What operators are shown is all that there is to ask for.
    let shown = s.configuration(&node).unwrap();
    let all: Vec<_> = shown.routes["80"].virtual_hosts.iter().map(|h| h.name.as_str()).collect();
    assert!(shown.hosts.is_empty());
    assert_eq!(
        all,
        [
            "*.wide.example:80",
            "a.books.svc.cluster.local:80",
            "a.wide.example:80",
            "allow_any",
            "b.films.svc.cluster.local:80",
            "copied.films.svc.cluster.local:80"
        ]
    );
    assert!(shown.clusters.contains_key("outbound|80||a.books.svc.cluster.local"));
}

fn source_is_whole(s: &PilotSource, node: &NodeInfo) -> bool {
    s.is_on_demand(node) && s.on_demand_problems([node].into_iter()).is_empty()
}

#[test]
fn hosts_are_found_as_envoy_would_find_them() {
    let node = asking(json!({"FLOTILLA_ON_DEMAND": true}));
    for mode in ["ALLOW_ANY", "REGISTRY_ONLY"] {
        let docs = docs().add("MeshConfig", "mesh", json!({"outboundTrafficPolicy": {"mode": mode}}));
        let s = source(&docs, &node);
        let host = |name: &str| {
            let r = resolve(&s, &node, VHDS, name)?;
            let h = codec::decode_virtual_host(r.resource.resource.as_ref().unwrap()).unwrap();
            assert_eq!(
                h.name,
                r.resource.name.rsplit_once('/').map_or("", |(c, h)| if r.made {
                    &r.resource.name
                } else {
                    let _ = c;
                    h
                })
            );
            let to = format!("{:?}", h.routes[0].action);
            let to =
                ["outbound|80||a.books", "outbound|80||b.films", "*.wide", "||a.wide", "Passthrough", "502"]
                    .into_iter()
                    .find(|t| to.contains(t));
            Some((r.made, h.domains.len(), to.unwrap_or_default()))
        };
        let a = host("80/a").unwrap();
        assert_eq!((a.0, a.2), (false, "outbound|80||a.books"));
        for same in ["80/A", "80/a.books", "80/a:80", "80/10.9.0.1", "80/a.books.svc.cluster.local:80"] {
            assert_eq!(host(same).unwrap(), a, "{same}");
        }
        assert_eq!(host("80/b.films").unwrap().2, "outbound|80||b.films");
        // Of a pattern each host is one of its own, and leaves others to their owners.
        assert_eq!(host("80/x.wide.example"), Some((true, 1, "*.wide")));
        assert_eq!(host("80/a.wide.example").unwrap().2, "||a.wide");
        // What it may not see ends like what nobody has.
        let end = if mode == "ALLOW_ANY" { "Passthrough" } else { "502" };
        for nobody in [
            "80/secret.films",
            "80/10.9.0.3",
            "80/secret.films.svc.cluster.local",
            "80/b",
            "80/nobody",
            "80/wide.example",
        ] {
            assert_eq!(host(nobody), Some((true, 1, end)), "{nobody}");
        }
        assert_eq!(
            resolve(&s, &node, CDS, "outbound|80||secret.films.svc.cluster.local").map(|r| r.made),
            None
        );
        for none in ["80/*", "80/*.wide.example", "80/", "a", "81/a", "x/80/a"] {
            assert!(host(none).is_none(), "{none}");
        }
    }
}

#[test]
fn who_asks_is_said_where_istio_says_it() {
    let on = |v: &str| json!({"environmentVariables": {ON_DEMAND: v}});
    let selecting =
        |v: &str| json!({"selector": {"matchLabels": {"app": "x"}}, "environmentVariables": {ON_DEMAND: v}});
    let mesh = |d: Docs, v: &str| {
        d.add("MeshConfig", "mesh", json!({"defaultConfig": {"proxyMetadata": {ON_DEMAND: v}}}))
    };
    let plain = asking(json!({"LABELS": {"app": "x"}}));
    let is = |d: &Docs, n: &NodeInfo| source(d, n).is_on_demand(n);
    assert!(!is(&docs(), &plain));
    let d = mesh(docs(), "true");
    assert!(is(&d, &plain));
    assert!(!is(&d, &asking(json!({ON_DEMAND: false}))) && !is(&d, &asking(json!({ON_DEMAND: "false"}))));
    let d = d.add("ProxyConfig", "istio-system/p", on("false"));
    assert!(!is(&d, &plain));
    let d = d.add("ProxyConfig", "films/p", on("true"));
    assert!(!is(&d, &plain), "of another namespace");
    let d = d.add("ProxyConfig", "books/p", on("true"));
    assert!(is(&d, &plain));
    let d = d.add("ProxyConfig", "books/q", selecting("false"));
    assert!(!is(&d, &plain) && is(&d, &asking(json!({"LABELS": {"app": "y"}}))));
    assert!(is(&d, &asking(json!({"LABELS": {"app": "x"}, ON_DEMAND: true}))));
    // Gateways and libraries never, and some only would.
    let d = mesh(docs(), "true");
    let mut router = asking(json!({}));
    router.kind = NodeKind::Router;
    assert!(!is(&d, &router) && !is(&d, &asking(json!({"GENERATOR": "grpc"}))));
    let problem = |d: &Docs, n: &NodeInfo| {
        let s = source(d, n);
        assert!(!s.is_on_demand(n) && s.snapshot(n, CDS).on_demand().is_none());
        let [p] = &s.on_demand_problems([n].into_iter())[..] else { panic!("no problem") };
        format!("{}: {}", p.object, p.message)
    };
    let mut sotw = plain.clone();
    sotw.incremental = false;
    assert!(problem(&d, &sotw).starts_with(
        "proxy asking.books: FLOTILLA_ON_DEMAND: gets everything all the same: it speaks the state"
    ));
    let patched = d.add(
        "EnvoyFilter",
        "books/f",
        json!({"configPatches": [{"applyTo": "CLUSTER", "patch":
        {"operation": "MERGE", "value": {"connect_timeout": "3s"}}}]}),
    );
    assert!(problem(&patched, &plain).contains("EnvoyFilter"));
}

/// Who asks no Mixer although the mesh's settings say so.
#[test]
fn proxies_that_ask_no_mixer() {
    let problems = |mesh: Value, node: &NodeInfo| {
        let s = source(&docs().add("MeshConfig", "mesh", mesh), node);
        s.mixer_problems([node].into_iter()).into_iter().map(|p| p.message).collect::<String>()
    };
    let (ours, library) = (asking(json!({"GENERATOR": "flotilla"})), asking(json!({"GENERATOR": "grpc"})));
    let envoy = asking(json!({}));
    let checks = || json!({"mixerCheckServer": "m:9091"});
    assert!(problems(checks(), &envoy).contains("an Envoy"));
    assert!(problems(checks(), &library).contains("a gRPC library"));
    assert_eq!(problems(checks(), &ours), "");
    assert_eq!(problems(json!({"mixerReportServer": "m:9091"}), &envoy), "");
    assert_eq!(problems(json!({"mixerCheckServer": "m:9091", "disablePolicyChecks": true}), &envoy), "");
}

/// A change reaches who asked for it, and nobody else; the mesh's setting may change under a proxy.
#[test]
fn what_changes_is_what_was_asked_for() {
    let node = asking(json!({"LABELS": {"app": "x"}}));
    let s = PilotSource::new();
    s.connected(&node);
    let mut reader = Reader::default();
    let mut turn = |d: &Docs| {
        let (g, f) = d.states();
        let config = reader.read(&g, &f);
        let world = match s.world() {
            Some(before) => before.next(settings(), config, BTreeSet::new()),
            None => World::new(settings(), config),
        };
        s.update(Arc::new(world));
    };
    let on = |d: Docs| {
        d.add("MeshConfig", "mesh", json!({"defaultConfig": {"proxyMetadata": {ON_DEMAND: "true"}}}))
    };
    turn(&on(docs()));
    let of = |t: &str| s.snapshot(&node, t).on_demand().cloned();
    let (hosts, clusters) = (of(VHDS).unwrap(), of(CDS).unwrap());
    // Endpoints come and go: nothing of it concerns hosts.
    let one = json!({"address": "10.0.0.7", "labels": {"app": "b"}});
    turn(&on(docs()).add("WorkloadEntry", "films/w", one));
    assert!(Arc::ptr_eq(&hosts, &of(VHDS).unwrap()));
    let both = |name: &str| [&clusters, &of(CDS).unwrap()].map(|c| c.resolve(name).unwrap().resource);
    let [a, b] = both("outbound|80||a.books.svc.cluster.local");
    assert!(Arc::ptr_eq(&a, &b), "another's is what it was");
    let [a, b] = both("outbound|80||b.films.svc.cluster.local");
    assert_ne!(a.version, b.version, "it knows who may answer");
    // Routes of one change: others are the same resources, mirrors stay.
    let vs = json!({"hosts": ["b.films.svc.cluster.local"], "http": [{"timeout": "1s", "route": [{"destination": {"host": "b.films.svc.cluster.local"}}]}]});
    turn(&on(docs()).add("VirtualService", "films/b", vs));
    let now = of(VHDS).unwrap();
    let both = |name: &str| [&hosts, &now].map(|h| h.resolve(name).unwrap().resource);
    let [a, b] = both("80/a");
    assert!(Arc::ptr_eq(&a, &b));
    let [a, b] = both("80/b.films");
    assert_ne!(a.version, b.version);
    assert!(names(&s.snapshot(&node, CDS)).iter().any(|n| n.contains("copied")));
    assert_eq!(both("80/x.wide.example").map(|r| r.version.clone()).iter().collect::<BTreeSet<_>>().len(), 1);
    turn(&docs());
    assert!(of(VHDS).is_none() && of(CDS).is_none());
    assert!(names(&s.snapshot(&node, CDS)).iter().any(|n| n.contains("a.books")));
}
