//! What breaks, and how many requests that costs.

use std::time::{Duration, SystemTime};

use anyhow::ensure;
use flotilla_e2e::{netns::World, wan::Rule};
use mesh_testkit::call::{Calls, Outcome};

use crate::support::{by_cluster, load, options, scenario, served_from, settled};

/// How long a control plane is away.
const AWAY: Duration = Duration::from_secs(30);
/// Longest time that a lost cluster may cost requests: the lease's.
const LEASE: u64 = 3_000;

fn now() -> u64 {
    let d = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// Failed requests, and when the last one of them began, in milliseconds after `event`. Its end says
/// more about the caller's patience than about the mesh.
fn losses(outcomes: &[Outcome], event: u64) -> (usize, u64) {
    let failed = outcomes.iter().filter(|o| !o.ok);
    let began = |o: &Outcome| o.at.saturating_sub(o.ms as u64).saturating_sub(event);
    (failed.clone().count(), failed.map(began).max().unwrap_or(0))
}

/// Load by callers that give up after a second, so that a silent peer costs requests, not just time.
fn impatient(duration: Duration) -> Calls {
    let mut c = load("gamma", duration);
    c.timeout_ms = 1_000;
    c
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_control_plane_away_for_30_seconds_loses_no_request() {
    scenario("control planes killed", async || {
        let mut world = World::start(&options(false)).await?;
        settled(&world).await?;
        // One after the other, each seen from both clusters: its own and the other.
        for n in 0..2 {
            let killed = world.clusters[n].name;
            let west = world.clusters[0].workload("client").clone();
            let east = world.clusters[1].workload("client").clone();
            let calls = load("gamma", AWAY + Duration::from_secs(7));
            let (calls2, from_west) = (calls.clone(), west.clone());
            let w = tokio::spawn(async move { from_west.call(&calls).await });
            let e = tokio::spawn(async move { east.call(&calls2).await });
            tokio::time::sleep(Duration::from_secs(1)).await;
            world.clusters[n].kill_control_plane();
            tokio::time::sleep(AWAY).await;
            world.clusters[n].start_control_plane()?;
            world.clusters[n].control_plane_ready().await?;
            for (name, outcomes) in [("west", w.await??), ("east", e.await??)] {
                let (failed, _) = losses(&outcomes, 0);
                println!(
                    "   {killed}'s control plane away for 30 s, load in {name}: {} requests, {failed} failed, {:?}",
                    outcomes.len(),
                    by_cluster(&outcomes),
                );
                ensure!(outcomes.len() > 500, "only {} requests", outcomes.len());
                ensure!(failed == 0, "{:?}", outcomes.iter().find(|o| !o.ok));
            }
            // The lease lapsed meanwhile; both clusters serve each other again.
            let back = served_from(&west, "gamma", &["west", "east"]).await?;
            println!("   both clusters used again {:.1} s later", back.as_secs_f64());
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_lost_peer_costs_three_seconds_at_most() {
    scenario("peer cluster lost", async || {
        let mut world = World::start(&options(false)).await?;
        settled(&world).await?;
        let client = world.clusters[0].workload("client").clone();

        // The link is cut, both ways: nothing is refused, everything is silent.
        let (from, calls) = (client.clone(), impatient(Duration::from_secs(12)));
        let running = tokio::spawn(async move { from.call(&calls).await });
        tokio::time::sleep(Duration::from_secs(2)).await;
        world.wan.set_all(Rule::CUT);
        let cut = now();
        report("link cut", &running.await??, cut)?;
        world.wan.set_all(Rule::CLEAN);
        let back = served_from(&client, "gamma", &["west", "east"]).await?;
        println!("   link healed: east used again after {:.1} s", back.as_secs_f64());

        // Everything in east dies.
        let (from, calls) = (client.clone(), impatient(Duration::from_secs(12)));
        let running = tokio::spawn(async move { from.call(&calls).await });
        tokio::time::sleep(Duration::from_secs(2)).await;
        let killed = now();
        let n = world.clusters[1].kill_everything();
        report(&format!("kill -9 of {n} programs of east"), &running.await??, killed)?;
        world.clusters[1].start_control_plane()?;
        world.clusters[1].control_plane_ready().await?;
        world.clusters[1].start_data_plane()?;
        world.clusters[1].data_plane_ready().await?;
        let back = served_from(&client, "gamma", &["west", "east"]).await?;
        println!("   east restarted: used again {:.1} s after it was ready", back.as_secs_f64());
        Ok(())
    });
}

fn report(what: &str, outcomes: &[Outcome], event: u64) -> anyhow::Result<()> {
    let before = outcomes.iter().filter(|o| o.at < event).count();
    let after: Vec<Outcome> = outcomes.iter().filter(|o| o.at >= event).cloned().collect();
    let (failed, last) = losses(outcomes, event);
    println!(
        "   {what}: {before} requests before, {} after, {failed} failed, the last of them begun \
         {:.2} s after the event; {:?}",
        after.len(),
        last as f64 / 1000.0,
        by_cluster(&after),
    );
    ensure!(before > 50 && after.len() > 100, "too few requests to tell");
    ensure!(last <= LEASE, "{:?}", outcomes.iter().rfind(|o| !o.ok));
    let late = after.iter().find(|o| o.at > event + LEASE + 1_000 && o.cluster != "west");
    ensure!(late.is_none(), "not served by west after the lease: {late:?}");
    Ok(())
}
