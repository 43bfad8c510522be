//! Wire records to model values, with the limits that hold for every peer.
//!
//! A peer is another control plane of the mesh, and still not believed: whatever it sends is checked
//! here before it can reach a table, so that a hostile or broken one costs a bounded amount.

use std::net::SocketAddr;

use mesh_model::{
    ClusterId, NetworkId, SpiffeId, TrustDomain,
    federation::{EndpointGroup, ExportedService, GatewayAddress, Transport},
    registry::{Protocol, ServicePort},
};

use crate::pb;

/// Services that one peer may export.
pub const MAX_SERVICES: usize = 20_000;
const MAX_PORTS: usize = 64;
const MAX_GROUPS: usize = 512;
/// In one group.
const MAX_SLOTS: usize = 64;
const MAX_LABELS: usize = 64;
const MAX_ACCOUNTS: usize = 256;
const MAX_GATEWAYS: usize = 64;
const MAX_TEXT: usize = 512;
/// Bytes of one announced service.
pub const MAX_RECORD: usize = 64 * 1024;
/// Bytes of all services that one peer may export.
pub const MAX_TABLE: usize = 16 * 1024 * 1024;
/// A member cannot join, or change its addresses, more often than this: room for the next join remains, whatever
/// somebody claims.
const MAX_EPOCH: u64 = 1 << 48;

/// A record that breaks a rule; the frame is refused and the stream closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WireError(pub String);

pub(crate) fn text(what: &str, s: &str) -> Result<(), WireError> {
    if s.len() > MAX_TEXT || s.bytes().any(|b| b < 0x20 || b == 0x7f) {
        return Err(WireError(format!("{what} is longer than {MAX_TEXT} bytes or has control characters")));
    }
    Ok(())
}

fn label(what: &str, s: &str) -> Result<(), WireError> {
    ClusterId::new(s).map(|_| ()).map_err(|_| WireError(format!("{what} {s:?} is not a DNS label")))
}

/// Checks and converts an announced service.
///
/// # Errors
/// [`WireError`] naming the field.
pub fn service(s: pb::Service) -> Result<ExportedService, WireError> {
    label("service name", &s.name)?;
    label("namespace", &s.namespace)?;
    text("host", &s.host)?;
    // Namespace sameness (MCS): a peer speaks for ns/name only under that very name.
    if !s.host.starts_with(&format!("{}.{}.svc.", s.name, s.namespace)) {
        return Err(WireError(format!("host {:?} is not that of {}/{}", s.host, s.namespace, s.name)));
    }
    if s.ports.is_empty() || s.ports.len() > MAX_PORTS {
        return Err(WireError(format!(
            "{}/{} has {} ports (1 to {MAX_PORTS})",
            s.namespace,
            s.name,
            s.ports.len()
        )));
    }
    let mut ports = Vec::with_capacity(s.ports.len());
    for p in s.ports {
        text("port name", &p.name)?;
        let port = u16::try_from(p.port).ok().filter(|p| *p != 0);
        let port = port.ok_or_else(|| WireError(format!("port number {} is not 1 to 65535", p.port)))?;
        // A protocol of a newer version is carried as bytes rather than dropped.
        let protocol = match p.protocol.as_str() {
            "auto" => Protocol::Auto,
            other => Protocol::parse(other).unwrap_or(Protocol::Tcp),
        };
        ports.push(ServicePort { name: p.name, port, protocol });
    }
    if s.groups.len() > MAX_GROUPS || s.service_accounts.len() > MAX_ACCOUNTS {
        return Err(WireError(format!("{}/{} has too many groups or accounts", s.namespace, s.name)));
    }
    let mut groups = Vec::with_capacity(s.groups.len());
    for g in s.groups {
        text("locality", &g.locality)?;
        if g.labels.len() > MAX_LABELS {
            return Err(WireError(format!("{}/{}: more than {MAX_LABELS} labels", s.namespace, s.name)));
        }
        if g.slots.len() > MAX_SLOTS {
            return Err(WireError(format!("{}/{}: more than {MAX_SLOTS} slots", s.namespace, s.name)));
        }
        for (k, v) in &g.labels {
            text("label", k)?;
            text("label", v)?;
        }
        groups.push(EndpointGroup {
            labels: g.labels,
            locality: g.locality.into(),
            healthy_weight: g.healthy_weight.min(1_000_000),
            slots: g.slots,
        });
    }
    for a in &s.service_accounts {
        text("service account", a)?;
    }
    Ok(ExportedService {
        name: s.name,
        namespace: s.namespace,
        host: s.host,
        ports,
        headless: s.headless,
        groups,
        service_accounts: s.service_accounts,
        exported_at: s.exported_at,
    })
}

