//! The table of names, kept as it is looked up and answered: by the bytes of names, with records encoded.

mod records;
mod reverse;

use std::{collections::HashMap, net::IpAddr, sync::Arc};

pub(crate) use self::records::{A_LEN, AAAA_LEN, PodRecords, Records};
use self::reverse::Reverse;
use crate::{
    wire,
    zone::{self, Zone},
};

/// Version of the MCS DNS specification (section "dns-version").
pub(crate) const DNS_VERSION: &str = "1.0.0";
const VERSION_NAME: &[u8] = b"\x0bdns-version\x0aclusterset\x05local";

/// What a name has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Addresses, of any family.
    pub addresses: Vec<IpAddr>,
    /// Named ports.
    pub ports: Vec<Port>,
    /// Its addresses are those of its pods, which are known to others by names of their own.
    pub headless: bool,
    /// Pods of a headless service that have names.
    pub pods: Vec<Pod>,
}

/// A port that has an SRV record (RFC 2782).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Lower-case name, without the underscore.
    pub name: String,
    /// Number.
    pub number: u16,
    /// UDP rather than TCP.
    pub udp: bool,
}

/// A pod of a headless service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Host name, a DNS label.
    pub name: String,
    /// Cluster that it runs in, a DNS label.
    pub cluster: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Named ports that it serves.
    pub ports: Vec<Port>,
}

/// Hosts by name; the names of one service share what it has.
#[derive(Debug, Default)]
pub struct Names {
    /// Nothing is known yet, so nothing may be denied.
    unknown: bool,
    hosts: usize,
    nodes: HashMap<Box<[u8]>, Node>,
    /// What `*.parent` has, by parent.
    wild: HashMap<Box<[u8]>, Arc<Records>>,
    reverse: Reverse,
}

#[derive(Debug, Clone)]
enum Node {
    Host(Arc<Records>),
    /// It exists for what is below it (RFC 8020).
    Empty,
}

/// What the table says of a name.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Found<'a> {
    /// A host.
    Host(&'a Records),
    /// A named port of the host whose name begins at `target`.
    Service { host: &'a Records, target: usize, port: &'a [u8], udp: bool },
    /// The zone's version record.
    Version,
    /// Names that an address has, as labels with root.
    Pointer(&'a [Box<[u8]>]),
    /// It exists and has no records.
    Empty,
    /// Below one of the mesh's zones, and not there.
    Missing,
    /// Below one of the mesh's zones, and nobody has told yet what there is.
    Unknown,
    /// Not the mesh's.
    Foreign,
}

/// Where a name is and what it has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lookup<'a> {
    pub(crate) zone: Zone,
    /// Where in the name its zone begins.
    pub(crate) apex: Option<usize>,
    pub(crate) found: Found<'a>,
}

impl Names {
    /// A table that is still to come: names of the mesh's zones fail until it is there, instead of being denied.
    #[must_use]
    pub fn unknown() -> Self {
        Self { unknown: true, ..Self::default() }
    }

    /// Builds the table for one workload. `*.svc.cluster.local` hosts are also known by the short forms `name.ns` and
    /// `name.ns.svc`; a full name always wins over a short one.
    pub fn new(hosts: impl IntoIterator<Item = (String, Arc<Host>)>) -> Self {
        let mut names = Self::default();
        let mut short = Vec::new();
        names.add(hosts, |base, host| {
            short.push((base.to_owned(), host.clone()));
            short.push((format!("{base}.svc"), host.clone()));
        });
        for (name, records) in short {
            if let Some(labels) = wire::labels(&name) {
                names.nodes.entry(labels.into()).or_insert(Node::Host(records));
                names.hosts += 1;
            }
        }
        names
    }

    /// Builds the table for a whole cluster: without short forms, which may be anybody's (`www.dev` is a service of the
    /// namespace `dev` to a mesh, and somebody's web site to the world).
    pub fn for_cluster(hosts: impl IntoIterator<Item = (String, Arc<Host>)>) -> Self {
        let mut names = Self::default();
        names.add(hosts, |_, _| ());
        names
    }

