//! Who asks and what for, in a world without proxies: callers, names and workloads as simulations need them.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use mesh_model::{
    Locality, NetworkId,
    authored::WorkloadEntry,
    registry::{Labels, TlsMode},
};

pub use mesh_xds::mcp::{ConfigState, Document};

use crate::{
    config::{Doc, selects},
    hosts,
    index::{Entry, workload_labels},
    proxy::{Interception, ProxyNode},
    world::World,
};

/// Address of callers that no document gives one (RFC 5737).
pub const CALLER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10));
/// Address of hosts that nobody declared.
pub const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));

/// A caller, and what had to be assumed of it.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Its proxy.
    pub proxy: ProxyNode,
    /// What no document says.
    pub assumed: Option<String>,
}

fn proxy(world: &World, namespace: &str, labels: Labels, address: IpAddr) -> ProxyNode {
    ProxyNode {
        id: String::new(),
        router: false,
        east_west: false,
        addresses: vec![address],
        namespace: namespace.to_owned(),
        service_account: "default".to_owned(),
        labels,
        locality: Locality::default(),
        network: Some(world.settings.network.clone()),
        interception: Interception::Redirect,
        http_proxy_port: None,
        inbound: Default::default(),
        flotilla: true,
        grpc: false,
        takes_hosts: false,
        asks: None,
        can_ask: false,
        on_demand: false,
        tunnels: true,
        tls_files: None,
        topology: None,
        headers: None,
        connections: None,
        process: mesh_xds::process::ProcessSettings::default(),
        federation: None,
        metadata: Default::default(),
        filters: Default::default(),
        situation: Default::default(),
    }
}

fn of_workload(world: &World, w: &Doc<WorkloadEntry>) -> ProxyNode {
    let address = w.spec.address.parse().unwrap_or(CALLER);
    let account = &w.spec.service_account;
    ProxyNode {
        service_account: if account.is_empty() { "default".to_owned() } else { account.clone() },
        locality: Locality::from(w.spec.locality.clone()),
        network: NetworkId::new(&w.spec.network).ok().or_else(|| Some(world.settings.network.clone())),
        ..proxy(world, &w.namespace, workload_labels(w), address)
    }
}

/// The proxy of a caller: a workload by its name, by the name of what made it (`reviews-v1` of `reviews-v1-abc`), by
/// its `app` label, or by a service that selects it; else one that is made up. `labels` are added to what is known.
///
/// It is a gateway if a `Gateway` selects it, or if nothing is known of it and its name ends in a value that one selects
/// by, as `istio-ingressgateway` does for `istio: ingressgateway`.
#[must_use]
pub fn caller(world: &World, namespace: &str, name: &str, labels: &Labels) -> Caller {
    let mut all: Vec<_> = world.config.workload_entries.iter().filter(|w| w.namespace == namespace).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    let dashed = format!("{name}-");
    let label = |w: &&Doc<WorkloadEntry>, key: &str| workload_labels(w).get(key).is_some_and(|v| v == name);
    let service = world.config.services.iter().find(|s| s.namespace == namespace && s.name == name);
    let selected = |w: &&Doc<WorkloadEntry>| {
        service.is_some_and(|s| !s.spec.selector.is_empty() && selects(&s.spec.selector, &workload_labels(w)))
    };
    // Of a workload that who asks has made up, for want of a document: after a word in parentheses.
    fn plain(w: &Doc<WorkloadEntry>) -> &str {
        w.name.strip_prefix('(').and_then(|n| n.split_once(") ")).map_or(w.name.as_str(), |(_, n)| n)
    }
    let found = all
        .iter()
        .find(|w| plain(w) == name)
        .or_else(|| all.iter().find(|w| plain(w).starts_with(&dashed)))
        .or_else(|| all.iter().find(|w| label(w, "app") || label(w, "app.kubernetes.io/name")))
        .or_else(|| all.iter().find(|w| selected(w)));
    let mut caller = match found {
        Some(w) => {
            let assumed = match plain(w) {
                p if p == w.name => None,
                p if p.starts_with("Service ") => Some(format!(
                    "no workload of {namespace} is called {name}: taken as one that Service {name} selects"
                )),
                p => Some(format!("no pod of {p} is written down: taken as what makes them says")),
            };
            Caller { proxy: of_workload(world, w), assumed }
        }
        None => {
            let known = service.map(|s| s.spec.selector.clone()).filter(|s| !s.is_empty());
            let labels = known.unwrap_or_else(|| Labels::from([("app".to_owned(), name.to_owned())]));
            let shown: Vec<_> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let assumed = format!(
                "no workload of {namespace} is called {name}: taken as a sidecar with labels {} and service account \
                 default",
                shown.join(",")
            );
            Caller { proxy: proxy(world, namespace, labels, CALLER), assumed: Some(assumed) }
        }
    };
    caller.proxy.labels.extend(labels.iter().map(|(k, v)| (k.clone(), v.clone())));
    let gateways = || world.config.gateways.iter().filter(|g| !g.spec.selector.is_empty());
    if gateways().any(|g| g.is_served_by(namespace, &caller.proxy.labels)) {
        caller.proxy.router = true;
    } else if let Some(g) = gateways()
        .filter(|g| g.is_served_by(namespace, &g.spec.selector))
        .find(|g| caller.assumed.is_some() && g.spec.selector.values().any(|v| name.ends_with(v.as_str())))
    {
        caller.proxy.router = true;
        caller.proxy.labels.clone_from(&g.spec.selector);
        let shown: Vec<_> = g.spec.selector.iter().map(|(k, v)| format!("{k}={v}")).collect();
        caller.assumed = Some(format!(
            "no workload of {namespace} is called {name}: taken as the gateway with labels {}",
            shown.join(",")
        ));
    }
    caller
}

