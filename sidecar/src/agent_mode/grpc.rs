//! The bootstrap of a gRPC library that is a member of the mesh without a proxy (gRFCs A27, A29, A36, A65).

use anyhow::Context;
use mesh_agent::ProxyArgs;
use mesh_xds::{NodeKind, codec::grpc::CERTIFICATE_PROVIDER};
use serde_json::{Value, json};

/// How often the library looks whether the files are new ones; certificates are renewed hours before they end.
const REFRESH: &str = "60s";
/// Name of the listener that a server asks for, by the address that it listens on (Istio's).
const SERVER_LISTENER: &str = "xds.istio.io/grpc/lds/inbound/%s";

/// Builds the bootstrap. Configuration comes from `--discovery` over mutual TLS, with the files that the agent keeps in
/// `--state-dir`, for the connection to the control plane as for those of calls.
///
/// The library verifies the host of `--discovery` against the control plane's certificate: it must be
/// `control-plane.flotilla-system.svc`, or the address in the control plane's `--xds`.
///
/// # Errors
/// Names the flag that is missing or not valid.
pub(super) fn bootstrap(args: &ProxyArgs) -> anyhow::Result<Value> {
    let dir = args
        .state_dir
        .as_deref()
        .context("--write-grpc-bootstrap needs --state-dir, for certificate and key")?;
    let dir = std::path::absolute(dir).with_context(|| format!("--state-dir {}", dir.display()))?;
    let dir = dir.to_str().with_context(|| format!("--state-dir {}: not UTF-8", dir.display()))?;
    let mut node = args.node(NodeKind::Sidecar)?;
    node.metadata.insert("GENERATOR".to_owned(), json!("grpc"));
    let files = json!({
        "certificate_file": format!("{dir}/svid-chain.pem"),
        "private_key_file": format!("{dir}/svid-key.pem"),
        "ca_certificate_file": format!("{dir}/root-cert.pem"),
        "refresh_interval": REFRESH,
    });
    Ok(json!({
        "xds_servers": [{
            "server_uri": args.discovery,
            "channel_creds": [{"type": "tls", "config": files}],
            "server_features": ["xds_v3"],
        }],
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
        "certificate_providers": {
            CERTIFICATE_PROVIDER: {"plugin_name": "file_watcher", "config": files},
        },
        "server_listener_resource_name_template": SERVER_LISTENER,
    }))
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

    fn made(more: &[&str]) -> anyhow::Result<Value> {
        let base = ["agent", "--ip=10.1.0.5", "--workload=reviews-v1", "--namespace=books", "--cluster=west"];
        bootstrap(&Cli::parse_from(base.iter().chain(more)).proxy)
    }

    #[test]
    fn the_library_has_the_files_of_the_agent() {
        let b = made(&["--state-dir=/run/f", "--discovery=10.0.0.1:15012", "--locality=r1/z1"]).unwrap();
        assert_eq!(b["xds_servers"][0]["server_uri"], "10.0.0.1:15012");
        assert_eq!(b["xds_servers"][0]["channel_creds"][0]["type"], "tls");
        assert_eq!(b["node"]["id"], "sidecar~10.1.0.5~reviews-v1.books~books.svc.cluster.local");
        assert_eq!(b["node"]["metadata"]["GENERATOR"], "grpc");
        assert_eq!(b["node"]["locality"]["zone"], "z1");
        let files = &b["certificate_providers"]["default"]["config"];
        assert_eq!(files["private_key_file"], "/run/f/svid-key.pem");
        assert_eq!(files, &b["xds_servers"][0]["channel_creds"][0]["config"]);
    }

    #[test]
    fn without_files_there_is_nothing_to_name() {
        let error = made(&[]).unwrap_err().to_string();
        assert!(error.contains("--state-dir"), "{error}");
    }
}
