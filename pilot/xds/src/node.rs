//! Who an xDS client says it is.

use std::net::IpAddr;

use mesh_model::Locality;
use serde_json::{Map, Value};

use crate::pb;

/// Metadata by which an east-west gateway says that it is about to stop.
pub const DRAINING: &str = "DRAINING";

/// Metadata by which our own proxy says that it takes virtual hosts apart from their route configurations, unasked.
pub const TAKES_HOSTS: &str = "FLOTILLA_VHDS";

/// Whether a proxy gets only what traffic asks for: of its metadata, of the `environmentVariables` of a `ProxyConfig`, of the
/// `defaultConfig.proxyMetadata` of the mesh. `true` or `false`.
pub const ON_DEMAND: &str = "FLOTILLA_ON_DEMAND";

/// What kind of client a node is, from the first part of its ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NodeKind {
    /// `sidecar`: a workload's proxy.
    Sidecar,
    /// `router`: a gateway.
    Router,
    /// Anything else, such as a component that reads configuration.
    Component,
}

/// A client of the control plane, parsed from `envoy.config.core.v3.Node`.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeInfo {
    /// The whole ID, `kind~ip~name.namespace~domain`.
    pub id: String,
    /// Kind.
    pub kind: NodeKind,
    /// First instance address; `None` for components.
    pub ip: Option<IpAddr>,
    /// Workload name.
    pub name: String,
    /// Namespace: metadata `NAMESPACE`, else from the ID.
    pub namespace: String,
    /// DNS domain, such as `books.svc.cluster.local`.
    pub domain: String,
    /// Service cluster (statistics only).
    pub cluster: String,
    /// Metadata as sent.
    pub metadata: Map<String, Value>,
    /// Where it runs.
    pub locality: Locality,
    /// `flotilla`, `envoy`, `gRPC Go` ...
    pub user_agent: String,
    /// Its stream speaks the incremental protocol. Not part of the node on the wire.
    pub incremental: bool,
}

/// Why a node cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// No node in the first request.
    #[error("the first request of the stream carries no node")]
    Missing,
    /// The ID has not the form that its kind needs.
    #[error("node ID {0:?} is not of the form kind~ip~name.namespace~domain")]
    Id(String),
}

impl NodeInfo {
    /// A component of the control plane (no address, no workload).
    #[must_use]
    pub fn component(name: &str) -> Self {
        Self {
            id: name.to_owned(),
            kind: NodeKind::Component,
            ip: None,
            name: name.to_owned(),
            namespace: String::new(),
            domain: String::new(),
            cluster: name.to_owned(),
            metadata: Map::new(),
            locality: Locality::default(),
            user_agent: "flotilla".to_owned(),
            incremental: false,
        }
    }

    /// A proxy: `kind~ip~name.namespace~domain` with Istio's metadata keys.
    #[must_use]
    pub fn proxy(
        kind: NodeKind,
        ip: IpAddr,
        name: &str,
        namespace: &str,
        domain: &str,
        metadata: Map<String, Value>,
        locality: Locality,
    ) -> Self {
        let k = if kind == NodeKind::Router { "router" } else { "sidecar" };
        Self {
            id: format!("{k}~{ip}~{name}.{namespace}~{domain}"),
            kind,
            ip: Some(ip),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            domain: domain.to_owned(),
            cluster: format!("{name}.{namespace}"),
            metadata,
            locality,
            user_agent: "flotilla".to_owned(),
            incremental: false,
        }
    }

    /// Reads a node from the wire.
    ///
    /// # Errors
    /// [`NodeError`] if it is missing, or names itself a proxy without a well-formed ID.
    pub fn from_pb(node: Option<&pb::Node>) -> Result<Self, NodeError> {
        let n = node.ok_or(NodeError::Missing)?;
        let metadata = n.metadata.as_ref().map(pb::json::from_struct).unwrap_or_default();
        let locality = n.locality.as_ref().map_or_else(Locality::default, |l| Locality {
            region: l.region.clone(),
            zone: l.zone.clone(),
            sub_zone: l.sub_zone.clone(),
        });
        let parts: Vec<&str> = n.id.split('~').collect();
        let kind = match parts[0] {
            "sidecar" => NodeKind::Sidecar,
            "router" => NodeKind::Router,
            _ => {
                let mut c = Self::component(&n.id);
                c.metadata = metadata;
                c.locality = locality;
                c.user_agent.clone_from(&n.user_agent_name);
                return Ok(c);
            }
        };
        let bad = || NodeError::Id(n.id.clone());
        let [_, ip, name_ns, domain] = parts[..] else { return Err(bad()) };
        let ip = ip.parse().map_err(|_| bad())?;
        // Pod names may hold dots in no registry that we serve, namespaces never do.
        let (name, id_ns) = name_ns.rsplit_once('.').ok_or_else(bad)?;
        let namespace = match metadata.get("NAMESPACE").and_then(Value::as_str) {
            Some(ns) if !ns.is_empty() => ns.to_owned(),
            _ => id_ns.to_owned(),
        };
        Ok(Self {
            id: n.id.clone(),
            kind,
            ip: Some(ip),
            name: name.to_owned(),
            namespace,
            domain: domain.to_owned(),
            cluster: n.cluster.clone(),
            metadata,
            locality,
            user_agent: n.user_agent_name.clone(),
            incremental: false,
        })
    }

