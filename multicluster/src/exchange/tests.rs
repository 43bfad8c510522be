//! Simulation: clusters with the real state machines, a virtual clock and links that lose,
//! delay and partition.

use std::collections::{BTreeMap, VecDeque};

use mesh_model::federation::{ExportedService, LeaseState};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::*;
use crate::{
    pb::{ExporterFrame, exporter_frame::Frame},
    wire::tests::sample,
};

/// One direction between two clusters: frames with their arrival times.
#[derive(Default)]
struct Link {
    queue: VecDeque<(u64, ExporterFrame)>,
    cut: bool,
}

struct Exporter {
    log: ExportLog,
    truth: BTreeMap<ServiceKey, ExportedService>,
    generation: u64,
}

struct World {
    rng: SmallRng,
    now: u64,
    exporters: Vec<Exporter>,
    /// imports[importer][exporter]
    imports: Vec<Vec<Import>>,
    links: Vec<Vec<Link>>,
    /// What each exporter has sent to each importer so far.
    sent: Vec<Vec<u64>>,
    loss: f64,
    /// Exporters change and restart.
    busy: bool,
}

impl World {
    fn new(n: usize, seed: u64, loss: f64) -> Self {
        let exporters = (0..n)
            .map(|i| Exporter { log: ExportLog::new(1 + i as u64), truth: BTreeMap::new(), generation: 0 })
            .collect();
        let mut w = Self {
            rng: SmallRng::seed_from_u64(seed),
            now: 0,
            exporters,
            imports: (0..n)
                .map(|_| (0..n).map(|_| Import::new(Persisted::default(), 0, 0)).collect())
                .collect(),
            links: (0..n).map(|_| (0..n).map(|_| Link::default()).collect()).collect(),
            sent: vec![vec![0; n]; n],
            loss,
            busy: true,
        };
        for i in 0..n {
            for e in 0..n {
                if i != e {
                    w.subscribe(i, e);
                }
            }
        }
        w
    }

    fn send(&mut self, i: usize, e: usize, f: ExporterFrame) {
        let link = &mut self.links[i][e];
        if link.cut || self.rng.random_bool(self.loss) {
            return;
        }
        // A stream delays and, here, loses; it does not reorder.
        let after = link.queue.back().map_or(0, |(at, _)| *at);
        let at = after.max(self.now + self.rng.random_range(1..120));
        link.queue.push_back((at, f));
    }

    fn subscribe(&mut self, i: usize, e: usize) {
        if self.links[i][e].cut {
            return;
        }
        // A stream that is opened anew carries nothing of the old one.
        self.links[i][e].queue.clear();
        let (log_id, offset) = self.imports[i][e].subscribe();
        for f in self.exporters[e].log.since(log_id, offset) {
            self.send(i, e, f);
        }
        self.sent[i][e] = self.exporters[e].log.head();
    }

    fn step(&mut self) {
        self.now += 50;
        let n = self.exporters.len();
        for e in 0..n {
            if self.busy && self.rng.random_bool(0.05) {
                let k = self.rng.random_range(0..8);
                let mut s = sample(&format!("s{k}"));
                s.exported_at = self.now;
                let key = (s.namespace.clone(), s.name.clone());
                let x = &mut self.exporters[e];
                if self.rng.random_bool(0.4) {
                    x.truth.remove(&key);
                } else {
                    x.truth.insert(key, s);
                }
                let truth = x.truth.clone();
                x.log.replace(truth);
            }
            if self.busy && self.rng.random_bool(0.002) {
                // Restart of a control plane: a new log with the same content.
                let x = &mut self.exporters[e];
                x.generation += 1;
                x.log = ExportLog::new(1000 * x.generation + e as u64);
                let truth = x.truth.clone();
                x.log.replace(truth);
                for i in (0..n).filter(|i| *i != e) {
                    self.subscribe(i, e);
                }
            }
            for i in (0..n).filter(|i| *i != e) {
                let head = self.exporters[e].log.head();
                if self.sent[i][e] < head {
                    let id = self.exporters[e].log.id();
                    for f in self.exporters[e].log.since(id, self.sent[i][e]) {
                        self.send(i, e, f);
                    }
                    self.sent[i][e] = head;
                }
                if self.now.is_multiple_of(LEASE_INTERVAL_MS) {
                    let lease = self.exporters[e].log.lease();
                    self.send(i, e, lease);
                }
                self.deliver(i, e);
                self.imports[i][e].tick(self.now);
                self.check(i, e);
            }
        }
    }

