//! `flotilla analyze`: what is valid and yet wrong, told with the codes that Istio has for it.
//!
//! A check sees all documents at once, also those that belong to the platform (Deployments, Pods). What cannot be
//! known from the documents is not guessed:
//! - selectors that match nothing are told only if workloads of a platform (Pods, Deployments and the like) are
//!   among the documents, since gateways and workloads of machines need no document;
//! - names of peer clusters (`*.clusterset.local`, `*.global`) may exist there.
//!
//! The codes, and which of Istio's have no meaning here, are in [`catalogue`].

mod catalogue;
mod checks;
mod hosts;
mod suppress;
mod world;

use std::{collections::BTreeSet, io, path::PathBuf, sync::Arc};

use serde::Serialize;

pub(crate) use self::world::strings;
pub use self::{
    catalogue::{Code, Standing, catalogue},
    suppress::Suppression,
};
use self::{checks::Findings, world::World};
use crate::{
    check::read_files,
    document::{Parsed, parse_file},
    store::SourceFile,
};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Level {
    /// Good to know.
    Info,
    /// Probably not what was meant.
    Warning,
    /// Does not do what it says.
    Error,
}

impl Level {
    /// As it is shown.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "Info",
            Self::Warning => "Warning",
            Self::Error => "Error",
        }
    }
}

/// Where a finding's document stands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Reference {
    /// File as it was given; `-` is standard input.
    pub file: String,
    /// Counted from 1; 0 is the file as a whole.
    pub line: u32,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Such as `IST0101`.
    pub code: &'static str,
    /// Such as `ReferencedResourceNotFound`.
    pub name: &'static str,
    /// How bad it is.
    pub level: Level,
    /// Kind and name of the document: `VirtualService books/reviews`.
    pub origin: String,
    /// Namespace; empty for kinds without, its own name for a Namespace.
    pub namespace: String,
    /// What is wrong and what to do.
    pub message: String,
    /// Where.
    pub reference: Reference,
}

/// What is analysed, and what is not told.
#[derive(Debug, Clone, Default)]
pub struct AnalyzeOptions {
    /// Only documents of this namespace, and of none.
    pub namespace: Option<String>,
    /// Not these.
    pub suppressions: Vec<Suppression>,
    /// Hosts that exist although no document says so, fully qualified.
    pub known_hosts: BTreeSet<String>,
}

/// Findings, worst first, and whether all files could be read.
#[derive(Debug)]
pub struct AnalysisReport {
    /// Findings.
    pub messages: Vec<Message>,
    /// Why files could not be read, by file.
    pub unreadable: Vec<(String, String)>,
    /// How many documents were looked at.
    pub documents: usize,
}

impl AnalysisReport {
    /// 0: nothing at or above the threshold; 1: something; 2: some file could not be read.
    #[must_use]
    pub fn exit_code(&self, threshold: Level) -> u8 {
        if !self.unreadable.is_empty() {
            return 2;
        }
        u8::from(self.messages.iter().any(|m| m.level >= threshold))
    }
}

/// Analyses files and directories; the path `-` is `stdin`.
#[must_use]
pub fn analyze_files(
    paths: &[PathBuf],
    stdin: &mut dyn io::Read,
    options: &AnalyzeOptions,
) -> AnalysisReport {
    let files = read_files(paths, stdin);
    let mut unreadable = Vec::new();
    let mut parsed = Vec::new();
    for SourceFile { path, content, .. } in &files {
        match content {
            Ok(bytes) => parsed.push(Arc::new(parse_file(path, bytes, crate::DEFAULT_NAMESPACE))),
            Err(reason) => unreadable.push((path.clone(), reason.clone())),
        }
    }
    let documents = parsed.iter().map(|p| p.len()).sum();
    AnalysisReport { messages: analyze(&parsed, options), unreadable, documents }
}

/// Analyses documents that are parsed already, by file.
pub(crate) fn analyze(files: &[Arc<Vec<Parsed>>], options: &AnalyzeOptions) -> Vec<Message> {
    let world = World::new(files.iter().flat_map(|f| f.iter()), &options.known_hosts);
    let mut out = Findings::default();
    checks::all(&world, &mut out);
    let mut messages: Vec<Message> = out
        .into_inner()
        .into_iter()
        .filter(|(r, m)| {
            let other =
                options.namespace.as_ref().is_some_and(|ns| !m.namespace.is_empty() && m.namespace != *ns);
            !other && !suppress::suppressed(&r.annotations, m, &options.suppressions)
        })
        .map(|(_, m)| m)
        .collect();
    messages.sort_by(|a, b| {
        let key = |m: &Message| (m.code, m.origin.clone(), m.reference.clone(), m.message.clone());
        b.level.cmp(&a.level).then_with(|| key(a).cmp(&key(b)))
    });
    messages.dedup();
    messages
}

#[cfg(test)]
mod tests;
