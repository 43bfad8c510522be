//! Clusters, streams and the network between them. What the product does with tasks, sockets and files is done here
//! with a queue of events; every decision is the state machines'.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use mesh_model::{ClusterId, NetworkId, federation::Offer};
use multicluster::{
    exchange::{Feed, Next, Node, Persisted, ServiceKey},
    membership::Merged,
    pb::{ExporterFrame, ImporterFrame, exporter_frame, importer_frame},
    wire::Member,
};
use prost::Message as _;

use crate::{check::Beliefs, rng::Rng};

/// How often leases are looked at, as in the product.
const TICK_MS: u64 = 50;
/// How often imports are saved, as in the product.
const SAVE_MS: u64 = 1000;
/// A dial gives up.
const DIAL_MS: u64 = 3000;

/// What happened, so that a test can tell that it did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) frames: u64,
    pub(crate) bytes: u64,
    pub(crate) lost: u64,
    pub(crate) duplicated: u64,
    pub(crate) reordered: u64,
    pub(crate) resubscribed: u64,
    pub(crate) lapsed: u64,
    pub(crate) restarts: u64,
    pub(crate) disks_lost: u64,
    pub(crate) partitions: u64,
    pub(crate) left: u64,
    pub(crate) evicted: u64,
    pub(crate) rejoined: u64,
    pub(crate) refused_dials: u64,
    pub(crate) withdrawn: u64,
    pub(crate) withheld: u64,
}

impl Counts {
    fn all(&self) -> [(&'static str, u64); 16] {
        [
            ("frames", self.frames),
            ("bytes", self.bytes),
            ("lost frames", self.lost),
            ("duplicated frames", self.duplicated),
            ("reordered frames", self.reordered),
            ("resubscriptions", self.resubscribed),
            ("lapsed leases", self.lapsed),
            ("restarts", self.restarts),
            ("disks lost", self.disks_lost),
            ("partitions", self.partitions),
            ("departures", self.left),
            ("evictions", self.evicted),
            ("second joins", self.rejoined),
            ("refused dials", self.refused_dials),
            ("withdrawals", self.withdrawn),
            ("exports for some peers only", self.withheld),
        ]
    }

    pub(crate) fn add(&mut self, o: &Self) {
        self.frames += o.frames;
        self.bytes += o.bytes;
        self.lost += o.lost;
        self.duplicated += o.duplicated;
        self.reordered += o.reordered;
        self.resubscribed += o.resubscribed;
        self.lapsed += o.lapsed;
        self.restarts += o.restarts;
        self.disks_lost += o.disks_lost;
        self.partitions += o.partitions;
        self.left += o.left;
        self.evicted += o.evicted;
        self.rejoined += o.rejoined;
        self.refused_dials += o.refused_dials;
        self.withdrawn += o.withdrawn;
        self.withheld += o.withheld;
    }

    pub(crate) fn assert_everything_happened(&self) {
        for (what, n) in self.all() {
            assert!(n > 0, "no {what} in any world: {self:?}");
        }
    }
}

/// What a cluster's disk holds: encoded, as in the product.
#[derive(Default, Clone)]
pub(crate) struct Disk {
    members: BTreeMap<ClusterId, Member>,
    imports: BTreeMap<ClusterId, Vec<u8>>,
}

impl Disk {
    fn import(&self, peer: &ClusterId) -> Persisted {
        self.imports.get(peer).map(|b| serde_json::from_slice(b).unwrap()).unwrap_or_default()
    }
}

pub(crate) struct Cluster {
    pub(crate) id: ClusterId,
    /// `None` while it is down.
    pub(crate) node: Option<Node>,
    pub(crate) disk: Disk,
    pub(crate) booted: u64,
    /// Counts its starts, so that events of an earlier run are void.
    run: u64,
    /// Parts per million that its clock runs fast or slow.
    ppm: i64,
    /// Its wall clock, milliseconds from the true time. Only dates of exports come from it.
    wall: i64,
    /// What it exports: what pilot would publish.
    pub(crate) truth: BTreeMap<ServiceKey, Offer>,
    /// It is in the mesh, as itself believes.
    pub(crate) joined: bool,
}

impl Cluster {
    /// Its steady clock, which starts anew with it.
    pub(crate) fn clock(&self, now: u64) -> u64 {
        let t = i64::try_from(now - self.booted).unwrap();
        u64::try_from(t + t * self.ppm / 1_000_000).unwrap()
    }

