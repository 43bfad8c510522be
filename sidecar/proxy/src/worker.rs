//! A worker: one thread, one runtime, everything that its connections share without locks.

pub(crate) mod alarm;
pub(crate) mod connection;
pub(crate) mod delivery;
pub(crate) mod load;
pub(crate) mod signals;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, Release},
        },
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use mesh_identity::SecretStore;
use mesh_telemetry::metrics::MeshMetrics;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
};
use tokio_util::sync::CancellationToken;

use self::{
    alarm::Alarms,
    delivery::{Delivery, Listening},
    signals::{Signals, Sources},
};
use crate::{
    config::{
        Compiled,
        listener::{Chain, ListenerSlot},
    },
    export::Exports,
    http::filters::jwt::cache::TokenCache,
    listener::{
        accept,
        bind::{BACKLOG, BoundListener, BoundSocket},
    },
    options::{Dialer, EngineOptions, Hooks, NodeInfo},
    tcp::splice::Pipes,
    udp,
    upstream::{
        lb::Rng,
        pool::{self, Pool, PoolKey},
    },
};

/// Commands are few (listeners come and go) and are sent by a thread that may wait.
const COMMANDS: usize = 1024;

/// What the control side asks of a worker.
pub(crate) enum Command {
    Listen(BoundListener),
    Unlisten(String),
    /// Duplicates of the sockets that are listened at.
    Share(std::sync::mpsc::Sender<std::io::Result<Vec<std::net::TcpListener>>>),
}

/// The sending end of a worker's commands.
#[derive(Clone)]
pub(crate) struct Commands {
    to: mpsc::Sender<Command>,
    totals: Arc<Totals>,
}

impl Commands {
    /// Queues a command. A full queue means a worker that has stopped turning; the command is dropped and said.
    pub(crate) fn send(&self, c: Command) {
        if self.to.try_send(c).is_err() {
            tracing::error!("a worker does not take commands");
        }
    }

    /// Has the worker accept at these sockets. They count from here: connections may be in their queues before the
    /// worker knows of them.
    pub(crate) fn listen(&self, slot: Arc<ListenerSlot>, sockets: Vec<BoundSocket>) {
        let listening = Gauge::of(&self.totals, |t| &t.listening);
        self.send(Command::Listen(BoundListener { slot, sockets, listening }));
    }
}

/// Numbers of the whole engine.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) connections: AtomicU64,
    pub(crate) connections_total: AtomicU64,
    /// Those that clients have made themselves, apart from what streams of shared sessions carry.
    clients: AtomicU64,
    /// Closed as there were as many as there may be.
    pub(crate) connections_refused: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) requests_total: AtomicU64,
    /// Refused in an overload.
    pub(crate) refused: AtomicU64,
    /// Listeners of all workers at which connections are accepted.
    pub(crate) listening: AtomicU64,
    /// Collectors that spans or log entries wait for.
    pub(crate) exporting: AtomicU64,
}

/// Adds one to a number for as long as it lives.
#[derive(Debug)]
pub(crate) struct Gauge(Arc<Totals>, fn(&Totals) -> &AtomicU64);

impl Gauge {
    pub(crate) fn new(
        totals: &Arc<Totals>,
        now: fn(&Totals) -> &AtomicU64,
        total: fn(&Totals) -> &AtomicU64,
    ) -> Self {
        total(totals).fetch_add(1, Relaxed);
        Self::of(totals, now)
    }

    /// One without a total.
    pub(crate) fn of(totals: &Arc<Totals>, now: fn(&Totals) -> &AtomicU64) -> Self {
        now(totals).fetch_add(1, Relaxed);
        Self(Arc::clone(totals), now)
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        // Who sees that it is gone sees what came of it.
        (self.1)(&self.0).fetch_sub(1, Release);
    }
}

impl Totals {
    /// A place for a client's connection, unless there are `limit` of them.
    pub(crate) fn client(self: &Arc<Self>, limit: Option<usize>) -> Option<Gauge> {
        let gauge = Gauge(Arc::clone(self), |t| &t.clients);
        let before = self.clients.fetch_add(1, Relaxed);
        // A limit that no number reaches is none.
        let full = limit.and_then(|l| u64::try_from(l).ok()).is_some_and(|l| before >= l);
        if full {
            self.connections_refused.fetch_add(1, Relaxed);
        }
        (!full).then_some(gauge)
    }
}

