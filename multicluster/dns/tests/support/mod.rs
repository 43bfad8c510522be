//! Questions through real sockets.

#![allow(dead_code)]

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::Arc,
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query},
    rr::{Name, RecordType},
};
use mesh_dns::{ClusterOptions, ClusterServer, Host, Metrics, Names, Pod, Port};
use tokio::sync::watch;

const SOON: Duration = Duration::from_secs(10);

pub(crate) fn question(name: &str, kind: RecordType, edns: Option<u16>) -> Message {
    let mut m = Message::new(7, MessageType::Query, OpCode::Query);
    m.metadata.recursion_desired = true;
    // Unlike `parse`, this leaves the case as it is.
    m.add_query(Query::query(Name::from_ascii(format!("{name}.")).unwrap(), kind));
    m.edns = edns.map(|payload| {
        let mut e = Edns::new();
        e.set_max_payload(payload).set_version(0);
        e
    });
    m
}

/// The bytes of an answer over UDP.
pub(crate) fn udp_bytes(server: SocketAddr, question: &[u8]) -> Vec<u8> {
    let s = UdpSocket::bind("127.0.0.1:0").unwrap();
    s.set_read_timeout(Some(SOON)).unwrap();
    s.send_to(question, server).unwrap();
    let mut buf = vec![0; 65_535];
    let n = s.recv(&mut buf).unwrap();
    buf.truncate(n);
    buf
}

pub(crate) fn udp(server: SocketAddr, question: &Message) -> Message {
    Message::from_vec(&udp_bytes(server, &question.to_vec().unwrap())).unwrap()
}

pub(crate) fn tcp(server: SocketAddr, question: &Message) -> Message {
    let mut s = TcpStream::connect(server).unwrap();
    s.set_read_timeout(Some(SOON)).unwrap();
    let bytes = question.to_vec().unwrap();
    s.write_all(&u16::try_from(bytes.len()).unwrap().to_be_bytes()).unwrap();
    s.write_all(&bytes).unwrap();
    let mut len = [0; 2];
    s.read_exact(&mut len).unwrap();
    let mut answer = vec![0; usize::from(u16::from_be_bytes(len))];
    s.read_exact(&mut answer).unwrap();
    Message::from_vec(&answer).unwrap()
}

/// Records of a section, sorted, as `type data`.
pub(crate) fn records(section: &[hickory_proto::rr::Record]) -> Vec<String> {
    let mut all: Vec<_> = section.iter().map(|r| format!("{} {}", r.record_type(), r.data)).collect();
    all.sort();
    all
}

pub(crate) fn port(name: &str, number: u16, udp: bool) -> Port {
    Port { name: name.into(), number, udp }
}

/// A service with an address, and one without.
pub(crate) fn bookstore() -> Vec<(String, Arc<Host>)> {
    let ratings = Arc::new(Host {
        addresses: ["240.240.3.4", "2001:db8::34"].map(|a| a.parse().unwrap()).to_vec(),
        ports: vec![port("http", 9080, false), port("dns", 53, true)],
        ..Host::default()
    });
    let pods: Vec<Pod> = [("db-0", "10.0.0.1"), ("db-1", "10.0.0.2")]
        .map(|(name, ip)| Pod {
            name: name.into(),
            cluster: "east".into(),
            addresses: vec![ip.parse().unwrap()],
            ports: vec![port("sql", 5432, false)],
        })
        .to_vec();
    let db = Arc::new(Host {
        // One pod has no name.
        addresses: ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|a| a.parse().unwrap()).to_vec(),
        ports: vec![port("sql", 5432, false)],
        headless: true,
        pods,
    });
    let many = Arc::new(Host {
        addresses: (1..=200).map(|i| std::net::Ipv4Addr::new(10, 1, 0, i).into()).collect(),
        headless: true,
        ..Host::default()
    });
    let mut all = Vec::new();
    for zone in ["svc.cluster.local", "svc.clusterset.local", "global"] {
        all.push((format!("ratings.books.{zone}"), ratings.clone()));
    }
    for zone in ["svc.cluster.local", "svc.clusterset.local", "global"] {
        all.push((format!("db.books.{zone}"), db.clone()));
    }
    all.push(("many.books.svc.clusterset.local".into(), many));
    all
}

pub(crate) struct Running {
    pub(crate) server: ClusterServer,
    pub(crate) names: watch::Sender<Arc<Names>>,
    pub(crate) metrics: Metrics,
}

impl Running {
    pub(crate) fn address(&self) -> SocketAddr {
        self.server.addresses()[0]
    }

    /// The metrics as they are shown.
    pub(crate) fn shown(&self) -> String {
        let mut registry = prometheus_client::registry::Registry::default();
        self.metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }
}

pub(crate) async fn cluster(names: Names, upstreams: Vec<SocketAddr>) -> Running {
    let (tx, rx) = watch::channel(Arc::new(names));
    let metrics = Metrics::new();
    let server = ClusterServer::start(ClusterOptions {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        workers: 2,
        upstreams,
        names: rx,
        metrics: metrics.clone(),
    })
    .await
    .unwrap();
    Running { server, names: tx, metrics }
}

/// A resolver behind, as a function; over TCP it may answer something else.
pub(crate) async fn behind(
    answer: impl Fn(Message, bool) -> Option<Message> + Send + Sync + 'static,
) -> SocketAddr {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let answer = Arc::new(answer);
    let udp = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = udp.local_addr().unwrap();
    let tcp = tokio::net::TcpListener::bind(address).await.unwrap();
    let of_udp = answer.clone();
    tokio::spawn(async move {
        let mut buf = vec![0; 4096];
        loop {
            let (n, from) = udp.recv_from(&mut buf).await.unwrap();
            if let Some(m) = of_udp(Message::from_vec(&buf[..n]).unwrap(), false) {
                udp.send_to(&m.to_vec().unwrap(), from).await.unwrap();
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut s, _) = tcp.accept().await.unwrap();
            let answer = answer.clone();
            tokio::spawn(async move {
                while let Ok(n) = s.read_u16().await {
                    let mut buf = vec![0; n.into()];
                    s.read_exact(&mut buf).await.unwrap();
                    if let Some(m) = answer(Message::from_vec(&buf).unwrap(), true) {
                        let bytes = m.to_vec().unwrap();
                        s.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
                        s.write_all(&bytes).await.unwrap();
                    }
                }
            });
        }
    });
    address
}
