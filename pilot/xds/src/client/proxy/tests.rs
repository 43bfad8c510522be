use std::{
    net::SocketAddr,
    sync::{Arc, RwLock},
};

use mesh_model::proxy::{self as model, Discovery, NetworkFilter, RouteSource};
use tokio::net::TcpListener;
use tonic::Status;

use super::*;
use crate::{
    NodeInfo, TypeSnapshot,
    client::{Endpoint, Mode},
    codec, pb,
    server::{AdsService, PeerInfo, ResourceSource, conn},
    type_url::{ECDS, EDS, SDS},
};

mod foreign;
mod on_demand;

/// A control plane with resources that a test sets.
struct Fixed {
    types: RwLock<BTreeMap<String, Arc<TypeSnapshot>>>,
    changes: watch::Sender<u64>,
}

impl ResourceSource for Fixed {
    fn snapshot(&self, _: &NodeInfo, t: &str) -> Arc<TypeSnapshot> {
        self.types.read().unwrap().get(t).cloned().unwrap_or_default()
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
    fn authorize(&self, _: &PeerInfo, node: &NodeInfo) -> Result<(), Status> {
        if node.id.contains("intruder") { Err(Status::permission_denied("no")) } else { Ok(()) }
    }
}

impl Fixed {
    fn set(&self, types: &[(&str, Vec<(String, pb::Any)>)]) {
        for (t, r) in types {
            let snapshot = Arc::new(TypeSnapshot::build(r.clone()));
            self.types.write().unwrap().insert((*t).to_owned(), snapshot);
        }
        self.changes.send_modify(|v| *v += 1);
    }
}

fn listener(route: &str) -> (String, pb::Any) {
    let mut l = crate::codec::tests::listener();
    l.filter_chains.truncate(1);
    l.default_filter_chain = None;
    for f in &mut l.filter_chains[0].filters {
        if let NetworkFilter::Http(h) = f {
            h.routes = RouteSource::Rds(route.into());
        }
    }
    (l.name.clone(), codec::encode_listener(&l))
}

fn route(name: &str, to: &str) -> (String, pb::Any) {
    let action = model::RouteAction::Forward(Box::new(model::Forward {
        clusters: vec![model::WeightedCluster::only(to)],
        ..Default::default()
    }));
    let r = RouteConfiguration {
        name: name.into(),
        virtual_hosts: vec![model::VirtualHost {
            name: "v".into(),
            domains: vec!["*".into()],
            require_tls: false,
            attempt_count: false,
            routes: vec![model::Route {
                name: String::new(),
                matches: model::RouteMatch::any(),
                action,
                request_headers: Default::default(),
                response_headers: Default::default(),
                fault: None,
                cors: None,
                operation: String::new(),
                filters: Default::default(),
            }],
            request_headers: Default::default(),
            response_headers: Default::default(),
            filters: Default::default(),
        }],
        on_demand: None,
    };
    (name.into(), codec::encode_route(&r))
}

fn cluster(name: &str) -> (String, pb::Any) {
    let mut c = crate::codec::tests::cluster();
    c.name = name.into();
    c.discovery = Discovery::Eds(name.into());
    (name.into(), codec::encode_cluster(&c))
}

fn endpoints(name: &str) -> (String, pb::Any) {
    let a = LoadAssignment { name: name.into(), localities: vec![], overprovisioning: 140 };
    (name.into(), codec::encode_endpoints(&a))
}

async fn serve() -> (SocketAddr, Arc<Fixed>, AdsService<Fixed>, CancellationToken) {
    let source = Arc::new(Fixed { types: RwLock::default(), changes: watch::Sender::new(0) });
    let service = AdsService::new(source.clone());
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = tcp.local_addr().unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service.until(stop.clone()))
            .serve_with_incoming_shutdown(Box::pin(conn::tcp(tcp)), stop.clone().cancelled_owned()),
    );
    (addr, source, service, stop)
}

fn options(addr: SocketAddr, mode: Mode, cache: Option<PathBuf>) -> ProxyClientOptions {
    let node = NodeInfo::component("proxy");
    ProxyClientOptions {
        client: ClientOptions { endpoint: Endpoint::Plain(addr.to_string()), node, mode },
        cache,
        name_table: false,
        fixed: None,
        on_demand: Default::default(),
    }
}

async fn until<T: Clone + Send + Sync + 'static>(
    rx: &mut watch::Receiver<T>,
    what: &str,
    f: impl FnMut(&T) -> bool,
) -> T {
    tokio::time::timeout(Duration::from_secs(10), rx.wait_for(f))
        .await
        .unwrap_or_else(|_| panic!("timed out: {what}"))
        .unwrap()
        .clone()
}

