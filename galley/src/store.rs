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
//!
//! A reading is compared with the one before. Files that changed are usually few and of nobody else's concern: then only
//! their documents are looked at, and those that refer to hosts, subsets or gateways that came or went with them
//! ([`Store::some`]). Duplicates and files that cannot be read concern others; then everything is ([`Store::all`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use mesh_model::authored::{Document, Kind, Spec};

use crate::{
    analysis::Index,
    document::{Key, Parsed, Tree, parse_file},
    path::FieldPath,
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
    /// With the time at which galley first saw it, unless it says itself when it was created.
    document: Arc<Document>,
    /// As it stands in the file.
    written: Arc<Document>,
    /// File that it came from.
    file: String,
}

/// What is known of hosts that the files do not define.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hosts<'a> {
    /// These exist, imported from peers, and no others.
    Known(&'a BTreeSet<String>),
    /// Nothing: a reference to a host that the files do not define is only a warning.
    Unknown,
}

/// A file as it was read last.
#[derive(Debug)]
struct File {
    content: Result<Arc<Vec<u8>>, String>,
    modified: u64,
    parsed: Arc<Vec<Parsed>>,
    /// The verdict on each document, or on the file.
    reports: Vec<Arc<DocumentReport>>,
}

impl File {
    /// Whether it has documents that nobody can name: what they provided before stays.
    fn is_unclear(&self) -> bool {
        self.content.is_err() || self.parsed.iter().any(|d| !d.report.valid && d.key.is_none())
    }

    fn keys(&self) -> impl Iterator<Item = &Key> {
        self.parsed.iter().filter_map(|d| d.key.as_ref())
    }
}

/// State between readings.
#[derive(Debug)]
pub(crate) struct Store {
    default_namespace: String,
    /// By path.
    files: BTreeMap<String, File>,
    /// Where each document stands: the first place by path and position.
    owner: HashMap<Key, (String, usize)>,
    /// What stands in several places.
    contested: BTreeSet<Key>,
    /// Files, and directories, part of which nobody can name.
    unclear: BTreeSet<String>,
    index: Index,
    /// Hosts of others; `None` if nothing is known of them, or nothing was read yet.
    hosts: Option<BTreeSet<String>>,
    applied: BTreeMap<Key, Applied>,
    /// Documents that apply in an earlier version than their file has.
    stale: BTreeSet<Key>,
    /// First sight of every document that exists, also of ones that do not apply.
    seen: HashMap<Key, u64>,
}

/// What was parsed of each file.
pub(crate) type ParsedFiles = Vec<Arc<Vec<Parsed>>>;

/// What a reading changed of what applies.
#[derive(Debug)]
pub(crate) enum Change {
    /// Nothing was read that had not been read before.
    Nothing,
    /// These documents, or (with `None`) that they apply.
    Some(Vec<(Key, Option<Arc<Document>>)>),
    /// Anything.
    All,
}

/// What becomes of a document.
struct Verdict {
    report: Arc<DocumentReport>,
    applies: Option<Applied>,
    stale: bool,
}

impl Store {
    pub(crate) fn new(default_namespace: &str) -> Self {
        Self {
            default_namespace: default_namespace.to_owned(),
            files: BTreeMap::new(),
            owner: HashMap::new(),
            contested: BTreeSet::new(),
            unclear: BTreeSet::new(),
            index: Index::default(),
            hosts: None,
            applied: BTreeMap::new(),
            stale: BTreeSet::new(),
            seen: HashMap::new(),
        }
    }

    /// Everything that applies.
    pub(crate) fn documents(&self) -> impl ExactSizeIterator<Item = (&Key, &Arc<Document>)> {
        self.applied.iter().map(|(k, a)| (k, &a.document))
    }

    /// The verdict on every document, in the order of files.
    pub(crate) fn reports(&self) -> impl Iterator<Item = &Arc<DocumentReport>> {
        self.files.values().flat_map(|f| &f.reports)
    }

