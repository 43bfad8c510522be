//! Earliest deadline first, for least request among hosts of different weight (Envoy's `LEAST_REQUEST`).
//!
//! Each host has a deadline. The host with the earliest is picked, and its deadline moves on by one over its weight,
//! which is what was configured divided by a power of what it has in flight. Envoy keeps the deadlines of a worker in a
//! heap; here all workers share them as atomics and look through them, which needs no lock and, with the number of hosts
//! that a service has, no more time. Two workers that look at once may pick the same host: it pays for both.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::{host::Host, lb::Rng};

/// What the heaviest host pays for a pick while it is idle: fine enough for proportions, and so little that 2^64 lasts
/// for years of a hundred thousand picks a second with a hundred requests in flight.
const TURN: f64 = 16_384.0;
/// Most that a pick costs, however light and busy its host is.
const MOST: f64 = (1u64 << 44) as f64;
/// Of more hosts, so many random ones are looked at.
const LOOK: usize = 512;

#[derive(Debug)]
pub(super) struct Schedule {
    deadlines: Vec<AtomicU64>,
    /// One over the weight, of which the heaviest host's is [`TURN`].
    costs: Vec<f64>,
    bias: f64,
}

impl Schedule {
    /// Of weights, and the exponent of what is in flight in 1/1000.
    pub(super) fn new(weights: &[u64], bias: u32, seed: u64) -> Self {
        let heaviest = weights.iter().copied().max().unwrap_or(1).max(1) as f64;
        let costs: Vec<f64> = weights.iter().map(|w| TURN * heaviest / (*w).max(1) as f64).collect();
        // A random beginning: tables that are rebuilt often would else favour whoever comes first in them.
        let rng = Rng::new(seed);
        let begin = |c: &f64| AtomicU64::new((c * (rng.next() >> 11) as f64 / (1u64 << 53) as f64) as u64);
        Self { deadlines: costs.iter().map(begin).collect(), costs, bias: f64::from(bias) / 1000.0 }
    }

    /// Position of the host whose turn it is.
    pub(super) fn pick(&self, rng: &Rng, hosts: &[Arc<Host>]) -> usize {
        let n = self.deadlines.len();
        let at = |i: usize| self.deadlines[i].load(Relaxed);
        let best = if n <= LOOK {
            (0..n).min_by_key(|i| at(*i))
        } else {
            (0..LOOK).map(|_| (rng.next() % n as u64) as usize).min_by_key(|i| at(*i))
        };
        let Some(best) = best else { return 0 };
        let active = hosts.get(best).map_or(0, |h| h.stats.active.load(Relaxed));
        let load = f64::from(active) + 1.0;
        // The usual exponents need no power function.
        let factor = if self.bias == 1.0 {
            load
        } else if self.bias == 0.0 {
            1.0
        } else {
            load.powf(self.bias)
        };
        let cost = (self.costs[best] * factor).clamp(1.0, MOST);
        self.deadlines[best].fetch_add(cost as u64, Relaxed);
        best
    }
}
