use std::collections::BTreeMap;

use axum::body::Body;
use mesh_model::{
    federation::type_url,
    proxy::{EndpointHealth, OWN_GATEWAYS},
};
use mesh_xds::{
    Endpoint, NodeInfo, NodeKind,
    client::{
        ClientOptions, Mode,
        proxy::{ProxyClient, ProxyClientOptions, ProxyState},
    },
    mcp::ConfigClient,
};
use serde_json::{Value, json};

use crate::{WORKLOAD, documents, plane, sidecar, until, workload};

const REVIEWS: &str = "outbound|9080||reviews.books.svc.cluster.local";

fn client(xds: std::net::SocketAddr, node: NodeInfo, mode: Mode) -> ProxyClient {
    ProxyClient::start(ProxyClientOptions {
        client: ClientOptions { endpoint: Endpoint::Plain(xds.to_string()), node, mode },
        cache: None,
        name_table: true,
        fixed: None,
        on_demand: Default::default(),
    })
}

async fn page(router: axum::Router, path: &str) -> (u16, Value) {
    let request = axum::http::Request::get(path).body(Body::empty()).unwrap();
    let response = tower::ServiceExt::oneshot(router, request).await.unwrap();
    let status = response.status().as_u16();
    let bytes = axum::body::to_bytes(response.into_body(), 10_000_000).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

fn import(lease: &str) -> Value {
    json!({"cluster": "east", "lease": lease, "service": {
        "name": "reviews", "namespace": "books", "host": "reviews.books.svc.cluster.local",
        "ports": [{"name": "http", "port": 9080, "protocol": "http"}],
        "groups": [{"labels": {"app": "reviews"}, "locality": "", "healthyWeight": 2}],
        "serviceAccounts": [], "exportedAt": 5, "slots": 1}})
}

#[tokio::test]
async fn changes_reach_proxies() {
    let plane = plane().await;
    until(&mut plane.pilot.ready(), "readiness", |r| *r).await;
    for mode in [Mode::Delta, Mode::Sotw] {
        let proxy = client(plane.xds, sidecar("127.10.0.1", "productpage", &[]), mode);
        let mut state = proxy.state();
        let s = until(&mut state, "configuration", |s| s.listeners.contains_key("virtualInbound")).await;
        assert_eq!(s.endpoints[REVIEWS].localities[0].endpoints.len(), 1);
        assert!(s.routes.contains_key("9080"));
        let names = until(&mut proxy.names(), "names", |n| !n.table.is_empty()).await;
        assert!(names.table.contains_key("reviews.books.svc.cluster.local"));

        // A workload comes.
        let name = "books/reviews-v1b";
        let doc = documents(&[(WORKLOAD, name, workload("127.10.0.6", "reviews"))])
            .remove(WORKLOAD)
            .and_then(|mut m| m.remove(name));
        plane.galley.update(WORKLOAD, [(name.to_owned(), doc)]);
        until(&mut state, "a second endpoint", |s| {
            s.endpoints.get(REVIEWS).is_some_and(|e| e.localities[0].endpoints.len() == 2)
        })
        .await;

        // A peer comes, and its lease lapses.
        let publish = |lease: &str| {
            let t = type_url::IMPORTED_SERVICE;
            plane.federation.publish(documents(&[(t, "east/books/reviews", import(lease))]));
        };
        publish("live");
        until(&mut state, "remote endpoints", |s| {
            let remote =
                |e: &mesh_model::proxy::LbEndpoint| e.transport_labels.contains_key("flotilla.dev/cluster");
            s.endpoints
                .get(REVIEWS)
                .is_some_and(|e| e.localities.iter().flat_map(|l| &l.endpoints).any(remote))
        })
        .await;
        publish("lapsed");
        until(&mut state, "demotion", |s| {
            s.endpoints.get(REVIEWS).is_some_and(|e| e.localities.iter().any(|l| l.priority == 1))
        })
        .await;

        // Both go.
        plane.federation.publish(BTreeMap::from([(type_url::IMPORTED_SERVICE.to_owned(), BTreeMap::new())]));
        plane.galley.update(WORKLOAD, [(name.to_owned(), None)]);
        until(&mut state, "the first state", |s| {
            s.endpoints
                .get(REVIEWS)
                .is_some_and(|e| e.localities.len() == 1 && e.localities[0].endpoints.len() == 1)
        })
        .await;
    }
}

#[tokio::test]
async fn settings_of_processes_reach_those_who_ask() {
    const CONFIG: &str = "networking.istio.io/v1beta1/ProxyConfig";
    let plane = plane().await;
    until(&mut plane.pilot.ready(), "readiness", |r| *r).await;
    let own = ("PROXY_CONFIG", json!({"statusPort": 15099}));
    for (threads, mode) in [(3, Mode::Delta), (4, Mode::Sotw)] {
        let proxy = client(plane.xds, sidecar("127.10.0.1", "productpage", std::slice::from_ref(&own)), mode);
        let mut told = proxy.process();
        let said = until(&mut told, "an answer", Option::is_some).await.unwrap();
        assert_eq!((said.concurrency, said.status_port), (None, Some(15099)), "{mode:?}");
        let document = documents(&[(CONFIG, "books/p", json!({"concurrency": threads}))])
            .remove(CONFIG)
            .and_then(|mut m| m.remove("books/p"));
        plane.galley.update(CONFIG, [("books/p".to_owned(), document)]);
        let said = |p: &Option<mesh_xds::process::ProcessSettings>| p.and_then(|p| p.concurrency);
        until(&mut told, "what is said", |p| said(p) == Some(threads)).await;
        plane.galley.update(CONFIG, [("books/p".to_owned(), None)]);
        until(&mut told, "silence", |p| said(p).is_none()).await;
    }
}

#[tokio::test]
async fn operators_see_what_proxies_have() {
    let plane = plane().await;
    until(&mut plane.pilot.ready(), "readiness", |r| *r).await;
    let proxy = client(plane.xds, sidecar("127.10.0.1", "productpage", &[]), Mode::Delta);
    until(&mut proxy.state(), "configuration", |s| !s.listeners.is_empty()).await;
    let router = plane.pilot.debug_router();
    let mut synced = Value::Null;
    for _ in 0..200 {
        synced = page(router.clone(), "/debug/syncz").await.1;
        if synced[0]["types"]["RDS"]["status"] == "SYNCED" && synced[0]["types"]["LDS"]["status"] == "SYNCED"
        {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(synced[0]["proxy"], "productpage-v1.books", "{synced}");
    assert_eq!(synced[0]["cluster_id"], "west");
    assert_eq!(synced[0]["types"]["CDS"]["status"], "SYNCED");

    let (status, dump) = page(router.clone(), "/debug/config_dump?proxyID=productpage-v1.books").await;
    assert_eq!(status, 200);
    assert!(dump["clusters"].as_array().unwrap().iter().any(|c| c["name"] == REVIEWS));
    assert_eq!(page(router.clone(), "/debug/config_dump?proxyID=nobody.books").await.0, 404);
    let (_, registry) = page(router.clone(), "/debug/registryz").await;
    assert!(
        registry
            .as_array()
            .unwrap()
            .iter()
            .any(|e| e["service"]["host"] == "reviews.books.svc.cluster.local")
    );
    for path in ["/ready", "/debug/endpointz", "/debug/configz", "/debug/problems"] {
        assert_eq!(page(router.clone(), path).await.0, 200, "{path}");
    }
    let mut registry = prometheus_client::registry::Registry::default();
    plane.pilot.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains("pilot_xds 1\n"), "{text}");
    assert!(text.contains("pilot_xds_pushes_total "), "{text}");
}

#[tokio::test]
async fn exports_are_published() {
    let plane = plane().await;
    let socket = plane.dir.path().join("pilot.sock");
    let reader = ConfigClient::start(
        Endpoint::Unix(socket),
        NodeInfo::component("federation"),
        &[type_url::EXPORTED_SERVICE],
    );
    let s = until(&mut reader.watch(), "exports", |s| s.of(type_url::EXPORTED_SERVICE).count() == 1).await;
    let e: mesh_model::federation::ExportedService =
        s.documents[type_url::EXPORTED_SERVICE]["books/reviews"].spec().unwrap();
    assert_eq!(e.groups[0].healthy_weight, 1);
    plane.pilot.shutdown().await;
}

#[tokio::test]
async fn nobody_is_served_before_configuration_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let pilot = pilot::Pilot::start(pilot::PilotOptions {
        settings: crate::settings(),
        galley: Endpoint::Unix(dir.path().join("absent.sock")),
        federation: None,
        consul: None,
        export_socket: None,
        state_dir: None,
    })
    .unwrap();
    assert!(!*pilot.ready().borrow());
    let service = pilot.ads_service();
    let peer = mesh_xds::PeerInfo::plain(mesh_xds::server::Transport::Unix, None);
    let node = sidecar("127.10.0.1", "productpage", &[]);
    let e = mesh_xds::ResourceSource::authorize(&**service.source(), &peer, &node).unwrap_err();
    assert_eq!(e.code(), tonic::Code::Unavailable);
    assert_eq!(page(pilot.debug_router(), "/ready").await.0, 503);
}

#[tokio::test]
async fn a_gateway_that_drains_is_known_until_it_is_back() {
    let plane = plane().await;
    until(&mut plane.pilot.ready(), "readiness", |r| *r).await;
    let proxy = client(plane.xds, sidecar("127.10.0.1", "productpage", &[]), Mode::Delta);
    let mut state = proxy.state();
    let draining = |s: &ProxyState| -> Option<Vec<String>> {
        let ends = s.endpoints.get(OWN_GATEWAYS)?.localities.iter().flat_map(|l| &l.endpoints);
        let drains = ends.filter(|e| e.health == EndpointHealth::Draining);
        Some(drains.map(|e| e.address.clone()).collect())
    };
    until(&mut state, "gateways", |s| draining(s).is_some_and(|d| d.is_empty())).await;

    let mut node = sidecar("127.10.0.2", "gateway", &[("ROUTER_MODE", json!("sni-dnat"))]);
    node.kind = NodeKind::Router;
    node.id = node.id.replace("sidecar~", "router~");
    let gateway = client(plane.xds, node.clone(), Mode::Delta);
    let limit = std::time::Duration::from_secs(10);
    assert!(!gateway.set_node(node.clone(), limit).await, "nobody has answered yet");
    let mut health = gateway.health();
    until(&mut health, "the gateway", |h| h.connected).await;
    assert!(gateway.set_node(node.clone().draining(), limit).await);
    until(&mut state, "the drain", |s| draining(s).is_some_and(|d| d == ["127.10.0.2"])).await;
    drop(gateway);
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    assert_eq!(draining(&state.borrow()), Some(vec!["127.10.0.2".to_owned()]), "it has not come back");
    let _back = client(plane.xds, node, Mode::Delta);
    until(&mut state, "the return", |s| draining(s).is_some_and(|d| d.is_empty())).await;
}
