//! The ingress gateway as a process, against suites that are not ours.

use std::path::PathBuf;

use super::support::{Authority, Cluster, HttpServer, NAMESPACE, SYSTEM, run, service, until_status};

/// h2spec: `H2SPEC_BIN`, or where `cargo verify` installs it.
fn h2spec() -> String {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    std::env::var("H2SPEC_BIN").unwrap_or_else(|_| target.join("tools/h2spec").display().to_string())
}

#[test]
#[ignore = "needs the flotilla binary and h2spec; cargo verify builds and installs them"]
fn h2spec_at_the_ingress_gateway() {
    let mut west = Cluster::founded();
    let app = HttpServer::start((west.workload(1), 9080).into(), "shop");
    let authority = Authority::new("first");
    authority.issue(&west.credentials().join("shop"), "shop.example");
    west.write("shop.yaml", &service("shop", west.workload(1), app.address.port(), ""));
    west.write(
        "edge.yaml",
        &format!(
            "---\napiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: edge, namespace: {SYSTEM}}}\nspec:\n  \
             selector: {{istio: ingressgateway}}\n  servers:\n  \
             - port: {{number: 8080, name: http, protocol: HTTP}}\n    hosts: ['*']\n  \
             - port: {{number: 8443, name: https, protocol: HTTPS}}\n    hosts: ['*']\n    \
             tls: {{mode: SIMPLE, credentialName: shop}}\n\
             ---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: shop, namespace: \
             {NAMESPACE}}}\nspec:\n  hosts: ['*']\n  gateways: [{SYSTEM}/edge]\n  http:\n  \
             - route:\n    - destination: {{host: shop, port: {{number: 9080}}}}\n"
        ),
    );
    let ip = west.host(2);
    west.gateway("ingress", ip, &[]);
    until_status("the shop", 200, &[&format!("http://{ip}:8080/")]);
    until_status("the shop over TLS", 200, &["-k", &format!("https://{ip}:8443/")]);
    let h2spec = h2spec();
    let host = ip.to_string();
    for (what, port, extra) in [("h2c", "8080", &[][..]), ("h2 over TLS", "8443", &["--tls", "--insecure"])] {
        let args = ["--strict", "--timeout", "3", "--host", &host, "--port", port];
        let o = run(&h2spec, &[&args[..], extra].concat());
        let summary = o.out.lines().rev().find(|l| l.contains(" tests, ")).unwrap_or_default();
        assert!(
            o.code == 0 && summary.contains(" 0 skipped, 0 failed"),
            "{what}: {summary}\n{}{}",
            // What failed comes last, and is all that is of use.
            o.out.split_once("Failures:").map_or(o.out.as_str(), |(_, failures)| failures),
            o.err
        );
        println!("  {what}: {summary}");
    }
}
