use std::{collections::HashMap, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::type_url::{CDS, EDS, LDS, RDS, VHDS};

type World = BTreeMap<String, Arc<TypeSnapshot>>;

fn snap(pairs: &[(&str, &str)]) -> Arc<TypeSnapshot> {
    Arc::new(TypeSnapshot::build(pairs.iter().map(|(n, v)| {
        let value = bytes::Bytes::from(format!("{n}={v}"));
        ((*n).to_owned(), pb::Any { type_url: "t".into(), value })
    })))
}

fn world(types: &[(&str, &[(&str, &str)])]) -> World {
    types.iter().map(|(t, p)| ((*t).to_owned(), snap(p))).collect()
}

fn poll(s: &mut Session, w: &World) -> Option<Push> {
    s.poll(|t| w.get(t).cloned().unwrap_or_default())
}

fn names(p: &Push) -> Vec<&str> {
    p.resources.iter().map(|r| r.name.as_str()).collect()
}

fn sub(t: &str, names: &[&str]) -> pb::DeltaDiscoveryRequest {
    pb::DeltaDiscoveryRequest {
        type_url: t.into(),
        resource_names_subscribe: names.iter().map(|s| (*s).into()).collect(),
        ..Default::default()
    }
}

fn ack(p: &Push) -> pb::DeltaDiscoveryRequest {
    pb::DeltaDiscoveryRequest {
        type_url: p.type_url.clone(),
        response_nonce: p.nonce.clone(),
        ..Default::default()
    }
}

fn nack(p: &Push, message: &str) -> pb::DeltaDiscoveryRequest {
    pb::DeltaDiscoveryRequest {
        error_detail: Some(pb::Status { code: 3, message: message.into() }),
        ..ack(p)
    }
}

#[test]
fn delta_sends_only_what_differs() {
    let mut s = Session::new(Mode::Delta);
    let mut w = world(&[(CDS, &[("a", "1"), ("b", "1")])]);
    s.on_delta(&sub(CDS, &[])).unwrap();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p), ["a", "b"]);
    assert!(poll(&mut s, &w).is_none(), "one response in flight");
    w = world(&[(CDS, &[("a", "2"), ("c", "1")])]);
    s.mark_dirty();
    assert!(poll(&mut s, &w).is_none(), "not before the answer");
    s.on_delta(&ack(&p)).unwrap();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p), ["a", "c"]);
    assert_eq!(p.removed, ["b"]);
    s.on_delta(&ack(&p)).unwrap();
    s.mark_dirty();
    assert!(poll(&mut s, &w).is_none(), "nothing changed");
}

#[test]
fn delta_resumes_from_the_versions_of_the_client() {
    let w = world(&[(CDS, &[("a", "1"), ("b", "2")])]);
    let mut s = Session::new(Mode::Delta);
    let mut req = sub(CDS, &[]);
    req.initial_resource_versions = HashMap::from([
        ("a".to_owned(), w[CDS].get("a").unwrap().version.clone()),
        ("b".to_owned(), "old".to_owned()),
        ("gone".to_owned(), "1".to_owned()),
    ]);
    s.on_delta(&req).unwrap();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p), ["b"]);
    assert_eq!(p.removed, ["gone"]);
}

#[test]
fn the_first_request_is_answered_even_with_nothing() {
    for mode in [Mode::Delta, Mode::Sotw] {
        let mut s = Session::new(mode);
        match mode {
            Mode::Delta => s.on_delta(&sub("x", &[])).unwrap(),
            Mode::Sotw => {
                s.on_sotw(&pb::DiscoveryRequest { type_url: "x".into(), ..Default::default() }).unwrap()
            }
        }
        let p = poll(&mut s, &World::new()).unwrap();
        assert!(p.resources.is_empty() && p.removed.is_empty());
    }
}

#[test]
fn named_subscriptions_grow_and_shrink() {
    let w = world(&[(EDS, &[("a", "1"), ("b", "1")])]);
    let mut s = Session::new(Mode::Delta);
    s.on_delta(&sub(EDS, &["a", "missing"])).unwrap();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p), ["a"]);
    assert_eq!(p.removed, ["missing"]);
    let mut more = ack(&p);
    more.resource_names_subscribe = vec!["b".into()];
    s.on_delta(&more).unwrap();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p), ["b"]);
    let mut less = ack(&p);
    less.resource_names_unsubscribe = vec!["a".into()];
    s.on_delta(&less).unwrap();
    assert!(poll(&mut s, &w).is_none());
    // What comes back later is sent again, and a repeated subscription is answered.
    s.on_delta(&sub(EDS, &["a"])).unwrap();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p), ["a"]);
    s.on_delta(&ack(&p)).unwrap();
    s.on_delta(&sub(EDS, &["a"])).unwrap();
    assert_eq!(names(&poll(&mut s, &w).unwrap()), ["a"]);
}

