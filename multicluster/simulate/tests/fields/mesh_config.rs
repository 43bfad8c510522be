//! MeshConfig.

use serde_json::{Value, json};

use crate::{
    Base, Row, View, get, refused, row,
    support::{Mesh, bookinfo},
    unenforced,
};

pub(crate) fn document(spec: Value) -> Value {
    json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"}, "spec": spec})
}

pub(crate) fn rows() -> Vec<Row> {
    let b = Base::new(bookinfo().with(document(json!({}))));
    let deny = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "none", "namespace": "roots"}, "spec": {}});
    let rooted = Base::new(bookinfo().with(deny).with(document(json!({}))));
    let place = |d: &mut Value, at: &str| d["spec"]["locality"] = json!(at);
    let mut placed = bookinfo();
    for d in placed.0.iter_mut().filter(|d| d["kind"] == "WorkloadEntry") {
        match d["metadata"]["name"].as_str() {
            Some("reviews-v1" | "productpage-v1") => place(d, "r1/z1"),
            Some("reviews-v2") => place(d, "r1/z2"),
            _ => place(d, "r2/z1"),
        }
    }
    placed.0.retain(|d| d["kind"] != "DestinationRule");
    let near = Base::new(
        placed
            .with(json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
                "metadata": {"name": "dr", "namespace": "default"},
                "spec": {"host": "reviews", "trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 5}}}}))
            .with(document(json!({}))),
    );
    let config = || View::Config { from: "default/productpage-v1" };
    let log = |l: Value| json!({"listeners": {"virtualInbound": {"access_log": [l]}}});
    let asks = |m: Value| json!({"listeners": {"virtualInbound": {"mixer": m}}});
    let logging = b.and("/spec/accessLogFile", json!("/dev/stdout"));
    let secure = Base::new(
        bookinfo()
            .with(json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "g", "namespace": "default"},
                "spec": {"selector": {"istio": "ingressgateway"}, "servers": [{"port": {"number": 443, "name": "https", "protocol": "HTTPS"},
                    "hosts": ["*"], "tls": {"mode": "SIMPLE", "credentialName": "c"}}]}}))
            .with(document(json!({}))),
    );
    let mut all = providers();
    let decode = json!({"normalization": "DECODE_AND_MERGE_SLASHES"});
    all.push(row(
        "MeshConfig.pathNormalization.normalization",
        &b,
        "/spec/pathNormalization",
        decode,
        config(),
        json!({"listeners": {"0.0.0.0_9080": {"filter_chains": [{"filters": [{"Http": {"escaped_slashes": "UnescapeAndForward", "merge_slashes": true}}]}]}}}),
    ));
    let roots = b.and("/spec/caCertificates", json!([{"pem": "PEM", "trustDomains": ["b.example"]}]));
    let signers = "MeshConfig.caCertificates[].certSigners";
    all.push(unenforced(signers, &roots, "/spec/caCertificates/0/certSigners", json!(["a"])));
    all.extend([
        row(
            "MeshConfig.trustDomain",
            &b,
            "/spec/trustDomain",
            json!("td.example"),
            get("GET http://ratings:9080/"),
            json!({"caller": {"principal": "spiffe://td.example/ns/default/sa/productpage"}}),
        ),
        row(
            "MeshConfig.rootNamespace",
            &rooted,
            "/spec/rootNamespace",
            json!("roots"),
            get("GET http://ratings:9080/"),
            json!({"action": "deny"}),
        ),
        row(
            "MeshConfig.outboundTrafficPolicy",
            &b,
            "/spec/outboundTrafficPolicy/mode",
            json!("REGISTRY_ONLY"),
            get("GET http://nobody.example:9080/"),
            json!({"status": 502}),
        ),
        row(
            "MeshConfig.outboundTrafficPolicy",
            &b,
            "/spec/outboundTrafficPolicy/mode",
            json!("ALLOW_ANY_DYNAMIC_DNS"),
            get("GET http://nobody.example:9080/"),
            json!({"cluster": "AllowAnyDynamicDNSCluster"}),
        ),
        // On a port that no service has.
        row(
            "MeshConfig.outboundTrafficPolicy",
            &b,
            "/spec/outboundTrafficPolicy/mode",
            json!("ALLOW_ANY_DYNAMIC_DNS"),
            get("GET http://nobody.example:7777/"),
            json!({"listener": "virtualOutbound", "cluster": "AllowAnyDynamicDNSCluster"}),
        ),
        row(
            "MeshConfig.outboundTrafficPolicy",
            &b.and("/spec/outboundTrafficPolicy/mode", json!("ALLOW_ANY_DYNAMIC_DNS")),
            "/spec/outboundTrafficPolicy/tls",
            json!({"mode": "SIMPLE"}),
            config(),
            json!({"clusters": {"AllowAnyDynamicDNSCluster": {"tls": {"by_name": true}}}}),
        ),
        unenforced(
            "MeshConfig.outboundTrafficPolicy",
            &b,
            "/spec/outboundTrafficPolicy",
            json!({"egressProxy": {"host": "e.example.com"}}),
        ),
        row(
            "MeshConfig.accessLogFile",
            &b,
            "/spec/accessLogFile",
            json!("/dev/stdout"),
            config(),
            log(json!({"path": "/dev/stdout"})),
        ),
        row(
            "MeshConfig.accessLogFormat",
            &logging,
            "/spec/accessLogFormat",
            json!("%PROTOCOL%\n"),
            config(),
            log(json!({"format": {"Text": "%PROTOCOL%\n"}})),
        ),
        row(
            "MeshConfig.accessLogEncoding",
            &logging,
            "/spec/accessLogEncoding",
            json!("JSON"),
            config(),
            log(json!({"format": {"Json": {"protocol": "%PROTOCOL%"}}})),
        ),
        row(
            "MeshConfig.defaultConfig.proxyMetadata",
            &b,
            "/spec/defaultConfig/proxyMetadata",
            json!({"FLOTILLA_ON_DEMAND": "true"}),
            get("GET http://ratings:9080/"),
            json!({"caller": {"onDemand": true}}),
        ),
        row(
            "MeshConfig.connectTimeout",
            &b,
            "/spec/connectTimeout",
            json!("3s"),
            get("GET http://ratings:9080/"),
            json!({"trafficPolicy": {"connectTimeout": "3s"}}),
        ),
        row(
            "MeshConfig.localityLbSetting",
            &near,
            "/spec/localityLbSetting",
            json!({"enabled": false}),
            get("GET http://reviews:9080/"),
            json!({"endpoints": [{"priority": 0}, {"priority": 0}, {"priority": 0}]}),
        ),
        row(
            "MeshConfig.traceSampling",
            &b,
            "/spec/traceSampling",
            json!(50),
            config(),
            json!({"listeners": {"0.0.0.0_9080": {"filter_chains": [{"filters": [{"Http": {"tracing": {"sampling": 5000}}}]}]}}}),
        ),
        row(
            "MeshConfig.enableQuicListeners",
            &secure,
            "/spec/enableQuicListeners",
            json!(true),
            View::Config { from: "istio-system/istio-ingressgateway" },
            json!({"listeners": {"udp_0.0.0.0_443": {"name": "udp_0.0.0.0_443"}}}),
        ),
        row(
            "MeshConfig.mixerCheckServer",
            &b,
            "/spec/mixerCheckServer",
            json!("m:9091"),
            config(),
            asks(json!({"check": "m:9091", "fail_open": false})),
        ),
        row(
            "MeshConfig.mixerReportServer",
            &b,
            "/spec/mixerReportServer",
            json!("m:9091"),
            config(),
            asks(json!({"report": "m:9091"})),
        ),
        row(
            "MeshConfig.policyCheckFailOpen",
            &b.and("/spec/mixerCheckServer", json!("m:9091")),
            "/spec/policyCheckFailOpen",
            json!(true),
            config(),
            asks(json!({"fail_open": true})),
        ),
        row(
            "MeshConfig.disablePolicyChecks",
            &b.and("/spec/mixerCheckServer", json!("m:9091")).and("/spec/mixerReportServer", json!("m:9091")),
            "/spec/disablePolicyChecks",
            json!(true),
            config(),
            asks(json!({"check": "", "report": "m:9091"})),
        ),
    ]);
    all
}

