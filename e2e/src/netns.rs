//! Clusters as network namespaces on one Linux machine, with real interception. Needs root.
//!
//! Every workload, gateway and control plane is a namespace on the bridge of its cluster, and all
//! clusters have the *same* pod range: an address of one means something else in the next. Only
//! gateways have a second interface, into the namespace of the wide-area link ([`crate::wan`]).
//! Applications run as an ordinary user, proxies as user and group 1337, and what applications send
//! is captured by the rules that `flotilla iptables` installs.
//!
//! Names start with `flt<pid>`. A janitor process, started first, waits for the end of a pipe that
//! this process holds: however this process ends, the janitor then kills what runs in the namespaces
//! and deletes them.

mod cluster;
mod janitor;

use std::{
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

pub use self::cluster::{Cluster, NAMESPACE, Workload};
use self::janitor::Janitor;
use crate::{
    programs::{self, Said, must},
    wan::{Rule, Wan},
};

/// User and group of proxies.
const PROXY_UID: u32 = 1337;
/// User of applications.
pub const APP_UID: u32 = 1000;

/// What to build.
#[derive(Debug, Clone)]
pub struct Options {
    /// The echo program.
    pub echo: PathBuf,
    /// Whether gateways speak QUIC to each other, with TCP behind it.
    pub quic: bool,
    /// What carries new sessions then: `--trunk-transport` of the gateways.
    pub trunk_transport: &'static str,
    /// East-west gateways of each cluster, 1 to 9.
    pub gateways: usize,
    /// Per cluster: its name and its workloads as `(service, version)`.
    pub clusters: Vec<(&'static str, Vec<(&'static str, &'static str)>)>,
    /// Namespace (of the mesh) of a service; [`NAMESPACE`] in most worlds.
    pub namespace: fn(&str) -> &'static str,
    /// Where a workload runs, `region/zone`, by its version.
    pub locality: fn(&str) -> &'static str,
}

/// Clusters and the link between them; dropping it takes everything down.
pub struct World {
    pub clusters: Vec<Cluster>,
    pub wan: Wan,
    /// Directory of logs, state and configuration of this world.
    pub dir: PathBuf,
    // Last, so that namespaces go when nothing of ours runs in them any more.
    _janitor: Janitor,
}

impl World {
    /// Builds namespaces, founds the mesh in the first cluster, lets the others join, and waits until
    /// every proxy is ready.
    ///
    /// # Errors
    /// Not root, a missing tool, or a part that does not come up.
    pub async fn start(options: &Options) -> anyhow::Result<Self> {
        Self::start_over(options, Rule::CLEAN).await
    }

    /// The same over a link that is so from the first frame.
    ///
    /// # Errors
    /// As [`World::start`].
    pub async fn start_over(options: &Options, link: Rule) -> anyhow::Result<Self> {
        Self::build(options, &[], link).await
    }

    /// The same, with clusters of these names behind NAT: their gateways announce no address, and no connection to
    /// them from the link gets in.
    ///
    /// # Errors
    /// As [`World::start`].
    pub async fn start_hidden(options: &Options, hidden: &[&str]) -> anyhow::Result<Self> {
        Self::build(options, hidden, Rule::CLEAN).await
    }

    async fn build(options: &Options, hidden: &[&str], link: Rule) -> anyhow::Result<Self> {
        let begun = Instant::now();
        static WORLDS: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            bail!("network namespaces need root");
        }
        janitor::sweep();
        let prefix = format!("flt{}w{}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(&prefix);
        let janitor = Janitor::start(&prefix, &dir)?;
        std::fs::create_dir_all(&dir)?;
        // Applications and proxies run as other users and have directories of their own below.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o711))?;
        // Copies, since other users may not enter the directory of the build.
        let flotilla = public_copy(&programs::flotilla()?, &dir)?;
        let options = &Options { echo: public_copy(&options.echo, &dir)?, ..options.clone() };

        let wan = format!("{prefix}-wan");
        namespace(&wan)?;
        let mut clusters = Vec::new();
        let mut ports = Vec::new();
        for (n, (name, workloads)) in options.clusters.iter().enumerate() {
            let c = Cluster::build(n, name, workloads, &prefix, &dir, &flotilla, options)?
                .hidden(hidden.contains(name));
            ports.extend(c.join_wan(&wan)?);
            clusters.push(c);
        }
        let wan = Wan::start(&wan, &ports)?;
        wan.set_all(link);
        let mut world = Self { clusters, wan, dir, _janitor: janitor };
        world.bring_up().await?;
        println!(
            "  {} clusters up and joined after {:.1} s",
            world.clusters.len(),
            begun.elapsed().as_secs_f64()
        );
        Ok(world)
    }

    async fn bring_up(&mut self) -> anyhow::Result<()> {
        for c in &mut self.clusters {
            c.start_control_plane()?;
        }
        for c in &mut self.clusters {
            c.control_plane_ready().await?;
        }
        self.clusters[0].flotilla(&["found"])?.ok("found")?;
        self.clusters[0].start_data_plane()?;
        self.clusters[0].data_plane_ready().await?;
        for n in 1..self.clusters.len() {
            self.join(n)?;
            self.clusters[n].start_data_plane()?;
        }
        for c in &mut self.clusters {
            c.data_plane_ready().await?;
        }
        Ok(())
    }

    /// Sets what happens to frames from one cluster to another, counted in the order of the options.
    pub fn link(&self, from: usize, to: usize, rule: Rule) {
        let ports = |n: usize| {
            let first: usize = self.clusters[..n].iter().map(Cluster::gateways).sum();
            first..first + self.clusters[n].gateways()
        };
        for (from, to) in ports(from).flat_map(|f| ports(to).map(move |t| (f, t))) {
            self.wan.set(from, to, rule);
        }
    }

    /// Lets a cluster join with a token of the first.
    ///
    /// # Errors
    /// No token, or the join is refused.
    pub fn join(&mut self, n: usize) -> anyhow::Result<()> {
        if self.clusters[0].is_hidden() && !self.clusters[n].is_hidden() {
            return self.clusters[0].dial_newcomer(&self.clusters[n]);
        }
        let token = self.clusters[0].flotilla(&["token", "create"])?.ok("token create")?;
        self.clusters[n].flotilla(&["join-cluster", &token])?.ok("join-cluster")?;
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // For looking around: seconds to stay up when a scenario has ended.
        if let Some(s) = std::env::var("FLOTILLA_E2E_HOLD").ok().and_then(|s| s.parse().ok())
            && s > 0
        {
            println!("   holding {} for {s} s", self.dir.display());
            std::thread::sleep(Duration::from_secs(s));
        }
    }
}

/// Copies a program to where every user can run it.
fn public_copy(program: &Path, dir: &Path) -> anyhow::Result<PathBuf> {
    let to = dir.join(program.file_name().context("a program's path")?);
    if to.exists() {
        return Ok(to);
    }
    std::fs::copy(program, &to).with_context(|| program.display().to_string())?;
    std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755))?;
    Ok(to)
}

