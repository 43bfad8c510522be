//! Resources that many clients have in common, and what changed between two states of them.
//!
//! A control plane serves thousands of clients that have nearly the same. So a client's state is not a copy of names
//! and versions, but the layers that it was sent; and what it has to be sent next is what changed from one layer to the
//! next, which is found once for all of them.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::VersionHasher;
use crate::pb;

/// States of a layer from which the way to the newest is known. Clients that are further behind are compared name by
/// name.
const STEPS: usize = 8;
/// So are those on whose way more than this part of all has changed.
const PART: usize = 4;

/// Resources of one type that some clients have in common, in one state.
#[derive(Debug)]
pub struct Layer {
    id: u64,
    /// Two layers of the same resources have the same.
    pub(super) version: String,
    /// By name, each of which is there once.
    resources: Vec<Arc<pb::Resource>>,
    /// Earlier states by ID, newest first, with the names that differ.
    since: Vec<(u64, Arc<[String]>)>,
}

impl Layer {
    /// A layer of which there was none before. Of resources of one name the last counts.
    #[must_use]
    pub fn new(resources: Vec<Arc<pb::Resource>>) -> Arc<Self> {
        Arc::new(Self::build(resources, vec![]))
    }

    /// The state that follows this one; itself if nothing changed.
    #[must_use]
    pub fn next(self: &Arc<Self>, resources: Vec<Arc<pb::Resource>>) -> Arc<Self> {
        let mut next = Self::build(resources, vec![]);
        if next.version == self.version {
            return Arc::clone(self);
        }
        let changed: Vec<String> = self.differences(&next);
        let most = self.resources.len().max(next.resources.len()) / PART + 16;
        let mut so_far: Arc<[String]> = changed.into();
        next.since.push((self.id, Arc::clone(&so_far)));
        for (id, earlier) in self.since.iter().take(STEPS - 1) {
            if so_far.len() + earlier.len() > most {
                break;
            }
            let mut all: Vec<String> = so_far.iter().chain(earlier.iter()).cloned().collect();
            all.sort_unstable();
            all.dedup();
            so_far = all.into();
            next.since.push((*id, Arc::clone(&so_far)));
        }
        Arc::new(next)
    }

    fn build(mut resources: Vec<Arc<pb::Resource>>, since: Vec<(u64, Arc<[String]>)>) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        // Stable, so that of equal names the last is the last.
        resources.sort_by(|a, b| a.name.cmp(&b.name));
        resources.reverse();
        resources.dedup_by(|a, b| a.name == b.name);
        resources.reverse();
        let mut whole = VersionHasher::default();
        for r in &resources {
            whole.write(r.name.as_bytes());
            whole.write(&[0]);
            whole.write(r.version.as_bytes());
        }
        Self { id: IDS.fetch_add(1, Ordering::Relaxed), version: whole.finish(), resources, since }
    }

    /// Names of what one has and the other has not, or in another version.
    fn differences(&self, other: &Self) -> Vec<String> {
        let (mut old, mut new) = (self.resources.iter().peekable(), other.resources.iter().peekable());
        let mut out = Vec::new();
        loop {
            let name = match (old.peek(), new.peek()) {
                (None, None) => return out,
                (Some(_), None) => old.next(),
                (None, Some(_)) => new.next(),
                (Some(a), Some(b)) => match a.name.cmp(&b.name) {
                    std::cmp::Ordering::Less => old.next(),
                    std::cmp::Ordering::Greater => new.next(),
                    std::cmp::Ordering::Equal => {
                        let same = Arc::ptr_eq(a, b) || a.version == b.version;
                        old.next();
                        new.next().filter(|_| !same)
                    }
                },
            };
            out.extend(name.map(|r| r.name.clone()));
        }
    }

    /// The resource of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<pb::Resource>> {
        let at = self.resources.binary_search_by(|r| r.name.as_str().cmp(name)).ok()?;
        self.resources.get(at)
    }

    /// All, by name.
    pub fn resources(&self) -> impl Iterator<Item = &Arc<pb::Resource>> {
        self.resources.iter()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// Names that differ from an earlier state, if the way from there is known.
    pub(super) fn changed_since(&self, earlier: &Self) -> Option<&[String]> {
        if self.id == earlier.id {
            return Some(&[]);
        }
        self.since.iter().find(|(id, _)| *id == earlier.id).map(|(_, names)| &**names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(names: &[(&str, &str)]) -> Vec<Arc<pb::Resource>> {
        names
            .iter()
            .map(|(n, v)| {
                Arc::new(pb::Resource { name: (*n).into(), version: (*v).into(), ..Default::default() })
            })
            .collect()
    }

    #[test]
    fn what_changed_is_known_for_some_steps() {
        let first = Layer::new(layer(&[("a", "1"), ("b", "1"), ("c", "1")]));
        let second = first.next(layer(&[("c", "1"), ("a", "2"), ("b", "1")]));
        let third = second.next(layer(&[("a", "2"), ("b", "1"), ("d", "1")]));
        assert_eq!(second.changed_since(&first).unwrap(), ["a"]);
        assert_eq!(third.changed_since(&second).unwrap(), ["c", "d"]);
        assert_eq!(third.changed_since(&first).unwrap(), ["a", "c", "d"]);
        assert!(first.changed_since(&third).is_none());
        assert!(third.changed_since(&third).unwrap().is_empty());
        // Nothing changed: the same, so that whoever has it need not look.
        assert!(Arc::ptr_eq(&third, &third.next(layer(&[("d", "1"), ("a", "2"), ("b", "1")]))));
        let mut last = Arc::clone(&third);
        for v in 0..STEPS {
            last = last.next(layer(&[("a", &format!("x{v}"))]));
        }
        assert!(last.changed_since(&third).is_some() && last.changed_since(&second).is_none());
    }

    #[test]
    fn of_one_name_the_last_counts() {
        let l = Layer::new(layer(&[("a", "1"), ("b", "1"), ("a", "2")]));
        assert_eq!(l.get("a").unwrap().version, "2");
        assert_eq!(l.resources().count(), 2);
        assert!(l.get("c").is_none());
    }
}
