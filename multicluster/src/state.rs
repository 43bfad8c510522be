//! The federation component's state: members, tokens, exports, imports.
//!
//! One lock over small tables; nothing awaits while holding it. Every change of what others read
//! goes through [`Shared::publish`], which serves it to pilot.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mesh_identity::SecretStore;
use mesh_model::{
    ClusterId,
    federation::{ImportedService, LeaseState, PeerCluster, type_url},
};
use mesh_xds::mcp::{ConfigServer, Document};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    FederationOptions,
    exchange::{ExportLog, Import, LEASE_MS},
    store::{Members, Store, Tokens},
    wire::Member,
};

/// How a link to a peer stands.
#[derive(Debug, Clone, Default)]
pub(crate) struct LinkStatus {
    pub(crate) connected: bool,
    pub(crate) last_error: String,
}

pub(crate) struct Tables {
    pub(crate) members: Members,
    pub(crate) tokens: Tokens,
    pub(crate) exports: ExportLog,
    pub(crate) imports: BTreeMap<ClusterId, Import>,
    pub(crate) links: BTreeMap<ClusterId, LinkStatus>,
}

pub(crate) struct Shared {
    pub(crate) options: FederationOptions,
    pub(crate) secrets: Arc<SecretStore>,
    pub(crate) store: Store,
    pub(crate) publisher: ConfigServer,
    tables: Mutex<Tables>,
    /// Counts changes of the export log.
    pub(crate) exports_changed: watch::Sender<u64>,
    /// Counts changes of membership.
    pub(crate) members_changed: watch::Sender<u64>,
    /// Ends the streams of peers, which are tasks of their own.
    pub(crate) stop: CancellationToken,
    /// The mesh, while this cluster is in one.
    trust_domain: Mutex<Option<String>>,
    started: Instant,
}

