//! `security.istio.io` PeerAuthentication, RequestAuthentication and AuthorizationPolicy.

use std::collections::BTreeMap;

use super::{Duration, LabelSelector};

message! {
    /// mTLS that workloads accept.
    pub struct PeerAuthentication {
        /// Workloads of its namespace; none is the namespace, in the root namespace the mesh.
        pub selector: Option<LabelSelector>,
        /// Default of all ports.
        pub mtls: Option<MutualTls>,
        /// By workload port; needs a selector.
        pub port_level_mtls: Option<BTreeMap<String, MutualTls>>,
    }

    /// mTLS of a workload or port.
    pub struct MutualTls {
        /// Mode.
        pub mode: MutualTlsMode,
    }

    /// End-user tokens that workloads understand.
    pub struct RequestAuthentication {
        /// Workloads.
        pub selector: Option<LabelSelector>,
        /// One resource, instead of a selector (old form).
        pub target_ref: Option<PolicyTargetReference>,
        /// Resources, instead of a selector.
        pub target_refs: Vec<PolicyTargetReference>,
        /// Issuers.
        pub jwt_rules: Vec<JwtRule>,
    }

    /// One token issuer.
    pub struct JwtRule {
        /// `iss` claim.
        pub issuer: String,
        /// Accepted `aud` claims.
        pub audiences: Vec<String>,
        /// Where its keys are published.
        #[serde(alias = "jwks_uri")]
        pub jwks_uri: String,
        /// Its keys.
        pub jwks: String,
        /// Where tokens are looked for.
        pub from_headers: Vec<JwtHeader>,
        /// Query parameters that hold tokens.
        pub from_params: Vec<String>,
        /// Cookies that hold tokens.
        pub from_cookies: Vec<String>,
        /// Header that gets the payload.
        pub output_payload_to_header: String,
        /// Keep the token.
        pub forward_original_token: bool,
        /// Headers that get claims.
        pub output_claim_to_headers: Vec<ClaimToHeader>,
        /// Fetching keys; 5 s unless set.
        pub timeout: Option<Duration>,
        /// Claims that are split at spaces.
        pub space_delimited_claims: Vec<String>,
        /// Whether a request without a token is refused.
        pub presence: TokenPresence,
    }

    /// A header that holds tokens.
    pub struct JwtHeader {
        /// Name.
        pub name: String,
        /// Text before the token.
        pub prefix: String,
    }

    /// A header that gets a claim.
    pub struct ClaimToHeader {
        /// Header.
        pub header: String,
        /// Claim.
        pub claim: String,
    }

    /// A resource that a policy is attached to.
    pub struct PolicyTargetReference {
        /// API group.
        pub group: String,
        /// Kind.
        pub kind: String,
        /// Name.
        pub name: String,
        /// Namespace; the policy's own.
        pub namespace: String,
    }

    /// Who may do what at workloads.
    pub struct AuthorizationPolicy {
        /// Workloads of its namespace; none is the namespace, in the root namespace the mesh.
        pub selector: Option<LabelSelector>,
        /// One resource, instead of a selector (old form).
        pub target_ref: Option<PolicyTargetReference>,
        /// Resources, instead of a selector.
        pub target_refs: Vec<PolicyTargetReference>,
        /// Any that matches decides; none never matches.
        pub rules: Vec<AuthorizationRule>,
        /// What a match means.
        pub action: AuthorizationAction,
        /// Who decides with `CUSTOM`.
        pub provider: Option<ExtensionProvider>,
    }

    /// An external authoriser, by its name in the mesh's settings.
    pub struct ExtensionProvider {
        /// Name.
        pub name: String,
    }

    /// From any source, to any operation, when all conditions hold.
    pub struct AuthorizationRule {
        /// Absent matches every source.
        pub from: Option<Vec<RuleFrom>>,
        /// Absent matches every operation.
        pub to: Option<Vec<RuleTo>>,
        /// All must hold.
        pub when: Vec<Condition>,
    }

    /// One source.
    pub struct RuleFrom {
        /// Conditions that must all hold.
        pub source: Option<Source>,
    }

    /// One operation.
    pub struct RuleTo {
        /// Conditions that must all hold.
        pub operation: Option<Operation>,
    }

    /// Conditions on the caller; values of one field are alternatives.
    pub struct Source {
        /// Principals, without `spiffe://`.
        pub principals: Vec<String>,
        /// None of these.
        pub not_principals: Vec<String>,
        /// `iss/sub` of the token.
        pub request_principals: Vec<String>,
        /// None of these.
        pub not_request_principals: Vec<String>,
        /// Namespaces of the principal.
        pub namespaces: Vec<String>,
        /// None of these.
        pub not_namespaces: Vec<String>,
        /// `ns/sa` or `sa` of the policy's namespace.
        pub service_accounts: Vec<String>,
        /// None of these.
        pub not_service_accounts: Vec<String>,
        /// Address of the connection's peer.
        pub ip_blocks: Vec<String>,
        /// None of these.
        pub not_ip_blocks: Vec<String>,
        /// Address of the client behind trusted proxies.
        pub remote_ip_blocks: Vec<String>,
        /// None of these.
        pub not_remote_ip_blocks: Vec<String>,
        /// Trust domains of the principal.
        pub trust_domains: Vec<String>,
        /// None of these.
        pub not_trust_domains: Vec<String>,
    }

    /// Conditions on the request; values of one field are alternatives.
    pub struct Operation {
        /// Authority, without case.
        pub hosts: Vec<String>,
        /// None of these.
        pub not_hosts: Vec<String>,
        /// Workload ports.
        pub ports: Vec<String>,
        /// None of these.
        pub not_ports: Vec<String>,
        /// Methods.
        pub methods: Vec<String>,
        /// None of these.
        pub not_methods: Vec<String>,
        /// Paths: exact, `pre*`, `*suf`, `*`, or templates with `{*}` and `{**}`.
        pub paths: Vec<String>,
        /// None of these.
        pub not_paths: Vec<String>,
    }

    /// A condition on an attribute.
    pub struct Condition {
        /// Such as `request.headers[x-token]` or our own `source.cluster`.
        pub key: String,
        /// Any of these.
        pub values: Vec<String>,
        /// None of these.
        pub not_values: Vec<String>,
    }
}

choice! {
    /// mTLS that is accepted.
    pub enum MutualTlsMode {
        /// That of the wider scope.
        #[default]
        Unset,
        /// Plaintext only.
        Disable,
        /// Both.
        Permissive,
        /// mTLS only.
        Strict,
    }

    /// Whether a token must be there.
    pub enum TokenPresence {
        /// A request without one passes.
        #[default]
        Optional,
        /// It is refused.
        Required,
    }

    /// What a match means.
    pub enum AuthorizationAction {
        /// Allow; with any ALLOW policy, what none allows is denied.
        #[default]
        Allow,
        /// Deny, before ALLOW.
        Deny,
        /// Mark for audit; no effect on the outcome.
        Audit,
        /// Ask a provider, before DENY.
        Custom,
    }
}