#[test]
fn wildcards_can_be_left() {
    let w = world(&[(CDS, &[("a", "1"), ("b", "1")])]);
    let mut s = Session::new(Mode::Delta);
    s.on_delta(&sub(CDS, &["*"])).unwrap();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p), ["a", "b"]);
    let mut req = ack(&p);
    req.resource_names_subscribe = vec!["b".into()];
    req.resource_names_unsubscribe = vec!["*".into()];
    s.on_delta(&req).unwrap();
    if let Some(p) = poll(&mut s, &w) {
        s.on_delta(&ack(&p)).unwrap();
    }
    let w = world(&[(CDS, &[("a", "2"), ("b", "2")])]);
    s.mark_dirty();
    assert_eq!(names(&poll(&mut s, &w).unwrap()), ["b"]);
}

#[test]
fn what_was_rejected_waits_for_a_change() {
    let w = world(&[(LDS, &[("a", "1")])]);
    let mut s = Session::new(Mode::Delta);
    s.on_delta(&sub(LDS, &[])).unwrap();
    let p = poll(&mut s, &w).unwrap();
    s.on_delta(&nack(&p, "a: no such filter")).unwrap();
    s.mark_dirty();
    assert!(poll(&mut s, &w).is_none());
    let st = &s.status()[LDS];
    assert_eq!(st.state(), "NACKED");
    assert_eq!(st.error.as_deref(), Some("a: no such filter"));
    let w = world(&[(LDS, &[("a", "2")])]);
    s.mark_dirty();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(s.status()[LDS].state(), "NACKED", "until one is accepted");
    s.on_delta(&ack(&p)).unwrap();
    assert_eq!(s.status()[LDS].state(), "SYNCED");
    assert_eq!(s.status()[LDS].acked_version, w[LDS].version);
}

#[test]
fn late_answers_acknowledge_nothing() {
    let w = world(&[(LDS, &[("a", "1")])]);
    let mut s = Session::new(Mode::Delta);
    s.on_delta(&sub(LDS, &[])).unwrap();
    let first = poll(&mut s, &w).unwrap();
    s.on_delta(&ack(&first)).unwrap();
    let w = world(&[(LDS, &[("a", "2")])]);
    s.mark_dirty();
    let second = poll(&mut s, &w).unwrap();
    s.on_delta(&nack(&first, "late")).unwrap();
    assert_eq!(s.status()[LDS].state(), "STALE");
    s.on_delta(&ack(&second)).unwrap();
    assert_eq!(s.status()[LDS].state(), "SYNCED");
}

/// A port is new, and earlier virtual hosts are still on their way: its routes must not be there before its hosts.
#[test]
fn routes_wait_for_virtual_hosts() {
    let mut s = Session::new(Mode::Delta);
    let mut w = world(&[(RDS, &[("80", "1")]), (VHDS, &[("80/a", "1")])]);
    s.on_delta(&sub(RDS, &["80"])).unwrap();
    let routes = poll(&mut s, &w).unwrap();
    assert_eq!(routes.type_url, RDS, "nobody has asked for virtual hosts yet");
    s.on_delta(&ack(&routes)).unwrap();
    s.on_delta(&sub(VHDS, &[])).unwrap();
    let first = poll(&mut s, &w).unwrap();
    w = world(&[(RDS, &[("80", "1"), ("90", "1")]), (VHDS, &[("80/a", "1"), ("90/b", "1")])]);
    s.mark_dirty();
    s.on_delta(&sub(RDS, &["90"])).unwrap();
    assert!(poll(&mut s, &w).is_none());
    s.on_delta(&ack(&first)).unwrap();
    let second = poll(&mut s, &w).unwrap();
    assert_eq!((second.type_url.as_str(), names(&second)), (VHDS, vec!["90/b"]));
    assert!(poll(&mut s, &w).is_none(), "not before they are acknowledged");
    // Refused is answered as well: what is wrong with a host must not keep routes back.
    s.on_delta(&nack(&second, "no")).unwrap();
    assert_eq!(names(&poll(&mut s, &w).unwrap()), ["90"]);
}

