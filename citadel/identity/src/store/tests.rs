//! Handshakes in memory against a small CA.

use mesh_model::proxy::StringMatch;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::*;
use crate::peer_identity;

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca_params(uri: Option<&str>) -> CertificateParams {
    let mut p = CertificateParams::default();
    p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    p.distinguished_name.push(rcgen::DnType::CommonName, uri.unwrap_or("root"));
    p.subject_alt_names = uri.into_iter().map(|u| SanType::URI(u.try_into().unwrap())).collect();
    p
}

fn root() -> Ca {
    CertifiedIssuer::self_signed(ca_params(None), KeyPair::generate().unwrap()).unwrap()
}

fn intermediate(root: &Ca, uri: &str) -> Ca {
    CertifiedIssuer::signed_by(ca_params(Some(uri)), KeyPair::generate().unwrap(), root).unwrap()
}

fn leaf(issuer: &Ca, uris: &[&str]) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let mut p = CertificateParams::default();
    p.subject_alt_names = uris.iter().map(|u| SanType::URI((*u).try_into().unwrap())).collect();
    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert = p.signed_by(&key, issuer).unwrap();
    (cert.pem(), key.serialize_pem())
}

const A: &str = "spiffe://mesh.local/ns/books/sa/a";
const B: &str = "spiffe://mesh.local/ns/books/sa/b";
const EAST: &str = "spiffe://mesh.local/cluster/east";
const WEST: &str = "spiffe://mesh.local/cluster/west";

fn validation(sans: &[&str]) -> Validation {
    Validation {
        trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
        sans: sans.iter().map(|s| StringMatch::exact(*s)).collect(),
        crl: None,
    }
}

fn server_tls() -> DownstreamTls {
    DownstreamTls {
        certificate: SecretRef::Sds(WORKLOAD_SVID.into()),
        client_certificate: ClientCertificate::Required(validation(&[])),
        alpn: vec!["h2".into()],
        min_version: TlsVersion::V1_3,
    }
}

fn client_tls(sans: &[&str]) -> UpstreamTls {
    UpstreamTls {
        certificate: Some(SecretRef::Sds(WORKLOAD_SVID.into())),
        validation: validation(sans),
        sni: "outbound_.9080_._.reviews.books.svc.cluster.local".into(),
        alpn: vec!["h2".into()],
    }
}

fn store(identity: (&str, &str), trust: &str) -> Arc<SecretStore> {
    let s = SecretStore::new();
    s.set_identity(WORKLOAD_SVID, identity.0.as_bytes(), identity.1.as_bytes()).unwrap();
    s.set_trust(TRUST_BUNDLE, trust.as_bytes()).unwrap();
    s
}

/// Runs a handshake and one byte each way; answers with what the server knows of the client.
fn handshake(
    server: &Arc<ServerConfig>,
    client: &Arc<ClientConfig>,
    sni: &str,
) -> Result<(rustls::ServerConnection, rustls::ClientConnection), rustls::Error> {
    let mut s = rustls::ServerConnection::new(server.clone())?;
    let name = rustls_pki_types::ServerName::try_from(sni.to_owned()).expect("a usable SNI");
    let mut c = rustls::ClientConnection::new(client.clone(), name)?;
    for _ in 0..8 {
        let mut buf = Vec::new();
        while c.wants_write() {
            c.write_tls(&mut buf).unwrap();
        }
        let mut rd = buf.as_slice();
        while !rd.is_empty() {
            s.read_tls(&mut rd).unwrap();
            s.process_new_packets()?;
        }
        let mut buf = Vec::new();
        while s.wants_write() {
            s.write_tls(&mut buf).unwrap();
        }
        let mut rd = buf.as_slice();
        while !rd.is_empty() {
            c.read_tls(&mut rd).unwrap();
            c.process_new_packets()?;
        }
    }
    assert!(!s.is_handshaking() && !c.is_handshaking());
    Ok((s, c))
}

