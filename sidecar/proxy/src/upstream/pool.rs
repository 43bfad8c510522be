//! Connections of one worker to one host.
//!
//! HTTP/2 keeps a single connection for as long as its streams suffice: measured against one connection for
//! each caller it halves the cost of a sidecar pair. Dials are guarded: whoever needs a connection while one is
//! being made waits for that one, since a pool in which every waiter dials ends up with one connection each.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use mesh_model::proxy::UpstreamHttp;
use tokio::{sync::Notify, time::Instant};

use super::{
    cluster::{Cluster, Permit},
    connect::{ConnectError, Want, connect, negotiated_h2, negotiated_tunnels},
    host::{Check, Host},
    keepalive::{self, Keep},
    silence::{self, Link},
};
use crate::{
    http::{h1::client::H1Conn, h2::server::MAX_WINDOW},
    io::Io,
    tunnel::MAX_FRAME,
    worker::{Worker, connection::revoked},
};

/// Idle time of upstream connections without a configured one; Envoy's default is an hour, which outlives every
/// middlebox.
const DEFAULT_IDLE: Duration = Duration::from_secs(300);

/// Which pool of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PoolKey {
    host: u64,
    want: Want,
}

/// Connections to one host for one protocol.
pub(crate) struct Pool {
    host: RefCell<Arc<Host>>,
    cluster: RefCell<Arc<Cluster>>,
    #[expect(
        clippy::vec_box,
        reason = "a connection keeps its box while it moves between pool and requests"
    )]
    h1: RefCell<Vec<Box<H1Conn>>>,
    h2: RefCell<Vec<Rc<H2Conn>>>,
    /// Connections that were to carry tunnels, with servers that do not know them.
    plain: RefCell<Vec<Io>>,
    dial: RefCell<Option<Rc<Dial>>>,
    /// What was heard on all connections of one request, where that is watched.
    link: Option<Rc<Link>>,
    /// TLS chose HTTP/1 last time, or no tunnels.
    learned_h1: Cell<bool>,
    /// A connection came back.
    returned: Notify,
}

struct Dial {
    done: RefCell<Option<Result<(), ConnectError>>>,
    notify: Notify,
}

/// A connection for one request.
pub(crate) enum Acquired {
    H1(Box<H1Conn>),
    H2(Rc<H2Conn>),
}

/// An HTTP/2 connection that many requests share.
pub(crate) struct H2Conn {
    pub(crate) send: h2::client::SendRequest<Bytes>,
    pub(crate) active: Cell<usize>,
    total: Cell<u64>,
    closed: Cell<bool>,
    opened: Instant,
    /// Streams at a time, whatever the server allows.
    max_streams: usize,
    idle_since: Cell<Instant>,
    /// What was heard of it, where that is watched.
    link: Option<Rc<Link>>,
    /// SPIFFE ID of the server.
    pub(crate) peer: Option<Arc<str>>,
    _permit: Permit,
}

impl H2Conn {
    /// Something was sent that should be answered.
    pub(crate) fn said(&self) {
        if let Some(l) = &self.link {
            l.said();
        }
    }

    /// Something came.
    pub(crate) fn heard(&self) {
        if let Some(l) = &self.link {
            l.heard();
        }
    }

    fn has_room(&self) -> bool {
        !self.closed.get() && self.active.get() < self.send.current_max_send_streams().min(self.max_streams)
    }

    /// No further requests.
    pub(crate) fn retire(&self) {
        self.closed.set(true);
    }
}

impl Pool {
    fn new(worker: &Rc<Worker>, cluster: &Arc<Cluster>, host: &Arc<Host>, want: Want) -> Rc<Self> {
        let (cluster, host) = (Arc::clone(cluster), Arc::clone(host));
        let asks = matches!(want, Want::Http1 | Want::Any) && silence::is_far(&host);
        let link = asks.then(|| silence::watch_place(worker, &cluster, &host, want));
        Rc::new(Self {
            link,
            host: RefCell::new(host),
            cluster: RefCell::new(cluster),
            h1: RefCell::default(),
            h2: RefCell::default(),
            plain: RefCell::default(),
            dial: RefCell::default(),
            learned_h1: Cell::new(false),
            returned: Notify::new(),
        })
    }

