use std::{path::Path, time::Duration};

use mesh_model::{ClusterId, SpiffeId, TrustDomain};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa};

use super::*;

struct Cluster {
    dir: tempfile::TempDir,
    ca: Authority,
}

fn load(dir: &Path, name: &str) -> Result<Authority, AuthorityError> {
    Authority::load(ClusterId::new(name).unwrap(), dir.into(), Duration::from_secs(3600))
}

fn cluster(name: &str) -> Cluster {
    let dir = tempfile::tempdir().unwrap();
    let ca = load(dir.path(), name).unwrap();
    Cluster { dir, ca }
}

/// West has founded, east has joined and heard of the bundle's number.
fn two() -> (Cluster, Cluster) {
    let (west, east) = (cluster("west"), cluster("east"));
    west.ca.found(&TrustDomain::default()).unwrap();
    let csr = east.ca.request_intermediate().unwrap();
    let (chain, status) = west.ca.sign_intermediate(&csr, east.ca.cluster()).unwrap();
    east.ca.install_intermediate(&TrustDomain::default(), &chain, &status.bundle_pem).unwrap();
    assert!(hear(&west, &east).unwrap());
    (west, east)
}

fn status(c: &Cluster) -> AuthorityStatus {
    c.ca.status().unwrap()
}

fn hear(from: &Cluster, to: &Cluster) -> Result<bool, AuthorityError> {
    to.ca.take_announcement(&status(from).announcement)
}

/// Everybody as they should be told to be.
fn reports(all: &[&Cluster]) -> Vec<Report> {
    all.iter()
        .map(|c| Report {
            cluster: c.ca.cluster().to_string(),
            age: Some(Duration::ZERO),
            sequence: status(c).bundle_sequence,
            root: status(c).issuer_pin,
            ..Report::default()
        })
        .collect()
}

fn step(c: &Cluster, step: Step, members: &[Report]) -> Rotated {
    c.ca.rotate(step, None, members).unwrap()
}

fn renew(from: &Cluster, to: &Cluster) {
    let csr = to.ca.request_renewal().unwrap();
    assert_eq!(to.ca.request_renewal().unwrap(), csr, "a renewal that is repeated sends the same request");
    let (chain, _) = from.ca.sign_intermediate(&csr, to.ca.cluster()).unwrap();
    to.ca.install_renewal(&chain).unwrap();
}

fn pins(c: &Cluster) -> Vec<String> {
    let roots = pem_certificates("roots", status(c).bundle_pem.as_bytes()).unwrap();
    roots.iter().map(|r| root_pin(r)).collect()
}

/// A workload's certificate chains to exactly these roots.
fn issues(c: &Cluster) {
    let id = SpiffeId::workload(&TrustDomain::default(), "books", "a").unwrap();
    let pending = mesh_identity::PendingSvid::generate(&id).unwrap();
    c.ca.issue(&pending.csr_pem, &id, Duration::ZERO, "test").unwrap();
}