    /// Documents that apply in an earlier version than their file has.
    pub(crate) fn stale(&self) -> &BTreeSet<Key> {
        &self.stale
    }

    /// Everything that was read, for the analysis.
    pub(crate) fn parsed(&self) -> ParsedFiles {
        self.files.values().filter(|f| f.content.is_ok()).map(|f| Arc::clone(&f.parsed)).collect()
    }

    /// Takes a complete reading of the sources.
    pub(crate) fn update(&mut self, files: &[SourceFile], hosts: Hosts<'_>) -> Change {
        let hosts = match hosts {
            Hosts::Known(extra) => Some(extra),
            Hosts::Unknown => None,
        };
        let same_hosts = self.hosts.as_ref() == hosts;
        let news: Vec<&SourceFile> = files
            .iter()
            .filter(|f| self.files.get(&f.path).is_none_or(|old| old.content != f.content))
            .collect();
        let gone: Vec<String> = if files.len() - news.len() == self.files.len() {
            vec![]
        } else {
            let there: BTreeSet<&str> = files.iter().map(|f| f.path.as_str()).collect();
            self.files.keys().filter(|p| !there.contains(p.as_str())).cloned().collect()
        };
        if same_hosts && news.is_empty() && gone.is_empty() {
            return Change::Nothing;
        }
        let fresh: Vec<(String, File)> = news.into_iter().map(|f| (f.path.clone(), self.parse(f))).collect();
        if same_hosts && self.is_of_no_other_concern(&fresh, &gone) {
            return Change::Some(self.some(fresh, gone));
        }
        self.hosts = hosts.cloned();
        for path in gone {
            self.files.remove(&path);
        }
        self.files.extend(fresh);
        self.all();
        Change::All
    }

    fn parse(&self, f: &SourceFile) -> File {
        let (parsed, reports) = match &f.content {
            Ok(bytes) => (parse_file(&f.path, bytes, &self.default_namespace), vec![]),
            Err(reason) => (vec![], vec![Arc::new(DocumentReport::unreadable(&f.path, reason.clone()))]),
        };
        File { content: f.content.clone(), modified: f.modified, parsed: Arc::new(parsed), reports }
    }

    /// Whether a file is, or is below, something that nobody can read.
    fn hides(&self, file: &str) -> bool {
        let unclear = |p: &std::path::Path| p.to_str().is_some_and(|p| self.unclear.contains(p));
        !self.unclear.is_empty() && std::path::Path::new(file).ancestors().any(unclear)
    }

    /// Whether changed files say everything about their documents, and no other file says anything about them.
    fn is_of_no_other_concern(&self, fresh: &[(String, File)], gone: &[String]) -> bool {
        let mut named: BTreeSet<&Key> = BTreeSet::new();
        for (path, f) in fresh {
            for key in f.keys() {
                // A document that another file has, or had until now, or that stands here twice.
                let of_another = self.owner.get(key).is_some_and(|(p, _)| p != path);
                if of_another || !named.insert(key) {
                    return false;
                }
            }
        }
        let paths = || fresh.iter().map(|(p, _)| p).chain(gone);
        let now = fresh.iter().map(|(_, f)| f);
        let mut all = paths().filter_map(|p| self.files.get(p)).chain(now);
        all.all(|f| !f.is_unclear() && !f.keys().any(|k| self.contested.contains(k)))
            && !paths().any(|p| self.hides(p))
    }

