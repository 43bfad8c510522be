//! The Gateway API.

use serde_json::{Value, json};

use crate::{
    Base, Row, View, from, refused, row,
    support::{Mesh, bookinfo},
};

const EDGE: &str = "default/shop";

fn document(kind: &str, name: &str, spec: Value) -> Value {
    let namespace = if kind == "GatewayClass" { json!(null) } else { json!("default") };
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind,
           "metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

fn service(namespace: &str, name: &str, port: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
           "spec": {"selector": {"app": name}, "ports": [port]}})
}

/// Rows for one mesh: field, pointer, value, what stands there instead if anything must, what is looked at, and what is
/// seen.
macro_rules! table {
    ($rows:ident, $base:expr; $($field:literal $at:literal $value:tt $(or $other:tt)? : $view:expr => $want:tt;)*) => {
        $(
            #[allow(unused_mut, reason = "not every row has an alternative")]
            let mut r = row(concat!("api/", $field), $base, $at, json!($value), $view, json!($want));
            $(r = r.instead_of(json!($other));)?
            $rows.push(r);
        )*
    };
}

fn edge(request: &'static str) -> View {
    from(EDGE, request)
}

fn with(request: &'static str, headers: &'static [&'static str]) -> View {
    View::Answer { from: EDGE, request, headers }
}

fn config() -> View {
    View::Config { from: EDGE }
}

fn gateway(listener: Value) -> Value {
    document("Gateway", "shop", json!({"gatewayClassName": "istio", "listeners": [listener]}))
}

fn plain() -> Value {
    json!({"name": "http", "port": 80, "protocol": "HTTP"})
}

fn backends(name: &str) -> Value {
    json!([{"name": name, "port": 9080}])
}

fn route(kind: &str, rule: &Value) -> Value {
    document(kind, "r", json!({"parentRefs": [{"name": "shop"}], "rules": [rule]}))
}

fn simple() -> Value {
    route("HTTPRoute", &json!({"backendRefs": backends("reviews")}))
}

/// A Gateway with a route to reviews.
pub(crate) fn shop() -> Mesh {
    bookinfo().with(simple()).with(gateway(plain()))
}

/// A Gateway whose route is simple.
fn listening(listener: Value) -> Base {
    Base::new(bookinfo().with(simple()).with(gateway(listener)))
}

/// An HTTPRoute with a rule.
fn routed(rule: Value) -> Base {
    Base::new(bookinfo().with(gateway(plain())).with(route("HTTPRoute", &rule)))
}

/// An HTTPRoute with a filter.
fn filtered(filter: Value) -> Base {
    routed(json!({"backendRefs": backends("reviews"), "filters": [filter]}))
}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    gateways(&mut rows);
    http(&mut rows);
    filters(&mut rows);
    others(&mut rows);
    rows
}

