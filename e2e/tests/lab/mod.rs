//! Clusters of processes on loopback addresses, as the demo starts them, for tests that need the
//! real binary: neither root nor network.

#![allow(dead_code)] // Every test uses its own part.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

pub(crate) const NAMESPACE: &str = "bookstore";
/// Longest wait for anything; Envoy's backoff towards a server that was away is up to 30 s.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An HTTP answer; status 0 is none.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// One GET on a connection of its own; `None` if that broke.
pub(crate) fn get(address: SocketAddr, uri: &str) -> Option<Answer> {
    get_with(address, uri, "")
}

/// The same with more header lines, each with its end.
pub(crate) fn get_with(address: SocketAddr, uri: &str, headers: &str) -> Option<Answer> {
    let s = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
    s.set_read_timeout(Some(Duration::from_secs(15))).ok()?;
    ask(s, uri, headers)
}

fn ask(mut s: impl std::io::Read + std::io::Write, uri: &str, headers: &str) -> Option<Answer> {
    let host = uri.strip_prefix("http://").map_or("lab", |u| u.split('/').next().unwrap_or_default());
    write!(s, "GET {uri} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{headers}\r\n").ok()?;
    let mut raw = Vec::new();
    s.read_to_end(&mut raw).ok()?;
    let end = raw.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&raw[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let body = &raw[end + 4..];
    let chunked = head.contains("transfer-encoding: chunked");
    Some(Answer { status, body: if chunked { unchunk(body) } else { body.to_vec() } })
}

pub(crate) fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = rest.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(String::from_utf8_lossy(&rest[..end]).trim(), 16).unwrap_or(0);
        let from = end + 2;
        if size == 0 || from + size + 2 > rest.len() {
            break;
        }
        out.extend_from_slice(&rest[from..from + size]);
        rest = &rest[from + size + 2..];
    }
    out
}

pub(crate) fn until<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(v) = f() {
            return v;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {} s", PATIENCE.as_secs());
        sleep(Duration::from_millis(50));
    }
}

/// The binary under test.
pub(crate) fn flotilla() -> PathBuf {
    flotilla_e2e::programs::flotilla().unwrap()
}

/// Two loopback ranges that nothing listens in.
pub(crate) fn ranges() -> (u8, u8) {
    let mut free = (60u8..=250).filter(|o| TcpListener::bind((Ipv4Addr::new(127, *o, 0, 1), 15012)).is_ok());
    let one = free.next().expect("a free loopback range");
    (one, free.next().expect("two free loopback ranges"))
}

/// A cluster of processes.
pub(crate) struct Cluster {
    name: &'static str,
    octet: u8,
    pub(crate) dir: PathBuf,
    running: Vec<(String, Running)>,
}

impl Cluster {
    pub(crate) fn new(name: &'static str, octet: u8, dir: &Path) -> Self {
        let dir = dir.join(name);
        for d in ["config", "state", "logs", "tokens"] {
            fs::create_dir_all(dir.join(d)).unwrap();
        }
        Self { name, octet, dir, running: vec![] }
    }

