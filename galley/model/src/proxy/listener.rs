//! Listeners: where connections are taken and what is done with them first.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    AccessLog, Compressor, ConnectionAuthz, ConnectionLimit, ExtAuthz, ExtProc, GlobalRateLimit, JwtAuthn,
    LocalRateLimit, NameCache, OnDemandCluster, Rbac, RouteConfiguration, StatefulSession, StringMatch,
    Tracing, UdpProxy, WeightedCluster,
};

/// `HttpConnectionManager.PathWithEscapedSlashesAction`: `%2F` and `%5C` in a path, of which servers make different things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum EscapedSlashes {
    /// They stay as they are.
    #[default]
    Keep,
    /// The request is answered with 400.
    Reject,
    /// The client is sent to the path with slashes in their place (307).
    UnescapeAndRedirect,
    /// They are slashes from here on.
    UnescapeAndForward,
}

/// `envoy.config.listener.v3.Listener`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// Unique name.
    pub name: String,
    /// Address to bind; with `bind_to_port: false` only a key for original destinations.
    pub address: SocketAddr,
    /// False: connections arrive only from a listener with `use_original_dst`.
    pub bind_to_port: bool,
    /// Recover where a redirected connection was going, and hand it to the listener that matches
    /// (exact address, then the wildcard address with that port), else keep it. An inbound listener
    /// always keeps it: the same port may be the key of a listener for outbound traffic.
    pub use_original_dst: bool,
    /// Bind with `IP_TRANSPARENT` (TPROXY).
    pub transparent: bool,
    /// Which side of the workload.
    pub direction: Direction,
    /// Peek for a TLS ClientHello (SNI, ALPN) before choosing a chain.
    pub inspect_tls: bool,
    /// Peek for HTTP/1 or HTTP/2 before choosing a chain.
    pub inspect_http: bool,
    /// Expect a PROXY protocol header (v1 or v2).
    pub proxy_protocol: bool,
    /// How long inspection may wait for bytes; then the connection is matched with what is known.
    pub inspect_timeout: Duration,
    /// Chains, chosen by the most specific match.
    pub filter_chains: Vec<FilterChain>,
    /// Used when none matches; without it the connection is closed.
    pub default_filter_chain: Option<FilterChain>,
    /// Log of connections that no chain took.
    pub access_log: Vec<AccessLog>,
    /// Takes datagrams instead of connections; the listener then has no filter chains.
    pub udp: Option<Box<UdpProxy>>,
    /// The address is one of UDP and connections are QUIC; every chain has TLS and ends in an HTTP connection manager
    /// with [`HttpCodec::Http3`], or every one in a [`NetworkFilter::Udp`], which serves datagrams of these connections.
    pub quic: Option<QuicOptions>,
    /// The address is one of UDP and datagrams are of QUIC connections that somebody else ends: the ClientHello of each
    /// chooses a chain, which has a [`NetworkFilter::Udp`] and no TLS, and all datagrams of the connection go to one host.
    pub inspect_quic: bool,
    /// Bytes that may be buffered for a connection in each direction; `None` is the proxy's own choice, which is not exceeded
    /// by our own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buffer_limit: Option<u32>,
    /// Connections at a time; those beyond are closed as soon as it is known that they are this listener's. At Envoy, whose
    /// filter for it counts for itself (`envoy.extensions.filters.network.connection_limit.v3`), each chain has the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// Whom the proxy asks about requests and tells of them; for the whole proxy, by whichever listener says it. Ours alone
    /// looks at it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixer: Option<Box<Mixer>>,
}

/// Mixer of release 1.0, as the mesh's settings have it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Mixer {
    /// `host:port` that is asked about requests that enter; empty is nobody.
    pub check: String,
    /// `host:port` that is told of requests and connections; empty is nobody.
    pub report: String,
    /// Requests pass when nobody answers.
    pub fail_open: bool,
}

impl Listener {
    /// Whether its address is one of UDP.
    #[must_use]
    pub fn is_udp(&self) -> bool {
        self.udp.is_some() || self.quic.is_some() || self.inspect_quic
    }
}

