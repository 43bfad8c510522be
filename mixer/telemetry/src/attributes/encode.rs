//! Bags to their wire form.

use std::{
    collections::HashMap,
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{Bag, GLOBAL_WORDS, Value};
use crate::proto::mixer_v1::{CompressedAttributes, ReportRequest, StringMap};

static GLOBAL_INDEX: LazyLock<HashMap<&'static str, i32>> =
    LazyLock::new(|| GLOBAL_WORDS.iter().zip(0..).map(|(w, i)| (*w, i)).collect());

/// Words of one message, as they are collected.
#[derive(Default)]
pub(crate) struct Words {
    list: Vec<String>,
    index: HashMap<String, i32>,
    /// Words of the global list that the receiver knows.
    global: usize,
}

impl Words {
    pub(crate) fn new(global: usize) -> Self {
        Self { global, ..Self::default() }
    }

    pub(crate) fn index(&mut self, word: &str) -> i32 {
        if let Some(i) = GLOBAL_INDEX.get(word)
            && (*i as usize) < self.global
        {
            return *i;
        }
        if let Some(i) = self.index.get(word) {
            return *i;
        }
        // Bounded by the size of one message: a bag has some hundred strings, a report a thousand bags.
        let i = -i32::try_from(self.list.len()).unwrap_or(i32::MAX - 1) - 1;
        self.list.push(word.to_owned());
        self.index.insert(word.to_owned(), i);
        i
    }

    pub(crate) fn into_list(self) -> Vec<String> {
        self.list
    }
}

/// Encodes a bag for a receiver that knows `global_words` words of [`GLOBAL_WORDS`].
#[must_use]
pub fn compress(bag: &Bag, global_words: usize) -> CompressedAttributes {
    let mut words = Words::new(global_words.min(GLOBAL_WORDS.len()));
    let mut out = CompressedAttributes::default();
    for (name, value) in bag.iter() {
        put(&mut out, name, value, &mut words);
    }
    out.words = words.into_list();
    out
}

fn put(out: &mut CompressedAttributes, name: &str, value: &Value, words: &mut Words) {
    let n = words.index(name);
    match value {
        Value::String(s) => {
            out.strings.insert(n, words.index(s));
        }
        Value::Int64(v) => {
            out.int64s.insert(n, *v);
        }
        Value::Double(v) => {
            out.doubles.insert(n, *v);
        }
        Value::Bool(v) => {
            out.bools.insert(n, *v);
        }
        Value::Bytes(v) => {
            out.bytes.insert(n, v.clone());
        }
        Value::Timestamp(t) => {
            out.timestamps.insert(n, timestamp(*t));
        }
        Value::Duration(d) => {
            out.durations.insert(n, duration(*d));
        }
        Value::StringMap(m) => {
            let entries = m.iter().map(|(k, v)| (words.index(k), words.index(v))).collect();
            out.string_maps.insert(n, StringMap { entries });
        }
    }
}

pub(crate) fn timestamp(t: SystemTime) -> prost_types::Timestamp {
    // Times before 1970 come from no clock that we read.
    let d = t.duration_since(UNIX_EPOCH).unwrap_or_default();
    prost_types::Timestamp {
        seconds: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        nanos: d.subsec_nanos().cast_signed(),
    }
}

/// A duration in protobuf.
#[must_use]
pub fn duration(d: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        nanos: d.subsec_nanos().cast_signed(),
    }
}

/// Collects bags into one Report: each element carries only what differs from the one before, and
/// all share one list of words.
pub struct ReportEncoder {
    last: Bag,
    elements: Vec<CompressedAttributes>,
    words: Words,
}

impl Default for ReportEncoder {
    fn default() -> Self {
        Self { last: Bag::default(), elements: vec![], words: Words::new(GLOBAL_WORDS.len()) }
    }
}

impl ReportEncoder {
    /// Adds a bag; false if it cannot follow the ones before, because an attribute disappeared: then
    /// the report must be finished and the bag goes into the next.
    #[must_use]
    pub fn push(&mut self, bag: &Bag) -> bool {
        if self.last.iter().any(|(n, _)| bag.get(n).is_none()) {
            return false;
        }
        let mut element = CompressedAttributes::default();
        for (name, value) in bag.iter() {
            if self.last.get(name) != Some(value) {
                put(&mut element, name, value, &mut self.words);
            }
        }
        self.elements.push(element);
        self.last = bag.clone();
        true
    }

    /// Bags collected.
    #[must_use]
    pub fn len(&self) -> usize {
        self.elements.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }

    /// The report; the encoder starts over.
    #[must_use]
    pub fn finish(&mut self) -> ReportRequest {
        let done = std::mem::take(self);
        ReportRequest {
            attributes: done.elements,
            default_words: done.words.into_list(),
            global_word_count: u32::try_from(GLOBAL_WORDS.len()).unwrap_or(u32::MAX),
        }
    }
}

/// Indices of names that a map of attributes refers to, for tests of wire forms.
#[cfg(test)]
pub(crate) fn names_of(c: &CompressedAttributes) -> std::collections::BTreeMap<i32, &'static str> {
    let mut out = std::collections::BTreeMap::new();
    out.extend(c.strings.keys().map(|k| (*k, "string")));
    out.extend(c.int64s.keys().map(|k| (*k, "int64")));
    out.extend(c.string_maps.keys().map(|k| (*k, "map")));
    out
}
