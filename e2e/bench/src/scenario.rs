//! What is compared, and how one run of it goes.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{
    Args,
    config::{self, Ports, Variant},
    load::{self, Scraper, Target},
    process::{Process, busy},
    report::Row,
    token,
    update::Feed,
};

/// Idle connections of the memory scenarios.
const IDLE: usize = 1000;
/// Policies of the authorization scenario.
const POLICIES: usize = 1000;

/// How a scenario is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One proxy, HTTP/1.1 or gRPC.
    Single,
    /// Client and server sidecar.
    Pair,
    /// One stream of bulk data.
    Bulk,
    /// Memory, idle and with connections.
    Memory,
    /// One data plane with and without a policy.
    Policy,
}

/// A named comparison.
#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) default: bool,
    kind: Kind,
}

const fn s(name: &'static str, kind: Kind, default: bool, about: &'static str) -> Scenario {
    Scenario { name, about, default, kind }
}

/// All scenarios with a fixed name.
pub(crate) const ALL: &[Scenario] = &[
    s("http1", Kind::Single, true, "one HTTP/1.1 reverse proxy"),
    s(
        "pair",
        Kind::Pair,
        true,
        "client and server sidecar, HTTP/2 over mTLS between them, RBAC on the identity",
    ),
    s("pair-full", Kind::Pair, true, "the same with access logs and a Prometheus scrape every second"),
    s("grpc", Kind::Pair, true, "gRPC through the pair"),
    s("grpc-single", Kind::Single, false, "gRPC through one proxy"),
    s("tcp", Kind::Pair, true, "TCP through an mTLS pair with network RBAC: HTTP/1.1 bytes"),
    s("tcp-conn", Kind::Pair, true, "a new connection for each request, with a handshake each"),
    s("tcp-conn-resume", Kind::Pair, false, "the same with TLS session resumption"),
    s(
        "tunnel",
        Kind::Pair,
        true,
        "connections as CONNECT streams of a pooled mTLS connection, against a handshake each",
    ),
    s(
        "tunnel-conn",
        Kind::Pair,
        true,
        "a new connection for each request as a pooled stream, against a handshake each",
    ),
    s("iperf", Kind::Bulk, true, "one stream of bulk data through the mTLS pair"),
    s("iperf-tunnel", Kind::Bulk, false, "one stream of bulk data through a pooled tunnel"),
    s("mem", Kind::Memory, true, "memory of an HTTP pair: idle, with 1,000 connections, after a burst"),
    s("mem-tcp", Kind::Memory, true, "memory of a TCP pair: idle, with 1,000 connections, after a burst"),
    s("rbac-1000", Kind::Policy, true, "authorization with 1,000 policies against none"),
    s("jwt", Kind::Policy, true, "JWT validation against none"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Ours,
    Envoy,
    Nginx,
}

/// One of the things compared.
#[derive(Debug, Clone)]
struct Side {
    label: &'static str,
    who: Who,
    against: Option<&'static str>,
    policy: bool,
}

const fn side(label: &'static str, who: Who, against: Option<&'static str>, policy: bool) -> Side {
    Side { label, who, against, policy }
}

/// Everything that runs stay the same in.
pub(crate) struct Bench {
    pub(crate) args: Args,
    work: tempfile::TempDir,
    ports: Ports,
    ours: PathBuf,
    envoy: PathBuf,
    token: String,
    jwks: String,
    _backends: Vec<Process>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        if self.args.keep {
            self.work.disable_cleanup(true);
            eprintln!("kept {}", self.work.path().display());
        }
    }
}

impl Bench {
    pub(crate) fn new(args: Args) -> anyhow::Result<Self> {
        let work = tempfile::Builder::new().prefix("flotilla-bench.").tempdir()?;
        let dir = work.path();
        let ports = Ports::new(!args.no_netns && rustix::process::geteuid().is_root());
        config::certificates(&dir.join("certs"))?;
        let (token, jwks) = token::token()?;
        let ours = sidecar(&args)?;
        let envoy = envoy(&args)?;
        std::fs::write(dir.join("body"), "y".repeat(128))?;
        let www = dir.join("www");
        std::fs::create_dir(&www)?;
        std::fs::write(www.join("echo"), "x".repeat(128))?;
        let cpu = args.load_cpu;
        let words = |line: &str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
        let start =
            |name: &str, program: &str, args: Vec<String>, at: SocketAddr| -> anyhow::Result<Process> {
                let mut p = Process::start(cpu, &dir.join(format!("{name}.log")), program, &args)?;
                p.wait_for(at)?;
                Ok(p)
            };
        let conf = config::nginx(dir, ports)?;
        let backends = vec![
            start("nginx", "nginx", words(&format!("-c {}", conf.display())), ports.http1())
                .context("nginx (Debian: nginx-light)")?,
            start(
                "nghttpd",
                "nghttpd",
                [
                    words("--no-tls -a 127.0.0.1 -d"),
                    vec![
                        www.display().to_string(),
                        "--trailer=grpc-status: 0".into(),
                        ports.http2().port().to_string(),
                    ],
                ]
                .concat(),
                ports.http2(),
            )
            .context("nghttpd (Debian: nghttp2-server)")?,
            start("iperf3", "iperf3", words(&format!("-s -p {}", ports.iperf().port())), ports.iperf())
                .context("iperf3 (Debian: iperf3)")?,
        ];
        Ok(Self { args, work, ports, ours, envoy, token, jwks, _backends: backends })
    }

