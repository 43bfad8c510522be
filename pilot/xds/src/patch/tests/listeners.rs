//! Listeners, filter chains, and filters.

use envoy_types::pb::envoy::{
    config::listener::v3::{self as l, filter::ConfigType},
    extensions::filters::network::http_connection_manager::v3::http_filter as hcm,
};

use super::*;

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
