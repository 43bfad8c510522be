//! `flotilla dns` beside a control plane: from its token to answers, and without the control plane.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long a start may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const BIN: &str = env!("CARGO_BIN_EXE_flotilla");
const SERVICES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: ratings, namespace: books}
spec:
  selector: {app: ratings}
  ports: [{name: http, port: 9080}]
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {name: ratings, namespace: books}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: books}
spec:
  clusterIP: None
  selector: {app: db}
  ports: [{name: sql, port: 5432}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: db-0, namespace: books}
spec: {address: 10.9.0.1, labels: {app: db}}
---
";

/// A process that ends with the test.
struct Process(Child);

impl Process {
    fn start(args: &[String]) -> Self {
        Self(Command::new(BIN).args(args).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap())
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // What has ended already is as dead as wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(begun.elapsed() < SOON, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn get(address: SocketAddr, path: &str) -> Option<String> {
    let mut s = TcpStream::connect(address).ok()?;
    write!(s, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    s.read_to_string(&mut text).ok()?;
    Some(text)
}

fn packet(name: &str, kind: u8) -> Vec<u8> {
    let mut p = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        p.push(u8::try_from(label.len()).unwrap());
        p.extend(label.bytes());
    }
    p.extend([0, 0, kind, 0, 1]);
    p
}

/// Code and number of answers.
fn ask(server: SocketAddr, name: &str, kind: u8) -> Option<(u8, u8, Vec<u8>)> {
    let s = UdpSocket::bind("127.0.0.1:0").unwrap();
    s.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
    s.send_to(&packet(name, kind), server).unwrap();
    let mut buf = [0; 1500];
    let n = s.recv(&mut buf).ok()?;
    Some((buf[3] & 0xf, buf[7], buf[..n].to_vec()))
}

fn flags(command: &str, list: &[(&str, String)]) -> Vec<String> {
    std::iter::once(command.to_owned()).chain(list.iter().map(|(k, v)| format!("--{k}={v}"))).collect()
}

fn output(args: &[&str]) -> Option<String> {
    let o = Command::new(BIN).args(args).output().unwrap();
    o.status.success().then(|| String::from_utf8(o.stdout).unwrap())
}

#[test]
fn a_cluster_resolver_lives_with_and_without_its_control_plane() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::create_dir(dir.path().join("config")).unwrap();
    std::fs::write(dir.path().join("config/all.yaml"), SERVICES).unwrap();
    let (xds, control_metrics) = (free(), free());
    let control = Process::start(&flags(
        "control-plane",
        &[
            ("cluster", "west".into()),
            ("state-dir", at("state")),
            ("config", at("config")),
            ("xds", xds.to_string()),
            ("metrics", control_metrics.to_string()),
            ("federation", free().to_string()),
            ("mixer", free().to_string()),
            ("gateway-address", "127.0.0.1:15443".into()),
        ],
    ));
    until("found", || output(&["found", "--state-dir", &at("state")]));
    let token = until("token", || {
        output(&[
            "token",
            "workload",
            "--state-dir",
            &at("state"),
            "--namespace",
            "books",
            "--service-account",
            "dns",
        ])
    });
    std::fs::write(dir.path().join("token"), token).unwrap();

    let (listen, readiness, metrics) = (free(), free(), free());
    // Nobody is behind.
    let behind = UdpSocket::bind("127.0.0.1:0").unwrap();
    let args = flags(
        "dns",
        &[
            ("discovery", xds.to_string()),
            ("cluster", "west".into()),
            ("namespace", "books".into()),
            ("service-account", "dns".into()),
            ("root-cert", at("state/ca/root-cert.pem")),
            ("token-file", at("token")),
            ("state-dir", at("dns")),
            ("listen", listen.to_string()),
            ("upstream", behind.local_addr().unwrap().to_string()),
            ("concurrency", "1".into()),
            ("drain-seconds", "2".into()),
            ("readiness", readiness.to_string()),
            ("metrics", metrics.to_string()),
        ],
    );
    let mut dns = Process::start(&args);
    let ready = || get(readiness, "/healthz/ready").is_some_and(|t| t.starts_with("HTTP/1.1 200"));
    until("readiness", || ready().then_some(()));
    let check = || {
        let (code, answers, bytes) = ask(listen, "ratings.books.svc.clusterset.local", 1).unwrap();
        // An address that the mesh assigned.
        assert_eq!((code, answers, &bytes[bytes.len() - 4..][..2]), (0, 1, &[240, 240][..]));
        assert_eq!(ask(listen, "ratings.books.global", 1).unwrap().0, 0);
        let (code, answers, bytes) = ask(listen, "db-0.db.books.svc.cluster.local", 1).unwrap();
        assert_eq!((code, answers, &bytes[bytes.len() - 4..]), (0, 1, &[10, 9, 0, 1][..]));
        assert_eq!(ask(listen, "_sql._tcp.db.books.svc.cluster.local", 33).unwrap().1, 1);
        assert_eq!(ask(listen, "nothing.books.global", 1).unwrap().0, 3);
        let listed = "ratings.books.svc.clusterset.local.books.svc.cluster.local";
        assert_eq!(ask(listen, listed, 1).unwrap().0, 3);
        // A name that is short for somebody is anybody's.
        assert_eq!(ask(listen, "ratings.books", 1).unwrap().0, 2);
    };
    check();
    let shown = get(metrics, "/stats/prometheus").unwrap();
    for line in [
        "flotilla_dns_connected 1",
        "flotilla_dns_queries_total{zone=\"clusterset.local\",rcode=\"NOERROR\"} 1",
        "flotilla_dns_queries_total{zone=\"global\",rcode=\"NXDOMAIN\"} 1",
        "flotilla_dns_upstream_failures_total{upstream=",
    ] {
        assert!(shown.contains(line), "{line} not in {shown}");
    }

    // Without a control plane, and after a restart without one.
    drop(control);
    until("the loss is seen", || get(metrics, "/metrics").filter(|t| t.contains("flotilla_dns_connected 0")));
    check();
    until("the table is kept", || Path::new(&at("dns/xds.cache")).exists().then_some(()));
    dns.terminate();
    until("not ready", || (!ready()).then_some(()));
    assert_eq!(ask(listen, "ratings.books.global", 1).unwrap().0, 0, "it answers while it drains");
    assert!(dns.0.wait().unwrap().success());
    let _dns = Process::start(&args);
    until("readiness", || ready().then_some(()));
    check();
}

#[test]
fn bad_flags_give_one_clear_error() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (args, expected) in [
        (vec!["dns", "--cluster", "west", "--labels", "a=b"], "error: --labels has no effect on a resolver"),
        (vec!["dns", "--cluster", "west", "--upstream", "dns.example"], "expected an IP address, or IP:PORT"),
        (vec!["dns", "--cluster", "west", "--listen", &taken], "error: cannot listen on"),
        (
            vec!["dns", "--cluster", "west", "--listen", "127.0.0.1:25053", "--upstream", "127.0.0.1:25053"],
            "error: upstream 127.0.0.1:25053 is this resolver itself",
        ),
    ] {
        let o = Command::new(BIN).args(&args).output().unwrap();
        let text = String::from_utf8_lossy(&o.stderr);
        assert_eq!(o.status.code(), Some(2), "{args:?}: {text}");
        assert!(text.contains(expected), "{args:?}: {text}");
    }
    let help = output(&["dns", "--help"]).unwrap();
    for flag in ["--listen", "--upstream", "--discovery", "--drain-seconds"] {
        assert!(help.contains(flag), "{help}");
    }
    assert!(!help.contains("--max-streams"), "{help}");
}
