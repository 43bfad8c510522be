//! The configuration that applies, as a pure function of files seen so far.
//!
//! Rules, in this order:
//! 1. A document that is invalid on its own, or a second document of the same kind, namespace and
//!    name (files in the order of their paths, first wins), does not apply.
//! 2. If an earlier version of it applied, that version stays: **last good**. This also holds for
//!    documents that a file no longer shows because part of it cannot be read, or the file as a whole.
//! 3. A valid document that the analysis refuses (unknown host) is withheld, with its last good
//!    version in place; it applies as soon as the host appears.
//! 4. A document that is gone from its file is gone.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use mesh_model::authored::{Document, Spec};

use crate::{
    analysis::Index,
    document::{Key, Parsed, parse_file},
    report::DocumentReport,
};

/// What a source read: path and content, or why it could not be read.
#[derive(Debug, Clone)]
pub(crate) struct SourceFile {
    pub path: String,
    pub content: Result<Arc<Vec<u8>>, String>,
    /// Seconds since the epoch of its last change.
    pub modified: u64,
}

/// A document that applies.
#[derive(Debug, Clone)]
struct Applied {
    document: Document,
    /// File that it came from.
    file: String,
    /// When galley first saw the document, unless it says itself when it was created.
    created: u64,
}

/// What is known of hosts that the files do not define.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hosts<'a> {
    /// These exist, imported from peers, and no others.
    Known(&'a BTreeSet<String>),
    /// Nothing: a reference to a host that the files do not define is only a warning.
    Unknown,
}

/// State between readings.
#[derive(Debug)]
pub(crate) struct Store {
    default_namespace: String,
    applied: BTreeMap<Key, Applied>,
    /// Parsed files by path, kept while their content is the same.
    parsed: HashMap<String, (Arc<Vec<u8>>, Arc<Vec<Parsed>>)>,
    /// First sight of every document that exists, also of ones that do not apply.
    seen: HashMap<Key, u64>,
}

/// What was parsed of each file.
pub(crate) type ParsedFiles = Vec<Arc<Vec<Parsed>>>;

/// Result of a reading.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    /// Everything that applies.
    pub documents: BTreeMap<Key, Document>,
    /// The verdict on every document, in the order of files.
    pub reports: Vec<DocumentReport>,
    /// Documents that apply in an earlier version than their file has.
    pub stale: BTreeSet<Key>,
    /// Everything that was read, for the analysis.
    pub parsed: ParsedFiles,
}

impl Store {
    pub(crate) fn new(default_namespace: &str) -> Self {
        Self {
            default_namespace: default_namespace.to_owned(),
            applied: BTreeMap::new(),
            parsed: HashMap::new(),
            seen: HashMap::new(),
        }
    }

