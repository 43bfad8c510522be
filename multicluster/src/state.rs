//! The federation component's state: members, tokens, exports, imports.
//!
//! One lock over small tables; nothing awaits while holding it. Every change of what others read
//! goes through [`Shared::publish`], which serves it to pilot.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use mesh_identity::{ForeignTrust, SecretStore};
use mesh_model::{
    ClusterId, TrustDomain,
    federation::{
        ForeignBundle, FormerCluster, ImportedService, LeaseState, OnLapse, OwnRoots, PeerCluster,
        RevocationList, type_url,
    },
};
use mesh_xds::mcp::{ConfigServer, Document};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    FederationOptions,
    authority_pb::AuthorityStatus,
    bundle::follow::ByBundle,
    declared::Declared,
    exchange::{Dirty, Import, Node, ServiceKey},
    federate::BundleLink,
    membership::{Bundle, Clash, Merged},
    revocation::{self, Lists},
    roots::Roots,
    store::{Store, Tokens},
    wire::Member,
};

/// How a link to a peer stands.
#[derive(Debug, Clone, Default)]
pub(crate) struct LinkStatus {
    pub(crate) connected: bool,
    pub(crate) last_error: String,
    /// Version of the peer's software, as far as it can be shown; empty is not known.
    pub(crate) software: String,
    /// Version of the exchange that it answered with; 0 is not known.
    pub(crate) protocol: u32,
    /// Smoothed round trip between the control planes, through all gateways.
    pub(crate) rtt: Option<Duration>,
    /// End of the peer's intermediate, as the connection to it showed.
    pub(crate) certificate_ends: Option<SystemTime>,
}

/// Clashes of names that are kept for operators.
const MAX_CLASHES: usize = 64;
/// Longest version of a peer's software that is shown.
const MAX_SOFTWARE: usize = 32;
/// A round trip beyond this is a stamp that was not repeated as it was.
const MAX_RTT: Duration = Duration::from_secs(60);

impl LinkStatus {
    /// What the peer calls its software; a text of its own, so that only what a version needs is taken.
    pub(crate) fn runs(&mut self, software: &str) {
        let fits = !software.is_empty()
            && software.len() <= MAX_SOFTWARE
            && software.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+-".contains(&b));
        if fits {
            software.clone_into(&mut self.software);
        }
    }

    /// An acknowledgement repeated the stamp of a lease.
    pub(crate) fn stamped(&mut self, stamp: u64, now: u64) {
        let Some(sample) = now.checked_sub(stamp).map(Duration::from_micros).filter(|d| *d <= MAX_RTT) else {
            return;
        };
        // As TCP smooths its own (RFC 6298).
        self.rtt = Some(self.rtt.map_or(sample, |old| (old * 7 + sample) / 8));
    }
}

pub(crate) struct Tables {
    /// The state machines; what they decide is carried out here.
    pub(crate) node: Node,
    pub(crate) tokens: Tokens,
    pub(crate) links: BTreeMap<ClusterId, LinkStatus>,
    /// What the configuration declares, and what became of it.
    pub(crate) declared: Declared,
    /// How the bundles of other trust domains stand.
    pub(crate) bundles: BTreeMap<TrustDomain, BundleLink>,
    trust: Option<BTreeMap<String, ForeignBundle>>,
    /// Trust domains that are declared by their bundles, and those of them that proxies are told.
    pub(crate) by_bundle: BTreeMap<TrustDomain, ByBundle>,
    pub(crate) abroad: Vec<ForeignBundle>,
    /// The own CA as this control plane uses it, while it is in a mesh.
    pub(crate) authority: Option<AuthorityStatus>,
    /// How members stand with its roots, and what those of other domains were told.
    pub(crate) roots: Roots,
    /// What is revoked, by trust domain.
    pub(crate) revoked: BTreeMap<TrustDomain, Lists>,
    /// As it was kept, until the roots are known.
    kept_revoked: revocation::Kept,
    /// Names that other trust domains tell and that somebody else has.
    pub(crate) clashes: BTreeSet<Clash>,
    /// Imports that differ from what is on disk.
    unsaved: BTreeSet<ClusterId>,
    /// What pilot has: peers, whether it was told of services at all, and those of each peer.
    peers: Option<BTreeMap<String, PeerCluster>>,
    former: Option<BTreeMap<String, FormerCluster>>,
    served: bool,
    published: BTreeMap<ClusterId, BTreeSet<ServiceKey>>,
}

