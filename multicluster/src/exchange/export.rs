//! What this cluster exports, as a log.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use mesh_model::{
    ClusterId,
    federation::{Audience, Offer},
};
use prost::Message as _;

use super::{LEASE_MS, ServiceKey, audience, entry_hash};
use crate::{
    pb::{self, exporter_frame::Frame},
    wire::{MAX_SERVICES, service_pb},
};

/// Tombstones kept for importers that resume; older offsets start over.
const MAX_TOMBSTONES: usize = 4096;

#[derive(Debug)]
struct Entry {
    /// Of its last change.
    version: u64,
    /// The encoded service, shared by the frames to all importers; `None` is a tombstone.
    service: Option<Bytes>,
    audience: Audience,
    /// Everybody who has been told of it: they must hear when it is no longer for them, and nobody else.
    told: Audience,
}

/// Table of exports with the version of each entry's last change.
#[derive(Debug)]
pub struct ExportLog {
    id: u64,
    head: u64,
    /// Offsets below this cannot be resumed: a tombstone after them is gone.
    horizon: u64,
    ready: bool,
    live: usize,
    entries: BTreeMap<ServiceKey, Entry>,
    by_version: BTreeMap<u64, ServiceKey>,
    tombstones: BTreeSet<u64>,
    /// Digest of what everybody sees, and what single peers see beyond it (or less).
    digest: u64,
    special: BTreeMap<ClusterId, u64>,
}

/// One change as an importer is told of it.
pub(super) enum Change {
    /// Nothing that this importer may know.
    Hidden,
    Announce(Bytes),
    Withdraw(ServiceKey),
}

impl ExportLog {
    /// An empty log; `id` must differ from that of every earlier run. It says nothing, not even that it is empty, until
    /// it is told for the first time what there is.
    #[must_use]
    pub fn new(id: u64) -> Self {
        Self {
            id,
            head: 0,
            horizon: 0,
            ready: false,
            live: 0,
            entries: BTreeMap::new(),
            by_version: BTreeMap::new(),
            tombstones: BTreeSet::new(),
            digest: 0,
            special: BTreeMap::new(),
        }
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

    /// Whether it is known what is exported. A control plane that has just started does not know, and importers must
    /// not take that for an empty table.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// Offsets below this start over.
    pub(super) fn horizon(&self) -> u64 {
        self.horizon
    }

    /// Live exports.
    #[must_use]
    pub fn len(&self) -> usize {
        self.live
    }

    /// Whether nothing is exported.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Replaces the table; answers whether anything changed.
    pub fn replace(&mut self, all: BTreeMap<ServiceKey, Offer>) -> bool {
        let live = self.entries.iter().filter(|(_, e)| e.service.is_some());
        let gone: Vec<_> =
            live.filter(|(k, _)| !all.contains_key(*k)).map(|(k, _)| (k.clone(), None)).collect();
        self.apply(gone.into_iter().chain(all.into_iter().map(|(k, o)| (k, Some(o)))))
    }

    /// Changes single exports (`None` withdraws); answers whether anything changed. What is equal to what was told
    /// costs nothing. More exports than a peer accepts are left out.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = (ServiceKey, Option<Offer>)>) -> bool {
        let (before, first) = (self.head, !self.ready);
        self.ready = true;
        for (key, offer) in changes {
            let service = offer.as_ref().map(|o| Bytes::from(service_pb(&o.service).encode_to_vec()));
            let audience = offer.map(|o| o.audience).unwrap_or_default();
            let old = self.entries.get(&key);
            let same = match (old, &service) {
                (None, None) => true,
                (Some(e), None) => e.service.is_none(),
                (Some(e), Some(s)) => e.service.as_ref() == Some(s) && e.audience == audience,
                (None, Some(_)) => false,
            };
            if same {
                continue;
            }
            if service.is_some() && old.is_none_or(|e| e.service.is_none()) && self.live >= MAX_SERVICES {
                let (namespace, name) = &key;
                tracing::error!(%namespace, %name, "not exported: more than {MAX_SERVICES} services");
                continue;
            }
            self.put(key, service, audience);
        }
        self.trim();
        first || self.head != before
    }

    fn put(&mut self, key: ServiceKey, service: Option<Bytes>, audience: Audience) {
        self.head += 1;
        let version = self.head;
        let mut told = Audience::Only(BTreeSet::new());
        if let Some(old) = self.entries.remove(&key) {
            self.by_version.remove(&old.version);
            self.tombstones.remove(&old.version);
            if old.service.is_some() {
                self.live -= 1;
                self.count(&old.audience, entry_hash(&key, old.version).wrapping_neg());
            }
            told = old.told;
        }
        if service.is_some() {
            self.live += 1;
            told = audience::union(&told, &audience);
            self.count(&audience, entry_hash(&key, version));
        } else {
            self.tombstones.insert(version);
        }
        self.by_version.insert(version, key.clone());
        self.entries.insert(key, Entry { version, service, audience, told });
    }

    fn count(&mut self, audience: &Audience, hash: u64) {
        let (everybody, single) = audience::shares(audience, hash);
        self.digest = self.digest.wrapping_add(everybody);
        for (peer, share) in single {
            let d = self.special.entry(peer.clone()).or_default();
            *d = d.wrapping_add(share);
        }
    }

    fn trim(&mut self) {
        while self.tombstones.len() > MAX_TOMBSTONES {
            let Some(version) = self.tombstones.pop_first() else { return };
            if let Some(key) = self.by_version.remove(&version) {
                self.entries.remove(&key);
            }
            self.horizon = self.horizon.max(version);
        }
    }

    /// Whether `peer` is told of an export.
    #[must_use]
    pub fn is_told(&self, key: &ServiceKey, peer: &ClusterId) -> bool {
        self.entries.get(key).is_some_and(|e| e.service.is_some() && e.audience.includes(peer))
    }

    /// Changes after `version`, oldest first, as `peer` is told of them.
    pub(super) fn after<'a>(
        &'a self,
        version: u64,
        peer: &'a ClusterId,
    ) -> impl Iterator<Item = (u64, Change)> + 'a {
        self.by_version.range(version + 1..).filter_map(move |(version, key)| {
            let e = self.entries.get(key)?;
            let change = match &e.service {
                Some(s) if e.audience.includes(peer) => Change::Announce(s.clone()),
                _ if e.told.includes(peer) => Change::Withdraw(key.clone()),
                _ => Change::Hidden,
            };
            Some((*version, change))
        })
    }

    /// The lease of `peer` for this moment.
    #[must_use]
    pub fn lease(&self, peer: &ClusterId) -> pb::Lease {
        pb::Lease {
            duration_ms: LEASE_MS,
            version: self.head,
            digest: self.digest.wrapping_add(self.special.get(peer).copied().unwrap_or(0)),
            members: 0,
            partial: false,
            stamp: 0,
        }
    }

    /// Entries, tombstones included.
    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.entries.len()
    }
}

pub(crate) fn frame(f: Frame) -> pb::ExporterFrame {
    pb::ExporterFrame { frame: Some(f) }
}
