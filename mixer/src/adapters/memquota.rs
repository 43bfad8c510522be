//! Counts in memory: rolling windows, or plain allocations that are released.
//!
//! A window is counted in ticks of a thousandth of its length, at least 100 ms; so it forgets what
//! is older than the window by at most one tick, and its size is bounded. Counters per value of the
//! dimensions are bounded as well: beyond the limit, new values share one counter, which limits them
//! together instead of not at all.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use mesh_model::authored::{MemQuota as Quota, MemQuotaParams};

use super::{QuotaArgs, QuotaGrant};
use crate::expr::Value;

/// Counters of one handler.
const MAX_COUNTERS: usize = 100_000;
/// Shortest tick.
const MIN_TICK: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct MemQuota {
    quotas: HashMap<String, Quota>,
    dedup: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    started: Instant,
    counters: HashMap<(String, String), Counter>,
    /// Answers by deduplication ID, in two generations of at least the configured time each.
    answers: [HashMap<String, QuotaGrant>; 2],
    turned: Instant,
}

#[derive(Debug, Default)]
struct Counter {
    /// `(tick, amount)`, oldest first; empty for plain allocations.
    ticks: VecDeque<(u64, i64)>,
    /// Sum of the ticks, or what is allocated.
    used: i64,
    /// Tick after which nothing of it counts.
    idle_from: u64,
}

impl MemQuota {
    pub(super) fn new(p: &MemQuotaParams) -> Result<Self, String> {
        let mut quotas = HashMap::new();
        for q in &p.quotas {
            if quotas.insert(q.name.clone(), q.clone()).is_some() {
                return Err(format!("quota {:?} is listed twice", q.name));
            }
        }
        let now = Instant::now();
        let state =
            State { started: now, counters: HashMap::new(), answers: Default::default(), turned: now };
        Ok(Self {
            quotas,
            dedup: p.min_deduplication_duration.map_or(Duration::from_secs(1), |d| d.0),
            state: Mutex::new(state),
        })
    }

    /// A quota is configured by the full name of its instance, or by `name.namespace`.
    fn quota(&self, instance: &str) -> Option<&Quota> {
        self.quotas.get(instance).or_else(|| {
            let mut parts = instance.rsplitn(3, '.');
            let (namespace, _kind, name) = (parts.next()?, parts.next()?, parts.next()?);
            self.quotas.get(&format!("{name}.{namespace}"))
        })
    }

    pub(super) fn accepts(&self, instance: &str) -> Result<(), String> {
        match self.quota(instance) {
            Some(_) => Ok(()),
            None => Err(format!("the memquota handler has no quota for {instance}")),
        }
    }

    pub(super) fn alloc(
        &self,
        instance: &str,
        dimensions: &BTreeMap<String, Value>,
        args: QuotaArgs<'_>,
    ) -> QuotaGrant {
        let Some(quota) = self.quota(instance) else {
            return QuotaGrant { granted: 0, valid: Duration::ZERO };
        };
        let text: BTreeMap<&str, String> =
            dimensions.iter().map(|(k, v)| (k.as_str(), v.to_text())).collect();
        let chosen = quota
            .overrides
            .iter()
            .find(|o| o.dimensions.iter().all(|(k, v)| text.get(k.as_str()).is_some_and(|t| t == v)));
        let (max, window) = match chosen {
            Some(o) => (o.max_amount, o.valid_duration),
            None => (quota.max_amount, quota.valid_duration),
        };
        let window = window.map(|d| d.0).unwrap_or_default();

        // The lock is held for arithmetic only.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = state.known(args.dedup, instance, args.now, self.dedup) {
            return known;
        }
        // Lengths first, so that no two sets of values make the same key.
        let key: String = text.iter().map(|(k, v)| format!("{}:{k}{}:{v}", k.len(), v.len())).collect();
        let tick_length = (window / 1_000).max(MIN_TICK);
        let tick = ticks(args.now.saturating_duration_since(state.started), tick_length);
        let counter = state.counter((instance.to_owned(), key), tick);
        let grant = counter.take(args.amount, args.best_effort, max, window, tick, tick_length);
        state.remember(args.dedup, instance, grant);
        grant
    }
}

fn ticks(since: Duration, length: Duration) -> u64 {
    u64::try_from(since.as_nanos() / length.as_nanos().max(1)).unwrap_or(u64::MAX)
}

impl State {
    fn known(&mut self, dedup: &str, instance: &str, now: Instant, keep: Duration) -> Option<QuotaGrant> {
        let full = self.answers[0].len() >= MAX_COUNTERS;
        let age = now.saturating_duration_since(self.turned);
        if age >= keep || full {
            self.answers.swap(0, 1);
            if age >= keep.saturating_mul(2) {
                self.answers[1].clear();
            }
            self.answers[0].clear();
            self.turned = now;
        }
        if dedup.is_empty() {
            return None;
        }
        let key = format!("{instance}/{dedup}");
        self.answers.iter().find_map(|a| a.get(&key)).copied()
    }

    fn remember(&mut self, dedup: &str, instance: &str, grant: QuotaGrant) {
        if !dedup.is_empty() {
            self.answers[0].insert(format!("{instance}/{dedup}"), grant);
        }
    }

