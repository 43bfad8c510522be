//! Keyed, versioned, immutable collections.
//!
//! A [`Publisher`] owns the current [`Snapshot`] and replaces it as a whole; readers hold an `Arc`
//! and are never blocked by a writer. Every entry carries the version at which it last changed, so
//! the difference between any two snapshots costs one walk over both, without comparing values, and
//! a reader that missed snapshots in between loses nothing.

use std::{collections::BTreeMap, fmt, ops::Deref, sync::Arc};

use tokio::sync::watch;

/// An entry and the version of its last change.
#[derive(Debug)]
struct Entry<V> {
    version: u64,
    value: Arc<V>,
}

impl<V> Clone for Entry<V> {
    fn clone(&self) -> Self {
        Self { version: self.version, value: self.value.clone() }
    }
}

#[derive(Debug)]
struct Inner<K, V> {
    version: u64,
    entries: BTreeMap<K, Entry<V>>,
}

/// An immutable collection; cloning it is cheap.
#[derive(Debug)]
pub struct Snapshot<K, V>(Arc<Inner<K, V>>);

impl<K, V> Clone for Snapshot<K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Ord, V> Default for Snapshot<K, V> {
    fn default() -> Self {
        Self(Arc::new(Inner { version: 0, entries: BTreeMap::new() }))
    }
}

/// What differs between two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff<K> {
    /// Keys that are new or have another value.
    pub changed: Vec<K>,
    /// Keys that are gone.
    pub removed: Vec<K>,
}

impl<K> Diff<K> {
    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty()
    }
}

impl<K: Ord + Clone, V> Snapshot<K, V> {
    /// Grows by one with every publication that changed something; 0 is the empty start.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.version
    }

    /// The value of `key`.
    #[must_use]
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&Arc<V>>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.0.entries.get(key).map(|e| &e.value)
    }

    /// The version at which `key` last changed.
    #[must_use]
    pub fn version_of<Q: Ord + ?Sized>(&self, key: &Q) -> Option<u64>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.0.entries.get(key).map(|e| e.version)
    }

    /// Entries in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &Arc<V>)> {
        self.0.entries.iter().map(|(k, e)| (k, &e.value))
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.entries.len()
    }

    /// Whether there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.entries.is_empty()
    }

    /// What changed since `older`, a snapshot of the same publisher.
    #[must_use]
    pub fn since(&self, older: &Self) -> Diff<K> {
        let changed = self
            .0
            .entries
            .iter()
            .filter(|(k, e)| older.version_of(*k) != Some(e.version))
            .map(|(k, _)| k.clone())
            .collect();
        let removed = older.0.entries.keys().filter(|k| !self.0.entries.contains_key(*k)).cloned().collect();
        Diff { changed, removed }
    }

    /// The snapshot with `values` as its content: equal values keep their `Arc` and their version.
    fn replaced(&self, values: impl IntoIterator<Item = (K, Arc<V>)>) -> (Self, Diff<K>)
    where
        V: PartialEq,
    {
        let version = self.0.version + 1;
        let mut changed = Vec::new();
        let mut entries = BTreeMap::new();
        for (k, v) in values {
            let entry = match self.0.entries.get(&k) {
                Some(e) if Arc::ptr_eq(&e.value, &v) || e.value == v => e.clone(),
                _ => {
                    changed.push(k.clone());
                    Entry { version, value: v }
                }
            };
            entries.insert(k, entry);
        }
        let removed: Vec<K> = self.0.entries.keys().filter(|k| !entries.contains_key(*k)).cloned().collect();
        let diff = Diff { changed, removed };
        if diff.is_empty() {
            return (self.clone(), diff);
        }
        (Self(Arc::new(Inner { version, entries })), diff)
    }

    /// The snapshot with other values, or none, for some keys.
    fn changed(&self, values: impl IntoIterator<Item = (K, Option<Arc<V>>)>) -> (Self, Diff<K>)
    where
        V: PartialEq,
    {
        let version = self.0.version + 1;
        let mut diff = Diff { changed: vec![], removed: vec![] };
        let mut news: BTreeMap<K, Option<Entry<V>>> = BTreeMap::new();
        for (k, v) in values {
            let old = self.0.entries.get(&k);
            match v {
                Some(v) if old.is_none_or(|e| !Arc::ptr_eq(&e.value, &v) && e.value != v) => {
                    diff.changed.push(k.clone());
                    news.insert(k, Some(Entry { version, value: v }));
                }
                None if old.is_some() => {
                    diff.removed.push(k.clone());
                    news.insert(k, None);
                }
                _ => {}
            }
        }
        if diff.is_empty() {
            return (self.clone(), diff);
        }
        let mut entries = self.0.entries.clone();
        for (k, e) in news {
            match e {
                Some(e) => drop(entries.insert(k, e)),
                None => drop(entries.remove(&k)),
            }
        }
        (Self(Arc::new(Inner { version, entries })), diff)
    }
}

