use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::Notify;

use super::*;
use crate::{
    client::Subscriptions,
    type_url::{CDS, RESOURCE},
};

#[derive(Default)]
struct Seen {
    changed: Vec<String>,
    removed: Vec<String>,
}

impl Handler for Seen {
    fn on_update(&mut self, _: &str, update: Update) -> Result<(), Vec<Rejection>> {
        self.changed.extend(update.changed.into_iter().map(|r| r.name));
        self.removed.extend(update.removed);
        Ok(())
    }
}

fn cluster(name: &str) -> pb::Any {
    pb::Any { type_url: CDS.into(), value: Named { name: name.into() }.encode_to_vec().into() }
}

fn wrapped(name: &str, resource: Option<pb::Any>, seconds: i64) -> pb::Any {
    let ttl = Some(prost_types::Duration { seconds, nanos: 0 });
    let r = pb::Resource { version: "1".into(), resource, name: name.into(), ttl, ..Default::default() };
    pb::Any { type_url: RESOURCE.into(), value: r.encode_to_vec().into() }
}

struct Client {
    seen: Seen,
    known: Known,
    expiry: Expiry,
    types: BTreeMap<String, SotwType>,
}

impl Client {
    fn new() -> Self {
        let names =
            SotwType { names: Names::All, version: String::new(), nonce: String::new(), refused: None };
        Self {
            seen: Seen::default(),
            known: Known::new(),
            expiry: Expiry::default(),
            types: BTreeMap::from([(CDS.to_owned(), names)]),
        }
    }

    fn sotw(&mut self, resources: Vec<pb::Any>) -> pb::DiscoveryRequest {
        let response = pb::DiscoveryResponse {
            version_info: "1".into(),
            resources,
            type_url: CDS.into(),
            nonce: "n".into(),
        };
        self.answer(response).1
    }

    fn answer(&mut self, response: pb::DiscoveryResponse) -> (Duration, pb::DiscoveryRequest) {
        take_sotw(response, &mut self.seen, &mut self.known, &mut self.expiry, &mut self.types).unwrap()
    }

    fn delta(&mut self, resources: Vec<pb::Resource>) -> pb::DeltaDiscoveryRequest {
        let response = pb::DeltaDiscoveryResponse { type_url: CDS.into(), resources, ..Default::default() };
        take_delta(response, &mut self.seen, &mut self.known, &mut self.expiry)
    }

    async fn pass(&mut self, seconds: u64) {
        let time = tokio::time::sleep(Duration::from_secs(seconds));
        self.expiry.during(time, &mut self.seen, &mut self.known).await;
    }
}

#[tokio::test(start_paused = true)]
async fn times_to_live_in_a_state_of_the_world() {
    let mut c = Client::new();
    c.sotw(vec![cluster("stays"), wrapped("goes", Some(cluster("goes")), 10)]);
    assert_eq!(c.seen.changed, ["stays", "goes"]);
    c.pass(6).await;
    // A heartbeat renews what it names, and what it does not name is not removed.
    let ack = c.sotw(vec![wrapped("goes", None, 10)]);
    assert!(ack.error_detail.is_none());
    c.pass(6).await;
    assert!(c.seen.removed.is_empty(), "{:?}", c.seen.removed);
    // Sent again unchanged renews it too.
    c.sotw(vec![cluster("stays"), wrapped("goes", Some(cluster("goes")), 10)]);
    c.pass(9).await;
    assert!(c.seen.removed.is_empty());
    c.pass(2).await;
    assert_eq!(c.seen.removed, ["goes"]);
    // It is new when it comes back, and holds for ever without a time.
    c.sotw(vec![cluster("stays"), cluster("goes")]);
    assert_eq!(c.seen.changed, ["stays", "goes", "goes"]);
    c.pass(1000).await;
    assert_eq!(c.seen.removed, ["goes"]);
    c.sotw(vec![cluster("stays")]);
    assert_eq!(c.seen.removed, ["goes", "goes"]);
}

