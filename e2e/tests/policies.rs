//! What policies decide, at the engine and at a real Envoy: the same documents, as pilot makes rules of them for either,
//! and the same requests, over mutual TLS.
//!
//! `ENVOY_BIN` names an Envoy.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use envoy_types::pb::envoy::config::{
    bootstrap::v3::{Bootstrap, bootstrap::StaticResources},
    listener::v3::Listener as EnvoyListener,
};
use mesh_identity::SecretStore;
use mesh_model::{
    ClusterId, Locality, NetworkId, TrustDomain,
    federation::Transport,
    proxy::{
        ClientCertificate, DirectResponse, DownstreamTls, FilterChain, FilterChainMatch, HttpFilter,
        Listener, NetworkFilter, RouteAction, RouteSource, SecretRef, TlsVersion, Validation,
    },
};
use mesh_proxy::{ConfigSnapshot, Engine, EngineOptions, Hooks};
use mesh_xds::{NodeInfo, NodeKind, codec, mcp::ConfigState};
use pilot::{Settings, config::Reader, source::PilotSource, world::World};
use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
};

const OURS: &str = "127.0.0.1";
const ENVOYS: &str = "127.0.0.2";
const CALLERS: [&str; 4] = [
    "spiffe://cluster.local/ns/shop/sa/front",
    "spiffe://cluster.local/ns/admin/sa/ops",
    "spiffe://cluster.local/ns/shop-two/sa/frontal",
    "spiffe://elsewhere.example/ns/shop/sa/front",
];
const SOURCES: [&str; 2] = ["127.0.0.10", "127.7.0.1"];

/// The workload that is asked, on a port of its own for each set of policies.
fn workload(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: cart, namespace: shop}}\nspec: {{clusterIP: 10.9.0.1, selector: {{app: \
         cart}}, ports: [{{name: http, port: {port}}}]}}\n---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: \
         {{name: cart, namespace: shop}}\nspec: {{address: 10.1.0.1, serviceAccount: cart, labels: {{app: cart, tier: back}}}}\n"
    )
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
         {spec}\n"
    )
}

