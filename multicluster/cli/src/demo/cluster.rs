//! One cluster of the demo: its addresses, processes and directories.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use mesh_runtime::ports;

use super::{TransportArg, config, http, process::Process};

/// Names of the clusters, in order.
pub(crate) const NAMES: [&str; 6] = ["west", "east", "north", "south", "up", "down"];
/// Namespace of the sample application.
pub(crate) const NAMESPACE: &str = "bookstore";
/// Port of its services.
pub(crate) const PORT: u16 = 9080;
/// Port of the ingress gateway; 80 would need root.
pub(crate) const INGRESS_PORT: u16 = 8080;

/// A workload of the sample application.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) service: &'static str,
    pub(crate) version: &'static str,
    ip: Ipv4Addr,
}

impl Workload {
    pub(crate) fn name(&self) -> String {
        format!("{}-{}", self.service, self.version)
    }

    /// Where its sidecar takes calls to others.
    pub(crate) fn proxy(&self) -> SocketAddr {
        SocketAddr::from((self.ip, ports::OUTBOUND))
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        SocketAddr::from((self.ip, ports::ADMIN))
    }

    pub(crate) fn ip(&self) -> Ipv4Addr {
        self.ip
    }
}

/// A cluster.
pub(crate) struct Cluster {
    pub(crate) name: &'static str,
    net: [u8; 2],
    dir: PathBuf,
    pub(crate) workloads: Vec<Workload>,
    transport: TransportArg,
    processes: Vec<Process>,
}

impl Cluster {
    /// Chooses addresses and writes the cluster's configuration.
    pub(crate) fn new(index: usize, octet: u8, dir: &Path, transport: TransportArg) -> anyhow::Result<Self> {
        let name = NAMES[index];
        let net = [127, octet];
        let services: &[(&'static str, &'static str)] = match index {
            0 => &[("storefront", "v1"), ("catalog", "v1"), ("reviews", "v1")],
            1 => &[("reviews", "v2"), ("reviews", "v3"), ("ratings", "v1")],
            _ => &[("reviews", "v3")],
        };
        let workloads = services
            .iter()
            .zip(1u8..)
            .map(|((service, version), n)| Workload {
                service,
                version,
                ip: Ipv4Addr::new(net[0], net[1], 1, n),
            })
            .collect();
        let dir = dir.join(name);
        for d in ["config", "state", "logs", "tokens"] {
            mesh_runtime::files::private_dir(&dir.join(d))?;
        }
        let cluster = Self { name, net, dir, workloads, transport, processes: vec![] };
        cluster.write("app.yaml", &config::application(&cluster))?;
        Ok(cluster)
    }

    fn host(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(self.net[0], self.net[1], 0, n)
    }

    pub(crate) fn control_plane(&self) -> Ipv4Addr {
        self.host(1)
    }

    pub(crate) fn ingress(&self) -> SocketAddr {
        SocketAddr::from((self.host(2), INGRESS_PORT))
    }

    pub(crate) fn east_west(&self) -> SocketAddr {
        SocketAddr::from((self.host(3), ports::EAST_WEST))
    }

    pub(crate) fn state(&self) -> String {
        self.dir.join("state").display().to_string()
    }

    pub(crate) fn workload(&self, service: &str, version: &str) -> anyhow::Result<&Workload> {
        self.workloads
            .iter()
            .find(|w| w.service == service && w.version == version)
            .with_context(|| format!("{service} {version} does not run in {}", self.name))
    }

    /// Writes (or replaces) a file of the cluster's configuration; it applies by itself.
    pub(crate) fn write(&self, file: &str, content: &str) -> anyhow::Result<()> {
        mesh_runtime::files::write_private(&self.dir.join("config").join(file), content.as_bytes())?;
        Ok(())
    }

    pub(crate) fn log(&self, process: &str) -> String {
        std::fs::read_to_string(self.dir.join("logs").join(format!("{process}.log"))).unwrap_or_default()
    }

    fn start(&mut self, name: &str, args: Vec<String>) -> anyhow::Result<()> {
        let p = Process::start(name, &self.dir.join("logs"), &args)?;
        self.processes.push(p);
        Ok(())
    }

    /// Starts the control plane; it needs no mesh yet.
    pub(crate) fn start_control_plane(&mut self) -> anyhow::Result<()> {
        let ip = self.control_plane();
        let east_west = self.east_west();
        let transport = match self.transport {
            TransportArg::Tcp => "tcp",
            TransportArg::Quic => "quic,tcp",
        };
        let args = flags(
            "control-plane",
            &[
                ("cluster", self.name.into()),
                ("state-dir", self.state()),
                ("config", self.dir.join("config").display().to_string()),
                ("xds", format!("{ip}:{}", ports::XDS)),
                ("xds-plaintext", format!("{ip}:{}", ports::XDS_PLAINTEXT)),
                ("metrics", format!("{ip}:{}", ports::CONTROL_METRICS)),
                ("federation", format!("{ip}:{}", ports::FEDERATION)),
                ("mixer", format!("{ip}:{}", ports::MIXER)),
                ("gateway-address", east_west.to_string()),
                ("gateway-via", east_west.to_string()),
                ("transport", transport.into()),
            ],
        );
        self.start("control-plane", args)
    }

