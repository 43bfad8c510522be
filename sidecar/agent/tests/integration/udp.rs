//! The UDP proxy beside Envoy's, by the same configuration.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use mesh_model::proxy::*;
use tokio::net::UdpSocket;

use crate::side_by_side::{Pair, cluster};

/// Answers with its name, the client's port as it sees it, and the length of the datagram; `big` gets that many bytes.
async fn echo(name: &'static str) -> SocketAddr {
    let s = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = s.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buf = vec![0; 65_536];
        while let Ok((n, from)) = s.recv_from(&mut buf).await {
            let text = String::from_utf8_lossy(&buf[..n]).into_owned();
            let answer = match text.strip_prefix("big ").and_then(|n| n.parse::<usize>().ok()) {
                Some(n) => "x".repeat(n),
                None => format!("{name} {} {n}", from.port()),
            };
            let _ = s.send_to(answer.as_bytes(), from).await;
        }
    });
    at
}

struct Client(UdpSocket);

impl Client {
    async fn to(at: SocketAddr) -> Self {
        let s = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        s.connect(at).await.unwrap();
        Self(s)
    }

    /// The answer; nothing if none comes in a third of a second.
    async fn ask(&self, data: &str) -> Option<String> {
        let mut buf = vec![0; 65_536];
        self.0.send(data.as_bytes()).await.ok()?;
        let heard = tokio::time::timeout(Duration::from_millis(333), self.0.recv(&mut buf)).await;
        Some(String::from_utf8_lossy(&buf[..heard.ok()?.ok()?]).into_owned())
    }
}

async fn ready(p: &Pair) {
    for at in [p.engine, p.envoy] {
        let mut tries = 0;
        while Client::to(at).await.ask("ready?").await.is_none() {
            // Refused at once while nobody listens.
            tokio::time::sleep(Duration::from_millis(50)).await;
            tries += 1;
            assert!(tries < 200, "{at} does not answer");
        }
    }
}

/// Hosts of one cluster.
fn several(hosts: &[SocketAddr], lb: LbPolicy) -> Cluster {
    let mut c = cluster("up", hosts[0], UpstreamHttp::Http1);
    let Discovery::Static(a) = &mut c.discovery else { panic!() };
    for h in &hosts[1..] {
        let e = LbEndpoint { port: h.port(), ..a.localities[0].endpoints[0].clone() };
        a.localities[0].endpoints.push(e);
    }
    Cluster { lb, ..c }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn sessions_sizes_and_idle_ends() {
    let hosts = [echo("a").await, echo("b").await];
    let config = UdpProxy { idle_timeout: Duration::from_millis(800), ..UdpProxy::to("up") };
    let p = Pair::udp(config, vec![several(&hosts, LbPolicy::RoundRobin)]);
    ready(&p).await;
    let mut seen = Vec::new();
    for at in [p.engine, p.envoy] {
        let mut out: Vec<String> = Vec::new();
        let c = Client::to(at).await;
        let first = c.ask("x").await.unwrap();
        let same = c.ask("x").await.as_ref() == Some(&first);
        out.push(format!("a session keeps its port: {same}"));
        for n in [1500, 1501, 4000] {
            let heard = c.ask(&"y".repeat(n)).await.is_some();
            out.push(format!("{n} bytes from the client: {heard}"));
        }
        for n in [0, 1500, 1501] {
            let heard = c.ask(&format!("big {n}")).await.map(|a| a.len());
            out.push(format!("{n} bytes from the host: {heard:?}"));
        }
        out.push(format!("nothing at all: {:?}", c.ask("").await.map(|a| a.ends_with(" 0"))));
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let other = c.ask("x").await.unwrap();
        out.push(format!(
            "another port after idling: {}",
            other.split(' ').nth(1) != first.split(' ').nth(1)
        ));
        let mut names = BTreeSet::new();
        for _ in 0..6 {
            let a = Client::to(at).await.ask("x").await.unwrap();
            names.insert(a.split(' ').next().unwrap().to_owned());
        }
        out.push(format!("hosts: {names:?}"));
        seen.push(out);
    }
    println!("{}", seen[0].join("\n"));
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn hashes_and_datagrams_on_their_own() {
    let hosts = [echo("a").await, echo("b").await, echo("c").await];
    let maglev = LbPolicy::Maglev(65_537);
    let of = |c: UdpProxy| UdpProxy { max_downstream: 9000, ..c };
    for (what, config, lb, expected) in [
        ("source", UdpProxy { hash: Some(UdpHash::SourceIp), ..UdpProxy::to("up") }, maglev, 1),
        ("key", UdpProxy { hash: Some(UdpHash::Key("k".into())), ..UdpProxy::to("up") }, maglev, 1),
        ("no hash", UdpProxy::to("up"), LbPolicy::RoundRobin, 3),
        ("each", UdpProxy { per_packet: true, ..UdpProxy::to("up") }, LbPolicy::RoundRobin, 3),
    ] {
        let p = Pair::udp(of(config), vec![several(&hosts, lb)]);
        ready(&p).await;
        for at in [p.engine, p.envoy] {
            let one = Client::to(at).await;
            let mut names = BTreeSet::new();
            for _ in 0..9 {
                let other = Client::to(at).await;
                let a = if what == "each" { &one } else { &other }.ask(&"z".repeat(8000)).await.unwrap();
                names.insert(a.split(' ').next().unwrap().to_owned());
            }
            assert_eq!(names.len(), expected, "{what} at {at}: {names:?}");
        }
    }
}
