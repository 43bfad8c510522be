//! Kinds of security, telemetry and extensions, EnvoyFilter and ProxyConfig.

use super::{accepts, refuses, warns};

const SEC: &str = "security.istio.io/v1";

#[test]
fn authentication() {
    accepts(
        SEC,
        "PeerAuthentication",
        &[
            "mtls: {mode: STRICT}",
            "selector: {matchLabels: {app: a}}\nportLevelMtls: {8080: {mode: DISABLE}}",
        ],
    );
    refuses(
        SEC,
        "PeerAuthentication",
        &[
            ("portLevelMtls: {80: {}}", "portLevelMtls"),
            ("selector: {matchLabels: {app: a}}\nportLevelMtls: {}", "portLevelMtls"),
            ("selector: {matchLabels: {app: a}}\nportLevelMtls: {70000: {}}", "portLevelMtls.70000"),
            ("selector: {matchLabels: {app: '*'}}", "selector.matchLabels.app"),
            ("mtls: {mode: ON}", "mtls.mode"),
        ],
    );
    warns(SEC, "PeerAuthentication", &[("selector: {}", "selector", "without labels")]);
    let rule = |r: &str| format!("jwtRules: [{{issuer: a, jwksUri: 'https://a/keys', {r}}}]");
    accepts(
        SEC,
        "RequestAuthentication",
        &[
            "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: a}]",
            &rule("audiences: [a], fromHeaders: [{name: x}], fromCookies: [c], timeout: 5s"),
            "selector: {matchLabels: {a: b}}",
            "jwtRules: [{issuer: 'https://a'}]",
        ],
    );
    warns(SEC, "RequestAuthentication", &[("jwtRules: [{issuer: a}]", "jwtRules[0]", "no token is valid")]);
    refuses(
        SEC,
        "RequestAuthentication",
        &[
            ("jwtRules: [{}]", "jwtRules[0]"),
            ("jwtRules: [{issuer: a, jwksUri: 'ftp://a'}]", "jwtRules[0].jwksUri"),
            ("jwtRules: [{issuer: a, jwks: '{}'}]", "jwtRules[0].jwks"),
            (&rule("audiences: ['']"), "jwtRules[0].audiences[0]"),
            (&rule("fromHeaders: [{}]"), "jwtRules[0].fromHeaders[0].name"),
            (&rule("fromParams: ['']"), "jwtRules[0].fromParams[0]"),
            (&rule("fromCookies: ['']"), "jwtRules[0].fromCookies[0]"),
            (&rule("outputClaimToHeaders: [{header: x}]"), "jwtRules[0].outputClaimToHeaders[0].claim"),
            (
                &rule("outputClaimToHeaders: [{header: 'x!', claim: y}]"),
                "jwtRules[0].outputClaimToHeaders[0].header",
            ),
            (&rule("timeout: 0s"), "jwtRules[0].timeout"),
            (&rule("presence: REQUIRED"), "jwtRules[0].presence"),
            ("targetRefs: [{kind: Gateway, name: a}]", "targetRefs[0].kind"),
            ("targetRef: {group: gateway.networking.k8s.io, kind: Gateway}", "targetRef.name"),
            // Of waypoints.
            (
                "targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: a}]",
                "targetRefs[0].kind",
            ),
            ("targetRefs: [{kind: Service, name: a}]", "targetRefs[0].kind"),
            ("targetRef: {group: networking.istio.io, kind: ServiceEntry, name: a}", "targetRef.kind"),
        ],
    );
    let private =
        r#"jwtRules: [{issuer: a, jwks: '{"keys": [{"kty": "RSA", "n": "x", "e": "AQAB", "d": "y"}]}'}]"#;
    warns(SEC, "RequestAuthentication", &[(private, "jwtRules[0].jwks", "private key")]);
}

