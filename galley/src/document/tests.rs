//! One row per rule: a document, and where and why it is rejected (or that it is not).

use super::{metadata::parse_rfc3339, *};

fn parse(text: &str) -> Vec<Parsed> {
    parse_file("test.yaml", &Arc::new(text.as_bytes().to_vec()), "default")
}

fn only(text: &str) -> Parsed {
    let mut all = parse(text);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.pop().unwrap()
}

/// A document of `kind` whose spec starts in line 5.
fn doc(api: &str, kind: &str, spec: &str) -> String {
    let spec: String = spec.lines().map(|l| format!("  {l}\n")).collect();
    format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: x, namespace: books}}\nspec:\n{spec}")
}

fn net(kind: &str, spec: &str) -> String {
    doc("networking.istio.io/v1", kind, spec)
}

#[track_caller]
fn accepted(text: &str) -> Parsed {
    let p = only(text);
    assert!(p.report.valid, "{:#?}", p.report.errors);
    assert!(p.document.is_some());
    p
}

#[track_caller]
fn rejected(text: &str, path: &str, line: u32, message: &str) {
    let p = only(text);
    assert!(!p.report.valid, "was accepted:\n{text}");
    assert!(p.document.is_none());
    let found = p
        .report
        .errors
        .iter()
        .any(|e| e.path == path && (line == 0 || e.line == line) && e.message.contains(message));
    assert!(found, "expected {path}:{line}: {message}, got {:#?}", p.report.errors);
}

#[track_caller]
fn warned(text: &str, path: &str, message: &str) {
    let p = accepted(text);
    let found = p.report.warnings.iter().any(|e| e.path == path && e.message.contains(message));
    assert!(found, "expected {path}: {message}, got {:#?}", p.report.warnings);
}

#[test]
fn a_syntax_error_rejects_one_document_of_a_file_by_name() {
    let text = "# a comment\n---\napiVersion: v1\nkind: Service\nmetadata:\n  name: a\nspec: {ports: [{port: 80}]}\n\
                ---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: bad\n  namespace: books\nspec: [\n\
                --- # third\napiVersion: v1\nkind: Service\nmetadata: {name: c}\nspec: {ports: [{port: 0}]}\n";
    let all = parse(text);
    assert_eq!(all.len(), 3);
    assert!(all[0].report.valid);
    assert_eq!(all[0].report.namespace, "default");
    assert_eq!(all[1].report.subject(), "VirtualService books/bad");
    assert_eq!(all[1].key.as_ref().unwrap().to_string(), "VirtualService books/bad");
    assert!(all[1].report.errors[0].line >= 14, "{:?}", all[1].report.errors);
    assert_eq!(all[2].report.errors[0].path, "spec.ports[0].port");
    assert_eq!(all[2].report.errors[0].line, 19);
    assert_eq!(all.iter().map(|p| p.report.document).collect::<Vec<_>>(), [1, 2, 3]);
}

#[test]
fn json_lists_and_directives() {
    let json = r#"{"apiVersion": "v1", "kind": "List", "items": [
      {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}]}},
      {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}, "spec": {"ports": [{"port": 70000}]}}
    ]}"#;
    let all = parse(json);
    assert_eq!(all.len(), 2);
    assert!(all[0].report.valid);
    assert_eq!(all[1].report.errors[0].path, "items[1].spec.ports[0].port");
    assert_eq!(all[1].report.errors[0].line, 3);
    assert_eq!(parse("%YAML 1.2\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n").len(), 1);
    assert_eq!(parse("---\n---\n# nothing\n---\n").len(), 0);
    assert_eq!(parse("").len(), 0);
}

#[test]
fn the_envelope() {
    rejected("apiVersion: v1\nkind: Service\n", "metadata", 0, "required");
    rejected(
        "apiVersion: v1\nkind: Service\nmetadata: {name: A_b}\nspec: {ports: [{port: 1}]}\n",
        "metadata.name",
        3,
        "is not a name",
    );
    rejected("kind: Service\nmetadata: {name: a}\n", "apiVersion", 0, "required");
    rejected(
        "apiVersion: v1\nkind: Service\nmetadata: {name: a, nmespace: b}\nspec: {}\n",
        "metadata.nmespace",
        3,
        "did you mean `namespace`",
    );
    rejected("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspecs: {}\n", "specs", 4, "unknown field");
    rejected(
        "apiVersion: networking.istio.io/v1\nkind: EnvoyFilter\nmetadata: {name: a}\n",
        "kind",
        2,
        "unsupported version \"v1\" of EnvoyFilter: supported are v1alpha3",
    );
    rejected(
        "apiVersion: networking.istio.io/v2\nkind: Gateway\nmetadata: {name: a}\n",
        "kind",
        0,
        "unsupported version \"v2\"",
    );
    rejected("apiVersion: v1\nkind: Servce\nmetadata: {name: a}\n", "kind", 0, "unsupported kind");
    for (api, kind, instead) in [
        ("rbac.istio.io/v1", "ServiceRole", "supported are v1alpha1"),
        ("networking.k8s.io/v1beta1", "Ingress", "supported are v1"),
        ("extensions/v1beta1", "Ingress", "did you mean networking.k8s.io/v1?"),
        ("networking.k8s.io/v1beta1", "IngressClass", "supported are v1"),
    ] {
        rejected(&format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: a}}\n"), "kind", 2, instead);
    }
    rejected("- a\n", "", 1, "expected a mapping");
    let deployment = only("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec: {x: 1}\n");
    assert!(deployment.ignored && deployment.report.valid && deployment.document.is_none());
    let created = accepted(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: n, namespace: x, creationTimestamp: '2026-11-23T04:45:00Z', uid: a}\n",
    );
    let metadata = &created.document.as_ref().unwrap().metadata;
    assert_eq!((metadata.creation_timestamp, metadata.namespace.as_str()), (1_795_409_100, ""));
    assert_eq!(parse_rfc3339("1970-01-01T00:00:00Z"), Some(0));
    assert_eq!(parse_rfc3339("2000-02-29T12:30:15.5Z"), Some(951_827_415));
    assert_eq!(parse_rfc3339("2000-13-01T00:00:00Z"), None);
}

