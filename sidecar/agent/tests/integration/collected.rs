//! Spans and log entries beside Envoy's, at a collector that is not ours: grpcio, with the protos of Envoy and of
//! OpenTelemetry.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use mesh_model::proxy::*;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::side_by_side::{Pair, cluster, manager, route, server, to_up};

/// Envoy sends spans after five seconds.
const WAIT: Duration = Duration::from_secs(20);
const REQUEST: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

struct Collector {
    child: Child,
    grpc: SocketAddr,
    http: SocketAddr,
    got: Receiver<Value>,
}

impl Collector {
    /// With `FLOTILLA_PYTHON`, else the Python of the environment that `cargo verify` makes.
    fn new() -> Self {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../");
        let venv = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| format!("{root}target"));
        let python =
            std::env::var("FLOTILLA_PYTHON").unwrap_or_else(|_| format!("{venv}/verify-venv/bin/python"));
        let mut child = Command::new(python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/integration/foreign/collector.py"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let ports: Vec<u16> = line.split_whitespace().map(|p| p.parse().unwrap()).collect();
        assert_eq!(ports.len(), 2, "the collector's ports; it needs grpcio and xds-protos");
        let (send, got) = channel();
        std::thread::spawn(move || {
            for l in out.lines().map_while(Result::ok) {
                if send.send(serde_json::from_str(&l).unwrap()).is_err() {
                    return;
                }
            }
        });
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self { child, grpc: at(ports[0]), http: at(ports[1]), got }
    }

