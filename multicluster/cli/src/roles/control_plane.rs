//! `flotilla control-plane`: galley, pilot, citadel, mixer and federation in one process.
//!
//! They meet over the same protocols as separate processes would: configuration, exports and imports
//! over MCP on private unix sockets, the CA over its authority socket, proxies over port 15012.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use axum::http::StatusCode;
use citadel::{
    Citadel, CitadelOptions,
    kubernetes::{IssuerUrl, KubernetesOptions, Url},
    probe::Health,
    secrets::{SecretsOptions, ServiceAccount},
};
use galley::{Galley, GalleyOptions, Listen};
use mesh_identity::{Ends, SecretStore, TRUST_BUNDLE, WORKLOAD_SVID};
use mesh_model::{
    ClusterId, NetworkId, TrustDomain,
    federation::{GatewayAddress, ImportedService, Transport, type_url},
    proxy::{
        ClientCertificate, DownstreamTls, SecretRef, StringMatch, TlsServerOptions, TlsVersion, Validation,
    },
};
use mesh_runtime::{
    Right, RunAs,
    admin::{metrics_router, ready_router, serve},
    ports,
    ready::Readiness,
};
use mesh_xds::{Endpoint, NodeInfo, mcp::ConfigClient, server::conn};
use multicluster::{
    Federation, FederationOptions,
    bundle::{BundleEndpoints, SYSTEM_ROOTS},
};
use pilot::{Pilot, PilotOptions, Settings, consul::Services};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

use self::consul::ConsulArgs;
use crate::local::socket;

mod consul;

/// Flags of `flotilla control-plane`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ControlPlaneArgs {
    /// This cluster: a DNS label, unique in the mesh
    #[arg(long, env = "FLOTILLA_CLUSTER")]
    cluster: ClusterId,
    /// Network of its workloads; defaults to the cluster
    #[arg(long, env = "FLOTILLA_NETWORK")]
    network: Option<NetworkId>,
    /// Trust domain of the mesh, for this cluster and its proxies alike; meshes that are to federate need different ones
    #[arg(long, env = "FLOTILLA_TRUST_DOMAIN", default_value = TrustDomain::DEFAULT)]
    trust_domain: TrustDomain,
    /// Directory for keys, state and private sockets
    #[arg(long, env = "FLOTILLA_STATE_DIR", default_value = "/var/lib/flotilla")]
    state_dir: PathBuf,
    /// Directory of configuration documents, repeated; read again when it changes
    #[arg(long = "config")]
    config: Vec<PathBuf>,
    /// xDS and certificate service for proxies, TLS; its certificate has this address unless it is all of them
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], ports::XDS)))]
    xds: SocketAddr,
    /// xDS in clear text; a loopback address, for proxies in this very host or for debugging
    #[arg(long, value_parser = loopback)]
    xds_plaintext: Option<SocketAddr>,
    /// Readiness and metrics
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], ports::CONTROL_METRICS)))]
    metrics: SocketAddr,
    /// Federation with peers, TLS; reached through the east-west gateway
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], ports::FEDERATION)))]
    federation: SocketAddr,
    /// Mixer's Check and Report, TLS
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], ports::MIXER)))]
    mixer: SocketAddr,
    /// Where the east-west gateway finds the federation service; --federation by default
    #[arg(long)]
    federation_address: Option<SocketAddr>,
    /// Address of this cluster's east-west gateway as peers reach it, repeated; without one (behind NAT) peers use
    /// connections that its gateway dials, which needs --transport quic on both sides, --gateway-internal and
    /// --gateway-via
    #[arg(long = "gateway-address")]
    gateway_address: Vec<SocketAddr>,
    /// Address of this cluster's east-west gateway as its own workloads reach it, repeated; defaults to
    /// --gateway-address
    #[arg(long = "gateway-internal")]
    gateway_internal: Vec<SocketAddr>,
    /// Dial peers through this gateway of this cluster instead of dialling theirs
    #[arg(long)]
    gateway_via: Option<SocketAddr>,
    /// Transports that the gateways accept, preferred first
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [TransportFlag::Tcp])]
    transport: Vec<TransportFlag>,
    /// Lifetime of workload certificates, hours
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u64).range(1..=2160))]
    workload_ttl_hours: u64,
    /// How often other trust domains are to ask for the roots of this one, seconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    bundle_refresh_hint: u64,
    /// Over how long proxies spread their renewal when this cluster has another intermediate, seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3600))]
    renew_within: u64,
    /// How often the CA is asked for a certificate, which is verified, seconds; `/healthz/ca` at the port of --metrics
    /// answers 503 while that fails
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    ca_probe_interval: u64,
    /// Files of the CA's audit log, of 16 MiB each, that stay when they are full; the oldest goes then, unless a certificate in it
    /// may be valid still
    #[arg(long, value_name = "FILES", default_value_t = citadel::audit::KEEP, value_parser = files)]
    audit_keep: usize,
    #[command(flatten)]
    bundle: BundleArgs,
    /// Keep certificates of service accounts in files, for programs that cannot ask for them:
    /// `DIR/NAMESPACE/istio.ACCOUNT/{cert-chain.pem,key.pem,root-cert.pem}`, replaced together before they expire
    #[arg(long, value_name = "DIR", requires = "account_secret")]
    account_secrets: Option<PathBuf>,
    /// Whose; repeated
    #[arg(long, value_name = "NAMESPACE/ACCOUNT", requires = "account_secrets")]
    account_secret: Vec<ServiceAccount>,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
    #[command(flatten)]
    consul: ConsulArgs,
    /// Go on as this user, when started as root: `UID` or `UID:GID`, by number. Its files must be the user's
    #[arg(long, env = "FLOTILLA_RUN_AS", value_name = "UID[:GID]")]
    run_as: Option<RunAs>,
}