#[test]
fn virtual_services() {
    let route = "hosts: [reviews]\nhttp:\n- route:\n  - destination: {host: reviews, subset: v1}\n    weight: W1\n  - destination: {host: reviews, subset: v2}\n    weight: W2\n";
    let weights = |api: &str, a: i64, b: i64| {
        doc(api, "VirtualService", &route.replace("W1", &a.to_string()).replace("W2", &b.to_string()))
    };
    let (v1, v1alpha3) = ("networking.istio.io/v1", "networking.istio.io/v1alpha3");
    accepted(&weights(v1, 90, 10));
    accepted(&weights(v1alpha3, 90, 10));
    warned(&weights(v1alpha3, 90, 20), "spec.http[0].route", "add up to 110, not 100");
    warned(&weights(v1, 90, 20), "spec.http[0].route", "proportions");
    rejected(&weights(v1, 0, 0), "spec.http[0].route", 7, "all destinations are 0");
    rejected(&weights(v1, -1, 101), "spec.http[0].route[0].weight", 9, "negative");

    let vs = |s: &str| net("VirtualService", s);
    let to = "http: [{route: [{destination: {host: a}}]}]";
    rejected(&vs(&format!("hosts: []\ngateways: [gw]\n{to}")), "spec.hosts", 5, "at least one host");
    rejected(&vs("tcp: [{route: [{destination: {host: a}}]}]"), "spec.hosts", 0, "at least one host");
    rejected(&vs("http: [{delegate: {name: a}}]"), "spec.hosts", 0, "cannot delegate again");
    accepted(&vs(to));
    accepted(&vs("hosts: [a]\nhttp: [{delegate: {name: a, namespace: b}}]"));
    rejected(&vs(&format!("hosts: ['*']\n{to}")), "spec.hosts[0]", 5, "only allowed at a gateway");
    accepted(&vs(&format!("hosts: ['*']\ngateways: [books/gw]\n{to}")));
    rejected(&vs(&format!("hosts: ['*.com', '*.foo.com']\n{to}")), "spec.hosts[1]", 5, "overlaps");
    rejected(&vs(&format!("hosts: [a]\ngateways: ['a/b/c']\n{to}")), "spec.gateways[0]", 6, "not a gateway");
    rejected(&vs("hosts: [a]"), "spec", 4, "http, tls and tcp");
    for (route, path, message) in [
        ("match: [{uri: {exact: /}}]", "", "one of route, redirect"),
        ("{redirect: {uri: /x}, route: [{destination: {host: a}}]}", "", "only one of"),
        ("redirect: {}", ".redirect", "is required"),
        ("redirect: {uri: /x, redirectCode: 200}", ".redirect.redirectCode", "200 is not one of"),
        ("rewrite: {}", ".rewrite", "is required"),
        ("route: [{}]", ".route[0].destination", "required"),
        ("route: [{destination: {host: '*'}}]", ".route[0].destination.host", "name a service"),
        (
            "route: [{destination: {host: a, subset: 'v 1'}}]",
            ".route[0].destination.subset",
            "name of a subset",
        ),
        (
            "route: [{destination: {host: a, port: {number: 0}}}]",
            ".route[0].destination.port.number",
            "1..65535",
        ),
        (
            "route: [{destination: {host: a, port: {name: http}}}]",
            ".route[0].destination.port.name",
            "by number",
        ),
        ("retries: {attempts: -1}", ".retries.attempts", "negative"),
        (
            "retries: {attempts: 1, retryOn: '5xx,sometimes'}",
            ".retries.retryOn",
            "unknown condition \"sometimes\"",
        ),
        ("retries: {attempts: 1, perTryTimeout: 10us}", ".retries.perTryTimeout", "1ms"),
        ("timeout: 1x", ".timeout", "not a duration"),
        ("fault: {}", ".fault", "one of delay and abort"),
        (
            "fault: {delay: {percentage: {value: 101}, fixedDelay: 1s}}",
            ".fault.delay.percentage.value",
            "0..100",
        ),
        ("fault: {abort: {percentage: {value: 1}, httpStatus: 99}}", ".fault.abort.httpStatus", "200..599"),
        (
            "fault: {abort: {percentage: {value: 1}, http2Error: X}}",
            ".fault.abort.http2Error",
            "not supported",
        ),
        ("match: [{uri: {regex: '('}}]", ".match[0].uri.regex", "regular expression"),
        ("match: [{headers: {'a b': {exact: x}}}]", r#".match[0].headers["a b"]"#, "header name"),
        ("headers: {request: {set: {x: \"a\\nb\"}}}", ".headers.request.set.x", "line breaks"),
        ("headers: {request: {remove: [':path']}}", ".headers.request.remove[0]", "cannot be removed"),
        ("corsPolicy: {allowMethods: [GETT]}", ".corsPolicy.allowMethods[0]", "HTTP method"),
        ("corsPolicy: {maxAge: 1500ms}", ".corsPolicy.maxAge", "whole number of seconds"),
        ("{mirror: {host: a}, mirrors: [{destination: {host: a}}]}", ".mirrors", "only one of"),
        ("delegate: {name: 'a b'}", ".delegate.name", "not the name"),
        ("directResponse: {status: 99}", ".directResponse.status", "200..599"),
    ] {
        let actions = ["redirect", "route", "directResponse", "delegate"];
        let body = route.trim_matches(['{', '}']);
        let body = if route.starts_with('{') { body.to_owned() } else { route.to_owned() };
        let body = if actions.iter().any(|a| body.contains(&format!("{a}:"))) || path.is_empty() {
            body
        } else {
            format!("{body}, route: [{{destination: {{host: a}}}}]")
        };
        rejected(&vs(&format!("hosts: [a]\nhttp: [{{{body}}}]")), &format!("spec.http[0]{path}"), 0, message);
    }
    rejected(
        &vs("hosts: [a.com]\ntls:\n- match: [{sniHosts: [b.com]}]\n  route: [{destination: {host: a}}]"),
        "spec.tls[0].match[0].sniHosts[0]",
        7,
        "not covered",
    );
    rejected(
        &vs("hosts: [a]\ntls: [{route: [{destination: {host: a}}]}]"),
        "spec.tls[0].match",
        0,
        "needs a match",
    );
    rejected(
        &vs("hosts: [a]\ntcp: [{match: [{destinationSubnets: [x]}]}]"),
        "spec.tcp[0].match[0].destinationSubnets[0]",
        0,
        "CIDR",
    );
    rejected(
        &vs("hosts: [a]\nexportTo: ['*', b]\nhttp: [{redirect: {uri: /}}]"),
        "spec.exportTo[0]",
        6,
        "beside others",
    );
    rejected(
        &vs(&format!(
            "hosts: [a]\n{to}\ntcp: [{{match: [{{sourceSubnet: 10.0.0.0/33}}], route: [{{destination: {{host: a}}}}]}}]"
        )),
        "spec.tcp[0].match[0].sourceSubnet",
        0,
        "CIDR",
    );
    warned(
        &vs("hosts: [a]\nhttp: [{route: [{destination: {host: a}}]}, {route: [{destination: {host: b}}]}]"),
        "spec.http[1]",
        "never reached",
    );
}

#[test]
fn destination_rules() {
    let dr = |s: &str| net("DestinationRule", s);
    accepted(&dr(
        "host: reviews\nsubsets:\n- name: v1\n  labels: {version: v1}\ntrafficPolicy:\n  tls: {mode: ISTIO_MUTUAL}\n  loadBalancer: {simple: LEAST_REQUEST}",
    ));
    rejected(&dr("host: ''"), "spec.host", 5, "required");
    rejected(&dr("host: a\ntrafficPolicy: {}"), "spec.trafficPolicy", 6, "at least one field");
    rejected(&dr("host: a\nsubsets: [{name: v1}, {name: v1}]"), "spec.subsets[1].name", 6, "twice");
    rejected(
        &dr("host: a\ntrafficPolicy: {connectionPool: {}}"),
        "spec.trafficPolicy.connectionPool",
        6,
        "tcp and http",
    );
    rejected(
        &dr("host: a\ntrafficPolicy: {connectionPool: {tcp: {maxConnections: -1}}}"),
        "spec.trafficPolicy.connectionPool.tcp.maxConnections",
        6,
        "negative",
    );
    rejected(
        &dr("host: a\ntrafficPolicy: {tls: {mode: MUTUAL}}"),
        "spec.trafficPolicy.tls.privateKey",
        0,
        "needs privateKey",
    );
    rejected(
        &dr("host: a\ntrafficPolicy: {tls: {mode: MTLS}}"),
        "spec.trafficPolicy.tls.mode",
        6,
        "unknown value `MTLS`",
    );
    rejected(
        &dr("host: a\ntrafficPolicy: {outlierDetection: {maxEjectionPercent: 101}}"),
        "spec.trafficPolicy.outlierDetection.maxEjectionPercent",
        6,
        "0..100",
    );
    rejected(
        &dr("host: a\ntrafficPolicy: {portLevelSettings: [{tls: {mode: DISABLE}}]}"),
        "spec.trafficPolicy.portLevelSettings[0].port",
        0,
        "required",
    );
    warned(
        &dr("host: a\ntrafficPolicy: {loadBalancer: {consistentHash: {}}}"),
        "spec.trafficPolicy.loadBalancer.consistentHash",
        "nothing is hashed",
    );
    rejected(
        &dr(
            "host: a\ntrafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 10}}}}",
        ),
        "spec.trafficPolicy.loadBalancer.consistentHash.maglev.tableSize",
        6,
        "prime",
    );
    rejected(
        &dr(
            "host: a\ntrafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {a: 50, b: 51}}]}}}",
        ),
        "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to",
        6,
        "101",
    );
    accepted(&dr("host: a\ntrafficPolicy: {retryBudget: {percent: 10, budgetInterval: 5s}}"));
    rejected(
        &dr("host: a\ntrafficPolicy: {outlierDetection: {outlierDetectionHttpErrorCodes: [99]}}"),
        "spec.trafficPolicy.outlierDetection.outlierDetectionHttpErrorCodes[0]",
        0,
        "100 to 599",
    );
    rejected(
        &dr(
            "host: a\ntrafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: c, attributes: [{name: a, value: 'b; c'}]}}}}",
        ),
        "spec.trafficPolicy.loadBalancer.consistentHash.httpCookie.attributes[0].value",
        0,
        "semicolons",
    );
}

#[test]
fn gateways() {
    let gw = |s: &str| net("Gateway", &format!("selector: {{istio: ingress}}\nservers:\n- {s}"));
    accepted(&gw(
        "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*'], tls: {httpsRedirect: true}}",
    ));
    accepted(&gw(
        "{port: {number: 443, name: https, protocol: HTTPS}, hosts: [books/a.com], tls: {mode: SIMPLE, credentialName: c}}",
    ));
    accepted(&gw(
        "{port: {number: 15443, name: tls, protocol: TLS}, hosts: ['*.local'], tls: {mode: AUTO_PASSTHROUGH}}",
    ));
    rejected(&net("Gateway", "selector: {}"), "spec.servers", 4, "at least one server");
    for (server, path, message) in [
        ("{port: {number: 80, name: a, protocol: HTTP}}", "hosts", "at least one host"),
        ("{hosts: ['*']}", "port", "required"),
        ("{port: {number: 80, name: a, protocol: SMTP}, hosts: ['*']}", "port.protocol", "unknown protocol"),
        ("{port: {number: 80, protocol: HTTP}, hosts: ['*']}", "port.name", "needs a name"),
        ("{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*']}", "tls", "needs tls"),
        (
            "{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*'], tls: {mode: SIMPLE}}",
            "tls",
            "only httpsRedirect",
        ),
        (
            "{port: {number: 80, name: a, protocol: TCP}, hosts: ['*'], tls: {mode: SIMPLE}}",
            "tls",
            "cannot have tls",
        ),
        (
            "{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE}}",
            "tls",
            "a certificate is required",
        ),
        (
            "{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: MUTUAL, serverCertificate: a, privateKey: b}}",
            "tls.caCertificates",
            "roots that clients are verified with",
        ),
        (
            "{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: ISTIO_MUTUAL, credentialName: c}}",
            "tls",
            "mesh identity",
        ),
        (
            "{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c, minProtocolVersion: TLSV1_0}}",
            "tls.minProtocolVersion",
            "broken",
        ),
        (
            "{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: MUTUAL, credentialName: c, verifyCertificateHash: [x]}}",
            "tls.verifyCertificateHash[0]",
            "64 hexadecimal digits",
        ),
        (
            "{port: {number: 443, name: a, protocol: HTTPS}, hosts: ['*'], tls: {mode: MUTUAL, credentialName: c, verifyCertificateSpki: [YWI=]}}",
            "tls.verifyCertificateSpki[0]",
            "base64 of 32 bytes",
        ),
        ("{port: {number: 80, name: a, protocol: HTTP}, hosts: ['b@d/x.com']}", "hosts[0]", "namespace"),
    ] {
        rejected(&gw(server), &format!("spec.servers[0].{path}"), 0, message);
    }
}

#[test]
fn service_and_workload_entries() {
    let se = |s: &str| {
        net(
            "ServiceEntry",
            &format!("hosts: [api.ext.com]\nports: [{{number: 443, name: tls, protocol: TLS}}]\n{s}"),
        )
    };
    accepted(&se("resolution: DNS"));
    accepted(&se("resolution: STATIC\nendpoints: [{address: 1.2.3.4, ports: {tls: 8443}}]"));
    warned(&se("resolution: STATIC"), "spec.endpoints", "without endpoints");
    rejected(&se("resolution: NONE\nendpoints: [{address: 1.2.3.4}]"), "spec.endpoints", 8, "cannot be set");
    rejected(
        &se("resolution: STATIC\nendpoints: [{address: a.b}]"),
        "spec.endpoints[0].address",
        8,
        "not an IP",
    );
    rejected(
        &se("resolution: STATIC\nendpoints: [{address: 1.2.3.4, ports: {x: 1}}]"),
        "spec.endpoints[0].ports.x",
        8,
        "no port",
    );
    rejected(&se("resolution: DNS\naddresses: [10.0.0.0/8]"), "spec.addresses[0]", 8, "CIDR");
    rejected(
        &se("resolution: DNS\nendpoints: [{address: a.b}]\nworkloadSelector: {labels: {a: b}}"),
        "spec.endpoints",
        8,
        "only one of",
    );
    rejected(
        &net("ServiceEntry", "hosts: ['*']\nports: [{number: 1, name: a, protocol: TCP}]"),
        "spec.hosts[0]",
        5,
        "catch everything",
    );
    rejected(
        &net(
            "ServiceEntry",
            "hosts: ['*.a.com']\nresolution: DNS\nports: [{number: 1, name: a, protocol: TCP}]",
        ),
        "spec.hosts[0]",
        5,
        "endpoints are required",
    );
    rejected(
        &net(
            "ServiceEntry",
            "hosts: [a.com]\nports: [{number: 1, name: a, protocol: TCP}, {number: 1, name: a, protocol: TCP}]",
        ),
        "spec.ports[1].number",
        6,
        "twice",
    );
    accepted(&net(
        "WorkloadEntry",
        "address: 127.10.1.5\nlabels: {app: a}\nserviceAccount: a\nports: {http: 9080}",
    ));
    rejected(&net("WorkloadEntry", "labels: {app: a}"), "spec.address", 4, "required");
    rejected(&net("WorkloadEntry", "address: 'a b'"), "spec.address", 5, "neither");
    rejected(&net("WorkloadEntry", "address: 1.1.1.1\nports: {http: 0}"), "spec.ports.http", 6, "1..65535");
}

#[test]
fn security() {
    let sec = |kind: &str, s: &str| doc("security.istio.io/v1", kind, s);
    accepted(&sec("PeerAuthentication", "mtls: {mode: STRICT}"));
    rejected(
        &sec("PeerAuthentication", "portLevelMtls: {'80': {mode: DISABLE}}"),
        "spec.portLevelMtls",
        5,
        "needs a selector",
    );
    rejected(
        &sec("PeerAuthentication", "selector: {matchLabels: {a: b}}\nportLevelMtls: {'0': {mode: DISABLE}}"),
        "spec.portLevelMtls.0",
        6,
        "1..65535",
    );
    let ap = |s: &str| sec("AuthorizationPolicy", s);
    accepted(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny-all}\nspec: {}\n",
    );
    accepted(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny-all}\nspec:\n",
    );
    accepted(&ap("rules: [{}]"));
    accepted(&ap(
        "rules:\n- from:\n  - source: {principals: ['mesh.local/ns/books/sa/reviews']}\n  to:\n  - operation: {methods: [GET], paths: ['/a/{*}/b']}\n  when:\n  - {key: source.cluster, values: [west]}",
    ));
    rejected(&ap("action: DENY"), "spec.rules", 0, "at least one rule");
    rejected(&ap("rules: [{from: []}]"), "spec.rules[0].from", 5, "empty list");
    rejected(&ap("rules: [{from: [{}]}]"), "spec.rules[0].from[0].source", 5, "at least one field");
    rejected(
        &ap("rules: [{to: [{operation: {}}]}]"),
        "spec.rules[0].to[0].operation",
        5,
        "at least one field",
    );
    rejected(
        &ap("rules: [{from: [{source: {ipBlocks: [300.1.1.1]}}]}]"),
        "spec.rules[0].from[0].source.ipBlocks[0]",
        5,
        "CIDR",
    );
    rejected(
        &ap("rules: [{from: [{source: {principals: ['']}}]}]"),
        "spec.rules[0].from[0].source.principals[0]",
        5,
        "empty",
    );
    rejected(
        &ap("rules: [{from: [{source: {principals: ['a*b']}}]}]"),
        "spec.rules[0].from[0].source.principals[0]",
        5,
        "'*'",
    );
    accepted(&ap("rules: [{from: [{source: {requestPrincipals: ['*']}}]}]"));
    accepted(&ap("rules: [{when: [{key: 'request.auth.claims[a.b][c]', values: [x]}]}]"));
    rejected(
        &ap("rules: [{when: [{key: 'request.auth.claims[]', values: [x]}]}]"),
        "spec.rules[0].when[0].key",
        5,
        "claims[name]",
    );
    rejected(
        &ap("rules: [{when: [{key: request.auth.color, values: [x]}]}]"),
        "spec.rules[0].when[0].key",
        5,
        "unknown key",
    );
    rejected(
        &ap("rules: [{to: [{operation: {ports: ['0']}}]}]"),
        "spec.rules[0].to[0].operation.ports[0]",
        5,
        "1..65535",
    );
    rejected(
        &ap("rules: [{to: [{operation: {paths: ['/{**}/{*}']}}]}]"),
        "spec.rules[0].to[0].operation.paths[0]",
        5,
        "no other wildcard",
    );
    rejected(
        &ap("rules: [{when: [{key: source.color, values: [a]}]}]"),
        "spec.rules[0].when[0].key",
        5,
        "unknown key",
    );
    rejected(&ap("rules: [{when: [{key: source.ip}]}]"), "spec.rules[0].when[0]", 5, "values");
    rejected(
        &ap("targetRefs: [{kind: Gateway, name: a}]\nrules: [{}]"),
        "spec.targetRefs[0].kind",
        5,
        "is none of",
    );
    let ra = |s: &str| sec("RequestAuthentication", s);
    accepted(&ra("jwtRules: [{issuer: a, jwksUri: 'https://a/keys'}]"));
    accepted(&ra("jwtRules: [{issuer: 'https://a'}]"));
    rejected(&ra("jwtRules: [{}]"), "spec.jwtRules[0]", 5, "issuer");
    rejected(&ra("jwtRules: [{issuer: a, jwks: '{}'}]"), "spec.jwtRules[0].jwks", 5, "Key Set");
}