    /// The next of ours and of Envoy's, which `who` tells apart.
    fn both(&self, kind: &str, who: impl Fn(&Value) -> Option<&str>) -> (Value, Value) {
        let mut found = BTreeMap::new();
        let end = std::time::Instant::now() + WAIT;
        while found.len() < 2 {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let v = self.got.recv_timeout(left).unwrap_or_else(|_| panic!("only {found:?} came"));
            assert_eq!(v["kind"], kind, "{v}");
            let from = who(&v["value"]).unwrap_or_else(|| panic!("{v}")).to_owned();
            found.insert(from, v["value"].clone());
        }
        (found.remove("ours").unwrap(), found.remove("envoy").unwrap())
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn pair(c: &Collector, change: impl FnOnce(&mut HttpConnectionManager)) -> Pair {
    let up = server(|r| {
        let bad = r.starts_with("GET /bad");
        (if bad { 503 } else { 200 }, "x-answer: yes\r\n".into(), "hello".into())
    })
    .await;
    let mut r = route(to_up(), RouteFilters::default());
    r.operation = "reviews:9080/*".into();
    let mut m = manager(vec![], vec![r]);
    change(&mut m);
    let clusters = vec![
        cluster("up", up, UpstreamHttp::Http1),
        cluster("grpc", c.grpc, UpstreamHttp::Http2),
        cluster("http", c.http, UpstreamHttp::Http1),
    ];
    Pair::new(m, clusters).await
}

/// One request to each proxy, with what tells them apart.
async fn ask(p: &Pair, path: &str, headers: &str) {
    for (to, who) in [(p.engine, "ours"), (p.envoy, "envoy")] {
        let r = format!(
            "GET {path} HTTP/1.1\r\nHost: books.example\r\nuser-agent: me\r\nx-who: {who}\r\nConnection: close\r\n{headers}\r\n"
        );
        crate::side_by_side::send(to, &r).await;
    }
}

fn tracing(provider: TraceProvider) -> Option<Box<Tracing>> {
    let header = |name: &str| TagValue::Header { name: name.into(), default: String::new() };
    Some(Box::new(Tracing {
        sampling: 10_000,
        max_path: 12,
        tags: BTreeMap::from([
            ("who".into(), header("x-who")),
            ("none".into(), header("x-none")),
            ("host".into(), TagValue::Header { name: "x-none".into(), default: "else".into() }),
            ("literal".into(), TagValue::Literal("l".into())),
            ("home".into(), TagValue::Environment { name: "HOME".into(), default: "d".into() }),
            (
                "nowhere".into(),
                TagValue::Environment { name: "FLOTILLA_NOWHERE".into(), default: "d".into() },
            ),
        ]),
        upstream_spans: false,
        provider: Some(provider),
    }))
}

/// What both have to say alike. What is left is about the proxy, or of the moment.
fn told(tags: &Value) -> BTreeMap<String, Value> {
    const OWN: [&str; 8] = [
        "who",
        "node_id",
        "zone",
        "guid:x-request-id",
        "peer.address",
        "downstream_cluster",
        "upstream_cluster.name",
        "upstream_address",
    ];
    let all = tags.as_object().unwrap().iter().filter(|(k, _)| !OWN.contains(&k.as_str()));
    all.map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn who(tags: &Value) -> Option<&str> {
    tags["tags"]["who"].as_str()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn spans_over_otlp() {
    let c = Collector::new();
    let grpc =
        GrpcService { cluster: "grpc".into(), authority: "collector".into(), ..GrpcService::default() };
    let http = HttpCollector {
        cluster: "http".into(),
        authority: "collector".into(),
        path: "/v1/traces".into(),
        timeout: Duration::from_secs(5),
        headers: vec![],
    };
    for to in [mesh_model::proxy::Collector::Grpc(grpc), mesh_model::proxy::Collector::Http(http)] {
        let provider = TraceProvider::OpenTelemetry(OtlpTraces {
            to,
            service_name: "reviews.books".into(),
            environment: false,
        });
        let p = pair(&c, |m| m.tracing = tracing(provider)).await;
        ask(&p, "/a?q=1", &format!("traceparent: 00-{TRACE}-{PARENT}-01\r\n")).await;
        let (ours, theirs) = c.both("span", who);
        for s in [&ours, &theirs] {
            assert_eq!((&s["trace"], &s["parent"]), (&TRACE.into(), &PARENT.into()), "{s}");
            assert_eq!(s["resource"]["service.name"], "reviews.books", "{s}");
            assert!(s["took"].as_u64().unwrap() > 0 && s["id"] != s["parent"], "{s}");
        }
        assert_eq!((&ours["name"], &ours["kind"]), (&theirs["name"], &theirs["kind"]));
        assert_eq!(told(&ours["tags"]), told(&theirs["tags"]), "ours, then Envoy's");
        // A failure, in a trace that begins here, with a path that is too long.
        ask(&p, "/bad/a/b/c/d/e/f/g", "").await;
        let (ours, theirs) = c.both("span", who);
        assert_eq!((&ours["status"], &ours["parent"]), (&theirs["status"], &theirs["parent"]));
        assert_eq!(told(&ours["tags"]), told(&theirs["tags"]), "ours, then Envoy's");
        assert_eq!(ours["tags"]["http.url"], "http://books.example/bad/a/b/c/d");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn spans_for_zipkin() {
    let c = Collector::new();
    for long_ids in [true, false] {
        let to = HttpCollector {
            cluster: "http".into(),
            authority: "collector".into(),
            path: "/api/v2/spans".into(),
            timeout: Duration::from_secs(5),
            headers: vec![("x-key".into(), "secret".into())],
        };
        let provider = TraceProvider::Zipkin(ZipkinTraces { to, long_ids, w3c: false });
        let p = pair(&c, |m| m.tracing = tracing(provider)).await;
        ask(&p, "/a", &format!("x-b3-traceid: {TRACE}\r\nx-b3-spanid: {PARENT}\r\nx-b3-sampled: 1\r\n"))
            .await;
        let (ours, theirs) = c.both("zipkin", who);
        for s in [&ours, &theirs] {
            assert_eq!((&s["traceId"], &s["parentId"]), (&TRACE.into(), &PARENT.into()), "{s}");
            assert!(s["key"] == "secret" && s["duration"].as_u64().unwrap() > 0, "{s}");
        }
        assert_eq!((&ours["name"], &ours["kind"]), (&theirs["name"], &theirs["kind"]));
        assert_eq!(told(&ours["tags"]), told(&theirs["tags"]), "ours, then Envoy's");
        ask(&p, "/a", "").await;
        let (ours, theirs) = c.both("zipkin", who);
        let length = |s: &Value| s["traceId"].as_str().unwrap().len();
        assert_eq!((length(&ours), length(&theirs)), if long_ids { (32, 32) } else { (16, 16) });
    }
}

fn service() -> GrpcService {
    GrpcService { cluster: "grpc".into(), authority: "collector".into(), ..GrpcService::default() }
}

fn grpc_log(requests: bool) -> AccessLog {
    let some = |l: &[&str]| if requests { l.iter().map(|s| (*s).to_owned()).collect() } else { vec![] };
    AccessLog::Grpc(Box::new(GrpcLog {
        service: service(),
        log_name: "log".into(),
        requests,
        filter_state: vec![],
        request_headers: some(&["X-Who", "x-none"]),
        response_headers: some(&["x-answer"]),
        response_trailers: vec![],
    }))
}

/// An entry without times, ports that differ, and what only Envoy has.
fn entry(e: &Value) -> Value {
    let mut e = e["entry"].clone();
    let common = e["common_properties"].as_object_mut().unwrap();
    assert!(common["start_time"].is_string());
    common.retain(|k, _| {
        !k.starts_with("time_to") && !matches!(&**k, "start_time" | "duration" | "sample_rate")
    });
    for k in [
        "stream_id",
        "upstream_local_address",
        "access_log_type",
        "upstream_wire_bytes_sent",
        "upstream_wire_bytes_received",
        "downstream_wire_bytes_sent",
        "downstream_wire_bytes_received",
        "downstream_remote_address",
        "downstream_direct_remote_address",
        "downstream_local_address",
        "connection_termination_details",
        "tls_properties",
        "metadata",
        "custom_tags",
    ] {
        common.remove(k);
    }
    if let Some(r) = e["request"].as_object_mut() {
        for k in [
            "request_id",
            "request_headers_bytes",
            "upstream_header_bytes_sent",
            "downstream_header_bytes_received",
            "upstream_header_bytes_received",
        ] {
            r.remove(k);
        }
        r["request_headers"].as_object_mut().unwrap().remove("x-who");
    }
    if let Some(r) = e["response"].as_object_mut() {
        for k in ["response_headers_bytes", "upstream_header_bytes_received", "downstream_header_bytes_sent"]
        {
            r.remove(k);
        }
    }
    e
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn entries_of_requests() {
    let c = Collector::new();
    let p = pair(&c, |m| m.access_log = vec![grpc_log(true)]).await;
    for path in ["/a?q=1", "/bad"] {
        ask(&p, path, "referer: there\r\n").await;
        let (ours, theirs) = c.both("entry", |e| e["entry"]["request"]["request_headers"]["x-who"].as_str());
        assert_eq!((&ours["log"], &theirs["log"]), (&"log".into(), &"log".into()));
        assert_eq!(entry(&ours), entry(&theirs), "ours, then Envoy's");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn entries_of_connections() {
    let c = Collector::new();
    let up = server(|_| (200, String::new(), "hello".into())).await;
    let t = TcpProxy {
        stat_prefix: "t".into(),
        clusters: vec![WeightedCluster::only("up")],
        access_log: vec![grpc_log(false)],
        idle_timeout: None,
        max_duration: None,
        tunnel: None,
        on_demand: None,
        names: None,
    };
    let p = Pair::tcp(
        t,
        vec![cluster("up", up, UpstreamHttp::Http1), cluster("grpc", c.grpc, UpstreamHttp::Http2)],
    )
    .await;
    // Envoy's start was looked for with connections, which it has logged.
    let mut got = Vec::new();
    for to in [p.envoy, p.engine] {
        let mut s = TcpStream::connect(to).await.unwrap();
        s.write_all(REQUEST.as_bytes()).await.unwrap();
        let mut buf = [0; 256];
        assert!(s.read(&mut buf).await.unwrap() > 0);
        drop(s);
        loop {
            let v = c.got.recv_timeout(WAIT).unwrap();
            let moved = &v["value"]["entry"]["connection_properties"];
            if moved["received_bytes"] == REQUEST.len().to_string().as_str() {
                got.push(entry(&v["value"]));
                break;
            }
        }
    }
    assert_eq!(got[1], got[0], "ours, then Envoy's");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn records() {
    let c = Collector::new();
    let log = OtlpLog {
        service: service(),
        log_name: "log".into(),
        body: "%REQ(:METHOD)% %RESPONSE_CODE% %REQ(x-none)% %UPSTREAM_CLUSTER%".into(),
        attributes: BTreeMap::from([
            ("who".into(), "%REQ(x-who)%".into()),
            ("protocol".into(), "%PROTOCOL%".into()),
            ("none".into(), "%REQ(x-none)%".into()),
        ]),
    };
    let p = pair(&c, |m| m.access_log = vec![AccessLog::Otlp(Box::new(log))]).await;
    ask(&p, "/a", "").await;
    let (mut ours, mut theirs) = c.both("record", |r| r["attributes"]["who"].as_str());
    for r in [&mut ours, &mut theirs] {
        r["attributes"].as_object_mut().unwrap().remove("who");
    }
    assert_eq!(ours, theirs, "ours, then Envoy's");
    assert_eq!(ours["body"], "GET 200 - up");
}