    /// Runs a scenario on all of its sides, interleaved.
    pub(crate) fn measure(&self, name: &str) -> anyhow::Result<Vec<Row>> {
        let kind = match ALL.iter().find(|s| s.name == name) {
            Some(s) => s.kind,
            None if is_big(name) => Kind::Single,
            None => bail!("no such scenario; --list names them"),
        };
        let mut sides = match kind {
            Kind::Policy => vec![
                side("ours-none", Who::Ours, None, false),
                side("ours", Who::Ours, Some("ours-none"), true),
                side("envoy-none", Who::Envoy, None, false),
                side("envoy", Who::Envoy, Some("envoy-none"), true),
            ],
            _ => vec![side("envoy", Who::Envoy, None, false), side("ours", Who::Ours, Some("envoy"), false)],
        };
        if name == "http1" {
            sides.push(side("nginx", Who::Nginx, Some("envoy"), false));
        }
        if let Some(only) = &self.args.only {
            sides.retain(|s| s.label.starts_with(only.as_str()));
        }
        let mut rows: Vec<Row> = sides
            .iter()
            .map(|s| Row {
                scenario: name.to_owned(),
                side: s.label.to_owned(),
                against: s.against.map(str::to_owned),
                ..Row::default()
            })
            .collect();
        let direct = if self.args.no_latency || kind == Kind::Memory || kind == Kind::Bulk {
            None
        } else {
            Some(self.target(name, self.backend(name), false).latency(self.args.rate, self.args.seconds)?)
        };
        for run in 0..self.args.runs {
            for (s, row) in sides.iter().zip(&mut rows) {
                if row.error.is_some() {
                    continue;
                }
                eprint!("\r{name}: run {} of {}, {:12}", run + 1, self.args.runs, s.label);
                match self.once(name, kind, s, direct) {
                    Ok(figures) => row.add(&figures),
                    Err(e) => row.error = Some(format!("{e:#}")),
                }
            }
        }
        eprintln!("\r{:60}\r", "");
        Ok(rows)
    }

    fn backend(&self, name: &str) -> SocketAddr {
        if name.starts_with("grpc") {
            self.ports.http2()
        } else if name.starts_with("iperf") {
            self.ports.iperf()
        } else {
            self.ports.http1()
        }
    }

    fn target<'a>(&'a self, name: &'a str, address: SocketAddr, jwt: bool) -> Target<'a> {
        let last = name
            .split_once('-')
            .and_then(|(_, n)| n.parse::<usize>().ok())
            .map_or(0, |n| n.saturating_sub(1));
        let (host, path): (String, String) = if name.starts_with("scale-") || name.starts_with("update-") {
            (format!("svc-{last}.bench.local"), "/".into())
        } else if name.starts_with("routes-") {
            ("bench.local".into(), format!("/r{last}/"))
        } else {
            ("bench.local".into(), "/".into())
        };
        Target {
            cpu: self.args.load_cpu,
            address,
            host: host.leak(),
            path: path.leak(),
            grpc: name.starts_with("grpc"),
            close: name.ends_with("-conn") || name == "tcp-conn-resume",
            headers: if jwt { vec![format!("Authorization: Bearer {}", self.token)] } else { vec![] },
            work: self.work.path(),
        }
    }

