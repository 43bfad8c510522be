//! Kinds of the Gateway API.

use super::{accepts, parse, refuses, warns};

const API: &str = "gateway.networking.k8s.io/v1";

#[test]
fn classes_and_gateways() {
    accepts(API, "GatewayClass", &["controllerName: example.com/gateway"]);
    refuses(API, "GatewayClass", &[("{}", "controllerName"), ("controllerName: x", "controllerName")]);
    let listener = |l: &str| format!("gatewayClassName: c\nlisteners: [{{name: a, {l}}}]");
    accepts(
        API,
        "Gateway",
        &[
            &listener("port: 80, protocol: HTTP, hostname: '*.a.com'"),
            &listener(
                "port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: c}]}, allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {a: b}}}}",
            ),
            &listener("port: 443, protocol: TLS, tls: {mode: Passthrough}"),
        ],
    );
    refuses(
        API,
        "Gateway",
        &[
            ("listeners: [{name: a, port: 80, protocol: HTTP}]", "gatewayClassName"),
            ("gatewayClassName: c", "listeners"),
            (&listener("port: 0, protocol: HTTP"), "listeners[0].port"),
            (&listener("port: 80"), "listeners[0].protocol"),
            (&listener("port: 80, protocol: HTTP, tls: {}"), "listeners[0].tls"),
            (&listener("port: 80, protocol: TCP, hostname: a.com"), "listeners[0].hostname"),
            (&listener("port: 80, protocol: HTTP, hostname: 'a.*.com'"), "listeners[0].hostname"),
            (&listener("port: 443, protocol: HTTPS, tls: {mode: Passthrough}"), "listeners[0].tls.mode"),
            (&listener("port: 443, protocol: HTTPS, tls: {}"), "listeners[0].tls.certificateRefs"),
            (&listener("port: 443, protocol: TLS"), "listeners[0].tls.mode"),
            (
                "gatewayClassName: c\nlisteners: [{name: a, port: 80, protocol: HTTP}, {name: a, port: 81, protocol: HTTP}]",
                "listeners[1].name",
            ),
            (
                "gatewayClassName: c\nlisteners: [{name: a, port: 80, protocol: HTTP}, {name: b, port: 80, protocol: HTTP}]",
                "listeners[1]",
            ),
            (&format!("{}\nservers: []", listener("port: 80, protocol: HTTP")), "servers"),
        ],
    );
}

