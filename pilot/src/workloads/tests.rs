use serde_json::{Map, Value, json};

use super::*;
use crate::{
    config::Reader,
    generate::{self, tests::Docs, tests::settings},
    world::World,
};

const HOST: &str = "outbound|8080||db.shop.svc.cluster.local";

fn docs(group: Value) -> Docs {
    Docs::default()
        .add("Service", "shop/db", json!({"selector": {"app": "db"}, "clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 8080}]}))
        .add("WorkloadGroup", "shop/vm", group)
}

fn group() -> Value {
    json!({
        "metadata": {"labels": {"app": "db", "tier": "group"}, "annotations": {"team": "a"}},
        "template": {"serviceAccount": "db", "labels": {"app": "template", "zone": "x"}, "weight": 7, "ports": {"http": 9090}},
        "probe": {"periodSeconds": 2, "tcpSocket": {"port": 1}}
    })
}

fn machine(ip: &str, namespace: &str, account: &str) -> NodeInfo {
    let Value::Object(metadata) =
        json!({"NAMESPACE": namespace, "SERVICE_ACCOUNT": account, "LABELS": {"own": "1", "tier": "own"}})
    else {
        return NodeInfo::component("x");
    };
    let metadata: Map<String, Value> = metadata;
    NodeInfo::proxy(NodeKind::Sidecar, ip.parse().unwrap(), "m", namespace, "x", metadata, Default::default())
}

fn local() -> PeerInfo {
    PeerInfo::plain(Transport::Unix, None)
}

fn what(state: State) -> Workload {
    Workload { group: "vm".into(), state, reason: String::new() }
}

fn world(docs: &Docs, w: Option<&Workloads>) -> World {
    let (galley, federation) = docs.states();
    let mut config = Reader::default().read(&galley, &federation);
    if let Some(w) = w {
        config.join(&w.watch().borrow().clone());
    }
    World::new(settings(), config)
}

fn workloads(docs: &Docs, keep: Option<PathBuf>) -> Workloads {
    let source = Arc::new(PilotSource::new());
    source.update(Arc::new(world(docs, None)));
    Workloads::new(source, keep)
}

fn code(r: Result<Option<String>, Status>) -> tonic::Code {
    r.unwrap_err().code()
}

#[tokio::test]
async fn who_may_register() {
    let w = workloads(&docs(group()), None);
    let probe =
        w.register(&local(), machine("10.1.0.9", "shop", "db"), what(State::Unhealthy)).unwrap().unwrap();
    assert!(probe.contains("periodSeconds"), "{probe}");
    let unknown = Workload { group: "none".into(), ..what(State::Healthy) };
    assert_eq!(code(w.register(&local(), machine("10.1.0.9", "shop", "db"), unknown)), tonic::Code::NotFound);
    // A group of another namespace is none.
    assert_eq!(
        code(w.register(&local(), machine("10.1.0.9", "bank", "db"), what(State::Healthy))),
        tonic::Code::NotFound
    );
    assert_eq!(
        code(w.register(&local(), machine("10.1.0.9", "shop", "web"), what(State::Healthy))),
        tonic::Code::PermissionDenied
    );
    let gateway = NodeInfo { kind: NodeKind::Router, ..machine("10.1.0.9", "shop", "db") };
    assert_eq!(code(w.register(&local(), gateway, what(State::Healthy))), tonic::Code::InvalidArgument);
    // Over TLS without a certificate nobody is anybody.
    let stranger = PeerInfo::plain(Transport::Tls, Some("10.1.0.9:1".parse().unwrap()));
    assert_eq!(
        code(w.register(&stranger, machine("10.1.0.9", "shop", "db"), what(State::Healthy))),
        tonic::Code::Unauthenticated
    );
    assert_eq!(w.all().len(), 1);
}

#[tokio::test]
async fn an_entry_has_the_template_the_groups_metadata_and_its_own() {
    let docs = docs(group());
    let w = workloads(&docs, None);
    let node = machine("10.1.0.9", "shop", "db");
    w.register(&local(), node.clone(), what(State::Healthy)).unwrap();
    let world = world(&docs, Some(&w));
    let [e] = world.config.workload_entries.as_slice() else { panic!() };
    assert_eq!((e.namespace.as_str(), e.name.as_str()), ("shop", "vm-10.1.0.9"));
    assert_eq!((e.spec.address.as_str(), e.spec.weight, e.spec.ports["http"]), ("10.1.0.9", 7, 9090));
    let label = |k: &str| e.spec.labels.get(k).map(String::as_str);
    assert_eq!(
        (label("app"), label("tier"), label("zone"), label("own")),
        (Some("db"), Some("own"), Some("x"), Some("1"))
    );
    assert_eq!(label(TLS_MODE), Some("istio"));
    assert_eq!((e.annotations["team"].as_str(), e.annotations[GROUP].as_str()), ("a", "vm"));
    // Policies select its proxy by all of them, though it named only its own.
    let mut proxy = ProxyNode::new(&node).unwrap();
    assert!(world.completed(&mut proxy));
    assert_eq!(proxy.labels["zone"], "x");
    assert!(!world.completed(&mut proxy), "once");
    let mut other = ProxyNode::new(&machine("10.1.0.9", "shop", "web")).unwrap();
    assert!(!world.completed(&mut other), "another account at the same address");
}

#[tokio::test]
async fn only_a_healthy_one_is_called() {
    let called = |docs: &Docs, state| {
        let w = workloads(docs, None);
        w.register(&local(), machine("10.1.0.9", "shop", "db"), what(state)).unwrap();
        let caller = ProxyNode::new(&machine("10.1.0.1", "shop", "web")).unwrap();
        let g = generate::generate(&caller, &world(docs, Some(&w)));
        let all: Vec<_> = g.endpoints[HOST].localities.iter().flat_map(|l| &l.endpoints).collect();
        all.iter().any(|e| e.health == mesh_model::proxy::EndpointHealth::Healthy)
    };
    let probed = docs(group());
    assert!(called(&probed, State::Healthy));
    assert!(!called(&probed, State::Unhealthy));
    assert!(!called(&probed, State::Leaving));
    // Without a probe whoever is there is well.
    let mut plain = group();
    plain["probe"] = Value::Null;
    assert!(called(&docs(plain.clone()), State::Unhealthy));
    assert!(!called(&docs(plain), State::Leaving));
}

#[tokio::test(start_paused = true)]
async fn who_falls_silent_is_forgotten_and_who_does_not_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let docs = docs(group());
    let w = Arc::new(workloads(&docs, Some(dir.path().to_owned())));
    let one = || w.register(&local(), machine("10.1.0.9", "shop", "db"), what(State::Healthy)).unwrap();
    w.register(&local(), machine("10.1.0.8", "shop", "db"), what(State::Healthy)).unwrap();
    one();
    let kept = w.clone();
    let task = tokio::spawn(async move { kept.keep().await });
    for _ in 0..4 {
        tokio::time::sleep(HOLDS / 3).await;
        one();
    }
    assert_eq!(w.all().iter().map(|s| s.address.to_string()).collect::<Vec<_>>(), ["10.1.0.9"]);
    // Writing is another thread's business.
    let file = dir.path().join(FILE);
    let stored = || {
        serde_json::from_slice::<Vec<Told>>(&std::fs::read(&file).unwrap_or_default())
            .unwrap_or_default()
            .len()
    };
    for _ in 0..200 {
        tokio::time::sleep(SWEEP).await;
        one();
        if stored() == 1 {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    task.abort();
    let again = workloads(&docs, Some(dir.path().to_owned()));
    assert_eq!(again.all().len(), 1);
    tokio::time::sleep(HOLDS + SWEEP).await;
    again.sweep();
    assert!(again.all().is_empty(), "it did not come back");
    std::fs::write(&file, "{").unwrap();
    assert!(workloads(&docs, Some(dir.path().to_owned())).all().is_empty());
}

#[tokio::test]
async fn an_authored_entry_of_the_same_name_comes_first() {
    let docs = docs(group()).add("WorkloadEntry", "shop/vm-10.1.0.9", json!({"address": "10.1.0.77"}));
    let w = workloads(&docs, None);
    w.register(&local(), machine("10.1.0.9", "shop", "db"), what(State::Healthy)).unwrap();
    let world = world(&docs, Some(&w));
    assert_eq!(
        world.config.workload_entries.iter().map(|e| e.spec.address.as_str()).collect::<Vec<_>>(),
        ["10.1.0.77"]
    );
}

#[tokio::test]
async fn a_workload_registers_its_own_address_only() {
    let w = workloads(&docs(group()), None);
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names =
        vec![rcgen::SanType::URI("spiffe://mesh.local/ns/shop/sa/db".try_into().unwrap())];
    let leaf = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
    let from = |address: &str| PeerInfo {
        transport: Transport::Tls,
        address: Some(address.parse().unwrap()),
        certificates: vec![leaf.der().clone()].into(),
    };
    let register = |peer| w.register(&peer, machine("10.1.0.9", "shop", "db"), what(State::Healthy));
    let refused = register(from("10.1.0.8:1")).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert!(refused.message().contains("its own address"), "{}", refused.message());
    assert!(w.all().is_empty());
    register(from("10.1.0.9:1")).unwrap();
    register(from("[::ffff:10.1.0.9]:1")).unwrap();
}
