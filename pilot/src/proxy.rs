//! A proxy as generators see it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_model::{
    Locality, NetworkId,
    authored::{ClientCertDetails, ConnectionSettings, GatewayTopology, ProxyHeaders},
    proxy::AddedHeaders,
    registry::Labels,
};
use mesh_xds::{
    NodeInfo, NodeKind,
    patch::Scope,
    process::{self, ProcessSettings},
};
use serde_json::Value;

pub use self::settings::{ConnectionLimits, HeaderSettings, ServerName};
use crate::{envoy_filter::Selected, generate::telemetry::Traced};

mod settings;

/// Longer metadata is none that anybody chooses proxies by.
const SHORT: usize = 256;

/// Most proxies in front of a gateway.
const MAX_TRUSTED: u32 = 100;

/// What is in front of a gateway (Istio's `gatewayTopology`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Topology {
    /// Trusted proxies.
    pub trusted: u32,
    /// What becomes of `x-forwarded-client-cert`.
    pub client_cert: ClientCertDetails,
    /// Connections begin with a PROXY header.
    pub proxy_protocol: bool,
}

impl From<&GatewayTopology> for Topology {
    fn from(t: &GatewayTopology) -> Self {
        Self {
            trusted: t.num_trusted_proxies,
            client_cert: t.forward_client_cert_details,
            proxy_protocol: t.proxy_protocol.is_some(),
        }
    }
}

/// What a proxy has of its own instead of what the mesh has for all.
#[derive(Default)]
struct Own {
    topology: Option<Topology>,
    headers: Option<Arc<HeaderSettings>>,
    connections: Option<Arc<ConnectionLimits>>,
    process: ProcessSettings,
}

/// A `PROXY_CONFIG`, an object or its text; the field that cannot be read if it is none.
fn own(config: &Value, gateway: bool) -> Result<Own, &'static str> {
    let all = process::metadata(config)?;
    let topology = if gateway { process::field(&all, "gatewayTopology", "gateway_topology")? } else { None };
    if topology.as_ref().is_some_and(|t: &GatewayTopology| t.num_trusted_proxies > MAX_TRUSTED) {
        return Err("gatewayTopology");
    }
    let headers: Option<ProxyHeaders> = process::field(&all, "proxyHeaders", "proxy_headers")?;
    let connections: Option<ConnectionSettings> =
        process::field(&all, "connectionSettings", "connection_settings")?;
    Ok(Own {
        topology: topology.as_ref().map(Topology::from),
        headers: headers.map(|h| Arc::new(HeaderSettings::from(&h))),
        connections: connections.map(|c| Arc::new(ConnectionLimits::of(&c, gateway))),
        process: ProcessSettings::of_metadata(config)?,
    })
}

/// How connections of a workload reach its proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interception {
    /// NAT; the original destination is a socket option.
    Redirect,
    /// Transparent proxying.
    Tproxy,
    /// None: the proxy binds the workload's own ports, applications use it as an HTTP proxy.
    None,
}

