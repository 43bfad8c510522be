//! Host names: short forms, wildcards and which of several matches is the most specific.

/// Domain of services that a platform registry knows.
pub const SERVICE_DOMAIN: &str = "svc.cluster.local";
/// Domain of services of any cluster (MCS API, DNS specification).
pub const CLUSTERSET_DOMAIN: &str = "svc.clusterset.local";

/// Host of a platform service.
#[must_use]
pub fn service_host(name: &str, namespace: &str) -> String {
    format!("{name}.{namespace}.{SERVICE_DOMAIN}")
}

/// Host of a service in one member only.
#[must_use]
pub fn member_host(name: &str, namespace: &str, cluster: &str) -> String {
    format!("{name}.{namespace}.svc.{cluster}.clusterset.local")
}

/// A host as written in a rule of `namespace`: a name without a dot is short for the service of
/// that name in the rule's own namespace.
#[must_use]
pub fn resolve(host: &str, namespace: &str) -> String {
    if host.contains('.') || host == "*" {
        host.to_ascii_lowercase()
    } else {
        service_host(&host.to_ascii_lowercase(), namespace)
    }
}

/// Names that a caller in `namespace` may mean by a lower-case host, most likely first: as a resolver with the
/// namespace's search list would try them.
#[must_use]
pub fn searched(host: &str, namespace: &str) -> Vec<String> {
    let mut tries = vec![host.to_owned()];
    if !host.contains('.') {
        tries.insert(0, service_host(host, namespace));
    }
    if let Some((name, namespace)) = host.split_once('.').filter(|(_, ns)| !ns.contains('.')) {
        tries.push(service_host(name, namespace));
    }
    if host.ends_with(".svc") {
        tries.push(format!("{host}.cluster.local"));
    }
    tries
}

/// Whether `pattern` (exact, `*` or `*suffix`) covers `host`. A wildcard host is covered by a pattern
/// that covers all of it.
#[must_use]
pub fn covers(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        None => pattern == host,
        Some(suffix) => {
            let rest = host.strip_prefix('*').unwrap_or(host);
            // `*.foo.com` does not cover `foo.com`, and covers itself.
            rest.ends_with(suffix) && (rest.len() > suffix.len() || host.starts_with('*'))
        }
    }
}

/// Whether two hosts, either of which may be a wildcard, have names in common.
#[must_use]
pub fn overlaps(a: &str, b: &str) -> bool {
    covers(a, b) || covers(b, a)
}

/// A name that cannot be looked up is never empty or absurdly long.
#[must_use]
pub fn plausible(host: &str) -> bool {
    !host.is_empty()
        && host.len() <= 253
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'*'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_belong_to_the_namespace_of_the_rule() {
        assert_eq!(resolve("reviews", "books"), "reviews.books.svc.cluster.local");
        assert_eq!(resolve("Reviews.other", "books"), "reviews.other");
        assert_eq!(resolve("*", "books"), "*");
    }

    #[test]
    fn wildcards() {
        for (p, h, yes) in [
            ("*", "a.b", true),
            ("*.foo.com", "a.foo.com", true),
            ("*.foo.com", "a.b.foo.com", true),
            ("*.foo.com", "foo.com", false),
            ("*.foo.com", "*.foo.com", true),
            ("*.com", "*.foo.com", true),
            ("*.foo.com", "*.com", false),
            ("a.b", "a.b", true),
            ("a.b", "*.b", false),
        ] {
            assert_eq!(covers(p, h), yes, "{p} {h}");
        }
        assert!(overlaps("a.foo.com", "*.foo.com"));
    }
}
