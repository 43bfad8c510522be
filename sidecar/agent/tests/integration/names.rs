//! Hosts that are found by the name that a request or connection asks for: Envoy's dynamic forward proxy, and ours.

use std::net::SocketAddr;

use mesh_model::proxy::*;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::side_by_side::{Pair, cluster, manager, route, server, to_up};

fn cache(max_hosts: u32, refused: &[&str]) -> NameCache {
    let refused = refused.iter().map(|n| n.parse().unwrap()).collect();
    NameCache { name: "mesh".into(), max_hosts, refused, ..NameCache::default() }
}

fn named(cache: NameCache, port: u16) -> Cluster {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    Cluster {
        discovery: Discovery::ByName(NamedHosts { cache, port }),
        ..cluster("up", nowhere, UpstreamHttp::Http1)
    }
}

fn get(authority: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn the_authority_names_the_host() {
    let up = server(|r| {
        let line = r.lines().find(|l| l.to_ascii_lowercase().starts_with("host:"));
        (200, String::new(), line.unwrap_or_default().to_ascii_lowercase())
    })
    .await;
    let pair = async |max_hosts, refused: &[&str]| {
        let c = cache(max_hosts, refused);
        let filter = HttpFilter::Names(c.clone());
        let routes = vec![route(to_up(), RouteFilters::default())];
        Pair::new(manager(vec![filter], routes), vec![named(c, 0)]).await
    };
    let p = pair(8, &[]).await;
    let port = up.port();
    for authority in [format!("localhost:{port}"), format!("127.0.0.1:{port}"), format!("LOCALHOST:{port}")] {
        let a = p.alike(&get(&authority), &[]).await;
        assert_eq!((a.status, a.body), (200, format!("host: {authority}").to_ascii_lowercase().into_bytes()));
    }
    // Names of what is not there.
    let p = pair(8, &[]).await;
    for authority in ["no-such-host.invalid", "no-such-host.invalid:80"] {
        let a = p.alike(&get(authority), &[]).await;
        assert_eq!((a.status, &*a.body), (503, &b"DNS resolution failure"[..]));
    }
    // A name more than there is room for, while the others are in use.
    let p = pair(1, &[]).await;
    assert_eq!(p.alike(&get(&format!("localhost:{port}")), &[]).await.status, 200);
    let a = p.alike(&get(&format!("127.0.0.1:{port}")), &[]).await;
    assert_eq!((a.status, &*a.body), (503, &b"DNS cache overflow"[..]));
    // Addresses that are no answer are none to both.
    let p = pair(8, &["127.0.0.0/8", "::/127"]).await;
    let a = p.alike(&get(&format!("localhost:{port}")), &[]).await;
    assert_eq!((a.status, &*a.body), (503, &b"DNS resolution failure"[..]));
}

/// A ClientHello with a server name, and the answer of who takes it.
async fn hello(to: SocketAddr, name: &str) -> Vec<u8> {
    let mut s = TcpStream::connect(to).await.unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(rustls::RootCertStore::empty());
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
    let mut c = rustls::ClientConnection::new(config.with_no_client_auth().into(), name).unwrap();
    let mut out = Vec::new();
    c.write_tls(&mut out).unwrap();
    s.write_all(&out).await.unwrap();
    let mut got = Vec::new();
    let _ = tokio::time::timeout(std::time::Duration::from_secs(10), s.read_to_end(&mut got)).await;
    got
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN)"]
async fn the_sni_names_the_host() {
    // It tells that it was reached, with the bytes that it got.
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = l.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut s, _) = l.accept().await.unwrap();
            let mut first = [0; 4096];
            let _ = s.read(&mut first).await.unwrap();
            s.write_all(format!("record {}", first[0]).as_bytes()).await.unwrap();
            s.shutdown().await.unwrap();
            while s.read(&mut first).await.is_ok_and(|n| n > 0) {}
        }
    });
    let c = cache(8, &[]);
    let tcp = TcpProxy {
        stat_prefix: "t".into(),
        clusters: vec![WeightedCluster::only("up")],
        idle_timeout: None,
        max_duration: None,
        access_log: vec![],
        tunnel: None,
        on_demand: None,
        names: Some((c.clone(), port)),
    };
    let p = Pair::sni(tcp, vec![named(c, 0)]).await;
    for (name, wanted) in [("localhost", &b"record 22"[..]), ("no-such-host.invalid", b"")] {
        let (ours, theirs) = tokio::join!(hello(p.engine, name), hello(p.envoy, name));
        assert_eq!(ours, wanted, "{name}");
        assert_eq!(ours, theirs, "{name}");
    }
}
