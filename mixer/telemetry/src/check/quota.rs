//! Quota fetched ahead of need.
//!
//! A request whose policy answer is cached must not wait for quota either: amounts are fetched in
//! batches and given out locally until they expire. A quota that had nothing to give is asked again
//! half a second later at the earliest, so that a flood of requests does not become a flood of calls.

use std::time::{Duration, Instant};

use super::{
    QuotaCharge,
    cache::{Generations, ReferenceSets, key},
};
use crate::attributes::{Bag, Reference};

/// Least amount fetched at once.
pub(super) const PREFETCH: i64 = 10;
/// How long an empty quota is believed to be empty.
const RETRY: Duration = Duration::from_millis(500);

/// What was left of a batch.
#[derive(Debug)]
struct Pool {
    left: i64,
    expires: Instant,
    /// Nothing was granted; not asked again before.
    empty_until: Option<Instant>,
}

/// Result of taking from a pool.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// Taken.
    Yes,
    /// Nothing there, and it was asked for a moment ago.
    Exhausted,
    /// Mixer has to be asked.
    Unknown,
}

/// Pools by quota and by the attributes that choose among its counters.
#[derive(Debug)]
pub(super) struct QuotaCache {
    sets: ReferenceSets,
    pools: Generations<Pool>,
}

impl QuotaCache {
    pub(super) fn new(capacity: usize) -> Self {
        Self { sets: ReferenceSets::default(), pools: Generations::new(capacity) }
    }

    pub(super) fn take(&mut self, bag: &Bag, charge: &QuotaCharge, now: Instant) -> Taken {
        let Self { sets, pools } = self;
        for key in sets.keys(bag, &charge.name) {
            let Some(p) = pools.get_mut(&key) else { continue };
            if p.expires > now && p.left >= charge.amount {
                p.left -= charge.amount;
                return Taken::Yes;
            }
            if p.empty_until.is_some_and(|t| t > now) {
                return Taken::Exhausted;
            }
            pools.remove(&key);
        }
        Taken::Unknown
    }

    /// Remembers what is left of a grant after the request that asked for it.
    pub(super) fn granted(
        &mut self,
        refs: Vec<Reference>,
        bag: &Bag,
        name: &str,
        left: i64,
        now: Instant,
        valid: Duration,
    ) {
        let Some(key) = key(&refs, bag, name) else { return };
        if !self.sets.insert(refs) {
            return;
        }
        // Another request may have fetched meanwhile; its rest is still good.
        let rest = self.pools.get_mut(&key).filter(|p| p.expires > now).map_or(0, |p| p.left);
        let left = left.saturating_add(rest);
        let empty_until = (left == 0).then(|| now + RETRY);
        self.pools.insert(key, Pool { left, expires: now + valid, empty_until });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_given_out_and_expire() {
        let mut q = QuotaCache::new(10);
        let bag: Bag = [("source.namespace", "books")].into_iter().collect();
        let other: Bag = [("source.namespace", "films")].into_iter().collect();
        let refs = || vec![Reference { name: "source.namespace".into(), key: None, present: true }];
        let charge = QuotaCharge { name: "requests".into(), amount: 1 };
        let now = Instant::now();
        assert_eq!(q.take(&bag, &charge, now), Taken::Unknown);
        q.granted(refs(), &bag, "requests", 2, now, Duration::from_secs(5));
        assert_eq!(q.take(&bag, &charge, now), Taken::Yes);
        assert_eq!(q.take(&other, &charge, now), Taken::Unknown);
        assert_eq!(q.take(&bag, &QuotaCharge { name: "other".into(), amount: 1 }, now), Taken::Unknown);
        assert_eq!(q.take(&bag, &charge, now), Taken::Yes);
        assert_eq!(q.take(&bag, &charge, now), Taken::Unknown);
        q.granted(refs(), &bag, "requests", 0, now, Duration::from_secs(5));
        assert_eq!(q.take(&bag, &charge, now), Taken::Exhausted);
        assert_eq!(q.take(&bag, &charge, now + RETRY), Taken::Unknown);
        q.granted(refs(), &bag, "requests", 5, now, Duration::from_secs(5));
        assert_eq!(q.take(&bag, &charge, now + Duration::from_secs(6)), Taken::Unknown);
    }
}
