//! MeshConfig: where spans and access logs go (`extensionProviders`, `defaultProviders`, `defaultConfig.tracing`).

use serde_json::{Value, json};

use crate::{Base, Row, View, mesh_config::document, refused, row, support::bookinfo, warned};

const HOST: &str = "collector.example";
const GRPC: &str = "outbound|4317||collector.example";
const HTTP: &str = "outbound|9411||collector.example";

/// A mesh with a collector and one provider, which takes spans or an access log.
fn base(provider: Value, role: &str) -> Base {
    let collector = json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "collector", "namespace": "default"},
        "spec": {"hosts": [HOST], "location": "MESH_INTERNAL", "resolution": "STATIC",
            "ports": [{"number": 4317, "name": "grpc", "protocol": "GRPC"},
                {"number": 9411, "name": "http", "protocol": "HTTP"}],
            "endpoints": [{"address": "10.9.9.9"}]}});
    let mut named = provider;
    named["name"] = json!("p");
    Base::new(
        bookinfo()
            .with(collector)
            .with(document(json!({"extensionProviders": [named], "defaultProviders": {role: ["p"]}}))),
    )
}

fn config() -> View {
    View::Config { from: "default/productpage-v1" }
}

fn spans(v: &Value) -> Value {
    let filters = json!([{"Http": {"tracing": v}}]);
    json!({"listeners": {"0.0.0.0_9080": {"filter_chains": [{"filters": filters}]}}})
}

fn logs(v: &Value) -> Value {
    json!({"listeners": {"virtualInbound": {"access_log": [v]}}})
}

macro_rules! field {
    ($kind:literal, $name:literal) => {
        (
            concat!("MeshConfig.extensionProviders[].", $kind, ".", $name),
            concat!("/spec/extensionProviders/0/", $kind, "/", $name),
        )
    };
}

pub(crate) fn rows() -> Vec<Row> {
    let mut all = zipkin();
    all.extend(open_telemetry());
    all.extend(access_logs());
    all.extend(proxies());
    all
}

fn zipkin() -> Vec<Row> {
    let z = base(json!({"zipkin": {"service": HOST, "port": 9411}}), "tracing");
    let of = |(name, pointer), value: Value, want: Value| {
        row(name, &z, pointer, value, config(), spans(&json!({"provider": {"Zipkin": want}})))
    };
    let none = base(json!({"zipkin": {"service": "nobody.example", "port": 9411}}), "tracing");
    let whole = spans(&json!({"provider": {"Zipkin": {"to": {"cluster": HTTP, "authority": HOST}}}}));
    let other = base(json!({"zipkin": {"service": HOST, "port": 4317}}), "tracing");
    let undecided = base(json!({"zipkin": {"service": HOST, "port": 9411}}), "accessLogging");
    vec![
        row(
            "MeshConfig.defaultProviders.tracing",
            &undecided,
            "/spec/defaultProviders/tracing",
            json!(["p"]),
            config(),
            whole.clone(),
        ),
        row(
            "MeshConfig.extensionProviders[].zipkin.service",
            &none,
            "/spec/extensionProviders/0/zipkin/service",
            json!(HOST),
            config(),
            whole.clone(),
        ),
        row(
            "MeshConfig.extensionProviders[].zipkin.port",
            &other,
            "/spec/extensionProviders/0/zipkin/port",
            json!(9411),
            config(),
            whole,
        ),
        of(field!("zipkin", "path"), json!("/spans"), json!({"to": {"path": "/spans"}})),
        of(field!("zipkin", "enable64bitTraceId"), json!(true), json!({"long_ids": false})),
        of(
            field!("zipkin", "traceContextOption"),
            json!("USE_B3_WITH_W3C_PROPAGATION"),
            json!({"w3c": true}),
        ),
        of(field!("zipkin", "timeout"), json!("2s"), json!({"to": {"timeout": {"secs": 2}}})),
        of(
            field!("zipkin", "headers"),
            json!([{"name": "k", "value": "v"}]),
            json!({"to": {"headers": [["k", "v"]]}}),
        )
        .named("MeshConfig.extensionProviders[].zipkin.headers[].name"),
        of(
            field!("zipkin", "headers"),
            json!([{"name": "k", "value": "w"}]),
            json!({"to": {"headers": [["k", "w"]]}}),
        )
        .named("MeshConfig.extensionProviders[].zipkin.headers[].value"),
        row(
            "MeshConfig.extensionProviders[].zipkin.maxTagLength",
            &z,
            "/spec/extensionProviders/0/zipkin/maxTagLength",
            json!(99),
            config(),
            spans(&json!({"max_path": 99})),
        ),
    ]
}

