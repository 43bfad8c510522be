//! From the bytes of a file to typed documents, each with its own verdict.
//!
//! A file holds documents separated by `---` lines, which YAML forbids inside of scalars; so the
//! text is split before it is parsed, and a syntax error rejects one document and not its
//! neighbours. A `v1` `List` stands for its items.

mod config_map;
mod metadata;

use std::{
    ops::{Deref, Range},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use mesh_model::authored::{Document, Kind, Spec, resource_name};

use crate::{
    de::NodeDe,
    node::{Node, SyntaxError, Value},
    path::{FieldPath, Path, Segment},
    report::{DocumentReport, Finding},
    validate::{self, Findings},
};

/// Largest file. A file of that size holds some 2,000 documents.
pub(crate) const MAX_FILE_BYTES: usize = 8 << 20;
/// Documents of one file.
const MAX_DOCUMENTS: usize = 10_000;

/// What makes a document unique.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for kinds without.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind.name(), resource_name(&self.namespace, &self.name))
    }
}

/// A document after parsing and validation.
#[derive(Debug, Clone)]
pub(crate) struct Parsed {
    pub report: Arc<DocumentReport>,
    /// Which document it is, as far as that can be told; also of an invalid one.
    pub key: Option<Key>,
    /// The typed document if it is valid on its own.
    pub document: Option<Arc<Document>>,
    /// The typed document, valid or not, for the analysis.
    pub typed: Option<Arc<Document>>,
    /// Which of the warnings have a code of their own in the analysis.
    pub coded: Vec<(&'static str, Finding)>,
    /// Where its fields stand, for findings of the analysis.
    pub places: Places,
    /// Not for the mesh (a Deployment, say).
    pub ignored: bool,
}

/// Lines of a document's fields.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    source: Option<Arc<Source>>,
    prefix: FieldPath,
    first_line: u32,
    /// Its specification is text in a ConfigMap.
    in_config_map: bool,
}

/// The text of a document, which becomes a tree when somebody asks where something stands. Most documents have no
/// findings, and a tree takes several times the memory of its text.
#[derive(Debug)]
struct Source {
    file: Arc<Vec<u8>>,
    range: Range<usize>,
    tree: Mutex<Weak<Node>>,
}

/// The tree of a document, or of an item of a list.
#[derive(Debug)]
pub(crate) struct Tree {
    root: Arc<Node>,
    prefix: FieldPath,
}

impl Deref for Tree {
    type Target = Node;

    fn deref(&self) -> &Node {
        // What is below the prefix was found when this was made.
        below(&self.root, &self.prefix).unwrap_or(&self.root)
    }
}

fn below<'n>(root: &'n Node, prefix: &FieldPath) -> Option<&'n Node> {
    prefix.0.iter().try_fold(root, |at, s| match (s, &at.value) {
        (Segment::Key(k), _) => at.get(k),
        (Segment::Index(i), Value::Seq(items)) => items.get(*i),
        (Segment::Index(_), _) => None,
    })
}

impl Source {
    fn tree(&self) -> Option<Arc<Node>> {
        let mut kept = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tree) = kept.upgrade() {
            return Some(tree);
        }
        let text = self.file.get(self.range.clone()).and_then(|b| std::str::from_utf8(b).ok())?;
        let tree = Arc::new(parse(text).ok()?);
        *kept = Arc::downgrade(&tree);
        Some(tree)
    }
}

impl Places {
    fn line(&self, path: &FieldPath) -> u32 {
        let Some(node) = self.source.as_ref().and_then(|s| s.tree()) else { return self.first_line };
        match node.locate(path).line {
            0 => self.first_line,
            line => self.first_line.saturating_add(line).saturating_sub(1),
        }
    }

    /// The document's own tree, without what surrounds it in a list. While somebody has it, nobody else makes it again.
    pub(crate) fn tree(&self) -> Option<Tree> {
        let root = self.source.as_ref()?.tree()?;
        below(&root, &self.prefix)?;
        Some(Tree { root, prefix: self.prefix.clone() })
    }

    pub(crate) fn finding(&self, path: FieldPath, message: String) -> Finding {
        let path = if self.in_config_map { config_map::path(path) } else { path };
        let path = path.under(&self.prefix);
        Finding { line: self.line(&path), path: path.to_string(), message }
    }
}

/// The tree of a document, with what is text in a ConfigMap of the mesh's settings as a part of it.
fn parse(text: &str) -> Result<Node, SyntaxError> {
    let mut node = Node::parse(text)?;
    config_map::expand(&mut node, text);
    Ok(node)
}

