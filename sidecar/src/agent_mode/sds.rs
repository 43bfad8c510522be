//! The workload's two secrets as an SDS source.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use mesh_agent::SvidPem;
use mesh_identity::{SignedList, TRUST_BUNDLE, WORKLOAD_SVID, pem_certificates};
use mesh_model::{TrustDomain, federation::ForeignBundle};
use mesh_xds::{
    NodeInfo, PeerInfo, ResourceSource, TypeSnapshot,
    codec::{Secret, SecretKind, encode_secret},
    server::Transport,
    type_url::SDS,
};
use tokio::{sync::watch, task::JoinHandle};

/// How often lists are looked at whether they are too old; that is told days before.
const LOOK: Duration = Duration::from_secs(600);

/// `default` and `ROOTCA` as they are now.
pub(super) struct SecretSource {
    snapshot: ArcSwap<TypeSnapshot>,
    empty: Arc<TypeSnapshot>,
    changes: watch::Sender<u64>,
}

impl SecretSource {
    /// A source that follows renewal and the roots of other trust domains than `own`, and the task that does.
    pub(super) fn follow(
        own: TrustDomain,
        mut pem: watch::Receiver<Option<Arc<SvidPem>>>,
        mut foreign: watch::Receiver<Vec<ForeignBundle>>,
    ) -> (Arc<Self>, JoinHandle<()>) {
        let now = move |pem: &watch::Receiver<Option<Arc<SvidPem>>>,
                        foreign: &watch::Receiver<Vec<ForeignBundle>>| {
            pem.borrow().as_deref().map(|p| snapshot(&own, p, &foreign.borrow()))
        };
        let first = now(&pem, &foreign).unwrap_or_default();
        let source = Arc::new(Self {
            snapshot: ArcSwap::from_pointee(first),
            empty: Arc::default(),
            changes: watch::Sender::new(1),
        });
        let following = source.clone();
        let task = tokio::spawn(async move {
            loop {
                let changed = tokio::select! {
                    c = pem.changed() => c,
                    c = foreign.changed() => c,
                    // A list may have become too old for the proxy meanwhile.
                    () = tokio::time::sleep(LOOK) => Ok(()),
                };
                if changed.is_err() {
                    return;
                }
                if let Some(next) = now(&pem, &foreign) {
                    following.snapshot.store(Arc::new(next));
                    following.changes.send_modify(|n| *n += 1);
                }
            }
        });
        (source, task)
    }
}

/// A proxy that is told of other trust domains verifies by domain; otherwise by the roots, as ever.
fn snapshot(own: &TrustDomain, pem: &SvidPem, foreign: &[ForeignBundle]) -> TypeSnapshot {
    let told = foreign.iter().find(|b| b.own.is_some() && b.roots.as_bytes() == pem.roots);
    let lists = told.and_then(|b| lists(b, SystemTime::now()));
    let roots = if foreign.iter().all(|b| b.trust_domain == *own) {
        match lists {
            Some((lists, leaf_only)) => {
                SecretKind::RootsAndLists { roots: pem.roots.clone(), lists, leaf_only }
            }
            None => SecretKind::Roots(pem.roots.clone()),
        }
    } else {
        let others = foreign
            .iter()
            .filter(|b| b.trust_domain != *own)
            .map(|b| (b.trust_domain.to_string(), b.roots.clone().into_bytes()));
        // The SPIFFE validator has no field for lists, but takes them among the roots of a domain, and then wants one of each
        // issuer up to the root. Of other domains nobody here knows that all are told, so theirs would cut somebody off.
        let mut ours = pem.roots.clone();
        if let Some((lists, false)) = lists {
            ours.extend_from_slice(b"\n");
            ours.extend(lists);
        }
        SecretKind::Domains(std::iter::once((own.to_string(), ours)).chain(others).collect())
    };
    let secrets = [
        Secret {
            name: WORKLOAD_SVID.into(),
            kind: SecretKind::Certificate { chain: pem.chain.clone(), key: pem.key.clone() },
        },
        Secret { name: TRUST_BUNDLE.into(), kind: roots },
    ];
    TypeSnapshot::build(secrets.iter().map(|s| (s.name.clone(), encode_secret(s))))
}

/// Revocation lists as Envoy can use them, and whether it may look for the workload's certificate alone. With any list it
/// refuses everybody whose issuer has none, or one that is too old. So it gets none if that would cut off a member; one that is
/// too old is left out, as all has expired that its issuer signed; and without one of each issuer above the clusters it does
/// not look at those.
fn lists(own: &ForeignBundle, now: SystemTime) -> Option<(Vec<u8>, bool)> {
    if own.own.as_ref().is_none_or(|o| o.unlisted) {
        return None;
    }
    let roots = pem_certificates("roots", own.roots.as_bytes()).ok()?;
    let (mut text, mut listed, mut leaf_only) = (String::new(), 0, false);
    for told in &own.revoked {
        let Ok(said) = SignedList::read(told, &roots, &own.trust_domain) else { continue };
        if said.next_update <= now {
            continue;
        }
        text.push_str(&told.list);
        listed += usize::from(said.cluster.is_none());
        // Between a cluster's CA and the root there may be others, of which nobody here has a list.
        leaf_only |= pem_certificates("issuer", told.issuer.as_bytes()).is_ok_and(|c| c.len() > 1);
    }
    leaf_only |= listed < roots.len();
    (!text.is_empty()).then(|| (text.into_bytes(), leaf_only))
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
