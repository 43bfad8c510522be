//! Other trust domains: their members, and their roots.
//!
//! Rules:
//! 1. A member of another trust domain is believed of the clusters of that domain, and of nothing else: what it says of
//!    ours or of a third one's is not looked at, nor is it told of any but ours.
//! 2. A member of the own domain is believed of all, as ever: it got in by the same root, and the one that took another
//!    domain in had a token for it. So a domain is federated with by a join alone, never by hearsay across a border.
//! 3. Epochs are the own domain's. What another domain says of its clusters is ordered by the epochs and revisions that
//!    they have there, within the epoch that they have here. A tombstone is therefore lifted by a join here alone, whatever
//!    that domain says.
//! 4. A bundle is there as long as a living member of its domain is. The roots of one federation are ordered by their
//!    sequence; a later federation with a domain of that name goes before an earlier one.
//! 5. A name is one cluster's. The own domain goes before others, who came first before who came later.

use std::collections::BTreeSet;

use mesh_identity::TrustBundle;
use mesh_model::{ClusterId, TrustDomain};

use super::{Membership, Merged, fnv, hash};
use crate::{
    pb,
    wire::{self, Member, WireError},
};

/// Trust domains that one may be federated with.
pub const MAX_DOMAINS: usize = 64;
/// Clusters of another trust domain that are known, those that left included: it may not fill the list for all others.
const MAX_OF_DOMAIN: usize = 1024;

/// Roots of another trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// Which federation with that domain this is of; seconds since the epoch of its begin.
    pub generation: u64,
    /// The roots.
    pub bundle: TrustBundle,
}

impl Bundle {
    fn rank(&self) -> (u64, u64) {
        (self.generation, self.bundle.sequence)
    }

    pub(super) fn hash(&self) -> u64 {
        let of = |b: &Self| format!("{} {} {}", b.bundle.trust_domain, b.generation, b.bundle.document());
        fnv(of(self).as_bytes())
    }

    /// Reads one that a member of the own domain tells.
    ///
    /// # Errors
    /// [`WireError`] says what is wrong.
    pub fn from_pb(b: &pb::TrustBundle) -> Result<Self, WireError> {
        let domain = TrustDomain::new(&b.trust_domain).map_err(|e| WireError(e.to_string()))?;
        let bundle = TrustBundle::parse(domain, &b.document).map_err(|e| WireError(e.to_string()))?;
        Ok(Self { generation: b.generation, bundle })
    }

    /// Encodes it.
    #[must_use]
    pub fn to_pb(&self) -> pb::TrustBundle {
        pb::TrustBundle {
            trust_domain: self.bundle.trust_domain.to_string(),
            document: self.bundle.document(),
            generation: self.generation,
            revoked: vec![],
        }
    }
}

/// A trust domain tells of a cluster whose name somebody else has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error(
    "cluster {cluster} of {theirs} has the name of a cluster of {}: it is not taken in; one of the two must leave and \
     return under another cluster ID", holder.as_ref().map_or("this trust domain", TrustDomain::as_str)
)]
pub struct Clash {
    /// The name.
    pub cluster: ClusterId,
    /// Who tells.
    pub theirs: TrustDomain,
    /// Whose it is; `None` is the own domain's.
    pub holder: Option<TrustDomain>,
}

impl Membership {
    /// The own trust domain, as soon as it is known.
    pub fn set_domain(&mut self, own: Option<TrustDomain>) {
        self.own = own;
    }

    /// The trust domain of a cluster if that is not the own one.
    #[must_use]
    pub fn domain_of(&self, cluster: &ClusterId) -> Option<&TrustDomain> {
        self.all.get(cluster)?.trust_domain.as_ref()
    }

    /// Living members of another trust domain.
    pub fn of_domain<'a>(&'a self, domain: &'a TrustDomain) -> impl Iterator<Item = &'a Member> {
        self.peers().filter(move |m| m.trust_domain.as_ref() == Some(domain))
    }

    /// Other trust domains with living members.
    #[must_use]
    pub fn domains(&self) -> BTreeSet<TrustDomain> {
        self.peers().filter_map(|m| m.trust_domain.clone()).collect()
    }

    /// Bundles of other trust domains.
    pub fn bundles(&self) -> impl Iterator<Item = &Bundle> {
        self.bundles.values().map(|(b, _)| b)
    }

    /// That of one domain.
    #[must_use]
    pub fn bundle(&self, domain: &TrustDomain) -> Option<&Bundle> {
        self.bundles.get(domain).map(|(b, _)| b)
    }

    /// Takes a bundle if it is newer than what is there, and of a domain that somebody here is of.
    pub fn set_bundle(&mut self, new: Bundle) -> bool {
        let domain = new.bundle.trust_domain.clone();
        let old = self.bundles.get(&domain).map(|(b, _)| b.rank());
        let unwanted = self.own.as_ref() == Some(&domain)
            || old.is_some_and(|o| o >= new.rank())
            || (old.is_none() && self.bundles.len() >= MAX_DOMAINS)
            || self.of_domain(&domain).next().is_none();
        if unwanted {
            return false;
        }
        self.changes += 1;
        self.bundles.insert(domain, (new, self.changes));
        true
    }

