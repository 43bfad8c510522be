//! The server against hickory's own resolver, over UDP and TCP.

use std::{net::SocketAddr, sync::Arc};

use hickory_proto::rr::RecordType;
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolverConfig},
    net::runtime::TokioRuntimeProvider,
};
use mesh_dns::{Host, Names, Port, Server};
use tokio::sync::watch;

fn client(server: SocketAddr, tcp: bool) -> TokioResolver {
    let mut c = if tcp { ConnectionConfig::tcp() } else { ConnectionConfig::udp() };
    c.port = server.port();
    let mut ns = NameServerConfig::udp(server.ip());
    ns.connections = vec![c];
    let mut b = TokioResolver::builder_with_config(
        ResolverConfig::from_name_servers(vec![ns]),
        TokioRuntimeProvider::default(),
    );
    b.options_mut().attempts = 1;
    b.options_mut().ndots = 0;
    b.options_mut().cache_size = 0;
    b.build().unwrap()
}

fn host(ip: &str) -> Arc<Host> {
    let port = |name: &str, number, udp| Port { name: name.into(), number, udp };
    let ports = vec![port("http", 9080, false), port("dns", 53, true)];
    Arc::new(Host { addresses: vec![ip.parse().unwrap()], ports, ..Host::default() })
}

async fn start(hosts: &[(&str, &str)], upstream: Option<SocketAddr>) -> (Server, watch::Sender<Arc<Names>>) {
    let names = Names::new(hosts.iter().map(|(h, ip)| ((*h).to_owned(), host(ip))));
    let (tx, rx) = watch::channel(Arc::new(names));
    (Server::start("127.0.0.1:0".parse().unwrap(), upstream, rx).await.unwrap(), tx)
}

async fn ask(r: &TokioResolver, name: &str, kind: RecordType) -> Result<Vec<String>, String> {
    match r.lookup(format!("{name}."), kind).await {
        Ok(l) => Ok(l.answers().iter().map(|r| r.data.to_string()).collect()),
        Err(e) if e.is_nx_domain() => Err("NXDOMAIN".into()),
        Err(e) if e.is_no_records_found() => Ok(vec![]),
        Err(e) => Err(e.to_string()),
    }
}

#[tokio::test]
async fn mesh_names_are_answered_and_foreign_ones_forwarded() {
    // The resolver behind is another server that owns another name.
    let (behind, _keep) = start(&[("db.example.com", "192.0.2.7")], None).await;
    let (server, names) =
        start(&[("ratings.books.svc.clusterset.local", "240.240.3.4")], Some(behind.address())).await;
    for tcp in [false, true] {
        let r = client(server.address(), tcp);
        let host = "ratings.books.svc.clusterset.local";
        assert_eq!(ask(&r, host, RecordType::A).await.unwrap(), ["240.240.3.4"]);
        assert_eq!(ask(&r, host, RecordType::AAAA).await.unwrap(), [""; 0], "there, without IPv6");
        assert_eq!(
            ask(&r, "Ratings.Books.svc.clusterset.local", RecordType::A).await.unwrap(),
            ["240.240.3.4"]
        );
        let missing = ask(&r, "nothing.books.svc.clusterset.local", RecordType::A).await;
        assert_eq!(missing.unwrap_err(), "NXDOMAIN");
        assert_eq!(
            ask(&r, "dns-version.clusterset.local", RecordType::TXT).await.unwrap(),
            ["1.0.0"],
            "MCS DNS version"
        );
        assert_eq!(ask(&r, "db.example.com", RecordType::A).await.unwrap(), ["192.0.2.7"]);
    }
    // A withdrawn name is gone at once.
    names.send_replace(Arc::default());
    let r = client(server.address(), false);
    let gone = ask(&r, "ratings.books.svc.clusterset.local", RecordType::A).await;
    assert_eq!(gone.unwrap_err(), "NXDOMAIN");
}

#[tokio::test]
async fn without_a_resolver_behind_foreign_names_fail_without_being_denied() {
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (server, _keep) = start(&[], Some(nobody)).await;
    let answer = ask(&client(server.address(), false), "example.com", RecordType::A).await;
    assert_ne!(answer.clone().unwrap_err(), "NXDOMAIN", "{answer:?}");
}

#[tokio::test]
async fn named_ports_have_srv_records() {
    let (server, _keep) = start(&[("ratings.books.svc.clusterset.local", "240.240.3.4")], None).await;
    let r = client(server.address(), false);
    let of = |port: &str| format!("{port}.ratings.books.svc.clusterset.local");
    let srv = ask(&r, &of("_http._tcp"), RecordType::SRV).await.unwrap();
    assert_eq!(srv, ["0 100 9080 ratings.books.svc.clusterset.local."]);
    let srv = ask(&r, &of("_dns._udp"), RecordType::SRV).await.unwrap();
    assert_eq!(srv, ["0 100 53 ratings.books.svc.clusterset.local."]);
    assert_eq!(ask(&r, &of("_http._udp"), RecordType::SRV).await.unwrap_err(), "NXDOMAIN");
    assert_eq!(ask(&r, &of("_http._tcp"), RecordType::A).await.unwrap(), [""; 0], "there, without address");
    assert_eq!(ask(&r, &of("east"), RecordType::A).await.unwrap_err(), "NXDOMAIN", "MCS: must not exist");
}

/// A question in a datagram of its own, with or without EDNS; the answer.
fn raw(server: SocketAddr, name: &str, edns: Option<u8>) -> hickory_proto::op::Message {
    use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
    let mut m = Message::new(7, MessageType::Query, OpCode::Query);
    m.add_query(Query::query(format!("{name}.").parse().unwrap(), RecordType::A));
    if let Some(version) = edns {
        let mut e = Edns::new();
        e.set_max_payload(4096).set_version(version);
        m.edns = Some(e);
    }
    let s = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    s.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    s.send_to(&m.to_vec().unwrap(), server).unwrap();
    let mut buf = [0; 4096];
    let n = s.recv(&mut buf).unwrap();
    Message::from_vec(&buf[..n]).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn denials_say_how_long_they_hold_and_edns_is_answered_in_kind() {
    use hickory_proto::{op::ResponseCode, rr::RData};
    let (server, _keep) = start(&[("ratings.books.svc.clusterset.local", "240.240.3.4")], None).await;
    let a = server.address();
    let denied = raw(a, "nothing.books.svc.clusterset.local", None);
    assert_eq!(denied.metadata.response_code, ResponseCode::NXDomain);
    let [soa] = denied.authorities.as_slice() else { panic!("{denied:?}") };
    assert!(matches!(&soa.data, RData::SOA(s) if s.minimum == mesh_dns::TTL), "{soa:?}");
    assert_eq!(soa.name.to_string(), "clusterset.local.");
    assert!(denied.edns.is_none());
    let with = raw(a, "ratings.books.svc.clusterset.local", Some(0));
    assert_eq!(
        (with.answers.len(), with.edns.as_ref().map(|e| (e.version(), e.max_payload()))),
        (1, Some((0, 1232)))
    );
    assert!(with.authorities.is_empty());
    let newer = raw(a, "ratings.books.svc.clusterset.local", Some(1));
    // BADVERS; the library calls 16 by its other name.
    assert_eq!(u16::from(newer.metadata.response_code), 16, "{newer:?}");
}
