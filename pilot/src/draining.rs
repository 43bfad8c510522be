//! East-west gateways that are about to stop.
//!
//! A gateway that drains says so in its node metadata, on a new stream. From then on it is no way to other clusters for
//! the sidecars of its own, and inbound sessions that come through it are told to leave. That holds beyond the end of
//! its stream, until a gateway at the same address connects that does not drain.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use mesh_xds::NodeInfo;
use tokio::sync::watch;

/// From the moment at which a gateway has connected until it is used again: it has yet to get its certificate's trust
/// and its listeners.
const BINDING: Duration = Duration::from_secs(1);

/// Gateways that drain, by address; with a number that tells one drain from the next.
#[derive(Debug, Clone)]
pub(crate) struct Draining {
    since: Arc<watch::Sender<BTreeMap<IpAddr, u64>>>,
}

impl Default for Draining {
    fn default() -> Self {
        Self { since: Arc::new(watch::Sender::default()) }
    }
}

impl Draining {
    /// A proxy has connected. That its address is its own was verified before.
    pub(crate) fn connected(&self, node: &NodeInfo) {
        let Some(ip) = node.ip.filter(|_| node.is_east_west()) else { return };
        if node.is_draining() {
            tracing::info!(gateway = %node.id, "drains: traffic goes through the others");
            self.since.send_modify(|all| {
                let next = all.values().max().map_or(1, |n| n + 1);
                all.insert(ip, next);
            });
            return;
        }
        let Some(drain) = self.since.borrow().get(&ip).copied() else { return };
        let this = self.clone();
        let back = async move {
            tokio::time::sleep(BINDING).await;
            this.since.send_if_modified(|all| {
                let same = all.get(&ip) == Some(&drain);
                same && all.remove(&ip).is_some()
            });
        };
        tokio::spawn(back);
    }

    /// Addresses of those that drain now.
    pub(crate) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.since.borrow().keys().copied().collect()
    }

    /// Changes with every drain and every return.
    pub(crate) fn watch(&self) -> watch::Receiver<BTreeMap<IpAddr, u64>> {
        self.since.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use mesh_xds::NodeKind;
    use serde_json::json;

    use super::*;

    fn gateway(ip: &str, mode: &str) -> NodeInfo {
        let meta = json!({"ROUTER_MODE": mode}).as_object().cloned().unwrap();
        let at = ip.parse().unwrap();
        NodeInfo::proxy(NodeKind::Router, at, "gw", "flotilla-system", "x", meta, Default::default())
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_holds_until_the_gateway_is_back() {
        let d = Draining::default();
        let gw = gateway("10.0.0.3", "sni-dnat");
        d.connected(&gw);
        assert!(d.addresses().is_empty());
        d.connected(&gw.clone().draining());
        d.connected(&gateway("10.0.0.9", "").draining());
        let ip = gw.ip.unwrap();
        assert_eq!(d.addresses(), BTreeSet::from([ip]), "an ingress gateway is no way to other clusters");
        d.connected(&gateway("10.0.0.4", "sni-dnat"));
        tokio::time::sleep(BINDING * 2).await;
        assert!(d.addresses().contains(&ip), "another one came");
        d.connected(&gw);
        assert!(d.addresses().contains(&ip), "it does not listen yet");
        // It stops again at once.
        d.connected(&gw.clone().draining());
        tokio::time::sleep(BINDING * 2).await;
        assert!(d.addresses().contains(&ip), "the second drain is not over");
        d.connected(&gw);
        tokio::time::sleep(BINDING * 2).await;
        assert!(d.addresses().is_empty());
    }
}
