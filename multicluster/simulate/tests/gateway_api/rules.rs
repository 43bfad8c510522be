//! Rules of HTTPRoutes and GRPCRoutes.

use serde_json::{Value, json};

use crate::{
    EDGE, ask, backend, edge, gateway, goes, lost, object, plain, route, rule, secure, service,
    support::bookinfo,
};

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
    // Those of others are answered as well, as in Istio, and allow nothing.
    let other = preflight("https://b-example");
    assert_eq!(other["action"], "direct-response", "{other:#}");
    assert!(other["responseHeaders"]["access-control-allow-origin"].is_null(), "{other:#}");
}

#[test]
fn filters_that_nobody_knows_never_let_a_request_pass() {
    let own =
        json!({"type": "ExtensionRef", "extensionRef": {"group": "x.example", "kind": "Thing", "name": "t"}});
    let m = edge(rule(json!({"filters": [own]})));
    ask(&m, "GET http://x/", &[], json!({"action": "direct-response", "status": 500}));
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
