use mesh_model::proxy::{HealthCheckKind, HealthIntervals, TcpHealthCheck};

use super::*;
use crate::upstream::host::Host;

const WORKS: Found = Found::Works { degraded: false, excluded: false };
const FAILS: Found = Found::Fails { retriable: false };

fn check() -> HealthCheck {
    let s = Duration::from_secs;
    HealthCheck {
        kind: HealthCheckKind::Tcp(TcpHealthCheck { send: vec![], receive: vec![] }),
        timeout: s(1),
        intervals: HealthIntervals {
            healthy: s(1),
            unhealthy: s(2),
            failing: s(3),
            recovering: s(4),
            no_traffic: s(5),
            no_traffic_healthy: s(6),
        },
        initial_jitter: s(0),
        interval_jitter: s(0),
        interval_jitter_percent: 0,
        unhealthy_threshold: 3,
        healthy_threshold: 2,
        reuse_connection: true,
        alt_port: 0,
        ignore_new_hosts: false,
    }
}

fn host() -> Host {
    let h = Host::original("10.0.0.1:80".parse().unwrap());
    h.stats.mark(Check::Failed, true);
    h.stats.mark(Check::Unknown, true);
    h
}

/// The seconds until the next check after each finding, with the host's health.
fn story(h: &Host, all: &[Found]) -> Vec<(u64, bool)> {
    let mut j = Judge::new(&h.stats);
    all.iter()
        .map(|f| {
            let s = j.note(&h.stats, *f, &check());
            assert_eq!(s.healthy, !h.stats.has(Check::Failed));
            (interval(&check(), s, true).as_secs(), s.healthy)
        })
        .collect()
}

#[test]
fn thresholds_and_intervals() {
    let none = Found::Unreachable;
    // One success makes a new host healthy, two an old one; three failures to reach it make it unhealthy.
    assert_eq!(
        story(&host(), &[WORKS, none, none, WORKS, none, none, none, none, WORKS, none, WORKS, WORKS]),
        [
            (1, true),
            (3, true),
            (3, true),
            (1, true),
            (3, true),
            (3, true),
            (2, false),
            (2, false),
            (4, false),
            (2, false),
            (4, false),
            (1, true)
        ]
    );
    // A first failure ends being new.
    assert_eq!(story(&host(), &[none, WORKS, WORKS]), [(2, false), (4, false), (1, true)]);
    // An answer that says so is enough, unless it may be tried again.
    assert_eq!(story(&host(), &[WORKS, FAILS]), [(1, true), (2, false)]);
    let again = Found::Fails { retriable: true };
    assert_eq!(story(&host(), &[WORKS, again, again, again])[1..], [(3, true), (3, true), (2, false)]);
}

#[test]
fn clusters_without_traffic_are_asked_seldom() {
    let s = |healthy| Standing { healthy, edge: true, changed: false };
    assert_eq!(interval(&check(), s(true), false).as_secs(), 6);
    assert_eq!(interval(&check(), s(false), false).as_secs(), 5);
}

#[test]
fn what_traffic_found_holds_until_checks_succeed_again() {
    let h = host();
    let mut j = Judge::new(&h.stats);
    assert!(j.note(&h.stats, WORKS, &check()).healthy);
    h.stats.mark(Check::Failed, true);
    h.stats.mark(Check::Excluded, true);
    assert!(!j.note(&h.stats, WORKS, &check()).healthy);
    assert!(!h.stats.has(Check::Excluded), "it no longer says so");
    assert!(j.note(&h.stats, WORKS, &check()).healthy);
    let s = j.note(&h.stats, Found::Works { degraded: true, excluded: false }, &check());
    assert!(s.healthy && s.changed && h.stats.has(Check::Degraded));
}

#[test]
fn jitter_only_adds() {
    let c = HealthCheck { interval_jitter: Duration::from_secs(1), interval_jitter_percent: 50, ..check() };
    let all: Vec<_> = (0..200).map(|_| jittered(&c, Duration::from_secs(10)).as_secs_f64()).collect();
    assert!(all.iter().all(|d| (10.0..16.0).contains(d)));
    assert!(all.iter().any(|d| *d > 14.0) && all.iter().any(|d| *d < 12.0));
}

#[test]
fn pieces_in_order() {
    let p = |all: &[&str]| all.iter().map(|s| s.as_bytes().to_vec()).collect::<Vec<_>>();
    assert!(probe::holds(b"+PONG\r\n", &p(&["PONG"])));
    assert!(probe::holds(b"a-b-c", &p(&["a", "c"])));
    assert!(!probe::holds(b"a-b-c", &p(&["c", "a"])));
    assert!(!probe::holds(b"ab", &p(&["ab", "b"])));
    assert!(!probe::holds(b"", &p(&["a"])));
}
