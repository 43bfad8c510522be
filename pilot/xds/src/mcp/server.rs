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
    server::{AdsService, Layer, PeerInfo, ResourceSource, TypeSnapshot, conn, content_version},
};

/// Streams end at once when the server stops; this is for the last bytes of their goodbye.
const DRAIN: Duration = Duration::from_secs(2);

/// Publishes documents to [`super::ConfigClient`]s. Clones share their state.
#[derive(Clone)]
pub struct ConfigServer {
    service: AdsService<Store>,
}

/// What is published of a type.
enum News {
    /// These and no others.
    All(Vec<Arc<pb::Resource>>),
    /// These instead of those of their names, or none.
    Some(BTreeMap<String, Option<Arc<pb::Resource>>>),
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
        let built = types
            .into_iter()
            .map(|(t, docs)| (t, News::All(docs.into_iter().map(|(name, d)| resource(name, d)).collect())))
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
        let news = docs.into_iter().map(|(name, d)| (name.clone(), d.map(|d| resource(name, d)))).collect();
        self.install(vec![(type_url.to_owned(), News::Some(news))]);
    }

    fn install(&self, built: Vec<(String, News)>) {
        let store = self.service.source();
        let mut changed = false;
        {
            let mut map = store.types.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            for (t, news) in built {
                let old = map.get(&t);
                let layer = match (old.and_then(|old| old.layers().first()), news) {
                    (Some(before), News::All(resources)) => before.next(resources),
                    (Some(before), News::Some(news)) => before.with(news),
                    (None, News::All(resources)) => Layer::new(resources),
                    (None, News::Some(news)) => Layer::new(news.into_values().flatten().collect()),
                };
                let snapshot = TypeSnapshot::of(vec![layer]);
                if old.is_none_or(|old| old.version != snapshot.version) {
                    map.insert(t, Arc::new(snapshot));
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

/// A document under its name, with its version.
fn resource(name: String, mut document: Document) -> Arc<pb::Resource> {
    document.name.clone_from(&name);
    let any = document.to_any();
    let version = content_version(&any.value);
    Arc::new(pb::Resource { version, resource: Some(any), name, ..Default::default() })
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
