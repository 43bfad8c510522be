use std::time::Duration;

use clap::Parser;
use mesh_proxy::HeaderLookup;
use mesh_telemetry::attributes::Value;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    proxy: ProxyArgs,
    #[command(flatten)]
    mixer: MixerArgs,
}

fn cli(more: &[&str]) -> Cli {
    let base =
        ["x", "--ip=10.1.0.5", "--workload=reviews-v1", "--namespace=books", "--service-account=reviews"];
    Cli::parse_from(base.iter().chain(&["--cluster=west", "--labels=app=reviews"]).chain(more))
}

struct Headers(&'static [(&'static str, &'static str)]);

impl HeaderLookup for Headers {
    fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_bytes())
    }
    fn for_each(&self, visit: &mut dyn FnMut(&[u8], &[u8])) {
        for (n, v) in self.0 {
            visit(n.as_bytes(), v.as_bytes());
        }
    }
}

const HEADERS: Headers = Headers(&[
    ("User-Agent", "curl"),
    ("Authorization", "Bearer secret"),
    ("X-A", "1"),
    ("x-a", "2"),
    ("Cookie", "k=v"),
]);

fn attributes(inbound: bool) -> RequestAttributes<'static> {
    RequestAttributes {
        method: "GET",
        path: "/reviews/1?user=jason&q",
        authority: "reviews:9080",
        scheme: "http",
        headers: &HEADERS,
        source_principal: if inbound { "spiffe://mesh.local/ns/front/sa/storefront" } else { "" },
        source_cluster: if inbound { "east" } else { "" },
        source_ip: [10, 2, 0, 1].into(),
        source_port: 4000,
        destination_ip: [10, 1, 0, 5].into(),
        destination_port: 9080,
        destination_service: "reviews.books.svc.cluster.local",
        inbound,
        mtls: inbound,
        protocol: "http",
    }
}

fn all<'b>(b: &'b Bag, names: &[&str]) -> Vec<&'b str> {
    names.iter().map(|n| b.str(n).unwrap_or("-")).collect()
}

#[test]
fn an_inbound_request_names_both_sides() {
    let node = Node::new(&cli(&[]).proxy).unwrap();
    let b = node.request(&attributes(true));
    assert_eq!(
        all(&b, &["source.principal", "source.namespace", "source.serviceAccount", "source.cluster"]),
        ["mesh.local/ns/front/sa/storefront", "front", "storefront", "east"]
    );
    assert_eq!(
        all(
            &b,
            &["destination.uid", "destination.namespace", "destination.principal", "destination.cluster"]
        ),
        ["kubernetes://reviews-v1.books", "books", "mesh.local/ns/books/sa/reviews", "west"]
    );
    assert_eq!(
        all(&b, &["destination.service.name", "destination.service.namespace", "context.reporter.kind"]),
        ["reviews", "books", "inbound"]
    );
    assert_eq!(all(&b, &["request.url_path", "request.useragent"]), ["/reviews/1", "curl"]);
    assert_eq!(b.entry("request.query_params", "user"), Some("jason"));
    assert_eq!(b.entry("request.headers", "x-a"), Some("1,2"));
    assert_eq!(b.entry("destination.labels", "app"), Some("reviews"));
    assert_eq!(b.entry("request.headers", "authorization"), Some("Bearer secret"));
    assert_eq!(b.get("destination.port"), Some(&Value::Int64(9080)));
}

#[test]
fn a_report_has_the_outcome_and_no_credentials() {
    let node = Node::new(&cli(&[]).proxy).unwrap();
    let request = attributes(true);
    let mut record = RequestRecord {
        request: Some(&request),
        response_headers: Some(&HEADERS),
        status: 503,
        grpc_status: None,
        flags: "UF",
        duration: Duration::from_millis(20),
        request_bytes: 3,
        response_bytes: 5,
        upstream: "10.1.0.5:9080",
        source_principal: request.source_principal,
        source_ip: request.source_ip,
        destination_service: request.destination_service,
        inbound: true,
    };
    let b = node.record(&record);
    assert_eq!(b.get("response.code"), Some(&Value::Int64(503)));
    assert_eq!(b.get("response.duration"), Some(&Value::Duration(Duration::from_millis(20))));
    assert_eq!(b.str("context.proxy_error_code"), Some("UF"));
    for map in ["request.headers", "response.headers"] {
        assert_eq!(b.entry(map, "user-agent"), Some("curl"));
        assert_eq!((b.entry(map, "authorization"), b.entry(map, "cookie")), (None, None), "{map}");
    }

    record.request = None;
    record.response_headers = None;
    let b = node.record(&record);
    assert_eq!(
        all(&b, &["context.protocol", "connection.event", "source.namespace"]),
        ["tcp", "close", "front"]
    );
    assert_eq!(b.get("connection.sent.bytes_total"), Some(&Value::Int64(5)));
    assert_eq!(b.get("response.code"), None);
}

