//! An Envoy as a sidecar: the mesh treats it as one of its own.
//!
//! Two clusters of processes on loopback addresses, as the demo starts them, in which `reviews` in
//! west has an Envoy beside it, run with what `flotilla agent` wrote. Needs neither root nor network:
//! `ENVOY_BIN` names an Envoy, `FLOTILLA_BIN` the binary under test (the newest of `target/` by
//! default).

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

const NAMESPACE: &str = "bookstore";
/// Longest wait for anything; Envoy's backoff towards a server that was away is up to 30 s.
const PATIENCE: Duration = Duration::from_secs(60);

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An HTTP answer.
struct Answer {
    status: u16,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// One GET on a connection of its own; `None` if that broke.
fn get(address: SocketAddr, uri: &str) -> Option<Answer> {
    let mut s = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
    s.set_read_timeout(Some(Duration::from_secs(15))).ok()?;
    let host = uri.strip_prefix("http://").map_or("lab", |u| u.split('/').next().unwrap_or_default());
    write!(s, "GET {uri} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").ok()?;
    let mut raw = Vec::new();
    s.read_to_end(&mut raw).ok()?;
    let end = raw.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&raw[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let body = &raw[end + 4..];
    let chunked = head.contains("transfer-encoding: chunked");
    Some(Answer { status, body: if chunked { unchunk(body) } else { body.to_vec() } })
}

fn unchunk(mut rest: &[u8]) -> Vec<u8> {
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

fn until<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(v) = f() {
            return v;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {} s", PATIENCE.as_secs());
        sleep(Duration::from_millis(50));
    }
}

fn flotilla() -> PathBuf {
    if let Some(path) = std::env::var_os("FLOTILLA_BIN") {
        return path.into();
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    ["release", "debug"]
        .iter()
        .map(|p| target.join(p).join("flotilla"))
        .filter_map(|p| Some((fs::metadata(&p).ok()?.modified().ok()?, p)))
        .max()
        .map(|(_, p)| p)
        .expect("FLOTILLA_BIN is not set and target/ holds no flotilla: cargo build -p flotilla")
}

/// Two loopback ranges that nothing listens in.
fn ranges() -> (u8, u8) {
    let mut free = (60u8..=250).filter(|o| TcpListener::bind((Ipv4Addr::new(127, *o, 0, 1), 15012)).is_ok());
    let one = free.next().expect("a free loopback range");
    (one, free.next().expect("two free loopback ranges"))
}

/// A cluster of processes.
struct Cluster {
    name: &'static str,
    octet: u8,
    dir: PathBuf,
    running: Vec<(String, Running)>,
}

impl Cluster {
    fn new(name: &'static str, octet: u8, dir: &Path) -> Self {
        let dir = dir.join(name);
        for d in ["config", "state", "logs", "tokens"] {
            fs::create_dir_all(dir.join(d)).unwrap();
        }
        Self { name, octet, dir, running: vec![] }
    }

    fn host(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.octet, 0, n)
    }

    fn workload(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.octet, 1, n)
    }

    fn state(&self) -> String {
        self.dir.join("state").display().to_string()
    }

    fn write(&self, file: &str, content: &str) {
        fs::write(self.dir.join("config").join(file), content).unwrap();
    }

    fn log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.dir.join("logs").join(name)).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(30).collect();
        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    fn spawn(&mut self, name: &str, program: &Path, args: &[String]) {
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

    fn stop(&mut self, name: &str) {
        self.running.retain(|(n, _)| n != name);
    }

    fn operator(&self, args: &[&str]) -> String {
        let out = Command::new(flotilla()).args(args).args(["--state-dir", &self.state()]).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    fn ready(&self, ip: Ipv4Addr, port: u16, path: &str, log: &str) {
        let begun = Instant::now();
        while get((ip, port).into(), path).is_none_or(|a| a.status != 200) {
            assert!(begun.elapsed() < PATIENCE, "{log} in {} is not ready:\n{}", self.name, self.log(log));
            sleep(Duration::from_millis(50));
        }
    }

    fn control_plane(&mut self) {
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
    fn member(&self, name: &str, ns: &str, account: &str, ip: Ipv4Addr) -> Vec<(&'static str, String)> {
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

    fn gateway(&mut self) {
        let ip = self.host(3);
        let mut f = self.member("eastwest", "flotilla-system", "eastwest", ip);
        f.extend([("labels", "istio=eastwestgateway".into()), ("meta", "ROUTER_MODE=sni-dnat".into())]);
        self.spawn("eastwest", &flotilla(), &flags("gateway", &f));
        self.ready(ip, 15021, "/healthz/ready", "eastwest");
    }

    /// Starts a service of the bookstore; answers with the flags of its proxy.
    fn app(&mut self, service: &str, version: &str, ip: Ipv4Addr) -> Vec<(&'static str, String)> {
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

    fn sidecar(&mut self, service: &str, version: &str, ip: Ipv4Addr) {
        let f = self.app(service, version, ip);
        let name = format!("{service}-sidecar");
        self.spawn(&name, &flotilla(), &flags("sidecar", &f));
        self.ready(ip, 15021, "/healthz/ready", &name);
    }
}

fn flags(command: &str, list: &[(&str, String)]) -> Vec<String> {
    std::iter::once(command.to_owned()).chain(list.iter().map(|(k, v)| format!("--{k}={v}"))).collect()
}

fn service(name: &str, app: &str, port: &str, number: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{app: {app}}}, ports: [{{name: {port}, port: {number}}}]}}\n---\n"
    )
}

fn export(name: &str) -> String {
    format!(
        "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\n\
         metadata: {{name: {name}, namespace: {NAMESPACE}}}\n---\n"
    )
}

fn entry(app: &str, version: &str, ip: Ipv4Addr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
         metadata: {{name: {app}-{version}, namespace: {NAMESPACE}}}\n\
         spec: {{address: {ip}, serviceAccount: {app}, labels: {{app: {app}, version: {version}, \
         security.istio.io/tlsMode: istio}}}}\n---\n"
    )
}

