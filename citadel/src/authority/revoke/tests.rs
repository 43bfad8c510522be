use std::time::Duration;

use mesh_identity::{PendingSvid, SignedList};
use mesh_model::{ClusterId, TrustDomain};

use super::*;
use crate::audit::Proof;

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

fn issue(ca: &Authority, sa: &str) -> String {
    let pending = PendingSvid::generate(&id(sa)).unwrap();
    ca.issue(&pending.csr_pem, &id(sa), Duration::ZERO, "test").unwrap().serial
}

/// The lists of a CA, read as everybody does.
fn lists(ca: &Authority) -> Vec<SignedList> {
    let status = ca.status().unwrap();
    let roots = pem_certificates("roots", status.bundle_pem.as_bytes()).unwrap();
    status.lists.iter().map(|l| SignedList::read(l, &roots, &td()).unwrap()).collect()
}

fn of<'a>(lists: &'a [SignedList], cluster: Option<&str>) -> &'a SignedList {
    lists.iter().find(|l| l.cluster.as_ref().map(ClusterId::as_str) == cluster).unwrap()
}

fn two() -> (tempfile::TempDir, tempfile::TempDir, Authority, Authority) {
    let (w, e) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (west, east) = (authority(&w, "west"), authority(&e, "east"));
    west.found(&td()).unwrap();
    join(&west, &east);
    (w, e, west, east)
}

fn join(founder: &Authority, newcomer: &Authority) {
    let csr = newcomer.request_intermediate().unwrap();
    let (chain, status) = founder.sign_intermediate(&csr, newcomer.cluster()).unwrap();
    newcomer.install_intermediate(&td(), &chain, &status.bundle_pem).unwrap();
}

#[test]
fn every_authority_whose_key_is_here_has_a_list() {
    let (_w, _e, west, east) = two();
    let all = lists(&west);
    assert_eq!(all.len(), 2);
    assert_eq!((of(&all, None).revoked(), of(&all, Some("west")).revoked()), (0, 0));
    let all = lists(&east);
    assert_eq!((all.len(), of(&all, Some("east")).revoked()), (1, 0));
    // A week, and longer where certificates live longer.
    let holds = all[0].next_update.duration_since(SystemTime::now()).unwrap();
    assert!(holds > 6 * DAY && holds <= 7 * DAY, "{holds:?}");
}

#[test]
fn a_workload_is_revoked_with_all_of_its_certificates_and_tokens() {
    let (_w, e, _west, east) = two();
    let (one, two, other) = (issue(&east, "a"), issue(&east, "a"), issue(&east, "b"));
    let token = east.tokens().issue("books", "a", DAY).unwrap();
    let (ns, sa, at) = east.tokens().verify_dated(&token).unwrap();
    assert!(east.takes_token(&ns, &sa, at));
    let before = of(&lists(&east), Some("east")).number;
    let done = east.revoke(&Target::Identity(id("a")), Reason::KeyCompromise).unwrap();
    let serials: Vec<_> = done.revoked.iter().map(|r| r.serial.clone()).collect();
    assert_eq!(serials, [one.clone(), two]);
    assert!(done.tokens && done.beyond.is_empty());
    let list = of(&lists(&east), Some("east")).clone();
    assert_eq!(list.revoked(), 2);
    assert!(list.number > before, "a later list has a higher number");
    assert!(east.has_revoked(&one) && !east.has_revoked(&other));
    assert!(!east.takes_token(&ns, &sa, at) && east.takes_token("books", "b", at));
    assert!(east.takes_token(&ns, &sa, at + 2), "a new token is one");
    // Again it is nothing new, and a restart forgets nothing.
    let again = east.revoke(&Target::Identity(id("a")), Reason::KeyCompromise).unwrap();
    assert_eq!((again.revoked.len(), again.already), (0, 2));
    let number = of(&lists(&east), Some("east")).number;
    drop(east);
    let east = authority(&e, "east");
    let list = of(&lists(&east), Some("east")).clone();
    assert_eq!(list.revoked(), 2);
    assert!(list.number > number);
    assert!(east.has_revoked(&one) && !east.takes_token(&ns, &sa, at));
    // It is in the log.
    let log = std::fs::read_to_string(e.path().join("audit/issuance.jsonl")).unwrap();
    let revoked = log.lines().filter(|l| l.contains("\"event\":\"revoked\"") && l.contains(&one));
    assert_eq!(revoked.count(), 1);
}

