//! How far behind a worker is, and what it turns away then.
//!
//! An open loop of clients does not slow down when a proxy does. Without limits every request is served, each of
//! them too late, and memory grows with the queue. So a worker measures its lag, the time that something ready waits
//! for its turn, and
//!
//! 1. beyond [`EngineOptions::max_lag`](crate::EngineOptions::max_lag) takes one new connection in each tick: whoever
//!    is connected is served, the others wait in the kernel, where they cost nothing. When the lag falls it takes
//!    more of them in steps. An HTTP/1 connection holds one request, so this alone bounds the lag of HTTP/1;
//! 2. refuses streams of HTTP/2 (503, flag `OM`) that waited longer than that between being accepted and their turn,
//!    once none has waited less for twice that time: one connection brings a thousand of them, and a stream is cheap
//!    to refuse. A queue that stands is an overload; one that a pause of the process left behind is not, and goes
//!    away by being served (CoDel, RFC 8289, tells the two apart in the same way);
//! 3. refuses every request beyond sixteen times of that, where answers would be too late anyway. Not before: a
//!    request of HTTP/1 costs a third of itself to refuse, and its client sends the next at once; at three times the
//!    capacity a worker would do nothing else.
//!
//! Memory beyond its limit does both. One slow tick is no overload (a suspended machine looks like that); several in
//! a row are. A worker that has few requests in flight is not measured, and serves them whatever the lag was: the
//! usual request pays for one comparison.

use std::{
    cell::Cell,
    rc::Rc,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use super::Worker;

/// Requests in flight from which on a worker is watched; so many are always served.
const WATCHED_FROM: usize = 16;
/// Time between two looks at the lag.
const TICK: Duration = Duration::from_millis(10);
/// Slow ticks in a row before something is done.
const STRIKES: u32 = 2;

/// Connections taken in the first calm tick after an overload; each further one takes twice as many.
const FIRST_STEP: u32 = 8;
/// Steps end here: a worker takes no more than that in a tick.
const LAST_STEP: u32 = 1024;

/// The load of one worker.
#[derive(Default)]
pub(crate) struct Load {
    in_flight: Cell<usize>,
    watched: Cell<bool>,
    /// Connections that may still come in before the next tick; `None` is without limit.
    allowed: Cell<Option<u32>>,
    /// Every request is refused.
    sheds: Cell<bool>,
    queue: Cell<Queue>,
}

/// Whether the queue of streams stands.
#[derive(Debug, Default, Clone, Copy)]
struct Queue {
    /// Since when every stream waited too long.
    since: Option<Instant>,
    /// Until when streams that waited too long are refused.
    refusing: Option<Instant>,
}

impl Queue {
    /// A stream has its turn; whether it is refused.
    fn passes(&mut self, now: Instant, late: bool, interval: Duration) -> bool {
        if !late {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert(now);
        let refused = self.refusing.is_some_and(|until| now < until) || now.duration_since(since) > interval;
        self.refusing = refused.then(|| now + interval);
        refused
    }
}

/// A request's place.
pub(crate) struct Place<'a>(&'a Load);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
    }
}

impl Load {
    /// Whether a connection may be accepted now.
    pub(super) fn takes_connections(&self) -> bool {
        match self.allowed.get() {
            None => true,
            Some(0) => false,
            Some(n) => {
                self.allowed.set(Some(n - 1));
                true
            }
        }
    }
}

impl Worker {
    /// When a stream began to wait for its turn; only a worker with many in flight asks the clock.
    pub(crate) fn arrival(&self) -> Option<Instant> {
        (self.load.in_flight.get() >= WATCHED_FROM).then(Instant::now)
    }

    /// Whether a stream waited too long, and is one of many.
    pub(crate) fn is_stale(&self, arrival: Option<Instant>) -> bool {
        let limit = self.options.max_lag;
        let Some(at) = arrival.filter(|_| !limit.is_zero()) else { return false };
        let now = Instant::now();
        let mut queue = self.load.queue.get();
        let refused = queue.passes(now, now.duration_since(at) > limit, 2 * limit);
        self.load.queue.set(queue);
        refused
    }