#[test]
fn make_before_break() {
    let mut s = Session::new(Mode::Delta);
    let w = world(&[(CDS, &[("old", "1")]), (LDS, &[("l", "1")]), (RDS, &[("r", "old")])]);
    for t in [LDS, RDS, CDS] {
        s.on_delta(&sub(t, &[])).unwrap();
    }
    let mut order = vec![];
    while let Some(p) = poll(&mut s, &w) {
        order.push(p.type_url.clone());
        s.on_delta(&ack(&p)).unwrap();
    }
    assert_eq!(order, [CDS, LDS, RDS]);
    let w = world(&[(CDS, &[("new", "1")]), (LDS, &[("l", "1")]), (RDS, &[("r", "new")])]);
    s.mark_dirty();
    let add = poll(&mut s, &w).unwrap();
    assert_eq!((names(&add), add.removed.len()), (vec!["new"], 0));
    s.on_delta(&ack(&add)).unwrap();
    let routes = poll(&mut s, &w).unwrap();
    assert_eq!(routes.type_url, RDS);
    assert!(poll(&mut s, &w).is_none(), "the removal waits for the routes");
    s.on_delta(&ack(&routes)).unwrap();
    let del = poll(&mut s, &w).unwrap();
    assert_eq!(del.removed, ["old"]);
}

#[test]
fn sotw_follows_nonces_and_names() {
    let w = world(&[(EDS, &[("a", "1"), ("b", "1")])]);
    let req = |names: &[&str], nonce: &str, version: &str| pb::DiscoveryRequest {
        type_url: EDS.into(),
        resource_names: names.iter().map(|s| (*s).into()).collect(),
        response_nonce: nonce.into(),
        version_info: version.into(),
        ..Default::default()
    };
    let mut s = Session::new(Mode::Sotw);
    s.on_sotw(&req(&["a"], "", "")).unwrap();
    let p1 = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p1), ["a"]);
    // Subscription changes ride on the acknowledgement.
    s.on_sotw(&req(&["a", "b"], &p1.nonce, &p1.version)).unwrap();
    let p2 = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p2), ["b"], "endpoints are only updated");
    s.on_sotw(&req(&["a"], "bogus", "")).unwrap();
    assert_eq!(s.status()[EDS].state(), "STALE");
    s.on_sotw(&req(&["a", "b"], &p2.nonce, &p2.version)).unwrap();
    assert!(poll(&mut s, &w).is_none());
    s.on_sotw(&req(&[], &p2.nonce, &p2.version)).unwrap();
    let w = world(&[(EDS, &[("a", "2")])]);
    s.mark_dirty();
    assert!(poll(&mut s, &w).is_none(), "unsubscribed from everything");
}

#[test]
fn sotw_full_state_repeats_everything() {
    let w = world(&[(CDS, &[("a", "1"), ("b", "1")])]);
    let mut s = Session::new(Mode::Sotw);
    let mut req = pb::DiscoveryRequest { type_url: CDS.into(), ..Default::default() };
    s.on_sotw(&req).unwrap();
    let p = poll(&mut s, &w).unwrap();
    req.response_nonce = p.nonce;
    s.on_sotw(&req).unwrap();
    let w = world(&[(CDS, &[("a", "1"), ("c", "1")])]);
    s.mark_dirty();
    let p = poll(&mut s, &w).unwrap();
    assert_eq!(names(&p), ["a", "c"]);
    req.response_nonce = p.nonce;
    s.on_sotw(&req).unwrap();
    let w = world(&[(CDS, &[("a", "1")])]);
    s.mark_dirty();
    assert_eq!(names(&poll(&mut s, &w).unwrap()), ["a"], "a removal alone is a change");
}

#[test]
fn nonsense_is_refused() {
    let mut s = Session::new(Mode::Delta);
    assert_eq!(s.on_delta(&sub("", &[])), Err(ProtocolError::NoType));
    for i in 0..MAX_TYPES {
        s.on_delta(&sub(&format!("t{i}"), &[])).unwrap();
    }
    assert!(matches!(s.on_delta(&sub("more", &[])), Err(ProtocolError::TooManyTypes(_))));
}

/// A delta client that applies what it is sent and rejects some of it.
#[derive(Default)]
struct Peer {
    have: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
enum Step {
    World(Vec<(u8, u8)>),
    Deliver { reject: bool },
    Subscribe(u8),
    Unsubscribe(u8),
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        prop::collection::vec((0u8..5, 0u8..3), 0..5).prop_map(Step::World),
        any::<bool>().prop_map(|reject| Step::Deliver { reject }),
        (0u8..6).prop_map(Step::Subscribe),
        (0u8..6).prop_map(Step::Unsubscribe),
        Just(Step::Reconnect),
    ]
}

/// The last of them is the wildcard.
fn name(n: u8) -> String {
    if n == 5 { "*".to_owned() } else { format!("n{n}") }
}

