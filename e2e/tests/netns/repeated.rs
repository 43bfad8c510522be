//! A cluster is lost and comes back, again and again: how long that is felt, as a distribution.

use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use flotilla_e2e::{netns::World, wan::Rule};
use mesh_testkit::call::{Calls, Outcome, Protocol};

use crate::support::{by_cluster, load, options, scenario, served_from, three_clusters};

/// How often each event is repeated unless `FLOTILLA_REPEAT` says otherwise.
const REPEAT: usize = 2;
/// Longest time that new requests may go to a cluster that is lost.
const LEFT: Duration = Duration::from_secs(3);
/// Longest time until it is used again once it is back.
const AGAIN: Duration = Duration::from_secs(5);
/// Load before an event and after it.
const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_millis(4_500);

const EVERYWHERE: [&str; 3] = ["west", "east", "north"];
const EAST: usize = 1;

fn now() -> u64 {
    let d = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// What one event cost one client, in milliseconds after it.
#[derive(Debug, Default, Clone, Copy)]
struct Cost {
    requests: usize,
    failed: usize,
    /// When the last request was begun that failed.
    last_failed: u64,
    /// When the last request was begun that east answered or nobody.
    left: u64,
}

impl Cost {
    fn of(outcomes: &[Outcome], event: u64) -> Self {
        let began = |o: &Outcome| o.at.saturating_sub(o.ms as u64);
        let after = || outcomes.iter().filter(|o| began(o) >= event);
        let last = |of: &dyn Fn(&Outcome) -> bool| {
            after().filter(|o| of(o)).map(|o| began(o) - event).max().unwrap_or(0)
        };
        Self {
            requests: after().count(),
            failed: outcomes.iter().filter(|o| !o.ok).count(),
            last_failed: last(&|o| !o.ok),
            left: last(&|o| !o.ok || o.cluster == "east"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    /// Nobody reaches east: silence.
    Cut,
    /// kill -9 of all programs of east.
    Kill,
}

impl Event {
    async fn happen(self, world: &mut World) -> anyhow::Result<()> {
        match self {
            Self::Cut => cut(world, Rule::CUT),
            Self::Kill => {
                world.clusters[EAST].kill_everything();
            }
        }
        Ok(())
    }

    async fn end(self, world: &mut World) -> anyhow::Result<()> {
        match self {
            Self::Cut => cut(world, Rule::CLEAN),
            Self::Kill => {
                let east = &mut world.clusters[EAST];
                east.start_control_plane()?;
                east.control_plane_ready().await?;
                east.start_data_plane()?;
                east.data_plane_ready().await?;
            }
        }
        Ok(())
    }
}

fn cut(world: &World, rule: Rule) {
    for other in [0, 2] {
        world.link(other, EAST, rule);
        world.link(EAST, other, rule);
    }
}

/// Callers that give up after a second, so that silence costs requests and not just time.
fn client(protocol: Protocol) -> Calls {
    Calls { protocol, timeout_ms: 1_000, keep: protocol != Protocol::Http1, ..load("gamma", BEFORE + AFTER) }
}

/// The value that `of` in a hundred are not above (nearest rank).
fn percentile(values: &[u64], of: usize) -> u64 {
    let mut all = values.to_vec();
    all.sort_unstable();
    let rank = (all.len() * of).div_ceil(100).max(1);
    all.get(rank - 1).copied().unwrap_or_default()
}

fn seconds(what: &str, values: &[u64]) -> String {
    let p = |n| percentile(values, n) as f64 / 1e3;
    format!("{what} p50 {:.2} s, p99 {:.2} s, worst {:.2} s", p(50), p(99), p(100))
}

async fn repeat(world: &mut World, event: Event) -> anyhow::Result<()> {
    let times = match std::env::var("FLOTILLA_REPEAT") {
        Ok(n) => n.parse().context("FLOTILLA_REPEAT is no number")?,
        Err(_) => REPEAT,
    };
    let (mut costs, mut again) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let clients = [(0, Protocol::Http1), (2, Protocol::Http2)].map(|(cluster, protocol)| {
            let w = world.clusters[cluster].workload("client").clone();
            (w.clone(), tokio::spawn(async move { w.call(&client(protocol)).await }))
        });
        tokio::time::sleep(BEFORE).await;
        let at = now();
        event.happen(world).await?;
        let mut workloads = Vec::new();
        for (w, running) in clients {
            let outcomes = running.await??;
            let by = by_cluster(&outcomes);
            ensure!(
                by.contains_key("east"),
                "east was not used before: {by:?}, such as {:?}",
                outcomes.first()
            );
            costs.push(Cost::of(&outcomes, at));
            workloads.push(w);
        }
        event.end(world).await?;
        let mut longest = Duration::ZERO;
        for w in &workloads {
            longest = longest.max(served_from(w, "gamma", &EVERYWHERE).await?);
        }
        again.push(u64::try_from(longest.as_millis())?);
    }
    let of = |f: fn(&Cost) -> u64| costs.iter().map(f).collect::<Vec<_>>();
    let (left, last) = (of(|c| c.left), of(|c| c.last_failed));
    println!(
        "   {event:?}, {times} times, seen by two clients: {} of {} requests failed",
        costs.iter().map(|c| c.failed).sum::<usize>(),
        costs.iter().map(|c| c.requests).sum::<usize>(),
    );
    println!("     {}", seconds("last request begun that went there:", &left));
    println!("     {}", seconds("last request begun that failed:", &last));
    println!("     {}", seconds("used again after it was back:", &again));
    let limit = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    ensure!(percentile(&left, 99) <= limit(LEFT), "new requests went there for longer");
    ensure!(percentile(&last, 100) <= limit(LEFT), "requests failed that others could have served");
    ensure!(percentile(&again, 99) <= limit(AGAIN), "it was not used again in time");
    ensure!(costs.iter().all(|c| c.requests > 200), "too few requests to tell");
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_cluster_lost_again_and_again() {
    scenario("a cluster lost again and again", async || {
        let mut world = World::start(&three_clusters(options(false))).await?;
        for c in [0, 2] {
            served_from(world.clusters[c].workload("client"), "gamma", &EVERYWHERE).await?;
        }
        repeat(&mut world, Event::Cut).await?;
        repeat(&mut world, Event::Kill).await
    });
}
