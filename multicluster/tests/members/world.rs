//! Clusters, their disks, their clocks, what they export in truth, and what must hold.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::{
    ClusterId, NetworkId,
    federation::{Audience, EndpointGroup, ExportedService, LeaseState, Offer},
    registry::{Protocol, ServicePort},
};
use multicluster::{
    exchange::{Feed, LEASE_MS, Next, Node, Persisted, ServiceKey},
    pb::{ExporterFrame, ImporterFrame, exporter_frame, importer_frame},
    wire::Member,
};
use prost::Message as _;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use crate::net::{Counts, Cuts, Pipe, Weather};

/// Virtual milliseconds of a step.
const STEP: u64 = 20;
/// A connection that is cut is noticed by the side that sends (HTTP/2 PING) after this long.
const PING_MS: u64 = 10_000;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) weather: Weather,
    /// Services that a cluster may export.
    pub(crate) services: u64,
    /// Probabilities per cluster and second.
    pub(crate) change: f64,
    pub(crate) restart: f64,
    pub(crate) cut: f64,
    pub(crate) depart: f64,
    /// Clocks run up to this much too fast or too slow, and start anywhere.
    pub(crate) drift: f64,
}

impl Options {
    pub(crate) fn hostile() -> Self {
        Self {
            weather: Weather { lost: 0.02, doubled: 0.02, reordered: 0.03, delay: (1, 120) },
            services: 8,
            change: 0.8,
            restart: 0.02,
            cut: 0.02,
            depart: 0.01,
            drift: 0.01,
        }
    }
}

/// An open stream from an importer to an exporter.
struct Stream {
    up: Pipe,
    down: Pipe,
    feed: Option<Feed>,
    /// When the exporter last heard nothing but silence from a cut network.
    cut_since: Option<u64>,
}

pub(crate) struct Cluster {
    pub(crate) node: Option<Node>,
    /// What restarts find: members, and imports as of the last save.
    members: BTreeMap<ClusterId, Member>,
    imports: BTreeMap<ClusterId, String>,
    pub(crate) truth: BTreeMap<ServiceKey, Offer>,
    /// Pilot tells the exports at this time (after a start it takes a while).
    told_at: u64,
    clock: (u64, f64),
    started: u64,
    back_at: Option<u64>,
    streams: BTreeMap<usize, Stream>,
    /// Newest stamp seen of each peer's service, and whether it was withdrawn since.
    seen: BTreeMap<(usize, ServiceKey), (u64, bool)>,
    tombs: BTreeMap<ClusterId, u64>,
    /// Not meant to be a member; and whether it knows that.
    pub(crate) out: bool,
    in_none: bool,
    rejoin_at: Option<u64>,
}

pub(crate) struct World {
    pub(crate) rng: SmallRng,
    pub(crate) now: u64,
    pub(crate) clusters: Vec<Cluster>,
    pub(crate) cuts: Cuts,
    pub(crate) options: Options,
    pub(crate) counts: Counts,
    /// When each exporter last sent to each importer, true time.
    sent: BTreeMap<(usize, usize), u64>,
    stamp: u64,
    log: u64,
    happened: BTreeMap<&'static str, u64>,
    digest: u64,
}

pub(crate) fn id(i: usize) -> ClusterId {
    ClusterId::new(&format!("c{i}")).unwrap()
}

pub(crate) fn service(name: &str, stamp: u64) -> ExportedService {
    ExportedService {
        name: name.into(),
        namespace: "books".into(),
        host: format!("{name}.books.svc.cluster.local"),
        ports: vec![ServicePort { name: "http".into(), port: 9080, protocol: Protocol::Http }],
        headless: false,
        groups: vec![EndpointGroup {
            labels: [("app".to_owned(), name.to_owned()), ("version".to_owned(), "v1".to_owned())].into(),
            locality: "eu/a".to_owned().into(),
            healthy_weight: 2,
            slots: vec![7],
        }],
        service_accounts: vec![format!("spiffe://mesh.local/ns/books/sa/{name}")],
        exported_at: stamp,
    }
}

fn member(i: usize, revision: u64) -> Member {
    Member {
        cluster: id(i),
        network: NetworkId::new(&format!("n{i}-{revision}")).unwrap(),
        gateways: vec![],
        transports: vec![],
        epoch: 0,
        left: false,
        revision: 0,
        evicted: false,
        trust_domain: None,
        home: 0,
    }
}

impl Cluster {
    /// Its steady clock.
    fn clock(&self, now: u64) -> u64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let run = ((now - self.started) as f64 * self.clock.1) as u64;
        self.clock.0 + run
    }
}

