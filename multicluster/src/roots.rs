//! The roots of the own trust domain, between its members: announcements, acknowledgements, renewed intermediates.
//!
//! Every member tells those that it has a connection to how it stands, and is answered with the bundle as the holder of
//! the root key announced it. It believes the signature on that, and not the teller (citadel checks it), so that a bundle
//! may come from any member and none can make one. The holder collects what it is told; it is the reports of members
//! about themselves, each proven by its certificate. A member whose intermediate is due asks the holder for the next one
//! on the same connection, and is given one for the cluster that its certificate names. Revocation lists go the same way
//! (`revocation.rs`).

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_model::{ClusterId, TrustDomain};
use serde::Deserialize;
use tonic::{Code, Status, transport::Channel};

use crate::{
    admin_pb::{KnownList, ToldBundle},
    authority_pb::{
        InstallRenewalRequest, MemberRoots, RequestRenewalRequest, SignIntermediateRequest,
        TakeAnnouncementRequest, authority_client::AuthorityClient,
    },
    pb::{self, RenewRequest, RenewResponse, RootsAnswer, RootsReport, federation_client::FederationClient},
    revocation::{self, Lists},
    state::{Shared, Tables},
    trace,
};

/// From one report to the holder to the next.
const INTERVAL: Duration = Duration::from_secs(2);
/// To members that do not have the root key: they only pass on what they have.
const OTHERS: Duration = Duration::from_secs(30);
/// After a failure.
const RETRY: Duration = Duration::from_secs(5);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Proxies that a member may name, and how long their names may be.
const MAX_LATE: usize = 8;
const MAX_TEXT: usize = 200;

/// What was heard of members.
#[derive(Debug, Default)]
pub(crate) struct Roots {
    reports: BTreeMap<ClusterId, (Instant, RootsReport)>,
    told: BTreeMap<ClusterId, (Instant, u64)>,
}

impl Roots {
    /// A member of another trust domain was told the bundle.
    pub(crate) fn told(&mut self, peer: &ClusterId, sequence: u64) {
        self.told.insert(peer.clone(), (Instant::now(), sequence));
    }
}

/// Of pilot's page.
#[derive(Default, Deserialize)]
struct Proxies {
    sequence: u64,
    intermediate: String,
    proxies: u32,
    trusting: u32,
    renewed: u32,
    late: Vec<String>,
}

/// How this cluster stands. `None` in no mesh.
async fn own(shared: &Shared) -> Option<RootsReport> {
    // As this control plane uses it: the bundle is in its secrets by then.
    let a = shared.lock().authority.clone()?;
    let mut report =
        RootsReport { sequence: a.bundle_sequence, root: a.issuer_pin.clone(), ..RootsReport::default() };
    match trace::ask_trust::<Proxies>(shared).await {
        Ok(p) => {
            report.proxies = p.proxies;
            // What pilot says of another bundle says nothing of this one.
            report.trusting = if p.sequence == a.bundle_sequence { p.trusting } else { 0 };
            report.renewed = if p.intermediate == a.intermediate_sha256 { p.renewed } else { 0 };
            report.late = p.late;
        }
        Err(s) => report.error = format!("what its proxies trust is not known: {}", s.message()),
    }
    Some(report)
}

fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect()
}

/// A member said how it stands; what it is answered.
pub(crate) fn heard(shared: &Shared, peer: ClusterId, mut r: RootsReport) -> Result<RootsAnswer, Status> {
    r.late.truncate(MAX_LATE);
    r.late.iter_mut().chain([&mut r.error, &mut r.root]).for_each(|t| *t = cut(t));
    let (told, digest) = (std::mem::take(&mut r.lists), r.lists_digest);
    take_lists(shared, told, peer.as_str());
    let mut t = shared.lock();
    let a = t.authority.as_ref().ok_or_else(|| Status::unavailable("this cluster is in no mesh"))?;
    let mut answer = RootsAnswer {
        announcement: a.announcement.clone(),
        holder: a.holds_root_key,
        ..RootsAnswer::default()
    };
    if let Some(lists) = own_lists(&t) {
        answer.lists_digest = lists.digest();
        // An older version says 0, and would not take them.
        if digest != 0 && digest != answer.lists_digest {
            answer.lists = lists.to_pb();
        }
    }
    t.roots.reports.insert(peer, (Instant::now(), r));
    Ok(answer)
}