    fn counter(&mut self, key: (String, String), tick: u64) -> &mut Counter {
        let mut key = key;
        if !self.counters.contains_key(&key) && self.counters.len() >= MAX_COUNTERS {
            self.counters.retain(|_, c| c.idle_from > tick);
            if self.counters.len() >= MAX_COUNTERS {
                key.1 = "*".to_owned();
            }
        }
        self.counters.entry(key).or_default()
    }
}

impl Counter {
    fn take(
        &mut self,
        amount: i64,
        best_effort: bool,
        max: i64,
        window: Duration,
        tick: u64,
        tick_length: Duration,
    ) -> QuotaGrant {
        let plain = window.is_zero();
        if !plain {
            let width = ticks(window, tick_length).max(1);
            while let Some((t, n)) = self.ticks.front().copied()
                && t + width <= tick
            {
                self.used -= n;
                self.ticks.pop_front();
            }
        }
        let free = max.saturating_sub(self.used).max(0);
        let granted = if amount < 0 {
            // A release; a window needs none.
            if plain { amount.max(-self.used) } else { 0 }
        } else if amount <= free {
            amount
        } else if best_effort {
            free
        } else {
            0
        };
        self.used += granted;
        if plain {
            self.idle_from = if self.used == 0 { tick } else { u64::MAX };
        } else if granted > 0 {
            match self.ticks.back_mut() {
                Some((t, n)) if *t == tick => *n += granted,
                _ => self.ticks.push_back((tick, granted)),
            }
            self.idle_from = tick.saturating_add(ticks(window, tick_length)).saturating_add(1);
        }
        QuotaGrant { granted, valid: window }
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::authored::MemQuotaOverride;

    use super::*;

    fn handler(max: i64, seconds: u64) -> MemQuota {
        let window = Some(mesh_model::authored::Duration(Duration::from_secs(seconds)));
        let overrides = vec![MemQuotaOverride {
            dimensions: BTreeMap::from([("user".to_owned(), "vip".to_owned())]),
            max_amount: 100,
            valid_duration: window,
        }];
        let quota = Quota { name: "q.books".into(), max_amount: max, valid_duration: window, overrides };
        MemQuota::new(&MemQuotaParams { quotas: vec![quota], min_deduplication_duration: None }).unwrap()
    }

    fn ask(q: &MemQuota, user: &str, amount: i64, best_effort: bool, dedup: &str, now: Instant) -> i64 {
        let dimensions = BTreeMap::from([("user".to_owned(), Value::String(user.to_owned()))]);
        q.alloc("q.quota.books", &dimensions, QuotaArgs { amount, best_effort, dedup, now }).granted
    }

    #[test]
    fn a_window_rolls() {
        let q = handler(2, 5);
        let t = Instant::now();
        let at = |s: f64| t + Duration::from_secs_f64(s);
        assert_eq!(ask(&q, "a", 1, false, "", at(1.0)), 1);
        assert_eq!(ask(&q, "a", 1, false, "", at(3.0)), 1);
        assert_eq!(ask(&q, "a", 1, false, "", at(5.5)), 0);
        assert_eq!(ask(&q, "b", 1, false, "", at(5.5)), 1, "another counter");
        assert_eq!(ask(&q, "vip", 3, false, "", at(5.5)), 3, "an override");
        assert_eq!(ask(&q, "a", 2, false, "", at(6.3)), 0, "all or nothing");
        assert_eq!(ask(&q, "a", 10, true, "", at(6.3)), 1, "best effort");
        assert_eq!(ask(&q, "a", 10, true, "", at(20.0)), 2);
    }

    #[test]
    fn a_repetition_gets_the_same_answer() {
        let q = handler(1, 60);
        let t = Instant::now();
        assert_eq!(ask(&q, "a", 1, false, "x", t), 1);
        assert_eq!(ask(&q, "a", 1, false, "x", t), 1);
        assert_eq!(ask(&q, "a", 1, false, "y", t), 0);
        assert_eq!(ask(&q, "a", 1, false, "x", t + Duration::from_secs(3)), 0, "forgotten");
    }

    #[test]
    fn allocations_are_released() {
        let q = handler(2, 0);
        let t = Instant::now();
        assert_eq!(ask(&q, "a", 2, false, "", t), 2);
        assert_eq!(ask(&q, "a", 1, false, "", t + Duration::from_secs(1_000)), 0);
        assert_eq!(ask(&q, "a", -1, false, "", t), -1);
        assert_eq!(ask(&q, "a", 1, false, "", t), 1);
        assert_eq!(ask(&q, "a", -10, false, "", t), -2);
    }

    #[test]
    fn counters_are_bounded_and_still_limit() {
        let q = handler(1, 60);
        let t = Instant::now();
        for i in 0..MAX_COUNTERS {
            ask(&q, &i.to_string(), 1, false, "", t);
        }
        assert_eq!(ask(&q, "new-1", 1, false, "", t), 1);
        assert_eq!(ask(&q, "new-2", 1, false, "", t), 0, "they share a counter");
        assert!(q.state.lock().unwrap().counters.len() <= MAX_COUNTERS + 1);
        assert_eq!(ask(&q, "new-3", 1, false, "", t + Duration::from_secs(61)), 1);
    }

    #[test]
    fn unknown_quotas_are_refused_when_they_are_loaded() {
        assert!(handler(1, 1).accepts("other.quota.books").is_err());
        assert!(handler(1, 1).accepts("q.quota.books").is_ok());
    }
}
