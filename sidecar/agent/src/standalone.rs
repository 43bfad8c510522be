//! An engine that executes a bootstrap file instead of being a member of the mesh.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use mesh_identity::SecretStore;
use mesh_proxy::{ConfigSnapshot, Engine, EngineOptions, Hooks};
use mesh_runtime::{
    admin::{metrics_router, ready_router, serve},
    ready::Readiness,
};
use mesh_xds::{
    bootstrap::Bootstrap,
    client::proxy::{ClientHealth, ProxyState},
    codec::{Secret, SecretKind},
};
use prometheus_client::registry::Registry;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::admin::{AdminState, router};

/// What a bootstrap file does not say.
pub struct StandaloneOptions {
    /// Worker threads, at least 1.
    pub workers: usize,
    /// How long connections may finish after SIGTERM, and on what a change removes.
    pub drain: Duration,
    /// What is plugged into the engine.
    pub hooks: Hooks,
}

/// A running engine with its admin pages. Dropping it stops everything at once.
pub struct Standalone {
    engine: Arc<Engine>,
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
        for warning in &bootstrap.warnings {
            tracing::warn!(file = %file.display(), "{warning}");
        }
        let store = SecretStore::new();
        for secret in &bootstrap.secrets {
            keep(&store, secret).with_context(|| format!("{}: static_resources.secrets", file.display()))?;
        }
        let mut registry = Registry::default();
        let node = &bootstrap.node;
        let engine = Engine::start(
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
            },
            store.clone(),
            &mut registry,
            options.hooks,
        )?;
        let engine = Arc::new(engine);
        let readiness = Readiness::default();
        let configured = readiness.wait_for("configuration");
        let state = Arc::new(bootstrap.resources);
        let report = engine.apply(snapshot(&state));
        if let Some((kind, name, reason)) = report.rejected.first() {
            bail!("{}: {kind} {name:?}: {reason}", file.display());
        }
        drop(configured);

        let mut tasks = Vec::new();
        if let Some(address) = bootstrap.admin {
            let (_, state) = watch::channel(state);
            let (_, health) = watch::channel(ClientHealth::default());
            let (_, report) = watch::channel(Arc::new(report));
            let (_, identity) = watch::channel(String::new());
            let pages = router(AdminState { engine: engine.clone(), state, health, report, identity, store })
                .merge(ready_router(readiness))
                .merge(metrics_router(Arc::new(registry)));
            let (address, task) =
                serve(address, pages).await.with_context(|| format!("admin.address {address}"))?;
            tracing::info!(%address, "admin pages");
            tasks.push(task);
        }
        Ok(Self { engine, drain: options.drain, tasks })
    }

    /// Runs until `stop`, then lets connections finish for the drain time.
    pub async fn run(self, stop: CancellationToken) {
        stop.cancelled().await;
        tracing::info!(seconds = self.drain.as_secs(), "draining");
        self.engine.drain(self.drain).await;
    }
}

fn snapshot(state: &ProxyState) -> ConfigSnapshot {
    ConfigSnapshot {
        listeners: state.listeners.clone(),
        routes: state.routes.clone(),
        clusters: state.clusters.clone(),
        endpoints: state.endpoints.clone(),
    }
}

fn keep(store: &SecretStore, secret: &Secret) -> anyhow::Result<()> {
    match &secret.kind {
        SecretKind::Certificate { chain, key } => store.set_identity(&secret.name, chain, key)?,
        SecretKind::Roots(pem) => store.set_trust(&secret.name, pem)?,
    }
    Ok(())
}
