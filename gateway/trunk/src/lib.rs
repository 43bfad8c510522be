//! The QUIC trunk between east-west gateways.
//!
//! One QUIC connection per pair of gateway addresses carries every inner session as a stream of its
//! own, so a lost packet stalls one session, not all. A stream carries exactly what a TCP connection
//! to the peer's gateway would: the inner TLS session, whose ClientHello names the service. The
//! receiving gateway hands it to its own east-west listener, so both transports meet the same routes
//! and the same refusals.
//!
//! Where a path is measured to be short and to lose nothing, TCP carries new sessions instead ([`Transport`]); the
//! connection stays up beside it.
//!
//! Invariants: the outer connection is mutual TLS under the mesh's trust bundle and leads to the
//! cluster that the inner name asks for; the trunk never holds a workload's key; when UDP does not
//! pass, TCP takes over within [`QUIC_PATIENCE`], when it stops passing within two seconds, and QUIC is
//! tried again later; the sessions of a gateway that died end within two seconds.
//!
//! Sessions go both ways on a connection, whoever dialled it: a cluster that nobody can dial keeps connections up
//! and is reached on them. A gateway that ends says so first, and new sessions go to another.
//!
//! Datagrams of UDP services are DATAGRAM frames on the same connections ([`TrunkFlow`]); over TCP there are none.

mod choice;
pub mod congestion;
mod dial;
mod endpoint;
mod ends;
mod flows;
mod links;
mod metrics;
mod options;
mod port;
mod serve;
mod socket;
mod stream;
mod transport;
mod watch;
mod workers;

pub use choice::Transport;
pub use dial::{Path, QUIC_PATIENCE};
pub use endpoint::{PeerGateway, Peers, Trunk};
pub use flows::{FlowError, FlowSender, TrunkFlow};
pub use links::{Carrier, LinkStatus, Opener};
pub use metrics::TrunkMetrics;
pub use options::{DeliverTo, PerPeer, TrunkError, TrunkOptions};
pub use socket::SocketStatus;
pub use stream::TrunkStream;

/// ALPN of the outer connection on which only the dialling side opens sessions.
pub const ALPN: &str = "flotilla-trunk/1";
/// The same, with sessions in both directions and notices.
pub const ALPN_BOTH_WAYS: &str = "flotilla-trunk/2";
/// The same, with flows of datagrams.
pub const ALPN_DATAGRAMS: &str = "flotilla-trunk/3";