    fn proxy_flags(&self, workload: &str, account: &str, ip: Ipv4Addr) -> Vec<(&'static str, String)> {
        vec![
            ("discovery", format!("{}:{}", self.control_plane(), ports::XDS)),
            ("root-cert", self.dir.join("state/ca/root-cert.pem").display().to_string()),
            ("token-file", self.dir.join("tokens").join(account).display().to_string()),
            ("ip", ip.to_string()),
            ("workload", workload.to_owned()),
            ("service-account", account.to_owned()),
            ("cluster", self.name.to_owned()),
            ("state-dir", self.dir.join("state").join(workload).display().to_string()),
            ("concurrency", "1".to_owned()),
            ("admin", format!("{ip}:{}", ports::ADMIN)),
            ("readiness", format!("{ip}:{}", ports::READINESS)),
            ("metrics", format!("{ip}:{}", ports::PROXY_METRICS)),
            ("meta", "INTERCEPTION_MODE=NONE".to_owned()),
            ("locality", format!("{}/a", self.name)),
        ]
    }

    /// Starts gateways, services and their sidecars; they wait for the mesh by themselves.
    pub(crate) async fn start_data_plane(&mut self) -> anyhow::Result<()> {
        for account in ["ingress", "eastwest"] {
            self.write_token("flotilla-system", account).await?;
        }
        let mut f = self.proxy_flags("ingress", "ingress", self.host(2));
        f.extend([("namespace", "flotilla-system".into()), ("labels", "istio=ingressgateway".into())]);
        self.start("ingress", flags("gateway", &f))?;

        let mut f = self.proxy_flags("eastwest", "eastwest", self.host(3));
        f.extend([
            ("namespace", "flotilla-system".into()),
            ("labels", "istio=eastwestgateway".into()),
            ("meta", "ROUTER_MODE=sni-dnat".into()),
        ]);
        if self.transport == TransportArg::Quic {
            f.push(("trunk", self.east_west().to_string()));
            f.push(("trunk-deliver", self.east_west().to_string()));
        }
        self.start("eastwest", flags("gateway", &f))?;

        for w in self.workloads.clone() {
            self.write_token(NAMESPACE, w.service).await?;
            let app = SocketAddr::from((w.ip, PORT + 10_000));
            let name = w.name();
            let mut args = vec!["sample".to_owned()];
            args.extend(flags(
                "bookstore",
                &[
                    ("role", w.service.into()),
                    ("listen", app.to_string()),
                    ("version", w.version.into()),
                    ("cluster", self.name.into()),
                    ("namespace", NAMESPACE.into()),
                    ("http-proxy", w.proxy().to_string()),
                ],
            ));
            self.start(&name, args)?;
            let mut f = self.proxy_flags(&name, w.service, w.ip);
            f.extend([
                ("namespace", NAMESPACE.into()),
                ("labels", format!("app={},version={}", w.service, w.version)),
                ("meta", format!("HTTP_PROXY_PORT={}", ports::OUTBOUND)),
                ("meta", format!("FLOTILLA_INBOUND={{\"{PORT}\":\"{app}\"}}")),
            ]);
            self.start(&format!("{name}-sidecar"), flags("sidecar", &f))?;
        }
        Ok(())
    }

    async fn write_token(&self, namespace: &str, account: &str) -> anyhow::Result<()> {
        let (code, out, err) = super::process::command(&[
            "token",
            "workload",
            "--state-dir",
            &self.state(),
            "--namespace",
            namespace,
            "--service-account",
            account,
        ])
        .await?;
        if code != 0 {
            bail!("no token for {account}: {err}");
        }
        mesh_runtime::files::write_private(&self.dir.join("tokens").join(account), out.as_bytes())?;
        Ok(())
    }

    /// Waits until the control plane answers on its socket.
    pub(crate) async fn control_plane_up(&mut self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let page = SocketAddr::from((self.control_plane(), ports::CONTROL_METRICS));
        self.wait(page, "/ready", begun).await
    }

    /// Waits until every proxy has certificate and configuration.
    pub(crate) async fn data_plane_ready(&mut self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let mut hosts = vec![self.host(2), self.host(3)];
        hosts.extend(self.workloads.iter().map(|w| w.ip));
        for ip in hosts {
            self.wait(SocketAddr::from((ip, ports::READINESS)), "/healthz/ready", begun).await?;
        }
        Ok(begun.elapsed())
    }

    async fn wait(&mut self, address: SocketAddr, path: &str, begun: Instant) -> anyhow::Result<Duration> {
        loop {
            let answer = http::get(address, path, "demo", &[], Duration::from_secs(2)).await;
            let last = match answer {
                Ok(a) if a.status == 200 => return Ok(begun.elapsed()),
                Ok(a) => a.text(),
                Err(e) => format!("{e:#}"),
            };
            for p in &mut self.processes {
                p.check()?;
            }
            if begun.elapsed() > Duration::from_secs(30) {
                bail!("{}: http://{address}{path} is not ready after 30 s: {last}", self.name);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// `kill -9` of everything; answers how many processes.
    pub(crate) async fn kill_everything(&mut self) -> usize {
        let n = self.processes.len();
        for p in &mut self.processes {
            p.kill().await;
        }
        self.processes.clear();
        n
    }

    pub(crate) fn process_count(&self) -> usize {
        self.processes.len()
    }
}

fn flags(command: &str, list: &[(&str, String)]) -> Vec<String> {
    std::iter::once(command.to_owned()).chain(list.iter().map(|(k, v)| format!("--{k}={v}"))).collect()
}