#[tokio::test(start_paused = true)]
async fn times_to_live_in_delta() {
    let mut c = Client::new();
    let ttl = Some(prost_types::Duration { seconds: 10, nanos: 0 });
    let r = |resource| pb::Resource {
        version: "1".into(),
        resource,
        name: "a".into(),
        ttl,
        ..Default::default()
    };
    c.delta(vec![r(Some(cluster("a")))]);
    for _ in 0..5 {
        c.pass(6).await;
        c.delta(vec![r(None)]);
    }
    assert_eq!((c.seen.changed.len(), c.seen.removed.len()), (1, 0), "heartbeats are no updates");
    c.pass(11).await;
    assert_eq!(c.seen.removed, ["a"]);
    // A heartbeat for what has gone brings nothing back.
    c.delta(vec![r(None)]);
    c.pass(11).await;
    assert_eq!((c.seen.changed.len(), c.seen.removed.len()), (1, 1));
}

#[test]
fn a_server_that_repeats_what_was_refused_is_answered_ever_more_slowly() {
    let mut c = Client::new();
    let mut refuse = |version: &str| {
        // No name can be read in it.
        let resources = vec![pb::Any { type_url: CDS.into(), value: bytes::Bytes::new() }];
        let response = pb::DiscoveryResponse {
            version_info: version.into(),
            resources,
            type_url: CDS.into(),
            nonce: "n".into(),
        };
        let (pause, answer) = c.answer(response);
        assert!(answer.error_detail.is_some());
        pause.as_millis()
    };
    let pauses: Vec<u128> = (0..9).map(|_| refuse("1")).collect();
    assert_eq!(pauses, [0, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
    assert_eq!(refuse("2"), 0, "another version is another matter");
}

/// What is sent for wanted names, on a stream that has come so far.
#[tokio::test]
async fn names_stand_beside_all_and_are_asked_for_again() {
    let shared = Shared {
        wanted: Mutex::default(),
        again: Mutex::default(),
        node: Mutex::new(Arc::new(NodeInfo::component("proxy"))),
        changed: Notify::new(),
        connection: tokio::sync::watch::Sender::new(None),
    };
    let shared = Arc::new(shared);
    let subscriptions = Subscriptions(shared.clone());
    let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
    let version = |n: &str| (n.to_owned(), "1".to_owned());
    let mut known = Known::from([(CDS.to_owned(), [version("a"), version("b")].into())]);
    let (mut sent, mut node) = (BTreeMap::new(), None);
    let (tx, mut rx) = mpsc::channel(9);
    macro_rules! sends {
        ($subscribe:expr, $unsubscribe:expr) => {
            subscribe_delta(&shared, &mut known, &mut sent, &mut node, &tx).await.unwrap();
            let r = rx.try_recv().unwrap();
            assert_eq!(r.resource_names_subscribe, $subscribe as [&str; _]);
            assert_eq!(r.resource_names_unsubscribe, $unsubscribe as [&str; _]);
        };
    }
    subscriptions.subscribe(CDS, Names::All);
    sends!([], []);
    subscriptions.subscribe(CDS, Names::AllAnd(set(&["a", "c"])));
    sends!(["a", "c"], []);
    subscriptions.again(CDS, set(&["c", "gone"]));
    sends!(["c"], []);
    subscriptions.subscribe(CDS, Names::AllAnd(set(&["c"])));
    sends!([], ["a"]);
    assert_eq!(known[CDS].keys().collect::<Vec<_>>(), ["b"], "given up is not had");
    subscriptions.subscribe(CDS, Names::All);
    sends!([], ["c"]);
    subscribe_delta(&shared, &mut known, &mut sent, &mut node, &tx).await.unwrap();
    assert!(rx.try_recv().is_err(), "nothing changed");
    // On a new stream no name may stand for all.
    subscriptions.subscribe(CDS, Names::AllAnd(set(&["c"])));
    sent.clear();
    sends!(["c", "*"], []);
}

#[tokio::test]
async fn aliases_without_a_resource_stand_for_nothing() {
    let mut c = Client::new();
    let r = pb::Resource { name: "r/a".into(), aliases: vec!["r/b".into()], ..Default::default() };
    assert!(c.delta(vec![r]).error_detail.is_none());
    assert_eq!((c.seen.changed.len(), &*c.seen.removed), (0, &["r/b".to_owned()][..]));
}
