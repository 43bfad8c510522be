use envoy_types::pb::{
    envoy::config::{cluster::v3 as c, core::v3 as core},
    google::protobuf as gp,
};
use prost::{Message as _, Name};
use serde_json::{Value, json};

use super::*;

fn translate<T: Name + Default>(v: Value) -> Result<T, String> {
    let t = Translator::new();
    let mut out = Vec::new();
    let message = t.message::<serde_json::Error>(&T::full_name()).unwrap();
    // Through text, as a file would be.
    let text = v.to_string();
    let mut d = serde_json::Deserializer::from_str(&text);
    match (MessageValue { t: &t, message, out: &mut out }).deserialize(&mut d) {
        Ok(_) => Ok(T::decode(out.as_slice()).unwrap()),
        Err(e) => Err(format!("{}: {e}", t.path())),
    }
}

#[test]
fn fields_of_every_kind() {
    let v = json!({
        "name": "a", "connectTimeout": "1.25s", "type": "STRICT_DNS", "lb_policy": 3,
        "perConnectionBufferLimitBytes": 1.0e3, "waitForWarmOnInit": false,
        "commonLbConfig": {"healthyPanicThreshold": {"value": 12.5}, "updateMergeWindow": null},
        "loadAssignment": {"clusterName": "b".repeat(300), "endpoints": [{"priority": "7"}, {}]},
        "metadata": {"filterMetadata": {"x": {"n": null, "l": [1, "two", {"three": true}], "e": {}}}},
        "transportSocket": {"name": "t", "typedConfig":
            {"@type": "type.googleapis.com/google.protobuf.UInt32Value", "value": 7}},
    });
    let c: c::Cluster = translate(v).unwrap();
    assert_eq!(c.name, "a");
    assert_eq!(c.connect_timeout, Some(gp::Duration { seconds: 1, nanos: 250_000_000 }));
    assert_eq!(c.cluster_discovery_type, Some(c::cluster::ClusterDiscoveryType::Type(1)));
    assert_eq!(c.lb_policy, 3);
    assert_eq!(c.per_connection_buffer_limit_bytes, Some(gp::UInt32Value { value: 1000 }));
    assert_eq!(c.wait_for_warm_on_init, Some(gp::BoolValue { value: false }));
    let lb = c.common_lb_config.unwrap();
    assert_eq!(lb.healthy_panic_threshold.unwrap().value, 12.5);
    assert_eq!(lb.update_merge_window, None);
    let a = c.load_assignment.unwrap();
    assert_eq!(a.cluster_name.len(), 300);
    assert_eq!(a.endpoints.iter().map(|e| e.priority).collect::<Vec<_>>(), [7, 0]);
    let mut meta = c.metadata.unwrap().filter_metadata.remove("x").unwrap().fields;
    assert_eq!(meta.remove("n").unwrap().kind, Some(gp::value::Kind::NullValue(0)));
    assert_eq!(meta.remove("e").unwrap().kind, Some(gp::value::Kind::StructValue(gp::Struct::default())));
    let Some(gp::value::Kind::ListValue(l)) = meta.remove("l").unwrap().kind else { panic!() };
    assert_eq!(l.values.len(), 3);
    let Some(core::transport_socket::ConfigType::TypedConfig(a)) = c.transport_socket.unwrap().config_type
    else {
        panic!()
    };
    assert_eq!(gp::UInt32Value::decode(a.value.as_slice()).unwrap().value, 7);
}

#[test]
fn the_type_of_an_any_may_stand_anywhere_and_be_unknown() {
    let raw = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
    for text in [
        format!(r#"{{"typed_config": {{"@type": "{raw}", "sni": "x"}}}}"#),
        format!(r#"{{"typed_config": {{"sni": "x", "@type": "{raw}"}}}}"#),
    ] {
        let s: core::TransportSocket = translate(serde_json::from_str(&text).unwrap()).unwrap();
        let Some(core::transport_socket::ConfigType::TypedConfig(a)) = s.config_type else { panic!() };
        assert_eq!(a.type_url, raw);
        assert_eq!(a.value, [18, 1, b'x']);
    }
    let s: core::TransportSocket =
        translate(json!({"typed_config": {"@type": "t/acme.Socket", "deep": [{"er": 1}]}})).unwrap();
    let Some(core::transport_socket::ConfigType::TypedConfig(a)) = s.config_type else { panic!() };
    assert_eq!((a.type_url.as_str(), a.value.len()), ("t/acme.Socket", 0));
}

#[test]
fn mistakes_are_named_by_their_path() {
    let wrong = [
        (json!({"nmae": "x"}), ": envoy.config.cluster.v3.Cluster has no field \"nmae\""),
        (
            json!({"loadAssignment": {"endpoints": [{}, {"priority": -1}]}}),
            "load_assignment.endpoints[1].priority: -1 is not a positive integer",
        ),
        (json!({"type": "STATIK"}), "type: \"STATIK\" is none of EDS, "),
        (json!({"connect_timeout": 5}), "connect_timeout: invalid type"),
        (json!({"connect_timeout": "5"}), "connect_timeout: \"5\" is not a duration"),
        (json!({"type": "EDS", "cluster_type": {"name": "x"}}), "type: another field that excludes"),
        (json!({"name": "a", "name": 1}), "name: 1 is not a string"),
        (json!({"metadata": {"filter_metadata": {"k": 1}}}), "metadata.filter_metadata[k]: invalid type"),
        (
            json!({"transport_socket": {"typed_config": {"a": 1}}}),
            "transport_socket.typed_config: \"@type\" is missing",
        ),
        (json!({"name": "a", "alt_stat_name": true}), "alt_stat_name: true is not a string"),
        (json!({"load_assignment": {"endpoints": {}}}), "load_assignment.endpoints: expected a list"),
        (json!({"load_assignment": {"endpoints": [null]}}), "load_assignment.endpoints[0]: null"),
        (json!({"wait_for_warm_on_init": "yes"}), "wait_for_warm_on_init: \"yes\" is not true or false"),
    ];
    for (v, wanted) in wrong {
        let e = translate::<c::Cluster>(v.clone()).unwrap_err();
        assert!(e.starts_with(wanted) || e.contains(wanted), "{v}: {e}");
    }
    // Both names of one field.
    let t = Translator::new();
    let message = t.message::<serde_json::Error>("envoy.config.cluster.v3.Cluster").unwrap();
    let mut d = serde_json::Deserializer::from_str(r#"{"lb_policy": 1, "lbPolicy": 1}"#);
    let e = (MessageValue { t: &t, message, out: &mut vec![] }).deserialize(&mut d).unwrap_err();
    assert!(e.to_string().contains("appears twice"), "{e}");
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,200}") {
        let t = Translator::new();
        let message = t.message::<serde_json::Error>("envoy.config.cluster.v3.Cluster").unwrap();
        let mut d = serde_json::Deserializer::from_str(&text);
        let _ = (MessageValue { t: &t, message, out: &mut vec![] }).deserialize(&mut d);
    }

    #[test]
    fn durations_survive(seconds in 0i64..315_576_000_000, nanos in 0i32..1_000_000_000) {
        let v = json!({"connect_timeout": format!("{seconds}.{nanos:09}s")});
        let c: c::Cluster = translate(v).unwrap();
        proptest::prop_assert_eq!(c.connect_timeout, Some(gp::Duration { seconds, nanos }));
    }
}
