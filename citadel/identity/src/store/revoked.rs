//! Handshakes with what was revoked.

use std::time::{Duration, SystemTime};

use mesh_model::federation::RevocationList;
use rcgen::{
    CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber,
};

use super::*;

fn domain() -> TrustDomain {
    TrustDomain::new("mesh.local").unwrap()
}

fn number_of(pem: &str) -> SerialNumber {
    let hex = crate::certificate_info(pem.as_bytes()).unwrap().serial;
    let digits: String = hex.chars().filter(char::is_ascii_hexdigit).collect();
    let bytes: Vec<u8> =
        (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect();
    SerialNumber::from_slice(&bytes)
}

fn params(number: u64, revoked: &[&str]) -> CertificateRevocationListParams {
    let now = SystemTime::now();
    let revoked = revoked.iter().map(|pem| RevokedCertParams {
        serial_number: number_of(pem),
        revocation_time: now.into(),
        reason_code: Some(RevocationReason::KeyCompromise),
        invalidity_date: None,
    });
    CertificateRevocationListParams {
        this_update: now.into(),
        next_update: (now + Duration::from_secs(3600)).into(),
        crl_number: number.into(),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    }
}

fn list(by: &Ca, revoked: &[&str]) -> RevocationList {
    RevocationList { issuer: by.pem(), list: params(7, revoked).signed_by(by).unwrap().pem().unwrap() }
}

struct Mesh {
    root: Ca,
    west: Ca,
    east: Ca,
    a: (String, String),
    client: Arc<SecretStore>,
    server: Arc<SecretStore>,
}

/// A caller of west, and a server of east.
fn mesh() -> Mesh {
    let root = root();
    let (west, east) = (intermediate(&root, WEST), intermediate(&root, EAST));
    let (a, b) = (leaf(&west, &[A]), leaf(&east, &[B]));
    let client = store((&(a.0.clone() + &west.pem()), &a.1), &root.pem());
    let server = store((&(b.0 + &east.pem()), &b.1), &root.pem());
    Mesh { root, west, east, a, client, server }
}

fn dial(m: &Mesh) -> Result<crate::PeerIdentity, rustls::Error> {
    let (s, _) = handshake(
        &m.server.server_config(&server_tls()).unwrap(),
        &m.client.client_config(&client_tls(&[B])).unwrap(),
        &sni(),
    )?;
    Ok(peer_identity(s.peer_certificates().unwrap()).unwrap())
}

fn refused(m: &Mesh) -> bool {
    matches!(dial(m), Err(rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked)))
}

#[test]
fn what_its_issuer_has_revoked_is_refused() {
    let m = mesh();
    let roots = m.root.pem();
    let peer = dial(&m).unwrap();
    let set = |lists: &[RevocationList]| m.server.set_revoked(&domain(), &roots, lists);
    assert!(!m.server.revocations().revoked(&peer.ids));
    // Its own issuer, once among many.
    set(&[list(&m.east, &[]), list(&m.west, &[&m.a.0])]).unwrap();
    assert!(refused(&m) && m.server.revocations().revoked(&peer.ids));
    // Another issuer cannot: neither another cluster nor, for what it did not sign, the root.
    set(&[list(&m.east, &[&m.a.0]), list(&m.root, &[&m.a.0])]).unwrap();
    assert!(!m.server.revocations().is_empty());
    dial(&m).unwrap();
    // The root revokes an intermediate, and with it what that has signed.
    set(&[list(&m.root, &[&m.west.pem()])]).unwrap();
    assert!(refused(&m) && m.server.revocations().revoked(&peer.ids));
    // Another intermediate of that name is another issuer.
    let next = intermediate(&m.root, WEST);
    set(&[list(&next, &[&m.a.0])]).unwrap();
    dial(&m).unwrap();
    set(&[]).unwrap();
    dial(&m).unwrap();
}

/// Who is refused learns why, through whatever an error is wrapped in.
#[test]
fn the_alert_is_known() {
    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);
    let of = |d| Outer(std::io::Error::other(rustls::Error::AlertReceived(d)));
    assert!(crate::told_revoked(&of(rustls::AlertDescription::CertificateRevoked)));
    assert!(!crate::told_revoked(&of(rustls::AlertDescription::CertificateExpired)));
    assert!(!crate::told_revoked(&std::io::Error::other("revoked")));
}

