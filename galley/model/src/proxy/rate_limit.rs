//! Rate limits: by buckets in the proxy, or by a service that counts for everybody.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{GrpcService, HeaderMatch, HeaderOps, QueryMatch};

/// `envoy.type.v3.TokenBucket`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Most that it holds, and what it holds at first.
    pub max_tokens: u32,
    /// Added once an interval, at least 1.
    pub tokens_per_fill: u32,
    /// At least 50 ms.
    pub fill_interval: Duration,
}

/// `envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit`: a connection without a token is
/// closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionLimit {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// A token for each connection, for all workers.
    pub bucket: TokenBucket,
}

/// `envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalRateLimit {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// Status without a token.
    pub status: u16,
    /// For requests in general; `None` only as the filter's own setting, which then limits nothing.
    pub bucket: Option<TokenBucket>,
    /// Share of requests that are counted, in 1/1,000,000; Envoy's default is none.
    pub enabled: u32,
    /// Share of those that are refused without a token, in 1/1,000,000; Envoy's default is none.
    pub enforced: u32,
    /// For requests that should have been refused and are not.
    pub request_headers: HeaderOps,
    /// For answers of refused requests.
    pub response_headers: HeaderOps,
    /// Buckets for requests that match.
    pub descriptors: Vec<LocalDescriptor>,
    /// Which rules of routes make descriptors.
    pub stage: u32,
    /// `x-ratelimit-*` (draft version 3) in answers.
    pub x_ratelimit_headers: bool,
    /// Requests with a bucket of their own take a token of the general one as well.
    pub always_consume_default: bool,
    /// gRPC status 8 instead of 14.
    pub resource_exhausted: bool,
    /// Rules instead of those of routes.
    pub rules: Vec<RateLimit>,
    /// `retry-after` in answers with status 429.
    pub retry_after: bool,
}

impl Default for LocalRateLimit {
    fn default() -> Self {
        Self {
            stat_prefix: String::new(),
            status: 429,
            bucket: None,
            enabled: 1_000_000,
            enforced: 1_000_000,
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            descriptors: vec![],
            stage: 0,
            x_ratelimit_headers: false,
            always_consume_default: true,
            resource_exhausted: false,
            rules: vec![],
            retry_after: false,
        }
    }
}

/// `LocalRateLimitDescriptor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalDescriptor {
    /// Keys and values, all of which a request's descriptor must have in this order.
    pub entries: Vec<(String, String)>,
    /// Its bucket.
    pub bucket: TokenBucket,
}

/// `envoy.config.route.v3.RateLimit`: how a request becomes a descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimit {
    /// Filters of this stage use it.
    pub stage: u32,
    /// An entry of the descriptor each; if one has nothing to say there is no descriptor.
    pub actions: Vec<RateLimitAction>,
}

/// `RateLimit.Action`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RateLimitAction {
    /// `source_cluster`: the workload of this proxy.
    SourceCluster,
    /// `destination_cluster`: the route's (first) cluster.
    DestinationCluster,
    /// `remote_address`: the client's address.
    RemoteAddress,
    /// `masked_remote_address`: the first bits of it.
    MaskedRemoteAddress {
        /// Bits of an IPv4 address.
        v4: u8,
        /// Bits of an IPv6 address.
        v6: u8,
    },
    /// A header's value.
    Header {
        /// Lower-case name.
        name: String,
        /// Key of the entry.
        key: String,
        /// Without the header the entry is left out rather than the descriptor.
        skip_if_absent: bool,
    },
    /// A query parameter's value.
    Query {
        /// Name.
        name: String,
        /// Key of the entry.
        key: String,
        /// Without the parameter the entry is left out rather than the descriptor.
        skip_if_absent: bool,
    },
    /// A constant.
    Generic {
        /// Key of the entry; `generic_key` by default.
        key: String,
        /// Its value.
        value: String,
    },
    /// A constant, if the headers match.
    HeaderMatch {
        /// Key of the entry; `header_match` by default.
        key: String,
        /// Its value.
        value: String,
        /// False: if they do not.
        expect: bool,
        /// All must match.
        headers: Vec<HeaderMatch>,
    },
    /// A constant, if the query matches.
    QueryMatch {
        /// Key of the entry; `query_match` by default.
        key: String,
        /// Its value.
        value: String,
        /// False: if it does not.
        expect: bool,
        /// All must match.
        query: Vec<QueryMatch>,
    },
    /// What an earlier filter found out.
    Metadata {
        /// Key of the entry.
        key: String,
        /// Namespace.
        filter: String,
        /// Keys from the outside in.
        path: Vec<String>,
        /// Without a value; empty is none.
        default: String,
        /// Without any value the entry is left out rather than the descriptor.
        skip_if_absent: bool,
    },
}

/// `envoy.extensions.filters.http.ratelimit.v3.RateLimit`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GlobalRateLimit {
    /// Whose limits.
    pub domain: String,
    /// Which rules of routes make descriptors.
    pub stage: u32,
    /// `envoy.service.ratelimit.v3.RateLimitService`; 20 ms unless set.
    pub service: GrpcService,
    /// Without an answer the request is refused.
    pub failure_mode_deny: bool,
    /// Status without an answer, if it is refused.
    pub status_on_error: u16,
    /// Status over the limit.
    pub status: u16,
    /// gRPC status 8 instead of 14.
    pub resource_exhausted: bool,
    /// `x-ratelimit-*` (draft version 3) in answers.
    pub x_ratelimit_headers: bool,
    /// Leave `x-envoy-ratelimited` out.
    pub no_ratelimited_header: bool,
    /// For answers of refused requests.
    pub response_headers: HeaderOps,
}

impl Default for GlobalRateLimit {
    fn default() -> Self {
        Self {
            domain: String::new(),
            stage: 0,
            service: GrpcService::default(),
            failure_mode_deny: false,
            status_on_error: 500,
            status: 429,
            resource_exhausted: false,
            x_ratelimit_headers: false,
            no_ratelimited_header: false,
            response_headers: HeaderOps::default(),
        }
    }
}

/// Which rules of a virtual host count beside those of its route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum HostRateLimits {
    /// Only if the route has none.
    #[default]
    Override,
    /// Always.
    Include,
    /// Never.
    Ignore,
}
