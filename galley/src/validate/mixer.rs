//! Rules of Mixer's kinds that need no knowledge of expressions or of other documents; mixer checks
//! the rest when it loads them, and rejects by name as well.

use mesh_model::authored::{
    DenierParams, Kind, ListCheckerParams, ListEntryType, MemQuotaParams, PrometheusKind, PrometheusParams,
    QuotaSpec, QuotaSpecBinding, Rule, Spec, StdioParams, StdioStream,
};

use super::common::{self, Findings};
use crate::path::Path;

/// Adapters that `handler` can name, with the kind that has the same parameters.
const ADAPTERS: &[(&str, Kind)] = &[
    ("denier", Kind::Denier),
    ("listchecker", Kind::ListChecker),
    ("memquota", Kind::MemQuota),
    ("stdio", Kind::Stdio),
    ("prometheus", Kind::Prometheus),
];

/// Templates that `instance` can name.
const TEMPLATES: &[(&str, Kind)] = &[
    ("checknothing", Kind::CheckNothing),
    ("reportnothing", Kind::ReportNothing),
    ("listentry", Kind::ListEntry),
    ("quota", Kind::Quota),
    ("logentry", Kind::LogEntry),
    ("metric", Kind::Metric),
];

pub(super) fn check(spec: &Spec, p: &Path<'_>, out: &mut Findings) {
    match spec {
        Spec::Rule(r) => rule(r, p, out),
        Spec::Handler(h) => {
            if !h.adapter.is_empty() || h.connection.is_some() {
                out.error(&p.key("adapter"), "adapters out of process are not supported yet");
            }
            nested(&h.compiled_adapter, "compiledAdapter", ADAPTERS, h.params.as_ref(), p, out);
        }
        Spec::Instance(i) => {
            if !i.template.is_empty() {
                out.error(&p.key("template"), "templates out of process are not supported yet");
            }
            if !i.attribute_bindings.is_empty() {
                out.error(&p.key("attributeBindings"), "attributeBindings are not supported yet");
            }
            nested(&i.compiled_template, "compiledTemplate", TEMPLATES, i.params.as_ref(), p, out);
        }
        Spec::Denier(d) => denier(d, p, out),
        Spec::ListChecker(l) => list_checker(l, p, out),
        Spec::MemQuota(m) => mem_quota(m, p, out),
        Spec::Stdio(s) => stdio(s, p, out),
        Spec::Prometheus(x) => prometheus(x, p, out),
        Spec::ListEntry(l) if l.value.is_empty() => out.error(&p.key("value"), "an expression is required"),
        Spec::Metric(m) if m.value.is_empty() => out.error(&p.key("value"), "an expression is required"),
        Spec::QuotaSpec(q) => quota_spec(q, p, out),
        Spec::QuotaSpecBinding(b) => quota_spec_binding(b, p, out),
        _ => {}
    }
}

fn rule(r: &Rule, p: &Path<'_>, out: &mut Findings) {
    let actions = p.key("actions");
    if r.actions.is_empty() {
        out.error(&actions, "at least one action is required");
    }
    for (i, a) in r.actions.iter().enumerate() {
        let at = actions.index(i);
        if a.handler.is_empty() {
            out.error(&at.key("handler"), "a handler is required");
        }
        if a.instances.is_empty() {
            out.error(&at.key("instances"), "at least one instance is required");
        }
        if !a.name.is_empty() {
            out.error(&at.key("name"), "named actions are not supported yet");
        }
    }
    for (set, field) in [
        (r.sampling.is_some(), "sampling"),
        (!r.request_header_operations.is_empty(), "requestHeaderOperations"),
        (!r.response_header_operations.is_empty(), "responseHeaderOperations"),
    ] {
        if set {
            out.error(&p.key(field), format!("{field} is not supported yet"));
        }
    }
}

