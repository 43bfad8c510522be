//! Reading, mapping and asking, against answers that a Consul 1.8 agent gave.

mod asking;
mod wire;

use std::collections::BTreeSet;

use mesh_model::{
    ClusterId, TrustDomain,
    registry::{Health, Protocol, Resolution, TlsMode},
};
use mesh_xds::node::NodeKind;
use serde_json::{Value, json};

use super::{answer::Status, *};
use crate::{
    config::{Config, Problem},
    generate::tests::{Docs, node, settings},
    index::{Index, Local, Origin, build},
    proxy::ProxyNode,
    world::World,
};

const WEB: &[u8] = include_bytes!("tests/web.json");
const API: &[u8] = include_bytes!("tests/api.json");
const SERVICES: &[u8] = include_bytes!("tests/services.json");

fn naming() -> Naming {
    Naming { namespace: "default".to_owned(), prefixes: vec![], domain: "consul".to_owned() }
}

fn named(name: &str, body: &[u8]) -> Registered {
    let (instances, unused) = answer::instances(body).unwrap();
    service::service(name, &instances, &unused, &naming())
}

/// The web service with something else in its first instance.
fn changed(pointer: &str, value: Value) -> Vec<u8> {
    let mut v: Value = serde_json::from_slice(WEB).unwrap();
    *v.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
    serde_json::to_vec(&v).unwrap()
}

fn index(config: &Config) -> (Index, Vec<Problem>) {
    let cluster = ClusterId::new("west").unwrap();
    build(config, &Local { cluster, trust_domain: TrustDomain::default(), east_west: vec![] })
}

fn with(docs: &Docs, agents: &[&[Registered]]) -> Config {
    let agents: Vec<_> = agents
        .iter()
        .map(|a| Arc::new(a.iter().map(|r| (r.name.clone(), Arc::new(r.clone()))).collect()))
        .collect();
    let mut config = docs.world().config;
    config.register(&Services { synced: vec![true; agents.len()], agents });
    config
}

#[test]
fn a_namespace_is_the_metadata_s_or_the_name_s() {
    let of = |p: &str, ns: &str| (p.to_owned(), ns.to_owned());
    let prefixes = vec![of("we", "short"), of("web-", "long"), of("web", "whole")];
    let naming = Naming { prefixes, ..naming() };
    let made = |name: &str, body: &[u8]| {
        let (instances, unused) = answer::instances(body).unwrap();
        service::service(name, &instances, &unused, &naming)
    };
    for (name, ns) in
        [("Web-a", "long"), ("web", "short"), ("webs", "whole"), ("w", "default"), ("a-web-", "default")]
    {
        let s = made(name, WEB);
        assert_eq!(s.namespace, ns, "{name}");
        assert_eq!(s.host, format!("{}.service.consul", name.to_ascii_lowercase()), "the name stays");
        assert!(s.instances.iter().all(|(_, w)| w.namespace == ns));
    }
    let said = changed("/0/Service/Meta", json!({"namespace": "shop"}));
    assert_eq!(made("web-a", &said).namespace, "shop");
}

#[tokio::test]
async fn prefixes_are_names() {
    for (prefixes, says) in [
        (vec![("a.", "x")], "is not a beginning"),
        (vec![("", "x")], "is not a beginning"),
        (vec![("a", "")], "is not a namespace"),
        (vec![("a", "x"), ("a", "y")], "several namespaces"),
    ] {
        let prefixes = prefixes.iter().map(|(p, n)| ((*p).to_owned(), (*n).to_owned())).collect();
        let naming = Naming { prefixes, ..naming() };
        let options = ConsulOptions { agents: vec![], naming, watches: 1, keep: None };
        assert!(Consul::start(options).unwrap_err().to_string().contains(says), "{says}");
    }
}

#[test]
fn consul_itself_is_no_service_of_the_mesh() {
    let (names, surplus) = answer::catalog(SERVICES).unwrap();
    assert_eq!(names.iter().map(String::as_str).collect::<Vec<_>>(), ["api", "web"]);
    assert_eq!(surplus, 0);
}

