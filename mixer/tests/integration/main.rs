//! A running mixer between a configuration server and real clients.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use mesh_telemetry::{
    attributes::Bag,
    check::{CheckClient, CheckOptions, Outcome, QuotaCharge},
    report::{ReportClient, ReportOptions},
};
use mesh_xds::{
    Endpoint,
    mcp::{ConfigServer, Document},
};
use mixer::{Mixer, MixerHandle, MixerOptions};
use serde_json::json;
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Server};

struct World {
    config: ConfigServer,
    mixer: MixerHandle,
    channel: Channel,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

fn documents(specs: &[(&str, &str, serde_json::Value)]) -> BTreeMap<String, BTreeMap<String, Document>> {
    let kinds = [
        "rule",
        "handler",
        "instance",
        "denier",
        "listchecker",
        "memquota",
        "stdio",
        "prometheus",
        "checknothing",
        "reportnothing",
        "listentry",
        "quota",
        "logentry",
        "metric",
    ];
    let mut out: BTreeMap<String, BTreeMap<String, Document>> =
        kinds.iter().map(|k| (format!("config.istio.io/v1alpha2/{k}"), BTreeMap::new())).collect();
    for (kind, name, spec) in specs {
        let name = format!("books/{name}");
        let d = Document::new(name.clone(), spec).unwrap();
        out.get_mut(&format!("config.istio.io/v1alpha2/{kind}")).unwrap().insert(name, d);
    }
    out
}

async fn world(specs: &[(&str, &str, serde_json::Value)]) -> World {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("galley.sock");
    let config = ConfigServer::new();
    config.publish(documents(specs));
    let stop = CancellationToken::new();
    let (server, token, path) = (config.clone(), stop.clone(), socket.clone());
    tokio::spawn(async move { server.serve_unix(&path, token).await });
    let mixer = Mixer::start(MixerOptions::new(Endpoint::Unix(socket))).unwrap();
    timeout(Duration::from_secs(10), mixer.watch_status().wait_for(|s| s.synced)).await.unwrap().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = mixer.service();
    let token = stop.clone();
    tokio::spawn(async move {
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, token.cancelled_owned())
            .await
    });
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    World { config, mixer, channel, stop, _dir: dir }
}

fn bag(user: &str) -> Bag {
    let mut b = Bag::default();
    b.set("context.reporter.kind", "inbound");
    b.set("context.protocol", "http");
    b.set("destination.namespace", "books");
    b.set("request.headers", BTreeMap::from([("end-user".to_owned(), user.to_owned())]));
    b.set("request.path", format!("/{user}"));
    b.set("request.time", SystemTime::now());
    b
}

fn deny_mallory() -> Vec<(&'static str, &'static str, serde_json::Value)> {
    vec![
        ("denier", "no", json!({"status": {"code": 7, "message": "go away"}, "validDuration": "60s"})),
        ("checknothing", "any", json!({})),
        (
            "rule",
            "mallory",
            json!({
            "match": r#"request.headers["end-user"] == "mallory""#,
            "actions": [{"handler": "no.denier", "instances": ["any.checknothing"]}]}),
        ),
    ]
}

#[tokio::test]
async fn answers_are_kept_for_what_they_depend_on() {
    let w = world(&deny_mallory()).await;
    let client = CheckClient::new(w.channel.clone(), CheckOptions::default());
    for _ in 0..5 {
        let Outcome::Deny(d) = client.check(&bag("mallory"), &[]).await else { panic!("was allowed") };
        assert_eq!((d.http_status, d.body.as_str()), (403, "PERMISSION_DENIED:no.denier.books:go away"));
        assert_eq!(client.check(&bag("jason"), &[]).await, Outcome::Allow);
    }
    let s = client.stats();
    assert_eq!((s.calls, s.hits, s.failures), (2, 8, 0));

    // A change of configuration reaches Check; a kept answer may live on until it expires.
    w.config.publish(documents(&[]));
    timeout(Duration::from_secs(10), w.mixer.watch_status().wait_for(|s| s.rules == 0))
        .await
        .unwrap()
        .unwrap();
    let fresh = CheckClient::new(w.channel.clone(), CheckOptions::default());
    assert_eq!(fresh.check(&bag("mallory"), &[]).await, Outcome::Allow);
    w.stop.cancel();
}

