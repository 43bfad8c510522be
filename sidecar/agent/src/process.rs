//! What holds for the process: threads, ports, limits and times.
//!
//! A flag that was given counts; then what the mesh says, which is the proxy's own `PROXY_CONFIG` first
//! ([`mesh_xds::process`]); then what the flag is unless given. Times may change while the process runs. Threads, ports and
//! limits are what they were when it started: whoever probes a port, and the kernel's queue of each thread, go by them. What
//! the control plane says of these later is kept with the configuration, so that the next start has it, and is one line in
//! the log.

use std::{fmt, future::ready, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::anyhow;
use axum::{Json, Router, routing::get};
use mesh_proxy::Engine;
use mesh_runtime::ports;
use mesh_xds::{client::proxy::kept_process, process::ProcessSettings};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{ProxyArgs, limits::MAX_CONNECTIONS, restart::RestartArgs};

/// How long a start waits to hear of them, where nothing was kept. Without a configuration there is nothing to serve either.
pub(crate) const WAIT: Duration = Duration::from_secs(2);
/// Threads that a process starts because the mesh says so.
const MOST_TOLD: usize = 1_024;

/// End of a process, unless said.
const DRAIN: Duration = Duration::from_secs(5);
/// End of one that another replaces, unless said; Envoy's.
const HANDOVER: Duration = Duration::from_secs(600);
/// Longest life of one that another has replaced, unless said; Envoy's.
const PARENT: Duration = Duration::from_secs(900);

/// What holds for a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Worker threads.
    pub concurrency: usize,
    /// Admin pages.
    pub admin: SocketAddr,
    /// Readiness.
    pub readiness: SocketAddr,
    /// Connections of clients per worker.
    pub max_connections: usize,
    /// Connections of clients altogether.
    pub max_total_connections: Option<usize>,
    /// How long connections may finish at the end.
    #[serde(rename = "drainSeconds", serialize_with = "seconds")]
    pub drain: Duration,
}

fn seconds<S: serde::Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_f64(d.as_secs_f64())
}

/// Times of a process that another one replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handover {
    /// How long connections may finish.
    pub(crate) drain: Duration,
    /// When the process that is replaced must be gone.
    pub(crate) limit: Duration,
}

/// Worker threads for a number of which 0 is one per core.
#[must_use]
pub(crate) fn threads(n: usize) -> usize {
    match n {
        // `available_parallelism` honours cgroup quotas and affinity.
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

impl ProxyArgs {
    /// What the workload's own metadata say of its process.
    ///
    /// # Errors
    /// Names the field that cannot be read.
    pub fn own_process(&self) -> anyhow::Result<ProcessSettings> {
        // The last one is that of the node.
        let own = self.metadata.iter().rev().find_map(|m| m.strip_prefix("PROXY_CONFIG="));
        let Some(text) = own else { return Ok(ProcessSettings::default()) };
        let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()));
        ProcessSettings::of_metadata(&value)
            .map_err(|field| anyhow!("--meta PROXY_CONFIG: not a ProxyConfig with a valid {field}"))
    }

    /// What holds with these settings.
    #[must_use]
    pub fn process(&self, s: &ProcessSettings) -> Process {
        let told = |n: Option<u32>| n.and_then(|n| usize::try_from(n).ok());
        let port = |ip: [u8; 4], said: Option<u16>, usual| SocketAddr::from((ip, said.unwrap_or(usual)));
        Process {
            // Not so many that a number in the mesh's settings ends every proxy at its next start.
            concurrency: threads(
                self.concurrency.or(told(s.concurrency).map(|n| n.min(MOST_TOLD))).unwrap_or_default(),
            ),
            admin: self.admin.unwrap_or_else(|| port([127, 0, 0, 1], s.admin_port, ports::ADMIN)),
            readiness: self.readiness.unwrap_or_else(|| port([0, 0, 0, 0], s.status_port, ports::READINESS)),
            max_connections: self.limits.max_connections.unwrap_or(MAX_CONNECTIONS),
            // Who gives the flag says how many there may be.
            max_total_connections: told(s.max_connections).filter(|_| self.limits.max_connections.is_none()),
            drain: self.drain_seconds.map(Duration::from_secs).or(s.termination_drain).unwrap_or(DRAIN),
        }
    }

    /// Whether flags say all that only a start can take.
    fn says_all(&self) -> bool {
        self.concurrency.is_some()
            && self.admin.is_some()
            && self.readiness.is_some()
            && self.limits.max_connections.is_some()
    }
}

impl RestartArgs {
    /// What holds with these settings.
    pub(crate) fn handover(&self, s: &ProcessSettings) -> Handover {
        let flag = |n: Option<u64>| n.map(Duration::from_secs);
        Handover {
            drain: flag(self.drain_time_s).or(s.drain).unwrap_or(HANDOVER),
            limit: flag(self.parent_shutdown_time_s).or(s.parent_shutdown).unwrap_or(PARENT),
        }
    }
}

