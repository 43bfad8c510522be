//! From Consul's instances to a service of the mesh.
//!
//! | of Consul | in the mesh |
//! |---|---|
//! | service `web` | host `web.service.consul`, without an address of its own |
//! | each port that an instance has | a port, which only the instances with that port serve |
//! | tag `key\|value` | label; other tags are nothing |
//! | service metadata | labels too, where no tag has the key, and the keys below |
//! | `protocol` in the metadata of service or node, or as a tag | protocol of the port; `http` unless said, bytes if unknown |
//! | `external` in the metadata of service or node | outside the mesh |
//! | `namespace`, `service-account`, `locality` in the service's metadata | namespace, account, `region/zone/subzone` |
//! | beginning of the name | namespace, where the metadata have none and [`Naming`] knows it |
//! | datacenter | locality, unless the metadata of service or node has one |
//! | address of the service, or else of the node | address; names are resolved by the proxy |
//! | checks | critical: no traffic; warning: the weight for it |

use std::{collections::BTreeMap, sync::Arc};

use mesh_model::{
    authored::WorkloadEntry,
    registry::{Labels, Protocol, Resolution, ServicePort},
};

use super::answer::{Instance, Status};
use crate::{
    config::{Doc, Problem},
    index::HEALTH,
};

/// Annotation of workloads that are instances of Consul, with the name of their service.
pub(crate) const FROM_CONSUL: &str = "flotilla.dev/consul-service";

/// How names are made.
#[derive(Debug, Clone)]
pub struct Naming {
    /// Namespace of services whose metadata name none, and whose names begin with no prefix.
    pub namespace: String,
    /// Namespaces by what the names of their services begin with; of several that fit the longest counts.
    pub prefixes: Vec<(String, String)>,
    /// Consul's domain, mostly `consul`.
    pub domain: String,
}

impl Naming {
    /// The namespace of a service by its name alone, in lower case. A prefix is followed by something.
    fn namespace_of(&self, name: &str) -> &str {
        let fits = self.prefixes.iter().filter(|(p, _)| name.len() > p.len() && name.starts_with(p.as_str()));
        fits.max_by_key(|(p, _)| p.len()).map_or(&self.namespace, |(_, ns)| ns)
    }
}

/// A service of Consul as the index takes it.
#[derive(Debug, Clone)]
pub struct Registered {
    /// Name in Consul, in lower case.
    pub name: String,
    /// Namespace that it is of.
    pub namespace: String,
    /// Name to callers.
    pub host: String,
    /// Of TCP and UDP, by number.
    pub ports: Vec<ServicePort>,
    /// Whether proxies have to resolve addresses.
    pub resolution: Resolution,
    /// Outside the mesh.
    pub external: bool,
    /// Instances with the port that each serves.
    pub instances: Vec<(ServicePort, Doc<WorkloadEntry>)>,
    /// What could not be used.
    pub problems: Vec<Problem>,
}

/// Makes a service of its instances. One that cannot be called has no ports.
#[must_use]
pub(crate) fn service(name: &str, all: &[Instance], unused: &[String], naming: &Naming) -> Registered {
    let object = format!("Consul service {name}");
    let problem = |message: String| Problem { object: object.clone(), message };
    let lower = name.to_ascii_lowercase();
    let mut out = Registered {
        host: format!("{lower}.service.{}", naming.domain),
        namespace: naming.namespace_of(&lower).to_owned(),
        name: lower,
        ports: vec![],
        resolution: Resolution::Static,
        external: all.iter().any(|i| said(i, "external").is_some_and(|v| !v.is_empty() && v != "false")),
        instances: vec![],
        problems: unused.iter().cloned().map(problem).collect(),
    };
    if !is_label(&out.name) {
        out.problems.push(problem("ignored: its name cannot be a part of a DNS name".to_owned()));
        return out;
    }
    let namespaces: Vec<&String> = all.iter().filter_map(|i| i.meta.get("namespace")).collect();
    if let Some(first) = namespaces.first() {
        if is_label(first) && mesh_model::ClusterId::new(&first.to_ascii_lowercase()).is_ok() {
            out.namespace = first.to_ascii_lowercase();
        } else {
            out.problems.push(problem(format!("namespace {first:?} is ignored: not a DNS label")));
        }
        if namespaces.iter().any(|n| n != first) || namespaces.len() < all.len() {
            out.problems.push(problem(format!(
                "its instances name different namespaces; it is of {}",
                out.namespace
            )));
        }
    }
    let mut ports: BTreeMap<(u16, bool), ServicePort> = BTreeMap::new();
    for i in all {
        if i.port == 0 {
            // Nothing to connect to: workers, and services that are only checks.
            continue;
        }
        if !plausible_address(&i.address) {
            out.problems.push(problem(format!("instance {} is ignored: address {:?}", i.id, i.address)));
            continue;
        }
        if i.address.parse::<std::net::IpAddr>().is_err() {
            out.resolution = Resolution::Dns;
        }
        let protocol = protocol(i);
        let named = || ServicePort { name: port_name(protocol, i.port), port: i.port, protocol };
        let port = ports.entry((i.port, protocol == Protocol::Udp)).or_insert_with(named);
        if port.protocol != protocol {
            out.problems.push(problem(format!(
                "instance {} says another protocol for port {} than one before it; that of the first is used",
                i.id, i.port
            )));
        }
        out.instances.push((port.clone(), workload(i, &out, port.protocol)));
    }
    out.ports = ports.into_values().collect();
    out
}