impl World {
    pub(crate) fn new(seed: u64, n: usize, options: Options) -> Self {
        let mut w = Self {
            rng: SmallRng::seed_from_u64(seed),
            now: 0,
            clusters: vec![],
            cuts: Cuts::default(),
            options,
            counts: Counts::default(),
            sent: BTreeMap::new(),
            stamp: 0,
            log: 0,
            happened: BTreeMap::new(),
            digest: 0,
        };
        for _ in 0..n {
            w.clusters.push(Cluster {
                node: None,
                members: BTreeMap::new(),
                imports: BTreeMap::new(),
                truth: BTreeMap::new(),
                told_at: 0,
                clock: (0, 1.0),
                started: 0,
                back_at: None,
                streams: BTreeMap::new(),
                seen: BTreeMap::new(),
                tombs: BTreeMap::new(),
                out: true,
                in_none: false,
                rejoin_at: None,
            });
        }
        w.start(0);
        w.clusters[0].node.as_mut().unwrap().enter(1);
        w.clusters[0].out = false;
        for i in 1..n {
            w.join(i, 0);
        }
        w
    }

    fn count(&mut self, what: &'static str) {
        *self.happened.entry(what).or_default() += 1;
    }

    /// Starts a control plane from its disk.
    fn start(&mut self, i: usize) {
        self.log += 1;
        let drift = self.options.drift;
        let log_id = self.rng.random::<u64>() | 1;
        let c = &mut self.clusters[i];
        c.clock = (self.rng.random_range(0..1_000_000), 1.0 + self.rng.random_range(-1.0..=1.0) * drift);
        c.started = self.now;
        c.back_at = None;
        // It may have got another address.
        let this = member(i, self.log);
        let imports = &c.imports;
        let kept = |peer: &ClusterId| -> Persisted {
            imports.get(peer).map(|json| serde_json::from_str(json).unwrap()).unwrap_or_default()
        };
        let node = Node::new(this, c.members.clone(), kept, log_id, c.clock.0);
        c.members = node.members.all().clone();
        c.node = Some(node);
        c.told_at = self.now + self.rng.random_range(0..4000);
        c.seen.clear();
        c.tombs.clear();
    }

    /// Streams end with the process, in both directions.
    fn hang_up(&mut self, i: usize) {
        for c in &mut self.clusters {
            c.streams.remove(&i);
        }
        self.clusters[i].streams.clear();
    }

    /// With a token that `issuer` made.
    pub(crate) fn join(&mut self, i: usize, issuer: usize) {
        self.clusters[i].members.clear();
        self.clusters[i].imports.clear();
        self.hang_up(i);
        self.start(i);
        let now = self.clusters[issuer].clock(self.now);
        let at = self.clusters[issuer].node.as_mut().unwrap();
        let newcomer = at.members.admission(member(i, self.log));
        let epoch = newcomer.epoch;
        at.merge([newcomer], now);
        let all: Vec<_> = at.members.all().values().cloned().collect();
        let now = self.clusters[i].clock(self.now);
        let own = self.clusters[i].node.as_mut().unwrap();
        own.enter(epoch);
        own.merge(all, now);
        self.clusters[i].out = false;
        self.clusters[i].in_none = false;
        self.clusters[i].rejoin_at = None;
        self.count("join");
    }

    fn chance(&mut self, per_second: f64) -> bool {
        let p = per_second * STEP as f64 / 1000.0;
        p > 0.0 && self.rng.random_bool(p)
    }

    pub(crate) fn run(&mut self, ms: u64) {
        let end = self.now + ms;
        while self.now < end {
            self.now += STEP;
            for i in 0..self.clusters.len() {
                self.fate(i);
                self.tell(i);
                self.dial(i);
            }
            for i in 0..self.clusters.len() {
                for e in 0..self.clusters.len() {
                    self.carry(i, e);
                }
                self.save(i);
                self.check(i);
            }
        }
    }

