use std::time::Duration;

use mesh_model::proxy::{FailurePercentage, LocalOrigin, SuccessRate};

use super::*;

fn hosts(n: u16) -> Vec<Arc<Host>> {
    (0..n).map(|i| Arc::new(Host::original(([10, 0, 0, 1], i + 1).into()))).collect()
}

fn detection() -> OutlierDetection {
    OutlierDetection { max_percent: 100, ..OutlierDetection::default() }
}

fn answer(h: &Host, o: &OutlierDetection, good: u32, bad: u32) {
    for _ in 0..good {
        note(&h.stats, Outcome::Status(200), o);
    }
    for _ in 0..bad {
        note(&h.stats, Outcome::Status(500), o);
    }
}

fn ejected(hosts: &[Arc<Host>]) -> Vec<usize> {
    (0..hosts.len()).filter(|i| hosts[*i].stats.is_ejected()).collect()
}

#[test]
fn statuses_that_are_errors_may_be_named() {
    let o = OutlierDetection { consecutive_5xx: 2, consecutive_gateway: 0, ..detection() };
    let named = OutlierDetection { error_codes: vec![429, 503], ..o.clone() };
    let ejects = |o: &OutlierDetection, status: u16| {
        let h = Host::original("10.0.0.1:80".parse().unwrap());
        (0..2).any(|_| note(&h.stats, Outcome::Status(status), o).is_some())
    };
    let of = |o: &OutlierDetection| [200, 404, 429, 500, 503].map(|s| ejects(o, s));
    assert_eq!(of(&o), [false, false, false, true, true]);
    assert_eq!(of(&named), [false, false, true, false, true]);
    let h = Host::original("10.0.0.1:80".parse().unwrap());
    note(&h.stats, Outcome::Status(429), &named);
    note(&h.stats, Outcome::Status(500), &named);
    assert_eq!(note(&h.stats, Outcome::Status(429), &named), None, "a status that is not named is a success");
    let gateway = OutlierDetection { consecutive_5xx: 0, consecutive_gateway: 2, ..named };
    assert_eq!([429, 503].map(|s| ejects(&gateway, s)), [false, true], "503 is also one of a gateway");
}

#[test]
fn success_rate_ejects_whoever_falls_behind() {
    let rate = SuccessRate { minimum_hosts: 5, request_volume: 100, stdev_factor: 1900, enforcing: 100 };
    let o = OutlierDetection { success_rate: Some(rate), ..detection() };
    let all = hosts(10);
    for (i, h) in all.iter().enumerate() {
        let bad = if i == 3 { 40 } else { 1 };
        answer(h, &o, 100 - bad, bad);
    }
    assert!(sweep(&all, &o, now_ms()));
    assert_eq!(ejected(&all), [3]);
    // The counters began again: nobody has the volume now.
    assert!(!sweep(&all, &o, now_ms()));
    assert_eq!(ejected(&all), [3]);

    // Equally bad hosts are no outliers.
    let all = hosts(10);
    all.iter().for_each(|h| answer(h, &o, 50, 50));
    sweep(&all, &o, now_ms());
    assert!(ejected(&all).is_empty());

    // Too few hosts with enough requests; the others' do not count.
    let all = hosts(10);
    for (i, h) in all.iter().enumerate() {
        if i < 4 {
            answer(h, &o, if i == 0 { 0 } else { 100 }, if i == 0 { 100 } else { 0 });
        } else {
            answer(h, &o, 99, 0);
        }
    }
    sweep(&all, &o, now_ms());
    assert!(ejected(&all).is_empty());
}

#[test]
fn success_rates_follow_the_formula() {
    // Mean 90, deviation 20 (four at 100, one at 50): 90 - 1.9 * 20.
    let got = success_threshold([100.0, 100.0, 100.0, 100.0, 50.0].into_iter(), 1900);
    assert!((got - 52.0).abs() < 1e-9, "{got}");
}

