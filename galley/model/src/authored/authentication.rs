//! `authentication.istio.io/v1alpha1` Policy and MeshPolicy: how callers of services prove who they are, as release 1.0
//! writes it. PeerAuthentication and RequestAuthentication took their place.

message! {
    /// Policy of services, of a namespace (called `default`), or as MeshPolicy of the mesh.
    pub struct AuthenticationPolicy {
        /// Services; none is the whole namespace, or the mesh.
        pub targets: Vec<TargetSelector>,
        /// How the end user is proved: any of these.
        pub origins: Vec<OriginMethod>,
        /// Requests without a valid token are let in as well.
        pub origin_is_optional: bool,
        /// How the calling workload proves itself: in order, and the first that succeeds counts. None is not at all.
        pub peers: Vec<PeerMethod>,
        /// Callers that do not are let in as well.
        pub peer_is_optional: bool,
        /// What `request.auth.principal` is.
        pub principal_binding: PrincipalBinding,
    }

    /// A service of the policy's namespace.
    pub struct TargetSelector {
        /// Its short name.
        pub name: String,
        /// Its ports; none is all of them.
        pub ports: Vec<TargetPort>,
    }

    /// A port of a service, by one of these.
    pub struct TargetPort {
        /// Number.
        pub number: Option<u32>,
        /// Name.
        pub name: Option<String>,
    }

    /// One way of a workload to prove itself. `mtls:` without a value is written often, and JSON's null is no value: so an
    /// entry without any member is mTLS, too.
    pub struct PeerMethod {
        /// By a certificate of the mesh.
        pub mtls: Option<PeerMutualTls>,
        /// By a token.
        pub jwt: Option<Jwt>,
    }

    /// mTLS of callers.
    pub struct PeerMutualTls {
        /// TLS without a client's certificate is accepted.
        pub allow_tls: bool,
        /// Whether anything else is accepted.
        pub mode: PeerMutualTlsMode,
    }

    /// One way of an end user to be proved.
    pub struct OriginMethod {
        /// By a token.
        pub jwt: Option<Jwt>,
    }

    /// Tokens of an issuer.
    pub struct Jwt {
        /// `iss` claim.
        pub issuer: String,
        /// Accepted `aud` claims; none is any.
        pub audiences: Vec<String>,
        /// Where its keys are published.
        #[serde(alias = "jwks_uri")]
        pub jwks_uri: String,
        /// Its keys.
        pub jwks: String,
        /// Headers that hold tokens.
        #[serde(alias = "jwt_headers")]
        pub jwt_headers: Vec<String>,
        /// Query parameters that hold tokens.
        #[serde(alias = "jwt_params")]
        pub jwt_params: Vec<String>,
        /// Requests of which a token is asked: those that any of these is for; none is all.
        #[serde(alias = "trigger_rules")]
        pub trigger_rules: Vec<TriggerRule>,
    }

    /// Requests of some paths, queries apart.
    pub struct TriggerRule {
        /// None of these.
        #[serde(alias = "excluded_paths")]
        pub excluded_paths: Vec<TriggerPath>,
        /// One of these; none is every path.
        #[serde(alias = "included_paths")]
        pub included_paths: Vec<TriggerPath>,
    }

    /// A path, by one of these.
    pub struct TriggerPath {
        /// The whole of it.
        pub exact: Option<String>,
        /// How it begins.
        pub prefix: Option<String>,
        /// How it ends.
        pub suffix: Option<String>,
        /// An expression for the whole of it.
        pub regex: Option<String>,
    }
}

choice! {
    /// What an mTLS port accepts.
    pub enum PeerMutualTlsMode {
        /// mTLS only.
        #[default]
        Strict,
        /// Also what is none.
        Permissive,
    }

    /// Whose principal counts.
    pub enum PrincipalBinding {
        /// The workload's.
        #[default]
        UsePeer,
        /// The end user's.
        UseOrigin,
    }
}
