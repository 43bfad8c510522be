//! Federation with other trust domains: joins in which both keep their own root, their bundles, and the end of it.
//!
//! Nobody signs for the other. What is exchanged are bundles, over the pinned connection of the join at first and over
//! the connection of the two control planes from then on; whom a bundle is believed of is decided in
//! [`crate::membership`].

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use mesh_identity::TrustBundle;
use mesh_model::{ClusterId, TrustDomain};
use tonic::{Status, transport::Channel};

use crate::{
    admin_pb::{BundleStatus, CompleteJoinResponse, LeaveMeshResponse, PeerLeft, PrepareJoinResponse},
    authority_pb::{AuthorityStatus, StatusRequest, authority_client::AuthorityClient},
    bundle::follow,
    dial,
    membership::{Bundle, MAX_DOMAINS},
    pb::{self, BundleRequest, JoinRequest, JoinResponse, LeaveRequest, federation_client::FederationClient},
    revocation,
    state::Shared,
    token::unix_now,
    wire::{self, Member},
};

/// A member confirms within this time that nothing is left.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(15);
/// Members that a newcomer may bring.
const MAX_BROUGHT: usize = 1024;
/// How often a bundle is asked for whose owner does not say; SPIRE's default.
pub(crate) const REFRESH: Duration = Duration::from_secs(300);
/// A hint is not followed below this or above that: it is another's word.
pub(crate) const REFRESH_LIMITS: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(24 * 3600));
/// After a failure.
const RETRY: Duration = Duration::from_secs(5);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// What is known of the bundle of another trust domain besides itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct BundleLink {
    /// When a member of that domain last told the one that is here.
    confirmed: Option<Instant>,
    /// Why the last one that was told was not taken.
    error: String,
}

/// A newcomer that keeps its own root.
pub(crate) struct Newcomer {
    pub(crate) domain: TrustDomain,
    bundle: TrustBundle,
    /// Of its domain, itself included.
    own: Vec<Member>,
    /// Whom else it is federated with.
    others: Vec<Member>,
}

impl Shared {
    /// This cluster's CA, and the bundle of its trust domain.
    pub(crate) async fn own_bundle(&self) -> Result<(AuthorityStatus, TrustBundle), Status> {
        let status =
            AuthorityClient::new(self.authority().await?).status(StatusRequest {}).await?.into_inner();
        if status.state != "active" {
            return Err(Status::failed_precondition(
                "this cluster is in no mesh and has no root of its own: `flotilla found --trust-domain DOMAIN` makes \
                 one; to be signed by the other mesh it needs a token without --federate",
            ));
        }
        let domain = TrustDomain::new(&status.trust_domain).map_err(|e| Status::internal(e.to_string()))?;
        let hint = Some(self.options.refresh_hint);
        let bundle = TrustBundle::from_pem(domain, status.bundle.as_bytes(), status.bundle_sequence, hint)
            .map_err(|e| Status::internal(format!("the own bundle: {e}")))?;
        Ok((status, bundle))
    }

    /// The trust domain that a member's control plane must prove.
    pub(crate) fn domain_of(&self, m: &Member) -> Option<String> {
        m.trust_domain.as_ref().map(ToString::to_string).or_else(|| self.trust_domain())
    }

    /// Whether a bundle would let one domain speak for another.
    fn stranger(&self, bundle: &TrustBundle, own: &TrustBundle) -> Result<(), String> {
        let domain = &bundle.trust_domain;
        if *domain == own.trust_domain {
            return Err(format!(
                "both meshes are of trust domain {domain}: their identities could not be told apart. Found one of them \
                 under another (`flotilla found --trust-domain`), or let it join as a cluster of this mesh"
            ));
        }
        let t = self.lock();
        let mut others = t.node.members.bundles().map(|b| &b.bundle).chain([own]);
        match others.find(|o| o.trust_domain != *domain && o.shares_root(bundle)) {
            Some(o) => Err(format!(
                "a root of {domain} is also one of {}: who holds it could speak for both",
                o.trust_domain
            )),
            None => Ok(()),
        }
    }

    /// What the operator is told of bundles.
    pub(crate) fn bundle_status(&self) -> Vec<BundleStatus> {
        let t = self.lock();
        let all = t.node.members.bundles().map(|b| {
            let link = t.bundles.get(&b.bundle.trust_domain).cloned().unwrap_or_default();
            BundleStatus {
                trust_domain: b.bundle.trust_domain.to_string(),
                sequence: b.bundle.sequence,
                refresh_hint: b.bundle.refresh_hint.map_or(0, |d| d.as_secs()),
                roots: u32::try_from(b.bundle.roots.len()).unwrap_or(u32::MAX),
                not_after: b.bundle.ends(),
                confirmed_age: link.confirmed.map(|t| t.elapsed().as_secs()),
                error: link.error,
                ..BundleStatus::default()
            }
        });
        all.chain(follow::status(&t)).collect()
    }
}