/// Parses and validates every document of a file.
pub(crate) fn parse_file(file: &str, content: &Arc<Vec<u8>>, default_namespace: &str) -> Vec<Parsed> {
    let bytes = content.as_slice();
    let whole = |message: String| vec![broken(DocumentReport::unreadable(file, message))];
    if bytes.len() > MAX_FILE_BYTES {
        return whole(format!("the file has {} bytes; {MAX_FILE_BYTES} is the limit", bytes.len()));
    }
    let whole_text = match std::str::from_utf8(bytes) {
        Ok(t) => t,
        Err(e) => return whole(format!("not UTF-8 at byte {}", e.valid_up_to())),
    };
    let text = whole_text.strip_prefix('\u{feff}').unwrap_or(whole_text);
    let skipped = whole_text.len() - text.len();
    let chunks = split(text);
    if chunks.len() > MAX_DOCUMENTS {
        return whole(format!("the file has {} documents; {MAX_DOCUMENTS} is the limit", chunks.len()));
    }
    let mut out = Vec::new();
    let mut number = 0;
    for (first_line, range) in chunks {
        let Some(chunk) = text.get(range.clone()) else { continue };
        if lines(chunk).all(|l| {
            let l = l.trim();
            l.is_empty() || l.starts_with('#') || l == "---" || l == "..."
        }) {
            continue;
        }
        number += 1;
        let range = range.start + skipped..range.end + skipped;
        let source = Source { file: Arc::clone(content), range, tree: Mutex::default() };
        parse_chunk(file, number, first_line, (chunk, source), default_namespace, &mut out);
    }
    out
}

fn broken(report: DocumentReport) -> Parsed {
    let places = Places { source: None, prefix: FieldPath::default(), first_line: 0, in_config_map: false };
    Parsed {
        report: Arc::new(report),
        key: None,
        document: None,
        typed: None,
        coded: vec![],
        places,
        ignored: false,
    }
}

/// Lines with what ends them. YAML ends a line at a carriage return, too (YAML 1.2.2, section 5.4).
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let bytes = text.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(at..).filter(|r| !r.is_empty())?;
        let end = match rest.iter().position(|b| matches!(b, b'\n' | b'\r')) {
            None => rest.len(),
            Some(i) if rest[i] == b'\r' && rest.get(i + 1) == Some(&b'\n') => i + 2,
            Some(i) => i + 1,
        };
        let line = text.get(at..at + end);
        at += end;
        line
    })
}

/// Line of its first line, and the range of bytes, of every document.
fn split(text: &str) -> Vec<(u32, Range<usize>)> {
    let mut out = Vec::new();
    let (mut start, mut start_line) = (0, 1u32);
    let (mut at, mut line) = (0, 1u32);
    let mut content = false;
    for l in lines(text) {
        let marker = l.starts_with("---") && l[3..].chars().next().is_none_or(char::is_whitespace);
        if marker && content {
            out.push((start_line, start..at));
            (start, start_line) = (at, line);
        }
        // Directives (`%YAML`) belong to the document that follows their `---`.
        let t = l.trim();
        content = if marker { true } else { content || !(t.is_empty() || t.starts_with(['#', '%'])) };
        at += l.len();
        line = line.saturating_add(1);
    }
    out.push((start_line, start..text.len()));
    out
}

fn parse_chunk(
    file: &str,
    number: usize,
    first_line: u32,
    (text, source): (&str, Source),
    default_namespace: &str,
    out: &mut Vec<Parsed>,
) {
    let node = match parse(text) {
        Ok(n) => Arc::new(n),
        Err(e) => {
            let guess = guess_identity(text, default_namespace);
            let mut report = DocumentReport::unreadable(file, String::new());
            report.errors.clear();
            report.document = number;
            if let Some((api_version, kind, namespace, name)) = &guess {
                report.api_version.clone_from(api_version);
                report.kind.clone_from(kind);
                report.namespace.clone_from(namespace);
                report.name.clone_from(name);
            }
            let line = first_line.saturating_add(e.place.line.max(1)).saturating_sub(1);
            report.reject(String::new(), line, e.message);
            let key = guess.and_then(|(api_version, kind, namespace, name)| {
                let kind = Kind::resolve(&api_version, &kind)?;
                Some(Key { kind, namespace, name })
            });
            out.push(Parsed { key, ..broken(report) });
            return;
        }
    };
    if node.is_null() {
        return;
    }
    let source = Arc::new(Source { tree: Mutex::new(Arc::downgrade(&node)), ..source });
    let is_list = node.get("kind").and_then(Node::as_str) == Some("List");
    if is_list
        && let Some(items) = node.get("items")
        && let Value::Seq(items) = &items.value
    {
        for (i, item) in items.iter().enumerate() {
            let root = Path::root();
            let prefix = root.key("items").index(i).to_field_path();
            let places =
                Places { source: Some(Arc::clone(&source)), prefix, first_line, in_config_map: false };
            out.push(parse_node(file, number, item, places, default_namespace));
        }
        return;
    }
    let places =
        Places { source: Some(source), prefix: FieldPath::default(), first_line, in_config_map: false };
    out.push(parse_node(file, number, &node, places, default_namespace));
}

