//! Clusters that nobody can dial: sessions to them are streams of connections that they dialled.

use std::time::Duration;

use anyhow::ensure;
use flotilla_e2e::netns::{Cluster, NAMESPACE, Options, World, until};
use mesh_testkit::call::Protocol;

use crate::support::{all_ok, by_cluster, calls, options, scenario, served_from, settled};

const CONVERGE: Duration = Duration::from_secs(30);

/// Workloads of `beta` in this cluster may be called by `gamma` only.
fn only_gamma(at: &Cluster) -> anyhow::Result<()> {
    at.write(
        "policy.yaml",
        &format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: beta, namespace: {NAMESPACE}}}\n\
             spec:\n  selector: {{matchLabels: {{app: beta}}}}\n  action: ALLOW\n  rules:\n  - from: [{{source: \
             {{principals: [mesh.local/ns/{NAMESPACE}/sa/gamma]}}}}]\n"
        ),
    )
}

/// `client` of `from` is refused by `beta`, `gamma` of `from` is not.
async fn policy_holds(from: &Cluster) -> anyhow::Result<()> {
    until("client is denied", CONVERGE, async || {
        let o = from.workload("client").call(&calls(Protocol::Http1, "beta", 1)).await?;
        ensure!(o[0].status == 403 && o[0].error.contains("RBAC: access denied"), "{:?}", o[0]);
        Ok(())
    })
    .await?;
    all_ok("gamma may", &from.workload("gamma").call(&calls(Protocol::Http1, "beta", 5)).await?)?;
    println!("   beta allows gamma of {}, and refuses its client", from.name);
    Ok(())
}

/// Every protocol from `client` of a cluster.
async fn everything(from: &Cluster, service: &str) -> anyhow::Result<()> {
    for protocol in Protocol::ALL {
        let o = from.workload("client").call(&calls(protocol, service, 6)).await?;
        all_ok(&format!("{service} {}", protocol.name()), &o)?;
        println!("   {} -> {service} {:<17} {:?}", from.name, protocol.name(), by_cluster(&o));
    }
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_cluster_behind_nat_is_a_full_member() {
    scenario("one cluster behind NAT", async || {
        let world = World::start_hidden(&options(true), &["east"]).await?;
        let (west, east) = (&world.clusters[0], &world.clusters[1]);
        settled(&world).await?;
        everything(west, "beta").await?;
        everything(east, "alpha").await?;
        only_gamma(east)?;
        policy_holds(west).await?;
        Ok(())
    });
}

/// The founder can dial and cannot be dialled: it dials the newcomer, from the join on.
#[test]
#[ignore = "needs root and network namespaces"]
fn a_founder_behind_nat_dials_whoever_joins() {
    scenario("the founder behind NAT", async || {
        let world = World::start_hidden(&options(true), &["west"]).await?;
        let (west, east) = (&world.clusters[0], &world.clusters[1]);
        settled(&world).await?;
        everything(east, "alpha").await?;
        everything(west, "beta").await
    });
}

#[test]
#[ignore = "needs root and network namespaces"]
fn two_clusters_behind_nat_meet_through_a_third() {
    scenario("two clusters behind NAT", async || {
        let options = Options {
            clusters: vec![
                ("hub", vec![("client", "v1")]),
                ("west", vec![("client", "v1"), ("alpha", "v1"), ("gamma", "v1")]),
                ("east", vec![("client", "v1"), ("beta", "v1"), ("gamma", "v2")]),
            ],
            ..options(true)
        };
        let mut world = World::start_hidden(&options, &["west", "east"]).await?;
        {
            let (hub, west, east) = (&world.clusters[0], &world.clusters[1], &world.clusters[2]);
            served_from(hub.workload("client"), "beta", &["east"]).await?;
            settled_pair(west, east).await?;
            everything(west, "beta").await?;
            everything(east, "alpha").await?;
            only_gamma(east)?;
            policy_holds(west).await?;
            east.remove("policy.yaml")?;
            served_from(west.workload("client"), "beta", &["east"]).await?;
        }
        // The way leads through the hub and nowhere else.
        world.clusters[0].kill_everything();
        let (west, east) = (&world.clusters[1], &world.clusters[2]);
        let mut c = calls(Protocol::Http1, "beta", 1);
        c.timeout_ms = 2_000;
        until("no way without the hub", CONVERGE, async || {
            let o = west.workload("client").call(&c).await?;
            ensure!(!o[0].ok, "{:?}", o[0]);
            Ok(())
        })
        .await?;
        all_ok("own services", &east.workload("client").call(&calls(Protocol::Http1, "beta", 5)).await?)?;
        println!("   without the hub each serves its own");
        Ok(())
    });
}

async fn settled_pair(west: &Cluster, east: &Cluster) -> anyhow::Result<()> {
    served_from(west.workload("client"), "beta", &["east"]).await?;
    served_from(east.workload("client"), "alpha", &["west"]).await?;
    served_from(west.workload("client"), "gamma", &["west", "east"]).await?;
    Ok(())
}