#[test]
fn kubernetes_and_mesh() {
    let svc = |s: &str| doc("v1", "Service", s);
    accepted(&svc(
        "clusterIP: None\nselector: {app: a}\nports: [{port: 80, targetPort: web, appProtocol: http}]\nipFamilyPolicy: SingleStack",
    ));
    rejected(&svc("ports: [{port: 80}, {port: 81}]"), "spec.ports[0].name", 0, "several ports");
    rejected(&svc("type: Magic\nports: [{port: 80}]"), "spec.type", 5, "unknown type");
    rejected(&svc("clusterIP: x\nports: [{port: 80}]"), "spec.clusterIP", 5, "IP address");
    rejected(&svc("type: ExternalName"), "spec.externalName", 0, "DNS name");
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: c}\ntype: kubernetes.io/tls\n";
    accepted(&format!("{secret}data: {{tls.crt: YWJj, tls.key: YWJj}}\n"));
    rejected(&format!("{secret}data: {{tls.crt: YWJj}}\n"), "data", 0, "tls.key");
    rejected(
        &format!("{secret}data: {{tls.crt: YWJj, tls.key: 'hunter two'}}\n"),
        "data[\"tls.key\"]",
        0,
        "base64",
    );
    let leaked = only(&format!("{secret}data: {{tls.crt: YWJj, tls.key: 'hunter two'}}\n"));
    assert!(!format!("{:?}", leaked.report).contains("hunter"));
    let mesh = |s: &str| {
        format!(
            "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: mesh}}\nspec: {{{s}}}\n"
        )
    };
    accepted(&mesh(
        "trustDomain: mesh.local, transport: quic, accessLogFile: /dev/stdout, outboundTrafficPolicy: {mode: REGISTRY_ONLY}",
    ));
    rejected(&mesh("trustDomain: 'a b'"), "spec.trustDomain", 4, "not valid");
    rejected(&mesh("mixerCheckServer: nowhere"), "spec.mixerCheckServer", 4, "host:port");
    accepted(&mesh("mixerReportServer: 'm:9091', mixerCheckServer: 'm:9091', policyCheckFailOpen: true"));
    warned(&mesh("policyCheckFailOpen: true"), "spec.policyCheckFailOpen", "nobody is asked");
    accepted("apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {name: a}\n");
}

