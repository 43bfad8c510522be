//! What peers and newcomers call.

use std::{pin::Pin, sync::Arc, time::Duration};

use aws_lc_rs::{
    constant_time,
    digest::{SHA256, digest},
};
use futures::Stream;
use mesh_identity::peer_identity;
use mesh_model::ClusterId;
use mesh_xds::PeerInfo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    authority_pb::{SignIntermediateRequest, authority_client::AuthorityClient},
    dial::CONTROL_PLANE,
    exchange::LEASE_INTERVAL_MS,
    pb::{
        self, ExporterFrame, ImporterFrame, InspectRequest, InspectResponse, JoinRequest, JoinResponse,
        LeaveRequest, LeaveResponse, Members, Welcome, exporter_frame::Frame, federation_server,
        importer_frame,
    },
    state::Shared,
    token::{hex, secret_hash, unix_now},
    trace,
    wire::{self, Member},
};

/// Versions of the exchange that this build speaks.
pub(crate) const PROTOCOL: (u32, u32) = (1, 1);
/// Frames waiting for a slow importer; when it is full the exporter waits and later resumes by
/// version, so a small queue costs nothing.
const QUEUE: usize = 64;
/// The first frame of an exchange.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct FederationService(pub(crate) Arc<Shared>);

/// The cluster whose control plane is calling, from its certificate.
fn caller<T>(request: &Request<T>) -> Result<ClusterId, Status> {
    let peer = request
        .extensions()
        .get::<PeerInfo>()
        .and_then(|p| peer_identity(&p.certificates))
        .ok_or_else(|| Status::unauthenticated("no client certificate"))?;
    let id = peer.spiffe.ok_or_else(|| Status::unauthenticated("the client certificate has no SPIFFE ID"))?;
    if id.namespace_and_account() != Some(CONTROL_PLANE) {
        return Err(Status::permission_denied(format!("{id} is not a control plane")));
    }
    peer.cluster.ok_or_else(|| Status::permission_denied("the certificate names no cluster"))
}

impl FederationService {
    /// Checks a join request against the issued tokens and claims the token for it.
    fn claim(&self, r: &JoinRequest, newcomer: &Member) -> Result<(), Status> {
        let me = &self.0.options.cluster;
        if &newcomer.cluster == me {
            return Err(Status::already_exists(format!(
                "the newcomer is called {me} like this cluster; choose another cluster ID"
            )));
        }
        let request_hash = hex(digest(&SHA256, r.csr.as_bytes()).as_ref());
        let mut t = self.0.lock();
        // One answer for an unknown id and a wrong secret: nothing to learn by trying.
        let unknown = || {
            Status::permission_denied(
                "the token is not known here (wrong secret, another mesh, or removed): create a new one with \
                 `flotilla token create`",
            )
        };
        let taken = t.members.get(&newcomer.cluster).is_some_and(|m| !m.left);
        let token = t.tokens.get_mut(&r.token_id).ok_or_else(unknown)?;
        let given = secret_hash(&r.secret);
        if constant_time::verify_slices_are_equal(given.as_bytes(), token.secret_sha256.as_bytes()).is_err() {
            return Err(unknown());
        }
        if unix_now() >= token.expires {
            return Err(Status::permission_denied(
                "the token has expired: create a new one with `flotilla token create`",
            ));
        }
        match &token.used {
            // The very same join again: its answer was lost on the way.
            Some((c, h)) if *c == newcomer.cluster && *h == request_hash => return Ok(()),
            Some((c, _)) => {
                return Err(Status::permission_denied(format!(
                    "the token was already used by cluster {c}: create a new one with `flotilla token create`"
                )));
            }
            None if taken => {
                return Err(Status::already_exists(format!(
                    "a cluster {} is already a member: choose another cluster ID, or let that one leave first",
                    newcomer.cluster
                )));
            }
            None => token.used = Some((newcomer.cluster.clone(), request_hash)),
        }
        self.0.store.save_tokens(&t.tokens).map_err(|e| {
            tracing::error!(error = %e, "tokens were not saved");
            Status::internal("the member could not save its state")
        })
    }

