//! What carries new sessions, chosen by what the gateways measure of the link.

use std::time::Duration;

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{Options, World, until},
    wan::Rule,
};
use mesh_testkit::call::Protocol;

use crate::support::{all_ok, calls, options, scenario, settled};

/// Sessions that west's gateway began, by TCP and by QUIC.
fn begun(world: &World) -> anyhow::Result<[f64; 2]> {
    let m = world.clusters[0].admin("gw", "/stats/prometheus")?;
    let total = |name: &str| -> anyhow::Result<f64> {
        let line = m.lines().find(|l| l.starts_with(name));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).with_context(|| format!("no {name}"))
    };
    Ok([total("flotilla_trunk_tcp_sessions_total")?, total("flotilla_trunk_quic_sessions_total")?])
}

/// Calls beta, each call in a connection and so a session of its own, until all new sessions are carried by `carrier` (0: TCP,
/// 1: QUIC), and `flotilla explain` says so in words that begin with `says`. No call may fail.
async fn carried(world: &World, carrier: usize, says: &str) -> anyhow::Result<()> {
    let client = world.clusters[0].workload("client");
    let (mut asked, mut line) = (0, String::new());
    let took = until(&format!("new sessions: {says}"), Duration::from_secs(150), async || {
        let before = begun(world)?;
        all_ok("beta", &client.call(&calls(Protocol::Tcp, "beta", 10)).await?)?;
        asked += 10;
        let after = begun(world)?;
        let by = [after[0] - before[0], after[1] - before[1]];
        ensure!(by[carrier] >= 10.0 && by[1 - carrier] < 1.0, "{by:?} by TCP and QUIC");
        let said = world.clusters[0].flotilla(&["explain", "client-v1.shop", "beta"])?.ok("explain")?;
        line = said.lines().find(|l| l.contains("transport")).unwrap_or_default().trim().to_owned();
        ensure!(line.contains(says), "{said}");
        Ok(())
    })
    .await
    .with_context(|| world.clusters[0].admin("gw", "/trunk").unwrap_or_default())?;
    println!("   after {:>4.1} s, {asked} calls, none failed: {line}", took.as_secs_f64());
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn new_sessions_take_tcp_on_a_clean_short_link_and_quic_on_others() {
    scenario("transport by measurement", async || {
        let world = World::start(&Options { trunk_transport: "auto", ..options(true) }).await?;
        settled(&world).await?;
        carried(&world, 0, "TCP, round trip").await?;
        world.wan.set_all(Rule { loss: 0.02, ..Rule::CLEAN });
        carried(&world, 1, "QUIC (bbr), round trip").await?;
        // Nothing is lost any more, but it is far.
        world.wan.set_all(Rule { delay: Duration::from_millis(20), ..Rule::CLEAN });
        carried(&world, 1, " ms away").await
    });
}