#[test]
fn what_is_critical() {
    let body = br#"[{"Node": "n1", "CheckID": "c1", "Status": "critical", "ServiceID": "web-1", "ServiceName": "web"},
        {"Node": "n2", "CheckID": "serfHealth", "Status": "critical", "ServiceName": ""}, {"Node": "n2"}, 7]"#;
    let found = answer::critical(body).unwrap();
    let found: Vec<_> = found.iter().map(|(s, n)| (s.as_str(), n.as_str())).collect();
    assert_eq!(found, [("", ""), ("", "n2"), ("web", "n1")]);
    assert!(answer::critical(b"{}").is_err());
}

#[test]
fn a_service_with_its_instances() {
    let s = named("web", WEB);
    assert_eq!((s.host.as_str(), s.namespace.as_str()), ("web.service.consul", "default"));
    let ports: Vec<_> = s.ports.iter().map(|p| (p.name.as_str(), p.port, p.protocol)).collect();
    assert_eq!(ports, [("http-8080", 8080, Protocol::Http), ("http-8081", 8081, Protocol::Http)]);
    assert_eq!((s.resolution, s.external), (Resolution::Static, false));
    assert_eq!(s.instances.len(), 2, "the proxy of Consul's own mesh is left out");
    let (port, first) = &s.instances[0];
    assert_eq!((port.port, first.spec.address.as_str(), first.spec.weight), (8080, "10.1.0.1", 10));
    assert_eq!(first.spec.labels["version"], "v1");
    assert_eq!(first.spec.labels["owner"], "shop");
    assert!(!first.spec.labels.contains_key("edge"), "only tags with a value are labels");
    assert_eq!(first.spec.locality, "dc1");
    let (port, second) = &s.instances[1];
    assert_eq!((port.port, second.spec.address.as_str()), (8081, "127.77.0.1"), "its node's address");
    assert!(s.problems.is_empty(), "{:?}", s.problems);
}

#[test]
fn a_service_outside() {
    let s = named("api", API);
    assert!(s.external);
    assert_eq!(s.resolution, Resolution::Dns);
    assert_eq!(s.ports[0].protocol, Protocol::Https, "of the node's metadata");
    let (index, _) = index(&with(&Docs::default(), &[&[s]]));
    let e = &index.services["api.service.consul"];
    assert!(e.service.mesh_external);
    assert_eq!(e.endpoints[0].address, "api.example.com");
}

#[test]
fn what_metadata_and_tags_say() {
    let protocol = |p: &str, v| named("web", &changed(p, v)).ports[0].protocol;
    let meta = "/0/Service/Meta";
    assert_eq!(protocol(meta, json!({"protocol": "grpc"})), Protocol::Grpc);
    assert_eq!(protocol(meta, json!({"protocol": "amqp"})), Protocol::Tcp, "unknown is bytes");
    assert_eq!(protocol(meta, json!({"protocol": "udp"})), Protocol::Udp);
    assert_eq!(protocol(meta, Value::Null), Protocol::Http, "unless said");
    assert_eq!(
        protocol("/0/Node/Meta", json!({"protocol": "redis"})),
        Protocol::Http,
        "the service's own word first"
    );
    let body = |meta: Value| {
        let mut v: Value = serde_json::from_slice(WEB).unwrap();
        v[0]["Service"]["Meta"] = meta;
        v.as_array_mut().unwrap().truncate(1);
        serde_json::to_vec(&v).unwrap()
    };
    let s = named("web", &body(json!({"namespace": "shop", "service-account": "web", "locality": "r1/z1"})));
    assert_eq!(s.namespace, "shop");
    assert_eq!(
        (s.instances[0].1.spec.service_account.as_str(), s.instances[0].1.spec.locality.as_str()),
        ("web", "r1/z1")
    );
    let tagged =
        named("web", &changed("/0/Service/Tags", json!(["security.istio.io/tlsMode|istio", "owner|ops"])));
    assert_eq!(tagged.instances[0].1.spec.labels["owner"], "ops", "tags before metadata");
    let (index, _) = index(&with(&Docs::default(), &[&[tagged]]));
    let tls: Vec<TlsMode> = index.services["web.service.consul"].endpoints.iter().map(|e| e.tls).collect();
    assert_eq!(tls, [TlsMode::Mutual, TlsMode::Disabled]);
    let odd = named("web", &changed(meta, json!({"namespace": "not a label"})));
    assert_eq!(odd.namespace, "default");
    assert!(odd.problems.iter().any(|p| p.message.contains("not a DNS label")), "{:?}", odd.problems);
    let split = named("web", &changed(meta, json!({"namespace": "shop"})));
    assert!(
        split.problems.iter().any(|p| p.message.contains("different namespaces")),
        "{:?}",
        split.problems
    );
}