/// What the metadata of an instance says, or of its node.
fn said<'a>(i: &'a Instance, key: &str) -> Option<&'a String> {
    i.meta.get(key).or_else(|| i.node_meta.get(key))
}

fn protocol(i: &Instance) -> Protocol {
    let tag =
        || i.tags.iter().find_map(|t| t.strip_prefix("protocol|").or_else(|| t.strip_prefix("protocol=")));
    match i
        .meta
        .get("protocol")
        .map(String::as_str)
        .or_else(tag)
        .or(i.node_meta.get("protocol").map(String::as_str))
    {
        None => Protocol::Http,
        Some(p) => Protocol::parse(p).unwrap_or(Protocol::Tcp),
    }
}

/// As a port of a `Service` would be named; unique because of the number.
fn port_name(protocol: Protocol, port: u16) -> String {
    format!("{}-{port}", protocol_name(protocol))
}

fn protocol_name(p: Protocol) -> &'static str {
    match p {
        Protocol::Http => "http",
        Protocol::Http2 => "http2",
        Protocol::Grpc => "grpc",
        Protocol::GrpcWeb => "grpc-web",
        Protocol::Https => "https",
        Protocol::Tls => "tls",
        Protocol::Mongo => "mongo",
        Protocol::Mysql => "mysql",
        Protocol::Redis => "redis",
        Protocol::Udp => "udp",
        Protocol::Tcp | Protocol::Auto => "tcp",
    }
}

fn workload(i: &Instance, service: &Registered, protocol: Protocol) -> Doc<WorkloadEntry> {
    let mut labels: Labels = i.meta.clone();
    labels.extend(i.tags.iter().filter_map(|t| t.split_once('|')).map(|(k, v)| (k.to_owned(), v.to_owned())));
    let weight = if i.status == Status::Warning { i.weights.1 } else { i.weights.0 };
    let mut annotations = Labels::from([(FROM_CONSUL.to_owned(), service.name.clone())]);
    if i.status == Status::Critical || weight == 0 {
        annotations.insert(HEALTH.to_owned(), "unhealthy".to_owned());
    }
    Doc {
        name: i.id.clone(),
        namespace: service.namespace.clone(),
        created: 0,
        annotations: Arc::new(annotations),
        spec: Arc::new(WorkloadEntry {
            address: i.address.clone(),
            // A `Service` that selects it finds its port by the protocol's name, whatever its number.
            ports: BTreeMap::from([(protocol_name(protocol).to_owned(), u32::from(i.port))]),
            locality: said(i, "locality").unwrap_or(&i.datacenter).clone(),
            service_account: i.meta.get("service-account").cloned().unwrap_or_default(),
            weight,
            labels: labels.clone(),
            ..WorkloadEntry::default()
        }),
        labels: Arc::new(labels),
    }
}

/// A name without dots that may be a part of a host; Consul's names may have underscores.
pub(crate) fn is_label(s: &str) -> bool {
    (1..=63).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

fn plausible_address(a: &str) -> bool {
    a.parse::<std::net::IpAddr>().is_ok_and(|ip| !ip.is_unspecified())
        || (a.parse::<std::net::IpAddr>().is_err() && crate::hosts::plausible(a) && !a.contains('*'))
}
