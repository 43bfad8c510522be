//! Publishing documents.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, RwLock},
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::Document;
use crate::{
    node::NodeInfo,
    pb,
    server::{AdsService, PeerInfo, ResourceSource, TypeSnapshot, conn},
};

/// Streams end at once when the server stops; this is for the last bytes of their goodbye.
const DRAIN: Duration = Duration::from_secs(2);

/// Publishes documents to [`super::ConfigClient`]s. Clones share their state.
#[derive(Clone)]
pub struct ConfigServer {
    service: AdsService<Store>,
}

struct Store {
    types: RwLock<BTreeMap<String, Arc<TypeSnapshot>>>,
    changes: watch::Sender<u64>,
    empty: Arc<TypeSnapshot>,
}

impl Default for ConfigServer {
    fn default() -> Self {
        Self::new()
    }
}

impl ConfigServer {
    /// A server without documents.
    #[must_use]
    pub fn new() -> Self {
        let store = Store {
            types: RwLock::new(BTreeMap::new()),
            changes: watch::Sender::new(0),
            empty: Arc::default(),
        };
        Self { service: AdsService::new(Arc::new(store)) }
    }

    /// Replaces all documents of the given types; types that are not mentioned stay. Clients are
    /// told only of documents that differ.
    pub fn publish(&self, types: BTreeMap<String, BTreeMap<String, Document>>) {
        let built: Vec<(String, Arc<TypeSnapshot>)> = types
            .into_iter()
            .map(|(t, docs)| {
                let resources = docs.into_iter().map(|(name, mut d)| {
                    d.name.clone_from(&name);
                    (name, d.to_any())
                });
                (t, Arc::new(TypeSnapshot::build(resources)))
            })
            .collect();
        self.install(built);
    }

    /// Replaces all documents of one type.
    pub fn publish_type(&self, type_url: &str, docs: BTreeMap<String, Document>) {
        self.publish(BTreeMap::from([(type_url.to_owned(), docs)]));
    }

    /// Adds, replaces or (with `None`) removes single documents of a type; cheaper than
    /// [`ConfigServer::publish`] when few of many change.
    pub fn update(&self, type_url: &str, docs: impl IntoIterator<Item = (String, Option<Document>)>) {
        let store = self.service.source();
        let current = store.get(type_url);
        let mut anys: BTreeMap<String, pb::Any> = current
            .resources
            .iter()
            .filter_map(|(n, r)| r.resource.clone().map(|a| (n.clone(), a)))
            .collect();
        for (name, doc) in docs {
            match doc {
                Some(mut d) => {
                    d.name.clone_from(&name);
                    anys.insert(name, d.to_any());
                }
                None => {
                    anys.remove(&name);
                }
            }
        }
        self.install(vec![(type_url.to_owned(), Arc::new(TypeSnapshot::build(anys)))]);
    }

    fn install(&self, built: Vec<(String, Arc<TypeSnapshot>)>) {
        let store = self.service.source();
        let mut changed = false;
        {
            let mut map = store.types.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            for (t, snapshot) in built {
                if map.get(&t).is_none_or(|old| old.version != snapshot.version) {
                    map.insert(t, snapshot);
                    changed = true;
                }
            }
        }
        if changed {
            store.changes.send_modify(|v| *v += 1);
        }
    }

    /// The gRPC service, for a server that carries others as well.
    #[must_use]
    pub fn service(&self) -> impl ConfigService {
        self.service.clone()
    }

    /// As [`ConfigServer::service`], with streams that end when `stop` is cancelled.
    #[must_use]
    pub fn service_until(&self, stop: CancellationToken) -> impl ConfigService {
        self.service.until(stop)
    }

    /// Clients and what they have acknowledged.
    #[must_use]
    pub fn status(&self) -> Arc<crate::server::StatusBoard> {
        self.service.status()
    }

    /// Serves on a unix socket (mode 0600) until `stop`.
    ///
    /// # Errors
    /// If the socket cannot be bound, or the server fails.
    pub async fn serve_unix(&self, path: &Path, stop: CancellationToken) -> io::Result<()> {
        let listener = conn::bind_unix(path)?;
        self.serve(conn::unix(listener), stop).await
    }

    /// Serves accepted connections until `stop`.
    ///
    /// # Errors
    /// If the server fails.
    pub async fn serve<I>(&self, incoming: I, stop: CancellationToken) -> io::Result<()>
    where
        I: futures::Stream<Item = io::Result<conn::Conn>> + Send + 'static,
    {
        let served = tonic::transport::Server::builder()
            .add_service(self.service.until(stop.clone()))
            .serve_with_incoming_shutdown(Box::pin(incoming), stop.clone().cancelled_owned());
        let late = async {
            stop.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        };
        tokio::select! {
            r = served => r.map_err(io::Error::other),
            () = late => Ok(()),
        }
    }
}

/// What [`ConfigServer::service`] returns: add it to a tonic server.
pub trait ConfigService:
    tower::Service<
        tonic::codegen::http::Request<tonic::body::Body>,
        Response = tonic::codegen::http::Response<tonic::body::Body>,
        Error = std::convert::Infallible,
        Future: Send + 'static,
    > + tonic::server::NamedService
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl ConfigService for AdsService<Store> {}

impl Store {
    fn get(&self, type_url: &str) -> Arc<TypeSnapshot> {
        let map = self.types.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        map.get(type_url).cloned().unwrap_or_else(|| self.empty.clone())
    }
}

impl ResourceSource for Store {
    fn snapshot(&self, _: &NodeInfo, type_url: &str) -> Arc<TypeSnapshot> {
        self.get(type_url)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Documents are for the control plane of this cluster: its socket's file mode, or the
    /// loopback address it is bound to, is what keeps others out.
    fn authorize(&self, peer: &PeerInfo, _: &NodeInfo) -> Result<(), Status> {
        match peer.address {
            Some(a) if !a.ip().is_loopback() => {
                Err(Status::permission_denied("configuration is served on this host only"))
            }
            _ => Ok(()),
        }
    }
}
