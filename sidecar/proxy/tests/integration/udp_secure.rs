//! Datagrams between two proxies over QUIC, directly and through one that passes the connection on.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_model::proxy::*;
use mesh_proxy::{DatagramFlow, Dialer, EngineOptions, FlowError, FlowSender, HookFuture, Hooks, NodeInfo};
use tokio::{net::UdpSocket, sync::mpsc};

use crate::{
    support::*,
    udp::{Client, count, dropped, echo, until},
};

const C: &str = "outbound|53/udp||dns.books.svc.cluster.local";
const IN: &str = "inbound|5353/udp||";
const NAME: &str = "outbound_.53_._.dns.books.svc.east.clusterset.local";
const CALLER: &str = "spiffe://mesh.local/ns/books/sa/reviews";
const SERVER: &str = "spiffe://mesh.local/ns/books/sa/dns";

fn proxy_chain(cluster: &str, names: &[&str], before: Vec<NetworkFilter>) -> FilterChain {
    let mut filters = before;
    let udp = UdpProxy { max_downstream: u16::MAX, ..UdpProxy::to(cluster) };
    filters.push(NetworkFilter::Udp(Box::new(udp)));
    let mut c = chain(filters);
    c.name = cluster.into();
    c.matches.server_names = names.iter().map(|n| (*n).to_owned()).collect();
    c
}

fn plain(direction: Direction, chains: Vec<FilterChain>) -> Listener {
    Listener { inspect_tls: false, inspect_http: false, ..listener(direction, chains) }
}

/// The workload's proxy in front of `app`.
fn server(ca: &Ca, cluster_id: &str, app: SocketAddr, rules: Vec<NetworkFilter>) -> Proxy {
    let mut c = proxy_chain(IN, &[NAME, &format!("*.{NAME}")], rules);
    c.tls = Some(downstream_mtls());
    let l = Listener { quic: Some(QuicOptions::default()), ..plain(Direction::Inbound, vec![c]) };
    let node = NodeInfo { workload: "dns".into(), cluster: cluster_id.into(), ..NodeInfo::default() };
    let options = EngineOptions { node, ..EngineOptions::default() };
    let p = Proxy::with(options, Hooks::default()).cluster(cluster(IN, &[app])).listener(l);
    ca.enroll(&p.secrets, cluster_id, SERVER);
    p.run()
}

/// The caller's proxy.
fn caller(ca: &Ca, hosts: &[SocketAddr]) -> Proxy {
    let mut c = cluster(C, hosts);
    if let Discovery::Static(a) = &mut c.discovery {
        for (i, e) in a.localities[0].endpoints.iter_mut().enumerate() {
            // Each is of a cluster of its own.
            e.workload = format!("dns-v1;books;dns;v1;c{i}");
        }
    }
    c.tls = Some(Box::new(upstream_mtls(NAME, SERVER, &[UDP_ALPN])));
    c.outlier = Some(Box::new(OutlierDetection {
        consecutive_gateway: 1,
        max_percent: 100,
        ..OutlierDetection::default()
    }));
    let l = Listener {
        udp: Some(Box::new(UdpProxy { max_downstream: u16::MAX, ..UdpProxy::to(C) })),
        ..listener(Direction::Outbound, vec![])
    };
    let p = Proxy::new().cluster(c).listener(l);
    ca.enroll(&p.secrets, "west", CALLER);
    p.run()
}

/// A gateway that knows one name.
fn gateway(hosts: &[SocketAddr], to: &str, hooks: Hooks) -> Proxy {
    let chain = proxy_chain(to, &[NAME, &format!("*.{NAME}")], vec![]);
    let l = Listener { inspect_quic: true, ..plain(Direction::Unspecified, vec![chain]) };
    Proxy::with(EngineOptions::default(), hooks).cluster(cluster(to, hosts)).listener(l)
}

fn rbac(principal: Principal) -> NetworkFilter {
    let policy =
        RbacPolicy { permissions: vec![Permission::DestinationPort(5353)], principals: vec![principal] };
    NetworkFilter::Rbac(Rbac {
        rules: Some(RbacRules { action: RbacAction::Allow, policies: [("p".to_owned(), policy)].into() }),
        ..Rbac::default()
    })
}

