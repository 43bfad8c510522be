//! Each kind of object, operation and match: one row a case.

use envoy_types::pb::envoy::config::{
    cluster::v3 as c, listener::v3 as l, listener::v3::filter::ConfigType, route::v3 as r,
};
use mesh_model::authored::PatchContext as Side;
use serde_json::{Value as Json, json};

use super::*;

const HCM: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const LUA: &str = "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua";
const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
const CORS: &str = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors";
const TCP: &str = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const NETWORK_RBAC: &str = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC";
const INSPECTOR: &str = "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector";
const LIMIT: &str = "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";

fn wire(message: &'static str, type_url: &str, v: &Json) -> pb::Any {
    pb::Any { type_url: type_url.into(), value: Tree::of(message, v).unwrap().encode().into() }
}

fn http(name: &str, t: &str) -> Json {
    json!({"name": name, "typed_config": {"@type": t}})
}

fn the_listener() -> model::Listener {
    let hcm = json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": {"@type": HCM,
        "stat_prefix": "in",
        "route_config": {"name": "inbound|9080||", "virtual_hosts": [{"name": "own", "domains": ["*"], "routes": [
            {"name": "default", "match": {"prefix": "/"}, "route": {"cluster": "inbound|9080||"}}]}]},
        "http_filters": [http("envoy.filters.http.rbac", RBAC), http("envoy.filters.http.cors", CORS),
            http("envoy.filters.http.router", ROUTER)]}});
    let tcp = json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {"@type": TCP, "stat_prefix": "t",
        "cluster": "inbound|9000||"}});
    let rbac = json!({"name": "envoy.filters.network.rbac", "typed_config": {"@type": NETWORK_RBAC, "stat_prefix": "r"}});
    let v = json!({
        "name": "virtualInbound",
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15006}},
        "traffic_direction": "INBOUND",
        "listener_filters": [http("envoy.filters.listener.tls_inspector", INSPECTOR)],
        "filter_chains": [
            {"name": "web", "filter_chain_match": {"destination_port": 9080, "transport_protocol": "raw_buffer",
                "application_protocols": ["http/1.1", "h2c"]}, "filters": [hcm]},
            {"name": "bytes", "filter_chain_match": {"destination_port": 9000, "server_names": ["a.test"]},
                "filters": [rbac, tcp.clone()]}],
        "default_filter_chain": {"name": "rest", "filters": [tcp]},
    });
    codec::decode_listener(&wire("envoy.config.listener.v3.Listener", LDS, &v)).unwrap()
}

fn the_routes(name: &str) -> model::RouteConfiguration {
    let v = json!({"name": name, "virtual_hosts": [
        {"name": "a:80", "domains": ["a", "a:80"], "routes": [
            {"name": "one", "match": {"prefix": "/x"}, "redirect": {"host_redirect": "b"}},
            {"name": "two", "match": {"prefix": "/"}, "route": {"cluster": "outbound|80||a", "timeout": "3s"}}]},
        {"name": "b:80", "domains": ["b"], "routes": [
            {"name": "two", "match": {"prefix": "/"}, "direct_response": {"status": 200}}]}]});
    codec::decode_route(&wire("envoy.config.route.v3.RouteConfiguration", crate::type_url::RDS, &v)).unwrap()
}

fn the_cluster(name: &str) -> model::Cluster {
    let v = json!({"name": name, "type": "STATIC", "connect_timeout": "10s", "load_assignment": {"cluster_name": name},
        "circuit_breakers": {"thresholds": [{"max_requests": 7}]}});
    codec::decode_cluster(&wire("envoy.config.cluster.v3.Cluster", CDS, &v)).unwrap()
}

fn patch(v: &Json) -> Patch {
    Patch::new(&serde_json::from_value(v.clone()).unwrap_or_else(|e| panic!("{e}: {v}"))).unwrap()
}

fn made<M: std::fmt::Debug>(o: &Outcome<M>) -> Result<Option<pb::Any>, String> {
    if let Some((_, why)) = o.refused.first() {
        return Err(why.clone());
    }
    match &o.made {
        Made::Wire(any, _) => Ok(Some(any.clone())),
        Made::Same => Ok(None),
        Made::Removed => Err("removed".into()),
        Made::Model(m) => panic!("{m:?}"),
    }
}

fn show_listener(any: &pb::Any) -> String {
    let m: l::Listener = codec::unpack(any).unwrap();
    let chain = |c: &l::FilterChain| {
        let filters: Vec<String> = c
            .filters
            .iter()
            .map(|f| {
                let name = last(&f.name);
                match listener::manager(f) {
                    Some(m) => {
                        let all: Vec<_> = m.http_filters.iter().map(|f| last(&f.name)).collect();
                        format!("{name}({})", all.join(" "))
                    }
                    None => name.to_owned(),
                }
            })
            .collect();
        format!("{}[{}]", c.name, filters.join(" "))
    };
    let chains: Vec<_> = m.filter_chains.iter().chain(&m.default_filter_chain).map(chain).collect();
    let before: Vec<_> = m.listener_filters.iter().map(|f| last(&f.name)).collect();
    format!("{}: {}", before.join(" "), chains.join(" "))
}

