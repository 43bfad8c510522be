//! The samples of `deploy/samples/traffic` about what crosses the mesh's edges: TLS made for callers of a service outside,
//! and an ingress with HTTPS. Clients and the server outside are curl and openssl.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use anyhow::{Context, ensure};
use flotilla_e2e::{
    netns::{Cluster, NAMESPACE, Options, World, exec, until},
    programs::{Process, Said},
};

use crate::{
    certs::Authority,
    support::{scenario, served_from},
    tasks::{in_namespace, sample},
};

const CONVERGE: Duration = Duration::from_secs(10);
/// Root of the server outside, in the samples.
const ROOT: &str = "/etc/flotilla/secure-root.pem";
/// The server outside answers what is not TLS so.
const REDIRECT: &str = "
import http.server
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(301)
        self.send_header('location', 'https://secure.example/')
        self.send_header('content-length', '0')
        self.end_headers()
http.server.ThreadingHTTPServer(('10.10.0.1', 80), H).serve_forever()
";

/// What curl got: its exit code, the status, and the body.
#[derive(Debug, PartialEq)]
pub(crate) struct Got {
    code: i32,
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Got {
    pub(crate) fn of(said: Said) -> Self {
        let (body, status) = said.out.rsplit_once('\n').unwrap_or(("", &said.out));
        Self { code: said.code, status: status.trim().parse().unwrap_or(0), body: body.to_owned() }
    }
}

pub(crate) fn curl<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["curl", "-s", "-m", "5", "-w", "\n%{http_code}"], args].concat()
}

fn world(workloads: Vec<(&'static str, &'static str)>) -> Options {
    Options {
        echo: env!("CARGO_BIN_EXE_flotilla-echo").into(),
        quic: false,
        trunk_transport: "quic",
        gateways: 1,
        namespace: |_| NAMESPACE,
        locality: |_| "",
        clusters: vec![("west", workloads)],
    }
}

/// A file that proxies, which are another user, may read.
pub(crate) fn readable(path: &Path) -> anyhow::Result<String> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    Ok(path.display().to_string())
}

