//! Adapters: what a handler does with instances.
//!
//! A fixed set, dispatched statically. A handler keeps its state (counters, metrics) for as long as
//! its configuration is the same, across reloads of everything else.

mod denier;
mod list;
mod memquota;
mod prometheus;
mod stdio;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_model::authored::Spec;

use self::{denier::Denier, list::List, memquota::MemQuota, stdio::Stdio};
pub(crate) use self::{prometheus::Prometheus, stdio::LogSink};
use crate::expr::Value;

/// Templates whose instances an adapter takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Template {
    CheckNothing,
    ReportNothing,
    ListEntry,
    Quota,
    LogEntry,
    Metric,
}

impl Template {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::CheckNothing => "checknothing",
            Self::ReportNothing => "reportnothing",
            Self::ListEntry => "listentry",
            Self::Quota => "quota",
            Self::LogEntry => "logentry",
            Self::Metric => "metric",
        }
    }
}

/// An evaluated instance.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Input {
    /// `name.kind.namespace`.
    pub instance: Arc<str>,
    pub data: Data,
}

/// Fields of an instance, by template.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Data {
    Nothing,
    ListEntry(String),
    Quota(BTreeMap<String, Value>),
    LogEntry { variables: BTreeMap<String, Value>, timestamp: SystemTime, severity: String },
    Metric { value: Value, dimensions: BTreeMap<String, Value> },
}

/// Answer of a check.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CheckResult {
    /// `google.rpc.Code`; 0 is OK.
    pub code: i32,
    pub message: String,
    pub valid: Duration,
    pub uses: i32,
}

/// A quota as it is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuotaArgs<'a> {
    pub amount: i64,
    pub best_effort: bool,
    /// Equal for a repetition of the same request; empty if there is none.
    pub dedup: &'a str,
    pub now: Instant,
}

/// Answer of a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QuotaGrant {
    pub granted: i64,
    pub valid: Duration,
}

/// A configured adapter.
#[derive(Debug)]
pub(crate) enum Handler {
    Denier(Denier),
    List(List),
    MemQuota(MemQuota),
    Stdio(Stdio),
    Prometheus(Prometheus),
}

impl Handler {
    /// Builds an adapter from its parameters.
    pub(crate) fn new(params: &Spec, sink: &LogSink) -> Result<Self, String> {
        Ok(match params {
            Spec::Denier(p) => Self::Denier(Denier::new(p)),
            Spec::ListChecker(p) => Self::List(List::new(p)?),
            Spec::MemQuota(p) => Self::MemQuota(MemQuota::new(p)?),
            Spec::Stdio(p) => Self::Stdio(Stdio::new(p, sink.clone())?),
            Spec::Prometheus(p) => Self::Prometheus(Prometheus::new(p)?),
            other => return Err(format!("{} is not an adapter", other.kind().name())),
        })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Denier(_) => "denier",
            Self::List(_) => "listchecker",
            Self::MemQuota(_) => "memquota",
            Self::Stdio(_) => "stdio",
            Self::Prometheus(_) => "prometheus",
        }
    }

    /// Whether the adapter takes this instance; `fields` are the names of its dimensions or variables.
    pub(crate) fn accepts(&self, template: Template, instance: &str, fields: &[&str]) -> Result<(), String> {
        let ok = match self {
            Self::Denier(_) => {
                matches!(template, Template::CheckNothing | Template::ListEntry | Template::Quota)
            }
            Self::List(_) => template == Template::ListEntry,
            Self::MemQuota(_) => template == Template::Quota,
            Self::Stdio(_) => matches!(template, Template::LogEntry | Template::Metric),
            Self::Prometheus(_) => template == Template::Metric,
        };
        if !ok {
            return Err(format!("adapter {} does not take instances of {}", self.name(), template.name()));
        }
        match self {
            Self::Prometheus(p) => p.accepts(instance, fields),
            Self::MemQuota(q) => q.accepts(instance),
            _ => Ok(()),
        }
    }

    pub(crate) fn check(&self, input: &Input) -> CheckResult {
        match self {
            Self::Denier(d) => d.check(),
            Self::List(l) => l.check(input),
            // `accepts` keeps every other pair out of the rules.
            _ => CheckResult {
                code: 13,
                message: "not a check adapter".into(),
                valid: Duration::ZERO,
                uses: 0,
            },
        }
    }

    pub(crate) fn quota(&self, input: &Input, args: QuotaArgs<'_>) -> QuotaGrant {
        match (self, &input.data) {
            (Self::MemQuota(q), Data::Quota(dimensions)) => q.alloc(&input.instance, dimensions, args),
            (Self::Denier(d), _) => QuotaGrant { granted: 0, valid: d.check().valid },
            _ => QuotaGrant { granted: 0, valid: Duration::ZERO },
        }
    }

    pub(crate) fn report(&self, input: &Input) {
        match self {
            Self::Stdio(s) => s.report(input),
            Self::Prometheus(p) => p.report(input),
            _ => {}
        }
    }
}
