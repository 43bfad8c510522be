//! Listening sockets: one for each worker, so that the kernel spreads connections.

use std::{io, net::SocketAddr, sync::Arc};

use mesh_model::proxy as model;
use socket2::{Domain, Protocol, Socket, Type};

use super::quic::{Ports, UdpPort};
use crate::config::listener::ListenerSlot;

const BACKLOG: i32 = 4096;
/// Bytes of datagrams that may wait in a socket.
const DATAGRAMS: usize = 2 << 20;

/// A socket on its way to a worker.
pub(crate) struct BoundListener {
    pub(crate) slot: Arc<ListenerSlot>,
    pub(crate) socket: BoundSocket,
}

/// What a worker takes from a listener.
pub(crate) enum BoundSocket {
    /// Connections.
    Tcp(std::net::TcpListener),
    /// Connections of QUIC.
    Quic(UdpPort),
    /// Datagrams.
    Udp(std::net::UdpSocket),
}

/// Binds a listener once for each worker; all of it or nothing.
pub(crate) fn sockets(l: &model::Listener, workers: usize) -> io::Result<(SocketAddr, Vec<BoundSocket>)> {
    let mut address = l.address;
    if workers > 1 && address.port() != 0 {
        // SO_REUSEPORT would silently share the port with a stranger of the same user; an exclusive bind tells.
        drop(socket(l, address, false)?);
    }
    let mut out = Vec::with_capacity(workers);
    for _ in 0..workers.max(1) {
        let s = socket(l, address, workers > 1)?;
        if !l.is_udp() {
            s.listen(BACKLOG)?;
        }
        address = s.local_addr()?.as_socket().unwrap_or(address);
        out.push(s);
    }
    let out = if l.quic.is_some() {
        Ports::join(out.into_iter().map(Into::into).collect()).into_iter().map(BoundSocket::Quic).collect()
    } else if l.udp.is_some() {
        out.into_iter().map(|s| BoundSocket::Udp(s.into())).collect()
    } else {
        out.into_iter().map(|s| BoundSocket::Tcp(s.into())).collect()
    };
    Ok((address, out))
}

fn socket(l: &model::Listener, address: SocketAddr, reuse_port: bool) -> io::Result<Socket> {
    let udp = l.is_udp();
    let (kind, protocol) = if udp { (Type::DGRAM, Protocol::UDP) } else { (Type::STREAM, Protocol::TCP) };
    let s = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    s.set_nonblocking(true)?;
    // For datagrams it would mean what SO_REUSEPORT means, among strangers.
    s.set_reuse_address(!udp)?;
    if udp {
        // What fits between two turns of a busy worker; the kernel cuts it to what it allows.
        let _ = s.set_recv_buffer_size(DATAGRAMS);
        let _ = s.set_send_buffer_size(DATAGRAMS);
    }
    if reuse_port {
        s.set_reuse_port(true)?;
    }
    if l.transparent {
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
