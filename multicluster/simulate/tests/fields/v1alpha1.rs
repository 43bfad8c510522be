//! Kinds of release 1.0: Policy and MeshPolicy (AuthenticationPolicy below), RbacConfig and ClusterRbacConfig, ServiceRole
//! and ServiceRoleBinding.

use serde_json::{Value, json};

use crate::{
    Base, Row, View, get, refused, row,
    security::{KEYS, TOKEN},
    support::{Mesh, bookinfo},
    with_headers,
};

const X: &str = "GET http://ratings:9080/x";
const HOST: &str = "ratings.default.svc.cluster.local";

fn document(group: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": format!("{group}.istio.io/v1alpha1"), "kind": kind,
           "metadata": {"name": name, "namespace": "default"}, "spec": spec})
}

fn passes() -> Value {
    json!({"action": "forward", "status": null})
}

fn denied() -> Value {
    json!({"action": "deny", "status": 403})
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all = peers();
    all.extend(origins());
    all.extend(paths());
    all.extend(configs());
    all.extend(roles());
    all.extend(bindings());
    all
}

fn policy(spec: Value) -> Value {
    document("authentication", "Policy", "p", spec)
}

/// Ratings is called in clear.
fn plain() -> Mesh {
    bookinfo().with(json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "dr", "namespace": "default"},
        "spec": {"host": "ratings", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}}))
}

fn peers() -> Vec<Row> {
    let b =
        Base::new(plain().with(policy(json!({"targets": [{"name": "ratings"}], "peers": [{"mtls": {}}]}))));
    let closed = json!({"action": "close"});
    let target = |field, with: Value, without: Value| {
        row(field, &b, "/spec/targets/0", with, get(X), closed.clone()).instead_of(without)
    };
    let by_principal = |binding: &str| {
        let mesh = by_role()
            .with(role(json!({"services": [HOST], "methods": ["*"]})))
            .with(binding_of(json!({"properties": {"request.auth.principal": "i/s"}})))
            .with(policy(json!({"targets": [{"name": "ratings"}], "principalBinding": binding,
                "peers": [{"mtls": {}}], "origins": [{"jwt": {"issuer": "i", "jwks": KEYS}}]})));
        Base::new(mesh)
    };
    vec![
        target("AuthenticationPolicy.targets[].name", json!({"name": "ratings"}), json!({"name": "reviews"})),
        target(
            "AuthenticationPolicy.targets[].ports[].number",
            json!({"name": "ratings", "ports": [{"number": 9080}]}),
            json!({"name": "ratings", "ports": [{"number": 9081}]}),
        ),
        target(
            "AuthenticationPolicy.targets[].ports[].name",
            json!({"name": "ratings", "ports": [{"name": "http"}]}),
            json!({"name": "ratings", "ports": [{"name": "grpc"}]}),
        ),
        row(
            "AuthenticationPolicy.peers[].mtls.mode",
            &b,
            "/spec/peers/0/mtls/mode",
            json!("PERMISSIVE"),
            get(X),
            passes(),
        ),
        row(
            "AuthenticationPolicy.peers[].mtls.allowTls",
            &b,
            "/spec/peers/0/mtls/allowTls",
            json!(true),
            View::Config { from: "default/ratings-v1" },
            json!({"listeners": {"virtualInbound": {"filter_chains": [
                {"name": "virtualInbound-9080", "tls": {"client_certificate": {"Optional": {}}}}, {}, {}, {}
            ]}}}),
        ),
        refused(
            "AuthenticationPolicy.peers[].jwt",
            &b,
            "/spec/peers/0/jwt",
            json!({"issuer": "i"}),
            "a token of a peer is not supported",
        ),
        row("AuthenticationPolicy.peerIsOptional", &b, "/spec/peerIsOptional", json!(true), get(X), passes()),
        row(
            "AuthenticationPolicy.principalBinding",
            &by_principal("USE_PEER"),
            "/spec/principalBinding",
            json!("USE_ORIGIN"),
            with_headers(X, TOKEN),
            passes(),
        ),
    ]
}

