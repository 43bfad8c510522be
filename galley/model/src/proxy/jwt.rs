//! Token authentication.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{RouteMatch, StringMatch};

/// `envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JwtAuthn {
    /// Issuers by name.
    pub providers: BTreeMap<String, JwtProvider>,
    /// The first whose match holds decides; a request that none matches passes unseen.
    pub rules: Vec<JwtRule>,
    /// Requirements that rules and routes refer to by name.
    pub requirements: BTreeMap<String, JwtRequirement>,
    /// Cross-origin preflights, which carry no credentials, pass.
    pub bypass_cors_preflight: bool,
}

/// `JwtProvider`: one issuer, where its tokens are and how they are verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JwtProvider {
    /// `iss` that tokens must have; empty accepts any.
    pub issuer: String,
    /// Any of these must be among the token's `aud`; empty accepts any.
    pub audiences: Vec<String>,
    /// Condition on `sub`.
    pub subjects: Option<StringMatch>,
    /// Tokens without `exp` are refused.
    pub require_expiration: bool,
    /// Longest time from now to `exp`; implies that there is one.
    pub max_lifetime: Option<Duration>,
    /// The issuer's keys.
    pub jwks: JwksSource,
    /// Keep the token in the request.
    pub forward: bool,
    /// Headers that hold tokens. Without any place named, `Authorization: Bearer` and the query
    /// parameter `access_token` are looked at.
    pub from_headers: Vec<JwtHeader>,
    /// Query parameters that hold tokens.
    pub from_params: Vec<String>,
    /// Cookies that hold tokens.
    pub from_cookies: Vec<String>,
    /// Header that gets the payload, base64url.
    pub forward_payload_header: String,
    /// The payload in that header is padded.
    pub pad_forward_payload_header: bool,
    /// Key of the payload in metadata `envoy.filters.http.jwt_authn`; empty keeps none.
    pub payload_in_metadata: String,
    /// Claims that are split at spaces in that metadata.
    pub space_delimited_claims: Vec<String>,
    /// A valid token lets the route be looked for again, by what is known of it now.
    pub clear_route_cache: bool,
    /// Tolerance of `exp` and `nbf`; Envoy's default is 60 s.
    pub clock_skew: Duration,
    /// Headers that get claims.
    pub claim_to_headers: Vec<JwtClaimToHeader>,
}

impl Default for JwtProvider {
    fn default() -> Self {
        Self {
            issuer: String::new(),
            audiences: vec![],
            subjects: None,
            require_expiration: false,
            max_lifetime: None,
            jwks: JwksSource::Inline(String::new()),
            forward: false,
            from_headers: vec![],
            from_params: vec![],
            from_cookies: vec![],
            forward_payload_header: String::new(),
            pad_forward_payload_header: false,
            payload_in_metadata: String::new(),
            space_delimited_claims: vec![],
            clear_route_cache: false,
            clock_skew: Duration::from_secs(60),
            claim_to_headers: vec![],
        }
    }
}

/// Where a key set (RFC 7517) comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JwksSource {
    /// JSON in the configuration.
    Inline(String),
    /// A file, read when the configuration is applied.
    File(String),
    /// Fetched over HTTP.
    Remote(RemoteJwks),
}

/// `RemoteJwks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteJwks {
    /// URI, for authority and path.
    pub uri: String,
    /// Upstream cluster that it is fetched from.
    pub cluster: String,
    /// Limit of one fetch.
    pub timeout: Duration,
    /// How long keys are used; Envoy's default is ten minutes.
    pub cache_duration: Duration,
    /// Keys are renewed before they expire, while requests go on.
    pub async_fetch: bool,
}

/// `JwtHeader`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JwtHeader {
    /// Name.
    pub name: String,
    /// Text before the token, such as `Bearer `; a value without it holds no token.
    pub value_prefix: String,
}

/// `JwtClaimToHeader`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JwtClaimToHeader {
    /// Header that gets it; what a client sends under that name is removed.
    pub header: String,
    /// Claim; dots lead into objects.
    pub claim: String,
}

/// `RequirementRule`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JwtRule {
    /// When it applies.
    pub matches: RouteMatch,
    /// What it asks for.
    pub requires: JwtRequires,
}

/// A requirement, or its name in [`JwtAuthn::requirements`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JwtRequires {
    /// Nothing: the request passes unseen.
    Nothing,
    /// This.
    Inline(JwtRequirement),
    /// That one.
    Named(String),
}

/// `JwtRequirement`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JwtRequirement {
    /// A valid token of this provider.
    Provider(String),
    /// A valid token of this provider for any of these audiences.
    ProviderWithAudiences(String, Vec<String>),
    /// Any of them.
    Any(Vec<JwtRequirement>),
    /// All of them.
    All(Vec<JwtRequirement>),
    /// A token, if there is one, must be valid.
    AllowMissing,
    /// Tokens are verified where possible and never required.
    AllowMissingOrFailed,
    /// Always holds.
    Always,
}

/// `PerRouteConfig` of token authentication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JwtOverride {
    /// Off.
    Disabled,
    /// This requirement instead of the rules'.
    Named(String),
}
