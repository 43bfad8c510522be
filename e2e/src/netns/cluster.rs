//! One cluster: its namespaces, programs and configuration.

mod lifecycle;

use std::{
    fmt::Write as _,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{APP_UID, Options, PROXY_UID, as_user, directory, exec, namespace, public_copy, until};
use anyhow::{Context, ensure};
use mesh_testkit::{
    call::{Calls, Outcome},
    control, ports,
};

use crate::programs::{self, Process, Said, must};

/// Namespace (of the mesh) of the workloads.
pub const NAMESPACE: &str = "shop";
const SYSTEM: &str = "flotilla-system";
const CONTROL_PLANE: &str = "10.10.0.2";

/// Name of a gateway's workload, counted from 0; the first is alone in most worlds.
fn gateway_name(n: usize) -> String {
    if n == 0 { "eastwest".into() } else { format!("eastwest{}", n + 1) }
}

/// Address of a gateway in its cluster.
fn gateway_ip(n: usize) -> String {
    format!("10.10.0.{}", n + 3)
}

/// A workload.
#[derive(Debug, Clone)]
pub struct Workload {
    pub service: &'static str,
    pub version: &'static str,
    /// Namespace of the mesh.
    pub namespace: &'static str,
    /// Pod address; another cluster has a pod with the same one.
    pub ip: String,
    /// Network namespace.
    pub netns: String,
    control: PathBuf,
}

impl Workload {
    /// `service-version`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}-{}", self.service, self.version)
    }

    /// Its IPv6 address, where the cluster has that.
    #[must_use]
    pub fn ip6(&self) -> String {
        self.ip.replace("10.10.1.", "fd00:10::1:")
    }

    /// Lets the workload call.
    ///
    /// # Errors
    /// The workload does not answer; failed calls are outcomes, not errors.
    pub async fn call(&self, calls: &Calls) -> anyhow::Result<Vec<Outcome>> {
        control::order(&self.control, calls).await
    }
}

/// A cluster; dropping it kills its programs.
pub struct Cluster {
    pub name: &'static str,
    pub workloads: Vec<Workload>,
    index: usize,
    prefix: String,
    dir: PathBuf,
    locality: fn(&str) -> &'static str,
    flotilla: PathBuf,
    echo: PathBuf,
    quic: bool,
    trunk_transport: &'static str,
    gateways: usize,
    hidden: bool,
    control_plane: Option<Process>,
    data_plane: Vec<Process>,
}