#[tokio::test]
async fn states_are_complete_in_both_variants() {
    for mode in [Mode::Delta, Mode::Sotw] {
        let (addr, source, service, stop) = serve().await;
        source.set(&[
            (CDS, vec![cluster("a")]),
            (EDS, vec![endpoints("a"), endpoints("unreferenced")]),
            (LDS, vec![listener("80")]),
            (RDS, vec![route("80", "a"), route("unreferenced", "a")]),
        ]);
        let client = ProxyClient::start(options(addr, mode, None));
        let mut rx = client.state();
        let s = until(&mut rx, "first state", |s| !s.listeners.is_empty()).await;
        assert_eq!(s.routes.keys().collect::<Vec<_>>(), ["80"]);
        assert_eq!(s.endpoints.keys().collect::<Vec<_>>(), ["a"]);

        // Every state on the way to the next one is complete as well.
        source.set(&[
            (CDS, vec![cluster("b")]),
            (EDS, vec![endpoints("b")]),
            (LDS, vec![listener("81")]),
            (RDS, vec![route("81", "b")]),
        ]);
        loop {
            rx.changed().await.unwrap();
            let s = rx.borrow_and_update().clone();
            for c in s.clusters.values() {
                assert!(s.endpoints.contains_key(eds_name(c).unwrap()), "{mode:?}: {}", c.name);
            }
            for l in s.listeners.values() {
                for r in routes_of(l) {
                    assert!(s.routes.contains_key(r), "{mode:?}: {r}");
                }
            }
            if s.routes.contains_key("81") && s.clusters.len() == 1 && s.clusters.contains_key("b") {
                break;
            }
        }
        let mut health = client.health();
        until(&mut health, "health", |h| h.connected && h.synced && h.rejected.is_empty()).await;
        let clients = service.status().clients();
        assert_eq!(clients.len(), 1);
        stop.cancel();
        until(&mut health, "disconnect", |h| !h.connected).await;
        assert!(!client.state().borrow().listeners.is_empty(), "the last state stays");
    }
}

#[tokio::test]
async fn a_bad_resource_is_rejected_alone_and_by_name() {
    let (addr, source, service, _stop) = serve().await;
    let broken = |name: &str| {
        let c = envoy_types::pb::envoy::config::cluster::v3::Cluster {
            name: name.into(),
            lb_policy: 7,
            ..Default::default()
        };
        let value = prost::Message::encode_to_vec(&c).into();
        (name.to_owned(), pb::Any { type_url: CDS.into(), value })
    };
    source.set(&[
        (CDS, vec![cluster("a"), broken("bad")]),
        (EDS, vec![endpoints("a")]),
        (LDS, vec![listener("80")]),
        (RDS, vec![route("80", "a")]),
    ]);
    let client = ProxyClient::start(options(addr, Mode::Delta, None));
    let s = until(&mut client.state(), "state", |s| !s.listeners.is_empty()).await;
    assert_eq!(s.clusters.keys().collect::<Vec<_>>(), ["a"]);
    let h = until(&mut client.health(), "rejection", |h| !h.rejected.is_empty()).await;
    assert!(h.rejected[&(CDS.to_owned(), "bad".to_owned())].contains("lb_policy"), "{h:?}");
    // The server knows, by name.
    tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            let clients = service.status().clients();
            if let Some(t) = clients.first().and_then(|c| c.types.get(CDS))
                && t.state() == "NACKED"
            {
                assert!(t.error.as_ref().unwrap().contains("bad: lb_policy"), "{t:?}");
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    // A good version clears it.
    source.set(&[(CDS, vec![cluster("a"), cluster("bad")]), (EDS, vec![endpoints("a"), endpoints("bad")])]);
    until(&mut client.health(), "recovery", |h| h.rejected.is_empty()).await;
    until(&mut client.state(), "cluster", |s| s.clusters.contains_key("bad")).await;
}

#[tokio::test]
async fn a_proxy_starts_from_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state/xds.bin");
    let (addr, source, _, stop) = serve().await;
    source.set(&[
        (CDS, vec![cluster("a")]),
        (EDS, vec![endpoints("a")]),
        (LDS, vec![listener("80")]),
        (RDS, vec![route("80", "a")]),
    ]);
    let client = ProxyClient::start(options(addr, Mode::Delta, Some(file.clone())));
    let state = until(&mut client.state(), "state", |s| !s.listeners.is_empty()).await;
    tokio::time::timeout(Duration::from_secs(10), async {
        while !file.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    drop(client);
    stop.cancel();

    // Nobody answers.
    let client = ProxyClient::start(options(addr, Mode::Delta, Some(file.clone())));
    let again = until(&mut client.state(), "state from the file", |s| !s.listeners.is_empty()).await;
    assert_eq!(state, again);
    assert!(client.health().borrow().from_cache);
    drop(client);

    // A damaged file is no reason not to start.
    std::fs::write(&file, b"flotilla-xds-1\n\xff\xff\xff").unwrap();
    let client = ProxyClient::start(options(addr, Mode::Delta, Some(file)));
    assert!(client.state().borrow().listeners.is_empty());
}

#[tokio::test]
async fn settings_of_the_process_are_told_in_both_variants_and_kept() {
    for mode in [Mode::Delta, Mode::Sotw] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("xds.bin");
        let (addr, source, service, stop) = serve().await;
        let said = |n| ProcessSettings { concurrency: Some(n), ..ProcessSettings::default() };
        let say = |n| {
            source.set(&[(PROXY_CONFIG, vec![(process::NAME.to_owned(), process::encode(&said(n)))])]);
        };
        let client = ProxyClient::start(options(addr, mode, Some(file.clone())));
        let mut told = client.process();
        // A control plane that knows nothing of it has answered as well: nobody waits for more.
        let first = until(&mut told, "an answer", Option::is_some).await;
        assert_eq!(first, Some(ProcessSettings::default()), "{mode:?}");
        for n in [3, 0] {
            say(n);
            until(&mut told, "what is said", |p| *p == Some(said(n))).await;
        }
        // What cannot be read changes nothing, and is refused by name.
        let bad = pb::Any { value: vec![0xff].into(), ..process::encode(&said(1)) };
        source.set(&[(PROXY_CONFIG, vec![(process::NAME.to_owned(), bad)])]);
        let refused = (PROXY_CONFIG.to_owned(), process::NAME.to_owned());
        until(&mut client.health(), "a refusal", |h| h.rejected.contains_key(&refused)).await;
        assert_eq!(*told.borrow(), Some(said(0)));
        say(4);
        until(&mut told, "a good one again", |p| *p == Some(said(4))).await;
        let acknowledged = async {
            while kept_process(&file) != Some(said(4)) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), acknowledged).await.expect("it is kept");
        drop((client, service));
        stop.cancel();
        let client = ProxyClient::start(options(addr, mode, Some(file)));
        assert_eq!(*client.process().borrow(), Some(said(4)), "at once, from the file");
    }
}