/// What this cluster, which keeps its own root, sends to a member of the trust domain `joined`.
pub(crate) async fn prepare(shared: &Shared, joined: &str) -> Result<PrepareJoinResponse, Status> {
    let (_, own) = shared.own_bundle().await?;
    if own.trust_domain.as_str() == joined {
        return Err(Status::failed_precondition(format!(
            "this cluster is of trust domain {joined} like the other mesh: found one of them under another domain \
             (`flotilla found --trust-domain`), or join without a root of your own"
        )));
    }
    let t = shared.lock();
    let me = t.node.this();
    let members = t.node.members.peers().map(wire::member_pb).collect();
    let bundle = Bundle { generation: 0, bundle: own }.to_pb();
    Ok(PrepareJoinResponse {
        newcomer: Some(wire::member_pb(&me)),
        csr: String::new(),
        bundle: Some(bundle),
        members,
    })
}

/// Reads what a newcomer says that keeps its own root; `None` for one that wants a certificate.
pub(crate) async fn newcomer(
    shared: &Shared,
    r: &JoinRequest,
    newcomer: &Member,
) -> Result<Option<Newcomer>, Status> {
    let Some(told) = &r.bundle else { return Ok(None) };
    let bad = |e: String| Status::invalid_argument(e);
    let bundle = Bundle::from_pb(told).map_err(|e| bad(e.to_string()))?.bundle;
    if r.members.len() > MAX_BROUGHT {
        return Err(bad(format!("the newcomer knows more than {MAX_BROUGHT} members")));
    }
    let domain = bundle.trust_domain.clone();
    let (_, own) = shared.own_bundle().await?;
    shared.stranger(&bundle, &own).map_err(Status::failed_precondition)?;
    let of_domain = |m: &Member| m.trust_domain.as_ref().is_none_or(|d| *d == domain);
    let mut all = vec![newcomer.clone()];
    for m in &r.members {
        all.push(wire::member(m.clone()).map_err(|e| bad(format!("a member: {e}")))?);
    }
    let (mine, others) = all.into_iter().filter(|m| !m.left).partition(of_domain);
    Ok(Some(Newcomer { domain, bundle, own: mine, others }))
}

impl Newcomer {
    /// Why it cannot be let in, whatever its token says. `t` is this cluster's state.
    pub(crate) fn refusal(&self, t: &crate::state::Tables, me: &ClusterId) -> Option<Status> {
        let members = &t.node.members;
        let clash = |c: &ClusterId, of: &str, with: String| {
            Status::already_exists(format!(
                "cluster {c} of {of} has the name of {with}: cluster IDs must be unique in everything that one is \
                 federated with. Let one of them leave its mesh and join again under another ID (--cluster)"
            ))
        };
        if let Some(c) = self.own.iter().find_map(|m| members.clash(&self.domain, m)) {
            let with =
                c.holder.map_or_else(|| format!("a cluster known to {me}"), |d| format!("a cluster of {d}"));
            return Some(clash(&c.cluster, self.domain.as_str(), with));
        }
        // What it will hear of here must not clash there.
        let ours = |m: &&Member| members.get(&m.cluster).is_some_and(|k| !k.left && k.trust_domain.is_none());
        if let Some(m) = self.others.iter().find(ours) {
            let of = m.trust_domain.as_ref().map(ToString::to_string).unwrap_or_default();
            return Some(clash(&m.cluster, &of, format!("a cluster of the mesh of {me}")));
        }
        let held = members.bundle(&self.domain);
        if held.is_none() && members.domains().len() >= MAX_DOMAINS {
            return Some(Status::resource_exhausted(format!(
                "this mesh is federated with {MAX_DOMAINS} trust domains and takes in no more"
            )));
        }
        if held.is_some_and(|h| !h.bundle.shares_root(&self.bundle)) {
            return Some(Status::already_exists(format!(
                "this mesh is federated with another mesh that calls itself {}: its bundle has none of these roots. \
                 If it is gone, evict its clusters first (`flotilla evict-cluster`)",
                self.domain
            )));
        }
        None
    }

    /// What marks the very same request, if its answer was lost.
    pub(crate) fn fingerprint(&self) -> String {
        let roots: BTreeSet<_> = self.bundle.roots.iter().map(mesh_identity::root_pin).collect();
        roots.into_iter().collect::<Vec<_>>().join(",")
    }
}

