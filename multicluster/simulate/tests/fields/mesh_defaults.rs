//! MeshConfig: what Istio's has for those who say nothing themselves, and what is not done here.

use serde_json::{Value, json};

use crate::{
    Base, Row, View, from, get,
    mesh_config::document,
    row,
    support::{Mesh, bookinfo},
    warned,
};

const X: &str = "GET http://ratings:9080/";

fn istio(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": kind,
        "metadata": {"name": name, "namespace": "default"}, "spec": spec})
}

fn with(documents: impl IntoIterator<Item = Value>) -> Base {
    Base::new(documents.into_iter().fold(bookinfo(), Mesh::with).with(document(json!({}))))
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all = connections();
    all.extend(services());
    all.extend(edges());
    all.extend(telemetry());
    all.extend(not_done());
    all
}

fn connections() -> Vec<Row> {
    let b = with([]);
    let config = || View::Config { from: "default/productpage-v1" };
    let server = || View::Config { from: "default/ratings-v1" };
    let ratings = |v: Value| json!({"clusters": {"outbound|9080||ratings.default.svc.cluster.local": v}});
    let listener = |name: &str, v: Value| json!({"listeners": {name: v}});
    let named = with([istio(
        "ServiceEntry",
        "named",
        json!({"hosts": ["a.example"], "resolution": "DNS",
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]}),
    )]);
    let outbound = |v: Value| json!({"clusters": {"PassthroughCluster": v}});
    let tls = |v: Value| {
        let chain = json!({"tls": v});
        listener("virtualInbound", json!({"filter_chains": [chain, {}, {}, {}, {}, {}]}))
    };
    vec![
        row(
            "MeshConfig.tcpKeepalive",
            &b,
            "/spec/tcpKeepalive",
            json!({"time": "7s"}),
            config(),
            ratings(json!({"keepalive": {"time": {"secs": 7}}})),
        ),
        row(
            "MeshConfig.defaultTrafficPolicy.connectionPool",
            &b,
            "/spec/defaultTrafficPolicy/connectionPool",
            json!({"tcp": {"maxConnections": 7}}),
            config(),
            ratings(json!({"limits": {"max_connections": 7}})),
        ),
        row(
            "MeshConfig.defaultTrafficPolicy.connectionPool",
            &b,
            "/spec/defaultTrafficPolicy/connectionPool",
            json!({"tcp": {"maxConnections": 7}}),
            config(),
            outbound(json!({"limits": {"max_connections": 7}})),
        ),
        row(
            "MeshConfig.defaultTrafficPolicy.outlierDetection",
            &b,
            "/spec/defaultTrafficPolicy/outlierDetection",
            json!({"consecutive5xxErrors": 3}),
            config(),
            ratings(json!({"outlier": {"consecutive_5xx": 3}})),
        ),
        row(
            "MeshConfig.zoneAwareLbSetting",
            &b,
            "/spec/zoneAwareLbSetting",
            json!({}),
            config(),
            ratings(json!({"locality_weighted": true})),
        ),
        row(
            "MeshConfig.protocolDetectionTimeout",
            &b,
            "/spec/protocolDetectionTimeout",
            json!("3s"),
            config(),
            listener("virtualInbound", json!({"inspect_timeout": {"secs": 3}})),
        ),
        row(
            "MeshConfig.proxyListenPort",
            &b,
            "/spec/proxyListenPort",
            json!(16001),
            config(),
            listener("virtualOutbound", json!({"address": "0.0.0.0:16001"})),
        ),
        row(
            "MeshConfig.proxyInboundListenPort",
            &b,
            "/spec/proxyInboundListenPort",
            json!(16006),
            config(),
            listener("virtualInbound", json!({"address": "0.0.0.0:16006"})),
        ),
        row(
            "MeshConfig.proxyHttpPort",
            &b,
            "/spec/proxyHttpPort",
            json!(3128),
            config(),
            listener("10.1.0.31_3128", json!({"address": "10.1.0.31:3128"})),
        ),
        row(
            "MeshConfig.inboundTrafficPolicy.mode",
            &b,
            "/spec/inboundTrafficPolicy/mode",
            json!("PASSTHROUGH"),
            server(),
            json!({"clusters": {"inbound|9080||": {"discovery": "OriginalDst"}}}),
        )
        .instead_of(json!("LOCALHOST")),
        row(
            "MeshConfig.enableAutoMtls",
            &b,
            "/spec/enableAutoMtls",
            json!(false),
            config(),
            ratings(json!({"tls_matches": []})),
        ),
        row(
            "MeshConfig.dnsRefreshRate",
            &named,
            "/spec/dnsRefreshRate",
            json!("9s"),
            config(),
            json!({"clusters": {"outbound|80||a.example": {"dns_refresh": {"secs": 9}}}}),
        ),
        row(
            "MeshConfig.h2UpgradePolicy",
            &b,
            "/spec/h2UpgradePolicy",
            json!("UPGRADE"),
            config(),
            ratings(json!({"http": "Http2"})),
        ),
        row(
            "MeshConfig.defaultHttpRetryPolicy",
            &b,
            "/spec/defaultHttpRetryPolicy",
            json!({"attempts": 7}),
            get(X),
            json!({"retries": {"attempts": 7}}),
        ),
        row(
            "MeshConfig.meshMTLS",
            &b,
            "/spec/meshMTLS",
            json!({"ecdhCurves": ["P-256"]}),
            server(),
            tls(json!({"options": {"curves": ["P-256"]}})),
        ),
        row(
            "MeshConfig.outboundClusterStatName",
            &b,
            "/spec/outboundClusterStatName",
            json!("%SERVICE%_%SERVICE_FQDN%_%SERVICE_PORT%_%SERVICE_PORT_NAME%_%SUBSET_NAME%"),
            config(),
            ratings(json!({"stat_name": "ratings.default_ratings.default.svc.cluster.local_9080_http_"})),
        ),
        row(
            "MeshConfig.inboundClusterStatName",
            &b,
            "/spec/inboundClusterStatName",
            json!("%SERVICE%:%TARGET_PORT%"),
            server(),
            json!({"clusters": {"inbound|9080||": {"stat_name": "ratings.default:9080"}}}),
        ),
    ]
}

