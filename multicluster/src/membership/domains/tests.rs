use std::collections::BTreeMap;

use mesh_identity::pem_certificates;
use mesh_model::NetworkId;

use super::*;
use crate::membership::NotAMember;

fn id(s: &str) -> ClusterId {
    ClusterId::new(s).unwrap()
}

fn domain(s: &str) -> TrustDomain {
    TrustDomain::new(s).unwrap()
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

fn of(d: &str, m: Member) -> Member {
    Member { trust_domain: Some(domain(d)), ..m }
}

/// Of `own`, with clusters of it.
fn list(own: &str, me: &str, others: &[&str]) -> Membership {
    let mut m = Membership::new(id(me), BTreeMap::new());
    m.set_domain(Some(domain(own)));
    m.set_self(record(me, 1));
    m.merge(others.iter().map(|n| record(n, 1)));
    m
}

/// Any certificate does: what is in a bundle is looked at elsewhere.
fn bundle(d: &str, generation: u64, sequence: u64) -> Bundle {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut p = rcgen::CertificateParams::default();
    p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pem = p.self_signed(&key).unwrap().pem();
    assert_eq!(pem_certificates("root", pem.as_bytes()).unwrap().len(), 1);
    Bundle { generation, bundle: TrustBundle::from_pem(domain(d), pem.as_bytes(), sequence, None).unwrap() }
}

/// west and east of a, which north and south of b have joined.
fn federated() -> Membership {
    let mut m = list("a.example", "west", &["east"]);
    let joining = ["north", "south"].map(|n| m.foreign_admission(&domain("b.example"), record(n, 4)));
    assert_eq!(m.merge(joining).arrived, [id("north"), id("south")]);
    assert!(m.set_bundle(bundle("b.example", 10, 1)));
    m
}

#[test]
fn another_domain_speaks_for_its_own_clusters_alone() {
    let mut m = federated();
    let before = m.all().clone();
    // Of ours, of itself in our name, of a third one's: nothing of it counts.
    let heard = m.hear(
        &id("north"),
        [
            of("a.example", record("far", 9)),
            of("a.example", Member { left: true, ..record("east", 9) }),
            of("c.example", record("third", 1)),
            of("b.example", Member { left: true, evicted: true, ..record("west", 99) }),
        ],
    );
    assert!(!heard.changed && heard.gone.is_empty(), "{heard:?}");
    assert_eq!(m.all(), &before);
    // A name that is ours or a third one's is not theirs, and that is said.
    let heard = m.hear(&id("north"), [record("east", 1 << 40), record("west", 7)]);
    let names: Vec<_> = heard.clashes.iter().map(|c| (c.cluster.as_str(), c.holder.is_none())).collect();
    assert_eq!((names, m.all()), (vec![("east", true), ("west", true)], &before));
    // A cluster of theirs that is new; and one that is gone.
    let heard = m.hear(&id("north"), [record("new", 1 << 40), Member { left: true, ..record("south", 5) }]);
    assert_eq!((heard.arrived, heard.gone), (vec![id("new")], vec![id("south")]));
    assert_eq!((m.get(&id("new")).unwrap().epoch, m.domain_of(&id("new"))), (1, Some(&domain("b.example"))));
    // What it says of itself: its order is its own, its epoch here is ours.
    let moved = Member { network: NetworkId::new("other").unwrap(), revision: 3, ..record("north", 4) };
    assert!(m.introduce(&id("north"), moved.clone()).unwrap().changed);
    let known = m.get(&id("north")).unwrap();
    assert_eq!((known.network.as_str(), known.epoch, known.home, known.revision), ("other", 1, 4, 3));
    assert!(!m.introduce(&id("north"), moved).unwrap().changed);
}

#[test]
fn a_tombstone_of_ours_is_lifted_by_a_join_here_alone() {
    let mut m = federated();
    m.evict(&id("north")).unwrap();
    for epoch in [4, 5, 1 << 40] {
        assert!(!m.hear(&id("south"), [record("north", epoch)]).changed, "their gossip, epoch {epoch}");
        assert_eq!(m.introduce(&id("north"), record("north", epoch)), Err(NotAMember::Evicted(id("north"))));
    }
    let again = m.foreign_admission(&domain("b.example"), record("north", 4));
    assert_eq!(m.merge([again]).arrived, [id("north")]);
    // The same in a member of ours that has heard of neither.
    let mut late = federated();
    late.hear(&id("east"), m.all().values().cloned().collect::<Vec<_>>());
    late.hear(&id("west"), m.all().values().cloned().collect::<Vec<_>>());
    assert!(late.is_member(&id("north")) && late.get(&id("north")) == m.get(&id("north")));
}

#[test]
fn members_of_a_domain_agree_and_tell_no_other_of_third_ones() {
    let one = federated();
    let mut other = list("a.example", "east", &["west"]);
    let (members, bundles) = one.telling(&id("east"), 0);
    assert_eq!((members.len(), bundles.len()), (4, 1));
    other.hear(&id("west"), members.into_iter().map(|m| wire::member(m).unwrap()).collect::<Vec<_>>());
    assert!(other.set_bundle(Bundle::from_pb(&bundles[0]).unwrap()));
    assert_eq!((one.digest(), one.all()), (other.digest(), other.all()));
    // To north go records of a alone, and no bundles: it has ours from ourselves.
    let (members, bundles) = one.telling(&id("north"), 0);
    let names: Vec<_> = members.iter().map(|m| m.cluster.as_str()).collect();
    assert_eq!((names, bundles.len()), (vec!["east", "west"], 0));
    let mut north = list("b.example", "north", &["south"]);
    let joining = ["west", "east"].map(|n| north.foreign_admission(&domain("a.example"), record(n, 1)));
    north.merge(joining);
    assert!(
        !north
            .hear(&id("west"), members.into_iter().map(|m| wire::member(m).unwrap()).collect::<Vec<_>>())
            .changed
    );
    // Who tells and who hears compare the same records, whatever epochs they have on either side.
    assert_eq!(one.digest_for(&id("north")), north.digest_from(&id("west")));
    north.evict(&id("east")).unwrap();
    assert_ne!(one.digest_for(&id("north")), north.digest_from(&id("west")));
}

#[test]
fn another_domain_cannot_fill_the_list() {
    let mut m = federated();
    let many = |range: std::ops::Range<u32>| range.map(|n| record(&format!("x{n}"), 1)).collect::<Vec<_>>();
    m.hear(&id("north"), many(0..5000));
    assert_eq!(m.of_domain(&domain("b.example")).count(), MAX_OF_DOMAIN);
    let gone = many(0..5000).into_iter().map(|r| Member { left: true, ..r });
    m.hear(&id("north"), gone.collect::<Vec<_>>());
    m.hear(&id("north"), many(6000..9000));
    assert_eq!(m.of_domain(&domain("b.example")).count(), 2, "names are not used up one after the other");
    assert_eq!(m.merge([record("ours", 1)]).arrived, [id("ours")]);
}

#[test]
fn bundles_only_rise_and_go_with_the_last_member() {
    let mut m = federated();
    let d = domain("b.example");
    assert!(m.set_bundle(bundle("b.example", 10, 3)));
    for (generation, sequence) in [(10, 2), (10, 3), (9, 9)] {
        assert!(!m.set_bundle(bundle("b.example", generation, sequence)), "{generation} {sequence}");
    }
    assert!(!m.set_bundle(bundle("c.example", 10, 1)), "nobody is of it");
    assert!(!m.set_bundle(bundle("a.example", 99, 99)), "ours is not told by anybody");
    assert_eq!(m.bundle(&d).unwrap().bundle.sequence, 3);
    let digest = m.digest();
    m.left(&id("south"));
    assert!(m.bundle(&d).is_some(), "north is still there");
    m.evict(&id("north")).unwrap();
    assert!(m.bundle(&d).is_none() && m.domains().is_empty());
    assert_ne!(m.digest(), digest);
    // A later federation begins with whatever sequence that mesh has by then.
    let again = m.foreign_admission(&d, record("north", 1));
    m.merge([again]);
    assert!(m.set_bundle(bundle("b.example", 11, 1)));
    let merged = m.domain_left(&d);
    assert_eq!((merged.gone, m.bundle(&d)), (vec![id("north")], None));
}

#[test]
fn the_own_domain_goes_first_where_two_took_one_name() {
    let theirs = of("b.example", Member { home: 9, ..record("x", 1) });
    for order in [[theirs.clone(), record("x", 1)], [record("x", 1), theirs]] {
        let mut m = list("a.example", "west", &[]);
        let [first, second] = order;
        m.merge([first]);
        let merged = m.merge([second]);
        assert_eq!(m.domain_of(&id("x")), None);
        assert_eq!(merged.gone, merged.arrived, "an import from the other one goes");
    }
    let m = federated();
    let d = domain("c.example");
    assert_eq!(m.clash(&d, &record("north", 1)).unwrap().holder, Some(domain("b.example")));
    assert!(m.clash(&domain("b.example"), &record("north", 1)).is_none());
    assert!(m.clash(&d, &record("free", 1)).is_none());
    let own = m.clash(&d, &record("west", 1)).unwrap();
    assert!(own.to_string().contains("under another cluster ID"), "{own}");
}
