//! Compiled configuration: what workers read. Everything here is immutable once published, except slots, by
//! which routes and clusters are replaced in place.

pub(crate) mod apply;
pub(crate) mod listener;
pub(crate) mod route;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use arc_swap::ArcSwapOption;
use mesh_model::proxy as model;

use self::{listener::ListenerSlot, route::RouteTable};
use crate::{export::ExportError, matcher::RegexError, rbac::RbacError, upstream::cluster::ClusterSlot};

/// A complete configuration, keyed by name (load assignments by EDS service name).
#[derive(Debug, Clone, Default)]
pub struct ConfigSnapshot {
    /// Listeners.
    pub listeners: BTreeMap<String, Arc<model::Listener>>,
    /// Route configurations.
    pub routes: BTreeMap<String, Arc<model::RouteConfiguration>>,
    /// Clusters.
    pub clusters: BTreeMap<String, Arc<model::Cluster>>,
    /// Load assignments.
    pub endpoints: BTreeMap<String, Arc<model::LoadAssignment>>,
}

/// What [`crate::Engine::apply`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Resources that are not in force: `(kind, name, reason)` with kind `listener`, `route` or `cluster`.
    /// Their previous versions stay in force where there was one.
    pub rejected: Vec<(&'static str, String, String)>,
}

/// Why a resource cannot be compiled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompileError {
    #[error(transparent)]
    Regex(#[from] RegexError),
    #[error(transparent)]
    Rbac(#[from] RbacError),
    #[error("rate limit: {0}")]
    RateLimit(String),
    #[error("token authentication: {0}")]
    Jwt(String),
    #[error("traces or access log: {0}")]
    Export(#[from] ExportError),
    #[error("access log format: {0}")]
    LogFormat(#[from] mesh_telemetry::access_log::FormatError),
    #[error("access log {path:?}: {source}")]
    LogFile {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("domain {0:?} appears twice")]
    DuplicateDomain(String),
    #[error("header {0:?} cannot be changed, or its new value is invalid")]
    Header(String),
    #[error("status {0} is not allowed here")]
    Status(u16),
    #[error("tunnel: {0:?} is not valid")]
    Tunnel(String),
    #[error("a route or TCP proxy without cluster")]
    NoCluster,
    #[error("the on-demand filter must stand before filters that look at bodies")]
    OnDemandOrder,
    #[error("all weights are zero")]
    NoWeight,
    #[error("a UDP listener has no filter chains, and an idle timeout above zero")]
    Udp,
    #[error("filter chain {0:?} does not end in a terminal filter")]
    NoTerminal(String),
    #[error("filter chain {0:?} has a filter behind its terminal filter")]
    BehindTerminal(String),
    #[error("cannot bind {address}: {source}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("filter chain {0:?}: {1}")]
    Quic(String, &'static str),
    #[error("listeners {0:?} and {1:?} have the same address")]
    SameAddress(String, String),
}

/// The place of a route configuration by name.
#[derive(Debug)]
pub(crate) struct RouteSlot {
    pub(crate) current: ArcSwapOption<RouteTable>,
}

/// Everything that workers look up by name or address.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    /// Listeners that redirected connections are handed to, by address.
    pub(crate) by_address: HashMap<SocketAddr, Arc<ListenerSlot>>,
    /// The same for datagrams.
    pub(crate) udp_by_address: HashMap<SocketAddr, Arc<ListenerSlot>>,
    /// All listeners, for tunnels that lead to one.
    pub(crate) by_name: HashMap<String, Arc<ListenerSlot>>,
    /// Clusters, for names that come with traffic (SNI).
    pub(crate) clusters: HashMap<Arc<str>, Arc<ClusterSlot>>,
    /// Route configurations, for whoever gives up virtual hosts on demand.
    pub(crate) routes: HashMap<String, Arc<RouteSlot>>,
}