/// The proxy of a workload with these labels, whether or not one is written down.
#[must_use]
pub fn workload(world: &World, namespace: &str, labels: &Labels, address: IpAddr) -> ProxyNode {
    proxy(world, namespace, labels.clone(), address)
}

/// What a host means to a caller.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The service, if the mesh knows one.
    pub service: Option<Arc<Entry>>,
    /// Where the caller connects to.
    pub address: IpAddr,
}

/// Resolves a host as the caller's resolver would. A host that nobody declared is [`ELSEWHERE`].
#[must_use]
pub fn resolve(world: &World, proxy: &ProxyNode, host: &str) -> Resolved {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        let service = world.index.services.values().find(|e| e.service.addresses.contains(&address)).cloned();
        return Resolved { service, address };
    }
    let found = hosts::searched(&host, &proxy.namespace).iter().find_map(|h| world.index.get(h)).cloned();
    let service = found.or_else(|| {
        let wild = world.index.services.values().filter(|e| hosts::covers(&e.service.host, &host));
        wild.max_by_key(|e| e.service.host.len()).cloned()
    });
    let address = service.as_ref().and_then(|e| {
        let of_pods = || e.endpoints.iter().find_map(|p| p.address.parse().ok());
        e.service.addresses.first().copied().or_else(of_pods)
    });
    Resolved { service, address: address.unwrap_or(ELSEWHERE) }
}

/// A workload of this cluster that traffic may come to.
#[derive(Debug, Clone)]
pub struct Target {
    /// `namespace/name`.
    pub workload: String,
    /// Its proxy; `None` if it has none.
    pub proxy: Option<ProxyNode>,
}

/// Whether a caller's proxy, if its protocol has a way to ask, gets routes and clusters only when it asks for them. What it
/// then gets is what it would have anyway.
#[must_use]
pub fn is_on_demand(world: &World, proxy: &ProxyNode) -> bool {
    world.patched(&ProxyNode { can_ask: true, ..proxy.clone() }).on_demand
}

/// The workload at an address, if it is one of this cluster's.
#[must_use]
pub fn target(world: &World, address: IpAddr) -> Option<Target> {
    let (entry, endpoint) = world.index.instances(&[address]).into_iter().next()?;
    let workload = endpoint.workload.as_deref()?.to_owned();
    let account = &endpoint.service_account;
    let made = || ProxyNode {
        service_account: if account.is_empty() { "default".to_owned() } else { account.clone() },
        locality: endpoint.locality.clone(),
        ..proxy(world, &entry.service.namespace, endpoint.labels.clone(), address)
    };
    Some(Target { workload, proxy: (endpoint.tls == TlsMode::Mutual).then(made) })
}

/// The VirtualService that a sidecar applies to a host.
#[must_use]
pub fn virtual_service(world: &World, proxy: &ProxyNode, host: &str) -> Option<String> {
    let found = match world.index.get(host) {
        Some(e) => world.mesh_routes(proxy, e),
        None => world.virtual_service(proxy, host, crate::generate::bound_to_mesh),
    };
    found.map(|d| format!("{}/{}", d.namespace, d.name))
}