/// What is known of the settings at a start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    /// The workload's own.
    own: ProcessSettings,
    /// What the control plane said last.
    told: Option<ProcessSettings>,
    /// There is nothing to wait for.
    enough: bool,
}

impl Known {
    /// Of flags, and of what an earlier process has kept.
    pub(crate) fn begin(args: &ProxyArgs, cache: Option<&Path>) -> anyhow::Result<Self> {
        let own = args.own_process()?;
        let told = cache.and_then(kept_process);
        // A configuration from before there were any is served at once as well.
        let enough = args.says_all() || cache.is_some_and(Path::exists);
        Ok(Self { own, told, enough })
    }

    pub(crate) fn is_enough(&self) -> bool {
        self.enough
    }

    /// Waits until the control plane has said something, or as long as a start may.
    pub(crate) async fn hear(mut self, mut from: watch::Receiver<Option<ProcessSettings>>) -> Self {
        if !self.enough {
            // The sender lives as long as its client, and an end of it is as good as silence.
            let _ = tokio::time::timeout(WAIT, from.wait_for(Option::is_some)).await;
        }
        self.told = from.borrow().or(self.told);
        self
    }

    pub(crate) fn settings(&self) -> ProcessSettings {
        self.own.or(self.told.unwrap_or_default())
    }
}

/// What holds, and what would after a restart.
pub(crate) fn page(
    args: Arc<ProxyArgs>,
    runs: Process,
    settings: watch::Receiver<ProcessSettings>,
) -> Router {
    let page = move || {
        let settings = *settings.borrow();
        let wanted = args.process(&settings);
        let now = Process { drain: wanted.drain, ..runs };
        let Handover { drain, limit } = args.restart.handover(&settings);
        let seconds = Duration::as_secs_f64;
        ready(Json(json!({
            "runs": now,
            "afterRestart": wanted,
            "handover": {"drainSeconds": seconds(&drain), "parentShutdownSeconds": seconds(&limit)},
        })))
    };
    Router::new().route("/settings", get(page))
}

/// Follows what the control plane says, and tells what waits for a restart.
pub(crate) async fn follow(
    args: Arc<ProxyArgs>,
    known: Known,
    runs: Process,
    mut told: watch::Receiver<Option<ProcessSettings>>,
    out: watch::Sender<ProcessSettings>,
    engine: Arc<Engine>,
) {
    let (mut said, mut drain) = (Vec::new(), runs.drain);
    loop {
        let settings = known.own.or(told.borrow_and_update().unwrap_or_default());
        out.send_replace(settings);
        let wanted = args.process(&settings);
        if drain != wanted.drain {
            drain = wanted.drain;
            // A configuration that is being applied is waited for, elsewhere than here.
            let engine = engine.clone();
            let set = tokio::task::spawn_blocking(move || engine.set_drain_time(drain)).await;
            if let Err(error) = set {
                tracing::error!(%error, "the time to drain was not changed");
            }
        }
        let differ = differences(&runs, &wanted);
        if said != differ {
            for Difference { setting, runs, wanted } in &differ {
                tracing::info!(setting, %runs, restart = %wanted, "a setting waits for a restart");
            }
            said = differ;
        }
        if told.changed().await.is_err() {
            return;
        }
    }
}

/// A setting that is another than that with which the process was started.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    setting: &'static str,
    runs: String,
    wanted: String,
}

