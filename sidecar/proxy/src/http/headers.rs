//! The header list of a message: one arena of bytes and one array of positions.
//!
//! A request crosses the proxy with a handful of edits, so the list keeps names and values as they came
//! (order and case included) in a single buffer. Well-known names are recognised once, on insertion, and
//! are compared as numbers afterwards. Nothing is allocated per header.

use std::{borrow::Cow, sync::LazyLock};

use bytes::Bytes;

macro_rules! known_headers {
    ($($id:ident = $name:literal,)*) => {
        /// Names that the proxy itself looks at.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub(crate) enum HeaderId {
            /// Any other name.
            Other,
            $($id,)*
        }

        impl HeaderId {
            const ALL: &'static [HeaderId] = &[$(HeaderId::$id,)*];

            /// Lower-case name; empty for [`HeaderId::Other`].
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    HeaderId::Other => "",
                    $(HeaderId::$id => $name,)*
                }
            }
        }
    };
}

known_headers! {
    AccessControlAllowCredentials = "access-control-allow-credentials",
    AccessControlAllowHeaders = "access-control-allow-headers",
    AccessControlAllowMethods = "access-control-allow-methods",
    AccessControlAllowOrigin = "access-control-allow-origin",
    AccessControlExposeHeaders = "access-control-expose-headers",
    AccessControlMaxAge = "access-control-max-age",
    AccessControlRequestMethod = "access-control-request-method",
    Authorization = "authorization",
    B3 = "b3",
    Connection = "connection",
    ContentLength = "content-length",
    ContentType = "content-type",
    Cookie = "cookie",
    Date = "date",
    Expect = "expect",
    GrpcMessage = "grpc-message",
    GrpcStatus = "grpc-status",
    GrpcTimeout = "grpc-timeout",
    Host = "host",
    Http2Settings = "http2-settings",
    KeepAlive = "keep-alive",
    Location = "location",
    Origin = "origin",
    ProxyAuthenticate = "proxy-authenticate",
    ProxyAuthorization = "proxy-authorization",
    ProxyConnection = "proxy-connection",
    Referer = "referer",
    SecWebSocketAccept = "sec-websocket-accept",
    SecWebSocketKey = "sec-websocket-key",
    Server = "server",
    SetCookie = "set-cookie",
    Te = "te",
    Traceparent = "traceparent",
    Tracestate = "tracestate",
    Trailer = "trailer",
    TransferEncoding = "transfer-encoding",
    Upgrade = "upgrade",
    UserAgent = "user-agent",
    Vary = "vary",
    XB3Flags = "x-b3-flags",
    XB3ParentSpanId = "x-b3-parentspanid",
    XB3Sampled = "x-b3-sampled",
    XB3SpanId = "x-b3-spanid",
    XB3TraceId = "x-b3-traceid",
    XEnvoyAttemptCount = "x-envoy-attempt-count",
    XEnvoyDecoratorOperation = "x-envoy-decorator-operation",
    XEnvoyExpectedRqTimeoutMs = "x-envoy-expected-rq-timeout-ms",
    XEnvoyExternalAddress = "x-envoy-external-address",
    XEnvoyInternal = "x-envoy-internal",
    XEnvoyMaxRetries = "x-envoy-max-retries",
    XEnvoyOriginalPath = "x-envoy-original-path",
    XEnvoyOverloaded = "x-envoy-overloaded",
    XEnvoyRatelimited = "x-envoy-ratelimited",
    XEnvoyUpstreamRqTimeoutMs = "x-envoy-upstream-rq-timeout-ms",
    XEnvoyUpstreamServiceTime = "x-envoy-upstream-service-time",
    XForwardedClientCert = "x-forwarded-client-cert",
    XForwardedFor = "x-forwarded-for",
    XForwardedHost = "x-forwarded-host",
    XForwardedPort = "x-forwarded-port",
    XForwardedProto = "x-forwarded-proto",
    XRequestId = "x-request-id",
}

const LONGEST_KNOWN: usize = 32;

static BY_LENGTH: LazyLock<[Vec<HeaderId>; LONGEST_KNOWN + 1]> = LazyLock::new(|| {
    let mut table = std::array::from_fn(|_| Vec::new());
    for id in HeaderId::ALL {
        table[id.name().len()].push(*id);
    }
    table
});

/// Known names in the form of the `http` crate, by their number; the first stands for other names and is not used.
static NAMES: LazyLock<Vec<http::HeaderName>> = LazyLock::new(|| {
    let known = HeaderId::ALL.iter().map(|id| http::HeaderName::from_static(id.name()));
    std::iter::once(http::header::TRAILER).chain(known).collect()
});

impl HeaderId {
    /// Recognises a name in any case.
    pub(crate) fn of(name: &[u8]) -> Self {
        let Some(candidates) = BY_LENGTH.get(name.len()) else { return Self::Other };
        for id in candidates {
            if id.name().as_bytes().eq_ignore_ascii_case(name) {
                return *id;
            }
        }
        Self::Other
    }

