//! Configuration in, what a proxy would execute out.

mod domains;
mod egress;
mod gateways;
mod grpc;
mod mesh;
mod names;
mod patches;
mod policy;
mod sockets;
mod telemetry;
mod udp;
mod v1alpha1;

use std::{collections::BTreeMap, sync::Arc};

use mesh_model::{ClusterId, Locality, NetworkId, TrustDomain, proxy::*};
use mesh_xds::{
    NodeInfo, NodeKind, codec,
    mcp::{ConfigState, Document},
};
use serde_json::{Map, Value, json};

use super::*;
use crate::{
    config::Reader,
    world::{Settings, World},
};

pub(crate) fn settings() -> Settings {
    Settings {
        cluster: ClusterId::new("west").unwrap(),
        network: NetworkId::new("net-west").unwrap(),
        trust_domain: TrustDomain::default(),
        east_west: vec!["10.1.0.100:15443".parse().unwrap()],
        reachable: true,
        federation_address: Some("127.0.0.1:15016".parse().unwrap()),
        transport: mesh_model::federation::Transport::Tcp,
    }
}

/// Documents as `(type, namespace/name, labels, spec)`.
#[derive(Default, Clone)]
pub(crate) struct Docs(Vec<(String, Document)>);

impl Docs {
    pub(crate) fn add(mut self, kind: &str, name: &str, spec: Value) -> Self {
        let t = match kind {
            "Service" | "Pod" | "Namespace" => format!("core/v1/{kind}"),
            "EndpointSlice" => "discovery.k8s.io/v1/EndpointSlice".to_owned(),
            "ServiceExport" => "multicluster.x-k8s.io/v1alpha1/ServiceExport".to_owned(),
            "MeshConfig" | "ImportedService" | "PeerCluster" | "FormerCluster" | "ForeignBundle"
            | "ExportPolicy" | "ImportPolicy" => {
                format!("flotilla.dev/v1alpha1/{kind}")
            }
            "PeerAuthentication" | "RequestAuthentication" | "AuthorizationPolicy" => {
                format!("security.istio.io/v1/{kind}")
            }
            "Policy" | "MeshPolicy" => format!("authentication.istio.io/v1alpha1/{kind}"),
            "RbacConfig" | "ClusterRbacConfig" | "ServiceRole" | "ServiceRoleBinding" => {
                format!("rbac.istio.io/v1alpha1/{kind}")
            }
            "EnvoyFilter" => "networking.istio.io/v1alpha3/EnvoyFilter".to_owned(),
            "Ingress" | "IngressClass" => format!("networking.k8s.io/v1/{kind}"),
            "ProxyConfig" => "networking.istio.io/v1beta1/ProxyConfig".to_owned(),
            _ => format!("networking.istio.io/v1/{kind}"),
        };
        let created = 1000 + self.0.len() as u64;
        let doc = Document { name: name.to_owned(), created, body: spec, ..Document::default() };
        self.0.push((t, doc));
        self
    }

    pub(crate) fn label(mut self, key: &str, value: &str) -> Self {
        let (_, d) = self.0.last_mut().unwrap();
        d.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn annotate(mut self, key: &str, value: &str) -> Self {
        let (_, d) = self.0.last_mut().unwrap();
        d.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn states(&self) -> (ConfigState, ConfigState) {
        let mut galley = ConfigState::default();
        let mut federation = ConfigState::default();
        for (t, d) in &self.0 {
            let to = if ["ImportedService", "PeerCluster", "FormerCluster", "ForeignBundle"]
                .iter()
                .any(|k| t.contains(k))
            {
                &mut federation
            } else {
                &mut galley
            };
            to.documents.entry(t.clone()).or_default().insert(d.name.clone(), Arc::new(d.clone()));
        }
        (galley, federation)
    }

    pub(crate) fn world(&self) -> World {
        let (galley, federation) = self.states();
        let w = World::new(settings(), Reader::default().read(&galley, &federation));
        assert!(w.config.problems.is_empty(), "{:?}", w.config.problems);
        w
    }

    fn generate(&self, node: &NodeInfo) -> Generated {
        let g = generate(&ProxyNode::new(node).unwrap(), &self.world());
        check(&g);
        g
    }
}

/// What must hold for every generated configuration.
fn check(g: &Generated) {
    for l in g.listeners.values() {
        assert_eq!(codec::decode_listener(&codec::encode_listener(l)).as_ref(), Ok(l));
        for c in l.filter_chains.iter().chain(&l.default_filter_chain) {
            for f in &c.filters {
                if let NetworkFilter::Http(h) = f
                    && let RouteSource::Rds(name) = &h.routes
                {
                    assert!(g.routes.contains_key(name), "{}: route {name} is missing", l.name);
                }
                if let NetworkFilter::Tcp(t) = f {
                    for c in &t.clusters {
                        assert!(g.clusters.contains_key(&c.cluster), "{}: {} is missing", l.name, c.cluster);
                    }
                }
            }
        }
        // No two chains for the same connection.
        for (i, a) in l.filter_chains.iter().enumerate() {
            for b in &l.filter_chains[i + 1..] {
                assert_ne!(a.matches, b.matches, "{}", l.name);
            }
        }
    }
    for r in g.routes.values() {
        assert_eq!(codec::decode_route(&codec::encode_route(r)).as_ref(), Ok(r));
        let mut domains = std::collections::BTreeSet::new();
        for v in &r.virtual_hosts {
            assert!(!v.domains.is_empty(), "{}", v.name);
            for d in &v.domains {
                assert!(domains.insert(d.clone()), "{}: {d} twice", r.name);
            }
        }
    }
    for c in g.clusters.values() {
        assert_eq!(codec::decode_cluster(&codec::encode_cluster(c)).as_ref(), Ok(c));
        if let Discovery::Eds(name) = &c.discovery {
            assert!(g.endpoints.contains_key(name), "{name} has no endpoints");
        }
    }
    for e in g.endpoints.values() {
        assert_eq!(codec::decode_endpoints(&codec::encode_endpoints(e)).as_ref(), Ok(e));
        let mut priorities: Vec<u32> = e.localities.iter().map(|l| l.priority).collect();
        priorities.dedup();
        assert!(priorities.iter().enumerate().all(|(i, p)| i as u32 == *p || priorities.contains(&(*p - 1))));
    }
}

pub(crate) fn node(kind: NodeKind, ip: &str, name: &str, meta: Value) -> NodeInfo {
    let mut map: Map<String, Value> = meta.as_object().cloned().unwrap_or_default();
    map.entry("NAMESPACE").or_insert("books".into());
    map.entry("CLUSTER_ID").or_insert("west".into());
    NodeInfo::proxy(
        kind,
        ip.parse().unwrap(),
        name,
        "books",
        "books.svc.cluster.local",
        map,
        Locality::from("r1/z1".to_owned()),
    )
}

pub(crate) fn productpage() -> NodeInfo {
    node(
        NodeKind::Sidecar,
        "10.1.0.1",
        "productpage-v1",
        json!({"LABELS": {"app": "productpage", "version": "v1"}, "SERVICE_ACCOUNT": "productpage"}),
    )
}

fn service(port: u16, name: &str, app: &str) -> Value {
    json!({"selector": {"app": app}, "ports": [{"name": name, "port": port, "targetPort": port}],
           "clusterIP": format!("10.96.0.{}", app.len())})
}

fn workload(ip: &str, app: &str, version: &str) -> Value {
    json!({"address": ip, "serviceAccount": app, "locality": "r1/z1",
           "labels": {"app": app, "version": version, "security.istio.io/tlsMode": "istio"}})
}

fn import(cluster: &str, lease: &str, groups: Value) -> Value {
    json!({"cluster": cluster, "lease": lease, "service": {
        "name": "reviews", "namespace": "books", "host": "reviews.books.svc.cluster.local",
        "ports": [{"name": "http", "port": 9080, "protocol": "http"}], "groups": groups,
        "serviceAccounts": ["spiffe://mesh.local/ns/books/sa/reviews-east"], "exportedAt": 5, "slots": 4}})
}

fn peer(id: &str, ip: &str) -> Value {
    json!({"id": id, "network": format!("net-{id}"), "gateways": [{"address": format!("{ip}:15443"), "weight": 1}],
           "transports": ["quic", "tcp"], "lease": "live"})
}

/// The sample application: reviews v1 here, v2 and v3 in the east.
pub(crate) fn bookstore() -> Docs {
    Docs::default()
        .add("Service", "books/productpage", service(9080, "http", "productpage"))
        .add("WorkloadEntry", "books/productpage-v1", workload("10.1.0.1", "productpage", "v1"))
        .add("Service", "books/reviews", service(9080, "http", "reviews"))
        .add("WorkloadEntry", "books/reviews-v1", workload("10.1.0.5", "reviews", "v1"))
        .add(
            "DestinationRule",
            "books/reviews",
            json!({"host": "reviews", "subsets": [
                {"name": "v1", "labels": {"version": "v1"}},
                {"name": "v2", "labels": {"version": "v2"}},
                {"name": "v3", "labels": {"version": "v3"}}]}),
        )
        .add(
            "ImportedService",
            "east/books/reviews",
            import(
                "east",
                "live",
                json!([
                    {"labels": {"app": "reviews", "version": "v2"}, "locality": "r2/z1", "healthyWeight": 2},
                    {"labels": {"app": "reviews", "version": "v3"}, "locality": "r2/z1", "healthyWeight": 1}
                ]),
            ),
        )
        .add("PeerCluster", "east", peer("east", "203.0.113.2"))
}

fn http(l: &FilterChain) -> &HttpConnectionManager {
    match l.filters.last() {
        Some(NetworkFilter::Http(h)) => h,
        other => panic!("not HTTP: {other:?}"),
    }
}

fn tcp_cluster(c: &FilterChain) -> &str {
    match c.filters.last() {
        Some(NetworkFilter::Tcp(t)) => &t.clusters[0].cluster,
        other => panic!("not TCP: {other:?}"),
    }
}

fn vhost<'a>(r: &'a RouteConfiguration, domain: &str) -> &'a VirtualHost {
    r.virtual_hosts.iter().find(|v| v.domains.iter().any(|d| d == domain)).unwrap_or_else(|| {
        panic!("no {domain} in {:?}", r.virtual_hosts.iter().map(|v| &v.domains).collect::<Vec<_>>())
    })
}

