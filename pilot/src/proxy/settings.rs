//! Headers that a proxy adds and limits that it keeps: `proxyHeaders` and `connectionSettings` of a `ProxyConfig`, the
//! mesh's or the proxy's own.

use std::time::Duration;

use mesh_model::{
    authored::{
        ClientCertDetails, ConnectionProfile, ConnectionSettings, EscapedSlashesAction, HeaderOff, HeaderOn,
        ProxyHeaders, UnderscoresAction,
    },
    proxy::{AddedHeaders, ClientCertParts, EscapedSlashes, HttpLimits, Underscores},
};

/// `server` of answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum ServerName {
    /// What Istio's proxies say.
    #[default]
    Usual,
    /// Something else.
    Own(String),
    /// Answers keep the server's own.
    Upstream,
}

/// `proxyHeaders`, with what holds where nothing is said.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HeaderSettings {
    /// What a connection manager adds.
    pub added: AddedHeaders,
    /// `server` of answers.
    pub server: ServerName,
    /// `x-forwarded-client-cert` of requests that enter a workload; at gateways `gatewayTopology` decides.
    pub client_cert: ClientCertDetails,
    /// `x-envoy-attempt-count`.
    pub attempt_count: bool,
    /// `x-forwarded-host` where a route rewrites the host.
    pub forwarded_host: bool,
}

impl Default for HeaderSettings {
    fn default() -> Self {
        Self {
            added: AddedHeaders::default(),
            server: ServerName::Usual,
            client_cert: ClientCertDetails::Undefined,
            attempt_count: true,
            forwarded_host: false,
        }
    }
}

impl From<&ProxyHeaders> for HeaderSettings {
    fn from(h: &ProxyHeaders) -> Self {
        let off = |o: &Option<HeaderOff>| o.as_ref().and_then(|o| o.disabled).unwrap_or(false);
        let on = |o: &Option<HeaderOn>| o.as_ref().and_then(|o| o.enabled).unwrap_or(false);
        let usual = ClientCertParts::default();
        let client_cert = h.set_current_client_cert_details.as_ref().map_or(usual, |c| ClientCertParts {
            subject: c.subject.unwrap_or(usual.subject),
            uri: c.uri.unwrap_or(usual.uri),
            dns: c.dns.unwrap_or(usual.dns),
            cert: c.cert.unwrap_or(usual.cert),
            chain: c.chain.unwrap_or(usual.chain),
        });
        Self {
            added: AddedHeaders {
                request_id: !off(&h.request_id),
                forwarded_port: on(&h.x_forwarded_port),
                suppress_envoy: off(&h.envoy_debug_headers),
                client_cert,
                preserve_case: h.preserve_http1_header_case.unwrap_or(false),
            },
            server: match &h.server {
                Some(s) if s.disabled.unwrap_or(false) => ServerName::Upstream,
                Some(s) if !s.value.is_empty() => ServerName::Own(s.value.clone()),
                _ => ServerName::Usual,
            },
            client_cert: h.forwarded_client_cert,
            attempt_count: !off(&h.attempt_count),
            forwarded_host: on(&h.x_forwarded_host),
        }
    }
}

/// `connectionSettings`, with what its profile sets. `None` leaves things as they are without them; a time of zero is no
/// limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ConnectionLimits {
    /// Limits of connection managers.
    pub http: HttpLimits,
    /// Time without a request after which a connection ends.
    pub idle_timeout: Option<Duration>,
    /// Time in which the head of a request must arrive.
    pub request_headers_timeout: Option<Duration>,
    /// Time without activity on a stream.
    pub stream_idle_timeout: Option<Duration>,
    /// Longest stream.
    pub max_stream_duration: Option<Duration>,
    /// `//` becomes `/`.
    pub merge_slashes: Option<bool>,
    /// What becomes of escaped slashes.
    pub escaped_slashes: Option<EscapedSlashes>,
    /// Bytes that a listener buffers for a connection.
    pub listener_buffer: Option<u32>,
    /// Connections that a listener has at a time.
    pub listener_connections: Option<u32>,
    /// Bytes that a cluster buffers for a connection.
    pub cluster_buffer: Option<u32>,
}

impl ConnectionLimits {
    /// Of a gateway or of a sidecar.
    #[must_use]
    pub fn of(c: &ConnectionSettings, gateway: bool) -> Self {
        // Of Istio's gateways, after Envoy's advice for edges.
        let edge = gateway && c.profile == ConnectionProfile::Edge;
        let seconds = |n| edge.then_some(Duration::from_secs(n));
        let time = |d: Option<mesh_model::authored::Duration>| d.map(Duration::from);
        let number = |n: Option<i32>, at_edges: u32| {
            n.and_then(|n| u32::try_from(n).ok()).or(edge.then_some(at_edges))
        };
        Self {
            http: HttpLimits {
                request_timeout: time(c.http_request_timeout).or(seconds(300)),
                max_connection_duration: time(c.http_max_connection_duration),
                drain_timeout: time(c.http_drain_timeout),
                underscores: match c.http_headers_with_underscores_action {
                    UnderscoresAction::HeadersWithUnderscoresUnspecified if edge => Underscores::Reject,
                    UnderscoresAction::HeadersWithUnderscoresUnspecified
                    | UnderscoresAction::HeadersWithUnderscoresAllow => Underscores::Allow,
                    UnderscoresAction::HeadersWithUnderscoresRejectRequest => Underscores::Reject,
                    UnderscoresAction::HeadersWithUnderscoresDropHeader => Underscores::Drop,
                },
                max_concurrent_streams: number(c.http_max_concurrent_streams, 100),
                stream_window: number(c.http2_initial_stream_window_size, 64 << 10),
                connection_window: number(c.http2_initial_connection_window_size, 1 << 20),
            },
            idle_timeout: time(c.http_idle_timeout).or(seconds(3600)),
            request_headers_timeout: time(c.http_request_headers_timeout).or(seconds(60)),
            stream_idle_timeout: time(c.http_stream_idle_timeout).or(seconds(300)),
            max_stream_duration: time(c.http_max_stream_duration),
            merge_slashes: c.http_merge_slashes.or(edge.then_some(true)),
            escaped_slashes: match c.http_path_with_escaped_slashes_action {
                EscapedSlashesAction::PathWithEscapedSlashesUnspecified => {
                    edge.then_some(EscapedSlashes::UnescapeAndRedirect)
                }
                EscapedSlashesAction::KeepUnchanged => Some(EscapedSlashes::Keep),
                EscapedSlashesAction::RejectRequest => Some(EscapedSlashes::Reject),
                EscapedSlashesAction::UnescapeAndRedirect => Some(EscapedSlashes::UnescapeAndRedirect),
                EscapedSlashesAction::UnescapeAndForward => Some(EscapedSlashes::UnescapeAndForward),
            },
            listener_buffer: number(c.listener_per_connection_buffer_limit_bytes, 32 << 10),
            listener_connections: c
                .listener_connection_limit
                .and_then(|n| u32::try_from(n).ok())
                .filter(|n| *n > 0),
            // The profile leaves it alone, whatever its description says.
            cluster_buffer: c.cluster_per_connection_buffer_limit_bytes.and_then(|n| u32::try_from(n).ok()),
        }
    }
}
