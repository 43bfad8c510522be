//! What the operator's command line asks.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_model::TrustDomain;
use tonic::{Request, Response, Status};

use crate::{
    admin_pb::{
        CaRotateRequest, CaStatusRequest, CaStatusResponse, ClusterStatus, ClustersRequest, ClustersResponse,
        CompleteJoinResponse, CreateTokenRequest, CreateTokenResponse, EvictRequest, EvictResponse,
        ExportConflict, LeaveMeshRequest, LeaveMeshResponse, PrepareJoinRequest, PrepareJoinResponse,
        TraceRequest, admin_server,
    },
    authority_pb::{
        InstallIntermediateRequest, RequestIntermediateRequest, ResetRequest, RotateRequest, RotateResponse,
        StatusRequest, authority_client::AuthorityClient,
    },
    exchange::{self, Import},
    federate,
    membership::EvictError,
    pb::{InspectResponse, JoinResponse},
    roots,
    state::Shared,
    store::IssuedToken,
    token::{JoinToken, secret_hash, unix_now},
    trace, wire,
};

/// Lifetime of a join token unless asked otherwise.
const TOKEN_TTL: u64 = 15 * 60;
/// Longest lifetime of a join token.
const MAX_TOKEN_TTL: u64 = 7 * 86_400;

pub(crate) struct AdminService(pub(crate) Arc<Shared>);

fn internal(what: &'static str) -> impl Fn(std::io::Error) -> Status {
    move |e| Status::internal(format!("{what}: {e}"))
}

#[tonic::async_trait]
impl admin_server::Admin for AdminService {
    async fn create_token(
        &self,
        r: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let ttl = match r.get_ref().ttl {
            0 => TOKEN_TTL,
            t if t > MAX_TOKEN_TTL => {
                return Err(Status::invalid_argument("a join token lives seven days at most"));
            }
            t => t,
        };
        let status =
            AuthorityClient::new(self.0.authority().await?).status(StatusRequest {}).await?.into_inner();
        if status.state != "active" {
            return Err(Status::failed_precondition(
                "this cluster is in no mesh: found one first with `flotilla found`",
            ));
        }
        if !status.holds_root_key {
            return Err(Status::failed_precondition(
                "the root key is not here: create the token in the cluster that founded the mesh",
            ));
        }
        let federate = match r.get_ref().federate.as_str() {
            "" => None,
            d if d == status.trust_domain => {
                return Err(Status::invalid_argument(format!(
                    "--federate names the trust domain of the newcomer, and {d} is this mesh's own: a cluster of it joins \
                     with a token without --federate"
                )));
            }
            d => Some(TrustDomain::new(d).map_err(|e| Status::invalid_argument(e.to_string()))?),
        };
        let dials = r.get_ref().dials;
        if self.0.options.gateways.is_empty() && !dials {
            return Err(Status::failed_precondition(
                "this cluster announces no gateway address (--gateway-address), so a newcomer could not dial it; \
                 `flotilla token create --dial ADDRESS` dials the newcomer",
            ));
        }
        let trust_domain =
            TrustDomain::new(&status.trust_domain).map_err(|e| Status::internal(e.to_string()))?;
        let now = unix_now();
        let token = JoinToken::generate(
            self.0.options.cluster.clone(),
            trust_domain,
            self.0.options.gateways.iter().map(|g| g.address).collect(),
            status.root_pin,
            now + ttl,
        );
        let token = if dials { token.of_dialler() } else { token };
        let token = token.for_domain(federate.clone());
        let mut t = self.0.lock();
        // Tokens that can no longer be used are kept a day for their error message, then forgotten.
        t.tokens.retain(|_, k| k.expires + 86_400 > now);
        t.tokens.insert(
            token.id.clone(),
            IssuedToken {
                secret_sha256: secret_hash(&token.secret()),
                expires: token.expires,
                used: None,
                epoch: 0,
                federate,
            },
        );
        self.0.store.save_tokens(&t.tokens).map_err(internal("tokens were not saved"))?;
        tracing::info!(target: "audit", token = %token.id, ttl, "created a join token");
        Ok(Response::new(CreateTokenResponse { expires: token.expires, token: token.encode() }))
    }

    async fn prepare_join(
        &self,
        r: Request<PrepareJoinRequest>,
    ) -> Result<Response<PrepareJoinResponse>, Status> {
        if !r.get_ref().federate.is_empty() {
            return federate::prepare(&self.0, &r.get_ref().federate).await.map(Response::new);
        }
        let csr = AuthorityClient::new(self.0.authority().await?)
            .request_intermediate(RequestIntermediateRequest {})
            .await?
            .into_inner()
            .csr;
        Ok(Response::new(PrepareJoinResponse {
            newcomer: Some(wire::member_pb(&self.0.lock().node.this())),
            csr,
            ..PrepareJoinResponse::default()
        }))
    }

