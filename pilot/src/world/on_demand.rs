//! Which sidecars get virtual hosts and clusters only if they ask for them.
//!
//! The setting is [`ON_DEMAND`], `true` or `false`, in the places where Istio has the environment of proxies, the first of
//! which counts: the proxy's own metadata, the `ProxyConfig` that selects its workload, that of its namespace, that of the
//! root namespace, and the mesh's `defaultConfig.proxyMetadata`. Without any nobody asks.
//!
//! A proxy with patches (`EnvoyFilter`) gets everything: patches may refer to clusters that nothing would ask for. So does
//! one that speaks the state-of-the-world protocol, which has no way to ask.

use mesh_model::authored::ProxyConfig;
use mesh_xds::node::ON_DEMAND;

use crate::{
    config::{Config, Doc, Problem},
    proxy::ProxyNode,
    world::process::documents,
};

fn value(text: Option<&String>) -> Option<bool> {
    // Anything else is refused by validation.
    text.and_then(|t| t.parse().ok())
}

/// Whether a proxy asks. Its patches must be known.
pub(crate) fn applies(config: &Config, proxy: &ProxyNode) -> bool {
    wanted(config, proxy) && proxy.can_ask && proxy.filters.is_empty()
}

/// Whether somebody wants it to, be it able to or not.
pub(crate) fn wanted(config: &Config, proxy: &ProxyNode) -> bool {
    if proxy.router || proxy.grpc {
        return false;
    }
    let of = |d: &Doc<ProxyConfig>| value(d.spec.environment_variables.get(ON_DEMAND));
    proxy
        .asks
        .or_else(|| documents(config, proxy).find_map(of))
        .or_else(|| value(config.mesh.default_config.as_ref()?.proxy_metadata.get(ON_DEMAND)))
        .unwrap_or_default()
}

/// Why a proxy that should ask gets everything.
pub(crate) fn problem(config: &Config, proxy: &ProxyNode, name: &str) -> Option<Problem> {
    if !wanted(config, proxy) || applies(config, proxy) {
        return None;
    }
    let why = if proxy.filters.is_empty() {
        "it speaks the state-of-the-world protocol, which has no names on demand; use DELTA_GRPC"
    } else {
        "EnvoyFilter documents patch it, and what they refer to nothing would ask for"
    };
    Some(Problem {
        object: format!("proxy {name}"),
        message: format!("{ON_DEMAND}: gets everything all the same: {why}"),
    })
}
