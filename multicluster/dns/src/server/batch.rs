//! Datagrams of a cluster: as many as have come are taken with one call, answered, and sent with another.
//!
//! A question costs some hundred nanoseconds here and microseconds in the kernel, so what there is to save are calls.
//! Threads block in the kernel, without an event loop: under little load a question costs two calls, under much load
//! two calls serve up to [`BATCH`].

use std::{
    array,
    io::{IoSlice, IoSliceMut},
    net::{SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg},
};
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, SocketAddrAny, sendmmsg, sendto};

use super::worker::{Step, Worker};
use crate::wire::{MAX_PAYLOAD, Transport};

/// Datagrams taken at once.
const BATCH: usize = 32;
/// More than a question with the options that clients send has.
pub(super) const LARGEST_QUESTION: usize = 1280;
/// How often a thread without questions looks whether it is to end.
const LOOK_UP: Duration = Duration::from_millis(250);
/// After an error of the socket, which may come at once again.
const PAUSE: Duration = Duration::from_millis(10);

/// Serves until told to stop.
pub(super) fn serve(
    socket: UdpSocket,
    mut worker: Worker,
    runtime: &tokio::runtime::Handle,
    stop: &AtomicBool,
) {
    if let Err(error) = socket.set_nonblocking(false).and_then(|()| socket.set_read_timeout(Some(LOOK_UP))) {
        tracing::error!(%error, "a socket cannot be used");
        return;
    }
    let socket = Arc::new(socket);
    let mut packets = boxed::<LARGEST_QUESTION>();
    let mut replies = boxed::<{ MAX_PAYLOAD as usize }>();
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH, None);
    let mut came = [(0, None); BATCH];
    let mut to = Vec::with_capacity(BATCH);
    while !stop.load(Relaxed) {
        let count = match receive(&socket, &mut headers, &mut packets, &mut came) {
            Ok(n) => n,
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(error) => {
                tracing::debug!(%error, "questions were not received");
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        worker.refresh();
        to.clear();
        for (packet, (len, from)) in packets.iter().zip(came).take(count) {
            let Some(from) = from else { continue };
            match worker.handle(&packet[..len.min(LARGEST_QUESTION)], &mut replies[to.len()], Transport::Udp)
            {
                Step::Reply(len) => to.push((len, SocketAddrAny::from(from))),
                Step::Wait(waiting) => {
                    let socket = socket.clone();
                    runtime.spawn(async move {
                        let _ = sendto(&*socket, &waiting.answer().await, SendFlags::DONTWAIT, &from);
                    });
                }
                Step::Nothing => {}
            }
        }
        send(&socket, &replies, &to);
    }
}

fn boxed<const N: usize>() -> Box<[[u8; N]]> {
    vec![[0; N]; BATCH].into()
}

/// Takes what there is, or waits for one.
fn receive(
    socket: &UdpSocket,
    headers: &mut MultiHeaders<SockaddrStorage>,
    packets: &mut [[u8; LARGEST_QUESTION]],
    came: &mut [(usize, Option<SocketAddr>); BATCH],
) -> Result<usize, Errno> {
    let mut packets = packets.iter_mut();
    let mut slices: [[IoSliceMut<'_>; 1]; BATCH] =
        array::from_fn(|_| [IoSliceMut::new(packets.next().map_or(&mut [], |p| &mut p[..]))]);
    let flags = MsgFlags::MSG_WAITFORONE;
    let mut count = 0;
    for (to, message) in
        came.iter_mut().zip(recvmmsg(socket.as_raw_fd(), headers, slices.iter_mut(), flags, None)?)
    {
        *to = (message.bytes, message.address.as_ref().and_then(address));
        count += 1;
    }
    Ok(count)
}

fn address(from: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = from.as_sockaddr_in().map(|a| SocketAddrV4::from(*a).into());
    v4.or_else(|| from.as_sockaddr_in6().map(|a| SocketAddrV6::from(*a).into()))
}

/// Sends all; what cannot be sent holds up nothing else.
fn send(socket: &UdpSocket, replies: &[[u8; MAX_PAYLOAD as usize]], to: &[(usize, SocketAddrAny)]) {
    let bytes = |i: usize| match (replies.get(i), to.get(i)) {
        (Some(reply), Some((len, _))) => &reply[..*len],
        _ => &[],
    };
    let mut sent = 0;
    while sent < to.len() {
        let result = if let [(_, address)] = &to[sent..] {
            sendto(socket, bytes(sent), SendFlags::empty(), address).map(|_| 1)
        } else {
            let slices: [[IoSlice<'_>; 1]; BATCH] = array::from_fn(|i| [IoSlice::new(bytes(sent + i))]);
            let mut control: [SendAncillaryBuffer<'_, '_, '_>; BATCH] =
                array::from_fn(|_| Default::default());
            let rest = to[sent..].iter().zip(&slices).zip(&mut control);
            let mut messages: Vec<MMsgHdr<'_>> = rest
                .map(|(((_, address), slice), control)| MMsgHdr::new_with_addr(address, slice, control))
                .collect();
            sendmmsg(socket, &mut messages, SendFlags::empty())
        };
        match result {
            Ok(n) => sent += n.max(1),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                // It is about the first: an address that nothing can be sent to.
                tracing::debug!(%error, "an answer was not sent");
                sent += 1;
            }
        }
    }
}
