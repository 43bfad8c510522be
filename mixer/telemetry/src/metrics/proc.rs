//! Counters of external processing; Envoy's `ext_proc.*` are the model.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// What happened, as the label `event`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcEvent {
    /// A request is processed.
    StreamStarted,
    /// The processor was done with a request, or answered it.
    StreamClosed,
    /// Processing of a request failed.
    StreamFailed,
    /// What was not processed passed as it was.
    FailureAllowed,
    /// A message was not answered in time.
    Timeout,
    /// A message to the processor.
    Sent,
    /// A message of the processor.
    Received,
    /// The processor answered in the place of the upstream.
    Immediate,
    /// A message that nothing was asked about.
    Spurious,
    /// A change of a header that is not allowed.
    Rejected,
}

const EVENTS: [&str; 10] = [
    "stream_started",
    "stream_closed",
    "stream_failed",
    "failure_mode_allowed",
    "message_timeout",
    "message_sent",
    "message_received",
    "immediate_response",
    "spurious_message",
    "rejected_header_mutation",
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    stat_prefix: Arc<str>,
    event: &'static str,
}

/// The family. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct ProcMetrics(Family<Labels, Counter>);

/// One filter's counters. Clones share them.
#[derive(Debug, Clone)]
pub struct ProcSeries(Arc<[Counter; EVENTS.len()]>);

impl ProcSeries {
    /// Counts an event.
    pub fn count(&self, e: ProcEvent) {
        self.0[e as usize].inc();
    }

    /// Counts changes that were not allowed.
    pub fn rejected(&self, n: u64) {
        self.0[ProcEvent::Rejected as usize].inc_by(n);
    }
}

impl ProcMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("flotilla_ext_proc_events", "Events of external processing", self.0.clone());
    }

    pub(super) fn series(&self, stat_prefix: &str) -> ProcSeries {
        let stat_prefix: Arc<str> = Arc::from(stat_prefix);
        ProcSeries(Arc::new(EVENTS.map(|event| {
            self.0.get_or_create_owned(&Labels { stat_prefix: Arc::clone(&stat_prefix), event })
        })))
    }
}
