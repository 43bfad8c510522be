//! gRPC adapters: certificate signing for workloads, the authority socket for the control plane.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_identity::peer_identity;
use mesh_model::{ClusterId, SpiffeId, TrustDomain};
use mesh_xds::PeerInfo;
use rustls_pki_types::CertificateDer;
use tonic::{Request, Response, Status};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    Authority, AuthorityError,
    audit::{self, Proof},
    authority::{AuthorityStatus as Facts, Issued},
    kubernetes::{self, Kubernetes},
    pb::{
        authority::{
            self as pb, AuthorityStatus, FoundRequest, InstallIntermediateRequest, InstallRenewalRequest,
            IntermediateRequest, IssueTokenRequest, ProbeRequest, ProbeResponse, RequestIntermediateRequest,
            RequestRenewalRequest, ResetRequest, RevokeRequest, RevokeResponse, RotateRequest,
            RotateResponse, SignIntermediateRequest, SignedIntermediate, StatusRequest,
            TakeAnnouncementRequest, TakeAnnouncementResponse, WorkloadToken, authority_server,
            revoke_request,
        },
        istio::{IstioCertificateRequest, IstioCertificateResponse, istio_certificate_service_server},
    },
    revocation::{self, Revoked, Target},
    rotation::{Report, Step},
    token,
};

impl From<AuthorityError> for Status {
    fn from(e: AuthorityError) -> Self {
        let text = e.to_string();
        match e {
            AuthorityError::Empty | AuthorityError::Active(_) | AuthorityError::NoRootKey => {
                Status::failed_precondition(text)
            }
            AuthorityError::BadRequest(_) => Status::invalid_argument(text),
            AuthorityError::Unauthenticated(_) => Status::unauthenticated(text),
            AuthorityError::Unavailable(_) => Status::unavailable(text),
            AuthorityError::Refused(_) => Status::permission_denied(text),
            AuthorityError::Stored(_)
            | AuthorityError::Io(_)
            | AuthorityError::Identity(_)
            | AuthorityError::Sign(_) => {
                // Details of the CA's own state are for its operator, not for callers.
                tracing::error!(error = %text, "the CA failed");
                Status::internal("the CA failed; its log says why")
            }
        }
    }
}

/// `IstioCertificateService`: who is proved by a client certificate of this cluster or a token.
pub(crate) struct CertificateService(pub(crate) Arc<Authority>, pub(crate) Option<Arc<Kubernetes>>);

impl CertificateService {
    /// Who calls, and what the audit log says of how that was proved. It says as well who could not prove it.
    pub(crate) async fn proven_or_noted<T: Sync>(
        &self,
        request: &Request<T>,
    ) -> Result<(SpiffeId, Proof), AuthorityError> {
        let mut shown = shown(request);
        match self.proven(request).await {
            Ok((id, kind)) => {
                kind.clone_into(&mut shown.kind);
                Ok((id, shown))
            }
            Err(e) => {
                self.0.refused("", shown, &e.to_string());
                Err(e)
            }
        }
    }

    /// Gives a caller its certificate, or notes why not.
    pub(crate) async fn issue(
        &self,
        csr: String,
        id: SpiffeId,
        ttl: Duration,
        proof: Proof,
    ) -> Result<Issued, Status> {
        let (ca, who, on) = (self.0.clone(), id.clone(), proof.clone());
        // The audit log waits for the disk: not on the threads that serve.
        let issued = tokio::task::spawn_blocking(move || ca.issue_for(&csr, &who, ttl, &on)).await;
        issued.map_err(|e| Status::internal(e.to_string()))?.map_err(|e| {
            self.0.refused(id.as_str(), proof, &e.to_string());
            e.into()
        })
    }