    fn h1_conn(&self, io: Io, permit: Permit) -> Box<H1Conn> {
        let mut c = H1Conn::new(io, permit);
        c.link.clone_from(&self.link);
        c
    }

    fn idle_h1(&self, worker: &Worker) -> Option<Box<H1Conn>> {
        loop {
            // The most recent first: it is the least likely to have been closed by the peer.
            let mut c = self.h1.borrow_mut().pop()?;
            if !self.is_old(c.opened) && c.is_open() && !c.is_revoked(worker) {
                return Some(c);
            }
        }
    }

    /// Whether a connection takes no more requests for its age.
    fn is_old(&self, opened: Instant) -> bool {
        self.cluster.borrow().config.max_connection_duration.is_some_and(|d| opened.elapsed() >= d)
    }

    fn shared_h2(&self) -> Option<Rc<H2Conn>> {
        let max = u64::from(self.cluster.borrow().config.max_requests_per_connection);
        let mut all = self.h2.borrow_mut();
        all.iter().filter(|c| self.is_old(c.opened)).for_each(|c| c.retire());
        all.retain(|c| !c.closed.get());
        let c = all.iter().find(|c| c.has_room()).cloned()?;
        c.total.set(c.total.get() + 1);
        if max > 0 && c.total.get() >= max {
            c.retire();
        }
        Some(c)
    }

    /// A connection that can take a request now.
    fn ready(&self, worker: &Worker, want: Want) -> Option<Acquired> {
        if want != Want::Http1
            && let Some(c) = self.shared_h2()
        {
            return Some(Acquired::H2(c));
        }
        if want == Want::Http2 { None } else { self.idle_h1(worker).map(Acquired::H1) }
    }

    /// Takes a connection back.
    pub(crate) fn put_h1(&self, mut conn: Box<H1Conn>) {
        let max = u64::from(self.cluster.borrow().config.max_requests_per_connection);
        conn.served += 1;
        let kept = !conn.alone && (max == 0 || conn.served < max) && !self.is_old(conn.opened);
        if kept && !self.host.borrow().stats.is_leaving() {
            conn.idle_since = Instant::now();
            self.h1.borrow_mut().push(conn);
        }
        self.returned.notify_one();
    }

    /// Closes what has been idle for too long; true if nothing is left.
    fn sweep(&self, now: Instant) -> bool {
        // Who is unhealthy gets no more requests, and connections to it may hang; who drains waits for them to end.
        let gone = {
            let host = self.host.borrow();
            let s = &host.stats;
            s.is_leaving() || s.is_ejected() || s.has(Check::Failed)
        };
        let idle = if gone {
            Duration::ZERO
        } else {
            self.cluster.borrow().config.idle_timeout.unwrap_or(DEFAULT_IDLE)
        };
        self.h1.borrow_mut().retain(|c| now.duration_since(c.idle_since) < idle && !self.is_old(c.opened));
        self.h2.borrow_mut().retain(|c| {
            if self.is_old(c.opened) {
                c.retire();
            }
            let idle_too_long = c.active.get() == 0 && now.duration_since(c.idle_since.get()) >= idle;
            !c.closed.get() && !idle_too_long
        });
        // Whoever had it made takes it at once, unless it left.
        self.plain.borrow_mut().clear();
        // Whoever gives up takes its connection with it, but not the suspicion.
        let waits = !gone && self.link.as_ref().is_some_and(|l| l.waits());
        !waits && self.h1.borrow().is_empty() && self.h2.borrow().is_empty() && self.dial.borrow().is_none()
    }
}

/// The protocol for a request to `cluster`.
pub(crate) fn want(cluster: &Cluster, downstream_h2: bool, upgrade: bool) -> Want {
    if upgrade {
        // Upgrades always take a connection of their own; HTTP/1.1 says that plainly.
        return Want::Http1;
    }
    match cluster.config.http {
        UpstreamHttp::Http1 => Want::Http1,
        UpstreamHttp::Http2 => Want::Http2,
        UpstreamHttp::Downstream => {
            if downstream_h2 {
                Want::Http2
            } else {
                Want::Http1
            }
        }
        UpstreamHttp::Auto => Want::Any,
    }
}