/// The process was started as root, and has given that up for good, but for ports below 1024 (capability 10).
fn no_root(status: &str) -> anyhow::Result<()> {
    let value = |name: &str| {
        let mut lines = status.lines().filter_map(|l| l.split_once(':'));
        lines.find(|(n, _)| *n == name).map(|(_, v)| v.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let own = format!("{:016x}", 1 << 10);
    for (name, expected) in [
        ("Uid", "1337 1337 1337 1337"),
        ("Gid", "1337 1337 1337 1337"),
        ("Groups", ""),
        ("NoNewPrivs", "1"),
        ("CapPrm", &own),
        ("CapEff", &own),
        ("CapBnd", &own),
    ] {
        ensure!(value(name).as_deref() == Some(expected), "{name} is not {expected:?}:\n{status}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn tls_is_made_for_callers() {
    scenario("samples of TLS origination", async || {
        let mut world = World::start(&world(vec![("client", "v1")])).await?;
        let (dir, west) = (world.dir.clone(), &mut world.clusters[0]);
        west.write("mesh.yaml", &sample("registry-only.yaml")?)?;
        let (root, other) = (Authority::new("outside"), Authority::new("somebody"));
        root.write_root(&dir.join("root.pem"));
        other.write_root(&dir.join("other.pem"));
        let (root_file, other_file) = (readable(&dir.join("root.pem"))?, readable(&dir.join("other.pem"))?);
        let (crt, key) = root.issue(&dir.join("outside"), "secure.example");
        let node = west.netns("node");
        let start = |name: &str, args: &[&str]| {
            let all: Vec<String> =
                ["ip", "netns", "exec", &node].iter().chain(args).map(|s| (*s).to_owned()).collect();
            Process::start(name, &dir, &all)
        };
        let _plain = start("redirects", &["python3", "-c", REDIRECT])?;
        let _tls = start(
            "outside",
            &[
                "openssl",
                "s_server",
                "-www",
                "-quiet",
                "-accept",
                "10.10.0.1:443",
                "-cert",
                &crt,
                "-key",
                &key,
            ],
        )?;
        // As an application does it, which knows nothing of TLS.
        let get = |west: &Cluster| west.as_app("client", &curl(&["http://secure.example/"])).map(Got::of);
        let seen = async |west: &Cluster, what: &str, good: &dyn Fn(&Got) -> bool| {
            until(what, CONVERGE, async || {
                let got = get(west)?;
                ensure!(good(&got), "{got:?}");
                Ok(())
            })
            .await
        };
        // The status page of openssl tells of the session that it came over.
        let over_tls = |g: &Got| g.status == 200 && g.body.contains("TLSv1.3");
        let with_root = |name: &str, file: &str| -> anyhow::Result<String> {
            let text = sample(name)?;
            ensure!(text.contains(ROOT), "{name} names no root");
            Ok(in_namespace(&text.replace(ROOT, file)))
        };

        west.write("secure.yaml", &in_namespace(&sample("secure.yaml")?))?;
        seen(west, "a redirect", &|g| g.status == 301).await?;
        println!("   secure: 301");
        west.write("secure.yaml", &with_root("tls-origination.yaml", &root_file)?)?;
        seen(west, "TLS", &over_tls).await?;
        println!("   tls-origination: 200 over TLS");
        west.write("secure.yaml", &with_root("tls-origination.yaml", &other_file)?)?;
        seen(west, "another root", &|g| g.status == 503).await?;
        println!("   tls-origination with another root: 503");

        let ip = west.start_edge("egress", 40).await?;
        west.write(
            "egressgateway.yaml",
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: egressgateway, namespace: flotilla-system}}\nspec:\n  \
                 selector: {{istio: egressgateway}}\n  ports: [{{name: http, port: 80}}]\n---\napiVersion: \
                 networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: egress, namespace: flotilla-system}}\nspec: \
                 {{address: {ip}, serviceAccount: egress, labels: {{istio: egressgateway}}}}\n"
            ),
        )?;
        west.write("secure.yaml", &with_root("egress-gateway.yaml", &root_file)?)?;
        seen(west, "TLS through the gateway", &over_tls).await?;
        let mut line = String::new();
        until("the gateway's log", CONVERGE, async || {
            let log = west.log("egress-proxy");
            line = log
                .lines()
                .find(|l| l.contains("secure.example") && l.contains(" 200 "))
                .unwrap_or("")
                .to_owned();
            ensure!(line.contains("10.10.0.1:443"), "{log}");
            Ok(())
        })
        .await?;
        println!("   egress-gateway: 200 over TLS, and the gateway's log has it");
        Ok(())
    });
}

