//! Configuration builders, certificates, and upstream servers that are not ours.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use mesh_identity::SecretStore;
use mesh_model::proxy::*;
use mesh_proxy::{ApplyReport, ConfigSnapshot, Engine, EngineOptions, Hooks, NodeInfo};
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

pub(crate) const WAIT: Duration = Duration::from_secs(10);

/// An engine with its configuration and metrics.
pub(crate) struct Proxy {
    pub(crate) engine: Engine,
    pub(crate) snap: ConfigSnapshot,
    pub(crate) registry: Registry,
    pub(crate) secrets: Arc<SecretStore>,
}

impl Proxy {
    pub(crate) fn new() -> Self {
        Self::with(EngineOptions::default(), Hooks::default())
    }

    pub(crate) fn with(mut options: EngineOptions, hooks: Hooks) -> Self {
        if options.node.workload.is_empty() {
            options.node = NodeInfo {
                workload: "reviews-v1".into(),
                namespace: "books".into(),
                cluster: "west".into(),
                service_account: "reviews".into(),
                principal: "spiffe://mesh.local/ns/books/sa/reviews".into(),
                ..NodeInfo::default()
            };
        }
        let mut registry = Registry::default();
        let secrets = SecretStore::new();
        let engine = Engine::start(options, secrets.clone(), &mut registry, hooks).unwrap();
        Self { engine, snap: ConfigSnapshot::default(), registry, secrets }
    }

    pub(crate) fn listener(mut self, l: Listener) -> Self {
        self.snap.listeners.insert(l.name.clone(), Arc::new(l));
        self
    }

    pub(crate) fn cluster(mut self, c: Cluster) -> Self {
        self.snap.clusters.insert(c.name.clone(), Arc::new(c));
        self
    }

    pub(crate) fn routes(mut self, r: RouteConfiguration) -> Self {
        self.snap.routes.insert(r.name.clone(), Arc::new(r));
        self
    }

    pub(crate) fn apply(&self) -> ApplyReport {
        self.engine.apply(self.snap.clone())
    }

    /// Applies, which must succeed.
    pub(crate) fn run(self) -> Self {
        let report = self.apply();
        assert_eq!(report.rejected, []);
        self
    }

    pub(crate) fn address(&self, listener: &str) -> SocketAddr {
        self.engine.status().listeners.into_iter().find(|l| l.name == listener).expect("bound").address
    }

    pub(crate) async fn connect(&self, listener: &str) -> TcpStream {
        TcpStream::connect(self.address(listener)).await.unwrap()
    }

    /// Sends raw bytes and reads until the proxy closes.
    pub(crate) async fn raw(&self, listener: &str, request: &str) -> String {
        let mut s = self.connect(listener).await;
        s.write_all(request.as_bytes()).await.unwrap();
        read_all(&mut s).await
    }

    /// One GET on a connection of its own.
    pub(crate) async fn get(&self, host: &str, path: &str) -> Response {
        self.send(host, path, "").await
    }

