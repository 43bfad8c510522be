//! A proxy, its upstreams, and a client.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use envoy_types::pb::envoy::service::discovery::v3::Resource;
use mesh_model::proxy::{
    Forward, OnDemandCluster, OnDemandHosts, PathMatch, Route, RouteAction, RouteConfiguration, RouteFilters,
    RouteMatch, VirtualHost, WeightedCluster,
};
use mesh_xds::{bootstrap::Bootstrap, codec};
use serde_json::{Value, json};

use crate::control::{Control, resource};

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Envoy,
    Flotilla,
}

pub(crate) struct Stage {
    pub(crate) control: Control,
    pub(crate) http: SocketAddr,
    /// To the cluster `tcp`.
    pub(crate) tcp: SocketAddr,
    /// To a cluster that nobody has.
    pub(crate) tcp_late: SocketAddr,
    admin: SocketAddr,
    upstreams: [SocketAddr; 2],
    who: Who,
    file: PathBuf,
    flags: Vec<String>,
    process: Option<Process>,
    _dir: tempfile::TempDir,
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // What has ended already is as dead as wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn until<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        sleep(Duration::from_millis(20));
    }
}

/// An HTTP server that answers with its name, and with the length of what it was sent if that is something.
fn upstream(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(&stream, name));
        }
    });
    address
}

fn serve(stream: &TcpStream, name: &str) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = n.trim().parse().ok()?;
            }
            if line == "\r\n" {
                break;
            }
            head.push_str(&line);
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let answer = if length == 0 { name.to_owned() } else { format!("{name} {length}") };
        let mut writer = stream;
        write!(writer, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len()).ok()?;
    }
}

/// Status and body of a request; `closed` without an answer.
pub(crate) fn request(to: SocketAddr, host: &str, path: &str, headers: &str, body: &[u8]) -> String {
    exchange(to, host, path, headers, body).unwrap_or_else(|| "closed".to_owned())
}

fn exchange(to: SocketAddr, host: &str, path: &str, headers: &str, body: &[u8]) -> Option<String> {
    let stream = TcpStream::connect(to).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(25))).ok()?;
    let mut w = stream.try_clone().ok()?;
    let method = if body.is_empty() { "GET" } else { "POST" };
    let length = if body.is_empty() { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    write!(w, "{method} {path} HTTP/1.1\r\nhost: {host}\r\n{headers}{length}\r\n").ok()?;
    // A proxy that refuses need not read all of it.
    let _ = w.write_all(body);
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let status = line.split(' ').nth(1)?.to_owned();
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().ok()?;
        }
        if line == "\r\n" || line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(format!("{status} {}", String::from_utf8_lossy(&body)))
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn address(a: SocketAddr) -> Value {
    json!({"socket_address": {"address": a.ip().to_string(), "port_value": a.port()}})
}