/// Finds or makes the pool of a host.
pub(crate) fn pool_of(worker: &Rc<Worker>, cluster: &Arc<Cluster>, host: &Arc<Host>, want: Want) -> Rc<Pool> {
    let id = if want == Want::Tunnel { cluster.tunnels_of(host) } else { host.stats.id };
    let key = PoolKey { host: id, want };
    let mut pools = worker.pools.borrow_mut();
    let pool = pools.entry(key).or_insert_with(|| Pool::new(worker, cluster, host, want));
    if !Arc::ptr_eq(&pool.cluster.borrow(), cluster) {
        *pool.cluster.borrow_mut() = Arc::clone(cluster);
        *pool.host.borrow_mut() = Arc::clone(host);
    }
    Rc::clone(pool)
}

/// Closes idle connections of all pools.
pub(crate) fn sweep(worker: &Worker) {
    let now = Instant::now();
    worker.pools.borrow_mut().retain(|_, p| !(p.sweep(now) && Rc::strong_count(p) == 1));
}

/// A connection to `host`: an idle one, room on a shared one, or a new one.
pub(crate) async fn acquire(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    pool: &Rc<Pool>,
    want: Want,
) -> Result<Acquired, ConnectError> {
    match pool.ready(worker, want) {
        Some(c) => Ok(c),
        // Boxed: what a dial needs would make every request that large.
        None => Box::pin(acquire_slowly(worker, cluster, host, pool, want)).await,
    }
}

async fn acquire_slowly(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    pool: &Rc<Pool>,
    want: Want,
) -> Result<Acquired, ConnectError> {
    let mut pending: Option<Permit> = None;
    // Each round either returns, fails, or waited for someone else's progress.
    for _ in 0..64 {
        if let Some(c) = pool.ready(worker, want) {
            return Ok(c);
        }
        if pending.is_none() {
            let limit = cluster.config.limits.max_pending;
            pending =
                Some(Permit::take(&cluster.usage, |u| &u.pending, limit).ok_or(ConnectError::Overflow)?);
        }
        if want == Want::Http2 || (want == Want::Any && !pool.learned_h1.get()) {
            match shared_dial(worker, cluster, host, pool, want).await {
                // A stream of one of those that there are may end.
                Err(ConnectError::Overflow) => wait_for_return(cluster, pool).await?,
                r => r?,
            }
            continue;
        }
        let Some(permit) =
            Permit::take(&cluster.usage, |u| &u.connections, cluster.config.limits.max_connections)
        else {
            wait_for_return(cluster, pool).await?;
            continue;
        };
        if let Some(l) = &pool.link {
            l.said();
        }
        let io = tokio::select! {
            biased;
            io = connect(worker, cluster, host, want) => io,
            () = silence::of_dial(worker, cluster, host, want) => return Err(ConnectError::Timeout),
        };
        if let Some(l) = &pool.link {
            l.heard();
        }
        let io = io?;
        if want == Want::Any && negotiated_h2(&io) {
            pool.learned_h1.set(false);
            share(worker, cluster, host, pool, want, io, permit).await?;
            continue;
        }
        return Ok(Acquired::H1(pool.h1_conn(io, permit)));
    }
    Err(ConnectError::Overflow)
}

/// What carries a TCP connection.
pub(crate) enum Carrier {
    /// A stream of this.
    Tunnels(Rc<H2Conn>),
    /// A connection of its own, since the server knows no tunnels.
    Plain(Io),
}

/// A connection to `host` with room for a tunnel, made if there is none.
pub(crate) async fn acquire_carrier(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    pool: &Rc<Pool>,
) -> Result<Carrier, ConnectError> {
    for _ in 0..64 {
        if let Some(c) = pool.shared_h2() {
            return Ok(Carrier::Tunnels(c));
        }
        if let Some(io) = pool.plain.borrow_mut().pop() {
            return Ok(Carrier::Plain(io));
        }
        if pool.learned_h1.get() {
            let io = connect(worker, cluster, host, Want::Tunnel).await?;
            if !negotiated_tunnels(&io) {
                return Ok(Carrier::Plain(io));
            }
            pool.learned_h1.set(false);
            let permit = permit_for(cluster, host, Want::Tunnel)?;
            share(worker, cluster, host, pool, Want::Tunnel, io, permit).await?;
            continue;
        }
        let _pending = Permit::take(&cluster.usage, |u| &u.pending, cluster.config.limits.max_pending)
            .ok_or(ConnectError::Overflow)?;
        shared_dial(worker, cluster, host, pool, Want::Tunnel).await?;
    }
    Err(ConnectError::Overflow)
}

