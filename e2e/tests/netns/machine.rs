//! A machine that no platform knows: its proxy registers it in a WorkloadGroup and probes it.

use std::time::Duration;

use anyhow::ensure;
use flotilla_e2e::{
    netns::{NAMESPACE, Options, World, until},
    programs,
};
use mesh_testkit::call::Protocol;

use crate::{
    security::CONVERGE,
    support::{all_ok, calls, load, options, scenario},
};

/// The group, whose probe asks this port.
fn group(port: u16) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {{name: machines, namespace: {NAMESPACE}}}\nspec:\n  \
         metadata: {{labels: {{app: beta, kind: machine}}}}\n  template: {{serviceAccount: beta}}\n  probe: {{periodSeconds: 1, \
         failureThreshold: 2, httpGet: {{path: /, port: {port}}}}}\n"
    )
}

#[test]
#[ignore = "needs root and network namespaces"]
fn a_machine_registers_itself() {
    scenario("a machine that registers itself", async || {
        let mut world = World::start(&Options {
            clusters: vec![("west", vec![("client", "v1"), ("beta", "v1")])],
            ..options(false)
        })
        .await?;
        let west = &mut world.clusters[0];
        let client = west.workload("client").clone();
        let served = async |what: &str, wanted: bool| {
            until(what, CONVERGE, async || {
                let o = client.call(&calls(Protocol::Http1, "beta", 3)).await?;
                ensure!(o.iter().all(|o| o.ok == wanted), "{:?}", o.last());
                Ok(())
            })
            .await
        };
        // Nobody lists it.
        west.write_application(|w| w.service != "beta")?;
        served("beta has no workload", false).await?;
        west.write("machines.yaml", &group(8080))?;
        west.register("beta", "machines").await?;
        let after = served("it has registered", true).await?;
        let state = |west: &flotilla_e2e::netns::Cluster| west.debug("/pilot/debug/workloadz");
        let known = state(west)?;
        ensure!(
            known[0]["state"] == "healthy" && known[0]["group"] == format!("{NAMESPACE}/machines"),
            "{known}"
        );
        println!("   served {:.1} s after its proxy was ready", after.as_secs_f64());

        // Policies select it by labels that only its group has.
        west.write(
            "deny.yaml",
            &format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: deny, namespace: \
                 {NAMESPACE}}}\nspec: {{selector: {{matchLabels: {{kind: machine}}}}, action: DENY, rules: [{{}}]}}\n"
            ),
        )?;
        until("denied", CONVERGE, async || {
            let o = client.call(&calls(Protocol::Http1, "beta", 1)).await?;
            ensure!(o[0].error.contains("403"), "{:?}", o[0]);
            Ok(())
        })
        .await?;
        west.remove("deny.yaml")?;
        served("allowed again", true).await?;
        println!("   403 by a policy for its group's label");

        west.write("machines.yaml", &group(9))?;
        served("a failed probe", false).await?;
        let known = state(west)?;
        ensure!(known[0]["state"] == "unhealthy" && known[0]["reason"] != "", "{known}");
        west.write("machines.yaml", &group(8080))?;
        served("a good probe", true).await?;
        println!("   out of service while its probe fails, and back");

        // It has been written to disk.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (from, under) = (client.clone(), load("beta", Duration::from_secs(8)));
        let running = tokio::spawn(async move { from.call(&under).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        west.kill_control_plane();
        west.start_control_plane()?;
        west.control_plane_ready().await?;
        let o = running.await??;
        all_ok("while the control plane is killed and started again", &o)?;
        println!("   kill -9 of the control plane: {} requests, none failed", o.len());

        let pid = west.pid("beta-v1-proxy").unwrap_or_default();
        programs::run("kill", &["-TERM", &pid.to_string()])?.ok("kill")?;
        let left = until("it leaves", Duration::from_secs(3), async || {
            let known = state(west)?;
            ensure!(known[0]["state"] == "leaving", "{known}");
            Ok(())
        })
        .await?;
        println!("   told of its end after {:.1} s", left.as_secs_f64());
        Ok(())
    });
}