#[test]
fn mixer_kinds() {
    let mx = |kind: &str, s: &str| doc("config.istio.io/v1alpha2", kind, s);
    accepted(&mx("rule", "match: 'true'\nactions: [{handler: a.denier, instances: [b.checknothing]}]"));
    rejected(&mx("rule", "actions: []"), "spec.actions", 5, "at least one action");
    accepted(&mx("handler", "compiledAdapter: denier\nparams: {status: {code: 7, message: no}}"));
    rejected(&mx("handler", "compiledAdapter: opa"), "spec.compiledAdapter", 5, "unsupported");
    rejected(
        &mx("handler", "compiledAdapter: listchecker\nparams: {overides: [a]}"),
        "spec.params",
        6,
        "unknown field `overides`",
    );
    rejected(
        &mx("listchecker", "overrides: [x]\nentryType: IP_ADDRESSES"),
        "spec.overrides[0]",
        5,
        "IP address",
    );
    rejected(
        &mx("memquota", "quotas: [{name: a, maxAmount: -1}]"),
        "spec.quotas[0].maxAmount",
        5,
        "negative",
    );
    rejected(
        &mx("prometheus", "metrics: [{instanceName: a, name: 'x y', kind: COUNTER}]"),
        "spec.metrics[0].name",
        5,
        "metric's name",
    );
    rejected(&mx("opa", "policy: []"), "kind", 2, "unsupported kind");
}

