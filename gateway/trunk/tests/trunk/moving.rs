//! Gateways whose address changes, and gateways with several runtimes.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_trunk::{DeliverTo, Trunk, TrunkMetrics, TrunkOptions};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
};

use crate::support::{echo, gateway, greeted, id, options, ping, root, start};

/// Passes datagrams between one client and `to`, from a port that changes whenever it is told.
async fn nat(to: SocketAddr, mut change: tokio::sync::mpsc::Receiver<()>) -> SocketAddr {
    let inside = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = inside.local_addr().unwrap();
    tokio::spawn(async move {
        let mut outside = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (mut client, mut up, mut down) = (None, vec![0; 65_536], vec![0; 65_536]);
        loop {
            tokio::select! {
                c = change.recv() => {
                    if c.is_none() { return }
                    outside = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
                }
                r = inside.recv_from(&mut up) => {
                    let (n, from) = r.unwrap();
                    client = Some(from);
                    let _ = outside.send_to(&up[..n], to).await;
                }
                r = outside.recv_from(&mut down) => {
                    let (n, _) = r.unwrap();
                    if let Some(c) = client { let _ = inside.send_to(&down[..n], c).await; }
                }
            }
        }
    });
    address
}

/// A session goes on through `changes` of the dialling side's port.
async fn moves(east_workers: usize, west_workers: usize, changes: usize) {
    let root = root();
    let deliver = echo().await;
    let at = "127.0.0.1:0".parse().unwrap();
    let start = |cluster: &str, workers| {
        let options = TrunkOptions { workers, ..options(at, deliver) };
        Trunk::start(options, &gateway(&root, &root, cluster), TrunkMetrics::default()).unwrap()
    };
    let (west, east) = (start("west", west_workers), start("east", east_workers));
    let (change, changed) = mpsc::channel(1);
    let through = nat(east.address().unwrap(), changed).await;
    let mut s = west.dial(through, Some(&id("east"))).await.unwrap();
    greeted(&mut s).await;
    let mut seen = vec![east.links()[0].address];
    for _ in 0..changes {
        change.send(()).await.unwrap();
        let begun = Instant::now();
        ping(&mut s).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        seen.push(east.links()[0].address);
    }
    seen.dedup();
    assert!(seen.len() == changes + 1, "the peer saw {seen:?}");
    assert_eq!((east.links().len(), west.links()[0].sessions_total), (1, 1));
}

#[tokio::test]
async fn sessions_go_on_when_the_dialling_side_gets_another_address() {
    moves(0, 0, 3).await;
}

/// The kernel gives every second new port to another socket than the connection's, so a way that leads wrong is found.
#[tokio::test]
async fn sessions_go_on_when_another_socket_hears_of_them() {
    moves(4, 2, 12).await;
}

#[tokio::test]
async fn runtimes_share_the_connections_and_end_with_the_trunk() {
    let root = root();
    let deliver = echo().await;
    let options = TrunkOptions { workers: 3, ..options("127.0.0.1:0".parse().unwrap(), deliver) };
    let west = Trunk::start(options, &gateway(&root, &root, "west"), TrunkMetrics::default()).unwrap();
    let secrets = gateway(&root, &root, "east");
    // All of them at once, of which each runtime dials some.
    let easts: Vec<Trunk> = (0..6).map(|_| start(&secrets, deliver)).collect();
    let mut sessions = Vec::new();
    for (n, east) in easts.iter().enumerate() {
        let begun = Instant::now();
        // A machine that is busy for two seconds has TCP stand in until the next attempt.
        let s = loop {
            let mut s = west.dial(east.address().unwrap(), Some(&id("east"))).await.unwrap();
            greeted(&mut s).await;
            if west.links().len() > n {
                break s;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{} of {} links", west.links().len(), n + 1);
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        sessions.push(s);
    }
    assert_eq!(west.links().len(), 6);
    west.close().await;
    for s in &mut sessions {
        let begun = Instant::now();
        assert!(ping(s).await.is_err());
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn sessions_are_handed_over_as_they_are() {
    let root = root();
    let (to, mut sessions) = mpsc::channel(1);
    let at: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let options = TrunkOptions { deliver_to: DeliverTo::Channel(to), workers: 1, ..options(at, at) };
    let east = Trunk::start(options, &gateway(&root, &root, "east"), TrunkMetrics::default()).unwrap();
    let west = start(&gateway(&root, &root, "west"), at);
    let mut s = west.dial(east.address().unwrap(), Some(&id("east"))).await.unwrap();
    s.write_all(b"ask").await.unwrap();
    s.shutdown().await.unwrap();
    let (mut other, peer) = sessions.recv().await.unwrap();
    assert_eq!(peer, west.address().unwrap());
    let mut heard = Vec::new();
    other.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"ask");
    // The other direction is still open.
    other.write_all(b"answer").await.unwrap();
    drop(other);
    heard.clear();
    s.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"answer");
}