/// `envoy.config.listener.v3.QuicProtocolOptions`: QUIC (RFC 9000) of a listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuicOptions {
    /// Requests that a client may have open at once; `None` is 100. What the proxy allows anyway is not exceeded.
    pub max_concurrent_streams: Option<u32>,
    /// Bytes that a client may send ahead of their being read, on one stream; `None` is what the proxy allows, which
    /// is not exceeded.
    pub stream_window: Option<u32>,
    /// The same for a whole connection.
    pub connection_window: Option<u32>,
    /// A connection ends without a packet for this long (RFC 9000 section 10.1).
    pub idle_timeout: Duration,
    /// Time for a handshake; the proxy's own limit holds as well.
    pub handshake_timeout: Duration,
}

impl Default for QuicOptions {
    /// Envoy's defaults.
    fn default() -> Self {
        Self {
            max_concurrent_streams: None,
            stream_window: None,
            connection_window: None,
            idle_timeout: Duration::from_secs(300),
            handshake_timeout: Duration::from_secs(20),
        }
    }
}

/// `envoy.config.core.v3.TrafficDirection`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Direction {
    /// Not a sidecar, such as a gateway.
    #[default]
    Unspecified,
    /// Towards the workload.
    Inbound,
    /// From the workload.
    Outbound,
}

/// `envoy.config.listener.v3.FilterChain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterChain {
    /// Name, for logs and updates.
    pub name: String,
    /// When it applies.
    pub matches: FilterChainMatch,
    /// TLS termination.
    pub tls: Option<DownstreamTls>,
    /// Filters; the last one is terminal ([`NetworkFilter::Http`], [`NetworkFilter::Tcp`] or [`NetworkFilter::Udp`]).
    pub filters: Vec<NetworkFilter>,
}

/// `envoy.config.listener.v3.FilterChainMatch`; empty criteria match everything. Envoy's order:
/// destination port, destination prefix (longest), server name (exact, then longest wildcard
/// suffix), transport protocol, application protocols, source prefix.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FilterChainMatch {
    /// Original destination port.
    pub destination_port: Option<u16>,
    /// Original destination address.
    pub destination_prefixes: Vec<IpNet>,
    /// SNI: exact, or `*.suffix`.
    pub server_names: Vec<String>,
    /// `tls` or `raw_buffer`, as detected.
    pub transport_protocol: Option<TransportProtocol>,
    /// ALPN of the ClientHello, or `http/1.1` / `h2c` as detected by the HTTP inspector.
    pub application_protocols: Vec<String>,
    /// Source address.
    pub source_prefixes: Vec<IpNet>,
}

/// Detected transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TransportProtocol {
    /// A TLS ClientHello was seen.
    Tls,
    /// Anything else.
    RawBuffer,
}

/// ALPN of a session that carries connections as CONNECT streams. A TCP chain that offers it serves each stream as if
/// it were a connection of its own, after the same checks; a client that offers it beside another protocol gets the
/// one if the server knows it and the other if not.
pub const TUNNEL_ALPN: &str = "flotilla-tunnel";

/// `envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownstreamTls {
    /// Certificate and key.
    pub certificate: SecretRef,
    /// Whether a client certificate is asked for.
    pub client_certificate: ClientCertificate,
    /// ALPN, preferred first.
    pub alpn: Vec<String>,
    /// Lowest version accepted.
    pub min_version: TlsVersion,
    /// What few servers say.
    pub options: TlsServerOptions,
}

/// Cipher suites of TLS 1.2 that Envoy has, by OpenSSL's names. The engine has the first six, which alone have forward
/// secrecy and authenticate what they encrypt.
pub const TLS_CIPHERS: [&str; 15] = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES256-SHA",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "DES-CBC3-SHA",
];

/// Groups of the key exchange that Envoy has, by BoringSSL's names. The engine has the first four.
pub const TLS_CURVES: [&str; 7] =
    ["X25519MLKEM768", "X25519", "P-256", "P-384", "P-521", "P-224", "X25519Kyber768Draft00"];

/// Whether an entry of a list of cipher suites is a suite, or may be something else that such lists can hold.
#[must_use]
pub fn is_cipher_expression(entry: &str) -> bool {
    entry == "ALL" || !entry.starts_with(|c: char| c.is_alphanumeric()) || TLS_CIPHERS.contains(&entry)
}

