//! Attributes of a request or connection, and their wire form.
//!
//! A [`Bag`] is a small typed map. On the wire every string is an index: into [`GLOBAL_WORDS`], which
//! both ends know, or into words that travel with the message. Both ends state how long their list
//! is, so the list may grow at its end and must never change otherwise.

mod decode;
mod encode;
mod words;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

pub use decode::{DictionaryError, decode_report, decompress, encode_references};
pub(crate) use decode::{references, span};
pub use encode::{ReportEncoder, compress, duration as proto_duration};
pub use words::GLOBAL_WORDS;

/// Name of an attribute, such as `request.path`.
pub type Name = Cow<'static, str>;

/// Value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `STRING`, and names in general.
    String(String),
    /// `INT64`.
    Int64(i64),
    /// `DOUBLE`.
    Double(f64),
    /// `BOOL`.
    Bool(bool),
    /// `IP_ADDRESS`: 4 or 16 bytes in network order.
    Bytes(Vec<u8>),
    /// `TIMESTAMP`.
    Timestamp(SystemTime),
    /// `DURATION`; never negative in practice.
    Duration(Duration),
    /// `STRING_MAP`, such as headers with lower-case names.
    StringMap(BTreeMap<String, String>),
}

impl From<&str> for Value {
    fn from(s: &str) -> Self {
        Self::String(s.to_owned())
    }
}

impl From<String> for Value {
    fn from(s: String) -> Self {
        Self::String(s)
    }
}

impl From<i64> for Value {
    fn from(n: i64) -> Self {
        Self::Int64(n)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}

impl From<SystemTime> for Value {
    fn from(t: SystemTime) -> Self {
        Self::Timestamp(t)
    }
}

impl From<Duration> for Value {
    fn from(d: Duration) -> Self {
        Self::Duration(d)
    }
}

impl From<std::net::IpAddr> for Value {
    fn from(ip: std::net::IpAddr) -> Self {
        match ip {
            std::net::IpAddr::V4(ip) => Self::Bytes(ip.octets().to_vec()),
            std::net::IpAddr::V6(ip) => Self::Bytes(ip.octets().to_vec()),
        }
    }
}

impl From<BTreeMap<String, String>> for Value {
    fn from(m: BTreeMap<String, String>) -> Self {
        Self::StringMap(m)
    }
}

/// Attributes by name.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Bag(BTreeMap<Name, Value>);

impl Bag {
    /// Sets an attribute.
    pub fn set(&mut self, name: impl Into<Name>, value: impl Into<Value>) {
        self.0.insert(name.into(), value.into());
    }

    /// Sets an attribute unless the value is empty: an absent attribute is what rules' defaults are
    /// for.
    pub fn set_some(&mut self, name: impl Into<Name>, value: &str) {
        if !value.is_empty() {
            self.set(name, value);
        }
    }

    /// The value of an attribute.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// The value of an entry of a string map.
    #[must_use]
    pub fn entry(&self, name: &str, key: &str) -> Option<&str> {
        match self.get(name)? {
            Value::StringMap(m) => m.get(key).map(String::as_str),
            _ => None,
        }
    }

    /// The value of a string attribute.
    #[must_use]
    pub fn str(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// Attributes in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Value)> {
        self.0.iter()
    }

    /// Number of attributes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<N: Into<Name>, V: Into<Value>> FromIterator<(N, V)> for Bag {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(items: I) -> Self {
        Self(items.into_iter().map(|(n, v)| (n.into(), v.into())).collect())
    }
}

/// What an evaluation looked at; the answer holds for every bag that agrees on it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// Attribute.
    pub name: String,
    /// Key, if only an entry of a string map was looked at.
    pub key: Option<String>,
    /// Whether it was there.
    pub present: bool,
}

#[cfg(test)]
mod tests;
