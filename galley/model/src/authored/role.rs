//! `rbac.istio.io/v1alpha1` RbacConfig, ClusterRbacConfig, ServiceRole and ServiceRoleBinding: who may do what at
//! services, as release 1.0 writes it. AuthorizationPolicy took their place.

use std::collections::BTreeMap;

message! {
    /// For which services access is by role. Called `default`; ClusterRbacConfig is the same for a cluster.
    pub struct RbacConfig {
        /// Which.
        pub mode: RbacMode,
        /// These, with `ON_WITH_INCLUSION`.
        pub inclusion: Option<RbacTarget>,
        /// All but these, with `ON_WITH_EXCLUSION`.
        pub exclusion: Option<RbacTarget>,
        /// Whether it holds or is only tried.
        #[serde(alias = "enforcement_mode")]
        pub enforcement_mode: EnforcementMode,
    }

    /// Services.
    pub struct RbacTarget {
        /// By their full host.
        pub services: Vec<String>,
        /// All of these namespaces.
        pub namespaces: Vec<String>,
    }

    /// What may be done at services of its namespace.
    pub struct ServiceRole {
        /// Any of these.
        pub rules: Vec<AccessRule>,
    }

    /// Requests; values of one field are alternatives: exact, `prefix*`, `*suffix` or `*`.
    pub struct AccessRule {
        /// Full hosts of services.
        pub services: Vec<String>,
        /// Authorities.
        pub hosts: Vec<String>,
        /// None of these.
        #[serde(alias = "not_hosts")]
        pub not_hosts: Vec<String>,
        /// Paths, without queries; none is any.
        pub paths: Vec<String>,
        /// None of these.
        #[serde(alias = "not_paths")]
        pub not_paths: Vec<String>,
        /// Methods.
        pub methods: Vec<String>,
        /// None of these.
        #[serde(alias = "not_methods")]
        pub not_methods: Vec<String>,
        /// Ports of workloads.
        pub ports: Vec<u32>,
        /// None of these.
        #[serde(alias = "not_ports")]
        pub not_ports: Vec<u32>,
        /// All must hold.
        pub constraints: Vec<AccessConstraint>,
    }

    /// A condition on an attribute of request or service.
    pub struct AccessConstraint {
        /// Such as `request.headers[version]` or `destination.labels[version]`.
        pub key: String,
        /// Any of these.
        pub values: Vec<String>,
    }

    /// Who has a role.
    pub struct ServiceRoleBinding {
        /// Any of these.
        pub subjects: Vec<Subject>,
        /// Which.
        #[serde(alias = "role_ref")]
        pub role_ref: Option<RoleRef>,
        /// Whether it holds or is only tried.
        pub mode: EnforcementMode,
    }

    /// Callers of whom all of this holds.
    pub struct Subject {
        /// Principal without `spiffe://`; `*` is anybody, with a certificate or without.
        pub user: String,
        /// Group that a token names.
        pub group: String,
        /// Attributes with their values.
        pub properties: BTreeMap<String, String>,
        /// Principals.
        pub names: Vec<String>,
        /// None of these.
        #[serde(alias = "not_names")]
        pub not_names: Vec<String>,
        /// Groups that a token names.
        pub groups: Vec<String>,
        /// None of these.
        #[serde(alias = "not_groups")]
        pub not_groups: Vec<String>,
        /// Namespaces of the principal.
        pub namespaces: Vec<String>,
        /// None of these.
        #[serde(alias = "not_namespaces")]
        pub not_namespaces: Vec<String>,
        /// Addresses of the peer.
        pub ips: Vec<String>,
        /// None of these.
        #[serde(alias = "not_ips")]
        pub not_ips: Vec<String>,
    }

    /// A role of the binding's namespace.
    pub struct RoleRef {
        /// `ServiceRole`.
        pub kind: String,
        /// Name.
        pub name: String,
    }
}

choice! {
    /// For which services access is by role.
    pub enum RbacMode {
        /// None.
        #[default]
        Off,
        /// All.
        On,
        /// Those that are named.
        OnWithInclusion,
        /// Those that are not named.
        OnWithExclusion,
    }

    /// Whether a decision holds.
    pub enum EnforcementMode {
        /// It does.
        #[default]
        Enforced,
        /// It is evaluated and logged.
        Permissive,
    }
}
