//! What hosts say of their load in their answers (ORCA, `xds.data.orca.v3.OrcaLoadReport`), and the weights that follow.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_model::proxy::UtilizationLb;
use serde_json::Value;

use super::cluster::millis;
use crate::{
    http::headers::Headers,
    wire::{self, Field},
};

/// As text, JSON, or binary in base64, which the first word says.
const REPORT: &[u8] = b"endpoint-load-metrics";
/// Binary in base64.
const REPORT_BIN: &[u8] = b"endpoint-load-metrics-bin";
/// Metrics of a report that are looked at; a host does not choose what is kept of it.
const MAX_METRICS: usize = 64;

/// A host's reports.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Bits of the weight that follows from the last one.
    weight: AtomicU64,
    /// When that came, in milliseconds; 0 is never.
    last: AtomicU64,
    /// Since when they have come without a gap.
    since: AtomicU64,
}

impl Load {
    /// Takes a report with an answer, if there is one and a weight follows from it.
    pub(crate) fn note(&self, now: u64, headers: &Headers, u: &UtilizationLb) {
        let Some(weight) = read(headers).and_then(|r| weight(&r, u)) else { return };
        let last = self.last.load(Relaxed);
        if last == 0 || now.saturating_sub(last) >= millis(u.expiration) {
            self.since.store(now, Relaxed);
        }
        self.weight.store(weight.to_bits(), Relaxed);
        self.last.store(now.max(1), Relaxed);
    }

    /// The weight, if one counts now.
    pub(crate) fn weight(&self, now: u64, blackout: u64, expiration: u64) -> Option<f64> {
        let last = self.last.load(Relaxed);
        let counts = last != 0
            && now.saturating_sub(last) < expiration
            && now.saturating_sub(self.since.load(Relaxed)) >= blackout;
        counts.then(|| f64::from_bits(self.weight.load(Relaxed)))
    }
}

/// Metrics by name, those of maps as `map.key`.
type Report = Vec<(String, f64)>;

fn read(headers: &Headers) -> Option<Report> {
    if let Some(v) = headers.get(REPORT_BIN) {
        return binary(v);
    }
    let v = headers.get(REPORT)?;
    if let Some(rest) = v.strip_prefix(b"BIN ") {
        return binary(rest);
    }
    let text = std::str::from_utf8(v).ok()?;
    match text.strip_prefix("JSON ") {
        Some(json) => self::json(json),
        None => Some(plain(text.strip_prefix("TEXT ").unwrap_or(text))),
    }
}

/// `cpu_utilization=0.3,named_metrics.gpu=0.7`.
fn plain(text: &str) -> Report {
    let pairs = text.split(',').filter_map(|p| p.split_once('='));
    let metrics = pairs.filter_map(|(k, v)| Some((k.trim().to_owned(), v.trim().parse().ok()?)));
    metrics.take(MAX_METRICS).collect()
}

fn json(text: &str) -> Option<Report> {
    let Value::Object(fields) = serde_json::from_str(text).ok()? else { return None };
    let mut out = Report::new();
    for (k, v) in fields {
        match v {
            Value::Number(n) => out.push((snake(&k), n.as_f64()?)),
            Value::Object(map) => {
                let map_name = snake(&k);
                out.extend(map.iter().filter_map(|(k, v)| Some((format!("{map_name}.{k}"), v.as_f64()?))));
            }
            _ => {}
        }
        if out.len() > MAX_METRICS {
            return None;
        }
    }
    Some(out)
}

