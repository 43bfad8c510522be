//! Datagrams of flows, as DATAGRAM frames of a link (RFC 9221): lost ones are not repeated, and none waits for another.
//!
//! A flow has a number of its own on a link ([`mesh_model::flow`]); its first datagram opens it at the other end, which
//! hands it to whoever takes flows there. The dialling side chooses even numbers, the other one odd ones. What the flow
//! carries says where it leads, and whoever does not want it says so in the flow; so there is nothing to agree upon first.
//!
//! Bounded: [`FLOWS`] on a link, [`INBOX`] datagrams that wait for whoever takes them, and the buffers of the connection
//! (`transport.rs`). What does not fit is dropped and counted.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use mesh_model::{
    ClusterId,
    flow::{self, Frame},
};
use quinn::{Connection, SendDatagramError};
use tokio::sync::mpsc;

use crate::{
    Trunk,
    endpoint::Inner,
    links::{Link, Session},
    metrics::TrunkMetrics,
};

/// By then a link has found out what its path carries.
const DISCOVERY: Duration = Duration::from_secs(5);
/// Flows that a peer may have open on one link.
const FLOWS: usize = 4096;
/// Datagrams of a flow that wait.
const INBOX: usize = 256;

/// A flow of datagrams to or from a peer's gateway, until it is dropped.
#[derive(Debug)]
pub struct TrunkFlow {
    sender: FlowSender,
    from: mpsc::Receiver<Bytes>,
}

/// Its sending side; the flow ends when it is dropped.
#[derive(Debug)]
pub struct FlowSender {
    link: Arc<Link>,
    number: u64,
    metrics: TrunkMetrics,
    _session: Session,
}

/// Why a datagram was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// It is longer than the link carries.
    #[error("the datagram is longer than the trunk's path carries")]
    TooLarge,
    /// Older ones were given up for it.
    #[error("more waits than may wait")]
    Full,
    /// The link has ended.
    #[error("the trunk has ended")]
    Ended,
}

/// Flows of a link.
#[derive(Debug, Default)]
pub(crate) struct Flows {
    all: Mutex<HashMap<u64, mpsc::Sender<Bytes>>>,
    next: AtomicU64,
    /// The path is too narrow, which was said once.
    narrow: AtomicBool,
}

impl Flows {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Bytes>>> {
        // Every change is complete in itself.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever reads from flows hears that they have ended.
    pub(crate) fn close(&self) {
        self.lock().clear();
    }
}

impl TrunkFlow {
    /// The next datagram; `None` when the flow or its link has ended.
    pub async fn recv(&mut self) -> Option<Bytes> {
        self.from.recv().await
    }

    /// Both directions apart.
    #[must_use]
    pub fn split(self) -> (FlowSender, mpsc::Receiver<Bytes>) {
        (self.sender, self.from)
    }
}

impl FlowSender {
    /// Sends a datagram, now or never.
    ///
    /// # Errors
    /// [`FlowError`].
    pub fn send(&self, datagram: &[u8]) -> Result<(), FlowError> {
        let r = send(&self.link.connection, flow::data(self.number, datagram).into());
        if r.is_err() {
            self.metrics.dropped_datagrams.inc();
        }
        // What must fit: the first packets of a connection inside (RFC 9000 section 14.1). A link that is new has not found
        // out yet what its path carries.
        let narrow = r == Err(FlowError::TooLarge) && datagram.len() <= 1200 && self.link.age() > DISCOVERY;
        if narrow && !self.link.flows.narrow.swap(true, Relaxed) {
            tracing::warn!(
                cluster = %self.link.cluster, address = %self.link.connection.remote_address(),
                mtu = self.link.connection.stats().path.current_mtu,
                "UDP is not carried to this peer: the path between the gateways must let IP packets of 1300 bytes \
                 through; raise the MTU of the tunnel or device on the way"
            );
        }
        r
    }
}

impl Drop for FlowSender {
    fn drop(&mut self) {
        if self.link.flows.lock().remove(&self.number).is_some() {
            // If it gets lost, the other end finds out by silence.
            let _ = self.link.connection.send_datagram(flow::end(self.number).into());
        }
    }
}

fn send(c: &Connection, frame: Bytes) -> Result<(), FlowError> {
    let crowded = c.datagram_send_buffer_space() < frame.len();
    c.send_datagram(frame).map_err(|e| match e {
        SendDatagramError::TooLarge => FlowError::TooLarge,
        _ => FlowError::Ended,
    })?;
    if crowded { Err(FlowError::Full) } else { Ok(()) }
}

impl Trunk {
    /// Opens a flow to the gateway at `address`, which must be of cluster `expect`, or to another gateway of that cluster.
    /// TCP does not stand in: a datagram would wait for those that were lost before it.
    ///
    /// # Errors
    /// If QUIC does not get through, or the gateway is of another cluster or too old.
    pub async fn dial_flow(&self, address: SocketAddr, expect: Option<&ClusterId>) -> io::Result<TrunkFlow> {
        match self.inner.link(address, expect).await {
            Some(link) => {
                crate::dial::check_cluster(&link, expect)?;
                self.inner.flow(&link)
            }
            None => Err(io::Error::new(
                io::ErrorKind::NotConnected,
                format!("QUIC does not get through to {address}: let UDP to that port pass"),
            )),
        }
    }

