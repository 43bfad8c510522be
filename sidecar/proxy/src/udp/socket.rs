//! The listener's socket: datagrams with the address that they were sent to, and answers from that address.

use std::{
    cell::RefCell,
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    rc::{Rc, Weak},
};

use nix::{
    libc,
    sys::socket::{
        ControlMessage, ControlMessageOwned as Received, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage,
        recvmsg, sendmsg, setsockopt, sockopt,
    },
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{io::Interest, net::UdpSocket};

/// A worker's socket of a listener.
pub(super) struct Downstream {
    socket: UdpSocket,
    /// Where it is bound; the address may be any.
    bound: SocketAddr,
    transparent: bool,
    /// Room for the control messages of one datagram.
    control: RefCell<Vec<u8>>,
    /// Sockets that answer from addresses that are not this socket's; sessions keep them open.
    replies: RefCell<HashMap<SocketAddr, Weak<Socket>>>,
}

/// A datagram in the caller's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Datagram {
    pub(super) len: usize,
    pub(super) peer: SocketAddr,
    /// Where the client sent it.
    pub(super) local: SocketAddr,
}

/// How a session answers its client.
#[derive(Clone)]
pub(super) enum Reply {
    /// The listener's socket is bound to the right address.
    Plain,
    /// It is bound to any address, of which this is the right one.
    From(IpAddr),
    /// A socket bound to where the client sent to.
    Through(Rc<Socket>),
}

impl Downstream {
    pub(super) fn new(socket: std::net::UdpSocket, transparent: bool) -> io::Result<Self> {
        let bound = socket.local_addr()?;
        if bound.is_ipv6() {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        if transparent {
            // A socket of IPv6 may get datagrams of IPv4, whose options are of that level.
            setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true)?;
            if bound.is_ipv6() {
                setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true)?;
            }
        }
        Ok(Self {
            socket: UdpSocket::from_std(socket)?,
            bound,
            transparent,
            control: RefCell::new(nix::cmsg_space!(
                libc::in6_pktinfo,
                libc::in_pktinfo,
                libc::sockaddr_in6,
                libc::sockaddr_in
            )),
            replies: RefCell::default(),
        })
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// The next datagram, if there is one; `buffer` must hold the longest.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<Datagram> {
        self.socket.try_io(Interest::READABLE, || {
            let mut control = self.control.borrow_mut();
            let mut parts = [IoSliceMut::new(buffer)];
            let fd = self.socket.as_raw_fd();
            let m = recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut control), MsgFlags::empty())?;
            let mut to = None;
            let mut original = None;
            for c in m.cmsgs()? {
                match c {
                    Received::Ipv4PacketInfo(i) => to = Some(IpAddr::from(i.ipi_addr.s_addr.to_ne_bytes())),
                    Received::Ipv6PacketInfo(i) => to = Some(IpAddr::from(i.ipi6_addr.s6_addr)),
                    Received::Ipv4OrigDstAddr(a) => {
                        original = Some(std::net::SocketAddrV4::from(SockaddrIn::from(a)).into());
                    }
                    Received::Ipv6OrigDstAddr(a) => {
                        original = Some(std::net::SocketAddrV6::from(SockaddrIn6::from(a)).into());
                    }
                    _ => {}
                }
            }
            let peer = m.address.as_ref().and_then(address).ok_or(io::ErrorKind::InvalidData)?;
            let here = SocketAddr::new(to.unwrap_or(self.bound.ip()), self.bound.port());
            let local = canonical(original.unwrap_or(here));
            Ok(Datagram { len: m.bytes, peer: canonical(peer), local })
        })
    }

    /// Whether the kernel brought it here from another address.
    pub(super) fn was_redirected(&self, local: SocketAddr) -> bool {
        self.transparent && local.port() != self.bound.port()
    }

    /// How a client that sent to `local` is answered from there.
    pub(super) fn reply(&self, local: SocketAddr) -> io::Result<Reply> {
        if !self.was_redirected(local) {
            let any = self.bound.ip().is_unspecified();
            return Ok(if any { Reply::From(local.ip()) } else { Reply::Plain });
        }
        let mut all = self.replies.borrow_mut();
        if let Some(s) = all.get(&local).and_then(Weak::upgrade) {
            return Ok(Reply::Through(s));
        }
        all.retain(|_, s| s.strong_count() > 0);
        let s = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
        s.set_nonblocking(true)?;
        // Each worker has one, and applications may serve this port at addresses of their own.
        s.set_reuse_address(true)?;
        match local {
            SocketAddr::V4(_) => s.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => s.set_ip_transparent_v6(true)?,
        }
        s.bind(&local.into())?;
        let s = Rc::new(s);
        all.insert(local, Rc::downgrade(&s));
        Ok(Reply::Through(s))
    }

    /// Answers a client.
    pub(super) fn send(&self, data: &[u8], peer: SocketAddr, reply: &Reply) -> io::Result<()> {
        let from = match reply {
            Reply::Through(s) => return s.send_to(data, &peer.into()).map(drop),
            Reply::Plain => {
                let to = self.of_family(peer);
                return SockRef::from(&self.socket).send_to(data, &to.into()).map(drop);
            }
            Reply::From(ip) => *ip,
        };
        let to = SockaddrStorage::from(self.of_family(peer));
        let parts = [IoSlice::new(data)];
        let fd = self.socket.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT;
        match (from, self.bound) {
            (IpAddr::V4(ip), SocketAddr::V4(_)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                sendmsg(fd, &parts, &[ControlMessage::Ipv4PacketInfo(&info)], flags, Some(&to))?;
            }
            (ip, _) => {
                let ip = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                let info =
                    libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: ip.octets() }, ipi6_ifindex: 0 };
                sendmsg(fd, &parts, &[ControlMessage::Ipv6PacketInfo(&info)], flags, Some(&to))?;
            }
        }
        Ok(())
    }

    /// The address as the socket's family has it.
    fn of_family(&self, a: SocketAddr) -> SocketAddr {
        match (a.ip(), self.bound) {
            (IpAddr::V4(ip), SocketAddr::V6(_)) => SocketAddr::new(ip.to_ipv6_mapped().into(), a.port()),
            _ => a,
        }
    }
}

fn canonical(a: SocketAddr) -> SocketAddr {
    match a {
        SocketAddr::V6(v) if v.ip().to_ipv4_mapped().is_none() => a,
        _ => SocketAddr::new(a.ip().to_canonical(), a.port()),
    }
}

fn address(a: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(a) = a.as_sockaddr_in() {
        return Some(std::net::SocketAddrV4::from(*a).into());
    }
    a.as_sockaddr_in6().map(|a| std::net::SocketAddrV6::from(*a).into())
}
