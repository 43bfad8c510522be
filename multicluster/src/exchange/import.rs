//! What this cluster believes of one peer.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::{
    TrustDomain,
    federation::{ExportedService, LeaseState},
};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::{ServiceKey, entry_hash};
use crate::{
    pb::{self, exporter_frame::Frame},
    wire::{self, MAX_RECORD, MAX_SERVICES, MAX_TABLE},
};

/// Longest lease a peer may grant itself, milliseconds.
const MAX_LEASE_MS: u32 = 60_000;
/// Refusals that are kept for operators.
const MAX_REFUSALS: usize = 8;

/// What a frame or the clock did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// Services or lease state changed: publish and persist.
    pub changed: bool,
    /// Subscribe again, with what [`Import::subscribe`] says.
    pub resubscribe: bool,
    /// A record was refused; [`Import::refusals`] says why.
    pub refused: bool,
}

/// What changed since it was last asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Everything may have.
    pub all: bool,
    /// Otherwise these services.
    pub services: BTreeSet<ServiceKey>,
}

/// Services with the version of their last change and their encoded size.
#[derive(Debug, Clone, Default)]
struct Table {
    services: BTreeMap<ServiceKey, (u64, usize, ExportedService)>,
    digest: u64,
    bytes: usize,
    /// Records were refused, so the exporter's digest says nothing about the others.
    partial: bool,
}

impl Table {
    fn insert(&mut self, key: ServiceKey, version: u64, bytes: usize, service: ExportedService) {
        self.remove(&key);
        self.digest = self.digest.wrapping_add(entry_hash(&key, version));
        self.bytes += bytes;
        self.services.insert(key, (version, bytes, service));
    }

    fn remove(&mut self, key: &ServiceKey) -> bool {
        let Some((version, bytes, _)) = self.services.remove(key) else { return false };
        self.digest = self.digest.wrapping_sub(entry_hash(key, version));
        self.bytes -= bytes;
        true
    }
}