#[test]
fn files_that_cannot_be_read() {
    let p = parse_file("x", &Arc::new(vec![0xff, 0xfe, 0]), "default");
    assert!(!p[0].report.valid && p[0].report.errors[0].message.contains("UTF-8"));
    let huge = vec![b' '; MAX_FILE_BYTES + 1];
    assert!(parse_file("x", &Arc::new(huge), "default")[0].report.errors[0].message.contains("limit"));
    let many = "---\na: 1\n".repeat(MAX_DOCUMENTS + 1);
    assert!(
        parse_file("x", &Arc::new(many.into_bytes()), "default")[0].report.errors[0]
            .message
            .contains("limit")
    );
    let nested = format!("apiVersion: v1\nkind: Service\nmetadata: {{name: a}}\nspec: {}", "[".repeat(1_000));
    assert!(!only(&nested).report.valid);
}

proptest::proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
        parse_file("x", &Arc::new(bytes), "default");
    }

    #[test]
    fn no_mutation_of_a_document_panics(
        at in 0usize..400, junk in "[\\[\\]{}:,&*!|>'\"%@#?a1 \\n\\t-]{0,6}"
    ) {
        let mut text = net("VirtualService", "hosts: [reviews]\nhttp:\n- match:\n  - headers:\n      end-user: {exact: jason}\n  route:\n  - destination: {host: reviews, subset: v2}\n    weight: 90\n  timeout: 1.5s\n");
        let at = at.min(text.len());
        text.insert_str(at, &junk);
        parse_file("x", &Arc::new(text.into_bytes()), "default");
    }
}

