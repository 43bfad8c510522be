//! Whole processes: the root of a mesh is replaced under traffic, and nobody notices.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::*;

/// An application, until it is dropped: `/stream` goes on for ever, everything else is answered at once.
struct App {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    accept: Option<JoinHandle<()>>,
}

fn serve(address: SocketAddr) -> App {
    let listener = TcpListener::bind(address).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let accept = std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if stopped.load(Relaxed) {
                return;
            }
            std::thread::spawn(move || answer(stream));
        }
    });
    App { address, stop, accept: Some(accept) }
}

impl Drop for App {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        // Wakes the thread, so that the address is free for the next test.
        if TcpStream::connect(self.address).is_ok()
            && let Some(accept) = self.accept.take()
        {
            let _ = accept.join();
        }
    }
}

fn answer(mut stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        if !head.starts_with("GET /stream") {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes").ok()?;
            continue;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").ok()?;
        for n in 0_u64.. {
            let line = format!("{n}\n");
            write!(stream, "{:x}\r\n{line}\r\n", line.len()).ok()?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A connection to a sidecar's HTTP proxy.
struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    fn connect(proxy: SocketAddr) -> Result<Self, String> {
        let tcp = TcpStream::connect(proxy).map_err(|e| e.to_string())?;
        tcp.set_nodelay(true).unwrap();
        tcp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Ok(Self { reader: BufReader::new(tcp) })
    }

    /// Sends a request and reads the head of the answer: 200, and the length if it has one.
    fn ask(&mut self, service: &str, path: &str) -> Result<usize, String> {
        let host = format!("{service}.{NAMESPACE}:9080");
        let request = format!("GET http://{host}{path} HTTP/1.1\r\nhost: {host}\r\n\r\n");
        self.reader.get_mut().write_all(request.as_bytes()).map_err(|e| e.to_string())?;
        let (mut first, mut length) = (String::new(), 0);
        self.reader.read_line(&mut first).map_err(|e| e.to_string())?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).map_err(|e| e.to_string())? == 0 {
                return Err(format!("closed after {first:?}"));
            }
            if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = n.trim().parse().map_err(|_| line.clone())?;
            }
            if line == "\r\n" {
                break;
            }
        }
        if first.starts_with("HTTP/1.1 200") { Ok(length) } else { Err(first) }
    }

    fn get(&mut self, service: &str) -> Result<(), String> {
        let length = self.ask(service, "/")?;
        let mut body = vec![0; length];
        self.reader.read_exact(&mut body).map_err(|e| e.to_string())?;
        if body == b"yes" { Ok(()) } else { Err(format!("{:?}", String::from_utf8_lossy(&body))) }
    }
}

/// Requests at a steady rate, from several sidecars to several services.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    kept: AtomicU64,
    fresh: AtomicU64,
    lines: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Load {
    fn failed(&self, what: String) {
        self.failures.lock().unwrap().push(what);
    }

    /// A thread that sends `rate` requests a second; each on a connection of its own if it is `fresh`.
    fn requests(
        self: &Arc<Self>,
        proxy: Ipv4Addr,
        service: &'static str,
        rate: u32,
        fresh: bool,
    ) -> JoinHandle<()> {
        let (load, proxy) = (self.clone(), SocketAddr::from((proxy, HTTP_PROXY)));
        std::thread::spawn(move || {
            let begun = Instant::now();
            let mut connection = None;
            for n in 0_u32.. {
                if load.stop.load(Relaxed) {
                    return;
                }
                let due = Duration::from_secs(1) * n / rate;
                std::thread::sleep(due.saturating_sub(begun.elapsed()));
                let taken: Option<Client> = connection.take().filter(|_| !fresh);
                let asked = taken
                    .map_or_else(|| Client::connect(proxy), Ok)
                    .and_then(|mut c| c.get(service).map(|()| c));
                match asked {
                    Ok(c) => connection = Some(c),
                    Err(e) => load.failed(format!("{proxy} -> {service} (new connection: {fresh}): {e}")),
                }
                if fresh { &load.fresh } else { &load.kept }.fetch_add(1, Relaxed);
            }
        })
    }

    /// One answer that does not end.
    fn stream(self: &Arc<Self>, proxy: Ipv4Addr, service: &'static str) -> JoinHandle<()> {
        let (load, proxy) = (self.clone(), SocketAddr::from((proxy, HTTP_PROXY)));
        std::thread::spawn(move || {
            let mut c = Client::connect(proxy).unwrap();
            if let Err(e) = c.ask(service, "/stream") {
                return load.failed(format!("the stream did not begin: {e}"));
            }
            let mut expected = 0_u64;
            while !load.stop.load(Relaxed) {
                // Sizes of chunks are hexadecimal without a sign; lines of the body are told by their order.
                let mut line = String::new();
                match c.reader.read_line(&mut line) {
                    Ok(n) if n > 0 => {}
                    other => {
                        return load.failed(format!("the stream ended after {expected} lines: {other:?}"));
                    }
                }
                let body = line.ends_with('\n') && !line.ends_with("\r\n");
                if body {
                    if line.trim() != expected.to_string() {
                        return load.failed(format!("the stream says {line:?} instead of {expected}"));
                    }
                    expected += 1;
                    load.lines.store(expected, Relaxed);
                }
            }
        })
    }
}

