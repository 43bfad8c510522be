//! Copies of requests.

use std::{rc::Rc, sync::Arc, time::Duration};

use super::{
    Context,
    tries::{Open, give_back, stream},
};
use crate::{
    http::{
        exchange,
        headers::HeaderId,
        message::{BodyKind, RequestHead},
    },
    upstream::{
        cluster::{Cluster, ClusterSlot, Outcome, Permit},
        host::ActiveGuard,
    },
    worker::Worker,
};

/// Sends copies; their answers are read and dropped, their failures are nobody's.
pub(super) fn mirror(
    ctx: &Context<'_>,
    head: &RequestHead,
    to: &[Arc<ClusterSlot>],
    body: Vec<bytes::Bytes>,
) {
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
pub(super) const MIRROR_TIMEOUT: Duration = Duration::from_secs(15);

pub(super) async fn shadow(
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
