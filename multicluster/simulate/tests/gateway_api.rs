//! The Gateway API, by requests to meshes on paper.

mod support;

use serde_json::{Value, json};
use support::{Mesh, bookinfo};

/// The proxy of a Gateway called `shop`.
const EDGE: &str = "default/shop";

fn object(kind: &str, name: &str, spec: Value) -> Value {
    in_namespace("default", kind, name, spec)
}

fn in_namespace(namespace: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": kind,
        "metadata": {"name": name, "namespace": namespace}, "spec": spec
    })
}

fn gateway(listeners: Value) -> Value {
    object("Gateway", "shop", json!({"gatewayClassName": "istio", "listeners": listeners}))
}

fn plain() -> Value {
    json!({"name": "http", "port": 80, "protocol": "HTTP"})
}

fn secure(extra: Value) -> Value {
    let mut l = json!({"name": "https", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "cert"}]}});
    l.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    l
}

fn backend(name: &str) -> Value {
    json!({"name": name, "port": 9080})
}

fn service(name: &str) -> String {
    format!("outbound|9080||{name}.default.svc.cluster.local")
}

/// A route at the Gateway `shop`.
fn route(name: &str, rules: Value) -> Value {
    object("HTTPRoute", name, json!({"parentRefs": [{"name": "shop"}], "rules": rules}))
}

/// One rule to reviews with `extra` in it.
fn rule(extra: Value) -> Value {
    let mut r = json!({"backendRefs": [backend("reviews")]});
    r.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    json!([r])
}

fn edge(rules: Value) -> Mesh {
    bookinfo().with(gateway(json!([plain()]))).with(route("r", rules))
}

/// Asks the Gateway's proxy.
#[track_caller]
fn ask(m: &Mesh, request: &str, headers: &[&str], want: Value) -> Value {
    m.asks(EDGE, request, headers, &want)
}

#[track_caller]
fn goes(m: &Mesh, request: &str, to: &str) {
    ask(m, request, &[], json!({"action": "forward", "cluster": service(to)}));
}

#[track_caller]
fn lost(m: &Mesh, request: &str) {
    ask(m, request, &[], json!({"action": "not-found", "status": 404}));
}

#[test]
fn a_gateway_is_served_by_the_proxies_of_its_name() {
    let m = edge(rule(json!({})));
    ask(
        &m,
        "GET http://any.example/x",
        &[],
        json!({"caller": {"proxy": "gateway"}, "action": "forward", "cluster": service("reviews"), "route": "default/r/0"}),
    );
    // The same name in another namespace is another Gateway.
    m.asks("other/shop", "GET http://any.example/x", &[], &json!({"caller": {"proxy": "sidecar"}}));
    // A class of somebody else.
    let other =
        |class: &str| object("Gateway", "shop", json!({"gatewayClassName": class, "listeners": [plain()]}));
    let rules = rule(json!({}));
    let m = bookinfo().with(other("nginx")).with(route("r", rules.clone()));
    ask(&m, "GET http://any.example/x", &[], json!({"caller": {"proxy": "sidecar"}}));
    // A class by its document.
    let class = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass", "metadata": {"name": "nginx"},
                       "spec": {"controllerName": "flotilla.dev/gateway-controller"}});
    goes(&m.with(class), "GET http://any.example/x", "reviews");
    goes(&bookinfo().with(other("flotilla")).with(route("r", rules)), "GET http://any.example/x", "reviews");
}

#[test]
fn a_gateway_is_served_by_the_proxies_of_a_service() {
    let m = bookinfo()
        .with(object(
            "Gateway",
            "shop",
            json!({"gatewayClassName": "istio", "listeners": [plain()],
                   "addresses": [{"type": "Hostname", "value": "edge.ingress.svc.cluster.local"}]}),
        ))
        .with(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "edge", "namespace": "ingress"},
            "spec": {"clusterIP": "10.96.0.20", "selector": {"istio": "edge"}, "ports": [{"name": "http", "port": 80}]}
        }))
        .with(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
            "metadata": {"name": "edge-1", "namespace": "ingress"},
            "spec": {"address": "10.1.0.40", "labels": {"istio": "edge"}}
        }))
        .with(route("r", rule(json!({}))));
    m.asks(
        "ingress/edge-1",
        "GET http://a.example/",
        &[],
        &json!({"action": "forward", "cluster": service("reviews")}),
    );
    ask(&m, "GET http://a.example/", &[], json!({"caller": {"proxy": "sidecar"}}));
}