    /// Whether each request has a value of its own.
    fn is_unique(self) -> bool {
        matches!(
            self,
            Self::XRequestId
                | Self::Traceparent
                | Self::B3
                | Self::XB3TraceId
                | Self::XB3SpanId
                | Self::XB3ParentSpanId
                | Self::XEnvoyUpstreamServiceTime
        )
    }

    /// Headers that belong to one connection (RFC 9110 section 7.6.1) and are never forwarded.
    pub(crate) fn is_hop_by_hop(self) -> bool {
        matches!(
            self,
            Self::Connection
                | Self::KeepAlive
                | Self::ProxyConnection
                | Self::ProxyAuthenticate
                | Self::ProxyAuthorization
                | Self::TransferEncoding
                | Self::Upgrade
                | Self::Http2Settings
        )
    }

    /// Fields that frame, route or authenticate a message: behind its body they mean nothing (RFC 9110
    /// section 6.5.1), and are dropped there so that nobody merges them into the head.
    pub(crate) fn is_forbidden_trailer(self) -> bool {
        self.is_hop_by_hop()
            || matches!(
                self,
                Self::ContentLength
                    | Self::Host
                    | Self::Authorization
                    | Self::Cookie
                    | Self::SetCookie
                    | Self::ContentType
                    | Self::Expect
                    | Self::Te
                    | Self::Trailer
                    | Self::XForwardedClientCert
                    | Self::XForwardedFor
            )
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    name: u32,
    value: u32,
    value_len: u32,
    name_len: u16,
    id: HeaderId,
}

/// An ordered multimap of header fields.
#[derive(Debug, Clone, Default)]
pub(crate) struct Headers {
    arena: Vec<u8>,
    entries: Vec<Entry>,
}

impl Headers {
    pub(crate) fn with_capacity(bytes: usize, fields: usize) -> Self {
        Self { arena: Vec::with_capacity(bytes), entries: Vec::with_capacity(fields) }
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn name_of(&self, e: &Entry) -> &[u8] {
        &self.arena[e.name as usize..e.name as usize + usize::from(e.name_len)]
    }

    fn value_of(&self, e: &Entry) -> &[u8] {
        &self.arena[e.value as usize..e.value as usize + e.value_len as usize]
    }

    /// Appends a field. Parsers bound names and values far below the integer widths; a name that does not
    /// fit is dropped rather than cut.
    pub(crate) fn push(&mut self, name: &[u8], value: &[u8]) {
        self.push_known(HeaderId::of(name), name, value);
    }

    pub(crate) fn push_id(&mut self, id: HeaderId, value: &[u8]) {
        self.push_known(id, id.name().as_bytes(), value);
    }

    fn push_known(&mut self, id: HeaderId, name: &[u8], value: &[u8]) {
        let (Ok(name_len), Ok(value_len), Ok(at)) =
            (u16::try_from(name.len()), u32::try_from(value.len()), u32::try_from(self.arena.len()))
        else {
            return;
        };
        self.arena.extend_from_slice(name);
        self.arena.extend_from_slice(value);
        self.entries.push(Entry { name: at, name_len, value: at + u32::from(name_len), value_len, id });
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (HeaderId, &[u8], &[u8])> {
        self.entries.iter().map(|e| (e.id, self.name_of(e), self.value_of(e)))
    }

    pub(crate) fn get_id(&self, id: HeaderId) -> Option<&[u8]> {
        self.entries.iter().find(|e| e.id == id).map(|e| self.value_of(e))
    }

    pub(crate) fn str_id(&self, id: HeaderId) -> Option<&str> {
        self.get_id(id).and_then(|v| std::str::from_utf8(v).ok())
    }

    pub(crate) fn has(&self, id: HeaderId) -> bool {
        self.entries.iter().any(|e| e.id == id)
    }

    pub(crate) fn count_id(&self, id: HeaderId) -> usize {
        self.entries.iter().filter(|e| e.id == id).count()
    }

    pub(crate) fn values_id(&self, id: HeaderId) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().filter(move |e| e.id == id).map(|e| self.value_of(e))
    }

    /// All values of a name in any case.
    pub(crate) fn values<'a>(&'a self, name: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let id = HeaderId::of(name);
        self.entries.iter().filter(move |e| self.matches(e, id, name)).map(|e| self.value_of(e))
    }

    fn matches(&self, e: &Entry, id: HeaderId, name: &[u8]) -> bool {
        e.id == id && (id != HeaderId::Other || self.name_of(e).eq_ignore_ascii_case(name))
    }

    /// First value of a name in any case.
    pub(crate) fn get(&self, name: &[u8]) -> Option<&[u8]> {
        let id = HeaderId::of(name);
        self.entries.iter().find(|e| self.matches(e, id, name)).map(|e| self.value_of(e))
    }

    /// All values of a name joined by `,`, as policies and routes see a repeated header.
    pub(crate) fn joined(&self, name: &[u8]) -> Option<Cow<'_, [u8]>> {
        let id = HeaderId::of(name);
        let mut found = self.entries.iter().filter(|e| self.matches(e, id, name));
        let first = self.value_of(found.next()?);
        let mut out = Cow::Borrowed(first);
        for e in found {
            let v = out.to_mut();
            v.push(b',');
            v.extend_from_slice(self.value_of(e));
        }
        Some(out)
    }

