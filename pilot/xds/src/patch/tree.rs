//! The value of a patch, as fields of Envoy's messages: made of JSON once, and then merged into encoded messages without
//! a table of types.
//!
//! Merging is that of protobuf (lists grow, entries of a map replace those of their key, messages are merged), with
//! Istio's exceptions and one of ours: a duration replaces another; the inside of an `Any` is merged if it is of the same
//! type, else it replaces; a wrapper (`google.protobuf.BoolValue`) replaces too, so that `false` can be said.

use std::rc::Rc;

use serde::de::DeserializeSeed as _;
use serde_json::Value as Json;

use crate::bootstrap::{
    json::{MessageValue, Translator},
    schema::{Kind, Label, Message, Schema, Type},
};

const VARINT: u32 = 0;
const FIXED64: u32 = 1;
const BYTES: u32 = 2;
const FIXED32: u32 = 5;

/// Bytes that are no protobuf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Damaged;

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tree {
    pub(super) message: &'static str,
    pub(super) fields: Vec<Field>,
}

/// A field that is set.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Field {
    pub(super) name: &'static str,
    number: u32,
    /// Other members of its oneof.
    rivals: Vec<u32>,
    /// Part of a oneof: a zero is a value there.
    pub(super) present: bool,
    pub(super) content: Content,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    One(Node),
    List(Vec<Node>),
    /// Entries, with fields `key` and `value`.
    Map(Vec<Tree>),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    /// Wire type, and the bytes after the tag (and length).
    Scalar(u32, Vec<u8>),
    Message(Tree),
    Any(String, Option<Tree>),
}

/// A field on the wire.
struct Raw<'a> {
    number: u32,
    wire: u32,
    /// With its tag.
    whole: &'a [u8],
    /// Without tag and length.
    payload: &'a [u8],
}

pub(super) fn varint(at: &mut &[u8]) -> Result<u64, Damaged> {
    let mut v = 0u64;
    for i in 0..10 {
        let (byte, next) = at.split_first().ok_or(Damaged)?;
        *at = next;
        v |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(v);
        }
    }
    Err(Damaged)
}

fn raw(message: &[u8]) -> Result<Vec<Raw<'_>>, Damaged> {
    let mut out = Vec::new();
    let mut at = message;
    while !at.is_empty() {
        let start = at;
        let key = varint(&mut at)?;
        let wire = (key & 7) as u32;
        let number = u32::try_from(key >> 3).map_err(|_| Damaged)?;
        let mut body = at;
        let length = match wire {
            VARINT => {
                let mut rest = at;
                varint(&mut rest)?;
                at.len() - rest.len()
            }
            FIXED64 => 8,
            BYTES => {
                let length = usize::try_from(varint(&mut body)?).map_err(|_| Damaged)?;
                at = body;
                length
            }
            FIXED32 => 4,
            _ => return Err(Damaged),
        };
        let (payload, next) = at.split_at_checked(length).ok_or(Damaged)?;
        at = next;
        out.push(Raw { number, wire, whole: &start[..start.len() - at.len()], payload });
    }
    Ok(out)
}

