//! A YAML or JSON document as a tree that remembers where every value stood.
//!
//! Parsing is untyped first and typed second: every later finding, whether a wrong type, an
//! unknown field or a weight that does not add up, can then point at a line. The limits below make
//! hostile input (deep nesting, aliases that multiply) fail quickly and in bounded memory.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use crate::path::{FieldPath, Segment};

/// Largest document. The largest VirtualServices seen in the field are below 300 kB.
pub(crate) const MAX_DOCUMENT_BYTES: usize = 1 << 20;
/// Deepest nesting. The deepest kind has about 14 levels.
const MAX_DEPTH: usize = 48;
/// Nodes of one document, after aliases are expanded.
const MAX_NODES: usize = 200_000;

/// Where a value starts, both counted from 1; 0 is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Place {
    pub line: u32,
    pub column: u32,
}

impl Place {
    fn of(l: serde_saphyr::Location) -> Self {
        let clamp = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Self { line: clamp(l.line()), column: clamp(l.column()) }
    }
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub place: Place,
    pub value: Value,
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    String(String),
    Seq(Vec<Node>),
    Map(Vec<Member>),
}

/// A member of a mapping.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Member {
    pub key: String,
    pub key_place: Place,
    pub value: Node,
}

/// Why text is not a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub place: Place,
    pub message: String,
}

impl Node {
    /// Parses one document; `Value::Null` for one without content.
    pub(crate) fn parse(text: &str) -> Result<Self, SyntaxError> {
        if text.len() > MAX_DOCUMENT_BYTES {
            return Err(SyntaxError {
                place: Place { line: 1, column: 1 },
                message: format!("the document has {} bytes; {MAX_DOCUMENT_BYTES} is the limit", text.len()),
            });
        }
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_depth: MAX_DEPTH,
                max_nodes: MAX_NODES,
                max_events: 4 * MAX_NODES,
                max_aliases: 1_000,
                max_anchors: 200,
                max_documents: 1,
                max_total_scalar_bytes: 4 * MAX_DOCUMENT_BYTES,
            },
            duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
            strict_booleans: true,
            with_snippet: false,
            emit_comments: false,
        };
        serde_saphyr::from_str_with_options::<Node>(text, options).map_err(|e| {
            let e = e.without_snippet();
            let place = e.location().map(Place::of).unwrap_or_default();
            SyntaxError { place, message: too_large(e).unwrap_or_else(|| message_of(&e.to_string())) }
        })
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// The member `key` of a mapping, unless it is null.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        let Value::Map(members) = &self.value else { return None };
        members.iter().find(|m| m.key == key && !m.value.is_null()).map(|m| &m.value)
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// Where `path` stands, or the nearest of its parents that exists.
    pub(crate) fn locate(&self, path: &FieldPath) -> Place {
        let mut at = self;
        let mut place = self.place;
        for s in &path.0 {
            let next = match (s, &at.value) {
                (Segment::Key(k), Value::Map(members)) => {
                    members.iter().find(|m| m.key == *k).map(|m| (m.key_place, &m.value))
                }
                (Segment::Index(i), Value::Seq(items)) => items.get(*i).map(|n| (n.place, n)),
                _ => None,
            };
            let Some((p, n)) = next else { break };
            place = p;
            at = n;
        }
        place
    }

    /// What kind of value it is, for messages.
    pub(crate) fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Bool(b) => format!("the boolean {b}"),
            Value::Int(n) => format!("the number {n}"),
            Value::Uint(n) => format!("the number {n}"),
            Value::Float(n) => format!("the number {n}"),
            Value::String(s) => format!("the string {:?}", s.chars().take(64).collect::<String>()),
            Value::Seq(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }
}

/// What is too large, if that is the reason.
fn too_large(mut e: &serde_saphyr::Error) -> Option<String> {
    use serde_saphyr::{Error, budget::BudgetBreach};
    while let Error::AliasError { error, .. } | Error::WithSnippet { error, .. } = e {
        e = error;
    }
    let Error::Budget { breach, .. } = e else { return None };
    match breach {
        BudgetBreach::Depth { .. } => Some(format!("nested more than {MAX_DEPTH} levels deep")),
        BudgetBreach::Nodes { .. } | BudgetBreach::Events { .. } => {
            Some(format!("more than {MAX_NODES} values, with every anchor in the places that refer to it"))
        }
        BudgetBreach::Aliases { .. }
        | BudgetBreach::Anchors { .. }
        | BudgetBreach::AliasAnchorRatio { .. } => {
            Some("too many anchors, or too many references to them".into())
        }
        _ => None,
    }
}