/// A mesh with an authoriser, and a provider that names it.
pub(crate) fn asking(provider: Value) -> Mesh {
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "authz", "namespace": "default"},
        "spec": {"selector": {"app": "authz"}, "ports": [{"name": "http", "port": 8000}, {"name": "grpc", "port": 9000}]}});
    let mut other = service.clone();
    other["metadata"]["name"] = json!("admin");
    bookinfo().with(service).with(other).with(document(json!({"extensionProviders": [provider]})))
}

fn providers() -> Vec<Row> {
    const HOST: &str = "authz.default.svc.cluster.local";
    let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "ask", "namespace": "default"},
        "spec": {"action": "CUSTOM", "provider": {"name": "p"}, "rules": [{}]}});
    let base = |provider: Value| {
        let mut mesh = asking(provider);
        let last = mesh.0.pop().expect("the MeshConfig");
        Base::new(mesh.with(policy.clone()).with(last))
    };
    let http = base(json!({"name": "p", "envoyExtAuthzHttp": {"service": HOST, "port": 8000}}));
    let grpc = base(json!({"name": "p", "envoyExtAuthzGrpc": {"service": HOST, "port": 9000}}));
    let config = || View::Config { from: "default/ratings-v1" };
    let asked = |v: Value| json!({"filters": {"virtualInbound-9080": {"ExtAuthz": v}}});
    let of_http = |v: Value| asked(json!({"service": {"Http": v}}));
    let of_grpc = |v: Value| asked(json!({"service": {"Grpc": v}}));
    let list = |name: &str| json!([{"kind": {"Exact": name}, "ignore_case": true}]);
    let at_http = |field, pointer, value, want| row(field, &http, pointer, value, config(), want);
    let at_grpc = |field, pointer, value, want| row(field, &grpc, pointer, value, config(), want);
    let body = |v: Value| asked(json!({"with_request_body": v}));
    vec![
        at_http(
            "MeshConfig.extensionProviders[].name",
            "/spec/extensionProviders/0/name",
            json!("p"),
            of_http(json!({"cluster": format!("outbound|8000||{HOST}")})),
        )
        .instead_of(json!("q")),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.service",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/service",
            json!("admin.default.svc.cluster.local"),
            of_http(json!({"uri": "http://admin.default.svc.cluster.local"})),
        )
        .instead_of(json!(HOST)),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.port",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/port",
            json!(9000),
            of_http(json!({"cluster": format!("outbound|9000||{HOST}")})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.timeout",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/timeout",
            json!("3s"),
            of_http(json!({"timeout": {"secs": 3}})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.pathPrefix",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/pathPrefix",
            json!("/check"),
            of_http(json!({"path_prefix": "/check"})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.failOpen",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/failOpen",
            json!(true),
            asked(json!({"failure_mode_allow": true})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.statusOnError",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/statusOnError",
            json!("503"),
            asked(json!({"status_on_error": 503})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.includeHeadersInCheck",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/includeHeadersInCheck",
            json!(["x-a"]),
            asked(json!({"allowed_headers": list("x-a")})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.includeRequestHeadersInCheck",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/includeRequestHeadersInCheck",
            json!(["x-*"]),
            asked(json!({"allowed_headers": [{"kind": {"Prefix": "x-"}, "ignore_case": true}]})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.includeAdditionalHeadersInCheck",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/includeAdditionalHeadersInCheck",
            json!({"x-b": "1"}),
            of_http(json!({"headers_to_add": [["x-b", "1"]]})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.includeRequestBodyInCheck.maxRequestBytes",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/includeRequestBodyInCheck",
            json!({"maxRequestBytes": 99}),
            body(json!({"max_bytes": 99, "allow_partial": false})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.includeRequestBodyInCheck.allowPartialMessage",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/includeRequestBodyInCheck",
            json!({"maxRequestBytes": 99, "allowPartialMessage": true}),
            body(json!({"allow_partial": true})),
        )
        .instead_of(json!({"maxRequestBytes": 99})),
        at_grpc(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.includeRequestBodyInCheck.packAsBytes",
            "/spec/extensionProviders/0/envoyExtAuthzGrpc/includeRequestBodyInCheck",
            json!({"maxRequestBytes": 99, "packAsBytes": true}),
            body(json!({"pack_as_bytes": true})),
        )
        .instead_of(json!({"maxRequestBytes": 99})),
        refused(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.includeRequestBodyInCheck.packAsBytes",
            &http,
            "/spec/extensionProviders/0/envoyExtAuthzHttp/includeRequestBodyInCheck",
            json!({"maxRequestBytes": 99, "packAsBytes": true}),
            "only a provider that speaks gRPC",
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.headersToUpstreamOnAllow",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/headersToUpstreamOnAllow",
            json!(["x-c"]),
            of_http(json!({"allowed_upstream_headers": list("x-c")})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.headersToDownstreamOnDeny",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/headersToDownstreamOnDeny",
            json!(["x-d"]),
            of_http(json!({"allowed_client_headers": list("x-d")})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.headersToDownstreamOnAllow",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/headersToDownstreamOnAllow",
            json!(["x-e"]),
            of_http(json!({"allowed_client_headers_on_success": list("x-e")})),
        ),
        at_http(
            "MeshConfig.extensionProviders[].envoyExtAuthzHttp.clearRouteCache",
            "/spec/extensionProviders/0/envoyExtAuthzHttp/clearRouteCache",
            json!(true),
            asked(json!({"clear_route_cache": true})),
        ),
        at_grpc(
            "MeshConfig.extensionProviders[].envoyExtAuthzGrpc.service",
            "/spec/extensionProviders/0/envoyExtAuthzGrpc/service",
            json!(format!("default/{HOST}")),
            of_grpc(json!({"cluster": format!("outbound|9000||{HOST}"), "authority": HOST})),
        )
        .instead_of(json!(format!("elsewhere/{HOST}"))),
        at_grpc(
            "MeshConfig.extensionProviders[].envoyExtAuthzGrpc.port",
            "/spec/extensionProviders/0/envoyExtAuthzGrpc/port",
            json!(9000),
            of_grpc(json!({"cluster": format!("outbound|9000||{HOST}")})),
        )
        // A port that does not speak it is not asked.
        .instead_of(json!(8000)),
        at_grpc(
            "MeshConfig.extensionProviders[].envoyExtAuthzGrpc.timeout",
            "/spec/extensionProviders/0/envoyExtAuthzGrpc/timeout",
            json!("3s"),
            of_grpc(json!({"timeout": {"secs": 3}})),
        ),
        at_grpc(
            "MeshConfig.extensionProviders[].envoyExtAuthzGrpc.failOpen",
            "/spec/extensionProviders/0/envoyExtAuthzGrpc/failOpen",
            json!(true),
            asked(json!({"failure_mode_allow": true})),
        ),
        at_grpc(
            "MeshConfig.extensionProviders[].envoyExtAuthzGrpc.statusOnError",
            "/spec/extensionProviders/0/envoyExtAuthzGrpc/statusOnError",
            json!("503"),
            asked(json!({"status_on_error": 503})),
        ),
        at_grpc(
            "MeshConfig.extensionProviders[].envoyExtAuthzGrpc.includeRequestBodyInCheck",
            "/spec/extensionProviders/0/envoyExtAuthzGrpc/includeRequestBodyInCheck",
            json!({"maxRequestBytes": 98}),
            body(json!({"max_bytes": 98})),
        ),
        at_grpc(
            "MeshConfig.extensionProviders[].envoyExtAuthzGrpc.clearRouteCache",
            "/spec/extensionProviders/0/envoyExtAuthzGrpc/clearRouteCache",
            json!(true),
            asked(json!({"clear_route_cache": true})),
        ),
    ]
}