impl Cluster {
    pub(super) fn build(
        index: usize,
        name: &'static str,
        workloads: &[(&'static str, &'static str)],
        prefix: &str,
        dir: &Path,
        flotilla: &Path,
        options: &Options,
    ) -> anyhow::Result<Self> {
        let prefix = format!("{prefix}-{name}");
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir)?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o711))?;
        for d in ["config", "state", "logs"] {
            directory(&dir.join(d), 0)?;
        }
        let node = format!("{prefix}-node");
        namespace(&node)?;
        must(&format!("ip -n {node} link add br0 type bridge"))?;
        must(&format!("ip -n {node} addr add 10.10.0.1/16 dev br0"))?;
        must(&format!("ip -n {node} link set br0 up"))?;
        let workloads = workloads
            .iter()
            .enumerate()
            .map(|(n, (service, version))| Workload {
                service,
                version,
                namespace: (options.namespace)(service),
                ip: format!("10.10.1.{}", n + 1),
                netns: format!("{prefix}-{service}-{version}"),
                control: dir.join(format!("app-{service}-{version}/control.sock")),
            })
            .collect();
        let c = Self {
            name,
            workloads,
            index,
            prefix,
            dir,
            locality: options.locality,
            flotilla: flotilla.to_owned(),
            echo: options.echo.clone(),
            quic: options.quic,
            trunk_transport: options.trunk_transport,
            gateways: options.gateways,
            hidden: false,
            control_plane: None,
            data_plane: vec![],
        };
        c.pod(&c.netns("cp"), CONTROL_PLANE, 1)?;
        for n in 0..c.gateways {
            c.pod(&c.gateway_netns(n), &gateway_ip(n), n + 2)?;
        }
        for (n, w) in c.workloads.iter().enumerate() {
            c.pod(&w.netns, &w.ip, n + 2 + c.gateways)?;
            directory(&c.dir.join(format!("app-{}", w.name())), APP_UID)?;
        }
        c.write("app.yaml", &c.application(|_| true))?;
        Ok(c)
    }

    /// Whether nobody can dial the gateway.
    pub(super) fn hidden(self, hidden: bool) -> Self {
        Self { hidden, ..self }
    }

    /// Name of a namespace of this cluster: `cp`, `gw`, `node`.
    #[must_use]
    pub fn netns(&self, part: &str) -> String {
        format!("{}-{part}", self.prefix)
    }

    /// How many gateways it has.
    #[must_use]
    pub fn gateways(&self) -> usize {
        self.gateways
    }

    /// Namespace of a gateway: `gw`, `gw2`, ...
    #[must_use]
    pub fn gateway_netns(&self, n: usize) -> String {
        self.netns(&if n == 0 { "gw".into() } else { format!("gw{}", n + 1) })
    }

    /// A namespace with one interface on the cluster's bridge.
    fn pod(&self, netns: &str, ip: &str, n: usize) -> anyhow::Result<()> {
        let node = self.netns("node");
        namespace(netns)?;
        must(&format!("ip link add eth0 netns {netns} type veth peer name v{n} netns {node}"))?;
        must(&format!("ip -n {node} link set v{n} master br0 up"))?;
        must(&format!("ip -n {netns} addr add {ip}/16 dev eth0"))?;
        must(&format!("ip -n {netns} link set eth0 up"))?;
        must(&format!("ip -n {netns} route add default via 10.10.0.1"))?;
        // No resolver lives there: what asks it is captured.
        let etc = Path::new("/etc/netns").join(netns);
        std::fs::create_dir_all(&etc)?;
        let resolv =
            format!("nameserver 10.10.0.1\nsearch {NAMESPACE}.svc.cluster.local\noptions timeout:2\n");
        std::fs::write(etc.join("resolv.conf"), resolv)?;
        std::fs::write(etc.join("hosts"), "127.0.0.1 localhost\n")?;
        Ok(())
    }

    /// Connects the gateways to the link; answers with the interfaces at the link's end.
    pub(super) fn join_wan(&self, wan: &str) -> anyhow::Result<Vec<String>> {
        (0..self.gateways).map(|n| self.connect_gateway(n, wan)).collect()
    }

    fn connect_gateway(&self, n: usize, wan: &str) -> anyhow::Result<String> {
        let (gw, port) = (self.gateway_netns(n), format!("gw{}-{n}", self.index));
        must(&format!("ip link add wan0 netns {gw} type veth peer name {port} netns {wan}"))?;
        must(&format!("ip -n {gw} addr add {}/24 dev wan0", self.gateway_wan_ip(n)))?;
        // Frames must be complete when they are read: no checksum or segment left to hardware.
        must(&format!("ip netns exec {gw} ethtool -K wan0 tx off tso off gso off gro off"))?;
        must(&format!("ip -n {gw} link set wan0 up"))?;
        must(&format!("ip -n {wan} link set {port} up"))?;
        if self.hidden {
            let rule = format!("ip netns exec {gw} iptables -A INPUT -i wan0");
            must(&format!("{rule} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"))?;
            must(&format!("{rule} -j DROP"))?;
        }
        Ok(port)
    }

    /// Address of the first gateway on the link.
    #[must_use]
    pub fn wan_ip(&self) -> String {
        self.gateway_wan_ip(0)
    }

    fn gateway_wan_ip(&self, n: usize) -> String {
        format!("172.31.0.{}", self.index * 10 + n + 11)
    }

    /// Writes the services again, where workloads that `with` does not choose
    /// have left their service for one of the same ports that nobody calls, named `spare`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_application(&self, with: impl Fn(&Workload) -> bool) -> anyhow::Result<()> {
        self.write("app.yaml", &self.application(with))
    }

    fn application(&self, with: impl Fn(&Workload) -> bool) -> String {
        let mut out = String::new();
        let mut seen: Vec<&str> = vec![];
        for w in &self.workloads {
            let (s, namespace) = (w.service, w.namespace);
            if !seen.contains(&s) {
                seen.push(s);
                let _ = write!(
                    out,
                    "apiVersion: v1\nkind: Service\nmetadata: {{name: {s}, namespace: {namespace}}}\nspec:\n  \
                     selector: {{app: {s}}}\n  ports:\n"
                );
                for (name, port) in [
                    ("http", ports::HTTP),
                    ("http2", ports::HTTP2),
                    ("grpc", ports::GRPC),
                    ("tcp", ports::TCP),
                    ("tcp-first", ports::TCP_FIRST),
                ] {
                    let _ = writeln!(out, "  - {{name: {name}, port: {port}}}");
                }
                let _ = write!(
                    out,
                    "---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\n\
                     metadata: {{name: {s}, namespace: {namespace}}}\n---\n"
                );
            }
            let app = if with(w) { s } else { "spare" };
            let _ = write!(
                out,
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {}, namespace: \
                 {namespace}}}\nspec:\n  address: {}\n  locality: {:?}\n  serviceAccount: {s}\n  labels: {{app: {app}, version: {}, \
                 security.istio.io/tlsMode: istio}}\n---\n",
                w.name(),
                w.ip,
                (self.locality)(w.version),
                w.version,
            );
        }
        out
    }

    /// Writes (or replaces) a file of the cluster's configuration; it applies by itself.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, file: &str, content: &str) -> anyhow::Result<()> {
        // By renaming, so that no half of it is ever read.
        let dir = self.dir.join("config");
        let new = self.dir.join(format!("new-{file}"));
        std::fs::write(&new, content)?;
        std::fs::rename(&new, dir.join(file))?;
        Ok(())
    }

    /// Removes a file of the cluster's configuration.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, file: &str) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.dir.join("config").join(file))?)
    }

    /// State directory of the control plane.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// State directory of the gateway.
    #[must_use]
    pub fn gateway_state(&self) -> PathBuf {
        self.dir.join("proxy-eastwest/state")
    }

    /// State directory of a workload's proxy.
    #[must_use]
    pub fn proxy_state(&self, w: &Workload) -> PathBuf {
        self.dir.join(format!("proxy-{}/state", w.name()))
    }

    /// Process ID of a running program: `eastwest-proxy`, `<workload>-proxy`, `<workload>-app`.
    #[must_use]
    pub fn pid(&self, name: &str) -> Option<u32> {
        self.data_plane.iter().find(|p| p.name == name).map(Process::id)
    }

    /// Runs an operator's command in the namespace of the gateway, from where peers can be reached.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn flotilla(&self, args: &[&str]) -> anyhow::Result<Said> {
        let (program, state) = (self.flotilla.display().to_string(), self.state().display().to_string());
        let mut all = vec![program.as_str()];
        all.extend(args);
        all.extend(["--state-dir", &state]);
        exec(&self.netns("gw"), &all)
    }

    /// Whether nobody can dial its gateways.
    pub(super) fn is_hidden(&self) -> bool {
        self.hidden
    }

    /// Lets `newcomer` join, which waits to be dialled.
    ///
    /// # Errors
    /// No token, or no join.
    pub(super) fn dial_newcomer(&self, newcomer: &Self) -> anyhow::Result<()> {
        let at = format!("{}:15443", newcomer.wan_ip());
        let command = [
            "ip",
            "netns",
            "exec",
            &self.netns("gw"),
            &self.flotilla.display().to_string(),
            "token",
            "create",
            "--dial",
            &at,
            "--control-plane",
            &format!("{CONTROL_PLANE}:15016"),
            "--state-dir",
            &self.state().display().to_string(),
        ]
        .map(str::to_owned);
        let name = format!("dial-{}", newcomer.name);
        let mut dialler = Process::start(&name, &self.dir.join("logs"), &command)?;
        let begun = std::time::Instant::now();
        let token = loop {
            if let Some(token) = self.log(&name).lines().find(|l| l.starts_with("flt1.")) {
                break token.to_owned();
            }
            dialler.check()?;
            ensure!(begun.elapsed() < Duration::from_secs(10), "no token within 10 s");
            std::thread::sleep(Duration::from_millis(20));
        };
        newcomer.flotilla(&["join-cluster", &token, "--accept", &at])?.ok("join-cluster --accept")?;
        dialler.ends_well(Duration::from_secs(10))
    }

    /// A page of the control plane's debug socket.
    ///
    /// # Errors
    /// No control plane, or no JSON.
    pub fn debug(&self, path: &str) -> anyhow::Result<serde_json::Value> {
        let socket = self.state().join("debug.sock").display().to_string();
        let page = format!("http://localhost{path}");
        let out = programs::run("curl", &["-sS", "-m", "5", "--unix-socket", &socket, &page])?.ok(path)?;
        serde_json::from_str(&out).with_context(|| out)
    }

    /// A page of a proxy's admin port; `part` is a workload's name or `gw`.
    ///
    /// # Errors
    /// The proxy does not answer.
    pub fn admin(&self, part: &str, path: &str) -> anyhow::Result<String> {
        let page = format!("http://127.0.0.1:15000{path}");
        exec(&self.netns(part), &["curl", "-sS", "-m", "5", &page])?.ok(path)
    }

    /// The workload of a service.
    ///
    /// # Panics
    /// It has none: a mistake in the test.
    #[must_use]
    pub fn workload(&self, service: &str) -> &Workload {
        self.workloads.iter().find(|w| w.service == service).expect("a workload of this cluster")
    }

    /// What a program of this cluster logged.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.join("logs").join(format!("{name}.log"))).unwrap_or_default()
    }
}
