//! The Kubernetes API server for the tests with one, and its etcd.
//!
//! The server is built from the Go module registry (`e2e/foreign/kubernetes`), since nobody packages it for Debian. That is
//! the reason why these tests are not part of every run: 570 s of processor time from nothing, of which two cores make five
//! minutes. etcd is Debian's.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{installed, is_root, spawn};

/// Builds the server into `tools`, unless one is there or named, and installs etcd.
///
/// # Errors
/// One of them is missing and cannot be had.
pub(crate) fn fetch(root: &Path, tools: &Path) -> anyhow::Result<()> {
    let etcd = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !etcd.is_ok_and(|s| s.success()) && !installed("etcd-server") {
        if !is_root() {
            bail!("no etcd: install Debian's etcd-server");
        }
        eprintln!("  Debian etcd-server: where an API server keeps its objects (to be installed)");
        let mut c = Command::new("apt-get");
        c.args(["install", "-y", "-qq", "--no-install-recommends", "etcd-server"]);
        c.env("DEBIAN_FRONTEND", "noninteractive");
        spawn(c)?;
    }
    let program = std::path::absolute(tools)?.join("kube-apiserver");
    if std::env::var_os("KUBE_APISERVER_BIN").is_some() || program.is_file() {
        return Ok(());
    }
    eprintln!(
        "  Go k8s.io/kubernetes/cmd/kube-apiserver: an API server that is not ours, built from source: minutes"
    );
    let mut c = Command::new("go");
    c.current_dir(root.join("e2e/foreign/kubernetes"));
    c.args(["build", "-trimpath", "-ldflags", "-s -w", "-o"]).arg(&program);
    spawn(c).context("kube-apiserver needs Go 1.26 or newer")
}
