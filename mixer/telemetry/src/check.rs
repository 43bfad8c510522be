//! The policy client: asks Mixer whether a request may pass, and seldom needs to.
//!
//! Every answer names the attributes that it depends on. It is kept, allowed or denied, for every
//! request that agrees on those attributes, for as long and as often as the answer says. Quota is
//! taken in small batches ahead of need. When Mixer does not answer, the options decide: open (pass)
//! or closed (503, the default).

mod cache;
mod quota;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tonic::transport::Channel;

use self::{cache::CheckCache, quota::QuotaCache};
use crate::{
    attributes::{Bag, GLOBAL_WORDS, compress, references, span},
    proto::mixer_v1::{CheckRequest, CheckResponse, check_request::QuotaParams, mixer_client::MixerClient},
};

/// How a [`CheckClient`] behaves.
#[derive(Debug, Clone)]
pub struct CheckOptions {
    /// What a request gets when Mixer does not answer: true passes it, false denies it with 503.
    pub fail_open: bool,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Answers kept.
    pub cache_entries: usize,
    /// Name of this client, unique among its replicas: a prefix of deduplication IDs.
    pub client_id: String,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self {
            fail_open: false,
            timeout: Duration::from_secs(5),
            cache_entries: 10_000,
            client_id: random_id(),
        }
    }
}

/// 64 random bits: the keys of the standard library's hasher come from the operating system.
fn random_id() -> String {
    use std::hash::{BuildHasher as _, Hasher as _};
    format!("{:016x}", std::hash::RandomState::new().build_hasher().finish())
}

/// An amount of a quota that a request needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuotaCharge {
    /// Name of the quota instance.
    pub name: String,
    /// How much; more than 0.
    pub amount: i64,
}

/// Whether a request may pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It may.
    Allow,
    /// It may not.
    Deny(Denial),
}

/// Why a request may not pass, and what it is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// `google.rpc.Code`.
    pub code: i32,
    /// HTTP status.
    pub http_status: u16,
    /// Body: `<CODE>:<message>`.
    pub body: String,
}

impl Denial {
    /// The answer for a status of Mixer.
    #[must_use]
    pub fn new(code: i32, message: &str) -> Self {
        let (name, http_status) = match code {
            1 => ("CANCELLED", 499),
            3 => ("INVALID_ARGUMENT", 400),
            4 => ("DEADLINE_EXCEEDED", 504),
            5 => ("NOT_FOUND", 404),
            6 => ("ALREADY_EXISTS", 409),
            7 => ("PERMISSION_DENIED", 403),
            8 => ("RESOURCE_EXHAUSTED", 429),
            9 => ("FAILED_PRECONDITION", 400),
            10 => ("ABORTED", 409),
            11 => ("OUT_OF_RANGE", 400),
            12 => ("UNIMPLEMENTED", 501),
            13 => ("INTERNAL", 500),
            14 => ("UNAVAILABLE", 503),
            15 => ("DATA_LOSS", 500),
            16 => ("UNAUTHENTICATED", 401),
            _ => ("UNKNOWN", 500),
        };
        Self { code, http_status, body: format!("{name}:{message}") }
    }
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckStats {
    /// Answers from the cache, without a call.
    pub hits: u64,
    /// Calls to Mixer.
    pub calls: u64,
    /// Calls that failed.
    pub failures: u64,
}

/// The code of a status that stands for "Mixer itself failed".
const INTERNAL: i32 = 13;
const UNAVAILABLE: i32 = 14;
const RESOURCE_EXHAUSTED: i32 = 8;

/// A policy client. Clones share cache and connection.
#[derive(Clone)]
pub struct CheckClient(Arc<Inner>);

struct Inner {
    channel: Channel,
    options: CheckOptions,
    checks: Mutex<CheckCache>,
    quotas: Mutex<QuotaCache>,
    next_id: AtomicU64,
    hits: AtomicU64,
    calls: AtomicU64,
    failures: AtomicU64,
}

impl CheckClient {
    /// A client over this channel.
    #[must_use]
    pub fn new(channel: Channel, options: CheckOptions) -> Self {
        Self(Arc::new(Inner {
            channel,
            checks: Mutex::new(CheckCache::new(options.cache_entries)),
            quotas: Mutex::new(QuotaCache::new(options.cache_entries)),
            options,
            next_id: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        }))
    }

