//! A generic ADS client that outlives its server.
//!
//! It keeps the versions it accepted, so that a reconnect transfers only what differs; it
//! reconnects with jittered back-off for ever; and it rejects bad resources by name while the rest
//! applies. What it should be subscribed to is state, not a queue of commands: any number of
//! changes while it is disconnected collapse into the next request.

mod connect;
mod expiry;
pub mod proxy;
mod stream;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

pub use connect::{ConnectError, Endpoint, channel, lazy_channel};
use rand::RngExt as _;
use tokio::sync::{Notify, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;

pub use crate::server::state::Mode;
use crate::{node::NodeInfo, pb, type_url};

/// First delay before a reconnect; doubles with jitter.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest delay before a reconnect. Short, because a control plane that is back should be used, and
/// jittered, because its clients all come back at once.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// What a client needs to know.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// The server.
    pub endpoint: Endpoint,
    /// Who we are at first; see [`Subscriptions::set_node`].
    pub node: NodeInfo,
    /// Variant of the protocol; delta unless the server has none.
    pub mode: Mode,
}

/// The connection that carries a client's stream, while there is one: for other calls to the same server, which need no
/// connection of their own then.
pub type Connection = watch::Receiver<Option<Channel>>;

/// Which resources of a type are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// All there are.
    All,
    /// All there are, and these, which a server need not count among them (delta only).
    AllAnd(BTreeSet<String>),
    /// These; an empty set subscribes to nothing.
    Some(BTreeSet<String>),
}

/// A change to one type.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// New and changed resources.
    pub changed: Vec<pb::Resource>,
    /// Names that no longer exist.
    pub removed: Vec<String>,
}

/// A resource that the receiver cannot use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Its name.
    pub name: String,
    /// Why, in terms of the resource's fields.
    pub reason: String,
}

/// Receives what an [`AdsClient`] learns. Called from the client's task, one call at a time.
pub trait Handler: Send + 'static {
    /// A response. Everything that is not in the returned list must be applied: the client
    /// acknowledges it.
    ///
    /// # Errors
    /// The resources that were rejected; they keep their previous version.
    fn on_update(&mut self, type_url: &str, update: Update) -> Result<(), Vec<Rejection>>;

    /// The stream came up or went down.
    fn on_connection(&mut self, _up: bool) {}
}

/// Handle of a running client. Dropping it stops the client.
pub struct AdsClient {
    shared: Arc<Shared>,
    _stop: DropGuard,
}

struct Shared {
    wanted: Mutex<BTreeMap<(u8, String), Names>>,
    /// Names that are to be subscribed although they are, by type.
    again: Mutex<BTreeMap<String, BTreeSet<String>>>,
    node: Mutex<Arc<NodeInfo>>,
    changed: Notify,
    connection: watch::Sender<Option<Channel>>,
}

