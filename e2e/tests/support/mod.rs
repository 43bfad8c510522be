//! What tests of whole processes share: clusters on loopback addresses of their own, certificates,
//! small servers, and the clients that people use (`curl`, `openssl s_client`).

mod certs;
mod clients;
mod cluster;
mod servers;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

pub(crate) use certs::Authority;
pub(crate) use clients::TlsClient;
pub(crate) use cluster::{Cluster, HTTP_PROXY, IN_MESH, NAMESPACE, SYSTEM, Transport, mesh, service};
pub(crate) use servers::{HttpServer, TlsServer};

/// How long a change of configuration or a start may take on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// The binary under test.
pub(crate) fn flotilla() -> PathBuf {
    flotilla_e2e::programs::flotilla().unwrap()
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs a command to its end, without the environment's proxies.
pub(crate) fn run(program: impl AsRef<Path>, args: &[&str]) -> Outcome {
    let program = program.as_ref();
    let mut command = Command::new(program);
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(name);
    }
    let o = command
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    Outcome { code: o.status.code().unwrap_or(-1), out: text(o.stdout), err: text(o.stderr) }
}

/// What `curl` got.
#[derive(Debug)]
#[expect(dead_code, reason = "all fields show in failures")]
pub(crate) struct Answer {
    /// Exit code of curl: 0 if there was an answer, whatever its status.
    pub(crate) code: i32,
    pub(crate) status: u16,
    pub(crate) location: String,
    pub(crate) body: String,
    pub(crate) err: String,
}

/// Runs `curl`.
pub(crate) fn curl(args: &[&str]) -> Answer {
    let mut all = vec!["-sS", "--max-time", "10", "--noproxy", "", "-w", "\n%{http_code} %{redirect_url}"];
    all.extend(args);
    let o = run("curl", &all);
    let (body, last) = o.out.rsplit_once('\n').unwrap_or(("", &o.out));
    let (status, location) = last.split_once(' ').unwrap_or((last, ""));
    Answer {
        code: o.code,
        status: status.parse().unwrap_or(0),
        location: location.to_owned(),
        body: body.to_owned(),
        err: o.err,
    }
}

/// Repeats `f` until it answers; fails with what it said last.
pub(crate) fn until<T>(what: &str, mut f: impl FnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match f() {
            Ok(t) => return t,
            Err(last) if begun.elapsed() > SOON => panic!("{what}: not within {SOON:?}: {last}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Repeats a request until it has this status.
pub(crate) fn until_status(what: &str, status: u16, args: &[&str]) -> Answer {
    until(what, || {
        let a = curl(args);
        if a.status == status { Ok(a) } else { Err(format!("{a:?}")) }
    })
}

/// The value of a metric without labels on a Prometheus page; 0 if it is not there.
pub(crate) fn metric(page: SocketAddr, name: &str) -> f64 {
    curl(&[&format!("http://{page}/stats/prometheus")])
        .body
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .unwrap_or(0.0)
}
