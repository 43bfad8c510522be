//! The roots of the own trust domain as the control plane tells them, and what it is told of them in return.

use std::time::Duration;

use mesh_model::federation::ForeignBundle;
use mesh_xds::{
    NodeInfo,
    client::Connection,
    trust::{self, Trusting},
};
use tokio::sync::watch;

/// From one report to the next, if nothing changes.
const INTERVAL: Duration = Duration::from_secs(5);
/// A control plane that does not answer in this time is asked again with the next report.
const PATIENCE: Duration = Duration::from_secs(3);
/// One that is of another make, or older, is not asked again before.
const UNKNOWN: Duration = Duration::from_secs(600);

/// The way of the own roots from the xDS client to [`crate::Renewal`], and of what is trusted and shown back from there.
#[derive(Clone)]
pub struct Roots {
    pub(crate) told: watch::Sender<Option<ForeignBundle>>,
    pub(crate) trusting: watch::Sender<Trusting>,
}

impl Default for Roots {
    fn default() -> Self {
        Self { told: watch::Sender::new(None), trusting: watch::Sender::default() }
    }
}

impl Roots {
    /// Takes the own domain's roots out of the bundles that the control plane tells. Without any, what is trusted stays.
    pub fn tell(&self, bundles: &[ForeignBundle]) {
        let Some(own) = bundles.iter().find(|b| b.own.is_some()) else { return };
        self.told.send_if_modified(|held| {
            let news = held.as_ref() != Some(own);
            if news {
                *held = Some(own.clone());
            }
            news
        });
    }

    /// Passes on the bundles of a client for as long as that lives.
    pub async fn follow(self, mut bundles: watch::Receiver<Vec<ForeignBundle>>) {
        loop {
            self.tell(&bundles.borrow_and_update());
            if bundles.changed().await.is_err() {
                return;
            }
        }
    }

    /// Reports for as long as it is polled: at once what changes, and every few seconds. With `settle`, it waits for so long
    /// after a change and then for `taken`, for a proxy that is told by this process and verifies by itself.
    pub async fn report(
        self,
        mut control_plane: Connection,
        node: NodeInfo,
        settle: Duration,
        taken: impl Fn() -> bool,
    ) {
        let mut trusting = self.trusting.subscribe();
        loop {
            let now = trusting.borrow_and_update().clone();
            tokio::time::sleep(settle).await;
            let mut pause = INTERVAL;
            // Over the connection that is there anyhow: one for each proxy is what a control plane has memory for.
            let Ok(channel) = control_plane.wait_for(Option::is_some).await.map(|c| c.clone()) else {
                return;
            };
            if let Some(channel) = channel.filter(|_| taken()) {
                let told = trust::report(channel, &node, now);
                match tokio::time::timeout(PATIENCE, told).await {
                    Ok(Ok(false)) => pause = UNKNOWN,
                    Ok(Err(status)) => {
                        tracing::debug!(error = %status.message(), "the control plane did not take a report");
                        pause = Duration::from_secs(1);
                    }
                    Ok(Ok(true)) | Err(_) => {}
                }
            } else {
                pause = Duration::from_secs(1);
            }
            let _ = tokio::time::timeout(pause, trusting.changed()).await;
        }
    }
}
