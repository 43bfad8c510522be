//! Processes under measurement: started on a core, measured through `/proc`, ended for certain.

use std::{
    fs::File,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::Args;

/// Set in the process that runs inside the namespace.
const INSIDE: &str = "FLOTILLA_BENCH_INSIDE";

/// A child that does not outlive its owner.
pub(crate) struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts `program` on a core; output goes to `log`.
    pub(crate) fn start(cpu: usize, log: &Path, program: &str, args: &[String]) -> anyhow::Result<Self> {
        Self::start_on(&cpu.to_string(), log, program, args)
    }

    /// The same on one core or several, as `taskset` has them.
    pub(crate) fn start_on(cpus: &str, log: &Path, program: &str, args: &[String]) -> anyhow::Result<Self> {
        let out = File::create(log).with_context(|| log.display().to_string())?;
        let mut c = Command::new("taskset");
        c.args(["-c", cpus, program]).args(args);
        c.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = c.spawn().context("taskset (Debian: util-linux)")?;
        Ok(Self { child, name: format!("{program}, see {}", log.display()) })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn stat(&self) -> Option<Vec<String>> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).ok()?;
        let (_, rest) = text.rsplit_once(')')?;
        Some(rest.split_whitespace().map(str::to_owned).collect())
    }

    /// User and system time so far, seconds.
    pub(crate) fn cpu(&self) -> f64 {
        let Some(f) = self.stat() else { return 0.0 };
        let ticks = |i: usize| f.get(i).and_then(|v| v.parse::<f64>().ok()).unwrap_or(0.0);
        // Clock ticks are hundredths of a second in everything that /proc shows.
        (ticks(11) + ticks(12)) / 100.0
    }

    /// A line of `/proc/PID/status`, MiB.
    pub(crate) fn memory(&self, key: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        let kib = line.and_then(|l| l.split_whitespace().next()).and_then(|v| v.parse::<f64>().ok());
        kib.unwrap_or(0.0) / 1024.0
    }

    fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until something listens.
    pub(crate) fn wait_for(&mut self, address: SocketAddr) -> anyhow::Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end {
            if !self.running() {
                bail!("{} ended", self.name);
            }
            if TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("{} does not listen on {address}", self.name)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = Pid::from_child(&self.child);
        let _ = kill_process(pid, Signal::TERM);
        let end = Instant::now() + Duration::from_secs(2);
        while self.running() {
            if Instant::now() > end {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Seconds that a core was busy, whoever used it.
pub(crate) fn busy(cpu: usize) -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let name = format!("cpu{cpu} ");
    let Some(line) = stat.lines().find(|l| l.starts_with(&name)) else { return 0.0 };
    let f: Vec<f64> = line.split_whitespace().skip(1).take(8).filter_map(|v| v.parse().ok()).collect();
    let all: f64 = f.iter().sum();
    let idle = f.get(3).unwrap_or(&0.0) + f.get(4).unwrap_or(&0.0);
    (all - idle) / 100.0
}

/// Runs a tool to its end on the load core and returns what it printed.
pub(crate) fn tool(cpu: usize, args: &[String], limit: Duration) -> anyhow::Result<String> {
    let mut c = Command::new("timeout");
    c.arg(limit.as_secs().to_string()).args(["taskset", "-c", &cpu.to_string()]).args(args);
    let out = c.stdin(Stdio::null()).output().context("timeout (Debian: coreutils)")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.code() == Some(124) {
        bail!("{} did not end in {} s", args[0], limit.as_secs());
    }
    if out.status.code() == Some(127) {
        bail!("{} is missing", args[0]);
    }
    Ok(text + &String::from_utf8_lossy(&out.stderr))
}

/// As root, runs the program again inside a network namespace; `None` inside of it and for others.
pub(crate) fn in_own_namespace(args: &Args) -> anyhow::Result<Option<bool>> {
    if args.no_netns || !rustix::process::geteuid().is_root() || std::env::var_os(INSIDE).is_some() {
        anyhow::ensure!(
            args.mtu.is_none() || std::env::var_os(INSIDE).is_some(),
            "--mtu needs a network namespace"
        );
        return Ok(None);
    }
    let mtu = args.mtu.map(|m| format!("ip link set lo mtu {m}\n")).unwrap_or_default();
    let set_up = "ip link set lo up
        sysctl -qw net.ipv4.tcp_congestion_control=cubic 2>/dev/null || sysctl -qw net.ipv4.tcp_congestion_control=reno
        sysctl -qw net.ipv4.tcp_tw_reuse=1 net.ipv4.ip_local_port_range='10000 60999'
        exec \"$@\"";
    let status = Command::new("unshare")
        .args(["--net", "nice", "-n", "-15", "sh", "-c", &(mtu + set_up), "sh"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .status()
        .context("unshare (Debian: util-linux)")?;
    Ok(Some(status.success()))
}
