//! The router: picks a destination and host, tries, tries again where that is safe, and passes the answer on.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use http::Method;

use super::{
    downstream::Downstream,
    exchange::{Failure, Replay, Timers},
    filters::Passed,
    headers::HeaderId,
    hedge::{self, Hedged},
    local_reply::LocalReply,
    message::{BodyKind, RequestHead, ResponseHead},
    record::{Flag, Record},
};
use crate::{
    config::{
        listener::HttpManager,
        route::{Forward, Route, VirtualHost},
    },
    on_demand,
    upstream::{cluster::Permit, connect::ConnectError, host::now_ms, names::NameError},
    worker::connection::Connection,
};

mod answer;
mod mirror;
mod request;
mod retry;
mod tries;

use answer::{Flow, failure, respond};
use mirror::mirror;
#[cfg(any(test, fuzzing))]
pub(crate) use request::grpc_timeout;
pub(super) use request::new_cookie;
pub(crate) use request::{Limits, Rewrite};
use request::{MAX_DURATION, hash, stream_end};
use retry::{Next, next, retriable_answer, retry_permit};
pub(super) use tries::{Open, give_back, stream};
use tries::{Tries, Try, grpc_status, observe, observe_time};

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

/// An answer of the router's own with the headers that its proxy adds.
fn own_answer(ctx: &Context<'_>, mut reply: LocalReply) -> LocalReply {
    if ctx.manager.config.headers.suppress_envoy {
        reply.headers.remove_id(HeaderId::XEnvoyOverloaded);
    }
    reply
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
        return Err(own_answer(ctx, failure(rec, &TryError::Overflow, false)));
    };
    if let Some(b) = cluster.config.limits.retry_budget.filter(|b| !b.interval.is_zero()) {
        cluster.usage.recent.note(now_ms(), b.interval);
    }
    let limits = Limits::new(ctx.forward, ctx.passed.faulted, ctx.conn.outbound(), head);
    let (forward, route, vhost, remote) = (ctx.forward, ctx.route, ctx.vhost, rec.remote);
    let suppress = ctx.manager.config.headers.suppress_envoy;
    Rewrite { forward, route, vhost, destination, timeout: limits.timeout, suppress, remote }.apply(head);
    let (hash, cookie) = hash(ctx, head, rec.remote);
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
    let whole =
        ctx.manager.config.limits.request_timeout.filter(|_| head.body != BodyKind::Empty && !upgrade);
    timers.receive_until(whole.map(|t| (rec.started + t).into()));
    let mut state = Tries::default();
    let mut hedged: Vec<Hedged> = Vec::new();
    // Counts a retry for as long as it lasts.
    let mut retrying: Option<Permit> = None;
    let result = loop {
        rec.attempts += 1;
        if vhost.attempt_count {
            head.headers.set_number(HeaderId::XEnvoyAttemptCount, u64::from(state.retries) + 1);
        }
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
    let result = result.map_err(|reply| {
        let mut reply = own_answer(ctx, reply);
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