/// `caCrl`, for peers outside the mesh.
#[test]
fn lists_of_files_want_one_of_each_issuer() {
    let m = mesh();
    let dir = std::env::temp_dir().join(format!("flotilla-crl-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let write = |name: &str, content: String| {
        let path = dir.join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let roots = write("roots.pem", m.root.pem());
    let says = |lists: Option<String>| {
        let crl = lists.map(|l| write("ca.crl", l));
        let v = Validation {
            trusted: Some(SecretRef::Files { chain: roots.clone(), key: String::new() }),
            sans: vec![],
            crl,
        };
        let tls = DownstreamTls { client_certificate: ClientCertificate::Required(v), ..server_tls() };
        let server = m.server.server_config(&tls).unwrap();
        let client = m.client.client_config(&client_tls(&[B])).unwrap();
        match handshake(&server, &client, &sni()) {
            Ok(_) => "accepted".to_owned(),
            Err(rustls::Error::InvalidCertificate(e)) => format!("{e:?}"),
            Err(e) => panic!("{e}"),
        }
    };
    let all = |revoked: &[&str]| list(&m.west, revoked).list + &list(&m.root, &[]).list;
    assert_eq!(says(None), "accepted");
    assert_eq!(says(Some(all(&[]))), "accepted");
    assert_eq!(says(Some(all(&[&m.a.0]))), "Revoked");
    assert_eq!(says(Some(list(&m.west, &[]).list + &list(&m.root, &[&m.west.pem()]).list)), "Revoked");
    assert_eq!(says(Some(list(&m.west, &[]).list)), "UnknownRevocationStatus", "none of the root");
    let mut old = params(1, &[]);
    old.this_update = (SystemTime::now() - Duration::from_secs(7200)).into();
    old.next_update = (SystemTime::now() - Duration::from_secs(3600)).into();
    let old = old.signed_by(&m.west).unwrap().pem().unwrap();
    assert!(says(Some(old + &list(&m.root, &[]).list)).starts_with("ExpiredRevocationList"));
    // A file that holds none is an error, and not as if nothing were revoked.
    for bad in ["", "nothing"] {
        assert!(m.server.set_trust_and_lists("x", m.root.pem().as_bytes(), Some(bad.as_bytes())).is_err());
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn the_server_is_looked_at_as_well() {
    let m = mesh();
    let east = m.east.pem();
    m.client.set_revoked(&domain(), &m.root.pem(), &[list(&m.root, &[&east])]).unwrap();
    assert!(refused(&m));
}

#[test]
fn a_session_of_a_revoked_certificate_is_not_resumed() {
    let m = mesh();
    let (server, client) =
        (m.server.server_config(&server_tls()).unwrap(), m.client.client_config(&client_tls(&[B])).unwrap());
    handshake(&server, &client, &sni()).unwrap();
    let (s, _) = handshake(&server, &client, &sni()).unwrap();
    assert_eq!(s.handshake_kind(), Some(rustls::HandshakeKind::Resumed));
    m.server.set_revoked(&domain(), &m.root.pem(), &[list(&m.west, &[&m.a.0])]).unwrap();
    assert!(handshake(&server, &client, &sni()).is_err());
    // What did not change ends nobody's session.
    let generation = m.server.trust_generation();
    m.server.set_revoked(&domain(), &m.root.pem(), &[list(&m.west, &[&m.a.0])]).unwrap();
    let again = m.server.trust_generation();
    // A list signed anew is another one; the very same is not.
    assert!(again > generation);
    let same = [list(&m.west, &[&m.a.0])];
    m.server.set_revoked(&domain(), &m.root.pem(), &same).unwrap();
    let generation = m.server.trust_generation();
    m.server.set_revoked(&domain(), &m.root.pem(), &same).unwrap();
    assert_eq!(m.server.trust_generation(), generation);
}

#[test]
fn lists_of_strangers_and_damaged_ones_are_refused_and_the_others_count() {
    let m = mesh();
    let roots = m.root.pem();
    let other_root = root();
    let forged = intermediate(&other_root, WEST);
    let good = list(&m.west, &[&m.a.0]);
    let mut wrong = vec![
        list(&forged, &[]),
        list(&other_root, &[]),
        RevocationList { issuer: m.west.pem(), list: list(&m.east, &[]).list },
        RevocationList { issuer: m.west.pem(), list: list(&intermediate(&m.root, WEST), &[]).list },
        RevocationList { issuer: String::new(), ..good.clone() },
        RevocationList { list: "nothing".into(), ..good.clone() },
        RevocationList { list: " ".repeat(crate::MAX_LIST + 1), ..good.clone() },
    ];
    // One for changes, or for a part of the certificates.
    let mut part = params(1, &[]);
    part.issuing_distribution_point = Some(rcgen::CrlIssuingDistributionPoint {
        distribution_point: rcgen::CrlDistributionPoint { uris: vec!["http://x".into()] },
        scope: None,
    });
    wrong
        .push(RevocationList { issuer: m.west.pem(), list: part.signed_by(&m.west).unwrap().pem().unwrap() });
    // Of a cluster of another domain, though under the same root.
    let abroad = intermediate(&m.root, "spiffe://b.example/cluster/west");
    wrong.push(list(&abroad, &[]));
    for bad in &wrong {
        m.server.set_revoked(&domain(), &roots, &[]).unwrap();
        assert!(m.server.set_revoked(&domain(), &roots, std::slice::from_ref(bad)).is_err(), "{bad:?}");
        assert!(m.server.set_revoked(&domain(), &roots, &[bad.clone(), good.clone()]).is_err());
        assert!(refused(&m), "the good one counts");
    }
    // Who holds no right to sign lists signs none.
    let mut p = ca_params(Some(WEST));
    p.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let plain = CertifiedIssuer::signed_by(p, KeyPair::generate().unwrap(), &m.root).unwrap();
    assert!(params(1, &[]).signed_by(&plain).is_err());
}

/// A list is another's: no change of it is more than refused.
#[test]
fn any_bytes_are_handled() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let m = mesh();
    let roots = crate::pem_certificates("root", m.root.pem().as_bytes()).unwrap();
    let good = list(&m.west, &[&m.a.0]);
    let text: String = good.list.lines().filter(|l| !l.starts_with('-')).collect();
    let der = STANDARD.decode(text).unwrap();
    let pem =
        |der: &[u8]| format!("-----BEGIN X509 CRL-----\n{}\n-----END X509 CRL-----\n", STANDARD.encode(der));
    let read = |list: String| {
        let told = RevocationList { issuer: good.issuer.clone(), list };
        crate::SignedList::read(&told, &roots, &domain())
    };
    let said = read(pem(&der)).unwrap();
    for at in 0..der.len() {
        assert!(read(pem(&der[..at])).is_err(), "cut at {at}");
        for with in [0, 0x7f, 0x80, 0xff, der[at] ^ 1] {
            let mut other = der.clone();
            other[at] = with;
            if let Ok(other) = read(pem(&other)) {
                assert_eq!(other, said, "{at}");
            }
        }
    }
}

#[tokio::test]
async fn who_serves_a_connection_is_told() {
    let m = mesh();
    let peer = dial(&m).unwrap();
    let revocations = m.server.revocations();
    let waiting = {
        let (revocations, ids) = (revocations.clone(), peer.ids.clone());
        tokio::spawn(async move { revocations.until_revoked(&ids).await })
    };
    m.server.set_revoked(&domain(), &m.root.pem(), &[list(&m.east, &[&m.west.pem()])]).unwrap();
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    m.server.set_revoked(&domain(), &m.root.pem(), &[list(&m.west, &[&m.a.0])]).unwrap();
    tokio::time::timeout(Duration::from_secs(5), waiting).await.unwrap().unwrap();
    // And at once, if it was before.
    revocations.until_revoked(&peer.ids).await;
}

#[test]
fn what_a_list_says_is_read() {
    let m = mesh();
    let roots = crate::pem_certificates("root", m.root.pem().as_bytes()).unwrap();
    let read = |l: &RevocationList| crate::SignedList::read(l, &roots, &domain()).unwrap();
    let l = read(&list(&m.west, &[&m.a.0]));
    assert_eq!((l.number, l.revoked(), l.cluster.as_ref().map(ClusterId::as_str)), (7, 1, Some("west")));
    assert!(l.next_update > SystemTime::now() && l.ends > l.next_update);
    assert_eq!(read(&list(&m.root, &[])).cluster, None);
}
