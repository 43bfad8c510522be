//! Where spans and access logs go.

use mesh_model::proxy::{AccessLog, TagValue, TraceProvider, Tracing};
use serde_json::json;

use super::*;

fn docs(providers: Value, defaults: Value, config: Value) -> Docs {
    let mesh =
        json!({"extensionProviders": providers, "defaultProviders": defaults, "defaultConfig": config});
    let ports = json!([{"number": 4317, "name": "grpc", "protocol": "GRPC"},
        {"number": 9411, "name": "http", "protocol": "HTTP"}]);
    let collector = json!({"hosts": ["collector.example"], "location": "MESH_INTERNAL", "resolution": "STATIC",
        "ports": ports, "endpoints": [{"address": "10.9.9.9"}]});
    let zipkin = json!({"hosts": ["zipkin.tools.svc.cluster.local"], "location": "MESH_INTERNAL",
        "resolution": "STATIC", "ports": ports, "endpoints": [{"address": "10.9.9.8"}]});
    bookstore().add("MeshConfig", "mesh", mesh).add("ServiceEntry", "books/collector", collector).add(
        "ServiceEntry",
        "tools/zipkin",
        zipkin,
    )
}

fn envoy() -> NodeInfo {
    let mut n = productpage();
    n.metadata.insert("CLUSTER_ID".into(), json!("west"));
    n.user_agent = "envoy".to_owned();
    n
}

fn ours() -> NodeInfo {
    let mut n = envoy();
    n.metadata.insert("GENERATOR".into(), json!("flotilla"));
    n
}

fn tracing(docs: &Docs, node: &NodeInfo) -> Tracing {
    let w = docs.world();
    // Not everything here is for a proxy of ours to decode.
    let g = generate(&w.patched(&ProxyNode::new(node).unwrap()), &w);
    let l = &g.listeners["virtualInbound"];
    let managers = l.filter_chains.iter().flat_map(|c| &c.filters).filter_map(|f| match f {
        NetworkFilter::Http(m) => m.tracing.as_deref(),
        _ => None,
    });
    let all: Vec<_> = managers.collect();
    assert!(all.windows(2).all(|w| w[0] == w[1]));
    all[0].clone()
}

fn traced_by(provider: Value) -> Docs {
    let mut p = provider;
    p["name"] = json!("p");
    docs(json!([p]), json!({"tracing": ["p"]}), json!({}))
}

const TO: &str = "outbound|4317||collector.example";

#[test]
fn spans_of_envoys() {
    let of = |port: u16| json!({"service": "collector.example", "port": port});
    let mut datadog = of(9411);
    datadog["maxTagLength"] = json!(99);
    let d = traced_by(json!({"datadog": datadog}));
    assert_eq!(tracing(&d, &envoy()).max_path, 99);
    let want = TraceProvider::Datadog {
        cluster: TO.replace("4317", "9411"),
        host: "collector.example".into(),
        service_name: "productpage.books".into(),
    };
    assert_eq!(tracing(&d, &envoy()).provider, Some(want));
    // Ours would not know what to do with it.
    assert_eq!(tracing(&d, &ours()).provider, None);
    let s = traced_by(json!({"skywalking": of(4317)}));
    let t = tracing(&s, &envoy());
    assert!(t.upstream_spans && matches!(t.provider, Some(TraceProvider::SkyWalking(g)) if g.cluster == TO));
    assert_eq!(tracing(&s, &ours()).provider, None);
    let o = traced_by(json!({"opentelemetry": of(4317)}));
    let named = |n: &NodeInfo| match tracing(&o, n).provider {
        Some(TraceProvider::OpenTelemetry(o)) => o.service_name,
        other => panic!("{other:?}"),
    };
    assert_eq!((&*named(&envoy()), &*named(&ours())), ("productpage.books", ""));
}

#[test]
fn addresses_of_old() {
    let zipkin = |t: Value| docs(json!([]), json!({}), t);
    for at in ["zipkin.tools:9411", "zipkin.tools.svc.cluster.local:9411"] {
        let d = zipkin(json!({"tracing": {"zipkin": {"address": at}}}));
        let Some(TraceProvider::Zipkin(z)) = tracing(&d, &ours()).provider else { panic!("{at}") };
        assert_eq!(z.to.cluster, "outbound|9411||zipkin.tools.svc.cluster.local");
    }
    let d = zipkin(json!({"tracing": {"datadog": {"address": "zipkin.tools:9411"}}}));
    assert!(matches!(tracing(&d, &envoy()).provider, Some(TraceProvider::Datadog { .. })));
    assert_eq!(tracing(&d, &ours()).provider, None);
}

