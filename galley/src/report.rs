//! What is said about a document: errors and warnings with their places.

use std::{borrow::Borrow, fmt::Write as _};

use mesh_model::authored::resource_name;
use serde::Serialize;

/// One error or warning.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Finding {
    /// Field, such as `spec.http[0].route[1].weight`; empty for the document as a whole.
    pub path: String,
    /// Line in the file, counted from 1; 0 is unknown.
    pub line: u32,
    /// What is wrong and, where that is known, what would be right.
    pub message: String,
}

/// The verdict on one document. Its JSON form is the output of `flotilla validate -o json`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DocumentReport {
    /// Path of the file as it was given; `-` is standard input.
    pub file: String,
    /// Which document of the file, counted from 1; 0 is the file as a whole.
    pub document: usize,
    /// As written; empty if it could not be read.
    pub api_version: String,
    /// As written; empty if it could not be read.
    pub kind: String,
    /// Namespace; empty for kinds without.
    pub namespace: String,
    /// Name; empty if it could not be read.
    pub name: String,
    /// Whether there are no errors.
    pub valid: bool,
    /// Why it is rejected.
    pub errors: Vec<Finding>,
    /// What its author should know.
    pub warnings: Vec<Finding>,
}

impl DocumentReport {
    /// A report about a file that could not be read at all.
    #[must_use]
    pub(crate) fn unreadable(file: &str, message: String) -> Self {
        Self {
            file: file.to_owned(),
            document: 0,
            api_version: String::new(),
            kind: String::new(),
            namespace: String::new(),
            name: String::new(),
            valid: false,
            errors: vec![Finding { path: String::new(), line: 0, message }],
            warnings: vec![],
        }
    }

    pub(crate) fn reject(&mut self, path: String, line: u32, message: String) {
        self.valid = false;
        self.errors.push(Finding { path, line, message });
    }

    /// The document by kind and name, or by its number when it has none.
    #[must_use]
    pub fn subject(&self) -> String {
        self.subject_in(&self.namespace)
    }

    /// As [`DocumentReport::subject`], for a document that is in this namespace.
    pub(crate) fn subject_in(&self, namespace: &str) -> String {
        if self.document == 0 {
            return "file".into();
        }
        if self.kind.is_empty() || self.name.is_empty() {
            return format!("document {}", self.document);
        }
        format!("{} {}", self.kind, resource_name(namespace, &self.name))
    }
}

/// The reports as text for people: one line per document, its findings below.
#[must_use]
pub fn render_text<R: Borrow<DocumentReport>>(reports: &[R]) -> String {
    let mut out = String::new();
    let reports: Vec<&DocumentReport> = reports.iter().map(Borrow::borrow).collect();
    for r in &reports {
        let verdict = if r.valid { "valid" } else { "INVALID" };
        let _ = writeln!(out, "{}: {}: {verdict}", r.file, r.subject());
        for (label, findings) in [("error", &r.errors), ("warning", &r.warnings)] {
            for f in findings {
                let place = if f.line == 0 { String::new() } else { format!("{}:{}: ", r.file, f.line) };
                let path = if f.path.is_empty() { String::new() } else { format!("{}: ", f.path) };
                let _ = writeln!(out, "  {label}: {place}{path}{}", f.message);
            }
        }
    }
    let invalid = reports.iter().filter(|r| !r.valid).count();
    let warnings: usize = reports.iter().map(|r| r.warnings.len()).sum();
    let _ = writeln!(out, "{} documents, {invalid} invalid, {warnings} warnings", reports.len());
    out
}