/// What a server may say of its sessions besides: `TlsParameters`, and `tls_certificates` after the first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsServerOptions {
    /// Further certificates. A client gets one that is for the name it asks for and whose key it can verify, one of an
    /// ECDSA key rather than another.
    pub certificates: Vec<SecretRef>,
    /// Highest version accepted; `None` is 1.3.
    pub max_version: Option<TlsVersion>,
    /// Cipher suites of TLS 1.2, preferred first, as in OpenSSL's lists; those that the engine does not have are passed
    /// over. Empty is all that it has.
    pub ciphers: Vec<String>,
    /// Groups of the key exchange by BoringSSL's names, preferred first; likewise.
    pub curves: Vec<String>,
    /// A client's certificate has to be one of these, besides what else is asked of it; empty is any.
    pub pins: Vec<CertificatePin>,
}

/// What is known beforehand of a certificate: a SHA-256 (`verify_certificate_hash`, `verify_certificate_spki`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CertificatePin {
    /// Of all of it, in DER.
    Whole([u8; 32]),
    /// Of its public key, the `SubjectPublicKeyInfo` in DER.
    PublicKey([u8; 32]),
}

impl CertificatePin {
    /// From the hash of a certificate as OpenSSL prints it: 64 hexadecimal digits, with colons between the pairs or
    /// without.
    #[must_use]
    pub fn whole(hex: &str) -> Option<Self> {
        let digits: Vec<u8> = match hex.len() {
            64 => hex.bytes().collect(),
            95 if hex.split(':').all(|pair| pair.len() == 2) => hex.bytes().filter(|b| *b != b':').collect(),
            _ => return None,
        };
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self::Whole(out))
    }
}

/// Client authentication of a TLS server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientCertificate {
    /// Not asked for.
    None,
    /// Asked for; verified if given.
    Optional(Validation),
    /// Handshake fails without one.
    Required(Validation),
}

/// TLS protocol version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TlsVersion {
    /// TLS 1.2.
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// Where a secret comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SecretRef {
    /// SDS by name. `default` is the workload's SVID, `ROOTCA` the trust bundle,
    /// `kubernetes://<name>` a gateway credential.
    Sds(String),
    /// PEM files read at start and on change.
    Files {
        /// Certificate chain (or CA bundle when used for validation).
        chain: String,
        /// Private key; empty when used for validation.
        key: String,
    },
}

/// Verification of a peer's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Validation {
    /// Trusted roots; `None` skips verification (only where a user asked for that).
    pub trusted: Option<SecretRef>,
    /// Any of these must match a URI or DNS SAN; empty accepts any.
    pub sans: Vec<StringMatch>,
    /// Revocation lists, a PEM file: one of each issuer in the peer's chain, or it is refused. Of a named secret they are
    /// part.
    #[serde(default)]
    pub crl: Option<String>,
}

/// `envoy.config.listener.v3.Filter`, those the engine has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkFilter {
    /// `envoy.filters.network.rbac`: closes the connection when denied.
    Rbac(Rbac),
    /// `envoy.filters.network.ext_authz`: closes the connection when somebody else says no.
    Authz(ConnectionAuthz),
    /// `envoy.filters.network.local_ratelimit`: closes connections beyond a rate.
    Limit(ConnectionLimit),
    /// `envoy.filters.network.sni_cluster`: the SNI names the cluster of the following TCP proxy.
    SniCluster,
    /// `envoy.filters.network.tcp_proxy`.
    Tcp(TcpProxy),
    /// `envoy.filters.network.http_connection_manager`.
    Http(Box<HttpConnectionManager>),
    /// `udp_proxy` at the end of a chain, which Envoy has as a listener filter only: of connections of QUIC, whose
    /// datagrams it takes ([`Listener::quic`]), or which it passes on as they are ([`Listener::inspect_quic`]).
    Udp(Box<UdpProxy>),
}

/// `envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpProxy {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// Destinations by weight, at least one.
    pub clusters: Vec<WeightedCluster>,
    /// Closes when no byte passed for this long; `None` never.
    pub idle_timeout: Option<Duration>,
    /// Closes at this age, whatever passes.
    pub max_duration: Option<Duration>,
    /// Log of connections.
    pub access_log: Vec<AccessLog>,
    /// Each connection goes through a proxy, which its destination is; `None` leads to the destination itself.
    pub tunnel: Option<Tunneling>,
    /// A destination that does not exist is asked for.
    pub on_demand: Option<OnDemandCluster>,
    /// The SNI names the host, of a cluster whose hosts are found by name; the port is theirs
    /// (`envoy.filters.network.sni_dynamic_forward_proxy` before the proxy).
    pub names: Option<(NameCache, u16)>,
}

