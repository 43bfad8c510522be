//! What the mesh says of a proxy's process, on a whole agent under a control plane that the test writes.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener as StdListener},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use clap::Parser as _;
use mesh_agent::{Agent, AgentOptions, MixerArgs, MixerHook, ProxyArgs, Restart};
use mesh_identity::{SecretStore, TRUST_BUNDLE, WORKLOAD_SVID};
use mesh_model::{
    TrustDomain,
    proxy::{
        ClientCertificate, Direction, DownstreamTls, FilterChain, FilterChainMatch, Listener, NetworkFilter,
        SecretRef, TcpProxy, TlsServerOptions, TlsVersion, UpstreamHttp, Validation, WeightedCluster,
    },
};
use mesh_proxy::Hooks;
use mesh_xds::{
    AdsService, NodeInfo, NodeKind, PeerInfo, ResourceSource, TypeSnapshot, codec,
    process::{self, ProcessSettings},
    server::conn,
    type_url::{CDS, LDS, PROXY_CONFIG},
};
use prometheus_client::registry::Registry;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::side_by_side::cluster;

/// How long anything may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// A mesh of one root and one intermediate.
struct Ca {
    root: String,
    intermediate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let root_key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::default();
        p.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        let root = p.self_signed(&root_key).unwrap().pem();
        let by = Issuer::from_ca_cert_pem(&root, root_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::default();
        p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        p.subject_alt_names = vec![SanType::URI("spiffe://mesh.local/cluster/west".try_into().unwrap())];
        let intermediate = p.signed_by(&key, &by).unwrap().pem();
        let issuer = Issuer::from_ca_cert_pem(&intermediate, key).unwrap();
        Self { root, intermediate, issuer }
    }

    /// Chain and key.
    fn certify(&self, identity: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::default();
        p.subject_alt_names = vec![SanType::URI(identity.try_into().unwrap())];
        let leaf = p.signed_by(&key, &self.issuer).unwrap().pem();
        (leaf + &self.intermediate, key.serialize_pem())
    }
}

/// What the control plane says, and whether it says anything of processes at all.
struct Source {
    resources: Mutex<BTreeMap<&'static str, Arc<TypeSnapshot>>>,
    changes: watch::Sender<u64>,
}

impl ResourceSource for Source {
    fn snapshot(&self, _: &NodeInfo, type_url: &str) -> Arc<TypeSnapshot> {
        self.resources.lock().unwrap().get(type_url).cloned().unwrap_or_default()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn authorize(&self, _: &PeerInfo, _: &NodeInfo) -> Result<(), tonic::Status> {
        Ok(())
    }
}

impl Source {
    fn say(&self, s: &ProcessSettings) {
        let snapshot = TypeSnapshot::build([(process::NAME.to_owned(), process::encode(s))]);
        self.resources.lock().unwrap().insert(PROXY_CONFIG, Arc::new(snapshot));
        self.changes.send_modify(|n| *n += 1);
    }
}

/// A mesh with one workload, whose proxy passes connections on to a server that sends back what it gets.
struct Mesh {
    dir: tempfile::TempDir,
    source: Arc<Source>,
    xds: SocketAddr,
    control_plane: CancellationToken,
    listener: SocketAddr,
}

fn free() -> SocketAddr {
    StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub(crate) async fn echo() -> SocketAddr {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = l.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut s, _)) = l.accept().await {
            tokio::spawn(async move {
                let (mut r, mut w) = s.split();
                tokio::io::copy(&mut r, &mut w).await
            });
        }
    });
    address
}

