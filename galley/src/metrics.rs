//! Galley's metrics.

use std::{collections::BTreeMap, sync::Arc};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::report::DocumentReport;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    /// A supported kind, or `other`: names that users invent must not become series.
    kind: &'static str,
}

/// Counts of the latest reading, and of readings.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    applied: Gauge,
    stale: Gauge,
    rejected: Family<KindLabel, Gauge>,
    warnings: Gauge,
    reloads: Counter,
}

impl Metrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register("galley_documents", "Documents that apply", self.applied.clone());
        registry.register(
            "galley_documents_stale",
            "Documents that apply in an earlier version than their file has",
            self.stale.clone(),
        );
        registry.register("galley_documents_rejected", "Documents that are rejected", self.rejected.clone());
        registry.register("galley_warnings", "Warnings about documents", self.warnings.clone());
        registry.register("galley_reloads", "Readings that changed something", self.reloads.clone());
    }

    pub(crate) fn record(&self, reports: &[Arc<DocumentReport>], applied: usize, stale: usize) {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.applied.set(count(applied));
        self.stale.set(count(stale));
        self.warnings.set(count(reports.iter().map(|r| r.warnings.len()).sum()));
        let mut rejected: BTreeMap<&'static str, usize> = BTreeMap::new();
        for r in reports.iter().filter(|r| !r.valid) {
            let known = mesh_model::authored::Kind::resolve(&r.api_version, &r.kind);
            *rejected.entry(known.map_or("other", mesh_model::authored::Kind::name)).or_default() += 1;
        }
        self.rejected.clear();
        for (kind, n) in rejected {
            self.rejected.get_or_create(&KindLabel { kind }).set(count(n));
        }
        self.reloads.inc();
    }
}