pub(super) fn put_varint(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        // The low seven bits.
        out.push((v & 0x7f) as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn put(out: &mut Vec<u8>, number: u32, wire: u32, payload: &[u8]) {
    put_varint(out, u64::from(number << 3 | wire));
    if wire == BYTES {
        put_varint(out, payload.len() as u64);
    }
    out.extend_from_slice(payload);
}

/// Messages that stand for one value.
pub(super) fn is_value(message: &str) -> bool {
    message.strip_prefix("google.protobuf.").is_some_and(|m| m == "Duration" || is_wrapper(message))
}

/// `google.protobuf.UInt32Value` and its like.
pub(super) fn is_wrapper(message: &str) -> bool {
    message
        .strip_prefix("google.protobuf.")
        .is_some_and(|m| m.ends_with("Value") && m != "Value" && m != "ListValue")
}

impl Tree {
    /// Types a JSON value.
    ///
    /// # Errors
    /// The path below the value, and what is wrong there.
    pub(super) fn of(message: &'static str, value: &Json) -> Result<Self, (String, String)> {
        let t = Translator::of_patches();
        let Some(Type::Message(m)) = t.schema.get(message) else {
            return Err((String::new(), format!("{message} is no type that is known here")));
        };
        if !value.is_object() {
            return Err((String::new(), format!("is no {message}")));
        }
        let mut bytes = Vec::new();
        MessageValue { t: &t, message: Rc::clone(&m), out: &mut bytes }
            .deserialize(value.clone())
            .map_err(|e| (t.path(), e.to_string()))?;
        Self::read(&t.schema, &m, &bytes).map_err(|Damaged| (String::new(), "cannot be encoded".to_owned()))
    }

    fn read(schema: &Schema, message: &Message, bytes: &[u8]) -> Result<Self, Damaged> {
        let mut fields: Vec<Field> = Vec::new();
        for r in raw(bytes)? {
            let f = message.numbered(r.number).ok_or(Damaged)?;
            let node = node(schema, f.kind, &r)?;
            let known = fields.iter_mut().find(|k| k.number == r.number);
            match (f.label, known.map(|k| &mut k.content), node) {
                (Label::Repeated, Some(Content::List(list)), node) => list.push(node),
                (Label::Map, Some(Content::Map(map)), Node::Message(entry)) => map.push(entry),
                (_, Some(_), _) => return Err(Damaged),
                (label, None, node) => fields.push(Field {
                    name: f.name,
                    number: f.number,
                    rivals: message.rivals(&f),
                    present: f.oneof.is_some(),
                    content: match (label, node) {
                        (Label::Map, Node::Message(entry)) => Content::Map(vec![entry]),
                        (Label::Map, _) => return Err(Damaged),
                        (Label::Repeated, node) => Content::List(vec![node]),
                        (Label::Single, node) => Content::One(node),
                    },
                }),
            }
        }
        Ok(Self { message: message.name, fields })
    }

    /// A duration or wrapper of one.
    pub(super) fn one(message: &'static str) -> Self {
        let (wire, value) = match message.rsplit('.').next().unwrap_or_default() {
            "DoubleValue" => (FIXED64, 1f64.to_le_bytes().to_vec()),
            "FloatValue" => (FIXED32, 1f32.to_le_bytes().to_vec()),
            "StringValue" | "BytesValue" => (BYTES, b"x".to_vec()),
            _ => (VARINT, vec![1]),
        };
        let content = Content::One(Node::Scalar(wire, value));
        Self {
            message,
            fields: vec![Field { name: "value", number: 1, rivals: vec![], present: true, content }],
        }
    }

    /// The field of this name.
    pub(super) fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|f| f.name == name)
    }

    /// The text of a field.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match &self.field(name)?.content {
            Content::One(Node::Scalar(BYTES, text)) => std::str::from_utf8(text).ok(),
            _ => None,
        }
    }

    /// The message of a field.
    pub(super) fn nested(&self, name: &str) -> Option<&Self> {
        match &self.field(name)?.content {
            Content::One(Node::Message(m)) => Some(m),
            _ => None,
        }
    }

    /// The same without a field.
    pub(super) fn without(&self, name: &str) -> Self {
        let fields = self.fields.iter().filter(|f| f.name != name).cloned().collect();
        Self { message: self.message, fields }
    }

    /// The message by itself.
    pub(super) fn encode(&self) -> Vec<u8> {
        // Nothing can be wrong with an empty message.
        self.merge(&[], false).unwrap_or_default()
    }

    /// The message merged into another one of its type. With `replace_lists` lists do not grow but are replaced.
    pub(super) fn merge(&self, old: &[u8], replace_lists: bool) -> Result<Vec<u8>, Damaged> {
        let mut out = Vec::with_capacity(old.len());
        let mut inside: Vec<Vec<u8>> = vec![Vec::new(); self.fields.len()];
        let mut kept = vec![false; self.fields.len()];
        for r in raw(old)? {
            if self.fields.iter().any(|f| f.rivals.contains(&r.number)) {
                continue;
            }
            let Some(i) = self.fields.iter().position(|f| f.number == r.number) else {
                out.extend_from_slice(r.whole);
                continue;
            };
            let f = &self.fields[i];
            let keep = match &f.content {
                Content::One(Node::Scalar(_, v)) => {
                    // Without presence a zero is no value.
                    kept[i] = !f.present && !is_value(self.message) && v.iter().all(|b| *b == 0);
                    kept[i]
                }
                Content::One(Node::Message(m)) if is_value(m.message) => false,
                Content::One(Node::Message(_) | Node::Any(..)) => {
                    inside[i].extend_from_slice(r.payload);
                    false
                }
                Content::List(_) => !replace_lists,
                Content::Map(entries) => {
                    let key = key_of(r.payload)?;
                    !entries.iter().any(|e| key_of(&e.encode()) == Ok(key.clone()))
                }
            };
            if keep {
                out.extend_from_slice(r.whole);
            }
        }
        for ((f, old), kept) in self.fields.iter().zip(inside).zip(kept) {
            match &f.content {
                Content::One(_) if kept => {}
                Content::One(n) => n.put(f.number, &old, replace_lists, &mut out)?,
                Content::List(all) => {
                    for n in all {
                        n.put(f.number, &[], false, &mut out)?;
                    }
                }
                Content::Map(entries) => {
                    entries.iter().for_each(|e| put(&mut out, f.number, BYTES, &e.encode()))
                }
            }
        }
        Ok(out)
    }
}

