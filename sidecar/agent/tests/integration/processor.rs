//! External processing beside Envoy's, with a processor that is not ours: grpcio, with messages of Envoy's own protos.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use mesh_model::proxy::*;

use crate::side_by_side::{Pair, cluster, manager, route, server, to_up};

struct Running(Child, SocketAddr);

impl Running {
    /// With `FLOTILLA_PYTHON`, else the Python of the environment that `cargo verify` makes.
    fn new() -> Self {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../");
        let venv = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| format!("{root}target"));
        let python =
            std::env::var("FLOTILLA_PYTHON").unwrap_or_else(|_| format!("{venv}/verify-venv/bin/python"));
        let mut child = Command::new(python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/integration/foreign/processor.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port: u16 = line.trim().parse().expect("the processor's port; it needs grpcio and xds-protos");
        Self(child, SocketAddr::from(([127, 0, 0, 1], port)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers with what it saw, as the test may compare it.
async fn echo(name: &'static str) -> SocketAddr {
    server(move |r| {
        let (head, body) = r.split_once("\r\n\r\n").unwrap();
        let mut lines: Vec<String> = head
            .lines()
            .skip(1)
            .map(|l| {
                let (n, v) = l.split_once(':').unwrap();
                format!("{}:{v}", n.to_ascii_lowercase())
            })
            .filter(|l| (l.starts_with("x-t-") && !l.starts_with("x-t-do")) || l.starts_with("host:"))
            .collect();
        lines.sort();
        let line = head.lines().next().unwrap();
        // However the body is framed.
        let body = if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            unchunk(body)
        } else {
            body.into()
        };
        (200, format!("x-t-up: {name}\r\n"), format!("{name} {line}\n{}\n[{body}]", lines.join("\n")))
    })
    .await
}

fn unchunk(mut b: &str) -> String {
    let mut out = String::new();
    while let Some((n, rest)) = b.split_once("\r\n") {
        let n = usize::from_str_radix(n, 16).unwrap();
        out += &rest[..n];
        b = &rest[(n + 2).min(rest.len())..];
    }
    out
}

fn request(method: &str, todo: &str, headers: &str, body: &str) -> String {
    let length = if method == "POST" { format!("content-length: {}\r\n", body.len()) } else { String::new() };
    format!(
        "{method} /path HTTP/1.1\r\nHost: books.example\r\nConnection: close\r\nx-t-do: {todo}\r\nx-t-many: \
         a\r\nx-t-remove: r\r\n{headers}{length}\r\n{body}"
    )
}

async fn pair(processor: &Running, config: ExtProc) -> Pair {
    pair_with(processor, config, RouteFilters::default()).await
}

async fn pair_with(processor: &Running, config: ExtProc, filters: RouteFilters) -> Pair {
    let service = GrpcService { cluster: "processor".into(), ..GrpcService::default() };
    let config = ExtProc { service, message_timeout: Duration::from_millis(500), ..config };
    let mut other = route(
        Forward { clusters: vec![WeightedCluster::only("other")], ..Forward::default() },
        RouteFilters::default(),
    );
    other.matches.headers = vec![HeaderMatch {
        name: "x-t-route".into(),
        value: HeaderValueMatch::Value(StringMatch::exact("other")),
        invert: false,
        missing_is_empty: false,
    }];
    let m = manager(vec![HttpFilter::ExtProc(Arc::new(config))], vec![other, route(to_up(), filters)]);
    let clusters = vec![
        cluster("up", echo("up").await, UpstreamHttp::Http1),
        cluster("other", echo("other").await, UpstreamHttp::Http1),
        cluster("processor", processor.1, UpstreamHttp::Http2),
    ];
    Pair::new(m, clusters).await
}

const HEADERS: [&str; 4] = ["x-t-response", "x-t-seen", "x-t-why", "x-t-body"];

fn body(request: BodyMode, response: BodyMode) -> ExtProc {
    ExtProc {
        mode: ProcessingMode { request_body: request, response_body: response, ..ProcessingMode::default() },
        ..ExtProc::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn headers_are_changed_within_the_rules() {
    let processor = Running::new();
    let p = pair(&processor, ExtProc::default()).await;
    for todo in ["-", "routing", "reroute", "status", "close:request_headers", "close:response_headers"] {
        p.alike(&request("GET", todo, "", ""), &HEADERS).await;
    }
    let a = p.alike(&request("GET", "-", "", ""), &HEADERS).await;
    let text = String::from_utf8_lossy(&a.body).into_owned();
    assert!(text.contains("x-t-request: seen") && !text.contains("x-t-remove"), "{text}");
    assert_eq!(a.headers["x-t-response"], "seen");
    let a = p.alike(&request("GET", "reroute", "", ""), &HEADERS).await;
    assert_eq!(a.headers["x-t-up"], "other");
    // Everything, nothing, and errors.
    for rules in [
        MutationRules { allow_all_routing: true, allow_envoy: true, ..MutationRules::default() },
        MutationRules { disallow_all: true, allow: Some("x-t-re.*".into()), ..MutationRules::default() },
        MutationRules { disallow: Some("x-t-many|:path".into()), ..MutationRules::default() },
        MutationRules { disallow_is_error: true, ..MutationRules::default() },
    ] {
        let p = pair(&processor, ExtProc { mutation_rules: rules, ..ExtProc::default() }).await;
        for todo in ["-", "routing"] {
            p.alike(&request("GET", todo, "", ""), &HEADERS).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn bodies_in_every_mode() {
    use BodyMode::{Buffered, BufferedPartial, None as No, Streamed};
    let processor = Running::new();
    for (req, resp) in [
        (Buffered, No),
        (No, Buffered),
        (Buffered, Buffered),
        (BufferedPartial, BufferedPartial),
        (Streamed, Streamed),
    ] {
        let p = pair(&processor, body(req, resp)).await;
        for todo in ["-", "upper", "clear", "body-headers upper"] {
            // Envoy takes headers with a piece of a body if it still holds them, which is a matter of time.
            if req == Streamed && todo.starts_with("body-headers") {
                continue;
            }
            for (method, data) in [("POST", "hello world"), ("GET", ""), ("POST", "")] {
                // How many pieces there are is nobody's promise.
                let headers = if req == Streamed { &HEADERS[..1] } else { &HEADERS[..] };
                p.alike(&request(method, todo, "", data), headers).await;
            }
        }
    }
    // Replaced, whatever there was.
    let p = pair(&processor, body(Buffered, Buffered)).await;
    for todo in ["replace:request_headers", "replace:response_headers"] {
        for (method, data) in [("POST", "hello world"), ("GET", "")] {
            p.alike(&request(method, todo, "", data), &HEADERS).await;
        }
    }
    // Larger than one piece.
    let p = pair(&processor, body(Streamed, Streamed)).await;
    let large = "x".repeat(300_000);
    let a = p.alike(&request("POST", "upper", "", &large), &HEADERS[..1]).await;
    assert!(a.body.ends_with(&[b"X".repeat(300_000).as_slice(), b"]"].concat()));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn answers_in_its_place_failures_and_silence() {
    let processor = Running::new();
    let everything = || body(BodyMode::Buffered, BodyMode::Buffered);
    let parts = ["request_headers", "request_body", "response_headers", "response_body"];
    let words = ["immediate", "fail", "slow", "wrong", "close"];
    for (config, why) in [
        (everything(), "closed"),
        (ExtProc { failure_mode_allow: true, ..everything() }, "open"),
        (ExtProc { status_on_error: 503, ..everything() }, "503"),
        (ExtProc { disable_immediate_response: true, ..everything() }, "no immediate answers"),
    ] {
        let p = pair(&processor, config).await;
        for word in words {
            for part in parts {
                let todo = format!("{word}:{part}");
                println!("{why}: {todo}");
                p.alike(&request("POST", &todo, "", "hello"), &["x-t-response", "x-t-why"]).await;
            }
        }
    }
    // More time, if it may ask for that.
    for max in [0, 5] {
        let config = ExtProc { max_message_timeout: Duration::from_secs(max), ..ExtProc::default() };
        let p = pair(&processor, config).await;
        let a = p.alike(&request("GET", "more slow:request_headers", "", ""), &HEADERS).await;
        assert_eq!(a.status, if max == 0 { 504 } else { 200 });
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy (ENVOY_BIN), grpcio and xds-protos"]
async fn modes_by_route_and_by_the_processor() {
    let processor = Running::new();
    // What of the rest it wants: request and answer bodies as a whole; no headers of the answer.
    for allow in [false, true] {
        let p = pair(&processor, ExtProc { allow_mode_override: allow, ..ExtProc::default() }).await;
        for mode in ["mode:request_body_mode=2", "mode:response_body_mode=2", "mode:response_header_mode=2"] {
            p.alike(&request("POST", &format!("upper {mode}"), "", "hello"), &HEADERS).await;
        }
    }
    let quiet =
        ProcessingMode { request_headers: false, response_headers: false, ..ProcessingMode::default() };
    let set = |mode| ProcOverride::Set { mode: Some(mode), service: None, failure_mode_allow: None };
    let nowhere = GrpcService { cluster: "nowhere".into(), ..GrpcService::default() };
    for o in [
        ProcOverride::Disabled,
        set(quiet),
        set(ProcessingMode { request_headers: false, ..ProcessingMode::default() }),
        ProcOverride::Set { mode: None, service: Some(nowhere), failure_mode_allow: Some(true) },
    ] {
        let filters = RouteFilters { ext_proc: Some(o), ..RouteFilters::default() };
        let p = pair_with(&processor, ExtProc::default(), filters).await;
        p.alike(&request("GET", "-", "", ""), &HEADERS).await;
    }
    // Not every header is shown.
    let config = ExtProc { disallowed_headers: vec![StringMatch::exact("x-t-do")], ..ExtProc::default() };
    let p = pair(&processor, config).await;
    p.alike(&request("GET", "immediate:request_headers", "", ""), &HEADERS).await;
}
