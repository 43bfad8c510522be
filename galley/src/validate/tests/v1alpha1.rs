//! Kinds of release 1.0: authentication.istio.io and rbac.istio.io.

use super::{accepts, refuses, warns};
use crate::document::{Parsed, parse_file};

const AUTHN: &str = "authentication.istio.io/v1alpha1";
const RBAC: &str = "rbac.istio.io/v1alpha1";

/// A document of a name of its own.
fn named(api: &str, kind: &str, name: &str, spec: &str) -> Parsed {
    let text = format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n");
    parse_file("a.yaml", &std::sync::Arc::new(text.as_bytes().to_vec()), "default").pop().unwrap()
}

#[track_caller]
fn error_at(p: &Parsed, path: &str, line: u32) {
    assert!(
        !p.report.valid && p.report.errors.iter().any(|e| e.path == path && e.line == line),
        "expected an error at {path}, line {line}: {:#?}",
        p.report
    );
}

#[test]
fn policies() {
    let target = "targets: [{name: a}]\n";
    let with = |s: &str| format!("{target}{s}");
    let jwt = |s: &str| format!("{target}origins: [{{jwt: {{issuer: i, jwksUri: 'https://i/k', {s}}}}}]");
    accepts(
        AUTHN,
        "Policy",
        &[
            target,
            "targets: [{name: a, ports: [{number: 80}, {name: http}]}]",
            // As the tasks of release 1.0 write it.
            &with("peers:\n- mtls:"),
            &with("peers: [{mtls: {mode: PERMISSIVE}}]\npeerIsOptional: true"),
            &jwt(
                "audiences: [a], jwtHeaders: [x], jwtParams: [p], triggerRules: [{excludedPaths: [{exact: /h}]}]",
            ),
            &jwt("trigger_rules: [{excluded_paths: [{prefix: /h}], included_paths: [{regex: '/a.*'}]}]"),
            &with(
                "origins: [{jwt: {issuer: i, jwks_uri: 'http://i'}}]\nprincipalBinding: USE_ORIGIN\noriginIsOptional: true",
            ),
        ],
    );
    refuses(
        AUTHN,
        "Policy",
        &[
            ("peers: [{mtls: {}}]", "targets"),
            ("targets: [{name: a.b}]", "targets[0].name"),
            ("targets: [{name: ''}]", "targets[0].name"),
            ("targets: [{name: a, ports: [{}]}]", "targets[0].ports[0]"),
            ("targets: [{name: a, ports: [{number: 1, name: b}]}]", "targets[0].ports[0]"),
            ("targets: [{name: a, ports: [{number: 0}]}]", "targets[0].ports[0].number"),
            ("targets: [{name: a, ports: [{name: 'b c'}]}]", "targets[0].ports[0].name"),
            (&with("origins: [{jwt: {jwksUri: 'https://i/k'}}]"), "origins[0].jwt.issuer"),
            (&with("origins: [{}]"), "origins[0].jwt"),
            (
                &with(
                    "origins: [{jwt: {issuer: i, jwksUri: 'https://i/k'}}, {jwt: {issuer: i, jwksUri: 'https://i/l'}}]",
                ),
                "origins[1].jwt.issuer",
            ),
            (&jwt("audiences: ['']"), "origins[0].jwt.audiences[0]"),
            (&jwt("jwtHeaders: ['']"), "origins[0].jwt.jwtHeaders[0]"),
            (&jwt("jwtParams: ['']"), "origins[0].jwt.jwtParams[0]"),
            (
                &jwt("triggerRules: [{excludedPaths: [{}]}]"),
                "origins[0].jwt.triggerRules[0].excludedPaths[0]",
            ),
            (
                &jwt("triggerRules: [{includedPaths: [{regex: '('}]}]"),
                "origins[0].jwt.triggerRules[0].includedPaths[0].regex",
            ),
            // An expression needs the one simple form.
            (
                &jwt("triggerRules: [{excludedPaths: [{regex: '/a.*'}]}, {includedPaths: [{exact: /b}]}]"),
                "origins",
            ),
            (&with("origins: [{jwt: {issuer: i, jwksUri: 'ftp://i'}}]"), "origins[0].jwt.jwksUri"),
            (&with("origins: [{jwt: {issuer: i, jwksUri: 'https:///k'}}]"), "origins[0].jwt.jwksUri"),
            (&with("origins: [{jwt: {issuer: i, jwks: '{}'}}]"), "origins[0].jwt.jwks"),
            (&with("peers: [{jwt: {issuer: i}}]"), "peers[0].jwt"),
            (&with("peers: [{mtls: {mode: DISABLE}}]"), "peers[0].mtls.mode"),
        ],
    );
    warns(
        AUTHN,
        "Policy",
        &[(&with("origins: [{jwt: {issuer: i}}]"), "origins[0].jwt", "no token is valid")],
    );
    error_at(&named(AUTHN, "Policy", "default", "{targets: [{name: a}]}"), "spec.targets", 4);
    assert!(named(AUTHN, "Policy", "default", "{peers: [{mtls: {}}]}").report.valid);
    let allowing = named(AUTHN, "Policy", "default", "{peers: [{mtls: {allowTls: true}}]}").report;
    // Nothing but that its kind is an old one.
    assert!(allowing.valid && allowing.warnings.iter().all(|w| w.path == "spec"), "{allowing:?}");
    error_at(&named(AUTHN, "MeshPolicy", "default", "{targets: [{name: a}]}"), "spec.targets", 4);
    error_at(&named(AUTHN, "MeshPolicy", "other", "{peers: [{mtls: {}}]}"), "metadata.name", 3);
    assert!(named(AUTHN, "MeshPolicy", "default", "{peers: [{mtls: {}}]}").report.valid);
}

