//! Active health checks: hosts are asked whether they work, on the engine's control thread, once for all workers.
//!
//! The rules are Envoy's. A new host is unhealthy until its first check, and one success is enough for it. Later it takes
//! `healthy_threshold` successes to return; an answer that says that the host does not work takes it out at once, while
//! connections that fail and answers that do not come count towards `unhealthy_threshold`. What is found goes into
//! atomics of the host, which balancing tables are rebuilt from; a request pays nothing for it.

pub(crate) mod metrics;
mod probe;
mod run;

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use mesh_model::proxy::HealthCheck;

pub(crate) use self::run::Checkers;
use super::host::{Check, HostStats};

/// Header of an answer by which a host takes itself out, until a check succeeds without it.
pub(crate) const IMMEDIATE_FAIL: &[u8] = b"x-envoy-immediate-health-check-fail";

/// Counts of a cluster's checks (Envoy's `cluster.<name>.health_check.*`).
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) attempt: AtomicU64,
    pub(crate) success: AtomicU64,
    pub(crate) failure: AtomicU64,
    /// Of the failures: hosts that took themselves out by an answer to traffic.
    pub(crate) passive_failure: AtomicU64,
    /// Of the failures: no connection, or no answer in time.
    pub(crate) network_failure: AtomicU64,
    /// Answers of another service than the one that should be there.
    pub(crate) verify_cluster: AtomicU64,
}

/// What one check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Works {
        /// `x-envoy-degraded`.
        degraded: bool,
        /// `x-envoy-immediate-health-check-fail`.
        excluded: bool,
    },
    /// It said that it does not; whether only several such answers make it unhealthy.
    Fails { retriable: bool },
    /// No connection, or no answer.
    Unreachable,
}

/// Where a host stands after a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    healthy: bool,
    /// Its health is about to change.
    edge: bool,
    /// Its health, or what it asks for, changed now.
    changed: bool,
}

/// What the checks of one host remember.
#[derive(Debug)]
struct Judge {
    first: bool,
    good: u32,
    bad: u32,
    /// As this judge left it: traffic may have taken the host out since.
    healthy: bool,
}

impl Judge {
    fn new(host: &HostStats) -> Self {
        Self { first: true, good: 0, bad: 0, healthy: !host.has(Check::Failed) }
    }

    fn note(&mut self, host: &HostStats, found: Found, c: &HealthCheck) -> Standing {
        let mut changed = host.mark(Check::Pending, false);
        host.mark(Check::Unknown, false);
        let mut healthy = !host.has(Check::Failed);
        if self.healthy && !healthy {
            self.good = 0;
        }
        let mut edge = false;
        match found {
            Found::Works { degraded, excluded } => {
                self.bad = 0;
                if !healthy {
                    self.good += 1;
                    healthy = self.first || self.good >= c.healthy_threshold;
                    edge = !healthy;
                    if healthy {
                        self.good = 0;
                        changed |= host.mark(Check::Failed, false);
                    }
                }
                changed |= host.mark(Check::Degraded, degraded);
                changed |= host.mark(Check::Excluded, excluded);
            }
            Found::Fails { .. } | Found::Unreachable => {
                self.good = 0;
                if healthy {
                    self.bad += 1;
                    let at_once = found == Found::Fails { retriable: false };
                    healthy = !(at_once || self.bad >= c.unhealthy_threshold);
                    edge = healthy;
                    if !healthy {
                        self.bad = 0;
                        changed |= host.mark(Check::Failed, true);
                    }
                }
            }
        }
        self.first = false;
        self.healthy = healthy;
        Standing { healthy, edge, changed }
    }
}

/// Time until the next check of a host, without jitter. `used`: its cluster had traffic.
fn interval(c: &HealthCheck, s: Standing, used: bool) -> Duration {
    let i = &c.intervals;
    match (used, s.healthy, s.edge) {
        (false, true, _) => i.no_traffic_healthy,
        (false, false, _) => i.no_traffic,
        (true, true, false) => i.healthy,
        (true, true, true) => i.failing,
        (true, false, false) => i.unhealthy,
        (true, false, true) => i.recovering,
    }
}

/// A random time below `most`.
fn up_to(most: Duration) -> Duration {
    most.mul_f64(rand::random_range(0.0..1.0))
}

/// The same with the jitter that is configured.
fn jittered(c: &HealthCheck, base: Duration) -> Duration {
    base + up_to(base * c.interval_jitter_percent / 100) + up_to(c.interval_jitter)
}

impl Counts {
    fn note(&self, found: Found) {
        let one = |n: &AtomicU64| n.fetch_add(1, Relaxed);
        match found {
            Found::Works { .. } => one(&self.success),
            Found::Fails { .. } => one(&self.failure),
            Found::Unreachable => {
                one(&self.network_failure);
                one(&self.failure)
            }
        };
    }
}

#[cfg(test)]
#[path = "health/tests.rs"]
mod tests;