fn forward(r: &Route) -> &Forward {
    match &r.action {
        RouteAction::Forward(f) => f,
        other => panic!("{other:?}"),
    }
}

#[test]
fn peak_ewma_is_for_proxies_that_know_it() {
    let docs = bookstore().add(
        "DestinationRule",
        "books/reviews",
        json!({"host": "reviews", "trafficPolicy": {"loadBalancer": {"simple": "PEAK_EWMA"}}}),
    );
    assert_eq!(docs.generate(&productpage()).clusters[REVIEWS].lb, LbPolicy::PeakEwma);
    let mut foreign = productpage();
    foreign.metadata.remove("GENERATOR");
    foreign.user_agent = "envoy".into();
    let lb = docs.generate(&foreign).clusters[REVIEWS].lb;
    assert_eq!(lb, LbPolicy::LeastRequest(LeastRequest::default()));
}

const REVIEWS: &str = "outbound|9080||reviews.books.svc.cluster.local";

#[test]
fn a_service_with_remote_parts() {
    let g = bookstore().generate(&productpage());
    let c = &g.clusters[REVIEWS];
    assert_eq!(c.discovery, Discovery::Eds(REVIEWS.into()));
    let remote = &c.tls_matches[0];
    assert_eq!(remote.labels["flotilla.dev/cluster"], "east");
    let tls = remote.tls.as_ref().unwrap();
    assert_eq!(tls.sni, "outbound_.9080_._.reviews.books.svc.east.clusterset.local");
    assert_eq!(
        tls.validation.sans,
        [
            StringMatch::exact("spiffe://mesh.local/ns/books/sa/reviews"),
            StringMatch::exact("spiffe://mesh.local/ns/books/sa/reviews-east")
        ]
    );
    let local = c.tls_matches[1].tls.as_ref().unwrap();
    assert_eq!(local.sni, "outbound_.9080_._.reviews.books.svc.cluster.local");
    assert!(c.tls_matches[2].tls.is_none() && c.tls_matches[2].labels.is_empty());
    assert!(c.outlier.is_some(), "remote endpoints are ejected by default");

    let e = &g.endpoints[REVIEWS];
    assert_eq!(e.localities.len(), 2);
    assert!(e.localities.iter().all(|l| l.priority == 0));
    let here = &e.localities[0].endpoints[0];
    assert_eq!((here.address.as_str(), here.weight), ("10.1.0.5", 1));
    assert_eq!(here.transport_labels["tlsMode"], "istio");
    assert_eq!(here.workload, "reviews-v1;books;reviews;v1;west");
    let there = &e.localities[1].endpoints[0];
    assert_eq!((there.address.as_str(), there.port, there.weight), ("10.1.0.100", 15443, 3));

    // Subsets select groups.
    let weights = |v: &str| -> Vec<(String, u32)> {
        g.endpoints[&format!("outbound|9080|{v}|reviews.books.svc.cluster.local")]
            .localities
            .iter()
            .flat_map(|l| &l.endpoints)
            .map(|e| (e.address.clone(), e.weight))
            .collect()
    };
    assert_eq!(weights("v1"), [("10.1.0.5".to_owned(), 1)]);
    assert_eq!(weights("v2"), [("10.1.0.100".to_owned(), 2)]);
    let v2 = &g.clusters["outbound|9080|v2|reviews.books.svc.cluster.local"];
    let sni = &v2.tls_matches[0].tls.as_ref().unwrap().sni;
    assert_eq!(sni, "outbound_.9080_.v2_.reviews.books.svc.east.clusterset.local");
    // Nothing has a cluster of its own for the peer's part, except by its member name.
    assert!(g.clusters.contains_key("outbound|9080||reviews.books.svc.east.clusterset.local"));
}

#[test]
fn weights_are_exact_with_several_gateways() {
    let mut docs = bookstore();
    docs = docs.add(
        "ImportedService",
        "north/books/reviews",
        import(
            "north",
            "live",
            json!([
        {"labels": {"version": "v1"}, "locality": "r3", "healthyWeight": 5}]),
        ),
    );
    let (galley, federation) = docs.states();
    let mut s = settings();
    s.east_west = vec!["10.1.0.100:15443".parse().unwrap(), "10.1.0.101:15443".parse().unwrap()];
    let w = World::new(s, Reader::default().read(&galley, &federation));
    let g = generate(&ProxyNode::new(&productpage()).unwrap(), &w);
    let mut by_cluster: BTreeMap<String, u32> = BTreeMap::new();
    for e in g.endpoints[REVIEWS].localities.iter().flat_map(|l| &l.endpoints) {
        let to = e.transport_labels.get("flotilla.dev/cluster").cloned().unwrap_or_default();
        *by_cluster.entry(to).or_default() += e.weight;
    }
    // 1 local : 3 east : 5 north.
    assert_eq!(by_cluster, BTreeMap::from([(String::new(), 2), ("east".into(), 6), ("north".into(), 10)]));
}

