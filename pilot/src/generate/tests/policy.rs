//! Authorisation.

use serde_json::json;

use super::*;

fn rbac_of(g: &Generated, port: u16) -> Vec<Rbac> {
    let l = &g.listeners["virtualInbound"];
    let c = l.filter_chains.iter().find(|c| c.matches.destination_port == Some(port)).unwrap();
    let mut out = vec![];
    for f in &c.filters {
        match f {
            NetworkFilter::Rbac(r) => out.push(r.clone()),
            NetworkFilter::Http(h) => out.extend(h.filters.iter().filter_map(|f| match f {
                HttpFilter::Rbac(r) => Some(r.clone()),
                _ => None,
            })),
            _ => {}
        }
    }
    out
}

#[test]
fn authorization() {
    let docs = bookstore()
        .add("AuthorizationPolicy", "books/deny", json!({"action": "DENY", "rules": [
            {"from": [{"source": {"notNamespaces": ["books"]}}], "to": [{"operation": {"methods": ["DELETE"], "paths": ["/admin/*"]}}]}]}))
        .add("AuthorizationPolicy", "books/allow", json!({"selector": {"matchLabels": {"app": "productpage"}}, "rules": [
            {"from": [{"source": {"principals": ["mesh.local/ns/books/sa/web"]}}, {"source": {"ipBlocks": ["10.0.0.0/8"]}}],
             "to": [{"operation": {"methods": ["GET"], "hosts": ["a.example.com"], "ports": ["9080"]}}],
             "when": [{"key": "source.cluster", "values": ["east"]}, {"key": "request.headers[x-t]", "notValues": ["1"]}]}]}))
        .add("AuthorizationPolicy", "books/other", json!({"selector": {"matchLabels": {"app": "none"}}, "rules": [{}]}))
        .add("AuthorizationPolicy", "books/audit", json!({"action": "AUDIT", "rules": [{}]}))
        .add("AuthorizationPolicy", "books/dry", json!({"rules": [{}]})).annotate("istio.io/dry-run", "true");
    let g = docs.generate(&productpage());
    let filters = rbac_of(&g, 9080);
    let actions: Vec<RbacAction> = filters.iter().map(|r| r.rules.as_ref().unwrap().action).collect();
    assert_eq!(actions, [RbacAction::Log, RbacAction::Deny, RbacAction::Allow]);
    let deny = &filters[1].rules.as_ref().unwrap().policies["ns[books]-policy[deny]-rule[0]"];
    assert!(matches!(&deny.principals[0], Principal::Not(_)));
    let Permission::And(parts) = &deny.permissions[0] else { panic!("{deny:?}") };
    assert!(parts.contains(&Permission::Or(vec![Permission::Path(StringMatch::prefix("/admin/"))])));
    let allow = filters[2].rules.as_ref().unwrap();
    assert_eq!(allow.policies.keys().collect::<Vec<_>>(), ["ns[books]-policy[allow]-rule[0]"]);
    let rule = &allow.policies["ns[books]-policy[allow]-rule[0]"];
    assert_eq!(rule.principals.len(), 2);
    let Principal::And(parts) = &rule.principals[0] else { panic!() };
    assert!(parts.contains(&Principal::Or(vec![Principal::SourceCluster(StringMatch::exact("east"))])));
    assert!(parts.contains(&Principal::Or(vec![Principal::Authenticated(Some(StringMatch::exact(
        "spiffe://mesh.local/ns/books/sa/web"
    )))])));
    assert!(filters[2].shadow.is_some(), "dry runs are only logged");
}

#[test]
fn what_cannot_be_checked_does_not_open_doors() {
    let world = |action: &str, rule: Value| {
        bookstore().add("AuthorizationPolicy", "books/p", json!({"action": action, "rules": [rule]}))
    };
    let foreign = || {
        let mut n = productpage();
        n.user_agent = "envoy".into();
        n
    };
    let cluster = json!({"when": [{"key": "source.cluster", "notValues": ["east"]}]});
    let allow = rbac_of(&world("ALLOW", cluster.clone()).generate(&foreign()), 9080);
    assert!(
        allow[0].rules.as_ref().unwrap().policies.is_empty(),
        "an ALLOW rule that matches nothing denies"
    );
    let deny = rbac_of(&world("DENY", cluster).generate(&foreign()), 9080);
    let p = deny[0].rules.as_ref().unwrap().policies.values().next().unwrap();
    assert_eq!(p.principals, [Principal::Any], "a DENY rule denies more");
    // No request authentication, no custom authoriser.
    let jwt = json!({"from": [{"source": {"requestPrincipals": ["*"]}}]});
    let allow = rbac_of(&world("ALLOW", jwt).generate(&productpage()), 9080);
    assert!(allow[0].rules.as_ref().unwrap().policies.is_empty());
    let custom = rbac_of(&world("CUSTOM", json!({})).generate(&productpage()), 9080);
    assert_eq!(custom[0].rules.as_ref().unwrap().action, RbacAction::Deny);
    // HTTP conditions on bytes.
    let tcp = |action: &str| {
        world(action, json!({"to": [{"operation": {"methods": ["GET"], "ports": ["7"]}}]}))
            .add(
                "Service",
                "books/db",
                json!({"selector": {"app": "productpage"}, "ports": [{"name": "tcp", "port": 7}]}),
            )
            .generate(&productpage())
    };
    assert!(rbac_of(&tcp("ALLOW"), 7)[0].rules.as_ref().unwrap().policies.is_empty());
    let g = tcp("DENY");
    let p = rbac_of(&g, 7)[0].rules.as_ref().unwrap().policies.values().next().unwrap().clone();
    assert_eq!(p.permissions, [Permission::Or(vec![Permission::DestinationPort(7)])]);
    // `spec: {}` denies everything.
    let none = bookstore().add("AuthorizationPolicy", "books/none", json!({})).generate(&productpage());
    assert!(rbac_of(&none, 9080)[0].rules.as_ref().unwrap().policies.is_empty());
}