/// Takes in a trust domain; the token was claimed for it.
pub(crate) async fn admit(shared: &Shared, new: Newcomer, by: &Member) -> Result<JoinResponse, Status> {
    let (_, own) = shared.own_bundle().await?;
    let (members, merged) = {
        let mut t = shared.lock();
        let joining = joining(&t, &new.domain, new.own, |m| m.cluster == by.cluster);
        let bundle = generation(&t, new.bundle);
        let merged = t.node.federate(joining, bundle, shared.now());
        let ours = t.node.members.all().values().filter(|m| !m.left && m.trust_domain.is_none());
        (ours.map(wire::member_pb).collect(), merged)
    };
    shared.members_merged(&merged).map_err(not_saved)?;
    Ok(JoinResponse {
        members,
        foreign: Some(Bundle { generation: 0, bundle: own }.to_pb()),
        ..JoinResponse::default()
    })
}

/// Takes what the member of the other trust domain answered.
pub(crate) async fn complete(
    shared: &Shared,
    told: &pb::TrustBundle,
    members: Vec<Member>,
) -> Result<CompleteJoinResponse, Status> {
    let (_, own) = shared.own_bundle().await?;
    let bundle = Bundle::from_pb(told).map_err(|e| Status::invalid_argument(e.to_string()))?.bundle;
    shared.stranger(&bundle, &own).map_err(Status::failed_precondition)?;
    let domain = bundle.trust_domain.clone();
    let merged = {
        let mut t = shared.lock();
        if let Some(c) = members.iter().find_map(|m| t.node.members.clash(&domain, m)) {
            return Err(Status::already_exists(format!(
                "{c}. Nothing was changed here; there, `flotilla evict-cluster {}`",
                shared.options.cluster
            )));
        }
        let joining = joining(&t, &domain, members, |_| true);
        let bundle = generation(&t, bundle);
        t.node.federate(joining, bundle, shared.now())
    };
    shared.members_merged(&merged).map_err(not_saved)?;
    tracing::info!(target: "audit", %domain, "federated with a trust domain");
    let t = shared.lock();
    let names = t.node.members.all().values().filter(|m| !m.left).map(|m| m.cluster.to_string()).collect();
    Ok(CompleteJoinResponse { members: names })
}

fn not_saved(e: std::io::Error) -> Status {
    tracing::error!(error = %e, "members were not saved");
    Status::internal("the member could not save its state")
}

/// Records of those who are no members yet. Who was evicted is let in only if it is `meant`.
fn joining(
    t: &crate::state::Tables,
    domain: &TrustDomain,
    all: Vec<Member>,
    meant: impl Fn(&Member) -> bool,
) -> Vec<Member> {
    let members = &t.node.members;
    all.into_iter()
        .filter(|m| !members.is_member(&m.cluster))
        .filter(|m| meant(m) || !members.get(&m.cluster).is_some_and(|k| k.evicted))
        .filter(|m| !t.declared.evicts(&m.cluster))
        .map(|m| members.foreign_admission(domain, m))
        .collect()
}

/// The bundle of a federation that begins, or of one that there is.
fn generation(t: &crate::state::Tables, bundle: TrustBundle) -> Bundle {
    let held = t.node.members.bundle(&bundle.trust_domain).map(|h| h.generation);
    Bundle { generation: held.unwrap_or_else(unix_now), bundle }
}

/// Takes the bundle that a member of another trust domain tells of that domain; answers when to ask again.
fn told(
    shared: &Shared,
    domain: &TrustDomain,
    told: &pb::TrustBundle,
    own: &TrustBundle,
) -> Result<Duration, String> {
    if told.trust_domain != domain.as_str() {
        return Err(format!("it tells of {:?}, and is of {domain}", told.trust_domain));
    }
    let new = Bundle::from_pb(told).map_err(|e| e.to_string())?.bundle;
    shared.stranger(&new, own)?;
    let (roots, revoked) = (new.pem(), revocation::from_pb(told.revoked.clone()));
    let hint = new.refresh_hint.unwrap_or(REFRESH).clamp(REFRESH_LIMITS.0, REFRESH_LIMITS.1);
    let changed = {
        let mut t = shared.lock();
        let held = t.node.members.bundle(domain).cloned().ok_or("there is no bundle to renew")?;
        let (old, now) = (held.bundle.sequence, new.sequence);
        if now < old {
            return Err(format!(
                "it tells a bundle of sequence {now}, and {old} is here: the older is not taken"
            ));
        }
        if now == old && held.bundle.roots != new.roots {
            return Err(format!(
                "it tells other roots under the same sequence {now}: its clusters must all be given the same roots"
            ));
        }
        t.node.members.set_bundle(Bundle { generation: held.generation, bundle: new })
    };
    if changed {
        tracing::info!(target: "audit", %domain, "a trust domain has a new bundle");
        shared.bundles_changed().map_err(|e| e.to_string())?;
    }
    if shared.take_revoked(domain, &roots, revoked, domain.as_str()) {
        shared.publish();
    }
    Ok(hint)
}

