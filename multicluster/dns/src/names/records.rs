//! What a host has, encoded.

use std::{net::IpAddr, sync::Arc};

use super::{Host, Pod, Port};
use crate::{
    TTL, wire,
    zone::{self, Zone},
};

/// Address records of one family, whose owner is the name of the question.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    pub(crate) count: u16,
    pub(crate) bytes: Box<[u8]>,
}

/// Bytes of a record before its data.
const HEAD: usize = 12;
/// Bytes of an A and of an AAAA record.
pub(crate) const A_LEN: usize = HEAD + 4;
pub(crate) const AAAA_LEN: usize = HEAD + 16;

/// A host's records.
#[derive(Debug, Default)]
pub(crate) struct Records {
    pub(crate) a: Addresses,
    pub(crate) aaaa: Addresses,
    ports: Vec<Port>,
    pub(crate) pods: Vec<PodRecords>,
}

/// A pod's records.
#[derive(Debug)]
pub(crate) struct PodRecords {
    /// Its label, then that of its cluster, with their lengths.
    labels: Box<[u8]>,
    ports: Vec<Port>,
    pub(crate) records: Arc<Records>,
}

impl Addresses {
    fn new(all: &[IpAddr], kind: u16) -> Self {
        let mut bytes = Vec::new();
        let mut count = 0;
        for ip in all {
            let data: &[u8] = match (ip, kind) {
                (IpAddr::V4(a), wire::A) => &a.octets(),
                (IpAddr::V6(a), wire::AAAA) => &a.octets(),
                _ => continue,
            };
            // More does not fit into any message.
            if bytes.len() + HEAD + data.len() > 60_000 {
                break;
            }
            bytes.extend([0xc0, 12]);
            bytes.extend(kind.to_be_bytes());
            bytes.extend(wire::IN.to_be_bytes());
            bytes.extend(TTL.to_be_bytes());
            bytes.extend([0, if kind == wire::A { 4 } else { 16 }]);
            bytes.extend(data);
            count += 1;
        }
        Self { count, bytes: bytes.into() }
    }

    fn data(&self, kind: u16, len: usize) -> impl Iterator<Item = (u16, &[u8])> {
        self.bytes.chunks_exact(len).map(move |r| (kind, &r[HEAD..]))
    }
}

impl Records {
    pub(super) fn new(host: &Host) -> Self {
        Self {
            a: Addresses::new(&host.addresses, wire::A),
            aaaa: Addresses::new(&host.addresses, wire::AAAA),
            ports: host.ports.clone(),
            pods: host.pods.iter().filter_map(PodRecords::new).collect(),
        }
    }

    /// Whether it has a port of this name, or any, of the protocol.
    pub(super) fn serves(&self, name: Option<&[u8]>, udp: bool) -> bool {
        let is = |p: &Port| p.udp == udp && name.is_none_or(|n| p.name.as_bytes() == n);
        if self.pods.is_empty() {
            self.ports.iter().any(is)
        } else {
            self.pods.iter().any(|p| p.ports.iter().any(is))
        }
    }

    /// The port of this name.
    pub(crate) fn port(&self, name: &[u8], udp: bool) -> Option<u16> {
        find(&self.ports, name, udp)
    }

    /// Data of the address records of both families.
    pub(crate) fn data(&self) -> impl Iterator<Item = (u16, &[u8])> {
        self.a.data(wire::A, A_LEN).chain(self.aaaa.data(wire::AAAA, AAAA_LEN))
    }
}

fn find(ports: &[Port], name: &[u8], udp: bool) -> Option<u16> {
    ports.iter().find(|p| p.udp == udp && p.name.as_bytes() == name).map(|p| p.number)
}

impl PodRecords {
    pub(super) fn new(pod: &Pod) -> Option<Self> {
        if pod.name.contains('.') || pod.cluster.contains('.') {
            return None;
        }
        let labels = wire::labels(&format!("{}.{}", pod.name, pod.cluster))?;
        let own = Host { addresses: pod.addresses.clone(), ..Host::default() };
        Some(Self { labels: labels.into(), ports: pod.ports.clone(), records: Arc::new(Records::new(&own)) })
    }

    /// The port of this name.
    pub(crate) fn port(&self, name: &[u8], udp: bool) -> Option<u16> {
        find(&self.ports, name, udp)
    }

    /// The labels that name the pod below a name of its service: its own and, where other clusters have the service,
    /// that of its cluster (MCS DNS specification). `global` has no names of pods.
    pub(crate) fn labels_below(&self, service: &[u8]) -> Option<&[u8]> {
        match zone::of(service)?.0 {
            Zone::ClusterLocal => self.labels.get(..1 + usize::from(*self.labels.first()?)),
            Zone::Clusterset => Some(&self.labels),
            _ => None,
        }
    }

    /// The pod's name below a name of its service, if it can have one.
    pub(super) fn name_below(&self, service: &[u8]) -> Option<Vec<u8>> {
        let name = [self.labels_below(service)?, service].concat();
        (name.len() < 255).then_some(name)
    }
}
