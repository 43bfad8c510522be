//! Peers that break rules, and peers of other versions.

use std::collections::BTreeMap;

use mesh_model::federation::{Conflict, ConflictReason, Offer};
use multicluster::{
    exchange::{ExportLog, Feed, Import, Persisted},
    membership::Membership,
    pb::{self, ExporterFrame, exporter_frame::Frame},
    wire,
};
use prost::Message as _;

use crate::world::{Options, World, id, service};

fn frame(f: Frame) -> ExporterFrame {
    ExporterFrame { frame: Some(f) }
}

fn announce(previous: u64, service: Vec<u8>) -> ExporterFrame {
    frame(Frame::Announce(pb::Announce { version: previous + 1, previous, service: service.into() }))
}

fn import() -> Import {
    let mut i = Import::new(Persisted::default(), 0, 0);
    i.on_frame(0, frame(Frame::Reset(pb::Reset { log_id: 9 })));
    i
}

fn lease(version: u64) -> ExporterFrame {
    frame(Frame::Lease(pb::Lease { duration_ms: 2700, version, ..Default::default() }))
}

#[test]
fn a_peer_of_a_hundred_thousand_services_is_limited() {
    let mut i = import();
    for n in 0..100_000u64 {
        i.on_frame(0, announce(n, wire::service_pb(&service(&format!("s{n}"), 1)).encode_to_vec()));
    }
    assert!(!i.on_frame(0, lease(100_000)).resubscribe, "refused is not lost");
    assert_eq!(i.services().len(), wire::MAX_SERVICES);
    let (n, why) = i.refusals();
    assert_eq!((n, why.len()), (80_000, 8));
    assert!(why[0].starts_with("books/s20000: the peer exports more than 20000 services"), "{why:?}");
}

#[test]
fn a_peer_of_large_services_is_limited_in_bytes() {
    let mut s = wire::service_pb(&service("a", 1));
    s.service_accounts = (0..100).map(|n| format!("{n:0>500}")).collect();
    let mut i = import();
    for n in 0..1000u64 {
        s.name = format!("s{n}");
        s.host = format!("s{n}.books.svc.cluster.local");
        i.on_frame(0, announce(n, s.encode_to_vec()));
    }
    i.on_frame(0, lease(1000));
    let held: usize = i.services().map(|s| wire::service_pb(s).encoded_len()).sum();
    assert!(held <= wire::MAX_TABLE && held > wire::MAX_TABLE / 2, "{held} bytes");
    assert!(i.refusals().1[0].contains("more than 16777216 bytes"), "{:?}", i.refusals());
}

#[test]
fn records_of_absurd_size_are_refused_by_name() {
    type Break = fn(&mut pb::Service);
    let cases: [(Break, &str); 4] = [
        (|s| s.groups = vec![s.groups[0].clone(); 10_000], "a service of"),
        (|s| s.groups = vec![pb::Group::default(); 600], "books/a has too many groups"),
        (|s| s.host.push_str(&"x".repeat(1000)), "host is longer than 512 bytes"),
        (|s| s.name = "x".repeat(30_000), "service name \"xxx"),
    ];
    for (break_it, why) in cases {
        let mut i = import();
        let mut bad = wire::service_pb(&service("a", 1));
        break_it(&mut bad);
        i.on_frame(0, announce(0, bad.encode_to_vec()));
        i.on_frame(0, announce(1, wire::service_pb(&service("b", 1)).encode_to_vec()));
        i.on_frame(0, lease(2));
        assert_eq!(i.services().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["b"], "{why}");
        assert!(i.refusals().1[0].starts_with(why), "{:?}", i.refusals());
        assert!(i.refusals().1[0].len() <= 200);
    }
}

#[test]
fn a_member_list_without_end_is_limited() {
    let mut m = Membership::new(id(0), BTreeMap::new());
    let record =
        |n: u32| pb::Member { cluster: format!("x{n}"), network: "n".into(), epoch: 1, ..Default::default() };
    m.merge((0..10_000).map(|n| wire::member(record(n)).unwrap()));
    assert_eq!(m.all().len(), multicluster::membership::MAX_MEMBERS);
    let absurd = pb::Member { epoch: u64::MAX, ..record(1) };
    assert!(wire::member(absurd).unwrap_err().to_string().contains("absurd"));
}

