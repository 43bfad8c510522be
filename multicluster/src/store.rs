//! What the federation component keeps in its state directory.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_identity::TrustBundle;
use mesh_model::{ClusterId, TrustDomain};
use mesh_runtime::files::write_private;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{bundle::follow::ByBundle, exchange::Persisted, membership::Bundle, revocation, wire::Member};

/// Files below `<state>/federation`.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    dir: PathBuf,
    /// A directory into which somebody writes cannot be removed.
    writing: Arc<Mutex<()>>,
}

/// A join token as its issuer remembers it: never the secret, only its hash.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct IssuedToken {
    pub(crate) secret_sha256: String,
    /// Seconds since the epoch.
    pub(crate) expires: u64,
    /// Who joined with it, and the SHA-256 of its request: only the very same join may be repeated.
    pub(crate) used: Option<(ClusterId, String)>,
    /// The epoch that the cluster had then; 0 if it was unknown. One that left in a later epoch does not come back with
    /// what let it in.
    #[serde(default)]
    pub(crate) epoch: u64,
    /// Only for a newcomer that keeps its own root, of this trust domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) federate: Option<TrustDomain>,
}

/// A bundle of another trust domain.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeptBundle {
    trust_domain: TrustDomain,
    generation: u64,
    /// As SPIFFE writes it.
    document: String,
}

/// A bundle of a declared trust domain, as its endpoint told it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeptByBundle {
    trust_domain: TrustDomain,
    /// Of what was declared.
    fingerprint: String,
    document: String,
}

/// Members by cluster; this cluster is among them once it is in a mesh.
pub(crate) type Members = BTreeMap<ClusterId, Member>;
/// Tokens by id.
pub(crate) type Tokens = BTreeMap<String, IssuedToken>;

impl Store {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("federation"), writing: Arc::default() }
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T: DeserializeOwned + Default>(&self, name: &str) -> io::Result<T> {
        let path = self.dir.join(name);
        let bytes = match std::fs::read(&path) {
            Ok(b) => b,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(T::default()),
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
        };
        serde_json::from_slice(&bytes)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display())))
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(value)?;
        let _alone = self.alone();
        write_private(&self.dir.join(name), &bytes)
    }

    pub(crate) fn members(&self) -> io::Result<Members> {
        self.read("members.json")
    }

    pub(crate) fn save_members(&self, m: &Members) -> io::Result<()> {
        self.write("members.json", m)
    }

    pub(crate) fn bundles(&self) -> io::Result<Vec<Bundle>> {
        let kept: Vec<KeptBundle> = self.read("bundles.json")?;
        let read = |k: KeptBundle| {
            let bundle = TrustBundle::parse(k.trust_domain, &k.document)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("bundles.json: {e}")))?;
            Ok(Bundle { generation: k.generation, bundle })
        };
        kept.into_iter().map(read).collect()
    }

    pub(crate) fn save_bundles<'a>(&self, all: impl Iterator<Item = &'a Bundle>) -> io::Result<()> {
        let kept = all.map(|b| KeptBundle {
            trust_domain: b.bundle.trust_domain.clone(),
            generation: b.generation,
            document: b.bundle.document(),
        });
        self.write("bundles.json", &kept.collect::<Vec<_>>())
    }

    /// What endpoints told before a restart. It is asked for again, so that what is damaged is left out.
    pub(crate) fn by_bundle(&self) -> BTreeMap<TrustDomain, ByBundle> {
        let kept: Vec<KeptByBundle> = self.read("declared-bundles.json").unwrap_or_else(|error| {
            tracing::warn!(%error, "kept bundles of declared trust domains are unreadable; they are asked for again");
            vec![]
        });
        let read = |k: KeptByBundle| {
            let bundle = TrustBundle::parse(k.trust_domain.clone(), &k.document);
            let bundle =
                bundle.inspect_err(|error| tracing::warn!(%error, "a kept bundle is left out")).ok()?;
            Some((k.trust_domain, ByBundle::kept(bundle, k.fingerprint)))
        };
        kept.into_iter().filter_map(read).collect()
    }

    pub(crate) fn save_by_bundle(&self, all: &BTreeMap<TrustDomain, ByBundle>) -> io::Result<()> {
        let kept = all.iter().filter(|(_, b)| b.fetched).filter_map(|(domain, b)| {
            let document = b.bundle.as_ref()?.document();
            Some(KeptByBundle { trust_domain: domain.clone(), fingerprint: b.fingerprint.clone(), document })
        });
        self.write("declared-bundles.json", &kept.collect::<Vec<_>>())
    }

    /// What others told that was revoked. It is told again, but maybe not before it is needed.
    pub(crate) fn revoked(&self) -> io::Result<revocation::Kept> {
        self.read("revoked.json")
    }

    pub(crate) fn save_revoked(&self, all: &revocation::Kept) -> io::Result<()> {
        self.write("revoked.json", all)
    }

    pub(crate) fn tokens(&self) -> io::Result<Tokens> {
        self.read("tokens.json")
    }

    pub(crate) fn save_tokens(&self, t: &Tokens) -> io::Result<()> {
        self.write("tokens.json", t)
    }

    pub(crate) fn import(&self, peer: &ClusterId) -> Persisted {
        // A damaged copy of what a peer will send again is worth a line in the log, not a stop.
        self.read(&format!("imports/{peer}.json")).unwrap_or_else(|error| {
            tracing::warn!(%peer, %error, "kept imports are unreadable; starting without them");
            Persisted::default()
        })
    }

    pub(crate) fn save_import(&self, peer: &ClusterId, p: &Persisted) -> io::Result<()> {
        self.write(&format!("imports/{peer}.json"), p)
    }

    pub(crate) fn drop_import(&self, peer: &ClusterId) -> io::Result<()> {
        match std::fs::remove_file(self.dir.join(format!("imports/{peer}.json"))) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Forgets everything about the mesh that was left.
    pub(crate) fn clear(&self) -> io::Result<()> {
        let _alone = self.alone();
        match std::fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}