fn last(name: &str) -> &str {
    match name.rsplit('.').next().unwrap() {
        "http_connection_manager" => "hcm",
        n => n,
    }
}

/// A patch of the listener: applyTo, its match, operation, value, and what the listener is afterwards; empty for what it
/// was.
#[test]
fn listeners() {
    let lua = json!({"name": "l.lua", "typed_config": {"@type": LUA, "default_source_code": {"inline_string": "x"}}});
    let web = "web[hcm(rbac cors router)]";
    let rest = "bytes[rbac tcp_proxy] rest[tcp_proxy]";
    let hcm = |sub: &str| {
        json!({"filterChain": {"filter": {"name": "envoy.filters.network.http_connection_manager",
            "subFilter": {"name": sub}}}})
    };
    let any = json!({});
    let all = |s: &str| format!("tls_inspector: web[hcm({s})] {rest}");
    let net = json!({"name": "n.nx", "typed_config": {"@type": "type.googleapis.com/udpa.type.v1.TypedStruct",
        "type_url": "type.googleapis.com/x.Y", "value": {"a": [1, {"b": null}]}}});
    let chain = json!({"name": "more", "filter_chain_match": {"destination_port": 1}, "filters": [
        {"name": "envoy.filters.network.tcp_proxy", "typed_config": {"@type": TCP, "stat_prefix": "t", "cluster": "c"}}]});
    let by = |chain: Json| json!({"filterChain": chain});
    let lf = |name: &str| json!({"listenerFilter": name});
    let probe = json!({"name": "p.probe", "typed_config": {"@type": INSPECTOR}});
    let net_of = |name: &str| json!({"filterChain": {"filter": {"name": name}}});
    let port = json!({"portNumber": 9080});
    type Row = (&'static str, Json, &'static str, Json, String);
    let rows: Vec<Row> = vec![
        // HTTP filters.
        (
            "HTTP_FILTER",
            hcm("envoy.filters.http.router"),
            "INSERT_BEFORE",
            lua.clone(),
            all("rbac cors lua router"),
        ),
        ("HTTP_FILTER", hcm("envoy.router"), "INSERT_BEFORE", lua.clone(), all("rbac cors lua router")),
        (
            "HTTP_FILTER",
            hcm("envoy.filters.http.rbac"),
            "INSERT_AFTER",
            lua.clone(),
            all("rbac lua cors router"),
        ),
        (
            "HTTP_FILTER",
            hcm("envoy.filters.http.cors"),
            "INSERT_FIRST",
            lua.clone(),
            all("lua rbac cors router"),
        ),
        ("HTTP_FILTER", any.clone(), "INSERT_BEFORE", lua.clone(), all("lua rbac cors router")),
        ("HTTP_FILTER", any.clone(), "INSERT_AFTER", lua.clone(), all("rbac cors lua router")),
        ("HTTP_FILTER", any.clone(), "ADD", lua.clone(), all("rbac cors lua router")),
        ("HTTP_FILTER", hcm("envoy.filters.http.cors"), "REPLACE", lua.clone(), all("rbac lua router")),
        ("HTTP_FILTER", hcm("envoy.filters.http.cors"), "REMOVE", Json::Null, all("rbac router")),
        ("HTTP_FILTER", any.clone(), "REMOVE", Json::Null, String::new()),
        ("HTTP_FILTER", hcm("nobody"), "INSERT_BEFORE", lua.clone(), String::new()),
        ("HTTP_FILTER", hcm("nobody"), "REPLACE", lua.clone(), String::new()),
        (
            "HTTP_FILTER",
            hcm("envoy.filters.http.router"),
            "INSERT_AFTER",
            lua.clone(),
            "! filter_chains[0].filters[0].http_filters: the router must be the last one, and only there"
                .into(),
        ),
        (
            "HTTP_FILTER",
            hcm("envoy.filters.http.router"),
            "REMOVE",
            Json::Null,
            "! filter_chains[0].filters[0].http_filters: the router must be the last one, and only there"
                .into(),
        ),
        // Which chains.
        ("HTTP_FILTER", port.clone(), "ADD", lua.clone(), all("rbac cors lua router")),
        ("HTTP_FILTER", json!({"portNumber": 9000}), "ADD", lua.clone(), String::new()),
        ("HTTP_FILTER", json!({"name": "virtualInbound"}), "ADD", lua.clone(), all("rbac cors lua router")),
        ("HTTP_FILTER", json!({"name": "virtualOutbound"}), "ADD", lua.clone(), String::new()),
        ("HTTP_FILTER", by(json!({"name": "web"})), "ADD", lua.clone(), all("rbac cors lua router")),
        ("HTTP_FILTER", by(json!({"name": "bytes"})), "ADD", lua.clone(), String::new()),
        (
            "NETWORK_FILTER",
            by(json!({"sni": "a.test"})),
            "INSERT_FIRST",
            net.clone(),
            format!("tls_inspector: {web} bytes[nx rbac tcp_proxy] rest[tcp_proxy]"),
        ),
        ("NETWORK_FILTER", by(json!({"sni": "b.test"})), "INSERT_FIRST", net.clone(), String::new()),
        (
            "NETWORK_FILTER",
            by(json!({"transportProtocol": "raw_buffer"})),
            "INSERT_FIRST",
            net.clone(),
            format!("tls_inspector: web[nx hcm(rbac cors router)] {rest}"),
        ),
        (
            "NETWORK_FILTER",
            by(json!({"transportProtocol": "tls"})),
            "INSERT_FIRST",
            net.clone(),
            String::new(),
        ),
        (
            "NETWORK_FILTER",
            by(json!({"applicationProtocols": "h2c,http/1.1"})),
            "INSERT_FIRST",
            net.clone(),
            format!("tls_inspector: web[nx hcm(rbac cors router)] {rest}"),
        ),
        (
            "NETWORK_FILTER",
            by(json!({"applicationProtocols": "h2c,istio"})),
            "INSERT_FIRST",
            net.clone(),
            String::new(),
        ),
        (
            "NETWORK_FILTER",
            by(json!({"destinationPort": 9000})),
            "ADD",
            net.clone(),
            format!("tls_inspector: {web} bytes[rbac nx tcp_proxy] rest[tcp_proxy]"),
        ),
        ("NETWORK_FILTER", by(json!({"transportSocket": "x"})), "ADD", net.clone(), String::new()),
        // Network filters.
        (
            "NETWORK_FILTER",
            any.clone(),
            "ADD",
            net.clone(),
            "tls_inspector: web[nx hcm(rbac cors router)] bytes[rbac nx tcp_proxy] rest[nx tcp_proxy]".into(),
        ),
        (
            "NETWORK_FILTER",
            net_of("envoy.filters.network.rbac"),
            "INSERT_AFTER",
            net.clone(),
            format!("tls_inspector: {web} bytes[rbac nx tcp_proxy] rest[tcp_proxy]"),
        ),
        (
            "NETWORK_FILTER",
            net_of("envoy.filters.network.rbac"),
            "INSERT_BEFORE",
            net.clone(),
            format!("tls_inspector: {web} bytes[nx rbac tcp_proxy] rest[tcp_proxy]"),
        ),
        (
            "NETWORK_FILTER",
            net_of("envoy.filters.network.rbac"),
            "REPLACE",
            net.clone(),
            format!("tls_inspector: {web} bytes[nx tcp_proxy] rest[tcp_proxy]"),
        ),
        (
            "NETWORK_FILTER",
            net_of("envoy.filters.network.rbac"),
            "REMOVE",
            Json::Null,
            format!("tls_inspector: {web} bytes[tcp_proxy] rest[tcp_proxy]"),
        ),
        (
            "NETWORK_FILTER",
            net_of("envoy.tcp_proxy"),
            "REMOVE",
            Json::Null,
            "! filter_chains[1].filters: envoy.filters.network.rbac must be followed by another".into(),
        ),
        (
            "NETWORK_FILTER",
            net_of("envoy.tcp_proxy"),
            "INSERT_AFTER",
            net,
            "! filter_chains[1].filters: nothing comes after envoy.filters.network.tcp_proxy".into(),
        ),
        // Listener filters.
        ("LISTENER_FILTER", any.clone(), "ADD", probe.clone(), format!("tls_inspector probe: {web} {rest}")),
        (
            "LISTENER_FILTER",
            any.clone(),
            "INSERT_FIRST",
            probe.clone(),
            format!("probe tls_inspector: {web} {rest}"),
        ),
        (
            "LISTENER_FILTER",
            lf("envoy.filters.listener.tls_inspector"),
            "INSERT_BEFORE",
            probe.clone(),
            format!("probe tls_inspector: {web} {rest}"),
        ),
        (
            "LISTENER_FILTER",
            lf("envoy.filters.listener.tls_inspector"),
            "INSERT_AFTER",
            probe.clone(),
            format!("tls_inspector probe: {web} {rest}"),
        ),
        (
            "LISTENER_FILTER",
            lf("envoy.filters.listener.tls_inspector"),
            "REPLACE",
            probe.clone(),
            format!("probe: {web} {rest}"),
        ),
        (
            "LISTENER_FILTER",
            lf("envoy.filters.listener.tls_inspector"),
            "REMOVE",
            Json::Null,
            format!(": {web} {rest}"),
        ),
        (
            "LISTENER_FILTER",
            lf("envoy.filters.listener.tls_inspector"),
            "MERGE",
            json!({"name": "l.other"}),
            format!("other: {web} {rest}"),
        ),
        ("LISTENER_FILTER", lf("nobody"), "REPLACE", probe, String::new()),
        // Filter chains.
        (
            "FILTER_CHAIN",
            any.clone(),
            "ADD",
            chain.clone(),
            format!("tls_inspector: {web} bytes[rbac tcp_proxy] more[tcp_proxy] rest[tcp_proxy]"),
        ),
        (
            "FILTER_CHAIN",
            by(json!({"name": "bytes"})),
            "REMOVE",
            Json::Null,
            format!("tls_inspector: {web} rest[tcp_proxy]"),
        ),
        (
            "FILTER_CHAIN",
            by(json!({"name": "rest"})),
            "REMOVE",
            Json::Null,
            format!("tls_inspector: {web} bytes[rbac tcp_proxy]"),
        ),
        (
            "FILTER_CHAIN",
            by(json!({"name": "web"})),
            "MERGE",
            json!({"name": "w"}),
            format!("tls_inspector: w[hcm(rbac cors router)] {rest}"),
        ),
        ("FILTER_CHAIN", any.clone(), "REMOVE", Json::Null, "! filter_chains: none is left".into()),
        (
            "FILTER_CHAIN",
            any.clone(),
            "ADD",
            json!({"name": "none"}),
            "! filter_chains[2].filters: none is left".into(),
        ),
        // Listeners.
        (
            "LISTENER",
            json!({"portNumber": 15006}),
            "MERGE",
            json!({"name": "virtualInbound"}),
            format!("tls_inspector: {web} {rest}"),
        ),
        ("LISTENER", json!({"portNumber": 9080}), "MERGE", json!({"name": "virtualInbound"}), String::new()),
        ("LISTENER", any, "REMOVE", Json::Null, "! removed".into()),
    ];
    for (to, matches, operation, value, want) in rows {
        let mut p = json!({"applyTo": to, "match": {"context": "SIDECAR_INBOUND", "listener": matches},
            "patch": {"operation": operation, "value": value}});
        let place = |context| Place { context, ..Place::default() };
        let run = |p: &Json, context| {
            let got = made(&super::listener(&the_listener(), &place(context), &[&patch(p)], None));
            got.map_or_else(|e| format!("! {e}"), |any| any.map_or(String::new(), |any| show_listener(&any)))
        };
        assert_eq!(run(&p, Side::SidecarInbound), want, "{p}");
        assert_eq!(run(&p, Side::SidecarOutbound), "", "{p}");
        assert_eq!(run(&p, Side::Gateway), "", "{p}");
        p["match"]["context"] = json!("ANY");
        assert_eq!(run(&p, Side::SidecarInbound), want, "{p}");
    }
}

