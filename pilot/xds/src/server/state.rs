//! The protocol of one ADS stream, without I/O.
//!
//! Rules, from the xDS specification and what Envoy does in practice:
//!
//! - At most one response per type is unanswered; changes meanwhile are folded into the next one.
//! - A response is acknowledged or rejected by the request that carries its nonce. Requests with an
//!   older nonce do not acknowledge anything (state of the world: they are ignored altogether).
//! - A first request without names subscribes to everything, as does the name `*`.
//! - What a client rejected is not sent again until it changes.
//! - The first request of a type is always answered, also with nothing, so that a client can tell
//!   "empty" from "not yet".
//! - A name that is subscribed and does not exist is reported as removed (delta), so that a client
//!   need not wait for its timeout.
//! - Types go out in the order clusters, endpoints, listeners, virtual hosts, routes, secrets. Routes wait until virtual
//!   hosts are acknowledged: a port that is new would send requests for hosts that it does not have elsewhere. With delta,
//!   removals of clusters and endpoints wait until listeners and routes that may have referred to
//!   them are acknowledged: make before break. State of the world cannot express that.
//! - What a snapshot has on demand a client gets by name alone, never by wildcard (`asked.rs`). A name that
//!   is asked for once more is answered once more, as it is for the client to forget what it was told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Layer, TypeSnapshot, asked::Asked, names, status::TypeStatus};
use crate::{pb, type_url};

/// Variant of the protocol that a stream speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// State of the world.
    Sotw,
    /// Incremental.
    Delta,
}

/// A request that breaks the protocol; the stream is closed with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// No type in the request.
    #[error("request without type_url")]
    NoType,
    /// More types than any client has use for.
    #[error("more than {0} types on one stream")]
    TooManyTypes(usize),
    /// More names than any client has use for.
    #[error("more than {0} names subscribed for one type")]
    TooManyNames(usize),
}

/// Types per stream: a proxy uses six, a configuration reader about twenty.
pub(crate) const MAX_TYPES: usize = 64;
/// Names per type. A sidecar of a mesh with 20,000 services and four ports each stays below.
const MAX_NAMES: usize = 200_000;

/// Positions in a push of types that refer to clusters: listeners, virtual hosts, routes.
const REFERRING: std::ops::RangeInclusive<u8> = 2..=4;

/// What to send next.
#[derive(Debug, Clone, PartialEq)]
pub struct Push {
    /// Type.
    pub type_url: String,
    /// Version of the whole.
    pub version: String,
    /// Nonce that the client answers with.
    pub nonce: String,
    /// New and changed resources; for full-state types in state-of-the-world mode all of them.
    pub resources: Vec<Arc<pb::Resource>>,
    /// Names that are gone (delta only).
    pub removed: Vec<String>,
}

/// State of one stream.
#[derive(Debug)]
pub struct Session {
    mode: Mode,
    types: BTreeMap<(u8, String), Sub>,
    nonces: u64,
    /// Names of things on demand that came since [`Session::take_asked`].
    asked: usize,
}

#[derive(Debug, Default)]
struct Sub {
    wildcard: bool,
    /// State of the world: the client has named resources once, so "no names" no longer means all.
    named: bool,
    names: BTreeSet<Arc<str>>,
    held: Held,
    in_flight: Option<String>,
    last_nonce: String,
    dirty: bool,
    must_reply: bool,
    /// Names to answer for even if their version is known.
    force: BTreeSet<String>,
    /// It has been answered: what it told at the start has been looked at.
    begun: bool,
    /// What names led to, where there is something on demand ...
    asked: Option<Asked>,
    /// ... by other names than resources have: whatever they lead to is wanted.
    aliased: bool,
    status: TypeStatus,
}

/// A version that nothing has.
const UNKNOWN: &str = "?";

/// What a client has, or was sent.
#[derive(Debug, Default)]
struct Held {
    /// All of these that it wants ...
    layers: Vec<Arc<Layer>>,
    /// ... but of these names another version, or none.
    but: BTreeMap<String, Option<String>>,
}

impl Held {
    fn version(&self, name: &str) -> Option<&str> {
        match self.but.get(name) {
            Some(v) => v.as_deref(),
            None => self.layers.iter().find_map(|l| l.get(name)).map(|r| r.version.as_str()),
        }
    }

    /// Names that differ between these and a snapshot's layers, if that is known.
    fn changed<'a>(&self, snapshot: &'a TypeSnapshot) -> Option<Vec<&'a [String]>> {
        if self.layers.len() != snapshot.layers().len() {
            return None;
        }
        self.layers.iter().zip(snapshot.layers()).map(|(old, new)| new.changed_since(old)).collect()
    }
}

