//! One cluster: its namespaces, programs and configuration.

use std::{
    fmt::Write as _,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{APP_UID, Options, PROXY_UID, as_user, directory, exec, namespace, public_copy, until};
use anyhow::{Context, ensure};
use mesh_testkit::{
    call::{Calls, Outcome},
    control, ports,
};
use serde_json::json;

use crate::programs::{self, Process, Said, must};

/// Namespace (of the mesh) of all workloads.
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
            let s = w.service;
            if !seen.contains(&s) {
                seen.push(s);
                let _ = write!(
                    out,
                    "apiVersion: v1\nkind: Service\nmetadata: {{name: {s}, namespace: {NAMESPACE}}}\nspec:\n  \
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
                     metadata: {{name: {s}, namespace: {NAMESPACE}}}\n---\n"
                );
            }
            let app = if with(w) { s } else { "spare" };
            let _ = write!(
                out,
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {}, namespace: \
                 {NAMESPACE}}}\nspec:\n  address: {}\n  locality: {:?}\n  serviceAccount: {s}\n  labels: {{app: {app}, version: {}, \
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

    /// Starts the control plane; it needs no mesh yet.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_control_plane(&mut self) -> anyhow::Result<()> {
        let flags = [
            ("cluster", self.name.to_owned()),
            ("state-dir", self.state().display().to_string()),
            ("config", self.dir.join("config").display().to_string()),
            ("gateway-via", format!("{}:15443", gateway_ip(0))),
            ("federation-address", format!("{CONTROL_PLANE}:15016")),
            ("transport", if self.quic { "quic,tcp" } else { "tcp" }.to_owned()),
        ];
        let mut command: Vec<String> = ["ip", "netns", "exec"].map(str::to_owned).to_vec();
        command.extend([self.netns("cp"), self.flotilla.display().to_string(), "control-plane".into()]);
        command.extend(flags.iter().map(|(k, v)| format!("--{k}={v}")));
        for n in 0..self.gateways {
            command.push(format!("--gateway-internal={}:15443", gateway_ip(n)));
            if !self.hidden {
                command.push(format!("--gateway-address={}:15443", self.gateway_wan_ip(n)));
            }
        }
        self.control_plane = Some(Process::start("control-plane", &self.dir.join("logs"), &command)?);
        Ok(())
    }

    /// `kill -9` of the control plane.
    pub fn kill_control_plane(&mut self) {
        self.control_plane = None;
    }

    /// `kill -9` of everything; answers how many programs.
    pub fn kill_everything(&mut self) -> usize {
        let n = self.data_plane.len() + usize::from(self.control_plane.is_some());
        // All at once: a cluster that dies does not die one by one.
        let pids: Vec<String> =
            self.control_plane.iter().chain(&self.data_plane).map(|p| p.id().to_string()).collect();
        let mut args = vec!["-9"];
        args.extend(pids.iter().map(String::as_str));
        let _ = programs::run("kill", &args);
        self.control_plane = None;
        self.data_plane.clear();
        n
    }

    /// `kill -9` of all workloads of a service and their proxies; answers how many programs.
    pub fn kill_service(&mut self, service: &str) -> usize {
        let names: Vec<String> = self
            .workloads
            .iter()
            .filter(|w| w.service == service)
            .flat_map(|w| [format!("{}-proxy", w.name()), format!("{}-app", w.name())])
            .collect();
        let (dead, alive): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.data_plane).into_iter().partition(|p| names.contains(&p.name));
        self.data_plane = alive;
        let pids: Vec<String> = dead.iter().map(|p| p.id().to_string()).collect();
        let mut args = vec!["-9"];
        args.extend(pids.iter().map(String::as_str));
        let _ = programs::run("kill", &args);
        dead.len()
    }

    /// Starts the workloads of a service again.
    ///
    /// # Errors
    /// A program cannot be started.
    pub fn start_service(&mut self, service: &str) -> anyhow::Result<()> {
        for w in self.workloads.clone().iter().filter(|w| w.service == service) {
            self.start_workload(w)?;
        }
        Ok(())
    }

    /// Starts the gateway, and a proxy and the application of every workload.
    ///
    /// # Errors
    /// A program cannot be started, or no token is to be had.
    pub fn start_data_plane(&mut self) -> anyhow::Result<()> {
        for n in 0..self.gateways {
            self.start_gateway(n)?;
        }
        for w in self.workloads.clone() {
            self.start_workload(&w)?;
        }
        Ok(())
    }

    /// Starts a gateway, counted from 0.
    ///
    /// # Errors
    /// It cannot be started, or no token is to be had.
    pub fn start_gateway(&mut self, n: usize) -> anyhow::Result<()> {
        let name = gateway_name(n);
        let mut flags = self.proxy(&name, SYSTEM, "eastwest", &gateway_ip(n))?;
        flags.extend(["--labels=istio=eastwestgateway".into(), "--meta=ROUTER_MODE=sni-dnat".into()]);
        if self.quic {
            flags.extend(["--trunk=0.0.0.0:15443".into(), "--trunk-deliver=127.0.0.1:15443".into()]);
        }
        self.start_proxy(&name, "gateway", &self.gateway_netns(n), flags)
    }

    /// Stops a gateway with SIGTERM and waits for its end; answers how long that took.
    ///
    /// # Errors
    /// It does not run, or does not end.
    pub async fn stop_gateway(&mut self, n: usize) -> anyhow::Result<Duration> {
        let name = format!("{}-proxy", gateway_name(n));
        let at = self.data_plane.iter().position(|p| p.name == name).context("no such gateway runs")?;
        self.data_plane.remove(at).terminate(Duration::from_secs(20)).await
    }

    /// Waits until a gateway is ready.
    ///
    /// # Errors
    /// It is not within half a minute.
    pub async fn gateway_ready(&mut self, n: usize) -> anyhow::Result<Duration> {
        let netns = self.gateway_netns(n);
        until(&netns, Duration::from_secs(30), async || {
            for p in &mut self.data_plane {
                p.check()?;
            }
            ready(&netns, "http://127.0.0.1:15021/healthz/ready")
        })
        .await
    }

    fn start_workload(&mut self, w: &Workload) -> anyhow::Result<()> {
        let name = w.name();
        let rules =
            [&*self.flotilla.display().to_string(), "iptables", "--dns-port", "15053"].map(str::to_owned);
        exec(&w.netns, &rules.each_ref().map(String::as_str))?.ok("flotilla iptables")?;
        let mut flags = self.proxy(&name, NAMESPACE, w.service, &w.ip)?;
        flags.push(format!("--labels=app={},version={}", w.service, w.version));
        flags.push("--dns=127.0.0.1:15053".into());
        self.start_proxy(&name, "sidecar", &w.netns, flags)?;
        // Of a predecessor that was killed.
        let _ = std::fs::remove_file(&w.control);
        let app = [
            self.echo.display().to_string(),
            format!("--workload={}", w.service),
            format!("--version={}", w.version),
            format!("--cluster={}", self.name),
            format!("--control={}", w.control.display()),
        ];
        let command = as_user(&w.netns, APP_UID, app.to_vec());
        let process = Process::start(&format!("{name}-app"), &self.dir.join("logs"), &command)?;
        self.data_plane.push(process);
        Ok(())
    }

    /// Captures a workload's traffic anew, with these flags, and starts its proxy again for it. The workload gets an
    /// IPv6 address beside the other, ending alike.
    ///
    /// # Errors
    /// The rules are refused, or the proxy does not come up.
    pub async fn recapture(&mut self, service: &str, rules: &[&str], tproxy: bool) -> anyhow::Result<()> {
        let w = self.workload(service).clone();
        let name = w.name();
        self.data_plane.retain(|p| p.name != format!("{name}-proxy"));
        let program = self.flotilla.display().to_string();
        let mut all = vec![program.as_str(), "iptables", "--dns-port", "15053"];
        all.extend(rules);
        exec(&w.netns, &all)?.ok("flotilla iptables")?;
        let mut flags = self.proxy(&name, NAMESPACE, w.service, &w.ip)?;
        flags.push(format!("--labels=app={},version={}", w.service, w.version));
        flags.push("--dns=127.0.0.1:15053".into());
        flags.push(format!("--meta=INSTANCE_IPS={},{}", w.ip, w.ip6()));
        flags.push("--meta=HTTP_PROXY_PORT=15002".into());
        flags.push(format!("--meta=INTERCEPTION_MODE={}", if tproxy { "TPROXY" } else { "REDIRECT" }));
        let mut args = vec![program, "sidecar".to_owned()];
        args.extend(flags);
        let mut command = as_user(&w.netns, PROXY_UID, args);
        if tproxy {
            // Sockets that take connections for foreign addresses.
            let at = command.iter().position(|a| a == "--clear-groups").context("setpriv")?;
            let caps = ["--inh-caps", "+net_admin", "--ambient-caps", "+net_admin"].map(str::to_owned);
            command.splice(at..at, caps);
        }
        let process = Process::start(&format!("{name}-proxy"), &self.dir.join("logs"), &command)?;
        self.data_plane.push(process);
        until(&name, Duration::from_secs(30), async || {
            for p in &mut self.data_plane {
                p.check()?;
            }
            ready(&w.netns, "http://127.0.0.1:15021/healthz/ready")
        })
        .await?;
        Ok(())
    }

    /// Gives the cluster's network IPv6.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn enable_ipv6(&self) -> anyhow::Result<()> {
        let node = self.netns("node");
        let on = |netns: &str, dev: &str, ip: &str| -> anyhow::Result<()> {
            for which in ["all", "default", "lo", dev] {
                must(&format!("ip netns exec {netns} sysctl -qw net.ipv6.conf.{which}.disable_ipv6=0"))?;
            }
            must(&format!("ip -n {netns} -6 addr add {ip}/64 dev {dev} nodad"))?;
            Ok(())
        };
        on(&node, "br0", "fd00:10::1")?;
        for w in &self.workloads {
            on(&w.netns, "eth0", &w.ip6())?;
            must(&format!("ip -n {} -6 route add default via fd00:10::1", w.netns))?;
        }
        Ok(())
    }

    /// Runs a program in a workload's namespace as its application does.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn as_app(&self, service: &str, args: &[&str]) -> anyhow::Result<Said> {
        let w = self.workload(service);
        let all = as_user(&w.netns, APP_UID, args.iter().map(|a| (*a).to_owned()).collect());
        let words: Vec<&str> = all[1..].iter().map(String::as_str).collect();
        programs::run(&all[0], &words)
    }

    /// Starts a server of one page beside a workload, as an application.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_page(&mut self, service: &str, at: &str) -> anyhow::Result<()> {
        let w = self.workload(service).clone();
        let command = as_user(
            &w.netns,
            APP_UID,
            vec![
                self.echo.display().to_string(),
                format!("--workload={service}"),
                format!("--cluster={}", self.name),
                format!("--page={at}"),
            ],
        );
        self.data_plane.push(Process::start(&format!("{service}-page"), &self.dir.join("logs"), &command)?);
        Ok(())
    }

    /// Flags of a proxy, with a directory of its user for token, root and state.
    fn proxy(&self, name: &str, namespace: &str, account: &str, ip: &str) -> anyhow::Result<Vec<String>> {
        let dir = self.dir.join(format!("proxy-{name}"));
        directory(&dir, PROXY_UID)?;
        directory(&dir.join("state"), PROXY_UID)?;
        let args = ["token", "workload", "--namespace", namespace, "--service-account", account];
        let token = self.flotilla(&args)?.ok("token workload")?;
        let root = std::fs::read_to_string(self.state().join("ca/root-cert.pem")).context("root-cert.pem")?;
        for (file, content) in [("token", token), ("root-cert.pem", root)] {
            let path = dir.join(file);
            std::fs::write(&path, content)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            chown(&path, Some(PROXY_UID), Some(PROXY_UID))?;
        }
        Ok([
            ("discovery", format!("{CONTROL_PLANE}:15012")),
            ("root-cert", dir.join("root-cert.pem").display().to_string()),
            ("token-file", dir.join("token").display().to_string()),
            ("ip", ip.to_owned()),
            ("workload", name.to_owned()),
            ("namespace", namespace.to_owned()),
            ("service-account", account.to_owned()),
            ("cluster", self.name.to_owned()),
            ("state-dir", dir.join("state").display().to_string()),
            ("concurrency", "1".to_owned()),
        ]
        .iter()
        .map(|(k, v)| format!("--{k}={v}"))
        .collect())
    }

    fn start_proxy(&mut self, name: &str, role: &str, netns: &str, flags: Vec<String>) -> anyhow::Result<()> {
        let mut args = vec![self.flotilla.display().to_string(), role.to_owned()];
        args.extend(flags);
        let command = as_user(netns, PROXY_UID, args);
        let process = Process::start(&format!("{name}-proxy"), &self.dir.join("logs"), &command)?;
        self.data_plane.push(process);
        Ok(())
    }

    /// Puts a real Envoy in the place of a workload's sidecar, with the sidecar's certificate. Names of
    /// `hosts` go to the workload's hosts file, since the resolver goes with the sidecar.
    ///
    /// # Errors
    /// Envoy cannot be started or gets no configuration.
    pub async fn replace_by_envoy(
        &mut self,
        service: &str,
        envoy: &Path,
        hosts: &[String],
    ) -> anyhow::Result<()> {
        let w = self.workload(service).clone();
        let (name, state) = (w.name(), self.proxy_state(&w));
        let mut names = "127.0.0.1 localhost\n".to_owned();
        for h in hosts {
            let line = exec(&w.netns, &["getent", "ahostsv4", h])?.ok(h)?;
            let ip = line.split_whitespace().next().context("no address")?;
            let _ = writeln!(names, "{ip} {h}");
        }
        self.data_plane.retain(|p| p.name != format!("{name}-proxy"));
        // In place: the workload has this very file mounted.
        std::fs::write(Path::new("/etc/netns").join(&w.netns).join("hosts"), names)?;
        let file = |f: &str| state.join(f).display().to_string();
        let (chain, key, root) = (file("svid-chain.pem"), file("svid-key.pem"), file("root-cert.pem"));
        let source = |f: &str| json!({"filename": f});
        let bootstrap = json!({
            "node": {
                "id": format!("sidecar~{}~{name}.{NAMESPACE}~{NAMESPACE}.svc.cluster.local", w.ip),
                "cluster": w.service,
                "metadata": {
                    "CLUSTER_ID": self.name, "NETWORK": self.name, "NAMESPACE": NAMESPACE, "MESH_ID": "mesh.local",
                    "SERVICE_ACCOUNT": w.service, "WORKLOAD_NAME": name, "INTERCEPTION_MODE": "REDIRECT",
                    "INSTANCE_IPS": w.ip, "LABELS": {"app": w.service, "version": w.version},
                    "TLS_CLIENT_CERT_CHAIN": chain, "TLS_CLIENT_KEY": key, "TLS_CLIENT_ROOT_CERT": root,
                }
            },
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
            "dynamic_resources": {
                "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]},
                "cds_config": {"ads": {}, "resource_api_version": "V3"},
                "lds_config": {"ads": {}, "resource_api_version": "V3"}
            },
            "static_resources": {"clusters": [{
                "name": "xds", "type": "STATIC", "connect_timeout": "2s",
                "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {}}}},
                "transport_socket": {"name": "tls", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                    "sni": "control-plane.flotilla-system.svc",
                    "common_tls_context": {
                        "alpn_protocols": ["h2"],
                        // As a client Envoy offers 1.2 at most unless told otherwise.
                        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                        "tls_certificates": [{"certificate_chain": source(&chain), "private_key": source(&key)}],
                        "validation_context": {"trusted_ca": source(&root)}}}},
                "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {"address":
                    {"socket_address": {"address": CONTROL_PLANE, "port_value": 15012}}}}]}]}
            }]}
        });
        let config = self.dir.join(format!("proxy-{name}/envoy.json"));
        std::fs::write(&config, bootstrap.to_string())?;
        chown(&config, Some(PROXY_UID), Some(PROXY_UID))?;
        let args = [
            public_copy(envoy, &self.dir)?.display().to_string(),
            "-c".into(),
            config.display().to_string(),
            "--concurrency".into(),
            "1".into(),
            "-l".into(),
            "warning".into(),
            "--use-dynamic-base-id".into(),
        ];
        let command = as_user(&w.netns, PROXY_UID, args.to_vec());
        let process = Process::start(&format!("{name}-envoy"), &self.dir.join("logs"), &command)?;
        self.data_plane.push(process);
        until("envoy", Duration::from_secs(30), async || {
            for p in &mut self.data_plane {
                p.check()?;
            }
            ready(&w.netns, "http://127.0.0.1:15000/ready")
        })
        .await?;
        Ok(())
    }

    /// Waits for the control plane.
    ///
    /// # Errors
    /// It is not up within half a minute.
    pub async fn control_plane_ready(&mut self) -> anyhow::Result<()> {
        let netns = self.netns("cp");
        let what = format!("control plane of {}", self.name);
        until(&what, Duration::from_secs(30), async || {
            if let Some(p) = &mut self.control_plane {
                p.check()?;
            }
            ready(&netns, "http://127.0.0.1:15014/ready")
        })
        .await?;
        Ok(())
    }

    /// Waits until every proxy has certificate and configuration.
    ///
    /// # Errors
    /// One has not within half a minute.
    pub async fn data_plane_ready(&mut self) -> anyhow::Result<()> {
        let mut all: Vec<String> = (0..self.gateways).map(|n| self.gateway_netns(n)).collect();
        all.extend(self.workloads.iter().map(|w| w.netns.clone()));
        for netns in all {
            until(&netns, Duration::from_secs(30), async || {
                for p in &mut self.data_plane {
                    p.check()?;
                }
                ready(&netns, "http://127.0.0.1:15021/healthz/ready")
            })
            .await?;
        }
        for w in &self.workloads {
            let what = w.control.display().to_string();
            until(&what, Duration::from_secs(10), async || {
                ensure!(w.control.exists(), "the application is not up");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

fn ready(netns: &str, page: &str) -> anyhow::Result<()> {
    let said = exec(netns, &["curl", "-sS", "-m", "2", "-w", " %{http_code}", page])?;
    ensure!(said.code == 0 && said.out.ends_with(" 200"), "{page}: {}{}", said.out, said.err);
    Ok(())
}