#[test]
fn authorization() {
    accepts(
        SEC,
        "AuthorizationPolicy",
        &[
            "{}",
            "rules: [{}]",
            "action: DENY\nrules: [{to: [{operation: {ports: ['80'], paths: ['/a/{*}/b/{**}', '/{**}/a/']}}]}]",
            "rules: [{from: [{source: {serviceAccounts: [ns/sa, sa]}}], when: [{key: 'request.auth.claims[a][b]', values: [c]}]}]",
            "rules: [{from: [{source: {ipBlocks: [10.0.0.0/8], trustDomains: ['a.b']}}]}]",
        ],
    );
    let from = |s: &str| format!("rules: [{{from: [{{source: {{{s}}}}}]}}]");
    let to = |s: &str| format!("rules: [{{to: [{{operation: {{{s}}}}}]}}]");
    let when = |s: &str| format!("rules: [{{when: [{{{s}}}]}}]");
    refuses(
        SEC,
        "AuthorizationPolicy",
        &[
            ("action: DENY", "rules"),
            ("provider: {name: a}", "provider"),
            ("rules: [{from: []}]", "rules[0].from"),
            ("rules: [{to: [{}]}]", "rules[0].to[0].operation"),
            (&from(""), "rules[0].from[0].source"),
            (&from("principals: ['']"), "rules[0].from[0].source.principals[0]"),
            (&from("ipBlocks: [10.0.0.0/33]"), "rules[0].from[0].source.ipBlocks[0]"),
            (&from("serviceAccounts: ['a/*']"), "rules[0].from[0].source.serviceAccounts[0]"),
            (&from("serviceAccounts: ['/a']"), "rules[0].from[0].source.serviceAccounts[0]"),
            (&from("serviceAccounts: [a], namespaces: [b]"), "rules[0].from[0].source"),
            (&from("trustDomains: ['a/b']"), "rules[0].from[0].source.trustDomains[0]"),
            (&to("ports: ['70000']"), "rules[0].to[0].operation.ports[0]"),
            (&to("paths: ['/{**}/a/{*}']"), "rules[0].to[0].operation.paths[0]"),
            (&to("paths: ['/a b/{*}']"), "rules[0].to[0].operation.paths[0]"),
            (&to("paths: ['/a//{*}']"), "rules[0].to[0].operation.paths[0]"),
            (&to("notPaths: ['/{id}']"), "rules[0].to[0].operation.notPaths[0]"),
            (&when("key: source.ip"), "rules[0].when[0]"),
            (&when("key: source.ip, values: [x]"), "rules[0].when[0].values[0]"),
            (&when("values: [x]"), "rules[0].when[0].key"),
            (&when("key: 'destination.labels[a]', values: [x]"), "rules[0].when[0].key"),
            (&when("key: 'request.headers[a', values: [x]"), "rules[0].when[0].key"),
            (&when("key: some.thing, values: [x]"), "rules[0].when[0].key"),
            (
                "action: CUSTOM\nprovider: {name: a}\nrules: [{from: [{source: {principals: [a]}}]}]",
                "rules[0].from[0].source.principals",
            ),
            (
                "action: CUSTOM\nprovider: {name: a}\nrules: [{when: [{key: source.principal, values: [a]}]}]",
                "rules[0].when[0].key",
            ),
            ("action: CUSTOM\nrules: [{}]", "provider"),
        ],
    );
    warns(
        SEC,
        "AuthorizationPolicy",
        &[
            ("action: DENY\nrules: [{to: [{operation: {methods: [GET]}}]}]", "rules[0]", "TCP"),
            ("action: DENY\nrules: [{from: [{source: {requestPrincipals: ['*']}}]}]", "rules[0]", "TCP"),
        ],
    );
    let dry = |action: &str, value: &str| {
        let text = format!(
            "apiVersion: {SEC}\nkind: AuthorizationPolicy\nmetadata: {{name: a, annotations: {{istio.io/dry-run: '{value}'}}}}\nspec: {{action: {action}, rules: [{{}}]}}\n"
        );
        crate::document::parse_file("t", &std::sync::Arc::new(text.as_bytes().to_vec()), "default")
            .remove(0)
            .report
    };
    assert!(dry("DENY", "true").valid);
    let path = r#"metadata.annotations["istio.io/dry-run"]"#;
    assert_eq!(dry("DENY", "yes").errors[0].path, path);
    assert_eq!(dry("AUDIT", "true").errors[0].path, path);
}