#[test]
fn outbound_the_workload_is_the_source() {
    let node = Node::new(&cli(&[]).proxy).unwrap();
    let b = node.request(&attributes(false));
    assert_eq!(
        all(&b, &["context.reporter.kind", "source.workload.name", "source.principal", "destination.uid"]),
        ["outbound", "reviews-v1", "mesh.local/ns/books/sa/reviews", "-"]
    );
    assert_eq!(b.str("destination.service"), Some("reviews.books.svc.cluster.local"));
}

#[tokio::test]
async fn flags_are_checked() {
    let made = |more: &[&str]| {
        let c = cli(more);
        MixerHook::new(&c.mixer, &c.proxy, &SecretStore::new(), &mut Registry::default())
            .map(|h| (h.checks(), h.reports()))
    };
    assert_eq!(made(&[]).unwrap(), (false, false));
    assert_eq!(made(&["--mixer-report=cp:9091"]).unwrap(), (false, true));
    assert_eq!(made(&["--mixer-check=cp:9091", "--mixer-quota=rq=2"]).unwrap(), (true, false));
    for bad in [
        &["--mixer-check=cp"][..],
        &["--mixer-report=:9091"],
        &["--mixer-check=cp:9091", "--mixer-quota=rq=0"],
        &["--mixer-check=cp:9091", "--mixer-quota==1"],
    ] {
        assert!(made(bad).is_err(), "{bad:?}");
    }
}

/// Nobody listens at any of these: who is asked shows in who is counted as not answering.
#[tokio::test]
async fn settings_of_the_mesh_where_no_flag_says_otherwise() {
    let hook = |more: &[&str]| {
        let c = cli(more);
        MixerHook::new(&c.mixer, &c.proxy, &SecretStore::new(), &mut Registry::default()).unwrap()
    };
    let said = |check: &str, report: &str, fail_open| Mixer {
        check: check.into(),
        report: report.into(),
        fail_open,
    };
    let state = |h: &MixerHook| (h.checks(), h.reports());
    let denied = async |h: &MixerHook| h.check(&attributes(true)).await != PolicyDecision::Allow;

    let h = hook(&[]);
    h.configure(None);
    assert_eq!(state(&h), (false, false));
    assert!(!denied(&h).await);
    h.configure(Some(&said("127.0.0.1:1", "", false)));
    assert_eq!(state(&h), (true, false));
    assert!(denied(&h).await, "without an answer");
    assert_eq!(h.clients.now().check.unwrap().stats().failures, 1);
    // The same again, or another who is told, and who is asked stays who it is.
    h.configure(Some(&said("127.0.0.1:1", "", false)));
    h.configure(Some(&said("127.0.0.1:1", "127.0.0.1:1", false)));
    assert_eq!((state(&h), h.clients.now().check.unwrap().stats().failures), ((true, true), 1));
    h.configure(Some(&said("127.0.0.1:1", "", true)));
    assert!(!denied(&h).await, "fails open");
    // What cannot be used leaves what was in force.
    h.configure(Some(&said("nowhere", "", false)));
    assert!(h.checks() && !denied(&h).await);
    h.configure(None);
    assert_eq!(state(&h), (false, false));
    // Where nothing was in force nobody gets in, and whom to tell is another matter.
    h.configure(Some(&said("nowhere", "127.0.0.1:1", false)));
    assert_eq!(state(&h), (true, true));
    assert!(denied(&h).await);
    h.configure(Some(&said("", "nowhere", false)));
    assert!(!h.checks() && !denied(&h).await);

    let h = hook(&["--mixer-check=127.0.0.1:1", "--mixer-fail-open"]);
    h.configure(Some(&said("127.0.0.2:1", "127.0.0.2:1", false)));
    assert_eq!(state(&h), (true, true));
    assert!(!denied(&h).await, "the flag's");
    h.configure(None);
    assert_eq!(state(&h), (true, false));
}