fn v1alpha1(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: rbac.istio.io/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

/// Sets of policies, each about something of its own.
fn written(port: u16) -> Vec<(&'static str, String)> {
    let allow = |rules: &str| policy("a", &format!("{{rules: {rules}}}"));
    let role = |rules: &str| {
        v1alpha1("ClusterRbacConfig", "default", "{mode: ON}").replace(", namespace: shop", "")
            + &v1alpha1("ServiceRole", "r", &format!("{{rules: {rules}}}"))
    };
    let bind = |subjects: &str| {
        v1alpha1(
            "ServiceRoleBinding",
            "b",
            &format!("{{subjects: {subjects}, roleRef: {{kind: ServiceRole, name: r}}}}"),
        )
    };
    let every = "[{services: ['*'], methods: ['*']}]";
    vec![
        (
            "principals",
            allow("[{from: [{source: {principals: [cluster.local/ns/shop/sa/front, '*/sa/ops']}}]}]"),
        ),
        ("principals that begin", allow("[{from: [{source: {principals: ['cluster.local/ns/shop*']}}]}]")),
        (
            "any principal but",
            allow("[{from: [{source: {principals: ['*'], notPrincipals: ['*/sa/ops']}}]}]"),
        ),
        (
            "namespaces",
            allow(
                "[{from: [{source: {namespaces: [shop]}}, {source: {namespaces: ['adm*'], notIpBlocks: [127.7.0.0/16]}}]}]",
            ),
        ),
        ("no namespace", allow("[{from: [{source: {notNamespaces: [shop, 'x*']}}]}]")),
        (
            "addresses",
            allow(
                "[{from: [{source: {ipBlocks: [127.0.0.10]}}]}, {from: [{source: {remoteIpBlocks: [10.1.0.0/16]}}], to: [{operation: {methods: [POST]}}]}]",
            ),
        ),
        (
            "methods and paths",
            allow(
                "[{to: [{operation: {methods: [GET, 'P*'], paths: [/, '/items*', '*/edit'], notPaths: ['/items/../x', /items/8]}}]}]",
            ),
        ),
        ("templates of paths", allow("[{to: [{operation: {paths: ['/items/{*}', '/admin/{**}']}}]}]")),
        (
            "hosts",
            allow("[{to: [{operation: {hosts: [cart.shop, '*.example', 'CART*'], notHosts: ['b.*']}}]}]"),
        ),
        (
            "ports",
            allow(&format!(
                "[{{to: [{{operation: {{ports: ['{port}'], methods: [GET]}}}}, {{operation: {{notPorts: ['{port}']}}}}]}}]"
            )),
        ),
        (
            "headers",
            allow(
                "[{when: [{key: 'request.headers[x-v]', values: ['1', '2*'], notValues: ['2.9']}]}, {when: [{key: 'request.headers[X-W]', values: ['*']}]}]",
            ),
        ),
        ("no header", allow("[{when: [{key: 'request.headers[x-v]', notValues: ['1', '*9']}]}]")),
        ("server names", allow("[{when: [{key: connection.sni, values: [cart.shop, '*.example']}]}]")),
        (
            "conditions of the source",
            allow(
                "[{when: [{key: source.ip, values: [127.7.0.0/16]}, {key: source.namespace, values: ['shop*']}]}, {when: [{key: source.principal, notValues: ['*/ops', '*/front', '*/frontal']}]}, {when: [{key: remote.ip, values: [10.2.0.0/16]}]}]",
            ),
        ),
        (
            "conditions of the destination",
            allow(&format!(
                "[{{when: [{{key: destination.port, values: ['{port}']}}, {{key: destination.ip, values: [127.0.0.0/8]}}]}}]"
            )),
        ),
        (
            "tokens that nobody has",
            allow(
                "[{from: [{source: {requestPrincipals: ['*']}}]}, {when: [{key: 'request.auth.claims[g]', notValues: [a]}], to: [{operation: {methods: [GET]}}]}]",
            ),
        ),
        ("nobody", policy("a", "{}")),
        (
            "everybody but",
            policy(
                "a",
                "{action: DENY, rules: [{from: [{source: {principals: ['cluster.local/ns/admin/*', '*/ops']}}]}, {to: [{operation: {paths: ['/admin*']}}]}]}",
            ),
        ),
        (
            "deny before allow",
            allow("[{to: [{operation: {methods: [GET]}}]}]")
                + &policy(
                    "d",
                    "{action: DENY, rules: [{from: [{source: {notPrincipals: ['cluster.local/*']}}]}]}",
                ),
        ),
        (
            "several of each",
            allow("[{to: [{operation: {paths: [/items]}}]}]")
                + &policy("b", "{rules: [{from: [{source: {namespaces: [admin]}}]}]}")
                + &policy("d", "{action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}"),
        ),
        (
            "dry run and audit",
            policy("a", "{action: DENY, rules: [{}]}")
                .replace("name: a,", "name: a, annotations: {istio.io/dry-run: 'true'},")
                + &policy("b", "{action: AUDIT, rules: [{}]}")
                + &policy("c", "{rules: [{to: [{operation: {methods: [GET]}}]}]}"),
        ),
        (
            "role of a service",
            role(
                "[{services: [cart.shop.svc.cluster.local], methods: [GET], paths: ['/items*', '*/edit']}, {services: [other.shop.svc.cluster.local], methods: ['*']}]",
            ) + &bind("[{user: cluster.local/ns/shop/sa/front}]"),
        ),
        (
            "role with constraints",
            role(
                "[{services: ['cart*'], methods: ['*'], constraints: [{key: 'request.headers[x-v]', values: ['1', '2*']}]}]",
            ) + &bind("[{properties: {source.namespace: shop}}, {properties: {source.ip: 127.7.0.0/16}}]"),
        ),
        (
            "role about the destination",
            role(&format!(
                "[{{services: ['*'], methods: ['*'], constraints: [{{key: 'destination.labels[tier]', values: [back]}}, {{key: destination.port, values: ['{port}']}}]}}]"
            )) + &bind("[{properties: {source.principal: '*/sa/ops'}}]"),
        ),
        ("role for everybody", role(every) + &bind("[{user: '*'}]")),
        ("role for nobody", role(every)),
        (
            "role on trial",
            role(every) + &bind("[{user: '*'}]").replace("roleRef:", "mode: PERMISSIVE, roleRef:"),
        ),
    ]
}

struct Random(u32);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 16) as usize % n
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    /// One or two of these, as a list.
    fn some(&mut self, of: &[&str]) -> String {
        let first = self.one(of);
        if self.below(2) == 0 { format!("['{first}']") } else { format!("['{first}', '{}']", self.one(of)) }
    }

    fn fields(&mut self, most: usize, of: &[(&str, &[&str])]) -> String {
        let mut out: Vec<String> = Vec::new();
        for _ in 0..=self.below(most) {
            let (field, values) = of[self.below(of.len())];
            if !out.iter().any(|o| o.starts_with(&format!("{field}:"))) {
                out.push(format!("{field}: {}", self.some(values)));
            }
        }
        format!("{{{}}}", out.join(", "))
    }
}