impl Tables {
    /// The link to a member; there is none to anybody else.
    pub(crate) fn link(&mut self, peer: &ClusterId) -> Option<&mut LinkStatus> {
        self.node.members.is_member(peer).then(|| self.links.entry(peer.clone()).or_default())
    }
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
    /// Counts changes of the own CA.
    pub(crate) roots_changed: watch::Sender<u64>,
    /// A bundle endpoint was asked.
    pub(crate) bundle_told: Notify,
    /// A peer has shown that it is there: whoever waits to dial it looks again.
    pub(crate) nudge: Notify,
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
        let this = this(&options);
        // A log's identity must differ from run to run; 64 random bits do.
        let mut node = Node::new(this, members, |peer| store.import(peer), rand::random(), 0);
        for b in store.bundles()? {
            node.members.set_bundle(b);
        }
        if !node.members.all().is_empty() {
            // A new revision of this cluster's own record must never be told twice with different content.
            store.save_members(node.members.all())?;
        }
        let tables = Tables {
            node,
            tokens,
            links: BTreeMap::new(),
            declared: Declared::default(),
            bundles: BTreeMap::new(),
            trust: None,
            by_bundle: store.by_bundle(),
            abroad: vec![],
            authority: None,
            roots: Roots::default(),
            revoked: BTreeMap::new(),
            kept_revoked: store.revoked()?,
            clashes: BTreeSet::new(),
            unsaved: BTreeSet::new(),
            peers: None,
            former: None,
            served: false,
            published: BTreeMap::new(),
        };
        let shared = Self {
            options,
            secrets,
            store,
            publisher: ConfigServer::new(),
            tables: Mutex::new(tables),
            exports_changed: watch::Sender::new(0),
            members_changed: watch::Sender::new(0),
            roots_changed: watch::Sender::new(0),
            bundle_told: Notify::new(),
            nudge: Notify::new(),
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
        // One that is no trust domain would have founded nothing.
        self.lock().node.members.set_domain(td.as_deref().and_then(|d| TrustDomain::new(d).ok()));
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

    /// A number for a lease that tells when it was sent: microseconds of the steady clock, never 0.
    pub(crate) fn stamp(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX).max(1)
    }

    /// This cluster is in a mesh, or in none any more.
    pub(crate) fn enter(&self, td: Option<String>) {
        let entered = td.is_some();
        self.set_trust_domain(td);
        let mut t = self.lock();
        if entered && !t.node.members.is_member(&self.options.cluster) {
            t.node.enter(1);
        }
    }

    /// Merges what others say of members.
    pub(crate) fn merge_members(&self, news: Vec<Member>) -> io::Result<()> {
        // What peers still say to a cluster that has just left is not for it.
        if self.trust_domain().is_none() {
            return Ok(());
        }
        let merged = self.lock().node.merge(news, self.now());
        self.members_merged(&merged)
    }

    /// Carries out what a change of membership means outside of the state machines.
    pub(crate) fn members_merged(&self, merged: &Merged) -> io::Result<()> {
        if !merged.clashes.is_empty() {
            let mut t = self.lock();
            for c in &merged.clashes {
                // They tell it again and again.
                if t.clashes.len() < MAX_CLASHES && t.clashes.insert(c.clone()) {
                    tracing::warn!("{c}");
                }
            }
        }
        if !merged.changed {
            return Ok(());
        }
        {
            let mut t = self.lock();
            for peer in &merged.gone {
                t.links.remove(peer);
                t.unsaved.remove(peer);
                self.store.drop_import(peer)?;
            }
            self.store.save_members(t.node.members.all())?;
            self.store.save_bundles(t.node.members.bundles())?;
            let domains = t.node.members.domains();
            t.bundles.retain(|d, _| domains.contains(d));
            let gone = |c: &Clash| {
                let holder = t.node.members.get(&c.cluster).filter(|m| !m.left);
                !domains.contains(&c.theirs) || holder.is_none_or(|m| m.trust_domain != c.holder)
            };
            let over: Vec<_> = t.clashes.iter().filter(|c| gone(c)).cloned().collect();
            for c in over {
                t.clashes.remove(&c);
            }
        }
        self.members_changed.send_modify(|n| *n += 1);
        self.publish();
        Ok(())
    }

