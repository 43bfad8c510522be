//! What this cluster exports, as a log.

use std::collections::BTreeMap;

use mesh_model::federation::ExportedService;

use super::{LEASE_MS, ServiceKey, digest};
use crate::{
    pb::{self, exporter_frame::Frame},
    wire::service_pb,
};

/// Tombstones kept for importers that resume; older offsets start over.
const MAX_TOMBSTONES: usize = 4096;

/// Table of exports with the version of each entry's last change.
#[derive(Debug)]
pub struct ExportLog {
    id: u64,
    head: u64,
    /// Offsets below this cannot be resumed: a tombstone after them is gone.
    horizon: u64,
    pub(super) entries: BTreeMap<ServiceKey, (u64, Option<ExportedService>)>,
    by_version: BTreeMap<u64, ServiceKey>,
}

impl ExportLog {
    /// An empty log; `id` must differ from that of every earlier run.
    #[must_use]
    pub fn new(id: u64) -> Self {
        Self { id, head: 0, horizon: 0, entries: BTreeMap::new(), by_version: BTreeMap::new() }
    }

    /// The log's identity.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Version of the newest change.
    #[must_use]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Live exports.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.values().filter(|(_, s)| s.is_some()).count()
    }

    /// Whether nothing is exported.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Replaces the table; answers whether anything changed.
    pub fn replace(&mut self, all: BTreeMap<ServiceKey, ExportedService>) -> bool {
        let before = self.head;
        let gone: Vec<ServiceKey> = self
            .entries
            .iter()
            .filter(|(k, (_, s))| s.is_some() && !all.contains_key(*k))
            .map(|(k, _)| k.clone())
            .collect();
        for key in gone {
            self.put(key, None);
        }
        for (key, service) in all {
            let same = matches!(self.entries.get(&key), Some((_, Some(old))) if *old == service);
            if !same {
                self.put(key, Some(service));
            }
        }
        self.trim();
        self.head != before
    }

    fn put(&mut self, key: ServiceKey, value: Option<ExportedService>) {
        self.head += 1;
        if let Some((old, _)) = self.entries.insert(key.clone(), (self.head, value)) {
            self.by_version.remove(&old);
        }
        self.by_version.insert(self.head, key);
    }

    fn trim(&mut self) {
        let tombs: Vec<u64> = self.entries.values().filter(|(_, s)| s.is_none()).map(|(v, _)| *v).collect();
        let Some(excess) = tombs.len().checked_sub(MAX_TOMBSTONES).filter(|n| *n > 0) else { return };
        let mut tombs = tombs;
        tombs.sort_unstable();
        for version in tombs.into_iter().take(excess) {
            if let Some(key) = self.by_version.remove(&version) {
                self.entries.remove(&key);
            }
            self.horizon = self.horizon.max(version);
        }
    }

    /// Everything an importer lacks that holds `offset` of log `log_id`.
    #[must_use]
    pub fn since(&self, log_id: u64, offset: u64) -> Vec<pb::ExporterFrame> {
        let resume = log_id == self.id && offset >= self.horizon && offset <= self.head;
        let mut frames = Vec::new();
        let mut previous = offset;
        if !resume {
            frames.push(frame(Frame::Reset(pb::Reset { log_id: self.id })));
            previous = 0;
        }
        for (version, key) in self.by_version.range(previous + 1..) {
            let Some((_, value)) = self.entries.get(key) else { continue };
            match value {
                Some(service) => frames.push(frame(Frame::Announce(pb::Announce {
                    version: *version,
                    previous,
                    service: Some(service_pb(service)),
                }))),
                // A table that starts empty has nothing to withdraw.
                None if !resume => continue,
                None => frames.push(frame(Frame::Withdraw(pb::Withdraw {
                    version: *version,
                    previous,
                    namespace: key.0.clone(),
                    name: key.1.clone(),
                }))),
            }
            previous = *version;
        }
        frames
    }

    /// The lease for this moment.
    #[must_use]
    pub fn lease(&self) -> pb::ExporterFrame {
        let live = self.entries.iter().filter(|(_, (_, s))| s.is_some()).map(|(k, (v, _))| (k, *v));
        frame(Frame::Lease(pb::Lease { duration_ms: LEASE_MS, version: self.head, digest: digest(live) }))
    }
}

pub(crate) fn frame(f: Frame) -> pb::ExporterFrame {
    pb::ExporterFrame { frame: Some(f) }
}
