//! Policies asked about requests.

mod support;

use flotilla_simulate::RequestFile;
use serde_json::{Value, json};
use support::{Mesh, contains};

fn policy(namespace: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
           "metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

#[track_caller]
fn check(mesh: &Mesh, request: &Value, want: &Value) -> Value {
    let request = RequestFile::parse(&request.to_string()).unwrap();
    let got = serde_json::to_value(mesh.load().authorize(&request).unwrap()).unwrap();
    if let Err(e) = contains(&got, want, "") {
        panic!("{e}\n{got:#}");
    }
    got
}

fn get(path: &str, principal: &str) -> Value {
    json!({"workload.namespace": "shop", "workload.labels[app]": "cart", "source.principal": principal,
           "request.method": "GET", "request.url_path": path, "request.host": "cart.shop", "destination.port": 8080})
}

#[test]
fn without_policies_everything_is_allowed() {
    check(
        &Mesh::default(),
        &get("/", "mesh.local/ns/a/sa/b"),
        &json!({"decision": "allow", "policy": null, "missed": []}),
    );
}

#[test]
fn the_first_rule_that_matches_and_what_others_missed() {
    let mesh = Mesh::default().with(policy("shop", "cart", json!({"selector": {"matchLabels": {"app": "cart"}}, "rules": [
        {"from": [{"source": {"principals": ["mesh.local/ns/shop/sa/front"]}}], "to": [{"operation": {"methods": ["POST"]}}]},
        {"from": [{"source": {"namespaces": ["admin"]}}]},
        {"from": [{"source": {"principals": ["*/sa/front"]}}], "to": [{"operation": {"paths": ["/items*"]}}],
         "when": [{"key": "request.headers[x-v]", "values": ["1", "2*"]}]},
    ]})));
    let front = "mesh.local/ns/shop/sa/front";
    let mut request = get("/items/7", front);
    let got = check(
        &mesh,
        &request,
        &json!({"decision": "deny", "policy": null, "rule": null, "custom": null, "audit": []}),
    );
    assert_eq!(
        got["missed"],
        json!([
            {"policy": "shop/cart", "rule": 0, "action": "ALLOW", "conditions": ["request.method is \"GET\", and must be \"POST\""]},
            {"policy": "shop/cart", "rule": 1, "action": "ALLOW", "conditions": ["source.namespace is \"shop\", and must be \"admin\""]},
            {"policy": "shop/cart", "rule": 2, "action": "ALLOW",
             "conditions": ["request.headers[x-v] is not there, and must be \"1\" or begin with \"2\""]},
        ])
    );
    request["request.headers[X-V]"] = json!("2.1");
    check(&mesh, &request, &json!({"decision": "allow", "policy": "shop/cart", "rule": 2}));
    request["source.principal"] = json!("spiffe://mesh.local/ns/admin/sa/x");
    check(&mesh, &request, &json!({"decision": "allow", "rule": 1}));
    // Another workload is not selected.
    request["workload.labels[app]"] = json!("other");
    request["source.principal"] = json!("mesh.local/ns/x/sa/y");
    check(&mesh, &request, &json!({"decision": "allow", "policy": null}));
}

#[test]
fn order_of_actions() {
    let get_only = json!([{"to": [{"operation": {"methods": ["GET"]}}]}]);
    let with =
        |action: &str| policy("shop", &action.to_lowercase(), json!({"action": action, "rules": get_only}));
    let mesh = Mesh::default().with(with("ALLOW"));
    let request = get("/", "mesh.local/ns/a/sa/b");
    check(&mesh, &request, &json!({"decision": "allow", "policy": "shop/allow"}));
    let mesh = mesh.with(with("AUDIT"));
    check(&mesh, &request, &json!({"decision": "allow", "audit": ["shop/audit"]}));
    let mesh = mesh.with(with("DENY"));
    check(&mesh, &request, &json!({"decision": "deny", "policy": "shop/deny", "rule": 0}));
    let custom = policy(
        "shop",
        "custom",
        json!({"action": "CUSTOM", "provider": {"name": "oauth"}, "rules": get_only}),
    );
    let mesh = Mesh::default().with(with("ALLOW")).with(custom);
    // Policies alone do not say who can be asked.
    check(&mesh, &request, &json!({"decision": "allow", "policy": "shop/allow", "custom": "oauth"}));
    let providers = |name: &str, port: u16| {
        let authz = json!({"name": name, "envoyExtAuthzHttp": {"service": "oauth.shop.svc.cluster.local", "port": port}});
        json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
            "spec": {"extensionProviders": [authz]}})
    };
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "oauth", "namespace": "shop"},
        "spec": {"ports": [{"name": "http", "port": 80}]}});
    let mesh = mesh.with(service);
    let asked = mesh.clone().with(providers("oauth", 80));
    check(&asked, &request, &json!({"decision": "allow", "policy": "shop/allow", "custom": "oauth"}));
    for missing in [providers("other", 80), providers("oauth", 81)] {
        let mesh = mesh.clone().with(missing);
        check(&mesh, &request, &json!({"decision": "deny", "policy": "shop/custom", "custom": "oauth"}));
    }
    // Of the root namespace, for all.
    let mesh = Mesh::default().with(policy("istio-system", "all", json!({})));
    let got = check(&mesh, &request, &json!({"decision": "deny", "policy": null}));
    assert_eq!(got["missed"][0]["conditions"], json!(["the policy has no rules"]));
    let mut dry = policy("shop", "dry", json!({"action": "DENY", "rules": get_only}));
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    check(&Mesh::default().with(dry), &request, &json!({"decision": "allow", "dryRun": ["shop/dry"]}));
}