/// What all workers share.
pub(crate) struct Shared {
    pub(crate) options: EngineOptions,
    pub(crate) secrets: Arc<SecretStore>,
    pub(crate) hooks: Hooks,
    pub(crate) metrics: MeshMetrics,
    pub(crate) labels: NodeLabels,
    pub(crate) compiled: ArcSwap<Compiled>,
    pub(crate) totals: Arc<Totals>,
    pub(crate) stop: CancellationToken,
    /// The process has more memory than `max_memory`.
    pub(crate) over_memory: AtomicBool,
    /// This cluster's own gateways, through which inbound connections come.
    pub(crate) sources: tokio::sync::watch::Sender<Arc<Sources>>,
    /// Whether connections are accepted yet.
    pub(crate) open: tokio::sync::watch::Sender<bool>,
}

/// The node's own metric labels, shared by all series.
pub(crate) struct NodeLabels {
    pub(crate) workload: Arc<str>,
    pub(crate) namespace: Arc<str>,
    pub(crate) cluster: Arc<str>,
    pub(crate) principal: Arc<str>,
    pub(crate) unknown: Arc<str>,
}

impl NodeLabels {
    pub(crate) fn new(n: &NodeInfo) -> Self {
        let unknown: Arc<str> = Arc::from("unknown");
        let or = |s: &str| if s.is_empty() { Arc::clone(&unknown) } else { Arc::from(s) };
        Self {
            workload: or(&n.workload),
            namespace: or(&n.namespace),
            cluster: or(&n.cluster),
            principal: or(&n.principal),
            unknown,
        }
    }
}

type SignalsKey = (usize, Option<IpAddr>);

/// State of one worker.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) options: EngineOptions,
    pub(crate) secrets: Arc<SecretStore>,
    pub(crate) pools: RefCell<HashMap<PoolKey, Rc<Pool>>>,
    pub(crate) rng: Rng,
    pub(crate) alarms: Rc<Alarms>,
    /// Through which bytes of TCP connections pass, one connection at a time.
    pub(crate) scratch: RefCell<Box<[u8]>>,
    /// Authorities seen by inbound listeners that name no service, kept few: they become metric labels.
    pub(crate) services: RefCell<HashMap<String, Rc<crate::upstream::cluster::ServiceName>>>,
    /// Tokens verified here.
    pub(crate) tokens: RefCell<TokenCache>,
    /// Signals of the chains that have connections here, by the address of the chain that each keeps alive and by the
    /// gateway that connections come through.
    signals: RefCell<HashMap<SignalsKey, (Arc<Chain>, Rc<Signals>)>>,
    /// Through which bulk passes without being copied.
    pub(crate) pipes: Rc<Pipes>,
    /// Spans and log entries for collectors.
    pub(crate) exports: Exports,
    /// UDP sessions.
    pub(crate) udp_sessions: Cell<usize>,
    /// Connections of QUIC that carry them to other proxies.
    pub(crate) links: udp::inner::client::Links,
    /// What the log was told about them.
    pub(crate) said: udp::carrier::Said,
    /// What passes connections of QUIC on, where this is a gateway.
    pub(crate) relay: RefCell<std::rc::Weak<udp::relay::Relay>>,
    open: Cell<usize>,
    /// A connection ended, or the load fell.
    closed: Notify,
    pub(crate) load: load::Load,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>) -> Rc<Self> {
        Rc::new(Self {
            options: shared.options.clone(),
            secrets: Arc::clone(&shared.secrets),
            pools: RefCell::default(),
            rng: Rng::new(rand::random()),
            alarms: Rc::default(),
            scratch: RefCell::new(vec![0; crate::tcp::BUFFER].into_boxed_slice()),
            services: RefCell::default(),
            tokens: RefCell::default(),
            signals: RefCell::default(),
            pipes: Rc::default(),
            exports: Exports::default(),
            udp_sessions: Cell::new(0),
            links: Default::default(),
            said: Default::default(),
            relay: RefCell::default(),
            open: Cell::new(0),
            closed: Notify::new(),
            load: load::Load::default(),
            shared,
        })
    }

    pub(crate) fn dialer(&self) -> Option<&dyn Dialer> {
        self.shared.hooks.dialer.as_deref()
    }

    /// The signals for connections of a chain.
    pub(crate) fn signals(&self, chain: &Arc<Chain>) -> Rc<Signals> {
        self.signals_of(chain, None)
    }

    /// The signals for inbound connections of a chain from `peer`, which may be one of this cluster's gateways.
    pub(crate) fn signals_from(&self, chain: &Arc<Chain>, peer: IpAddr) -> Rc<Signals> {
        let from = self.shared.sources.borrow().contains_key(&peer).then_some(peer);
        self.signals_of(chain, from)
    }

    fn signals_of(&self, chain: &Arc<Chain>, from: Option<IpAddr>) -> Rc<Signals> {
        let mut all = self.signals.borrow_mut();
        let (_, signals) = all.entry((Arc::as_ptr(chain) as usize, from)).or_insert_with(|| {
            let sources = self.shared.sources.subscribe();
            let signals = from.map(|ip| Signals::of_gateway(ip, &sources.borrow())).unwrap_or_default();
            let signals = Rc::new(signals);
            tokio::task::spawn_local(Rc::clone(&signals).follow(Arc::clone(chain), sources));
            (Arc::clone(chain), signals)
        });
        Rc::clone(signals)
    }

    /// Forgets the signals of chains that have ended.
    fn sweep_signals(&self) {
        self.signals.borrow_mut().retain(|_, (chain, _)| !chain.kill.is_cancelled());
    }

    /// Takes a place for a connection, waiting while the worker is full.
    pub(crate) async fn admit(self: &Rc<Self>) -> Admission {
        loop {
            if self.load.takes_connections()
                && let Some(a) = self.place_for_connection()
            {
                return a;
            }
            self.closed.notified().await;
        }
    }

    /// A place among the connections of all workers, if there is one.
    pub(crate) fn client(&self) -> Option<Gauge> {
        self.shared.totals.client(self.options.max_total_connections)
    }

    /// Takes a place for a connection, if there is one.
    fn place_for_connection(self: &Rc<Self>) -> Option<Admission> {
        (self.open.get() < self.options.max_connections).then(|| {
            self.open.set(self.open.get() + 1);
            Admission(Rc::clone(self))
        })
    }
}