#[test]
fn host_names_of_listeners_and_routes() {
    let l = |name: &str, host: &str| json!({"name": name, "port": 80, "protocol": "HTTP", "hostname": host});
    let with = |hosts: Value, listeners: Value| {
        let spec = json!({"parentRefs": [{"name": "shop"}], "hostnames": hosts, "rules": rule(json!({}))});
        bookinfo().with(gateway(listeners)).with(object("HTTPRoute", "r", spec))
    };
    // The narrower of both.
    let m = with(json!(["a.example", "*.b.example", "c.other"]), json!([l("x", "*.example")]));
    goes(&m, "GET http://a.example/", "reviews");
    goes(&m, "GET http://x.y.b.example/", "reviews");
    lost(&m, "GET http://b.example/");
    lost(&m, "GET http://c.other/");
    let m = with(json!(["*.example"]), json!([l("x", "a.example")]));
    goes(&m, "GET http://a.example/", "reviews");
    lost(&m, "GET http://b.example/");
    // A name without a dot is no service's.
    let m = with(json!(["localhost"]), json!([plain()]));
    goes(&m, "GET http://localhost/", "reviews");
    // None is all of the other's.
    let m = with(json!([]), json!([l("x", "a.example")]));
    goes(&m, "GET http://a.example/", "reviews");
    lost(&m, "GET http://b.example/");
    // A request belongs to the narrowest listener, and to no other.
    let spec = json!({"parentRefs": [{"name": "shop", "sectionName": "wide"}], "rules": rule(json!({}))});
    let m = bookinfo().with(gateway(json!([l("wide", "*.example"), l("narrow", "a.example")]))).with(object(
        "HTTPRoute",
        "r",
        spec,
    ));
    goes(&m, "GET http://b.example/", "reviews");
    ask(&m, "GET http://a.example/", &[], json!({"status": 404}));
}

#[test]
fn one_listener_by_name_or_port() {
    let listeners = json!([plain(), {"name": "other", "port": 8080, "protocol": "HTTP"}]);
    let with = |parent: Value| {
        let spec = json!({"parentRefs": [parent], "rules": rule(json!({}))});
        bookinfo().with(gateway(listeners.clone())).with(object("HTTPRoute", "r", spec))
    };
    for parent in [json!({"name": "shop", "sectionName": "other"}), json!({"name": "shop", "port": 8080})] {
        let m = with(parent);
        goes(&m, "GET http://a.example:8080/", "reviews");
        lost(&m, "GET http://a.example/");
    }
    lost(&with(json!({"name": "shop", "sectionName": "none"})), "GET http://a.example/");
}

#[test]
fn who_may_attach() {
    let with = |allowed: Value, namespace: &str| {
        let mut l = plain();
        l["allowedRoutes"] = allowed;
        let spec = json!({"parentRefs": [{"name": "shop", "namespace": "default"}],
                          "rules": [{"backendRefs": [backend("local")]}]});
        let mut local = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "local", "namespace": namespace},
            "spec": {"clusterIP": "10.96.0.30", "ports": [{"name": "http", "port": 9080}], "selector": {"app": "local"}}});
        local["metadata"]["namespace"] = json!(namespace);
        bookinfo()
            .with(gateway(json!([l])))
            .with(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team", "labels": {"open": "yes"}}}))
            .with(local)
            .with(in_namespace(namespace, "HTTPRoute", "r", spec))
    };
    let namespaces = |from: Value| json!({"namespaces": from});
    let selector = |labels: Value| namespaces(json!({"from": "Selector", "selector": labels}));
    for (allowed, namespace, yes) in [
        (json!({}), "default", true),
        (json!({}), "team", false),
        (namespaces(json!({"from": "All"})), "team", true),
        (namespaces(json!({"from": "None"})), "default", false),
        (selector(json!({"matchLabels": {"open": "yes"}})), "team", true),
        (selector(json!({"matchLabels": {"open": "yes"}})), "default", false),
        (selector(json!({"matchLabels": {"kubernetes.io/metadata.name": "team"}})), "team", true),
        (
            selector(json!({"matchExpressions": [{"key": "open", "operator": "NotIn", "values": ["no"]}]})),
            "team",
            true,
        ),
        (selector(json!({"matchExpressions": [{"key": "open", "operator": "DoesNotExist"}]})), "team", false),
        (json!({"kinds": [{"kind": "HTTPRoute"}]}), "default", true),
        (json!({"kinds": [{"kind": "GRPCRoute"}]}), "default", false),
    ] {
        let m = with(allowed.clone(), namespace);
        let want = if yes { json!({"action": "forward"}) } else { json!({"status": 404}) };
        let answer = m.try_ask(EDGE, "GET http://a.example/", &[]).unwrap();
        assert!(support::contains(&answer, &want, "").is_ok(), "{allowed} {namespace}: {answer:#}");
    }
}

