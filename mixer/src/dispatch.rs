//! Attributes to answers: which rules match, what their handlers say.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use mesh_telemetry::attributes::{Bag, Reference};

use crate::{
    adapters::{CheckResult, Data, Input, QuotaArgs, QuotaGrant, Template},
    config::{Action, Config, Fields, Instance, Rule},
    expr::{EvalError, Expression, Tracked, Value},
};

/// Validity of an answer that no handler had a say in.
const DEFAULT_VALID: Duration = Duration::from_secs(60);
const DEFAULT_USES: i32 = 10_000;

/// Answer of Check, without quotas.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Verdict {
    pub result: CheckResult,
    /// What it depends on; `None` is too much to say, so it must not be kept.
    pub references: Option<Vec<Reference>>,
}

/// Answer for one quota.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Grant {
    pub grant: QuotaGrant,
    pub references: Option<Vec<Reference>>,
}

/// The namespace whose rules apply: that of the workload whose proxy reports.
fn namespace<'a>(bag: &Tracked<'a>) -> &'a str {
    let own = match bag.str("context.reporter.kind") {
        Some("outbound") => bag.str("source.namespace"),
        _ => bag.str("destination.namespace"),
    };
    own.unwrap_or_default()
}

impl Config {
    /// Rules that match, those of the default namespace first.
    fn matching<'a>(
        &'a self,
        bag: &'a Tracked<'_>,
        default_namespace: &str,
    ) -> impl Iterator<Item = &'a Rule> {
        let own = namespace(bag);
        let common = self.rules.get(default_namespace);
        let own = (own != default_namespace).then(|| self.rules.get(own)).flatten();
        common.into_iter().chain(own).flatten().filter(move |r| match &r.condition {
            None => true,
            Some(c) => match c.eval_bool(bag) {
                Ok(b) => b,
                Err(e) => {
                    tracing::debug!(error = %e, "a rule has no verdict and does not match");
                    false
                }
            },
        })
    }

    /// Whether a request may pass.
    pub(crate) fn check(&self, bag: &Bag, default_namespace: &str) -> Verdict {
        let bag = Tracked::new(bag);
        let mut out: Option<CheckResult> = None;
        for rule in self.matching(&bag, default_namespace) {
            for (action, instance) in pairs(rule) {
                if !matches!(instance.template, Template::CheckNothing | Template::ListEntry) {
                    continue;
                }
                let input = match input(instance, &bag) {
                    Ok(i) => i,
                    Err(e) => {
                        tracing::debug!(instance = %instance.full, error = %e, "an instance has no value");
                        continue;
                    }
                };
                let mut r = action.handler.check(&input);
                if r.code != 0 {
                    r.message = format!("{}:{}", action.handler_name, r.message);
                }
                out = Some(match out {
                    None => r,
                    Some(o) => combine(o, r),
                });
            }
        }
        let result = out.unwrap_or(CheckResult {
            code: 0,
            message: String::new(),
            valid: DEFAULT_VALID,
            uses: DEFAULT_USES,
        });
        Verdict { result, references: bag.references() }
    }

    /// Takes an amount of the quota `name` (short or full name of an instance). A quota that no rule
    /// hands to a handler is granted in full.
    pub(crate) fn quota(&self, bag: &Bag, default_namespace: &str, name: &str, args: QuotaArgs<'_>) -> Grant {
        let bag = Tracked::new(bag);
        let mut grant = QuotaGrant { granted: args.amount, valid: DEFAULT_VALID };
        'rules: for rule in self.matching(&bag, default_namespace) {
            for (action, instance) in pairs(rule) {
                if instance.template != Template::Quota || instance.name != name && *instance.full != *name {
                    continue;
                }
                grant = match input(instance, &bag) {
                    Ok(i) => action.handler.quota(&i, args),
                    Err(e) => {
                        tracing::debug!(instance = %instance.full, error = %e, "a quota has no dimensions");
                        QuotaGrant { granted: 0, valid: Duration::ZERO }
                    }
                };
                break 'rules;
            }
        }
        Grant { grant, references: bag.references() }
    }

    /// Hands a report to every handler that wants it.
    pub(crate) fn report(&self, bag: &Bag, default_namespace: &str) {
        let bag = Tracked::new(bag);
        for rule in self.matching(&bag, default_namespace) {
            for (action, instance) in pairs(rule) {
                if !matches!(
                    instance.template,
                    Template::ReportNothing | Template::LogEntry | Template::Metric
                ) {
                    continue;
                }
                match input(instance, &bag) {
                    Ok(i) => action.handler.report(&i),
                    Err(e) => {
                        tracing::debug!(instance = %instance.full, error = %e, "an instance has no value")
                    }
                }
            }
        }
    }
}

fn pairs(rule: &Rule) -> impl Iterator<Item = (&Action, &Instance)> {
    rule.actions.iter().flat_map(|a| a.instances.iter().map(move |i| (a, &**i)))
}

/// First failure, all messages of failures, the shorter validity.
fn combine(a: CheckResult, b: CheckResult) -> CheckResult {
    let message = match (a.code != 0, b.code != 0) {
        (true, true) => format!("{}, {}", a.message, b.message),
        (true, false) => a.message,
        _ => b.message,
    };
    // A negative count is without limit.
    let uses = match (a.uses, b.uses) {
        (x, y) if x < 0 => y,
        (x, y) if y < 0 => x,
        (x, y) => x.min(y),
    };
    CheckResult {
        code: if a.code == 0 { b.code } else { a.code },
        message,
        valid: a.valid.min(b.valid),
        uses,
    }
}

/// Evaluates an instance.
fn input(i: &Instance, bag: &Tracked<'_>) -> Result<Input, EvalError> {
    let all = |m: &BTreeMap<String, Expression>| -> Result<BTreeMap<String, Value>, EvalError> {
        m.iter().map(|(k, e)| Ok((k.clone(), e.eval(bag)?))).collect()
    };
    let data = match &i.fields {
        Fields::Nothing => Data::Nothing,
        Fields::ListEntry(e) => Data::ListEntry(e.eval(bag)?.to_text()),
        Fields::Quota(m) => Data::Quota(all(m)?),
        Fields::LogEntry { variables, timestamp, severity } => Data::LogEntry {
            variables: all(variables)?,
            timestamp: match timestamp.as_ref().map(|e| e.eval(bag)).transpose()? {
                Some(Value::Timestamp(t)) => t,
                _ => SystemTime::now(),
            },
            severity: severity.eval(bag)?.to_text(),
        },
        Fields::Metric { value, dimensions } => {
            Data::Metric { value: value.eval(bag)?, dimensions: all(dimensions)? }
        }
    };
    Ok(Input { instance: i.full.clone(), data })
}

/// Arguments of a quota now.
pub(crate) fn quota_args(amount: i64, best_effort: bool, dedup: &str) -> QuotaArgs<'_> {
    QuotaArgs { amount, best_effort, dedup, now: Instant::now() }
}

#[cfg(test)]
mod tests;
