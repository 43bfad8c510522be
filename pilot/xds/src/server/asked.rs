//! What one stream asked for by names that traffic brings (VHDS, on-demand CDS).
//!
//! - A name leads to a resource, which may have another name (an alias) or be made for the name alone: a host that
//!   nobody declared must end as it would without on demand, and only a virtual host of its own can say how.
//! - What the names lead to is a layer of this stream, so that everything else treats it as what a client has anyway.
//! - Names come from outside. Of those that lead to nothing, or to something that was made for them, a stream has
//!   [`MAX_STRANGERS`]; beyond that the oldest is forgotten, and the client is told that what was made for it is gone. If
//!   traffic needs it once more it is asked for once more. All others are bounded by what there is.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use super::{Layer, OnDemand, TypeSnapshot};
use crate::pb;

/// Names of a stream that lead to nothing that was there before them.
pub const MAX_STRANGERS: usize = 1024;
/// Longer names are no names: a DNS name has at most 253 bytes, a cluster's name in a mesh holds one.
pub const MAX_NAME: usize = 512;

#[derive(Debug, Default)]
pub(super) struct Asked {
    /// What the names were looked up in.
    source: Option<Arc<dyn OnDemand>>,
    answers: BTreeMap<Arc<str>, Answer>,
    /// Strangers in the order in which they came; some may have left.
    strangers: VecDeque<Arc<str>>,
    layer: Option<Arc<Layer>>,
}

#[derive(Debug)]
struct Answer {
    resource: Option<Arc<pb::Resource>>,
    stranger: bool,
}

impl Answer {
    fn of(source: &dyn OnDemand, name: &str) -> Self {
        match source.resolve(name) {
            Some(r) => Self { stranger: r.made, resource: Some(r.resource) },
            None => Self { resource: None, stranger: true },
        }
    }
}

impl Asked {
    /// A snapshot as far as it is for this stream. Names that are too long or too many leave `names`.
    pub(super) fn narrow(
        &mut self,
        names: &mut BTreeSet<Arc<str>>,
        snapshot: &TypeSnapshot,
        source: &Arc<dyn OnDemand>,
    ) -> TypeSnapshot {
        let same =
            self.source.as_ref().is_some_and(|s| std::ptr::addr_eq(Arc::as_ptr(s), Arc::as_ptr(source)));
        let before = self.answers.len();
        self.answers.retain(|n, _| names.contains(n));
        let mut changed = !same || before != self.answers.len();
        if !same {
            for (n, a) in &mut self.answers {
                *a = Answer::of(&**source, n);
            }
            let answers = &self.answers;
            self.strangers.retain(|n| answers.get(n).is_some_and(|a| a.stranger));
            let known: BTreeSet<&Arc<str>> = self.strangers.iter().collect();
            let fresh: Vec<Arc<str>> = answers
                .iter()
                .filter(|(n, a)| a.stranger && !known.contains(n))
                .map(|(n, _)| Arc::clone(n))
                .collect();
            self.strangers.extend(fresh);
            self.source = Some(Arc::clone(source));
        }
        names.retain(|n| n.len() <= MAX_NAME);
        for n in names.iter() {
            if !self.answers.contains_key(n) {
                let answer = Answer::of(&**source, n);
                if answer.stranger {
                    self.strangers.push_back(Arc::clone(n));
                }
                self.answers.insert(Arc::clone(n), answer);
                changed = true;
            }
        }
        if self.strangers.len() > MAX_STRANGERS {
            // One that came, left and came back stands there twice: where it came last counts.
            let answers = &self.answers;
            let mut seen = BTreeSet::new();
            let mut kept: VecDeque<_> = std::mem::take(&mut self.strangers);
            kept = kept
                .into_iter()
                .rev()
                .filter(|n| answers.contains_key(n) && seen.insert(Arc::clone(n)))
                .collect();
            while kept.len() > MAX_STRANGERS {
                let Some(oldest) = kept.pop_back() else { break };
                self.answers.remove(&oldest);
                names.remove(&oldest);
                changed = true;
            }
            self.strangers = kept.into_iter().rev().collect();
        }
        let layer = match &self.layer {
            Some(l) if !changed => Arc::clone(l),
            before => {
                let resources = self.answers.values().filter_map(|a| a.resource.clone()).collect();
                before.as_ref().map_or_else(|| Layer::new(vec![]), Arc::clone).next(resources)
            }
        };
        self.layer = Some(Arc::clone(&layer));
        TypeSnapshot::of(snapshot.layers().iter().cloned().chain([layer]).collect())
    }

    /// The name of the resource that a name leads to.
    pub(super) fn target(&self, name: &str) -> Option<&str> {
        self.answers.get(name)?.resource.as_ref().map(|r| r.name.as_str())
    }

    /// Resources with the names by which they were asked for.
    pub(super) fn with_aliases(&self, resources: Vec<Arc<pb::Resource>>) -> Vec<Arc<pb::Resource>> {
        let mut by_target: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (n, a) in &self.answers {
            if let Some(r) = &a.resource {
                by_target.entry(&r.name).or_default().push(n.to_string());
            }
        }
        resources
            .into_iter()
            .map(|r| match by_target.remove(r.name.as_str()) {
                Some(aliases) => Arc::new(pb::Resource { aliases, ..(*r).clone() }),
                None => r,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
