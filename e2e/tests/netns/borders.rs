//! What a cluster may reach of another one holds although its own control plane does not know, or does not care.

use std::time::Duration;

use anyhow::ensure;
use flotilla_e2e::netns::{Workload, World, until};
use mesh_testkit::call::Protocol;

use crate::support::{all_ok, calls, options, scenario, served_from, settled};

const CONVERGE: Duration = Duration::from_secs(10);

const NOT_FOR_WEST: &str = "apiVersion: flotilla.dev/v1alpha1\nkind: ExportPolicy\nmetadata: {name: mesh}\n\
                            spec:\n  rules:\n  - {peers: [west], action: DENY}\n";

/// Waits until `beta` turns a client away, over HTTP with 403 and over TCP.
async fn refused(client: &Workload) -> anyhow::Result<Duration> {
    until("beta refuses", CONVERGE, async || {
        let o = client.call(&calls(Protocol::Http1, "beta", 1)).await?;
        ensure!(o[0].status == 403 && o[0].error.contains("RBAC: access denied"), "{:?}", o[0]);
        let o = client.call(&calls(Protocol::Tcp, "beta", 1)).await?;
        ensure!(!o[0].ok, "TCP passes: {o:?}");
        Ok(())
    })
    .await
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_cluster_reaches_what_is_exported_to_it_and_nothing_once_evicted() {
    scenario("borders between clusters", async || {
        let mut world = World::start(&options(false)).await?;
        settled(&world).await?;

        // West does not hear that the export is no longer for it, and goes on as before.
        world.clusters[0].kill_control_plane();
        let (west, east) = (&world.clusters[0], &world.clusters[1]);
        let client = west.workload("client");
        all_ok("before", &client.call(&calls(Protocol::Http1, "beta", 5)).await?)?;
        east.write("exports.yaml", NOT_FOR_WEST)?;
        let took = refused(client).await?;
        let own = east.workload("client").call(&calls(Protocol::Http1, "beta", 5)).await?;
        all_ok("east's own client", &own)?;
        println!(
            "   no longer exported to west, which has not heard: 403 and no TCP after {:.1} s",
            took.as_secs_f64()
        );
        east.remove("exports.yaml")?;
        served_from(client, "beta", &["east"]).await?;

        world.clusters[0].start_control_plane()?;
        world.clusters[0].control_plane_ready().await?;
        settled(&world).await?;
        let (west, east) = (&world.clusters[0], &world.clusters[1]);
        let client = west.workload("client");
        let said = east.flotilla(&["evict-cluster", "west"])?.ok("evict-cluster")?;
        println!("   evict-cluster: {}", said.lines().next().unwrap_or_default());
        let took = refused(client).await?;
        println!("   evicted: 403 and no TCP for workloads of west after {:.1} s", took.as_secs_f64());
        Ok(())
    });
}