    /// A place for a request; `None` when it is to be refused.
    pub(crate) fn place(self: &Rc<Self>) -> Option<Place<'_>> {
        let n = self.load.in_flight.get();
        if n >= WATCHED_FROM && !self.has_place(n) {
            return None;
        }
        self.load.in_flight.set(n + 1);
        Some(Place(&self.load))
    }

    #[cold]
    fn has_place(self: &Rc<Self>, in_flight: usize) -> bool {
        if !self.load.watched.replace(true) {
            tokio::task::spawn_local(watch(Rc::clone(self)));
        }
        in_flight < self.options.max_requests
            && !self.load.sheds.get()
            && !self.shared.over_memory.load(Relaxed)
    }
}

/// Measures until the worker has little to do.
async fn watch(worker: Rc<Worker>) {
    let limit = worker.options.max_lag;
    let mut judge = Judge::default();
    let mut step = 0;
    loop {
        let due = Instant::now() + TICK;
        tokio::time::sleep_until(due.into()).await;
        let verdict = judge.look(Instant::now().duration_since(due), limit);
        let full = verdict.full || worker.shared.over_memory.load(Relaxed);
        let load = &worker.load;
        load.sheds.set(verdict.sheds);
        step = match (full, load.allowed.get()) {
            (true, _) => 1,
            (false, None) => 0,
            (false, Some(_)) => (step * 2).max(FIRST_STEP),
        };
        load.allowed.set((1..=LAST_STEP).contains(&step).then_some(step));
        if load.allowed.get().is_some() {
            worker.closed.notify_waiters();
        } else if step > 0 {
            // The last step: whoever waits may go on.
            worker.closed.notify_waiters();
        } else if load.in_flight.get() < WATCHED_FROM && !verdict.sheds {
            load.watched.set(false);
            return;
        }
    }
}

/// What follows from the lag of the last ticks.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Verdict {
    full: bool,
    sheds: bool,
}

#[derive(Debug, Default)]
struct Judge {
    /// Ticks in a row that were slow, and that were hopeless.
    slow: u32,
    hopeless: u32,
    verdict: Verdict,
}

impl Judge {
    fn look(&mut self, lag: Duration, limit: Duration) -> Verdict {
        if limit.is_zero() {
            return Verdict::default();
        }
        let count = |n: &mut u32, over: bool| *n = if over { *n + 1 } else { 0 };
        count(&mut self.slow, lag > limit);
        count(&mut self.hopeless, lag > 16 * limit);
        // Off at half of where it goes on, or every tick would turn it.
        let was = self.verdict;
        self.verdict.full = self.slow >= STRIKES || (was.full && lag > limit / 2);
        self.verdict.sheds = self.hopeless >= STRIKES || (was.sheds && lag > 8 * limit);
        self.verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_tick_is_no_overload_and_several_are() {
        let limit = Duration::from_millis(100);
        let mut j = Judge::default();
        let mut look = |ms: u64| {
            let v = j.look(Duration::from_millis(ms), limit);
            (v.full, v.sheds)
        };
        assert_eq!(look(5_000), (false, false));
        assert_eq!(look(1), (false, false));
        assert_eq!((look(150), look(150)), ((false, false), (true, false)));
        assert_eq!((look(60), look(40)), ((true, false), (false, false)));
        assert_eq!((look(2_000), look(2_000)), ((false, false), (true, true)));
        assert_eq!((look(900), look(500), look(10)), ((true, true), (true, false), (false, false)));
        assert_eq!(Judge::default().look(Duration::from_secs(9), Duration::ZERO), Verdict::default());
    }

    #[test]
    fn a_pause_refuses_nothing_and_a_standing_queue_is_refused() {
        let (start, interval) = (Instant::now(), Duration::from_millis(200));
        let mut q = Queue::default();
        let mut turn = |ms: u64, late: bool| q.passes(start + Duration::from_millis(ms), late, interval);
        // What a pause left behind, then fresh streams.
        assert!(!turn(0, true) && !turn(150, true) && !turn(160, false));
        assert!(!turn(1_000, true) && !turn(1_010, false));
        // A queue that stands.
        assert!(!turn(2_000, true) && !turn(2_100, true) && !turn(2_200, true));
        assert!(turn(2_201, true) && turn(2_300, true));
        // Fresh ones are served meanwhile; late ones are refused until there were none for a while.
        assert!(!turn(2_310, false) && turn(2_320, true));
        assert!(!turn(2_590, false) && !turn(2_600, true));
    }
}
