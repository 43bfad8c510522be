//! Exports of one service that contradict each other, and how their owners hear of it.
//!
//! The importer decides: its pilot uses the oldest export's definition (MCS API), and tells this machine which other
//! exports contradict it. It tells their exporters with its acknowledgements; a list is whole, so that the last one heard
//! is what holds, and is repeated, so that nothing is lost for good.

use std::collections::BTreeMap;

use mesh_model::{
    ClusterId,
    federation::{Conflict, ConflictReason},
};

use crate::{pb, wire};

/// Acknowledgements, one a second, after which a list is told again.
const REPEAT: u8 = 10;
/// Conflicts that one peer is told of, and may tell of; the others wait until these are mended.
pub(super) const MAX: usize = 64;

/// What is known of contradictions.
#[derive(Debug, Default)]
pub(super) struct Conflicts {
    /// By the exporter that lost; one that was told of some is told of none as well.
    found: BTreeMap<ClusterId, Vec<Conflict>>,
    /// Acknowledgements until a peer is told again.
    turn: BTreeMap<ClusterId, u8>,
    /// About this cluster's exports, by the peer that says so.
    reported: BTreeMap<ClusterId, Vec<Conflict>>,
}

impl Conflicts {
    /// What this cluster's pilot has found.
    pub(super) fn set(&mut self, all: impl IntoIterator<Item = Conflict>) {
        let mut found: BTreeMap<ClusterId, Vec<Conflict>> =
            self.found.keys().map(|loser| (loser.clone(), vec![])).collect();
        for c in all {
            found.entry(c.loser.clone()).or_default().push(c);
        }
        for (loser, list) in &found {
            if self.found.get(loser) != Some(list) {
                self.turn.insert(loser.clone(), 0);
            }
        }
        self.found = found;
    }

    /// A stream to the peer is new: it is told with the first acknowledgement.
    pub(super) fn connected(&mut self, peer: &ClusterId) {
        if let Some(t) = self.turn.get_mut(peer) {
            *t = 0;
        }
    }

    /// What to tell a peer with this acknowledgement, if anything.
    pub(super) fn tell(&mut self, peer: &ClusterId) -> Option<pb::Conflicts> {
        let turn = self.turn.get_mut(peer)?;
        if *turn > 0 {
            *turn -= 1;
            return None;
        }
        *turn = REPEAT;
        let list = self.found.get(peer)?.iter().take(MAX).map(conflict_pb).collect();
        Some(pb::Conflicts { list })
    }

    /// What a peer says about this cluster's exports; answers what it did not say before. `exported` says whether it may
    /// know of a service.
    pub(super) fn hear(
        &mut self,
        me: &ClusterId,
        peer: &ClusterId,
        said: &pb::Conflicts,
        exported: impl Fn(&str, &str) -> bool,
    ) -> Vec<Conflict> {
        let list: Vec<Conflict> = said
            .list
            .iter()
            .take(MAX)
            .filter(|c| exported(&c.namespace, &c.name))
            .filter_map(|c| conflict(me, c).ok())
            .collect();
        let before = self.reported.remove(peer).unwrap_or_default();
        let news = list.iter().filter(|c| !before.contains(c)).cloned().collect();
        if !list.is_empty() {
            self.reported.insert(peer.clone(), list);
        }
        news
    }

    /// Who is no member any more finds and loses nothing.
    pub(super) fn forget(&mut self, peer: &ClusterId) {
        self.found.remove(peer);
        self.turn.remove(peer);
        self.reported.remove(peer);
    }

    /// Conflicts that this cluster's exports have lost, with those who say so, itself among them.
    pub(super) fn lost(&self, me: &ClusterId) -> Vec<(Conflict, Vec<ClusterId>)> {
        let own = self.found.get(me).map(|l| (me, l));
        let mut out: Vec<(Conflict, Vec<ClusterId>)> = Vec::new();
        for (by, list) in own.into_iter().chain(&self.reported) {
            for c in list {
                match out.iter_mut().find(|(known, _)| known == c) {
                    Some((_, from)) => from.push(by.clone()),
                    None => out.push((c.clone(), vec![by.clone()])),
                }
            }
        }
        out
    }
}

