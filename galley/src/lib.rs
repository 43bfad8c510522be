//! galley
mod de;
mod document;
mod node;
mod path;
mod report;
mod validate;
