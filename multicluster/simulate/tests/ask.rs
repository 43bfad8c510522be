//! Questions about whole meshes, and what is answered.

mod support;

use serde_json::json;
use support::{Mesh, bookinfo};

#[test]
fn a_request_of_one_user_goes_elsewhere() {
    let mesh = bookinfo().with(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "reviews", "namespace": "default"},
        "spec": {"hosts": ["reviews"], "http": [
            {"match": [{"headers": {"end-user": {"exact": "jason"}}}],
             "route": [{"destination": {"host": "reviews", "subset": "v2"}}]},
            {"name": "split", "timeout": "3s", "retries": {"attempts": 4, "perTryTimeout": "1.5s", "retryOn": "5xx,503"},
             "route": [{"destination": {"host": "reviews", "subset": "v1"}, "weight": 70},
                       {"destination": {"host": "reviews", "subset": "v3"}, "weight": 30}]}]}
    }));
    mesh.asks("default/productpage-v1", "GET http://reviews:9080/x", &["end-user: jason"], &json!({
        "listener": "0.0.0.0_9080", "virtualHost": "reviews.default.svc.cluster.local:9080", "route": "[0]",
        "virtualService": "default/reviews", "subset": "v2", "action": "forward", "timeout": null,
        "endpoints": [{"address": "10.1.0.12:9080", "workload": "default/reviews-v2", "tls": "mutual", "active": true,
                       "sni": "outbound_.9080_.v2_.reviews.default.svc.cluster.local"}],
        "headers": {"end-user": "jason"},
    }));
    let a = mesh.asks("default/productpage-v1", "GET http://reviews:9080/x", &[], &json!({
        "route": "split", "cluster": "outbound|9080|v1|reviews.default.svc.cluster.local", "subset": "v1",
        "weights": [{"subset": "v1", "weight": 70}, {"subset": "v3", "weight": 30}],
        "timeout": "3s", "retries": {"attempts": 4, "perTryTimeout": "1.5s", "retryOn": "5xx,retriable-status-codes,503"},
    }));
    let why = &a["reasons"].as_array().unwrap().iter().find(|r| r["kind"] == "route").unwrap()["why"];
    assert_eq!(why, "header end-user is not there, and must be \"jason\"");
}

#[test]
fn names_as_callers_write_them() {
    let mesh = bookinfo().with(json!({
        "apiVersion": "multicluster.x-k8s.io/v1alpha1", "kind": "ServiceExport",
        "metadata": {"name": "reviews", "namespace": "default"}
    }));
    for host in [
        "reviews",
        "reviews.default",
        "reviews.default.svc",
        "reviews.default.svc.cluster.local",
        "reviews.default.svc.clusterset.local",
        "reviews.default.global",
        "10.96.0.1",
    ] {
        mesh.asks("default/productpage-v1", &format!("GET http://{host}:9080/"), &[], &json!({
            "host": "reviews.default.svc.cluster.local", "route": "default", "action": "forward", "virtualService": null,
            "endpoints": [{"address": "10.1.0.11:9080"}, {"address": "10.1.0.12:9080"}, {"address": "10.1.0.13:9080"}],
        }));
    }
    // Another namespace's short name is nobody's.
    mesh.asks("other/app", "GET http://reviews:9080/", &[], &json!({
        "host": null, "destination": "198.51.100.1:9080", "virtualHost": "allow_any", "cluster": "PassthroughCluster",
    }));
}

#[test]
fn who_is_not_let_in() {
    let policy = |action: &str, principal: &str| {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "who", "namespace": "default"},
            "spec": {"selector": {"matchLabels": {"app": "ratings"}}, "action": action, "rules": [
                {"from": [{"source": {"principals": [principal]}}], "to": [{"operation": {"paths": ["/x*"]}}]}]}
        })
    };
    let ask = |m: &Mesh, path: &str, want: serde_json::Value| {
        m.asks("default/reviews-v1", &format!("GET http://ratings:9080{path}"), &[], &want);
    };
    let denied = json!({"action": "deny", "status": 403,
        "detail": "default/ratings-v1: denied by AuthorizationPolicy default/who, rule 0"});
    let m = bookinfo().with(policy("DENY", "mesh.local/ns/default/sa/reviews"));
    ask(&m, "/x1", denied);
    ask(&m, "/y", json!({"action": "forward", "status": null}));
    let m = bookinfo().with(policy("ALLOW", "mesh.local/ns/default/sa/reviews"));
    ask(&m, "/x1", json!({"action": "forward"}));
    ask(&m, "/y", json!({"action": "deny", "detail": "default/ratings-v1: no ALLOW policy lets it in"}));
    // A caller without a proxy's certificate, where one is wanted.
    let m = bookinfo()
        .with(json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": "default"}, "spec": {"mtls": {"mode": "STRICT"}}
        }))
        .with(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
            "metadata": {"name": "plain", "namespace": "default"},
            "spec": {"host": "ratings", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}
        }));
    ask(&m, "/", json!({"action": "close", "endpoints": [{"tls": "none"}]}));
}

