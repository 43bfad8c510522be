//! Two gateways' trunks over real UDP.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use mesh_identity::{SecretStore, TRUST_BUNDLE, WORKLOAD_SVID};
use mesh_model::ClusterId;
use mesh_trunk::{Path, Trunk, TrunkMetrics, TrunkOptions, congestion::Congestion};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

type Ca = CertifiedIssuer<'static, KeyPair>;

fn params(uri: &str, ca: bool) -> CertificateParams {
    let mut p = CertificateParams::default();
    p.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    p.distinguished_name.push(rcgen::DnType::CommonName, uri);
    if ca {
        p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    } else {
        p.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    }
    p
}

fn root() -> Ca {
    CertifiedIssuer::self_signed(params("spiffe://mesh.local", true), KeyPair::generate().unwrap()).unwrap()
}

fn gateway(root: &Ca, trust: &Ca, cluster: &str) -> Arc<SecretStore> {
    let i = CertifiedIssuer::signed_by(
        params(&format!("spiffe://mesh.local/cluster/{cluster}"), true),
        KeyPair::generate().unwrap(),
        root,
    )
    .unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf =
        params("spiffe://mesh.local/ns/flotilla-system/sa/eastwest", false).signed_by(&key, &i).unwrap();
    let s = SecretStore::new();
    s.set_identity(WORKLOAD_SVID, (leaf.pem() + &i.pem()).as_bytes(), key.serialize_pem().as_bytes())
        .unwrap();
    s.set_trust(TRUST_BUNDLE, trust.pem().as_bytes()).unwrap();
    s
}

fn start(secrets: &SecretStore, deliver_to: SocketAddr) -> Trunk {
    let options =
        TrunkOptions { listen: "127.0.0.1:0".parse().unwrap(), deliver_to, congestion: Congestion::Bbr };
    Trunk::start(options, secrets, TrunkMetrics::default()).unwrap()
}

/// A listener that greets and echoes until end of stream.
async fn echo() -> SocketAddr {
    let l = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = l.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut s, _) = l.accept().await.unwrap();
            tokio::spawn(async move {
                s.write_all(b"hello ").await.unwrap();
                let (mut r, mut w) = s.split();
                tokio::io::copy(&mut r, &mut w).await.unwrap();
                w.shutdown().await.unwrap();
            });
        }
    });
    address
}

fn id(s: &str) -> ClusterId {
    ClusterId::new(s).unwrap()
}

#[tokio::test]
async fn sessions_share_one_connection_and_keep_half_close() {
    let root = root();
    let deliver = echo().await;
    let (w, e) = (gateway(&root, &root, "west"), gateway(&root, &root, "east"));
    let (west, east) = (start(&w, deliver), start(&e, deliver));
    let to = east.address().unwrap();
    assert_eq!(west.path(to), Path::Unused);
    let west = Arc::new(west);
    // All at once: the dial is shared, the sessions are not.
    let mut sessions = tokio::task::JoinSet::new();
    for n in 0..20 {
        let west = west.clone();
        sessions.spawn(async move {
            let s = west.dial(to, Some(&id("east"))).await.unwrap();
            let payload = vec![b'a' + n; 300_000];
            let (mut r, mut w) = tokio::io::split(s);
            let send = async {
                w.write_all(&payload).await.unwrap();
                w.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (_, read) = tokio::join!(send, r.read_to_end(&mut got));
            read.unwrap();
            assert_eq!(&got[..6], b"hello ");
            assert!(got[6..] == payload[..], "{n}");
        });
    }
    sessions.join_all().await;
    assert_eq!(west.path(to), Path::Quic);
}

#[tokio::test]
async fn another_cluster_or_another_mesh_is_refused() {
    let (root, other) = (root(), root());
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    let east = start(&gateway(&root, &root, "east"), deliver);
    let err = west.dial(east.address().unwrap(), Some(&id("north"))).await.unwrap_err();
    assert_eq!(err.kind(), std::io::ErrorKind::PermissionDenied);
    // A gateway of another mesh: no QUIC, and nothing listens for TCP there.
    let foreign = start(&gateway(&other, &other, "east"), deliver);
    assert!(west.dial(foreign.address().unwrap(), Some(&id("east"))).await.is_err());
}

#[tokio::test]
async fn tcp_takes_over_where_udp_does_not_pass() {
    let root = root();
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    // TCP on this port answers, UDP does not.
    let begun = Instant::now();
    let mut s = west.dial(deliver, Some(&id("east"))).await.unwrap();
    let mut hello = [0; 6];
    s.read_exact(&mut hello).await.unwrap();
    assert_eq!((&hello, west.path(deliver)), (b"hello ", Path::Tcp));
    assert!(begun.elapsed().as_millis() < 2000, "{:?}", begun.elapsed());
    // The next one does not wait.
    let begun = Instant::now();
    west.dial(deliver, Some(&id("east"))).await.unwrap();
    assert!(begun.elapsed().as_millis() < 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_end_soon_after_their_gateway_died() {
    let root = root();
    let deliver = echo().await;
    let west = start(&gateway(&root, &root, "west"), deliver);
    // A runtime of its own dies like a process: nobody is told.
    let process = std::thread::spawn(|| tokio::runtime::Runtime::new().unwrap()).join().unwrap();
    let secrets = gateway(&root, &root, "east");
    let east = process.spawn(async move { start(&secrets, deliver) }).await.unwrap();
    let to = east.address().unwrap();
    let mut s = west.dial(to, Some(&id("east"))).await.unwrap();
    // QUIC tells the peer of a stream with its first bytes.
    s.write_all(b"x").await.unwrap();
    let mut echoed = [0; 7];
    s.read_exact(&mut echoed).await.unwrap();
    assert_eq!(west.path(to), Path::Quic);

    process.shutdown_background();
    let begun = Instant::now();
    let end = tokio::time::timeout(std::time::Duration::from_secs(5), s.read_u8()).await;
    assert!(end.expect("the session ends").is_err());
    assert!(begun.elapsed().as_millis() < 2500, "{:?}", begun.elapsed());
    // And whoever comes next hears it at once.
    let begun = Instant::now();
    assert!(west.dial(to, Some(&id("east"))).await.is_err());
    assert!(begun.elapsed().as_millis() < 500, "{:?}", begun.elapsed());
    drop(east);
}