#[test]
fn health_and_weights() {
    for (status, weights, health, weight) in [
        ("passing", (10, 2), Health::Healthy, 10),
        ("warning", (10, 2), Health::Healthy, 2),
        ("warning", (10, 0), Health::Unhealthy, 1),
        ("critical", (10, 2), Health::Unhealthy, 10),
        ("something new", (10, 2), Health::Unhealthy, 10),
    ] {
        let mut v: Value = serde_json::from_slice(WEB).unwrap();
        v[0]["Checks"][1]["Status"] = json!(status);
        v[0]["Service"]["Weights"] = json!({"Passing": weights.0, "Warning": weights.1});
        let s = named("web", &serde_json::to_vec(&v).unwrap());
        let (index, _) = index(&with(&Docs::default(), &[&[s]]));
        let e = &index.services["web.service.consul"].endpoints[0];
        assert_eq!((e.health, e.weight), (health, weight), "{status} {weights:?}");
    }
    // A check of the node is one of everything on it.
    let node = named("web", &changed("/0/Checks/0/Status", json!("critical")));
    assert_eq!(node.instances[0].1.annotations[crate::index::HEALTH], "unhealthy");
    // Without checks: as Consul has it.
    assert_eq!(answer::instances(API).unwrap().0[0].status, Status::Passing);
}

#[test]
fn names_that_cannot_be_hosts() {
    for name in ["*", "a.b", "", "a b", "ä", &"x".repeat(64)] {
        let s = named(name, WEB);
        assert!(s.ports.is_empty() && s.problems.len() == 1, "{name}");
    }
    assert_eq!(named("Web_1", WEB).host, "web_1.service.consul");
    for address in ["", "*", "0.0.0.0", "a b", "::"] {
        let mut v: Value = serde_json::from_slice(WEB).unwrap();
        v[0]["Service"]["Address"] = json!(address);
        v[0]["Node"]["Address"] = json!(address);
        let s = named("web", &serde_json::to_vec(&v).unwrap());
        assert_eq!(s.instances.len(), 1, "{address:?}");
    }
}

/// Each port is served by the instances that have it, and by no other.
#[test]
fn instances_serve_their_own_ports() {
    let (index, problems) = index(&with(&Docs::default(), &[&[named("web", WEB)]]));
    let e = &index.services["web.service.consul"];
    assert_eq!(e.origin, Origin::Consul);
    let all: Vec<_> =
        e.endpoints.iter().map(|e| (e.service_port.as_str(), e.address.as_str(), e.port)).collect();
    assert_eq!(all, [("http-8080", "10.1.0.1", 8080), ("http-8081", "127.77.0.1", 8081)]);
    assert!(e.assigned_vip && !e.service.addresses.is_empty());
    assert!(e.identities.contains("spiffe://mesh.local/ns/default/sa/default"), "{:?}", e.identities);
    assert!(problems.is_empty(), "{problems:?}");
}

