//! The router: picks a destination and host, tries, tries again where that is safe, and passes the answer on.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use http::Method;
use mesh_model::proxy::HashPolicy;

use super::{
    downstream::Downstream,
    exchange::{self, Failure, Replay, RequestPump, Stage, Timers, Upstream},
    filters::{Passed, cross_origin_headers},
    h1::client::{H1Conn, H1Exchange},
    h2::client::{H2Exchange, StartError},
    headers::HeaderId,
    hedge::{self, Hedged},
    local_reply::{self, LocalReply, http_of_grpc},
    message::{BodyKind, RequestHead, ResponseHead, StreamError},
    record::{Flag, Record},
};
use crate::{
    config::{
        listener::HttpManager,
        route::{Destination, Forward, Retry, Route, VirtualHost},
    },
    matcher::{cookie, query_value},
    on_demand,
    upstream::{
        cluster::{Cluster, ClusterSlot, Outcome, Permit},
        connect::{ConnectError, Want, connect_for},
        host::{ActiveGuard, Host, now_ms},
        lb::stable_hash,
        names::{self, NameError},
        pool::{self, Acquired, Pool},
    },
    worker::{Worker, connection::Connection},
};

mod retry;

use retry::{Next, next, retriable_answer, retry_permit};

/// What a request is forwarded by.
pub(crate) struct Context<'a> {
    pub(crate) conn: &'a Rc<Connection>,
    pub(crate) manager: &'a Arc<HttpManager>,
    pub(crate) route: &'a Route,
    pub(crate) vhost: &'a VirtualHost,
    pub(crate) forward: &'a Forward,
    pub(crate) passed: &'a Passed,
}

/// Why a try brought no answer.
#[derive(Debug)]
pub(super) enum TryError {
    NoHost,
    /// The name that the request asks for leads nowhere.
    Name(NameError),
    Overflow,
    Connect(ConnectError),
    Exchange(Failure),
    /// The request cannot be expressed upstream.
    Invalid,
}

