//! Policies and roles of release 1.0.

use mesh_model::authored::MutualTlsMode;
use serde_json::json;

use super::*;

/// A second service on another port of productpage's workload.
fn docs() -> Docs {
    bookstore().add(
        "Service",
        "books/admin",
        json!({"selector": {"app": "productpage"}, "ports": [{"name": "http", "port": 80, "targetPort": 9090}], "clusterIP": "10.96.0.50"}),
    )
}

fn policy(docs: Docs, name: &str, spec: Value) -> Docs {
    docs.add("Policy", name, spec)
}

fn modes(docs: &Docs) -> Vec<MutualTlsMode> {
    let w = docs.world();
    let p = ProxyNode::new(&productpage()).unwrap();
    [9080, 9090, 0].map(|port| w.mtls_mode(&p, port)).to_vec()
}

/// Mesh TLS of productpage's port: who must show a certificate, by where he comes from.
#[test]
fn callers_of_tls_without_a_certificate() {
    let chains = |docs: &Docs, port: &str| -> Vec<(String, usize, bool, usize)> {
        let g = docs.generate(&productpage());
        let all = g.listeners["virtualInbound"]
            .filter_chains
            .iter()
            .chain(&g.listeners["virtualInbound"].default_filter_chain);
        let of_port =
            |c: &&FilterChain| c.tls.is_some() && (c.name == port || c.name == format!("{port}-gateways"));
        all.filter(of_port)
            .map(|c| {
                let required = match &c.tls.as_ref().unwrap().client_certificate {
                    ClientCertificate::Required(v) => (true, v),
                    ClientCertificate::Optional(v) => (false, v),
                    ClientCertificate::None => panic!("nobody is asked"),
                };
                assert!(required.1.trusted.is_some(), "what is shown is verified");
                (
                    c.name.clone(),
                    c.matches.source_prefixes.len(),
                    required.0,
                    c.tls.as_ref().unwrap().alpn.len(),
                )
            })
            .collect()
    };
    let port = "virtualInbound-9080";
    let usual = chains(&docs(), port);
    assert_eq!(usual, [(port.to_owned(), 0, true, 3)]);
    let allow = |mode: &str| json!({"peers": [{"mtls": {"allowTls": true, "mode": mode}}]});
    for mode in ["STRICT", "PERMISSIVE"] {
        let policy = policy(docs(), "books/default", allow(mode));
        // A gateway passes on whatever reaches it.
        let wanted = [(format!("{port}-gateways"), 1, true, 3), (port.to_owned(), 0, false, 3)];
        assert_eq!(chains(&policy, port), wanted, "{mode}");
        // Undeclared ports as well, whose bytes need no ALPN.
        let wanted =
            [("virtualInbound-gateways".to_owned(), 1, true, 2), ("virtualInbound".to_owned(), 0, false, 0)];
        let found = chains(&policy, "virtualInbound");
        assert_eq!(
            found.iter().map(|c| (c.0.clone(), c.1, c.2)).collect::<Vec<_>>(),
            wanted.map(|c| (c.0, c.1, c.2)).to_vec()
        );
        assert_eq!(found[1].3, 0);
        // The newer kind decides alone.
        let newer = policy.add("PeerAuthentication", "books/n", json!({"mtls": {"mode": mode}}));
        assert_eq!(chains(&newer, port), usual);
    }
}