    pub(crate) async fn send(&self, host: &str, path: &str, headers: &str) -> Response {
        let raw = self
            .raw("l", &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n"))
            .await;
        Response::parse(&raw)
    }

    pub(crate) fn metrics(&self) -> String {
        let mut out = String::new();
        prometheus_client::encoding::text::encode(&mut out, &self.registry).unwrap();
        out
    }

    /// Waits until a metric line holds all parts.
    pub(crate) async fn metric(&self, parts: &[&str]) -> String {
        let end = tokio::time::Instant::now() + WAIT;
        loop {
            let all = self.metrics();
            if let Some(l) = all.lines().find(|l| parts.iter().all(|p| l.contains(p))) {
                return l.to_owned();
            }
            assert!(tokio::time::Instant::now() < end, "no metric with {parts:?} in {all}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

pub(crate) async fn read_all(s: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut out = Vec::new();
    let _ = tokio::time::timeout(WAIT, s.read_to_end(&mut out)).await.expect("the proxy closes");
    String::from_utf8_lossy(&out).into_owned()
}

/// Reads until the text holds `end`.
pub(crate) async fn read_until(s: &mut (impl tokio::io::AsyncRead + Unpin), end: &str) -> String {
    let mut out = Vec::new();
    let mut buf = [0; 4096];
    loop {
        let n = tokio::time::timeout(WAIT, s.read(&mut buf)).await.expect("data comes").unwrap();
        out.extend_from_slice(&buf[..n]);
        let text = String::from_utf8_lossy(&out);
        if text.contains(end) || n == 0 {
            return text.into_owned();
        }
    }
}

/// A response as text.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Response {
    pub(crate) fn parse(raw: &str) -> Self {
        let (head, body) = raw.split_once("\r\n\r\n").unwrap_or((raw, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Self { status, head: head.to_owned(), body: body.to_owned() }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|l| {
            let (n, v) = l.split_once(':')?;
            n.eq_ignore_ascii_case(name).then(|| v.trim())
        })
    }
}

// ------------------------------------------------------------ configuration

pub(crate) fn forward(cluster: &str) -> Forward {
    Forward { clusters: vec![WeightedCluster::only(cluster)], ..Forward::default() }
}

pub(crate) fn route(f: Forward) -> Route {
    Route {
        name: "default".into(),
        matches: RouteMatch::any(),
        action: RouteAction::Forward(Box::new(f)),
        request_headers: Default::default(),
        response_headers: Default::default(),
        fault: None,
        cors: None,
        operation: String::new(),
        filters: Default::default(),
    }
}

pub(crate) fn vhost(domains: &[&str], routes: Vec<Route>) -> VirtualHost {
    VirtualHost {
        name: domains[0].into(),
        domains: domains.iter().map(|d| (*d).to_owned()).collect(),
        require_tls: false,
        attempt_count: false,
        routes,
        request_headers: Default::default(),
        response_headers: Default::default(),
        filters: Default::default(),
    }
}

pub(crate) fn table(hosts: Vec<VirtualHost>) -> RouteConfiguration {
    RouteConfiguration { name: "r".into(), virtual_hosts: hosts, on_demand: None }
}

pub(crate) fn manager(routes: RouteSource) -> HttpConnectionManager {
    HttpConnectionManager {
        stat_prefix: "x".into(),
        codec: HttpCodec::Auto,
        routes,
        filters: vec![HttpFilter::Cors, HttpFilter::Fault],
        use_remote_address: false,
        trusted_hops: 0,
        forward_client_cert: ForwardClientCert::AppendForward,
        websocket: true,
        connect: true,
        server_name: "flotilla".into(),
        normalize_path: true,
        merge_slashes: false,
        escaped_slashes: EscapedSlashes::Reject,
        access_log: vec![],
        tracing: None,
        idle_timeout: None,
        request_headers_timeout: None,
        stream_idle_timeout: None,
        max_stream_duration: None,
        accept_http_10: true,
        preserve_request_id: false,
        headers: Default::default(),
        limits: Default::default(),
    }
}

pub(crate) fn inline(hosts: Vec<VirtualHost>) -> HttpConnectionManager {
    manager(RouteSource::Inline(Arc::new(table(hosts))))
}

pub(crate) fn chain(filters: Vec<NetworkFilter>) -> FilterChain {
    FilterChain { name: "c".into(), matches: FilterChainMatch::default(), tls: None, filters }
}

pub(crate) fn http_chain(m: HttpConnectionManager) -> FilterChain {
    chain(vec![NetworkFilter::Http(Box::new(m))])
}

pub(crate) fn tcp_filter(cluster: &str) -> NetworkFilter {
    NetworkFilter::Tcp(TcpProxy {
        stat_prefix: "t".into(),
        clusters: vec![WeightedCluster::only(cluster)],
        idle_timeout: None,
        max_duration: None,
        access_log: vec![],
        tunnel: None,
        on_demand: None,
        names: None,
    })
}

pub(crate) fn listener(direction: Direction, chains: Vec<FilterChain>) -> Listener {
    Listener {
        name: "l".into(),
        address: "127.0.0.1:0".parse().unwrap(),
        bind_to_port: true,
        use_original_dst: false,
        transparent: false,
        direction,
        inspect_tls: true,
        inspect_http: true,
        proxy_protocol: false,
        inspect_timeout: Duration::from_secs(5),
        filter_chains: chains,
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

pub(crate) fn endpoint(a: SocketAddr) -> LbEndpoint {
    LbEndpoint {
        address: a.ip().to_string(),
        port: a.port(),
        weight: 1,
        health: EndpointHealth::Healthy,
        transport_labels: BTreeMap::new(),
        workload: "ratings-v1;books;ratings;v1;east".into(),
        check: None,
        slots: mesh_model::proxy::Slots::None,
    }
}

pub(crate) fn assignment(hosts: &[SocketAddr]) -> LoadAssignment {
    LoadAssignment {
        name: "e".into(),
        localities: vec![LocalityEndpoints {
            endpoints: hosts.iter().map(|a| endpoint(*a)).collect(),
            weight: 1,
            ..LocalityEndpoints::default()
        }],
        overprovisioning: 140,
    }
}

pub(crate) fn cluster(name: &str, hosts: &[SocketAddr]) -> Cluster {
    Cluster {
        name: name.into(),
        namespace: String::new(),
        discovery: Discovery::Static(assignment(hosts)),
        lb: LbPolicy::RoundRobin,
        connect_timeout: Duration::from_secs(2),
        http: UpstreamHttp::Http1,
        tls: None,
        tls_matches: vec![],
        limits: CircuitBreakers::default(),
        outlier: None,
        health: None,
        close_on_health_failure: false,
        utilization: None,
        slow_start: None,
        max_requests_per_connection: 0,
        idle_timeout: None,
        panic_threshold: 0,
        locality_weighted: false,
        max_connection_duration: None,
        http2: UpstreamHttp2::default(),
        keepalive: None,
        source: vec![],
        proxy_protocol: None,
        stat_name: String::new(),
        dns_refresh: None,
        buffer_limit: None,
        preserve_case: false,
    }
}

/// The usual proxy: everything to one cluster.
pub(crate) fn simple(upstream: SocketAddr) -> Proxy {
    Proxy::new().cluster(cluster("up", &[upstream])).listener(listener(
        Direction::Outbound,
        vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
    ))
}

// ---------------------------------------------------------------- upstreams

/// An HTTP/1 and HTTP/2 server on hyper. It answers with what it saw: request line and headers as the body, unless
/// the path asks for something else.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    pub(crate) connections: Arc<AtomicUsize>,
    pub(crate) requests: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Upstream {
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) async fn new(name: &'static str) -> Self {
        let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = l.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let requests = Arc::new(AtomicUsize::new(0));
        let (c, r) = (connections.clone(), requests.clone());
        let task = tokio::spawn(async move {
            loop {
                let (s, _) = l.accept().await.unwrap();
                c.fetch_add(1, Ordering::SeqCst);
                let r = r.clone();
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |req| {
                        r.fetch_add(1, Ordering::SeqCst);
                        echo(name, req)
                    });
                    let _ =
                        hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new())
                            .serve_connection(hyper_util::rt::TokioIo::new(s), service)
                            .await;
                });
            }
        });
        Self { address, connections, requests, task }
    }
}

type Body = http_body_util::combinators::BoxBody<bytes::Bytes, std::convert::Infallible>;

pub(crate) fn full(s: impl Into<bytes::Bytes>) -> Body {
    use http_body_util::BodyExt as _;
    http_body_util::Full::new(s.into()).boxed()
}

/// A body of unknown length with trailers.
fn with_trailers(data: bytes::Bytes, trailers: hyper::HeaderMap) -> Body {
    use http_body_util::BodyExt as _;
    let frames = [Ok(hyper::body::Frame::data(data)), Ok(hyper::body::Frame::trailers(trailers))];
    http_body_util::StreamBody::new(futures::stream::iter(frames)).boxed()
}

async fn echo(
    name: &'static str,
    req: hyper::Request<hyper::body::Incoming>,
) -> Result<hyper::Response<Body>, std::convert::Infallible> {
    use http_body_util::BodyExt as _;
    let path = req.uri().path().to_owned();
    let mut seen = format!("{name} {} {} {:?}\n", req.method(), req.uri(), req.version());
    for (n, v) in req.headers() {
        seen.push_str(&format!("{n}: {}\n", String::from_utf8_lossy(v.as_bytes())));
    }
    let builder = hyper::Response::builder();
    let r = match path.as_str() {
        "/echo" => {
            let Ok(collected) = req.into_body().collect().await else {
                return Ok(builder.status(400).body(full("broken off")).unwrap());
            };
            let trailers = collected.trailers().cloned();
            match trailers {
                None => builder.body(full(collected.to_bytes())),
                Some(t) => builder.header("trailer", "x-t").body(with_trailers(collected.to_bytes(), t)),
            }
        }
        "/stream" => builder.body(req.into_body().map_err(|_| unreachable!()).boxed()),
        "/trailers" => {
            let mut t = hyper::HeaderMap::new();
            t.insert("grpc-status", "0".parse().unwrap());
            t.insert("x-t", "1".parse().unwrap());
            let body = with_trailers(bytes::Bytes::from("data"), t);
            builder
                .header("content-type", "application/grpc")
                .header("trailer", "grpc-status, x-t")
                .body(body)
        }
        "/after" => match req.into_body().collect().await {
            Ok(_) => builder.body(full(seen)),
            Err(_) => builder.status(400).body(full("broken off")),
        },
        "/slow" => {
            tokio::time::sleep(Duration::from_secs(5)).await;
            builder.body(full("slow"))
        }
        "/empty" => builder.status(204).body(full("")),
        "/big" => builder.body(full(vec![b'x'; 1 << 20])),
        "/name" => builder.body(full(name)),
        p if p.starts_with("/status/") => {
            builder.status(p[8..].parse::<u16>().unwrap()).header("grpc-status", "14").body(full("as asked"))
        }
        _ => builder.header("x-upstream", name).body(full(seen)),
    };
    Ok(r.unwrap())
}

/// A raw server: every connection is given to `f`.
pub(crate) async fn raw_server<F, R>(f: F) -> SocketAddr
where
    F: Fn(TcpStream, usize) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let a = l.local_addr().unwrap();
    tokio::spawn(async move {
        for n in 0.. {
            let (s, _) = l.accept().await.unwrap();
            tokio::spawn(f(s, n));
        }
    });
    a
}

/// A port that refuses connections. It stays taken: who listens on any port must not get it.
pub(crate) fn closed_port() -> SocketAddr {
    let s = tokio::net::TcpSocket::new_v4().unwrap();
    s.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let at = s.local_addr().unwrap();
    std::mem::forget(s);
    at
}

// ------------------------------------------------------------- certificates

/// A root with one intermediate per cluster, as citadel makes them.
pub(crate) struct Ca {
    root: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let mut p = rcgen::CertificateParams::default();
        p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        p.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        p.distinguished_name.push(rcgen::DnType::CommonName, "root");
        Self { root: rcgen::CertifiedIssuer::self_signed(p, rcgen::KeyPair::generate().unwrap()).unwrap() }
    }

