//! PeerAuthentication, AuthorizationPolicy and RequestAuthentication.

use serde_json::{Value, json};

use crate::{Base, Row, View, from, get, refused, row, support::bookinfo, with_headers};

const X: &str = "GET http://ratings:9080/x";

fn document(kind: &str, spec: Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": "p", "namespace": "default"}, "spec": spec})
}

fn rule(kind: &str, spec: Value) -> Base {
    Base::new(bookinfo().with(document(kind, spec)))
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all = peers();
    all.extend(authorization());
    all.extend(tokens());
    all
}

fn peers() -> Vec<Row> {
    // Ratings is called in clear.
    let plain = bookinfo().with(json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "dr", "namespace": "default"},
        "spec": {"host": "ratings", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}}));
    let b = Base::new(
        plain.clone().with(document("PeerAuthentication", json!({"mtls": {"mode": "PERMISSIVE"}}))),
    );
    let strict = Base::new(plain.with(document(
        "PeerAuthentication",
        json!({"selector": {"matchLabels": {"app": "ratings"}}, "mtls": {"mode": "STRICT"}}),
    )));
    let closed = json!({"action": "close"});
    let passes = json!({"action": "forward"});
    vec![
        row("PeerAuthentication.mtls.mode", &b, "/spec/mtls/mode", json!("STRICT"), get(X), closed)
            .instead_of(json!("PERMISSIVE")),
        row(
            "PeerAuthentication.selector",
            &strict,
            "/spec/selector/matchLabels",
            json!({"app": "other"}),
            get(X),
            passes.clone(),
        )
        .instead_of(json!({"app": "ratings"})),
        row(
            "PeerAuthentication.portLevelMtls{}",
            &strict,
            "/spec/portLevelMtls",
            json!({"9080": {"mode": "PERMISSIVE"}}),
            get(X),
            passes,
        ),
    ]
}