#[test]
fn the_narrowest_policy_counts_alone() {
    use MutualTlsMode::{Disable, Permissive, Strict};
    let mtls = json!({"peers": [{"mtls": {}}]});
    let mesh = docs().add("MeshPolicy", "default", mtls.clone());
    assert_eq!(modes(&docs()), [Permissive; 3]);
    assert_eq!(modes(&mesh), [Strict; 3]);
    let namespace =
        policy(mesh.clone(), "books/default", json!({"peers": [{"mtls": {"mode": "PERMISSIVE"}}]}));
    assert_eq!(modes(&namespace), [Permissive; 3]);
    // One of another namespace is none.
    assert_eq!(modes(&policy(mesh.clone(), "other/default", json!({}))), [Strict; 3]);
    assert_eq!(
        modes(&policy(mesh.clone(), "other/p", json!({"targets": [{"name": "productpage"}]}))),
        [Strict; 3]
    );
    let off = json!({"targets": [{"name": "productpage"}]});
    assert_eq!(modes(&policy(namespace.clone(), "books/p", off)), [Disable, Permissive, Permissive]);
    // By the service's port, not the workload's.
    let port = |p: Value| {
        modes(&policy(mesh.clone(), "books/p", json!({"targets": [{"name": "admin", "ports": [p]}]})))
    };
    assert_eq!(port(json!({"number": 80})), [Strict, Disable, Strict]);
    assert_eq!(port(json!({"name": "http"})), [Strict, Disable, Strict]);
    assert_eq!(port(json!({"number": 9090})), [Strict; 3]);
    // An entry without a member is mTLS: what 1.0's tasks write as `mtls:`.
    assert_eq!(modes(&policy(docs(), "books/default", json!({"peers": [{}]}))), [Strict; 3]);
    assert_eq!(modes(&policy(docs(), "books/default", json!({"peers": [{"jwt": {}}]}))), [Strict; 3]);
    // The newer kind comes first, as far as it says anything.
    let newer = |spec| modes(&mesh.clone().add("PeerAuthentication", "books/n", spec));
    assert_eq!(newer(json!({"mtls": {"mode": "PERMISSIVE"}})), [Permissive; 3]);
    assert_eq!(newer(json!({"mtls": {"mode": "UNSET"}})), [Strict; 3]);
    // Callers know what a port takes.
    let g = policy(docs(), "books/p", json!({"targets": [{"name": "productpage"}]})).generate(&productpage());
    let labels =
        |host: &str| g.endpoints[host].localities[0].endpoints[0].transport_labels.contains_key("tlsMode");
    assert!(!labels("outbound|9080||productpage.books.svc.cluster.local"));
    assert!(labels("outbound|80||admin.books.svc.cluster.local"));
}

fn tokens(g: &Generated, listener: &str) -> Vec<JwtAuthn> {
    let managers = g.listeners[listener].filter_chains.iter().flat_map(|c| &c.filters);
    managers
        .filter_map(|f| match f {
            NetworkFilter::Http(h) => Some(h),
            _ => None,
        })
        .flat_map(|h| &h.filters)
        .filter_map(|f| match f {
            HttpFilter::Jwt(j) => Some((**j).clone()),
            _ => None,
        })
        .collect()
}

