//! Datagrams between two gateways.

use std::{net::SocketAddr, time::Duration};

use mesh_trunk::{FlowError, Path, Trunk, TrunkFlow, TrunkMetrics, TrunkOptions};
use tokio::sync::mpsc;

use crate::support::{Ca, echo, eventually, gateway, id, options, peers, root};

type Flows = mpsc::Receiver<(TrunkFlow, SocketAddr)>;

fn start(root: &Ca, cluster: &str, deliver: SocketAddr) -> (Trunk, Flows, TrunkMetrics) {
    let (to, flows) = mpsc::channel(16);
    let listen = "127.0.0.1:0".parse().unwrap();
    let options = TrunkOptions { deliver_flows: Some(to), ..options(listen, deliver) };
    let metrics = TrunkMetrics::default();
    let trunk = Trunk::start(options, &gateway(root, root, cluster), metrics.clone()).unwrap();
    (trunk, flows, metrics)
}

async fn next(flows: &mut Flows) -> TrunkFlow {
    tokio::time::timeout(Duration::from_secs(5), flows.recv()).await.expect("a flow").unwrap().0
}

async fn hear(from: &mut mpsc::Receiver<bytes::Bytes>) -> Vec<u8> {
    tokio::time::timeout(Duration::from_secs(5), from.recv()).await.expect("a datagram").unwrap().to_vec()
}

#[tokio::test]
async fn flows_keep_apart_and_their_ends_are_told() {
    let root = root();
    let deliver = echo().await;
    let (west, _, _) = start(&root, "west", deliver);
    let (east, mut flows, metrics) = start(&root, "east", deliver);
    let to = east.address().unwrap();
    let (a, mut from_a) = west.dial_flow(to, Some(&id("east"))).await.unwrap().split();
    let (b, mut from_b) = west.dial_flow(to, Some(&id("east"))).await.unwrap().split();
    a.send(b"a1").unwrap();
    let (far_a, mut at_a) = next(&mut flows).await.split();
    b.send(b"").unwrap();
    let (far_b, mut at_b) = next(&mut flows).await.split();
    a.send(&[7; 1200]).unwrap();
    assert_eq!(hear(&mut at_a).await, b"a1");
    assert_eq!(hear(&mut at_a).await, [7; 1200]);
    assert_eq!(hear(&mut at_b).await, b"");
    far_b.send(b"to b").unwrap();
    far_a.send(b"to a").unwrap();
    assert_eq!(hear(&mut from_a).await, b"to a");
    assert_eq!(hear(&mut from_b).await, b"to b");
    // Either end says so.
    drop((a, from_a));
    let ended = tokio::time::timeout(Duration::from_secs(5), at_a.recv()).await;
    assert_eq!(ended.expect("the end is told"), None);
    drop((far_b, at_b));
    let ended = tokio::time::timeout(Duration::from_secs(5), from_b.recv()).await;
    assert_eq!(ended.expect("the end is told"), None);
    assert_eq!((metrics.accepted_flows.get(), metrics.dropped_datagrams.get()), (2, 0));
    assert_eq!(west.links()[0].sessions_total, 2);
    // What does not fit into a packet is refused and nothing else.
    let (c, _) = west.dial_flow(to, None).await.unwrap().split();
    assert_eq!(c.send(&[0; 65_500]), Err(FlowError::TooLarge));
    drop(east);
    eventually("the trunk has ended", || c.send(b"x") == Err(FlowError::Ended)).await;
}

#[tokio::test]
async fn flows_go_both_ways_on_what_one_side_dialled() {
    let root = root();
    let deliver = echo().await;
    let (west, mut at_west, _) = start(&root, "west", deliver);
    let (east, mut at_east, _) = start(&root, "east", deliver);
    west.set_peers(peers(&[("east", &[east.address().unwrap()])], true));
    east.set_peers(peers(&[("west", &[])], false));
    eventually("west has dialled", || !east.links().is_empty()).await;
    let (from_east, mut back) = east.dial_flow_to(&id("west")).await.unwrap().split();
    let (from_west, _) = west.dial_flow(east.address().unwrap(), Some(&id("east"))).await.unwrap().split();
    from_east.send(b"e").unwrap();
    from_west.send(b"w").unwrap();
    let (far, mut there) = next(&mut at_west).await.split();
    assert_eq!(hear(&mut there).await, b"e");
    let (_far, mut other) = next(&mut at_east).await.split();
    assert_eq!(hear(&mut other).await, b"w");
    far.send(b"back").unwrap();
    assert_eq!(hear(&mut back).await, b"back");
    assert_eq!(west.links().len(), 1);
}

#[tokio::test]
async fn who_does_not_read_loses_his_own_datagrams_only() {
    let root = root();
    let deliver = echo().await;
    let (west, _, _) = start(&root, "west", deliver);
    let (east, mut flows, metrics) = start(&root, "east", deliver);
    let to = east.address().unwrap();
    let (slow, _) = west.dial_flow(to, None).await.unwrap().split();
    let (quick, _) = west.dial_flow(to, None).await.unwrap().split();
    slow.send(b"0").unwrap();
    let (_keep, mut unread) = next(&mut flows).await.split();
    quick.send(b"0").unwrap();
    let (_far, mut read) = next(&mut flows).await.split();
    hear(&mut read).await;
    for i in 0..1000u32 {
        slow.send(&i.to_be_bytes()).unwrap();
        quick.send(&i.to_be_bytes()).unwrap();
        hear(&mut read).await;
    }
    eventually("the rest is dropped", || metrics.dropped_datagrams.get() >= 1000 - 256).await;
    let mut kept = 0;
    while unread.try_recv().is_ok() {
        kept += 1;
    }
    assert_eq!(kept, 256);
}

#[tokio::test]
async fn tcp_does_not_stand_in() {
    let root = root();
    let deliver = echo().await;
    let (west, _, _) = start(&root, "west", deliver);
    // TCP on this port answers, UDP does not.
    let e = west.dial_flow(deliver, Some(&id("east"))).await.unwrap_err();
    assert!(e.to_string().contains("let UDP to that port pass"), "{e}");
    assert_eq!(west.path(deliver), Path::Tcp);
    assert!(west.dial_flow_to(&id("east")).await.is_err());
    let (east, _, _) = start(&root, "east", deliver);
    let e = west.dial_flow(east.address().unwrap(), Some(&id("north"))).await.unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::PermissionDenied);
}
