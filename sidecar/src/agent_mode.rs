//! `flotilla agent`: what a proxy that is not ours (Envoy), or a gRPC library without one, needs beside it to be a
//! member of the mesh.
//!
//! The agent proves the workload to the cluster's CA as a Flotilla sidecar would, keeps its
//! certificate fresh, and gives both to the proxy over SDS on a unix socket. It writes the bootstrap
//! with which the proxy finds that socket and the control plane; starting the proxy is the business
//! of whoever starts the agent. Traffic never passes through here, and once the proxy has its
//! secrets the agent may restart without anybody noticing.

mod bootstrap;
mod bundles;
mod grpc;
mod sds;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use mesh_agent::{Process, ProxyArgs, Renewal, SvidOptions, control_plane, mesh_root};
use mesh_identity::SecretStore;
use mesh_runtime::{
    admin::{ready_router, serve},
    files::write_private,
    ready::Readiness,
};
use mesh_xds::{AdsService, NodeKind, server::conn};
use sds::SecretSource;

/// Streams of a proxy end with it; this is for those that are told to.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// A change reaches the proxy's streams within this time, so that what is unanswered then shows.
const SETTLE: Duration = Duration::from_secs(1);

/// Flags of `flotilla agent`. `--admin` and `--metrics` are addresses of the proxy, `--readiness` is
/// the agent's own. `--concurrency` and `--drain-seconds` cannot be said in a bootstrap: the agent
/// shows the command line that says them.
#[derive(Debug, Clone, clap::Args)]
pub struct AgentArgs {
    #[command(flatten)]
    proxy: ProxyArgs,
    /// Unix socket on which the proxy fetches certificate and roots; only this user may connect
    #[arg(long, default_value = "/var/run/flotilla/sds.sock")]
    sds: PathBuf,
    /// Where to write the proxy's bootstrap, JSON
    #[arg(long)]
    write_bootstrap: Option<PathBuf>,
    /// Where to write the bootstrap of a gRPC library that needs no proxy, JSON, for its GRPC_XDS_BOOTSTRAP; it names
    /// certificate, key and roots in --state-dir
    #[arg(long)]
    write_grpc_bootstrap: Option<PathBuf>,
    /// What the proxy is
    #[arg(long, value_enum, default_value_t)]
    kind: Kind,
}

/// Kind of proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Kind {
    /// Beside a workload.
    #[default]
    Sidecar,
    /// A gateway. Certificates by `credentialName` are not served: use files.
    Router,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Flags that are not valid, files that cannot be read or written, addresses that cannot be bound.
