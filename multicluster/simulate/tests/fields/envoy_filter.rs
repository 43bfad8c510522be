//! EnvoyFilter, as our own proxies honour it. What is matched is shown by tests of the patches themselves.

use serde_json::{Value, json};

use crate::{Base, Row, View, get, row, support::bookinfo, warned};

const CLUSTER: &str = "outbound|9080||ratings.default.svc.cluster.local";

fn document(patch: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
           "metadata": {"name": "f", "namespace": "default"}, "spec": {"priority": 1, "configPatches": [patch]}})
}

pub(crate) fn rows() -> Vec<Row> {
    let base = |patch: Value| Base::new(bookinfo().with(document(patch)));
    let config = || View::Config { from: "default/productpage-v1" };
    let timeout = base(json!({"applyTo": "CLUSTER", "patch": {"operation": "MERGE", "value": {}}}));
    let seconds = |n: u32| json!({"clusters": {CLUSTER: {"connect_timeout": {"secs": n}}}});
    let buffer = json!({"name": "buffer", "typed_config":
        {"@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer", "max_request_bytes": 7}});
    let filter = base(json!({"applyTo": "HTTP_FILTER", "match": {"context": "SIDECAR_OUTBOUND"},
        "patch": {"operation": "REMOVE", "value": buffer}}));
    let answer = json!({"match": {"prefix": "/"}, "direct_response": {"status": 418}});
    let route = base(json!({"applyTo": "HTTP_ROUTE", "match": {"context": "SIDECAR_OUTBOUND"},
        "patch": {"operation": "MERGE", "value": {}}}));
    let waypoint = base(json!({"applyTo": "CLUSTER", "match": {"context": "WAYPOINT", "waypoint": {}},
        "patch": {"operation": "REMOVE"}}));
    let none = "there are no waypoints: accepted but not enforced yet";
    let listener =
        base(json!({"applyTo": "LISTENER", "match": {"listener": {}}, "patch": {"operation": "REMOVE"}}));
    vec![
        row(
            "EnvoyFilter.configPatches[].patch.value",
            &timeout,
            "/spec/configPatches/0/patch/value",
            json!({"connect_timeout": "3s"}),
            config(),
            seconds(3),
        )
        .instead_of(json!({"connect_timeout": "4s"})),
        row(
            "EnvoyFilter.configPatches[].patch.operation",
            &filter,
            "/spec/configPatches/0/patch/operation",
            json!("INSERT_FIRST"),
            config(),
            json!({"filters": {"9080": {"Buffer": 7}}}),
        )
        .instead_of(json!("REMOVE")),
        row(
            "EnvoyFilter.configPatches[].applyTo",
            &route,
            "/spec/configPatches/0",
            json!({"applyTo": "HTTP_ROUTE", "patch": {"operation": "INSERT_FIRST", "value": answer}}),
            get("GET http://ratings:9080/x"),
            json!({"action": "direct-response", "status": 418}),
        )
        .instead_of(json!({"applyTo": "CLUSTER", "patch": {"operation": "MERGE", "value": {}}})),
        warned(
            "EnvoyFilter.configPatches[].match.listener.portName",
            &listener,
            "/spec/configPatches/0/match/listener/portName",
            json!("http"),
            "without effect, as in Istio",
        ),
        warned(
            "EnvoyFilter.configPatches[].match.waypoint.portNumber",
            &waypoint,
            "/spec/configPatches/0/match/waypoint/portNumber",
            json!(1),
            none,
        ),
        warned(
            "EnvoyFilter.configPatches[].match.waypoint.route.name",
            &waypoint,
            "/spec/configPatches/0/match/waypoint/route",
            json!({"name": "a"}),
            none,
        ),
        warned(
            "EnvoyFilter.configPatches[].match.waypoint.filter",
            &waypoint,
            "/spec/configPatches/0/match/waypoint/filter",
            json!({"name": "a"}),
            none,
        ),
    ]
}
