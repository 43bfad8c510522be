use std::collections::HashMap;

use super::*;

const PICKS: usize = 100_000;

fn endpoint(n: u32, weight: u32, health: model::EndpointHealth) -> model::LbEndpoint {
    model::LbEndpoint {
        address: format!("10.0.0.{n}"),
        port: 80,
        weight,
        health,
        transport_labels: Default::default(),
        workload: String::new(),
    }
}

fn host(n: u32, weight: u32, priority: u32, locality: usize, healthy: bool) -> Arc<Host> {
    let health = if healthy { model::EndpointHealth::Healthy } else { model::EndpointHealth::Unhealthy };
    Arc::new(Host::new(&endpoint(n, weight, health), locality, priority, 0, None))
}

fn config(policy: model::LbPolicy) -> LbConfig {
    LbConfig { policy, panic_threshold: 50, locality_weighted: false, overprovisioning: 140 }
}

fn shares(t: &LbTables) -> HashMap<String, f64> {
    let rng = Rng::new(7);
    let mut counts = HashMap::new();
    for _ in 0..PICKS {
        if let Some(h) = t.pick(&rng, None) {
            *counts.entry(h.display.to_string()).or_insert(0.0) += 100.0 / PICKS as f64;
        }
    }
    counts
}

fn near(got: &HashMap<String, f64>, host: u32, want: f64) {
    let g = got.get(&format!("10.0.0.{host}:80")).copied().unwrap_or(0.0);
    assert!((g - want).abs() < 1.0, "host {host}: {g} % instead of {want} %; {got:?}");
}

#[test]
fn weights_hold_for_every_policy() {
    use model::LbPolicy as P;
    let hosts = || vec![host(1, 1, 0, 0, true), host(2, 3, 0, 0, true), host(3, 6, 0, 0, true)];
    for p in [P::RoundRobin, P::Random] {
        let got = shares(&LbTables::new(hosts(), &[1], config(p), 0));
        near(&got, 1, 10.0);
        near(&got, 2, 30.0);
        near(&got, 3, 60.0);
    }
    // A ring is only as even as its points; maglev is even by construction.
    let got = shares(&LbTables::new(hosts(), &[1], config(P::Maglev(65537)), 0));
    near(&got, 1, 10.0);
    near(&got, 3, 60.0);
    let got = shares(&LbTables::new(hosts(), &[1], config(P::RingHash(10_000)), 0));
    assert!((got["10.0.0.3:80"] - 60.0).abs() < 5.0, "{got:?}");
}

#[test]
fn round_robin_takes_turns() {
    let t = LbTables::new(
        (1..=3).map(|n| host(n, 1, 0, 0, true)).collect(),
        &[1],
        config(model::LbPolicy::RoundRobin),
        5,
    );
    let rng = Rng::new(1);
    let mut seen: Vec<_> = (0..6).map(|_| t.pick(&rng, None).unwrap().display.to_string()).collect();
    assert_eq!(seen[..3], seen[3..]);
    seen.truncate(3);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3);
}

#[test]
fn least_request_avoids_load() {
    let t = LbTables::new(
        (1..=2).map(|n| host(n, 1, 0, 0, true)).collect(),
        &[1],
        config(model::LbPolicy::LeastRequest),
        0,
    );
    t.hosts[0].stats.active.store(10, Relaxed);
    let got = shares(&t);
    near(&got, 1, 25.0);
    near(&got, 2, 75.0);
}

#[test]
fn hashing_is_stable_and_moves_little() {
    use model::LbPolicy as P;
    let rng = Rng::new(1);
    // A ring of fixed size gives the hosts that stay more points, which moves some keys of others.
    for (p, limit) in [(P::RingHash(1024), 1000), (P::Maglev(65537), 300)] {
        let all: Vec<_> = (1..=10).map(|n| host(n, 1, 0, 0, true)).collect();
        let a = LbTables::new(all.clone(), &[1], config(p), 0);
        let b = LbTables::new(all[..9].to_vec(), &[1], config(p), 9);
        let mut moved = 0;
        for i in 0..10_000u64 {
            let h = stable_hash(&i.to_le_bytes());
            let (x, y) = (a.pick(&rng, Some(h)).unwrap(), b.pick(&rng, Some(h)).unwrap());
            if x.display != all[9].display && x.display != y.display {
                moved += 1;
            }
        }
        assert!(moved < limit, "{moved} of 10000 keys moved between hosts that stayed");
    }
}

#[test]
fn priorities_spill_with_overprovisioning() {
    let p = |healthy: usize| {
        let mut hosts: Vec<_> = (1..=10).map(|n| host(n, 1, 0, 0, (n as usize) <= healthy)).collect();
        hosts.extend((11..=20).map(|n| host(n, 1, 1, 0, true)));
        let got = shares(&LbTables::new(hosts, &[1], config(model::LbPolicy::Random), 0));
        (11..=20).map(|n| got.get(&format!("10.0.0.{n}:80")).copied().unwrap_or(0.0)).sum::<f64>()
    };
    // 72 % healthy times 1.4 is above 100 %: nothing spills. 50 % times 1.4 leaves 30 %.
    assert!(p(10) < 0.1);
    assert!(p(8) < 0.1);
    assert!((p(5) - 30.0).abs() < 1.0);
    assert!((p(0) - 100.0).abs() < 0.1);
}

#[test]
fn panic_ignores_health_only_below_the_threshold() {
    let hosts = |ok: u32| (1..=10).map(|n| host(n, 1, 0, 0, n <= ok)).collect::<Vec<_>>();
    let got = shares(&LbTables::new(hosts(4), &[1], config(model::LbPolicy::Random), 0));
    near(&got, 10, 10.0);
    let got = shares(&LbTables::new(hosts(6), &[1], config(model::LbPolicy::Random), 0));
    near(&got, 10, 0.0);
    let off = LbConfig { panic_threshold: 0, ..config(model::LbPolicy::Random) };
    assert!(LbTables::new(hosts(0), &[1], off, 0).pick(&Rng::new(1), None).is_none());
    let one = shares(&LbTables::new(hosts(1), &[1], off, 0));
    near(&one, 1, 100.0);
}

#[test]
fn localities_share_by_weight_and_health() {
    let mut hosts = vec![host(1, 1, 0, 0, true), host(2, 1, 0, 1, true)];
    let c = LbConfig { locality_weighted: true, ..config(model::LbPolicy::RoundRobin) };
    let got = shares(&LbTables::new(hosts.clone(), &[80, 20], c, 0));
    near(&got, 1, 80.0);
    // Half of the first locality is sick: 80 * 70 % against 20.
    hosts.push(host(3, 1, 0, 0, false));
    let got = shares(&LbTables::new(hosts, &[80, 20], c, 0));
    near(&got, 1, 100.0 * 56.0 / 76.0);
}

#[test]
fn retries_avoid_hosts_already_tried() {
    let t = LbTables::new(
        (1..=3).map(|n| host(n, 1, 0, 0, true)).collect(),
        &[1],
        config(model::LbPolicy::RoundRobin),
        0,
    );
    let rng = Rng::new(1);
    for _ in 0..100 {
        let first = t.pick(&rng, None).unwrap().stats.id;
        assert_ne!(t.pick_avoiding(&rng, None, &[first], 5).unwrap().stats.id, first);
    }
}