/// What a client lacks.
#[derive(Default)]
struct Difference {
    /// It wants them, and has them not or in another version; or they are asked for again.
    changed: Vec<Arc<pb::Resource>>,
    /// It has them, and they are no more, with the version that it has.
    gone: Vec<(String, String)>,
    /// It asked for them, and they are not.
    absent: Vec<String>,
}

impl Sub {
    /// Changes what is wanted. What was not wanted before the client does not have.
    fn want(&mut self, wildcard: bool, names: BTreeSet<Arc<str>>) {
        if wildcard && !self.wildcard {
            let all = self.held.layers.iter().flat_map(|l| l.resources());
            let fresh = all.map(|r| &r.name).filter(|n| !self.names.contains(n.as_str()));
            // What is on its way may hold some of them: they are said again, or said to be gone.
            let version = self.in_flight.is_some().then(|| UNKNOWN.to_owned());
            self.held.but.extend(fresh.map(|n| (n.clone(), version.clone())));
        }
        if !self.wildcard {
            for n in names.difference(&self.names) {
                self.held.but.insert(n.to_string(), None);
            }
        }
        (self.wildcard, self.names) = (wildcard, names);
        let (all, names) = (self.wildcard || self.aliased, &self.names);
        self.held.but.retain(|n, _| all || names.contains(n.as_str()));
    }

    /// Compares what the client has with what it should have.
    fn difference(&self, snapshot: &TypeSnapshot) -> Difference {
        let mut out = Difference::default();
        let mut names: BTreeSet<&str> = self.force.iter().map(String::as_str).collect();
        names.extend(self.held.but.keys().map(String::as_str));
        match self.held.changed(snapshot) {
            Some(changed) => names.extend(changed.into_iter().flatten().map(String::as_str)),
            None if self.wildcard || self.aliased => {
                let old = self.held.layers.iter().flat_map(|l| l.resources());
                names.extend(old.chain(snapshot.resources()).map(|r| r.name.as_str()));
            }
            None => names.extend(self.names.iter().map(|n| &**n)),
        }
        for n in names {
            let wanted = self.wants(n);
            // What it told at the start counts, whether it wants it now or not.
            let old = self.held.version(n).filter(|_| wanted || self.held.but.contains_key(n));
            match (snapshot.get(n), old) {
                (Some(new), old) => {
                    if wanted && (old != Some(new.version.as_str()) || self.force.contains(n)) {
                        out.changed.push(Arc::clone(new));
                    }
                }
                (None, Some(old)) => out.gone.push((n.to_owned(), old.to_owned())),
                (None, None) => {
                    if self.force.contains(n) {
                        out.absent.push(n.to_owned());
                    }
                }
            }
        }
        out
    }

    /// The client has all of a snapshot, and besides what is `left` of what is gone.
    fn has(&mut self, snapshot: &TypeSnapshot, left: Vec<(String, String)>) {
        self.held.layers = snapshot.layers().to_vec();
        self.held.but = left.into_iter().map(|(n, v)| (n, Some(v))).collect();
    }

    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.aliased || self.names.contains(name)
    }

    /// The snapshot as far as it is for this client, and how many names that asks for were new.
    fn narrow(&mut self, type_url: &str, snapshot: &Arc<TypeSnapshot>) -> (Arc<TypeSnapshot>, usize) {
        let Some(source) = snapshot.on_demand() else {
            (self.asked, self.aliased) = (None, false);
            return (Arc::clone(snapshot), 0);
        };
        self.aliased = type_url == type_url::VHDS;
        let asked = self.asked.get_or_insert_default();
        let narrowed = asked.narrow(&mut self.names, snapshot, source);
        let named = std::mem::take(&mut self.force);
        let fresh = if self.begun { named.len() } else { 0 };
        for n in named {
            let Some(target) = asked.target(&n) else {
                self.force.insert(n);
                continue;
            };
            // What a client comes back with it need not be sent again, under whatever name it asks.
            if self.begun || !matches!(self.held.but.get(target), Some(Some(_))) {
                self.force.insert(target.to_owned());
            }
        }
        self.begun = true;
        self.status.subscribed = self.names.len();
        (Arc::new(narrowed), fresh)
    }

    fn settled(&self) -> bool {
        !self.dirty && self.in_flight.is_none()
    }

    /// Takes the answer to a response. Returns false if it answers an older one.
    fn answer(&mut self, nonce: &str, error: Option<&pb::Status>) -> bool {
        if self.in_flight.as_deref() != Some(nonce) {
            return nonce == self.last_nonce;
        }
        self.in_flight = None;
        match error {
            None => {
                self.status.acked_version.clone_from(&self.status.sent_version);
                self.status.acked_nonce = nonce.to_owned();
                self.status.error = None;
            }
            Some(e) => {
                self.status.nacks += 1;
                self.status.error = Some(e.message.clone());
            }
        }
        true
    }
}

