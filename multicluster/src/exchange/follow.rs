//! When a peer is dialled, and when its stream is given up.
//!
//! Rules:
//! 1. Pauses double, with jitter, up to two seconds: a cluster that comes back is to be used again within seconds.
//!    After a minute without success they grow to ten.
//! 2. A peer that dials this cluster is there: it is dialled at once.
//! 3. A stream without a frame for three seconds, that is without three leases, is dead.
//! 4. Only a stream that has held for that long makes pauses short again: a peer whose streams break at once is not
//!    dialled five times a second.
//! 5. All peers together share a budget of dials, so that the return of a network does not cost a control plane a
//!    handshake with everybody at once, again and again.

/// Without a frame for this long, milliseconds, a stream is dead.
pub const SILENCE_MS: u64 = 3000;
const MIN_PAUSE_MS: u64 = 200;
const MAX_PAUSE_MS: u64 = 2000;
const LONG_PAUSE_MS: u64 = 10_000;
/// After this long without a stream pauses may be long.
const LONG_GONE_MS: u64 = 60_000;

/// Dials that all followers may make: a start with several hundred peers at once, then a steady rate.
#[derive(Debug, Clone)]
pub struct DialBudget {
    /// Thousandths of a dial.
    tokens: u64,
    at: u64,
}

const BURST: u64 = 512;
const PER_SECOND: u64 = 64;

impl DialBudget {
    /// A full budget.
    #[must_use]
    pub fn new(now: u64) -> Self {
        Self { tokens: BURST * 1000, at: now }
    }

    /// Takes a dial, or says how many milliseconds to wait for one.
    fn take(&mut self, now: u64) -> Result<(), u64> {
        let earned = now.saturating_sub(self.at).saturating_mul(PER_SECOND);
        self.tokens = self.tokens.saturating_add(earned).min(BURST * 1000);
        self.at = now;
        match self.tokens.checked_sub(1000) {
            Some(rest) => {
                self.tokens = rest;
                Ok(())
            }
            None => Err((1000 - self.tokens).div_ceil(PER_SECOND)),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting { until: u64 },
    Dialling,
    Streaming { since: u64, heard: u64 },
}

/// What to do for a peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Dial it, and say [`Follower::connected`] or [`Follower::lost`].
    Dial,
    /// Nothing before this time.
    Wait(u64),
    /// The stream is dead: close it and say [`Follower::lost`].
    Close,
}

/// The importing side of the stream to one peer. Times are milliseconds of any steady clock.
#[derive(Debug, Clone)]
pub struct Follower {
    phase: Phase,
    pause: u64,
    gone_since: u64,
}

impl Follower {
    /// Dials as soon as it is asked.
    #[must_use]
    pub fn new(now: u64) -> Self {
        Self { phase: Phase::Waiting { until: now }, pause: MIN_PAUSE_MS, gone_since: now }
    }

    /// What is due.
    pub fn next(&mut self, now: u64, budget: &mut DialBudget) -> Next {
        match self.phase {
            Phase::Waiting { until } if now < until => Next::Wait(until),
            Phase::Waiting { .. } => match budget.take(now) {
                Ok(()) => {
                    self.phase = Phase::Dialling;
                    Next::Dial
                }
                Err(wait) => Next::Wait(now + wait),
            },
            // Dialling has a timeout of its own.
            Phase::Dialling => Next::Wait(u64::MAX),
            Phase::Streaming { heard, .. } if now >= heard + SILENCE_MS => Next::Close,
            Phase::Streaming { heard, .. } => Next::Wait(heard + SILENCE_MS),
        }
    }

    /// The peer has opened the stream.
    pub fn connected(&mut self, now: u64) {
        self.phase = Phase::Streaming { since: now, heard: now };
    }

    /// A frame came.
    pub fn heard(&mut self, now: u64) {
        if let Phase::Streaming { since, heard } = &mut self.phase {
            *heard = now;
            if now >= *since + SILENCE_MS {
                self.pause = MIN_PAUSE_MS;
            }
        }
    }

    /// The dial failed or the stream ended. `jitter` is uniform in 0 to 1.
    pub fn lost(&mut self, now: u64, jitter: f64) {
        if let Phase::Streaming { heard, .. } = self.phase {
            self.gone_since = heard;
        }
        let max = if now >= self.gone_since + LONG_GONE_MS { LONG_PAUSE_MS } else { MAX_PAUSE_MS };
        // Pauses are small numbers.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let pause = (self.pause as f64 * (0.5 + jitter.clamp(0.0, 1.0) / 2.0)) as u64;
        self.phase = Phase::Waiting { until: now + pause };
        self.pause = (self.pause * 2).min(max);
    }

    /// The peer has just shown that it is there; answers whether that brings the next dial forward.
    pub fn nudge(&mut self, now: u64) -> bool {
        match &mut self.phase {
            Phase::Waiting { until } if *until > now => {
                *until = now;
                true
            }
            _ => false,
        }
    }

    /// Whether a stream is open.
    #[must_use]
    pub fn streaming(&self) -> bool {
        matches!(self.phase, Phase::Streaming { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_a_held_stream_makes_them_short() {
        let (mut f, mut b) = (Follower::new(0), DialBudget::new(0));
        let mut now = 0;
        let mut pauses = Vec::new();
        while now < 200_000 {
            match f.next(now, &mut b) {
                Next::Dial => f.lost(now, 1.0),
                Next::Wait(t) => {
                    pauses.push(t - now);
                    now = t;
                }
                Next::Close => unreachable!(),
            }
        }
        assert_eq!(pauses[..5], [200, 400, 800, 1600, 2000]);
        assert_eq!(*pauses.last().unwrap(), 10_000);
        assert!(f.nudge(now - 1) || f.next(now, &mut b) == Next::Dial);
        f.connected(now);
        f.heard(now + 100);
        f.lost(now + 200, 1.0);
        assert_eq!(
            f.next(now + 200, &mut b),
            Next::Wait(now + 200 + 10_000),
            "a short stream proves nothing"
        );
        let _ = f.next(now + 20_000, &mut b);
        f.connected(now + 20_000);
        f.heard(now + 20_000 + SILENCE_MS);
        assert_eq!(f.next(now + 20_000 + 2 * SILENCE_MS, &mut b), Next::Close);
        f.lost(now + 20_000 + 2 * SILENCE_MS, 0.0);
        assert_eq!(f.next(now + 26_000, &mut b), Next::Wait(now + 26_100), "half of 200 ms");
    }

    #[test]
    fn dials_are_limited_over_all_peers() {
        let mut b = DialBudget::new(0);
        let mut all: Vec<_> = (0..2000).map(|_| Follower::new(0)).collect();
        let dials = |now: u64, all: &mut [Follower], b: &mut DialBudget| {
            all.iter_mut().map(|f| f.next(now, b)).filter(|n| *n == Next::Dial).count()
        };
        assert_eq!(dials(0, &mut all, &mut b), 512);
        assert_eq!(dials(1000, &mut all, &mut b), 64);
        assert_eq!(dials(1000, &mut all, &mut b), 0);
    }
}
