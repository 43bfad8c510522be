use mesh_model::proxy::{Discovery, NetworkFilter, RbacAction, SecretRef, UpstreamHttp};

use super::*;

const PAIR: &str = r#"
node: {id: proxy-1, cluster: c, metadata: {NAMESPACE: books}, locality: {region: r}}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 9901}}}
stats_config: {stats_matcher: {reject_all: true}}
static_resources:
  listeners:
  - name: inbound
    address: {socket_address: {address: 127.0.0.1, port_value: 15006}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            alpn_protocols: [h2]
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            tls_certificates:
            - {certificate_chain: {filename: a.crt}, private_key: {filename: a.key}}
            validation_context: {trusted_ca: {filename: ca.crt}}
      filters:
      - name: envoy.filters.network.rbac
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC
          stat_prefix: in
          rules:
            action: ALLOW
            policies:
              client:
                permissions: [{any: true}]
                principals: [{authenticated: {principal_name: {exact: "spiffe://cluster.local/ns/default/sa/client"}}}]
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: in
          cluster: backend
  clusters:
  - name: backend
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: backend
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 80}}}}]}]
  secrets:
  - {name: roots, validation_context: {trusted_ca: {inline_string: PEM}}}
"#;

#[test]
fn a_file_is_read_whole() {
    let b = Bootstrap::from_yaml(PAIR).unwrap();
    assert_eq!((b.node.id.as_str(), b.node.cluster.as_str()), ("proxy-1", "c"));
    assert_eq!((b.node.meta("NAMESPACE"), b.node.locality.region.as_str()), (Some("books"), "r"));
    assert_eq!(b.admin, Some("127.0.0.1:9901".parse().unwrap()));
    assert_eq!(b.warnings, ["stats_config is ignored"]);
    assert_eq!(b.secrets.len(), 1);
    let c = &b.resources.clusters["backend"];
    assert_eq!(c.http, UpstreamHttp::Http2);
    assert!(matches!(&c.discovery, Discovery::Static(a) if a.localities[0].endpoints[0].port == 80));
    let chain = &b.resources.listeners["inbound"].filter_chains[0];
    let files = SecretRef::Files { chain: "a.crt".into(), key: "a.key".into() };
    assert_eq!(chain.tls.as_ref().unwrap().certificate, files);
    let NetworkFilter::Rbac(r) = &chain.filters[0] else { panic!() };
    assert_eq!(r.rules.as_ref().unwrap().action, RbacAction::Allow);
}

#[test]
fn json_says_the_same_as_yaml() {
    let tree: serde_json::Value = serde_saphyr::from_str(PAIR).unwrap();
    let json = Bootstrap::from_json(tree.to_string().as_bytes()).unwrap();
    let yaml = Bootstrap::from_yaml(PAIR).unwrap();
    assert_eq!(json.resources, yaml.resources);
    assert_eq!(json.node, yaml.node);
}

#[test]
fn what_cannot_be_honoured_is_named_and_all_of_it() {
    let text = PAIR
        .replace("type: STATIC\n", "type: STATIC\n    lb_subset_config: {fallback_policy: ANY_ENDPOINT}\n")
        .replace(
            "stats_config: {stats_matcher: {reject_all: true}}",
            "overload_manager: {refresh_interval: 1s}",
        )
        .replace(
            "stat_prefix: in\n          cluster: backend",
            "stat_prefix: in\n          on_demand: {odcds_config: {ads: {}}, resources_locator: xdstp:x}\n          cluster: backend",
        );
    let problems = Bootstrap::from_yaml(&text).unwrap_err();
    for wanted in [
        "overload_manager: is set",
        "static_resources.clusters[0].lb_subset_config: is set",
        "static_resources.listeners[0].filter_chains[0].filters[1].on_demand.resources_locator: is set",
    ] {
        assert!(problems.iter().any(|p| p.starts_with(wanted)), "{wanted}: {problems:?}");
    }
    // Nobody is there to be asked.
    let text = PAIR.replace(
        "stat_prefix: in\n          cluster: backend",
        "stat_prefix: in\n          on_demand: {odcds_config: {ads: {}}}\n          cluster: backend",
    );
    let p = Bootstrap::from_yaml(&text).unwrap_err();
    assert!(p.len() == 1 && p[0].contains("on_demand of") && p[0].contains("DELTA_GRPC"), "{p:?}");
    // A word that no message has ends the reading.
    let p = Bootstrap::from_yaml(&PAIR.replace("cluster_name:", "cluster_nam:")).unwrap_err();
    assert_eq!(p.len(), 1);
    assert!(p[0].starts_with("static_resources.clusters[0].load_assignment: "), "{p:?}");
    assert!(p[0].contains("has no field \"cluster_nam\""), "{p:?}");
    // Twice the same name.
    let clusters = r#"{"static_resources": {"clusters": [{"name": "a"}, {"name": "a"}]}}"#;
    let p = Bootstrap::from_json(clusters.as_bytes()).unwrap_err();
    assert!(p[0].starts_with("static_resources.clusters[1]: another one"), "{p:?}");
    // Syntax, with its place.
    let p = Bootstrap::from_json(b"{\"node\": {\"id\": 1").unwrap_err();
    assert!(p[0].contains("node.id") && p[0].contains("line 1"), "{p:?}");
}

const CONTROL: &str = r#"{
  "static_resources": {"clusters": [{"name": "xds", "load_assignment": {"cluster_name": "xds"}}]},
  "dynamic_resources": {
    "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3",
      "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]},
    "cds_config": {"resource_api_version": "V3", "ads": {}},
    "lds_config": {"resource_api_version": "V3", "ads": {}}
  }
}"#;

#[test]
fn the_control_plane_is_a_static_cluster() {
    let b = Bootstrap::from_json(CONTROL.as_bytes()).unwrap();
    let all = Dynamic { cluster: "xds".into(), mode: Mode::Delta, clusters: true, listeners: true };
    assert_eq!(b.dynamic, Some(all));
    let refused = [
        (
            "grpc\": {\"cluster_name\": \"xds\"",
            "grpc\": {\"cluster_name\": \"other\"",
            "dynamic_resources: \"other\" is not a static",
        ),
        ("DELTA_GRPC", "REST", "dynamic_resources.ads_config.api_type"),
        ("\"V3\",\n", "\"V2\",\n", "dynamic_resources.ads_config.transport_api_version"),
        (
            "\"ads\": {}},",
            "\"path_config_source\": {\"path\": \"x\"}},",
            "dynamic_resources.cds_config.path_config_source",
        ),
        ("ads_config\"", "cds_config\"", "dynamic_resources.cds_config"),
    ];
    for (from, to, wanted) in refused {
        let text = CONTROL.replacen(from, to, 1);
        assert_ne!(text, CONTROL, "{from}");
        let p = Bootstrap::from_json(text.as_bytes()).unwrap_err();
        assert!(p[0].starts_with(wanted), "{p:?}");
    }
    // Without a control plane nobody could say where the endpoints are.
    let p = Bootstrap::from_json(br#"{"static_resources": {"clusters": [{"name": "a", "type": "EDS"}]}}"#);
    assert!(p.unwrap_err()[0].contains("endpoints of \"a\" need an ads_config"));
}