#[test]
fn matches() {
    let m = |matches: Value| edge(json!([{"matches": matches, "backendRefs": [backend("ratings")]}]));
    let prefix = m(json!([{"path": {"value": "/a"}}]));
    for path in ["/a", "/a/", "/a/b", "/a?x=/"] {
        goes(&prefix, &format!("GET http://x{path}"), "ratings");
    }
    // Whole segments only.
    lost(&prefix, "GET http://x/ab");
    let exact = m(json!([{"path": {"type": "Exact", "value": "/a"}}]));
    goes(&exact, "GET http://x/a?y", "ratings");
    lost(&exact, "GET http://x/a/");
    let pattern = m(json!([{"path": {"type": "RegularExpression", "value": "/v[0-9]+"}}]));
    goes(&pattern, "GET http://x/v12", "ratings");
    lost(&pattern, "GET http://x/v12/y");
    let headers = m(
        json!([{"headers": [{"name": "X-A", "value": "1"}, {"name": "x-b", "type": "RegularExpression", "value": "a+"}, {"name": "x-a", "value": "2"}]}]),
    );
    ask(&headers, "GET http://x/", &["x-a: 1", "x-b: aa"], json!({"action": "forward"}));
    ask(&headers, "GET http://x/", &["x-a: 1", "x-b: b"], json!({"status": 404}));
    let query = m(
        json!([{"queryParams": [{"name": "q", "value": "1"}], "method": "POST"}, {"path": {"value": "/or"}}]),
    );
    goes(&query, "POST http://x/?q=1", "ratings");
    lost(&query, "GET http://x/?q=1");
    goes(&query, "GET http://x/or", "ratings");
}

#[test]
fn the_more_specific_match_wins() {
    let one = |matches: Value| json!([{"matches": [matches], "backendRefs": [backend("ratings")]}]);
    let two = |matches: Value| json!([{"matches": [matches], "backendRefs": [backend("reviews")]}]);
    let with = |less: Value, more: Value| {
        bookinfo().with(gateway(json!([plain()]))).with(route("a", one(less))).with(route("b", two(more)))
    };
    let request = "POST http://x/a/b?q=1";
    for (less, more) in [
        (json!({}), json!({"path": {"value": "/a"}})),
        (json!({"path": {"value": "/a"}}), json!({"path": {"value": "/a/b"}})),
        (
            json!({"path": {"value": "/a/b"}, "method": "POST"}),
            json!({"path": {"type": "Exact", "value": "/a/b"}}),
        ),
        (json!({"headers": [{"name": "h", "value": "1"}]}), json!({"method": "POST"})),
        (
            json!({"queryParams": [{"name": "q", "value": "1"}]}),
            json!({"headers": [{"name": "h", "value": "1"}]}),
        ),
        (json!({}), json!({"queryParams": [{"name": "q", "value": "1"}]})),
    ] {
        let m = with(less.clone(), more.clone());
        let answer = m.asks(EDGE, request, &["h: 1"], &json!({"action": "forward"}));
        assert_eq!(answer["cluster"], service("reviews"), "{less} before {more}");
    }
    // Then the first by name, unless it is younger.
    let m = with(json!({}), json!({}));
    goes(&m, request, "ratings");
    let mut younger = route("a", one(json!({})));
    younger["metadata"]["creationTimestamp"] = json!("2021-01-01T00:00:00Z");
    let mut older = route("b", two(json!({})));
    older["metadata"]["creationTimestamp"] = json!("2020-01-01T00:00:00Z");
    let m = bookinfo().with(gateway(json!([plain()]))).with(younger).with(older);
    goes(&m, request, "reviews");
}

