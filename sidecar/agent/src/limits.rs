//! Limits of a proxy under overload.

use std::time::Duration;

use clap::Args;
use mesh_proxy::EngineOptions;
use mesh_xds::client::proxy::on_demand::DEFAULT_LIMIT;

/// `--max-connections` unless given.
pub(crate) const MAX_CONNECTIONS: usize = 16_384;

/// What a proxy takes on at most; the defaults suit a sidecar.
#[derive(Debug, Clone, Args)]
pub struct LimitArgs {
    /// Connections of clients per worker; further ones wait in the kernel's queue [default: 16384; if not given, the mesh's
    /// `globalDownstreamConnectionLimit` is the limit of all workers together, beyond which connections are closed]
    #[arg(long)]
    pub max_connections: Option<usize>,
    /// Requests in flight per worker; further ones are answered 503 (flag OM).
    #[arg(long, default_value_t = 16_384)]
    pub max_requests: usize,
    /// UDP sessions per worker, each with a socket of its own; datagrams of further ones are dropped.
    #[arg(long, default_value_t = 8192)]
    pub max_udp_sessions: usize,
    /// Streams that a client may have open on one HTTP/2 or HTTP/3 connection.
    #[arg(long, default_value_t = 1024)]
    pub max_streams: u32,
    /// How far behind a worker may be, milliseconds: beyond it new connections wait, and streams of HTTP/2
    /// and HTTP/3 that waited longer are answered 503 (flag OM); 0 measures nothing.
    #[arg(long, default_value_t = 250)]
    pub max_lag_ms: u64,
    /// Resident memory, MiB, beyond which connections wait and requests are answered 503 (flag OM); 0 is no limit.
    #[arg(long, default_value_t = 0)]
    pub max_memory: u64,
    /// Bytes that one HTTP/2 or HTTP/3 stream may have buffered in each direction.
    #[arg(long, default_value_t = 256 * 1024)]
    pub buffer_limit: u32,
    /// Names of clusters and virtual hosts that traffic may make the proxy ask for (ODCDS, VHDS); beyond it, names
    /// that no traffic uses are given up.
    #[arg(long, default_value_t = DEFAULT_LIMIT)]
    pub max_on_demand: usize,
}

impl LimitArgs {
    /// Engine options with these limits.
    #[must_use]
    pub fn options(&self) -> EngineOptions {
        EngineOptions {
            max_connections: self.max_connections.unwrap_or(MAX_CONNECTIONS),
            max_requests: self.max_requests,
            max_udp_sessions: self.max_udp_sessions,
            max_concurrent_streams: self.max_streams,
            max_lag: Duration::from_millis(self.max_lag_ms),
            max_memory: self.max_memory << 20,
            buffer_limit: self.buffer_limit,
            ..EngineOptions::default()
        }
    }
}
