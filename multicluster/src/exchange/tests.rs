//! The rules one by one. `tests/sim` is the simulation of many clusters.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::{
    ClusterId,
    federation::{Audience, LeaseState, Offer},
};

use super::*;
use crate::{
    membership::Membership,
    pb::{self, ExporterFrame, exporter_frame::Frame},
    wire::{self, tests::sample},
};

fn id(s: &str) -> ClusterId {
    ClusterId::new(s).unwrap()
}

fn member(name: &str, epoch: u64) -> wire::Member {
    wire::Member {
        cluster: id(name),
        network: mesh_model::NetworkId::new(name).unwrap(),
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

fn members(names: &[&str]) -> Membership {
    Membership::new(id("me"), names.iter().map(|n| (id(n), member(n, 1))).collect())
}

/// What `peer` is sent that holds `offset` of log `log_id`, without welcome and members.
fn sent_to(log: &ExportLog, peer: &str, log_id: u64, offset: u64) -> Vec<ExporterFrame> {
    let members = members(&[peer]);
    let s = pb::Subscribe {
        min_protocol: 1,
        max_protocol: 2,
        log_id,
        offset,
        members: members.digest(),
        ..Default::default()
    };
    let mut feed = Feed::new(id(peer), &s, &members).unwrap();
    let mut out = Vec::new();
    loop {
        let (frames, more) = feed.poll(0, log, &members).unwrap();
        out.extend(frames);
        if !more {
            break;
        }
    }
    assert!(matches!(out.remove(0).frame, Some(Frame::Welcome(_))));
    out
}

fn sent(log: &ExportLog, log_id: u64, offset: u64) -> Vec<ExporterFrame> {
    sent_to(log, "peer", log_id, offset)
}

fn lease(log: &ExportLog) -> ExporterFrame {
    ExporterFrame { frame: Some(Frame::Lease(log.lease(&id("peer")))) }
}

fn import_all(import: &mut Import, log: &ExportLog) {
    let (log_id, offset) = import.subscribe();
    for f in sent(log, log_id, offset) {
        import.on_frame(0, f);
    }
}

fn table(names: &[&str]) -> BTreeMap<ServiceKey, Offer> {
    names.iter().map(|n| (("books".to_owned(), (*n).to_owned()), sample(n).into())).collect()
}

fn names(i: &Import) -> Vec<String> {
    i.services().map(|s| s.name.clone()).collect()
}

#[test]
fn a_withdrawn_service_is_not_resurrected_by_old_frames() {
    let mut log = ExportLog::new(1);
    log.replace(table(&["a", "b"]));
    let old = sent(&log, 0, 0);
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    log.replace(table(&["b"]));
    import_all(&mut import, &log);
    assert_eq!(names(&import), ["b"]);
    for f in old.into_iter().filter(|f| matches!(f.frame, Some(Frame::Announce(_)))) {
        import.on_frame(1, f);
    }
    assert_eq!(names(&import), ["b"]);
}

#[test]
fn resuming_sends_only_what_is_missing() {
    let mut log = ExportLog::new(1);
    log.replace(table(&["a", "b", "c"]));
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    log.replace(table(&["a", "c", "d"]));
    let kept: Persisted = serde_json::from_str(&serde_json::to_string(&import.persist()).unwrap()).unwrap();
    let mut import = Import::new(kept, 0, 3000);
    let frames = sent(&log, import.log_id(), import.offset());
    assert_eq!(frames.len(), 3, "one withdrawal, one announcement, the lease");
    assert_eq!(names(&import), ["a", "b", "c"], "what was kept serves at once");
    import_all(&mut import, &log);
    assert_eq!(names(&import), ["a", "c", "d"]);
}

#[test]
fn a_reset_replaces_the_table_only_when_complete() {
    let mut log = ExportLog::new(1);
    log.replace(table(&["a", "b"]));
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    let mut log = ExportLog::new(2);
    log.replace(table(&["b", "c"]));
    let mut frames = sent(&log, import.log_id(), import.offset());
    let last = frames.pop().unwrap();
    for f in frames {
        assert!(!import.on_frame(1, f).changed);
        assert_eq!(names(&import), ["a", "b"], "the old table serves meanwhile");
    }
    let kept = serde_json::to_value(import.persist()).unwrap();
    assert_eq!(
        (&kept["logId"], &kept["offset"]),
        (&0.into(), &0.into()),
        "nothing of the new one is kept yet"
    );
    assert!(import.on_frame(1, last).changed);
    assert_eq!(names(&import), ["b", "c"]);
}

#[test]
fn what_follows_a_lost_reset_is_not_for_the_table_in_use() {
    let mut log = ExportLog::new(1);
    log.replace(table(&["a", "b"]));
    let mut import = Import::new(Persisted::default(), 0, 0);
    let mut frames = sent(&log, 0, 0);
    assert!(matches!(frames.remove(0).frame, Some(Frame::Reset(_))));
    let lease = frames.pop().unwrap();
    for f in frames {
        assert_eq!(import.on_frame(1, f), Step::default());
    }
    assert_eq!(names(&import), [""; 0]);
    assert!(import.on_frame(1, lease).resubscribe);
    import_all(&mut import, &log);
    assert_eq!(names(&import), ["a", "b"]);
}

#[test]
fn silent_divergence_is_found_by_the_digest() {
    let mut log = ExportLog::new(1);
    log.replace(table(&["a"]));
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    let mut other = ExportLog::new(1);
    other.replace(table(&["x"]));
    let step = import.on_frame(5, lease(&other));
    assert!(step.resubscribe);
    assert_eq!((import.log_id(), import.offset()), (0, 0), "it starts over");
    assert_eq!(names(&import), ["a"], "and serves what it had meanwhile");
    import.subscribe();
    import_all(&mut import, &other);
    assert_eq!(names(&import), ["x"]);
}

#[test]
fn leases_lapse_and_return() {
    let mut log = ExportLog::new(1);
    log.replace(table(&["a"]));
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    assert!(!import.tick(u64::from(LEASE_MS) - 1).changed);
    assert!(import.tick(u64::from(LEASE_MS)).changed);
    assert_eq!(import.lease(), LeaseState::Lapsed);
    assert_eq!(names(&import), ["a"], "kept");
    assert!(import.on_frame(9000, lease(&log)).changed);
    assert_eq!(import.lease(), LeaseState::Live);
}

#[test]
fn tombstones_are_bounded_and_old_offsets_start_over() {
    let mut log = ExportLog::new(1);
    for n in 0..5000 {
        log.replace(table(&[&format!("s{n}")]));
    }
    assert!(log.entries() <= 4097);
    assert!(matches!(sent(&log, 1, 1)[0].frame, Some(Frame::Reset(_))));
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    assert_eq!(names(&import), ["s4999"]);
}

#[test]
fn nothing_is_said_before_it_is_known_what_is_exported() {
    let mut old = ExportLog::new(1);
    old.replace(table(&["a"]));
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &old);
    // The exporter restarts: its log is new, and empty until it is told.
    let mut log = ExportLog::new(2);
    assert!(sent(&log, import.log_id(), import.offset()).is_empty());
    assert!(log.replace(table(&[])), "that there is nothing is news");
    import_all(&mut import, &log);
    assert_eq!(names(&import), [""; 0]);
}

#[test]
fn equal_exports_cost_nothing() {
    let mut log = ExportLog::new(1);
    assert!(log.replace(table(&["a", "b"])));
    let head = log.head();
    assert!(!log.replace(table(&["a", "b"])));
    assert_eq!(log.head(), head);
}

#[test]
fn a_peer_is_told_only_what_is_for_it() {
    let with = |names: &[(&str, Audience)]| {
        let all = names.iter().map(|(n, a)| {
            let offer = Offer { service: sample(n), audience: a.clone() };
            (("books".to_owned(), (*n).to_owned()), offer)
        });
        all.collect::<BTreeMap<_, _>>()
    };
    let only = |peers: &[&str]| Audience::Only(peers.iter().map(|p| id(p)).collect::<BTreeSet<_>>());
    let except = |peers: &[&str]| Audience::Except(peers.iter().map(|p| id(p)).collect::<BTreeSet<_>>());
    let mut log = ExportLog::new(1);
    let mut imports: BTreeMap<&str, Import> =
        ["east", "west"].map(|p| (p, Import::new(Persisted::default(), 0, 0))).into();
    let mut told = Vec::new();
    let mut tell = |log: &ExportLog, imports: &mut BTreeMap<&str, Import>| {
        for (peer, import) in imports.iter_mut() {
            let (log_id, offset) = import.subscribe();
            for f in sent_to(log, peer, log_id, offset) {
                if let Some(Frame::Withdraw(w)) = &f.frame {
                    told.push(format!("{peer}: -{}", w.name));
                }
                assert!(
                    !import.on_frame(0, f).resubscribe,
                    "{peer}: its chain has no gap and its digest holds"
                );
            }
        }
        told.sort();
        std::mem::take(&mut told)
    };
    log.replace(with(&[
        ("a", Audience::All),
        ("b", only(&["east"])),
        ("c", except(&["east"])),
        ("d", only(&["x"])),
    ]));
    assert!(tell(&log, &mut imports).is_empty());
    assert_eq!(
        (names(&imports["east"]), names(&imports["west"])),
        (vec!["a".into(), "b".into()], vec!["a".into(), "c".into()])
    );
    // Taken from one peer only; what a peer never knew it does not hear of either.
    log.replace(with(&[("a", only(&["west"])), ("c", except(&["east"]))]));
    assert_eq!(tell(&log, &mut imports), ["east: -a", "east: -b"]);
    assert_eq!(
        (names(&imports["east"]), names(&imports["west"])),
        (vec![], vec!["a".to_owned(), "c".to_owned()])
    );
    log.replace(with(&[("a", Audience::All)]));
    assert_eq!(tell(&log, &mut imports), ["west: -c"]);
    assert_eq!(
        (names(&imports["east"]), names(&imports["west"])),
        (vec!["a".to_owned()], vec!["a".to_owned()])
    );
}

#[test]
fn a_bad_record_is_refused_alone() {
    let mut import = Import::new(Persisted::default(), 0, 0);
    let mut log = ExportLog::new(1);
    log.replace(table(&["a", "b", "c"]));
    let mut frames = sent(&log, 0, 0);
    let mut hostile = wire::service_pb(&sample("b"));
    hostile.host = "x".repeat(40_000);
    let Some(Frame::Announce(b)) = &mut frames[2].frame else { panic!() };
    b.service = prost::Message::encode_to_vec(&hostile).into();
    let steps: Vec<_> = frames.into_iter().map(|f| import.on_frame(0, f)).collect();
    assert!(steps.iter().all(|s| !s.resubscribe));
    assert_eq!(names(&import), ["a", "c"]);
    let (n, why) = import.refusals();
    assert_eq!(n, 1);
    assert!(why[0].contains("host is longer than 512 bytes"), "{why:?}");
    // What follows is taken as usual, and the next good one takes the place of the bad one.
    log.replace(table(&["a", "c"]));
    log.replace(table(&["a", "b", "c", "d"]));
    for f in sent(&log, import.log_id(), import.offset()) {
        assert!(!import.on_frame(0, f).resubscribe);
    }
    assert_eq!(names(&import), ["a", "b", "c", "d"]);
}

#[test]
fn a_large_table_is_renewed_while_it_comes() {
    let names: Vec<String> = (0..1000).map(|n| format!("s{n}")).collect();
    let mut log = ExportLog::new(1);
    log.replace(table(&names.iter().map(String::as_str).collect::<Vec<_>>()));
    let m = members(&["peer"]);
    for protocol in [1, 2] {
        let s = pb::Subscribe { min_protocol: 1, max_protocol: protocol, ..Default::default() };
        let mut feed = Feed::new(id("peer"), &s, &m).unwrap();
        let mut import = Import::new(Persisted::default(), 0, 0);
        let (mut now, mut partial) = (0, 0);
        loop {
            // Two seconds for a batch.
            now += 2000;
            let (frames, more) = feed.poll(now, &log, &m).unwrap();
            for f in frames {
                partial += u32::from(matches!(&f.frame, Some(Frame::Lease(l)) if l.partial));
                assert!(!import.on_frame(now, f).resubscribe);
            }
            import.tick(now);
            if !more {
                break;
            }
            assert_eq!(import.lease() == LeaseState::Live, protocol == 2, "protocol {protocol} at {now} ms");
        }
        assert_eq!(import.services().len(), 1000);
        assert_eq!(partial, if protocol == 2 { 3 } else { 0 }, "an old importer does not know them");
    }
}

/// A member that has not heard of an eviction yet still follows who was evicted.
#[test]
fn nobody_opens_an_epoch_for_itself_by_gossip() {
    let mut node = Node::new(
        member("me", 1),
        [("me", 1), ("b", 1), ("c", 1)].map(|(n, e)| (id(n), member(n, e))).into(),
        |_| Persisted::default(),
        1,
        0,
    );
    let says = |m: wire::Member| ExporterFrame {
        frame: Some(Frame::Members(pb::Members { members: vec![wire::member_pb(&m)], bundles: vec![] })),
    };
    node.on_frame(&id("b"), says(member("b", 1 << 40)), 0).unwrap();
    assert_eq!(node.members.get(&id("b")).unwrap().epoch, 1);
    let moved = wire::Member { revision: 1, ..member("b", 1 << 40) };
    assert!(node.on_frame(&id("b"), says(moved), 0).unwrap().merged.changed, "the rest is its own to say");
    node.on_frame(&id("c"), says(member("b", 3)), 0).unwrap();
    assert_eq!(node.members.get(&id("b")).unwrap().epoch, 3, "others tell of its joins");
    let evicted = wire::Member { left: true, evicted: true, ..member("b", 4) };
    assert_eq!(node.on_frame(&id("c"), says(evicted), 0).unwrap().merged.gone, [id("b")]);
}