    /// Looks at the documents of some files, and at what refers to what changed in them.
    fn some(&mut self, fresh: Vec<(String, File)>, gone: Vec<String>) -> Vec<(Key, Option<Arc<Document>>)> {
        let mut removed: BTreeSet<Key> = BTreeSet::new();
        let mut before: Vec<Arc<Document>> = Vec::new();
        for path in fresh.iter().map(|(p, _)| p).chain(&gone) {
            let Some(old) = self.files.remove(path) else { continue };
            for d in old.parsed.iter() {
                let Some(key) = &d.key else { continue };
                before.extend(self.candidate(key, d));
                removed.insert(key.clone());
                self.owner.remove(key);
            }
        }
        let mut look: Vec<(String, usize)> = Vec::new();
        let mut after: Vec<Arc<Document>> = Vec::new();
        for (path, f) in fresh {
            for (j, d) in f.parsed.iter().enumerate() {
                let Some(key) = &d.key else { continue };
                after.extend(self.candidate(key, d));
                removed.remove(key);
                self.owner.insert(key.clone(), (path.clone(), j));
                look.push((path.clone(), j));
            }
            let reports = f.parsed.iter().map(|d| Arc::clone(&d.report)).collect();
            self.files.insert(path, File { reports, ..f });
        }
        if self.index.replace(before.iter().map(|d| &**d), after.iter().map(|d| &**d)) {
            let known: BTreeSet<(String, usize)> = look.iter().cloned().collect();
            let refers = |k: &Key| {
                matches!(k.kind, Kind::VirtualService | Kind::DestinationRule | Kind::ServiceExport)
            };
            let others = self.owner.iter().filter(|(k, at)| refers(k) && !known.contains(*at));
            look.extend(others.map(|(_, at)| at.clone()));
        }
        let mut held = Vec::new();
        let mut changes = Vec::new();
        for key in removed {
            self.seen.remove(&key);
            self.stale.remove(&key);
            if self.applied.remove(&key).is_some() {
                changes.push((key, None));
            }
        }
        for (path, j) in look {
            let Some(key) = self.files.get(&path).and_then(|f| f.parsed.get(j)?.key.clone()) else {
                continue;
            };
            let Some(verdict) = self.judge(&key, &path, j, &mut held) else { continue };
            if verdict.stale {
                self.stale.insert(key.clone());
            } else {
                self.stale.remove(&key);
            }
            match verdict.applies {
                Some(a) => {
                    let document = Arc::clone(&a.document);
                    let old = self.applied.insert(key.clone(), a);
                    if old.is_none_or(|old| !Arc::ptr_eq(&old.document, &document)) {
                        changes.push((key, Some(document)));
                    }
                }
                None if self.applied.remove(&key).is_some() => changes.push((key, None)),
                None => {}
            }
            self.report(&path, j, verdict.report);
        }
        changes
    }

    /// What a document is to those that refer to it, if the analysis agrees: its new version, or its last good one.
    fn candidate(&self, key: &Key, d: &Parsed) -> Option<Arc<Document>> {
        d.document.clone().or_else(|| Some(Arc::clone(&self.applied.get(key)?.document)))
    }

    /// Replaces the verdict on a document, if it is another one.
    fn report(&mut self, path: &str, j: usize, report: Arc<DocumentReport>) {
        if let Some(slot) = self.files.get_mut(path).and_then(|f| f.reports.get_mut(j))
            && *slot != report
        {
            *slot = report;
        }
    }

    /// Decides about the document that is in this place. Trees of what has findings are `held` until everything is judged:
    /// the items of a list share one.
    fn judge(&mut self, key: &Key, path: &str, j: usize, held: &mut Vec<Tree>) -> Option<Verdict> {
        let file = self.files.get(path)?;
        let d = file.parsed.get(j)?;
        let first_seen = *self.seen.entry(key.clone()).or_insert(file.modified);
        let old = self.applied.get(key);
        let kept = || old.map(|old| Applied { file: path.to_owned(), ..old.clone() });
        let Some(written) = &d.document else {
            return Some(Verdict { report: Arc::clone(&d.report), applies: kept(), stale: old.is_some() });
        };
        let analysis = self.index.check(key, &written.spec);
        let serving =
            old.is_some_and(|old| Arc::ptr_eq(&old.written, written) || old.document.spec == written.spec);
        let refused = self.hosts.is_some() && !analysis.errors.is_empty() && !serving;
        let mut report = Arc::clone(&d.report);
        if !analysis.errors.is_empty() || !analysis.warnings.is_empty() {
            let report = Arc::make_mut(&mut report);
            held.extend(d.places.tree());
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
            report.warnings.extend(analysis.warnings.into_iter().map(|(p, m)| d.places.finding(p, m)));
        }
        if refused {
            return Some(Verdict { report, applies: kept(), stale: old.is_some() });
        }
        let document = match old {
            Some(old) if Arc::ptr_eq(&old.written, written) => Arc::clone(&old.document),
            _ => match written.metadata.creation_timestamp {
                0 if first_seen != 0 => {
                    let mut document = (**written).clone();
                    document.metadata.creation_timestamp = first_seen;
                    Arc::new(document)
                }
                _ => Arc::clone(written),
            },
        };
        let applies = Some(Applied { document, written: Arc::clone(written), file: path.to_owned() });
        Some(Verdict { report, applies, stale: false })
    }

