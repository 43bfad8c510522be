//! The fields of documents, read from the source of their types: what nobody forgets to list.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Fields of messages by type: JSON name and Rust type.
pub(crate) struct Schema(BTreeMap<String, Vec<(String, String)>>);

impl Schema {
    /// Reads every `message!` of `galley/model`.
    pub(crate) fn read() -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../galley/model/src/authored");
        let mut all = BTreeMap::new();
        for f in std::fs::read_dir(dir).unwrap() {
            let path = f.unwrap().path();
            // Names of messages are unique in a file; these are read apart, or have their own table.
            let other = ["gateway_api.rs", "mixer.rs", "tests.rs"].iter().any(|n| path.ends_with(n));
            if path.extension().is_some_and(|e| e == "rs") && !other {
                structs(&std::fs::read_to_string(path).unwrap(), &mut all);
            }
        }
        Self(all)
    }

    /// Reads the messages of the Gateway API, of which some have names of Istio's.
    pub(crate) fn gateway_api() -> Self {
        let file =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../galley/model/src/authored/gateway_api.rs");
        let mut all = BTreeMap::new();
        structs(&std::fs::read_to_string(file).unwrap(), &mut all);
        Self(all)
    }

    /// Every field of a kind and of what it consists of, such as `VirtualService.http[].match[].uri`. A message that
    /// stands in several places is entered at the first: `seen` are those that were.
    pub(crate) fn paths(&self, kind: &str, seen: &mut BTreeSet<String>) -> BTreeSet<String> {
        let mut out = BTreeSet::new();
        seen.remove(kind);
        self.walk(kind, kind, seen, &mut out);
        out
    }

    fn walk(&self, at: &str, of: &str, seen: &mut BTreeSet<String>, out: &mut BTreeSet<String>) {
        let Some(fields) = self.0.get(of).filter(|_| seen.insert(of.to_owned())) else {
            out.insert(at.to_owned());
            return;
        };
        for (name, ty) in fields {
            let (inner, list) = inner(ty);
            let map = ty.contains("BTreeMap<");
            let suffix = if list {
                "[]"
            } else if map && self.0.contains_key(inner) {
                "{}"
            } else {
                ""
            };
            self.walk(&format!("{at}.{name}{suffix}"), inner, seen, out);
        }
    }
}

/// The innermost type, and whether it is one of many.
fn inner(ty: &str) -> (&str, bool) {
    let mut t = ty.trim();
    let mut list = false;
    loop {
        if let Some(i) = t.strip_prefix("Option<") {
            t = i.strip_suffix('>').unwrap_or(i);
        } else if let Some(i) = t.strip_prefix("Vec<") {
            list = true;
            t = i.strip_suffix('>').unwrap_or(i);
        } else if let Some(i) = t.strip_prefix("BTreeMap<String,") {
            t = i.trim().strip_suffix('>').unwrap_or(i);
        } else {
            // A list of plain values is one field.
            return (t, list && t.chars().next().is_some_and(char::is_uppercase) && t != "String");
        }
    }
}

fn structs(text: &str, all: &mut BTreeMap<String, Vec<(String, String)>>) {
    let mut current: Option<(String, Vec<(String, String)>)> = None;
    let mut rename: Option<String> = None;
    let mut unwritten = false;
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("pub struct ") {
            let name = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            current = Some((name.to_owned(), vec![]));
        } else if line == "}" {
            all.extend(current.take());
        } else if let Some((_, v)) = line.split_once("serde(rename = \"") {
            rename = v.split('"').next().map(str::to_owned);
        } else if line == "#[serde(skip)]" {
            unwritten = true;
        } else if let (Some((_, fields)), Some(rest)) = (&mut current, line.strip_prefix("pub ")) {
            if std::mem::take(&mut unwritten) {
                continue;
            }
            let Some((name, ty)) = rest.split_once(':') else { continue };
            let json = rename.take().unwrap_or_else(|| camel(name.trim()));
            fields.push((json, ty.trim().trim_end_matches(',').to_owned()));
        }
    }
}

fn camel(snake: &str) -> String {
    let mut out = String::new();
    let mut up = false;
    for c in snake.chars() {
        match c {
            '_' => up = true,
            c if up => {
                out.extend(c.to_uppercase());
                up = false;
            }
            c => out.push(c),
        }
    }
    out
}
