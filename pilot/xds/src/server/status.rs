//! What every connected client was sent, acknowledged and rejected.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use crate::node::NodeInfo;

/// Synchronisation of one type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TypeStatus {
    /// Version of the last response.
    pub sent_version: String,
    /// Nonce of the last response.
    pub sent_nonce: String,
    /// Version last acknowledged.
    pub acked_version: String,
    /// Nonce last acknowledged.
    pub acked_nonce: String,
    /// Why the last response was rejected, until one is accepted again.
    pub error: Option<String>,
    /// Named subscriptions; 0 with a wildcard.
    pub subscribed: usize,
    /// Responses sent.
    pub pushes: u64,
    /// Responses rejected.
    pub nacks: u64,
}

impl TypeStatus {
    /// `SYNCED`, `STALE` (sent, not yet answered) or `NACKED`.
    #[must_use]
    pub fn state(&self) -> &'static str {
        if self.error.is_some() {
            "NACKED"
        } else if self.sent_nonce == self.acked_nonce {
            "SYNCED"
        } else {
            "STALE"
        }
    }
}

/// A connected client.
#[derive(Debug, Clone)]
pub struct ClientStatus {
    /// Who it is.
    pub node: NodeInfo,
    /// Whether it has shown a client certificate.
    pub certified: bool,
    /// When its stream opened.
    pub connected: SystemTime,
    /// By type URL.
    pub types: BTreeMap<String, TypeStatus>,
}

/// All connected clients of a server.
#[derive(Debug, Default)]
pub struct StatusBoard {
    clients: Mutex<BTreeMap<u64, ClientStatus>>,
    next: AtomicU64,
    pushes: AtomicU64,
    rejects: AtomicU64,
}

impl StatusBoard {
    // Every critical section below leaves the map whole, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, ClientStatus>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open(&self, node: &NodeInfo, certified: bool) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let status = ClientStatus {
            node: node.clone(),
            certified,
            connected: SystemTime::now(),
            types: BTreeMap::new(),
        };
        self.lock().insert(id, status);
        id
    }

    pub(super) fn update(&self, id: u64, types: BTreeMap<String, TypeStatus>) {
        if let Some(c) = self.lock().get_mut(&id) {
            c.types = types;
        }
    }

    pub(super) fn close(&self, id: u64) {
        self.lock().remove(&id);
    }

    pub(super) fn count(&self, pushes: u64, rejects: u64) {
        self.pushes.fetch_add(pushes, Ordering::Relaxed);
        self.rejects.fetch_add(rejects, Ordering::Relaxed);
    }

    /// Everyone who is connected now.
    #[must_use]
    pub fn clients(&self) -> Vec<ClientStatus> {
        self.lock().values().cloned().collect()
    }

    /// How many are connected now.
    #[must_use]
    pub fn connected(&self) -> usize {
        self.lock().len()
    }

    /// Responses sent since the start.
    #[must_use]
    pub fn pushes(&self) -> u64 {
        self.pushes.load(Ordering::Relaxed)
    }

    /// Responses rejected since the start.
    #[must_use]
    pub fn rejects(&self) -> u64 {
        self.rejects.load(Ordering::Relaxed)
    }
}
