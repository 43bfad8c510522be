//! What peers and newcomers call.

use std::{pin::Pin, sync::Arc, time::Duration};

use aws_lc_rs::{
    constant_time,
    digest::{SHA256, digest},
};
use futures::Stream;
use mesh_identity::peer_identity;
use mesh_model::{ClusterId, federation::Conflict};
use mesh_xds::PeerInfo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    authority_pb::{SignIntermediateRequest, authority_client::AuthorityClient},
    dial::CONTROL_PLANE,
    exchange::{Feed, NodeError},
    federate::{self, Newcomer},
    membership::{Bundle, Merged, NotAMember},
    pb::{
        self, BundleRequest, ExporterFrame, ImporterFrame, InspectRequest, InspectResponse, JoinRequest,
        JoinResponse, LeaveRequest, LeaveResponse, RenewRequest, RenewResponse, RootsAnswer, RootsReport,
        TrustBundle, exporter_frame, federation_server, importer_frame,
    },
    revocation::Lists,
    roots,
    state::Shared,
    token::{hex, secret_hash, unix_now},
    trace,
    wire::{self, Member},
};

/// Frames waiting for a slow importer; when it is full the exporter waits and later resumes by
/// version, so a small queue costs nothing.
const QUEUE: usize = 64;
/// The first frame of an exchange.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct FederationService(pub(crate) Arc<Shared>);

/// The cluster whose control plane is calling, from its certificate. One that was evicted is nobody.
fn caller<T>(shared: &Shared, request: &Request<T>) -> Result<ClusterId, Status> {
    let peer = request
        .extensions()
        .get::<PeerInfo>()
        .and_then(|p| peer_identity(&p.certificates))
        .ok_or_else(|| Status::unauthenticated("no client certificate"))?;
    let id = peer.spiffe.ok_or_else(|| Status::unauthenticated("the client certificate has no SPIFFE ID"))?;
    if id.namespace_and_account() != Some(CONTROL_PLANE) {
        return Err(Status::permission_denied(format!("{id} is not a control plane")));
    }
    let cluster =
        peer.cluster.ok_or_else(|| Status::permission_denied("the certificate names no cluster"))?;
    let t = shared.lock();
    let known = t.node.members.get(&cluster);
    // The handshake has bound the certificate to roots of this domain, and the domain to its clusters; a tombstone has
    // neither any more.
    let domain = known.and_then(|m| m.trust_domain.as_ref());
    let own = || shared.trust_domain();
    if domain.map(ToString::to_string).or_else(own).as_deref() != Some(id.trust_domain()) {
        return Err(Status::permission_denied(format!(
            "cluster {cluster} is known here as one of another trust domain than {}",
            id.trust_domain()
        )));
    }
    if known.is_some_and(|m| m.evicted) {
        return Err(Status::permission_denied(NotAMember::Evicted(cluster).to_string()));
    }
    Ok(cluster)
}

fn not_saved(e: std::io::Error) -> Status {
    tracing::error!(error = %e, "members were not saved");
    Status::internal("the member could not save its state")
}

/// One answer for an unknown id and a wrong secret: nothing to learn by trying.
fn unknown() -> Status {
    Status::permission_denied(
        "the token is not known here (wrong secret, another mesh, or removed): create a new one with \
         `flotilla token create`",
    )
}

impl FederationService {
    /// The member of this very trust domain that is calling.
    fn of_this_domain<T>(&self, request: &Request<T>) -> Result<ClusterId, Status> {
        let peer = caller(&self.0, request)?;
        let t = self.0.lock();
        if !t.node.members.is_member(&peer) {
            return Err(Status::permission_denied(format!("cluster {peer} is no member of this mesh")));
        }
        if let Some(domain) = t.node.members.domain_of(&peer) {
            return Err(Status::permission_denied(format!(
                "cluster {peer} is of trust domain {domain}, which has roots of its own"
            )));
        }
        Ok(peer)
    }

    /// Whether whoever asks holds a token. Nothing else of a stranger's request is looked at before.
    fn holds_token(&self, r: &JoinRequest) -> Result<(), Status> {
        let t = self.0.lock();
        let token = t.tokens.get(&r.token_id).ok_or_else(unknown)?;
        let given = secret_hash(&r.secret);
        constant_time::verify_slices_are_equal(given.as_bytes(), token.secret_sha256.as_bytes())
            .map_err(|_| unknown())
    }

