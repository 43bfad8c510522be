//! The table of names.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

/// Zones that the mesh owns, without a trailing dot.
const ZONES: [&str; 3] = ["svc.cluster.local", "clusterset.local", "global"];

/// Version of the MCS DNS specification (section "dns-version").
const DNS_VERSION: &str = "1.0.0";

/// What a name has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Addresses, of any family.
    pub addresses: Vec<IpAddr>,
    /// Named ports.
    pub ports: Vec<Port>,
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

/// Hosts by lower-case name without a trailing dot; the names of one service share what it has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names(HashMap<String, Arc<Host>>);

/// What the table says of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found<'a> {
    /// A host.
    Host(&'a Host),
    /// A named port of the host that `target` is.
    Service { target: &'a str, port: u16 },
    /// Text of the zone's version record.
    Version(&'static str),
    /// Below one of the mesh's zones, and not there.
    Missing(&'static str),
    /// Above or at the apex of a zone: it exists and has no records.
    Empty(&'static str),
    /// Not the mesh's.
    Foreign,
}

/// The zone that a name is in or is.
pub(crate) fn zone_of(name: &str) -> Option<&'static str> {
    ZONES
        .into_iter()
        .find(|zone| name.strip_suffix(zone).is_some_and(|below| below.is_empty() || below.ends_with('.')))
}

impl Names {
    /// Builds the table. `*.svc.cluster.local` hosts are also known by the short forms `name.ns` and
    /// `name.ns.svc`; a full name always wins over a short one.
    pub fn new(hosts: impl IntoIterator<Item = (String, Arc<Host>)>) -> Self {
        let mut table = HashMap::new();
        let mut short: Vec<(String, Arc<Host>)> = Vec::new();
        for (name, host) in hosts {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            if let Some(base) = name.strip_suffix(".svc.cluster.local")
                && base.split('.').count() == 2
            {
                short.push((base.to_owned(), host.clone()));
                short.push((format!("{base}.svc"), host.clone()));
            }
            table.insert(name, host);
        }
        for (name, host) in short {
            table.entry(name).or_insert(host);
        }
        Self(table)
    }

    /// How many names there are, short forms included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Looks up a lower-case name without a trailing dot.
    pub(crate) fn find<'a>(&'a self, name: &'a str) -> Found<'a> {
        if let Some(host) = self.0.get(name) {
            return Found::Host(host);
        }
        if let Some(found) = self.service(name) {
            return found;
        }
        // `*.example.com` of a ServiceEntry: the longest suffix wins.
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(host) = self.0.get(&format!("*.{parent}")) {
                return Found::Host(host);
            }
            rest = parent;
        }
        if name == "dns-version.clusterset.local" {
            return Found::Version(DNS_VERSION);
        }
        let Some(zone) = zone_of(name) else { return Found::Foreign };
        let Some(below) = name.strip_suffix(zone).and_then(|b| b.strip_suffix('.')) else {
            return Found::Empty(zone);
        };
        // `svc.clusterset.local` and `ns.svc.cluster.local` are empty non-terminals (RFC 8020).
        let inner = format!(".{below}.{zone}");
        let exists = below == "svc" || self.0.keys().any(|k| k.ends_with(&inner));
        if exists { Found::Empty(zone) } else { Found::Missing(zone) }
    }

    /// `_port._proto.host`, and `_proto.host` above it. A short host may be anybody's, unless the mesh has it.
    fn service<'a>(&'a self, name: &'a str) -> Option<Found<'a>> {
        let (first, rest) = name.strip_prefix('_')?.split_once('.')?;
        let udp = |proto: &str| match proto {
            "tcp" => Some(false),
            "udp" => Some(true),
            _ => None,
        };
        let (second, target) = match rest.strip_prefix('_') {
            Some(r) => r.split_once('.')?,
            None => {
                let host = self.0.get(rest)?;
                let any = udp(first).is_some_and(|u| host.ports.iter().any(|p| p.udp == u));
                return any.then(|| Found::Empty(zone_of(rest).unwrap_or(ZONES[0])));
            }
        };
        let udp = udp(second)?;
        let port = self.0.get(target)?.ports.iter().find(|p| p.name == first && p.udp == udp)?;
        Some(Found::Service { target, port: port.number })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_table_says() {
        let host = Arc::new(Host {
            addresses: vec!["240.240.0.1".parse().unwrap()],
            ports: vec![
                Port { name: "http".into(), number: 9080, udp: false },
                Port { name: "dns".into(), number: 53, udp: true },
            ],
        });
        let n = Names::new([
            ("Reviews.books.svc.cluster.local.".to_owned(), host.clone()),
            ("ratings.books.svc.clusterset.local".to_owned(), host.clone()),
            ("*.wild.example".to_owned(), host.clone()),
        ]);
        for name in [
            "reviews.books.svc.cluster.local",
            "reviews.books.svc",
            "reviews.books",
            "ratings.books.svc.clusterset.local",
            "a.wild.example",
            "a.b.wild.example",
        ] {
            assert_eq!(n.find(name), Found::Host(&host), "{name}");
        }
        for (name, target, port) in [
            ("_http._tcp.ratings.books.svc.clusterset.local", "ratings.books.svc.clusterset.local", 9080),
            ("_dns._udp.reviews.books.svc.cluster.local", "reviews.books.svc.cluster.local", 53),
            ("_http._tcp.reviews.books", "reviews.books", 9080),
        ] {
            assert_eq!(n.find(name), Found::Service { target, port }, "{name}");
        }
        for name in [
            "nothing.books.svc.cluster.local",
            "x.ratings.books.svc.clusterset.local",
            "a.global",
            "_http._udp.ratings.books.svc.clusterset.local",
            "_https._tcp.ratings.books.svc.clusterset.local",
            "_http._tcp.nothing.books.svc.clusterset.local",
            "http._tcp.ratings.books.svc.clusterset.local",
            // A member's part of a service has no name of this form (MCS DNS specification).
            "east.ratings.books.svc.clusterset.local",
        ] {
            assert!(matches!(n.find(name), Found::Missing(_)), "{name}");
        }
        for name in [
            "books.svc.cluster.local",
            "svc.cluster.local",
            "svc.clusterset.local",
            "clusterset.local",
            "_tcp.ratings.books.svc.clusterset.local",
        ] {
            assert!(matches!(n.find(name), Found::Empty(_)), "{name}");
        }
        for name in
            ["example.com", "nothing.books", "wild.example", "cluster.local", "", "notglobal", "_a._tcp.b.c"]
        {
            assert_eq!(n.find(name), Found::Foreign, "{name}");
        }
        assert_eq!(n.find("dns-version.clusterset.local"), Found::Version("1.0.0"));
    }
}
