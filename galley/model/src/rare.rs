//! Parts of the model that most objects do not have.

use std::ops::{Deref, DerefMut};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A value that is nearly always its default, which then takes one word instead of its size. A mesh has a virtual
/// host and a route for each service, and what they could do is many times what they do.
#[derive(Clone)]
pub struct Rare<T>(Option<Box<T>>);

/// A type with one value that stands for "nothing".
pub trait Nothing: 'static {
    /// That value.
    fn nothing() -> &'static Self;
}

impl<T> Default for Rare<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Rare<T> {
    /// A value that is not nothing.
    pub fn some(v: T) -> Self {
        Self(Some(Box::new(v)))
    }
}

impl<T: Nothing + PartialEq> From<T> for Rare<T> {
    fn from(v: T) -> Self {
        if v == *T::nothing() { Self(None) } else { Self::some(v) }
    }
}

impl<T: Nothing + PartialEq> PartialEq for Rare<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Nothing + Eq> Eq for Rare<T> {}

impl<T: Nothing> Deref for Rare<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_deref().unwrap_or_else(|| T::nothing())
    }
}

impl<T: Nothing + Default> DerefMut for Rare<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.get_or_insert_default()
    }
}

impl<T: Nothing + std::fmt::Debug> std::fmt::Debug for Rare<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        T::fmt(self, f)
    }
}

impl<T: Nothing + Serialize> Serialize for Rare<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        T::serialize(self, s)
    }
}

impl<'de, T: Nothing + PartialEq + Deserialize<'de>> Deserialize<'de> for Rare<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        T::deserialize(d).map(Self::from)
    }
}
