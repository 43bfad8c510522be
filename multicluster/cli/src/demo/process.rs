//! Processes of the demo: this very program in other roles, each with its log file.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context;
use tokio::process::{Child, Command};

/// Told to every child: end with the parent, however the parent ends.
pub(crate) const DIE_WITH_PARENT: &str = "FLOTILLA_DIE_WITH_PARENT";

/// A running process; dropping it kills it.
pub(crate) struct Process {
    pub(crate) name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts this program with `args`.
    pub(crate) fn start(name: &str, logs: &Path, args: &[String]) -> anyhow::Result<Self> {
        let exe = std::env::current_exe().context("this program's path")?;
        let log = logs.join(format!("{name}.log"));
        let out = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| log.display().to_string())?;
        let child = Command::new(exe)
            .args(args)
            .env(DIE_WITH_PARENT, "1")
            .env("HTTP_PROXY", "")
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// SIGKILL, and waits for the end.
    pub(crate) async fn kill(&mut self) {
        // A process that has ended already is as dead as wanted.
        let _ = self.child.kill().await;
    }

    /// Says so if the process has ended by itself.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            anyhow::bail!("{} ended ({status}):\n    {}", self.name, tail.join("\n    "));
        }
        Ok(())
    }
}

/// Runs this program as a command of an operator; answers with exit code, output and errors.
pub(crate) async fn command(args: &[&str]) -> anyhow::Result<(i32, String, String)> {
    let exe = std::env::current_exe().context("this program's path")?;
    let run = Command::new(exe).args(args).stdin(Stdio::null()).kill_on_drop(true).output();
    let out = tokio::time::timeout(Duration::from_secs(60), run)
        .await
        .with_context(|| format!("flotilla {}: no end within a minute", args.join(" ")))??;
    let text = |b: &[u8]| String::from_utf8_lossy(b).trim().to_owned();
    Ok((out.status.code().unwrap_or(-1), text(&out.stdout), text(&out.stderr)))
}
