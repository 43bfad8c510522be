//! Streams between clusters: encoded frames that may be lost, doubled, reordered, delayed, or cut off.

use std::collections::{BTreeMap, VecDeque};

use rand::{RngExt, rngs::SmallRng};

/// What can happen to a frame, as probabilities, and how long it takes, milliseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weather {
    pub(crate) lost: f64,
    pub(crate) doubled: f64,
    /// Arrives without regard to those before it.
    pub(crate) reordered: f64,
    pub(crate) delay: (u64, u64),
}

/// One direction of a stream.
#[derive(Debug, Default)]
pub(crate) struct Pipe {
    queue: VecDeque<(u64, u64, Vec<u8>)>,
    order: u64,
}

/// What happened to frames, to see that a simulation did what it is for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) frames: u64,
    pub(crate) bytes: u64,
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
    pub(crate) reordered: u64,
}

impl Pipe {
    pub(crate) fn send(&mut self, now: u64, w: &Weather, rng: &mut SmallRng, frame: Vec<u8>, c: &mut Counts) {
        c.frames += 1;
        // Five bytes before each message are gRPC's.
        c.bytes += frame.len() as u64 + 5;
        if w.lost > 0.0 && rng.random_bool(w.lost) {
            c.lost += 1;
            return;
        }
        let copies = if w.doubled > 0.0 && rng.random_bool(w.doubled) { 2 } else { 1 };
        c.doubled += copies - 1;
        for _ in 0..copies {
            let mut at = now + rng.random_range(w.delay.0..=w.delay.1);
            let last = self.queue.back().map_or(0, |(at, ..)| *at);
            if w.reordered > 0.0 && rng.random_bool(w.reordered) {
                c.reordered += u64::from(at < last);
            } else {
                at = at.max(last);
            }
            self.order += 1;
            let place = self.queue.partition_point(|(t, ..)| *t <= at);
            self.queue.insert(place, (at, self.order, frame.clone()));
        }
    }

    pub(crate) fn due(&mut self, now: u64) -> Option<Vec<u8>> {
        self.queue.pop_front_if(|(at, ..)| *at <= now).map(|(_, _, f)| f)
    }
}

/// Which pairs cannot reach each other, in either direction.
#[derive(Debug, Default)]
pub(crate) struct Cuts(BTreeMap<(usize, usize), u64>);

impl Cuts {
    pub(crate) fn cut(&mut self, a: usize, b: usize, until: u64) {
        self.0.insert((a.min(b), a.max(b)), until);
    }

    pub(crate) fn is_cut(&self, a: usize, b: usize, now: u64) -> bool {
        self.0.get(&(a.min(b), a.max(b))).is_some_and(|until| now < *until)
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}