#[test]
fn tokens() {
    let mesh = Mesh::default().with(policy(
        "shop",
        "jwt",
        json!({"rules": [
            {"from": [{"source": {"requestPrincipals": ["https://issuer.example/alice"]}}]},
            {"when": [{"key": "request.auth.claims[groups]", "values": ["admin"]}]},
            {"when": [{"key": "request.auth.claims[realm][roles]", "values": ["ops"]}]},
            {"when": [{"key": "request.auth.audiences", "values": ["api"]}]},
        ]}),
    ));
    let mut request = get("/", "mesh.local/ns/a/sa/b");
    let got = check(&mesh, &request, &json!({"decision": "deny"}));
    assert_eq!(
        got["missed"][1]["conditions"],
        json!(["request.auth.claims[groups] is not there, and must be \"admin\""])
    );
    request["request.auth.principal"] = json!("https://issuer.example/alice");
    check(&mesh, &request, &json!({"decision": "allow", "rule": 0}));
    request["request.auth.principal"] = json!("https://issuer.example/bob");
    request["request.auth.claims[groups]"] = json!(["staff", "admin"]);
    check(&mesh, &request, &json!({"decision": "allow", "rule": 1}));
    request["request.auth.claims[groups]"] = json!("staff");
    request["request.auth.claims[realm][roles]"] = json!(["ops"]);
    check(&mesh, &request, &json!({"decision": "allow", "rule": 2}));
    request["request.auth.claims[realm][roles]"] = json!([]);
    request["request.auth.audiences"] = json!(["api"]);
    check(&mesh, &request, &json!({"decision": "allow", "rule": 3}));
}

