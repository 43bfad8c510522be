//! What to ask an agent next: a state machine without I/O.
//!
//! Rules, most of them from Consul's page on blocking queries:
//!
//! - One query waits for changes of the list of services and one for those of each service. At most `lanes` of the
//!   latter are open; if there are more services, they take turns with shorter waits, and one query more waits for
//!   changes of what is critical: whom those are about is next.
//! - An index that went back is forgotten, and the next query does not wait. So it is after every failure: who answers
//!   then may count anew, and would let an index from before wait for its number.
//! - An index of 0, or none, counts as 1, so that the next query waits if it can.
//! - The same is not asked twice within [`GAP`], and answers that come early, with the index that was asked with and no
//!   news, make it longer.
//! - While the list cannot be had, nothing else is asked: one query with back-off finds out when the agent is back.
//! - What was known stays until an answer says otherwise.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::answer::Instance;

/// How long a query waits for a change. Consul allows ten minutes, but an agent that hangs is noticed this late, and what
/// balances load in front of agents likes to end requests after a minute.
pub(crate) const WAIT: Duration = Duration::from_secs(45);
/// If services take turns, each comes round in about this time ...
const ROUND: Duration = Duration::from_secs(5);
/// ... unless waits would get shorter than this.
const MIN_WAIT: Duration = Duration::from_millis(250);
/// Between two questions of the same kind, so that a flapping check does not make a storm.
const GAP: Duration = Duration::from_millis(200);
/// The longest pause after early answers without news.
const MAX_GAP: Duration = Duration::from_secs(5);
/// First pause after a failure; it doubles ...
const BACKOFF: Duration = Duration::from_millis(500);
/// ... up to this.
const MAX_BACKOFF: Duration = Duration::from_secs(15);

/// What is asked about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Query {
    /// `/v1/catalog/services`.
    Catalog,
    /// `/v1/health/state/critical`.
    Critical,
    /// `/v1/health/service/<name>`.
    Service(String),
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) query: Query,
    /// 0 for an answer at once.
    pub(crate) index: u64,
    /// Of no meaning without an index.
    pub(crate) wait: Duration,
    pub(crate) at: Instant,
}

#[derive(Debug, Clone)]
struct Watch {
    index: u64,
    /// When it may be asked; `None` while it is.
    due: Option<Instant>,
    failures: u32,
    /// Early answers without news, in a row.
    early: u32,
}

impl Watch {
    fn new(now: Instant) -> Self {
        Self { index: 0, due: Some(now), failures: 0, early: 0 }
    }

    fn answered(&mut self, ask: &Ask, index: u64, news: bool, now: Instant) {
        let index = index.max(1);
        self.index = if index < self.index { 0 } else { index };
        self.failures = 0;
        let early = !news && index == ask.index && now.saturating_duration_since(ask.at) < ask.wait / 2;
        self.early = if early { self.early.saturating_add(1) } else { 0 };
        let gap = (GAP * 2_u32.saturating_pow(self.early.min(8))).min(MAX_GAP);
        self.due = Some((ask.at + gap).max(now));
    }

    fn failed(&mut self, now: Instant, jitter: f64) {
        self.index = 0;
        let most = (BACKOFF * 2_u32.saturating_pow(self.failures.min(8))).min(MAX_BACKOFF);
        self.failures = self.failures.saturating_add(1);
        // The upper half: never at once, never in step with others.
        self.due = Some(now + most.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0));
    }
}

/// A service of which the list knows.
#[derive(Debug, Clone)]
struct Known {
    watch: Watch,
    /// What was answered last, or kept from before.
    last: Option<Answered>,
    /// Whether the agent answered since the start.
    fresh: bool,
}

/// Instances, and what of their answer was of no use.
pub(crate) type Answered = (Vec<Instance>, Vec<String>);

/// What an answer changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Changed {
    /// Services whose instances are others than before.
    pub(crate) services: BTreeSet<String>,
    /// Services that are gone.
    pub(crate) gone: BTreeSet<String>,
}