    /// The proxies of a side, server first.
    fn start(
        &self,
        name: &str,
        kind: Kind,
        s: &Side,
        ads: Option<SocketAddr>,
    ) -> anyhow::Result<Vec<Process>> {
        let dir = self.work.path();
        let mut v = Variant {
            ports: self.ports,
            backend: self.backend(name),
            grpc: name.starts_with("grpc"),
            access_log: name == "pair-full",
            resume: name == "tcp-conn-resume",
            filters: vec![],
        };
        if s.policy {
            v.filters.push(match name {
                "jwt" => config::jwt(&self.jwks),
                _ => config::rbac(POLICIES, self.ports.listen().port()),
            });
        }
        if s.who == Who::Nginx {
            let conf = config::nginx_proxy(dir, self.ports)?;
            let args = ["-c".to_owned(), conf.display().to_string()];
            let mut p = Process::start(self.args.proxy_cpu, &dir.join("nginx-proxy.log"), "nginx", &args)?;
            p.wait_for(self.ports.listen())?;
            return Ok(vec![p]);
        }
        let big = name.split_once('-').and_then(|(k, n)| Some((k, n.parse::<usize>().ok()?)));
        let files = match (kind, big) {
            (Kind::Single, Some((k, n))) => vec![(config::big(dir, k, n, &v, ads)?, self.ports.listen())],
            (Kind::Single | Kind::Policy, _) => {
                vec![(config::render(dir, "http-single", &v)?, self.ports.listen())]
            }
            _ => {
                let stem = if name.contains("tunnel") && s.who == Who::Ours {
                    "tunnel"
                } else if name.contains("tcp") || name.contains("tunnel") || name.starts_with("iperf") {
                    "tcp"
                } else {
                    "http"
                };
                vec![
                    (config::render(dir, &format!("{stem}-server"), &v)?, self.ports.mid()),
                    (config::render(dir, &format!("{stem}-client"), &v)?, self.ports.listen()),
                ]
            }
        };
        let mut started = Vec::new();
        for (i, (file, address)) in files.into_iter().enumerate() {
            let log = dir.join(format!("{}-{i}.log", s.label));
            let mut args = vec![];
            let program = match s.who {
                Who::Ours => {
                    args.extend(["--bootstrap".to_owned(), file.display().to_string()]);
                    args.extend(["--concurrency".to_owned(), "1".to_owned()]);
                    self.ours.display().to_string()
                }
                _ => {
                    args.extend(["-c".to_owned(), file.display().to_string()]);
                    args.extend(
                        ["--concurrency", "1", "--disable-hot-restart", "-l", "warn"].map(str::to_owned),
                    );
                    self.envoy.display().to_string()
                }
            };
            let mut p = Process::start(self.args.proxy_cpu, &log, &program, &args)?;
            p.wait_for(address)?;
            started.push(p);
        }
        Ok(started)
    }

