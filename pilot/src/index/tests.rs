use mesh_model::{ClusterId, TrustDomain};
use serde_json::json;

use super::*;
use crate::generate::tests::Docs;

fn index(docs: &Docs) -> (Index, Vec<crate::config::Problem>) {
    let w = docs.world();
    let local = Local {
        cluster: ClusterId::new("west").unwrap(),
        trust_domain: TrustDomain::default(),
        east_west: vec![],
    };
    build(&w.config, &local)
}

#[test]
fn target_ports() {
    let docs = Docs::default()
        .add(
            "Service",
            "a/s",
            json!({"selector": {"app": "s"}, "ports": [
                {"name": "http", "port": 80, "targetPort": 8080}, {"name": "named", "port": 81, "targetPort": "web"},
                {"name": "same", "port": 82}, {"name": "own", "port": 83, "targetPort": 1}, {"name": "dns", "port": 53, "targetPort": 5353, "protocol": "UDP"}]}),
        )
        .add("WorkloadEntry", "a/w", json!({"address": "10.0.0.1", "labels": {"app": "s"}, "ports": {"web": 9090, "own": 9999}}))
        .add("WorkloadEntry", "b/w", json!({"address": "10.0.0.2", "labels": {"app": "s"}}));
    let (index, problems) = index(&docs);
    let e = &index.services["s.a.svc.cluster.local"];
    let ports: Vec<(&str, u16)> = e.endpoints.iter().map(|e| (e.service_port.as_str(), e.port)).collect();
    assert_eq!(ports, [("http", 8080), ("named", 9090), ("same", 82), ("own", 9999), ("dns", 5353)]);
    assert_eq!(e.service.ports.len(), 4);
    assert_eq!(e.udp_ports.iter().map(|p| p.port).collect::<Vec<_>>(), [53]);
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(index.instances(&["10.0.0.1".parse().unwrap()]).len(), 5);
}

#[test]
fn east_west_gateways_are_found_by_their_label() {
    let docs = Docs::default()
        .add(
            "WorkloadEntry",
            "m/ew1",
            json!({"address": "10.0.0.9", "labels": {"istio": "eastwestgateway"}, "ports": {"tls": 16443}}),
        )
        .add(
            "WorkloadEntry",
            "m/ew2",
            json!({"address": "10.0.0.8", "labels": {"istio": "eastwestgateway"}}),
        );
    let found: Vec<String> = index(&docs).0.east_west.iter().map(ToString::to_string).collect();
    assert_eq!(found, ["10.0.0.8:15443", "10.0.0.9:16443"]);
}

#[test]
fn what_cannot_be_used_is_said() {
    let docs = Docs::default()
        .add("Service", "a/s", json!({"selector": {"app": "s"}, "ports": [{"name": "http", "port": 80, "targetPort": "nope"}]}))
        .add("WorkloadEntry", "a/w", json!({"address": "10.0.0.1", "labels": {"app": "s"}}))
        .add("ServiceEntry", "a/e", json!({"hosts": ["a.example.com"], "addresses": ["10.1.0.0/40"], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]}))
        .add("ServiceEntry", "b/e", json!({"hosts": ["a.example.com"], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]}));
    let docs = docs.add("ServiceEntry", "c/e", json!({"hosts": ["c.example.com"], "addresses": ["10.2.0.0/16"], "ports": [{"number": 53, "name": "dns", "protocol": "UDP"}]}));
    let (index, problems) = index(&docs);
    let said: Vec<&str> = problems.iter().map(|p| p.object.as_str()).collect();
    assert_eq!(said, ["Service a/s", "ServiceEntry a/e", "ServiceEntry b/e", "ServiceEntry c/e"]);
    assert_eq!(index.services["a.example.com"].service.namespace, "a", "the older one has the host");
}

#[test]
fn our_own_exports_are_not_imported_back() {
    let docs = Docs::default().add(
        "ImportedService",
        "west/a/s",
        json!({"cluster": "west", "lease": "live", "service": {"name": "s", "namespace": "a", "host": "s.a.svc.cluster.local",
               "ports": [], "groups": [], "serviceAccounts": [], "exportedAt": 0, "slots": 1}}),
    );
    assert!(index(&docs).0.services.is_empty());
}
