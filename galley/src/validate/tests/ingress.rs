//! Kubernetes' Ingress and IngressClass.

use super::{accepts, parse, parse_text, refuses, warns};

const API: &str = "networking.k8s.io/v1";

/// An Ingress with one path.
fn with(path: &str) -> String {
    format!("rules: [{{host: a.example, http: {{paths: [{{{path}}}]}}}}]")
}

const TO: &str = "backend: {service: {name: a, port: {number: 80}}}";

fn of(path: &str, kind: &str) -> String {
    with(&format!("path: '{path}', pathType: {kind}, {TO}"))
}

fn to(backend: &str) -> String {
    with(&format!("path: /, pathType: Prefix, backend: {{{backend}}}"))
}

#[test]
fn what_is_served_is_accepted_without_a_word() {
    let rest = to("service: {name: a, port: {name: http-web}}");
    for spec in [
        of("/", "Prefix"),
        of("/a/b%20", "Exact"),
        of("/a/*", "ImplementationSpecific"),
        of("/a.*", "ImplementationSpecific"),
        with(&format!("pathType: ImplementationSpecific, {TO}")),
        rest.clone(),
        format!(
            "{rest}\ningressClassName: istio\ntls: [{{hosts: [a.example, '*.b.example'], secretName: c}}, {{secretName: d}}]"
        ),
        rest.replace("a.example", "'*.example'"),
        rest.replace("host: a.example, ", ""),
    ] {
        let p = parse(API, "Ingress", &spec);
        assert!(p.report.valid && p.report.warnings.is_empty(), "{spec}\n{:#?}", p.report);
    }
    accepts(API, "Ingress", &["defaultBackend: {service: {name: a, port: {number: 1}}}"]);
    accepts(API, "IngressClass", &["controller: istio.io/ingress-controller"]);
}

