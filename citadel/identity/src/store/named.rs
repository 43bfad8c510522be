//! Certificates outside the mesh: of the name that a host was found by, and those that are known beforehand.

use aws_lc_rs::digest::{SHA256, digest};
use mesh_model::proxy::CertificatePin;
use x509_parser::prelude::FromDer as _;

use super::*;

/// A chain of one certificate for DNS names, under a CA of no mesh.
fn of_names(issuer: &Ca, names: &[&str]) -> (String, String, Vec<u8>) {
    let key = KeyPair::generate().unwrap();
    let mut p = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert = p.signed_by(&key, issuer).unwrap();
    (cert.pem(), key.serialize_pem(), cert.der().to_vec())
}

fn outside(root: &Ca) -> Arc<SecretStore> {
    let (chain, key, _) = of_names(root, &["*.shop.example"]);
    let s = SecretStore::new();
    s.set_identity("own", chain.as_bytes(), key.as_bytes()).unwrap();
    s.set_trust("theirs", root.pem().as_bytes()).unwrap();
    s
}

fn theirs() -> Validation {
    Validation { trusted: Some(SecretRef::Sds("theirs".into())), sans: vec![], crl: None }
}

fn served(client_certificate: ClientCertificate, pins: Vec<CertificatePin>) -> DownstreamTls {
    DownstreamTls {
        certificate: SecretRef::Sds("own".into()),
        client_certificate,
        options: TlsServerOptions { pins, ..TlsServerOptions::default() },
        ..server_tls()
    }
}

#[test]
fn a_server_shows_the_name_by_which_it_was_found() {
    let root = root();
    let store = outside(&root);
    let server = store.server_config(&served(ClientCertificate::None, vec![])).unwrap();
    let client = |sans: &[&str], by_name| {
        let tls = UpstreamTls {
            certificate: None,
            validation: Validation {
                sans: sans.iter().map(|s| StringMatch::exact(*s)).collect(),
                ..theirs()
            },
            sni: String::new(),
            by_name,
            alpn: vec![],
        };
        store.client_config(&tls).unwrap()
    };
    let (s, _) = handshake(&server, &client(&[], true), "a.shop.example").unwrap();
    assert_eq!(s.server_name(), Some("a.shop.example"));
    for other in ["shop.example", "a.b.shop.example", "a.other.example"] {
        let e = handshake(&server, &client(&[], true), other).unwrap_err();
        assert!(matches!(e, rustls::Error::InvalidCertificate(_)), "{other}: {e}");
    }
    // Whoever names names means those, and whoever asks for no proof by name gets none.
    assert!(handshake(&server, &client(&["*.shop.example"], true), "a.other.example").is_ok());
    assert!(handshake(&server, &client(&["a.shop.example"], true), "a.shop.example").is_err());
    assert!(handshake(&server, &client(&[], false), "a.other.example").is_ok());
}

#[test]
fn a_client_shows_one_of_the_certificates_that_are_known() {
    let root = root();
    let store = outside(&root);
    let hash = |der: &[u8]| <[u8; 32]>::try_from(digest(&SHA256, der).as_ref()).unwrap();
    let client = |name: &str| {
        let (chain, key, der) = of_names(&root, &[name]);
        store.set_identity(name, chain.as_bytes(), key.as_bytes()).unwrap();
        let (_, cert) = x509_parser::certificate::X509Certificate::from_der(&der).unwrap();
        let tls = UpstreamTls {
            certificate: Some(SecretRef::Sds(name.into())),
            validation: theirs(),
            sni: "a.shop.example".into(),
            by_name: false,
            alpn: vec![],
        };
        (store.client_config(&tls).unwrap(), hash(&der), hash(cert.public_key().raw))
    };
    let ((known, whole, key), (other, ..)) = (client("known.example"), client("other.example"));
    let required = |pins| store.server_config(&served(ClientCertificate::Required(theirs()), pins)).unwrap();
    let takes = |server: &Arc<ServerConfig>, client| handshake(server, client, "a.shop.example").is_ok();
    for pin in [CertificatePin::Whole(whole), CertificatePin::PublicKey(key)] {
        // One of them is enough.
        let server = required(vec![CertificatePin::Whole([0; 32]), pin]);
        assert!(takes(&server, &known), "{pin:?}");
        assert!(!takes(&server, &other), "{pin:?}: of the same issuer, and not known");
    }
    // A hash of the one kind is none of the other.
    assert!(!takes(&required(vec![CertificatePin::Whole(key), CertificatePin::PublicKey(whole)]), &known));
    assert!(takes(&required(vec![]), &other), "without any, the issuer is enough");
    // A certificate that is known still has to be of a trusted issuer.
    let stranger = super::root();
    let (chain, k, der) = of_names(&stranger, &["x"]);
    store.set_identity("x", chain.as_bytes(), k.as_bytes()).unwrap();
    let tls = UpstreamTls {
        certificate: Some(SecretRef::Sds("x".into())),
        validation: theirs(),
        ..client_tls(&[])
    };
    let x = store.client_config(&UpstreamTls { alpn: vec![], ..tls }).unwrap();
    assert!(!takes(&required(vec![CertificatePin::Whole(hash(&der))]), &x));
}
