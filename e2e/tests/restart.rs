//! Whole processes under load: a sidecar that executes a bootstrap file is replaced again and again without a lost
//! request, and finds out by itself which of its upstreams work.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

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

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // What has ended already is as dead as wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(file: &Path, more: &[&str], log: &Path) -> Self {
        let log = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        let child = Command::new(flotilla_e2e::programs::flotilla().unwrap())
            .arg("sidecar")
            .arg("--bootstrap")
            .arg(file)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self(child)
    }

    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    /// Its exit code, once it has ended.
    fn end(&mut self) -> Option<i32> {
        until("the end of a process", || match self.0.try_wait().unwrap() {
            Some(s) => Ok(s.code()),
            None => Err("runs".into()),
        })
    }
}

/// An HTTP server of which `/health` answers with a status that the test changes.
struct Backend {
    address: SocketAddr,
    healthy: Arc<AtomicBool>,
}

fn backend(ip: Ipv4Addr, name: &'static str) -> Backend {
    let listener = TcpListener::bind((ip, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let healthy = Arc::new(AtomicBool::new(true));
    let state = healthy.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = state.clone();
            std::thread::spawn(move || answer(&stream, name, &state));
        }
    });
    Backend { address, healthy }
}

fn answer(stream: &TcpStream, name: &str, healthy: &AtomicBool) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let status = if head.contains("/health") && !healthy.load(Ordering::SeqCst) { 503 } else { 200 };
        let mut writer = stream;
        write!(writer, "HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{name}", name.len()).ok()?;
    }
}

/// A TCP server that sends back what it gets.
fn echo(ip: Ipv4Addr) -> SocketAddr {
    let listener = TcpListener::bind((ip, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut s in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut r = s.try_clone().unwrap();
                let _ = std::io::copy(&mut r, &mut s);
                let _ = s.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

/// One response on a connection: status, body, and whether the connection stays.
fn response(reader: &mut BufReader<TcpStream>) -> Result<(u16, String, bool), String> {
    let (mut status, mut length, mut stays) = (0, 0, true);
    for n in 0.. {
        let mut line = String::new();
        if reader.read_line(&mut line).map_err(|e| e.to_string())? == 0 {
            return Err(format!("the connection ended after {n} lines"));
        }
        let line = line.trim_end().to_ascii_lowercase();
        if n == 0 {
            status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        } else if line.is_empty() {
            break;
        } else if let Some(n) = line.strip_prefix("content-length: ") {
            length = n.parse().map_err(|_| line.clone())?;
        } else if line == "connection: close" {
            stays = false;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).map_err(|e| e.to_string())?;
    Ok((status, String::from_utf8_lossy(&body).into_owned(), stays))
}

fn connect(to: SocketAddr) -> Result<TcpStream, String> {
    let s = TcpStream::connect_timeout(&to, Duration::from_secs(10)).map_err(|e| format!("connect: {e}"))?;
    s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    Ok(s)
}

/// A request on a connection of its own.
fn get(to: SocketAddr, path: &str) -> Result<(u16, String), String> {
    let mut s = connect(to)?;
    write!(s, "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").map_err(|e| e.to_string())?;
    response(&mut BufReader::new(s)).map(|r| (r.0, r.1))
}

fn cluster(name: &str, backends: &[SocketAddr], more: &str) -> String {
    let hosts: String = backends
        .iter()
        .map(|a| {
            format!(
                "\n        - endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}",
                a.ip(),
                a.port()
            )
        })
        .collect();
    format!(
        "  - name: {name}\n    type: STATIC\n    connect_timeout: 5s\n{more}    load_assignment:\n      \
         cluster_name: {name}\n      endpoints:\n      - lb_endpoints:{hosts}\n"
    )
}

/// HTTP at `ports[0]`, TCP at `ports[1]`, admin pages at `ports[2]`.
fn bootstrap(ip: Ipv4Addr, ports: [u16; 3], clusters: &str) -> String {
    let at = |port| format!("{{socket_address: {{address: {ip}, port_value: {port}}}}}");
    let api = "type.googleapis.com/envoy.extensions.filters";
    format!(
        "node: {{id: restart, cluster: test}}
admin: {{address: {admin}}}
static_resources:
  listeners:
  - name: http
    address: {http}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": {api}.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          route_config:
            virtual_hosts:
            - {{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: web}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{\"@type\": {api}.http.router.v3.Router}}
  - name: tcp
    address: {tcp}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          \"@type\": {api}.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tcp
          cluster: echo
  clusters:
{clusters}",
        http = at(ports[0]),
        tcp = at(ports[1]),
        admin = at(ports[2]),
    )
}

/// Clients that go on until told otherwise; what went wrong, and how often all went well.
struct Load {
    stop: Arc<AtomicBool>,
    good: Arc<AtomicUsize>,
    failures: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn new() -> Self {
        Self { stop: Arc::default(), good: Arc::default(), failures: Arc::default(), threads: vec![] }
    }

    fn run(&mut self, what: &'static str, mut once: impl FnMut() -> Result<(), String> + Send + 'static) {
        let (stop, good, failures) = (self.stop.clone(), self.good.clone(), self.failures.clone());
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                match once() {
                    Ok(()) => good.fetch_add(1, Ordering::SeqCst),
                    Err(e) => {
                        failures.lock().unwrap().push(format!("{what}: {e}"));
                        0
                    }
                };
                sleep(Duration::from_millis(3));
            }
        }));
    }

    fn end(self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        for t in self.threads {
            t.join().unwrap();
        }
        let failures = self.failures.lock().unwrap();
        assert!(failures.is_empty(), "{} failures: {:?}", failures.len(), &failures[..failures.len().min(5)]);
        self.good.load(Ordering::SeqCst)
    }
}

fn free_ports(ip: Ipv4Addr) -> [u16; 3] {
    let held: Vec<_> = (0..3).map(|_| TcpListener::bind((ip, 0)).unwrap()).collect();
    let mut it = held.iter().map(|l| l.local_addr().unwrap().port());
    std::array::from_fn(|_| it.next().unwrap())
}

/// Each test has an address of its own.
fn ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 79, (std::process::id() % 250) as u8, n)
}

