//! Names that traffic asks for: clusters (ODCDS) and virtual hosts (VHDS).
//!
//! - Names come from outside, so there is a limit. A name beyond it takes the place of one that nobody waits for and
//!   that no traffic has used since the hand last passed it (the clock algorithm); if every name is in use, it is
//!   refused without asking.
//! - Any number of requests that wait for a name make one subscription.
//! - A subscription stays, so the server may say at any time that a name exists now. Not every server does: a name
//!   that was absent is asked for again by the first request that comes [`ABSENT_FOR`] after the answer.
//! - A name is settled when what it stands for is in force, or certainly will not be. Whoever waits looks for itself
//!   whether it is there, and bounds its own time.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

/// Names at once, unless another limit is set.
pub const DEFAULT_LIMIT: usize = 1024;
/// How long an absence is believed.
pub const ABSENT_FOR: Duration = Duration::from_secs(1);
/// Longer names are no names: a DNS name has at most 253 bytes, a cluster's name in a mesh holds one.
pub const MAX_NAME: usize = 512;
/// Names that are looked at in search of one to give up; more would cost the request that looks too much.
const LOOKS: usize = 64;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A cluster by its name.
    Cluster,
    /// A virtual host by `<route configuration>/<host>`.
    VirtualHost,
}

/// No further name is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("as many names as may be asked for are in use")]
pub struct Full;

/// Figures for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OnDemandStats {
    /// Names of clusters that are subscribed.
    pub clusters: usize,
    /// Names of virtual hosts that are subscribed.
    pub hosts: usize,
    /// Names without an answer.
    pub pending: usize,
    /// Times that a name was asked for.
    pub asked: u64,
    /// Names given up for others.
    pub evicted: u64,
    /// Requests for names that were refused.
    pub refused: u64,
}

type Name = (Kind, String);

/// The names, shared by who asks for them and the client that subscribes.
#[derive(Clone)]
pub struct OnDemandNames(Arc<Shared>);

struct Shared {
    table: Mutex<Table>,
    fresh: Notify,
    limit: usize,
}

#[derive(Default)]
struct Table {
    entries: HashMap<Name, Entry>,
    /// In the order in which the hand passes them.
    order: VecDeque<Name>,
    /// Asked for, and not yet taken by the client.
    asks: BTreeSet<Name>,
    /// Given up, and not yet taken by the client.
    gone: BTreeSet<Name>,
    /// Counts rounds of asking: an answer to an earlier one settles nothing.
    round: u64,
    stats: OnDemandStats,
}

struct Entry {
    settled: watch::Sender<bool>,
    round: u64,
    /// Revision of the state that has it; it is settled when that is in force.
    revision: Option<u64>,
    since: Instant,
}

/// What the client has to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) ask: BTreeSet<Name>,
    pub(super) gone: BTreeSet<Name>,
    pub(super) round: u64,
}

impl std::fmt::Debug for OnDemandNames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnDemandNames").field("limit", &self.0.limit).finish_non_exhaustive()
    }
}

impl Default for OnDemandNames {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl OnDemandNames {
    /// At most `limit` names at once.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Shared { table: Mutex::default(), fresh: Notify::new(), limit }))
    }

    // The table is whole between statements that could panic: there are none.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a name that does not exist; the receiver becomes true when that is settled. `in_use` tells whether
    /// traffic has used another name since it was last asked about it.
    ///
    /// # Errors
    /// The limit is reached.
    pub fn want(
        &self,
        kind: Kind,
        name: &str,
        in_use: &dyn Fn(Kind, &str) -> bool,
    ) -> Result<watch::Receiver<bool>, Full> {
        let mut t = self.lock();
        if name.is_empty() || name.len() > MAX_NAME {
            // Nothing has such a name; that need not be asked.
            return Ok(watch::channel(true).1);
        }
        let key = (kind, name.to_owned());
        let round = t.round + 1;
        if let Some(e) = t.entries.get_mut(&key) {
            let receiver = e.settled.subscribe();
            if *e.settled.borrow() && e.since.elapsed() >= ABSENT_FOR {
                e.settled.send_replace(false);
                (e.round, e.revision, e.since) = (round, None, Instant::now());
                t.ask(key);
                drop(t);
                self.0.fresh.notify_one();
            }
            return Ok(receiver);
        }
        if t.entries.len() >= self.0.limit && !t.evict(in_use) {
            t.stats.refused += 1;
            return Err(Full);
        }
        let (settled, receiver) = watch::channel(false);
        t.entries.insert(key.clone(), Entry { settled, round, revision: None, since: Instant::now() });
        t.order.push_back(key.clone());
        t.ask(key);
        drop(t);
        self.0.fresh.notify_one();
        Ok(receiver)
    }

    /// Everything of this revision is in force.
    pub fn applied(&self, revision: u64) {
        for e in self.lock().entries.values_mut() {
            if e.revision.is_some_and(|r| r <= revision) {
                e.settle();
            }
        }
    }

    /// Figures as of now.
    #[must_use]
    pub fn stats(&self) -> OnDemandStats {
        let t = self.lock();
        let of = |kind| t.entries.keys().filter(|(k, _)| *k == kind).count();
        let pending = t.entries.values().filter(|e| !*e.settled.borrow()).count();
        OnDemandStats { clusters: of(Kind::Cluster), hosts: of(Kind::VirtualHost), pending, ..t.stats }
    }

    /// Waits for something to do. Cancel-safe: what is not taken stays.
    pub(super) async fn asked(&self) -> Asked {
        loop {
            {
                let mut t = self.lock();
                if !t.asks.is_empty() || !t.gone.is_empty() {
                    t.round += 1;
                    let round = t.round;
                    return Asked {
                        ask: std::mem::take(&mut t.asks),
                        gone: std::mem::take(&mut t.gone),
                        round,
                    };
                }
            }
            self.0.fresh.notified().await;
        }
    }

