//! What east-west gateways see of the ways to other clusters.
//!
//! They report every few seconds, and what is not repeated is forgotten: of a gateway that is away nothing is known. It
//! is for operators alone; no configuration depends on it.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_xds::{
    NodeInfo, PeerInfo, ResourceSource as _,
    links::{LinkSink, PeerLink},
    server::Transport,
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tonic::Status;

use crate::source::PilotSource;

/// Four reports: one that is late is no gateway that is away.
const FRESH: Duration = Duration::from_secs(20);
/// Gateways that are remembered.
const MAX_GATEWAYS: usize = 256;

/// What a gateway told last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayLinks {
    /// `name.namespace`.
    pub gateway: String,
    /// Its address.
    pub address: Option<IpAddr>,
    /// Seconds since it told so.
    pub age_seconds: f64,
    /// The ways to each cluster that it knows of.
    pub peers: Vec<PeerLink>,
}

/// The last reports.
pub struct Links {
    source: Arc<PilotSource>,
    reports: Mutex<Reports>,
}

type Reports = BTreeMap<String, (Instant, NodeInfo, Vec<PeerLink>)>;

impl Links {
    pub(crate) fn new(source: Arc<PilotSource>) -> Self {
        Self { source, reports: Mutex::default() }
    }

    /// What is not too old to be true.
    pub(crate) fn all(&self) -> Vec<GatewayLinks> {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = reports.values().filter(|(at, ..)| at.elapsed() <= FRESH);
        let told = fresh.map(|(at, node, peers)| GatewayLinks {
            gateway: format!("{}.{}", node.name, node.namespace),
            address: node.ip,
            age_seconds: at.elapsed().as_secs_f64(),
            peers: peers.clone(),
        });
        told.collect()
    }
}

fn keep(reports: &mut Reports, node: NodeInfo, peers: Vec<PeerLink>) -> Result<(), Status> {
    reports.retain(|_, (at, ..)| at.elapsed() <= FRESH);
    if reports.len() >= MAX_GATEWAYS && !reports.contains_key(&node.id) {
        return Err(Status::resource_exhausted(format!("{MAX_GATEWAYS} gateways report already")));
    }
    reports.insert(node.id.clone(), (Instant::now(), node, peers));
    Ok(())
}

impl LinkSink for Links {
    fn report(&self, peer: &PeerInfo, node: NodeInfo, peers: Vec<PeerLink>) -> Result<(), Status> {
        self.source.authorize(peer, &node)?;
        if !node.is_east_west() {
            return Err(Status::permission_denied(format!("{} is no east-west gateway", node.id)));
        }
        // As for a drain: a certificate does not tell an address. On this host a connection may come from any.
        let from = peer.address.map(|a| a.ip().to_canonical());
        let here = from.is_some_and(|ip| ip.is_loopback());
        if peer.transport == Transport::Tls && !here && from != node.ip {
            return Err(Status::permission_denied("a gateway may report from its own address only"));
        }
        keep(&mut self.reports.lock().unwrap_or_else(PoisonError::into_inner), node, peers)
    }
}

#[cfg(test)]
mod tests {
    use mesh_xds::NodeKind;

    use super::*;

    fn gateway(n: usize) -> NodeInfo {
        let ip = IpAddr::from([10, 0, u8::try_from(n / 250).unwrap(), u8::try_from(n % 250).unwrap()]);
        NodeInfo::proxy(NodeKind::Router, ip, "gw", "sys", "x", serde_json::Map::new(), Default::default())
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_repeated_is_forgotten() {
        let links = Links::new(Arc::new(PilotSource::new()));
        let told = |n| keep(&mut links.reports.lock().unwrap(), gateway(n), vec![]);
        for n in 0..MAX_GATEWAYS {
            told(n).unwrap();
        }
        told(0).unwrap();
        assert!(told(MAX_GATEWAYS).is_err());
        assert_eq!(links.all().len(), MAX_GATEWAYS);
        tokio::time::advance(FRESH + Duration::from_secs(1)).await;
        assert_eq!(links.all(), []);
        told(MAX_GATEWAYS).unwrap();
        assert_eq!(links.all().len(), 1);
    }
}
