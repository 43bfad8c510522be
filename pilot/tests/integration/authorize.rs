use std::sync::Arc;

use mesh_xds::{PeerInfo, ResourceSource as _, server::Transport};
use pilot::{config::Config, source::PilotSource, world::World};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls_pki_types::CertificateDer;

use crate::{settings, sidecar};

fn params(uri: Option<&str>, ca: bool) -> CertificateParams {
    let mut p = CertificateParams::default();
    if let Some(u) = uri {
        p.subject_alt_names = vec![SanType::URI(u.try_into().unwrap())];
    }
    if ca {
        p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    }
    p
}

/// A leaf and the intermediate that signed it.
fn chain(leaf: Option<&str>, intermediate: &str) -> PeerInfo {
    let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let ca_params = params(Some(intermediate), true);
    let ca = ca_params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca_params, ca_key);
    let leaf = params(leaf, false).signed_by(&key, &issuer).unwrap();
    let certificates: Vec<CertificateDer<'static>> = vec![leaf.der().clone(), ca.der().clone()];
    PeerInfo {
        transport: Transport::Tls,
        address: Some("203.0.113.9:4000".parse().unwrap()),
        certificates: certificates.into(),
    }
}

#[test]
fn a_proxy_gets_only_its_own_workloads_configuration() {
    let source = PilotSource::new();
    source.update(Arc::new(World::new(settings(), Config::default())));
    let node = sidecar("10.0.0.1", "reviews", &[]);
    let west = "spiffe://mesh.local/cluster/west";
    let good = "spiffe://mesh.local/ns/books/sa/reviews";
    assert!(source.authorize(&chain(Some(good), west), &node).is_ok());
    for (what, peer, code) in [
        (
            "another account",
            chain(Some("spiffe://mesh.local/ns/books/sa/ratings"), west),
            tonic::Code::PermissionDenied,
        ),
        (
            "another namespace",
            chain(Some("spiffe://mesh.local/ns/other/sa/reviews"), west),
            tonic::Code::PermissionDenied,
        ),
        (
            "another trust domain",
            chain(Some("spiffe://evil.local/ns/books/sa/reviews"), west),
            tonic::Code::PermissionDenied,
        ),
        (
            "another cluster",
            chain(Some(good), "spiffe://mesh.local/cluster/east"),
            tonic::Code::PermissionDenied,
        ),
        ("a cluster's own certificate", chain(Some(west), west), tonic::Code::PermissionDenied),
        ("no identity", chain(None, west), tonic::Code::Unauthenticated),
        ("no certificate", PeerInfo::plain(Transport::Tls, None), tonic::Code::Unauthenticated),
        (
            "plaintext from elsewhere",
            PeerInfo::plain(Transport::Plaintext, Some("203.0.113.9:1".parse().unwrap())),
            tonic::Code::PermissionDenied,
        ),
    ] {
        assert_eq!(source.authorize(&peer, &node).map_err(|e| e.code()), Err(code), "{what}");
    }
    let loopback = PeerInfo::plain(Transport::Plaintext, Some("127.0.0.1:1".parse().unwrap()));
    assert!(source.authorize(&loopback, &node).is_ok());
    let component = mesh_xds::NodeInfo::component("galley");
    assert!(source.authorize(&loopback, &component).is_err());
}

#[test]
fn a_gateway_drains_its_own_address_only() {
    let source = PilotSource::new();
    source.update(Arc::new(World::new(settings(), Config::default())));
    let peer = chain(Some("spiffe://mesh.local/ns/books/sa/reviews"), "spiffe://mesh.local/cluster/west");
    let gateway = |ip: &str| {
        let mut node = sidecar(ip, "reviews", &[]);
        node.kind = mesh_xds::NodeKind::Router;
        node.metadata.insert("ROUTER_MODE".into(), "sni-dnat".into());
        node
    };
    assert!(source.authorize(&peer, &gateway("10.0.0.1")).is_ok());
    let refused = source.authorize(&peer, &gateway("10.0.0.1").draining());
    assert_eq!(refused.unwrap_err().code(), tonic::Code::PermissionDenied);
    assert!(source.authorize(&peer, &gateway("203.0.113.9").draining()).is_ok());
}