fn static_cluster(name: &str, to: SocketAddr) -> Value {
    json!({"name": name, "type": "STATIC", "load_assignment": {"cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(to)}}]}]}})
}

pub(crate) fn cluster(name: &str, to: SocketAddr) -> Resource {
    let file = json!({"static_resources": {"clusters": [static_cluster(name, to)]}});
    let b = Bootstrap::from_json(file.to_string().as_bytes()).unwrap();
    let version = u32::from(to.port());
    resource(name, version, codec::encode_cluster(&b.resources.clusters[name]))
}

fn route(path: &str, forward: Forward, filters: RouteFilters) -> Route {
    Route {
        name: String::new(),
        matches: RouteMatch { path: PathMatch::Prefix(path.into()), ..RouteMatch::any() },
        action: RouteAction::Forward(Box::new(forward)),
        request_headers: Default::default(),
        response_headers: Default::default(),
        fault: None,
        cors: None,
        operation: String::new(),
        filters: filters.into(),
    }
}

fn to(cluster: &str) -> Forward {
    Forward { clusters: vec![WeightedCluster::only(cluster)], ..Forward::default() }
}

fn virtual_host(name: &str, domains: &[&str], routes: Vec<Route>) -> VirtualHost {
    VirtualHost {
        name: name.into(),
        domains: domains.iter().map(|d| (*d).to_owned()).collect(),
        require_tls: false,
        attempt_count: false,
        routes,
        request_headers: Default::default(),
        response_headers: Default::default(),
        filters: Default::default(),
    }
}

pub(crate) fn host(domain: &str, cluster: &str) -> VirtualHost {
    virtual_host(&format!("main/{domain}"), &[domain], vec![route("/", to(cluster), RouteFilters::default())])
}

/// The resource `main/<name>`; its domains are its aliases if it has some.
pub(crate) fn host_resource(name: &str, version: u32, cluster: &str, aliases: &[&str]) -> Resource {
    let mut h = host(name, cluster);
    if !aliases.is_empty() {
        h.domains = aliases.iter().map(|a| (*a).to_owned()).collect();
    }
    let mut r = resource(&h.name, version, codec::encode_virtual_host(&h));
    r.aliases = aliases.iter().map(|a| format!("main/{a}")).collect();
    if aliases.is_empty() {
        r.aliases = vec![r.name.clone()];
    }
    r
}

fn routes() -> Resource {
    let off = RouteFilters { on_demand: Some(None), ..RouteFilters::default() };
    let brief = OnDemandCluster { timeout: Duration::from_secs(1) };
    let brief = RouteFilters { on_demand: Some(Some(brief)), ..RouteFilters::default() };
    let header = Forward { cluster_header: Some("x-cluster".into()), ..Forward::default() };
    let plain = |name: &str| route(&format!("/{name}"), to(name), RouteFilters::default());
    let all = vec![
        plain("late-one"),
        plain("many"),
        plain("big"),
        route("/header", header, RouteFilters::default()),
        route("/off", to("off"), off),
        route("/slow", to("slow"), brief),
        route("/", to("one"), RouteFilters::default()),
    ];
    let config = RouteConfiguration {
        name: "main".into(),
        virtual_hosts: vec![virtual_host("static", &["static.test"], all)],
        on_demand: Some(OnDemandHosts::default()),
    };
    resource("main", 1, codec::encode_route(&config))
}

impl Stage {
    pub(crate) fn new(n: u8, who: Who) -> Self {
        Self::with(n, who, &[])
    }

    pub(crate) fn with(n: u8, who: Who, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let control = Control::start();
        control.has(routes());
        let upstreams = [upstream("one"), upstream("two")];
        let [http, tcp, tcp_late, admin] = [free(), free(), free(), free()];
        let ads = json!({"resource_api_version": "V3", "ads": {}});
        let typed = |name: &str, mut config: Value| {
            config["@type"] = format!("type.googleapis.com/envoy.extensions.filters.{name}").into();
            config
        };
        let log = dir.path().join("access");
        let log = json!([{"name": "file", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": log, "log_format": {"text_format_source": {"inline_string":
                "%REQ(:AUTHORITY)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%\n"}}}}]);
        let tcp_listener = |name: &str, at: SocketAddr, to: &str, timeout: &str| {
            let config = json!({"stat_prefix": name, "cluster": to, "access_log": log,
                "on_demand": {"odcds_config": ads, "timeout": timeout}});
            let filter =
                json!({"name": "tcp", "typed_config": typed("network.tcp_proxy.v3.TcpProxy", config)});
            json!({"name": name, "address": address(at), "filter_chains": [{"filters": [filter]}]})
        };
        let on_demand = typed("http.on_demand.v3.OnDemand", json!({"odcds": {"source": ads}}));
        let hcm = json!({
            "stat_prefix": "http",
            "access_log": log,
            "stream_idle_timeout": "3s",
            "rds": {"route_config_name": "main", "config_source": ads},
            "http_filters": [
                {"name": "envoy.filters.http.on_demand", "typed_config": on_demand},
                {"name": "router", "typed_config": typed("http.router.v3.Router", json!({}))},
            ],
        });
        let hcm = typed("network.http_connection_manager.v3.HttpConnectionManager", hcm);
        let mut plane = static_cluster("control-plane", control.address());
        plane["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            },
        });
        let bootstrap = json!({
            "node": {"id": format!("test-{n}"), "cluster": "test"},
            "admin": {"address": address(admin)},
            "static_resources": {
                "clusters": [plane, static_cluster("one", upstreams[0]), static_cluster("two", upstreams[1])],
                "listeners": [
                    {"name": "http", "address": address(http),
                        "filter_chains": [{"filters": [{"name": "http", "typed_config": hcm}]}]},
                    tcp_listener("tcp", tcp, "tcp", "5s"),
                    tcp_listener("tcp-late", tcp_late, "nobody-tcp", "0.5s"),
                ],
            },
            "dynamic_resources": {
                "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "control-plane"}}]},
                "cds_config": ads,
            },
        });
        let file = dir.path().join("bootstrap.json");
        fs::write(&file, bootstrap.to_string()).unwrap();
        let mut this = Self {
            control,
            http,
            tcp,
            tcp_late,
            admin,
            upstreams,
            who,
            file,
            flags: flags.iter().map(|f| (*f).to_owned()).collect(),
            process: None,
            _dir: dir,
        };
        this.again();
        this
    }

    /// Starts the proxy, once more if it runs.
    pub(crate) fn again(&mut self) {
        self.process = None;
        let log = fs::File::create(self.file.with_extension("log")).unwrap();
        let mut c = match self.who {
            Who::Envoy => {
                let bin = std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary");
                let mut c = Command::new(bin);
                c.args(["--use-dynamic-base-id", "--concurrency", "2", "-l", "warn"]);
                c.args(["--file-flush-interval-msec", "50", "-c"]).arg(&self.file);
                c
            }
            Who::Flotilla => {
                let mut c = Command::new(flotilla_e2e::programs::flotilla().unwrap());
                c.args(["sidecar", "--concurrency", "2", "--bootstrap"]).arg(&self.file).args(&self.flags);
                c
            }
        };
        let child = c.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        self.process = Some(Process(child));
        let file = self.file.with_extension("log");
        let begun = Instant::now();
        while self.get("static.test", "/") != "200 one" {
            let said = || fs::read_to_string(&file).unwrap_or_default();
            assert!(begun.elapsed() < PATIENCE, "{:?} does not serve: {}", self.who, said());
            sleep(Duration::from_millis(20));
        }
    }

    /// What the access log says of requests for a host, when it says that much.
    pub(crate) fn logged(&self, host: &str, lines: usize) -> Vec<String> {
        until("the access log", || {
            let text = fs::read_to_string(self.file.with_file_name("access")).unwrap_or_default();
            let of_host = text.lines().filter(|l| l.split(' ').next() == Some(host));
            let all: Vec<String> = of_host.map(str::to_owned).collect();
            (all.len() >= lines).then_some(all)
        })
    }

    pub(crate) fn upstream(&self, n: usize) -> SocketAddr {
        self.upstreams[n]
    }

    pub(crate) fn get(&self, host: &str, path: &str) -> String {
        self.call(host, path, "", b"")
    }

    pub(crate) fn call(&self, host: &str, path: &str, headers: &str, body: &[u8]) -> String {
        request(self.http, host, path, headers, body)
    }

    /// Asks, and does not wait for the answer.
    pub(crate) fn leave(&self, host: &str, path: &str) {
        let mut stream = TcpStream::connect(self.http).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n").unwrap();
        sleep(Duration::from_millis(100));
    }

    pub(crate) fn metrics(&self) -> String {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        write!(stream, "GET /stats/prometheus HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        page
    }
}
