//! How a trunk is started, and why it could not be.

use std::{io, net::SocketAddr};

use tokio::sync::mpsc;

use crate::{TrunkFlow, TrunkStream, congestion::Congestion};

/// How a trunk is started.
#[derive(Debug, Clone)]
pub struct TrunkOptions {
    /// UDP address for peers.
    pub listen: SocketAddr,
    /// The gateway's own east-west listener, to which accepted sessions are handed.
    pub deliver_to: DeliverTo,
    /// Takes flows of datagrams, each with the address of the peer; without it there are none.
    pub deliver_flows: Option<mpsc::Sender<(TrunkFlow, SocketAddr)>>,
    /// Threads with a runtime and a socket each, on which connections live, 256 at most; with none they live on the
    /// runtime that the trunk is started on.
    pub workers: usize,
    /// Congestion control of every connection, in the direction from this gateway.
    pub congestion: Congestion,
}

/// How accepted sessions reach the listener.
#[derive(Debug, Clone)]
pub enum DeliverTo {
    /// Over a connection to it.
    Address(SocketAddr),
    /// As they are, each with the address of the peer, to whoever takes them from the other end of this.
    Channel(mpsc::Sender<(TrunkStream, SocketAddr)>),
}

/// Why it could not start.
#[derive(Debug, thiserror::Error)]
pub enum TrunkError {
    /// TLS settings.
    #[error(transparent)]
    Identity(#[from] mesh_identity::IdentityError),
    /// TLS settings that QUIC cannot use.
    #[error("QUIC cannot use the TLS configuration: {0}")]
    Tls(String),
    /// A thread or its runtime cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The address cannot be bound.
    #[error("trunk address {0}")]
    Bind(SocketAddr, #[source] io::Error),
}
