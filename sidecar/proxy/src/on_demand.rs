//! Asking for what traffic needs and the configuration does not have.
//!
//! Nothing here is on the path of a request whose virtual host and cluster exist. One that lacks them waits, beside its
//! worker's other requests, with its body unread, until an [`OnDemand`] hook says that the matter is settled; then it
//! looks again.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use crate::{
    config::listener::HttpManager,
    http::{
        downstream::Downstream,
        local_reply::LocalReply,
        record::{Flag, Record},
    },
    options::{OnDemand, Settled, Wanted},
    upstream::cluster::ClusterSlot,
    worker::{Shared, connection::Connection},
};

/// How long a request waits for a virtual host, if its stream may be idle for longer than that. Envoy has only the
/// limit of the stream.
pub(crate) const HOST_TIMEOUT: Duration = Duration::from_secs(15);

/// Details of a request for a name that was not asked for, since too many others were.
pub(crate) const LIMIT: &str = "on_demand_limit";

/// How waiting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    Settled,
    /// Not asked for, and why.
    Refused,
    Late,
}

async fn ask(shared: &Shared, hook: &Arc<dyn OnDemand>, what: Wanted<'_>, limit: Duration) -> Waited {
    let in_use = |what: Wanted<'_>| in_use(shared, what);
    match tokio::time::timeout(limit, hook.want(what, &in_use)).await {
        Ok(Settled::Known) => Waited::Settled,
        Ok(Settled::Refused) => Waited::Refused,
        Err(_) => Waited::Late,
    }
}

/// Whether traffic has used something since this was asked last.
fn in_use(shared: &Shared, what: Wanted<'_>) -> bool {
    let compiled = shared.compiled.load();
    match what {
        Wanted::Cluster(name) => compiled.clusters.get(name).is_some_and(|slot| {
            let busy = slot
                .load()
                .is_some_and(|c| c.usage.connections.load(Relaxed) > 0 || c.usage.requests.load(Relaxed) > 0);
            slot.used.swap(false, Relaxed) || busy
        }),
        Wanted::VirtualHost { routes, host } => {
            let table = compiled.routes.get(routes).and_then(|r| r.current.load_full());
            table.is_some_and(|t| t.host(host).is_some_and(|h| h.used.swap(false, Relaxed)))
        }
    }
}

/// Waits for a virtual host, or until the client has gone, which is the error.
pub(crate) async fn host<D: Downstream>(
    conn: &Connection,
    manager: &HttpManager,
    routes: &str,
    authority: &str,
    down: &D,
    rec: &mut Record,
) -> Result<(), LocalReply> {
    let Some(hook) = &conn.worker.shared.hooks.on_demand else { return Ok(()) };
    let host = authority.to_ascii_lowercase();
    let what = Wanted::VirtualHost { routes, host: &host };
    let limit = manager.config.stream_idle_timeout.map_or(HOST_TIMEOUT, |t| t.min(HOST_TIMEOUT));
    match while_there(ask(&conn.worker.shared, hook, what, limit), down, rec).await? {
        Waited::Refused => {
            rec.flag(Flag::Nr);
            rec.details = LIMIT.into();
            Err(LocalReply { status: 503, ..LocalReply::default() })
        }
        Waited::Late => Err(idle(rec)),
        Waited::Settled => Ok(()),
    }
}

/// What Envoy says of any stream on which nothing happens.
fn idle(rec: &mut Record) -> LocalReply {
    rec.flag(Flag::Si);
    rec.details = "stream_idle_timeout".into();
    LocalReply::text(504, "stream timeout")
}

/// The slot of a cluster that a request lacks, when it is there.
pub(crate) async fn cluster<D: Downstream>(
    conn: &Connection,
    manager: &HttpManager,
    name: &str,
    limit: Duration,
    down: &D,
    rec: &mut Record,
) -> Result<Option<Arc<ClusterSlot>>, LocalReply> {
    let shared = &conn.worker.shared;
    let Some(hook) = &shared.hooks.on_demand else { return Ok(None) };
    let stream = manager.config.stream_idle_timeout.filter(|t| *t < limit);
    let waiting = ask(shared, hook, Wanted::Cluster(name), stream.unwrap_or(limit));
    match while_there(waiting, down, rec).await? {
        Waited::Refused => rec.details = LIMIT.into(),
        Waited::Late if stream.is_some() => return Err(idle(rec)),
        Waited::Late | Waited::Settled => {}
    }
    Ok(named(conn, name))
}

/// The same for a connection, whose client is not looked after.
pub(crate) async fn cluster_of_connection(
    conn: &Connection,
    name: &str,
    limit: Duration,
) -> (Option<Arc<ClusterSlot>>, Waited) {
    let shared = &conn.worker.shared;
    let Some(hook) = &shared.hooks.on_demand else { return (None, Waited::Settled) };
    let signals = conn.signals.subscribe();
    let waited = tokio::select! {
        w = ask(shared, hook, Wanted::Cluster(name), limit) => w,
        () = signals.killed() => Waited::Late,
    };
    (named(conn, name), waited)
}

/// The slot of a cluster by a name that came with traffic.
pub(crate) fn named(conn: &Connection, name: &str) -> Option<Arc<ClusterSlot>> {
    conn.worker.shared.compiled.load().clusters.get(name).cloned()
}

async fn while_there<D: Downstream>(
    waiting: impl Future<Output = Waited>,
    down: &D,
    rec: &mut Record,
) -> Result<Waited, LocalReply> {
    tokio::select! {
        biased;
        w = waiting => Ok(w),
        () = poll_fn(|cx| down.poll_gone(cx)) => {
            rec.flag(Flag::Dc);
            rec.details = "downstream_remote_disconnect".into();
            Err(LocalReply::default())
        }
    }
}