    /// Writes it for the wire.
    #[must_use]
    pub fn to_pb(&self) -> pb::Node {
        pb::Node {
            id: self.id.clone(),
            cluster: self.cluster.clone(),
            metadata: Some(pb::json::to_struct(&self.metadata)),
            locality: Some(pb::Locality {
                region: self.locality.region.clone(),
                zone: self.locality.zone.clone(),
                sub_zone: self.locality.sub_zone.clone(),
            }),
            user_agent_name: self.user_agent.clone(),
        }
    }

    /// A string of the metadata.
    #[must_use]
    pub fn meta(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).and_then(Value::as_str)
    }

    /// Whether it is an east-west gateway.
    #[must_use]
    pub fn is_east_west(&self) -> bool {
        self.kind == NodeKind::Router && self.meta("ROUTER_MODE") == Some("sni-dnat")
    }

    /// What it says of [`ON_DEMAND`], if anything.
    #[must_use]
    pub fn on_demand(&self) -> Option<bool> {
        match self.metadata.get(ON_DEMAND)? {
            Value::Bool(b) => Some(*b),
            Value::String(s) => s.parse().ok(),
            _ => None,
        }
    }

    /// The same node when it is about to stop.
    #[must_use]
    pub fn draining(mut self) -> Self {
        self.metadata.insert(DRAINING.to_owned(), Value::Bool(true));
        self
    }

    /// The same, of a proxy that takes virtual hosts apart from their route configurations, without having to ask for
    /// each.
    #[must_use]
    pub fn taking_hosts(mut self) -> Self {
        self.metadata.insert(TAKES_HOSTS.to_owned(), Value::Bool(true));
        self
    }

    /// Whether it is our own proxy and takes virtual hosts apart.
    #[must_use]
    pub fn takes_hosts(&self) -> bool {
        self.is_flotilla() && self.metadata.get(TAKES_HOSTS) == Some(&Value::Bool(true))
    }

    /// Whether it is an east-west gateway that is about to stop.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.is_east_west() && self.metadata.get(DRAINING) == Some(&Value::Bool(true))
    }

    /// Whether the client is our own proxy, which honours what Envoy cannot express.
    #[must_use]
    pub fn is_flotilla(&self) -> bool {
        self.user_agent == "flotilla" || self.meta("GENERATOR") == Some("flotilla")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_round_trip() {
        let mut meta = Map::new();
        meta.insert("CLUSTER_ID".into(), "west".into());
        let n = NodeInfo::proxy(
            NodeKind::Sidecar,
            "10.1.0.5".parse().unwrap(),
            "reviews-v1",
            "books",
            "books.svc.cluster.local",
            meta,
            Locality { region: "r".into(), ..Locality::default() },
        );
        assert_eq!(n.id, "sidecar~10.1.0.5~reviews-v1.books~books.svc.cluster.local");
        assert_eq!(NodeInfo::from_pb(Some(&n.to_pb())).unwrap(), n);
        assert!(n.is_flotilla());
    }

    #[test]
    fn malformed_ids_are_refused() {
        for id in ["sidecar", "sidecar~x~a.b~c", "sidecar~1.2.3.4~ab~c", "router~1.2.3.4~a.b"] {
            let n = pb::Node { id: id.into(), ..Default::default() };
            assert!(NodeInfo::from_pb(Some(&n)).is_err(), "{id}");
        }
        assert_eq!(NodeInfo::from_pb(None), Err(NodeError::Missing));
        let c = pb::Node { id: "federation".into(), ..Default::default() };
        assert_eq!(NodeInfo::from_pb(Some(&c)).unwrap().kind, NodeKind::Component);
    }
}