    /// Checks a join request against the issued tokens and claims the token for it.
    fn claim(&self, r: &JoinRequest, newcomer: &Member, federates: Option<&Newcomer>) -> Result<(), Status> {
        let me = &self.0.options.cluster;
        if &newcomer.cluster == me {
            return Err(Status::already_exists(format!(
                "the newcomer is called {me} like this cluster; choose another cluster ID"
            )));
        }
        let wanted = r.csr.clone() + &federates.map(Newcomer::fingerprint).unwrap_or_default();
        let request_hash = hex(digest(&SHA256, wanted.as_bytes()).as_ref());
        let mut t = self.0.lock();
        if t.declared.evicts(&newcomer.cluster) {
            return Err(Status::permission_denied(format!(
                "a ClusterEviction {} is in the configuration of cluster {me}: remove it there first",
                newcomer.cluster
            )));
        }
        let taken = t.node.members.is_member(&newcomer.cluster);
        let (epoch, left) = t.node.members.get(&newcomer.cluster).map_or((0, false), |m| (m.epoch, m.left));
        let clash = federates.and_then(|f| f.refusal(&t, me));
        let token = t.tokens.get_mut(&r.token_id).ok_or_else(unknown)?;
        if unix_now() >= token.expires {
            return Err(Status::permission_denied(
                "the token has expired: create a new one with `flotilla token create`",
            ));
        }
        match (&token.federate, federates) {
            (None, Some(f)) => {
                return Err(Status::permission_denied(format!(
                    "the token is for a cluster whose certificate this mesh signs: for one that keeps its own root, \
                     create it with `flotilla token create --federate {}`",
                    f.domain
                )));
            }
            (Some(d), None) => {
                return Err(Status::permission_denied(format!(
                    "the token is for a cluster of trust domain {d} that keeps its own root: for one that joins this \
                     mesh, create it without --federate"
                )));
            }
            (Some(d), Some(f)) if *d != f.domain => {
                return Err(Status::permission_denied(format!(
                    "the token is for trust domain {d}, the newcomer is of {}",
                    f.domain
                )));
            }
            _ => {}
        }
        match &token.used {
            // The very same join again: its answer was lost on the way. Who was let in and is gone since does not come
            // back with it.
            Some((c, h))
                if *c == newcomer.cluster && *h == request_hash && !(left && epoch > token.epoch) =>
            {
                return Ok(());
            }
            Some((c, _)) => {
                return Err(Status::permission_denied(format!(
                    "the token was already used by cluster {c}: create a new one with `flotilla token create`"
                )));
            }
            None if taken => {
                return Err(Status::already_exists(format!(
                    "a cluster {} is already a member: choose another cluster ID, or let that one leave first \
                     (`flotilla evict-cluster` if it no longer can)",
                    newcomer.cluster
                )));
            }
            None if clash.is_some() => return Err(clash.unwrap_or_else(unknown)),
            None => {
                token.used = Some((newcomer.cluster.clone(), request_hash));
                token.epoch = epoch;
            }
        }
        self.0.store.save_tokens(&t.tokens).map_err(|e| {
            tracing::error!(error = %e, "tokens were not saved");
            Status::internal("the member could not save its state")
        })
    }

    async fn admit(&self, r: JoinRequest) -> Result<JoinResponse, Status> {
        self.holds_token(&r)?;
        let newcomer = r.newcomer.clone().ok_or_else(|| Status::invalid_argument("no newcomer"))?;
        let newcomer =
            wire::member(newcomer).map_err(|e| Status::invalid_argument(format!("newcomer: {e}")))?;
        let federates = federate::newcomer(&self.0, &r, &newcomer).await?;
        self.claim(&r, &newcomer, federates.as_ref())?;
        if let Some(f) = federates {
            let domain = f.domain.clone();
            let answer = federate::admit(&self.0, f, &newcomer).await?;
            tracing::info!(
                target: "audit", token = %r.token_id, cluster = %newcomer.cluster, %domain, "a trust domain federated"
            );
            return Ok(answer);
        }
        let mut authority = AuthorityClient::new(self.0.authority().await?);
        let signed = authority
            .sign_intermediate(SignIntermediateRequest {
                csr: r.csr,
                cluster: newcomer.cluster.to_string(),
                proof: format!("join token {}", r.token_id),
            })
            .await
            .map_err(|s| Status::new(s.code(), format!("the CA did not sign: {}", s.message())))?
            .into_inner();
        let joined = newcomer.cluster.clone();
        let (members, merged) = {
            let mut t = self.0.lock();
            let newcomer = t.node.members.admission(newcomer);
            let merged = t.node.merge([newcomer], self.0.now());
            (t.node.members.all().values().map(wire::member_pb).collect(), merged)
        };
        self.0.members_merged(&merged).map_err(not_saved)?;
        tracing::info!(target: "audit", token = %r.token_id, cluster = %joined, "a cluster joined");
        Ok(JoinResponse {
            trust_domain: signed.trust_domain,
            chain: signed.chain,
            bundle: signed.bundle,
            members,
            foreign: None,
        })
    }
}