#[test]
fn slots_share_their_weight_and_the_gateways() {
    let groups = json!([
        {"labels": {"version": "v2"}, "locality": "r2/a", "healthyWeight": 3, "slots": [1, 2, 3]},
        {"labels": {"version": "v3"}, "locality": "r2/b", "healthyWeight": 1, "slots": [4]}
    ]);
    let docs = bookstore().add("ImportedService", "east/books/reviews", import("east", "live", groups));
    let (galley, federation) = docs.states();
    let mut s = settings();
    s.east_west = vec!["10.1.0.100:15443".parse().unwrap(), "10.1.0.101:15443".parse().unwrap()];
    let w = World::new(s, Reader::default().read(&galley, &federation));
    let of = |node: &mesh_xds::NodeInfo, subset: &str| -> Vec<(String, Slots, u32)> {
        let g = generate(&ProxyNode::new(node).unwrap(), &w);
        let name = format!("outbound|9080|{subset}|reviews.books.svc.cluster.local");
        g.endpoints[&name]
            .localities
            .iter()
            .flat_map(|l| &l.endpoints)
            .map(|e| (e.address.replace("10.1.0.", ""), e.slots.clone(), e.weight))
            .collect()
    };
    let own = ("5".to_owned(), Slots::None, 2);
    let gw = |ip: &str, slot, weight| (ip.to_owned(), Slots::Asks(slot), weight);
    // A slot is behind one gateway, unless there are fewer slots than gateways.
    assert_eq!(
        of(&productpage(), ""),
        [own.clone(), gw("100", 1, 2), gw("101", 2, 2), gw("100", 3, 2), gw("101", 4, 1), gw("100", 4, 1)]
    );
    assert_eq!(of(&productpage(), "v2"), [gw("100", 1, 1), gw("101", 2, 1), gw("100", 3, 1)]);
    // Others get each gateway once.
    let mut envoy = productpage();
    envoy.metadata.remove("GENERATOR");
    envoy.user_agent = "envoy".into();
    let plain = |ip: &str, weight| (ip.to_owned(), Slots::None, weight);
    assert_eq!(of(&envoy, ""), [own, plain("100", 3), plain("101", 3), plain("100", 1), plain("101", 1)]);
}

#[test]
fn what_is_behind_a_gateway_that_drains_moves_and_nothing_else_does() {
    let groups = json!([
        {"labels": {"version": "v2"}, "locality": "r2/a", "healthyWeight": 6, "slots": [1, 2, 3, 4, 5, 6]},
        {"labels": {"version": "v3"}, "locality": "r2/b", "healthyWeight": 1, "slots": [7]}
    ]);
    let docs = bookstore().add("ImportedService", "east/books/reviews", import("east", "live", groups));
    let at = |ip: &str| format!("10.1.0.{ip}:15443").parse::<std::net::SocketAddr>().unwrap();
    let of = |node: &mesh_xds::NodeInfo, draining: &[&str]| {
        let (galley, federation) = docs.states();
        let s = Settings { east_west: ["100", "101", "102"].map(at).to_vec(), ..settings() };
        let w = World::new(s, Reader::default().read(&galley, &federation))
            .with_draining(draining.iter().map(|d| at(d).ip()).collect());
        let g = generate(&ProxyNode::new(node).unwrap(), &w);
        check(&g);
        let ends = |name: &str| -> Vec<LbEndpoint> {
            let Some(a) = g.endpoints.get(name) else { return vec![] };
            a.localities.iter().flat_map(|l| &l.endpoints).cloned().collect()
        };
        (ends(REVIEWS), ends(OWN_GATEWAYS))
    };
    // Gateways of each slot that take traffic, and its share of the remote part in parts of 700.
    let ways = |ends: &[LbEndpoint]| {
        let remote = ends.iter().filter(|e| e.transport_labels.contains_key("flotilla.dev/cluster"));
        let live: Vec<_> = remote.filter(|e| e.health == EndpointHealth::Healthy).collect();
        let total: u32 = live.iter().map(|e| e.weight).sum();
        let mut by: BTreeMap<u32, (Vec<String>, u32)> = BTreeMap::new();
        for e in live {
            let Slots::Asks(slot) = e.slots else { panic!("{e:?}") };
            let way = by.entry(slot).or_default();
            way.0.push(e.address.replace("10.1.0.", ""));
            way.1 += e.weight;
        }
        by.values_mut().for_each(|way| way.1 = way.1 * 700 / total);
        by
    };
    let (before, own) = of(&productpage(), &[]);
    assert!(own.iter().all(|e| e.health == EndpointHealth::Healthy) && own.len() == 3);
    let (during, own) = of(&productpage(), &["101"]);
    assert_eq!(own.iter().filter(|e| e.health == EndpointHealth::Draining).count(), 1);
    let (before, moved) = (ways(&before), ways(&during));
    for (slot, (gateways, share)) in &before {
        let (now, still) = &moved[slot];
        assert_eq!(share, still, "slot {slot}");
        let kept: Vec<_> = gateways.iter().filter(|g| *g != "101").collect();
        assert!(kept.iter().all(|g| now.contains(g)), "slot {slot}: {gateways:?}, then {now:?}");
        assert!(!now.contains(&"101".to_owned()));
        assert!(kept.len() == gateways.len() || !now.is_empty(), "slot {slot}");
    }
    let to = |slot: u32| moved[&slot].0.as_slice();
    assert_eq!((to(2), to(5)), (&["100".to_owned()][..], &["102".to_owned()][..]), "they spread");
    // What runs there may finish.
    let of_second = |ends: &[LbEndpoint]| {
        let there = ends.iter().filter(|e| e.address == "10.1.0.101");
        there.map(|e| (e.slots.clone(), e.health)).collect::<Vec<_>>()
    };
    let waits = |slot| (Slots::Asks(slot), EndpointHealth::Draining);
    assert_eq!(of_second(&during), [waits(2), waits(5), waits(7)]);

    // Where all drain, one is as good as another.
    let (all, own) = of(&productpage(), &["100", "101", "102"]);
    assert_eq!(ways(&all), before);
    assert!(own.iter().all(|e| e.health == EndpointHealth::Healthy));
    // Others do without it, with the same weight for the peer.
    let mut envoy = productpage();
    envoy.metadata.remove("GENERATOR");
    envoy.user_agent = "envoy".into();
    let share = |ends: &[LbEndpoint]| {
        let (own, remote): (Vec<_>, Vec<_>) = ends.iter().partition(|e| e.address == "10.1.0.5");
        let sum = |ends: Vec<&LbEndpoint>| ends.iter().map(|e| e.weight).sum::<u32>();
        (sum(remote) / sum(own), ends.iter().all(|e| e.health == EndpointHealth::Healthy))
    };
    let (ends, own) = of(&envoy, &["101"]);
    assert_eq!((share(&ends), own), ((7, true), vec![]));
    assert!(ends.iter().all(|e| e.address != "10.1.0.101"));
}

