//! The trunk of an east-west gateway: the engine's way into it, the members that the control plane names, and a page
//! that shows its links.
//!
//! The control plane writes a peer's gateways as endpoints of the cluster `peer|<id>`:
//!
//! | address | meaning |
//! |---|---|
//! | `trunk:<cluster>@<ip>` | dial it; the gateway must be of that cluster |
//! | `trunk:<cluster>@<ip>+keep` | the same, and keep the connection up while nothing is sent |
//! | `trunk:<cluster>@` | nobody can dial that cluster: use a connection that it dialled |
//! | `trunk:<ip>` | dial it, of whatever member it is |

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{Json, Router, routing::get};
use mesh_identity::SecretStore;
use mesh_model::{ClusterId, proxy::LoadAssignment};
use mesh_proxy::{BoxedIo, DatagramFlow, Deliveries, Dialer, FlowError, FlowSender, HookFuture};
use mesh_trunk::{
    LinkStatus, PeerGateway, Peers, SocketStatus, Trunk, TrunkError, TrunkFlow, TrunkMetrics, TrunkOptions,
    TrunkStream,
};
use mesh_xds::client::proxy::ProxyState;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
};

/// Binds the trunk on the current runtime.
pub(crate) fn start(
    options: TrunkOptions,
    secrets: &SecretStore,
    registry: &mut Registry,
) -> Result<Arc<Trunk>, TrunkError> {
    Ok(Arc::new(Trunk::start(options, secrets, TrunkMetrics::register(registry))?))
}

/// The engine's way into it.
pub(crate) fn dialer(trunk: Arc<Trunk>) -> Arc<dyn Dialer> {
    Arc::new(TrunkDialer { trunk, runtime: Handle::current() })
}

/// What `/trunk` shows.
#[derive(Debug, Serialize)]
struct Page {
    socket: SocketStatus,
    links: Vec<LinkStatus>,
}

/// The page `/trunk` of the admin port.
pub(crate) fn pages(trunk: Arc<Trunk>) -> Router {
    let page = move || {
        let page = Page { socket: trunk.socket(), links: trunk.links() };
        async move { Json(page) }
    };
    Router::new().route("/trunk", get(page))
}

/// Tells the trunk who the members are, as often as the control plane says anything.
pub(crate) async fn follow(trunk: Arc<Trunk>, mut states: watch::Receiver<Arc<ProxyState>>) {
    let mut known = false;
    loop {
        let peers = peers(&states.borrow_and_update().endpoints);
        // Before the first configuration nothing is known of members; later none means that the last one left.
        known |= !peers.0.is_empty();
        if known {
            trunk.set_peers(peers);
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

/// The peer that a cluster of the configuration leads to.
pub(crate) fn peer_of(name: &str) -> Option<ClusterId> {
    ClusterId::new(name.strip_prefix("peer|")?).ok()
}

/// Hands sessions from trunks to the engine's listener at `to`.
pub(crate) async fn deliver(
    mut sessions: mpsc::Receiver<(TrunkStream, SocketAddr)>,
    to: SocketAddr,
    engine: Deliveries,
) {
    while let Some((session, peer)) = sessions.recv().await {
        if let Err(error) = engine.deliver(to, peer, Box::new(session)).await {
            tracing::warn!(%error, %to, "the east-west listener is away");
        }
    }
}

/// Hands flows of datagrams from trunks to the engine's listener for UDP.
pub(crate) async fn deliver_flows(mut flows: mpsc::Receiver<(TrunkFlow, SocketAddr)>, engine: Deliveries) {
    while let Some((flow, peer)) = flows.recv().await {
        if let Err(error) = engine.deliver_flow(peer, for_engine(flow)).await {
            tracing::warn!(%error, "the east-west listener for UDP is away");
        }
    }
}

fn for_engine(flow: TrunkFlow) -> DatagramFlow {
    let (to, from) = flow.split();
    DatagramFlow { to: Arc::new(Sender(to)), from }
}

struct Sender(mesh_trunk::FlowSender);

impl FlowSender for Sender {
    fn send(&self, datagram: &[u8]) -> Result<(), FlowError> {
        self.0.send(datagram).map_err(|e| match e {
            mesh_trunk::FlowError::TooLarge => FlowError::TooLarge,
            mesh_trunk::FlowError::Full => FlowError::Full,
            mesh_trunk::FlowError::Ended => FlowError::Ended,
        })
    }
}

fn peers(assignments: &BTreeMap<String, Arc<LoadAssignment>>) -> Peers {
    let mut peers = BTreeMap::new();
    for (name, a) in assignments {
        let Some(cluster) = peer_of(name) else { continue };
        let gateways = a.localities.iter().flat_map(|l| &l.endpoints).filter_map(|e| {
            match Target::parse(&e.address, e.port)? {
                // A relay is another member's, and stands in that one's list.
                Target::Gateway(address, of, keep) if of.as_ref().is_none_or(|c| *c == cluster) => {
                    Some(PeerGateway { address, keep })
                }
                _ => None,
            }
        });
        let gateways = gateways.collect();
        peers.insert(cluster, gateways);
    }
    Peers(peers)
}

/// What an address of the control plane says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Dial it, of that cluster, and whether to keep the connection up.
    Gateway(SocketAddr, Option<ClusterId>, bool),
    /// Wait for it to dial.
    Cluster(ClusterId),
}

impl Target {
    pub(crate) fn parse(address: &str, port: u16) -> Option<Self> {
        let address = address.strip_prefix("trunk:")?;
        let (cluster, ip) = match address.split_once('@') {
            Some((c, ip)) => (Some(ClusterId::new(c).ok()?), ip),
            None => (None, address),
        };
        let (ip, keep) = match ip.strip_suffix("+keep") {
            Some(ip) => (ip, true),
            None => (ip, false),
        };
        match (cluster, ip) {
            (Some(c), "") if !keep => Some(Self::Cluster(c)),
            (c, ip) => Some(Self::Gateway(SocketAddr::new(ip.parse::<IpAddr>().ok()?, port), c, keep)),
        }
    }
}

struct TrunkDialer {
    trunk: Arc<Trunk>,
    /// The trunk's timers and sockets belong to this runtime, not to the engine's workers.
    runtime: Handle,
}

impl Dialer for TrunkDialer {
    fn dial<'a>(&'a self, addr: &'a str, port: u16, _sni: &'a str) -> HookFuture<'a, io::Result<BoxedIo>> {
        Box::pin(async move {
            let target = target(addr, port)?;
            let trunk = self.trunk.clone();
            let dial = self.runtime.spawn(async move {
                match target {
                    Target::Gateway(address, cluster, _) => trunk.dial(address, cluster.as_ref()).await,
                    Target::Cluster(cluster) => trunk.dial_cluster(&cluster).await,
                }
            });
            let stream = dial.await.map_err(io::Error::other)??;
            Ok(Box::new(stream) as BoxedIo)
        })
    }

    fn dial_flow<'a>(&'a self, addr: &'a str, port: u16) -> HookFuture<'a, io::Result<DatagramFlow>> {
        Box::pin(async move {
            let target = target(addr, port)?;
            let trunk = self.trunk.clone();
            let dial = self.runtime.spawn(async move {
                match target {
                    Target::Gateway(address, cluster, _) => trunk.dial_flow(address, cluster.as_ref()).await,
                    Target::Cluster(cluster) => trunk.dial_flow_to(&cluster).await,
                }
            });
            Ok(for_engine(dial.await.map_err(io::Error::other)??))
        })
    }
}

