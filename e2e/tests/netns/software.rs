//! Software that is not ours through a pair of sidecars with mutual TLS, transparently captured: clients in one pod,
//! servers in another. Each row of the table is a check; its evidence is what the server's sidecar counted as
//! mutual TLS for that service meanwhile.

#[path = "software/checks.rs"]
mod checks;
#[path = "software/servers.rs"]
mod servers;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, bail, ensure};
use flotilla_e2e::{
    netns::{Cluster, NAMESPACE, Options, World, exec},
    programs,
};

use crate::support::scenario;

/// Ports and services of the servers.
pub(crate) struct Service {
    pub(crate) name: &'static str,
    pub(crate) port: u16,
    /// As Kubernetes' `appProtocol` would say.
    pub(crate) protocol: &'static str,
}

const fn service(name: &'static str, port: u16, protocol: &'static str) -> Service {
    Service { name, port, protocol }
}

pub(crate) const SERVICES: [Service; 12] = [
    service("nginx", 8180, "http"),
    service("nginx2", 8181, "http2"),
    service("pyhttp", 8182, "http"),
    service("nodejs", 8183, "http"),
    service("nghttpd", 8184, "http2"),
    service("grpcd", 8185, "grpc"),
    service("wsd", 8186, "http"),
    service("tcpd", 8187, "tcp"),
    service("postgres", 5432, "tcp"),
    service("mariadb", 3306, "tcp"),
    service("redis", 6379, "tcp"),
    service("sniffed", 8188, ""),
];

/// The world of these checks.
pub(crate) struct Lab {
    world: World,
    servers: servers::Servers,
    scripts: PathBuf,
    python: String,
}

impl Lab {
    fn cluster(&self) -> &Cluster {
        &self.world.clusters[0]
    }

    /// Runs a command in the clients' pod; it must succeed within two minutes.
    pub(crate) fn client(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut all = vec!["timeout", "120"];
        all.extend(args);
        let said = exec(&self.cluster().workload("client").netns, &all)?;
        ensure!(said.code == 0, "{args:?}: exit code {}: {} {}", said.code, said.out, said.err);
        Ok(said.out)
    }

    /// Runs a shell line in the clients' pod.
    pub(crate) fn shell(&self, line: &str) -> anyhow::Result<String> {
        self.client(&["sh", "-c", line])
    }

    /// Runs a script of these tests in the clients' pod.
    pub(crate) fn script(&self, name: &str, args: &[&str]) -> anyhow::Result<String> {
        let path = self.scripts.join(name).display().to_string();
        let interpreter = if name.ends_with(".js") { "node" } else { &self.python };
        let mut all = vec![interpreter, &path];
        all.extend(args);
        self.client(&all)
    }

    /// What the server's sidecar counted as mutual TLS: requests for a service, and connections, whose service an
    /// inbound TCP chain does not know; checks run one after the other.
    fn carried(&self, service: &str) -> anyhow::Result<(u64, u64)> {
        let page = self.cluster().admin("server-v1", "/stats/prometheus")?;
        let host = format!("destination_service_name=\"{service}\"");
        let sum = |name: &str, with: &str| {
            page.lines()
                .filter(|l| l.starts_with(name) && l.contains(with))
                .filter(|l| l.contains("connection_security_policy=\"mutual_tls\""))
                .filter(|l| {
                    l.contains("reporter=\"destination\"") && l.contains("source_principal=\"spiffe://")
                })
                .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
                .sum::<f64>() as u64
        };
        Ok((sum("istio_requests_total", &host), sum("istio_tcp_connections_opened_total", "")))
    }

    /// Resident memory of a sidecar in MiB.
    pub(crate) fn memory(&self, workload: &str) -> anyhow::Result<f64> {
        let pid = self.cluster().pid(&format!("{workload}-proxy")).context("no proxy")?;
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
        let pages: f64 = statm.split(' ').nth(1).context("statm")?.parse()?;
        Ok(pages / 256.0)
    }
}

#[test]
#[ignore = "needs root, network namespaces and the programs that cargo verify installs"]
fn real_software_through_a_pair_of_sidecars() {
    scenario("real software", async || {
        // A socket for each idle connection, in the client and in its sidecar.
        let files = rustix::process::Resource::Nofile;
        let mut limit = rustix::process::getrlimit(files);
        limit.current = limit.maximum;
        rustix::process::setrlimit(files, limit).context("open files")?;
        ensure!(
            limit.maximum.is_none_or(|m| m > 12_000),
            "10,000 connections need more open files: ulimit -Hn"
        );
        let options = Options {
            echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
            quic: false,
            trunk_transport: "quic",
            gateways: 1,
            namespace: |_| NAMESPACE,
            locality: |_| "",
            clusters: vec![("west", vec![("client", "v1"), ("server", "v1")])],
        };
        let world = World::start(&options).await?;
        let python = programs::venv_python();
        let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/netns/software");
        let servers = servers::Servers::start(&world, &scripts, &python).await?;
        let lab = Lab { world, servers, scripts, python };
        let mut failed = 0;
        let only = std::env::var("FLOTILLA_E2E_ONLY").unwrap_or_default();
        println!("  {:<2} {:<34} {:>6}  {:<24} what was seen", "", "check", "s", "over mutual TLS");
        for (n, check) in checks::all().iter().enumerate() {
            if !check.name.contains(&only) {
                continue;
            }
            let before = lab.carried(check.service)?;
            let begun = Instant::now();
            let mut said = (check.run)(&lab);
            let after = lab.carried(check.service)?;
            let (requests, connections) = (after.0 - before.0, after.1 - before.1);
            let evidence = if requests > 0 {
                format!("{requests} requests")
            } else {
                format!("{connections} connections")
            };
            if said.is_ok() && requests + connections == 0 {
                said = Err(anyhow::anyhow!("nothing was counted as mutual TLS for {}", check.service));
            }
            let (mark, said) = match said {
                Ok(s) => ("ok", s),
                Err(e) => {
                    failed += 1;
                    ("FAILED", format!("{e:#}"))
                }
            };
            let took = begun.elapsed().as_secs_f64();
            println!("  {:<2} {:<34} {took:>6.1}  {evidence:<24} {mark}: {said}", n + 1, check.name);
        }
        lab.servers.check()?;
        if failed > 0 {
            bail!("{failed} checks failed");
        }
        Ok(())
    });
}
