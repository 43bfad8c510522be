//! What happens to a frame, as a state machine without I/O.
//!
//! A learning switch: a frame goes to the port where its destination was last seen as a source, else
//! to every other port. Each direction between two ports has a [`Rule`]. Frames of one direction
//! stay in order as long as the direction's delay does not shrink.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::{Duration, Instant},
};

/// Frames in flight; beyond, frames are lost, as in a router whose buffer is full.
const CAPACITY: usize = 20_000;

/// What happens to frames of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rule {
    /// Nothing passes.
    pub cut: bool,
    /// No UDP passes.
    pub no_udp: bool,
    /// One-way delay.
    pub delay: Duration,
    /// Share of frames that is lost, 0 to 1.
    pub loss: f64,
}

impl Rule {
    /// Nothing passes.
    pub const CUT: Self = Self { cut: true, no_udp: false, delay: Duration::ZERO, loss: 0.0 };
    /// Everything passes at once.
    pub const CLEAN: Self = Self { cut: false, no_udp: false, delay: Duration::ZERO, loss: 0.0 };
}

/// Frames since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Passed on.
    pub passed: u64,
    /// Lost by a rule or for want of room.
    pub lost: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct InFlight {
    due: Instant,
    sequence: u64,
    to: usize,
    frame: Vec<u8>,
}

/// See the module.
pub struct Switch {
    ports: usize,
    rules: BTreeMap<(usize, usize), Rule>,
    seen: BTreeMap<[u8; 6], usize>,
    flight: BinaryHeap<Reverse<InFlight>>,
    sequence: u64,
    random: u64,
    counts: Counts,
}

impl Switch {
    /// A switch whose directions are all clean.
    #[must_use]
    pub fn new(ports: usize) -> Self {
        Self {
            ports,
            rules: BTreeMap::new(),
            seen: BTreeMap::new(),
            flight: BinaryHeap::new(),
            sequence: 0,
            // Fixed, so that a run can be repeated.
            random: 0x9e37_79b9_7f4a_7c15,
            counts: Counts::default(),
        }
    }

    pub(super) fn ports(&self) -> usize {
        self.ports
    }

    /// Sets the rule of a direction.
    pub fn set(&mut self, from: usize, to: usize, rule: Rule) {
        self.rules.insert((from, to), rule);
    }

    /// Frames so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Takes a frame in.
    pub fn offer(&mut self, now: Instant, from: usize, frame: &[u8]) {
        let (Some(to), Some(source)) = (address(frame, 0), address(frame, 6)) else { return };
        self.seen.insert(source, from);
        let known = if to[0] & 1 == 0 { self.seen.get(&to).copied() } else { None };
        for port in (0..self.ports).filter(|p| *p != from && known.is_none_or(|k| k == *p)) {
            let rule = self.rules.get(&(from, port)).copied().unwrap_or_default();
            let lost = rule.cut || (rule.no_udp && is_udp(frame)) || self.chance() < rule.loss;
            if lost || self.flight.len() >= CAPACITY {
                self.counts.lost += 1;
                continue;
            }
            self.sequence += 1;
            self.flight.push(Reverse(InFlight {
                due: now + rule.delay,
                sequence: self.sequence,
                to: port,
                frame: frame.to_vec(),
            }));
        }
    }

    /// When the next frame arrives.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.flight.peek().map(|f| f.0.due)
    }

    /// A frame that has arrived: the port to send it on, and the frame.
    pub fn take_due(&mut self, now: Instant) -> Option<(usize, Vec<u8>)> {
        if self.next_due()? > now {
            return None;
        }
        self.counts.passed += 1;
        self.flight.pop().map(|f| (f.0.to, f.0.frame))
    }

    /// Evenly between 0 and 1 (xorshift).
    fn chance(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn address(frame: &[u8], at: usize) -> Option<[u8; 6]> {
    frame.get(at..at + 6)?.try_into().ok()
}

/// IPv4 with protocol 17.
fn is_udp(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&17)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: u8 = 2;
    const B: u8 = 4;
    const ALL: [u8; 6] = [255; 6];

    fn frame(to: [u8; 6], from: u8, protocol: u8) -> Vec<u8> {
        let mut f = to.to_vec();
        f.extend([from; 6]);
        f.extend([8, 0]);
        f.resize(23, 0);
        f.push(protocol);
        f
    }

    fn arrived(s: &mut Switch, now: Instant) -> Vec<usize> {
        std::iter::from_fn(|| s.take_due(now).map(|f| f.0)).collect()
    }

    #[test]
    fn broadcasts_go_everywhere_and_answers_to_who_asked() {
        let (mut s, now) = (Switch::new(3), Instant::now());
        s.offer(now, 0, &frame(ALL, A, 6));
        assert_eq!(arrived(&mut s, now), [1, 2]);
        s.offer(now, 1, &frame([A; 6], B, 6));
        assert_eq!(arrived(&mut s, now), [0]);
        s.offer(now, 0, &[1, 2, 3]);
        assert_eq!(arrived(&mut s, now), [0usize; 0], "a frame without addresses is none");
    }

    #[test]
    fn one_direction_can_be_cut() {
        let (mut s, now) = (Switch::new(2), Instant::now());
        s.set(0, 1, Rule::CUT);
        s.offer(now, 0, &frame(ALL, A, 6));
        s.offer(now, 1, &frame(ALL, B, 6));
        assert_eq!(arrived(&mut s, now), [0]);
        assert_eq!(s.counts(), Counts { passed: 1, lost: 1 });
        s.set(0, 1, Rule::CLEAN);
        s.offer(now, 0, &frame(ALL, A, 6));
        assert_eq!(arrived(&mut s, now), [1]);
    }

    #[test]
    fn delay_holds_frames_in_order() {
        let (mut s, now) = (Switch::new(2), Instant::now());
        let delay = Duration::from_millis(40);
        s.set(0, 1, Rule { delay, ..Rule::CLEAN });
        for n in 0..5 {
            s.offer(now, 0, &frame(ALL, A, n));
        }
        assert_eq!(s.next_due(), Some(now + delay));
        assert!(s.take_due(now + delay - Duration::from_micros(1)).is_none());
        let order: Vec<u8> = std::iter::from_fn(|| s.take_due(now + delay)).map(|(_, f)| f[23]).collect();
        assert_eq!(order, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn loss_is_about_what_was_asked() {
        let (mut s, now) = (Switch::new(2), Instant::now());
        s.set(0, 1, Rule { loss: 0.1, ..Rule::CLEAN });
        for _ in 0..10_000 {
            s.offer(now, 0, &frame(ALL, A, 6));
        }
        // 10 000 draws at 10 % have a standard deviation of 30; five of them is 150.
        assert!((850..=1150).contains(&s.counts().lost), "{:?}", s.counts());
    }

    #[test]
    fn udp_alone_can_be_dropped() {
        let (mut s, now) = (Switch::new(2), Instant::now());
        s.set(0, 1, Rule { no_udp: true, ..Rule::CLEAN });
        s.offer(now, 0, &frame(ALL, A, 17));
        assert_eq!(arrived(&mut s, now), [0usize; 0]);
        s.offer(now, 0, &frame(ALL, A, 6));
        assert_eq!(arrived(&mut s, now), [1]);
    }

    #[test]
    fn a_full_link_loses_frames() {
        let (mut s, now) = (Switch::new(2), Instant::now());
        s.set(0, 1, Rule { delay: Duration::from_secs(1), ..Rule::CLEAN });
        for _ in 0..=CAPACITY {
            s.offer(now, 0, &frame(ALL, A, 6));
        }
        assert_eq!(s.counts().lost, 1);
    }
}
