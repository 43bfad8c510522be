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
        check: None,
        slots: model::Slots::None,
    }
}

fn host(n: u32, weight: u32, priority: u32, locality: usize, healthy: bool) -> Arc<Host> {
    let health = if healthy { model::EndpointHealth::Healthy } else { model::EndpointHealth::Unhealthy };
    Arc::new(Host::new(&endpoint(n, weight, health), locality, priority, 0, None))
}

fn least() -> model::LbPolicy {
    model::LbPolicy::LeastRequest(model::LeastRequest::default())
}

fn config(policy: model::LbPolicy) -> LbConfig {
    LbConfig {
        policy,
        panic_threshold: 50,
        locality_weighted: false,
        overprovisioning: 140,
        slow_start: None,
        reports: None,
        now: 0,
    }
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
    let t = LbTables::new((1..=2).map(|n| host(n, 1, 0, 0, true)).collect(), &[1], config(least()), 0);
    t.hosts[0].stats.active.store(10, Relaxed);
    let got = shares(&t);
    near(&got, 1, 25.0);
    near(&got, 2, 75.0);
}

/// Keys that moved from the last of `n` hosts when it left, and keys that moved between those that stayed, as
/// shares of all keys.
fn disruption(p: model::LbPolicy, n: u32, size: usize) -> (f64, f64) {
    let rng = Rng::new(1);
    let all: Vec<_> = (1..=n).map(|n| host(n, 1, 0, 0, true)).collect();
    let rest = all[..all.len() - 1].to_vec();
    let a = LbTables::new(all.clone(), &[1], config(p), 0);
    let b = LbTables::new(rest, &[1], config(p), 9);
    let (mut own, mut others) = (0, 0);
    for i in 0..size as u64 {
        let h = stable_hash(&i.to_le_bytes());
        let (x, y) = (a.pick(&rng, Some(h)).unwrap(), b.pick(&rng, Some(h)).unwrap());
        if x.display == all[all.len() - 1].display {
            own += 1;
        } else if x.display != y.display {
            others += 1;
        }
    }
    (f64::from(own) / size as f64, f64::from(others) / size as f64)
}

#[test]
fn a_host_that_leaves_moves_little_but_its_own_keys() {
    for n in [3, 10, 50] {
        let fair = 1.0 / f64::from(n);
        let (own, others) = disruption(model::LbPolicy::RingHash(1024), n, PICKS);
        assert!((own / fair - 1.0).abs() < 0.5, "{n} hosts: {own} of the keys were the host's");
        assert!(others == 0.0, "{n} hosts: {others} of the keys moved between hosts that stayed");
        let (own, others) = disruption(model::LbPolicy::Maglev(65537), n, PICKS);
        assert!((own / fair - 1.0).abs() < 0.05, "{n} hosts: {own} of the keys were the host's");
        assert!(others <= 2.0 * fair, "{n} hosts: {others} of the keys moved between hosts that stayed");
    }
}

#[test]
fn every_policy_is_even_over_equal_hosts() {
    use model::LbPolicy as P;
    // Relative error: turns are exact, 10^5 throws of a 20-sided die are within four sigma of 1.4 %, a ring of about
    // 1600 points for each host within four sigma of 2.5 %.
    for (p, limit) in [
        (P::RoundRobin, 0.0005),
        (P::Random, 0.057),
        (least(), 0.057),
        (P::Maglev(65537), 0.06),
        (P::RingHash(32768), 0.16),
    ] {
        let hosts = (1..=20).map(|n| host(n, 1, 0, 0, true)).collect();
        let got = shares(&LbTables::new(hosts, &[1], config(p), 3));
        assert_eq!(got.len(), 20);
        for (h, share) in &got {
            assert!((share / 5.0 - 1.0).abs() <= limit, "{p:?} {h}: {share} %");
        }
    }
}