#[test]
fn policies_of_the_federation() {
    let policy = |kind: &str, rules: &str| {
        format!(
            "apiVersion: flotilla.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: all}}\nspec:\n  rules:\n{rules}"
        )
    };
    accepted(&policy("ExportPolicy", "  - {peers: [east], namespaces: [books]}\n  - {action: DENY}\n"));
    accepted(&policy("ImportPolicy", "  - {peers: [east], onLapse: keep}\n  - {onLapse: refuse}\n"));
    rejected(
        &policy("ExportPolicy", "  - {peers: [East_1]}\n"),
        "spec.rules[0].peers[0]",
        6,
        "for all clusters",
    );
    rejected(
        &policy("ImportPolicy", "  - {namespaces: [a.b]}\n"),
        "spec.rules[0].namespaces[0]",
        6,
        "is not a namespace",
    );
    rejected(
        &policy("ImportPolicy", "  - {action: DENY, onLapse: keep}\n"),
        "spec.rules[0].onLapse",
        6,
        "remove one of them",
    );
    let export = |to: &str| {
        format!(
            "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata:\n  name: a\n  \
             namespace: b\n  annotations: {{flotilla.dev/export-to: {to:?}}}\n"
        )
    };
    accepted(&export("east, west"));
    accepted(&export("*"));
    rejected(&export("east,,west"), "metadata.annotations[\"flotilla.dev/export-to\"]", 0, "or * for all");
}

