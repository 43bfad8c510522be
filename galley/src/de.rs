//! Typed values from a [`Node`], with the path and the place of what does not fit.

use std::fmt;

use serde::{
    de::{
        DeserializeSeed, Deserializer, Error as _, IntoDeserializer, MapAccess, SeqAccess, Unexpected,
        Visitor,
    },
    forward_to_deserialize_any,
};

use crate::{
    node::{Member, Node, Place, Value},
    path::{FieldPath, Segment},
};

/// Why a tree does not fit a type.
#[derive(Debug)]
pub(crate) struct DeError {
    /// Innermost last, as long as the error travels outwards.
    reversed: Vec<Segment>,
    place: Option<Place>,
    /// Set until the mapping that holds the field has said where it stands.
    unknown: Option<String>,
    message: String,
}

impl DeError {
    fn at(mut self, node: &Node) -> Self {
        if let (Some(field), Value::Map(members)) = (self.unknown.take(), &node.value)
            && let Some(m) = members.iter().find(|m| m.key == field)
        {
            self.reversed.push(Segment::Key(field));
            self.place.get_or_insert(m.key_place);
        }
        self.place.get_or_insert(node.place);
        self
    }

    fn within(mut self, s: Segment) -> Self {
        self.reversed.push(s);
        self
    }

    /// Path from the node that was read, place, message.
    pub(crate) fn into_parts(mut self) -> (FieldPath, Place, String) {
        self.reversed.reverse();
        (FieldPath(self.reversed), self.place.unwrap_or_default(), self.message)
    }
}

impl fmt::Display for DeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for DeError {}

impl serde::de::Error for DeError {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Self { reversed: vec![], place: None, unknown: None, message: msg.to_string() }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let message = match nearest(field, expected) {
            Some(near) => format!("unknown field `{field}`, did you mean `{near}`?"),
            None if expected.is_empty() => format!("unknown field `{field}`, there are none here"),
            None => format!("unknown field `{field}`, expected one of {}", list(expected)),
        };
        Self { unknown: Some(field.to_owned()), ..Self::custom(message) }
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let message = match nearest(variant, expected) {
            Some(near) => format!("unknown value `{variant}`, did you mean `{near}`?"),
            None => format!("unknown value `{variant}`, expected one of {}", list(expected)),
        };
        Self::custom(message)
    }

    fn invalid_type(_: Unexpected<'_>, exp: &dyn serde::de::Expected) -> Self {
        // Reached only through a type's own checks; the deserializer below says what it found.
        Self::custom(format!("expected {exp}"))
    }
}

fn list(names: &[&str]) -> String {
    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

/// The candidate that a typing mistake most likely meant.
fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    if word.len() > 64 {
        return None;
    }
    candidates
        .iter()
        .map(|c| (distance(&word.to_ascii_lowercase(), &c.to_ascii_lowercase()), *c))
        .filter(|(d, c)| *d <= c.len().div_ceil(3))
        .min_by_key(|(d, _)| *d)
        .map(|(_, c)| c)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let cost = if ca == *cb { diagonal } else { diagonal + 1 };
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A deserializer over a node. Members that are null count as absent, as in proto JSON.
#[derive(Clone, Copy)]
pub(crate) struct NodeDe<'a> {
    node: &'a Node,
    /// Keys of the outermost mapping that are not part of the value.
    skip: &'static [&'static str],
}

impl<'a> NodeDe<'a> {
    pub(crate) fn new(node: &'a Node) -> Self {
        Self { node, skip: &[] }
    }

    /// Reads a mapping as if it did not have the members `skip`.
    pub(crate) fn without(node: &'a Node, skip: &'static [&'static str]) -> Self {
        Self { node, skip }
    }

    fn mismatch(self, expected: &str) -> DeError {
        let hint = match (&self.node.value, expected) {
            (Value::Bool(_) | Value::Int(_) | Value::Uint(_) | Value::Float(_), "a string") => {
                "; put it in quotes"
            }
            _ => "",
        };
        DeError::custom(format!("expected {expected}, found {}{hint}", self.node.describe()))
    }
}

macro_rules! number {
    ($($method:ident)*) => { $(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
            match &self.node.value {
                Value::Int(n) if *n >= 0 => visitor.visit_u64(n.unsigned_abs()),
                Value::Int(n) => visitor.visit_i64(*n),
                Value::Uint(n) => visitor.visit_u64(*n),
                // proto JSON allows 90.0 for an integer.
                Value::Float(n) if n.fract() == 0.0 && n.abs() < 9e15 => visitor.visit_i64(*n as i64),
                _ => Err(self.mismatch("a whole number")),
            }
            .map_err(|e: DeError| e.at(self.node))
        }
    )* };
}