    /// The bundle of another trust domain is a newer one.
    pub(crate) fn bundles_changed(&self) -> io::Result<()> {
        self.store.save_bundles(self.lock().node.members.bundles())?;
        self.members_changed.send_modify(|n| *n += 1);
        self.publish();
        Ok(())
    }

    /// Lets leases lapse, and serves and keeps what has changed meanwhile.
    pub(crate) fn tick(&self) {
        for peer in self.lock().node.tick(self.now()) {
            tracing::warn!(%peer, "the lease lapsed: its endpoints are used last until it returns");
        }
        self.publish();
    }

    /// Serves imports and peers to pilot. A change costs what changed.
    pub(crate) fn publish(&self) {
        let mut services = Vec::new();
        let mut peers = BTreeMap::new();
        let mut t = self.lock();
        let t = &mut *t;
        let gone: Vec<_> = t.published.keys().filter(|p| !t.node.imports.contains_key(p)).cloned().collect();
        for peer in gone {
            for (ns, name) in t.published.remove(&peer).into_iter().flatten() {
                services.push((format!("{ns}/{name}.{peer}"), None));
            }
        }
        for (peer, import) in &mut t.node.imports {
            let dirty = import.take_dirty();
            if dirty == Dirty::default() {
                continue;
            }
            t.unsaved.insert(peer.clone());
            let published = t.published.entry(peer.clone()).or_default();
            let keys: BTreeSet<ServiceKey> = if dirty.all {
                let now = import.services().map(|s| (s.namespace.clone(), s.name.clone()));
                now.chain(published.iter().cloned()).collect()
            } else {
                dirty.services
            };
            for key in keys {
                let name = format!("{}/{}.{peer}", key.0, key.1);
                let Some(service) = import.service(&key) else {
                    published.remove(&key);
                    services.push((name, None));
                    continue;
                };
                let record = ImportedService {
                    cluster: peer.clone(),
                    lease: import.lease(),
                    service: service.clone(),
                    on_lapse: OnLapse::default(),
                };
                services.extend(document(&name, &record).map(|d| (name, Some(d))));
                published.insert(key);
            }
        }
        for m in t.node.members.peers() {
            let lease = t.node.imports.get(&m.cluster).map_or(LeaseState::Lapsed, Import::lease);
            let peer = PeerCluster {
                id: m.cluster.clone(),
                network: m.network.clone(),
                trust_domain: m.trust_domain.clone(),
                gateways: m.gateways.clone(),
                transports: m.transports.clone(),
                lease,
            };
            peers.insert(m.cluster.to_string(), peer);
        }
        let former: BTreeMap<_, _> = t
            .node
            .members
            .former()
            .map(|m| (m.cluster.to_string(), FormerCluster { id: m.cluster.clone(), evicted: m.evicted }))
            .collect();
        self.trust(t);
        // Under the lock, so that a later state is never overtaken by an earlier one.
        if t.former.as_ref() != Some(&former) {
            let docs = former.iter().filter_map(|(n, f)| Some((n.clone(), document(n, f)?))).collect();
            self.publisher.publish_type(type_url::FORMER_CLUSTER, docs);
            t.former = Some(former);
        }
        if t.peers.as_ref() != Some(&peers) {
            let docs = peers.iter().filter_map(|(n, p)| Some((n.clone(), document(n, p)?))).collect();
            self.publisher.publish_type(type_url::PEER_CLUSTER, docs);
            t.peers = Some(peers);
        }
        if !services.is_empty() || !t.served {
            t.served = true;
            self.publisher.update(type_url::IMPORTED_SERVICE, services);
        }
    }