fn passes_on(at: SocketAddr) -> Listener {
    let tcp = TcpProxy {
        stat_prefix: "t".into(),
        clusters: vec![WeightedCluster::only("up")],
        idle_timeout: None,
        max_duration: None,
        access_log: vec![],
        tunnel: None,
        on_demand: None,
        names: None,
    };
    Listener {
        name: "l".into(),
        address: at,
        bind_to_port: true,
        use_original_dst: false,
        transparent: false,
        direction: Direction::Outbound,
        inspect_tls: false,
        inspect_http: false,
        proxy_protocol: false,
        inspect_timeout: Duration::ZERO,
        filter_chains: vec![FilterChain {
            name: "c".into(),
            matches: FilterChainMatch::default(),
            tls: None,
            filters: vec![NetworkFilter::Tcp(tcp)],
        }],
        default_filter_chain: None,
        access_log: vec![],
        udp: None,
        quic: None,
        inspect_quic: false,
        buffer_limit: None,
        max_connections: None,
        mixer: None,
    }
}

impl Mesh {
    async fn new() -> Self {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new());
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        // As an earlier run has kept it, so that no authority is needed.
        let (chain, key) = ca.certify("spiffe://mesh.local/ns/books/sa/a");
        for (name, content) in
            [("svid-chain.pem", &chain), ("svid-key.pem", &key), ("root-cert.pem", &ca.root)]
        {
            std::fs::write(state.join(name), content).unwrap();
        }
        std::fs::write(dir.path().join("root.pem"), &ca.root).unwrap();

        let listener = free();
        let up = cluster("up", echo().await, UpstreamHttp::Http1);
        let one = |name: &str, any| Arc::new(TypeSnapshot::build([(name.to_owned(), any)]));
        let resources = BTreeMap::from([
            (LDS, one("l", codec::encode_listener(&passes_on(listener)))),
            (CDS, one("up", codec::encode_cluster(&up))),
        ]);
        let source = Arc::new(Source { resources: resources.into(), changes: watch::Sender::new(0) });

        let store = SecretStore::new();
        let (chain, key) = ca.certify("spiffe://mesh.local/ns/flotilla-system/sa/control-plane");
        store.set_identity(WORKLOAD_SVID, chain.as_bytes(), key.as_bytes()).unwrap();
        store.set_mesh_trust(&TrustDomain::default(), ca.root.as_bytes()).unwrap();
        let tls = store
            .server_config(&DownstreamTls {
                certificate: SecretRef::Sds(WORKLOAD_SVID.into()),
                client_certificate: ClientCertificate::Required(Validation {
                    trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
                    sans: vec![],
                    crl: None,
                }),
                alpn: vec!["h2".into()],
                min_version: TlsVersion::V1_3,
                options: TlsServerOptions::default(),
            })
            .unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (xds, control_plane) = (tcp.local_addr().unwrap(), CancellationToken::new());
        let server = tonic::transport::Server::builder()
            .add_service(AdsService::new(source.clone()).until(control_plane.clone()))
            .serve_with_incoming_shutdown(
                Box::pin(conn::tls(tcp, tls, None)),
                control_plane.clone().cancelled_owned(),
            );
        tokio::spawn(server);
        Self { dir, source, xds, control_plane, listener }
    }

    fn state(&self) -> std::path::PathBuf {
        self.dir.path().join("state")
    }

    async fn start(&self, flags: &[&str]) -> Agent {
        #[derive(clap::Parser)]
        struct P {
            #[command(flatten)]
            args: ProxyArgs,
        }
        let discovery = format!("--discovery={}", self.xds);
        let state = format!("--state-dir={}", self.state().display());
        let root = format!("--root-cert={}", self.dir.path().join("root.pem").display());
        let usual = ["x", "--ip=10.0.0.1", "--workload=a", "--cluster=west", "--namespace=books"];
        let more = ["--service-account=a", "--metrics=127.0.0.1:0", &discovery, &state, &root];
        let args = P::parse_from(usual.iter().chain(&more).chain(flags)).args;
        let (store, mut registry) = (SecretStore::new(), Registry::default());
        let mixer = MixerHook::new(&MixerArgs::default(), &args, &store, &mut registry).unwrap();
        let restart = Restart::begin(&args.restart).await.unwrap();
        let started = Agent::start(AgentOptions {
            args,
            kind: NodeKind::Sidecar,
            hooks: Hooks::default(),
            name_table: false,
            registry,
            restart,
            mixer,
            store,
            pages: Default::default(),
        });
        tokio::time::timeout(SOON, started).await.expect("a start").unwrap()
    }

    /// Waits until the file has these settings.
    async fn kept(&self, wanted: &ProcessSettings) {
        let file = self.state().join("xds.cache");
        until("the file", async || {
            let kept = mesh_xds::client::proxy::kept_process(&file);
            (kept.as_ref() == Some(wanted)).then_some(()).ok_or_else(|| format!("{kept:?}"))
        })
        .await;
    }

    /// A connection through the proxy.
    async fn connect(&self) -> TcpStream {
        until("a connection", async || {
            let mut s = TcpStream::connect(self.listener).await.map_err(|e| e.to_string())?;
            let mut b = [0];
            s.write_all(b"x").await.map_err(|e| e.to_string())?;
            s.read_exact(&mut b).await.map_err(|e| e.to_string())?;
            Ok(s)
        })
        .await
    }

    /// Sockets that listen there: each worker has one.
    fn workers(&self) -> usize {
        let port = format!(":{:04X}", self.listener.port());
        let table = std::fs::read_to_string(Path::new("/proc/net/tcp")).unwrap();
        let listens = |l: &str| {
            let mut words = l.split_whitespace().skip(1);
            words.next().is_some_and(|a| a.ends_with(&port)) && words.nth(1) == Some("0A")
        };
        table.lines().filter(|l| listens(l)).count()
    }
}