    /// When its steady clock shows `local`, and not before.
    fn when(&self, local: u64) -> u64 {
        let t = i64::try_from(local.min(1 << 40)).unwrap();
        self.booted + u64::try_from(t - t * self.ppm / 1_000_000 + 1).unwrap()
    }

    /// Its wall clock, seconds.
    pub(crate) fn wall(&self, now: u64) -> u64 {
        u64::try_from((1_800_000_000_000 + i64::try_from(now).unwrap() + self.wall) / 1000).unwrap()
    }
}

/// A stream that is open at both ends, or was until one of them noticed.
struct Stream {
    importer: usize,
    exporter: usize,
    /// The exporter's end; `None` before the subscription has come.
    feed: Option<Feed>,
    /// Frames are delivered in this order in each direction.
    arrival: [u64; 2],
    importer_open: bool,
    poll: u64,
}

enum Event {
    /// The importer asks what is due.
    Follow { c: usize, run: u64, peer: ClusterId, turn: u64 },
    /// A dial reached the exporter, or did not.
    Dialled { stream: u64, run: u64 },
    Subscription { stream: u64, bytes: Vec<u8> },
    Frame { stream: u64, bytes: Vec<u8> },
    Reply { stream: u64, bytes: Vec<u8> },
    /// The other end noticed that the stream is closed.
    Closed { stream: u64, importer: bool },
    Poll { stream: u64, at: u64 },
    Flush { c: usize, run: u64 },
    Tick { c: usize, run: u64 },
    Save { c: usize, run: u64 },
    /// Pilot has told the cluster what it exports.
    Ready { c: usize, run: u64 },
}

struct Due(u64, u64, Event);
impl PartialEq for Due {
    fn eq(&self, o: &Self) -> bool {
        (self.0, self.1) == (o.0, o.1)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Due {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(o.0, o.1))
    }
}

pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) rng: Rng,
    pub(crate) clusters: Vec<Cluster>,
    pub(crate) counts: Counts,
    pub(crate) beliefs: Beliefs,
    /// Frames lost, doubled or swapped, of a thousand each; 0 is a network without faults.
    pub(crate) faults: u64,
    /// Groups that cannot reach each other: clusters of different numbers.
    pub(crate) island: Vec<u64>,
    /// Streams of which the follower must hear: turn of each `(cluster, peer)`.
    turns: BTreeMap<(usize, ClusterId), u64>,
    streams: BTreeMap<u64, Stream>,
    dialling: BTreeMap<(usize, ClusterId), u64>,
    queue: BinaryHeap<Reverse<Due>>,
    serial: u64,
}

pub(crate) fn id(n: usize) -> ClusterId {
    ClusterId::new(&format!("c{n}")).unwrap()
}

fn record(n: usize) -> Member {
    Member {
        cluster: id(n),
        network: NetworkId::new(format!("n{n}")).unwrap(),
        gateways: vec![],
        transports: vec![],
        epoch: 0,
        left: false,
        revision: 0,
        evicted: false,
    }
}

impl World {
    /// Clusters that are down and in no mesh.
    pub(crate) fn new(seed: u64, n: usize) -> Self {
        let mut rng = Rng::new(seed);
        let clusters = (0..n)
            .map(|c| Cluster {
                id: id(c),
                node: None,
                disk: Disk::default(),
                booted: 0,
                run: 0,
                ppm: i64::try_from(rng.between(0, 1000)).unwrap() - 500,
                wall: i64::try_from(rng.between(0, 7_200_000)).unwrap() - 3_600_000,
                truth: BTreeMap::new(),
                joined: false,
            })
            .collect();
        Self {
            now: 0,
            rng,
            clusters,
            counts: Counts::default(),
            beliefs: Beliefs::new(n),
            faults: 0,
            island: vec![0; n],
            turns: BTreeMap::new(),
            streams: BTreeMap::new(),
            dialling: BTreeMap::new(),
            queue: BinaryHeap::new(),
            serial: 0,
        }
    }

    fn at(&mut self, time: u64, e: Event) {
        self.serial += 1;
        self.queue.push(Reverse(Due(time.max(self.now), self.serial, e)));
    }

    pub(crate) fn index(&self, cluster: &ClusterId) -> usize {
        self.clusters.iter().position(|c| c.id == *cluster).unwrap()
    }