/// Bytes as an earlier build writes them: a `Service` where this one has bytes, no digests of members, no revision.
#[test]
fn earlier_versions_are_understood() {
    #[derive(Clone, PartialEq, prost::Message)]
    struct OldAnnounce {
        #[prost(uint64, tag = "1")]
        version: u64,
        #[prost(uint64, tag = "2")]
        previous: u64,
        #[prost(message, optional, tag = "3")]
        service: Option<pb::Service>,
        /// Of a version to come.
        #[prost(string, tag = "99")]
        unknown: String,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct OldFrame {
        #[prost(message, optional, tag = "3")]
        announce: Option<OldAnnounce>,
        #[prost(string, tag = "77")]
        unknown: String,
    }
    let s = wire::service_pb(&service("a", 1));
    let old = OldAnnounce { version: 1, previous: 0, service: Some(s.clone()), unknown: "x".into() };
    let bytes = OldFrame { announce: Some(old), unknown: "y".into() }.encode_to_vec();
    let mut i = import();
    i.on_frame(0, ExporterFrame::decode(bytes.as_slice()).unwrap());
    assert_eq!(i.offset(), 1);
    // And they understand this one.
    let bytes = announce(0, s.encode_to_vec()).encode_to_vec();
    assert_eq!(OldFrame::decode(bytes.as_slice()).unwrap().announce.unwrap().service, Some(s));
    // A frame of a kind that is not known yet is no frame, and no error.
    let newer = [0xfa, 0x07, 0x03, b'a', b'b', b'c'];
    assert_eq!(i.on_frame(0, ExporterFrame::decode(newer.as_slice()).unwrap()), Default::default());
}

#[test]
fn protocol_versions_are_negotiated() {
    let members = Membership::new(
        id(0),
        [(
            id(1),
            wire::member(pb::Member {
                cluster: "c1".into(),
                network: "n".into(),
                epoch: 1,
                ..Default::default()
            })
            .unwrap(),
        )]
        .into(),
    );
    let feed = |min_protocol, max_protocol| {
        let s = pb::Subscribe { min_protocol, max_protocol, ..Default::default() };
        Feed::new(id(1), &s, &members)
    };
    for (min, max, agreed) in [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 9, 2)] {
        let (frames, _) = feed(min, max).unwrap().poll(0, &ExportLog::new(1), &members).unwrap();
        let Some(Frame::Welcome(w)) = &frames[0].frame else { panic!("{frames:?}") };
        assert_eq!(w.protocol, agreed);
    }
    let refused = feed(3, 4).unwrap_err().to_string();
    assert_eq!(refused, "no common protocol: the peer speaks 3 to 4, this cluster 1 to 2");
    assert!(feed(0, 0).is_err());
}

/// A control plane that was cut off takes up where it was: what it missed, not everything.
#[test]
fn a_partition_costs_what_was_missed() {
    let mut options = Options { change: 0.0, restart: 0.0, cut: 0.0, depart: 0.0, ..Options::hostile() };
    (options.weather.lost, options.weather.doubled, options.weather.reordered) = (0.0, 0.0, 0.0);
    let mut w = World::new(3, 2, options);
    let offer = |n: u32, stamp| {
        let name = format!("s{n}");
        (("books".to_owned(), name.clone()), Offer::from(service(&name, stamp)))
    };
    w.clusters[0].truth = (0..500).map(|n| offer(n, 1)).collect();
    w.run(8000);
    w.assert_converged();
    w.cuts.cut(0, 1, w.now + 30_000);
    w.run(20_000);
    let truth = &mut w.clusters[0].truth;
    truth.extend([offer(3, 2)]);
    truth.remove(&("books".to_owned(), "s7".to_owned()));
    w.run(10_000);
    let before = w.counts.bytes;
    w.run(12_000);
    w.assert_converged();
    let bytes = w.counts.bytes - before;
    assert!(bytes < 6000, "{bytes} bytes for two changes and twelve seconds of leases");
}

/// An export that contradicts an older one: its owner hears of it from the importer, also after a lost connection, and
/// hears when it is mended.
#[test]
fn the_owner_of_a_losing_export_is_told() {
    let mut options = Options { change: 0.0, restart: 0.0, cut: 0.0, depart: 0.0, ..Options::hostile() };
    // Frames are lost all the same: what is said is repeated.
    options.weather.lost = 0.2;
    let mut w = World::new(5, 3, options);
    let key = ("books".to_owned(), "a".to_owned());
    w.clusters[1].truth.insert(key, service("a", 1).into());
    w.run(8000);
    let conflict = |name: &str| Conflict {
        namespace: "books".into(),
        name: name.into(),
        loser: id(1),
        winner: id(2),
        reason: ConflictReason::Port,
        message: "port http is 80, not 9080".into(),
    };
    let lost = |w: &World| w.clusters[1].node.as_ref().unwrap().lost_conflicts();
    let set = |w: &mut World, all: Vec<Conflict>| w.clusters[0].node.as_mut().unwrap().set_conflicts(all);
    assert_eq!(lost(&w), []);
    set(&mut w, vec![conflict("a"), conflict("never-exported")]);
    w.run(40_000);
    assert_eq!(lost(&w), [(conflict("a"), vec![id(0)])], "and nothing that it does not export");
    w.cuts.cut(0, 1, w.now + 20_000);
    set(&mut w, vec![]);
    w.run(15_000);
    assert_eq!(lost(&w).len(), 1, "no news from there");
    w.run(60_000);
    assert_eq!(lost(&w), []);
    // Whoever is gone says nothing any more.
    set(&mut w, vec![conflict("a")]);
    w.run(40_000);
    assert_eq!(lost(&w).len(), 1);
    w.clusters[1].node.as_mut().unwrap().left(&id(0), 0);
    assert_eq!(lost(&w), []);
}
