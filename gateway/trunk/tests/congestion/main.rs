//! Congestion control over links in virtual time: properties as ratios to CUBIC's over the same link.

mod link;
mod paced;

use std::sync::Arc;

use link::{Factory, Link, Seen, change, requests, run};
use mesh_trunk::congestion::BbrConfig;
use quinn::congestion::CubicConfig;

fn bbr() -> Factory {
    Arc::new(BbrConfig::seeded(7))
}

fn cubic() -> Factory {
    Arc::new(CubicConfig::default())
}

fn quinn_bbr() -> Factory {
    Arc::new(quinn::congestion::BbrConfig::default())
}

fn show(name: &str, who: &str, s: &Seen) {
    println!(
        "{name:<20} {who:<12} {:>5.1} % of the link, {:>5.2} % lost, {:>6.1} ms wait",
        s.used * 100.0,
        s.flows[0].loss() * 100.0,
        s.wait * 1000.0
    );
}

/// Ours and CUBIC's, each alone on the link.
fn both(name: &str, link: Link, warm: u64, until: u64) -> [Seen; 2] {
    [("bbr", bbr()), ("cubic", cubic())].map(|(who, f)| {
        let s = run(link, &[f], warm, until);
        show(name, who, &s);
        s
    })
}

fn lossy(loss: f64) -> Link {
    Link { loss, ..Link::new(20.0, 40, 1.0) }
}

fn policer(burst: f64) -> Link {
    Link { policer: Some(burst), ..Link::new(10.0, 40, 1.0) }
}

#[test]
fn one_in_a_hundred_lost_at_random() {
    let [ours, cubic] = both("1 % lost", lossy(0.01), 5, 15);
    assert!(ours.used > 0.85 && ours.used > 3.0 * cubic.used, "{ours:?} {cubic:?}");
}

#[test]
fn seven_in_a_hundred_lost_at_random() {
    let [ours, cubic] = both("7 % lost", lossy(0.07), 5, 15);
    assert!(ours.used > 0.75 && ours.used > 8.0 * cubic.used, "{ours:?} {cubic:?}");
}

#[test]
fn a_long_path_with_loss() {
    let [ours, cubic] = both("600 ms, 7 % lost", Link { loss: 0.07, ..Link::new(5.0, 600, 1.0) }, 20, 50);
    assert!(ours.used > 0.6 && ours.used > 10.0 * cubic.used, "{ours:?} {cubic:?}");
}

/// Sessions offer 13 Mbit/s; the link has seven times as much and loses packets in both directions.
#[test]
fn small_requests_on_a_lossy_link() {
    for (name, loss) in [("1 % lost", 0.01), ("7 % lost", 0.07)] {
        let [ours, cubic] = [("bbr", bbr()), ("cubic", cubic())].map(|(who, f)| {
            let took = requests(Link { loss, ..Link::new(100.0, 20, 1.0) }, f);
            let at = |part: f64| took[(took.len() as f64 * part) as usize];
            println!(
                "{name:<20} {who:<12} p50 {:.1}, p99 {:.1}, p99.9 {:.1} ms",
                at(0.5),
                at(0.99),
                at(0.999)
            );
            at(0.99)
        });
        assert!(ours < 60.0 || loss > 0.01, "{ours} ms");
        assert!(ours < cubic / 4.0, "{ours} ms, CUBIC's {cubic} ms");
    }
}

#[test]
fn a_policer() {
    let [ours, cubic] = both("policer, 100 kB", policer(100_000.0), 5, 25);
    assert!(ours.flows[0].loss() < 0.05, "{ours:?}");
    assert!(ours.used > 0.7 && ours.used > cubic.used * 0.8, "{ours:?} {cubic:?}");
}

#[test]
fn a_policer_with_a_small_bucket() {
    // quinn sends ten packets at once, three quarters of this bucket, so loss is bounded less tightly.
    let [ours, cubic] = both("policer, 15 kB", policer(15_000.0), 5, 20);
    assert!(ours.flows[0].loss() < 0.25 && ours.used > cubic.used, "{ours:?} {cubic:?}");
}

