//! Gateways with certificates, and what listens behind them.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_identity::{SecretStore, TRUST_BUNDLE, WORKLOAD_SVID};
use mesh_model::ClusterId;
use mesh_trunk::{
    DeliverTo, PeerGateway, Peers, PerPeer, Transport, Trunk, TrunkMetrics, TrunkOptions, TrunkStream,
    congestion::Congestion,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

pub(crate) type Ca = CertifiedIssuer<'static, KeyPair>;

pub(crate) fn params(uri: &str, ca: bool) -> CertificateParams {
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

pub(crate) fn root() -> Ca {
    CertifiedIssuer::self_signed(params("spiffe://mesh.local", true), KeyPair::generate().unwrap()).unwrap()
}

pub(crate) fn gateway(root: &Ca, trust: &Ca, cluster: &str) -> Arc<SecretStore> {
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

pub(crate) fn start(secrets: &SecretStore, deliver_to: SocketAddr) -> Trunk {
    Trunk::start(options("127.0.0.1:0".parse().unwrap(), deliver_to), secrets, TrunkMetrics::default())
        .unwrap()
}

pub(crate) fn options(listen: SocketAddr, deliver_to: SocketAddr) -> TrunkOptions {
    TrunkOptions {
        listen,
        deliver_to: DeliverTo::Address(deliver_to),
        deliver_flows: None,
        congestion: PerPeer::all(Congestion::Bbr),
        transport: PerPeer::all(Transport::Quic),
        workers: 0,
    }
}

/// A listener that greets and echoes until end of stream.
pub(crate) async fn echo() -> SocketAddr {
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

pub(crate) fn id(s: &str) -> ClusterId {
    ClusterId::new(s).unwrap()
}

/// Bytes go there and back.
pub(crate) async fn ping(s: &mut TrunkStream) -> std::io::Result<()> {
    s.write_all(b"ping").await?;
    let mut echoed = [0; 4];
    s.read_exact(&mut echoed).await?;
    assert_eq!(&echoed, b"ping");
    Ok(())
}

pub(crate) async fn greeted(s: &mut TrunkStream) {
    // QUIC tells the peer of a stream with its first bytes.
    s.write_all(b"x").await.unwrap();
    let mut hello = [0; 7];
    s.read_exact(&mut hello).await.unwrap();
    assert_eq!(&hello, b"hello x");
}

/// Members and their gateways; those of `kept` are kept up.
pub(crate) fn peers(all: &[(&str, &[SocketAddr])], kept: bool) -> Peers {
    let gateways = |g: &[SocketAddr]| g.iter().map(|a| PeerGateway { address: *a, keep: kept }).collect();
    Peers(all.iter().map(|(c, g)| (id(c), gateways(g))).collect())
}

pub(crate) async fn eventually(what: &str, mut probe: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !probe() {
        assert!(begun.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
