//! Requests to another cluster: how they spread over its workloads, and what moves when one service fails.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use anyhow::ensure;
use flotilla_e2e::netns::{NAMESPACE, Options, World, until};
use mesh_testkit::call::{Calls, Outcome, Protocol};

use crate::support::{all_ok, by_cluster, calls, load, scenario, served_from};

/// Workloads of `delta`: three, seven and one in three zones of east, and one in north.
const EAST: [&str; 11] = ["a1", "a2", "a3", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "c1"];
/// Enough that chance alone stays within 18 % of a twelfth (four standard deviations); shares by zone, or by cluster, would
/// be off by hundreds. With 20,000 requests it stays within 10 %.
const REQUESTS: u32 = 6_000;
/// The same for 22 %, where what is new is only that there are several connections.
const FEWER: u32 = 4_000;

fn options() -> Options {
    let mut east: Vec<_> = EAST.iter().map(|v| ("delta", *v)).collect();
    east.push(("epsilon", "e"));
    Options {
        echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
        quic: false,
        trunk_transport: "quic",
        gateways: 1,
        clusters: vec![
            ("west", vec![("client", "v1")]),
            ("east", east),
            ("north", vec![("delta", "n1"), ("epsilon", "n")]),
        ],
        namespace: |_| NAMESPACE,
        locality: |version| match version.as_bytes().first() {
            Some(b'a') => "eu/a",
            Some(b'b') => "eu/b",
            Some(b'c') => "eu/c",
            _ => "us/n",
        },
    }
}

/// Share of each workload, and the largest deviation from an even one in percent.
fn spread(outcomes: &[Outcome]) -> (BTreeMap<String, usize>, f64) {
    let mut by: BTreeMap<String, usize> = BTreeMap::new();
    for o in outcomes {
        *by.entry(format!("{}/{}", o.cluster, o.version)).or_default() += 1;
    }
    let even = outcomes.len() as f64 / (EAST.len() + 1) as f64;
    let worst = by.values().map(|n| (*n as f64 / even - 1.0).abs() * 100.0).fold(0.0, f64::max);
    (by, worst)
}

fn now() -> u64 {
    let d = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[test]
#[ignore = "needs root and network namespaces"]
fn each_remote_workload_gets_its_share_and_a_service_fails_alone() {
    scenario("requests over three zones and two clusters", async || {
        let mut world = World::start(&options()).await?;
        let client = world.clusters[0].workload("client").clone();
        served_from(&client, "epsilon", &["east", "north"]).await?;
        until("all workloads serve", Duration::from_secs(30), async || {
            let o = client.call(&calls(Protocol::Http1, "delta", 200)).await?;
            all_ok("delta", &o)?;
            let seen = spread(&o).0.len();
            ensure!(seen == EAST.len() + 1, "{seen} of {} workloads", EAST.len() + 1);
            Ok(())
        })
        .await?;
        let one_connection = Calls { keep: true, ..calls(Protocol::Http2, "delta", REQUESTS) };
        let many = Calls { concurrency: 8, ..calls(Protocol::Http1, "delta", FEWER) };
        for (what, limit, calls) in
            [("one HTTP/2 connection", 18.0, one_connection), ("HTTP/1 connections", 22.0, many)]
        {
            let o = client.call(&calls).await?;
            all_ok(what, &o)?;
            let (by, worst) = spread(&o);
            println!(
                "   {what}: {} requests over {} workloads, at most {worst:.1} % off an even share",
                o.len(),
                by.len()
            );
            ensure!(by.len() == EAST.len() + 1 && worst < limit, "{by:?}");
        }

        // Every workload of one service in one cluster dies; its cluster goes on announcing them.
        let run = |service: &'static str| {
            let (client, calls) = (client.clone(), load(service, Duration::from_secs(6)));
            tokio::spawn(async move { client.call(&calls).await })
        };
        let (delta, epsilon) = (run("delta"), run("epsilon"));
        tokio::time::sleep(Duration::from_secs(2)).await;
        let killed = now();
        let programs = world.clusters[1].kill_service("delta");
        let (delta, epsilon) = (delta.await??, epsilon.await??);
        let began = |o: &Outcome| o.at.saturating_sub(o.ms as u64);
        let failed: Vec<_> = delta.iter().filter(|o| !o.ok).collect();
        let after = failed.iter().filter(|o| began(o) > killed).count();
        let first =
            delta.iter().filter(|o| o.ok && o.cluster == "north" && began(o) >= killed).map(|o| o.at).min();
        let first = first.map_or(u64::MAX, |at| at - killed);
        println!(
            "   kill -9 of {programs} programs of delta in east: first answer of north to a request begun after it: \
             {first} ms; {} of {} requests failed, {after} of them begun after it",
            failed.len(),
            delta.len(),
        );
        println!("   epsilon meanwhile: {:?}", by_cluster(&epsilon));
        ensure!(first < 1_000, "{:?}", delta.iter().find(|o| !o.ok));
        let late = failed.iter().find(|o| began(o) > killed + 1_000);
        ensure!(late.is_none(), "failed more than a second later: {late:?}");
        all_ok("epsilon", &epsilon)?;
        let moved = epsilon.iter().filter(|o| o.at > killed && o.cluster == "east").count();
        ensure!(moved > 20, "epsilon moved, too: {:?}", by_cluster(&epsilon));

        world.clusters[1].start_service("delta")?;
        world.clusters[1].data_plane_ready().await?;
        let back = served_from(&client, "delta", &["east", "north"]).await?;
        println!("   east's delta used again {:.1} s after it was ready", back.as_secs_f64());
        ensure!(back < Duration::from_secs(5), "more than 5 s");
        Ok(())
    });
}
