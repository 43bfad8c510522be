//! Resources that many clients have in common, and what changed between two states of them.
//!
//! A control plane serves thousands of clients that have nearly the same. So a client's state is not a copy of names
//! and versions, but the layers that it was sent; and what it has to be sent next is what changed from one layer to the
//! next, which is found once for all of them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use aws_lc_rs::digest::{Context, SHA256};

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
    /// Sum of [`digest`]s, from which that of the next state follows by what differs.
    sum: u128,
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
        let resources = ordered(resources);
        let sum = resources.iter().fold(0, |sum: u128, r| sum.wrapping_add(digest(r)));
        Arc::new(Self::of(resources, sum))
    }

    /// The state that follows this one; itself if nothing changed.
    #[must_use]
    pub fn next(self: &Arc<Self>, resources: Vec<Arc<pb::Resource>>) -> Arc<Self> {
        let resources = ordered(resources);
        let (mut changed, mut sum) = (Vec::new(), self.sum);
        differences(&self.resources, &resources, |old, new| {
            changed.extend(old.or(new).map(|r| r.name.clone()));
            sum = old.map_or(sum, |r| sum.wrapping_sub(digest(r)));
            sum = new.map_or(sum, |r| sum.wrapping_add(digest(r)));
        });
        self.followed(resources, changed, sum)
    }

    /// The state in which the resources of some names are others or, with `None`, are gone.
    #[must_use]
    pub fn with(self: &Arc<Self>, news: BTreeMap<String, Option<Arc<pb::Resource>>>) -> Arc<Self> {
        let (mut changed, mut sum) = (Vec::new(), self.sum);
        let mut resources = Vec::with_capacity(self.resources.len() + news.len());
        let mut old = self.resources.iter().peekable();
        for (name, new) in news {
            resources.extend(std::iter::from_fn(|| old.next_if(|r| r.name < name)).cloned());
            let before = old.next_if(|r| r.name == name);
            if let (Some(a), Some(b)) = (before, &new)
                && a.version == b.version
            {
                resources.push(Arc::clone(a));
                continue;
            }
            if before.is_some() || new.is_some() {
                changed.push(name);
            }
            sum = before.map_or(sum, |r| sum.wrapping_sub(digest(r)));
            sum = new.as_ref().map_or(sum, |r| sum.wrapping_add(digest(r)));
            resources.extend(new);
        }
        resources.extend(old.cloned());
        self.followed(resources, changed, sum)
    }

    fn followed(
        self: &Arc<Self>,
        resources: Vec<Arc<pb::Resource>>,
        changed: Vec<String>,
        sum: u128,
    ) -> Arc<Self> {
        if changed.is_empty() {
            return Arc::clone(self);
        }
        let mut next = Self::of(resources, sum);
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

    fn of(resources: Vec<Arc<pb::Resource>>, sum: u128) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Self { id, sum, version: format!("{sum:032x}"), resources, since: vec![] }
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

/// By name, each of which is there once.
fn ordered(mut resources: Vec<Arc<pb::Resource>>) -> Vec<Arc<pb::Resource>> {
    // Stable, so that of equal names the last is the last.
    resources.sort_by(|a, b| a.name.cmp(&b.name));
    resources.reverse();
    resources.dedup_by(|a, b| a.name == b.name);
    resources.reverse();
    resources
}

/// Stands for a resource in a sum that does not depend on the order: SHA-256 of name and version, cut to 128 bits.
fn digest(r: &pb::Resource) -> u128 {
    let mut all = Context::new(&SHA256);
    all.update(r.name.as_bytes());
    all.update(&[0]);
    all.update(r.version.as_bytes());
    let bytes = all.finish();
    bytes.as_ref().iter().take(16).fold(0, |n, b| n << 8 | u128::from(*b))
}

/// Tells what one list has and the other has not, or in another version.
fn differences<'r>(
    old: &'r [Arc<pb::Resource>],
    new: &'r [Arc<pb::Resource>],
    mut tell: impl FnMut(Option<&'r Arc<pb::Resource>>, Option<&'r Arc<pb::Resource>>),
) {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        match (old.peek(), new.peek()) {
            (None, None) => return,
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => {
                old.next();
                new.next();
            }
            (Some(a), Some(b)) => match a.name.cmp(&b.name) {
                std::cmp::Ordering::Less => tell(old.next(), None),
                std::cmp::Ordering::Greater => tell(None, new.next()),
                std::cmp::Ordering::Equal => {
                    let same = a.version == b.version;
                    let (a, b) = (old.next(), new.next());
                    if !same {
                        tell(a, b);
                    }
                }
            },
            (Some(_), None) => tell(old.next(), None),
            (None, Some(_)) => tell(None, new.next()),
        }
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
    fn a_change_of_some_is_the_same_as_of_the_whole() {
        let first = Layer::new(layer(&[("b", "1"), ("d", "1"), ("f", "1")]));
        let news = |all: &[(&str, Option<&str>)]| {
            let one =
                |(n, v): &(&str, Option<&str>)| ((*n).to_owned(), v.map(|v| layer(&[(*n, v)]).remove(0)));
            all.iter().map(one).collect::<BTreeMap<_, _>>()
        };
        let all = [
            ("a", Some("1")),
            ("b", None),
            ("c", None),
            ("d", Some("1")),
            ("e", Some("1")),
            ("f", Some("2")),
        ];
        let some = first.with(news(&all));
        let whole = first.next(layer(&[("a", "1"), ("d", "1"), ("e", "1"), ("f", "2")]));
        assert_eq!(some.version, whole.version);
        assert_eq!(
            some.version,
            Layer::new(layer(&[("e", "1"), ("f", "2"), ("a", "1"), ("d", "1")])).version
        );
        assert_eq!(some.changed_since(&first).unwrap(), ["a", "b", "e", "f"]);
        assert_eq!(some.changed_since(&first), whole.changed_since(&first));
        let names =
            |l: &Layer| l.resources().map(|r| (r.name.clone(), r.version.clone())).collect::<Vec<_>>();
        assert_eq!(names(&some), names(&whole));
        assert!(Arc::ptr_eq(&some, &some.with(news(&[("a", Some("1")), ("z", None)]))));
        // Back to where it was: another state of the same version.
        let back = some.next(layer(&[("b", "1"), ("d", "1"), ("f", "1")]));
        assert_eq!(back.version, first.version);
        assert_eq!(Layer::new(vec![]).version, first.next(vec![]).version);
    }

    #[test]
    fn of_one_name_the_last_counts() {
        let l = Layer::new(layer(&[("a", "1"), ("b", "1"), ("a", "2")]));
        assert_eq!(l.get("a").unwrap().version, "2");
        assert_eq!(l.resources().count(), 2);
        assert!(l.get("c").is_none());
    }
}