/// Keeps the bundle of a peer of another trust domain fresh while a connection to it is open: asks at once, and as often
/// as it hints.
pub(crate) async fn follow(shared: Arc<Shared>, peer: ClusterId, domain: TrustDomain, channel: Channel) {
    let mut client = FederationClient::new(channel);
    loop {
        let answer = async {
            let (_, own) = shared.own_bundle().await.map_err(|s| s.message().to_owned())?;
            let asked = tokio::time::timeout(ASK_TIMEOUT, client.bundle(BundleRequest {}));
            let answer = asked.await.map_err(|_| "no answer".to_owned())?;
            let answer = answer.map_err(|s| s.message().to_owned())?.into_inner();
            told(&shared, &domain, &answer, &own)
        };
        let answer = answer.await;
        {
            let mut t = shared.lock();
            let link = t.bundles.entry(domain.clone()).or_default();
            match &answer {
                Ok(_) => *link = BundleLink { confirmed: Some(Instant::now()), error: String::new() },
                Err(why) => {
                    let why = format!("cluster {peer}: {why}");
                    if link.error != why {
                        tracing::warn!(%domain, %peer, error = %why, "the bundle was not renewed");
                    }
                    link.error = why;
                }
            }
        }
        tokio::time::sleep(answer.unwrap_or(RETRY)).await;
    }
}

/// Ends the federation with trust domains, for all clusters of the own one.
pub(crate) async fn leave(
    shared: &Shared,
    domains: Vec<TrustDomain>,
    force: bool,
) -> Result<LeaveMeshResponse, Status> {
    let peers: Vec<Member> = {
        let t = shared.lock();
        domains.iter().flat_map(|d| t.node.members.of_domain(d)).cloned().collect()
    };
    let answers = tell(shared, &peers, true).await;
    if clean(&answers) || force {
        for domain in &domains {
            let merged = shared.lock().node.domain_left(domain, shared.now());
            shared.members_merged(&merged).map_err(not_saved)?;
            tracing::info!(target: "audit", %domain, "ended the federation with a trust domain");
        }
        // What this cluster's own proxies accept is part of the answer.
        shared.settled(Duration::from_secs(5)).await;
    }
    Ok(LeaveMeshResponse {
        peers: answers,
        federations: domains.iter().map(ToString::to_string).collect(),
        trust_domain: shared.trust_domain().unwrap_or_default(),
    })
}

pub(crate) fn clean(answers: &[PeerLeft]) -> bool {
    answers.iter().all(|a| a.references == 0 && a.error.is_empty())
}

/// Tells peers of a departure. All are connected before the first is told: a peer that has heard of it from another one
/// would accept no connection any more.
pub(crate) async fn tell(shared: &Shared, peers: &[Member], domain: bool) -> Vec<PeerLeft> {
    let dials = peers.iter().map(|m| async move {
        let addresses = match shared.options.via {
            Some(a) => vec![a],
            None => m.gateways.iter().map(|g| g.address).collect(),
        };
        let theirs = shared.domain_of(m).ok_or("this cluster is in no mesh")?;
        let dial = dial::member(&shared.secrets, &theirs, &m.cluster, &addresses);
        match tokio::time::timeout(LEAVE_TIMEOUT, dial).await {
            Ok(Ok((channel, _))) => Ok(channel),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!("no answer within {} s", LEAVE_TIMEOUT.as_secs())),
        }
    });
    let channels: Vec<Result<Channel, String>> = join_all(dials).await;
    let told = channels.into_iter().zip(peers).map(|(channel, m)| async move {
        let ask = async {
            let answer = FederationClient::new(channel?).leave(LeaveRequest { domain }).await;
            answer.map(|r| r.into_inner().references).map_err(|s| s.message().to_owned())
        };
        let (references, error) = match tokio::time::timeout(LEAVE_TIMEOUT, ask).await {
            Ok(Ok(n)) => (n, String::new()),
            Ok(Err(e)) => (0, e),
            Err(_) => (0, format!("no answer within {} s", LEAVE_TIMEOUT.as_secs())),
        };
        PeerLeft { cluster: m.cluster.to_string(), references, error }
    });
    join_all(told).await
}