#[test]
fn one_host_of_several_registries_is_one_service() {
    let docs = Docs::default().add(
        "ServiceEntry",
        "shop/web",
        json!({"hosts": ["web.service.consul"], "addresses": ["10.9.9.9"], "resolution": "STATIC",
               "ports": [{"number": 8080, "name": "web", "protocol": "HTTP"}, {"number": 90, "name": "http-8081", "protocol": "TCP"}],
               "endpoints": [{"address": "10.2.0.1"}]}),
    );
    let other = named("web", &changed("/0/Service/Address", json!("10.3.0.1")));
    let (index, problems) = index(&with(&docs, &[&[named("web", WEB)], &[other]]));
    let e = &index.services["web.service.consul"];
    assert_eq!((e.origin, e.service.namespace.as_str()), (Origin::Consul, "default"));
    assert_eq!(e.service.addresses, ["10.9.9.9".parse::<std::net::IpAddr>().unwrap()]);
    let ports: Vec<_> = e.service.ports.iter().map(|p| (p.name.as_str(), p.port)).collect();
    assert_eq!(ports, [("http-8080", 8080), ("http-8081", 8081), ("http-8081-90", 90)]);
    let mut all: Vec<_> =
        e.endpoints.iter().map(|e| (e.service_port.as_str(), e.address.as_str(), e.port)).collect();
    all.sort_unstable();
    assert_eq!(
        all,
        [
            ("http-8080", "10.1.0.1", 8080),
            ("http-8080", "10.2.0.1", 8080),
            ("http-8080", "10.3.0.1", 8080),
            // Both agents have it: once.
            ("http-8081", "127.77.0.1", 8081),
            ("http-8081-90", "10.2.0.1", 90),
        ]
    );
    assert!(problems.is_empty(), "{problems:?}");
}

#[test]
fn a_service_from_files_can_select_instances_and_be_exported() {
    let docs = Docs::default()
        .add(
            "Service",
            "default/front",
            json!({"selector": {"owner": "shop"}, "ports": [{"name": "http", "port": 80}]}),
        )
        .add("ServiceExport", "default/front", json!({}))
        .add("ServiceExport", "default/api", json!({}));
    let config = with(&docs, &[&[named("web", WEB), named("api", API)]]);
    let (index, _) = index(&config);
    let e = &index.services["front.default.svc.cluster.local"].endpoints;
    assert_eq!((e.len(), e[0].address.as_str(), e[0].port), (1, "10.1.0.1", 8080));
    let world = crate::world::World::new(docs.world().settings, config);
    let (exports, problems) = crate::exports::exports(&world);
    assert_eq!(exports.keys().collect::<Vec<_>>(), ["default/front"]);
    assert!(
        problems
            .iter()
            .any(|p| p.object == "ServiceExport default/api" && p.message.contains("outside the mesh")),
        "{problems:?}"
    );
}

/// An exported service of Consul has its name in other clusters here too, and is one with what they have under it.
#[test]
fn a_service_of_consul_can_be_exported_by_itself() {
    let mtls = |body: Vec<u8>| {
        let mut v: Value = serde_json::from_slice(&body).unwrap();
        for i in v.as_array_mut().unwrap() {
            i["Service"]["Tags"] = json!(["security.istio.io/tlsMode|istio"]);
        }
        serde_json::to_vec(&v).unwrap()
    };
    let docs = Docs::default()
        .add("ServiceExport", "default/web", json!({}))
        .add(
            "ImportedService",
            "east/default/web",
            json!({"cluster": "east", "lease": "live", "service": {"name": "web", "namespace": "default",
                "host": "web.default.svc.cluster.local", "ports": [{"name": "http", "port": 8080, "protocol": "http"}],
                "groups": [{"labels": {}, "locality": "", "healthyWeight": 3}], "serviceAccounts": [], "exportedAt": 5, "slots": 4}}),
        );
    let web = named("web", &mtls(WEB.to_vec()));
    let config = with(&docs, &[std::slice::from_ref(&web)]);
    let (index, _) = index(&config);
    let e = &index.services["web.default.svc.cluster.local"];
    assert_eq!((e.origin, e.exported, e.imports.len()), (Origin::Platform, true, 1));
    let of_consul = &index.services["web.service.consul"];
    assert_eq!((of_consul.exported, of_consul.imports.len()), (false, 0), "that one stays what it was");
    assert_eq!(e.endpoints, of_consul.endpoints);
    assert!(!e.service.addresses.is_empty() && e.service.addresses != of_consul.service.addresses);
    let world = crate::world::World::new(docs.world().settings, config);
    let (exports, problems) = crate::exports::exports(&world);
    assert!(problems.is_empty(), "{problems:?}");
    let offer: mesh_model::federation::Offer = exports["default/web"].spec().unwrap();
    assert_eq!(
        offer.service.groups.iter().map(|g| g.healthy_weight).sum::<u32>(),
        of_consul.endpoints.iter().map(|e| e.weight).sum::<u32>()
    );
    // Without the export, and under a Service of the same name, there is nothing of it.
    let none = with(&Docs::default(), &[std::slice::from_ref(&web)]);
    assert!(!super::tests::index(&none).0.services.contains_key("web.default.svc.cluster.local"));
    let docs = docs.add("Service", "default/web", json!({"ports": [{"name": "http", "port": 80}]}));
    let (both, _) = super::tests::index(&with(&docs, &[&[web]]));
    assert_eq!(both.services["web.default.svc.cluster.local"].service.ports[0].port, 80);
}