/// Parses one document from its tree.
fn parse_node(file: &str, number: usize, node: &Node, mut places: Places, default_namespace: &str) -> Parsed {
    places.in_config_map = config_map::settings(node).is_some();
    let mut report = DocumentReport {
        file: file.to_owned(),
        document: number,
        api_version: String::new(),
        kind: String::new(),
        namespace: String::new(),
        name: String::new(),
        valid: true,
        errors: vec![],
        warnings: vec![],
    };
    let mut errors = Vec::new();
    let parsed = read(node, default_namespace, &mut report, &mut errors);
    for (path, message) in errors {
        report.errors.push(places.finding(path, message));
    }
    let (mut key, mut document, mut typed, mut coded, mut ignored) = (None, None, None, vec![], false);
    match parsed {
        Read::Nothing => {}
        Read::Ignored => {
            ignored = true;
            let message = format!("{} is not configuration of the mesh; ignored", report.kind);
            report.warnings.push(places.finding(FieldPath::key("kind"), message));
        }
        Read::Identified(k) => key = Some(k),
        Read::Typed(k, d) => {
            let mut findings = Findings::default();
            validate::document(&d, &mut findings);
            findings.warnings.extend(config_map::beside(node));
            for (path, message) in findings.errors {
                report.errors.push(places.finding(path, message));
            }
            for (path, message) in findings.warnings {
                report.warnings.push(places.finding(path, message));
            }
            for (code, path, message) in findings.coded {
                let f = places.finding(path, message);
                report.warnings.push(f.clone());
                coded.push((code, f));
            }
            key = Some(k);
            let d: Arc<Document> = Arc::from(d);
            document = report.errors.is_empty().then(|| Arc::clone(&d));
            typed = Some(d);
        }
    }
    report.valid = report.errors.is_empty();
    Parsed { report: Arc::new(report), key, document, typed, coded, places, ignored }
}

enum Read {
    /// Not even its identity could be read.
    Nothing,
    /// Somebody else's document.
    Ignored,
    /// Its specification could not be read.
    Identified(Key),
    /// Read; not validated.
    Typed(Key, Box<Document>),
}

fn read(
    node: &Node,
    default_namespace: &str,
    report: &mut DocumentReport,
    errors: &mut Vec<(FieldPath, String)>,
) -> Read {
    let Value::Map(members) = &node.value else {
        errors.push((FieldPath::default(), format!("expected a mapping, found {}", node.describe())));
        return Read::Nothing;
    };
    for name in ["apiVersion", "kind"] {
        match node.get(name).map(|n| (n, n.as_str())) {
            Some((_, Some(s))) if !s.is_empty() => {
                *(if name == "kind" { &mut report.kind } else { &mut report.api_version }) = s.to_owned();
            }
            Some((n, _)) => {
                errors.push((FieldPath::key(name), format!("expected a string, found {}", n.describe())));
            }
            None => errors.push((FieldPath::key(name), format!("{name} is required"))),
        }
    }
    let metadata = metadata::read(node, report, errors);
    if report.kind.is_empty() || report.api_version.is_empty() {
        return Read::Nothing;
    }
    let settings = config_map::settings(node);
    let resolved = match settings {
        Some(_) => Some(Kind::MeshConfig),
        None => Kind::resolve(&report.api_version, &report.kind),
    };
    let Some(kind) = resolved else {
        if platform_kind(&report.api_version, &report.kind) {
            errors.clear();
            return Read::Ignored;
        }
        errors.push((FieldPath::key("kind"), unsupported(&report.api_version, &report.kind)));
        return Read::Nothing;
    };
    let Some(mut metadata) = metadata else { return Read::Nothing };
    if settings.is_some() {
        config_map::NAME_OF_SETTINGS.clone_into(&mut metadata.name);
    }
    if !kind.namespaced() {
        metadata.namespace.clear();
    } else if metadata.namespace.is_empty() {
        default_namespace.clone_into(&mut metadata.namespace);
    }
    if settings.is_none() {
        report.namespace.clone_from(&metadata.namespace);
    }
    if metadata.name.is_empty() {
        return Read::Nothing;
    }
    let key = Key { kind, namespace: metadata.namespace.clone(), name: metadata.name.clone() };

    const ENVELOPE: &[&str] = &["apiVersion", "kind", "metadata", "status"];
    let empty = Node { place: node.place, value: Value::Map(vec![]) };
    let (de, base) = if let Some(settings) = settings {
        if let Some(message) = config_map::not_a_mapping(settings) {
            errors.push((config_map::path(FieldPath::key("spec")), message));
            return Read::Identified(key);
        }
        (NodeDe::new(settings), FieldPath::key("spec"))
    } else if kind.spec_at_top_level() {
        let envelope = if kind.has_status() { &ENVELOPE[..3] } else { ENVELOPE };
        (NodeDe::without(node, envelope), FieldPath::default())
    } else {
        for m in members {
            if m.key != "spec" && !ENVELOPE.contains(&m.key.as_str()) {
                errors.push((
                    FieldPath::key(&m.key),
                    format!("unknown field `{}`, expected one of apiVersion, kind, metadata, spec", m.key),
                ));
            }
        }
        (NodeDe::new(node.get("spec").unwrap_or(&empty)), FieldPath::key("spec"))
    };
    match Spec::deserialize(kind, de) {
        Ok(spec) => {
            let document = Document { api_version: report.api_version.clone(), kind, metadata, spec };
            Read::Typed(key, Box::new(document))
        }
        Err(e) => {
            let (path, _, message) = e.into_parts();
            errors.push((path.under(&base), message));
            Read::Identified(key)
        }
    }
}