    async fn proven<T: Sync>(
        &self,
        request: &Request<T>,
    ) -> Result<(SpiffeId, &'static str), AuthorityError> {
        let status = self.0.status().ok_or(AuthorityError::Empty)?;
        if let Some(certs) = request.extensions().get::<PeerInfo>().map(|p| &p.certificates)
            && !certs.is_empty()
        {
            let peer = peer_identity(certs).ok_or_else(|| {
                AuthorityError::Unauthenticated("the client certificate is unreadable".into())
            })?;
            let id = peer.spiffe.ok_or_else(|| {
                AuthorityError::Unauthenticated("the client certificate has no SPIFFE ID".into())
            })?;
            if peer.cluster.as_ref() != Some(self.0.cluster()) {
                return Err(AuthorityError::Refused(format!(
                    "{id} was certified by another cluster; it renews there"
                )));
            }
            // The session may be from before.
            if certificate_serial(certs).is_some_and(|s| self.0.has_revoked(&s)) {
                return Err(AuthorityError::Refused(format!("the certificate of {id} was revoked")));
            }
            if id.namespace_and_account().is_none() {
                return Err(AuthorityError::Refused(format!("{id} is not a workload")));
            }
            return Ok((id, "certificate"));
        }
        let bearer = request
            .metadata()
            .get("authorization")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.strip_prefix("Bearer ").or_else(|| v.strip_prefix("bearer ")))
            .ok_or_else(|| {
                AuthorityError::Unauthenticated(
                    "no proof of identity: send a client certificate or a bearer token".into(),
                )
            })?;
        let bearer = bearer.trim();
        let claims = kubernetes::claimed_issuer(bearer);
        let (ns, sa, issued_at, by) = match &self.1 {
            Some(k) if claims != self.0.tokens().name() && k.takes(&claims) => {
                let a = k.prove(bearer).await?;
                (a.namespace, a.name, a.issued_at, a.by)
            }
            _ => {
                let (ns, sa, at) = self.0.tokens().verify_dated(bearer)?;
                (ns, sa, at, "token")
            }
        };
        if !self.0.takes_token(&ns, &sa, issued_at) {
            return Err(AuthorityError::Refused(format!(
                "{ns}/{sa} was revoked after this token was issued: give it a new one (`flotilla token workload`)"
            )));
        }
        let id = SpiffeId::workload(&status.trust_domain, &ns, &sa)
            .map_err(|e| AuthorityError::Refused(e.to_string()))?;
        Ok((id, by))
    }
}

#[tonic::async_trait]
impl istio_certificate_service_server::IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (id, proof) = self.proven_or_noted(&request).await?;
        let r = request.into_inner();
        let ttl = u64::try_from(r.validity_duration)
            .map_err(|_| Status::invalid_argument("validity_duration is negative"))?;
        let issued = self.issue(r.csr, id, Duration::from_secs(ttl), proof).await?;
        Ok(Response::new(IstioCertificateResponse { cert_chain: issued.chain }))
    }
}

fn certificate_serial(chain: &[CertificateDer<'_>]) -> Option<String> {
    let (_, leaf) = X509Certificate::from_der(chain.first()?).ok()?;
    Some(leaf.raw_serial_as_string())
}

/// What a caller shows, for the audit log: named, and never repeated.
fn shown<T>(request: &Request<T>) -> Proof {
    let peer = request.extensions().get::<PeerInfo>();
    let caller = peer.and_then(|p| p.address).map(|a| a.to_string()).unwrap_or_default();
    let name = |bytes: &[u8]| audit::sha256(bytes)[..16].to_owned();
    if let Some(leaf) = peer.and_then(|p| p.certificates.first()) {
        return Proof { kind: "certificate".into(), id: name(leaf), caller };
    }
    match request.metadata().get("authorization") {
        Some(t) => {
            let token = t.as_bytes().rsplit(|b| *b == b' ').next().unwrap_or_default();
            Proof { kind: "token".into(), id: name(token), caller }
        }
        None => Proof { kind: "nothing".into(), id: String::new(), caller },
    }
}

/// `flotilla.citadel.v1.Authority`, reachable only through a socket of mode 0600.
pub(crate) struct AuthorityService(pub(crate) Arc<Authority>, pub(crate) TrustDomain);

impl AuthorityService {
    fn describe(&self, facts: Option<Facts>) -> Response<AuthorityStatus> {
        let cluster = self.0.cluster().to_string();
        let due = facts.as_ref().and_then(|f| f.renewal_due(SystemTime::now()));
        Response::new(match facts {
            None => AuthorityStatus { state: "empty".into(), cluster, ..AuthorityStatus::default() },
            Some(f) => AuthorityStatus {
                state: "active".into(),
                trust_domain: f.trust_domain.to_string(),
                cluster,
                holds_root_key: f.holds_root_key,
                bundle: f.bundle_pem,
                chain: f.chain_pem,
                intermediate_not_after: f
                    .not_after
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX)),
                renewal_due: due.unwrap_or_default().to_owned(),
                root_pin: f.root_pin,
                bundle_sequence: f.bundle_sequence,
                phase: f.phase.to_string(),
                announcement: f.announcement,
                issuer_pin: f.issuer_pin,
                intermediate_sha256: f.intermediate,
                lists: f
                    .lists
                    .into_iter()
                    .map(|l| pb::RevocationList { issuer: l.issuer, list: l.list })
                    .collect(),
                revoked: f.revoked.into_iter().map(Into::into).collect(),
            },
        })
    }
}

