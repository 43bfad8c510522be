//! Changes of the exports, told in bursts.
//!
//! A change is told at once; what follows within [`PACE_MS`] is told together. So a single change is not delayed, and a
//! rollout that goes on for minutes costs each importer a bounded number of announcements.

use std::collections::BTreeMap;

use mesh_model::federation::Offer;

use super::{ExportLog, PACE_MS, ServiceKey};

/// Changes that wait for their turn.
#[derive(Debug, Default)]
pub(super) struct Pace {
    waiting: BTreeMap<ServiceKey, Option<Offer>>,
    /// There is something to say, if only that nothing is exported.
    pending: bool,
    due: u64,
}

impl Pace {
    /// Takes changes; the newest of a service counts.
    pub(super) fn push(&mut self, changes: impl IntoIterator<Item = (ServiceKey, Option<Offer>)>) {
        self.pending = true;
        self.waiting.extend(changes);
    }

    /// When [`Self::flush`] is due; `None` while nothing waits.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.pending.then_some(self.due)
    }

    /// Puts what waits into the log, if its time has come; answers whether the log changed.
    pub(super) fn flush(&mut self, now: u64, log: &mut ExportLog) -> bool {
        if !self.pending || now < self.due {
            return false;
        }
        self.pending = false;
        let changed = log.apply(std::mem::take(&mut self.waiting));
        if changed {
            self.due = now + PACE_MS;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::tests::sample;

    fn weight(n: u32) -> [(ServiceKey, Option<Offer>); 1] {
        let mut s = sample("a");
        s.groups[0].healthy_weight = n;
        [(("books".into(), "a".into()), Some(s.into()))]
    }

    #[test]
    fn the_first_change_is_told_at_once_and_a_burst_once() {
        let (mut pace, mut log) = (Pace::default(), ExportLog::new(1));
        pace.push(weight(50));
        assert!(pace.flush(1000, &mut log));
        for n in 0..40 {
            pace.push(weight(n));
            assert!(!pace.flush(1001, &mut log));
        }
        assert_eq!(pace.deadline(), Some(1200));
        assert!(pace.flush(1200, &mut log));
        assert_eq!((log.head(), pace.deadline()), (2, None), "one announcement for forty changes");
        // There and back within the pace is no change at all.
        pace.push(weight(7));
        pace.push(weight(39));
        assert!(!pace.flush(1400, &mut log));
        assert_eq!(log.head(), 2);
    }

    #[test]
    fn that_nothing_is_exported_is_said_too() {
        let (mut pace, mut log) = (Pace::default(), ExportLog::new(1));
        assert!(!pace.flush(0, &mut log) && !log.ready());
        pace.push([]);
        assert!(pace.flush(0, &mut log) && log.ready());
    }
}