fn services() -> Vec<Row> {
    let b = with([]);
    let routed = with([istio(
        "VirtualService",
        "vs",
        json!({"hosts": ["reviews.default.svc.cluster.local"],
        "http": [{"route": [{"destination": {"host": "reviews", "subset": "v1"}}]}]}),
    )]);
    let ruled = with([istio(
        "DestinationRule",
        "dr",
        json!({"host": "ratings.default.svc.cluster.local",
        "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}}),
    )]);
    let alone = with([json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "a", "namespace": "default"},
        "spec": {"rules": [{"from": [{"source": {"principals": ["old.example/ns/default/sa/productpage"]}}]}]}})]);
    let unknown = || json!({"cluster": "PassthroughCluster"});
    let entry = with([istio(
        "ServiceEntry",
        "named",
        json!({"hosts": ["a.example"], "resolution": "DNS",
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]}),
    )]);
    let bounded = entry.and("/spec/serviceEntryVisibility/applyToSidecars", json!(true));
    let named = |name: &str| json!({"matchLabels": {"kubernetes.io/metadata.name": name}});
    let of_namespace = bounded.and("/spec/serviceEntryVisibility/policies", json!([{"visibility": "NONE"}]));
    let visible = |field, base: &Base, at, value| {
        row(field, base, at, value, from("other/app", "GET http://a.example/"), unknown())
    };
    vec![
        visible(
            "MeshConfig.serviceEntryVisibility.defaultVisibility",
            &bounded,
            "/spec/serviceEntryVisibility/defaultVisibility",
            json!("NAMESPACE"),
        ),
        visible(
            "MeshConfig.serviceEntryVisibility.applyToSidecars",
            &entry.and("/spec/serviceEntryVisibility/defaultVisibility", json!("NAMESPACE")),
            "/spec/serviceEntryVisibility/applyToSidecars",
            json!(true),
        ),
        visible(
            "MeshConfig.serviceEntryVisibility.policies[].visibility",
            &bounded,
            "/spec/serviceEntryVisibility/policies/0/visibility",
            json!("NONE"),
        ),
        visible(
            "MeshConfig.serviceEntryVisibility.policies[].matchingRules[].namespaceSelector",
            &of_namespace,
            "/spec/serviceEntryVisibility/policies/0/matchingRules/0/namespaceSelector",
            named("default"),
        )
        .instead_of(named("other")),
        row(
            "MeshConfig.defaultServiceExportTo",
            &b,
            "/spec/defaultServiceExportTo",
            json!(["."]),
            from("other/app", "GET http://ratings.default:9080/"),
            unknown(),
        ),
        row(
            "MeshConfig.defaultVirtualServiceExportTo",
            &routed,
            "/spec/defaultVirtualServiceExportTo",
            json!(["."]),
            from("other/app", "GET http://reviews.default:9080/"),
            json!({"subset": ""}),
        ),
        row(
            "MeshConfig.defaultDestinationRuleExportTo",
            &ruled,
            "/spec/defaultDestinationRuleExportTo",
            json!(["."]),
            from("other/app", "GET http://ratings.default:9080/"),
            json!({"trafficPolicy": {"loadBalancer": "LEAST_REQUEST"}}),
        ),
        row(
            "MeshConfig.discoverySelectors[]",
            &b,
            "/spec/discoverySelectors",
            json!([{"matchLabels": {"kubernetes.io/metadata.name": "other"}}]),
            from("other/app", "GET http://ratings.default:9080/"),
            unknown(),
        ),
        row(
            "MeshConfig.trustDomainAliases",
            &alone,
            "/spec/trustDomainAliases",
            json!(["old.example"]),
            get(X),
            json!({"action": "forward"}),
        ),
    ]
}