/// Forwards; `Err` is an answer of our own.
pub(crate) async fn forward<D: Downstream>(
    ctx: &Context<'_>,
    head: &mut RequestHead,
    down: &D,
    rec: &mut Record,
) -> Result<(), LocalReply> {
    let worker = &ctx.conn.worker;
    let kept = ctx.passed.session.as_ref().filter(|_| ctx.forward.destinations().len() > 1);
    let kept = kept.and_then(|s| s.destination(ctx.forward));
    let destination = kept.unwrap_or_else(|| ctx.forward.destination(worker.rng.next()));
    let mut slot = Arc::clone(&destination.cluster);
    let named = ctx.forward.named_cluster(head);
    if let Some(there) = named.as_deref().and_then(|n| on_demand::named(ctx.conn, n)) {
        slot = there;
    }
    let mut found = slot.load();
    if let Some(o) = ctx.passed.on_demand {
        if found.is_none() {
            let name = named.as_deref().unwrap_or(&slot.name);
            // Boxed, so that requests whose cluster exists do not carry it.
            if let Some(there) =
                Box::pin(on_demand::cluster(ctx.conn, ctx.manager, name, o.timeout, down, rec)).await?
            {
                slot = there;
                found = slot.load();
            }
        }
        slot.touch();
    }
    rec.cluster = Some(Arc::clone(&slot));
    let Some(cluster) = found else {
        rec.flag(Flag::Nc);
        if rec.details != on_demand::LIMIT {
            rec.details = "cluster_not_found".into();
        }
        return Err(LocalReply { status: 503, ..LocalReply::default() });
    };
    let Some(_permit) = Permit::take(&cluster.usage, |u| &u.requests, cluster.config.limits.max_requests)
    else {
        return Err(failure(rec, &TryError::Overflow, false));
    };
    if let Some(b) = cluster.config.limits.retry_budget.filter(|b| !b.interval.is_zero()) {
        cluster.usage.recent.note(now_ms(), b.interval);
    }
    let limits = Limits::new(ctx.forward, ctx.passed.faulted, ctx.conn.outbound(), head);
    let (forward, route, vhost, remote) = (ctx.forward, ctx.route, ctx.vhost, ctx.conn.peer.ip());
    Rewrite { forward, route, vhost, destination, timeout: limits.timeout, remote }.apply(head);
    let (hash, cookie) = hash(ctx, head);
    let upgrade = head.upgrade.is_some() || head.method == Method::CONNECT;
    let mirrors: Vec<_> = ctx
        .forward
        .mirrors
        .iter()
        .filter(|(_, share)| !upgrade && worker.rng.chance_ppm(*share))
        .map(|(slot, _)| Arc::clone(slot))
        .collect();
    let retry = limits.retry;
    // Without a policy a body is still kept for the one retry on a stale connection, but only a small one.
    let keep = match (upgrade, retry.is_some() || !mirrors.is_empty()) {
        (true, _) => 0,
        (false, true) => ctx.route.filters.buffer_limit.unwrap_or(worker.options.retry_buffer),
        (false, false) => worker.options.retry_buffer.min(4096),
    };
    let replay = RefCell::new(Replay::new(keep, head.body));
    if head.body == BodyKind::Empty {
        mirror(ctx, head, &mirrors, vec![]);
    }
    let (received, sent) = (Cell::new(0), Cell::new(0));
    let idle = ctx.forward.idle_timeout.or(ctx.manager.config.stream_idle_timeout);
    let mut timers = Timers::new(worker.alarms.alarm(), limits.timeout.filter(|_| !upgrade), idle);
    timers.end_at(stream_end(ctx, head, rec).map(Into::into));
    let mut state = Tries::default();
    let mut hedged: Vec<Hedged> = Vec::new();
    // Counts a retry for as long as it lasts.
    let mut retrying: Option<Permit> = None;
    let result = loop {
        rec.attempts += 1;
        let begun = cluster.wants_times().then(Instant::now);
        let mut t =
            Try { ctx, cluster: &cluster, head, down, replay: &replay, received: &received, hash, upgrade };
        let (mut outcome, mut up) = if hedged.is_empty() {
            t.run(&mut timers, &limits, &state, rec).await
        } else {
            let good = |r: &ResponseHead| !limits.retry.is_some_and(|p| retriable_answer(p, r));
            let run = Box::pin(t.run(&mut timers, &limits, &state, rec));
            let r = Box::pin(hedge::race(&mut hedged, &good, run)).await;
            hedge::settle(r, rec)
        };
        if let Some(host) = &rec.host {
            observe(&cluster, host, &outcome);
            if let Some(begun) = begun {
                observe_time(&cluster, host, &outcome, begun, rec.first_byte);
            }
        }
        if ctx.forward.hedge
            && matches!(outcome, Err(TryError::Exchange(Failure::PerTryTimeout)))
            && replay.borrow().is_complete()
            && replay.borrow().is_intact()
        {
            if let (Some(open), Some(host)) = (up.take(), rec.host.clone()) {
                hedged.push(Hedged { open, host, _permit: retrying.take() });
            }
            retrying = retry_permit(&cluster, &limits, &state, rec);
            if retrying.is_some() {
                state.note(rec);
                state.retries += 1;
                continue;
            }
            (outcome, up) = Box::pin(hedge::first_of(&mut hedged, down, &mut timers, rec)).await;
        }
        // A retry that has ended makes room for the next one.
        drop(retrying.take());
        let mut step = next(ctx, &cluster, &outcome, &up, &replay, head, &limits, &mut state, rec);
        if !hedged.is_empty()
            && matches!(step, Next::Stop)
            && !matches!(&outcome, Ok(r) if !limits.retry.is_some_and(|p| retriable_answer(p, r)))
        {
            // This one is no answer; one of the slow ones may be.
            drop(up);
            (outcome, up) = Box::pin(hedge::first_of(&mut hedged, down, &mut timers, rec)).await;
            step = Next::Stop;
        }
        match step {
            Next::Again(wait, permit) => {
                drop(up);
                state.note(rec);
                retrying = permit;
                if let Err(f) = timers.back_off(wait).await {
                    break Err(failure(rec, &TryError::Exchange(f), false));
                }
            }
            Next::Stop => match (outcome, up) {
                (Ok(response), Some(open)) => {
                    let flow = Flow {
                        down,
                        replay: &replay,
                        received: &received,
                        sent: &sent,
                        cookie: cookie.as_deref(),
                    };
                    respond(ctx, destination, &open, &mut timers, head, response, &flow, rec).await;
                    if let (Some(t), Some(host)) = (&rec.trailers, &rec.host) {
                        cluster.note_load(host, t);
                    }
                    give_back(open);
                    break Ok(());
                }
                (Ok(_), None) => break Err(failure(rec, &TryError::NoHost, false)),
                (Err(e), _) => {
                    let exhausted = state.retries > 0 && retry.is_some() && state.retries >= limits.attempts;
                    break Err(failure(rec, &e, exhausted));
                }
            },
        }
    };
    let result = result.map_err(|mut reply| {
        // A client that is still sending was too slow itself (Envoy's distinction).
        if rec.details == MAX_DURATION && !replay.borrow().is_complete() {
            reply.status = 408;
        }
        reply
    });
    if head.body != BodyKind::Empty
        && let Some(body) = replay.borrow().whole()
    {
        mirror(ctx, head, &mirrors, body);
    }
    rec.bytes_received = received.get();
    rec.bytes_sent += sent.get();
    result
}

