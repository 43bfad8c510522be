//! Consul as a registry: its services with their instances, followed by blocking queries.
//!
//! `watches` decides what to ask, `agent` asks, `answer` reads what comes back, and `service` makes a service of the
//! mesh of it; only `agent` and this file do I/O. An agent that does not answer takes nothing away: its last known
//! services stay, also over a restart of this process, and the debug page, a metric and the log say so.

mod agent;
mod answer;
mod service;
#[cfg(test)]
mod tests;
mod watches;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use self::{
    agent::{Agent, Answer, AskError},
    answer::Instance,
    watches::{Ask, Changed, Query, Watches},
};
pub use self::{
    agent::{AgentOptions, OptionsError},
    service::{Naming, Registered},
};
pub(crate) use service::{FROM_CONSUL, is_label};

/// How long a start waits for agents. Those that are away are gone on without, with what they told before.
const START: Duration = Duration::from_secs(3);
/// What is known is written down at most this often.
const WRITE: Duration = Duration::from_secs(2);

/// What following Consul needs.
#[derive(Debug, Clone)]
pub struct ConsulOptions {
    /// Each is a registry of its own; of a service that several have, the instances come together.
    pub agents: Vec<AgentOptions>,
    /// Names in the mesh.
    pub naming: Naming,
    /// Queries that may wait at an agent at the same time, one for each service as long as they suffice.
    pub watches: usize,
    /// Directory in which the last known services are kept; without one a restart knows nothing until agents answer.
    pub keep: Option<PathBuf>,
}

/// Why Consul cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ConsulError {
    /// An agent cannot be asked.
    #[error(transparent)]
    Agent(#[from] OptionsError),
    /// A name of which hosts cannot be made.
    #[error("{0:?} is not a {1}")]
    Name(String, &'static str),
    /// One beginning of names that is of two namespaces.
    #[error("names that begin with {0:?} have several namespaces")]
    Prefix(String),
}

/// What all agents know. Equal pointers are equal contents.
#[derive(Debug, Clone, Default)]
pub struct Services {
    /// By agent, then by name.
    agents: Vec<Arc<BTreeMap<String, Arc<Registered>>>>,
    synced: Vec<bool>,
}

impl Services {
    /// All services, agent by agent.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Registered>> {
        self.agents.iter().flat_map(|a| a.values())
    }

    /// Whether every agent has answered everything since the start.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.synced.iter().all(|s| *s)
    }

    /// Names to callers.
    #[must_use]
    pub fn hosts(&self) -> BTreeSet<String> {
        self.all().filter(|s| !s.ports.is_empty()).map(|s| s.host.clone()).collect()
    }
}

/// One agent, for operators.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    /// Its address.
    pub agent: String,
    /// Whether the last question for its list of services was answered.
    pub up: bool,
    /// Since when, in seconds since the epoch.
    pub since: u64,
    /// Why it is not, or what failed last of the questions that fail now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Index of its list of services.
    pub index: u64,
    /// Its list of services leaves out what the token may not see, as agents since Consul 1.11 say.
    pub filtered: bool,
    /// Services known.
    pub services: usize,
    /// Their instances.
    pub instances: usize,
    /// Services whose last question failed: what was known of them stays.
    pub failing: usize,
    /// Questions that wait now.
    pub waiting: usize,
    /// Questions since the start.
    pub queries: u64,
    /// Those of them that failed.
    pub failures: u64,
}

/// Consul, followed. Dropping it ends that.
pub struct Consul {
    services: watch::Receiver<Arc<Services>>,
    status: Arc<Mutex<Vec<AgentStatus>>>,
    tasks: Vec<JoinHandle<()>>,
    started: tokio::time::Instant,
}

impl std::fmt::Debug for Consul {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.status().iter().map(|s| &s.agent)).finish()
    }
}

impl Drop for Consul {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Consul {
    /// Starts on the current runtime.
    ///
    /// # Errors
    /// [`ConsulError`]. An agent that does not answer is none.
    pub fn start(options: ConsulOptions) -> Result<Self, ConsulError> {
        let naming = options.naming;
        let namespaces = std::iter::once(&naming.namespace).chain(naming.prefixes.iter().map(|(_, ns)| ns));
        if let Some(bad) = namespaces.into_iter().find(|ns| !is_label(ns)) {
            return Err(ConsulError::Name(bad.clone(), "namespace"));
        }
        for (prefix, _) in &naming.prefixes {
            if !is_label(prefix) {
                return Err(ConsulError::Name(prefix.clone(), "beginning of a service's name"));
            }
            if naming.prefixes.iter().filter(|(p, _)| p == prefix).count() > 1 {
                return Err(ConsulError::Prefix(prefix.clone()));
            }
        }
        if !naming.domain.split('.').all(is_label) {
            return Err(ConsulError::Name(naming.domain, "domain"));
        }
        let count = options.agents.len();
        let agents = options.agents.into_iter().map(Agent::new).collect::<Result<Vec<_>, _>>()?;
        let (tx, services) = watch::channel(Arc::new(Services {
            agents: vec![Arc::default(); count],
            synced: vec![false; count],
        }));
        let tx = Arc::new(tx);
        let status = Arc::new(Mutex::new(vec![AgentStatus::default(); count]));
        let mut tasks = Vec::with_capacity(count);
        for (at, agent) in agents.into_iter().enumerate() {
            let file = options.keep.as_ref().map(|d| d.join(file_name(agent.url())));
            let follow = Follow {
                at,
                lanes: options.watches,
                agent: Arc::new(agent),
                naming: naming.clone(),
                file,
                services: tx.clone(),
                status: status.clone(),
            };
            tasks.push(tokio::spawn(async move { follow.run().await }));
        }
        Ok(Self { services, status, tasks, started: tokio::time::Instant::now() })
    }