/// Checks that the workloads of a service have identities of its peer's trust domain, if that is not the own one.
///
/// # Errors
/// [`WireError`] naming the first that has not.
pub fn of_domain(s: &ExportedService, domain: Option<&TrustDomain>) -> Result<(), WireError> {
    let Some(domain) = domain else { return Ok(()) };
    let of_it = |a: &String| SpiffeId::parse(a).is_ok_and(|id| id.trust_domain() == domain.as_str());
    match s.service_accounts.iter().find(|a| !of_it(a)) {
        None => Ok(()),
        Some(a) => Err(WireError(format!(
            "{}/{}: identity {a:?} is not of trust domain {domain}, which its cluster is of",
            s.namespace, s.name
        ))),
    }
}

/// Encodes a service for the wire.
#[must_use]
pub fn service_pb(s: &ExportedService) -> pb::Service {
    pb::Service {
        name: s.name.clone(),
        namespace: s.namespace.clone(),
        host: s.host.clone(),
        ports: s
            .ports
            .iter()
            .map(|p| pb::Port {
                name: p.name.clone(),
                port: p.port.into(),
                protocol: protocol_name(p.protocol).to_owned(),
            })
            .collect(),
        headless: s.headless,
        groups: s
            .groups
            .iter()
            .map(|g| pb::Group {
                labels: g.labels.clone(),
                locality: g.locality.to_string(),
                healthy_weight: g.healthy_weight,
                slots: g.slots.clone(),
            })
            .collect(),
        service_accounts: s.service_accounts.clone(),
        exported_at: s.exported_at,
    }
}

fn protocol_name(p: Protocol) -> &'static str {
    match p {
        Protocol::Http => "http",
        Protocol::Http2 => "http2",
        Protocol::Grpc => "grpc",
        Protocol::GrpcWeb => "grpc-web",
        Protocol::Https => "https",
        Protocol::Tls => "tls",
        Protocol::Tcp => "tcp",
        Protocol::Mongo => "mongo",
        Protocol::Mysql => "mysql",
        Protocol::Redis => "redis",
        Protocol::Udp => "udp",
        Protocol::Auto => "auto",
    }
}

/// A member of the mesh as every member knows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Its ID.
    pub cluster: ClusterId,
    /// Its network.
    pub network: NetworkId,
    /// Its east-west gateways.
    pub gateways: Vec<GatewayAddress>,
    /// Transports it accepts, preferred first.
    pub transports: Vec<Transport>,
    /// Orders statements about it; the highest wins.
    pub epoch: u64,
    /// It left.
    pub left: bool,
    /// Orders what it says of itself within an epoch.
    #[serde(default)]
    pub revision: u64,
    /// It did not leave by itself: a member declared it gone.
    #[serde(default)]
    pub evicted: bool,
    /// Its trust domain; `None` is the own one, or in what is told that of whoever tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<TrustDomain>,
    /// Of a member of another trust domain: the epoch that it has there.
    #[serde(default, skip_serializing_if = "zero")]
    pub home: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn zero(n: &u64) -> bool {
    *n == 0
}