/// Details of a stream that lasted too long.
const MAX_DURATION: &str = "max_duration_timeout";

/// When the stream must end: the client's deadline where the route believes it, the route's limit, or the
/// connection manager's.
fn stream_end(ctx: &Context<'_>, head: &RequestHead, rec: &Record) -> Option<Instant> {
    let general = ctx.manager.config.max_stream_duration;
    let limit = match ctx.forward.max_stream {
        None => general,
        Some(l) => {
            let asked = l.grpc_timeout_max.and_then(|max| {
                let asked = grpc_timeout(head.headers.get_id(HeaderId::GrpcTimeout)?)?;
                let asked = if max.is_zero() { asked } else { asked.min(max) };
                Some(asked.saturating_sub(l.grpc_timeout_offset.unwrap_or_default()))
            });
            match asked {
                Some(t) => return Some(rec.started + t),
                None => l.max.or(general),
            }
        }
    };
    limit.filter(|t| !t.is_zero()).map(|t| rec.started + t)
}

/// `grpc-timeout`: up to eight digits and a unit (gRPC over HTTP/2).
pub(crate) fn grpc_timeout(v: &[u8]) -> Option<Duration> {
    let (unit, digits) = v.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let n: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(n * 3600),
        b'M' => Duration::from_secs(n * 60),
        b'S' => Duration::from_secs(n),
        b'm' => Duration::from_millis(n),
        b'u' => Duration::from_micros(n),
        b'n' => Duration::from_nanos(n),
        _ => return None,
    })
}

/// Limits of this request: the route's, or the caller's wishes where it is one of the mesh.
pub(crate) struct Limits<'a> {
    pub(crate) timeout: Option<Duration>,
    pub(crate) retry: Option<&'a Retry>,
    /// Retries beyond the first try.
    pub(crate) attempts: u32,
}

impl<'a> Limits<'a> {
    pub(crate) fn new(forward: &'a Forward, faulted: bool, outbound: bool, head: &mut RequestHead) -> Self {
        let mut timeout = forward.timeout;
        let retry = forward.retry.as_deref().filter(|_| !faulted);
        let retry = retry
            .filter(|r| r.request_headers.is_empty() || r.request_headers.iter().any(|h| h.matches(head)));
        let mut attempts = retry.map_or(0, |r| r.config.attempts);
        let number =
            |id, head: &RequestHead| head.headers.str_id(id).and_then(|v| v.trim().parse::<u64>().ok());
        if outbound {
            if let Some(ms) = number(HeaderId::XEnvoyUpstreamRqTimeoutMs, head) {
                timeout = Some(Duration::from_millis(ms)).filter(|t| !t.is_zero());
            }
            if let Some(n) = number(HeaderId::XEnvoyMaxRetries, head) {
                attempts = u32::try_from(n).unwrap_or(u32::MAX).min(100);
            }
            head.headers.remove_id(HeaderId::XEnvoyUpstreamRqTimeoutMs);
            head.headers.remove_id(HeaderId::XEnvoyMaxRetries);
        }
        Self { timeout, retry: retry.filter(|_| attempts > 0), attempts }
    }
}

