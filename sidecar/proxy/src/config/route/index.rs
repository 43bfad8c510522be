//! Indexes that find the few hosts and routes that can match, so that a table's cost does not grow with its
//! length.
//!
//! First match wins in a virtual host, so an index may only leave out routes that certainly do not match: it
//! yields candidates in their order, and each is still checked whole.

use std::collections::HashMap;

/// Where the path condition of a route puts it.
pub(super) enum Key<'a> {
    /// Only this path.
    Exact(&'a str),
    /// Only paths that begin so (a superset is allowed).
    Prefix(&'a str),
    /// Possibly any path.
    Any,
}

/// Below this a scan is cheaper than an index.
const SMALL: usize = 8;

/// Positions of routes by path.
#[derive(Debug, Default)]
pub(super) struct PathIndex {
    /// All routes in order: too few to index.
    small: Option<u32>,
    exact: HashMap<Box<str>, Vec<u32>>,
    /// Sorted by prefix.
    prefixes: Vec<Node>,
    any: Vec<u32>,
}

#[derive(Debug)]
struct Node {
    prefix: Box<str>,
    /// The longest other prefix that this one begins with.
    parent: Option<u32>,
    routes: Vec<u32>,
}

impl PathIndex {
    /// Indexes routes by the keys of their paths, in order.
    pub(super) fn new<'a>(keys: impl ExactSizeIterator<Item = Key<'a>>) -> Self {
        let count = u32::try_from(keys.len()).unwrap_or(u32::MAX);
        if keys.len() <= SMALL {
            return Self { small: Some(count), ..Self::default() };
        }
        let mut this = Self::default();
        let mut prefixes: std::collections::BTreeMap<&str, Vec<u32>> = std::collections::BTreeMap::new();
        for (at, key) in (0..count).zip(keys) {
            match key {
                Key::Exact(p) => this.exact.entry(p.into()).or_default().push(at),
                Key::Prefix(p) => prefixes.entry(p).or_default().push(at),
                Key::Any => this.any.push(at),
            }
        }
        // In sorted order the ancestors of a prefix are on the stack when it comes.
        let mut open: Vec<u32> = Vec::new();
        for (prefix, routes) in prefixes {
            while let Some(top) = open.last() {
                if prefix.starts_with(&*this.prefixes[*top as usize].prefix) {
                    break;
                }
                open.pop();
            }
            let at = u32::try_from(this.prefixes.len()).unwrap_or(u32::MAX);
            this.prefixes.push(Node { prefix: prefix.into(), parent: open.last().copied(), routes });
            open.push(at);
        }
        this
    }

    /// The first position, in order, whose path may be `path` and that `accept` takes.
    pub(super) fn find(&self, path: &str, mut accept: impl FnMut(usize) -> bool) -> Option<usize> {
        if let Some(all) = self.small {
            return (0..all as usize).find(|at| accept(*at));
        }
        // Few lists: the exact path, each indexed prefix of the path, and what matches any path.
        let mut lists: [&[u32]; 16] = [&[]; 16];
        let mut count = 0;
        let mut more: Vec<&[u32]> = Vec::new();
        let mut add = |list| {
            if let Some(slot) = lists.get_mut(count) {
                *slot = list;
                count += 1;
            } else {
                more.push(list);
            }
        };
        add(self.any.as_slice());
        if let Some(exact) = self.exact.get(path) {
            add(exact.as_slice());
        }
        // Every string between a prefix of `path` and `path` begins with that prefix, so all prefixes of `path` are
        // the last node not after it or that node's ancestors.
        let after = self.prefixes.partition_point(|n| &*n.prefix <= path);
        let mut node = after.checked_sub(1);
        while let Some(n) = node.and_then(|at| self.prefixes.get(at)) {
            if path.starts_with(&*n.prefix) {
                add(n.routes.as_slice());
            }
            node = n.parent.map(|p| p as usize);
        }
        loop {
            let heads = lists[..count].iter_mut().chain(&mut more);
            let next = heads.filter(|l| !l.is_empty()).min_by_key(|l| l[0])?;
            let (first, rest) = next.split_first()?;
            let at = *first as usize;
            *next = rest;
            if accept(at) {
                return Some(at);
            }
        }
    }
}

/// Positions of virtual hosts by domain (`envoy.config.route.v3.VirtualHost.domains`): exact, then the longest
/// suffix wildcard, then the longest prefix wildcard, then `*`.
#[derive(Debug, Default)]
pub(super) struct DomainIndex {
    exact: HashMap<Box<str>, u32>,
    suffixes: Wildcards,
    prefixes: Wildcards,
    any: Option<u32>,
}