/// What is wrong with material is the caller's to know: it brought it.
fn brought(e: AuthorityError) -> Status {
    match e {
        AuthorityError::Stored(s) => Status::invalid_argument(s),
        AuthorityError::Identity(e) => Status::invalid_argument(e.to_string()),
        other => other.into(),
    }
}

impl From<Revoked> for pb::RevokedCertificate {
    fn from(r: Revoked) -> Self {
        Self { serial: r.serial, of: r.of, reason: r.reason.to_string(), at: r.at, until: r.until }
    }
}

impl From<pb::MemberRoots> for Report {
    fn from(m: pb::MemberRoots) -> Self {
        Self {
            cluster: m.cluster,
            age: m.age_ms.map(Duration::from_millis),
            sequence: m.sequence,
            root: m.root,
            proxies: m.proxies,
            trusting: m.trusting,
            renewed: m.renewed,
            late: m.late,
            error: m.error,
        }
    }
}

fn trust_domain(s: &str) -> Result<TrustDomain, Status> {
    if s.is_empty() {
        return Ok(TrustDomain::default());
    }
    TrustDomain::new(s).map_err(|e| Status::invalid_argument(e.to_string()))
}

#[tonic::async_trait]
impl authority_server::Authority for AuthorityService {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<AuthorityStatus>, Status> {
        Ok(self.describe(self.0.status()))
    }

    async fn found(&self, r: Request<FoundRequest>) -> Result<Response<AuthorityStatus>, Status> {
        // The rest of the control plane, and its proxies, have been told their domain as well.
        let own = &self.1;
        match r.get_ref().trust_domain.as_str() {
            "" => {}
            d if d == own.as_str() => {}
            d => {
                return Err(Status::invalid_argument(format!(
                    "this control plane runs for trust domain {own}: start it, and its proxies, with --trust-domain {d}"
                )));
            }
        }
        Ok(self.describe(Some(self.0.found(own)?)))
    }

    async fn request_intermediate(
        &self,
        _: Request<RequestIntermediateRequest>,
    ) -> Result<Response<IntermediateRequest>, Status> {
        Ok(Response::new(IntermediateRequest { csr: self.0.request_intermediate()? }))
    }

    async fn install_intermediate(
        &self,
        r: Request<InstallIntermediateRequest>,
    ) -> Result<Response<AuthorityStatus>, Status> {
        let r = r.into_inner();
        let td = trust_domain(&r.trust_domain)?;
        if td != self.1 {
            return Err(Status::failed_precondition(format!(
                "the mesh is of trust domain {td} and this control plane runs for {}: start it, and its proxies, with \
                 --trust-domain {td}, and use the same token again",
                self.1
            )));
        }
        let facts = self.0.install_intermediate(&td, &r.chain, &r.bundle).map_err(brought)?;
        Ok(self.describe(Some(facts)))
    }

    async fn rotate(&self, r: Request<RotateRequest>) -> Result<Response<RotateResponse>, Status> {
        let r = r.into_inner();
        let step: Step = r.step.parse().map_err(Status::invalid_argument)?;
        let given = match (r.root_cert.is_empty(), r.root_key.is_empty()) {
            (true, true) => None,
            (false, false) if step == Step::Prepare => Some((r.root_cert, r.root_key)),
            _ => {
                return Err(Status::invalid_argument(
                    "--root-cert and --root-key go together, and with prepare alone",
                ));
            }
        };
        let members: Vec<Report> = r.members.into_iter().map(Into::into).collect();
        let done = self.0.rotate(step, given, &members)?;
        Ok(Response::new(RotateResponse {
            status: Some(self.describe(Some(done.status)).into_inner()),
            changed: done.changed,
            says: done.says,
            blockers: done
                .blockers
                .into_iter()
                .map(|b| pb::Blocker { cluster: b.cluster, why: b.why })
                .collect(),
        }))
    }

