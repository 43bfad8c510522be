//! Every way to capture traffic, with both address families and real curl.

use anyhow::{Context, ensure};
use flotilla_e2e::netns::{Cluster, NAMESPACE, Options, World, exec, until};
use mesh_testkit::ports;
use serde_json::Value;

use crate::support::scenario;

/// Address of the service over IPv6.
const VIP6: &str = "fd00:99::1";
/// A port of the workload that no service declares.
const UNDECLARED: u16 = 7777;
/// Outside of the mesh: a server in the node's namespace.
const OUTSIDE: u16 = 7000;

/// A service of alpha at its IPv6 address, and one for its IPv4 address that curl can name without a resolver.
fn services(alpha4: &str, alpha6: &str) -> String {
    let mut out = String::new();
    for (name, vip, ip) in [("four", "10.10.99.1", alpha4), ("six", VIP6, alpha6)] {
        let (http, first) = (ports::HTTP, ports::TCP_FIRST);
        out.push_str(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\nspec:\n  \
             clusterIP: '{vip}'\n  selector: {{family: {name}}}\n  ports:\n  - {{name: http, port: {http}}}\n  \
             - {{name: tcp-first, port: {first}}}\n---\n\
             apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: \
             {NAMESPACE}}}\nspec:\n  address: '{ip}'\n  serviceAccount: alpha\n  labels: {{family: {name}, \
             security.istio.io/tlsMode: istio}}\n---\n"
        ));
    }
    out
}

/// `[address]:port` or `address:port`.
fn at(ip: &str, port: u16) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

/// What curl got: the answer's body and headers, both in one text; empty if it got none.
fn curl(c: &Cluster, from: &str, url: &str) -> anyhow::Result<String> {
    Ok(c.as_app(from, &["curl", "-sS", "-i", "-m", "5", url])?.out)
}

/// All rules and routes of a namespace, without counters and handles.
pub(crate) fn rules(netns: &str) -> anyhow::Result<String> {
    let mut out = String::new();
    for command in [
        "iptables-save -t nat",
        "iptables-save -t mangle",
        "ip6tables-save -t nat",
        "ip6tables-save -t mangle",
        "nft list table inet flotilla",
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 route show table 133",
        "ip -6 route show table 133",
        "ip -6 addr show dev lo",
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        let said = exec(netns, &words)?;
        // Empty tables that a tool made by looking are nothing.
        let kept = said
            .out
            .lines()
            .filter(|l| l.starts_with('-') || !command.starts_with("ip") || !command.contains("save"));
        out.extend(kept.map(|l| format!("{}\n", l.trim())));
    }
    Ok(out)
}

#[test]
#[ignore = "needs root and network namespaces"]
fn every_backend_and_mode_in_both_families() {
    scenario("capture", async || {
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
        c.enable_ipv6()?;
        let (client, alpha) = (c.workload("client").clone(), c.workload("alpha").clone());
        c.write("families.yaml", &services(&alpha.ip, &alpha.ip6()))?;
        // What was there before any rule of ours: the world has installed the usual ones.
        let flotilla = |netns: &str, args: &[&str]| -> anyhow::Result<String> {
            let program = flotilla_e2e::programs::flotilla()?.display().to_string();
            let mut all = vec![program.as_str(), "iptables"];
            all.extend(args);
            exec(netns, &all)?.ok("flotilla iptables")
        };
        for w in [&client, &alpha] {
            flotilla(&w.netns, &["--remove"])?;
        }
        let bare = rules(&client.netns)?;
        ensure!(!bare.contains("FLOTILLA"), "{bare}");
        c.start_page("alpha", &format!("[::]:{UNDECLARED}"))?;
        let mut outside = std::process::Command::new("ip")
            .args(["netns", "exec", &c.netns("node"), env!("CARGO_BIN_EXE_flotilla-echo")])
            .args(["--workload=outside", "--cluster=none", &format!("--page=[::]:{OUTSIDE}")])
            .spawn()?;
        let mut failed = Vec::new();
        for (backend, mode) in [
            ("iptables", "REDIRECT"),
            ("nftables", "REDIRECT"),
            ("iptables", "TPROXY"),
            ("nftables", "TPROXY"),
        ] {
            let tproxy = mode == "TPROXY";
            let flags = ["--backend", backend, "--mode", mode, "-x", "10.10.0.1/32", "-d", "2222"];
            for service in ["client", "alpha"] {
                c.recapture(service, &flags, tproxy).await?;
            }
            // Twice is the same as once.
            let once = rules(&client.netns)?;
            flotilla(&client.netns, &[&["--dns-port", "15053"], &flags[..]].concat())?;
            ensure!(rules(&client.netns)? == once, "{backend} {mode}: installed twice it differs");
            let other = if backend == "iptables" { "table inet flotilla" } else { "-A FLOTILLA" };
            ensure!(once.contains("FLOTILLA") && !once.contains(other), "{backend} {mode}: {once}");

            let mut rows = checks(c, mode).await?;
            rows.push(("REGISTRY_ONLY".to_owned(), blocked(c).await?));
            for (what, ok) in rows {
                println!("   {backend:<9} {mode:<9} {what:<62} {}", if ok { "ok" } else { "FAIL" });
                if !ok {
                    failed.push(format!("{backend} {mode}: {what}"));
                }
            }
            for w in [&client, &alpha] {
                flotilla(&w.netns, &["--remove"])?;
            }
            let left = rules(&client.netns)?;
            ensure!(left == bare, "{backend} {mode}: removal left\n{left}instead of\n{bare}");
        }
        let _ = outside.kill();
        let _ = outside.wait();
        ensure!(failed.is_empty(), "failed:\n{}", failed.join("\n"));
        Ok(())
    });
}

