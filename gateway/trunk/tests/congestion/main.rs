//! Congestion control over links in virtual time: properties as ratios to CUBIC's over the same link.

mod link;

use std::sync::Arc;

use link::{Factory, Link, Seen, run};
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

fn both(name: &str, link: Link, warm: u64, until: u64) -> [Seen; 2] {
    let [ours, quinns, cubic] = [bbr(), quinn_bbr(), cubic()].map(|f| {
        let begun = std::time::Instant::now();
        let s = run(link, &[f], warm, until);
        (s, begun.elapsed())
    });
    for (who, (s, took)) in [("bbr", &ours), ("quinn's bbr", &quinns), ("cubic", &cubic)] {
        println!(
            "{name:<24} {who:<12} {:>5.1} % of the link, {:>5.2} % lost, {:>6.1} ms wait ({took:.1?})",
            s.used * 100.0,
            s.flows[0].loss() * 100.0,
            s.wait * 1000.0
        );
    }
    [ours.0, cubic.0]
}

#[test]
fn random_loss_of_one_and_of_seven_in_a_hundred() {
    for (loss, times, used) in [(0.01, 3.0, 0.85), (0.07, 8.0, 0.75)] {
        let [ours, cubic] = both(&format!("loss {loss}"), Link { loss, ..Link::new(20.0, 40, 1.0) }, 5, 20);
        assert!(ours.used > used, "{ours:?}");
        assert!(ours.used > times * cubic.used, "{ours:?} {cubic:?}");
    }
}

#[test]
fn a_long_path_with_loss() {
    let [ours, cubic] = both("600 ms, loss 0.07", Link { loss: 0.07, ..Link::new(5.0, 600, 1.0) }, 20, 60);
    assert!(ours.used > 0.6, "{ours:?}");
    assert!(ours.used > 10.0 * cubic.used, "{ours:?} {cubic:?}");
}

#[test]
fn a_policer() {
    for burst in [15_000.0, 100_000.0] {
        let link = Link { policer: Some(burst), ..Link::new(10.0, 40, 1.0) };
        let [ours, cubic] = both(&format!("policer {burst}"), link, 5, 25);
        assert!(ours.flows[0].loss() < 0.05, "{ours:?}");
        assert!(ours.used > 0.7 && ours.used > cubic.used * 0.8, "{ours:?} {cubic:?}");
    }
}

#[test]
fn a_deep_buffer() {
    let [ours, cubic] = both("buffer of 10 BDP", Link::new(10.0, 40, 10.0), 5, 30);
    assert!(ours.used > 0.9, "{ours:?}");
    assert!(ours.wait < cubic.wait / 4.0, "{ours:?} {cubic:?}");
}

#[test]
fn a_shallow_buffer() {
    let [ours, cubic] = both("buffer of 0.2 BDP", Link::new(20.0, 40, 0.2), 5, 20);
    assert!(ours.used > 0.8 && ours.used > 0.9 * cubic.used, "{ours:?} {cubic:?}");
    assert!(ours.flows[0].loss() < 0.03, "{ours:?}");
}

#[test]
fn beside_a_flow_of_cubic_and_beside_its_own_kind() {
    for (who, other) in [("quinn's", quinn_bbr()), ("bbr", bbr())] {
        for queue in [0.5, 1.0, 3.0] {
            let seen = run(Link::new(20.0, 40, queue), &[other.clone(), cubic()], 10, 60);
            let share = seen.flows[0].goodput / (seen.flows[0].goodput + seen.flows[1].goodput);
            println!("{who} beside cubic, queue {queue} BDP: {:.0} %, used {:.2}", share * 100.0, seen.used);
            if who == "bbr" {
                assert!((0.15..0.85).contains(&share), "{share} {seen:?}");
                assert!(seen.used > 0.85, "{seen:?}");
            }
        }
        let seen = run(Link::new(20.0, 40, 1.0), &[other.clone(), other], 10, 40);
        let share = seen.flows[0].goodput / (seen.flows[0].goodput + seen.flows[1].goodput);
        println!("{who} beside itself: {:.0} %, used {:.2}", share * 100.0, seen.used);
        if who == "bbr" {
            assert!((0.25..0.75).contains(&share), "{share} {seen:?}");
        }
    }
}