#[test]
fn a_root_is_replaced_in_three_steps() {
    let (west, east) = two();
    let old = status(&west).root_pin;
    let both = [&west, &east];

    let done = step(&west, Step::Prepare, &[]);
    assert!(done.changed);
    let s = status(&west);
    assert_eq!((s.phase, s.bundle_sequence, &s.root_pin), (Phase::Prepared, 2, &old));
    let new = pins(&west)[1].clone();
    assert!(!step(&west, Step::Prepare, &[]).changed, "done twice is done once");
    assert_eq!(status(&west).bundle_sequence, 2);

    // East has not heard of it.
    let blocked = step(&west, Step::Activate, &reports(&both));
    assert_eq!((blocked.changed, blocked.blockers[0].cluster.as_str()), (false, "east"));
    assert!(hear(&west, &east).unwrap());
    assert!(!hear(&west, &east).unwrap());
    assert_eq!((pins(&east), status(&east).renewal_due(now())), (vec![old.clone(), new.clone()], None));

    assert!(step(&west, Step::Activate, &reports(&both)).changed);
    let s = status(&west);
    assert_eq!((s.phase, s.bundle_sequence, &s.root_pin), (Phase::Activated, 3, &new));
    assert_eq!((&s.issuer_pin, pins(&west)), (&new, vec![new.clone(), old.clone()]));
    assert!(!step(&west, Step::Activate, &[]).changed);

    // East is still under the old root.
    assert!(hear(&west, &east).unwrap());
    let blocked = step(&west, Step::Finish, &reports(&both));
    assert!(blocked.blockers[0].why.contains("under the old root"), "{blocked:?}");
    assert_eq!(status(&east).renewal_due(now()), Some("another root signs"));
    renew(&west, &east);
    assert_eq!((status(&east).issuer_pin, status(&east).renewal_due(now())), (new.clone(), None));

    assert!(step(&west, Step::Finish, &reports(&both)).changed);
    assert!(hear(&west, &east).unwrap());
    for c in both {
        let s = status(c);
        assert_eq!((s.phase, s.bundle_sequence, pins(c)), (Phase::Steady, 4, vec![new.clone()]));
        issues(c);
        assert!(!c.dir.path().join("ca/other-root-key.pem").exists(), "the old key is gone");
    }
    assert!(!step(&west, Step::Finish, &[]).changed);
    // And the next one.
    assert!(step(&west, Step::Prepare, &[]).changed);
    assert!(hear(&west, &east).unwrap());
}

fn now() -> std::time::SystemTime {
    std::time::SystemTime::now()
}

#[test]
fn who_was_away_hears_the_latest_as_long_as_its_root_has_signed_it() {
    let (west, east) = two();
    step(&west, Step::Prepare, &[]);
    step(&west, Step::Activate, &reports(&[&west]));
    assert!(hear(&west, &east).unwrap(), "the activation, without the preparation");
    renew(&west, &east);
    let (north, _) = (cluster("north"), ());
    let csr = north.ca.request_intermediate().unwrap();
    let (chain, s) = west.ca.sign_intermediate(&csr, north.ca.cluster()).unwrap();
    north.ca.install_intermediate(&TrustDomain::default(), &chain, &s.bundle_pem).unwrap();
    assert!(hear(&west, &north).unwrap(), "joined meanwhile: the number is the holder's");
    assert_eq!(status(&north).bundle_sequence, 3);
}

#[test]
fn a_preparation_is_taken_back() {
    let (west, east) = two();
    step(&west, Step::Prepare, &[]);
    hear(&west, &east).unwrap();
    let prepared = status(&west).announcement;
    assert!(step(&west, Step::Abort, &[]).changed);
    assert!(!step(&west, Step::Abort, &[]).changed);
    assert!(hear(&west, &east).unwrap());
    for c in [&west, &east] {
        assert_eq!((status(c).bundle_sequence, pins(c).len(), status(c).phase), (3, 1, Phase::Steady));
    }
    // Nobody brings it back.
    let e = east.ca.take_announcement(&prepared).unwrap_err();
    assert!(e.to_string().contains("sequence 2 is not above 3"), "{e}");
    step(&west, Step::Prepare, &[]);
    step(&west, Step::Activate, &reports(&[&west]));
    assert!(matches!(west.ca.rotate(Step::Abort, None, &[]), Err(AuthorityError::BadRequest(_))));
    assert!(matches!(east.ca.rotate(Step::Prepare, None, &[]), Err(AuthorityError::NoRootKey)));
}