/// The name of a field as the message has it: JSON may have either form.
fn snake(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

fn binary(v: &[u8]) -> Option<Report> {
    let bytes = STANDARD.decode(v).ok()?;
    let mut out = Report::new();
    wire::read(&bytes, |field, value| {
        let name = match field {
            1 => "cpu_utilization",
            2 => "mem_utilization",
            4 => "request_cost",
            5 => "utilization",
            6 => "rps_fractional",
            7 => "eps",
            8 => "named_metrics",
            9 => "application_utilization",
            _ => return Ok(()),
        };
        match value {
            _ if out.len() >= MAX_METRICS => {}
            Field::Double(d) => out.push((name.to_owned(), d)),
            Field::Bytes(entry) => {
                let (mut key, mut metric) = (String::new(), 0.0);
                wire::read(entry, |field, value| {
                    match (field, value) {
                        (1, v) => key = v.text().into_owned(),
                        (2, Field::Double(d)) => metric = d,
                        _ => {}
                    }
                    Ok(())
                })?;
                out.push((format!("{name}.{key}"), metric));
            }
            _ => {}
        }
        Ok(())
    })
    .ok()?;
    Some(out)
}

/// Requests in a second by utilisation; reports that lack either say nothing, and neither do numbers whose quotient is none.
fn weight(r: &Report, u: &UtilizationLb) -> Option<f64> {
    let get = |name: &str| {
        let found = r.iter().find(|(k, _)| k == name).map_or(0.0, |(_, v)| *v);
        if found.is_finite() { found } else { 0.0 }
    };
    let named = u.metrics.iter().map(|m| get(m)).fold(0.0, f64::max);
    let own = [named, get("application_utilization"), get("cpu_utilization")].into_iter().find(|v| *v > 0.0);
    let rate = get("rps_fractional");
    if rate <= 0.0 {
        return None;
    }
    let penalty = get("eps").max(0.0) / rate * f64::from(u.error_penalty) / 100.0;
    let utilization = own.unwrap_or(0.0) + penalty;
    (utilization > 0.0).then(|| rate / utilization).filter(|w| w.is_normal())
}

/// A report in every form: bounded, and a weight that can be one.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let u = UtilizationLb { metrics: vec!["named_metrics.a".into()], ..UtilizationLb::default() };
    let encoded = STANDARD.encode(data);
    for (name, value) in [(REPORT, data), (REPORT_BIN, data), (REPORT_BIN, encoded.as_bytes())] {
        let mut headers = Headers::default();
        headers.push(name, value);
        if let Some(report) = read(&headers) {
            assert!(report.len() <= 2 * MAX_METRICS, "{} metrics", report.len());
            assert!(weight(&report, &u).is_none_or(|w| w.is_normal() && w > 0.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &[u8], value: &str, u: &UtilizationLb) -> Option<f64> {
        let mut h = Headers::default();
        h.push(name, value.as_bytes());
        read(&h).and_then(|r| weight(&r, u))
    }

    #[test]
    fn reports_in_all_forms() {
        let u = UtilizationLb::default();
        let text = |v: &str| of(REPORT, v, &u);
        assert_eq!(text("TEXT rps_fractional=10,cpu_utilization=0.5"), Some(20.0));
        assert_eq!(text("rps_fractional=10,application_utilization=0.25,cpu_utilization=0.5"), Some(40.0));
        assert_eq!(text("JSON {\"rpsFractional\": 10, \"cpu_utilization\": 0.5}"), Some(20.0));
        let mut bytes = Vec::new();
        for (tag, v) in [(6u8 << 3 | 1, 10.0f64), (1 << 3 | 1, 0.5)] {
            bytes.push(tag);
            bytes.extend_from_slice(&v.to_le_bytes());
        }
        let b64 = STANDARD.encode(&bytes);
        assert_eq!(of(REPORT_BIN, &b64, &u), Some(20.0));
        assert_eq!(text(&format!("BIN {b64}")), Some(20.0));
        for bad in [
            "",
            "TEXT x",
            "JSON [",
            "BIN !",
            "rps_fractional=10",
            "cpu_utilization=0.5",
            "rps_fractional=-1,cpu_utilization=1",
            "rps_fractional=NaN,cpu_utilization=1",
        ] {
            assert_eq!(text(bad), None, "{bad}");
        }
    }

    #[test]
    fn errors_and_named_metrics_count() {
        let report = "rps_fractional=10,eps=5,cpu_utilization=0.5,named_metrics.gpu=0.25,utilization.io=0.75";
        let with = |u: UtilizationLb| of(REPORT, report, &u).unwrap();
        assert_eq!(with(UtilizationLb::default()), 10.0, "half of the requests fail");
        let error_penalty = 0;
        assert_eq!(with(UtilizationLb { error_penalty, ..UtilizationLb::default() }), 20.0);
        let metrics = vec!["named_metrics.gpu".to_owned(), "utilization.io".to_owned()];
        assert_eq!(with(UtilizationLb { error_penalty, metrics, ..UtilizationLb::default() }), 10.0 / 0.75);
    }

    #[test]
    fn weights_have_their_time() {
        let (l, u) = (Load::default(), UtilizationLb::default());
        let mut h = Headers::default();
        h.push(REPORT, b"rps_fractional=10,cpu_utilization=0.5");
        let at = |now| l.weight(now, 10_000, 180_000);
        assert_eq!(at(1_000), None);
        l.note(1_000, &h, &u);
        l.note(9_000, &h, &u);
        assert_eq!(at(10_999), None, "too new");
        assert_eq!(at(11_000), Some(20.0));
        assert_eq!(at(189_000), None, "too old");
        l.note(200_000, &h, &u);
        assert_eq!(at(205_000), None, "new again after a gap");
        assert_eq!(at(210_000), Some(20.0));
    }
}