const NAMES: [&str; 6] = [
    "cluster.local/ns/shop/sa/front",
    "*/front",
    "cluster.local/ns/shop*",
    "*",
    "*/ops",
    "elsewhere.example/*",
];
const PLACES: [&str; 4] = ["127.0.0.10", "127.7.0.0/16", "10.1.0.0/16", "127.0.0.0/8"];
const PATHS: [&str; 8] =
    ["/", "/items", "/items/7", "/items*", "*/edit", "/admin*", "/items/{*}", "/{**}/edit"];
const HOSTS: [&str; 5] = ["cart.shop", "a.example", "*.example", "cart*", "b.*"];

/// Policies that nobody would write.
fn random(r: &mut Random) -> String {
    let mut out = String::new();
    for n in 0..=r.below(2) {
        let mut rules = Vec::new();
        for _ in 0..=r.below(2) {
            let mut parts = Vec::new();
            if r.below(3) > 0 {
                let source = r.fields(
                    2,
                    &[
                        ("principals", &NAMES),
                        ("notPrincipals", &NAMES),
                        ("namespaces", &["shop", "shop*", "*", "admin"]),
                        ("notNamespaces", &["shop", "adm*"]),
                        ("ipBlocks", &PLACES),
                        ("notIpBlocks", &PLACES),
                        ("remoteIpBlocks", &PLACES),
                    ],
                );
                parts.push(format!("from: [{{source: {source}}}]"));
            }
            if r.below(3) > 0 {
                let operation = r.fields(
                    2,
                    &[
                        ("methods", &["GET", "P*", "DELETE"]),
                        ("notMethods", &["GET", "*E"]),
                        ("paths", &PATHS),
                        ("notPaths", &PATHS),
                        ("hosts", &HOSTS),
                        ("notHosts", &HOSTS),
                    ],
                );
                parts.push(format!("to: [{{operation: {operation}}}]"));
            }
            if r.below(3) == 0 {
                let key = r.one(&["request.headers[x-v]", "connection.sni", "source.principal", "source.ip"]);
                let pool: &[&str] = match key {
                    "source.ip" => &PLACES,
                    "source.principal" => &NAMES,
                    "connection.sni" => &["cart.shop", "*.example", "*"],
                    _ => &["1", "2*", "*9", "*"],
                };
                let field = r.one(&["values", "notValues"]);
                let values = r.some(pool);
                parts.push(format!("when: [{{key: '{key}', {field}: {values}}}]"));
            }
            rules.push(format!("{{{}}}", parts.join(", ")));
        }
        let action = r.one(&["ALLOW", "ALLOW", "DENY"]);
        out += &policy(&format!("p{n}"), &format!("{{action: {action}, rules: [{}]}}", rules.join(", ")));
    }
    out
}