    /// Starts a cluster from its disk.
    pub(crate) fn boot(&mut self, c: usize) {
        let log_id = self.rng.next() | 1;
        let now = self.now;
        let ready = now + self.rng.between(20, 1500);
        let cluster = &mut self.clusters[c];
        cluster.run += 1;
        cluster.booted = now;
        let disk = &cluster.disk;
        let mut node = Node::new(record(c), disk.members.clone(), |p| disk.import(p), log_id, 0);
        if cluster.joined && !node.members.is_member(&cluster.id) {
            node.enter(1);
        }
        cluster.disk.members = node.members.all().clone();
        let run = cluster.run;
        let merged = Merged {
            changed: true,
            arrived: node.members.peers().map(|m| m.cluster.clone()).collect(),
            gone: vec![],
        };
        cluster.node = Some(node);
        self.beliefs.booted(c, &self.clusters[c], now);
        self.at(now, Event::Tick { c, run });
        self.at(now + SAVE_MS, Event::Save { c, run });
        self.at(ready, Event::Ready { c, run });
        self.merged(c, &merged);
    }

    /// Stops a cluster at once; its streams end when the others notice.
    pub(crate) fn kill(&mut self, c: usize) {
        self.clusters[c].node = None;
        self.clusters[c].run += 1;
        let streams: Vec<u64> =
            self.streams.iter().filter(|(_, s)| s.importer == c || s.exporter == c).map(|(k, _)| *k).collect();
        for s in streams {
            let importer = self.streams[&s].importer == c;
            self.close(s, importer);
        }
    }

    pub(crate) fn reachable(&self, a: usize, b: usize) -> bool {
        self.island[a] == self.island[b]
    }

    fn delay(&mut self) -> u64 {
        // Now and then a frame takes long.
        if self.faults > 0 && self.rng.chance(5) { self.rng.between(500, 4000) } else { self.rng.between(1, 60) }
    }

    /// The first member founds the mesh.
    pub(crate) fn found(&mut self, c: usize) {
        self.clusters[c].joined = true;
        self.beliefs.admitted(&id(c), 1);
        let node = self.clusters[c].node.as_mut().unwrap();
        node.enter(1);
        self.clusters[c].disk.members = node.members.all().clone();
    }

    /// A newcomer joins through a member that is up and reachable.
    pub(crate) fn join(&mut self, c: usize, issuer: usize) {
        let clock = self.clusters[issuer].clock(self.now);
        let node = self.clusters[issuer].node.as_mut().unwrap();
        let admitted = node.members.admission(record(c));
        if admitted.epoch > 1 {
            self.counts.rejoined += 1;
        }
        self.beliefs.admitted(&id(c), admitted.epoch);
        let merged = node.merge([admitted.clone()], clock);
        let all: Vec<Member> = node.members.all().values().cloned().collect();
        self.merged(issuer, &merged);
        let clock = self.clusters[c].clock(self.now);
        self.clusters[c].joined = true;
        let node = self.clusters[c].node.as_mut().unwrap();
        node.enter(admitted.epoch);
        let merged = node.merge(all, clock);
        let changed = Merged { changed: true, ..merged };
        self.merged(c, &changed);
    }

    /// A member leaves: it tells those that it reaches.
    pub(crate) fn leave(&mut self, c: usize) {
        self.counts.left += 1;
        self.beliefs.gone(&id(c));
        for other in 0..self.clusters.len() {
            if other == c || !self.reachable(c, other) || self.rng.chance(100) {
                continue;
            }
            let clock = self.clusters[other].clock(self.now);
            if let Some(node) = self.clusters[other].node.as_mut().filter(|_| self.clusters[other].joined) {
                let merged = node.left(&id(c), clock);
                self.merged(other, &merged);
            }
        }
        self.forget(c);
    }

    /// A cluster forgets the mesh.
    pub(crate) fn forget(&mut self, c: usize) {
        self.kill(c);
        self.clusters[c].disk = Disk::default();
        self.clusters[c].joined = false;
        self.beliefs.forgot(c);
        self.boot(c);
    }

    /// A member declares another gone.
    pub(crate) fn evict(&mut self, by: usize, c: usize) {
        let clock = self.clusters[by].clock(self.now);
        let merged = self.clusters[by].node.as_mut().unwrap().evict(&id(c), clock);
        if let Ok(merged) = merged {
            self.counts.evicted += 1;
            self.beliefs.gone(&id(c));
            self.merged(by, &merged);
        }
    }