    /// What befalls a cluster.
    fn fate(&mut self, i: usize) {
        let n = self.clusters.len();
        if self.clusters[i].back_at.is_some_and(|t| t <= self.now) {
            self.start(i);
            if self.clusters[i].members.is_empty() && !self.clusters[i].out {
                // Its state is lost, its certificate is not.
                self.clusters[i].node.as_mut().unwrap().enter(1);
            }
        }
        if self.clusters[i].node.is_none() {
            return;
        }
        if self.clusters[i].rejoin_at.is_some_and(|t| t <= self.now) {
            // The founder holds the root key and signs; nothing works without it.
            let founder = self.clusters[0].node.as_ref();
            // One that has lost its state and has not heard yet of what it signed would begin at an old epoch.
            if founder.and_then(|f| f.members.get(&id(i))).is_some_and(|m| m.left) {
                self.join(i, 0);
            }
            return;
        }
        if self.chance(self.options.change) {
            self.change(i);
        }
        if self.chance(self.options.restart) {
            self.clusters[i].node = None;
            let gone = self.rng.random_range(100..6000);
            self.clusters[i].back_at = Some(self.now + gone);
            self.hang_up(i);
            if self.rng.random_bool(0.3) && self.has_witness(i) {
                self.count("restart without state");
                self.clusters[i].members.clear();
                self.clusters[i].imports.clear();
            } else {
                self.count("restart");
            }
            return;
        }
        if self.chance(self.options.cut) {
            let until = self.now + self.rng.random_range(500..15_000);
            let whole = self.rng.random_bool(0.5);
            for other in (0..n).filter(|o| *o != i) {
                if whole || self.rng.random_bool(0.5) {
                    self.cuts.cut(i, other, until);
                }
            }
            self.count("partition");
        }
        if i != 0 && !self.clusters[i].out && self.chance(self.options.depart) {
            // Any other member that knows it.
            let by = self.rng.random_range(0..n);
            let (name, clock) = (id(i), self.clusters[by].clock(self.now));
            let out = self.clusters[by].out;
            let Some(node) = self.clusters[by].node.as_ref().filter(|_| by != i && !out) else { return };
            let known = node.members.get(&name).filter(|m| !m.left).map(|m| m.epoch);
            // A tombstone of an epoch that is over says nothing.
            let own = self.clusters[i].members.get(&name).map(|m| m.epoch);
            if known.is_none() || known < own || !self.has_witness(i) {
                return;
            }
            let node = self.clusters[by].node.as_mut().unwrap();
            if self.rng.random_bool(0.5) {
                node.evict(&name, clock).unwrap();
                self.count("eviction");
                // It does not know, or does not obey: it goes on as if nothing had happened.
            } else {
                node.left(&name, clock);
                self.clusters[i].node.as_mut().unwrap().clear();
                self.clusters[i].streams.clear();
                self.clusters[i].in_none = true;
                self.count("departure");
            }
            self.clusters[i].out = true;
            if self.rng.random_bool(0.5) {
                self.clusters[i].rejoin_at = Some(self.now + self.rng.random_range(1000..20_000));
            }
        }
    }

    /// Whether what only members can say of others survives if this one loses its state or its membership: tombstones,
    /// and the joins that ended them. There must be one other that knows all of it, and nobody is believed about its
    /// own join.
    pub(crate) fn has_witness(&self, of: usize) -> bool {
        let told = || self.clusters[of].members.values().filter(|m| m.left || m.epoch > 1);
        (0..self.clusters.len()).filter(|by| *by != of && !self.clusters[*by].out).any(|by| {
            let knows =
                |m: &Member| self.clusters[by].members.get(&m.cluster).is_some_and(|k| k.epoch >= m.epoch);
            told().all(|m| m.cluster != id(by) && knows(m))
        })
    }

    fn change(&mut self, i: usize) {
        self.stamp += 1;
        let n = self.clusters.len();
        let name = format!("s{}", self.rng.random_range(0..self.options.services));
        let key = ("books".to_owned(), name.clone());
        if self.rng.random_bool(0.4) {
            self.clusters[i].truth.remove(&key);
        } else {
            let some: BTreeSet<_> = (0..n).filter(|_| self.rng.random_bool(0.3)).map(id).collect();
            let audience = match self.rng.random_range(0..4) {
                0 => Audience::Only(some),
                1 => Audience::Except(some),
                _ => Audience::All,
            };
            self.clusters[i].truth.insert(key, Offer { service: service(&name, self.stamp), audience });
        }
    }

    /// Pilot's part.
    fn tell(&mut self, i: usize) {
        let c = &mut self.clusters[i];
        let Some(node) = c.node.as_mut().filter(|_| c.told_at <= self.now) else { return };
        node.exports.replace(c.truth.clone());
        c.told_at = self.now + multicluster::exchange::PACE_MS;
    }