#[test]
fn tags() {
    let d = traced_by(json!({"opentelemetry": {"service": "collector.example", "port": 4317}}));
    let literal = |t: &Tracing, tag: &str| match &t.tags[tag] {
        TagValue::Literal(s) => s.clone(),
        other => panic!("{other:?}"),
    };
    let t = tracing(&d, &envoy());
    assert_eq!(t.tags.len(), 5);
    assert_eq!((&*literal(&t, "istio.cluster_id"), &*literal(&t, "istio.namespace")), ("west", "books"));
    assert!(tracing(&d, &ours()).tags.values().all(|t| matches!(t, TagValue::Node(_))));
    let own =
        json!({"tracing": {"enableIstioTags": false, "customTags": {"a": {"literal": {"value": "b"}}}}});
    let provider = json!([{"name": "p", "opentelemetry": {"service": "collector.example", "port": 4317}}]);
    let d = docs(provider, json!({"tracing": ["p"]}), own);
    for node in [envoy(), productpage()] {
        let t = tracing(&d, &node);
        assert_eq!((t.tags.len(), &*literal(&t, "a")), (1, "b"));
    }
}

#[test]
fn values_of_the_environment() {
    let headers = json!([{"name": "k", "envName": "PATH"}, {"name": "l", "envName": "FLOTILLA_NOWHERE"}]);
    let d = traced_by(json!({"zipkin": {"service": "collector.example", "port": 9411, "headers": headers}}));
    let Some(TraceProvider::Zipkin(z)) = tracing(&d, &ours()).provider else { panic!() };
    let of = |name: &str, value: String| (name.to_owned(), value);
    assert_eq!(z.to.headers, [of("k", std::env::var("PATH").unwrap()), of("l", String::new())]);
}

#[test]
fn a_collector_that_cannot_be_called_is_reported() {
    let problems = |d: Docs| {
        let (galley, federation) = d.states();
        let w = World::new(settings(), Reader::default().read(&galley, &federation));
        w.problems.iter().map(|p| p.message.clone()).collect::<Vec<_>>().join("\n")
    };
    let p = problems(traced_by(json!({"zipkin": {"service": "nobody.example", "port": 9411}})));
    assert!(p.contains("nobody.example") && p.contains("no spans"), "{p}");
    let p = problems(traced_by(json!({"opentelemetry": {"service": "collector.example", "port": 9411}})));
    assert!(p.contains("call the port grpc"), "{p}");
    let als = json!([{"name": "l", "envoyHttpAls": {"service": "collector.example", "port": 1}}]);
    let p = problems(docs(als, json!({"accessLogging": ["l"]}), json!({})));
    assert!(p.contains("port 1") && p.contains("no log entries"), "{p}");
}

#[test]
fn only_who_may_call_a_collector_has_it() {
    let o = json!({"opentelemetry": {"service": "collector.example", "port": 4317}});
    let narrow = json!({"egress": [{"hosts": ["./*"]}]});
    let d = traced_by(o.clone());
    assert!(tracing(&d, &ours()).provider.is_some());
    let elsewhere = json!({"hosts": ["collector.example"], "location": "MESH_INTERNAL", "resolution": "STATIC",
        "ports": [{"number": 4317, "name": "grpc", "protocol": "GRPC"}], "endpoints": [{"address": "10.9.9.9"}]});
    let d = bookstore()
        .add(
            "MeshConfig",
            "mesh",
            json!({"extensionProviders": [{"name": "p", "opentelemetry": o["opentelemetry"]},
            {"name": "l", "envoyOtelAls": o["opentelemetry"]}],
            "defaultProviders": {"tracing": ["p"], "accessLogging": ["l"]}}),
        )
        .add("ServiceEntry", "tools/collector", elsewhere)
        .add("Sidecar", "books/narrow", narrow);
    assert_eq!(tracing(&d, &ours()).provider, None);
    assert!(d.generate(&ours()).listeners["virtualInbound"].access_log.is_empty());
}

#[test]
fn proxies_with_nothing_but_what_they_ask_for_have_collectors() {
    let d = traced_by(json!({"opentelemetry": {"service": "collector.example", "port": 4317}}));
    let w = d.world();
    let node = w.patched(&ProxyNode::new(&ours()).unwrap());
    assert!(crate::generate::unasked(&node, &w).contains(&TO.to_owned()));
}

#[test]
fn access_logs() {
    let of = |kind: &str| {
        let p = json!([{"name": "l", kind: {"service": "collector.example", "port": 4317}}]);
        docs(p, json!({"accessLogging": ["l", "envoy"]}), json!({}))
    };
    let log = |d: &Docs| d.generate(&ours()).listeners["virtualInbound"].access_log.clone();
    let name = |l: &AccessLog| match l {
        AccessLog::Grpc(g) => (g.log_name.clone(), g.service.cluster.clone()),
        AccessLog::Otlp(o) => (o.log_name.clone(), o.service.cluster.clone()),
        AccessLog::File(f) => (f.path.clone(), String::new()),
    };
    for (kind, want) in [
        ("envoyHttpAls", "http_envoy_accesslog"),
        ("envoyTcpAls", "tcp_envoy_accesslog"),
        ("envoyOtelAls", "otel_envoy_accesslog"),
    ] {
        let l = log(&of(kind));
        assert_eq!(
            l.iter().map(name).collect::<Vec<_>>(),
            [(want.to_owned(), TO.to_owned()), ("/dev/stdout".to_owned(), String::new())]
        );
    }
}
