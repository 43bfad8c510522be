use std::time::Duration;

use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{client::Endpoint, node::NodeInfo};

fn doc(name: &str, body: Value) -> (String, Document) {
    let d = Document {
        name: name.into(),
        version: "7".into(),
        created: 1_700_000_000,
        labels: [("a".to_owned(), "b".to_owned())].into(),
        annotations: BTreeMap::new(),
        body,
    };
    (name.to_owned(), d)
}

#[test]
fn documents_round_trip() {
    let (_, d) = doc("books/reviews", json!({"hosts": ["a"], "http": [{"weight": 80, "x": null}]}));
    let any = d.to_any();
    assert_eq!(Document::from_any(&any).unwrap(), d);
    assert_eq!(any, d.to_any(), "encoding is deterministic");
    assert_eq!(d.namespaced_name(), ("books", "reviews"));
    let mut other = any.clone();
    other.type_url = "x".into();
    assert!(matches!(Document::from_any(&other), Err(DocumentError::Type(_))));
}

async fn wait<T>(
    rx: &mut tokio::sync::watch::Receiver<std::sync::Arc<ConfigState>>,
    what: &str,
    f: impl Fn(&ConfigState) -> Option<T>,
) -> T {
    tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            if let Some(t) = f(&rx.borrow_and_update()) {
                return t;
            }
            rx.changed().await.unwrap();
        }
    })
    .await
    .unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}

#[tokio::test]
async fn a_client_follows_its_server_through_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("galley.sock");
    let server = ConfigServer::new();
    server.publish(BTreeMap::from([
        ("t/v1/A".to_owned(), BTreeMap::from([doc("ns/a", json!({"v": 1})), doc("ns/b", json!({"v": 1}))])),
        ("t/v1/Unseen".to_owned(), BTreeMap::from([doc("ns/z", json!({}))])),
    ]));
    let stop = CancellationToken::new();
    let serve = |s: ConfigServer, stop: CancellationToken| {
        let socket = socket.clone();
        tokio::spawn(async move { s.serve_unix(&socket, stop).await })
    };
    let task = serve(server.clone(), stop.clone());
    let client = ConfigClient::start(
        Endpoint::Unix(socket.clone()),
        NodeInfo::component("pilot"),
        &["t/v1/A", "t/v1/B"],
    );
    let mut rx = client.watch();
    let s = wait(&mut rx, "sync", |s| s.synced.then(|| s.clone())).await;
    assert!(s.connected);
    assert_eq!(s.of("t/v1/A").count(), 2);
    assert_eq!(s.of("t/v1/B").count(), 0);
    assert_eq!(s.of("t/v1/Unseen").count(), 0);

    server.update("t/v1/A", [doc("ns/c", json!({"v": 3}))].map(|(n, d)| (n, Some(d))));
    wait(&mut rx, "an added document", |s| s.documents["t/v1/A"].get("ns/c").cloned()).await;

    // The server dies; the state stays.
    stop.cancel();
    task.await.unwrap().unwrap();
    let s = wait(&mut rx, "disconnect", |s| (!s.connected).then(|| s.clone())).await;
    assert_eq!(s.of("t/v1/A").count(), 3);

    // It comes back with less: what is gone is removed, what is equal is not sent.
    let again = ConfigServer::new();
    again
        .publish_type("t/v1/A", BTreeMap::from([doc("ns/a", json!({"v": 1})), doc("ns/b", json!({"v": 2}))]));
    let stop = CancellationToken::new();
    let _task = serve(again, stop.clone());
    let s =
        wait(&mut rx, "reconnect", |s| (s.connected && s.documents["t/v1/A"].len() == 2).then(|| s.clone()))
            .await;
    assert_eq!(s.documents["t/v1/A"]["ns/b"].body, json!({"v": 2}));
    assert_eq!(
        std::fs::metadata(&socket).unwrap().permissions(),
        <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o600 | 0o140_000)
    );
    stop.cancel();
}