/// Creates a namespace with a loopback interface and without IPv6.
fn namespace(name: &str) -> anyhow::Result<()> {
    must(&format!("ip netns add {name}"))?;
    must(&format!("ip -n {name} link set lo up"))?;
    must(&format!("ip netns exec {name} sysctl -qw net.ipv6.conf.all.disable_ipv6=1"))?;
    Ok(())
}

/// Runs a command in a namespace.
///
/// # Errors
/// It cannot be started.
pub fn exec(namespace: &str, args: &[&str]) -> anyhow::Result<Said> {
    let mut all = vec!["netns", "exec", namespace];
    all.extend(args);
    programs::run("ip", &all)
}

/// A socket for datagrams in a namespace, whatever thread uses it.
///
/// # Errors
/// No such namespace, or the address cannot be bound there.
pub fn socket(namespace: &str, address: &str) -> anyhow::Result<std::net::UdpSocket> {
    let (namespace, address) = (namespace.to_owned(), address.to_owned());
    // The namespace is a property of a thread, so one does this and ends.
    let bind = std::thread::spawn(move || {
        crate::wan::enter(&namespace)?;
        std::net::UdpSocket::bind(&address).with_context(|| format!("{address} in {namespace}"))
    });
    bind.join().map_err(|_| anyhow::anyhow!("the thread that binds ended"))?
}

/// The command line that runs `args` in a namespace as a user.
fn as_user(namespace: &str, uid: u32, args: Vec<String>) -> Vec<String> {
    let uid = uid.to_string();
    let mut all: Vec<String> =
        ["ip", "netns", "exec", namespace, "setpriv", "--reuid", &uid, "--regid", &uid]
            .map(str::to_owned)
            .to_vec();
    all.push("--clear-groups".into());
    all.extend(args);
    all
}

/// A directory of a user.
fn directory(path: &Path, uid: u32) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| path.display().to_string())?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
    chown(path, Some(uid), Some(uid))?;
    Ok(())
}

/// Calls `probe` until it answers yes.
///
/// # Errors
/// It did not within `limit`; the error holds its last words.
pub async fn until<F>(what: &str, limit: Duration, mut probe: F) -> anyhow::Result<Duration>
where
    F: AsyncFnMut() -> anyhow::Result<()>,
{
    let begun = Instant::now();
    loop {
        let Err(e) = probe().await else { return Ok(begun.elapsed()) };
        if begun.elapsed() > limit {
            return Err(e.context(format!("{what}: not within {} s", limit.as_secs())));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