/// What a shared connection counts as. Where tunnels are how the mesh carries connections, a limit on connections is
/// about those and not about what carries them.
fn permit_for(cluster: &Cluster, host: &Host, want: Want) -> Result<Permit, ConnectError> {
    let permit = if want == Want::Tunnel && (cluster.is_hbone(host) || cluster.may_tunnel(host)) {
        Permit::take(&cluster.usage, |u| &u.sessions, u32::MAX)
    } else {
        Permit::take(&cluster.usage, |u| &u.connections, cluster.config.limits.max_connections)
    };
    permit.ok_or(ConnectError::Overflow)
}

/// All connections that the cluster may have are busy: wait for one. The pools of other workers count too
/// but cannot wake this one, hence the short tick.
async fn wait_for_return(cluster: &Cluster, pool: &Pool) -> Result<(), ConnectError> {
    const TICK: Duration = Duration::from_millis(10);
    let deadline = Instant::now() + cluster.config.connect_timeout.max(TICK);
    loop {
        let _ = tokio::time::timeout(TICK, pool.returned.notified()).await;
        if !pool.h1.borrow().is_empty()
            || pool.h2.borrow().iter().any(|c| c.has_room())
            || cluster.usage.connections.load(Relaxed) < cluster.config.limits.max_connections
        {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(ConnectError::Overflow);
        }
    }
}

async fn shared_dial(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    pool: &Rc<Pool>,
    want: Want,
) -> Result<(), ConnectError> {
    let running = pool.dial.borrow().clone();
    let dial = match running {
        Some(d) => d,
        None => {
            let permit = permit_for(cluster, host, want)?;
            let d = Rc::new(Dial { done: RefCell::new(None), notify: Notify::new() });
            *pool.dial.borrow_mut() = Some(Rc::clone(&d));
            // Its own task: the request that happened to come first may be cancelled, the others still wait.
            let (worker, cluster, host, pool, dial) =
                (Rc::clone(worker), Arc::clone(cluster), Arc::clone(host), Rc::clone(pool), Rc::clone(&d));
            tokio::task::spawn_local(async move {
                let mut dialling = std::pin::pin!(dial_into(&worker, &cluster, &host, &pool, want, permit));
                let result = tokio::select! {
                    biased;
                    r = dialling.as_mut() => r,
                    // Here as well as where it is waited for: all who waited may have given up.
                    () = silence::of_dial(&worker, &cluster, &host, want) => dialling.await,
                };
                *pool.dial.borrow_mut() = None;
                *dial.done.borrow_mut() = Some(result);
                dial.notify.notify_waiters();
            });
            d
        }
    };
    let done = async {
        loop {
            let notified = dial.notify.notified();
            if let Some(r) = dial.done.borrow().as_ref() {
                return r.clone();
            }
            notified.await;
        }
    };
    tokio::select! {
        biased;
        r = done => r,
        // The dial goes on; who waits for it need not.
        () = silence::of_dial(worker, cluster, host, want) => Err(ConnectError::Timeout),
    }
}

async fn dial_into(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    pool: &Pool,
    want: Want,
    permit: Permit,
) -> Result<(), ConnectError> {
    let io = connect(worker, cluster, host, want).await?;
    let shared = match want {
        Want::Http2 => true,
        Want::Tunnel => !cluster.may_tunnel(host) || negotiated_tunnels(&io),
        Want::Any | Want::Http1 => negotiated_h2(&io),
    };
    if shared {
        share(worker, cluster, host, pool, want, io, permit).await?;
    } else if want == Want::Tunnel {
        pool.learned_h1.set(true);
        pool.plain.borrow_mut().push(io);
    } else {
        pool.learned_h1.set(true);
        pool.h1.borrow_mut().push(pool.h1_conn(io, permit));
    }
    Ok(())
}