impl Session {
    /// A stream that has not asked for anything.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        Self { mode, types: BTreeMap::new(), nonces: 0, asked: 0 }
    }

    fn sub(&mut self, type_url: &str) -> Result<(&mut Sub, bool), ProtocolError> {
        if type_url.is_empty() {
            return Err(ProtocolError::NoType);
        }
        let key = (type_url::push_order(type_url), type_url.to_owned());
        let fresh = !self.types.contains_key(&key);
        if fresh && self.types.len() >= MAX_TYPES {
            return Err(ProtocolError::TooManyTypes(MAX_TYPES));
        }
        Ok((self.types.entry(key).or_default(), fresh))
    }

    /// A state-of-the-world request.
    ///
    /// # Errors
    /// [`ProtocolError`]; the stream must be closed.
    pub fn on_sotw(&mut self, req: &pb::DiscoveryRequest) -> Result<(), ProtocolError> {
        if req.resource_names.len() > MAX_NAMES {
            return Err(ProtocolError::TooManyNames(MAX_NAMES));
        }
        let (sub, fresh) = self.sub(&req.type_url)?;
        if !fresh
            && !req.response_nonce.is_empty()
            && !sub.answer(&req.response_nonce, req.error_detail.as_ref())
        {
            return Ok(());
        }
        let star = req.resource_names.iter().any(|n| n == "*");
        let asked = req.resource_names.iter().filter(|n| *n != "*");
        let names: BTreeSet<Arc<str>> = asked.map(|n| names::shared(n)).collect();
        if !names.is_empty() || star {
            sub.named = true;
        }
        let wildcard = star || (names.is_empty() && !sub.named);
        let grew = (wildcard && !sub.wildcard) || names.iter().any(|n| !sub.names.contains(n));
        if grew {
            sub.force.extend(names.difference(&sub.names).map(ToString::to_string));
            sub.must_reply = true;
            sub.dirty = true;
        }
        if names != sub.names || wildcard != sub.wildcard {
            sub.want(wildcard, names);
        }
        if fresh {
            sub.must_reply = true;
            sub.dirty = true;
        }
        sub.status.subscribed = sub.names.len();
        Ok(())
    }

    /// An incremental request.
    ///
    /// # Errors
    /// [`ProtocolError`]; the stream must be closed.
    pub fn on_delta(&mut self, req: &pb::DeltaDiscoveryRequest) -> Result<(), ProtocolError> {
        let (sub, fresh) = self.sub(&req.type_url)?;
        if fresh {
            if req.initial_resource_versions.len() > MAX_NAMES {
                return Err(ProtocolError::TooManyNames(MAX_NAMES));
            }
            let told = req.initial_resource_versions.iter();
            sub.held.but = told.map(|(n, v)| (n.clone(), Some(v.clone()))).collect();
            sub.wildcard = req.resource_names_subscribe.is_empty();
            sub.must_reply = true;
            sub.dirty = true;
        } else if !req.response_nonce.is_empty() {
            // A late answer acknowledges nothing, its subscription changes count all the same.
            let _ = sub.answer(&req.response_nonce, req.error_detail.as_ref());
        }
        for n in &req.resource_names_unsubscribe {
            if n == "*" {
                let names = sub.names.clone();
                sub.want(false, names);
            } else {
                sub.names.remove(n.as_str());
                sub.force.remove(n);
                if sub.wildcard {
                    // Still wanted by the wildcard: say what it is now.
                    sub.force.insert(n.clone());
                    sub.dirty = true;
                } else {
                    sub.held.but.remove(n);
                }
            }
        }
        for n in &req.resource_names_subscribe {
            if n == "*" {
                if !fresh {
                    let names = sub.names.clone();
                    sub.want(true, names);
                }
                sub.wildcard = true;
            } else {
                // At the start of a stream the client tells what it has; later a repeated
                // subscription asks for the resource again.
                if !(fresh && sub.held.but.contains_key(n)) {
                    sub.force.insert(n.clone());
                    if !sub.wants(n) {
                        sub.held.but.insert(n.clone(), None);
                    }
                }
                sub.names.insert(names::shared(n));
            }
            sub.dirty = true;
        }
        if sub.names.len() > MAX_NAMES {
            return Err(ProtocolError::TooManyNames(MAX_NAMES));
        }
        sub.status.subscribed = sub.names.len();
        Ok(())
    }

    /// The source changed: every type has to be looked at again.
    pub fn mark_dirty(&mut self) {
        for sub in self.types.values_mut() {
            sub.dirty = true;
        }
    }

    /// The next response to send, if any. Call until it returns `None`.
    pub fn poll<S>(&mut self, source: S) -> Option<Push>
    where
        S: Fn(&str) -> Arc<TypeSnapshot>,
    {
        // Twice: the first pass may settle listeners and routes, which frees removals of clusters.
        for _ in 0..2 {
            let unsure = self.types.iter().any(|(k, s)| k.1 == type_url::VHDS && s.in_flight.is_some());
            let keys: Vec<(u8, String)> = self
                .types
                .iter()
                .filter(|(k, s)| s.dirty && s.in_flight.is_none() && !(unsure && k.1 == type_url::RDS))
                .map(|(k, _)| k.clone())
                .collect();
            for key in keys {
                let snapshot = source(&key.1);
                let push = match self.mode {
                    Mode::Sotw => self.poll_sotw(&key, &snapshot),
                    Mode::Delta => self.poll_delta(&key, &snapshot),
                };
                if push.is_some() {
                    return push;
                }
            }
        }
        None
    }

    fn poll_sotw(&mut self, key: &(u8, String), snapshot: &TypeSnapshot) -> Option<Push> {
        let sub = self.types.get_mut(key)?;
        let full = type_url::full_state(&key.1);
        let difference = sub.difference(snapshot);
        let changed = !difference.changed.is_empty() || (full && !difference.gone.is_empty());
        sub.dirty = false;
        sub.has(snapshot, vec![]);
        if !changed && !sub.must_reply {
            return None;
        }
        sub.must_reply = false;
        sub.force.clear();
        let resources = if full { wanted(sub, snapshot).cloned().collect() } else { difference.changed };
        Some(self.push(key, snapshot, resources, vec![]))
    }

    fn poll_delta(&mut self, key: &(u8, String), snapshot: &Arc<TypeSnapshot>) -> Option<Push> {
        let hold = key.0 <= 1 && self.types.iter().any(|(k, s)| REFERRING.contains(&k.0) && !s.settled());
        let sub = self.types.get_mut(key)?;
        let (snapshot, fresh) = sub.narrow(&key.1, snapshot);
        let snapshot = &*snapshot;
        self.asked += fresh;
        let Difference { changed, gone, absent: mut removed } = sub.difference(snapshot);
        let held = hold && !gone.is_empty();
        sub.dirty = held;
        if held {
            sub.has(snapshot, gone);
        } else {
            removed.extend(gone.into_iter().map(|(n, _)| n));
            sub.has(snapshot, vec![]);
        }
        if changed.is_empty() && removed.is_empty() && !sub.must_reply {
            return None;
        }
        sub.must_reply = false;
        sub.force.clear();
        let changed = match &sub.asked {
            Some(asked) if sub.aliased => asked.with_aliases(changed),
            _ => changed,
        };
        Some(self.push(key, snapshot, changed, removed))
    }

    fn push(
        &mut self,
        key: &(u8, String),
        snapshot: &TypeSnapshot,
        resources: Vec<Arc<pb::Resource>>,
        removed: Vec<String>,
    ) -> Push {
        self.nonces += 1;
        let nonce = self.nonces.to_string();
        if let Some(sub) = self.types.get_mut(key) {
            sub.in_flight = Some(nonce.clone());
            sub.last_nonce.clone_from(&nonce);
            sub.status.sent_version.clone_from(&snapshot.version);
            sub.status.sent_nonce.clone_from(&nonce);
            sub.status.pushes += 1;
        }
        Push { type_url: key.1.clone(), version: snapshot.version.clone(), nonce, resources, removed }
    }

    /// How many names of things on demand came since this was asked last. What a client says when it comes back does not
    /// count.
    pub fn take_asked(&mut self) -> usize {
        std::mem::take(&mut self.asked)
    }

    /// Whether the response with this nonce is unanswered.
    #[must_use]
    pub fn awaits(&self, nonce: &str) -> bool {
        self.types.values().any(|s| s.in_flight.as_deref() == Some(nonce))
    }

    /// What this client has been sent and has acknowledged, by type.
    #[must_use]
    pub fn status(&self) -> BTreeMap<String, TypeStatus> {
        self.types.iter().map(|(k, s)| (k.1.clone(), s.status.clone())).collect()
    }
}

/// Subscribed resources that exist. Looks names up when they are the smaller set.
fn wanted<'a>(
    sub: &'a Sub,
    snapshot: &'a TypeSnapshot,
) -> Box<dyn Iterator<Item = &'a Arc<pb::Resource>> + 'a> {
    if sub.wildcard {
        Box::new(snapshot.resources())
    } else {
        Box::new(sub.names.iter().filter_map(|n| snapshot.get(n)))
    }
}

#[cfg(test)]
mod tests;