#[test]
fn a_deep_buffer() {
    let [ours, cubic] = both("queue of 10 BDP", Link::new(10.0, 40, 10.0), 5, 25);
    assert!(ours.used > 0.9, "{ours:?}");
    assert!(ours.wait < cubic.wait / 4.0, "{ours:?} {cubic:?}");
}

#[test]
fn a_shallow_buffer() {
    let [ours, cubic] = both("queue of 0.2 BDP", Link::new(20.0, 40, 0.2), 5, 15);
    assert!(ours.used > 0.8 && ours.used > 0.9 * cubic.used, "{ours:?} {cubic:?}");
    assert!(ours.flows[0].loss() < 0.03, "{ours:?}");
}

/// Share of the first of two flows on one bottleneck.
/// The path changes under a transfer: what was believed of the old one is measured anew.
#[test]
fn a_path_that_changes() {
    let far = Link::new(20.0, 100, 1.0);
    let near = Link { queue: far.queue, ..Link::new(20.0, 10, 1.0) };
    let slow = Link { rate: far.rate / 5.0, ..far };
    for (name, from, to) in [
        ("becomes longer", near, far),
        ("becomes shorter", far, near),
        ("slower", far, slow),
        ("faster", slow, far),
    ] {
        let s = change(from, 8, to, bbr(), 14, 24);
        show(name, "bbr", &s);
        // A queue of what the longer path holds could stand before the slower link for half a second.
        assert!(s.used > 0.85 && s.wait < 0.25, "{name}: {s:?}");
    }
}

/// A path that becomes much longer is found out soon: what is in flight was enough for the old one alone.
#[test]
fn a_path_that_becomes_twenty_times_as_long() {
    let far = Link::new(100.0, 20, 1.0);
    let near = Link { queue: far.queue, ..Link::new(100.0, 1, 1.0) };
    let s = change(near, 6, far, bbr(), 8, 10);
    show("1 to 20 ms, soon", "bbr", &s);
    assert!(s.used > 0.8, "{s:?}");
}

fn share(name: &str, queue: f64, flows: [Factory; 2]) -> f64 {
    let seen = run(Link::new(20.0, 40, queue), &flows, 10, 40);
    let share = seen.flows[0].goodput / (seen.flows[0].goodput + seen.flows[1].goodput);
    println!("{name}, queue of {queue} BDP: {:.0} %, {:.0} % used", share * 100.0, seen.used * 100.0);
    assert!(seen.used > 0.85, "{seen:?}");
    share
}

#[test]
fn beside_cubic_with_a_short_queue() {
    let s = share("beside cubic", 1.0, [bbr(), cubic()]);
    assert!((0.15..0.85).contains(&s), "{s}");
}

#[test]
fn beside_cubic_with_a_long_queue() {
    let s = share("beside cubic", 3.0, [bbr(), cubic()]);
    assert!((0.15..0.85).contains(&s), "{s}");
}

#[test]
fn beside_its_own_kind() {
    let s = share("beside itself", 1.0, [bbr(), bbr()]);
    assert!((0.15..0.85).contains(&s), "{s}");
}

/// Why this is not left to quinn's BBR.
#[test]
#[ignore = "a comparison, not a property of ours: a minute"]
fn beside_the_controller_of_quinn() {
    for (name, link) in [
        ("1 % lost", lossy(0.01)),
        ("policer, 100 kB", policer(100_000.0)),
        ("policer, 15 kB", policer(15_000.0)),
        ("queue of 10 BDP", Link::new(10.0, 40, 10.0)),
        ("queue of 0.2 BDP", Link::new(20.0, 40, 0.2)),
    ] {
        both(name, link, 5, 20);
        show(name, "quinn's bbr", &run(link, &[quinn_bbr()], 5, 20));
    }
    for queue in [0.5, 1.0, 3.0] {
        share("bbr beside cubic", queue, [bbr(), cubic()]);
        share("quinn's bbr beside cubic", queue, [quinn_bbr(), cubic()]);
    }
}
