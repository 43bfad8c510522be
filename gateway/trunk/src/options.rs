//! How a trunk is started, and why it could not be.

use std::{collections::BTreeMap, fmt, io, net::SocketAddr, str::FromStr};

use mesh_model::ClusterId;
use tokio::sync::mpsc;

use crate::{Transport, TrunkFlow, TrunkStream, congestion::Congestion};

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
    pub congestion: PerPeer<Congestion>,
    /// What carries new sessions.
    pub transport: PerPeer<Transport>,
}

/// A setting that may differ for some peers: `VALUE`, or `VALUE,PEER=VALUE…`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PerPeer<T> {
    usual: T,
    peers: BTreeMap<ClusterId, T>,
}

impl<T: Copy> PerPeer<T> {
    /// The same for all.
    #[must_use]
    pub fn all(usual: T) -> Self {
        Self { usual, peers: BTreeMap::new() }
    }

    /// That of a peer; of one that is not known, the usual one.
    #[must_use]
    pub fn of(&self, peer: Option<&ClusterId>) -> T {
        peer.and_then(|p| self.peers.get(p)).copied().unwrap_or(self.usual)
    }
}

impl<T: fmt::Display> fmt::Display for PerPeer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.usual)?;
        self.peers.iter().try_for_each(|(peer, value)| write!(f, ",{peer}={value}"))
    }
}

impl<T: FromStr<Err = String> + Copy + Default> FromStr for PerPeer<T> {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut all = Self::default();
        for (n, item) in s.split(',').enumerate() {
            match item.split_once('=') {
                None if n == 0 => all.usual = item.parse()?,
                None => return Err(format!("{item:?} names no peer: write PEER={item}")),
                Some((peer, value)) => {
                    let peer = ClusterId::new(peer).map_err(|e| format!("peer {peer:?}: {e}"))?;
                    if all.peers.insert(peer.clone(), value.parse()?).is_some() {
                        return Err(format!("peer {peer} is named twice"));
                    }
                }
            }
        }
        Ok(all)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_differ_by_peer() {
        let id = |s: &str| ClusterId::new(s).unwrap();
        let t: PerPeer<Transport> = "quic,east=tcp,north=auto".parse().unwrap();
        assert_eq!(t.to_string(), "quic,east=tcp,north=auto");
        assert_eq!(
            [Some("east"), Some("north"), Some("south"), None].map(|c| t.of(c.map(id).as_ref())),
            [Transport::Tcp, Transport::Auto, Transport::Quic, Transport::Quic]
        );
        let t: PerPeer<Transport> = "east=tcp".parse().unwrap();
        assert_eq!((t.of(None), t.of(Some(&id("east")))), (Transport::Auto, Transport::Tcp));
        for (bad, says) in [
            ("", "unsupported transport"),
            ("udp", "unsupported transport"),
            ("auto,tcp", "write PEER=tcp"),
            ("auto,east=", "unsupported transport"),
            ("auto,UP=tcp", "peer \"UP\""),
            ("east=tcp,east=quic", "named twice"),
        ] {
            let e = bad.parse::<PerPeer<Transport>>().unwrap_err();
            assert!(e.contains(says), "{bad}: {e}");
        }
    }
}