    /// Whether a request with these attributes may pass and consume these quotas.
    pub async fn check(&self, bag: &Bag, charges: &[QuotaCharge]) -> Outcome {
        let inner = &*self.0;
        let now = Instant::now();
        let cached = inner.checks.lock().unwrap_or_else(PoisonError::into_inner).get(bag, now);
        match cached {
            Some(Some(denial)) => {
                inner.hits.fetch_add(1, Ordering::Relaxed);
                return Outcome::Deny(denial);
            }
            Some(None) => {
                inner.hits.fetch_add(1, Ordering::Relaxed);
                return self.prefetched(bag, charges, now).await;
            }
            None => {}
        }
        let wanted: Vec<(&QuotaCharge, i64, bool)> = charges.iter().map(|c| (c, c.amount, false)).collect();
        let response = match self.call(bag, &wanted).await {
            Ok(r) => r,
            Err(outcome) => return outcome,
        };
        let precondition = response.precondition.clone().unwrap_or_default();
        let status = precondition.status.unwrap_or_default();
        if status.code == INTERNAL && inner.options.fail_open {
            return Outcome::Allow;
        }
        let denial = (status.code != 0).then(|| Denial::new(status.code, &status.message));
        let valid = precondition.valid_duration.and_then(|d| span(d.seconds, d.nanos)).unwrap_or_default();
        let refs = precondition.referenced_attributes.as_ref().and_then(references);
        if let Some(refs) = refs
            && !valid.is_zero()
            && precondition.valid_use_count != 0
        {
            // This request is the first use.
            let uses = match precondition.valid_use_count {
                n if n < 0 => None,
                n => Some(n.unsigned_abs() - 1),
            };
            let mut cache = inner.checks.lock().unwrap_or_else(PoisonError::into_inner);
            cache.put(refs, bag, denial.clone(), now + valid, uses);
        }
        if let Some(d) = denial {
            return Outcome::Deny(d);
        }
        let exhausted: Vec<&str> = charges
            .iter()
            .filter(|c| response.quotas.get(&c.name).is_none_or(|q| q.granted_amount < c.amount))
            .map(|c| c.name.as_str())
            .collect();
        exhausted_outcome(&exhausted)
    }

    /// Takes quota from what was fetched ahead; fetches where that is not enough.
    async fn prefetched(&self, bag: &Bag, charges: &[QuotaCharge], now: Instant) -> Outcome {
        if charges.is_empty() {
            return Outcome::Allow;
        }
        let inner = &*self.0;
        let mut missing: Vec<(&QuotaCharge, i64, bool)> = Vec::new();
        let mut exhausted: Vec<&str> = Vec::new();
        {
            let mut quotas = inner.quotas.lock().unwrap_or_else(PoisonError::into_inner);
            for c in charges {
                match quotas.take(bag, c, now) {
                    quota::Taken::Yes => {}
                    quota::Taken::Exhausted => exhausted.push(&c.name),
                    quota::Taken::Unknown => missing.push((c, c.amount.max(quota::PREFETCH), true)),
                }
            }
        }
        if !exhausted.is_empty() {
            return exhausted_outcome(&exhausted);
        }
        if missing.is_empty() {
            return Outcome::Allow;
        }
        let response = match self.call(bag, &missing).await {
            Ok(r) => r,
            Err(outcome) => return outcome,
        };
        let mut quotas = inner.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        for (c, _, _) in &missing {
            let Some(q) = response.quotas.get(&c.name) else {
                exhausted.push(&c.name);
                continue;
            };
            let valid = q.valid_duration.and_then(|d| span(d.seconds, d.nanos)).unwrap_or_default();
            let refs = q.referenced_attributes.as_ref().and_then(references);
            let left = q.granted_amount.saturating_sub(c.amount);
            if left < 0 {
                exhausted.push(&c.name);
            }
            if let Some(refs) = refs {
                quotas.granted(refs, bag, &c.name, left.max(0), now, valid);
            }
        }
        exhausted_outcome(&exhausted)
    }

    async fn call(&self, bag: &Bag, quotas: &[(&QuotaCharge, i64, bool)]) -> Result<CheckResponse, Outcome> {
        let inner = &*self.0;
        inner.calls.fetch_add(1, Ordering::Relaxed);
        let id = inner.next_id.fetch_add(1, Ordering::Relaxed);
        let request = CheckRequest {
            attributes: Some(compress(bag, GLOBAL_WORDS.len())),
            global_word_count: u32::try_from(GLOBAL_WORDS.len()).unwrap_or(u32::MAX),
            deduplication_id: format!("{}-{id}", inner.options.client_id),
            quotas: quotas
                .iter()
                .map(|(c, amount, best_effort)| {
                    (c.name.clone(), QuotaParams { amount: *amount, best_effort: *best_effort })
                })
                .collect(),
        };
        let mut client = MixerClient::new(inner.channel.clone());
        let reason = match tokio::time::timeout(inner.options.timeout, client.check(request)).await {
            Ok(Ok(r)) => return Ok(r.into_inner()),
            Ok(Err(status)) => status.message().to_owned(),
            Err(_) => "no answer in time".to_owned(),
        };
        inner.failures.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(reason, fail_open = inner.options.fail_open, "policy check failed");
        Err(if inner.options.fail_open {
            Outcome::Allow
        } else {
            // What went wrong is for the operator's log, not for the caller.
            Outcome::Deny(Denial::new(UNAVAILABLE, "policy is not available"))
        })
    }

    /// Counts since the start.
    #[must_use]
    pub fn stats(&self) -> CheckStats {
        CheckStats {
            hits: self.0.hits.load(Ordering::Relaxed),
            calls: self.0.calls.load(Ordering::Relaxed),
            failures: self.0.failures.load(Ordering::Relaxed),
        }
    }
}

fn exhausted_outcome(names: &[&str]) -> Outcome {
    if names.is_empty() {
        return Outcome::Allow;
    }
    let message = format!("Quota is exhausted for: {}", names.join(", "));
    Outcome::Deny(Denial::new(RESOURCE_EXHAUSTED, &message))
}
