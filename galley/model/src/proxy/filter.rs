//! HTTP filters that ask somebody else about a request.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{MetadataMatch, StringMatch};

/// `envoy.config.core.v3.GrpcService` with `envoy_grpc`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct GrpcService {
    /// Upstream cluster; it must speak HTTP/2.
    pub cluster: String,
    /// `:authority`; empty is the cluster's name.
    pub authority: String,
    /// Limit of one call; `None` is the filter's default.
    pub timeout: Option<Duration>,
    /// Metadata of every call.
    pub metadata: Vec<(String, String)>,
}

/// `envoy.extensions.filters.http.ext_authz.v3.ExtAuthz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtAuthz {
    /// Who decides.
    pub service: AuthzService,
    /// Without an answer the request passes.
    pub failure_mode_allow: bool,
    /// And then carries `x-envoy-auth-failure-mode-allowed: true`.
    pub failure_mode_allow_header_add: bool,
    /// Show the body as well.
    pub with_request_body: Option<BodySettings>,
    /// Status without an answer; Envoy's default is 403.
    pub status_on_error: u16,
    /// Headers that are shown. Empty: over gRPC all, over HTTP none but those that are always shown.
    pub allowed_headers: Vec<StringMatch>,
    /// Headers that are not, even so.
    pub disallowed_headers: Vec<StringMatch>,
    /// Metadata of earlier filters that is shown, by namespace (gRPC only).
    pub metadata_namespaces: Vec<String>,
    /// Show the server name of the TLS session (gRPC only).
    pub include_tls_session: bool,
    /// Share of requests that are asked about, in 1/1,000,000.
    pub enabled: u32,
    /// Only requests of which earlier filters found out this are asked about.
    pub enabled_metadata: Option<MetadataMatch>,
    /// A yes that changes the request has its route looked for again.
    pub clear_route_cache: bool,
    /// Only requests of routes that name it so are asked about ([`RouteFilters::authorizers`]); empty is of all. On the
    /// wire it is the filter's name, and the filter is `disabled`.
    ///
    /// [`RouteFilters::authorizers`]: super::RouteFilters::authorizers
    pub on_routes: String,
}

impl Default for ExtAuthz {
    fn default() -> Self {
        Self {
            service: AuthzService::Grpc(GrpcService::default()),
            failure_mode_allow: false,
            failure_mode_allow_header_add: false,
            with_request_body: None,
            status_on_error: 403,
            allowed_headers: vec![],
            disallowed_headers: vec![],
            metadata_namespaces: vec![],
            include_tls_session: false,
            enabled: 1_000_000,
            enabled_metadata: None,
            clear_route_cache: false,
            on_routes: String::new(),
        }
    }
}

/// `envoy.extensions.filters.network.ext_authz.v3.ExtAuthz`: a connection is asked about before its first byte.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionAuthz {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// Who decides (`envoy.service.auth.v3.Authorization`); 200 ms unless set.
    pub service: GrpcService,
    /// Without an answer the connection passes.
    pub failure_mode_allow: bool,
    /// Show the server name of the TLS session.
    pub include_tls_session: bool,
    /// Only connections of which earlier filters found out this are asked about.
    pub enabled_metadata: Option<MetadataMatch>,
}

/// An authoriser.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuthzService {
    /// `envoy.service.auth.v3.Authorization`; 200 ms unless set.
    Grpc(GrpcService),
    /// A server that answers 200 for yes.
    Http(Box<HttpAuthz>),
}

/// `ext_authz.v3.HttpService`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HttpAuthz {
    /// URI; its authority is only used where the request's own is not (Envoy keeps the request's).
    pub uri: String,
    /// Upstream cluster.
    pub cluster: String,
    /// Limit of one call.
    pub timeout: Duration,
    /// Text before the request's path.
    pub path_prefix: String,
    /// Headers for the authoriser.
    pub headers_to_add: Vec<(String, String)>,
    /// Headers of a yes that replace those of the request.
    pub allowed_upstream_headers: Vec<StringMatch>,
    /// Headers of a yes that join those of the request.
    pub allowed_upstream_headers_to_append: Vec<StringMatch>,
    /// Headers of a no that the client gets; empty is all but `host`.
    pub allowed_client_headers: Vec<StringMatch>,
    /// Headers of a yes that the client gets with the answer.
    pub allowed_client_headers_on_success: Vec<StringMatch>,
    /// Headers of a yes that become metadata.
    pub dynamic_metadata_from_headers: Vec<StringMatch>,
}

/// `ext_authz.v3.BufferSettings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BodySettings {
    /// Longest body.
    pub max_bytes: u32,
    /// A longer one is shown in part; otherwise it is answered with 413.
    pub allow_partial: bool,
    /// As bytes rather than as text (gRPC only).
    pub pack_as_bytes: bool,
}

/// `ext_authz.v3.ExtAuthzPerRoute`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuthzOverride {
    /// Off.
    Disabled,
    /// Other settings.
    Check {
        /// Told to the authoriser (gRPC only).
        context_extensions: BTreeMap<String, String>,
        /// The body is not shown.
        no_body: bool,
        /// Instead of the filter's.
        with_request_body: Option<BodySettings>,
    },
}