#[test]
fn datagrams_have_ports_of_their_own() {
    // Both instances on one number: one takes datagrams, one is HTTP.
    let mut v: Value = serde_json::from_slice(WEB).unwrap();
    v[0]["Service"]["Meta"] = json!({"protocol": "udp"});
    v[2]["Service"]["Port"] = json!(8080);
    let s = named("web", &serde_json::to_vec(&v).unwrap());
    assert!(s.problems.is_empty(), "{:?}", s.problems);
    let (index, _) = index(&with(&Docs::default(), &[std::slice::from_ref(&s), std::slice::from_ref(&s)]));
    let e = &index.services["web.service.consul"];
    assert_eq!(e.service.ports.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["http-8080"]);
    assert_eq!(e.udp_ports.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["udp-8080"]);
    let all: Vec<_> = e.endpoints.iter().map(|e| (e.service_port.as_str(), e.address.as_str())).collect();
    assert_eq!(all, [("udp-8080", "10.1.0.1"), ("http-8080", "127.77.0.1")]);
}

/// Who may register in Consul does not get the traffic between clusters by a tag.
#[test]
fn no_tag_makes_an_east_west_gateway() {
    let s = named("web", &changed("/0/Service/Tags", json!(["istio|eastwestgateway"])));
    assert_eq!(s.instances[0].1.spec.labels["istio"], "eastwestgateway");
    assert!(index(&with(&Docs::default(), &[&[s]])).0.east_west.is_empty());
}

#[test]
fn one_bad_instance_takes_only_itself_away() {
    let (instances, unused) = answer::instances(&changed("/0/Service/Port", json!("http"))).unwrap();
    assert_eq!(instances.iter().map(|i| i.id.as_str()).collect::<Vec<_>>(), ["web-2"]);
    assert_eq!(unused.len(), 1, "{unused:?}");
    let many: Vec<Value> =
        vec![serde_json::from_slice::<Value>(WEB).unwrap()[0].clone(); answer::MAX_INSTANCES + 2];
    let (instances, unused) = answer::instances(&serde_json::to_vec(&many).unwrap()).unwrap();
    assert_eq!(instances.len(), answer::MAX_INSTANCES);
    assert!(unused[0].starts_with("2 instances"), "{unused:?}");
}