    pub(crate) fn host(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.octet, 0, n)
    }

    pub(crate) fn workload(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.octet, 1, n)
    }

    pub(crate) fn state(&self) -> String {
        self.dir.join("state").display().to_string()
    }

    pub(crate) fn write(&self, file: &str, content: &str) {
        fs::write(self.dir.join("config").join(file), content).unwrap();
    }

    pub(crate) fn log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.dir.join("logs").join(name)).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(30).collect();
        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    pub(crate) fn spawn(&mut self, name: &str, program: &Path, args: &[String]) {
        let log = File::options().create(true).append(true).open(self.dir.join("logs").join(name)).unwrap();
        let child = Command::new(program)
            .args(args)
            .env("FLOTILLA_DIE_WITH_PARENT", "1")
            .env_remove("HTTP_PROXY")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        self.running.push((name.to_owned(), Running(child)));
    }

    pub(crate) fn stop(&mut self, name: &str) {
        self.running.retain(|(n, _)| n != name);
    }

    pub(crate) fn operator(&self, args: &[&str]) -> String {
        let out = Command::new(flotilla()).args(args).args(["--state-dir", &self.state()]).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// A page of the control plane's debug socket.
    pub(crate) fn debug(&self, path: &str) -> String {
        let s = UnixStream::connect(self.dir.join("state/debug.sock")).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        String::from_utf8(ask(s, path, "").map(|a| a.body).unwrap_or_default()).unwrap()
    }

    pub(crate) fn ready(&self, ip: Ipv4Addr, port: u16, path: &str, log: &str) {
        let begun = Instant::now();
        while get((ip, port).into(), path).is_none_or(|a| a.status != 200) {
            assert!(begun.elapsed() < PATIENCE, "{log} in {} is not ready:\n{}", self.name, self.log(log));
            sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn control_plane(&mut self) {
        let ip = self.host(1);
        let gateway = format!("{}:15443", self.host(3));
        let args = flags(
            "control-plane",
            &[
                ("cluster", self.name.into()),
                ("state-dir", self.state()),
                ("config", self.dir.join("config").display().to_string()),
                ("xds", format!("{ip}:15012")),
                ("xds-plaintext", format!("{ip}:15010")),
                ("metrics", format!("{ip}:15014")),
                ("federation", format!("{ip}:15016")),
                ("mixer", format!("{ip}:9091")),
                ("gateway-address", gateway.clone()),
                ("gateway-via", gateway),
            ],
        );
        self.spawn("control-plane", &flotilla(), &args);
        self.ready(ip, 15014, "/ready", "control-plane");
    }

    /// Flags of a proxy's identity; writes its token.
    pub(crate) fn member(
        &self,
        name: &str,
        ns: &str,
        account: &str,
        ip: Ipv4Addr,
    ) -> Vec<(&'static str, String)> {
        let token = self.operator(&["token", "workload", "--namespace", ns, "--service-account", account]);
        fs::write(self.dir.join("tokens").join(account), token).unwrap();
        vec![
            ("discovery", format!("{}:15012", self.host(1))),
            ("root-cert", self.dir.join("state/ca/root-cert.pem").display().to_string()),
            ("token-file", self.dir.join("tokens").join(account).display().to_string()),
            ("ip", ip.to_string()),
            ("workload", name.into()),
            ("namespace", ns.into()),
            ("service-account", account.into()),
            ("cluster", self.name.into()),
            ("state-dir", self.dir.join("state").join(name).display().to_string()),
            ("concurrency", "1".into()),
            ("admin", format!("{ip}:15000")),
            ("readiness", format!("{ip}:15021")),
            ("metrics", format!("{ip}:15090")),
            ("meta", "INTERCEPTION_MODE=NONE".into()),
        ]
    }

    pub(crate) fn gateway(&mut self) {
        let ip = self.host(3);
        let mut f = self.member("eastwest", "flotilla-system", "eastwest", ip);
        f.extend([("labels", "istio=eastwestgateway".into()), ("meta", "ROUTER_MODE=sni-dnat".into())]);
        self.spawn("eastwest", &flotilla(), &flags("gateway", &f));
        self.ready(ip, 15021, "/healthz/ready", "eastwest");
    }

    /// Starts a service of the bookstore; answers with the flags of its proxy.
    pub(crate) fn app(&mut self, service: &str, version: &str, ip: Ipv4Addr) -> Vec<(&'static str, String)> {
        let app = format!("{ip}:19080");
        let mut args = vec!["sample".to_owned()];
        args.extend(flags(
            "bookstore",
            &[
                ("role", service.into()),
                ("listen", app.clone()),
                ("version", version.into()),
                ("cluster", self.name.into()),
                ("namespace", NAMESPACE.into()),
                ("http-proxy", format!("{ip}:15001")),
            ],
        ));
        self.spawn(service, &flotilla(), &args);
        let mut f = self.member(&format!("{service}-{version}"), NAMESPACE, service, ip);
        f.extend([
            ("labels", format!("app={service},version={version}")),
            ("meta", "HTTP_PROXY_PORT=15001".into()),
            ("meta", format!("FLOTILLA_INBOUND={{\"9080\":\"{app}\",\"9081\":\"{app}\"}}")),
        ]);
        f
    }

    pub(crate) fn sidecar(
        &mut self,
        service: &str,
        version: &str,
        ip: Ipv4Addr,
        more: &[(&'static str, String)],
    ) {
        let mut f = self.app(service, version, ip);
        f.extend_from_slice(more);
        let name = format!("{service}-sidecar");
        self.spawn(&name, &flotilla(), &flags("sidecar", &f));
        self.ready(ip, 15021, "/healthz/ready", &name);
    }
}

pub(crate) fn flags(command: &str, list: &[(&str, String)]) -> Vec<String> {
    std::iter::once(command.to_owned()).chain(list.iter().map(|(k, v)| format!("--{k}={v}"))).collect()
}

pub(crate) fn service(name: &str, app: &str, port: &str, number: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{app: {app}}}, ports: [{{name: {port}, port: {number}}}]}}\n---\n"
    )
}

pub(crate) fn export(name: &str) -> String {
    format!(
        "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\n\
         metadata: {{name: {name}, namespace: {NAMESPACE}}}\n---\n"
    )
}

pub(crate) fn entry(app: &str, version: &str, ip: Ipv4Addr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
         metadata: {{name: {app}-{version}, namespace: {NAMESPACE}}}\n\
         spec: {{address: {ip}, serviceAccount: {app}, labels: {{app: {app}, version: {version}, \
         security.istio.io/tlsMode: istio}}}}\n---\n"
    )
}

pub(crate) const MESH: &str = "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\n\
                    spec: {accessLogFile: /dev/stdout}\n---\n";

pub(crate) fn strict() -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: default, namespace: {NAMESPACE}}}\nspec: {{mtls: {{mode: STRICT}}}}\n---\n"
    )
}

pub(crate) fn id(account: &str) -> String {
    format!("spiffe://mesh.local/ns/{NAMESPACE}/sa/{account}")
}

/// What was looked at, and whether it was as expected.
#[derive(Default)]
pub(crate) struct Rows(Vec<(String, String, bool)>);

impl Rows {
    pub(crate) fn add(&mut self, what: &str, seen: impl Into<String>, ok: bool) {
        self.0.push((what.to_owned(), seen.into(), ok));
    }

    /// A call of the bookstore: who answered and whom it saw as its caller.
    pub(crate) fn call(&mut self, what: &str, served: &Value, status: u64, cluster: &str, caller: &str) {
        let seen = format!("{status} from {}, caller {}", served["cluster"], served["caller"]);
        let ok = status == 200 && served["cluster"] == cluster && served["caller"] == id(caller);
        self.add(what, seen, ok);
    }

    pub(crate) fn end(self) {
        let width = self.0.iter().map(|r| r.0.len()).max().unwrap_or(0);
        for (what, seen, ok) in &self.0 {
            println!("{} {what:width$}  {seen}", if *ok { "ok  " } else { "FAIL" });
        }
        let failed: Vec<&str> = self.0.iter().filter(|r| !r.2).map(|r| r.0.as_str()).collect();
        assert!(failed.is_empty(), "failed: {failed:#?}");
    }
}