async fn until<T>(what: &str, mut f: impl AsyncFnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match f().await {
            Ok(t) => return t,
            Err(last) if begun.elapsed() > SOON => panic!("{what}: not within {SOON:?}: {last}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn get(address: SocketAddr, path: &str) -> Result<(u16, String), String> {
    let asked = async {
        let mut s = TcpStream::connect(address).await?;
        s.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes())
            .await?;
        let mut text = String::new();
        s.read_to_string(&mut text).await?;
        std::io::Result::Ok(text)
    };
    let text = asked.await.map_err(|e| e.to_string())?;
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(|| text.clone())?;
    Ok((status, text.split_once("\r\n\r\n").map(|(_, b)| b.to_owned()).unwrap_or_default()))
}

async fn settings(admin: SocketAddr) -> Value {
    let (_, body) = until("a page", async || get(admin, "/settings").await).await;
    serde_json::from_str(&body).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_starts_with_what_the_mesh_says_and_again_without_a_control_plane() {
    let mesh = Mesh::new().await;
    let (status, admin) = (free(), free());
    let said = ProcessSettings {
        concurrency: Some(3),
        admin_port: Some(admin.port()),
        status_port: Some(status.port()),
        ..ProcessSettings::default()
    };
    mesh.source.say(&said);
    let ready = async || {
        until("readiness", async || match get(status, "/healthz/ready").await {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    };
    let agent = mesh.start(&[]).await;
    ready().await;
    drop(mesh.connect().await);
    assert_eq!((mesh.workers(), &settings(admin).await["runs"]["concurrency"]), (3, &Value::from(3)));
    mesh.kept(&said).await;

    drop(agent);
    mesh.control_plane.cancel();
    until("the end of the first", async || match (mesh.workers(), get(admin, "/").await) {
        (0, Err(_)) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let begun = Instant::now();
    let _agent = mesh.start(&[]).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "it waits for nobody: {:?}", begun.elapsed());
    ready().await;
    drop(mesh.connect().await);
    assert_eq!((mesh.workers(), &settings(admin).await["runs"]["concurrency"]), (3, &Value::from(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_wins() {
    let mesh = Mesh::new().await;
    let (status, admin) = (free(), free());
    mesh.source.say(&ProcessSettings {
        concurrency: Some(3),
        // Where somebody else listens already.
        admin_port: Some(mesh.xds.port()),
        status_port: Some(mesh.xds.port()),
        ..ProcessSettings::default()
    });
    let flags = [format!("--readiness={status}"), format!("--admin={admin}")];
    let _agent = mesh.start(&["--concurrency=2", &flags[0], &flags[1]]).await;
    drop(mesh.connect().await);
    assert_eq!(mesh.workers(), 2);
    assert!(get(status, "/healthz/ready").await.is_ok());
    let page = settings(admin).await;
    assert_eq!((&page["runs"], &page["runs"]["concurrency"]), (&page["afterRestart"], &Value::from(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn times_hold_at_once_and_threads_after_a_restart() {
    let mesh = Mesh::new().await;
    let (status, admin) = (free(), free());
    let first = ProcessSettings {
        concurrency: Some(1),
        termination_drain: Some(Duration::from_secs(3600)),
        ..ProcessSettings::default()
    };
    mesh.source.say(&first);
    let flags = [format!("--readiness={status}"), format!("--admin={admin}")];
    let agent = mesh.start(&[&flags[0], &flags[1]]).await;
    let mut open = mesh.connect().await;
    assert_eq!(settings(admin).await["runs"]["drainSeconds"], 3600.0);

    mesh.source.say(&ProcessSettings {
        concurrency: Some(2),
        termination_drain: Some(Duration::from_millis(700)),
        drain: Some(Duration::from_secs(7)),
        ..first
    });
    let page = until("the change", async || {
        let page = settings(admin).await;
        (page["runs"]["drainSeconds"] == 0.7).then(|| page.clone()).ok_or_else(|| page.to_string())
    })
    .await;
    assert_eq!(page["handover"]["drainSeconds"], 7.0);
    assert_eq!((&page["runs"]["concurrency"], &page["afterRestart"]["concurrency"]), (&1.into(), &2.into()));
    assert_eq!(mesh.workers(), 1);

    // The connection has the time that holds now.
    let stop = CancellationToken::new();
    stop.cancel();
    let begun = Instant::now();
    let ended = tokio::time::timeout(SOON, agent.run(stop));
    let (ended, answered) = tokio::join!(ended, async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut b = [0];
        open.write_all(b"y").await.unwrap();
        open.read_exact(&mut b).await.unwrap();
        b
    });
    ended.expect("within the time to drain");
    assert_eq!(&answered, b"y");
    assert!(begun.elapsed() >= Duration::from_millis(700), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_anything_kept_waits_two_seconds_at_most() {
    let mesh = Mesh::new().await;
    mesh.control_plane.cancel();
    until("the end of the control plane", async || match TcpStream::connect(mesh.xds).await {
        Ok(_) => Err("it listens".to_owned()),
        Err(_) => Ok(()),
    })
    .await;
    let (status, admin) = (free(), free());
    let flags = [format!("--readiness={status}"), format!("--admin={admin}")];
    let begun = Instant::now();
    let _agent = mesh.start(&[&flags[0], &flags[1]]).await;
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_secs(2) && waited < Duration::from_secs(10), "{waited:?}");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    assert_eq!(settings(admin).await["runs"]["concurrency"], cores);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_process_is_told_of_itself_makes_it_not_ready() {
    let mesh = Mesh::new().await;
    let listener = mesh.source.resources.lock().unwrap().remove(LDS).unwrap();
    let clusters = mesh.source.resources.lock().unwrap().remove(CDS).unwrap();
    let (status, admin) = (free(), free());
    mesh.source.say(&ProcessSettings { concurrency: Some(3), ..ProcessSettings::default() });
    let flags = [format!("--readiness={status}"), format!("--admin={admin}")];
    let _agent = mesh.start(&[&flags[0], &flags[1]]).await;
    // It has heard: whoever waits for its listeners still has to.
    assert_eq!(settings(admin).await["runs"]["concurrency"], 3);
    for _ in 0..10 {
        let (status, body) = get(status, "/healthz/ready").await.unwrap();
        assert_eq!(status, 503, "{body}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    mesh.source.resources.lock().unwrap().extend([(LDS, listener), (CDS, clusters)]);
    mesh.source.changes.send_modify(|n| *n += 1);
    until("readiness", async || match get(status, "/healthz/ready").await {
        Ok((200, _)) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    drop(mesh.connect().await);
}