/// The bundle endpoint (SPIFFE Federation), and whom those of others are verified by.
#[derive(Debug, Clone, clap::Args)]
struct BundleArgs {
    /// Serve the bundle of this trust domain over HTTPS, to whoever asks; the certificate is the control plane's SVID
    /// (profile https_spiffe, spiffe://DOMAIN/ns/flotilla-system/sa/control-plane)
    #[arg(long)]
    bundle_endpoint: Option<SocketAddr>,
    /// The same with the certificate in --bundle-endpoint-cert (profile https_web)
    #[arg(long, requires_all = ["bundle_endpoint_cert", "bundle_endpoint_key"])]
    bundle_endpoint_web: Option<SocketAddr>,
    /// Certificate chain of --bundle-endpoint-web, PEM; read again when it changes
    #[arg(long, requires = "bundle_endpoint_web")]
    bundle_endpoint_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, requires = "bundle_endpoint_web")]
    bundle_endpoint_key: Option<PathBuf>,
    /// Authorities that https_web bundle endpoints of other trust domains are verified by, PEM
    #[arg(long, default_value = SYSTEM_ROOTS)]
    web_roots: PathBuf,
}

impl BundleArgs {
    fn endpoints(&self) -> BundleEndpoints {
        let files = self.bundle_endpoint_cert.clone().zip(self.bundle_endpoint_key.clone());
        BundleEndpoints {
            spiffe: self.bundle_endpoint,
            web: self.bundle_endpoint_web.zip(files).map(|(address, (chain, key))| (address, chain, key)),
            web_roots: self.web_roots.clone(),
        }
    }
}

/// Service-account tokens of Kubernetes as proof of identity, besides `flotilla token workload`.
#[derive(Debug, Clone, clap::Args)]
struct KubernetesArgs {
    /// Ask this API server about service-account tokens (TokenReview; audience istio-ca)
    #[arg(long, value_name = "URL", value_parser = Url::parse)]
    token_review: Option<Url>,
    /// Verify tokens of this issuer by its keys, which its /.well-known/openid-configuration names; repeated. `=URL` is where
    /// it is asked, if not by its own name
    #[arg(long, value_name = "ISSUER[=URL]", value_parser = IssuerUrl::parse)]
    token_issuer: Vec<IssuerUrl>,
    /// Authorities of both, PEM; a pod has /var/run/secrets/kubernetes.io/serviceaccount/ca.crt
    #[arg(long, value_name = "FILE")]
    token_ca: Option<PathBuf>,
    /// Bearer token that is shown to both, read before each question; a pod has
    /// /var/run/secrets/kubernetes.io/serviceaccount/token
    #[arg(long, value_name = "FILE")]
    token_credential: Option<PathBuf>,
}