fn authorization() -> Vec<Row> {
    let deny = |r: Value| rule("AuthorizationPolicy", json!({"action": "DENY", "rules": [r]}));
    let denied = || json!({"action": "deny", "status": 403});
    let allowed = || json!({"action": "forward", "status": null});
    // Denies who is not named.
    let source = deny(json!({"from": [{"source": {"namespaces": ["default"]}}]}));
    let operation = deny(json!({"to": [{"operation": {"methods": ["GET"]}}]}));
    let when = |key: &str| deny(json!({"when": [{"key": key, "values": ["nothing"]}]}));
    let s = "/spec/rules/0/from/0/source";
    let o = "/spec/rules/0/to/0/operation";
    let nothing = json!({"namespaces": ["nobody"]});
    let no_operation = json!({"methods": ["PUT"]});
    let at =
        |field, value: Value| row(field, &source, s, value, get(X), denied()).instead_of(nothing.clone());
    let not = |field, value: Value| {
        row(field, &source, s, value, get(X), allowed()).instead_of(json!({"namespaces": ["default"]}))
    };
    let op = |field, value: Value| {
        row(field, &operation, o, value, get(X), denied()).instead_of(no_operation.clone())
    };
    let not_op = |field, value: Value| {
        row(field, &operation, o, value, get(X), allowed()).instead_of(json!({"methods": ["GET"]}))
    };
    let claim = |token: &'static [&'static str], field, value: Value, other: Value, want: Value| {
        let mesh = bookinfo()
            .with(document(
                "RequestAuthentication",
                json!({"jwtRules": [{"issuer": "i", "jwksUri": "https://i.example/keys"}]}),
            ))
            .with(document(
                "AuthorizationPolicy",
                json!({"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["x"]}}]}]}),
            ));
        row(field, &Base::new(mesh), s, value, with_headers(X, token), want).instead_of(other)
    };
    vec![
        row("AuthorizationPolicy.action", &operation, "/spec/action", json!("DENY"), get(X), denied())
            .instead_of(json!("AUDIT")),
        row(
            "AuthorizationPolicy.selector",
            &operation,
            "/spec/selector/matchLabels",
            json!({"app": "reviews"}),
            get(X),
            allowed(),
        ),
        row(
            "AuthorizationPolicy.rules[].from[].source.principals",
            &source,
            s,
            json!({"principals": ["mesh.local/ns/default/sa/productpage"]}),
            get(X),
            denied(),
        )
        .instead_of(nothing.clone()),
        not(
            "AuthorizationPolicy.rules[].from[].source.notPrincipals",
            json!({"notPrincipals": ["mesh.local/ns/default/sa/productpage"]}),
        ),
        claim(
            TOKEN,
            "AuthorizationPolicy.rules[].from[].source.requestPrincipals",
            json!({"requestPrincipals": ["i/s"]}),
            json!({"requestPrincipals": ["i/t"]}),
            denied(),
        ),
        claim(
            TOKEN,
            "AuthorizationPolicy.rules[].from[].source.notRequestPrincipals",
            json!({"notRequestPrincipals": ["i/t"]}),
            json!({"notRequestPrincipals": ["i/s"]}),
            denied(),
        ),
        at("AuthorizationPolicy.rules[].from[].source.namespaces", json!({"namespaces": ["default"]})),
        not("AuthorizationPolicy.rules[].from[].source.notNamespaces", json!({"notNamespaces": ["default"]})),
        at(
            "AuthorizationPolicy.rules[].from[].source.serviceAccounts",
            json!({"serviceAccounts": ["default/productpage"]}),
        ),
        not(
            "AuthorizationPolicy.rules[].from[].source.notServiceAccounts",
            json!({"notServiceAccounts": ["default/productpage"]}),
        ),
        at("AuthorizationPolicy.rules[].from[].source.ipBlocks", json!({"ipBlocks": ["10.1.0.31"]})),
        not("AuthorizationPolicy.rules[].from[].source.notIpBlocks", json!({"notIpBlocks": ["10.1.0.0/16"]})),
        at(
            "AuthorizationPolicy.rules[].from[].source.remoteIpBlocks",
            json!({"remoteIpBlocks": ["10.1.0.31"]}),
        ),
        not(
            "AuthorizationPolicy.rules[].from[].source.notRemoteIpBlocks",
            json!({"notRemoteIpBlocks": ["10.1.0.0/16"]}),
        ),
        at("AuthorizationPolicy.rules[].from[].source.trustDomains", json!({"trustDomains": ["mesh.local"]})),
        not(
            "AuthorizationPolicy.rules[].from[].source.notTrustDomains",
            json!({"notTrustDomains": ["mesh.local"]}),
        ),
        op("AuthorizationPolicy.rules[].to[].operation.hosts", json!({"hosts": ["ratings:9080"]})),
        not_op("AuthorizationPolicy.rules[].to[].operation.notHosts", json!({"notHosts": ["ratings*"]})),
        op("AuthorizationPolicy.rules[].to[].operation.ports", json!({"ports": ["9080"]})),
        not_op("AuthorizationPolicy.rules[].to[].operation.notPorts", json!({"notPorts": ["9080"]})),
        op("AuthorizationPolicy.rules[].to[].operation.methods", json!({"methods": ["GET"]})),
        not_op("AuthorizationPolicy.rules[].to[].operation.notMethods", json!({"notMethods": ["GET"]})),
        op("AuthorizationPolicy.rules[].to[].operation.paths", json!({"paths": ["/x"]})),
        not_op("AuthorizationPolicy.rules[].to[].operation.notPaths", json!({"notPaths": ["/x*"]})),
        row(
            "AuthorizationPolicy.rules[].when[].key",
            &when("request.headers[a]").and("/spec/rules/0/when/0/values", json!(["1"])),
            "/spec/rules/0/when/0/key",
            json!("request.headers[b]"),
            with_headers(X, &["b: 1"]),
            denied(),
        )
        .instead_of(json!("request.headers[a]")),
        row(
            "AuthorizationPolicy.rules[].when[].values",
            &when("source.namespace"),
            "/spec/rules/0/when/0/values",
            json!(["default"]),
            get(X),
            denied(),
        )
        .instead_of(json!(["nothing"])),
        row(
            "AuthorizationPolicy.rules[].when[].notValues",
            &when("source.namespace"),
            "/spec/rules/0/when/0",
            json!({"key": "source.namespace", "notValues": ["default"]}),
            get(X),
            allowed(),
        )
        .instead_of(json!({"key": "source.namespace", "notValues": ["x"]})),
        row(
            "AuthorizationPolicy.provider.name",
            &Base::new(
                super::mesh_config::asking(json!({"name": "p", "envoyExtAuthzHttp": {"service": "authz.default.svc.cluster.local", "port": 8000}}))
                    .with(document(
                        "AuthorizationPolicy",
                        json!({"action": "CUSTOM", "provider": {"name": "p"}, "rules": [{}]}),
                    )),
            ),
            "/spec/provider/name",
            json!("q"),
            get(X),
            denied(),
        ),
        row(
            "AuthorizationPolicy.targetRef",
            &at_edge("AuthorizationPolicy", json!({"action": "DENY", "rules": [{}]})),
            "/spec/targetRef",
            target("shop"),
            from(EDGE, EDGE_REQUEST),
            denied(),
        )
        .instead_of(target("other")),
        row(
            "AuthorizationPolicy.targetRefs[]",
            &at_edge("AuthorizationPolicy", json!({"action": "DENY", "rules": [{}]})),
            "/spec/targetRefs",
            json!([target("other"), target("shop")]),
            from(EDGE, EDGE_REQUEST),
            denied(),
        )
        .instead_of(json!([target("other")])),
        // And no sidecar is meant.
        row(
            "AuthorizationPolicy.targetRef",
            &operation,
            "/spec/targetRef",
            target("shop"),
            get(X),
            allowed(),
        ),
    ]
}

fn target(name: &str) -> Value {
    json!({"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": name})
}

const EDGE: &str = "default/shop";
const EDGE_REQUEST: &str = "GET http://shop.example.com/x";

/// A policy, and a Gateway of the Gateway API.
fn at_edge(kind: &str, spec: Value) -> Base {
    Base::new(super::gateway_api::shop().with(document(kind, spec)))
}

/// `{"alg":"none"}` and `{"iss":"i","sub":"s","aud":"a","scope":"read write"}`.
pub(crate) const TOKEN: &[&str] = &[
    "authorization: Bearer eyJhbGciOiJub25lIn0.eyJpc3MiOiJpIiwic3ViIjoicyIsImF1ZCI6ImEiLCJzY29wZSI6InJlYWQgd3JpdGUifQ.x",
];

fn tokens() -> Vec<Row> {
    let b = rule(
        "RequestAuthentication",
        json!({"jwtRules": [{"issuer": "i", "jwksUri": "https://i.example/keys"}]}),
    );
    let config = || View::Config { from: "default/ratings-v1" };
    let provider =
        |p: Value| json!({"filters": {"virtualInbound-9080": {"Jwt": {"providers": {"origins-0": p}}}}});
    let at = |field, pointer, value, want| row(field, &b, pointer, value, config(), provider(want));
    let refused_token = || json!({"action": "refuse", "status": 401});
    let edge = at_edge(
        "RequestAuthentication",
        json!({"jwtRules": [{"issuer": "i", "jwksUri": "https://i.example/keys"}]}),
    );
    vec![
        row(
            "RequestAuthentication.selector",
            &b,
            "/spec/selector/matchLabels",
            json!({"app": "reviews"}),
            with_headers(X, BAD_TOKEN),
            json!({"action": "forward"}),
        ),
        row(
            "RequestAuthentication.jwtRules[].issuer",
            &b,
            "/spec/jwtRules/0/issuer",
            json!("j"),
            with_headers(X, TOKEN),
            refused_token(),
        )
        .instead_of(json!("i")),
        row(
            "RequestAuthentication.jwtRules[].audiences",
            &b,
            "/spec/jwtRules/0/audiences",
            json!(["other"]),
            with_headers(X, TOKEN),
            json!({"status": 403}),
        ),
        at(
            "RequestAuthentication.jwtRules[].jwksUri",
            "/spec/jwtRules/0/jwksUri",
            json!("https://j.example/k"),
            json!({"jwks": {"Remote": {"uri": "https://j.example/k"}}}),
        )
        .instead_of(json!("https://i.example/keys")),
        row(
            "RequestAuthentication.jwtRules[].jwks",
            &b,
            "/spec/jwtRules/0",
            json!({"issuer": "i", "jwks": KEYS}),
            config(),
            provider(json!({"jwks": {"Inline": KEYS}})),
        )
        .instead_of(json!({"issuer": "i", "jwksUri": "https://i.example/keys"})),
        at(
            "RequestAuthentication.jwtRules[].fromHeaders[].name",
            "/spec/jwtRules/0/fromHeaders",
            json!([{"name": "x-t"}]),
            json!({"from_headers": [{"name": "x-t"}]}),
        ),
        at(
            "RequestAuthentication.jwtRules[].fromHeaders[].prefix",
            "/spec/jwtRules/0/fromHeaders",
            json!([{"name": "x-t", "prefix": "P "}]),
            json!({"from_headers": [{"value_prefix": "P "}]}),
        ),
        at(
            "RequestAuthentication.jwtRules[].fromParams",
            "/spec/jwtRules/0/fromParams",
            json!(["t"]),
            json!({"from_params": ["t"]}),
        ),
        at(
            "RequestAuthentication.jwtRules[].fromCookies",
            "/spec/jwtRules/0/fromCookies",
            json!(["c"]),
            json!({"from_cookies": ["c"]}),
        ),
        at(
            "RequestAuthentication.jwtRules[].outputPayloadToHeader",
            "/spec/jwtRules/0/outputPayloadToHeader",
            json!("x-p"),
            json!({"forward_payload_header": "x-p"}),
        ),
        at(
            "RequestAuthentication.jwtRules[].forwardOriginalToken",
            "/spec/jwtRules/0/forwardOriginalToken",
            json!(true),
            json!({"forward": true}),
        ),
        at(
            "RequestAuthentication.jwtRules[].outputClaimToHeaders[].header",
            "/spec/jwtRules/0/outputClaimToHeaders",
            json!([{"header": "x-c", "claim": "sub"}]),
            json!({"claim_to_headers": [{"header": "x-c"}]}),
        ),
        at(
            "RequestAuthentication.jwtRules[].outputClaimToHeaders[].claim",
            "/spec/jwtRules/0/outputClaimToHeaders",
            json!([{"header": "x-c", "claim": "sub"}]),
            json!({"claim_to_headers": [{"claim": "sub"}]}),
        ),
        at(
            "RequestAuthentication.jwtRules[].timeout",
            "/spec/jwtRules/0/timeout",
            json!("9s"),
            json!({"jwks": {"Remote": {"timeout": {"secs": 9}}}}),
        ),
        at(
            "RequestAuthentication.jwtRules[].spaceDelimitedClaims",
            "/spec/jwtRules/0/spaceDelimitedClaims",
            json!(["roles"]),
            json!({"space_delimited_claims": ["permission", "scope", "roles"]}),
        ),
        refused(
            "RequestAuthentication.jwtRules[].presence",
            &b,
            "/spec/jwtRules/0/presence",
            json!("REQUIRED"),
            "presence REQUIRED is not supported yet",
        ),
        row(
            "RequestAuthentication.targetRef.name",
            &edge,
            "/spec/targetRef",
            target("shop"),
            View::Answer { from: EDGE, request: EDGE_REQUEST, headers: BAD_TOKEN },
            refused_token(),
        )
        .instead_of(target("other")),
        row(
            "RequestAuthentication.targetRefs[]",
            &edge,
            "/spec/targetRefs",
            json!([target("shop")]),
            View::Answer { from: EDGE, request: EDGE_REQUEST, headers: BAD_TOKEN },
            refused_token(),
        )
        .instead_of(json!([target("other")])),
        refused(
            "RequestAuthentication.targetRef.group",
            &edge,
            "/spec/targetRef/group",
            json!("x"),
            "is none of",
        ),
        refused(
            "RequestAuthentication.targetRef.kind",
            &edge,
            "/spec/targetRef",
            json!({"group": "", "kind": "Service", "name": "ratings"}),
            "served by waypoints",
        ),
        refused(
            "RequestAuthentication.targetRef.namespace",
            &edge,
            "/spec/targetRef/namespace",
            json!("other"),
            "resources of its own namespace",
        ),
    ]
}

/// The public key of RFC 7517, appendix A.1.
pub(crate) const KEYS: &str = "{\"keys\":[{\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":\"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4\",\"y\":\"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM\"}]}";
const BAD_TOKEN: &[&str] = &["authorization: Bearer nonsense"];