#[test]
fn filters_have_classes() {
    let lua = json!({"name": "l.lua", "typed_config": {"@type": LUA}});
    for (class, want) in [
        ("UNSPECIFIED", "rbac cors lua router"),
        ("AUTHN", "lua rbac cors router"),
        ("AUTHZ", "rbac lua cors router"),
        ("STATS", "rbac cors lua router"),
    ] {
        let p = patch(
            &json!({"applyTo": "HTTP_FILTER", "patch": {"operation": "ADD", "value": lua, "filterClass": class}}),
        );
        let place = Place { context: Side::SidecarInbound, ..Place::default() };
        let any = made(&super::listener(&the_listener(), &place, &[&p], None)).unwrap().unwrap();
        assert!(show_listener(&any).contains(&format!("hcm({want})")), "{class}: {}", show_listener(&any));
    }
}

/// Configurations are merged inside if they are of the same type, and left alone if not.
#[test]
fn configurations_are_merged_inside() {
    let merge = |to: &str, sub: Json, value: Json| {
        let p = patch(&json!({"applyTo": to, "match": {"listener": {"filterChain": {"filter": sub}}},
            "patch": {"operation": "MERGE", "value": value}}));
        let place = Place { context: Side::SidecarInbound, ..Place::default() };
        let any = made(&super::listener(&the_listener(), &place, &[&p], None)).unwrap();
        any.map(|any| {
            let m: l::Listener = codec::unpack(&any).unwrap();
            listener::manager(&m.filter_chains[0].filters[0]).unwrap()
        })
    };
    let hcm = json!({"name": "envoy.filters.network.http_connection_manager"});
    let m = merge(
        "NETWORK_FILTER",
        hcm.clone(),
        json!({"typed_config": {"@type": HCM, "stream_idle_timeout": "5s", "use_remote_address": true,
            "upgrade_configs": [{"upgrade_type": "x"}]}}),
    )
    .unwrap();
    assert_eq!(m.stream_idle_timeout.unwrap().seconds, 5);
    assert!(m.use_remote_address.unwrap().value && m.http_filters.len() == 3);
    assert_eq!((m.stat_prefix.as_str(), m.upgrade_configs.len()), ("in", 1));
    assert!(
        merge("NETWORK_FILTER", hcm, json!({"typed_config": {"@type": TCP, "stat_prefix": "x"}})).is_none()
    );
    let sub = json!({"name": "envoy.filters.network.http_connection_manager", "subFilter": {"name": "envoy.filters.http.router"}});
    let m =
        merge("HTTP_FILTER", sub, json!({"typed_config": {"@type": ROUTER, "suppress_envoy_headers": true}}))
            .unwrap();
    let Some(hcm::ConfigType::TypedConfig(router)) = &m.http_filters[2].config_type else { panic!() };
    assert!(!router.value.is_empty());
}
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter as hcm;