impl Node {
    fn put(&self, number: u32, old: &[u8], replace_lists: bool, out: &mut Vec<u8>) -> Result<(), Damaged> {
        match self {
            Self::Scalar(wire, payload) => put(out, number, *wire, payload),
            Self::Message(m) => put(out, number, BYTES, &m.merge(old, replace_lists)?),
            Self::Any(url, content) => {
                let mut any = Vec::new();
                put(&mut any, 1, BYTES, url.as_bytes());
                let old = raw(old)?;
                let last = |n: u32| old.iter().rev().find(|r| r.number == n).map_or(&[][..], |r| r.payload);
                let same = short(url.as_bytes()) == short(last(1));
                let value = match content {
                    Some(m) if same => m.merge(last(2), replace_lists)?,
                    Some(m) => m.encode(),
                    None => vec![],
                };
                put(&mut any, 2, BYTES, &value);
                put(out, number, BYTES, &any);
            }
        }
        Ok(())
    }
}

fn short(url: &[u8]) -> &[u8] {
    url.rsplit(|b| *b == b'/').next().unwrap_or_default()
}

/// The key of a map's entry.
fn key_of(entry: &[u8]) -> Result<Vec<u8>, Damaged> {
    Ok(raw(entry)?.iter().find(|r| r.number == 1).map(|r| r.payload.to_vec()).unwrap_or_default())
}

fn node(schema: &Schema, kind: Kind, r: &Raw<'_>) -> Result<Node, Damaged> {
    let name = match kind {
        Kind::Scalar(_) => return Ok(Node::Scalar(r.wire, r.payload.to_vec())),
        Kind::Named(name) => name,
    };
    match schema.get(name) {
        Some(Type::Enum(_)) => Ok(Node::Scalar(r.wire, r.payload.to_vec())),
        Some(Type::Message(_)) if name == "google.protobuf.Any" => {
            let parts = raw(r.payload)?;
            let part = |n: u32| parts.iter().find(|p| p.number == n).map_or(&[][..], |p| p.payload);
            let url = String::from_utf8(part(1).to_vec()).map_err(|_| Damaged)?;
            let content = match schema.get(url.rsplit('/').next().unwrap_or_default()) {
                Some(Type::Message(m)) => Some(Tree::read(schema, &m, part(2))?),
                _ => None,
            };
            Ok(Node::Any(url, content))
        }
        Some(Type::Message(m)) => Ok(Node::Message(Tree::read(schema, &m, r.payload)?)),
        None => Err(Damaged),
    }
}

#[cfg(test)]
mod tests;