/// What routing changes about a request on its way to a destination.
pub(crate) struct Rewrite<'a> {
    pub(crate) forward: &'a Forward,
    pub(crate) route: &'a Route,
    pub(crate) vhost: &'a VirtualHost,
    pub(crate) destination: &'a Destination,
    pub(crate) timeout: Option<Duration>,
    /// The client's address.
    pub(crate) remote: std::net::IpAddr,
}

impl Rewrite<'_> {
    pub(crate) fn apply(&self, head: &mut RequestHead) {
        if let Some(new) = self.forward.rewritten_path(self.route, &head.path) {
            let before = std::mem::replace(&mut head.path, new);
            head.headers.set_id(HeaderId::XEnvoyOriginalPath, before.as_bytes());
        }
        if let Some(h) = &self.forward.host_rewrite {
            head.authority.clone_from(h);
        }
        if let Some(t) = self.timeout {
            head.headers.set_number(HeaderId::XEnvoyExpectedRqTimeoutMs, millis(t));
        }
        // Most specific first, as Envoy: destination, route, virtual host.
        for edits in
            [&self.destination.request_headers, &self.route.request_headers, &self.vhost.request_headers]
        {
            if !edits.is_empty() {
                edits.request(head, &|v| expand(v, self.remote));
            }
        }
    }
}

fn millis(t: Duration) -> u64 {
    u64::try_from(t.as_millis()).unwrap_or(u64::MAX)
}

/// The few variables that header values may hold.
fn expand(value: &str, remote: std::net::IpAddr) -> String {
    if !value.contains('%') {
        return value.to_owned();
    }
    value.replace("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", &remote.to_string()).replace("%%", "%")
}

/// The hash of a request, and the cookie that is to carry it back if it comes from one that the client lacks.
fn hash(ctx: &Context<'_>, head: &RequestHead) -> (Option<u64>, Option<String>) {
    for p in &ctx.forward.hash {
        let found = match p {
            HashPolicy::Header(name) => {
                crate::matcher::header_value(head, name.to_ascii_lowercase().as_bytes())
                    .map(|v| stable_hash(&v))
            }
            HashPolicy::Cookie { name, path, ttl, attributes } => match (cookie(&head.headers, name), ttl) {
                (Some(v), _) => Some(stable_hash(v.as_bytes())),
                (None, Some(ttl)) => {
                    let value = format!("{:016x}", ctx.conn.worker.rng.next());
                    let made = new_cookie(name, &value, path, *ttl, attributes);
                    return (Some(stable_hash(value.as_bytes())), Some(made));
                }
                (None, None) => None,
            },
            HashPolicy::SourceIp => Some(stable_hash(ctx.conn.peer.ip().to_string().as_bytes())),
            HashPolicy::Query(name) => {
                head.query().and_then(|q| query_value(q, name)).map(|v| stable_hash(v.as_bytes()))
            }
        };
        if found.is_some() {
            return (found, None);
        }
    }
    (None, None)
}

pub(super) fn new_cookie(
    name: &str,
    value: &str,
    path: &str,
    ttl: Duration,
    attributes: &[(String, String)],
) -> String {
    let mut v = format!("{name}=\"{value}\"");
    if !ttl.is_zero() {
        v.push_str(&format!("; Max-Age={}", ttl.as_secs()));
    }
    if !path.is_empty() {
        v.push_str("; Path=");
        v.push_str(path);
    }
    for (name, value) in attributes {
        v.push_str("; ");
        v.push_str(name);
        if !value.is_empty() {
            v.push('=');
            v.push_str(value);
        }
    }
    v.push_str("; HttpOnly");
    v
}

