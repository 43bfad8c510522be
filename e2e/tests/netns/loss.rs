//! A link that loses packets: the trunk beside TCP, over the same link in the same run.

use std::time::Duration;

use anyhow::ensure;
use flotilla_e2e::{
    netns::{World, until},
    wan::Rule,
};
use mesh_testkit::call::{Calls, Protocol};

use crate::support::{all_ok, calls, options, scenario, settled};

/// 20 ms there and back, one packet of a hundred lost in each direction.
const LOSSY: Rule = Rule { delay: Duration::from_millis(10), loss: 0.01, ..Rule::CLEAN };
/// A satellite on a bad day.
const FAR: Rule = Rule { delay: Duration::from_millis(300), loss: 0.07, ..Rule::CLEAN };

/// 64 sessions, 1 KiB each way every 40 ms.
fn steady() -> Calls {
    Calls {
        keep: true,
        concurrency: 64,
        pause_ms: 40,
        duration_ms: 15_000,
        payload: "x".repeat(1024),
        ..calls(Protocol::Tcp, "beta", 0)
    }
}

/// Median, 99th percentile and largest time of the calls, milliseconds.
fn times(mut ms: Vec<f64>) -> (f64, f64, f64) {
    ms.sort_by(f64::total_cmp);
    let at = |p: usize| ms.get(ms.len() * p / 1000).copied().unwrap_or_default();
    (at(500), at(990), ms.last().copied().unwrap_or_default())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn loss_delays_a_few_sessions_on_the_trunk_and_fails_none() {
    scenario("a link that loses packets", async || {
        let mut seen = Vec::new();
        for quic in [true, false] {
            let world = World::start(&options(quic)).await?;
            settled(&world).await?;
            let client = world.clusters[0].workload("client");
            if quic {
                // New sessions are by QUIC once both gateways have certificates.
                until("the trunk", Duration::from_secs(60), async || {
                    let gw = world.clusters[0].log("eastwest-proxy");
                    ensure!(gw.contains("trunk is up"), "no trunk yet");
                    all_ok("beta", &client.call(&calls(Protocol::Tcp, "beta", 5)).await?)
                })
                .await?;
            }
            world.wan.set_all(LOSSY);
            let before = world.wan.counts();
            let o = client.call(&steady()).await?;
            let after = world.wan.counts();
            all_ok("1 % loss", &o)?;
            // The first call of a session pays for its handshakes.
            let mut ms: Vec<_> = o.iter().map(|o| o.ms).collect();
            ms.drain(..64.min(ms.len()));
            let n = ms.len();
            let (median, p99, worst) = times(ms);
            println!(
                "   20 ms, 1 % loss, {}: {n} requests, median {median:.1} ms, p99 {p99:.1} ms, longest {worst:.0} ms; \
                 {} of {} packets lost, 0 failed",
                if quic { "QUIC trunk" } else { "TCP by SNI" },
                after.lost - before.lost,
                after.passed - before.passed,
            );
            ensure!(n > 5_000, "only {n} requests");
            seen.push(p99);

            world.wan.set_all(FAR);
            let far = Calls { timeout_ms: 30_000, concurrency: 4, ..calls(Protocol::Http1, "beta", 20) };
            let o = client.call(&far).await?;
            all_ok("7 % loss, 600 ms", &o)?;
            let (median, _, worst) = times(o.iter().map(|o| o.ms).collect());
            println!(
                "   600 ms, 7 % loss: 20 requests, median {median:.0} ms, longest {worst:.0} ms, 0 failed"
            );
        }
        // How they compare depends on what the machine has left for them: it is told, not asserted.
        println!("   p99 on the trunk is {:.2} of that over TCP", seen[0] / seen[1]);
        Ok(())
    });
}