fn edges() -> Vec<Row> {
    let server = json!({"port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["*"],
        "tls": {"mode": "SIMPLE", "credentialName": "c"}});
    let secure =
        with([istio("Gateway", "g", json!({"selector": {"istio": "ingressgateway"}, "servers": [server]}))]);
    let edge = || View::Config { from: "istio-system/istio-ingressgateway" };
    let listener = |v: Value| json!({"listeners": {"0.0.0.0_443": v}});
    let tls = |field, pointer, value, want: Value| {
        row(field, &secure, pointer, value, edge(), listener(json!({"filter_chains": [{"tls": want}]})))
    };
    let http = |field, pointer, value, want: Value| {
        let filters = json!([{"Http": want}]);
        row(
            field,
            &secure,
            pointer,
            value,
            edge(),
            listener(json!({"filter_chains": [{"filters": filters}]})),
        )
    };
    vec![
        tls(
            "MeshConfig.tlsDefaults.minProtocolVersion",
            "/spec/tlsDefaults/minProtocolVersion",
            json!("TLSV1_3"),
            json!({"min_version": "V1_3"}),
        ),
        tls(
            "MeshConfig.tlsDefaults.ecdhCurves",
            "/spec/tlsDefaults/ecdhCurves",
            json!(["P-256"]),
            json!({"options": {"curves": ["P-256"]}}),
        ),
        tls(
            "MeshConfig.tlsDefaults.cipherSuites",
            "/spec/tlsDefaults/cipherSuites",
            json!(["ECDHE-RSA-AES256-GCM-SHA384"]),
            json!({"options": {"ciphers": ["ECDHE-RSA-AES256-GCM-SHA384"]}}),
        ),
        http(
            "MeshConfig.defaultConfig.gatewayTopology.numTrustedProxies",
            "/spec/defaultConfig/gatewayTopology/numTrustedProxies",
            json!(2),
            json!({"trusted_hops": 2}),
        ),
        http(
            "MeshConfig.defaultConfig.gatewayTopology.forwardClientCertDetails",
            "/spec/defaultConfig/gatewayTopology/forwardClientCertDetails",
            json!("APPEND_FORWARD"),
            json!({"forward_client_cert": "AppendForward"}),
        ),
        row(
            "MeshConfig.defaultConfig.gatewayTopology.proxyProtocol",
            &secure,
            "/spec/defaultConfig/gatewayTopology/proxyProtocol",
            json!({}),
            edge(),
            listener(json!({"proxy_protocol": true})),
        ),
    ]
}