fn unsupported(api_version: &str, kind: &str) -> String {
    let (group, version) = api_version.split_once('/').unwrap_or(("core", api_version));
    let same_name: Vec<_> = Kind::ALL.iter().filter(|k| k.name().eq_ignore_ascii_case(kind)).collect();
    if let Some(k) = same_name.iter().find(|k| k.group() == group) {
        if k.name() == kind {
            return format!(
                "unsupported version {version:?} of {kind}: supported are {}",
                k.versions().join(", ")
            );
        }
        return format!("unsupported kind {kind:?} of {api_version}, did you mean {:?}?", k.name());
    }
    if let Some(k) = same_name.first() {
        return format!("unsupported kind {kind:?} of {api_version}, did you mean {}?", k.api_version());
    }
    format!("unsupported kind {kind:?} of {api_version}")
}

/// Kinds that stand beside mesh configuration in ordinary manifests and are the platform's.
fn platform_kind(api_version: &str, kind: &str) -> bool {
    let group = api_version.split_once('/').map_or("", |(g, _)| g);
    match group {
        "apps"
        | "batch"
        | "autoscaling"
        | "policy"
        | "rbac.authorization.k8s.io"
        | "storage.k8s.io"
        | "apiextensions.k8s.io"
        | "admissionregistration.k8s.io"
        | "scheduling.k8s.io" => true,
        "networking.k8s.io" => kind == "NetworkPolicy",
        "" => matches!(
            kind,
            "ServiceAccount"
                | "ConfigMap"
                | "Endpoints"
                | "PersistentVolume"
                | "PersistentVolumeClaim"
                | "ReplicationController"
                | "LimitRange"
                | "ResourceQuota"
                | "PodTemplate"
        ),
        _ => false,
    }
}

/// Reads `apiVersion`, `kind`, namespace and name line by line from text that is not YAML, so that
/// a document with a syntax error still has a name and keeps its last good version.
fn guess_identity(text: &str, default_namespace: &str) -> Option<(String, String, String, String)> {
    let value = |line: &str, field: &str| -> Option<String> {
        let v = line.trim_start().strip_prefix(field)?.strip_prefix(':')?;
        let v = v.split(" #").next()?.trim().trim_matches(['"', '\'']);
        (!v.is_empty() && v.len() <= 253).then(|| v.to_owned())
    };
    let (mut api, mut kind, mut name, mut namespace) = (None, None, None, None);
    let mut in_metadata = false;
    for l in lines(text).take(10_000) {
        if !l.starts_with([' ', '\t', '#', '-']) && !l.trim().is_empty() {
            in_metadata = l.starts_with("metadata:");
            api = api.or_else(|| value(l, "apiVersion"));
            kind = kind.or_else(|| value(l, "kind"));
        } else if in_metadata {
            name = name.or_else(|| value(l, "name"));
            namespace = namespace.or_else(|| value(l, "namespace"));
        }
    }
    let (api, kind) = (api?, kind?);
    let namespaced = Kind::resolve(&api, &kind).is_none_or(Kind::namespaced);
    let namespace =
        if namespaced { namespace.unwrap_or_else(|| default_namespace.to_owned()) } else { String::new() };
    Some((api, kind, namespace, name?))
}

#[cfg(test)]
mod tests;
