//! Rules that many kinds share, and the list that findings go to.

use std::{collections::BTreeMap, net::IpAddr, time::Duration as StdDuration};

use mesh_model::{
    authored::{Duration, Percent, StringMatch},
    registry::Protocol,
};

use crate::path::{FieldPath, Path};

/// Findings of one document. A document with more than [`Findings::LIMIT`] is not worth more lines.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub errors: Vec<(FieldPath, String)>,
    pub warnings: Vec<(FieldPath, String)>,
}

impl Findings {
    const LIMIT: usize = 100;

    pub(crate) fn error(&mut self, p: &Path<'_>, message: impl Into<String>) {
        if self.errors.len() < Self::LIMIT {
            self.errors.push((p.to_field_path(), message.into()));
        }
    }

    pub(crate) fn warning(&mut self, p: &Path<'_>, message: impl Into<String>) {
        if self.warnings.len() < Self::LIMIT {
            self.warnings.push((p.to_field_path(), message.into()));
        }
    }

    /// Warns about a field that nobody enforces, if it is set.
    pub(crate) fn unenforced(&mut self, is_set: bool, p: &Path<'_>, field: &str) {
        if is_set {
            self.warning(&p.key(field), format!("field {field} is accepted but not enforced yet"));
        }
    }
}

/// RFC 1123 label, as Kubernetes names things.
pub(crate) fn is_dns1123_label(s: &str) -> bool {
    let b = s.as_bytes();
    !b.is_empty()
        && b.len() <= 63
        && b.iter().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == b'-')
        && b[0] != b'-'
        && b[b.len() - 1] != b'-'
}

/// RFC 1123 subdomain, as Kubernetes names objects.
pub(crate) fn is_object_name(s: &str) -> bool {
    s.len() <= 253
        && s.split('.').all(|l| {
            let b = l.as_bytes();
            !b.is_empty()
                && b.iter().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == b'-')
                && b[0] != b'-'
                && b[b.len() - 1] != b'-'
        })
}

/// A DNS label in either case.
pub(super) fn is_dns_label(s: &str) -> bool {
    let b = s.as_bytes();
    !b.is_empty()
        && b.len() <= 63
        && b.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'-')
        && b[0] != b'-'
        && b[b.len() - 1] != b'-'
}

/// A name of dot-separated labels; a single label counts.
pub(super) fn is_fqdn(s: &str) -> bool {
    let s = s.strip_suffix('.').unwrap_or(s);
    !s.is_empty() && s.len() <= 255 && s.split('.').all(is_dns_label)
}

/// A name whose first label may be `*`, `*label` or `*-label`; or `*` alone.
pub(super) fn is_wildcard_domain(s: &str) -> bool {
    if s.len() > 255 {
        return false;
    }
    match s.strip_prefix('*') {
        None => is_fqdn(s),
        Some("") => true,
        Some(rest) => match rest.strip_prefix('.') {
            Some(tail) => is_fqdn(tail),
            None => is_fqdn(rest.strip_prefix('-').unwrap_or(rest)),
        },
    }
}

pub(super) fn host(s: &str, p: &Path<'_>, out: &mut Findings) {
    if s.is_empty() {
        out.error(p, "a host is required");
    } else if !is_wildcard_domain(s) {
        out.error(p, format!("{s:?} is not a DNS name (a wildcard may only be its first label)"));
    }
}

pub(super) fn port(n: u32, p: &Path<'_>, out: &mut Findings) {
    if !(1..=65535).contains(&n) {
        out.error(p, format!("port {n} is outside of 1..65535"));
    }
}

pub(super) fn protocol(s: &str, p: &Path<'_>, out: &mut Findings) -> Option<Protocol> {
    if s.is_empty() {
        out.error(p, "a protocol is required");
        return None;
    }
    let parsed = Protocol::parse(s);
    if parsed.is_none() {
        out.error(
            p,
            format!("unknown protocol {s:?}, expected HTTP, HTTP2, GRPC, GRPC-WEB, HTTPS, TLS, TCP, MONGO, MYSQL or REDIS"),
        );
    }
    parsed
}

