use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
};

use super::*;

type Ca = CertifiedIssuer<'static, KeyPair>;

fn params(name: &str) -> CertificateParams {
    let mut p = CertificateParams::default();
    p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    p.distinguished_name.push(rcgen::DnType::CommonName, name);
    p
}

fn root(name: &str) -> Ca {
    CertifiedIssuer::self_signed(params(name), KeyPair::generate().unwrap()).unwrap()
}

fn cluster(name: &str, root: &Ca, ends: SystemTime) -> Ca {
    let mut p = params(name);
    let uri = format!("spiffe://mesh.local/cluster/{name}");
    p.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
    p.not_after = ends.into();
    CertifiedIssuer::signed_by(p, KeyPair::generate().unwrap(), root).unwrap()
}

fn list(by: &Ca, number: u64, revoked: &[u64]) -> RevocationList {
    let now = SystemTime::now();
    let one = |serial: &u64| RevokedCertParams {
        serial_number: (*serial).into(),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    };
    let p = CertificateRevocationListParams {
        this_update: now.into(),
        next_update: (now + Duration::from_secs(60)).into(),
        crl_number: number.into(),
        issuing_distribution_point: None,
        revoked_certs: revoked.iter().map(one).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    RevocationList { issuer: by.pem(), list: p.signed_by(by).unwrap().pem().unwrap() }
}

fn domain() -> TrustDomain {
    TrustDomain::default()
}

fn now() -> u64 {
    crate::token::unix_now()
}

fn later() -> SystemTime {
    SystemTime::now() + Duration::from_secs(86_400)
}

#[test]
fn the_highest_number_of_an_issuer_counts() {
    let root = root("root");
    let (west, east) = (cluster("west", &root, later()), cluster("east", &root, later()));
    let mut known = Lists::default();
    let take = |known: &mut Lists, l: RevocationList| known.take(&domain(), &root.pem(), [l], now());
    assert_eq!(take(&mut known, list(&west, 3, &[])), (true, None));
    let digest = known.digest();
    assert!(known.published().is_empty(), "nothing is revoked");
    let revoking = list(&west, 4, &[7]);
    assert_eq!(take(&mut known, revoking.clone()), (true, None));
    assert_eq!(take(&mut known, revoking.clone()), (false, None));
    assert_ne!(known.digest(), digest);
    // Nobody takes it back by an older one, nor by another of that number.
    for number in [1, 3, 4] {
        assert_eq!(take(&mut known, list(&west, number, &[])), (false, None), "{number}");
    }
    assert_eq!(known.published(), [revoking]);
    // With one that says something, those of all.
    assert!(take(&mut known, list(&east, 1, &[])).0);
    assert_eq!(known.published().len(), 2);
    let mut other = Lists::default();
    assert!(other.take(&domain(), &root.pem(), from_pb(known.to_pb()), now()).0);
    assert_eq!((other.digest(), &other), (known.digest(), &known), "told, it is the same there");
}

#[test]
fn strangers_lists_are_not_taken_and_what_ended_goes() {
    let (root, stranger) = (root("root"), root("stranger"));
    let forged = cluster("west", &stranger, later());
    let brief = cluster("east", &root, SystemTime::now() + Duration::from_secs(5));
    let mut known = Lists::default();
    let told = [list(&forged, 9, &[1]), list(&stranger, 9, &[1]), list(&brief, 1, &[1])];
    let (changed, wrong) = known.take(&domain(), &root.pem(), told, now());
    assert!(changed && wrong.is_some_and(|w| w.contains("root")));
    assert_eq!(known.published().len(), 1);
    known.prune(&domain(), &root.pem(), now());
    assert_eq!(known.published().len(), 1);
    let mut ended = known.clone();
    ended.prune(&domain(), &root.pem(), now() + 6);
    assert!(ended.published().is_empty());
    assert_eq!(ended.take(&domain(), &root.pem(), [list(&brief, 2, &[1])], now() + 6), (false, None));
    // Under a root that is trusted no more.
    known.prune(&domain(), &stranger.pem(), now());
    assert!(known.published().is_empty());
}

#[test]
fn what_does_not_fit_into_a_message_says_nothing() {
    let root = root("root");
    let mut known = Lists::default();
    let many: Vec<u64> = (1..4000).collect();
    let told: Vec<_> = (0..30)
        .map(|n| list(&cluster(&format!("c{n}"), &root, later()), 1, if n == 29 { &[1] } else { &[] }))
        .chain([list(&root, 1, &many)])
        .collect();
    assert!(known.take(&domain(), &root.pem(), told, now()).0);
    let told = known.to_pb();
    assert!(told.iter().map(|l| l.list.len() + l.issuer.len()).sum::<usize>() < MAX_MESSAGE);
    assert_eq!(told.len(), 31);
    assert_eq!(told[0].issuer, root.pem(), "those that say something come first");
}
