//! A real Consul agent for the tests of Consul as a registry.
//!
//! Debian 12 has no package of it, Debian 11 has 1.8.7. That is fetched by name with lists of its own, so that the
//! machine's are left alone, and unpacked instead of installed: installing it would start an agent.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

use crate::spawn;

/// The suite that has it.
const SUITE: &str = "bullseye";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Puts an agent into `tools`, unless there is one or `CONSUL_BIN` names another.
///
/// # Errors
/// It cannot be fetched.
pub(crate) fn fetch(tools: &Path) -> anyhow::Result<()> {
    eprintln!("  Debian consul, of {SUITE}: a registry of services");
    if std::env::var_os("CONSUL_BIN").is_some() || tools.join("consul").is_file() {
        return Ok(());
    }
    let work = std::path::absolute(tools.join("consul.new"))?;
    fs::create_dir_all(work.join("lists/partial"))?;
    unpack(&work).context("no Consul agent; CONSUL_BIN may name one")?;
    fs::rename(work.join("package/usr/bin/consul"), tools.join("consul"))
        .context("the package has no agent")?;
    fs::remove_dir_all(work)?;
    Ok(())
}

fn unpack(work: &Path) -> anyhow::Result<()> {
    let list = work.join("sources.list");
    fs::write(&list, format!("deb [signed-by={KEYRING}] {} {SUITE} main\n", mirror()?))?;
    let apt = |args: &[&str]| {
        let mut c = Command::new("apt-get");
        let option = |key: &str, value: String| ["-o".to_owned(), format!("{key}={value}")];
        c.current_dir(work).args(args).args(["-qq"]);
        c.args(option("Dir::Etc::sourcelist", list.display().to_string()));
        c.args(option("Dir::Etc::sourceparts", "-".to_owned()));
        c.args(option("Dir::State::lists", work.join("lists").display().to_string()));
        c.args(option("Dir::Cache::pkgcache", String::new()));
        c.args(option("Dir::Cache::srcpkgcache", String::new()));
        // Without it a warning tells that another user cannot write into this directory.
        c.args(option("APT::Sandbox::User", "root".to_owned()));
        c
    };
    spawn(apt(&["update"]))?;
    spawn(apt(&["download", "consul"]))?;
    let mut c = Command::new("dpkg-deb");
    c.current_dir(work).arg("-x").arg(package(work)?).arg("package");
    spawn(c)
}

/// Where this machine has its Debian packages from.
fn mirror() -> anyhow::Result<String> {
    let filters = ["Created-By: Packages", "Origin: Debian", "Label: Debian"];
    let out =
        Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)"]).args(filters).output()?;
    let all = String::from_utf8(out.stdout)?;
    let Some(first) = all.lines().next() else { bail!("this machine has no sources of Debian packages") };
    Ok(first.to_owned())
}

fn package(work: &Path) -> anyhow::Result<PathBuf> {
    let mut names = fs::read_dir(work)?.flatten().map(|e| e.path());
    names.find(|p| p.extension().is_some_and(|e| e == "deb")).context("no package was downloaded")
}