/// The questions to one agent.
#[derive(Debug)]
pub(crate) struct Watches {
    lanes: usize,
    /// Before every other time.
    begun: Instant,
    catalog: Watch,
    listed: bool,
    critical: Watch,
    /// Services and nodes with critical checks.
    ailing: BTreeSet<(String, String)>,
    known: BTreeMap<String, Known>,
    /// Services that are not being asked, in the order of their turns.
    queue: BTreeSet<(Instant, String)>,
    /// Services that are being asked, with removed ones whose answers are still to come.
    open: usize,
}

impl Watches {
    /// Starts with what was kept from before.
    pub(crate) fn new(lanes: usize, kept: BTreeMap<String, Vec<Instance>>, now: Instant) -> Self {
        let known: BTreeMap<String, Known> = kept
            .into_iter()
            .map(|(n, i)| (n, Known { watch: Watch::new(now), last: Some((i, vec![])), fresh: false }))
            .collect();
        let queue = known.keys().map(|n| (now, n.clone())).collect();
        Self {
            lanes: lanes.max(1),
            begun: now,
            catalog: Watch::new(now),
            listed: false,
            critical: Watch::new(now),
            ailing: BTreeSet::new(),
            known,
            queue,
            open: 0,
        }
    }

    /// The next question that can be asked now. It must be answered or fail.
    pub(crate) fn next(&mut self, now: Instant) -> Option<Ask> {
        if self.catalog.due.is_some_and(|d| d <= now) {
            self.catalog.due = None;
            return Some(Ask { query: Query::Catalog, index: self.catalog.index, wait: WAIT, at: now });
        }
        if self.is_up() && self.in_turns() && self.critical.due.is_some_and(|d| d <= now) {
            self.critical.due = None;
            return Some(Ask { query: Query::Critical, index: self.critical.index, wait: WAIT, at: now });
        }
        if !self.is_up() || self.open >= self.lanes || self.queue.first()?.0 > now {
            return None;
        }
        let (_, name) = self.queue.pop_first()?;
        let wait = self.wait();
        let known = self.known.get_mut(&name)?;
        known.watch.due = None;
        self.open += 1;
        Some(Ask { index: known.watch.index, query: Query::Service(name), wait, at: now })
    }

    /// Whether there are more services than can be watched at once.
    fn in_turns(&self) -> bool {
        self.known.len() > self.lanes
    }

    fn wait(&self) -> Duration {
        if !self.in_turns() {
            return WAIT;
        }
        ROUND.mul_f64(self.lanes as f64 / self.known.len() as f64).max(MIN_WAIT)
    }

    /// When [`Self::next`] may have another question, if no answer comes first.
    pub(crate) fn wake(&self) -> Option<Instant> {
        let lane = self.is_up() && self.open < self.lanes;
        let service = self.queue.first().filter(|_| lane).map(|(d, _)| *d);
        let critical = self.critical.due.filter(|_| self.is_up() && self.in_turns());
        self.catalog.due.into_iter().chain(critical).chain(service).min()
    }

    /// Takes the list of services.
    pub(crate) fn listed(
        &mut self,
        ask: &Ask,
        index: u64,
        names: &BTreeSet<String>,
        now: Instant,
    ) -> Changed {
        let back = self.catalog.failures > 0;
        let gone: BTreeSet<String> = self.known.keys().filter(|n| !names.contains(*n)).cloned().collect();
        let fresh: Vec<&String> = names.iter().filter(|n| !self.known.contains_key(*n)).collect();
        self.catalog.answered(ask, index, !gone.is_empty() || !fresh.is_empty(), now);
        for name in fresh {
            self.queue.insert((now, name.clone()));
            self.known.insert(name.clone(), Known { watch: Watch::new(now), last: None, fresh: false });
        }
        for name in &gone {
            if let Some(Watch { due: Some(due), .. }) = self.known.remove(name).map(|k| k.watch) {
                self.queue.remove(&(due, name.clone()));
            }
        }
        self.listed = true;
        if back {
            // Whoever answers now may be another than before.
            self.critical.index = 0;
            for (name, known) in &mut self.known {
                known.watch.index = 0;
                if let Some(due) = known.watch.due.replace(now) {
                    self.queue.remove(&(due, name.clone()));
                    self.queue.insert((now, name.clone()));
                } else {
                    known.watch.due = None;
                }
            }
        }
        Changed { services: BTreeSet::new(), gone }
    }