#[test]
fn a_lapsed_peer_comes_last() {
    let docs = bookstore().add(
        "ImportedService",
        "east/books/reviews",
        import("east", "lapsed", json!([{"labels": {}, "locality": "r2/z1", "healthyWeight": 2}])),
    );
    let e = &docs.generate(&productpage()).endpoints[REVIEWS];
    assert_eq!(
        e.localities.iter().map(|l| (l.priority, l.endpoints.len())).collect::<Vec<_>>(),
        [(0, 1), (1, 1)]
    );
    // Without anything live it is what is left.
    let only = Docs::default()
        .add(
            "ImportedService",
            "east/books/reviews",
            import("east", "lapsed", json!([{"labels": {}, "locality": "", "healthyWeight": 2}])),
        )
        .generate(&productpage());
    assert_eq!(only.endpoints[REVIEWS].localities[0].priority, 0);
}

/// Localities as priority and number of endpoints, with a lapsed peer.
fn with_lapsed(docs: Docs) -> Vec<(u32, usize)> {
    let docs = docs.add(
        "ImportedService",
        "east/books/reviews",
        import("east", "lapsed", json!([{"labels": {}, "locality": "r2/z1", "healthyWeight": 2}])),
    );
    let g = docs.generate(&productpage());
    g.endpoints[REVIEWS].localities.iter().map(|l| (l.priority, l.endpoints.len())).collect()
}

#[test]
fn a_lapsed_peer_is_kept_demoted_or_refused_as_chosen() {
    let policy = |rule: Value| bookstore().add("ImportPolicy", "all", json!({ "rules": [rule] }));
    assert_eq!(with_lapsed(policy(json!({"onLapse": "keep"}))), [(0, 1), (0, 1)]);
    assert_eq!(with_lapsed(policy(json!({"onLapse": "demote"}))), [(0, 1), (1, 1)]);
    assert_eq!(with_lapsed(policy(json!({"onLapse": "refuse"}))), [(0, 1)]);
    assert_eq!(with_lapsed(policy(json!({"peers": ["west"], "onLapse": "refuse"}))), [(0, 1), (1, 1)]);
    // The service's own word comes first.
    let own = |value: &str| {
        Docs::default()
            .add("Service", "books/reviews", service(9080, "http", "reviews"))
            .annotate("flotilla.dev/on-lapse", value)
            .add("WorkloadEntry", "books/reviews-v1", workload("10.1.0.5", "reviews", "v1"))
            .add("PeerCluster", "east", peer("east", "203.0.113.2"))
            .add("ImportPolicy", "all", json!({"rules": [{"onLapse": "keep"}]}))
    };
    assert_eq!(with_lapsed(own("refuse")), [(0, 1)]);
    assert_eq!(with_lapsed(own("demote")), [(0, 1), (1, 1)]);
    assert_eq!(with_lapsed(own("keep")), [(0, 1), (0, 1)]);
    // A live peer is used whatever was chosen.
    let live = policy(json!({"onLapse": "refuse"})).generate(&productpage());
    assert!(live.endpoints[REVIEWS].localities.iter().flat_map(|l| &l.endpoints).count() > 1);
}

#[test]
fn only_who_is_believed_is_imported() {
    let rules = |rules: Value| {
        let w = bookstore().add("ImportPolicy", "all", json!({ "rules": rules })).world();
        w.config.imports.len()
    };
    assert_eq!(rules(json!([])), 1);
    assert_eq!(rules(json!([{"peers": ["east"], "namespaces": ["books"], "action": "DENY"}])), 0);
    assert_eq!(rules(json!([{"peers": ["east"], "namespaces": ["other"], "action": "DENY"}])), 1);
    assert_eq!(rules(json!([{"peers": ["west"], "action": "DENY"}])), 1);
    assert_eq!(rules(json!([{"peers": ["east"]}, {"action": "DENY"}])), 1, "the first that matches");
    assert_eq!(rules(json!([{"action": "DENY"}, {"peers": ["east"]}])), 0, "the first that matches");
}

#[test]
fn exports_are_for_whom_annotation_and_policy_say() {
    use mesh_model::federation::Audience;
    let told = |annotation: Option<&str>, rules: Value| {
        let mut docs = bookstore().add("ExportPolicy", "all", json!({ "rules": rules }));
        docs = docs.add("ServiceExport", "books/reviews", json!({}));
        if let Some(a) = annotation {
            docs = docs.annotate("flotilla.dev/export-to", a);
        }
        let (all, problems) = crate::exports::exports(&docs.world());
        assert!(problems.is_empty(), "{problems:?}");
        let offer: mesh_model::federation::Offer = all["books/reviews"].spec().unwrap();
        assert_eq!(offer.service.name, "reviews");
        offer.audience
    };
    let set = |names: &[&str]| names.iter().map(|n| mesh_model::ClusterId::new(n).unwrap()).collect();
    assert_eq!(told(None, json!([])), Audience::All);
    assert_eq!(told(Some("*"), json!([])), Audience::All);
    assert_eq!(told(Some("east, west"), json!([])), Audience::Only(set(&["east", "west"])));
    let deny = json!([{"peers": ["east"], "action": "DENY"}]);
    assert_eq!(told(None, deny.clone()), Audience::Except(set(&["east"])));
    assert_eq!(told(Some("east,west"), deny), Audience::Only(set(&["west"])));
    let only = json!([{"peers": ["east"]}, {"action": "DENY"}]);
    assert_eq!(told(None, only.clone()), Audience::Only(set(&["east"])));
    assert_eq!(told(Some("west"), only), Audience::Only(set(&[])));
    assert_eq!(told(None, json!([{"namespaces": ["other"], "action": "DENY"}])), Audience::All);
    let both = json!([{"peers": ["east"]}, {"peers": ["east", "west"], "action": "DENY"}]);
    assert_eq!(told(None, both), Audience::Except(set(&["west"])), "the first rule that matches");
}

#[test]
fn an_imported_service_without_a_local_one() {
    let docs = Docs::default()
        .add(
            "ImportedService",
            "east/books/reviews",
            import("east", "live", json!([{"labels": {}, "locality": "", "healthyWeight": 2}])),
        )
        .add("PeerCluster", "east", peer("east", "203.0.113.2"));
    let g = docs.generate(&productpage());
    let r = &g.routes["9080"];
    let v = vhost(r, "reviews.books.svc.cluster.local");
    for d in [
        "reviews",
        "reviews:9080",
        "reviews.books",
        "reviews.books.svc",
        "reviews.books.svc.clusterset.local",
        "reviews.books.global",
        "reviews.books.global:9080",
    ] {
        assert!(v.domains.iter().any(|x| x == d), "{d} not in {:?}", v.domains);
    }
    let names = name_table(&ProxyNode::new(&productpage()).unwrap(), &docs.world());
    let n = &names.table["reviews.books.svc.cluster.local"];
    assert!(n.ips[0].starts_with("240.240."), "{n:?}");
    assert!(n.alt_hosts.contains(&"reviews.books.svc.clusterset.local".to_owned()));
    assert!(v.domains.contains(&n.ips[0]));
}