    /// Takes a complete reading of the sources.
    pub(crate) fn update(&mut self, files: &[SourceFile], hosts: Hosts<'_>) -> Outcome {
        let (withhold, extra_hosts) = match hosts {
            Hosts::Known(extra) => (true, extra.clone()),
            Hosts::Unknown => (false, BTreeSet::new()),
        };
        let mut files: Vec<&SourceFile> = files.iter().collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut parsed: Vec<(&SourceFile, Arc<Vec<Parsed>>)> = Vec::with_capacity(files.len());
        let mut cache = HashMap::with_capacity(files.len());
        // Files part of which nobody can name: what they provided before stays.
        let mut unclear = BTreeSet::new();
        let mut reports = Vec::new();
        for f in files {
            match &f.content {
                Err(reason) => {
                    unclear.insert(f.path.clone());
                    reports.push(DocumentReport::unreadable(&f.path, reason.clone()));
                }
                Ok(bytes) => {
                    let documents = match self.parsed.remove(&f.path) {
                        Some((old, documents)) if old == *bytes => documents,
                        _ => Arc::new(parse_file(&f.path, bytes, &self.default_namespace)),
                    };
                    if documents.iter().any(|d| !d.report.valid && d.key.is_none()) {
                        unclear.insert(f.path.clone());
                    }
                    cache.insert(f.path.clone(), (bytes.clone(), documents.clone()));
                    parsed.push((f, documents));
                }
            }
        }
        self.parsed = cache;

        // Duplicates: the first place wins, valid or not, so that which one applies never depends on
        // what was edited last.
        let mut owner: BTreeMap<Key, (usize, usize)> = BTreeMap::new();
        let mut slots: Vec<Vec<DocumentReport>> = Vec::with_capacity(parsed.len());
        for (i, (_, documents)) in parsed.iter().enumerate() {
            let mut of_file = Vec::with_capacity(documents.len());
            for (j, d) in documents.iter().enumerate() {
                let mut report = d.report.clone();
                if let Some(key) = &d.key {
                    if let Some((fi, di)) = owner.get(key) {
                        let (file, first) = (&parsed[*fi].0.path, &parsed[*fi].1[*di].report);
                        let message =
                            format!("duplicate of {key}, which {file} has as document {}", first.document);
                        let f = d.places.finding(crate::path::FieldPath::key("metadata"), message);
                        report.reject(f.path, f.line, f.message);
                    } else {
                        owner.insert(key.clone(), (i, j));
                    }
                }
                of_file.push(report);
            }
            slots.push(of_file);
        }

        // What each key would be if the analysis agreed: its new version, or its last good one.
        let valid: BTreeMap<&Key, &Document> =
            owner.iter().filter_map(|(k, (i, j))| Some((k, parsed[*i].1[*j].document.as_ref()?))).collect();
        // A directory that cannot be read hides everything below it.
        let hidden = |file: &str| {
            std::path::Path::new(file).ancestors().any(|a| a.to_str().is_some_and(|a| unclear.contains(a)))
        };
        let kept = |key: &Key| -> Option<&Applied> {
            let old = self.applied.get(key)?;
            let named = owner.contains_key(key);
            (named || hidden(&old.file)).then_some(old)
        };
        let candidates = valid.values().copied().chain(
            self.applied.keys().filter(|k| !valid.contains_key(k)).filter_map(|k| Some(&kept(k)?.document)),
        );
        let index = Index::new(candidates, &extra_hosts);

        let mut next = BTreeMap::new();
        let mut stale = BTreeSet::new();
        let mut seen = HashMap::with_capacity(owner.len());
        for (key, (i, j)) in &owner {
            let (file, documents) = &parsed[*i];
            let first_seen = self.seen.get(key).copied().unwrap_or(file.modified);
            seen.insert(key.clone(), first_seen);
            let report = &mut slots[*i][*j];
            let d = &documents[*j];
            let mut refused = d.document.is_none();
            if let Some(document) = &d.document {
                let analysis = index.check(key, &document.spec);
                let serving = self.applied.get(key).is_some_and(|old| old.document.spec == document.spec);
                refused = withhold && !analysis.errors.is_empty() && !serving;
                for (path, message) in analysis.errors {
                    let mut f = d.places.finding(path, message);
                    if refused {
                        report.reject(f.path, f.line, f.message);
                    } else {
                        if serving {
                            f.message.push_str("; the document served before and stays");
                        }
                        report.warnings.push(f);
                    }
                }
                for (path, message) in analysis.warnings {
                    report.warnings.push(d.places.finding(path, message));
                }
                if !refused {
                    let mut document = document.clone();
                    let created = &mut document.metadata.creation_timestamp;
                    if *created == 0 {
                        *created = first_seen;
                    }
                    let created = *created;
                    next.insert(key.clone(), Applied { document, file: file.path.clone(), created });
                }
            }
            if refused && let Some(old) = self.applied.get(key) {
                stale.insert(key.clone());
                next.insert(key.clone(), Applied { file: file.path.clone(), ..old.clone() });
            }
        }
        for (key, old) in &self.applied {
            if !owner.contains_key(key) && hidden(&old.file) {
                stale.insert(key.clone());
                seen.insert(key.clone(), old.created);
                next.insert(key.clone(), old.clone());
            }
        }
        self.applied = next;
        self.seen = seen;
        reports.extend(slots.into_iter().flatten());
        reports.sort_by(|a, b| (&a.file, a.document).cmp(&(&b.file, b.document)));
        let documents = self.applied.iter().map(|(k, a)| (k.clone(), a.document.clone())).collect();
        let parsed = parsed.iter().map(|(_, p)| p.clone()).collect();
        Outcome { documents, reports, stale, parsed }
    }
}

/// The JSON of a document's specification as far as it may be shown to people.
pub(crate) fn shown(spec: &Spec) -> serde_json::Value {
    match spec {
        Spec::Secret(s) => Spec::Secret(Arc::new(s.redacted())).to_json(),
        other => other.to_json(),
    }
}

#[cfg(test)]
mod tests;
