//! Readiness as guards: a process is ready when every part that announced itself has let go.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

/// Parts that a process still waits for.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    waiting: Mutex<BTreeSet<String>>,
    ready: watch::Sender<bool>,
}

impl Default for State {
    fn default() -> Self {
        Self { waiting: Mutex::default(), ready: watch::Sender::new(true) }
    }
}

/// Held by a part until it can serve.
#[derive(Debug)]
#[must_use = "readiness waits until the guard is dropped"]
pub struct ReadyGuard {
    state: Arc<State>,
    part: String,
}

impl Readiness {
    /// Announces a part; the process is not ready until the guard is dropped.
    pub fn wait_for(&self, part: impl Into<String>) -> ReadyGuard {
        let part = part.into();
        let mut waiting = self.state.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(part.clone());
        self.state.ready.send_replace(false);
        ReadyGuard { state: self.state.clone(), part }
    }

    /// Parts still waited for, sorted.
    #[must_use]
    pub fn pending(&self) -> Vec<String> {
        self.state.waiting.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Whether nothing is waited for.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.state.ready.borrow()
    }

    /// Waits until nothing is waited for.
    pub async fn ready(&self) {
        let mut rx = self.state.ready.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = rx.wait_for(|r| *r).await;
    }
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        let mut waiting = self.state.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&self.part);
        if waiting.is_empty() {
            self.state.ready.send_replace(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_when_every_guard_is_gone() {
        let r = Readiness::default();
        let (a, b) = (r.wait_for("xds"), r.wait_for("svid"));
        assert_eq!(r.pending(), ["svid", "xds"]);
        drop(a);
        assert!(!r.is_ready());
        drop(b);
        assert!(r.is_ready());
        r.ready().await;
    }
}
