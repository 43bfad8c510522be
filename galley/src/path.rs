//! Paths to fields of a document, such as `spec.http[0].route[1].weight`.
//!
//! [`Path`] is a linked list on the stack: validation walks a document and only pays for a path when
//! it has something to say about it. [`FieldPath`] is its owned form.

use std::fmt;

/// One step into a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    /// A member of a mapping.
    Key(String),
    /// An element of a sequence.
    Index(usize),
}

/// An owned path from the top of a document.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct FieldPath(pub(crate) Vec<Segment>);

impl FieldPath {
    /// The path of one top-level field.
    #[must_use]
    pub(crate) fn key(name: &str) -> Self {
        Self(vec![Segment::Key(name.to_owned())])
    }

    /// The path that is written `text`, of plain keys and indexes.
    #[must_use]
    pub(crate) fn of(text: &str) -> Self {
        let parts = text.split(['.', '[', ']']).filter(|s| !s.is_empty());
        Self(parts.map(|s| s.parse().map_or_else(|_| Segment::Key(s.to_owned()), Segment::Index)).collect())
    }

    /// This path and a key below it.
    #[must_use]
    pub(crate) fn and(mut self, key: &str) -> Self {
        self.0.push(Segment::Key(key.to_owned()));
        self
    }

    /// This path below `parent`.
    #[must_use]
    pub(crate) fn under(mut self, parent: &FieldPath) -> Self {
        self.0.splice(0..0, parent.0.iter().cloned());
        self
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, s) in self.0.iter().enumerate() {
            match s {
                Segment::Index(n) => write!(f, "[{n}]")?,
                Segment::Key(k) if plain(k) => write!(f, "{}{k}", if i == 0 { "" } else { "." })?,
                Segment::Key(k) => write!(f, "[{k:?}]")?,
            }
        }
        Ok(())
    }
}

/// Whether a key can be written without quotes.
fn plain(k: &str) -> bool {
    !k.is_empty() && k.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-'))
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Root,
    Key(&'a str),
    Index(usize),
}

/// A path under construction; see the module's text.
#[derive(Clone, Copy)]
pub(crate) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

impl<'a> Path<'a> {
    pub(crate) const fn root() -> Path<'static> {
        Path { parent: None, step: Step::Root }
    }

    pub(crate) fn key(&'a self, name: &'a str) -> Path<'a> {
        Path { parent: Some(self), step: Step::Key(name) }
    }

    pub(crate) fn index(&'a self, i: usize) -> Path<'a> {
        Path { parent: Some(self), step: Step::Index(i) }
    }

    pub(crate) fn to_field_path(self) -> FieldPath {
        let mut out = Vec::new();
        let mut at = Some(&self);
        while let Some(p) = at {
            match p.step {
                Step::Root => {}
                Step::Key(k) => out.push(Segment::Key(k.to_owned())),
                Step::Index(i) => out.push(Segment::Index(i)),
            }
            at = p.parent;
        }
        out.reverse();
        FieldPath(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_like_code() {
        let root = Path::root();
        let spec = root.key("spec");
        let http = spec.key("http");
        let first = http.index(0);
        let headers = first.key("headers");
        assert_eq!(headers.key("end-user").to_field_path().to_string(), "spec.http[0].headers.end-user");
        assert_eq!(headers.key("a.b/c").to_field_path().to_string(), r#"spec.http[0].headers["a.b/c"]"#);
        assert_eq!(FieldPath::key("kind").to_string(), "kind");
        assert_eq!(FieldPath::of("spec.http[0].route").to_string(), "spec.http[0].route");
        assert_eq!(FieldPath::of("metadata").and("a.b").to_string(), r#"metadata["a.b"]"#);
    }
}
