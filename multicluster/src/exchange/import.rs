//! What this cluster believes of one peer.

use std::collections::BTreeMap;

use mesh_model::federation::{ExportedService, LeaseState};
use serde::{Deserialize, Serialize};

use super::{ServiceKey, digest};
use crate::{
    pb::{self, exporter_frame::Frame},
    wire::{self, MAX_SERVICES, WireError},
};

/// Longest lease a peer may grant itself, milliseconds.
const MAX_LEASE_MS: u32 = 60_000;

/// A frame that breaks the protocol; the stream is closed and opened again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// A record that may not be sent.
    #[error("refused a record: {0}")]
    Record(#[from] WireError),
    /// More than a peer may export.
    #[error("the peer exports more than {MAX_SERVICES} services")]
    TooMany,
    /// A frame without content, or of an unknown kind that is not optional.
    #[error("an announcement without a service")]
    Empty,
}

/// What a frame or the clock did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// Services or lease state changed: publish and persist.
    pub changed: bool,
    /// Subscribe again, with what [`Import::subscribe`] says.
    pub resubscribe: bool,
}

/// The import from one peer. Times are milliseconds of any steady clock.
#[derive(Debug, Clone)]
pub struct Import {
    log_id: u64,
    offset: u64,
    services: BTreeMap<ServiceKey, (u64, ExportedService)>,
    /// A table being filled after a reset; takes over when a lease confirms it.
    fresh: Option<BTreeMap<ServiceKey, (u64, ExportedService)>>,
    lease_until: u64,
    last_lease: Option<u64>,
    live: bool,
    /// A resubscription is under way; changes are ignored until the exporter answers it.
    resubscribing: bool,
}

/// What is kept across restarts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Persisted {
    log_id: u64,
    offset: u64,
    services: Vec<(u64, ExportedService)>,
}

impl Import {
    /// Starts from what was kept (or nothing). What was kept counts as live for `grace_ms`, so that
    /// a restart of this control plane alone demotes nothing.
    #[must_use]
    pub fn new(kept: Persisted, now: u64, grace_ms: u64) -> Self {
        let services: BTreeMap<_, _> =
            kept.services.into_iter().map(|(v, s)| ((s.namespace.clone(), s.name.clone()), (v, s))).collect();
        Self {
            log_id: kept.log_id,
            offset: kept.offset,
            live: true,
            services,
            fresh: None,
            lease_until: now + grace_ms,
            last_lease: None,
            resubscribing: false,
        }
    }

    /// For the state directory.
    #[must_use]
    pub fn persist(&self) -> Persisted {
        Persisted {
            log_id: self.log_id,
            offset: self.offset,
            services: self.services.values().cloned().collect(),
        }
    }

    /// Log that [`Self::offset`] belongs to; 0 if none.
    #[must_use]
    pub fn log_id(&self) -> u64 {
        self.log_id
    }

    /// Newest version applied.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Services in use.
    pub fn services(&self) -> impl Iterator<Item = &ExportedService> {
        self.services.values().map(|(_, s)| s)
    }

    /// Whether the lease holds.
    #[must_use]
    pub fn lease(&self) -> LeaseState {
        if self.live { LeaseState::Live } else { LeaseState::Lapsed }
    }

    /// Milliseconds since the last lease, if there was one.
    #[must_use]
    pub fn lease_age(&self, now: u64) -> Option<u64> {
        self.last_lease.map(|t| now.saturating_sub(t))
    }

    /// A subscription is about to be sent: log and offset to put in it.
    pub fn subscribe(&mut self) -> (u64, u64) {
        self.resubscribe();
        self.resubscribing = false;
        (self.log_id, self.offset)
    }

    /// Milliseconds until the clock must be looked at again; `None` when lapsed already.
    #[must_use]
    pub fn next_deadline(&self, now: u64) -> Option<u64> {
        self.live.then(|| self.lease_until.saturating_sub(now))
    }

    /// Lets time pass.
    pub fn tick(&mut self, now: u64) -> Step {
        if self.live && now >= self.lease_until {
            self.live = false;
            return Step { changed: true, resubscribe: false };
        }
        Step::default()
    }

    /// Takes a frame from the peer.
    ///
    /// # Errors
    /// [`ImportError`]; the table is as it was before the frame.
    pub fn on_frame(&mut self, now: u64, f: pb::ExporterFrame) -> Result<Step, ImportError> {
        match f.frame {
            Some(Frame::Reset(r)) => {
                self.resubscribing = false;
                self.log_id = r.log_id;
                self.offset = 0;
                self.fresh = Some(BTreeMap::new());
                Ok(Step::default())
            }
            Some(Frame::Announce(a)) => {
                let service = wire::service(a.service.ok_or(ImportError::Empty)?)?;
                let key = (service.namespace.clone(), service.name.clone());
                self.change(a.previous, a.version, key, Some(service))
            }
            Some(Frame::Withdraw(w)) => self.change(w.previous, w.version, (w.namespace, w.name), None),
            Some(Frame::Lease(l)) => Ok(self.renew(now, &l)),
            // Membership is not this state machine's; unknown frames are of newer versions.
            Some(Frame::Welcome(_) | Frame::Members(_)) | None => Ok(Step::default()),
        }
    }

    fn change(
        &mut self,
        previous: u64,
        version: u64,
        key: ServiceKey,
        value: Option<ExportedService>,
    ) -> Result<Step, ImportError> {
        if self.resubscribing || version <= self.offset {
            // Old news, or news that will come again.
            return Ok(Step::default());
        }
        if previous != self.offset {
            return Ok(self.resubscribe());
        }
        let in_use = self.fresh.is_none();
        let table = self.fresh.as_mut().unwrap_or(&mut self.services);
        match value {
            Some(s) => {
                if table.len() >= MAX_SERVICES && !table.contains_key(&key) {
                    return Err(ImportError::TooMany);
                }
                table.insert(key, (version, s));
            }
            None => {
                table.remove(&key);
            }
        }
        self.offset = version;
        Ok(Step { changed: in_use, resubscribe: false })
    }

    fn renew(&mut self, now: u64, l: &pb::Lease) -> Step {
        let mut step = Step::default();
        self.last_lease = Some(now);
        self.lease_until = now + u64::from(l.duration_ms.min(MAX_LEASE_MS));
        if !self.live {
            self.live = true;
            step.changed = true;
        }
        if self.resubscribing {
            return step;
        }
        let table = self.fresh.as_ref().unwrap_or(&self.services);
        let ours = digest(table.iter().map(|(k, (v, _))| (k, *v)));
        if ours == l.digest {
            // Withdrawals that a fresh table never saw move the head without a change.
            self.offset = l.version;
            if let Some(fresh) = self.fresh.take() {
                step.changed |= fresh != self.services;
                self.services = fresh;
            }
        } else {
            // Behind (a change was lost) or diverged: ask again, from nothing if the versions agree.
            if self.offset >= l.version {
                self.log_id = 0;
                self.offset = 0;
            }
            step.resubscribe = self.resubscribe().resubscribe;
        }
        step
    }

    /// A table that was being filled is not resumed: the old one is in use and knows nothing of it.
    fn resubscribe(&mut self) -> Step {
        if self.fresh.take().is_some() {
            self.log_id = 0;
            self.offset = 0;
        }
        self.resubscribing = true;
        Step { changed: false, resubscribe: true }
    }
}