/// Routes inside of an inbound listener.
#[test]
fn routes_in_listeners() {
    let p = patch(&json!({"applyTo": "HTTP_ROUTE", "match": {"routeConfiguration": {"portNumber": 9080}},
        "patch": {"operation": "MERGE", "value": {"route": {"timeout": "9s"}}}}));
    let place = Place { context: Side::SidecarInbound, ..Place::default() };
    let any = made(&super::listener(&the_listener(), &place, &[&p], None)).unwrap().unwrap();
    let m: l::Listener = codec::unpack(&any).unwrap();
    let Some(ConfigType::TypedConfig(c)) = &m.filter_chains[0].filters[0].config_type else { panic!() };
    assert!(
        format!("{:?}", listener::manager(&m.filter_chains[0].filters[0])).contains("seconds: 9"),
        "{c:?}"
    );
}

fn show_routes(any: &pb::Any) -> String {
    let m: r::RouteConfiguration = codec::unpack(any).unwrap();
    let host = |h: &r::VirtualHost| {
        let routes: Vec<_> = h.routes.iter().map(|r| r.name.as_str()).collect();
        format!("{}[{}]", h.domains.join(","), routes.join(" "))
    };
    m.virtual_hosts.iter().map(host).collect::<Vec<_>>().join(" ")
}