/// Checks and converts a member record.
///
/// # Errors
/// [`WireError`] naming the field.
pub fn member(m: pb::Member) -> Result<Member, WireError> {
    let cluster = ClusterId::new(&m.cluster).map_err(|e| WireError(e.to_string()))?;
    let network = NetworkId::new(&m.network).map_err(|e| WireError(e.to_string()))?;
    if m.gateways.len() > MAX_GATEWAYS {
        return Err(WireError(format!("cluster {cluster} has more than {MAX_GATEWAYS} gateways")));
    }
    let mut gateways = Vec::with_capacity(m.gateways.len());
    for g in m.gateways {
        let address: SocketAddr = g
            .address
            .parse()
            .map_err(|_| WireError(format!("gateway address {:?} of {cluster} is not IP:port", g.address)))?;
        gateways.push(GatewayAddress { address, weight: g.weight.clamp(1, 1_000_000) });
    }
    let transports = m
        .transports
        .iter()
        .filter_map(|t| match t.as_str() {
            "tcp" => Some(Transport::Tcp),
            "quic" => Some(Transport::Quic),
            // A transport of a newer version is not for us.
            _ => None,
        })
        .collect();
    let trust_domain = match m.trust_domain.as_str() {
        "" => None,
        d => Some(TrustDomain::new(d).map_err(|e| WireError(e.to_string()))?),
    };
    if m.epoch > MAX_EPOCH || m.revision > MAX_EPOCH || m.home_epoch > MAX_EPOCH {
        return Err(WireError(format!(
            "epoch {} or revision {} of {cluster} is absurd",
            m.epoch, m.revision
        )));
    }
    Ok(Member {
        cluster,
        network,
        gateways,
        transports,
        epoch: m.epoch,
        left: m.left || m.evicted,
        revision: m.revision,
        evicted: m.evicted,
        trust_domain,
        home: m.home_epoch,
    })
}

/// Encodes a member for the wire.
#[must_use]
pub fn member_pb(m: &Member) -> pb::Member {
    pb::Member {
        cluster: m.cluster.to_string(),
        network: m.network.to_string(),
        gateways: m
            .gateways
            .iter()
            .map(|g| pb::Gateway { address: g.address.to_string(), weight: g.weight })
            .collect(),
        transports: m
            .transports
            .iter()
            .map(|t| match t {
                Transport::Tcp => "tcp".to_owned(),
                Transport::Quic => "quic".to_owned(),
            })
            .collect(),
        epoch: m.epoch,
        left: m.left,
        revision: m.revision,
        evicted: m.evicted,
        trust_domain: m.trust_domain.as_ref().map(ToString::to_string).unwrap_or_default(),
        home_epoch: m.home,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(name: &str) -> ExportedService {
        ExportedService {
            name: name.into(),
            namespace: "books".into(),
            host: format!("{name}.books.svc.cluster.local"),
            ports: vec![ServicePort { name: "http".into(), port: 9080, protocol: Protocol::Http }],
            headless: false,
            groups: vec![EndpointGroup {
                labels: [("version".to_owned(), "v1".to_owned())].into(),
                locality: "eu/a".to_owned().into(),
                healthy_weight: 2,
                slots: vec![7, u32::MAX],
            }],
            service_accounts: vec!["reviews".into()],
            exported_at: 7,
        }
    }

    #[test]
    fn services_survive_the_wire() {
        let s = sample("reviews");
        assert_eq!(service(service_pb(&s)).unwrap(), s);
    }

    #[test]
    fn hostile_services_are_refused() {
        let with = |f: fn(&mut pb::Service)| {
            let mut s = service_pb(&sample("reviews"));
            f(&mut s);
            service(s)
        };
        assert!(with(|s| s.name = "a.b".into()).is_err());
        assert!(with(|s| s.host = "kubernetes.default.svc.cluster.local".into()).is_err());
        assert!(with(|s| s.ports.clear()).is_err());
        assert!(with(|s| s.ports[0].port = 0).is_err());
        assert!(with(|s| s.ports[0].port = 70_000).is_err());
        assert!(with(|s| s.ports = vec![s.ports[0].clone(); 65]).is_err());
        assert!(with(|s| s.groups = vec![s.groups[0].clone(); 513]).is_err());
        assert!(with(|s| s.service_accounts = vec!["a\nb".into()]).is_err());
        assert!(with(|s| s.host = format!("reviews.books.svc.{}", "x".repeat(600))).is_err());
        assert!(with(|s| s.groups[0].slots = vec![1; 65]).is_err());
    }
}
