//! Workloads that registered themselves in a `WorkloadGroup`, as virtual machines do.
//!
//! Each becomes a `WorkloadEntry` of the group's template for as long as its proxy repeats that it is there. The entry is
//! served while the proxy says that its workload is healthy; a workload that is about to end gets no more traffic before
//! it is forgotten. They are kept on disk, so that a restart of the control plane takes nobody out of service.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use mesh_model::{
    authored::{WorkloadEntry, WorkloadGroup},
    registry::Labels,
};
use mesh_xds::{
    NodeInfo, NodeKind, PeerInfo, ResourceSource as _,
    registration::{HOLDS, RegistrationSink, State, Workload},
    server::Transport,
};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};
use tonic::Status;

use crate::{
    config::{Config, Doc},
    index::{HEALTH, TLS_MODE},
    proxy::ProxyNode,
    source::PilotSource,
};

/// Annotation of an entry that registered itself: its group (Istio's).
pub(crate) const GROUP: &str = "istio.io/autoRegistrationGroup";
/// Workloads that are known at a time.
const MAX_WORKLOADS: usize = 65_536;
const FILE: &str = "workloads.json";
/// How often it is looked who has fallen silent.
const SWEEP: Duration = Duration::from_secs(1);

/// Who registered: namespace, group, address.
type Key = (String, String, IpAddr);

/// All that is known.
pub(crate) type Joined = BTreeMap<Key, Told>;

/// What is known of one of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    namespace: String,
    group: String,
    address: IpAddr,
    network: String,
    locality: String,
    service_account: String,
    labels: Labels,
    healthy: bool,
    leaving: bool,
    reason: String,
    /// Seconds since the epoch.
    since: u64,
}

impl Told {
    fn key(&self) -> Key {
        (self.namespace.clone(), self.group.clone(), self.address)
    }

    /// The entry that it becomes. What the workload says of itself comes before the group's metadata, and that before the
    /// template, as in Istio.
    fn entry(&self, group: &Doc<WorkloadGroup>) -> Doc<WorkloadEntry> {
        let spec = &group.spec;
        let mut entry = spec.template.clone().unwrap_or_default();
        entry.address = self.address.to_string();
        let metadata = spec.metadata.clone().unwrap_or_default();
        entry.labels.extend(metadata.labels);
        entry.labels.extend(self.labels.clone());
        // Its proxy is the one that says so.
        entry.labels.entry(TLS_MODE.to_owned()).or_insert_with(|| "istio".to_owned());
        if !self.network.is_empty() {
            entry.network.clone_from(&self.network);
        }
        if !self.locality.is_empty() {
            entry.locality.clone_from(&self.locality);
        }
        let mut annotations = metadata.annotations;
        annotations.insert(GROUP.to_owned(), group.name.clone());
        let health = match (self.leaving, self.healthy || spec.probe.is_none()) {
            (true, _) => Some("draining"),
            (false, false) => Some("unhealthy"),
            (false, true) => None,
        };
        annotations.extend(health.map(|h| (HEALTH.to_owned(), h.to_owned())));
        Doc {
            name: format!("{}-{}", group.name, self.address.to_string().replace(':', "-")),
            namespace: self.namespace.clone(),
            created: self.since,
            labels: Arc::default(),
            annotations: Arc::new(annotations),
            spec: Arc::new(entry),
        }
    }
}

/// One of them, in `/debug/workloadz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadStatus {
    /// `namespace/name` of the group.
    pub group: String,
    /// Its address.
    pub address: IpAddr,
    /// `healthy`, `unhealthy`, `leaving`.
    pub state: String,
    /// Why it is not healthy.
    pub reason: String,
    /// Seconds since it was heard of.
    pub age_seconds: u64,
}

/// All that are known.
pub struct Workloads {
    source: Arc<PilotSource>,
    told: watch::Sender<Arc<Joined>>,
    heard: Mutex<HashMap<Key, Instant>>,
    file: Option<PathBuf>,
}

impl Workloads {
    /// With those that were known before a restart, if `keep` is the directory in which they are kept: each has as long to
    /// repeat itself as if it had just done so.
    pub(crate) fn new(source: Arc<PilotSource>, keep: Option<PathBuf>) -> Self {
        let file = keep.map(|d| d.join(FILE));
        let mut told = Joined::new();
        if let Some(f) = &file {
            let read = match std::fs::read(f) {
                Ok(bytes) => serde_json::from_slice::<Vec<Told>>(&bytes).map_err(|e| e.to_string()),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(vec![]),
                Err(e) => Err(e.to_string()),
            };
            match read {
                Ok(all) => told.extend(all.into_iter().map(|t| (t.key(), t))),
                Err(error) => {
                    tracing::warn!(file = %f.display(), error, "workloads that registered themselves are not known until they report again");
                }
            }
        }
        let heard = told.keys().map(|k| (k.clone(), Instant::now())).collect();
        Self { source, told: watch::Sender::new(Arc::new(told)), heard: Mutex::new(heard), file }
    }

