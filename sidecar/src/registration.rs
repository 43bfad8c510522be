//! A workload that registers itself in a `WorkloadGroup`: its proxy probes it and says how it is.

mod probe;

use std::time::Duration;

use mesh_model::authored::ReadinessProbe;
use mesh_xds::{
    NodeInfo,
    client::Connection,
    registration::{self, INTERVAL, State, Workload},
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// A control plane that does not answer in this time is told again with the next report.
const PATIENCE: Duration = Duration::from_secs(3);
/// From one warning of the same kind to the next.
const WARN: Duration = Duration::from_secs(60);

/// How the workload was found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Health {
    state: State,
    reason: String,
}

/// Whether commands of a probe are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Commands {
    Run,
    Refused,
}

/// Registers until `stop`, and says then that the workload is about to end. Without a word of the control plane nothing is
/// probed, and nothing but traffic from others depends on it.
pub(crate) async fn run(
    group: String,
    mut control_plane: Connection,
    node: NodeInfo,
    commands: Commands,
    stop: CancellationToken,
) {
    let (health, mut seen) =
        watch::channel(Health { state: State::Unhealthy, reason: "it has not been probed yet".to_owned() });
    let mut probing = Probing { health, text: None, task: None };
    let mut warned: Option<tokio::time::Instant> = None;
    loop {
        let Health { state, reason } = seen.borrow_and_update().clone();
        let leaving = stop.is_cancelled();
        let state = if leaving { State::Leaving } else { state };
        let mut pause = Duration::from_secs(1);
        let channel = control_plane.borrow_and_update().clone();
        if let Some(channel) = channel {
            let workload = Workload { group: group.clone(), state, reason };
            let told = registration::report(channel, &node, workload);
            let complaint = match tokio::time::timeout(PATIENCE, told).await {
                Ok(Ok(Some(answer))) => {
                    probing.follow(&answer.probe, commands);
                    pause = INTERVAL;
                    None
                }
                Ok(Ok(None)) => Some("the control plane does not know registrations".to_owned()),
                Ok(Err(status)) => Some(status.message().to_owned()),
                Err(_) => None,
            };
            match complaint {
                None => warned = None,
                Some(error) if warned.is_none_or(|at| at.elapsed() >= WARN) => {
                    tracing::warn!(group, error, "the workload is not registered");
                    warned = Some(tokio::time::Instant::now());
                }
                Some(_) => {}
            }
        }
        if leaving {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = seen.changed() => {}
            () = stop.cancelled() => {}
        }
    }
}

/// The probe that runs.
struct Probing {
    health: watch::Sender<Health>,
    /// As the control plane told it.
    text: Option<String>,
    task: Option<JoinHandle<()>>,
}

impl Drop for Probing {
    fn drop(&mut self) {
        if let Some(t) = self.task.take() {
            t.abort();
        }
    }
}

impl Probing {
    /// Begins anew if the group has another probe than before.
    fn follow(&mut self, text: &str, commands: Commands) {
        if self.text.as_deref() == Some(text) {
            return;
        }
        self.text = Some(text.to_owned());
        if let Some(t) = self.task.take() {
            t.abort();
        }
        if text.is_empty() {
            self.set(State::Healthy, String::new());
            return;
        }
        let parsed = serde_json::from_str::<ReadinessProbe>(text);
        let probe = match parsed {
            Ok(p) if p.exec.is_some() && commands == Commands::Refused => {
                let reason = "its probe is a command, and this proxy runs none: start it with --exec-probes";
                tracing::warn!("{reason}");
                self.set(State::Unhealthy, reason.to_owned());
                return;
            }
            Ok(p) => p,
            Err(e) => {
                self.set(State::Unhealthy, format!("its probe cannot be read: {e}"));
                return;
            }
        };
        tracing::info!(probe = text, "the workload is probed");
        self.task = Some(tokio::spawn(watch_health(probe, self.health.clone())));
    }

    fn set(&self, state: State, reason: String) {
        set(&self.health, state, reason);
    }
}

fn set(health: &watch::Sender<Health>, state: State, reason: String) {
    health.send_if_modified(|h| {
        let fresh = Health { state, reason };
        let news = *h != fresh;
        *h = fresh;
        news
    });
}

/// A count of a probe, with its default.
fn count(n: i32, default: u32) -> u32 {
    u32::try_from(n).ok().filter(|n| *n > 0).unwrap_or(default)
}

/// Probes for ever. A workload is healthy after so many successes in a row, and is not any more after so many failures.
async fn watch_health(p: ReadinessProbe, health: watch::Sender<Health>) {
    let timeout = Duration::from_secs(count(p.timeout_seconds, 1).into());
    let (enough, too_many) = (count(p.success_threshold, 1), count(p.failure_threshold, 3));
    tokio::time::sleep(Duration::from_secs(count(p.initial_delay_seconds, 0).into())).await;
    let mut period = tokio::time::interval(p.period().into());
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut good, mut bad) = (0u32, 0u32);
    loop {
        period.tick().await;
        let found = match tokio::time::timeout(timeout, probe::once(&p)).await {
            Ok(found) => found,
            Err(_) => Err(format!("no answer within {} s", timeout.as_secs())),
        };
        match found {
            Ok(()) => {
                (good, bad) = (good.saturating_add(1), 0);
                if good >= enough {
                    set(&health, State::Healthy, String::new());
                }
            }
            Err(reason) => {
                (good, bad) = (0, bad.saturating_add(1));
                if bad >= too_many {
                    let reason: String = reason.chars().take(200).collect();
                    set(&health, State::Unhealthy, reason);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
