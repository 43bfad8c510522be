//! What an engine is told when it starts, and what others plug into it.

use std::{collections::BTreeMap, future::Future, io, net::IpAddr, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_model::proxy::NodeText;
use mesh_telemetry::{metrics::MeshMetrics, trace::SpanSink};
use tokio::sync::mpsc;

pub use crate::io::{BoxedIo, ByteStream};

/// The workload that this proxy belongs to, for metrics, logs and forwarded identities.
#[derive(Debug, Clone, Default)]
pub struct NodeInfo {
    /// Workload name, such as `reviews-v1`.
    pub workload: String,
    /// Namespace.
    pub namespace: String,
    /// Cluster ID.
    pub cluster: String,
    /// Service account.
    pub service_account: String,
    /// SPIFFE ID, empty without one.
    pub principal: String,
    /// Labels of the workload.
    pub labels: BTreeMap<String, String>,
    /// Node ID, for logs.
    pub id: String,
    /// A gateway rather than a sidecar: it reports like a source.
    pub gateway: bool,
}

impl NodeInfo {
    /// What it says of itself; what it does not know is `unknown`, in Istio's words.
    pub(crate) fn text(&self, of: NodeText) -> &str {
        let label = |name: &str| self.labels.get(name).map_or("", String::as_str);
        let (text, otherwise) = match of {
            NodeText::CanonicalService => (label("service.istio.io/canonical-name"), "unknown"),
            NodeText::CanonicalRevision => (label("service.istio.io/canonical-revision"), "latest"),
            NodeText::Namespace => (self.namespace.as_str(), "default"),
            NodeText::Cluster => (self.cluster.as_str(), "unknown"),
            NodeText::Mesh => {
                let id = self.principal.strip_prefix("spiffe://").unwrap_or_default();
                (id.split('/').next().unwrap_or_default(), "unknown")
            }
        };
        if text.is_empty() { otherwise } else { text }
    }
}

/// Options of an [`crate::Engine`].
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Worker threads, each with its own runtime, listeners and pools; at least 1.
    pub workers: usize,
    /// Whom the engine serves.
    pub node: NodeInfo,
    /// How long connections on removed listeners and filter chains may finish.
    pub drain_time: Duration,
    /// Downstream connections per worker; further ones wait in the kernel's backlog.
    pub max_connections: usize,
    /// Downstream connections of all workers together; further ones are closed as soon as they are accepted.
    pub max_total_connections: Option<usize>,
    /// Requests in flight per worker; further ones are refused (503, flag `OM`).
    pub max_requests: usize,
    /// UDP sessions per worker, each of which has a socket; datagrams that would need a further one are dropped and
    /// counted (`flotilla_udp_dropped_total`, kind `session_limit`).
    pub max_udp_sessions: usize,
    /// Bulk between two connections without TLS moves through pipes in the kernel (`splice(2)`), not through memory.
    pub splice: bool,
    /// How far behind a worker may be: beyond this, new connections wait in the kernel's backlog; HTTP/2
    /// streams that waited longer are refused (503, flag `OM`), and beyond sixteen times of it every request. Zero
    /// measures nothing.
    pub max_lag: Duration,
    /// Resident memory of the process, in bytes, beyond which new connections wait and requests are refused; zero
    /// does not look.
    pub max_memory: u64,
    /// Bytes that one stream of HTTP/2 or HTTP/3 may have buffered in each direction; a connection has sixteen times
    /// of it for all of its streams. HTTP/1 and TCP hold 64 KiB at most.
    pub buffer_limit: u32,
    /// Concurrent streams that a downstream may open with HTTP/2 or HTTP/3.
    pub max_concurrent_streams: u32,
    /// TLS or QUIC handshake of a downstream connection.
    pub handshake_timeout: Duration,
    /// Bytes of a request body kept for a retry.
    pub retry_buffer: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            workers: 1,
            node: NodeInfo::default(),
            drain_time: Duration::from_secs(5),
            max_connections: 16_384,
            max_total_connections: None,
            max_requests: 16_384,
            max_udp_sessions: 8192,
            splice: true,
            max_lag: Duration::from_millis(250),
            max_memory: 0,
            buffer_limit: 256 * 1024,
            max_concurrent_streams: 1024,
            handshake_timeout: Duration::from_secs(10),
            retry_buffer: 64 * 1024,
        }
    }
}

/// What others plug into the engine; every part is optional and costs nothing when absent.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Policy check of requests, and a report of each at its end.
    pub policy: Option<Arc<dyn PolicyHook>>,
    /// Connects to addresses of the form `trunk:<name>`.
    pub dialer: Option<Arc<dyn Dialer>>,
    /// Mesh metrics to use instead of registering a set of its own.
    pub metrics: Option<MeshMetrics>,
    /// Takes the spans of sampled requests.
    pub spans: Option<SpanSink>,
    /// Fetches clusters and virtual hosts that traffic needs and the configuration lacks.
    pub on_demand: Option<Arc<dyn OnDemand>>,
}

/// A future of a hook; it runs on the worker that serves the request.
pub type HookFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Connects through something that is not TCP.
pub trait Dialer: Send + Sync + 'static {
    /// Opens a stream to `addr` (with its `trunk:` prefix) for `sni`.
    fn dial<'a>(&'a self, addr: &'a str, port: u16, sni: &'a str) -> HookFuture<'a, io::Result<BoxedIo>>;

    /// Opens a flow of datagrams there.
    fn dial_flow<'a>(&'a self, addr: &'a str, _port: u16) -> HookFuture<'a, io::Result<DatagramFlow>> {
        Box::pin(async move {
            Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("{addr}: datagrams are not carried there"),
            ))
        })
    }
}

