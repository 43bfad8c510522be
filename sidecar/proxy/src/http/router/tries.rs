//! A try: a host is picked, a stream opened, the request sent and its host judged by what came.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Instant,
};

use http::Method;

use super::{Context, TryError, request::Limits};
use crate::{
    http::{
        downstream::Downstream,
        exchange::{self, Failure, Replay, RequestPump, Stage, Timers, Upstream},
        h1::client::{H1Conn, H1Exchange},
        h2::client::{H2Exchange, StartError},
        headers::HeaderId,
        local_reply::http_of_grpc,
        message::{BodyKind, RequestHead, ResponseHead, StreamError},
        record::Record,
    },
    upstream::{
        cluster::{Cluster, Outcome, Permit},
        connect::{ConnectError, Want, connect_for},
        host::{ActiveGuard, Host},
        names::{self, NameError},
        pool::{self, Acquired, Pool},
    },
    worker::Worker,
};

#[derive(Default)]
pub(super) struct Tries {
    pub(super) tried: Vec<u64>,
    /// Priorities of the hosts of all tries so far.
    pub(super) priorities: Vec<u32>,
    pub(super) retries: u32,
    /// Tries repeated because a connection turned out to be dead before it was used.
    pub(super) stale: u32,
}

impl Tries {
    /// Priorities that the next try leaves out, if all so many tries those that were tried are.
    pub(super) fn leave(&self, every: u32) -> &[u32] {
        let tries = self.priorities.len();
        let of = every as usize;
        self.priorities.get(..tries - tries.checked_rem(of).unwrap_or(tries)).unwrap_or_default()
    }

    /// Remembers the host of a try that another one follows.
    pub(super) fn note(&mut self, rec: &Record) {
        if let Some(host) = &rec.host {
            self.priorities.push(host.priority);
        }
        if let Some(host) = &rec.host
            && !self.tried.contains(&host.stats.id)
        {
            self.tried.push(host.stats.id);
        }
    }
}

pub(super) struct Try<'a, D> {
    pub(super) ctx: &'a Context<'a>,
    pub(super) cluster: &'a Arc<Cluster>,
    pub(super) head: &'a RequestHead,
    pub(super) down: &'a D,
    pub(super) replay: &'a RefCell<Replay>,
    pub(super) received: &'a Cell<u64>,
    pub(super) hash: Option<u64>,
    pub(super) upgrade: bool,
}

/// An open upstream stream and where its connection belongs.
pub(crate) struct Open {
    pub(crate) up: Upstream,
    pub(super) pool: Rc<Pool>,
    pub(super) stage: Stage,
    /// Counts the request for its host.
    pub(super) _active: ActiveGuard,
}

impl Open {
    /// A stream whose exchange is complete.
    pub(crate) fn complete(up: Upstream, pool: Rc<Pool>, active: ActiveGuard) -> Self {
        Self { up, pool, stage: Stage::Done, _active: active }
    }
}

impl<D: Downstream> Try<'_, D> {
    pub(super) async fn run(
        &mut self,
        timers: &mut Timers,
        limits: &Limits<'_>,
        state: &Tries,
        rec: &mut Record,
    ) -> (Result<ResponseHead, TryError>, Option<Open>) {
        let body = self.head.body;
        let (down, replay) = (self.down, self.replay);
        timers.begin_dial(body == BodyKind::Empty || replay.borrow().is_complete());
        let opened = {
            let mut opening = std::pin::pin!(self.open(limits, state, rec));
            // A connection that is there is taken at once; only who must dial meets the request's limits here.
            poll_fn(|cx| {
                if let Poll::Ready(r) = opening.as_mut().poll(cx) {
                    return Poll::Ready(r);
                }
                if let Poll::Ready(f) = timers.poll(cx) {
                    return Poll::Ready(Err(TryError::Exchange(f)));
                }
                if down.poll_gone(cx).is_ready() {
                    let gone = Failure::Downstream(StreamError::Reset);
                    return Poll::Ready(Err(TryError::Exchange(gone)));
                }
                Poll::Pending
            })
            .await
        };
        let mut open = match opened {
            Ok(open) => open,
            Err(e) => return (Err(e), None),
        };
        rec.peer = open.up.peer();
        timers.begin_try(limits.retry.and_then(|r| r.config.per_try_idle_timeout));
        let mut pump = RequestPump::new(self.down, &open.up, self.replay, self.received, open.stage);
        let per_try = limits.retry.and_then(|r| r.config.per_try_timeout).filter(|t| !t.is_zero());
        let r = exchange::request(&mut pump, timers, per_try, self.upgrade).await.map_err(TryError::Exchange);
        if r.is_ok() {
            rec.first_byte = Some(Instant::now());
        }
        open.stage = pump.stage();
        (r, Some(open))
    }

    async fn open(&self, limits: &Limits<'_>, state: &Tries, rec: &mut Record) -> Result<Open, TryError> {
        let conn = self.ctx.conn;
        let avoid = limits.retry.map_or(0, |r| r.config.host_selection_attempts);
        let avoid = if state.retries > 0 { avoid } else { 0 };
        rec.host = None;
        let host = if self.cluster.config.discovery == mesh_model::proxy::Discovery::OriginalDst {
            crate::tcp::pick(conn, self.cluster, &[]).map_err(|_| TryError::NoHost)?
        } else if let Some(names) = self.cluster.names() {
            // Boxed, so that requests whose hosts are known do not carry it.
            let found = Box::pin(names.of_authority(&self.head.authority)).await.map_err(TryError::Name)?;
            names::next(&found, &state.tried)
                .or_else(|| found.first().cloned())
                .ok_or(TryError::Name(NameError::Unresolved))?
        } else {
            let tables = self.cluster.tables();
            let wanted = self.ctx.passed.session.as_ref().filter(|_| state.retries == 0);
            let own = wanted.and_then(|s| s.among(&tables.hosts)).cloned();
            if own.is_none() && wanted.is_some_and(|s| s.strict && s.host.is_some()) {
                return Err(TryError::NoHost);
            }
            let pick = || match limits.retry.map_or(&[][..], |r| state.leave(r.config.leave_priorities)) {
                [] => tables.pick_avoiding(&conn.worker.rng, self.hash, &state.tried, avoid).cloned(),
                left => tables.pick_elsewhere(&conn.worker.rng, left, &state.tried, avoid).cloned(),
            };
            own.or_else(pick).ok_or(TryError::NoHost)?
        };
        rec.host = Some(Arc::clone(&host));
        let guard = ActiveGuard::new(&host.stats);
        let client = Some((conn.peer, conn.local));
        let (up, pool) =
            stream(&conn.worker, self.cluster, &host, self.head, self.down.is_multiplexed(), client).await?;
        Ok(Open { up, pool, stage: Stage::first(self.head.body), _active: guard })
    }
}