fn open_telemetry() -> Vec<Row> {
    let o = base(json!({"opentelemetry": {"service": HOST, "port": 4317}}), "tracing");
    let over_http = base(
        json!({"opentelemetry": {"service": HOST, "port": 9411, "http": {"path": "/v1/traces"}}}),
        "tracing",
    );
    let otlp = |v: Value| spans(&json!({"provider": {"OpenTelemetry": v}}));
    let of = |(name, pointer), value: Value, want: Value| row(name, &o, pointer, value, config(), otlp(want));
    let http = |(name, pointer), value: Value, want: Value| {
        row(name, &over_http, pointer, value, config(), otlp(json!({"to": {"Http": want}})))
    };
    let none = base(json!({"opentelemetry": {"service": "nobody.example", "port": 4317}}), "tracing");
    let other = base(json!({"opentelemetry": {"service": HOST, "port": 9411}}), "tracing");
    let whole = otlp(json!({"to": {"Grpc": {"cluster": GRPC, "authority": HOST}}}));
    vec![
        row(
            "MeshConfig.extensionProviders[].opentelemetry.service",
            &none,
            "/spec/extensionProviders/0/opentelemetry/service",
            json!(HOST),
            config(),
            whole.clone(),
        ),
        row(
            "MeshConfig.extensionProviders[].opentelemetry.port",
            &other,
            "/spec/extensionProviders/0/opentelemetry/port",
            json!(4317),
            config(),
            whole,
        ),
        row(
            "MeshConfig.extensionProviders[].opentelemetry.maxTagLength",
            &o,
            "/spec/extensionProviders/0/opentelemetry/maxTagLength",
            json!(99),
            config(),
            spans(&json!({"max_path": 99})),
        ),
        http(field!("opentelemetry", "http/path"), json!("/other"), json!({"path": "/other"}))
            .named("MeshConfig.extensionProviders[].opentelemetry.http.path"),
        http(field!("opentelemetry", "http/timeout"), json!("2s"), json!({"timeout": {"secs": 2}}))
            .named("MeshConfig.extensionProviders[].opentelemetry.http.timeout"),
        http(
            field!("opentelemetry", "http/headers"),
            json!([{"name": "k", "value": "v"}]),
            json!({"headers": [["k", "v"]]}),
        )
        .named("MeshConfig.extensionProviders[].opentelemetry.http.headers[]"),
        of(
            field!("opentelemetry", "grpc"),
            json!({"timeout": "2s"}),
            json!({"to": {"Grpc": {"timeout": {"secs": 2}}}}),
        )
        .named("MeshConfig.extensionProviders[].opentelemetry.grpc.timeout"),
        of(
            field!("opentelemetry", "grpc"),
            json!({"initialMetadata": [{"name": "k", "value": "v"}]}),
            json!({"to": {"Grpc": {"metadata": [["k", "v"]]}}}),
        )
        .named("MeshConfig.extensionProviders[].opentelemetry.grpc.initialMetadata[]"),
        of(
            field!("opentelemetry", "resourceDetectors"),
            json!({"environment": {}}),
            json!({"environment": true}),
        )
        .named("MeshConfig.extensionProviders[].opentelemetry.resourceDetectors.environment"),
        of(
            field!("opentelemetry", "serviceAttributeEnrichment"),
            json!("OTEL_SEMANTIC_CONVENTIONS"),
            json!({"environment": true}),
        ),
        warned(
            "MeshConfig.extensionProviders[].opentelemetry.resourceDetectors.dynatrace",
            &o,
            "/spec/extensionProviders/0/opentelemetry/resourceDetectors",
            json!({"dynatrace": {}}),
            "not supported",
        ),
        warned(
            "MeshConfig.extensionProviders[].opentelemetry.dynatraceSampler",
            &o,
            "/spec/extensionProviders/0/opentelemetry/dynatraceSampler",
            json!({}),
            "not supported",
        ),
    ]
}