    pub(crate) fn remove_id(&mut self, id: HeaderId) {
        self.entries.retain(|e| e.id != id);
    }

    pub(crate) fn remove(&mut self, name: &[u8]) {
        let id = HeaderId::of(name);
        if id != HeaderId::Other {
            return self.remove_id(id);
        }
        let arena = &self.arena;
        self.entries.retain(|e| {
            let at = e.name as usize;
            !(e.id == id && arena[at..at + usize::from(e.name_len)].eq_ignore_ascii_case(name))
        });
    }

    pub(crate) fn set_id(&mut self, id: HeaderId, value: &[u8]) {
        self.remove_id(id);
        self.push_id(id, value);
    }

    /// Sets a decimal number.
    pub(crate) fn set_number(&mut self, id: HeaderId, mut value: u64) {
        let mut digits = [0; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (value % 10) as u8;
            value /= 10;
            if value == 0 {
                break;
            }
        }
        self.set_id(id, &digits[at..]);
    }

    pub(crate) fn set(&mut self, name: &[u8], value: &[u8]) {
        self.remove(name);
        self.push(name, value);
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(HeaderId, &[u8], &[u8]) -> bool) {
        let arena = &self.arena;
        self.entries.retain(|e| {
            let (n, v) = (e.name as usize, e.value as usize);
            keep(e.id, &arena[n..n + usize::from(e.name_len)], &arena[v..v + e.value_len as usize])
        });
    }

    /// Writes the fields as HTTP/1 lines.
    pub(crate) fn write_h1(&self, out: &mut Vec<u8>) {
        for e in &self.entries {
            // Name and value are neighbours in the arena, the separator goes between.
            out.extend_from_slice(self.name_of(e));
            out.extend_from_slice(b": ");
            out.extend_from_slice(self.value_of(e));
            out.extend_from_slice(b"\r\n");
        }
    }

    /// Copies into the map that the `h2` crate wants; fields that HTTP/2 cannot carry are left out. The values
    /// share one allocation.
    pub(crate) fn to_map(&self) -> http::HeaderMap {
        let mut map = http::HeaderMap::with_capacity(self.entries.len());
        let arena = Bytes::copy_from_slice(&self.arena);
        for e in &self.entries {
            if e.id.is_hop_by_hop() {
                continue;
            }
            let name = match e.id {
                HeaderId::Other => http::HeaderName::from_bytes(self.name_of(e)).ok(),
                known => NAMES.get(known as usize).cloned(),
            };
            let at = e.value as usize;
            let value = http::HeaderValue::from_maybe_shared(arena.slice(at..at + e.value_len as usize));
            if let (Some(name), Ok(mut value)) = (name, value) {
                // A value that no other request has would only push others out of HPACK's table.
                value.set_sensitive(e.id.is_unique());
                map.append(name, value);
            }
        }
        map
    }

    pub(crate) fn from_map(map: &http::HeaderMap) -> Self {
        let mut out = Self::with_capacity(map.len() * 40, map.len());
        for (name, value) in map {
            out.push(name.as_str().as_bytes(), value.as_bytes());
        }
        out
    }
}

/// Whether a comma-separated list holds `token`, in any case.
pub(crate) fn list_has(value: &[u8], token: &str) -> bool {
    value.split(|b| *b == b',').any(|t| t.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_are_found_in_any_case() {
        for id in HeaderId::ALL {
            assert_eq!(HeaderId::of(id.name().as_bytes()), *id);
            assert_eq!(HeaderId::of(id.name().to_ascii_uppercase().as_bytes()), *id);
            assert!(id.name().len() <= LONGEST_KNOWN, "{}", id.name());
            assert_eq!(NAMES[*id as usize].as_str(), id.name());
        }
        assert_eq!(HeaderId::of(b"x-custom"), HeaderId::Other);
        assert_eq!(HeaderId::of(&[b'a'; 500]), HeaderId::Other);
    }

    #[test]
    fn edits_keep_order_and_case() {
        let mut h = Headers::default();
        h.push(b"X-One", b"1");
        h.push(b"Host", b"a");
        h.push(b"x-one", b"2");
        assert_eq!(h.joined(b"X-ONE").unwrap().as_ref(), b"1,2");
        h.set(b"host", b"b");
        h.remove(b"missing");
        let mut out = Vec::new();
        h.write_h1(&mut out);
        assert_eq!(out, b"X-One: 1\r\nx-one: 2\r\nhost: b\r\n");
        h.set_number(HeaderId::Server, 0);
        assert_eq!(h.get(b"server"), Some(&b"0"[..]));
        h.set_number(HeaderId::Server, u64::MAX);
        assert_eq!(h.str_id(HeaderId::Server), Some(u64::MAX.to_string().as_str()));
        h.remove_id(HeaderId::Server);
        h.remove(b"X-oNe");
        assert_eq!(h.len(), 1);
        assert_eq!(h.to_map().get("host").unwrap(), "b");
    }
}
