//! `flotilla dns` beside resolvers that are well known, with the same names, under `dnsperf`.
//!
//! All of them run on one core with one thread for queries and answer names of the mesh's zones from memory: addresses,
//! empty answers (no AAAA), denials, and denials of what search lists make of names. Ours gets them as it does in a
//! cluster, from a control plane. unbound denies with an SOA as we do, dnsmasq without one.
//!
//! `dns-cached` asks for names that another dnsmasq behind them has; after the first round all remember them.

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{
    Args,
    process::{Process, tool},
    report::Row,
};

/// Services, each with a name in three zones.
const SERVICES: usize = 2000;
/// Different questions; `dnsperf` repeats them.
const QUESTIONS: usize = 30_000;
const ZONES: [&str; 3] = ["svc.cluster.local", "svc.clusterset.local", "global"];
/// Questions under way while saturating.
const OUTSTANDING: usize = 100;
/// Where names of others are.
const FOREIGN: &str = "example.test";
const START: Duration = Duration::from_secs(60);

/// Named scenarios.
pub(crate) const ALL: [(&str, &str); 2] = [
    ("dns", "flotilla dns against unbound and dnsmasq: names of the mesh's zones"),
    ("dns-cached", "the same: names of others, remembered"),
];

struct Side {
    label: &'static str,
    address: SocketAddr,
    process: Process,
    /// What it needs besides.
    _more: Vec<Process>,
}

/// Measures a scenario: for each peer its row and ours.
pub(crate) fn measure(args: &Args, scenario: &str) -> anyhow::Result<Vec<Vec<Row>>> {
    let dir = tempfile::tempdir()?;
    let questions = dir.path().join("questions");
    let foreign = scenario == "dns-cached";
    fs::write(&questions, self::questions(foreign))?;
    let behind = behind(args, dir.path())?;
    let mut sides = vec![ours(args, dir.path(), behind.address)?];
    if args.only.as_deref() != Some("ours") {
        sides.push(unbound(args, dir.path(), behind.address)?);
        sides.push(dnsmasq(args, dir.path(), behind.address)?);
    }
    if foreign {
        for side in &sides {
            // Round by round so slowly that nothing is lost.
            load(args, side, &questions, &["-q".into(), "20".into(), "-n".into(), "1".into()])?;
        }
    }
    let mut rows: Vec<Row> =
        sides.iter().map(|s| Row { side: s.label.to_owned(), ..Row::default() }).collect();
    for _ in 0..args.runs {
        for (side, row) in sides.iter().zip(&mut rows) {
            match run(args, side, &questions) {
                Ok(figures) => row.add(&figures),
                Err(e) => row.error = Some(format!("{e:#}")),
            }
        }
    }
    if args.keep {
        println!("{}", dir.keep().display());
    }
    let [own, peers @ ..] = rows.as_mut_slice() else { return Ok(vec![]) };
    if peers.is_empty() {
        own.scenario = scenario.to_owned();
        return Ok(vec![vec![own.clone()]]);
    }
    let pair = |peer: &mut Row| {
        let scenario = format!("{scenario} ({})", peer.side);
        peer.scenario.clone_from(&scenario);
        vec![peer.clone(), Row { scenario, against: Some(peer.side.clone()), ..own.clone() }]
    };
    Ok(peers.iter_mut().map(pair).collect())
}

/// Saturated, then at a rate that all of them can keep up with.
fn run(args: &Args, side: &Side, questions: &Path) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let (rate, latency, cpu) = load(args, side, questions, &["-q".into(), OUTSTANDING.to_string()])?;
    let mut figures = vec![("queries_per_s", rate), ("cpu_s_per_100k", cpu), ("mean_latency_us", latency)];
    if !args.no_latency {
        let paced = u64::from(args.rate) * 10;
        let (_, latency, cpu) = load(args, side, questions, &["-Q".into(), paced.to_string()])?;
        figures.push(("paced_mean_latency_us", latency));
        figures.push(("paced_cpu_s_per_100k", cpu));
    }
    figures.push(("rss_mib", side.process.memory("VmRSS")));
    Ok(figures)
}

