//! Keeping the bundles of declared trust domains current.
//!
//! Rules:
//! 1. One task polls one endpoint, as often as its bundle hints, within limits: a hint is another's word.
//! 2. An endpoint that fails, or answers with what is no bundle, changes nothing: the last bundle stays, also over a restart,
//!    until its roots end. It is asked again at the next turn; only who has no bundle yet asks more often.
//! 3. Sequences only rise, and the roots of one sequence stay the same. A bundle without a sequence is newer than what is
//!    here, and so is any than one that an operator wrote down.
//! 4. A `https_spiffe` endpoint is verified by the newest bundle of its own domain, so that it may replace its roots.
//! 5. A domain that is the own one, that a mesh joined with, or that has another's root is not used. The join goes first: it
//!    knows of clusters.
//! 6. Who is no longer declared is forgotten at once, and so is what was polled for when its declaration changes.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_identity::{IdentityError, TrustBundle};
use mesh_model::{TrustDomain, authored::Kind, federation::ForeignBundle};
use mesh_xds::{Endpoint as Xds, NodeInfo, mcp::ConfigClient};
use rand::RngExt as _;
use tokio::task::JoinHandle;

use super::{
    declared::{self, Declared, Endpoint},
    fetch, spiffe_tls, web_tls,
};
use crate::{
    admin_pb::BundleStatus,
    federate::{REFRESH, REFRESH_LIMITS},
    state::{Shared, Tables},
};

/// Pauses of who has no bundle yet.
const FIRST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// A trust domain that is known by its bundle alone.
#[derive(Debug, Clone, Default)]
pub(crate) struct ByBundle {
    pub(crate) bundle: Option<TrustBundle>,
    /// The bundle is one that the endpoint told.
    pub(crate) fetched: bool,
    /// Of the declaration.
    pub(crate) fingerprint: String,
    endpoint: String,
    confirmed: Option<Instant>,
    /// Of the endpoint, and of its use (rule 5).
    error: String,
    unused: String,
}

impl ByBundle {
    /// As an endpoint told it before a restart.
    pub(crate) fn kept(bundle: TrustBundle, fingerprint: String) -> Self {
        Self { bundle: Some(bundle), fetched: true, fingerprint, ..Self::default() }
    }
}

struct Poll(Declared, Option<JoinHandle<()>>);

impl Drop for Poll {
    fn drop(&mut self) {
        if let Some(task) = &self.1 {
            task.abort();
        }
    }
}

/// Follows what is declared for as long as the component runs.
pub(crate) async fn follow(shared: Arc<Shared>, galley: Xds) {
    let types = [Kind::FederatedTrustDomain, Kind::MeshConfig].map(Kind::type_url);
    let client = ConfigClient::start(galley, NodeInfo::component("federation"), &types);
    let mut documents = client.watch();
    let (mut members, mut roots) = (shared.members_changed.subscribe(), shared.roots_changed.subscribe());
    let mut polls: BTreeMap<TrustDomain, Poll> = BTreeMap::new();
    loop {
        let state = documents.borrow_and_update().clone();
        // Before galley has answered, what was kept is used.
        if state.synced {
            declare(&shared, declared::read(&state), &mut polls);
        }
        reckon(&shared);
        let changed = tokio::select! {
            r = documents.changed() => r,
            r = members.changed() => r,
            r = roots.changed() => r,
            () = shared.bundle_told.notified() => Ok(()),
        };
        if changed.is_err() {
            return;
        }
    }
}

