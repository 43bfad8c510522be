//! A service that sees and changes requests and answers while they pass.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{GrpcService, StringMatch};

/// `envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtProc {
    /// `envoy.service.ext_proc.v3.ExternalProcessor`.
    pub service: GrpcService,
    /// What cannot be processed passes as it is.
    pub failure_mode_allow: bool,
    /// What is shown.
    pub mode: ProcessingMode,
    /// How long the answer to each message may take. Zero is no limit.
    pub message_timeout: Duration,
    /// The longest that the processor may ask for instead; zero lets it not.
    pub max_message_timeout: Duration,
    /// What it may change of headers.
    pub mutation_rules: MutationRules,
    /// Headers that are shown; empty shows all.
    pub allowed_headers: Vec<StringMatch>,
    /// Headers that are not, even so.
    pub disallowed_headers: Vec<StringMatch>,
    /// The processor may say what it wants to see of the rest.
    pub allow_mode_override: bool,
    /// The processor must not answer in the place of the upstream.
    pub disable_immediate_response: bool,
    /// Whether the route is looked for again after headers were changed.
    pub route_cache: RouteCache,
    /// Status of an answer that could not be processed; Envoy's default is 500.
    pub status_on_error: u16,
    /// Prefix of statistics.
    pub stat_prefix: String,
}

impl Default for ExtProc {
    fn default() -> Self {
        Self {
            service: GrpcService::default(),
            failure_mode_allow: false,
            mode: ProcessingMode::default(),
            message_timeout: Duration::from_millis(200),
            max_message_timeout: Duration::ZERO,
            mutation_rules: MutationRules::default(),
            allowed_headers: vec![],
            disallowed_headers: vec![],
            allow_mode_override: false,
            disable_immediate_response: false,
            route_cache: RouteCache::Asked,
            status_on_error: 500,
            stat_prefix: String::new(),
        }
    }
}

/// `ExternalProcessor.RouteCacheAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouteCache {
    /// If the processor says so.
    Asked,
    /// Whenever it changed headers of the request.
    Clear,
    /// Never.
    Retain,
}

/// `ext_proc.v3.ProcessingMode`; the default is Envoy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessingMode {
    /// Headers of the request.
    pub request_headers: bool,
    /// Headers of the answer.
    pub response_headers: bool,
    /// Body of the request.
    pub request_body: BodyMode,
    /// Body of the answer.
    pub response_body: BodyMode,
    /// Trailers of the request, if there are any.
    pub request_trailers: bool,
    /// Trailers of the answer, if there are any.
    pub response_trailers: bool,
}

impl Default for ProcessingMode {
    fn default() -> Self {
        Self {
            request_headers: true,
            response_headers: true,
            request_body: BodyMode::None,
            response_body: BodyMode::None,
            request_trailers: false,
            response_trailers: false,
        }
    }
}

/// `ProcessingMode.BodySendMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BodyMode {
    /// Not shown.
    None,
    /// Piece by piece.
    Streamed,
    /// As a whole, within the limit of buffers.
    Buffered,
    /// As much of it as fits.
    BufferedPartial,
}

/// `envoy.config.common.mutation_rules.v3.HeaderMutationRules`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MutationRules {
    /// `host`, `:authority`, `:scheme` and `:method` may be changed.
    pub allow_all_routing: bool,
    /// So may `x-envoy-*`.
    pub allow_envoy: bool,
    /// Names that begin with a colon may not.
    pub disallow_system: bool,
    /// Nothing may, but for `allow`.
    pub disallow_all: bool,
    /// Names that may be changed whatever else is said, as a regular expression.
    pub allow: Option<String>,
    /// Names that may not, even so.
    pub disallow: Option<String>,
    /// A change that is not allowed is an error, not ignored.
    pub disallow_is_error: bool,
}

/// `ext_proc.v3.ExtProcPerRoute`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcOverride {
    /// Not here.
    Disabled,
    /// Otherwise here; what is `None` is as everywhere.
    Set {
        /// What is shown.
        mode: Option<ProcessingMode>,
        /// Whom it is shown.
        service: Option<GrpcService>,
        /// What cannot be processed passes as it is.
        failure_mode_allow: Option<bool>,
    },
}