#[test]
fn routes() {
    let route = json!({"name": "new", "match": {"prefix": "/n"}, "direct_response": {"status": 418}});
    let host = json!({"name": "c:80", "domains": ["c"], "routes": [route]});
    let (a, b) = ("a,a:80[one two]", "b[two]");
    let any = json!({});
    let vhost = |v: Json| json!({"vhost": v});
    let named = |n: &str| json!({"vhost": {"route": {"name": n}}});
    let action = |n: &str| json!({"vhost": {"route": {"action": n}}});
    type Row = (&'static str, Json, &'static str, Json, String);
    let rows: Vec<Row> = vec![
        (
            "ROUTE_CONFIGURATION",
            any.clone(),
            "MERGE",
            json!({"virtual_hosts": [host]}),
            format!("{a} {b} c[new]"),
        ),
        (
            "ROUTE_CONFIGURATION",
            json!({"name": "80"}),
            "MERGE",
            json!({"max_direct_response_body_size_bytes": 9}),
            format!("{a} {b}"),
        ),
        ("ROUTE_CONFIGURATION", json!({"name": "81"}), "MERGE", json!({"name": "x"}), String::new()),
        ("VIRTUAL_HOST", any.clone(), "ADD", host.clone(), format!("{a} {b} c[new]")),
        ("VIRTUAL_HOST", json!({"portNumber": 80}), "ADD", host.clone(), format!("{a} {b} c[new]")),
        ("VIRTUAL_HOST", json!({"portNumber": 81}), "ADD", host.clone(), String::new()),
        ("VIRTUAL_HOST", vhost(json!({"name": "b:80"})), "REMOVE", Json::Null, a.into()),
        ("VIRTUAL_HOST", vhost(json!({"domainName": "a"})), "REMOVE", Json::Null, b.into()),
        ("VIRTUAL_HOST", vhost(json!({"domainName": "z"})), "REMOVE", Json::Null, String::new()),
        ("VIRTUAL_HOST", vhost(json!({"name": "b:80"})), "REPLACE", host, format!("{a} c[new]")),
        (
            "VIRTUAL_HOST",
            vhost(json!({"name": "b:80"})),
            "MERGE",
            json!({"domains": ["d"]}),
            format!("{a} b,d[two]"),
        ),
        (
            "VIRTUAL_HOST",
            vhost(json!({"name": "b:80"})),
            "MERGE",
            json!({"domains": ["A"]}),
            "! virtual_hosts[b:80].domains: \"A\" is one of \"a:80\"".into(),
        ),
        ("HTTP_ROUTE", any.clone(), "ADD", route.clone(), "a,a:80[one two new] b[two new]".into()),
        (
            "HTTP_ROUTE",
            vhost(json!({"name": "a:80"})),
            "ADD",
            route.clone(),
            format!("a,a:80[one two new] {b}"),
        ),
        ("HTTP_ROUTE", any.clone(), "INSERT_FIRST", route.clone(), "a,a:80[new one two] b[new two]".into()),
        ("HTTP_ROUTE", named("one"), "INSERT_FIRST", route.clone(), format!("a,a:80[new one two] {b}")),
        ("HTTP_ROUTE", named("two"), "INSERT_BEFORE", route.clone(), "a,a:80[one new two] b[new two]".into()),
        ("HTTP_ROUTE", named("one"), "INSERT_AFTER", route.clone(), format!("a,a:80[one new two] {b}")),
        ("HTTP_ROUTE", named("two"), "REMOVE", Json::Null, "a,a:80[one] b[]".into()),
        ("HTTP_ROUTE", action("REDIRECT"), "REMOVE", Json::Null, format!("a,a:80[two] {b}")),
        ("HTTP_ROUTE", action("ROUTE"), "REMOVE", Json::Null, format!("a,a:80[one] {b}")),
        ("HTTP_ROUTE", action("DIRECT_RESPONSE"), "REMOVE", Json::Null, format!("{a} b[]")),
        ("HTTP_ROUTE", named("one"), "MERGE", json!({"name": "uno"}), format!("a,a:80[uno two] {b}")),
        // Another action takes the place of the first.
        (
            "HTTP_ROUTE",
            named("one"),
            "MERGE",
            json!({"direct_response": {"status": 200}}),
            format!("{a} {b}"),
        ),
        (
            "HTTP_ROUTE",
            any,
            "ADD",
            json!({"name": "x"}),
            "! virtual_hosts[a:80].routes[2]: needs a match of the path and an action".into(),
        ),
    ];
    for (to, matches, operation, value, want) in rows {
        let p = json!({"applyTo": to, "match": {"context": "SIDECAR_OUTBOUND", "routeConfiguration": matches},
            "patch": {"operation": operation, "value": value}});
        let run = |context| {
            let place = Place { context, ..Place::default() };
            let got = made(&super::routes(&the_routes("80"), &place, &[&patch(&p)], false));
            got.map_or_else(|e| format!("! {e}"), |any| any.map_or(String::new(), |any| show_routes(&any)))
        };
        assert_eq!(run(Side::SidecarOutbound), want, "{p}");
        assert_eq!(run(Side::Gateway), "", "{p}");
    }
    // Those of a gateway say more in their name.
    for (matches, hit) in [
        (json!({"portNumber": 443, "portName": "web", "gateway": "ns/gw"}), true),
        (json!({"portName": "other"}), false),
        (json!({"gateway": "ns/other"}), false),
        (json!({"portNumber": 80}), false),
    ] {
        let p = patch(
            &json!({"applyTo": "VIRTUAL_HOST", "match": {"context": "GATEWAY", "routeConfiguration": matches},
            "patch": {"operation": "REMOVE"}}),
        );
        let place = Place { context: Side::Gateway, ..Place::default() };
        let got = made(&super::routes(&the_routes("https.443.web.gw.ns"), &place, &[&p], false)).unwrap();
        assert_eq!(got.is_some(), hit, "{matches}");
    }
}