fn declare(
    shared: &Arc<Shared>,
    now: BTreeMap<TrustDomain, Declared>,
    polls: &mut BTreeMap<TrustDomain, Poll>,
) {
    polls.retain(|domain, p| now.get(domain) == Some(&p.0));
    {
        let mut t = shared.lock();
        let before = t.by_bundle.len();
        t.by_bundle.retain(|d, b| now.get(d).is_some_and(|n| n.fingerprint() == b.fingerprint));
        let mut news = t.by_bundle.len() != before;
        for (domain, d) in &now {
            let b = t.by_bundle.entry(domain.clone()).or_insert_with(|| {
                news = true;
                ByBundle { bundle: d.written.clone(), fingerprint: d.fingerprint(), ..ByBundle::default() }
            });
            b.endpoint = d.endpoint.as_ref().map(|e| e.url.to_string()).unwrap_or_default();
            if !d.error.is_empty() && b.error != d.error {
                tracing::warn!(%domain, error = %d.error, "what is declared of a trust domain cannot be used");
                b.error.clone_from(&d.error);
            }
        }
        if news && let Err(error) = shared.store.save_by_bundle(&t.by_bundle) {
            tracing::warn!(%error, "bundles of declared trust domains were not saved");
        }
    }
    for (domain, d) in now {
        polls.entry(domain.clone()).or_insert_with(|| {
            let task = d.endpoint.clone().map(|e| tokio::spawn(poll(shared.clone(), domain, e)));
            Poll(d, task)
        });
    }
}

/// Decides which of the bundles are used (rule 5), and publishes them.
fn reckon(shared: &Shared) {
    {
        let mut t = shared.lock();
        let t = &mut *t;
        let own = t.authority.as_ref().and_then(|a| {
            let domain = TrustDomain::new(&a.trust_domain).ok()?;
            TrustBundle::from_pem(domain, a.bundle.as_bytes(), a.bundle_sequence, None).ok()
        });
        let mut used: Vec<TrustBundle> = t.node.members.bundles().map(|b| b.bundle.clone()).collect();
        let joined = t.node.members.domains();
        let fixed = used.len() + usize::from(own.is_some());
        used.extend(own.clone());
        for (domain, b) in &mut t.by_bundle {
            let Some(bundle) = &b.bundle else { continue };
            let why = if own.as_ref().is_some_and(|o| o.trust_domain == *domain) {
                "it is the own trust domain, whose roots come from its CA".to_owned()
            } else if joined.contains(domain) {
                "a mesh of that trust domain joined, which goes before what is declared".to_owned()
            } else if let Some(o) = used.iter().find(|o| o.shares_root(bundle)) {
                format!("a root of it is also one of {}: who holds it could speak for both", o.trust_domain)
            } else {
                used.push(bundle.clone());
                String::new()
            };
            if why != b.unused {
                if !why.is_empty() {
                    tracing::warn!(%domain, %why, "the bundle of a declared trust domain is not used");
                }
                b.unused = why;
            }
        }
        let used = used.into_iter().skip(fixed).filter(|_| own.is_some());
        t.abroad = used
            .map(|b| ForeignBundle {
                roots: b.pem(),
                trust_domain: b.trust_domain,
                clusters: vec![],
                by_bundle: true,
                own: None,
                revoked: vec![],
            })
            .collect();
    }
    shared.publish();
}

async fn poll(shared: Arc<Shared>, domain: TrustDomain, endpoint: Endpoint) {
    let mut failed = 0;
    loop {
        let answer = match tls(&shared, &domain, &endpoint) {
            Ok(tls) => fetch(&endpoint.url, &domain, tls).await.map_err(|e| in_full(&e)),
            Err(e) => Err(e),
        };
        let pause = take(&shared, &domain, answer, &mut failed);
        let pause = pause.mul_f64(rand::rng().random_range(0.9..=1.0));
        tokio::time::sleep(pause).await;
    }
}

/// An error with its causes.
fn in_full(e: &dyn std::error::Error) -> String {
    let mut out = e.to_string();
    let mut cause = e.source();
    while let Some(c) = cause {
        let text = c.to_string();
        if !out.contains(&text) {
            out = format!("{out}: {text}");
        }
        cause = c.source();
    }
    out
}