/// A cluster with an exported service at its first workload, and a storefront that calls at its second.
struct Member {
    cluster: Cluster,
    service: &'static str,
    app: Option<App>,
}

const PROCESSES: [&str; 4] = ["control-plane", "eastwest", "", "storefront"];

impl Member {
    fn new(name: &'static str, service: &'static str) -> Self {
        let cluster = Cluster::start_after(name, |_| vec!["--renew-within=3".into()]);
        Self { cluster, service, app: None }
    }

    fn proxies(&mut self) {
        let (name, c) = (self.service, &mut self.cluster);
        let app = SocketAddr::from((c.workload(3), 9080));
        self.app = Some(serve(app));
        let export = format!(
            "---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {{name: {name}, namespace: \
             {NAMESPACE}}}\n"
        );
        c.write("service.yaml", &(service(name, c.workload(1), app.port(), IN_MESH) + &export));
        c.east_west_gateway();
        c.ready(c.host(3));
        c.sidecar(name, c.workload(1), Some(app));
        c.sidecar("storefront", c.workload(2), None);
        c.ready(c.workload(1));
        c.ready(c.workload(2));
    }

    fn pids(&self) -> Vec<u32> {
        let all = PROCESSES.map(|p| if p.is_empty() { self.service } else { p });
        all.iter().map(|p| self.cluster.pid(p)).collect()
    }

    fn storefront(&self) -> Ipv4Addr {
        self.cluster.workload(2)
    }
}

/// A process that runs, and is no corpse.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn ok(c: &Cluster, args: &[&str]) -> String {
    let o = c.flotilla(args);
    assert_eq!(o.code, 0, "{args:?}: {o:?}");
    o.out
}

fn json(c: &Cluster, args: &[&str]) -> Value {
    serde_json::from_str(&ok(c, args)).unwrap()
}

fn status(c: &Cluster) -> Value {
    json(c, &["ca", "status", "-o", "json"])
}

fn members(v: &Value) -> &Vec<Value> {
    v["members"].as_array().unwrap()
}

/// Until all `n` members, with `proxies` proxies each, have acknowledged, and besides what `also` says.
fn all(what: &str, c: &Cluster, n: usize, proxies: u64, also: impl Fn(&Value, &Value) -> bool) -> Duration {
    let begun = Instant::now();
    until(what, || {
        let v = status(c);
        let good = members(&v).len() == n
            && members(&v).iter().all(|m| {
                m["acknowledged"] == true
                    && m["proxies"] == proxies
                    && m["trusting"] == proxies
                    && also(&v, m)
            });
        if good { Ok(()) } else { Err(format!("{v:#}")) }
    });
    begun.elapsed()
}

/// Its certificate, and that of its proxies, are under the root that signs.
fn renewed(v: &Value, m: &Value) -> bool {
    m["root"] == v["root"] && m["renewed"] == m["proxies"]
}

