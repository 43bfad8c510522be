//! Hosts of clusters that are found by the name that a request or connection asks for: what an authority or an SNI
//! resolves to (Envoy's dynamic forward proxy).
//!
//! What was resolved is kept for all workers, and resolved again from time to time for as long as it is used. A name that
//! cannot be resolved is asked for anew a second later; one that could be keeps its addresses until others are known.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use mesh_model::proxy as model;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};

use super::{
    cluster::millis,
    dns,
    host::{Host, now_ms},
};

/// How long a name that cannot be resolved is not asked for again.
const RETRY: Duration = Duration::from_secs(1);
/// Names that are looked up at a time: each takes a thread.
const LOOKUPS: usize = 64;
/// Longest name of DNS.
const MAX_NAME: usize = 253;

/// Why a name leads to no host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NameError {
    /// It is no name.
    Invalid,
    /// As many names as are kept are in use.
    Full,
    /// It has no address, or none that it may have.
    Unresolved,
}

impl NameError {
    /// Envoy's flag for it in access logs.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::Full => "UO",
            Self::Invalid | Self::Unresolved => "DF",
        }
    }

    /// Envoy's details for it.
    pub(crate) fn details(self) -> &'static str {
        match self {
            Self::Full => "dns_cache_overflow",
            Self::Invalid | Self::Unresolved => "dns_resolution_failure",
        }
    }
}

/// The first of the hosts of a name that was not tried.
pub(crate) fn next(hosts: &[Arc<Host>], tried: &[u64]) -> Option<Arc<Host>> {
    hosts.iter().find(|h| !tried.contains(&h.stats.id)).cloned()
}

/// Hosts by name, of one cluster.
#[derive(Debug)]
pub(crate) struct Names {
    control: Handle,
    config: model::NamedHosts,
    /// Port of a name that comes without one.
    port: u16,
    known: Mutex<HashMap<Key, Known>>,
    lookups: Semaphore,
}

type Key = (Arc<str>, u16);
/// `None` until the first answer; without hosts, there was none.
type Answer = Option<Arc<[Arc<Host>]>>;

#[derive(Debug)]
struct Known {
    /// When it was last asked for, in milliseconds.
    used: Arc<AtomicU64>,
    answer: watch::Receiver<Answer>,
}

impl Names {
    pub(crate) fn new(control: Handle, config: model::NamedHosts, tls: bool) -> Arc<Self> {
        let port = if tls { 443 } else { 80 };
        let lookups = Semaphore::new(LOOKUPS);
        Arc::new(Self { control, config, port, known: Mutex::default(), lookups })
    }

    pub(crate) fn config(&self) -> &model::NamedHosts {
        &self.config
    }

    /// The hosts of an authority, `name`, `name:port` or an address.
    pub(crate) async fn of_authority(
        self: &Arc<Self>,
        authority: &str,
    ) -> Result<Arc<[Arc<Host>]>, NameError> {
        let (name, port) = split(authority);
        self.hosts(name, port).await
    }

    /// The hosts of a name. At least one.
    pub(crate) async fn hosts(
        self: &Arc<Self>,
        name: &str,
        port: Option<u16>,
    ) -> Result<Arc<[Arc<Host>]>, NameError> {
        let name = canonical(name).ok_or(NameError::Invalid)?;
        let port = match self.config.port {
            0 => port.unwrap_or(self.port),
            own => own,
        };
        let mut answer = self.known((Arc::from(name), port))?;
        let there = answer.borrow().clone();
        let there = match there {
            Some(hosts) => Some(hosts),
            // Whoever would answer may be gone, with the cluster.
            None => answer.wait_for(Option::is_some).await.ok().and_then(|a| a.clone()),
        };
        there.filter(|hosts| !hosts.is_empty()).ok_or(NameError::Unresolved)
    }

