//! Telling the control plane what this gateway sees of the ways to other clusters, for `flotilla clusters`.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use mesh_model::{ClusterId, proxy::LoadAssignment};
use mesh_trunk::{Carrier, LinkStatus, Trunk};
use mesh_xds::{
    NodeInfo,
    client::{Connection, proxy::ProxyState},
    links::{self, MAX_PEERS, PeerLink},
};
use tokio::sync::watch;

use crate::trunk::{Target, peer_of};

/// From one report to the next.
const INTERVAL: Duration = Duration::from_secs(5);
/// Reports over which loss is counted: a minute.
const WINDOW: usize = 12;
/// A control plane that does not answer in this time is asked again with the next report.
const PATIENCE: Duration = Duration::from_secs(3);
/// A control plane of another make, or an older one, is not asked again before.
const UNKNOWN: Duration = Duration::from_secs(600);

/// Packets sent to each peer and lost since the gateway started.
type Packets = BTreeMap<ClusterId, (u64, u64)>;

/// Reports for as long as it is polled. Nothing waits for it, and a control plane that is away only misses figures.
pub(crate) async fn run(
    mut control_plane: Connection,
    node: NodeInfo,
    states: watch::Receiver<Arc<ProxyState>>,
    trunk: Option<Arc<Trunk>>,
) {
    if !node.is_east_west() {
        return;
    }
    let mut samples: VecDeque<Packets> = VecDeque::new();
    loop {
        let now = trunk.as_ref().map(|t| t.packets()).unwrap_or_default();
        let links = trunk.as_ref().map(|t| t.links()).unwrap_or_default();
        let before = samples.front().cloned().unwrap_or_default();
        let peers = peers(&states.borrow().endpoints, &links, &before, &now);
        samples.push_back(now);
        if samples.len() > WINDOW {
            samples.pop_front();
        }
        let Some(channel) = control_plane.borrow_and_update().clone() else {
            // Counting goes on meanwhile.
            let _ = tokio::time::timeout(INTERVAL, control_plane.changed()).await;
            continue;
        };
        let told = tokio::time::timeout(PATIENCE, links::report(channel, &node, peers)).await;
        let pause = match told {
            Ok(Ok(false)) => UNKNOWN,
            Ok(Err(status)) => {
                tracing::debug!(error = %status.message(), "the control plane did not take a report");
                INTERVAL
            }
            Ok(Ok(true)) | Err(_) => INTERVAL,
        };
        tokio::time::sleep(pause).await;
    }
}

/// What is known of each peer that the control plane names.
fn peers(
    assignments: &BTreeMap<String, Arc<LoadAssignment>>,
    links: &[LinkStatus],
    before: &Packets,
    now: &Packets,
) -> Vec<PeerLink> {
    let all = assignments.iter().filter_map(|(name, a)| Some((peer_of(name)?, a)));
    all.take(MAX_PEERS).map(|(cluster, a)| peer(cluster, a, links, before, now)).collect()
}