#[test]
fn clusters() {
    let name = "outbound|9080|v1|reviews.books.svc.cluster.local";
    let rows = [
        (name, json!({}), true),
        (name, json!({"name": name}), true),
        (name, json!({"name": "other"}), false),
        (
            name,
            json!({"service": "reviews.books.svc.cluster.local", "subset": "v1", "portNumber": 9080}),
            true,
        ),
        (name, json!({"service": "ratings.books.svc.cluster.local"}), false),
        (name, json!({"subset": "v2"}), false),
        (name, json!({"portNumber": 80}), false),
        ("inbound|9080||", json!({"portNumber": 9080}), true),
        ("inbound|9080||", json!({"service": "own.books.svc.cluster.local"}), true),
        ("inbound|9080||", json!({"service": "other"}), false),
        ("outbound_.80_.v1_.a.b", json!({"service": "a.b", "subset": "v1", "portNumber": 80}), true),
        ("BlackHoleCluster", json!({"portNumber": 80}), false),
    ];
    let services = ["own.books.svc.cluster.local".to_owned()];
    for (cluster, matches, hit) in rows {
        for (operation, value) in [("MERGE", json!({"connect_timeout": "0.5s"})), ("REMOVE", Json::Null)] {
            let p = patch(&json!({"applyTo": "CLUSTER", "match": {"cluster": matches}, "patch":
                {"operation": operation, "value": value}}));
            let place = Place { context: Side::SidecarOutbound, services: &services, taken: None };
            let got = made(&super::cluster(&the_cluster(cluster), &place, &[&p], false));
            match (hit, operation) {
                (false, _) => assert_eq!(got, Ok(None), "{cluster} {matches}"),
                (true, "REMOVE") => assert_eq!(got, Err("removed".into()), "{cluster} {matches}"),
                (true, _) => {
                    let c: c::Cluster = codec::unpack(&got.unwrap().unwrap()).unwrap();
                    let t = c.connect_timeout.unwrap();
                    assert_eq!((t.seconds, t.nanos), (0, 500_000_000), "{cluster} {matches}");
                    assert_eq!(c.circuit_breakers.unwrap().thresholds.len(), 1);
                }
            }
        }
    }
}