    /// Accepts certificates of other trust domains as far as there are bundles and members, in this process and in
    /// proxies.
    fn trust(&self, t: &mut Tables) {
        let members = &t.node.members;
        let published = |d: &TrustDomain| t.revoked.get(d).map(Lists::published).unwrap_or_default();
        let of = |b: &Bundle| ForeignBundle {
            trust_domain: b.bundle.trust_domain.clone(),
            roots: b.bundle.pem(),
            clusters: members.of_domain(&b.bundle.trust_domain).map(|m| m.cluster.clone()).collect(),
            by_bundle: false,
            own: None,
            revoked: published(&b.bundle.trust_domain),
        };
        let mut now: BTreeMap<_, _> =
            members.bundles().map(|b| (b.bundle.trust_domain.to_string(), of(b))).collect();
        if let Some(mut own) = t.authority.as_ref().and_then(|a| self.own_roots(a)) {
            own.revoked = published(&own.trust_domain);
            let lists = t.revoked.get(&own.trust_domain);
            let listed =
                |c: &ClusterId| lists.is_some_and(|l| l.describe().any(|l| l.cluster.as_ref() == Some(c)));
            let mut all = members.peers().filter(|m| m.trust_domain.is_none()).map(|m| &m.cluster);
            if let Some(o) = &mut own.own {
                o.unlisted = !own.revoked.is_empty() && !all.all(listed);
            }
            now.insert(own.trust_domain.to_string(), own);
        }
        for b in &t.abroad {
            now.entry(b.trust_domain.to_string()).or_insert_with(|| b.clone());
        }
        if t.trust.as_ref() == Some(&now) {
            return;
        }
        // The own roots come from citadel in this process, and nobody of a domain without clusters is a peer of it.
        let trust = now.values().filter(|b| b.own.is_none() && !b.by_bundle).map(|b| ForeignTrust {
            trust_domain: b.trust_domain.clone(),
            roots: b.roots.clone(),
            clusters: Some(b.clusters.iter().cloned().collect()),
        });
        if let Err(error) = self.secrets.set_foreign_trust(trust.collect()) {
            tracing::error!(%error, "a trust bundle cannot be used: nobody of that trust domain is accepted");
        }
        for b in now.values() {
            if let Err(error) = self.secrets.set_revoked(&b.trust_domain, &b.roots, &b.revoked) {
                tracing::error!(%error, "a revocation list cannot be used");
            }
        }
        let docs = now.iter().filter_map(|(n, b)| Some((n.clone(), document(n, b)?))).collect();
        self.publisher.publish_type(type_url::FOREIGN_BUNDLE, docs);
        t.trust = Some(now);
    }

    /// The own roots as proxies are told of them.
    fn own_roots(&self, a: &AuthorityStatus) -> Option<ForeignBundle> {
        let within = self.options.renew_within.as_millis();
        Some(ForeignBundle {
            trust_domain: TrustDomain::new(&a.trust_domain).ok()?,
            roots: a.bundle.clone(),
            clusters: vec![],
            by_bundle: false,
            own: Some(OwnRoots {
                sequence: a.bundle_sequence,
                intermediate: a.intermediate_sha256.clone(),
                renew_within_ms: u32::try_from(within).unwrap_or(u32::MAX),
                unlisted: false,
            }),
            revoked: vec![],
        })
    }

    /// The own CA is another one, or none.
    pub(crate) fn set_roots(&self, authority: Option<AuthorityStatus>) {
        {
            let mut t = self.lock();
            if authority.is_none() {
                t.roots = Roots::default();
                t.revoked.clear();
            }
            t.authority = authority;
        }
        self.own_lists();
        self.roots_changed.send_modify(|n| *n += 1);
        self.publish();
    }

