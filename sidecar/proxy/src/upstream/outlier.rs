//! Outlier detection: what requests show about hosts, and when a host is taken out for it.
//!
//! Consecutive failures eject at once, where they are seen. Rates are judged once an interval over the answers of
//! that interval: a success rate against the mean and deviation of the hosts that had enough requests, a failure
//! percentage against a limit (Envoy's `outlier_detection`). Where failures to reach a host are told from bad answers,
//! both are judged in the same way, each by its own counters. Counters of rates are touched only where one is configured.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use mesh_model::proxy::{FailurePercentage, OutlierDetection, SuccessRate};

use super::{
    cluster::{Outcome, millis},
    host::{Host, HostStats, now_ms},
};

/// Counts a failure or forgets those before; true when `limit` in a row were reached.
fn count(counter: &AtomicU32, bad: bool, limit: u32) -> bool {
    if bad {
        return counter.fetch_add(1, Relaxed) + 1 >= limit && limit > 0;
    }
    // Written only when it changes, so that healthy hosts do not bounce a cache line between workers.
    if counter.load(Relaxed) != 0 {
        counter.store(0, Relaxed);
    }
    false
}

/// Counts an outcome; with which percentage the host is to be ejected, if it is.
pub(super) fn note(s: &HostStats, outcome: Outcome, o: &OutlierDetection) -> Option<u32> {
    let local = matches!(outcome, Outcome::Failed | Outcome::Timeout);
    if let Some(l) = &o.local_origin {
        if l.success_rate.is_some() || l.failure_percentage.is_some() {
            s.tries.fetch_add(1, Relaxed);
            if !local {
                s.reached.fetch_add(1, Relaxed);
            }
        }
        if count(&s.consecutive_local, local, l.consecutive) {
            return Some(l.enforcing);
        }
        // Neither failures of the network nor its successes say anything about answers.
        if local || outcome == Outcome::Connected {
            return None;
        }
    }
    let (bad, gateway) = match outcome {
        Outcome::Status(c) if !o.error_codes.is_empty() => {
            let bad = o.error_codes.contains(&c);
            (bad, bad && matches!(c, 502..=504))
        }
        Outcome::Status(c) => ((500..600).contains(&c), matches!(c, 502..=504)),
        Outcome::Failed | Outcome::Timeout => (true, true),
        Outcome::Connected => (false, false),
        // Told to the whole cluster, not to one host.
        Outcome::Refused(_) => return None,
    };
    if o.success_rate.is_some() || o.failure_percentage.is_some() {
        s.answers.fetch_add(1, Relaxed);
        if !bad {
            s.successes.fetch_add(1, Relaxed);
        }
    }
    let all = count(&s.consecutive_5xx, bad, o.consecutive_5xx).then_some(o.enforcing_5xx);
    let gateway =
        count(&s.consecutive_gateway, gateway, o.consecutive_gateway).then_some(o.enforcing_gateway);
    all.max(gateway)
}

/// Whether an ejection that is enforced in this percentage of cases takes place now.
pub(super) fn enforced(percent: u32) -> bool {
    percent >= 100 || (percent > 0 && rand::random_range(0..100) < percent)
}

/// Ejects a host unless too many are; whether it did.
pub(super) fn eject(hosts: &[Arc<Host>], s: &HostStats, o: &OutlierDetection) -> bool {
    let ejected = hosts.iter().filter(|h| h.stats.is_ejected()).count();
    // One host may always be ejected, further ones up to the share.
    if s.is_ejected() || (ejected > 0 && (ejected + 1) * 100 > o.max_percent as usize * hosts.len()) {
        return false;
    }
    let n = s.ejections.fetch_add(1, Relaxed) + 1;
    let time = o.base_ejection.saturating_mul(n).min(o.max_ejection.max(o.base_ejection));
    s.ejected_until.store(now_ms().saturating_add(millis(time)), Relaxed);
    s.ejected.store(true, Relaxed);
    s.tell_failure();
    for counter in [&s.consecutive_5xx, &s.consecutive_gateway, &s.consecutive_local] {
        counter.store(0, Relaxed);
    }
    true
}

