//! The control plane that a bootstrap file names.

use std::{net::IpAddr, sync::Arc};

use anyhow::{Context, bail, ensure};
use mesh_identity::SecretStore;
use mesh_model::proxy::{Discovery, LbEndpoint};
use mesh_xds::{
    Endpoint,
    client::proxy::{ProxyState, SecretSink},
    codec::{Secret, SecretKind},
};

/// Where a static cluster is, as an xDS server. The first endpoint counts; the name is resolved at every attempt.
pub(super) fn endpoint(state: &ProxyState, cluster: &str, store: &SecretStore) -> anyhow::Result<Endpoint> {
    let c = state.clusters.get(cluster).with_context(|| format!("there is no static cluster {cluster:?}"))?;
    let assignment = match &c.discovery {
        Discovery::Static(a) | Discovery::StrictDns(a) | Discovery::LogicalDns(a) => a,
        Discovery::Eds(_) | Discovery::OriginalDst | Discovery::ByName(_) => {
            bail!("cluster {cluster:?}: a control plane needs an address that is in the file")
        }
    };
    let all: Vec<&LbEndpoint> = assignment.localities.iter().flat_map(|l| &l.endpoints).collect();
    let first = all.first().with_context(|| format!("cluster {cluster:?} has no endpoint"))?;
    if all.len() > 1 {
        tracing::warn!(cluster, "only the first endpoint of the control plane is used");
    }
    let address = if first.address.contains(':') {
        format!("[{}]:{}", first.address, first.port)
    } else {
        format!("{}:{}", first.address, first.port)
    };
    let Some(tls) = &c.tls else {
        let loopback =
            first.address == "localhost" || first.address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        ensure!(
            loopback,
            "cluster {cluster:?}: {address} is not on loopback, where alone configuration may come in clear text; \
             add a transport_socket"
        );
        return Ok(Endpoint::Plain(address));
    };
    let mut tls = tls.clone();
    if tls.alpn.is_empty() {
        tls.alpn = vec!["h2".to_owned()];
    }
    let server_name = if tls.sni.is_empty() { first.address.clone() } else { tls.sni.clone() };
    let config =
        store.client_config(&tls).with_context(|| format!("cluster {cluster:?}: transport_socket"))?;
    Ok(Endpoint::Tls { address, server_name, config })
}

/// Secrets of the file and of the control plane, in the store that the engine reads.
pub(super) struct Secrets(pub(super) Arc<SecretStore>);

impl SecretSink for Secrets {
    fn take(&self, secret: &Secret) -> Result<(), String> {
        let taken = match &secret.kind {
            SecretKind::Certificate { chain, key } => self.0.set_identity(&secret.name, chain, key),
            SecretKind::Roots(pem) => self.0.set_trust(&secret.name, pem),
            SecretKind::RootsAndLists { .. } => {
                return Err("revocation lists are unsupported here".to_owned());
            }
            // Decoding has refused it.
            SecretKind::Domains(_) => return Err("roots by trust domain are unsupported here".to_owned()),
        };
        taken.map_err(|e| e.to_string())
    }

    fn has(&self, name: &str) -> bool {
        self.0.has_identity(name) || self.0.has_trust(name)
    }
}
