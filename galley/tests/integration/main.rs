//! A running galley: files in, documents over a real socket out.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use galley::{Galley, GalleyHandle, GalleyOptions, Listen};
use mesh_xds::{Endpoint, NodeInfo, mcp::ConfigClient};
use tokio::{sync::watch, time::timeout};

const SERVICE: &str = "core/v1/Service";
const ROUTE: &str = "networking.istio.io/v1/VirtualService";

fn service(name: &str, port: u32) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n"
    )
}

fn route(host: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3\nkind: VirtualService\nmetadata: {{name: r}}\nspec: {{hosts: [{host}], http: [{{route: [{{destination: {{host: {host}}}, weight: 100}}]}}]}}\n"
    )
}

fn options(dir: &Path, socket: &Path) -> GalleyOptions {
    let mut o = GalleyOptions::new(vec![dir.to_owned()], Some(Listen::Unix(socket.to_owned())));
    o.debounce = Duration::from_millis(20);
    o.poll = Duration::from_millis(200);
    o
}

async fn until<T: Clone>(rx: &mut watch::Receiver<T>, what: &str, mut ok: impl FnMut(&T) -> bool) -> T {
    timeout(Duration::from_secs(10), rx.wait_for(|v| ok(v)))
        .await
        .unwrap_or_else(|_| panic!("never: {what}"))
        .unwrap()
        .clone()
}

async fn rejected(g: &GalleyHandle, what: &str, n: usize) {
    until(&mut g.watch_status(), what, |s| s.rejected().count() == n).await;
}

#[tokio::test]
async fn changes_travel_and_mistakes_do_not() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("config");
    std::fs::create_dir(&dir).unwrap();
    let socket = tmp.path().join("galley.sock");
    std::fs::write(dir.join("a.yaml"), service("one", 80)).unwrap();
    let g = Galley::start(options(&dir, &socket)).await.unwrap();
    assert_eq!(g.status().applied, 1);

    let client = ConfigClient::start(Endpoint::Unix(socket), NodeInfo::component("test"), &[SERVICE, ROUTE]);
    let mut state = client.watch();
    let s = until(&mut state, "first state", |s| s.synced).await;
    let one = s.documents[SERVICE]["default/one"].clone();
    assert_eq!(one.body["ports"][0]["port"], 80);
    assert!(one.created > 0);
    let spec =
        mesh_model::authored::Spec::from_json(mesh_model::authored::Kind::Service, one.body.clone()).unwrap();
    assert_eq!(spec.kind(), mesh_model::authored::Kind::Service);

    // Live: a new file in a new directory, an edit, a mistake in one of two files.
    std::fs::create_dir(dir.join("sub")).unwrap();
    std::fs::write(dir.join("sub/b.yaml"), route("one")).unwrap();
    until(&mut state, "new file", |s| s.of(ROUTE).count() == 1).await;
    std::fs::write(dir.join("a.yaml"), service("one", 81)).unwrap();
    let port = |s: &mesh_xds::mcp::ConfigState| {
        s.documents[SERVICE]["default/one"].body["ports"][0]["port"].as_u64()
    };
    until(&mut state, "edit", |s| port(s) == Some(81)).await;
    std::fs::write(dir.join("a.yaml"), service("one", 0)).unwrap();
    rejected(&g, "mistake", 1).await;
    std::fs::write(dir.join("sub/c.yaml"), service("two", 80)).unwrap();
    let s = until(&mut state, "the rest", |s| s.of(SERVICE).count() == 2).await;
    assert_eq!(port(&s), Some(81), "the last good version serves");
    assert_eq!(g.status().stale.len(), 1);
    let text = galley::render_text(&g.status().reports);
    assert!(text.contains("spec.ports[0].port"), "{text}");

    std::fs::write(dir.join("a.yaml"), service("one", 82)).unwrap();
    until(&mut state, "repair", |s| port(s) == Some(82)).await;
    std::fs::remove_file(dir.join("sub/c.yaml")).unwrap();
    until(&mut state, "deletion", |s| s.of(SERVICE).count() == 1).await;
    assert_eq!(g.status().rejected().count(), 0);
    g.stop().await;
}

#[tokio::test]
async fn a_swapped_link_and_a_directory_that_comes_late() {
    let tmp = tempfile::tempdir().unwrap();
    let link = tmp.path().join("current");
    let g = Galley::start(options(&link, &tmp.path().join("s"))).await.unwrap();
    assert_eq!(g.status().rejected().count(), 1, "the missing directory is told");
    let mut documents = g.watch_documents();
    for (v, port) in [("v1", 1), ("v2", 2)] {
        std::fs::create_dir(tmp.path().join(v)).unwrap();
        std::fs::write(tmp.path().join(v).join("a.yaml"), service("one", port)).unwrap();
        let staged = tmp.path().join("staged");
        std::os::unix::fs::symlink(v, &staged).unwrap();
        std::fs::rename(&staged, &link).unwrap();
        until(&mut documents, v, |d| {
            d.iter().any(|(_, d)| match &d.spec {
                mesh_model::authored::Spec::Service(s) => s.ports[0].port == port,
                _ => false,
            })
        })
        .await;
    }
}

#[tokio::test]
async fn a_route_waits_for_the_host_that_a_peer_provides() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("config");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("a.yaml"), route("remote")).unwrap();
    let hosts = watch::Sender::new(Arc::new(BTreeSet::new()));
    let mut o = options(&dir, &tmp.path().join("s"));
    o.extra_hosts = Some(hosts.subscribe());
    o.poll = Duration::from_secs(60);
    let g = Galley::start(o).await.unwrap();
    assert_eq!((g.status().applied, g.status().rejected().count()), (0, 1));
    hosts.send_replace(Arc::new(BTreeSet::from(["remote.default.svc.cluster.local".to_owned()])));
    until(&mut g.watch_documents(), "the host", |d| d.len() == 1).await;
}

#[tokio::test]
async fn only_loopback_is_served_in_clear_text() {
    let mut o = GalleyOptions::new(vec!["x".into()], Some(Listen::Tcp("0.0.0.0:0".parse().unwrap())));
    assert!(Galley::start(o.clone()).await.is_err());
    o.config_dirs.clear();
    assert!(Galley::start(o).await.is_err());
}