const MESH: &str = "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\n\
                    spec: {accessLogFile: /dev/stdout}\n---\n";

fn strict() -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: default, namespace: {NAMESPACE}}}\nspec: {{mtls: {{mode: STRICT}}}}\n---\n"
    )
}

fn only_storefront() -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: reviews, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{matchLabels: {{app: reviews}}}}, action: ALLOW, rules: [{{from: [{{source: \
         {{principals: [mesh.local/ns/{NAMESPACE}/sa/storefront]}}}}]}}]}}\n"
    )
}

fn id(account: &str) -> String {
    format!("spiffe://mesh.local/ns/{NAMESPACE}/sa/{account}")
}

/// What was looked at, and whether it was as expected.
#[derive(Default)]
struct Rows(Vec<(String, String, bool)>);

impl Rows {
    fn add(&mut self, what: &str, seen: impl Into<String>, ok: bool) {
        self.0.push((what.to_owned(), seen.into(), ok));
    }

    /// A call of the bookstore: who answered and whom it saw as its caller.
    fn call(&mut self, what: &str, served: &Value, status: u64, cluster: &str, caller: &str) {
        let seen = format!("{status} from {}, caller {}", served["cluster"], served["caller"]);
        let ok = status == 200 && served["cluster"] == cluster && served["caller"] == id(caller);
        self.add(what, seen, ok);
    }

    fn end(self) {
        let width = self.0.iter().map(|r| r.0.len()).max().unwrap_or(0);
        for (what, seen, ok) in &self.0 {
            println!("{} {what:width$}  {seen}", if *ok { "ok  " } else { "FAIL" });
        }
        let failed: Vec<&str> = self.0.iter().filter(|r| !r.2).map(|r| r.0.as_str()).collect();
        assert!(failed.is_empty(), "failed: {failed:#?}");
    }
}

fn serial(admin: SocketAddr) -> Option<String> {
    let certs = get(admin, "/certs")?.json();
    let leaf = certs["certificates"].as_array()?.iter().find_map(|c| c["cert_chain"].get(0))?.clone();
    Some(leaf["serial_number"].as_str()?.to_owned())
}