fn origins() -> Vec<Row> {
    let b =
        Base::new(bookinfo().with(policy(json!({"targets": [{"name": "ratings"}], "peers": [{"mtls": {}}],
        "origins": [{"jwt": {"issuer": "i", "jwksUri": "https://i.example/keys"}}]}))));
    let provider =
        |p: Value| json!({"filters": {"virtualInbound-9080": {"Jwt": {"providers": {"origins-0": p}}}}});
    let config = || View::Config { from: "default/ratings-v1" };
    let at = |field, pointer, value, want| row(field, &b, pointer, value, config(), provider(want));
    vec![
        row(
            "AuthenticationPolicy.origins[].jwt.issuer",
            &b,
            "/spec/origins/0/jwt/issuer",
            json!("i"),
            with_headers(X, TOKEN),
            passes(),
        )
        .instead_of(json!("j")),
        row(
            "AuthenticationPolicy.originIsOptional",
            &b,
            "/spec/originIsOptional",
            json!(true),
            get(X),
            passes(),
        ),
        row(
            "AuthenticationPolicy.origins[].jwt.audiences",
            &b,
            "/spec/origins/0/jwt/audiences",
            json!(["other"]),
            with_headers(X, TOKEN),
            json!({"status": 403}),
        ),
        at(
            "AuthenticationPolicy.origins[].jwt.jwksUri",
            "/spec/origins/0/jwt/jwksUri",
            json!("https://j.example/k"),
            json!({"jwks": {"Remote": {"uri": "https://j.example/k"}}}),
        )
        .instead_of(json!("https://i.example/keys")),
        at(
            "AuthenticationPolicy.origins[].jwt.jwks",
            "/spec/origins/0/jwt",
            json!({"issuer": "i", "jwks": KEYS}),
            json!({"jwks": {"Inline": KEYS}}),
        )
        .instead_of(json!({"issuer": "i", "jwksUri": "https://i.example/keys"})),
        at(
            "AuthenticationPolicy.origins[].jwt.jwtHeaders",
            "/spec/origins/0/jwt/jwtHeaders",
            json!(["x-t", "authorization"]),
            json!({"from_headers": [{"name": "x-t", "value_prefix": ""}, {"name": "authorization", "value_prefix": "Bearer "}]}),
        ),
        at(
            "AuthenticationPolicy.origins[].jwt.jwtParams",
            "/spec/origins/0/jwt/jwtParams",
            json!(["t"]),
            json!({"from_params": ["t"]}),
        ),
    ]
}

/// Paths that need a token, with one trigger rule and with several.
fn paths() -> Vec<Row> {
    let b = Base::new(bookinfo().with(policy(json!({"targets": [{"name": "ratings"}],
        "origins": [{"jwt": {"issuer": "i", "jwks": KEYS}}]}))));
    let at = "/spec/origins/0/jwt/triggerRules";
    let needs_one = || json!({"action": "refuse", "status": 401});
    let excluded = |field, with: Value, without: Value| {
        row(field, &b, at, json!([{"excludedPaths": [with]}]), get(X), passes())
            .instead_of(json!([{"excludedPaths": [without]}]))
    };
    let included = |field, with: Value, without: Value| {
        row(field, &b, at, json!([{"includedPaths": [with]}]), get(X), needs_one())
            .instead_of(json!([{"includedPaths": [without]}]))
    };
    let of = |f: &'static str| f;
    vec![
        excluded(
            of("AuthenticationPolicy.origins[].jwt.triggerRules[].excludedPaths[].exact"),
            json!({"exact": "/x"}),
            json!({"exact": "/y"}),
        ),
        excluded(
            of("AuthenticationPolicy.origins[].jwt.triggerRules[].excludedPaths[].prefix"),
            json!({"prefix": "/x"}),
            json!({"prefix": "/y"}),
        ),
        excluded(
            of("AuthenticationPolicy.origins[].jwt.triggerRules[].excludedPaths[].suffix"),
            json!({"suffix": "x"}),
            json!({"suffix": "y"}),
        ),
        excluded(
            of("AuthenticationPolicy.origins[].jwt.triggerRules[].excludedPaths[].regex"),
            json!({"regex": "/[x-z]"}),
            json!({"regex": "/[a-c]"}),
        ),
        included(
            of("AuthenticationPolicy.origins[].jwt.triggerRules[].includedPaths[]"),
            json!({"exact": "/x"}),
            json!({"exact": "/y"}),
        ),
    ]
}

/// Access to everything is by role.
fn by_role() -> Mesh {
    bookinfo().with(document("rbac", "ClusterRbacConfig", "default", json!({"mode": "ON"})))
}

fn role(rule: Value) -> Value {
    document("rbac", "ServiceRole", "r", json!({"rules": [rule]}))
}

