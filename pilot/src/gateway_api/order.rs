//! Which of several rules that match a request is the one: as the API says, the more specific path, then a method, more
//! headers, more query parameters, the older route, the route whose name is first, and the rule that is first in it.
//!
//! A pattern ranks between an equal path and a prefix, which the API leaves open.

use std::cmp::Reverse;

use mesh_model::authored::{self, gateway_api::PathMatchType};

use super::attach::Route;

/// The place of a match among all of a host; the least is asked first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Order {
    path: Reverse<(u8, usize)>,
    method: Reverse<bool>,
    headers: Reverse<usize>,
    query: Reverse<usize>,
    created: u64,
    namespace: String,
    name: String,
    /// Rule, match, and part of one.
    position: (usize, usize, usize),
}

/// A path that is equal, a pattern, a prefix, and a part of a path that says least.
const EXACT: u8 = 3;
const PATTERN: u8 = 2;
const PREFIX: u8 = 1;
const LEAST: u8 = 0;

/// How specific a path is.
pub(super) fn path(kind: PathMatchType, value: &str) -> (u8, usize) {
    match kind {
        PathMatchType::Exact => (EXACT, value.chars().count()),
        PathMatchType::RegularExpression => (PATTERN, value.chars().count()),
        PathMatchType::PathPrefix => match value.trim_end_matches('/') {
            // Everything, after whatever asks for anything.
            "" => (LEAST, 0),
            p => (PREFIX, p.chars().count()),
        },
    }
}

/// How specific a gRPC method is: first the service counts.
pub(super) fn grpc(exact: bool, service: &str, method: &str) -> (u8, usize) {
    let length = |s: &str| s.chars().count();
    match (exact, service, method) {
        (_, "", "") => (LEAST, 0),
        (_, "", m) => (LEAST, length(m)),
        (false, s, m) => (PATTERN, length(s) + length(m)),
        (true, s, "") => (PREFIX, length(s)),
        (true, s, m) => (EXACT, length(s) + length(m)),
    }
}

impl Order {
    pub(super) fn new(
        route: &Route<'_>,
        path: (u8, usize),
        m: &authored::HttpMatchRequest,
        position: (usize, usize, usize),
    ) -> Self {
        Self {
            path: Reverse(path),
            method: Reverse(m.method.is_some()),
            headers: Reverse(m.headers.len()),
            query: Reverse(m.query_params.len()),
            created: route.created(),
            namespace: route.namespace().to_owned(),
            name: route.name().to_owned(),
            position,
        }
    }

    pub(super) fn created(&self) -> u64 {
        self.created
    }
}

/// A rule with one of its matches.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) order: Order,
    pub(super) route: authored::HttpRoute,
}

/// Rules in the order that they are asked in.
pub(super) fn sorted(mut list: Vec<Candidate>) -> Vec<authored::HttpRoute> {
    list.sort_by(|a, b| a.order.cmp(&b.order));
    list.into_iter().map(|c| c.route).collect()
}
