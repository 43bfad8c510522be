//! A control plane under many proxies: real delta ADS, no proxies behind it.
//!
//! The control plane and the clients share the machine's cores. Clients subscribe as a sidecar does (listeners and
//! clusters by wildcard, what these name after that), acknowledge everything, and keep nothing but versions. A change is
//! timed from the moment its file is in place to the moment at which a client has what changed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use mesh_xds::{
    pb,
    type_url::{CDS, EDS, LDS, RDS, VHDS},
};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tonic::{
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

use crate::process::Process;

/// First argument of this command.
pub(crate) const COMMAND: &str = "control-plane";

/// Measures a control plane with many connected proxies.
#[derive(Debug, Parser)]
#[command(name = "bench-pair control-plane")]
struct Args {
    /// Connected proxies, one row for each number
    #[arg(long, value_delimiter = ',', default_value = "100,300,1000")]
    proxies: Vec<usize>,
    /// Services, one row for each number
    #[arg(long, value_delimiter = ',', default_value = "2000")]
    services: Vec<usize>,
    /// Endpoints of each service
    #[arg(long, default_value_t = 5)]
    endpoints: usize,
    /// Namespaces that services and proxies are spread over
    #[arg(long, default_value_t = 20)]
    namespaces: usize,
    /// Services that each proxy asks for; 0 is a mesh without names on demand
    #[arg(long, default_value_t = 0)]
    ask: usize,
    /// Changes of each kind
    #[arg(long, default_value_t = 20)]
    changes: usize,
    /// The binary; by default the one of the release profile
    #[arg(long, env = "FLOTILLA_BIN")]
    flotilla: Option<PathBuf>,
    /// Keeps the working directory
    #[arg(long)]
    keep: bool,
}

pub(crate) fn main(given: &[String]) -> ExitCode {
    let args = Args::parse_from(std::iter::once("bench-pair".to_owned()).chain(given.iter().cloned()));
    let run = || -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        println!(
            "| proxies | services | endpoints | asked | all connected | bytes | of one endpoint p50 / p99 / max | bytes | of one \
             VirtualService p50 / p99 / max | bytes | all reconnect (p99) | resumed without resending | CPU s per \
             change | RSS / peak |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
        );
        for services in &args.services {
            for proxies in &args.proxies {
                println!("{}", runtime.block_on(measure(&args, *proxies, *services))?);
            }
        }
        Ok(())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(2)
        }
    }
}

struct Bed {
    dir: PathBuf,
    endpoints: usize,
    namespaces: usize,
}

impl Bed {
    fn namespace(&self, service: usize) -> usize {
        service % self.namespaces
    }

    fn write(&self, file: &str, content: &str) -> anyhow::Result<()> {
        let new = self.dir.join("new");
        fs::write(&new, content)?;
        fs::rename(new, self.dir.join("config").join(file))?;
        Ok(())
    }

    fn address(&self, service: usize, endpoint: usize) -> String {
        let n = service * self.endpoints + endpoint;
        format!("10.{}.{}.{}", 1 + n / 62_500, (n / 250) % 250, n % 250 + 1)
    }

    /// The documents of a service. What changes stands in `zone`.
    fn service(&self, s: usize, zone: &str) -> String {
        let ns = self.namespace(s);
        let ip = format!("10.200.{}.{}", s / 250, s % 250 + 1);
        let mut out = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{s}, namespace: n{ns}}}\nspec: {{clusterIP: {ip}, \
             selector: {{app: s{s}}}, ports: [{{name: http, port: 8080}}]}}\n"
        );
        for e in 0..self.endpoints {
            let place = if e == 0 { zone } else { "r/z" };
            let _ = write!(
                out,
                "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: s{s}-{e}, namespace: \
                 n{ns}}}\nspec: {{address: {}, locality: {place}, serviceAccount: s{s}, labels: {{app: s{s}, version: \
                 v1, security.istio.io/tlsMode: istio}}}}\n",
                self.address(s, e)
            );
        }
        out
    }

    fn host(&self, s: usize) -> String {
        format!("s{s}.n{}.svc.cluster.local", self.namespace(s))
    }

    /// Hosts that a proxy asks for. Those of all proxies are spread over all services.
    fn asked(&self, proxy: usize, services: usize, each: usize) -> Vec<String> {
        (0..each.min(services)).map(|k| self.host((proxy * each + k) % services)).collect()
    }

    fn routing(&self, s: usize, timeout: usize) -> String {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: s{s}, namespace: \
             n{}}}\nspec:\n  hosts: [s{s}]\n  http:\n  - timeout: {timeout}s\n    route: [{{destination: {{host: \
             s{s}}}}}]\n",
            self.namespace(s)
        )
    }
}