fn binding_of(subject: Value) -> Value {
    document(
        "rbac",
        "ServiceRoleBinding",
        "b",
        json!({"subjects": [subject], "roleRef": {"kind": "ServiceRole", "name": "r"}}),
    )
}

fn configs() -> Vec<Row> {
    let with = |spec: Value| Base::new(bookinfo().with(document("rbac", "RbacConfig", "default", spec)));
    let included = with(json!({"mode": "ON_WITH_INCLUSION", "inclusion": {}}));
    let excluded = with(json!({"mode": "ON_WITH_EXCLUSION", "exclusion": {}}));
    vec![
        row("RbacConfig.mode", &with(json!({"mode": "OFF"})), "/spec/mode", json!("ON"), get(X), denied()),
        row(
            "RbacConfig.inclusion.services",
            &included,
            "/spec/inclusion/services",
            json!([HOST]),
            get(X),
            denied(),
        )
        .instead_of(json!(["reviews.default.svc.cluster.local"])),
        row(
            "RbacConfig.inclusion.namespaces",
            &included,
            "/spec/inclusion/namespaces",
            json!(["default"]),
            get(X),
            denied(),
        )
        .instead_of(json!(["other"])),
        row("RbacConfig.exclusion", &excluded, "/spec/exclusion/services", json!([HOST]), get(X), passes())
            .instead_of(json!(["*"])),
        row(
            "RbacConfig.exclusion",
            &excluded,
            "/spec/exclusion/namespaces",
            json!(["default"]),
            get(X),
            passes(),
        ),
        row(
            "RbacConfig.enforcementMode",
            &with(json!({"mode": "ON"})),
            "/spec/enforcementMode",
            json!("PERMISSIVE"),
            get(X),
            passes(),
        ),
    ]
}

fn roles() -> Vec<Row> {
    let b = Base::new(
        by_role()
            .with(binding_of(json!({"user": "*"})))
            .with(role(json!({"services": [HOST], "methods": ["GET"]}))),
    );
    let at = |field, pointer, yes: Value, no: Value| {
        row(field, &b, pointer, yes, with_headers(X, &["v: 1"]), passes()).instead_of(no)
    };
    let rule = "/spec/rules/0";
    let only = |name: &str, v: Value| {
        let mut r = json!({"services": [HOST], "methods": ["GET"]});
        r[name] = v;
        r
    };
    let constraint = |key: &str, value: &str| only("constraints", json!([{"key": key, "values": [value]}]));
    let key = "ServiceRole.rules[].constraints[].key";
    vec![
        at("ServiceRole.rules[].services", "/spec/rules/0/services", json!(["rat*"]), json!(["rev*"])),
        at("ServiceRole.rules[].methods", "/spec/rules/0/methods", json!(["GET"]), json!(["PUT"])),
        at(
            "ServiceRole.rules[].hosts",
            rule,
            only("hosts", json!(["ratings:9080"])),
            only("hosts", json!(["x"])),
        ),
        at(
            "ServiceRole.rules[].notHosts",
            rule,
            only("notHosts", json!(["x"])),
            only("notHosts", json!(["rat*"])),
        ),
        at("ServiceRole.rules[].paths", rule, only("paths", json!(["/x"])), only("paths", json!(["/y*"]))),
        at(
            "ServiceRole.rules[].notPaths",
            rule,
            only("notPaths", json!(["/y"])),
            only("notPaths", json!(["/x"])),
        ),
        at(
            "ServiceRole.rules[].notMethods",
            rule,
            only("notMethods", json!(["PUT"])),
            only("notMethods", json!(["GET"])),
        ),
        at("ServiceRole.rules[].ports", rule, only("ports", json!([9080])), only("ports", json!([80]))),
        at(
            "ServiceRole.rules[].notPorts",
            rule,
            only("notPorts", json!([80])),
            only("notPorts", json!([9080])),
        ),
        at(
            key,
            rule,
            constraint("destination.labels[version]", "v1"),
            constraint("destination.labels[other]", "v1"),
        ),
        at(
            key,
            rule,
            constraint("destination.name", "ratings"),
            constraint("destination.namespace", "ratings"),
        ),
        at(key, rule, constraint("destination.user", "rat*"), constraint("destination.user", "rev*")),
        at(
            key,
            rule,
            constraint("destination.ip", "10.1.0.0/16"),
            constraint("destination.ip", "10.2.0.0/16"),
        ),
        at(key, rule, constraint("destination.port", "9080"), constraint("destination.port", "80")),
        at(key, rule, constraint("request.headers[v]", "*"), constraint("request.headers[w]", "*")),
        at(
            "ServiceRole.rules[].constraints[].values",
            rule,
            constraint("request.headers[v]", "1"),
            constraint("request.headers[v]", "2"),
        ),
    ]
}