    /// What is known of a name; one that is not known is looked up from here on.
    fn known(self: &Arc<Self>, key: Key) -> Result<watch::Receiver<Answer>, NameError> {
        let now = now_ms();
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(k) = all.get(&key) {
            k.used.store(now, Relaxed);
            return Ok(k.answer.clone());
        }
        if all.len() >= self.config.cache.max_hosts as usize {
            let idle = |k: &Known| now.saturating_sub(k.used.load(Relaxed));
            let oldest = all.iter().max_by_key(|(_, k)| idle(k)).map(|(key, k)| (key.clone(), idle(k)));
            let Some((oldest, idle)) = oldest else { return Err(NameError::Full) };
            if idle < millis(RETRY) {
                return Err(NameError::Full);
            }
            all.remove(&oldest);
        }
        let (tell, answer) = watch::channel(None);
        let used = Arc::new(AtomicU64::new(now));
        all.insert(key.clone(), Known { used: Arc::clone(&used), answer: answer.clone() });
        drop(all);
        self.control.spawn(follow(Arc::downgrade(self), key, used, tell));
        Ok(answer)
    }

    /// Whether a name stays; one that nobody asks for, or that means nothing, is forgotten.
    fn keep(&self, key: &Key, used: &Arc<AtomicU64>, resolved: bool) -> bool {
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // It made room for others, and may have come back since.
        let own = all.get(key).is_some_and(|k| Arc::ptr_eq(&k.used, used));
        let idle = now_ms().saturating_sub(used.load(Relaxed));
        let stays = own && resolved && idle < millis(self.config.cache.ttl);
        if own && !stays {
            all.remove(key);
        }
        stays
    }

    /// Addresses of a name, without those that are no answer.
    async fn resolve(&self, name: &str, port: u16) -> Vec<IpAddr> {
        let found = match name.parse() {
            Ok(ip) => Ok(vec![ip]),
            Err(_) => match self.lookups.acquire().await {
                Ok(_permit) => dns::addresses(name, port).await,
                Err(_) => return Vec::new(),
            },
        };
        match found {
            Ok(mut ips) => {
                let before = ips.len();
                ips.retain(|ip| !self.config.cache.refused.iter().any(|net| net.contains(ip)));
                if ips.len() < before {
                    tracing::warn!(name, "resolves to addresses that names of requests may not have");
                }
                ips
            }
            Err(error) => {
                tracing::debug!(name, %error, "cannot resolve");
                Vec::new()
            }
        }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        for k in self.known.lock().unwrap_or_else(PoisonError::into_inner).values() {
            for h in k.answer.borrow().iter().flat_map(|hosts| hosts.iter()) {
                h.stats.gone.store(true, Relaxed);
            }
        }
    }
}

/// Keeps the hosts of a name up to date for as long as it is used.
async fn follow(names: Weak<Names>, key: Key, used: Arc<AtomicU64>, tell: watch::Sender<Answer>) {
    let mut hosts: Vec<Arc<Host>> = Vec::new();
    loop {
        let Some(n) = names.upgrade() else { break };
        let ips = n.resolve(&key.0, key.1).await;
        // Last-known-good: a name that cannot be resolved now keeps its hosts.
        if !ips.is_empty() || hosts.is_empty() {
            let addresses: Vec<_> = ips.into_iter().map(|ip| SocketAddr::new(ip, key.1)).collect();
            let before = std::mem::take(&mut hosts);
            for a in &addresses {
                let same = before.iter().find(|h| h.is_at(*a)).cloned();
                hosts.push(same.unwrap_or_else(|| Arc::new(Host::named(*a, &key.0))));
            }
            for gone in before.iter().filter(|b| !hosts.iter().any(|h| Arc::ptr_eq(h, b))) {
                gone.stats.gone.store(true, Relaxed);
            }
            tell.send_replace(Some(hosts.clone().into()));
        }
        let wait = if hosts.is_empty() { RETRY } else { n.config.cache.refresh.max(RETRY) };
        drop(n);
        tokio::time::sleep(wait).await;
        let Some(n) = names.upgrade() else { break };
        if !n.keep(&key, &used, !hosts.is_empty()) {
            break;
        }
    }
    for h in hosts {
        h.stats.gone.store(true, Relaxed);
    }
}

/// `name:port` in its parts; an IPv6 address without its brackets.
pub(crate) fn split(authority: &str) -> (&str, Option<u16>) {
    let (host, port) = match authority.rsplit_once(':') {
        Some((h, p)) if !h.contains(':') || h.ends_with(']') => (h, Some(p)),
        _ => (authority, None),
    };
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    (host, port.and_then(|p| p.parse().ok()))
}