fn telemetry() -> Vec<Row> {
    let b = with([]);
    let config = || View::Config { from: "default/productpage-v1" };
    let spans = |v: Value| {
        let filters = json!([{"Http": {"tracing": v}}]);
        json!({"listeners": {"0.0.0.0_9080": {"filter_chains": [{"filters": filters}]}}})
    };
    let log = |l: Value| json!({"listeners": {"virtualInbound": {"access_log": l}}});
    let named = b
        .and(
            "/spec/extensionProviders",
            json!([{"name": "file", "envoyFileAccessLog": {"path": "/tmp/log"}}]),
        )
        .and("/spec/defaultProviders/accessLogging", json!(["file"]));
    let of_file =
        |field, pointer, value, want| row(field, &named, pointer, value, config(), log(json!([want])));
    vec![
        row(
            "MeshConfig.enableTracing",
            &b,
            "/spec/enableTracing",
            json!(false),
            config(),
            spans(Value::Null),
        ),
        row(
            "MeshConfig.defaultConfig.tracing.sampling",
            &b,
            "/spec/defaultConfig/tracing/sampling",
            json!(50),
            config(),
            spans(json!({"sampling": 5000})),
        ),
        row(
            "MeshConfig.defaultProviders.accessLogging",
            &b,
            "/spec/defaultProviders/accessLogging",
            json!(["envoy"]),
            config(),
            log(json!([{"path": "/dev/stdout"}])),
        ),
        of_file(
            "MeshConfig.extensionProviders[].envoyFileAccessLog.path",
            "/spec/extensionProviders/0/envoyFileAccessLog/path",
            json!("/tmp/other"),
            json!({"path": "/tmp/other"}),
        ),
        of_file(
            "MeshConfig.extensionProviders[].envoyFileAccessLog.logFormat.text",
            "/spec/extensionProviders/0/envoyFileAccessLog/logFormat/text",
            json!("%PROTOCOL%\n"),
            json!({"format": {"Text": "%PROTOCOL%\n"}}),
        ),
        of_file(
            "MeshConfig.extensionProviders[].envoyFileAccessLog.logFormat.labels",
            "/spec/extensionProviders/0/envoyFileAccessLog/logFormat/labels",
            json!({"p": "%PROTOCOL%"}),
            json!({"format": {"Json": {"p": "%PROTOCOL%"}}}),
        ),
        of_file(
            "MeshConfig.extensionProviders[].envoyFileAccessLog.omitEmptyValues",
            "/spec/extensionProviders/0/envoyFileAccessLog/omitEmptyValues",
            json!(true),
            json!({"omit_empty": true}),
        ),
        warned(
            "MeshConfig.defaultProviders.metrics",
            &b,
            "/spec/defaultProviders/metrics",
            json!(["stackdriver"]),
            "metrics for Prometheus",
        ),
    ]
}