/// The parser's text without the place, which the report has in its own field.
fn message_of(text: &str) -> String {
    let text = match text.rfind(" at line ") {
        Some(i) => &text[..i],
        None => text,
    };
    let text = text.strip_prefix("error: ").unwrap_or(text);
    match text.strip_prefix("line ").and_then(|t| t.split_once(": ")) {
        Some((place, rest)) if place.bytes().all(|c| c.is_ascii_alphanumeric() || c == b' ') => {
            rest.to_owned()
        }
        _ => text.to_owned(),
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(d)?;
        Ok(Self { place: Place::of(spanned.referenced), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        Value::deserialize(d)
    }

    fn visit_bool<E>(self, b: bool) -> Result<Value, E> {
        Ok(Value::Bool(b))
    }

    fn visit_i64<E>(self, n: i64) -> Result<Value, E> {
        Ok(Value::Int(n))
    }

    fn visit_u64<E>(self, n: u64) -> Result<Value, E> {
        Ok(i64::try_from(n).map_or(Value::Uint(n), Value::Int))
    }

    fn visit_f64<E>(self, n: f64) -> Result<Value, E> {
        Ok(Value::Float(n))
    }

    fn visit_str<E>(self, s: &str) -> Result<Value, E> {
        Ok(Value::String(s.to_owned()))
    }

    fn visit_string<E>(self, s: String) -> Result<Value, E> {
        Ok(Value::String(s))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(n) = seq.next_element::<Node>()? {
            items.push(n);
        }
        Ok(Value::Seq(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            // Mappings as keys reach this visitor as text of their own; refuse absurd ones.
            if key.value.len() > 4096 {
                return Err(A::Error::custom("a key is longer than 4096 bytes"));
            }
            let value = map.next_value::<Node>()?;
            members.push(Member { key_place: Place::of(key.referenced), key: key.value, value });
        }
        Ok(Value::Map(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_path(keys: &[&str]) -> FieldPath {
        FieldPath(
            keys.iter()
                .map(|k| k.parse().map_or_else(|_| Segment::Key((*k).to_owned()), Segment::Index))
                .collect(),
        )
    }

    #[test]
    fn values_and_keys_know_their_lines() {
        let n = Node::parse("# top\nspec:\n  http:\n  - route:\n      weight: 5\n    name: \"a\"\n").unwrap();
        assert_eq!(n.locate(&key_path(&["spec", "http"])), Place { line: 3, column: 3 });
        assert_eq!(n.locate(&key_path(&["spec", "http", "0", "route", "weight"])).line, 5);
        assert_eq!(n.locate(&key_path(&["spec", "http", "0", "absent", "x"])).line, 4);
        let json = Node::parse("{\n \"a\": [1,\n  true, null, 1.5, \"x\"]\n}").unwrap();
        assert_eq!(json.locate(&key_path(&["a", "1"])).line, 3);
    }

    #[test]
    fn scalars_keep_their_types() {
        let n = Node::parse("a: yes\nb: true\nc: '1'\nd: 1\ne: -1\nf: 1.5\ng: ~\nh:\ni: off\n").unwrap();
        let v = |k: &str| {
            let Value::Map(m) = &n.value else { panic!() };
            m.iter().find(|m| m.key == k).map(|m| m.value.value.clone()).unwrap()
        };
        assert_eq!(v("a"), Value::String("yes".into()));
        assert_eq!(v("b"), Value::Bool(true));
        assert_eq!(v("c"), Value::String("1".into()));
        assert_eq!(v("d"), Value::Int(1));
        assert_eq!(v("e"), Value::Int(-1));
        assert_eq!(v("f"), Value::Float(1.5));
        assert_eq!(v("g"), Value::Null);
        assert_eq!(v("h"), Value::Null);
        assert_eq!(v("i"), Value::String("off".into()));
    }

    #[test]
    fn mistakes_have_a_place_and_a_message() {
        for (text, line) in [
            ("a: 1\nb: [1, 2\nc: 3\n", 2),
            ("a: 1\n  b: 2\n", 2),
            ("a: 1\na: 2\n", 2),
            ("a: \"x\n", 1),
            ("a:\n\t- b\n", 2),
            ("a: *nope\n", 1),
        ] {
            let e = Node::parse(text).unwrap_err();
            assert!(e.place.line >= line, "{text:?}: {e:?}");
            assert!(!e.message.is_empty() && !e.message.contains(" at line"), "{e:?}");
        }
    }

    #[test]
    fn hostile_input_is_refused() {
        // Taken literally, the first would not end within anybody's patience.
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..12 {
            let prev = i - 1;
            bomb.push_str(&format!("a{i}: &a{i} [{}]\n", vec![format!("*a{prev}"); 10].join(",")));
        }
        let e = Node::parse(&bomb).unwrap_err();
        assert!(e.message.contains("values, with every anchor"), "{e:?}");
        let e = Node::parse(&format!("{}1{}", "[".repeat(60), "]".repeat(60))).unwrap_err();
        assert!(e.message.contains("levels deep"), "{e:?}");
        assert!(Node::parse(&"[".repeat(100_000)).is_err());
        assert!(Node::parse(&format!("{}1", "{a: ".repeat(5_000))).is_err());
        assert!(
            Node::parse(&(0..2_000).map(|i| format!("{}k:\n", " ".repeat(i))).collect::<String>()).is_err()
        );
        assert!(Node::parse(&"- - - - ".repeat(20_000)).is_err());
        assert!(Node::parse(&"x".repeat(MAX_DOCUMENT_BYTES + 1)).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(text in "\\PC{0,200}") {
            let _ = Node::parse(&text);
        }

        #[test]
        fn no_yamlish_input_panics(text in "[\\[\\]{}:,&*!|>'\"%@#?a1 \\n\\t-]{0,200}") {
            let _ = Node::parse(&text);
        }
    }
}
