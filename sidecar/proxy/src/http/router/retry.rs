//! Whether a request is tried again, and when.

use std::{cell::RefCell, sync::atomic::Ordering::Relaxed, time::Duration};

use mesh_model::proxy::{ResetHeader, RetryOn};

use super::{Context, Limits, Open, Tries, TryError, grpc_status};
use crate::{
    config::route::Retry,
    http::{
        exchange::{Failure, Replay, Upstream},
        headers::HeaderId,
        message::{RequestHead, ResponseHead, StreamError},
        record::{Flag, Record},
    },
    upstream::{
        cluster::{Cluster, Permit},
        host::now_ms,
    },
};

/// What comes after a try.
pub(super) enum Next {
    Again(Duration, Option<Permit>),
    Stop,
}

/// Whether to try again, and after what time.
pub(super) fn next(
    ctx: &Context<'_>,
    cluster: &Cluster,
    outcome: &Result<ResponseHead, TryError>,
    up: &Option<Open>,
    replay: &RefCell<Replay>,
    head: &RequestHead,
    limits: &Limits<'_>,
    state: &mut Tries,
    rec: &mut Record,
) -> Next {
    if !replay.borrow().is_intact() {
        return Next::Stop;
    }
    // A connection that died unused says nothing about the host: once more on a fresh one, policy or not.
    if state.stale == 0 && died_unused(outcome, up, head) {
        state.stale = 1;
        return Next::Again(Duration::ZERO, None);
    }
    let Some(policy) = limits.retry else { return Next::Stop };
    if !retriable(policy, outcome, up) {
        return Next::Stop;
    }
    let Some(permit) = retry_permit(cluster, limits, state, rec) else { return Next::Stop };
    state.retries += 1;
    let policy = &policy.config;
    if let (Some(limited), Ok(r)) = (&policy.rate_limited, outcome)
        && let Some(wait) = limited.headers.iter().find_map(|h| reset_interval(h, limited.max_interval, r))
    {
        // Everybody was told the same; not everybody should come at once.
        let jitter = u64::try_from(wait.as_micros() / 2).unwrap_or(u64::MAX).max(1);
        let jitter = Duration::from_micros(ctx.conn.worker.rng.next() % jitter);
        return Next::Again(wait + jitter, Some(permit));
    }
    let base = policy.base_interval.max(Duration::from_millis(1));
    let bound = base.saturating_mul(1 << state.retries.min(16)).min(policy.max_interval.max(base));
    let micros = u64::try_from(bound.as_micros()).unwrap_or(u64::MAX).max(1);
    Next::Again(Duration::from_micros(ctx.conn.worker.rng.next() % micros), Some(permit))
}

/// Leave to try once more: of the policy, and of the cluster.
pub(super) fn retry_permit(
    cluster: &Cluster,
    limits: &Limits<'_>,
    state: &Tries,
    rec: &mut Record,
) -> Option<Permit> {
    if state.retries >= limits.attempts {
        return None;
    }
    let l = &cluster.config.limits;
    let most = match l.retry_budget {
        None => l.max_retries,
        Some(b) => {
            let usage = &cluster.usage;
            let active = u64::from(usage.requests.load(Relaxed)) + u64::from(usage.pending.load(Relaxed));
            let active = match b.interval.is_zero() {
                true => active,
                // Requests that take longer than the interval have not ended for that.
                false => active.max(usage.recent.count(now_ms(), b.interval)),
            };
            let share = active * u64::from(b.share) / 10_000;
            u32::try_from(share).unwrap_or(u32::MAX).max(b.min_concurrency)
        }
    };
    let permit = Permit::take(&cluster.usage, |u| &u.retries, most);
    if permit.is_none() {
        rec.flag(Flag::Uo);
    }
    permit
}

/// How long an answer asks to wait; `None` if it does not say, or asks too much.
fn reset_interval(h: &ResetHeader, max: Duration, r: &ResponseHead) -> Option<Duration> {
    let n: u64 = std::str::from_utf8(r.headers.get(h.name.as_bytes())?).ok()?.trim().parse().ok()?;
    let wait = if h.unix_time {
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).ok()?;
        Duration::from_secs(n).checked_sub(now)?
    } else {
        Duration::from_secs(n)
    };
    (wait <= max).then_some(wait)
}

fn died_unused(outcome: &Result<ResponseHead, TryError>, up: &Option<Open>, head: &RequestHead) -> bool {
    match (outcome, up.as_ref().map(|u| &u.up)) {
        // The peer says that it did not process the stream (RFC 9113 section 8.7).
        (Err(TryError::Exchange(Failure::Upstream(StreamError::Refused))), Some(Upstream::H2(_))) => true,
        (Err(TryError::Exchange(Failure::Upstream(StreamError::Reset))), Some(Upstream::H1(x))) => {
            x.reused() && !x.answered.get() && head.method.is_idempotent()
        }
        _ => false,
    }
}

/// Whether an answer is one to try again for.
pub(super) fn retriable_answer(retry: &Retry, r: &ResponseHead) -> bool {
    let on = &retry.config.on;
    if r.headers.has(HeaderId::XEnvoyRatelimited) {
        // More of the same would only make it worse.
        return on.contains(&RetryOn::EnvoyRateLimited);
    }
    on.iter().any(|on| match on {
        RetryOn::ServerError => r.status >= 500,
        RetryOn::GatewayError => matches!(r.status, 502..=504),
        RetryOn::Retriable4xx => r.status == 409,
        RetryOn::RetriableStatusCodes => retry.config.status_codes.contains(&r.status),
        RetryOn::RetriableHeaders => retry.response_headers.iter().any(|h| h.matches_response(&r.headers)),
        RetryOn::Cancelled => grpc_status(r) == Some(1),
        RetryOn::DeadlineExceeded => grpc_status(r) == Some(4),
        RetryOn::ResourceExhausted => grpc_status(r) == Some(8),
        RetryOn::Internal => grpc_status(r) == Some(13),
        RetryOn::Unavailable => grpc_status(r) == Some(14),
        _ => false,
    })
}

fn retriable(policy: &Retry, outcome: &Result<ResponseHead, TryError>, up: &Option<Open>) -> bool {
    let on = match outcome {
        Ok(r) => return retriable_answer(policy, r),
        Err(_) => &policy.config.on,
    };
    on.iter().any(|on| match outcome {
        Ok(_) => false,
        Err(TryError::Connect(_)) => {
            matches!(
                on,
                RetryOn::ConnectFailure
                    | RetryOn::ServerError
                    | RetryOn::GatewayError
                    | RetryOn::Reset
                    | RetryOn::ResetBeforeRequest
            )
        }
        Err(TryError::Exchange(Failure::Upstream(e))) => match on {
            RetryOn::ServerError | RetryOn::GatewayError | RetryOn::Reset => true,
            RetryOn::RefusedStream => *e == StreamError::Refused,
            RetryOn::ResetBeforeRequest => up.is_none() || *e == StreamError::Refused,
            _ => false,
        },
        Err(TryError::Exchange(Failure::PerTryTimeout)) => {
            matches!(on, RetryOn::ServerError | RetryOn::GatewayError | RetryOn::Reset)
        }
        // Another destination might have a host, but a try again has the same; an overflow must not add load.
        Err(_) => false,
    })
}