#[test]
fn origins_are_of_ports_and_of_gateways() {
    let jwt = |issuer: &str| json!({"jwt": {"issuer": issuer, "jwksUri": "https://keys.example/k"}});
    let spec = json!({"targets": [{"name": "admin"}], "origins": [jwt("i"), jwt("j")]});
    let g = policy(docs(), "books/p", spec).generate(&productpage());
    let all = tokens(&g, "virtualInbound");
    // One port, in clear, as there are no peers.
    assert_eq!(all.len(), 1);
    assert!(g.clusters.contains_key("jwks|443||keys.example"));
    let any = |l: &[&str]| l.iter().map(|n| JwtRequirement::Provider((*n).to_owned())).collect::<Vec<_>>();
    let want = JwtRequires::Inline(JwtRequirement::Any(any(&["origins-0", "origins-1"])));
    assert_eq!(all[0].rules, [JwtRule { matches: RouteMatch::any(), requires: want }]);
    assert!(all[0].providers["origins-0"].forward);
    // RequestAuthentication comes first.
    let newer = policy(docs(), "books/default", json!({"origins": [jwt("i")]})).add(
        "RequestAuthentication",
        "books/n",
        json!({"jwtRules": [{"issuer": "n", "jwksUri": "https://keys.example/k"}]}),
    );
    let all = tokens(&newer.generate(&productpage()), "virtualInbound");
    assert!(!all.is_empty() && all.iter().all(|j| j.providers["origins-0"].issuer == "n"));
    // A gateway: of the policy of its Service, whatever the port.
    let edge = docs()
        .add("Service", "books/edge", json!({"selector": {"app": "edge"}, "ports": [{"name": "http2", "port": 80, "targetPort": 8080}], "clusterIP": "10.96.0.60"}))
        .add("WorkloadEntry", "books/edge", json!({"address": "10.1.0.100", "labels": {"app": "edge"}}))
        .add("Gateway", "books/gw", json!({"selector": {"app": "edge"}, "servers": [{"port": {"number": 8080, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}))
        .add("Policy", "books/p", json!({"targets": [{"name": "edge", "ports": [{"number": 80}]}], "origins": [jwt("i")], "originIsOptional": true}));
    let gw = node(NodeKind::Router, "10.1.0.100", "gw", json!({"LABELS": {"app": "edge"}}));
    let g = edge.generate(&gw);
    let name = g.listeners.keys().next().unwrap().clone();
    let all = tokens(&g, &name);
    let optional =
        vec![JwtRequirement::Provider("origins-0".to_owned()), JwtRequirement::AllowMissingOrFailed];
    assert_eq!(all[0].rules[0].requires, JwtRequires::Inline(JwtRequirement::Any(optional)));
}

#[test]
fn a_library_that_cannot_look_at_tokens_is_closed() {
    let library = node(
        NodeKind::Sidecar,
        "10.1.0.1",
        "productpage-v1",
        json!({"GENERATOR": "grpc", "LABELS": {"app": "productpage", "version": "v1"}, "SERVICE_ACCOUNT": "productpage"}),
    );
    let filters = |optional: bool| {
        let origin = json!({"jwt": {"issuer": "i", "jwksUri": "https://keys.example/k"}});
        let spec =
            json!({"targets": [{"name": "productpage"}], "origins": [origin], "originIsOptional": optional});
        let g = policy(bookstore(), "books/p", spec).generate(&library);
        let l = &g.listeners["grpc/server?xds.resource.listening_address=0.0.0.0:9080"];
        http(&l.filter_chains[0]).filters.clone()
    };
    let closed = HttpFilter::Rbac(crate::generate::rbac::nobody());
    assert_eq!(filters(false).first(), Some(&closed));
    assert!(!filters(true).contains(&closed));
}

/// Rules of roles at a port, and those that are tried.
fn rules(g: &Generated, port: u16) -> (Vec<String>, Vec<String>) {
    let names = |r: Option<RbacRules>| r.into_iter().flat_map(|r| r.policies.into_keys()).collect::<Vec<_>>();
    let (mut enforced, mut tried) = (vec![], vec![]);
    for f in policy::rbac_of(g, port) {
        if f.rules.as_ref().is_none_or(|r| r.action == RbacAction::Allow) {
            enforced.extend(names(f.rules));
        }
        tried.extend(names(f.shadow));
    }
    (enforced, tried)
}

#[test]
fn roles_are_rules_that_hold_or_are_tried() {
    let binding = |mode: &str, user: &str| json!({"subjects": [{"user": user}], "mode": mode, "roleRef": {"kind": "ServiceRole", "name": "r"}});
    let role = json!({"rules": [{"services": ["productpage.*"], "methods": ["GET"]}]});
    let on = json!({"mode": "ON_WITH_INCLUSION", "inclusion": {"services": ["productpage.books.svc.cluster.local"]}});
    let docs = docs()
        .add("RbacConfig", "books/default", on)
        .add("ServiceRole", "books/r", role)
        .add("ServiceRoleBinding", "books/a", binding("ENFORCED", "*"))
        .add("ServiceRoleBinding", "books/b", binding("PERMISSIVE", "x"));
    let (enforced, tried) = rules(&docs.generate(&productpage()), 9080);
    assert_eq!(enforced, ["ns[books]-not-by-role", "ns[books]-role[r]-rule[0]-binding[a]-subject[0]-token"]);
    assert_eq!(tried, ["ns[books]-not-by-role", "ns[books]-role[r]-rule[0]-binding[b]-subject[0]-token"]);
    let readable = crate::generate::explain::readable;
    assert_eq!(readable(&enforced[1]), "ServiceRole books/r, rule 0, which ServiceRoleBinding a gives");
    // Not at gateways.
    let gw = node(NodeKind::Router, "10.1.0.1", "gw", json!({"LABELS": {"app": "productpage"}}));
    let w = docs.world();
    assert!(crate::generate::authorization(&ProxyNode::new(&gw).unwrap(), &w, true).is_empty());
    assert!(!crate::generate::authorization(&ProxyNode::new(&productpage()).unwrap(), &w, true).is_empty());
}

#[test]
fn what_does_nothing_is_told() {
    let docs = docs()
        .add("Policy", "books/p", json!({"targets": [{"name": "nothing"}]}))
        .add("RbacConfig", "books/default", json!({"mode": "ON"}))
        .add(
            "ServiceRoleBinding",
            "books/b",
            json!({"subjects": [{"user": "*"}], "roleRef": {"kind": "ServiceRole", "name": "absent"}}),
        )
        .add(
            "AuthorizationPolicy",
            "books/newer",
            json!({"selector": {"matchLabels": {"app": "productpage"}}, "rules": [{}]}),
        )
        .add("AuthorizationPolicy", "books/audit", json!({"action": "AUDIT", "rules": [{}]}));
    let found: Vec<_> =
        docs.world().problems.iter().map(|p| format!("{}: {}", p.object, p.message)).collect();
    for want in [
        "Policy books/p: there is no service \"nothing\" in namespace books",
        "ServiceRoleBinding books/b: there is no ServiceRole \"absent\" in namespace books",
        "AuthorizationPolicy books/newer: it is for workloads of productpage.books.svc.cluster.local",
    ] {
        assert!(found.iter().any(|p| p.starts_with(want)), "{want}: {found:#?}");
    }
    assert!(!found.iter().any(|p| p.contains("books/audit")), "{found:#?}");
}
