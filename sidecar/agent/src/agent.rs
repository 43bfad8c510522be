//! The running whole: certificate, configuration, engine, admin pages.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context;
use mesh_identity::{ForeignTrust, SecretStore, TRUST_BUNDLE, WORKLOAD_SVID};
use mesh_model::{
    SpiffeId,
    federation::ForeignBundle,
    proxy::{SecretRef, StringMatch, UpstreamTls, Validation},
};
use mesh_proxy::{ApplyReport, ConfigSnapshot, Deliveries, Engine, EngineOptions, Hooks};
use mesh_runtime::{
    admin::{metrics_router, ready_router, serve_on},
    handover::Leave,
    ready::{Readiness, ReadyGuard},
};
use mesh_xds::{
    ClientOptions, Endpoint, NodeInfo, NodeKind,
    client::{
        Connection, Mode,
        proxy::{ProxyClient, ProxyClientOptions, ProxyState, on_demand::OnDemandNames},
    },
    nds::NameTable,
    process::ProcessSettings,
};
use prometheus_client::registry::Registry;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    MixerHook, ProxyArgs,
    admin::{AdminState, router},
    on_demand::{Asking, Figures},
    process::{self, Known, Process},
    restart::{Restart, until_the_end},
    svid::{Renewal, SvidOptions},
    trust::Roots,
};

/// What a sidecar or gateway adds to the common flags.
pub struct AgentOptions {
    /// Flags.
    pub args: ProxyArgs,
    /// Sidecar or router.
    pub kind: NodeKind,
    /// What it plugs into the engine.
    pub hooks: Hooks,
    /// Whether it wants the mesh's name table.
    pub name_table: bool,
    /// Metrics registered so far, such as those of the hooks.
    pub registry: Registry,
    /// Whom it replaces, and by whom it may be replaced.
    pub restart: Restart,
    /// Mixer, to be asked and told by the engine.
    pub mixer: MixerHook,
    /// Secrets, if the caller needs them before the engine starts.
    pub store: Arc<SecretStore>,
    /// Further pages of the admin port.
    pub pages: axum::Router,
}

/// A data-plane process's inner life. Dropping it stops everything at once; [`Agent::run`] ends it
/// gracefully.
pub struct Agent {
    engine: Arc<Engine>,
    client: Arc<ProxyClient>,
    node: NodeInfo,
    args: Arc<ProxyArgs>,
    settings: watch::Receiver<ProcessSettings>,
    left: oneshot::Receiver<(Leave, Duration)>,
    replaced: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        for t in &self.tasks {
            t.abort();
        }
    }
}

/// SPIFFE ID of every control plane of a trust domain.
#[must_use]
pub fn control_plane_id(args: &ProxyArgs) -> String {
    format!("spiffe://{}/ns/flotilla-system/sa/control-plane", args.trust_domain)
}

/// Server name that control planes answer to.
pub const CONTROL_PLANE_NAME: &str = "control-plane.flotilla-system.svc";

