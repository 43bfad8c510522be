//! Authorisation.

use serde_json::json;

use super::*;

/// Filters of a port without the rules that stand behind all policies.
pub(super) fn rbac_of(g: &Generated, port: u16) -> Vec<Rbac> {
    let mut all = whole_rbac_of(g, port);
    all.retain_mut(|f| {
        let Some(r) = &mut f.rules else { return true };
        let before = r.policies.len();
        r.policies.retain(|name, _| !name.starts_with("flotilla-"));
        before == r.policies.len() || !r.policies.is_empty()
    });
    all
}

/// What stands behind all policies: rules by name.
pub(super) fn of_clusters(g: &Generated, port: u16) -> BTreeMap<String, RbacPolicy> {
    let deny =
        whole_rbac_of(g, port).into_iter().filter_map(|f| f.rules).find(|r| r.action == RbacAction::Deny);
    deny.map(|r| r.policies)
        .unwrap_or_default()
        .into_iter()
        .filter(|(n, _)| n.starts_with("flotilla-"))
        .collect()
}

fn whole_rbac_of(g: &Generated, port: u16) -> Vec<Rbac> {
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
    // No custom authoriser.
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

/// Requests and bytes of one workload, with authorisers of both kinds.
fn asking(http_policy: bool, grpc_policy: bool) -> Docs {
    let policy = |name: &str| {
        json!({"action": "CUSTOM", "provider": {"name": name}, "rules": [
        {"to": [{"operation": {"paths": ["/private*"], "ports": ["9080", "7"]}}]}]})
    };
    let mut docs = bookstore()
        .add("Service", "books/db",
            json!({"selector": {"app": "productpage"}, "ports": [{"name": "tcp", "port": 7}]}))
        .add("Service", "books/authz",
            json!({"selector": {"app": "authz"}, "ports": [{"name": "http", "port": 80}, {"name": "grpc", "port": 90}]}))
        .add("MeshConfig", "mesh", json!({"extensionProviders": [
            {"name": "h", "envoyExtAuthzHttp": {"service": "authz.books.svc.cluster.local", "port": 80}},
            {"name": "g", "envoyExtAuthzGrpc": {"service": "authz.books.svc.cluster.local", "port": 90}}]}));
    if http_policy {
        docs = docs.add("AuthorizationPolicy", "books/ask-h", policy("h"));
    }
    if grpc_policy {
        docs = docs.add("AuthorizationPolicy", "books/ask-g", policy("g"));
    }
    docs
}

fn filters(g: &Generated, port: u16) -> &[NetworkFilter] {
    let l = &g.listeners["virtualInbound"];
    &l.filter_chains.iter().find(|c| c.matches.destination_port == Some(port)).unwrap().filters
}

#[test]
fn somebody_else_is_asked() {
    // Over HTTP, of requests alone.
    let g = asking(true, false).generate(&productpage());
    let http = |g: &Generated| match &filters(g, 9080)[0] {
        NetworkFilter::Http(h) => h.filters.clone(),
        other => panic!("{other:?}"),
    };
    let all = http(&g);
    let [HttpFilter::Rbac(marks), HttpFilter::ExtAuthz(ask), ..] = all.as_slice() else { panic!("{all:?}") };
    assert!(marks.rules.is_none() && marks.shadow_stat_prefix == "istio_ext_authz_", "{marks:?}");
    let rules = marks.shadow.as_ref().unwrap();
    let name = "istio-ext-authz-ns[books]-policy[ask-h]-rule[0]";
    assert_eq!((rules.action, rules.policies.keys().next().unwrap().as_str()), (RbacAction::Deny, name));
    let by = ask.enabled_metadata.as_ref().unwrap();
    assert_eq!(
        (by.filter.as_str(), by.path[0].as_str()),
        ("envoy.filters.http.rbac", "istio_ext_authz_shadow_effective_policy_id")
    );
    let AuthzService::Http(service) = &ask.service else { panic!() };
    assert_eq!(service.cluster, "outbound|80||authz.books.svc.cluster.local");
    assert!(!service.timeout.is_zero() && ask.status_on_error == 403);
    assert!(rbac_of(&g, 9080).iter().all(|r| r.rules.is_none()), "what is asked about is not denied as well");
    assert!(
        matches!(filters(&g, 7)[..], [NetworkFilter::Rbac(_), NetworkFilter::Tcp(_)]),
        "{:?}",
        filters(&g, 7)
    );
    // Over gRPC, of both.
    let g = asking(false, true).generate(&productpage());
    assert!(
        matches!(&http(&g)[1], HttpFilter::ExtAuthz(a) if matches!(&a.service, AuthzService::Grpc(g) if g.cluster == "outbound|90||authz.books.svc.cluster.local"))
    );
    let [
        NetworkFilter::Rbac(marks),
        NetworkFilter::Authz(ask),
        NetworkFilter::Rbac(_),
        NetworkFilter::Tcp(_),
    ] = filters(&g, 7)
    else {
        panic!("{:?}", filters(&g, 7))
    };
    assert_eq!(ask.enabled_metadata.as_ref().unwrap().filter, "envoy.filters.network.rbac");
    let p = &marks.shadow.as_ref().unwrap().policies.values().next().unwrap();
    assert!(!format!("{p:?}").contains("private"), "bytes have no path; they are asked about without: {p:?}");
    // Two providers keep their marks apart.
    let both = http(&asking(true, true).generate(&productpage()));
    let marks: Vec<_> = both
        .iter()
        .filter_map(|f| match f {
            HttpFilter::Rbac(r) if r.shadow.is_some() => Some(r.shadow_stat_prefix.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(marks, ["istio_ext_authz_g_", "istio_ext_authz_h_"]);
}

#[test]
fn who_cannot_be_asked_denies() {
    let policy = json!({"action": "CUSTOM", "provider": {"name": "h"}, "rules": [{}]});
    let settings = |authz: Value| json!({"extensionProviders": [authz]});
    let host = "authz.books.svc.cluster.local";
    for (broken, why) in [
        (json!({"name": "other", "envoyExtAuthzHttp": {"service": host, "port": 80}}), "no provider \"h\""),
        (
            json!({"name": "h", "envoyExtAuthzHttp": {"service": "nobody.books.svc.cluster.local", "port": 80}}),
            "does not exist",
        ),
        (
            json!({"name": "h", "envoyExtAuthzHttp": {"service": format!("other/{host}"), "port": 80}}),
            "does not exist",
        ),
        (json!({"name": "h", "envoyExtAuthzHttp": {"service": host, "port": 81}}), "port 81"),
        (json!({"name": "h", "envoyExtAuthzGrpc": {"service": host, "port": 80}}), "call the port grpc"),
    ] {
        let docs = bookstore()
            .add(
                "Service",
                "books/authz",
                json!({"selector": {"app": "a"}, "ports": [{"name": "http", "port": 80}]}),
            )
            .add("MeshConfig", "mesh", settings(broken))
            .add("AuthorizationPolicy", "books/ask", policy.clone());
        let problems = docs.clone().world().problems;
        assert!(
            problems.iter().any(|p| p.object == "AuthorizationPolicy books/ask" && p.message.contains(why)),
            "{why}: {problems:?}"
        );
        let r = rbac_of(&docs.generate(&productpage()), 9080);
        assert_eq!(r[0].rules.as_ref().map(|r| r.action), Some(RbacAction::Deny), "{why}");
    }
    // Nor who may not be called.
    let docs = asking(true, false).add(
        "Sidecar",
        "books/narrow",
        json!({"egress": [{"hosts": ["./reviews.books.svc.cluster.local"]}]}),
    );
    let r = rbac_of(&docs.generate(&productpage()), 9080);
    assert_eq!(r[0].rules.as_ref().map(|r| r.action), Some(RbacAction::Deny));
}

#[test]
fn request_authentication() {
    let docs = bookstore()
        .add("RequestAuthentication", "books/users", json!({"selector": {"matchLabels": {"app": "productpage"}}, "jwtRules": [
            {"issuer": "z", "jwks": "{}", "audiences": ["a"], "forwardOriginalToken": true,
             "fromHeaders": [{"name": "X-Token", "prefix": "T "}], "outputClaimToHeaders": [{"header": "X-Sub", "claim": "sub"}]},
            {"issuer": "a", "jwksUri": "https://keys.example/set"}]}))
        .add("RequestAuthentication", "books/other", json!({"selector": {"matchLabels": {"app": "none"}}, "jwtRules": [
            {"issuer": "x", "jwks": "{}"}]}))
        .add("AuthorizationPolicy", "books/allow", json!({"rules": [
            {"from": [{"source": {"requestPrincipals": ["a/alice"]}}], "when": [{"key": "request.auth.claims[groups]", "values": ["admin"]}]}]}));
    let g = docs.generate(&productpage());
    let l = &g.listeners["virtualInbound"];
    let c = l.filter_chains.iter().find(|c| c.matches.destination_port == Some(9080)).unwrap();
    let filters = &http(c).filters;
    let [HttpFilter::Jwt(jwt), HttpFilter::Rbac(_), HttpFilter::Rbac(rbac), ..] = filters.as_slice() else {
        panic!("{filters:?}")
    };
    assert_eq!(jwt.providers.len(), 2);
    let (a, z) = (&jwt.providers["origins-0"], &jwt.providers["origins-1"]);
    assert_eq!((a.issuer.as_str(), z.issuer.as_str()), ("a", "z"));
    assert!(z.forward && z.from_headers[0].name == "x-token" && z.claim_to_headers[0].header == "x-sub");
    let JwksSource::Remote(r) = &a.jwks else { panic!() };
    assert_eq!(r.cluster, "jwks|443||keys.example");
    let keys = &g.clusters["jwks|443||keys.example"];
    assert_eq!(keys.tls.as_ref().unwrap().sni, "keys.example");
    let policy = &rbac.rules.as_ref().unwrap().policies["ns[books]-policy[allow]-rule[0]"];
    let text = format!("{policy:?}");
    assert!(text.contains("\"payload\", \"iss\"") && text.contains("\"payload\", \"groups\""), "{text}");
    // Another workload has no tokens, and so nobody with a principal.
    let mut plain = productpage();
    plain.metadata = serde_json::from_value(json!({"LABELS": {"app": "other"}})).unwrap();
    let g = docs.generate(&plain);
    assert!(!g.clusters.keys().any(|n| n.starts_with("jwks|")));
}

#[test]
fn other_clusters_reach_what_is_exported_to_them() {
    let cluster = |c: &str| Principal::SourceCluster(StringMatch::exact(c));
    let others = |these: &[&str]| {
        Principal::And(vec![
            Principal::Not(Box::new(Principal::Or(these.iter().map(|c| cluster(c)).collect()))),
            Principal::SourceCluster(StringMatch::regex(".+")),
        ])
    };
    let rule = |permission, principals| RbacPolicy { permissions: vec![permission], principals };
    let at = Permission::DestinationPort;
    let of = |docs: &Docs| of_clusters(&docs.generate(&productpage()), 9080);
    let named = |rules: &[(&str, RbacPolicy)]| {
        rules.iter().map(|(n, p)| ((*n).to_owned(), p.clone())).collect::<BTreeMap<_, _>>()
    };

    // Nothing is exported.
    let closed = ("flotilla-not-exported", rule(Permission::Any, vec![others(&["west"])]));
    assert_eq!(of(&bookstore()), named(std::slice::from_ref(&closed)));
    // A foreign proxy knows of no clusters.
    let mut envoy = productpage();
    envoy.user_agent = "envoy".into();
    assert_eq!(of_clusters(&bookstore().generate(&envoy), 9080), named(&[]));

    let export = |to: Option<&str>| {
        let docs = bookstore().add("ServiceExport", "books/productpage", json!({}));
        match to {
            Some(to) => docs.annotate("flotilla.dev/export-to", to),
            None => docs,
        }
    };
    let rest = Permission::Not(Box::new(Permission::Or(vec![at(9080)])));
    let closed = ("flotilla-not-exported", rule(rest, vec![others(&["west"])]));
    assert_eq!(of(&export(None)), named(std::slice::from_ref(&closed)));
    let east = ("flotilla-not-exported-to-it[9080]", rule(at(9080), vec![others(&["west", "east"])]));
    assert_eq!(of(&export(Some("east"))), named(&[closed.clone(), east]));
    let north = json!({"rules": [{"peers": ["north"], "action": "DENY"}]});
    let docs = export(None).add("ExportPolicy", "mesh", north.clone());
    let but = ("flotilla-not-exported-to-it[9080]", rule(at(9080), vec![cluster("north")]));
    assert_eq!(of(&docs), named(&[closed.clone(), but]));
    // Another service of the same port is for everybody, and nobody can tell the two apart.
    let docs = export(Some("east")).add("Service", "books/front", service(9080, "http", "productpage")).add(
        "ServiceExport",
        "books/front",
        json!({}),
    );
    assert_eq!(of(&docs), named(std::slice::from_ref(&closed)));

    let docs = export(None).add("FormerCluster", "south", json!({"id": "south", "evicted": true}));
    let former = ("flotilla-former-member", rule(Permission::Any, vec![cluster("south")]));
    assert_eq!(of(&docs), named(&[closed, former]));
}