fn peer(
    cluster: ClusterId,
    a: &LoadAssignment,
    links: &[LinkStatus],
    before: &Packets,
    now: &Packets,
) -> PeerLink {
    let endpoints = || a.localities.iter().flat_map(|l| &l.endpoints);
    let (mut dialled, mut plain): (Vec<SocketAddr>, _) = (vec![], false);
    for e in endpoints() {
        match Target::parse(&e.address, e.port) {
            Some(Target::Gateway(address, ..)) => dialled.push(address),
            Some(Target::Cluster(_)) => {}
            None => plain = true,
        }
    }
    let quic: Vec<_> = links
        .iter()
        .filter(|l| l.transport == Carrier::Quic && l.cluster.as_ref() == Some(&cluster))
        .collect();
    // The trunk knows only addresses of what TCP carries; a peer that is reached through another has that one's.
    let tcp = |chosen: bool| {
        let theirs = |l: &&LinkStatus| l.transport == Carrier::Tcp && dialled.contains(&l.address);
        links.iter().filter(theirs).find(move |l| l.chosen == chosen)
    };
    let stands_in = tcp(false);
    let preferred = quic.iter().find(|l| l.new_sessions == Some(Carrier::Tcp));
    let transport = match (quic.is_empty(), stands_in.is_some() || tcp(true).is_some() || plain) {
        (false, _) if preferred.is_none() => "quic",
        (false, _) | (true, true) => "tcp",
        // Nothing has been sent there yet.
        (true, false) => "",
    };
    let choice = match preferred.or(quic.first()) {
        Some(l) => l.choice.clone(),
        None => tcp(true).and_then(|l| l.why_tcp.clone()),
    };
    let congestion = quic.iter().find_map(|l| l.congestion.clone());
    let why_tcp = stands_in.filter(|_| transport == "tcp").and_then(|l| l.why_tcp.clone());
    let slowest = quic.iter().filter_map(|l| l.rtt_ms).reduce(f64::max);
    let ((sent, lost), (sent_before, lost_before)) =
        (now.get(&cluster).copied().unwrap_or_default(), before.get(&cluster).copied().unwrap_or_default());
    let sent = sent.saturating_sub(sent_before);
    let lost = lost.saturating_sub(lost_before);
    let counted = !quic.is_empty() && sent > 0;
    PeerLink {
        cluster: cluster.to_string(),
        transport: transport.to_owned(),
        connections: u32::try_from(quic.len()).unwrap_or(u32::MAX),
        // Round trips are far below what the conversion could not hold.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a round trip is small and positive"
        )]
        rtt_us: slowest.map(|ms| (ms * 1000.0) as u64),
        packets_sent: counted.then_some(sent),
        packets_lost: counted.then_some(lost),
        why_tcp: why_tcp.unwrap_or_default(),
        choice: choice.unwrap_or_default(),
        congestion: congestion.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::proxy::{EndpointHealth, LbEndpoint, LocalityEndpoints, Slots};
    use mesh_trunk::Opener;

    use super::*;

    fn assignment(addresses: &[&str]) -> Arc<LoadAssignment> {
        let endpoint = |a: &&str| LbEndpoint {
            address: (*a).into(),
            port: 15443,
            weight: 1,
            health: EndpointHealth::Healthy,
            transport_labels: BTreeMap::new(),
            workload: String::new(),
            check: None,
            slots: Slots::None,
        };
        let endpoints = addresses.iter().map(endpoint).collect();
        Arc::new(LoadAssignment {
            localities: vec![LocalityEndpoints { endpoints, ..LocalityEndpoints::default() }],
            ..LoadAssignment::default()
        })
    }

    fn link(cluster: Option<&str>, address: &str, transport: Carrier, rtt_ms: Option<f64>) -> LinkStatus {
        LinkStatus {
            cluster: cluster.map(|c| ClusterId::new(c).unwrap()),
            address: address.parse().unwrap(),
            transport,
            opener: Opener::Us,
            since: 0,
            sessions: 1,
            sessions_total: 1,
            draining: false,
            silent: false,
            rtt_ms,
            min_rtt_ms: rtt_ms,
            packets_sent: None,
            packets_lost: None,
            mtu: None,
            congestion_window: None,
            bytes_sent: 0,
            bytes_received: 0,
            congestion: (transport == Carrier::Quic).then(|| "bbr".to_owned()),
            why_tcp: (transport == Carrier::Tcp).then(|| "UDP is blocked".to_owned()),
            new_sessions: (transport == Carrier::Quic).then_some(Carrier::Quic),
            choice: (transport == Carrier::Quic).then(|| "40.0 ms away".to_owned()),
            chosen: false,
        }
    }

    #[test]
    fn a_report_says_what_carries_and_nothing_that_is_not_known() {
        let all = BTreeMap::from([
            ("peer|blocked".to_owned(), assignment(&["trunk:blocked@203.0.113.3"])),
            ("peer|east".to_owned(), assignment(&["trunk:east@203.0.113.2"])),
            ("peer|idle".to_owned(), assignment(&["trunk:idle@203.0.113.9"])),
            ("peer|natted".to_owned(), assignment(&["trunk:natted@"])),
            ("peer|plain".to_owned(), assignment(&["203.0.113.4"])),
            ("peer|set".to_owned(), assignment(&["trunk:set@203.0.113.6"])),
            ("peer|short".to_owned(), assignment(&["trunk:short@203.0.113.5"])),
            ("outbound|80||a.b".to_owned(), assignment(&["10.0.0.1"])),
        ]);
        let chosen = |why: &str, l| LinkStatus { chosen: true, why_tcp: Some(why.into()), ..l };
        let links = [
            LinkStatus {
                new_sessions: Some(Carrier::Tcp),
                choice: Some("short and clean".into()),
                ..link(Some("short"), "203.0.113.5:15443", Carrier::Quic, Some(0.5))
            },
            chosen("short and clean", link(None, "203.0.113.5:15443", Carrier::Tcp, None)),
            chosen("set by --trunk-transport", link(None, "203.0.113.6:15443", Carrier::Tcp, None)),
            // Sessions that began when TCP was chosen.
            chosen("begun before", link(None, "203.0.113.2:15443", Carrier::Tcp, None)),
            link(Some("east"), "203.0.113.2:15443", Carrier::Quic, Some(12.5)),
            link(Some("east"), "203.0.113.7:9999", Carrier::Quic, Some(40.0)),
            link(Some("natted"), "198.51.100.1:4000", Carrier::Quic, Some(80.0)),
            link(None, "203.0.113.3:15443", Carrier::Tcp, None),
        ];
        let id = |c: &str| ClusterId::new(c).unwrap();
        let before = Packets::from([(id("east"), (100, 10)), (id("natted"), (5, 5))]);
        let now = Packets::from([(id("east"), (600, 15)), (id("natted"), (5, 5))]);
        let told = peers(&all, &links, &before, &now);
        let line = |p: &PeerLink| {
            (
                p.cluster.clone(),
                p.transport.clone(),
                p.connections,
                p.rtt_us,
                p.packets_sent.zip(p.packets_lost),
            )
        };
        let row = |c: &str, t: &str, n, rtt, packets| (c.to_owned(), t.to_owned(), n, rtt, packets);
        assert_eq!(
            told.iter().map(line).collect::<Vec<_>>(),
            [
                row("blocked", "tcp", 0, None, None),
                row("east", "quic", 2, Some(40_000), Some((500, 5))),
                row("idle", "", 0, None, None),
                // Nothing was sent during the window, so nothing is known of loss.
                row("natted", "quic", 1, Some(80_000), None),
                row("plain", "tcp", 0, None, None),
                row("set", "tcp", 0, None, None),
                row("short", "tcp", 1, Some(500), None),
            ]
        );
        let why = |n: usize| [&told[n].why_tcp, &told[n].choice, &told[n].congestion].map(String::as_str);
        assert_eq!(why(0), ["UDP is blocked", "", ""]);
        assert_eq!(why(1), ["", "40.0 ms away", "bbr"]);
        assert_eq!(why(4), ["", "", ""]);
        assert_eq!(why(5), ["", "set by --trunk-transport", ""]);
        assert_eq!(why(6), ["", "short and clean", "bbr"]);
    }
}
