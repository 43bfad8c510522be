//! Whole processes: a stolen certificate is revoked, and so is a cluster; our proxies, a real Envoy and another cluster hear of it.

#[expect(dead_code, unused_imports, reason = "what is shared is more than this test uses")]
mod support;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::*;

/// How soon everybody has to know.
const SOON: Duration = Duration::from_secs(8);

/// Answers every request for as long as the test lives.
fn serve(address: SocketAddr) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().ok()?);
                loop {
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        if reader.read_line(&mut head).ok()? == 0 {
                            return Some(());
                        }
                    }
                    (&stream).write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes").ok()?;
                }
            });
        }
    });
}

fn ok(c: &Cluster, args: &[&str]) -> String {
    let o = c.flotilla(args);
    assert_eq!(o.code, 0, "{args:?}: {o:?}");
    o.out
}

fn json(c: &Cluster, args: &[&str]) -> Value {
    serde_json::from_str(&ok(c, args)).unwrap()
}

/// What somebody copied of a proxy's state directory: certificate, what lies above it, key.
struct Stolen([String; 3]);

fn steal(c: &Cluster, proxy: &str) -> Stolen {
    const END: &str = "-----END CERTIFICATE-----\n";
    let read = |n: &str| fs::read_to_string(c.proxy_state(proxy).join(n)).unwrap();
    let chain = read("svid-chain.pem");
    let (leaf, above) = chain.split_at(chain.find(END).unwrap() + END.len());
    let parts = [("leaf", leaf.to_owned()), ("above", above.to_owned()), ("key", read("svid-key.pem"))];
    Stolen(parts.map(|(n, content)| {
        let to = c.path(&format!("stolen-{proxy}-{n}.pem"));
        fs::write(&to, content).unwrap();
        to.display().to_string()
    }))
}

