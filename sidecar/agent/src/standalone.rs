//! An engine that executes a bootstrap file instead of being a member of the mesh: what the file says, and what the
//! control plane says that the file names.

mod control;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use anyhow::{Context, bail};
use mesh_identity::SecretStore;
use mesh_proxy::{ConfigSnapshot, Engine, EngineOptions, Hooks};
use mesh_runtime::{
    admin::{metrics_router, ready_router},
    handover::Leave,
    ready::Readiness,
};
use mesh_xds::{
    ClientOptions,
    bootstrap::Bootstrap,
    client::proxy::{
        ClientHealth, Fixed, ProxyClient, ProxyClientOptions, SecretSink as _, on_demand::OnDemandNames,
    },
    process::ProcessSettings,
};
use prometheus_client::registry::Registry;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use self::control::Secrets;
use crate::{
    admin::{AdminState, router},
    agent::apply,
    on_demand::{Asking, Figures},
    restart::{Restart, until_the_end},
};

/// What a bootstrap file does not say.
pub struct StandaloneOptions {
    /// Worker threads, at least 1.
    pub workers: usize,
    /// How long connections may finish after SIGTERM, and on what a change removes.
    pub drain: Duration,
    /// Where the control plane's last configuration is kept, so that a restart does not need it.
    pub state_dir: Option<PathBuf>,
    /// Names that traffic may make it ask the control plane for.
    pub max_on_demand: usize,
    /// What is plugged into the engine.
    pub hooks: Hooks,
    /// Whom it replaces, and by whom it may be replaced.
    pub restart: Restart,
}

/// A running engine with its admin pages. Dropping it stops everything at once.
pub struct Standalone {
    engine: Arc<Engine>,
    _client: Option<ProxyClient>,
    drain: Duration,
    left: oneshot::Receiver<(Leave, Duration)>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Standalone {
    fn drop(&mut self) {
        for t in &self.tasks {
            t.abort();
        }
    }
}

impl Standalone {
    /// Reads the file and starts what it describes. Blocks while it does: nothing else runs yet.
    ///
    /// # Errors
    /// A file that cannot be read or honoured, resources that the engine refuses, addresses that cannot be bound.
    pub async fn start(file: &Path, options: StandaloneOptions) -> anyhow::Result<Self> {
        let bootstrap = Bootstrap::load(file)?;
        let shown = file.display();
        for warning in &bootstrap.warnings {
            tracing::warn!(file = %shown, "{warning}");
        }
        let store = SecretStore::new();
        let secrets = Arc::new(Secrets(store.clone()));
        let mut secret_names = BTreeSet::new();
        for secret in &bootstrap.secrets {
            let taken = secrets.take(secret);
            taken
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("{shown}: static_resources.secrets"))?;
            secret_names.insert(secret.name.clone());
        }
        let mut registry = Registry::default();
        let on_demand = OnDemandNames::new(options.max_on_demand);
        let mut hooks = options.hooks.clone();
        if bootstrap.dynamic.is_some() {
            registry.register_collector(Box::new(Figures(on_demand.clone())));
            hooks.on_demand = Some(Arc::new(Asking(on_demand.clone())));
        }
        let engine = Arc::new(Engine::start(
            engine_options(&bootstrap, &options),
            store.clone(),
            &mut registry,
            hooks,
        )?);
        options.restart.equip(&engine);
        let readiness = Readiness::default();
        let configured = readiness.wait_for("configuration");
        let resources = Arc::new(bootstrap.resources);
        let report = engine.apply(ConfigSnapshot {
            listeners: resources.listeners.clone(),
            routes: resources.routes.clone(),
            clusters: resources.clusters.clone(),
            endpoints: resources.endpoints.clone(),
        });
        if let Some((kind, name, reason)) = report.rejected.first() {
            bail!("{shown}: {kind} {name:?}: {reason}");
        }

        let mut tasks = Vec::new();
        let reports = watch::Sender::new(Arc::new(report));
        let report = reports.subscribe();
        let (client, state, health) = match bootstrap.dynamic {
            None => {
                drop(configured);
                (None, watch::channel(resources).1, watch::channel(ClientHealth::default()).1)
            }
            Some(dynamic) => {
                let endpoint = control::endpoint(&resources, &dynamic.cluster, &store)
                    .with_context(|| format!("{shown}: dynamic_resources.ads_config"))?;
                tracing::info!(server = %endpoint, mode = ?dynamic.mode, "control plane");
                let client = ProxyClient::start(ProxyClientOptions {
                    client: ClientOptions { endpoint, node: bootstrap.node, mode: dynamic.mode },
                    cache: options.state_dir.map(|d| d.join("xds.cache")),
                    name_table: false,
                    fixed: Some(Fixed {
                        resources,
                        clusters: dynamic.clusters,
                        listeners: dynamic.listeners,
                        secret_names,
                        secrets,
                    }),
                    on_demand: on_demand.clone(),
                });
                let (state, health) = (client.state(), client.health());
                tasks.push(tokio::spawn(apply(
                    state.clone(),
                    health.clone(),
                    engine.clone(),
                    reports,
                    configured,
                    on_demand,
                    None,
                )));
                (Some(client), state, health)
            }
        };
        let mut served = vec![];
        if let Some(address) = bootstrap.admin {
            let (_, identity) = watch::channel(String::new());
            let pages = router(AdminState { engine: engine.clone(), state, health, report, identity, store })
                .merge(ready_router(readiness.clone()))
                .merge(metrics_router(Arc::new(registry)));
            let listener = options
                .restart
                .tcp("admin", address)
                .with_context(|| format!("{shown}: admin.address {address}"))?;
            tracing::info!(address = %listener.local_addr()?, "admin pages");
            served.push((listener, pages));
        }
        let (serving, left) = options.restart.serve(
            engine.clone(),
            readiness,
            served,
            watch::channel(ProcessSettings::default()).1,
        );
        tasks.push(serving);
        Ok(Self { engine, _client: client, drain: options.drain, left, tasks })
    }

    /// Runs until `stop`, or until another process has taken over, then lets connections finish.
    pub async fn run(mut self, stop: CancellationToken) {
        // What is received belongs to the one run of this process.
        let left = std::mem::replace(&mut self.left, oneshot::channel().1);
        // Nobody is told of the end of a proxy that no mesh knows.
        until_the_end(&self.engine, left, &AtomicBool::default(), stop, || self.drain).await;
    }
}

fn engine_options(bootstrap: &Bootstrap, options: &StandaloneOptions) -> EngineOptions {
    let node = &bootstrap.node;
    EngineOptions {
        workers: options.workers,
        node: mesh_proxy::NodeInfo {
            workload: node.id.clone(),
            namespace: node.meta("NAMESPACE").unwrap_or_default().to_owned(),
            cluster: node.cluster.clone(),
            id: node.id.clone(),
            ..mesh_proxy::NodeInfo::default()
        },
        drain_time: options.drain,
        ..EngineOptions::default()
    }
}
