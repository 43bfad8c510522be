//! Who is a member of the mesh: records that spread from member to member.
//!
//! Rules:
//! 1. Records of one cluster are ordered by epoch, then tombstones before the living, then evictions before
//!    departures, then revision. The greatest wins everywhere, in whatever order records arrive.
//! 2. An epoch begins with a join or with a tombstone, and only the member that signs a join and the member that hears
//!    a departure or declares an eviction begin one. What a cluster says of itself never does, so that one that is gone
//!    cannot return by claiming so.
//! 3. A cluster's own record is its own: others' records of it only teach it its epoch, and which revisions are taken.
//! 4. Tombstones stay.
//! 5. Members of other trust domains have rules of their own: see [`domains`].

mod domains;

use std::collections::BTreeMap;

use mesh_model::{ClusterId, TrustDomain};
use prost::Message as _;

pub use self::domains::{Bundle, Clash, MAX_DOMAINS};
use crate::wire::{self, Member};

/// Members and tombstones that are kept; further clusters are not taken in.
pub const MAX_MEMBERS: usize = 4096;

/// What a merge did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Merged {
    /// Something is different.
    pub changed: bool,
    /// Clusters that are members now and were not.
    pub arrived: Vec<ClusterId>,
    /// Clusters that were members.
    pub gone: Vec<ClusterId>,
    /// Names that another trust domain tells and that somebody else has.
    pub clashes: Vec<Clash>,
}

/// Why a cluster may not speak as a member.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAMember {
    /// It left.
    #[error("cluster {0} has left this mesh: it must join again")]
    Left(ClusterId),
    /// It was declared gone.
    #[error("cluster {0} was evicted from this mesh: it must join again, with a new token")]
    Evicted(ClusterId),
    /// Certificate and words differ.
    #[error("the certificate is of cluster {certificate}, the subscription of {claimed}")]
    Impostor {
        /// Of the certificate.
        certificate: ClusterId,
        /// Of the subscription.
        claimed: ClusterId,
    },
    /// The list is full.
    #[error("this cluster knows {MAX_MEMBERS} members and takes in no more")]
    Full,
}

/// Why a cluster was not evicted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvictError {
    /// It is this one.
    #[error("{0} is this cluster: use `flotilla leave-cluster`")]
    Itself(ClusterId),
    /// Nobody of that name.
    #[error("no cluster {0} is or was a member of this mesh; `flotilla clusters` lists them")]
    Unknown(ClusterId),
}

/// The member list as one member knows it, itself included.
#[derive(Debug, Clone)]
pub struct Membership {
    me: ClusterId,
    /// The own trust domain, while this cluster knows it.
    own: Option<TrustDomain>,
    all: BTreeMap<ClusterId, Member>,
    /// Of other trust domains, each with the number of the change that brought it.
    bundles: BTreeMap<TrustDomain, (Bundle, u64)>,
    /// Number of the change that brought each record, of this run.
    changed: BTreeMap<ClusterId, u64>,
    changes: u64,
    digest: u64,
}

/// The order of records of one cluster. The own trust domain goes before another that has taken the same name.
fn rank(m: &Member) -> (u64, bool, bool, bool, u64, u64) {
    (m.epoch, m.left, m.evicted, m.trust_domain.is_none(), m.home, m.revision)
}

/// Of the whole record: a member that lost its state may tell something else under a number that it has used.
fn hash(m: &Member) -> u64 {
    fnv(&wire::member_pb(m).encode_to_vec())
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3))
}

impl Membership {
    /// From what was kept.
    #[must_use]
    pub fn new(me: ClusterId, kept: BTreeMap<ClusterId, Member>) -> Self {
        let mut out = Self {
            me,
            own: None,
            all: BTreeMap::new(),
            bundles: BTreeMap::new(),
            changed: BTreeMap::new(),
            changes: 0,
            digest: 0,
        };
        for m in kept.into_values() {
            out.put(m);
        }
        out
    }

    fn put(&mut self, m: Member) {
        if let Some(old) = self.all.get(&m.cluster) {
            self.digest = self.digest.wrapping_sub(hash(old));
        }
        self.digest = self.digest.wrapping_add(hash(&m));
        self.changes += 1;
        self.changed.insert(m.cluster.clone(), self.changes);
        self.all.insert(m.cluster.clone(), m);
    }

    /// The record of a cluster, or its tombstone.
    #[must_use]
    pub fn get(&self, cluster: &ClusterId) -> Option<&Member> {
        self.all.get(cluster)
    }