#[test]
fn failure_percentage_is_a_fixed_limit() {
    let f = FailurePercentage { threshold: 85, minimum_hosts: 2, request_volume: 20, enforcing: 100 };
    let o = OutlierDetection { failure_percentage: Some(f), ..detection() };
    let all = hosts(4);
    answer(&all[0], &o, 3, 17);
    answer(&all[1], &o, 4, 16);
    answer(&all[2], &o, 0, 19);
    sweep(&all, &o, now_ms());
    assert_eq!(ejected(&all), [0], "85 % is enough, 80 % is not, and 19 requests are too few");
    // Enforced in no case.
    let o =
        OutlierDetection { failure_percentage: Some(FailurePercentage { enforcing: 0, ..f }), ..detection() };
    let all = hosts(3);
    all.iter().for_each(|h| answer(h, &o, 0, 20));
    assert!(!sweep(&all, &o, now_ms()));
    assert!(ejected(&all).is_empty());
}

#[test]
fn failures_of_the_network_are_apart_when_split() {
    let split = OutlierDetection {
        consecutive_5xx: 2,
        consecutive_gateway: 2,
        local_origin: Some(LocalOrigin {
            consecutive: 3,
            enforcing: 70,
            success_rate: None,
            failure_percentage: None,
        }),
        ..detection()
    };
    let h = &hosts(1)[0];
    let run = |o: &OutlierDetection, outcomes: &[Outcome]| {
        outcomes.iter().map(|x| note(&h.stats, *x, o)).collect::<Vec<_>>()
    };
    use Outcome::{Connected, Failed, Status, Timeout};
    assert_eq!(run(&split, &[Failed, Timeout, Failed]), [None, None, Some(70)]);
    assert_eq!(run(&split, &[Connected, Failed, Failed, Status(200), Failed]), [None; 5]);
    // An answer counts as before, and a failure in between does not interrupt the row.
    assert_eq!(run(&split, &[Status(500), Failed, Status(503)]), [None, None, Some(100)]);
    let joint = OutlierDetection { local_origin: None, ..split };
    assert_eq!(run(&joint, &[Status(200), Failed, Timeout]), [None, None, Some(100)]);
}

#[test]
fn enforcement_is_a_share() {
    assert!(enforced(100) && !enforced(0));
    let n = (0..100_000).filter(|_| enforced(30)).count();
    assert!((28_500..31_500).contains(&n), "{n}");
}

#[test]
fn hosts_that_return_count_as_new() {
    let o = OutlierDetection { base_ejection: Duration::ZERO, max_ejection: Duration::ZERO, ..detection() };
    let all = hosts(2);
    all[0].stats.healthy_since.store(0, Relaxed);
    assert!(eject(&all, &all[0].stats, &o));
    let later = now_ms() + 5;
    assert!(sweep(&all, &o, later));
    assert_eq!(all[0].stats.healthy_since.load(Relaxed), later);
}

#[test]
fn being_reached_and_answering_well_are_judged_apart() {
    let rate = SuccessRate { minimum_hosts: 5, request_volume: 10, stdev_factor: 1900, enforcing: 100 };
    let limit = FailurePercentage { threshold: 50, minimum_hosts: 1, request_volume: 10, enforcing: 100 };
    let local = |success_rate, failure_percentage| OutlierDetection {
        local_origin: Some(LocalOrigin { consecutive: 0, enforcing: 100, success_rate, failure_percentage }),
        ..detection()
    };
    for o in [local(Some(rate), None), local(None, Some(limit))] {
        let all = hosts(8);
        for (i, h) in all.iter().enumerate() {
            // The first answers badly, the second is not reached.
            answer(h, &o, if i == 0 { 0 } else { 20 }, if i == 0 { 20 } else { 0 });
            let unreached = if i == 1 { 30 } else { 0 };
            (0..unreached).for_each(|_| {
                note(&h.stats, Outcome::Failed, &o);
            });
        }
        sweep(&all, &o, now_ms());
        assert_eq!(ejected(&all), [1]);
    }
}
