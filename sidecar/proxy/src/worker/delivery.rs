//! Connections that reach a listener by another way than its socket, such as streams of a trunk. Going through the
//! socket would cost each byte two more system calls and two more copies.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

use super::{Admission, Gauge, Worker};
use crate::{config::listener::ListenerSlot, io::BoxedIo, listener::accept, options::DatagramFlow};

/// Connections that wait for a worker; the kernel keeps as many for a socket.
const WAITING: usize = 1024;

/// What is on its way to a worker.
pub(crate) enum Delivery {
    Stream(Delivered),
    /// Datagrams from a peer, for whatever passes connections of QUIC on.
    Flow(SocketAddr, DatagramFlow),
}

/// A connection.
pub(crate) struct Delivered {
    at: SocketAddr,
    peer: SocketAddr,
    stream: BoxedIo,
}

/// The way of [`Deliveries`] into one worker.
pub(crate) fn channel() -> (mpsc::Sender<Delivery>, mpsc::Receiver<Delivery>) {
    mpsc::channel(WAITING)
}

/// Hands connections to listeners of an engine.
#[derive(Clone)]
pub struct Deliveries {
    workers: Arc<[mpsc::Sender<Delivery>]>,
    next: Arc<AtomicUsize>,
}

impl Deliveries {
    pub(crate) fn new(workers: Vec<mpsc::Sender<Delivery>>) -> Self {
        Self { workers: workers.into(), next: Arc::default() }
    }

    /// Hands a connection from `peer` to the listener at `at`, as if it had been accepted there; where nothing listens
    /// it is dropped, unless the engine has only started. Waits while the worker whose turn it is has enough of them.
    ///
    /// # Errors
    /// If the engine has stopped.
    pub async fn deliver(&self, at: SocketAddr, peer: SocketAddr, stream: BoxedIo) -> io::Result<()> {
        self.send(Delivery::Stream(Delivered { at, peer, stream })).await
    }

    /// Hands a flow of datagrams from `peer` to the listener that passes connections of QUIC on, as if a client had
    /// sent them there; where there is none they are dropped.
    ///
    /// # Errors
    /// If the engine has stopped.
    pub async fn deliver_flow(&self, peer: SocketAddr, flow: DatagramFlow) -> io::Result<()> {
        self.send(Delivery::Flow(peer, flow)).await
    }

    async fn send(&self, d: Delivery) -> io::Result<()> {
        let turn = self.next.fetch_add(1, Relaxed) % self.workers.len().max(1);
        let stopped = || io::Error::new(io::ErrorKind::ConnectionRefused, "the engine has stopped");
        let worker = self.workers.get(turn).ok_or_else(stopped)?;
        worker.send(d).await.map_err(|_| stopped())
    }
}

/// For so long after the start a connection waits for its listener, and for so long it waits.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a worker listens at, by the listener's name.
pub(crate) struct Listening {
    all: RefCell<HashMap<String, Listener>>,
    /// Another process has the sockets as well.
    shared: Cell<bool>,
    /// Counts listeners as they come.
    came: watch::Sender<u64>,
    since: Instant,
}

impl Default for Listening {
    fn default() -> Self {
        Self {
            all: RefCell::default(),
            shared: Cell::default(),
            came: watch::Sender::default(),
            since: Instant::now(),
        }
    }
}

struct Listener {
    slot: Arc<ListenerSlot>,
    stop: CancellationToken,
    sockets: Vec<Rc<TcpListener>>,
}

impl Listening {
    /// Takes a listener in, in the place of the one of the same name.
    pub(crate) fn insert(
        &self,
        slot: Arc<ListenerSlot>,
        stop: CancellationToken,
        sockets: Vec<Rc<TcpListener>>,
    ) {
        let name = slot.name.clone();
        if let Some(old) = self.all.borrow_mut().insert(name, Listener { slot, stop, sockets }) {
            old.stop.cancel();
        }
        self.came.send_modify(|n| *n += 1);
    }

    /// Ends a listener.
    pub(crate) fn remove(&self, name: &str) {
        if let Some(old) = self.all.borrow_mut().remove(name) {
            old.stop.cancel();
        }
    }

    /// Whether another process accepts at the sockets.
    pub(crate) fn are_shared(&self) -> bool {
        self.shared.get()
    }

    /// Duplicates of all sockets.
    pub(crate) fn duplicates(&self) -> io::Result<Vec<std::net::TcpListener>> {
        self.shared.set(true);
        let all = self.all.borrow();
        let sockets = all.values().flat_map(|l| &l.sockets);
        sockets.map(|s| socket2::SockRef::from(&**s).try_clone().map(std::net::TcpListener::from)).collect()
    }

    /// The listener that a connection to `at` would reach.
    fn at(&self, at: SocketAddr) -> Option<Arc<ListenerSlot>> {
        let covers = |s: &Rc<TcpListener>| {
            let own = s.local_addr().ok();
            own.is_some_and(|own| own == at || (own.port() == at.port() && own.ip().is_unspecified()))
        };
        let all = self.all.borrow();
        all.values().find(|l| l.sockets.iter().any(covers)).map(|l| Arc::clone(&l.slot))
    }
}

/// Serves what is delivered, for as long as the engine runs.
pub(crate) async fn take(worker: Rc<Worker>, listening: Rc<Listening>, mut from: mpsc::Receiver<Delivery>) {
    while let Some(d) = from.recv().await {
        let d = match d {
            Delivery::Stream(d) => d,
            Delivery::Flow(peer, flow) => {
                carry(&worker, peer, flow);
                continue;
            }
        };
        let admission = worker.admit().await;
        match listening.at(d.at) {
            Some(slot) => drop(tokio::task::spawn_local(serve(Rc::clone(&worker), slot, d, admission))),
            None if listening.since.elapsed() < PATIENCE => {
                // A peer that knows the address may dial before the configuration is here.
                let (worker, listening) = (Rc::clone(&worker), Rc::clone(&listening));
                tokio::task::spawn_local(async move {
                    let mut came = listening.came.subscribe();
                    let found = async {
                        loop {
                            if let Some(slot) = listening.at(d.at) {
                                return Some(slot);
                            }
                            came.changed().await.ok()?;
                        }
                    };
                    match tokio::time::timeout(PATIENCE, found).await {
                        Ok(Some(slot)) => serve(worker, slot, d, admission).await,
                        _ => nobody(&d),
                    }
                });
            }
            None => nobody(&d),
        }
    }
}

fn carry(worker: &Rc<Worker>, peer: SocketAddr, flow: DatagramFlow) {
    if let Some(relay) = worker.relay.borrow().upgrade() {
        tokio::task::spawn_local(relay.carry(peer, flow));
        return;
    }
    tracing::debug!(%peer, "datagrams were delivered where nothing passes them on");
}

fn nobody(d: &Delivered) {
    tracing::warn!(address = %d.at, peer = %d.peer, "a session was delivered where nothing listens");
}

async fn serve(worker: Rc<Worker>, slot: Arc<ListenerSlot>, d: Delivered, admission: Admission) {
    let Some(_place) = worker.client() else { return };
    let totals = &worker.shared.totals;
    let _gauge = Gauge::new(totals, |t| &t.connections, |t| &t.connections_total);
    if let Some(serving) = Box::pin(accept::delivered(&worker, &slot, d.stream, d.peer, d.at)).await {
        serving.await;
    }
    drop(admission);
}
