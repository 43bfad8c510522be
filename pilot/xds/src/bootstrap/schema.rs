//! Names, numbers and types of the protobuf fields that a bootstrap may hold.
//!
//! The table is text in the binary and is read type by type as a file mentions them, so that a process
//! keeps nothing of it once its file is read.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::HashMap,
    rc::Rc,
    sync::{Arc, LazyLock},
};

const TEXT: &str = include_str!("schema.txt");
/// What else a patch of an `EnvoyFilter` may hold.
const EXTENSIONS: &str = include_str!("../patch/extensions.txt");
/// Configuration of types that only the proxy knows; the crate that ships the descriptors has these two not.
const TYPED_STRUCT: &str = "M udpa.type.v1.TypedStruct\ntype_url 1 string\nvalue 2 google.protobuf.Struct\n\
    M xds.type.v3.TypedStruct\ntype_url 1 string\nvalue 2 google.protobuf.Struct\n";

/// Scalar types that the table uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    Bool,
    String,
    Bytes,
    Int32,
    Int64,
    Uint32,
    Uint64,
    Float,
    Double,
}

/// Type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Scalar(Scalar),
    /// Full name of a message or enum.
    Named(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Label {
    Single,
    Repeated,
    /// The kind is the entry message, with fields `key` and `value`.
    Map,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    /// As in the proto file.
    pub(crate) name: &'static str,
    pub(crate) number: u32,
    pub(crate) label: Label,
    pub(crate) kind: Kind,
    /// Of which oneof it is a member.
    pub(crate) oneof: Option<u8>,
    /// Position in its message.
    pub(crate) index: u8,
}

#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) name: &'static str,
    /// By the name in the proto file and by its JSON name.
    fields: HashMap<Cow<'static, str>, Field>,
}

impl Message {
    pub(crate) fn field(&self, name: &str) -> Option<Field> {
        self.fields.get(name).copied()
    }

    /// A field by its number.
    pub(crate) fn numbered(&self, number: u32) -> Option<Field> {
        self.fields.values().find(|f| f.number == number).copied()
    }

