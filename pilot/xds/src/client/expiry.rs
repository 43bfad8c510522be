//! Resources that hold only for a time (xDS protocol, "TTL"): what is not sent again or renewed in time counts as
//! removed, whether a server is connected or not.

use std::{collections::BTreeMap, future::Future, time::Duration};

use tokio::time::Instant;

use super::{Handler, Known, Update};
use crate::pb;

/// A server that wants something to hold for longer means for ever.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// When what expires, by type and name.
#[derive(Default)]
pub(super) struct Expiry(BTreeMap<(String, String), Instant>);

impl Expiry {
    /// Takes note of a resource that was accepted, or renewed.
    pub(super) fn set(&mut self, type_url: &str, name: &str, ttl: Option<&prost_types::Duration>) {
        let key = (type_url.to_owned(), name.to_owned());
        let seconds = |d: &prost_types::Duration| {
            let whole = Duration::from_secs(u64::try_from(d.seconds).unwrap_or_default());
            (whole + Duration::from_nanos(u64::try_from(d.nanos).unwrap_or_default())).min(LONGEST)
        };
        match ttl {
            Some(d) => drop(self.0.insert(key, Instant::now() + seconds(d))),
            None => drop(self.0.remove(&key)),
        }
    }

    /// Forgets a resource that is gone.
    pub(super) fn clear(&mut self, type_url: &str, name: &str) {
        if !self.0.is_empty() {
            self.0.remove(&(type_url.to_owned(), name.to_owned()));
        }
    }

    /// Waits for the next one; for ever if there is none. Cancel-safe: it only waits.
    pub(super) async fn next(&self) {
        match self.0.values().min() {
            Some(at) => tokio::time::sleep_until(*at).await,
            None => std::future::pending().await,
        }
    }

    /// Tells the handler what has expired.
    pub(super) fn expire<H: Handler>(&mut self, handler: &mut H, known: &mut Known) {
        let now = Instant::now();
        let mut gone: BTreeMap<String, Vec<String>> = BTreeMap::new();
        self.0.retain(|(type_url, name), at| {
            let due = *at <= now;
            if due {
                gone.entry(type_url.clone()).or_default().push(name.clone());
            }
            !due
        });
        for (type_url, removed) in gone {
            tracing::warn!(type_url, names = removed.join(", "), "not renewed in time, so removed");
            if let Some(have) = known.get_mut(&type_url) {
                have.retain(|n, _| !removed.contains(n));
            }
            // Nobody is there to be told of a rejection.
            let _ = handler.on_update(&type_url, Update { changed: vec![], removed });
        }
    }

    /// Does something else while time goes on for resources.
    pub(super) async fn during<H: Handler, T>(
        &mut self,
        what: impl Future<Output = T>,
        handler: &mut H,
        known: &mut Known,
    ) -> T {
        tokio::pin!(what);
        loop {
            tokio::select! {
                done = &mut what => return done,
                () = self.next() => {}
            }
            self.expire(handler, known);
        }
    }
}

/// Whether this only says that a resource still holds.
pub(super) fn is_heartbeat(r: &pb::Resource) -> bool {
    r.resource.is_none() && r.aliases.is_empty()
}

/// Whether this only says that names stand for nothing.
pub(super) fn is_unresolved(r: &pb::Resource) -> bool {
    r.resource.is_none() && !r.aliases.is_empty()
}