    async fn complete_join(
        &self,
        r: Request<JoinResponse>,
    ) -> Result<Response<CompleteJoinResponse>, Status> {
        let r = r.into_inner();
        let members = r
            .members
            .into_iter()
            .map(wire::member)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        if let Some(foreign) = &r.foreign {
            return federate::complete(&self.0, foreign, members).await.map(Response::new);
        }
        let me = members
            .iter()
            .find(|m| m.cluster == self.0.options.cluster)
            .cloned()
            .ok_or_else(|| Status::invalid_argument("the member list does not contain this cluster"))?;
        AuthorityClient::new(self.0.authority().await?)
            .install_intermediate(InstallIntermediateRequest {
                trust_domain: r.trust_domain.clone(),
                chain: r.chain,
                bundle: r.bundle,
            })
            .await?;
        self.0.lock().node.enter(me.epoch);
        self.0.enter(Some(r.trust_domain));
        let names = members.iter().filter(|m| !m.left).map(|m| m.cluster.to_string()).collect();
        self.0.merge_members(members).map_err(internal("members were not saved"))?;
        Ok(Response::new(CompleteJoinResponse { members: names }))
    }

    async fn leave(&self, r: Request<LeaveMeshRequest>) -> Result<Response<LeaveMeshResponse>, Status> {
        let force = r.get_ref().force;
        if self.0.trust_domain().is_none() {
            return Err(Status::failed_precondition("this cluster is in no mesh"));
        }
        let (peers, domains) = {
            let t = self.0.lock();
            let peers: Vec<_> = t.node.members.peers().cloned().collect();
            (peers, t.node.members.domains())
        };
        let others = peers.iter().filter(|m| m.trust_domain.is_none()).count();
        // Who is alone in its own mesh leaves whom it is federated with, and keeps its root.
        let ends: Vec<_> = match r.get_ref().trust_domain.as_str() {
            "" if others == 0 => domains.into_iter().collect(),
            "" => vec![],
            named => match domains.into_iter().find(|d| d.as_str() == named) {
                Some(d) => vec![d],
                None => {
                    return Err(Status::not_found(format!(
                        "this mesh is not federated with {named}; `flotilla clusters` shows with whom it is"
                    )));
                }
            },
        };
        if !ends.is_empty() {
            return federate::leave(&self.0, ends, force).await.map(Response::new);
        }
        let status =
            AuthorityClient::new(self.0.authority().await?).status(StatusRequest {}).await?.into_inner();
        if status.holds_root_key && others > 0 && !force {
            // It could not be taken back: nobody could join that mesh any more.
            return Err(Status::failed_precondition(
                "this cluster holds the root key, which leaving deletes, and others are members: keep a copy of the key \
                 first; --force (declared: spec.force: true) leaves all the same",
            ));
        }
        let answers = federate::tell(&self.0, &peers, false).await;
        if federate::clean(&answers) || force {
            self.0.set_trust_domain(None);
            {
                let mut t = self.0.lock();
                t.node.clear();
                t.links.clear();
                t.tokens.clear();
                t.bundles.clear();
                t.clashes.clear();
            }
            self.0.store.clear().map_err(internal("the state was not removed"))?;
            self.0.members_changed.send_modify(|n| *n += 1);
            self.0.publish();
            AuthorityClient::new(self.0.authority().await?).reset(ResetRequest {}).await?;
            tracing::info!(target: "audit", "left the mesh");
        }
        Ok(Response::new(LeaveMeshResponse { peers: answers, ..LeaveMeshResponse::default() }))
    }

    async fn evict(&self, r: Request<EvictRequest>) -> Result<Response<EvictResponse>, Status> {
        if self.0.trust_domain().is_none() {
            return Err(Status::failed_precondition("this cluster is in no mesh"));
        }
        let name = mesh_model::ClusterId::new(&r.get_ref().cluster)
            .map_err(|e| Status::invalid_argument(format!("cluster: {e}")))?;
        let (merged, answer) = {
            let mut t = self.0.lock();
            let domain = t.node.members.domain_of(&name).cloned();
            let imported = t.node.imports.get(&name).map_or(0, |i| i.services().len());
            let merged = t.node.evict(&name, self.0.now()).map_err(|e| match e {
                EvictError::Itself(_) => Status::invalid_argument(e.to_string()),
                EvictError::Unknown(_) => Status::not_found(e.to_string()),
            })?;
            let (told, unreachable): (Vec<_>, Vec<_>) =
                t.node.members.peers().map(|m| m.cluster.clone()).partition(|c| t.node.streaming(c));
            let ended = domain.filter(|d| t.node.members.of_domain(d).next().is_none());
            let names = |l: Vec<mesh_model::ClusterId>| l.iter().map(ToString::to_string).collect();
            let answer = EvictResponse {
                changed: merged.changed,
                imported_services: u32::try_from(imported).unwrap_or(u32::MAX),
                told: names(told),
                unreachable: names(unreachable),
                pending: false,
                domain_ended: ended.map(|d| d.to_string()).unwrap_or_default(),
            };
            (merged, answer)
        };
        self.0.members_merged(&merged).map_err(internal("members were not saved"))?;
        if merged.changed {
            tracing::warn!(target: "audit", cluster = %name, "evicted a cluster");
        }
        let pending = !self.0.settled(Duration::from_secs(5)).await;
        Ok(Response::new(EvictResponse { pending, ..answer }))
    }

