//! A cluster as processes on a loopback range of its own: `127.<n>.0.1` is the control plane,
//! `127.<n>.0.x` are gateways, `127.<n>.1.x` workloads.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::{Outcome, curl, flotilla, run, until};

/// Port of a sidecar's HTTP proxy and of the east-west gateway.
pub(crate) const HTTP_PROXY: u16 = 15001;
pub(crate) const EAST_WEST: u16 = 15443;
const READINESS: u16 = 15021;
const METRICS: u16 = 15090;
/// Namespace of gateways.
pub(crate) const SYSTEM: &str = "flotilla-system";
/// Namespace of workloads.
pub(crate) const NAMESPACE: &str = "books";

/// How gateways reach those of other clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Quic,
}

pub(crate) struct Cluster {
    pub(crate) name: &'static str,
    octet: u8,
    domain: &'static str,
    transport: Transport,
    /// What is run in every role.
    pub(crate) program: PathBuf,
    /// More flags of the control plane.
    control: Vec<String>,
    dir: tempfile::TempDir,
    processes: Vec<(String, Child)>,
    /// Held as long as the range is in use, by this or another test process.
    _range: TcpListener,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, p) in &mut self.processes {
            // A process that has ended already is as dead as wanted.
            let _ = p.kill();
            let _ = p.wait();
        }
        if std::thread::panicking() {
            for (name, _) in &self.processes {
                let log = self.log(name);
                let tail: Vec<&str> = log.lines().rev().take(15).collect();
                eprintln!("--- {} {name}", self.name);
                tail.iter().rev().for_each(|l| eprintln!("{l}"));
            }
        }
    }
}

fn reserve() -> (u8, TcpListener) {
    (150..250)
        .find_map(|o| Some((o, TcpListener::bind(SocketAddr::from(([127, o, 255, 1], 15999))).ok()?)))
        .expect("no free loopback range")
}

impl Cluster {
    /// Chooses addresses and starts the control plane; proxies come after [`Self::found`] or a join.
    pub(crate) fn start(name: &'static str, transport: Transport) -> Self {
        Self::start_in(name, "mesh.local", transport)
    }

    /// The same in a trust domain.
    pub(crate) fn start_in(name: &'static str, domain: &'static str, transport: Transport) -> Self {
        let mut c = Self::prepared(name, domain, transport);
        c.control_plane();
        c
    }

    /// The same before anything is started.
    fn prepared(name: &'static str, domain: &'static str, transport: Transport) -> Self {
        let (octet, range) = reserve();
        let dir = tempfile::tempdir().unwrap();
        for d in ["config", "logs", "tokens", "credentials"] {
            std::fs::create_dir(dir.path().join(d)).unwrap();
        }
        let (control, processes) = (vec![], vec![]);
        let program = flotilla();
        let c = Self { name, octet, domain, transport, program, control, dir, processes, _range: range };
        c.write("mesh.yaml", &mesh(""));
        c
    }

    /// Starts a program first, and the control plane with flags that `start` answers with.
    #[allow(dead_code, reason = "not every target that includes this uses it")]
    pub(crate) fn start_after(name: &'static str, start: impl FnOnce(&mut Self) -> Vec<String>) -> Self {
        Self::start_after_in(name, "mesh.local", start)
    }

    /// The same in a trust domain.
    #[allow(dead_code, reason = "not every target that includes this uses it")]
    pub(crate) fn start_after_in(
        name: &'static str,
        domain: &'static str,
        start: impl FnOnce(&mut Self) -> Vec<String>,
    ) -> Self {
        let mut c = Self::prepared(name, domain, Transport::Tcp);
        c.control = start(&mut c);
        c.control_plane();
        c
    }