#[test]
fn names_of_a_headless_service_are_its_ready_pods() {
    let db = |publish: bool| {
        json!({"clusterIP": "None", "selector": {"app": "db"}, "publishNotReadyAddresses": publish,
               "ports": [{"name": "SQL", "port": 5432}, {"name": "gossip", "port": 7946, "protocol": "UDP"}]})
    };
    let pod = |ip: &str| json!({"address": ip, "labels": {"app": "db"}, "ports": {"SQL": 15432}});
    let table = |publish: bool| {
        let docs = bookstore()
            .add("Service", "books/db", db(publish))
            .add("ServiceExport", "books/db", json!({}))
            .add("WorkloadEntry", "books/db-0", pod("10.0.0.50"))
            .add("WorkloadEntry", "books/db-1", pod("10.0.0.51"))
            .annotate("flotilla.dev/health", "unhealthy")
            // Not a label: it is there, without a name.
            .add("WorkloadEntry", "books/db.2", pod("10.0.0.52"));
        let names = name_table(&ProxyNode::new(&productpage()).unwrap(), &docs.world());
        names.table["db.books.svc.cluster.local"].clone()
    };
    let n = table(false);
    assert!(n.headless);
    assert_eq!(n.ips, ["10.0.0.50", "10.0.0.52"]);
    assert!(n.alt_hosts.contains(&"db.books.svc.clusterset.local".to_owned()));
    let [p] = n.pods.as_slice() else { panic!("{:?}", n.pods) };
    assert_eq!(
        (p.name.as_str(), p.cluster.as_str(), p.ips.as_slice()),
        ("db-0", "west", &["10.0.0.50".to_owned()][..])
    );
    let ports: Vec<_> = p.ports.iter().map(|p| (p.name.as_str(), p.number, p.udp)).collect();
    assert_eq!(ports, [("sql", 15432, false), ("gossip", 7946, true)]);
    assert_eq!(table(true).pods.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["db-0", "db-1"]);
}

#[test]
fn outbound_listeners_of_a_sidecar() {
    let docs = bookstore()
        .add("Service", "books/db", service(3306, "mysql", "db"))
        .add("Service", "books/raw", service(7000, "", "raw"))
        .add("Service", "books/secure", service(8443, "tls", "secure"))
        .add(
            "ServiceEntry",
            "books/ext",
            json!({"hosts": ["api.example.com"], "ports": [{"number": 443, "name": "https", "protocol": "HTTPS"},
                   {"number": 80, "name": "http", "protocol": "HTTP"}], "resolution": "DNS"}),
        );
    let g = docs.generate(&productpage());
    let v = &g.listeners["virtualOutbound"];
    assert!(v.use_original_dst && v.bind_to_port && !v.transparent);
    assert_eq!(tcp_cluster(&v.filter_chains[0]), "PassthroughCluster");
    let h = &g.listeners["0.0.0.0_9080"];
    assert!(!h.bind_to_port && !h.inspect_http);
    assert_eq!(http(&h.filter_chains[0]).routes, RouteSource::Rds("9080".into()));
    let db = &g.listeners["10.96.0.2_3306"];
    assert!(!db.inspect_http && !db.inspect_tls, "server-first protocols must not wait");
    assert_eq!(tcp_cluster(&db.filter_chains[0]), "outbound|3306||db.books.svc.cluster.local");
    let raw = &g.listeners["10.96.0.3_7000"];
    assert!(raw.inspect_http);
    assert_eq!(
        http(&raw.filter_chains[0]).routes,
        RouteSource::Rds("raw.books.svc.cluster.local:7000".into())
    );
    assert_eq!(
        tcp_cluster(raw.default_filter_chain.as_ref().unwrap()),
        "outbound|7000||raw.books.svc.cluster.local"
    );
    assert_eq!(
        tcp_cluster(g.listeners["10.96.0.6_8443"].default_filter_chain.as_ref().unwrap()),
        "outbound|8443||secure.books.svc.cluster.local"
    );
    // An external host is told apart by its server name.
    let ext = &g.listeners["0.0.0.0_443"];
    assert!(ext.inspect_tls);
    assert_eq!(ext.filter_chains[0].matches.server_names, ["api.example.com"]);
    let c = &g.clusters["outbound|443||api.example.com"];
    assert!(c.tls.is_none() && c.tls_matches.is_empty(), "no mesh TLS outside the mesh");
    assert!(
        matches!(&c.discovery, Discovery::StrictDns(a) if a.localities[0].endpoints[0].address == "api.example.com")
    );
    assert_eq!(vhost(&g.routes["80"], "api.example.com").name, "api.example.com:80");
    assert_eq!(vhost(&g.routes["80"], "*").name, "allow_any");
}

#[test]
fn undeclared_destinations_can_be_refused() {
    let docs =
        bookstore().add("MeshConfig", "mesh", json!({"outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"}}));
    let g = docs.generate(&productpage());
    assert_eq!(tcp_cluster(&g.listeners["virtualOutbound"].filter_chains[0]), "BlackHoleCluster");
    assert_eq!(vhost(&g.routes["9080"], "*").name, "block_all");
}

#[test]
fn without_interception_the_ports_are_bound() {
    let n = node(
        NodeKind::Sidecar,
        "10.1.0.5",
        "reviews-v1",
        json!({"LABELS": {"app": "reviews", "version": "v1"}, "INTERCEPTION_MODE": "NONE", "HTTP_PROXY_PORT": 15080,
               "FLOTILLA_INBOUND": {"9080": "127.10.1.5:19080"}}),
    );
    let g = bookstore().generate(&n);
    assert_eq!(
        g.listeners.keys().collect::<Vec<_>>(),
        ["10.1.0.5_15080", "10.1.0.5_9080", "connect_terminate"]
    );
    let proxy = &g.routes["http_proxy"];
    let v = vhost(proxy, "reviews.books.svc.cluster.local:9080");
    assert!(!v.domains.contains(&"reviews.books.svc.cluster.local".to_owned()), "a bare host means port 80");
    assert_eq!(vhost(proxy, "*").name, "block_all");
    let Discovery::Static(a) = &g.clusters["inbound|9080||"].discovery else { panic!() };
    let e = &a.localities[0].endpoints[0];
    assert_eq!((e.address.as_str(), e.port), ("127.10.1.5", 19080));
    let inbound = &g.listeners["10.1.0.5_9080"];
    assert!(inbound.bind_to_port && inbound.inspect_tls);
    assert_eq!(inbound.filter_chains.len(), 3, "mTLS, the application's own TLS, plaintext");
}

#[test]
fn inbound_modes() {
    let with = |mode: &str| {
        bookstore()
            .add("PeerAuthentication", "books/default", json!({"mtls": {"mode": mode}}))
            .generate(&productpage())
    };
    let chains = |g: &Generated| -> Vec<FilterChain> {
        let l = g.listeners["virtualInbound"].clone();
        l.filter_chains.into_iter().filter(|c| c.matches.destination_port == Some(9080)).collect()
    };
    let strict = chains(&with("STRICT"));
    assert_eq!(strict.len(), 1);
    let tls = strict[0].tls.as_ref().unwrap();
    assert!(matches!(&tls.client_certificate, ClientCertificate::Required(v) if v.trusted.is_some()));
    assert_eq!(strict[0].matches.transport_protocol, Some(TransportProtocol::Tls));
    assert!(strict[0].matches.application_protocols.is_empty());

    let permissive = chains(&with("PERMISSIVE"));
    assert_eq!(permissive.len(), 3);
    assert!(permissive[0].matches.application_protocols.contains(&"istio".to_owned()));
    assert!(permissive[2].tls.is_none());
    assert_eq!(permissive[2].matches.transport_protocol, Some(TransportProtocol::RawBuffer));

    let g = with("DISABLE");
    let disable = chains(&g);
    assert_eq!((disable.len(), disable[0].tls.is_none()), (1, true));
    // Callers are told not to try mTLS.
    let e = &g.endpoints["outbound|9080||productpage.books.svc.cluster.local"].localities[0].endpoints[0];
    assert!(e.transport_labels.is_empty());
    // Undeclared ports are not a way around.
    let l = &with("STRICT").listeners["virtualInbound"];
    assert!(l.filter_chains.iter().all(|c| c.tls.is_some()));
}

