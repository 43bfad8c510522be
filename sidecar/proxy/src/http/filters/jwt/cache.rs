//! Tokens that a worker has verified.
//!
//! Two generations: what is used moves to the young one, and the old one is dropped whole when the young
//! one is full. So both time and memory are bounded, whatever clients send.

use std::{collections::HashMap, sync::Arc};

use serde_json::Value;

use super::token::Claims;

/// Tokens of a generation.
const MAX_TOKENS: usize = 512;
/// Longer tokens are verified each time; Envoy's limit.
const MAX_LENGTH: usize = 4096;
/// Times a token is kept that does not say when it ends.
const DEFAULT_LIFE: u64 = 3600;

/// A token whose signature is right. Its claims are checked at every use.
#[derive(Debug)]
pub(crate) struct Verified {
    pub(super) claims: Claims,
    /// Payload as in the token.
    pub(super) payload_base64: Box<str>,
    pub(super) payload: Arc<Value>,
    /// The payload as policies see it.
    pub(super) metadata: Arc<Value>,
}

#[derive(Debug)]
struct Entry {
    provider: u64,
    generation: u64,
    until: u64,
    token: Arc<Verified>,
}

/// Verified tokens by their text. One text may be valid for several providers; the last one wins the place.
#[derive(Debug, Default)]
pub(crate) struct TokenCache {
    young: HashMap<Box<str>, Entry>,
    old: HashMap<Box<str>, Entry>,
}

impl TokenCache {
    /// A token that `provider` verified with the keys of this generation.
    pub(super) fn get(&mut self, provider: u64, generation: u64, raw: &str) -> Option<Arc<Verified>> {
        let fits = |e: &&Entry| e.provider == provider && e.generation == generation;
        if let Some(e) = self.young.get(raw) {
            return Some(e).filter(fits).map(|e| Arc::clone(&e.token));
        }
        let (raw, entry) = self.old.remove_entry(raw)?;
        let found = Some(&entry).filter(fits).map(|e| Arc::clone(&e.token));
        if found.is_some() {
            self.insert(raw, entry);
        }
        found
    }

    pub(super) fn put(&mut self, provider: u64, generation: u64, raw: &str, token: &Arc<Verified>, now: u64) {
        if raw.len() > MAX_LENGTH {
            return;
        }
        let until = token.claims.expires.unwrap_or(now.saturating_add(DEFAULT_LIFE));
        self.insert(raw.into(), Entry { provider, generation, until, token: Arc::clone(token) });
    }

    fn insert(&mut self, raw: Box<str>, entry: Entry) {
        if self.young.len() >= MAX_TOKENS {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(raw, entry);
    }

    /// Forgets what has expired; called now and then.
    pub(crate) fn sweep(&mut self, now: u64) {
        if self.young.is_empty() && self.old.is_empty() {
            return;
        }
        self.young.retain(|_, e| e.until > now);
        self.old.retain(|_, e| e.until > now);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}
