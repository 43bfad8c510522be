//! Rate limits of requests: descriptors, and who counts by them.
//!
//! `local` counts in this process, `global` asks a service that counts for everybody. Either sees a request as
//! descriptors: lists of keys and values that the rules of its route make of it.

pub(crate) mod bucket;
pub(crate) mod global;
pub(crate) mod local;

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_model::proxy as model;

use crate::{
    config::{
        CompileError,
        route::{Action, Route},
    },
    http::{message::RequestHead, record::Record},
    matcher::{HeaderMatcher, QueryMatcher, header_value, query_value},
    worker::connection::Connection,
};

/// Keys and values.
pub(super) type Descriptor = Vec<(String, String)>;

/// A compiled [`model::RateLimit`].
#[derive(Debug)]
pub(crate) struct Rule {
    stage: u32,
    actions: Vec<Step>,
}

#[derive(Debug)]
enum Step {
    Plain(model::RateLimitAction),
    Headers { key: String, value: String, expect: bool, headers: Vec<HeaderMatcher> },
    Query { key: String, value: String, expect: bool, query: Vec<QueryMatcher> },
}

/// Rules of a route and of its virtual host.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    route: Vec<Rule>,
    host: Vec<Rule>,
    /// What the route says about those of its host.
    which: model::HostRateLimits,
}

/// What an action makes of a request.
enum Made {
    Entry(String, String),
    Nothing,
    /// The descriptor is not complete.
    Missing,
}

/// What descriptors are made of.
pub(super) struct Source<'a> {
    pub(super) conn: &'a Connection,
    pub(super) head: &'a RequestHead,
    pub(super) route: Option<&'a Route>,
    pub(super) rec: &'a Record,
}

pub(crate) fn rules(l: &[model::RateLimit]) -> Result<Vec<Rule>, CompileError> {
    l.iter().map(Rule::new).collect()
}

impl Rules {
    pub(crate) fn new(route: &model::RouteFilters, host: &model::RouteFilters) -> Result<Self, CompileError> {
        Ok(Self {
            route: rules(&route.rate_limits)?,
            host: rules(&host.rate_limits)?,
            which: route.host_rate_limits,
        })
    }

    fn of(&self, filter: model::HostRateLimits) -> impl Iterator<Item = &Rule> {
        use model::HostRateLimits as H;
        let with_host = match (self.which, filter) {
            (H::Include, _) | (H::Override, H::Include) => true,
            (H::Override, H::Override) => self.route.is_empty(),
            _ => false,
        };
        self.route.iter().chain(self.host.iter().filter(move |_| with_host))
    }
}

impl Rule {
    fn new(r: &model::RateLimit) -> Result<Self, CompileError> {
        use model::RateLimitAction as A;
        let step = |a: &A| {
            Ok(match a {
                A::HeaderMatch { key, value, expect, headers } => Step::Headers {
                    key: key.clone(),
                    value: value.clone(),
                    expect: *expect,
                    headers: headers.iter().map(HeaderMatcher::new).collect::<Result<_, _>>()?,
                },
                A::QueryMatch { key, value, expect, query } => Step::Query {
                    key: key.clone(),
                    value: value.clone(),
                    expect: *expect,
                    query: query.iter().map(QueryMatcher::new).collect::<Result<_, _>>()?,
                },
                other => Step::Plain(other.clone()),
            })
        };
        Ok(Self { stage: r.stage, actions: r.actions.iter().map(step).collect::<Result<_, CompileError>>()? })
    }

    fn descriptor(&self, s: &Source<'_>) -> Option<Descriptor> {
        let mut out = Descriptor::with_capacity(self.actions.len());
        for a in &self.actions {
            match a.make(s) {
                Made::Entry(k, v) => out.push((k, v)),
                Made::Nothing => {}
                Made::Missing => return None,
            }
        }
        (!out.is_empty()).then_some(out)
    }
}

impl Step {
    fn make(&self, s: &Source<'_>) -> Made {
        use model::RateLimitAction as A;
        let entry = |k: &str, v: &str| Made::Entry(k.to_owned(), v.to_owned());
        let optional = |k: &str, v: Option<String>, skip: bool| match v {
            Some(v) => Made::Entry(k.to_owned(), v),
            None if skip => Made::Nothing,
            None => Made::Missing,
        };
        let a = match self {
            Self::Headers { key, value, expect, headers } => {
                let all = headers.iter().all(|h| h.matches(s.head));
                return if all == *expect { entry(key, value) } else { Made::Missing };
            }
            Self::Query { key, value, expect, query } => {
                let all = query.iter().all(|q| q.matches(s.head));
                return if all == *expect { entry(key, value) } else { Made::Missing };
            }
            Self::Plain(a) => a,
        };
        match a {
            A::SourceCluster => entry("source_cluster", &s.conn.worker.options.node.workload),
            A::DestinationCluster => match s.route.map(|r| &r.action) {
                Some(Action::Forward(f)) => entry("destination_cluster", &f.destination(0).cluster.name),
                _ => Made::Missing,
            },
            A::RemoteAddress => entry("remote_address", &s.rec.remote.to_string()),
            A::MaskedRemoteAddress { v4, v6 } => {
                let bits = if matches!(s.rec.remote, IpAddr::V4(_)) { *v4 } else { *v6 };
                match IpNet::new(s.rec.remote, bits) {
                    Ok(n) => entry("masked_remote_address", &n.trunc().to_string()),
                    Err(_) => Made::Missing,
                }
            }
            A::Header { name, key, skip_if_absent } => {
                let v = header_value(s.head, name.as_bytes());
                optional(key, v.map(|v| String::from_utf8_lossy(&v).into_owned()), *skip_if_absent)
            }
            A::Query { name, key, skip_if_absent } => {
                let v = s.head.query().and_then(|q| query_value(q, name));
                optional(key, v.map(str::to_owned), *skip_if_absent)
            }
            A::Generic { key, value } => entry(key, value),
            A::Metadata { key, filter, path, default, skip_if_absent } => {
                let v = s.rec.metadata.as_ref().and_then(|m| m.get(filter, path)).and_then(|v| v.as_str());
                let v = v.filter(|v| !v.is_empty()).or(Some(default)).filter(|v| !v.is_empty());
                optional(key, v.map(str::to_owned), *skip_if_absent)
            }
            // Compiled above.
            A::HeaderMatch { .. } | A::QueryMatch { .. } => Made::Missing,
        }
    }
}

/// Descriptors of a request for a filter of this stage.
pub(super) fn descriptors(s: &Source<'_>, stage: u32, filter: model::HostRateLimits) -> Vec<Descriptor> {
    let Some(r) = s.route else { return vec![] };
    r.filters.rate_limits.of(filter).filter(|r| r.stage == stage).filter_map(|r| r.descriptor(s)).collect()
}
