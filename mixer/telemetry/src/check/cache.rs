//! Answers by the attributes that they depend on.
//!
//! Keys are the attributes' full values, not a hash of them: whoever controls a header must not be
//! able to find a value whose hash is that of an allowed request.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use super::Denial;
use crate::attributes::{Bag, Reference, Value};

/// Sets of references that are remembered. Each distinct path through the rules makes one; more than
/// a handful means rules that are not worth caching for.
const MAX_REFERENCE_SETS: usize = 64;
/// Longest key. A request with more in the attributes that rules read is not cached.
const MAX_KEY_BYTES: usize = 8 * 1024;

/// Sets of references seen, each of which may find an entry.
#[derive(Debug, Default)]
pub(super) struct ReferenceSets(BTreeSet<Arc<Vec<Reference>>>);

impl ReferenceSets {
    /// The keys under which answers for this bag may be found.
    pub(super) fn keys<'a>(&'a self, bag: &'a Bag, prefix: &'a str) -> impl Iterator<Item = Vec<u8>> + 'a {
        self.0.iter().filter_map(move |set| key(set, bag, prefix))
    }

    /// Remembers a set; false if there are too many.
    pub(super) fn insert(&mut self, set: Vec<Reference>) -> bool {
        if self.0.contains(&set) {
            return true;
        }
        self.0.len() < MAX_REFERENCE_SETS && self.0.insert(Arc::new(set))
    }
}

/// The values of the attributes that an answer depends on; `None` if the bag does not agree with
/// what was absent and present.
pub(super) fn key(set: &[Reference], bag: &Bag, prefix: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(128);
    push(&mut out, prefix.as_bytes());
    for r in set {
        push(&mut out, r.name.as_bytes());
        match &r.key {
            Some(k) => {
                push(&mut out, k.as_bytes());
                let value = bag.entry(&r.name, k);
                if value.is_some() != r.present {
                    return None;
                }
                out.push(u8::from(r.present));
                push(&mut out, value.unwrap_or_default().as_bytes());
            }
            None => {
                let value = bag.get(&r.name);
                if value.is_some() != r.present {
                    return None;
                }
                match value {
                    None => out.push(0),
                    Some(v) => push_value(&mut out, v),
                }
            }
        }
        if out.len() > MAX_KEY_BYTES {
            return None;
        }
    }
    Some(out)
}

