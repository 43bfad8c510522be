//! Filters, shares and limits of a rule.

use mesh_model::authored::{
    self, CorsPolicy, FaultAbort, HeaderOperations, Headers, HttpFaultInjection, HttpMirrorPolicy,
    HttpRedirect, HttpRetry, HttpRewrite, HttpRouteDestination, Percent, RegexRewrite, StringMatch,
    UnmatchedPreflights,
    gateway_api::{
        Cors, FilterType, HeaderModifier, PathModifier, RequestMirror, RequestRedirect, Retry, RouteFilter,
        Timeouts,
    },
};

use super::{
    backends::{Referrer, Split, destination},
    http::Place,
    known::Known,
};

/// Conditions under which a request is tried again besides the codes that a rule names: it has not been processed.
const RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled,reset-before-request";
/// Tries beyond the first, unless a rule says how many.
const ATTEMPTS: i32 = 2;
/// Seconds that a preflight may be cached unless the filter says.
const MAX_AGE: i32 = 5;

/// Whether nobody here knows what a filter does.
pub(super) fn is_unsupported(f: &RouteFilter) -> bool {
    matches!(f.filter_type, Some(FilterType::ExtensionRef) | None)
}

/// What becomes of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PathChange {
    None,
    /// All of it.
    Full(String),
    /// The prefix that matched; empty for none, otherwise without a slash at the end.
    Prefix(String),
}

impl PathChange {
    fn new(m: Option<&PathModifier>) -> Self {
        let Some(m) = m else { return Self::None };
        match (&m.replace_full_path, &m.replace_prefix_match) {
            (Some(p), _) => Self::Full(if p.is_empty() { "/".to_owned() } else { p.clone() }),
            (None, Some(p)) => Self::Prefix(p.trim_end_matches('/').to_owned()),
            (None, None) => Self::None,
        }
    }

    /// The conditions on the path that a match becomes, with what replaces each.
    ///
    /// A prefix that is replaced by none takes its slash along, which a request for the prefix itself does not have.
    pub(super) fn parts(
        &self,
        prefix: Option<&str>,
        uri: Option<&StringMatch>,
    ) -> Vec<(Option<StringMatch>, String)> {
        match (self, prefix) {
            (Self::Prefix(with), Some("")) => vec![(uri.cloned(), format!("{with}/"))],
            (Self::Prefix(with), Some(p)) if with.is_empty() => {
                let exact = Some(StringMatch::Exact(p.to_owned()));
                vec![(exact, "/".to_owned()), (Some(StringMatch::Prefix(format!("{p}/"))), "/".to_owned())]
            }
            (Self::Prefix(with) | Self::Full(with), _) => vec![(uri.cloned(), with.clone())],
            (Self::None, _) => vec![(uri.cloned(), String::new())],
        }
    }

    /// Makes the change `with` in a route, whose match is a prefix or not.
    pub(super) fn set(&self, route: &mut authored::HttpRoute, prefix: bool, with: String) {
        let redirect = route.redirect.as_mut();
        match (self, redirect) {
            (Self::None, _) => {}
            (Self::Full(_), Some(d)) => d.uri = with,
            (Self::Prefix(_), Some(d)) => d.prefix_rewrite = with,
            (Self::Full(_), None) => {
                let rewrite = route.rewrite.get_or_insert_with(HttpRewrite::default);
                // The whole path, not the part that matched.
                let rewritten = with.replace('\\', "\\\\");
                rewrite.uri_regex_rewrite =
                    Some(RegexRewrite { pattern: "^.*$".to_owned(), rewrite: rewritten });
            }
            (Self::Prefix(_), None) if prefix => {
                route.rewrite.get_or_insert_with(HttpRewrite::default).uri = with;
            }
            // Validation has refused it.
            (Self::Prefix(_), None) => {}
        }
    }
}

/// Takes the filters into a route, and says what becomes of its path.
pub(super) fn filters(
    known: &Known<'_>,
    from: Referrer<'_>,
    list: &[RouteFilter],
    place: &Place,
    out: &mut authored::HttpRoute,
) -> PathChange {
    let mut change = PathChange::None;
    out.headers = headers(list);
    for f in list {
        if let Some(r) = &f.request_redirect {
            out.redirect = Some(redirect(r, place));
            change = PathChange::new(r.path.as_ref());
        }
        if let Some(w) = &f.url_rewrite {
            if let Some(h) = &w.hostname {
                out.rewrite.get_or_insert_with(HttpRewrite::default).authority.clone_from(h);
            }
            change = PathChange::new(w.path.as_ref());
        }
        if let Some(m) = &f.request_mirror
            && let Some(Ok(d)) = m.backend_ref.as_ref().map(|b| destination(known, from, b))
        {
            out.mirrors.push(HttpMirrorPolicy { destination: Some(d), percentage: share(m) });
        }
        if let Some(c) = &f.cors {
            out.cors_policy = Some(cors(c));
        }
    }
    change
}

fn share(m: &RequestMirror) -> Option<Percent> {
    let value = match (m.percent, &m.fraction) {
        (Some(p), _) => f64::from(p),
        (None, Some(f)) => 100.0 * f64::from(f.numerator) / f64::from(f.denominator.unwrap_or(100).max(1)),
        (None, None) => return None,
    };
    Some(Percent { value })
}

