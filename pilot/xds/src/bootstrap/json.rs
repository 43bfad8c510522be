//! JSON to protobuf's wire format, guided by [`Schema`], value by value: neither a tree of the document nor one of
//! messages is built. Rules: protobuf's JSON mapping (developers.google.com/protocol-buffers/docs/proto3#json).

mod scalar;
mod wellknown;

use std::{cell::RefCell, fmt, rc::Rc};

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use self::{
    scalar::{EnumValue, ScalarValue},
    wellknown::{AnyValue, DurationValue, ListItems, StructFields, ValueValue},
};
use super::schema::{Field, Kind, Label, Message, Scalar, Schema, Type};

/// A step of the path to the value at hand.
enum Step {
    Field(&'static str),
    Index(usize),
    Key(String),
}

/// Translates values; remembers where it is, so that an error can say so.
pub(crate) struct Translator {
    pub(crate) schema: Schema,
    /// Types that are not known are refused, and not left for whoever reads the result.
    strict: bool,
    /// Grows on the way down and shrinks only when a value was good: after an error it names the place.
    path: RefCell<Vec<Step>>,
}

impl Translator {
    pub(super) fn new() -> Self {
        Self { schema: Schema::new(), strict: false, path: RefCell::default() }
    }

    /// For patches, which may hold anything that Envoy knows and nothing else.
    pub(crate) fn of_patches() -> Self {
        Self { schema: Schema::of_patches(), strict: true, path: RefCell::default() }
    }

    fn within<T, E>(&self, step: Step, f: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.path.borrow_mut().push(step);
        let done = f()?;
        self.leave();
        Ok(done)
    }

    /// Goes down to a field; whoever finds nothing wrong there leaves it again.
    pub(super) fn enter(&self, field: &'static str) {
        self.path.borrow_mut().push(Step::Field(field));
    }

    /// Goes down to an item of a list.
    pub(super) fn enter_item(&self, i: usize) {
        self.path.borrow_mut().push(Step::Index(i));
    }

    /// Goes up again.
    pub(super) fn leave(&self) {
        self.path.borrow_mut().pop();
    }

    /// Where it is, or where it stopped.
    pub(crate) fn path(&self) -> String {
        let mut text = String::new();
        for step in self.path.borrow().iter() {
            match step {
                Step::Field(f) if text.is_empty() => text.push_str(f),
                Step::Field(f) => text.extend([".", f]),
                Step::Index(i) => text.push_str(&format!("[{i}]")),
                Step::Key(k) => text.push_str(&format!("[{k}]")),
            }
        }
        text
    }

    pub(crate) fn message<E: Error>(&self, name: &str) -> Result<Rc<Message>, E> {
        match self.schema.get(name) {
            Some(Type::Message(m)) => Ok(m),
            _ => Err(E::custom(format!("{name} is not a message of this program"))),
        }
    }
}

/// Wire types (protobuf encoding specification).
const VARINT: u32 = 0;
const FIXED64: u32 = 1;
const BYTES: u32 = 2;
const FIXED32: u32 = 5;

fn varint(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        // The low seven bits.
        out.push((v & 0x7f) as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn tag(out: &mut Vec<u8>, number: u32, wire: u32) {
    varint(out, u64::from(number << 3 | wire));
}

fn bytes(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    tag(out, number, BYTES);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// Writes a nested message; `f` says whether there is one.
fn nested<E>(
    out: &mut Vec<u8>,
    number: u32,
    f: impl FnOnce(&mut Vec<u8>) -> Result<bool, E>,
) -> Result<bool, E> {
    let before = out.len();
    tag(out, number, BYTES);
    // One byte for the length, as most messages need; longer ones are moved.
    out.push(0);
    let start = out.len();
    if !f(out)? {
        out.truncate(before);
        return Ok(false);
    }
    let mut length = Vec::with_capacity(5);
    varint(&mut length, (out.len() - start) as u64);
    if let [one] = length[..] {
        out[start - 1] = one;
    } else {
        out.splice(start - 1..start, length);
    }
    Ok(true)
}

/// A whole message, without tag and length. False for `null`.
pub(crate) struct MessageValue<'a> {
    pub(crate) t: &'a Translator,
    pub(crate) message: Rc<Message>,
    pub(crate) out: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for MessageValue<'_> {
    type Value = bool;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<bool, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MessageValue<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a {}", self.message.name)
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let Self { t, message, out } = self;
        let mut seen = Seen::default();
        while let Some(field) = map.next_key_seed(FieldName { message: &message })? {
            t.within(Step::Field(field.name), || {
                seen.check::<A::Error>(&field)?;
                map.next_value_seed(FieldValue { t, field, out })
            })?;
        }
        Ok(true)
    }
}

/// Fields of a message that were there already.
#[derive(Default)]
pub(super) struct Seen {
    fields: u128,
    oneofs: u32,
}

impl Seen {
    pub(super) fn check<E: Error>(&mut self, f: &Field) -> Result<(), E> {
        let bit = 1 << f.index;
        if self.fields & bit != 0 {
            return Err(E::custom("appears twice"));
        }
        self.fields |= bit;
        if let Some(n) = f.oneof {
            if self.oneofs & (1 << n) != 0 {
                return Err(E::custom("another field that excludes this one is set"));
            }
            self.oneofs |= 1 << n;
        }
        Ok(())
    }
}

/// The key of a member, as the field that it names.
pub(super) struct FieldName<'a> {
    pub(super) message: &'a Message,
}

impl<'de> DeserializeSeed<'de> for FieldName<'_> {
    type Value = Field;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Field, D::Error> {
        d.deserialize_identifier(self)
    }
}