/// Keys and values of labels: Kubernetes' characters, value may be empty.
pub(super) fn labels(labels: &BTreeMap<String, String>, p: &Path<'_>, out: &mut Findings) {
    let ok = |s: &str| s.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.' | b'/'));
    for (k, v) in labels {
        if k.is_empty() || k.len() > 317 || !ok(k) {
            out.error(&p.key(k), format!("{k:?} is not a label key"));
        }
        if v.len() > 63 || !ok(v) {
            out.error(&p.key(k), format!("{v:?} is not a label value (up to 63 of A-Z a-z 0-9 - _ . /)"));
        }
    }
}

/// At least a millisecond, and a whole number of them.
pub(super) fn duration(d: Option<Duration>, p: &Path<'_>, out: &mut Findings) {
    let Some(Duration(d)) = d else { return };
    if d < StdDuration::from_millis(1) {
        out.error(p, "a duration of at least 1ms is required");
    } else if d.subsec_nanos() % 1_000_000 != 0 {
        out.error(p, "a duration must be a whole number of milliseconds");
    }
}

/// As [`duration`], or zero for "off".
pub(super) fn duration_or_zero(d: Option<Duration>, p: &Path<'_>, out: &mut Findings) {
    if d.is_some_and(|d| !d.0.is_zero()) {
        duration(d, p, out);
    }
}

pub(super) fn percent(n: i64, p: &Path<'_>, out: &mut Findings) {
    if !(0..=100).contains(&n) {
        out.error(p, format!("{n} is outside of 0..100 percent"));
    }
}

pub(super) fn percentage(v: Option<&Percent>, p: &Path<'_>, out: &mut Findings) {
    if let Some(v) = v
        && !(0.0..=100.0).contains(&v.value)
    {
        out.error(&p.key("value"), format!("{} is outside of 0..100 percent", v.value));
    }
}

pub(super) fn not_negative(n: i64, p: &Path<'_>, out: &mut Findings) {
    if n < 0 {
        out.error(p, format!("{n} is negative"));
    }
}

pub(super) fn is_ip_or_cidr(s: &str) -> bool {
    s.parse::<IpAddr>().is_ok() || s.parse::<ipnet::IpNet>().is_ok()
}

pub(super) fn subnet(s: &str, p: &Path<'_>, out: &mut Findings) {
    if !is_ip_or_cidr(s) {
        out.error(p, format!("{s:?} is neither an IP address nor a CIDR range"));
    }
}

pub(super) fn regex(pattern: &str, p: &Path<'_>, out: &mut Findings) {
    if pattern.is_empty() {
        out.error(p, "an empty regular expression matches nothing");
        return;
    }
    if let Err(e) = regex::RegexBuilder::new(pattern).size_limit(1 << 20).build() {
        let text = e.to_string();
        let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
        out.error(p, format!("not a regular expression of RE2: {reason}"));
    }
}

pub(super) fn string_match(m: &StringMatch, p: &Path<'_>, out: &mut Findings) {
    if let StringMatch::Regex(r) = m {
        regex(r, &p.key("regex"), out);
    }
}

/// RFC 9110 token, or a pseudo-header.
pub(super) fn header_name(name: &str, p: &Path<'_>, out: &mut Findings) {
    let token = name.strip_prefix(':').unwrap_or(name);
    let ok = !token.is_empty()
        && token.bytes().all(|c| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c));
    if !ok {
        out.error(p, format!("{name:?} is not a header name"));
    }
}

/// No control characters: they would let a value end the header line.
pub(super) fn header_value(value: &str, p: &Path<'_>, out: &mut Findings) {
    if value.bytes().any(|c| matches!(c, b'\r' | b'\n' | 0)) {
        out.error(p, "a header value must not contain line breaks or NUL");
    }
}