#[test]
fn weights_and_backends_that_are_none() {
    let m = |backends: Value| edge(json!([{"backendRefs": backends}]));
    let w = |name: &str, weight: u32| json!({"name": name, "port": 9080, "weight": weight});
    ask(
        &m(json!([w("reviews", 9), w("ratings", 1), w("productpage", 0)])),
        "GET http://x/",
        &[],
        json!({"weights": [{"host": "reviews.default.svc.cluster.local", "weight": 9}, {"host": "ratings.default.svc.cluster.local", "weight": 1}]}),
    );
    let fails = json!({"action": "direct-response", "status": 500});
    ask(&m(json!([w("nobody", 1)])), "GET http://x/", &[], fails.clone());
    ask(&m(json!([{"name": "reviews", "port": 1}])), "GET http://x/", &[], fails.clone());
    ask(&m(json!([{"name": "reviews", "kind": "Thing", "port": 9080}])), "GET http://x/", &[], fails.clone());
    ask(&m(json!([w("reviews", 0)])), "GET http://x/", &[], fails.clone());
    ask(&m(json!([])), "GET http://x/", &[], fails);
    // The share of one that is none.
    ask(
        &m(json!([w("reviews", 3), w("nobody", 1)])),
        "GET http://x/",
        &[],
        json!({"cluster": service("reviews"), "fault": {"abort": {"percentage": 25.0, "value": 500}}}),
    );
    // A host that a ServiceEntry has.
    let host =
        json!([{"group": "networking.istio.io", "kind": "Hostname", "name": "api.example", "port": 80}]);
    let entry = json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "api", "namespace": "default"},
        "spec": {"hosts": ["api.example"], "resolution": "DNS", "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]}});
    ask(&m(host).with(entry), "GET http://x/", &[], json!({"cluster": "outbound|80||api.example"}));
}

#[test]
fn another_namespace_must_grant_it() {
    let other = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "pay", "namespace": "bank"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80}], "selector": {"app": "pay"}}
    });
    let m = edge(json!([{"backendRefs": [{"name": "pay", "namespace": "bank", "port": 80}]}])).with(other);
    let grant = |kind: &str, namespace: &str, to: Value| {
        in_namespace(
            "bank",
            "ReferenceGrant",
            "g",
            json!({
            "from": [{"group": "gateway.networking.k8s.io", "kind": kind, "namespace": namespace}], "to": [to]}),
        )
    };
    let to = json!({"group": "", "kind": "Service"});
    ask(&m, "GET http://x/", &[], json!({"status": 500}));
    for g in [
        grant("GRPCRoute", "default", to.clone()),
        grant("HTTPRoute", "other", to.clone()),
        grant("HTTPRoute", "default", json!({"group": "", "kind": "Service", "name": "x"})),
        grant("HTTPRoute", "default", json!({"group": "", "kind": "Secret"})),
    ] {
        ask(&m.clone().with(g), "GET http://x/", &[], json!({"status": 500}));
    }
    for g in [
        grant("HTTPRoute", "default", to),
        grant("HTTPRoute", "default", json!({"group": "", "kind": "Service", "name": "pay"})),
    ] {
        let want = json!({"action": "forward", "cluster": "outbound|80||pay.bank.svc.cluster.local"});
        ask(&m.clone().with(g), "GET http://x/", &[], want);
    }
}