    /// The own CA has signed lists, or has other roots.
    fn own_lists(&self) {
        let (domain, roots, lists, kept) = {
            let mut t = self.lock();
            let Some(a) = &t.authority else { return };
            let Ok(domain) = TrustDomain::new(&a.trust_domain) else { return };
            let lists: Vec<_> = a
                .lists
                .iter()
                .map(|l| RevocationList { issuer: l.issuer.clone(), list: l.list.clone() })
                .collect();
            let roots = a.bundle.clone();
            let kept = t.kept_revoked.0.remove(domain.as_str()).unwrap_or_default();
            t.revoked.entry(domain.clone()).or_default().prune(&domain, &roots, unix_now());
            (domain, roots, lists, kept)
        };
        self.take_revoked(&domain, &roots, lists.into_iter().chain(kept), "this cluster");
    }

    /// Takes revocation lists of a trust domain; answers whether any was news.
    pub(crate) fn take_revoked(
        &self,
        domain: &TrustDomain,
        roots: &str,
        lists: impl IntoIterator<Item = RevocationList>,
        teller: &str,
    ) -> bool {
        let kept = {
            let mut t = self.lock();
            let (changed, wrong) =
                t.revoked.entry(domain.clone()).or_default().take(domain, roots, lists, unix_now());
            if let Some(why) = wrong {
                tracing::warn!(target: "audit", %domain, %teller, %why, "a revocation list was not taken");
            }
            if !changed {
                return false;
            }
            let mut kept = t.kept_revoked.clone();
            kept.0.extend(t.revoked.iter().map(|(d, l)| (d.to_string(), l.keep())));
            kept
        };
        if let Err(error) = self.store.save_revoked(&kept) {
            tracing::warn!(%error, "what is revoked was not saved; a restart asks others for it");
        }
        true
    }

    /// Keeps imports that changed since the last call.
    pub(crate) fn save_imports(&self) {
        let unsaved: Vec<_> = {
            let mut t = self.lock();
            let peers = std::mem::take(&mut t.unsaved);
            peers.into_iter().filter_map(|p| Some((t.node.imports.get(&p)?.persist(), p))).collect()
        };
        for (kept, peer) in unsaved {
            if let Err(error) = self.store.save_import(&peer, &kept) {
                tracing::warn!(%peer, %error, "imports were not saved; a restart would start without them");
            }
            // It may have left meanwhile, and its file been removed before this wrote it.
            if !self.lock().node.imports.contains_key(&peer) {
                let _ = self.store.drop_import(&peer);
            }
        }
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

/// Seconds since the epoch.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// This cluster as it presents itself.
fn this(o: &FederationOptions) -> Member {
    Member {
        cluster: o.cluster.clone(),
        network: o.network.clone(),
        gateways: o.gateways.clone(),
        transports: o.transports.clone(),
        epoch: 0,
        left: false,
        revision: 0,
        evicted: false,
        trust_domain: None,
        home: 0,
    }
}

fn document<T: serde::Serialize>(name: &str, record: &T) -> Option<Document> {
    // Records of plain data always serialise to objects.
    Document::new(name, record)
        .inspect_err(|error| tracing::error!(%name, %error, "a record was not published"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_of_itself_is_shown_only_if_it_can_be_true() {
        let mut l = LinkStatus::default();
        for bad in ["", "1.0\n\u{1b}[31m", "v 1", &"1".repeat(MAX_SOFTWARE + 1)] {
            l.runs(bad);
            assert_eq!(l.software, "", "{bad:?}");
        }
        l.runs("1.2.3-rc.1+abc");
        assert_eq!(l.software, "1.2.3-rc.1+abc");
        // From the future, or of another run.
        l.stamped(2000, 1000);
        l.stamped(1, 120_000_000);
        assert_eq!(l.rtt, None);
        l.stamped(1000, 9000);
        assert_eq!(l.rtt, Some(Duration::from_millis(8)));
        l.stamped(1000, 17_000);
        assert_eq!(l.rtt, Some(Duration::from_millis(9)));
    }
}
