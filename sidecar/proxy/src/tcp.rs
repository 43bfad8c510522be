//! The TCP proxy: bytes both ways, each direction paced by its reader and closed on its own.

pub(crate) mod splice;

use std::{
    cell::Cell,
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use mesh_model::proxy::Discovery;
use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use self::splice::{Next, Pipes, Splice};
use crate::{
    config::listener::{TcpProxy, Terminal},
    http::record::TcpRecord,
    io::Io,
    on_demand::{self, Waited},
    refusal::Refusal,
    tunnel::{self, client::ConnectRequest, relay::relay},
    upstream::{
        self,
        cluster::{Cluster, ClusterSlot, Outcome, Permit},
        connect::{ConnectError, Want},
        host::{ActiveGuard, Host},
        names,
    },
    worker::{
        Worker,
        connection::{Connection, revoked},
    },
};

/// Bytes moved at once in one direction: eight TLS records.
pub(crate) const BUFFER: usize = 128 * 1024;
/// Hosts tried before giving up; Envoy's `max_connect_attempts` is one, but a refused connection has cost the
/// client nothing yet.
const CONNECT_ATTEMPTS: usize = 3;
/// The same, if all together took no more than [`FAST`].
const FAST_ATTEMPTS: usize = 16;
const FAST: Duration = Duration::from_millis(100);

/// Serves a connection until both directions have ended.
pub(crate) async fn serve(mut down: Io, conn: Rc<Connection>) {
    let Terminal::Tcp(proxy) = &conn.chain.terminal else { return };
    let mut record = TcpRecord::new(&conn);
    let passes = passes_tls(&conn, &down);
    let result = match cluster(&conn, proxy, &mut record).await {
        Ok(cluster) => run(&mut down, &conn, proxy, &cluster, &mut record).await,
        Err(failure) => {
            if passes && record.cluster.is_none() {
                Refusal::UnknownName.send(&mut down).await;
            }
            Err(failure)
        }
    };
    if let Err((flags, details)) = result {
        record.flags = flags;
        record.details = details;
    }
    let _ =
        tokio::time::timeout(Duration::from_millis(500), poll_fn(|cx| Pin::new(&mut down).poll_shutdown(cx)))
            .await;
    record.finish(&proxy.logs);
}

/// The cluster of a connection; one that does not exist is waited for where it is asked for.
pub(crate) async fn cluster(
    conn: &Rc<Connection>,
    proxy: &TcpProxy,
    record: &mut TcpRecord,
) -> Result<Arc<Cluster>, Failure> {
    let mut slot = destination(conn, proxy);
    let mut found = slot.as_ref().and_then(|s| s.load());
    let mut details = "cluster_not_found";
    if let Some(o) = proxy.config.on_demand {
        let sni = conn.sni.as_deref().filter(|_| conn.chain.sni_cluster);
        let name = slot.as_ref().map(|s| Arc::clone(&s.name)).or_else(|| sni.map(Arc::from));
        if let (None, Some(name)) = (&found, name) {
            // Boxed, so that connections whose cluster exists do not carry it.
            let waiting = Box::pin(on_demand::cluster_of_connection(conn, &name, o.timeout));
            let (there, waited) = waiting.await;
            found = there.as_ref().and_then(|s| s.load());
            slot = there.or(slot);
            if waited == Waited::Refused {
                details = on_demand::LIMIT;
            }
        }
        if let Some(slot) = &slot {
            slot.touch();
        }
    }
    record.cluster = slot;
    found.ok_or_else(|| ("NC", details.to_owned()))
}

fn destination(conn: &Connection, proxy: &TcpProxy) -> Option<Arc<ClusterSlot>> {
    if conn.chain.sni_cluster {
        let sni = upstream::lb::without_slot(conn.sni.as_deref()?);
        let compiled = conn.worker.shared.compiled.load();
        // An SNI names a cluster of this proxy or nothing: no fallback, or a stranger could choose it. Istio's
        // SNI form of a cluster name is looked up as that name as well.
        return compiled
            .clusters
            .get(sni)
            .or_else(|| compiled.clusters.get(sni_to_cluster(sni)?.as_str()))
            .cloned();
    }
    Some(Arc::clone(proxy.destination(conn.worker.rng.next())))
}

/// `outbound_.9080_.v1_.host` as `outbound|9080|v1|host`.
fn sni_to_cluster(sni: &str) -> Option<String> {
    let rest = sni.strip_prefix("outbound_.")?;
    let (port, rest) = rest.split_once("_.")?;
    let (subset, host) = match rest.strip_prefix("_.") {
        Some(host) => ("", host),
        None => rest.split_once("_.")?,
    };
    Some(format!("outbound|{port}|{subset}|{host}"))
}

pub(crate) type Failure = (&'static str, String);

async fn run(
    down: &mut Io,
    conn: &Rc<Connection>,
    proxy: &TcpProxy,
    cluster: &Arc<Cluster>,
    record: &mut TcpRecord,
) -> Result<(), Failure> {
    let times = Times::of(proxy);
    // Boxed: what a dial needs would otherwise be kept for as long as the connection is.
    let port = proxy.config.names.as_ref().map(|(_, port)| *port);
    let connected = Box::pin(self::connect(conn, cluster, proxy.tunnel.as_ref(), port, record)).await;
    let (mut up, holds) = match connected {
        Ok(c) => c,
        Err(e) => {
            if let Some(r) = refusal(cluster).filter(|_| passes_tls(conn, down)) {
                r.send(down).await;
            }
            return Err(e);
        }
    };
    carry(conn, down, &mut up, times, &holds, record).await
}

/// Whether this is a session that somebody else ends, of which nothing was answered yet.
fn passes_tls(conn: &Connection, down: &Io) -> bool {
    conn.sni.is_some() && !conn.tls && matches!(down, Io::Plain(_))
}

/// Clusters of gateways: the way to another member of the federation, and a service by its server name.
pub(crate) const PEER: &str = "peer|";
const BY_SERVER_NAME: &str = "outbound_.";

/// Sessions between control planes: they never end by themselves, and go on where they were when they are opened
/// again, so a drain does not wait for them.
const EXCHANGE: &str = "federation.";

/// What a failed connection means to those who wait behind this gateway. `None` if it is none, or another try might do
/// better.
fn refusal(cluster: &Cluster) -> Option<Refusal> {
    if cluster.config.name.starts_with(PEER) {
        return Some(Refusal::NoWay);
    }
    if !cluster.config.name.starts_with(BY_SERVER_NAME) {
        return None;
    }
    let all_bad = cluster.tables().hosts.iter().all(|h| !h.is_usable());
    all_bad.then_some(Refusal::NoBackend)
}

/// What an upstream connection counts as, for as long as it lives.
pub(crate) struct Holds {
    _permit: Permit,
    _active: ActiveGuard,
    /// Whose health ends the connection, if any does.
    host: Option<Arc<Host>>,
}

impl Holds {
    /// Waits until the host becomes unhealthy, if the cluster ends connections for that.
    async fn failed(&self) {
        match &self.host {
            Some(h) => h.stats.failure().notified().await,
            None => std::future::pending().await,
        }
    }
}

/// An upstream connection within the cluster's limits; it is counted as opened. With `tunnel` it may be a stream of a
/// shared connection, and is then limited as requests are. `port` is that of hosts which the SNI names.
pub(crate) async fn connect(
    conn: &Rc<Connection>,
    cluster: &Arc<Cluster>,
    tunnel: Option<&ConnectRequest>,
    port: Option<u16>,
    record: &mut TcpRecord,
) -> Result<(Io, Holds), Failure> {
    let limits = &cluster.config.limits;
    let permit = match tunnel {
        Some(_) if tunnel::client::are_streams(cluster) => {
            Permit::take(&cluster.usage, |u| &u.requests, limits.max_requests)
        }
        _ => Permit::take(&cluster.usage, |u| &u.connections, limits.max_connections),
    };
    let Some(permit) = permit else { return Err(("UO", "upstream_overflow".into())) };
    let (up, host) = dial(conn, cluster, tunnel, port, &mut record.attempts).await?;
    let active = ActiveGuard::new(&host.stats);
    let watched = cluster.config.close_on_health_failure.then(|| Arc::clone(&host));
    record.host = Some(host);
    if let Io::Tunnel(t) = &up {
        record.principal = t.peer();
    }
    record.opened();
    Ok((up, Holds { _permit: permit, _active: active, host: watched }))
}

/// How long a connection may last.
#[derive(Clone, Copy)]
pub(crate) struct Times {
    /// Without a byte.
    pub(crate) idle: Option<Duration>,
    /// Whatever passes.
    pub(crate) end: Option<Instant>,
}

impl Times {
    /// Of a connection that begins now.
    pub(crate) fn of(proxy: &TcpProxy) -> Self {
        let end = proxy.config.max_duration.map(|d| Instant::now() + d);
        Self { idle: proxy.config.idle_timeout, end }
    }

    /// Waits until the connection has lasted for long enough.
    async fn over(self) {
        match self.end {
            // Boxed, so that connections without an end do not carry a timer.
            Some(at) => Box::pin(tokio::time::sleep_until(at)).await,
            None => std::future::pending().await,
        }
    }
}

/// Moves bytes both ways until both directions have ended.
pub(crate) async fn carry(
    conn: &Connection,
    down: &mut Io,
    up: &mut Io,
    times: Times,
    holds: &Holds,
    record: &mut TcpRecord,
) -> Result<(), Failure> {
    let idle = times.idle.filter(|t| !t.is_zero());
    let (received, sent) = record.counters();
    let (received, sent) = (Moved::new(received), Moved::new(sent));
    let signals = conn.signals.subscribe();
    let streams = matches!(down, Io::Tunnel(_)) || matches!(up, Io::Tunnel(_));
    let shown = up.shown();
    let moving = async {
        if streams {
            relay(&conn.worker, down, up, &received, &sent, idle).await
        } else {
            copy_both(&conn.worker, down, up, &received, &sent, idle).await
        }
    };
    let resumes = !conn.tls && conn.sni.as_deref().is_some_and(|n| n.starts_with(EXCHANGE));
    let result = tokio::select! {
        r = moving => r,
        () = signals.drained(), if resumes => Err(("DC", "drained".into())),
        () = signals.killed() => Err(("DC", "drained".into())),
        () = times.over() => Err(("DT", "max_connection_duration_reached".into())),
        () = holds.failed() => Err(("UC", "upstream_host_unhealthy".into())),
        () = revoked(&conn.worker, shown.as_ref()) => Err(("UC", "upstream_certificate_revoked".into())),
    };
    record.received = received.bytes.get();
    record.sent = sent.bytes.get();
    result
}

async fn dial(
    conn: &Rc<Connection>,
    cluster: &Arc<Cluster>,
    tunnel: Option<&ConnectRequest>,
    port: Option<u16>,
    attempts: &mut u32,
) -> Result<(Io, Arc<Host>), Failure> {
    let mut tried = Vec::new();
    let named = match cluster.names() {
        Some(names) => {
            let found = names.hosts(conn.sni.as_deref().unwrap_or_default(), port).await;
            Some(found.map_err(|e| (e.flag(), e.details().to_owned()))?)
        }
        None => None,
    };
    let mut last = ("UH", "no_healthy_upstream".to_owned());
    let begun = Instant::now();
    // What is refused at once costs little: a service of many workloads, most of which just died, is still served.
    while tried.len() < CONNECT_ATTEMPTS || (tried.len() < FAST_ATTEMPTS && begun.elapsed() < FAST) {
        let picked = match &named {
            Some(hosts) => names::next(hosts, &tried).ok_or_else(|| last.clone()),
            None => pick(conn, cluster, &tried),
        };
        let host = match picked {
            Ok(h) => h,
            Err(e) => return Err(if tried.is_empty() { e } else { last }),
        };
        if tried.contains(&host.stats.id) {
            break;
        }
        tried.push(host.stats.id);
        *attempts += 1;
        let client = Some((conn.peer, conn.local));
        let connected = match tunnel {
            None if cluster.may_tunnel(&host) => {
                tunnel::client::negotiate(&conn.worker, cluster, &host).await
            }
            None => upstream::connect::connect_for(&conn.worker, cluster, &host, Want::Any, client).await,
            Some(to) => tunnel::client::open(&conn.worker, cluster, &host, to, client).await,
        };
        match connected {
            Ok(io) => {
                cluster.observe(&host, Outcome::Connected);
                return Ok((io, host));
            }
            Err(e) => {
                cluster.observe(
                    &host,
                    match e {
                        ConnectError::Refusal(r) => Outcome::Refused(r),
                        _ => Outcome::Failed,
                    },
                );
                let timeout = matches!(e, ConnectError::Timeout);
                last = (
                    "UF",
                    if timeout {
                        "connect_timeout".to_owned()
                    } else {
                        format!("upstream_connect_failure[{e}]")
                    },
                );
            }
        }
    }
    Err(last)
}

/// A host for a connection.
pub(crate) fn pick(conn: &Connection, cluster: &Cluster, tried: &[u64]) -> Result<Arc<Host>, Failure> {
    if cluster.config.discovery == Discovery::OriginalDst {
        // Sending a connection that came here on purpose to where it came from would loop.
        if !conn.redirected {
            return Err(("UH", "original_dst_not_redirected".into()));
        }
        return Ok(Arc::new(Host::original(conn.local)));
    }
    let hash = matches!(
        cluster.config.lb,
        mesh_model::proxy::LbPolicy::RingHash(_) | mesh_model::proxy::LbPolicy::Maglev(_)
    )
    .then(|| crate::upstream::lb::stable_hash(conn.peer.ip().to_string().as_bytes()));
    let tables = cluster.tables();
    if let Some(h) = tables.pick_slot(&conn.worker.rng, conn.sni.as_deref(), tried) {
        return Ok(Arc::clone(h));
    }
    tables
        .pick_untried(&conn.worker.rng, hash, tried)
        .cloned()
        .ok_or_else(|| ("UH", "no_healthy_upstream".to_owned()))
}

/// Bytes of one direction, counted as they pass: some connections live for days.
pub(crate) struct Moved {
    bytes: Cell<u64>,
    metric: Option<Counter>,
}

impl Moved {
    fn new(metric: Option<Counter>) -> Self {
        Self { bytes: Cell::new(0), metric }
    }

    /// Bytes so far.
    pub(crate) fn total(&self) -> u64 {
        self.bytes.get()
    }

    pub(crate) fn add(&self, n: u64) {
        self.bytes.set(self.bytes.get() + n);
        if let Some(m) = &self.metric {
            m.inc_by(n);
        }
    }
}

/// One direction. Bytes pass through a buffer of the worker, so an idle connection holds none.
#[derive(Default)]
struct Half {
    /// Read, and not yet taken by the writer.
    pending: Bytes,
    eof: bool,
    dirty: bool,
    done: bool,
    splice: Splice,
}

impl Half {
    /// Moves bytes until one side must wait; `Ready` when the reader has ended and the writer was told.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut [u8],
        pipes: Option<&Rc<Pipes>>,
        from: &mut Io,
        to: &mut Io,
        moved: &Moved,
    ) -> Poll<std::io::Result<()>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        loop {
            while !self.pending.is_empty() {
                let n = ready!(write(to, cx, &self.pending))?;
                self.pending.advance(n);
                moved.add(n as u64);
            }
            if self.eof {
                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            if self.splice.is_due()
                && let (Some(pipes), Some(a), Some(b)) = (pipes, from.plain_tcp(), to.plain_tcp())
                && let Next::End = ready!(self.splice.poll(cx, pipes, a, b, moved))?
            {
                self.eof = true;
                continue;
            }
            let (filled, waiting) = self.fill(cx, scratch, from)?;
            self.splice.copied(filled);
            let mut sent = 0;
            while sent < filled {
                match write(to, cx, &scratch[sent..filled]) {
                    Poll::Ready(n) => sent += n?,
                    Poll::Pending => {
                        self.pending = Bytes::copy_from_slice(&scratch[sent..filled]);
                        break;
                    }
                }
            }
            self.dirty |= sent > 0;
            moved.add(sent as u64);
            if !self.pending.is_empty() {
                return Poll::Pending;
            }
            if waiting {
                // Nothing more to read: what was written should not wait inside of TLS.
                if self.dirty && Pin::new(&mut *to).poll_flush(cx)?.is_ready() {
                    self.dirty = false;
                }
                return Poll::Pending;
            }
        }
    }

    /// Reads until the buffer is full or the reader has no more for now (`true`): TLS hands out one record at a time,
    /// and several are worth one write.
    fn fill(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut [u8],
        from: &mut Io,
    ) -> std::io::Result<(usize, bool)> {
        let mut b = ReadBuf::new(scratch);
        while b.remaining() > 0 {
            let before = b.filled().len();
            match Pin::new(&mut *from).poll_read(cx, &mut b) {
                Poll::Ready(r) => r?,
                Poll::Pending => return Ok((before, true)),
            }
            if b.filled().len() == before {
                self.eof = true;
                break;
            }
        }
        Ok((b.filled().len(), false))
    }
}

fn write(to: &mut Io, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
    match ready!(Pin::new(to).poll_write(cx, data)) {
        Ok(0) => Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
        other => Poll::Ready(other),
    }
}

async fn copy_both(
    worker: &Worker,
    down: &mut Io,
    up: &mut Io,
    received: &Moved,
    sent: &Moved,
    idle: Option<Duration>,
) -> Result<(), Failure> {
    let (mut request, mut response) = (Half::default(), Half::default());
    let mut alarm = worker.alarms.alarm();
    let mut idle = idle.map(|limit| (limit, Instant::now() + limit));
    let mut seen = 0;
    let pipes = worker.options.splice.then_some(&worker.pipes);
    poll_fn(|cx| {
        let (a, b) = {
            let scratch = &mut *worker.scratch.borrow_mut();
            let a = request.poll(cx, scratch, pipes, down, up, received);
            (a, response.poll(cx, scratch, pipes, up, down, sent))
        };
        match (a, b) {
            (Poll::Ready(Err(_)), _) => {
                return Poll::Ready(Err(("DC", "downstream_or_upstream_reset".to_owned())));
            }
            (_, Poll::Ready(Err(_))) => return Poll::Ready(Err(("UC", "upstream_reset".to_owned()))),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Ok(())),
            _ => {}
        }
        if let Some((limit, at)) = idle.as_mut() {
            // Activity is noticed when the timer fires rather than by moving the timer at each byte.
            while alarm.poll(*at, cx).is_ready() {
                let now = received.bytes.get() + sent.bytes.get();
                if now == seen {
                    return Poll::Ready(Err(("SI", "idle_timeout".to_owned())));
                }
                seen = now;
                *at = Instant::now() + *limit;
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sni_names_clusters() {
        assert_eq!(
            sni_to_cluster("outbound_.9080_._.a.b.svc.cluster.local").unwrap(),
            "outbound|9080||a.b.svc.cluster.local"
        );
        assert_eq!(sni_to_cluster("outbound_.9080_.v1_.a.b").unwrap(), "outbound|9080|v1|a.b");
        assert_eq!(sni_to_cluster("a.b"), None);
    }
}
