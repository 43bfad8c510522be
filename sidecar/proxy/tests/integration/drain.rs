//! Endpoints that drain, and connections from gateways that do.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::client::SendRequest;
use mesh_model::proxy::*;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
};

use crate::support::*;

/// Longer than idle connections of an endpoint that drains live, and than new ones through a gateway that drains.
const MOMENT: Duration = Duration::from_millis(2_500);

fn health(endpoints: &[(SocketAddr, EndpointHealth)]) -> Arc<LoadAssignment> {
    let addresses: Vec<_> = endpoints.iter().map(|e| e.0).collect();
    let mut a = assignment(&addresses);
    for (e, (_, health)) in a.localities[0].endpoints.iter_mut().zip(endpoints) {
        e.health = *health;
    }
    Arc::new(a)
}

fn get(path: &str) -> http::Request<()> {
    http::Request::builder().uri(format!("http://reviews:9080{path}")).body(()).unwrap()
}

type Connection = JoinHandle<Result<(), h2::Error>>;

async fn speak(s: TcpStream) -> (SendRequest<Bytes>, Connection) {
    let (send, conn) = h2::client::handshake(s).await.unwrap();
    (send.ready().await.unwrap(), tokio::spawn(conn))
}

/// A stream that echoes.
struct Echo {
    send: h2::SendStream<Bytes>,
    recv: h2::RecvStream,
}

impl Echo {
    async fn open(on: &mut SendRequest<Bytes>) -> Self {
        let mut r = get("/stream");
        *r.method_mut() = http::Method::POST;
        let (answer, send) = on.send_request(r, false).unwrap();
        Self { send, recv: answer.await.unwrap().into_body() }
    }

    async fn says(&mut self, what: &'static str) {
        self.send.send_data(Bytes::from_static(what.as_bytes()), false).unwrap();
        let back = tokio::time::timeout(WAIT, self.recv.data()).await.expect("an echo").unwrap().unwrap();
        assert_eq!(back, what);
    }

    async fn end(mut self) {
        self.send.send_data(Bytes::new(), true).unwrap();
        while let Some(b) = self.recv.data().await {
            assert!(b.unwrap().is_empty());
        }
    }
}

#[tokio::test]
async fn an_endpoint_that_drains_gets_nothing_new_and_its_connection_ends_with_its_last_stream() {
    let (a, b) = (Upstream::new("a").await, Upstream::new("b").await);
    let mut c = cluster("up", &[]);
    (c.discovery, c.http) = (Discovery::Eds("e".into()), UpstreamHttp::Http2);
    let mut p = Proxy::new().cluster(c).listener(listener(
        Direction::Outbound,
        vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
    ));
    p.snap.endpoints.insert("e".into(), health(&[(a.address, EndpointHealth::Healthy)]));
    let mut p = p.run();
    let (mut send, _conn) = speak(p.connect("l").await).await;
    let mut stream = Echo::open(&mut send).await;
    stream.says("before").await;

    let ends = [(a.address, EndpointHealth::Draining), (b.address, EndpointHealth::Healthy)];
    p.snap.endpoints.insert("e".into(), health(&ends));
    assert_eq!(p.apply().rejected, []);
    for _ in 0..10 {
        assert_eq!(p.get("x", "/name").await.body, "b");
    }
    tokio::time::sleep(MOMENT).await;
    stream.says("while it drains").await;
    let connections = |p: &Proxy| p.engine.status().clusters["up"].connections;
    assert_eq!((connections(&p), a.connections(), a.requests()), (2, 1, 1));
    stream.end().await;
    tokio::time::sleep(MOMENT).await;
    assert_eq!(connections(&p), 1, "that of the other endpoint");

    // It is back, and like any other.
    p.snap.endpoints.insert("e".into(), health(&ends.map(|(at, _)| (at, EndpointHealth::Healthy))));
    assert_eq!(p.apply().rejected, []);
    for _ in 0..4 {
        p.get("x", "/name").await;
    }
    assert_eq!((a.connections(), a.requests()), (2, 3));
    tokio::time::sleep(MOMENT).await;
    assert_eq!(connections(&p), 2);
}

async fn from(ip: &str, p: &Proxy) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(ip.parse().unwrap(), 0)).unwrap();
    socket.connect(p.address("l")).await.unwrap()
}

async fn status(send: &mut SendRequest<Bytes>) -> u16 {
    let (answer, _) = send.send_request(get("/name"), true).unwrap();
    tokio::time::timeout(WAIT, answer).await.expect("an answer").unwrap().status().as_u16()
}

