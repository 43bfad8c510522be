//! Datagrams through the proxy.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mesh_model::proxy::*;
use mesh_proxy::{EngineOptions, Hooks};
use tokio::net::UdpSocket;

use crate::support::*;

const C: &str = "outbound|53/udp||dns.books.svc.cluster.local";

/// Answers each datagram with its name, the port that it came from, and the datagram.
pub(crate) async fn echo(name: &'static str) -> SocketAddr {
    let s = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = s.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buf = vec![0; 65_536];
        loop {
            let Ok((n, from)) = s.recv_from(&mut buf).await else { continue };
            let mut answer = format!("{name} {} ", from.port()).into_bytes();
            answer.extend_from_slice(&buf[..n]);
            let _ = s.send_to(&answer, from).await;
        }
    });
    at
}

fn udp(config: UdpProxy) -> Listener {
    Listener { udp: Some(Box::new(config)), ..listener(Direction::Outbound, vec![]) }
}

fn proxy(hosts: &[SocketAddr], config: UdpProxy) -> Proxy {
    Proxy::new().cluster(cluster(C, hosts)).listener(udp(config))
}

pub(crate) struct Client(UdpSocket);

impl Client {
    pub(crate) async fn new(p: &Proxy) -> Self {
        Self::of(p.address("l")).await
    }

    pub(crate) async fn of(to: SocketAddr) -> Self {
        let s = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        s.connect(to).await.unwrap();
        Self(s)
    }

    pub(crate) async fn send(&self, data: &[u8]) {
        self.0.send(data).await.unwrap();
    }

    /// The next datagram's text; `None` if none comes in time.
    pub(crate) async fn hear(&self, within: Duration) -> Option<String> {
        let mut buf = vec![0; 65_536];
        let n = tokio::time::timeout(within, self.0.recv(&mut buf)).await.ok()?.ok()?;
        Some(String::from_utf8_lossy(&buf[..n]).into_owned())
    }

    /// Name and port of who answered.
    pub(crate) async fn ask(&self, data: &str) -> (String, String) {
        self.send(data.as_bytes()).await;
        let answer = self.hear(WAIT).await.expect("an answer");
        let mut words = answer.splitn(3, ' ').map(str::to_owned);
        let who = (words.next().unwrap(), words.next().unwrap());
        assert_eq!(words.next().as_deref(), Some(data));
        who
    }
}

