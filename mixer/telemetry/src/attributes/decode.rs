//! Bags from their wire form.

use std::{
    borrow::Cow,
    time::{Duration, UNIX_EPOCH},
};

use super::{Bag, GLOBAL_WORDS, Name, Reference, Value};
use crate::proto::mixer_v1::{
    CompressedAttributes, ReferencedAttributes, ReportRequest, referenced_attributes::Condition,
};

/// Why attributes cannot be decoded. The sender made a mistake, or knows a longer word list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DictionaryError {
    /// An index outside of both lists.
    #[error("word index {0} is in neither list")]
    UnknownIndex(i32),
    /// A time or duration that does not exist.
    #[error("attribute {0:?} has a time that does not exist")]
    BadTime(String),
}

/// The words that indices of one message refer to.
#[derive(Clone, Copy)]
struct Dictionary<'a> {
    words: &'a [String],
}

impl<'a> Dictionary<'a> {
    fn new(words: &'a [String]) -> Self {
        Self { words }
    }

    fn word(self, i: i32) -> Result<&'a str, DictionaryError> {
        let found = match usize::try_from(i) {
            Ok(i) => GLOBAL_WORDS.get(i).copied(),
            // -1 is the first word; i32::MIN does not overflow in i64.
            Err(_) => {
                usize::try_from(-i64::from(i) - 1).ok().and_then(|i| self.words.get(i)).map(String::as_str)
            }
        };
        found.ok_or(DictionaryError::UnknownIndex(i))
    }

    fn name(self, i: i32) -> Result<Name, DictionaryError> {
        match usize::try_from(i).ok().and_then(|i| GLOBAL_WORDS.get(i)) {
            Some(w) => Ok(Cow::Borrowed(*w)),
            None => self.word(i).map(|w| Cow::Owned(w.to_owned())),
        }
    }
}

/// Decodes attributes on their own.
///
/// # Errors
/// [`DictionaryError`].
pub fn decompress(c: &CompressedAttributes) -> Result<Bag, DictionaryError> {
    let mut bag = Bag::default();
    update(&mut bag, c, Dictionary::new(&c.words))?;
    Ok(bag)
}

/// The words of element `i` of a report: its own, or those that all elements share.
fn words_of(report: &ReportRequest, i: usize) -> &[String] {
    match report.attributes.get(i) {
        Some(c) if !c.words.is_empty() => &c.words,
        _ => &report.default_words,
    }
}

/// Decodes the bags of a report, in order. Stops at the first that cannot be decoded.
///
/// # Errors
/// [`DictionaryError`].
pub fn decode_report(report: &ReportRequest, mut each: impl FnMut(&Bag)) -> Result<(), DictionaryError> {
    let mut bag = Bag::default();
    for (i, c) in report.attributes.iter().enumerate() {
        update(&mut bag, c, Dictionary::new(words_of(report, i)))?;
        each(&bag);
    }
    Ok(())
}

fn update(bag: &mut Bag, c: &CompressedAttributes, d: Dictionary<'_>) -> Result<(), DictionaryError> {
    for (n, v) in &c.strings {
        bag.set(d.name(*n)?, d.word(*v)?);
    }
    for (n, v) in &c.int64s {
        bag.set(d.name(*n)?, *v);
    }
    for (n, v) in &c.doubles {
        bag.set(d.name(*n)?, Value::Double(*v));
    }
    for (n, v) in &c.bools {
        bag.set(d.name(*n)?, *v);
    }
    for (n, v) in &c.bytes {
        bag.set(d.name(*n)?, Value::Bytes(v.clone()));
    }
    for (n, t) in &c.timestamps {
        let name = d.name(*n)?;
        let time = span(t.seconds, t.nanos)
            .and_then(|d| UNIX_EPOCH.checked_add(d))
            .ok_or_else(|| DictionaryError::BadTime(name.clone().into_owned()))?;
        bag.set(name, time);
    }
    for (n, t) in &c.durations {
        let name = d.name(*n)?;
        let span =
            span(t.seconds, t.nanos).ok_or_else(|| DictionaryError::BadTime(name.clone().into_owned()))?;
        bag.set(name, span);
    }
    for (n, m) in &c.string_maps {
        let entries: Result<std::collections::BTreeMap<String, String>, DictionaryError> =
            m.entries.iter().map(|(k, v)| Ok((d.word(*k)?.to_owned(), d.word(*v)?.to_owned()))).collect();
        bag.set(d.name(*n)?, Value::StringMap(entries?));
    }
    Ok(())
}

/// A non-negative duration below 10,000 years, the range of protobuf's well-known type.
pub(crate) fn span(seconds: i64, nanos: i32) -> Option<Duration> {
    let seconds = u64::try_from(seconds).ok().filter(|s| *s <= 315_576_000_000)?;
    let nanos = u32::try_from(nanos).ok().filter(|n| *n < 1_000_000_000)?;
    Some(Duration::new(seconds, nanos))
}

/// Decodes what an answer depends on; `None` if it depends on a condition that we cannot check, so
/// that it must not be reused.
pub(crate) fn references(r: &ReferencedAttributes) -> Option<Vec<Reference>> {
    let d = Dictionary::new(&r.words);
    let mut out = Vec::with_capacity(r.attribute_matches.len());
    for m in &r.attribute_matches {
        let present = match Condition::try_from(m.condition) {
            Ok(Condition::Absence) => false,
            Ok(Condition::Exact) => true,
            _ => return None,
        };
        let name = d.word(m.name).ok()?.to_owned();
        // Index 0 is a word of the list that no map has as its key, so it stands for "no key".
        let key = if m.map_key == 0 { None } else { Some(d.word(m.map_key).ok()?.to_owned()) };
        out.push(Reference { name, key, present });
    }
    out.sort();
    out.dedup();
    Some(out)
}

/// Encodes what an answer depends on.
#[must_use]
pub fn encode_references(refs: &[Reference], global_words: usize) -> ReferencedAttributes {
    use crate::proto::mixer_v1::referenced_attributes::AttributeMatch;
    let mut words = super::encode::Words::new(global_words.min(GLOBAL_WORDS.len()));
    let attribute_matches = refs
        .iter()
        .map(|r| AttributeMatch {
            name: words.index(&r.name),
            condition: if r.present { Condition::Exact } else { Condition::Absence }.into(),
            regex: String::new(),
            map_key: r.key.as_deref().map_or(0, |k| words.index(k)),
        })
        .collect();
    ReferencedAttributes { words: words.into_list(), attribute_matches }
}