fn target(addr: &str, port: u16) -> io::Result<Target> {
    Target::parse(addr, port).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{addr:?} is no address of a trunk"))
    })
}

#[cfg(test)]
mod tests {
    use mesh_model::proxy::{EndpointHealth, LbEndpoint, LocalityEndpoints, Slots};

    use super::*;

    fn id(s: &str) -> ClusterId {
        ClusterId::new(s).unwrap()
    }

    #[test]
    fn addresses_say_whom_to_dial_and_whom_to_expect() {
        let at = |s: &str| s.parse().unwrap();
        let parse = |a| Target::parse(a, 15443);
        let v4: SocketAddr = at("203.0.113.2:15443");
        assert_eq!(parse("trunk:203.0.113.2"), Some(Target::Gateway(v4, None, false)));
        assert_eq!(parse("trunk:east@203.0.113.2"), Some(Target::Gateway(v4, Some(id("east")), false)));
        assert_eq!(parse("trunk:east@203.0.113.2+keep"), Some(Target::Gateway(v4, Some(id("east")), true)));
        let v6 = Target::Gateway(at("[2001:db8::1]:15443"), Some(id("east")), false);
        assert_eq!(parse("trunk:east@2001:db8::1"), Some(v6));
        assert_eq!(parse("trunk:east@"), Some(Target::Cluster(id("east"))));
        for bad in ["203.0.113.2", "trunk:", "trunk:east", "trunk:@", "trunk:UP@", "trunk:east@+keep"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn members_are_the_peers_of_the_configuration() {
        let endpoint = |address: &str| LbEndpoint {
            address: address.into(),
            port: 15443,
            weight: 1,
            health: EndpointHealth::Healthy,
            transport_labels: BTreeMap::new(),
            workload: String::new(),
            check: None,
            slots: Slots::None,
        };
        let assignment = |addresses: &[&str]| {
            let endpoints = addresses.iter().map(|a| endpoint(a)).collect();
            Arc::new(LoadAssignment {
                localities: vec![LocalityEndpoints { endpoints, ..LocalityEndpoints::default() }],
                ..LoadAssignment::default()
            })
        };
        let all = BTreeMap::from([
            ("peer|east".to_owned(), assignment(&["trunk:east@203.0.113.2+keep", "203.0.113.3"])),
            // Nobody can dial north: its sessions are relayed by east.
            ("peer|north".to_owned(), assignment(&["trunk:east@203.0.113.2"])),
            ("outbound|80||a.b".to_owned(), assignment(&["10.0.0.1"])),
        ]);
        let east = PeerGateway { address: "203.0.113.2:15443".parse().unwrap(), keep: true };
        assert_eq!(peers(&all), Peers(BTreeMap::from([(id("east"), vec![east]), (id("north"), vec![])])));
    }
}
