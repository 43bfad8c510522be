//! Ingress, IngressClass, and the settings of the mesh about them.

use serde_json::{Value, json};

use crate::{
    Base, Row, View, from, mesh_config, row,
    support::{Mesh, bookinfo},
    warned,
};

const EDGE: &str = "istio-system/istio-ingressgateway";

fn document(kind: &str, name: &str, annotations: Value, spec: Value) -> Value {
    let namespace = if kind == "IngressClass" { json!(null) } else { json!("default") };
    json!({"apiVersion": "networking.k8s.io/v1", "kind": kind, "spec": spec,
           "metadata": {"name": name, "namespace": namespace, "annotations": annotations}})
}

fn class(controller: &str) -> Value {
    document("IngressClass", "edge", json!({}), json!({"controller": controller}))
}

fn path(path: &str, kind: &str) -> Value {
    json!({"path": path, "pathType": kind, "backend": {"service": {"name": "ratings", "port": {"number": 9080}}}})
}

fn spec(path: Value) -> Value {
    json!({"rules": [{"host": "a.example", "http": {"paths": [path]}}]})
}

/// An Ingress of a class by annotation, if any.
fn ingress(class: Option<&str>, spec: Value) -> Value {
    let annotations = class.map_or(json!({}), |c| json!({"kubernetes.io/ingress.class": c}));
    document("Ingress", "web", annotations, spec)
}

fn own(path: Value) -> Base {
    Base::new(bookinfo().with(ingress(Some("istio"), spec(path))))
}

/// Ingresses, and settings of the mesh.
fn settings(ingress: Value) -> Base {
    let settings = mesh_config::document(json!({}));
    Base::new(Mesh::with(bookinfo().with(ingress), settings))
}

fn edge(request: &'static str) -> View {
    from(EDGE, request)
}

fn to(service: &str) -> Value {
    json!({"action": "forward", "cluster": format!("outbound|9080||{service}.default.svc.cluster.local")})
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all = ingresses();
    all.extend(left_out());
    all.extend(settings_of_the_mesh());
    all
}

fn ingresses() -> Vec<Row> {
    let root = own(path("/", "Prefix"));
    let http = || edge("GET http://a.example/");
    let unnamed = Base::new(
        bookinfo().with(class("istio.io/ingress-controller")).with(ingress(None, spec(path("/", "Prefix")))),
    );
    let classed = document(
        "Ingress",
        "web",
        json!({}),
        json!({"ingressClassName": "edge", "rules": spec(path("/", "Prefix"))["rules"]}),
    );
    let of_class = Base::new(bookinfo().with(classed).with(class("istio.io/ingress-controller")));
    let mut secure = spec(path("/", "Prefix"));
    secure["tls"] = json!([{"secretName": "c"}]);
    let secure = Base::new(bookinfo().with(ingress(Some("istio"), secure)));
    vec![
        row(
            "Ingress.ingressClassName",
            &unnamed,
            "/spec/ingressClassName",
            json!("edge"),
            http(),
            to("ratings"),
        ),
        row(
            "Ingress.rules[].host",
            &root,
            "/spec/rules/0/host",
            json!("b.example"),
            edge("GET http://b.example/"),
            to("ratings"),
        )
        .instead_of(json!("a.example")),
        row(
            "Ingress.rules[].http.paths[].path",
            &root,
            "/spec/rules/0/http/paths/0/path",
            json!("/x"),
            http(),
            json!({"action": "not-found"}),
        )
        .instead_of(json!("/")),
        row(
            "Ingress.rules[].http.paths[].pathType",
            &own(path("/x", "Exact")),
            "/spec/rules/0/http/paths/0/pathType",
            json!("Prefix"),
            edge("GET http://a.example/x/y"),
            to("ratings"),
        )
        .instead_of(json!("Exact")),
        row(
            "Ingress.rules[].http.paths[].backend.service.name",
            &root,
            "/spec/rules/0/http/paths/0/backend/service/name",
            json!("reviews"),
            http(),
            to("reviews"),
        )
        .instead_of(json!("ratings")),
        row(
            "Ingress.rules[].http.paths[].backend.service.port.number",
            &root,
            "/spec/rules/0/http/paths/0/backend/service/port/number",
            json!(9080),
            http(),
            to("ratings"),
        )
        .instead_of(json!(9081)),
        row(
            "Ingress.rules[].http.paths[].backend.service.port.name",
            &root,
            "/spec/rules/0/http/paths/0/backend/service/port",
            json!({"name": "http"}),
            http(),
            to("ratings"),
        )
        .instead_of(json!({"name": "other"})),
        row(
            "Ingress.tls[].secretName",
            &secure,
            "/spec/tls/0/secretName",
            json!("c"),
            edge("GET https://a.example/"),
            to("ratings"),
        )
        .instead_of(json!("")),
        row(
            "Ingress.tls[].hosts",
            &secure,
            "/spec/tls/0/hosts",
            json!(["b.example"]),
            edge("GET https://a.example/"),
            json!({"action": "close"}),
        ),
        row(
            "IngressClass.controller",
            &of_class,
            "/spec/controller",
            json!("istio.io/ingress-controller"),
            http(),
            to("ratings"),
        )
        .instead_of(json!("x.example/y")),
    ]
}

/// What Istio does not serve either.
fn left_out() -> Vec<Row> {
    let root = own(path("/", "Prefix"));
    let backend = json!({"service": {"name": "ratings", "port": {"number": 9080}}});
    let mut all = vec![warned(
        "Ingress.defaultBackend",
        &root,
        "/spec/defaultBackend",
        backend,
        "not served, as in Istio",
    )];
    for field in [
        "Ingress.rules[].http.paths[].backend.resource.apiGroup",
        "Ingress.rules[].http.paths[].backend.resource.kind",
        "Ingress.rules[].http.paths[].backend.resource.name",
    ] {
        let resource = json!({"resource": {"apiGroup": "a.example", "kind": "B", "name": "c"}});
        let at = "/spec/rules/0/http/paths/0/backend";
        all.push(warned(field, &root, at, resource, "not supported, and its path is not served"));
    }
    let class = Base::new(bookinfo().with(class("istio.io/ingress-controller")));
    for field in [
        "IngressClass.parameters.apiGroup",
        "IngressClass.parameters.kind",
        "IngressClass.parameters.name",
        "IngressClass.parameters.scope",
        "IngressClass.parameters.namespace",
    ] {
        let named = json!({"apiGroup": "a.example", "kind": "B", "name": "c", "scope": "Namespace", "namespace": "d"});
        all.push(warned(field, &class, "/spec/parameters", named, "without effect"));
    }
    all
}

fn settings_of_the_mesh() -> Vec<Row> {
    let of = |class| settings(ingress(class, spec(path("/", "Prefix"))));
    let http = || edge("GET http://a.example/");
    vec![
        row(
            "MeshConfig.ingressClass",
            &of(Some("edge")),
            "/spec/ingressClass",
            json!("edge"),
            http(),
            to("ratings"),
        ),
        row(
            "MeshConfig.ingressControllerMode",
            &of(None),
            "/spec/ingressControllerMode",
            json!("DEFAULT"),
            http(),
            to("ratings"),
        ),
        row(
            "MeshConfig.ingressService",
            &of(Some("istio")),
            "/spec/ingressService",
            json!("front"),
            from("istio-system/front", "GET http://a.example/"),
            to("ratings"),
        ),
        row(
            "MeshConfig.ingressSelector",
            &of(Some("istio")),
            "/spec/ingressSelector",
            json!("front"),
            from("istio-system/front", "GET http://a.example/"),
            to("ratings"),
        ),
    ]
}