    /// One run of one side.
    fn once(
        &self,
        name: &str,
        kind: Kind,
        s: &Side,
        direct: Option<[f64; 3]>,
    ) -> anyhow::Result<Vec<(&'static str, f64)>> {
        let feed = match name.strip_prefix("update-").and_then(|n| n.parse().ok()) {
            Some(n) => Some(Feed::start(n, self.backend(name), self.args.load_cpu)?),
            None => None,
        };
        let begun = Instant::now();
        let proxies = self.start(name, kind, s, feed.as_ref().map(|f| f.address))?;
        let target = self.target(name, self.ports.listen(), name == "jwt");
        let mut startup = None;
        if is_big(name) {
            let limit = begun + Duration::from_secs(60);
            while !target.once() {
                if Instant::now() > limit {
                    bail!("the last virtual host was not served within a minute");
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            startup = Some(begun.elapsed().as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(500));
        let used = || proxies.iter().map(Process::cpu).sum::<f64>();
        let memory = |key: &str| proxies.iter().map(|p| p.memory(key)).sum::<f64>();
        if kind == Kind::Memory {
            return memory_figures(&target, proxies.len() as f64, &memory);
        }
        if kind == Kind::Bulk {
            let before = used();
            let (bytes, seconds) = load::iperf(self.args.load_cpu, self.ports.listen(), self.args.seconds)?;
            let spent = used() - before;
            return Ok(vec![
                ("cpu_s_per_gb", spent / (bytes / 1e9)),
                ("gbit_per_s", bytes * 8.0 / 1e9 / seconds),
                ("rss_mib", memory("VmRSS")),
            ]);
        }
        let mut per_update = None;
        if let Some(feed) = &feed {
            let (cpu, made) = (used(), feed.made());
            feed.change(true);
            std::thread::sleep(Duration::from_secs(self.args.seconds));
            per_update = Some((used() - cpu) * 1000.0 / (feed.made() - made) as f64);
        }
        target.saturate(1, self.args.connections)?;
        let _scraper = (name == "pair-full")
            .then(|| Scraper::start(vec![self.ports.client_admin(), self.ports.server_admin()]));
        let profiler = self.profile(s, &proxies)?;
        let (cpu, core, begun) = (used(), busy(self.args.proxy_cpu), Instant::now());
        let (done, failed) = target.saturate(self.args.seconds, self.args.connections)?;
        let (spent, wall) = (used() - cpu, begun.elapsed().as_secs_f64());
        let others = (busy(self.args.proxy_cpu) - core - spent).max(0.0) / wall;
        drop(profiler);
        let rate = done / self.args.seconds as f64;
        let mut out = vec![
            (if target.close { "conns_per_s" } else { "rps" }, rate),
            ("cpu_s_per_1k", spent / done * 1000.0),
            ("failed", failed),
            ("others_share", others),
            ("rss_loaded_mib", memory("VmRSS")),
        ];
        if let Some(ms) = per_update {
            out.push(("cpu_ms_per_update", ms));
        }
        if let Some(t) = startup {
            out.push(("startup_s", t));
        }
        if !self.args.no_latency && !target.close && s.who != Who::Nginx && kind != Kind::Policy {
            let [p50, p90, p99] = target.latency(self.args.rate, self.args.seconds)?;
            out.extend([("p50_us", p50), ("p90_us", p90), ("p99_us", p99)]);
            if let Some([d50, _, d99]) = direct {
                out.extend([("added_p50_us", p50 - d50), ("added_p99_us", (p99 - d99).max(0.0))]);
            }
        }
        Ok(out)
    }

    fn profile(&self, s: &Side, proxies: &[Process]) -> anyhow::Result<Option<std::process::Child>> {
        let Some(command) = self.args.profile.as_ref().filter(|_| s.who == Who::Ours) else {
            return Ok(None);
        };
        let pids: Vec<String> = proxies.iter().map(|p| p.pid().to_string()).collect();
        let line = format!("{command} {}", pids.join(","));
        Ok(Some(Command::new("sh").args(["-c", &line]).spawn().context("--profile")?))
    }
}

/// Whether a scenario is one whose name ends in a size.
fn is_big(name: &str) -> bool {
    ["scale-", "update-", "routes-"].iter().any(|k| name.starts_with(k))
}

fn memory_figures(
    target: &Target<'_>,
    proxies: f64,
    memory: &dyn Fn(&str) -> f64,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let idle = memory("VmRSS");
    let anonymous = memory("RssAnon");
    // What the first requests set up is not a connection's.
    drop(target.idle(10)?);
    std::thread::sleep(Duration::from_millis(300));
    let warm = memory("VmRSS");
    let open = target.idle(IDLE)?;
    std::thread::sleep(Duration::from_millis(500));
    let each = (memory("VmRSS") - warm) * 1024.0 / IDLE as f64;
    drop(open);
    target.saturate(3, IDLE)?;
    let busy = memory("VmRSS");
    std::thread::sleep(Duration::from_secs(6));
    Ok(vec![
        ("rss_idle_mib", idle / proxies),
        ("rss_idle_anonymous_mib", anonymous / proxies),
        ("rss_per_idle_connection_kib", each),
        ("rss_busy_mib", busy / proxies),
        ("rss_6s_after_burst_mib", memory("VmRSS") / proxies),
    ])
}

fn root() -> anyhow::Result<PathBuf> {
    Ok(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?)
}

fn target_dir() -> anyhow::Result<PathBuf> {
    Ok(match std::env::var_os("CARGO_TARGET_DIR") {
        Some(d) => d.into(),
        None => root()?.join("target"),
    })
}

fn sidecar(args: &Args) -> anyhow::Result<PathBuf> {
    if let Some(given) = &args.sidecar {
        return Ok(given.clone());
    }
    let path = target_dir()?.join("dist/flotilla-sidecar");
    eprintln!("building flotilla-sidecar (profile dist)");
    let status = Command::new("cargo")
        .args(["build", "--profile", "dist", "--package", "sidecar", "--bin", "flotilla-sidecar"])
        .current_dir(root()?)
        .status()?;
    if !status.success() || !path.exists() {
        bail!("flotilla-sidecar was not built; --sidecar names a binary");
    }
    Ok(path)
}

fn envoy(args: &Args) -> anyhow::Result<PathBuf> {
    if let Some(given) = &args.envoy {
        return Ok(given.clone());
    }
    let venv = target_dir()?.join("verify-venv");
    let mut dirs = vec![venv.join("lib")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.ends_with("envoy/_bin/envoy") {
                return Ok(path);
            }
        }
    }
    bail!("no Envoy in {}: `cargo verify` installs one, or set ENVOY_BIN", venv.display())
}
