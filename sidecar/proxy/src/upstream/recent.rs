//! How many requests began of late, for retry budgets that look at an interval (`budget_interval`).

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::cluster::millis;

/// Parts of the interval: a request counts for as long as it and up to a tenth less.
const SLOTS: u64 = 10;

/// Counts by parts of an interval, over all workers. Each cell has the number of its part above its count.
#[derive(Debug, Default)]
pub(crate) struct Recent([AtomicU64; SLOTS as usize]);

/// The number of the part of the interval that a moment is in; it fits into half a cell for four billion parts.
fn part(now: u64, interval: Duration) -> u64 {
    (now / (millis(interval) / SLOTS).max(1)) & u64::from(u32::MAX)
}

impl Recent {
    /// A request begins.
    pub(crate) fn note(&self, now: u64, interval: Duration) {
        let part = part(now, interval);
        let Some(cell) = self.0.get((part % SLOTS) as usize) else { return };
        let _ = cell.fetch_update(Relaxed, Relaxed, |c| {
            // Whoever is late counts for the part that is there.
            Some(if c >> 32 < part { (part << 32) + 1 } else { c.saturating_add(1) })
        });
    }

    /// How many began within the interval.
    pub(crate) fn count(&self, now: u64, interval: Duration) -> u64 {
        let part = part(now, interval);
        let is_recent = |c: &u64| part.wrapping_sub(c >> 32) < SLOTS;
        self.0.iter().map(|c| c.load(Relaxed)).filter(is_recent).map(|c| c & u64::from(u32::MAX)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_count_for_the_interval() {
        let (r, second) = (Recent::default(), Duration::from_secs(1));
        let begin = 1_000_000;
        for n in 0..10 {
            r.note(begin + n * 50, second);
        }
        assert_eq!(r.count(begin + 450, second), 10);
        assert_eq!(r.count(begin + 999, second), 10);
        assert_eq!(r.count(begin + 1100, second), 6, "those of the first two tenths are past");
        assert_eq!(r.count(begin + 1500, second), 0);
        r.note(begin + 5000, second);
        assert_eq!(r.count(begin + 5000, second), 1, "cells are used again");
    }
}
