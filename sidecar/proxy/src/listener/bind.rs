//! Listening sockets: one for each worker, so that the kernel spreads connections.

use std::{io, net::SocketAddr, sync::Arc};

use mesh_model::proxy as model;
use socket2::{Domain, Protocol, Socket, Type};

use super::quic::{Ports, UdpPort};
use crate::{config::listener::ListenerSlot, worker::Gauge};

pub(crate) const BACKLOG: i32 = 4096;
/// Bytes of datagrams that may wait in a socket.
const DATAGRAMS: usize = 2 << 20;

/// Sockets on their way to a worker: one, unless a predecessor had more workers.
pub(crate) struct BoundListener {
    pub(crate) slot: Arc<ListenerSlot>,
    pub(crate) sockets: Vec<BoundSocket>,
    /// Tells that connections are accepted at them.
    pub(crate) listening: Gauge,
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

/// Binds a listener once for each worker; all of it or nothing. Sockets of a predecessor are taken out of `inherited`
/// rather than bound; those of UDP are not handed over.
pub(crate) fn sockets(
    l: &model::Listener,
    workers: usize,
    inherited: &mut Vec<std::net::TcpListener>,
) -> io::Result<(SocketAddr, Vec<Vec<BoundSocket>>)> {
    if !inherited.is_empty() && !l.is_udp() {
        let (mine, others) =
            std::mem::take(inherited).into_iter().partition(|s| s.local_addr().is_ok_and(|a| a == l.address));
        *inherited = others;
        let mine: Vec<_> = mine;
        if !mine.is_empty() {
            let shared = share(mine, workers, l.transparent)?;
            let of = |w: Vec<_>| w.into_iter().map(BoundSocket::Tcp).collect();
            return Ok((l.address, shared.into_iter().map(of).collect()));
        }
    }
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
    if l.quic.is_some() {
        let ports = Ports::join(out.into_iter().map(Into::into).collect());
        return Ok((address, ports.into_iter().map(|p| vec![BoundSocket::Quic(p)]).collect()));
    }
    let out: Vec<BoundSocket> = if l.is_udp() {
        out.into_iter().map(|s| BoundSocket::Udp(s.into())).collect()
    } else {
        out.into_iter().map(|s| BoundSocket::Tcp(s.into())).collect()
    };
    Ok((address, out.into_iter().map(|s| vec![s]).collect()))
}

/// Gives every worker something to accept from, and every socket somebody who accepts: connections wait in the queue
/// of each. A socket that several workers have is a duplicate for each.
fn share(
    sockets: Vec<std::net::TcpListener>,
    workers: usize,
    transparent: bool,
) -> io::Result<Vec<Vec<std::net::TcpListener>>> {
    let n = workers.max(1);
    let mut out: Vec<Vec<_>> = (0..n).map(|_| vec![]).collect();
    for w in sockets.len()..n {
        out[w].push(sockets[w % sockets.len()].try_clone()?);
    }
    for (i, s) in sockets.into_iter().enumerate() {
        s.set_nonblocking(true)?;
        if transparent {
            let s = socket2::SockRef::from(&s);
            if s.local_addr()?.is_ipv6() {
                s.set_ip_transparent_v6(true)?
            } else {
                s.set_ip_transparent_v4(true)?
            }
        }
        out[i % n].push(s);
    }
    Ok(out)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_socket_and_every_worker_is_busy() {
        for (sockets, workers) in [(1, 1), (1, 4), (3, 3), (2, 5), (5, 2), (4, 1)] {
            let all: Vec<_> =
                (0..sockets).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
            let mut addresses: Vec<_> = all.iter().map(|s| s.local_addr().unwrap()).collect();
            let got = share(all, workers, false).unwrap();
            assert!(got.len() == workers && got.iter().all(|w| !w.is_empty()), "{sockets} for {workers}");
            let mut seen: Vec<_> = got.iter().flatten().map(|s| s.local_addr().unwrap()).collect();
            for list in [&mut addresses, &mut seen] {
                list.sort();
                list.dedup();
            }
            assert_eq!(seen, addresses);
        }
    }
}
