//! Documents of the Gateway API: their order, and what is said of them. What they make of requests is in
//! `multicluster/simulate/tests/gateway_api`.

use std::sync::Arc;

use mesh_xds::mcp::{ConfigState, Document};
use serde_json::{Value, json};

use super::{
    attach::intersection,
    status::{GatewayProxy, status},
};
use crate::config::{Config, Reader};

#[derive(Default, Clone)]
struct Docs(ConfigState);

impl Docs {
    fn add(mut self, kind: &str, name: &str, body: Value) -> Self {
        let group = match kind {
            "Service" | "Namespace" => "core",
            "DestinationRule" | "VirtualService" => "networking.istio.io",
            _ => "gateway.networking.k8s.io",
        };
        let all: usize = self.0.documents.values().map(|m| m.len()).sum();
        let d = Document { name: name.to_owned(), created: 1000 + all as u64, body, ..Document::default() };
        let kind = format!("{group}/v1/{kind}");
        self.0.documents.entry(kind).or_default().insert(name.to_owned(), Arc::new(d));
        self
    }

    fn gateway(self, listeners: Value) -> Self {
        self.add("Gateway", "shop/edge", json!({"gatewayClassName": "flotilla", "listeners": listeners}))
    }

    fn route(self, kind: &str, name: &str, parent: Value, backend: &str) -> Self {
        let rules = json!([{"backendRefs": [{"name": backend, "port": 80}]}]);
        self.add(kind, name, json!({"parentRefs": [parent], "rules": rules}))
    }

    fn service(self, name: &str) -> Self {
        self.add("Service", name, json!({"ports": [{"name": "http", "port": 80}], "selector": {"app": "x"}}))
    }

    fn config(&self) -> Config {
        Reader::default().read(&self.0, &ConfigState::default())
    }

    fn status(&self, proxies: &[GatewayProxy]) -> Value {
        serde_json::to_value(status(&self.config(), proxies)).unwrap()
    }
}

fn http(name: &str) -> Value {
    json!({"name": name, "port": 80, "protocol": "HTTP"})
}

fn proxy(namespace: &str, gateway: &str) -> GatewayProxy {
    GatewayProxy {
        namespace: namespace.to_owned(),
        labels: [(super::GATEWAY_NAME.to_owned(), gateway.to_owned())].into(),
        addresses: vec!["10.0.0.7".to_owned()],
    }
}

