//! The server against hickory's own resolver, over UDP and TCP.

use std::{net::SocketAddr, sync::Arc};

use hickory_proto::rr::RecordType;
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolverConfig},
    net::runtime::TokioRuntimeProvider,
};
use mesh_dns::{Names, Server};
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

async fn start(hosts: &[(&str, &str)], upstream: Option<SocketAddr>) -> (Server, watch::Sender<Arc<Names>>) {
    let names = Names::new(hosts.iter().map(|(h, ip)| ((*h).to_owned(), vec![ip.parse().unwrap()])));
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