#[test]
fn headers_and_shadows() {
    let m = edge(rule(json!({"filters": [
        {"type": "RequestHeaderModifier", "requestHeaderModifier": {
            "set": [{"name": "X-Set", "value": "1"}], "add": [{"name": "x-add", "value": "2"}], "remove": ["x-gone"]}},
        {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-answer", "value": "3"}]}},
        {"type": "RequestMirror", "requestMirror": {"backendRef": backend("ratings"), "percent": 5}},
        {"type": "RequestMirror", "requestMirror": {"backendRef": backend("productpage"), "fraction": {"numerator": 1, "denominator": 4}}},
        {"type": "RequestMirror", "requestMirror": {"backendRef": backend("nobody")}}]})));
    let a = ask(
        &m,
        "GET http://x/",
        &["x-set: 0", "x-add: 1", "x-gone: 1"],
        json!({"headers": {"x-set": "1", "x-gone": null}, "responseHeaders": {"x-answer": "3"},
               "mirrors": [{"cluster": service("ratings"), "percentage": 5.0}, {"cluster": service("productpage"), "percentage": 25.0}]}),
    );
    assert!(a["headers"]["x-add"].to_string().contains('2'), "{a:#}");
    // Of one backend.
    let m = edge(json!([{"backendRefs": [{"name": "reviews", "port": 9080, "filters": [
        {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-of", "value": "reviews"}]}}]}]}]));
    ask(&m, "GET http://x/", &[], json!({"headers": {"x-of": "reviews"}}));
}

#[test]
fn rewrites() {
    let m = |prefix: &str, path: Value| {
        edge(json!([{"matches": [{"path": {"value": prefix}}], "backendRefs": [backend("reviews")],
            "filters": [{"type": "URLRewrite", "urlRewrite": {"hostname": "inner.example", "path": path}}]}]))
    };
    let replace = |with: &str| json!({"type": "ReplacePrefixMatch", "replacePrefixMatch": with});
    for (prefix, with, path, becomes) in [
        ("/foo", "/xyz", "/foo/bar", "/xyz/bar"),
        ("/foo", "/xyz", "/foo", "/xyz"),
        ("/foo/", "/xyz/", "/foo/bar?q", "/xyz/bar?q"),
        ("/foo", "", "/foo/bar", "/bar"),
        ("/foo", "/", "/foo", "/"),
        ("/foo", "/", "/foo/", "/"),
        ("/foo", "/", "/foo?q=1", "/?q=1"),
        ("/", "/xyz", "/bar", "/xyz/bar"),
    ] {
        let want = json!({"upstream": {"path": becomes, "authority": "inner.example"}});
        ask(&m(prefix, replace(with)), &format!("GET http://x{path}"), &[], want);
    }
    let full = m("/foo", json!({"type": "ReplaceFullPath", "replaceFullPath": "/all"}));
    ask(&full, "GET http://x/foo/bar?q", &[], json!({"upstream": {"path": "/all?q"}}));
}

#[test]
fn redirects() {
    let m = |redirect: Value| {
        let rules = json!([{"matches": [{"path": {"value": "/foo"}}], "filters": [{"type": "RequestRedirect", "requestRedirect": redirect}]}]);
        bookinfo()
            .with(gateway(
                json!([plain(), {"name": "alt", "port": 8080, "protocol": "HTTP"}, secure(json!({}))]),
            ))
            .with(route("r", rules))
    };
    let prefix = |with: &str| json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": with}});
    for (redirect, request, status, location) in [
        (json!({}), "http://x.example/foo", 302, "http://x.example/foo"),
        (
            json!({"scheme": "https", "statusCode": 301}),
            "http://x.example/foo?q",
            301,
            "https://x.example/foo?q",
        ),
        (json!({"scheme": "https"}), "http://x.example:8080/foo", 302, "https://x.example:443/foo"),
        (json!({"scheme": "https", "port": 8443}), "http://x.example/foo", 302, "https://x.example:8443/foo"),
        (json!({"hostname": "y.example"}), "http://x.example/foo", 302, "http://y.example/foo"),
        (json!({"hostname": "y.example"}), "http://x.example:8080/foo", 302, "http://y.example:8080/foo"),
        (
            json!({"hostname": "y.example", "scheme": "https"}),
            "http://x.example:8080/foo",
            302,
            "https://y.example/foo",
        ),
        (
            json!({"port": 80, "hostname": "y.example"}),
            "http://x.example:8080/foo",
            302,
            "http://y.example/foo",
        ),
        (json!({"scheme": "http"}), "https://x.example/foo", 302, "http://x.example/foo"),
        (prefix("/bar"), "http://x.example/foo/a", 302, "http://x.example/bar/a"),
        (prefix("/"), "http://x.example/foo/a", 302, "http://x.example/a"),
        (prefix(""), "http://x.example/foo", 302, "http://x.example/"),
        (
            json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/all"}, "statusCode": 308}),
            "http://x.example/foo/a",
            308,
            "http://x.example/all",
        ),
    ] {
        let want = json!({"action": "redirect", "status": status, "location": location});
        ask(&m(redirect), &format!("GET {request}"), &[], want);
    }
}

#[test]
fn limits_of_time_and_retries() {
    let a = |extra: Value, want: Value| ask(&edge(rule(extra)), "GET http://x/", &[], want);
    a(json!({}), json!({"timeout": null, "retries": {"attempts": 2}}));
    a(
        json!({"timeouts": {"request": "10s", "backendRequest": "2s"}}),
        json!({"timeout": "10s", "retries": {"attempts": 2, "perTryTimeout": "2s"}}),
    );
    a(json!({"timeouts": {"request": "0s"}}), json!({"timeout": null}));
    let x = a(
        json!({"retry": {"codes": [503, 504], "attempts": 4, "backoff": "100ms"}}),
        json!({"retries": {"attempts": 4}}),
    );
    let on = x["retries"]["retryOn"].as_str().unwrap();
    assert!(on.contains("503") && on.contains("504") && on.contains("connect-failure"), "{on}");
    a(json!({"retry": {"attempts": 0}}), json!({"retries": null}));
}

#[test]
fn cross_origin() {
    let m = edge(rule(json!({"filters": [{"type": "CORS", "cors": {
        "allowOrigins": ["https://a.example", "https://*.b.example"], "allowMethods": ["GET"], "maxAge": 60}}]})));
    let preflight = |origin: &str| {
        let headers = [format!("origin: {origin}"), "access-control-request-method: GET".to_owned()];
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        m.try_ask(EDGE, "OPTIONS http://x/", &headers).unwrap()
    };
    for origin in ["https://a.example", "https://x.y.b.example"] {
        let a = preflight(origin);
        assert_eq!(a["status"], 200, "{origin}: {a:#}");
        assert_eq!(a["responseHeaders"]["access-control-allow-origin"], origin, "{a:#}");
        assert_eq!(a["responseHeaders"]["access-control-max-age"], "60", "{a:#}");
    }
    assert_eq!(preflight("https://b-example")["action"], "forward");
}

#[test]
fn filters_that_nobody_knows_never_let_a_request_pass() {
    let auth = json!({"type": "ExternalAuth", "externalAuth": {"protocol": "GRPC", "backendRef": backend("ratings"), "grpc": {}}});
    let own =
        json!({"type": "ExtensionRef", "extensionRef": {"group": "x.example", "kind": "Thing", "name": "t"}});
    for filter in [auth, own] {
        ask(
            &edge(rule(json!({"filters": [filter]}))),
            "GET http://x/",
            &[],
            json!({"action": "direct-response", "status": 500}),
        );
    }
}

#[test]
fn grpc_routes() {
    let m = |matches: Value| {
        let spec = json!({"parentRefs": [{"name": "shop"}], "hostnames": ["g.example"],
            "rules": [{"matches": matches, "backendRefs": [backend("ratings")]}, {"matches": [{"method": {"service": "a.B"}}], "backendRefs": [backend("reviews")]}]});
        bookinfo().with(gateway(json!([plain()]))).with(object("GRPCRoute", "g", spec))
    };
    let exact =
        m(json!([{"method": {"service": "a.B", "method": "C"}, "headers": [{"name": "v", "value": "1"}]}]));
    ask(
        &exact,
        "POST http://g.example/a.B/C",
        &["v: 1"],
        json!({"cluster": service("ratings"), "route": "default/g/0"}),
    );
    goes(&exact, "POST http://g.example/a.B/C", "reviews");
    goes(&exact, "POST http://g.example/a.B/D", "reviews");
    lost(&exact, "POST http://g.example/a.BC/D");
    let method = m(json!([{"method": {"method": "C"}}]));
    goes(&method, "POST http://g.example/x.Y/C", "ratings");
    // The service counts more than the method.
    goes(&method, "POST http://g.example/a.B/C", "reviews");
    let pattern =
        m(json!([{"method": {"type": "RegularExpression", "service": "x\\..*", "method": "Get.*"}}]));
    goes(&pattern, "POST http://g.example/x.Z/GetIt", "ratings");
    lost(&pattern, "POST http://g.example/y.Z/GetIt");
}

#[test]
fn tls_that_ends_here() {
    let with = |listener: Value| {
        bookinfo().with(gateway(json!([plain(), listener]))).with(route("r", rule(json!({}))))
    };
    let m = with(secure(json!({"hostname": "a.example"})));
    goes(&m, "GET https://a.example/", "reviews");
    ask(&m, "GET https://b.example/", &[], json!({"action": "close"}));
    let chain = |m: &Mesh, want: Value| {
        let c = m.load().configuration(EDGE).unwrap();
        let want = json!({"listeners": {"0.0.0.0_443": {"filter_chains": [{"tls": want}]}}});
        if let Err(e) = support::contains(&c, &want, "") {
            panic!("{e}\n{:#}", c["listeners"]);
        }
    };
    chain(&m, json!({"certificate": {"Sds": "kubernetes://cert"}}));
    // Another namespace's certificate.
    let foreign = secure(json!({"tls": {"certificateRefs": [{"name": "cert", "namespace": "certs"}]}}));
    let m = with(foreign);
    ask(&m, "GET https://a.example/", &[], json!({"action": "close", "listener": null}));
    let grant = in_namespace(
        "certs",
        "ReferenceGrant",
        "g",
        json!({
        "from": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": "default"}],
        "to": [{"group": "", "kind": "Secret"}]}),
    );
    chain(&m.with(grant), json!({"certificate": {"Sds": "kubernetes://certs_cert"}}));
    // Clients with certificates.
    let roots = json!({"caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "clients"}]});
    let m = bookinfo()
        .with(object(
            "Gateway",
            "shop",
            json!({"gatewayClassName": "istio", "listeners": [secure(json!({}))], "tls": {"frontend": {"default": {"validation": roots}}}}),
        ))
        .with(route("r", rule(json!({}))));
    chain(
        &m,
        json!({"client_certificate": {"Required": {"trusted": {"Sds": "kubernetes://clients-cacert"}}}}),
    );
    let options = json!({"gateway.istio.io/tls-terminate-mode": "MUTUAL"});
    let m = with(secure(json!({"tls": {"certificateRefs": [{"name": "cert"}], "options": options}})));
    chain(&m, json!({"client_certificate": {"Required": {"trusted": {"Sds": "kubernetes://cert-cacert"}}}}));
}

fn database() -> Mesh {
    bookinfo().with(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "db", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "tcp-db", "port": 5432}], "selector": {"app": "ratings"}}
    }))
}

#[test]
fn connections() {
    let l4 = |kind: &str, hosts: Value, backends: Value| {
        let mut spec = json!({"parentRefs": [{"name": "shop"}], "rules": [{"backendRefs": backends}]});
        if !hosts.is_null() {
            spec["hostnames"] = hosts;
        }
        object(kind, "r", spec)
    };
    let tcp = database().with(gateway(json!([{"name": "tcp", "port": 5000, "protocol": "TCP"}]))).with(l4(
        "TCPRoute",
        Value::Null,
        json!([{"name": "db", "port": 5432}]),
    ));
    ask(
        &tcp,
        "tcp://x:5000",
        &[],
        json!({"action": "forward-tcp", "cluster": "outbound|5432||db.default.svc.cluster.local"}),
    );
    let tls = |mode: &str, hosts: Value| {
        database()
            .with(gateway(json!([{"name": "tls", "port": 443, "protocol": "TLS", "hostname": "*.example",
                                  "tls": {"mode": mode, "certificateRefs": [{"name": "cert"}]}}])))
            .with(l4("TLSRoute", hosts, json!([{"name": "db", "port": 5432}])))
    };
    for mode in ["Passthrough", "Terminate"] {
        let m = tls(mode, json!(["a.example"]));
        let want = json!({"action": "forward-tcp", "cluster": "outbound|5432||db.default.svc.cluster.local"});
        ask(&m, "GET https://a.example/", &[], want);
        ask(&m, "GET https://b.example/", &[], json!({"action": "close"}));
    }
    // TCP inside of TLS.
    let m = database()
        .with(gateway(json!([{"name": "tls", "port": 443, "protocol": "TLS", "tls": {"mode": "Terminate", "certificateRefs": [{"name": "cert"}]}}])))
        .with(l4("TCPRoute", Value::Null, json!([{"name": "db", "port": 5432}])));
    ask(
        &m,
        "GET https://a.example/",
        &[],
        json!({"action": "forward-tcp", "cluster": "outbound|5432||db.default.svc.cluster.local"}),
    );
    // Nothing behind it.
    let m = database().with(gateway(json!([{"name": "tcp", "port": 5000, "protocol": "TCP"}]))).with(l4(
        "TCPRoute",
        Value::Null,
        json!([backend("nobody")]),
    ));
    let a = m.try_ask(EDGE, "tcp://x:5000", &[]).unwrap();
    assert_eq!(a["endpoints"], json!([]), "{a:#}");
}

#[test]
fn routes_of_a_service() {
    let of = |namespace: &str, name: &str, parent: Value, backend: Value, path: &str| {
        let mut parent = parent;
        parent["kind"] = json!("Service");
        parent["group"] = json!("");
        in_namespace(
            namespace,
            "HTTPRoute",
            name,
            json!({"parentRefs": [parent],
            "rules": [{"matches": [{"path": {"value": path}}], "backendRefs": [backend]}]}),
        )
    };
    let m = bookinfo().with(of("default", "r", json!({"name": "reviews"}), backend("ratings"), "/x"));
    let from = "default/productpage-v1";
    let to = |s: &str| json!({"action": "forward", "cluster": service(s)});
    m.asks(from, "GET http://reviews:9080/x/y", &[], &to("ratings"));
    m.asks(from, "GET http://reviews:9080/y", &[], &json!({"action": "not-found"}));
    m.asks(from, "GET http://ratings:9080/y", &[], &to("ratings"));
    // Of one port.
    let other = bookinfo().with(of(
        "default",
        "r",
        json!({"name": "reviews", "port": 9080}),
        backend("ratings"),
        "/x",
    ));
    other.asks(from, "GET http://reviews:9080/x/y", &[], &to("ratings"));
    // Connections.
    let tcp = object(
        "TCPRoute",
        "c",
        json!({"parentRefs": [{"group": "", "kind": "Service", "name": "db", "port": 5432}],
        "rules": [{"backendRefs": [{"name": "db2", "port": 5432}]}]}),
    );
    let db2 = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "db2", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.10", "ports": [{"name": "tcp-db", "port": 5432}], "selector": {"app": "ratings"}}
    });
    let want = json!({"action": "forward-tcp", "cluster": "outbound|5432||db2.default.svc.cluster.local"});
    database().with(db2).with(tcp).asks(from, "tcp://db:5432", &[], &want);
    // Of another namespace: its own callers alone, and before the others.
    let parent = json!({"name": "reviews", "namespace": "default"});
    let mut to_page = backend("productpage");
    to_page["namespace"] = json!("default");
    let m = m.with(of("team", "mine", parent, to_page, "/"));
    m.asks("team/app", "GET http://reviews.default:9080/x", &[], &to("productpage"));
    m.asks(from, "GET http://reviews:9080/x", &[], &to("ratings"));
}

#[test]
fn tls_to_backends() {
    let policy = |target: Value, validation: Value| {
        object("BackendTLSPolicy", "p", json!({"targetRefs": [target], "validation": validation}))
    };
    let reviews = json!({"group": "", "kind": "Service", "name": "reviews"});
    let system = json!({"hostname": "inner.example", "wellKnownCACertificates": "System"});
    let tls = |m: &Mesh, name: &str| m.load().configuration(EDGE).unwrap()["clusters"][name]["tls"].clone();
    let m = edge(rule(json!({}))).with(policy(reviews.clone(), system.clone()));
    let want = json!({"sni": "inner.example", "validation": {"sans": [{"kind": {"Exact": "inner.example"}}],
        "trusted": {"Files": {"chain": "/etc/ssl/certs/ca-certificates.crt"}}}});
    support::contains(&tls(&m, &service("reviews")), &want, "").unwrap();
    // An authored rule keeps its subsets, which have it as well.
    support::contains(&tls(&m, "outbound|9080|v1|reviews.default.svc.cluster.local"), &want, "").unwrap();
    assert!(tls(&m, &service("ratings")).is_null());
    // Roots in a ConfigMap, names in a certificate, one port.
    let mut port = reviews;
    port["sectionName"] = json!("http");
    let roots = json!({"hostname": "inner.example", "caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "ca"}],
        "subjectAltNames": [{"type": "URI", "uri": "spiffe://a/b"}]});
    let m = edge(rule(json!({}))).with(policy(port, roots));
    let want = json!({"sni": "inner.example", "validation": {"sans": [{"kind": {"Exact": "spiffe://a/b"}}],
        "trusted": {"Sds": "kubernetes://ca-cacert"}}});
    support::contains(&tls(&m, &service("reviews")), &want, "").unwrap();
}