/// Fixed parts of wildcards by length, longest first: a look-up hashes once for each length that occurs.
type Wildcards = Vec<(usize, HashMap<Box<str>, u32>)>;

fn insert(all: &mut Wildcards, part: &str, host: u32) -> bool {
    let at = match all.binary_search_by(|(len, _)| part.len().cmp(len)) {
        Ok(at) => at,
        Err(at) => {
            all.insert(at, (part.len(), HashMap::new()));
            at
        }
    };
    all[at].1.insert(part.into(), host).is_none()
}

impl DomainIndex {
    /// Adds a lower-case domain; false if it is there already.
    pub(super) fn insert(&mut self, domain: &str, host: usize) -> bool {
        let host = u32::try_from(host).unwrap_or(u32::MAX);
        if domain == "*" {
            self.any.replace(host).is_none()
        } else if let Some(suffix) = domain.strip_prefix('*') {
            insert(&mut self.suffixes, suffix, host)
        } else if let Some(prefix) = domain.strip_suffix('*') {
            insert(&mut self.prefixes, prefix, host)
        } else {
            self.exact.insert(domain.into(), host).is_none()
        }
    }

    /// The host of a lower-case authority.
    pub(super) fn find(&self, authority: &str) -> Option<usize> {
        let bytes = authority.len();
        let by_suffix = || {
            self.suffixes.iter().filter(|(len, _)| *len < bytes).find_map(|(len, map)| {
                // A cut inside of a character matches nothing.
                map.get(authority.get(bytes - len..)?)
            })
        };
        let by_prefix = || {
            self.prefixes
                .iter()
                .filter(|(len, _)| *len < bytes)
                .find_map(|(len, map)| map.get(authority.get(..*len)?))
        };
        let exact = self.exact.get(authority);
        exact.or_else(by_suffix).or_else(by_prefix).or(self.any.as_ref()).map(|h| *h as usize)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Owned {
        Exact(String),
        Prefix(String),
        Any,
    }

    impl Owned {
        fn key(&self) -> Key<'_> {
            match self {
                Self::Exact(s) => Key::Exact(s),
                Self::Prefix(s) => Key::Prefix(s),
                Self::Any => Key::Any,
            }
        }

        fn may_match(&self, path: &str) -> bool {
            match self {
                Self::Exact(s) => s == path,
                Self::Prefix(s) => path.starts_with(s.as_str()),
                Self::Any => true,
            }
        }
    }

    fn keys() -> impl Strategy<Value = Vec<Owned>> {
        let text = "(/[ab]{0,2}){0,3}é?";
        let key = prop_oneof![
            4 => text.prop_map(Owned::Prefix),
            4 => text.prop_map(Owned::Exact),
            1 => Just(Owned::Any),
        ];
        proptest::collection::vec(key, 0..60)
    }

    proptest! {
        /// The index finds what a scan finds, whatever else a route demands.
        #[test]
        fn an_index_is_a_scan(keys in keys(), path in "(/[ab]{0,2}){0,4}é?", refuse in any::<u64>()) {
            let index = PathIndex::new(keys.iter().map(Owned::key));
            let accept = |at: usize| refuse & (1 << (at % 64)) == 0 && keys[at].may_match(&path);
            let scan = (0..keys.len()).find(|at| accept(*at));
            prop_assert_eq!(index.find(&path, accept), scan);
        }

        /// Specificity decides, not order.
        #[test]
        fn domains_are_found_by_specificity(
            domains in proptest::collection::btree_set("(\\*|[ab.é]{1,4}|\\*[ab.é]{1,4}|[ab.é]{1,4}\\*)", 0..30),
            authority in "[ab.é]{0,6}",
        ) {
            let domains: Vec<String> = domains.into_iter().collect();
            let mut index = DomainIndex::default();
            for (i, d) in domains.iter().enumerate() {
                prop_assert!(index.insert(d, i));
                prop_assert!(!DomainIndex::insert(&mut index, d, i));
            }
            let rank = |d: &String| -> Option<(u8, usize)> {
                if d == "*" {
                    Some((0, 0))
                } else if let Some(s) = d.strip_prefix('*') {
                    (authority.len() > s.len() && authority.ends_with(s)).then_some((2, s.len()))
                } else if let Some(p) = d.strip_suffix('*') {
                    (authority.len() > p.len() && authority.starts_with(p)).then_some((1, p.len()))
                } else {
                    (*d == authority).then_some((3, 0))
                }
            };
            let best = (0..domains.len()).filter(|i| rank(&domains[*i]).is_some()).max_by_key(|i| rank(&domains[*i]));
            prop_assert_eq!(index.find(&authority), best);
        }
    }
}