    /// Whether it is a member now.
    #[must_use]
    pub fn is_member(&self, cluster: &ClusterId) -> bool {
        self.all.get(cluster).is_some_and(|m| !m.left)
    }

    /// All records.
    #[must_use]
    pub fn all(&self) -> &BTreeMap<ClusterId, Member> {
        &self.all
    }

    /// Members other than this cluster.
    pub fn peers(&self) -> impl Iterator<Item = &Member> {
        self.all.values().filter(|m| !m.left && m.cluster != self.me)
    }

    /// Other clusters that were members and are none, whether they left or were evicted.
    pub fn former(&self) -> impl Iterator<Item = &Member> {
        self.all.values().filter(|m| m.left && m.cluster != self.me)
    }

    /// Clusters that were declared gone.
    pub fn evicted(&self) -> impl Iterator<Item = &ClusterId> {
        self.all.values().filter(|m| m.evicted).map(|m| &m.cluster)
    }

    /// Number of the last change.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Equal in members of one trust domain that know the same.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.bundles.values().fold(self.digest, |d, (b, _)| d.wrapping_add(b.hash()))
    }

    /// This cluster as it is now; its epoch is kept, and a difference is a new revision.
    pub fn set_self(&mut self, mut this: Member) -> bool {
        if let Some(old) = self.all.get(&self.me).filter(|m| !m.left) {
            (this.epoch, this.revision) = (old.epoch.max(this.epoch), old.revision);
            if this == *old {
                return false;
            }
            this.revision += 1;
        }
        self.put(this);
        true
    }

    /// What others say, a member or the one that signed the join of this cluster.
    pub fn merge(&mut self, news: impl IntoIterator<Item = Member>) -> Merged {
        let mut out = Merged::default();
        for m in news {
            let m = self.inward(None, m);
            if m.cluster == self.me {
                self.learn_epoch(&m, &mut out);
                continue;
            }
            let known = self.all.get(&m.cluster);
            if known.is_some_and(|k| rank(k) >= rank(&m))
                || (known.is_none() && self.all.len() >= MAX_MEMBERS)
            {
                continue;
            }
            match (known.is_some_and(|k| !k.left), !m.left) {
                (false, true) => out.arrived.push(m.cluster.clone()),
                (true, false) => out.gone.push(m.cluster.clone()),
                // The name is somebody else's now.
                (true, true) if known.is_some_and(|k| k.trust_domain != m.trust_domain) => {
                    out.gone.push(m.cluster.clone());
                    out.arrived.push(m.cluster.clone());
                }
                _ => {}
            }
            out.changed = true;
            self.put(m);
        }
        out.changed |= self.drop_bundles();
        out
    }

    /// What a member says of members. Of itself it is believed no more than in [`Self::introduce`]: it may be evicted,
    /// and this cluster not know yet.
    pub fn hear(&mut self, peer: &ClusterId, news: impl IntoIterator<Item = Member>) -> Merged {
        if let Some(domain) = self.domain_of(peer).cloned() {
            return self.hear_of_domain(&domain, news);
        }
        let known = self.all.get(peer).map_or(0, |m| m.epoch);
        // Rule 2.
        let epoch = |m: &Member| if m.cluster == *peer { m.epoch.min(known) } else { m.epoch };
        self.merge(news.into_iter().map(|m| Member { epoch: epoch(&m), ..m }).collect::<Vec<_>>())
    }

    fn learn_epoch(&mut self, m: &Member, out: &mut Merged) {
        let Some(own) = self.all.get(&self.me) else { return };
        let same = (&m.network, &m.gateways, &m.transports) == (&own.network, &own.gateways, &own.transports);
        let (theirs, ours) = ((m.epoch, m.revision), (own.epoch, own.revision));
        if m.left || theirs < ours || (theirs == ours && same) {
            return;
        }
        let revision = if same { m.revision } else { m.revision + 1 };
        let own = Member { epoch: m.epoch, revision, ..own.clone() };
        self.put(own);
        out.changed = true;
    }

    /// A cluster presents itself over a connection that its certificate vouches for.
    ///
    /// # Errors
    /// [`NotAMember`].
    pub fn introduce(&mut self, peer: &ClusterId, mut this: Member) -> Result<Merged, NotAMember> {
        if this.cluster != *peer || this.left || *peer == self.me {
            return Err(NotAMember::Impostor { certificate: peer.clone(), claimed: this.cluster });
        }
        match self.all.get(peer) {
            Some(k) if k.evicted => return Err(NotAMember::Evicted(peer.clone())),
            Some(k) if k.left => return Err(NotAMember::Left(peer.clone())),
            Some(Member { trust_domain: Some(domain), .. }) => {
                let domain = domain.clone();
                return Ok(self.hear_of_domain(&domain, [this]));
            }
            // Rule 2.
            Some(k) => this.epoch = this.epoch.min(k.epoch),
            None if self.all.len() >= MAX_MEMBERS => return Err(NotAMember::Full),
            // This cluster may have lost its list, and with it a tombstone that others still have.
            None => this.epoch = this.epoch.min(1),
        }
        // Nobody of another trust domain gets here without being in the list.
        (this.trust_domain, this.home) = (None, 0);
        Ok(self.merge([this]))
    }

    /// The record of a cluster that joins here.
    #[must_use]
    pub fn admission(&self, mut newcomer: Member) -> Member {
        (newcomer.trust_domain, newcomer.home) = (None, 0);
        newcomer.epoch = self.all.get(&newcomer.cluster).map_or(0, |m| m.epoch) + 1;
        (newcomer.left, newcomer.evicted, newcomer.revision) = (false, false, 0);
        newcomer
    }

    /// A member leaves by itself.
    pub fn left(&mut self, cluster: &ClusterId) -> Merged {
        self.bury(cluster, false)
    }

    /// Declares a cluster gone, dead or alive. Nothing happens if it is already.
    ///
    /// # Errors
    /// [`EvictError`].
    pub fn evict(&mut self, cluster: &ClusterId) -> Result<Merged, EvictError> {
        if *cluster == self.me {
            return Err(EvictError::Itself(cluster.clone()));
        }
        match self.all.get(cluster) {
            None => Err(EvictError::Unknown(cluster.clone())),
            Some(m) if m.evicted => Ok(Merged::default()),
            Some(_) => Ok(self.bury(cluster, true)),
        }
    }

    fn bury(&mut self, cluster: &ClusterId, evicted: bool) -> Merged {
        let Some(m) = self.all.get(cluster).filter(|m| !m.left || evicted) else { return Merged::default() };
        // A cluster that left and is evicted afterwards stays in the epoch of its departure.
        let epoch = if m.left { m.epoch } else { m.epoch + 1 };
        let gone = Member { epoch, left: true, evicted, gateways: vec![], revision: 0, ..m.clone() };
        self.merge([gone])
    }

    /// Forgets everything: this cluster has left.
    pub fn clear(&mut self) {
        self.all.clear();
        self.bundles.clear();
        self.changed.clear();
        self.digest = 0;
        self.changes += 1;
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::NetworkId;
    use proptest::prelude::*;

    use super::*;

    fn id(s: &str) -> ClusterId {
        ClusterId::new(s).unwrap()
    }

    fn record(name: &str, epoch: u64) -> Member {
        Member {
            cluster: id(name),
            network: NetworkId::new(name).unwrap(),
            gateways: vec![],
            transports: vec![],
            epoch,
            left: false,
            revision: 0,
            evicted: false,
            trust_domain: None,
            home: 0,
        }
    }

    fn list(me: &str, others: &[&str]) -> Membership {
        let mut m = Membership::new(id(me), BTreeMap::new());
        m.set_self(record(me, 1));
        m.merge(others.iter().map(|n| record(n, 1)));
        m
    }

    #[test]
    fn who_was_evicted_returns_only_by_a_new_join() {
        let mut m = list("a", &["b", "c"]);
        assert_eq!(m.evict(&id("a")), Err(EvictError::Itself(id("a"))));
        assert_eq!(m.evict(&id("x")), Err(EvictError::Unknown(id("x"))));
        assert_eq!(m.evict(&id("b")).unwrap().gone, [id("b")]);
        assert_eq!(m.evict(&id("b")).unwrap(), Merged::default(), "once is enough");
        for epoch in [1, 2, 3, 1 << 40] {
            let back = m.introduce(&id("b"), record("b", epoch));
            assert_eq!(back, Err(NotAMember::Evicted(id("b"))), "epoch {epoch}");
        }
        assert!(!m.merge([record("b", 1), record("b", 2)]).changed, "old gossip");
        // Somebody who has not heard of it lets it speak, but not of an epoch that nobody opened.
        let mut other = list("c", &["a", "b"]);
        let _ = other.introduce(&id("b"), record("b", 1 << 40)).unwrap();
        assert_eq!(other.get(&id("b")).unwrap().epoch, 1);
        other.merge(m.all().values().cloned());
        assert!(!other.is_member(&id("b")));
        // Nor does one that has lost its list: what others know comes back, and wins.
        let mut lost = list("c", &[]);
        let _ = lost.introduce(&id("b"), record("b", 1 << 40)).unwrap();
        m.merge(lost.all().values().cloned());
        lost.merge(m.all().values().cloned());
        assert!(!m.is_member(&id("b")) && !lost.is_member(&id("b")));
        let again = m.admission(record("b", 0));
        assert_eq!(m.merge([again]).arrived, [id("b")]);
        assert!(m.introduce(&id("b"), record("b", 1)).is_ok());
    }

    /// A join that only its signer knew of, and the signer loses its list: the tombstone is all that is known, in every
    /// member alike, and another join ends it.
    #[test]
    fn a_join_that_was_forgotten_is_repeated() {
        let mut founder = list("a", &["b", "c"]);
        founder.evict(&id("b")).unwrap();
        let mut other = list("c", &["a", "b"]);
        other.merge(founder.all().values().cloned());
        let joined = founder.admission(record("b", 0));
        assert_eq!(joined.epoch, 3);
        let mut founder = list("a", &[]);
        let _ = founder.introduce(&id("b"), joined.clone()).unwrap();
        founder.merge(other.all().values().cloned());
        for m in [&mut founder, &mut other] {
            assert_eq!(m.introduce(&id("b"), joined.clone()), Err(NotAMember::Evicted(id("b"))));
        }
        let again = founder.admission(record("b", 0));
        founder.merge([again]);
        other.merge(founder.all().values().cloned());
        assert!(other.introduce(&id("b"), joined).is_ok());
        assert_eq!(founder.all(), other.all());
    }

    #[test]
    fn a_cluster_that_left_may_be_evicted_too() {
        let mut m = list("a", &["b"]);
        assert_eq!(m.left(&id("b")).gone, [id("b")]);
        let merged = m.evict(&id("b")).unwrap();
        assert!(merged.changed && merged.gone.is_empty());
        assert_eq!(m.left(&id("b")), Merged::default());
        assert_eq!(m.evicted().count(), 1);
    }

    #[test]
    fn new_addresses_spread_after_a_restart_even_without_state() {
        let mut a = list("a", &[]);
        a.set_self(record("a", 5));
        let mut b = list("b", &["a"]);
        b.merge(a.all().values().cloned());
        let moved = || Member { network: NetworkId::new("other").unwrap(), ..record("a", 1) };
        let mut lost = Membership::new(id("a"), BTreeMap::new());
        lost.set_self(moved());
        assert!(!b.introduce(&id("a"), lost.get(&id("a")).unwrap().clone()).unwrap().changed, "it is of old");
        lost.merge(b.all().values().cloned());
        assert!(b.introduce(&id("a"), lost.get(&id("a")).unwrap().clone()).unwrap().changed);
        assert_eq!(b.get(&id("a")).unwrap().network.as_str(), "other");
        assert_eq!(b.digest(), {
            lost.merge(b.all().values().cloned());
            lost.digest()
        });
    }

    proptest! {
        /// Whatever the order and however often: the same records end in the same list.
        #[test]
        fn merging_is_commutative(
            records in prop::collection::vec((0usize..4, 0u64..4, any::<bool>(), any::<bool>(), 0u64..3), 0..40),
            order in any::<u64>(),
        ) {
            let records: Vec<Member> = records.into_iter().map(|(n, epoch, left, evicted, revision)| Member {
                left: left || evicted, evicted, revision, ..record(["b", "c", "d", "e"][n], epoch)
            }).collect();
            let mut one = list("a", &[]);
            one.merge(records.clone());
            let mut other = list("a", &[]);
            let mut shuffled = records.clone();
            if !shuffled.is_empty() {
                let by = usize::try_from(order % shuffled.len() as u64).unwrap();
                shuffled.rotate_left(by);
                shuffled.reverse();
            }
            for r in shuffled.into_iter().chain(records) {
                other.merge([r]);
            }
            prop_assert_eq!(one.all(), other.all());
            prop_assert_eq!(one.digest(), other.digest());
        }
    }
}
