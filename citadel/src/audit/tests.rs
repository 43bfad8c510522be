use std::os::unix::fs::PermissionsExt as _;

use mesh_identity::PendingSvid;
use mesh_model::{ClusterId, SpiffeId, TrustDomain};

use super::{
    verify::{Broken, Verified, log_of, verify},
    *,
};
use crate::{Authority, AuthorityError};

const TTL: Duration = Duration::from_secs(3600);

struct Ca {
    dir: tempfile::TempDir,
    ca: Authority,
}

impl Ca {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = load(dir.path());
        ca.found(&TrustDomain::default()).unwrap();
        Self { dir, ca }
    }

    fn again(self) -> Self {
        let Self { dir, ca } = self;
        drop(ca);
        Self { ca: load(dir.path()), dir }
    }

    fn issue(&self, account: &str) -> Result<crate::Issued, AuthorityError> {
        let id = SpiffeId::parse(&format!("spiffe://mesh.local/ns/books/sa/{account}")).unwrap();
        let csr = PendingSvid::generate(&id).unwrap().csr_pem;
        let proof = Proof { kind: "token".into(), id: "ab".into(), caller: "192.0.2.1:5".into() };
        self.ca.issue_for(&csr, &id, Duration::ZERO, &proof)
    }

    fn roots(&self) -> String {
        self.ca.status().unwrap().bundle_pem
    }

    fn verified(&self) -> Result<(Verified, Vec<Entry>), Broken> {
        let mut all = Vec::new();
        let files = log_of(self.dir.path()).unwrap();
        let v = verify(&files, self.roots().as_bytes(), None, |e| all.push(e.clone()))?;
        Ok((v, all))
    }

    fn log(&self) -> PathBuf {
        directory(self.dir.path()).join(CURRENT)
    }
}

fn load(dir: &Path) -> Authority {
    Authority::load(ClusterId::new("west").unwrap(), dir.to_path_buf(), TTL).unwrap()
}