/// Checks parameters that are written inside of a `handler` or `instance`.
fn nested(
    name: &str,
    field: &str,
    known: &[(&str, Kind)],
    params: Option<&serde_json::Value>,
    p: &Path<'_>,
    out: &mut Findings,
) {
    let Some((_, kind)) = known.iter().find(|(n, _)| *n == name) else {
        let names: Vec<_> = known.iter().map(|(n, _)| *n).collect();
        out.error(&p.key(field), format!("unsupported {field} {name:?}, supported are {}", names.join(", ")));
        return;
    };
    let at = p.key("params");
    match Spec::from_json(*kind, params.cloned().unwrap_or_default()) {
        Ok(spec) => check(&spec, &at, out),
        Err(e) => out.error(&at, e.to_string()),
    }
}

fn denier(d: &DenierParams, p: &Path<'_>, out: &mut Findings) {
    if let Some(s) = &d.status
        && !(1..=16).contains(&s.code)
    {
        out.error(&p.key("status").key("code"), format!("{} is not the code of an error (1..16)", s.code));
    }
    if d.valid_use_count.is_some_and(|n| n < 0) {
        out.error(&p.key("validUseCount"), "must not be negative");
    }
}

fn list_checker(l: &ListCheckerParams, p: &Path<'_>, out: &mut Findings) {
    if !l.provider_url.is_empty() {
        out.error(&p.key("providerUrl"), "lists from a URL are not supported yet; use overrides");
    } else if l.overrides.is_empty() {
        out.error(&p.key("overrides"), "a list without entries");
    }
    if l.caching_use_count.is_some_and(|n| n < 0) {
        out.error(&p.key("cachingUseCount"), "must not be negative");
    }
    let at = p.key("overrides");
    for (i, o) in l.overrides.iter().enumerate() {
        match l.entry_type {
            ListEntryType::IpAddresses => common::subnet(o, &at.index(i), out),
            ListEntryType::Regex => common::regex(o, &at.index(i), out),
            _ => {}
        }
    }
}

fn mem_quota(m: &MemQuotaParams, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("quotas");
    if m.quotas.is_empty() {
        out.error(&at, "at least one quota is required");
    }
    if m.min_deduplication_duration.is_some_and(|d| d.0.is_zero()) {
        out.error(&p.key("minDeduplicationDuration"), "must be more than zero");
    }
    for (i, q) in m.quotas.iter().enumerate() {
        let at = at.index(i);
        if q.name.is_empty() {
            out.error(&at.key("name"), "the name of a quota instance is required");
        }
        if m.quotas[..i].iter().any(|o| o.name == q.name) {
            out.error(&at.key("name"), format!("quota {:?} is listed twice", q.name));
        }
        common::not_negative(q.max_amount, &at.key("maxAmount"), out);
        let overrides = at.key("overrides");
        for (j, o) in q.overrides.iter().enumerate() {
            let at = overrides.index(j);
            common::not_negative(o.max_amount, &at.key("maxAmount"), out);
            if o.dimensions.is_empty() {
                out.error(&at.key("dimensions"), "at least one dimension is required");
            }
        }
    }
}

fn stdio(s: &StdioParams, p: &Path<'_>, out: &mut Findings) {
    if matches!(s.log_stream, StdioStream::File | StdioStream::RotatedFile) {
        out.error(&p.key("logStream"), "only STDOUT and STDERR are supported yet");
    }
}

