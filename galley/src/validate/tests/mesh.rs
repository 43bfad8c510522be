//! MeshConfig, Istio's and ours.

use super::parse_text;
use crate::document::Parsed;

fn mesh(spec: &str) -> Parsed {
    let spec: String = spec.lines().map(|l| format!("  {l}\n")).collect();
    parse_text(&format!(
        "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: mesh}}\nspec:\n{spec}"
    ))
}

#[track_caller]
fn accepts(specs: &[&str]) {
    for spec in specs {
        let p = mesh(spec);
        assert!(p.report.valid && p.report.warnings.is_empty(), "{spec}\n{:#?}", p.report);
    }
}

#[track_caller]
fn refuses(rows: &[(&str, &str)]) {
    for (spec, path) in rows {
        let p = mesh(spec);
        let found = p.report.errors.iter().any(|e| e.path == format!("spec.{path}") && e.line > 4);
        assert!(!p.report.valid && found, "{spec}\nexpected an error at {path}, got {:#?}", p.report.errors);
    }
}

#[test]
fn what_holds_for_those_who_say_nothing() {
    accepts(&[
        "connectTimeout: 3s\nprotocolDetectionTimeout: 0s\ntcpKeepalive: {time: 10s, interval: 1s, probes: 3}",
        "proxyListenPort: 16001\nproxyInboundListenPort: 16006\nproxyHttpPort: 3128",
        "enableAutoMtls: true\ntrustDomainAliases: [old, older.example]",
        "defaultServiceExportTo: ['~']\ndefaultVirtualServiceExportTo: [books, .]\ndefaultDestinationRuleExportTo: ['*']",
        "defaultHttpRetryPolicy: {attempts: 3, retryOn: 'reset,503'}",
        "tlsDefaults: {minProtocolVersion: TLSV1_3, ecdhCurves: [X25519], cipherSuites: [ECDHE-RSA-AES128-GCM-SHA256]}",
        "meshMTLS: {minProtocolVersion: TLSV1_3, ecdhCurves: [P-256]}",
        "serviceSettings: [{settings: {clusterLocal: true}, hosts: ['*.books.svc.cluster.local', a.b.svc.cluster.local]}]",
        "discoverySelectors: [{matchLabels: {a: b}}, {matchExpressions: [{key: a, operator: In, values: [b]}, {key: c, operator: Exists}]}]",
        "outboundClusterStatName: '%SERVICE_FQDN%_%SUBSET_NAME%'\ninboundClusterStatName: '%SERVICE%:%TARGET_PORT%'",
        "extensionProviders: [{name: a, envoyFileAccessLog: {path: /dev/stdout, logFormat: {labels: {a: '%PROTOCOL%'}}}}, {name: b, prometheus: {}}]\ndefaultProviders: {accessLogging: [a, envoy], metrics: [prometheus]}",
        "defaultConfig: {gatewayTopology: {numTrustedProxies: 2, forwardClientCertDetails: SANITIZE, proxyProtocol: {}}, tracing: {sampling: 0.5}}",
        "defaultConfig: {concurrency: 0, drainDuration: 45s, parentShutdownDuration: 60s, terminationDrainDuration: 0s, statusPort: 0, proxyAdminPort: 15000, connectionSettings: {listenerConnectionLimit: 1, globalDownstreamConnectionLimit: 1}}",
        "ingressControllerMode: DEFAULT\ningressClass: edge\ningressService: edge\ningressSelector: edge",
        "defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: 1}}, outlierDetection: {consecutive5xxErrors: 3}}",
        "serviceEntryVisibility: {applyToSidecars: true, defaultVisibility: NAMESPACE, policies: [{visibility: PUBLIC, matchingRules: [{namespaceSelector: {matchLabels: {a: b}}}]}, {visibility: NONE}]}",
        "outboundTrafficPolicy: {mode: ALLOW_ANY_DYNAMIC_DNS, tls: {mode: SIMPLE}}",
        "zoneAwareLbSetting: {minClusterSize: 3}\nlocalityLbSetting: {enabled: true}",
        "extensionProviders: [{name: a, envoyFileAccessLog: {path: /a, omitEmptyValues: true}}]",
        "ingressControllerMode: 'OFF'\nenablePrometheusMerge: false\nverifyCertificateAtClient: true\nauthPolicy: NONE",
    ]);
    refuses(&[
        ("connectTimeout: 0s", "connectTimeout"),
        ("ingressControllerMode: ALL", "ingressControllerMode"),
        ("dnsRefreshRate: 0s", "dnsRefreshRate"),
        ("tcpKeepalive: {time: 0s}", "tcpKeepalive.time"),
        ("proxyListenPort: 70000", "proxyListenPort"),
        ("proxyHttpPort: 70000", "proxyHttpPort"),
        ("proxyListenPort: 15006", "proxyListenPort"),
        ("trustDomainAliases: [a, 'b c']", "trustDomainAliases[1]"),
        ("defaultServiceExportTo: ['*', books]", "defaultServiceExportTo[0]"),
        ("defaultVirtualServiceExportTo: ['~']", "defaultVirtualServiceExportTo[0]"),
        ("defaultDestinationRuleExportTo: [a, a]", "defaultDestinationRuleExportTo[1]"),
        ("defaultHttpRetryPolicy: {attempts: 3, perTryTimeout: 1s}", "defaultHttpRetryPolicy.perTryTimeout"),
        ("defaultHttpRetryPolicy: {attempts: 3, retryOn: nothing}", "defaultHttpRetryPolicy.retryOn"),
        ("tlsDefaults: {minProtocolVersion: TLSV1_1}", "tlsDefaults.minProtocolVersion"),
        ("tlsDefaults: {ecdhCurves: [P-999]}", "tlsDefaults.ecdhCurves[0]"),
        ("serviceSettings: [{settings: {clusterLocal: true}}]", "serviceSettings[0].hosts"),
        ("serviceSettings: [{hosts: ['a*b']}]", "serviceSettings[0].hosts[0]"),
        (
            "discoverySelectors: [{matchExpressions: [{operator: Exists}]}]",
            "discoverySelectors[0].matchExpressions[0].key",
        ),
        (
            "discoverySelectors: [{matchExpressions: [{key: a, operator: Is}]}]",
            "discoverySelectors[0].matchExpressions[0].operator",
        ),
        (
            "discoverySelectors: [{matchExpressions: [{key: a, operator: In}]}]",
            "discoverySelectors[0].matchExpressions[0].values",
        ),
        ("outboundClusterStatName: '%TARGET_PORT%'", "outboundClusterStatName"),
        ("inboundClusterStatName: '%SERVICE'", "inboundClusterStatName"),
        ("extensionProviders: [{name: a}]", "extensionProviders[0]"),
        ("extensionProviders: [{name: a, prometheus: {}, zipkin: {}}]", "extensionProviders[0]"),
        (
            "extensionProviders: [{name: a, envoyFileAccessLog: {}}]",
            "extensionProviders[0].envoyFileAccessLog.path",
        ),
        (
            "extensionProviders: [{name: a, envoyFileAccessLog: {path: /a, logFormat: {text: a, labels: {}}}}]",
            "extensionProviders[0].envoyFileAccessLog.logFormat",
        ),
        (
            "extensionProviders: [{name: a, envoyFileAccessLog: {path: /a, logFormat: {labels: {a: {b: c}}}}}]",
            "extensionProviders[0].envoyFileAccessLog.logFormat.labels.a",
        ),
        ("defaultProviders: {accessLogging: [nobody]}", "defaultProviders.accessLogging[0]"),
        (
            "defaultConfig: {gatewayTopology: {numTrustedProxies: 101}}",
            "defaultConfig.gatewayTopology.numTrustedProxies",
        ),
        (
            "defaultConfig: {gatewayTopology: {proxyProtocol: {a: b}}}",
            "defaultConfig.gatewayTopology.proxyProtocol",
        ),
        ("defaultConfig: {tracing: {sampling: 101}}", "defaultConfig.tracing.sampling"),
        ("defaultTrafficPolicy: {connectionPool: {}}", "defaultTrafficPolicy.connectionPool"),
        (
            "defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: -1}}}",
            "defaultTrafficPolicy.connectionPool.tcp.maxConnections",
        ),
        (
            "defaultTrafficPolicy: {outlierDetection: {maxEjectionPercent: 101}}",
            "defaultTrafficPolicy.outlierDetection.maxEjectionPercent",
        ),
        ("defaultTrafficPolicy: {loadBalancer: {}}", "defaultTrafficPolicy.loadBalancer"),
        ("serviceEntryVisibility: {defaultVisibility: SOME}", "serviceEntryVisibility.defaultVisibility"),
        (
            "serviceEntryVisibility: {policies: [{matchingRules: [{namespaceSelector: {matchExpressions: [{key: a, operator: In}]}}]}]}",
            "serviceEntryVisibility.policies[0].matchingRules[0].namespaceSelector.matchExpressions[0].values",
        ),
        (
            "outboundTrafficPolicy: {mode: ALLOW_ANY_DYNAMIC_DNS, tls: {mode: ISTIO_MUTUAL}}",
            "outboundTrafficPolicy.tls.mode",
        ),
        (
            "outboundTrafficPolicy: {mode: ALLOW_ANY_DYNAMIC_DNS, tls: {mode: MUTUAL}}",
            "outboundTrafficPolicy.tls.clientCertificate",
        ),
        ("zoneAwareLbSetting: {failover: [{from: a, to: a}]}", "zoneAwareLbSetting.failover[0]"),
        ("hboneIdleTimeout: 0s", "hboneIdleTimeout"),
        ("serviceScopeConfigs: [{scope: SOME}]", "serviceScopeConfigs[0].scope"),
        (
            "serviceScopeConfigs: [{servicesSelector: {matchExpressions: [{key: a, operator: Is}]}}]",
            "serviceScopeConfigs[0].servicesSelector.matchExpressions[0].operator",
        ),
        ("defaultConfig: {concurrency: -1}", "defaultConfig.concurrency"),
        ("defaultConfig: {statusPort: 70000}", "defaultConfig.statusPort"),
        ("defaultConfig: {proxyAdminPort: -1}", "defaultConfig.proxyAdminPort"),
        (
            "defaultConfig: {connectionSettings: {globalDownstreamConnectionLimit: 0}}",
            "defaultConfig.connectionSettings.globalDownstreamConnectionLimit",
        ),
        ("enableAutoMTLS: true", "enableAutoMTLS"),
    ]);
    let p = mesh("defaultConfig: {gatewayTopology: {forwardClientCertDetails: ALWAYS_FORWARD_ONLY}}");
    assert!(p.report.valid && p.report.warnings[0].message.contains("trusted proxies"), "{:?}", p.report);
}