/// A session with a stolen certificate, to the port of a service at a workload.
struct Session {
    child: Child,
    input: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Session {
    fn open(to: Ipv4Addr, service: &str, with: &Stolen) -> Self {
        let Stolen([leaf, above, key]) = with;
        let sni = format!("outbound_.9080_._.{service}.{NAMESPACE}.svc.cluster.local");
        let mut child = Command::new("openssl")
            .args(["s_client", "-quiet", "-connect", &format!("{to}:9080"), "-servername", &sni])
            .args(["-alpn", "istio-http/1.1,istio", "-cert", leaf, "-cert_chain", above, "-key", key])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (tx, lines) = mpsc::channel();
        let streams: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for s in streams {
            let tx = tx.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(s).lines().map_while(Result::ok) {
                    let _ = tx.send(line);
                }
            });
        }
        Self { input: child.stdin.take().unwrap(), child, lines }
    }

    /// Whether a request is answered by the application; else what openssl says.
    fn ask(&mut self, service: &str) -> Result<(), String> {
        let request = format!("GET / HTTP/1.1\r\nhost: {service}.{NAMESPACE}:9080\r\n\r\n");
        self.input
            .write_all(request.as_bytes())
            .and_then(|()| self.input.flush())
            .map_err(|e| e.to_string())?;
        let (mut said, begun) = (String::new(), Instant::now());
        while begun.elapsed() < Duration::from_secs(5) {
            match self.lines.recv_timeout(Duration::from_millis(100)) {
                // The status is all that matters; the rest of the answer is read before the next.
                Ok(l) if l.contains("HTTP/1.1 200") => return Ok(()),
                Ok(l) => said = format!("{said}{l}\n"),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        Err(said)
    }

    /// Whether the other side has ended it.
    fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

fn envoy() -> PathBuf {
    std::env::var_os("ENVOY_BIN").expect("ENVOY_BIN: a real Envoy").into()
}

/// An Envoy that drains at once, as its agent says to run it.
fn envoy_sidecar(c: &mut Cluster, program: &Path, name: &str, ip: Ipv4Addr, app: SocketAddr) {
    c.agent(name, ip, app);
    let bootstrap = c.path("envoy.json").display().to_string();
    let args =
        ["-c", &bootstrap, "--use-dynamic-base-id", "--disable-hot-restart", "--concurrency", "1", "-l"];
    let args = [&args[..], &["warning", "--drain-strategy", "immediate", "--drain-time-s", "2"]].concat();
    c.spawn_program(program, "envoy", &args);
    until("the Envoy", || {
        let a = curl(&[&format!("http://{ip}:15000/ready")]);
        if a.status == 200 { Ok(()) } else { Err(format!("{a:?}")) }
    });
}

fn exported(name: &str, c: &Cluster, n: u8) -> String {
    let export = format!(
        "---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {{name: {name}, namespace: \
         {NAMESPACE}}}\n"
    );
    service(name, c.workload(n), 9080, IN_MESH) + &export
}

fn get(proxy: Ipv4Addr, service: &str) -> Result<(), String> {
    let to = format!("http://{service}.{NAMESPACE}:9080/");
    let a = curl(&["-x", &format!("http://{proxy}:{HTTP_PROXY}"), "-m", "5", &to]);
    if a.status == 200 { Ok(()) } else { Err(format!("{a:?}")) }
}

#[test]
#[ignore = "needs the flotilla binary and an Envoy; cargo verify has both"]
fn a_stolen_certificate_and_a_lost_cluster_are_revoked() {
    let envoy = envoy();
    let (mut west, mut east) =
        (Cluster::start("west", Transport::Tcp), Cluster::start("east", Transport::Tcp));
    west.found();
    west.east_west_gateway();
    west.ready(west.host(3));
    let token = ok(&west, &["token", "create"]);
    ok(&east, &["join-cluster", token.trim()]);
    // West has our proxies; east has an Envoy and one of ours.
    west.write("details.yaml", &exported("details", &west, 1));
    east.write("ratings.yaml", &exported("ratings", &east, 1));
    east.write("reviews.yaml", &exported("reviews", &east, 2));
    east.east_west_gateway();
    east.ready(east.host(3));
    let app = |c: &Cluster, n: u8| SocketAddr::from((c.workload(n + 10), 9080));
    for (c, n) in [(&west, 1), (&east, 1), (&east, 2)] {
        serve(app(c, n));
    }
    let apps = (app(&west, 1), app(&east, 1), app(&east, 2));
    let at = |c: &Cluster, n: u8| c.workload(n);
    let (details, ratings, reviews) = (at(&west, 1), at(&east, 1), at(&east, 2));
    let (thief, bystander) = (at(&west, 3), at(&west, 4));
    west.sidecar("details", details, Some(apps.0));
    envoy_sidecar(&mut east, &envoy, "ratings", ratings, apps.1);
    east.sidecar("reviews", reviews, Some(apps.2));
    west.sidecar("thief", thief, None);
    west.sidecar("other", bystander, None);
    [details, thief, bystander].into_iter().for_each(|ip| west.ready(ip));
    east.ready(reviews);
    let targets = [(details, "details"), (ratings, "ratings"), (reviews, "reviews")];
    for from in [thief, bystander] {
        for (_, s) in targets {
            until(&format!("{s} from {from}"), || get(from, s));
        }
    }
    // Somebody copies what the proxy has, and opens sessions with it.
    let stolen = steal(&west, "thief");
    let other = steal(&west, "other");
    let mut sessions: Vec<_> = targets.iter().map(|(ip, s)| (Session::open(*ip, s, &stolen), *s)).collect();
    let mut others: Vec<_> = targets.iter().map(|(ip, s)| (Session::open(*ip, s, &other), *s)).collect();
    for (session, s) in sessions.iter_mut().chain(&mut others) {
        session.ask(s).unwrap_or_else(|e| panic!("{s}: {e}"));
    }
    let said = ok(&west, &["ca", "revoke", "--identity", "ns/books/sa/thief", "--reason", "keyCompromise"]);
    let begun = Instant::now();
    assert!(said.contains("revoked") && said.contains("/sa/thief"), "{said}");
    // Nobody lets it in again: our proxy, the Envoy, the other cluster's proxy.
    for (ip, s) in targets {
        until(&format!("{s} refuses the stolen certificate"), || {
            match Session::open(ip, s, &stolen).ask(s) {
                Ok(()) => Err("it was let in".into()),
                Err(e) if e.contains("certificate revoked") || e.contains("alert number 44") => Ok(()),
                Err(e) => Err(e),
            }
        });
        println!("{s} refuses it after {:.1} s", begun.elapsed().as_secs_f64());
    }
    // And the sessions from before are over.
    for (session, s) in &mut sessions {
        until(&format!("{s} has closed the thief's session"), || {
            if session.ended() { Ok(()) } else { Err("it is open".into()) }
        });
        println!("{s} closed its session after {:.1} s", begun.elapsed().as_secs_f64());
    }
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    // Nobody else is hit: sessions of another workload go on at our proxies, and new ones everywhere.
    for (session, s) in others.iter_mut().filter(|(_, s)| *s != "ratings") {
        session.ask(s).unwrap_or_else(|e| panic!("{s}: {e}"));
    }
    for (_, s) in targets {
        until(&format!("{s} from another workload"), || get(bystander, s));
    }
    // What is revoked is shown, is in the log, and survives the control plane.
    let shown = json(&west, &["ca", "show", "-o", "json"]);
    let revoked = shown["revoked"].as_array().unwrap();
    assert!(
        !revoked.is_empty() && revoked.iter().all(|r| r["of"] == "spiffe://mesh.local/ns/books/sa/thief")
    );
    assert!(ok(&west, &["ca", "audit"]).contains("revoked serial"));
    for c in [&mut west, &mut east] {
        c.kill("control-plane");
        c.control_plane();
    }
    for (ip, s) in targets {
        assert!(Session::open(ip, s, &stolen).ask(s).is_err(), "{s} after a restart");
    }
    // With its old token the workload gets nothing, with a new one it is back.
    assert!(get(thief, "details").is_err());
    let fresh = ok(&west, &["token", "workload", "--namespace", NAMESPACE, "--service-account", "thief"]);
    fs::write(west.path("tokens").join("thief"), fresh.trim()).unwrap();
    for (_, s) in targets {
        until(&format!("{s} from the workload with a new certificate"), || get(thief, s));
    }
    for (ip, s) in targets {
        assert!(Session::open(ip, s, &stolen).ask(s).is_err(), "{s}: the old one stays revoked");
    }

    // The founder takes back what a whole cluster can sign.
    let theirs = steal(&east, "reviews");
    Session::open(details, "details", &theirs).ask("details").unwrap();
    let refused = east.flotilla(&["ca", "revoke", "--cluster", "west"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    ok(&west, &["ca", "revoke", "--cluster", "east", "--reason", "cACompromise"]);
    let begun = Instant::now();
    until("west refuses what east has signed", || {
        match Session::open(details, "details", &theirs).ask("details") {
            Ok(()) => Err("it was let in".into()),
            Err(e) if e.contains("certificate revoked") || e.contains("alert number 44") => Ok(()),
            Err(e) => Err(e),
        }
    });
    until("west is connected to east no more", || {
        let v = json(&west, &["clusters", "-o", "json"]);
        let east = v["clusters"].as_array().into_iter().flatten().find(|c| c["cluster"] == "east").cloned();
        match east {
            Some(c) if c["state"] == "connected" => Err(format!("{c}")),
            _ => Ok(()),
        }
    });
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    get(bystander, "details").unwrap();
}