#[test]
fn hashing_policies_share_by_weight() {
    use model::LbPolicy as P;
    let weights = [1, 2, 5, 12, 20];
    for (p, limit) in [(P::Maglev(65537), 0.7), (P::RingHash(8192), 3.0)] {
        let hosts = weights.iter().enumerate().map(|(i, w)| host(i as u32 + 1, *w, 0, 0, true)).collect();
        let got = shares(&LbTables::new(hosts, &[1], config(p), 0));
        for (i, w) in weights.iter().enumerate() {
            let (g, want) = (got[&format!("10.0.0.{}:80", i + 1)], f64::from(*w) * 2.5);
            assert!((g - want).abs() < limit, "{p:?} host {}: {g} % instead of {want} %", i + 1);
        }
    }
}

#[test]
fn least_request_weighs_hosts_and_their_load() {
    let hosts = || (1..=3).map(|n| host(n, n, 0, 0, true)).collect::<Vec<_>>();
    let t = LbTables::new(hosts(), &[1], config(least()), 0);
    let got = shares(&t);
    near(&got, 1, 100.0 / 6.0);
    near(&got, 2, 200.0 / 6.0);
    near(&got, 3, 50.0);
    // Five in flight make a sixth of the weight: 1, 2 and 0.5.
    t.hosts[2].stats.active.store(5, Relaxed);
    let got = shares(&t);
    near(&got, 1, 100.0 / 3.5);
    near(&got, 2, 200.0 / 3.5);
    near(&got, 3, 50.0 / 3.5);
    // Another exponent: 3 / (3 + 1)^0.5 is 1.5; none at all ignores what is in flight.
    for (bias, want) in
        [(500, [100.0 / 4.5, 200.0 / 4.5, 150.0 / 4.5]), (0, [100.0 / 6.0, 200.0 / 6.0, 50.0])]
    {
        let policy = model::LbPolicy::LeastRequest(model::LeastRequest { choices: 2, bias });
        let t = LbTables::new(hosts(), &[1], config(policy), 0);
        t.hosts[2].stats.active.store(3, Relaxed);
        let got = shares(&t);
        (0..3).for_each(|i| near(&got, i as u32 + 1, want[i]));
    }
}

#[test]
fn weighted_turns_are_even_from_the_first_on() {
    // Whatever the beginning, no host is more than a turn ahead.
    for seed in 0..20 {
        let hosts = vec![host(1, 1, 0, 0, true), host(2, 3, 0, 0, true)];
        let t = LbTables::new(hosts, &[1], config(least()), seed);
        let rng = Rng::new(seed);
        let first = (0..40).filter(|_| &*t.pick(&rng, None).unwrap().display == "10.0.0.1:80").count();
        assert!((9..=11).contains(&first), "{first} of 40");
    }
}

#[test]
fn more_choices_find_idle_hosts_more_often() {
    let share = |choices| {
        let hosts: Vec<_> = (1..=10).map(|n| host(n, 1, 0, 0, true)).collect();
        hosts[1..].iter().for_each(|h| h.stats.active.store(1, Relaxed));
        let policy = model::LbPolicy::LeastRequest(model::LeastRequest { choices, bias: 1000 });
        shares(&LbTables::new(hosts, &[1], config(policy), 0))["10.0.0.1:80"]
    };
    assert!((share(2) - 19.0).abs() < 1.0, "1 - 0.9^2");
    assert!((share(5) - 41.0).abs() < 1.0, "1 - 0.9^5");
}

/// A host as the control plane and an active check see it.
fn seen(n: u32, priority: u32, health: model::EndpointHealth, checks: &[Check]) -> Arc<Host> {
    let h = Host::new(&endpoint(n, 1, health), 0, priority, 0, None);
    checks.iter().for_each(|c| assert!(h.stats.mark(*c, true)));
    Arc::new(h)
}