#[test]
fn what_is_added_whole() {
    let cluster = json!({"name": "mine", "type": "STATIC"});
    for (context, outbound, inbound, gateway) in [
        ("ANY", true, false, true),
        ("SIDECAR_INBOUND", false, true, false),
        ("SIDECAR_OUTBOUND", true, false, false),
        ("GATEWAY", false, false, true),
    ] {
        let p = patch(&json!({"applyTo": "CLUSTER", "match": {"context": context},
            "patch": {"operation": "ADD", "value": cluster}}));
        for (side, hit) in
            [(Side::SidecarOutbound, outbound), (Side::SidecarInbound, inbound), (Side::Gateway, gateway)]
        {
            assert_eq!(p.adds(side).is_some(), hit, "{context} {side:?}");
        }
        assert_eq!(p.added_cluster().unwrap().name, "mine");
    }
    let broken =
        patch(&json!({"applyTo": "LISTENER", "patch": {"operation": "ADD", "value": {"name": "x"}}}));
    assert!(broken.added().unwrap_err().starts_with("address"));
    let zero = json!({"applyTo": "CLUSTER", "patch": {"operation": "ADD", "value": {"name": "x", "connect_timeout": "0s"}}});
    assert!(patch(&zero).added().unwrap_err().starts_with("connect_timeout"));
    let extension = patch(&json!({"applyTo": "EXTENSION_CONFIG", "patch": {"operation": "ADD",
        "value": {"name": "e", "typed_config": {"@type": CORS}}}}));
    assert_eq!(extension.adds(Side::Gateway), Some((ECDS, "e")));
    assert!(Extensions::of([&extension]).0.contains_key("e"));
}

/// A patch that cannot be typed is one problem with the field's path.
#[test]
fn what_cannot_be_typed() {
    for (p, field, reason) in [
        (
            json!({"applyTo": "CLUSTER", "patch": {"operation": "MERGE", "value": {"conect_timeout": "1s"}}}),
            "patch.value",
            "has no field \"conect_timeout\"",
        ),
        (
            json!({"applyTo": "CLUSTER", "patch": {"operation": "MERGE", "value": {"connect_timeout": 1}}}),
            "patch.value.connect_timeout",
            "",
        ),
        (
            json!({"applyTo": "HTTP_FILTER", "patch": {"operation": "ADD", "value": {"name": "a", "typed_config": {"@type": "x/no.Such"}}}}),
            "patch.value.typed_config",
            "\"no.Such\" is no type that is known here",
        ),
        (
            json!({"applyTo": "HTTP_FILTER", "patch": {"operation": "ADD", "value": {"name": "a", "typed_config": {"@type": LUA, "code": 1}}}}),
            "patch.value.typed_config",
            "has no field \"code\"",
        ),
        (
            json!({"applyTo": "BOOTSTRAP", "patch": {"operation": "MERGE", "value": {}}}),
            "applyTo",
            "bootstrap",
        ),
        (
            json!({"applyTo": "CLUSTER", "patch": {"operation": "INSERT_FIRST", "value": {}}}),
            "patch.operation",
            "no effect",
        ),
        (
            json!({"applyTo": "CLUSTER", "patch": {"operation": "MERGE", "value": []}}),
            "patch.value",
            "is no envoy.config",
        ),
    ] {
        let e = Patch::new(&serde_json::from_value(p).unwrap()).unwrap_err();
        assert!(e.field == field && e.reason.contains(reason), "{e}");
    }
}

