//! Limits that are counted here (`envoy.filters.http.local_ratelimit`).

use std::time::Duration;

use mesh_model::proxy as model;

use super::{Descriptor, Rule, Source, bucket::Bucket, descriptors};
use crate::{
    config::{
        CompileError,
        route::{HeaderEdits, Route},
    },
    http::{
        filters::Passed,
        headers::Headers,
        local_reply::LocalReply,
        message::RequestHead,
        record::{Flag, Record},
    },
    worker::connection::Connection,
};

/// Buckets fill once a time slice at most; Envoy's bound.
const MIN_INTERVAL: Duration = Duration::from_millis(50);

/// A compiled [`model::LocalRateLimit`].
#[derive(Debug)]
pub(crate) struct LocalRateLimit {
    config: model::LocalRateLimit,
    bucket: Option<Bucket>,
    descriptors: Vec<(Descriptor, Bucket)>,
    rules: Vec<Rule>,
    request_headers: HeaderEdits,
    response_headers: HeaderEdits,
}

/// Refuses buckets that Envoy refuses.
pub(crate) fn bucket(c: &model::TokenBucket) -> Result<Bucket, CompileError> {
    if c.fill_interval < MIN_INTERVAL || c.tokens_per_fill == 0 {
        return Err(CompileError::RateLimit(format!(
            "a bucket needs at least one token a fill and an interval of at least {MIN_INTERVAL:?}"
        )));
    }
    Ok(Bucket::new(c))
}

impl LocalRateLimit {
    /// `on_route`: the settings are those of a route, which must have a bucket.
    pub(crate) fn new(c: &model::LocalRateLimit, on_route: bool) -> Result<Self, CompileError> {
        if on_route && c.bucket.is_none() {
            return Err(CompileError::RateLimit("a local limit on a route needs a bucket".into()));
        }
        let descriptors = c
            .descriptors
            .iter()
            .map(|d| Ok((d.entries.clone(), bucket(&d.bucket)?)))
            .collect::<Result<_, CompileError>>()?;
        Ok(Self {
            bucket: c.bucket.as_ref().map(bucket).transpose()?,
            descriptors,
            rules: super::rules(&c.rules)?,
            request_headers: HeaderEdits::new(&c.request_headers)?,
            response_headers: HeaderEdits::new(&c.response_headers)?,
            config: c.clone(),
        })
    }

    pub(crate) fn run(
        &self,
        conn: &Connection,
        head: &mut RequestHead,
        route: Option<&Route>,
        passed: &mut Passed,
        rec: &mut Record,
    ) -> Result<(), LocalReply> {
        let c = &self.config;
        let rng = &conn.worker.rng;
        let Some(general) = &self.bucket else { return Ok(()) };
        if !rng.chance_ppm(c.enabled) {
            return Ok(());
        }
        let mut own: Vec<&Bucket> = Vec::new();
        if !self.descriptors.is_empty() {
            let s = Source { conn, head, route, rec };
            let all: Vec<Descriptor> = if self.rules.is_empty() {
                descriptors(&s, c.stage, model::HostRateLimits::Override)
            } else {
                self.rules.iter().filter_map(|r| r.descriptor(&s)).collect()
            };
            own.extend(
                all.iter().flat_map(|d| self.descriptors.iter().filter(move |(e, _)| e == d)).map(|(_, b)| b),
            );
            // The slowest is the likeliest to refuse, and then the others keep their tokens.
            own.sort_by_key(|b| b.slowness());
        }
        if own.is_empty() || c.always_consume_default {
            own.push(general);
        }
        let refused = own.iter().find(|b| !b.take());
        let Some(by) = refused else {
            if c.x_ratelimit_headers
                && let Some(tightest) = own.iter().min_by_key(|b| b.remaining())
            {
                let edits = passed.response.get_or_insert_default();
                numbers(tightest, &mut edits.set);
            }
            return Ok(());
        };
        if !rng.chance_ppm(c.enforced) {
            self.request_headers.request(head, &|v| v.to_owned());
            return Ok(());
        }
        rec.flag(Flag::Rl);
        rec.details = "local_rate_limited".into();
        let status = if c.status < 400 { 429 } else { c.status };
        let mut reply = LocalReply {
            grpc: Some(if c.resource_exhausted { 8 } else { 14 }),
            ..LocalReply::text(status, "local_rate_limited")
        };
        reply.headers.push(b"x-envoy-ratelimited", b"true");
        if c.x_ratelimit_headers {
            numbers(by, &mut reply.headers);
        }
        self.response_headers.response(&mut reply.headers, &|v| v.to_owned());
        if c.retry_after && status == 429 && reply.headers.get(b"retry-after").is_none() {
            reply.headers.push(b"retry-after", seconds(by.wait()).max(1).to_string().as_bytes());
        }
        Err(reply)
    }
}

/// Whole seconds, rounded up.
fn seconds(d: Duration) -> u64 {
    d.as_secs() + u64::from(d.subsec_nanos() > 0)
}

fn numbers(b: &Bucket, h: &mut Headers) {
    h.push(b"x-ratelimit-limit", b.max().to_string().as_bytes());
    h.push(b"x-ratelimit-remaining", b.remaining().to_string().as_bytes());
    h.push(b"x-ratelimit-reset", seconds(b.wait()).to_string().as_bytes());
}
