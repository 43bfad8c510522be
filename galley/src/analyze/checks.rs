//! The checks. Each is a function of the world; none knows of another.

mod annotations;
mod destination_rule;
mod envoy_filter;
mod gateway;
mod ingress;
mod schema;
mod selectors;
mod service_entry;
mod virtual_service;
mod workloads;

use super::{
    Message, Reference,
    catalogue::find,
    world::{Resource, World},
};
use crate::path::FieldPath;

/// What checks say.
#[derive(Debug, Default)]
pub(super) struct Findings<'w, 'a> {
    list: Vec<(&'w Resource<'a>, Message)>,
}

impl<'w, 'a> Findings<'w, 'a> {
    /// More than anybody reads, and a bound on memory.
    const LIMIT: usize = 10_000;

    /// A finding about a field.
    fn add(&mut self, code: &'static str, r: &'w Resource<'a>, path: FieldPath, message: impl Into<String>) {
        // Kept, so that it is not made again for the next.
        r.tree();
        let line = r.parsed.places.finding(path, String::new()).line;
        self.at_line(code, r, line, message.into());
    }

    fn at_line(&mut self, code: &'static str, r: &'w Resource<'a>, line: u32, message: String) {
        let Some(c) = find(code) else {
            debug_assert!(false, "no such code: {code}");
            return;
        };
        if self.list.len() >= Self::LIMIT {
            return;
        }
        let namespace = if r.kind == "Namespace" { r.name.to_owned() } else { r.namespace.clone() };
        let message = Message {
            code: c.code,
            name: c.name,
            level: c.level,
            origin: r.parsed.report.subject_in(&r.namespace),
            namespace,
            message,
            reference: Reference { file: r.parsed.report.file.clone(), line },
        };
        self.list.push((r, message));
    }

    pub(super) fn into_inner(self) -> Vec<(&'w Resource<'a>, Message)> {
        self.list
    }
}

/// Where a document's name stands.
fn named() -> FieldPath {
    FieldPath::of("metadata.name")
}

pub(super) fn all<'w, 'a>(world: &'w World<'a>, out: &mut Findings<'w, 'a>) {
    schema::check(world, out);
    annotations::check(world, out);
    workloads::check(world, out);
    virtual_service::check(world, out);
    gateway::check(world, out);
    ingress::check(world, out);
    destination_rule::check(world, out);
    service_entry::check(world, out);
    selectors::check(world, out);
    envoy_filter::check(world, out);
}