/// Kinds are executed; these fields are not.
#[test]
fn what_is_not_enforced() {
    let listener = |l: &str| format!("gatewayClassName: c\nlisteners: [{{name: a, {l}}}]");
    let plain = listener("port: 80, protocol: HTTP");
    let with = |more: &str| format!("{plain}\n{more}");
    let tls = |t: &str| {
        listener(&format!("port: 443, protocol: HTTPS, tls: {{certificateRefs: [{{name: c}}], {t}}}"))
    };
    let not = "not enforced yet";
    warns(
        API,
        "GatewayClass",
        &[("controllerName: a.b/c\nparametersRef: {group: a, kind: B, name: c}", "parametersRef", not)],
    );
    warns(
        API,
        "Gateway",
        &[
            (&with("infrastructure: {labels: {a: b}}"), "infrastructure", not),
            (&with("allowedListeners: {namespaces: {from: All}}"), "allowedListeners", not),
            (&with("addresses: [{value: 10.0.0.1}]"), "addresses[0].type", not),
            (&plain.replace(": c\n", ": istio-waypoint\n"), "gatewayClassName", not),
            (&listener("port: 53, protocol: UDP"), "listeners[0].protocol", not),
            (&tls("options: {a.b/c: d}"), "listeners[0].tls.options[\"a.b/c\"]", not),
            (
                &tls("frontendValidation: {caCertificateRefs: [{name: a}, {name: b}]}"),
                "listeners[0].tls.frontendValidation.caCertificateRefs[1]",
                not,
            ),
            (
                &with(
                    "tls: {frontend: {default: {validation: {mode: AllowInsecureFallback, caCertificateRefs: [{name: a}]}}}}",
                ),
                "tls.frontend.default.validation.mode",
                not,
            ),
        ],
    );
    let rule = |r: &str| format!("rules: [{{{r}}}]");
    let backend = |f: &str| rule(&format!("backendRefs: [{{name: a, port: 1, filters: [{f}]}}]"));
    warns(
        API,
        "HTTPRoute",
        &[
            (
                &rule("sessionPersistence: {idleTimeout: 5m}"),
                "rules[0].sessionPersistence.idleTimeout",
                "answers 500",
            ),
            (
                &rule("filters: [{type: ExtensionRef, extensionRef: {group: a, kind: B, name: c}}]"),
                "rules[0].filters[0].type",
                "answers 500",
            ),
            (
                &rule("filters: [{type: CORS, cors: {allowCredentials: true, allowHeaders: ['*']}}]"),
                "rules[0].filters[0].cors",
                not,
            ),
            (&backend("{type: URLRewrite, urlRewrite: {}}"), "rules[0].backendRefs[0].filters[0].type", not),
        ],
    );
    warns(
        API,
        "GRPCRoute",
        &[(
            &rule("sessionPersistence: {idleTimeout: 5m}"),
            "rules[0].sessionPersistence.idleTimeout",
            "answers 500",
        )],
    );
    let to = "{backendRefs: [{name: a, port: 1}]}";
    warns(API, "TCPRoute", &[(&format!("rules: [{to}, {to}]"), "rules[1]", "no effect")]);
    warns(API, "UDPRoute", &[(&format!("rules: [{to}]"), "", not)]);
    let policy = |v: &str| {
        format!("targetRefs: [{{group: '', kind: Service, name: a}}]\nvalidation: {{hostname: a.com, {v}}}")
    };
    let system = "wellKnownCACertificates: System";
    let ca = "{group: '', kind: ConfigMap, name: a}";
    warns(
        API,
        "BackendTLSPolicy",
        &[
            (&format!("{}\noptions: {{a: b}}", policy(system)), "options", not),
            (
                &policy("wellKnownCACertificates: a/b"),
                "validation.wellKnownCACertificates",
                "connections fail",
            ),
            (&policy(&format!("caCertificateRefs: [{ca}, {ca}]")), "validation.caCertificateRefs[1]", not),
        ],
    );
    // Nothing else is warned about.
    for (kind, spec) in [
        ("Gateway", plain.as_str()),
        (
            "HTTPRoute",
            "parentRefs: [{name: a}]\nrules: [{timeouts: {request: 1s}, retry: {attempts: 1}, backendRefs: [{name: a, port: 1}]}]",
        ),
        ("GRPCRoute", "rules: [{matches: [{method: {service: a.B}}]}]"),
        ("TLSRoute", "hostnames: [a.com]\nrules: [{backendRefs: [{name: a, port: 1}]}]"),
    ] {
        let p = parse(API, kind, spec);
        assert!(p.report.valid && p.report.warnings.is_empty(), "{kind}: {:#?}", p.report);
    }
}

