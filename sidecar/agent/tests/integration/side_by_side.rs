//! Runs one listener in both proxies: the engine gets what decoding makes of the encoding that Envoy gets.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use envoy_types::pb::envoy::config::{
    bootstrap::v3::{Bootstrap, bootstrap::StaticResources},
    cluster::v3::Cluster as EnvoyCluster,
    core::v3 as core,
    listener::v3::Listener as EnvoyListener,
};
use mesh_identity::SecretStore;
use mesh_model::proxy::*;
use mesh_proxy::{ConfigSnapshot, Engine, EngineOptions, Hooks};
use mesh_xds::codec;
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
};

const WAIT: Duration = Duration::from_secs(20);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

/// Both proxies.
pub(crate) struct Pair {
    pub(crate) engine: SocketAddr,
    pub(crate) envoy: SocketAddr,
    _engine: Engine,
    _envoy: Running,
    _dir: tempfile::TempDir,
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn cluster(name: &str, host: SocketAddr, http: UpstreamHttp) -> Cluster {
    let endpoint = LbEndpoint {
        address: host.ip().to_string(),
        port: host.port(),
        weight: 1,
        health: EndpointHealth::Healthy,
        transport_labels: BTreeMap::new(),
        workload: String::new(),
        check: None,
        slots: mesh_model::proxy::Slots::None,
    };
    Cluster {
        name: name.into(),
        discovery: Discovery::Static(LoadAssignment {
            name: name.into(),
            localities: vec![LocalityEndpoints {
                endpoints: vec![endpoint],
                weight: 1,
                ..LocalityEndpoints::default()
            }],
            overprovisioning: 140,
        }),
        http,
        ..base()
    }
}

fn base() -> Cluster {
    codec::decode_cluster(&pack(&EnvoyCluster { name: "base".into(), ..EnvoyCluster::default() })).unwrap()
}

fn pack<T: prost::Name>(m: &T) -> mesh_xds::pb::Any {
    mesh_xds::pb::Any {
        type_url: format!("type.googleapis.com/{}", T::full_name()),
        value: m.encode_to_vec().into(),
    }
}

pub(crate) fn route(f: Forward, filters: RouteFilters) -> Route {
    Route {
        name: "r".into(),
        matches: RouteMatch::any(),
        action: RouteAction::Forward(Box::new(f)),
        request_headers: Default::default(),
        response_headers: Default::default(),
        fault: None,
        cors: None,
        operation: String::new(),
        filters: filters.into(),
    }
}

pub(crate) fn to_up() -> Forward {
    Forward { clusters: vec![WeightedCluster::only("up")], ..Forward::default() }
}

/// A connection manager with these filters and routes; what is left is what Envoy has by default.
pub(crate) fn manager(filters: Vec<HttpFilter>, routes: Vec<Route>) -> HttpConnectionManager {
    use envoy_types::pb::envoy::extensions::filters::{
        http::router::v3::Router, network::http_connection_manager::v3 as hcm,
    };
    // The shortest listener, for everything that is not asked about here.
    let any = |url: &str, value| envoy_types::pb::google::protobuf::Any { type_url: url.into(), value };
    let config = hcm::HttpConnectionManager {
        stat_prefix: "x".into(),
        http_filters: vec![hcm::HttpFilter {
            name: "envoy.filters.http.router".into(),
            config_type: Some(hcm::http_filter::ConfigType::TypedConfig(any(
                "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                Router::default().encode_to_vec(),
            ))),
            ..Default::default()
        }],
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
            route_config_name: "r".into(),
            ..Default::default()
        })),
        ..Default::default()
    };
    use envoy_types::pb::envoy::config::listener::v3 as l;
    let listener = EnvoyListener {
        name: "l".into(),
        address: Some(loopback()),
        filter_chains: vec![l::FilterChain {
            filters: vec![l::Filter {
                name: "hcm".into(),
                config_type: Some(l::filter::ConfigType::TypedConfig(any(
                    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                    config.encode_to_vec(),
                ))),
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut decoded = codec::decode_listener(&pack(&listener)).unwrap();
    let Some(NetworkFilter::Http(m)) = decoded.filter_chains.remove(0).filters.pop() else { panic!() };
    let host = VirtualHost {
        name: "v".into(),
        domains: vec!["*".into()],
        require_tls: false,
        attempt_count: false,
        routes,
        request_headers: Default::default(),
        response_headers: Default::default(),
        filters: Default::default(),
    };
    let routes = RouteConfiguration { name: "r".into(), virtual_hosts: vec![host], on_demand: None };
    HttpConnectionManager { filters, routes: RouteSource::Inline(Arc::new(routes)), ..*m }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Pair {
    pub(crate) async fn new(m: HttpConnectionManager, clusters: Vec<Cluster>) -> Self {
        Self::with(vec![NetworkFilter::Http(Box::new(m))], Direction::Inbound, false, clusters).await
    }

    /// A listener of bytes.
    pub(crate) async fn tcp(t: TcpProxy, clusters: Vec<Cluster>) -> Self {
        Self::with(vec![NetworkFilter::Tcp(t)], Direction::Outbound, false, clusters).await
    }

    /// A listener of bytes that looks at their SNI.
    pub(crate) async fn sni(t: TcpProxy, clusters: Vec<Cluster>) -> Self {
        Self::with(vec![NetworkFilter::Tcp(t)], Direction::Outbound, true, clusters).await
    }

    /// A listener of bytes with filters before that.
    pub(crate) async fn filtered(filters: Vec<NetworkFilter>, clusters: Vec<Cluster>) -> Self {
        Self::with(filters, Direction::Inbound, false, clusters).await
    }

    /// A listener of bytes that has so many connections.
    pub(crate) async fn limited(t: TcpProxy, max_connections: u32, clusters: Vec<Cluster>) -> Self {
        let limit = Listener { max_connections: Some(max_connections), ..base_listener() };
        Self::like(limit, vec![NetworkFilter::Tcp(t)], clusters).await
    }

    async fn with(
        filters: Vec<NetworkFilter>,
        direction: Direction,
        inspect_tls: bool,
        clusters: Vec<Cluster>,
    ) -> Self {
        Self::like(Listener { direction, inspect_tls, ..base_listener() }, filters, clusters).await
    }

    /// A listener that is otherwise like this one.
    async fn like(base: Listener, filters: Vec<NetworkFilter>, clusters: Vec<Cluster>) -> Self {
        let port = free_port();
        let pair = Self::start(
            Listener {
                name: "l".into(),
                address: SocketAddr::from(([127, 0, 0, 1], port)),
                filter_chains: vec![FilterChain {
                    name: "c".into(),
                    matches: FilterChainMatch::default(),
                    tls: None,
                    filters,
                }],
                ..base
            },
            clusters,
        );
        let end = tokio::time::Instant::now() + WAIT;
        while TcpStream::connect(pair.envoy).await.is_err() {
            assert!(tokio::time::Instant::now() < end, "Envoy does not take the configuration");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        pair
    }

    /// A UDP listener; nobody has waited for Envoy yet.
    pub(crate) fn udp(config: UdpProxy, clusters: Vec<Cluster>) -> Self {
        let address = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Self::start(Listener { address, udp: Some(Box::new(config)), ..base_listener() }, clusters)
    }

    fn start(l: Listener, clusters: Vec<Cluster>) -> Self {
        let l = Listener { name: "l".into(), ..l };
        let encoded = codec::encode_listener(&l);
        let encoded_clusters: Vec<_> = clusters.iter().map(codec::encode_cluster).collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("envoy.pb");
        let bootstrap = Bootstrap {
            static_resources: Some(StaticResources {
                listeners: vec![EnvoyListener::decode(encoded.value.clone()).unwrap()],
                clusters: encoded_clusters
                    .iter()
                    .map(|c| EnvoyCluster::decode(c.value.clone()).unwrap())
                    .collect(),
                ..StaticResources::default()
            }),
            ..Bootstrap::default()
        };
        std::fs::write(&file, bootstrap.encode_to_vec()).unwrap();
        let binary = std::env::var("ENVOY_BIN").expect("ENVOY_BIN names an Envoy binary");
        let child = Command::new(binary)
            .arg("-c")
            .arg(&file)
            .args(["--use-dynamic-base-id", "--concurrency", "1", "-l", "error"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let envoy = Running(child);

        let mut snapshot = ConfigSnapshot::default();
        let mut decoded = codec::decode_listener(&encoded).unwrap();
        assert_eq!(decoded, l, "what is encoded decodes");
        decoded.address.set_port(0);
        snapshot.listeners.insert("l".into(), Arc::new(decoded));
        for c in &encoded_clusters {
            let c = codec::decode_cluster(c).unwrap();
            snapshot.clusters.insert(c.name.clone(), Arc::new(c));
        }
        let mut registry = prometheus_client::registry::Registry::default();
        let engine =
            Engine::start(EngineOptions::default(), SecretStore::new(), &mut registry, Hooks::default())
                .unwrap();
        assert_eq!(engine.apply(snapshot).rejected, []);
        let address = engine.status().listeners[0].address;
        Self { engine: address, envoy: l.address, _engine: engine, _envoy: envoy, _dir: dir }
    }

    /// Sends a request to both; the first answer is the engine's.
    pub(crate) async fn ask(&self, request: &str) -> (Answer, Answer) {
        (send(self.engine, request).await, send(self.envoy, request).await)
    }

    /// Asks both, who must answer with the same status, the same body and the same values of these headers.
    pub(crate) async fn alike(&self, request: &str, headers: &[&str]) -> Answer {
        let (ours, theirs) = self.ask(request).await;
        let of = |a: &Answer| {
            let h: Vec<_> = headers.iter().map(|n| a.headers.get(*n).cloned()).collect();
            (a.status, String::from_utf8_lossy(&a.body).into_owned(), h)
        };
        assert_eq!(of(&ours), of(&theirs), "{request}\nours {ours:?}\nEnvoy's {theirs:?}");
        ours
    }
}

fn loopback() -> core::Address {
    core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: "127.0.0.1".into(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(1)),
            ..Default::default()
        })),
    }
}

fn base_listener() -> Listener {
    let l = EnvoyListener { name: "b".into(), address: Some(loopback()), ..Default::default() };
    codec::decode_listener(&pack(&l)).unwrap()
}

pub(crate) async fn send(to: SocketAddr, request: &str) -> Answer {
    exchange(TcpStream::connect(to).await.unwrap(), request).await
}

/// The same from an address of this host.
pub(crate) async fn send_from(source: &str, to: SocketAddr, request: &str) -> Answer {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    exchange(socket.connect(to).await.unwrap(), request).await
}

async fn exchange(mut s: TcpStream, request: &str) -> Answer {
    s.write_all(request.as_bytes()).await.unwrap();
    let mut raw = Vec::new();
    // Until the answer is whole: Envoy keeps a connection open for a while after its last answer.
    while !complete(&raw) {
        let n = tokio::time::timeout(WAIT, s.read_buf(&mut raw)).await.expect("an answer comes").unwrap_or(0);
        if n == 0 {
            break;
        }
    }
    let at = raw.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("{raw:?} to {request}"));
    let head = String::from_utf8_lossy(&raw[..at]).into_owned();
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    for l in head.lines().skip(1) {
        let (n, v) = l.split_once(':').unwrap();
        let entry = headers.entry(n.to_ascii_lowercase()).or_default();
        if !entry.is_empty() {
            entry.push(',');
        }
        // Lists are the same with and without blanks.
        entry.push_str(&v.trim().replace(", ", ","));
    }
    let mut body = raw[at + 4..].to_vec();
    if headers.get("transfer-encoding").is_some_and(|t| t == "chunked") {
        body = unchunk(&body);
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, headers, body }
}

pub(crate) fn complete(raw: &[u8]) -> bool {
    let Some(at) = raw.windows(4).position(|w| w == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&raw[..at]).to_ascii_lowercase();
    let length = head.lines().find_map(|l| l.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    match length {
        Some(n) => raw.len() >= at + 4 + n,
        None => raw.ends_with(b"0\r\n\r\n"),
    }
}

fn unchunk(mut b: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = b.windows(2).position(|w| w == b"\r\n") {
        let n = usize::from_str_radix(std::str::from_utf8(&b[..end]).unwrap(), 16).unwrap();
        if n == 0 {
            break;
        }
        out.extend_from_slice(&b[end + 2..end + 2 + n]);
        b = &b[end + 4 + n..];
    }
    out
}

/// Answers each request with what `f` makes of it: header lines and body.
pub(crate) async fn server<F>(f: F) -> SocketAddr
where
    F: Fn(&str) -> (u16, String, String) + Clone + Send + Sync + 'static,
{
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let a = l.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut s, _) = l.accept().await.unwrap();
            let f = f.clone();
            tokio::spawn(async move {
                let mut seen = String::new();
                let mut buf = [0; 8192];
                loop {
                    // A request ends with its head, or with as much of a body as that announces.
                    while !whole(&seen) {
                        match s.read(&mut buf).await {
                            Ok(n) if n > 0 => seen.push_str(&String::from_utf8_lossy(&buf[..n])),
                            _ => return,
                        }
                    }
                    let request = std::mem::take(&mut seen);
                    if request.starts_with("GET /slow") {
                        tokio::time::sleep(Duration::from_secs(5)).await;
                    }
                    let (status, headers, body) = f(&request);
                    let r = format!(
                        "HTTP/1.1 {status} x\r\ncontent-length: {}\r\n{headers}\r\n{body}",
                        body.len()
                    );
                    if s.write_all(r.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    a
}

fn whole(seen: &str) -> bool {
    let Some((head, body)) = seen.split_once("\r\n\r\n") else { return false };
    let lower = head.to_ascii_lowercase();
    if lower.contains("transfer-encoding: chunked") {
        return body.ends_with("0\r\n\r\n");
    }
    let length = lower.lines().find_map(|l| l.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    body.len() >= length.unwrap_or(0)
}