/// Queries per second, mean latency in microseconds, CPU seconds for 100,000.
fn load(args: &Args, side: &Side, questions: &Path, more: &[String]) -> anyhow::Result<(f64, f64, f64)> {
    let mut command = vec!["dnsperf".to_owned()];
    for (flag, value) in [
        ("-s", side.address.ip().to_string()),
        ("-p", side.address.port().to_string()),
        ("-d", questions.display().to_string()),
        ("-l", args.seconds.to_string()),
        ("-c", "8".into()),
        ("-T", "1".into()),
    ] {
        command.extend([flag.to_owned(), value]);
    }
    command.extend_from_slice(more);
    let before = side.process.cpu();
    let text = tool(args.load_cpu, &command, Duration::from_secs(args.seconds + 30))?;
    let cpu = side.process.cpu() - before;
    let (completed, lost) = (figure(&text, "Queries completed:")?, figure(&text, "Queries lost:")?);
    // What is lost or failed costs little: such a run would flatter.
    if lost > completed / 1000.0 || text.contains("SERVFAIL") || text.contains("REFUSED") {
        bail!("{lost} of {completed} lost: {text}");
    }
    let latency = figure(&text, "Average Latency (s):")?;
    Ok((figure(&text, "Queries per second:")?, latency * 1e6, cpu / completed * 1e5))
}

/// The number after a word of `dnsperf`'s.
fn figure(text: &str, word: &str) -> anyhow::Result<f64> {
    let line = text.lines().find_map(|l| l.trim().strip_prefix(word));
    let number = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok());
    number.with_context(|| format!("dnsperf (Debian: dnsperf) said no {word:?}: {text}"))
}

fn service(i: usize) -> String {
    format!("service-{i}.ns-{}", i % 50)
}

fn address(i: usize) -> Ipv4Addr {
    let [.., a, b] = u32::try_from(i).unwrap_or(0).to_be_bytes();
    Ipv4Addr::new(10, 96, a, b)
}

/// Of ten of the mesh's, six are answered with an address, one is empty, three are denied.
fn questions(foreign: bool) -> String {
    let mut out = String::new();
    // Spread over the services without being random: all sides get the same.
    for i in 0..QUESTIONS {
        let name = service(i.wrapping_mul(7919) % SERVICES);
        let zone = ZONES[i % 3];
        let _ = match i % 10 {
            _ if foreign => writeln!(out, "{name}.{FOREIGN} A"),
            0 => writeln!(out, "{name}.{zone} AAAA"),
            1 => writeln!(out, "no-{name}.{zone} A"),
            2 => writeln!(out, "{name}.svc.clusterset.local.ns-1.svc.cluster.local A"),
            3 => writeln!(out, "{name}.svc.clusterset.local.svc.cluster.local A"),
            _ => writeln!(out, "{name}.{zone} A"),
        };
    }
    out
}

fn free() -> anyhow::Result<SocketAddr> {
    // Free for datagrams and, at the time of asking, mostly for connections as well.
    Ok(UdpSocket::bind("127.0.0.1:0")?.local_addr()?)
}

fn flotilla(args: &Args) -> anyhow::Result<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/release/flotilla");
    let bin = args.flotilla.clone().unwrap_or(built);
    if !bin.exists() {
        bail!("{} is missing: cargo build --release --package flotilla", bin.display());
    }
    Ok(bin)
}