#[test]
fn http_routes() {
    let rule = |r: &str| format!("parentRefs: [{{name: gw}}]\nrules: [{{{r}}}]");
    accepts(
        API,
        "HTTPRoute",
        &[
            "{}",
            &rule("backendRefs: [{name: a, port: 80, weight: 3}]"),
            &rule(
                "matches: [{path: {type: PathPrefix, value: /a}, method: GET, headers: [{name: x, value: y}]}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]",
            ),
            &rule("filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301}}]"),
            &rule(
                "timeouts: {request: 10s, backendRequest: 2s}, retry: {codes: [503], attempts: 2, backoff: 100ms}",
            ),
            &rule(
                "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 5}}]",
            ),
        ],
    );
    refuses(
        API,
        "HTTPRoute",
        &[
            ("hostnames: [10.0.0.1]", "hostnames[0]"),
            ("parentRefs: [{name: a}, {name: a}]", "parentRefs[1]"),
            ("parentRefs: [{}]", "parentRefs[0].name"),
            (&rule("backendRefs: [{name: a}]"), "rules[0].backendRefs[0].port"),
            (&rule("backendRefs: [{name: a, port: 80, weight: -1}]"), "rules[0].backendRefs[0].weight"),
            (&rule("matches: [{path: {value: a}}]"), "rules[0].matches[0].path.value"),
            (&rule("matches: [{path: {value: /a/../b}}]"), "rules[0].matches[0].path.value"),
            (
                &rule("matches: [{path: {type: RegularExpression, value: '('}}]"),
                "rules[0].matches[0].path.value",
            ),
            (&rule("matches: [{method: get}]"), "rules[0].matches[0].method"),
            (&rule("matches: [{headers: [{name: x}]}]"), "rules[0].matches[0].headers[0].value"),
            (&rule("filters: [{}]"), "rules[0].filters[0].type"),
            (&rule("filters: [{type: URLRewrite}]"), "rules[0].filters[0].urlRewrite"),
            (&rule("filters: [{type: CORS, cors: {}, urlRewrite: {}}]"), "rules[0].filters[0].urlRewrite"),
            (&rule("filters: [{type: CORS, cors: {}}, {type: CORS, cors: {}}]"), "rules[0].filters[1].type"),
            (
                &rule(
                    "filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]",
                ),
                "rules[0].filters",
            ),
            (
                &rule(
                    "filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: a, port: 1}]",
                ),
                "rules[0].backendRefs",
            ),
            (
                &rule(
                    "matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]",
                ),
                "rules[0].matches",
            ),
            (
                &rule("filters: [{type: RequestRedirect, requestRedirect: {statusCode: 200}}]"),
                "rules[0].filters[0].requestRedirect.statusCode",
            ),
            (&rule("timeouts: {request: 1s, backendRequest: 2s}"), "rules[0].timeouts.backendRequest"),
            (&rule("timeouts: {request: 1.5s}"), "rules[0].timeouts.request"),
            (&rule("match: []"), "rules[0].match"),
        ],
    );
}

#[test]
fn other_routes() {
    accepts(
        API,
        "GRPCRoute",
        &["rules: [{matches: [{method: {service: a.B, method: C}}], backendRefs: [{name: a, port: 1}]}]"],
    );
    refuses(
        API,
        "GRPCRoute",
        &[
            ("rules: [{matches: [{method: {type: Exact}}]}]", "rules[0].matches[0].method"),
            ("rules: [{matches: [{method: {service: 'a/b'}}]}]", "rules[0].matches[0].method.service"),
            ("rules: [{filters: [{type: URLRewrite, urlRewrite: {}}]}]", "rules[0].filters[0].type"),
        ],
    );
    accepts(API, "TLSRoute", &["hostnames: [a.com]\nrules: [{backendRefs: [{name: a, port: 1}]}]"]);
    refuses(API, "TLSRoute", &[("rules: [{backendRefs: [{name: a, port: 1}]}]", "hostnames")]);
    for kind in ["TCPRoute", "UDPRoute"] {
        accepts(API, kind, &["rules: [{backendRefs: [{name: a, port: 1}]}]"]);
        refuses(API, kind, &[("{}", "rules"), ("rules: [{}]", "rules[0].backendRefs")]);
    }
    let grant = "from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}]";
    accepts(API, "ReferenceGrant", &[&format!("{grant}\nto: [{{group: '', kind: Service}}]")]);
    refuses(
        API,
        "ReferenceGrant",
        &[(grant, "to"), ("to: [{kind: Service}]\nfrom: [{kind: A}]", "from[0].namespace")],
    );
}

#[test]
fn backend_tls() {
    let policy =
        |v: &str| format!("targetRefs: [{{group: '', kind: Service, name: a}}]\nvalidation: {{{v}}}");
    accepts(
        API,
        "BackendTLSPolicy",
        &[
            &policy("hostname: a.com, wellKnownCACertificates: System"),
            &policy(
                "hostname: a.com, caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}], subjectAltNames: [{type: URI, uri: 'spiffe://a/b'}]",
            ),
        ],
    );
    refuses(
        API,
        "BackendTLSPolicy",
        &[
            (&policy("hostname: a.com"), "validation"),
            (&policy("wellKnownCACertificates: System"), "validation.hostname"),
            (
                &policy(
                    "hostname: a.com, wellKnownCACertificates: System, subjectAltNames: [{type: URI, hostname: a}]",
                ),
                "validation.subjectAltNames[0]",
            ),
            ("validation: {hostname: a.com, wellKnownCACertificates: System}", "targetRefs"),
        ],
    );
}
