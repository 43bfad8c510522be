//! The seccomp profile of `deploy/seccomp`: everything runs under it, and what it does not name is refused.
//!
//! No container is needed: `seccomp/run.py` makes a filter of the profile with the library that container runtimes use, and
//! runs a program under it.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use flotilla_e2e::programs;

use crate::support::*;

fn profile() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/seccomp/flotilla.json").display().to_string()
}

/// What runs a program under the profile: with Debian's Python, whose package the library comes with.
fn confining() -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/seccomp/run.py");
    vec!["/usr/bin/python3".to_owned(), script.display().to_string(), profile()]
}

/// A program that is the one under test, under the profile.
fn confined(dir: &Path) -> PathBuf {
    let path = dir.join("confined");
    let command = [confining(), vec![programs::flotilla().unwrap().display().to_string()]].concat();
    std::fs::write(&path, format!("#!/bin/sh\nexec {} \"$@\"\n", command.join(" "))).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
#[ignore = "needs the flotilla binary and python3-seccomp; cargo verify builds and installs them"]
fn everything_runs_under_the_profile() {
    let mut c = Cluster::start_after("west", |c| {
        c.program = confined(&c.path("config").join(".."));
        vec![]
    });
    c.found();
    let authority = Authority::new("public");
    let root = authority.write_root(&c.path("root.pem"));
    authority.issue(&c.credentials().join("shop"), "shop.example");
    let app = HttpServer::start((c.workload(12), 8080).into(), "shop");
    let (client, shop, edge) = (c.workload(1), c.workload(2), c.host(2));
    c.write("shop.yaml", &service("shop", shop, 9080, IN_MESH));
    c.sidecar("shop", shop, Some(app.address));
    c.sidecar("client", client, None);
    c.gateway("ingress", edge, &[]);
    c.east_west_gateway();
    let ports = "  servers:\n  - port: {number: 8443, name: https, protocol: HTTPS}\n    hosts: [shop.example]\n    \
                 tls: {mode: SIMPLE, credentialName: shop}\n";
    // It comes while they run: files are watched.
    c.write(
        "edge.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: edge, namespace: {SYSTEM}}}\nspec:\n  \
             selector: {{istio: ingressgateway}}\n{ports}---\napiVersion: networking.istio.io/v1\nkind: VirtualService\n\
             metadata: {{name: shop, namespace: {NAMESPACE}}}\nspec:\n  hosts: [shop.example]\n  gateways: [{SYSTEM}/edge]\n  \
             http:\n  - route: [{{destination: {{host: shop, port: {{number: 9080}}}}}}]\n"
        ),
    );
    c.ready(shop);
    c.ready(client);
    let at = SocketAddr::from((edge, 8443));
    let to = format!("shop.example:8443:{}", at.ip());
    until_status(
        "in at the ingress",
        200,
        &["--resolve", &to, "--cacert", &root, "https://shop.example:8443/"],
    );
    let proxy = format!("http://{client}:{HTTP_PROXY}");
    let a = until_status("from sidecar to sidecar", 200, &["-x", &proxy, "http://shop.books:9080/"]);
    assert!(a.body.contains("spiffe://mesh.local/ns/books/sa/client"), "in mTLS: {a:?}");
    let o = c.flotilla(&["ca", "revoke", "--identity", "ns/books/sa/client"]);
    assert_eq!(o.code, 0, "{o:?}");

    for process in ["control-plane", "shop", "client", "ingress", "eastwest"] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", c.pid(process))).unwrap();
        assert!(
            status.contains("\nSeccomp:\t2\n") && status.contains("\nNoNewPrivs:\t1\n"),
            "{process}: {status}"
        );
        let log = c.log(process);
        assert!(!log.contains("Operation not permitted") && !log.contains("panicked"), "{process}: {log}");
    }
}

#[test]
#[ignore = "needs python3-seccomp; cargo verify installs it"]
fn what_it_does_not_name_is_refused() {
    let under = |command: &[&str]| {
        let all = [confining(), command.iter().map(|s| (*s).to_owned()).collect()].concat();
        run(&all[0], &all[1..].iter().map(String::as_str).collect::<Vec<_>>())
    };
    let python = |code: &str| under(&["/usr/bin/python3", "-c", code]);
    let o = python("import socket; [socket.socket(f, socket.SOCK_DGRAM) for f in (1, 2, 10, 16)]");
    assert_eq!(o.code, 0, "what it names works: {o:?}");
    for (what, o) in [
        ("packet sockets", python("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)")),
        ("vsock", python("import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)")),
        ("namespaces", under(&["/usr/bin/unshare", "--net", "true"])),
        ("mounts", under(&["/usr/bin/mount", "-t", "tmpfs", "none", "/mnt"])),
        ("devices", under(&["/usr/bin/mknod", "/tmp/never-made", "p"])),
        ("another root", under(&["/usr/sbin/chroot", "/"])),
    ] {
        let refused = ["not permitted", "permission denied"].iter().any(|w| o.err.to_lowercase().contains(w));
        assert!(o.code != 0 && refused, "{what}: {o:?}");
    }
}