#[test]
fn what_kubernetes_refuses_is_refused() {
    let path = "rules[0].http.paths[0].path";
    let at = |field: &str| format!("rules[0].http.paths[0].backend.{field}");
    let host = |h: &str| of("/", "Prefix").replace("a.example", &format!("'{h}'"));
    let tls = |t: &str| format!("{}\ntls: [{{{t}}}]", of("/", "Prefix"));
    let long = format!("{}.example", "a".repeat(260));
    refuses(
        API,
        "Ingress",
        &[
            ("{}", "rules"),
            ("ingressClassName: a", "rules"),
            (&format!("{}\ningressClassName: 'A b'", of("/", "Prefix")), "ingressClassName"),
            ("rules: [{host: a.example, http: {paths: []}}]", "rules[0].http.paths"),
            (&host("10.0.0.1"), "rules[0].host"),
            (&host("::1"), "rules[0].host"),
            (&host("a.example:80"), "rules[0].host"),
            (&host("A.example"), "rules[0].host"),
            (&host("*"), "rules[0].host"),
            (&host("*example"), "rules[0].host"),
            (&host("a.*.example"), "rules[0].host"),
            (&host("*.*.example"), "rules[0].host"),
            (&host(&long), "rules[0].host"),
            (&of("a", "Prefix"), path),
            (&of("", "Exact"), path),
            (&of("a", "ImplementationSpecific"), path),
            (&of("/a//b", "Prefix"), path),
            (&of("/a/./b", "Exact"), path),
            (&of("/a/../b", "Exact"), path),
            (&of("/a%2fb", "Exact"), path),
            (&of("/a%2Fb", "Exact"), path),
            (&of("/a/..", "Prefix"), path),
            (&of("/a/.", "Prefix"), path),
            (&of("/", "Regex"), "rules[0].http.paths[0].pathType"),
            (&with(&format!("path: /, {TO}")), "rules[0].http.paths[0].pathType"),
            (&with("path: /, pathType: Prefix"), &at("service")),
            (&to("service: {port: {number: 1}}"), &at("service.name")),
            (&to("service: {name: a.b, port: {number: 1}}"), &at("service.name")),
            (&to("service: {name: a}"), &at("service.port")),
            (&to("service: {name: a, port: {number: 1, name: b}}"), &at("service.port")),
            (&to("service: {name: a, port: {number: 70000}}"), &at("service.port.number")),
            (&to("service: {name: a, port: {number: -1}}"), &at("service.port.number")),
            (&to("service: {name: a, port: {name: '80'}}"), &at("service.port.name")),
            (&to("service: {name: a, port: {name: a--b}}"), &at("service.port.name")),
            (&to("service: {name: a, port: {name: abcdefghijklmnop}}"), &at("service.port.name")),
            (
                &to("service: {name: a, port: {number: 1}}, resource: {kind: A, name: b}"),
                "rules[0].http.paths[0].backend",
            ),
            (&to("resource: {name: b}"), &at("resource.kind")),
            (&to("resource: {kind: A}"), &at("resource.name")),
            (&to("resource: {kind: A, name: b/c}"), &at("resource.name")),
            (&to("resource: {apiGroup: 'A b', kind: A, name: b}"), &at("resource.apiGroup")),
            ("defaultBackend: {service: {name: a}}", "defaultBackend.service.port"),
            (&tls("hosts: ['*'], secretName: a"), "tls[0].hosts[0]"),
            (&tls("hosts: [a, A], secretName: a"), "tls[0].hosts[1]"),
            (&tls("secretName: a_b"), "tls[0].secretName"),
            (&tls("secretname: a"), "tls[0].secretname"),
            (&format!("{}\nbackend: {{}}", of("/", "Prefix")), "backend"),
        ],
    );
    let with = |p: &str| format!("controller: a.example/b\nparameters: {{{p}}}");
    refuses(
        API,
        "IngressClass",
        &[
            ("{}", "controller"),
            ("controller: nginx", "controller"),
            ("controller: a.example/", "controller"),
            ("controller: a.example/b c", "controller"),
            (&format!("controller: a.example/{}", "b".repeat(250)), "controller"),
            (&with("name: a, scope: Cluster"), "parameters.kind"),
            (&with("kind: A, scope: Cluster"), "parameters.name"),
            (&with("kind: A, name: a"), "parameters.scope"),
            (&with("kind: A, name: a, scope: All"), "parameters.scope"),
            (&with("kind: A, name: a, scope: Namespace"), "parameters.namespace"),
            (&with("kind: A, name: a, scope: Cluster, namespace: b"), "parameters.namespace"),
            (&with("kind: A, name: a, scope: Namespace, namespace: a.b"), "parameters.namespace"),
            (&with("apiGroup: '', kind: A, name: a, scope: Cluster"), "parameters.apiGroup"),
        ],
    );
}

#[test]
fn annotation_and_class_agree() {
    let text = |annotation: &str| {
        format!(
            "apiVersion: {API}\nkind: Ingress\nmetadata:\n  name: a\n  annotations:\n    kubernetes.io/ingress.class: {annotation}\nspec:\n  ingressClassName: istio\n  {}\n",
            of("/", "Prefix")
        )
    };
    assert!(parse_text(&text("istio")).report.valid);
    let p = parse_text(&text("nginx"));
    let path = "metadata.annotations[\"kubernetes.io/ingress.class\"]";
    assert!(p.report.errors.iter().any(|e| e.path == path && e.line == 6), "{:#?}", p.report);
}

#[test]
fn what_nobody_serves_is_said() {
    let path = "rules[0].http.paths[0]";
    warns(
        API,
        "Ingress",
        &[
            (&to("resource: {kind: A, name: b}"), &format!("{path}.backend.resource"), "not supported"),
            ("defaultBackend: {service: {name: a, port: {number: 1}}}", "defaultBackend", "not served"),
            ("rules: [{host: a.example}]", "rules[0].http", "nothing is served"),
            (
                &format!("{}\ntls: [{{hosts: [a.example]}}]", of("/", "Prefix")),
                "tls[0].secretName",
                "not served",
            ),
            (&of("/a*", "ImplementationSpecific"), &format!("{path}.path"), "by the letter"),
            (
                &of("/", "Prefix").replace("a.example", "shop"),
                "rules[0].host",
                "shop.books.svc.cluster.local",
            ),
        ],
    );
    warns(
        API,
        "IngressClass",
        &[(
            "controller: a.example/b\nparameters: {kind: A, name: a, scope: Cluster}",
            "parameters",
            "without effect",
        )],
    );
}
