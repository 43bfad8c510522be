//! Just enough of the protobuf encoding and of gRPC's framing for the few messages that filters exchange
//! with services beside the proxy. Configuration is none of it: that is `mesh-xds`.

use std::borrow::Cow;

use serde_json::{Map, Number, Value};

/// Nesting of `google.protobuf.Struct` that is followed.
const MAX_DEPTH: usize = 32;

/// A message being written. Fields with default values are left out, as in proto3.
#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    fn varint(&mut self, mut n: u64) {
        while n >= 0x80 {
            // The low seven bits and a mark that more follow.
            self.0.push((n & 0x7f) as u8 | 0x80);
            n >>= 7;
        }
        self.0.push(n as u8);
    }

    fn tag(&mut self, field: u32, kind: u64) {
        self.varint(u64::from(field) << 3 | kind);
    }

    pub(crate) fn number(&mut self, field: u32, n: u64) {
        if n != 0 {
            self.tag(field, 0);
            self.varint(n);
        }
    }

    pub(crate) fn bytes(&mut self, field: u32, b: &[u8]) {
        if !b.is_empty() {
            self.tag(field, 2);
            self.varint(b.len() as u64);
            self.0.extend_from_slice(b);
        }
    }

    /// Text; what is not UTF-8 is replaced, since receivers refuse it.
    pub(crate) fn text(&mut self, field: u32, s: &[u8]) {
        match std::str::from_utf8(s) {
            Ok(_) => self.bytes(field, s),
            Err(_) => self.bytes(field, String::from_utf8_lossy(s).as_bytes()),
        }
    }

    /// A message, which is there even if it is empty.
    pub(crate) fn message(&mut self, field: u32, f: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        f(&mut inner);
        self.tag(field, 2);
        self.varint(inner.0.len() as u64);
        self.0.extend_from_slice(&inner.0);
    }

    /// An entry of `map<string, string>`.
    pub(crate) fn entry(&mut self, field: u32, key: &[u8], value: &[u8]) {
        self.message(field, |m| {
            m.text(1, key);
            m.text(2, value);
        });
    }

    /// `google.protobuf.Value`.
    pub(crate) fn value(&mut self, field: u32, v: &Value) {
        self.message(field, |m| match v {
            Value::Null => {
                m.tag(1, 0);
                m.varint(0);
            }
            Value::Number(n) => {
                m.tag(2, 1);
                m.0.extend_from_slice(&n.as_f64().unwrap_or_default().to_le_bytes());
            }
            Value::String(s) => {
                m.tag(3, 2);
                m.varint(s.len() as u64);
                m.0.extend_from_slice(s.as_bytes());
            }
            Value::Bool(b) => {
                m.tag(4, 0);
                m.varint(u64::from(*b));
            }
            Value::Object(o) => m.message(5, |s| s.fields(o)),
            Value::Array(l) => m.message(6, |a| l.iter().for_each(|v| a.value(1, v))),
        });
    }

    /// The fields of a `google.protobuf.Struct`.
    pub(crate) fn fields(&mut self, o: &Map<String, Value>) {
        for (k, v) in o {
            self.message(1, |e| {
                e.text(1, k.as_bytes());
                e.value(2, v);
            });
        }
    }

    /// A number of fixed size.
    pub(crate) fn fixed64(&mut self, field: u32, n: u64) {
        if n != 0 {
            self.tag(field, 1);
            self.0.extend_from_slice(&n.to_le_bytes());
        }
    }

    /// A number of fixed size.
    pub(crate) fn fixed32(&mut self, field: u32, n: u32) {
        if n != 0 {
            self.tag(field, 5);
            self.0.extend_from_slice(&n.to_le_bytes());
        }
    }

    /// Fields that are encoded already.
    pub(crate) fn append(&mut self, fields: &[u8]) {
        self.0.extend_from_slice(fields);
    }

    /// The message as it is.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// The message in gRPC's frame, uncompressed.
    pub(crate) fn framed(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.0.len() + 5);
        out.push(0);
        out.extend_from_slice(&u32::try_from(self.0.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(&self.0);
        out
    }
}

/// A field as it was read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Field<'a> {
    Number(u64),
    Double(f64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    pub(crate) fn number(self) -> u64 {
        match self {
            Self::Number(n) => n,
            _ => 0,
        }
    }

    pub(crate) fn bytes(self) -> &'a [u8] {
        match self {
            Self::Bytes(b) => b,
            _ => &[],
        }
    }

    pub(crate) fn text(self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.bytes())
    }
}

/// Bytes that are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a protobuf message")]
pub(crate) struct WireError;

