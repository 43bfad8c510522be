//! Requests and responses between the codecs, and the limits that every codec enforces.

use bytes::Bytes;
use http::Method;

use super::headers::Headers;

/// Bytes of a message head (start line and fields); Envoy's `max_request_headers_kb` default.
pub(crate) const MAX_HEAD: usize = 60 * 1024;
/// Fields in a message head; Envoy's default.
pub(crate) const MAX_FIELDS: usize = 100;
/// Bytes of a trailer section.
pub(crate) const MAX_TRAILERS: usize = 16 * 1024;

/// HTTP version of a message as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Version {
    Http10,
    Http11,
    Http2,
    Http3,
}

impl Version {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
            Self::Http3 => "HTTP/3",
        }
    }

    /// Requests are streams of a shared connection.
    pub(crate) fn is_multiplexed(self) -> bool {
        matches!(self, Self::Http2 | Self::Http3)
    }
}

/// What follows the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyKind {
    /// Nothing.
    Empty,
    /// This many bytes.
    Length(u64),
    /// Chunks, frames, or bytes until the peer closes.
    Stream,
}

/// A request head, the same for both codecs.
#[derive(Debug, Clone)]
pub(crate) struct RequestHead {
    pub(crate) method: Method,
    pub(crate) version: Version,
    /// `http` or `https`, as the client sees it.
    pub(crate) https: bool,
    /// `Host` or `:authority`; not among the headers.
    pub(crate) authority: String,
    /// Path and query; empty for CONNECT, `*` for a server-wide OPTIONS.
    pub(crate) path: String,
    pub(crate) headers: Headers,
    pub(crate) body: BodyKind,
    /// Protocol of an upgrade (`Upgrade` or `:protocol`), lower case.
    pub(crate) upgrade: Option<String>,
    /// The client waits for `100 Continue`.
    pub(crate) expect_continue: bool,
}

impl RequestHead {
    /// Path without the query.
    pub(crate) fn path_only(&self) -> &str {
        self.path.split_once('?').map_or(self.path.as_str(), |(p, _)| p)
    }

    /// Whether a yes turns the connection into a tunnel: its bytes are no body.
    pub(crate) fn opens_tunnel(&self) -> bool {
        self.upgrade.is_some() || self.method == Method::CONNECT
    }

    pub(crate) fn query(&self) -> Option<&str> {
        self.path.split_once('?').map(|(_, q)| q)
    }

    pub(crate) fn is_grpc(&self) -> bool {
        self.headers.get_id(super::headers::HeaderId::ContentType).is_some_and(|v| {
            v.starts_with(b"application/grpc") && matches!(v.get(16), None | Some(b'+' | b';'))
        })
    }
}

/// A response head.
#[derive(Debug, Clone)]
pub(crate) struct ResponseHead {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    pub(crate) body: BodyKind,
}

/// A piece of a body.
#[derive(Debug)]
pub(crate) enum Frame {
    Data(Bytes),
    Trailers(Headers),
}

/// Why a message that began cannot be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamError {
    /// The peer closed or reset.
    Reset,
    /// HTTP/2 `REFUSED_STREAM`: certainly not processed.
    Refused,
    /// The peer broke the protocol.
    Protocol,
    /// A limit on sizes was exceeded.
    TooLarge,
}