    /// Starts the control plane; its log begins anew.
    pub(crate) fn control_plane(&mut self) {
        let (name, ip) = (self.name, self.host(1));
        let gateway = self.east_west().to_string();
        let (state, config) = (self.state(), self.path("config"));
        let transports = if self.transport == Transport::Quic { "quic,tcp" } else { "tcp" };
        let mut args = vec![
            "control-plane".to_owned(),
            format!("--cluster={name}"),
            format!("--state-dir={state}"),
            format!("--config={}", config.display()),
            format!("--xds={ip}:15012"),
            format!("--metrics={ip}:15014"),
            format!("--federation={ip}:15016"),
            format!("--mixer={ip}:15004"),
            format!("--gateway-address={gateway}"),
            format!("--gateway-via={gateway}"),
            format!("--transport={transports}"),
            format!("--trust-domain={}", self.domain),
            "--bundle-refresh-hint=1".to_owned(),
        ];
        args.extend(self.control.iter().cloned());
        self.spawn("control-plane", &args.iter().map(String::as_str).collect::<Vec<_>>());
        // A cluster that is in no mesh yet has no configuration to wait for.
        self.wait(&format!("http://{ip}:15014/ready"));
    }

    /// Kills a process.
    #[allow(dead_code, reason = "not every target that includes this uses it")]
    pub(crate) fn kill(&mut self, process: &str) {
        let at = self.processes.iter().position(|(n, _)| n == process).expect("started");
        let (_, mut child) = self.processes.remove(at);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Takes a file out of the configuration.
    #[allow(dead_code, reason = "not every target that includes this uses it")]
    pub(crate) fn remove(&self, file: &str) {
        std::fs::remove_file(self.path("config").join(file)).unwrap();
    }

    /// A mesh of one cluster.
    pub(crate) fn founded() -> Self {
        let c = Self::start("west", Transport::Tcp);
        c.found();
        c
    }

    pub(crate) fn found(&self) {
        let o = self.flotilla(&["found"]);
        assert_eq!(o.code, 0, "{o:?}");
    }

    pub(crate) fn host(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.octet, 0, n)
    }

