//! Limits that a service counts (`envoy.filters.http.ratelimit`, `envoy.service.ratelimit.v3`).

use std::{fmt::Write as _, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_model::proxy as model;

use super::{Descriptor, Source, descriptors};
use crate::{
    config::{
        CompileError,
        route::{HeaderEdits, Route, SlotOf},
    },
    http::{
        client,
        filters::Passed,
        headers::{HeaderId, Headers},
        local_reply::LocalReply,
        message::RequestHead,
        record::{Flag, Record},
    },
    upstream::cluster::ClusterSlot,
    wire::{self, WireError, Writer},
    worker::connection::Connection,
};

const METHOD: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";
/// Envoy's default.
const TIMEOUT: Duration = Duration::from_millis(20);
const MAX_ANSWER: usize = 256 * 1024;
const OVER_LIMIT: u64 = 2;

/// A compiled [`model::GlobalRateLimit`].
#[derive(Debug)]
pub(crate) struct GlobalRateLimit {
    config: model::GlobalRateLimit,
    cluster: Arc<ClusterSlot>,
    response_headers: HeaderEdits,
}

/// An answer of the service.
#[derive(Debug, Default)]
struct Verdict {
    over: bool,
    statuses: Vec<Status>,
    response_headers: Vec<(String, Vec<u8>)>,
    request_headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
}

/// Where a descriptor stands.
#[derive(Debug, Default)]
struct Status {
    limit: u64,
    /// Seconds; 0 is unknown.
    unit: u64,
    name: String,
    remaining: u64,
    reset: u64,
}

impl GlobalRateLimit {
    pub(crate) fn new(c: &model::GlobalRateLimit, slot: SlotOf<'_>) -> Result<Self, CompileError> {
        Ok(Self {
            cluster: slot(&c.service.cluster),
            response_headers: HeaderEdits::new(&c.response_headers)?,
            config: c.clone(),
        })
    }

    pub(crate) async fn run(
        &self,
        conn: &Rc<Connection>,
        head: &mut RequestHead,
        route: Option<&Route>,
        passed: &mut Passed,
        rec: &mut Record,
    ) -> Result<(), LocalReply> {
        let c = &self.config;
        let which = route.map(|r| r.filters.rate_limit).unwrap_or_default();
        let all = descriptors(&Source { conn, head, route, rec }, c.stage, which);
        if all.is_empty() {
            return Ok(());
        }
        let message = request(&c.domain, &all);
        let limit = c.service.timeout.filter(|t| !t.is_zero()).unwrap_or(TIMEOUT);
        let answer =
            client::grpc(&conn.worker, &self.cluster, &c.service, METHOD, &message, limit, MAX_ANSWER).await;
        let verdict = match answer.and_then(|a| decode(&a).map_err(|e| e.to_string())) {
            Ok(v) => v,
            Err(error) => {
                tracing::debug!(%error, "no answer of the rate limit service");
                if !c.failure_mode_deny {
                    return Ok(());
                }
                rec.flag(Flag::Rlse);
                rec.details = "rate_limiter_error".into();
                return Err(LocalReply { status: c.status_on_error, ..LocalReply::default() });
            }
        };
        let mut headers = Headers::default();
        push_all(&mut headers, &verdict.response_headers);
        if c.x_ratelimit_headers {
            numbers(&verdict.statuses, &mut headers);
        }
        if !verdict.over {
            push_all(&mut head.headers, &verdict.request_headers);
            if !headers.is_empty() {
                let edits = passed.response.get_or_insert_default();
                headers.iter().for_each(|(_, n, v)| edits.add.push(n, v));
            }
            return Ok(());
        }
        rec.flag(Flag::Rl);
        rec.details = "request_rate_limited".into();
        if !c.no_ratelimited_header {
            headers.push(b"x-envoy-ratelimited", b"true");
        }
        self.response_headers.response(&mut headers, &|v| v.to_owned());
        Err(LocalReply {
            status: if c.status < 400 { 429 } else { c.status },
            is_text: true,
            body: verdict.body.into(),
            headers,
            grpc: Some(if c.resource_exhausted { 8 } else { 14 }),
        })
    }
}

/// An answer: whatever it adds to the request, it stays one.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let Ok(v) = decode(data) else { return };
    let mut head = crate::http::filters::fuzz_head();
    push_all(&mut head.headers, &v.request_headers);
    crate::http::h1::fuzz::forward(&head, &[]);
    let mut headers = Headers::default();
    numbers(&v.statuses, &mut headers);
    assert!(headers.iter().all(|(_, _, v)| http::HeaderValue::from_bytes(v).is_ok()));
}