fn access_logs() -> Vec<Row> {
    let target = json!({"service": HOST, "port": 4317});
    let http = base(json!({"envoyHttpAls": target}), "accessLogging");
    let tcp = base(json!({"envoyTcpAls": target}), "accessLogging");
    let otlp = base(json!({"envoyOtelAls": target}), "accessLogging");
    let of = |b: &Base, (name, pointer), value: Value, want: Value| {
        row(name, b, pointer, value, config(), logs(&want))
    };
    let service = json!({"service": {"cluster": GRPC, "authority": HOST}});
    let half = |kind: &str, mut of: Value| {
        for (k, v) in [("service", json!(HOST)), ("port", json!(4317))] {
            if of[k].is_null() {
                of[k] = v;
            }
        }
        base(json!({ kind: of }), "accessLogging")
    };
    let (nobody, wrong) = (json!({"service": "nobody.example"}), json!({"port": 9411}));
    vec![
        of(
            &half("envoyHttpAls", nobody.clone()),
            field!("envoyHttpAls", "service"),
            json!(HOST),
            service.clone(),
        ),
        of(
            &half("envoyHttpAls", wrong.clone()),
            field!("envoyHttpAls", "port"),
            json!(4317),
            service.clone(),
        ),
        of(&http, field!("envoyHttpAls", "logName"), json!("n"), json!({"log_name": "n", "requests": true})),
        of(
            &http,
            field!("envoyHttpAls", "filterStateObjectsToLog"),
            json!(["s"]),
            json!({"filter_state": ["s"]}),
        ),
        of(
            &http,
            field!("envoyHttpAls", "additionalRequestHeadersToLog"),
            json!(["a"]),
            json!({"request_headers": ["a"]}),
        ),
        of(
            &http,
            field!("envoyHttpAls", "additionalResponseHeadersToLog"),
            json!(["a"]),
            json!({"response_headers": ["a"]}),
        ),
        of(
            &http,
            field!("envoyHttpAls", "additionalResponseTrailersToLog"),
            json!(["a"]),
            json!({"response_trailers": ["a"]}),
        ),
        of(&tcp, field!("envoyTcpAls", "logName"), json!("n"), json!({"log_name": "n", "requests": false}))
            .named("MeshConfig.extensionProviders[].envoyTcpAls"),
        of(&half("envoyOtelAls", nobody), field!("envoyOtelAls", "service"), json!(HOST), service.clone()),
        of(&half("envoyOtelAls", wrong), field!("envoyOtelAls", "port"), json!(4317), service),
        of(&otlp, field!("envoyOtelAls", "logName"), json!("n"), json!({"log_name": "n"})),
        of(
            &otlp,
            field!("envoyOtelAls", "logFormat"),
            json!({"text": "%PROTOCOL%", "labels": {"a": "%DURATION%"}}),
            json!({"body": "%PROTOCOL%", "attributes": {"a": "%DURATION%"}}),
        ),
    ]
}