/// The root certificate of the mesh, PEM. Waits for the file: a cluster that has yet to join its mesh
/// has no root, and its proxies need not be started again when it has.
///
/// # Errors
/// If the file is there and cannot be read.
pub async fn mesh_root(args: &ProxyArgs) -> anyhow::Result<Vec<u8>> {
    let mut waited = false;
    loop {
        match std::fs::read(&args.root_cert) {
            Ok(root) => return Ok(root),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                if !waited {
                    tracing::info!(path = %args.root_cert.display(), "waiting for the mesh's root certificate");
                    waited = true;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(e) => return Err(e).context(format!("--root-cert {}", args.root_cert.display())),
        }
    }
}

/// The control plane as a TLS peer: any control plane of this trust domain, at `address`
/// (`host:port`), approached with the workload's certificate as soon as the store has one.
///
/// # Errors
/// If the store cannot make a TLS configuration.
pub fn control_plane(args: &ProxyArgs, address: &str, store: &SecretStore) -> anyhow::Result<Endpoint> {
    let san = control_plane_id(args);
    let server_name = CONTROL_PLANE_NAME;
    let config = store.client_config(&UpstreamTls {
        certificate: Some(SecretRef::Sds(WORKLOAD_SVID.into())),
        validation: Validation {
            trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
            sans: vec![StringMatch::exact(san)],
            crl: None,
        },
        sni: server_name.into(),
        by_name: false,
        alpn: vec!["h2".into()],
    })?;
    Ok(Endpoint::Tls { address: address.to_owned(), server_name: server_name.into(), config })
}

impl Agent {
    /// Starts everything; traffic flows as soon as certificate and configuration have arrived.
    ///
    /// # Errors
    /// Flags that are not valid, files that cannot be read, addresses that cannot be bound.
    pub async fn start(options: AgentOptions) -> anyhow::Result<Self> {
        let AgentOptions {
            args,
            kind,
            hooks,
            name_table,
            mut registry,
            restart,
            mixer,
            store,
            pages: further,
        } = options;
        let (mixer, args) = (Arc::new(mixer), Arc::new(args));
        let mut tasks = Vec::new();
        let page =
            |role: &str, address| restart.tcp(role, address).with_context(|| format!("--{role} {address}"));
        let readiness = Readiness::default();
        let svid = readiness.wait_for("certificate");
        let configured = readiness.wait_for("configuration");
        let cache = args.state_dir.as_ref().map(|d| d.join("xds.cache"));
        let known = Known::begin(&args, cache.as_deref())?;
        let node = args.node(kind)?;
        let identity = args.identity()?;
        let endpoint = control_plane(&args, &args.discovery, &store)?;
        let on_demand = OnDemandNames::new(args.limits.max_on_demand);
        let connecting = connect(
            args.clone(),
            Connecting {
                endpoint,
                node: node.clone(),
                identity: identity.clone(),
                store: store.clone(),
                cache,
                name_table,
                on_demand: on_demand.clone(),
            },
            known,
            svid,
        );
        let mut connecting = Box::pin(connecting);
        // Whoever waits for this proxy is told what it waits for as soon as it is known where he asks.
        let early = if known.is_enough() || args.readiness.is_some() {
            None
        } else {
            tokio::time::timeout(process::WAIT, &mut connecting).await.ok().transpose()?
        };
        let at = early.as_ref().map_or(known, |c| c.known);
        let readiness_address = args.process(&at.settings()).readiness;
        let mut pages = vec![(page("readiness", readiness_address)?, ready_router(readiness.clone()))];
        if !restart.takes_over() {
            for (listener, router) in pages.drain(..) {
                tasks.push(serve_on(listener, router)?.1);
            }
        }
        let Connected { client, roots, identity_status, known, tasks: connected } = match early {
            Some(c) => c,
            None => connecting.await?,
        };
        tasks.extend(connected);
        let runs = Process { readiness: readiness_address, ..args.process(&known.settings()) };
        tracing::debug!(?runs, "process");

        registry.register_collector(Box::new(Figures(on_demand.clone())));
        let hooks = Hooks {
            on_demand: Some(Arc::new(Asking(on_demand.clone()))),
            policy: Some(mixer.clone()),
            ..hooks
        };
        let engine = Engine::start(
            EngineOptions {
                workers: runs.concurrency,
                node: mesh_proxy::NodeInfo {
                    workload: args.workload.clone(),
                    namespace: args.namespace.clone(),
                    cluster: args.cluster.to_string(),
                    service_account: args.service_account.clone(),
                    principal: identity.to_string(),
                    labels: args.label_map()?,
                    id: node.id.clone(),
                    gateway: kind == NodeKind::Router,
                },
                drain_time: runs.drain,
                max_total_connections: runs.max_total_connections,
                ..args.limits.options()
            },
            store.clone(),
            &mut registry,
            hooks,
        )?;
        let engine = Arc::new(engine);
        restart.equip(&engine);

        let saying = watch::Sender::new(known.settings());
        let settings = saying.subscribe();
        tasks.push(tokio::spawn(process::follow(
            args.clone(),
            known,
            runs,
            client.process(),
            saying,
            engine.clone(),
        )));
        tasks.push(tokio::spawn(roots.report(client.connection(), node.clone(), Duration::ZERO, || true)));
        let mut bundles = client.bundles();
        // Those that were kept are there before the first session to another trust domain.
        foreign_trust(&store, &bundles.borrow_and_update());
        let trusting = store.clone();
        tasks.push(tokio::spawn(async move {
            while bundles.changed().await.is_ok() {
                foreign_trust(&trusting, &bundles.borrow_and_update());
            }
        }));
        let reports = watch::Sender::new(Arc::new(ApplyReport::default()));
        let report = reports.subscribe();
        tasks.push(tokio::spawn(apply(
            client.state(),
            client.health(),
            engine.clone(),
            reports,
            configured,
            on_demand,
            Some(mixer),
        )));

        let registry = Arc::new(registry);
        let admin = AdminState {
            engine: engine.clone(),
            state: client.state(),
            health: client.health(),
            report,
            identity: identity_status,
            store,
        };
        let all = router(admin)
            .merge(process::page(args.clone(), runs, settings.clone()))
            .merge(ready_router(readiness.clone()))
            .merge(metrics_router(registry.clone()))
            .merge(further);
        pages.push((page("admin", runs.admin)?, all));
        pages.push((page("metrics", args.metrics)?, metrics_router(registry)));
        let (serving, left) = restart.serve(engine.clone(), readiness, pages, settings.clone());
        tasks.push(serving);
        Ok(Self {
            engine,
            client: Arc::new(client),
            node,
            args,
            settings,
            left,
            replaced: Arc::default(),
            tasks,
        })
    }

    /// The mesh's names, for a resolver.
    #[must_use]
    pub fn names(&self) -> watch::Receiver<Arc<NameTable>> {
        self.client.names()
    }

    /// What the control plane wants this proxy to execute.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<Arc<ProxyState>> {
        self.client.state()
    }

    /// The connection to the control plane, and as whom it is approached.
    #[must_use]
    pub fn control_plane(&self) -> (Connection, NodeInfo) {
        (self.client.connection(), self.node.clone())
    }

    /// The way to the engine's listeners for connections that came by other ways than their sockets.
    #[must_use]
    pub fn deliveries(&self) -> Deliveries {
        self.engine.deliveries()
    }

    /// Tells the control plane of the end while [`Agent::run`] runs.
    #[must_use]
    pub fn farewell(&self) -> Farewell {
        Farewell {
            client: self.client.clone(),
            node: self.node.clone().draining(),
            replaced: self.replaced.clone(),
        }
    }

    /// Runs until `stop`, or until another process has taken over, then lets connections finish for the drain time.
    pub async fn run(mut self, stop: CancellationToken) {
        // What is received belongs to the one run of this agent.
        let left = std::mem::replace(&mut self.left, oneshot::channel().1);
        let drain = || self.args.process(&self.settings.borrow()).drain;
        until_the_end(&self.engine, left, &self.replaced, stop, drain).await;
    }
}