    fn dial(&mut self, i: usize) {
        let now = self.clusters[i].clock(self.now);
        let n = self.clusters.len();
        for e in (0..n).filter(|e| *e != i) {
            let peer = id(e);
            let away = self.clusters[e].node.is_none();
            let c = &mut self.clusters[i];
            let Some(node) = c.node.as_mut() else { return };
            let jitter = self.rng.random_range(0.0..1.0);
            match node.next(&peer, now) {
                // The task ends; so does the stream.
                None => {
                    c.streams.remove(&e);
                }
                Some(Next::Wait(_)) => {
                    if node.streaming(&peer) && !c.streams.contains_key(&e) {
                        // The exporter closed it.
                        node.lost(&peer, now, jitter);
                    }
                }
                Some(Next::Close) => {
                    c.streams.remove(&e);
                    node.lost(&peer, now, jitter);
                    *self.happened.entry("silence").or_default() += 1;
                }
                Some(Next::Dial) => {
                    if self.cuts.is_cut(i, e, self.now) || away {
                        node.lost(&peer, now, jitter);
                        continue;
                    }
                    let Some(first) = node.connected(&peer, now) else { continue };
                    let mut s =
                        Stream { up: Pipe::default(), down: Pipe::default(), feed: None, cut_since: None };
                    s.up.send(
                        self.now,
                        &Weather { lost: 0.0, doubled: 0.0, ..self.options.weather },
                        &mut self.rng,
                        first.encode_to_vec(),
                        &mut self.counts,
                    );
                    c.streams.insert(e, s);
                }
            }
        }
    }

