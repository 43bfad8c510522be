//! A sidecar that executes Envoy's bootstrap files, alone and driven by a control plane that is not ours.
//!
//! The configurations are those of the benchmark: a pair of sidecars with mutual TLS and authorization. The control
//! plane is go-control-plane (`foreign/control-plane`), which serves the same files taken apart into resources.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex},
    thread::sleep,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use serde_json::{Value, json};

/// How long a start or a change may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

fn until<T>(what: &str, mut f: impl FnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match f() {
            Ok(t) => return t,
            Err(last) if begun.elapsed() > SOON => panic!("{what}: not within {SOON:?}: {last}"),
            Err(_) => sleep(Duration::from_millis(20)),
        }
    }
}

/// Status and body of a GET.
fn curl(url: &str) -> (u16, String) {
    let mut c = Command::new("curl");
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        c.env_remove(name);
    }
    let o =
        c.args(["-sS", "--max-time", "10", "--noproxy", "*", "-w", "\n%{http_code}", url]).output().unwrap();
    let text = String::from_utf8_lossy(&o.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", "0"));
    (status.parse().unwrap_or(0), format!("{body}{}", String::from_utf8_lossy(&o.stderr)))
}

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // What has ended already is as dead as wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An HTTP server that answers with its name until the test ends.
fn backend(address: SocketAddr, name: &'static str) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(&stream, name));
        }
    });
}

fn answer(stream: &TcpStream, name: &str) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let mut writer = stream;
        write!(writer, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len()).ok()?;
    }
}

/// Addresses and files of one test.
struct Stage {
    dir: tempfile::TempDir,
    ip: Ipv4Addr,
}

const LISTEN: u16 = 10000;
const MID: u16 = 10001;
const CLIENT_ADMIN: u16 = 10002;
const SERVER_ADMIN: u16 = 10003;
const BACKENDS: [u16; 2] = [10004, 10005];

impl Stage {
    /// `n` tells the tests of this file apart: each has a loopback address of its own, and fixed ports on it.
    fn new(n: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ip = Ipv4Addr::new(127, 78, (std::process::id() % 250) as u8, n);
        certificates(dir.path());
        backend((ip, BACKENDS[0]).into(), "first");
        backend((ip, BACKENDS[1]).into(), "second");
        Self { dir, ip }
    }

    fn at(&self, port: u16) -> SocketAddr {
        (self.ip, port).into()
    }

    fn url(&self) -> String {
        format!("http://{}/", self.at(LISTEN))
    }

