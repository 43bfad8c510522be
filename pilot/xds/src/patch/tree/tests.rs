use envoy_types::pb::envoy::config::{cluster::v3::Cluster, route::v3::Route};
use prost::Message as _;
use serde_json::{Value as Json, json};

use super::*;

const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";

fn merged(old: Json, new: Json, replace: bool) -> Cluster {
    let old = Tree::of(CLUSTER, &old).unwrap().encode();
    let all = Tree::of(CLUSTER, &new).unwrap().merge(&old, replace).unwrap();
    Cluster::decode(all.as_slice()).unwrap()
}

/// What is merged, into what, and what that is then.
#[test]
fn merging() {
    let lists = |n: &[u32]| json!({"circuit_breakers": {"thresholds": n.iter().map(|n| json!({"max_requests": n})).collect::<Vec<_>>()}});
    let meta = |k: &str, v: u32| json!({"metadata": {"filter_metadata": {k: {"x": v}}}});
    let rows = [
        // A scalar replaces, and one that is zero says nothing.
        (json!({"name": "a"}), json!({"name": "b"}), json!({"name": "b"})),
        (json!({"name": "a"}), json!({"name": ""}), json!({"name": "a"})),
        // A duration replaces, part by part it would be 10.5 s.
        (
            json!({"connect_timeout": "1.5s"}),
            json!({"connect_timeout": "10s"}),
            json!({"connect_timeout": "10s"}),
        ),
        // A wrapper replaces, so that zero can be said.
        (
            json!({"per_connection_buffer_limit_bytes": 5}),
            json!({"per_connection_buffer_limit_bytes": 0}),
            json!({"per_connection_buffer_limit_bytes": 0}),
        ),
        // A message is merged, a list grows.
        (lists(&[1]), lists(&[2]), lists(&[1, 2])),
        // An entry of a map replaces that of its key.
        (meta("a", 1), meta("a", 2), meta("a", 2)),
        (
            meta("a", 1),
            meta("b", 2),
            json!({"metadata": {"filter_metadata": {"a": {"x": 1}, "b": {"x": 2}}}}),
        ),
        // Of a oneof there is one.
        (
            json!({"ring_hash_lb_config": {"minimum_ring_size": 5}}),
            json!({"maglev_lb_config": {}}),
            json!({"maglev_lb_config": {}}),
        ),
        (json!({"type": "EDS"}), json!({"type": "STATIC"}), json!({"type": "STATIC"})),
    ];
    for (old, new, want) in rows {
        let want = Cluster::decode(Tree::of(CLUSTER, &want).unwrap().encode().as_slice()).unwrap();
        assert_eq!(merged(old, new.clone(), false), want, "{new}");
    }
    assert_eq!(merged(lists(&[1]), lists(&[2]), true), merged(json!({}), lists(&[2]), false));
}

#[test]
fn an_any_is_merged_inside_if_it_is_of_the_same_type() {
    let tls = |v: Json| {
        let mut v = v;
        v["@type"] =
            json!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext");
        json!({"transport_socket": {"name": "tls", "typed_config": v}})
    };
    let both = merged(tls(json!({"max_session_keys": 3})), tls(json!({"sni": "a"})), false);
    assert_eq!(both, merged(json!({}), tls(json!({"sni": "a", "max_session_keys": 3})), false));
    let raw = json!({"transport_socket": {"typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"}}});
    let other = merged(tls(json!({"sni": "a"})), raw, false).transport_socket.unwrap();
    assert_eq!(other.name, "tls");
    assert!(format!("{other:?}").contains("RawBuffer") && !format!("{other:?}").contains("97"), "{other:?}");
}

#[test]
fn damage_is_told_and_what_is_unknown_stays() {
    let t = Tree::of("envoy.config.route.v3.Route", &json!({"name": "x"})).unwrap();
    assert_eq!(t.merge(&[0x0a, 5, 1], false), Err(Damaged));
    // Field 2000, a number.
    let mut old = Vec::new();
    put(&mut old, 2000, VARINT, &[1]);
    let new = t.merge(&old, false).unwrap();
    assert!(new.starts_with(&old));
    assert_eq!(Route::decode(new.as_slice()).unwrap().name, "x");
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_merged_or_refused(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..64)) {
        let t = Tree::of("envoy.config.route.v3.Route", &json!({"name": "x", "route": {"timeout": "1s"}})).unwrap();
        let _ = t.merge(&bytes, false);
    }
}
