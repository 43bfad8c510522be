//! An endpoint of each profile that is honest, and what a dishonest or broken one achieves.

use std::sync::{Mutex, PoisonError};

use mesh_identity::{SecretStore, WORKLOAD_SVID};
use mesh_model::{
    SpiffeId,
    proxy::{ClientCertificate, DownstreamTls, SecretRef, TlsServerOptions, TlsVersion},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::bundle::{BundleUrl, FetchError};

type Ca = CertifiedIssuer<'static, KeyPair>;

const ENDPOINT: &str = "spiffe://b.example/bundle-endpoint";

fn root() -> Ca {
    let mut p = CertificateParams::default();
    p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(p, KeyPair::generate().unwrap()).unwrap()
}

fn domain() -> TrustDomain {
    TrustDomain::new("b.example").unwrap()
}

fn bundle(roots: &[&Ca], sequence: u64) -> TrustBundle {
    let pem: String = roots.iter().map(|r| r.pem()).collect();
    TrustBundle::from_pem(domain(), pem.as_bytes(), sequence, Some(Duration::from_secs(7))).unwrap()
}

/// TLS of a server that `ca` vouches for, under one name.
fn server(ca: &Ca, name: SanType) -> Arc<ServerConfig> {
    let key = KeyPair::generate().unwrap();
    let mut p = CertificateParams::default();
    p.subject_alt_names = vec![name];
    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let cert = p.signed_by(&key, ca).unwrap().pem();
    let store = SecretStore::new();
    store.set_identity(WORKLOAD_SVID, cert.as_bytes(), key.serialize_pem().as_bytes()).unwrap();
    store
        .server_config(&DownstreamTls {
            certificate: SecretRef::Sds(WORKLOAD_SVID.into()),
            client_certificate: ClientCertificate::None,
            alpn: vec!["http/1.1".into()],
            min_version: TlsVersion::V1_2,
            options: TlsServerOptions::default(),
        })
        .unwrap()
}

fn uri(s: &str) -> SanType {
    SanType::URI(s.try_into().unwrap())
}

fn localhost() -> SanType {
    SanType::DnsName("localhost".try_into().unwrap())
}

/// Answers each connection with the next text, and with the last one from then on; tells what it was asked.
async fn endpoint(tls: Arc<ServerConfig>, answers: Vec<String>) -> (BundleUrl, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/bundle", listener.local_addr().unwrap().port());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    tokio::spawn(async move {
        let mut next = answers.into_iter().peekable();
        let mut answer = String::new();
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let Ok(mut s) = TlsAcceptor::from(tls.clone()).accept(tcp).await else { continue };
            let mut head = vec![0; 4096];
            let n = s.read(&mut head).await.unwrap_or(0);
            seen.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(String::from_utf8_lossy(&head[..n]).into_owned());
            answer = next.next().unwrap_or(answer);
            let _ = s.write_all(answer.as_bytes()).await;
            let _ = s.shutdown().await;
        }
    });
    (BundleUrl::parse(&url).unwrap(), asked)
}

