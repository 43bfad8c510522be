//! A member of the mesh: membership, what it exports, what it imports and when it dials.

use std::collections::BTreeMap;

use mesh_model::{
    ClusterId, TrustDomain,
    federation::{Conflict, Offer},
};

use super::{
    DialBudget, ExportLog, Feed, FeedError, Follower, Import, LEASE_MS, Next, PROTOCOL, Persisted, SOFTWARE,
    ServiceKey, Step, conflicts::Conflicts, pace::Pace,
};
use crate::{
    membership::{Bundle, MAX_DOMAINS, Membership, Merged, NotAMember},
    pb::{self, ImporterFrame, exporter_frame::Frame, importer_frame},
    wire::{self, Member},
};

/// Why a subscription is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// It is of no member.
    #[error(transparent)]
    NotAMember(#[from] NotAMember),
    /// Protocol versions.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// The subscription cannot be read.
    #[error("the subscription: {0}")]
    Subscription(String),
}

/// What a frame of a peer did.
#[derive(Debug, Default)]
pub struct Heard {
    /// To the import.
    pub step: Step,
    /// To the member list.
    pub merged: Merged,
    /// Frame to send back.
    pub reply: Option<ImporterFrame>,
}

/// All state of a member, without I/O. Times are milliseconds of one steady clock.
#[derive(Debug)]
pub struct Node {
    /// This cluster as it presents itself; its epoch and revision are in the member list.
    this: Member,
    /// The member list.
    pub members: Membership,
    /// What is exported.
    pub exports: ExportLog,
    /// What is imported, by peer.
    pub imports: BTreeMap<ClusterId, Import>,
    pace: Pace,
    conflicts: Conflicts,
    followers: BTreeMap<ClusterId, Follower>,
    budget: DialBudget,
}

impl Node {
    /// From what was kept. `log_id` must differ from that of every earlier run.
    pub fn new(
        this: Member,
        kept: BTreeMap<ClusterId, Member>,
        imports: impl Fn(&ClusterId) -> Persisted,
        log_id: u64,
        now: u64,
    ) -> Self {
        let mut members = Membership::new(this.cluster.clone(), kept);
        if members.get(&this.cluster).is_some() {
            // It may have other gateways than before the restart.
            members.set_self(this.clone());
        }
        let peers: Vec<_> = members.peers().map(|m| m.cluster.clone()).collect();
        let grace = u64::from(LEASE_MS);
        let import =
            |p: &ClusterId| Import::new(imports(p), now, grace).of_domain(members.domain_of(p).cloned());
        Self {
            imports: peers.iter().map(|p| (p.clone(), import(p))).collect(),
            followers: peers.into_iter().map(|p| (p, Follower::new(now))).collect(),
            this,
            members,
            exports: ExportLog::new(log_id),
            pace: Pace::default(),
            conflicts: Conflicts::default(),
            budget: DialBudget::new(now),
        }
    }

    /// This cluster as members know it.
    #[must_use]
    pub fn this(&self) -> Member {
        self.members.get(&self.this.cluster).filter(|m| !m.left).cloned().unwrap_or_else(|| self.this.clone())
    }

    /// Puts this cluster into the member list: it has founded a mesh, or joined one in `epoch`.
    pub fn enter(&mut self, epoch: u64) {
        self.members.set_self(Member { epoch, ..self.this.clone() });
    }

    /// What this cluster exports changes (`None` withdraws). Nothing is told before the first call. It is told by
    /// [`Self::flush`].
    pub fn offer(&mut self, changes: impl IntoIterator<Item = (ServiceKey, Option<Offer>)>) {
        self.pace.push(changes);
    }

    /// When to flush; `None` while no change waits.
    #[must_use]
    pub fn flush_due(&self) -> Option<u64> {
        self.pace.deadline()
    }

    /// Takes the changes whose time has come into the log; answers whether it changed, so that feeds are polled.
    pub fn flush(&mut self, now: u64) -> bool {
        self.pace.flush(now, &mut self.exports)
    }