#[test]
fn envoy_filters() {
    let api = "networking.istio.io/v1alpha3";
    let patch = |p: &str| format!("configPatches: [{{{p}}}]");
    let merge = "patch: {operation: MERGE, value: {a: 1}}";
    accepts(
        api,
        "EnvoyFilter",
        &[
            "{}",
            "workloadSelector: {labels: {app: a}}\npriority: -1",
            &patch(&format!(
                "applyTo: CLUSTER, match: {{cluster: {{service: a.b}}, proxy: {{proxyVersion: '^1\\.2'}}}}, {merge}"
            )),
            &patch(
                "applyTo: HTTP_FILTER, match: {context: SIDECAR_INBOUND, listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager, subFilter: {name: envoy.filters.http.router}}}}}, patch: {operation: INSERT_BEFORE, value: {name: x}}",
            ),
            &patch(
                "applyTo: VIRTUAL_HOST, match: {routeConfiguration: {vhost: {name: a, route: {action: ANY}}}}, patch: {operation: REMOVE}",
            ),
        ],
    );
    refuses(
        api,
        "EnvoyFilter",
        &[
            (&patch(merge), "configPatches[0].applyTo"),
            (&patch("applyTo: CLUSTER"), "configPatches[0].patch"),
            (&patch("applyTo: CLUSTER, patch: {value: {}}"), "configPatches[0].patch.operation"),
            (&patch("applyTo: CLUSTER, patch: {operation: ADD}"), "configPatches[0].patch.value"),
            (
                &patch(&format!("applyTo: CLUSTER, match: {{listener: {{}}}}, {merge}")),
                "configPatches[0].match.listener",
            ),
            (
                &patch(&format!("applyTo: LISTENER, match: {{cluster: {{}}}}, {merge}")),
                "configPatches[0].match.cluster",
            ),
            (
                &patch(&format!("applyTo: HTTP_ROUTE, match: {{listener: {{}}}}, {merge}")),
                "configPatches[0].match.listener",
            ),
            (
                &patch(&format!("applyTo: CLUSTER, match: {{proxy: {{proxyVersion: '('}}}}, {merge}")),
                "configPatches[0].match.proxy.proxyVersion",
            ),
            (
                &patch(&format!(
                    "applyTo: NETWORK_FILTER, match: {{listener: {{filterChain: {{filter: {{}}}}}}}}, {merge}"
                )),
                "configPatches[0].match.listener.filterChain.filter.name",
            ),
            (
                &patch(&format!(
                    "applyTo: NETWORK_FILTER, match: {{listener: {{filterChain: {{filter: {{name: a, subFilter: {{name: b}}}}}}}}}}, {merge}"
                )),
                "configPatches[0].match.listener.filterChain.filter.subFilter",
            ),
            ("workloadSelector: {labels: {app: '*'}}", "workloadSelector.labels.app"),
            ("filters: []", "filters"),
            (
                &patch(&format!("applyTo: CLUSTER, match: {{context: GATEWAY, waypoint: {{}}}}, {merge}")),
                "configPatches[0].match",
            ),
        ],
    );
    let boot = patch("applyTo: BOOTSTRAP, patch: {operation: MERGE, value: {}}");
    let waypoint = patch(&format!("applyTo: CLUSTER, match: {{context: WAYPOINT, waypoint: {{}}}}, {merge}"));
    let named = patch(&format!("applyTo: LISTENER, match: {{listener: {{portName: http}}}}, {merge}"));
    warns(
        api,
        "EnvoyFilter",
        &[
            (&boot, "configPatches[0].applyTo", "without effect"),
            (&waypoint, "configPatches[0].match", "not enforced yet"),
            (&named, "configPatches[0].match.listener.portName", "without effect"),
        ],
    );
}

