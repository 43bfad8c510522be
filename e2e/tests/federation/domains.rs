//! Control planes of two trust domains.

use std::collections::BTreeSet;

use mesh_identity::TrustBundle;
use mesh_model::TrustDomain;
use multicluster::admin_pb::{ClustersResponse, PrepareJoinResponse};

use super::*;

const A: &str = "a.example";
const B: &str = "b.example";

impl Cluster {
    /// A token for a mesh of another trust domain.
    async fn token_for(&self, domain: &str) -> JoinToken {
        let r = CreateTokenRequest { federate: domain.into(), ..CreateTokenRequest::default() };
        let text = self.admin().await.create_token(r).await.unwrap().into_inner().token;
        JoinToken::parse(&text, 0).unwrap()
    }

    async fn prepare(&self, joined: &str) -> PrepareJoinResponse {
        let r = PrepareJoinRequest { federate: joined.into() };
        self.admin().await.prepare_join(r).await.unwrap().into_inner()
    }

    async fn federate(&self, token: &JoinToken) -> Result<(), JoinError> {
        let answer = join(token, self.prepare(token.trust_domain.as_str()).await).await?;
        self.admin().await.complete_join(answer).await.unwrap();
        Ok(())
    }

    async fn known(&self) -> ClustersResponse {
        self.admin().await.clusters(ClustersRequest {}).await.unwrap().into_inner()
    }