/// A proxy that asked for configuration. Made of its node only; equal nodes get equal
/// configuration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProxyNode {
    /// Node ID.
    pub id: String,
    /// Whether it is a gateway.
    pub router: bool,
    /// `ROUTER_MODE=sni-dnat`: an east-west gateway.
    pub east_west: bool,
    /// Addresses of the workload; at least one.
    pub addresses: Vec<IpAddr>,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Labels.
    pub labels: Labels,
    /// Where it runs.
    pub locality: Locality,
    /// Network; `None` is the cluster's.
    pub network: Option<NetworkId>,
    /// Interception.
    pub interception: Interception,
    /// Port of an outbound HTTP proxy on the workload's address.
    pub http_proxy_port: Option<u16>,
    /// Without interception: where the application listens, by workload port.
    pub inbound: BTreeMap<u16, SocketAddr>,
    /// Our own proxy, which knows more than Envoy.
    pub flotilla: bool,
    /// No proxy, but a gRPC library that executes xDS itself (`GENERATOR: grpc`), which knows less.
    pub grpc: bool,
    /// It takes virtual hosts apart from their route configurations (VHDS), unasked: one that changes is sent alone.
    pub takes_hosts: bool,
    /// What it says itself of getting only what it asks for, if anything.
    pub asks: Option<bool>,
    /// Its protocol has a way to ask.
    pub can_ask: bool,
    /// It gets virtual hosts and clusters only if it asks for them ([`crate::world::World::patched`]).
    pub on_demand: bool,
    /// Connections to and from it may share sessions, and it takes HBONE: our own proxy, unless its metadata says
    /// `FLOTILLA_TUNNELS: false`.
    pub tunnels: bool,
    /// Certificate, key and root files, for proxies without a secret store: `(chain, key, root)`.
    pub tls_files: Option<(String, String, String)>,
    /// Of gateways: what is in front of it, if that is not what the mesh's settings say (`PROXY_CONFIG`).
    pub topology: Option<Topology>,
    /// Headers that it adds, if it says so itself.
    pub headers: Option<Arc<HeaderSettings>>,
    /// Limits that it keeps, if it says so itself.
    pub connections: Option<Arc<ConnectionLimits>>,
    /// Settings of its process, as far as it says them itself.
    pub process: ProcessSettings,
    /// Where this cluster's federation endpoint listens (east-west gateways).
    pub federation: Option<SocketAddr>,
    /// Texts in its metadata, by which patches choose.
    pub metadata: Arc<BTreeMap<String, String>>,
    /// Patches for it ([`crate::world::World::patched`]).
    pub filters: Selected,
    /// What the world says of its workload; likewise.
    pub situation: Situation,
}

/// What a world says of a proxy's own workload that the clusters of what it calls depend on. Mostly nothing: each
/// situation is a class of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Situation {
    /// Workloads of its service by zone, in its region; only where some rule prefers zones.
    pub neighbours: Option<Arc<BTreeMap<String, u64>>>,
    /// Credential that a gateway of the Gateway API shows to backends whose TLS it verifies.
    pub client_certificate: Option<String>,
    /// What its spans say of it, if it has to be told. Clusters do not depend on it.
    pub traced: Option<Arc<Traced>>,
}

