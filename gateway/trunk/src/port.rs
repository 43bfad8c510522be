//! The trunk's UDP sockets, one for each of its runtimes, all at the same address. (Where there are several, dials leave
//! from a socket of the runtime's own.)
//!
//! The kernel chooses a socket by the addresses of a datagram. A peer whose address changes (RFC 9000, section 9) may
//! then reach a runtime that knows nothing of its connection. So the first byte of every connection ID names the
//! runtime that gave it out, and what is not a runtime's own is handed on: one comparison for each batch, and nothing
//! at all where there is one runtime.

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::Bytes;
use quinn::{
    AsyncTimer, AsyncUdpSocket, ConnectionId, ConnectionIdGenerator, Runtime, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use rand::Rng as _;
use tokio::{runtime::Handle, sync::mpsc};

use crate::transport::LARGEST;

/// Bytes of a connection ID: who gave it out, and what nobody can guess.
const ID_LEN: usize = 9;
/// Batches that wait for another runtime; what is above that is lost, as datagrams may be.
const INBOX: usize = 256;
/// Runtimes at most: their number is a byte.
pub(crate) const MOST: usize = 256;

/// A runtime of tokio, whoever calls: connections live where their endpoint does.
#[derive(Debug)]
pub(crate) struct On(pub(crate) Handle);

impl Runtime for On {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _here = self.0.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _here = self.0.enter();
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

/// Connection IDs that name a runtime.
pub(crate) struct Numbered(pub(crate) u8);

impl ConnectionIdGenerator for Numbered {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [self.0; ID_LEN];
        rand::rng().fill_bytes(&mut id[1..]);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_LEN
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

/// The runtime that a datagram is for, if it says so: those with a short header do, which are all that a peer sends once
/// it may move (RFC 9000, section 17.3).
fn addressee(datagram: &[u8]) -> Option<u8> {
    match datagram {
        [first, to, ..] if first & 0x80 == 0 => Some(*to),
        _ => None,
    }
}

/// Datagrams on their way to another runtime.
type Handed = (RecvMeta, Bytes);

/// Makes the sockets of runtimes, in their order.
pub(crate) fn join(
    sockets: Vec<std::net::UdpSocket>,
    runtimes: &[Handle],
) -> io::Result<Vec<Arc<dyn AsyncUdpSocket>>> {
    let (inboxes, receivers): (Vec<_>, Vec<_>) = sockets.iter().map(|_| mpsc::channel(INBOX)).unzip();
    let inboxes: Arc<[mpsc::Sender<Handed>]> = inboxes.into();
    let all = sockets.into_iter().zip(receivers).zip(runtimes).zip(0..=u8::MAX);
    all.map(|(((socket, inbox), runtime), own)| {
        let socket = On(runtime.clone()).wrap_udp_socket(socket)?;
        let inboxes = Arc::clone(&inboxes);
        Ok(Arc::new(Port { socket, own, inbox: Mutex::new(inbox), inboxes }) as Arc<dyn AsyncUdpSocket>)
    })
    .collect()
}

struct Port {
    socket: Arc<dyn AsyncUdpSocket>,
    own: u8,
    /// Only its own runtime takes it.
    inbox: Mutex<mpsc::Receiver<Handed>>,
    inboxes: Arc<[mpsc::Sender<Handed>]>,
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("own", &self.own).finish_non_exhaustive()
    }
}

impl Port {
    fn is_alone(&self) -> bool {
        self.inboxes.len() == 1
    }

    /// Hands a batch over if it is another runtime's.
    fn passes_on(&self, batch: &[u8], meta: &RecvMeta) -> bool {
        let Some(to) = addressee(batch).filter(|to| *to != self.own) else { return false };
        // A number that nobody has is answered here, by a reset or not at all.
        let Some(inbox) = self.inboxes.get(usize::from(to)) else { return false };
        let _ = inbox.try_send((*meta, Bytes::copy_from_slice(batch)));
        true
    }

    fn poll_inbox(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> usize {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let mut n = 0;
        while let (Some(buf), Some(m)) = (bufs.get_mut(n), meta.get_mut(n)) {
            let Poll::Ready(Some((from, batch))) = inbox.poll_recv(cx) else { break };
            if let Some(buf) = buf.get_mut(..batch.len()) {
                buf.copy_from_slice(&batch);
                *m = from;
                n += 1;
            }
        }
        n
    }
}

impl AsyncUdpSocket for Port {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    /// A system call takes no more than an IP packet would hold, however many segments it is cut into; quinn counts
    /// segments only.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let most = usize::from(LARGEST);
        let Some(size) = transmit.segment_size.filter(|_| transmit.contents.len() > most) else {
            return self.socket.try_send(transmit);
        };
        // Whoever must wait sends all of it again: what the peer has twice it drops.
        for part in transmit.contents.chunks((most / size).max(1) * size) {
            self.socket.try_send(&Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents: part,
                segment_size: (part.len() > size).then_some(size),
                src_ip: transmit.src_ip,
            })?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if self.is_alone() {
            return self.socket.poll_recv(cx, bufs, meta);
        }
        let handed = self.poll_inbox(cx, bufs, meta);
        if handed > 0 {
            return Poll::Ready(Ok(handed));
        }
        loop {
            let n = ready!(self.socket.poll_recv(cx, bufs, meta))?;
            let mut kept = 0;
            for i in 0..n.min(bufs.len()) {
                let len = meta[i].len;
                // A batch has one sender; more than one connection of it here is rare, and then they have one runtime.
                if self.passes_on(&bufs[i][..len], &meta[i]) {
                    continue;
                }
                if kept < i {
                    let (to, from) = bufs.split_at_mut(i);
                    to[kept][..len].copy_from_slice(&from[0][..len]);
                    meta[kept] = meta[i];
                }
                kept += 1;
            }
            if kept > 0 {
                return Poll::Ready(Ok(kept));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    /// Quinn makes room for as many of the largest datagrams; a batch of them is no larger than one may be.
    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_ids_name_their_runtime() {
        let mut of_two = Numbered(2);
        let (a, b) = (of_two.generate_cid(), of_two.generate_cid());
        assert_ne!(a, b);
        assert_eq!(a.len(), of_two.cid_len());
        let datagram = [&[0x43][..], &a, &[0; 20]].concat();
        assert_eq!(addressee(&datagram), Some(2));
        // The first datagrams of a peer name nobody: the ID is its own.
        assert_eq!(addressee(&[0xc3, 2, 0, 0, 0]), None);
        assert_eq!((addressee(&[0x43]), addressee(&[])), (None, None));
    }
}
