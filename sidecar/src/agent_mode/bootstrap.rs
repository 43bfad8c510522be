//! The bootstrap of an Envoy: who it is, where its secrets and its configuration come from.

use std::{net::SocketAddr, path::Path};

use anyhow::Context;
use mesh_agent::{CONTROL_PLANE_NAME, ProxyArgs, control_plane_id};
use mesh_identity::{TRUST_BUNDLE, WORKLOAD_SVID};
use mesh_xds::{NodeKind, codec::AGENT_CLUSTER};
use serde_json::{Value, json};

/// The control plane, in the bootstrap.
const XDS_CLUSTER: &str = "xds-grpc";
/// The proxy's own admin port, in the bootstrap.
const ADMIN_CLUSTER: &str = "prometheus_stats";

/// Builds the bootstrap (`envoy.config.bootstrap.v3.Bootstrap` as JSON).
///
/// Configuration comes over delta ADS from `--discovery`, which must prove to be a control plane of
/// the mesh; the SDS socket authenticates by its file mode. `--metrics` becomes a listener that
/// answers with the proxy's own statistics and nothing else of its admin pages.
///
/// # Errors
/// Names the flag that is not valid.
pub(super) fn bootstrap(args: &ProxyArgs, kind: NodeKind, sds: &Path) -> anyhow::Result<Value> {
    let process = args.process(&args.own_process()?);
    let admin = process.admin;
    let mut node = args.node(kind)?;
    // The mark of our own proxy, which is configured with what Envoy has no words for.
    node.metadata.remove("GENERATOR");
    let (host, port) = args
        .discovery
        .rsplit_once(':')
        .and_then(|(h, p)| Some((h.trim_start_matches('[').trim_end_matches(']'), p.parse::<u16>().ok()?)))
        .filter(|(h, _)| !h.is_empty())
        .with_context(|| format!("--discovery {:?}: expected host:port", args.discovery))?;
    let discovery = if host.parse::<std::net::IpAddr>().is_ok() { "STATIC" } else { "STRICT_DNS" };
    let sds = sds.to_str().with_context(|| format!("--sds {}: not UTF-8", sds.display()))?;
    let tls = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": CONTROL_PLANE_NAME,
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_params": {
                    "tls_minimum_protocol_version": "TLSv1_3",
                    "tls_maximum_protocol_version": "TLSv1_3",
                },
                "tls_certificate_sds_secret_configs": [secret(WORKLOAD_SVID)],
                "combined_validation_context": {
                    "default_validation_context": {
                        "match_typed_subject_alt_names":
                            [{"san_type": "URI", "matcher": {"exact": control_plane_id(args)}}],
                    },
                    "validation_context_sds_secret_config": secret(TRUST_BUNDLE),
                },
            },
        },
    });
    let mut out = json!({
        "node": {
            "id": node.id,
            "cluster": node.cluster,
            "metadata": node.metadata,
            "locality": {
                "region": node.locality.region,
                "zone": node.locality.zone,
                "sub_zone": node.locality.sub_zone,
            },
        },
        "admin": {"address": socket_address(admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {"cluster_name": XDS_CLUSTER}}],
            },
            "cds_config": {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"},
        },
        "static_resources": {
            "listeners": [metrics_listener(args.metrics)],
            "clusters": [
                {
                    "name": XDS_CLUSTER,
                    "type": discovery,
                    "connect_timeout": "5s",
                    // A control plane that vanished without a FIN is noticed within half a minute.
                    "upstream_connection_options": {
                        "tcp_keepalive": {"keepalive_time": 10, "keepalive_interval": 5, "keepalive_probes": 3},
                    },
                    "typed_extension_protocol_options": http2(),
                    "load_assignment": assignment(XDS_CLUSTER, &json!({
                        "socket_address": {"address": host, "port_value": port},
                    })),
                    "transport_socket": tls,
                },
                {
                    "name": AGENT_CLUSTER,
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "typed_extension_protocol_options": http2(),
                    "load_assignment": assignment(AGENT_CLUSTER, &json!({"pipe": {"path": sds}})),
                },
                {
                    "name": ADMIN_CLUSTER,
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "load_assignment": assignment(ADMIN_CLUSTER, &socket_address(admin)),
                },
            ],
        },
    });
    if let Some(n) = process.max_total_connections {
        out["overload_manager"] = json!({"resource_monitors": [{
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": n,
            },
        }]});
    }
    Ok(out)
}

