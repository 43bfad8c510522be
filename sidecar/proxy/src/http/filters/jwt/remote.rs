//! Keys that are fetched, shared by all workers.
//!
//! The first request that needs keys fetches them and the others wait for that one fetch. With `async_fetch`
//! keys are fetched again shortly before they expire while the old ones still serve.

use std::{
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::Method;
use mesh_model::proxy as model;
use tokio::sync::Notify;

use super::keys::KeySet;
use crate::{
    http::{client, headers::Headers},
    upstream::{
        cluster::ClusterSlot,
        host::{now_ms, unique_id},
    },
    worker::Worker,
};

/// Bytes of a key set.
const MAX_SET: usize = 1 << 20;
/// Keys are renewed this long before they expire, if anybody uses them then.
const AHEAD: Duration = Duration::from_secs(5);
/// After a failed renewal the next one waits this long; Envoy's default for its own.
const RETRY: u64 = 1000;

/// A compiled [`model::RemoteJwks`].
#[derive(Debug)]
pub(super) struct Remote(Arc<State>);

#[derive(Debug)]
struct State {
    authority: String,
    path: String,
    cluster: Arc<ClusterSlot>,
    timeout: Duration,
    cache_ms: u64,
    ahead_ms: u64,
    renew: bool,
    keys: ArcSwapOption<Fetched>,
    fetching: AtomicBool,
    /// No renewal before this time.
    not_before: AtomicU64,
    done: Notify,
}

#[derive(Debug)]
struct Fetched {
    keys: Arc<KeySet>,
    generation: u64,
    /// On the process's clock, milliseconds.
    expires: u64,
}

impl Remote {
    pub(super) fn new(c: &model::RemoteJwks, cluster: Arc<ClusterSlot>) -> Result<Self, String> {
        let (authority, path) =
            client::split_uri(&c.uri).ok_or_else(|| format!("{:?} is not an HTTP URI", c.uri))?;
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let cache_ms = ms(c.cache_duration).max(1);
        Ok(Self(Arc::new(State {
            authority: authority.to_owned(),
            path: path.to_owned(),
            cluster,
            timeout: if c.timeout.is_zero() { Duration::from_secs(5) } else { c.timeout },
            cache_ms,
            ahead_ms: ms(AHEAD).min(cache_ms / 2),
            renew: c.async_fetch,
            keys: ArcSwapOption::empty(),
            fetching: AtomicBool::new(false),
            not_before: AtomicU64::new(0),
            done: Notify::new(),
        })))
    }

    /// Changes with every fetch.
    pub(super) fn generation(&self) -> u64 {
        self.current().map_or(0, |f| f.generation)
    }

    fn current(&self) -> Option<Arc<Fetched>> {
        self.0.keys.load_full().filter(|f| now_ms() < f.expires)
    }

    /// Keys and their generation; `None` until they are fetched.
    pub(super) fn keys(&self) -> Option<(Arc<KeySet>, u64)> {
        self.current().map(|f| (Arc::clone(&f.keys), f.generation))
    }

    /// Waits for a fetch; true if there are keys.
    pub(super) async fn wait(&self, worker: &Rc<Worker>) -> bool {
        let state = &self.0;
        let done = state.done.notified();
        tokio::pin!(done);
        // Registered before the fetch may end, so that its end is not missed.
        done.as_mut().enable();
        if self.current().is_none() {
            state.start(worker);
            // The fetch bounds its time; the one more second is for a worker that stops in the middle of it.
            if tokio::time::timeout(state.timeout + Duration::from_secs(1), done).await.is_err() {
                state.fetching.store(false, Relaxed);
            }
        }
        self.current().is_some()
    }

    /// Renews keys that are about to expire.
    pub(super) fn renew_ahead(&self, worker: &Rc<Worker>) {
        let state = &self.0;
        if !state.renew {
            return;
        }
        let now = now_ms();
        let due = state.keys.load().as_ref().is_some_and(|f| now + state.ahead_ms >= f.expires);
        if due && now >= state.not_before.load(Relaxed) {
            state.start(worker);
        }
    }
}

impl State {
    /// Begins a fetch unless one is running.
    fn start(self: &Arc<Self>, worker: &Rc<Worker>) {
        if self.fetching.swap(true, Relaxed) {
            return;
        }
        let (state, worker) = (Arc::clone(self), Rc::clone(worker));
        tokio::task::spawn_local(async move {
            match state.fetch(&worker).await {
                Ok(keys) => {
                    let fetched = Fetched {
                        keys: Arc::new(keys),
                        generation: unique_id(),
                        expires: now_ms().saturating_add(state.cache_ms),
                    };
                    state.keys.store(Some(Arc::new(fetched)));
                }
                Err(error) => {
                    tracing::warn!(%error, authority = %state.authority, "keys were not fetched");
                    state.not_before.store(now_ms() + RETRY, Relaxed);
                }
            }
            state.fetching.store(false, Relaxed);
            state.done.notify_waiters();
        });
    }

    async fn fetch(&self, worker: &Rc<Worker>) -> Result<KeySet, String> {
        let head = client::head(Method::GET, &self.authority, &self.path, Headers::default(), 0);
        let a = client::call(worker, &self.cluster, &head, Bytes::new(), self.timeout, MAX_SET)
            .await
            .map_err(|e| e.to_string())?;
        if a.status != 200 {
            return Err(format!("status {}", a.status));
        }
        KeySet::parse(std::str::from_utf8(&a.body).map_err(|e| e.to_string())?)
    }
}