#[tonic::async_trait]
impl federation_server::Federation for FederationService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let from = request.extensions().get::<PeerInfo>().and_then(|p| p.address);
        let r = request.into_inner();
        let (token, cluster) =
            (r.token_id.clone(), r.newcomer.as_ref().map(|n| n.cluster.clone()).unwrap_or_default());
        let answer = self.admit(r).await;
        if let Err(status) = &answer {
            // {:?} keeps control characters of a stranger's text out of the log.
            tracing::warn!(target: "audit", ?token, ?cluster, ?from, reason = %status.message(), "refused a join");
        }
        answer.map(Response::new)
    }

    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<ExporterFrame, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<ImporterFrame>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let peer = caller(&self.0, &request)?;
        let mut frames = request.into_inner();
        let first = tokio::time::timeout(SUBSCRIBE_TIMEOUT, frames.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no subscription"))??;
        let Some(importer_frame::Frame::Subscribe(sub)) = first.and_then(|f| f.frame) else {
            return Err(Status::invalid_argument("the first frame must be a subscription"));
        };
        if self.0.trust_domain().is_none() {
            return Err(Status::unavailable("this cluster is still starting, or in no mesh"));
        }
        let accepted = self.0.lock().node.accept(&peer, &sub, self.0.now());
        let (feed, merged) = accepted.map_err(|e| refusal(&e))?;
        self.0.members_merged(&merged).map_err(not_saved)?;
        if let Some(link) = self.0.lock().link(&peer) {
            link.runs(&sub.software);
        }
        self.0.nudge.notify_waiters();
        let (tx, rx) = mpsc::channel(QUEUE);
        tokio::spawn(export(self.0.clone(), peer, feed, frames, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn inspect(&self, request: Request<InspectRequest>) -> Result<Response<InspectResponse>, Status> {
        let peer = caller(&self.0, &request)?;
        if !self.0.lock().node.members.is_member(&peer) {
            return Err(Status::permission_denied(format!("cluster {peer} is no member of this mesh")));
        }
        let steps = trace::ask_pilot(&self.0, &peer, &request.into_inner()).await?;
        Ok(Response::new(InspectResponse {
            steps: steps.into_iter().map(Into::into).collect(),
            now_ms: trace::now_ms(),
        }))
    }

    async fn bundle(&self, request: Request<BundleRequest>) -> Result<Response<TrustBundle>, Status> {
        let peer = caller(&self.0, &request)?;
        if !self.0.lock().node.members.is_member(&peer) {
            return Err(Status::permission_denied(format!("cluster {peer} is no member of this mesh")));
        }
        let (_, bundle) = self.0.own_bundle().await?;
        self.0.lock().roots.told(&peer, bundle.sequence);
        let revoked = self.0.lock().revoked.get(&bundle.trust_domain).map(Lists::to_pb).unwrap_or_default();
        Ok(Response::new(TrustBundle { revoked, ..Bundle { generation: 0, bundle }.to_pb() }))
    }

    async fn roots(&self, request: Request<RootsReport>) -> Result<Response<RootsAnswer>, Status> {
        let peer = self.of_this_domain(&request)?;
        Ok(Response::new(roots::heard(&self.0, peer, request.into_inner())?))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let peer = self.of_this_domain(&request)?;
        let answer = roots::renew(&self.0, &peer, request.into_inner()).await;
        if let Err(status) = &answer {
            tracing::warn!(target: "audit", cluster = %peer, reason = %status.message(), "refused an intermediate");
        }
        answer.map(Response::new)
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        let peer = caller(&self.0, &request)?;
        let merged = {
            let mut t = self.0.lock();
            let domain = t.node.members.domain_of(&peer).filter(|_| request.get_ref().domain).cloned();
            match domain {
                // Who may speak for a domain's roots may end its federation.
                Some(d) if t.node.members.is_member(&peer) => t.node.domain_left(&d, self.0.now()),
                _ => t.node.left(&peer, self.0.now()),
            }
        };
        self.0.members_merged(&merged).map_err(not_saved)?;
        // Pilot must have taken the removal before this cluster says that nothing is left.
        let settled = self.0.settled(Duration::from_secs(5)).await;
        let references = {
            let t = self.0.lock();
            u32::from(t.node.imports.contains_key(&peer))
                + u32::from(t.links.contains_key(&peer))
                + u32::from(t.node.members.is_member(&peer))
                + u32::from(!settled)
        };
        tracing::info!(target: "audit", cluster = %peer, references, "a cluster left");
        Ok(Response::new(LeaveResponse { references }))
    }
}

/// Steps from one pilot to a peer.
impl From<mesh_model::explain::Step> for pb::Step {
    fn from(s: mesh_model::explain::Step) -> Self {
        use mesh_model::explain::State;
        let state = match s.state {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Broken => "broken",
        };
        Self { step: s.step, state: state.to_owned(), says: s.says, fix: s.fix }
    }
}

/// An export of this cluster is not used as it is defined here.
pub(crate) fn conflict(c: &Conflict, reporter: &ClusterId) {
    let reason = c.reason.as_str();
    tracing::warn!(
        namespace = %c.namespace, name = %c.name, winner = %c.winner, %reporter, reason, says = %c.message,
        "ServiceExport: Conflict=True"
    );
}

fn refusal(e: &NodeError) -> Status {
    match e {
        NodeError::Feed(_) => Status::failed_precondition(e.to_string()),
        NodeError::Subscription(_) => Status::invalid_argument(e.to_string()),
        NodeError::NotAMember(_) => Status::permission_denied(e.to_string()),
    }
}

/// Feeds one importer until it goes away or leaves the mesh.
async fn export(
    shared: Arc<Shared>,
    peer: ClusterId,
    mut feed: Feed,
    mut requests: Streaming<ImporterFrame>,
    tx: mpsc::Sender<Result<ExporterFrame, Status>>,
) {
    let mut exports = shared.exports_changed.subscribe();
    let mut members = shared.members_changed.subscribe();
    loop {
        let polled = shared.lock().node.feed(&mut feed, shared.now());
        let (frames, more) = match polled {
            Ok(p) => p,
            Err(e) => {
                let _ = tx.send(Err(Status::permission_denied(e.to_string()))).await;
                return;
            }
        };
        for mut f in frames {
            if let Some(exporter_frame::Frame::Lease(l)) = &mut f.frame {
                l.stamp = shared.stamp();
            }
            if tx.send(Ok(f)).await.is_err() {
                return;
            }
        }
        if more {
            continue;
        }
        let lease = Duration::from_millis(feed.deadline().saturating_sub(shared.now()));
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(lease) => {}
            r = exports.changed() => if r.is_err() { return },
            r = members.changed() => if r.is_err() { return },
            r = requests.message() => {
                let Ok(Some(f)) = r else { return };
                let merged = {
                    let mut t = shared.lock();
                    for c in t.node.heard_from(&peer, &mut feed, &f) {
                        conflict(&c, &peer);
                    }
                    match &f.frame {
                        // Its addresses may have changed.
                        Some(importer_frame::Frame::Subscribe(s)) => t.node.introduce(&peer, s, shared.now()),
                        Some(importer_frame::Frame::Received(r)) if r.stamp != 0 => {
                            if let Some(link) = t.link(&peer) {
                                link.stamped(r.stamp, shared.stamp());
                            }
                            Ok(Merged::default())
                        }
                        _ => Ok(Merged::default()),
                    }
                };
                // A refusal is for the next poll to tell.
                if let Err(error) = shared.members_merged(&merged.unwrap_or_default()) {
                    tracing::error!(%error, "members were not saved");
                }
            }
        }
    }
}
