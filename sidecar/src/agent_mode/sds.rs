//! The workload's two secrets as an SDS source.

use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_agent::SvidPem;
use mesh_identity::{TRUST_BUNDLE, WORKLOAD_SVID};
use mesh_xds::{
    NodeInfo, PeerInfo, ResourceSource, TypeSnapshot,
    codec::{Secret, SecretKind, encode_secret},
    server::Transport,
    type_url::SDS,
};
use tokio::{sync::watch, task::JoinHandle};

/// `default` and `ROOTCA` as they are now.
pub(super) struct SecretSource {
    snapshot: ArcSwap<TypeSnapshot>,
    empty: Arc<TypeSnapshot>,
    changes: watch::Sender<u64>,
}

impl SecretSource {
    /// A source that follows renewal, and the task that does.
    pub(super) fn follow(mut pem: watch::Receiver<Option<Arc<SvidPem>>>) -> (Arc<Self>, JoinHandle<()>) {
        let first = pem.borrow_and_update().as_deref().map(snapshot).unwrap_or_default();
        let source = Arc::new(Self {
            snapshot: ArcSwap::from_pointee(first),
            empty: Arc::default(),
            changes: watch::Sender::new(1),
        });
        let following = source.clone();
        let task = tokio::spawn(async move {
            while pem.changed().await.is_ok() {
                let next = pem.borrow_and_update().as_deref().map(snapshot);
                if let Some(next) = next {
                    following.snapshot.store(Arc::new(next));
                    following.changes.send_modify(|n| *n += 1);
                }
            }
        });
        (source, task)
    }
}

fn snapshot(pem: &SvidPem) -> TypeSnapshot {
    let secrets = [
        Secret {
            name: WORKLOAD_SVID.into(),
            kind: SecretKind::Certificate { chain: pem.chain.clone(), key: pem.key.clone() },
        },
        Secret { name: TRUST_BUNDLE.into(), kind: SecretKind::Roots(pem.roots.clone()) },
    ];
    TypeSnapshot::build(secrets.iter().map(|s| (s.name.clone(), encode_secret(s))))
}

impl ResourceSource for SecretSource {
    fn snapshot(&self, _node: &NodeInfo, type_url: &str) -> Arc<TypeSnapshot> {
        if type_url == SDS { self.snapshot.load_full() } else { self.empty.clone() }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whoever may open the socket may have the secrets; nobody else ever gets here.
    fn authorize(&self, peer: &PeerInfo, _node: &NodeInfo) -> Result<(), tonic::Status> {
        match peer.transport {
            Transport::Unix => Ok(()),
            Transport::Plaintext | Transport::Tls => {
                Err(tonic::Status::permission_denied("secrets are given out on the unix socket only"))
            }
        }
    }
}

#[cfg(test)]
mod tests;