impl Visitor<'_> for FieldName<'_> {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Field, E> {
        let unknown = || E::custom(format!("{} has no field {name:?}", self.message.name));
        self.message.field(name).ok_or_else(unknown)
    }
}

/// The value of a field, with its tag. Nothing is written for `null`.
pub(super) struct FieldValue<'a> {
    pub(super) t: &'a Translator,
    pub(super) field: Field,
    pub(super) out: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for FieldValue<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        match self.field.label {
            Label::Single => {
                let Self { t, field, out } = self;
                Single { t, kind: field.kind, number: field.number, out }.deserialize(d).map(drop)
            }
            Label::Repeated | Label::Map => d.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for FieldValue<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.field.label == Label::Map { "a map" } else { "a list" })
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if self.field.label != Label::Repeated {
            return Err(A::Error::custom("expected a map"));
        }
        let Self { t, field: Field { kind, number, .. }, out } = self;
        for i in 0.. {
            let item = t.within(Step::Index(i), || {
                let item = seq.next_element_seed(Single { t, kind, number, out })?;
                if item == Some(false) {
                    return Err(A::Error::custom("null has no place in a list"));
                }
                Ok(item)
            })?;
            if item.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { t, field, out } = self;
        let Kind::Named(entry) = field.kind else { return Err(A::Error::custom("expected a list")) };
        if field.label != Label::Map {
            return Err(A::Error::custom("expected a list"));
        }
        let entry = t.message::<A::Error>(entry)?;
        let (Some(key_of), Some(value_of)) = (entry.field("key"), entry.field("value")) else {
            return Err(A::Error::custom("not a map entry"));
        };
        while let Some(key) = map.next_key::<String>()? {
            t.within(Step::Key(key.clone()), || {
                nested(out, field.number, |out| {
                    let Kind::Scalar(scalar) = key_of.kind else {
                        return Err(A::Error::custom("not a map key"));
                    };
                    // A key is text in JSON whatever its type.
                    ScalarValue { scalar, number: key_of.number, out }.visit_str::<A::Error>(&key)?;
                    map.next_value_seed(FieldValue { t, field: value_of, out })?;
                    Ok(true)
                })
            })?;
        }
        Ok(())
    }
}

/// One value, with its tag. False for `null`, for which nothing is written.
struct Single<'a> {
    t: &'a Translator,
    kind: Kind,
    number: u32,
    out: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for Single<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<bool, D::Error> {
        let Self { t, kind, number, out } = self;
        let name = match kind {
            Kind::Scalar(scalar) => return d.deserialize_any(ScalarValue { scalar, number, out }),
            Kind::Named(name) => name,
        };
        match t.schema.get(name) {
            Some(Type::Enum(values)) => d.deserialize_any(EnumValue { values: &values, number, out }),
            Some(Type::Message(message)) => nested(out, number, |out| body(t, message, out, d)),
            None => Err(D::Error::custom(format!("{name} is not a type of this program"))),
        }
    }
}

/// The inside of a message, by the rules of its type. False for `null`.
fn body<'de, D: Deserializer<'de>>(
    t: &Translator,
    message: Rc<Message>,
    out: &mut Vec<u8>,
    d: D,
) -> Result<bool, D::Error> {
    if let Some(scalar) = wrapped(message.name) {
        return d.deserialize_any(ScalarValue { scalar, number: 1, out });
    }
    match message.name {
        "google.protobuf.Duration" => d.deserialize_any(DurationValue { out }),
        "google.protobuf.Any" => d.deserialize_any(AnyValue { t, out }),
        "google.protobuf.Struct" => d.deserialize_any(StructFields { out }),
        "google.protobuf.Value" => ValueValue { out }.deserialize(d).map(|()| true),
        "google.protobuf.ListValue" => d.deserialize_any(ListItems { out }),
        name @ ("google.protobuf.Timestamp" | "google.protobuf.FieldMask") => {
            d.deserialize_ignored_any(IgnoredAny)?;
            Err(D::Error::custom(format!("{name} is not supported")))
        }
        _ => MessageValue { t, message, out }.deserialize(d),
    }
}

/// Whether JSON shows a message of this type otherwise than by its fields.
fn special(name: &str) -> bool {
    wrapped(name).is_some()
        || matches!(
            name.strip_prefix("google.protobuf."),
            Some("Duration" | "Any" | "Struct" | "Value" | "ListValue" | "Timestamp" | "FieldMask")
        )
}

/// What a wrapper type wraps.
fn wrapped(name: &str) -> Option<Scalar> {
    Some(match name.strip_prefix("google.protobuf.")? {
        "BoolValue" => Scalar::Bool,
        "StringValue" => Scalar::String,
        "BytesValue" => Scalar::Bytes,
        "Int32Value" => Scalar::Int32,
        "Int64Value" => Scalar::Int64,
        "UInt32Value" => Scalar::Uint32,
        "UInt64Value" => Scalar::Uint64,
        "FloatValue" => Scalar::Float,
        "DoubleValue" => Scalar::Double,
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