#[test]
fn every_source_of_health_counts() {
    use model::EndpointHealth as E;
    let h = seen(1, 0, E::Unhealthy, &[Check::Failed]);
    assert_eq!(h.flags(), "/failed_active_hc/failed_eds_health");
    h.stats.mark(Check::Failed, false);
    assert_eq!(h.health(), Health::Unhealthy);
    let h = seen(1, 0, E::Healthy, &[Check::Degraded]);
    assert_eq!((h.health(), h.flags().as_str()), (Health::Degraded, "/degraded_active_hc"));
    assert_eq!(seen(1, 0, E::Degraded, &[]).health(), Health::Degraded);
    assert_eq!(seen(1, 0, E::Degraded, &[Check::Failed]).health(), Health::Unhealthy);
    assert_eq!(seen(1, 0, E::Healthy, &[]).flags(), "healthy");
}

#[test]
fn degraded_hosts_take_what_healthy_ones_cannot() {
    use model::EndpointHealth as E;
    // One of four is healthy and takes 1.4 quarters; the degraded ones could take 70 percent.
    let hosts = |ok: E| {
        vec![
            seen(1, 0, ok, &[]),
            seen(2, 0, E::Degraded, &[]),
            seen(3, 0, E::Healthy, &[Check::Degraded]),
            seen(4, 0, E::Unhealthy, &[]),
        ]
    };
    let got = shares(&LbTables::new(hosts(E::Healthy), &[1], config(model::LbPolicy::RoundRobin), 0));
    near(&got, 1, 35.0);
    near(&got, 2, 32.5);
    near(&got, 3, 32.5);
    // Without a healthy one they take all.
    let got = shares(&LbTables::new(hosts(E::Unhealthy), &[1], config(model::LbPolicy::RoundRobin), 0));
    near(&got, 2, 50.0);
    near(&got, 3, 50.0);
}

#[test]
fn hosts_that_do_not_count_cause_no_panic() {
    use model::EndpointHealth as E;
    // One healthy host and nine that wait for their first check: with these the share would be a tenth.
    let all = |c: &[Check]| {
        let mut all = vec![seen(1, 0, E::Healthy, &[])];
        all.extend((2..=10).map(|n| seen(n, 0, E::Healthy, c)));
        shares(&LbTables::new(all, &[1], config(model::LbPolicy::RoundRobin), 0))
    };
    for waiting in [Check::Pending, Check::Excluded] {
        near(&all(&[Check::Failed, waiting]), 1, 100.0);
    }
    near(&all(&[Check::Failed]), 1, 10.0);
}

#[test]
fn health_of_three_priorities_cascades() {
    // Half of each of the first two is healthy: 70 % each by 1.4, so the first takes 70, the second the rest.
    let mut hosts = Vec::new();
    for p in 0..3u32 {
        hosts.extend((0..10).map(|n| host(p * 10 + n + 1, 1, p, 0, p == 2 || n < 5)));
    }
    let sums = |hosts: Vec<Arc<Host>>, policy| {
        let got = shares(&LbTables::new(hosts, &[1], config(policy), 0));
        (0..3u32)
            .map(|p| {
                (1..=10)
                    .map(|n| got.get(&format!("10.0.0.{}:80", p * 10 + n)).copied().unwrap_or(0.0))
                    .sum::<f64>()
            })
            .collect::<Vec<_>>()
    };
    use model::LbPolicy as P;
    for policy in [P::RoundRobin, least(), P::Random, P::Maglev(4093), P::RingHash(1024)] {
        let got = sums(hosts.clone(), policy);
        assert!(
            (got[0] - 70.0).abs() < 1.0 && (got[1] - 30.0).abs() < 1.0 && got[2] < 0.01,
            "{policy:?} {got:?}"
        );
    }
    // Three tenths and three tenths healthy: 42, 42 and what is left.
    let hosts: Vec<_> = (0..30u32).map(|n| host(n + 1, 1, n / 10, 0, n >= 20 || n % 10 < 3)).collect();
    let got = sums(hosts, P::Random);
    assert!(
        (got[0] - 42.0).abs() < 1.0 && (got[1] - 42.0).abs() < 1.0 && (got[2] - 16.0).abs() < 1.0,
        "{got:?}"
    );
}

