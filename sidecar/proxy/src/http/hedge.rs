//! Hedging: tries that were too slow go on beside their successor, and the first good answer counts.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use super::{
    downstream::Downstream,
    exchange::{Failure, Timers},
    message::{ResponseHead, StreamError},
    record::Record,
    router::{Open, TryError},
};
use crate::upstream::{cluster::Permit, host::Host};

/// A try that is waited for no longer, yet may still answer. Its request was sent whole.
pub(super) struct Hedged {
    pub(super) open: Open,
    pub(super) host: Arc<Host>,
    /// Counts the retry that took its place.
    pub(super) _permit: Option<Permit>,
}

/// What came of a try.
pub(super) type Outcome = (Result<ResponseHead, TryError>, Option<Open>);

/// The first answer that is good enough; tries that failed are forgotten.
fn poll_heads(
    all: &mut Vec<Hedged>,
    good: &dyn Fn(&ResponseHead) -> bool,
    cx: &mut Context<'_>,
) -> Poll<(Hedged, ResponseHead)> {
    let mut i = 0;
    while i < all.len() {
        match all[i].open.up.poll_head(cx) {
            Poll::Pending => i += 1,
            Poll::Ready(Ok(head)) if good(&head) => return Poll::Ready((all.swap_remove(i), head)),
            Poll::Ready(_) => {
                all.swap_remove(i);
            }
        }
    }
    Poll::Pending
}

fn won(h: Hedged, head: ResponseHead, rec: &mut Record) -> Outcome {
    rec.host = Some(h.host);
    rec.peer = h.open.up.peer();
    rec.first_byte = Some(Instant::now());
    (Ok(head), Some(h.open))
}

/// Runs a new try beside the slow ones. `Err`: one of those was faster.
pub(super) async fn race(
    all: &mut Vec<Hedged>,
    good: &dyn Fn(&ResponseHead) -> bool,
    run: impl Future<Output = Outcome>,
) -> Result<Outcome, (Hedged, ResponseHead)> {
    tokio::select! {
        biased;
        w = poll_fn(|cx| poll_heads(all, good, cx)) => Err(w),
        r = run => Ok(r),
    }
}

/// Notes which try won.
pub(super) fn settle(r: Result<Outcome, (Hedged, ResponseHead)>, rec: &mut Record) -> Outcome {
    match r {
        Ok(outcome) => outcome,
        Err((h, head)) => won(h, head, rec),
    }
}

/// Waits for any of the slow tries; there are no others left.
pub(super) async fn first_of<D: Downstream>(
    all: &mut Vec<Hedged>,
    down: &D,
    timers: &mut Timers,
    rec: &mut Record,
) -> Outcome {
    let r = poll_fn(|cx| {
        if let Poll::Ready(w) = poll_heads(all, &|_| true, cx) {
            return Poll::Ready(Ok(w));
        }
        if all.is_empty() {
            return Poll::Ready(Err(Failure::Upstream(StreamError::Reset)));
        }
        if let Poll::Ready(f) = timers.poll(cx) {
            return Poll::Ready(Err(f));
        }
        if down.poll_gone(cx).is_ready() {
            return Poll::Ready(Err(Failure::Downstream(StreamError::Reset)));
        }
        Poll::Pending
    })
    .await;
    match r {
        Ok((h, head)) => won(h, head, rec),
        Err(f) => (Err(TryError::Exchange(f)), None),
    }
}