    /// Looks at everything.
    fn all(&mut self) {
        self.unclear = self.files.iter().filter(|(_, f)| f.is_unclear()).map(|(p, _)| p.clone()).collect();
        // Duplicates: the first place wins, valid or not, so that which one applies never depends on
        // what was edited last.
        let mut owner: HashMap<Key, (String, usize)> = HashMap::new();
        let mut contested = BTreeSet::new();
        let mut held = Vec::new();
        let mut verdicts: BTreeMap<String, Vec<Arc<DocumentReport>>> = BTreeMap::new();
        for (path, f) in self.files.iter().filter(|(_, f)| f.content.is_ok()) {
            let mut of_file = Vec::with_capacity(f.parsed.len());
            for (j, d) in f.parsed.iter().enumerate() {
                let mut report = Arc::clone(&d.report);
                if let Some(key) = &d.key {
                    if let Some((first, at)) = owner.get(key) {
                        let number = self.files.get(first).and_then(|f| f.parsed.get(*at));
                        let number = number.map_or(0, |d| d.report.document);
                        let message = format!("duplicate of {key}, which {first} has as document {number}");
                        held.extend(d.places.tree());
                        let f = d.places.finding(FieldPath::key("metadata"), message);
                        Arc::make_mut(&mut report).reject(f.path, f.line, f.message);
                        contested.insert(key.clone());
                    } else {
                        owner.insert(key.clone(), (path.clone(), j));
                    }
                }
                of_file.push(report);
            }
            verdicts.insert(path.clone(), of_file);
        }
        for (path, reports) in verdicts {
            if let Some(f) = self.files.get_mut(&path) {
                f.reports = reports;
            }
        }
        (self.owner, self.contested) = (owner, contested);

        // What nobody names any more, and is not hidden, is gone.
        let hidden: BTreeSet<Key> = {
            let unnamed = self.applied.iter().filter(|(k, _)| !self.owner.contains_key(*k));
            unnamed.filter(|(_, a)| self.hides(&a.file)).map(|(k, _)| k.clone()).collect()
        };
        let there = |k: &Key| self.owner.contains_key(k) || hidden.contains(k);
        self.applied.retain(|k, _| there(k));
        self.seen.retain(|k, _| there(k));
        self.stale = hidden.clone();
        let mut index = Index::of_hosts(self.hosts.iter().flatten());
        let candidates = self
            .owner
            .iter()
            .filter_map(|(k, (path, j))| self.candidate(k, self.files.get(path)?.parsed.get(*j)?));
        let kept = hidden.iter().filter_map(|k| Some(Arc::clone(&self.applied.get(k)?.document)));
        for d in candidates.chain(kept) {
            index.add(&d);
        }
        self.index = index;

        let places: Vec<(Key, (String, usize))> =
            self.owner.iter().map(|(k, at)| (k.clone(), at.clone())).collect();
        for (key, (path, j)) in places {
            let Some(verdict) = self.judge(&key, &path, j, &mut held) else { continue };
            if verdict.stale {
                self.stale.insert(key.clone());
            }
            match verdict.applies {
                Some(a) => drop(self.applied.insert(key, a)),
                None => drop(self.applied.remove(&key)),
            }
            self.report(&path, j, verdict.report);
        }
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