#[test]
fn avoided_hosts_get_only_what_every_attempt_gives_them() {
    let hosts: Vec<_> = (1..=4).map(|n| host(n, 1, 0, 0, true)).collect();
    let t = LbTables::new(hosts, &[1], config(model::LbPolicy::Random), 0);
    let avoid = [t.hosts[0].stats.id];
    let rng = Rng::new(11);
    let hit = |attempts| {
        let n = (0..PICKS)
            .filter(|_| t.pick_avoiding(&rng, None, &avoid, attempts).unwrap().stats.id == avoid[0]);
        n.count() as f64 / PICKS as f64
    };
    assert!((hit(0) - 0.25).abs() < 0.01);
    assert!((hit(1) - 0.0625).abs() < 0.005);
    assert!(hit(5) < 0.001);
}

#[test]
fn what_was_not_tried_is_found_whatever_chance_says() {
    for policy in [model::LbPolicy::Random, model::LbPolicy::RoundRobin, least()] {
        let mut hosts: Vec<_> = (1..=5).map(|n| host(n, 1, 0, 0, true)).collect();
        // Those of a priority that gets no traffic stay out of it.
        hosts.push(host(6, 1, 1, 0, true));
        let t = LbTables::new(hosts, &[1], config(policy), 0);
        let rng = Rng::new(7);
        for _ in 0..1_000 {
            let mut tried = Vec::new();
            while let Some(h) = t.pick_untried(&rng, None, &tried) {
                assert!(!tried.contains(&h.stats.id));
                tried.push(h.stats.id);
            }
            assert_eq!(tried.len(), 5);
        }
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

fn slow(aggression: u32, age: u64, policy: model::LbPolicy) -> f64 {
    let slow = model::SlowStart { window: std::time::Duration::from_secs(100), aggression, min_weight: 1000 };
    let now = 1_000_000;
    let hosts: Vec<_> = (1..=5).map(|n| host(n, 2, 0, 0, true)).collect();
    for h in &hosts {
        h.stats.healthy_since.store(0, Relaxed);
    }
    hosts[4].stats.healthy_since.store(now - age, Relaxed);
    let c = LbConfig { slow_start: Some(slow), now, ..config(policy) };
    let share = shares(&LbTables::new(hosts, &[1], c, 0)).get("10.0.0.5:80").copied().unwrap_or(0.0) / 100.0;
    // The weight against that of each of the four others.
    share * 4.0 / (1.0 - share)
}

#[test]
fn new_hosts_take_their_share_step_by_step() {
    use model::LbPolicy as P;
    for p in [P::RoundRobin, least()] {
        for (aggression, age, want) in [
            (1000, 0, 0.1),
            (1000, 5_000, 0.1),
            (1000, 25_000, 0.25),
            (1000, 50_000, 0.5),
            (1000, 100_000, 1.0),
            (2000, 25_000, 0.5),
            (500, 50_000, 0.25),
        ] {
            let got = slow(aggression, age, p);
            assert!((got - want).abs() < 0.03, "{p:?} {aggression} {age} ms: {got} instead of {want}");
        }
    }
    // Policies that throw or hash know no slow start.
    assert!((slow(1000, 0, P::Random) - 1.0).abs() < 0.05);
}

#[test]
fn peak_ewma_prefers_fast_and_idle_hosts() {
    let ms = |n| Some(std::time::Duration::from_millis(n));
    let hosts: Vec<_> = (1..=3).map(|n| host(n, 1, 0, 0, true)).collect();
    let t = LbTables::new(hosts, &[1], config(model::LbPolicy::PeakEwma), 0);
    let now = now_ms();
    for (h, time) in t.hosts.iter().zip([1, 10, 100]) {
        h.stats.ewma.add(now, ms(time));
    }
    // Of two different hosts the slowest never wins (but where five throws give the same), the fastest always.
    let got = shares(&t);
    assert!((got["10.0.0.1:80"] - 66.7).abs() < 2.0, "{got:?}");
    assert!(got.get("10.0.0.3:80").copied().unwrap_or(0.0) < 1.0, "{got:?}");
    // 1 ms with 150 in flight is worse than 100 ms with none.
    t.hosts[0].stats.active.store(150, Relaxed);
    let got = shares(&t);
    assert!(got.get("10.0.0.1:80").copied().unwrap_or(0.0) < 1.0, "{got:?}");
    assert!((got["10.0.0.2:80"] - 66.7).abs() < 2.0, "{got:?}");
}

#[test]
fn a_server_name_leads_to_the_host_of_its_slot() {
    for (name, slot) in [
        ("0000beef.outbound_.80_._.a.b.svc.east.clusterset.local", Some(0xbeef)),
        ("ffffffff.outbound_.80_._.a", Some(u32::MAX)),
        ("+000beef.outbound_.80_._.a", None),
        ("beef.outbound_.80_._.a", None),
        ("0000beef.a.b", None),
        ("outbound_.80_._.a", None),
        ("", None),
    ] {
        assert_eq!(slot_of(name), slot, "{name}");
    }
    let serving = |n: u32, slots: &[u32]| {
        let e = endpoint(n, 1, model::EndpointHealth::Healthy);
        let e = model::LbEndpoint { slots: model::Slots::Serves(slots.into()), ..e };
        Arc::new(Host::new(&e, 0, 0, 0, None))
    };
    let hosts = vec![serving(1, &[1]), serving(2, &[2, 3]), serving(3, &[3])];
    let ids: Vec<u64> = hosts.iter().map(|h| h.stats.id).collect();
    let t = LbTables::new(hosts.clone(), &[1], config(model::LbPolicy::RoundRobin), 0);
    let rng = Rng::new(7);
    let pick = |slot: u32, avoid: &[u64]| {
        let name = format!("{slot:08x}.outbound_.80_._.a");
        t.pick_slot(&rng, Some(&name), avoid).map(|h| h.stats.id)
    };
    assert!((0..50).all(|_| pick(2, &[]) == Some(ids[1])));
    assert_eq!(pick(9, &[]), None, "no such slot: any host will do");
    assert_eq!(pick(2, &[ids[1]]), None, "tried already");
    assert_eq!(t.pick_slot(&rng, None, &[]).map(|h| h.stats.id), None);
    // The host with fewer sessions, and each in turn by chance when they have as many.
    let both: std::collections::BTreeSet<_> = (0..50).filter_map(|_| pick(3, &[])).collect();
    assert_eq!(both.len(), 2);
    let _busy = crate::upstream::host::ActiveGuard::new(&hosts[1].stats);
    assert!((0..50).all(|_| pick(3, &[]) == Some(ids[2])));
}

#[test]
fn slots_behind_one_gateway_are_different_points_of_a_ring() {
    let asking = |slot: u32| {
        let e = endpoint(1, 1, model::EndpointHealth::Healthy);
        let e = model::LbEndpoint { slots: model::Slots::Asks(slot), ..e };
        Arc::new(Host::new(&e, 0, 0, 0, None))
    };
    for policy in [model::LbPolicy::RingHash(1024), model::LbPolicy::Maglev(65_537)] {
        let t = LbTables::new((0..4).map(asking).collect(), &[1], config(policy), 0);
        let rng = Rng::new(7);
        let seen: std::collections::BTreeSet<_> = (0..200u32)
            .filter_map(|n| t.pick(&rng, Some(stable_hash(&n.to_be_bytes()))))
            .map(|h| h.stats.id)
            .collect();
        assert_eq!(seen.len(), 4, "{policy:?}");
    }
}