    /// The services as they change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<Services>> {
        self.services.clone()
    }

    /// Waits until all agents have told everything, or until three seconds after the start; false then.
    pub async fn first(&self) -> bool {
        let mut services = self.services.clone();
        let synced = services.wait_for(|s| s.is_synced());
        tokio::time::timeout_at(self.started + START, synced).await.is_ok()
    }

    /// How the agents do.
    #[must_use]
    pub fn status(&self) -> Vec<AgentStatus> {
        lock(&self.status).clone()
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind it is replaced field by field and has no invariants.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file for what an agent told, by its address.
fn file_name(url: &str) -> String {
    let plain: String = url.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    format!("consul-{plain}.json")
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// One agent.
struct Follow {
    at: usize,
    lanes: usize,
    agent: Arc<Agent>,
    naming: Naming,
    file: Option<PathBuf>,
    services: Arc<watch::Sender<Arc<Services>>>,
    status: Arc<Mutex<Vec<AgentStatus>>>,
}

type Asked = (Ask, Result<Answer, AskError>);

impl Follow {
    async fn run(self) {
        let kept = self.read().await;
        let mut watches = Watches::new(self.lanes, kept, Instant::now());
        self.with_status(|s| {
            s.agent = self.agent.url().to_owned();
            s.since = now_seconds();
        });
        let mut known: BTreeMap<String, Arc<Registered>> =
            watches.all().map(|(n, (i, unused))| (n.clone(), self.registered(n, i, unused))).collect();
        self.publish(&known, false);
        let mut asked: JoinSet<Asked> = JoinSet::new();
        // When what is known is to be written, because it changed.
        let mut write: Option<Instant> = None;
        let mut up = None;
        loop {
            while let Some(ask) = watches.next(Instant::now()) {
                let agent = self.agent.clone();
                let (_, waiting, _) = watches.counts();
                self.with_status(|s| {
                    s.queries += 1;
                    s.waiting = waiting;
                });
                asked.spawn(async move {
                    let answer = agent.ask(&ask).await;
                    (ask, answer)
                });
            }
            let wake = watches.wake().into_iter().chain(write).min();
            let sleep = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            // Both arms lose nothing when they are dropped.
            tokio::select! {
                Some(done) = asked.join_next() => {
                    // Questions are neither aborted nor do they panic; of one that did there is no answer to take.
                    let Ok((ask, answer)) = done else { continue };
                    let synced = watches.is_synced();
                    let changed = self.take(&mut watches, &ask, answer);
                    self.log(&watches, &mut up);
                    for name in &changed.services {
                        if let Some((instances, unused)) = watches.of(name) {
                            known.insert(name.clone(), self.registered(name, instances, unused));
                        }
                    }
                    for name in &changed.gone {
                        known.remove(name);
                    }
                    let news = changed != Changed::default();
                    if news {
                        write.get_or_insert_with(|| Instant::now() + WRITE);
                    }
                    // A first reading that is half done would look like services that went.
                    if watches.is_synced() && (news || !synced) {
                        self.publish(&known, true);
                    }
                }
                () = sleep => {}
            }
            if write.is_some_and(|w| w <= Instant::now()) {
                write = None;
                self.write(&watches).await;
            }
        }
    }

    /// Takes an answer or a failure.
    fn take(&self, watches: &mut Watches, ask: &Ask, answer: Result<Answer, AskError>) -> Changed {
        let now = Instant::now();
        let taken = match (&ask.query, answer) {
            (_, Err(e)) => Err(e),
            (Query::Catalog, Ok(a)) => {
                answer::catalog(&a.body).map_err(AskError::from).map(|(names, surplus)| {
                    if surplus > 0 {
                        tracing::warn!(
                            agent = self.agent.url(),
                            surplus,
                            "Consul has too many services; the last are ignored"
                        );
                    }
                    self.with_status(|s| s.filtered = a.filtered);
                    watches.listed(ask, a.index, &names, now)
                })
            }
            (Query::Critical, Ok(a)) => answer::critical(&a.body).map_err(AskError::from).map(|ailing| {
                watches.critical(ask, a.index, ailing, now);
                Changed::default()
            }),
            (Query::Service(_), Ok(a)) => answer::instances(&a.body)
                .map_err(AskError::from)
                .map(|answered| watches.told(ask, a.index, answered, now)),
        };
        let error = match taken {
            Ok(changed) => {
                self.counted(watches, None);
                return changed;
            }
            Err(e) => e.told(),
        };
        watches.failed(ask, now, rand::random());
        tracing::debug!(agent = self.agent.url(), query = ?ask.query, error, "Consul was asked in vain");
        self.counted(watches, Some(error));
        Changed::default()
    }

    fn counted(&self, watches: &Watches, error: Option<String>) {
        let (services, waiting, failing) = watches.counts();
        self.with_status(|s| {
            if error.is_some() {
                s.failures += 1;
                s.error = error;
            } else if watches.is_up() && failing == 0 {
                s.error = None;
            }
            (s.index, s.services, s.waiting, s.failing) = (watches.index(), services, waiting, failing);
        });
    }

    /// Says once that the agent went or came.
    fn log(&self, watches: &Watches, was: &mut Option<bool>) {
        let is = watches.is_up();
        if was.replace(is) == Some(is) {
            return;
        }
        let status = self.with_status(|s| {
            s.up = is;
            s.since = now_seconds();
            s.clone()
        });
        let agent = self.agent.url();
        if is {
            tracing::info!(agent, "Consul answers");
        } else {
            let error = status.error.unwrap_or_default();
            tracing::warn!(
                agent,
                error,
                services = status.services,
                "Consul does not answer; its last known services stay"
            );
        }
    }

    fn with_status<T: Default>(&self, f: impl FnOnce(&mut AgentStatus) -> T) -> T {
        lock(&self.status).get_mut(self.at).map(f).unwrap_or_default()
    }

    fn registered(&self, name: &str, instances: &[Instance], unused: &[String]) -> Arc<Registered> {
        Arc::new(service::service(name, instances, unused, &self.naming))
    }

    fn publish(&self, known: &BTreeMap<String, Arc<Registered>>, synced: bool) {
        self.with_status(|s| s.instances = known.values().map(|r| r.instances.len()).sum());
        self.services.send_modify(|all| {
            let all = Arc::make_mut(all);
            if let (Some(agent), Some(s)) = (all.agents.get_mut(self.at), all.synced.get_mut(self.at)) {
                *agent = Arc::new(known.clone());
                *s = synced;
            }
        });
    }

    /// What was known before a restart. A file that cannot be read is as good as none.
    async fn read(&self) -> BTreeMap<String, Vec<Instance>> {
        let Some(file) = &self.file else { return BTreeMap::new() };
        let read = match tokio::fs::read(file).await {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| e.to_string()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(e) => Err(e.to_string()),
        };
        read.unwrap_or_else(|error| {
            tracing::warn!(file = %file.display(), error, "what Consul told before cannot be read; it is asked again");
            BTreeMap::new()
        })
    }

    async fn write(&self, watches: &Watches) {
        let Some(file) = self.file.clone() else { return };
        let all: BTreeMap<&String, &Vec<Instance>> = watches.all().map(|(n, (i, _))| (n, i)).collect();
        let Ok(bytes) = serde_json::to_vec(&all) else { return };
        let shown = file.display().to_string();
        let written =
            tokio::task::spawn_blocking(move || mesh_runtime::files::write_private(&file, &bytes)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(file = shown, %error, "what Consul told cannot be kept over a restart");
        }
    }
}

/// Answers of any content to each question: within their limits, and instances in the order that makes equal answers equal.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    if let Ok((names, _)) = answer::catalog(data) {
        assert!(names.len() <= answer::MAX_SERVICES && !names.contains("consul"));
    }
    let _ = answer::critical(data);
    let Ok((instances, unused)) = answer::instances(data) else { return };
    assert!(instances.len() <= answer::MAX_INSTANCES);
    let naming = service::Naming {
        namespace: "default".into(),
        prefixes: vec![("books-".into(), "books".into())],
        domain: "consul".into(),
    };
    for name in ["web", "books-Web", "a.b"] {
        let made = service::service(name, &instances, &unused, &naming);
        assert!(made.instances.len() <= instances.len());
        assert!(made.ports.windows(2).all(|w| w[0] != w[1]));
        assert!(made.instances.iter().all(|(p, _)| made.ports.contains(p)));
        assert!(mesh_model::ClusterId::new(&made.namespace).is_ok(), "{:?}", made.namespace);
    }
    let kept = serde_json::to_vec(&instances).expect("plain data");
    assert!(serde_json::from_slice::<Vec<answer::Instance>>(&kept).is_ok_and(|again| again == instances));
}
