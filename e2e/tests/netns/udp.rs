//! Datagrams that applications send to services, with a real resolver and a real client of it.

use std::time::Duration;

use anyhow::ensure;
use flotilla_e2e::netns::{Cluster, NAMESPACE, Options, World, exec, until};

use crate::{capture::rules, support::scenario};

/// Address of the service.
const VIP: &str = "10.10.99.53";
/// Its port and the workload's differ, and neither is that of DNS, which the mesh's resolver takes.
const PORT: u16 = 5300;
const SERVER: u16 = 5399;
/// What the server says the name is at.
const NAME: &str = "answer.example.com";
const SAYS: &str = "192.0.2.77";

/// The service, whose workload has a proxy that takes datagrams or not.
fn service(ip: &str, proxy: bool) -> String {
    let mode = if proxy { ", security.istio.io/tlsMode: istio" } else { "" };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: names, namespace: {NAMESPACE}}}\nspec:\n  clusterIP: \
         '{VIP}'\n  selector: {{family: names}}\n  ports:\n  - {{name: dns, port: {PORT}, targetPort: {SERVER}, \
         protocol: UDP}}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: names, namespace: \
         {NAMESPACE}}}\nspec:\n  address: '{ip}'\n  serviceAccount: alpha\n  labels: {{family: names{mode}}}\n---\n"
    )
}

/// What `dig` of the client's application got.
fn dig(c: &Cluster, at: &str, port: u16, name: &str) -> anyhow::Result<String> {
    let (at, port) = (format!("@{at}"), port.to_string());
    Ok(c.as_app("client", &["dig", "+short", "+time=1", "+tries=1", "+notcp", &at, "-p", &port, name])?.out)
}

/// Datagrams that the client's proxy got from hosts of a cluster.
fn counted(c: &Cluster, cluster: &str) -> anyhow::Result<u64> {
    let page = exec(
        &c.workload("client").netns,
        &["curl", "-sS", "-m", "5", "http://127.0.0.1:15090/stats/prometheus"],
    )?;
    let line = page.out.lines().find(|l| {
        l.starts_with("flotilla_udp_datagrams_total") && l.contains(cluster) && l.contains("downstream_tx")
    });
    Ok(line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or(0))
}

/// Sessions that came to the server's proxy.
fn inbound(netns: &str) -> anyhow::Result<u64> {
    let page = exec(netns, &["curl", "-sS", "-m", "5", "http://127.0.0.1:15090/stats/prometheus"])?;
    let line = page
        .out
        .lines()
        .find(|l| l.starts_with("flotilla_udp_sessions_opened_total") && l.contains("inbound|"));
    Ok(line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or(0))
}

#[test]
#[ignore = "needs root and network namespaces"]
fn datagrams_to_services_are_captured() {
    scenario("udp", async || {
        let options = Options {
            echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
            quic: false,
            trunk_transport: "quic",
            gateways: 1,
            namespace: |_| NAMESPACE,
            locality: |_| "",
            clusters: vec![("west", vec![("client", "v1"), ("alpha", "v1")])],
        };
        let mut world = World::start(&options).await?;
        let c = &mut world.clusters[0];
        let alpha = c.workload("alpha").clone();
        let client = c.workload("client").netns.clone();
        c.write("names.yaml", &service(&alpha.ip, false))?;
        let mut server = std::process::Command::new("ip")
            .args([
                "netns",
                "exec",
                &alpha.netns,
                "dnsmasq",
                "--keep-in-foreground",
                "--no-resolv",
                "--no-hosts",
            ])
            .args(["--conf-file=/dev/null", "--pid-file=", "--user=nobody", "--bind-interfaces"])
            .args([&format!("--port={SERVER}"), &format!("--address=/{NAME}/{SAYS}")])
            .spawn()?;
        let flotilla = flotilla_e2e::programs::flotilla()?.display().to_string();
        let remove = [flotilla.as_str(), "iptables", "--remove"];
        exec(&client, &remove)?.ok("flotilla iptables --remove")?;
        let bare = rules(&client)?;
        let limit = Duration::from_secs(20);
        for backend in ["iptables", "nftables"] {
            let flags = ["--backend", backend, "--mode", "TPROXY", "--udp-ranges", "10.10.0.0/16"];
            c.recapture("client", &flags, true).await?;
            // The answer must come from the address that was asked, or dig does not take it.
            let took = until("the service answers", limit, async || {
                let said = dig(c, VIP, PORT, NAME)?;
                ensure!(said.trim() == SAYS, "{said}");
                Ok(())
            })
            .await?;
            for _ in 0..50 {
                ensure!(dig(c, VIP, PORT, NAME)?.trim() == SAYS);
            }
            let cluster = format!("outbound|{PORT}/udp||names.{NAMESPACE}.svc.cluster.local");
            let n = counted(c, &cluster)?;
            ensure!(n >= 51, "{n} answers passed through the proxy");
            // What nobody declared is passed on, through the proxy as well.
            ensure!(dig(c, &alpha.ip, SERVER, NAME)?.trim() == SAYS, "an undeclared destination");
            let passed = counted(c, "PassthroughCluster")?;
            ensure!(passed >= 1, "it did not pass through the proxy");
            // DNS is the mesh's resolver's, as before.
            let alpha_name = format!("names.{NAMESPACE}.svc.cluster.local");
            ensure!(dig(c, "10.10.0.1", 53, &alpha_name)?.trim() == VIP, "the mesh's resolver");
            // Where the workload has a proxy, they go through it, in a connection of QUIC that others cannot read.
            let start = inbound(&alpha.netns)?;
            c.write("names.yaml", &service(&alpha.ip, true))?;
            until("datagrams go through the workload's proxy", limit, async || {
                ensure!(dig(c, VIP, PORT, NAME)?.trim() == SAYS);
                ensure!(inbound(&alpha.netns)? > start, "none does");
                Ok(())
            })
            .await?;
            let before = inbound(&alpha.netns)?;
            for _ in 0..20 {
                ensure!(dig(c, VIP, PORT, NAME)?.trim() == SAYS);
            }
            let secure = inbound(&alpha.netns)? - before;
            ensure!(secure >= 20, "{secure} of 20 went through the workload's proxy");
            c.write("names.yaml", &service(&alpha.ip, false))?;
            println!("   {backend:<9} {secure} sessions of 20 through the workload's proxy");
            println!(
                "   {backend:<9} first answer after {} ms; {n} answers of the service, {passed} passed on",
                took.as_millis()
            );
            exec(&client, &remove)?.ok("flotilla iptables --remove")?;
            let left = rules(&client)?;
            ensure!(left == bare, "{backend}: removal left\n{left}instead of\n{bare}");
            ensure!(dig(c, VIP, PORT, NAME)?.trim() != SAYS, "the service's address leads nowhere by itself");
        }
        let _ = server.kill();
        let _ = server.wait();
        Ok(())
    });
}