#[test]
#[ignore = "needs Envoy; cargo verify installs it"]
fn envoy_is_a_member_like_any_other() {
    let envoy = PathBuf::from(std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary"));
    let dir = tempfile::tempdir().unwrap();
    let (w, e) = ranges();
    let mut west = Cluster::new("west", w, dir.path());
    let mut east = Cluster::new("east", e, dir.path());
    let (storefront, reviews, ratings) = (west.workload(1), west.workload(2), west.workload(3));
    let catalog = east.workload(1);
    west.write(
        "app.yaml",
        &[
            service("storefront", "storefront", "http", 9080),
            service("reviews", "reviews", "http", 9080),
            service("reviews-h2", "reviews", "http2", 9081),
            service("ratings", "ratings", "http", 9080),
            export("reviews"),
            entry("storefront", "v1", storefront),
            entry("reviews", "v2", reviews),
            entry("ratings", "v1", ratings),
            strict(),
            MESH.to_owned(),
        ]
        .concat(),
    );
    east.write(
        "app.yaml",
        &[
            service("catalog", "catalog", "http", 9080),
            export("catalog"),
            entry("catalog", "v1", catalog),
            strict(),
            MESH.to_owned(),
        ]
        .concat(),
    );

    west.control_plane();
    west.operator(&["found"]);
    west.gateway();
    east.control_plane();
    let token = west.operator(&["token", "create"]);
    east.operator(&["join-cluster", &token]);
    east.gateway();
    west.sidecar("storefront", "v1", storefront);
    west.sidecar("ratings", "v1", ratings);
    east.sidecar("catalog", "v1", catalog);

    // The workload with the Envoy.
    let agent = {
        let sds = dir.path().join("sds.sock").display().to_string();
        let mut f = west.app("reviews", "v2", reviews);
        f.extend([
            ("sds", sds),
            ("write-bootstrap", west.dir.join("state/envoy.json").display().to_string()),
        ]);
        flags("agent", &f)
    };
    west.spawn("reviews-agent", &flotilla(), &agent);
    west.ready(reviews, 15021, "/healthz/ready", "reviews-agent");
    let bootstrap = west.dir.join("state/envoy.json").display().to_string();
    let args = [
        "-c",
        &bootstrap,
        "--use-dynamic-base-id",
        "--disable-hot-restart",
        "--drain-strategy",
        "immediate",
        "--drain-time-s",
        "5",
        "--concurrency",
        "1",
        "-l",
        "warning",
    ];
    west.spawn("envoy", &envoy, &args.map(str::to_owned));
    west.ready(reviews, 15000, "/ready", "envoy");
    let admin = SocketAddr::from((reviews, 15000));

    let mut rows = Rows::default();
    let through = |proxy: Ipv4Addr, uri: &str| {
        get((proxy, 15001).into(), uri).unwrap_or(Answer { status: 0, body: vec![] })
    };
    let good = |proxy: Ipv4Addr, uri: &str| {
        let begun = Instant::now();
        loop {
            let a = through(proxy, uri);
            if a.status == 200 || begun.elapsed() > Duration::from_secs(20) {
                return a;
            }
            sleep(Duration::from_millis(100));
        }
    };
    let (h1, h2) = ("http://reviews.bookstore:9080/reviews", "http://reviews-h2.bookstore:9081/reviews");

    let a = good(storefront, h1);
    let served = a.json();
    rows.call("Flotilla -> Envoy, HTTP/1.1", &served, a.status.into(), "west", "storefront");
    let inner = &served["calls"][0];
    let status = inner["status"].as_u64().unwrap_or(0);
    rows.call("Envoy -> Flotilla, same cluster", &inner["served"], status, "west", "reviews");

    let a = good(storefront, h2);
    rows.call("Flotilla -> Envoy, HTTP/2", &a.json(), a.status.into(), "west", "storefront");
    let stats = get(admin, "/stats?filter=inbound.*9081.*downstream_cx_http2_total").map(|a| a.body);
    let stats = String::from_utf8(stats.unwrap_or_default()).unwrap();
    let http2 = stats.lines().any(|l| l.rsplit(' ').next().is_some_and(|n| n != "0"));
    rows.add("... which was HTTP/2 on the wire", stats.trim(), http2);

    let a = good(reviews, "http://catalog.bookstore:9080/books");
    rows.call("Envoy -> other cluster", &a.json(), a.status.into(), "east", "reviews");
    let a = good(catalog, h1);
    rows.call("other cluster -> Envoy", &a.json(), a.status.into(), "west", "catalog");

    let plain = get((reviews, 9080).into(), "/reviews").map_or(0, |a| a.status);
    rows.add("plaintext to Envoy, STRICT", format!("{plain} (0: closed)"), plain == 0);

    let before = good(ratings, h1).status;
    rows.add("ratings -> Envoy, no policy", before.to_string(), before == 200);
    west.write("policy.yaml", &only_storefront());
    // A connection that is open when the policy comes has one more answer under the old one.
    let denied = |from| until("the policy in Envoy", || Some(through(from, h1).status).filter(|s| *s == 403));
    rows.add("ratings -> Envoy, storefront only", denied(ratings).to_string(), true);
    rows.add("other cluster -> Envoy, storefront only", denied(catalog).to_string(), true);
    let allowed = through(storefront, h1).status;
    rows.add("storefront -> Envoy, storefront only", allowed.to_string(), allowed == 200);

    let dump = get(admin, "/config_dump?include_eds").map(|a| a.json()).unwrap_or_default();
    let text = dump.to_string();
    let clean = !text.contains("error_state") && text.contains("outbound|9080||catalog.bookstore");
    rows.add("Envoy's configuration", format!("{} bytes, no error_state", text.len()), clean);
    let status = west.operator(&["proxy-status", "-o", "json"]);
    rows.add(
        "proxy-status",
        "nothing refused or stale",
        !status.contains("NACKED") && !status.contains("STALE"),
    );
    let certs = get(admin, "/certs").map(|a| a.json()).unwrap_or_default().to_string();
    rows.add("Envoy's certificate", id("reviews"), certs.contains(&id("reviews")));

    // A new certificate reaches the running Envoy; until then the old one serves.
    let old = serial(admin).expect("a certificate in /certs");
    west.stop("reviews-agent");
    let alone = through(storefront, h1).status;
    rows.add("Envoy without its agent", alone.to_string(), alone == 200);
    fs::remove_file(west.dir.join("state/reviews-v2/svid-chain.pem")).unwrap();
    west.spawn("reviews-agent", &flotilla(), &agent);
    until("a new certificate in Envoy", || serial(admin).filter(|s| *s != old));
    let rotated = good(storefront, h1);
    rows.call(
        "Flotilla -> Envoy, new certificate",
        &rotated.json(),
        rotated.status.into(),
        "west",
        "storefront",
    );
    rows.end();
}
