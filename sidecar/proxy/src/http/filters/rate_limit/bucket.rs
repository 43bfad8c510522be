//! Token buckets that all workers share without a lock.
//!
//! The state of a bucket is the moment at which it was (or would have been) empty: it fills steadily, so the
//! tokens in it are the time since then. Taking one moves that moment by the time of one token.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use mesh_model::proxy as model;

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Nanoseconds on a monotonic clock of this process.
fn now() -> i64 {
    i64::try_from(EPOCH.elapsed().as_nanos()).unwrap_or(i64::MAX)
}

/// A compiled [`model::TokenBucket`].
#[derive(Debug)]
pub(crate) struct Bucket {
    max: u32,
    /// Time in which one token comes, nanoseconds.
    token: i64,
    /// Time in which an empty bucket becomes full.
    full: i64,
    empty_at: AtomicI64,
}

impl Bucket {
    pub(crate) fn new(c: &model::TokenBucket) -> Self {
        let interval = i64::try_from(c.fill_interval.as_nanos()).unwrap_or(i64::MAX / 4).min(i64::MAX / 4);
        let token = (interval / i64::from(c.tokens_per_fill.max(1))).max(1);
        let full = token.saturating_mul(i64::from(c.max_tokens)).min(i64::MAX / 4);
        Self { max: c.max_tokens, token, full, empty_at: AtomicI64::new(now().saturating_sub(full)) }
    }

    /// Takes a token if there is one.
    pub(crate) fn take(&self) -> bool {
        self.take_at(now())
    }

    fn take_at(&self, now: i64) -> bool {
        self.empty_at
            .try_update(Relaxed, Relaxed, |at| {
                // More than full is full.
                let next = at.max(now - self.full) + self.token;
                (next <= now).then_some(next)
            })
            .is_ok()
    }

    pub(crate) fn max(&self) -> u32 {
        self.max
    }

    /// Whole tokens in it.
    pub(crate) fn remaining(&self) -> u32 {
        let filled = (now() - self.empty_at.load(Relaxed)).clamp(0, self.full);
        u32::try_from(filled / self.token).unwrap_or(u32::MAX)
    }

    /// Time until there is a token; zero if there is one.
    pub(crate) fn wait(&self) -> Duration {
        let at = self.empty_at.load(Relaxed).saturating_add(self.token);
        Duration::from_nanos(u64::try_from(at - now()).unwrap_or(0))
    }

    /// Orders buckets by how fast they fill.
    pub(crate) fn slowness(&self) -> i64 {
        -self.token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(max_tokens: u32, tokens_per_fill: u32, ms: u64) -> Bucket {
        Bucket::new(&model::TokenBucket {
            max_tokens,
            tokens_per_fill,
            fill_interval: Duration::from_millis(ms),
        })
    }

    #[test]
    fn tokens_come_steadily_and_not_beyond_the_brim() {
        let b = bucket(3, 2, 1000);
        let t = b.empty_at.load(Relaxed) + b.full;
        let ms = 1_000_000;
        assert!((0..3).all(|_| b.take_at(t)) && !b.take_at(t));
        assert!(!b.take_at(t + 499 * ms));
        assert!(b.take_at(t + 500 * ms) && !b.take_at(t + 500 * ms));
        let later = t + 3_600_000 * ms;
        assert_eq!((0..10).filter(|_| b.take_at(later)).count(), 3);
        assert!(!bucket(0, 1, 1000).take());
        assert_eq!(bucket(5, 1, 60_000).remaining(), 5);
    }

    #[test]
    fn workers_share_it() {
        let b = bucket(1000, 1, 3_600_000);
        let taken: usize = std::thread::scope(|s| {
            let run = || (0..1000).filter(|_| b.take()).count();
            let all: Vec<_> = (0..4).map(|_| s.spawn(run)).collect();
            all.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(taken, 1000);
    }
}
