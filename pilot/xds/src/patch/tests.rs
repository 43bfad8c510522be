//! Each kind of object, operation and match: one row a case.

mod listeners;
mod routes;

use envoy_types::pb::envoy::config::cluster::v3 as c;
use mesh_model::authored::PatchContext as Side;
use serde_json::{Value as Json, json};

use super::*;
use crate::{
    codec, pb,
    type_url::{CDS, ECDS, LDS},
};
use mesh_model::proxy as model;

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
            hcm(
                json!({"append_x_forwarded_port": true, "generate_request_id": false, "request_timeout": "7s"}),
            ),
            None,
        ),
        ("NETWORK_FILTER", "MERGE", hcm(json!({"skip_xff_append": true})), Some("skip_xff_append")),
        ("LISTENER", "MERGE", json!({"per_connection_buffer_limit_bytes": 1}), None),
        ("LISTENER", "MERGE", json!({"tcp_backlog_size": 1}), Some("tcp_backlog_size")),
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