#[test]
fn peer_authentication_levels() {
    let docs = bookstore()
        .add("PeerAuthentication", "istio-system/default", json!({"mtls": {"mode": "STRICT"}}))
        .add(
            "PeerAuthentication",
            "books/pp",
            json!({"selector": {"matchLabels": {"app": "productpage"}},
             "mtls": {"mode": "PERMISSIVE"}, "portLevelMtls": {"9080": {"mode": "DISABLE"}}}),
        );
    let w = docs.world();
    use mesh_model::authored::MutualTlsMode as M;
    let labels = |app: &str| [("app".to_owned(), app.to_owned())].into();
    let some = ProxyNode::new(&productpage()).unwrap();
    let mode = |namespace: &str, labels: mesh_model::registry::Labels, port| {
        w.mtls_mode(&ProxyNode { namespace: namespace.to_owned(), labels, ..some.clone() }, port)
    };
    assert_eq!(mode("books", labels("reviews"), 9080), M::Strict);
    assert_eq!(mode("books", labels("productpage"), 9080), M::Disable);
    assert_eq!(mode("books", labels("productpage"), 80), M::Permissive);
    assert_eq!(mode("other", labels("x"), 80), M::Strict);
}

fn vs(spec: Value) -> Vec<Route> {
    let docs = bookstore().add("VirtualService", "books/reviews", spec);
    let g = docs.generate(&productpage());
    vhost(&g.routes["9080"], "reviews").routes.clone()
}

#[test]
fn virtual_service_matches() {
    let routes = vs(json!({"hosts": ["reviews"], "http": [
        {"name": "jason", "match": [
            {"headers": {"end-user": {"exact": "jason"}}, "uri": {"prefix": "/reviews"}, "method": {"exact": "GET"}},
            {"queryParams": {"v": {"regex": "2.*"}}, "withoutHeaders": {"x-no": {}}, "ignoreUriCase": true, "uri": {"exact": "/A"}},
            {"port": 1, "uri": {"exact": "/never"}},
            {"sourceLabels": {"app": "other"}, "uri": {"exact": "/never"}},
            {"gateways": ["edge"], "uri": {"exact": "/never"}}],
         "route": [{"destination": {"host": "reviews", "subset": "v2"}}]},
        {"route": [{"destination": {"host": "reviews", "subset": "v1"}, "weight": 80},
                   {"destination": {"host": "reviews", "subset": "v3"}, "weight": 20},
                   {"destination": {"host": "reviews", "subset": "v2"}, "weight": 0}]},
        {"match": [{"uri": {"prefix": "/unreachable"}}], "route": [{"destination": {"host": "reviews"}}]}
    ]}));
    assert_eq!(routes.len(), 3, "{routes:#?}");
    let m = &routes[0].matches;
    assert_eq!(routes[0].name, "jason");
    assert_eq!(m.path, PathMatch::Prefix("/reviews".into()));
    let names: Vec<&str> = m.headers.iter().map(|h| h.name.as_str()).collect();
    assert_eq!(names, [":method", "end-user"]);
    let m = &routes[1].matches;
    assert!(!m.case_sensitive && m.headers[0].invert);
    assert_eq!(m.query[0].value, Some(StringMatch::regex("2.*")));
    let f = forward(&routes[2]);
    let split: Vec<(&str, u32)> = f.clusters.iter().map(|c| (c.cluster.as_str(), c.weight)).collect();
    assert_eq!(
        split,
        [
            ("outbound|9080|v1|reviews.books.svc.cluster.local", 80),
            ("outbound|9080|v3|reviews.books.svc.cluster.local", 20)
        ]
    );
    assert_eq!(f.timeout, None);
    assert_eq!(f.retry.as_ref().unwrap().attempts, 2);
}

#[test]
fn virtual_service_actions() {
    let routes = vs(json!({"hosts": ["reviews"], "http": [
        {"match": [{"uri": {"exact": "/r"}}], "redirect": {"uri": "/n", "authority": "h", "redirectCode": 308, "scheme": "https", "port": 8443}},
        {"match": [{"uri": {"exact": "/d"}}], "directResponse": {"status": 418, "body": {"string": "tea"}}},
        {"match": [{"uri": {"prefix": "/p"}}], "rewrite": {"uri": "/q", "authority": "x"}, "timeout": "1.5s",
         "retries": {"attempts": 3, "perTryTimeout": "2s", "retryOn": "gateway-error,503,reset,retriable-headers,envoy-ratelimited"},
         "fault": {"delay": {"fixedDelay": "7s", "percentage": {"value": 0.5}}, "abort": {"httpStatus": 500, "percent": 10}},
         "mirror": {"host": "reviews", "subset": "v3"}, "mirrorPercentage": {"value": 25.0},
         "corsPolicy": {"allowOrigins": [{"prefix": "https://a"}], "allowMethods": ["GET", "POST"], "maxAge": "24h", "allowCredentials": true},
         "headers": {"request": {"set": {"a": "1"}, "add": {"b": "2"}, "remove": ["c"]}, "response": {"remove": ["d"]}},
         "route": [{"destination": {"host": "reviews"}}]},
        {"match": [{"uri": {"regex": "/x/.*"}}], "rewrite": {"uriRegexRewrite": {"match": "^/x", "rewrite": "/y"}}, "retries": {"attempts": 0},
         "fault": {"abort": {"grpcStatus": "UNAVAILABLE", "percentage": {"value": 100.0}}},
         "route": [{"destination": {"host": "reviews", "port": {"number": 9080}}}]}
    ]}));
    let RouteAction::Redirect(r) = &routes[0].action else { panic!() };
    assert_eq!(
        (r.status, r.port, r.path.as_deref(), r.host.as_deref()),
        (308, Some(8443), Some("/n"), Some("h"))
    );
    let RouteAction::Direct(d) = &routes[1].action else { panic!() };
    assert_eq!((d.status, d.body.as_slice()), (418, b"tea".as_slice()));
    let f = forward(&routes[2]);
    assert_eq!((f.prefix_rewrite.as_deref(), f.host_rewrite.as_deref()), (Some("/q"), Some("x")));
    assert_eq!(f.timeout.unwrap().as_millis(), 1500);
    let retry = f.retry.as_ref().unwrap();
    let named = [RetryOn::GatewayError, RetryOn::Reset, RetryOn::RetriableHeaders, RetryOn::EnvoyRateLimited];
    assert_eq!(retry.on, [&named[..], &[RetryOn::RetriableStatusCodes]].concat());
    assert_eq!(retry.status_codes, [503]);
    assert_eq!(f.mirrors[0].fraction, 250_000);
    let fault = routes[2].fault.as_ref().unwrap();
    assert_eq!(fault.delay.unwrap().1, 5_000);
    assert_eq!(fault.abort, Some((AbortKind::Http(500), 100_000)));
    let cors = routes[2].cors.as_ref().unwrap();
    assert_eq!((cors.allow_methods.as_str(), cors.max_age.as_str()), ("GET,POST", "86400"));
    assert_eq!(routes[2].request_headers.set, [("a".to_owned(), "1".to_owned())]);
    assert_eq!(routes[2].response_headers.remove, ["d"]);
    let f = forward(&routes[3]);
    assert!(f.retry.is_none());
    assert_eq!(f.regex_rewrite.as_ref().unwrap().1, "/y");
    assert_eq!(routes[3].fault.as_ref().unwrap().abort, Some((AbortKind::Grpc(14), 1_000_000)));
}

