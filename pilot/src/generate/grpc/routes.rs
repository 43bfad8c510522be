//! Routes as a gRPC client can execute them (gRFCs A28, A31, A33, A44).
//!
//! A call is a `POST` of `/service/method` without a query. A condition that is decided by that is decided here; a route
//! whose condition the client cannot check is left out, as one that it would take without the condition would be worse.

use std::time::Duration;

use mesh_model::{
    Rare,
    proxy::{
        Forward, HashPolicy, HeaderMatch, HeaderValueMatch, PathMatch, RetryOn, RetryPolicy, Route,
        RouteAction, StreamLimit, StringMatch, StringMatchKind,
    },
};

use super::{super::http::default_retry, Left};

const METHOD: &str = "POST";
/// Headers of one route whose values it may not be for: each doubles the routes.
const MAX_WITHOUT: usize = 4;
/// gRPC makes no more tries than this, the first included.
const TRIES: u32 = 5;
/// Statuses that gRPC retries.
const RETRIED: [RetryOn; 5] = [
    RetryOn::Cancelled,
    RetryOn::DeadlineExceeded,
    RetryOn::Internal,
    RetryOn::ResourceExhausted,
    RetryOn::Unavailable,
];

/// The routes that apply to calls, with what a client can do of each.
pub(super) fn adapted(routes: Vec<Route>, left: &mut Left) -> Vec<Route> {
    routes.into_iter().flat_map(|r| one(r, left).map_or_else(Vec::new, |r| split(r, left))).collect()
}

/// Routes that are not for a value of a header twice: for calls without the header, and for those with other values. The
/// client takes a condition on a missing header for none that holds, inverted or not.
fn split(r: Route, left: &mut Left) -> Vec<Route> {
    let inverted = |h: &HeaderMatch| h.invert && matches!(h.value, HeaderValueMatch::Value(_));
    let at: Vec<usize> =
        r.matches.headers.iter().enumerate().filter(|(_, h)| inverted(h)).map(|(at, _)| at).collect();
    if at.len() > MAX_WITHOUT {
        left.insert("routes that are not for values of more than four headers");
        return vec![];
    }
    let mut out = vec![r];
    for at in at {
        out = out.into_iter().flat_map(|r| [without(r.clone(), at), r]).collect();
    }
    out
}

/// The same for requests without one of its headers.
fn without(mut r: Route, at: usize) -> Route {
    if let Some(h) = r.matches.headers.get_mut(at) {
        (h.value, h.invert, h.missing_is_empty) = (HeaderValueMatch::Present(false), false, false);
    }
    r
}

fn one(mut r: Route, left: &mut Left) -> Option<Route> {
    // No call has a parameter.
    if !r.matches.query.is_empty() {
        return None;
    }
    if !r.matches.metadata.is_empty() {
        left.insert("routes by claims of tokens");
        return None;
    }
    r.matches.path = path(r.matches.path)?;
    let mut headers = Vec::new();
    for h in std::mem::take(&mut r.matches.headers) {
        match h.name.as_str() {
            ":method" => {
                if holds(&h, METHOD, left)? {
                    continue;
                }
                return None;
            }
            ":scheme" | ":authority" => {
                left.insert("routes by scheme or authority");
                return None;
            }
            // Binary values are not looked at, whatever they are.
            n if n.ends_with("-bin") => {
                left.insert("routes by a binary header");
                return None;
            }
            _ => headers.push(h),
        }
    }
    r.matches.headers = headers;
    match &mut r.action {
        RouteAction::Forward(f) => forward(f, left),
        // The client fails such calls, which are not for anybody further down.
        RouteAction::Redirect(_) => {
            left.insert("redirects: such calls fail");
        }
        RouteAction::Direct(_) => {
            left.insert("direct responses: such calls fail");
        }
    }
    if r.request_headers != Rare::default() || r.response_headers != Rare::default() {
        left.insert("header changes");
        (r.request_headers, r.response_headers) = (Rare::default(), Rare::default());
    }
    // Browsers' business, and filters of nobody's.
    r.cors = None;
    r.filters = Rare::default();
    Some(r)
}

/// `None` if no call has such a path.
fn path(p: PathMatch) -> Option<PathMatch> {
    match p {
        PathMatch::SegmentPrefix(s) => match s.matches('/').count() {
            0 | 1 => Some(PathMatch::Prefix(format!("{s}/"))),
            2 => Some(PathMatch::Exact(s)),
            _ => None,
        },
        PathMatch::Connect => None,
        other => Some(other),
    }
}

/// Whether a condition holds for a value that is known now; `None` if that cannot be said.
fn holds(h: &HeaderMatch, value: &str, left: &mut Left) -> Option<bool> {
    let yes = match &h.value {
        HeaderValueMatch::Present(wanted) => *wanted,
        HeaderValueMatch::Value(m) => match matches(m, value) {
            Some(yes) => yes,
            None => {
                left.insert("routes by a method's pattern");
                return None;
            }
        },
    };
    Some(yes != h.invert)
}

fn matches(m: &StringMatch, value: &str) -> Option<bool> {
    let fold = |s: &str| if m.ignore_case { s.to_ascii_lowercase() } else { s.to_owned() };
    let value = fold(value);
    Some(match &m.kind {
        StringMatchKind::Exact(s) => value == fold(s),
        StringMatchKind::Prefix(s) => value.starts_with(&fold(s)),
        StringMatchKind::Suffix(s) => value.ends_with(&fold(s)),
        StringMatchKind::Contains(s) => value.contains(&fold(s)),
        StringMatchKind::Regex(s) => regex::Regex::new(&format!("^(?:{s})$")).ok()?.is_match(&value),
    })
}

fn forward(f: &mut Forward, left: &mut Left) {
    if let Some(t) = f.timeout.take() {
        f.max_stream = Some(StreamLimit { max: Some(t), ..StreamLimit::default() });
    }
    f.retry = f.retry.take().and_then(|p| retry(*p, left)).map(Box::new);
    if f.prefix_rewrite.take().is_some() | f.regex_rewrite.take().is_some() | f.host_rewrite.take().is_some()
    {
        left.insert("rewrites");
    }
    if !std::mem::take(&mut f.mirrors).is_empty() {
        left.insert("mirroring");
    }
    let inputs = f.hash.len();
    f.hash.retain(|h| matches!(h, HashPolicy::Header(_)));
    if f.hash.len() < inputs {
        left.insert("consistent hashing by anything but a header");
    }
    for c in &mut f.clusters {
        if c.request_headers != Rare::default() || c.response_headers != Rare::default() {
            left.insert("header changes");
            (c.request_headers, c.response_headers) = (Rare::default(), Rare::default());
        }
    }
    f.idle_timeout = None;
    f.hedge = false;
}

fn retry(p: RetryPolicy, left: &mut Left) -> Option<RetryPolicy> {
    let on: Vec<RetryOn> = p.on.iter().copied().filter(|o| RETRIED.contains(o)).collect();
    // What is said for every service is not worth a word.
    if on.len() < p.on.len() && p.on != default_retry().on {
        left.insert("retries on anything but statuses of gRPC");
    }
    if p.per_try_timeout.is_some() {
        left.insert("perTryTimeout");
    }
    if p.attempts >= TRIES {
        left.insert("more than four retries");
    }
    let base = p.base_interval.max(Duration::from_millis(1));
    (!on.is_empty()).then(|| RetryPolicy {
        on,
        attempts: p.attempts.min(TRIES - 1),
        base_interval: base,
        max_interval: p.max_interval.max(base),
        ..RetryPolicy::default()
    })
}
