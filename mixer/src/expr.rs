//! The expression language over attributes, typed when configuration is loaded.
//!
//! An expression that refers to an unknown attribute or mixes types never gets as far as a request.
//! Evaluation is total: no recursion deeper than the parser allowed, no allocation that input could
//! make large, and the only failure is an attribute that is absent and has no default.

mod compile;
mod eval;
mod lex;
mod manifest;
mod parse;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, SystemTime},
};

pub(crate) use self::{
    compile::{Expression, compile, compile_as},
    eval::{EvalError, Tracked},
};

/// Type of an expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Type {
    String,
    Int64,
    Double,
    Bool,
    Timestamp,
    Duration,
    IpAddress,
    EmailAddress,
    Uri,
    DnsName,
    StringMap,
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::String => "string",
            Self::Int64 => "int64",
            Self::Double => "double",
            Self::Bool => "bool",
            Self::Timestamp => "timestamp",
            Self::Duration => "duration",
            Self::IpAddress => "IP address",
            Self::EmailAddress => "e-mail address",
            Self::Uri => "URI",
            Self::DnsName => "DNS name",
            Self::StringMap => "string map",
        })
    }
}

/// Result of an expression. E-mail addresses, URIs and DNS names are strings in normal form.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    String(String),
    Int64(i64),
    Double(f64),
    Bool(bool),
    Timestamp(SystemTime),
    Duration(Duration),
    Ip(IpAddr),
    StringMap(BTreeMap<String, String>),
}

impl Value {
    /// The value as text, such as a dimension or a log's field.
    pub(crate) fn to_text(&self) -> String {
        match self {
            Self::String(s) => s.clone(),
            Self::Int64(n) => n.to_string(),
            Self::Double(n) => n.to_string(),
            Self::Bool(b) => b.to_string(),
            Self::Timestamp(t) => rfc3339(*t),
            Self::Duration(d) => format!("{}s", d.as_secs_f64()),
            Self::Ip(ip) => ip.to_string(),
            Self::StringMap(m) => m.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(","),
        }
    }

    /// The value as JSON.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Int64(n) => (*n).into(),
            Self::Double(n) => (*n).into(),
            Self::Bool(b) => (*b).into(),
            Self::StringMap(m) => {
                serde_json::Value::Object(m.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect())
            }
            other => other.to_text().into(),
        }
    }

    /// The value as a number: durations in seconds.
    pub(crate) fn to_number(&self) -> Option<f64> {
        match self {
            Self::Int64(n) => Some(*n as f64),
            Self::Double(n) => Some(*n),
            Self::Duration(d) => Some(d.as_secs_f64()),
            _ => None,
        }
    }
}

/// RFC 3339 in UTC with microseconds.
pub(crate) fn rfc3339(t: SystemTime) -> String {
    let d = t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, rest) = (d.as_secs() / 86_400, d.as_secs() % 86_400);
    // Civil from days (Howard Hinnant's algorithm), years that start in March.
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        rest / 3_600,
        rest % 3_600 / 60,
        rest % 60,
        d.subsec_micros()
    )
}

/// Why an expression is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} (at character {at} of {text:?})")]
pub(crate) struct ExprError {
    pub message: String,
    /// Character, counted from 1.
    pub at: usize,
    pub text: String,
}

#[cfg(test)]
mod tests;