/// How the endpoint is verified now (rule 4).
fn tls(
    shared: &Shared,
    domain: &TrustDomain,
    endpoint: &Endpoint,
) -> Result<Arc<rustls::ClientConfig>, String> {
    let Some(id) = &endpoint.spiffe else {
        let file = &shared.options.endpoints.web_roots;
        let pem = std::fs::read(file).map_err(|e| format!("--web-roots {}: {e}", file.display()))?;
        return web_tls(&pem).map_err(|e| e.to_string());
    };
    let t = shared.lock();
    let held = |d: &TrustDomain| {
        let declared = t.by_bundle.get(d).and_then(|b| b.bundle.clone());
        declared.or_else(|| t.node.members.bundle(d).map(|b| b.bundle.clone()))
    };
    let of = TrustDomain::new(id.trust_domain()).map_err(|e| e.to_string())?;
    let bundle = held(&of).ok_or_else(|| {
        format!("the endpoint of {domain} is {id}, and there is no bundle of {of} here to verify it by: declare it as well")
    })?;
    spiffe_tls(&bundle, id).map_err(|e: IdentityError| e.to_string())
}

/// Whether a bundle that an endpoint tells is to be taken in the place of what it told before (rule 3).
fn newer(held: Option<&TrustBundle>, new: &TrustBundle) -> Result<(), String> {
    let Some(held) = held else { return Ok(()) };
    let (old, now) = (held.sequence, new.sequence);
    if now == 0 || old == 0 || now > old || (now == old && held.roots == new.roots) {
        return Ok(());
    }
    Err(if now < old {
        format!("it tells a bundle of sequence {now}, and {old} is here: the older is not taken")
    } else {
        format!("it tells other roots under the same sequence {now}")
    })
}

/// Takes an answer; tells when to ask again.
fn take(
    shared: &Shared,
    domain: &TrustDomain,
    answer: Result<TrustBundle, String>,
    failed: &mut u32,
) -> Duration {
    let pause = {
        let mut t = shared.lock();
        let Some(b) = t.by_bundle.get_mut(domain) else { return REFRESH };
        let hint =
            |b: &TrustBundle| b.refresh_hint.unwrap_or(REFRESH).clamp(REFRESH_LIMITS.0, REFRESH_LIMITS.1);
        let held = b.bundle.as_ref().filter(|_| b.fetched);
        match answer.and_then(|new| newer(held, &new).map(|()| new)) {
            Ok(new) => {
                *failed = 0;
                let pause = hint(&new);
                b.confirmed = Some(Instant::now());
                b.error.clear();
                if b.bundle.as_ref() != Some(&new) || !b.fetched {
                    let (sequence, roots) = (new.sequence, new.roots.len());
                    tracing::info!(target: "audit", %domain, sequence, roots, "a trust domain has a new bundle");
                    b.bundle = Some(new);
                    b.fetched = true;
                    if let Err(error) = shared.store.save_by_bundle(&t.by_bundle) {
                        tracing::warn!(%error, "bundles of declared trust domains were not saved");
                    }
                }
                pause
            }
            Err(error) => {
                *failed = failed.saturating_add(1);
                if b.error != error {
                    tracing::warn!(%domain, %error, "the bundle of a trust domain was not renewed");
                    b.error = error;
                }
                match &b.bundle {
                    Some(held) if b.fetched => hint(held),
                    _ => FIRST.1.min(FIRST.0 * 2u32.saturating_pow((*failed - 1).min(16))),
                }
            }
        }
    };
    shared.bundle_told.notify_one();
    pause
}

/// What the operator is told of them.
pub(crate) fn status(t: &Tables) -> impl Iterator<Item = BundleStatus> + '_ {
    t.by_bundle.iter().map(|(domain, b)| BundleStatus {
        trust_domain: domain.to_string(),
        sequence: b.bundle.as_ref().map_or(0, |b| b.sequence),
        refresh_hint: b.bundle.as_ref().and_then(|b| b.refresh_hint).map_or(0, |d| d.as_secs()),
        roots: b.bundle.as_ref().map_or(0, |b| u32::try_from(b.roots.len()).unwrap_or(u32::MAX)),
        not_after: b.bundle.as_ref().map_or(0, TrustBundle::ends),
        confirmed_age: b.confirmed.map(|t| t.elapsed().as_secs()),
        error: if b.unused.is_empty() { b.error.clone() } else { b.unused.clone() },
        endpoint: b.endpoint.clone(),
        by_bundle: true,
    })
}

#[cfg(test)]
mod tests;