/// What is revoked in the own trust domain.
fn own_lists(t: &Tables) -> Option<&Lists> {
    let domain = TrustDomain::new(&t.authority.as_ref()?.trust_domain).ok()?;
    t.revoked.get(&domain)
}

/// Takes what a member tells of the own domain's lists, and tells proxies what is news.
fn take_lists(shared: &Shared, told: Vec<pb::RevocationList>, peer: &str) {
    if told.is_empty() {
        return;
    }
    let known = {
        let t = shared.lock();
        t.authority.as_ref().map(|a| (TrustDomain::new(&a.trust_domain), a.bundle.clone()))
    };
    if let Some((Ok(domain), roots)) = known
        && shared.take_revoked(&domain, &roots, revocation::from_pb(told), peer)
    {
        shared.publish();
    }
}

/// Signs the next intermediate of a member.
pub(crate) async fn renew(
    shared: &Shared,
    peer: &ClusterId,
    r: RenewRequest,
) -> Result<RenewResponse, Status> {
    may_have(peer, &r.cluster)?;
    let request = SignIntermediateRequest {
        csr: r.csr,
        cluster: peer.to_string(),
        proof: "its certificate, to renew".into(),
    };
    let signed = AuthorityClient::new(shared.authority().await?).sign_intermediate(request).await?;
    tracing::info!(target: "audit", cluster = %peer, "renewed a member's intermediate");
    Ok(RenewResponse { chain: signed.into_inner().chain })
}

/// Nobody is given the intermediate of another cluster: whoever had that could speak for it.
fn may_have(peer: &ClusterId, wanted: &str) -> Result<(), Status> {
    if wanted == peer.as_str() {
        return Ok(());
    }
    Err(Status::permission_denied(format!(
        "cluster {peer} asks for the intermediate of {wanted:?}: a cluster is given its own alone"
    )))
}

/// Everybody of the own trust domain, this cluster first; of the others nothing is known but where the root key is.
pub(crate) async fn members(shared: &Shared) -> Vec<MemberRoots> {
    let row = |cluster: &ClusterId, heard: Option<(Duration, RootsReport)>| {
        let (age, r) = heard.map_or((None, RootsReport::default()), |(age, r)| (Some(age), r));
        MemberRoots {
            cluster: cluster.to_string(),
            age_ms: age.map(|a| u64::try_from(a.as_millis()).unwrap_or(u64::MAX)),
            sequence: r.sequence,
            root: r.root,
            proxies: r.proxies,
            trusting: r.trusting,
            renewed: r.renewed,
            late: r.late,
            error: r.error,
        }
    };
    let mut out = Vec::new();
    if let Some(r) = own(shared).await {
        out.push(row(&shared.options.cluster, Some((Duration::ZERO, r))));
    }
    let t = shared.lock();
    if t.authority.as_ref().is_some_and(|a| a.holds_root_key) {
        let peers = t.node.members.peers().filter(|m| m.trust_domain.is_none());
        out.extend(peers.map(|m| {
            let heard = t.roots.reports.get(&m.cluster);
            row(&m.cluster, heard.map(|(at, r)| (at.elapsed(), r.clone())))
        }));
    }
    out
}

impl Shared {
    /// Every revocation list, for operators.
    pub(crate) fn known_lists(&self) -> Vec<KnownList> {
        let t = self.lock();
        let of = |(domain, lists): (&TrustDomain, &Lists)| -> Vec<KnownList> {
            let list = |l: &mesh_identity::SignedList| KnownList {
                trust_domain: domain.to_string(),
                cluster: l.cluster.as_ref().map(ToString::to_string).unwrap_or_default(),
                issuer: l.issuer.clone(),
                number: l.number,
                revoked: u32::try_from(l.revoked()).unwrap_or(u32::MAX),
                next_update: l.next_update.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            };
            lists.describe().map(list).collect()
        };
        t.revoked.iter().flat_map(of).collect()
    }

    /// Who of other trust domains was told which bundle.
    pub(crate) fn told_bundles(&self) -> Vec<ToldBundle> {
        let t = self.lock();
        let all = t.roots.told.iter().filter_map(|(c, (at, sequence))| {
            Some(ToldBundle {
                cluster: c.to_string(),
                trust_domain: t.node.members.domain_of(c)?.to_string(),
                sequence: *sequence,
                age_ms: u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX),
            })
        });
        all.collect()
    }
}

