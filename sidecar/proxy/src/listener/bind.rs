//! Listening sockets: one for each worker, so that the kernel spreads connections.

use std::{io, net::SocketAddr, sync::Arc};

use mesh_model::proxy as model;
use socket2::{Domain, Protocol, Socket, Type};

use crate::config::listener::ListenerSlot;

const BACKLOG: i32 = 4096;

/// A socket on its way to a worker.
pub(crate) struct BoundListener {
    pub(crate) slot: Arc<ListenerSlot>,
    pub(crate) socket: BoundSocket,
}

/// What a listener takes.
pub(crate) enum BoundSocket {
    /// Connections.
    Tcp(std::net::TcpListener),
    /// Datagrams.
    Udp(std::net::UdpSocket),
}

/// Binds a listener once for each worker; all of it or nothing.
pub(crate) fn sockets(l: &model::Listener, workers: usize) -> io::Result<(SocketAddr, Vec<BoundSocket>)> {
    let (mut address, udp) = (l.address, l.udp.is_some());
    if workers > 1 && address.port() != 0 {
        // SO_REUSEPORT would silently share the port with a stranger of the same user; an exclusive bind tells.
        drop(socket(address, l.transparent, udp, false)?);
    }
    let mut out = Vec::with_capacity(workers);
    for _ in 0..workers.max(1) {
        let s = socket(address, l.transparent, udp, workers > 1)?;
        if udp {
            let s: std::net::UdpSocket = s.into();
            address = s.local_addr()?;
            out.push(BoundSocket::Udp(s));
            continue;
        }
        s.listen(BACKLOG)?;
        let s: std::net::TcpListener = s.into();
        address = s.local_addr()?;
        out.push(BoundSocket::Tcp(s));
    }
    Ok((address, out))
}

fn socket(address: SocketAddr, transparent: bool, udp: bool, reuse_port: bool) -> io::Result<Socket> {
    let (kind, protocol) = if udp { (Type::DGRAM, Protocol::UDP) } else { (Type::STREAM, Protocol::TCP) };
    let s = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    s.set_nonblocking(true)?;
    // For datagrams it would mean what SO_REUSEPORT means, among strangers.
    s.set_reuse_address(!udp)?;
    if reuse_port {
        s.set_reuse_port(true)?;
    }
    if transparent {
        match address {
            SocketAddr::V4(_) => s.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => s.set_ip_transparent_v6(true)?,
        }
    }
    if address.is_ipv6() {
        s.set_only_v6(false)?;
    }
    s.bind(&address.into())?;
    Ok(s)
}