impl KubernetesArgs {
    fn options(&self) -> KubernetesOptions {
        KubernetesOptions {
            review: self.token_review.clone(),
            issuers: self.token_issuer.clone(),
            ca: self.token_ca.clone(),
            credential: self.token_credential.clone(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TransportFlag {
    /// TCP by SNI
    Tcp,
    /// QUIC trunk
    Quic,
}

/// A push takes a fraction of it.
const TELLING: Duration = Duration::from_secs(1);

/// Whoever is revoked is told before its session ends, and may ask for another certificate with a token.
fn later(ends: Ends) -> Ends {
    Arc::new(move |shown| {
        let end = ends(shown);
        Box::pin(async move {
            end.await;
            tokio::time::sleep(TELLING).await;
        })
    })
}

fn files(s: &str) -> Result<usize, String> {
    let n: usize = s.parse().map_err(|e| format!("{e}"))?;
    if (1..=10_000).contains(&n) { Ok(n) } else { Err("is not between 1 and 10000".into()) }
}

fn loopback(s: &str) -> Result<SocketAddr, String> {
    let a: SocketAddr = s.parse().map_err(|e| format!("{e}"))?;
    if a.ip().is_loopback() { Ok(a) } else { Err("clear text is served on loopback addresses only".into()) }
}

/// Runs until SIGTERM or SIGINT.
pub(crate) async fn run(args: ControlPlaneArgs) -> anyhow::Result<()> {
    mesh_runtime::confine(args.run_as, &[Right::LowPorts])?;
    let _tracing = mesh_telemetry::trace::init_tracing("flotilla-control-plane", None, false)?;
    let stop = mesh_runtime::shutdown::on_signal()?;
    mesh_runtime::files::private_dir(&args.state_dir)
        .with_context(|| format!("--state-dir {}", args.state_dir.display()))?;
    let at = |name: &str| args.state_dir.join(name);
    let unix = |name: &str| Endpoint::Unix(args.state_dir.join(name));
    let readiness = Readiness::default();
    let starting = readiness.wait_for("components");
    let mut registry = prometheus_client::registry::Registry::default();
    let network = match &args.network {
        Some(n) => n.clone(),
        None => NetworkId::new(args.cluster.as_str())?,
    };
    let transports: Vec<Transport> = args
        .transport
        .iter()
        .map(|t| match t {
            TransportFlag::Tcp => Transport::Tcp,
            TransportFlag::Quic => Transport::Quic,
        })
        .collect();
    let preferred = transports.first().copied().unwrap_or(Transport::Tcp);
    let internal =
        if args.gateway_internal.is_empty() { &args.gateway_address } else { &args.gateway_internal };

    let citadel = Citadel::start(CitadelOptions {
        trust_domain: args.trust_domain.clone(),
        cluster: args.cluster.clone(),
        state_dir: args.state_dir.clone(),
        socket: at(socket::CITADEL),
        workload_ttl: Duration::from_secs(args.workload_ttl_hours * 3600),
        audit_keep: args.audit_keep,
        kubernetes: args.kubernetes.options(),
        secrets: args
            .account_secrets
            .clone()
            .map(|dir| SecretsOptions { dir, accounts: args.account_secret.clone() }),
    })?;
    let mut dns = vec![
        "control-plane.flotilla-system.svc".to_owned(),
        format!("federation.{}.clusterset.local", args.cluster),
        format!("join.{}.clusterset.local", args.cluster),
    ];
    // gRPC libraries verify what they dialled, and their bootstrap has no word for another name.
    if !args.xds.ip().is_unspecified() {
        dns.push(args.xds.ip().to_string());
    }
    let (secrets, _renewal) = citadel.control_plane_secrets(dns);
    let (ca_health, _probing) = citadel.probing(Duration::from_secs(args.ca_probe_interval));

    let federation = Federation::start(
        FederationOptions {
            cluster: args.cluster.clone(),
            network: network.clone(),
            gateways: args
                .gateway_address
                .iter()
                .map(|a| GatewayAddress { address: *a, weight: 1 })
                .collect(),
            transports,
            listen: args.federation,
            via: args.gateway_via,
            state_dir: args.state_dir.clone(),
            socket: at(socket::FEDERATION),
            authority_socket: at(socket::CITADEL),
            exports: unix(socket::PILOT),
            debug_socket: Some(at(socket::DEBUG)),
            declarations: Some(unix(socket::GALLEY)),
            endpoints: args.bundle.endpoints(),
            refresh_hint: Duration::from_secs(args.bundle_refresh_hint),
            renew_within: Duration::from_secs(args.renew_within),
        },
        secrets.clone(),
    )
    .await?;

    let mut tasks = JoinSet::new();
    // Routes may name hosts that only peers have; those kept from before must be known before galley
    // reads the configuration, or it would withhold such routes.
    let imports = ConfigClient::start(
        unix(socket::FEDERATION),
        NodeInfo::component("galley"),
        &[type_url::IMPORTED_SERVICE],
    );
    let mut first = imports.watch();
    let _ = tokio::time::timeout(Duration::from_secs(3), first.wait_for(|s| s.synced)).await;
    let consul = args.consul.start(&args.state_dir)?;
    let registered = consul.as_ref().map(|c| c.watch());
    if let Some(c) = &consul {
        c.first().await;
    }
    let (hosts_tx, hosts) = watch::channel(known_hosts(&imports, registered.as_ref()));
    tasks.spawn(follow_known_hosts(imports, registered, hosts_tx));
    let mut options = GalleyOptions::new(args.config.clone(), Some(Listen::Unix(at(socket::GALLEY))));
    options.extra_hosts = Some(hosts);
    let galley = Galley::start(options).await?;
    galley.register_metrics(&mut registry);

    let pilot = Pilot::start(PilotOptions {
        settings: Settings {
            cluster: args.cluster.clone(),
            network,
            trust_domain: args.trust_domain.clone(),
            east_west: internal.clone(),
            reachable: !args.gateway_address.is_empty(),
            federation_address: Some(args.federation_address.unwrap_or_else(|| federation.address())),
            transport: preferred,
        },
        galley: unix(socket::GALLEY),
        federation: Some(unix(socket::FEDERATION)),
        consul,
        export_socket: Some(at(socket::PILOT)),
        state_dir: Some(args.state_dir.clone()),
    })
    .with_context(|| at(socket::PILOT).display().to_string())?;
    pilot.register_metrics(&mut registry);

    let mixer = mixer::Mixer::start(mixer::MixerOptions::new(unix(socket::GALLEY)))?;

    // Proxies.
    let tls = server_tls(&secrets, &args.trust_domain)?;
    let ends = later(secrets.revocations().ends());
    let listener = TcpListener::bind(args.xds).await.with_context(|| format!("--xds {}", args.xds))?;
    let server = grpc()
        .add_service(pilot.ads_service())
        .add_service(pilot.link_service())
        .add_service(pilot.trust_service())
        .add_service(pilot.registration_service())
        .add_service(citadel.certificate_service())
        .add_service(citadel.legacy_certificate_service())
        .serve_with_incoming(conn::tls(listener, tls.clone(), Some(ends.clone())));
    tasks.spawn(async move { report("xDS", server.await) });
    if let Some(address) = args.xds_plaintext {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("--xds-plaintext {address}"))?;
        let server = grpc().add_service(pilot.ads_service()).serve_with_incoming(conn::tcp(listener));
        tasks.spawn(async move { report("plaintext xDS", server.await) });
    }
    let listener = TcpListener::bind(args.mixer).await.with_context(|| format!("--mixer {}", args.mixer))?;
    let server =
        grpc().add_service(mixer.service()).serve_with_incoming(conn::tls(listener, tls, Some(ends)));
    tasks.spawn(async move { report("mixer", server.await) });

    // Operators: debug pages on a private socket, readiness and metrics on a port.
    let debug = axum::Router::new()
        .nest("/pilot", pilot.debug_router())
        .nest("/galley", galley.debug_router())
        .nest("/mixer", mixer.metrics_router());
    let debug_socket =
        conn::bind_unix(&at(socket::DEBUG)).with_context(|| at(socket::DEBUG).display().to_string())?;
    tasks.spawn(async move {
        if let Err(error) = axum::serve(debug_socket, debug).await {
            tracing::error!(%error, "debug socket ended");
        }
    });
    let mut configured = pilot.ready();
    let waiting = readiness.wait_for("configuration");
    tasks.spawn(async move {
        let _ = configured.wait_for(|r| *r).await;
        drop(waiting);
    });
    registry.register_collector(Box::new(CaSigns(ca_health.clone())));
    let pages = ready_router(readiness.clone())
        .merge(metrics_router(Arc::new(registry)))
        .route("/healthz/ca", axum::routing::get(move || ca_page(ca_health.clone())));
    serve(args.metrics, pages).await.with_context(|| format!("--metrics {}", args.metrics))?;
    tracing::info!(cluster = %args.cluster, xds = %args.xds, "control plane is up");
    drop(starting);

    stop.cancelled().await;
    tracing::info!("stopping");
    pilot.shutdown().await;
    Ok(())
}

/// For a liveness probe: a CA that cannot sign may be better after a restart, one without a mesh is not.
async fn ca_page(health: watch::Receiver<Health>) -> (StatusCode, String) {
    match &*health.borrow() {
        Health::Signs => (StatusCode::OK, "signs\n".into()),
        Health::Idle => (StatusCode::OK, "in no mesh\n".into()),
        Health::Fails(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

/// `citadel_ca_signs`: 1 or 0, absent while the cluster is in no mesh.
#[derive(Debug)]
struct CaSigns(watch::Receiver<Health>);

impl Collector for CaSigns {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let signs = match &*self.0.borrow() {
            Health::Idle => return Ok(()),
            Health::Signs => 1,
            Health::Fails(_) => 0,
        };
        let help = "Whether the CA signed a request and what it signed was verified, when last asked";
        let gauge = ConstGauge::new(signs);
        gauge.encode(encoder.encode_descriptor("citadel_ca_signs", help, None, MetricType::Gauge)?)
    }
}

fn grpc() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(1024)
}

fn report(what: &str, result: Result<(), tonic::transport::Error>) {
    if let Err(error) = result {
        tracing::error!(%error, what, "server ended");
    }
}

/// TLS for proxies: a client certificate if they have one, since the first request of a workload is
/// for its certificate. Of the own trust domain, whomever that is federated with.
fn server_tls(secrets: &SecretStore, own: &TrustDomain) -> anyhow::Result<Arc<rustls::ServerConfig>> {
    Ok(secrets.server_config(&DownstreamTls {
        certificate: SecretRef::Sds(WORKLOAD_SVID.into()),
        client_certificate: ClientCertificate::Optional(Validation {
            trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
            sans: vec![StringMatch::prefix(format!("spiffe://{own}/"))],
            crl: None,
        }),
        alpn: vec!["h2".into()],
        min_version: TlsVersion::V1_3,
        options: TlsServerOptions::default(),
    })?)
}

/// Hosts that no document defines: those that peers provide, and Consul's.
fn known_hosts(
    imports: &ConfigClient,
    consul: Option<&watch::Receiver<Arc<Services>>>,
) -> Arc<BTreeSet<String>> {
    let mut set = consul.map(|c| c.borrow().hosts()).unwrap_or_default();
    for (_, doc) in imports.state().of(type_url::IMPORTED_SERVICE) {
        if let Ok(i) = doc.spec::<ImportedService>() {
            let (name, ns) = (&i.service.name, &i.service.namespace);
            set.insert(i.service.host.clone());
            set.insert(format!("{name}.{ns}.svc.cluster.local"));
            set.insert(format!("{name}.{ns}.svc.clusterset.local"));
            set.insert(format!("{name}.{ns}.global"));
        }
    }
    Arc::new(set)
}

async fn follow_known_hosts(
    imports: ConfigClient,
    mut consul: Option<watch::Receiver<Arc<Services>>>,
    hosts: watch::Sender<Arc<BTreeSet<String>>>,
) {
    let mut state = imports.watch();
    loop {
        let registered = async {
            match &mut consul {
                Some(c) => c.changed().await,
                None => std::future::pending().await,
            }
        };
        // Both are cancel-safe. What ends only does so with the process.
        let changed = tokio::select! {
            r = state.changed() => r,
            r = registered => r,
        };
        if changed.is_err() {
            return;
        }
        state.borrow_and_update();
        if let Some(c) = &mut consul {
            c.borrow_and_update();
        }
        let set = known_hosts(&imports, consul.as_ref());
        hosts.send_if_modified(|old| {
            let changed = *old != set;
            if changed {
                *old = set;
            }
            changed
        });
    }
}