/// Keeps a peer informed, and this cluster by it, while a connection to it is open.
pub(crate) async fn follow(shared: Arc<Shared>, peer: ClusterId, channel: Channel) {
    let mut client = FederationClient::new(channel);
    let mut changed = shared.roots_changed.subscribe();
    // What went wrong last, so that it is said once.
    let mut failed = String::new();
    let mut answered = false;
    // Digests of lists: the peer's when it last answered, and both when it was last told ours.
    let (mut theirs, mut told) = (0, (0, 0));
    loop {
        changed.mark_unchanged();
        let mut pause = RETRY;
        if let Some(mut report) = own(&shared).await {
            if let Some(lists) = own_lists(&shared.lock()) {
                report.lists_digest = lists.digest();
                let both = (report.lists_digest, theirs);
                if theirs != 0 && both.0 != both.1 && both != told {
                    report.lists = lists.to_pb();
                    told = both;
                }
            }
            if report.error.is_empty() && answered {
                report.error.clone_from(&failed);
            }
            match tokio::time::timeout(ASK_TIMEOUT, client.roots(report)).await {
                Ok(Ok(answer)) => {
                    let RootsAnswer { announcement, holder, lists_digest, lists } = answer.into_inner();
                    answered = true;
                    theirs = lists_digest;
                    take_lists(&shared, lists, peer.as_str());
                    let mine = own_lists(&shared.lock()).map_or(0, Lists::digest);
                    let behind = theirs != 0 && mine != theirs && (mine, theirs) != told;
                    pause = match (behind, holder) {
                        // It is told at once what it lacks.
                        (true, _) => Duration::ZERO,
                        (false, true) => INTERVAL,
                        (false, false) => OTHERS,
                    };
                    match take(&shared, &announcement, holder, &mut client).await {
                        Ok(()) => failed.clear(),
                        Err(why) => {
                            if failed != why {
                                tracing::warn!(target: "audit", %peer, error = %why, "roots: not taken, or not renewed");
                            }
                            failed = cut(&why);
                        }
                    }
                }
                // Of an older version.
                Ok(Err(s)) if s.code() == Code::Unimplemented => pause = OTHERS,
                Ok(Err(s)) => tracing::debug!(%peer, error = %s.message(), "roots"),
                Err(_) => tracing::debug!(%peer, "roots: no answer"),
            }
        }
        // The holder hears at once that something is different here.
        let _ = tokio::time::timeout(pause, changed.changed()).await;
    }
}

/// Takes what a peer announced, and renews the intermediate if that is due and the peer can sign.
async fn take(
    shared: &Shared,
    announcement: &str,
    holder: bool,
    client: &mut FederationClient<Channel>,
) -> Result<(), String> {
    let words = |s: Status| s.message().to_owned();
    let Some(known) = shared.lock().authority.clone() else { return Ok(()) };
    if known.holds_root_key {
        return Ok(());
    }
    let mut authority = AuthorityClient::new(shared.authority().await.map_err(words)?);
    // One that does not have the root key may be behind, which is no fault.
    let behind = !holder && told_sequence(announcement).is_none_or(|n| n <= known.bundle_sequence);
    if !announcement.is_empty() && announcement != known.announcement && !behind {
        let request = TakeAnnouncementRequest { announcement: announcement.to_owned() };
        authority.take_announcement(request).await.map_err(words)?;
    }
    if !holder || known.renewal_due.is_empty() {
        return Ok(());
    }
    let csr = authority.request_renewal(RequestRenewalRequest {}).await.map_err(words)?.into_inner().csr;
    let request = RenewRequest { cluster: shared.options.cluster.to_string(), csr };
    let signed = tokio::time::timeout(ASK_TIMEOUT, client.renew(request))
        .await
        .map_err(|_| "the intermediate was not signed in time".to_owned())?
        .map_err(words)?;
    let request = InstallRenewalRequest { chain: signed.into_inner().chain };
    authority.install_renewal(request).await.map_err(words)?;
    Ok(())
}

/// The number in an announcement, before anything of it is believed.
fn told_sequence(announcement: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(announcement).ok()?.get("sequence")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_given_the_intermediate_of_another_cluster() {
        let east = ClusterId::new("east").unwrap();
        may_have(&east, "east").unwrap();
        for other in ["west", "", "East", "east "] {
            assert_eq!(may_have(&east, other).unwrap_err().code(), Code::PermissionDenied, "{other:?}");
        }
    }

    #[test]
    fn what_members_say_is_bounded() {
        assert_eq!(cut("a\u{1b}[31m\n"), "a[31m");
        assert_eq!(cut(&"x".repeat(1000)).len(), MAX_TEXT);
    }
}