#[tokio::test]
async fn without_mixer_the_options_decide() {
    let nobody = Channel::from_static("http://127.0.0.1:1").connect_lazy();
    let closed = CheckClient::new(nobody.clone(), CheckOptions::default());
    let Outcome::Deny(d) = closed.check(&bag("a"), &[]).await else { panic!("was allowed") };
    assert_eq!((d.http_status, d.body.as_str()), (503, "UNAVAILABLE:policy is not available"));
    let open = CheckClient::new(nobody, CheckOptions { fail_open: true, ..Default::default() });
    assert_eq!(open.check(&bag("a"), &[]).await, Outcome::Allow);
    assert_eq!(open.stats().failures, 1);
}

#[tokio::test]
async fn rate_limits_hold_with_prefetch() {
    let w = world(&[
        (
            "memquota",
            "mem",
            json!({"quotas": [{"name": "rq.quota.books", "maxAmount": 3, "validDuration": "60s"}]}),
        ),
        ("quota", "rq", json!({"dimensions": {"user": r#"request.headers["end-user"]"#}})),
        ("rule", "limit", json!({"actions": [{"handler": "mem.memquota", "instances": ["rq.quota"]}]})),
    ])
    .await;
    let client = CheckClient::new(w.channel.clone(), CheckOptions::default());
    let charge = [QuotaCharge { name: "rq".into(), amount: 1 }];
    let mut allowed = 0;
    for _ in 0..20 {
        match client.check(&bag("jason"), &charge).await {
            Outcome::Allow => allowed += 1,
            Outcome::Deny(d) => {
                assert_eq!(
                    (d.http_status, d.body.as_str()),
                    (429, "RESOURCE_EXHAUSTED:Quota is exhausted for: rq")
                );
            }
        }
    }
    assert_eq!(allowed, 3);
    assert!(client.stats().calls <= 5, "{:?}", client.stats());
    assert_eq!(client.check(&bag("anna"), &charge).await, Outcome::Allow, "another counter");
    w.stop.cancel();
}

#[tokio::test]
async fn reports_arrive_in_batches() {
    let w = world(&[
        ("prometheus", "p", json!({"metrics": [{"name": "requests_total", "instanceName": "rc.metric.books", "kind": "COUNTER", "labelNames": ["path"]}]})),
        ("metric", "rc", json!({"value": "1", "dimensions": {"path": "request.path"}})),
        ("rule", "r", json!({"match": r#"context.protocol == "http""#, "actions": [{"handler": "p.prometheus", "instances": ["rc.metric"]}]})),
        ("rule", "broken", json!({"match": "nope", "actions": [{"handler": "p.prometheus", "instances": ["rc.metric"]}]})),
    ])
    .await;
    assert_eq!(w.mixer.status().errors.len(), 1);
    let client = ReportClient::start(
        w.channel.clone(),
        ReportOptions { max_delay: Duration::from_millis(50), ..Default::default() },
    );
    for i in 0..1_500 {
        let mut b = bag(if i % 2 == 0 { "a" } else { "b" });
        if i % 3 == 0 {
            b.set("response.code", 200i64);
        }
        assert!(client.report(b));
    }
    let done = async {
        while client.sent() < 1_500 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), done).await.unwrap();
    let text = w.mixer.metrics_text();
    for line in [
        r#"istio_requests_total{path="/a"} 750"#,
        r#"istio_requests_total{path="/b"} 750"#,
        "mixer_reports_total 1500",
        "mixer_config_errors 1",
    ] {
        assert!(text.contains(line), "no {line} in\n{text}");
    }
    assert_eq!(client.dropped(), 0);
    w.stop.cancel();
}