#[tokio::test]
async fn who_is_not_authorised_gets_nothing() {
    let (addr, source, service, _stop) = serve().await;
    source.set(&[(CDS, vec![cluster("a")])]);
    let mut o = options(addr, Mode::Delta, None);
    o.client.node = NodeInfo::component("intruder");
    let client = ProxyClient::start(o);
    let mut health = client.health();
    let _ = tokio::time::timeout(Duration::from_millis(300), health.wait_for(|h| h.connected)).await;
    assert!(!client.health().borrow().synced);
    assert_eq!(service.status().connected(), 0);
}

/// Takes reports of gateways and passes them on.
struct Heard(tokio::sync::mpsc::UnboundedSender<usize>);

impl crate::links::LinkSink for Heard {
    fn report(
        &self,
        _: &crate::server::PeerInfo,
        _: NodeInfo,
        peers: Vec<crate::links::PeerLink>,
    ) -> Result<(), tonic::Status> {
        self.0.send(peers.len()).map_err(|e| tonic::Status::internal(e.to_string()))
    }
}

/// A control plane has memory for one connection of each proxy: whatever else a proxy says goes over that.
#[tokio::test]
async fn reports_go_over_the_connection_of_the_stream() {
    use futures::StreamExt as _;
    let source = Arc::new(Fixed { types: RwLock::default(), changes: watch::Sender::new(0) });
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = tcp.local_addr().unwrap();
    let stop = CancellationToken::new();
    let (to, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let accepted = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counting = accepted.clone();
    let incoming = conn::tcp(tcp).inspect(move |_| {
        counting.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    });
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(AdsService::new(source).until(stop.clone()))
            .add_service(crate::links::LinkService::new(Arc::new(Heard(to))))
            .serve_with_incoming_shutdown(Box::pin(incoming), stop.clone().cancelled_owned()),
    );
    let client = ProxyClient::start(options(addr, Mode::Delta, None));
    let mut connection = client.connection();
    for n in 0..3 {
        let channel = connection.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        let peers = vec![crate::links::PeerLink::default(); n];
        let node = NodeInfo::component("gateway");
        assert!(crate::links::report(channel, &node, peers).await.unwrap());
        assert_eq!(heard.recv().await, Some(n));
    }
    assert_eq!(accepted.load(std::sync::atomic::Ordering::SeqCst), 1);
    stop.cancel();
    let gone = tokio::time::timeout(Duration::from_secs(10), connection.wait_for(Option::is_none)).await;
    assert!(gone.unwrap().is_ok(), "no call is made on a connection that has ended");
}

struct Whatever;

impl Handler for Whatever {
    fn on_update(&mut self, _: &str, _: Update) -> Result<(), Vec<Rejection>> {
        Ok(())
    }
}

/// All subscriptions wait for the stream together; one more than there was room for, and it never opened.
#[tokio::test]
async fn a_client_subscribes_to_as_many_types_as_a_server_takes() {
    use crate::server::state::MAX_TYPES;
    let (addr, _, service, stop) = serve().await;
    let types: Vec<String> = (0..MAX_TYPES).map(|n| format!("type.googleapis.com/test.T{n}")).collect();
    let initial: Vec<_> = types.iter().map(|t| (t.as_str(), Names::All)).collect();
    let endpoint = Endpoint::Plain(addr.to_string());
    let options = ClientOptions { endpoint, node: NodeInfo::component("test"), mode: Mode::Delta };
    let _client = AdsClient::start(options, &initial, |_| Whatever);
    let board = service.status();
    let all = async {
        while board.clients().iter().map(|c| c.types.len()).max() != Some(MAX_TYPES) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all).await.expect("every type is subscribed to");
    stop.cancel();
}