/// Hosts whose time is over return. Whether any did.
pub(super) fn readmit(hosts: &[Arc<Host>], now: u64) -> bool {
    let mut any = false;
    for s in hosts.iter().map(|h| &h.stats) {
        if s.is_ejected() && now >= s.ejected_until.load(Relaxed) {
            s.ejected.store(false, Relaxed);
            any = true;
        }
    }
    any
}

/// The end of an interval: hosts return, rates are judged. Whether any host came or went.
pub(super) fn sweep(hosts: &[Arc<Host>], o: &OutlierDetection, now: u64) -> bool {
    let mut changed = false;
    for h in hosts {
        let s = &h.stats;
        if s.is_ejected() {
            if now >= s.ejected_until.load(Relaxed) {
                s.ejected.store(false, Relaxed);
                s.healthy_since.store(now, Relaxed);
                changed = true;
            }
        } else if s.ejections.load(Relaxed) > 0 {
            // A whole interval without ejection makes the next one shorter again.
            s.ejections.fetch_sub(1, Relaxed);
        }
    }
    changed |= judge(hosts, o, o.success_rate, o.failure_percentage, |s| (&s.answers, &s.successes));
    if let Some(l) = &o.local_origin {
        changed |= judge(hosts, o, l.success_rate, l.failure_percentage, |s| (&s.tries, &s.reached));
    }
    changed
}

/// Judges what was counted in an interval, of which `counters` are all and the good ones.
fn judge(
    hosts: &[Arc<Host>],
    o: &OutlierDetection,
    success: Option<SuccessRate>,
    failure: Option<FailurePercentage>,
    counters: fn(&HostStats) -> (&AtomicU32, &AtomicU32),
) -> bool {
    if success.is_none() && failure.is_none() {
        return false;
    }
    let mut changed = false;
    // What an ejected host still answered counts for nothing when it returns.
    let taken: Vec<(&Arc<Host>, u32, u32)> = hosts
        .iter()
        .map(|h| {
            let (all, good) = counters(&h.stats);
            (h, all.swap(0, Relaxed), good.swap(0, Relaxed))
        })
        .filter(|(h, ..)| !h.stats.is_ejected())
        .collect();
    let judged = |volume: u32| -> Vec<(&Arc<Host>, f64)> {
        let enough = taken.iter().filter(|(_, all, _)| *all >= volume.max(1));
        enough.map(|(h, all, good)| (*h, f64::from(*good.min(all)) * 100.0 / f64::from(*all))).collect()
    };
    if let Some(r) = &success {
        let rates = judged(r.request_volume);
        if !rates.is_empty() && rates.len() >= r.minimum_hosts as usize {
            let limit = success_threshold(rates.iter().map(|r| r.1), r.stdev_factor);
            for (h, _) in rates.iter().filter(|(_, rate)| *rate < limit) {
                changed |= enforced(r.enforcing) && eject(hosts, &h.stats, o);
            }
        }
    }
    if let Some(f) = &failure {
        let rates = judged(f.request_volume);
        if rates.len() >= f.minimum_hosts as usize {
            for (h, _) in rates.iter().filter(|(_, rate)| 100.0 - rate >= f64::from(f.threshold)) {
                changed |= enforced(f.enforcing) && eject(hosts, &h.stats, o);
            }
        }
    }
    changed
}

/// The mean less `factor` / 1000 standard deviations.
fn success_threshold(rates: impl ExactSizeIterator<Item = f64> + Clone, factor: u32) -> f64 {
    let n = rates.len().max(1) as f64;
    let mean = rates.clone().sum::<f64>() / n;
    let variance = rates.map(|r| (r - mean).powi(2)).sum::<f64>() / n;
    mean - f64::from(factor) / 1000.0 * variance.sqrt()
}

#[cfg(test)]
#[path = "outlier/tests.rs"]
mod tests;
