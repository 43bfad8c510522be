//! Sessions that stay on a host (`envoy.filters.http.stateful_session`): the client brings the address of the
//! host that served it before.
//!
//! The address is believed only if it is one of the cluster's hosts, so a client can choose among those and
//! reach nothing else.

use std::{net::SocketAddr, time::SystemTime};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_model::proxy as model;

use crate::{
    http::{headers::Headers, message::RequestHead, router::new_cookie},
    matcher::cookie,
    wire::{self, Writer},
};

/// A session as the router needs it.
#[derive(Debug)]
pub(crate) struct Session {
    state: model::SessionState,
    /// The host that the client wants.
    pub(crate) host: Option<SocketAddr>,
    /// That one or none.
    pub(crate) strict: bool,
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The session of a request.
pub(crate) fn run(c: &model::StatefulSession, head: &RequestHead) -> Option<Session> {
    let state = c.state.as_ref()?;
    let host = match state {
        model::SessionState::Cookie { name, path, .. } => {
            if !below(path, head.path_only()) {
                return None;
            }
            cookie(&head.headers, name).and_then(from_cookie)
        }
        model::SessionState::Header(name) => head
            .headers
            .get(name.as_bytes())
            .and_then(|v| STANDARD.decode(v).ok())
            .and_then(|v| std::str::from_utf8(&v).ok()?.parse().ok()),
    };
    Some(Session { state: state.clone(), host, strict: c.strict })
}

/// Cookie paths (RFC 6265 section 5.1.4).
fn below(cookie: &str, path: &str) -> bool {
    cookie.is_empty()
        || path
            .strip_prefix(cookie)
            .is_some_and(|r| r.is_empty() || r.starts_with('/') || cookie.ends_with('/'))
}

/// `envoy.Cookie { address, expires }`, or the bare address, in base64.
fn from_cookie(v: &str) -> Option<SocketAddr> {
    let raw = STANDARD.decode(v).ok()?;
    if let Some(a) = std::str::from_utf8(&raw).ok().and_then(|s| s.parse().ok()) {
        return Some(a);
    }
    let (mut address, mut expires) = (None, 0);
    wire::read(&raw, |n, f| {
        match n {
            1 => address = f.text().parse().ok(),
            2 => expires = f.number(),
            _ => {}
        }
        Ok(())
    })
    .ok()?;
    address.filter(|_| expires == 0 || expires > now())
}

impl Session {
    /// Tells the client its host, if it is another one than it asked for.
    pub(crate) fn remember(&self, host: SocketAddr, response: &mut Headers) {
        if self.host == Some(host) {
            return;
        }
        match &self.state {
            model::SessionState::Cookie { name, path, ttl } => {
                let mut w = Writer::default();
                w.text(1, host.to_string().as_bytes());
                if !ttl.is_zero() {
                    w.number(2, now() + ttl.as_secs());
                }
                let value = STANDARD.encode(w.into_bytes());
                response.push(b"set-cookie", new_cookie(name, &value, path, *ttl, &[]).as_bytes());
            }
            model::SessionState::Header(name) => {
                response.set(name.as_bytes(), STANDARD.encode(host.to_string()).as_bytes());
            }
        }
    }
}

/// A cookie of any text: what it names is what would be put into a new one.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    for text in [std::str::from_utf8(data).unwrap_or_default().to_owned(), STANDARD.encode(data)] {
        if let Some(host) = from_cookie(&text) {
            let mut w = Writer::default();
            w.text(1, host.to_string().as_bytes());
            assert_eq!(from_cookie(&STANDARD.encode(w.into_bytes())), Some(host));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_cookies() {
        let host: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let cookie = |expires: u64| {
            let mut w = Writer::default();
            w.text(1, b"10.0.0.1:80");
            w.number(2, expires);
            STANDARD.encode(w.into_bytes())
        };
        assert_eq!(from_cookie(&cookie(0)), Some(host));
        assert_eq!(from_cookie(&cookie(now() + 10)), Some(host));
        assert_eq!(from_cookie(&cookie(1)), None, "expired");
        assert_eq!(from_cookie(&STANDARD.encode("10.0.0.1:80")), Some(host));
        for bad in ["", "x", "!!", &STANDARD.encode("\x0a\x05x")] {
            assert_eq!(from_cookie(bad), None, "{bad}");
        }
        assert!(below("/a", "/a") && below("/a", "/a/b") && below("/", "/x") && below("", "/x"));
        assert!(!below("/a", "/ab") && !below("/a", "/"));
    }
}