/// Names on demand for everybody.
const ON_DEMAND: &str = "apiVersion: flotilla.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\n\
                         spec: {defaultConfig: {proxyMetadata: {FLOTILLA_ON_DEMAND: 'true'}}}\n";

/// What all clients share.
struct Shared {
    bytes: AtomicU64,
    resources: AtomicU64,
    /// Clients that have everything they asked for.
    synced: AtomicUsize,
    /// Resource whose next arrival is timed, by type and name.
    watched: watch::Receiver<(usize, &'static str, String)>,
    arrivals: mpsc::UnboundedSender<(usize, Instant)>,
    stop: AtomicBool,
}

async fn measure(args: &Args, proxies: usize, services: usize) -> anyhow::Result<String> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/release/flotilla");
    let flotilla = args.flotilla.clone().unwrap_or(built);
    ensure!(flotilla.exists(), "{} is missing: cargo build --release --package flotilla", flotilla.display());
    let tmp = tempfile::tempdir()?;
    let dir = tmp.path().to_owned();
    for d in ["config", "state"] {
        fs::create_dir_all(dir.join(d))?;
    }
    let bed = Bed { dir: dir.clone(), endpoints: args.endpoints, namespaces: args.namespaces };
    for s in 0..services {
        bed.write(&format!("s{s}.yaml"), &bed.service(s, "r/z"))?;
    }
    let routed = 3usize.min(services - 1);
    bed.write("routing.yaml", &bed.routing(routed, 1))?;
    let xds: SocketAddr = "127.73.0.1:15010".parse()?;
    let start = || {
        let flags: Vec<String> = [
            ("--cluster", "west".to_owned()),
            ("--state-dir", dir.join("state").display().to_string()),
            ("--config", dir.join("config").display().to_string()),
            ("--xds", "127.73.0.1:15012".to_owned()),
            ("--xds-plaintext", xds.to_string()),
            ("--metrics", "127.73.0.1:15014".to_owned()),
            ("--federation", "127.73.0.1:15016".to_owned()),
            ("--mixer", "127.73.0.1:9091".to_owned()),
        ]
        .into_iter()
        .flat_map(|(k, v)| [k.to_owned(), v])
        .collect();
        let flags: Vec<String> = std::iter::once("control-plane".to_owned()).chain(flags).collect();
        Process::start_on("0,1", &dir.join("control-plane.log"), &flotilla.display().to_string(), &flags)
    };
    if args.ask > 0 {
        bed.write("mesh.yaml", ON_DEMAND)?;
    }
    let mut control = start()?;
    control.wait_for(xds)?;