async fn h1(s: &mut TcpStream) -> String {
    s.write_all(b"GET /name HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    read_until(s, "\r\n\r\n").await.to_ascii_lowercase()
}

/// A proxy whose cluster has gateways at 127.0.0.2 and 127.0.0.3.
fn inbound(up: SocketAddr, direction: Direction) -> Proxy {
    let mut gateways = cluster(OWN_GATEWAYS, &[]);
    gateways.discovery = Discovery::Eds(OWN_GATEWAYS.into());
    let p = Proxy::new().cluster(cluster("up", &[up])).cluster(gateways).listener(listener(
        direction,
        vec![http_chain(inline(vec![vhost(&["*"], vec![route(forward("up"))])]))],
    ));
    let mut p = p;
    p.snap.endpoints.insert(OWN_GATEWAYS.into(), gateways_with(EndpointHealth::Healthy));
    p.run()
}

fn gateways_with(second: EndpointHealth) -> Arc<LoadAssignment> {
    let at = |s: &str| s.parse().unwrap();
    health(&[(at("127.0.0.2:15443"), second), (at("127.0.0.3:15443"), EndpointHealth::Healthy)])
}

fn second_gateway(p: &mut Proxy, health: EndpointHealth) {
    p.snap.endpoints.insert(OWN_GATEWAYS.into(), gateways_with(health));
    assert_eq!(p.apply().rejected, []);
}

#[tokio::test]
async fn inbound_connections_through_a_gateway_that_drains_are_told_to_leave() {
    let up = Upstream::new("up").await;
    let mut p = inbound(up.address, Direction::Inbound);
    let (mut leaving, goes) = speak(from("127.0.0.2", &p).await).await;
    let mut stream = Echo::open(&mut leaving).await;
    stream.says("before").await;
    let (mut staying, stays) = speak(from("127.0.0.3", &p).await).await;
    let mut old = from("127.0.0.2", &p).await;
    assert!(!h1(&mut old).await.contains("connection: close"));
    // Long enough that nobody takes the connection for a new one.
    tokio::time::sleep(Duration::from_millis(1_200)).await;

    second_gateway(&mut p, EndpointHealth::Draining);
    // A worker hears of it a moment later.
    let end = tokio::time::Instant::now() + WAIT;
    while !h1(&mut old).await.contains("connection: close") {
        assert!(tokio::time::Instant::now() < end, "kept open");
    }
    while leaving.send_request(get("/name"), true).is_ok() {
        assert!(tokio::time::Instant::now() < end, "no GOAWAY");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(MOMENT).await;
    stream.says("while it drains").await;
    assert!(!goes.is_finished());
    stream.end().await;
    drop(leaving);
    tokio::time::timeout(WAIT, goes).await.expect("the connection ends").unwrap().unwrap();
    assert_eq!(status(&mut staying).await, 200);

    // Whoever still comes is served, and then told.
    let (mut late, goes) = speak(from("127.0.0.2", &p).await).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(status(&mut late).await, 200);
    tokio::time::timeout(WAIT, goes).await.expect("the connection ends").unwrap().unwrap();

    second_gateway(&mut p, EndpointHealth::Healthy);
    let (mut back, remains) = speak(from("127.0.0.2", &p).await).await;
    assert_eq!(status(&mut back).await, 200);
    tokio::time::sleep(MOMENT).await;
    assert_eq!((status(&mut back).await, status(&mut staying).await), (200, 200));
    assert!(!remains.is_finished() && !stays.is_finished());
    // And once more.
    second_gateway(&mut p, EndpointHealth::Draining);
    tokio::time::timeout(WAIT, remains).await.expect("the connection ends").unwrap().unwrap();
    assert!(!stays.is_finished());
}

#[tokio::test]
async fn what_comes_from_the_workload_itself_has_nothing_to_do_with_gateways() {
    let up = Upstream::new("up").await;
    let mut p = inbound(up.address, Direction::Outbound);
    let (mut send, conn) = speak(from("127.0.0.2", &p).await).await;
    assert_eq!(status(&mut send).await, 200);
    second_gateway(&mut p, EndpointHealth::Draining);
    tokio::time::sleep(MOMENT).await;
    assert_eq!(status(&mut send).await, 200);
    assert!(!conn.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_connected_is_served_although_the_engine_stops() {
    for _ in 0..20 {
        let server = raw_server(|mut s, _| async move {
            let got = read_all(&mut s).await;
            let _ = s.write_all(got.as_bytes()).await;
        })
        .await;
        let p = Proxy::new()
            .cluster(cluster("up", &[server]))
            .listener(listener(Direction::Inbound, vec![chain(vec![tcp_filter("up")])]))
            .run();
        let at = p.address("l");
        // To the kernel they are connected. The workers have seen some of them when they are told to stop.
        let connected: Vec<_> = (0..100).map(|_| std::net::TcpStream::connect(at).unwrap()).collect();
        let asked = async {
            for s in connected {
                s.set_nonblocking(true).unwrap();
                let mut s = TcpStream::from_std(s).unwrap();
                s.write_all(b"hello").await.unwrap();
                s.shutdown().await.unwrap();
                assert_eq!(read_all(&mut s).await, "hello");
            }
        };
        tokio::join!(p.engine.drain(WAIT), asked);
    }
}
