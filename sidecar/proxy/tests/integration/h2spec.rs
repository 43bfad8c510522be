//! h2spec, a conformance suite that is not ours, against the engine: RFC 9113 and RFC 7541, strict cases included.

use std::path::PathBuf;

use mesh_proxy::{EngineOptions, Hooks};

use super::support::*;
use mesh_model::proxy::*;

/// The program: `H2SPEC_BIN`, or where `cargo verify` installs it.
fn program() -> PathBuf {
    std::env::var_os("H2SPEC_BIN").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/h2spec"),
        PathBuf::from,
    )
}

/// Runs the whole suite; answers with its summary, or panics with the cases that failed.
async fn conforms(port: u16, extra: &[&str]) -> String {
    let program = program();
    // Answered after the whole request: many cases send what is wrong in a second frame. Had the stream ended by an
    // early answer, it would rightly be ignored (RFC 9113, section 5.1).
    let path = ["--path", "/after"];
    let out = tokio::process::Command::new(&program)
        .args(["--strict", "--timeout", "3", "--host", "127.0.0.1", "--port", &port.to_string()])
        .args(path)
        .args(extra)
        .output()
        .await
        .unwrap_or_else(|e| panic!("{}: {e}; cargo verify installs it", program.display()));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let summary = text.lines().rev().find(|l| l.contains(" tests, ")).unwrap_or_default().to_owned();
    let failures = text.split_once("\nFailures:").map_or("", |(_, f)| f);
    assert!(out.status.success() && summary.contains(" 0 failed"), "{summary}\n{failures}{text}");
    assert!(summary.contains(" 0 skipped"), "{summary}");
    summary
}

/// Everything to an upstream that answers with a body, as the suite expects of a page.
fn proxy(up: std::net::SocketAddr, http: UpstreamHttp) -> Proxy {
    let mut c = cluster("up", &[up]);
    c.http = http;
    Proxy::with(EngineOptions::default(), Hooks::default()).cluster(c)
}

fn pages() -> HttpConnectionManager {
    inline(vec![vhost(&["*"], vec![route(forward("up"))])])
}

#[tokio::test]
#[ignore = "needs h2spec; cargo verify installs it"]
async fn h2spec_in_clear_text() {
    let up = Upstream::new("up").await;
    for http in [UpstreamHttp::Http1, UpstreamHttp::Http2] {
        let p =
            proxy(up.address, http).listener(listener(Direction::Outbound, vec![http_chain(pages())])).run();
        println!("  h2c, upstream {http:?}: {}", conforms(p.address("l").port(), &[]).await);
    }
}

#[tokio::test]
#[ignore = "needs h2spec; cargo verify installs it"]
async fn h2spec_over_tls() {
    let up = Upstream::new("up").await;
    let ca = Ca::new();
    let mut c = http_chain(pages());
    c.tls = Some(DownstreamTls {
        client_certificate: ClientCertificate::None,
        alpn: vec!["h2".into(), "http/1.1".into()],
        ..downstream_mtls()
    });
    let p = proxy(up.address, UpstreamHttp::Http2).listener(listener(Direction::Inbound, vec![c]));
    ca.enroll(&p.secrets, "west", "spiffe://mesh.local/ns/books/sa/reviews");
    let p = p.run();
    println!("  h2 over TLS: {}", conforms(p.address("l").port(), &["--tls", "--insecure"]).await);
}