    fn follow(&mut self, merged: &Merged, now: u64) {
        for peer in &merged.gone {
            self.imports.remove(peer);
            self.followers.remove(peer);
            self.conflicts.forget(peer);
        }
        for peer in &merged.arrived {
            let import = Import::new(Persisted::default(), now, u64::from(LEASE_MS));
            self.imports.insert(peer.clone(), import.of_domain(self.members.domain_of(peer).cloned()));
            self.followers.insert(peer.clone(), Follower::new(now));
        }
    }

    /// What a member says of members.
    pub fn merge(&mut self, news: impl IntoIterator<Item = Member>, now: u64) -> Merged {
        let merged = self.members.merge(news);
        self.follow(&merged, now);
        merged
    }

    /// Clusters of another trust domain join, with its roots.
    pub fn federate(&mut self, joining: Vec<Member>, bundle: Bundle, now: u64) -> Merged {
        let mut merged = self.members.merge(joining);
        merged.changed |= self.members.set_bundle(bundle);
        self.follow(&merged, now);
        merged
    }

    /// All clusters of another trust domain leave.
    pub fn domain_left(&mut self, domain: &TrustDomain, now: u64) -> Merged {
        let merged = self.members.domain_left(domain);
        self.follow(&merged, now);
        merged
    }

    /// A member leaves by itself.
    pub fn left(&mut self, peer: &ClusterId, now: u64) -> Merged {
        let merged = self.members.left(peer);
        self.follow(&merged, now);
        merged
    }

    /// Declares a cluster gone.
    ///
    /// # Errors
    /// [`crate::membership::EvictError`].
    pub fn evict(&mut self, peer: &ClusterId, now: u64) -> Result<Merged, crate::membership::EvictError> {
        let merged = self.members.evict(peer)?;
        self.follow(&merged, now);
        Ok(merged)
    }