    /// A name that was there before this process.
    pub(super) fn restore(&self, name: Name) -> bool {
        let mut t = self.lock();
        if t.entries.len() >= self.0.limit || t.entries.contains_key(&name) {
            return false;
        }
        let since = Instant::now();
        let entry = Entry { settled: watch::Sender::new(true), round: 0, revision: None, since };
        t.entries.insert(name.clone(), entry);
        t.order.push_back(name);
        true
    }

    /// Tells what is known of names that were asked for up to `round`: `find` gives `None` while there is no answer,
    /// else whether it is there, in the state of `revision`.
    pub(super) fn answer(&self, round: u64, revision: u64, find: impl Fn(&Name) -> Option<bool>) {
        for (name, e) in &mut self.lock().entries {
            if *e.settled.borrow() || e.round > round || e.revision.is_some() {
                continue;
            }
            match find(name) {
                None => {}
                Some(true) => e.revision = Some(revision),
                Some(false) => e.settle(),
            }
        }
    }

    /// Gives up names whose purpose is gone.
    pub(super) fn retain(&self, keep: impl Fn(&Name) -> bool) {
        let mut t = self.lock();
        let gone: Vec<Name> = t.entries.keys().filter(|n| !keep(n)).cloned().collect();
        if gone.is_empty() {
            return;
        }
        t.order.retain(|n| keep(n));
        for name in gone {
            t.forget(name);
        }
        drop(t);
        self.0.fresh.notify_one();
    }
}

impl Entry {
    fn settle(&mut self) {
        (self.revision, self.since) = (None, Instant::now());
        self.settled.send_replace(true);
    }
}

impl Table {
    fn ask(&mut self, name: Name) {
        self.stats.asked += 1;
        self.gone.remove(&name);
        self.asks.insert(name);
    }

    fn forget(&mut self, name: Name) {
        if let Some(mut e) = self.entries.remove(&name) {
            e.settle();
        }
        self.asks.remove(&name);
        self.gone.insert(name);
    }

    /// Makes room for one name.
    fn evict(&mut self, in_use: &dyn Fn(Kind, &str) -> bool) -> bool {
        for _ in 0..LOOKS.min(self.order.len()) {
            let Some(name) = self.order.pop_front() else { return false };
            let waited = self.entries.get(&name).is_some_and(|e| e.settled.receiver_count() > 0);
            if waited || in_use(name.0, &name.1) {
                self.order.push_back(name);
                continue;
            }
            self.stats.evicted += 1;
            self.forget(name);
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: &dyn Fn(Kind, &str) -> bool = &|_, _| false;

    fn cluster(n: &str) -> Name {
        (Kind::Cluster, n.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn many_that_wait_ask_once_and_learn_together() {
        let names = OnDemandNames::new(9);
        let all: Vec<_> = (0..100).map(|_| names.want(Kind::Cluster, "a", NOBODY).unwrap()).collect();
        let asked = names.asked().await;
        assert_eq!(asked.ask, BTreeSet::from([cluster("a")]));
        assert_eq!(names.stats().asked, 1);
        // An answer to an earlier round says nothing about this one.
        names.answer(asked.round - 1, 1, |_| Some(false));
        assert!(all.iter().all(|r| !*r.borrow()));
        names.answer(asked.round, 7, |_| Some(true));
        names.applied(6);
        assert!(all.iter().all(|r| !*r.borrow()), "not in force yet");
        names.applied(7);
        assert!(all.iter().all(|r| *r.borrow()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_absence_is_believed_for_a_second() {
        let names = OnDemandNames::new(9);
        let first = names.want(Kind::Cluster, "a", NOBODY).unwrap();
        let asked = names.asked().await;
        names.answer(asked.round, 1, |_| Some(false));
        assert!(*first.borrow());
        assert!(*names.want(Kind::Cluster, "a", NOBODY).unwrap().borrow());
        tokio::time::advance(ABSENT_FOR).await;
        let again = names.want(Kind::Cluster, "a", NOBODY).unwrap();
        assert!(!*again.borrow());
        // What the client knew before it took this up is of the past.
        names.answer(asked.round, 1, |_| Some(false));
        assert!(!*again.borrow());
        assert_eq!(names.asked().await.ask, BTreeSet::from([cluster("a")]));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_used_or_waited_for_keeps_its_place() {
        let names = OnDemandNames::new(3);
        let a = names.want(Kind::Cluster, "a", NOBODY).unwrap();
        for n in ["b", "c"] {
            drop(names.want(Kind::Cluster, n, NOBODY).unwrap());
        }
        let used = |_: Kind, n: &str| n == "b";
        names.want(Kind::Cluster, "d", &used).unwrap();
        let asked = names.asked().await;
        assert_eq!(asked.ask, ["a", "b", "d"].map(cluster).into());
        assert_eq!(asked.gone, BTreeSet::from([cluster("c")]));
        // With everything in use nothing is asked for, whoever asks.
        assert_eq!(names.want(Kind::Cluster, "e", &|_, _| true).err(), Some(Full));
        let stats = names.stats();
        assert_eq!((stats.clusters, stats.asked, stats.evicted, stats.refused), (3, 4, 1, 1));
        drop(a);
        names.want(Kind::Cluster, "e", NOBODY).unwrap();
        assert_eq!(names.stats().clusters, 3);
        // What cannot be a name is not asked for.
        for odd in [String::new(), "x".repeat(MAX_NAME + 1)] {
            assert!(*names.want(Kind::Cluster, &odd, NOBODY).unwrap().borrow());
        }
        assert_eq!(names.stats().asked, 5);
    }
}
