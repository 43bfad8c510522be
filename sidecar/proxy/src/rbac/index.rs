//! Which policies can match at all: found by hash, so that a thousand policies cost what one does.
//!
//! A policy gets keys of which one must be there for it to match: who calls (a whole principal, or the
//! namespace or account in it) or what is called (a whole path, or a beginning of it). A policy without such
//! keys is looked at always. The index only leaves out what could not have matched; what is left is
//! evaluated in the order of names, so the decision and the policy that it names are those of a linear search.
//!
//! A condition on a request that is evaluated without one is unknown and may decide (see the module above):
//! then policies that are found by path are all candidates.

use std::collections::HashMap;

use mesh_model::proxy as model;

use super::Facts;

/// Fewer policies are evaluated one after the other as fast.
const MIN_POLICIES: usize = 8;
/// Pilot's form of a principal whose trust domain does not matter.
const ANY_DOMAIN: &str = "spiffe://[^/]+/ns/";

/// Something without which a policy cannot match.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    Principal(String),
    /// `namespace/sa/account` of a principal in any trust domain.
    Account(String),
    Namespace(String),
    Path(String),
    Prefix(String),
}

impl Key {
    /// Lower is expected to leave fewer candidates.
    fn rank(&self) -> u8 {
        match self {
            Self::Principal(_) | Self::Account(_) => 0,
            Self::Path(_) => 1,
            Self::Namespace(_) => 2,
            Self::Prefix(_) => 3,
        }
    }

    fn is_path(&self) -> bool {
        matches!(self, Self::Path(_) | Self::Prefix(_))
    }
}

/// Positions of policies in ascending order.
type Positions = Vec<u32>;

#[derive(Debug, Default)]
pub(super) struct Index {
    principals: HashMap<String, Positions>,
    accounts: HashMap<String, Positions>,
    namespaces: HashMap<String, Positions>,
    paths: HashMap<String, Positions>,
    prefixes: HashMap<String, Positions>,
    /// Lengths of the prefixes, ascending.
    prefix_lengths: Vec<usize>,
    /// All policies that are found by path.
    by_path: Positions,
    /// Policies without keys.
    rest: Positions,
}

impl Index {
    /// `None` if an index would not pay.
    pub(super) fn new<'a>(policies: impl ExactSizeIterator<Item = &'a model::RbacPolicy>) -> Option<Self> {
        if policies.len() < MIN_POLICIES {
            return None;
        }
        let mut index = Self::default();
        for (n, p) in policies.enumerate() {
            let at = u32::try_from(n).ok()?;
            let who = any_of(p.principals.iter().map(principal_keys));
            let what = any_of(p.permissions.iter().map(permission_keys));
            match better(who, what) {
                None => index.rest.push(at),
                Some(keys) => index.add(at, keys),
            }
        }
        if index.rest.len() + 1 >= MIN_POLICIES.max(index.all_keyed()) {
            return None;
        }
        index.prefix_lengths = index.prefixes.keys().map(String::len).collect();
        index.prefix_lengths.sort_unstable();
        index.prefix_lengths.dedup();
        Some(index)
    }

    fn all_keyed(&self) -> usize {
        [&self.principals, &self.accounts, &self.namespaces, &self.paths, &self.prefixes]
            .iter()
            .map(|m| m.len())
            .sum()
    }

    fn add(&mut self, at: u32, keys: Vec<Key>) {
        if keys.iter().any(Key::is_path) {
            self.by_path.push(at);
        }
        for k in keys {
            let (map, key) = match k {
                Key::Principal(s) => (&mut self.principals, s),
                Key::Account(s) => (&mut self.accounts, s),
                Key::Namespace(s) => (&mut self.namespaces, s),
                Key::Path(s) => (&mut self.paths, s),
                Key::Prefix(s) => (&mut self.prefixes, s),
            };
            let list = map.entry(key).or_default();
            if list.last() != Some(&at) {
                list.push(at);
            }
        }
    }

    /// The first policy that could match and does.
    pub(super) fn first(&self, f: &Facts<'_>, mut matches: impl FnMut(u32) -> bool) -> Option<u32> {
        let mut found: Vec<u32> = Vec::new();
        let mut take = |list: Option<&Positions>| found.extend(list.into_iter().flatten());
        if f.authenticated {
            for p in f.principals {
                take(self.principals.get(p));
                if let Some(tail) = any_domain(p) {
                    take(self.accounts.get(tail));
                    take(tail.split_once('/').and_then(|(ns, _)| self.namespaces.get(ns)));
                }
            }
        }
        match f.request {
            None => take(Some(&self.by_path)),
            Some(r) => {
                let path = r.path_only();
                take(self.paths.get(path));
                for len in self.prefix_lengths.iter().take_while(|l| **l <= path.len()) {
                    take(path.get(..*len).and_then(|p| self.prefixes.get(p)));
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        // Both lists ascend, and no policy is in both.
        let (mut a, mut b) = (found.iter().peekable(), self.rest.iter().peekable());
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x < y => a.next(),
                (_, Some(_)) => b.next(),
                (Some(_), None) => a.next(),
                (None, None) => return None,
            }?;
            if matches(*next) {
                return Some(*next);
            }
        }
    }
}