fn ours(args: &Args, dir: &Path, behind: SocketAddr) -> anyhow::Result<Side> {
    let bin = flotilla(args)?;
    let at = |name: &str| dir.join(name).display().to_string();
    fs::create_dir(dir.join("config"))?;
    let mut config = String::new();
    for i in 0..SERVICES {
        let (name, namespace) = (format!("service-{i}"), format!("ns-{}", i % 50));
        let _ = write!(
            config,
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec:\n  clusterIP: {ip}\n  ports: [{{name: http, port: 80}}]\n---\n\
             apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\n\
             metadata: {{name: {name}, namespace: {namespace}}}\n---\n",
            ip = address(i),
        );
    }
    fs::write(dir.join("config/services.yaml"), config)?;
    let flags = |command: &str, list: &[(&str, String)]| -> Vec<String> {
        let list = list.iter().map(|(k, v)| format!("--{k}={v}"));
        std::iter::once(command.to_owned()).chain(list).collect()
    };
    let program = bin.display().to_string();
    let (xds, state) = (free()?, at("state"));
    let control = Process::start(
        args.load_cpu,
        &dir.join("control-plane.log"),
        &program,
        &flags(
            "control-plane",
            &[
                ("cluster", "west".into()),
                ("state-dir", state.clone()),
                ("config", at("config")),
                ("xds", xds.to_string()),
                ("metrics", free()?.to_string()),
                ("federation", free()?.to_string()),
                ("mixer", free()?.to_string()),
                ("gateway-address", "127.0.0.1:15443".into()),
            ],
        ),
    )?;
    let output = |args: &[&str]| -> anyhow::Result<Option<String>> {
        let o = Command::new(&bin).args(args).output()?;
        Ok(o.status.success().then(|| String::from_utf8_lossy(&o.stdout).into_owned()))
    };
    until("a mesh", || Ok(output(&["found", "--state-dir", &state])?.map(drop)))?;
    let account = ["--namespace", "ns-0", "--service-account", "dns"];
    let token =
        until("a token", || output(&[&["token", "workload", "--state-dir", &state], &account[..]].concat()))?;
    fs::write(dir.join("token"), token)?;
    let address = free()?;
    let process = Process::start(
        args.proxy_cpu,
        &dir.join("dns.log"),
        &program,
        &flags(
            "dns",
            &[
                ("discovery", xds.to_string()),
                ("cluster", "west".into()),
                ("namespace", "ns-0".into()),
                ("service-account", "dns".into()),
                ("root-cert", at("state/ca/root-cert.pem")),
                ("token-file", at("token")),
                ("listen", address.to_string()),
                ("upstream", behind.to_string()),
                ("concurrency", "1".into()),
                ("drain-seconds", "0".into()),
                ("readiness", free()?.to_string()),
                ("metrics", free()?.to_string()),
            ],
        ),
    )?;
    wait_for_names(address)?;
    Ok(Side { label: "ours", address, process, _more: vec![control] })
}

fn unbound(args: &Args, dir: &Path, behind: SocketAddr) -> anyhow::Result<Side> {
    let address = free()?;
    let mut config = format!(
        "server:\n  interface: {}@{}\n  num-threads: 1\n  chroot: \"\"\n  username: \"\"\n  pidfile: \"\"\n  \
         use-syslog: no\n  do-daemonize: no\n  module-config: \"iterator\"\n  minimal-responses: yes\n  \
         so-rcvbuf: 4m\n  do-not-query-localhost: no\n  \
         local-zone: \"test.\" nodefault\n",
        address.ip(),
        address.port(),
    );
    for zone in ["svc.cluster.local", "clusterset.local", "global"] {
        let soa = "3 IN SOA ns.flotilla.internal. hostmaster.flotilla.internal. 1 60 60 60 3";
        let _ = write!(config, "  local-zone: \"{zone}.\" static\n  local-data: \"{zone}. {soa}\"\n");
    }
    for i in 0..SERVICES {
        for zone in ZONES {
            let _ = writeln!(config, "  local-data: \"{}.{zone}. 3 IN A {}\"", service(i), self::address(i));
        }
    }
    let _ = write!(
        config,
        "remote-control:\n  control-enable: no\nforward-zone:\n  name: \".\"\n  forward-addr: {}@{}\n",
        behind.ip(),
        behind.port(),
    );
    let file = dir.join("unbound.conf");
    fs::write(&file, config)?;
    let flags = ["-d", "-c", &file.display().to_string()].map(str::to_owned);
    let process = start(args.proxy_cpu, dir, "unbound", "unbound", address, &flags)?;
    wait_for_names(address)?;
    Ok(Side { label: "unbound", address, process, _more: vec![] })
}