/// `TcpProxy.TunnelingConfig`: a stream on a shared connection where the cluster speaks HTTP/2, and a connection of its
/// own otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tunneling {
    /// Authority of the request: where the proxy is to connect to.
    pub hostname: String,
    /// Headers of the request.
    pub headers: Vec<(String, String)>,
    /// It is a POST to `/`, whose body and answer carry the bytes, instead of CONNECT.
    pub post: bool,
}

/// `envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpConnectionManager {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// Codec of the downstream connection.
    pub codec: HttpCodec,
    /// Routes.
    pub routes: RouteSource,
    /// HTTP filters in order; the router is implied at the end.
    pub filters: Vec<HttpFilter>,
    /// The connection's peer is the client: append it to `x-forwarded-for`.
    pub use_remote_address: bool,
    /// Trusted proxies in front, for `x-forwarded-for`.
    pub trusted_hops: u32,
    /// What happens to `x-forwarded-client-cert`.
    pub forward_client_cert: ForwardClientCert,
    /// Whether `Upgrade: websocket` (and its HTTP/2 form) is accepted.
    pub websocket: bool,
    /// Whether plain CONNECT is accepted.
    pub connect: bool,
    /// Value of the `server` response header; empty leaves the upstream's.
    pub server_name: String,
    /// Resolve dot segments before routing (RFC 3986 section 6.2.2.3).
    pub normalize_path: bool,
    /// Collapse `//` before routing.
    pub merge_slashes: bool,
    /// What becomes of a path with an escaped slash or backslash.
    pub escaped_slashes: EscapedSlashes,
    /// Log of requests.
    pub access_log: Vec<AccessLog>,
    /// Tracing; `None` only forwards headers.
    pub tracing: Option<Box<Tracing>>,
    /// Time without a stream after which the connection is drained; `None` never.
    pub idle_timeout: Option<Duration>,
    /// Time in which the request head must arrive; `None` never.
    pub request_headers_timeout: Option<Duration>,
    /// Time without activity on a stream; `None` never.
    pub stream_idle_timeout: Option<Duration>,
    /// Longest stream, unless its route says otherwise; `None` is no limit.
    pub max_stream_duration: Option<Duration>,
    /// Serve HTTP/1.0; otherwise it is answered with 426.
    pub accept_http_10: bool,
    /// Keep `x-request-id` of the client if there is one.
    pub preserve_request_id: bool,
    /// Headers that proxies add.
    pub headers: AddedHeaders,
    /// Limits of its connections and requests.
    pub limits: HttpLimits,
}

/// What a proxy adds to requests and answers, besides what it always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AddedHeaders {
    /// `x-request-id` where there is none.
    pub request_id: bool,
    /// `x-forwarded-port`, the port that the client has connected to.
    pub forwarded_port: bool,
    /// No `x-envoy-*` of the router's own: time of the upstream, expected timeout, original path, overload.
    pub suppress_envoy: bool,
    /// What `x-forwarded-client-cert` tells of a client's certificate, besides its hash.
    pub client_cert: ClientCertParts,
    /// Names of HTTP/1 headers keep their case. Our own proxies always do so.
    pub preserve_case: bool,
}

impl Default for AddedHeaders {
    fn default() -> Self {
        Self {
            request_id: true,
            forwarded_port: false,
            suppress_envoy: false,
            client_cert: ClientCertParts::default(),
            preserve_case: false,
        }
    }
}

/// `HttpConnectionManager.SetCurrentClientCertDetails`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClientCertParts {
    /// Its subject.
    pub subject: bool,
    /// Its names of type URI.
    pub uri: bool,
    /// Its names of type DNS.
    pub dns: bool,
    /// Itself, as PEM.
    pub cert: bool,
    /// Itself and what came with it, as PEM.
    pub chain: bool,
}

impl ClientCertParts {
    /// Nothing.
    pub const NONE: Self = Self { subject: false, uri: false, dns: false, cert: false, chain: false };
}

impl Default for ClientCertParts {
    fn default() -> Self {
        Self { subject: true, uri: true, dns: true, cert: false, chain: false }
    }
}

