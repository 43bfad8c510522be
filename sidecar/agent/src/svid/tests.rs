use mesh_model::{TrustDomain, federation::OwnRoots};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

use super::*;

/// A mesh of one root and one intermediate.
struct Ca {
    root: String,
    intermediate: String,
    issuer: Issuer<'static, KeyPair>,
}

fn ca() -> Ca {
    let root_key = KeyPair::generate().unwrap();
    let mut p = CertificateParams::default();
    p.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    let root = p.self_signed(&root_key).unwrap().pem();
    let by = Issuer::from_ca_cert_pem(&root, root_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut p = CertificateParams::default();
    p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    p.subject_alt_names = vec![SanType::URI("spiffe://mesh.local/cluster/west".try_into().unwrap())];
    let intermediate = p.signed_by(&key, &by).unwrap().pem();
    let issuer = Issuer::from_ca_cert_pem(&intermediate, key).unwrap();
    Ca { root, intermediate, issuer }
}

impl Ca {
    /// As the control plane tells it.
    fn told(&self, sequence: u64, more: &str) -> ForeignBundle {
        let der = pem_certificates("i", self.intermediate.as_bytes()).unwrap();
        ForeignBundle {
            trust_domain: TrustDomain::default(),
            roots: self.root.clone() + more,
            clusters: vec![],
            by_bundle: false,
            own: Some(OwnRoots {
                sequence,
                intermediate: root_pin(&der[0]),
                renew_within_ms: 4000,
                unlisted: false,
            }),
            revoked: vec![],
        }
    }
}

/// With a certificate of `ca` that an earlier run has kept.
fn renewal(ca: &Ca, dir: &std::path::Path) -> Renewal {
    given(ca, &ca.root, dir)
}

/// The same, started with a root.
fn given(ca: &Ca, root: &str, dir: &std::path::Path) -> Renewal {
    let identity = SpiffeId::workload(&TrustDomain::default(), "books", "a").unwrap();
    let key = KeyPair::generate().unwrap();
    let mut p = CertificateParams::default();
    p.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().unwrap())];
    let leaf = p.signed_by(&key, &ca.issuer).unwrap().pem();
    std::fs::write(dir.join("svid-chain.pem"), leaf + &ca.intermediate).unwrap();
    std::fs::write(dir.join("svid-key.pem"), key.serialize_pem()).unwrap();
    std::fs::write(dir.join("root-cert.pem"), &ca.root).unwrap();
    let options = SvidOptions {
        endpoint: Endpoint::Unix(dir.join("nobody.sock")),
        identity,
        token_file: dir.join("token"),
        root: root.into(),
        state_dir: Some(dir.into()),
    };
    let mut r = Renewal::new(options, SecretStore::new());
    assert!(r.load().is_some());
    r
}

#[tokio::test]
async fn what_is_told_is_trusted_kept_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (ca(), ca());
    let mut r = renewal(&one, dir.path());
    let roots = r.roots();
    let said = || roots.trusting.borrow().clone();
    let shown = one.told(1, "").own.unwrap().intermediate;
    assert_eq!(said(), Trusting { sequence: 0, intermediate: shown.clone() }, "it was told nothing yet");
    let kept = || std::fs::read_to_string(dir.path().join("root-cert.pem")).unwrap();

    // The same roots, now with a number.
    roots.tell(&[one.told(1, "")]);
    r.trust();
    assert_eq!(said().sequence, 1);
    roots.tell(&[one.told(2, &two.root)]);
    let before = r.store.trust_generation();
    r.trust();
    assert_eq!(
        (said(), kept()),
        (Trusting { sequence: 2, intermediate: shown }, one.root.clone() + &two.root)
    );
    assert!(r.store.trust_generation() > before);
    // What cannot be used changes nothing, and is not said to be trusted.
    let bad = ForeignBundle { roots: "junk".into(), ..one.told(3, "") };
    roots.tell(&[bad]);
    r.trust();
    assert_eq!((said().sequence, kept()), (2, one.root.clone() + &two.root));
    r.say();
    assert_eq!(said().sequence, 0, "what is trusted is not what was told");
    // Nothing about the own domain is no order to trust nobody.
    roots.tell(&[]);
    roots.tell(&[ForeignBundle { own: None, ..two.told(9, "") }]);
    assert_eq!(roots.told.borrow().as_ref().unwrap().own.as_ref().unwrap().sequence, 3);
}

#[tokio::test(start_paused = true)]
async fn another_intermediate_is_a_reason_to_renew_soon() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (ca(), ca());
    let mut r = renewal(&one, dir.path());
    let roots = r.roots();
    let mut told = roots.told.subscribe();
    let far = Instant::now() + Duration::from_secs(3600);
    let mut due = Due { at: far, other: None };
    roots.tell(&[one.told(1, "")]);
    r.look(&mut due);
    assert!(due.other.is_none(), "its own");
    roots.tell(&[two.told(2, &one.root)]);
    r.look(&mut due);
    let (of, at) = due.other.clone().unwrap();
    assert!(at <= Instant::now() + Duration::from_secs(4), "within the spread");
    r.look(&mut due);
    assert_eq!(due.other.clone().unwrap(), (of, at), "chosen once");
    let begun = Instant::now();
    r.wait(&mut told, far).await;
    assert!(begun.elapsed() <= Duration::from_secs(4), "{:?}", begun.elapsed());
    // Called off.
    roots.tell(&[one.told(3, "")]);
    r.look(&mut due);
    assert!(due.other.is_none());
    r.wait(&mut told, far).await;
    assert_eq!(Instant::now(), far);
}

#[tokio::test]
async fn who_was_away_believes_the_root_that_it_is_started_with_until_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (ca(), ca());
    let mut r = given(&one, &two.root, dir.path());
    let trusted = |r: &Renewal| pem_certificates("now", &r.now.as_ref().unwrap().roots).unwrap();
    let roots = |all: &str| pem_certificates("all", all.as_bytes()).unwrap();
    assert_eq!(trusted(&r), roots(&(one.root.clone() + &two.root)));
    r.roots().tell(&[two.told(4, "")]);
    r.trust();
    assert_eq!(trusted(&r), roots(&two.root), "and then what it is told alone");
    // The same as is kept adds nothing.
    assert_eq!(trusted(&given(&one, &one.root, dir.path())), roots(&one.root));
}
