//! What is kept from one world to the next is what would be made of the new one alone.

mod on_demand;
mod process;

use std::collections::BTreeMap;

use mesh_model::Locality;
use mesh_xds::{
    codec,
    mcp::ConfigState,
    type_url::{BUNDLES, CDS, EDS, LDS, NDS, PROXY_CONFIG, RDS, VHDS},
};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    config::Reader,
    generate::tests::{Docs, settings},
};

/// Proxies that differ in everything that a part may depend on.
fn nodes() -> Vec<NodeInfo> {
    let node = |kind: &str, id: &str, ip: &str, namespace: &str, more: Value| {
        let kind = if kind == "router" { NodeKind::Router } else { NodeKind::Sidecar };
        let locality = if id.starts_with("near") { "r1/z1" } else { "" };
        let Value::Object(mut metadata) = more else { panic!("an object") };
        metadata.insert("NAMESPACE".into(), json!(namespace));
        let domain = format!("{namespace}.svc.cluster.local");
        NodeInfo::proxy(
            kind,
            ip.parse().unwrap(),
            id,
            namespace,
            &domain,
            metadata,
            Locality::from(locality.to_owned()),
        )
    };
    let ours = json!({"FLOTILLA": true, "FLOTILLA_VHDS": true, "LABELS": {"app": "a"}});
    let asks = json!({"FLOTILLA_ON_DEMAND": true, "LABELS": {"app": "c"}, "HTTP_PROXY_PORT": 15007});
    let mut asking = node("sidecar", "asking", "10.0.2.3", "books", asks);
    asking.incremental = true;
    vec![
        asking,
        node("sidecar", "a", "10.0.0.1", "books", ours.clone()),
        node("sidecar", "near-a", "10.0.0.2", "books", ours.clone()),
        node("sidecar", "b", "10.0.1.1", "films", ours),
        node(
            "sidecar",
            "whole",
            "10.0.1.2",
            "films",
            json!({"FLOTILLA": true, "INTERCEPTION_MODE": "TPROXY"}),
        ),
        node(
            "sidecar",
            "envoy",
            "10.0.2.1",
            "books",
            json!({"LABELS": {"app": "b"}, "HTTP_PROXY_PORT": 15007}),
        ),
        node(
            "sidecar",
            "library",
            "10.0.2.2",
            "books",
            json!({"GENERATOR": "grpc", "LABELS": {"app": "a", "security.istio.io/tlsMode": "istio"}}),
        ),
        node(
            "router",
            "edge",
            "10.0.3.1",
            "istio-system",
            json!({"FLOTILLA": true, "LABELS": {"istio": "ingressgateway"}}),
        ),
        node(
            "router",
            "ew",
            "10.0.4.1",
            "istio-system",
            json!({"FLOTILLA": true, "ROUTER_MODE": "sni-dnat"}),
        ),
    ]
}