    pub(crate) fn workload(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.octet, 1, n)
    }

    /// The east-west gateway.
    pub(crate) fn east_west(&self) -> SocketAddr {
        (self.host(3), EAST_WEST).into()
    }

    pub(crate) fn metrics(&self, ip: Ipv4Addr) -> SocketAddr {
        (ip, METRICS).into()
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub(crate) fn credentials(&self) -> PathBuf {
        self.path("credentials")
    }

    pub(crate) fn state(&self) -> String {
        self.path("state").display().to_string()
    }

    /// Runs an operator's command in this cluster.
    pub(crate) fn flotilla(&self, args: &[&str]) -> Outcome {
        let state = self.state();
        let mut all = args.to_vec();
        all.extend(["--state-dir", &state]);
        run(flotilla(), &all)
    }

    /// Writes (or replaces) a file of the configuration; it applies by itself.
    pub(crate) fn write(&self, file: &str, content: &str) {
        let new = self.path("state.new");
        std::fs::write(&new, content).unwrap();
        std::fs::rename(new, self.path("config").join(file)).unwrap();
    }

    pub(crate) fn log(&self, process: &str) -> String {
        std::fs::read_to_string(self.path("logs").join(format!("{process}.log"))).unwrap_or_default()
    }

    /// Waits for a line of a process's log that holds all of `words`.
    pub(crate) fn logged(&self, process: &str, words: &[&str]) -> String {
        until(&format!("a line of {process} with {words:?}"), || {
            let log = self.log(process);
            let found = log.lines().find(|l| words.iter().all(|w| l.contains(w)));
            found.map(str::to_owned).ok_or(log)
        })
    }

    fn spawn(&mut self, name: &str, args: &[&str]) {
        self.spawn_program(&self.program.clone(), name, args);
    }

    pub(crate) fn spawn_program(&mut self, program: &Path, name: &str, args: &[&str]) {
        let out = File::create(self.path("logs").join(format!("{name}.log"))).unwrap();
        let child = Command::new(program)
            .args(args)
            // Nothing is left behind if this process is killed.
            .env("FLOTILLA_DIE_WITH_PARENT", "1")
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        self.processes.push((name.to_owned(), child));
    }

    /// The process ID of a proxy.
    pub(crate) fn pid(&self, process: &str) -> u32 {
        self.processes.iter().find(|(n, _)| n == process).expect("started").1.id()
    }

    fn wait(&mut self, url: &str) {
        let (name, processes) = (self.name, &mut self.processes);
        until(&format!("{name}: {url}"), || {
            for (p, child) in processes.iter_mut() {
                if let Some(status) = child.try_wait().unwrap() {
                    panic!("{name}: {p} ended: {status}");
                }
            }
            let a = curl(&[url]);
            if a.status == 200 { Ok(()) } else { Err(format!("{a:?}")) }
        });
    }

    fn proxy(&mut self, role: &str, name: &str, ip: Ipv4Addr, who: (&str, &str), extra: &[&str]) {
        let (namespace, account) = who;
        let token = self.path("tokens").join(name);
        // One that is started again needs no control plane for it.
        if !token.exists() {
            let o =
                self.flotilla(&["token", "workload", "--namespace", namespace, "--service-account", account]);
            assert_eq!(o.code, 0, "{o:?}");
            std::fs::write(&token, o.out.trim()).unwrap();
        }
        let shown = |p: &Path| p.display().to_string();
        let args = [
            format!("--discovery={}:15012", self.host(1)),
            format!("--root-cert={}", shown(&self.path("state/ca/root-cert.pem"))),
            format!("--token-file={}", shown(&token)),
            format!("--ip={ip}"),
            format!("--workload={name}"),
            format!("--namespace={namespace}"),
            format!("--service-account={account}"),
            format!("--cluster={}", self.name),
            format!("--trust-domain={}", self.domain),
            format!("--state-dir={}", shown(&self.proxy_state(name))),
            "--concurrency=1".to_owned(),
            format!("--admin={ip}:15000"),
            format!("--readiness={ip}:{READINESS}"),
            format!("--metrics={ip}:{METRICS}"),
            "--meta=INTERCEPTION_MODE=NONE".to_owned(),
        ];
        let mut all = vec![role];
        all.extend(args.iter().map(String::as_str));
        all.extend(extra);
        self.spawn(name, &all);
    }

    /// Where a proxy keeps its certificate and key.
    pub(crate) fn proxy_state(&self, name: &str) -> PathBuf {
        self.path("state").join(name)
    }

    /// Starts a gateway with the label `istio: <name>gateway`.
    pub(crate) fn gateway(&mut self, name: &str, ip: Ipv4Addr, extra: &[&str]) {
        let label = format!("--labels=istio={name}gateway");
        let credentials = format!("--credentials={}", self.credentials().display());
        let mut all = vec![label.as_str(), &credentials];
        all.extend(extra);
        self.proxy("gateway", name, ip, (SYSTEM, name), &all);
        self.wait(&format!("http://{ip}:{READINESS}/healthz/ready"));
    }

    /// Starts a gateway that replaces the running one, and waits until that has ended by itself.
    pub(crate) fn replace_gateway(&mut self, name: &str, ip: Ipv4Addr, extra: &[&str]) {
        let at = self.processes.iter().position(|(n, _)| n == name).unwrap();
        let (_, mut old) = self.processes.remove(at);
        self.gateway(name, ip, extra);
        let status = until("the replaced gateway ends", || match old.try_wait().unwrap() {
            Some(status) => Ok(status),
            None => Err("runs".to_owned()),
        });
        assert!(status.success(), "{status}");
    }

    /// Starts the east-west gateway; it is ready when the cluster is in a mesh.
    pub(crate) fn east_west_gateway(&mut self) {
        let ip = self.host(3);
        let (trunk, deliver) =
            (format!("--trunk={ip}:{EAST_WEST}"), format!("--trunk-deliver={ip}:{EAST_WEST}"));
        let mut extra = vec!["--meta=ROUTER_MODE=sni-dnat"];
        if self.transport == Transport::Quic {
            extra.extend([trunk.as_str(), &deliver, "--trunk-transport=quic"]);
        }
        let label = "--labels=istio=eastwestgateway";
        extra.push(label);
        self.proxy("gateway", "eastwest", ip, (SYSTEM, "eastwest"), &extra);
    }

    /// Starts a sidecar of the service `name` at `ip`; its inbound port 9080 goes to `app`.
    pub(crate) fn sidecar(&mut self, name: &str, ip: Ipv4Addr, app: Option<SocketAddr>) {
        let labels = format!("--labels=app={name}");
        let inbound = app.map(|a| format!("--meta=FLOTILLA_INBOUND={{\"9080\":\"{a}\"}}"));
        let proxy = format!("--meta=HTTP_PROXY_PORT={HTTP_PROXY}");
        let mut extra = vec![labels.as_str(), &proxy];
        extra.extend(inbound.as_deref());
        self.proxy("sidecar", name, ip, (NAMESPACE, name), &extra);
    }

    /// Starts what stands beside an Envoy.
    #[allow(dead_code, reason = "not every target that includes this uses it")]
    pub(crate) fn agent(&mut self, name: &str, ip: Ipv4Addr, app: SocketAddr) {
        let labels = format!("--labels=app={name}");
        let inbound = format!("--meta=FLOTILLA_INBOUND={{\"9080\":\"{app}\"}}");
        let proxy = format!("--meta=HTTP_PROXY_PORT={HTTP_PROXY}");
        let (sds, write) = (
            format!("--sds={}", self.path("sds.sock").display()),
            format!("--write-bootstrap={}", self.path("envoy.json").display()),
        );
        self.proxy("agent", name, ip, (NAMESPACE, name), &[&labels, &inbound, &proxy, &sds, &write]);
        self.ready(ip);
    }

    /// Starts what stands beside a gRPC library without a proxy; answers with the bootstrap that it wrote.
    #[allow(dead_code, reason = "not every target that includes this uses it")]
    pub(crate) fn grpc_agent(&mut self, name: &str, ip: Ipv4Addr, labels: &str) -> PathBuf {
        let bootstrap = self.path(&format!("{name}-grpc.json"));
        let args = [
            format!("--labels={labels}"),
            format!("--sds={}", self.path(&format!("{name}.sock")).display()),
            format!("--write-grpc-bootstrap={}", bootstrap.display()),
        ];
        self.proxy("agent", name, ip, (NAMESPACE, name), &[&args[0], &args[1], &args[2]]);
        self.ready(ip);
        bootstrap
    }

    /// Starts a sidecar whose inbound `port` goes to `app`.
    #[allow(dead_code, reason = "not every target that includes this uses it")]
    pub(crate) fn sidecar_of(&mut self, name: &str, ip: Ipv4Addr, port: u16, app: SocketAddr) {
        let labels = format!("--labels=app={name}");
        let inbound = format!("--meta=FLOTILLA_INBOUND={{\"{port}\":\"{app}\"}}");
        self.proxy("sidecar", name, ip, (NAMESPACE, name), &[&labels, &inbound]);
    }

    /// The same with an Envoy as the sidecar, run with what its agent writes.
    #[allow(dead_code, reason = "not every target that includes this uses it")]
    pub(crate) fn envoy_sidecar(&mut self, envoy: &Path, name: &str, ip: Ipv4Addr, app: SocketAddr) {
        self.agent(name, ip, app);
        let bootstrap = self.path("envoy.json").display().to_string();
        let args = [
            "-c",
            &bootstrap,
            "--use-dynamic-base-id",
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "-l",
            "warning",
        ];
        self.spawn_program(envoy, "envoy", &args);
        self.wait(&format!("http://{ip}:15000/ready"));
    }

    /// Waits until the proxy at `ip` has certificate and configuration.
    pub(crate) fn ready(&mut self, ip: Ipv4Addr) {
        self.wait(&format!("http://{ip}:{READINESS}/healthz/ready"));
    }
}

/// Settings of the mesh: proxies log, and `more`.
pub(crate) fn mesh(more: &str) -> String {
    format!(
        "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata:\n  name: mesh\nspec:\n  \
         accessLogFile: /dev/stdout\n{more}"
    )
}

/// A service on port 9080 with one workload at `ip` port `port`.
pub(crate) fn service(name: &str, ip: Ipv4Addr, port: u16, labels: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\nspec:\n  \
         selector: {{app: {name}}}\n  ports:\n  - {{name: http, port: 9080}}\n\
         ---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: \
         {NAMESPACE}}}\nspec:\n  address: {ip}\n  ports: {{http: {port}}}\n  serviceAccount: {name}\n  labels: {{app: \
         {name}{labels}}}\n"
    )
}

/// Label of workloads whose proxy accepts mTLS, for [`service`].
pub(crate) const IN_MESH: &str = ", security.istio.io/tlsMode: istio";