    /// What the product does after a change of membership: keep it, follow newcomers, wake the feeds.
    fn merged(&mut self, c: usize, merged: &Merged) {
        if !merged.changed {
            return;
        }
        let Some(node) = &self.clusters[c].node else { return };
        self.clusters[c].disk.members = node.members.all().clone();
        for peer in &merged.gone {
            self.clusters[c].disk.imports.remove(peer);
        }
        let clock = self.clusters[c].clock(self.now);
        self.beliefs.members(c, &self.clusters[c], &merged.arrived, self.now, clock);
        for peer in &merged.arrived {
            self.turn(c, peer.clone(), self.now);
        }
        self.wake(c);
    }

    /// All feeds of a cluster look for something to send.
    fn wake(&mut self, c: usize) {
        let at = self.now;
        let mine: Vec<u64> = self.streams.iter().filter(|(_, s)| s.exporter == c).map(|(k, _)| *k).collect();
        for stream in mine {
            self.at(at, Event::Poll { stream, at });
        }
    }

    /// The follower of a peer is asked at this time.
    fn turn(&mut self, c: usize, peer: ClusterId, time: u64) {
        let turn = self.turns.entry((c, peer.clone())).or_default();
        *turn += 1;
        let turn = *turn;
        let run = self.clusters[c].run;
        self.at(time, Event::Follow { c, run, peer, turn });
    }

    /// One end closes a stream; the other notices if the network lets it.
    fn close(&mut self, stream: u64, importer: bool) {
        let Some(s) = self.streams.get_mut(&stream) else { return };
        let (i, e) = (s.importer, s.exporter);
        let importer_open = s.importer_open;
        if importer {
            s.importer_open = false;
            self.streams.remove(&stream);
        } else {
            s.feed = None;
            if !importer_open {
                self.streams.remove(&stream);
            }
        }
        if !importer && self.reachable(i, e) {
            let at = self.now + self.delay();
            self.at(at, Event::Closed { stream, importer: true });
        }
    }

    /// Runs until a time.
    pub(crate) fn run_until(&mut self, until: u64) {
        while self.queue.peek().is_some_and(|Reverse(d)| d.0 <= until) {
            let Some(Reverse(Due(time, _, event))) = self.queue.pop() else { break };
            self.now = time;
            self.handle(event);
        }
        self.now = until;
    }