#[test]
fn membership() {
    let text = |kind: &str, name: &str, spec: &str| {
        format!("apiVersion: flotilla.dev/v1alpha1\nkind: {kind}\nmetadata:\n  name: {name}\nspec:\n{spec}")
    };
    let member = |spec: &str| text("MeshMembership", "mesh", spec);
    accepted(&member("  tokenFile: /etc/flotilla/join-token\n"));
    accepted(&member("  state: left\n  force: true\n"));
    accepted(&member("  state: joined\n"));
    rejected(&text("MeshMembership", "west", "  state: left\n"), "metadata.name", 4, "is named \"mesh\"");
    rejected(&member("  tokenFile: token\n"), "spec.tokenFile", 6, "an absolute path");
    rejected(&member("  tokenFile: flt1.abc.def\n"), "spec.tokenFile", 6, "outside of the configuration");
    rejected(&member("  force: true\n"), "spec.force", 6, "set state: left");
    let typo = only(&member("  state: lefft\n"));
    assert!(format!("{:?}", typo.report.errors).contains("did you mean `left`?"), "{:?}", typo.report);
    accepted(&text("ClusterEviction", "east", "  reason: burnt down\n"));
    rejected(&text("ClusterEviction", "East_1", "  reason: x\n"), "metadata.name", 4, "after the cluster");
    let long = format!("  reason: {}\n", "x".repeat(300));
    rejected(&text("ClusterEviction", "east", &long), "spec.reason", 6, "at most 256");
}

#[test]
fn what_editors_and_other_systems_leave_in_files() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}]}\n";
    // A byte-order mark, and lines that end as on Windows: places are the same.
    let windows =
        format!("\u{feff}{service}---\n{}", service.replace("name: a", "name: b").replace("80", "0"));
    let all = parse(&windows.replace('\n', "\r\n"));
    assert_eq!(all.len(), 2, "{all:#?}");
    assert!(all[0].report.valid);
    assert_eq!((all[1].report.name.as_str(), all[1].report.errors[0].line), ("b", 9));
    // And as on a Mac of long ago; a comment ends with its line there, too.
    let mac = parse(
        &windows
            .replace(
                "apiVersion: v1\nkind: Service\nmetadata: {name: a}",
                "# services\napiVersion: v1\nkind: Service\nmetadata: {name: a}",
            )
            .replace('\n', "\r"),
    );
    assert_eq!(mac.len(), 2, "{mac:#?}");
    assert!(mac[0].report.valid);
    assert_eq!((mac[1].report.name.as_str(), mac[1].report.errors[0].line), ("b", 10));
    let broken = only("kind: Service\rapiVersion: v1\rmetadata:\r  name: a\rspec: [\r");
    assert_eq!(broken.key.unwrap().name, "a");
    // A tab is no indentation.
    let tab = only("apiVersion: v1\nkind: Service\nmetadata:\n\tname: a\n");
    assert!(!tab.report.valid && tab.report.errors[0].line >= 3, "{:?}", tab.report);
    // The same key twice would let one of them win silently.
    let twice = only(&service.replace("kind: Service", "kind: Service\nkind: Secret"));
    assert!(twice.report.errors[0].message.contains("duplicate"), "{:?}", twice.report);
    assert_eq!(twice.report.errors[0].line, 3);
    // Anchors are fine as long as they stay small.
    let anchors = service.replace("{name: a}", "{name: a, labels: &l {x: y}, annotations: *l}");
    assert!(only(&anchors).report.valid);
    // JSON, also without line breaks, and lists in lists.
    let json = r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"List","items":[]},{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"n"}}]}"#;
    let all = parse(json);
    assert_eq!(all.len(), 2);
    assert!(all[1].report.valid);
    assert!(!all[0].report.valid, "a list in a list is no document: {:?}", all[0].report);
}