/// A request and who sends it.
struct Ask {
    caller: usize,
    source: &'static str,
    sni: &'static str,
    text: String,
}

fn ask(r: &mut Random) -> Ask {
    let path = r.one(&[
        "/",
        "/items",
        "/items?x=/admin",
        "/items/7",
        "/items/8",
        "/items/7/edit",
        "/admin/a/b",
        "/Items",
        "//items",
        "/items/../admin",
        "/items/%2e%2e/admin",
        "/items%2f7",
        "/%69tems",
    ]);
    let host = r.one(&["cart.shop", "CART.shop", "cart.shop:80", "a.example", "b.example:8080"]);
    let mut text = format!(
        "{} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n",
        r.one(&["GET", "POST", "DELETE"])
    );
    for line in [
        "x-v: 1",
        "x-v: 2.1",
        "x-v: 2.9",
        "X-W: a",
        "x-forwarded-for: 10.1.1.1",
        "x-forwarded-for: 10.1.1.1, 10.2.2.2",
    ] {
        if r.below(4) == 0 {
            let _ = write!(text, "{line}\r\n");
        }
    }
    text += "content-length: 0\r\n\r\n";
    Ask {
        caller: r.below(CALLERS.len()),
        source: SOURCES[r.below(2)],
        sni: ["cart.shop", "x.example"][r.below(2)],
        text,
    }
}

/// An authority and what it has issued: PEM files.
struct Issued {
    dir: PathBuf,
}

impl Issued {
    fn new(dir: &Path) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(DnType::CommonName, "policies");
        fs::write(dir.join("root.pem"), ca.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(ca, key);
        let issue = |name: &str, sans: Vec<SanType>| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.subject_alt_names = sans;
            fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &issuer).unwrap().pem())
                .unwrap();
            fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        };
        let dns = |n: &str| SanType::DnsName(n.try_into().unwrap());
        issue("server", vec![dns("cart.shop"), dns("x.example")]);
        for (n, id) in CALLERS.iter().enumerate() {
            issue(&n.to_string(), vec![SanType::URI((*id).try_into().unwrap())]);
        }
        Self { dir: dir.to_owned() }
    }

    fn path(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }

    fn server(&self) -> DownstreamTls {
        let trusted = Some(SecretRef::Files { chain: self.path("root.pem"), key: String::new() });
        DownstreamTls {
            certificate: SecretRef::Files { chain: self.path("server.pem"), key: self.path("server.key") },
            client_certificate: ClientCertificate::Required(Validation { trusted, sans: vec![], crl: None }),
            alpn: vec!["http/1.1".into()],
            min_version: TlsVersion::V1_3,
            options: Default::default(),
        }
    }

    fn client(&self, caller: usize) -> Arc<rustls::ClientConfig> {
        let chain = |f: &str| {
            CertificateDer::pem_file_iter(self.path(f)).unwrap().map(Result::unwrap).collect::<Vec<_>>()
        };
        let mut roots = rustls::RootCertStore::empty();
        roots.add(chain("root.pem").remove(0)).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder =
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{caller}.key"))).unwrap();
        let builder = builder.unwrap().with_root_certificates(roots);
        Arc::new(builder.with_client_auth_cert(chain(&format!("{caller}.pem")), key).unwrap())
    }
}