    fn deliver(&mut self, i: usize, e: usize) {
        let now = self.now;
        let mut due = Vec::new();
        while let Some((_, f)) = self.links[i][e].queue.pop_front_if(|(at, _)| *at <= now) {
            due.push(f);
        }
        let mut again = false;
        for f in due {
            again |= self.imports[i][e].on_frame(now, f).unwrap().resubscribe;
        }
        if again {
            self.subscribe(i, e);
        }
    }

    /// Invariants that hold at every step.
    fn check(&self, i: usize, e: usize) {
        let import = &self.imports[i][e];
        if import.services().next().is_some() && import.lease() == LeaseState::Live {
            let age = import.lease_age(self.now).expect("a live import has had a lease");
            assert!(age < u64::from(LEASE_MS), "live without a lease for {age} ms");
        }
    }

    fn converged(&self) -> bool {
        let n = self.exporters.len();
        (0..n).all(|i| {
            (0..n).filter(|e| *e != i).all(|e| {
                let held: Vec<_> = self.imports[i][e].services().cloned().collect();
                let truth: Vec<_> = self.exporters[e].truth.values().cloned().collect();
                held == truth && self.imports[i][e].lease() == LeaseState::Live
            })
        })
    }

    fn settle(&mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
        }
    }
}

#[test]
fn members_converge_after_loss_delay_restarts_and_partitions() {
    for seed in 0..20 {
        let mut w = World::new(4, seed, 0.05);
        w.settle(400);
        for i in 0..4 {
            for e in 0..4 {
                w.links[i][e].cut = (i + e) % 2 == 1;
            }
        }
        w.settle(200);
        for i in 0..4usize {
            for e in 0..4usize {
                if i != e && (i + e) % 2 == 1 {
                    assert_eq!(w.imports[i][e].lease(), LeaseState::Lapsed, "seed {seed}: cut links lapse");
                }
                w.links[i][e].cut = false;
            }
        }
        // Healed: reconnect, and let the exporters rest.
        for i in 0..4 {
            for e in (0..4).filter(|e| *e != i) {
                w.subscribe(i, e);
            }
        }
        w.settle(200);
        w.loss = 0.0;
        w.busy = false;
        w.settle(100);
        assert!(w.converged(), "seed {seed}: not converged 5 s after the last change");
    }
}

fn import_all(import: &mut Import, log: &ExportLog) {
    for f in log.since(import.log_id(), import.offset()) {
        import.on_frame(0, f).unwrap();
    }
    import.on_frame(0, log.lease()).unwrap();
}

fn table(names: &[&str]) -> BTreeMap<ServiceKey, ExportedService> {
    names.iter().map(|n| (("books".to_owned(), (*n).to_owned()), sample(n))).collect()
}

fn names(i: &Import) -> Vec<String> {
    i.services().map(|s| s.name.clone()).collect()
}

#[test]
fn a_withdrawn_service_is_not_resurrected_by_old_frames() {
    let mut log = ExportLog::new(1);
    log.replace(table(&["a", "b"]));
    let old = log.since(0, 0);
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    log.replace(table(&["b"]));
    import_all(&mut import, &log);
    assert_eq!(names(&import), ["b"]);
    for f in old.into_iter().filter(|f| matches!(f.frame, Some(Frame::Announce(_)))) {
        import.on_frame(1, f).unwrap();
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
    let frames = log.since(import.log_id(), import.offset());
    assert_eq!(frames.len(), 2, "one withdrawal, one announcement");
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
    for f in log.since(import.log_id(), import.offset()) {
        assert!(!import.on_frame(1, f).unwrap().changed);
        assert_eq!(names(&import), ["a", "b"], "the old table serves meanwhile");
    }
    assert!(import.on_frame(1, log.lease()).unwrap().changed);
    assert_eq!(names(&import), ["b", "c"]);
}

#[test]
fn silent_divergence_is_found_by_the_digest() {
    let mut log = ExportLog::new(1);
    log.replace(table(&["a"]));
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    let mut other = ExportLog::new(1);
    other.replace(table(&["x"]));
    let step = import.on_frame(5, other.lease()).unwrap();
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
    assert!(import.on_frame(9000, log.lease()).unwrap().changed);
    assert_eq!(import.lease(), LeaseState::Live);
}

#[test]
fn tombstones_are_bounded_and_old_offsets_start_over() {
    let mut log = ExportLog::new(1);
    for n in 0..5000 {
        log.replace(table(&[&format!("s{n}")]));
    }
    assert!(log.entries.len() <= 4097);
    assert!(matches!(log.since(1, 1)[0].frame, Some(Frame::Reset(_))));
    let mut import = Import::new(Persisted::default(), 0, 0);
    import_all(&mut import, &log);
    assert_eq!(names(&import), ["s4999"]);
}