/// Length first, so that no two lists of values have the same bytes.
fn push(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

fn push_value(out: &mut Vec<u8>, v: &Value) {
    match v {
        Value::String(s) => {
            out.push(1);
            push(out, s.as_bytes());
        }
        Value::Int64(n) => {
            out.push(2);
            out.extend_from_slice(&n.to_le_bytes());
        }
        Value::Double(n) => {
            out.push(3);
            out.extend_from_slice(&n.to_bits().to_le_bytes());
        }
        Value::Bool(b) => out.extend_from_slice(&[4, u8::from(*b)]),
        Value::Bytes(b) => {
            out.push(5);
            push(out, b);
        }
        Value::Timestamp(t) => {
            out.push(6);
            let d = t.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            out.extend_from_slice(&d.as_nanos().to_le_bytes());
        }
        Value::Duration(d) => {
            out.push(7);
            out.extend_from_slice(&d.as_nanos().to_le_bytes());
        }
        Value::StringMap(m) => {
            out.push(8);
            out.extend_from_slice(&(m.len() as u64).to_le_bytes());
            for (k, v) in m {
                push(out, k.as_bytes());
                push(out, v.as_bytes());
            }
        }
    }
}

/// A map that forgets what was not used for long: entries are in one of two generations; a full one
/// replaces the other, and what is used moves to the newer. Constant time, bounded size.
#[derive(Debug)]
pub(super) struct Generations<V> {
    newer: HashMap<Vec<u8>, V>,
    older: HashMap<Vec<u8>, V>,
    half: usize,
}

impl<V> Generations<V> {
    pub(super) fn new(capacity: usize) -> Self {
        Self { newer: HashMap::new(), older: HashMap::new(), half: (capacity / 2).max(1) }
    }

    pub(super) fn get_mut(&mut self, key: &[u8]) -> Option<&mut V> {
        if !self.newer.contains_key(key) {
            let (k, v) = self.older.remove_entry(key)?;
            self.insert(k, v);
        }
        self.newer.get_mut(key)
    }

    pub(super) fn insert(&mut self, key: Vec<u8>, value: V) {
        if self.newer.len() >= self.half && !self.newer.contains_key(&key) {
            self.older = std::mem::take(&mut self.newer);
        }
        self.older.remove(&key);
        self.newer.insert(key, value);
    }

    pub(super) fn remove(&mut self, key: &[u8]) {
        self.newer.remove(key);
        self.older.remove(key);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.newer.len() + self.older.len()
    }
}

#[derive(Debug)]
struct Entry {
    denial: Option<Denial>,
    expires: Instant,
    /// `None` is without limit.
    uses: Option<u32>,
}

/// Answers of Check.
#[derive(Debug)]
pub(super) struct CheckCache {
    sets: ReferenceSets,
    entries: Generations<Entry>,
}

impl CheckCache {
    pub(super) fn new(capacity: usize) -> Self {
        Self { sets: ReferenceSets::default(), entries: Generations::new(capacity) }
    }

    /// `Some(None)` is a known allowance, `Some(Some(_))` a known denial.
    pub(super) fn get(&mut self, bag: &Bag, now: Instant) -> Option<Option<Denial>> {
        let Self { sets, entries } = self;
        for key in sets.keys(bag, "") {
            let Some(e) = entries.get_mut(&key) else { continue };
            let usable = e.expires > now && e.uses != Some(0);
            if usable {
                if let Some(n) = &mut e.uses {
                    *n -= 1;
                }
                return Some(e.denial.clone());
            }
            entries.remove(&key);
        }
        None
    }

    pub(super) fn put(
        &mut self,
        refs: Vec<Reference>,
        bag: &Bag,
        denial: Option<Denial>,
        expires: Instant,
        uses: Option<u32>,
    ) {
        let Some(key) = key(&refs, bag, "") else { return };
        if self.sets.insert(refs) {
            self.entries.insert(key, Entry { denial, expires, uses });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;

    fn bag(user: Option<&str>) -> Bag {
        let mut b = Bag::default();
        b.set("source.namespace", "books");
        b.set("request.path", "/x");
        let headers = user.map(|u| ("end-user".to_owned(), u.to_owned()));
        b.set("request.headers", headers.into_iter().collect::<BTreeMap<_, _>>());
        b
    }

    fn header(present: bool) -> Reference {
        Reference { name: "request.headers".into(), key: Some("end-user".into()), present }
    }

    #[test]
    fn an_answer_holds_for_what_it_depends_on_and_nothing_else() {
        let mut c = CheckCache::new(10);
        let now = Instant::now();
        let later = now + Duration::from_secs(10);
        c.put(vec![header(true)], &bag(Some("jason")), Some(Denial::new(7, "no")), later, None);
        c.put(vec![header(false)], &bag(None), None, later, None);
        let mut same = bag(Some("jason"));
        same.set("request.path", "/other");
        assert_eq!(c.get(&same, now).unwrap().unwrap().http_status, 403);
        assert_eq!(c.get(&bag(None), now), Some(None));
        assert_eq!(c.get(&bag(Some("anna")), now), None);
        assert_eq!(c.get(&same, later), None, "expired");
    }

    #[test]
    fn uses_are_counted() {
        let mut c = CheckCache::new(10);
        let now = Instant::now();
        c.put(vec![header(false)], &bag(None), None, now + Duration::from_secs(1), Some(2));
        assert!(c.get(&bag(None), now).is_some());
        assert!(c.get(&bag(None), now).is_some());
        assert!(c.get(&bag(None), now).is_none());
    }

    #[test]
    fn keys_cannot_be_confused() {
        let set = |a: &str, b: &str| {
            let mut bag = Bag::default();
            bag.set("a", a);
            bag.set("b", b);
            let refs: Vec<_> =
                ["a", "b"].map(|n| Reference { name: n.into(), key: None, present: true }).into();
            key(&refs, &bag, "").unwrap()
        };
        assert_ne!(set("x", "y"), set("xy", ""));
        assert_ne!(set("", "xy"), set("x", "y"));
        let big = "x".repeat(MAX_KEY_BYTES);
        assert!(key(&[header(true)], &bag(Some(&big)), "").is_none());
    }

    #[test]
    fn size_is_bounded_and_what_is_used_stays() {
        let mut g = Generations::new(10);
        g.insert(b"hot".to_vec(), 0);
        for i in 0..1_000u32 {
            g.insert(i.to_le_bytes().to_vec(), i);
            assert!(g.get_mut(b"hot").is_some());
            assert!(g.len() <= 11);
        }
        let mut sets = ReferenceSets::default();
        for i in 0..1_000 {
            sets.insert(vec![Reference { name: i.to_string(), key: None, present: true }]);
        }
        assert_eq!(sets.0.len(), MAX_REFERENCE_SETS);
    }
}
