//! What its author does not want to hear.
//!
//! By an annotation of the document, `galley.istio.io/analyze-suppress: "IST0107,IST0108"` (or `*`), or by a flag,
//! `IST0102=VirtualService foo.bar`, where `*` stands for any text.

use std::{collections::BTreeMap, str::FromStr};

use super::{Message, catalogue::is_code};

const ANNOTATION: &str = "galley.istio.io/analyze-suppress";

/// A code that is not told about some resources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suppression {
    code: String,
    /// `Kind name.namespace`, or `Kind namespace/name`.
    pattern: String,
}

impl FromStr for Suppression {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('=') {
            Some((code, _)) if !is_code(code) => Err(format!("{code:?} is not a code; --list prints them")),
            Some((code, pattern)) if !pattern.is_empty() => {
                Ok(Self { code: code.to_owned(), pattern: pattern.to_owned() })
            }
            _ => Err(format!("{s:?} is not CODE=RESOURCE, such as \"IST0102=VirtualService foo.bar\"")),
        }
    }
}

impl Suppression {
    fn covers(&self, m: &Message) -> bool {
        if self.code != m.code {
            return false;
        }
        let dotted = match m.origin.split_once(' ') {
            Some((kind, name)) => match name.split_once('/') {
                Some((ns, name)) => format!("{kind} {name}.{ns}"),
                None => m.origin.clone(),
            },
            None => m.origin.clone(),
        };
        glob(&self.pattern, &m.origin) || glob(&self.pattern, &dotted)
    }
}

pub(super) fn suppressed(annotations: &BTreeMap<String, String>, m: &Message, list: &[Suppression]) -> bool {
    let by_document = annotations
        .get(ANNOTATION)
        .is_some_and(|codes| codes.split(',').map(str::trim).any(|c| c == "*" || c == m.code));
    by_document || list.iter().any(|s| s.covers(m))
}

/// Whether `text` is `pattern`, in which `*` is any text.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(i) => rest = &rest[i + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (pattern, text) in
            [("a", "a"), ("*", ""), ("a*", "abc"), ("*c", "abc"), ("a*c", "abc"), ("a*b*c", "a.b.c")]
        {
            assert!(glob(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("a", "ab"), ("a*b", "a"), ("ab*b", "ab"), ("*b*", "ac"), ("", "a")] {
            assert!(!glob(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn flags() {
        assert!("IST0102=VirtualService a.b".parse::<Suppression>().is_ok());
        for bad in ["IST0102", "IST0102=", "IST9999=a", "=a"] {
            assert!(bad.parse::<Suppression>().is_err(), "{bad}");
        }
    }
}
