//! Two clusters of processes on loopback addresses, joined, each with an east-west gateway and nothing else: what
//! scenarios between gateways need. `127.<n>.0.1` is a control plane, `127.<n>.0.3` its gateway, `127.<n>.1.1` the
//! one workload, which the scenario itself is.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use crate::{Args, process::Process};

const EAST_WEST: u16 = 15443;
const START: Duration = Duration::from_secs(60);
/// The service that east exports.
pub(crate) const SERVICE: &str = "sink";
/// Its port.
pub(crate) const PORT: u16 = 9080;

/// A cluster.
pub(crate) struct Cluster {
    name: &'static str,
    octet: u8,
    dir: PathBuf,
    flotilla: PathBuf,
    _control: Process,
    gateway: Option<Process>,
}

/// The pair, west calling east.
pub(crate) struct Mesh {
    pub(crate) west: Cluster,
    pub(crate) east: Cluster,
}

/// A binary of the release profile, or the one that was named.
fn binary(given: Option<&PathBuf>, name: &str, package: &str) -> anyhow::Result<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/release").join(name);
    let bin = given.cloned().unwrap_or(built);
    ensure!(bin.exists(), "{} is missing: cargo build --release --package {package}", bin.display());
    Ok(bin)
}

impl Mesh {
    /// Starts everything; the workload in east is whoever listens at [`Cluster::workload`].
    pub(crate) fn start(args: &Args, dir: &Path) -> anyhow::Result<Self> {
        let mut west = Cluster::start(args, dir, "west", 71)?;
        let mut east = Cluster::start(args, dir, "east", 72)?;
        west.operator(&["found"])?;
        let token = west.operator(&["token", "create"])?;
        west.start_gateway(args)?;
        east.operator(&["join-cluster", token.trim()])?;
        let ip = east.workload().ip();
        east.write(
            "service.yaml",
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {SERVICE}, namespace: bench}}\nspec:\n  selector: \
                 {{app: {SERVICE}}}\n  ports: [{{name: tcp, port: {PORT}}}]\n---\napiVersion: \
                 networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {SERVICE}, namespace: bench}}\nspec:\n  \
                 address: {ip}\n  serviceAccount: {SERVICE}\n  labels: {{app: {SERVICE}, security.istio.io/tlsMode: \
                 istio}}\n---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {{name: \
                 {SERVICE}, namespace: bench}}\n"
            ),
        )?;
        east.start_gateway(args)?;
        Ok(Self { west, east })
    }

    /// The gateways' processes.
    pub(crate) fn gateways(&self) -> impl Iterator<Item = &Process> {
        [&self.west, &self.east].into_iter().filter_map(|c| c.gateway.as_ref())
    }
}

impl Cluster {
    fn start(args: &Args, dir: &Path, name: &'static str, octet: u8) -> anyhow::Result<Self> {
        let flotilla = binary(args.flotilla.as_ref(), "flotilla", "flotilla")?;
        let dir = dir.join(name);
        for d in ["config", "state"] {
            fs::create_dir_all(dir.join(d))?;
        }
        let ip = Ipv4Addr::new(127, octet, 0, 1);
        let gateway = format!("127.{octet}.0.3:{EAST_WEST}");
        let flags = flags(
            "control-plane",
            &[
                ("cluster", name.into()),
                ("state-dir", dir.join("state").display().to_string()),
                ("config", dir.join("config").display().to_string()),
                ("xds", format!("{ip}:15012")),
                ("xds-plaintext", format!("{ip}:15010")),
                ("metrics", format!("{ip}:15014")),
                ("federation", format!("{ip}:15016")),
                ("mixer", format!("{ip}:9091")),
                ("gateway-address", gateway.clone()),
                ("gateway-via", gateway),
                ("transport", "quic,tcp".into()),
            ],
        );
        let log = dir.join("control-plane.log");
        let control = Process::start(args.load_cpu, &log, &flotilla.display().to_string(), &flags)?;
        let c = Self { name, octet, dir, flotilla, _control: control, gateway: None };
        c.transport("quic")?;
        c.answers(1, 15014, "/ready")?;
        Ok(c)
    }