/// What is decided elsewhere, or by nobody here: field, place, value, and words of the warning.
const NOT_DONE: &[(&str, &str, &str, &str)] = &[
    ("MeshConfig.enablePrometheusMerge", "/spec/enablePrometheusMerge", r#"true"#, "without effect"),
    ("MeshConfig.verifyCertificateAtClient", "/spec/verifyCertificateAtClient", r#"false"#, "as in Istio"),
    ("MeshConfig.configSources", "/spec/configSources", r#"[{}]"#, "--config of the control plane"),
    ("MeshConfig.certificates", "/spec/certificates", r#"[{}]"#, "not supported"),
    ("MeshConfig.ca", "/spec/ca", r#"{}"#, "not supported"),
    ("MeshConfig.authPolicy", "/spec/authPolicy", r#""MUTUAL_TLS""#, "PeerAuthentication"),
    ("MeshConfig.rdsRefreshDelay", "/spec/rdsRefreshDelay", r#""1s""#, "nobody polls"),
    ("MeshConfig.sdsRefreshDelay", "/spec/sdsRefreshDelay", r#""1s""#, "nobody polls"),
    ("MeshConfig.sdsUdsPath", "/spec/sdsUdsPath", r#""/a""#, "nobody polls"),
    (
        "MeshConfig.enableClientSidePolicyCheck",
        "/spec/enableClientSidePolicyCheck",
        r#"true"#,
        "not supported",
    ),
    ("MeshConfig.hboneIdleTimeout", "/spec/hboneIdleTimeout", r#""15s""#, "connectionPool.http.idleTimeout"),
    (
        "MeshConfig.serviceScopeConfigs[].namespaceSelector",
        "/spec/serviceScopeConfigs",
        r#"[{"namespaceSelector": {}}]"#,
        "ambient clusters",
    ),
    (
        "MeshConfig.serviceScopeConfigs[].servicesSelector",
        "/spec/serviceScopeConfigs",
        r#"[{"servicesSelector": {}}]"#,
        "ambient clusters",
    ),
    (
        "MeshConfig.serviceScopeConfigs[].scope",
        "/spec/serviceScopeConfigs",
        r#"[{"scope": "GLOBAL"}]"#,
        "ambient clusters",
    ),
    (
        "MeshConfig.defaultConfig.discoveryAddress",
        "/spec/defaultConfig/discoveryAddress",
        r#""a:1""#,
        "--discovery",
    ),
    (
        "MeshConfig.defaultConfig.controlPlaneAuthPolicy",
        "/spec/defaultConfig/controlPlaneAuthPolicy",
        r#""NONE""#,
        "mutual TLS",
    ),
    (
        "MeshConfig.defaultConfig.interceptionMode",
        "/spec/defaultConfig/interceptionMode",
        r#""TPROXY""#,
        "INTERCEPTION_MODE",
    ),
    ("MeshConfig.defaultConfig.serviceCluster", "/spec/defaultConfig/serviceCluster", r#""a""#, "--workload"),
    (
        "MeshConfig.defaultConfig.tracingServiceName",
        "/spec/defaultConfig/tracingServiceName",
        r#""CANONICAL_NAME_ONLY""#,
        "--workload",
    ),
    (
        "MeshConfig.defaultConfig.configPath",
        "/spec/defaultConfig/configPath",
        r#""/a""#,
        "no generated files",
    ),
    (
        "MeshConfig.defaultConfig.binaryPath",
        "/spec/defaultConfig/binaryPath",
        r#""/a""#,
        "no generated files",
    ),
    (
        "MeshConfig.defaultConfig.customConfigFile",
        "/spec/defaultConfig/customConfigFile",
        r#""/a""#,
        "--bootstrap",
    ),
    (
        "MeshConfig.defaultConfig.proxyBootstrapTemplatePath",
        "/spec/defaultConfig/proxyBootstrapTemplatePath",
        r#""/a""#,
        "no generated files",
    ),
    (
        "MeshConfig.defaultConfig.runtimeValues",
        "/spec/defaultConfig/runtimeValues",
        r#"{"a": "b"}"#,
        "Envoy's own",
    ),
    ("MeshConfig.defaultConfig.statNameLength", "/spec/defaultConfig/statNameLength", r#"1"#, "Envoy's own"),
    (
        "MeshConfig.defaultConfig.proxyStatsMatcher",
        "/spec/defaultConfig/proxyStatsMatcher",
        r#"{}"#,
        "Envoy's own",
    ),
    (
        "MeshConfig.defaultConfig.extraStatTags",
        "/spec/defaultConfig/extraStatTags",
        r#"["a"]"#,
        "Envoy's own",
    ),
    (
        "MeshConfig.defaultConfig.statsdUdpAddress",
        "/spec/defaultConfig/statsdUdpAddress",
        r#""a:1""#,
        "Envoy's own",
    ),
    (
        "MeshConfig.defaultConfig.envoyMetricsService",
        "/spec/defaultConfig/envoyMetricsService",
        r#"{}"#,
        "Envoy's own",
    ),
    (
        "MeshConfig.defaultConfig.envoyMetricsServiceAddress",
        "/spec/defaultConfig/envoyMetricsServiceAddress",
        r#""a:1""#,
        "Envoy's own",
    ),
    (
        "MeshConfig.defaultConfig.discoveryRefreshDelay",
        "/spec/defaultConfig/discoveryRefreshDelay",
        r#""1s""#,
        "pushed",
    ),
    (
        "MeshConfig.defaultConfig.connectTimeout",
        "/spec/defaultConfig/connectTimeout",
        r#""1s""#,
        "of the MeshConfig itself",
    ),
    (
        "MeshConfig.defaultConfig.availabilityZone",
        "/spec/defaultConfig/availabilityZone",
        r#""a""#,
        "--locality",
    ),
    ("MeshConfig.defaultConfig.sds", "/spec/defaultConfig/sds", r#"{}"#, "SDS"),
    ("MeshConfig.defaultConfig.meshId", "/spec/defaultConfig/meshId", r#""a""#, "trust domain"),
    (
        "MeshConfig.defaultConfig.readinessProbe",
        "/spec/defaultConfig/readinessProbe",
        r#"{}"#,
        "WorkloadGroup",
    ),
    (
        "MeshConfig.defaultConfig.holdApplicationUntilProxyStarts",
        "/spec/defaultConfig/holdApplicationUntilProxyStarts",
        r#"true"#,
        "nobody injects",
    ),
    (
        "MeshConfig.defaultConfig.caCertificatesPem",
        "/spec/defaultConfig/caCertificatesPem",
        r#"["PEM"]"#,
        "caCertificates",
    ),
    ("MeshConfig.defaultConfig.image", "/spec/defaultConfig/image", r#"{}"#, "nobody injects"),
    (
        "MeshConfig.defaultConfig.privateKeyProvider",
        "/spec/defaultConfig/privateKeyProvider",
        r#"{}"#,
        "Envoy's own",
    ),
];

fn not_done() -> Vec<Row> {
    let b = with([]);
    let parsed = |v: &str| serde_json::from_str(v).expect("JSON");
    NOT_DONE.iter().map(|(field, at, value, says)| warned(field, &b, at, parsed(value), says)).collect()
}