pub async fn run(args: AgentArgs) -> anyhow::Result<()> {
    let proxy = args.proxy;
    mesh_runtime::confine(proxy.run_as, &[])?;
    let _tracing = mesh_telemetry::trace::init_tracing("flotilla-agent", None, false)?;
    if proxy.otlp.is_some() {
        tracing::warn!("--otlp has no effect: spans of a proxy that is not Flotilla's are not exported");
    }
    anyhow::ensure!(
        !proxy.restart.is_on(),
        "--base-id and --restart-epoch do nothing here: give them to the proxy, which has flags of these names"
    );
    let stop = mesh_runtime::shutdown::on_signal()?;
    let kind = match args.kind {
        Kind::Sidecar => NodeKind::Sidecar,
        Kind::Router => NodeKind::Router,
    };
    // Checked before anything waits.
    let identity = proxy.identity()?;
    // Envoy is started before anybody could tell: what flags and the workload's own metadata say.
    let process = proxy.process(&proxy.own_process()?);
    let bootstrap = bootstrap::bootstrap(&proxy, kind, &args.sds)?;

    let grpc = args.write_grpc_bootstrap.as_ref().map(|_| grpc::bootstrap(&proxy)).transpose()?;

    let readiness = Readiness::default();
    let waiting = readiness.wait_for("certificate");
    let (_, ready_task) = serve(process.readiness, ready_router(readiness.clone()))
        .await
        .with_context(|| format!("--readiness {}", process.readiness))?;
    let socket = conn::bind_unix(&args.sds).with_context(|| format!("--sds {}", args.sds.display()))?;
    if let Some(path) = &args.write_bootstrap {
        let text = serde_json::to_vec_pretty(&bootstrap)?;
        write_private(path, &text).with_context(|| format!("--write-bootstrap {}", path.display()))?;
        tracing::info!(command = command_line(&process, path), "bootstrap written");
    }

    if let (Some(path), Some(bootstrap)) = (&args.write_grpc_bootstrap, &grpc) {
        let text = serde_json::to_vec_pretty(bootstrap)?;
        write_private(path, &text).with_context(|| format!("--write-grpc-bootstrap {}", path.display()))?;
        tracing::info!(file = %path.display(), "gRPC bootstrap written");
    }

    let store = SecretStore::new();
    let root = tokio::select! {
        root = mesh_root(&proxy) => root?,
        () = stop.cancelled() => return Ok(()),
    };
    store.set_mesh_trust(&proxy.trust_domain, &root)?;
    let endpoint = control_plane(&proxy, &proxy.discovery, &store)?;
    let mut node = proxy.node(kind)?;
    // As the proxy says it.
    node.metadata.remove("GENERATOR");
    if grpc.is_some() {
        node.metadata.insert("GENERATOR".to_owned(), "grpc".into());
    }
    let renewal = Renewal::new(
        SvidOptions {
            endpoint: endpoint.clone(),
            identity,
            token_file: proxy.token_file.clone(),
            root,
            state_dir: proxy.state_dir.clone(),
        },
        store,
    );
    let mut pem = renewal.pem();
    let roots = renewal.roots();
    let renewing = tokio::spawn(renewal.run());
    // Until there is something to give, connections wait in the kernel's queue: an empty answer would
    // count as an update that lacks the secret.
    tokio::select! {
        first = pem.wait_for(Option::is_some) => {
            first.context("certificate renewal ended")?;
        }
        () = stop.cancelled() => return Ok(()),
    }
    // With the certificate that is there now; before, the control plane would send it away.
    let (following, told) = bundles::follow(endpoint, node.clone(), proxy.state_dir.as_deref());
    let trusting = tokio::spawn(roots.clone().follow(told.clone()));
    let (source, follow) = SecretSource::follow(proxy.trust_domain.clone(), pem, told);
    let service = AdsService::new(source).until(stop.clone());
    // It is the proxy that verifies: what it was sent counts once it has acknowledged it.
    let board = service.status();
    let taken = move || {
        let clients = board.clients();
        !clients.is_empty() && clients.iter().all(|c| c.types.values().all(|t| t.state() == "SYNCED"))
    };
    let reporting = tokio::spawn(roots.report(following.connection(), node, SETTLE, taken));
    let server = tonic::transport::Server::builder()
        .add_service(service.secrets())
        .serve_with_incoming_shutdown(conn::unix(socket), stop.clone().cancelled_owned());
    let mut server = tokio::spawn(server);
    drop(waiting);
    tracing::info!(sds = %args.sds.display(), "serving secrets");

    let ended = tokio::select! {
        r = &mut server => Some(r),
        () = stop.cancelled() => tokio::time::timeout(STOP_LIMIT, &mut server).await.ok(),
    };
    for task in [renewing, follow, ready_task, trusting, reporting] {
        task.abort();
    }
    server.abort();
    match ended {
        None => Ok(()),
        Some(r) => r.context("the SDS server failed")?.context("SDS"),
    }
}

/// How to start the proxy. Draining at once matters for more than speed: connections from before a
/// change keep the old policies until they are drained, by default for ten minutes.
fn command_line(process: &Process, bootstrap: &Path) -> String {
    format!(
        "envoy -c {} --concurrency {} --drain-strategy immediate --drain-time-s {}",
        bootstrap.display(),
        process.concurrency,
        // Envoy takes whole seconds.
        process.drain.as_secs_f64().ceil()
    )
}
