//! The roots of one trust domain between its control planes: who is told, and who is given what.

use mesh_identity::{TRUST_BUNDLE, WORKLOAD_SVID, certificate_info};
use mesh_model::proxy::{SecretRef, StringMatch, UpstreamTls, Validation};
use multicluster::{
    admin_pb::{CaRotateRequest, CaStatusRequest},
    authority_pb::{
        AuthorityStatus, RequestIntermediateRequest, RequestRenewalRequest, RotateResponse,
        TakeAnnouncementRequest,
    },
    pb::{RenewRequest, RootsReport, federation_client::FederationClient},
};
use tonic::Code;

use super::*;

impl Cluster {
    async fn authority(&self) -> AuthorityClient<Channel> {
        AuthorityClient::new(self.channel("citadel.sock").await)
    }

    async fn ca(&self) -> AuthorityStatus {
        self.authority().await.status(StatusRequest {}).await.unwrap().into_inner()
    }

    async fn rotate(&self, step: &str) -> Result<RotateResponse, tonic::Status> {
        let r = CaRotateRequest { step: step.into(), ..CaRotateRequest::default() };
        self.admin().await.ca_rotate(r).await.map(tonic::Response::into_inner)
    }

    async fn until_sequence(&self, sequence: u64) {
        let start = Instant::now();
        while self.ca().await.bundle_sequence != sequence {
            assert!(start.elapsed() < SOON, "{:?}", self.ca().await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A connection to another one's control plane, with this one's certificate or with none.
    async fn dial(&self, to: &Self, proven: bool) -> FederationClient<Channel> {
        let san = format!("spiffe://{}/ns/flotilla-system/sa/control-plane", TrustDomain::DEFAULT);
        let config = self
            .secrets
            .client_config(&UpstreamTls {
                certificate: proven.then(|| SecretRef::Sds(WORKLOAD_SVID.into())),
                validation: Validation {
                    trusted: Some(SecretRef::Sds(TRUST_BUNDLE.into())),
                    sans: vec![StringMatch::exact(san)],
                    crl: None,
                },
                sni: "x".into(),
                by_name: false,
                alpn: vec!["h2".into()],
            })
            .unwrap();
        let address = to.options.listen.to_string();
        let endpoint = Endpoint::Tls { address, server_name: "x".into(), config };
        FederationClient::new(channel(&endpoint).await.unwrap())
    }
}

/// West has founded; east and north are members.
async fn three() -> [Cluster; 3] {
    let all = [Cluster::start("west").await, Cluster::start("east").await, Cluster::start("north").await];
    all[0].found().await;
    for c in &all[1..] {
        c.try_join(&all[0].token().await).await.unwrap();
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn announced_roots_reach_every_member_and_wait_for_nobody_who_is_silent() {
    let [west, east, mut north] = three().await;
    for c in [&east, &north] {
        assert_eq!(c.rotate("prepare").await.unwrap_err().code(), Code::FailedPrecondition);
    }
    assert!(west.rotate("prepare").await.unwrap().changed);
    for c in [&east, &north] {
        c.until_sequence(2).await;
        let ca = c.ca().await;
        assert_eq!((ca.phase.as_str(), &ca.bundle), ("prepared", &west.ca().await.bundle));
    }
    // Nobody is asked here what proxies trust, and who does not know does not acknowledge.
    let r = west.rotate("activate").await.unwrap();
    let who: Vec<_> = r.blockers.iter().map(|b| b.cluster.as_str()).collect();
    assert_eq!((r.changed, who), (false, vec!["west", "east", "north"]), "{:?}", r.blockers);
    assert!(r.blockers.iter().all(|b| b.why.contains("proxies")), "{:?}", r.blockers);
    // A member that is away when the roots change catches up.
    north.federation = None;
    assert!(west.rotate("abort").await.unwrap().changed);
    east.until_sequence(3).await;
    assert_eq!(north.ca().await.bundle_sequence, 2);
    north.federation = Some(Federation::start(north.options.clone(), north.secrets.clone()).await.unwrap());
    north.until_sequence(3).await;
    let status = west.admin().await.ca_status(CaStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.members.len(), 3);
    let seen_by_east = east.admin().await.ca_status(CaStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(seen_by_east.members.len(), 1, "of others only the holder of the root key knows");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_member_is_given_nothing_but_its_own() {
    let [west, east, north] = three().await;
    let csr =
        east.authority().await.request_renewal(RequestRenewalRequest {}).await.unwrap().into_inner().csr;
    let renew = |cluster: &str| RenewRequest { cluster: cluster.into(), csr: csr.clone() };
    let mut to_west = east.dial(&west, true).await;
    for other in ["north", "west", ""] {
        let e = to_west.renew(renew(other)).await.unwrap_err();
        assert_eq!(e.code(), Code::PermissionDenied, "{other:?}: {e}");
        assert!(e.message().contains("its own alone"), "{e}");
    }
    let chain = to_west.renew(renew("east")).await.unwrap().into_inner().chain;
    let named = certificate_info(chain.as_bytes()).unwrap().spiffe.unwrap();
    assert_eq!(named.cluster_id().unwrap().as_str(), "east");
    // Nobody else signs, and a stranger gets no answer.
    let e = east.dial(&north, true).await.renew(renew("east")).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
    let mut stranger = east.dial(&west, false).await;
    assert_eq!(stranger.renew(renew("east")).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(stranger.roots(RootsReport::default()).await.unwrap_err().code(), Code::Unauthenticated);

    // What it tells north is not believed. Every member holds an honest announcement to begin with.
    let honest = west.ca().await.announcement;
    assert!(honest.contains(r#""sequence":1"#), "{honest}");
    let tell = |text: String| async {
        let r = TakeAnnouncementRequest { announcement: text };
        north.authority().await.take_announcement(r).await.map(|r| r.into_inner().changed)
    };
    let e = tell(honest.replace(r#""sequence":1"#, r#""sequence":9"#)).await.unwrap_err();
    assert_eq!(e.code(), Code::PermissionDenied, "{e}");
    let e = tell(r#"{"trustDomain":"mesh.local"}"#.into()).await.unwrap_err();
    assert_eq!(e.code(), Code::InvalidArgument, "{e}");
    assert_eq!(north.ca().await.bundle_sequence, 1);
    // Nor is an own one made where the root key is not.
    assert!(east.authority().await.request_intermediate(RequestIntermediateRequest {}).await.is_err());

    // Who was evicted is nobody.
    west.admin().await.evict(EvictRequest { cluster: "east".into() }).await.unwrap();
    let e = east.dial(&west, true).await.renew(renew("east")).await.unwrap_err();
    assert_eq!(e.code(), Code::PermissionDenied, "{e}");
}