/// Opens a stream to a host.
pub(crate) async fn stream(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    head: &RequestHead,
    downstream_h2: bool,
    client: Option<(SocketAddr, SocketAddr)>,
) -> Result<(Upstream, Rc<Pool>), TryError> {
    let connect_method = head.method == Method::CONNECT && head.upgrade.is_none();
    let want = pool::want(cluster, downstream_h2, head.upgrade.is_some() || connect_method);
    let pool = pool::pool_of(worker, cluster, host, want);
    let connect_error = |e| match e {
        ConnectError::Overflow => TryError::Overflow,
        e => TryError::Connect(e),
    };
    // A connection that begins with the client's addresses is that client's.
    if connect_method || cluster.config.proxy_protocol.is_some() {
        let permit = Permit::take(&cluster.usage, |u| &u.connections, cluster.config.limits.max_connections)
            .ok_or(TryError::Overflow)?;
        let want = if connect_method { Want::Any } else { Want::Http1 };
        let io = Box::pin(connect_for(worker, cluster, host, want, client)).await.map_err(connect_error)?;
        let mut conn = H1Conn::new(io, permit);
        conn.alone = true;
        let up = if connect_method { H1Exchange::tunnel(conn) } else { H1Exchange::start(conn, head) };
        return Ok((Upstream::H1(up), pool));
    }
    // A connection may close between being found and being used; that many in a row is no accident.
    for _ in 0..3 {
        match pool::acquire(worker, cluster, host, &pool, want).await.map_err(connect_error)? {
            Acquired::H1(c) => return Ok((Upstream::H1(H1Exchange::start(c, head)), pool)),
            Acquired::H2(c) => match H2Exchange::start(&c, head) {
                Ok(x) => return Ok((Upstream::H2(x), pool)),
                Err(StartError::Closed) => {}
                Err(StartError::Invalid) => return Err(TryError::Invalid),
            },
        }
    }
    Err(TryError::Exchange(Failure::Upstream(StreamError::Refused)))
}

/// Returns an HTTP/1 connection to its pool after a complete exchange.
pub(crate) fn give_back(open: Open) {
    if let Upstream::H1(x) = open.up
        && let Some(c) = x.into_reusable()
    {
        open.pool.put_h1(c);
    }
}

pub(super) fn observe(cluster: &Cluster, host: &Host, outcome: &Result<ResponseHead, TryError>) {
    let o = match outcome {
        Ok(r) => {
            cluster.note_load(host, &r.headers);
            if cluster.config.health.is_some()
                && r.headers.get(crate::upstream::health::IMMEDIATE_FAIL).is_some()
            {
                cluster.fail_at_once(host);
            }
            Outcome::Status(effective_status(r))
        }
        Err(TryError::Connect(ConnectError::Refusal(r))) => Outcome::Refused(*r),
        Err(TryError::Connect(_) | TryError::Exchange(Failure::Upstream(_))) => Outcome::Failed,
        Err(TryError::Exchange(Failure::PerTryTimeout | Failure::Timeout)) => Outcome::Timeout,
        Err(_) => return,
    };
    cluster.observe(host, o);
}

/// For policies that go by response times.
pub(super) fn observe_time(
    cluster: &Cluster,
    host: &Host,
    outcome: &Result<ResponseHead, TryError>,
    begun: Instant,
    first_byte: Option<Instant>,
) {
    match outcome {
        // A hedged try began earlier than this one: its own start is not known, and this is the lower bound.
        Ok(_) => {
            let end = first_byte.unwrap_or_else(Instant::now);
            cluster.observe_time(host, Some(end.saturating_duration_since(begun)));
        }
        Err(
            TryError::Connect(_)
            | TryError::Exchange(Failure::Upstream(_) | Failure::PerTryTimeout | Failure::Timeout),
        ) => cluster.observe_time(host, None),
        Err(_) => {}
    }
}

pub(super) fn grpc_status(r: &ResponseHead) -> Option<u32> {
    r.headers.str_id(HeaderId::GrpcStatus).and_then(|v| v.parse().ok())
}

/// The status by which a host is judged: a gRPC error that came as a head alone counts as what it means.
pub(super) fn effective_status(r: &ResponseHead) -> u16 {
    grpc_status(r).filter(|_| r.status == 200).map_or(r.status, http_of_grpc)
}