    /// A file of the benchmark.
    fn render(&self, template: &str, backend: u16) -> String {
        let certs = self.dir.path().display().to_string();
        let values = BTreeMap::from([
            ("ACCESS_LOG_CLIENT", "[]".to_owned()),
            ("ACCESS_LOG_SERVER", "[]".to_owned()),
            ("BACKEND_HOST", self.ip.to_string()),
            ("BACKEND_PORT", backend.to_string()),
            ("BACKEND_PROTO", "http_protocol_options".to_owned()),
            ("CERTS", certs),
            ("CLIENT_ADMIN", CLIENT_ADMIN.to_string()),
            ("FILTERS", String::new()),
            ("FULL", "true".to_owned()),
            ("LISTEN", LISTEN.to_string()),
            ("MID", MID.to_string()),
            ("REJECT_STATS", "false".to_owned()),
            ("SERVER_ADMIN", SERVER_ADMIN.to_string()),
            ("SESSION_KEYS", "1".to_owned()),
        ]);
        let text = values.iter().fold(template.to_owned(), |t, (k, v)| t.replace(&format!("@{k}@"), v));
        text.replace("127.0.0.1", &self.ip.to_string())
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The resources of a file, as JSON for the control plane.
    fn resources(&self, name: &str, text: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        let all: Value = serde_saphyr::from_str(text).unwrap();
        let mut resources = json!({"static_resources": all["static_resources"]});
        change(&mut resources["static_resources"]);
        self.write(&format!("{name}.json"), &resources.to_string())
    }

    /// A bootstrap that leaves everything to a control plane.
    fn dynamic(&self, node: &str, admin: u16, mode: &str, control: SocketAddr) -> PathBuf {
        let ads = json!({"resource_api_version": "V3", "ads": {}});
        let address = |a: SocketAddr| json!({"socket_address": {"address": a.ip().to_string(), "port_value": a.port()}});
        let endpoint = json!({"lb_endpoints": [{"endpoint": {"address": address(control)}}]});
        let b = json!({
            "node": {"id": node, "cluster": "test"},
            "admin": {"address": address(self.at(admin))},
            "static_resources": {"clusters": [{
                "name": "control-plane", "type": "STATIC",
                "load_assignment": {"cluster_name": "control-plane", "endpoints": [endpoint]},
            }]},
            "dynamic_resources": {
                "ads_config": {"api_type": mode, "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "control-plane"}}]},
                "cds_config": ads, "lds_config": ads,
            },
        });
        self.write(&format!("{node}-bootstrap.json"), &b.to_string())
    }

    fn sidecar(&self, file: &Path, flags: &[&str]) -> Process {
        let log = fs::OpenOptions::new().create(true).append(true).open(file.with_extension("log")).unwrap();
        let child = Command::new(flotilla_e2e::programs::flotilla().unwrap())
            .args(["sidecar", "--concurrency", "1", "--bootstrap"])
            .arg(file)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Process(child)
    }

    /// Waits for an answer of this name through the pair.
    fn answers(&self, what: &str, name: &str) {
        until(what, || match curl(&self.url()) {
            (200, body) if body == name => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }

    fn ready(&self, admin: u16) {
        let url = format!("http://{}/ready", self.at(admin));
        until("ready", || match curl(&url) {
            (200, _) => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
}

fn certificates(dir: &Path) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    fs::write(dir.join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    for who in ["client", "server"] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let id = format!("spiffe://cluster.local/ns/default/sa/{who}");
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        fs::write(dir.join(format!("{who}.crt")), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        fs::write(dir.join(format!("{who}.key")), key.serialize_pem()).unwrap();
    }
}

const HTTP: [&str; 2] = [
    include_str!("../bench/templates/http-client.yaml"),
    include_str!("../bench/templates/http-server.yaml"),
];
const TCP: [&str; 2] =
    [include_str!("../bench/templates/tcp-client.yaml"), include_str!("../bench/templates/tcp-server.yaml")];

#[test]
#[ignore = "needs the flotilla binary and curl; cargo verify builds and installs them"]
fn a_pair_runs_from_files_alone() {
    for (n, [client, server]) in [(1, HTTP), (2, TCP)] {
        let stage = Stage::new(n);
        let server = stage.write("server.yaml", &stage.render(server, BACKENDS[0]));
        let client = stage.write("client.yaml", &stage.render(client, BACKENDS[0]));
        let _pair = (stage.sidecar(&server, &[]), stage.sidecar(&client, &[]));
        stage.answers("the pair", "first");
        for admin in [CLIENT_ADMIN, SERVER_ADMIN] {
            stage.ready(admin);
            let (status, page) = curl(&format!("http://{}/stats/prometheus", stage.at(admin)));
            assert!(status == 200 && page.ends_with("# EOF\n"), "{status} {page}");
        }
        // What the server's policy does not allow: whoever has another certificate.
        let crt = stage.dir.path().join("server.crt");
        let key = stage.dir.path().join("server.key");
        let url = format!("https://{}/", stage.at(MID));
        let o = Command::new("curl")
            .args(["-sk", "--http2", "-w", "%{http_code}", "--max-time", "10", "--cert"])
            .arg(&crt)
            .arg("--key")
            .arg(&key)
            .arg(&url)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&o.stdout).into_owned();
        assert!(said.ends_with("403") || said.ends_with("000"), "{said}");
    }
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn a_file_that_cannot_be_honoured_says_where() {
    let stage = Stage::new(3);
    let text = stage
        .render(HTTP[0], BACKENDS[0])
        .replace("type: STATIC", "type: STATIC\n    lb_subset_config: {fallback_policy: ANY_ENDPOINT}");
    let file = stage.write("bad.yaml", &text);
    let o = Command::new(flotilla_e2e::programs::flotilla().unwrap())
        .args(["sidecar", "--bootstrap"])
        .arg(&file)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(2), "{said}");
    assert!(said.contains("bad.yaml: static_resources.clusters[0].lb_subset_config: is set"), "{said}");
}

/// go-control-plane.
struct ControlPlane {
    stdin: ChildStdin,
    said: Arc<Mutex<Vec<String>>>,
    address: SocketAddr,
    _process: Process,
}

impl ControlPlane {
    fn start() -> Self {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("foreign-control-plane");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("foreign/control-plane");
        let built = Command::new("go").arg("build").arg("-o").arg(&program).current_dir(source).status();
        assert!(built.expect("go, see `cargo verify`").success());
        let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let to = said.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                to.lock().unwrap().push(line);
            }
        });
        let first = until("control plane", || said.lock().unwrap().first().cloned().ok_or("silent".into()));
        let address = first.strip_prefix("listening ").unwrap().parse().unwrap();
        Self { stdin, said, address, _process: Process(child) }
    }

    fn serve(&mut self, node: &str, file: &Path) {
        writeln!(self.stdin, "{node} {}", file.display()).unwrap();
    }

    fn hears(&self, what: &str) -> String {
        until(what, || {
            let said = self.said.lock().unwrap();
            said.iter().find(|l| l.starts_with(what)).cloned().ok_or_else(|| format!("{said:?}"))
        })
    }
}

/// Everything from a control plane that is not ours: first configuration, live change, refusal of one resource, and the
/// last configuration after both have been restarted.
fn driven(n: u8, mode: &str, [client, server]: [&str; 2]) {
    let stage = Stage::new(n);
    let mut control = ControlPlane::start();
    let (client, server) = (stage.render(client, BACKENDS[0]), stage.render(server, BACKENDS[0]));
    let to_server = stage.resources("server", &server, |_| {});
    control.serve("client", &stage.resources("client", &client, |_| {}));
    control.serve("server", &to_server);
    let server_file = stage.dynamic("server", SERVER_ADMIN, mode, control.address);
    let client_file = stage.dynamic("client", CLIENT_ADMIN, mode, control.address);
    let state = stage.dir.path().join("state");
    let flags = ["--state-dir", state.to_str().unwrap()];
    let _server = stage.sidecar(&server_file, &flags);
    let other = stage.dir.path().join("state-client");
    let client_flags = ["--state-dir", other.to_str().unwrap()];
    let client = stage.sidecar(&client_file, &client_flags);
    stage.answers("the pair, driven", "first");
    stage.ready(CLIENT_ADMIN);
    for t in ["Cluster", "ClusterLoadAssignment", "Listener"] {
        control.hears(&format!("ack {t} "));
    }

    // Live: another backend, while requests go on; none fails.
    let moved =
        stage.resources("server-moved", &server, |r| {
            let port = &mut r["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
                ["address"]["socket_address"]["port_value"];
            *port = json!(BACKENDS[1]);
        });
    control.serve("server", &moved);
    let begun = Instant::now();
    let mut before = 0;
    loop {
        let (status, body) = curl(&stage.url());
        assert_eq!(status, 200, "{body}");
        match body.as_str() {
            "second" => break,
            _ => before += 1,
        }
        assert!(begun.elapsed() < SOON, "the change did not arrive");
    }
    eprintln!("{mode}: changed after {:?} and {before} requests", begun.elapsed());

    // One bad cluster among good ones is refused by its name; the rest stays.
    let bad = stage.resources("server-bad", &server, |r| {
        let clusters = r["clusters"].as_array_mut().unwrap();
        let mut odd = clusters[0].clone();
        odd["name"] = json!("odd");
        // Without endpoints of its own: in its SotW variant this server withholds all of them until each is asked for.
        odd["type"] = json!("STRICT_DNS");
        odd["lb_subset_config"] = json!({"fallback_policy": "ANY_ENDPOINT"});
        clusters.push(odd);
    });
    control.serve("server", &bad);
    let nack = control.hears("nack Cluster ");
    assert!(nack.contains("odd: lb_subset_config") && !nack.contains("backend"), "{nack}");
    stage.answers("the good ones", "first");

    // Without the control plane: what runs goes on, and what starts again has what it had.
    drop(control);
    stage.answers("alone", "first");
    let kept = other.join("xds.cache");
    until("the kept configuration", || kept.exists().then_some(()).ok_or_else(|| "no file".into()));
    drop(client);
    let _client = stage.sidecar(&client_file, &client_flags);
    stage.answers("again, alone", "first");
}

#[test]
#[ignore = "needs the flotilla binary, go and curl; cargo verify builds and installs them"]
fn go_control_plane_drives_http_by_state_of_the_world() {
    driven(4, "GRPC", HTTP);
}

#[test]
#[ignore = "needs the flotilla binary, go and curl; cargo verify builds and installs them"]
fn go_control_plane_drives_http_by_delta() {
    driven(5, "DELTA_GRPC", HTTP);
}

#[test]
#[ignore = "needs the flotilla binary, go and curl; cargo verify builds and installs them"]
fn go_control_plane_drives_tcp_by_delta() {
    driven(6, "DELTA_GRPC", TCP);
}