#[test]
fn what_is_issued_and_refused_is_written_and_verifies() {
    let c = Ca::new();
    let issued = c.issue("reviews").unwrap();
    let east = ClusterId::new("east").unwrap();
    let csr =
        PendingSvid::generate(&SpiffeId::parse("spiffe://mesh.local/ns/a/sa/b").unwrap()).unwrap().csr_pem;
    c.ca.sign_intermediate_for(&csr, &east, &Proof::of("join token 1")).unwrap();
    c.ca.refused("", Proof::of("token"), "no proof");
    let (v, all) = c.verified().unwrap();
    assert_eq!((v.first, v.last as usize), (1, all.len()));
    let issues: Vec<_> = all
        .iter()
        .filter_map(|e| match &e.event {
            Event::Issued { serial, identity, proof, key, not_before, not_after } => {
                assert!(not_after > not_before && key.len() == 64);
                Some((serial.clone(), identity.clone(), proof.clone()))
            }
            _ => None,
        })
        .collect();
    let proof = Proof { kind: "token".into(), id: "ab".into(), caller: "192.0.2.1:5".into() };
    assert_eq!(issues, [(issued.serial, "spiffe://mesh.local/ns/books/sa/reviews".to_owned(), proof)]);
    let intermediates: Vec<_> = all
        .iter()
        .filter_map(|e| match &e.event {
            Event::Intermediate { cluster, .. } => Some(cluster.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(intermediates, ["west", "east"], "the own one of a new mesh, and the one that was asked for");
    assert!(matches!(&all.last().unwrap().event, Event::Refused { reason, .. } if reason == "no proof"));
    let text = fs::read_to_string(c.log()).unwrap();
    assert!(!text.contains("PRIVATE") && !text.contains("REQUEST"));
    assert_eq!(fs::metadata(c.log()).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn the_first_line_that_was_tampered_with_is_named() {
    let c = Ca::new();
    for a in ["one", "two", "three", "four"] {
        c.issue(a).unwrap();
    }
    let text = fs::read_to_string(c.log()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let at = lines.iter().position(|l| l.contains("/sa/two")).unwrap();
    let write = |lines: &[&str]| fs::write(c.log(), lines.join("\n") + "\n").unwrap();
    let breaks = |says: &str, line: usize| match c.verified().unwrap_err() {
        Broken::Entry { line: l, why, .. } => {
            assert!(
                why.contains(says) && l as usize == line + 1,
                "line {l}: {why}, instead of {line}: {says}"
            );
        }
        e => panic!("{e}"),
    };
    let other = lines[at].replace("/sa/two", "/sa/too");
    let mut changed = lines.clone();
    changed[at] = &other;
    write(&changed);
    breaks("signature is wrong", at);
    let mut removed = lines.clone();
    removed.remove(at);
    write(&removed);
    breaks("is numbered", at);
    let mut swapped = lines.clone();
    swapped.swap(at, at + 1);
    write(&swapped);
    breaks("is numbered", at);
    // A line of another log under the right number: by the hash.
    let stranger = Ca::new();
    for a in ["one", "two", "three", "four"] {
        stranger.issue(a).unwrap();
    }
    let theirs = fs::read_to_string(stranger.log()).unwrap();
    let theirs: Vec<&str> = theirs.lines().collect();
    let mut foreign = lines.clone();
    foreign[at] = theirs[at];
    write(&foreign);
    breaks("does not follow", at);
    // A whole log of another CA fits together, and nobody here vouches for it.
    write(&theirs);
    assert!(matches!(c.verified(), Err(Broken::Root { .. })));
    let junk = [&lines[..at], &["junk"]].concat();
    write(&junk);
    breaks("no entry", at);
    // What is cut off at the end is seen by who knows the head.
    write(&lines);
    let (v, _) = c.verified().unwrap();
    write(&lines[..at]);
    c.verified().unwrap();
    let files = log_of(c.dir.path()).unwrap();
    let known = Some((v.last, v.head.as_str()));
    assert!(matches!(verify(&files, c.roots().as_bytes(), known, |_| {}), Err(Broken::Head { .. })));
}

#[test]
fn a_workloads_certificate_signs_no_log() {
    let c = Ca::new();
    c.issue("one").unwrap();
    let id = SpiffeId::parse("spiffe://mesh.local/ns/books/sa/reviews").unwrap();
    let pending = PendingSvid::generate(&id).unwrap();
    let issued = c.ca.issue(&pending.csr_pem, &id, Duration::ZERO, "test").unwrap();
    let key = KeyPair::from_pem(&pending.key_pem).unwrap();
    let signer = Signer { key, chain: issued.chain, issuer: "x".into(), until: SystemTime::now() + TTL };
    c.ca.audit().set_signer(signer).unwrap();
    let e = c.verified().unwrap_err().to_string();
    assert!(e.contains("certified as somebody else"), "{e}");
}

#[test]
fn it_goes_on_after_a_restart_a_crash_and_a_rotation() {
    let c = Ca::new();
    c.issue("one").unwrap();
    let old = c.roots();
    // A crash in the middle of a line: nobody was given what it was about.
    let mut f = OpenOptions::new().append(true).open(c.log()).unwrap();
    f.write_all(b"{\"number\":99,\"time\":1,\"prev").unwrap();
    let c = c.again();
    c.issue("two").unwrap();
    use crate::rotation::Step;
    c.ca.rotate(Step::Prepare, None, &[]).unwrap();
    c.ca.rotate(Step::Activate, None, &[]).unwrap();
    c.ca.renew_own().unwrap();
    c.issue("three").unwrap();
    c.ca.rotate(Step::Finish, None, &[]).unwrap();
    assert!(!c.roots().contains(old.trim()));
    // The older lines are vouched for by the later ones, whose signer is under the root of now.
    let (_, all) = c.verified().unwrap();
    let signers = all.iter().filter(|e| matches!(e.event, Event::Signer { .. })).count();
    assert!(signers >= 3, "{signers}: at the start, after the restart, and under the new root");
    let files = log_of(c.dir.path()).unwrap();
    assert!(matches!(verify(&files, old.as_bytes(), None, |_| {}), Err(Broken::Root { .. })));
}

#[test]
fn large_files_are_put_aside() {
    let c = Ca::new();
    c.ca.audit().put_aside_at(1);
    for a in ["one", "two", "three"] {
        c.issue(a).unwrap();
    }
    let files = log_of(c.dir.path()).unwrap();
    assert!(files.len() >= 3, "{files:?}");
    let (v, all) = c.verified().unwrap();
    assert_eq!(v.last as usize, all.len());
    // Its newest file is gone, and a new one goes on where the last one ended.
    fs::remove_file(c.log()).unwrap();
    let last = c.verified().unwrap().0.last;
    let c = c.again();
    c.issue("four").unwrap();
    assert!(c.verified().unwrap().0.last > last);
    // The oldest was moved elsewhere.
    fs::remove_file(&files[0]).unwrap();
    assert!(c.verified().unwrap().0.first > 1);
}

#[test]
fn what_cannot_be_written_is_not_issued() {
    let c = Ca::new();
    c.issue("one").unwrap();
    let before = c.verified().unwrap().0.last;
    // After a restart there is no signer yet, so that it is its line that fails.
    let c = c.again();
    // As on a disk that is full: nothing can be opened for writing there.
    let aside = c.dir.path().join("aside");
    fs::rename(directory(c.dir.path()), &aside).unwrap();
    fs::write(directory(c.dir.path()), "").unwrap();
    c.ca.audit().put_aside_at(0);
    let e = c.issue("two").unwrap_err();
    assert!(e.to_string().contains("audit"), "{e}");
    assert!(c.ca.probe().is_err(), "and the CA is not well");
    fs::remove_file(directory(c.dir.path())).unwrap();
    fs::rename(&aside, directory(c.dir.path())).unwrap();
    c.issue("three").unwrap();
    let (v, all) = c.verified().unwrap();
    assert!(v.last > before);
    let text = format!("{all:?}");
    assert!(text.contains("/sa/three") && !text.contains("/sa/two"), "{text}");
}

#[test]
fn refusals_are_bounded() {
    let c = Ca::new();
    c.issue("one").unwrap();
    for _ in 0..1000 {
        c.ca.refused("", Proof { id: "x".repeat(10_000), ..Proof::of("token") }, &"y".repeat(10_000));
    }
    let refused = |c: &Ca| {
        let (_, all) = c.verified().unwrap();
        all.into_iter()
            .filter_map(|e| match e.event {
                Event::Refused { left_out, reason, .. } => Some((left_out, reason.len())),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    let first = refused(&c);
    assert!((20..200).contains(&first.len()), "{}", first.len());
    assert!(first.iter().all(|(_, n)| *n == MAX_TEXT));
    c.ca.audit().lock().tokens = 1.0;
    c.ca.refused("", Proof::of("token"), "later");
    let all = refused(&c);
    let told: u64 = all.iter().map(|(n, _)| n).sum();
    assert_eq!(told as usize + all.len(), 1001, "those that were left out are counted");
}

#[test]
fn probes_are_written_when_they_are_news() {
    let c = Ca::new();
    let probes = |c: &Ca| {
        let (_, all) = c.verified().unwrap();
        all.iter()
            .filter(|e| matches!(&e.event, Event::Issued { proof, .. } if proof.kind == "probe"))
            .count()
    };
    for _ in 0..50 {
        c.ca.probe().unwrap();
    }
    assert_eq!(probes(&c), 1);
    assert!(!directory(c.dir.path()).join(TRIAL).exists());
    // A disk on which nothing can be written is noticed all the same.
    let dir = directory(c.dir.path());
    let aside = c.dir.path().join("aside");
    fs::rename(&dir, &aside).unwrap();
    fs::write(&dir, "").unwrap();
    assert!(c.ca.probe().is_err());
    fs::remove_file(&dir).unwrap();
    fs::rename(&aside, &dir).unwrap();
    c.ca.probe().unwrap();
    c.ca.probe().unwrap();
    assert_eq!(probes(&c), 2, "that it works again");
}

#[test]
fn the_oldest_files_go_and_what_is_left_verifies() {
    let c = Ca::new();
    let east = ClusterId::new("east").unwrap();
    let csr =
        PendingSvid::generate(&SpiffeId::parse("spiffe://mesh.local/ns/a/sa/b").unwrap()).unwrap().csr_pem;
    c.ca.sign_intermediate_for(&csr, &east, &Proof::of("join token 1")).unwrap();
    c.ca.audit().put_aside_at(1);
    c.ca.keep_audit(2);
    for n in 0..6 {
        c.issue(&format!("young{n}")).unwrap();
    }
    // What may be valid still can be revoked: it stays.
    assert!(log_of(c.dir.path()).unwrap().len() > 3);
    c.ca.audit().keep(2, Duration::ZERO);
    for n in 0..6 {
        c.issue(&format!("old{n}")).unwrap();
    }
    let files = log_of(c.dir.path()).unwrap();
    assert_eq!(files.len(), 3, "{files:?}");
    let (v, all) = c.verified().unwrap();
    assert!(v.first > 1);
    assert!(matches!(all[0].event, Event::Signer { .. }), "each file says who signs it");
    let removed: Vec<_> = all
        .iter()
        .filter_map(|e| match &e.event {
            Event::Removed { through, .. } => Some(*through),
            _ => None,
        })
        .collect();
    assert!(removed.contains(&(v.first - 1)), "{removed:?} and {}", v.first);
    // A cluster's intermediate lives for a year, and can be revoked for as long.
    let known = c.ca.audit().certificates().unwrap();
    for cluster in ["east", "west"] {
        assert!(known.iter().any(|k| k.intermediate && k.of == cluster), "{cluster}: {known:?}");
    }
    // Lines that nobody signed do not verify, also at the beginning of what is left.
    let text = fs::read_to_string(&files[0]).unwrap();
    fs::write(&files[0], text.replacen("sa/old", "sa/odd", 1)).unwrap();
    assert!(matches!(c.verified(), Err(Broken::Entry { .. })));
    fs::write(&files[0], text).unwrap();
    let c = c.again();
    c.issue("after").unwrap();
    c.verified().unwrap();
}

#[test]
fn an_intermediate_of_its_own_that_is_not_written_is_not_used() {
    let c = Ca::new();
    use crate::rotation::Step;
    c.ca.rotate(Step::Prepare, None, &[]).unwrap();
    let before = c.ca.status().unwrap();
    let dir = directory(c.dir.path());
    let aside = c.dir.path().join("aside");
    fs::rename(&dir, &aside).unwrap();
    fs::write(&dir, "").unwrap();
    c.ca.audit().put_aside_at(0);
    assert!(c.ca.rotate(Step::Activate, None, &[]).is_err());
    let after = c.ca.status().unwrap();
    assert_eq!((&after.intermediate, &after.root_pin), (&before.intermediate, &before.root_pin));
    fs::remove_file(&dir).unwrap();
    fs::rename(&aside, &dir).unwrap();
    c.ca.rotate(Step::Activate, None, &[]).unwrap();
    assert_ne!(c.ca.status().unwrap().intermediate, before.intermediate);
    c.verified().unwrap();
    // Nor is a mesh founded.
    let empty = tempfile::tempdir().unwrap();
    let ca = load(empty.path());
    fs::remove_dir_all(directory(empty.path())).unwrap();
    fs::write(directory(empty.path()), "").unwrap();
    ca.audit().put_aside_at(0);
    assert!(ca.found(&TrustDomain::default()).is_err());
    assert!(ca.status().is_none() && !empty.path().join("ca/ca-key.pem").exists());
}
