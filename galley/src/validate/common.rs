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
    /// Warnings that have a code of their own in the analysis.
    pub coded: Vec<(&'static str, FieldPath, String)>,
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

    /// A warning that the analysis tells under `code`.
    pub(crate) fn coded(&mut self, code: &'static str, p: &Path<'_>, message: String) {
        if self.coded.len() < Self::LIMIT {
            self.coded.push((code, p.to_field_path(), message));
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

/// A name of dot-separated labels; a single label counts. The last one is not a number, or an IP address
/// would be a name.
pub(super) fn is_fqdn(s: &str) -> bool {
    let s = s.strip_suffix('.').unwrap_or(s);
    let numeric = s.rsplit('.').next().is_some_and(|l| l.bytes().all(|c| c.is_ascii_digit()));
    !numeric && s.len() <= 255 && s.split('.').all(is_dns_label)
}

/// A name whose first label may be `*`, `*label` or `*-label`; or `*` alone.
pub(super) fn is_wildcard_domain(s: &str) -> bool {
    if s.len() > 255 {
        return false;
    }
    match s.strip_prefix('*') {
        None => is_fqdn(s) || is_dns_label(s),
        Some("") => true,
        Some(rest) => match rest.strip_prefix('.') {
            Some(tail) => is_fqdn(tail),
            None => is_wildcard_tail(rest.strip_prefix('-').unwrap_or(rest)),
        },
    }
}

fn is_wildcard_tail(s: &str) -> bool {
    is_fqdn(s) || is_dns_label(s)
}

/// A wildcard that is not a whole label, such as `*foo.com`.
pub(super) fn is_partial_wildcard(s: &str) -> bool {
    s.len() > 1 && s.contains('*') && !s.starts_with("*.")
}

/// The host of a gateway's server or of a sidecar's egress listener: `*`, or a name with a dot. Short names are
/// refused, since they would depend on the namespace of whoever reads them.
pub(super) fn scoped_host(s: &str, ip_allowed: bool, p: &Path<'_>, out: &mut Findings) {
    if ip_allowed && s.parse::<IpAddr>().is_ok() {
        return;
    }
    if s != "*" && !s.contains('.') {
        out.error(
            p,
            format!("{s:?} is a short name: write it in full, such as \"{s}.NAMESPACE.svc.cluster.local\""),
        );
    } else {
        host(s, p, out);
    }
    if is_partial_wildcard(s) {
        out.error(p, format!("{s:?}: a wildcard must be the whole first label, such as \"*.example.com\""));
    }
}

pub(super) fn host(s: &str, p: &Path<'_>, out: &mut Findings) {
    if s.is_empty() {
        out.error(p, "a host is required");
    } else if !is_wildcard_domain(s) {
        out.error(p, format!("{s:?} is not a DNS name (a wildcard may only be its first label)"));
    }
}

/// Of Unix sockets.
pub(super) const OWN_SOCKETS: &str =
    "Flotilla's own sidecars alone connect to a unix socket, unless its server runs as their user";

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

/// Keys and values of labels as Kubernetes has them: `[prefix/]name` and name, where a name begins and ends with a
/// letter or digit; a value may be empty.
pub(super) fn labels(labels: &BTreeMap<String, String>, p: &Path<'_>, out: &mut Findings) {
    for (k, v) in labels {
        if !is_label_key(k) {
            out.error(
                &p.key(k),
                format!(
                    "{k:?} is not a label key: [prefix/]name of A-Z a-z 0-9 - _ ., alphanumeric at both ends"
                ),
            );
        }
        if !v.is_empty() && !is_qualified_name(v) {
            out.error(
                &p.key(k),
                format!(
                    "{v:?} is not a label value: up to 63 of A-Z a-z 0-9 - _ ., alphanumeric at both ends"
                ),
            );
        }
    }
}

fn is_label_key(k: &str) -> bool {
    match k.split_once('/') {
        Some((prefix, name)) => {
            prefix.len() <= 253 && prefix.split('.').all(is_dns_label) && is_qualified_name(name)
        }
        None => is_qualified_name(k),
    }
}

fn is_qualified_name(s: &str) -> bool {
    let b = s.as_bytes();
    !b.is_empty()
        && b.len() <= 63
        && b.iter().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
        && b[0].is_ascii_alphanumeric()
        && b[b.len() - 1].is_ascii_alphanumeric()
}

/// A selector: no empty keys, no wildcards; without labels it selects everything, which is said.
pub(super) fn selector(labels: &BTreeMap<String, String>, p: &Path<'_>, field: &str, out: &mut Findings) {
    let at = p.key(field);
    for (k, v) in labels {
        if k.is_empty() {
            out.error(&at, "a selector's key must not be empty");
        } else if k.contains('*') || v.contains('*') {
            out.error(&at.key(k), "a selector knows no wildcards: give the label's exact value");
        }
    }
    if labels.is_empty() {
        out.warning(p, "a selector without labels selects every workload of the namespace");
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
    let Some(v) = v else { return };
    if !(0.0..=100.0).contains(&v.value) {
        out.error(&p.key("value"), format!("{} is outside of 0..100 percent", v.value));
    }
}

/// As [`percentage`], where shares are counted in millionths.
pub(super) fn fault_percentage(v: Option<&Percent>, p: &Path<'_>, out: &mut Findings) {
    percentage(v, p, out);
    if v.is_some_and(|v| v.value > 0.0 && v.value < 0.0001) {
        out.error(&p.key("value"), "the smallest share is 0.0001 percent");
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
    if pattern.len() > 1024 {
        out.error(p, format!("the regular expression has {} bytes; 1024 is the limit", pattern.len()));
        return;
    }
    if let Err(e) = regex::RegexBuilder::new(pattern).size_limit(1 << 20).build() {
        let text = e.to_string();
        let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
        out.error(p, format!("not a regular expression of RE2: {reason}"));
    }
}

pub(super) fn string_match(m: &StringMatch, p: &Path<'_>, out: &mut Findings) {
    match m {
        StringMatch::Regex(r) => regex(r, &p.key("regex"), out),
        StringMatch::Prefix(s) if s.is_empty() => {
            out.error(&p.key("prefix"), "an empty prefix matches everything; leave the condition out");
        }
        _ => {}
    }
}

/// As [`string_match`] for a path, where an empty prefix has always been let pass.
pub(super) fn path_match(m: &StringMatch, p: &Path<'_>, out: &mut Findings) {
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

/// No control characters, which would let a value end the header line, and only whole `%VARIABLE%` expressions.
pub(super) fn header_value(value: &str, p: &Path<'_>, out: &mut Findings) {
    if value.bytes().any(|c| c != b'\t' && c.is_ascii_control()) {
        out.error(p, "a header value must not contain line breaks or other control characters");
    } else if let Err(reason) = format_string(value) {
        out.error(p, format!("{reason}; a literal percent sign is written %%"));
    }
}

/// Whether every `%` begins or ends an expression `%NAME%` or `%NAME(arguments)%`, or is doubled.
fn format_string(value: &str) -> Result<(), &'static str> {
    let mut rest = value;
    while let Some(i) = rest.find('%') {
        rest = &rest[i + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            rest = after;
            continue;
        }
        let end = rest.find(['%', '(']).ok_or("the expression after '%' has no closing '%'")?;
        if rest.as_bytes()[end] == b'%' {
            rest = &rest[end + 1..];
            continue;
        }
        rest = arguments(&rest[end + 1..])?.trim_start_matches(' ');
        rest = rest.strip_prefix('%').ok_or("an expression's arguments must be followed by '%'")?;
    }
    Ok(())
}

/// What follows an expression's arguments and their `)`.
fn arguments(s: &str) -> Result<&str, &'static str> {
    let (mut escaped, mut quoted) = (false, false);
    for (i, c) in s.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ')' if !quoted => return Ok(&s[i + 1..]),
            _ => {}
        }
    }
    Err("an expression's arguments have no closing ')'")
}

/// `exportTo`: `*`, `.`, names, and where `none` is set `~`.
pub(super) fn export_to(
    list: &[String],
    none_allowed: bool,
    namespace: &str,
    p: &Path<'_>,
    out: &mut Findings,
) {
    export_list(list, none_allowed, namespace, &p.key("exportTo"), out);
}

/// The same, of the field at `p`. Without a namespace `.` is that of whoever the list is for.
pub(super) fn export_list(
    list: &[String],
    none_allowed: bool,
    namespace: &str,
    p: &Path<'_>,
    out: &mut Findings,
) {
    let own = |ns: &str| ns == "." || ns == namespace;
    for (i, ns) in list.iter().enumerate() {
        let at = p.index(i);
        match ns.as_str() {
            "*" | "." => {}
            "~" if none_allowed => {}
            "~" => out.error(&at, "'~' (nobody) is only for a ServiceEntry; '.' is the own namespace"),
            _ if is_dns1123_label(ns) => {}
            _ => out.error(&at, format!("{ns:?} is neither a namespace nor one of '*', '.'")),
        }
        if list[..i].contains(ns) {
            out.error(&at, format!("{ns:?} is listed twice"));
        } else if own(ns) && list[..i].iter().any(|o| own(o)) {
            out.error(&at, format!("'.' and {namespace:?} are the same namespace here"));
        }
        if list.len() > 1 && matches!(ns.as_str(), "*" | "~") {
            out.error(&at, format!("{ns:?} cannot stand beside others"));
        }
    }
}

/// Gateway references: `mesh`, `name`, `namespace/name`, or a name with dots (1.0).
pub(super) fn gateway_names(list: &[String], p: &Path<'_>, out: &mut Findings) {
    for (i, g) in list.iter().enumerate() {
        let at = p.index(i);
        match g.split_once('/') {
            Some((ns, name)) => {
                if !is_dns_label(ns) || !is_dns_label(name) {
                    out.error(&at, format!("{g:?} is not a gateway, expected name or namespace/name"));
                }
            }
            None if !is_fqdn(g) => {
                out.error(&at, format!("{g:?} is not a gateway, expected name or namespace/name"));
            }
            None => {
                let mut labels = g.split('.');
                if let (Some(name), Some(ns)) = (labels.next(), labels.next()) {
                    out.warning(&at, format!("{g:?} is the form of 1.0; write \"{ns}/{name}\""));
                }
            }
        }
    }
}

/// Weights of a route's destinations; see the rules at the top of [`crate::validate`].
pub(super) fn weights(weights: &[i32], p: &Path<'_>, out: &mut Findings) {
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
        out.warning(p, format!("the weights add up to {sum}, not 100; they are taken as proportions"));
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
        for ok in
            ["a", "reviews", "a.b.c", "*.foo.com", "*", "*-x.foo.com", "*foo.com", "Foo.com", "a.b.", "80"]
        {
            assert!(is_wildcard_domain(ok), "{ok}");
        }
        for bad in [
            "", ".", "a..b", "a.*.b", "-a.b", "a_b", "**", "*.", "*.*.a", "a b", "a/b", "http://x",
            "10.0.0.1", "a.1",
        ] {
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

    #[test]
    fn format_strings() {
        for ok in [
            "",
            "a",
            "50%%",
            "%DOWNSTREAM_REMOTE_ADDRESS%",
            "a %REQ(x-id)% b",
            "%A([\"x\", \"y)\"])%",
            "%A(b) %",
        ] {
            assert_eq!(format_string(ok), Ok(()), "{ok}");
        }
        for bad in ["%", "50%", "a %REQ(x-id) b", "%REQ(x", "%A(b)x%", "%%%"] {
            assert!(format_string(bad).is_err(), "{bad}");
        }
    }
}