/// What a connection to the control plane is made of.
struct Connecting {
    endpoint: Endpoint,
    node: NodeInfo,
    identity: SpiffeId,
    store: Arc<SecretStore>,
    cache: Option<PathBuf>,
    name_table: bool,
    on_demand: OnDemandNames,
}

/// A client of the control plane, with what is known of the process by then.
struct Connected {
    client: ProxyClient,
    roots: Roots,
    identity_status: watch::Receiver<String>,
    known: Known,
    tasks: Vec<JoinHandle<()>>,
}

/// Gets a certificate, and begins to follow the control plane.
async fn connect(
    args: Arc<ProxyArgs>,
    c: Connecting,
    known: Known,
    svid: ReadyGuard,
) -> anyhow::Result<Connected> {
    let Connecting { endpoint, node, identity, store, cache, name_table, on_demand } = c;
    let mut tasks = Vec::new();
    let root = mesh_root(&args).await?;
    store.set_mesh_trust(&args.trust_domain, &root)?;
    let renewal = Renewal::new(
        SvidOptions {
            endpoint: endpoint.clone(),
            identity,
            token_file: args.token_file.clone(),
            root,
            state_dir: args.state_dir.clone(),
        },
        store.clone(),
    );
    let mut have = store.subscribe();
    let secrets = store.clone();
    tasks.push(tokio::spawn(async move {
        let _waiting = svid;
        while !secrets.has_identity(WORKLOAD_SVID) {
            if have.changed().await.is_err() {
                return;
            }
        }
    }));
    let identity_status = renewal.status();
    let roots = renewal.roots();
    tasks.push(tokio::spawn(renewal.run()));

    // Without a certificate the control plane would only send us away; with a kept configuration the
    // engine starts from it at once, control plane or not.
    let mut have = store.subscribe();
    while !cache.as_ref().is_some_and(|c| c.exists()) && !store.has_identity(WORKLOAD_SVID) {
        have.changed().await.context("the secret store is gone")?;
    }
    let client = ProxyClient::start(ProxyClientOptions {
        client: ClientOptions { endpoint, node, mode: Mode::Delta },
        cache,
        name_table,
        fixed: None,
        on_demand,
    });
    tasks.push(tokio::spawn(roots.clone().follow(client.bundles())));
    let known = known.hear(client.process()).await;
    Ok(Connected { client, roots, identity_status, known, tasks })
}

