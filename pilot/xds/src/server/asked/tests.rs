//! Streams whose snapshots have something on demand.

use std::collections::{BTreeMap, HashMap};

use super::*;
use crate::{
    server::{
        Resolved, content_version,
        state::{Mode, Push, Session},
    },
    type_url::{CDS, VHDS},
};

/// Hosts by the names that lead to them; everything else is made, but for what begins with `no`.
#[derive(Debug)]
struct Book {
    layer: Arc<Layer>,
    names: BTreeMap<String, String>,
}

impl OnDemand for Book {
    fn resolve(&self, name: &str) -> Option<Resolved> {
        if let Some(n) = self.names.get(name) {
            return Some(Resolved { resource: Arc::clone(self.layer.get(n)?), made: false });
        }
        (!name.contains("/no")).then(|| Resolved { resource: resource(name, "made"), made: true })
    }
}

fn resource(name: &str, content: &str) -> Arc<pb::Resource> {
    let value = bytes::Bytes::from(format!("{name}={content}"));
    let version = content_version(&value);
    let resource = Some(pb::Any { type_url: "t".into(), value });
    Arc::new(pb::Resource { name: name.into(), version, resource, ..Default::default() })
}

fn layer(all: &[(&str, &str)]) -> Arc<Layer> {
    Layer::new(all.iter().map(|(n, c)| resource(n, c)).collect())
}

fn hosts(all: &[(&str, &str, &[&str])]) -> Arc<TypeSnapshot> {
    let pairs: Vec<_> = all.iter().map(|(n, c, _)| (*n, *c)).collect();
    let names = all.iter().flat_map(|(n, _, by)| by.iter().map(|b| ((*b).to_owned(), (*n).to_owned())));
    let book = Book { layer: layer(&pairs), names: names.collect() };
    Arc::new(TypeSnapshot::of(vec![]).with_on_demand(Some(Arc::new(book))))
}

fn clusters(listed: &[(&str, &str)], hidden: &[(&str, &str)]) -> Arc<TypeSnapshot> {
    let hidden: Arc<dyn OnDemand> = layer(hidden);
    Arc::new(TypeSnapshot::of(vec![layer(listed)]).with_on_demand(Some(hidden)))
}

fn request(t: &str, names: &[&str]) -> pb::DeltaDiscoveryRequest {
    pb::DeltaDiscoveryRequest {
        type_url: t.into(),
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Default::default()
    }
}

/// Asks, answers what comes, and returns names that came, each with its aliases, and names that are gone.
struct Peer(Session, Arc<TypeSnapshot>);

impl Peer {
    fn new(t: &str, first: &[&str], snapshot: Arc<TypeSnapshot>) -> (Self, (Vec<String>, Vec<String>)) {
        let mut peer = Self(Session::new(Mode::Delta), snapshot);
        let got = peer.send(&request(t, first));
        (peer, got)
    }

    fn send(&mut self, r: &pb::DeltaDiscoveryRequest) -> (Vec<String>, Vec<String>) {
        self.0.on_delta(r).unwrap();
        self.take()
    }

    fn ask(&mut self, t: &str, names: &[&str]) -> (Vec<String>, Vec<String>) {
        self.send(&request(t, names))
    }

    fn change(&mut self, snapshot: Arc<TypeSnapshot>) -> (Vec<String>, Vec<String>) {
        self.1 = snapshot;
        self.0.mark_dirty();
        self.take()
    }

    fn take(&mut self) -> (Vec<String>, Vec<String>) {
        let (mut came, mut gone) = (vec![], vec![]);
        while let Some(p) = self.0.poll(|_| Arc::clone(&self.1)) {
            let Push { type_url, nonce, resources, removed, .. } = p;
            came.extend(resources.iter().map(|r| {
                if r.aliases.is_empty() {
                    r.name.clone()
                } else {
                    format!("{} as {}", r.name, r.aliases.join(" "))
                }
            }));
            gone.extend(removed);
            let ack = pb::DeltaDiscoveryRequest { type_url, response_nonce: nonce, ..Default::default() };
            self.0.on_delta(&ack).unwrap();
        }
        (came, gone)
    }
}

fn is(got: (Vec<String>, Vec<String>), came: &[&str], gone: &[&str]) {
    assert_eq!(
        (got.0.as_slice(), got.1.as_slice()),
        (
            &came.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()[..],
            &gone.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()[..]
        )
    );
}

#[test]
fn clusters_come_by_name_and_never_by_wildcard() {
    let (mut p, first) = Peer::new(CDS, &[], clusters(&[("base", "1")], &[("a", "1"), ("b", "1")]));
    is(first, &["base"], &[]);
    is(p.ask(CDS, &["a"]), &["a"], &[]);
    is(p.ask(CDS, &["nobody"]), &[], &["nobody"]);
    // Only what was asked for, and what is for everybody.
    is(p.change(clusters(&[("base", "1")], &[("a", "1"), ("b", "2")])), &[], &[]);
    is(p.change(clusters(&[("base", "2")], &[("a", "2"), ("b", "2")])), &["a", "base"], &[]);
    is(p.change(clusters(&[("base", "2")], &[("nobody", "1"), ("b", "2")])), &["nobody"], &["a"]);
    // It is known that it was asked for.
    is(p.change(clusters(&[("base", "2")], &[("nobody", "1"), ("a", "3")])), &["a"], &[]);
    let mut off = request(CDS, &[]);
    off.resource_names_unsubscribe = vec!["a".into()];
    is(p.send(&off), &[], &["a"]);
    is(p.change(clusters(&[("base", "2")], &[("nobody", "1"), ("a", "4")])), &[], &[]);
    // Given up and asked for again at once: the client has dropped it.
    off.resource_names_unsubscribe = vec!["nobody".into()];
    off.resource_names_subscribe = vec!["nobody".into()];
    is(p.send(&off), &["nobody"], &[]);
}

