//! Reading documents.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tokio::sync::watch;

use super::Document;
use crate::client::{AdsClient, ClientOptions, Endpoint, Handler, Mode, Names, Rejection, Update};
use crate::node::NodeInfo;

/// All documents of the subscribed types.
#[derive(Debug, Clone, Default)]
pub struct ConfigState {
    /// By type, then by name.
    pub documents: BTreeMap<String, BTreeMap<String, Arc<Document>>>,
    /// Types that the server has answered at least once: an absent document of such a type does
    /// not exist.
    pub received: BTreeSet<String>,
    /// Whether every subscribed type was received.
    pub synced: bool,
    /// Whether the server is connected now; without it the state is the last known one.
    pub connected: bool,
}

impl ConfigState {
    /// Documents of a type by name.
    pub fn of(&self, type_url: &str) -> impl Iterator<Item = (&String, &Arc<Document>)> {
        self.documents.get(type_url).into_iter().flatten()
    }
}

/// Follows a [`super::ConfigServer`]. Dropping it ends the connection.
pub struct ConfigClient {
    _client: AdsClient,
    state: watch::Receiver<Arc<ConfigState>>,
}

struct Follow {
    wanted: BTreeSet<String>,
    state: watch::Sender<Arc<ConfigState>>,
}

impl Handler for Follow {
    fn on_update(&mut self, type_url: &str, update: Update) -> Result<(), Vec<Rejection>> {
        let mut rejected = Vec::new();
        let mut changed = Vec::new();
        for r in update.changed {
            let decoded = match r.resource {
                Some(any) => Document::from_any(&any).map_err(|e| e.to_string()),
                None => Err("no resource".to_owned()),
            };
            match decoded {
                Ok(d) => changed.push((r.name, Arc::new(d))),
                Err(reason) => rejected.push(Rejection { name: r.name, reason }),
            }
        }
        self.state.send_modify(|s| {
            let s = Arc::make_mut(s);
            let docs = s.documents.entry(type_url.to_owned()).or_default();
            docs.extend(changed);
            for name in &update.removed {
                docs.remove(name);
            }
            s.received.insert(type_url.to_owned());
            s.synced = self.wanted.iter().all(|t| s.received.contains(t));
        });
        if rejected.is_empty() { Ok(()) } else { Err(rejected) }
    }

    fn on_connection(&mut self, up: bool) {
        self.state.send_modify(|s| Arc::make_mut(s).connected = up);
    }
}

impl ConfigClient {
    /// Subscribes to all documents of `types`.
    #[must_use]
    pub fn start(endpoint: Endpoint, node: NodeInfo, types: &[&str]) -> Self {
        let (tx, rx) = watch::channel(Arc::default());
        let handler = Follow { wanted: types.iter().map(|t| (*t).to_owned()).collect(), state: tx };
        let initial: Vec<(&str, Names)> = types.iter().map(|t| (*t, Names::All)).collect();
        let options = ClientOptions { endpoint, node, mode: Mode::Delta };
        Self { _client: AdsClient::start(options, &initial, |_| handler), state: rx }
    }

    /// The state as it changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<ConfigState>> {
        self.state.clone()
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> Arc<ConfigState> {
        self.state.borrow().clone()
    }
}
