//! Value types that several kinds share.

use std::{fmt, str::FromStr, time::Duration as StdDuration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A span of time as users write it: `1.5s` (proto JSON) or `1h2m3.5s` (Go), non-negative.
///
/// Most fields demand at least a millisecond; that is checked where the field's meaning is known,
/// since in some zero means "off".
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Duration(pub StdDuration);

/// Why a string is not a [`Duration`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a duration such as 1.5s, 250ms or 1h30m")]
pub struct DurationError(String);

impl FromStr for Duration {
    type Err = DurationError;

    fn from_str(s: &str) -> Result<Self, DurationError> {
        parse_duration(s).map(Self).ok_or_else(|| DurationError(s.chars().take(64).collect()))
    }
}

fn parse_duration(s: &str) -> Option<StdDuration> {
    if s == "0" {
        return Some(StdDuration::ZERO);
    }
    if s.is_empty() {
        return None;
    }
    let mut rest = s;
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (whole, after) = rest.split_at(digits);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(f) => f.split_at(f.find(|c: char| !c.is_ascii_digit()).unwrap_or(f.len())),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() || fraction.len() > 9 || whole.len() > 12 {
            return None;
        }
        let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, tail) = after.split_at(unit_end);
        let unit: u128 = match unit {
            "h" => 3_600_000_000_000,
            "m" => 60_000_000_000,
            "s" => 1_000_000_000,
            "ms" => 1_000_000,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ns" => 1,
            _ => return None,
        };
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        total += whole * unit;
        if !fraction.is_empty() {
            let numerator: u128 = fraction.parse().ok()?;
            total += numerator * unit / 10u128.pow(fraction.len() as u32);
        }
        rest = tail;
    }
    // proto Duration: 315,576,000,000 seconds (10,000 years) at most.
    let secs = u64::try_from(total / 1_000_000_000).ok().filter(|s| *s <= 315_576_000_000)?;
    Some(StdDuration::new(secs, (total % 1_000_000_000) as u32))
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.subsec_nanos();
        if nanos == 0 {
            return write!(f, "{}s", self.0.as_secs());
        }
        let fraction = format!("{nanos:09}");
        write!(f, "{}.{}s", self.0.as_secs(), fraction.trim_end_matches('0'))
    }
}

impl fmt::Debug for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        s.parse().map_err(serde::de::Error::custom)
    }
}

impl From<Duration> for StdDuration {
    fn from(d: Duration) -> Self {
        d.0
    }
}

impl From<StdDuration> for Duration {
    fn from(d: StdDuration) -> Self {
        Self(d)
    }
}

/// A condition on a string: at most one of `exact`, `prefix` and `regex`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "RawStringMatch", into = "RawStringMatch")]
pub enum StringMatch {
    /// `{}`: it is there, with any value.
    #[default]
    Present,
    /// Equals.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// RE2 syntax, whole value.
    Regex(String),
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawStringMatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    exact: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefix: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    regex: Option<String>,
}

impl TryFrom<RawStringMatch> for StringMatch {
    type Error = &'static str;
    fn try_from(raw: RawStringMatch) -> Result<Self, &'static str> {
        match (raw.exact, raw.prefix, raw.regex) {
            (None, None, None) => Ok(Self::Present),
            (Some(s), None, None) => Ok(Self::Exact(s)),
            (None, Some(s), None) => Ok(Self::Prefix(s)),
            (None, None, Some(s)) => Ok(Self::Regex(s)),
            _ => Err("only one of exact, prefix and regex may be set"),
        }
    }
}

impl From<StringMatch> for RawStringMatch {
    fn from(m: StringMatch) -> Self {
        let mut raw = Self::default();
        match m {
            StringMatch::Present => {}
            StringMatch::Exact(s) => raw.exact = Some(s),
            StringMatch::Prefix(s) => raw.prefix = Some(s),
            StringMatch::Regex(s) => raw.regex = Some(s),
        }
        raw
    }
}

message! {
    /// Names a port of a service.
    pub struct PortSelector {
        /// 1 to 65535.
        pub number: u32,
        /// 1.0 only: routes that select by name lead nowhere, so it is refused.
        pub name: String,
    }

    /// A share in percent, such as `0.1`.
    pub struct Percent {
        /// 0.0 to 100.0.
        pub value: f64,
    }

    /// Selects workloads of the document's namespace (networking kinds).
    pub struct WorkloadSelector {
        /// All must be carried; none selects every workload.
        pub labels: std::collections::BTreeMap<String, String>,
    }

    /// Selects workloads of the document's namespace (security kinds).
    pub struct LabelSelector {
        /// All must be carried; none selects every workload.
        pub match_labels: std::collections::BTreeMap<String, String>,
    }

    /// A port that a gateway, sidecar or service entry exposes.
    pub struct Port {
        /// 1 to 65535; 0 only with a unix socket.
        pub number: u32,
        /// Protocol, case-insensitive: `HTTP`, `HTTP2`, `GRPC`, `HTTPS`, `TLS`, `TCP`, ...
        pub protocol: String,
        /// Label of the port.
        pub name: String,
        /// Port of the endpoints where it differs.
        pub target_port: u32,
    }
}