impl Shared {
    pub(crate) fn load(options: FederationOptions, secrets: Arc<SecretStore>) -> io::Result<Self> {
        let store = Store::new(&options.state_dir);
        let members = store.members()?;
        let tokens = store.tokens()?;
        let imports = members
            .values()
            .filter(|m| !m.left && m.cluster != options.cluster)
            .map(|m| (m.cluster.clone(), Import::new(store.import(&m.cluster), 0, u64::from(LEASE_MS))))
            .collect();
        // A log's identity must differ from run to run; 64 random bits do.
        let exports = ExportLog::new(rand::random());
        let shared = Self {
            options,
            secrets,
            store,
            publisher: ConfigServer::new(),
            tables: Mutex::new(Tables { members, tokens, exports, imports, links: BTreeMap::new() }),
            exports_changed: watch::Sender::new(0),
            members_changed: watch::Sender::new(0),
            stop: CancellationToken::new(),
            trust_domain: Mutex::new(None),
            started: Instant::now(),
        };
        shared.publish();
        Ok(shared)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn trust_domain(&self) -> Option<String> {
        self.trust_domain.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_trust_domain(&self, td: Option<String>) {
        *self.trust_domain.lock().unwrap_or_else(PoisonError::into_inner) = td;
    }

    /// A channel to this cluster's CA.
    pub(crate) async fn authority(&self) -> Result<tonic::transport::Channel, tonic::Status> {
        let endpoint = mesh_xds::Endpoint::Unix(self.options.authority_socket.clone());
        mesh_xds::client::channel(&endpoint)
            .await
            .map_err(|e| tonic::Status::unavailable(format!("citadel is not reachable: {e}")))
    }

    /// Milliseconds of this component's steady clock.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// This cluster as it presents itself, at `epoch`.
    pub(crate) fn self_member(&self, epoch: u64) -> Member {
        Member {
            cluster: self.options.cluster.clone(),
            network: self.options.network.clone(),
            gateways: self.options.gateways.clone(),
            transports: self.options.transports.clone(),
            epoch,
            left: false,
        }
    }

    /// Merges what others say of members: the higher epoch wins; nobody else speaks for this cluster.
    /// Answers whether anything changed.
    pub(crate) fn merge_members(&self, news: Vec<Member>) -> io::Result<bool> {
        let mut changed = false;
        {
            let mut t = self.lock();
            // What peers still say to a cluster that has just left is not for it.
            if self.trust_domain().is_none() {
                return Ok(false);
            }
            for m in news {
                if m.cluster == self.options.cluster {
                    continue;
                }
                let known = t.members.get(&m.cluster);
                if known.is_some_and(|k| k.epoch >= m.epoch) {
                    continue;
                }
                changed = true;
                if m.left {
                    t.imports.remove(&m.cluster);
                    t.links.remove(&m.cluster);
                    self.store.drop_import(&m.cluster)?;
                } else if !t.imports.contains_key(&m.cluster) {
                    let kept = self.store.import(&m.cluster);
                    t.imports.insert(m.cluster.clone(), Import::new(kept, self.now(), u64::from(LEASE_MS)));
                }
                t.members.insert(m.cluster.clone(), m);
            }
            if changed {
                self.store.save_members(&t.members)?;
            }
        }
        if changed {
            self.members_changed.send_modify(|n| *n += 1);
            self.publish();
        }
        Ok(changed)
    }

    /// Lets leases lapse; answers whether one did.
    pub(crate) fn tick(&self) -> bool {
        let now = self.now();
        let mut t = self.lock();
        let mut changed = false;
        for (peer, import) in &mut t.imports {
            if import.tick(now).changed {
                tracing::warn!(%peer, "the lease lapsed: its endpoints are used last until it returns");
                changed = true;
            }
        }
        drop(t);
        if changed {
            self.publish();
        }
        changed
    }

    /// Serves imports and peers to pilot; only what differs is sent.
    pub(crate) fn publish(&self) {
        let (mut services, mut peers) = (BTreeMap::new(), BTreeMap::new());
        {
            let t = self.lock();
            for m in t.members.values().filter(|m| !m.left && m.cluster != self.options.cluster) {
                let lease = t.imports.get(&m.cluster).map_or(LeaseState::Lapsed, Import::lease);
                let peer = PeerCluster {
                    id: m.cluster.clone(),
                    network: m.network.clone(),
                    gateways: m.gateways.clone(),
                    transports: m.transports.clone(),
                    lease,
                };
                insert(&mut peers, m.cluster.to_string(), &peer);
                let Some(import) = t.imports.get(&m.cluster) else { continue };
                for s in import.services() {
                    let record = ImportedService { cluster: m.cluster.clone(), lease, service: s.clone() };
                    insert(&mut services, format!("{}/{}.{}", s.namespace, s.name, m.cluster), &record);
                }
            }
        }
        self.publisher.publish(BTreeMap::from([
            (type_url::IMPORTED_SERVICE.to_owned(), services),
            (type_url::PEER_CLUSTER.to_owned(), peers),
        ]));
    }

    /// Waits until every connected reader has acknowledged what is published, at most `limit`.
    /// Answers whether they have.
    pub(crate) async fn settled(&self, limit: Duration) -> bool {
        let board = self.publisher.status();
        let deadline = Instant::now() + limit;
        // A change is sent within one turn of the server's tasks; give it that before looking.
        tokio::time::sleep(Duration::from_millis(50)).await;
        loop {
            let synced = board.clients().iter().all(|c| c.types.values().all(|t| t.state() == "SYNCED"));
            if synced || Instant::now() >= deadline {
                return synced;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn insert<T: serde::Serialize>(docs: &mut BTreeMap<String, Document>, name: String, record: &T) {
    match Document::new(name.clone(), record) {
        Ok(d) => {
            docs.insert(name, d);
        }
        // Records of plain data always serialise to objects.
        Err(error) => tracing::error!(%name, %error, "a record was not published"),
    }
}