/// What is looked at and has no effect here says so.
#[test]
fn what_is_of_others() {
    for (spec, path, says) in [
        ("serviceEntryVisibility: {defaultVisibility: NONE}", "serviceEntryVisibility", "ambient"),
        (
            "serviceEntryVisibility: {applyToSidecars: true, policies: [{matchingRules: [{}]}]}",
            "serviceEntryVisibility.policies[0].matchingRules[0]",
            "never matches",
        ),
        (
            "outboundTrafficPolicy: {mode: ALLOW_ANY, tls: {mode: SIMPLE}}",
            "outboundTrafficPolicy.tls",
            "DYNAMIC_DNS",
        ),
        ("hboneIdleTimeout: 15s", "hboneIdleTimeout", "idleTimeout"),
        ("serviceScopeConfigs: [{scope: GLOBAL}]", "serviceScopeConfigs", "ServiceExport"),
    ] {
        let p = mesh(spec);
        let found = |w: &crate::Finding| w.path == format!("spec.{path}") && w.message.contains(says);
        assert!(p.report.valid && p.report.warnings.iter().any(found), "{spec}\n{:#?}", p.report);
    }
}

/// The file that an installation of Istio keeps, whole.
#[test]
fn settings_in_a_config_map() {
    let map = |mesh: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: istio\n  namespace: istio-system\ndata:\n{mesh}  meshNetworks: 'networks: {{}}'\n"
        )
    };
    let text = map(
        "  mesh: |-\n    accessLogFile: /dev/stdout\n    defaultConfig:\n      discoveryAddress: istiod.istio-system.svc:15012\n    trustDomain: cluster.local\n",
    );
    let p = parse_text(&text);
    assert!(p.report.valid, "{:?}", p.report);
    let key = p.key.unwrap();
    assert_eq!((key.kind.name(), key.namespace.as_str(), key.name.as_str()), ("MeshConfig", "", "mesh"));
    let Some(mesh_model::authored::Spec::MeshConfig(m)) = p.document.map(|d| d.spec.clone()) else {
        panic!()
    };
    assert_eq!(m.trust_domain.as_deref(), Some("cluster.local"));
    let warned: Vec<_> = p.report.warnings.iter().map(|w| (w.path.as_str(), w.line)).collect();
    assert_eq!(warned, [("data.mesh.defaultConfig.discoveryAddress", 10)]);

    let rows = [
        // What is not valid has its line in the file, in text of any form.
        (map("  mesh: |\n    accessLogFile: /a\n    connectTimeout: 0s\n"), "data.mesh.connectTimeout", 9),
        (map("  mesh: \"accessLogFile: /a\\nconnectTimeout: 0s\\n\"\n"), "data.mesh.connectTimeout", 7),
        (map("  mesh:\n    \"accessLogFile: /a\\nconnectTimeout: 0s\\n\"\n"), "data.mesh.connectTimeout", 8),
        (map("  mesh: |\n    nothing: 1\n"), "data.mesh.nothing", 8),
        (map("  mesh: |\n    a: [\n"), "data.mesh", 7),
        (map("  mesh: text\n"), "data.mesh", 7),
        (map("  mesh: [a]\n"), "data.mesh", 7),
    ];
    for (text, path, line) in rows {
        let p = parse_text(&text);
        let all: Vec<_> = p.report.errors.iter().map(|e| (e.path.as_str(), e.line)).collect();
        assert_eq!(all, [(path, line)], "{text}\n{:?}", p.report);
        // What was valid stays in force: it is known whose this is.
        assert!(p.key.is_some_and(|k| k.name == "mesh"));
    }
    // In a list, as it is printed by Kubernetes' own tool.
    let item: String =
        map("  mesh: |\n    connectTimeout: 0s\n").lines().map(|l| format!("  {l}\n")).collect();
    let p = parse_text(&format!("apiVersion: v1\nkind: List\nitems:\n- {}", item.trim_start()));
    assert_eq!(
        (p.report.errors[0].path.as_str(), p.report.errors[0].line),
        ("items[0].data.mesh.connectTimeout", 11)
    );

    let networks = text.replace("networks: {}", "networks: {a: {endpoints: [{fromRegistry: b}]}}");
    let warned = parse_text(&networks).report.warnings.clone();
    assert!(warned.iter().any(|w| w.path == "data.meshNetworks" && w.line == 12), "{warned:?}");
    // Another is not the mesh's, whatever it holds; nor is one without settings.
    for other in [text.replace("name: istio", "name: app"), text.replace("  mesh: |-", "  other: |-")] {
        let p = parse_text(&other);
        assert!(p.ignored && p.report.valid, "{:?}", p.report);
    }
}