/// A connection's place in a worker.
pub(crate) struct Admission(Rc<Worker>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.closed.notify_one();
    }
}

/// Starts a worker thread.
pub(crate) fn spawn(
    index: usize,
    shared: Arc<Shared>,
) -> std::io::Result<(Commands, mpsc::Sender<Delivery>, std::thread::JoinHandle<()>)> {
    let (to, rx) = mpsc::channel(COMMANDS);
    let totals = Arc::clone(&shared.totals);
    let (deliveries, delivered) = delivery::channel();
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(tokio::runtime::LocalOptions::default());
        match runtime {
            Ok(rt) => rt.block_on(run(shared, rx, delivered)),
            Err(error) => tracing::error!(%error, "worker runtime"),
        }
    })?;
    Ok((Commands { to, totals }, deliveries, thread))
}

async fn run(
    shared: Arc<Shared>,
    mut commands: mpsc::Receiver<Command>,
    delivered: mpsc::Receiver<Delivery>,
) {
    let worker = Worker::new(shared);
    let listening = Rc::new(Listening::default());
    // It ends with the runtime.
    tokio::task::spawn_local(delivery::take(Rc::clone(&worker), Rc::clone(&listening), delivered));
    let mut sweep = tokio::time::interval(Duration::from_secs(1));
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            c = commands.recv() => match c {
                Some(Command::Listen(l)) => {
                    let stop = CancellationToken::new();
                    let name = l.slot.name.clone();
                    let mut sockets = Vec::with_capacity(l.sockets.len());
                    for s in l.sockets {
                        let (worker, slot, stop) = (Rc::clone(&worker), Arc::clone(&l.slot), stop.clone());
                        match s {
                            BoundSocket::Tcp(s) => match TcpListener::from_std(s) {
                                Ok(s) => sockets.push(Rc::new(s)),
                                Err(error) => tracing::error!(%error, listener = %name, "cannot listen"),
                            },
                            BoundSocket::Quic(s) => drop(tokio::task::spawn_local(crate::listener::quic::listen(worker, slot, s, stop))),
                            BoundSocket::Udp(s) if slot.current.load().model.inspect_quic => {
                                drop(tokio::task::spawn_local(udp::relay::serve(worker, slot, s, stop)));
                            }
                            BoundSocket::Udp(s) => drop(tokio::task::spawn_local(udp::serve(worker, slot, s, stop))),
                        }
                    }
                    let counted = Rc::new(l.listening);
                    for s in &sockets {
                        let (s, slot) = (Rc::clone(s), Arc::clone(&l.slot));
                        let (all, counted) = (Rc::clone(&listening), Rc::clone(&counted));
                        let listen = listen(Rc::clone(&worker), slot, s, stop.clone(), all, counted);
                        tokio::task::spawn_local(listen);
                    }
                    listening.insert(l.slot, stop, sockets);
                }
                Some(Command::Unlisten(name)) => listening.remove(&name),
                // Whoever asked may no longer wait.
                Some(Command::Share(to)) => drop(to.send(listening.duplicates())),
                None => break,
            },
            _ = sweep.tick() => {
                pool::sweep(&worker);
                worker.sweep_signals();
                worker.alarms.sweep();
                worker.pipes.sweep();
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
                worker.tokens.borrow_mut().sweep(now);
            }
            () = worker.shared.stop.cancelled() => break,
        }
    }
}