    pub(crate) fn root_pem(&self) -> String {
        self.root.as_ref().pem()
    }

    /// Chain and key of a workload in a cluster.
    pub(crate) fn workload(&self, cluster: &str, spiffe: &str) -> (String, String) {
        let uri = |s: &str| rcgen::SanType::URI(s.try_into().unwrap());
        let mut p = rcgen::CertificateParams::default();
        p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        p.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        p.distinguished_name.push(rcgen::DnType::CommonName, format!("cluster {cluster}"));
        p.subject_alt_names = vec![uri(&format!("spiffe://mesh.local/cluster/{cluster}"))];
        let intermediate =
            rcgen::CertifiedIssuer::signed_by(p, rcgen::KeyPair::generate().unwrap(), &self.root).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut p = rcgen::CertificateParams::default();
        p.distinguished_name = rcgen::DistinguishedName::new();
        p.subject_alt_names = vec![uri(spiffe)];
        p.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        p.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = p.signed_by(&key, &intermediate).unwrap();
        (format!("{}{}", leaf.pem(), intermediate.as_ref().pem()), key.serialize_pem())
    }

    /// The root's list, on which the intermediate of a chain is.
    pub(crate) fn revoking(&self, chain: &str) -> mesh_model::federation::RevocationList {
        let second = chain.split_inclusive("-----END CERTIFICATE-----\n").nth(1).unwrap();
        let serial = mesh_identity::certificate_info(second.as_bytes()).unwrap().serial.replace(':', "");
        let serial: Vec<u8> = (0..serial.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&serial[i..i + 2], 16).unwrap())
            .collect();
        let now = std::time::SystemTime::now();
        let list = rcgen::CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: 1u64.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![rcgen::RevokedCertParams {
                serial_number: rcgen::SerialNumber::from_slice(&serial),
                revocation_time: now.into(),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.root).unwrap().pem().unwrap();
        mesh_model::federation::RevocationList { issuer: self.root_pem(), list }
    }

