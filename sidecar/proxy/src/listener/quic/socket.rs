//! The sockets of a listener's workers, and datagrams that reach the wrong one.
//!
//! The kernel chooses a socket by the addresses of a datagram. A client whose address changes (RFC 9000 section 9: another
//! network, or a translator that forgot) may then reach a worker that knows nothing of its connection. So the first
//! byte of every connection ID names the worker that gave it out, and a worker passes on what is not its own: one
//! comparison for each batch of datagrams, and nothing at all where there is one worker.

use std::{
    fmt, io,
    io::IoSliceMut,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use quinn::{
    AsyncUdpSocket, ConnectionId, ConnectionIdGenerator, Runtime as _, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use rand::Rng as _;
use tokio::sync::mpsc;

/// Bytes of a connection ID: who gave it out, and what nobody can guess.
const ID_LEN: usize = 9;
/// Batches that wait for a worker; what is above that is lost, as datagrams may be.
const INBOX: usize = 256;
/// Workers above this number share theirs with another one, and lose connections whose clients move.
const NUMBERED: usize = 256;

/// Datagrams on their way to another worker.
type Handed = (RecvMeta, Bytes);

/// What the sockets of one listener share.
pub(crate) struct Ports {
    inboxes: Vec<mpsc::Sender<Handed>>,
}

/// One worker's socket.
pub(crate) struct UdpPort {
    socket: std::net::UdpSocket,
    index: usize,
    inbox: mpsc::Receiver<Handed>,
    ports: Arc<Ports>,
}

impl Ports {
    /// Numbers the sockets of a listener.
    pub(crate) fn join(sockets: Vec<std::net::UdpSocket>) -> Vec<UdpPort> {
        let (inboxes, receivers): (Vec<_>, Vec<_>) = sockets.iter().map(|_| mpsc::channel(INBOX)).unzip();
        let ports = Arc::new(Self { inboxes });
        let numbered = sockets.into_iter().zip(receivers).enumerate();
        numbered
            .map(|(index, (socket, inbox))| UdpPort { socket, index, inbox, ports: Arc::clone(&ports) })
            .collect()
    }
}

impl UdpPort {
    /// Makes what generates the connection IDs of this worker.
    pub(super) fn generator(&self) -> impl Fn() -> Box<dyn ConnectionIdGenerator> + Send + Sync + 'static {
        // Cut to a byte on purpose.
        #[allow(clippy::cast_possible_truncation)]
        let own = (self.index % NUMBERED) as u8;
        move || Box::new(Numbered(own))
    }
}

struct Numbered(u8);

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

/// The worker that a datagram is for, if it says so: those with a short header do, which are all that a client sends
/// once it may move (RFC 9000 section 17.3).
fn addressee(datagram: &[u8]) -> Option<usize> {
    match datagram {
        [first, to, ..] if first & 0x80 == 0 => Some(usize::from(*to)),
        _ => None,
    }
}

/// Makes a socket of a worker's runtime.
pub(super) fn wrap(port: UdpPort) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let UdpPort { socket, index, inbox, ports } = port;
    let socket = quinn::TokioRuntime.wrap_udp_socket(socket)?;
    if ports.inboxes.len() == 1 {
        return Ok(socket);
    }
    Ok(Arc::new(Shared { socket, index, inbox: Mutex::new(inbox), ports }))
}

struct Shared {
    socket: Arc<dyn AsyncUdpSocket>,
    index: usize,
    /// Only its own thread takes it.
    inbox: Mutex<mpsc::Receiver<Handed>>,
    ports: Arc<Ports>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Shared {
    /// Hands a batch over if it is another worker's.
    fn passes_on(&self, batch: &[u8], meta: &RecvMeta) -> bool {
        let Some(to) = addressee(batch).filter(|to| *to != self.index % NUMBERED) else { return false };
        // A number that nobody has is answered here, by a reset or not at all.
        let Some(inbox) = self.ports.inboxes.get(to) else { return false };
        let _ = inbox.try_send((*meta, Bytes::copy_from_slice(batch)));
        true
    }

    fn poll_inbox(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<usize> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let mut n = 0;
        while let (Some(buf), Some(m)) = (bufs.get_mut(n), meta.get_mut(n)) {
            let (from, batch) = match inbox.poll_recv(cx) {
                Poll::Ready(Some(handed)) => handed,
                _ => break,
            };
            if let Some(buf) = buf.get_mut(..batch.len()) {
                buf.copy_from_slice(&batch);
                *m = from;
                n += 1;
            }
        }
        if n > 0 { Poll::Ready(n) } else { Poll::Pending }
    }
}

impl AsyncUdpSocket for Shared {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(n) = self.poll_inbox(cx, bufs, meta) {
            return Poll::Ready(Ok(n));
        }
        loop {
            let n = ready!(self.socket.poll_recv(cx, bufs, meta))?;
            let mut kept = 0;
            for i in 0..n.min(bufs.len()) {
                let len = meta[i].len;
                // A batch has one sender; more than one connection of it here is rare, and then they have one worker.
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

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_ids_name_their_worker() {
        let mut of_two = Numbered(2);
        let (a, b) = (of_two.generate_cid(), of_two.generate_cid());
        assert_ne!(a, b);
        assert_eq!(a.len(), of_two.cid_len());
        let datagram = [&[0x43][..], &a, &[0; 20]].concat();
        assert_eq!(addressee(&datagram), Some(2));
        // The first datagrams of a client name nobody: the ID is its own.
        assert_eq!(addressee(&[0xc3, 2, 0, 0, 0]), None);
        assert_eq!((addressee(&[0x43]), addressee(&[])), (None, None));
    }
}