/// Why a node gets no configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// Not a proxy.
    #[error("node {0:?} is not a proxy")]
    NotAProxy(String),
    /// A metadata value that cannot be used.
    #[error("node metadata {key}: {value} is not {expected}")]
    Metadata {
        /// Key.
        key: &'static str,
        /// Value as text.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

fn number(v: &Value) -> Option<u16> {
    match v {
        Value::Number(n) => n.as_u64().and_then(|n| u16::try_from(n).ok()),
        Value::String(s) => s.parse().ok(),
        _ => None,
    }
}

impl ProxyNode {
    /// Whether the proxy connects to Unix sockets of its host: it does so with its own rights, so that one which does not
    /// look whose they are could be sent to its agent's, and a gateway to whatever else its host serves.
    #[must_use]
    pub fn opens_sockets(&self) -> bool {
        self.flotilla && !self.router
    }

    /// Reads a node.
    ///
    /// # Errors
    /// [`ProxyError`] naming the metadata key that cannot be used.
    pub fn new(node: &NodeInfo) -> Result<Self, ProxyError> {
        let first = match (node.kind, node.ip) {
            (NodeKind::Sidecar | NodeKind::Router, Some(ip)) => ip,
            _ => return Err(ProxyError::NotAProxy(node.id.clone())),
        };
        let bad = |key, expected| {
            let value = node.metadata.get(key).map(ToString::to_string).unwrap_or_default();
            ProxyError::Metadata { key, value, expected }
        };
        let mut addresses = vec![first];
        if let Some(v) = node.metadata.get("INSTANCE_IPS") {
            let list: Vec<&str> = match v {
                Value::String(s) => s.split(',').map(str::trim).filter(|s| !s.is_empty()).collect(),
                Value::Array(a) => a.iter().filter_map(Value::as_str).collect(),
                _ => return Err(bad("INSTANCE_IPS", "a list of addresses")),
            };
            for a in list {
                let ip = a.parse().map_err(|_| bad("INSTANCE_IPS", "a list of addresses"))?;
                if !addresses.contains(&ip) {
                    addresses.push(ip);
                }
            }
        }
        let interception = match node.meta("INTERCEPTION_MODE") {
            None | Some("REDIRECT" | "") => Interception::Redirect,
            Some("TPROXY") => Interception::Tproxy,
            Some("NONE") => Interception::None,
            Some(_) => return Err(bad("INTERCEPTION_MODE", "REDIRECT, TPROXY or NONE")),
        };
        let http_proxy_port = match node.metadata.get("HTTP_PROXY_PORT") {
            None => None,
            Some(v) => Some(number(v).ok_or_else(|| bad("HTTP_PROXY_PORT", "a port"))?).filter(|p| *p > 0),
        };
        let mut inbound = BTreeMap::new();
        if let Some(v) = node.metadata.get("FLOTILLA_INBOUND") {
            let expected = "an object of port to address";
            let map = v.as_object().ok_or_else(|| bad("FLOTILLA_INBOUND", expected))?;
            for (k, v) in map {
                let port = k.parse().map_err(|_| bad("FLOTILLA_INBOUND", expected))?;
                let to = v.as_str().and_then(|s| s.parse().ok());
                inbound.insert(port, to.ok_or_else(|| bad("FLOTILLA_INBOUND", expected))?);
            }
        }
        let labels = match node.metadata.get("LABELS") {
            Some(Value::Object(o)) => {
                o.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
            }
            _ => Labels::new(),
        };
        let file = |key| node.meta(key).map(str::to_owned);
        let tls_files =
            match (file("TLS_CLIENT_CERT_CHAIN"), file("TLS_CLIENT_KEY"), file("TLS_CLIENT_ROOT_CERT")) {
                (Some(c), Some(k), Some(r)) => Some((c, k, r)),
                _ => None,
            };
        let off = |key| match node.metadata.get(key) {
            Some(Value::Bool(on)) => !on,
            Some(Value::String(s)) => s == "false",
            _ => false,
        };
        let grpc = node.meta("GENERATOR") == Some("grpc") && node.kind == NodeKind::Sidecar;
        let federation = match node.meta("FEDERATION_ADDRESS") {
            None => None,
            Some(a) => Some(a.parse().map_err(|_| bad("FEDERATION_ADDRESS", "an address with a port"))?),
        };
        let own = match node.metadata.get("PROXY_CONFIG") {
            None => Own::default(),
            Some(v) => own(v, node.kind == NodeKind::Router).map_err(|field| {
                bad(
                    "PROXY_CONFIG",
                    match field {
                        "gatewayTopology" => "a ProxyConfig with a valid gatewayTopology",
                        "proxyHeaders" => "a ProxyConfig with valid proxyHeaders",
                        "connectionSettings" => "a ProxyConfig with valid connectionSettings",
                        "concurrency" => "a ProxyConfig with a valid concurrency",
                        "drainDuration" => "a ProxyConfig with a valid drainDuration",
                        "parentShutdownDuration" => "a ProxyConfig with a valid parentShutdownDuration",
                        "terminationDrainDuration" => "a ProxyConfig with a valid terminationDrainDuration",
                        "proxyAdminPort" => "a ProxyConfig with a valid proxyAdminPort",
                        "statusPort" => "a ProxyConfig with a valid statusPort",
                        _ => "a ProxyConfig",
                    },
                )
            })?,
        };
        let text = |v: &Value| v.as_str().filter(|s| s.len() <= SHORT).map(str::to_owned);
        let metadata = node.metadata.iter().filter_map(|(k, v)| Some((k.clone(), text(v)?))).collect();
        Ok(Self {
            id: node.id.clone(),
            router: node.kind == NodeKind::Router,
            east_west: node.is_east_west(),
            addresses,
            namespace: node.namespace.clone(),
            service_account: node.meta("SERVICE_ACCOUNT").unwrap_or("default").to_owned(),
            labels,
            locality: node.locality.clone(),
            network: node.meta("NETWORK").and_then(|n| NetworkId::new(n).ok()),
            interception,
            http_proxy_port,
            inbound,
            flotilla: node.is_flotilla() && !grpc,
            grpc,
            takes_hosts: node.takes_hosts() && !grpc,
            asks: node.on_demand(),
            can_ask: node.incremental,
            on_demand: false,
            tunnels: node.is_flotilla() && !grpc && !off("FLOTILLA_TUNNELS"),
            // Its certificates are its bootstrap's business.
            tls_files: tls_files.filter(|_| !grpc),
            topology: own.topology,
            headers: own.headers,
            connections: own.connections,
            process: own.process,
            federation,
            metadata: Arc::new(metadata),
            filters: Selected::default(),
            situation: Situation::default(),
        })
    }

    /// Whether virtual hosts are resources of their own for it.
    #[must_use]
    pub(crate) fn hosts_apart(&self) -> bool {
        self.takes_hosts || self.on_demand
    }

    /// Address that listeners of its own bind to: with interception every address, otherwise the
    /// workload's, since others may share the host.
    #[must_use]
    pub fn bind(&self) -> IpAddr {
        match (self.interception, self.addresses.first()) {
            (Interception::None, Some(ip)) => *ip,
            _ => self.any(),
        }
    }

    /// The address that stands for all: of IPv6, which takes IPv4 as well, if the workload has that.
    #[must_use]
    pub fn any(&self) -> IpAddr {
        if self.addresses.iter().any(IpAddr::is_ipv6) {
            IpAddr::from([0u16; 8])
        } else {
            IpAddr::from([0, 0, 0, 0])
        }
    }

    /// Whether something with these `exportTo` values in `namespace` is visible to this proxy.
    #[must_use]
    pub fn sees(&self, namespace: &str, export_to: &[String]) -> bool {
        export_to.is_empty()
            || export_to.iter().any(|e| match e.as_str() {
                "*" => true,
                "." => namespace == self.namespace,
                other => other == self.namespace,
            })
    }

    /// This proxy without what only its inbound side depends on. Proxies of one class may call the same in the same way,
    /// so that is generated once for all of them. Of labels only those tell apart that configuration looks at
    /// (`telling`, see [`crate::world::World::telling_labels`]): a mesh has about as many sets of labels as workloads.
    #[must_use]
    pub fn class(&self, telling: &BTreeSet<String>) -> Self {
        let labels = self.labels.iter().filter(|(k, _)| telling.contains(*k));
        Self {
            id: String::new(),
            addresses: vec![self.any()],
            inbound: BTreeMap::new(),
            federation: None,
            // It is told of these apart.
            process: ProcessSettings::default(),
            // What they decide is which patches are for it, and whether it asks.
            metadata: Arc::default(),
            asks: None,
            can_ask: false,
            // Nothing outbound depends on it: a proxy shows its certificate, whoever it names.
            service_account: String::new(),
            labels: labels.map(|(k, v)| (k.clone(), v.clone())).collect(),
            ..self.clone()
        }
    }

    /// A class without what decides which services it may call and under which names. Whoever differs in nothing else
    /// reaches a service in the same way.
    #[must_use]
    pub(crate) fn reach(&self) -> Self {
        let filters = self.filters.only(Scope::Clusters);
        // Of headers and limits, what clusters have.
        let headers = self.headers.as_ref().map(|h| {
            let added = AddedHeaders { preserve_case: h.added.preserve_case, ..AddedHeaders::default() };
            Arc::new(HeaderSettings { added, ..HeaderSettings::default() })
        });
        let connections = self.connections.as_ref().map(|c| {
            Arc::new(ConnectionLimits { cluster_buffer: c.cluster_buffer, ..ConnectionLimits::default() })
        });
        let situation = Situation { traced: None, ..self.situation.clone() };
        // Clusters are what they are, asked for or not.
        Self {
            situation,
            namespace: String::new(),
            filters,
            on_demand: false,
            topology: None,
            headers,
            connections,
            ..self.clone()
        }
    }
}
