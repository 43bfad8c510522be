//! What one importer is sent, and when.

use mesh_model::ClusterId;

use super::{
    LEASE_INTERVAL_MS, PROTOCOL, PROTOCOL_PARTIAL, SOFTWARE,
    export::{Change, ExportLog, frame},
};
use crate::{
    membership::Membership,
    pb::{self, exporter_frame::Frame, importer_frame},
};

/// Changes in one go: a slow importer of a large table gets leases between them.
const BATCH: usize = 256;
/// Members in one frame.
const MEMBERS: usize = 256;
/// A member list that differs for this many acknowledgements, about seconds, is sent whole; if that does not help, as
/// between versions that read it differently, after twice as many, up to [`MAX_PATIENCE`].
const PATIENCE: u32 = 3;
const MAX_PATIENCE: u32 = 96;

/// Why an importer is sent nothing more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// No version of the exchange that both speak.
    #[error("no common protocol: the peer speaks {0} to {1}, this cluster {min} to {max}", min = PROTOCOL.0, max = PROTOCOL.1)]
    Protocol(u32, u32),
    /// It was a member.
    #[error("cluster {0} has left this mesh")]
    Left(ClusterId),
    /// A member declared it gone.
    #[error("cluster {0} was evicted from this mesh: it must join again")]
    Evicted(ClusterId),
}

/// The exporter's side of one stream. Times are milliseconds of any steady clock.
#[derive(Debug)]
pub struct Feed {
    peer: ClusterId,
    protocol: u32,
    welcomed: bool,
    /// The importer asked, and the log has not answered yet: what it holds.
    asked: Option<(u64, u64)>,
    /// Version up to which it was told everything, and the one that it has.
    cursor: u64,
    previous: u64,
    /// The table is being sent from nothing: head when that began.
    reset: Option<u64>,
    lease_due: u64,
    /// Changes of the member list up to here were sent.
    members: u64,
    disagreed: u32,
    patience: u32,
    acknowledged: u64,
}

impl Feed {
    /// Answers a subscription.
    ///
    /// # Errors
    /// [`FeedError::Protocol`].
    pub fn new(peer: ClusterId, s: &pb::Subscribe, members: &Membership) -> Result<Self, FeedError> {
        if s.max_protocol < PROTOCOL.0 || s.min_protocol > PROTOCOL.1 {
            return Err(FeedError::Protocol(s.min_protocol, s.max_protocol));
        }
        Ok(Self {
            protocol: PROTOCOL.1.min(s.max_protocol),
            welcomed: false,
            asked: Some((s.log_id, s.offset)),
            cursor: 0,
            previous: 0,
            reset: None,
            lease_due: 0,
            members: if s.members != 0 && s.members == members.digest_for(&peer) {
                members.changes()
            } else {
                0
            },
            peer,
            disagreed: 0,
            patience: PATIENCE,
            acknowledged: 0,
        })
    }

    /// The importer's further frames. What it says of itself is for [`super::Node::introduce`].
    pub fn on_frame(&mut self, f: &pb::ImporterFrame, members: &Membership) {
        match &f.frame {
            Some(importer_frame::Frame::Subscribe(s)) => self.asked = Some((s.log_id, s.offset)),
            Some(importer_frame::Frame::Received(r)) => {
                self.acknowledged = r.offset;
                let differs = r.members != 0 && r.members != members.digest_for(&self.peer);
                (self.disagreed, self.patience) =
                    if differs { (self.disagreed + 1, self.patience) } else { (0, PATIENCE) };
                if self.disagreed >= self.patience {
                    (self.disagreed, self.patience) = (0, (self.patience * 2).min(MAX_PATIENCE));
                    self.members = 0;
                }
            }
            None => {}
        }
    }

    /// Version that the importer has confirmed.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// When it wants to be polled without any change.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        self.lease_due
    }

    /// Frames to send now; `true` if there are more at once.
    ///
    /// # Errors
    /// [`FeedError`]: the importer is no member any more.
    pub fn poll(
        &mut self,
        now: u64,
        log: &ExportLog,
        members: &Membership,
    ) -> Result<(Vec<pb::ExporterFrame>, bool), FeedError> {
        match members.get(&self.peer) {
            Some(m) if m.evicted => return Err(FeedError::Evicted(self.peer.clone())),
            Some(m) if !m.left => {}
            _ => return Err(FeedError::Left(self.peer.clone())),
        }
        let mut out = Vec::new();
        if !self.welcomed {
            self.welcomed = true;
            out.push(frame(Frame::Welcome(pb::Welcome {
                protocol: self.protocol,
                log_id: log.id(),
                software: SOFTWARE.to_owned(),
            })));
        }
        if self.members < members.changes() {
            let (news, bundles) = members.telling(&self.peer, self.members);
            let told = |members: &[pb::Member], bundles: Vec<pb::TrustBundle>| {
                frame(Frame::Members(pb::Members { members: members.to_vec(), bundles }))
            };
            out.extend(news.chunks(MEMBERS).map(|c| told(c, vec![])));
            // After the members whose domains they are of; each may be as large as a frame should be.
            out.extend(bundles.into_iter().map(|b| told(&[], vec![b])));
            self.members = members.changes();
        }
        if !log.ready() {
            self.lease_due = now + LEASE_INTERVAL_MS;
            return Ok((out, false));
        }
        let mut lease = now >= self.lease_due;
        if let Some((log_id, offset)) = self.asked.take() {
            lease = true;
            if log_id == log.id() && offset >= log.horizon() && offset <= log.head() {
                (self.cursor, self.previous, self.reset) = (offset, offset, None);
            } else {
                self.start_over(log, &mut out);
            }
        } else if log.horizon() > self.cursor.max(self.reset.unwrap_or(0)) {
            // So slow that a withdrawal it has not seen is forgotten.
            self.start_over(log, &mut out);
        }
        let full = out.len() + BATCH;
        for (version, change) in log.after(self.cursor, &self.peer) {
            if out.len() >= full {
                break;
            }
            self.cursor = version;
            let previous = self.previous;
            out.push(frame(match change {
                Change::Hidden => continue,
                Change::Announce(service) => Frame::Announce(pb::Announce { version, previous, service }),
                // A table that starts empty has nothing to withdraw.
                Change::Withdraw(_) if self.reset.is_some_and(|head| version <= head) => continue,
                Change::Withdraw((namespace, name)) => {
                    Frame::Withdraw(pb::Withdraw { version, previous, namespace, name })
                }
            }));
            self.previous = version;
        }
        let complete = self.cursor == log.head();
        // A table that was filled takes over with the lease that confirms it.
        if complete && (lease || self.reset.is_some()) {
            let l = pb::Lease { members: members.digest_for(&self.peer), ..log.lease(&self.peer) };
            out.push(frame(Frame::Lease(l)));
            (self.previous, self.reset) = (log.head(), None);
            self.lease_due = now + LEASE_INTERVAL_MS;
        } else if lease && self.protocol >= PROTOCOL_PARTIAL {
            let duration_ms = super::LEASE_MS;
            let version = log.head();
            let l = pb::Lease { duration_ms, version, partial: true, ..Default::default() };
            out.push(frame(Frame::Lease(l)));
            self.lease_due = now + LEASE_INTERVAL_MS;
        }
        Ok((out, !complete))
    }

    fn start_over(&mut self, log: &ExportLog, out: &mut Vec<pb::ExporterFrame>) {
        out.push(frame(Frame::Reset(pb::Reset { log_id: log.id() })));
        (self.cursor, self.previous, self.reset) = (0, 0, Some(log.head()));
    }
}
