//! Clusters whose hosts are names: resolved again and again, off the workers.

use std::{
    net::IpAddr,
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};

use mesh_model::proxy as model;

use super::cluster::Cluster;

/// Time between resolutions; Envoy's `dns_refresh_rate` default.
const REFRESH: Duration = Duration::from_secs(5);
/// Time between resolutions after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// A resolver that answers later than this is treated as failing.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses used of one name.
const MAX_ADDRESSES: usize = 256;

/// Keeps the hosts of a DNS cluster up to date for as long as the cluster is in use.
pub(crate) async fn refresh(cluster: Weak<Cluster>, authored: model::LoadAssignment, one: bool) {
    loop {
        let (resolved, complete) = resolve(&authored, one).await;
        let Some(c) = cluster.upgrade() else { return };
        // Last-known-good: names that cannot be resolved now remove no hosts.
        if (complete || c.tables().hosts.is_empty()) && *c.assignment() != resolved {
            c.set_assignment(Arc::new(resolved));
        }
        c.resolved.store(true, Relaxed);
        // As Envoy, never more often than each millisecond.
        let refresh = c.config.dns_refresh.unwrap_or(REFRESH).max(Duration::from_millis(1));
        drop(c);
        tokio::time::sleep(if complete { refresh } else { RETRY.min(refresh) }).await;
    }
}

/// The addresses of a name, in order.
pub(super) async fn addresses(name: &str, port: u16) -> std::io::Result<Vec<IpAddr>> {
    let found = tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((name, port))).await??;
    let mut ips: Vec<IpAddr> = found.map(|a| a.ip()).collect();
    ips.sort_unstable();
    ips.dedup();
    // IPv4 first where both exist, as Envoy's AUTO would on hosts without IPv6 routes.
    if ips.iter().any(IpAddr::is_ipv4) {
        ips.retain(IpAddr::is_ipv4);
    }
    Ok(ips)
}

async fn resolve(authored: &model::LoadAssignment, one: bool) -> (model::LoadAssignment, bool) {
    let mut out = authored.clone();
    let mut complete = true;
    for l in &mut out.localities {
        let mut endpoints = Vec::new();
        for e in &l.endpoints {
            let named = !["trunk:", model::UNIX].iter().any(|p| e.address.starts_with(p));
            if !named || e.address.parse::<IpAddr>().is_ok() {
                endpoints.push(e.clone());
                continue;
            }
            match addresses(&e.address, e.port).await {
                Ok(ips) => {
                    let n = if one { 1 } else { MAX_ADDRESSES };
                    let at = |ip: IpAddr| model::LbEndpoint { address: ip.to_string(), ..e.clone() };
                    endpoints.extend(ips.into_iter().take(n).map(at));
                }
                Err(error) => {
                    tracing::debug!(name = %e.address, %error, "cannot resolve");
                    complete = false;
                }
            }
        }
        l.endpoints = endpoints;
    }
    (out, complete)
}