    /// Lets a process know of what the root revoked.
    pub(crate) fn tell(&self, store: &SecretStore, list: mesh_model::federation::RevocationList) {
        store.set_revoked(&mesh_model::TrustDomain::default(), &self.root_pem(), &[list]).unwrap();
    }

    pub(crate) fn enroll(&self, store: &SecretStore, cluster: &str, spiffe: &str) {
        let (chain, key) = self.workload(cluster, spiffe);
        store.set_identity("default", chain.as_bytes(), key.as_bytes()).unwrap();
        store.set_trust("ROOTCA", self.root_pem().as_bytes()).unwrap();
    }
}

pub(crate) fn validation(sans: &[&str]) -> Validation {
    Validation {
        trusted: Some(SecretRef::Sds("ROOTCA".into())),
        sans: sans.iter().map(|s| StringMatch::exact(*s)).collect(),
        crl: None,
    }
}

pub(crate) fn downstream_mtls() -> DownstreamTls {
    DownstreamTls {
        certificate: SecretRef::Sds("default".into()),
        client_certificate: ClientCertificate::Required(validation(&[])),
        alpn: vec!["h2".into(), "istio".into(), "http/1.1".into()],
        min_version: TlsVersion::V1_2,
        options: TlsServerOptions::default(),
    }
}

pub(crate) fn upstream_mtls(sni: &str, san: &str, alpn: &[&str]) -> UpstreamTls {
    UpstreamTls {
        certificate: Some(SecretRef::Sds("default".into())),
        validation: validation(&[san]),
        sni: sni.into(),
        by_name: false,
        alpn: alpn.iter().map(|s| (*s).to_owned()).collect(),
    }
}
