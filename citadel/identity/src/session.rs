//! Session resumption that ends when trust changes.
//!
//! A resumed session skips certificate verification, so a ticket that outlives the bundle it was
//! verified under would let a revoked peer back in. Both caches here forget everything as soon as
//! the store's trust generation moves.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwap;
use rustls::{
    NamedGroup,
    client::{
        ClientSessionMemoryCache, ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue,
    },
    server::{ServerSessionMemoryCache, StoresServerSessions},
};
use rustls_pki_types::ServerName;

/// Sessions kept per configuration: enough for the callers of one workload, bounded in memory.
const SESSIONS: usize = 1024;

struct Generational<T: ?Sized> {
    generation: Arc<AtomicU64>,
    current: ArcSwap<(u64, Arc<T>)>,
    make: fn() -> Arc<T>,
}

impl<T: ?Sized> Generational<T> {
    fn new(generation: Arc<AtomicU64>, make: fn() -> Arc<T>) -> Self {
        let now = generation.load(Ordering::Acquire);
        Self { generation, current: ArcSwap::from_pointee((now, make())), make }
    }

    fn get(&self) -> Arc<T> {
        let now = self.generation.load(Ordering::Acquire);
        let current = self.current.load();
        if current.0 == now {
            return current.1.clone();
        }
        let fresh = Arc::new((now, (self.make)()));
        self.current.store(fresh.clone());
        fresh.1.clone()
    }
}

pub(crate) struct ServerSessions(Generational<ServerSessionMemoryCache>);

impl ServerSessions {
    pub(crate) fn new(generation: Arc<AtomicU64>) -> Self {
        Self(Generational::new(generation, || ServerSessionMemoryCache::new(SESSIONS)))
    }
}

impl std::fmt::Debug for ServerSessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerSessions")
    }
}

impl StoresServerSessions for ServerSessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.0.get().put(key, value)
    }
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.get().get(key)
    }
    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.get().take(key)
    }
    fn can_cache(&self) -> bool {
        true
    }
}

pub(crate) struct ClientSessions(Generational<ClientSessionMemoryCache>);

impl ClientSessions {
    pub(crate) fn new(generation: Arc<AtomicU64>) -> Self {
        Self(Generational::new(generation, || Arc::new(ClientSessionMemoryCache::new(SESSIONS))))
    }
}

impl std::fmt::Debug for ClientSessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientSessions")
    }
}

impl ClientSessionStore for ClientSessions {
    fn set_kx_hint(&self, server_name: ServerName<'static>, group: NamedGroup) {
        self.0.get().set_kx_hint(server_name, group);
    }
    fn kx_hint(&self, server_name: &ServerName<'_>) -> Option<NamedGroup> {
        self.0.get().kx_hint(server_name)
    }
    fn set_tls12_session(&self, server_name: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.0.get().set_tls12_session(server_name, value);
    }
    fn tls12_session(&self, server_name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.0.get().tls12_session(server_name)
    }
    fn remove_tls12_session(&self, server_name: &ServerName<'static>) {
        self.0.get().remove_tls12_session(server_name);
    }
    fn insert_tls13_ticket(&self, server_name: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.0.get().insert_tls13_ticket(server_name, value);
    }
    fn take_tls13_ticket(&self, server_name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.get().take_tls13_ticket(server_name)
    }
}
