//! Who is checked when.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use mesh_model::proxy::HealthCheck;
use tokio::task::JoinHandle;

use super::{
    Found, Judge, interval, jittered,
    probe::{self, Kept},
    up_to,
};
use crate::{
    upstream::{
        cluster::Cluster,
        host::{Host, now_ms},
        lb::LbTables,
    },
    worker::{Shared, Worker},
};

/// Tables are made at once and then not again for this time, so that the first checks of a thousand hosts do not make
/// them a thousand times.
const GATHER: Duration = Duration::from_millis(2);

/// The checks of all clusters that have any. It lives in a `LocalSet` of the control thread.
pub(crate) struct Checkers {
    shared: Arc<Shared>,
    /// Whose connections checks use; made with the first.
    worker: Option<Rc<Worker>>,
    clusters: HashMap<String, Checked>,
}

/// The checks of a cluster.
struct Checked {
    subject: Rc<Subject>,
    /// For which hosts the checks are.
    tables: Arc<LbTables>,
    hosts: HashMap<u64, (Arc<Host>, JoinHandle<()>)>,
    seen: bool,
}

/// A cluster, of whatever version.
struct Subject {
    cluster: RefCell<Arc<Cluster>>,
    /// Tables were made just now.
    gathering: Cell<bool>,
    /// And will be again.
    more: Cell<bool>,
}

impl Drop for Checked {
    fn drop(&mut self) {
        for (_, task) in self.hosts.values() {
            task.abort();
        }
    }
}

impl Checkers {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, worker: None, clusters: HashMap::new() }
    }

    /// Starts and ends checks as clusters and hosts come and go; called often.
    pub(crate) fn follow(&mut self, clusters: &[Arc<Cluster>]) {
        self.clusters.values_mut().for_each(|c| c.seen = false);
        for c in clusters.iter().filter(|c| c.config.health.is_some()) {
            let worker = self.worker.get_or_insert_with(|| Worker::new(Arc::clone(&self.shared)));
            // Another question is another history.
            let same = |k: &mut Checked| k.subject.cluster.borrow().config.health == c.config.health;
            if !self.clusters.get_mut(&c.config.name).is_some_and(same) {
                self.clusters.insert(c.config.name.clone(), Checked::new(c));
            }
            if let Some(k) = self.clusters.get_mut(&c.config.name) {
                k.seen = true;
                k.follow(c, worker);
            }
        }
        self.clusters.retain(|_, c| c.seen);
    }
}

impl Checked {
    fn new(c: &Arc<Cluster>) -> Self {
        Self {
            subject: Rc::new(Subject {
                cluster: RefCell::new(Arc::clone(c)),
                gathering: Cell::new(false),
                more: Cell::new(false),
            }),
            tables: Arc::default(),
            hosts: HashMap::new(),
            seen: true,
        }
    }

    fn follow(&mut self, c: &Arc<Cluster>, worker: &Rc<Worker>) {
        let now = Arc::clone(&c.tables());
        let moved = !Arc::ptr_eq(&self.subject.cluster.borrow(), c);
        if Arc::ptr_eq(&self.tables, &now) && !moved {
            return;
        }
        if moved {
            *self.subject.cluster.borrow_mut() = Arc::clone(c);
        }
        let mut old = std::mem::take(&mut self.hosts);
        for h in &now.hosts {
            if h.check.as_ref().is_some_and(|c| c.disabled) {
                continue;
            }
            let id = h.stats.id;
            let kept = old.remove(&id).filter(|(o, task)| {
                o.check == h.check || {
                    task.abort();
                    false
                }
            });
            let entry = kept.unwrap_or_else(|| {
                let check = watch(Rc::clone(&self.subject), Rc::clone(worker), Arc::clone(h));
                (Arc::clone(h), tokio::task::spawn_local(check))
            });
            self.hosts.insert(id, entry);
        }
        for (_, task) in old.into_values() {
            task.abort();
        }
        self.tables = now;
    }
}

/// Checks a host for as long as it is there.
async fn watch(subject: Rc<Subject>, worker: Rc<Worker>, host: Arc<Host>) {
    let Some(first) = subject.check() else { return };
    if !first.initial_jitter.is_zero() {
        tokio::time::sleep(up_to(first.initial_jitter)).await;
    }
    let host_checked = Arc::new(host.for_checks(first.alt_port));
    let mut judge = Judge::new(&host.stats);
    let mut kept = Kept::default();
    loop {
        let cluster = Arc::clone(&subject.cluster.borrow());
        let Some(check) = cluster.config.health.as_deref() else { return };
        cluster.checks.attempt.fetch_add(1, Relaxed);
        let asked = probe::ask(&worker, &cluster, &host_checked, check, &mut kept);
        let found = match tokio::time::timeout(check.timeout, asked).await {
            Ok(found) => found,
            // What comes on this connection now would be taken for an answer to the next question.
            Err(_) => {
                kept = Kept::default();
                Found::Unreachable
            }
        };
        cluster.checks.note(found);
        let new = judge.first;
        let was = !host.stats.has(crate::upstream::host::Check::Failed);
        let standing = judge.note(&host.stats, found, check);
        if standing.healthy != was {
            let name = &cluster.config.name;
            tracing::info!(cluster = %name, host = %host.display, healthy = standing.healthy, ?found, new, "health");
            if standing.healthy {
                host.stats.healthy_since.store(now_ms(), Relaxed);
            } else {
                host.stats.tell_failure();
            }
        }
        if standing.changed {
            subject.gather();
        }
        let wait = jittered(check, interval(check, standing, cluster.usage.used.load(Relaxed)));
        drop(cluster);
        tokio::time::sleep(wait).await;
    }
}

impl Subject {
    fn check(&self) -> Option<Box<HealthCheck>> {
        self.cluster.borrow().config.health.clone()
    }

    /// Makes new tables, now or soon.
    fn gather(self: &Rc<Self>) {
        if self.gathering.replace(true) {
            self.more.set(true);
            return;
        }
        self.make();
        let this = Rc::clone(self);
        tokio::task::spawn_local(async move {
            tokio::time::sleep(GATHER).await;
            this.gathering.set(false);
            if this.more.take() {
                this.gather();
            }
        });
    }

    fn make(&self) {
        let cluster = Arc::clone(&self.cluster.borrow());
        cluster.health_changed();
    }
}