#[test]
fn an_ingress_gateway() {
    let mesh = bookinfo().with(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "Gateway",
        "metadata": {"name": "shop", "namespace": "default"},
        "spec": {"selector": {"istio": "ingressgateway"}, "servers": [
            {"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["shop.example"], "tls": {"httpsRedirect": true}},
            {"port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["shop.example"],
             "tls": {"mode": "SIMPLE", "credentialName": "shop"}}]}
    })).with(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "shop", "namespace": "default"},
        "spec": {"hosts": ["shop.example"], "gateways": ["shop"], "http": [
            {"match": [{"uri": {"prefix": "/reviews"}}], "rewrite": {"uri": "/r"},
             "route": [{"destination": {"host": "reviews", "port": {"number": 9080}}}]},
            {"match": [{"uri": {"exact": "/old"}}], "redirect": {"uri": "/reviews", "redirectCode": 302}}]}
    }));
    let from = "istio-system/istio-ingressgateway";
    mesh.asks(from, "GET https://shop.example/reviews/1", &[], &json!({
        "caller": {"proxy": "gateway"}, "action": "forward",
        "cluster": "outbound|9080||reviews.default.svc.cluster.local",
        "upstream": {"path": "/r/1", "authority": "shop.example"},
        "headers": {"x-envoy-original-path": "/reviews/1", "x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.7"},
    }));
    mesh.asks(
        from,
        "GET https://shop.example/old",
        &[],
        &json!({
            "action": "redirect", "status": 302, "location": "https://shop.example/reviews",
        }),
    );
    mesh.asks(
        from,
        "GET http://shop.example/reviews",
        &[],
        &json!({
            "action": "redirect", "status": 301, "location": "https://shop.example/reviews",
        }),
    );
    mesh.asks(from, "GET https://shop.example/none", &[], &json!({"action": "not-found", "status": 404}));
    mesh.asks(from, "GET https://other.example/", &[], &json!({"action": "close", "filterChain": null}));
    mesh.asks(from, "GET http://shop.example:8080/", &[], &json!({"action": "close", "listener": null}));
}

#[test]
fn bytes_and_tls() {
    let mesh = bookinfo().with(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "db", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "tcp-db", "port": 5432}], "selector": {"app": "ratings"}}
    })).with(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "api", "namespace": "default"},
        "spec": {"hosts": ["api.example"], "location": "MESH_EXTERNAL", "resolution": "DNS",
                 "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}]}
    }));
    mesh.asks("default/reviews-v1", "tcp://db:5432", &[], &json!({
        "action": "forward-tcp", "cluster": "outbound|5432||db.default.svc.cluster.local", "virtualHost": null,
        "endpoints": [{"address": "10.1.0.21:5432", "tls": "mutual"}],
    }));
    mesh.asks("default/reviews-v1", "GET https://api.example/x", &[], &json!({
        "action": "forward-tcp", "cluster": "outbound|443||api.example", "host": "api.example", "route": null,
    }));
}

#[test]
fn questions_that_make_no_sense() {
    let mesh = bookinfo();
    for (from, request) in [("x", "GET http://a/"), ("a/b", "GET nope://a/"), ("a/b", "tcp://a"), ("a/b", "")]
    {
        assert!(mesh.try_ask(from, request, &[]).is_err(), "{from} {request}");
    }
}

/// Routes by claims of a token at a gateway that verifies it; without a verified token there are none, whatever headers say.
#[test]
fn claims_of_tokens() {
    use base64::Engine as _;
    let route = |keys: serde_json::Value, host: &str| json!({"match": [keys], "route": [{"destination": {"host": host, "port": {"number": 9080}}}]});
    let service = |gateways: serde_json::Value| {
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "shop", "namespace": "default"},
            "spec": {"hosts": ["shop.example"], "gateways": gateways, "http": [
                route(json!({"headers": {"@request.auth.claims[groups]": {"exact": "admin"}}}), "reviews"),
                route(json!({"headers": {"@request.auth.claims.deep.level": {}}}), "details"),
                route(json!({"withoutHeaders": {"@request.auth.claims.sub": {"prefix": "a"}}}), "productpage"),
                route(json!({}), "ratings"),
            ]}
        })
    };
    let mesh = bookinfo()
        .with(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "Gateway",
            "metadata": {"name": "shop", "namespace": "default"},
            "spec": {"selector": {"istio": "ingressgateway"}, "servers": [
                {"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["shop.example"]}]}
        }))
        .with(json!({
            "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
            "metadata": {"name": "users", "namespace": "istio-system"},
            "spec": {"selector": {"matchLabels": {"istio": "ingressgateway"}}, "jwtRules": [{"issuer": "a", "jwks": r#"{"keys":[{"kty":"oct","k":"AA"}]}"#}]}
        }))
        .with(service(json!(["shop"])));
    let b64 = |v: serde_json::Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(v.to_string());
    let bearer = |claims: serde_json::Value| {
        format!("authorization: Bearer {}.{}.AA", b64(json!({"alg": "ES256"})), b64(claims))
    };
    let from = "istio-system/istio-ingressgateway";
    for (headers, host) in [
        (vec![bearer(json!({"iss": "a", "sub": "al", "groups": ["users", "admin"]}))], "reviews"),
        (vec![bearer(json!({"iss": "a", "sub": "al", "groups": "admin"}))], "reviews"),
        (vec![bearer(json!({"iss": "a", "sub": "al", "deep": {"level": "1"}}))], "details"),
        (vec![bearer(json!({"iss": "a", "sub": "bob"}))], "productpage"),
        (vec![bearer(json!({"iss": "a", "sub": "al"}))], "ratings"),
        (vec!["groups: admin".to_owned()], "productpage"),
    ] {
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let cluster = format!("outbound|9080||{host}.default.svc.cluster.local");
        mesh.asks(
            from,
            "GET http://shop.example/",
            &headers,
            &json!({"action": "forward", "cluster": cluster}),
        );
    }
}