fn dnsmasq(args: &Args, dir: &Path, behind: SocketAddr) -> anyhow::Result<Side> {
    let mut hosts = String::new();
    for i in 0..SERVICES {
        for zone in ZONES {
            let _ = writeln!(hosts, "{} {}.{zone}", self::address(i), service(i));
        }
    }
    let more = [
        "--local=/svc.cluster.local/".to_owned(),
        "--local=/clusterset.local/".to_owned(),
        "--local=/global/".to_owned(),
        "--local-ttl=3".to_owned(),
        format!("--server={}#{}", behind.ip(), behind.port()),
    ];
    let address = free()?;
    let flags = dnsmasq_flags(dir, "dnsmasq", address, &hosts, &more)?;
    let process = start(args.proxy_cpu, dir, "dnsmasq", "dnsmasq", address, &flags)?;
    wait_for_names(address)?;
    Ok(Side { label: "dnsmasq", address, process, _more: vec![] })
}

/// What has the names of others.
fn behind(args: &Args, dir: &Path) -> anyhow::Result<Side> {
    let mut hosts = String::new();
    for i in 0..SERVICES {
        let _ = writeln!(hosts, "{} {}.{FOREIGN}", self::address(i), service(i));
    }
    let address = free()?;
    let flags = dnsmasq_flags(dir, "behind", address, &hosts, &["--local-ttl=3600".to_owned()])?;
    let process = start(args.load_cpu, dir, "behind", "dnsmasq", address, &flags)?;
    Ok(Side { label: "behind", address, process, _more: vec![] })
}

fn dnsmasq_flags(
    dir: &Path,
    name: &str,
    address: SocketAddr,
    hosts: &str,
    more: &[String],
) -> anyhow::Result<Vec<String>> {
    let file = dir.join(format!("{name}.hosts"));
    fs::write(&file, hosts)?;
    let mut flags = [
        "--conf-file=/dev/null",
        "--keep-in-foreground",
        "--user=root",
        "--no-resolv",
        "--no-hosts",
        "--pid-file",
        "--bind-interfaces",
        "--cache-size=10000",
        &format!("--listen-address={}", address.ip()),
        &format!("--port={}", address.port()),
        &format!("--addn-hosts={}", file.display()),
    ]
    .map(str::to_owned)
    .to_vec();
    flags.extend_from_slice(more);
    Ok(flags)
}

fn start(
    cpu: usize,
    dir: &Path,
    name: &str,
    program: &str,
    address: SocketAddr,
    flags: &[String],
) -> anyhow::Result<Process> {
    let mut process = Process::start(cpu, &dir.join(format!("{name}.log")), program, flags)?;
    process
        .wait_for(address)
        .with_context(|| format!("{program} (Debian: unbound, dnsmasq-base), see {}", dir.display()))?;
    Ok(process)
}

fn until<T>(what: &str, mut f: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let end = Instant::now() + START;
    while Instant::now() < end {
        if let Some(t) = f()? {
            return Ok(t);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("{what}: not within {} s", START.as_secs())
}

/// Until the last service has its address.
fn wait_for_names(at: SocketAddr) -> anyhow::Result<()> {
    let last = SERVICES - 1;
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in format!("{}.svc.clusterset.local", service(last)).split('.') {
        question.push(u8::try_from(label.len())?);
        question.extend(label.bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    let expected = address(last).octets();
    until("names", || {
        let s = UdpSocket::bind("127.0.0.1:0")?;
        s.set_read_timeout(Some(Duration::from_millis(500)))?;
        s.send_to(&question, at)?;
        let mut answer = [0; 512];
        let Ok(n) = s.recv(&mut answer) else { return Ok(None) };
        Ok(answer[..n].ends_with(&expected).then_some(()))
    })
}