#[test]
fn without_a_wildcard_there_is_nothing_unasked() {
    let (mut p, first) = Peer::new(CDS, &["a"], clusters(&[("base", "1")], &[("a", "1")]));
    is(first, &["a"], &[]);
    is(p.change(clusters(&[("base", "2")], &[("a", "1")])), &[], &[]);
}

#[test]
fn a_name_leads_to_a_host_of_another_name() {
    let world = |c: &str| hosts(&[("r/x", c, &["r/x", "r/y"]), ("r/z", "1", &["r/z"])]);
    let (mut p, first) = Peer::new(VHDS, &[], world("1"));
    is(first, &[], &[]);
    is(p.ask(VHDS, &["r/y"]), &["r/x as r/y"], &[]);
    is(p.ask(VHDS, &["r/x"]), &["r/x as r/x r/y"], &[]);
    is(p.ask(VHDS, &["r/stranger", "r/no"]), &["r/stranger as r/stranger"], &["r/no"]);
    is(p.change(world("2")), &["r/x as r/x r/y"], &[]);
    // One of two names is given up, which is that of the resource too: the client has dropped it.
    let mut off = request(VHDS, &[]);
    off.resource_names_unsubscribe = vec!["r/x".into()];
    is(p.send(&off), &["r/x as r/y"], &[]);
    is(p.change(world("3")), &["r/x as r/y"], &[]);
    // Who was a stranger has come.
    let known = hosts(&[("r/x", "3", &["r/x", "r/y"]), ("r/new", "1", &["r/stranger"])]);
    is(p.change(known), &["r/new as r/stranger"], &["r/stranger"]);
    is(p.change(hosts(&[("r/x", "3", &["r/x", "r/y"])])), &["r/stranger as r/stranger"], &["r/new"]);
}

#[test]
fn who_comes_back_is_sent_what_changed() {
    let world = hosts(&[("r/x", "2", &["r/y"]), ("r/z", "2", &["r/z"])]);
    let version = |n: &str, c: &str| (n.to_owned(), resource(n, c).version.clone());
    for wildcard in [true, false] {
        let mut again =
            request(VHDS, if wildcard { &["*", "r/y", "r/z", "r/s"] } else { &["r/y", "r/z", "r/s"] });
        let has = [version("r/x", "2"), version("r/z", "1"), version("r/s", "made"), version("r/left", "1")];
        again.initial_resource_versions = HashMap::from(has);
        let mut p = Peer(Session::new(Mode::Delta), Arc::clone(&world));
        is(p.send(&again), &["r/z as r/z"], &["r/left"]);
        assert_eq!(p.0.take_asked(), 0, "nothing new");
        is(p.ask(VHDS, &["r/y"]), &["r/x as r/y"], &[]);
        assert_eq!(p.0.take_asked(), 1);
    }
}

#[test]
fn strangers_are_bounded_and_names_are_short() {
    let (mut p, _) = Peer::new(VHDS, &[], hosts(&[("r/x", "1", &["r/x"])]));
    is(p.ask(VHDS, &["r/x"]), &["r/x as r/x"], &[]);
    let all: Vec<String> = (0..MAX_STRANGERS).map(|n| format!("r/s{n}")).collect();
    for n in &all {
        assert_eq!(p.ask(VHDS, &[n]).0.len(), 1);
    }
    assert_eq!(p.0.take_asked(), MAX_STRANGERS + 1);
    // The oldest leaves, and may come back.
    is(p.ask(VHDS, &["r/one"]), &["r/one as r/one"], &["r/s0"]);
    is(p.ask(VHDS, &["r/s0"]), &["r/s0 as r/s0"], &["r/s1"]);
    assert_eq!(p.0.status()[VHDS].subscribed, MAX_STRANGERS + 1);
    // What is known keeps its place.
    is(p.change(hosts(&[("r/x", "2", &["r/x"])])), &["r/x as r/x"], &[]);
    let long = format!("r/{}", "x".repeat(MAX_NAME));
    is(p.ask(VHDS, &[&long]), &[], &[&long]);
    assert_eq!(p.0.status()[VHDS].subscribed, MAX_STRANGERS + 1);
}

#[test]
fn what_is_on_demand_may_change() {
    let whole =
        || Arc::new(TypeSnapshot::of(vec![layer(&[("base", "1")]), layer(&[("a", "1"), ("b", "1")])]));
    let (mut p, first) = Peer::new(CDS, &[], whole());
    is(first, &["a", "b", "base"], &[]);
    is(p.ask(CDS, &["a"]), &["a"], &[]);
    let apart = || clusters(&[("base", "1")], &[("a", "1"), ("b", "1")]);
    is(p.change(apart()), &[], &["b"]);
    is(p.change(whole()), &["b"], &[]);
    // It comes back with all that it had.
    let mut again = request(CDS, &["*", "a"]);
    let all = whole();
    again.initial_resource_versions = all.resources().map(|r| (r.name.clone(), r.version.clone())).collect();
    let mut p = Peer(Session::new(Mode::Delta), apart());
    is(p.send(&again), &[], &["b"]);
}
