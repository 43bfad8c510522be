//! What is about datagrams.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::Duration,
};

use mesh_model::proxy::ClientCertificate;
use mesh_proxy::{EngineOptions, Hooks};

use super::{client::*, *};

#[tokio::test]
async fn datagrams_of_any_kind_do_not_stop_a_listener() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let p = simple_gateway(&ca, app.address);
    let before = Client::new(&ca, &p, "a.test").await;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for i in 0..20_000u32 {
        let len = (random() % 1400) as usize;
        let mut d: Vec<u8> = (0..len).map(|_| random() as u8).collect();
        // Heads that are taken seriously: Initial, 0-RTT, Handshake and Retry of version 1, another version, and a
        // short header.
        let first = [0xc0, 0xd0, 0xe0, 0xf0, 0xc3, 0x40];
        if let (Some(head), true) = (d.first_chunk_mut::<7>(), i % 8 != 0) {
            let kind = first[(random() % 6) as usize];
            let version = if i % 16 == 1 { random() as u8 } else { 1 };
            *head = [kind, 0, 0, 0, version, (random() % 22) as u8, random() as u8];
        }
        if i % 3 == 0 {
            d.resize(1200, 0);
        }
        let _ = socket.send_to(&d, p.address("l"));
        if i % 256 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    for client in [before, Client::new(&ca, &p, "a.test").await] {
        assert_eq!(client.get("/h").await.unwrap().0.status(), 200);
    }
    assert!(p.engine.status().connections_total >= 2);
}

/// A path to the gateway that loses every answer, and remembers what kind the last one was of.
fn one_way(to: SocketAddr) -> (SocketAddr, Arc<AtomicU8>) {
    let client_side = UdpSocket::bind("127.0.0.1:0").unwrap();
    let server_side = UdpSocket::bind("127.0.0.1:0").unwrap();
    server_side.connect(to).unwrap();
    let (address, out) = (client_side.local_addr().unwrap(), server_side.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut buf = [0; 2000];
        while let Ok(n) = client_side.recv(&mut buf) {
            let _ = out.send(&buf[..n]);
        }
    });
    let last = Arc::new(AtomicU8::new(0));
    let seen = Arc::clone(&last);
    std::thread::spawn(move || {
        let mut buf = [0; 2000];
        while let Ok(n) = server_side.recv(&mut buf) {
            if n > 0 {
                seen.store(buf[0] & 0xf0, Relaxed);
            }
        }
    });
    (address, last)
}

#[tokio::test]
async fn strangers_must_show_their_address_when_there_are_many() {
    const RETRY: u8 = 0xf0;
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let p = simple_gateway(&ca, app.address);
    let endpoint = udp();
    // The sockets of all these clients are gone for the server, as with forged addresses.
    let mut attempts = vec![];
    let mut kinds = vec![];
    for _ in 0..80 {
        let (via, kind) = one_way(p.address("l"));
        attempts.push(endpoint.connect_with(quic_config(&ca, "a.test", false), via, "a.test").unwrap());
        kinds.push(kind);
    }
    let deadline = tokio::time::Instant::now() + WAIT;
    let retried = || kinds.iter().filter(|k| k.load(Relaxed) == RETRY).count();
    while retried() < 16 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(retried(), 16, "all but the first 64");
    // Whoever is where it says gets in all the same.
    let client = Client::new(&ca, &p, "a.test").await;
    assert_eq!(client.get("/h").await.unwrap().0.status(), 200);
    drop(attempts);
}

#[tokio::test]
async fn a_client_that_moves_keeps_its_connection() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let options = EngineOptions { workers: 4, ..EngineOptions::default() };
    let chains = vec![chain_for(&["a.test"], "up", ClientCertificate::None)];
    let p = gateway(Proxy::with(options, Hooks::default()), &ca, app.address, chains);
    let client = Client::new(&ca, &p, "a.test").await;
    // Nobody may move before the handshake is confirmed (RFC 9000 section 9), as an answer shows.
    assert_eq!(client.get("/here").await.unwrap().0.status(), 200);
    // Each new port reaches the worker of the connection with a probability of one in four.
    for i in 0..12 {
        client.move_away();
        assert_eq!(client.get(&format!("/{i}")).await.unwrap().0.status(), 200, "move {i}");
    }
    assert_eq!(p.engine.status().connections_total, 1);
}

#[tokio::test]
async fn nothing_is_served_before_a_handshake() {
    let app = Upstream::new("app").await;
    let ca = Ca::new();
    let p = simple_gateway(&ca, app.address);
    let (endpoint, config) = (udp(), quic_config(&ca, "a.test", false));
    let first = Client::over(endpoint.clone(), config.clone(), p.address("l"), "a.test").await.unwrap();
    assert_eq!(first.get("/h").await.unwrap().0.status(), 200);
    // A ticket, and no early data with it.
    let again = endpoint.connect_with(config, p.address("l"), "a.test").unwrap();
    assert!(again.into_0rtt().is_err());
}
