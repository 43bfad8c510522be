//! Endpoints on runtimes.

use std::{io, net::SocketAddr, sync::Arc};

use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, ServerConfig, crypto::rustls::QuicServerConfig};
use tokio::runtime::Handle;

use crate::{SocketStatus, port, socket, transport};

/// The endpoints of a runtime; with one runtime they are the same.
pub(crate) struct Ends {
    pub(crate) accepts: Endpoint,
    pub(crate) dials: Endpoint,
    pub(crate) runtime: Handle,
}

impl Ends {
    pub(crate) fn all(&self) -> [&Endpoint; 2] {
        [&self.accepts, &self.dials]
    }
}

/// An endpoint on a runtime; one that accepts names that runtime in its connection IDs.
fn on(
    runtime: &Handle,
    socket: Arc<dyn AsyncUdpSocket>,
    accepts: Option<(ServerConfig, u8)>,
) -> io::Result<Endpoint> {
    let mut config = EndpointConfig::default();
    // Above the least that is allowed.
    let _ = config.max_udp_payload_size(transport::LARGEST);
    let server = accepts.map(|(server, own)| {
        config.cid_generator(move || Box::new(port::Numbered(own)));
        server
    });
    let _there = runtime.enter();
    Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(port::On(runtime.clone())))
}

/// Binds the endpoints of all runtimes, those that accept at one address.
pub(crate) fn bind(
    listen: SocketAddr,
    runtimes: &[Handle],
    server: &Arc<QuicServerConfig>,
) -> io::Result<(Vec<Ends>, SocketStatus)> {
    let (sockets, status) = socket::bind(listen, runtimes.len())?;
    status.warn();
    let sockets = port::join(sockets, runtimes)?;
    let mut ends = Vec::with_capacity(sockets.len());
    for ((socket, runtime), own) in sockets.into_iter().zip(runtimes).zip(0..=u8::MAX) {
        let accepts = on(runtime, socket, Some((ServerConfig::with_crypto(server.clone()), own)))?;
        let dials = if runtimes.len() == 1 {
            accepts.clone()
        } else {
            // Of several sockets at one address the kernel chooses any for an answer, mostly another runtime's.
            let (sockets, _) = socket::bind(SocketAddr::new(listen.ip(), 0), 1)?;
            let socket = port::join(sockets, std::slice::from_ref(runtime))?.pop();
            on(runtime, socket.ok_or(io::ErrorKind::NotConnected)?, None)?
        };
        ends.push(Ends { accepts, dials, runtime: runtime.clone() });
    }
    Ok((ends, status))
}