fn bindings() -> Vec<Row> {
    let mesh = by_role()
        .with(policy(json!({"targets": [{"name": "ratings"}], "principalBinding": "USE_ORIGIN",
            "peers": [{"mtls": {}}], "originIsOptional": true,
            "origins": [{"jwt": {"issuer": "i", "jwks": KEYS}}]})))
        .with(role(json!({"services": [HOST], "methods": ["*"]})))
        .with(binding_of(json!({"user": "*"})));
    let b = Base::new(mesh);
    let subject = "/spec/subjects/0";
    let at = |field, yes: Value, no: Value| {
        row(field, &b, subject, yes, with_headers(X, GROUPS), passes()).instead_of(no)
    };
    let property = |k: &str, v: &str| json!({"properties": {k: v}});
    let me = "mesh.local/ns/default/sa/productpage";
    let properties = "ServiceRoleBinding.subjects[].properties";
    let mut out = vec![
        at("ServiceRoleBinding.subjects[].user", json!({"user": me}), json!({"user": "mesh.local/ns/x*"})),
        at("ServiceRoleBinding.subjects[].group", json!({"group": "staff"}), json!({"group": "others"})),
        at("ServiceRoleBinding.subjects[].names", json!({"names": [me]}), json!({"names": ["x"]})),
        at("ServiceRoleBinding.subjects[].notNames", json!({"notNames": ["x"]}), json!({"notNames": [me]})),
        at(
            "ServiceRoleBinding.subjects[].groups",
            json!({"groups": ["staff"]}),
            json!({"groups": ["others"]}),
        ),
        at(
            "ServiceRoleBinding.subjects[].notGroups",
            json!({"notGroups": ["others"]}),
            json!({"notGroups": ["staff"]}),
        ),
        at(
            "ServiceRoleBinding.subjects[].namespaces",
            json!({"namespaces": ["default"]}),
            json!({"namespaces": ["x"]}),
        ),
        at(
            "ServiceRoleBinding.subjects[].notNamespaces",
            json!({"notNamespaces": ["x"]}),
            json!({"notNamespaces": ["default"]}),
        ),
        at("ServiceRoleBinding.subjects[].ips", json!({"ips": ["10.1.0.31"]}), json!({"ips": ["10.1.0.32"]})),
        at(
            "ServiceRoleBinding.subjects[].notIps",
            json!({"notIps": ["10.2.0.0/16"]}),
            json!({"notIps": ["10.1.0.0/16"]}),
        ),
        row("ServiceRoleBinding.roleRef.name", &b, "/spec/roleRef/name", json!("other"), get(X), denied())
            .instead_of(json!("r")),
        refused(
            "ServiceRoleBinding.roleRef.kind",
            &b,
            "/spec/roleRef/kind",
            json!("Role"),
            "is not ServiceRole",
        ),
        row("ServiceRoleBinding.mode", &b, "/spec/mode", json!("PERMISSIVE"), get(X), denied()),
    ];
    for (key, yes, no) in [
        ("source.ip", "10.1.0.0/16", "10.2.0.0/16"),
        ("source.namespace", "default", "x"),
        ("source.user", me, "x"),
        ("source.principal", me, "x"),
        ("request.headers[v]", "1", "2"),
        ("request.auth.principal", "i/s", "i/t"),
        ("request.auth.audiences", "a", "b"),
        ("request.auth.presenter", "p", "q"),
        ("request.auth.claims[groups]", "staff", "others"),
    ] {
        out.push(at(properties, property(key, yes), property(key, no)));
    }
    out
}

/// A header, and the token `{"iss":"i","sub":"s","aud":"a","azp":"p","groups":["staff"]}`.
const GROUPS: &[&str] = &[
    "v: 1",
    "authorization: Bearer eyJhbGciOiJub25lIn0.eyJpc3MiOiJpIiwic3ViIjoicyIsImF1ZCI6ImEiLCJhenAiOiJwIiwiZ3JvdXBzIjpbInN0YWZmIl19.x",
];