    /// Waits until these are connected, each as `name` or `name@domain`, and nobody else is there.
    async fn sees(&self, wanted: &[&str]) {
        let wanted: BTreeSet<String> = wanted.iter().map(|w| (*w).to_owned()).collect();
        let start = Instant::now();
        loop {
            let r = self.known().await;
            let seen: BTreeSet<String> = r
                .clusters
                .iter()
                .filter(|c| c.state == "connected")
                .filter_map(|c| c.member.as_ref())
                .map(|m| match m.trust_domain.as_str() {
                    "" => m.cluster.clone(),
                    d => format!("{}@{d}", m.cluster),
                })
                .collect();
            if seen == wanted && r.clusters.len() == wanted.len() {
                return;
            }
            assert!(start.elapsed() < SOON, "{}: {:?} and not {wanted:?}", self.options.cluster, r.clusters);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn reason(r: Result<(), JoinError>) -> String {
    r.expect_err("refused").to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_unique_over_both_domains() {
    let (west, east) = (Cluster::start_in("west", A).await, Cluster::start_in("east", A).await);
    let (north, other) = (Cluster::start_in("north", B).await, Cluster::start_in("east", B).await);
    west.found().await;
    east.try_join(&west.token().await).await.unwrap();
    north.found().await;
    other.try_join(&north.token().await).await.unwrap();
    north.sees(&["east"]).await;

    // b has an east as well: neither knows it before, and the token is not used up by finding out.
    let token = west.token_for(B).await;
    let why = reason(north.federate(&token).await);
    assert!(why.contains("cluster east of b.example") && why.contains("--cluster"), "{why}");
    assert!(north.known().await.bundles.is_empty() && west.known().await.bundles.is_empty());
    other.admin().await.leave(LeaveMeshRequest::default()).await.unwrap();
    north.sees(&[]).await;

    // The answer is lost, and the same is asked again; another one's use of the token is refused.
    let prepared = north.prepare(A).await;
    join(&token, prepared.clone()).await.unwrap();
    let answer = join(&token, prepared.clone()).await.unwrap();
    north.admin().await.complete_join(answer).await.unwrap();
    let stranger = Cluster::start_in("stranger", B).await;
    stranger.found().await;
    let why = reason(stranger.federate(&token).await);
    assert!(why.contains("already used by cluster north"), "{why}");
    west.sees(&["east", "north@b.example"]).await;
    east.sees(&["west", "north@b.example"]).await;
    north.sees(&["west@a.example", "east@a.example"]).await;

    // Another mesh of that name is another mesh.
    let why = reason(stranger.federate(&west.token_for(B).await).await);
    assert!(why.contains("none of these roots"), "{why}");

    // Who joins b is there for a too, unless its name is taken.
    let south = Cluster::start_in("south", B).await;
    south.try_join(&north.token().await).await.unwrap();
    west.sees(&["east", "north@b.example", "south@b.example"]).await;
    east.sees(&["west", "north@b.example", "south@b.example"]).await;
    south.sees(&["north", "west@a.example", "east@a.example"]).await;
    let other = Cluster::start_in("west", B).await;
    let why = reason(other.try_join(&north.token().await).await);
    assert!(why.contains("already a member"), "north knows a west: {why}");

    // One of b is evicted by one of a: in all of a, and in nobody else's mesh. The bundle stays for the other.
    east.admin().await.evict(EvictRequest { cluster: "north".into() }).await.unwrap();
    west.sees(&["east", "south@b.example"]).await;
    east.sees(&["west", "south@b.example"]).await;
    assert_eq!(west.known().await.bundles.len(), 1);
    assert!(south.known().await.clusters.iter().any(|c| c.member.as_ref().unwrap().cluster == "north"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    west.sees(&["east", "south@b.example"]).await;

    let why = join(&token, prepared).await.unwrap_err().to_string();
    assert!(why.contains("already used"), "the token that let it in does not do so again: {why}");

    // South ends it for all of b.
    let r = LeaveMeshRequest { trust_domain: A.into(), ..LeaveMeshRequest::default() };
    let left = south.admin().await.leave(r).await.unwrap().into_inner();
    assert!(left.peers.iter().all(|p| p.error.is_empty() && p.references == 0), "{left:?}");
    west.sees(&["east"]).await;
    east.sees(&["west"]).await;
    south.sees(&["north"]).await;
    north.sees(&["south"]).await;
    for c in [&west, &east, &south, &north] {
        assert!(c.known().await.bundles.is_empty(), "{}", c.options.cluster);
        assert_eq!(c.secrets.trust_domains().len(), 1, "{}", c.options.cluster);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_lets_in_what_it_says() {
    let (west, north) = (Cluster::start_in("west", A).await, Cluster::start_in("north", B).await);
    west.found().await;
    let empty =
        north.admin().await.prepare_join(PrepareJoinRequest { federate: A.into() }).await.unwrap_err();
    assert!(empty.message().contains("no root of its own"), "{empty}");
    north.found().await;
    let own = CreateTokenRequest { federate: A.into(), ..CreateTokenRequest::default() };
    assert!(west.admin().await.create_token(own).await.is_err());

    // The newcomer's own program refuses what cannot be; the member does not rely on that.
    let forged = |token: &JoinToken, domain: Option<&str>| {
        let federate = domain.map(|d| TrustDomain::new(d).unwrap());
        token.clone().for_domain(federate)
    };
    let prepared = north.prepare(A).await;
    let plain = west.token().await;
    let why = join(&forged(&plain, Some(B)), prepared.clone()).await.unwrap_err().to_string();
    assert!(why.contains("--federate b.example"), "{why}");
    let for_c = west.token_for("c.example").await;
    let why = join(&for_c, prepared.clone()).await.unwrap_err().to_string();
    assert!(why.contains("c.example"), "{why}");
    let why = join(&forged(&for_c, Some(B)), prepared.clone()).await.unwrap_err().to_string();
    assert!(why.contains("is for trust domain c.example, the newcomer is of b.example"), "{why}");
    let token = west.token_for(B).await;
    let wants_signature = PrepareJoinResponse { bundle: None, csr: "x".into(), ..prepared.clone() };
    let why = join(&forged(&token, None), wants_signature).await.unwrap_err().to_string();
    assert!(why.contains("keeps its own root"), "{why}");

    // Roots that would let one domain speak for another.
    let mut authority = AuthorityClient::new(west.channel("citadel.sock").await);
    let ours = authority.status(StatusRequest {}).await.unwrap().into_inner().bundle;
    let told = |domain: &str, pem: &str| {
        let bundle =
            TrustBundle::from_pem(TrustDomain::new(domain).unwrap(), pem.as_bytes(), 9, None).unwrap();
        let bundle = multicluster::pb::TrustBundle {
            revoked: vec![],
            trust_domain: domain.into(),
            document: bundle.document(),
            generation: 1 << 40,
        };
        PrepareJoinResponse { bundle: Some(bundle), ..prepared.clone() }
    };
    let why = join(&token, told(B, &ours)).await.unwrap_err().to_string();
    assert!(why.contains("could speak for both"), "{why}");
    let why = join(&forged(&token, Some(A)), told(A, &ours)).await.unwrap_err().to_string();
    assert!(why.contains("both meshes are of trust domain a.example"), "{why}");
    // After all of that the token is still good.
    north.federate(&token).await.unwrap();
    west.sees(&["north@b.example"]).await;
    north.sees(&["west@a.example"]).await;
    let bundle = &west.known().await.bundles[0];
    assert_eq!((bundle.sequence, bundle.roots, bundle.refresh_hint), (1, 1, 1));
    assert_eq!(west.secrets.trust_domains(), [A, B]);

    // What is imported from b has b's identities, or is not taken.
    let mut s = service("reviews");
    s.service_accounts = vec!["spiffe://a.example/ns/books/sa/reviews".into()];
    let publish = |s: &ExportedService| {
        let doc = Document::new("books/reviews", s).unwrap();
        north
            .exports
            .publish_type(type_url::EXPORTED_SERVICE, BTreeMap::from([("books/reviews".into(), doc)]));
    };
    publish(&s);
    let start = Instant::now();
    let refusal = loop {
        if let Some(r) = west.known().await.clusters[0].refusals.first() {
            break r.clone();
        }
        assert!(start.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(refusal.contains("is not of trust domain b.example"), "{refusal}");
    assert!(west.imported().is_empty());
    s.service_accounts = vec!["spiffe://b.example/ns/books/sa/reviews".into()];
    publish(&s);
    while west.imported().is_empty() {
        assert!(start.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let peer = west.peers().remove(0);
    assert_eq!(peer.trust_domain, Some(TrustDomain::new(B).unwrap()));
}

/// North's CA starts again with other files, while everything else goes on.
async fn with_ca(north: &mut Cluster, change: impl FnOnce(&Path)) {
    change(&north.dir.path().join("ca"));
    // The old one lets go of its socket when its task has ended.
    let started = citadel(north.dir.path(), &north.options.cluster, B);
    north._citadel = started;
}

/// Waits until west holds a bundle of this sequence and this was said of the last one that it was told.
async fn held(west: &Cluster, sequence: u64, roots: u32, error: &str) {
    let start = Instant::now();
    loop {
        let b = west.known().await.bundles.remove(0);
        if (b.sequence, b.roots) == (sequence, roots)
            && b.error.contains(error)
            && b.error.is_empty() == error.is_empty()
        {
            return;
        }
        assert!(start.elapsed() < SOON, "{b:?} and not {sequence} {roots} {error:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_bundle_is_fetched_as_often_as_its_owner_hints_and_never_an_older_one() {
    let (west, east) = (Cluster::start_in("west", A).await, Cluster::start_in("east", A).await);
    let mut north = Cluster::start_in("north", B).await;
    west.found().await;
    east.try_join(&west.token().await).await.unwrap();
    north.found().await;
    north.federate(&west.token_for(B).await).await.unwrap();
    east.sees(&["west", "north@b.example"]).await;
    held(&west, 1, 1, "").await;

    let other = tempfile::tempdir().unwrap();
    let root = |name: &str| {
        let ca = citadel(&other.path().join(name), &ClusterId::new(name).unwrap(), B);
        ca.authority().found(&TrustDomain::new(B).unwrap()).unwrap().bundle_pem
    };
    for name in ["one", "two"] {
        std::fs::create_dir(other.path().join(name)).unwrap();
    }
    let (one, two) = (root("one"), root("two"));
    let first = std::fs::read_to_string(north.dir.path().join("ca/root-cert.pem")).unwrap();
    let roots = |ca: &Path, all: &str| std::fs::write(ca.join("root-cert.pem"), all).unwrap();
    let number = |ca: &Path| std::fs::read_to_string(ca.join("bundle-sequence")).unwrap();

    let connected = || async {
        let all = west.known().await.clusters;
        all.into_iter().find(|c| c.member.as_ref().unwrap().cluster == "north").unwrap().lease_age_ms.unwrap()
    };
    let begin = number(&north.dir.path().join("ca"));
    with_ca(&mut north, |ca| roots(ca, &(first.clone() + &one))).await;
    held(&west, 2, 2, "").await;
    held(&east, 2, 2, "").await;
    assert!(connected().await < 3000, "on the connection that there is");

    // A backup was restored: the roots of before under the number of before.
    with_ca(&mut north, |ca| {
        roots(ca, &first);
        std::fs::write(ca.join("bundle-sequence"), &begin).unwrap();
    })
    .await;
    held(&west, 2, 2, "sequence 1, and 2 is here").await;
    // It counts on from there, with others.
    with_ca(&mut north, |ca| roots(ca, &(first.clone() + &two))).await;
    held(&west, 2, 2, "other roots under the same sequence 2").await;
    with_ca(&mut north, |ca| roots(ca, &(first.clone() + &two + &one))).await;
    held(&west, 3, 3, "").await;
    // A root of a's in b's bundle: whoever holds it would speak for both.
    let ours = std::fs::read_to_string(west.dir.path().join("ca/root-cert.pem")).unwrap();
    with_ca(&mut north, |ca| roots(ca, &(first.clone() + &ours))).await;
    held(&west, 3, 3, "could speak for both").await;
    held(&east, 3, 3, "could speak for both").await;
    with_ca(&mut north, |ca| roots(ca, &first)).await;
    held(&east, 5, 1, "").await;
}