/// Adds a connection of many requests to a pool.
async fn share(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    pool: &Pool,
    want: Want,
    io: Io,
    permit: Permit,
) -> Result<(), ConnectError> {
    let http2 = &cluster.config.http2;
    let keep = http2.keepalive.map(|times| Keep { times, end: Rc::default() });
    let end = keep.as_ref().map(|k| Rc::clone(&k.end));
    let (mut conn, pings) = start_h2(worker, io, permit, end, cluster.config.buffer_limit).await?;
    // Tunnels are no streams that somebody counts.
    if http2.max_concurrent_streams > 0 && want != Want::Tunnel {
        conn.max_streams = http2.max_concurrent_streams as usize;
    }
    let far = silence::is_far(host);
    let watched = pings.filter(|_| far || keep.is_some()).map(|pings| (pings, Rc::<Link>::default()));
    conn.link = watched.as_ref().map(|(_, link)| Rc::clone(link));
    let conn = Rc::new(conn);
    match (watched, keep) {
        (Some((pings, link)), keep) if far => {
            silence::watch_session(worker, cluster, host, want, &conn, &link, pings, keep);
        }
        (Some((pings, link)), Some(keep)) => keepalive::watch(&conn, &link, pings, keep),
        _ => {}
    }
    pool.h2.borrow_mut().push(conn);
    Ok(())
}

/// Makes a connection of many requests; the second of the answer asks its peer whether it is there. With `end` the
/// connection breaks when that is notified; `buffer` is what a stream may have buffered, if less than usual.
pub(super) async fn start_h2(
    worker: &Rc<Worker>,
    io: crate::io::Io,
    permit: Permit,
    end: Option<Rc<Notify>>,
    buffer: Option<u32>,
) -> Result<(H2Conn, Option<h2::PingPong>), ConnectError> {
    let own = worker.options.buffer_limit.min(MAX_WINDOW);
    let limit = buffer.filter(|b| *b > 0).map_or(own, |b| b.min(own));
    let (peer, shown) = (io.peer_principal(), io.shown());
    let handshake = h2::client::Builder::new()
        .initial_window_size(limit)
        // Sixteen streams may stall without stopping the others.
        .initial_connection_window_size(limit.saturating_mul(16).min(MAX_WINDOW))
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(crate::http::message::MAX_HEAD as u32)
        .enable_push(false)
        .handshake::<_, Bytes>(io);
    let (send, mut connection) = match tokio::time::timeout(Duration::from_secs(5), handshake).await {
        Ok(Ok(pair)) => pair,
        Ok(Err(e)) => return Err(ConnectError::Tcp(e.to_string())),
        Err(_) => return Err(ConnectError::Timeout),
    };
    let pings = connection.ping_pong();
    // The driver ends when the peer closes or the last handle goes; requests then find the handle unusable.
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(async move {
        let driven = async {
            match end {
                None => connection.await,
                Some(end) => tokio::select! {
                    r = connection => r,
                    () = end.notified() => {
                        tracing::debug!("upstream HTTP/2 connection does not answer");
                        Ok(())
                    }
                },
            }
        };
        tokio::select! {
            ended = driven => if let Err(error) = ended {
                tracing::debug!(%error, "upstream HTTP/2 connection ended");
            },
            () = revoked(&worker, shown.as_ref()) => {
                tracing::warn!("upstream HTTP/2 connection closed: the server's certificate was revoked");
            }
        }
    });
    let conn = H2Conn {
        send,
        active: Cell::new(0),
        total: Cell::new(0),
        closed: Cell::new(false),
        opened: Instant::now(),
        max_streams: usize::MAX,
        idle_since: Cell::new(Instant::now()),
        link: None,
        peer,
        _permit: permit,
    };
    Ok((conn, pings))
}

/// A stream's share of a connection.
pub(crate) struct StreamGuard(Rc<H2Conn>);

impl StreamGuard {
    pub(crate) fn new(conn: &Rc<H2Conn>) -> Self {
        conn.active.set(conn.active.get() + 1);
        Self(Rc::clone(conn))
    }

    pub(crate) fn conn(&self) -> &H2Conn {
        &self.0
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
        self.0.idle_since.set(Instant::now());
    }
}