/// What follows the trust domain: `namespace/...`.
fn any_domain(principal: &str) -> Option<&str> {
    let (domain, tail) = principal.strip_prefix("spiffe://")?.split_once('/')?;
    if domain.is_empty() { None } else { tail.strip_prefix("ns/") }
}

/// Keys of alternatives: all must have some. No alternative never matches.
fn any_of(list: impl Iterator<Item = Option<Vec<Key>>>) -> Option<Vec<Key>> {
    list.collect::<Option<Vec<_>>>().map(|l| l.concat())
}

/// Keys of conditions that must all hold: the best of any.
fn all_of(list: impl Iterator<Item = Option<Vec<Key>>>) -> Option<Vec<Key>> {
    list.fold(None, better)
}

fn better(a: Option<Vec<Key>>, b: Option<Vec<Key>>) -> Option<Vec<Key>> {
    let cost = |k: &Vec<Key>| (k.iter().map(Key::rank).max().unwrap_or(0), k.len());
    match (a, b) {
        (Some(a), Some(b)) => Some(if cost(&b) < cost(&a) { b } else { a }),
        (a, b) => a.or(b),
    }
}

fn permission_keys(p: &model::Permission) -> Option<Vec<Key>> {
    match p {
        model::Permission::And(l) => all_of(l.iter().map(permission_keys)),
        model::Permission::Or(l) => any_of(l.iter().map(permission_keys)),
        model::Permission::Path(m) => path_keys(m),
        _ => None,
    }
}

fn principal_keys(p: &model::Principal) -> Option<Vec<Key>> {
    match p {
        model::Principal::And(l) => all_of(l.iter().map(principal_keys)),
        model::Principal::Or(l) => any_of(l.iter().map(principal_keys)),
        model::Principal::Path(m) => path_keys(m),
        model::Principal::Authenticated(Some(m)) => identity_keys(m),
        _ => None,
    }
}

fn path_keys(m: &model::StringMatch) -> Option<Vec<Key>> {
    match &m.kind {
        _ if m.ignore_case => None,
        model::StringMatchKind::Exact(s) => Some(vec![Key::Path(s.clone())]),
        model::StringMatchKind::Prefix(s) => Some(vec![Key::Prefix(s.clone())]),
        _ => None,
    }
}

fn identity_keys(m: &model::StringMatch) -> Option<Vec<Key>> {
    match &m.kind {
        // The case of an expression is never ignored.
        model::StringMatchKind::Regex(r) => {
            let (literal, whole) = literal(r.strip_prefix(ANY_DOMAIN)?)?;
            if whole {
                return Some(vec![Key::Account(literal)]);
            }
            literal.split_once('/').map(|(ns, _)| vec![Key::Namespace(ns.to_owned())])
        }
        _ if m.ignore_case => None,
        model::StringMatchKind::Exact(s) => Some(vec![Key::Principal(s.clone())]),
        model::StringMatchKind::Prefix(s) => {
            any_domain(s)?.split_once('/').map(|(ns, _)| vec![Key::Namespace(ns.to_owned())])
        }
        _ => None,
    }
}

/// The literal text that an expression begins with, and whether that is all of it.
fn literal(regex: &str) -> Option<(String, bool)> {
    // Alternatives could begin otherwise.
    if regex.contains('|') {
        return None;
    }
    let mut out = String::new();
    let mut chars = regex.chars().peekable();
    loop {
        let c = match chars.next() {
            None => return Some((out, true)),
            Some('\\') => chars.next().filter(|c| !c.is_alphanumeric())?,
            Some(c) if "^$.[](){}*+?".contains(c) => return Some((out, false)),
            Some(c) => c,
        };
        // What is repeated may be missing.
        if chars.peek().is_some_and(|n| "*+?{".contains(*n)) {
            return Some((out, false));
        }
        out.push(c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::StringMatch as M;

    #[test]
    fn identities_have_keys() {
        let keys = |m: M| identity_keys(&m);
        let one = |k: Key| Some(vec![k]);
        assert_eq!(
            keys(M::exact("spiffe://d/ns/a/sa/b")),
            one(Key::Principal("spiffe://d/ns/a/sa/b".into()))
        );
        assert_eq!(keys(M::regex(r"spiffe://[^/]+/ns/a\-b/.*")), one(Key::Namespace("a-b".into())));
        assert_eq!(keys(M::regex("spiffe://[^/]+/ns/a/sa/b")), one(Key::Account("a/sa/b".into())));
        assert_eq!(keys(M::prefix("spiffe://d/ns/a/s")), one(Key::Namespace("a".into())));
        for none in [
            M::regex("spiffe://[^/]+/ns/a[^/]*/.*"),
            M::regex("spiffe://[^/]+/ns/a/?.*"),
            M::regex("spiffe://[^/]+/ns/a/x|.*"),
            M::regex(r"spiffe://[^/]+/ns/a\d/.*"),
            M::regex(".*"),
            M::prefix("spiffe://d/ns/a"),
            M::suffix("/sa/b"),
            M { ignore_case: true, ..M::exact("x") },
        ] {
            assert_eq!(keys(none.clone()), None, "{none:?}");
        }
    }
}