/// See [`Agent::farewell`].
pub struct Farewell {
    client: Arc<ProxyClient>,
    node: NodeInfo,
    replaced: Arc<AtomicBool>,
}

impl Farewell {
    /// Tells the control plane that this east-west gateway is about to stop, for `limit` at most; whether it has heard.
    /// There is nothing to tell for other proxies, nor once another process serves at this address.
    pub async fn say(&self, limit: Duration) -> bool {
        self.node.is_draining()
            && !self.replaced.load(Relaxed)
            && self.client.set_node(self.node.clone(), limit).await
    }
}

/// Takes the roots of other trust domains, and what is revoked in all, as the control plane tells them.
pub(crate) fn foreign_trust(store: &SecretStore, bundles: &[ForeignBundle]) {
    let trust = bundles.iter().filter(|b| b.own.is_none()).map(|b| ForeignTrust {
        trust_domain: b.trust_domain.clone(),
        roots: b.roots.clone(),
        clusters: (!b.by_bundle).then(|| b.clusters.iter().cloned().collect()),
    });
    if let Err(error) = store.set_foreign_trust(trust.collect()) {
        tracing::error!(%error, "a trust bundle cannot be used: nobody of that trust domain is accepted");
    }
    for b in bundles {
        if let Err(error) = store.set_revoked(&b.trust_domain, &b.roots, &b.revoked) {
            tracing::error!(%error, domain = %b.trust_domain, "a revocation list cannot be used");
        }
    }
}

/// Applies every complete state to the engine.
pub(crate) async fn apply(
    mut states: watch::Receiver<Arc<ProxyState>>,
    health: watch::Receiver<mesh_xds::client::proxy::ClientHealth>,
    engine: Arc<Engine>,
    reports: watch::Sender<Arc<ApplyReport>>,
    configured: ReadyGuard,
    on_demand: OnDemandNames,
    mixer: Option<Arc<MixerHook>>,
) {
    let mut waiting = Some(configured);
    loop {
        let state = states.borrow_and_update().clone();
        // An answer is not a configuration: the one about the process comes before there is any.
        let known = state.revision > 0 && {
            let h = health.borrow();
            h.synced || h.from_cache
        };
        if known {
            // Before the listeners that it is for.
            let said = state.listeners.values().find_map(|l| l.mixer.as_deref());
            match (&mixer, said) {
                (Some(m), said) => m.configure(said),
                (None, Some(m)) if !m.check.is_empty() => {
                    tracing::error!(check = %m.check, "a proxy with a bootstrap file asks no Mixer: its requests are not checked");
                }
                (None, _) => {}
            }
            let snapshot = ConfigSnapshot {
                listeners: state.listeners.clone(),
                routes: state.routes.clone(),
                clusters: state.clusters.clone(),
                endpoints: state.endpoints.clone(),
            };
            let (engine, revision) = (engine.clone(), state.revision);
            // Compiling large tables takes milliseconds; the admin pages need not wait for it.
            match tokio::task::spawn_blocking(move || engine.apply(snapshot)).await {
                Ok(report) => {
                    for (kind, name, reason) in &report.rejected {
                        tracing::warn!(%kind, %name, %reason, "a resource was not applied");
                    }
                    reports.send_replace(Arc::new(report));
                    waiting = None;
                    on_demand.applied(revision);
                }
                Err(error) => tracing::error!(%error, "applying configuration failed"),
            }
        }
        if states.changed().await.is_err() {
            drop(waiting);
            return;
        }
    }
}