/// `exportTo`: `*`, `.`, names, and where `none` is set `~`.
pub(super) fn export_to(list: &[String], none_allowed: bool, p: &Path<'_>, out: &mut Findings) {
    let p = &p.key("exportTo");
    for (i, ns) in list.iter().enumerate() {
        let at = p.index(i);
        match ns.as_str() {
            "*" | "." => {}
            "~" if none_allowed => {}
            _ if is_dns1123_label(ns) => {}
            _ => out.error(&at, format!("{ns:?} is neither a namespace nor one of '*', '.'")),
        }
        if list[..i].contains(ns) {
            out.error(&at, format!("{ns:?} is listed twice"));
        }
        if list.len() > 1 && matches!(ns.as_str(), "*" | "~") {
            out.error(&at, format!("{ns:?} cannot stand beside others"));
        }
    }
}

/// Gateway references: `mesh`, `name`, `namespace/name`, or a name with dots (1.0).
pub(super) fn gateway_names(list: &[String], p: &Path<'_>, out: &mut Findings) {
    for (i, g) in list.iter().enumerate() {
        let ok = match g.split_once('/') {
            Some((ns, name)) => (ns == "." || is_dns1123_label(ns)) && is_fqdn(name),
            None => is_fqdn(g),
        };
        if !ok {
            out.error(&p.index(i), format!("{g:?} is not a gateway, expected name or namespace/name"));
        }
    }
}

/// Weights of a route's destinations; see the rules at the top of [`crate::validate`].
pub(super) fn weights(weights: &[i32], api_version: &str, p: &Path<'_>, out: &mut Findings) {
    for (i, w) in weights.iter().enumerate() {
        if *w < 0 {
            out.error(&p.index(i).key("weight"), format!("weight {w} is negative"));
        }
    }
    if weights.len() < 2 || weights.iter().any(|w| *w < 0) {
        return;
    }
    let sum: i64 = weights.iter().map(|w| i64::from(*w)).sum();
    if sum == 0 {
        out.error(p, "the weights of all destinations are 0");
    } else if sum > i64::from(u32::MAX) {
        out.error(p, format!("the weights add up to {sum}, which is more than {}", u32::MAX));
    } else if sum != 100 {
        let message = format!("the weights add up to {sum}, not 100");
        if api_version.ends_with("/v1alpha3") {
            out.error(p, message);
        } else {
            out.warning(p, format!("{message}; they are taken as proportions"));
        }
    }
}

/// `host:port`, where the host is a name or an address.
pub(super) fn host_port(s: &str, p: &Path<'_>, out: &mut Findings) {
    let ok = s.rsplit_once(':').is_some_and(|(h, port)| {
        let h = h.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(h);
        port.parse::<u16>().is_ok_and(|p| p > 0) && (h.parse::<IpAddr>().is_ok() || is_fqdn(h))
    });
    if !ok {
        out.error(p, format!("{s:?} is not host:port"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for ok in ["a", "reviews", "a.b.c", "*.foo.com", "*", "*-x.foo.com", "*foo.com", "Foo.com", "a.b."] {
            assert!(is_wildcard_domain(ok), "{ok}");
        }
        for bad in ["", ".", "a..b", "a.*.b", "-a.b", "a_b", "**", "*.", "*.*.a", "a b", "a/b", "http://x"] {
            assert!(!is_wildcard_domain(bad), "{bad}");
        }
    }

    #[test]
    fn names() {
        assert!(
            is_object_name("a-b.c") && !is_object_name("A") && !is_object_name("a_b") && !is_object_name("")
        );
        assert!(!is_object_name("a/../b") && !is_object_name("a."));
    }

    #[test]
    fn header_injection_is_refused() {
        let mut out = Findings::default();
        let root = Path::root();
        header_value("a\r\nx: y", &root, &mut out);
        header_name("a b", &root, &mut out);
        header_name("", &root, &mut out);
        assert_eq!(out.errors.len(), 3);
    }
}