    let (watch_tx, watched) = watch::channel((0usize, LDS, String::new()));
    let (arrivals, mut arrived) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        bytes: AtomicU64::new(0),
        resources: AtomicU64::new(0),
        synced: AtomicUsize::new(0),
        watched,
        arrivals,
        stop: AtomicBool::new(false),
    });
    let begun = Instant::now();
    let tasks: Vec<_> = (0..proxies)
        .map(|i| {
            let s = i % services;
            let e = (i / services) % args.endpoints;
            let node = node(
                &format!(
                    "sidecar~{}~s{s}-{e}.n{1}~n{1}.svc.cluster.local",
                    bed.address(s, e),
                    bed.namespace(s)
                ),
                s,
            );
            let asked = bed.asked(i, services, args.ask);
            tokio::spawn(client(i, xds, node, asked, Arc::clone(&shared)))
        })
        .collect();
    let all = |shared: Arc<Shared>, limit: Duration| async move {
        let until = Instant::now() + limit;
        while shared.synced.load(Relaxed) < proxies {
            ensure!(
                Instant::now() < until,
                "{} of {proxies} proxies are in sync after {limit:?}",
                shared.synced.load(Relaxed)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    all(Arc::clone(&shared), Duration::from_secs(600)).await?;
    let connected = begun.elapsed();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let at_first = shared.bytes.load(Relaxed);
    // Who is to get what changes of a service.
    let concerned = |service: usize| match args.ask {
        0 => proxies,
        n => (0..proxies).filter(|i| bed.asked(*i, services, n).contains(&bed.host(service))).count(),
    };

    let mut figures = Vec::new();
    let mut cpu = 0.0;
    let mut rounds = 0;
    for kind in ["endpoint", "routing"] {
        let mut times: Vec<Duration> = Vec::new();
        let before = shared.bytes.load(Relaxed);
        for n in 1..=args.changes {
            rounds += 1;
            let changed = if kind == "endpoint" { n % services } else { routed };
            let (t, name) = match kind {
                "endpoint" => (EDS, format!("outbound|8080||{}", bed.host(changed))),
                _ => (VHDS, format!("8080/{}:8080", bed.host(changed))),
            };
            let concerned = concerned(changed);
            ensure!(
                concerned > 0,
                "no proxy asks for service {changed}: more of --proxies or --ask are needed"
            );
            watch_tx.send_replace((rounds, t, name));
            let (was, from) = (control.cpu(), Instant::now());
            match kind {
                "endpoint" => {
                    let zone = format!("r/z{n}");
                    bed.write(&format!("s{}.yaml", n % services), &bed.service(n % services, &zone))?;
                }
                _ => bed.write("routing.yaml", &bed.routing(routed, n + 1))?,
            }
            let mut seen = BTreeSet::new();
            while seen.len() < concerned {
                let next = tokio::time::timeout(Duration::from_secs(60), arrived.recv()).await;
                let (id, at) = next
                    .with_context(|| format!("{} of {concerned} got change {n}", seen.len()))?
                    .context("clients ended")?;
                if seen.insert(id) {
                    times.push(at.duration_since(from));
                }
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            cpu += control.cpu() - was;
        }
        let bytes = (shared.bytes.load(Relaxed) - before) / args.changes as u64;
        figures.push((times, bytes));
    }
    // Everybody comes back at once, with what they have.
    let (rss, first_peak) = (control.memory("VmRSS"), control.memory("VmHWM"));
    drop(control);
    shared.synced.store(0, Relaxed);
    let resources = shared.resources.load(Relaxed);
    let from = Instant::now();
    let mut control = start()?;
    control.wait_for(xds)?;
    all(Arc::clone(&shared), Duration::from_secs(600)).await?;
    let back = from.elapsed();
    let resent = shared.resources.load(Relaxed) - resources;
    let peak = control.memory("VmHWM").max(first_peak);
    shared.stop.store(true, Relaxed);
    for t in tasks {
        t.abort();
    }
    if args.keep {
        let _ = tmp.keep();
    }
    let q = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        let at = |p: f64| {
            times
                .get(((times.len() as f64 * p) as usize).min(times.len().saturating_sub(1)))
                .map_or(0, Duration::as_millis)
        };
        format!("{} / {} / {} ms", at(0.5), at(0.99), at(1.0))
    };
    let mut it = figures.into_iter();
    let (mut e, eb) = it.next().unwrap_or_default();
    let (mut r, rb) = it.next().unwrap_or_default();
    Ok(format!(
        "| {proxies} | {services} | {} | {} | {:.1} s | {at_first} | {} | {eb} | {} | {rb} | {:.1} s | {} | {:.2} | {:.0} / {:.0} MB |",
        services * args.endpoints,
        if args.ask == 0 { "all".to_owned() } else { args.ask.to_string() },
        connected.as_secs_f64(),
        q(&mut e),
        q(&mut r),
        back.as_secs_f64(),
        if resent == 0 { "yes".to_owned() } else { format!("no, {resent} resources") },
        cpu / f64::from(u32::try_from(rounds).unwrap_or(1)),
        rss,
        peak
    ))
}

fn node(id: &str, service: usize) -> pb::Node {
    let metadata = serde_json::json!({
        "NAMESPACE": id.split('~').nth(3).and_then(|d| d.split('.').next()).unwrap_or_default(),
        "SERVICE_ACCOUNT": format!("s{service}"),
        "LABELS": {"app": format!("s{service}"), "version": "v1"},
        "FLOTILLA": true,
        (mesh_xds::node::TAKES_HOSTS): true,
        "GENERATOR": "flotilla",
        "INTERCEPTION_MODE": "REDIRECT",
    });
    let empty = serde_json::Map::new();
    pb::Node {
        id: id.to_owned(),
        cluster: format!("s{service}"),
        metadata: Some(pb::json::to_struct(metadata.as_object().unwrap_or(&empty))),
        ..pb::Node::default()
    }
}

/// Types that a proxy follows.
const ALL: [&str; 5] = [CDS, EDS, LDS, RDS, VHDS];

/// A proxy's side: subscribes, acknowledges, comes back.
async fn client(id: usize, to: SocketAddr, node: pb::Node, asked: Vec<String>, shared: Arc<Shared>) {
    let mut known: HashMap<&'static str, BTreeMap<String, String>> = HashMap::new();
    let mut wait = Duration::from_millis(50);
    while !shared.stop.load(Relaxed) {
        if session(id, to, &node, &asked, &shared, &mut known).await.is_some() {
            wait = Duration::from_millis(50);
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(2));
    }
}

/// What follows from what: clusters name endpoints, listeners name routes.
async fn session(
    id: usize,
    to: SocketAddr,
    node: &pb::Node,
    asked: &[String],
    shared: &Shared,
    known: &mut HashMap<&'static str, BTreeMap<String, String>>,
) -> Option<()> {
    let channel: Channel = Endpoint::from_shared(format!("http://{to}")).ok()?.connect().await.ok()?;
    let mut grpc = Grpc::new(channel).max_decoding_message_size(1 << 30).max_encoding_message_size(1 << 30);
    grpc.ready().await.ok()?;
    let (tx, rx) = mpsc::channel(64);
    let codec = tonic_prost::ProstCodec::<pb::DeltaDiscoveryRequest, pb::DeltaDiscoveryResponse>::default();
    let path = PathAndQuery::from_static(
        "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
    );
    let subscribe = |t: &'static str, names: Vec<String>, known: &BTreeMap<String, String>, first: bool| {
        pb::DeltaDiscoveryRequest {
            node: first.then(|| node.clone()),
            type_url: t.to_owned(),
            resource_names_subscribe: names,
            initial_resource_versions: known.clone().into_iter().collect(),
            ..pb::DeltaDiscoveryRequest::default()
        }
    };
    let has = |t: &str, known: &HashMap<&'static str, BTreeMap<String, String>>| {
        known.get(t).cloned().unwrap_or_default()
    };
    let mut clusters = vec!["*".to_owned()];
    if !asked.is_empty() {
        clusters.extend(has(CDS, known).into_keys().filter(|n| n.starts_with("outbound|")));
    }
    let mut subscribed: HashMap<&'static str, BTreeSet<String>> = HashMap::new();
    subscribed.insert(CDS, clusters.iter().cloned().collect());
    tx.send(subscribe(CDS, clusters, &has(CDS, known), true)).await.ok()?;
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(rx);
    let mut responses = grpc.streaming(tonic::Request::new(outgoing), path, codec).await.ok()?.into_inner();
    tx.send(subscribe(LDS, vec!["*".into()], &has(LDS, known), false)).await.ok()?;
    let mut answered: BTreeSet<&'static str> = BTreeSet::new();
    // What is there from before is asked for again at once.
    for t in [EDS, RDS, VHDS] {
        let mut names: Vec<String> = has(t, known).into_keys().collect();
        if !names.is_empty() {
            if t == VHDS {
                names = hosts(asked);
            }
            subscribed.insert(t, names.iter().cloned().collect());
            tx.send(subscribe(t, names, &has(t, known), false)).await.ok()?;
        }
    }
    let mut counted = false;
    let mut told = 0;
    loop {
        let r = responses.message().await.ok()??;
        let t = ALL.into_iter().find(|t| *t == r.type_url)?;
        shared.bytes.fetch_add(r.encoded_len() as u64, Relaxed);
        shared.resources.fetch_add(r.resources.len() as u64, Relaxed);
        let (round, wt, wn) = shared.watched.borrow().clone();
        if round != told && t == wt && r.resources.iter().any(|x| x.name == wn) {
            told = round;
            let _ = shared.arrivals.send((id, Instant::now()));
        }
        answered.insert(t);
        let all = known.entry(t).or_default();
        for n in &r.removed_resources {
            all.remove(n);
        }
        let mut names = Vec::new();
        for x in r.resources {
            let next = match t {
                CDS if x.name.starts_with("outbound|") => Some((EDS, x.name.clone())),
                LDS => routes(&x).map(|n| (RDS, n)),
                // Virtual hosts come unasked once there are routes that have them apart, or else as traffic needs them,
                // and their clusters after them.
                RDS => {
                    let fresh = !subscribed.contains_key(VHDS);
                    let all = hosts(asked).into_iter().filter(|_| fresh);
                    names.extend(all.map(|n| (VHDS, n)));
                    subscribed.entry(VHDS).or_default();
                    None
                }
                VHDS if !asked.is_empty() => cluster_of(&x.name).map(|n| (CDS, n)),
                _ => None,
            };
            if let Some((t, name)) = next
                && subscribed.entry(t).or_default().insert(name.clone())
            {
                names.push((t, name));
            }
            all.insert(x.name, x.version);
        }
        tx.send(pb::DeltaDiscoveryRequest {
            type_url: t.to_owned(),
            response_nonce: r.nonce,
            ..pb::DeltaDiscoveryRequest::default()
        })
        .await
        .ok()?;
        for t in [CDS, EDS, RDS, VHDS] {
            let wanted: Vec<String> =
                names.iter().filter(|(of, _)| *of == t).map(|(_, n)| n.clone()).collect();
            if !wanted.is_empty() {
                tx.send(subscribe(t, wanted, &BTreeMap::new(), false)).await.ok()?;
            }
        }
        let whole = asked.is_empty() || known.get(EDS).is_some_and(|e| e.len() >= asked.len());
        if !counted && whole && ALL.iter().all(|t| answered.contains(t)) {
            counted = true;
            shared.synced.fetch_add(1, Relaxed);
        }
    }
}

/// Names of virtual hosts that a client subscribes to.
fn hosts(asked: &[String]) -> Vec<String> {
    std::iter::once("*".to_owned()).chain(asked.iter().map(|h| format!("8080/{h}:8080"))).collect()
}

/// The cluster that the virtual host of a service of this bed leads to.
fn cluster_of(host: &str) -> Option<String> {
    let (host, port) = host.strip_prefix("8080/")?.rsplit_once(':')?;
    Some(format!("outbound|{port}||{host}"))
}

/// The route configuration that a listener of one port asks for: those of this bed have the port's name.
fn routes(x: &pb::Resource) -> Option<String> {
    let (_, port) = x.name.rsplit_once('_')?;
    x.name.starts_with("0.0.0.0_").then(|| port.to_owned())
}