    fn alive(&self, c: usize, run: u64) -> bool {
        self.clusters[c].run == run && self.clusters[c].node.is_some()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Follow { c, run, peer, turn } => {
                if self.alive(c, run) && self.turns.get(&(c, peer.clone())) == Some(&turn) {
                    self.follow(c, peer);
                }
            }
            Event::Dialled { stream, run } => self.dialled(stream, run),
            Event::Subscription { stream, bytes } => self.subscription(stream, &bytes),
            Event::Frame { stream, bytes } => self.frame(stream, &bytes),
            Event::Reply { stream, bytes } => self.reply(stream, &bytes),
            Event::Closed { stream, importer } => {
                if importer && let Some(s) = self.streams.remove(&stream) {
                    self.lost(s.importer, id(s.exporter));
                }
            }
            Event::Poll { stream, at } => {
                if self.streams.get(&stream).is_some_and(|s| s.poll <= at || at == self.now) {
                    self.poll(stream);
                }
            }
            Event::Flush { c, run } => {
                if self.alive(c, run) {
                    self.flush(c);
                }
            }
            Event::Tick { c, run } => {
                if self.alive(c, run) {
                    self.tick(c);
                    self.at(self.now + TICK_MS, Event::Tick { c, run });
                }
            }
            Event::Save { c, run } => {
                if self.alive(c, run) {
                    self.save(c);
                    self.at(self.now + SAVE_MS, Event::Save { c, run });
                }
            }
            Event::Ready { c, run } => {
                if self.alive(c, run) {
                    let all: Vec<_> =
                        self.clusters[c].truth.iter().map(|(k, o)| (k.clone(), Some(o.clone()))).collect();
                    self.clusters[c].node.as_mut().unwrap().offer(all);
                    self.flush(c);
                }
            }
        }
    }

    /// Pilot tells of changes.
    pub(crate) fn offer(&mut self, c: usize, key: ServiceKey, offer: Option<Offer>) {
        let cluster = &mut self.clusters[c];
        match &offer {
            Some(o) => drop(cluster.truth.insert(key.clone(), o.clone())),
            None => drop(cluster.truth.remove(&key)),
        }
        // Before pilot is ready, it will be told with everything else.
        let Some(node) = cluster.node.as_mut().filter(|n| n.exports.ready()) else { return };
        node.offer([(key, offer)]);
        self.flush(c);
    }

    fn flush(&mut self, c: usize) {
        let clock = self.clusters[c].clock(self.now);
        let run = self.clusters[c].run;
        let node = self.clusters[c].node.as_mut().unwrap();
        let changed = node.flush(clock);
        if let Some(due) = node.flush_due() {
            let at = self.clusters[c].when(due);
            self.at(at, Event::Flush { c, run });
        }
        if changed {
            self.wake(c);
        }
    }

    fn tick(&mut self, c: usize) {
        let clock = self.clusters[c].clock(self.now);
        let lapsed = self.clusters[c].node.as_mut().unwrap().tick(clock);
        self.counts.lapsed += lapsed.len() as u64;
        self.beliefs.check(c, &self.clusters[c], self.now, None);
    }

    fn save(&mut self, c: usize) {
        let cluster = &mut self.clusters[c];
        let node = cluster.node.as_mut().unwrap();
        for (peer, i) in &mut node.imports {
            if i.take_dirty() != multicluster::exchange::Dirty::default() {
                cluster.disk.imports.insert(peer.clone(), serde_json::to_vec(&i.persist()).unwrap());
            }
        }
    }

    fn follow(&mut self, c: usize, peer: ClusterId) {
        let clock = self.clusters[c].clock(self.now);
        let next = self.clusters[c].node.as_mut().unwrap().next(&peer, clock);
        match next {
            None | Some(Next::Wait(u64::MAX)) => {}
            Some(Next::Wait(until)) => {
                let at = self.clusters[c].when(until);
                self.turn(c, peer, at);
            }
            Some(Next::Close) => {
                let open = self.streams.iter().find(|(_, s)| s.importer == c && id(s.exporter) == peer);
                if let Some(stream) = open.map(|(k, _)| *k) {
                    self.close(stream, true);
                }
                self.lost(c, peer);
            }
            Some(Next::Dial) => {
                self.serial += 1;
                let stream = self.serial;
                let exporter = self.index(&peer);
                let s = Stream {
                    importer: c,
                    exporter,
                    feed: None,
                    arrival: [0; 2],
                    importer_open: true,
                    poll: u64::MAX,
                };
                self.streams.insert(stream, s);
                self.dialling.insert((c, peer), stream);
                let run = self.clusters[c].run;
                // TCP and TLS: two round trips.
                let up = self.reachable(c, exporter) && self.clusters[exporter].node.is_some();
                let took = if up || self.rng.chance(500) {
                    (0..4).map(|_| self.delay()).sum()
                } else {
                    DIAL_MS
                };
                self.at(self.now + took, Event::Dialled { stream, run });
            }
        }
    }

    fn lost(&mut self, c: usize, peer: ClusterId) {
        let clock = self.clusters[c].clock(self.now);
        let jitter = self.rng.unit();
        let Some(node) = self.clusters[c].node.as_mut() else { return };
        node.lost(&peer, clock, jitter);
        self.turn(c, peer, self.now);
    }

    fn dialled(&mut self, stream: u64, run: u64) {
        let Some(s) = self.streams.get(&stream) else { return };
        let (c, e) = (s.importer, s.exporter);
        if !self.alive(c, run) {
            self.streams.remove(&stream);
            return;
        }
        if !self.reachable(c, e) || self.clusters[e].node.is_none() || !self.clusters[e].joined {
            self.streams.remove(&stream);
            return self.lost(c, id(e));
        }
        let clock = self.clusters[c].clock(self.now);
        let Some(f) = self.clusters[c].node.as_mut().unwrap().connected(&id(e), clock) else {
            self.streams.remove(&stream);
            return;
        };
        self.turn(c, id(e), self.now);
        let bytes = f.encode_to_vec();
        self.count(&bytes);
        let at = self.now + self.delay();
        self.at(at, Event::Subscription { stream, bytes });
    }

    fn count(&mut self, bytes: &[u8]) {
        self.counts.frames += 1;
        self.counts.bytes += bytes.len() as u64;
    }

    fn subscription(&mut self, stream: u64, bytes: &[u8]) {
        let Some(s) = self.streams.get(&stream) else { return };
        let (c, e) = (s.importer, s.exporter);
        if !self.reachable(c, e) {
            return;
        }
        let Some(importer_frame::Frame::Subscribe(subscribe)) = ImporterFrame::decode(bytes).unwrap().frame else {
            panic!("a stream begins with a subscription")
        };
        let clock = self.clusters[e].clock(self.now);
        let Some(node) = self.clusters[e].node.as_mut() else { return self.close(stream, false) };
        match node.accept(&id(c), &subscribe, clock) {
            Ok((feed, merged)) => {
                self.streams.get_mut(&stream).unwrap().feed = Some(feed);
                self.merged(e, &merged);
                // The product wakes all followers; those that have nothing to do go on waiting.
                if !self.clusters[e].node.as_ref().unwrap().streaming(&id(c)) {
                    self.turn(e, id(c), self.now);
                }
                self.poll(stream);
            }
            Err(_) => {
                self.counts.refused_dials += 1;
                self.close(stream, false);
            }
        }
    }

    fn poll(&mut self, stream: u64) {
        let Some(s) = self.streams.get_mut(&stream) else { return };
        let (c, e) = (s.importer, s.exporter);
        let Some(node) = &self.clusters[e].node else { return };
        let Some(feed) = &mut s.feed else { return };
        let clock = self.clusters[e].clock(self.now);
        let Ok((frames, more)) = node.feed(feed, clock) else {
            return self.close(stream, false);
        };
        let at = if more { self.now + 1 } else { self.clusters[e].when(feed.deadline()) };
        s.poll = at;
        self.at(at, Event::Poll { stream, at });
        for f in frames {
            let bytes = f.encode_to_vec();
            self.count(&bytes);
            self.send(stream, c, e, bytes);
        }
    }

    /// A frame to the importer. A stream keeps order and loses nothing; that a frame is lost, doubled or swapped
    /// nevertheless is what a bug of ours in between would do, and must be noticed.
    fn send(&mut self, stream: u64, c: usize, e: usize, bytes: Vec<u8>) {
        if !self.reachable(c, e) {
            return;
        }
        if self.rng.chance(self.faults) {
            self.counts.lost += 1;
            return;
        }
        let swapped = self.rng.chance(self.faults);
        let doubled = self.rng.chance(self.faults);
        let delay = self.delay();
        let s = self.streams.get_mut(&stream).unwrap();
        let at = if swapped { self.now + 1 } else { s.arrival[0].max(self.now + delay) };
        if swapped {
            self.counts.reordered += 1;
        } else {
            s.arrival[0] = at;
        }
        if doubled {
            self.counts.duplicated += 1;
            let again = at + self.rng.between(0, 200);
            self.at(again, Event::Frame { stream, bytes: bytes.clone() });
        }
        self.at(at, Event::Frame { stream, bytes });
    }

    fn frame(&mut self, stream: u64, bytes: &[u8]) {
        let Some(s) = self.streams.get(&stream) else { return };
        let (c, e) = (s.importer, s.exporter);
        if !self.reachable(c, e) || !s.importer_open {
            return;
        }
        let f = ExporterFrame::decode(bytes).unwrap();
        let lease = matches!(f.frame, Some(exporter_frame::Frame::Lease(_)));
        let clock = self.clusters[c].clock(self.now);
        let Some(node) = self.clusters[c].node.as_mut() else { return };
        let Some(heard) = node.on_frame(&id(e), f, clock) else {
            return self.close(stream, true);
        };
        assert!(!heard.step.refused, "an honest peer's record was refused");
        if lease {
            self.beliefs.renewed(c, &id(e), self.now);
        }
        if heard.step.resubscribe {
            self.counts.resubscribed += 1;
        }
        if heard.step.changed {
            self.beliefs.check(c, &self.clusters[c], self.now, Some(&id(e)));
        }
        self.merged(c, &heard.merged);
        if let Some(reply) = heard.reply {
            let bytes = reply.encode_to_vec();
            self.count(&bytes);
            let at = self.now + self.delay();
            let Some(s) = self.streams.get_mut(&stream) else { return };
            let at = at.max(s.arrival[1]);
            s.arrival[1] = at;
            self.at(at, Event::Reply { stream, bytes });
        }
    }

    fn reply(&mut self, stream: u64, bytes: &[u8]) {
        let Some(s) = self.streams.get_mut(&stream) else { return };
        let (c, e) = (s.importer, s.exporter);
        if self.island[c] != self.island[e] {
            return;
        }
        let f = ImporterFrame::decode(bytes).unwrap();
        let clock = self.clusters[e].clock(self.now);
        let Some(node) = self.clusters[e].node.as_mut() else { return };
        let Some(feed) = &mut s.feed else { return };
        feed.on_frame(&f, &node.members);
        if let Some(importer_frame::Frame::Subscribe(subscribe)) = &f.frame
            && let Ok(merged) = node.introduce(&id(c), subscribe, clock)
        {
            self.merged(e, &merged);
        }
        self.poll(stream);
    }
}