    /// A peer, known by its certificate, subscribes. It is there, so it is dialled as well.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn accept(
        &mut self,
        peer: &ClusterId,
        s: &pb::Subscribe,
        now: u64,
    ) -> Result<(Feed, Merged), NodeError> {
        let merged = self.introduce(peer, s, now)?;
        if let Some(f) = self.followers.get_mut(peer) {
            f.nudge(now);
        }
        Ok((Feed::new(peer.clone(), s, &self.members)?, merged))
    }

    /// A peer says who it is, in a subscription.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn introduce(&mut self, peer: &ClusterId, s: &pb::Subscribe, now: u64) -> Result<Merged, NodeError> {
        let this =
            s.self_.clone().ok_or_else(|| NodeError::Subscription("it does not say of whom".into()))?;
        let this = wire::member(this).map_err(|e| NodeError::Subscription(e.to_string()))?;
        let merged = self.members.introduce(peer, this)?;
        self.follow(&merged, now);
        Ok(merged)
    }

    /// What is due for a peer; `None` if it is none.
    pub fn next(&mut self, peer: &ClusterId, now: u64) -> Option<Next> {
        Some(self.followers.get_mut(peer)?.next(now, &mut self.budget))
    }

    /// The stream to a peer is open: the subscription to send. `None` if it is no member any more.
    pub fn connected(&mut self, peer: &ClusterId, now: u64) -> Option<ImporterFrame> {
        self.followers.get_mut(peer)?.connected(now);
        self.conflicts.connected(peer);
        self.subscription(peer)
    }

    /// The stream to a peer ended or was never opened. `jitter` is uniform in 0 to 1.
    pub fn lost(&mut self, peer: &ClusterId, now: u64, jitter: f64) {
        if let Some(f) = self.followers.get_mut(peer) {
            f.lost(now, jitter);
        }
    }

    /// Whether the stream to a peer is open.
    #[must_use]
    pub fn streaming(&self, peer: &ClusterId) -> bool {
        self.followers.get(peer).is_some_and(Follower::streaming)
    }

    fn subscription(&mut self, peer: &ClusterId) -> Option<ImporterFrame> {
        let this = wire::member_pb(&self.this());
        let members = self.members.digest_from(peer);
        let (log_id, offset) = self.imports.get_mut(peer)?.subscribe();
        let subscribe = pb::Subscribe {
            min_protocol: PROTOCOL.0,
            max_protocol: PROTOCOL.1,
            log_id,
            offset,
            self_: Some(this),
            members,
            software: SOFTWARE.to_owned(),
        };
        Some(ImporterFrame { frame: Some(importer_frame::Frame::Subscribe(subscribe)) })
    }

    /// Takes a frame of a peer's stream; `None` if it is no member any more.
    pub fn on_frame(&mut self, peer: &ClusterId, f: pb::ExporterFrame, now: u64) -> Option<Heard> {
        self.followers.get_mut(peer)?.heard(now);
        let mut heard = Heard::default();
        if let Some(Frame::Members(m)) = f.frame {
            // A list that cannot be read entirely is used as far as it can.
            let news = m.members.into_iter().filter_map(|m| wire::member(m).ok());
            heard.merged = self.members.hear(peer, news);
            if self.members.domain_of(peer).is_none() {
                for b in m.bundles.iter().take(MAX_DOMAINS) {
                    heard.merged.changed |= Bundle::from_pb(b).is_ok_and(|b| self.members.set_bundle(b));
                }
            }
            self.follow(&heard.merged, now);
            return Some(heard);
        }
        let stamp = match &f.frame {
            Some(Frame::Lease(l)) => Some(l.stamp),
            _ => None,
        };
        let members = self.members.digest_from(peer);
        let import = self.imports.get_mut(peer)?;
        heard.step = import.on_frame(now, f);
        if heard.step.resubscribe {
            heard.reply = self.subscription(peer);
        } else if let Some(stamp) = stamp {
            let conflicts = self.conflicts.tell(peer);
            let received = pb::Received { offset: import.offset(), members, conflicts, stamp };
            heard.reply = Some(ImporterFrame { frame: Some(importer_frame::Frame::Received(received)) });
        }
        Some(heard)
    }

    /// Exports of one service that contradict each other, as this cluster's pilot finds them. Their exporters are told.
    pub fn set_conflicts(&mut self, all: impl IntoIterator<Item = Conflict>) {
        self.conflicts.set(all);
    }

    /// Takes a frame of an importer that is not a subscription (see [`Self::introduce`]); answers conflicts of this
    /// cluster's exports that are news.
    pub fn heard_from(&mut self, peer: &ClusterId, feed: &mut Feed, f: &ImporterFrame) -> Vec<Conflict> {
        feed.on_frame(f, &self.members);
        let Some(importer_frame::Frame::Received(pb::Received { conflicts: Some(said), .. })) = &f.frame
        else {
            return vec![];
        };
        let exports = &self.exports;
        let exported = |ns: &str, name: &str| exports.is_told(&(ns.to_owned(), name.to_owned()), peer);
        self.conflicts.hear(&self.this.cluster, peer, said, exported)
    }

    /// Exports of this cluster whose definitions are not used, with the members that say so.
    #[must_use]
    pub fn lost_conflicts(&self) -> Vec<(Conflict, Vec<ClusterId>)> {
        self.conflicts.lost(&self.this.cluster)
    }

    /// Frames for an importer; see [`Feed::poll`].
    ///
    /// # Errors
    /// [`FeedError`].
    pub fn feed(&self, feed: &mut Feed, now: u64) -> Result<(Vec<pb::ExporterFrame>, bool), FeedError> {
        feed.poll(now, &self.exports, &self.members)
    }

    /// Lets leases lapse; answers whose did.
    pub fn tick(&mut self, now: u64) -> Vec<ClusterId> {
        let all = self.imports.iter_mut();
        all.filter_map(|(peer, i)| i.tick(now).changed.then(|| peer.clone())).collect()
    }

    /// Forgets the mesh: this cluster has left it.
    pub fn clear(&mut self) {
        self.members.clear();
        self.conflicts = Conflicts::default();
        self.imports.clear();
        self.followers.clear();
    }
}