/// Accepts connections until `stop`, and then those that are there already: the kernel resets what it has in its queue
/// when the socket closes, and such a client has connected, so nothing tells it to try elsewhere. Where another process
/// has the socket as well, they are its.
async fn listen(
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    listener: Rc<TcpListener>,
    stop: CancellationToken,
    listening: Rc<Listening>,
    _counted: Rc<Gauge>,
) {
    accept_until(&worker, &slot, &listener, &stop).await;
    let socket = socket2::SockRef::from(&*listener);
    // A worker that is behind takes them as well: nobody comes after them. Whoever still comes has no end.
    for _ in 0..BACKLOG {
        if listening.are_shared() {
            return;
        }
        let Some(admission) = worker.place_for_connection() else { return };
        let stream = match socket.accept() {
            Ok((s, _)) => s,
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionAborted => continue,
            Err(_) => return,
        };
        let stream = std::net::TcpStream::from(stream);
        if let Ok(peer) = stream.peer_addr()
            && stream.set_nonblocking(true).is_ok()
            && let Ok(stream) = TcpStream::from_std(stream)
        {
            serve(&worker, &slot, stream, peer, admission);
        }
    }
}

/// Serves a connection that was accepted.
fn serve(
    worker: &Rc<Worker>,
    slot: &Arc<ListenerSlot>,
    stream: TcpStream,
    peer: SocketAddr,
    admission: Admission,
) {
    let (worker, slot) = (Rc::clone(worker), Arc::clone(slot));
    let Some(place) = worker.client() else {
        tracing::debug!(%peer, listener = %slot.name, "more connections than there may be");
        return;
    };
    // Counted from here, or an engine that stops could take it for none.
    let gauge = Gauge::new(&worker.shared.totals, |t| &t.connections, |t| &t.connections_total);
    tokio::task::spawn_local(async move {
        let _counted = (gauge, place);
        if let Some(serving) = Box::pin(accept::accepted(&worker, &slot, stream, peer)).await {
            serving.await;
        }
        drop(admission);
    });
}

async fn accept_until(
    worker: &Rc<Worker>,
    slot: &Arc<ListenerSlot>,
    listener: &TcpListener,
    stop: &CancellationToken,
) {
    let mut open = worker.shared.open.subscribe();
    tokio::select! {
        r = open.wait_for(|open| *open) => if r.is_err() { return },
        () = stop.cancelled() => return,
    }
    drop(open);
    loop {
        let admission = tokio::select! {
            a = worker.admit() => a,
            () = stop.cancelled() => return,
        };
        let accepted = tokio::select! {
            a = listener.accept() => a,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => serve(worker, slot, stream, peer, admission),
            Err(error) => {
                // Out of file descriptors, or the peer was gone again; neither is helped by trying at once.
                tracing::debug!(%error, listener = %slot.name, "accept");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}