fn base_id(n: u32) -> u32 {
    2_000_000 + std::process::id() % 100_000 * 10 + n
}

#[test]
#[ignore = "whole processes; run by `cargo verify`"]
fn five_restarts_lose_nothing() {
    let ip = ip(1);
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let (web, tcp) = (backend(ip, "web"), echo(ip));
    let ports = free_ports(ip);
    let text = bootstrap(ip, ports, &(cluster("web", &[web.address], "") + &cluster("echo", &[tcp], "")));
    let file = dir.path().join("bootstrap.yaml");
    fs::write(&file, text).unwrap();
    let [http, raw, admin] = ports.map(|p| SocketAddr::from((ip, p)));
    let id = base_id(1).to_string();
    // Sockets are one for each worker, and the numbers of workers differ.
    let start = |workers: &str, more: &[&str]| {
        let mut flags = vec!["--concurrency", workers, "--base-id", &id, "--drain-time-s", "60"];
        flags.extend(more);
        Process::start(&file, &flags, &log)
    };
    let mut current = start("2", &[]);
    until("the first process", || get(http, "/").map(drop));

    let mut load = Load::new();
    for _ in 0..3 {
        let mut kept: Option<BufReader<TcpStream>> = None;
        load.run("keep-alive", move || {
            let mut c = match kept.take() {
                Some(c) => c,
                None => BufReader::new(connect(http)?),
            };
            c.get_mut().write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").map_err(|e| e.to_string())?;
            let (status, body, stays) = response(&mut c)?;
            if stays {
                kept = Some(c);
            }
            if (status, body.as_str()) == (200, "web") { Ok(()) } else { Err(format!("{status} {body}")) }
        });
        load.run("a connection each", move || match get(http, "/")? {
            (200, _) => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
    for _ in 0..2 {
        let mut long = connect(raw).unwrap();
        let mut n = 0u64;
        load.run("a long connection", move || {
            n += 1;
            long.write_all(&n.to_be_bytes()).map_err(|e| e.to_string())?;
            let mut back = [0; 8];
            long.read_exact(&mut back).map_err(|e| e.to_string())?;
            if u64::from_be_bytes(back) == n { Ok(()) } else { Err("other bytes".into()) }
        });
    }
    let epoch_page = || get(admin, "/ready").and_then(|r| if r.0 == 200 { Ok(()) } else { Err(r.1) });
    let mut replaced = vec![];
    for (i, workers) in ["4", "1", "3", "2", "2"].into_iter().enumerate() {
        let next = start(workers, &[]);
        until("a takeover", || {
            let text = fs::read_to_string(&log).unwrap();
            if text.matches("took over").count() > i { Ok(()) } else { Err(text) }
        });
        replaced.push(std::mem::replace(&mut current, next));
        sleep(Duration::from_millis(700));
        until("admin pages", epoch_page);
    }
    let good = load.end();
    println!("{good} requests and exchanges over five restarts, none failed");
    assert!(good > 500, "{good}");
    // With their last connections gone all of them end by themselves, and the last as ever.
    for p in &mut replaced {
        assert_eq!(p.end(), Some(0));
    }
    // An epoch that does not fit is said, and harms nobody.
    for (flags, says) in [(["--restart-epoch", "0"], "use --restart-epoch 6"), (["--restart-epoch", "x"], "")]
    {
        let log = dir.path().join("refused");
        let mut p = Process::start(&file, &["--base-id", &id, flags[0], flags[1]], &log);
        assert_ne!(p.end(), Some(0));
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.contains(says), "{text}");
    }
    assert_eq!(get(http, "/").unwrap().0, 200);
    current.signal("-TERM");
    assert_eq!(current.end(), Some(0));
    assert!(connect(http).is_err());
}

#[test]
#[ignore = "whole processes; run by `cargo verify`"]
fn what_is_left_ends_when_its_time_is_over_and_a_bad_successor_changes_nothing() {
    let ip = ip(2);
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let (web, tcp) = (backend(ip, "web"), echo(ip));
    let ports = free_ports(ip);
    let text = bootstrap(ip, ports, &(cluster("web", &[web.address], "") + &cluster("echo", &[tcp], "")));
    let file = dir.path().join("bootstrap.yaml");
    fs::write(&file, &text).unwrap();
    let [http, raw, _] = ports.map(|p| SocketAddr::from((ip, p)));
    let id = base_id(2).to_string();
    let flags = ["--concurrency", "2", "--base-id", &id, "--drain-time-s", "2"];
    let mut first = Process::start(&file, &flags, &log);
    until("the first process", || get(http, "/").map(drop));
    // A successor that cannot use its file.
    let bad = dir.path().join("bad.yaml");
    fs::write(&bad, text.replace("prefix: /", "prefix: 7")).unwrap();
    assert_ne!(Process::start(&bad, &flags, &dir.path().join("bad")).end(), Some(0));
    assert_eq!(get(http, "/").unwrap().0, 200);

    let mut long = connect(raw).unwrap();
    long.write_all(b"x").unwrap();
    long.read_exact(&mut [0]).unwrap();
    let second = Process::start(&file, &flags, &log);
    until("the takeover", || {
        let text = fs::read_to_string(&log).unwrap();
        if text.contains("took over") { Ok(()) } else { Err(text) }
    });
    let begun = Instant::now();
    assert!(matches!(long.read(&mut [0]), Ok(0) | Err(_)), "the connection ends");
    let held = begun.elapsed();
    assert!(held > Duration::from_millis(1500) && held < Duration::from_secs(15), "{held:?}");
    assert_eq!(first.end(), Some(0));
    assert_eq!(get(http, "/").unwrap().0, 200);
    drop(second);
}

const CHECK: &str = "    health_checks:
    - timeout: 1s
      interval: 0.05s
      no_traffic_interval: 0.05s
      unhealthy_threshold: 2
      healthy_threshold: 2
      http_health_check: {path: /health}
";

#[test]
#[ignore = "whole processes; run by `cargo verify`"]
fn upstreams_are_checked() {
    let ip = ip(3);
    let dir = tempfile::tempdir().unwrap();
    let (a, b, tcp) = (backend(ip, "a"), backend(ip, "b"), echo(ip));
    let ports = free_ports(ip);
    let clusters = cluster("web", &[a.address, b.address], CHECK) + &cluster("echo", &[tcp], "");
    let file = dir.path().join("bootstrap.yaml");
    fs::write(&file, bootstrap(ip, ports, &clusters)).unwrap();
    let [http, _, admin] = ports.map(|p| SocketAddr::from((ip, p)));
    let _process = Process::start(&file, &["--concurrency", "2"], &dir.path().join("log"));
    let flags = || -> Result<Vec<String>, String> {
        let v: serde_json::Value =
            serde_json::from_str(&get(admin, "/clusters")?.1).map_err(|e| e.to_string())?;
        let hosts = v["clusters"]["web"]["hosts"].as_array().ok_or("no hosts")?;
        Ok(hosts.iter().map(|h| h["health_flags"].as_str().unwrap_or_default().to_owned()).collect())
    };
    let is = |want: [&str; 2]| {
        until("health", || flags().and_then(|f| if f == want { Ok(()) } else { Err(format!("{f:?}")) }));
    };
    is(["healthy", "healthy"]);
    b.healthy.store(false, Ordering::SeqCst);
    is(["healthy", "/failed_active_hc"]);
    for _ in 0..10 {
        assert_eq!(get(http, "/").unwrap(), (200, "a".to_owned()));
    }
    b.healthy.store(true, Ordering::SeqCst);
    is(["healthy", "healthy"]);
    let seen: Vec<_> = (0..10).map(|_| get(http, "/").unwrap().1).collect();
    assert!(seen.contains(&"b".to_owned()), "{seen:?}");
    let metrics = get(admin, "/stats/prometheus").unwrap().1;
    assert!(metrics.contains("envoy_cluster_health_check_attempt_total{envoy_cluster_name=\"web\"}"));
}