/// Puts a credential where a gateway looks for it.
fn credential(
    west: &Cluster,
    authority: &Authority,
    name: &str,
    clients: Option<&Authority>,
) -> anyhow::Result<()> {
    let dir = west.edge_credentials("ingress").join(name);
    authority.issue(&dir, &format!("{name}.example"));
    if let Some(c) = clients {
        c.write_root(&dir.join("ca.crt"));
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
    for file in fs::read_dir(&dir)? {
        readable(&file?.path())?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root and network namespaces"]
fn the_ingress_serves_https() {
    scenario("samples of an ingress with HTTPS", async || {
        let mut world = World::start(&world(vec![("client", "v1"), ("httpbin", "v1")])).await?;
        let (dir, west) = (world.dir.clone(), &mut world.clusters[0]);
        served_from(west.workload("client"), "httpbin", &["west"]).await?;
        let ip = west.start_edge("ingress", 41).await?;
        no_root(&west.kernel_status("ingress")?)?;
        let (first, second, clients) =
            (Authority::new("first"), Authority::new("second"), Authority::new("clients"));
        credential(west, &first, "httpbin", None)?;
        credential(west, &second, "shop", None)?;
        credential(west, &first, "partner", Some(&clients))?;
        let (first_root, second_root) =
            (first.write_root(&dir.join("first.pem")), second.write_root(&dir.join("second.pem")));
        // From outside of every workload.
        let node = west.netns("node");
        let get = |args: &[&str]| exec(&node, &curl(args)).map(Got::of);
        let to = |host: &str| format!("{host}:443:{ip}");

        west.write("ingress.yaml", &in_namespace(&sample("ingress.yaml")?))?;
        let host = |h: &str, path: &str| get(&["-H", &format!("host: {h}"), &format!("http://{ip}{path}")]);
        until("the ingress", CONVERGE, async || {
            let got = host("httpbin.example", "/status/200")?;
            ensure!(got.status == 200, "{got:?}");
            Ok(())
        })
        .await?;
        for (h, path, status) in [
            ("httpbin.example", "/delay/0", 200),
            ("httpbin.example", "/headers", 404),
            ("other.example", "/status/200", 404),
        ] {
            let got = host(h, path)?;
            ensure!(got.status == status, "{h}{path}: {got:?}");
        }
        println!("   ingress: 200 for /status and /delay, 404 for another path or host");

        west.write("ingress.yaml", &in_namespace(&sample("ingress-https.yaml")?))?;
        let https = |h: &str, root: &str, more: &[&str]| {
            let (to, url) = (to(h), format!("https://{h}/status/200"));
            get(&[&["--resolve", &to, "--cacert", root, url.as_str()], more].concat())
        };
        until("HTTPS", CONVERGE, async || {
            let got = https("httpbin.example", &first_root, &[])?;
            ensure!(got.status == 200, "{got:?}");
            Ok(())
        })
        .await?;
        let got = https("shop.example", &second_root, &[])?;
        ensure!(got.status == 200, "{got:?}");
        for (h, root) in [("httpbin.example", &second_root), ("shop.example", &first_root)] {
            let got = https(h, root, &[])?;
            ensure!((got.code, got.status) == (60, 0), "{h} has another host's certificate: {got:?}");
        }
        let got = get(&[
            "--resolve",
            &to("httpbin.example"),
            "--cacert",
            &first_root,
            "https://httpbin.example/headers",
        ])?;
        ensure!(got.status == 404, "{got:?}");
        println!("   ingress-https: two hosts with a certificate each, and another root is not believed");

        let got = https("partner.example", &first_root, &[])?;
        ensure!(got.code != 0 && got.status == 0, "a client without certificate: {got:?}");
        for (who, authority, allowed) in [("alice", &clients, true), ("mallory", &second, false)] {
            let (crt, key) = authority.issue(&dir.join(who), who);
            let got = https("partner.example", &first_root, &["--cert", &crt, "--key", &key])?;
            ensure!((got.status == 200) == allowed && (got.code == 0) == allowed, "{who}: {got:?}");
        }
        println!("   ingress-https, MUTUAL: a client with a certificate of its root, and nobody else");

        // Of a class there is one in a cluster.
        let text = sample("kubernetes-ingress.yaml")?;
        let (class, ingress) = text.split_once("---\n").context("two documents")?;
        west.write("ingress.yaml", &format!("{class}---\n{}", in_namespace(ingress)))?;
        until("an Ingress of Kubernetes", CONVERGE, async || {
            let got = host("httpbin.example", "/status/200")?;
            ensure!(got.status == 200, "{got:?}");
            let got = https("partner.example", &first_root, &[])?;
            ensure!(got.code != 0, "its Gateway is gone: {got:?}");
            Ok(())
        })
        .await?;
        let got = https("httpbin.example", &first_root, &[])?;
        ensure!(got.status == 200, "{got:?}");
        for (h, path, status) in [
            ("httpbin.example", "/delay/0", 200),
            ("httpbin.example", "/delay/1", 404),
            ("httpbin.example", "/statuses", 404),
            ("shop.example", "/status/200", 404),
        ] {
            let got = host(h, path)?;
            ensure!(got.status == status, "{h}{path}: {got:?}");
        }
        println!("   kubernetes-ingress: 200 for its paths over HTTP and HTTPS, 404 for others");
        west.admin("ingress", "/ready").context("the ingress runs on").map(drop)
    });
}
