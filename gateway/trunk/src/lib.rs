//! The QUIC trunk between east-west gateways.
//!
//! One QUIC connection per pair of gateway addresses carries every inner session as a stream of its
//! own, so a lost packet stalls one session, not all. A stream carries exactly what a TCP connection
//! to the peer's gateway would: the inner TLS session, whose ClientHello names the service. The
//! receiving gateway hands it to its own east-west listener, so both transports meet the same routes
//! and the same refusals.
//!
//! Invariants: the outer connection is mutual TLS under the mesh's trust bundle and leads to the
//! cluster that the inner name asks for; the trunk never holds a workload's key; when UDP does not
//! pass, TCP takes over within [`QUIC_PATIENCE`], when it stops passing within two seconds, and QUIC is
//! tried again later; the sessions of a gateway that died end within two seconds.
//!
//! Not here yet: relays, migration policy, datagrams.

pub mod congestion;
mod endpoint;
mod stream;
mod watch;

pub use endpoint::{Path, QUIC_PATIENCE, Trunk, TrunkError, TrunkMetrics, TrunkOptions};
pub use stream::TrunkStream;

/// ALPN of the outer connection.
pub const ALPN: &str = "flotilla-trunk/1";