#[test]
fn one_certificate_is_revoked_by_its_number() {
    let (_w, _e, west, east) = two();
    let (one, _) = (issue(&east, "a"), issue(&east, "a"));
    let colons: Vec<_> =
        one.as_bytes().chunks(2).map(|c| String::from_utf8_lossy(c).to_uppercase()).collect();
    let done = east.revoke(&Target::Serial(colons.join(":")), Reason::Unspecified).unwrap();
    assert_eq!((done.revoked.len(), done.revoked[0].of.as_str(), done.tokens), (1, id("a").as_str(), false));
    assert!(east.takes_token("books", "a", 0));
    for stranger in [&west, &east] {
        let refused = stranger.revoke(&Target::Serial("0123".into()), Reason::Unspecified);
        assert!(matches!(refused, Err(AuthorityError::BadRequest(_))), "{refused:?}");
    }
    assert!(matches!(
        west.revoke(&Target::Serial(one), Reason::Unspecified),
        Err(AuthorityError::BadRequest(why)) if why.contains("where it was issued")
    ));
    // What has expired needs no list.
    let pending = PendingSvid::generate(&id("c")).unwrap();
    let short = east.issue(&pending.csr_pem, &id("c"), Duration::from_secs(1), "test").unwrap().serial;
    std::thread::sleep(Duration::from_millis(2100));
    assert!(matches!(
        east.revoke(&Target::Serial(short), Reason::Unspecified),
        Err(AuthorityError::BadRequest(why)) if why.contains("expired")
    ));
}

#[test]
fn the_root_revokes_clusters_and_nobody_else_does() {
    let (_w, _e, west, east) = two();
    let cluster = |c: &str| Target::Cluster(ClusterId::new(c).unwrap());
    assert!(east.revoke(&cluster("west"), Reason::Unspecified).is_err());
    assert!(matches!(
        west.revoke(&cluster("west"), Reason::Unspecified),
        Err(AuthorityError::Refused(why)) if why.contains("cut itself off")
    ));
    assert_eq!(of(&lists(&west), None).revoked(), 0, "what was refused changed nothing");
    let done = west.revoke(&cluster("east"), Reason::CaCompromise).unwrap();
    assert_eq!(done.revoked.len(), 1);
    assert_eq!(done.revoked[0].of, "spiffe://mesh.local/cluster/east");
    assert_eq!((of(&lists(&west), None).revoked(), of(&lists(&west), Some("west")).revoked()), (1, 0));
    assert!(west.revoke(&cluster("north"), Reason::Unspecified).is_err());
}

#[test]
fn an_intermediate_that_was_replaced_leaves_its_last_list() {
    let (_w, e, west, east) = two();
    let (gone, kept) = (issue(&east, "a"), issue(&east, "b"));
    east.revoke(&Target::Serial(gone.clone()), Reason::KeyCompromise).unwrap();
    let csr = east.request_renewal().unwrap();
    let (chain, _) = west.sign_intermediate_for(&csr, east.cluster(), &Proof::of("test")).unwrap();
    east.install_renewal(&chain).unwrap();
    let check = |east: &Authority| {
        let all = lists(east);
        let current = east.status().unwrap().intermediate;
        let (new, old) = (
            all.iter().find(|l| l.issuer == current).unwrap(),
            all.iter().find(|l| l.issuer != current).unwrap(),
        );
        assert_eq!((all.len(), new.revoked(), old.revoked()), (2, 0, 1));
        // For as long as anything lives that it signed.
        assert!(old.next_update > SystemTime::now() + DAY);
    };
    check(&east);
    drop(east);
    let east = authority(&e, "east");
    check(&east);
    // Its key is gone: what it signed is revoked with it, by the root.
    let done = east.revoke(&Target::Serial(kept.clone()), Reason::KeyCompromise).unwrap();
    assert_eq!((done.revoked.len(), done.beyond), (0, vec![kept]));
    let done = west.revoke(&Target::Cluster(east.cluster().clone()), Reason::KeyCompromise).unwrap();
    assert_eq!(done.revoked.len(), 2, "both of them");
}

#[test]
fn lists_are_signed_anew_when_they_are_a_day_old() {
    let (_w, _e, _west, east) = two();
    let number = of(&lists(&east), Some("east")).number;
    assert!(!east.refresh_lists().unwrap());
    let old = SystemTime::now() - REFRESH;
    east.revocation().signed = Some(old);
    assert!(east.refresh_lists().unwrap());
    assert_eq!(of(&lists(&east), Some("east")).number, number + 1);
    assert!(!east.refresh_lists().unwrap());
}

#[test]
fn what_the_audit_log_cannot_hold_does_not_happen() {
    let (w, _e, west, _east) = two();
    let one = issue(&west, "a");
    let before = west.status().unwrap();
    // It is a directory now: nothing can be written to it.
    let log = w.path().join("audit/issuance.jsonl");
    west.audit().put_aside_at(0);
    std::fs::rename(&log, w.path().join("elsewhere")).unwrap();
    std::fs::create_dir(&log).unwrap();
    std::fs::create_dir(log.join("full")).unwrap();
    assert!(west.revoke(&Target::Serial(one.clone()), Reason::Unspecified).is_err());
    assert!(!west.has_revoked(&one));
    assert_eq!(west.status().unwrap().lists, before.lists);
}