pub(crate) fn conflict_pb(c: &Conflict) -> pb::Conflict {
    pb::Conflict {
        namespace: c.namespace.clone(),
        name: c.name.clone(),
        winner: c.winner.to_string(),
        reason: c.reason.as_str().to_owned(),
        message: c.message.clone(),
    }
}

fn conflict(me: &ClusterId, c: &pb::Conflict) -> Result<Conflict, wire::WireError> {
    wire::text("conflict", &c.message)?;
    let winner = ClusterId::new(&c.winner).map_err(|e| wire::WireError(e.to_string()))?;
    Ok(Conflict {
        namespace: c.namespace.clone(),
        name: c.name.clone(),
        loser: me.clone(),
        winner,
        reason: ConflictReason::parse(&c.reason),
        message: c.message.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(s: &str) -> ClusterId {
        ClusterId::new(s).unwrap()
    }

    fn of(loser: &str, name: &str) -> Conflict {
        Conflict {
            namespace: "books".into(),
            name: name.into(),
            loser: id(loser),
            winner: id("old"),
            reason: ConflictReason::Port,
            message: "port http is 80, not 9080".into(),
        }
    }

    #[test]
    fn the_loser_hears_until_it_is_mended() {
        let (mut importer, mut exporter) = (Conflicts::default(), Conflicts::default());
        let (me, east) = (id("importer"), id("east"));
        assert_eq!(importer.tell(&east), None, "nothing is said of nothing");
        importer.set([of("east", "a"), of("east", "secret"), of("importer", "b")]);
        let said = importer.tell(&east).unwrap();
        let exported = |_: &str, name: &str| name != "secret";
        assert_eq!(exporter.hear(&east, &me, &said, exported), [of("east", "a")]);
        assert!((0..REPEAT).all(|_| importer.tell(&east).is_none()));
        let again = importer.tell(&east).unwrap();
        assert!(exporter.hear(&east, &me, &again, exported).is_empty(), "no news");
        assert_eq!(exporter.lost(&east), [(of("east", "a"), vec![me.clone()])]);
        assert_eq!(importer.lost(&me), [(of("importer", "b"), vec![me.clone()])]);
        // The same finding keeps the turn, another one is told at once; so is a new stream.
        importer.set([of("east", "a"), of("east", "secret")]);
        assert_eq!(importer.tell(&east), None);
        importer.connected(&east);
        assert!(importer.tell(&east).is_some());
        importer.set([]);
        let none = importer.tell(&east).unwrap();
        assert!(exporter.hear(&east, &me, &none, exported).is_empty());
        assert!(exporter.lost(&east).is_empty() && importer.lost(&me).is_empty());
    }

    #[test]
    fn what_a_peer_says_is_bounded_and_checked() {
        let mut c = Conflicts::default();
        let many = |f: fn(&mut pb::Conflict)| {
            let list = (0..1000).map(|n| {
                let mut c = conflict_pb(&of("east", &format!("s{n}")));
                f(&mut c);
                c
            });
            pb::Conflicts { list: list.collect() }
        };
        let mut hear = |f| c.hear(&id("east"), &id("x"), &many(f), |_, _| true).len();
        assert_eq!(hear(|_| {}), MAX);
        assert_eq!(hear(|c| c.message = "x".repeat(600)), 0);
        assert_eq!(hear(|c| c.message = "a\x1b[2J".into()), 0);
        assert_eq!(hear(|c| c.winner = "A b".into()), 0);
        // A reason of a version to come is one nevertheless.
        assert_eq!(hear(|c| c.reason = "LabelsConflict".into()), MAX);
        c.forget(&id("x"));
        assert!(c.lost(&id("east")).is_empty());
    }
}
