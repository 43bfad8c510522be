//! Sessions that stay on a host (`envoy.filters.http.stateful_session`): the client brings the address of the
//! host that served it before.
//!
//! The address is believed only if it is one of the cluster's hosts, so a client can choose among those and
//! reach nothing else. It is written as Envoy writes it, so that a session may go on with either proxy; two things that
//! Envoy does not know it takes for no host, and balances: the slot of a workload behind a gateway, which is a part of
//! the address (`10.0.0.1:15443/0000beef`), and the end of a session in a header.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_model::proxy as model;

use crate::{
    config::route::{Destination, Forward},
    http::{headers::Headers, message::RequestHead, router::new_cookie},
    matcher::cookie,
    upstream::host::{Host, HostAddr},
    wire::{self, Writer},
};

/// A host as a client knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    address: SocketAddr,
    /// Of the workload, where the host is a gateway in front of it.
    slot: Option<u32>,
}

impl Known {
    fn of(host: &Host) -> Option<Self> {
        let HostAddr::Socket(address) = host.addr else { return None };
        let slot = match host.slots {
            model::Slots::Asks(slot) => Some(slot),
            _ => None,
        };
        Some(Self { address, slot })
    }

    /// Whether an endpoint is the one.
    pub(crate) fn is(&self, e: &model::LbEndpoint) -> bool {
        let slot = match e.slots {
            model::Slots::Asks(slot) => Some(slot),
            _ => None,
        };
        slot == self.slot && e.port == self.address.port() && e.address.parse() == Ok(self.address.ip())
    }

    fn parse(text: &str) -> Option<Self> {
        let (address, slot) = match text.split_once('/') {
            None => (text, None),
            Some((a, s)) => (a, Some(u32::from_str_radix(s, 16).ok()?)),
        };
        Some(Self { address: address.parse().ok()?, slot })
    }
}

impl std::fmt::Display for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.slot {
            None => self.address.fmt(f),
            Some(slot) => write!(f, "{}/{slot:08x}", self.address),
        }
    }
}

/// A session as the router needs it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) state: model::SessionState,
    pub(crate) absolute: Duration,
    /// The host that the client wants.
    pub(crate) host: Option<Known>,
    /// That one or none.
    pub(crate) strict: bool,
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What a route, or else the filter, says.
pub(crate) fn setting<'a>(
    filter: &'a model::StatefulSession,
    on_route: Option<&'a model::SessionOverride>,
) -> Option<&'a model::StatefulSession> {
    match on_route {
        None => Some(filter),
        Some(model::SessionOverride::Set(s)) => Some(s),
        Some(model::SessionOverride::Disabled) => None,
    }
}

/// The session of a request.
pub(crate) fn run(c: &model::StatefulSession, head: &RequestHead) -> Option<Session> {
    let state = c.state.as_ref()?;
    let host = match state {
        model::SessionState::Cookie { name, path, .. } => {
            if !below(path, head.path_only()) {
                return None;
            }
            cookie(&head.headers, name).and_then(read)
        }
        model::SessionState::Header(name) => {
            let value = head.headers.get(name.as_bytes());
            value.and_then(|v| std::str::from_utf8(v).ok()).and_then(read)
        }
    };
    Some(Session { state: state.clone(), absolute: c.absolute, host, strict: c.strict })
}

/// Cookie paths (RFC 6265 section 5.1.4).
fn below(cookie: &str, path: &str) -> bool {
    cookie.is_empty()
        || path
            .strip_prefix(cookie)
            .is_some_and(|r| r.is_empty() || r.starts_with('/') || cookie.ends_with('/'))
}

/// `envoy.Cookie { address, expires }`, or the bare address, in base64.
fn read(v: &str) -> Option<Known> {
    let raw = STANDARD.decode(v).ok()?;
    if let Some(known) = std::str::from_utf8(&raw).ok().and_then(Known::parse) {
        return Some(known);
    }
    let (mut known, mut expires) = (None, 0);
    wire::read(&raw, |n, f| {
        match n {
            1 => known = Known::parse(&f.text()),
            2 => expires = f.number(),
            _ => {}
        }
        Ok(())
    })
    .ok()?;
    known.filter(|_| expires == 0 || expires > now())
}

fn write(host: Known, ends_in: Duration) -> String {
    let mut w = Writer::default();
    w.text(1, host.to_string().as_bytes());
    if !ends_in.is_zero() {
        // A part of a second is one more.
        w.number(2, now() + ends_in.as_secs() + u64::from(ends_in.subsec_nanos() > 0));
    }
    STANDARD.encode(w.into_bytes())
}

impl Session {
    /// The host that the client wants, if it is one of these and takes traffic.
    pub(crate) fn among<'h>(&self, hosts: &'h [Arc<Host>]) -> Option<&'h Arc<Host>> {
        let wanted = self.host.as_ref()?;
        hosts.iter().find(|h| Known::of(h).as_ref() == Some(wanted) && h.is_usable())
    }

    /// Of several destinations the one that has the client's host: a session outlives a change of weights, and of those
    /// without weight as well (GEP-1619).
    pub(crate) fn destination<'f>(&self, forward: &'f Forward) -> Option<&'f Destination> {
        self.host.as_ref()?;
        let has =
            |d: &&Destination| d.cluster.load().is_some_and(|c| self.among(&c.tables().hosts).is_some());
        forward.destinations().iter().find(has)
    }

    /// Tells the client its host, if it is another one than it asked for.
    pub(crate) fn remember(&self, host: &Host, response: &mut Headers) {
        let Some(known) = Known::of(host).filter(|k| self.host.as_ref() != Some(k)) else { return };
        match &self.state {
            model::SessionState::Cookie { name, path, ttl } => {
                let ends_in = if self.absolute.is_zero() { *ttl } else { self.absolute };
                let value = write(known, ends_in);
                response.push(b"set-cookie", new_cookie(name, &value, path, *ttl, &[]).as_bytes());
            }
            model::SessionState::Header(name) => {
                let value = match self.absolute.is_zero() {
                    true => STANDARD.encode(known.to_string()),
                    false => write(known, self.absolute),
                };
                response.set(name.as_bytes(), value.as_bytes());
            }
        }
    }
}

/// A cookie of any text: what it names is what would be put into a new one.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    for text in [std::str::from_utf8(data).unwrap_or_default().to_owned(), STANDARD.encode(data)] {
        if let Some(host) = read(&text) {
            let mut w = Writer::default();
            w.text(1, host.to_string().as_bytes());
            assert_eq!(read(&STANDARD.encode(w.into_bytes())), Some(host));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_cookies() {
        let from_cookie = read;
        let host = Known { address: "10.0.0.1:80".parse().unwrap(), slot: None };
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
        let behind = Known { slot: Some(0xbeef), ..host };
        for known in [host, behind] {
            assert_eq!(read(&write(known, Duration::ZERO)), Some(known));
            assert_eq!(read(&write(known, Duration::from_millis(500))), Some(known));
            assert_eq!(Known::parse(&known.to_string()), Some(known));
        }
        assert_eq!(Known::parse("10.0.0.1:80/x"), None);
        assert!(below("/a", "/a") && below("/a", "/a/b") && below("/", "/x") && below("", "/x"));
        assert!(!below("/a", "/ab") && !below("/a", "/"));
    }
}
