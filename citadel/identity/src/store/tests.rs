//! Handshakes in memory against a small CA.

use mesh_model::proxy::{StringMatch, TlsServerOptions, TlsVersion};
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
        options: TlsServerOptions::default(),
    }
}

fn client_tls(sans: &[&str]) -> UpstreamTls {
    UpstreamTls {
        certificate: Some(SecretRef::Sds(WORKLOAD_SVID.into())),
        validation: validation(sans),
        sni: "outbound_.9080_._.reviews.books.svc.cluster.local".into(),
        by_name: false,
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
#[path = "named.rs"]
mod named;
#[path = "revoked.rs"]
mod revoked;

/// Any server, to a client that offers only some of what there is.
fn client_of(
    change: impl FnOnce(&mut CryptoProvider),
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let mut p = (*crypto_provider()).clone();
    change(&mut p);
    let verifier =
        SecretStore::new().verifier(&Validation { trusted: None, sans: vec![], crl: None }, false).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(p))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Arc::new(config)
}

#[test]
fn a_server_may_offer_less() {
    let root = root();
    let (cert, key) = leaf(&root, &[A]);
    let s = store((&cert, &key), &root.pem());
    let try_with = |options: TlsServerOptions, client: &Arc<ClientConfig>| {
        let tls = DownstreamTls {
            client_certificate: ClientCertificate::None,
            alpn: vec![],
            min_version: TlsVersion::V1_2,
            options,
            ..server_tls()
        };
        let (s, _) = handshake(&s.server_config(&tls).unwrap(), client, "a.example").ok()?;
        Some((
            s.protocol_version().unwrap(),
            s.negotiated_cipher_suite().unwrap().suite(),
            s.negotiated_key_exchange_group().unwrap().name(),
        ))
    };
    use rustls::{CipherSuite as C, NamedGroup as G, ProtocolVersion as P, version};
    let both: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
    let (any, new) = (client_of(|_| (), &both), client_of(|_| (), &[&version::TLS13]));
    let old = client_of(|_| (), &[&version::TLS12]);
    let none = TlsServerOptions::default;
    assert_eq!(try_with(none(), &any).unwrap().0, P::TLSv1_3);
    assert_eq!(try_with(none(), &old).unwrap().0, P::TLSv1_2);

    let max = TlsServerOptions { max_version: Some(TlsVersion::V1_2), ..none() };
    assert_eq!(try_with(max.clone(), &any).unwrap().0, P::TLSv1_2);
    assert_eq!(try_with(max, &new), None);

    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let ciphers = |list: &[&str]| TlsServerOptions { ciphers: names(list), ..none() };
    let (chacha, aes) = ("ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256");
    let chosen = |list: &[&str]| try_with(ciphers(list), &old).map(|t| t.1);
    let is_chacha = Some(C::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256);
    let is_aes = Some(C::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256);
    assert_eq!(chosen(&[chacha]), is_chacha);
    assert_eq!(chosen(&[chacha, aes]), is_chacha, "the server's order");
    assert_eq!(chosen(&[aes, chacha]), is_aes);
    assert_eq!(
        chosen(&[
            "[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]",
            "-ECDHE-ECDSA-CHACHA20-POLY1305"
        ]),
        is_aes
    );
    assert_eq!(chosen(&["AES128-SHA"]), None, "nothing that there is");
    assert_eq!(try_with(ciphers(&["AES128-SHA"]), &any).unwrap().0, P::TLSv1_3, "only TLS 1.3 is left");

    let curves = |list: &[&str]| TlsServerOptions { curves: names(list), ..none() };
    let group = |list: &[&str]| try_with(curves(list), &any).map(|t| t.2);
    assert_eq!(group(&["P-384"]), Some(G::secp384r1));
    assert_eq!(group(&["P-521", "P-256"]), Some(G::secp256r1));
    let other = client_of(|p| p.kx_groups.retain(|g| g.name() == G::X25519), &both);
    assert_eq!(try_with(curves(&["P-256"]), &other), None);
    let refused = |options| {
        let tls = DownstreamTls { client_certificate: ClientCertificate::None, options, ..server_tls() };
        s.server_config(&tls).unwrap_err().to_string()
    };
    assert!(refused(curves(&["P-521"])).contains("P-521"));
    assert!(refused(TlsServerOptions { max_version: Some(TlsVersion::V1_2), ..none() }).contains("highest"));
}

#[test]
fn a_client_gets_the_certificate_that_it_can_use() {
    let root = root();
    let s = SecretStore::new();
    let named = |name: &str, key: KeyPair| {
        let p = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (p.signed_by(&key, &root).unwrap().pem(), key.serialize_pem())
    };
    let rsa = || KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
    for (secret, (chain, key)) in [
        ("rsa", named("a.example", rsa())),
        ("ecdsa", named("a.example", KeyPair::generate().unwrap())),
        ("other", named("b.example", KeyPair::generate().unwrap())),
    ] {
        s.set_identity(secret, chain.as_bytes(), key.as_bytes()).unwrap();
    }
    let tls = DownstreamTls {
        certificate: SecretRef::Sds("rsa".into()),
        client_certificate: ClientCertificate::None,
        alpn: vec![],
        min_version: TlsVersion::V1_2,
        options: TlsServerOptions {
            certificates: vec![SecretRef::Sds("ecdsa".into()), SecretRef::Sds("other".into())],
            ..TlsServerOptions::default()
        },
    };
    let server = s.server_config(&tls).unwrap();
    let both: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
    let any = client_of(|_| (), &both);
    let only_rsa = client_of(
        |p| {
            p.cipher_suites
                .retain(|s| s.suite() == rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256)
        },
        &[&rustls::version::TLS12],
    );
    let got = |client: &Arc<ClientConfig>, name: &str| {
        let (_, c) = handshake(&server, client, name).unwrap();
        let shown = c.peer_certificates().unwrap()[0].clone();
        ["rsa", "ecdsa", "other"]
            .into_iter()
            .find(|n| s.identity_cell(n).load_full().unwrap().cert[0] == shown)
            .unwrap()
    };
    assert_eq!(got(&any, "a.example"), "ecdsa");
    assert_eq!(got(&any, "b.example"), "other");
    assert_eq!(got(&only_rsa, "a.example"), "rsa");
}