/// `Accepted=True/Accepted ...`
fn said(conditions: &Value) -> String {
    let text = |c: &Value, k: &str| c[k].as_str().unwrap_or_default().to_owned();
    let all = conditions.as_array().unwrap_or_else(|| panic!("{conditions}")).iter();
    all.map(|c| format!("{}={}/{}", text(c, "type"), text(c, "status"), text(c, "reason")))
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn host_names_in_common() {
    let names = |l: &[&str]| l.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    for (listener, route, both) in [
        (None, &[][..], &["*"][..]),
        (None, &["a.b"], &["a.b"]),
        (Some("a.b"), &[], &["a.b"]),
        (Some("*.b"), &["x.b", "*.y.b", "b", "x.c"], &["*.y.b", "x.b"]),
        (Some("x.b"), &["*.b", "x.b"], &["x.b"]),
        (Some("*.b"), &["*.b"], &["*.b"]),
        (Some("a.b"), &["c.b"], &[]),
    ] {
        assert_eq!(intersection(listener, &names(route)), names(both), "{listener:?} {route:?}");
    }
}

#[test]
fn rules_of_several_routes_in_the_order_of_the_api() {
    let path = |t: &str, v: &str| json!({"path": {"type": t, "value": v}});
    let header =
        |n: usize| (0..n).map(|i| json!({"name": format!("h{i}"), "value": "1"})).collect::<Vec<_>>();
    // Least specific first; each has a rule of its own, named by its position.
    let matches = [
        json!({}),
        json!({"queryParams": header(1)}),
        json!({"queryParams": header(2)}),
        json!({"headers": header(1)}),
        json!({"headers": header(2)}),
        json!({"method": "GET"}),
        path("PathPrefix", "/a"),
        path("PathPrefix", "/a/b/"),
        path("RegularExpression", "/a.*"),
        path("Exact", "/"),
        path("Exact", "/a"),
    ];
    let rule = |i: usize| json!({"name": format!("r{i:02}"), "matches": [matches[i]], "backendRefs": [{"name": "a", "port": 80}]});
    let of = |positions: Vec<usize>| {
        let rules: Vec<_> = positions.into_iter().map(rule).collect();
        json!({"parentRefs": [{"name": "edge"}], "rules": rules})
    };
    let docs = Docs::default()
        .gateway(json!([http("http")]))
        .service("shop/a")
        .add("HTTPRoute", "shop/even", of((0..matches.len()).step_by(2).collect()))
        .add("HTTPRoute", "shop/odd", of((1..matches.len()).step_by(2).collect()));
    let config = docs.config();
    let [made] = config.virtual_services.as_slice() else { panic!("{:#?}", config.virtual_services) };
    let names: Vec<&str> = made.spec.http.iter().filter_map(|r| r.name.rsplit('/').next()).collect();
    let want: Vec<String> = (0..matches.len()).rev().map(|i| format!("r{i:02}")).collect();
    assert_eq!(names, want);
}

#[test]
fn rules_that_match_the_same_are_by_age_then_name_then_position() {
    let spec = |names: [&str; 2]| {
        let rules = names.map(|n| json!({"name": n, "backendRefs": [{"name": "a", "port": 80}]}));
        json!({"parentRefs": [{"name": "edge"}], "rules": rules})
    };
    let mut docs = Docs::default().gateway(json!([http("http")])).service("shop/a");
    for (name, names, created) in
        [("shop/c", ["1", "2"], 5), ("shop/b", ["5", "6"], 9), ("shop/a", ["3", "4"], 9)]
    {
        docs = docs.add("HTTPRoute", name, spec(names));
        let all = docs.0.documents.get_mut("gateway.networking.k8s.io/v1/HTTPRoute").unwrap();
        Arc::make_mut(all.get_mut(name).unwrap()).created = created;
    }
    let config = docs.config();
    let names: Vec<&str> =
        config.virtual_services[0].spec.http.iter().filter_map(|r| r.name.rsplit('/').next()).collect();
    assert_eq!(names, ["1", "2", "3", "4", "5", "6"]);
}

#[test]
fn a_mesh_without_gateway_api_is_left_as_it_is() {
    let config = Docs::default().service("shop/a").config();
    assert!(config.virtual_services.is_empty() && config.gateways.is_empty());
}

#[test]
fn status_of_gateways() {
    let docs = Docs::default().gateway(json!([http("http")])).service("shop/a");
    let of = |docs: &Docs, proxies: &[GatewayProxy]| {
        let s = docs.status(proxies)["Gateway"][0]["status"].clone();
        (said(&s["conditions"]), s)
    };
    let fine = "Accepted=True/Accepted Programmed=True/Programmed";
    let (says, s) = of(&docs, &[proxy("shop", "edge")]);
    assert_eq!(says, fine, "{s:#}");
    assert_eq!(s["addresses"], json!([{"type": "IPAddress", "value": "10.0.0.7"}]));
    // Nobody, and proxies of others.
    for proxies in [vec![], vec![proxy("other", "edge"), proxy("shop", "other")]] {
        let (says, s) = of(&docs, &proxies);
        assert_eq!(says, "Accepted=True/Accepted Programmed=False/Pending", "{s:#}");
        assert_eq!(s["addresses"], json!([]));
    }
    // Somebody else's class.
    let other = Docs::default().add(
        "Gateway",
        "shop/edge",
        json!({"gatewayClassName": "nginx", "listeners": [http("a")]}),
    );
    assert_eq!(other.status(&[])["Gateway"], json!([]));
    let class = |c: &str| {
        Docs::default().add("GatewayClass", "nginx", json!({"controllerName": c})).status(&[])["GatewayClass"]
            .clone()
    };
    assert_eq!(class("nginx.org/x"), json!([]));
    assert_eq!(
        said(&class("istio.io/gateway-controller")[0]["status"]["conditions"]),
        "Accepted=True/Accepted"
    );
    // An address that nobody has.
    let address = json!({"gatewayClassName": "istio", "listeners": [http("a")], "addresses": [{"type": "Hostname", "value": "edge.shop"}]});
    let docs = Docs::default().add("Gateway", "shop/edge", address);
    assert_eq!(of(&docs, &[]).0, "Accepted=True/Accepted Programmed=False/AddressNotUsable");
    assert_eq!(docs.config().problems[0].message, "AddressNotUsable: no Service is called edge.shop");
    assert_eq!(of(&docs.service("shop/edge"), &[]).0, "Accepted=True/Accepted Programmed=False/Pending");
}

#[test]
fn status_of_listeners() {
    let https = |refs: Value| json!({"name": "l", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": refs}});
    let with = |key: &str, value: Value| {
        let mut l = http("l");
        l[key] = value;
        l
    };
    let (ok, resolved, programmed) = (
        "Accepted=True/Accepted Conflicted=False/NoConflicts",
        "ResolvedRefs=True/ResolvedRefs",
        "Programmed=True/Programmed",
    );
    for (listeners, want) in [
        (json!([http("l")]), format!("{ok} {resolved} {programmed}")),
        (json!([https(json!([{"name": "c"}]))]), format!("{ok} {resolved} {programmed}")),
        (
            json!([https(json!([{"name": "c", "kind": "Thing"}]))]),
            format!("{ok} ResolvedRefs=False/InvalidCertificateRef Programmed=False/Invalid"),
        ),
        (
            json!([https(json!([{"name": "c", "namespace": "certs"}]))]),
            format!("{ok} ResolvedRefs=False/RefNotPermitted Programmed=False/Invalid"),
        ),
        (
            json!([with("protocol", json!("UDP"))]),
            "Accepted=False/UnsupportedProtocol Conflicted=False/NoConflicts ResolvedRefs=True/ResolvedRefs Programmed=False/Invalid".to_owned(),
        ),
        (
            json!([with("allowedRoutes", json!({"kinds": [{"kind": "TCPRoute"}, {"kind": "HTTPRoute"}]}))]),
            format!("{ok} ResolvedRefs=False/InvalidRouteKinds {programmed}"),
        ),
        (
            json!([http("a"), {"name": "l", "port": 80, "protocol": "TCP"}]),
            "Accepted=False/ProtocolConflict Conflicted=True/ProtocolConflict ResolvedRefs=True/ResolvedRefs Programmed=False/Invalid".to_owned(),
        ),
    ] {
        let s = Docs::default().gateway(listeners.clone()).status(&[proxy("shop", "edge")]);
        let all = s["Gateway"][0]["status"]["listeners"].as_array().unwrap();
        let l = all.iter().find(|l| l["name"] == "l").unwrap();
        assert_eq!(said(&l["conditions"]), want, "{listeners}");
    }
    // One of two is served.
    let s =
        Docs::default().gateway(json!([http("a"), {"name": "b", "port": 53, "protocol": "UDP"}])).status(&[]);
    assert!(
        said(&s["Gateway"][0]["status"]["conditions"]).starts_with("Accepted=True/ListenersNotValid"),
        "{s:#}"
    );
    let kinds: Vec<_> = s["Gateway"][0]["status"]["listeners"][0]["supportedKinds"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| k["kind"].clone())
        .collect();
    assert_eq!(kinds, ["HTTPRoute", "GRPCRoute"]);
}

#[test]
fn status_of_routes() {
    let edge = json!({"name": "edge"});
    let base = || Docs::default().gateway(json!([http("http")])).service("shop/a");
    let of = |docs: &Docs, kind: &str| {
        let s = docs.status(&[]);
        let parents = s[kind][0]["status"]["parents"].clone();
        let says =
            parents.as_array().unwrap().iter().map(|p| said(&p["conditions"])).collect::<Vec<_>>().join("; ");
        let attached = s["Gateway"][0]["status"]["listeners"][0]["attachedRoutes"].as_u64().unwrap();
        (says, attached)
    };
    let resolved = "ResolvedRefs=True/ResolvedRefs";
    let r =
        |parent: Value, backend: &str| of(&base().route("HTTPRoute", "shop/r", parent, backend), "HTTPRoute");
    assert_eq!(r(edge.clone(), "a"), (format!("Accepted=True/Accepted {resolved}"), 1));
    assert_eq!(
        r(edge.clone(), "b"),
        ("Accepted=True/Accepted ResolvedRefs=False/BackendNotFound".to_owned(), 1)
    );
    for parent in [
        json!({"name": "none"}),
        json!({"name": "edge", "sectionName": "none"}),
        json!({"name": "edge", "port": 81}),
        json!({"name": "none", "group": "", "kind": "Service"}),
        json!({"name": "a", "group": "", "kind": "Service", "port": 81}),
        json!({"name": "a", "group": "", "kind": "Service", "sectionName": "none"}),
    ] {
        assert_eq!(
            r(parent.clone(), "a"),
            (format!("Accepted=False/NoMatchingParent {resolved}"), 0),
            "{parent}"
        );
    }
    assert_eq!(
        r(json!({"name": "a", "group": "", "kind": "Service"}), "a"),
        (format!("Accepted=True/Accepted {resolved}"), 0)
    );
    // What is somebody else's has no status of ours.
    assert_eq!(r(json!({"name": "x", "group": "x.example", "kind": "Thing"}), "a"), (String::new(), 0));
    let tcp = base().route("TCPRoute", "shop/r", edge.clone(), "a");
    assert_eq!(of(&tcp, "TCPRoute"), (format!("Accepted=False/NotAllowedByListeners {resolved}"), 0));
    let foreign = base().route("HTTPRoute", "other/r", json!({"name": "edge", "namespace": "shop"}), "a");
    assert!(of(&foreign, "HTTPRoute").0.starts_with("Accepted=False/NotAllowedByListeners"));
    let hosts = Docs::default()
        .gateway(json!([{"name": "http", "port": 80, "protocol": "HTTP", "hostname": "a.b"}]))
        .service("shop/a")
        .add("HTTPRoute", "shop/r", json!({"parentRefs": [edge], "hostnames": ["c.b"]}));
    assert_eq!(of(&hosts, "HTTPRoute").0, format!("Accepted=False/NoMatchingListenerHostname {resolved}"));
    // Another namespace's backend, at an edge and for callers in the mesh.
    let to = |parent: Value| {
        let rules = json!([{"backendRefs": [{"name": "b", "namespace": "bank", "port": 80}]}]);
        base().service("bank/b").add("HTTPRoute", "shop/r", json!({"parentRefs": [parent], "rules": rules}))
    };
    let says = of(&to(json!({"name": "edge"})), "HTTPRoute").0;
    assert_eq!(says, "Accepted=True/Accepted ResolvedRefs=False/RefNotPermitted");
    let says = of(&to(json!({"name": "a", "group": "", "kind": "Service"})), "HTTPRoute").0;
    assert_eq!(says, format!("Accepted=True/Accepted {resolved}"));
    // A filter that nobody knows.
    let filter = json!({"type": "ExtensionRef", "extensionRef": {"group": "x", "kind": "Y", "name": "z"}});
    let spec = json!({"parentRefs": [{"name": "edge"}], "rules": [{"filters": [filter]}]});
    let says = of(&base().add("HTTPRoute", "shop/r", spec), "HTTPRoute").0;
    assert!(says.ends_with("PartiallyInvalid=True/UnsupportedValue"), "{says}");
}

#[test]
fn what_cannot_be_done_is_a_problem() {
    let fine = Docs::default().gateway(json!([http("http")])).service("shop/a");
    let fine = fine.route("HTTPRoute", "shop/r", json!({"name": "edge"}), "a");
    // That no proxy has come is no fault of the configuration.
    assert_eq!(fine.config().problems, []);
    let config = Docs::default()
        .gateway(json!([http("http"), {"name": "dns", "port": 53, "protocol": "UDP"}]))
        .route("HTTPRoute", "shop/r", json!({"name": "edge"}), "b")
        .config();
    let says: Vec<_> = config.problems.iter().map(|p| format!("{}: {}", p.object, p.message)).collect();
    assert_eq!(
        says,
        [
            "Gateway shop/edge: listener dns: UnsupportedProtocol: protocol UDP is not served",
            "HTTPRoute shop/r: BackendNotFound: there is no Service shop/b",
        ]
    );
}

#[test]
fn status_of_policies() {
    let of = |target: Value, ca: Value| {
        let spec =
            json!({"targetRefs": [target], "validation": {"hostname": "a.b", "caCertificateRefs": [ca]}});
        let s = Docs::default().service("shop/a").add("BackendTLSPolicy", "shop/p", spec).status(&[]);
        said(&s["BackendTLSPolicy"][0]["status"]["ancestors"][0]["conditions"])
    };
    let target = |name: &str| json!({"group": "", "kind": "Service", "name": name});
    let ca = |kind: &str| json!({"group": "", "kind": kind, "name": "ca"});
    assert_eq!(of(target("a"), ca("ConfigMap")), "Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs");
    assert_eq!(
        of(target("b"), ca("ConfigMap")),
        "Accepted=False/TargetNotFound ResolvedRefs=True/ResolvedRefs"
    );
    assert_eq!(
        of(target("a"), ca("Thing")),
        "Accepted=True/Accepted ResolvedRefs=False/InvalidCACertificateRef"
    );
}

#[test]
fn tls_to_a_backend_joins_the_rule_that_is_there() {
    let spec = json!({"targetRefs": [{"group": "", "kind": "Service", "name": "a", "sectionName": "http"}],
        "validation": {"hostname": "a.b", "wellKnownCACertificates": "System"}});
    let rule = json!({"host": "a", "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}});
    let config = Docs::default()
        .service("shop/a")
        .add("DestinationRule", "shop/a", rule)
        .add("BackendTLSPolicy", "shop/p", spec)
        .config();
    let [made] = config.destination_rules.as_slice() else { panic!("{:#?}", config.destination_rules) };
    let policy = made.spec.traffic_policy.as_ref().unwrap();
    assert!(policy.tls.is_none() && policy.load_balancer.is_some());
    let [port] = policy.port_level_settings.as_slice() else { panic!("{policy:#?}") };
    // Settings of a port replace the others, so they are repeated.
    assert_eq!(port.load_balancer, policy.load_balancer);
    assert_eq!(port.tls.as_ref().unwrap().sni, "a.b");
}

#[test]
fn routes_of_a_service_by_its_owner_and_by_a_caller() {
    let parent = json!({"name": "a", "namespace": "shop", "group": "", "kind": "Service"});
    let config = Docs::default()
        .service("shop/a")
        .add("VirtualService", "shop/own", json!({"hosts": ["other"]}))
        .route("HTTPRoute", "shop/r", parent.clone(), "a")
        .route("HTTPRoute", "team/r", parent, "a")
        .config();
    // The caller's comes before the owner's, though it is younger, and is its namespace's alone.
    let made = config.virtual_services.iter().filter(|v| v.name == "a.shop~mesh");
    let all: Vec<_> = made.map(|v| (v.namespace.as_str(), v.spec.export_to.join(","))).collect();
    assert_eq!(all, [("team", ".".to_owned()), ("shop", "*".to_owned())]);
    assert_eq!(config.virtual_services[0].name, "own", "what is older stays so");
}
