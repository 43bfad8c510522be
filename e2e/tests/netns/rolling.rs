//! All gateways of both clusters are restarted one after the other, under load: nobody notices.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use flotilla_e2e::netns::{Cluster, Options, Workload, World};
use mesh_testkit::{
    call::{Calls, Outcome, Protocol},
    echo::DELAY_MS,
};

use crate::support::{by_cluster, calls, options, scenario, served_from};

/// Gateways of each cluster.
const GATEWAYS: usize = 3;
/// How long a long stream lasts: well within the time for which a gateway drains.
const LONG: u64 = 2_000;
/// Clients make their calls in rounds of this length, of which the last one ends after the last restart.
const ROUND: u64 = 3_000;

/// What is called all the time, by name.
fn load(service: &str) -> Vec<(&'static str, Calls)> {
    let short = |protocol| Calls {
        duration_ms: ROUND,
        concurrency: 2,
        pause_ms: 10,
        timeout_ms: 10_000,
        ..calls(protocol, service, 0)
    };
    let long = |protocol| Calls { hold_ms: LONG, ..short(protocol) };
    let mut slow = Calls { keep: true, ..short(Protocol::Http2) };
    slow.headers.insert(DELAY_MS.into(), LONG.to_string());
    vec![
        ("HTTP/1.1", short(Protocol::Http1)),
        ("HTTP/2, kept", Calls { keep: true, ..short(Protocol::Http2) }),
        ("gRPC, kept", Calls { keep: true, ..short(Protocol::Grpc) }),
        ("TCP", short(Protocol::Tcp)),
        ("2 s: HTTP/2 request", slow),
        ("2 s: WebSocket", long(Protocol::WebSocket)),
        ("2 s: TCP connection", long(Protocol::Tcp)),
    ]
}

/// Calls until told to stop.
async fn call(from: Workload, calls: Calls, stop: Arc<AtomicBool>) -> anyhow::Result<Vec<Outcome>> {
    let mut all = Vec::new();
    while !stop.load(Relaxed) {
        all.extend(from.call(&calls).await?);
    }
    Ok(all)
}

/// Sessions through a gateway now.
fn sessions(c: &Cluster, gateway: usize) -> anyhow::Result<u64> {
    let part = if gateway == 0 { "gw".to_owned() } else { format!("gw{}", gateway + 1) };
    let page: serde_json::Value = serde_json::from_str(&c.admin(&part, "/clusters")?)?;
    page["connections"].as_u64().context("no number of connections")
}

async fn rolling(quic: bool) -> anyhow::Result<()> {
    let options = Options { gateways: GATEWAYS, ..options(quic) };
    let mut world = World::start(&options).await?;
    for (cluster, remote, of) in [(0, "beta", "east"), (1, "alpha", "west")] {
        served_from(world.clusters[cluster].workload("client"), remote, &[of]).await?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut running = Vec::new();
    for (cluster, remote) in [(0, "beta"), (1, "alpha")] {
        let client = world.clusters[cluster].workload("client");
        for (what, calls) in load(remote) {
            running.push((what, tokio::spawn(call(client.clone(), calls, stop.clone()))));
        }
    }
    tokio::time::sleep(Duration::from_secs(2)).await;

    let (mut moved, begun) = (0, Instant::now());
    for gateway in 0..GATEWAYS {
        for c in &mut world.clusters {
            let there = sessions(c, gateway)?;
            let stopped = c.stop_gateway(gateway).await?;
            c.start_gateway(gateway)?;
            let ready = c.gateway_ready(gateway).await?;
            moved += there;
            println!(
                "   {} gateway {}: {there} sessions; gone {:.1} s after SIGTERM, back {:.1} s later",
                c.name,
                gateway + 1,
                stopped.as_secs_f64(),
                ready.as_secs_f64()
            );
            ensure!(stopped < Duration::from_secs(9), "a gateway took longer than it drains");
        }
    }
    println!("   {moved} sessions moved in {:.1} s", begun.elapsed().as_secs_f64());
    stop.store(true, Relaxed);

    let mut by: BTreeMap<&str, Vec<Outcome>> = BTreeMap::new();
    for (what, task) in running {
        by.entry(what).or_default().extend(task.await??);
    }
    let mut failed = Vec::new();
    for (what, outcomes) in &by {
        let bad: Vec<_> = outcomes.iter().filter(|o| !o.ok).collect();
        let slowest = outcomes.iter().map(|o| o.ms).fold(0.0, f64::max);
        println!("   {what}: {} of {} failed, slowest {slowest:.0} ms", bad.len(), outcomes.len());
        failed.extend(bad.iter().map(|o| format!("{what}: {o:?}")));
        ensure!(by_cluster(outcomes).len() >= 2, "{what}: one cluster answered only");
    }
    ensure!(failed.is_empty(), "{} failed, such as {:#?}", failed.len(), &failed[..failed.len().min(5)]);
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_rolling_restart_over_tcp() {
    scenario("rolling restart of all gateways, TCP", || rolling(false));
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_rolling_restart_over_the_trunk() {
    scenario("rolling restart of all gateways, QUIC", || rolling(true));
}