fn prometheus(x: &PrometheusParams, p: &Path<'_>, out: &mut Findings) {
    let name_ok = |s: &str| {
        s.bytes()
            .enumerate()
            .all(|(i, c)| c.is_ascii_alphabetic() || c == b'_' || i > 0 && c.is_ascii_digit())
    };
    let at = p.key("metrics");
    for (i, m) in x.metrics.iter().enumerate() {
        let at = at.index(i);
        if m.instance_name.is_empty() {
            out.error(&at.key("instanceName"), "the name of a metric instance is required");
        }
        for (s, field) in [(&m.namespace, "namespace"), (&m.name, "name")] {
            if !name_ok(s) {
                out.error(&at.key(field), format!("{s:?} is not part of a metric's name"));
            }
        }
        for (j, l) in m.label_names.iter().enumerate() {
            if l.is_empty() || !name_ok(l) || l.starts_with("__") {
                out.error(&at.key("labelNames").index(j), format!("{l:?} is not a label name"));
            }
        }
        if m.kind == PrometheusKind::Unspecified {
            out.error(&at.key("kind"), "one of GAUGE, COUNTER and DISTRIBUTION is required");
        }
        if let Some(b) = &m.buckets {
            let at = at.key("buckets");
            let set = usize::from(b.linear_buckets.is_some())
                + usize::from(b.exponential_buckets.is_some())
                + usize::from(b.explicit_buckets.is_some());
            if set != 1 {
                out.error(
                    &at,
                    "exactly one of linearBuckets, exponentialBuckets and explicitBuckets is required",
                );
            }
            if let Some(e) = &b.explicit_buckets
                && !e.bounds.is_sorted_by(|a, b| a < b)
            {
                out.error(&at.key("explicitBuckets").key("bounds"), "bounds must ascend");
            }
            let finite = b.linear_buckets.as_ref().map_or(0, |l| l.num_finite_buckets)
                + b.exponential_buckets.as_ref().map_or(0, |l| l.num_finite_buckets);
            if finite > 200 {
                out.error(&at, "more than 200 buckets");
            }
            if b.exponential_buckets.as_ref().is_some_and(|e| e.growth_factor <= 1.0 || e.scale <= 0.0) {
                out.error(&at.key("exponentialBuckets"), "growthFactor must be above 1 and scale above 0");
            }
            if b.linear_buckets.as_ref().is_some_and(|l| l.width <= 0.0) {
                out.error(&at.key("linearBuckets").key("width"), "must be above 0");
            }
        }
    }
    out.unenforced(x.metrics_expiration_policy.is_some(), p, "metricsExpirationPolicy");
}

fn quota_spec(q: &QuotaSpec, p: &Path<'_>, out: &mut Findings) {
    let at = p.key("rules");
    if q.rules.is_empty() {
        out.error(&at, "at least one rule is required");
    }
    for (i, r) in q.rules.iter().enumerate() {
        let at = at.index(i);
        if r.quotas.is_empty() {
            out.error(&at.key("quotas"), "at least one quota is required");
        }
        for (j, c) in r.quotas.iter().enumerate() {
            let at = at.key("quotas");
            let at = at.index(j);
            if c.quota.is_empty() {
                out.error(&at.key("quota"), "the name of a quota is required");
            }
            if c.charge <= 0 {
                out.error(&at.key("charge"), "must be more than 0");
            }
        }
        for (j, m) in r.matches.iter().enumerate() {
            let at = at.key("match");
            let at = at.index(j);
            if m.clause.is_empty() {
                out.error(&at.key("clause"), "at least one attribute is required");
            }
            for (name, x) in &m.clause {
                common::string_match(x, &at.key("clause").key(name), out);
            }
        }
    }
    out.warning(p, "QuotaSpec is accepted but not enforced yet: proxies charge no quotas");
}

fn quota_spec_binding(b: &QuotaSpecBinding, p: &Path<'_>, out: &mut Findings) {
    if b.services.is_empty() {
        out.error(&p.key("services"), "at least one service is required");
    }
    if b.quota_specs.is_empty() {
        out.error(&p.key("quotaSpecs"), "at least one QuotaSpec is required");
    }
    let at = p.key("services");
    for (i, s) in b.services.iter().enumerate() {
        let at = at.index(i);
        if s.name.is_empty() == s.service.is_empty() {
            out.error(&at, "exactly one of name and service is required");
        }
        if !s.service.is_empty() && (!s.namespace.is_empty() || !s.domain.is_empty()) {
            out.error(&at, "namespace and domain belong to name, not to service");
        }
    }
    let at = p.key("quotaSpecs");
    for (i, q) in b.quota_specs.iter().enumerate() {
        if q.name.is_empty() {
            out.error(&at.index(i).key("name"), "a name is required");
        }
    }
    out.warning(p, "QuotaSpecBinding is accepted but not enforced yet: proxies charge no quotas");
}
