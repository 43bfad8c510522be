//! Galley: the only reader of what users author.
//!
//! Directories of YAML and JSON are read, parsed, validated and analysed; what applies is published
//! as an immutable snapshot and served to the other components as documents over xDS
//! (`mesh_xds::mcp`). A bad document rejects itself alone, by name, with file, line and field; the
//! rest applies, and its own last good version keeps serving. See [`validate_files`] for the same
//! verdicts without a running galley.
//!
//! Invariants:
//! - Other components never see a document that was not validated.
//! - The configuration is a function of the files and of what applied before, never of the order in
//!   which notifications came.
//! - Values of secrets appear in no log, report or dump.

mod analysis;
mod analyze;
mod check;
mod de;
pub mod debug;
mod document;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod galley;
mod metrics;
mod node;
mod path;
mod report;
mod source;
mod store;
mod template;
mod validate;

pub use self::{
    analyze::{
        AnalysisReport, AnalyzeOptions, Code, Level, Message, Reference, Standing, Suppression,
        analyze_files, catalogue,
    },
    check::{Loaded, Validation, load_files, validate_files},
    document::Key,
    galley::{Configuration, Galley, GalleyHandle, GalleyOptions, Listen, StartError, Status},
    report::{DocumentReport, Finding, render_text},
    template::PodTemplate,
};

/// Namespace of documents that name none.
pub const DEFAULT_NAMESPACE: &str = "default";