#[rustfmt::skip]
fn gateways(rows: &mut Vec<Row>) {
    let class = Base::new(
        bookinfo().with(simple())
            .with(document("Gateway", "shop", json!({"gatewayClassName": "edge", "listeners": [plain()]})))
            .with(document("GatewayClass", "edge", json!({"controllerName": "flotilla.dev/gateway-controller"}))),
    );
    table! { rows, &class;
        "GatewayClass.controllerName" "/spec/controllerName" "flotilla.dev/gateway-controller" or "x.example/y": edge("GET http://x/") => {"route": "default/r/0"};
    }
    for field in ["api/GatewayClass.parametersRef.group", "api/GatewayClass.parametersRef.kind",
                  "api/GatewayClass.parametersRef.name", "api/GatewayClass.parametersRef.namespace"] {
        let named = json!({"group": "a", "kind": "B", "name": "c", "namespace": "d"});
        rows.push(row(field, &class, "/spec/parametersRef", named, View::Status, json!({"GatewayClass edge": {"Accepted": {"status": "False", "reason": "InvalidParameters"}}})));
    }
    let served = json!({"route": "default/r/0"});
    let none = json!({"status": 404});
    let p = listening(plain());
    table! { rows, &p;
        "Gateway.gatewayClassName" "/spec/gatewayClassName" "flotilla" or "x": edge("GET http://x/") => (served);
        "Gateway.listeners[].hostname" "/spec/listeners/0/hostname" "a.example": edge("GET http://x/") => (none);
        "Gateway.listeners[].port" "/spec/listeners/0/port" 8080 or 80: edge("GET http://x:8080/") => (served);
        "Gateway.listeners[].protocol" "/spec/listeners/0/protocol" "HTTP" or "TCP": edge("GET http://x/") => (served);
        "Gateway.listeners[].allowedRoutes.kinds[].kind" "/spec/listeners/0/allowedRoutes/kinds" [{"kind": "GRPCRoute"}] or [{"kind": "HTTPRoute"}]: edge("GET http://x/") => (none);
        "Gateway.listeners[].allowedRoutes.kinds[].group" "/spec/listeners/0/allowedRoutes/kinds" [{"group": "x.example", "kind": "HTTPRoute"}] or [{"kind": "HTTPRoute"}]: edge("GET http://x/") => (none);
        "Gateway.listeners[].allowedRoutes.namespaces.from" "/spec/listeners/0/allowedRoutes/namespaces/from" "None": edge("GET http://x/") => (none);
    }
    let label = "kubernetes.io/metadata.name";
    let selecting = p.and("/spec/listeners/0/allowedRoutes/namespaces/from", json!("Selector"));
    table! { rows, &selecting;
        "Gateway.listeners[].allowedRoutes.namespaces.selector.matchLabels" "/spec/listeners/0/allowedRoutes/namespaces/selector" {"matchLabels": {label: "default"}} or {"matchLabels": {label: "x"}}: edge("GET http://x/") => (served);
        "Gateway.listeners[].allowedRoutes.namespaces.selector.matchExpressions[].key" "/spec/listeners/0/allowedRoutes/namespaces/selector/matchExpressions" [{"key": label, "operator": "Exists"}] or [{"key": "x", "operator": "Exists"}]: edge("GET http://x/") => (served);
        "Gateway.listeners[].allowedRoutes.namespaces.selector.matchExpressions[].operator" "/spec/listeners/0/allowedRoutes/namespaces/selector/matchExpressions" [{"key": label, "operator": "Exists"}] or [{"key": label, "operator": "DoesNotExist"}]: edge("GET http://x/") => (served);
        "Gateway.listeners[].allowedRoutes.namespaces.selector.matchExpressions[].values" "/spec/listeners/0/allowedRoutes/namespaces/selector/matchExpressions" [{"key": label, "operator": "In", "values": ["default"]}] or [{"key": label, "operator": "In", "values": ["x"]}]: edge("GET http://x/") => (served);
    }
    let section = json!({"parentRefs": [{"name": "shop", "sectionName": "http"}], "rules": [{"backendRefs": backends("reviews")}]});
    let named = Base::new(bookinfo().with(document("HTTPRoute", "r", section)).with(gateway(plain())));
    table! { rows, &named;
        "Gateway.listeners[].name" "/spec/listeners/0/name" "http" or "x": edge("GET http://x/") => (served);
    }
    // Served by the proxies of a Service.
    let workload = json!({"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry", "metadata": {"name": "front-1", "namespace": "ingress"},
                          "spec": {"address": "10.1.0.40", "labels": {"app": "front"}}});
    let http = json!({"name": "http", "port": 80});
    let by_address = Base::new(bookinfo().with(service("ingress", "front", &http)).with(workload).with(simple()).with(gateway(plain())));
    let front = || from("ingress/front-1", "GET http://x/");
    table! { rows, &by_address;
        "Gateway.addresses[].type" "/spec/addresses" [{"type": "Hostname", "value": "front.ingress"}] or [{"type": "IPAddress", "value": "10.0.0.1"}]: front() => (served);
        "Gateway.addresses[].value" "/spec/addresses" [{"type": "Hostname", "value": "front.ingress"}] or [{"type": "Hostname", "value": "x.ingress"}]: front() => (served);
    }
    for (field, at, value) in [
        ("api/Gateway.allowedListeners.namespaces", "/spec/allowedListeners", json!({"namespaces": {"from": "All"}})),
        ("api/Gateway.infrastructure.annotations", "/spec/infrastructure/annotations", json!({"a": "b"})),
        ("api/Gateway.infrastructure.labels", "/spec/infrastructure/labels", json!({"a": "b"})),
        ("api/Gateway.infrastructure.parametersRef", "/spec/infrastructure/parametersRef", json!({"group": "a", "kind": "B", "name": "c"})),
    ] {
        rows.push(row(field, &p, at, value, View::Status, json!({"Gateway shop": {"flotilla.dev/FieldsIgnored": {"status": "True", "reason": "Unsupported"}}})));
    }
    let s = listening(json!({"name": "https", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "c"}]}}));
    let chain = |tls: Value| json!({"listeners": {"0.0.0.0_443": {"filter_chains": [{"tls": tls}]}}});
    let roots = json!({"caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "ca"}]});
    let verified = chain(json!({"client_certificate": {"Required": {"trusted": {"Sds": "kubernetes://ca-cacert"}}}}));
    let other_cert = chain(json!({"certificate": {"Sds": "kubernetes://d"}}));
    let own_roots = chain(json!({"client_certificate": {"Required": {"trusted": {"Sds": "kubernetes://c-cacert"}}}}));
    table! { rows, &s;
        "Gateway.listeners[].tls.certificateRefs[]" "/spec/listeners/0/tls/certificateRefs" [{"name": "d"}] or [{"name": "c"}]: config() => (other_cert);
        "Gateway.listeners[].tls.frontendValidation.caCertificateRefs[]" "/spec/listeners/0/tls/frontendValidation" (roots): config() => (verified);
        "Gateway.listeners[].tls.options" "/spec/listeners/0/tls/options" {"gateway.istio.io/tls-terminate-mode": "MUTUAL"}: config() => (own_roots);
        "Gateway.tls.frontend.default.validation" "/spec/tls/frontend/default/validation" (roots): config() => (verified);
        "Gateway.tls.frontend.perPort[].port" "/spec/tls/frontend/perPort" [{"port": 443, "tls": {"validation": (roots)}}] or [{"port": 444, "tls": {"validation": (roots)}}]: config() => (verified);
        "Gateway.tls.frontend.perPort[].tls" "/spec/tls/frontend/perPort" [{"port": 443, "tls": {"validation": (roots)}}] or [{"port": 443}]: config() => (verified);
    }
    let asked = s.and("/spec/listeners/0/tls/frontendValidation", roots);
    let optional = chain(json!({"client_certificate": {"Optional": {}}}));
    table! { rows, &asked;
        "Gateway.listeners[].tls.frontendValidation.mode" "/spec/listeners/0/tls/frontendValidation/mode" "AllowInsecureFallback" or "AllowValidOnly": config() => (optional);
    }
    let tls = json!({"name": "tls", "port": 443, "protocol": "TLS", "tls": {"mode": "Terminate", "certificateRefs": [{"name": "c"}]}});
    let to = document("TLSRoute", "r", json!({"parentRefs": [{"name": "shop"}], "hostnames": ["a.example"], "rules": [{"backendRefs": backends("reviews")}]}));
    let passing = Base::new(bookinfo().with(to).with(gateway(tls)));
    let passed = chain(json!(null));
    table! { rows, &passing;
        "Gateway.listeners[].tls.mode" "/spec/listeners/0/tls/mode" "Passthrough" or "Terminate": config() => (passed);
    }
}

#[rustfmt::skip]
fn http(rows: &mut Vec<Row>) {
    let none = json!({"status": 404});
    let served = json!({"route": "default/r/0"});
    let b = routed(json!({"backendRefs": backends("reviews")}));
    let retried = json!({"routes": {"http.80": {"virtual_hosts": {"*:80": {"routes": [{"action": {"Forward": {"retry": {"base_interval": {"nanos": 100_000_000}}}}}]}}}}});
    table! { rows, &b;
        "HttpRoute.hostnames" "/spec/hostnames" ["a.example"]: edge("GET http://x/") => (none);
        "HttpRoute.parentRefs[].group" "/spec/parentRefs/0/group" "x.example": edge("GET http://x/") => (none);
        "HttpRoute.parentRefs[].kind" "/spec/parentRefs" [{"group": "", "kind": "Service", "name": "ratings"}] or [{"group": "", "kind": "X", "name": "ratings"}]: crate::get("GET http://ratings:9080/") => (served);
        "HttpRoute.parentRefs[].name" "/spec/parentRefs/0/name" "x" or "shop": edge("GET http://x/") => (none);
        "HttpRoute.parentRefs[].namespace" "/spec/parentRefs/0/namespace" "x": edge("GET http://x/") => (none);
        "HttpRoute.parentRefs[].port" "/spec/parentRefs/0/port" 81: edge("GET http://x/") => (none);
        "HttpRoute.parentRefs[].sectionName" "/spec/parentRefs/0/sectionName" "x": edge("GET http://x/") => (none);
        "HttpRoute.rules[].name" "/spec/rules/0/name" "main": edge("GET http://x/") => {"route": "default/r/main"};
        "HttpRoute.rules[].backendRefs[]" "/spec/rules/0/backendRefs" [{"name": "ratings", "port": 9080}] or [{"name": "reviews", "port": 9080}]: edge("GET http://x/") => {"cluster": "outbound|9080||ratings.default.svc.cluster.local"};
        "HttpRoute.rules[].timeouts.request" "/spec/rules/0/timeouts/request" "3s": edge("GET http://x/") => {"timeout": "3s"};
        "HttpRoute.rules[].timeouts.backendRequest" "/spec/rules/0/timeouts/backendRequest" "2s": edge("GET http://x/") => {"retries": {"perTryTimeout": "2s"}};
        "HttpRoute.rules[].retry.attempts" "/spec/rules/0/retry/attempts" 4: edge("GET http://x/") => {"retries": {"attempts": 4}};
        "HttpRoute.rules[].retry.backoff" "/spec/rules/0/retry/backoff" "100ms": config() => (retried);
        "HttpRoute.rules[].retry.codes" "/spec/rules/0/retry/codes" [503]: edge("GET http://x/") => {"retries": {"retryOn": "connect-failure,refused-stream,unavailable,cancelled,reset-before-request,retriable-status-codes,503"}};
        "HttpRoute.rules[].matches[].headers[].name" "/spec/rules/0/matches" [{"headers": [{"name": "x-a", "value": "1"}]}] or [{"headers": [{"name": "x-b", "value": "1"}]}]: with("GET http://x/", &["x-a: 1"]) => (served);
        "HttpRoute.rules[].matches[].headers[].type" "/spec/rules/0/matches" [{"headers": [{"name": "x-a", "value": "a+", "type": "RegularExpression"}]}] or [{"headers": [{"name": "x-a", "value": "a+"}]}]: with("GET http://x/", &["x-a: aa"]) => (served);
        "HttpRoute.rules[].matches[].headers[].value" "/spec/rules/0/matches" [{"headers": [{"name": "x-a", "value": "1"}]}] or [{"headers": [{"name": "x-a", "value": "2"}]}]: with("GET http://x/", &["x-a: 1"]) => (served);
        "HttpRoute.rules[].matches[].method" "/spec/rules/0/matches/0/method" "POST": edge("GET http://x/") => (none);
        "HttpRoute.rules[].matches[].path.type" "/spec/rules/0/matches" [{"path": {"type": "Exact", "value": "/a"}}] or [{"path": {"type": "PathPrefix", "value": "/a"}}]: edge("GET http://x/a/b") => (none);
        "HttpRoute.rules[].matches[].path.value" "/spec/rules/0/matches/0/path/value" "/a": edge("GET http://x/ab") => (none);
        "HttpRoute.rules[].matches[].queryParams[]" "/spec/rules/0/matches/0/queryParams" [{"name": "q", "value": "1"}]: edge("GET http://x/?q=2") => (none);
    }
    let default = |m: Mesh, listener: Value, kind: &str, backend: Value| {
        let mut g = gateway(listener);
        g["spec"]["defaultScope"] = json!("All");
        let mut spec = json!({"rules": [{"backendRefs": [backend]}]});
        if kind == "TLSRoute" {
            spec["hostnames"] = json!(["a.example"]);
        }
        Base::new(m.with(g).with(document(kind, "r", spec)))
    };
    let to_reviews = || json!({"name": "reviews", "port": 9080});
    table! { rows, &default(bookinfo(), plain(), "HTTPRoute", to_reviews());
        "HttpRoute.useDefaultGateways" "/spec/useDefaultGateways" "All" or "None": edge("GET http://x/") => (served);
    }
    table! { rows, &default(bookinfo(), plain(), "GRPCRoute", to_reviews());
        "GrpcRoute.useDefaultGateways" "/spec/useDefaultGateways" "All" or "None": edge("POST http://x/a.B/C") => (served);
    }
    let passing = json!({"name": "tls", "port": 443, "protocol": "TLS", "tls": {"mode": "Passthrough"}});
    table! { rows, &default(bookinfo(), passing, "TLSRoute", to_reviews());
        "L4Route.useDefaultGateways" "/spec/useDefaultGateways" "All" or "None": edge("GET https://a.example/") => {"cluster": "outbound|9080||reviews.default.svc.cluster.local"};
    }
    let asking = document("HTTPRoute", "r", json!({"useDefaultGateways": "All", "rules": [{"backendRefs": backends("reviews")}]}));
    let scoped = Base::new(bookinfo().with(asking).with(gateway(plain())));
    table! { rows, &scoped;
        "Gateway.defaultScope" "/spec/defaultScope" "All" or "None": edge("GET http://x/") => (served);
    }
    table! { rows, &b;
        "HttpRoute.rules[].sessionPersistence.absoluteTimeout" "/spec/rules/0/sessionPersistence" {"absoluteTimeout": "1h"} or {}: edge("GET http://x/") => {"session": {"absoluteTimeout": "3600s", "maxAge": null}};
        "HttpRoute.rules[].sessionPersistence.cookie" "/spec/rules/0/sessionPersistence" {"type": "Cookie", "cookie": {"name": "c", "path": "/a"}} or {}: edge("GET http://x/a") => {"session": {"by": "cookie", "name": "c", "path": "/a"}};
        "HttpRoute.rules[].sessionPersistence.cookieConfig.lifetimeType" "/spec/rules/0/sessionPersistence" {"absoluteTimeout": "1h", "cookieConfig": {"lifetimeType": "Permanent"}} or {"absoluteTimeout": "1h", "cookieConfig": {"lifetimeType": "Session"}}: edge("GET http://x/") => {"session": {"maxAge": "3600s"}};
        "HttpRoute.rules[].sessionPersistence.cookieConfig.name" "/spec/rules/0/sessionPersistence" {"cookieConfig": {"name": "c"}} or {}: edge("GET http://x/") => {"session": {"name": "c"}};
        "HttpRoute.rules[].sessionPersistence.cookieConfig.path" "/spec/rules/0/sessionPersistence" {"cookieConfig": {"path": "/a"}} or {}: edge("GET http://x/b") => {"session": null};
        "HttpRoute.rules[].sessionPersistence.header.name" "/spec/rules/0/sessionPersistence" {"type": "Header", "header": {"name": "h"}} or {"type": "Header"}: edge("GET http://x/") => {"session": {"by": "header", "name": "h"}};
        "HttpRoute.rules[].sessionPersistence.idleTimeout" "/spec/rules/0/sessionPersistence" {"idleTimeout": "1h"} or {}: View::Status => {"HTTPRoute r": {"PartiallyInvalid": {"status": "True", "reason": "UnsupportedValue"}}};
        "HttpRoute.rules[].sessionPersistence.sessionName" "/spec/rules/0/sessionPersistence" {"sessionName": "s"} or {}: edge("GET http://x/") => {"session": {"name": "s"}};
        "HttpRoute.rules[].sessionPersistence.type" "/spec/rules/0/sessionPersistence" {"type": "Header"} or {"type": "Cookie"}: edge("GET http://x/") => {"session": {"by": "header"}};
    }
}

#[rustfmt::skip]
fn filters(rows: &mut Vec<Row>) {
    let cors = filtered(json!({"type": "CORS", "cors": {"allowOrigins": ["https://a.example"]}}));
    let preflight = || with("OPTIONS http://x/", &["origin: https://a.example", "access-control-request-method: GET"]);
    table! { rows, &cors;
        "HttpRoute.rules[].filters[].cors.allowOrigins" "/spec/rules/0/filters/0/cors/allowOrigins" ["https://*.example"] or ["https://b.example"]: preflight() => {"responseHeaders": {"access-control-allow-origin": "https://a.example"}};
        "HttpRoute.rules[].filters[].cors.allowCredentials" "/spec/rules/0/filters/0/cors/allowCredentials" true: preflight() => {"responseHeaders": {"access-control-allow-credentials": "true"}};
        "HttpRoute.rules[].filters[].cors.allowHeaders" "/spec/rules/0/filters/0/cors/allowHeaders" ["x-a"]: preflight() => {"responseHeaders": {"access-control-allow-headers": "x-a"}};
        "HttpRoute.rules[].filters[].cors.allowMethods" "/spec/rules/0/filters/0/cors/allowMethods" ["GET", "PUT"]: preflight() => {"responseHeaders": {"access-control-allow-methods": "GET,PUT"}};
        "HttpRoute.rules[].filters[].cors.exposeHeaders" "/spec/rules/0/filters/0/cors/exposeHeaders" ["x-b"]: with("GET http://x/", &["origin: https://a.example"]) => {"responseHeaders": {"access-control-expose-headers": "x-b"}};
        "HttpRoute.rules[].filters[].cors.maxAge" "/spec/rules/0/filters/0/cors/maxAge" 60: preflight() => {"responseHeaders": {"access-control-max-age": "60"}};
    }
    rows.push(refused("api/HttpRoute.rules[].filters[].type", &cors, "/spec/rules/0/filters/0/type", json!("URLRewrite"), "required by the filter's type"));
    let b = routed(json!({"backendRefs": backends("reviews")}));
    let own = json!([{"type": "ExtensionRef", "extensionRef": {"group": "a.b", "kind": "C", "name": "d"}}]);
    rows.push(row("api/HttpRoute.rules[].filters[].extensionRef", &b, "/spec/rules/0/filters", own, edge("GET http://x/"), json!({"status": 500})));
    let asking = |protocol: &str| {
        let mut mesh = bookinfo();
        mesh.0[1]["spec"]["ports"][0]["name"] = json!("grpc");
        let auth = json!({"type": "ExternalAuth", "externalAuth": {"protocol": protocol, "backendRef": {"name": "ratings", "port": 9080}}});
        Base::new(mesh.with(gateway(plain())).with(route("HTTPRoute", &json!({"backendRefs": backends("reviews"), "filters": [auth]}))))
    };
    let asks = |what: Value| {
        let filters = json!({"http.80": {"ExtAuthz": what}});
        json!({"filters": filters})
    };
    let over_http = |what: Value| asks(json!({"service": {"Http": what}}));
    let exactly = |n: &str| json!([{"kind": {"Exact": n}, "ignore_case": true}]);
    let (prefixed, copied) = (over_http(json!({"path_prefix": "/check"})), over_http(json!({"allowed_upstream_headers": exactly("x-user")})));
    let (shown, body, grpc) = (asks(json!({"allowed_headers": exactly("x-a")})), asks(json!({"with_request_body": {"max_bytes": 9, "allow_partial": false}})), asks(json!({"service": {"Grpc": {}}})));
    table! { rows, &asking("HTTP");
        "HttpRoute.rules[].filters[].externalAuth.backendRef" "/spec/rules/0/filters/0/externalAuth/backendRef/name" "productpage" or "ratings": edge("GET http://x/") => {"asks": [{"who": "external authorization by outbound|9080||productpage.default.svc.cluster.local"}]};
        "HttpRoute.rules[].filters[].externalAuth.protocol" "/spec/rules/0/filters/0/externalAuth/protocol" "GRPC" or "HTTP": config() => (grpc);
        "HttpRoute.rules[].filters[].externalAuth.http.allowedHeaders" "/spec/rules/0/filters/0/externalAuth/http" {"allowedHeaders": ["x-a"]}: config() => (shown);
        "HttpRoute.rules[].filters[].externalAuth.http.allowedResponseHeaders" "/spec/rules/0/filters/0/externalAuth/http" {"allowedResponseHeaders": ["x-user"]}: config() => (copied);
        "HttpRoute.rules[].filters[].externalAuth.http.path" "/spec/rules/0/filters/0/externalAuth/http" {"path": "/check"}: config() => (prefixed);
        "HttpRoute.rules[].filters[].externalAuth.forwardBody.maxSize" "/spec/rules/0/filters/0/externalAuth/forwardBody" {"maxSize": 9}: config() => (body);
    }
    table! { rows, &asking("GRPC");
        "HttpRoute.rules[].filters[].externalAuth.grpc.allowedHeaders" "/spec/rules/0/filters/0/externalAuth/grpc" {"allowedHeaders": ["x-a"]}: config() => (shown);
    }
    let request = filtered(json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {}}));
    table! { rows, &request;
        "HttpRoute.rules[].filters[].requestHeaderModifier.add[]" "/spec/rules/0/filters/0/requestHeaderModifier/add" [{"name": "x-a", "value": "1"}]: edge("GET http://x/") => {"headers": {"x-a": "1"}};
        "HttpRoute.rules[].filters[].requestHeaderModifier.remove" "/spec/rules/0/filters/0/requestHeaderModifier/remove" ["x-a"]: with("GET http://x/", &["x-a: 1"]) => {"headers": {"x-a": null}};
        "HttpRoute.rules[].filters[].requestHeaderModifier.set[].name" "/spec/rules/0/filters/0/requestHeaderModifier/set" [{"name": "x-a", "value": "1"}] or [{"name": "x-b", "value": "1"}]: edge("GET http://x/") => {"headers": {"x-a": "1"}};
        "HttpRoute.rules[].filters[].requestHeaderModifier.set[].value" "/spec/rules/0/filters/0/requestHeaderModifier/set" [{"name": "x-a", "value": "1"}] or [{"name": "x-a", "value": "2"}]: edge("GET http://x/") => {"headers": {"x-a": "1"}};
    }
    let response = filtered(json!({"type": "ResponseHeaderModifier", "responseHeaderModifier": {}}));
    table! { rows, &response;
        "HttpRoute.rules[].filters[].responseHeaderModifier" "/spec/rules/0/filters/0/responseHeaderModifier" {"set": [{"name": "x-a", "value": "1"}]} or {}: edge("GET http://x/") => {"responseHeaders": {"x-a": "1"}};
    }
    let ratings = "outbound|9080||ratings.default.svc.cluster.local";
    let mirror = filtered(json!({"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "ratings", "port": 9080}}}));
    let host = json!({"group": "networking.istio.io", "kind": "Hostname", "name": "h.example", "port": 80});
    table! { rows, &mirror;
        "HttpRoute.rules[].filters[].requestMirror.percent" "/spec/rules/0/filters/0/requestMirror/percent" 5: edge("GET http://x/") => {"mirrors": [{"percentage": 5.0}]};
        "HttpRoute.rules[].filters[].requestMirror.fraction.numerator" "/spec/rules/0/filters/0/requestMirror/fraction" {"numerator": 1, "denominator": 4} or {"numerator": 2, "denominator": 4}: edge("GET http://x/") => {"mirrors": [{"percentage": 25.0}]};
        "HttpRoute.rules[].filters[].requestMirror.fraction.denominator" "/spec/rules/0/filters/0/requestMirror/fraction" {"numerator": 1, "denominator": 4} or {"numerator": 1}: edge("GET http://x/") => {"mirrors": [{"percentage": 25.0}]};
        "HttpRoute.rules[].filters[].requestMirror.backendRef.name" "/spec/rules/0/filters/0/requestMirror/backendRef/name" "ratings" or "productpage": edge("GET http://x/") => {"mirrors": [{"cluster": ratings}]};
        "HttpRoute.rules[].filters[].requestMirror.backendRef.port" "/spec/rules/0/filters/0/requestMirror/backendRef/port" 9080 or 9081: edge("GET http://x/") => {"mirrors": [{"cluster": ratings}]};
        "HttpRoute.rules[].filters[].requestMirror.backendRef.namespace" "/spec/rules/0/filters/0/requestMirror/backendRef/namespace" "x": edge("GET http://x/") => {"mirrors": []};
        "HttpRoute.rules[].filters[].requestMirror.backendRef.group" "/spec/rules/0/filters/0/requestMirror/backendRef" (host) or {"kind": "Hostname", "name": "h.example", "port": 80}: edge("GET http://x/") => {"mirrors": [{"cluster": "outbound|80||h.example"}]};
        "HttpRoute.rules[].filters[].requestMirror.backendRef.kind" "/spec/rules/0/filters/0/requestMirror/backendRef" (host) or {"group": "networking.istio.io", "name": "h.example", "port": 80}: edge("GET http://x/") => {"mirrors": [{"cluster": "outbound|80||h.example"}]};
    }
    let header = json!([{"type": "RequestHeaderModifier", "requestHeaderModifier": {"remove": ["a"]}}]);
    for (field, at, value) in [
        ("api/HttpRoute.rules[].filters[].requestMirror.backendRef.filters[]", "/spec/rules/0/filters/0/requestMirror/backendRef/filters", header),
        ("api/HttpRoute.rules[].filters[].requestMirror.backendRef.weight", "/spec/rules/0/filters/0/requestMirror/backendRef/weight", json!(5)),
    ] {
        rows.push(refused(field, &mirror, at, value, "no field of this reference"));
    }
    let redirect = routed(json!({"matches": [{"path": {"value": "/foo"}}], "filters": [{"type": "RequestRedirect", "requestRedirect": {}}]}));
    table! { rows, &redirect;
        "HttpRoute.rules[].filters[].requestRedirect.hostname" "/spec/rules/0/filters/0/requestRedirect/hostname" "y.example": edge("GET http://x/foo") => {"location": "http://y.example/foo"};
        "HttpRoute.rules[].filters[].requestRedirect.path.type" "/spec/rules/0/filters/0/requestRedirect/path" {"type": "ReplaceFullPath", "replaceFullPath": "/b"}: edge("GET http://x/foo/a") => {"location": "http://x/b"};
        "HttpRoute.rules[].filters[].requestRedirect.path.replaceFullPath" "/spec/rules/0/filters/0/requestRedirect/path" {"type": "ReplaceFullPath", "replaceFullPath": "/b"}: edge("GET http://x/foo/a") => {"location": "http://x/b"};
        "HttpRoute.rules[].filters[].requestRedirect.path.replacePrefixMatch" "/spec/rules/0/filters/0/requestRedirect/path" {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/b"}: edge("GET http://x/foo/a") => {"location": "http://x/b/a"};
        "HttpRoute.rules[].filters[].requestRedirect.port" "/spec/rules/0/filters/0/requestRedirect/port" 8080: edge("GET http://x/foo") => {"location": "http://x:8080/foo"};
        "HttpRoute.rules[].filters[].requestRedirect.scheme" "/spec/rules/0/filters/0/requestRedirect/scheme" "https": edge("GET http://x/foo") => {"location": "https://x/foo"};
        "HttpRoute.rules[].filters[].requestRedirect.statusCode" "/spec/rules/0/filters/0/requestRedirect/statusCode" 308: edge("GET http://x/foo") => {"status": 308};
    }
    let rewrite = filtered(json!({"type": "URLRewrite", "urlRewrite": {}}));
    table! { rows, &rewrite;
        "HttpRoute.rules[].filters[].urlRewrite.hostname" "/spec/rules/0/filters/0/urlRewrite/hostname" "y.example": edge("GET http://x/") => {"upstream": {"authority": "y.example"}};
        "HttpRoute.rules[].filters[].urlRewrite.path" "/spec/rules/0/filters/0/urlRewrite/path" {"type": "ReplaceFullPath", "replaceFullPath": "/b"}: edge("GET http://x/a") => {"upstream": {"path": "/b"}};
    }
}

#[rustfmt::skip]
fn others(rows: &mut Vec<Row>) {
    let none = json!({"status": 404});
    let served = json!({"route": "default/r/0"});
    let grpc = Base::new(bookinfo().with(gateway(plain())).with(route("GRPCRoute", &json!({"backendRefs": backends("reviews")}))));
    table! { rows, &grpc;
        "GrpcRoute.hostnames" "/spec/hostnames" ["a.example"]: edge("POST http://x/a.B/C") => (none);
        "GrpcRoute.parentRefs[]" "/spec/parentRefs/0/name" "x" or "shop": edge("POST http://x/a.B/C") => (none);
        "GrpcRoute.rules[].name" "/spec/rules/0/name" "main": edge("POST http://x/a.B/C") => {"route": "default/r/main"};
        "GrpcRoute.rules[].backendRefs[]" "/spec/rules/0/backendRefs/0/name" "ratings" or "reviews": edge("POST http://x/a.B/C") => {"cluster": "outbound|9080||ratings.default.svc.cluster.local"};
        "GrpcRoute.rules[].filters[]" "/spec/rules/0/filters" [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-a", "value": "1"}]}}]: edge("POST http://x/a.B/C") => {"headers": {"x-a": "1"}};
        "GrpcRoute.rules[].matches[].headers[]" "/spec/rules/0/matches/0/headers" [{"name": "v", "value": "1"}]: edge("POST http://x/a.B/C") => (none);
        "GrpcRoute.rules[].matches[].method.method" "/spec/rules/0/matches/0/method" {"method": "D"}: edge("POST http://x/a.B/C") => (none);
        "GrpcRoute.rules[].matches[].method.service" "/spec/rules/0/matches/0/method" {"service": "a.X"}: edge("POST http://x/a.B/C") => (none);
        "GrpcRoute.rules[].matches[].method.type" "/spec/rules/0/matches/0/method" {"type": "RegularExpression", "service": "a.*"} or {"type": "Exact", "service": "a"}: edge("POST http://x/a.B/C") => (served);
    }
    table! { rows, &grpc;
        "GrpcRoute.rules[].sessionPersistence" "/spec/rules/0/sessionPersistence" {"type": "Header", "header": {"name": "s"}}: edge("POST http://x/a.B/C") => {"session": {"by": "header", "name": "s"}};
    }
    let tcp = json!({"name": "tcp", "port": 5432});
    let listener = json!({"name": "tls", "port": 443, "protocol": "TLS", "tls": {"mode": "Passthrough"}});
    let spec = json!({"parentRefs": [{"name": "shop"}], "hostnames": ["a.example"], "rules": [{"backendRefs": [{"name": "db", "port": 5432}]}]});
    let databases = |m: Mesh| m.with(service("default", "db", &tcp)).with(service("default", "db2", &tcp));
    let l4 = Base::new(databases(bookinfo()).with(gateway(listener)).with(document("TLSRoute", "r", spec)));
    let to = |name: &str| json!({"cluster": format!("outbound|5432||{name}.default.svc.cluster.local")});
    let (db, db2) = (to("db"), to("db2"));
    table! { rows, &l4;
        "L4Route.hostnames" "/spec/hostnames" ["a.example"] or ["b.example"]: edge("GET https://a.example/") => (db);
        "L4Route.parentRefs[]" "/spec/parentRefs/0/name" "shop" or "x": edge("GET https://a.example/") => (db);
        "L4Route.rules[].backendRefs[]" "/spec/rules/0/backendRefs/0/name" "db2" or "db": edge("GET https://a.example/") => (db2);
    }
    let foreign = route("HTTPRoute", &json!({"backendRefs": [{"name": "pay", "namespace": "bank", "port": 80}]}));
    let mut grant = document("ReferenceGrant", "g", json!({
        "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "default"}], "to": [{"group": "", "kind": "Service"}]}));
    grant["metadata"]["namespace"] = json!("bank");
    let granted = Base::new(bookinfo().with(service("bank", "pay", &json!({"name": "http", "port": 80}))).with(gateway(plain())).with(foreign).with(grant));
    table! { rows, &granted;
        "ReferenceGrant.from[].group" "/spec/from/0/group" "gateway.networking.k8s.io" or "x": edge("GET http://x/") => {"action": "forward"};
        "ReferenceGrant.from[].kind" "/spec/from/0/kind" "HTTPRoute" or "GRPCRoute": edge("GET http://x/") => {"action": "forward"};
        "ReferenceGrant.from[].namespace" "/spec/from/0/namespace" "default" or "x": edge("GET http://x/") => {"action": "forward"};
        "ReferenceGrant.to[].group" "/spec/to/0/group" "" or "x": edge("GET http://x/") => {"action": "forward"};
        "ReferenceGrant.to[].kind" "/spec/to/0/kind" "Service" or "Secret": edge("GET http://x/") => {"action": "forward"};
        "ReferenceGrant.to[].name" "/spec/to/0/name" "x": edge("GET http://x/") => {"status": 500};
    }
    let system = json!({"hostname": "i.example", "wellKnownCACertificates": "System"});
    let policy = Base::new(bookinfo().with(gateway(plain())).with(simple()).with(document("BackendTLSPolicy", "p", json!({
        "targetRefs": [{"group": "", "kind": "Service", "name": "reviews"}], "validation": system}))));
    let tls = |want: Value| json!({"clusters": {"outbound|9080||reviews.default.svc.cluster.local": {"tls": want}}});
    let sni = tls(json!({"sni": "i.example"}));
    let roots = json!([{"group": "", "kind": "ConfigMap", "name": "ca"}]);
    let trusts = |t: Value| tls(json!({"validation": {"trusted": t}}));
    let from_map = trusts(json!({"Sds": "kubernetes://ca-cacert"}));
    let from_system = trusts(json!({"Files": {"chain": "/etc/ssl/certs/ca-certificates.crt"}}));
    let names = |n: &str| tls(json!({"validation": {"sans": [{"kind": {"Exact": n}}]}}));
    let (by_host, by_uri) = (names("j.example"), names("spiffe://a/b"));
    table! { rows, &policy;
        "BackendTlsPolicy.targetRefs[].group" "/spec/targetRefs/0/group" "" or "x": config() => (sni);
        "BackendTlsPolicy.targetRefs[].kind" "/spec/targetRefs/0/kind" "Service" or "X": config() => (sni);
        "BackendTlsPolicy.targetRefs[].name" "/spec/targetRefs/0/name" "reviews" or "ratings": config() => (sni);
        "BackendTlsPolicy.targetRefs[].sectionName" "/spec/targetRefs/0/sectionName" "http" or "x": config() => (sni);
        "BackendTlsPolicy.validation.hostname" "/spec/validation/hostname" "i.example" or "j.example": config() => (sni);
        "BackendTlsPolicy.validation.caCertificateRefs[]" "/spec/validation" {"hostname": "i.example", "caCertificateRefs": (roots)} or (system): config() => (from_map);
        "BackendTlsPolicy.validation.wellKnownCACertificates" "/spec/validation/wellKnownCACertificates" "System" or "x.example/y": config() => (from_system);
        "BackendTlsPolicy.validation.subjectAltNames[].hostname" "/spec/validation/subjectAltNames" [{"type": "Hostname", "hostname": "j.example"}]: config() => (by_host);
        "BackendTlsPolicy.validation.subjectAltNames[].uri" "/spec/validation/subjectAltNames" [{"type": "URI", "uri": "spiffe://a/b"}]: config() => (by_uri);
        "BackendTlsPolicy.validation.subjectAltNames[].type" "/spec/validation/subjectAltNames" [{"type": "URI", "uri": "spiffe://a/b"}] or [{"type": "Hostname", "hostname": "a.b"}]: config() => (by_uri);
    }
    let shop = Base::new(bookinfo().with(simple()).with(document("BackendTLSPolicy", "p", json!({
        "targetRefs": [{"group": "", "kind": "Service", "name": "reviews"}], "validation": system}))).with(gateway(plain())));
    let shown = tls(json!({"certificate": {"Sds": "kubernetes://c"}}));
    table! { rows, &shop;
        "Gateway.tls.backend.clientCertificateRef" "/spec/tls/backend" {"clientCertificateRef": {"name": "c"}}: config() => (shown);
        "Gateway.backendTLS" "/spec/backendTLS" {"clientCertificateRef": {"name": "c"}}: config() => (shown);
    }
    table! { rows, &policy;
        "BackendTlsPolicy.options" "/spec/options" {"a": "b"}: View::Status => {"BackendTLSPolicy p": {"flotilla.dev/FieldsIgnored": {"status": "True", "reason": "Unsupported"}}};
    }
}