    fn add(
        &mut self,
        hosts: impl IntoIterator<Item = (String, Arc<Host>)>,
        mut shorten: impl FnMut(&str, &Arc<Records>),
    ) {
        let mut last: Option<(Arc<Host>, Arc<Records>)> = None;
        for (name, host) in hosts {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            // Names of one service follow each other.
            let records = match &last {
                Some((h, r)) if Arc::ptr_eq(h, &host) => r.clone(),
                _ => Arc::new(Records::new(&host)),
            };
            last = Some((host.clone(), records.clone()));
            if let Some(parent) = name.strip_prefix("*.") {
                if let Some(labels) = wire::labels(parent) {
                    self.wild.insert(labels.into(), records);
                }
                continue;
            }
            let Some(labels) = wire::labels(&name) else { continue };
            if let Some(base) = name.strip_suffix(".svc.cluster.local")
                && base.split('.').count() == 2
            {
                shorten(base, &records);
            }
            self.reverse.add(&labels, &host);
            for pod in &records.pods {
                if let Some(below) = pod.name_below(&labels) {
                    self.insert(&below, pod.records.clone());
                }
            }
            self.insert(&labels, records);
        }
    }

    fn insert(&mut self, labels: &[u8], records: Arc<Records>) {
        self.hosts += 1;
        self.nodes.insert(labels.into(), Node::Host(records));
        let Some((_, apex)) = zone::of(labels) else { return };
        let mut at = 0;
        while let Some((_, rest)) = wire::first(&labels[at..]) {
            at += rest;
            if at >= apex || self.nodes.contains_key(&labels[at..]) {
                return;
            }
            self.nodes.insert(labels[at..].into(), Node::Empty);
        }
    }

    /// Whether somebody has told what there is.
    #[must_use]
    pub fn is_known(&self) -> bool {
        !self.unknown
    }

    /// How many names there are, short forms included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.hosts + self.wild.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Looks up a lower-case name.
    pub(crate) fn find<'a>(&'a self, name: &'a [u8]) -> Lookup<'a> {
        let zone = zone::of(name);
        let found = self.found(name, zone.is_some());
        let kind = match (&found, zone) {
            (_, Some((zone, _))) => zone,
            (Found::Pointer(_), None) => Zone::Reverse,
            (Found::Foreign, None) => Zone::Foreign,
            (_, None) => Zone::Listed,
        };
        Lookup { zone: kind, apex: zone.map(|(_, at)| at), found }
    }

    fn found<'a>(&'a self, name: &'a [u8], ours: bool) -> Found<'a> {
        match self.nodes.get(name) {
            Some(Node::Host(records)) => return Found::Host(records),
            Some(Node::Empty) => return Found::Empty,
            None => {}
        }
        if let Some(found) = self.service(name) {
            return found;
        }
        if !self.wild.is_empty() {
            // `*.example.com` of a ServiceEntry: the longest suffix wins.
            let mut at = 0;
            while let Some((_, rest)) = wire::first(&name[at..]) {
                at += rest;
                if let Some(records) = self.wild.get(&name[at..]) {
                    return Found::Host(records);
                }
            }
        }
        if ours {
            if name == VERSION_NAME {
                Found::Version
            } else if zone::always().any(|n| n == name) {
                Found::Empty
            } else if self.unknown {
                Found::Unknown
            } else {
                Found::Missing
            }
        } else {
            self.reverse.find(name).map_or(Found::Foreign, Found::Pointer)
        }
    }

    /// `_port._proto.host`, and `_proto.host` above it. A short host may be anybody's, unless the mesh has it.
    fn service<'a>(&'a self, name: &'a [u8]) -> Option<Found<'a>> {
        let host = |at: usize| match self.nodes.get(&name[at..])? {
            Node::Host(records) => Some(&**records),
            Node::Empty => None,
        };
        let (label, second) = wire::first(name)?;
        let port = label.strip_prefix(b"_")?;
        let (label, rest) = wire::first(&name[second..])?;
        match label.strip_prefix(b"_") {
            Some(proto) => {
                let (udp, target) = (is_udp(proto)?, second + rest);
                let host = host(target)?;
                host.serves(Some(port), udp).then_some(Found::Service { host, target, port, udp })
            }
            None => host(second)?.serves(None, is_udp(port)?).then_some(Found::Empty),
        }
    }
}

/// Whether a name is in one of the mesh's zones.
#[must_use]
pub fn in_mesh_zone(name: &str) -> bool {
    wire::labels(name).is_some_and(|labels| zone::of(&labels).is_some())
}

fn is_udp(proto: &[u8]) -> Option<bool> {
    match proto {
        b"tcp" => Some(false),
        b"udp" => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