    /// What passes between importer `i` and exporter `e`.
    fn carry(&mut self, i: usize, e: usize) {
        let cut = self.cuts.is_cut(i, e, self.now);
        let clock = self.clusters[e].clock(self.now);
        let Some(mut s) = self.clusters[i].streams.remove(&e) else { return };
        if cut {
            let since = *s.cut_since.get_or_insert(self.now);
            if self.now > since + PING_MS {
                return;
            }
            self.clusters[i].streams.insert(e, s);
            return;
        }
        s.cut_since = None;
        let in_none = self.clusters[e].in_none;
        let Some(exporter) = self.clusters[e].node.as_mut().filter(|_| !in_none) else { return };
        while let Some(bytes) = s.up.due(self.now) {
            let f = ImporterFrame::decode(bytes.as_slice()).unwrap();
            match (&mut s.feed, &f.frame) {
                (None, Some(importer_frame::Frame::Subscribe(sub))) => {
                    match exporter.accept(&id(i), sub, clock) {
                        Ok((feed, _)) => s.feed = Some(feed),
                        Err(_) => return,
                    }
                }
                (Some(feed), Some(frame)) => {
                    exporter.heard_from(&id(i), feed, &f);
                    if let importer_frame::Frame::Subscribe(sub) = frame
                        && exporter.introduce(&id(i), sub, clock).is_err()
                    {
                        return;
                    }
                }
                _ => return,
            }
        }
        if let Some(feed) = &mut s.feed {
            loop {
                let Ok((frames, more)) = exporter.feed(feed, clock) else { return };
                if frames.iter().any(|f| matches!(f.frame, Some(exporter_frame::Frame::Lease(_)))) {
                    self.sent.insert((i, e), self.now);
                }
                for f in frames {
                    let bytes = f.encode_to_vec();
                    for b in &bytes {
                        self.digest = (self.digest ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
                    }
                    s.down.send(self.now, &self.options.weather, &mut self.rng, bytes, &mut self.counts);
                }
                if !more {
                    break;
                }
            }
        }
        let clock = self.clusters[i].clock(self.now);
        let Some(importer) = self.clusters[i].node.as_mut() else { return };
        while let Some(bytes) = s.down.due(self.now) {
            let f = ExporterFrame::decode(bytes.as_slice()).unwrap();
            let Some(heard) = importer.on_frame(&id(e), f, clock) else { return };
            if heard.step.resubscribe {
                *self.happened.entry("resubscription").or_default() += 1;
            }
            if let Some(reply) = heard.reply {
                s.up.send(
                    self.now,
                    &self.options.weather,
                    &mut self.rng,
                    reply.encode_to_vec(),
                    &mut self.counts,
                );
            }
        }
        self.clusters[i].streams.insert(e, s);
    }

    /// Members at once, imports once a second.
    fn save(&mut self, i: usize) {
        let now = self.clusters[i].clock(self.now);
        let c = &mut self.clusters[i];
        let Some(node) = c.node.as_mut() else { return };
        node.tick(now);
        c.members.clone_from(node.members.all());
        c.imports.retain(|p, _| node.imports.contains_key(p));
        if self.now.is_multiple_of(1000) {
            for (peer, import) in &node.imports {
                c.imports.insert(peer.clone(), serde_json::to_string(&import.persist()).unwrap());
            }
        }
    }

    /// What must hold at every step.
    fn check(&mut self, i: usize) {
        let n = self.clusters.len();
        let c = &mut self.clusters[i];
        let Some(node) = &c.node else { return };
        let slack = self.options.weather.delay.1 + 2 * STEP + u64::from(LEASE_MS) / 50;
        for e in (0..n).filter(|e| *e != i) {
            let Some(import) = node.imports.get(&id(e)) else {
                c.seen.retain(|(of, _), _| *of != e);
                continue;
            };
            assert!(node.members.is_member(&id(e)), "c{i} imports from c{e}, which is no member");
            if import.lease() == LeaseState::Live {
                // Renewed by something that was really sent in time, or held over a start.
                let sent = self.sent.get(&(i, e)).copied().unwrap_or(0);
                let bound = u64::from(LEASE_MS) + slack;
                let age = self.now - sent.max(c.started);
                // A newcomer of which nothing is held yet counts as live for one lease.
                let empty = import.services().len() == 0;
                assert!(age <= bound || empty, "c{i}: live import from c{e} after {age} ms");
            }
            for s in import.services() {
                let key = (s.namespace.clone(), s.name.clone());
                let seen = c.seen.entry((e, key)).or_insert((0, false));
                assert!(s.exported_at >= seen.0, "c{i}: c{e}/{} went back", s.name);
                assert!(s.exported_at > seen.0 || !seen.1, "c{i}: c{e}/{} was resurrected", s.name);
                *seen = (s.exported_at, false);
            }
            for ((of, key), seen) in &mut c.seen {
                // An audience that shrinks and grows again is no resurrection, but it is a newer announcement.
                if *of == e && import.service(key).is_none() {
                    seen.1 = true;
                }
            }
        }
        for m in node.members.all().values() {
            if m.left {
                let t = c.tombs.entry(m.cluster.clone()).or_default();
                *t = (*t).max(m.epoch);
            } else if let Some(t) = c.tombs.get(&m.cluster) {
                assert!(m.epoch > *t, "c{i}: {} returned by old gossip", m.cluster);
            }
        }
    }

    /// No further faults: everybody is up and reachable, and nothing changes.
    pub(crate) fn heal(&mut self) {
        self.cuts.clear();
        let w = &mut self.options.weather;
        (w.lost, w.doubled, w.reordered) = (0.0, 0.0, 0.0);
        let o = &mut self.options;
        (o.change, o.restart, o.cut, o.depart) = (0.0, 0.0, 0.0, 0.0);
        let now = self.now;
        for c in &mut self.clusters {
            c.rejoin_at = None;
            c.back_at = c.back_at.map(|_| now);
        }
    }

    pub(crate) fn assert_converged(&self) {
        let inside: Vec<usize> = (0..self.clusters.len()).filter(|i| !self.clusters[*i].out).collect();
        let list = |i: usize| self.clusters[i].node.as_ref().unwrap().members.all();
        for &i in &inside {
            let node = self.clusters[i].node.as_ref().unwrap();
            assert_eq!(list(i), list(inside[0]), "c{i} and c{} know different members", inside[0]);
            let peers: BTreeSet<_> = node.members.peers().map(|m| m.cluster.clone()).collect();
            let expected: BTreeSet<_> = inside.iter().filter(|e| **e != i).map(|e| id(*e)).collect();
            assert_eq!(peers, expected, "c{i} has other peers");
            for &e in inside.iter().filter(|e| **e != i) {
                let import = &node.imports[&id(e)];
                assert_eq!(import.lease(), LeaseState::Live, "c{i} has no lease of c{e}");
                let truth: Vec<_> = self.clusters[e]
                    .truth
                    .values()
                    .filter(|o| o.audience.includes(&id(i)))
                    .map(|o| &o.service)
                    .collect();
                assert_eq!(import.services().collect::<Vec<_>>(), truth, "c{i} of c{e}");
            }
        }
    }

    /// How often what happened.
    pub(crate) fn happened(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let c = &self.counts;
        let frames =
            [("lost", c.lost), ("doubled", c.doubled), ("reordered", c.reordered), ("frames", c.frames)];
        self.happened.iter().map(|(k, n)| (*k, *n)).chain(frames)
    }

    pub(crate) fn trace(&self) -> (u64, u64, String) {
        (self.digest, self.counts.bytes, format!("{:?}", self.happened))
    }
}