/// The import from one peer. Times are milliseconds of any steady clock.
#[derive(Debug, Clone)]
pub struct Import {
    /// The peer's trust domain if that is not the own one.
    domain: Option<TrustDomain>,
    log_id: u64,
    offset: u64,
    table: Table,
    /// A table being filled after a reset; takes over when a lease confirms it.
    fresh: Option<Table>,
    lease_until: u64,
    last_lease: Option<u64>,
    /// Newest version of the peer's log, as its last lease told.
    head: Option<u64>,
    /// When the table was last known to be the peer's.
    confirmed: Option<u64>,
    live: bool,
    /// A resubscription is under way; changes are ignored until the exporter answers it.
    resubscribing: bool,
    dirty: Dirty,
    refused: u64,
    refusals: Vec<String>,
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
        let mut table = Table::default();
        for (version, s) in kept.services {
            let bytes = wire::service_pb(&s).encoded_len();
            table.insert((s.namespace.clone(), s.name.clone()), version, bytes, s);
        }
        Self {
            domain: None,
            log_id: kept.log_id,
            offset: kept.offset,
            live: true,
            table,
            fresh: None,
            lease_until: now + grace_ms,
            last_lease: None,
            head: None,
            confirmed: None,
            resubscribing: false,
            dirty: Dirty { all: true, services: BTreeSet::new() },
            refused: 0,
            refusals: vec![],
        }
    }

    /// The same from a peer of another trust domain, whose workloads have identities of that domain alone.
    #[must_use]
    pub fn of_domain(self, domain: Option<TrustDomain>) -> Self {
        Self { domain, ..self }
    }

    /// For the state directory.
    #[must_use]
    pub fn persist(&self) -> Persisted {
        // While a table is filled, log and offset are of that one and say nothing about the one in use.
        let (log_id, offset) = if self.fresh.is_some() { (0, 0) } else { (self.log_id, self.offset) };
        let services = self.table.services.values().map(|(v, _, s)| (*v, s.clone())).collect();
        Persisted { log_id, offset, services }
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
    pub fn services(&self) -> impl ExactSizeIterator<Item = &ExportedService> {
        self.table.services.values().map(|(_, _, s)| s)
    }

    /// One of the services in use.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&ExportedService> {
        self.table.services.get(key).map(|(_, _, s)| s)
    }

    /// What changed since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }

    /// How many records were refused since the last reset, and the first few of them by name.
    #[must_use]
    pub fn refusals(&self) -> (u64, &[String]) {
        (self.refused, &self.refusals)
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

    /// Changes of the peer that are not applied yet, as of its last lease; `None` without a lease that tells.
    #[must_use]
    pub fn lag(&self) -> Option<u64> {
        let lag = self.head.filter(|_| self.live)?.saturating_sub(self.offset);
        // What was told is not in use until a lease confirms it.
        Some(if self.fresh.is_some() || self.resubscribing { lag.max(1) } else { lag })
    }

    /// Milliseconds since the table was last known to be the peer's.
    #[must_use]
    pub fn confirmed_age(&self, now: u64) -> Option<u64> {
        self.confirmed.map(|t| now.saturating_sub(t))
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
            self.dirty.all = true;
            return Step { changed: true, ..Step::default() };
        }
        Step::default()
    }

    /// Takes a frame from the peer.
    pub fn on_frame(&mut self, now: u64, f: pb::ExporterFrame) -> Step {
        match f.frame {
            Some(Frame::Reset(r)) => {
                self.resubscribing = false;
                self.log_id = r.log_id;
                self.offset = 0;
                self.head = None;
                self.fresh = Some(Table::default());
                self.refused = 0;
                self.refusals.clear();
                Step::default()
            }
            Some(Frame::Announce(a)) => {
                let mut step = self.advance(a.previous, a.version);
                if step.changed {
                    step.refused = !self.announced(a.version, &a.service);
                    step.changed = self.fresh.is_none();
                }
                step
            }
            Some(Frame::Withdraw(w)) => {
                let mut step = self.advance(w.previous, w.version);
                if step.changed {
                    step.changed = self.remove((w.namespace, w.name));
                }
                step
            }
            Some(Frame::Lease(l)) => self.renew(now, &l),
            // Membership is not this state machine's; unknown frames are of newer versions.
            Some(Frame::Welcome(_) | Frame::Members(_)) | None => Step::default(),
        }
    }

    /// Whether a change follows on what is held; if so it is `changed`.
    fn advance(&mut self, previous: u64, version: u64) -> Step {
        // Old news, or news that will come again. What follows a reset is not for the table in use: if the reset was
        // lost or is late, the next lease asks again.
        if self.resubscribing || self.log_id == 0 || version <= self.offset {
            return Step::default();
        }
        if previous != self.offset {
            return self.resubscribe();
        }
        self.offset = version;
        Step { changed: true, ..Step::default() }
    }

    fn remove(&mut self, key: ServiceKey) -> bool {
        if let Some(fresh) = &mut self.fresh {
            fresh.remove(&key);
            return false;
        }
        let removed = self.table.remove(&key);
        if removed && !self.dirty.all {
            self.dirty.services.insert(key);
        }
        removed
    }

    /// Takes a record, or refuses it and what it stood for; answers whether it was taken.
    fn announced(&mut self, version: u64, bytes: &[u8]) -> bool {
        let record = if bytes.len() > MAX_RECORD {
            Err(format!("a service of {} bytes (at most {MAX_RECORD})", bytes.len()))
        } else {
            let decoded = pb::Service::decode(bytes).map_err(|_| "an unreadable service".to_owned());
            decoded.and_then(|s| {
                // The name is told even if the rest is bad, so that an older record of it goes.
                let key = (s.namespace.clone(), s.name.clone());
                let domain = self.domain.as_ref();
                let checked = wire::service(s).and_then(|s| wire::of_domain(&s, domain).map(|()| s));
                checked.map_err(|e| e.to_string()).map(|s| (key.clone(), s)).inspect_err(|_| {
                    self.remove(key);
                })
            })
        };
        let why = match record {
            Ok((key, service)) => {
                let table = self.fresh.as_mut().unwrap_or(&mut self.table);
                let old = table.services.get(&key).map(|(_, bytes, _)| *bytes);
                if old.is_none() && table.services.len() >= MAX_SERVICES {
                    format!("{}/{}: the peer exports more than {MAX_SERVICES} services", key.0, key.1)
                } else if table.bytes - old.unwrap_or(0) + bytes.len() > MAX_TABLE {
                    self.remove(key.clone());
                    format!("{}/{}: the peer exports more than {MAX_TABLE} bytes", key.0, key.1)
                } else {
                    if self.fresh.is_none() && !self.dirty.all {
                        self.dirty.services.insert(key.clone());
                    }
                    let table = self.fresh.as_mut().unwrap_or(&mut self.table);
                    table.insert(key, version, bytes.len(), service);
                    return true;
                }
            }
            Err(why) => why,
        };
        self.fresh.as_mut().unwrap_or(&mut self.table).partial = true;
        self.refused += 1;
        if self.refusals.len() < MAX_REFUSALS {
            // What a hostile peer sends is quoted, but not at length.
            self.refusals.push(why.chars().take(200).collect());
        }
        false
    }

    fn renew(&mut self, now: u64, l: &pb::Lease) -> Step {
        let mut step = Step::default();
        self.last_lease = Some(now);
        self.lease_until = now + u64::from(l.duration_ms.min(MAX_LEASE_MS));
        if !self.live {
            self.live = true;
            self.dirty.all = true;
            step.changed = true;
        }
        self.head = Some(l.version).filter(|v| *v > 0 || !l.partial);
        if self.resubscribing || l.partial {
            return step;
        }
        let table = self.fresh.as_ref().unwrap_or(&self.table);
        if table.digest == l.digest || (table.partial && self.offset <= l.version) {
            // Withdrawals that a fresh table never saw move the head without a change.
            self.offset = l.version;
            self.confirmed = Some(now);
            if let Some(fresh) = self.fresh.take() {
                self.take_over(fresh, &mut step);
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

    fn take_over(&mut self, fresh: Table, step: &mut Step) {
        let old = std::mem::replace(&mut self.table, fresh);
        // An exporter that restarted tells what it told before, under other versions.
        let differs = |a: &Table, b: &Table, key: &ServiceKey| {
            a.services.get(key).map(|(_, _, s)| s) != b.services.get(key).map(|(_, _, s)| s)
        };
        let keys = old.services.keys().chain(self.table.services.keys());
        let changed: BTreeSet<_> = keys.filter(|k| differs(&old, &self.table, k)).cloned().collect();
        step.changed = true;
        if !self.dirty.all {
            self.dirty.services.extend(changed);
        }
    }

    /// A table that was being filled is not resumed: the old one is in use and knows nothing of it.
    fn resubscribe(&mut self) -> Step {
        if self.fresh.take().is_some() {
            self.log_id = 0;
            self.offset = 0;
        }
        self.resubscribing = true;
        Step { resubscribe: true, ..Step::default() }
    }
}