#[tokio::test]
async fn sessions_share_a_connection_and_keep_apart() {
    let ca = Ca::new();
    let s = server(&ca, "west", echo("a").await, vec![]);
    let p = caller(&ca, &[s.address("l")]);
    let clients = [Client::new(&p).await, Client::new(&p).await, Client::new(&p).await];
    let mut ports = Vec::new();
    for c in &clients {
        let (name, port) = c.ask("first").await;
        assert_eq!(name, "a");
        assert_eq!(c.ask("second").await.1, port, "a session keeps its socket");
        ports.push(port);
    }
    ports.dedup();
    assert_eq!(ports.len(), 3);
    assert_eq!(s.engine.status().connections_total, 1);
    assert_eq!(count(&p, &["flotilla_udp_sessions_opened_total", C]), 3);
    assert_eq!(count(&s, &["flotilla_udp_sessions_opened_total", IN]), 3);
    // Nothing at all, what a frame does not hold, and the longest that there is.
    assert_eq!(clients[0].ask("").await.0, "a");
    for len in [1100, 1300, 5_000, 60_000] {
        assert_eq!(clients[1].ask(&"x".repeat(len)).await.0, "a", "{len} bytes");
    }
    until("the ends are told", || {
        s.engine.status().clusters[IN].connections == 3 && p.engine.status().clusters[C].connections == 3
    })
    .await;
}

#[tokio::test]
async fn a_session_that_ends_here_ends_there() {
    let ca = Ca::new();
    let s = server(&ca, "west", echo("a").await, vec![]);
    let mut p = caller(&ca, &[s.address("l")]);
    let config = UdpProxy { idle_timeout: Duration::from_millis(300), ..UdpProxy::to(C) };
    p = p.listener(Listener { udp: Some(Box::new(config)), ..listener(Direction::Outbound, vec![]) }).run();
    Client::new(&p).await.ask("x").await;
    assert_eq!(s.engine.status().clusters[IN].connections, 1);
    until("both have ended", || {
        s.engine.status().clusters[IN].connections == 0 && p.engine.status().clusters[C].connections == 0
    })
    .await;
    assert_eq!(s.engine.status().connections, 1, "the connection stays");
}

#[tokio::test]
async fn rules_are_about_the_peer_its_cluster_and_the_workloads_port() {
    let ca = Ca::new();
    let who = |p: &str| Principal::Authenticated(Some(StringMatch::exact(p)));
    let from = |c: &str| Principal::SourceCluster(StringMatch::exact(c));
    for (rule, allowed) in
        [(who(CALLER), true), (who(SERVER), false), (from("west"), true), (from("east"), false)]
    {
        let s = server(&ca, "west", echo("a").await, vec![rbac(rule.clone())]);
        let p = caller(&ca, &[s.address("l")]);
        let c = Client::new(&p).await;
        if allowed {
            c.ask("x").await;
            continue;
        }
        c.send(b"x").await;
        until("the refusal", || {
            // Each is dropped where the last one said no.
            dropped(&p, "denied") > 0 || {
                let _ = futures::FutureExt::now_or_never(c.send(b"y"));
                false
            }
        })
        .await;
        assert_eq!(c.hear(Duration::from_millis(100)).await, None, "{rule:?}");
        assert_eq!(count(&s, &["flotilla_udp_sessions_opened_total", IN]), 0);
    }
}

#[tokio::test]
async fn a_rule_that_comes_later_holds_for_connections_that_are_there() {
    let ca = Ca::new();
    let app = echo("a").await;
    let s = server(&ca, "west", app, vec![]);
    let p = caller(&ca, &[s.address("l")]);
    let c = Client::new(&p).await;
    c.ask("x").await;
    let mut chain = proxy_chain(IN, &[NAME], vec![rbac(Principal::Not(Box::new(Principal::Any)))]);
    chain.tls = Some(downstream_mtls());
    let l = Listener { quic: Some(QuicOptions::default()), ..plain(Direction::Inbound, vec![chain]) };
    let s = s.listener(l).run();
    until("it is refused", || {
        let _ = futures::FutureExt::now_or_never(c.send(b"y"));
        dropped(&p, "denied") > 0
    })
    .await;
    assert_eq!(count(&s, &["flotilla_udp_sessions_closed_total", "kind=\"reconfigured\"", IN]), 1);
}

#[tokio::test]
async fn a_server_of_another_name_gets_nothing() {
    let ca = Ca::new();
    let s = server(&ca, "west", echo("a").await, vec![]);
    // The same address, with the certificate of somebody else.
    ca.enroll(&s.secrets, "west", "spiffe://mesh.local/ns/books/sa/stranger");
    let p = caller(&ca, &[s.address("l")]);
    let c = Client::new(&p).await;
    c.send(b"secret").await;
    // Its only host was ejected.
    until("it is dropped", || dropped(&p, "no_host") > 0).await;
    assert_eq!(count(&s, &["flotilla_udp_sessions_opened_total", IN]), 0);
}