    /// Rule 4.
    pub(super) fn drop_bundles(&mut self) -> bool {
        if self.bundles.is_empty() {
            return false;
        }
        let living = self.domains();
        let before = self.bundles.len();
        self.bundles.retain(|d, _| living.contains(d));
        if self.bundles.len() == before {
            return false;
        }
        self.changes += 1;
        true
    }

    /// A record as it is kept here: its domain is said unless it is the own one. `teller` is that of whoever told it.
    pub(super) fn inward(&self, teller: Option<&TrustDomain>, mut m: Member) -> Member {
        m.trust_domain = m.trust_domain.or_else(|| teller.cloned()).filter(|d| self.own.as_ref() != Some(d));
        if m.trust_domain.is_none() {
            m.home = 0;
        }
        m
    }

    /// What a member of another trust domain says of members (rules 1 and 3).
    pub(super) fn hear_of_domain(
        &mut self,
        domain: &TrustDomain,
        news: impl IntoIterator<Item = Member>,
    ) -> Merged {
        let mut clashes = Vec::new();
        let mut taken: Vec<Member> = Vec::new();
        let known = self.all.values().filter(|m| m.trust_domain.as_ref() == Some(domain)).count();
        for m in news {
            let m = self.inward(Some(domain), m);
            if m.trust_domain.as_ref() != Some(domain) {
                continue;
            }
            match self.all.get(&m.cluster) {
                Some(k) if m.cluster == self.me || k.trust_domain.as_ref() != Some(domain) => {
                    if !m.left && !k.left {
                        let holder = k.trust_domain.clone();
                        clashes.push(Clash { cluster: m.cluster, theirs: domain.clone(), holder });
                    }
                }
                Some(k) if k.left => {}
                Some(k) => {
                    let theirs = (m.epoch, m.left, m.evicted, m.revision);
                    if theirs > (k.home, k.left, k.evicted, k.revision) {
                        taken.push(Member { epoch: k.epoch, home: m.epoch, ..m });
                    }
                }
                None if m.left => {}
                None if known + taken.len() >= MAX_OF_DOMAIN => {}
                None => taken.push(Member { epoch: 1, home: m.epoch, ..m }),
            }
        }
        Merged { clashes, ..self.merge(taken) }
    }

    /// The record of a cluster of another trust domain that joins here, as it told it.
    #[must_use]
    pub fn foreign_admission(&self, domain: &TrustDomain, m: Member) -> Member {
        let epoch = self.all.get(&m.cluster).map_or(0, |m| m.epoch) + 1;
        Member { epoch, home: m.epoch, trust_domain: Some(domain.clone()), left: false, evicted: false, ..m }
    }

    /// Who has a name that a newcomer's record has under another trust domain.
    #[must_use]
    pub fn clash(&self, domain: &TrustDomain, m: &Member) -> Option<Clash> {
        let k = self.all.get(&m.cluster).filter(|k| !k.left)?;
        (m.cluster == self.me || k.trust_domain.as_ref() != Some(domain)).then(|| Clash {
            cluster: m.cluster.clone(),
            theirs: domain.clone(),
            holder: k.trust_domain.clone(),
        })
    }

    /// All clusters of a domain leave.
    pub fn domain_left(&mut self, domain: &TrustDomain) -> Merged {
        let names: Vec<_> = self.of_domain(domain).map(|m| m.cluster.clone()).collect();
        let mut out = Merged::default();
        for merged in names.iter().map(|n| self.left(n)).collect::<Vec<_>>() {
            out.changed |= merged.changed;
            out.gone.extend(merged.gone);
        }
        out
    }

    /// What a peer may be told that changed after a change, and bundles (rule 1).
    #[must_use]
    pub fn telling(&self, peer: &ClusterId, change: u64) -> (Vec<pb::Member>, Vec<pb::TrustBundle>) {
        let abroad = self.domain_of(peer).is_some();
        let members = self
            .all
            .values()
            .filter(|m| self.changed.get(&m.cluster).is_some_and(|c| *c > change))
            .filter(|m| !abroad || m.trust_domain.is_none())
            .map(wire::member_pb)
            .collect();
        let bundles = self.bundles.values().filter(|(_, c)| !abroad && *c > change).map(|(b, _)| b.to_pb());
        (members, bundles.collect())
    }

    /// Digest of what a peer is told.
    #[must_use]
    pub fn digest_for(&self, peer: &ClusterId) -> u64 {
        match self.domain_of(peer) {
            None => self.digest(),
            Some(_) => self.domain_digest(None),
        }
    }

    /// Digest of what a peer tells, as it is known here.
    #[must_use]
    pub fn digest_from(&self, peer: &ClusterId) -> u64 {
        match self.domain_of(peer) {
            None => self.digest(),
            Some(domain) => self.domain_digest(Some(domain)),
        }
    }

    /// Of the living members of a domain, equal there and here.
    fn domain_digest(&self, domain: Option<&TrustDomain>) -> u64 {
        let at_home = |m: &Member| {
            let epoch = if m.trust_domain.is_some() { m.home } else { m.epoch };
            hash(&Member { epoch, home: 0, trust_domain: None, ..m.clone() })
        };
        let of_it = self.all.values().filter(|m| !m.left && m.trust_domain.as_ref() == domain);
        of_it.fold(1, |d, m| d.wrapping_add(at_home(m)))
    }
}

#[cfg(test)]
mod tests;
