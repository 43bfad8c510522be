//! Listening sockets: one for each worker, so that the kernel spreads connections.

use std::{io, net::SocketAddr, sync::Arc};

use mesh_model::proxy as model;
use socket2::{Domain, Protocol, Socket, Type};

use crate::config::listener::ListenerSlot;

const BACKLOG: i32 = 4096;

/// A socket on its way to a worker.
pub(crate) struct BoundListener {
    pub(crate) slot: Arc<ListenerSlot>,
    pub(crate) socket: std::net::TcpListener,
}

/// Binds a listener once for each worker; all of it or nothing.
pub(crate) fn sockets(
    l: &model::Listener,
    workers: usize,
) -> io::Result<(SocketAddr, Vec<std::net::TcpListener>)> {
    let mut address = l.address;
    if workers > 1 && address.port() != 0 {
        // SO_REUSEPORT would silently share the port with a stranger of the same user; an exclusive bind tells.
        drop(socket(address, l.transparent, false)?);
    }
    let mut out = Vec::with_capacity(workers);
    for _ in 0..workers.max(1) {
        let s = socket(address, l.transparent, workers > 1)?;
        s.listen(BACKLOG)?;
        let s: std::net::TcpListener = s.into();
        address = s.local_addr()?;
        out.push(s);
    }
    Ok((address, out))
}

fn socket(address: SocketAddr, transparent: bool, reuse_port: bool) -> io::Result<Socket> {
    let s = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    s.set_nonblocking(true)?;
    s.set_reuse_address(true)?;
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