#[test]
fn connections_of_bytes() {
    let mesh = Mesh::default()
        .with(policy("shop", "http", json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]})))
        .with(policy("shop", "tcp", json!({"rules": [
            {"from": [{"source": {"ipBlocks": ["10.0.0.0/8"]}}], "to": [{"operation": {"ports": ["5432"]}}]}]})));
    let bytes = |ip: &str, port: u16| json!({"workload.namespace": "shop", "source.ip": ip, "destination.port": port});
    check(&mesh, &bytes("10.1.1.1", 5432), &json!({"decision": "allow", "policy": "shop/tcp"}));
    let got = check(&mesh, &bytes("192.0.2.1", 5433), &json!({"decision": "deny"}));
    assert_eq!(
        got["missed"],
        json!([
            {"policy": "shop/http", "rule": 0, "action": "ALLOW", "conditions": ["it looks at requests, and this is none"]},
            {"policy": "shop/tcp", "rule": 0, "action": "ALLOW", "conditions": [
                "destination.port is \"5433\", and must be 5432", "source.ip is \"192.0.2.1\", and must be in 10.0.0.0/8"]},
        ])
    );
    // What looks at requests denies bytes, too, whatever they are.
    let mesh = Mesh::default().with(policy(
        "shop",
        "deny",
        json!({"action": "DENY", "rules": [
        {"to": [{"operation": {"methods": ["GET"], "ports": ["5432"]}}]}]}),
    ));
    check(&mesh, &bytes("10.1.1.1", 5432), &json!({"decision": "deny", "policy": "shop/deny"}));
    check(&mesh, &bytes("10.1.1.1", 80), &json!({"decision": "allow"}));
}

#[test]
fn negations_and_clusters() {
    let mesh = Mesh::default().with(policy("shop", "not", json!({"action": "DENY", "rules": [
        {"from": [{"source": {"notNamespaces": ["shop", "admin"]}}], "to": [{"operation": {"notPaths": ["/health"]}}]},
        {"when": [{"key": "source.cluster", "values": ["east"]}]}]})));
    let got = check(&mesh, &get("/x", "mesh.local/ns/shop/sa/front"), &json!({"decision": "allow"}));
    assert_eq!(
        got["missed"][0]["conditions"],
        json!(["source.namespace is \"shop\", and must not be \"shop\" or be \"admin\""])
    );
    assert_eq!(got["missed"][1]["conditions"], json!(["source.cluster is not there, and must be \"east\""]));
    check(&mesh, &get("/x", "mesh.local/ns/other/sa/x"), &json!({"decision": "deny", "rule": 0}));
    check(&mesh, &get("/health", "mesh.local/ns/other/sa/x"), &json!({"decision": "allow"}));
    let mut east = get("/health", "mesh.local/ns/shop/sa/front");
    east["source.cluster"] = json!("east");
    check(&mesh, &east, &json!({"decision": "deny", "rule": 1}));
}

#[test]
fn requests_that_make_no_sense() {
    for (text, says) in [
        ("{\"source.pricipal\": \"x\"}", "unknown attribute"),
        ("{\"source.ip\": \"x\"}", "an IP address"),
        ("{\"destination.port\": 99999}", "a port"),
        ("{\"request.method\": {}}", "a text"),
        ("{\"request.auth.principal\": \"x\"}", "ISSUER/SUBJECT"),
        ("[]", "flat map"),
        ("a: b: c", "flat map"),
    ] {
        let e = RequestFile::parse(text).unwrap_err().to_string();
        assert!(e.contains(says), "{text}: {e}");
    }
    let both = json!({"source.principal": "mesh.local/ns/a/sa/b", "source.namespace": "c"});
    let request = RequestFile::parse(&both.to_string()).unwrap();
    let e = Mesh::default().with(policy("default", "p", json!({}))).load().authorize(&request).unwrap_err();
    assert!(e.to_string().contains("source.namespace"), "{e}");
    let bad = RequestFile::parse("{\"request.method\": \"G E T\"}").unwrap();
    assert!(
        Mesh::default().with(policy("default", "p", json!({"rules": [{}]}))).load().authorize(&bad).is_err()
    );
}

fn of_role(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "rbac.istio.io/v1alpha1", "kind": kind,
           "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
}