/// What a member could tell another one: it has the bundle, its own intermediate and its key.
#[test]
fn a_hostile_member_announces_nothing() {
    let (west, east) = two();
    let evil = cluster("evil");
    evil.ca.found(&TrustDomain::default()).unwrap();
    let honest = Announcement::parse(&status(&west).announcement).unwrap();
    let mut bundle = honest.bundle.clone();
    bundle.roots.extend(pem_certificates("x", status(&evil).bundle_pem.as_bytes()).unwrap());
    bundle.sequence = 7;
    let refused = |a: &Announcement, what: &str| {
        let e = east.ca.take_announcement(&a.text()).expect_err(what);
        assert!(matches!(&e, AuthorityError::Refused(s) if s.contains("has not signed them")), "{what}: {e}");
        assert_eq!(status(&east).bundle_sequence, 1);
    };
    let read = |c: &Cluster, n: &str| std::fs::read_to_string(c.dir.path().join("ca").join(n)).unwrap();
    let root = status(&west).root_pin;
    let key = |c: &Cluster, n: &str| KeyPair::from_pem(&read(c, n)).unwrap();
    let sign =
        |keys: &[(String, &KeyPair)]| Announcement::sign(bundle.clone(), Phase::Prepared, keys).unwrap();
    refused(&sign(&[]), "unsigned");
    let intermediate = key(&east, "ca-key.pem");
    refused(&sign(&[(status(&east).intermediate, &intermediate)]), "signed by an intermediate");
    refused(&sign(&[(root.clone(), &intermediate)]), "in the root's name");
    let own = key(&evil, "root-key.pem");
    refused(&sign(&[(status(&evil).root_pin, &own)]), "signed by the root that it brings");
    // A signature of another bundle: number, phase and roots are covered.
    for f in [(|a: &mut Announcement| a.bundle.sequence = 9) as fn(&mut Announcement), |a| {
        a.phase = Phase::Activated
    }] {
        let mut a = honest.clone();
        f(&mut a);
        refused(&a, "an honest one that was changed");
    }
    let mut a = honest.clone();
    a.bundle.roots.clone_from(&bundle.roots);
    refused(&a, "other roots under an honest signature");

    // The root itself, and too late.
    step(&west, Step::Prepare, &[]);
    let second = status(&west).announcement;
    step(&west, Step::Abort, &[]);
    hear(&west, &east).unwrap();
    assert!(east.ca.take_announcement(&second).is_err());
    // Nor does the holder take any.
    assert!(matches!(west.ca.take_announcement(&second), Err(AuthorityError::Refused(_))));
    for junk in ["", "{}", &"x".repeat(200_000)] {
        assert!(matches!(east.ca.take_announcement(junk), Err(AuthorityError::BadRequest(_))));
    }
}

#[test]
fn what_an_intermediate_is_renewed_with() {
    let (west, east) = two();
    assert!(matches!(east.ca.install_renewal(""), Err(AuthorityError::BadRequest(_))), "not asked for");
    let csr = east.ca.request_renewal().unwrap();
    let (other, _) = west.ca.sign_intermediate(&csr, &ClusterId::new("north").unwrap()).unwrap();
    assert!(east.ca.install_renewal(&other).is_err(), "of another cluster");
    assert!(east.ca.install_renewal(&status(&east).chain_pem).is_err(), "of another key");
    let before = status(&east).intermediate;
    renew(&west, &east);
    assert_ne!(status(&east).intermediate, before);
    assert!(!east.dir.path().join("ca/renewal-key.pem").exists());
    issues(&east);
    assert!(!west.ca.renew_own().unwrap(), "nothing is due");
    // Due by age.
    let mut s = status(&east);
    let life = s.not_after.duration_since(s.not_before).unwrap();
    s.not_before -= life * 3;
    assert_eq!(s.renewal_due(now()), Some("two thirds of its life are over"));
    assert!(west.ca.request_renewal().is_err(), "the root key is there");
}