/// Datagrams to and from one place, each of which may be lost.
pub struct DatagramFlow {
    /// The way there; when it is dropped the flow has ended.
    pub to: Arc<dyn FlowSender>,
    /// What comes from there. Bounded: what does not fit is lost.
    pub from: mpsc::Receiver<Bytes>,
}

/// Sends datagrams.
pub trait FlowSender: Send + Sync + 'static {
    /// Sends one, now or never.
    ///
    /// # Errors
    /// [`FlowError`].
    fn send(&self, datagram: &[u8]) -> Result<(), FlowError>;
}

/// Why a datagram was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// It is longer than the path carries.
    #[error("the datagram is longer than the path carries")]
    TooLarge,
    /// Others had to be given up for it, since the path is slower than what is sent.
    #[error("more waits than may wait")]
    Full,
    /// The flow has ended.
    #[error("the flow has ended")]
    Ended,
}

/// What traffic needs and the configuration does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// A cluster by its name.
    Cluster(&'a str),
    /// A virtual host of a route configuration that has them on demand.
    VirtualHost {
        /// Name of the route configuration.
        routes: &'a str,
        /// `:authority` in lower case, with its port if it has one.
        host: &'a str,
    },
}

/// Answer of [`OnDemand`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// It is in force, or there is none.
    Known,
    /// Nobody was asked: too many names are in use.
    Refused,
}

/// Fetches what traffic needs. Names come from outside: whoever implements this bounds how many there are.
pub trait OnDemand: Send + Sync + 'static {
    /// Asks for something; ready when that is settled and applied, which may be never. Dropping the future ends the
    /// wait, not what was asked. `in_use` tells whether traffic has used something since it was last asked about it,
    /// so that names can be given up.
    fn want<'a>(
        &'a self,
        what: Wanted<'a>,
        in_use: &'a dyn Fn(Wanted<'_>) -> bool,
    ) -> HookFuture<'a, Settled>;
}

/// Policy and telemetry outside of the proxy.
pub trait PolicyHook: Send + Sync + 'static {
    /// Decides on a request before it is forwarded: inbound of a sidecar, and at gateways. The hook bounds its own
    /// time and decides what to answer when it cannot decide.
    fn check<'a>(&'a self, request: &'a RequestAttributes<'a>) -> HookFuture<'a, PolicyDecision>;
    /// Takes note of a finished request; it must not block.
    fn report(&self, record: &RequestRecord<'_>);
    /// Whether it decides on anything now; asked for each request, before what a request is like is put together for it.
    fn checks(&self) -> bool {
        true
    }
    /// Whether it takes note of anything now.
    fn reports(&self) -> bool {
        true
    }
}

/// Answer of a [`PolicyHook`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyDecision {
    /// Forward.
    Allow,
    /// Answer instead.
    Deny {
        /// HTTP status.
        status: u16,
        /// Body.
        body: String,
        /// gRPC status for gRPC requests; `None` is derived from `status`.
        grpc: Option<u32>,
    },
}

/// Looks up headers without exposing how they are stored.
pub trait HeaderLookup {
    /// First value of a header, in any case.
    fn get(&self, name: &str) -> Option<&[u8]>;
    /// Visits all headers in order.
    fn for_each(&self, visit: &mut dyn FnMut(&[u8], &[u8]));
}

impl HeaderLookup for crate::http::headers::Headers {
    fn get(&self, name: &str) -> Option<&[u8]> {
        self.get(name.as_bytes())
    }
    fn for_each(&self, visit: &mut dyn FnMut(&[u8], &[u8])) {
        for (_, n, v) in self.iter() {
            visit(n, v);
        }
    }
}

/// A request as a policy sees it.
pub struct RequestAttributes<'a> {
    /// Method.
    pub method: &'a str,
    /// Path and query, normalised as routing saw it.
    pub path: &'a str,
    /// Host or authority.
    pub authority: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// Headers.
    pub headers: &'a dyn HeaderLookup,
    /// SPIFFE ID of the peer, empty without mutual TLS.
    pub source_principal: &'a str,
    /// Cluster that vouches for the peer, empty without mutual TLS.
    pub source_cluster: &'a str,
    /// Peer address of the connection.
    pub source_ip: IpAddr,
    /// Peer port of the connection.
    pub source_port: u16,
    /// Local address of the connection.
    pub destination_ip: IpAddr,
    /// Local port of the connection.
    pub destination_port: u16,
    /// Host of the destination service, as in metrics.
    pub destination_service: &'a str,
    /// Whether the request came from outside of this workload.
    pub inbound: bool,
    /// Whether mutual TLS carried it.
    pub mtls: bool,
    /// `http` or `grpc`.
    pub protocol: &'a str,
}

/// A finished request or TCP connection.
pub struct RequestRecord<'a> {
    /// The request; `None` for a TCP connection.
    pub request: Option<&'a RequestAttributes<'a>>,
    /// Response headers, if there was a response.
    pub response_headers: Option<&'a dyn HeaderLookup>,
    /// HTTP status; 0 without an answer and for TCP.
    pub status: u16,
    /// gRPC status of a gRPC response.
    pub grpc_status: Option<u32>,
    /// Envoy's response flags, `-` if none.
    pub flags: &'a str,
    /// Start to end.
    pub duration: Duration,
    /// Body bytes from the client.
    pub request_bytes: u64,
    /// Body bytes to the client.
    pub response_bytes: u64,
    /// Upstream address, empty without one.
    pub upstream: &'a str,
    /// Source principal.
    pub source_principal: &'a str,
    /// Source address.
    pub source_ip: IpAddr,
    /// Destination service.
    pub destination_service: &'a str,
    /// Whether it came from outside of this workload.
    pub inbound: bool,
}