#[test]
fn roles() {
    accepts(
        RBAC,
        "ServiceRole",
        &[
            "rules: [{services: ['*'], methods: [GET]}]",
            "rules: [{services: [a.b.svc.cluster.local], methods: ['*'], paths: ['/a*', '*.css'], constraints: [{key: 'destination.labels[v]', values: [v1]}]}]",
            "rules: [{services: ['*'], methods: [GET], hosts: [a], notHosts: [b], notPaths: [/x], notMethods: [PUT], ports: [80], not_ports: [81], constraints: [{key: 'request.headers[a]', values: ['*']}, {key: destination.port, values: ['0']}, {key: destination.ip, values: [10.0.0.0/8]}]}]",
        ],
    );
    let constraint = |c: &str| format!("rules: [{{services: ['*'], methods: ['*'], constraints: [{c}]}}]");
    let at = "rules[0].constraints[0]";
    refuses(
        RBAC,
        "ServiceRole",
        &[
            ("{}", "rules"),
            ("rules: [{methods: [GET]}]", "rules[0].services"),
            ("rules: [{services: ['*']}]", "rules[0].methods"),
            ("rules: [{services: [''], methods: [GET]}]", "rules[0].services[0]"),
            ("rules: [{services: ['a*b'], methods: [GET]}]", "rules[0].services[0]"),
            ("rules: [{services: ['*'], methods: [GET], ports: [0]}]", "rules[0].ports[0]"),
            (&constraint("{values: [a]}"), &format!("{at}.key")),
            (&constraint("{key: destination.name}"), &format!("{at}.values")),
            // Without it the rule would allow more than its author wrote.
            (&constraint("{key: request.size, values: ['1']}"), &format!("{at}.key")),
            (&constraint("{key: 'experimental.envoy.filters.a[b]', values: ['[c]']}"), &format!("{at}.key")),
            (&constraint("{key: 'request.headers[]', values: ['1']}"), &format!("{at}.key")),
            (&constraint("{key: destination.ip, values: [a]}"), &format!("{at}.values[0]")),
            (&constraint("{key: destination.port, values: ['70000']}"), &format!("{at}.values[0]")),
        ],
    );
    let role = "roleRef: {kind: ServiceRole, name: r}";
    let subject = |s: &str| format!("subjects: [{s}]\n{role}");
    accepts(
        RBAC,
        "ServiceRoleBinding",
        &[
            &subject("{user: '*'}"),
            &subject(
                "{properties: {source.namespace: a, 'request.headers[x]': y, 'request.auth.claims[g]': z}}",
            ),
            &subject(
                "{group: g}, {names: [a], notNames: [b], groups: [c], notGroups: [d], namespaces: [e], notNamespaces: [f], ips: [10.0.0.1], notIps: [10.0.0.0/8]}",
            ),
            "mode: PERMISSIVE\nsubjects: [{user: a}]\nrole_ref: {kind: ServiceRole, name: r}",
        ],
    );
    refuses(
        RBAC,
        "ServiceRoleBinding",
        &[
            (role, "subjects"),
            (&subject("{}"), "subjects[0]"),
            (&subject("{properties: {}}"), "subjects[0]"),
            (&subject("{properties: {source.color: red}}"), "subjects[0].properties[\"source.color\"]"),
            (&subject("{properties: {source.ip: red}}"), "subjects[0].properties[\"source.ip\"]"),
            (&subject("{ips: [a]}"), "subjects[0].ips[0]"),
            ("subjects: [{user: a}]", "roleRef"),
            ("subjects: [{user: a}]\nroleRef: {kind: Role, name: r}", "roleRef.kind"),
            ("subjects: [{user: a}]\nroleRef: {kind: ServiceRole}", "roleRef.name"),
        ],
    );
    for kind in ["RbacConfig", "ClusterRbacConfig"] {
        for ok in [
            "{mode: 'ON'}",
            "{mode: ON_WITH_INCLUSION, inclusion: {namespaces: [a]}}",
            "{mode: ON_WITH_EXCLUSION, exclusion: {services: [a.b]}, enforcementMode: PERMISSIVE}",
        ] {
            let p = named(RBAC, kind, "default", ok);
            assert!(p.report.valid, "{:?}", p.report);
        }
        error_at(&named(RBAC, kind, "other", "{mode: 'ON'}"), "metadata.name", 3);
        error_at(&named(RBAC, kind, "default", "{mode: ON_WITH_INCLUSION}"), "spec.inclusion", 4);
        error_at(&named(RBAC, kind, "default", "{mode: ON_WITH_EXCLUSION}"), "spec.exclusion", 4);
    }
}