/// Answers with bytes changed, cut out and doubled never panic, and what is made of them is a service that an index can
/// be built of.
#[test]
fn mutated_answers() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % below as u64).unwrap()
    };
    let words: [&[u8]; 12] = [
        b"null",
        b"-1",
        b"65536",
        b"1e99",
        b"\"\"",
        b"[]",
        b"{}",
        b"\"*\"",
        b"\\u0000",
        b"99999999999999999999",
        b"true",
        b"\"",
    ];
    let (mut read, mut refused) = (0, 0);
    for _ in 0..1500 {
        let mut body = [WEB, API, SERVICES][random(3)].to_vec();
        for _ in 0..=random(4) {
            let at = random(body.len());
            match random(4) {
                0 => body[at] = u8::try_from(random(256)).unwrap(),
                1 => drop(body.drain(at..(at + random(40)).min(body.len()))),
                2 => drop(body.splice(at..at, words[random(words.len())].iter().copied())),
                _ => {
                    // A value instead of another: more of these are still JSON.
                    let from = body[at..].iter().position(|b| *b == b':').map_or(at, |n| at + n + 1);
                    let to = body[from..]
                        .iter()
                        .position(|b| matches!(b, b',' | b'\n'))
                        .map_or(from, |n| from + n);
                    drop(body.splice(from..to, words[random(words.len())].iter().copied()));
                }
            }
        }
        let _ = (answer::catalog(&body), answer::critical(&body));
        match answer::instances(&body) {
            Ok((instances, unused)) => {
                read += 1;
                let s = service::service("web", &instances, &unused, &naming());
                assert!(s.instances.iter().all(|(p, w)| p.port > 0 && !w.spec.address.is_empty()));
                index(&with(&Docs::default(), &[&[s]]));
            }
            Err(_) => refused += 1,
        }
    }
    assert!(read > 100 && refused > 100, "{read} {refused}");
}

#[test]
fn hosts_are_those_that_can_be_called() {
    let services = Services {
        agents: vec![Arc::new(BTreeMap::from([
            ("web".to_owned(), Arc::new(named("web", WEB))),
            ("none".to_owned(), Arc::new(named("none", b"[]"))),
        ]))],
        synced: vec![true],
    };
    assert_eq!(services.hosts(), BTreeSet::from(["web.service.consul".to_owned()]));
}

/// Callers are told the name, its endpoints and its host; the proxy at an instance's address takes its port in.
#[test]
fn proxies_are_told() {
    let docs = Docs::default();
    let world = crate::world::World::new(docs.world().settings, with(&docs, &[&[named("web", WEB)]]));
    let proxy = crate::proxy::ProxyNode::new(&crate::generate::tests::productpage()).unwrap();
    let name = crate::generate::name_table(&proxy, &world).table["web.service.consul"].clone();
    assert_eq!((name.registry.as_str(), name.shortname.as_str(), name.alt_hosts.len()), ("Consul", "", 0));
    assert!(name.ips[0].starts_with("240.240."), "{:?}", name.ips);
    let g = crate::generate::generate(&proxy, &world);
    let of = |port| &g.endpoints[&format!("outbound|{port}||web.service.consul")].localities[0].endpoints;
    assert_eq!((of(8080).len(), of(8080)[0].weight), (1, 10));
    assert_eq!(of(8081).len(), 1);
    let inbound = |g: &crate::generate::Generated| g.clusters.keys().any(|c| c.starts_with("inbound|8080"));
    assert!(!inbound(&g), "a service of another namespace than the proxy's is none of its own");
    let of_books = Registered { namespace: "books".to_owned(), ..named("web", WEB) };
    let world = crate::world::World::new(docs.world().settings, with(&docs, &[&[of_books]]));
    assert!(inbound(&crate::generate::generate(&proxy, &world)));
    let hosts: Vec<_> = g.routes["8080"].virtual_hosts.iter().flat_map(|v| &v.domains).collect();
    assert!(hosts.iter().any(|d| *d == "web.service.consul:8080"), "{hosts:?}");
}

#[test]
fn services_of_consul_are_seen_where_the_mesh_says() {
    let seen = |export_to: Value, namespace: &str| {
        let docs = Docs::default().add("MeshConfig", "mesh", json!({"defaultServiceExportTo": export_to}));
        let w = World::new(settings(), with(&docs, &[&[named("web", WEB)]]));
        let mut caller = node(NodeKind::Sidecar, "10.1.0.9", "caller", json!({}));
        caller.namespace = namespace.to_owned();
        let proxy = ProxyNode::new(&caller).unwrap();
        let mut of_consul = w.index.services.values().filter(|e| e.origin == Origin::Consul);
        w.offers(&proxy, of_consul.next().unwrap())
    };
    assert!(seen(json!([]), "films") && seen(json!(["."]), "default") && seen(json!(["films"]), "films"));
    assert!(!seen(json!(["."]), "films") && !seen(json!(["~"]), "default"));
}