/// A name as it is kept: in lower case, without the dot of the root; `None` for what is no name of a host.
fn canonical(name: &str) -> Option<String> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Some(ip.to_canonical().to_string());
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |l: &str| {
        (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    (name.len() <= MAX_NAME && name.split('.').all(label)).then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(max_hosts: u32, refused: &[&str]) -> Arc<Names> {
        let cache = model::NameCache {
            max_hosts,
            refused: refused.iter().map(|n| n.parse().unwrap()).collect(),
            ..model::NameCache::default()
        };
        Names::new(Handle::current(), model::NamedHosts { cache, port: 0 }, false)
    }

    fn at(hosts: &[Arc<Host>]) -> Vec<String> {
        hosts.iter().map(|h| h.display.to_string()).collect()
    }

    #[test]
    fn authorities() {
        assert_eq!(split("a.example"), ("a.example", None));
        assert_eq!(split("a.example:8080"), ("a.example", Some(8080)));
        assert_eq!(split("[::1]:80"), ("::1", Some(80)));
        assert_eq!(split("[::1]"), ("::1", None));
        assert_eq!(split("::1"), ("::1", None));
        assert_eq!(split("a.example:99999"), ("a.example", None), "no port");
        assert_eq!(canonical("A.Example.").as_deref(), Some("a.example"));
        assert_eq!(canonical("::ffff:127.0.0.1").as_deref(), Some("127.0.0.1"), "no way around a refusal");
        for bad in ["", ".", "a..b", "a b", "a/b", "*.example", "ä", &"a".repeat(64), &"a.".repeat(130)] {
            assert_eq!(canonical(bad), None, "{bad:?}");
        }
    }

    #[tokio::test]
    async fn an_address_is_itself_and_keeps_its_host() {
        let n = names(8, &[]);
        let one = n.of_authority("192.0.2.1:8080").await.unwrap();
        assert_eq!(at(&one), ["192.0.2.1:8080"]);
        let again = n.of_authority("192.0.2.1:8080").await.unwrap();
        assert!(Arc::ptr_eq(&one[0], &again[0]), "connections are shared");
        assert_eq!(at(&n.of_authority("192.0.2.1").await.unwrap()), ["192.0.2.1:80"]);
        assert_eq!(at(&n.of_authority("[2001:db8::1]:1").await.unwrap()), ["[2001:db8::1]:1"]);
        assert_eq!(at(&n.of_authority("LOCALHOST").await.unwrap()), ["127.0.0.1:80"], "a name");
        drop(n);
        assert!(one[0].stats.gone.load(Relaxed), "with the cluster");
    }

    #[tokio::test]
    async fn what_leads_inward_is_no_answer() {
        let n = names(8, &["127.0.0.0/8", "::1/128"]);
        for inward in ["127.0.0.1", "localhost:80", "[::1]", "[::ffff:127.0.0.1]:80", "localhost."] {
            assert_eq!(n.of_authority(inward).await.unwrap_err(), NameError::Unresolved, "{inward}");
        }
        assert_eq!(n.of_authority("a b").await.unwrap_err(), NameError::Invalid);
        assert!(n.of_authority("192.0.2.1").await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn names_are_few_and_make_room() {
        let n = names(2, &[]);
        assert!(n.of_authority("192.0.2.1").await.is_ok());
        assert!(n.of_authority("192.0.2.2").await.is_ok());
        assert_eq!(n.of_authority("192.0.2.3").await.unwrap_err(), NameError::Full);
        // The clock of hosts is the real one.
        std::thread::sleep(RETRY);
        assert!(n.of_authority("192.0.2.2").await.is_ok());
        assert!(n.of_authority("192.0.2.3").await.is_ok(), "the one that was not asked for leaves");
        let known = |n: &Names| n.known.lock().unwrap().keys().map(|k| k.0.to_string()).collect::<Vec<_>>();
        assert!(!known(&n).contains(&"192.0.2.1".to_owned()));
        assert_eq!(known(&n).len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_resolved_is_asked_for_again() {
        let n = names(8, &["192.0.2.0/24"]);
        assert_eq!(n.of_authority("192.0.2.1").await.unwrap_err(), NameError::Unresolved);
        assert_eq!(n.known.lock().unwrap().len(), 1, "not at once");
        tokio::time::sleep(RETRY * 2).await;
        assert_eq!(n.known.lock().unwrap().len(), 0);
    }
}
