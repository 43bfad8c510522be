//! Packet sockets: one end of the link.

use std::{
    fs::File,
    io::{Read, Write},
    time::Duration,
};

use anyhow::Context;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// All protocols, in network byte order.
const ETH_P_ALL: u16 = 3u16.to_be();

/// Moves the calling thread into a named network namespace.
pub(crate) fn enter(namespace: &str) -> anyhow::Result<()> {
    use std::os::fd::AsFd;
    let path = format!("/run/netns/{namespace}");
    let file = File::open(&path).with_context(|| path.clone())?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).context(path)
}

/// Every frame of one interface.
pub(super) struct Port {
    socket: Socket,
}

impl Port {
    pub(super) fn open(interface: &str) -> anyhow::Result<Self> {
        // sysfs shows the namespace of whoever mounted it; the socket's own view is the right one.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))
            .context("packet socket (needs CAP_NET_RAW)")?;
        let index = rustix::net::netdevice::name_to_index(&socket, interface)
            .with_context(|| format!("interface {interface}"))?;
        socket.bind(&link_address(index)?).with_context(|| format!("bind to {interface}"))?;
        socket.set_nonblocking(true)?;
        // Bursts between two turns of the thread; the kernel's default holds a few hundred frames.
        let _ = socket.set_recv_buffer_size(8 << 20);
        Ok(Self { socket })
    }

    /// The next frame, if there is one.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        (&self.socket).read(buffer).ok().filter(|n| *n > 0)
    }

    /// Sends a frame; one that does not fit is lost, as on a wire.
    pub(super) fn send(&self, frame: &[u8]) {
        let _ = (&self.socket).write(frame);
    }
}

/// Indices of ports with frames to read.
pub(super) fn readable(ports: &[Port], wait: Duration) -> Vec<usize> {
    let mut fds: Vec<_> = ports.iter().map(|p| PollFd::new(&p.socket, PollFlags::IN)).collect();
    let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
    if poll(&mut fds, Some(&limit)).is_err() {
        return vec![];
    }
    fds.iter().enumerate().filter(|(_, f)| !f.revents().is_empty()).map(|(n, _)| n).collect()
}

/// `sockaddr_ll` for all protocols of one interface.
///
/// The one place of this crate that needs `unsafe`: no safe wrapper of packet addresses exists in the
/// libraries we use, and the emulation that the kernel offers instead is missing on many machines.
#[allow(unsafe_code)]
fn link_address(index: u32) -> anyhow::Result<SockAddr> {
    const LENGTH: u8 = 20;
    let family = u16::try_from(i32::from(Domain::PACKET))?;
    let mut bytes = [0u8; LENGTH as usize];
    bytes[0..2].copy_from_slice(&family.to_ne_bytes());
    bytes[2..4].copy_from_slice(&ETH_P_ALL.to_ne_bytes());
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    // SAFETY: the storage is zeroed and larger than the 20 bytes written to it; they are a complete
    // sockaddr_ll, whose family comes first, and the length says how many were written.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), storage.cast::<u8>(), bytes.len());
            *length = u32::from(LENGTH);
            Ok(())
        })?
    };
    Ok(address)
}
