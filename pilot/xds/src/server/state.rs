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
//! - Types go out in the order clusters, endpoints, listeners, routes, secrets. With delta,
//!   removals of clusters and endpoints wait until listeners and routes that may have referred to
//!   them are acknowledged: make before break. State of the world cannot express that.

use std::collections::{BTreeMap, BTreeSet};

use super::{TypeSnapshot, status::TypeStatus};
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
const MAX_TYPES: usize = 64;
/// Names per type. A sidecar of a mesh with 20,000 services and four ports each stays below.
const MAX_NAMES: usize = 200_000;

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
    pub resources: Vec<pb::Resource>,
    /// Names that are gone (delta only).
    pub removed: Vec<String>,
}

/// State of one stream.
#[derive(Debug)]
pub struct Session {
    mode: Mode,
    types: BTreeMap<(u8, String), Sub>,
    nonces: u64,
}

#[derive(Debug, Default)]
struct Sub {
    wildcard: bool,
    /// State of the world: the client has named resources once, so "no names" no longer means all.
    named: bool,
    names: BTreeSet<String>,
    /// Versions that the client has, or was sent, by name.
    known: BTreeMap<String, String>,
    in_flight: Option<String>,
    last_nonce: String,
    dirty: bool,
    must_reply: bool,
    /// Names to answer for even if their version is known.
    force: BTreeSet<String>,
    status: TypeStatus,
}

impl Sub {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
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
        Self { mode, types: BTreeMap::new(), nonces: 0 }
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
        let mut names: BTreeSet<String> = req.resource_names.iter().cloned().collect();
        let star = names.remove("*");
        if !names.is_empty() || star {
            sub.named = true;
        }
        let wildcard = star || (names.is_empty() && !sub.named);
        let grew = (wildcard && !sub.wildcard) || names.iter().any(|n| !sub.names.contains(n));
        if grew {
            sub.force.extend(names.difference(&sub.names).cloned());
            sub.must_reply = true;
            sub.dirty = true;
        }
        if names != sub.names || wildcard != sub.wildcard {
            sub.names = names;
            sub.wildcard = wildcard;
            let mut known = std::mem::take(&mut sub.known);
            known.retain(|n, _| sub.wants(n));
            sub.known = known;
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
            sub.known = req.initial_resource_versions.clone().into_iter().collect();
            sub.wildcard = req.resource_names_subscribe.is_empty();
            sub.must_reply = true;
            sub.dirty = true;
        } else if !req.response_nonce.is_empty() {
            // A late answer acknowledges nothing, its subscription changes count all the same.
            let _ = sub.answer(&req.response_nonce, req.error_detail.as_ref());
        }
        for n in &req.resource_names_unsubscribe {
            if n == "*" {
                sub.wildcard = false;
                let names = &sub.names;
                sub.known.retain(|k, _| names.contains(k));
            } else {
                sub.names.remove(n);
                sub.force.remove(n);
                if sub.wildcard {
                    // Still wanted by the wildcard: say what it is now.
                    sub.force.insert(n.clone());
                    sub.dirty = true;
                } else {
                    sub.known.remove(n);
                }
            }
        }
        for n in &req.resource_names_subscribe {
            if n == "*" {
                sub.wildcard = true;
            } else {
                // At the start of a stream the client tells what it has; later a repeated
                // subscription asks for the resource again.
                if !(fresh && sub.known.contains_key(n)) {
                    sub.force.insert(n.clone());
                }
                sub.names.insert(n.clone());
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
        S: Fn(&str) -> std::sync::Arc<TypeSnapshot>,
    {
        // Twice: the first pass may settle listeners and routes, which frees removals of clusters.
        for _ in 0..2 {
            let keys: Vec<(u8, String)> = self
                .types
                .iter()
                .filter(|(_, s)| s.dirty && s.in_flight.is_none())
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
        let mut current = BTreeMap::new();
        let mut resources = Vec::new();
        let mut changed = false;
        for (name, r) in wanted(sub, snapshot) {
            current.insert(name.clone(), r.version.clone());
            let differs = sub.known.get(name) != Some(&r.version);
            changed |= differs;
            if full || differs || sub.force.contains(name) {
                resources.push(r.clone());
            }
        }
        changed |= full && current.len() != sub.known.len();
        sub.dirty = false;
        if !changed && !std::mem::take(&mut sub.must_reply) {
            return None;
        }
        sub.must_reply = false;
        sub.force.clear();
        sub.known = current;
        Some(self.push(key, snapshot, resources, vec![]))
    }

    fn poll_delta(&mut self, key: &(u8, String), snapshot: &TypeSnapshot) -> Option<Push> {
        let hold = key.0 <= 1 && self.types.iter().any(|(k, s)| (k.0 == 2 || k.0 == 3) && !s.settled());
        let sub = self.types.get_mut(key)?;
        let mut resources = Vec::new();
        for (name, r) in wanted(sub, snapshot) {
            if sub.known.get(name) != Some(&r.version) || sub.force.contains(name) {
                resources.push(r.clone());
            }
        }
        let gone: Vec<String> =
            sub.known.keys().filter(|n| !snapshot.resources.contains_key(*n)).cloned().collect();
        let mut removed: Vec<String> = sub
            .force
            .iter()
            .filter(|n| !snapshot.resources.contains_key(*n) && !sub.known.contains_key(*n))
            .cloned()
            .collect();
        let held = hold && !gone.is_empty();
        if !held {
            removed.extend(gone);
        }
        sub.dirty = held;
        if resources.is_empty() && removed.is_empty() && !sub.must_reply {
            return None;
        }
        sub.must_reply = false;
        sub.force.clear();
        for r in &resources {
            sub.known.insert(r.name.clone(), r.version.clone());
        }
        for n in &removed {
            sub.known.remove(n);
        }
        Some(self.push(key, snapshot, resources, removed))
    }

    fn push(
        &mut self,
        key: &(u8, String),
        snapshot: &TypeSnapshot,
        resources: Vec<pb::Resource>,
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
) -> Box<dyn Iterator<Item = (&'a String, &'a pb::Resource)> + 'a> {
    if sub.wildcard {
        Box::new(snapshot.resources.iter())
    } else {
        Box::new(sub.names.iter().filter_map(|n| snapshot.resources.get_key_value(n)))
    }
}

#[cfg(test)]
mod tests;