fn operations(m: &HeaderModifier) -> HeaderOperations {
    let map = |l: &[authored::gateway_api::HeaderValue]| {
        // Of several with one name the first counts.
        l.iter().rev().map(|h| (h.name.to_ascii_lowercase(), h.value.clone())).collect()
    };
    let remove = m.remove.iter().map(|n| n.to_ascii_lowercase()).collect();
    HeaderOperations { set: map(&m.set), add: map(&m.add), remove }
}

/// Changes of headers among filters.
pub(super) fn headers(list: &[RouteFilter]) -> Option<Headers> {
    let request = list.iter().find_map(|f| f.request_header_modifier.as_ref()).map(operations);
    let response = list.iter().find_map(|f| f.response_header_modifier.as_ref()).map(operations);
    (request.is_some() || response.is_some()).then_some(Headers { request, response })
}

fn default_port(scheme: &str) -> u32 {
    if scheme == "https" { 443 } else { 80 }
}

/// A redirect. Its port is the one it names, else that of the scheme it names, else the listener's; the default port of a
/// scheme is not written.
fn redirect(r: &RequestRedirect, place: &Place) -> HttpRedirect {
    let scheme = r.scheme.clone().unwrap_or_default();
    let host = r.hostname.clone().unwrap_or_default();
    let port = match (r.port, place.listener) {
        (Some(p), None) => Some(p),
        (None, None) => None,
        (wanted, Some((own, old))) => {
            let new = if scheme.is_empty() { old } else { scheme.as_str() };
            let port = wanted.unwrap_or(if scheme.is_empty() { own } else { default_port(new) });
            if host.is_empty() && port == own && new == old {
                // What the request says stays.
                None
            } else if port == default_port(new) && (!host.is_empty() || own == default_port(old)) {
                None
            } else {
                Some(port)
            }
        }
    };
    let redirect_code = r.status_code.unwrap_or(302);
    HttpRedirect { scheme, authority: host, port, redirect_code, ..HttpRedirect::default() }
}

fn cors(c: &Cors) -> CorsPolicy {
    let origin = |o: &String| match o.split_once('*') {
        None => StringMatch::Exact(o.clone()),
        Some(_) => {
            let parts: Vec<String> = o.split('*').map(escaped).collect();
            StringMatch::Regex(parts.join(".*"))
        }
    };
    let credentials = c.allow_credentials == Some(true);
    let mut allow_methods = c.allow_methods.clone();
    // A browser takes `*` by the letter if there are credentials.
    if credentials && allow_methods.iter().any(|m| m == "*") {
        allow_methods =
            ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"].map(str::to_owned).to_vec();
    }
    let seconds = u64::try_from(c.max_age.unwrap_or(MAX_AGE)).unwrap_or_default();
    CorsPolicy {
        allow_origins: c.allow_origins.iter().map(origin).collect(),
        allow_methods,
        allow_headers: c.allow_headers.clone(),
        expose_headers: c.expose_headers.clone(),
        max_age: Some(std::time::Duration::from_secs(seconds).into()),
        allow_credentials: c.allow_credentials,
        unmatched_preflights: UnmatchedPreflights::Ignore,
        ..CorsPolicy::default()
    }
}

/// A text as a pattern that means it.
fn escaped(s: &str) -> String {
    let mut out = String::with_capacity(s.len() + 4);
    for c in s.chars() {
        if !c.is_ascii_alphanumeric() {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Destinations by weight. The share of backends that are none is answered with 500.
pub(super) fn destinations(shares: &Split<'_>, out: &mut authored::HttpRoute) {
    out.route = shares
        .valid
        .iter()
        .map(|(d, weight, b)| HttpRouteDestination {
            destination: Some(d.clone()),
            weight: *weight,
            headers: headers(&b.filters),
        })
        .collect();
    if shares.lost > 0 {
        let abort = FaultAbort {
            http_status: Some(500),
            percentage: Some(Percent { value: shares.lost_percent() }),
            ..FaultAbort::default()
        };
        out.fault = Some(HttpFaultInjection { abort: Some(abort), delay: None });
    }
}

/// Limits of time, and retries.
pub(super) fn timing(out: &mut authored::HttpRoute, timeouts: Option<&Timeouts>, retry: Option<&Retry>) {
    let span = |s: &Option<String>| {
        let parsed = s.as_deref().and_then(|s| s.parse::<authored::Duration>().ok());
        // Zero is no limit.
        parsed.filter(|d| !d.0.is_zero())
    };
    out.timeout = timeouts.and_then(|t| span(&t.request));
    let each = timeouts.and_then(|t| span(&t.backend_request));
    if retry.is_none() && each.is_none() {
        return;
    }
    let mut made = HttpRetry { attempts: ATTEMPTS, per_try_timeout: each, ..HttpRetry::default() };
    if let Some(r) = retry {
        made.attempts = r.attempts.unwrap_or(ATTEMPTS);
        made.backoff = span(&r.backoff);
        if !r.codes.is_empty() {
            let codes: Vec<String> = r.codes.iter().map(ToString::to_string).collect();
            made.retry_on = format!("{RETRY_ON},{}", codes.join(","));
        }
    }
    out.retries = Some(made);
}
