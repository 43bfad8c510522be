//! A generic ADS server: state of the world and delta, over any source of named resources.
//!
//! The protocol lives in [`state`], which does no I/O. [`AdsService`] runs one [`state::Session`]
//! per stream; [`conn`] accepts connections; [`status`] keeps what every client has acknowledged,
//! which is what `proxy-status` shows.

mod asked;
pub mod conn;
mod frames;
mod layer;
mod names;
mod service;
pub mod state;
pub mod status;

use std::{fmt, sync::Arc};

pub use asked::{MAX_NAME, MAX_STRANGERS};
pub use conn::{PeerInfo, Transport};
pub use layer::Layer;
pub use service::{AdsService, SecretService};
pub use status::{ClientStatus, StatusBoard, TypeStatus};
use tokio::sync::watch;

use crate::{node::NodeInfo, pb};

/// All resources of one type as one client sees them.
#[derive(Debug, Clone, Default)]
pub struct TypeSnapshot {
    /// Version of the whole, shown to operators. Two snapshots with equal resources should have
    /// equal versions.
    pub version: String,
    layers: Vec<Arc<Layer>>,
    /// What the client gets besides, of what it asks for by name.
    on_demand: Option<Arc<dyn OnDemand>>,
}

/// Resources of one type that a client gets only if it asks for them, by names that traffic brings. Nothing that the
/// client may not see is among them.
pub trait OnDemand: fmt::Debug + Send + Sync {
    /// What a name leads to.
    fn resolve(&self, name: &str) -> Option<Resolved>;
}

/// What a name leads to.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The resource; its name may be another.
    pub resource: Arc<pb::Resource>,
    /// It was made for this name, and there is no end to such names.
    pub made: bool,
}

impl OnDemand for Layer {
    fn resolve(&self, name: &str) -> Option<Resolved> {
        self.get(name).map(|r| Resolved { resource: Arc::clone(r), made: false })
    }
}

impl TypeSnapshot {
    /// Builds a snapshot from resources that have a version each.
    #[must_use]
    pub fn from_versions(resources: impl IntoIterator<Item = pb::Resource>) -> Self {
        Self::of(vec![Layer::new(resources.into_iter().map(Arc::new).collect())])
    }

    /// Builds a snapshot from encoded resources; versions are content hashes.
    #[must_use]
    pub fn build(resources: impl IntoIterator<Item = (String, pb::Any)>) -> Self {
        Self::from_versions(resources.into_iter().map(|(name, any)| {
            let version = content_version(&any.value);
            pb::Resource { version, resource: Some(any), name, ..Default::default() }
        }))
    }

    /// A snapshot of layers, none of which has a name of another.
    #[must_use]
    pub fn of(layers: Vec<Arc<Layer>>) -> Self {
        let mut filled = layers.iter().filter(|l| !l.is_empty());
        let version = match (filled.next(), filled.next()) {
            (None, _) => VersionHasher::default().finish(),
            (Some(only), None) => only.version.clone(),
            _ => {
                let mut whole = VersionHasher::default();
                for l in layers.iter().filter(|l| !l.is_empty()) {
                    whole.write(l.version.as_bytes());
                }
                whole.finish()
            }
        };
        Self { version, layers, on_demand: None }
    }

    /// The same with what a client may ask for besides (delta only).
    #[must_use]
    pub fn with_on_demand(self, on_demand: Option<Arc<dyn OnDemand>>) -> Self {
        Self { on_demand, ..self }
    }

    /// What a client may ask for besides.
    #[must_use]
    pub fn on_demand(&self) -> Option<&Arc<dyn OnDemand>> {
        self.on_demand.as_ref()
    }

    /// The resource of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<pb::Resource>> {
        self.layers.iter().find_map(|l| l.get(name))
    }

    /// All resources.
    pub fn resources(&self) -> impl Iterator<Item = &Arc<pb::Resource>> {
        self.layers.iter().flat_map(|l| l.resources())
    }

    /// What it is made of.
    #[must_use]
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }
}

/// Version of a resource: a hash of its encoding, equal on every replica and after every restart,
/// so that a client that reconnects elsewhere is sent only what differs.
#[must_use]
pub fn content_version(bytes: &[u8]) -> String {
    let mut h = VersionHasher::default();
    h.write(bytes);
    h.finish()
}

/// SHA-256 cut to 128 bits: stable across builds and processes, which `std`'s hasher does not
/// promise, and in assembly, so that hashing costs less than encoding even in debug builds. Small
/// writes are collected, as a serialiser makes many.
pub(crate) struct VersionHasher {
    digest: aws_lc_rs::digest::Context,
    buffer: Vec<u8>,
}

/// Bytes collected before they are hashed.
const HASH_BUFFER: usize = 4096;

impl Default for VersionHasher {
    fn default() -> Self {
        let digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        Self { digest, buffer: Vec::with_capacity(HASH_BUFFER) }
    }
}

impl VersionHasher {
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        if self.buffer.len() + bytes.len() > HASH_BUFFER {
            self.digest.update(&self.buffer);
            self.buffer.clear();
        }
        if bytes.len() > HASH_BUFFER {
            self.digest.update(bytes);
        } else {
            self.buffer.extend_from_slice(bytes);
        }
    }

    pub(crate) fn finish(mut self) -> String {
        self.digest.update(&self.buffer);
        let digest = self.digest.finish();
        digest.as_ref().iter().take(16).map(|b| format!("{b:02x}")).collect()
    }
}

/// Where an ADS server gets its resources.
pub trait ResourceSource: Send + Sync + 'static {
    /// Everything of a type that `node` may see; must be cheap when nothing changed. An unknown
    /// type is an empty snapshot.
    fn snapshot(&self, node: &NodeInfo, type_url: &str) -> Arc<TypeSnapshot>;

    /// Changes value whenever a snapshot may differ. Debouncing is the source's business.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Whether this peer may speak for this node.
    ///
    /// # Errors
    /// The status that the stream is closed with.
    fn authorize(&self, peer: &PeerInfo, node: &NodeInfo) -> Result<(), tonic::Status>;

    /// A client came. Lets a source tie its cache to clients that exist.
    fn connected(&self, _node: &NodeInfo) {}

    /// A client went.
    fn disconnected(&self, _node: &NodeInfo) {}
}
