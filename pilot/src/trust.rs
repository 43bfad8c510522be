//! Which roots the connected proxies trust, and which certificates they show: what a rotation of the root waits for.
//!
//! A proxy counts if it has shown a certificate. It trusts the own bundle if it has acknowledged it over ADS and says
//! itself that it verifies with it: an older proxy acknowledges what it does not understand.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_xds::{
    NodeInfo, PeerInfo, ResourceSource as _,
    server::ClientStatus,
    trust::{TrustSink, Trusting},
    type_url::BUNDLES,
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tonic::Status;

use crate::source::PilotSource;

/// Four reports.
const FRESH: Duration = Duration::from_secs(20);
/// Proxies that are remembered.
const MAX_PROXIES: usize = 65_536;
/// Proxies that are named.
const NAMED: usize = 5;

/// The whole, in `/debug/trust`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrustStatus {
    /// Number of the own bundle that is served; 0 for none.
    pub sequence: u64,
    /// SHA-256 of this cluster's intermediate.
    pub intermediate: String,
    /// Connected proxies with a certificate.
    pub proxies: u32,
    /// Of those, who trust that bundle.
    pub trusting: u32,
    /// Of those, whose certificate is under that intermediate.
    pub renewed: u32,
    /// Some who do not trust it, or else some who have not renewed: `name.namespace`.
    pub late: Vec<String>,
}

/// The last reports.
pub struct Trust {
    source: Arc<PilotSource>,
    reports: Mutex<BTreeMap<String, (Instant, Trusting)>>,
}

/// How a connected proxy stands; a node may have several streams.
#[derive(Default)]
struct Proxy {
    name: String,
    certified: bool,
    acknowledged: bool,
}

impl Trust {
    pub(crate) fn new(source: Arc<PilotSource>) -> Self {
        Self { source, reports: Mutex::default() }
    }

    pub(crate) fn status(&self, clients: Vec<ClientStatus>) -> TrustStatus {
        let mut proxies = BTreeMap::<String, Proxy>::new();
        for c in clients {
            let p = proxies.entry(c.node.id.clone()).or_default();
            p.name = format!("{}.{}", c.node.name, c.node.namespace);
            p.certified |= c.certified;
            p.acknowledged |= c.types.get(BUNDLES).is_some_and(|t| t.state() == "SYNCED");
        }
        proxies.retain(|_, p| p.certified);
        let Some((sequence, intermediate)) = self.source.world().and_then(|w| {
            let own = w.config.roots.as_ref()?.own.as_ref()?;
            Some((own.sequence, own.intermediate.clone()))
        }) else {
            return TrustStatus { proxies: count(proxies.len()), ..TrustStatus::default() };
        };
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let said = |id: &String| reports.get(id).filter(|(at, _)| at.elapsed() <= FRESH).map(|(_, t)| t);
        let (mut distrust, mut old) = (vec![], vec![]);
        for (id, p) in &proxies {
            let told = said(id);
            if !p.acknowledged || told.is_none_or(|t| t.sequence != sequence) {
                distrust.push(p.name.clone());
            }
            if told.is_none_or(|t| t.intermediate != intermediate) {
                old.push(p.name.clone());
            }
        }
        let (all, trusting, renewed) =
            (proxies.len(), proxies.len() - distrust.len(), proxies.len() - old.len());
        let mut late = if distrust.is_empty() { old } else { distrust };
        late.truncate(NAMED);
        TrustStatus {
            sequence,
            intermediate,
            proxies: count(all),
            trusting: count(trusting),
            renewed: count(renewed),
            late,
        }
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

impl TrustSink for Trust {
    fn report(&self, peer: &PeerInfo, node: NodeInfo, what: Trusting) -> Result<(), Status> {
        self.source.authorize(peer, &node)?;
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        if reports.len() >= MAX_PROXIES && !reports.contains_key(&node.id) {
            reports.retain(|_, (at, _)| at.elapsed() <= FRESH);
            if reports.len() >= MAX_PROXIES {
                return Err(Status::resource_exhausted(format!("{MAX_PROXIES} proxies report already")));
            }
        }
        reports.insert(node.id, (Instant::now(), what));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use mesh_model::{
        TrustDomain,
        federation::{ForeignBundle, OwnRoots},
    };
    use mesh_xds::{NodeKind, server::TypeStatus};

    use super::*;
    use crate::{config::Config, generate::tests::settings, world::World};

    fn client(name: &str, certified: bool, acked: Option<bool>) -> ClientStatus {
        let ip = [10, 0, 0, 1].into();
        let node =
            NodeInfo::proxy(NodeKind::Sidecar, ip, name, "b", "x", Default::default(), Default::default());
        let sync = |acked: bool| TypeStatus {
            sent_nonce: "2".into(),
            acked_nonce: if acked { "2" } else { "1" }.into(),
            ..TypeStatus::default()
        };
        let types = acked.map(|a| (BUNDLES.to_owned(), sync(a))).into_iter().collect();
        ClientStatus { node, certified, connected: SystemTime::now(), types }
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_counts_once_and_when_it_says_so_itself() {
        let source = Arc::new(PilotSource::new());
        let trust = Trust::new(source.clone());
        let clients = || {
            vec![
                client("a", true, Some(true)),
                // An Envoy, which does not ask for bundles, and its agent, which does.
                client("b", true, None),
                client("b", true, Some(true)),
                // It has been sent the new ones and has not answered.
                client("c", true, Some(false)),
                // An older one, which acknowledges what it does not use.
                client("d", true, Some(true)),
                client("plain", false, Some(true)),
            ]
        };
        assert_eq!(trust.status(clients()), TrustStatus { proxies: 4, ..TrustStatus::default() });
        let own = OwnRoots { sequence: 2, intermediate: "new".into(), renew_within_ms: 0, unlisted: false };
        let roots = ForeignBundle {
            trust_domain: TrustDomain::default(),
            roots: "PEM".into(),
            clusters: vec![],
            by_bundle: false,
            own: Some(own),
            revoked: vec![],
        };
        let config = Config { roots: Some(roots), ..Config::default() };
        source.update(Arc::new(World::new(settings(), config)));
        let said = |name: &str, sequence: u64, intermediate: &str| {
            let id = client(name, true, None).node.id;
            let what = Trusting { sequence, intermediate: intermediate.into() };
            trust.reports.lock().unwrap().insert(id, (Instant::now(), what));
        };
        for (name, sequence) in [("a", 2), ("b", 1), ("c", 2)] {
            said(name, sequence, "old");
        }
        let s = trust.status(clients());
        assert_eq!((s.proxies, s.trusting, s.renewed), (4, 1, 0));
        assert_eq!(s.late, ["b.b", "c.b", "d.b"], "an old bundle, no answer, no word");
        said("b", 2, "new");
        let s = trust.status(clients());
        assert_eq!((s.trusting, s.renewed), (2, 1));
        // What is not repeated is not so any more.
        tokio::time::advance(FRESH + Duration::from_secs(1)).await;
        assert_eq!(trust.status(clients()).trusting, 0);
    }
}