#[tokio::test]
async fn what_waited_for_a_host_that_does_not_answer_goes_to_another() {
    let ca = Ca::new();
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let s = server(&ca, "west", echo("a").await, vec![]);
    let p = caller(&ca, &[silent.local_addr().unwrap(), s.address("l")]);
    let clients = [Client::new(&p).await, Client::new(&p).await];
    for (i, c) in clients.iter().enumerate() {
        c.send(format!("to {i}").as_bytes()).await;
    }
    for (i, c) in clients.iter().enumerate() {
        let answer = c.hear(Duration::from_secs(6)).await.expect("an answer");
        assert!(answer.starts_with("a ") && answer.ends_with(&format!("to {i}")), "{answer}");
    }
}

#[tokio::test]
async fn a_proxy_that_dies_is_left_within_seconds() {
    let ca = Ca::new();
    let (a, b) = (server(&ca, "west", echo("a").await, vec![]), server(&ca, "west", echo("b").await, vec![]));
    let p = caller(&ca, &[a.address("l"), b.address("l")]);
    let c = Client::new(&p).await;
    let (first, _) = c.ask("x").await;
    let (gone, other) = if first == "a" { (a, "b") } else { (b, "a") };
    drop(gone);
    let begun = std::time::Instant::now();
    loop {
        c.send(b"y").await;
        if let Some(answer) = c.hear(Duration::from_millis(200)).await {
            assert!(answer.starts_with(other), "{answer}");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    println!("   another one answered after {} ms", begun.elapsed().as_millis());
}

#[tokio::test]
async fn a_gateway_passes_connections_on_and_cannot_read_them() {
    let ca = Ca::new();
    let s = server(&ca, "east", echo("a").await, vec![]);
    let g = gateway(&[s.address("l")], "udp|x", Hooks::default()).run();
    let p = caller(&ca, &[g.address("l")]);
    let c = Client::new(&p).await;
    for i in 0..50 {
        assert_eq!(c.ask(&format!("secret {i}")).await.0, "a");
    }
    assert_eq!(c.ask(&"x".repeat(3000)).await.0, "a");
    assert_eq!(count(&g, &["flotilla_udp_sessions_opened_total", "udp|x"]), 1);
    // Whoever sends something else there gets nothing, and nothing is remembered of him.
    let stranger = Client::of(g.address("l")).await;
    for junk in [&b"hello"[..], &[0x40; 60], &[0xc0; 1300]] {
        stranger.send(junk).await;
    }
    until("it is counted", || dropped(&g, "not_quic") == 3).await;
    assert_eq!(stranger.hear(Duration::from_millis(50)).await, None);
}

#[tokio::test]
async fn a_gateway_says_why_not_and_another_one_is_asked_at_once() {
    let ca = Ca::new();
    let s = server(&ca, "east", echo("a").await, vec![]);
    let knows = gateway(&[s.address("l")], "udp|x", Hooks::default()).run();
    let mut other = proxy_chain("udp|x", &["outbound_.53_._.other.books.svc.east.clusterset.local"], vec![]);
    other.name = "other".into();
    let l = Listener { inspect_quic: true, ..plain(Direction::Unspecified, vec![other]) };
    let unknown = Proxy::new().cluster(cluster("udp|x", &[s.address("l")])).listener(l).run();
    let empty = gateway(&[], "udp|x", Hooks::default()).run();
    let no_way = gateway(&[closed_port()], "peer|east", Hooks::default()).run();
    for (what, g, kind) in
        [("unknown", &unknown, "no_route"), ("empty", &empty, "no_host"), ("no way", &no_way, "no_trunk")]
    {
        let p = caller(&ca, &[g.address("l"), knows.address("l")]);
        let begun = std::time::Instant::now();
        for i in 0..4 {
            let c = Client::new(&p).await;
            assert_eq!(c.ask(&i.to_string()).await.0, "a", "{what}");
        }
        assert!(begun.elapsed() < Duration::from_secs(1), "{what}: {:?}", begun.elapsed());
        assert!(dropped(g, kind) >= 1, "{what}: {}", g.metrics());
    }
}

/// Somebody who sends from the address of a connection that lives does not end it; one that is gone makes room.
#[tokio::test]
async fn a_client_has_one_connection_at_a_time() {
    let ca = Ca::new();
    let s = server(&ca, "east", echo("a").await, vec![]);
    let g = gateway(&[s.address("l")], "udp|x", Hooks::default()).run();
    let store = mesh_identity::SecretStore::new();
    ca.enroll(&store, "west", CALLER);
    let tls = store.client_config(&upstream_mtls(NAME, SERVER, &[UDP_ALPN])).unwrap();
    let crypto = Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap());
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connect = || {
        let mut config = quinn::ClientConfig::new(crypto.clone());
        let mut t = quinn::TransportConfig::default();
        t.keep_alive_interval(Some(Duration::from_secs(1)));
        config.transport_config(Arc::new(t));
        endpoint.connect_with(config, g.address("l"), NAME).unwrap()
    };
    let first = connect().await.unwrap();
    let ask = async |c: &quinn::Connection| {
        c.send_datagram(mesh_model::flow::data(0, b"x").into()).unwrap();
        let d = tokio::time::timeout(WAIT, c.read_datagram()).await.expect("an answer").unwrap();
        assert!(d.ends_with(b" x"));
    };
    ask(&first).await;
    let second = tokio::time::timeout(Duration::from_secs(3), connect()).await;
    assert!(second.is_err(), "another connection took the place of one that lives");
    assert!(dropped(&g, "not_quic") > 0);
    ask(&first).await;
    first.close(0u32.into(), b"");
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let third = tokio::time::timeout(WAIT, connect()).await.expect("its address is free").unwrap();
    ask(&third).await;
}

/// A trunk: flows that are opened go to another engine.
struct Trunk {
    to: mpsc::UnboundedSender<DatagramFlow>,
    largest: usize,
}

struct Half {
    to: mpsc::Sender<bytes::Bytes>,
    largest: usize,
}

impl FlowSender for Half {
    fn send(&self, datagram: &[u8]) -> Result<(), FlowError> {
        if datagram.len() > self.largest {
            return Err(FlowError::TooLarge);
        }
        let d = bytes::Bytes::copy_from_slice(datagram);
        self.to.try_send(d).map_err(|_| FlowError::Full)
    }
}

impl Dialer for Trunk {
    fn dial<'a>(
        &'a self,
        _: &'a str,
        _: u16,
        _: &'a str,
    ) -> HookFuture<'a, std::io::Result<mesh_proxy::BoxedIo>> {
        Box::pin(async { Err(std::io::ErrorKind::Unsupported.into()) })
    }

    fn dial_flow<'a>(&'a self, addr: &'a str, _: u16) -> HookFuture<'a, std::io::Result<DatagramFlow>> {
        Box::pin(async move {
            if addr != "trunk:east@" {
                return Err(std::io::ErrorKind::NotConnected.into());
            }
            let (there, from_here) = mpsc::channel(64);
            let (here, from_there) = mpsc::channel(64);
            let half = |to| Arc::new(Half { to, largest: self.largest });
            self.to.send(DatagramFlow { to: half(here), from: from_here }).unwrap();
            Ok(DatagramFlow { to: half(there), from: from_there })
        })
    }
}