    async fn admit(&self, r: JoinRequest) -> Result<JoinResponse, Status> {
        let newcomer = r.newcomer.clone().ok_or_else(|| Status::invalid_argument("no newcomer"))?;
        let mut newcomer =
            wire::member(newcomer).map_err(|e| Status::invalid_argument(format!("newcomer: {e}")))?;
        self.claim(&r, &newcomer)?;
        let mut authority = AuthorityClient::new(self.0.authority().await?);
        let signed = authority
            .sign_intermediate(SignIntermediateRequest { csr: r.csr, cluster: newcomer.cluster.to_string() })
            .await
            .map_err(|s| Status::new(s.code(), format!("the CA did not sign: {}", s.message())))?
            .into_inner();
        let members = {
            let mut t = self.0.lock();
            let me = self.0.self_member(t.members.get(&self.0.options.cluster).map_or(1, |m| m.epoch.max(1)));
            newcomer.epoch = t.members.get(&newcomer.cluster).map_or(0, |m| m.epoch) + 1;
            t.members.insert(me.cluster.clone(), me);
            let mut all = t.members.clone();
            all.insert(newcomer.cluster.clone(), newcomer.clone());
            all.values().map(wire::member_pb).collect()
        };
        let joined = newcomer.cluster.clone();
        self.0.merge_members(vec![newcomer]).map_err(|e| {
            tracing::error!(error = %e, "members were not saved");
            Status::internal("the member could not save its state")
        })?;
        tracing::info!(target: "audit", token = %r.token_id, cluster = %joined, "a cluster joined");
        Ok(JoinResponse {
            trust_domain: signed.trust_domain,
            chain: signed.chain,
            bundle: signed.bundle,
            members,
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
        let peer = caller(&request)?;
        let mut frames = request.into_inner();
        let first = tokio::time::timeout(SUBSCRIBE_TIMEOUT, frames.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no subscription"))??;
        let Some(importer_frame::Frame::Subscribe(sub)) = first.and_then(|f| f.frame) else {
            return Err(Status::invalid_argument("the first frame must be a subscription"));
        };
        if sub.max_protocol < PROTOCOL.0 || sub.min_protocol > PROTOCOL.1 {
            return Err(Status::failed_precondition(format!(
                "no common protocol: peer speaks {} to {}, this cluster {} to {}",
                sub.min_protocol, sub.max_protocol, PROTOCOL.0, PROTOCOL.1
            )));
        }
        self.introduce(&peer, sub.this())?;
        let (tx, rx) = mpsc::channel(QUEUE);
        tokio::spawn(export(self.0.clone(), peer, sub, frames, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn inspect(&self, request: Request<InspectRequest>) -> Result<Response<InspectResponse>, Status> {
        let peer = caller(&request)?;
        if self.0.lock().members.get(&peer).is_none_or(|m| m.left) {
            return Err(Status::permission_denied(format!("cluster {peer} is no member of this mesh")));
        }
        let steps = trace::ask_pilot(&self.0, &peer, &request.into_inner()).await?;
        Ok(Response::new(InspectResponse {
            steps: steps.into_iter().map(Into::into).collect(),
            now_ms: trace::now_ms(),
        }))
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        let peer = caller(&request)?;
        let known = self.0.lock().members.get(&peer).cloned();
        let Some(mut gone) = known else {
            return Ok(Response::new(LeaveResponse { references: 0 }));
        };
        gone.left = true;
        gone.epoch += 1;
        gone.gateways.clear();
        self.0.merge_members(vec![gone]).map_err(|e| {
            tracing::error!(error = %e, "members were not saved");
            Status::internal("the member could not save its state")
        })?;
        // Pilot must have taken the removal before this cluster says that nothing is left.
        let settled = self.0.settled(Duration::from_secs(5)).await;
        let references = {
            let t = self.0.lock();
            u32::from(t.imports.contains_key(&peer))
                + u32::from(t.links.contains_key(&peer))
                + u32::from(t.members.get(&peer).is_some_and(|m| !m.left))
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

impl pb::Subscribe {
    fn this(&self) -> Option<pb::Member> {
        self.self_.clone()
    }
}

impl FederationService {
    /// A peer that presents itself: a known member, or one that joined elsewhere since.
    fn introduce(&self, peer: &ClusterId, this: Option<pb::Member>) -> Result<(), Status> {
        let this =
            this.ok_or_else(|| Status::invalid_argument("the subscription does not say who subscribes"))?;
        let this = wire::member(this).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if &this.cluster != peer || this.left {
            return Err(Status::permission_denied(format!(
                "the certificate is of cluster {peer}, the subscription of {}",
                this.cluster
            )));
        }
        if self.0.trust_domain().is_none() {
            return Err(Status::unavailable("this cluster is still starting, or in no mesh"));
        }
        let known = self.0.lock().members.get(peer).cloned();
        match known {
            Some(k) if k.left && this.epoch <= k.epoch => Err(Status::permission_denied(format!(
                "cluster {peer} has left this mesh: it must join again"
            ))),
            _ => {
                self.0.merge_members(vec![this]).map_err(|e| {
                    tracing::error!(error = %e, "members were not saved");
                    Status::internal("the member could not save its state")
                })?;
                Ok(())
            }
        }
    }
}

/// Feeds one importer until it goes away or leaves the mesh.
async fn export(
    shared: Arc<Shared>,
    peer: ClusterId,
    sub: pb::Subscribe,
    mut requests: Streaming<ImporterFrame>,
    tx: mpsc::Sender<Result<ExporterFrame, Status>>,
) {
    let mut exports = shared.exports_changed.subscribe();
    let mut members = shared.members_changed.subscribe();
    let mut lease = tokio::time::interval(Duration::from_millis(LEASE_INTERVAL_MS));
    lease.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut log_id = sub.log_id;
    let mut sent = sub.offset;
    let welcome = Welcome { protocol: PROTOCOL.1.min(sub.max_protocol), log_id: shared.lock().exports.id() };
    let mut pending = vec![Frame::Welcome(welcome), member_list(&shared)];
    let mut resend = true;
    loop {
        for f in pending.drain(..) {
            if tx.send(Ok(ExporterFrame { frame: Some(f) })).await.is_err() {
                return;
            }
        }
        if resend {
            resend = false;
            let (frames, head, id, lease) = {
                let t = shared.lock();
                (t.exports.since(log_id, sent), t.exports.head(), t.exports.id(), t.exports.lease())
            };
            for f in frames.into_iter().chain([lease]) {
                if tx.send(Ok(f)).await.is_err() {
                    return;
                }
            }
            (sent, log_id) = (head, id);
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            _ = lease.tick() => {
                let (still, frame) = {
                    let t = shared.lock();
                    (t.members.get(&peer).is_some_and(|m| !m.left), t.exports.lease().frame)
                };
                if !still {
                    let _ = tx.send(Err(Status::permission_denied(format!("cluster {peer} has left this mesh")))).await;
                    return;
                }
                pending.extend(frame);
            }
            r = exports.changed() => { if r.is_err() { return } resend = true; }
            r = members.changed() => { if r.is_err() { return } pending.push(member_list(&shared)); }
            r = requests.message() => match r {
                Ok(Some(ImporterFrame { frame: Some(importer_frame::Frame::Subscribe(s)) })) => {
                    (log_id, sent, resend) = (s.log_id, s.offset, true);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            },
        }
    }
}

fn member_list(shared: &Shared) -> Frame {
    Frame::Members(Members { members: shared.lock().members.values().map(wire::member_pb).collect() })
}
