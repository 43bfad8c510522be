//! What a request asks of its forwarding: its limits, what is changed about it on the way, and what it is hashed by.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use mesh_model::proxy::HashPolicy;

use super::Context;
use crate::{
    config::route::{Destination, Forward, Retry, Route, VirtualHost},
    http::{headers::HeaderId, message::RequestHead, record::Record},
    matcher::{cookie, query_value},
    upstream::lb::stable_hash,
};

/// Details of a stream that lasted too long.
pub(super) const MAX_DURATION: &str = "max_duration_timeout";

/// When the stream must end: the client's deadline where the route believes it, the route's limit, or the
/// connection manager's.
pub(crate) fn stream_end(ctx: &Context<'_>, head: &RequestHead, rec: &Record) -> Option<Instant> {
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
    /// No `x-envoy-*` of the router's own.
    pub(crate) suppress: bool,
    /// The client's address: that of the connection, or what trusted proxies say it is.
    pub(crate) remote: IpAddr,
}

impl Rewrite<'_> {
    pub(crate) fn apply(&self, head: &mut RequestHead) {
        if let Some(new) = self.forward.rewritten_path(self.route, &head.path) {
            let before = std::mem::replace(&mut head.path, new);
            if !self.suppress {
                head.headers.set_id(HeaderId::XEnvoyOriginalPath, before.as_bytes());
            }
        }
        if let Some(h) = &self.forward.host_rewrite {
            let before = std::mem::replace(&mut head.authority, h.clone());
            if self.forward.forwarded_host {
                forwarded_host(&before, head);
            }
        }
        if let Some(t) = self.timeout.filter(|_| !self.suppress) {
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

/// Appends the host that a rewrite has replaced, unless it is the last one there already.
fn forwarded_host(before: &str, head: &mut RequestHead) {
    let said = head.headers.joined(HeaderId::XForwardedHost.name().as_bytes()).map(|v| v.into_owned());
    let value = match said {
        Some(v) if v.rsplit(|b| *b == b',').next().is_some_and(|l| l == before.as_bytes()) => {
            return;
        }
        Some(mut v) if !v.is_empty() => {
            v.push(b',');
            v.extend_from_slice(before.as_bytes());
            v
        }
        _ => before.as_bytes().to_vec(),
    };
    if !before.is_empty() {
        head.headers.set_id(HeaderId::XForwardedHost, &value);
    }
}

pub(super) fn millis(t: Duration) -> u64 {
    u64::try_from(t.as_millis()).unwrap_or(u64::MAX)
}

/// The few variables that header values may hold.
pub(super) fn expand(value: &str, remote: IpAddr) -> String {
    if !value.contains('%') {
        return value.to_owned();
    }
    value.replace("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", &remote.to_string()).replace("%%", "%")
}

/// The hash of a request, and the cookie that is to carry it back if it comes from one that the client lacks.
pub(super) fn hash(ctx: &Context<'_>, head: &RequestHead, remote: IpAddr) -> (Option<u64>, Option<String>) {
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
            HashPolicy::SourceIp => Some(stable_hash(remote.to_string().as_bytes())),
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

pub(crate) fn new_cookie(
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