#[test]
fn telemetry_and_settings() {
    let api = "telemetry.istio.io/v1";
    accepts(
        api,
        "Telemetry",
        &[
            "accessLogging: [{providers: [{name: envoy}], filter: {expression: 'response.code >= 400'}}]",
            "tracing: [{providers: [{name: otel}], randomSamplingPercentage: 10, customTags: {a: {literal: {value: b}}, c: {header: {name: d, defaultValue: e}}}}]",
            "metrics: [{providers: [{name: prometheus}], reportingInterval: 5s, overrides: [{match: {metric: REQUEST_COUNT, mode: SERVER}, tagOverrides: {a: {operation: REMOVE}, b: {value: c}}}]}]",
        ],
    );
    refuses(
        api,
        "Telemetry",
        &[
            ("accessLogging: [{providers: [{}]}]", "accessLogging[0].providers[0].name"),
            ("tracing: [{randomSamplingPercentage: 101}]", "tracing[0].randomSamplingPercentage"),
            ("tracing: [{customTags: {a: {literal: {}}}}]", "tracing[0].customTags.a.literal.value"),
            ("tracing: [{customTags: {a: {header: {}}}}]", "tracing[0].customTags.a.header.name"),
            (
                "metrics: [{overrides: [{tagOverrides: {a: {}}}]}]",
                "metrics[0].overrides[0].tagOverrides.a.value",
            ),
            (
                "metrics: [{overrides: [{tagOverrides: {a: {operation: REMOVE, value: x}}}]}]",
                "metrics[0].overrides[0].tagOverrides.a.value",
            ),
            ("metrics: [{reportingInterval: 0s}]", "metrics[0].reportingInterval"),
            (
                "metrics: [{overrides: [{match: {customMetric: ''}}]}]",
                "metrics[0].overrides[0].match.customMetric",
            ),
            ("selector: {matchLabels: {a: b}}\ntargetRefs: [{kind: Service, name: a}]", ""),
        ],
    );
    warns(api, "Telemetry", &[("tracing: [{}, {}]", "tracing", "first"), ("{}", "", "not enforced yet")]);
    let api = "networking.istio.io/v1beta1";
    accepts(api, "ProxyConfig", &["concurrency: 0\nimage: {imageType: debug}\nenvironmentVariables: {A: b}"]);
    warns(
        api,
        "ProxyConfig",
        &[
            ("image: {imageType: debug}", "image", "nobody injects"),
            ("environmentVariables: {A: b}", "environmentVariables", "not enforced yet"),
        ],
    );
    refuses(api, "ProxyConfig", &[("concurrency: -1", "concurrency"), ("concurency: 1", "concurency")]);
}

#[test]
fn extensions() {
    let api = "extensions.istio.io/v1alpha1";
    let sha = "0123456789abcdef".repeat(4);
    accepts(
        api,
        "WasmPlugin",
        &[
            "url: 'oci://a/b:v1'\nphase: AUTHN\nimagePullPolicy: IfNotPresent\nfailStrategy: FAIL_OPEN\npluginConfig: {a: [1]}",
            &format!("url: a/b:v1\nsha256: {sha}\nmatch: [{{mode: SERVER, ports: [{{number: 80}}]}}]"),
        ],
    );
    refuses(
        api,
        "WasmPlugin",
        &[
            ("{}", "url"),
            ("url: 'ftp://a'", "url"),
            ("url: a\nsha256: abc", "sha256"),
            ("url: a\nmatch: [{ports: [{number: 0}]}]", "match[0].ports[0].number"),
            ("url: a\nvmConfig: {env: [{name: a}, {name: a}]}", "vmConfig.env[1].name"),
            ("url: a\nvmConfig: {env: [{name: a, valueFrom: HOST, value: b}]}", "vmConfig.env[0].value"),
        ],
    );
    accepts(api, "TrafficExtension", &["lua: {inlineCode: 'x = 1'}", "wasm: {url: a}\nphase: AUTHZ"]);
    refuses(
        api,
        "TrafficExtension",
        &[("{}", ""), ("lua: {inlineCode: ''}", "lua.inlineCode"), ("wasm: {}", "wasm.url")],
    );
}
