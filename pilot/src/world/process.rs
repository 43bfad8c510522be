//! What a proxy's process is told of itself: threads, ports, the time that its connections have at its end.
//!
//! Whoever says something first counts, for each setting: the proxy's own metadata (`PROXY_CONFIG`), the `ProxyConfig` that
//! selects its workload, that of its namespace, that of the root namespace, the mesh's `defaultConfig`.

use mesh_model::{authored::ProxyConfig, registry::Labels};
use mesh_xds::process::ProcessSettings;

use crate::{
    config::{Config, Doc, Problem, selects},
    proxy::ProxyNode,
};

fn labels(d: &Doc<ProxyConfig>) -> Option<&Labels> {
    d.spec.selector.as_ref().map(|s| &s.match_labels).filter(|l| !l.is_empty())
}

/// `ProxyConfig` documents for a proxy, the first of which counts.
pub(crate) fn documents<'c>(
    config: &'c Config,
    proxy: &'c ProxyNode,
) -> impl Iterator<Item = &'c Doc<ProxyConfig>> {
    let of = move |ns: &'c str| config.proxy_configs.iter().filter(move |d| d.namespace == ns);
    let selecting = of(&proxy.namespace).filter(|d| labels(d).is_some_and(|l| selects(l, &proxy.labels)));
    let broad = of(&proxy.namespace).filter(|d| labels(d).is_none());
    let mesh = of(config.root_namespace()).filter(|d| labels(d).is_none());
    selecting.chain(broad).chain(mesh)
}

/// What a proxy is told.
pub(crate) fn settings(config: &Config, proxy: &ProxyNode) -> ProcessSettings {
    let concurrency = documents(config, proxy).find_map(|d| d.spec.concurrency);
    let said = ProcessSettings {
        concurrency: concurrency.and_then(|n| u32::try_from(n).ok()),
        ..ProcessSettings::default()
    };
    let mesh = config.mesh.default_config.as_ref().map(ProcessSettings::from).unwrap_or_default();
    proxy.process.or(said).or(mesh)
}

/// What of this a proxy that never asks for it goes without: an Envoy has threads, ports and times from its command line
/// and its agent, and a limit of all connections from the overload manager of its bootstrap.
pub(crate) fn problem(config: &Config, proxy: &ProxyNode, name: &str) -> Option<Problem> {
    // A library has no process of its own.
    if proxy.flotilla || proxy.grpc {
        return None;
    }
    // What its own metadata say is what it was started with.
    let (s, own) = (settings(config, proxy), &proxy.process);
    let fields: Vec<&str> = [
        (s.concurrency != own.concurrency, "concurrency"),
        (s.drain != own.drain, "drainDuration"),
        (s.parent_shutdown != own.parent_shutdown, "parentShutdownDuration"),
        (s.termination_drain != own.termination_drain, "terminationDrainDuration"),
        (s.admin_port != own.admin_port, "proxyAdminPort"),
        (s.status_port != own.status_port, "statusPort"),
        (s.max_connections != own.max_connections, "connectionSettings.globalDownstreamConnectionLimit"),
    ]
    .into_iter()
    .filter_map(|(said, field)| said.then_some(field))
    .collect();
    (!fields.is_empty()).then(|| Problem {
        object: format!("proxy {name}"),
        message: format!(
            "{}: no configuration tells an Envoy of this; say it on its command line, in its bootstrap, or to its agent",
            fields.join(", ")
        ),
    })
}