fn sni() -> String {
    client_tls(&[]).sni
}

#[test]
fn mutual_tls_names_workload_and_cluster() {
    let root = root();
    let east = intermediate(&root, EAST);
    let west = intermediate(&root, WEST);
    let (a, ak) = leaf(&west, &[A]);
    let (b, bk) = leaf(&east, &[B]);
    let client = store((&(a + &west.pem()), &ak), &root.pem());
    let server = store((&(b + &east.pem()), &bk), &root.pem());
    let (s, c) = handshake(
        &server.server_config(&server_tls()).unwrap(),
        &client.client_config(&client_tls(&[B])).unwrap(),
        &sni(),
    )
    .unwrap();
    assert_eq!(s.server_name(), Some(sni().as_str()), "underscores survive in SNI");
    assert_eq!(s.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(s.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let seen = peer_identity(s.peer_certificates().unwrap()).unwrap();
    assert_eq!(seen.spiffe.unwrap().as_str(), A);
    assert_eq!(seen.cluster.unwrap().as_str(), "west");
    let seen = peer_identity(c.peer_certificates().unwrap()).unwrap();
    assert_eq!(seen.spiffe.unwrap().as_str(), B);
    assert_eq!(seen.cluster.unwrap().as_str(), "east");
}

#[test]
fn a_server_with_another_identity_is_refused() {
    let root = root();
    let west = intermediate(&root, WEST);
    let (a, ak) = leaf(&west, &[A]);
    let client = store((&(a.clone() + &west.pem()), &ak), &root.pem());
    let server = store((&(a + &west.pem()), &ak), &root.pem());
    let err = handshake(
        &server.server_config(&server_tls()).unwrap(),
        &client.client_config(&client_tls(&[B])).unwrap(),
        &sni(),
    )
    .unwrap_err();
    assert_eq!(err, rustls::Error::InvalidCertificate(rustls::CertificateError::NotValidForName));
}

#[test]
fn forged_chains_are_refused() {
    let root_a = root();
    let root_b = root();
    let east = intermediate(&root_a, EAST);
    let west = intermediate(&root_a, WEST);
    let foreign = intermediate(&root_b, WEST);
    let other_domain = intermediate(&root_a, "spiffe://other.example/cluster/west");
    let (good, gk) = leaf(&west, &[B]);
    let server = store((&(good + &west.pem()), &gk), &root_a.pem());
    let server = server.server_config(&server_tls()).unwrap();
    let cases: Vec<(&str, (String, String))> = vec![
        ("another mesh's root", {
            let (l, k) = leaf(&foreign, &[A]);
            (l + &foreign.pem(), k)
        }),
        ("an intermediate of another cluster put in front of the real one", {
            let (l, k) = leaf(&east, &[A]);
            (l + &west.pem() + &east.pem(), k)
        }),
        ("an intermediate of another trust domain", {
            let (l, k) = leaf(&other_domain, &[A]);
            (l + &other_domain.pem(), k)
        }),
        ("two URI SANs", {
            let (l, k) = leaf(&west, &[A, B]);
            (l + &west.pem(), k)
        }),
        ("no URI SAN", {
            let (l, k) = leaf(&west, &[]);
            (l + &west.pem(), k)
        }),
        ("a URI that is no SPIFFE ID", {
            let (l, k) = leaf(&west, &["https://mesh.local/ns/books/sa/a"]);
            (l + &west.pem(), k)
        }),
    ];
    for (name, (chain, key)) in cases {
        let client = store((&chain, &key), &root_a.pem());
        let client = client.client_config(&client_tls(&[B])).unwrap();
        assert!(handshake(&server, &client, &sni()).is_err(), "{name} was accepted");
    }
    // No certificate at all.
    let anonymous = SecretStore::new();
    anonymous.set_trust(TRUST_BUNDLE, root_a.pem().as_bytes()).unwrap();
    let client = anonymous.client_config(&client_tls(&[B])).unwrap();
    assert!(handshake(&server, &client, &sni()).is_err());
}

#[test]
fn rotation_reaches_configurations_already_handed_out() {
    let (old, new) = (root(), root());
    let (old_i, new_i) = (intermediate(&old, WEST), intermediate(&new, WEST));
    let (a, ak) = leaf(&old_i, &[A]);
    let (b, bk) = leaf(&old_i, &[B]);
    let client_store = store((&(a + &old_i.pem()), &ak), &old.pem());
    let server_store = store((&(b + &old_i.pem()), &bk), &old.pem());
    let server = server_store.server_config(&server_tls()).unwrap();
    let client = client_store.client_config(&client_tls(&[B])).unwrap();
    handshake(&server, &client, &sni()).unwrap();
    let (s, _) = handshake(&server, &client, &sni()).unwrap();
    assert_eq!(s.handshake_kind(), Some(rustls::HandshakeKind::Resumed));

    // The server stops trusting the old root: a full handshake is forced, and fails.
    server_store.set_trust(TRUST_BUNDLE, new.pem().as_bytes()).unwrap();
    assert!(handshake(&server, &client, &sni()).is_err());

    let (a, ak) = leaf(&new_i, &[A]);
    client_store.set_identity(WORKLOAD_SVID, (a + &new_i.pem()).as_bytes(), ak.as_bytes()).unwrap();
    let (s, _) = handshake(&server, &client, &sni()).unwrap();
    assert_eq!(s.handshake_kind(), Some(rustls::HandshakeKind::Full));
}

#[test]
fn bad_secrets_leave_the_old_entry() {
    let root = root();
    let west = intermediate(&root, WEST);
    let (a, ak) = leaf(&west, &[A]);
    let (_, bk) = leaf(&west, &[B]);
    let s = store((&(a.clone() + &west.pem()), &ak), &root.pem());
    assert!(matches!(
        s.set_identity(WORKLOAD_SVID, a.as_bytes(), bk.as_bytes()),
        Err(IdentityError::KeyMismatch(_))
    ));
    assert!(s.set_identity(WORKLOAD_SVID, b"nothing", bk.as_bytes()).is_err());
    assert!(s.set_identity(WORKLOAD_SVID, a.as_bytes(), b"nothing").is_err());
    assert!(s.set_trust(TRUST_BUNDLE, b"").is_err());
    assert!(s.has_identity(WORKLOAD_SVID) && s.has_trust(TRUST_BUNDLE));
    let generation = s.trust_generation();
    assert_eq!(generation, 1);
}

/// A workload asks for its first certificate without one; what it opens afterwards must not be a
/// resumption of that anonymous session.
#[test]
fn a_session_without_identity_is_not_resumed_with_one() {
    let root = root();
    let west = intermediate(&root, WEST);
    let (b, bk) = leaf(&west, &[B]);
    let server = store((&(b + &west.pem()), &bk), &root.pem());
    let mut tls = server_tls();
    tls.client_certificate = ClientCertificate::Optional(validation(&[]));
    let server = server.server_config(&tls).unwrap();
    let workload = SecretStore::new();
    workload.set_trust(TRUST_BUNDLE, root.pem().as_bytes()).unwrap();
    let client = workload.client_config(&client_tls(&[B])).unwrap();
    let (s, _) = handshake(&server, &client, &sni()).unwrap();
    assert!(s.peer_certificates().is_none());
    let (a, ak) = leaf(&west, &[A]);
    workload.set_identity(WORKLOAD_SVID, (a + &west.pem()).as_bytes(), ak.as_bytes()).unwrap();
    let (s, _) = handshake(&server, &client, &sni()).unwrap();
    assert!(s.peer_certificates().is_some());
}

#[path = "domains.rs"]
mod domains;
#[path = "revoked.rs"]
mod revoked;
