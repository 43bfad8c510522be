//! `flotilla dns`: the mesh's names for a whole cluster.
//!
//! It is a workload of the mesh like a sidecar: it proves itself to the CA with its token, and the control plane sends
//! it the name table alone. It answers from the last table when the control plane is away, also after a restart if it
//! has a state directory; before the first table it denies nothing.

mod args;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Context;
pub(crate) use args::DnsArgs;
use mesh_agent::{Renewal, SvidOptions, control_plane, mesh_root};
use mesh_dns::{ClusterOptions, ClusterServer, Metrics, Names};
use mesh_identity::{SecretStore, WORKLOAD_SVID};
use mesh_runtime::{
    admin::{metrics_router, ready_router, serve},
    ready::Readiness,
};
use mesh_xds::{
    ClientOptions, NodeKind,
    client::{
        Mode,
        proxy::{ClientHealth, Fixed, ProxyClient, ProxyClientOptions, SecretSink},
    },
    codec::Secret,
    nds::NameTable,
    process::ProcessSettings,
};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use sidecar::names::{Audience, follow};
use tokio::{sync::watch, task::JoinSet};

/// Questions in flight when it ends have this long: as long as forwarded ones may take.
const LAST_ANSWERS: Duration = Duration::from_secs(4);

/// Runs until SIGTERM or SIGINT, then goes on answering for the drain time while it is not ready.
pub(crate) async fn run(args: DnsArgs) -> anyhow::Result<()> {
    let DnsArgs { proxy, listen, upstream } = args;
    mesh_runtime::confine(proxy.run_as, &proxy.rights())?;
    let _tracing = mesh_telemetry::trace::init_tracing("flotilla-dns", None, false)?;
    let stop = mesh_runtime::shutdown::on_signal()?;
    // Checked before anything waits.
    let (identity, node) = (proxy.identity()?, proxy.node(NodeKind::Sidecar)?);
    // It is no proxy: the mesh's settings of these are not for it.
    let process = proxy.process(&ProcessSettings::default());
    let store = SecretStore::new();
    let endpoint = control_plane(&proxy, &proxy.discovery, &store)?;

    let mut registry = Registry::default();
    let metrics = Metrics::new();
    metrics.register(&mut registry);
    let (connected, known) = (Gauge::<i64>::default(), Gauge::<i64>::default());
    registry.register("flotilla_dns_connected", "Whether a control plane is connected", connected.clone());
    registry.register("flotilla_dns_names", "Names in the table", known.clone());

    let (tables, from_client) = watch::channel(Arc::<NameTable>::default());
    let (names, following) = follow(from_client, Audience::Cluster);
    let server = ClusterServer::start(ClusterOptions {
        listen,
        workers: process.concurrency,
        upstreams: upstream,
        names: names.clone(),
        metrics,
    })
    .await?;
    let readiness = Readiness::default();
    let waiting = readiness.wait_for("names");
    let mut tasks = JoinSet::new();
    let (_, ready_page) = serve(process.readiness, ready_router(readiness.clone()))
        .await
        .with_context(|| format!("--readiness {}", process.readiness))?;
    let pages = ready_router(readiness.clone()).merge(metrics_router(Arc::new(registry)));
    let (_, metrics_page) =
        serve(proxy.metrics, pages).await.with_context(|| format!("--metrics {}", proxy.metrics))?;
    tracing::info!(listen = ?server.addresses(), upstreams = ?server.upstreams(), "answering");

    tasks.spawn(ready_with_names(names, waiting, known));
    // Foreign names are answered from the start, whatever the rest waits for.
    let member = async {
        let root = mesh_root(&proxy).await?;
        store.set_mesh_trust(&proxy.trust_domain, &root)?;
        let renewal = Renewal::new(
            SvidOptions {
                endpoint: endpoint.clone(),
                identity,
                token_file: proxy.token_file.clone(),
                root,
                state_dir: proxy.state_dir.clone(),
            },
            store.clone(),
        );
        let roots = renewal.roots();
        tasks.spawn(renewal.run());
        let cache = proxy.state_dir.as_ref().map(|d| d.join("xds.cache"));
        // As a sidecar does: without a certificate it would be sent away.
        let mut have = store.subscribe();
        while !cache.as_ref().is_some_and(|c| c.exists()) && !store.has_identity(WORKLOAD_SVID) {
            have.changed().await.context("the secret store is gone")?;
        }
        let client = ProxyClient::start(ProxyClientOptions {
            client: ClientOptions { endpoint, node: node.clone(), mode: Mode::Delta },
            cache,
            name_table: true,
            // Names alone.
            fixed: Some(Fixed {
                resources: Arc::default(),
                clusters: false,
                listeners: false,
                secret_names: BTreeSet::new(),
                secrets: Arc::new(NoSecrets),
            }),
            on_demand: Default::default(),
        });
        tasks.spawn(roots.clone().follow(client.bundles()));
        tasks.spawn(roots.report(client.connection(), node, Duration::ZERO, || true));
        tasks.spawn(pass_on(client.names(), tables));
        tasks.spawn(show(client.health(), connected));
        anyhow::Ok(client)
    };
    let client = tokio::select! {
        client = member => Some(client?),
        () = stop.cancelled() => None,
    };
    stop.cancelled().await;
    // Whoever asks here is told to ask elsewhere, and is answered until it does.
    let _leaving = readiness.wait_for("nothing: it is stopping");
    tracing::info!(seconds = process.drain.as_secs(), "draining");
    tokio::time::sleep(process.drain).await;
    server.stop(LAST_ANSWERS).await;
    drop(client);
    for task in [following, ready_page, metrics_page] {
        task.abort();
    }
    Ok(())
}

async fn ready_with_names(
    mut names: watch::Receiver<Arc<Names>>,
    waiting: mesh_runtime::ready::ReadyGuard,
    known: Gauge<i64>,
) {
    let mut waiting = Some(waiting);
    loop {
        let table = names.borrow_and_update().clone();
        known.set(i64::try_from(table.len()).unwrap_or(i64::MAX));
        if table.is_known() && waiting.take().is_some() {
            tracing::info!(names = table.len(), "the name table is there");
        }
        if names.changed().await.is_err() {
            return;
        }
    }
}

/// Hands on what has come; what a client has before anything came is nothing.
async fn pass_on(mut from: watch::Receiver<Arc<NameTable>>, to: watch::Sender<Arc<NameTable>>) {
    let kept = from.borrow_and_update().clone();
    if !kept.table.is_empty() {
        to.send_replace(kept);
    }
    while from.changed().await.is_ok() {
        let table = from.borrow_and_update().clone();
        to.send_replace(table);
    }
}

async fn show(mut health: watch::Receiver<ClientHealth>, connected: Gauge<i64>) {
    loop {
        connected.set(i64::from(health.borrow_and_update().connected));
        if health.changed().await.is_err() {
            return;
        }
    }
}

/// Names need none.
struct NoSecrets;

impl SecretSink for NoSecrets {
    fn take(&self, _: &Secret) -> Result<(), String> {
        Err("a resolver has no use for secrets".into())
    }

    fn has(&self, _: &str) -> bool {
        false
    }
}