impl Shared {
    // The map is whole between statements, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(u8, String), Names>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wanted(&self) -> BTreeMap<(u8, String), Names> {
        self.lock().clone()
    }

    fn node(&self) -> Arc<NodeInfo> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn take_again(&self) -> BTreeMap<String, BTreeSet<String>> {
        std::mem::take(&mut *self.again.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Changes subscriptions of a running client; may be given to its [`Handler`].
#[derive(Clone)]
pub struct Subscriptions(Arc<Shared>);

impl Subscriptions {
    /// Replaces the subscription of a type.
    pub fn subscribe(&self, type_url: &str, names: Names) {
        let key = (type_url::push_order(type_url), type_url.to_owned());
        let mut wanted = self.0.lock();
        if wanted.get(&key) != Some(&names) {
            wanted.insert(key, names);
            drop(wanted);
            self.0.changed.notify_one();
        }
    }

    /// Asks once more for names that are subscribed (delta only).
    pub fn again(&self, type_url: &str, names: BTreeSet<String>) {
        let mut again = self.0.again.lock().unwrap_or_else(PoisonError::into_inner);
        again.entry(type_url.to_owned()).or_default().extend(names);
        drop(again);
        self.0.changed.notify_one();
    }
}

impl Subscriptions {
    /// Says who we are from now on. A node belongs to a stream, so a new one begins, over the same connection; what was
    /// accepted is not sent again.
    pub fn set_node(&self, node: NodeInfo) {
        *self.0.node.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(node);
        self.0.changed.notify_one();
    }
}

impl Names {
    /// Whether all are wanted, and which besides.
    fn parts(&self) -> (bool, &BTreeSet<String>) {
        static NONE: BTreeSet<String> = BTreeSet::new();
        match self {
            Self::All => (true, &NONE),
            Self::AllAnd(names) => (true, names),
            Self::Some(names) => (false, names),
        }
    }
}

impl AdsClient {
    /// Starts a client on the current runtime. `handler` is built from the subscriptions so that it
    /// can change them itself.
    pub fn start<H, F>(options: ClientOptions, initial: &[(&str, Names)], handler: F) -> Self
    where
        H: Handler,
        F: FnOnce(Subscriptions) -> H,
    {
        Self::start_from(options, initial, BTreeMap::new(), handler)
    }

    /// Like [`AdsClient::start`] for a receiver that has resources already: `known` is their
    /// versions by type and name, and the server sends only what differs (delta only).
    pub fn start_from<H, F>(
        options: ClientOptions,
        initial: &[(&str, Names)],
        known: BTreeMap<String, BTreeMap<String, String>>,
        handler: F,
    ) -> Self
    where
        H: Handler,
        F: FnOnce(Subscriptions) -> H,
    {
        let wanted =
            initial.iter().map(|(t, n)| ((type_url::push_order(t), (*t).to_owned()), n.clone())).collect();
        let shared = Arc::new(Shared {
            wanted: Mutex::new(wanted),
            again: Mutex::default(),
            node: Mutex::new(Arc::new(options.node.clone())),
            changed: Notify::new(),
            connection: watch::Sender::new(None),
        });
        let handler = handler(Subscriptions(shared.clone()));
        let token = CancellationToken::new();
        let task = run(options, shared.clone(), handler, known);
        let stop = token.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
        Self { shared, _stop: token.drop_guard() }
    }

    /// Its subscriptions.
    #[must_use]
    pub fn subscriptions(&self) -> Subscriptions {
        Subscriptions(self.shared.clone())
    }

    /// Its connection.
    #[must_use]
    pub fn connection(&self) -> Connection {
        self.shared.connection.subscribe()
    }

    /// Replaces the subscription of a type.
    pub fn subscribe(&self, type_url: &str, names: Names) {
        self.subscriptions().subscribe(type_url, names);
    }
}

/// Versions accepted, by type and name.
type Known = BTreeMap<String, BTreeMap<String, String>>;

async fn run<H: Handler>(options: ClientOptions, shared: Arc<Shared>, mut handler: H, mut known: Known) {
    let mut delay = BACKOFF_MIN;
    let mut expiry = expiry::Expiry::default();
    loop {
        let connecting = connect::channel(&options.endpoint);
        let served = match expiry.during(connecting, &mut handler, &mut known).await {
            Ok(channel) => {
                shared.connection.send_replace(Some(channel.clone()));
                let answered = loop {
                    let node = shared.node();
                    let running = stream::run(
                        &options,
                        &node,
                        channel.clone(),
                        &shared,
                        &mut handler,
                        &mut known,
                        &mut expiry,
                    );
                    let outcome = running.await;
                    if outcome.answered {
                        handler.on_connection(false);
                    }
                    tracing::info!(
                        server = %options.endpoint, node = %node.id, reason = %outcome.reason, "xDS stream ended"
                    );
                    if !outcome.renamed {
                        break outcome.answered;
                    }
                };
                shared.connection.send_replace(None);
                answered
            }
            Err(e) => {
                tracing::debug!(server = %options.endpoint, error = %e, "xDS server not reachable");
                false
            }
        };
        if served {
            delay = BACKOFF_MIN;
        }
        // Full jitter over the upper half: never immediate, never in step with others.
        let wait = delay.mul_f64(0.5 + rand::rng().random::<f64>() / 2.0);
        expiry.during(tokio::time::sleep(wait), &mut handler, &mut known).await;
        delay = (delay * 2).min(BACKOFF_MAX);
    }
}