/// Owns a collection and publishes its snapshots.
pub struct Publisher<K, V>(watch::Sender<Snapshot<K, V>>);

impl<K, V> fmt::Debug for Publisher<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}

impl<K: Ord, V> Default for Publisher<K, V> {
    fn default() -> Self {
        Self(watch::Sender::new(Snapshot::default()))
    }
}

impl<K: Ord + Clone, V: PartialEq> Publisher<K, V> {
    /// Replaces the content. Readers are woken only if something changed.
    pub fn publish(&self, values: impl IntoIterator<Item = (K, Arc<V>)>) -> Diff<K> {
        self.modify(|current| current.replaced(values))
    }

    /// Sets or, with `None`, removes single values, of which each key has one. Readers are woken only if something changed.
    pub fn update(&self, values: impl IntoIterator<Item = (K, Option<Arc<V>>)>) -> Diff<K> {
        self.modify(|current| current.changed(values))
    }

    fn modify(&self, change: impl FnOnce(&Snapshot<K, V>) -> (Snapshot<K, V>, Diff<K>)) -> Diff<K> {
        let mut diff = Diff { changed: vec![], removed: vec![] };
        self.0.send_if_modified(|current| {
            let (next, d) = change(current);
            *current = next;
            diff = d;
            !diff.is_empty()
        });
        diff
    }

    /// The current snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot<K, V> {
        self.0.borrow().deref().clone()
    }

    /// A reader that sees the latest snapshot; it may skip ones in between.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Snapshot<K, V>> {
        self.0.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_reported() {
        let p = Publisher::<&str, u32>::default();
        let empty = p.snapshot();
        let publish = |all: &[(&'static str, u32)]| p.publish(all.iter().map(|(k, v)| (*k, Arc::new(*v))));
        assert_eq!(publish(&[("a", 1), ("b", 2)]).changed, ["a", "b"]);
        let first = p.snapshot();
        assert_eq!(publish(&[("b", 3), ("c", 4)]), Diff { changed: vec!["b", "c"], removed: vec!["a"] });
        let second = p.snapshot();
        assert_eq!(second.since(&first), Diff { changed: vec!["b", "c"], removed: vec!["a"] });
        assert_eq!(second.since(&empty), Diff { changed: vec!["b", "c"], removed: vec![] });
        assert!(second.since(&second).is_empty());
        assert_eq!(first.get("a").map(|v| **v), Some(1), "a snapshot never changes");
        assert_eq!(second.len(), 2);
    }

    #[test]
    fn single_values_are_replaced_and_removed() {
        let p = Publisher::<&str, u32>::default();
        p.publish([("a", Arc::new(1)), ("b", Arc::new(2)), ("c", Arc::new(3))]);
        let before = p.snapshot();
        let news = [("a", Some(Arc::new(1))), ("b", Some(Arc::new(5))), ("c", None), ("d", None)];
        assert_eq!(p.update(news), Diff { changed: vec!["b"], removed: vec!["c"] });
        let after = p.snapshot();
        assert_eq!(after.iter().map(|(k, v)| (*k, **v)).collect::<Vec<_>>(), [("a", 1), ("b", 5)]);
        assert_eq!(after.since(&before), Diff { changed: vec!["b"], removed: vec!["c"] });
        let mut reader = p.subscribe();
        reader.borrow_and_update();
        assert!(p.update([("b", Some(Arc::new(5)))]).is_empty() && !reader.has_changed().unwrap());
    }

    #[test]
    fn equal_content_wakes_nobody_and_shares_values() {
        let p = Publisher::<String, String>::default();
        let v = |s: &str| (s.to_owned(), Arc::new(s.to_owned()));
        p.publish([v("a"), v("b")]);
        let mut reader = p.subscribe();
        let before = reader.borrow_and_update().clone();
        assert!(p.publish([v("a"), v("b")]).is_empty());
        assert!(!reader.has_changed().unwrap());
        p.publish([v("a"), v("c")]);
        assert!(reader.has_changed().unwrap());
        let after = reader.borrow_and_update().clone();
        assert!(Arc::ptr_eq(before.get("a").unwrap(), after.get("a").unwrap()));
        assert_eq!(after.version(), before.version() + 1);
        assert_eq!(after.version_of("a"), before.version_of("a"));
    }
}