fn push_all(to: &mut Headers, list: &[(String, Vec<u8>)]) {
    for (n, v) in list {
        let id = HeaderId::of(n.as_bytes());
        let framing =
            id.is_hop_by_hop() || matches!(id, HeaderId::ContentLength | HeaderId::Host | HeaderId::Expect);
        if !framing
            && http::HeaderName::from_bytes(n.as_bytes()).is_ok()
            && http::HeaderValue::from_bytes(v).is_ok()
        {
            to.push(n.as_bytes(), v);
        }
    }
}

fn request(domain: &str, all: &[Descriptor]) -> Bytes {
    let mut w = Writer::default();
    w.text(1, domain.as_bytes());
    for d in all {
        w.message(2, |w| {
            for (k, v) in d {
                w.entry(1, k.as_bytes(), v.as_bytes());
            }
        });
    }
    Bytes::from(w.framed())
}

fn decode(message: &[u8]) -> Result<Verdict, WireError> {
    let mut out = Verdict::default();
    wire::read(message, |n, f| {
        match n {
            1 => out.over = f.number() == OVER_LIMIT,
            2 => out.statuses.push(status(f.bytes())?),
            3 => out.response_headers.push(header(f.bytes())?),
            4 => out.request_headers.push(header(f.bytes())?),
            5 => out.body = f.bytes().to_vec(),
            _ => {}
        }
        Ok(())
    })?;
    Ok(out)
}

fn header(b: &[u8]) -> Result<(String, Vec<u8>), WireError> {
    let (mut name, mut value) = (String::new(), Vec::new());
    wire::read(b, |n, f| {
        match n {
            1 => name = f.text().to_ascii_lowercase(),
            2 | 3 => value = f.bytes().to_vec(),
            _ => {}
        }
        Ok(())
    })?;
    Ok((name, value))
}

fn status(b: &[u8]) -> Result<Status, WireError> {
    let mut out = Status::default();
    wire::read(b, |n, f| {
        match n {
            2 => wire::read(f.bytes(), |n, f| {
                match n {
                    1 => out.limit = f.number(),
                    2 => {
                        out.unit = match f.number() {
                            1 => 1,
                            2 => 60,
                            3 => 3600,
                            4 => 86_400,
                            5 => 2_592_000,
                            6 => 31_536_000,
                            7 => 604_800,
                            _ => 0,
                        }
                    }
                    3 => out.name = f.text().into_owned(),
                    _ => {}
                }
                Ok(())
            })?,
            3 => out.remaining = f.number(),
            4 => wire::read(f.bytes(), |n, f| {
                if n == 1 {
                    out.reset = f.number();
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(out)
}

/// The limit that is closest, and all windows behind it.
fn numbers(all: &[Status], h: &mut Headers) {
    let Some(closest) = all.iter().filter(|s| s.limit > 0).min_by_key(|s| s.remaining) else { return };
    let mut text = closest.limit.to_string();
    for s in all.iter().filter(|s| s.limit > 0 && s.unit > 0) {
        let _ = write!(text, ", {};w={}", s.limit, s.unit);
        if !s.name.is_empty() && s.name.bytes().all(|b| b.is_ascii_graphic() && b != b'"') {
            let _ = write!(text, ";name=\"{}\"", s.name);
        }
    }
    h.push(b"x-ratelimit-limit", text.as_bytes());
    h.push(b"x-ratelimit-remaining", closest.remaining.to_string().as_bytes());
    h.push(b"x-ratelimit-reset", closest.reset.to_string().as_bytes());
}
