//! The UDP sockets of all trunks, and what the kernel grants it.

use std::{io, net::SocketAddr};

use quinn::udp;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

/// Bytes asked of the kernel in each direction: 50 ms at 1 Gbit/s. A smaller buffer drops packets whenever this
/// process is not scheduled in time, and every sender slows down.
const BUFFER: usize = 7 << 20;

/// What the kernel granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SocketStatus {
    /// Datagrams that one system call sends at most; 1: no segmentation offload, sending costs several times the CPU.
    pub segments: usize,
    /// Bytes of datagrams that wait for this process at most (`SO_RCVBUF`).
    pub receive_buffer: usize,
    /// Bytes of datagrams that wait for the network at most (`SO_SNDBUF`).
    pub send_buffer: usize,
    /// Bytes that were asked for in each direction.
    pub wanted_buffer: usize,
}

impl SocketStatus {
    /// What an operator should know, once.
    pub(crate) fn warn(&self) {
        if self.segments <= 1 {
            tracing::warn!(
                "no UDP segmentation offload (UDP_SEGMENT) on this kernel: trunks cost several times the CPU"
            );
        }
        for (name, sysctl, got) in [
            ("receive", "net.core.rmem_max", self.receive_buffer),
            ("send", "net.core.wmem_max", self.send_buffer),
        ] {
            if got < self.wanted_buffer {
                tracing::warn!(
                    got,
                    wanted = self.wanted_buffer,
                    "the kernel limits the {name} buffer of trunks: raise {sysctl}"
                );
            }
        }
    }
}

/// Binds `n` sockets at one address with large buffers.
pub(crate) fn bind(
    mut address: SocketAddr,
    n: usize,
) -> io::Result<(Vec<std::net::UdpSocket>, SocketStatus)> {
    let mut sockets: Vec<Socket> = Vec::with_capacity(n);
    for i in 0..n.max(1) {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        // A limit is no failure: the kernel grants what it may.
        let _ = socket.set_recv_buffer_size(BUFFER);
        let _ = socket.set_send_buffer_size(BUFFER);
        // The first one finds out whether the address is free, before it shares it.
        socket.set_reuse_port(i > 0)?;
        socket.bind(&address.into())?;
        socket.set_reuse_port(n > 1)?;
        if let Some(chosen) = socket.local_addr()?.as_socket() {
            address = chosen;
        }
        sockets.push(socket);
    }
    let [first, ..] = &sockets[..] else { return Err(io::ErrorKind::InvalidInput.into()) };
    // Linux counts its own overhead, and answers with twice what was asked for (socket(7)).
    let overhead = if cfg!(target_os = "linux") { 2 } else { 1 };
    let status = SocketStatus {
        segments: udp::UdpSocketState::new(first.into())?.max_gso_segments(),
        receive_buffer: first.recv_buffer_size()? / overhead,
        send_buffer: first.send_buffer_size()? / overhead,
        wanted_buffer: BUFFER,
    };
    Ok((sockets.into_iter().map(Into::into).collect(), status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_what_it_grants() {
        let (sockets, s) = bind("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        assert!(s.segments >= 1 && s.receive_buffer > 0 && s.send_buffer > 0, "{s:?}");
        let max = std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap();
        assert_eq!(s.receive_buffer, s.wanted_buffer.min(max.trim().parse().unwrap()));
        let at: Vec<_> = sockets.iter().map(|s| s.local_addr().unwrap()).collect();
        assert!(at.len() == 3 && at.iter().all(|a| *a == at[0]), "{at:?}");
        for n in [1, 2] {
            assert!(bind(at[0], n).is_err(), "the address is taken");
        }
    }
}