#[tokio::test]
async fn two_gateways_and_a_trunk_between_them() {
    let ca = Ca::new();
    let who = Principal::SourceCluster(StringMatch::exact("west"));
    let s = server(&ca, "east", echo("a").await, vec![rbac(who)]);
    let far = gateway(&[s.address("l")], "udp|x", Hooks::default()).run();
    let (to, mut flows) = mpsc::unbounded_channel();
    let dialer: Arc<dyn Dialer> = Arc::new(Trunk { to, largest: 1300 });
    let near = |address: &str| {
        let mut c = cluster("peer|east", &["127.0.0.1:15443".parse().unwrap()]);
        let Discovery::Static(a) = &mut c.discovery else { panic!() };
        a.localities[0].endpoints[0].address = address.into();
        let hooks = Hooks { dialer: Some(Arc::clone(&dialer)), ..Hooks::default() };
        gateway(&[], "peer|east", hooks).cluster(c).run()
    };
    let (good, bad) = (near("trunk:east@"), near("trunk:north@"));
    let deliveries = far.engine.deliveries();
    tokio::spawn(async move {
        while let Some(flow) = flows.recv().await {
            deliveries.deliver_flow("192.0.2.1:15443".parse().unwrap(), flow).await.unwrap();
        }
    });
    // The one that has no trunk says so, and the other is asked.
    let p = caller(&ca, &[bad.address("l"), good.address("l")]);
    for _ in 0..4 {
        let c = Client::new(&p).await;
        let begun = std::time::Instant::now();
        for i in 0..20 {
            assert_eq!(c.ask(&i.to_string()).await.0, "a");
        }
        assert!(begun.elapsed() < Duration::from_secs(1));
        assert_eq!(c.ask(&"x".repeat(4000)).await.0, "a");
    }
    assert!(dropped(&bad, "no_trunk") >= 1);
    // Probes of the path's MTU, which the inner connection takes for what they are.
    until("probes are too large", || dropped(&good, "too_large") >= 1).await;
    assert_eq!(s.engine.status().connections_total, 1);
}
