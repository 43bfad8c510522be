//! Ingress, egress and east-west gateways: the sidecar's engine at the edge of a cluster.
//!
//! What a gateway serves comes from the control plane alone. An east-west gateway passes inner mTLS
//! sessions on by their SNI and never holds a workload's key; with `--trunk` it also speaks QUIC to
//! its peers.

mod credentials;
mod report;
mod trunk;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use mesh_agent::{Agent, AgentOptions, MixerArgs, MixerHook, ProxyArgs, Restart};
use mesh_identity::SecretStore;
use mesh_proxy::Hooks;
use mesh_trunk::{DeliverTo, PerPeer, Transport, TrunkOptions, congestion::Congestion};
use mesh_xds::NodeKind;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// From the moment at which peers have been told of the end until no session is accepted any more: what they sent
/// before arrives in between.
const NOTICE: Duration = Duration::from_millis(250);
/// The same, if the control plane has heard of it: it tells this cluster's proxies, which move their sessions.
const SPREAD: Duration = Duration::from_secs(1);
/// Sessions from trunks on their way to the engine; each of its workers keeps more that wait.
const SESSIONS: usize = 256;
/// Flows of datagrams on their way to the engine; those beyond come again with their client's next packet.
const FLOWS: usize = 256;
/// A control plane that does not answer in this time is not waited for.
const HEARING: Duration = Duration::from_secs(1);

/// Flags of `flotilla gateway`.
#[derive(Debug, Clone, clap::Args)]
pub struct GatewayArgs {
    #[command(flatten)]
    proxy: ProxyArgs,
    /// Speak QUIC to peers' gateways on this UDP address (usually port 15443)
    #[arg(long)]
    trunk: Option<SocketAddr>,
    /// The gateway's own east-west listener, to which sessions from trunks are handed
    #[arg(long, default_value = "127.0.0.1:15443")]
    trunk_deliver: SocketAddr,
    /// Threads that carry trunks, each with a socket of its own at that address; one per core that the process may use
    /// unless set. With 0 trunks run beside certificates, configuration and admin pages
    #[arg(long)]
    trunk_workers: Option<usize>,
    /// What carries new sessions to peers' gateways: `auto` takes TCP while the path is measured to be short and to lose
    /// nothing, and QUIC else; `quic`; `tcp`, which leaves QUIC to UDP services. `auto,east=quic` sets it apart for a peer
    #[arg(long, default_value_t, value_name = "CHOICE[,PEER=CHOICE]...")]
    trunk_transport: PerPeer<Transport>,
    /// Congestion control of the trunk: `bbr` measures what the path delivers, `cubic` shrinks at every loss.
    /// `bbr,east=cubic` sets it apart for a peer
    #[arg(long, default_value_t, value_name = "CONTROL[,PEER=CONTROL]...")]
    trunk_congestion: PerPeer<Congestion>,
    /// Directory of server credentials: `<name>/tls.crt`, `<name>/tls.key` and optionally
    /// `<name>/ca.crt` serve `credentialName: <name>`; `ca.crt` alone is roots; changes are picked up
    #[arg(long)]
    credentials: Option<PathBuf>,
}

/// Runs until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// Flags that are not valid, files that cannot be read, addresses that cannot be bound.
pub async fn run(args: GatewayArgs) -> anyhow::Result<()> {
    mesh_runtime::confine(args.proxy.run_as, &args.proxy.rights())?;
    let tracing = mesh_telemetry::trace::init_tracing("flotilla-gateway", args.proxy.otlp.as_deref(), false)?;
    let stop = mesh_runtime::shutdown::on_signal()?;
    let store = SecretStore::new();
    let mut registry = Registry::default();
    let _credentials = args.credentials.map(|dir| credentials::follow(dir, store.clone()));
    let mut hooks = Hooks { spans: tracing.spans(), ..Hooks::default() };
    let (mut trunks, mut pages) = (None, axum::Router::new());
    let (delivered, sessions) = mpsc::channel(SESSIONS);
    let (carried, flows) = mpsc::channel(FLOWS);
    if let Some(listen) = args.trunk {
        let options = TrunkOptions {
            listen,
            deliver_to: DeliverTo::Channel(delivered),
            deliver_flows: Some(carried),
            congestion: args.trunk_congestion,
            transport: args.trunk_transport,
            workers: args
                .trunk_workers
                .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        };
        let trunk =
            trunk::start(options, &store, &mut registry).with_context(|| format!("--trunk {listen}"))?;
        hooks.dialer = Some(trunk::dialer(trunk.clone()));
        pages = trunk::pages(trunk.clone());
        trunks = Some(trunk);
    }
    // The connections of QUIC are in the process, not in the socket.
    ensure!(
        args.trunk.is_none() || !args.proxy.restart.is_on(),
        "--trunk does not go with --base-id and --restart-epoch: a trunk cannot be handed over; its peers fall back to \
         TCP while the gateway is started again"
    );
    let restart = Restart::begin(&args.proxy.restart).await?;
    let mixer = MixerHook::new(&MixerArgs::default(), &args.proxy, &store, &mut registry)?;
    let agent = Agent::start(AgentOptions {
        args: args.proxy,
        kind: NodeKind::Router,
        hooks,
        mixer,
        name_table: false,
        registry,
        restart,
        store,
        pages,
    })
    .await?;
    let (connection, node) = agent.control_plane();
    let reporting = tokio::spawn(report::run(connection, node, agent.state(), trunks.clone()));
    let following = trunks.clone().map(|t| tokio::spawn(trunk::follow(t, agent.state())));
    let delivering = tokio::spawn(trunk::deliver(sessions, args.trunk_deliver, agent.deliveries()));
    let carrying = tokio::spawn(trunk::deliver_flows(flows, agent.deliveries()));
    // Whoever sends hears of the end before the listener closes, so that no new session finds it closed.
    let (farewell, engine_stop) = (agent.farewell(), CancellationToken::new());
    let notice = async {
        stop.cancelled().await;
        let peers = async {
            if let Some(t) = &trunks {
                t.drain().await;
            }
        };
        let ((), heard) = tokio::join!(peers, farewell.say(HEARING));
        tokio::time::sleep(match (heard, &trunks) {
            (true, _) => SPREAD,
            (false, Some(_)) => NOTICE,
            (false, None) => Duration::ZERO,
        })
        .await;
        engine_stop.cancel();
        std::future::pending::<()>().await;
    };
    // The agent also ends when another process has taken over.
    tokio::select! {
        () = agent.run(engine_stop.clone()) => {}
        () = notice => {}
    }
    reporting.abort();
    if let Some(f) = following {
        f.abort();
    }
    delivering.abort();
    carrying.abort();
    if let Some(t) = trunks {
        t.close().await;
    }
    tracing.shutdown();
    Ok(())
}