/// `defaultConfig.tracing` and what is older.
fn proxies() -> Vec<Row> {
    let b = base(json!({"zipkin": {"service": HOST, "port": 9411}}), "accessLogging");
    let at = format!("{HOST}:9411");
    let zipkin = spans(&json!({"provider": {"Zipkin": {"to": {"cluster": HTTP, "path": "/api/v2/spans"}}}}));
    let tag = |field, value: Value, want: Value| {
        row(
            field,
            &b,
            "/spec/defaultConfig/tracing/customTags",
            json!({"t": value}),
            config(),
            spans(&json!({"tags": {"t": want}})),
        )
    };
    let service = base(json!({"prometheus": {}}), "metrics")
        .and("/spec/defaultConfig/envoyAccessLogService", json!({"address": format!("{HOST}:4317")}));
    let asked = service.and("/spec/enableEnvoyAccessLogService", json!(true));
    let nobody = asked.and("/spec/defaultConfig/envoyAccessLogService/address", json!("nobody.example:4317"));
    let entries = logs(&json!({"service": {"cluster": GRPC}, "log_name": "tcp_envoy_accesslog"}));
    let file = asked.and("/spec/accessLogFile", json!("/dev/null"));
    let rule = "DestinationRule";
    let old = |field, pointer| warned(field, &b, pointer, json!({}), "not supported, as in today's Istio");
    let gone = |field, kind: &str| {
        let provider = json!([{"name": "p", kind: {}}]);
        warned(field, &b, "/spec/extensionProviders", provider, "not supported, as in today's Istio")
    };
    vec![
        row(
            "MeshConfig.enableEnvoyAccessLogService",
            &service,
            "/spec/enableEnvoyAccessLogService",
            json!(true),
            config(),
            entries.clone(),
        ),
        row(
            "MeshConfig.defaultConfig.envoyAccessLogService.address",
            &nobody,
            "/spec/defaultConfig/envoyAccessLogService/address",
            json!(format!("{HOST}:4317")),
            config(),
            entries,
        ),
        warned(
            "MeshConfig.defaultConfig.envoyAccessLogService.tlsSettings",
            &asked,
            "/spec/defaultConfig/envoyAccessLogService/tlsSettings",
            json!({}),
            rule,
        ),
        warned(
            "MeshConfig.defaultConfig.envoyAccessLogService.tcpKeepalive",
            &asked,
            "/spec/defaultConfig/envoyAccessLogService/tcpKeepalive",
            json!({}),
            rule,
        ),
        row(
            "MeshConfig.disableEnvoyListenerLog",
            &file,
            "/spec/disableEnvoyListenerLog",
            json!(true),
            config(),
            json!({"listeners": {"virtualInbound": {"access_log": []}}}),
        ),
        tag(
            "MeshConfig.defaultConfig.tracing.customTags{}.literal.value",
            json!({"literal": {"value": "v"}}),
            json!({"Literal": "v"}),
        ),
        tag(
            "MeshConfig.defaultConfig.tracing.customTags{}.environment.name",
            json!({"environment": {"name": "V"}}),
            json!({"Environment": {"name": "V"}}),
        ),
        tag(
            "MeshConfig.defaultConfig.tracing.customTags{}.environment.defaultValue",
            json!({"environment": {"name": "V", "defaultValue": "d"}}),
            json!({"Environment": {"default": "d"}}),
        ),
        tag(
            "MeshConfig.defaultConfig.tracing.customTags{}.header",
            json!({"header": {"name": "h", "defaultValue": "d"}}),
            json!({"Header": {"name": "h", "default": "d"}}),
        ),
        refused(
            "MeshConfig.defaultConfig.tracing.customTags{}.formatter",
            &b,
            "/spec/defaultConfig/tracing/customTags",
            json!({"t": {"formatter": {"value": "%PROTOCOL%"}}}),
            "unknown field",
        ),
        row(
            "MeshConfig.defaultConfig.tracing.maxPathTagLength",
            &b,
            "/spec/defaultConfig/tracing/maxPathTagLength",
            json!(9),
            config(),
            spans(&json!({"max_path": 9})),
        ),
        row(
            "MeshConfig.defaultConfig.tracing.zipkin.address",
            &b,
            "/spec/defaultConfig/tracing/zipkin",
            json!({"address": at}),
            config(),
            zipkin.clone(),
        ),
        row(
            "MeshConfig.defaultConfig.zipkinAddress",
            &b,
            "/spec/defaultConfig/zipkinAddress",
            json!(at),
            config(),
            zipkin,
        ),
        old("MeshConfig.defaultConfig.tracing.lightstep", "/spec/defaultConfig/tracing/lightstep"),
        old("MeshConfig.defaultConfig.tracing.stackdriver", "/spec/defaultConfig/tracing/stackdriver"),
        old(
            "MeshConfig.defaultConfig.tracing.openCensusAgent",
            "/spec/defaultConfig/tracing/openCensusAgent",
        ),
        warned(
            "MeshConfig.defaultConfig.tracing.tlsSettings",
            &b,
            "/spec/defaultConfig/tracing/tlsSettings",
            json!({}),
            "DestinationRule",
        ),
        warned(
            "MeshConfig.extensionProviders[].skywalking.accessToken",
            &base(json!({"skywalking": {"service": HOST, "port": 4317}}), "tracing"),
            "/spec/extensionProviders/0/skywalking/accessToken",
            json!("t"),
            "without effect",
        ),
        gone("MeshConfig.extensionProviders[].lightstep", "lightstep"),
        gone("MeshConfig.extensionProviders[].stackdriver", "stackdriver"),
        gone("MeshConfig.extensionProviders[].opencensus", "opencensus"),
    ]
}