/// What a proxy shows, in files for `openssl`: certificate, what lies above it, key.
struct Kept([String; 3]);

fn keep_certificate(c: &Cluster, proxy: &str, what: &str) -> Kept {
    const END: &str = "-----END CERTIFICATE-----\n";
    let read = |n: &str| fs::read_to_string(c.proxy_state(proxy).join(n)).unwrap();
    let chain = read("svid-chain.pem");
    let (leaf, above) = chain.split_at(chain.find(END).unwrap() + END.len());
    let parts = [("leaf", leaf.to_owned()), ("above", above.to_owned()), ("key", read("svid-key.pem"))];
    Kept(parts.map(|(n, content)| {
        let to = c.path(&format!("{what}-{n}.pem"));
        fs::write(&to, content).unwrap();
        to.display().to_string()
    }))
}

/// What `openssl s_client` says of a handshake, and what it is answered then.
fn openssl(at: SocketAddr, sni: &str, alpn: &str, roots: &str, own: Option<&Kept>) -> Outcome {
    let at = at.to_string();
    let mut args = vec![
        "3",
        "openssl",
        "s_client",
        "-connect",
        &at,
        "-servername",
        sni,
        "-alpn",
        alpn,
        "-CAfile",
        roots,
        "-no-CApath",
        "-no-CAstore",
        "-showcerts",
        "-ign_eof",
    ];
    if let Some(Kept([leaf, above, key])) = own {
        args.extend(["-cert", leaf, "-cert_chain", above, "-key", key]);
    }
    run("timeout", &args)
}

fn workload_sni(name: &str) -> String {
    format!("outbound_.9080_._.{name}.{NAMESPACE}.svc.cluster.local")
}

