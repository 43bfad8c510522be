//! What the authorities of trust domains have revoked, between control planes.
//!
//! Every cluster's CA signs a list of its own, and that with the root key one of the root. Members of a domain tell each
//! other all lists that they know, so that one hears of a revocation also over a third. Rules:
//! 1. A list is believed for its signature, whoever tells it, and only if its issuer is under the roots of the domain.
//! 2. Of an issuer's lists the highest number counts; nobody brings an older one back.
//! 3. A list is kept, also over restarts, until its issuer has expired, with which all has that it names. That it is older than
//!    it says it should be changes nothing.
//! 4. Lists are sent when the other side's digest says that it has others; a peer that does not take one is not sent the same
//!    again.

use std::collections::BTreeMap;

use mesh_identity::{SignedList, pem_certificates};
use mesh_model::{TrustDomain, federation::RevocationList};
use serde::{Deserialize, Serialize};

use crate::pb;

/// Issuers of one domain: clusters, their former intermediates, roots.
const MAX_ISSUERS: usize = 4096;
/// All of a domain's lists in one message, bytes: below what gRPC takes.
const MAX_MESSAGE: usize = 3 * 1024 * 1024;

/// A list and what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    said: SignedList,
    told: RevocationList,
}

/// The lists of one trust domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Lists {
    /// By the issuer's certificate.
    all: BTreeMap<String, Known>,
}

/// As they are kept.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Kept(pub(crate) BTreeMap<String, Vec<RevocationList>>);

impl Lists {
    /// Takes those that are newer; answers whether any was, and what was wrong with the first that cannot be used.
    pub(crate) fn take(
        &mut self,
        domain: &TrustDomain,
        roots_pem: &str,
        told: impl IntoIterator<Item = RevocationList>,
        now: u64,
    ) -> (bool, Option<String>) {
        let roots = match pem_certificates("roots", roots_pem.as_bytes()) {
            Ok(r) => r,
            Err(e) => return (false, Some(e.to_string())),
        };
        let (mut changed, mut wrong) = (false, None);
        for told in told {
            // Nearly always it is one that is here: no signature is looked at again.
            if self.all.values().any(|k| k.told == told) {
                continue;
            }
            match SignedList::read(&told, &roots, domain) {
                Ok(said) => {
                    let known = self.all.get(&said.issuer);
                    let full = known.is_none() && self.all.len() >= MAX_ISSUERS;
                    if full || ended(&said) <= now || known.is_some_and(|k| k.said.number >= said.number) {
                        continue;
                    }
                    changed = true;
                    self.all.insert(said.issuer.clone(), Known { said, told });
                }
                Err(e) => wrong = wrong.or(Some(e.to_string())),
            }
        }
        (changed, wrong)
    }

    /// Leaves out those of issuers that have expired, or are under no root any more.
    pub(crate) fn prune(&mut self, domain: &TrustDomain, roots_pem: &str, now: u64) {
        let Ok(roots) = pem_certificates("roots", roots_pem.as_bytes()) else { return };
        self.all.retain(|_, k| ended(&k.said) > now && SignedList::read(&k.told, &roots, domain).is_ok());
    }

    /// All of them if anything is revoked: to proxies an issuer that has revoked nothing matters only beside others.
    pub(crate) fn published(&self) -> Vec<RevocationList> {
        if self.all.values().all(|k| k.said.revoked() == 0) {
            return vec![];
        }
        self.all.values().map(|k| k.told.clone()).collect()
    }

    /// For a peer.
    pub(crate) fn to_pb(&self) -> Vec<pb::RevocationList> {
        let mut room = MAX_MESSAGE;
        // Those that say something first.
        let mut all: Vec<_> = self.all.values().collect();
        all.sort_by_key(|k| std::cmp::Reverse(k.said.revoked()));
        let fits = |k: &&Known| {
            let size = k.told.issuer.len() + k.told.list.len() + 16;
            let fits = size <= room;
            room = room.saturating_sub(size);
            fits
        };
        let told = all.into_iter().take_while(fits);
        told.map(|k| pb::RevocationList { issuer: k.told.issuer.clone(), list: k.told.list.clone() })
            .collect()
    }

    /// Equal where the same is known; never 0.
    pub(crate) fn digest(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for (issuer, k) in &self.all {
            for b in issuer.bytes().chain(k.said.number.to_be_bytes()) {
                hash = (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        hash.max(1)
    }

    pub(crate) fn keep(&self) -> Vec<RevocationList> {
        self.all.values().map(|k| k.told.clone()).collect()
    }

    /// For operators: by whom, number, how many certificates, and when the next one is due.
    pub(crate) fn describe(&self) -> impl Iterator<Item = &SignedList> {
        self.all.values().map(|k| &k.said)
    }
}

fn ended(l: &SignedList) -> u64 {
    l.ends.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// As they came.
pub(crate) fn from_pb(lists: Vec<pb::RevocationList>) -> impl Iterator<Item = RevocationList> {
    lists.into_iter().map(|l| RevocationList { issuer: l.issuer, list: l.list })
}

#[cfg(test)]
mod tests;
