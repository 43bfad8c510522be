//! Programs under test: where they are and how they are run.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

/// The one binary: `FLOTILLA_BIN`, else the newest build of this workspace.
///
/// # Errors
/// There is none; the error says how to build it.
pub fn flotilla() -> anyhow::Result<PathBuf> {
    if let Some(p) = std::env::var_os("FLOTILLA_BIN") {
        let p = PathBuf::from(p);
        if !p.is_file() {
            bail!("FLOTILLA_BIN: {} does not exist", p.display());
        }
        return Ok(p);
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    ["release", "debug"]
        .iter()
        .map(|profile| target.join(profile).join("flotilla"))
        .filter_map(|p| Some((p.metadata().ok()?.modified().ok()?, p)))
        .max()
        .map(|(_, p)| p)
        .with_context(|| {
            format!(
                "no flotilla in {}: `cargo build --bin flotilla` builds it, or set FLOTILLA_BIN",
                target.display()
            )
        })
}

/// The Python with the packages that `cargo verify` installs: `FLOTILLA_PYTHON`, else that of its environment.
#[must_use]
pub fn venv_python() -> String {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    std::env::var("FLOTILLA_PYTHON")
        .unwrap_or_else(|_| target.join("verify-venv/bin/python").display().to_string())
}

/// The Consul agent: `CONSUL_BIN`, else the one that `cargo verify` fetches.
///
/// # Errors
/// There is none; the error says how to get it.
pub fn consul() -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let path = std::env::var_os("CONSUL_BIN").map_or_else(|| target.join("tools/consul"), PathBuf::from);
    if !path.is_file() {
        bail!("no Consul agent at {}: `cargo verify` fetches one, or set CONSUL_BIN", path.display());
    }
    Ok(path)
}

/// The Kubernetes API server: `KUBE_APISERVER_BIN`, else the one that `cargo verify --with kubernetes` builds.
///
/// # Errors
/// There is none; the error says how to get it.
pub fn kube_apiserver() -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let path = std::env::var_os("KUBE_APISERVER_BIN")
        .map_or_else(|| target.join("tools/kube-apiserver"), PathBuf::from);
    if !path.is_file() {
        bail!(
            "no Kubernetes API server at {}: `cargo verify --with kubernetes` builds one, or set KUBE_APISERVER_BIN",
            path.display()
        );
    }
    Ok(path)
}

/// What a command said.
#[derive(Debug, Clone)]
pub struct Said {
    /// Exit code; -1 after a signal.
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    /// The output of a command that must succeed.
    ///
    /// # Errors
    /// It did not.
    pub fn ok(self, what: &str) -> anyhow::Result<String> {
        if self.code != 0 {
            bail!("{what}: exit code {}: {}{}", self.code, self.out, self.err);
        }
        Ok(self.out)
    }
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started.
pub fn run(program: &str, args: &[&str]) -> anyhow::Result<Said> {
    let out = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program} cannot be run; is it installed?"))?;
    let text = |b: &[u8]| String::from_utf8_lossy(b).trim().to_owned();
    Ok(Said { code: out.status.code().unwrap_or(-1), out: text(&out.stdout), err: text(&out.stderr) })
}

/// Runs a command that must succeed, given as words.
///
/// # Errors
/// It cannot be started or fails.
pub fn must(line: &str) -> anyhow::Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (program, args) = words.split_first().context("no command")?;
    run(program, args)?.ok(line)
}

/// A running program with its log; dropping it kills it.
pub struct Process {
    /// Name of the process and of its log file.
    pub name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with output to `<logs>/<name>.log`.
    ///
    /// # Errors
    /// The log cannot be written or the program not started.
    pub fn start(name: &str, logs: &Path, command: &[String]) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let out = File::options().create(true).append(true).open(&log)?;
        let (program, args) = command.split_first().context("no command")?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// `kill -9`, and waits for the end.
    pub fn kill(&mut self) {
        // A process that has ended already is as dead as wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the end, which is to be a success.
    ///
    /// # Errors
    /// It fails, or does not end within `limit`.
    pub fn ends_well(&mut self, limit: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                if !status.success() {
                    bail!("{}: {status}, see {}", self.name, self.log.display());
                }
                return Ok(());
            }
            if begun.elapsed() > limit {
                bail!("{} has not ended within {limit:?}", self.name);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// SIGTERM, and waits for the end; answers how long that took.
    ///
    /// # Errors
    /// The program had ended already, or does not end within `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> anyhow::Result<Duration> {
        self.check()?;
        let begun = Instant::now();
        must(&format!("kill -TERM {}", self.child.id()))?;
        while self.child.try_wait()?.is_none() {
            if begun.elapsed() > limit {
                bail!("{} has not ended {limit:?} after SIGTERM", self.name);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(begun.elapsed())
    }

    /// Process ID.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Says so if the process has ended by itself.
    ///
    /// # Errors
    /// It has.
    pub fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = self.log();
            let from = log.lines().count().saturating_sub(5);
            let tail: Vec<&str> = log.lines().skip(from).collect();
            bail!("{} ended ({status}):\n    {}", self.name, tail.join("\n    "));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