/// Value of a metric with all of these parts; zero if there is none.
pub(crate) fn count(p: &Proxy, parts: &[&str]) -> u64 {
    let all = p.metrics();
    let found = all.lines().filter(|l| parts.iter().all(|p| l.contains(p)));
    found.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

pub(crate) async fn until(what: &str, mut f: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + WAIT;
    while !f() {
        assert!(tokio::time::Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn dropped(p: &Proxy, kind: &str) -> u64 {
    count(p, &["flotilla_udp_dropped_total", &format!("kind=\"{kind}\"")])
}

#[tokio::test]
async fn a_session_keeps_its_host_and_port() {
    let hosts = [echo("a").await, echo("b").await];
    let p = proxy(&hosts, UdpProxy::to(C)).run();
    let (one, two) = (Client::new(&p).await, Client::new(&p).await);
    let (first, second) = (one.ask("x").await, two.ask("x").await);
    assert_ne!(first.0, second.0, "sessions take turns");
    for i in 0..20 {
        assert_eq!(one.ask(&i.to_string()).await, first);
        assert_eq!(two.ask(&i.to_string()).await, second);
    }
    assert_eq!(count(&p, &["flotilla_udp_sessions_opened_total", C]), 2);
    for hop in ["downstream_rx", "upstream_tx", "upstream_rx", "downstream_tx"] {
        let kind = format!("kind=\"{hop}\"");
        // A client may hear of a datagram before it is counted.
        until(hop, || count(&p, &["flotilla_udp_datagrams_total", &kind]) == 42).await;
    }
    assert_eq!(count(&p, &["flotilla_udp_bytes_total", "kind=\"downstream_rx\""]), 62);
    assert_eq!(p.engine.status().clusters[C].connections, 2);
}

#[tokio::test]
async fn idle_sessions_end_and_are_logged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let log = AccessLog::File(FileLog {
        path: path.display().to_string(),
        format: AccessLogFormat::Text(
            "%PROTOCOL% %BYTES_RECEIVED% %BYTES_SENT% %UPSTREAM_HOST% %DOWNSTREAM_LOCAL_ADDRESS% \
             %CONNECTION_TERMINATION_DETAILS%\n"
                .into(),
        ),
        omit_empty: false,
    });
    let host = echo("a").await;
    let config =
        UdpProxy { idle_timeout: Duration::from_millis(500), access_log: vec![log], ..UdpProxy::to(C) };
    let p = proxy(&[host], config).run();
    let c = Client::new(&p).await;
    let (_, port) = c.ask("hello").await;
    // What passes keeps the session, whichever way.
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(c.ask("hello").await.1, port);
    }
    until("the session ends", || p.engine.status().clusters[C].connections == 0).await;
    assert_eq!(count(&p, &["flotilla_udp_sessions_closed_total", "kind=\"idle\""]), 1);
    let (_, other) = c.ask("again").await;
    assert_ne!(other, port, "a new session has a socket of its own");
    until("a line", || std::fs::read_to_string(&path).is_ok_and(|s| s.ends_with('\n'))).await;
    let line = std::fs::read_to_string(&path).unwrap();
    let sent = 9 * (format!("a {port} hello").len());
    let expected = format!("UDP 45 {sent} {host} {} idle_timeout", p.address("l"));
    assert_eq!(line.lines().next(), Some(expected.as_str()));
}

#[tokio::test]
async fn sessions_move_when_their_host_leaves_or_falls_ill() {
    let (a, b) = (echo("a").await, echo("b").await);
    let mut p = proxy(&[a, b], UdpProxy::to(C)).run();
    let clients: Vec<Client> = futures::future::join_all((0..4).map(|_| Client::new(&p))).await;
    let mut before = BTreeMap::new();
    for (i, c) in clients.iter().enumerate() {
        before.insert(i, c.ask("x").await);
    }
    assert!(before.values().any(|w| w.0 == "a") && before.values().any(|w| w.0 == "b"), "{before:?}");
    // a leaves: its sessions end at once, without a datagram.
    p.snap.clusters.insert(C.into(), Arc::new(cluster(C, &[b])));
    assert_eq!(p.apply().rejected, []);
    until("sessions of a end", || p.engine.status().clusters[C].connections == 2).await;
    for (i, c) in clients.iter().enumerate() {
        let who = c.ask("y").await;
        assert_eq!(who.0, "b");
        assert_eq!(before[&i].0 == "b", who == before[&i], "those of b stay where they were");
    }
    // b is ill and a is back.
    let mut both = cluster(C, &[a, b]);
    let Discovery::Static(l) = &mut both.discovery else { panic!() };
    l.localities[0].endpoints[1].health = EndpointHealth::Unhealthy;
    p.snap.clusters.insert(C.into(), Arc::new(both));
    assert_eq!(p.apply().rejected, []);
    for c in &clients {
        assert_eq!(c.ask("z").await.0, "a");
    }
    // Nobody is left: dropped, counted, and served again when there is somebody.
    p.snap.clusters.insert(C.into(), Arc::new(cluster(C, &[])));
    assert_eq!(p.apply().rejected, []);
    clients[0].send(b"lost").await;
    until("no host", || dropped(&p, "no_host") > 0).await;
    p.snap.clusters.insert(C.into(), Arc::new(cluster(C, &[b])));
    assert_eq!(p.apply().rejected, []);
    assert_eq!(clients[0].ask("found").await.0, "b");
    // Without the cluster.
    p.snap.clusters.clear();
    assert_eq!(p.apply().rejected, []);
    clients[0].send(b"lost").await;
    until("no cluster", || dropped(&p, "no_cluster") > 0).await;
}

#[tokio::test]
async fn what_is_beyond_a_limit_is_dropped_and_counted() {
    let host = echo("a").await;
    let mut limited = cluster(C, &[host]);
    limited.limits.max_connections = 2;
    let p = proxy(&[], UdpProxy::to(C)).cluster(limited).run();
    let (one, two, three) = (Client::new(&p).await, Client::new(&p).await, Client::new(&p).await);
    one.ask("x").await;
    two.ask("x").await;
    three.send(b"x").await;
    until("cluster_limit", || dropped(&p, "cluster_limit") == 1).await;
    assert_eq!(three.hear(Duration::from_millis(100)).await, None);
    one.ask("still").await;

    let options = EngineOptions { max_udp_sessions: 1, ..EngineOptions::default() };
    let p = Proxy::with(options, Hooks::default())
        .cluster(cluster(C, &[host]))
        .listener(udp(UdpProxy { idle_timeout: Duration::from_millis(300), ..UdpProxy::to(C) }))
        .run();
    let (one, two) = (Client::new(&p).await, Client::new(&p).await);
    one.ask("x").await;
    two.send(b"x").await;
    until("session_limit", || dropped(&p, "session_limit") == 1).await;
    // A place becomes free with the session that had it.
    until("idle", || count(&p, &["flotilla_udp_sessions_closed_total", "kind=\"idle\""]) == 1).await;
    two.ask("now").await;
}

#[tokio::test]
async fn datagrams_longer_than_allowed_are_dropped_in_both_directions() {
    let host = echo("a").await;
    let p = proxy(&[host], UdpProxy { max_upstream: 1500, ..UdpProxy::to(C) }).run();
    let c = Client::new(&p).await;
    c.ask("x").await;
    c.send(&[b'y'; 1501]).await;
    until("from the client", || dropped(&p, "truncated") == 1).await;
    // 1500 are allowed, but the answer is longer than that.
    c.send(&[b'y'; 1500]).await;
    until("from the host", || dropped(&p, "truncated") == 2).await;
    assert_eq!(c.hear(Duration::from_millis(50)).await, None);
    // As a first datagram.
    Client::new(&p).await.send(&[b'y'; 1501]).await;
    until("without a session", || dropped(&p, "truncated") == 3).await;
    assert_eq!(count(&p, &["flotilla_udp_sessions_opened_total"]), 1);

    let p = proxy(&[host], UdpProxy { max_downstream: 65_535, ..UdpProxy::to(C) }).run();
    let c = Client::new(&p).await;
    c.ask(&"z".repeat(60_000)).await;
    c.ask("").await;
}

#[tokio::test]
async fn hashes_choose_hosts() {
    let hosts = [echo("a").await, echo("b").await, echo("c").await, echo("d").await];
    for hash in [Some(UdpHash::SourceIp), Some(UdpHash::Key("k".into())), None] {
        let ring = Cluster { lb: LbPolicy::Maglev(4099), ..cluster(C, &hosts) };
        let config = UdpProxy { hash: hash.clone(), ..UdpProxy::to(C) };
        let p = Proxy::new().cluster(ring).listener(udp(config)).run();
        let mut seen = BTreeMap::new();
        for _ in 0..32 {
            *seen.entry(Client::new(&p).await.ask("x").await.0).or_insert(0) += 1;
        }
        assert_eq!(seen.len() == 1, hash.is_some(), "{hash:?}: {seen:?}");
    }
}

#[tokio::test]
async fn each_datagram_on_its_own() {
    let hosts = [echo("a").await, echo("b").await];
    let p = proxy(&hosts, UdpProxy { per_packet: true, ..UdpProxy::to(C) }).run();
    let c = Client::new(&p).await;
    let mut seen = BTreeMap::new();
    for _ in 0..10 {
        let (name, port) = c.ask("x").await;
        seen.entry(name).or_insert_with(Vec::new).push(port);
    }
    assert_eq!(seen.values().map(Vec::len).collect::<Vec<_>>(), [5, 5]);
    for ports in seen.values() {
        assert!(ports.iter().all(|p| *p == ports[0]), "one session for each host: {seen:?}");
    }
}

#[tokio::test]
async fn a_host_that_refuses_costs_the_datagram_and_nothing_else() {
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = dead.local_addr().unwrap();
    drop(dead);
    let p = proxy(&[at], UdpProxy::to(C)).run();
    let c = Client::new(&p).await;
    // What ICMP told about one datagram is known when the next one is sent.
    while dropped(&p, "receive_error") == 0 {
        c.send(b"x").await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The server starts; the session goes on.
    let s = UdpSocket::bind(at).await.unwrap();
    c.send(b"y").await;
    let mut buf = [0; 16];
    let (n, _) = tokio::time::timeout(WAIT, s.recv_from(&mut buf)).await.expect("it comes").unwrap();
    assert_eq!(&buf[..n], b"y");
    assert_eq!(count(&p, &["flotilla_udp_sessions_opened_total"]), 1);
}

#[tokio::test]
async fn a_hosts_own_datagrams_and_any_address() {
    // Bound to every address, of either family; the answer comes from the one that was asked.
    for bind in ["0.0.0.0:0", "[::]:0"] {
        let host = echo("a").await;
        let l = Listener { address: bind.parse().unwrap(), ..udp(UdpProxy::to(C)) };
        let p = Proxy::new().cluster(cluster(C, &[host])).listener(l).run();
        let port = p.address("l").port();
        for ip in [Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 9, 8, 7)] {
            let s = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            // Connected: an answer from elsewhere would not arrive.
            s.connect((ip, port)).await.unwrap();
            let c = Client(s);
            assert_eq!(c.ask("x").await.0, "a", "{bind} {ip}");
        }
    }
}

#[tokio::test]
async fn several_workers_and_a_change_of_cluster() {
    // Also free as a port of TCP, and nobody else gets it until it is needed.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (a, b) = (echo("a").await, echo("b").await);
    let options = EngineOptions { workers: 3, ..EngineOptions::default() };
    let mut p = Proxy::with(options, Hooks::default())
        .cluster(cluster(C, &[a]))
        .cluster(cluster("other", &[b]))
        .listener(Listener { address: port.local_addr().unwrap(), ..udp(UdpProxy::to(C)) })
        .run();
    let clients: Vec<Client> = futures::future::join_all((0..24).map(|_| Client::new(&p))).await;
    let mut before = Vec::new();
    for c in &clients {
        before.push(c.ask("x").await);
    }
    for (c, b) in clients.iter().zip(&before) {
        assert_eq!(&c.ask("y").await, b);
    }
    // An update that changes nothing of it leaves sessions alone.
    p.snap.clusters.insert("third".into(), Arc::new(cluster("third", &[a])));
    assert_eq!(p.apply().rejected, []);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(clients[0].ask("y").await, before[0]);
    let address = p.address("l");
    p.snap.listeners.insert("l".into(), Arc::new(Listener { address, ..udp(UdpProxy::to("other")) }));
    assert_eq!(p.apply().rejected, []);
    assert_eq!(p.address("l"), address, "the socket stays");
    until("sessions end", || p.engine.status().clusters[C].connections == 0).await;
    for c in &clients {
        assert_eq!(c.ask("z").await.0, "b");
    }
    // A TCP listener may have the same address; two of UDP may not.
    let same = |name: &str, udp| Listener {
        name: name.into(),
        address,
        udp,
        ..listener(Direction::Outbound, vec![])
    };
    let twin = same("twin", Some(Box::new(UdpProxy::to(C))));
    p.snap.listeners.insert("twin".into(), Arc::new(twin));
    let tcp = Listener { filter_chains: vec![chain(vec![tcp_filter(C)])], ..same("tcp", None) };
    p.snap.listeners.insert("tcp".into(), Arc::new(tcp));
    p.snap.listeners.insert("l".into(), Arc::new(same("l", Some(Box::new(UdpProxy::to(C))))));
    drop(port);
    let report = p.apply();
    assert_eq!(report.rejected.len(), 1, "{report:?}");
    assert_eq!(report.rejected[0].1, "twin");
}

#[tokio::test]
async fn a_host_that_is_reached_with_tls_gets_nothing_in_clear() {
    let host = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut c = cluster(C, &[host.local_addr().unwrap()]);
    c.tls = Some(Box::new(UpstreamTls {
        certificate: None,
        validation: Validation { trusted: None, sans: vec![], crl: None },
        sni: String::new(),
        by_name: false,
        alpn: vec![],
    }));
    let p = proxy(&[], UdpProxy::to(C)).cluster(c).run();
    Client::new(&p).await.send(b"secret").await;
    until("no_host", || dropped(&p, "no_host") == 1).await;
    assert!(host.try_recv(&mut [0; 16]).is_err());
}
