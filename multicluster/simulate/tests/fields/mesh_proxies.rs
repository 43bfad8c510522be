//! MeshConfig: headers that proxies add and limits that they keep (`defaultConfig.proxyHeaders`, `connectionSettings`).

use serde_json::{Value, json};

use crate::{Base, Row, View, from, mesh_config::document, row, support::bookinfo, warned};

/// A gateway, a route there that rewrites, and settings of the mesh.
fn base() -> Base {
    let istio = |kind: &str, spec: Value| {
        json!({"apiVersion": "networking.istio.io/v1", "kind": kind,
            "metadata": {"name": "x", "namespace": "default"}, "spec": spec})
    };
    let server = json!({"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["a.example"]});
    let route = json!({"match": [{"uri": {"prefix": "/old"}}], "rewrite": {"authority": "b.example", "uri": "/new"},
        "route": [{"destination": {"host": "ratings"}}]});
    Base::new(
        bookinfo()
            .with(istio("Gateway", json!({"selector": {"istio": "ingressgateway"}, "servers": [server]})))
            .with(istio(
                "VirtualService",
                json!({"hosts": ["a.example"], "gateways": ["x"], "http": [route]}),
            ))
            .with(document(json!({}))),
    )
}

const EDGE: &str = "istio-system/istio-ingressgateway";
const REQUEST: &str = "GET http://a.example/old";

pub(crate) fn rows() -> Vec<Row> {
    let b = base();
    // What enters a workload, and a gateway.
    let inbound = |field, pointer, value, want: Value| {
        let chain = json!({"filters": [{"Http": want}]});
        let want = json!({"listeners": {"virtualInbound": {"filter_chains": [chain, {}, {}, {}, {}, {}]}}});
        row(field, &b, pointer, value, View::Config { from: "default/ratings-v1" }, want)
    };
    let edge = |field, pointer, value, want: Value| {
        let chain = json!({"filters": [{"Http": want}]});
        let want = json!({"listeners": {"0.0.0.0_80": {"filter_chains": [chain]}}});
        row(field, &b, pointer, value, View::Config { from: EDGE }, want)
    };
    let limit = |field, pointer, value, want: Value| edge(field, pointer, value, json!({"limits": want}));
    let parts = |field, pointer, value, want: Value| {
        inbound(field, pointer, value, json!({"headers": {"client_cert": want}}))
    };
    macro_rules! headers {
        ($name:literal) => {
            (
                concat!("MeshConfig.defaultConfig.proxyHeaders.", $name),
                concat!("/spec/defaultConfig/proxyHeaders/", $name),
            )
        };
    }
    macro_rules! parts {
        ($name:literal) => {
            (
                concat!("MeshConfig.defaultConfig.proxyHeaders.setCurrentClientCertDetails.", $name),
                concat!("/spec/defaultConfig/proxyHeaders/setCurrentClientCertDetails/", $name),
            )
        };
    }
    macro_rules! settings {
        ($name:literal) => {
            (
                concat!("MeshConfig.defaultConfig.connectionSettings.", $name),
                concat!("/spec/defaultConfig/connectionSettings/", $name),
            )
        };
    }
    let (server, server_at) = (
        "MeshConfig.defaultConfig.proxyHeaders.server.value",
        "/spec/defaultConfig/proxyHeaders/server/value",
    );
    let mut all = vec![
        inbound(server, server_at, json!("me"), json!({"server_name": "me"})),
        inbound(
            "MeshConfig.defaultConfig.proxyHeaders.server.disabled",
            "/spec/defaultConfig/proxyHeaders/server/disabled",
            json!(true),
            json!({"server_name": ""}),
        ),
        inbound(
            "MeshConfig.defaultConfig.proxyHeaders.requestId.disabled",
            "/spec/defaultConfig/proxyHeaders/requestId/disabled",
            json!(true),
            json!({"headers": {"request_id": false}}),
        ),
        row(
            "MeshConfig.defaultConfig.proxyHeaders.attemptCount",
            &b,
            "/spec/defaultConfig/proxyHeaders/attemptCount/disabled",
            json!(true),
            View::Config { from: "default/productpage-v1" },
            json!({"routes": {"9080": {"virtual_hosts":
                {"ratings.default.svc.cluster.local:9080": {"attempt_count": false}}}}}),
        ),
        edge(
            "MeshConfig.defaultConfig.proxyHeaders.envoyDebugHeaders",
            "/spec/defaultConfig/proxyHeaders/envoyDebugHeaders/disabled",
            json!(true),
            json!({"headers": {"suppress_envoy": true}}),
        ),
        warned(
            "MeshConfig.defaultConfig.proxyHeaders.metadataExchangeHeaders.mode",
            &b,
            "/spec/defaultConfig/proxyHeaders/metadataExchangeHeaders/mode",
            json!("IN_MESH"),
            "no proxy here sends these headers",
        ),
        row(
            "MeshConfig.defaultConfig.proxyHeaders.xForwardedHost.enabled",
            &b,
            "/spec/defaultConfig/proxyHeaders/xForwardedHost/enabled",
            json!(true),
            from(EDGE, REQUEST),
            json!({"headers": {"x-forwarded-host": "a.example"}}),
        ),
        row(
            "MeshConfig.defaultConfig.proxyHeaders.xForwardedPort",
            &b,
            "/spec/defaultConfig/proxyHeaders/xForwardedPort/enabled",
            json!(true),
            from(EDGE, REQUEST),
            json!({"headers": {"x-forwarded-port": "80"}}),
        ),
        row(
            "MeshConfig.defaultConfig.connectionSettings.httpHeadersWithUnderscoresAction",
            &b,
            "/spec/defaultConfig/connectionSettings/httpHeadersWithUnderscoresAction",
            json!("HEADERS_WITH_UNDERSCORES_REJECT_REQUEST"),
            View::Answer { from: EDGE, request: REQUEST, headers: &["a_b: 1"] },
            json!({"action": "refuse", "status": 400}),
        ),
        row(
            "MeshConfig.defaultConfig.connectionSettings.listenerPerConnectionBufferLimitBytes",
            &b,
            "/spec/defaultConfig/connectionSettings/listenerPerConnectionBufferLimitBytes",
            json!(40_000),
            View::Config { from: EDGE },
            json!({"listeners": {"0.0.0.0_80": {"buffer_limit": 40_000}}}),
        ),
        row(
            "MeshConfig.defaultConfig.connectionSettings.clusterPerConnectionBufferLimitBytes",
            &b,
            "/spec/defaultConfig/connectionSettings/clusterPerConnectionBufferLimitBytes",
            json!(40_000),
            View::Config { from: "default/productpage-v1" },
            json!({"clusters": {"outbound|9080||ratings.default.svc.cluster.local": {"buffer_limit": 40_000}}}),
        ),
    ];
    let (field, at) = headers!("forwardedClientCert");
    all.push(inbound(field, at, json!("SANITIZE"), json!({"forward_client_cert": "Sanitize"})));
    let (field, at) = headers!("preserveHttp1HeaderCase");
    all.push(inbound(field, at, json!(true), json!({"headers": {"preserve_case": true}})));
    for ((field, at), value, want) in [
        (parts!("subject"), false, json!({"subject": false})),
        (parts!("uri"), false, json!({"uri": false})),
        (parts!("dns"), false, json!({"dns": false})),
        (parts!("cert"), true, json!({"cert": true})),
        (parts!("chain"), true, json!({"chain": true})),
    ] {
        all.push(parts(field, at, json!(value), want));
    }
    let (field, at) = settings!("profile");
    let edges = json!({"merge_slashes": true, "escaped_slashes": "UnescapeAndRedirect", "idle_timeout": {"secs": 3600},
        "limits": {"request_timeout": {"secs": 300}, "underscores": "Reject", "max_concurrent_streams": 100,
            "stream_window": 65_536, "connection_window": 1_048_576}});
    all.push(edge(field, at, json!("EDGE"), edges));
    let seconds = |n: u64| json!({"secs": n});
    for ((field, at), want) in [
        (settings!("httpMaxConnectionDuration"), json!({"max_connection_duration": seconds(7)})),
        (settings!("httpDrainTimeout"), json!({"drain_timeout": seconds(7)})),
        (settings!("httpRequestTimeout"), json!({"request_timeout": seconds(7)})),
    ] {
        all.push(limit(field, at, json!("7s"), want));
    }
    for ((field, at), want) in [
        (settings!("httpIdleTimeout"), json!({"idle_timeout": seconds(7)})),
        (settings!("httpRequestHeadersTimeout"), json!({"request_headers_timeout": seconds(7)})),
        (settings!("httpStreamIdleTimeout"), json!({"stream_idle_timeout": seconds(7)})),
        (settings!("httpMaxStreamDuration"), json!({"max_stream_duration": seconds(7)})),
    ] {
        all.push(inbound(field, at, json!("7s"), want));
    }
    for ((field, at), value, want) in [
        (settings!("httpMaxConcurrentStreams"), 7, json!({"max_concurrent_streams": 7})),
        (settings!("http2InitialStreamWindowSize"), 70_000, json!({"stream_window": 70_000})),
        (settings!("http2InitialConnectionWindowSize"), 70_000, json!({"connection_window": 70_000})),
    ] {
        all.push(limit(field, at, json!(value), want));
    }
    let (field, at) = settings!("httpMergeSlashes");
    all.push(edge(field, at, json!(true), json!({"merge_slashes": true})));
    let (field, at) = settings!("httpPathWithEscapedSlashesAction");
    all.push(edge(
        field,
        at,
        json!("UNESCAPE_AND_FORWARD"),
        json!({"escaped_slashes": "UnescapeAndForward"}),
    ));
    let (field, at) = settings!("listenerConnectionLimit");
    let want = json!({"listeners": {"0.0.0.0_80": {"max_connections": 7}}});
    all.push(row(field, &b, at, json!(7), View::Config { from: EDGE }, want));
    for (field, at, value) in [
        ("MeshConfig.defaultConfig.fileFlushInterval", "/spec/defaultConfig/fileFlushInterval", json!("1s")),
        ("MeshConfig.defaultConfig.fileFlushMinSizeKb", "/spec/defaultConfig/fileFlushMinSizeKb", json!(1)),
        ("MeshConfig.defaultConfig.statsCompression", "/spec/defaultConfig/statsCompression", json!(false)),
    ] {
        all.push(warned(field, &b, at, value, "Envoy's own"));
    }
    all
}
