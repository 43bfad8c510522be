//! Which proxies serve a Gateway, and which routes are where.

use serde_json::{Value, json};

use crate::{
    EDGE, ask, backend, database, edge, gateway, goes, in_namespace, lost, object, plain, route, rule,
    service,
    support::{self, Mesh, bookinfo},
};

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
    // Whatever a route of another listener says.
    let spec = json!({"parentRefs": [{"name": "shop", "sectionName": "wide"}], "hostnames": ["a.example"], "rules": rule(json!({"matches": [{"path": {"value": "/x"}}]}))});
    let m = bookinfo().with(gateway(json!([l("wide", "*.example"), l("narrow", "a.example")]))).with(object(
        "HTTPRoute",
        "r",
        spec,
    ));
    ask(&m, "GET http://a.example/x", &[], json!({"status": 404}));
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
        // A namespace that no document describes may have the label.
        (
            selector(json!({"matchExpressions": [{"key": "open", "operator": "DoesNotExist"}]})),
            "default",
            false,
        ),
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
    // Only the namespace itself can grant it.
    let mut elsewhere = grant("HTTPRoute", "default", to.clone());
    elsewhere["metadata"]["namespace"] = json!("default");
    for g in [
        elsewhere,
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
fn a_default_gateway_takes_routes_that_ask_for_one() {
    let default = |mut listener: Value, from: Option<&str>| {
        if let Some(from) = from {
            listener["allowedRoutes"] = json!({"namespaces": {"from": from}});
        }
        object(
            "Gateway",
            "shop",
            json!({"gatewayClassName": "istio", "defaultScope": "All", "listeners": [listener]}),
        )
    };
    let asking = |namespace: &str, extra: Value| {
        let mut spec = json!({"useDefaultGateways": "All", "rules": [{"backendRefs": [backend("reviews")]}]});
        spec.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        in_namespace(namespace, "HTTPRoute", "r", spec)
    };
    let served = |m: &Mesh| goes(m, "GET http://x/", "reviews");
    let m = bookinfo().with(default(plain(), None)).with(asking("default", json!({})));
    served(&m);
    let status = serde_json::to_value(m.load().gateway_api_status()).unwrap();
    let parents = &status["HTTPRoute"][0]["status"]["parents"];
    assert_eq!(parents[0]["parentRef"], json!({"namespace": "default", "name": "shop"}), "{parents:#}");
    assert_eq!(status["Gateway"][0]["status"]["listeners"][0]["attachedRoutes"], 1);
    // One that it names as well is one parent, with what is said of it.
    let named = asking("default", json!({"parentRefs": [{"name": "shop", "sectionName": "x"}]}));
    lost(&bookinfo().with(default(plain(), None)).with(named), "GET http://x/");
    // The usual rules of who may attach hold.
    let elsewhere = || asking("books", json!({"rules": []}));
    let of = |from| bookinfo().with(default(plain(), from)).with(elsewhere());
    lost(&of(None), "GET http://x/");
    ask(&of(Some("All")), "GET http://x/", &[], json!({"route": "books/r/0"}));
    // Nobody's default.
    lost(&bookinfo().with(gateway(json!([plain()]))).with(asking("default", json!({}))), "GET http://x/");
}
