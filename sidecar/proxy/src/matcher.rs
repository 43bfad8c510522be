//! Compiled conditions on strings, headers and query parameters.

use std::borrow::Cow;

use mesh_model::proxy as model;
use regex::bytes::Regex;

use crate::http::{headers::Headers, message::RequestHead};

/// Compiled size of one expression; RE2's default budget is of the same order.
const REGEX_SIZE: usize = 1 << 20;

/// A regular expression that does not compile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("regular expression {pattern:?}: {reason}")]
pub(crate) struct RegexError {
    pattern: String,
    reason: String,
}

/// Compiles RE2 syntax that has to match the whole input.
pub(crate) fn whole_regex(pattern: &str) -> Result<Regex, RegexError> {
    build_regex(&format!("^(?:{pattern})$"), pattern)
}

/// Compiles RE2 syntax that may match anywhere.
pub(crate) fn partial_regex(pattern: &str) -> Result<Regex, RegexError> {
    build_regex(pattern, pattern)
}

fn build_regex(full: &str, pattern: &str) -> Result<Regex, RegexError> {
    regex::bytes::RegexBuilder::new(full)
        .size_limit(REGEX_SIZE)
        .build()
        .map_err(|e| RegexError { pattern: pattern.to_owned(), reason: e.to_string() })
}

#[derive(Debug)]
enum Kind {
    Exact(Vec<u8>),
    Prefix(Vec<u8>),
    Suffix(Vec<u8>),
    Contains(Vec<u8>),
    Regex(Regex),
}

/// A compiled [`model::StringMatch`].
#[derive(Debug)]
pub(crate) struct StringMatcher {
    kind: Kind,
    ignore_case: bool,
}

impl StringMatcher {
    pub(crate) fn new(m: &model::StringMatch) -> Result<Self, RegexError> {
        let bytes = |s: &str| {
            if m.ignore_case { s.to_ascii_lowercase().into_bytes() } else { s.as_bytes().to_vec() }
        };
        let kind = match &m.kind {
            model::StringMatchKind::Exact(s) => Kind::Exact(bytes(s)),
            model::StringMatchKind::Prefix(s) => Kind::Prefix(bytes(s)),
            model::StringMatchKind::Suffix(s) => Kind::Suffix(bytes(s)),
            model::StringMatchKind::Contains(s) => Kind::Contains(bytes(s)),
            model::StringMatchKind::Regex(s) => Kind::Regex(whole_regex(s)?),
        };
        Ok(Self { kind, ignore_case: m.ignore_case })
    }

    pub(crate) fn matches(&self, value: &[u8]) -> bool {
        let v = if self.ignore_case && !matches!(self.kind, Kind::Regex(_)) {
            Cow::Owned(value.to_ascii_lowercase())
        } else {
            Cow::Borrowed(value)
        };
        match &self.kind {
            Kind::Exact(s) => *v == s[..],
            Kind::Prefix(s) => v.starts_with(s),
            Kind::Suffix(s) => v.ends_with(s),
            Kind::Contains(s) => s.is_empty() || v.windows(s.len()).any(|w| w == s),
            Kind::Regex(r) => r.is_match(&v),
        }
    }

    pub(crate) fn all(list: &[model::StringMatch]) -> Result<Vec<Self>, RegexError> {
        list.iter().map(Self::new).collect()
    }
}

/// A compiled [`model::HeaderMatch`].
#[derive(Debug)]
pub(crate) struct HeaderMatcher {
    name: Vec<u8>,
    present: Option<bool>,
    value: Option<StringMatcher>,
    invert: bool,
    missing_is_empty: bool,
}

impl HeaderMatcher {
    pub(crate) fn new(m: &model::HeaderMatch) -> Result<Self, RegexError> {
        let (present, value) = match &m.value {
            model::HeaderValueMatch::Present(p) => (Some(*p), None),
            model::HeaderValueMatch::Value(v) => (None, Some(StringMatcher::new(v)?)),
        };
        Ok(Self {
            name: m.name.to_ascii_lowercase().into_bytes(),
            present,
            value,
            invert: m.invert,
            missing_is_empty: m.missing_is_empty,
        })
    }