impl<'de> Deserializer<'de> for NodeDe<'de> {
    type Error = DeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(b) => visitor.visit_bool(*b),
            Value::Int(n) if *n >= 0 => visitor.visit_u64(n.unsigned_abs()),
            Value::Int(n) => visitor.visit_i64(*n),
            Value::Uint(n) => visitor.visit_u64(*n),
            Value::Float(n) => visitor.visit_f64(*n),
            Value::String(s) => visitor.visit_str(s),
            Value::Seq(items) => visitor.visit_seq(Items { items: items.iter(), index: 0 }),
            Value::Map(members) => {
                visitor.visit_map(Members { members: members.iter(), skip: self.skip, current: None })
            }
        }
        .map_err(|e: DeError| e.at(self.node))
    }

    number! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
    deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.node.value {
            Value::Int(n) => visitor.visit_f64(*n as f64),
            Value::Uint(n) => visitor.visit_f64(*n as f64),
            Value::Float(n) => visitor.visit_f64(*n),
            _ => Err(self.mismatch("a number")),
        }
        .map_err(|e: DeError| e.at(self.node))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.node.value {
            Value::Bool(b) => visitor.visit_bool(*b),
            _ => Err(self.mismatch("true or false")),
        }
        .map_err(|e: DeError| e.at(self.node))
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.node.value {
            Value::String(s) => visitor.visit_str(s),
            _ => Err(self.mismatch("a string")),
        }
        .map_err(|e: DeError| e.at(self.node))
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        if self.node.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.node.value {
            Value::Seq(_) => self.deserialize_any(visitor),
            _ => Err(self.mismatch("a list").at(self.node)),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.node.value {
            Value::Map(_) => self.deserialize_any(visitor),
            _ => Err(self.mismatch("a mapping").at(self.node)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        match &self.node.value {
            Value::String(s) => visitor.visit_enum(s.as_str().into_deserializer()),
            _ => Err(self.mismatch("a string")),
        }
        .map_err(|e: DeError| e.at(self.node))
    }

    forward_to_deserialize_any! {
        i128 u128 f32 char bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

struct Items<'a> {
    items: std::slice::Iter<'a, Node>,
    index: usize,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = DeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, DeError> {
        let Some(n) = self.items.next() else { return Ok(None) };
        let i = self.index;
        self.index += 1;
        seed.deserialize(NodeDe::new(n)).map(Some).map_err(|e| e.at(n).within(Segment::Index(i)))
    }
}

struct Members<'a> {
    members: std::slice::Iter<'a, Member>,
    skip: &'static [&'static str],
    current: Option<&'a Member>,
}

impl<'de> MapAccess<'de> for Members<'de> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, DeError> {
        for m in self.members.by_ref() {
            if m.value.is_null() || self.skip.contains(&m.key.as_str()) {
                continue;
            }
            self.current = Some(m);
            return seed.deserialize(m.key.as_str().into_deserializer()).map(Some);
        }
        Ok(None)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, DeError> {
        let Some(m) = self.current.take() else {
            return Err(DeError::custom("a value was asked for before its key"));
        };
        seed.deserialize(NodeDe::new(&m.value))
            .map_err(|e| e.at(&m.value).within(Segment::Key(m.key.clone())))
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::authored::{Kind, Spec};

    use super::*;

    fn read(kind: Kind, yaml: &str) -> Result<Spec, (String, u32, String)> {
        let node = Node::parse(yaml).unwrap();
        Spec::deserialize(kind, NodeDe::new(&node)).map_err(|e| {
            let (path, place, message) = e.into_parts();
            (path.to_string(), place.line, message)
        })
    }

    #[test]
    fn mistakes_are_found_where_they_are() {
        let (path, line, message) = read(
            Kind::VirtualService,
            "hosts: [a]\nhttp:\n- route:\n  - destination:\n      hosst: b\n    weight: 1\n",
        )
        .unwrap_err();
        assert_eq!((path.as_str(), line), ("http[0].route[0].destination.hosst", 5));
        assert_eq!(message, "unknown field `hosst`, did you mean `host`?");

        let (path, line, message) =
            read(Kind::VirtualService, "hosts: [a]\nhttp:\n- timeout: 5\n").unwrap_err();
        assert_eq!((path.as_str(), line), ("http[0].timeout", 3));
        assert_eq!(message, "expected a string, found the number 5; put it in quotes");

        let (path, _, message) = read(
            Kind::VirtualService,
            "http:\n- match:\n  - headers:\n      end-user:\n        exact: a\n        prefix: b\n",
        )
        .unwrap_err();
        assert_eq!(path, "http[0].match[0].headers.end-user");
        assert!(message.contains("only one of"), "{message}");

        let (path, line, message) = read(Kind::PeerAuthentication, "mtls:\n  mode: STRIKT\n").unwrap_err();
        assert_eq!((path.as_str(), line), ("mtls.mode", 2));
        assert!(message.contains("did you mean `STRICT`"), "{message}");

        let (path, _, message) = read(Kind::VirtualService, "hosts: reviews\n").unwrap_err();
        assert_eq!(
            (path.as_str(), message.as_str()),
            ("hosts", "expected a list, found the string \"reviews\"")
        );

        let (path, _, _) =
            read(Kind::VirtualService, "http: [{route: [{weight: 99999999999}]}]").unwrap_err();
        assert_eq!(path, "http[0].route[0].weight");
    }

    #[test]
    fn null_is_absent() {
        let spec = read(Kind::AuthorizationPolicy, "selector: null\nrules:\n- {}\naction: ~\n").unwrap();
        let Spec::AuthorizationPolicy(p) = spec else { panic!() };
        assert_eq!(p.rules.len(), 1);
        assert!(read(Kind::VirtualService, "hosts:\nhttp:\n").is_ok());
    }

    #[test]
    fn spelling_suggestions() {
        assert_eq!(nearest("timout", &["timeout", "retries"]), Some("timeout"));
        assert_eq!(nearest("Timeout", &["timeout"]), Some("timeout"));
        assert_eq!(nearest("zzz", &["timeout", "retries"]), None);
    }
}