    fn host(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.octet, 0, n)
    }

    /// The east-west gateway.
    pub(crate) fn east_west(&self) -> SocketAddr {
        (self.host(3), EAST_WEST).into()
    }

    /// Where the workload listens.
    pub(crate) fn workload(&self) -> SocketAddr {
        (Ipv4Addr::new(127, self.octet, 1, 1), PORT).into()
    }

    fn write(&self, file: &str, content: &str) -> anyhow::Result<()> {
        let new = self.dir.join("new");
        fs::write(&new, content)?;
        fs::rename(new, self.dir.join("config").join(file))?;
        Ok(())
    }

    /// Chooses how sessions that begin from now on leave this cluster: `tcp` or `quic`.
    pub(crate) fn transport(&self, transport: &str) -> anyhow::Result<()> {
        self.write(
            "mesh.yaml",
            &format!(
                "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: mesh}}\nspec: {{transport: \
                 {transport}}}\n"
            ),
        )
    }

    fn operator(&self, args: &[&str]) -> anyhow::Result<String> {
        let state = self.dir.join("state");
        let out = Command::new(&self.flotilla).args(args).arg("--state-dir").arg(state).output()?;
        ensure!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn start_gateway(&mut self, args: &Args) -> anyhow::Result<()> {
        let ip = self.host(3);
        let token = self.dir.join("token");
        let who = ["--namespace", "flotilla-system", "--service-account", "eastwest"];
        fs::write(&token, self.operator(&[&["token", "workload"], &who[..]].concat())?.trim())?;
        let mut list = flags(
            "gateway",
            &[
                ("discovery", format!("{}:15012", self.host(1))),
                ("root-cert", self.dir.join("state/ca/root-cert.pem").display().to_string()),
                ("token-file", token.display().to_string()),
                ("ip", ip.to_string()),
                ("workload", "eastwest".into()),
                ("namespace", "flotilla-system".into()),
                ("service-account", "eastwest".into()),
                ("cluster", self.name.into()),
                ("state-dir", self.dir.join("state/eastwest").display().to_string()),
                ("concurrency", args.concurrency.to_string()),
                ("admin", format!("{ip}:15000")),
                ("readiness", format!("{ip}:15021")),
                ("metrics", format!("{ip}:15090")),
                ("meta", "INTERCEPTION_MODE=NONE".into()),
                ("meta", "ROUTER_MODE=sni-dnat".into()),
                ("labels", "istio=eastwestgateway".into()),
                ("trunk", format!("{ip}:{EAST_WEST}")),
                ("trunk-deliver", format!("{ip}:{EAST_WEST}")),
                // The two are compared.
                ("trunk-transport", "quic".into()),
            ],
        );
        list.extend(args.trunk_workers.map(|n| format!("--trunk-workers={n}")));
        // The lean binary has no subcommands.
        list.remove(0);
        let program = binary(args.gateway.as_ref(), "flotilla-gateway", "gateway")?.display().to_string();
        let log = self.dir.join("gateway.log");
        let both = format!("{},{}", args.proxy_cpu, args.load_cpu);
        let cpus = if args.spread { both } else { args.proxy_cpu.to_string() };
        self.gateway = Some(Process::start_on(&cpus, &log, &program, &list)?);
        self.answers(3, 15021, "/healthz/ready")
    }

    fn answers(&self, host: u8, port: u16, path: &str) -> anyhow::Result<()> {
        let at = SocketAddr::from((self.host(host), port));
        let begun = Instant::now();
        while get(at, path).is_none_or(|a| !a.starts_with("HTTP/1.1 200")) {
            if begun.elapsed() > START {
                bail!("{}: http://{at}{path} is not ready, see {}", self.name, self.dir.display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// A metric of the gateway.
    pub(crate) fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let text = get((self.host(3), 15090).into(), "/stats/prometheus").context("no metrics")?;
        let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|r| r.starts_with([' ', '{'])));
        let value = line.and_then(|l| l.rsplit(' ').next()?.parse().ok());
        value.with_context(|| format!("the gateway has no {name}"))
    }
}

fn flags(command: &str, list: &[(&str, String)]) -> Vec<String> {
    std::iter::once(command.to_owned()).chain(list.iter().map(|(k, v)| format!("--{k}={v}"))).collect()
}

/// Head and body of an answer.
fn get(at: SocketAddr, path: &str) -> Option<String> {
    let mut s = TcpStream::connect_timeout(&at, Duration::from_secs(2)).ok()?;
    s.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(s, "GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = Vec::new();
    s.read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}
