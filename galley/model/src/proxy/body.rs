//! HTTP filters that look at bodies, and sessions that stay on a host.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::StringMatch;

/// `envoy.extensions.filters.http.compressor.v3.Compressor`, for answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compressor {
    /// How.
    pub library: CompressionLibrary,
    /// Shorter answers are left alone; Envoy's default is 30.
    pub min_content_length: u32,
    /// Content types that are compressed; empty is Envoy's list of texts.
    pub content_types: Vec<StringMatch>,
    /// Leave answers with an `etag` alone.
    pub disable_on_etag: bool,
    /// A strong `etag` becomes a weak one; otherwise it is removed.
    pub weaken_etag: bool,
    /// The server does not learn what the client accepts.
    pub remove_accept_encoding: bool,
    /// Statuses that are left alone.
    pub uncompressible_statuses: Vec<u16>,
}

impl Default for Compressor {
    fn default() -> Self {
        Self {
            library: CompressionLibrary::Gzip { level: 6 },
            min_content_length: 30,
            content_types: vec![],
            disable_on_etag: false,
            weaken_etag: false,
            remove_accept_encoding: false,
            uncompressible_statuses: vec![],
        }
    }
}

/// A compression library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CompressionLibrary {
    /// `gzip`, level 1 (fast) to 9 (small).
    Gzip {
        /// Level.
        level: u8,
    },
}

/// `envoy.extensions.filters.http.buffer.v3.BufferPerRoute`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BufferOverride {
    /// Off.
    Disabled,
    /// Another limit, bytes.
    Limit(u32),
}

/// `envoy.extensions.filters.http.stateful_session.v3.StatefulSession`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StatefulSession {
    /// Where the client keeps its host; `None` only as the filter's own setting, which then does nothing.
    pub state: Option<SessionState>,
    /// Without that host the request is answered with 503.
    pub strict: bool,
    /// A session ends after this long, whatever the client does; zero is never. Of routes alone, and ours: Envoy knows the
    /// time of a cookie, of which it tells the client.
    pub absolute: Duration,
}

/// Where a client keeps its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionState {
    /// `CookieBasedSessionState`.
    Cookie {
        /// Name.
        name: String,
        /// Path; the session is looked for below it.
        path: String,
        /// Zero: session cookie.
        ttl: Duration,
    },
    /// `HeaderBasedSessionState`.
    Header(String),
}

/// `StatefulSessionPerRoute`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionOverride {
    /// Off.
    Disabled,
    /// Instead of the filter's.
    Set(StatefulSession),
}