/// Access to `cart` is by role; `cart` and `files` share their workloads.
fn by_role() -> Mesh {
    let service = |name: &str, port: u32| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
               "spec": {"selector": {"app": "cart"}, "ports": [{"name": "http", "port": 80, "targetPort": port}]}})
    };
    Mesh::default()
        .with(service("cart", 8080))
        .with(service("files", 8081))
        .with(of_role(
            "RbacConfig",
            "default",
            json!({"mode": "ON_WITH_INCLUSION", "inclusion": {"services": ["cart.shop.svc.cluster.local"]}}),
        ))
        .with(of_role(
            "ServiceRole",
            "viewer",
            json!({"rules": [{"services": ["cart.shop.svc.cluster.local"], "methods": ["GET"], "paths": ["/items*"]}]}),
        ))
        .with(of_role(
            "ServiceRoleBinding",
            "web",
            json!({"subjects": [{"user": "mesh.local/ns/a/sa/web"}], "roleRef": {"kind": "ServiceRole", "name": "viewer"}}),
        ))
}

#[test]
fn roles_decide_where_they_are_on_and_nothing_newer_does() {
    let (web, other) = ("mesh.local/ns/a/sa/web", "mesh.local/ns/a/sa/other");
    let mesh = by_role();
    check(
        &mesh,
        &get("/items/1", web),
        &json!({"decision": "allow", "policy": "shop/viewer (web)", "rule": 0}),
    );
    check(&mesh, &get("/other", web), &json!({"decision": "deny", "policy": null}));
    check(&mesh, &get("/items/1", other), &json!({"decision": "deny", "policy": null}));
    let at = |mut request: Value, port: u16| {
        request["destination.port"] = port.into();
        request
    };
    // A port of the same workload that is of a service whose access is not by role.
    check(&mesh, &at(get("/", other), 8081), &json!({"decision": "allow"}));
    // Bytes match no rule about requests.
    let bytes = json!({"workload.namespace": "shop", "workload.labels[app]": "cart", "source.principal": web,
                       "destination.port": 8080});
    check(&mesh, &bytes, &json!({"decision": "deny"}));

    // What decides nothing leaves them; what does makes them void.
    let rules = json!({"rules": [{}]});
    let audit = mesh.clone().with(policy("shop", "audit", json!({"action": "AUDIT", "rules": [{}]})));
    check(&audit, &get("/other", web), &json!({"decision": "deny", "audit": ["shop/audit"]}));
    let mut dry = policy("shop", "dry", rules.clone());
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    check(&mesh.clone().with(dry), &get("/other", web), &json!({"decision": "deny", "dryRun": ["shop/dry"]}));
    let newer = mesh.clone().with(policy("shop", "newer", rules));
    check(&newer, &get("/other", other), &json!({"decision": "allow", "policy": "shop/newer"}));
    let elsewhere =
        policy("shop", "elsewhere", json!({"selector": {"matchLabels": {"app": "x"}}, "rules": [{}]}));
    check(&mesh.with(elsewhere), &get("/other", web), &json!({"decision": "deny"}));
}

#[test]
fn roles_of_other_namespaces_and_missing_ones_open_nothing() {
    let web = "mesh.local/ns/a/sa/web";
    for (kind, field, value) in [
        ("ServiceRole", "/metadata/namespace", "other"),
        ("ServiceRoleBinding", "/metadata/namespace", "other"),
        ("ServiceRoleBinding", "/spec/roleRef/name", "absent"),
    ] {
        let mut mesh = by_role();
        let doc = mesh.0.iter_mut().find(|d| d["kind"] == kind).unwrap();
        *doc.pointer_mut(field).unwrap() = value.into();
        check(&mesh, &get("/items/1", web), &json!({"decision": "deny", "policy": null}));
    }
    // The whole cluster's configuration is instead of those of namespaces.
    let off = json!({"apiVersion": "rbac.istio.io/v1alpha1", "kind": "ClusterRbacConfig",
                     "metadata": {"name": "default"}, "spec": {"mode": "OFF"}});
    check(&by_role().with(off), &get("/other", web), &json!({"decision": "allow"}));
    // Several of namespaces count together.
    let mut second = of_role("RbacConfig", "default", json!({"mode": "OFF"}));
    second["metadata"]["namespace"] = "aaa".into();
    check(&by_role().with(second), &get("/other", web), &json!({"decision": "deny"}));
}