    /// Numbers of the fields that a field excludes.
    pub(crate) fn rivals(&self, of: &Field) -> Vec<u32> {
        let rival = |f: &&Field| f.oneof.is_some() && f.oneof == of.oneof && f.number != of.number;
        let mut all: Vec<u32> = self.fields.values().filter(rival).map(|f| f.number).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Type {
    Message(Rc<Message>),
    Enum(Rc<HashMap<&'static str, i32>>),
}

type Lines = HashMap<&'static str, (&'static str, bool)>;

/// Of a control plane that has patches to type, which it has again and again.
static OF_PATCHES: LazyLock<Arc<Lines>> =
    LazyLock::new(|| Arc::new(lines(&[TEXT, EXTENSIONS, TYPED_STRUCT])));

/// The table; not shared between threads.
pub(crate) struct Schema {
    /// Lines of each type, whose first character says which.
    lines: Arc<Lines>,
    read: RefCell<HashMap<&'static str, Type>>,
}

impl Schema {
    pub(crate) fn new() -> Self {
        Self { lines: Arc::new(lines(&[TEXT])), read: RefCell::default() }
    }

    /// With all that Envoy's configuration is made of.
    pub(crate) fn of_patches() -> Self {
        Self { lines: Arc::clone(&OF_PATCHES), read: RefCell::default() }
    }

    /// A type by its full name.
    pub(crate) fn get(&self, name: &str) -> Option<Type> {
        if let Some(t) = self.read.borrow().get(name) {
            return Some(t.clone());
        }
        let (name, (body, message)) = self.lines.get_key_value(name)?;
        let t = if *message {
            let mut fields = HashMap::new();
            for (i, line) in body.lines().enumerate() {
                let field = field(line, i)?;
                fields.insert(Cow::Borrowed(field.name), field);
                if field.name.contains('_') {
                    fields.insert(Cow::Owned(camel(field.name)), field);
                }
            }
            Type::Message(Rc::new(Message { name, fields }))
        } else {
            let value = |l: &'static str| l.split_once(' ').and_then(|(n, v)| Some((n, v.parse().ok()?)));
            Type::Enum(Rc::new(body.lines().filter_map(value).collect()))
        };
        self.read.borrow_mut().insert(name, t.clone());
        Some(t)
    }
}

/// Where each type stands.
fn lines(texts: &[&'static str]) -> Lines {
    let mut lines = HashMap::with_capacity(1024);
    for text in texts {
        // A head stands at the start of a line, and no field or value has a name of one letter.
        let mut at = 0;
        let mut open: Option<(&str, bool, usize)> = None;
        for line in text.split_inclusive('\n') {
            let message = line.starts_with("M ");
            if message || line.starts_with("E ") {
                if let Some((name, message, from)) = open {
                    lines.insert(name, (&text[from..at], message));
                }
                open = Some((line[2..].trim_end(), message, at + line.len()));
            }
            at += line.len();
        }
        if let Some((name, message, from)) = open {
            lines.insert(name, (&text[from..], message));
        }
    }
    lines
}

fn field(line: &'static str, index: usize) -> Option<Field> {
    let mut words = line.split(' ');
    let (name, number, kind) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
    let oneof = match words.next() {
        Some(w) => Some(w.strip_prefix('@')?.parse().ok()?),
        None => None,
    };
    let (label, kind) = match kind.split_at_checked(1)? {
        ("*", k) => (Label::Repeated, k),
        ("+", k) => (Label::Map, k),
        _ => (Label::Single, kind),
    };
    let kind = match kind {
        "bool" => Kind::Scalar(Scalar::Bool),
        "string" => Kind::Scalar(Scalar::String),
        "bytes" => Kind::Scalar(Scalar::Bytes),
        "int32" => Kind::Scalar(Scalar::Int32),
        "int64" => Kind::Scalar(Scalar::Int64),
        "uint32" => Kind::Scalar(Scalar::Uint32),
        "uint64" => Kind::Scalar(Scalar::Uint64),
        "float" => Kind::Scalar(Scalar::Float),
        "double" => Kind::Scalar(Scalar::Double),
        named => Kind::Named(named),
    };
    Some(Field { name, number, label, kind, oneof, index: u8::try_from(index).ok()? })
}

/// The JSON name of a field, as protoc derives it.
fn camel(name: &str) -> String {
    let mut up = false;
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        if c == '_' {
            up = true;
        } else {
            out.push(if std::mem::take(&mut up) { c.to_ascii_uppercase() } else { c });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_table_is_read() {
        let schema = Schema::of_patches();
        let (mut messages, mut enums) = (0, 0);
        for name in schema.lines.keys() {
            match schema.get(name) {
                Some(Type::Message(m)) => {
                    messages += 1;
                    for f in m.fields.values() {
                        // Bits of a mask in the reader.
                        assert!(f.index < 128 && f.oneof.is_none_or(|o| o < 32), "{name}.{}", f.name);
                        if let Kind::Named(k) = f.kind {
                            assert!(schema.lines.contains_key(k), "{name}.{}: {k}", f.name);
                        }
                    }
                }
                Some(Type::Enum(e)) => {
                    enums += 1;
                    assert!(!e.is_empty(), "{name}");
                }
                None => panic!("{name}"),
            }
        }
        let texts = || [TEXT, EXTENSIONS, TYPED_STRUCT].into_iter().flat_map(str::lines);
        let heads = |mark: &str| texts().filter(|l| l.starts_with(mark)).count();
        assert_eq!((messages, enums), (heads("M "), heads("E ")));
    }

    #[test]
    fn both_names_of_a_field() {
        let schema = Schema::new();
        let Some(Type::Message(m)) = schema.get("envoy.config.cluster.v3.OutlierDetection") else { panic!() };
        for name in ["consecutive_5xx", "consecutive5xx"] {
            assert_eq!(m.field(name).map(|f| f.number), Some(1), "{name}");
        }
        assert!(m.field("consecutive-5xx").is_none());
    }
}
