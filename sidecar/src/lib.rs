//! A workload's proxy: the agent of the mesh, with a resolver for the workload's names.

pub mod agent_mode;
mod args;
pub mod iptables;
pub mod names;
mod registration;

use anyhow::Context;
pub use args::SidecarArgs;
use args::{BootstrapArgs, MeshArgs, Mode};
use mesh_agent::{Agent, AgentOptions, MixerHook, Restart, Standalone, StandaloneOptions};
use mesh_identity::SecretStore;
use mesh_proxy::Hooks;
use mesh_xds::NodeKind;
use prometheus_client::registry::Registry;

/// How long the end waits for the control plane to hear of it.
const FAREWELL: std::time::Duration = std::time::Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// Flags that are not valid, files that cannot be read, addresses that cannot be bound.
pub async fn run(args: SidecarArgs) -> anyhow::Result<()> {
    match &args.mode {
        Mode::Mesh(args) => mesh_runtime::confine(args.proxy.run_as, &args.proxy.rights())?,
        Mode::Bootstrap(args) => mesh_runtime::confine(args.run_as, &[mesh_runtime::Right::LowPorts])?,
    }
    match args.mode {
        Mode::Mesh(args) => member(*args).await,
        Mode::Bootstrap(args) => standalone(args).await,
    }
}

/// An engine that executes a bootstrap file.
async fn standalone(args: BootstrapArgs) -> anyhow::Result<()> {
    let tracing = mesh_telemetry::trace::init_tracing("flotilla-sidecar", args.otlp.as_deref(), false)?;
    let stop = mesh_runtime::shutdown::on_signal()?;
    let options = StandaloneOptions {
        workers: args.workers(),
        drain: args.drain,
        state_dir: args.state_dir.clone(),
        max_on_demand: args.max_on_demand,
        hooks: Hooks { spans: tracing.spans(), ..Hooks::default() },
        restart: Restart::begin(&args.restart).await?,
    };
    Standalone::start(&args.file, options).await?.run(stop).await;
    tracing.shutdown();
    Ok(())
}

/// A workload's proxy in the mesh.
async fn member(args: MeshArgs) -> anyhow::Result<()> {
    let tracing = mesh_telemetry::trace::init_tracing("flotilla-sidecar", args.proxy.otlp.as_deref(), false)?;
    let stop = mesh_runtime::shutdown::on_signal()?;
    let store = SecretStore::new();
    let mut registry = Registry::default();
    let mixer = MixerHook::new(&args.mixer, &args.proxy, &store, &mut registry)?;
    let restart = Restart::begin(&args.proxy.restart).await?;
    let dns = match args.dns {
        None => None,
        Some(a) => {
            let udp = restart.udp("dns-udp", a).with_context(|| format!("--dns {a}"))?;
            let tcp = restart.tcp("dns-tcp", a).with_context(|| format!("--dns {a}"))?;
            Some((udp, tcp))
        }
    };
    let agent = Agent::start(AgentOptions {
        args: args.proxy,
        kind: NodeKind::Sidecar,
        hooks: Hooks { spans: tracing.spans(), ..Hooks::default() },
        mixer,
        name_table: dns.is_some(),
        registry,
        restart,
        store,
        pages: Default::default(),
    })
    .await?;
    let _dns = match dns {
        None => None,
        Some((udp, tcp)) => {
            let (names, follow) = names::follow(agent.names(), names::Audience::Workload);
            let server = mesh_dns::Server::start_on(udp, tcp, args.dns_upstream, names).context("--dns")?;
            Some((server, follow))
        }
    };
    let registration = args.register.map(|group| {
        let (control_plane, node) = agent.control_plane();
        let commands =
            if args.exec_probes { registration::Commands::Run } else { registration::Commands::Refused };
        tokio::spawn(registration::run(group, control_plane, node, commands, stop.clone()))
    });
    agent.run(stop.clone()).await;
    if let Some(mut r) = registration {
        // Without a time to drain it may not have been told yet. Where another process has taken over there is nothing to tell.
        if stop.is_cancelled() {
            let _ = tokio::time::timeout(FAREWELL, &mut r).await;
        }
        r.abort();
    }
    tracing.shutdown();
    Ok(())
}