#[test]
fn destination_rule_settings() {
    let docs = bookstore().add(
        "DestinationRule",
        "books/pp",
        json!({"host": "productpage", "trafficPolicy": {
            "loadBalancer": {"consistentHash": {"httpCookie": {"name": "u", "ttl": "0s"}}},
            "connectionPool": {"tcp": {"maxConnections": 7, "connectTimeout": "250ms"}, "http": {"http1MaxPendingRequests": 3, "maxRequestsPerConnection": 1}},
            "outlierDetection": {"consecutive5xxErrors": 3, "interval": "1s", "baseEjectionTime": "2s", "maxEjectionPercent": 100},
            "tls": {"mode": "DISABLE"}}}),
    );
    let g = docs.generate(&productpage());
    let c = &g.clusters["outbound|9080||productpage.books.svc.cluster.local"];
    assert_eq!(c.lb, LbPolicy::RingHash(1024));
    assert_eq!((c.limits.max_connections, c.limits.max_pending, c.max_requests_per_connection), (7, 3, 1));
    assert_eq!(c.connect_timeout.as_millis(), 250);
    let o = c.outlier.as_deref().unwrap();
    assert_eq!((o.consecutive_5xx, o.consecutive_gateway, o.max_percent), (3, 0, 100));
    assert!(c.tls.is_none() && c.tls_matches.is_empty());
    let r = &vhost(&g.routes["9080"], "productpage").routes[0];
    assert_eq!(
        forward(r).hash,
        [HashPolicy::Cookie {
            name: "u".into(),
            path: String::new(),
            ttl: Some(std::time::Duration::ZERO),
            attributes: vec![]
        }]
    );
    // The rule's pool settings hold at the workload as well.
    assert_eq!(g.clusters["inbound|9080||"].limits.max_connections, 7);
    // Who wants no balancing connects to where the caller did.
    let to_reviews = json!({"host": "reviews", "trafficPolicy": {"loadBalancer": {"simple": "PASSTHROUGH"}}});
    let g = docs.add("DestinationRule", "books/reviews", to_reviews).generate(&productpage());
    let c = &g.clusters["outbound|9080||reviews.books.svc.cluster.local"];
    assert!(matches!(c.discovery, Discovery::OriginalDst), "{:?}", c.discovery);
}

#[test]
fn the_proxy_protocol_is_before_mutual_tls_too_but_not_towards_gateways() {
    let rule = |host: &str| {
        let spec = json!({"host": host, "trafficPolicy": {"proxyProtocol": {"version": "V2"}}});
        bookstore().add("DestinationRule", &format!("books/{host}-proxy"), spec).generate(&productpage())
    };
    let g = rule("productpage");
    let c = &g.clusters["outbound|9080||productpage.books.svc.cluster.local"];
    assert_eq!((c.proxy_protocol, c.tls_matches.len()), (Some(ProxyProtocolVersion::V2), 2));
    // This one has endpoints in another cluster.
    assert_eq!(rule("reviews").clusters[REVIEWS].proxy_protocol, None);
}

#[test]
fn locality_failover_and_distribution() {
    let rule = |lb: Value| {
        bookstore()
            .add("WorkloadEntry", "books/reviews-far", json!({"address": "10.1.0.6", "serviceAccount": "reviews", "locality": "r1/z2",
                 "labels": {"app": "reviews", "version": "v1", "security.istio.io/tlsMode": "istio"}}))
            .add("DestinationRule", "books/reviews", json!({"host": "reviews", "trafficPolicy": {
                 "outlierDetection": {"consecutive5xxErrors": 5}, "loadBalancer": {"localityLbSetting": lb}}}))
            .generate(&productpage())
    };
    let g = rule(json!({"enabled": true}));
    let order: Vec<(u32, String)> =
        g.endpoints[REVIEWS].localities.iter().map(|l| (l.priority, l.locality.to_string())).collect();
    assert_eq!(order, [(0, "r1/z1".into()), (1, "r1/z2".into()), (2, "r2/z1".into())]);
    let g = rule(json!({"distribute": [{"from": "r1/*", "to": {"r1/z1": 70, "r2/*": 30}}]}));
    let e = &g.endpoints[REVIEWS];
    let shares: Vec<(String, u32)> =
        e.localities.iter().map(|l| (l.locality.to_string(), l.weight)).collect();
    assert_eq!(shares, [("r1/z1".into(), 70_000), ("r2/z1".into(), 30_000)]);
    assert!(g.clusters[REVIEWS].locality_weighted);
    let g = rule(json!({"failoverPriority": ["topology.istio.io/cluster"]}));
    assert_eq!(g.endpoints[REVIEWS].localities.iter().map(|l| l.priority).collect::<Vec<_>>(), [0, 0, 1]);
}

#[test]
fn scoping() {
    let docs = bookstore()
        .add("Service", "shop/cart", service(9080, "http", "cart"))
        .add("Service", "shop/hidden", service(9081, "http", "hidden"))
        .annotate("networking.istio.io/exportTo", ".")
        .add("Sidecar", "books/default", json!({"egress": [{"hosts": ["./*", "~/*"]}]}));
    let g = docs.generate(&productpage());
    assert!(g.clusters.contains_key(REVIEWS));
    assert!(!g.clusters.contains_key("outbound|9080||cart.shop.svc.cluster.local"));
    let mut other = productpage();
    other.metadata.insert("NAMESPACE".into(), "free".into());
    other.namespace = "free".into();
    let g = docs.generate(&other);
    assert!(g.clusters.contains_key("outbound|9080||cart.shop.svc.cluster.local"));
    assert!(!g.clusters.contains_key("outbound|9081||hidden.shop.svc.cluster.local"));
    // Short names are those of the caller's namespace.
    let v = vhost(&g.routes["9080"], "reviews.books");
    assert!(!v.domains.contains(&"reviews".to_owned()));
}

#[test]
fn tls_origination() {
    let docs = bookstore()
        .add("ServiceEntry", "books/ext", json!({"hosts": ["ext.example.com"], "ports": [{"number": 443, "name": "http", "protocol": "HTTP"}], "resolution": "DNS"}))
        .add("DestinationRule", "books/ext", json!({"host": "ext.example.com", "trafficPolicy": {"portLevelSettings": [{"port": {"number": 443}, "tls": {"mode": "SIMPLE"}}]}}));
    let c = &docs.generate(&productpage()).clusters["outbound|443||ext.example.com"];
    let t = c.tls.as_ref().unwrap();
    assert_eq!(t.sni, "ext.example.com");
    assert_eq!(t.validation.sans, [StringMatch::exact("ext.example.com")]);
    assert!(t.certificate.is_none() && t.validation.trusted.is_some());
}