fn secret(name: &str) -> Value {
    json!({
        "name": name,
        "sds_config": {
            "resource_api_version": "V3",
            "initial_fetch_timeout": "0s",
            "api_config_source": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {"cluster_name": AGENT_CLUSTER}}],
            },
        },
    })
}

fn socket_address(a: SocketAddr) -> Value {
    json!({"socket_address": {"address": a.ip().to_string(), "port_value": a.port()}})
}

fn assignment(name: &str, address: &Value) -> Value {
    json!({
        "cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
    })
}

fn http2() -> Value {
    json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        },
    })
}

/// The admin port can stop the proxy, so scrapers get a listener with one page.
fn metrics_listener(address: SocketAddr) -> Value {
    json!({
        "name": "metrics",
        "address": socket_address(address),
        // Whoever looks sees a proxy that is full.
        "ignore_global_conn_limit": true,
        "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "metrics",
                "route_config": {"virtual_hosts": [{
                    "name": "metrics",
                    "domains": ["*"],
                    "routes": [{"match": {"path": "/stats/prometheus"}, "route": {"cluster": ADMIN_CLUSTER}}],
                }]},
                "http_filters": [{
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
                }],
            },
        }]}],
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        proxy: ProxyArgs,
    }

    fn args(more: &[&str]) -> ProxyArgs {
        let base = ["agent", "--ip=10.1.0.5", "--workload=reviews-v1", "--namespace=books", "--cluster=west"];
        Cli::parse_from(base.iter().chain(more)).proxy
    }

    fn made(more: &[&str]) -> anyhow::Result<Value> {
        bootstrap(&args(more), NodeKind::Sidecar, Path::new("/run/sds.sock"))
    }

    #[test]
    fn the_node_is_the_sidecars_without_its_mark() {
        let b = made(&["--labels=app=reviews", "--meta=INTERCEPTION_MODE=NONE", "--locality=r/z"]).unwrap();
        let node = &b["node"];
        assert_eq!(node["id"], "sidecar~10.1.0.5~reviews-v1.books~books.svc.cluster.local");
        assert_eq!(node["metadata"]["LABELS"]["app"], "reviews");
        assert_eq!(node["metadata"]["INTERCEPTION_MODE"], "NONE");
        assert_eq!(node["metadata"]["CLUSTER_ID"], "west");
        assert_eq!(node["metadata"].get("GENERATOR"), None);
        assert_eq!(node["locality"]["zone"], "z");
    }

    #[test]
    fn what_its_own_metadata_say_of_the_process_is_in_it() {
        let b = made(&[]).unwrap();
        assert_eq!(
            (&b["admin"]["address"]["socket_address"]["port_value"], b.get("overload_manager")),
            (&json!(15000), None)
        );
        let config =
            r#"{"proxyAdminPort": 15099, "connectionSettings": {"globalDownstreamConnectionLimit": 9}}"#;
        let b = made(&[&format!("--meta=PROXY_CONFIG={config}")]).unwrap();
        assert_eq!(b["admin"]["address"]["socket_address"]["port_value"], 15099);
        let limit = &b["overload_manager"]["resource_monitors"][0]["typed_config"];
        assert_eq!(limit["max_active_downstream_connections"], 9);
        assert!(made(&["--meta=PROXY_CONFIG={"]).is_err());
    }

    #[test]
    fn the_control_plane_must_prove_itself() {
        let b = made(&["--discovery=[::1]:15012"]).unwrap();
        let xds = &b["static_resources"]["clusters"][0];
        assert_eq!(xds["type"], "STATIC");
        let to = &xds["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"];
        assert_eq!(to["socket_address"], json!({"address": "::1", "port_value": 15012}));
        let v = &xds["transport_socket"]["typed_config"]["common_tls_context"]["combined_validation_context"];
        assert_eq!(
            v["default_validation_context"]["match_typed_subject_alt_names"][0]["matcher"]["exact"],
            "spiffe://mesh.local/ns/flotilla-system/sa/control-plane"
        );
        let b = made(&["--discovery=cp.example.com:1"]).unwrap();
        assert_eq!(b["static_resources"]["clusters"][0]["type"], "STRICT_DNS");
        for bad in ["--discovery=nowhere", "--discovery=:1", "--discovery=a:b"] {
            assert!(made(&[bad]).is_err(), "{bad}");
        }
    }
}