/// Everything that shows a certificate in a cluster.
fn servers(m: &Member) -> Vec<(SocketAddr, String, &'static str)> {
    let c = &m.cluster;
    vec![
        ((c.workload(1), 9080).into(), workload_sni(m.service), "istio"),
        ((c.host(1), 15012).into(), "control-plane.flotilla-system.svc".into(), "h2"),
        ((c.host(1), 15016).into(), format!("federation.{}.clusterset.local", c.name), "h2"),
    ]
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn the_root_is_replaced_under_traffic() {
    let rate: u32 = std::env::var("FLOTILLA_ROTATION_RPS").ok().and_then(|r| r.parse().ok()).unwrap_or(300);
    let mut mesh =
        [Member::new("west", "details"), Member::new("east", "ratings"), Member::new("north", "reviews")];
    mesh[0].cluster.found();
    mesh[0].proxies();
    for n in 1..3 {
        let token = ok(&mesh[0].cluster, &["token", "create"]);
        ok(&mesh[n].cluster, &["join-cluster", token.trim()]);
    }
    mesh[1..].iter_mut().for_each(Member::proxies);
    let [west, east, north] = &mesh;
    let c = &west.cluster;
    let services = [west.service, east.service, north.service];
    for m in &mesh {
        for s in services {
            until(&format!("{s} from {}", m.cluster.name), || {
                Client::connect((m.storefront(), HTTP_PROXY).into())?.get(s)
            });
        }
    }
    all("everybody knows the first bundle", c, 3, 3, |v, m| v["sequence"] == 1 && renewed(v, m));
    let old_roots = c.path("old-roots.pem").display().to_string();
    fs::copy(c.path("state/ca/root-cert.pem"), &old_roots).unwrap();
    let old_pin = status(c)["root"].as_str().unwrap().to_owned();
    let old = keep_certificate(c, "storefront", "old");
    let pids: Vec<u32> = mesh.iter().flat_map(Member::pids).collect();

    let load = Arc::new(Load::default());
    // Nine pairs of caller and service; most requests on connections that stay, a sixth on new ones.
    let fresh = (rate / 6 / 9).max(1);
    let kept = (rate / 9).saturating_sub(fresh).max(1);
    let mut threads = vec![load.stream(west.storefront(), "ratings")];
    for m in &mesh {
        for s in services {
            threads.push(load.requests(m.storefront(), s, kept, false));
            threads.push(load.requests(m.storefront(), s, fresh, true));
        }
    }
    let begun = Instant::now();
    std::thread::sleep(Duration::from_secs(2));

    ok(c, &["ca", "rotate", "prepare"]);
    let trusted = all("everybody trusts the new root", c, 3, 3, |v, m| v["sequence"] == 2 && renewed(v, m));
    ok(c, &["ca", "rotate", "prepare"]);
    assert_eq!(status(c)["sequence"], 2, "done twice is done once");
    std::thread::sleep(Duration::from_secs(1));
    ok(c, &["ca", "rotate", "activate"]);
    let early = c.flotilla(&["ca", "rotate", "finish"]);
    assert!(early.code == 1 && early.err.contains("east:"), "nobody has renewed yet: {early:?}");
    let signing = all("everybody is under the new root", c, 3, 3, |v, m| {
        v["sequence"] == 3 && v["root"] != old_pin.as_str() && renewed(v, m)
    });
    std::thread::sleep(Duration::from_secs(1));
    ok(c, &["ca", "rotate", "finish"]);
    let gone = all("the old root is gone", c, 3, 3, |v, m| v["sequence"] == 4 && renewed(v, m));
    std::thread::sleep(Duration::from_secs(3));

    let lasted = begun.elapsed();
    load.stop.store(true, Relaxed);
    threads.into_iter().for_each(|t| t.join().unwrap());
    let failures = load.failures.lock().unwrap();
    let (kept, fresh) = (load.kept.load(Relaxed), load.fresh.load(Relaxed));
    let restarts = pids.iter().filter(|p| !runs(**p)).count();
    println!(
        "{} requests in {:.1} s ({:.0}/s of {rate}/s asked for): {kept} on kept connections, {fresh} on new ones; stream of \
         {} lines; {} failed; {restarts} of {} processes restarted; acknowledged after {:.1} s, renewed after {:.1} s, \
         gone after {:.1} s",
        kept + fresh,
        lasted.as_secs_f64(),
        (kept + fresh) as f64 / lasted.as_secs_f64(),
        load.lines.load(Relaxed),
        failures.len(),
        pids.len(),
        trusted.as_secs_f64(),
        signing.as_secs_f64(),
        gone.as_secs_f64(),
    );
    assert_eq!((failures.len(), restarts), (0, 0), "{:#?}", &failures[..failures.len().min(20)]);
    assert!(load.lines.load(Relaxed) > 50, "the stream went on");
    assert_eq!(mesh.iter().flat_map(Member::pids).collect::<Vec<_>>(), pids);

    // What is shown chains to the new root alone, and what was shown before is refused.
    let new_roots = c.path("state/ca/root-cert.pem").display().to_string();
    for m in &mesh {
        let shown = json(&m.cluster, &["ca", "show", "-o", "json"]);
        assert_eq!(
            (shown["roots"].as_array().unwrap().len(), &shown["sequence"]),
            (1, &4.into()),
            "{shown:#}"
        );
        assert_ne!(shown["roots"][0]["pin"], old_pin.as_str());
        let fresh = keep_certificate(&m.cluster, "storefront", "new");
        for (at, sni, alpn) in servers(m) {
            let o = openssl(at, &sni, alpn, &new_roots, Some(&fresh));
            assert!(o.out.contains("Verify return code: 0 (ok)"), "{at} {sni}: {o:?}");
            assert!(!o.err.contains("alert"), "the new certificate is taken: {o:?}");
            let o = openssl(at, &sni, alpn, &old_roots, None);
            assert!(!o.out.contains("Verify return code: 0 (ok)"), "{at} {sni} under the old root: {o:?}");
            let o = openssl(at, &sni, alpn, &new_roots, Some(&old));
            assert!(o.err.contains("alert"), "{at} {sni} takes a certificate under the old root: {o:?}");
        }
    }
    let doctor = c.flotilla(&["doctor"]);
    assert!(doctor.code == 0 && !doctor.out.contains("rotated"), "{doctor:?}");
}

fn signal(pid: u32, name: &str) {
    let o = run("kill", &[name, &pid.to_string()]);
    assert_eq!(o.code, 0, "{o:?}");
}

/// Phase, number and root: what must not depend on a process.
fn stands(c: &Cluster) -> [Value; 4] {
    let (v, shown) = (status(c), json(c, &["ca", "show", "-o", "json"]));
    [v["phase"].clone(), v["sequence"].clone(), v["root"].clone(), shown["roots"].clone()]
}

#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn nobody_is_left_behind_and_nothing_is_forgotten() {
    let mut west = Member::new("west", "details");
    let mut east = Member::new("east", "ratings");
    west.cluster.found();
    west.proxies();
    let token = ok(&west.cluster, &["token", "create"]);
    ok(&east.cluster, &["join-cluster", token.trim()]);
    east.proxies();
    let restart = |m: &mut Member| {
        let before = stands(&m.cluster);
        m.cluster.kill("control-plane");
        m.cluster.control_plane();
        assert_eq!(stands(&m.cluster), before, "after kill -9");
    };
    all("both", &west.cluster, 2, 3, |_, _| true);
    let o = east.cluster.flotilla(&["ca", "rotate", "prepare"]);
    assert!(o.code == 1 && o.err.contains("the root key is not here"), "{o:?}");
    let o = west.cluster.flotilla(&["ca", "rotate", "activate"]);
    assert!(o.code == 1 && o.err.contains("prepare"), "{o:?}");

    // Taken back.
    ok(&west.cluster, &["ca", "rotate", "prepare"]);
    restart(&mut west);
    all("prepared", &west.cluster, 2, 3, |v, _| v["phase"] == "prepared");
    ok(&west.cluster, &["ca", "rotate", "abort"]);
    all("aborted", &west.cluster, 2, 3, |v, _| v["phase"] == "steady" && v["sequence"] == 3);

    // East is cut off.
    let pid = east.cluster.pid("control-plane");
    signal(pid, "-STOP");
    ok(&west.cluster, &["ca", "rotate", "prepare"]);
    let o = west.cluster.flotilla(&["ca", "rotate", "activate"]);
    assert!(o.code == 1 && o.err.contains("east: "), "{o:?}");
    until("it is named as unreachable", || {
        let o = west.cluster.flotilla(&["ca", "rotate", "activate"]);
        assert_eq!(o.code, 1, "{o:?}");
        if o.err.contains("east: unreachable: last heard") { Ok(()) } else { Err(format!("{o:?}")) }
    });
    restart(&mut west);
    signal(pid, "-CONT");
    until("it is back", || {
        let o = west.cluster.flotilla(&["ca", "rotate", "activate"]);
        if o.code == 0 { Ok(()) } else { Err(format!("{o:?}")) }
    });
    restart(&mut west);
    let o = west.cluster.flotilla(&["ca", "rotate", "abort"]);
    assert!(o.code == 1 && o.err.contains("finish"), "{o:?}");
    all("renewed", &west.cluster, 2, 3, renewed);
    ok(&west.cluster, &["ca", "rotate", "finish"]);
    restart(&mut west);
    all("the end", &west.cluster, 2, 3, |v, m| v["phase"] == "steady" && renewed(v, m));
    let table = ok(&west.cluster, &["ca", "status"]);
    assert!(table.contains("CLUSTER") && table.contains("acknowledged"), "{table}");
    until("the service of east", || Client::connect((west.storefront(), HTTP_PROXY).into())?.get("ratings"));
}