fn wants(subscribed: &BTreeSet<String>, name: &str) -> bool {
    subscribed.contains("*") || subscribed.contains(name)
}

/// The snapshot that follows another: of two layers, as those of proxies are.
fn after(before: Option<&Arc<TypeSnapshot>>, pairs: &[(&str, &str)]) -> Arc<TypeSnapshot> {
    let all = snap(pairs);
    let layer = |which: usize, own: bool| {
        let of: Vec<_> = all.resources().filter(|r| (r.name.as_str() < "n2") == own).cloned().collect();
        match before.and_then(|b| b.layers().get(which)) {
            Some(l) => l.next(of),
            None => Layer::new(of),
        }
    };
    Arc::new(TypeSnapshot::of(vec![layer(0, true), layer(1, false)]))
}

proptest! {
    /// Whatever happens in between, when everything is delivered and accepted, the client has what
    /// it is subscribed to and the server says so.
    #[test]
    fn delta_converges(steps in prop::collection::vec(step(), 0..60)) {
        let mut w = World::new();
        let mut peer = Peer::default();
        let mut subscribed: BTreeSet<String> = ["n0".to_owned()].into();
        let open = |peer: &Peer, subscribed: &BTreeSet<String>| {
            let mut s = Session::new(Mode::Delta);
            if !subscribed.is_empty() {
                let mut r = sub(EDS, &[]);
                r.resource_names_subscribe = subscribed.iter().cloned().collect();
                r.initial_resource_versions = peer.have.clone().into_iter().collect();
                s.on_delta(&r).unwrap();
            }
            s
        };
        let mut s = open(&peer, &subscribed);
        let mut pending: Option<Push> = None;
        let apply = |peer: &mut Peer, p: &Push, subscribed: &BTreeSet<String>| {
            for r in &p.resources {
                if wants(subscribed, &r.name) {
                    peer.have.insert(r.name.clone(), r.version.clone());
                }
            }
            for n in &p.removed {
                peer.have.remove(n);
            }
        };
        for st in steps {
            match st {
                Step::World(v) => {
                    let owned: Vec<(String, String)> =
                        v.iter().map(|(n, x)| (format!("n{n}"), x.to_string())).collect();
                    let m: BTreeMap<&str, &str> =
                        owned.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
                    let pairs: Vec<(&str, &str)> = m.into_iter().collect();
                    let next = after(w.get(EDS), &pairs);
                    w.insert(EDS.to_owned(), next);
                    s.mark_dirty();
                }
                Step::Deliver { reject } => {
                    if let Some(p) = pending.take() {
                        if reject {
                            // Rejected, but kept in mind as the server assumes: an equal version
                            // is not sent again. The peer here takes it later, on reconnect.
                            apply(&mut peer, &p, &subscribed);
                            s.on_delta(&nack(&p, "no")).unwrap();
                        } else {
                            apply(&mut peer, &p, &subscribed);
                            s.on_delta(&ack(&p)).unwrap();
                        }
                    }
                }
                Step::Subscribe(n) => {
                    let n = name(n);
                    if subscribed.insert(n.clone()) {
                        let mut r = sub(EDS, &[]);
                        r.resource_names_subscribe = vec![n];
                        s.on_delta(&r).unwrap();
                    }
                }
                Step::Unsubscribe(n) => {
                    let n = name(n);
                    if subscribed.len() > 1 && subscribed.remove(&n) {
                        // What is still wanted by the wildcard is said again.
                        peer.have.retain(|have, _| *have != n && wants(&subscribed, have));
                        let mut r = sub(EDS, &[]);
                        r.resource_names_unsubscribe = vec![n];
                        s.on_delta(&r).unwrap();
                    }
                }
                Step::Reconnect => {
                    pending = None;
                    s = open(&peer, &subscribed);
                }
            }
            if pending.is_none() {
                pending = poll(&mut s, &w);
            }
        }
        for _ in 0..10 {
            if let Some(p) = pending.take() {
                apply(&mut peer, &p, &subscribed);
                s.on_delta(&ack(&p)).unwrap();
            }
            pending = poll(&mut s, &w);
        }
        prop_assert!(pending.is_none());
        let empty = Arc::default();
        let truth: BTreeMap<String, String> = w
            .get(EDS)
            .unwrap_or(&empty)
            .resources()
            .filter(|r| wants(&subscribed, &r.name))
            .map(|r| (r.name.clone(), r.version.clone()))
            .collect();
        prop_assert_eq!(&peer.have, &truth);
        prop_assert_ne!(s.status()[EDS].state(), "STALE");
    }
}
