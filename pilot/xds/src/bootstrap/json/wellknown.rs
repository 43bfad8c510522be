//! Messages that JSON shows otherwise than by their fields.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;

use super::{FIXED64, MessageValue, Translator, VARINT, body, bytes, nested, special, tag, varint};

/// `google.protobuf.Duration`: `1.5s`. False for `null`.
pub(super) struct DurationValue<'a> {
    pub(super) out: &'a mut Vec<u8>,
}

impl Visitor<'_> for DurationValue<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration such as 1.5s")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<bool, E> {
        let (seconds, nanos) = parse_duration(text)
            .ok_or_else(|| E::custom(format!("{text:?} is not a duration such as 1.5s")))?;
        for (number, v) in [(1, seconds), (2, i64::from(nanos))] {
            if v != 0 {
                tag(self.out, number, VARINT);
                varint(self.out, v.cast_unsigned());
            }
        }
        Ok(true)
    }
}

/// Seconds and nanoseconds of the same sign.
fn parse_duration(text: &str) -> Option<(i64, i32)> {
    let number = text.strip_suffix('s')?;
    let (sign, number) = match number.strip_prefix('-') {
        Some(n) => (-1, n),
        None => (1, number),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let nanos: i32 = format!("{fraction:0<9}").parse().ok()?;
    Some((seconds * sign, nanos * sign as i32))
}

/// `google.protobuf.Any`. A type that this program does not know is written without its content: whoever reads the
/// result refuses it by its place, or skips what says of itself that it is optional. False for `null`.
pub(super) struct AnyValue<'a> {
    pub(super) t: &'a Translator,
    pub(super) out: &'a mut Vec<u8>,
}

impl<'de> Visitor<'de> for AnyValue<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message with \"@type\"")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let Self { t, out } = self;
        match map.next_key::<String>()? {
            None => return Ok(true),
            Some(k) if k == "@type" => {
                let url: String = map.next_value()?;
                let name = url.rsplit('/').next().unwrap_or(&url);
                if t.schema.get(name).is_some() && !special(name) {
                    bytes(out, 1, url.as_bytes());
                    let message = t.message::<A::Error>(name)?;
                    nested(out, 2, |out| MessageValue { t, message, out }.visit_map(map))?;
                    return Ok(true);
                }
                collected(t, out, &url, rest(map, serde_json::Map::new())?)?;
            }
            // The type is not the first member: what stands before it cannot be read yet.
            Some(key) => {
                let first = serde_json::Map::from_iter([(key, map.next_value()?)]);
                let mut members = rest(map, first)?;
                let Some(Json::String(url)) = members.remove("@type") else {
                    return Err(A::Error::custom("\"@type\" is missing"));
                };
                collected(t, out, &url, members)?;
            }
        }
        Ok(true)
    }
}

fn rest<'de, A: MapAccess<'de>>(
    mut map: A,
    mut members: serde_json::Map<String, Json>,
) -> Result<serde_json::Map<String, Json>, A::Error> {
    while let Some((k, v)) = map.next_entry::<String, Json>()? {
        members.insert(k, v);
    }
    Ok(members)
}

fn collected<E: Error>(
    t: &Translator,
    out: &mut Vec<u8>,
    url: &str,
    mut members: serde_json::Map<String, Json>,
) -> Result<(), E> {
    bytes(out, 1, url.as_bytes());
    let name = url.rsplit('/').next().unwrap_or(url);
    if t.schema.get(name).is_none() {
        let unknown = || E::custom(format!("{name:?} is no type that is known here"));
        return if t.strict { Err(unknown()) } else { Ok(()) };
    }
    let message = t.message::<E>(name)?;
    nested(out, 2, |out| {
        if special(name) {
            let value = members.remove("value").unwrap_or_default();
            body(t, message, out, value)
        } else {
            MessageValue { t, message, out }.deserialize(Json::Object(members))
        }
    })
    .map_err(E::custom)?;
    Ok(())
}

/// `google.protobuf.Struct`. False for `null`.
pub(super) struct StructFields<'a> {
    pub(super) out: &'a mut Vec<u8>,
}

impl<'de> Visitor<'de> for StructFields<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            nested(self.out, 1, |out| {
                bytes(out, 1, key.as_bytes());
                nested(out, 2, |out| map.next_value_seed(ValueValue { out }).map(|()| true))
            })?;
        }
        Ok(true)
    }
}

/// `google.protobuf.ListValue`. False for `null`.
pub(super) struct ListItems<'a> {
    pub(super) out: &'a mut Vec<u8>,
}

impl<'de> Visitor<'de> for ListItems<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
        loop {
            let more = nested(self.out, 1, |out| {
                seq.next_element_seed(ValueValue { out }).map(|item| item.is_some())
            })?;
            if !more {
                return Ok(true);
            }
        }
    }
}

/// `google.protobuf.Value`, in which `null` is a value.
pub(super) struct ValueValue<'a> {
    pub(super) out: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for ValueValue<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl ValueValue<'_> {
    fn number(self, v: f64) {
        tag(self.out, 2, FIXED64);
        self.out.extend_from_slice(&v.to_le_bytes());
    }
}

impl<'de> Visitor<'de> for ValueValue<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        tag(self.out, 1, VARINT);
        varint(self.out, 0);
        Ok(())
    }

    fn visit_bool<E>(self, v: bool) -> Result<(), E> {
        tag(self.out, 4, VARINT);
        varint(self.out, u64::from(v));
        Ok(())
    }

    fn visit_i64<E>(self, v: i64) -> Result<(), E> {
        self.number(v as f64);
        Ok(())
    }

    fn visit_u64<E>(self, v: u64) -> Result<(), E> {
        self.number(v as f64);
        Ok(())
    }

    fn visit_f64<E>(self, v: f64) -> Result<(), E> {
        self.number(v);
        Ok(())
    }

    fn visit_str<E>(self, v: &str) -> Result<(), E> {
        bytes(self.out, 3, v.as_bytes());
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        nested(self.out, 5, |out| StructFields { out }.visit_map(map)).map(drop)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<(), A::Error> {
        nested(self.out, 6, |out| ListItems { out }.visit_seq(seq)).map(drop)
    }
}
