use mesh_identity::{PendingSvid, certificate_info};

use super::*;

const DAY: Duration = Duration::from_secs(86_400);

fn authority(dir: &tempfile::TempDir, cluster: &str) -> Authority {
    Authority::load(ClusterId::new(cluster).unwrap(), dir.path().into(), DAY).unwrap()
}

fn td() -> TrustDomain {
    TrustDomain::default()
}

fn id(sa: &str) -> SpiffeId {
    SpiffeId::workload(&td(), "books", sa).unwrap()
}

fn join(founder: &Authority, newcomer: &Authority) {
    let csr = newcomer.request_intermediate().unwrap();
    assert_eq!(newcomer.request_intermediate().unwrap(), csr, "a repeated join sends the same request");
    let (chain, status) = founder.sign_intermediate(&csr, newcomer.cluster()).unwrap();
    newcomer.install_intermediate(&td(), &chain, &status.bundle_pem).unwrap();
}

#[test]
fn two_clusters_share_a_root() {
    let (w, e) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (west, east) = (authority(&w, "west"), authority(&e, "east"));
    assert!(matches!(west.issue("", &id("a"), DAY, "test"), Err(AuthorityError::Empty)));
    west.found(&td()).unwrap();
    assert!(matches!(west.found(&td()), Err(AuthorityError::Active(_))));
    join(&west, &east);
    assert!(!east.status().unwrap().holds_root_key);
    assert_eq!(east.status().unwrap().root_pin, west.status().unwrap().root_pin);
    assert!(matches!(
        east.sign_intermediate(&PendingSvid::generate(&id("a")).unwrap().csr_pem, west.cluster()),
        Err(AuthorityError::NoRootKey)
    ));
    // Both survive a restart.
    drop((west, east));
    let (west, east) = (authority(&w, "west"), authority(&e, "east"));
    for (a, cluster) in [(&west, "west"), (&east, "east")] {
        let pending = PendingSvid::generate(&id("asked-for")).unwrap();
        let issued = a.issue(&pending.csr_pem, &id("proved"), Duration::ZERO, "test").unwrap();
        let info = certificate_info(issued.chain[0].as_bytes()).unwrap();
        assert_eq!(info.spiffe.unwrap(), id("proved"), "the request's own names do not count");
        assert_eq!(issued.chain.len(), 3);
        let store = mesh_identity::SecretStore::new();
        store
            .set_identity("default", issued.chain_without_root().as_bytes(), pending.key_pem.as_bytes())
            .unwrap();
        let certs = pem_certificates("chain", issued.chain_without_root().as_bytes()).unwrap();
        let peer = mesh_identity::peer_identity(&certs).unwrap();
        assert_eq!(peer.cluster.unwrap().as_str(), cluster);
    }
}

#[test]
fn what_may_not_be_signed() {
    let w = tempfile::tempdir().unwrap();
    let west = authority(&w, "west");
    west.found(&td()).unwrap();
    let csr = PendingSvid::generate(&id("a")).unwrap().csr_pem;
    let foreign = SpiffeId::parse("spiffe://other.example/ns/books/sa/a").unwrap();
    assert!(matches!(west.issue(&csr, &foreign, DAY, "t"), Err(AuthorityError::Refused(_))));
    assert!(matches!(west.issue(&csr, &id("a"), DAY * 2, "t"), Err(AuthorityError::BadRequest(_))));
    assert!(matches!(west.issue("junk", &id("a"), DAY, "t"), Err(AuthorityError::BadRequest(_))));
    let long = "a".repeat(20_000);
    assert!(matches!(west.issue(&long, &id("a"), DAY, "t"), Err(AuthorityError::BadRequest(_))));
    assert!(matches!(west.sign_intermediate(&csr, west.cluster()), Err(AuthorityError::Refused(_))));
    // A flipped byte in the request breaks its proof of possession.
    let der = pem_body(&csr);
    for at in [40, der.len() - 5] {
        let mut bad = der.clone();
        bad[at] ^= 1;
        assert!(west.issue(&to_pem(&bad), &id("a"), DAY, "t").is_err(), "byte {at}");
    }
}

fn pem_body(pem: &str) -> Vec<u8> {
    use base64::Engine;
    let b64: String = pem.lines().filter(|l| !l.starts_with("-----")).collect();
    base64::engine::general_purpose::STANDARD.decode(b64).unwrap()
}

fn to_pem(der: &[u8]) -> String {
    use base64::Engine;
    let b64 = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<_> = b64.as_bytes().chunks(64).map(|c| std::str::from_utf8(c).unwrap()).collect();
    format!("-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n", lines.join("\n"))
}

#[test]
fn a_wrong_or_partial_ca_is_refused_and_kept() {
    let (w, e) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let west = authority(&w, "west");
    west.found(&td()).unwrap();
    let load = |cluster: &str| {
        Authority::load(ClusterId::new(cluster).unwrap(), w.path().into(), DAY)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(load("north").contains("of cluster west, but this is cluster north"));
    let ca = w.path().join("ca");
    let key = std::fs::read(ca.join("ca-key.pem")).unwrap();
    std::fs::copy(ca.join("root-key.pem"), ca.join("ca-key.pem")).unwrap();
    assert!(load("west").contains("ca-key.pem does not belong to ca-cert.pem"));
    std::fs::remove_file(ca.join("ca-key.pem")).unwrap();
    assert!(load("west").contains("some but not all"));
    std::fs::write(ca.join("ca-key.pem"), key).unwrap();
    authority(&w, "west");

    // An intermediate that another mesh's root signed does not fit this bundle.
    let o = tempfile::tempdir().unwrap();
    let other = authority(&o, "other");
    other.found(&td()).unwrap();
    let east = authority(&e, "east");
    let csr = east.request_intermediate().unwrap();
    let (chain, _) = other.sign_intermediate(&csr, east.cluster()).unwrap();
    let bundle = west.status().unwrap().bundle_pem;
    assert!(east.install_intermediate(&td(), &chain, &bundle).is_err());
    assert!(east.status().is_none(), "nothing was installed");
}

#[test]
fn leaving_forgets_the_mesh() {
    let (w, e) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (west, east) = (authority(&w, "west"), authority(&e, "east"));
    west.found(&td()).unwrap();
    join(&west, &east);
    east.reset().unwrap();
    assert!(east.status().is_none());
    let mut left: Vec<_> =
        std::fs::read_dir(e.path().join("ca")).unwrap().map(|f| f.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["bundle-sequence", "token-key.pem"]);
    join(&west, &east);
}

#[test]
fn the_bundles_number_rises_with_its_roots_alone() {
    let (w, o) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let number = |a: &Authority| a.status().unwrap().bundle_sequence;
    let west = authority(&w, "west");
    west.found(&td()).unwrap();
    assert_eq!((number(&west), number(&authority(&w, "west"))), (1, 1));
    // A second root, by hand, as before the first is replaced.
    let other = authority(&o, "other").found(&td()).unwrap().bundle_pem;
    let path = w.path().join("ca/root-cert.pem");
    let both = std::fs::read_to_string(&path).unwrap() + &other;
    std::fs::write(&path, both).unwrap();
    assert_eq!((number(&authority(&w, "west")), number(&authority(&w, "west"))), (2, 2));
    let west = authority(&w, "west");
    west.reset().unwrap();
    west.found(&td()).unwrap();
    assert_eq!(number(&west), 3, "it does not begin again");
}