    /// Changes with every change of what is known.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Joined>> {
        self.told.subscribe()
    }

    /// Forgets who has fallen silent and keeps the others on disk, for as long as it is polled.
    pub(crate) async fn keep(&self) {
        let mut changes = self.told.subscribe();
        loop {
            tokio::time::sleep(SWEEP).await;
            self.sweep();
            if changes.has_changed().unwrap_or(false) {
                let all: Vec<Told> = changes.borrow_and_update().values().cloned().collect();
                self.write(all).await;
            }
        }
    }

    fn sweep(&self) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let silent: Vec<Key> =
            heard.iter().filter(|(_, at)| at.elapsed() > HOLDS).map(|(k, _)| k.clone()).collect();
        for k in &silent {
            heard.remove(k);
            tracing::info!(group = %format!("{}/{}", k.0, k.1), address = %k.2, "a workload is gone");
        }
        drop(heard);
        if !silent.is_empty() {
            self.told.send_modify(|all| {
                let all = Arc::make_mut(all);
                silent.iter().for_each(|k| drop(all.remove(k)));
            });
        }
    }

    async fn write(&self, all: Vec<Told>) {
        let Some(file) = self.file.clone() else { return };
        let Ok(bytes) = serde_json::to_vec(&all) else { return };
        let shown = file.display().to_string();
        let written = tokio::task::spawn_blocking(move || mesh_runtime::files::write_private(&file, &bytes));
        if let Ok(Err(error)) = written.await {
            tracing::warn!(file = shown, %error, "workloads that registered themselves cannot be kept over a restart");
        }
    }

    /// For operators.
    #[must_use]
    pub fn all(&self) -> Vec<WorkloadStatus> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let told = self.told.borrow();
        let status = |(k, t): (&Key, &Told)| WorkloadStatus {
            group: format!("{}/{}", t.namespace, t.group),
            address: t.address,
            state: if t.leaving {
                "leaving"
            } else if t.healthy {
                "healthy"
            } else {
                "unhealthy"
            }
            .to_owned(),
            reason: t.reason.clone(),
            age_seconds: heard.get(k).map_or(0, |at| at.elapsed().as_secs()),
        };
        told.iter().map(status).collect()
    }

    fn admit(&self, fresh: Told) -> Result<(), Status> {
        let key = fresh.key();
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.told.borrow().get(&key).cloned();
        match &before {
            Some(b) if b.service_account != fresh.service_account => {
                return Err(Status::already_exists(format!("another workload has registered {}", key.2)));
            }
            None if heard.len() >= MAX_WORKLOADS => {
                return Err(Status::resource_exhausted(format!("{MAX_WORKLOADS} workloads are registered")));
            }
            _ => {}
        }
        heard.insert(key.clone(), Instant::now());
        drop(heard);
        let fresh = Told { since: before.as_ref().map_or(fresh.since, |b| b.since), ..fresh };
        if before.as_ref() != Some(&fresh) {
            self.told.send_modify(|all| drop(Arc::make_mut(all).insert(key, fresh)));
        }
        Ok(())
    }
}

impl RegistrationSink for Workloads {
    /// A sidecar may register its workload in a group of its own namespace whose template has its service account.
    fn register(&self, peer: &PeerInfo, node: NodeInfo, what: Workload) -> Result<Option<String>, Status> {
        self.source.authorize(peer, &node)?;
        if node.kind != NodeKind::Sidecar {
            return Err(Status::invalid_argument("only the sidecar of a workload registers it"));
        }
        let proxy = ProxyNode::new(&node).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let Some(address) = proxy.addresses.first().copied() else {
            return Err(Status::invalid_argument("the node has no address"));
        };
        // A certificate does not tell an address, and traffic of the group's services goes to this one.
        let from = peer.address.map(|a| a.ip().to_canonical());
        if peer.transport == Transport::Tls && from != Some(address) {
            return Err(Status::permission_denied(format!(
                "a workload may register its own address only: it says {address}, and comes from {}",
                from.map_or("nowhere".to_owned(), |a| a.to_string())
            )));
        }
        let world =
            self.source.world().ok_or_else(|| Status::unavailable("configuration has not been read yet"))?;
        let Some(group) = world.config.group(&proxy.namespace, &what.group) else {
            let text =
                format!("there is no WorkloadGroup {}/{}: apply one first", proxy.namespace, what.group);
            return Err(Status::not_found(text));
        };
        let account = group.spec.template.as_ref().map_or("", |t| t.service_account.as_str());
        let account = if account.is_empty() { "default" } else { account };
        if account != proxy.service_account {
            return Err(Status::permission_denied(format!(
                "workloads of WorkloadGroup {}/{} run as {account}, and this one as {}: correct \
                 template.serviceAccount, or --service-account",
                proxy.namespace, what.group, proxy.service_account
            )));
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.admit(Told {
            namespace: proxy.namespace,
            group: what.group,
            address,
            network: proxy.network.map(|n| n.to_string()).unwrap_or_default(),
            locality: proxy.locality.to_string(),
            service_account: proxy.service_account,
            labels: proxy.labels,
            healthy: what.state == State::Healthy,
            leaving: what.state == State::Leaving,
            reason: what.reason,
            since: now,
        })?;
        let probe = group.spec.probe.as_ref();
        Ok(probe.and_then(|p| serde_json::to_string(p).ok()))
    }
}

impl Config {
    pub(crate) fn group(&self, namespace: &str, name: &str) -> Option<&Doc<WorkloadGroup>> {
        self.workload_groups.iter().find(|g| g.namespace == namespace && g.name == name)
    }

    /// Adds the workloads that registered themselves. A document of the same name comes before them.
    pub(crate) fn join(&mut self, told: &Joined) {
        let authored: std::collections::HashSet<(String, String)> =
            self.workload_entries.iter().map(|w| (w.namespace.clone(), w.name.clone())).collect();
        for t in told.values() {
            let Some(entry) = self.group(&t.namespace, &t.group).map(|g| t.entry(g)) else { continue };
            if authored.contains(&(entry.namespace.clone(), entry.name.clone())) {
                continue;
            }
            let who = (t.service_account.clone(), entry.spec.labels.clone());
            self.joined.insert((t.namespace.clone(), t.address), who);
            self.workload_entries.push(entry);
        }
        self.sort();
    }
}

#[cfg(test)]
mod tests;
