//! Access control.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{HeaderMatch, StringMatch};

/// `envoy.extensions.filters.{http,network}.rbac.v3.RBAC`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rbac {
    /// Enforced rules; `None` enforces nothing.
    pub rules: Option<RbacRules>,
    /// Rules that are only evaluated and logged (dry run).
    pub shadow: Option<RbacRules>,
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// Prefix of the names under which later filters find what the shadow rules said
    /// (`shadow_effective_policy_id`, `shadow_engine_result`).
    pub shadow_stat_prefix: String,
}

/// `envoy.config.rbac.v3.RBAC`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RbacRules {
    /// What a match means. With `Allow` and no match the request is denied.
    pub action: RbacAction,
    /// By name; a policy matches if any permission and any principal does.
    pub policies: BTreeMap<String, RbacPolicy>,
}

/// `RBAC.Action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RbacAction {
    /// Allow what matches.
    Allow,
    /// Deny what matches.
    Deny,
    /// Only log what matches.
    Log,
}

/// `envoy.config.rbac.v3.Policy`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RbacPolicy {
    /// Any must match.
    pub permissions: Vec<Permission>,
    /// Any must match.
    pub principals: Vec<Principal>,
}

/// `envoy.config.rbac.v3.Permission`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Permission {
    /// Always.
    Any,
    /// All of them.
    And(Vec<Permission>),
    /// Any of them.
    Or(Vec<Permission>),
    /// Not it.
    Not(Box<Permission>),
    /// Request header (HTTP only).
    Header(HeaderMatch),
    /// Path without query (HTTP only).
    Path(StringMatch),
    /// Local address.
    DestinationIp(IpNet),
    /// Local port.
    DestinationPort(u16),
    /// SNI.
    ServerName(StringMatch),
    /// What an earlier filter found out about the request (HTTP only).
    Metadata(MetadataMatch),
}

/// `envoy.config.rbac.v3.Principal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Principal {
    /// Always.
    Any,
    /// All of them.
    And(Vec<Principal>),
    /// Any of them.
    Or(Vec<Principal>),
    /// Not it.
    Not(Box<Principal>),
    /// mTLS peer: a URI SAN, with its `spiffe://`; `None` is any authenticated peer.
    Authenticated(Option<StringMatch>),
    /// Peer address of the connection.
    DirectRemoteIp(IpNet),
    /// Client address, from `x-forwarded-for` where hops are trusted.
    RemoteIp(IpNet),
    /// Request header (HTTP only).
    Header(HeaderMatch),
    /// Path without query (HTTP only).
    Path(StringMatch),
    /// Cluster whose intermediate signed the peer's certificate (Flotilla's own; foreign proxies do
    /// not get policies that use it).
    SourceCluster(StringMatch),
    /// What an earlier filter found out about the request (HTTP only).
    Metadata(MetadataMatch),
}

/// `envoy.type.matcher.v3.MetadataMatcher` over a request's dynamic metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataMatch {
    /// Namespace, the name of the filter that wrote it.
    pub filter: String,
    /// Keys from the outside in.
    pub path: Vec<String>,
    /// Condition on what is there.
    pub value: ValueMatch,
    /// Negates the condition.
    pub invert: bool,
}

/// `envoy.type.matcher.v3.ValueMatcher`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ValueMatch {
    /// It is null.
    Null,
    /// It is this.
    Bool(bool),
    /// It is a string that matches.
    String(StringMatch),
    /// True: it is there; false: never.
    Present(bool),
    /// It is a list of which an element matches.
    OneOf(Box<ValueMatch>),
    /// Any of them.
    Or(Vec<ValueMatch>),
}