async fn checks(c: &Cluster, mode: &str) -> anyhow::Result<Vec<(String, bool)>> {
    let mut out = Vec::new();
    let mut row = |what: String, ok: bool| out.push((what, ok));
    let alpha = c.workload("alpha").clone();
    for (family, vip, ip, node) in
        [("IPv4", "10.10.99.1", alpha.ip.clone(), "10.10.0.1"), ("IPv6", VIP6, alpha.ip6(), "fd00:10::1")]
    {
        let url = |ip: &str, port: u16| format!("http://{}/", at(ip, port));
        // A service: captured on both sides, mutual TLS between them.
        let mut seen = String::new();
        let mut mutual = |from: &str| -> anyhow::Result<()> {
            seen = curl(c, from, &url(vip, ports::HTTP))?;
            let body = seen.split("\r\n\r\n").nth(1).unwrap_or_default();
            let answer: Value = serde_json::from_str(body).with_context(|| seen.clone())?;
            let cert = answer["headers"]["x-forwarded-client-cert"].as_str().unwrap_or_default();
            ensure!(cert.contains(&format!("ns/{NAMESPACE}/sa/{from}")), "{seen}");
            Ok(())
        };
        let limit = std::time::Duration::from_secs(15);
        let r = until(&format!("{mode} {family}"), limit, async || mutual("client")).await;
        row(
            format!(
                "{family}: a service, mutual TLS{}",
                r.as_ref().err().map(|e| format!(" {e:#}")).unwrap_or_default()
            ),
            r.is_ok(),
        );
        let r = until("alpha calls itself", limit, async || mutual("alpha")).await;
        row(format!("{family}: a workload that calls itself by its service"), r.is_ok());
        // A server that speaks first on a declared port: nobody waits for the client's first byte.
        // The best of three, since starting a shell takes its time too; inspection would take 500 ms of each.
        let read = format!("exec 3<>/dev/tcp/{vip}/{} && read -t 5 line <&3 && echo $line", ports::TCP_FIRST);
        let mut fastest = std::time::Duration::MAX;
        for _ in 0..3 {
            let begun = std::time::Instant::now();
            if c.as_app("client", &["bash", "-c", &read])?.out.contains("tcp-first") {
                fastest = fastest.min(begun.elapsed());
            }
        }
        row(
            format!("{family}: a server that speaks first, {} ms", fastest.as_millis().min(9999)),
            fastest.as_millis() < 400,
        );
        // Undeclared: passed through by both proxies.
        let r = curl(c, "client", &url(&ip, UNDECLARED))?;
        row(format!("{family}: a port that no service declares"), r.contains("page of alpha"));
        // From outside of the mesh, in clear, through alpha's proxy.
        let direct = exec(&c.netns("node"), &["curl", "-sS", "-i", "-m", "5", &url(&ip, ports::HTTP)])?;
        row(
            format!("{family}: from outside, in clear"),
            direct.out.contains("x-envoy-upstream-service-time"),
        );
        // To outside: excluded range over IPv4, passed through over IPv6.
        let r = curl(c, "client", &url(node, OUTSIDE))?;
        row(format!("{family}: a destination that nobody declared"), r.contains("page of outside"));
    }
    // As an HTTP proxy, by an absolute URI and by CONNECT.
    let proxy = format!("http://{}:15002", c.workload("client").ip);
    let url = format!("http://alpha.{NAMESPACE}.svc.cluster.local:{}/", ports::HTTP);
    for (how, flag) in [("an absolute URI", "-4"), ("CONNECT", "--proxytunnel")] {
        let r = c.as_app("client", &["curl", "-sS", "-m", "5", flag, "-x", &proxy, &url])?.out;
        row(format!("HTTP proxy, {how}"), r.contains("\"workload\":\"alpha\""));
    }
    Ok(out)
}

/// With `REGISTRY_ONLY`, undeclared destinations are nowhere, and declared ones where they were.
async fn blocked(c: &Cluster) -> anyhow::Result<bool> {
    let mesh = "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\n\
                spec: {outboundTrafficPolicy: {mode: REGISTRY_ONLY}}\n";
    c.write("mesh.yaml", mesh)?;
    let limit = std::time::Duration::from_secs(15);
    let outside = format!("http://{}/", at("fd00:10::1", OUTSIDE));
    let r = until("undeclared destinations are blocked", limit, async || {
        let r = curl(c, "client", &outside)?;
        ensure!(!r.contains("page of"), "{r}");
        Ok(())
    })
    .await;
    let declared = curl(c, "client", &format!("http://{}/", at(VIP6, ports::HTTP)))?;
    c.remove("mesh.yaml")?;
    until("undeclared destinations are passed through", limit, async || {
        let r = curl(c, "client", &outside)?;
        ensure!(r.contains("page of"), "{r}");
        Ok(())
    })
    .await?;
    Ok(r.is_ok() && declared.contains(" 200 "))
}
