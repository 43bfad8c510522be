//! Services of the platform that are made of what they were made of before.
//!
//! Most changes are about one service, and making the endpoints of all others again would cost as much as the mesh is
//! large. So what a service was made of is kept with it: documents that did not change are the same in memory.

use std::{collections::HashMap, sync::Arc};

use mesh_model::{
    authored::{EndpointSlice, Service, WorkloadEntry},
    federation::ImportedService,
};

use super::{Entry, Local};
use crate::config::{Doc, Problem};

/// Services by host, with what they were made of and for.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    pub(super) local: Option<Local>,
    pub(super) made: HashMap<String, Arc<Made>>,
}

/// A service as it was made, before an address was assigned to it.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) of: Ingredients<Doc<Service>, Doc<WorkloadEntry>, Doc<EndpointSlice>>,
    pub(super) entry: Arc<Entry>,
    pub(super) problems: Vec<Problem>,
}

/// What a service is made of.
#[derive(Debug)]
pub(super) struct Ingredients<S, W, E> {
    pub(super) service: S,
    /// Those that it selects, or that its slices name; `None` for an endpoint without one.
    pub(super) workloads: Vec<Option<W>>,
    pub(super) slices: Vec<E>,
    pub(super) exported: bool,
    /// With whether the peer is of another trust domain.
    pub(super) imports: Vec<(Arc<ImportedService>, bool)>,
}

/// The same before anybody keeps it.
pub(super) type Borrowed<'a> = Ingredients<&'a Doc<Service>, &'a Doc<WorkloadEntry>, &'a Doc<EndpointSlice>>;

impl Borrowed<'_> {
    pub(super) fn kept(&self) -> Ingredients<Doc<Service>, Doc<WorkloadEntry>, Doc<EndpointSlice>> {
        Ingredients {
            service: self.service.clone(),
            workloads: self.workloads.iter().map(|w| w.cloned()).collect(),
            slices: self.slices.iter().map(|s| (*s).clone()).collect(),
            exported: self.exported,
            imports: self.imports.clone(),
        }
    }

    /// Whether a service was made of the same.
    pub(super) fn are_those_of(&self, made: &Made) -> bool {
        let of = &made.of;
        let workload = |(a, b): (&Option<&Doc<WorkloadEntry>>, &Option<Doc<WorkloadEntry>>)| match (a, b) {
            (Some(a), Some(b)) => same(a, b),
            (None, None) => true,
            _ => false,
        };
        same(self.service, &of.service)
            && self.exported == of.exported
            && self.workloads.len() == of.workloads.len()
            && self.slices.len() == of.slices.len()
            && self.imports.len() == of.imports.len()
            && self.workloads.iter().zip(&of.workloads).all(workload)
            && self.slices.iter().zip(&of.slices).all(|(a, b)| same(a, b))
            && self.imports.iter().zip(&of.imports).all(|(a, b)| Arc::ptr_eq(&a.0, &b.0) && a.1 == b.1)
    }
}

/// Whether a document is the one that was read before. An equal one that was read again is not, which costs no more than
/// making its service again.
fn same<T>(a: &Doc<T>, b: &Doc<T>) -> bool {
    Arc::ptr_eq(&a.spec, &b.spec)
        && Arc::ptr_eq(&a.labels, &b.labels)
        && Arc::ptr_eq(&a.annotations, &b.annotations)
        && a.created == b.created
        && a.name == b.name
        && a.namespace == b.namespace
}