#[test]
fn replicas_share_what_they_call() {
    let w = bookstore().world();
    let first = ProxyNode::new(&productpage()).unwrap();
    let mut second = productpage();
    second.ip = Some("10.1.0.9".parse().unwrap());
    second.id = second.id.replace("10.1.0.1", "10.1.0.9");
    let second = ProxyNode::new(&second).unwrap();
    let class = |p: &ProxyNode, w: &World| p.class(w.telling_labels());
    assert_eq!(class(&first, &w), class(&second, &w));
    for p in [&first, &second] {
        let (shared, own) = (shared(&class(p, &w), &w), own(p, &w));
        assert!(shared.listeners.keys().all(|k| !own.listeners.contains_key(k)));
        assert!(shared.clusters.keys().all(|k| !own.clusters.contains_key(k)));
    }
    // Other workloads of a namespace call the same, unless something tells them apart.
    let mut other = productpage();
    other.metadata.insert("LABELS".into(), json!({"app": "other"}));
    other.metadata.insert("SERVICE_ACCOUNT".into(), json!("other"));
    let other = ProxyNode::new(&other).unwrap();
    assert_eq!(class(&first, &w), class(&other, &w));
    let routed = |source: Value| {
        json!({"hosts": ["reviews"], "http": [
        {"match": [{"sourceLabels": source}], "route": [{"destination": {"host": "ratings"}}]},
        {"route": [{"destination": {"host": "reviews"}}]}]})
    };
    let selected = json!({"host": "reviews", "workloadSelector": {"matchLabels": {"app": "other"}},
        "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}});
    let scoped = json!({"workloadSelector": {"labels": {"app": "other"}}, "egress": [{"hosts": ["./ratings.books.svc.cluster.local"]}]});
    let failover = json!({"host": "reviews", "trafficPolicy": {"outlierDetection": {"interval": "1s"},
        "loadBalancer": {"localityLbSetting": {"failoverPriority": ["app"]}}}});
    for (kind, spec) in [
        ("VirtualService", routed(json!({"app": "other"}))),
        ("DestinationRule", selected),
        ("Sidecar", scoped),
        ("DestinationRule", failover),
    ] {
        let w = bookstore().add(kind, "books/x", spec).world();
        assert_ne!(class(&first, &w), class(&other, &w), "{kind}");
        // What a class leaves out is without effect on what it has.
        let all = first.labels.keys().chain(other.labels.keys()).cloned().collect();
        for p in [&first, &other] {
            let whole = ProxyNode { service_account: p.service_account.clone(), ..p.class(&all) };
            assert_eq!(
                format!("{:?}", shared(&whole, &w)),
                format!("{:?}", shared(&class(p, &w), &w)),
                "{kind}"
            );
        }
    }
}

#[test]
fn equal_inputs_give_equal_versions() {
    let a = bookstore().generate(&productpage());
    let b = bookstore().generate(&productpage());
    assert_eq!(codec::version(&a.listeners), codec::version(&b.listeners));
    assert_eq!(codec::version(&a.clusters), codec::version(&b.clusters));
    let t = |d: &Docs| name_table(&ProxyNode::new(&productpage()).unwrap(), &d.world()).to_any();
    assert_eq!(t(&bookstore()), t(&bookstore()));
}

/// Twice the services may cost somewhat more than twice the time, not four times.
#[test]
fn cost_grows_with_the_number_of_services() {
    let world = |n: usize| {
        let mut docs = Docs::default();
        for i in 0..n {
            docs = docs
                .add("Service", &format!("ns{}/s{i}", i % 50), json!({"selector": {"app": format!("s{i}")}, "ports": [{"name": "http", "port": 8080}]}))
                .add("WorkloadEntry", &format!("ns{}/s{i}", i % 50), json!({"address": format!("10.{}.{}.{}", i / 65536, (i / 256) % 256, i % 256), "labels": {"app": format!("s{i}"), "security.istio.io/tlsMode": "istio"}}));
        }
        docs.states()
    };
    let time = |n: usize| {
        let (g, f) = world(n);
        let started = std::time::Instant::now();
        let w = World::new(settings(), Reader::default().read(&g, &f));
        let made = generate(&ProxyNode::new(&productpage()).unwrap(), &w);
        assert_eq!(made.clusters.len(), n + 5);
        started.elapsed()
    };
    time(100);
    let (small, large) = (time(500), time(4000));
    assert!(large < small * 40, "8 times the services took {large:?} against {small:?}");
    assert!(large.as_secs() < 20, "{large:?}");
}

#[test]
fn tunnels_into_the_workload_and_out_of_it() {
    let docs = || {
        bookstore()
            .add("Service", "books/db", service(3306, "tcp", "db"))
            .add("WorkloadEntry", "books/db-1", {
                let mut w = workload("10.1.0.9", "db", "v1");
                w["labels"]["networking.istio.io/tunnel"] = "http".into();
                w
            })
            .add("Service", "books/cache", service(6379, "redis", "cache"))
            .add("WorkloadEntry", "books/cache-1", workload("10.1.0.11", "cache", "v1"))
    };
    let two = json!({"LABELS": {"app": "cache"}, "INSTANCE_IPS": "10.1.0.11,fd00::11"});
    let mut n = node(NodeKind::Sidecar, "10.1.0.11", "cache-1", two.clone());
    let g = docs().generate(&n);

    // In: an authority of the workload leads to its inbound listener, with the peer's certificate.
    let l = &g.listeners["connect_terminate"];
    assert_eq!(l.address, "[::]:15008".parse().unwrap());
    let tls = l.filter_chains[0].tls.as_ref().unwrap();
    assert!(matches!(tls.client_certificate, ClientCertificate::Required(_)) && tls.alpn == ["h2"]);
    let NetworkFilter::Http(h) = &l.filter_chains[0].filters[0] else { panic!() };
    let RouteSource::Inline(r) = &h.routes else { panic!() };
    assert_eq!(r.virtual_hosts[0].domains, ["10.1.0.11:*", "[fd00::11]:*"]);
    let Discovery::Static(a) = &g.clusters["connect_terminate|virtualInbound"].discovery else { panic!() };
    assert_eq!(a.localities[0].endpoints[0].address, "internal:virtualInbound");
    assert_eq!(g.listeners["virtualInbound"].address, "[::]:15006".parse().unwrap(), "both families");

    // Out: by label, and else by agreement in the handshake.
    let sockets = |name: &str| -> Vec<(String, bool, Vec<String>)> {
        let c = &g.clusters[name];
        c.tls_matches
            .iter()
            .map(|m| (m.name.clone(), m.hbone, m.tls.as_ref().map(|t| t.alpn.clone()).unwrap_or_default()))
            .collect()
    };
    let db = sockets("outbound|3306||db.books.svc.cluster.local");
    assert_eq!(db[0], ("hbone".to_owned(), true, vec!["h2".to_owned()]));
    let e = &g.endpoints["outbound|3306||db.books.svc.cluster.local"].localities[0].endpoints[0];
    assert_eq!(e.transport_labels["tunnel"], "http");
    let cache = sockets("outbound|6379||cache.books.svc.cluster.local");
    assert_eq!(cache[0].2, ["flotilla-tunnel", "istio"]);
    let http = sockets("outbound|9080||reviews.books.svc.cluster.local");
    assert!(http.iter().all(|s| !s.1 && !s.2.contains(&"flotilla-tunnel".to_owned())), "{http:?}");
    let chain = |g: &Generated| {
        let chains = &g.listeners["virtualInbound"].filter_chains;
        let c = chains.iter().find(|c| c.matches.destination_port == Some(6379) && c.tls.is_some()).unwrap();
        c.tls.clone().unwrap().alpn
    };
    assert_eq!(chain(&g), ["flotilla-tunnel", "istio"]);

    // Nobody who does not know them is offered any.
    n.metadata.insert("FLOTILLA_TUNNELS".into(), "false".into());
    let g = docs().generate(&n);
    assert!(!g.listeners.contains_key("connect_terminate"));
    assert_eq!(chain(&g), ["istio"]);
    assert!(g.clusters.values().all(|c| c.tls_matches.iter().all(|m| !m.hbone)));
}