#[test]
fn huge_files_are_refused_at_once() {
    let start = std::time::Instant::now();
    let lines = "a:\n".repeat(1_000_000);
    let head = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n";
    for (text, message) in [
        (lines.clone(), "is the limit"),
        (format!("{head}{lines}"), "is the limit"),
        ("x".repeat(MAX_FILE_BYTES + 1), "is the limit"),
        ("---\na: b\n".repeat(MAX_DOCUMENTS + 1), "is the limit"),
        (format!("{head}  {}", "[".repeat(100_000)), ""),
        (format!("{head}{}", (0..10_000).map(|i| format!("  k{i}: *a\n")).collect::<String>()), ""),
    ] {
        let all = parse(&text);
        assert!(all.iter().any(|p| p.report.errors.iter().any(|e| e.message.contains(message))));
    }
    // A debug build takes a second or two, a busy machine several times that.
    assert!(start.elapsed() < std::time::Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn trust_domains() {
    let text = |spec: &str| {
        format!(
            "apiVersion: flotilla.dev/v1alpha1\nkind: FederatedTrustDomain\nmetadata:\n  name: b\nspec:\n  trustDomain: b.example\n{spec}"
        )
    };
    const URL: &str = "  bundleEndpointURL: https://b.example/bundle\n";
    const SPIFFE: &str = "  bundleEndpointProfile:\n    type: https_spiffe\n    endpointSPIFFEID: ";
    let with = |more: &str| text(&format!("{URL}{more}"));
    accepted(&with(""));
    accepted(&with("  bundleEndpointProfile:\n    type: https_web\n"));
    accepted(&with(&format!("{SPIFFE}spiffe://b.example/bundle\n  trustDomainBundle: PEM\n")));
    accepted(&with(&format!("{SPIFFE}spiffe://c.example/bundle\n")));
    accepted(&text("  trustDomainBundle: PEM\n"));
    rejected(&text(""), "spec.bundleEndpointURL", 0, "nothing says which roots");
    rejected(
        &text("  bundleEndpointURL: http://b.example\n"),
        "spec.bundleEndpointURL",
        7,
        "begin with https",
    );
    let user = text("  bundleEndpointURL: https://me:secret@b.example\n");
    rejected(&user, "spec.bundleEndpointURL", 7, "names a user");
    assert!(!format!("{:?}", only(&user).report.errors).contains("secret"));
    rejected(&text("  bundleEndpointURL: https:///x\n"), "spec.bundleEndpointURL", 7, "is no URL");
    let profile = "spec.bundleEndpointProfile";
    let id = "spec.bundleEndpointProfile.endpointSPIFFEID";
    let kept = text("  trustDomainBundle: PEM\n  bundleEndpointProfile:\n    type: https_web\n");
    rejected(&kept, profile, 8, "set bundleEndpointURL");
    rejected(&with(&format!("{SPIFFE}b.example\n")), id, 10, "is required");
    rejected(
        &with(&format!("{SPIFFE}spiffe://b.example/bundle\n")),
        "spec.trustDomainBundle",
        0,
        "first answer",
    );
    let web = "  bundleEndpointProfile:\n    endpointSPIFFEID: spiffe://b.example/x\n";
    rejected(&with(web), id, 9, "set type: https_spiffe");
    let key = text("  trustDomainBundle: '-----BEGIN PRIVATE KEY-----'\n");
    rejected(&key, "spec.trustDomainBundle", 7, "private key");

    let mesh = |data: &str| {
        format!(
            "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata:\n  name: mesh\nspec:\n  caCertificates:\n  - {data}\n"
        )
    };
    accepted(&mesh("{pem: PEM, trustDomains: [b.example]}"));
    accepted(&mesh("{spiffeBundleUrl: 'https://b.example', trustDomains: [b.example, c.example]}"));
    let at = "spec.caCertificates[0]";
    rejected(&mesh("{trustDomains: [b.example]}"), at, 7, "set pem or spiffeBundleUrl");
    rejected(&mesh("{pem: PEM}"), &format!("{at}.trustDomains"), 0, "name the trust domains");
    let both = mesh("{pem: PEM, spiffeBundleUrl: 'https://b.example', trustDomains: [b.example]}");
    rejected(&both, &format!("{at}.spiffeBundleUrl"), 7, "only one of");
    let upper = mesh("{pem: PEM, trustDomains: [B]}");
    rejected(&upper, &format!("{at}.trustDomains[0]"), 7, "");
}