/// What our own proxies honour, and what is refused for them.
#[test]
fn our_own_proxies() {
    let limit = json!({"name": "envoy.filters.http.local_ratelimit", "typed_config": {"@type": LIMIT, "stat_prefix": "x",
        "token_bucket": {"max_tokens": 2, "tokens_per_fill": 2, "fill_interval": "60s"},
        "filter_enabled": {"runtime_key": "k", "default_value": {"numerator": 100, "denominator": "HUNDRED"}},
        "filter_enforced": {"runtime_key": "k", "default_value": {"numerator": 100, "denominator": "HUNDRED"}}}});
    let lua =
        json!({"name": "lua", "typed_config": {"@type": LUA, "default_source_code": {"inline_string": "x"}}});
    let hcm = |v: Json| {
        let mut v = v;
        v["@type"] = json!(HCM);
        json!({"typed_config": v})
    };
    for (to, operation, value, refused) in [
        ("HTTP_FILTER", "ADD", limit, None),
        ("HTTP_FILTER", "ADD", lua, Some("envoy.extensions.filters.http.lua.v3.Lua")),
        ("NETWORK_FILTER", "MERGE", hcm(json!({"stream_idle_timeout": "7s"})), None),
        (
            "NETWORK_FILTER",
            "MERGE",
            hcm(json!({"common_http_protocol_options": {"idle_timeout": "7s"}})),
            None,
        ),
        (
            "NETWORK_FILTER",
            "MERGE",
            hcm(json!({"drain_timeout": "7s"})),
            Some("drain_timeout: our proxy does not look at it"),
        ),
        (
            "NETWORK_FILTER",
            "MERGE",
            hcm(json!({"stream_idle_timeout": "7s", "drain_timeout": "7s"})),
            Some("drain_timeout"),
        ),
        (
            "NETWORK_FILTER",
            "MERGE",
            hcm(json!({"append_x_forwarded_port": true})),
            Some("append_x_forwarded_port"),
        ),
        (
            "LISTENER",
            "MERGE",
            json!({"per_connection_buffer_limit_bytes": 1}),
            Some("per_connection_buffer_limit_bytes"),
        ),
        ("LISTENER", "MERGE", json!({"listener_filters_timeout": "2s"}), None),
    ] {
        let p = patch(&json!({"applyTo": to, "patch": {"operation": operation, "value": value}}));
        let place = Place { context: Side::SidecarInbound, ..Place::default() };
        let before = the_listener();
        let o = super::listener(&before, &place, &[&p], Some(&Extensions::default()));
        match (refused, &o.made, o.refused.first()) {
            (None, Made::Model(m), None) => assert_ne!(*m, before),
            (Some(why), Made::Same, Some((0, said))) => assert!(said.contains(why), "{said}"),
            other => panic!("{other:?}"),
        }
    }
    for (value, refused) in [
        (json!({"connect_timeout": "3s"}), None),
        (json!({"connect_timeout": "10s"}), None),
        (json!({"circuit_breakers": {"thresholds": [{"max_requests": 3}]}}), Some("circuit_breakers")),
        (json!({"respect_dns_ttl": true}), Some("respect_dns_ttl")),
        (json!({"outlier_detection": {"consecutive_5xx": 3}}), None),
        (json!({"dns_lookup_family": "V4_ONLY"}), Some("dns_lookup_family")),
    ] {
        let p = patch(&json!({"applyTo": "CLUSTER", "patch": {"operation": "MERGE", "value": value}}));
        let o = super::cluster(&the_cluster("c"), &Place::default(), &[&p], true);
        assert_eq!(
            o.refused.first().map(|(_, e)| e.contains(refused.unwrap_or("?"))),
            refused.map(|_| true),
            "{o:?}"
        );
    }
}

/// One that is refused leaves the others in force, in the order of their phases.
#[test]
fn each_patch_is_refused_alone() {
    let merge = |v: Json| patch(&json!({"applyTo": "CLUSTER", "patch": {"operation": "MERGE", "value": v}}));
    let (a, b, c) = (
        merge(json!({"connect_timeout": "1s"})),
        merge(json!({"connect_timeout": "0s"})),
        merge(json!({"alt_stat_name": "z"})),
    );
    let o = super::cluster(&the_cluster("c"), &Place::default(), &[&a, &b, &c], false);
    assert_eq!(o.refused.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [1]);
    let Made::Wire(any, version) = o.made else { panic!() };
    let m: c::Cluster = codec::unpack(&any).unwrap();
    assert_eq!((m.connect_timeout.unwrap().seconds, m.alt_stat_name.as_str()), (1, "z"));
    let again = super::cluster(&the_cluster("c"), &Place::default(), &[&a, &c], false);
    assert!(matches!(&again.made, Made::Wire(_, v) if *v == version));
    let other = super::cluster(&the_cluster("c"), &Place::default(), &[&a], false);
    assert!(matches!(&other.made, Made::Wire(_, v) if *v != version));
}