/// A document that a step may put, change or take away.
fn document(which: usize, variant: u8) -> (&'static str, String, Value) {
    let s = ["a", "b", "c"][which % 3];
    let ns = ["books", "films"][which / 3 % 2];
    let name = format!("{ns}/{s}");
    let v = u64::from(variant);
    let one = |of: [&'static str; 3]| of[usize::from(variant) % 3];
    if which == 71 {
        let controller = one(["istio.io/ingress-controller", "a.example/b", "istio.io/ingress-controller"]);
        return ("IngressClass", "own".to_owned(), json!({"controller": controller}));
    }
    if which >= 66 {
        let port = if variant < 3 { json!({"name": "http"}) } else { json!({"number": 80}) };
        let path = json!({"path": format!("/{}", v / 2), "pathType": one(["Prefix", "Exact", "ImplementationSpecific"]),
            "backend": {"service": {"name": s, "port": port}}});
        let tls = if variant > 3 { json!([{"hosts": ["in.example"], "secretName": s}]) } else { json!([]) };
        let rules = json!([{"host": "in.example", "http": {"paths": [path]}}]);
        return ("Ingress", name, json!({"ingressClassName": "own", "rules": rules, "tls": tls}));
    }
    if which >= 60 {
        return ("EnvoyFilter", name, patches(s, variant));
    }
    match which / 6 % 10 {
        0 => {
            let ports = [
                json!([{"name": "http", "port": 80}]),
                json!([{"name": "tcp", "port": 9000}, {"name": "http", "port": 8080}]),
                json!([{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]),
            ];
            let ip = one(["None", "10.9.0.1", ""]);
            ("Service", name, json!({"clusterIP": ip, "selector": {"app": s}, "ports": ports[which % 3]}))
        }
        1 => (
            "WorkloadEntry",
            name,
            json!({"address": format!("10.0.{}.1", variant % 3), "locality": format!("r{}/z{}", variant % 2, variant % 3),
                "serviceAccount": format!("sa{}", variant / 3), "labels": {"app": s, "version": format!("v{}", variant % 2),
                "security.istio.io/tlsMode": "istio"}}),
        ),
        2 => (
            "VirtualService",
            name,
            if variant == 5 {
                json!({"hosts": ["*.svc.cluster.local"], "http": [{"delegate": {"name": "d-a", "namespace": ns}}]})
            } else if variant == 4 {
                json!({"hosts": [s, "nobody.example"], "http": [{"delegate": {"name": "d-a", "namespace": ns}}]})
            } else {
                json!({"hosts": [s], "http": [{"timeout": format!("{}s", v + 1), "route": [{"destination": {"host": "a"}}]}]})
            },
        ),
        // Depends on where the caller's neighbours are.
        3 if variant % 3 == 1 => (
            "DestinationRule",
            name,
            json!({"host": s, "trafficPolicy": {"loadBalancer": {"zoneAwareLbSetting": {"minClusterSize": v / 3}}}}),
        ),
        3 => (
            "DestinationRule",
            name,
            json!({"host": s, "subsets": [{"name": "v1", "labels": {"version": "v1"}}], "trafficPolicy":
                {"outlierDetection": {"interval": format!("{}s", v + 1)}, "loadBalancer": {"consistentHash": {"httpHeaderName": format!("x{v}")}}}}),
        ),
        4 => (
            "Sidecar",
            format!("{ns}/default"),
            json!({"egress": [{"hosts": [one(["./*", "*/*", "films/*"])]}]}),
        ),
        5 => (
            "PeerAuthentication",
            format!("{ns}/default"),
            json!({"mtls": {"mode": one(["STRICT", "DISABLE", "PERMISSIVE"])}}),
        ),
        6 => (
            "ServiceEntry",
            format!("{ns}/out"),
            json!({"hosts": ["out.example"], "ports": [{"number": 80 + v, "name": "http", "protocol": "HTTP"}],
                "resolution": one(["DNS", "STATIC", "NONE"]), "endpoints": []}),
        ),
        7 => (
            "ImportedService",
            format!("east/{ns}/{s}"),
            json!({"cluster": "east", "lease": "live", "service": {
                "name": s, "namespace": ns, "host": format!("{s}.{ns}.svc.cluster.local"),
                "ports": [{"name": "http", "port": 80, "protocol": "http"}],
                "groups": [{"labels": {"version": "v1"}, "locality": "r1/z1", "healthyWeight": v}],
                "serviceAccounts": [format!("spiffe://mesh.local/ns/{ns}/sa/{s}{v}")], "exportedAt": 5, "slots": 4}}),
        ),
        8 => (
            "VirtualService",
            format!("{ns}/d-{s}"),
            json!({"hosts": [], "http": [{"timeout": format!("{}s", v + 1), "route": [{"destination": {"host": "b"}}]}]}),
        ),
        _ => (
            "MeshConfig",
            "mesh".to_owned(),
            json!({"connectTimeout": format!("{}s", v / 2 + 1), "defaultServiceExportTo": [one(["*", ".", "*"])]}),
        ),
    }
}

/// Patches of each kind, of some of which our own proxies take nothing.
fn patches(app: &str, variant: u8) -> Value {
    let patch = |to: &str, matches: Value, operation: &str, value: Value| json!({"applyTo": to, "match": matches, "patch": {"operation": operation, "value": value}});
    let lua = json!({"name": "lua", "typed_config":
        {"@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"}});
    let host = json!({"name": format!("{app}.added"), "domains": [format!("{app}.added"), "a.films"], "routes": [
        {"match": {"prefix": "/"}, "direct_response": {"status": 200 + u32::from(variant)}}]});
    let all = match variant {
        0 => vec![patch("CLUSTER", json!({}), "MERGE", json!({"connect_timeout": "3s"}))],
        1 => vec![
            patch("HTTP_FILTER", json!({}), "ADD", lua),
            patch("CLUSTER", json!({"context": "SIDECAR_OUTBOUND"}), "MERGE", json!({"alt_stat_name": "z"})),
        ],
        2 => vec![patch("VIRTUAL_HOST", json!({"context": "SIDECAR_OUTBOUND"}), "ADD", host)],
        3 => vec![patch(
            "HTTP_ROUTE",
            json!({"routeConfiguration": {"portNumber": 80}}),
            "MERGE",
            json!({"request_headers_to_add": [{"header": {"key": "x", "value": app}}]}),
        )],
        4 => vec![
            patch(
                "CLUSTER",
                json!({"proxy": {"metadata": {"NAMESPACE": "films"}}}),
                "ADD",
                json!({"name": format!("added-{app}"), "type": "STATIC"}),
            ),
            patch(
                "VIRTUAL_HOST",
                json!({"routeConfiguration": {"vhost": {"domainName": "a.books"}}}),
                "REMOVE",
                Value::Null,
            ),
        ],
        _ => vec![patch("LISTENER", json!({}), "MERGE", json!({"listener_filters_timeout": "2s"}))],
    };
    let mut spec = json!({"priority": variant, "configPatches": all});
    if variant % 2 == 1 {
        spec["workloadSelector"] = json!({"labels": {"app": app}});
    }
    spec
}

/// Documents that are the same in both keep their identity, as those of a real source do.
fn keep(new: &mut ConfigState, old: &ConfigState) {
    for (t, docs) in &mut new.documents {
        for (name, doc) in docs {
            if let Some(before) = old.documents.get(t).and_then(|d| d.get(name)).filter(|b| *b == doc) {
                *doc = Arc::clone(before);
            }
        }
    }
}

/// Versions by type and name.
type Versions = BTreeMap<(&'static str, String), String>;

/// With what can be asked for of these. Patterns cannot, and what they lead to is made.
fn served(source: &PilotSource, node: &NodeInfo, wanted: &mut Versions) -> Versions {
    let mut out = unasked(source, node);
    for t in [CDS, VHDS] {
        let snapshot = source.snapshot(node, t);
        let Some(on_demand) = snapshot.on_demand() else { continue };
        wanted.retain(|(of, name), _| {
            let pattern = ["*", "/allow_any", "/block_all"].iter().any(|p| name.contains(p));
            if *of == VHDS && pattern {
                return t != VHDS;
            }
            if let Some(r) = on_demand.resolve(name).filter(|_| *of == t) {
                assert!(out.insert((t, name.clone()), r.resource.version.clone()).is_none(), "{name} twice");
            }
            true
        });
    }
    out
}

fn unasked(source: &PilotSource, node: &NodeInfo) -> Versions {
    let of = |t: &'static str| {
        let snapshot = source.snapshot(node, t);
        let all: Vec<_> = snapshot.resources().cloned().collect();
        all.into_iter().map(move |r| {
            if ![NDS, BUNDLES].contains(&t) {
                assert!(
                    snapshot.get(&r.name).is_some_and(|found| Arc::ptr_eq(found, &r)),
                    "{} twice",
                    r.name
                );
            }
            ((t, r.name.clone()), r.version.clone())
        })
    };
    [CDS, EDS, LDS, RDS, VHDS].into_iter().flat_map(of).collect()
}

fn made(world: &World, node: &NodeInfo) -> Versions {
    let g = generate::generate(&ProxyNode::new(node).unwrap(), world);
    fn of<T: serde::Serialize>(
        t: &'static str,
        map: &BTreeMap<String, T>,
    ) -> Vec<((&'static str, String), String)> {
        map.iter().map(|(n, v)| ((t, n.clone()), codec::version(v))).collect()
    }
    let all = [
        of(CDS, &g.clusters),
        of(EDS, &g.endpoints),
        of(LDS, &g.listeners),
        of(RDS, &g.routes),
        of(VHDS, &g.hosts),
    ];
    let mut all: Versions = all.into_iter().flatten().collect();
    all.extend(g.wire.iter().map(|(k, (_, version))| (k.clone(), version.clone())));
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn what_is_kept_is_what_would_be_made(
        steps in prop::collection::vec(prop::collection::vec((0usize..72, 0u8..6, any::<bool>()), 1..4), 1..12),
    ) {
        let source = PilotSource::new();
        for n in nodes() {
            source.connected(&n);
        }
        let mut reader = Reader::default();
        let mut documents: BTreeMap<usize, u8> = (0..18).map(|n| (n, 0)).collect();
        // One that delegates, and to whom.
        documents.extend([(12, 4), (48, 0)]);
        // Ingresses count as long as their class does.
        documents.insert(71, 0);
        // What a peer exports, whose lease changes below.
        documents.insert(42, 1);
        let (mut galley, mut federation) = (ConfigState::default(), ConfigState::default());
        for step in steps {
            for (which, variant, there) in step {
                if there {
                    documents.insert(which, variant);
                } else {
                    documents.remove(&which);
                }
            }
            let lease = if documents.get(&7).is_some_and(|v| *v > 2) { "lapsed" } else { "live" };
            let mut docs = Docs::default().add(
                "PeerCluster",
                "east",
                json!({"id": "east", "network": "net-east", "lease": lease, "transports": ["tcp"],
                    "gateways": [{"address": "203.0.113.2:15443", "weight": 1}]}),
            );
            let all: BTreeMap<(&str, String), Value> = documents
                .iter()
                .map(|(which, variant)| { let (kind, name, spec) = document(*which, *variant); ((kind, name), spec) })
                .collect();
            for ((kind, name), spec) in all {
                docs = docs.add(kind, &name, spec);
            }
            let (mut g, mut f) = docs.states();
            for d in g.documents.values_mut().chain(f.documents.values_mut()).flat_map(|d| d.values_mut()) {
                Arc::make_mut(d).created = 7;
            }
            keep(&mut g, &galley);
            keep(&mut f, &federation);
            let config = reader.read(&g, &f);
            let world = Arc::new(match source.world() {
                Some(before) => before.next(settings(), config, BTreeSet::new()),
                None => World::new(settings(), config),
            });
            (galley, federation) = (g, f);
            source.update(Arc::clone(&world));
            let alone = World::new(settings(), Reader::default().read(&galley, &federation));
            prop_assert_eq!(&world.index.services, &alone.index.services);
            prop_assert_eq!(&world.index.by_address, &alone.index.by_address);
            prop_assert_eq!(&world.problems, &alone.problems);
            for n in nodes() {
                let mut made = made(&alone, &n);
                prop_assert_eq!(served(&source, &n, &mut made), made, "{}", n.id);
            }
        }
    }
}

/// Services, and a route whose timeout, name and kind are these.
fn routed(timeout: u32, host: &str, kind: &str) -> Docs {
    let ports = json!([{"name": "http", "port": 80}, {"name": "http-b", "port": 8080}]);
    let service = |ip: &str| json!({"clusterIP": ip, "selector": {"app": "a"}, "ports": ports});
    let workload = json!({"address": "10.0.0.1", "labels": {"app": "a"}});
    let to = json!([{"destination": {"host": "a.books.svc.cluster.local"}}]);
    let rules = if kind == "http" {
        json!([{"route": to, "timeout": format!("{timeout}s")}])
    } else {
        json!([{"route": to, "match": [{"port": 80, "sniHosts": ["x"]}]}])
    };
    let mut spec = serde_json::Map::new();
    spec.insert("hosts".into(), json!([host]));
    spec.insert(kind.into(), rules);
    Docs::default()
        .add("Service", "books/a", service("10.9.0.1"))
        // Of the same address: the first has its domain.
        .add("Service", "books/b", service("10.9.0.1"))
        .add("WorkloadEntry", "books/a", workload)
        .add("VirtualService", "books/v", Value::Object(spec))
}

/// The world that follows, and what it would be alone.
fn turn(world: Option<&World>, reader: &mut Reader, before: &mut ConfigState, docs: &Docs) -> (World, World) {
    let (mut galley, federation) = docs.states();
    keep(&mut galley, before);
    before.clone_from(&galley);
    let config = reader.read(&galley, &federation);
    let next = match world {
        Some(world) => world.next(settings(), config, BTreeSet::new()),
        None => World::new(settings(), config),
    };
    (next, World::new(settings(), Reader::default().read(&galley, &federation)))
}

/// Routes of a gateway are nothing to sidecars.
#[test]
fn the_routes_of_gateways_change_no_sidecar() {
    let source = PilotSource::new();
    let all = nodes();
    all.iter().for_each(|n| source.connected(n));
    let (mut reader, mut before) = (Reader::default(), ConfigState::default());
    let to = json!([{"destination": {"host": "a.books.svc.cluster.local"}}]);
    let edge = |gateways: Value, timeout: u32| {
        let rules = json!([{"route": to, "timeout": format!("{timeout}s")}]);
        let spec = json!({"hosts": ["shop.example.com"], "gateways": gateways, "http": rules});
        routed(1, "a", "http").add("VirtualService", "books/z", spec)
    };
    let (gateway, both) = (json!(["edge"]), json!(["edge", "mesh"]));
    let steps = [
        (&gateway, 1, None),
        (&gateway, 2, Some(0)),
        (&both, 2, None),
        (&both, 3, None),
        (&gateway, 3, None),
    ];
    for (at, (gateways, timeout, some)) in steps.into_iter().enumerate() {
        let (world, alone) =
            turn(source.world().as_deref(), &mut reader, &mut before, &edge(gateways.clone(), timeout));
        let node = ProxyNode::new(&all[1]).unwrap().class(world.telling_labels());
        let hosts = world.rerouted().and_then(|r| generate::rehosted(&node, &world, r, |_| None));
        assert_eq!(hosts.map(|h| h.len()), some, "{at}");
        source.update(Arc::new(world));
        for n in &all {
            let mut made = made(&alone, n);
            assert_eq!(served(&source, n, &mut made), made, "{at} {}", n.id);
        }
    }
}

#[test]
fn the_routes_of_one_service_are_made_alone() {
    let source = PilotSource::new();
    let all = nodes();
    all.iter().for_each(|n| source.connected(n));
    let (mut reader, mut before) = (Reader::default(), ConfigState::default());
    let steps = [
        (routed(1, "a", "http"), false),
        (routed(2, "a", "http"), true),
        // Both the host that it was for and the one that it is for.
        (routed(2, "b", "http"), true),
        // A host that no service has is one more virtual host; so it is when it goes.
        (routed(2, "c.example.com", "http"), false),
        (routed(3, "a", "http"), false),
        (routed(3, "a", "tls"), false),
        (routed(4, "b", "http"), false),
        (routed(5, "b", "http"), true),
    ];
    for (at, (docs, alone)) in steps.into_iter().enumerate() {
        let (world, whole) = turn(source.world().as_deref(), &mut reader, &mut before, &docs);
        let known = |_: &str| Some(vec![]);
        let node = ProxyNode::new(&all[1]).unwrap().class(world.telling_labels());
        let some = world.rerouted().and_then(|r| generate::rehosted(&node, &world, r, known));
        assert_eq!(some.is_some(), alone, "{at}");
        if let Some(hosts) = some {
            assert_eq!(hosts.len(), if at == 2 { 4 } else { 2 }, "{hosts:?}");
        }
        source.update(Arc::new(world));
        for n in &all {
            let mut made = made(&whole, n);
            assert_eq!(served(&source, n, &mut made), made, "{at} {}", n.id);
        }
    }
}

/// An HTTP proxy has hosts of all ports in one route configuration.
#[test]
fn the_routes_of_an_http_proxy_follow_as_well() {
    let source = PilotSource::new();
    let all = nodes();
    all.iter().for_each(|n| source.connected(n));
    let (mut reader, mut before) = (Reader::default(), ConfigState::default());
    let egress = json!([{"port": {"number": 15_080, "protocol": "HTTP_PROXY", "name": "all"}, "hosts": ["*/*"]},
        {"hosts": ["*/*"]}]);
    for timeout in [1, 2, 3] {
        let docs =
            routed(timeout, "a", "http").add("Sidecar", "istio-system/default", json!({"egress": egress}));
        let (world, alone) = turn(source.world().as_deref(), &mut reader, &mut before, &docs);
        source.update(Arc::new(world));
        for n in &all {
            let mut made = made(&alone, n);
            assert_eq!(served(&source, n, &mut made), made, "{timeout} {}", n.id);
        }
    }
}

/// What a service is made of besides workloads that it selects: slices, their pods, and whether it is exported.
#[test]
fn a_service_follows_everything_that_it_is_made_of() {
    let docs = |port: u16, ready: &str, exported: bool, account: &str| {
        let pod = json!({"spec": {"serviceAccountName": account, "nodeName": "n"}, "status": {"podIP": "10.0.0.1", "phase": "Running",
            "conditions": [{"type": "Ready", "status": ready}]}});
        let slice = json!({"ports": [{"name": "http", "port": port}],
            "endpoints": [{"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "p"}}]});
        let docs = Docs::default()
            .add(
                "Service",
                "books/a",
                json!({"selector": {"app": "a"}, "ports": [{"name": "http", "port": 80}]}),
            )
            .add("Pod", "books/p", pod)
            .add("EndpointSlice", "books/s", slice)
            .label("kubernetes.io/service-name", "a");
        if exported { docs.add("ServiceExport", "books/a", json!({})) } else { docs }
    };
    let (mut reader, mut before) = (Reader::default(), ConfigState::default());
    let mut world: Option<World> = None;
    let mut seen = Vec::new();
    for docs in [
        docs(8080, "True", false, "a"),
        docs(8081, "True", false, "a"),
        docs(8081, "True", false, "b"),
        docs(8081, "True", true, "b"),
        docs(8081, "True", false, "b"),
    ] {
        let (next, alone) = turn(world.as_ref(), &mut reader, &mut before, &docs);
        assert_eq!(next.index.services, alone.index.services);
        seen.push((*next.index.services["a.books.svc.cluster.local"]).clone());
        world = Some(next);
    }
    assert!(seen.windows(2).all(|w| w[0] != w[1]), "{seen:#?}");
    assert!(!seen[0].endpoints.is_empty());
}

/// Of a hundred services one is made again when one of its workloads changes, or when it is the service that does.
#[test]
fn services_whose_documents_stay_are_not_made_again() {
    let docs = |zone: &str, port: u32| {
        let mut docs = Docs::default();
        for n in 0..100 {
            let port = if n == 7 { port } else { 80 };
            let spec =
                json!({"selector": {"app": format!("a{n}")}, "ports": [{"name": "http", "port": port}]});
            docs = docs.add("Service", &format!("books/s{n}"), spec);
            let zone = if n == 3 { zone } else { "r/z" };
            let spec = json!({"address": format!("10.0.0.{n}"), "locality": zone, "labels": {"app": format!("a{n}")}});
            docs = docs.add("WorkloadEntry", &format!("books/w{n}"), spec);
        }
        docs
    };
    let (mut reader, mut before) = (Reader::default(), ConfigState::default());
    let mut worlds: Vec<World> = vec![];
    for (zone, port) in [("r/z", 80), ("r/y", 80), ("r/y", 81), ("r/y", 81)] {
        let (world, _) = turn(worlds.last(), &mut reader, &mut before, &docs(zone, port));
        worlds.push(world);
    }
    let again = |a: &World, b: &World| -> Vec<String> {
        let pairs = a.index.services.values().zip(b.index.services.values());
        pairs.filter(|(a, b)| !Arc::ptr_eq(a, b)).map(|(a, _)| a.service.name.clone()).collect()
    };
    assert_eq!(again(&worlds[0], &worlds[1]), ["s3"]);
    assert_eq!(again(&worlds[1], &worlds[2]), ["s7"]);
    assert!(again(&worlds[2], &worlds[3]).is_empty());
    assert_eq!(crate::index::made_again(&worlds[0].index, &worlds[1].index), ["s3.books.svc.cluster.local"]);
}

#[test]
fn classes_share_equal_hosts() {
    let source = PilotSource::new();
    let (_, name, spec) = document(0, 1);
    let (galley, federation) = Docs::default().add("Service", &name, spec).states();
    source.update(Arc::new(World::new(settings(), Reader::default().read(&galley, &federation))));
    let all = &nodes()[1..];
    // Of one namespace and two localities, so of two classes.
    let [first, second] = [&all[0], &all[1]].map(|n| {
        source.connected(n);
        source.snapshot(n, VHDS)
    });
    let name = "80/a.books.svc.cluster.local:80";
    assert!(!Arc::ptr_eq(&first.layers()[1], &second.layers()[1]));
    assert!(Arc::ptr_eq(first.get(name).unwrap(), second.get(name).unwrap()));
}

/// A host that another's VirtualService leaves as it is keeps its domains from what patches add.
#[test]
fn patches_know_whose_domains_are_kept() {
    let source = PilotSource::new();
    let node = &nodes()[1];
    source.connected(node);
    let mut reader = Reader::default();
    let mut before = ConfigState::default();
    for variant in [0, 1] {
        let mut docs = Docs::default();
        // Services films/a and books/b, the latter's VirtualService, and a host with domain a.films.
        for (which, variant) in [(3, 0), (1, 0), (13, variant), (60, 2)] {
            let (kind, name, spec) = document(which, variant);
            docs = docs.add(kind, &name, spec);
        }
        let (world, alone) = turn(source.world().as_deref(), &mut reader, &mut before, &docs);
        assert_eq!(world.rerouted().is_some(), variant == 1);
        source.update(Arc::new(world));
        assert_eq!(unasked(&source, node), made(&alone, node));
        let [p] = &source.problems()[..] else { panic!("{:?}", source.problems()) };
        assert!(
            p.message.contains("\"a.films\" is one of \"a.films.svc.cluster.local:80\""),
            "{}",
            p.message
        );
    }
}