fn differences(runs: &Process, wanted: &Process) -> Vec<Difference> {
    fn of<T: PartialEq>(
        setting: &'static str,
        runs: &T,
        wanted: &T,
        show: fn(&T) -> String,
    ) -> Option<Difference> {
        (runs != wanted).then(|| Difference { setting, runs: show(runs), wanted: show(wanted) })
    }
    fn text<T: fmt::Display>(v: &T) -> String {
        v.to_string()
    }
    fn limit(n: &Option<usize>) -> String {
        n.map_or_else(|| "none".to_owned(), |n| n.to_string())
    }
    [
        of("concurrency", &runs.concurrency, &wanted.concurrency, text),
        of("proxyAdminPort", &runs.admin, &wanted.admin, text),
        of("statusPort", &runs.readiness, &wanted.readiness, text),
        of(
            "globalDownstreamConnectionLimit",
            &runs.max_total_connections,
            &wanted.max_total_connections,
            limit,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct P {
        #[command(flatten)]
        args: ProxyArgs,
    }

    fn args(more: &[&str]) -> ProxyArgs {
        let line = ["x", "--ip", "10.0.0.1", "--workload", "a", "--cluster", "west"];
        P::try_parse_from(line.iter().chain(more)).unwrap().args
    }

    fn said() -> ProcessSettings {
        ProcessSettings {
            concurrency: Some(3),
            drain: Some(Duration::from_secs(45)),
            parent_shutdown: Some(Duration::from_secs(60)),
            termination_drain: Some(Duration::from_millis(1500)),
            admin_port: Some(15100),
            status_port: Some(15101),
            max_connections: Some(9),
        }
    }

    #[test]
    fn flags_come_first_and_the_mesh_second() {
        let usual = args(&[]).process(&ProcessSettings::default());
        assert_eq!(usual.concurrency, threads(0));
        assert_eq!(usual.admin, SocketAddr::from(([127, 0, 0, 1], ports::ADMIN)));
        assert_eq!(usual.readiness, SocketAddr::from(([0, 0, 0, 0], ports::READINESS)));
        assert_eq!((usual.max_connections, usual.max_total_connections), (MAX_CONNECTIONS, None));
        assert_eq!(usual.drain, Duration::from_secs(5));

        let mesh = args(&[]).process(&said());
        let wanted = Process {
            concurrency: 3,
            admin: SocketAddr::from(([127, 0, 0, 1], 15100)),
            readiness: SocketAddr::from(([0, 0, 0, 0], 15101)),
            max_connections: MAX_CONNECTIONS,
            max_total_connections: Some(9),
            drain: Duration::from_millis(1500),
        };
        assert_eq!(mesh, wanted);

        let flags = ["--concurrency=2", "--admin=127.0.0.2:1", "--readiness=127.0.0.2:2"];
        let flags = args(&[&flags[..], &["--max-connections=4", "--drain-seconds=0"]].concat());
        assert!(flags.says_all() && !args(&["--concurrency=2"]).says_all());
        let wanted = Process {
            concurrency: 2,
            admin: SocketAddr::from(([127, 0, 0, 2], 1)),
            readiness: SocketAddr::from(([127, 0, 0, 2], 2)),
            max_connections: 4,
            max_total_connections: None,
            drain: Duration::ZERO,
        };
        assert_eq!(flags.process(&said()), wanted);
        let many = ProcessSettings { concurrency: Some(u32::MAX), ..said() };
        assert_eq!(args(&[]).process(&many).concurrency, MOST_TOLD);
        // 0 threads is what somebody says, not silence.
        assert_eq!(args(&["--concurrency=0"]).process(&said()).concurrency, threads(0));
    }

    #[test]
    fn times_of_a_handover_likewise() {
        let of = |more: &[&str], s: ProcessSettings| {
            let h = args(more).restart.handover(&s);
            (h.drain.as_secs(), h.limit.as_secs())
        };
        assert_eq!(of(&[], ProcessSettings::default()), (600, 900));
        assert_eq!(of(&[], said()), (45, 60));
        assert_eq!(of(&["--drain-time-s=1", "--parent-shutdown-time-s=2"], said()), (1, 2));
    }

    #[test]
    fn what_a_workload_says_of_itself_needs_no_control_plane() {
        let own = |text: &str| args(&["--meta", &format!("PROXY_CONFIG={text}")]);
        assert_eq!(own(r#"{"concurrency": 7}"#).own_process().unwrap().concurrency, Some(7));
        assert_eq!(args(&[]).own_process().unwrap(), ProcessSettings::default());
        for (text, field) in [(r#"{"statusPort": -1}"#, "statusPort"), ("{", "ProxyConfig")] {
            let e = own(text).own_process().unwrap_err().to_string();
            assert!(e.contains(field), "{e}");
        }
        // It comes before what was kept of what the control plane has said.
        let known = Known {
            own: own(r#"{"concurrency": 7}"#).own_process().unwrap(),
            told: Some(said()),
            enough: true,
        };
        assert_eq!((known.settings().concurrency, known.settings().status_port), (Some(7), Some(15101)));
    }

    #[test]
    fn only_what_a_start_takes_waits_for_one() {
        let a = args(&[]).process(&said());
        assert_eq!(differences(&a, &Process { drain: Duration::ZERO, ..a }), []);
        let b = args(&[]).process(&ProcessSettings { concurrency: Some(4), max_connections: None, ..said() });
        let d = |setting, runs: &str, wanted: &str| Difference {
            setting,
            runs: runs.into(),
            wanted: wanted.into(),
        };
        let wanted = [d("concurrency", "3", "4"), d("globalDownstreamConnectionLimit", "9", "none")];
        assert_eq!(differences(&a, &b), wanted);
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_waits_for_a_while_at_most() {
        let nothing = Known { own: ProcessSettings::default(), told: None, enough: false };
        let (to, from) = watch::channel(None);
        let begun = tokio::time::Instant::now();
        assert_eq!(nothing.hear(from.clone()).await.settings(), ProcessSettings::default());
        assert_eq!(begun.elapsed(), WAIT);
        let told = Known { enough: true, ..nothing };
        assert_eq!(told.hear(from.clone()).await.settings(), ProcessSettings::default());
        assert_eq!(begun.elapsed(), WAIT, "nobody waits who need not");
        to.send_replace(Some(said()));
        assert_eq!(nothing.hear(from).await.settings(), said());
        assert_eq!(begun.elapsed(), WAIT);
    }
}
