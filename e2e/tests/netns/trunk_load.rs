//! The trunk on links that lose packets, beside TCP by server name.

use std::time::Duration;

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{World, until},
    wan::Rule,
};
use mesh_testkit::{call::Protocol, paced::Latency};

use crate::support::{all_ok, calls, host, options, scenario, settled};

fn wan(rtt: u64, loss: f64) -> Rule {
    Rule { delay: Duration::from_millis(rtt / 2), loss, ..Rule::CLEAN }
}

/// Sessions go by QUIC, of those that are opened from now on.
async fn by_quic(world: &World) -> anyhow::Result<()> {
    let opened = || -> anyhow::Result<f64> {
        let m = world.clusters[0].admin("gw", "/stats/prometheus")?;
        let line = m.lines().find(|l| l.starts_with("flotilla_trunk_quic_sessions_total"));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).context("no flotilla_trunk_quic_sessions_total")
    };
    until("new sessions by QUIC", Duration::from_secs(60), async || {
        let before = opened()?;
        let o = world.clusters[0].workload("client").call(&calls(Protocol::Tcp, "beta", 4)).await?;
        all_ok("beta", &o)?;
        ensure!(opened()? >= before + 4.0, "still by TCP");
        Ok(())
    })
    .await?;
    Ok(())
}

fn paced(world: &World, more: &[&str]) -> anyhow::Result<Latency> {
    let echo = world.dir.join("flotilla-echo").display().to_string();
    let host = format!("--paced={}", host("beta"));
    let who = ["--workload=client", "--cluster=west"];
    let said =
        world.clusters[0].as_app("client", &[&[&*echo, &*host], &who[..], more].concat())?.ok("paced")?;
    Ok(serde_json::from_str(&said)?)
}

#[test]
#[ignore = "needs root and network namespaces"]
fn requests_on_a_lossy_link_beside_tcp() {
    scenario("64 connections, 1 KiB every 40 ms, 20 ms round trip, 1 % lost", async || {
        let mut seen = Vec::new();
        for quic in [true, false] {
            let world = World::start(&options(quic)).await?;
            settled(&world).await?;
            if quic {
                by_quic(&world).await?;
            }
            world.wan.set_all(wan(20, 0.0));
            let clean = paced(&world, &["--requests=100"])?;
            world.wan.set_all(wan(20, 0.01));
            let lossy = paced(&world, &[])?;
            for (what, l) in [("clean", &clean), ("1 %", &lossy)] {
                println!(
                    "   {} {what:<6} p50 {:>6.1}  p99 {:>6.1}  p99.9 {:>6.1}  max {:>6.1} ms, {} answered, {} not",
                    if quic { "trunk  " } else { "TCP+SNI" },
                    l.p50,
                    l.p99,
                    l.p999,
                    l.max,
                    l.answered,
                    l.failed
                );
            }
            ensure!(lossy.failed == 0, "{lossy:?}");
            seen.push(lossy);
        }
        // How they compare depends on what the machine has left for the proxies: it is told, not asserted.
        println!("   p99 on the trunk is {:.2} of that over TCP", seen[0].p99 / seen[1].p99);
        Ok(())
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_long_and_lossy_link_joins_syncs_and_serves() {
    scenario("600 ms round trip, 7 % lost", async || {
        let world = World::start_over(&options(true), wan(600, 0.07)).await?;
        let client = world.clusters[0].workload("client");
        let took = until("beta answers", Duration::from_secs(60), async || {
            let mut c = calls(Protocol::Http1, "beta", 4);
            c.timeout_ms = 15_000;
            all_ok("beta", &client.call(&c).await?)
        })
        .await?;
        println!("   served {:.1} s after the join", took.as_secs_f64());
        for protocol in Protocol::ALL {
            let mut c = calls(protocol, "beta", 8);
            (c.timeout_ms, c.concurrency) = (20_000, 4);
            let o = client.call(&c).await?;
            let mut ms: Vec<_> = o.iter().map(|o| o.ms).collect();
            ms.sort_by(f64::total_cmp);
            println!("   {:<17} {:.0} to {:.0} ms", protocol.name(), ms[0], ms[ms.len() - 1]);
            all_ok(protocol.name(), &o)?;
        }
        Ok(())
    });
}
