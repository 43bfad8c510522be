//! What HTTP/2 and HTTP/3 have in common: requests whose heads are lists of fields, many on one connection.

use std::{cell::Cell, time::Duration};

use http::Method;
use tokio::{sync::Notify, time::Instant};

use super::{
    h1::parse::{content_length, is_authority, is_path},
    headers::{HeaderId, Headers, list_has},
    message::{BodyKind, RequestHead, Version},
};

/// Streams of a connection from which on it is judged by how many of them its client abandoned before any answer
/// (CVE-2023-44487): more than half is no client but an attack. Envoy judges the same way.
const JUDGED_FROM: u64 = 500;

/// Takes a field of a request; `Err` is the status of a refusal. `Host` is the caller's.
pub(crate) fn push(headers: &mut Headers, name: &[u8], value: &[u8]) -> Result<(), u16> {
    match HeaderId::of(name) {
        HeaderId::Host | HeaderId::Expect => return Ok(()),
        HeaderId::Te if !list_has(value, "trailers") => return Ok(()),
        // Connection-specific fields make a message malformed (RFC 9113 section 8.2.2, RFC 9114 section 4.2).
        id if id.is_hop_by_hop() => return Err(400),
        // Clients may split cookies; HTTP/1 does not (RFC 9113 section 8.2.3).
        HeaderId::Cookie if headers.has(HeaderId::Cookie) => {
            let mut joined = headers.get_id(HeaderId::Cookie).unwrap_or_default().to_vec();
            joined.extend_from_slice(b"; ");
            joined.extend_from_slice(value);
            headers.set_id(HeaderId::Cookie, &joined);
            return Ok(());
        }
        _ => {}
    }
    // What HTTP/1 would read as a line end must not come out of another version.
    if value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0)) {
        return Err(400);
    }
    headers.push(name, value);
    Ok(())
}

/// The fields that are not among the headers.
pub(crate) struct Target<'a> {
    pub(crate) method: Method,
    pub(crate) authority: Option<&'a str>,
    /// `Host`, if it was there.
    pub(crate) host: Option<&'a str>,
    pub(crate) path: &'a str,
    /// `:protocol`.
    pub(crate) protocol: Option<String>,
}

/// A head of what was read; `ended` says that no body follows. `Err` is the status of a refusal.
pub(crate) fn head(
    version: Version,
    https: bool,
    target: Target<'_>,
    headers: Headers,
    ended: bool,
) -> Result<RequestHead, u16> {
    let Target { method, authority, host, path, protocol } = target;
    // `:authority` and `Host` must not disagree (RFC 9113 section 8.3.1, RFC 9114 section 4.3.1): one proxy would
    // route by one, the next by the other.
    let authority = match (authority, host) {
        (Some(a), None) => a,
        (Some(a), Some(h)) if a.eq_ignore_ascii_case(h) => a,
        (None, Some(h)) => h,
        _ => return Err(400),
    };
    // A protocol is what an extended CONNECT asks for, and nobody else (RFC 8441 section 4).
    if protocol.is_some() && method != Method::CONNECT {
        return Err(400);
    }
    let tunnel = method == Method::CONNECT && protocol.is_none();
    let path_ok = match path {
        "" => tunnel,
        "*" => method == Method::OPTIONS,
        p => p.starts_with('/') && is_path(p),
    };
    // A tunnel has no default port (RFC 9110 section 9.3.6).
    if !is_authority(authority) || !path_ok || (tunnel && !authority.contains(':')) {
        return Err(400);
    }
    let lengths = headers.count_id(HeaderId::ContentLength);
    // Digits and nothing else, since HTTP/1 has it as it came: `parse` would take a sign.
    let length =
        headers.get_id(HeaderId::ContentLength).map(content_length).transpose().map_err(|_| 400u16)?;
    if lengths > 1 {
        return Err(400);
    }
    let body = match (ended, length) {
        (true, None | Some(0)) => BodyKind::Empty,
        (true, Some(_)) => return Err(400),
        (false, Some(n)) => BodyKind::Length(n),
        (false, None) => BodyKind::Stream,
    };
    Ok(RequestHead {
        method,
        version,
        https,
        authority: authority.to_owned(),
        path: path.to_owned(),
        headers,
        body,
        upgrade: protocol,
        expect_continue: false,
    })
}

/// Streams of a connection.
pub(crate) struct Streams {
    active: Cell<usize>,
    /// When the last one ended.
    last: Cell<Instant>,
    opened: Cell<u64>,
    /// Ended by the client before an answer began.
    abandoned: Cell<u64>,
    /// The last one ended.
    none: Notify,
}

impl Streams {
    pub(crate) fn new() -> Self {
        Self {
            active: Cell::new(0),
            last: Cell::new(Instant::now()),
            opened: Cell::new(0),
            abandoned: Cell::new(0),
            none: Notify::new(),
        }
    }

    pub(crate) fn begin(&self) {
        self.active.set(self.active.get() + 1);
        self.opened.set(self.opened.get() + 1);
    }

    pub(crate) fn end(&self, answered: bool) {
        self.active.set(self.active.get() - 1);
        self.last.set(Instant::now());
        self.abandoned.set(self.abandoned.get() + u64::from(!answered));
        if self.active.get() == 0 {
            self.none.notify_one();
        }
    }

    /// Waits until there is none; may return early.
    pub(crate) async fn ended(&self) {
        self.none.notified().await;
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.active.get() == 0
    }

    /// When the last one ended.
    pub(crate) fn last(&self) -> Instant {
        self.last.get()
    }

    /// When the connection will have been idle for this long, if nothing happens on it.
    pub(crate) fn idle_until(&self, timeout: Duration) -> Instant {
        (if self.is_idle() { self.last.get() } else { Instant::now() }) + timeout
    }

    pub(crate) fn are_abandoned(&self) -> bool {
        self.opened.get() >= JUDGED_FROM && self.abandoned.get() * 2 > self.opened.get()
    }
}

/// Waits for a time that may never come.
pub(crate) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
