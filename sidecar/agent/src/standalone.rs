//! An engine that executes a bootstrap file instead of being a member of the mesh: what the file says, and what the
//! control plane says that the file names.

mod control;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use mesh_identity::SecretStore;
use mesh_proxy::{ConfigSnapshot, Engine, EngineOptions, Hooks};
use mesh_runtime::{
    admin::{metrics_router, ready_router, serve},
    ready::Readiness,
};
use mesh_xds::{
    ClientOptions,
    bootstrap::Bootstrap,
    client::proxy::{ClientHealth, Fixed, ProxyClient, ProxyClientOptions, SecretSink as _},
};
use prometheus_client::registry::Registry;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use self::control::Secrets;
use crate::{
    admin::{AdminState, router},
    agent::apply,
};

/// What a bootstrap file does not say.
pub struct StandaloneOptions {
    /// Worker threads, at least 1.
    pub workers: usize,
    /// How long connections may finish after SIGTERM, and on what a change removes.
    pub drain: Duration,
    /// Where the control plane's last configuration is kept, so that a restart does not need it.
    pub state_dir: Option<PathBuf>,
    /// What is plugged into the engine.
    pub hooks: Hooks,
}

/// A running engine with its admin pages. Dropping it stops everything at once.
pub struct Standalone {
    engine: Arc<Engine>,
    _client: Option<ProxyClient>,
    drain: Duration,
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
        let engine = Arc::new(Engine::start(
            engine_options(&bootstrap, &options),
            store.clone(),
            &mut registry,
            options.hooks,
        )?);
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
                });
                let (state, health) = (client.state(), client.health());
                tasks.push(tokio::spawn(apply(
                    state.clone(),
                    health.clone(),
                    engine.clone(),
                    reports,
                    configured,
                )));
                (Some(client), state, health)
            }
        };
        if let Some(address) = bootstrap.admin {
            let (_, identity) = watch::channel(String::new());
            let pages = router(AdminState { engine: engine.clone(), state, health, report, identity, store })
                .merge(ready_router(readiness))
                .merge(metrics_router(Arc::new(registry)));
            let (address, task) =
                serve(address, pages).await.with_context(|| format!("{shown}: admin.address {address}"))?;
            tracing::info!(%address, "admin pages");
            tasks.push(task);
        }
        Ok(Self { engine, _client: client, drain: options.drain, tasks })
    }

    /// Runs until `stop`, then lets connections finish for the drain time.
    pub async fn run(self, stop: CancellationToken) {
        stop.cancelled().await;
        tracing::info!(seconds = self.drain.as_secs(), "draining");
        self.engine.drain(self.drain).await;
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