/// An Envoy counts like a proxy of ours.
#[test]
#[ignore = "needs Envoy; cargo verify installs it"]
fn a_foreign_envoy_takes_part() {
    let envoy = PathBuf::from(std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary"));
    let mut c = Cluster::start_after("west", |_| vec!["--renew-within=2".into()]);
    c.found();
    let app = SocketAddr::from((c.workload(3), 9080));
    let _app = serve(app);
    c.write("service.yaml", &service("details", c.workload(1), app.port(), IN_MESH));
    c.east_west_gateway();
    c.ready(c.host(3));
    c.envoy_sidecar(&envoy, "details", c.workload(1), app);
    c.sidecar("storefront", c.workload(2), None);
    c.ready(c.workload(2));
    let proxy = SocketAddr::from((c.workload(2), HTTP_PROXY));
    until("a request", || Client::connect(proxy)?.get("details"));
    all("all three", &c, 1, 3, |_, _| true);
    ok(&c, &["ca", "rotate", "prepare"]);
    // While Envoy does not answer, its agent does not say that it trusts anything new.
    all("trusted by Envoy too", &c, 1, 3, |v, _| v["sequence"] == 2);
    ok(&c, &["ca", "rotate", "activate"]);
    all("renewed by Envoy too", &c, 1, 3, renewed);
    ok(&c, &["ca", "rotate", "finish"]);
    all("the end", &c, 1, 3, renewed);
    let new_roots = c.path("state/ca/root-cert.pem").display().to_string();
    let own = keep_certificate(&c, "storefront", "new");
    let o = openssl((c.workload(1), 9080).into(), &workload_sni("details"), "istio", &new_roots, Some(&own));
    assert!(o.out.contains("Verify return code: 0 (ok)"), "{o:?}");
    Client::connect(proxy).unwrap().get("details").unwrap();
}

/// Who is federated with the mesh learns its roots by their number, as ever.
#[test]
#[ignore = "needs the flotilla binary; cargo verify builds it"]
fn another_trust_domain_follows() {
    let start = |name, service, domain| {
        let cluster = Cluster::start_in(name, domain, Transport::Tcp);
        Member { cluster, service, app: None }
    };
    let mut west = start("west", "details", "a.example");
    let mut north = start("north", "reviews", "b.example");
    for m in [&mut west, &mut north] {
        m.cluster.found();
        m.proxies();
    }
    let token = ok(&west.cluster, &["token", "create", "--federate", "b.example"]);
    ok(&north.cluster, &["join-cluster", token.trim()]);
    let both_ways = |what: &str| {
        for (from, to) in [(&west, "reviews"), (&north, "details")] {
            until(&format!("{what}: {to} from {}", from.cluster.name), || {
                Client::connect((from.storefront(), HTTP_PROXY).into())?.get(to)
            });
        }
    };
    both_ways("federated");
    let told = |sequence: u64, roots: u64| {
        until(&format!("north has bundle {sequence}"), || {
            let b = json(&north.cluster, &["clusters", "-o", "json"])["trustBundles"][0].clone();
            let so = b["sequence"] == sequence && b["roots"] == roots && b["error"] == "";
            if so { Ok(()) } else { Err(b.to_string()) }
        });
    };
    let c = &west.cluster;
    ok(c, &["ca", "rotate", "prepare"]);
    told(2, 2);
    all("the own proxies", c, 1, 3, |_, _| true);
    both_ways("prepared");
    ok(c, &["ca", "rotate", "activate"]);
    told(3, 2);
    all("renewed", c, 1, 3, renewed);
    both_ways("activated");
    ok(c, &["ca", "rotate", "finish"]);
    told(4, 1);
    all("the end", c, 1, 3, renewed);
    // Not over the sessions that there were.
    for m in [&mut west, &mut north] {
        for p in ["storefront", m.service] {
            m.cluster.kill(p);
        }
        let (service, app) = (m.service, SocketAddr::from((m.cluster.workload(3), 9080)));
        m.cluster.sidecar(service, m.cluster.workload(1), Some(app));
        m.cluster.sidecar("storefront", m.cluster.workload(2), None);
        m.cluster.ready(m.cluster.workload(1));
        m.cluster.ready(m.cluster.workload(2));
    }
    for (from, to) in [(&west, "reviews"), (&north, "details")] {
        until(&format!("by the new root: {to} from {}", from.cluster.name), || {
            Client::connect((from.storefront(), HTTP_PROXY).into())?.get(to)
        });
    }
    let shown = status(&west.cluster);
    let domain = &shown["otherDomains"][0];
    assert_eq!((&domain["cluster"], &domain["sequence"]), (&"north".into(), &4.into()), "{shown:#}");
}
