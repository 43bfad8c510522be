//! Two control planes' CA and federation components, joined over real sockets.

#[path = "federation/domains.rs"]
mod domains;
#[path = "federation/rotation.rs"]
mod rotation;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use citadel::{Citadel, CitadelOptions};
use mesh_model::{
    ClusterId, NetworkId, TrustDomain,
    authored::{Kind, MembershipState, MeshMembership},
    federation::{
        Conflict, ConflictReason, EndpointGroup, ExportedService, GatewayAddress, ImportedService,
        LeaseState, PeerCluster, Transport, type_url,
    },
    registry::{Protocol, ServicePort},
};
use mesh_xds::{
    Endpoint, NodeInfo,
    client::channel,
    mcp::{ConfigClient, ConfigServer, Document},
};
use multicluster::{
    Federation, FederationOptions,
    admin_pb::{
        ClustersRequest, CreateTokenRequest, EvictRequest, ExportConflict, LeaveMeshRequest,
        PrepareJoinRequest, admin_client::AdminClient,
    },
    authority_pb::{FoundRequest, StatusRequest, authority_client::AuthorityClient},
    join::{JoinError, join, join_dialled},
    token::JoinToken,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

struct Cluster {
    dir: tempfile::TempDir,
    _citadel: Citadel,
    federation: Option<Federation>,
    options: FederationOptions,
    secrets: std::sync::Arc<mesh_identity::SecretStore>,
    exports: ConfigServer,
    imports: ConfigClient,
    stop: CancellationToken,
}

fn citadel(dir: &Path, cluster: &ClusterId, domain: &str) -> Citadel {
    Citadel::start(CitadelOptions {
        cluster: cluster.clone(),
        trust_domain: TrustDomain::new(domain).unwrap(),
        state_dir: dir.into(),
        socket: dir.join("citadel.sock"),
        workload_ttl: Duration::from_secs(86_400),
        audit_keep: 1,
        kubernetes: Default::default(),
        secrets: None,
    })
    .unwrap()
}

async fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

impl Cluster {
    async fn start(id: &str) -> Self {
        Self::start_in(id, TrustDomain::DEFAULT).await
    }

    async fn start_in(id: &str, domain: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        let cluster = ClusterId::new(id).unwrap();
        let citadel = citadel(dir.path(), &cluster, domain);
        let (secrets, _renewal) = citadel.control_plane_secrets(vec![]);
        let exports = ConfigServer::new();
        let stop = CancellationToken::new();
        let (server, socket, token) = (exports.clone(), at("pilot.sock"), stop.clone());
        tokio::spawn(async move { server.serve_unix(&socket, token).await.unwrap() });
        let listen = free_port().await;
        let options = FederationOptions {
            endpoints: multicluster::bundle::BundleEndpoints::default(),
            cluster,
            network: NetworkId::new(id).unwrap(),
            // The gateway only passes bytes through; here peers dial the component itself.
            gateways: vec![GatewayAddress { address: listen, weight: 1 }],
            transports: vec![Transport::Tcp],
            listen,
            via: None,
            state_dir: dir.path().into(),
            socket: at("federation.sock"),
            authority_socket: at("citadel.sock"),
            exports: Endpoint::Unix(at("pilot.sock")),
            debug_socket: None,
            declarations: Some(Endpoint::Unix(at("pilot.sock"))),
            refresh_hint: Duration::from_secs(1),
            renew_within: Duration::ZERO,
        };
        let federation = Federation::start(options.clone(), secrets.clone()).await.unwrap();
        let imports = ConfigClient::start(
            Endpoint::Unix(at("federation.sock")),
            NodeInfo::component("pilot"),
            &[type_url::IMPORTED_SERVICE, type_url::PEER_CLUSTER],
        );
        Self {
            _citadel: citadel,
            federation: Some(federation),
            options,
            secrets,
            exports,
            imports,
            stop,
            dir,
        }
    }

    async fn channel(&self, socket: &str) -> Channel {
        channel(&Endpoint::Unix(self.dir.path().join(socket))).await.unwrap()
    }

    async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel("federation.sock").await)
    }

    async fn found(&self) {
        let mut authority = AuthorityClient::new(self.channel("citadel.sock").await);
        authority.found(FoundRequest { trust_domain: String::new() }).await.unwrap();
    }

    async fn token(&self) -> JoinToken {
        let text = self.admin().await.create_token(CreateTokenRequest::default()).await.unwrap();
        JoinToken::parse(&text.into_inner().token, 0).unwrap()
    }

    async fn try_join(&self, token: &JoinToken) -> Result<(), JoinError> {
        let prepared =
            self.admin().await.prepare_join(PrepareJoinRequest::default()).await.unwrap().into_inner();
        let answer = join(token, prepared).await?;
        self.admin().await.complete_join(answer).await.unwrap();
        Ok(())
    }

    async fn in_mesh(&self) -> bool {
        let mut authority = AuthorityClient::new(self.channel("citadel.sock").await);
        authority.status(StatusRequest {}).await.unwrap().into_inner().state == "active"
    }

    fn export(&self, names: &[&str]) {
        let docs: BTreeMap<String, Document> = names
            .iter()
            .map(|n| {
                let name = format!("books/{n}");
                (name.clone(), Document::new(name, &service(n)).unwrap())
            })
            .collect();
        self.exports.publish_type(type_url::EXPORTED_SERVICE, docs);
    }

    /// What its configuration says of its membership.
    fn declare(&self, membership: &MeshMembership) {
        let doc = Document::new("mesh", membership).unwrap();
        self.exports.publish_type(Kind::ClusterEviction.type_url(), BTreeMap::new());
        self.exports
            .publish_type(Kind::MeshMembership.type_url(), BTreeMap::from([("mesh".to_owned(), doc)]));
    }

    /// Waits for a phase of what is declared, and answers why.
    async fn phase(&self, phase: &str) -> String {
        let start = Instant::now();
        loop {
            let r = self.admin().await.clusters(ClustersRequest {}).await.unwrap().into_inner();
            let declared = r.declared.unwrap_or_default();
            if declared.phase == phase {
                return declared.message;
            }
            assert!(start.elapsed() < SOON, "{declared:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn imported(&self) -> Vec<ImportedService> {
        self.imports.state().of(type_url::IMPORTED_SERVICE).map(|(_, d)| d.spec().unwrap()).collect()
    }

    fn peers(&self) -> Vec<PeerCluster> {
        self.imports.state().of(type_url::PEER_CLUSTER).map(|(_, d)| d.spec().unwrap()).collect()
    }

    fn summary(&self) -> Vec<(String, String, LeaseState)> {
        let mut all: Vec<_> =
            self.imported().into_iter().map(|i| (i.cluster.to_string(), i.service.name, i.lease)).collect();
        all.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        all
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn service(name: &str) -> ExportedService {
    ExportedService {
        name: name.into(),
        namespace: "books".into(),
        host: format!("{name}.books.svc.cluster.local"),
        ports: vec![ServicePort { name: "http".into(), port: 9080, protocol: Protocol::Http }],
        headless: false,
        groups: vec![EndpointGroup {
            labels: BTreeMap::new(),
            locality: String::new().into(),
            healthy_weight: 1,
            slots: vec![],
        }],
        service_accounts: vec![name.into()],
        exported_at: 1,
    }
}

async fn until(what: &str, limit: Duration, mut f: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !f() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    start.elapsed()
}

const SOON: Duration = Duration::from_secs(10);

fn live(cluster: &str, names: &[&str]) -> Vec<(String, String, LeaseState)> {
    names.iter().map(|n| (cluster.to_owned(), (*n).to_owned(), LeaseState::Live)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_clusters_join_exchange_and_leave() {
    let (west, mut east, north) =
        (Cluster::start("west").await, Cluster::start("east").await, Cluster::start("north").await);
    west.found().await;
    west.export(&["reviews"]);
    east.export(&["ratings", "reviews"]);
    north.export(&["details"]);
    east.try_join(&west.token().await).await.unwrap();
    until("west imports east", SOON, || west.summary() == live("east", &["ratings", "reviews"])).await;
    until("east imports west", SOON, || east.summary() == live("west", &["reviews"])).await;

    // The third member joins through west alone and meets east.
    north.try_join(&west.token().await).await.unwrap();
    until("east imports north", SOON, || east.summary().contains(&live("north", &["details"])[0])).await;
    until("north imports both", SOON, || north.imported().len() == 3 && north.peers().len() == 2).await;

    // A change and a withdrawal arrive.
    east.export(&["ratings"]);
    until("the withdrawal", SOON, || {
        west.summary() == [live("east", &["ratings"]), live("north", &["details"])].concat()
    })
    .await;

    // What was kept is at most a second old.
    let kept = east.dir.path().join("federation/imports/north.json");
    let has = || std::fs::read_to_string(&kept).is_ok_and(|text| text.contains("details"));
    until("east keeps north's services", SOON, has).await;

    // East's federation dies: its lease lapses everywhere, and nothing is deleted.
    east.federation = None;
    let took = until("the lapse", SOON, || {
        west.summary()[0] == ("east".into(), "ratings".into(), LeaseState::Lapsed)
    })
    .await;
    assert!(took < Duration::from_secs(4), "lapsed after {took:?}");
    east.federation = Some(Federation::start(east.options.clone(), east.secrets.clone()).await.unwrap());
    until("the return", SOON, || west.summary()[0].2 == LeaseState::Live).await;
    // The new process serves what the old one had kept.
    let kept = east.imported();
    assert!(kept.len() >= 2, "{kept:?}, {:?}", east.peers());

    // The founder does not leave the others without a root by accident.
    let refused = west.admin().await.leave(LeaveMeshRequest::default()).await.unwrap_err();
    assert!(refused.message().contains("root key") && west.in_mesh().await, "{refused:?}");

    let left = east.admin().await.leave(LeaveMeshRequest::default()).await.unwrap().into_inner();
    assert_eq!(left.peers.len(), 2);
    for p in &left.peers {
        assert_eq!((p.references, p.error.as_str()), (0, ""), "{}", p.cluster);
    }
    until("west forgot east", SOON, || {
        west.summary() == live("north", &["details"]) && west.peers().len() == 1
    })
    .await;
    until("north forgot east", SOON, || north.summary() == live("west", &["reviews"])).await;
    until("east forgot all", SOON, || east.imported().is_empty() && east.peers().is_empty()).await;
    assert!(!east.in_mesh().await);

    // And back in, under the same name.
    east.try_join(&west.token().await).await.unwrap();
    until("east is back", SOON, || west.summary().contains(&live("east", &["ratings"])[0])).await;
    let clusters = west.admin().await.clusters(ClustersRequest {}).await.unwrap().into_inner();
    assert_eq!(clusters.clusters.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_cluster_is_refused_until_it_joins_again() {
    let (west, east, north) =
        (Cluster::start("west").await, Cluster::start("east").await, Cluster::start("north").await);
    west.found().await;
    for c in [&west, &east, &north] {
        c.export(&["reviews"]);
    }
    east.try_join(&west.token().await).await.unwrap();
    north.try_join(&west.token().await).await.unwrap();
    until("all import all", SOON, || [&west, &east, &north].iter().all(|c| c.imported().len() == 2)).await;

    let evict = |cluster: &str| EvictRequest { cluster: cluster.into() };
    let unknown = east.admin().await.evict(evict("nowhere")).await.unwrap_err();
    assert!(unknown.message().contains("no cluster nowhere is or was a member"), "{}", unknown.message());
    let itself = east.admin().await.evict(evict("east")).await.unwrap_err();
    assert!(itself.message().contains("leave-cluster"), "{}", itself.message());

    // Any member may say so, and it spreads.
    let answer = east.admin().await.evict(evict("north")).await.unwrap().into_inner();
    assert_eq!((answer.changed, answer.imported_services, answer.told), (true, 1, vec!["west".to_owned()]));
    assert_eq!(east.summary(), live("west", &["reviews"]), "at once, where it was said");
    until("west heard of it", SOON, || {
        west.summary() == live("east", &["reviews"]) && west.peers().len() == 1
    })
    .await;

    // North still has its certificate and still believes to be a member: it is told why it is none.
    let start = Instant::now();
    loop {
        let r = north.admin().await.clusters(ClustersRequest {}).await.unwrap().into_inner();
        if r.clusters.iter().all(|c| c.last_error.contains("cluster north was evicted from this mesh")) {
            break;
        }
        assert!(start.elapsed() < SOON, "{:?}", r.clusters);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let listed = west.admin().await.clusters(ClustersRequest {}).await.unwrap().into_inner();
    assert_eq!((listed.clusters.len(), listed.evicted), (1, vec!["north".to_owned()]));
    assert_eq!(west.summary(), live("east", &["reviews"]), "and it has not come back by dialling");

    // It gives up, and joins again with a new token.
    north.admin().await.leave(LeaveMeshRequest { force: true, ..LeaveMeshRequest::default() }).await.unwrap();
    north.try_join(&west.token().await).await.unwrap();
    until("north is back", SOON, || [&west, &east, &north].iter().all(|c| c.imported().len() == 2)).await;
    let listed = east.admin().await.clusters(ClustersRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.evicted, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exporter_hears_that_its_definition_is_not_used() {
    let (west, east) = (Cluster::start("west").await, Cluster::start("east").await);
    west.found().await;
    west.export(&["reviews"]);
    east.export(&["reviews"]);
    east.try_join(&west.token().await).await.unwrap();
    until("west imports east", SOON, || west.summary() == live("east", &["reviews"])).await;
    let found = |all: &[&str]| {
        let docs = all.iter().map(|name| {
            let conflict = Conflict {
                namespace: "books".into(),
                name: (*name).into(),
                loser: ClusterId::new("east").unwrap(),
                winner: ClusterId::new("west").unwrap(),
                reason: ConflictReason::Port,
                message: "port http here is 80 (http)".into(),
            };
            let name = format!("books/{name}.east");
            (name.clone(), Document::new(name, &conflict).unwrap())
        });
        west.exports.publish_type(type_url::CONFLICT, docs.collect());
    };
    let heard = async || {
        let all = east.admin().await.clusters(ClustersRequest {}).await.unwrap().into_inner().conflicts;
        let line = |c: ExportConflict| {
            let it = c.conflict.unwrap();
            format!("{}/{} {} {} {:?}", it.namespace, it.name, it.reason, it.winner, c.reported_by)
        };
        all.into_iter().map(line).collect::<Vec<_>>()
    };
    // What east does not export it hears nothing of.
    found(&["reviews", "secret"]);
    let expected = ["books/reviews PortConflict west [\"west\"]"];
    for expected in [&expected[..], &[]] {
        let start = Instant::now();
        while heard().await != expected {
            assert!(start.elapsed() < SOON, "{:?}", heard().await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        found(&[]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_declared_join_goes_on_where_it_was_interrupted() {
    let (west, mut east, third) =
        (Cluster::start("west").await, Cluster::start("east").await, Cluster::start("third").await);
    west.found().await;
    let token = west.token().await;
    // The answer to this was lost, and then the component was restarted.
    let prepared = east.admin().await.prepare_join(PrepareJoinRequest::default()).await.unwrap().into_inner();
    join(&token, prepared).await.unwrap();
    east.federation = None;
    let address = east.options.listen;
    until("the old one ends", SOON, || std::net::TcpListener::bind(address).is_ok()).await;
    east.federation = Some(Federation::start(east.options.clone(), east.secrets.clone()).await.unwrap());

    let file = west.dir.path().join("token");
    std::fs::write(&file, token.encode()).unwrap();
    let wanted = MeshMembership { token_file: file.display().to_string(), ..MeshMembership::default() };
    east.declare(&wanted);
    east.phase("joined").await;
    assert!(east.in_mesh().await);
    until("they meet", SOON, || east.peers().len() == 1 && west.peers().len() == 1).await;

    // Another cluster's attempt with it is an error, which names the field.
    third.declare(&wanted);
    let why = third.phase("failed").await;
    assert!(why.starts_with("spec.tokenFile: ") && why.contains("already used by cluster east"), "{why}");

    // A member does not go over to another mesh because its file has another token.
    third.declare(&MeshMembership { token_file: String::new(), ..MeshMembership::default() });
    third.found().await;
    third.phase("joined").await;
    std::fs::write(&file, third.token().await.encode()).unwrap();
    east.declare(&MeshMembership { force: true, state: MembershipState::Joined, ..wanted.clone() });
    let why = east.phase("failed").await;
    assert!(why.contains("of another mesh") && why.contains("set state: left first"), "{why}");
    assert_eq!(east.peers().len(), 1);
}

/// Re-encodes a token with one field changed, as somebody who knows the format would.
fn forge(token: &JoinToken, field: &str, value: serde_json::Value) -> JoinToken {
    let mut json = serde_json::to_value(token).unwrap();
    json[field] = value;
    let forged: JoinToken = serde_json::from_value(json).unwrap();
    JoinToken::parse(&forged.encode(), 0).unwrap()
}

/// The request that let a cluster in, sent once more with the same token: the answer may have been lost, but who left or
/// was evicted since needs a new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_join_that_is_replayed_brings_nobody_back() {
    let (west, east) = (Cluster::start("west").await, Cluster::start("east").await);
    west.found().await;
    let token = west.token().await;
    let prepared = east.admin().await.prepare_join(PrepareJoinRequest::default()).await.unwrap().into_inner();
    join(&token, prepared.clone()).await.unwrap();
    let answer = join(&token, prepared.clone()).await.expect("the answer was lost");
    east.admin().await.complete_join(answer).await.unwrap();
    until("east is there", SOON, || east.peers().len() == 1 && west.peers().len() == 1).await;

    west.admin().await.evict(EvictRequest { cluster: "east".into() }).await.unwrap();
    let why = join(&token, prepared.clone()).await.unwrap_err().to_string();
    assert!(why.contains("already used by cluster east"), "{why}");
    assert!(west.peers().is_empty());

    // A new token lets the same key in again, and its answer may be lost as well.
    let token = west.token().await;
    join(&token, prepared.clone()).await.unwrap();
    join(&token, prepared).await.expect("the answer was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn misused_tokens_change_nothing() {
    let (west, east, other) =
        (Cluster::start("west").await, Cluster::start("east").await, Cluster::start("other").await);
    west.found().await;
    other.found().await;
    let token = west.token().await;

    let wrong_pin = forge(&token, "pin", serde_json::json!("00".repeat(32)));
    let err = east.try_join(&wrong_pin).await.unwrap_err();
    assert!(matches!(err, JoinError::Impostor(_)), "{err}");
    assert!(err.to_string().contains("another mesh"), "{err}");

    // The token of another mesh, pointed at west: the pin tells.
    let foreign = other.token().await;
    let redirected = forge(&foreign, "gateways", serde_json::json!([west.options.listen]));
    let err = east.try_join(&redirected).await.unwrap_err();
    assert!(err.to_string().contains("another mesh"), "{err}");

    // One that keeps west's pin but another secret, or an unknown id.
    let secret = serde_json::to_value(&foreign).unwrap()["secret"].clone();
    for forged in [forge(&token, "secret", secret), forge(&token, "id", serde_json::json!("000000000000"))] {
        let err = east.try_join(&forged).await.unwrap_err();
        assert!(err.to_string().contains("not known here"), "{err}");
    }

    // A longer life written into it does not help: the issuer knows when it ends.
    let short = west
        .admin()
        .await
        .create_token(CreateTokenRequest { ttl: 1, ..CreateTokenRequest::default() })
        .await
        .unwrap()
        .into_inner();
    let short = JoinToken::parse(&short.token, 0).unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert!(JoinToken::parse(&short.encode(), short.expires + 1).is_err(), "refused before dialling");
    let err = east.try_join(&forge(&short, "expires", serde_json::json!(u64::MAX))).await.unwrap_err();
    assert!(err.to_string().contains("has expired"), "{err}");

    assert!(!east.in_mesh().await, "nothing changed in the newcomer");
    assert!(west.peers().is_empty(), "nothing changed in the member");

    // The right one works, and only once.
    east.try_join(&token).await.unwrap();
    let third = Cluster::start("third").await;
    let err = third.try_join(&token).await.unwrap_err();
    assert!(err.to_string().contains("already used by cluster east"), "{err}");
    assert!(!third.in_mesh().await);
    // A name that is taken.
    let twin = Cluster::start("east").await;
    let err = twin.try_join(&west.token().await).await.unwrap_err();
    assert!(err.to_string().contains("already a member"), "{err}");
    assert_eq!(west.peers().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn state_files_are_private() {
    use std::os::unix::fs::PermissionsExt;
    fn check(dir: &Path) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            let path = entry.path();
            if path.is_dir() {
                assert_eq!(mode, 0o700, "{}", path.display());
                check(&path);
            } else {
                assert_eq!(mode, 0o600, "{}", path.display());
            }
        }
    }
    let (west, east) = (Cluster::start("west").await, Cluster::start("east").await);
    west.found().await;
    east.export(&["ratings"]);
    east.try_join(&west.token().await).await.unwrap();
    until("an import", SOON, || !west.imported().is_empty()).await;
    check(west.dir.path());
    check(east.dir.path());
}

/// Strangers connect where a newcomer waits: none of them gets the secret, and none keeps the member out.
#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_that_waits_meets_strangers_before_the_member() {
    let (west, other, east) =
        (Cluster::start("west").await, Cluster::start("other").await, Cluster::start("east").await);
    west.found().await;
    other.found().await;
    let request = CreateTokenRequest { dials: true, ..CreateTokenRequest::default() };
    let text = west.admin().await.create_token(request).await.unwrap().into_inner().token;
    let token = JoinToken::parse(&text, 0).unwrap();
    let err = east.try_join(&token).await.unwrap_err();
    assert!(err.to_string().contains("--accept"), "{err}");

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let wait = async |limit| {
        let prepared =
            east.admin().await.prepare_join(PrepareJoinRequest::default()).await.unwrap().into_inner();
        join_dialled(&token, &listener, limit, prepared).await
    };
    let lead = async |to: std::net::SocketAddr| {
        let mut a = tokio::net::TcpStream::connect(at).await.unwrap();
        let mut b = tokio::net::TcpStream::connect(to).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut a, &mut b).await;
    };
    let err = wait(Duration::from_millis(200)).await.unwrap_err();
    assert!(err.to_string().contains("nobody has connected"), "{err}");
    let _silent = tokio::net::TcpStream::connect(at).await.unwrap();
    // A member of another mesh.
    let (answer, ()) = tokio::join!(wait(Duration::from_secs(1)), lead(other.options.listen));
    let err = answer.unwrap_err();
    assert!(matches!(err, JoinError::NotDialled { .. }) && err.to_string().contains("another mesh"), "{err}");

    let _silent = tokio::net::TcpStream::connect(at).await.unwrap();
    let member = async {
        lead(other.options.listen).await;
        lead(west.options.listen).await;
    };
    let (answer, ()) = tokio::join!(wait(Duration::from_secs(20)), member);
    east.admin().await.complete_join(answer.unwrap()).await.unwrap();
    assert!(east.in_mesh().await);
}