fn ok(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn to(location: &str) -> String {
    format!("HTTP/1.1 302 Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n")
}

#[tokio::test]
async fn the_web_profile_believes_the_host_and_nobody_else() {
    let (authority, other, of_b) = (root(), root(), root());
    let document = bundle(&[&of_b], 3).document();
    let tls = web_tls(authority.pem().as_bytes()).unwrap();
    let (url, asked) = endpoint(server(&authority, localhost()), vec![ok(&document)]).await;
    let told = fetch(&url, &domain(), tls.clone()).await.unwrap();
    assert_eq!(told, bundle(&[&of_b], 3));
    let request = asked.lock().unwrap()[0].to_ascii_lowercase();
    assert!(request.starts_with("get /bundle http/1.1\r\nhost: localhost:"), "{request}");
    // Another authority, another name, and the domain's own root, which is no authority of the web.
    for (ca, name) in [
        (&other, localhost()),
        (&authority, SanType::DnsName("b.example".try_into().unwrap())),
        (&of_b, localhost()),
    ] {
        let (url, asked) = endpoint(server(ca, name), vec![ok(&document)]).await;
        let e = fetch(&url, &domain(), tls.clone()).await.unwrap_err();
        assert!(matches!(e, FetchError::Connection { .. }), "{e:?}");
        assert!(asked.lock().unwrap().is_empty(), "nothing was asked of a stranger");
    }
}

#[tokio::test]
async fn the_spiffe_profile_believes_one_identity_under_the_bundle_that_is_held() {
    let (old, new, other) = (root(), root(), root());
    let id = SpiffeId::parse(ENDPOINT).unwrap();
    let rotating = bundle(&[&old, &new], 4);
    let held = spiffe_tls(&bundle(&[&old], 3), &id).unwrap();
    let (url, _) = endpoint(server(&old, uri(ENDPOINT)), vec![ok(&rotating.document())]).await;
    let told = fetch(&url, &domain(), held.clone()).await.unwrap();
    assert_eq!(told.roots.len(), 2, "while a root is replaced, both");
    // The next answer may come under the new root, if the bundle that was told is used.
    let (url, _) = endpoint(server(&new, uri(ENDPOINT)), vec![ok(&bundle(&[&new], 5).document())]).await;
    assert!(fetch(&url, &domain(), held.clone()).await.is_err());
    assert_eq!(fetch(&url, &domain(), spiffe_tls(&told, &id).unwrap()).await.unwrap().sequence, 5);
    // Another workload of the domain, the same name under another root, and a certificate of the web.
    for (ca, name) in [(&old, uri("spiffe://b.example/other")), (&other, uri(ENDPOINT)), (&old, localhost())]
    {
        let (url, _) = endpoint(server(ca, name), vec![ok(&rotating.document())]).await;
        let e = fetch(&url, &domain(), held.clone()).await.unwrap_err();
        assert!(matches!(e, FetchError::Connection { .. }), "{e:?}");
    }
    assert!(spiffe_tls(&rotating, &SpiffeId::parse("spiffe://c.example/x").unwrap()).is_err());
}

#[tokio::test]
async fn what_is_no_bundle_is_none() {
    let (authority, of_b) = (root(), root());
    let tls = web_tls(authority.pem().as_bytes()).unwrap();
    let good = bundle(&[&of_b], 1).document();
    let long = format!("{{\"keys\":[],\"x\":\"{}\"}}", "y".repeat(mesh_identity::MAX_DOCUMENT));
    for (answer, says) in [
        (ok("{}"), "no keys"),
        (ok("{\"keys\":[]}"), "0 roots"),
        (ok("<html>"), "no JSON"),
        (ok(&long), "no whole bundle"),
        (ok(&good).replace("200 OK", "404 Not Found"), "answers 404"),
        (ok(&good[..good.len() - 1]), "no JSON"),
        (format!("HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{good}"), "no whole bundle"),
        ("SSH-2.0-x\r\n".to_owned(), "does not speak HTTP"),
        ("HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n".to_owned(), "to nowhere"),
        (to("http://localhost/bundle"), "https://"),
        (to("/bundle"), "more than 3 times"),
    ] {
        let (url, _) = endpoint(server(&authority, localhost()), vec![answer]).await;
        let e = in_full(&fetch(&url, &domain(), tls.clone()).await.unwrap_err());
        assert!(e.contains(says), "{e} instead of {says}");
    }
    // A redirect is followed under the same verification.
    let (there, _) = endpoint(server(&authority, localhost()), vec![ok(&good)]).await;
    let (url, _) = endpoint(server(&authority, localhost()), vec![to(&there.to_string())]).await;
    assert_eq!(fetch(&url, &domain(), tls.clone()).await.unwrap().sequence, 1);
    let (stranger, _) = endpoint(server(&root(), localhost()), vec![ok(&good)]).await;
    let (url, _) = endpoint(server(&authority, localhost()), vec![to(&stranger.to_string())]).await;
    assert!(matches!(fetch(&url, &domain(), tls).await, Err(FetchError::Connection { .. })));
}

#[test]
fn bundles_only_become_newer() {
    let (one, two) = (root(), root());
    let of = |r: &Ca, n: u64| bundle(&[r], n);
    let cases = [
        (None, of(&one, 1), true),
        (Some(of(&one, 1)), of(&two, 2), true),
        (Some(of(&one, 2)), of(&one, 2), true),
        (Some(of(&one, 2)), of(&two, 2), false),
        (Some(of(&one, 2)), of(&one, 1), false),
        // Without a number the last one told is the newest.
        (Some(of(&one, 2)), of(&two, 0), true),
        (Some(of(&one, 0)), of(&two, 1), true),
        (Some(of(&one, 0)), of(&two, 0), true),
    ];
    for (n, (held, new, taken)) in cases.into_iter().enumerate() {
        assert_eq!(newer(held.as_ref(), &new).is_ok(), taken, "case {n}");
    }
}