    /// The same to a cluster whose gateways cannot be dialled.
    ///
    /// # Errors
    /// If none of them is connected.
    pub async fn dial_flow_to(&self, cluster: &ClusterId) -> io::Result<TrunkFlow> {
        let links = &self.inner.links;
        match links.to_cluster(cluster).or_else(|| links.last_resort(cluster)) {
            Some(link) => self.inner.flow(&link),
            None => Err(crate::dial::nobody(cluster)),
        }
    }
}

impl Inner {
    fn flow(&self, link: &Arc<Link>) -> io::Result<TrunkFlow> {
        if !link.datagrams {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("the gateway of cluster {} is of a version that carries no datagrams", link.cluster),
            ));
        }
        let parity = u64::from(link.dialled.is_none());
        let number = link.flows.next.fetch_add(1, Relaxed) << 1 | parity;
        self.metrics.flows.inc();
        Ok(self.open(link, number))
    }

    fn open(&self, link: &Arc<Link>, number: u64) -> TrunkFlow {
        let (to, from) = mpsc::channel(INBOX);
        link.flows.lock().insert(number, to);
        if !link.is_open() {
            // It ended meanwhile, after those who wait were told.
            link.flows.close();
        }
        let sender = FlowSender {
            link: link.clone(),
            number,
            metrics: self.metrics.clone(),
            _session: link.sessions.enter(),
        };
        TrunkFlow { sender, from }
    }
}

/// Hands datagrams of a link to their flows, and new flows to whoever takes them.
pub(crate) async fn take(inner: &Arc<Inner>, link: &Arc<Link>) {
    if !link.datagrams {
        return std::future::pending().await;
    }
    // Numbers of the peer.
    let theirs = u64::from(link.dialled.is_some());
    while let Ok(d) = link.connection.read_datagram().await {
        // A probe: that it arrived is all that it says.
        if d.is_empty() {
            continue;
        }
        let dropped = || {
            inner.metrics.dropped_datagrams.inc();
        };
        let (number, data) = match flow::read(&d) {
            Some(Frame::Data(number, data)) => (number, d.slice_ref(data)),
            Some(Frame::End(number)) => {
                link.flows.lock().remove(&number);
                continue;
            }
            None => {
                dropped();
                continue;
            }
        };
        let known = link.flows.lock().get(&number).cloned();
        if let Some(to) = known {
            match to.try_send(data) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(_)) => dropped(),
                // Whoever took it has left.
                Err(mpsc::error::TrySendError::Closed(_)) => drop(link.flows.lock().remove(&number)),
            }
            continue;
        }
        let full = link.flows.lock().len() >= FLOWS;
        let Some(takers) = inner.options.deliver_flows.as_ref().filter(|_| number & 1 == theirs && !full)
        else {
            dropped();
            continue;
        };
        let flow = inner.open(link, number);
        let first = link.flows.lock().get(&number).cloned();
        if first.is_none_or(|f| f.try_send(data).is_err())
            || takers.try_send((flow, link.connection.remote_address())).is_err()
        {
            dropped();
            continue;
        }
        inner.metrics.accepted_flows.inc();
    }
}