    async fn ca_status(&self, _: Request<CaStatusRequest>) -> Result<Response<CaStatusResponse>, Status> {
        Ok(Response::new(CaStatusResponse {
            authority: Some(
                AuthorityClient::new(self.0.authority().await?).status(StatusRequest {}).await?.into_inner(),
            ),
            members: roots::members(&self.0).await,
            told: self.0.told_bundles(),
            lists: self.0.known_lists(),
        }))
    }

    async fn ca_rotate(&self, r: Request<CaRotateRequest>) -> Result<Response<RotateResponse>, Status> {
        let CaRotateRequest { step, root_cert, root_key } = r.into_inner();
        let members = roots::members(&self.0).await;
        let request = RotateRequest { step, root_cert, root_key, members };
        AuthorityClient::new(self.0.authority().await?).rotate(request).await
    }

    async fn trace(&self, r: Request<TraceRequest>) -> Result<Response<InspectResponse>, Status> {
        let steps = trace::trace(&self.0, &r.into_inner()).await?;
        Ok(Response::new(InspectResponse {
            steps: steps.into_iter().map(Into::into).collect(),
            now_ms: trace::now_ms(),
        }))
    }

    async fn clusters(&self, _: Request<ClustersRequest>) -> Result<Response<ClustersResponse>, Status> {
        let now = self.0.now();
        let t = self.0.lock();
        let clusters = t
            .node
            .members
            .peers()
            .map(|m| {
                let link = t.links.get(&m.cluster).cloned().unwrap_or_default();
                let import = t.node.imports.get(&m.cluster);
                let live = import.is_some_and(|i| i.lease() == mesh_model::federation::LeaseState::Live);
                ClusterStatus {
                    member: Some(wire::member_pb(m)),
                    state: match (link.connected, live) {
                        (true, true) => "connected",
                        (_, false) => "lapsed",
                        (false, true) => "connecting",
                    }
                    .into(),
                    lease_age_ms: import.and_then(|i| i.lease_age(now)),
                    // What was told on a stream that has ended says nothing of now.
                    lag_changes: import.filter(|_| link.connected).and_then(Import::lag),
                    confirmed_age_ms: import.and_then(|i| i.confirmed_age(now)),
                    control_rtt_us: link
                        .rtt
                        .filter(|_| link.connected)
                        .map(|d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX)),
                    software: link.software,
                    protocol: link.protocol,
                    certificate_not_after: link
                        .certificate_ends
                        .and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok())
                        .map(|d| d.as_secs()),
                    imported_services: import
                        .map_or(0, |i| u32::try_from(i.services().len()).unwrap_or(u32::MAX)),
                    offset: import.map_or(0, Import::offset),
                    last_error: link.last_error,
                    refused_records: import.map_or(0, |i| i.refusals().0),
                    refusals: import.map(|i| i.refusals().1.to_vec()).unwrap_or_default(),
                }
            })
            .collect();
        let evicted = t.node.members.evicted().map(ToString::to_string).collect();
        let conflicts = t
            .node
            .lost_conflicts()
            .into_iter()
            .map(|(c, by)| ExportConflict {
                conflict: Some(exchange::conflict_pb(&c)),
                reported_by: by.iter().map(ToString::to_string).collect(),
            })
            .collect();
        let (declared, declared_evictions) = t.declared.describe();
        let clashes = t.clashes.iter().map(ToString::to_string).collect();
        drop(t);
        let bundles = self.0.bundle_status();
        Ok(Response::new(ClustersResponse {
            declared,
            declared_evictions,
            bundles,
            clashes,
            evicted,
            conflicts,
            software: exchange::SOFTWARE.to_owned(),
            self_: self.0.options.cluster.to_string(),
            trust_domain: self.0.trust_domain().unwrap_or_default(),
            clusters,
        }))
    }
}
