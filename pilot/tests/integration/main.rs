//! Pilot over real sockets: documents in, configuration out, as components and proxies see it.

mod ads;
mod authorize;
mod envoy;

use std::{collections::BTreeMap, net::SocketAddr, path::Path, time::Duration};

use mesh_model::{ClusterId, Locality, NetworkId, TrustDomain};
use mesh_xds::{
    Endpoint, NodeInfo, NodeKind,
    mcp::{ConfigServer, Document},
    server::conn,
};
use pilot::{Pilot, PilotHandle, PilotOptions, Settings};
use serde_json::{Map, Value, json};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

/// A control plane on sockets of its own.
struct Plane {
    galley: ConfigServer,
    federation: ConfigServer,
    pilot: PilotHandle,
    xds: SocketAddr,
    stop: CancellationToken,
    dir: tempfile::TempDir,
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn settings() -> Settings {
    Settings {
        cluster: ClusterId::new("west").unwrap(),
        network: NetworkId::new("west").unwrap(),
        trust_domain: TrustDomain::default(),
        east_west: ["127.10.0.2:15443", "127.10.0.3:15443"].map(|a| a.parse().unwrap()).to_vec(),
        reachable: true,
        federation_address: None,
        transport: mesh_model::federation::Transport::Tcp,
    }
}

fn documents(list: &[(&str, &str, Value)]) -> BTreeMap<String, BTreeMap<String, Document>> {
    let mut out: BTreeMap<String, BTreeMap<String, Document>> = BTreeMap::new();
    for (t, name, body) in list {
        let d = Document { name: (*name).to_owned(), body: body.clone(), ..Document::default() };
        out.entry((*t).to_owned()).or_default().insert((*name).to_owned(), d);
    }
    out
}

const SERVICE: &str = "core/v1/Service";
const WORKLOAD: &str = "networking.istio.io/v1/WorkloadEntry";
const EXPORT: &str = "multicluster.x-k8s.io/v1alpha1/ServiceExport";

fn workload(ip: &str, app: &str) -> Value {
    json!({"address": ip, "serviceAccount": app, "labels": {"app": app, "security.istio.io/tlsMode": "istio"}})
}

fn bookstore() -> Vec<(&'static str, &'static str, Value)> {
    let service = |app: &str| json!({"selector": {"app": app}, "ports": [{"name": "http", "port": 9080}]});
    vec![
        (SERVICE, "books/reviews", service("reviews")),
        (SERVICE, "books/productpage", service("productpage")),
        (WORKLOAD, "books/reviews-v1", workload("127.10.0.5", "reviews")),
        (WORKLOAD, "books/productpage-v1", workload("127.10.0.1", "productpage")),
        (EXPORT, "books/reviews", json!({})),
    ]
}

fn serve_unix(server: &ConfigServer, path: &Path, stop: &CancellationToken) {
    let (server, stop) = (server.clone(), stop.clone());
    let listener = conn::bind_unix(path).unwrap();
    tokio::spawn(async move { server.serve(conn::unix(listener), stop).await });
}

async fn plane() -> Plane {
    let dir = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let (galley, federation) = (ConfigServer::new(), ConfigServer::new());
    galley.publish(documents(&bookstore()));
    serve_unix(&galley, &dir.path().join("galley.sock"), &stop);
    serve_unix(&federation, &dir.path().join("federation.sock"), &stop);
    let pilot = Pilot::start(PilotOptions {
        settings: settings(),
        galley: Endpoint::Unix(dir.path().join("galley.sock")),
        federation: Some(Endpoint::Unix(dir.path().join("federation.sock"))),
        consul: None,
        export_socket: Some(dir.path().join("pilot.sock")),
        state_dir: None,
    })
    .unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let xds = tcp.local_addr().unwrap();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(pilot.ads_service().until(stop.clone()))
            .serve_with_incoming_shutdown(Box::pin(conn::tcp(tcp)), stop.clone().cancelled_owned()),
    );
    Plane { galley, federation, pilot, xds, stop, dir }
}

fn sidecar(ip: &str, app: &str, extra: &[(&str, Value)]) -> NodeInfo {
    let mut meta: Map<String, Value> = Map::new();
    meta.insert("NAMESPACE".into(), "books".into());
    meta.insert("CLUSTER_ID".into(), "west".into());
    meta.insert("SERVICE_ACCOUNT".into(), app.into());
    meta.insert("LABELS".into(), json!({ "app": app }));
    for (k, v) in extra {
        meta.insert((*k).to_owned(), v.clone());
    }
    let name = format!("{app}-v1");
    NodeInfo::proxy(
        NodeKind::Sidecar,
        ip.parse().unwrap(),
        &name,
        "books",
        "books.svc.cluster.local",
        meta,
        Locality::default(),
    )
}

async fn until<T: Clone + Send + Sync + 'static>(
    rx: &mut watch::Receiver<T>,
    what: &str,
    f: impl FnMut(&T) -> bool,
) -> T {
    tokio::time::timeout(Duration::from_secs(20), rx.wait_for(f))
        .await
        .unwrap_or_else(|_| panic!("timed out waiting for {what}"))
        .unwrap()
        .clone()
}
