//! Simulation of the registry exchange: whole members with the real state machines, a virtual clock for each, and a
//! seeded network of encoded frames.
//!
//! A world is a function of its seed. A failure prints it; `FLOTILLA_SIM_SEED=<seed>` runs that one alone.

mod faults;
mod net;
mod scale;
mod world;

use std::{collections::BTreeMap, num::NonZero, ops::Range, panic::AssertUnwindSafe, thread};

use world::{Options, World, id};

/// Runs a scenario for each seed, on all cores, and names the one that fails.
fn seeds(range: Range<u64>, scenario: impl Fn(u64) -> World + Sync) -> Vec<World> {
    let chosen = std::env::var("FLOTILLA_SIM_SEED").ok().and_then(|s| s.parse().ok());
    let run = |seed| match std::panic::catch_unwind(AssertUnwindSafe(|| scenario(seed))) {
        Ok(w) => w,
        Err(panic) => {
            eprintln!("failed with seed {seed}: repeat with FLOTILLA_SIM_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    };
    let range = chosen.map_or(range, |s: u64| s..s + 1);
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|s| {
        let share = |core| range.clone().skip(core).step_by(cores).map(run).collect::<Vec<_>>();
        let shares: Vec<_> = (0..cores).map(|core| s.spawn(move || share(core))).collect();
        let worlds = shares.into_iter().map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
        worlds.flatten().collect()
    })
}

/// Everything at once, then rest, then agreement.
fn storm(range: Range<u64>, clusters: impl Fn(u64) -> usize + Sync) {
    let worlds = seeds(range, |seed| {
        let mut w = World::new(seed, clusters(seed), Options::hostile());
        w.run(60_000);
        w.heal();
        w.run(20_000);
        w.assert_converged();
        w
    });
    // A simulation in which nothing goes wrong shows nothing.
    let mut happened: BTreeMap<&str, u64> = BTreeMap::new();
    for (what, n) in worlds.iter().flat_map(World::happened) {
        *happened.entry(what).or_default() += n;
    }
    println!("{} worlds: {happened:?}", worlds.len());
    let faults = [
        "lost",
        "doubled",
        "reordered",
        "resubscription",
        "silence",
        "partition",
        "restart",
        "restart without state",
        "eviction",
        "departure",
        "join",
    ];
    if worlds.len() > 1 {
        for what in faults {
            assert!(happened.get(what).is_some_and(|n| *n > 0), "no {what} in any world");
        }
    }
}

#[test]
fn members_agree_after_every_kind_of_fault() {
    storm(0..24, |_| 4);
}

#[test]
#[ignore = "ninety worlds of up to eight clusters; `cargo verify` runs it"]
fn members_agree_after_every_kind_of_fault_many_seeds() {
    storm(1000..1090, |seed| 3 + usize::try_from(seed % 6).unwrap());
}

/// The same seed is the same world, frame by frame.
#[test]
fn a_seed_is_a_world() {
    let trace = |seed| {
        let mut w = World::new(seed, 4, Options::hostile());
        w.run(20_000);
        w.trace()
    };
    assert_eq!(trace(7), trace(7));
    assert_ne!(trace(7), trace(8));
}

/// A join after a tombstone is known to its signer until it spreads, and the newcomer is not believed about it. A world
/// in which the signer forgets before that has nothing to agree on.
#[test]
fn a_join_that_nobody_else_knows_of_has_no_witness() {
    let mut w =
        World::new(1, 3, Options { change: 0.0, restart: 0.0, cut: 0.0, depart: 0.0, ..Options::hostile() });
    w.run(3000);
    assert!(w.has_witness(0), "members of the first epoch speak for themselves");
    w.clusters[0].node.as_mut().unwrap().evict(&id(1), 0).unwrap();
    w.clusters[1].out = true;
    w.run(3000);
    assert!(w.has_witness(0), "the tombstone has spread");
    w.cuts.cut(0, 2, w.now + 3000);
    w.join(1, 0);
    w.run(1000);
    assert!(!w.has_witness(0));
    w.run(5000);
    assert!(w.has_witness(0));
    w.assert_converged();
}