/// A crash between any two files of a change: the journal completes it.
#[test]
fn a_change_that_is_interrupted_is_completed() {
    for at in [Step::Prepare, Step::Activate, Step::Finish] {
        let west = cluster("west");
        west.ca.found(&TrustDomain::default()).unwrap();
        let path = west.dir.path().join("ca");
        for s in [Step::Prepare, Step::Activate, Step::Finish] {
            let before = copy(&path);
            west.ca.rotate(s, None, &reports(&[&west])).unwrap();
            if s != at {
                continue;
            }
            let after = copy(&path);
            let files = west.ca.active().unwrap().files.clone();
            let changed: Vec<_> =
                after.iter().filter(|(n, c)| before.get(*n) != Some(c)).map(|(n, _)| n.clone()).collect();
            assert!(changed.len() >= 2, "{changed:?}");
            // The journal is there, and so are some of the files.
            for done in 0..=changed.len() {
                let dir = tempfile::tempdir().unwrap();
                let ca = dir.path().join("ca");
                std::fs::create_dir(&ca).unwrap();
                for (n, c) in &before {
                    std::fs::write(ca.join(n), c).unwrap();
                }
                for n in &changed[..done] {
                    std::fs::write(ca.join(n), &after[n]).unwrap();
                }
                std::fs::write(ca.join("next.json"), serde_json::to_vec(&files).unwrap()).unwrap();
                let again = load(dir.path(), "west").unwrap().status().unwrap();
                let s = status(&west);
                assert_eq!(
                    (again.phase, again.bundle_sequence, again.bundle_pem, again.issuer_pin),
                    (s.phase, s.bundle_sequence, s.bundle_pem, s.issuer_pin),
                    "{at:?}, {done} files"
                );
                assert!(!ca.join("next.json").exists());
            }
        }
    }
}

fn copy(path: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(path).unwrap().map(|f| f.unwrap());
    files.map(|f| (f.file_name().into_string().unwrap(), std::fs::read(f.path()).unwrap())).collect()
}

#[test]
fn each_phase_survives_a_restart() {
    let west = cluster("west");
    west.ca.found(&TrustDomain::default()).unwrap();
    for s in [Step::Prepare, Step::Activate, Step::Finish] {
        west.ca.rotate(s, None, &reports(&[&west])).unwrap();
        let (now, then) = (status(&west), load(west.dir.path(), "west").unwrap().status().unwrap());
        assert_eq!(
            (now.phase, now.bundle_sequence, now.announcement, now.root_pin),
            (then.phase, then.bundle_sequence, then.announcement, then.root_pin)
        );
    }
    // By hand, in the midst of it.
    west.ca.rotate(Step::Prepare, None, &[]).unwrap();
    let path = west.dir.path().join("ca/root-cert.pem");
    let first = super::super::first_pem(&std::fs::read_to_string(&path).unwrap()).unwrap();
    std::fs::write(&path, first).unwrap();
    let e = load(west.dir.path(), "west").unwrap_err().to_string();
    assert!(e.contains("while a rotation is under way"), "{e}");
}

#[test]
fn a_root_that_is_plugged_in() {
    let (west, east) = two();
    let root = |ca: bool, path: Option<u8>| {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let mut p = CertificateParams::default();
        p.distinguished_name.push(DnType::CommonName, "corporate");
        if ca {
            p.is_ca = IsCa::Ca(path.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
        }
        (p.self_signed(&key).unwrap().pem(), key.serialize_pem())
    };
    let (cert, key) = root(true, None);
    let (other, other_key) = root(true, Some(1));
    let refuse = |given: (String, String), word: &str| {
        let e = west.ca.rotate(Step::Prepare, Some(given), &[]).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    };
    refuse((cert.clone(), other_key.clone()), "does not belong");
    refuse(root(false, None), "no root");
    refuse(root(true, Some(0)), "path length 0");
    refuse(("x".into(), key.clone()), "--root-cert");
    refuse((cert.clone(), "x".into()), "--root-key");
    refuse((cert.clone() + &other, key.clone()), "more than one");
    let held = std::fs::read_to_string(west.dir.path().join("ca/root-key.pem")).unwrap();
    refuse((status(&west).bundle_pem, held), "trusted already");
    assert_eq!(status(&west).bundle_sequence, 1, "nothing was changed");

    assert!(west.ca.rotate(Step::Prepare, Some((cert.clone(), key.clone())), &[]).unwrap().changed);
    assert!(!west.ca.rotate(Step::Prepare, Some((cert, key)), &[]).unwrap().changed, "the same again");
    refuse((other, other_key), "another new root is prepared");
    hear(&west, &east).unwrap();
    step(&west, Step::Activate, &reports(&[&west, &east]));
    hear(&west, &east).unwrap();
    renew(&west, &east);
    step(&west, Step::Finish, &reports(&[&west, &east]));
    assert!(hear(&west, &east).unwrap(), "signed by another kind of key");
    issues(&east);
}
