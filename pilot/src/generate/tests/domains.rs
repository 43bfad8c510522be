//! Other trust domains.

use serde_json::json;

use super::{policy::*, *};

/// `bookstore`, in which east is of another domain, and `accounts` are what it says of its reviews.
fn federated(accounts: &[&str]) -> Docs {
    let mut east = peer("east", "203.0.113.2");
    east["trustDomain"] = "b.example".into();
    let mut reviews =
        import("east", "live", json!([{"labels": {"version": "v2"}, "locality": "", "healthyWeight": 1}]));
    reviews["service"]["serviceAccounts"] = json!(accounts);
    let bundle = json!({"trustDomain": "b.example", "roots": "PEM", "clusters": ["east"]});
    bookstore().add("ImportedService", "east/books/reviews", reviews).add("PeerCluster", "east", east).add(
        "ForeignBundle",
        "b.example",
        bundle,
    )
}

fn sans(g: &Generated, transport: &str) -> Vec<StringMatch> {
    let c = &g.clusters[REVIEWS];
    let m = c.tls_matches.iter().find(|m| m.name == transport).unwrap();
    m.tls.as_ref().unwrap().validation.sans.clone()
}

#[test]
fn a_peers_workloads_have_identities_of_its_domain() {
    let told = "spiffe://b.example/ns/books/sa/reviews";
    let local = "spiffe://mesh.local/ns/books/sa/reviews";
    let g = federated(&[told]).generate(&productpage());
    assert_eq!(sans(&g, "cluster-east"), [StringMatch::exact(told)], "and not of who runs here");
    assert_eq!(sans(&g, "tlsMode-istio"), [StringMatch::exact(local)], "and the other way round");
    // It cannot name others, and no name is not any name.
    for names in [&[local][..], &["reviews"], &[]] {
        let g = federated(names).generate(&productpage());
        assert_eq!(sans(&g, "cluster-east"), [StringMatch::prefix("spiffe://b.example/")], "{names:?}");
        assert_eq!(sans(&g, "tlsMode-istio"), [StringMatch::exact(local)], "{names:?}");
    }
    // Nor may one of the own domain name somebody of another.
    let mut own = import("north", "live", json!([{"labels": {}, "locality": "", "healthyWeight": 1}]));
    own["service"]["serviceAccounts"] = json!([told]);
    let docs = bookstore().add("ImportedService", "north/books/reviews", own).add(
        "PeerCluster",
        "north",
        peer("north", "203.0.113.3"),
    );
    let w = docs.world();
    assert!(!w.index.services["reviews.books.svc.cluster.local"].identities.contains(told));
    assert!(w.problems.iter().any(|p| p.message.contains(told)), "{:?}", w.problems);
}

#[test]
fn names_without_a_domain_let_in_the_own_one() {
    let own = || Principal::Authenticated(Some(StringMatch::prefix("spiffe://mesh.local/")));
    let any_books = || Principal::Authenticated(Some(StringMatch::regex("spiffe://[^/]+/ns/books/.*")));
    let of = |docs: Docs, action: &str, source: Value| {
        let rules = json!([{"from": [{"source": source}]}]);
        let docs = docs.add("AuthorizationPolicy", "books/p", json!({"action": action, "rules": rules}));
        let mut all = rbac_of(&docs.generate(&productpage()), 9080);
        all.remove(0).rules.unwrap().policies["ns[books]-policy[p]-rule[0]"].principals[0].clone()
    };
    let books = || json!({"namespaces": ["books"]});
    let alone = Principal::Or(vec![any_books()]);
    assert_eq!(of(bookstore(), "ALLOW", books()), alone, "nothing changes for a mesh that is alone");
    assert_eq!(of(federated(&[]), "ALLOW", books()), Principal::And(vec![own(), alone.clone()]));
    assert_eq!(of(federated(&[]), "DENY", books()), alone, "whom it keeps out may be of any");
    let said = of(federated(&[]), "ALLOW", json!({"namespaces": ["books"], "trustDomains": ["b.example"]}));
    assert!(!format!("{said:?}").contains("mesh.local"), "{said:?}");
    // Who is not of a namespace: nobody of another domain is.
    let not = |p| Principal::Not(Box::new(Principal::Or(vec![p])));
    let but_books = || json!({"notNamespaces": ["books"]});
    assert_eq!(of(federated(&[]), "DENY", but_books()), not(Principal::And(vec![own(), any_books()])));
    assert_eq!(of(federated(&[]), "ALLOW", but_books()), not(any_books()));
}

#[test]
fn a_foreign_proxy_closes_by_domain_what_is_not_exported() {
    let mut envoy = productpage();
    envoy.user_agent = "envoy".into();
    let of_b = || vec![Principal::Authenticated(Some(StringMatch::prefix("spiffe://b.example/")))];
    let rules = |docs: &Docs| of_clusters(&docs.generate(&envoy), 9080);
    let closed = |permission| {
        let policy = RbacPolicy { permissions: vec![permission], principals: of_b() };
        BTreeMap::from([("flotilla-not-exported-to[b.example]".to_owned(), policy)])
    };
    assert_eq!(rules(&federated(&[])), closed(Permission::Any));
    let open = Permission::Not(Box::new(Permission::Or(vec![Permission::DestinationPort(9080)])));
    let exported = federated(&[]).add("ServiceExport", "books/productpage", json!({}));
    assert_eq!(rules(&exported), closed(open));
    assert_eq!(rules(&exported.annotate("flotilla.dev/export-to", "south")), closed(Permission::Any));
}