    /// Takes what is critical: services that were not before, or are no longer, are next.
    pub(crate) fn critical(
        &mut self,
        ask: &Ask,
        index: u64,
        ailing: BTreeSet<(String, String)>,
        now: Instant,
    ) {
        let changed: Vec<(String, String)> = ailing.symmetric_difference(&self.ailing).cloned().collect();
        self.critical.answered(ask, index, !changed.is_empty(), now);
        self.ailing = ailing;
        let begun = self.begun;
        for (service, node) in changed {
            if service.is_empty() {
                // A check of the node is one of everything on it.
                let on_it = |k: &Known| k.last.iter().flat_map(|(all, _)| all).any(|i| i.node == node);
                for (name, known) in self.known.iter_mut().filter(|(_, k)| on_it(k)) {
                    Self::hurry(&mut self.queue, name, known, begun);
                }
            } else if let Some(known) = self.known.get_mut(&service) {
                Self::hurry(&mut self.queue, &service, known, begun);
            }
        }
    }

    /// Whoever is being asked, or cannot be, is left as it is.
    fn hurry(queue: &mut BTreeSet<(Instant, String)>, name: &str, known: &mut Known, begun: Instant) {
        if known.watch.failures == 0
            && let Some(due) = &mut known.watch.due
        {
            queue.remove(&(*due, name.to_owned()));
            *due = begun;
            queue.insert((begun, name.to_owned()));
        }
    }

    /// Takes the instances of a service.
    pub(crate) fn told(&mut self, ask: &Ask, index: u64, answer: Answered, now: Instant) -> Changed {
        self.open = self.open.saturating_sub(1);
        let mut changed = Changed::default();
        let Query::Service(name) = &ask.query else { return changed };
        let Some(known) = self.known.get_mut(name) else { return changed };
        let news = known.last.as_ref() != Some(&answer);
        known.fresh = true;
        if news {
            known.last = Some(answer);
            changed.services.insert(name.clone());
        }
        let old = known.watch.due;
        known.watch.answered(ask, index, news, now);
        Self::requeue(&mut self.queue, name, old, known.watch.due);
        changed
    }

    /// Takes a failure; `jitter` is a random number from 0 to 1.
    pub(crate) fn failed(&mut self, ask: &Ask, now: Instant, jitter: f64) {
        match &ask.query {
            Query::Catalog => self.catalog.failed(now, jitter),
            Query::Critical => self.critical.failed(now, jitter),
            Query::Service(name) => {
                self.open = self.open.saturating_sub(1);
                if let Some(known) = self.known.get_mut(name) {
                    let old = known.watch.due;
                    known.watch.failed(now, jitter);
                    Self::requeue(&mut self.queue, name, old, known.watch.due);
                }
            }
        }
    }

    /// One that was removed and came back while its old question was open is in the queue already.
    fn requeue(
        queue: &mut BTreeSet<(Instant, String)>,
        name: &str,
        old: Option<Instant>,
        due: Option<Instant>,
    ) {
        if let Some(old) = old {
            queue.remove(&(old, name.to_owned()));
        }
        queue.extend(due.map(|d| (d, name.to_owned())));
    }

    /// Whether the list could be had when it was asked for last.
    pub(crate) fn is_up(&self) -> bool {
        self.listed && self.catalog.failures == 0
    }

    /// Whether everything has been answered since the start, or could not be: one service holds nobody up.
    pub(crate) fn is_synced(&self) -> bool {
        self.listed && self.known.values().all(|k| k.fresh || k.watch.failures > 0)
    }

    /// What is known of a service.
    pub(crate) fn of(&self, name: &str) -> Option<&Answered> {
        self.known.get(name)?.last.as_ref()
    }

    /// Everything that is known.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&String, &Answered)> {
        self.known.iter().filter_map(|(n, k)| Some((n, k.last.as_ref()?)))
    }

    /// The index of the list.
    pub(crate) fn index(&self) -> u64 {
        self.catalog.index
    }

    /// Services, open questions about them, and services whose last question failed.
    pub(crate) fn counts(&self) -> (usize, usize, usize) {
        (self.known.len(), self.open, self.known.values().filter(|k| k.watch.failures > 0).count())
    }
}