    /// A header that is there several times has several values, one of which is enough: joined they would be none of those
    /// that a condition names, and whoever is denied for one would send another with it (Envoy's `match_headers_individually`
    /// and `rbac_match_headers_individually`).
    pub(crate) fn matches(&self, req: &RequestHead) -> bool {
        if self.name.starts_with(b":") || self.name == b"host" {
            return self.holds(header_value(req, &self.name).as_deref().into_iter());
        }
        self.holds(req.headers.values(&self.name))
    }

    /// The same for the headers of an answer.
    pub(crate) fn matches_response(&self, headers: &Headers) -> bool {
        self.holds(headers.values(&self.name))
    }

    fn holds<'a>(&self, values: impl Iterator<Item = &'a [u8]>) -> bool {
        let mut values = values.peekable();
        let there = values.peek().is_some();
        let holds = match (&self.value, self.present) {
            (Some(m), _) if there => values.any(|v| m.matches(v)),
            (Some(m), _) if self.missing_is_empty => m.matches(b""),
            // Nothing is said of what is not there, inverted or not.
            (Some(_), _) => return false,
            (None, Some(p)) => there == p,
            (None, None) => there,
        };
        holds != self.invert
    }
}

/// A header or pseudo-header as conditions see it.
pub(crate) fn header_value<'a>(req: &'a RequestHead, name: &[u8]) -> Option<Cow<'a, [u8]>> {
    match name {
        b":method" => Some(Cow::Borrowed(req.method.as_str().as_bytes())),
        b":authority" | b"host" => Some(Cow::Borrowed(req.authority.as_bytes())),
        b":path" => Some(Cow::Borrowed(req.path.as_bytes())),
        b":scheme" => Some(Cow::Borrowed(if req.https { b"https" } else { b"http" })),
        _ => req.headers.joined(name),
    }
}

/// A compiled [`model::QueryMatch`].
#[derive(Debug)]
pub(crate) struct QueryMatcher {
    name: String,
    value: Option<StringMatcher>,
}

impl QueryMatcher {
    pub(crate) fn new(m: &model::QueryMatch) -> Result<Self, RegexError> {
        Ok(Self { name: m.name.clone(), value: m.value.as_ref().map(StringMatcher::new).transpose()? })
    }

    pub(crate) fn matches(&self, req: &RequestHead) -> bool {
        match req.query().and_then(|q| query_value(q, &self.name)) {
            Some(v) => self.value.as_ref().is_none_or(|m| m.matches(v.as_bytes())),
            None => false,
        }
    }
}

/// First value of a query parameter, not decoded.
pub(crate) fn query_value<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| match pair.split_once('=') {
        Some((n, v)) if n == name => Some(v),
        None if pair == name => Some(""),
        _ => None,
    })
}

/// A cookie of the request.
pub(crate) fn cookie<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    headers.values_id(crate::http::headers::HeaderId::Cookie).find_map(|v| {
        std::str::from_utf8(v).ok()?.split(';').find_map(|c| match c.trim().split_once('=') {
            Some((n, v)) if n == name => Some(v.trim_matches('"')),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::proxy::StringMatch as M;

    #[test]
    fn string_conditions() {
        let yes = |m: M, s: &str| assert!(StringMatcher::new(&m).unwrap().matches(s.as_bytes()), "{m:?} {s}");
        let no = |m: M, s: &str| assert!(!StringMatcher::new(&m).unwrap().matches(s.as_bytes()), "{m:?} {s}");
        yes(M::exact("a"), "a");
        no(M::exact("a"), "A");
        yes(M { ignore_case: true, ..M::exact("aB") }, "Ab");
        yes(M::prefix("ab"), "abc");
        yes(M::suffix("bc"), "abc");
        no(M::suffix("bc"), "c");
        yes(M::regex("a|b"), "b");
        no(M::regex("a|b"), "ab");
        no(M::regex("a"), "a\n");
        assert!(StringMatcher::new(&M::regex("(")).is_err());
        assert!(StringMatcher::new(&M::regex("((a{1000}){1000}){1000}")).is_err());
    }

    #[test]
    fn query_parameters() {
        assert_eq!(query_value("a=1&b&c=2&a=3", "a"), Some("1"));
        assert_eq!(query_value("a=1&b", "b"), Some(""));
        assert_eq!(query_value("a=1", "A"), None);
    }
}