/// What pilot makes of documents for the workload's proxy, as a listener of its own: rules and the settings of requests are
/// pilot's; who passes gets an answer at once.
fn listener(documents: &str, dir: &Path, port: u16, ours: bool, tls: DownstreamTls) -> Listener {
    let file = dir.join(format!("{port}.yaml"));
    fs::write(&file, documents).unwrap();
    let loaded = galley::load_files(&[file], &mut std::io::empty());
    let invalid: Vec<_> = loaded.validation.reports.iter().filter(|r| !r.valid).collect();
    assert!(invalid.is_empty(), "{documents}\n{invalid:#?}");
    let settings = Settings {
        cluster: ClusterId::new("west").unwrap(),
        network: NetworkId::new("west").unwrap(),
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        east_west: vec![],
        reachable: true,
        federation_address: None,
        transport: Transport::Tcp,
    };
    let source = PilotSource::new();
    let config = Reader::default().read(&loaded.documents, &ConfigState::default());
    source.update(Arc::new(World::new(settings, config)));
    let Value::Object(metadata) = json!({"NAMESPACE": "shop", "SERVICE_ACCOUNT": "cart", "FLOTILLA": ours,
        "LABELS": {"app": "cart", "tier": "back"}, "INTERCEPTION_MODE": "REDIRECT"})
    else {
        unreachable!()
    };
    let ip: IpAddr = "10.1.0.1".parse().unwrap();
    let domain = "shop.svc.cluster.local";
    let node = NodeInfo::proxy(NodeKind::Sidecar, ip, "cart", "shop", domain, metadata, Locality::default());
    let made = source.configuration(&node).unwrap();
    let inbound = &made.listeners["virtualInbound"];
    let manager = |c: &FilterChain| match c.filters.last() {
        Some(NetworkFilter::Http(m)) if c.matches.destination_port == Some(port) => Some((**m).clone()),
        _ => None,
    };
    let mut m = inbound.filter_chains.iter().find_map(manager).expect("a chain for requests to the port");
    m.filters.retain(|f| matches!(f, HttpFilter::Rbac(_)));
    let RouteSource::Inline(made) = &m.routes else { panic!("inbound routes are part of the listener") };
    let mut routes = (**made).clone();
    for r in routes.virtual_hosts.iter_mut().flat_map(|h| &mut h.routes) {
        r.action = RouteAction::Direct(DirectResponse { status: 200, body: vec![] });
    }
    m.routes = RouteSource::Inline(Arc::new(routes));
    (m.access_log, m.tracing) = (vec![], None);
    let chain = FilterChain {
        name: "c".into(),
        matches: FilterChainMatch::default(),
        tls: Some(tls),
        filters: vec![NetworkFilter::Http(Box::new(m))],
    };
    Listener {
        name: format!("l{port}"),
        address: SocketAddr::new(if ours { OURS } else { ENVOYS }.parse().unwrap(), port),
        bind_to_port: true,
        use_original_dst: false,
        transparent: false,
        inspect_tls: true,
        inspect_http: false,
        proxy_protocol: false,
        filter_chains: vec![chain],
        default_filter_chain: None,
        access_log: vec![],
        udp: None,
        quic: None,
        inspect_quic: false,
        mixer: None,
        ..inbound.clone()
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn envoy(listeners: &[Listener], dir: &Path) -> Running {
    let binary = std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary");
    let listeners = listeners.iter().map(|l| EnvoyListener::decode(codec::encode_listener(l).value).unwrap());
    let resources = StaticResources { listeners: listeners.collect(), ..StaticResources::default() };
    let bootstrap = Bootstrap { static_resources: Some(resources), ..Bootstrap::default() };
    let file = dir.join("envoy.pb");
    fs::write(&file, bootstrap.encode_to_vec()).unwrap();
    let mut c = Command::new(binary);
    c.arg("-c").arg(&file).args(["--use-dynamic-base-id", "--concurrency", "1", "-l", "error"]);
    Running(c.stdin(Stdio::null()).spawn().unwrap())
}

fn engine(listeners: Vec<Listener>) -> Engine {
    let mut snapshot = ConfigSnapshot::default();
    for l in listeners {
        let decoded = codec::decode_listener(&codec::encode_listener(&l)).unwrap();
        snapshot.listeners.insert(l.name.clone(), Arc::new(decoded));
    }
    let mut registry = prometheus_client::registry::Registry::default();
    let engine =
        Engine::start(EngineOptions::default(), SecretStore::new(), &mut registry, Hooks::default()).unwrap();
    assert_eq!(engine.apply(snapshot).rejected, []);
    engine
}

/// The status of an answer.
async fn send(to: SocketAddr, ask: &Ask, tls: &Arc<rustls::ClientConfig>) -> String {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(SocketAddr::new(ask.source.parse().unwrap(), 0)).unwrap();
    let tcp = socket.connect(to).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    let name = ServerName::try_from(ask.sni).unwrap();
    let mut s = tokio_rustls::TlsConnector::from(Arc::clone(tls)).connect(name, tcp).await.unwrap();
    s.write_all(ask.text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.windows(4).any(|w| w == b"\r\n\r\n") {
        let read = tokio::time::timeout(Duration::from_secs(20), s.read_buf(&mut answer)).await;
        if read.expect("an answer").unwrap_or(0) == 0 {
            break;
        }
    }
    String::from_utf8_lossy(&answer).split(' ').nth(1).unwrap_or("none").to_owned()
}

/// Ports that are free at both addresses, below those that clients get.
fn free_ports(n: usize) -> Vec<u16> {
    let is_free = |at: &str, port| std::net::TcpListener::bind((at, port)).is_ok();
    let free = (21_000..32_000).filter(|port| is_free(OURS, *port) && is_free(ENVOYS, *port));
    free.take(n).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Envoy; cargo verify installs it"]
async fn envoy_and_the_engine_decide_alike() {
    const REQUESTS: usize = 60;
    const RANDOM: usize = 30;
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let issued = Issued::new(dir);
    let mut r = Random(7);
    let mut sets: Vec<(String, u16, String)> = Vec::new();
    let ours = written(1).len();
    for (n, port) in free_ports(ours + RANDOM).into_iter().enumerate() {
        let (name, policies) = match n.checked_sub(ours) {
            None => {
                let (name, policies) = written(port).swap_remove(n);
                (name.to_owned(), policies)
            }
            Some(n) => (format!("random {n}"), random(&mut r)),
        };
        sets.push((name, port, policies));
    }
    let listeners = |ours: bool| -> Vec<Listener> {
        let made = |(_, port, policies): &(String, u16, String)| {
            listener(&(workload(*port) + policies), dir, *port, ours, issued.server())
        };
        sets.iter().map(made).collect()
    };
    let _envoy = envoy(&listeners(false), dir);
    let engine = engine(listeners(true));
    let begun = Instant::now();
    for (_, port, _) in &sets {
        while TcpStream::connect((ENVOYS, *port)).await.is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "Envoy does not take the configuration");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let clients: Vec<_> = (0..CALLERS.len()).map(|c| issued.client(c)).collect();
    let (mut different, mut allowed, mut denied) = (Vec::new(), 0, 0);
    let mut both = 0;
    for (name, port, policies) in &sets {
        let (mut yes, mut no) = (0, 0);
        for _ in 0..REQUESTS {
            let ask = ask(&mut r);
            let to = |ip: &str| SocketAddr::new(ip.parse().unwrap(), *port);
            let tls = &clients[ask.caller];
            let (a, b) = tokio::join!(send(to(OURS), &ask, tls), send(to(ENVOYS), &ask, tls));
            if a != b {
                different.push(format!(
                    "{name}: {a}, Envoy {b}: {} from {} to {:?}\n{}{policies}",
                    CALLERS[ask.caller], ask.source, ask.sni, ask.text
                ));
            }
            yes += usize::from(a == "200");
            no += usize::from(a == "403");
        }
        println!("   {name}: {yes} allowed, {no} denied");
        both += usize::from(yes > 0 && no > 0);
        (allowed, denied) = (allowed + yes, denied + no);
    }
    drop(engine);
    assert!(
        different.is_empty(),
        "{} of {}:\n{}",
        different.len(),
        sets.len() * REQUESTS,
        different.join("\n")
    );
    assert!(allowed > 500 && denied > 500 && both >= 20, "{allowed} {denied} {both}");
}