#[derive(Default)]
struct Tries {
    tried: Vec<u64>,
    /// Priorities of the hosts of all tries so far.
    priorities: Vec<u32>,
    retries: u32,
    /// Tries repeated because a connection turned out to be dead before it was used.
    stale: u32,
}

impl Tries {
    /// Priorities that the next try leaves out, if all so many tries those that were tried are.
    fn leave(&self, every: u32) -> &[u32] {
        let tries = self.priorities.len();
        let of = every as usize;
        self.priorities.get(..tries - tries.checked_rem(of).unwrap_or(tries)).unwrap_or_default()
    }

    /// Remembers the host of a try that another one follows.
    fn note(&mut self, rec: &Record) {
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

struct Try<'a, D> {
    ctx: &'a Context<'a>,
    cluster: &'a Arc<Cluster>,
    head: &'a RequestHead,
    down: &'a D,
    replay: &'a RefCell<Replay>,
    received: &'a Cell<u64>,
    hash: Option<u64>,
    upgrade: bool,
}

/// An open upstream stream and where its connection belongs.
pub(super) struct Open {
    pub(super) up: Upstream,
    pool: Rc<Pool>,
    stage: Stage,
    /// Counts the request for its host.
    _active: ActiveGuard,
}

impl Open {
    /// A stream whose exchange is complete.
    pub(super) fn complete(up: Upstream, pool: Rc<Pool>, active: ActiveGuard) -> Self {
        Self { up, pool, stage: Stage::Done, _active: active }
    }
}

impl<D: Downstream> Try<'_, D> {
    async fn run(
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
pub(super) async fn stream(
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
pub(super) fn give_back(open: Open) {
    if let Upstream::H1(x) = open.up
        && let Some(c) = x.into_reusable()
    {
        open.pool.put_h1(c);
    }
}

fn observe(cluster: &Cluster, host: &Host, outcome: &Result<ResponseHead, TryError>) {
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
fn observe_time(
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

fn grpc_status(r: &ResponseHead) -> Option<u32> {
    r.headers.str_id(HeaderId::GrpcStatus).and_then(|v| v.parse().ok())
}

/// The status by which a host is judged: a gRPC error that came as a head alone counts as what it means.
fn effective_status(r: &ResponseHead) -> u16 {
    grpc_status(r).filter(|_| r.status == 200).map_or(r.status, http_of_grpc)
}

/// Envoy's answers and flags for what went wrong.
fn failure(rec: &mut Record, e: &TryError, exhausted: bool) -> LocalReply {
    const PREFIX: &str = "upstream connect error or disconnect/reset before headers. ";
    if exhausted {
        rec.flag(Flag::Urx);
    }
    let reply = |rec: &mut Record, flag, details: &'static str, status, body: String| {
        rec.flag(flag);
        rec.details = details.into();
        LocalReply::text(status, body)
    };
    match e {
        TryError::NoHost => reply(rec, Flag::Uh, "no_healthy_upstream", 503, "no healthy upstream".into()),
        TryError::Name(e) => {
            let (flag, body) = match e {
                NameError::Full => (Flag::Uo, "DNS cache overflow"),
                NameError::Invalid | NameError::Unresolved => (Flag::Df, "DNS resolution failure"),
            };
            reply(rec, flag, e.details(), 503, body.into())
        }
        TryError::Overflow => {
            let mut r = reply(
                rec,
                Flag::Uo,
                "upstream_reset_before_response_started{overflow}",
                503,
                format!("{PREFIX}reset reason: overflow"),
            );
            r.headers.push_id(HeaderId::XEnvoyOverloaded, b"true");
            r
        }
        TryError::Connect(ConnectError::Timeout) => reply(
            rec,
            Flag::Uf,
            "upstream_reset_before_response_started{connection_timeout}",
            503,
            format!("{PREFIX}reset reason: connection timeout"),
        ),
        TryError::Connect(e) => {
            // The reason helps who reads the log; the client need not learn addresses or certificates.
            rec.transport_failure = e.to_string();
            reply(
                rec,
                Flag::Uf,
                "upstream_reset_before_response_started{remote_connection_failure}",
                503,
                format!("{PREFIX}reset reason: remote connection failure"),
            )
        }
        TryError::Invalid => reply(rec, Flag::Dpe, "request_not_forwardable", 400, "Bad Request".into()),
        TryError::Exchange(f) => match f {
            Failure::Timeout | Failure::PerTryTimeout => {
                reply(rec, Flag::Ut, "response_timeout", 504, "upstream request timeout".into())
            }
            Failure::Duration => LocalReply {
                grpc: Some(4),
                ..reply(rec, Flag::Dt, MAX_DURATION, 504, "downstream duration timeout".into())
            },
            Failure::Idle => reply(rec, Flag::Si, "stream_idle_timeout", 504, "stream timeout".into()),
            Failure::Upstream(StreamError::Protocol | StreamError::TooLarge) => reply(
                rec,
                Flag::Upe,
                "upstream_reset_before_response_started{protocol_error}",
                502,
                format!("{PREFIX}reset reason: protocol error"),
            ),
            Failure::Upstream(StreamError::Refused) => reply(
                rec,
                Flag::Ur,
                "upstream_reset_before_response_started{remote_refused_stream_reset}",
                503,
                format!("{PREFIX}reset reason: remote refused stream reset"),
            ),
            Failure::Upstream(StreamError::Reset) => reply(
                rec,
                Flag::Uc,
                "upstream_reset_before_response_started{connection_termination}",
                503,
                format!("{PREFIX}reset reason: connection termination"),
            ),
            Failure::Downstream(StreamError::Reset | StreamError::Refused) => {
                reply(rec, Flag::Dc, "downstream_remote_disconnect", 0, String::new())
            }
            Failure::Downstream(_) => reply(rec, Flag::Dpe, "http1.codec_error", 400, "Bad Request".into()),
        },
    }
}

/// The two directions of a request and what moved in them.
struct Flow<'a, D> {
    down: &'a D,
    replay: &'a RefCell<Replay>,
    received: &'a Cell<u64>,
    sent: &'a Cell<u64>,
    /// `set-cookie` for the client.
    cookie: Option<&'a str>,
}

/// Passes an answer on.
async fn respond<D: Downstream>(
    ctx: &Context<'_>,
    destination: &Destination,
    open: &Open,
    timers: &mut Timers,
    request: &RequestHead,
    mut response: ResponseHead,
    flow: &Flow<'_, D>,
    rec: &mut Record,
) {
    let down = flow.down;
    finish_response(ctx, destination, &mut response, flow.cookie, rec);
    rec.status = response.status;
    let connect = request.method == Method::CONNECT && request.upgrade.is_none();
    let tunnel = response.status == 101 || (connect && (200..300).contains(&response.status));
    let end = response.body == BodyKind::Empty && !tunnel;
    let started = down.start(&response, end);
    rec.response = Some(response);
    if started.is_err() {
        rec.flag(Flag::Dc);
        return;
    }
    if end {
        if poll_fn(|cx| down.poll_flush(cx)).await.is_err() {
            rec.flag(Flag::Dc);
        }
        return;
    }
    // A refused upgrade is an ordinary answer; the bytes held back belong to nobody.
    let stage = if request.upgrade.is_some() && !tunnel { Stage::Refused } else { open.stage };
    let mut pump = RequestPump::new(down, &open.up, flow.replay, flow.received, stage);
    match exchange::response(&mut pump, timers, flow.sent, tunnel).await {
        Ok(trailers) => rec.trailers = trailers,
        Err(f) => {
            let (flag, details) = match f {
                Failure::Downstream(_) => (Flag::Dc, "downstream_remote_disconnect"),
                Failure::Timeout | Failure::PerTryTimeout => (Flag::Ut, "response_timeout"),
                Failure::Duration => (Flag::Dt, MAX_DURATION),
                Failure::Idle => (Flag::Si, "stream_idle_timeout"),
                Failure::Upstream(StreamError::Refused) => {
                    (Flag::Ur, "upstream_reset_after_response_started{remote_reset}")
                }
                Failure::Upstream(StreamError::Protocol | StreamError::TooLarge) => {
                    (Flag::Upe, "upstream_reset_after_response_started{protocol_error}")
                }
                Failure::Upstream(StreamError::Reset) => {
                    (Flag::Uc, "upstream_reset_after_response_started{connection_termination}")
                }
            };
            rec.flag(flag);
            rec.details = details.into();
            down.abort();
        }
    }
}

fn finish_response(
    ctx: &Context<'_>,
    destination: &Destination,
    response: &mut ResponseHead,
    cookie: Option<&str>,
    rec: &Record,
) {
    let h = &mut response.headers;
    h.remove_id(HeaderId::XEnvoyInternal);
    h.remove_id(HeaderId::XEnvoyDecoratorOperation);
    h.set_number(HeaderId::XEnvoyUpstreamServiceTime, millis(rec.started.elapsed()));
    for edits in [&destination.response_headers, &ctx.route.response_headers, &ctx.vhost.response_headers] {
        if !edits.is_empty() {
            let remote = ctx.conn.peer.ip();
            edits.response(h, &|v| expand(v, remote));
        }
    }
    if let Some(cors) = &ctx.passed.cors {
        cross_origin_headers(cors, h);
    }
    if let Some(edits) = &ctx.passed.response {
        edits.apply(h);
    }
    if let (Some(s), Some(host)) = (&ctx.passed.session, &rec.host) {
        s.remember(host, h);
    }
    if let Some(c) = cookie {
        h.push_id(HeaderId::SetCookie, c.as_bytes());
    }
    local_reply::stamp(h, &ctx.manager.config.server_name);
}

/// Sends copies; their answers are read and dropped, their failures are nobody's.
fn mirror(ctx: &Context<'_>, head: &RequestHead, to: &[Arc<ClusterSlot>], body: Vec<bytes::Bytes>) {
    for slot in to {
        let Some(cluster) = slot.load() else { continue };
        let mut head = head.clone();
        head.authority = match head.authority.rsplit_once(':') {
            Some((h, p)) if p.parse::<u16>().is_ok() => format!("{h}-shadow:{p}"),
            _ => format!("{}-shadow", head.authority),
        };
        head.headers.remove_id(HeaderId::ContentLength);
        let length: usize = body.iter().map(bytes::Bytes::len).sum();
        head.body = if length == 0 { BodyKind::Empty } else { BodyKind::Length(length as u64) };
        head.expect_continue = false;
        if length > 0 {
            head.headers.push_id(HeaderId::ContentLength, length.to_string().as_bytes());
        }
        let (worker, body) = (Rc::clone(&ctx.conn.worker), body.clone());
        let limit = ctx.forward.timeout.unwrap_or(MIRROR_TIMEOUT).min(MIRROR_TIMEOUT);
        tokio::task::spawn_local(async move {
            let _ = tokio::time::timeout(limit, shadow(&worker, &cluster, &head, body)).await;
        });
    }
}

/// Nobody waits for a copy; it may not hold resources for longer than this.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(15);

async fn shadow(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    head: &RequestHead,
    body: Vec<bytes::Bytes>,
) -> Option<()> {
    let _permit = Permit::take(&cluster.usage, |u| &u.requests, cluster.config.limits.max_requests)?;
    let host = Arc::clone(cluster.tables().pick(&worker.rng, None)?);
    let active = ActiveGuard::new(&host.stats);
    let (up, pool) = stream(worker, cluster, &host, head, head.version.is_multiplexed(), None).await.ok()?;
    let r = exchange::drop_answer(&up, body, head.body).await;
    cluster.observe(&host, r.map_or(Outcome::Failed, Outcome::Status));
    give_back(Open::complete(up, pool, active));
    Some(())
}