    async fn take_announcement(
        &self,
        r: Request<TakeAnnouncementRequest>,
    ) -> Result<Response<TakeAnnouncementResponse>, Status> {
        let changed = self.0.take_announcement(&r.get_ref().announcement).map_err(brought)?;
        Ok(Response::new(TakeAnnouncementResponse { changed }))
    }

    async fn request_renewal(
        &self,
        _: Request<RequestRenewalRequest>,
    ) -> Result<Response<IntermediateRequest>, Status> {
        Ok(Response::new(IntermediateRequest { csr: self.0.request_renewal()? }))
    }

    async fn install_renewal(
        &self,
        r: Request<InstallRenewalRequest>,
    ) -> Result<Response<AuthorityStatus>, Status> {
        let facts = self.0.install_renewal(&r.get_ref().chain).map_err(brought)?;
        Ok(self.describe(Some(facts)))
    }

    async fn sign_intermediate(
        &self,
        r: Request<SignIntermediateRequest>,
    ) -> Result<Response<SignedIntermediate>, Status> {
        let r = r.into_inner();
        let cluster = ClusterId::new(&r.cluster).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let (chain, facts) = self.0.sign_intermediate_for(&r.csr, &cluster, &Proof::of(&r.proof))?;
        Ok(Response::new(SignedIntermediate {
            chain,
            bundle: facts.bundle_pem,
            trust_domain: facts.trust_domain.to_string(),
        }))
    }

    async fn issue_token(&self, r: Request<IssueTokenRequest>) -> Result<Response<WorkloadToken>, Status> {
        let r = r.into_inner();
        let ttl = match r.ttl {
            0 => token::DEFAULT_TTL,
            t => Duration::from_secs(
                u64::try_from(t).map_err(|_| Status::invalid_argument("ttl is negative"))?,
            ),
        };
        let token = self.0.tokens().issue(&r.namespace, &r.service_account, ttl)?;
        Ok(Response::new(WorkloadToken { token }))
    }

    async fn revoke(&self, r: Request<RevokeRequest>) -> Result<Response<RevokeResponse>, Status> {
        let r = r.into_inner();
        let bad = |e: String| Status::invalid_argument(e);
        let target = match r.target {
            Some(revoke_request::Target::Serial(s)) if !revocation::serial(&s).is_empty() => {
                Target::Serial(s)
            }
            Some(revoke_request::Target::Identity(s)) => {
                Target::Identity(SpiffeId::parse(&s).map_err(|e| bad(e.to_string()))?)
            }
            Some(revoke_request::Target::Cluster(s)) => {
                Target::Cluster(ClusterId::new(&s).map_err(|e| bad(e.to_string()))?)
            }
            _ => return Err(bad("say what to revoke: a serial number, an identity or a cluster".into())),
        };
        let reason = r.reason.parse().map_err(bad)?;
        let ca = self.0.clone();
        // It reads the audit log.
        let done = tokio::task::spawn_blocking(move || ca.revoke(&target, reason)).await;
        let done = done.map_err(|e| Status::internal(e.to_string()))?.map_err(brought)?;
        Ok(Response::new(RevokeResponse {
            revoked: done.revoked.into_iter().map(Into::into).collect(),
            already: u32::try_from(done.already).unwrap_or(u32::MAX),
            beyond: done.beyond,
            tokens: done.tokens,
        }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        // The caller is the operator: what is wrong is its to know.
        let p = self.0.probe().map_err(brought)?;
        Ok(Response::new(ProbeResponse {
            identity: p.identity.to_string(),
            serial: p.serial,
            certificates: u32::try_from(p.certificates).unwrap_or(u32::MAX),
            took_us: u64::try_from(p.took.as_micros()).unwrap_or(u64::MAX),
        }))
    }

    async fn reset(&self, _: Request<ResetRequest>) -> Result<Response<AuthorityStatus>, Status> {
        self.0.reset()?;
        Ok(self.describe(None))
    }
}