/// Limits of HTTP connections and of requests on them; `None` is the proxy's own choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct HttpLimits {
    /// Time in which all of a request must arrive; then it is answered with 408.
    pub request_timeout: Option<Duration>,
    /// Age at which a connection is drained.
    pub max_connection_duration: Option<Duration>,
    /// Between the first and the last GOAWAY of HTTP/2. Our own proxies need none: they ask the client whether it has
    /// seen the first.
    pub drain_timeout: Option<Duration>,
    /// What becomes of requests with `_` in a header's name.
    pub underscores: Underscores,
    /// Streams of HTTP/2 that a client may open.
    pub max_concurrent_streams: Option<u32>,
    /// Bytes that a client may send before they are taken, of one stream of HTTP/2.
    pub stream_window: Option<u32>,
    /// The same of all streams of a connection.
    pub connection_window: Option<u32>,
}

/// `HttpProtocolOptions.HeadersWithUnderscoresAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub enum Underscores {
    /// They pass.
    #[default]
    Allow,
    /// The request is answered with 400.
    Reject,
    /// The header is left out.
    Drop,
}

/// Codec of a downstream HTTP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HttpCodec {
    /// By ALPN, else by the first bytes.
    Auto,
    /// HTTP/1.x.
    Http1,
    /// HTTP/2.
    Http2,
    /// HTTP/3, which only QUIC listeners have, and nothing else.
    Http3,
}

/// Where an HTTP connection manager's routes come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouteSource {
    /// RDS by name.
    Rds(String),
    /// In the listener.
    Inline(Arc<RouteConfiguration>),
}

/// `HttpConnectionManager.ForwardClientCertDetails`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ForwardClientCert {
    /// Remove it.
    Sanitize,
    /// Forward what came over mTLS.
    ForwardOnly,
    /// Append this hop's client.
    AppendForward,
    /// Replace it by this hop's client.
    SanitizeSet,
    /// Forward what came, with or without a certificate.
    AlwaysForwardOnly,
}

impl ForwardClientCert {
    /// Whether something is told of this hop's client.
    #[must_use]
    pub fn tells(self) -> bool {
        matches!(self, Self::AppendForward | Self::SanitizeSet)
    }
}

/// HTTP filters before the router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HttpFilter {
    /// `envoy.filters.http.rbac`: 403 `RBAC: access denied`.
    Rbac(Rbac),
    /// `envoy.filters.http.cors`; the policy is on the route.
    Cors,
    /// `envoy.filters.http.fault`; the fault is on the route.
    Fault,
    /// `envoy.filters.http.grpc_stats`.
    GrpcStats,
    /// `envoy.filters.http.jwt_authn`: 401, or 403 for a token for somebody else.
    Jwt(Arc<JwtAuthn>),
    /// `envoy.filters.http.ext_authz`: somebody else decides.
    ExtAuthz(Arc<ExtAuthz>),
    /// `envoy.filters.http.ext_proc`: somebody else changes requests and answers.
    ExtProc(Arc<ExtProc>),
    /// `envoy.filters.http.local_ratelimit`: 429 beyond a rate.
    LocalRateLimit(Arc<LocalRateLimit>),
    /// `envoy.filters.http.ratelimit`: 429 beyond what a service allows.
    RateLimit(Arc<GlobalRateLimit>),
    /// `envoy.filters.http.grpc_web`.
    GrpcWeb,
    /// `envoy.filters.http.compressor`, for answers.
    Compressor(Arc<Compressor>),
    /// `envoy.filters.http.buffer`: forwards a request when all of it is there; 413 beyond so many bytes.
    Buffer(u32),
    /// `envoy.filters.http.stateful_session`.
    StatefulSession(Arc<StatefulSession>),
    /// `envoy.filters.http.dynamic_forward_proxy`: resolves for clusters whose hosts are found by name. Ours does so where
    /// it picks a host, and needs no filter.
    Names(NameCache),
    /// `envoy.filters.http.on_demand`: asks for virtual hosts where the routes say so, and for clusters that do not
    /// exist if this says so.
    OnDemand(Option<OnDemandCluster>),
}

impl HttpFilter {
    /// Whether it looks at the bodies of requests, or changes answers.
    #[must_use]
    pub fn reads_bodies(&self) -> bool {
        match self {
            Self::ExtAuthz(e) => e.with_request_body.is_some(),
            Self::ExtProc(_) | Self::GrpcWeb | Self::Compressor(_) | Self::Buffer(_) => true,
            _ => false,
        }
    }
}
