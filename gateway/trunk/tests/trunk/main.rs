//! Two gateways' trunks over real UDP.

mod choice;
mod flows;
mod moving;
mod support;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_trunk::{Carrier, Opener, Path, Trunk, TrunkMetrics, TrunkStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Ca, echo, eventually, gateway, greeted, id, options, peers, ping, root, start};

#[tokio::test]
async fn sessions_share_one_connection_and_keep_half_close() {
    let root = root();
    let deliver = echo().await;
    let (w, e) = (gateway(&root, &root, "west"), gateway(&root, &root, "east"));
    let (west, east) = (start(&w, deliver), start(&e, deliver));
    let to = east.address().unwrap();
    assert_eq!(west.path(to), Path::Unused);
    let west = Arc::new(west);
    // All at once: the dial is shared, the sessions are not.
    let mut sessions = tokio::task::JoinSet::new();
    for n in 0..20 {
        let west = west.clone();
        sessions.spawn(async move {
            let s = west.dial(to, Some(&id("east"))).await.unwrap();
            let payload = vec![b'a' + n; 300_000];
            let (mut r, mut w) = tokio::io::split(s);
            let send = async {
                w.write_all(&payload).await.unwrap();
                w.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (_, read) = tokio::join!(send, r.read_to_end(&mut got));
            read.unwrap();
            assert_eq!(&got[..6], b"hello ");
            assert!(got[6..] == payload[..], "{n}");
        });
    }
    sessions.join_all().await;
    assert_eq!(west.path(to), Path::Quic);
}

#[tokio::test]
async fn another_cluster_or_another_mesh_is_refused() {
    let (root, other) = (root(), root());
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    let east = start(&gateway(&root, &root, "east"), deliver);
    let err = west.dial(east.address().unwrap(), Some(&id("north"))).await.unwrap_err();
    assert_eq!(err.kind(), std::io::ErrorKind::PermissionDenied);
    // A gateway of another mesh: no QUIC, and nothing listens for TCP there. The one above knows another way to east.
    let west = start(&gateway(&root, &root, "west"), deliver);
    let foreign = start(&gateway(&other, &other, "east"), deliver);
    assert!(west.dial(foreign.address().unwrap(), Some(&id("east"))).await.is_err());
}

#[tokio::test]
async fn tcp_takes_over_where_udp_does_not_pass() {
    let root = root();
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    // TCP on this port answers, UDP does not.
    let begun = Instant::now();
    let mut s = west.dial(deliver, Some(&id("east"))).await.unwrap();
    let mut hello = [0; 6];
    s.read_exact(&mut hello).await.unwrap();
    assert_eq!((&hello, west.path(deliver)), (b"hello ", Path::Tcp));
    assert!(begun.elapsed().as_millis() < 2000, "{:?}", begun.elapsed());
    // The next one does not wait.
    let begun = Instant::now();
    west.dial(deliver, Some(&id("east"))).await.unwrap();
    assert!(begun.elapsed().as_millis() < 500);
}

/// A trunk of east on a runtime of its own, which dies like a process: nobody is told.
async fn mortal(root: &Ca, deliver_to: SocketAddr) -> (tokio::runtime::Runtime, Trunk, SocketAddr) {
    let process = std::thread::spawn(|| tokio::runtime::Runtime::new().unwrap()).join().unwrap();
    let secrets = gateway(root, root, "east");
    let east = process.spawn(async move { start(&secrets, deliver_to) }).await.unwrap();
    let address = east.address().unwrap();
    (process, east, address)
}

/// The session ends within the two seconds that silence may last.
async fn ends_soon(s: &mut TrunkStream) {
    let begun = Instant::now();
    let end = tokio::time::timeout(Duration::from_secs(5), s.read_u8()).await;
    assert!(end.expect("the session ends").is_err());
    assert!(begun.elapsed().as_millis() < 2500, "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_end_soon_after_their_gateway_died() {
    let root = root();
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    let (process, east, to) = mortal(&root, deliver).await;
    let mut s = west.dial(to, Some(&id("east"))).await.unwrap();
    greeted(&mut s).await;
    assert_eq!(west.path(to), Path::Quic);

    process.shutdown_background();
    ends_soon(&mut s).await;
    // And whoever comes next hears it at once.
    let begun = Instant::now();
    assert!(west.dial(to, Some(&id("east"))).await.is_err());
    assert!(begun.elapsed().as_millis() < 500, "{:?}", begun.elapsed());
    drop(east);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_on_what_a_dead_gateway_dialled_end_as_soon() {
    let root = root();
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    let (process, east, to) = mortal(&root, deliver).await;
    let at = west.address().unwrap();
    east.set_peers(peers(&[("west", &[at])], true));
    eventually("east dials", || !west.links().is_empty()).await;
    // West hears only now where east can be dialled; the connection that is there is used.
    west.set_peers(peers(&[("east", &[to])], false));
    let mut s = west.dial_cluster(&id("east")).await.unwrap();
    greeted(&mut s).await;
    assert!(west.links().iter().all(|l| l.opener == Opener::Peer));

    process.shutdown_background();
    ends_soon(&mut s).await;
    drop(east);
}

#[tokio::test]
async fn a_cluster_that_nobody_can_dial_is_reached_on_what_it_dialled() {
    let root = root();
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    let east = start(&gateway(&root, &root, "east"), deliver);
    west.set_peers(peers(&[("east", &[])], false));
    let error = west.dial_cluster(&id("east")).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotConnected);
    assert!(error.to_string().contains("east announces no gateway address"), "{error}");
    // East keeps a connection up although it sends nothing.
    let to = west.address().unwrap();
    east.set_peers(peers(&[("west", &[to])], true));
    eventually("east dials", || west.links().iter().any(|l| l.opener == Opener::Peer)).await;
    let mut s = west.dial_cluster(&id("east")).await.unwrap();
    greeted(&mut s).await;
    // And in the other direction on the same connection.
    let mut t = east.dial(to, Some(&id("west"))).await.unwrap();
    greeted(&mut t).await;
    assert_eq!((west.links().len(), east.links().len()), (1, 1));
    let (w, e) = (&west.links()[0], &east.links()[0]);
    assert_eq!((w.cluster.clone(), w.opener, w.sessions), (Some(id("east")), Opener::Peer, 2));
    assert_eq!((e.cluster.clone(), e.opener, e.address), (Some(id("west")), Opener::Us, to));
    // It comes back by itself.
    drop((s, west));
    eventually("east notices", || east.links().iter().all(|l| l.transport == Carrier::Tcp)).await;
    let options = options(to, deliver);
    let secrets = gateway(&root, &root, "west");
    let mut again = None;
    eventually("the address is free", || {
        again = Trunk::start(options.clone(), &secrets, TrunkMetrics::default()).ok();
        again.is_some()
    })
    .await;
    let again = again.unwrap();
    eventually("east dials again", || !again.links().is_empty()).await;
    greeted(&mut again.dial_cluster(&id("east")).await.unwrap()).await;
}

#[tokio::test]
async fn only_members_are_let_in() {
    let root = root();
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    let east = start(&gateway(&root, &root, "east"), deliver);
    let to = west.address().unwrap();
    west.set_peers(peers(&[("east", &[])], false));
    let mut last = east.dial(to, Some(&id("west"))).await.unwrap();
    greeted(&mut last).await;
    // East leaves: it hears what is still to be said, then its connection is cut, and it does not come in again.
    west.set_peers(peers(&[("north", &[])], false));
    tokio::time::sleep(Duration::from_millis(500)).await;
    ping(&mut last).await.unwrap();
    eventually("east is cut off", || west.links().is_empty()).await;
    if let Ok(mut s) = east.dial(to, Some(&id("west"))).await {
        assert!(ping(&mut s).await.is_err(), "east is no member");
    }
    assert!(west.links().is_empty());
}

#[tokio::test]
async fn a_gateway_that_drains_gets_no_new_session_and_keeps_the_old() {
    let root = root();
    let (first, second) = (echo().await, echo().await);
    let secrets = gateway(&root, &root, "east");
    let (one, two) = (start(&secrets, first), start(&secrets, second));
    let west = start(&gateway(&root, &root, "west"), first);
    let (a, b) = (one.address().unwrap(), two.address().unwrap());
    west.set_peers(peers(&[("east", &[a, b])], false));
    let mut old = west.dial(a, Some(&id("east"))).await.unwrap();
    greeted(&mut old).await;
    one.drain().await;
    eventually("west is told", || west.links().iter().any(|l| l.address == a && l.draining)).await;
    // Nothing was dialled at the second so far: the first session finds the way there.
    for _ in 0..3 {
        greeted(&mut west.dial(a, Some(&id("east"))).await.unwrap()).await;
    }
    let total = |t: &Trunk| t.links().iter().map(|l| l.sessions_total).sum::<u64>();
    assert_eq!((total(&one), total(&two)), (1, 3));
    ping(&mut old).await.unwrap();
    // It ends; sessions that are meant for it go on to the other without waiting.
    one.close().await;
    assert!(ping(&mut old).await.is_err());
    let begun = Instant::now();
    greeted(&mut west.dial(a, Some(&id("east"))).await.unwrap()).await;
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn links_are_seen_as_metrics() {
    let root = root();
    let deliver = echo().await;
    let mut registry = prometheus_client::registry::Registry::default();
    let metrics = TrunkMetrics::register(&mut registry);
    let options = options("127.0.0.1:0".parse().unwrap(), deliver);
    let west = Trunk::start(options, &gateway(&root, &root, "west"), metrics).unwrap();
    let east = start(&gateway(&root, &root, "east"), deliver);
    let to = east.address().unwrap();
    let mut s = west.dial(to, Some(&id("east"))).await.unwrap();
    greeted(&mut s).await;
    // UDP does not pass here: TCP stands in, and says why.
    let mut t = west.dial(deliver, None).await.unwrap();
    t.read_exact(&mut [0; 6]).await.unwrap();
    let text = || {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    };
    let now = text();
    for line in [
        "flotilla_trunk_connections{cluster=\"east\"} 1.0\n",
        "flotilla_trunk_sessions{cluster=\"east\"} 1.0\n",
        "flotilla_trunk_tcp_open_sessions 1\n",
        "flotilla_trunk_rtt_seconds{cluster=\"east\"} ",
        "flotilla_trunk_mtu_bytes{cluster=\"east\"} ",
        "flotilla_trunk_congestion_window_bytes{cluster=\"east\"} ",
        "flotilla_trunk_lost_packets_total{cluster=\"east\"} ",
        "flotilla_trunk_udp_segments ",
        "flotilla_trunk_receive_buffer_bytes ",
    ] {
        assert!(now.contains(line), "{line:?} in\n{now}");
    }
    let tcp = west.links().into_iter().find(|l| l.transport == Carrier::Tcp).unwrap();
    assert!(tcp.why_tcp.as_ref().unwrap().contains("no answer by QUIC"), "{tcp:?}");
    assert_eq!((tcp.sessions, tcp.bytes_received), (1, 6));
    // Counters do not fall when a connection ends.
    let sent = |text: &str| {
        let line = text.lines().find(|l| l.starts_with("flotilla_trunk_sent_bytes_total")).unwrap();
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    drop((s, east));
    eventually("the link ends", || west.links().iter().all(|l| l.transport == Carrier::Tcp)).await;
    assert!(sent(&text()) >= sent(&now) && sent(&now) > 0.0);
}