/// Visits the fields of a message in order.
pub(crate) fn read<'a>(
    mut b: &'a [u8],
    mut field: impl FnMut(u32, Field<'a>) -> Result<(), WireError>,
) -> Result<(), WireError> {
    while !b.is_empty() {
        let tag = varint(&mut b)?;
        let number = u32::try_from(tag >> 3).map_err(|_| WireError)?;
        let mut take = |n: usize| -> Result<&'a [u8], WireError> {
            let (head, rest) = b.split_at_checked(n).ok_or(WireError)?;
            b = rest;
            Ok(head)
        };
        let value = match tag & 7 {
            0 => Field::Number(varint(&mut b)?),
            1 => Field::Double(f64::from_le_bytes(take(8)?.try_into().map_err(|_| WireError)?)),
            2 => {
                let n = varint(&mut b)?;
                let (head, rest) =
                    b.split_at_checked(usize::try_from(n).map_err(|_| WireError)?).ok_or(WireError)?;
                b = rest;
                Field::Bytes(head)
            }
            5 => {
                take(4)?;
                continue;
            }
            _ => return Err(WireError),
        };
        field(number, value)?;
    }
    Ok(())
}

fn varint(b: &mut &[u8]) -> Result<u64, WireError> {
    let mut out = 0u64;
    for i in 0..10 {
        let (first, rest) = b.split_first().ok_or(WireError)?;
        *b = rest;
        out |= u64::from(first & 0x7f) << (7 * i).min(63);
        if first & 0x80 == 0 {
            return Ok(out);
        }
    }
    Err(WireError)
}

/// `google.protobuf.Struct`.
pub(crate) fn read_struct(b: &[u8]) -> Result<Map<String, Value>, WireError> {
    struct_at(b, 0)
}

fn struct_at(b: &[u8], depth: usize) -> Result<Map<String, Value>, WireError> {
    if depth > MAX_DEPTH {
        return Err(WireError);
    }
    let mut out = Map::new();
    read(b, |n, f| {
        if n == 1 {
            let (mut key, mut value) = (String::new(), Value::Null);
            read(f.bytes(), |n, f| {
                match n {
                    1 => key = f.text().into_owned(),
                    2 => value = value_at(f.bytes(), depth + 1)?,
                    _ => {}
                }
                Ok(())
            })?;
            out.insert(key, value);
        }
        Ok(())
    })?;
    Ok(out)
}

fn value_at(b: &[u8], depth: usize) -> Result<Value, WireError> {
    if depth > MAX_DEPTH {
        return Err(WireError);
    }
    let mut out = Value::Null;
    read(b, |n, f| {
        out = match (n, f) {
            (2, Field::Double(d)) => Number::from_f64(d).map_or(Value::Null, Value::Number),
            (3, f) => Value::String(f.text().into_owned()),
            (4, f) => Value::Bool(f.number() != 0),
            (5, f) => Value::Object(struct_at(f.bytes(), depth + 1)?),
            (6, f) => {
                let mut list = Vec::new();
                read(f.bytes(), |n, f| {
                    if n == 1 {
                        list.push(value_at(f.bytes(), depth + 1)?);
                    }
                    Ok(())
                })?;
                Value::Array(list)
            }
            _ => Value::Null,
        };
        Ok(())
    })?;
    Ok(out)
}

/// The message in a body of one uncompressed gRPC frame.
pub(crate) fn unframe(body: &[u8]) -> Result<&[u8], WireError> {
    let (head, message) = body.split_at_checked(5).ok_or(WireError)?;
    let length = u32::from_be_bytes(head[1..].try_into().map_err(|_| WireError)?);
    (head[0] == 0 && message.len() == length as usize).then_some(message).ok_or(WireError)
}

/// A message in fields, and a `Struct`, which is written as it was read.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let mut sizes = 0;
    let all = read(data, |_, f| {
        sizes += f.bytes().len();
        Ok(())
    });
    assert!(sizes <= data.len());
    if let Ok(s) = read_struct(data) {
        assert!(all.is_ok());
        let mut w = Writer::default();
        w.fields(&s);
        assert_eq!(read_struct(&w.into_bytes()), Ok(s));
    }
    if let Ok(message) = unframe(data) {
        assert_eq!(message, &data[5..]);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut w = Writer::default();
        w.number(1, 300);
        w.number(2, 0);
        w.text(3, b"a\xff");
        w.entry(4, b"k", b"v");
        let framed = w.framed();
        let message = unframe(&framed).unwrap();
        // Field 1 as in the encoding's own documentation.
        assert_eq!(&message[..3], [0x08, 0xac, 0x02]);
        let mut seen = Vec::new();
        read(message, |n, f| {
            seen.push((n, f));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen[0], (1, Field::Number(300)));
        assert_eq!((seen[1].0, seen[1].1.text().as_ref()), (3, "a\u{fffd}"));
        assert_eq!(seen[2], (4, Field::Bytes(&[0x0a, 1, b'k', 0x12, 1, b'v'])));
        assert!(unframe(&framed[..4]).is_err() && unframe(&[1, 0, 0, 0, 0]).is_err());
        let v = json!({"a": [1.5, null, true, {"b": ""}], "s": "x"});
        let mut w = Writer::default();
        w.fields(v.as_object().unwrap());
        assert_eq!(Value::Object(read_struct(&w.0).unwrap()), v);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_handled(b in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80)) {
            let _ = read_struct(&b);
            let _ = unframe(&b);
        }
    }
}
